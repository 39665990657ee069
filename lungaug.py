"""Lungaug: everything that the thesis has no section for, and the command that runs every stage.

    python lungaug.py                                     # no data needed: synthetic scans
    python lungaug.py --scans LUNA16 --run runs/luna16    # the thesis, on your scans
    python lungaug.py report --run runs/demo              # draw report.html again
    python lungaug.py audit                               # check every equation, by its id

Every option of a stage (`python train_gan.py --help`) is accepted here and passed to the stages
that use it. In this file: options, errors, randomness, the device, safe files, folders,
checkpoints and logs, trainings side by side, many cubes, progress, pictures, a stage's page, other
processes, the command. It imports no other file of ours: each stage is run as the command that a
student would type.
"""

import argparse
import difflib
import io
import json
import math
import multiprocessing
import os
import platform
import re
import shlex
import signal
import struct
import subprocess
import sys
import threading
import time
import zipfile
import zlib
from collections import deque
from concurrent.futures import (
    FIRST_EXCEPTION,
    BrokenExecutor,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    wait,
)
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple


HERE = Path(__file__).resolve().parent


def say_interrupted():
    """Say in one line that Ctrl-C has stopped the program. Returns its exit status, 130."""
    # A second Ctrl-C must not cut this line in two.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    print("\nlungaug: interrupted — run the same command, without --overwrite, to resume",
          file=sys.stderr, flush=True)
    return 130


def exit_interrupted(*_):
    """Answer Ctrl-C at once: while packages are imported there is nothing to clear up."""
    os._exit(say_interrupted())


def handle_interrupt_from_here_on():
    """Let Ctrl-C be one line also while the packages below are imported, which takes seconds.

    This is why the scripts import this file before any package. `command` takes over from here.
    """
    is_ours = Path(sys.argv[0]).resolve().parent in (HERE, HERE / "tests")
    # A program that imports this file keeps its own handler.
    if not is_ours:
        return
    # Where a script runs in the background, Ctrl-C is ignored.
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        is_worker = multiprocessing.parent_process() is not None
        signal.signal(signal.SIGINT, signal.SIG_IGN if is_worker else exit_interrupted)
    # A Ctrl-C that `start_script` has held back is answered now. Windows cannot hold one back.
    if os.name != "nt":
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])


handle_interrupt_from_here_on()

import numpy as np
import torch


try:
    import fcntl
except ImportError:
    # Windows has a module of its own for locks.
    fcntl = None
    import msvcrt

STAGES = ("preprocessing", "train_gan", "train_classifier", "evaluate")
STARTED = time.monotonic()
# Threads that read cubes while a network computes.
READ_THREADS = min(4, os.cpu_count() or 1)
# A stage that gets Ctrl-C, too, ends within this time.
INTERRUPT_SECONDS = 2


# Options: one table. It makes the command line of every stage, the presets, and README's table.

# The sides that a cube may have, 3·2^k: the networks halve them down to 3.
CUBES = (6, 12, 24, 48, 96, 192)
NO_LIMIT = 10 ** 12


class Option(NamedTuple):
    """A row of the table of options.

    `fixes` has no default, so that whoever adds an option decides: it names what cannot be resumed
    or reused with another value, among "prepared", "gan", "generated", "classifiers" and "results"
    (see `settings_of`).
    """
    # The name as it is typed, such as --batch-size.
    name: str
    # Those of STAGES that use it.
    stages: tuple
    # int, float, str, Path, a function that reads the text, or bool for a flag.
    kind: type
    fixes: tuple
    help: str
    # The default values in the two presets. Some options have none.
    demo: object = None
    thesis: object = None
    # The section that gives the thesis' value, with its id.
    source: str = ""
    # A number's lowest and highest value.
    low: float = None
    high: float = NO_LIMIT
    choices: tuple = None

    @property
    def dest(self):
        """The option's attribute in the Namespace that `parse` returns."""
        return self.name[2:].replace("-", "_")


def parse_part(text):
    """Check a fraction of the scans such as 2/8, as it is typed, for argparse."""
    is_fraction = re.fullmatch("[0-9]{1,6}/[0-9]{1,6}", text)
    index, count = map(int, text.split("/")) if is_fraction else (0, 0)
    if not 1 <= index <= count:
        raise argparse.ArgumentTypeError(f"{printable(text, 20)} is not one of 1/8, 2/8, …, 8/8")
    return text


PREPROCESSING = ("preprocessing",)
GAN = ("train_gan",)
CLASSIFIER = ("train_classifier",)
EVERYTHING = ("prepared", "gan", "generated", "classifiers", "results")
DEFAULT_WORKERS = min(os.cpu_count() or 1, 8)

