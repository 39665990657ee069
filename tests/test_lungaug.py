"""lungaug.py: options, errors, safe files, checkpoints, logs, randomness, drawing; and the shape of the house.

    python -m pytest tests/test_lungaug.py -v
"""

import _thread
import ast
import functools
import importlib
import io
import itertools
import json
import os
import pickle
import re
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import lungaug
from lungaug import OPTIONS, STAGES, Refusal

import numpy as np
import pytest
import torch

import preprocessing
from helpers import run_python, same_state


HERE = Path(__file__).resolve().parent.parent
FILES = ("lungaug", "preprocessing", "models", "losses", "train_gan", "train_classifier", "evaluate")


# The house


def imports(path):
    """The top-level names that a file imports, outside the standard library."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names |= {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
        names |= {node.module} if isinstance(node, ast.ImportFrom) else set()
    return {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)


@pytest.mark.parametrize("file, allowed", [
    ("lungaug", {"numpy", "torch"}),
    ("models", {"torch"}),
    ("losses", {"torch"}),
    ("preprocessing", {"numpy", "scipy", "pydicom", "lungaug"}),
    ("train_gan", {"numpy", "torch", "models", "losses", "preprocessing", "lungaug"}),
    ("train_classifier", {"numpy", "torch", "models", "losses", "preprocessing", "lungaug"}),
    ("evaluate", {"numpy", "torch", "scipy", "models", "preprocessing", "lungaug"}),
])
def test_imports__are_those_of_the_design(file, allowed):
    """No stage imports more than its room allows; lungaug.py imports no other file of ours, so there is no cycle."""
    assert imports(HERE / f"{file}.py") <= allowed


def test_imports__tests_need_nothing_else():
    """Tests use the five packages, our files and each other."""
    ours = {path.stem for path in HERE.glob("tests/*.py")} | set(FILES)
    others = set().union(*map(imports, HERE.glob("tests/*.py"))) - ours
    assert others <= {"torch", "numpy", "pydicom", "scipy", "pytest"}


def test_requirements__are_exactly_the_five_packages():
    """torch, pinned, numpy, pydicom, scipy, pytest."""
    names = [re.match("[a-z]+", line)[0] for line in (HERE / "requirements.txt").read_text().split()]
    assert sorted(names) == ["numpy", "pydicom", "pytest", "scipy", "torch"]


def test_top_level__holds_the_ten_names_and_three_more():
    """The files of the repository's top level are the ten names, LICENSE, .gitignore and .ci.

    git names them: what an editor or an operating system leaves behind is no file of the repository.
    """
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=HERE, capture_output=True, text=True)
    if listing.returncode != 0:
        pytest.skip("no git here, or no repository: an archive has no list of its files")
    names = {path.split("/")[0] for path in listing.stdout.split("\0") if path}
    assert names == {f"{name}.py" for name in FILES} | {
        "tests", "README.md", "requirements.txt", "LICENSE", ".gitignore", ".ci"}


STAGE_OPTIONS = [(option, stage) for option in OPTIONS for stage in option.stages]
OWN_OPTIONS = [(option, stage) for option, stage in STAGE_OPTIONS if option.stages != STAGES]


@functools.cache
def names_in(file):
    """The attributes and constants of a file."""
    names = set()
    for node in ast.walk(ast.parse((HERE / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, ast.Constant):
            names.add(node.value)
    return names


@pytest.mark.parametrize("option, stage", OWN_OPTIONS, ids=lambda value: getattr(value, "name", value))
def test_options__each_is_read_by_its_stage(option, stage):
    """Each option's attribute, or its name as text, is used in its stage's file or in lungaug.py."""
    assert option.dest in names_in(f"{stage}.py") | names_in("lungaug.py")


def test_options__each_row_is_complete():
    """Names are long options of known stages; both presets' values can be typed; no stage has a name twice."""
    for option in OPTIONS:
        assert option.name.startswith("--") and set(option.stages) <= set(STAGES) and option.help.endswith(".")
        assert (option.demo is None) == (option.thesis is None), option.name
        for value in (option.demo, option.thesis):
            if value is not None and option.kind is not bool:
                assert lungaug.reader_of(option)(str(value)) == value, option.name
                assert option.choices is None or value in option.choices, option.name
    pairs = [(option.name, stage) for option, stage in STAGE_OPTIONS]
    assert len(pairs) == len(set(pairs))


@pytest.mark.parametrize("record, stage", [("prepared", "preprocessing"), ("gan", "train_gan"),
                                           ("generated", "train_classifier"), ("classifiers", "train_classifier")])
def test_settings_of__every_option_that_fixes_a_file_is_in_its_settings(record, stage):
    """A checkpoint cannot forget an option: each number of a stage is in its settings, or may change on resuming."""
    options = lungaug.apply_preset(lungaug.parse("", stage, words=[]), stage, "thesis")
    settings = lungaug.settings_of(options, record)
    fixing = [option for option in lungaug.options_of(stage) if record in option.fixes]
    assert settings == {option.dest: option.thesis for option in fixing} and "seed" in settings
    changeable = {"epochs", "repeats", "micro_batch", "checkpoint_minutes", "workers"}
    for option in lungaug.options_of(stage):
        if option.kind in (int, float):
            assert option.fixes or option.dest in changeable, option.name


# Options


def test_parse__what_is_not_typed_is_none():
    """Only typed options have a value, and --run, so that each stage can fill in its own preset."""
    options = lungaug.parse("", *STAGES, words=["--width", "3", "--overwrite", "--seed", "0"])
    assert (options.width, options.overwrite, options.seed) == (3, True, 0)
    assert set(vars(options).values()) == {3, True, 0, None, Path("runs/demo")}


@pytest.mark.parametrize("preset", ["thesis", "demo"])
@pytest.mark.parametrize("stage", STAGES)
def test_apply_preset__defaults_follow_the_preset(stage, preset):
    """What was not typed has the preset's value."""
    options = lungaug.apply_preset(lungaug.parse("", stage, words=[]), stage, preset)
    for option in lungaug.options_of(stage):
        if option.dest not in ("run", "preset"):
            assert getattr(options, option.dest) == getattr(option, preset)
    assert (options.preset, options.seed, options.device) == (preset, 0, "auto")


def test_apply_preset__a_typed_preset_overrides_the_datas():
    """--preset is stronger than what the prepared data suggest."""
    typed = lungaug.parse("", "train_gan", words=["--preset", "thesis"])
    assert lungaug.apply_preset(typed, "train_gan", "demo").epochs == 20000


@pytest.mark.parametrize("word, value", [("--epochs", 7), ("--score-quantile", 0.0), ("--class-probability", 0.0),
                                         ("--learning-rate", 0.5)])
def test_apply_preset__typed_options_override_the_preset(word, value):
    """A typed value stays, 0 too; the others follow the preset."""
    stage = "train_classifier"
    options = lungaug.apply_preset(lungaug.parse("", stage, words=[word, str(value)]), stage, "thesis")
    assert getattr(options, word[2:].replace("-", "_")) == value and options.attempts == 20


def test_command_words__hands_each_stage_what_it_knows():
    """Each stage gets those of the typed options that are its own, and understands them as they were."""
    words = ("--run r --preset demo --seed 0 --device cpu --scans s --workers 2 --strict --part 2/8 --cube 12 "
             "--width 3 --precision bfloat16 "
             "--overwrite --epochs 4 --attempts 2 --score-quantile 0 --batch-size 8 --checkpoint-minutes 0.5").split()
    every, given = lungaug.parse("", *STAGES, words=words), {}
    for stage in STAGES:
        given[stage] = vars(lungaug.parse("", stage, words=[str(word) for word in lungaug.command_words(every, stage)]))
        assert all(value == getattr(every, key) for key, value in given[stage].items())
    assert given["preprocessing"]["cube"] == 12 and given["preprocessing"]["strict"] is True
    assert given["preprocessing"]["part"] == "2/8"
    assert given["train_gan"]["epochs"] == given["train_classifier"]["epochs"] == 4
    assert given["train_classifier"]["score_quantile"] == 0 and "width" not in given["train_classifier"]
    assert set(given["evaluate"]) == {"run", "preset", "seed", "device"}


