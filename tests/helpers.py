"""What more than one test file needs: commands, small scans and runs, and how two states or scans are compared."""

import contextlib
import importlib
import io
import itertools
import multiprocessing
import re
import signal
import subprocess
import sys
import tempfile
import warnings
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import lungaug
from lungaug import Refusal

import numpy as np
import pydicom
import pytest
import torch

import phantom
import preprocessing
import scan_files


CPU = torch.device("cpu")

# The eight sets of axes along which a cube can be mirrored.
AXES = [axes for n in range(4) for axes in itertools.combinations(range(3), n)]

# A small scan
SHAPE = (4, 5, 7)               # (z, y, x)
SPACING = (0.7, 0.8, 1.3)       # (x, y, z), mm
ORIGIN = (-31.4, 17.3, -205.9)


# Running a command

def run_main(module, *words):
    """Run a stage's main in this process as its command would: .status, .out, .err."""
    out, err = io.StringIO(), io.StringIO()
    on_interrupt = signal.getsignal(signal.SIGINT)
    try:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
            patch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, words)])
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                lungaug.command(module.main)
    finally:
        # A command that ends ignores Ctrl-C, as Python is about to end, too; here it is not.
        signal.signal(signal.SIGINT, on_interrupt)
    return SimpleNamespace(status=stopped.value.code or 0, out=out.getvalue(), err=err.getvalue())


def run_python(*words, **more):
    """Run Python with these words in a process of its own: .status, .out, .err; more: as subprocess.run takes it."""
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, encoding="utf-8", **more)
    return SimpleNamespace(status=done.returncode, out=done.stdout, err=done.stderr)


def at_once(*calls):
    """What functions return that are called two at a time: a process mostly imports, on one core."""
    with ThreadPoolExecutor(2) as pool:
        return [job.result() for job in [pool.submit(call) for call in calls]]


# What takes long in other processes

# (module, name) → a function of a new folder; and its Future.
EARLY = {}
STARTED = {}


def early(make):
    """A session's fixture that is made beside the tests before its own, if a test that uses it was selected.

    make: a function of a new, empty folder, which starts commands and returns what can be pickled. It is called once,
    in a process of its own, where the tests' patches do not reach it.
    """
    key = (make.__module__, make.__name__)
    EARLY[key] = make

    @pytest.fixture(scope="session", name=make.__name__)
    def fixture():
        return STARTED[key].result()

    return fixture


def make_early(key, folder):
    """Call an `early` function in this process: its module is imported anew."""
    importlib.import_module(key[0])
    return EARLY[key](folder)


def leave_interrupts_to_the_tests():
    """Ctrl-C ends the commands that this process has started, and so its work."""
    # A handler, and no SIG_IGN, which the commands would inherit.
    signal.signal(signal.SIGINT, lambda *_: None)


def early_keys(item):
    """The keys of the `early` fixtures that a test uses."""
    keys = [(item.module.__name__, name) for name in getattr(item, "fixturenames", ())]
    return [key for key in keys if key in EARLY]


@contextlib.contextmanager
def begin_early(items):
    """Make, one after the other, what is `early` for the tests that were selected, until the block ends."""
    keys = list(dict.fromkeys(itertools.chain.from_iterable(map(early_keys, items))))
    if not keys:
        yield
        return

    spawn = multiprocessing.get_context("spawn")
    # A process that outlives a failed test may still write here: the test's own message matters more.
    with (tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
          ProcessPoolExecutor(1, spawn, leave_interrupts_to_the_tests) as pool):
        for number, key in enumerate(keys):
            place = Path(folder) / str(number)
            place.mkdir()
            STARTED[key] = pool.submit(make_early, key, place)
        try:
            yield
        finally:
            pool.shutdown(cancel_futures=True)


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


# What a command or a reader says

def in_one_line(done, *words):
    """Whether a command ended with status 2 and one line on stderr, a Refusal with these words."""
    one_refusal = re.fullmatch("lungaug: [^\n]+: [^\n]+ — [^\n]+\n", done.err)
    assert done.status == 2 and one_refusal, done.err
    return all(word in done.err for word in words)