OPTIONS = (
    # The run
    Option("--run", STAGES, Path, fixes=(),
           help="Folder of the run (default runs/demo, or runs/<name of the --scans folder>)."),
    Option("--preset", STAGES, str, fixes=(), choices=("demo", "thesis"),
           help="Set of default values (default: demo for synthetic scans, thesis for your own)."),
    Option("--seed", STAGES, int, demo=0, thesis=0, low=0, fixes=EVERYTHING,
           help="Seed of every random draw."),
    Option("--device", STAGES, str, demo="auto", thesis="auto", fixes=(),
           help="auto, cpu, cuda, cuda:1, …; auto takes a GPU where there is one."),
    Option("--overwrite", STAGES[:3], bool, demo=False, thesis=False, fixes=(),
           help="Discard earlier results and start over."),
    Option("--prepared", STAGES[:2], Path, fixes=(),
           help="Another run, whose prepared scans this one uses from now on."),

    # Section 2
    Option("--scans", PREPROCESSING, Path, fixes=(),
           help="Folder with MetaImage or DICOM scans, at any depth (default: synthetic scans)."),
    Option("--annotations", PREPROCESSING, Path, fixes=(),
           help="LUNA16's table of nodules "
                "(default: annotations.csv in --scans or a folder above)."),
    Option("--workers", PREPROCESSING, int, demo=DEFAULT_WORKERS, thesis=DEFAULT_WORKERS, low=1,
           fixes=(),
           help="Processes, each with one scan in memory (default: one per core, at most 8)."),
    Option("--strict", PREPROCESSING, bool, demo=False, thesis=False, fixes=(),
           help="Stop at the first scan that cannot be used, instead of skipping it."),
    Option("--part", PREPROCESSING, parse_part, demo="1/1", thesis="1/1", fixes=(),
           help="Prepare one part of the scans, such as 2/8: eight machines can share one run."),
    Option("--cube", PREPROCESSING, int, demo=24, thesis=48, choices=CUBES, fixes=("prepared",),
           help="Side of a cube in voxels of 1 mm. 24 is an eighth of the work.",
           source="2.1.4 [num_2_1_4_cube]"),
    Option("--negatives", PREPROCESSING, int, demo=655, thesis=655, low=1, fixes=("prepared",),
           help="Negative cubes per scan. Derived from Table 1: 581,130 in 888 scans.",
           source="Table 1 [num_2_1_4_negatives]"),
    Option("--max-slice-mm", PREPROCESSING, float, demo=2.5, thesis=2.5, low=0, fixes=("prepared",),
           help="Largest distance between slices, in mm, of a scan that is used, as in LUNA16. "
                "Where it is raised, only scans skipped before are prepared.",
           source="2 [num_2_slices]"),
    Option("--split", PREPROCESSING, str, demo="patient", thesis="patient", fixes=("prepared",),
           choices=("patient", "cube", "subsets"),
           help="What is split: patients; cubes with their flips, as the thesis seems to have "
                "done, so that the test set leaks; or LUNA16's folders: subset0 to 6 train, 7 "
                "validates, 8 and 9 test. With another one, --overwrite keeps the scans.",
           source="2.1.5"),

    # Section 4.1
    Option("--width", GAN, int, demo=4, thesis=16, low=1, fixes=("gan",),
           help="Channels at full resolution. The thesis' value is lost with figures 4–6; "
                "4 trains in minutes."),
    Option("--batch-size", GAN, int, demo=8, thesis=64, low=2, fixes=("gan",),
           help="Real cubes per batch of the GAN. A small batch gives more steps per minute.",
           source="4.1.1 [num_4_1_batch_size]"),
    Option("--generator-multiple", GAN, int, demo=2, thesis=1, low=1, fixes=("gan",),
           help="Cubes of a generator step, as a multiple of --batch-size. With 2, as in the "
                "code of WGAN-GP's authors, the demo's nodules are nearer to real ones in HU.",
           source="4.1.1"),
    Option("--learning-rate", GAN, float, demo=1e-3, thesis=1e-4, low=0, fixes=("gan",),
           help="Adam's learning rate for the GAN. 0.001 learns in minutes.",
           source="4.1.1 [num_4_1_learning_rate]"),
    Option("--decay-start", GAN, float, demo=0.5, thesis=1.0, low=0, high=1, fixes=("gan",),
           help="Share of the epochs after which the generator's learning rate falls linearly to "
                "0. With 1, as in the thesis, it stays. The critic's stays in any case.",
           source="4.1.1"),
    Option("--penalty-scale", GAN, float, demo=10.0, thesis=10.0, low=0, fixes=("gan",),
           help="λ, the weight of the gradient penalty.", source="4.1.1 [num_4_1_lambda]"),
    Option("--auxiliary-scale", GAN, float, demo=3.0, thesis=1.0, low=0, fixes=("gan",),
           help="α, the weight of the class loss, at first. "
                "With less, the few epochs of the demo learn no classes.",
           source="4.1.1"),
    Option("--late-auxiliary-scale", GAN, float, demo=10.0, thesis=10.0, low=0, fixes=("gan",),
           help="α in the last quarter of the epochs.", source="4.1.1"),
    Option("--critic-iterations", GAN, int, demo=2, thesis=5, low=1, fixes=("gan",),
           help="Critic steps per epoch; one generator step follows them. In a short training the "
                "generator's steps are what is scarce: 2 give rounder nodules than 3 or 5.",
           source="4.1.1"),
    Option("--epochs", GAN, int, demo=640, thesis=20000, low=1, fixes=(),
           help="Epochs of the GAN. 640 take a few minutes at the demo's size.",
           source="4.1.1 [num_4_1_epochs]"),
    Option("--precision", GAN, str, demo="float32", thesis="float32", fixes=("gan",),
           choices=("float32", "tf32", "bfloat16"),
           help="tf32 lets a recent GPU round the factors of products to 10 bits, which is faster; "
                "bfloat16 computes with 7 bits, but keeps weights and losses in float32."),
    Option("--micro-batch", GAN, int, low=1, fixes=(),
           help="Split each batch into chunks of this many cubes, to save memory (default: one "
                "chunk per process). A generator step's are --generator-multiple times as large."),
    Option("--checkpoint-minutes", GAN, float, demo=1.0, thesis=1.0, low=0, fixes=(),
           help="Minutes between two checkpoints."),

    # Sections 4.3 and 4.4
    Option("--generated", CLASSIFIER, float, demo=1.0, thesis=1.0, low=0.01, high=100,
           fixes=("generated",),
           help="Generated positives per real one, the real ones counted with their flips."),
    Option("--score-quantile", CLASSIFIER, float, demo=0.0, thesis=0.5, low=0, high=1,
           fixes=("generated",),
           help="A generated cube needs a score at this quantile of the real cubes' scores, or "
                "above. In a short training a higher one picks cubes that are more alike.",
           source="4.3"),
    Option("--class-probability", CLASSIFIER, float, demo=0.9, thesis=0.9, low=0, high=1,
           fixes=("generated",),
           help="A generated cube needs this probability of its class, or more.", source="4.3"),
    Option("--attempts", CLASSIFIER, int, demo=20, thesis=20, low=1, fixes=("generated",),
           help="Upper limit on attempts per requested cube, in case few pass."),
    Option("--batch-size", CLASSIFIER, int, demo=64, thesis=64, low=2, fixes=("classifiers",),
           help="Cubes per batch of a classifier, half of them positive.",
           source="4.4.1 [num_4_4_batch_size]"),
    Option("--learning-rate", CLASSIFIER, float, demo=1e-3, thesis=1e-3, low=0,
           fixes=("classifiers",),
           help="Adam's learning rate for the classifiers, at first.",
           source="4.4.1 [num_4_4_learning_rate]"),
    Option("--late-learning-rate", CLASSIFIER, float, demo=1e-4, thesis=1e-4, low=0,
           fixes=("classifiers",),
           help="Adam's learning rate for the classifiers from --decay-epoch on.",
           source="4.4.1"),
    Option("--decay-epoch", CLASSIFIER, int, demo=10, thesis=30, low=1, fixes=("classifiers",),
           help="Epoch from which the late learning rate holds: half-way.", source="4.4.1"),
    Option("--epochs", CLASSIFIER, int, demo=20, thesis=60, low=1, fixes=(),
           help="Epochs of each classifier, each one pass over the positives. "
                "20 are enough for the demo's cubes.",
           source="4.4.1 [num_4_4_epochs]"),
    Option("--repeats", CLASSIFIER, int, demo=3, thesis=3, low=1, high=99, fixes=(),
           help="Times that each classifier is trained, with other first weights and batches: "
                "the tables show the mean and the spread."),
)

# What lungaug.py takes besides options.
COMMANDS = ("report", "audit")
KIND_NAMES = {int: "a whole number", float: "a number"}
GROUPS = {PREPROCESSING: "Preprocessing", GAN: "GAN", CLASSIFIER: "Classifiers"}


def options_of(stage):
    """The rows of the table that a stage uses."""
    return [option for option in OPTIONS if stage in option.stages]