def test_command_words__nothing_typed_hands_the_run_alone():
    """Without options each stage is called with the run alone, and finds its own defaults."""
    assert [lungaug.command_words(lungaug.parse("", *STAGES, words=[]), stage)
            for stage in STAGES] == [["--run", Path("runs/demo")]] * 4


@pytest.mark.parametrize("words", ["--nonsense", "--epoch 3", "--epochs 0", "--epochs 1.5", "--seed -1", "--attempts 0",
                                   "--batch-size 1",
                                   "--learning-rate -1", "--learning-rate nan", "--learning-rate inf", "--preset quick",
                                   "--score-quantile 1.5", "--class-probability 1.1", "extra"])
def test_parse__what_no_stage_can_use_exits_2(words, capsys):
    """An unknown or shortened option, or a value out of range, ends with status 2 and a line that names it."""
    with pytest.raises(SystemExit) as stopped:
        lungaug.parse("", "train_classifier", words=words.split())
    assert stopped.value.code == 2 and words.split()[0] in capsys.readouterr().err


@pytest.mark.parametrize("stages, words, said", [
    (STAGES, "--epoch 3", "--epoch 3 — did you mean --epochs?"), (STAGES, "--epoch=3", "did you mean --epochs?"),
    (STAGES, "--batchsize 3", "did you mean --batch-size?"), (STAGES, "reprot", "did you mean report?"),
    (STAGES, "adit", "did you mean audit?"), (STAGES, "demo", "did you mean --preset demo?"),
    (["train_gan"], "thesis", "did you mean --preset thesis?"), (["train_gan"], "--zzz", "arguments: --zzz\n"),
    (["train_gan"], "reprot", "arguments: reprot\n"), (["evaluate"], "--sed 1", "did you mean --seed?")])
def test_parse__what_was_mistyped_gets_a_suggestion(stages, words, said, capsys):
    """The nearest option, or command of lungaug.py; a preset's name gets its option; nothing where nothing is near."""
    with pytest.raises(SystemExit) as stopped:
        lungaug.parse("", *stages, words=words.split())
    assert stopped.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize("module", ["lungaug", *STAGES])
def test_help__ends_with_examples_that_can_be_typed(module, capsys):
    """Two or more, each of the file's own command, with options that it knows; groups and defaults stay above them."""
    doc = importlib.import_module(module).__doc__
    stages = STAGES if module == "lungaug" else [module]
    with pytest.raises(SystemExit):
        lungaug.parse(doc, *stages, words=["--help"])
    above, below = capsys.readouterr().out.split("\nexamples:\n")
    assert "The run:" in above and "Default" in above and not re.search("^    python", above, re.M)
    assert "None" not in above
    commands = re.findall(rf"^    (?:python|torchrun .* --) {module}.py(.*?)(?:  .*|#.*|)$", below, re.M)
    assert len(commands) == len(below.strip().splitlines()) >= 2
    for command in commands:
        words = command.split()
        if not words or words[0] not in ("report", "audit", "--compare"):
            lungaug.parse(doc, *stages, words=words)


@pytest.mark.parametrize("words, key, value", [("--part 1/1", "part", "1/1"), ("--part 2/2", "part", "2/2"),
                                               ("--batch-size 2", "batch_size", 2),
                                               ("--micro-batch 1", "micro_batch", 1),
                                               ("--score-quantile 1", "score_quantile", 1)])
def test_parse__the_least_and_the_most_are_taken(words, key, value):
    """A value at the edge of its range is read."""
    assert getattr(lungaug.parse("", *STAGES, words=words.split()), key) == value


@pytest.mark.parametrize("words", ["--part 0/2", "--part 3/2", "--part 2", "--part a/b", "--part 1/2/3", "--part /2",
                                   "--part -1/2", "--max-slice-mm nan", "--workers 0"])
def test_parse__what_preprocessing_cannot_use_exits_2(words, capsys):
    """A part that is none, or a number out of range, ends with status 2 and a line that names the option."""
    with pytest.raises(SystemExit) as stopped:
        lungaug.parse("", "preprocessing", words=words.split())
    assert stopped.value.code == 2 and words.split()[0] in capsys.readouterr().err


@pytest.mark.parametrize("cube", ["1", "3", "20", "47"])
def test_cube__a_side_that_no_network_takes_is_refused_at_once(cube, tmp_path, monkeypatch, capsys):
    """A cube's side is 3·2^k: another is refused before hours of preparing scans, not by a traceback after them."""
    monkeypatch.setattr(sys, "argv",
                        ["preprocessing.py", "--scans", str(tmp_path), "--run", str(tmp_path), "--cube", cube])
    with pytest.raises(SystemExit) as stopped:
        lungaug.command(preprocessing.main)
    assert stopped.value.code == 2 and "cube" in capsys.readouterr().err


@pytest.mark.parametrize("words, expected", [([], "runs/demo"), (["--scans", "a/LUNA16"], "runs/LUNA16"),
                                             (["--scans", "a/LUNA16/."], "runs/LUNA16"),
                                             (["--scans", "a/LUNA16", "--run", "x"], "x")])
def test_parse__the_run_follows_the_data(words, expected):
    """runs/demo for synthetic scans, runs/<folder> for yours; a typed --run is stronger."""
    assert lungaug.parse("", "preprocessing", words=words).run == Path(expected)


# Errors


def test_refusal__is_one_line_in_its_form():
    """lungaug: <where>: <found> — <do>."""
    assert str(Refusal(Path("a/b.mhd"), "spacing 0", "mend it")) == "lungaug: a/b.mhd: spacing 0 — mend it"


@pytest.mark.parametrize("text", ["a\nb", "a\r\x1b[2Jb", "a\u2028b", "a\0b", "a\x85b", "a\udcffb"])
def test_refusal__control_characters_are_escaped(text):
    """What a file says of itself can neither start a line nor steer the terminal, and can be printed."""
    line = str(Refusal(text, text, text))
    assert line.isprintable() and len(line.splitlines()) == 1 and line.encode() and line.count("a") >= 3


def test_refusal__goes_from_process_to_process():
    """A worker's Refusal arrives whole in the process that asked."""
    one = Refusal(Path("x"), "y", "z")
    other = pickle.loads(pickle.dumps(one))
    assert type(other) is Refusal and str(other) == str(one)


def test_refusal__a_very_long_name_is_cut():
    """A name of a million characters does not fill the screen."""
    assert len(str(Refusal("x" * 10 ** 6, "found", "do"))) < 400


def test_check__raises_only_where_it_does_not_hold():
    """check() is silent where the condition holds, and a Refusal where it does not."""
    lungaug.check(True, "where", "found", "do")
    with pytest.raises(Refusal, match="where: found — do"):
        lungaug.check(False, "where", "found", "do")


def refuse():
    raise Refusal("a.mhd", "found", "do")


def no_space():
    raise OSError(28, "No space left on device", "x/y.npy")


def bare_os_error():
    raise OSError("odd")


def no_memory():
    torch.empty(2 ** 60)


def no_memory_for_numpy():
    np.ones(2 ** 55)


@pytest.mark.parametrize("main, names",
                         [(refuse, "a.mhd"), (no_space, "x/y.npy: No space left"), (bare_os_error, "odd"),
                                         (no_memory, "--batch-size"), (no_memory_for_numpy, "--batch-size")])
def test_command__one_line_and_status_2(main, names, capsys):
    """A Refusal, or an error of the file system, is one line on stderr, nothing on stdout, and status 2."""
    with pytest.raises(SystemExit) as stopped:
        lungaug.command(main)
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and out == "" and names in err
    assert re.fullmatch("lungaug: [^\n]+: [^\n]+ — [^\n]+\n", err)


