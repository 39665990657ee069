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


SCRIPTS = ["lungaug.py", "preprocessing.py", "models.py", "train_gan.py", "train_classifier.py", "evaluate.py"]
TESTS = ["tests/audit.py", "tests/wrong_versions.py", "tests/phantom.py"]


def with_encoding(encoding, *words):
    """Run Python as on a terminal of this encoding. Returns what it did; its output as bytes."""
    environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0", "LC_ALL": "C"}
    return subprocess.run([sys.executable, *words], env=environment, cwd=lungaug.HERE, capture_output=True)


@pytest.mark.parametrize("encoding, script", [("cp1252", "lungaug.py"), *(("ascii", name) for name in SCRIPTS + TESTS)])
def test_help__on_any_terminal(encoding, script):
    """--help of every script prints, whatever characters the terminal has."""
    done = with_encoding(encoding, script, "--help")
    assert done.returncode == 0, done.stderr
    assert b"usage" in done.stdout.lower()


def test_command__prints_on_any_terminal():
    """A character that the terminal lacks becomes ?; so does one in an error's line."""
    code = ("import lungaug\n"
            "def main():\n"
            "    print('score \\u2265 1')\n"
            "    raise lungaug.Refusal('\\u03b1.json', '\\u03bb', '\\u03b5')\n"
            "lungaug.command(main)")
    done = with_encoding("ascii", "-c", code)
    assert done.returncode == 2
    assert done.stdout.split() == [b"score", b"?", b"1"]
    assert done.stderr.strip() == b"lungaug: ?.json: ? ? ?"


@pytest.mark.skipif(os.name == "nt", reason="Windows reports a closed pipe in other ways")
@pytest.mark.parametrize("lines", [1, 100000])
def test_command__a_reader_that_has_seen_enough(lines):
    """`python evaluate.py | head -0`, say: the command ends without a word, whatever it had still to print."""
    code = ("import lungaug, time\n"
            "def main():\n"
            "    time.sleep(0.3)\n"
            f"    for i in range({lines}): print('line', i)\n"
            "lungaug.command(main)")
    process = subprocess.Popen([sys.executable, "-c", code], cwd=lungaug.HERE, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 1
    process.stderr.close()


def test_models__tables_print_on_any_terminal():
    """The tables of layers hold ×, which ASCII lacks."""
    done = with_encoding("ascii", "models.py", "--cube", "6", "--width", "1")
    assert done.returncode == 0, done.stderr
    assert b"parameters" in done.stdout


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


def test_files__do_not_depend_on_the_locale(tmp_path):
    """Text is written and read as UTF-8, whatever the locale: no file is opened with the locale's own encoding."""
    strict = ["-X", "warn_default_encoding", "-W", "error::EncodingWarning:lungaug"]
    done = with_encoding("ascii", *strict, "-c", WRITE_AND_READ, str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "report.html").read_bytes() == "α ≥ –".encode()
