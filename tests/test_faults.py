"""A disk that is full or fails: one line that names the file, nothing lost, the same command continues.

    python -m pytest tests/test_faults.py -v
"""

import errno
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import lungaug


VALUES = {
    "checkpoint.pt": {"epoch": 3, "weights": torch.zeros(5000)},
    "volume.npy": np.zeros((20, 30, 40), np.int16),
    "results.json": {"tables": [1.5] * 3000},
    "picture.png": b"\x89PNG" * 3000,
    "report.html": "<p>" * 9000,
}


def fail_once(function, number):
    """The same function, whose first call raises OSError(number) without naming a file."""
    calls = []

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            raise OSError(number, os.strerror(number))
        return function(*arguments)

    return failing


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EACCES], ids=["full", "broken", "forbidden"])
@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("name", VALUES)
def test_write__a_fault_leaves_the_file_as_it_was(tmp_path, monkeypatch, capsys, name, call, number):
    """One line with the file and what the disk said; the earlier file is whole, and nothing lies beside it."""
    path = tmp_path / name
    lungaug.write(path, VALUES[name])
    before = path.read_bytes()

    monkeypatch.setattr(os, call, fail_once(getattr(os, call), number))
    with pytest.raises(SystemExit) as stopped:
        lungaug.command(lambda: lungaug.write(path, VALUES[name]))
    assert stopped.value.code == 2
    assert capsys.readouterr().err == (
        f"lungaug: {path}: {os.strerror(number)} — fix this and run the same command again\n")
    assert [left.name for left in tmp_path.iterdir()] == [name]
    assert path.read_bytes() == before

    # The same command continues.
    lungaug.write(path, VALUES[name])
    assert path.read_bytes() == before


WRITE_UNDER_A_LIMIT = """
import resource, sys
from pathlib import Path
import lungaug, test_faults
path = Path(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
lungaug.command(lambda: lungaug.write(path, test_faults.VALUES[path.name]))
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows limits no file's size")
@pytest.mark.parametrize("name", VALUES)
def test_write__where_files_may_not_grow(tmp_path, name):
    """A limit on the size of files, in a process of its own: one line, exit 2, no traceback."""
    path = tmp_path / name
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(lungaug.HERE), str(lungaug.HERE / "tests")])}
    done = subprocess.run([sys.executable, "-c", WRITE_UNDER_A_LIMIT, str(path)], env=environment, capture_output=True,
                          text=True, encoding="utf-8")
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"lungaug: {path}: ")
    assert list(tmp_path.iterdir()) == []


def test_append_log__a_fault_names_the_log(tmp_path, capsys):
    """Where the log is a folder, say, the line names it."""
    path = tmp_path / "log.jsonl"
    path.mkdir()
    with pytest.raises(SystemExit) as stopped:
        lungaug.command(lambda: lungaug.append_log(path, {"epoch": 1}))
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith(f"lungaug: {path}: ")