@pytest.mark.parametrize("is_terminal", [True, False])
def test_command__on_a_terminal_the_line_takes_the_place_of_the_progress(monkeypatch, is_terminal):
    """It does not stand behind what is shown of the progress; in a file every line stays."""
    class Stream(io.StringIO):
        def isatty(self):
            return is_terminal

    def main():
        progress = lungaug.Progress("epochs", 9)
        progress.update(1, "loss 0.5")
        raise Refusal("checkpoint.pt", "is damaged", "start over")

    monkeypatch.setattr(sys, "stderr", Stream())
    with pytest.raises(SystemExit):
        lungaug.command(main)
    line = "lungaug: checkpoint.pt: is damaged — start over\n"
    before = sys.stderr.getvalue().removesuffix(line)
    # \r goes to the start of the line, and what follows clears it.
    assert before.endswith("loss 0.5\r\x1b[K" if is_terminal else "loss 0.5\n")


def test_command__a_bug_of_ours_is_not_hidden():
    """What the user cannot act on keeps its traceback."""
    with pytest.raises(ZeroDivisionError):
        lungaug.command(lambda: 1 / 0)
    with pytest.raises(RuntimeError, match="shape"):
        lungaug.command(lambda: torch.ones(2).reshape(3))


def test_command__where_its_streams_are_closed(monkeypatch, tmp_path):
    """A service manager may start a command without stdout or stderr: it runs, and ends with the right status."""
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)

    def main():
        print("a line")
        lungaug.Progress("epochs", 1).update(1, "")
        raise Refusal("a", "b", "c")

    with pytest.raises(SystemExit) as stopped:
        lungaug.command(main)
    assert stopped.value.code == 2


def test_command__the_end_of_another_process_needs_no_traceback(capsys):
    """Under torchrun the process that ended has said why; what gloo says of it is no bug of this one."""
    def main():
        raise RuntimeError("[pair.cc:547] Connection closed by peer [127.0.0.1]:4711. GLHF!")

    with pytest.raises(SystemExit) as stopped:
        lungaug.command(main)
    assert stopped.value.code == 2 and capsys.readouterr().err == ""


def end_at_once():
    os.kill(os.getpid(), 9)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
@pytest.mark.parametrize("jobs", [1, 500])
def test_start_pool__a_worker_that_is_killed_is_one_line(jobs):
    """Whether while jobs are submitted or while one is awaited."""
    with pytest.raises(Refusal, match="killed, probably out of memory"):
        with lungaug.start_pool(1) as pool:
            submitted = [lungaug.submit(pool, end_at_once) for _ in range(jobs)]
            for job in submitted:
                job.result()


def test_start_pool__a_worker_that_is_killed_at_its_start_is_one_line(monkeypatch):
    monkeypatch.setattr(lungaug, "tie_to_parent", end_at_once)
    with pytest.raises(Refusal, match="killed, probably out of memory"):
        with lungaug.start_pool(1):
            pass


@pytest.mark.skipif(sys.platform == "win32", reason="Windows sends no SIGINT to a process itself")
@pytest.mark.parametrize("handler, interrupts", [(signal.SIG_IGN, False), (signal.default_int_handler, True)])
def test_delay_interrupt__an_ignored_one_stays_ignored(handler, interrupts):
    """A command that a script runs in the background ignores Ctrl-C: within the block, too."""
    before = signal.signal(signal.SIGINT, handler)
    interrupted = False
    try:
        with lungaug.delay_interrupt():
            # A process that is started in the block inherits that it is ignored.
            ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
            os.kill(os.getpid(), signal.SIGINT)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        signal.signal(signal.SIGINT, before)
    assert interrupted == interrupts
    assert ignored == (handler == signal.SIG_IGN)


def test_command__success_is_status_0():
    """A stage that ends well ends with status 0."""
    with pytest.raises(SystemExit) as stopped:
        lungaug.command(lambda: None)
    assert stopped.value.code in (0, None)