def reader_of(option):
    """The function with which argparse reads an option's text: it checks the type and the range."""
    if option.low is None:
        return option.kind

    def read_number(text):
        try:
            value = option.kind(text)
        except ValueError:
            message = f"{printable(text, 20)} is not {KIND_NAMES[option.kind]}"
            raise argparse.ArgumentTypeError(message) from None
        # NaN fails this comparison, too.
        if not option.low <= value <= option.high:
            message = f"{printable(text, 20)} is not from {option.low} to {option.high:g}"
            raise argparse.ArgumentTypeError(message)
        return value

    return read_number


def help_of(option):
    """An option's help: what it is, where the thesis gives it, its defaults."""
    text = option.help
    # An id in brackets is for the audit, not for whoever asks for help.
    section = option.source.split(" [")[0]
    if section.startswith("Table"):
        text += f" See {section}."
    elif section:
        text += f" See section {section}."
    has_default = option.demo is not None or option.thesis is not None
    if has_default and "default" not in option.help and option.kind is not bool:
        if option.demo == option.thesis:
            text += f" Default: {option.demo}."
        else:
            text += f" Default: demo {option.demo}, thesis {option.thesis}."
    return text


def add_option(group, rows):
    """Add to an argparse group the option that these rows, one per stage, describe."""
    first = rows[0]
    text = help_of(first)
    if len(rows) > 1:
        text = " ".join(f"{GROUPS[row.stages]}: {help_of(row)}" for row in rows)
    if first.kind is bool:
        group.add_argument(first.name, action="store_true", default=None, help=text)
        return
    metavar = None if first.choices else first.name.split("-")[-1].upper()
    group.add_argument(first.name, type=reader_of(first), choices=first.choices, default=None,
                       metavar=metavar, help=text)


def what_and_examples(doc):
    """A file's docstring as the help shows it: its first paragraph; its second, the examples."""
    what, *more = doc.split("\n\n")
    return what, f"examples:\n{more[0]}" if more else None


def remedy_for(unknown, stages):
    """What was perhaps meant by words that no option of these stages has; "" where nothing is near.

    It begins with the dash that stands before a remedy.
    """
    word = unknown[0].split("=")[0]
    near = list(COMMANDS if stages == STAGES else ())
    for option in OPTIONS:
        if not any(stage in stages for stage in option.stages):
            continue
        near.append(option.name)
        # Whoever types the name of a preset alone has forgotten its option.
        if word in (option.choices or ()):
            return f" — did you mean {option.name} {word}?"
    remedy = suggestion(word, near)
    return f" — {remedy}" if remedy else ""


def parse(doc, *stages, words=None):
    """Parse the command line of these stages: a Namespace, None for each option that was not typed.

    doc: the docstring of the file, for --help. `run` is never None: without --run it is runs/demo,
    or runs/<name of the folder> of --scans.
    """
    what, examples = what_and_examples(doc)
    parser = argparse.ArgumentParser(
        description=what, usage="python %(prog)s [options]   (--help lists them)",
        epilog=examples, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)

    # Collect the rows of each name: two stages may have an option of one name.
    rows_by_name = {}
    for option in OPTIONS:
        if any(stage in stages for stage in option.stages):
            rows_by_name.setdefault(option.name, []).append(option)

    groups = {}
    for rows in rows_by_name.values():
        title = "The run"
        if len(rows) > 1:
            title = "GAN and classifiers"
        elif rows[0].stages in GROUPS:
            title = GROUPS[rows[0].stages]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        add_option(groups[title], rows)

    options, unknown = parser.parse_known_args(words)
    if unknown:
        typed = printable(" ".join(unknown), 60)
        parser.error(f"unrecognized arguments: {typed}{remedy_for(unknown, stages)}")
    if options.run is None:
        scans = getattr(options, "scans", None)
        options.run = Path("runs") / (scans.resolve().name if scans else "demo")
    return options


def apply_preset(options, stage, preset):
    """Fill in what was not typed, from the typed --preset, or else from `preset`.

    Returns `options`.
    """
    if options.preset is None:
        options.preset = preset
    for option in options_of(stage):
        if getattr(options, option.dest) is None:
            setattr(options, option.dest, getattr(option, options.preset))
    return options


def settings_of(options, record):
    """What must agree between a file and the command that resumes or reuses it: {name: value}.

    record: which file: "prepared", "gan", "generated", "classifiers" or "results".
    """
    names = [option.dest for option in OPTIONS if record in option.fixes]
    return {name: getattr(options, name) for name in names}


def command_words(options, stage):
    """The words that pass on to a stage those of the typed options that it uses."""
    words = []
    for option in options_of(stage):
        value = getattr(options, option.dest)
        if value is True:
            words.append(option.name)
        elif value is not None:
            words += [option.name, value]
    return words


# Errors: whatever the user can act on is one line and exit status 2

class Refusal(Exception):
    """`lungaug: <path>: <problem> — <remedy>`, for whatever the user can act on."""

    def __init__(self, path, problem, remedy):
        # The base class gets all three, so that a Refusal can be sent from one process to another.
        super().__init__(path, problem, remedy)
        self.path = path
        self.problem = problem
        self.remedy = remedy

    def __str__(self):
        path, problem, remedy = map(printable, (self.path, self.problem, self.remedy))
        return f"lungaug: {path}: {problem} — {remedy}"


# The remedy where what an earlier command left is of no use.
START_OVER = "start over with --overwrite"


def print_refusal(refusal):
    """Print a Refusal on stderr; on a terminal, in the place of a line of progress."""
    start = CLEAR_LINE if sys.stderr.isatty() else ""
    print(f"{start}{refusal}", file=sys.stderr)


def check(holds, path, problem, remedy):
    """Raise Refusal(path, problem, remedy) unless it holds."""
    if not holds:
        raise Refusal(path, problem, remedy)


@contextmanager
def refuse_on_error(path, remedy):
    """Turn any exception that a missing or damaged file causes into a Refusal that names the file.

    Parsers raise all kinds of exceptions on damaged input. The disk's own errors, which have an
    errno, pass: `command` reports them.
    """
    try:
        yield
    except Refusal:
        raise
    except FileNotFoundError:
        raise Refusal(path, "not found", remedy) from None
    except MemoryError as error:
        raise Refusal(path, f"out of memory ({error})", f"free memory, or {remedy}") from error
    except Exception as error:
        # An OSError of a decompressor has no errno: it is about the file's content.
        if getattr(error, "errno", None):
            raise
        raise Refusal(path, f"cannot be read ({type(error).__name__}: {error})", remedy) from error


def printable(text, max_length=300):
    """`text` on one line, without control characters: a file may have named itself anything."""
    characters = []
    for character in str(text):
        if not character.isprintable():
            character = character.encode("unicode_escape").decode()
        characters.append(character)
    line = "".join(characters)
    return line if len(line) <= max_length else line[:max_length] + "…"


def suggestion(word, words):
    """`did you mean --epochs?` for a word that was mistyped; "" where no word is near."""
    near = difflib.get_close_matches(word, words, 1)
    return f"did you mean {near[0]}?" if near else ""


