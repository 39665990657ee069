"""Windows, and terminals whose encoding lacks α and ≥: what can be tried on another system.

    python -m pytest tests/test_platforms.py -v
"""

import os
import subprocess
import sys
from types import SimpleNamespace

import lungaug
from lungaug import Refusal

import pytest

from helpers import at_once, early


SCRIPTS = ["lungaug.py", "preprocessing.py", "models.py", "train_gan.py", "train_classifier.py", "evaluate.py"]
TESTS = ["tests/audit.py", "tests/wrong_versions.py", "tests/phantom.py"]


def with_encoding(encoding, *words):
    """Run Python as on a terminal of this encoding. Returns what it did; its output as bytes."""
    environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0", "LC_ALL": "C"}
    return subprocess.run([sys.executable, *words], env=environment, cwd=lungaug.HERE, capture_output=True)


HELP = [f"{script} --help" for script in SCRIPTS + TESTS]
MODELS = "models.py --cube 6 --width 1"

# Each script in turn becomes the main program of one process, which imports the packages once.
RUN_EACH = """
import os, runpy, sys
for command in sys.argv[1:]:
    sys.argv = command.split()
    script = sys.argv[0]
    sys.path[0] = os.path.dirname(os.path.abspath(script))
    sys.stdout.flush()
    status = 0
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as stopped:
        status = stopped.code or 0
    print("end of", command, status)
"""

# A character that the terminal lacks, printed and in an error's line.
PRINT_AND_REFUSE = """
import lungaug
def main():
    print("score \\u2265 1")
    raise lungaug.Refusal("\\u03b1.json", "\\u03bb", "\\u03b5")
lungaug.command(main)
"""

WRITE_AND_READ = r"""
import sys
import lungaug, preprocessing
from pathlib import Path

folder = Path(sys.argv[1])
text = "\u03b1 \u2265 \u2013"
lungaug.write(folder / "a.json", {"text": text})
assert lungaug.read_json(folder / "a.json", "")["text"] == text
lungaug.write(folder / "report.html", text)
lungaug.append_log(folder / "log.jsonl", {"epoch": 1, "text": text})
assert lungaug.read_log(folder / "log.jsonl")[0]["text"] == text
"""


@early
def processes(folder):
    """What each command of this file did: .scripts by encoding, .prints, .files, and that one's .folder."""
    strict = ["-X", "warn_default_encoding", "-W", "error::EncodingWarning:lungaug"]
    in_ascii, in_cp1252, prints, files = at_once(
        lambda: with_encoding("ascii", "-c", RUN_EACH, *HELP, MODELS),
        lambda: with_encoding("cp1252", "-c", RUN_EACH, *HELP, MODELS),
        lambda: with_encoding("ascii", "-c", PRINT_AND_REFUSE),
        lambda: with_encoding("ascii", *strict, "-c", WRITE_AND_READ, str(folder)))
    return SimpleNamespace(scripts={"ascii": in_ascii, "cp1252": in_cp1252}, prints=prints, files=files, folder=folder)


def printed(done, encoding):
    """Command → what it printed, of those that a process ran in turn and that ended with status 0."""
    first, *others = done.stdout.decode(encoding).split("end of ")
    texts = {}
    for text in others:
        end, _, following = text.partition("\n")
        command, _, status = end.rpartition(" ")
        if status == "0":
            texts[command] = first
        first = following
    return texts


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
@pytest.mark.parametrize("script", SCRIPTS + TESTS)
def test_help__on_any_terminal(processes, encoding, script):
    """--help of every script prints, whatever characters the terminal has."""
    done = processes.scripts[encoding]
    texts = printed(done, encoding)
    assert f"{script} --help" in texts, done.stderr
    assert "usage" in texts[f"{script} --help"].lower()


def test_command__prints_on_any_terminal(processes):
    """A character that the terminal lacks becomes ?; so does one in an error's line."""
    done = processes.prints
    assert done.returncode == 2
    assert done.stdout.split() == [b"score", b"?", b"1"]
    assert done.stderr.strip() == b"lungaug: ?.json: ? ? ?"


@pytest.mark.skipif(os.name == "nt", reason="Windows reports a closed pipe in other ways")
def test_command__a_reader_that_has_seen_enough():
    """`python evaluate.py | head -0`, say: the command ends without a word, whether a line or 100,000 were to come."""
    code = ("import lungaug, sys, time\n"
            "def main():\n"
            "    time.sleep(0.3)\n"
            "    for i in range(int(sys.argv[1])): print('line', i)\n"
            "lungaug.command(main)")
    started = []
    for lines in ("1", "100000"):
        started.append(subprocess.Popen([sys.executable, "-c", code, lines], cwd=lungaug.HERE, stdout=subprocess.PIPE,
                                        stderr=subprocess.PIPE))
        started[-1].stdout.close()
    for process in started:
        assert process.stderr.read() == b""
        assert process.wait() == 1
        process.stderr.close()


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_models__tables_print_on_any_terminal(processes, encoding):
    """The tables of layers hold ×, which ASCII lacks, and →, which code page 1252 lacks."""
    done = processes.scripts[encoding]
    texts = printed(done, encoding)
    assert MODELS in texts, done.stderr
    assert "parameters" in texts[MODELS]


class FakeMsvcrt(SimpleNamespace):
    """Windows' module of locks: a file, by its name, may be locked once."""

    LK_NBLCK = 2

    def locking(self, descriptor, mode, count):
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if path in self.locked:
            raise PermissionError(13, "Permission denied")
        self.locked.append(path)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="the stand-in for Windows' locks needs /proc")
def test_lock__on_windows(tmp_path, monkeypatch):
    """Without fcntl a folder is locked by msvcrt; the second one to try is refused in one line."""
    monkeypatch.setattr(lungaug, "fcntl", None)
    monkeypatch.setattr(lungaug, "msvcrt", FakeMsvcrt(locked=[]), raising=False)
    with lungaug.lock(tmp_path, "training"):
        with pytest.raises(Refusal, match="another process is already training"):
            with lungaug.lock(tmp_path, "training"):
                pass


def test_files__do_not_depend_on_the_locale(processes):
    """Text is written and read as UTF-8, whatever the locale: no file is opened with the locale's own encoding."""
    assert processes.files.returncode == 0, processes.files.stderr
    assert (processes.folder / "report.html").read_bytes() == "α ≥ –".encode()