def test_run_script__a_failing_stage_stops_the_run_with_its_status(monkeypatch, capsys, tmp_path):
    """The command is printed as a student would type it; where it fails, so do we, with the same status."""
    (tmp_path / "fails.py").write_text("import sys; sys.exit(int(sys.argv[2]))")
    monkeypatch.setattr(lungaug, "HERE", tmp_path)
    lungaug.run_script("fails.py", "a b", 0)
    with pytest.raises(SystemExit) as stopped:
        lungaug.run_script("fails.py", "a b", 7)
    assert stopped.value.code == 7 and "$ python fails.py 'a b' 7\n" in capsys.readouterr().out


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_run_script__a_stage_that_is_killed_is_told(monkeypatch, capfd, tmp_path):
    """The system kills whoever takes too much memory, without a word: the run says so, and ends as a shell would."""
    (tmp_path / "dies.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    monkeypatch.setattr(lungaug, "HERE", tmp_path)
    with pytest.raises(SystemExit) as stopped:
        lungaug.run_script("dies.py")
    assert stopped.value.code == 137
    assert re.fullmatch("lungaug: dies.py: was killed, [^\n]*out of memory[^\n]* — [^\n]+\n", capfd.readouterr().err)


NOT_HERE = ["nonsense", "cuda:99", "meta", "meta:x", "hpu", "privateuseone", "tpu", "mps", "xla", "vulkan", ""]


@pytest.mark.parametrize("name", NOT_HERE)
def test_pick_device__an_unavailable_device_is_one_line(name):
    """A device that this machine, torch or this program has not is refused by name; those that are there are listed."""
    with pytest.raises(Refusal, match=f"--device {name}: ") as caught:
        lungaug.pick_device(name)
    assert "cpu" in caught.value.remedy and "\n" not in str(caught.value)


@pytest.mark.parametrize("given, named", [("cuda:1", "cuda:1"), ("cuda", "cuda"), ("cpu", None), (None, None)])
def test_device_name__is_that_of_the_device_asked_for(monkeypatch, given, named):
    """The second GPU's name, where the stage ran on the second one; on the CPU it is the processor's."""
    monkeypatch.setattr(lungaug, "pick_device", lambda name: torch.device("cpu" if name == "auto" else name))
    monkeypatch.setattr(torch.cuda, "get_device_name", str)
    assert lungaug.device_name(given) == (named or lungaug.processor_name())


MEMORY_ERRORS = [
    MemoryError(),
    MemoryError("Unable to allocate 373. GiB for an array with shape (100000000000,)"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nGPU 0 has 1 MiB free."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "
                 "you tried to allocate 400000000000 bytes. Error code 12 (Cannot allocate memory)"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("could not create a primitive"),
    RuntimeError("GET was unable to find an engine to execute this computation"),
    RuntimeError("Unable to find a valid cuDNN algorithm to run convolution"),
]


@pytest.mark.parametrize("error", MEMORY_ERRORS, ids=lambda error: str(error)[:24])
def test_command__every_wording_of_no_memory_is_one_line(capsys, error):
    """The remedy that changes no result, --micro-batch, comes first."""
    def main():
        raise error

    with pytest.raises(SystemExit) as stopped:
        lungaug.command(main)
    line = capsys.readouterr().err
    assert stopped.value.code == 2
    assert re.fullmatch("lungaug: out of memory: [^\n]+ — [^\n]+\n", line)
    assert line.index("--micro-batch") < line.index("--batch-size") < line.index("--width")


def test_command__memory_that_really_runs_out(capsys):
    """PyTorch's own error, asked for more than any machine has."""
    with pytest.raises(SystemExit) as stopped:
        lungaug.command(lambda: torch.empty(2 ** 55))
    assert stopped.value.code == 2 and "--micro-batch" in capsys.readouterr().err


def test_command__another_error_of_memory_is_a_bug():
    """An illegal access is no want of memory: its traceback is needed."""
    def main():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal"):
        lungaug.command(main)


def gan_options(*words):
    return lungaug.apply_preset(lungaug.parse("", "train_gan", words=map(str, words)), "train_gan", "thesis")


def test_warn_of_days__in_capitals_with_the_days(monkeypatch, capsys):
    """On a CPU, where it takes more than a day; not on a GPU, and not for hours."""
    monkeypatch.setattr(lungaug, "estimate_seconds", lambda *_: 90 * 86400)
    lungaug.warn_of_days(gan_options(), 48, 1, torch.device("cuda"))
    assert capsys.readouterr().out == ""
    lungaug.warn_of_days(gan_options(), 48, 1, torch.device("cpu"))
    assert capsys.readouterr().out.startswith("ON THIS CPU THE GAN TAKES ABOUT 90 DAYS. --preset demo ")
    monkeypatch.setattr(lungaug, "estimate_seconds", lambda *_: 3600)
    lungaug.warn_of_days(gan_options(), 48, 1, torch.device("cpu"))
    assert capsys.readouterr().out == ""


def test_estimate_seconds__proportional_to_what_is_computed(monkeypatch):
    """Twice the epochs or the batch take twice as long; a cube of twice the side, where the clock says the same, eight
    times; twice the width four times. A clock that ticks a second at each look makes it exact."""
    ticks = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    first = lungaug.estimate_seconds(gan_options("--width", 1), 48, 100)
    assert lungaug.estimate_seconds(gan_options("--width", 1), 48, 200) == 2 * first
    assert lungaug.estimate_seconds(gan_options("--width", 1, "--batch-size", 128), 48, 100) == 2 * first
    assert lungaug.estimate_seconds(gan_options("--width", 1), 96, 100) == 8 * first
    assert lungaug.estimate_seconds(gan_options("--width", 64), 48, 100) == 4 * first
    doubled, tripled = (lungaug.estimate_seconds(gan_options("--width", 1, "--generator-multiple", m), 48, 100)
                        for m in (2, 3))
    assert tripled - doubled == pytest.approx(doubled - first) and first < doubled < 2 * first


def test_time_convolution__the_quickest_call_beside_other_work(monkeypatch):
    """Seven calls of 12 ms, as where two threads wait for each other, then one of 2 ms: that is 1 ms for a cube."""
    durations = itertools.chain([0.012] * 7, [0.002], itertools.repeat(0.012))
    now = 0.0
    is_start = itertools.cycle([True, False])

    def clock():
        nonlocal now
        if not next(is_start):
            now += next(durations)
        return now

    monkeypatch.setattr(time, "perf_counter", clock)
    assert lungaug.time_convolution(6, 1) == pytest.approx(0.001)


def test_warn_before_stages__counts_the_epochs_that_are_left(monkeypatch, tmp_path):
    """A GAN that is trained already takes no days."""
    epochs = []
    monkeypatch.setattr(lungaug, "warn_of_days", lambda options, cube, left, device: epochs.append(left))
    lungaug.write(tmp_path / "gan" / "log.jsonl", '{"epoch": 1}\n' * 19_990)
    words = ["--run", str(tmp_path), "--preset", "thesis", "--device", "cpu"]
    lungaug.warn_before_stages(lungaug.parse("", *STAGES, words=words))
    # Under --overwrite it is trained again.
    lungaug.warn_before_stages(lungaug.parse("", *STAGES, words=[*words, "--overwrite"]))
    assert epochs == [10, 20_000]


def test_main__the_thesis_on_a_cpu_is_told_of_before_anything_slow(monkeypatch, capsys, tmp_path):
    """With scans of one's own the thesis preset holds: the line comes before the first stage; with --preset demo or
    synthetic scans there is none."""
    # Whoever runs the tests may have made runs/demo before.
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lungaug, "estimate_seconds", lambda options, cube, epochs: epochs * cube)
    monkeypatch.setattr(lungaug, "run_script", lambda script, *words: print(script))
    for words, is_told in ((["--scans", tmp_path], True), (["--scans", tmp_path, "--preset", "demo"], False),
                           ([], False), (["--preset", "thesis"], True)):
        monkeypatch.setattr(sys, "argv", ["lungaug.py", "--device", "cpu", *map(str, words)])
        lungaug.main()
        lines = capsys.readouterr().out.strip().splitlines()
        first_line, *_, last_line = lines
        assert "once every part is prepared" in last_line
        assert first_line.startswith("ON THIS CPU") == is_told
        assert is_told or lines[:2] == ["Stage 1 of 4.", "preprocessing.py"]


TABLE_1 = {"train": {"positive": 16, "negative": 900}, "validation": {"positive": 2, "negative": 8}}


def test_estimate_classifiers__counts_what_is_trained_and_what_is_validated(monkeypatch, tmp_path, threads):
    """By hand, in convolutions of a second on one thread. An epoch trains on 16 positives (real), 24 (longer, mixed)
    and 8 (fake), and on as many negatives: 2 · 72 cubes. Each validates 10. Two repeats of three epochs."""
    monkeypatch.setattr(lungaug, "CLASSIFIER_CONVOLUTIONS", {"trained": 0.8, "validated": 0.4})
    monkeypatch.setattr(lungaug, "time_convolution",
                        lambda cube, width: {(24, 4, 1): 1}[cube, width, torch.get_num_threads()])
    words = ["--run", str(tmp_path), "--generated", "0.5", "--repeats", "2", "--epochs", "3"]
    options = lungaug.apply_preset(lungaug.parse("", "train_classifier", words=words), "train_classifier", "demo")
    info = {"parameters": {"cube": 24}, "table_1": TABLE_1}
    whole = 2 * 3 * (2 * 72 * 0.8 + 4 * 10 * 0.4)
    threads(1)
    assert lungaug.estimate_classifiers(options, info) == pytest.approx(whole)

    # Two epochs of one arm, of the second repeat, are done; under --overwrite they are done again.
    lungaug.write(lungaug.arm_folder(tmp_path, "real", 2) / "log.jsonl", '{"epoch": 1}\n' * 2)
    left = whole - 2 * (2 * 16 * 0.8 + 10 * 0.4)
    assert lungaug.estimate_classifiers(options, info) == pytest.approx(left)
    options.overwrite = True
    assert lungaug.estimate_classifiers(options, info) == pytest.approx(whole)

    # As many are trained at a time as there are threads, up to a limit; it leaves the threads as they are.
    for count in (3, lungaug.MOST_AT_A_TIME + 1):
        threads(count)
        at_a_time = min(count, lungaug.MOST_AT_A_TIME)
        assert lungaug.estimate_classifiers(options, info) == pytest.approx(whole / at_a_time)
        assert torch.get_num_threads() == count


def test_stage_line__has_the_time_left_where_there_is_an_estimate(monkeypatch, tmp_path):
    """Of GAN and classifiers, then of these alone, on a CPU, once this run's scans are prepared."""
    monkeypatch.setattr(lungaug, "estimate_seconds", lambda options, cube, epochs: epochs * cube / options.width)
    monkeypatch.setattr(lungaug, "estimate_classifiers", lambda options, info: 60 * options.epochs)

    def lines(*words):
        options = lungaug.parse("", *STAGES, words=["--run", str(tmp_path), "--device", "cpu", *words])
        texts = [lungaug.stage_line(number, options) for number in range(1, 5)]
        # What was not typed stays open, for the stages to fill in.
        assert options.width is None
        return texts

    assert lines() == [f"Stage {number} of 4." for number in range(1, 5)]
    info = {"preset": "demo", "parameters": {"cube": 24}, "table_1": TABLE_1}
    lungaug.write(tmp_path / "prepared" / "dataset.json", info)
    # 640 epochs at 6 s, and 20 at 60 s.
    assert lines() == ["Stage 1 of 4.", "Stage 2 of 4, about 84 minutes left.",
                       "Stage 3 of 4, about 20 minutes left.", "Stage 4 of 4."]
    assert lines("--epochs", "10")[1:3] == ["Stage 2 of 4, about 11 minutes left.",
                                            "Stage 3 of 4, about 10 minutes left."]

    # A GAN that is trained already is trained again under --overwrite alone.
    lungaug.write(tmp_path / "gan" / "log.jsonl", '{"epoch": 1}\n' * 640)
    assert lines()[1] == "Stage 2 of 4, about 20 minutes left."
    assert lines("--overwrite")[1] == "Stage 2 of 4, about 84 minutes left."
    monkeypatch.setattr(lungaug, "estimate_classifiers", lambda options, info: 0)
    assert lines()[1:3] == ["Stage 2 of 4.", "Stage 3 of 4."]

    # Nothing can tell on a GPU, or with the scans of another run.
    with monkeypatch.context() as patch:
        patch.setattr(lungaug, "pick_device", lambda name: torch.device("cuda"))
        assert lines("--overwrite")[1] == "Stage 2 of 4."
    lungaug.write(tmp_path / "prepared" / lungaug.OTHER_RUN, {})
    assert lines("--overwrite")[1] == "Stage 2 of 4."


@pytest.mark.parametrize("seconds, text", [
    (1, "less than a minute"), (29, "less than a minute"), (31, "about a minute"), (119, "about a minute"),
    (120, "about 2 minutes"), (366, "about 6 minutes"), (7200, "about 2 hours"), (172800, "about 2 days"),
    (8.64e8, "about 10,000 days")])
def test_format_estimate__is_no_more_exact_than_an_estimate(seconds, text):
    """Whole minutes, hours or days."""
    assert lungaug.format_estimate(seconds) == text


def test_stage_line__a_damaged_dataset_is_refused(tmp_path):
    """One line that names the file, as the stage's own."""
    lungaug.write(tmp_path / "prepared" / "dataset.json", {})
    options = lungaug.parse("", *STAGES, words=["--run", str(tmp_path), "--device", "cpu"])
    with pytest.raises(lungaug.Refusal, match="dataset.json: cannot be read .* — run preprocessing.py again"):
        lungaug.stage_line(2, options)


@pytest.mark.parametrize("words, passed", [
    (["report"], ["report"]), (["report", "runs/a"], ["report", "--run", "runs/a"]),
    (["report", "--run", "runs/a"], ["report", "--run", "runs/a"])])
def test_main__report_takes_the_folder_with_and_without_its_option(monkeypatch, words, passed):
    """`report runs/demo` is `report --run runs/demo`."""
    scripts = []
    monkeypatch.setattr(lungaug, "run_script", lambda *words: scripts.append(words))
    monkeypatch.setattr(sys, "argv", ["lungaug.py", *words])
    lungaug.main()
    assert scripts == [("evaluate.py", *passed)]


# Randomness


def test_stream__the_same_seed_and_names_give_the_same_numbers():
    """A stream depends on seed and names alone, not on what was drawn elsewhere."""
    first = lungaug.stream(3, "a", 1).random(5)
    np.random.seed(0), lungaug.stream(3, "b").random(7), torch.manual_seed(1)
    assert lungaug.stream(3, "a", 1).random(5).tolist() == first.tolist()
    one, two = (torch.rand(5, generator=lungaug.torch_stream(3, "a")) for _ in range(2))
    assert torch.equal(one, two)


def test_stream__another_seed_or_name_gives_other_numbers():
    """Streams of other seeds or names are not alike."""
    asked = [(0,), (0, "a"), (1, "a"), (0, "b"), (0, "a", 0), (0, "a", 1), (0, "ab"), (0, "a", "b"), (0, "b", "a")]
    assert len({tuple(lungaug.stream(*words).random(3)) for words in asked}) == len(asked)
    assert len({tuple(torch.rand(3, generator=lungaug.torch_stream(*words)).tolist()) for words in asked}) == len(asked)


def test_stream__of_any_name():
    """A scan's name may be a file's, which need not be UTF-8: it has a stream of its own too."""
    assert lungaug.stream(0, os.fsdecode(b"\xff")).random() != lungaug.stream(0, os.fsdecode(b"\xfe")).random()


# Safe files


def test_write__an_exception_midway_leaves_the_old_file_and_no_litter(tmp_path):
    """Stopped halfway, the old bytes stand under the name, and nothing lies beside."""
    path = tmp_path / "a.npy"
    path.write_bytes(b"old")

    class Stops:
        def __array__(self, *_, **__):
            assert len(os.listdir(tmp_path)) == 2       # the new file has been begun
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lungaug.write(path, Stops())
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.npy"]


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_write__a_kill_before_the_rename_leaves_the_old_bytes(tmp_path, monkeypatch, function):
    """Until the new file is whole and on the disk, the name is the old one's."""
    path = tmp_path / "a.npy"
    lungaug.write(path, np.zeros(3))
    old = path.read_bytes()
    monkeypatch.setattr(os, function, lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        lungaug.write(path, np.ones(3))
    assert path.read_bytes() == old


def test_write__the_name_is_taken_when_all_bytes_are_on_the_disk(tmp_path, monkeypatch):
    """At the fsync the name still holds the old bytes, and all of the new ones lie beside; folders are made."""
    path, seen = tmp_path / "new" / "folder" / "a", []
    lungaug.write(path, b"old")
    monkeypatch.setattr(os, "fsync", lambda number: seen.append((path.read_bytes(), os.fstat(number).st_size)))
    lungaug.write(path, b"newer")
    assert seen == [(b"old", 5)] and path.read_bytes() == b"newer"


def test_remove_stale__what_a_kill_left_long_ago_and_nothing_else(tmp_path):
    """A process is killed while it writes; two hours later a lock on the folder, or an evaluation, removes the rest."""
    script = ("import sys; sys.path.insert(0, sys.argv[1])\nimport os, lungaug\nfrom pathlib import Path\n"
              "os.fsync = lambda _: os._exit(9)\nlungaug.write(Path(sys.argv[2]), 'half')")
    run_python("-c", script, lungaug.HERE, tmp_path / "scans" / "a.npy")
    left, = (tmp_path / "scans").iterdir()
    assert left.name.startswith(".a.npy.")

    kept = [tmp_path / name for name in (".training.lock", "a.1", ".hidden", ".DS_Store")]
    for path in kept:
        path.write_bytes(b"")
        os.utime(path, (0, 0))
    with lungaug.lock(tmp_path, "training"):
        assert left.exists()                        # another process may be writing it
    os.utime(left, (time.time() - 7200,) * 2)
    with lungaug.lock(tmp_path, "training"):
        assert not left.exists() and all(path.exists() for path in kept)


def test_write__by_the_names_ending(tmp_path):
    """An array comes back in value, shape and dtype, a state by torch.load; text and bytes are written as they are."""
    array = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    for name, value in (("a.npy", array), ("a.pt", {"x": torch.arange(3)}), ("a.svg", "<é\udcff>"),
                        ("a.png", b"\x89\xff")):
        lungaug.write(tmp_path / name, value)
    found = np.load(tmp_path / "a.npy")
    assert found.dtype == np.int16 and np.array_equal(found, array)
    assert torch.load(tmp_path / "a.pt", weights_only=True)["x"].tolist() == [0, 1, 2]
    assert (tmp_path / "a.svg").read_bytes() == b"<\xc3\xa9\xff>" and (tmp_path / "a.png").read_bytes() == b"\x89\xff"


def test_read_json__the_value_or_one_line(tmp_path):
    """What was written comes back; a missing or broken file is a Refusal that says what to do."""
    lungaug.write(tmp_path / "a.json", {"x": [1, "–"]})
    assert lungaug.read_json(tmp_path / "a.json", "") == {"x": [1, "–"]}
    for name, data in (("missing.json", None), ("cut.json", b'{"x": [1'), ("deep.json", b"[" * 100000),
                       ("bytes.json", b'"\xff"')):
        if data is not None:
            (tmp_path / name).write_bytes(data)
        with pytest.raises(Refusal, match=f"{name}.*run this"):
            lungaug.read_json(tmp_path / name, "run this")


def test_claim_folder__a_folder_of_other_parameters_is_refused(tmp_path):
    """A folder made with other parameters is refused and stays theirs; the same go on; --overwrite makes it ours."""
    for _ in range(2):
        lungaug.claim_folder(tmp_path, {"cube": 12}, False)
        with pytest.raises(Refusal, match="cube 12, not 24"):
            lungaug.claim_folder(tmp_path, {"cube": 24}, False)
    lungaug.claim_folder(tmp_path, {"cube": 24}, True)
    lungaug.claim_folder(tmp_path, {"cube": 24}, False)
    with pytest.raises(Refusal, match="cube 24, not 12"):
        lungaug.claim_folder(tmp_path, {"cube": 12}, False)


def test_lock__a_second_process_is_refused(tmp_path):
    """Two trainings in one folder would spoil each other: the second is refused; other work, or a later one, is not."""
    code = ("import sys; sys.path.insert(0, sys.argv[1]); import lungaug; "
            "lungaug.command(lambda: lungaug.lock(sys.argv[2], sys.argv[3]).__enter__())")
    words = [sys.executable, "-c", code, str(HERE), str(tmp_path)]
    with lungaug.lock(tmp_path, "training"):
        second = subprocess.run([*words, "training"], capture_output=True, text=True)
        with lungaug.lock(tmp_path, "part 1 of 2"):
            pass
    assert second.returncode == 2 and re.fullmatch(f"lungaug: {tmp_path}: [^\n]+ — [^\n]+\n", second.stderr)
    with lungaug.lock(tmp_path, "training"):
        pass


def test_lock__ends_with_a_failure(tmp_path):
    """The lock goes with the work, however it ends."""
    with pytest.raises(ZeroDivisionError), lungaug.lock(tmp_path, "training"):
        1 / 0
    with lungaug.lock(tmp_path, "training"):
        pass


# Checkpoints and logs

STATE = {"epoch": 3, "w": torch.arange(50.0), "text": "–", "best": {"f1": 0.5, "none": None},
         "list": [(1, torch.zeros(2, 3))]}


def test_load_checkpoint__is_what_was_saved(tmp_path):
    """Tensors, numbers, text, lists and dicts come back as they were."""
    lungaug.write(tmp_path / "c.pt", STATE)
    assert same_state(lungaug.load_checkpoint(tmp_path / "c.pt", ""), STATE)


def test_load_checkpoint__missing_is_one_line(tmp_path):
    """Where there is none, the message is what to do."""
    with pytest.raises(Refusal, match="c.pt: not found — train first"):
        lungaug.load_checkpoint(tmp_path / "c.pt", "train first")


def test_load_checkpoint__truncated_anywhere_is_one_line(tmp_path):
    """A checkpoint cut short at any length, none included, is a Refusal, never a traceback."""
    lungaug.write(tmp_path / "c.pt", STATE)
    data = (tmp_path / "c.pt").read_bytes()
    for length in range(0, len(data), 29):
        (tmp_path / "cut.pt").write_bytes(data[:length])
        with pytest.raises(Refusal, match="cut.pt"):
            lungaug.load_checkpoint(tmp_path / "cut.pt", "")


@pytest.mark.filterwarnings("ignore")
def test_load_checkpoint__a_flipped_bit_is_refused_or_harmless(tmp_path):
    """With any bit flipped the state is refused or the same: never other weights, never a traceback."""
    lungaug.write(tmp_path / "c.pt", STATE)
    data, wrong = (tmp_path / "c.pt").read_bytes(), []
    for place in range(0, len(data), 7):
        (tmp_path / "bad.pt").write_bytes(data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1:])
        try:
            wrong += [] if same_state(STATE, lungaug.load_checkpoint(tmp_path / "bad.pt", "")) else [place]
        except Refusal:
            pass
    assert wrong == []


@pytest.mark.parametrize("state", [[1, 2], 5, {"settings": [1]}, {}, {"settings": {"seed": 1}}])
def test_load_checkpoint__of_other_settings_is_one_line(tmp_path, state):
    """What holds no settings, or others than those asked for, is a Refusal that names the file."""
    lungaug.write(tmp_path / "c.pt", state)
    with pytest.raises(Refusal, match="c.pt: "):
        lungaug.load_checkpoint(tmp_path / "c.pt", "", seed=0)


@pytest.mark.parametrize("state", [{"settings": {"seed": 1}}, "damaged"])
def test_load_checkpoint__of_another_stage_names_that_stages_command(tmp_path, state):
    """A stage that only reads a checkpoint has no option to make it again: the remedy is the command that has."""
    lungaug.write(tmp_path / "c.pt", state)
    if state == "damaged":
        (tmp_path / "c.pt").write_bytes(b"PK")
    with pytest.raises(Refusal) as caught:
        lungaug.load_checkpoint(tmp_path / "c.pt", "run it first", "run it again", seed=0)
    assert caught.value.remedy == "run it again"


@pytest.mark.parametrize("method", [8, 12, 14])
def test_load_checkpoint__a_member_said_to_be_compressed_is_one_line(tmp_path, method):
    """Said to be deflated, bz2 or lzma; bz2's error on such bytes is an OSError, and not the disk's."""
    lungaug.write(tmp_path / "c.pt", STATE)
    data = (tmp_path / "c.pt").read_bytes()
    for name, place in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
        data = bytearray(data)
        data[data.index(name) + place] = method
    (tmp_path / "c.pt").write_bytes(data)
    with pytest.raises(Refusal, match="c.pt: .*--overwrite"):
        lungaug.load_checkpoint(tmp_path / "c.pt", "")


def test_load_checkpoint__runs_no_code(tmp_path):
    """A pickle that would run a command is refused, and runs nothing."""
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"epoch": Hostile()}, tmp_path / "c.pt")
    with pytest.raises(Refusal):
        lungaug.load_checkpoint(tmp_path / "c.pt", "")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("found", [None, 3, [], {}, {"seed": 0}, {"seed": 1, "width": 2}])
