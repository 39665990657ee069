"""Lungaug: everything that the thesis has no section for, and the command that runs every stage.

    python lungaug.py                                      # no data at hand: synthetic scans, demo preset, report.html
    python lungaug.py --scans LUNA16 --run runs/luna16     # the thesis, on your scans
    python lungaug.py report --run runs/demo               # draw report.html again
    python lungaug.py audit                                # check every equation, by its id

Any option of a stage (`python train_gan.py --help`) may be given here and goes to the stages that know it.
In this file: presets, errors, randomness, safe files, checkpoints and logs, progress, drawing, the report.
It imports no other file of ours: each stage is run as the command that a student would type.
"""

import argparse
import base64
import html
import io
import json
import os
import shlex
import subprocess
import sys
import time
import zipfile
import zlib
from collections import defaultdict, namedtuple
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
STAGES = ("preprocessing", "train_gan", "train_classifier", "evaluate")
STARTED = time.monotonic()


# Presets: the one table of settings. It makes the options of every stage and README's table.

Preset = namedtuple("Preset", "stage name thesis demo unit why")
PRESETS = (
    Preset("preprocessing", "cube", 48, 24, "voxels of 1 mm", "2.1.4 [num_2_1_4_cube]; 24 is an eighth of the work"),
    Preset("preprocessing", "negatives", 655, 655, "a scan", "Table 1: 581,130 in 888 scans [num_2_1_4_negatives]"),
    Preset("preprocessing", "max-slice-mm", 2.5, 2.5, "mm", "2: LUNA16 keeps scans up to it [num_2_slices]"),
    Preset("train_gan", "width", 16, 2, "channels at full size", "lost with figures 4–6; 2 learns in minutes"),
    Preset("train_gan", "batch-size", 64, 8, "cubes", "4.1.1 [num_4_1_batch_size]; 8 give more steps a minute"),
    Preset("train_gan", "learning-rate", 1e-4, 1e-3, "", "4.1.1 [num_4_1_learning_rate]; 1e-3 learns in minutes"),
    Preset("train_gan", "penalty-scale", 10.0, 10.0, "λ", "4.1.1 [num_4_1_lambda]"),
    Preset("train_gan", "auxiliary-scale", 1.0, 3.0, "α", "4.1.1, first; under 1, so few epochs learn no classes"),
    Preset("train_gan", "late-auxiliary-scale", 10.0, 10.0, "α", "4.1.1, at the end"),
    Preset("train_gan", "critic-iterations", 5, 5, "an epoch", "4.1.1, then one of the generator"),
    Preset("train_gan", "epochs", 20000, 600, "of 5 + 1 iterations", "4.1.1 [num_4_1_epochs]; 600 take six minutes"),
    Preset("train_classifier", "score-quantile", 0.5, 0.1, "share of reals", "4.3, “threshold”; few epochs, few pass"),
    Preset("train_classifier", "class-probability", 0.9, 0.9, "share", "4.3, “confident above a threshold”"),
    Preset("train_classifier", "attempts", 20, 20, "for each one wanted", "a GAN may not deliver: a cap on its tries"),
    Preset("train_classifier", "batch-size", 64, 64, "cubes, half positive", "4.4.1 [num_4_4_batch_size]"),
    Preset("train_classifier", "learning-rate", 1e-3, 1e-3, "", "4.4.1 [num_4_4_learning_rate]"),
    Preset("train_classifier", "late-learning-rate", 1e-4, 1e-4, "", "4.4.1"),
    Preset("train_classifier", "decay-epoch", 30, 10, "", "4.4.1: half-way"),
    Preset("train_classifier", "epochs", 60, 20, "over the positives", "4.4.1 [num_4_4_epochs]; 20 do for few cubes"),
)


def within(kind, least, most=1e12):
    """A parser of int or float numbers from `least` to `most`, for argparse."""
    def number(text):
        if not least <= kind(text) <= most:
            raise argparse.ArgumentTypeError(f"{printable(text, 20)} is not from {least} to {most:g}")
        return kind(text)
    number.__name__ = "whole number" if kind is int else "number"      # argparse: invalid whole number value: '3.0'
    return number


def part(text):
    """A share like 2/8, as it is typed, for argparse."""
    one, of = map(int, text.split("/"))
    if not 1 <= one <= of:
        raise argparse.ArgumentTypeError(f"{text} is no share, like 1/8, 2/8, to 8/8")
    return text