def replace_what_a_terminal_lacks():
    """Print ? for a character that the terminal's encoding lacks, such as α on some Windows."""
    # A stream that was closed by whoever started this command is None.
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")

    for stream in (sys.stdout, sys.stderr):
        # A program that calls a stage may have put a stream of its own in place.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


# How PyTorch and the libraries below it say that memory ran out.
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory",
                 "not enough memory", "alloc_failed", "could not create a memory object",
                 "could not create a primitive", "unable to find an engine",
                 "unable to find a valid cudnn algorithm")


def is_out_of_memory(error):
    """Whether an exception says that memory ran out; any other RuntimeError is a bug of ours."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(words in text for words in OUT_OF_MEMORY)


def command(main):
    """Run a stage's main(); what the user can act on is one line on stderr and exit status 2."""
    replace_what_a_terminal_lacks()
    try:
        if signal.getsignal(signal.SIGINT) == exit_interrupted:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        status = main()
        # A broken pipe may show up only at the flush: catch it here.
        sys.stdout.flush()
    except Refusal as refusal:
        status = 2
        print_refusal(refusal)
    except BrokenPipeError:
        status = 1
        # Whoever read the output, such as head, has seen enough. What is still in a buffer would
        # fail again when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        status = 2
        path = error.filename or "the file system"
        problem = error.strerror or error
        print_refusal(Refusal(path, problem, "fix this and run the same command again"))
    except (MemoryError, RuntimeError) as error:
        status = 2
        if is_out_of_memory(error):
            first_line = str(error).partition("\n")[0] or "no more to be had"
            remedy = ("give a smaller --micro-batch, or else --batch-size or --width; classifiers "
                      "are trained one at a time with OMP_NUM_THREADS=1 before the command")
            print_refusal(Refusal("out of memory", first_line, remedy))
        elif "closed by peer" not in str(error).lower():
            raise
        # Where a peer has closed the connection, that process of torchrun has said why.
    except KeyboardInterrupt:
        status = say_interrupted()
    finally:
        # Python takes a moment to end, and would answer Ctrl-C with a traceback.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(status)


# Randomness: one --seed, and a generator of its own, with a name, for each use

def stream(seed, *names):
    """A numpy Generator that depends on the seed and the names alone."""
    hashes = [zlib.crc32(str(name).encode(errors="surrogateescape")) for name in names]
    return np.random.default_rng([seed, *hashes])


def seed_number(seed, *names):
    """A whole number below 2⁶² that depends on the seed and the names alone."""
    return int(stream(seed, *names).integers(2 ** 62))


def torch_stream(seed, *names):
    """A torch Generator that depends on the seed and the names alone.

    It lives on the CPU, so that it draws the same numbers for any device.
    """
    return torch.Generator().manual_seed(seed_number(seed, *names))


def seed_weights(seed, *names):
    """Seed torch's own generator, from which a network built next draws its initial weights."""
    torch.manual_seed(seed_number(seed, *names))


# The device, and how long a training takes on it

def allow_tf32(precision):
    """Let a GPU round the factors of products to TF32's 10 bits, or not, as --precision says.

    Left alone, PyTorch rounds those of convolutions, and not those of matrices.
    """
    allowed = precision != "float32"
    torch.backends.cudnn.allow_tf32 = allowed
    torch.backends.cuda.matmul.allow_tf32 = allowed


def available_devices():
    """The values of --device that name a device of this machine."""
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    return ["cpu", *gpus]


def pick_device(name):
    """The torch.device of --device; auto is a GPU where there is one. Raises Refusal."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    remedy = f"give one that is: {', '.join(available_devices())}"
    try:
        device = torch.device(name)
        # Building a device succeeds for any number; only using it shows whether it is there.
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, ImportError) as error:
        problem = str(error).splitlines()[0]
        raise Refusal(f"--device {name}", f"is not available ({problem})", remedy) from None
    # Others lack some of the operations, or their second derivatives.
    check(device.type in ("cpu", "cuda"), f"--device {name}",
          "only CPUs and CUDA GPUs are supported", remedy)
    return device


# What a network does with one cube takes about as long as this many convolutions at full size. One
# is timed, and multiplied. A step of the GAN, of --width channels, was measured with
# tests/bench_gan_step.py at the thesis' size.
CONVOLUTIONS = {"critic": 42, "generator": 21}
# The same of a classifier, reading included, in convolutions of 4 channels on one thread: measured
# with the demo's, two side by side.
CLASSIFIER_CONVOLUTIONS = {"trained": 1.7, "validated": 0.5}
CLASSIFIER_WIDTH = 4
# How long convolutions are timed; three are timed in any case.
TIMING_SECONDS = 0.1


def time_convolution(cube, width):
    """How many seconds a convolution of a cube of `width` channels takes on this CPU."""
    # A larger network takes longer by its voxels and kernels; no need to wait for it here.
    side = min(cube, 48)
    channels = min(width, 32)
    factor = (cube / side) ** 3 * (width / channels) ** 2
    cubes = torch.zeros(2, channels, side, side, side)
    cubes = cubes.contiguous(memory_format=torch.channels_last_3d)
    kernel = torch.zeros(channels, channels, 3, 3, 3)

    # The first call is slower than those that follow. Where two threads wait for each other beside
    # other work, a call may take a hundred times as long: only the quickest of many tells.
    calls = []
    while len(calls) < 3 or sum(calls) < TIMING_SECONDS:
        start = time.perf_counter()
        torch.nn.functional.conv3d(cubes, kernel, padding=1)
        calls.append(time.perf_counter() - start)
    return min(calls) / len(cubes) * factor


def estimate_seconds(options, cube, epochs):
    """About how long epochs of the GAN take on this CPU. options: those of train_gan.py."""
    convolutions = (options.critic_iterations * CONVOLUTIONS["critic"]
                    + options.generator_multiple * CONVOLUTIONS["generator"])
    seconds = time_convolution(cube, options.width)
    return seconds * convolutions * options.batch_size * epochs


def warn_of_days(options, cube, epochs, device):
    """Warn, in capitals, before anything slow starts, if epochs of the GAN take days on a CPU."""
    if device.type != "cpu":
        return
    seconds = estimate_seconds(options, cube, epochs)
    if seconds > 86400:
        print(f"ON THIS CPU THE GAN TAKES ABOUT {seconds / 86400:,.0f} DAYS. --preset demo takes "
              "minutes; the thesis preset is meant for a GPU.", flush=True)


# Safe files: a reader never sees half a file

def write(path, value):
    """Write a file beside its place, fsync, rename: it takes its name once it is whole and on disk.

    path: a Path. value: an array (.npy), a checkpoint's state (.pt), what JSON holds (.json),
    else text or bytes.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with name_in_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                write_value(file, value, path.suffix)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def name_in_errors(path):
    """Let an error of the disk name this file: one of a write or of fsync names none."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


def write_value(file, value, suffix):
    """Write a value to an open binary file in the format that belongs to the suffix."""
    if suffix == ".npy":
        np.save(file, value)
    elif suffix == ".pt":
        # In memory first: PyTorch's own writer hides what the disk says.
        data = io.BytesIO()
        torch.save(value, data)
        file.write(data.getbuffer())
    elif suffix == ".json":
        text = json.dumps(value, indent=1, default=os.fspath) + "\n"
        file.write(text.encode())
    elif isinstance(value, bytes):
        file.write(value)
    else:
        # The text may hold the name of a file, which need not be UTF-8.
        file.write(value.encode(errors="surrogateescape"))


def read_bytes(path, remedy):
    """A file's bytes. Raises Refusal with this remedy where it is missing."""
    with refuse_on_error(path, remedy):
        return Path(path).read_bytes()