def test_require_settings__what_differs_is_named(found):
    """Other settings, missing ones, or no settings at all are a Refusal that names what differs."""
    lungaug.require_settings("c.pt", {"seed": 0, "width": 2, "more": 1}, {"seed": 0, "width": 2})
    with pytest.raises(Refusal, match="width None, not 2" if found == {"seed": 0} else "seed"):
        lungaug.require_settings("c.pt", found, {"seed": 0, "width": 2})


@pytest.mark.parametrize("found, value", [({"a": 1}, {"a": 2}), (None, {"a": 2}), ({"a": 1}, None)])
def test_require_settings__a_record_is_not_spread_over_the_line(found, value):
    """Of a record that differs the name is enough."""
    with pytest.raises(Refusal) as caught:
        lungaug.require_settings("c.pt", {"generated": found, "seed": 1}, {"generated": value, "seed": 0})
    assert caught.value.problem == "was made with generated data that have changed since; seed 1, not 0"


def test_log__rows_come_back_in_order(tmp_path):
    """What was appended is read, in order; where there is no log there are no rows."""
    rows, path = [{"epoch": n, "loss": n / 3} for n in range(4)], tmp_path / "new" / "folder" / "log.jsonl"
    assert lungaug.read_log(path) == []
    for row in rows:
        lungaug.append_log(path, row)
    assert lungaug.read_log(path) == rows == [json.loads(line) for line in path.read_text().splitlines()]