OPTIONS = (     # stages, name, default, settings for argparse; PRESETS holds the others
    (STAGES, "--run", None, dict(type=Path, help="the run's folder (default runs/demo, or runs/<name of --scans>)")),
    (STAGES, "--preset", None, dict(choices=("demo", "thesis"), help="default: demo for synthetic scans, else thesis")),
    (STAGES, "--seed", 0, dict(type=within(int, 0), help="the one source of all randomness (default 0)")),
    (STAGES, "--device", "auto", dict(help="auto, cpu, cuda, cuda:1, … (default auto: a GPU where there is one)")),
    (STAGES[:1], "--scans", None, dict(type=Path, help="a tree with MetaImage or DICOM scans (default: synthetic)")),
    (STAGES[:1], "--annotations", None, dict(type=Path, help="default: annotations.csv in or above --scans")),
    (STAGES[:1], "--workers", min(os.cpu_count() or 1, 8), dict(
        type=within(int, 1), help="processes, each with a scan in memory (default: one a core, 8 at most)")),
    (STAGES[:1], "--strict", False, dict(action="store_true", help="stop at the first scan that cannot be used")),
    (STAGES[:1], "--part", "1/1", dict(type=part, help="2/8: one machine's share of the scans; all join in --run")),
    (STAGES[1:2], "--precision", "float32", dict(choices=("float32", "bfloat16"), help="bfloat16: quicker on a GPU")),
    (STAGES[1:2], "--micro-batch", None, dict(type=within(int, 1), help="cubes at a time, where a batch is too large")),
    (STAGES[1:2], "--checkpoint-minutes", 1.0, dict(type=within(float, 0), help="between checkpoints (default 1)")),
    (STAGES[:3], "--overwrite", False, dict(action="store_true", help="start again, from nothing")),
)


def rows_of(stage):
    """A stage's options, of OPTIONS and of PRESETS: (name, (demo's, thesis' default), settings for argparse)."""
    rows = [(name, (default, default), settings) for stages, name, default, settings in OPTIONS if stage in stages]
    for row in (row for row in PRESETS if row.stage == stage):
        kind, most = type(row.thesis), 1 if row.unit.startswith("share") else 1e12
        least = 0 if kind is float else 2 if row.name == "batch-size" else 1
        rows.append((f"--{row.name}", (row.demo, row.thesis), dict(
            type=within(kind, least, most), metavar=row.name.split("-")[-1].upper(),
            help=f"{row.unit}: {row.why} ({stage}: thesis {row.thesis}, demo {row.demo})".lstrip(": "))))
    return rows