def read_json(path, remedy):
    """A JSON file's value. Raises Refusal with this remedy where it is missing or broken."""
    data = read_bytes(path, remedy)
    with refuse_on_error(path, remedy):
        return json.loads(data)


def file_crc32(path, remedy):
    """The CRC-32 of a file's bytes. Raises Refusal with this remedy where it is missing."""
    return zlib.crc32(read_bytes(path, remedy))


def claim_folder(folder, parameters, overwrite):
    """Reserve a folder for output of these parameters.

    Raises Refusal where it holds output of others, unless `overwrite`.
    """
    path = Path(folder) / "parameters.json"
    if path.exists() and not overwrite:
        previous = read_json(path, START_OVER)
        require_settings(path, previous, parameters)
    write(path, parameters)


def remove(folder, *patterns):
    """Remove an earlier run's files, for --overwrite.

    That is done before anything is written, so that old and new never mix.
    """
    for pattern in patterns:
        for path in Path(folder).glob(pattern):
            path.unlink()


def lock_file(file):
    """Lock an open file for this process. Raises BlockingIOError where another one holds it."""
    if fcntl:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    try:
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except OSError as error:
        raise BlockingIOError(*error.args) from None


def remove_stale(folder, seconds=3600):
    """Remove what `write` left half-written in a folder where it was killed, by SIGKILL say.

    seconds: how old it must be, for another process may be writing at this moment.
    """
    for path in Path(folder).rglob(".*"):
        if not re.fullmatch(r"\..+\.[0-9]+", path.name):
            continue
        try:
            if path.is_file() and time.time() - path.stat().st_mtime > seconds:
                path.unlink()
        except OSError:
            # Another process has renamed or removed it, or it may not be removed: it does no harm.
            pass


@contextmanager
def lock(folder, activity):
    """Lock a folder for one activity, until the block or the process ends.

    Raises Refusal where another process holds the lock.
    """
    path = Path(folder) / f".{activity.replace(' ', '_')}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        try:
            lock_file(file)
        except BlockingIOError:
            problem = f"another process is already {activity} in this folder"
            raise Refusal(folder, problem, "wait for it, or give another --run") from None
        remove_stale(folder)
        yield


# Folders of a run

def arm_folder(run, arm, repeat):
    """The folder of a classifier: <run>/classifiers/<arm>, and repeat_2, repeat_3, … within it."""
    folder = Path(run) / "classifiers" / arm
    return folder if repeat == 1 else folder / f"repeat_{repeat}"


# This file in <run>/prepared names the run whose prepared scans it uses.
OTHER_RUN = "other_run.json"


def uses_other_run(run):
    """Whether a run uses another's prepared scans (see preprocessing.py)."""
    return (run / "prepared" / OTHER_RUN).exists()


def is_prepared(run):
    """Whether a run has all its prepared scans, or uses another's."""
    return uses_other_run(run) or (run / "prepared" / "dataset.json").exists()


# Checkpoints and logs

def load_checkpoint(path, remedy, again="", **expected):
    """A checkpoint's state: tensors, numbers, text, lists and dicts. Raises Refusal.

    Loading runs no code, whatever the file holds.
    remedy: for a missing file. again: for one that is damaged or has other settings, where this is
    not the stage that trains it. expected: values that its settings must have.
    """
    data = read_bytes(path, remedy)
    with refuse_on_error(path, again or START_OVER):
        damaged_member = zipfile.ZipFile(io.BytesIO(data)).testzip()
        check(damaged_member is None, path, "is damaged", again or START_OVER)
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        require_settings(path, state.get("settings"), expected, again)
    return state


def save_checkpoint(trainer, folder):
    """Write a trainer's checkpoint, once every row of its log is on the disk, too.

    After a power cut a log that ends before its checkpoint would not let the training resume.
    """
    log = folder / "log.jsonl"
    with name_in_errors(log), open(log, "ab") as file:
        os.fsync(file.fileno())
    write(folder / "checkpoint.pt", trainer.state())


def resume(trainer, folder):
    """Bring a new trainer to the checkpoint in the folder, where there is one. Raises Refusal."""
    path = folder / "checkpoint.pt"
    if not path.exists():
        return
    # A checkpoint trained with a deliberate mistake, of tests/wrong_versions.py, must not continue
    # without it.
    expected = {"mistake": None} | trainer.settings
    state = load_checkpoint(path, START_OVER, **expected)
    with refuse_on_error(path, START_OVER):
        trainer.restore(state)
    check_epochs(path, trainer.epoch, trainer.options.epochs)


def check_epochs(path, epoch, epochs):
    """Raise Refusal where a checkpoint is of a later epoch than the last one asked for."""
    check(epoch <= epochs, path, f"was trained for {epoch} epochs, more than --epochs {epochs}",
          f"give --epochs {epoch} or more, or {START_OVER}")


def require_settings(path, actual, expected, remedy=""):
    """Raise Refusal, naming what differs, unless a file's settings have the expected values."""
    if not isinstance(actual, dict):
        actual = {}
    differences = []
    for key, value in expected.items():
        found = actual.get(key)
        if found == value:
            continue
        if isinstance(found, dict) or isinstance(value, dict):
            # A record is too long for a line.
            differences.append(f"{key} data that have changed since")
        else:
            differences.append(f"{key} {found}, not {value}")

    if not remedy:
        remedy = f"give the same options or another --run, or {START_OVER}"
    check(not differences, path, f"was made with {'; '.join(differences)}", remedy)


