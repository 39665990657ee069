"""The tests import the stages from the folder above, and the synthetic scans from this one."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

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
    return preprocessing.Dataset(tmp_path, {"scans": scans}, 12, {"train": rows[0]}, {"train": rows[1]})