def parse(description, *stages, words=None):
    """What was typed: a Namespace with an attribute for each option of the stages, None where it was not typed.

    run is runs/demo then, or runs/<name of the folder> of --scans.
    """
    parser = argparse.ArgumentParser(description=description, usage="python %(prog)s [options]; --help lists them",
                                     allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    rows = [row for stage in stages for row in rows_of(stage)]
    for name, settings in {name: settings for name, _, settings in rows}.items():
        helps = dict.fromkeys(row[2]["help"] for row in rows if row[0] == name)     # of every stage that knows it
        parser.add_argument(name, default=None, **settings | {"help": "; ".join(helps)})
    arguments = parser.parse_args(words)
    scans = getattr(arguments, "scans", None)
    arguments.run = arguments.run or Path("runs") / (scans.resolve().name if scans else "demo")
    return arguments


def settle(arguments, stage, preset):
    """Fill in what was not typed, from the preset typed or else from `preset`. Returns the same Namespace."""
    arguments.preset = arguments.preset or preset
    for name, defaults, _ in rows_of(stage):
        key = name[2:].replace("-", "_")
        if getattr(arguments, key) is None:
            setattr(arguments, key, defaults[arguments.preset == "thesis"])
    return arguments


def typed(arguments, stage):
    """The words that hand a stage those of the typed options that it knows."""
    given = [(name, getattr(arguments, name[2:].replace("-", "_"))) for name, *_ in rows_of(stage)]
    return [word for name, value in given if value is not None for word in (name, value) if word is not True]


# Errors: what the user can act on is one line and exit status 2

class Refusal(Exception):
    """`lungaug: <file>: <what was found> — <what to do>`, for whatever the user can act on."""

    def __str__(self):
        return "lungaug: {}: {} — {}".format(*map(printable, self.args))


def check(holds, where, found, do):
    """Raise Refusal(where, found, do) unless it holds: the one way in which a bad file or option is turned away."""
    if not holds:
        raise Refusal(where, found, do)


@contextmanager
def refusing(path, do):
    """Turn whatever a missing or damaged file makes the code within raise into a Refusal that names the file.

    What parsers raise on damaged input has no bounds. The disk's errors, with an errno, pass: `command` tells of them.
    """
    try:
        yield
    except FileNotFoundError:
        raise Refusal(path, "is not there", do) from None
    except Exception as error:
        if isinstance(error, Refusal) or getattr(error, "errno", None):
            raise
        do = f"free memory, or {do}" if isinstance(error, MemoryError) else do
        raise Refusal(path, f"does not read ({type(error).__name__}: {error})", do) from error


def printable(text, most=300):
    """`text` on one line: what a file says about itself may hold line ends and terminal codes."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
    return text if len(text) <= most else text[:most] + "…"


def command(main):
    """Run a stage's main(); a Refusal, or an error of the file system, is one line on stderr and exit status 2."""
    try:
        sys.exit(main())
    except Refusal as refusal:
        print(refusal, file=sys.stderr)
    except OSError as error:
        where, found = error.filename or "the file system", error.strerror or error
        print(Refusal(where, found, "mend it, then run the same command again"), file=sys.stderr)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        print(Refusal("memory", str(error), "give a smaller --batch-size, --width or --micro-batch"), file=sys.stderr)
    except KeyboardInterrupt:
        print("\nlungaug: stopped — the same command, without --overwrite, goes on from what is saved", file=sys.stderr)
        sys.exit(130)
    sys.exit(2)


# Randomness: one --seed, and a generator of its own for each use, named

def stream(seed, *names):
    """A numpy Generator that depends on the seed and the names alone."""
    return np.random.default_rng([seed, *(zlib.crc32(str(name).encode(errors="surrogateescape")) for name in names)])


def torch_stream(seed, *names):
    """A torch Generator of the same kind; on the CPU, for the same numbers whatever the device."""
    return torch.Generator().manual_seed(int(stream(seed, *names).integers(2 ** 62)))


def pick_device(name):
    """torch.device for --device; auto is a GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).cpu()
    except (RuntimeError, AssertionError, ImportError) as error:
        raise Refusal(f"--device {name}", str(error).splitlines()[0], "give --device cpu, or one there is") from None
    return torch.device(name)


# Safe files: a reader never sees half a file

def write(path, value):
    """Write a file beside its place, fsync, rename: it takes its name only when it is whole and on the disk.

    path: a Path. value: an array (.npy), a checkpoint's state (.pt), what JSON holds (.json), else text or bytes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(beside, "wb") as file:
            if path.suffix == ".npy":
                np.save(file, value)
            elif path.suffix == ".pt":
                torch.save(value, file)
            else:
                value = json.dumps(value, indent=1, default=os.fspath) + "\n" if path.suffix == ".json" else value
                # a file's name, which the text may hold, may be no UTF-8
                file.write(value if isinstance(value, bytes) else value.encode(errors="surrogateescape"))
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def read(path, do):
    """A .json file's value, another's bytes; `do` is what to tell the user where it is missing or broken."""
    with refusing(path, do):
        data = Path(path).read_bytes()
        return json.loads(data) if Path(path).suffix == ".json" else data


def claim(folder, parameters, overwrite):
    """Keep a folder for output of these parameters alone: Refusal where it holds others', unless --overwrite."""
    path = Path(folder) / "parameters.json"
    if path.exists() and not overwrite:
        same_settings(path, read(path, "start again with --overwrite"), parameters)
    write(path, parameters)


def discard(folder, *patterns):
    """Remove what an earlier run left, for --overwrite: first of all, so that nothing old stands beside what is new."""
    for pattern in patterns:
        for path in Path(folder).glob(pattern):
            path.unlink()


@contextmanager
def alone(folder, work):
    """Hold a folder for one work; Refusal where another process is at the same. The lock ends with the process."""
    path = Path(folder) / f".{work.replace(' ', '_')}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        try:
            with suppress(ImportError):     # Windows has no such lock
                import fcntl
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Refusal(folder, f"another process is at {work} here", "wait for it, or give another --run") from None
        yield


# Checkpoints and logs

def load_checkpoint(path, do, **asked):
    """A checkpoint's state (tensors, numbers, text, lists and dicts: no code is run). Raises Refusal.

    asked: what its settings must be. do: what to tell the user where the file is missing.
    """
    data = read(path, do)
    with refusing(path, "start again with --overwrite"):
        check(zipfile.ZipFile(io.BytesIO(data)).testzip() is None, path, "is damaged", "start again with --overwrite")
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        same_settings(path, state.get("settings"), asked)
    return state


def same_settings(path, found, asked, do=""):
    """Raise Refusal, naming what differs and what to do, unless a file's settings are those asked for."""
    found = found if isinstance(found, dict) else {}
    wrong = [f"{key} {found.get(key)}, not {value}" for key, value in asked.items() if found.get(key) != value]
    check(not wrong, path, f"made with {'; '.join(wrong)}",
          do or "give the same options or another --run, or make it again with --overwrite")


def append_log(path, row):
    """One more JSON line at the end of the log."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")


def read_log(path):
    """The log's rows; a last line cut short by a kill is passed over. An empty list where there is none."""
    rows = []
    with suppress(Refusal), refusing(path, ""):
        for line in Path(path).read_bytes().splitlines():
            row = json.loads(line)
            rows.append(row | {"epoch": int(row["epoch"])})
    return rows


def rewind_log(path, epoch):
    """Keep the rows up to `epoch`, the checkpoint's, so that a resumed run's log is the uninterrupted run's."""
    rows, do = read_log(path), "start again with --overwrite"
    with refusing(path, do):
        rows = [row for row in rows if row["epoch"] <= epoch]
        check([row["epoch"] for row in rows] == [*range(1, len(rows) + 1)] and len(rows) == epoch, path,
              f"not the rows 1 to {epoch}", do)
    write(path, "".join(json.dumps(row) + "\n" for row in rows))


def record_stage(folder, arguments, page):
    """Leave a stage's page, options and time since its start in <folder>/options.json, for the report.

    page: in order, headings (text), figures (caption, file in the folder), tables (caption, head, rows), lines (text,).
    """
    options = vars(arguments) | {"python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__}
    command, took = ["python", Path(sys.argv[0]).name, *sys.argv[1:]], time.monotonic() - STARTED
    given = ", ".join(f"{key} {value}" for key, value in options.items() if value is not None and value is not False)
    told = f"{shlex.join(command)}: {duration(took)}, with {given}."
    write(folder / "options.json", {"page": [*page, "This run", [printable(told, 2000)]], "options": options})


def fingerprint(value):
    """CRC-32 of a value that JSON holds."""
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


@torch.no_grad()
def predict(network, cubes, count, device, size=256):
    """network over `count` cubes, `size` at a time; cubes(numbers) → (n, 1, c, c, c) float32. Returns (count, …)."""
    parts = np.split(np.arange(count), range(size, count, size))
    return np.concatenate([network(torch.from_numpy(cubes(part)).to(device)).float().cpu().numpy() for part in parts])


# Progress

def progress(label, total, every=15.0):
    """A function step(done, text="") that shows done/total, rate and time left.

    On a terminal it renews one line; elsewhere it prints a line every `every` seconds, and the last.
    """
    start, first, shown = time.monotonic(), None, 0.0

    def step(done, text=""):
        nonlocal first, shown
        now, live = time.monotonic(), sys.stderr.isatty()
        first = done if first is None else first
        if done < total and now - shown < (0.2 if live else every):
            return
        shown, rate = now, (done - first) / max(now - start, 1e-9)
        left = f", {duration((total - done) / rate)} left" if rate and done < total else ""
        speed = f"  {rate:.1f}/s" if rate >= 1 else f"  {rate * 60:.1f}/min" if rate else ""
        line = f"{label} {done}/{total}{speed}{left}  {printable(text)}"
        print("\r\x1b[K" * live + line, end="" if live and done < total else "\n", file=sys.stderr, flush=True)

    return step


def duration(seconds):
    """45 s, 12 min, 3.4 h, 2.1 days."""
    for least, size, unit in ((172800, 86400, "days"), (3600, 3600, "h")):
        if seconds >= least:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"


def shown(value):
    """A number as a table prints it: three decimals, or a whole number with commas; – for none."""
    if value is None or value != value:
        return "–"
    return f"{value:.3f}" if isinstance(value, float) else f"{value:,}"


def print_table(title, head, rows):
    """A table of text on the terminal: the first column to the left, the others to the right."""
    first, *widths = [max(map(len, column)) for column in zip(head, *rows)]
    print(f"\n{title}")
    for name, *cells in (head, *rows):
        print("  ".join(["", name.ljust(first), *map(str.rjust, cells, widths)]))


# Drawing: PNG with zlib, SVG with strings

def png(pixels, factor=1):
    """A PNG file's bytes, each pixel factor×factor. pixels: uint8, (rows, columns) or, of colours, (…, 3)."""
    pixels = pixels.repeat(factor, 0).repeat(factor, 1)
    height, width = pixels.shape[:2]
    rows = np.pad(pixels.reshape(height, -1), ((0, 0), (1, 0))).tobytes()       # each row begins with its filter: none

    def chunk(name, data):
        return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")

    header = np.array([width, height], ">u4").tobytes() + bytes([8, 2 if pixels.ndim == 3 else 0, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def grey(x):
    """[-1, 1] → 0…255, so that -1000 HU is black and 400 HU white; any shape."""
    return np.clip(np.rint((np.asarray(x, np.float32) + 1) * 127.5), 0, 255).astype(np.uint8)


def tile(images, columns, gap=2, paper=40):
    """Equal-sized images (n, rows, columns[, 3]) in reading order, `gap` pixels of grey `paper` around each."""
    edge, colours = (gap, 0), [(0, 0)] * (np.ndim(images) - 3)
    cells = np.pad(images, [(0, -len(images) % columns), edge, edge, *colours], constant_values=paper)
    lines = [np.concatenate(cells[i:i + columns], axis=1) for i in range(0, len(cells), columns)]
    return np.pad(np.concatenate(lines), [edge[::-1], edge[::-1], *colours], constant_values=paper)


# The stages, each as the command that a student would type

def stage(script, *arguments):
    """Print a stage's command, run it, and stop where it fails, with its exit status."""
    words = [str(word) for word in (script, *arguments)]
    print(f"\n$ python {shlex.join(words)}", flush=True)
    if status := subprocess.run([sys.executable, HERE / words[0], *words[1:]]).returncode:
        sys.exit(status)


# The report: one page that needs nothing else

HEAD = """<!doctype html><html lang="en"><meta charset="utf-8"><title>lungaug</title><style>
body{font:15px/1.5 system-ui,sans-serif;max-width:1000px;margin:2em auto;padding:0 1em;color:#222}
h1{font-size:1.5em}h2{font-size:1.15em;border-bottom:1px solid #ccc;margin-top:2em}
table{border-collapse:collapse;margin:.6em 0}figure{margin:1em 0}figcaption{color:#555;font-size:.9em}
td,th{padding:.15em .8em;text-align:right;border-bottom:1px solid #eee;overflow-wrap:anywhere}
td:first-child,th:first-child{text-align:left}img,svg{max-width:100%;height:auto}img{image-rendering:pixelated}
</style><body><h1>Generative adversarial data augmentation for lung nodule detection</h1>"""


def escaped(text):
    """Text for the page, for a file may have named itself anything."""
    return html.escape(printable(text, 2000))


def table_html(caption, head, rows):
    """A table; every cell is escaped."""
    lines = ["".join(f"<{tag}>{escaped(cell)}</{tag}>" for cell in row)
             for tag, row in [("th", head), *(("td", row) for row in rows)]]
    return f"<p>{escaped(caption)}</p><table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def figure_html(path, caption):
    """A picture, inline, with its caption; a line that says so where no stage made it."""
    if not path.exists():
        return f"<p>{escaped(caption)} (Not made in this run.)</p>"
    picture = path.read_text() if path.suffix == ".svg" else \
        f'<img src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'
    return f"<figure>{picture}<figcaption>{escaped(caption)}</figcaption></figure>"


def report(run):
    """Draw <run>/report.html from the pages that the stages left, in the thesis' order; returns its path."""
    sections = defaultdict(list)
    for path in (run / name / "options.json" for name in ("prepared", "gan", "classifiers", "evaluation")):
        with refusing(path, f"run python lungaug.py --run {run} first"):
            for item in json.loads(path.read_bytes())["page"]:
                if isinstance(item, str):
                    parts = sections[item]
                elif len(item) == 2:
                    parts.append(figure_html(path.with_name(Path(item[1]).name), item[0]))
                else:
                    parts.append(table_html(*item) if len(item) == 3 else f"<p>{escaped(*item)}</p>")
    body = [f"<h2>{escaped(heading)}</h2>{''.join(parts)}" for heading, parts in sorted(sections.items())]
    write(run / "report.html", f"{HEAD}{''.join(body)}</body></html>\n")
    return run / "report.html"


def main():
    if sys.argv[1:2] == ["audit"]:
        return stage("tests/audit.py", *sys.argv[2:])
    if sys.argv[1:2] == ["report"]:
        print(report(parse("Draw report.html again.", "evaluate", words=sys.argv[2:]).run))
        return
    arguments = parse("\n\n".join(__doc__.split("\n\n")[:2]), *STAGES)
    for name in STAGES:
        stage(f"{name}.py", *typed(arguments, name))
    print(f"\n{report(arguments.run)}: everything on one page, after {duration(time.monotonic() - STARTED)}.")


if __name__ == "__main__":
    command(main)
