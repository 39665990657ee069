"""The tests import the stages from the folder above, and the synthetic scans from this one."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import lungaug
import preprocessing


@pytest.fixture
def dataset(tmp_path):
    """Two volumes on disk, 12³ cubes: positives all in the first, negatives all in the second."""
    scans = []
    for i in range(2):
        np.save(tmp_path / f"{i}.npy", np.random.default_rng(i).integers(-1100, 500, (20, 24, 28)).astype(np.int16))
        scans.append({"volume": f"{i}.npy"})
    rows = [np.array([(i, 10, 12, 14), (i, 3, 20, 9)], np.int32) for i in range(2)]
    preprocessing.open_array.cache_clear()
    return preprocessing.Dataset(tmp_path, {"scans": scans}, 12, {"train": rows[0]}, {"train": rows[1]}, 0)


@pytest.fixture
def run(monkeypatch, capsys):
    """A function that runs a stage's main as its command would: status, out, err."""
    def call(module, *words):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            lungaug.command(module.main)
        out, err = capsys.readouterr()
        return SimpleNamespace(status=stopped.value.code or 0, out=out, err=err)
    return call


def in_one_line(done, *words):
    """Whether a command ended with status 2 and, on stderr, one line alone, a Refusal's, that holds the words."""
    assert done.status == 2 and re.fullmatch("lungaug: [^\n]+: [^\n]+ — [^\n]+\n", done.err), done.err
    return all(word in done.err for word in words)