def test_log__a_torn_last_line_is_ignored(tmp_path):
    """Killed at any byte of the last line, the rows before it are all there."""
    rows = [{"epoch": 1, "x": 0.5}, {"epoch": 2, "x": 0.25}]
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    for length in range(len(data) // 2 + 1, len(data) - 1):
        (tmp_path / "log.jsonl").write_bytes(data[:length])
        assert lungaug.read_log(tmp_path / "log.jsonl") == rows[:1]


def test_rewind_log__keeps_the_checkpoints_epochs_and_can_go_on(tmp_path):
    """Rows after the checkpoint's epoch, and a torn one, go; the next row stands on a line of its own."""
    path = tmp_path / "log.jsonl"
    for epoch in (1, 2, 3):
        lungaug.append_log(path, {"epoch": epoch})
    path.write_text(path.read_text() + '{"epo')
    lungaug.rewind_log(path, 2)
    lungaug.append_log(path, {"epoch": 3, "again": 1})
    assert path.read_text() == '{"epoch": 1}\n{"epoch": 2}\n{"epoch": 3, "again": 1}\n'


@pytest.mark.parametrize("epochs", [(), (1, 3), (2, 3), (1, 2, 2)])
def test_rewind_log__rows_that_are_missing_are_refused(tmp_path, epochs):
    """A log that is not the checkpoint's, epoch by epoch, is named; it stays as it is."""
    path = tmp_path / "log.jsonl"
    path.write_text("".join(f'{{"epoch": {epoch}}}\n' for epoch in epochs))
    before = path.read_text()
    with pytest.raises(Refusal, match="log.jsonl: does not hold the rows 1 to 3"):
        lungaug.rewind_log(path, 3)
    assert path.read_text() == before


def test_rewind_log__from_the_start_leaves_an_empty_log(tmp_path):
    """Start again from nothing: no row stays."""
    lungaug.append_log(tmp_path / "log.jsonl", {"epoch": 1})
    lungaug.rewind_log(tmp_path / "log.jsonl", 0)
    assert (tmp_path / "log.jsonl").read_text() == ""


@pytest.mark.parametrize("epoch", [10 ** 15, None, "x", [], 1.5])
def test_rewind_log__to_an_epoch_of_no_use_is_refused(tmp_path, epoch):
    """A checkpoint may say any epoch: one line, and no list as long as it says."""
    lungaug.append_log(tmp_path / "log.jsonl", {"epoch": 1})
    with pytest.raises(Refusal, match="log.jsonl.*--overwrite"):
        lungaug.rewind_log(tmp_path / "log.jsonl", epoch)


def test_log__a_line_nested_too_deep_is_ignored(tmp_path):
    """100,000 brackets are no row, whatever Python's parser makes of them; what stood before them is read."""
    (tmp_path / "log.jsonl").write_text('{"epoch": 1}\n' + "[" * 100_000)
    assert lungaug.read_log(tmp_path / "log.jsonl") == [{"epoch": 1}]


def test_refuse_on_error__out_of_memory_names_both_remedies():
    """A damaged length asks for too much memory, and so does a sound large file: both ways out are named."""
    with pytest.raises(Refusal, match="a.mhd.*free memory, or replace it"):
        with lungaug.refuse_on_error("a.mhd", "replace it"):
            raise MemoryError


def test_read_bytes__the_bytes_or_one_line(tmp_path):
    """The bytes come as they are, and their CRC-32 is the published one of "123456789"; a missing file is one line."""
    (tmp_path / "a").write_bytes(b"123456789")
    assert lungaug.read_bytes(tmp_path / "a", "") == b"123456789"
    assert lungaug.file_crc32(tmp_path / "a", "") == 0xCBF43926
    with pytest.raises(Refusal, match="train first"):
        lungaug.read_bytes(tmp_path / "b", "train first")


def test_read_ahead__in_order_and_not_far_ahead(monkeypatch):
    """Each item's result in the items' order, however long one takes; at most as many are begun ahead as there are
    threads, and the one that is read."""
    monkeypatch.setattr(lungaug, "READ_THREADS", 3)
    taken = []

    def items():
        for item in range(20):
            taken.append(item)
            yield item

    def read(item):
        # The first item of each three takes longest.
        time.sleep(0.01 * (item % 3 == 0))
        return item ** 2

    for done, result in enumerate(lungaug.read_ahead(read, items())):
        assert result == done ** 2 and len(taken) <= done + 4
    assert taken == list(range(20))


def test_read_ahead__what_reading_raises_is_raised_in_its_turn():
    """The items before the one that cannot be read are all there."""
    def read(item):
        if item == 3:
            raise Refusal("cubes.npy", "is missing", "make it again")
        return item

    results = []
    with pytest.raises(Refusal, match="cubes.npy"):
        for result in lungaug.read_ahead(read, range(9)):
            results.append(result)
    assert results == [0, 1, 2]


def test_read_ahead__leaves_no_thread():
    """Where the caller stops half-way, no thread stays, and what was not begun is not read."""
    read = []
    before = threading.active_count()
    results = lungaug.read_ahead(lambda item: read.append(item), range(1000))
    next(results)
    results.close()
    assert threading.active_count() == before and len(read) < 1000


@pytest.mark.parametrize("count, size", [(7, 3), (6, 3), (1, 3), (5, 256)])
def test_predict__in_parts_as_at_once(count, size):
    """Each cube is scored once, in order, at most `size` at a time."""
    cubes = np.random.default_rng(0).random((count, 1, 2, 2, 2), np.float32)
    asked = []

    def read(numbers):
        asked.append(numbers)
        return cubes[numbers]

    result = lungaug.predict(lambda x: x.sum((1, 2, 3, 4)), read, count, "cpu", size)
    assert np.allclose(result, cubes.sum((1, 2, 3, 4)))
    assert sorted(np.concatenate(asked)) == list(range(count))
    assert max(map(len, asked)) <= size


# Several trainings side by side


def endless():
    """Read one thing after another until it is stopped; not for ever, so that a failure shows."""
    deadline = time.monotonic() + 20
    for _ in lungaug.read_ahead(lambda item: time.sleep(0.001), iter(int, 1)):
        assert time.monotonic() < deadline, "it was not stopped"


def test_side_by_side__on_a_cpu_as_many_at_a_time_as_there_are_threads(threads):
    """Three calls that wait for each other all end; each of them computes on one thread."""
    threads(3)
    meeting = threading.Barrier(3, timeout=20)
    seen = []

    def call():
        meeting.wait()
        seen.append(torch.get_num_threads())

    lungaug.side_by_side([call] * 3, torch.device("cpu"))
    assert seen == [1, 1, 1]
    assert torch.get_num_threads() == 3


def test_side_by_side__on_a_gpu_one_after_the_other(threads):
    """Each call begins when the one before it has ended, in order, with the threads as they are."""
    threads(3)
    events = []

    def call(number):
        events.append((number, "begins", torch.get_num_threads()))
        time.sleep(0.01)
        events.append((number, "ends", torch.get_num_threads()))

    lungaug.side_by_side([functools.partial(call, number) for number in range(3)], torch.device("cuda"))
    assert events == [(number, event, 3) for number in range(3) for event in ("begins", "ends")]


def test_side_by_side__where_one_fails_the_others_stop(threads):
    """Its Refusal is raised; one that runs ends at its next batch, one that waits does not begin; then all is as it
    was."""
    threads(2)
    begun = []

    def fail():
        raise Refusal("checkpoint.pt", "is damaged", "start over")

    with pytest.raises(Refusal, match="checkpoint.pt"):
        # The third fills the place of the second; the fourth waits for one.
        lungaug.side_by_side([endless, fail, endless, lambda: begun.append(True)], torch.device("cpu"))
    assert not begun
    assert torch.get_num_threads() == 2
    assert list(lungaug.read_ahead(str, range(3))) == ["0", "1", "2"]


@pytest.mark.parametrize("times", [1, 3])
def test_side_by_side__ctrl_c_stops_all(threads, times):
    """It ends calls that would never end, and is raised once all have ended, however often it comes."""
    threads(2)
    before = threading.active_count()
    ended = []

    def end_slowly():
        try:
            endless()
        finally:
            time.sleep(0.5)
            ended.append(True)

    def interrupt():
        for _ in range(times):
            _thread.interrupt_main()
            time.sleep(0.3)
        end_slowly()

    with pytest.raises(KeyboardInterrupt):
        lungaug.side_by_side([end_slowly, interrupt], torch.device("cpu"))
    assert len(ended) == 2
    assert threading.active_count() == before
    assert torch.get_num_threads() == 2
    assert list(lungaug.read_ahead(str, range(3))) == ["0", "1", "2"]


def test_side_by_side__works_outside_the_main_thread(threads):
    """Ctrl-C is the main thread's; nothing else needs it."""
    threads(2)
    results = []

    def work():
        lungaug.side_by_side([lambda: results.append(True)] * 3, torch.device("cpu"))

    worker = threading.Thread(target=work)
    worker.start()
    worker.join()
    assert results == [True] * 3


def test_side_by_side__on_many_cores_at_most_so_many_at_a_time(threads, monkeypatch):
    """However many cores there are, MOST_AT_A_TIME calls run at a time."""
    threads(8)
    monkeypatch.setattr(lungaug, "MOST_AT_A_TIME", 2)
    running = []
    most = []

    def call():
        running.append(True)
        most.append(len(running))
        time.sleep(0.02)
        running.pop()

    lungaug.side_by_side([call] * 8, torch.device("cpu"))
    assert max(most) == 2


CONVOLVE = """
import os, torch, lungaug
from models import Classifier
counts = []
def call():
    Classifier(24)(torch.zeros(2, 1, 24, 24, 24)).sum().backward()
    counts.append(len(os.listdir("/proc/self/task")))
before = len(os.listdir("/proc/self/task"))
lungaug.side_by_side([call] * 4, torch.device("cpu"))
print(max(counts) - before)
"""


def test_side_by_side__a_convolution_starts_no_threads_of_its_own(tmp_path):
    """With four cores there are four threads more, not four times four: oneDNN computes on one, too."""
    if not Path("/proc/self/task").exists():
        pytest.skip("only Linux counts a process' threads in /proc")
    result = subprocess.run([sys.executable, "-c", CONVOLVE], cwd=HERE, capture_output=True, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "4"})
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) <= 4