def append_log(path, row):
    """Append one JSON line to a log."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with name_in_errors(path), open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read_log(path):
    """A log's rows, up to the first line that is not one: a kill may cut the last line short.

    An empty list where there is no log.
    """
    rows = []
    try:
        for line in Path(path).read_bytes().splitlines():
            row = json.loads(line)
            row["epoch"] = int(row["epoch"])
            rows.append(row)
    except (FileNotFoundError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
        # What stands before such a line is whole.
        pass
    return rows


def rewind_log(path, epoch):
    """Keep the rows up to `epoch`, the checkpoint's.

    A resumed run's log is then that of an uninterrupted run. Raises Refusal where a row is missing.
    """
    with refuse_on_error(path, START_OVER):
        rows = [row for row in read_log(path) if row["epoch"] <= epoch]
        epochs = [row["epoch"] for row in rows]
        # The length comes first: a damaged checkpoint may say any epoch, and a list of that many
        # numbers would not fit in memory.
        is_whole = len(rows) == epoch and epochs == list(range(1, len(rows) + 1))
        check(is_whole, path, f"does not hold the rows 1 to {epoch}", START_OVER)
    write(path, "".join(json.dumps(row) + "\n" for row in rows))


def fingerprint(value):
    """CRC-32 of a value that JSON can hold."""
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


# Several trainings side by side

# More at a time would take much memory.
MOST_AT_A_TIME = 8
# Set while `side_by_side` ends early.
STOPPING = threading.Event()


class Stopped(Exception):
    """Raised in a thread of `side_by_side` after Ctrl-C, or where another thread has failed."""


def check_goes_on():
    """Raise Stopped where the threads of `side_by_side` are to end."""
    if STOPPING.is_set():
        raise Stopped


def calls_at_a_time():
    """How many calls `side_by_side` runs at a time on this CPU."""
    return min(torch.get_num_threads(), MOST_AT_A_TIME)


def side_by_side(calls, device):
    """Run every call: on a CPU as many at a time as it has cores, up to 8; on a GPU one by one.

    On a CPU each of them computes on one thread. A small network gains next to nothing from a
    second one, so two cores are done in 0.7 of the time; and the bytes of a result do not depend on
    the number of cores. Where a call fails, or at Ctrl-C, the others end at their next batch (see
    `read_ahead`), and what was raised is raised here, once all have ended.
    """
    n_threads = torch.get_num_threads()
    on_cpu = device.type == "cpu"
    n_workers = calls_at_a_time() if on_cpu else 1
    threads_each = 1 if on_cpu else n_threads

    # Set the number of threads in each of the pool's own: oneDNN asks the thread it runs in.
    pool = ThreadPoolExecutor(n_workers, initializer=torch.set_num_threads,
                              initargs=(threads_each,))

    # Run them. Ctrl-C is only noted: an exception of its own could come while a lock is held.
    interrupts = []
    with delay_interrupt(interrupts):
        try:
            await_all([pool.submit(call) for call in calls], interrupts)
        finally:
            # Cancel those that wait first: where one ends early, the next must not begin.
            pool.shutdown(wait=False, cancel_futures=True)
            STOPPING.set()
            pool.shutdown()
            STOPPING.clear()
            torch.set_num_threads(n_threads)


def await_all(jobs, interrupts):
    """Wait until all jobs have ended, or one has failed: then raise what it raised.

    interrupts: a list that is no longer empty after Ctrl-C, at which there is no more to wait for.
    """
    waiting = jobs
    while waiting and not interrupts:
        done, waiting = wait(jobs, timeout=0.2, return_when=FIRST_EXCEPTION)
        for job in done:
            job.result()


# Many cubes: read them ahead, choose some of them, let a network score them

def read_ahead(read, items):
    """read(item) for each item, in order; threads read the next ones while the caller computes.

    read must not depend on what is read before or beside it; then neither do the results depend on
    the number of threads. What it raises is raised here, in its turn.
    """
    pool = ThreadPoolExecutor(READ_THREADS)
    waiting = deque()
    try:
        for item in items:
            check_goes_on()
            waiting.append(pool.submit(read, item))
            if len(waiting) > READ_THREADS:
                yield waiting.popleft().result()
        while waiting:
            check_goes_on()
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def evenly(count, most):
    """At most `most` of the numbers 0 to count − 1, evenly spaced and distinct.

    All of them where count ≤ most.
    """
    return np.linspace(0, count - 1, min(count, most)).astype(int)


@torch.no_grad()
def predict(network, read_cubes, count, device, size=64):
    """A network's output for `count` cubes, 1 or more, `size` at a time; (count, …) float32.

    network: any function of cubes, or a module that is in eval mode already. read_cubes(numbers):
    the cubes of these numbers, (n, 1, c, c, c) float32. Nothing is kept for gradients, so 64 take
    about the memory of 4 in training.
    """
    parts = [np.arange(start, min(start + size, count)) for start in range(0, count, size)]
    outputs = []
    for cubes in read_ahead(read_cubes, parts):
        output = network(torch.from_numpy(cubes).to(device))
        outputs.append(output.float().cpu().numpy())
    return np.concatenate(outputs)


# Progress

CLEAR_LINE = "\r\x1b[K"


class Progress:
    """Show what is done of a total, the rate and the time left.

    On a terminal it redraws one line; elsewhere it prints a line every `every` seconds, and the
    last one.
    """

    def __init__(self, label, total, every=15.0):
        self.label = label
        self.total = total
        self.every = every
        self.done = 0
        self.lock = threading.Lock()
        self.start = time.monotonic()
        self.last_shown = 0.0
        # A resumed run begins with something done, which says nothing about its rate.
        self.done_at_start = None

    def update(self, done, text=""):
        """Say that `done` of the total are done; `text` is shown behind the numbers."""
        self.done = done
        now = time.monotonic()
        is_terminal = sys.stderr.isatty()
        is_last = done >= self.total
        if self.done_at_start is None:
            self.done_at_start = done

        # Return early where a line was shown a moment ago.
        interval = 0.2 if is_terminal else self.every
        if not is_last and now - self.last_shown < interval:
            return
        self.last_shown = now

        line = self.line(done, now)
        if text:
            line += f"  {printable(text)}"
        if is_terminal:
            end = "\n" if is_last else ""
            print(CLEAR_LINE + line, end=end, file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)

    def advance(self, text=""):
        """Say that one more is done: for threads that share what is to be done."""
        with self.lock:
            self.update(self.done + 1, text)

    def line(self, done, now):
        """`label 3/8  2.0/s, 3 s left`"""
        rate = (done - self.done_at_start) / max(now - self.start, 1e-9)
        line = f"{self.label} {done}/{self.total}"
        if rate >= 1:
            line += f"  {rate:.1f}/s"
        elif rate > 0:
            line += f"  {rate * 60:.1f}/min"
        if rate > 0 and done < self.total:
            line += f", {format_duration((self.total - done) / rate)} left"
        return line


def format_duration(seconds):
    """45 s, 12 min, 3.4 h, 2.1 days."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds / 60:.0f} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.1f} days"


def format_number(value, keep_sign=False):
    """A number as a table shows it: three decimals, or a whole number with commas.

    None and NaN are shown as –. keep_sign: show more decimals of a number that would be 0.000, up
    to six, so that a reader sees on which side of 0 it lies.
    """
    if value is None or math.isnan(value):
        return "–"
    if not isinstance(value, float):
        return f"{value:,}"

    decimals = 3
    while keep_sign and decimals < 6 and value != 0 and round(value, decimals) == 0:
        decimals += 1
    return f"{value:.{decimals}f}"


def with_minus(text):
    """A text of numbers with minus signs in place of hyphens, as tables show them."""
    return text.replace("-", "−")


