"""The tests import the stages from the folder above, and the synthetic scans from this one.

LUNGAUG_WRONG=<name> puts a mistake of wrong_versions.py in place, before any test is imported.
"""

import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest


TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

# The networks of the tests are small: two threads would wait for each other most of the time, in
# the processes that the tests start, too. PyTorch reads this as it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Where a script runs the tests in the background, Ctrl-C is ignored, and so it would be by the
# processes that the tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

import torch

import preprocessing


if os.environ.get("LUNGAUG_WRONG"):
    import wrong_versions
    wrong_versions.install(os.environ["LUNGAUG_WRONG"])


def pytest_collection_modifyitems(items):
    """Tests of what takes long in other processes come last: nobody waits for it."""
    import helpers
    items.sort(key=lambda item: bool(helpers.early_keys(item)))


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session):
    """What takes long in other processes runs beside the tests."""
    import helpers
    with helpers.begin_early([] if session.config.option.collectonly else session.items):
        return (yield)


@pytest.fixture(autouse=True)
def interruptible():
    """A command that ends ignores Ctrl-C, as Python is about to end, too; here it is not."""
    yield
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def threads():
    """threads(n) lets PyTorch compute on n threads until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def dataset(tmp_path):
    """Two volumes on disk, 12³ cubes: positives all in the first, negatives all in the second."""
    scans = []
    for i in range(2):
        hu = np.random.default_rng(i).integers(-1100, 500, (20, 24, 28)).astype(np.int16)
        np.save(tmp_path / f"{i}.npy", hu)
        scans.append({"volume": f"{i}.npy"})

    # A row is a volume and a cube's centre in it, (z, y, x).
    positives = np.array([(0, 10, 12, 14), (0, 3, 20, 9)], np.int32)
    negatives = np.array([(1, 10, 12, 14), (1, 3, 20, 9)], np.int32)
    preprocessing.open_array.cache_clear()
    return preprocessing.Dataset(tmp_path, {"scans": scans}, 12, {"train": positives},
                                 {"train": negatives}, 0)


def as_text(values):
    """Numbers as the audit prints them: whole ones as they are, others with two decimals."""
    texts = []
    for value in np.ravel(values).tolist()[:8]:
        texts.append(f"{value:.2f}" if isinstance(value, float) else str(value))
    return " ".join(texts)


@pytest.fixture
def compared(record_property):
    """compared(name, found, by_hand) records two numbers, or lists of them, for the audit's line.

    It asserts nothing: call it before the assertion, so that a failure has its line, too.
    """
    def record(name, found, by_hand):
        record_property("compared", f"{name} {as_text(found)}, by hand {as_text(by_hand)}")
    return record


@pytest.fixture
def run():
    """helpers.run_main, which runs a stage's main as its command would."""
    import helpers
    return helpers.run_main


@pytest.fixture(scope="session")
def chests(tmp_path_factory):
    """A folder of four small scans of three patients, quick to prepare."""
    import helpers
    return helpers.write_mixed_chests(tmp_path_factory.mktemp("chests"))