def refused(read, *words):
    """The Refusal of `read()` is one line, in the form that the user sees, no warning beside it; it holds the words."""
    with pytest.raises(Refusal) as caught, warnings.catch_warnings():
        warnings.simplefilter("error")
        read()
    line = str(caught.value)
    assert re.fullmatch("lungaug: [^\n]+: [^\n]+ — [^\n]+", line)
    assert all(str(word) in line for word in words), line


# Whether two are the same

def same_state(one, other):
    """Whether two states are equal to the last bit, in every tensor, number and text."""
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(
            same_state(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same_state, one, other))
    if torch.is_tensor(one):
        return torch.is_tensor(other) and torch.equal(one, other)
    return one == other


def same_scan(scan, other, within=1e-6):
    """Two Scans hold the same voxels at the same places."""
    assert np.array_equal(scan.hu, other.hu) and scan.hu.dtype == other.hu.dtype
    for name in ("spacing", "origin", "direction"):
        assert np.abs(getattr(scan, name) - np.asarray(getattr(other, name))).max() <= within, name


# A small scan, and its files

def made(direction=np.eye(3), uid="1.2.3", shape=SHAPE, spacing=SPACING, patient="P1"):
    """A small scan, each voxel with another value from -1000 on, in no order."""
    hu = np.random.default_rng(0).permutation(np.prod(shape)).reshape(shape).astype(np.int16) - 1000
    return phantom.Phantom(uid, patient, hu, spacing, ORIGIN, np.asarray(direction, float), [], None, None)


def series(folder, scan, names=None, numbers=None, header=None, rescale=None, keep=None):
    """A series written slice by slice; names, InstanceNumbers and (slope, intercept) of each as asked; its folder.

    rescale: the pixels stored are then hu + 1024 as they are, so that HU are slope · (hu + 1024) + intercept.
    """
    folder.mkdir(exist_ok=True)
    x, y, z = scan.direction.T
    for k in range(len(scan.hu)) if keep is None else keep:
        tags = scan_files.dicom_header(scan)
        if rescale:
            tags.RescaleSlope, tags.RescaleIntercept = map(str, rescale[k])
        for name, value in (header or {}).items():
            setattr(tags, name, value)
        place = np.array(scan.origin) + z * scan.spacing[2] * k
        scan_files.write_image(folder / (names[k] if names else f"{k:03d}.dcm"), tags, scan.hu[k], place, [*x, *y],
                            scan.spacing[1::-1],
                            numbers[k] if numbers else k + 1)
    return folder


# A small chest, and a set of them

def ellipse(shape, centre, radii):
    """A mask (z, y, x): an ellipsoid, in voxels; a radius of ∞ makes a cylinder."""
    return sum(((axis - c) / r) ** 2 for axis, c, r in zip(np.ogrid[tuple(map(slice, shape))], centre, radii)) < 1


def small_chest(number):
    """A chest of a child's size, quick to prepare: two lungs of 0.6 litres in a block, two nodules in each."""
    rng, shape, origin = np.random.default_rng(number), (40, 34, 62), (10.5 * number, -70.25, -500)
    hu = np.full(shape, -1000)
    hu[:, 2:-2, 2:-2] = 40
    nodules = []
    for x in (18, 43):
        hu[ellipse(shape, (20, 17, x), (16, 12, 12))] = -850
        for z, y in ((12, 17), (27, 17)):
            hu[ellipse(shape, (z, y, x), (2, 2, 2))] = 30
            nodules.append((*(np.array(origin) + 4 * np.array((x, y, z))).tolist(), 10 + number))
    hu = (hu + rng.normal(0, 15, shape)).clip(-1024, 400).astype(np.int16)
    return phantom.Phantom(f"1.2.{number}", f"P{max(1, number)}", hu, (4, 4, 4), origin, np.eye(3), nodules, None, None)


def write_chests(folder, numbers, places=None):
    """Small chests of these numbers as MetaImages, with annotations.csv, in a folder. Returns the folder.

    places: the folder of each below it, such as subset0; all in `folder` itself where there are none.
    """
    rows = []
    for number, place in zip(numbers, places or [""] * len(numbers)):
        chest = small_chest(number)
        scan_files.write_metaimage(folder / place, chest)
        rows += [(chest.seriesuid, *row) for row in chest.nodules]
    scan_files.write_annotations(folder / "annotations.csv", rows)
    return folder


