"""Ctrl-C while lungaug.py runs a stage: one line, exit 130, and no process stays behind."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import lungaug

import pytest

from helpers import at_once, descendants, early, run_python


needs_ps = pytest.mark.skipif(os.name == "nt" or not shutil.which("ps"), reason="needs POSIX signals, and ps")


def is_running(pid):
    """Whether a process exists and is not a zombie."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return bool(state) and not state.startswith("Z")


def wait_until(holds, seconds=60):
    """Whether a condition comes to hold within some seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if holds():
            return True
        time.sleep(0.1)
    return False


def write_coarse(folder):
    """A copy of the program whose synthetic scans have voxels four times as large, and take a fraction of a second.

    There are many of them, so that it is not done before it is interrupted.
    """
    (folder / "tests").mkdir(parents=True)
    for path in (*lungaug.HERE.glob("*.py"), *(lungaug.HERE / "tests").glob("[ps]*.py")):
        shutil.copy(path, folder / path.relative_to(lungaug.HERE))

    path = folder / "tests" / "phantom.py"
    text = path.read_text(encoding="utf-8")
    call = "options.workers,\n                         progress.update)"
    assert text.count(call) == 1
    text = text.replace(call, call[:-1] + ", scale=4.0)")
    count = "default=30, help="
    assert text.count(count) == 1
    path.write_text(text.replace(count, "default=3000, help="), encoding="utf-8")
    return folder


def interrupted(program, run, send):
    """`python lungaug.py`, to which `send` sends Ctrl-C while it makes synthetic scans in two workers: .status, .err,
    .started, the pids below it."""
    command = [sys.executable, str(program / "lungaug.py"), "--run", str(run), "--workers", "2"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "encoding": "utf-8"}
    process = subprocess.Popen(command, start_new_session=True, **pipes)

    # lungaug.py, preprocessing.py, phantom.py, and below it a tracker of resources and two workers.
    # A search of the whole run would meet folders that are renamed while it looks into them.
    truth = Path(run) / "scans" / "truth"
    assert wait_until(lambda: any(truth.glob("*.npz")), seconds=120)
    started = descendants(process.pid)
    send(process)
    _, err = process.communicate(timeout=90)
    return SimpleNamespace(status=process.returncode, err=err, started=started)


@early
def ends(folder):
    """How lungaug.py ended by Ctrl-C at a terminal, which reaches every process, and by `kill -INT` of it alone."""
    coarse = write_coarse(folder / "program")
    ends = at_once(
        lambda: interrupted(coarse, folder / "all", lambda process: os.killpg(process.pid, signal.SIGINT)),
        lambda: interrupted(coarse, folder / "first", lambda process: process.send_signal(signal.SIGINT)))
    # The table comes after the last scan.
    for run in ("all", "first"):
        assert not (folder / run / "scans" / "annotations.csv").exists()
    return ends


@needs_ps
def test_interrupt__is_one_line_and_nothing_stays_behind(ends):
    """Exit 130, one line, and all processes end."""
    for done in ends:
        assert len(done.started) >= 4
        assert done.status == 130
        assert done.err.count("lungaug: interrupted") == 1 and "Traceback" not in done.err
        assert wait_until(lambda done=done: not any(map(is_running, done.started)))


SCRIPTS = [f"{name}.py" for name in (*lungaug.STAGES, "lungaug", "models", "tests/phantom", "tests/chaos")]


@pytest.mark.parametrize("package", ["numpy", "torch"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_interrupt__while_packages_are_imported(script, package, tmp_path):
    """A package that takes for ever to import, and is interrupted: one line, exit 130, no traceback."""
    if os.name == "nt":
        pytest.skip("Windows sends no SIGINT to a process itself")
    stub = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n"
    (tmp_path / f"{package}.py").write_text(stub, encoding="utf-8")
    environment = dict(os.environ, PYTHONPATH=str(tmp_path))

    command = [sys.executable, str(lungaug.HERE / script)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, encoding="utf-8", timeout=50)
    assert process.returncode == 130, process.stderr
    line, = process.stderr.strip().splitlines()
    assert line.startswith("lungaug: interrupted — run the same command")


@early
def interrupted_at_its_end(folder):
    """What evaluate.py did that got Ctrl-C while Python ended."""
    ending = "import atexit, os, signal\natexit.register(os.kill, os.getpid(), signal.SIGINT)\n"
    (folder / "sitecustomize.py").write_text(ending, encoding="utf-8")
    environment = dict(os.environ, PYTHONPATH=str(folder))
    return run_python(lungaug.HERE / "evaluate.py", "--run", folder / "none", env=environment, timeout=50)


@needs_ps
def test_interrupt__after_the_last_line(interrupted_at_its_end):
    """Ctrl-C while Python ends changes neither the exit status nor the last line."""
    done = interrupted_at_its_end
    assert done.status == 2
    assert len(done.err.splitlines()) == 1 and "run python preprocessing.py" in done.err


@needs_ps
@pytest.mark.parametrize("script, words", [("evaluate.py", ["report", "--run", "none"]), ("audit.py", ["audit"])])
def test_interrupt__while_the_python_of_a_script_starts(script, words, tmp_path):
    """Ctrl-C at a terminal as lungaug.py has just started a script, none of whose lines has run yet: one line, exit
    130, no traceback of Python's own start."""
    starting = ("import os, signal, sys\n"
                f"if sys.orig_argv[1].endswith({script!r}):\n    os.killpg(0, signal.SIGINT)\n")
    (tmp_path / "sitecustomize.py").write_text(starting, encoding="utf-8")
    environment = dict(os.environ, PYTHONPATH=str(tmp_path))

    command = [sys.executable, str(lungaug.HERE / "lungaug.py"), *words]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, encoding="utf-8", timeout=50,
                             cwd=tmp_path, start_new_session=True)
    assert script in process.stdout
    assert process.returncode == 130, process.stderr
    line, = process.stderr.strip().splitlines()
    assert line.startswith("lungaug: interrupted — run the same command")


@needs_ps
def test_interrupt__before_a_child_can_be_awaited(monkeypatch):
    """Ctrl-C while the system starts a child: the child is awaited nevertheless, and says what there is to say."""
    class Child:
        returncode = 130

        def wait(self, timeout=None):
            return 130

    def start_interrupted(command):
        os.kill(os.getpid(), signal.SIGINT)
        return Child()

    monkeypatch.setattr(subprocess, "Popen", start_interrupted)
    assert lungaug.run_to_end(["python"]) == 130


@needs_ps
@pytest.mark.parametrize("status, raised", [(0, True), (-signal.SIGINT, True), (130, False), (2, False)],
                         ids=["had ended", "had just begun", "says so itself", "was refused"])
def test_interrupt__of_a_child_that(status, raised, monkeypatch):
    """Where the child could not say that it was interrupted, its parent does."""
    class Child:
        returncode = status
        waits = 0

        def wait(self, timeout=None):
            self.waits += 1
            if self.waits == 1:
                raise KeyboardInterrupt
            return status

    monkeypatch.setattr(subprocess, "Popen", lambda command: Child())
    try:
        returned = lungaug.run_to_end(["python"])
    except KeyboardInterrupt:
        returned = "interrupted"
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    assert returned == ("interrupted" if raised else status)