def print_table(title, head, rows):
    """Print a table of text: the first column aligned left, the others right."""
    widths = [max(len(cell) for cell in column) for column in zip(head, *rows)]
    print(f"\n{title}")
    for label, *cells in (head, *rows):
        padded = [cell.rjust(width) for cell, width in zip(cells, widths[1:])]
        print("  " + "  ".join([label.ljust(widths[0]), *padded]))


# Pictures: PNG files with zlib

def png(pixels, factor=1):
    """A PNG file's bytes; each pixel becomes factor×factor.

    pixels: uint8, (rows, columns), or (rows, columns, 3) in colour.
    """
    pixels = pixels.repeat(factor, axis=0).repeat(factor, axis=1)
    height, width = pixels.shape[:2]
    # Colour type 2 is red, green, blue; 0 is grey. The last three bytes choose the only methods
    # that the format has.
    colour_type = 2 if pixels.ndim == 3 else 0
    header = struct.pack(">IIBBBBB", width, height, 8, colour_type, 0, 0, 0)

    # Each row begins with the number of its filter: 0, none.
    rows = np.pad(pixels.reshape(height, -1), ((0, 0), (1, 0))).tobytes()
    signature = b"\x89PNG\r\n\x1a\n"
    data = png_chunk(b"IDAT", zlib.compress(rows))
    return signature + png_chunk(b"IHDR", header) + data + png_chunk(b"IEND", b"")


def png_chunk(name, data):
    """A chunk of a PNG file: length, name, data, CRC-32 of name and data."""
    length = struct.pack(">I", len(data))
    checksum = struct.pack(">I", zlib.crc32(name + data))
    return length + name + data + checksum


def grey(x):
    """[-1, 1] → 0…255, so that -1000 HU is black and 400 HU white; any shape, uint8"""
    levels = np.rint((np.asarray(x, np.float32) + 1) * 127.5)
    return np.clip(levels, 0, 255).astype(np.uint8)


def from_grey(levels):
    """0…255 → [-1, 1], to half a level what `grey` was given; uint8 of any shape, float32"""
    return levels / np.float32(127.5) - 1


# The HU that are black and white, as radiologists choose them.
WINDOWS = {"lung window": (-1350, 150), "mediastinal window": (-160, 240)}
WINDOWS_SAY = ("lung window: −1350 HU black, 150 HU white; mediastinal window: −160 HU black, "
               "240 HU white")


def windowed(hu, window):
    """HU → 0…255, as a window of WINDOWS shows them; any shape, uint8"""
    low, high = WINDOWS[window]
    levels = np.rint((np.asarray(hu, np.float32) - low) * (255 / (high - low)))
    return np.clip(levels, 0, 255).astype(np.uint8)


def tile(images, columns, gap=2, paper=40):
    """Images of one size on one sheet, in reading order.

    images: (n, rows, columns) or, in colour, (n, rows, columns, 3). gap: the pixels of the grey
    level `paper` around each.
    """
    images = np.asarray(images)
    height, width = images.shape[1:3]
    rows = math.ceil(len(images) / columns)
    shape = (gap + rows * (height + gap), gap + columns * (width + gap), *images.shape[3:])

    canvas = np.full(shape, paper, images.dtype)
    for number, image in enumerate(images):
        row, column = divmod(number, columns)
        top = gap + row * (height + gap)
        left = gap + column * (width + gap)
        canvas[top:top + height, left:left + width] = image
    return canvas