def test_progress__threads_that_share_it_count_every_one(capsys):
    """Four threads that advance it 250 times each: 1,000, and the last line once."""
    progress = lungaug.Progress("epochs", 1000, every=0)

    def advance():
        for _ in range(250):
            progress.advance()

    workers = [threading.Thread(target=advance) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == [f"{done}/1000" for done in range(1, 1001)]


# What is shown


@pytest.mark.parametrize("value, text",
                         [(None, "–"), (float("nan"), "–"), (0.5, "0.500"), (0.0, "0.000"), (0.12345, "0.123"),
                                         (1215 / 2030, "0.599"), (0, "0"), (581130, "581,130")])
def test_format_number__three_decimals_commas_or_a_dash(value, text):
    """Numbers with three decimals, counts with commas, – for none."""
    assert lungaug.format_number(value) == text


@pytest.mark.parametrize("value, text", [(0.00012, "0.0001"), (-0.00049, "-0.0005"), (-0.0005001, "-0.001"),
                                         (1e-9, "0.000000"), (0.0, "0.000"), (0.0123, "0.012"), (None, "–")])
def test_format_number__with_its_sign(value, text):
    """More decimals, up to six, where three would show 0.000 for what lies above or below 0."""
    assert lungaug.format_number(value, keep_sign=True) == text


@pytest.mark.parametrize("seconds, text",
                         [(45, "45 s"), (119, "119 s"), (120, "2 min"), (720, "12 min"), (3600, "1.0 h"),
                                           (12240, "3.4 h"), (172799, "48.0 h"), (172800, "2.0 days"),
                                           (181440, "2.1 days")])
def test_format_duration__in_the_unit_that_fits(seconds, text):
    """45 s, 12 min, 3.4 h, 2.1 days."""
    assert lungaug.format_duration(seconds) == text


def test_progress__elsewhere_than_on_a_terminal_the_last_line_is_whole(capsys):
    """Off a terminal nothing is renewed: whole lines on stderr, not one for each step, the last with all done."""
    progress = lungaug.Progress("cubes", 500)
    for done in range(1, 501):
        progress.update(done, "text")
    out, err = capsys.readouterr()
    assert out == "" and err.endswith("\n") and "\r" not in err and "cubes 500/500" in err.splitlines()[-1]
    assert len(err.splitlines()) <= 2


@pytest.mark.parametrize("seconds, line",
                         [(5, "x 20/40  2.0/s, 10 s left"), (50, "x 20/40  12.0/min, 100 s left"), (0, "x 20/40")])
def test_progress__rate_and_time_left(monkeypatch, capsys, seconds, line):
    """From 10 to 20 of 40 in 5 s: 2 a second, 10 s left; what a resumed run found done does not count as its speed."""
    now = [1000.0]
    monkeypatch.setattr(lungaug.time, "monotonic", lambda: now[0])
    progress = lungaug.Progress("x", 40, every=0)
    progress.update(10)
    now[0] += seconds
    progress.update(20)
    assert capsys.readouterr().err.splitlines()[1].startswith(line)


def test_print_table__columns_stand_under_their_heads(capsys):
    """The first column to the left, the others to the right, as wide as their widest cell."""
    lungaug.print_table("T", ("", "one", "b"), [("name", "1", "12,345"), ("x", "–", "2")])
    assert capsys.readouterr().out == "\nT\n        one       b\n  name    1  12,345\n  x       –       2\n"


def test_progress__a_files_own_name_cannot_steer_the_terminal(capsys):
    """A series UID with terminal codes is shown escaped, as in a Refusal."""
    lungaug.Progress("scans", 1).update(1, "1.2\x1b]0;x\a\n3")
    assert capsys.readouterr().err.rstrip("\n").isprintable()


# Pictures


def decode(data):
    """The pixels of a PNG of 8 bits a channel, grey or RGB, without row filters; every checksum is verified."""
    assert data[:8] == bytes([137, 80, 78, 71, 13, 10, 26, 10])
    chunks, place = [], 8
    while place < len(data):
        length, = struct.unpack(">I", data[place:place + 4])
        body = data[place + 4:place + 8 + length]
        assert struct.unpack(">I", data[place + 8 + length:place + 12 + length]) == (zlib.crc32(body),)
        chunks.append((body[:4], body[4:]))
        place += 12 + length
    assert [name for name, _ in chunks][::len(chunks) - 1] == [b"IHDR", b"IEND"]
    width, height, depth, colour, *rest = struct.unpack(">IIBBBBB", chunks[0][1])
    assert depth == 8 and rest == [0, 0, 0]
    raw = zlib.decompress(b"".join(body for name, body in chunks if name == b"IDAT"))
    rows = np.frombuffer(raw, np.uint8).reshape(height, -1)
    assert not rows[:, 0].any()
    return rows[:, 1:].reshape(height, width) if colour == 0 else rows[:, 1:].reshape(height, width, {2: 3}[colour])


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (70, 300), (3, 5, 3), (1, 300, 3)])
def test_png__decodes_to_the_same_pixels(shape):
    """Size and every pixel come back, grey and red-green-blue."""
    pixels = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    assert np.array_equal(decode(lungaug.png(pixels)), pixels)


