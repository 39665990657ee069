"""Ctrl-C while lungaug.py runs a stage: one line, exit 130, and no process stays behind."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import lungaug


needs_ps = pytest.mark.skipif(os.name == "nt" or not shutil.which("ps"), reason="needs POSIX signals, and ps")


def descendants(pid):
    """The processes that a process started, and theirs, by pid; from ps, which every POSIX system has."""
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    children = {}
    for line in listed.splitlines():
        child, parent = map(int, line.split())
        children.setdefault(parent, []).append(child)

    found = []
    waiting = [pid]
    while waiting:
        of_one = children.get(waiting.pop(), [])
        found += of_one
        waiting += of_one
    return found


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


def start_lungaug(run):
    """`python lungaug.py`, while it makes synthetic scans in two workers: the process, and the pids below it."""
    command = [sys.executable, str(lungaug.HERE / "lungaug.py"), "--run", str(run), "--workers", "2"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "encoding": "utf-8"}
    process = subprocess.Popen(command, start_new_session=True, **pipes)

    # lungaug.py, preprocessing.py, phantom.py, and below it a tracker of resources and two workers.
    assert wait_until(lambda: len(list(Path(run).rglob("truth/*.npz"))) > 0, seconds=120)
    return process, descendants(process.pid)


@needs_ps
def test_interrupt__is_one_line_and_nothing_stays_behind(tmp_path):
    """Ctrl-C at a terminal reaches every process: exit 130, one line, and all of them end."""
    process, started = start_lungaug(tmp_path)
    assert len(started) >= 4
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)

    assert process.returncode == 130
    assert err.count("lungaug: interrupted") == 1 and "Traceback" not in err
    assert wait_until(lambda: not any(map(is_running, started)))


@needs_ps
def test_interrupt__of_the_first_process_alone(tmp_path):
    """`kill -INT` of lungaug.py alone ends its stage, too."""
    process, started = start_lungaug(tmp_path)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=90)

    assert process.returncode == 130
    assert err.count("lungaug: interrupted") == 1 and "Traceback" not in err
    assert wait_until(lambda: not any(map(is_running, started)))