def zoom(side, pixels):
    """The whole factor that enlarges an image of `side` pixels to about `pixels`, at least 1."""
    return max(1, pixels // side)


# A stage's page: what it leaves for the report, which evaluate.py draws

class Heading(NamedTuple):
    text: str


class Text(NamedTuple):
    text: str


class Figure(NamedTuple):
    """A picture. The page sets words and a scale bar beside it, which our PNG files cannot hold."""
    caption: str
    # Its name in the stage's folder.
    file: str
    # The functions that made it, such as "evaluate.figure_7", and its equations.
    code: tuple = ()
    # What is in each row, from the top. All rows are of one height.
    rows: tuple = ()
    # What is in each column, from the left. All columns are of one width.
    columns: tuple = ()
    # The side of a pixel, for the scale bar.
    pixel_mm: float = None
    # The row that a slider shows first. Without it there is no slider, and all rows are shown.
    first: int = None


class Table(NamedTuple):
    caption: str
    head: tuple
    rows: list


def processor_name():
    """The name of this machine's CPU, as far as the system tells it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        names = re.findall(r"^model name\s*: (.+)$", text, re.MULTILINE)
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def device_name(device):
    """The name of the GPU or the CPU that --device stands for: auto is a GPU where there is one."""
    device = pick_device(device or "auto")
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()


def commit_name():
    """The commit of this program, with -dirty where files differ from it; "" without git."""
    if not (HERE / ".git").exists():
        return ""
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
    # Another git process that works in this folder must not meet a lock of ours.
    environment = dict(os.environ, GIT_OPTIONAL_LOCKS="0")
    try:
        done = subprocess.run(command, env=environment, timeout=5, capture_output=True, text=True)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return ""
    return done.stdout.strip()


def facts_of_stage(options):
    """What a reader must know of how a stage was run: {name: text}. The only times of a run."""
    seconds = time.monotonic() - STARTED
    return {
        "command": shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
        "time": format_duration(seconds),
        "date": time.strftime("%Y-%m-%d %H:%M %z"),
        "device": device_name(getattr(options, "device", None)),
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} cores",
        "Python": sys.version.split()[0],
        "PyTorch": torch.__version__,
        "NumPy": np.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "commit": commit_name() or "no git checkout",
    }


def save_page(folder, options, items):
    """Save a stage's page, its options and what it took in <folder>/options.json, for the report.

    items: Heading, Text, Figure and Table in the order in which they are shown.
    """
    page = [{"kind": type(item).__name__.lower(), **item._asdict()} for item in items]
    write(folder / "options.json",
          {"page": page, "options": vars(options), "facts": facts_of_stage(options)})


# Other processes: a stage as a command, and workers that share the work of a stage

def start_script(command):
    """Start a script of ours, which gets Ctrl-C only once it has imported this file.

    Before that, while Python itself starts, it would answer with a traceback.
    """
    if os.name == "nt":
        return subprocess.Popen(command)
    # A process inherits the signals that are held back.
    held_back = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        return subprocess.Popen(command)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held_back)


def run_to_end(command):
    """Run a script of ours to its end, also under Ctrl-C, which it gets too.

    Returns its exit status. Raises KeyboardInterrupt where it was interrupted and could not say so
    itself, as it had just ended.
    """
    process = None
    try:
        with delay_interrupt():
            process = start_script(command)
        return process.wait()
    except KeyboardInterrupt:
        if process is None:
            raise
        # This process has nothing left to do but to wait.
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    try:
        process.wait(timeout=INTERRUPT_SECONDS)
    except subprocess.TimeoutExpired:
        # The interrupt may have reached this process alone. Windows can only end the child.
        if os.name == "nt":
            process.terminate()
        else:
            process.send_signal(signal.SIGINT)
        process.wait()
    if process.returncode not in (2, 130):
        raise KeyboardInterrupt
    return process.returncode


# The number of SIGKILL, which Windows does not define.
KILLED = 9


def run_script(script, *words):
    """Print a script's command and run it; where it fails, exit with its status."""
    words = [str(word) for word in words]
    print(f"\n$ python {shlex.join([script, *words])}", flush=True)
    status = run_to_end([sys.executable, HERE / script, *words])
    if status == 0:
        return
    if status == -KILLED:
        print_refusal(Refusal(script, "was killed, probably out of memory",
                              "free memory; the same command resumes"))
    # A child that a signal ended has a negative status; a shell says 128 + its number.
    sys.exit(status if status > 0 else 128 - status)


def tie_to_parent():
    """Let a worker process ignore Ctrl-C, which its parent handles, and end when the parent does.

    A worker whose parent was killed would otherwise keep its memory, its files and their locks.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


@contextmanager
def delay_interrupt(interrupts=None):
    """Let Ctrl-C have its effect after the block: what is half done there could never end.

    interrupts: a list that gets one more item at each, for a block that can end sooner.
    """
    # A command that a script runs in the background ignores Ctrl-C, and so do its processes. Only
    # the main thread can be interrupted.
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        yield
        return

    interrupts = [] if interrupts is None else interrupts
    handler = signal.signal(signal.SIGINT, lambda *_: interrupts.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if interrupts:
        raise KeyboardInterrupt


@contextmanager
def start_pool(workers):
    """A pool of worker processes, tied to this one, which has begun to run.

    However the block ends, jobs that have not begun are cancelled, and those that run are awaited.
    Raises Refusal where a worker is killed.
    """
    pool = ProcessPoolExecutor(workers, initializer=tie_to_parent)
    try:
        # A worker that is just starting, and a pool that is half started, cannot handle Ctrl-C.
        with delay_interrupt():
            pool.submit(os.getpid).result()
        yield pool
    except KeyboardInterrupt:
        # Another Ctrl-C has nothing to add.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise
    except BrokenExecutor:
        raise Refusal("a worker", "was killed, probably out of memory",
                      "give fewer --workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


def submit(pool, *call):
    """Submit a call to a pool, whole also under Ctrl-C: a pool waits for a half submitted one."""
    with delay_interrupt():
        return pool.submit(*call)


# The command: every stage in turn

def warn_before_stages(options):
    """`warn_of_days` for the options of all stages, with the preset that follows the scans."""
    # Nothing slow comes before train_gan.py, which knows the preset of another run's scans.
    if options.prepared or uses_other_run(options.run):
        return

    preset = "thesis" if options.scans else "demo"
    filled = with_defaults(options, "train_gan", preset)
    apply_preset(filled, "preprocessing", preset)
    n_left = epochs_left(filled, options.run / "gan")
    warn_of_days(filled, filled.cube, n_left, pick_device(filled.device))


def with_defaults(options, stage, preset):
    """A copy of the options of all stages, with a stage's defaults for what was not typed."""
    return apply_preset(argparse.Namespace(**vars(options)), stage, preset)


def epochs_left(options, folder):
    """How many epochs a training in this folder has left; options: those of its stage."""
    n_done = 0 if options.overwrite else len(read_log(folder / "log.jsonl"))
    return max(0, options.epochs - n_done)


def estimate_classifiers(options, info):
    """About how long the classifiers take on this CPU, to train and to validate, in seconds.

    options: those of train_classifier.py; info: dataset.json. As many generated cubes are taken to
    pass as are requested.
    """
    real = info["table_1"]["train"]["positive"]
    generated = options.generated * real
    validation = info["table_1"]["validation"]
    n_validated = validation["positive"] + validation["negative"]

    # An epoch takes so many positives, and as many negatives.
    positives = {"real": real, "longer": real + generated, "mixed": real + generated,
                 "fake": generated}
    convolutions = 0
    for arm, n_positives in positives.items():
        per_epoch = (CLASSIFIER_CONVOLUTIONS["trained"] * 2 * n_positives
                     + CLASSIFIER_CONVOLUTIONS["validated"] * n_validated)
        for repeat in range(1, options.repeats + 1):
            folder = arm_folder(options.run, arm, repeat)
            convolutions += per_epoch * epochs_left(options, folder)

    # Time one on one thread, as each of those that are trained side by side has.
    at_a_time = calls_at_a_time()
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seconds = time_convolution(info["parameters"]["cube"], CLASSIFIER_WIDTH)
    torch.set_num_threads(n_threads)
    return convolutions * seconds / at_a_time


def estimate_left(stage, options):
    """About how many seconds the trainings from this stage on take; options: those of all stages.

    None before the scans are prepared, on a GPU, or where another run has prepared them.
    """
    if stage not in ("train_gan", "train_classifier"):
        return None
    path = options.run / "prepared" / "dataset.json"
    if uses_other_run(options.run) or not path.exists():
        return None
    if pick_device(options.device or "auto").type != "cpu":
        return None

    remedy = "run preprocessing.py again"
    with refuse_on_error(path, remedy):
        info = read_json(path, remedy)
        of_gan = with_defaults(options, "train_gan", info["preset"])
        of_classifiers = with_defaults(options, "train_classifier", info["preset"])
        seconds = estimate_classifiers(of_classifiers, info)
        if stage == "train_gan":
            n_left = epochs_left(of_gan, options.run / "gan")
            seconds += estimate_seconds(of_gan, info["parameters"]["cube"], n_left)
    return seconds


def format_estimate(seconds):
    """about 6 minutes, about 3 hours, about 12 days: an estimate is no more exact."""
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"about {seconds / length:,.0f} {unit}"
    return "about a minute" if seconds >= 30 else "less than a minute"


def stage_line(number, options):
    """`Stage 2 of 4, about 6 minutes left.`, without the time where nothing can tell."""
    line = f"Stage {number} of {len(STAGES)}"
    seconds = estimate_left(STAGES[number - 1], options)
    return f"{line}, {format_estimate(seconds)} left." if seconds else f"{line}."


def report_words(words):
    """The words behind `report`, in which the run's folder may stand without --run."""
    if words and not words[0].startswith("-"):
        return ["--run", *words]
    return words


def main():
    if sys.argv[1:2] == ["audit"]:
        run_script("tests/audit.py", *sys.argv[2:])
        return
    if sys.argv[1:2] == ["report"]:
        run_script("evaluate.py", "report", *report_words(sys.argv[2:]))
        return

    options = parse(__doc__, *STAGES)
    warn_before_stages(options)
    for number, stage in enumerate(STAGES, 1):
        print(f"\n{stage_line(number, options)}", flush=True)
        run_script(f"{stage}.py", *command_words(options, stage))
        if not is_prepared(options.run):
            print("The other stages follow once every part is prepared: then run this command "
                  "again.")
            return

    seconds = format_duration(time.monotonic() - STARTED)
    print(f"\n{options.run / 'report.html'}: everything on one page, after {seconds}.")


if __name__ == "__main__":
    command(main)