def test_png__of_a_view_too():
    """A mirrored, strided view is written as it looks, not as it lies in memory."""
    pixels = np.arange(48, dtype=np.uint8).reshape(6, 8)[::-1, ::2]
    assert np.array_equal(decode(lungaug.png(pixels)), pixels)


def test_png__each_pixel_becomes_a_square():
    """The Kronecker product with a square of ones."""
    image = np.arange(6, dtype=np.uint8).reshape(2, 3)
    assert np.array_equal(decode(lungaug.png(image, 3)), np.kron(image, np.ones((3, 3), np.uint8)))
    colours = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)
    assert np.array_equal(decode(lungaug.png(colours, 2))[2:4, 4:6, 1], np.full((2, 2), colours[1, 2, 1]))


def test_grey__black_is_air_and_white_is_bone():
    """-1 (-1000 HU) is 0, 1 (400 HU) is 255, what lies beyond is held; halfway is the middle."""
    assert lungaug.grey([-3, -1, 0, 1, 3, -1 + 2 / 255, 0.5]).tolist() == [0, 0, 128, 255, 255, 1, 191]


@pytest.mark.parametrize("count, columns, shape", [(5, 3, (4, 6)), (3, 3, (4, 6)), (2, 4, (4, 6)), (4, 2, (3, 5, 3))])
def test_tile__each_image_in_its_place_and_paper_between(count, columns, shape):
    """In reading order, `gap` pixels of paper around each image, and nothing else."""
    images = np.random.default_rng(0).integers(0, 200, (count, *shape)).astype(np.uint8)
    sheet, (h, w) = lungaug.tile(images, columns, gap=2, paper=250), shape[:2]
    lines = -(-count // columns)
    assert sheet.shape == (lines * (h + 2) + 2, columns * (w + 2) + 2, *shape[2:])
    for i, image in enumerate(images):
        top, left = 2 + i // columns * (h + 2), 2 + i % columns * (w + 2)
        assert np.array_equal(sheet[top:top + h, left:left + w], image)
    assert (sheet == 250).sum() == sheet.size - images.size