def write_mixed_chests(folder):
    """Write four small scans of three patients, two MetaImage, two DICOM, and annotations.csv; the folder."""
    rows = []
    for number, made in enumerate(map(small_chest, range(4))):
        write = scan_files.write_metaimage if number > 1 else scan_files.write_dicom
        write(folder, made)
        rows += [(made.seriesuid, *row) for row in made.nodules]
    scan_files.write_annotations(folder / "annotations.csv", rows)
    return folder


def change(path, **tags):
    """Write a DICOM file again with other tags, or without those that are None."""
    found = pydicom.dcmread(path)
    for name, value in tags.items():
        if value is None:
            delattr(found, name)
        else:
            setattr(found, name, value)
    found.save_as(path)


# A small run, prepared by hand

def small_run(run, cube=6, nodules=(3, 2, 2), negatives=(5, 3, 4)):
    """Prepare random HU in `run`, one scan per split. Returns its Dataset.

    nodules, negatives: how many train, validation and test have.
    """
    rng = np.random.default_rng(1)
    half = cube // 2
    scans = []
    for split, n_positives, n_negatives in zip(("train", "validation", "test"), nodules, negatives):
        hu = rng.integers(-1000, 401, (20, 21, 22)).astype(np.int16)
        lungaug.write(run / "prepared" / f"{split}.npy", hu)
        # Every cube lies inside the volume.
        positives = rng.integers(half, 20 - half, (n_positives, 3))
        others = rng.integers(half, 20 - half, (n_negatives, 3))
        scans.append({
            "seriesuid": f"1.2.{split}", "patient": split, "split": split,
            "volume": f"{split}.npy", "origin": [-10.5, 20.25, 30.0],
            "positives": positives.tolist(), "negatives": others.tolist()})

    lungaug.write(run / "prepared" / "dataset.json", {
        "parameters": {"cube": cube}, "preset": "thesis", "synthetic": True, "skipped": [],
        "table_1": preprocessing.table_1(scans, {}), "scans": scans})
    return preprocessing.open_dataset(run)


def scaled(hu):
    """HU in [-1, 1], by the formula: -1000 is -1, 400 is 1."""
    return hu / 700 + 3 / 7


def cubes_of(dataset, kind, split):
    """The cubes (n, c, c, c) in [-1, 1] of the scan of a split, cut and scaled by hand."""
    scan, = (scan for scan in dataset.info["scans"] if scan["split"] == split)
    hu = np.load(dataset.folder / scan["volume"]).astype(float)
    half = dataset.cube // 2
    cubes = []
    for z, y, x in scan[kind]:
        cubes.append(hu[z - half:z + half, y - half:y + half, x - half:x + half])
    return scaled(np.array(cubes))


def eight(cubes):
    """Each cube mirrored along each set of axes, by numpy."""
    return np.array([np.flip(cube, axes) for cube in cubes for axes in AXES])


def as_set(cubes):
    """Cubes in [-1, 1] as a sorted list of whole HU.

    Two lists are equal where they hold the same cubes equally often, in any order.
    """
    hu = 700 * np.reshape(cubes, (len(cubes), -1)).astype(float) - 300
    whole = np.rint(hu)
    assert np.abs(hu - whole).max() < 1e-3
    return sorted(whole.astype(int).tolist())


def write_generated(run, positives=5, negatives=4, cube=6):
    """Write generated cubes of noise in a run. Returns them by class, int16 HU.

    positives, negatives: how many of each class.
    """
    rng = np.random.default_rng(2)
    folder = run / "classifiers" / "generated"
    generated = {}
    for name, count in (("positive", positives), ("negative", negatives)):
        cubes = rng.integers(-1000, 401, (count, cube, cube, cube)).astype(np.int16)
        lungaug.write(folder / f"{name}.npy", cubes)
        lungaug.write(folder / f"{name}_rejected.npy", cubes)
        generated[name] = cubes
    # An earlier file of the same name may still be mapped.
    preprocessing.open_array.cache_clear()
    return generated
