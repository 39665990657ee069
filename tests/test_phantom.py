"""Tests of the synthetic scans' set: its bytes, its truth, what a stop keeps, what a kill leaves."""

import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import lungaug

import numpy as np
import pytest

import phantom
import preprocessing
import scan_files
from helpers import at_once, early, in_one_line


# The sets here hold six scans of large voxels, which take a fraction of a second each.
COUNT = 6
SCALE = 4.0
COARSE = f"""
import functools, sys
sys.path[:0] = sys.argv[1:3]
del sys.argv[1:3]
import lungaug, phantom
phantom.write_scans = functools.partial(phantom.write_scans, scale={SCALE})
lungaug.command(phantom.main)
"""
FOLDERS = [Path(lungaug.__file__).parent, Path(phantom.__file__).parent]
POSIX = pytest.mark.skipif(os.name != "posix", reason="Windows has no such signals")


def words(run, *more):
    """The command that makes a small set in a folder, with two workers."""
    command = [sys.executable, "-c", COARSE, *FOLDERS, "--run", run, "--scans-count", COUNT, "--workers", 2, *more]
    return list(map(str, command))


def files(folder):
    """Every file below a folder but the lock, its path → its bytes."""
    paths = [path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(".lock")]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def written_at(folder):
    """Every scan that has a record, path → time of writing of each of its files."""
    times = {}
    for path in folder.glob("truth/*.json"):
        for name in lungaug.read_json(path, "")["files"]:
            times[name] = (folder / name).stat().st_mtime_ns
    return times


def stop(run, number, often=False):
    """Start the command; once it has made a scan, send it a signal, or often until it ends. Status, stderr.

    It returns when no process, worker or not, holds the command's output any more.
    """
    process = subprocess.Popen(words(run), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               start_new_session=True)
    # A terminal sends Ctrl-C to all processes of the command; a kill hits one.
    send = os.killpg if number == signal.SIGINT else os.kill
    try:
        deadline = time.monotonic() + 60
        while not list(run.glob("scans/truth/*.json")) and time.monotonic() < deadline:
            time.sleep(0.005)
        send(process.pid, number)
        while often and process.poll() is None:
            time.sleep(0.02)
            send(process.pid, number)
        _, err = process.communicate(timeout=30)
    finally:
        # A worker that outlives its parent is a failure, but must not outlive the test.
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    return process.returncode, err


@early
def stopped(folder):
    """A set that each signal stopped, by its name: .run, its folder; .status and .err of the command."""
    names = {"Ctrl-C": (signal.SIGINT,), "Ctrl-C again and again": (signal.SIGINT, True),
             "SIGKILL": (signal.SIGKILL,), "SIGTERM": (signal.SIGTERM,)}
    runs = {name: folder / name for name in names}
    ends = at_once(*(functools.partial(stop, runs[name], *how) for name, how in names.items()))
    return {name: SimpleNamespace(run=runs[name], status=status, err=err) for name, (status, err) in zip(names, ends)}


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """The folder of a set that was made undisturbed."""
    return phantom.write_scans(tmp_path_factory.mktemp("whole") / "scans", COUNT, workers=2, scale=SCALE)


@pytest.fixture
def copy(whole, tmp_path):
    """A run with a copy of that set, to be spoilt."""
    shutil.copytree(whole, tmp_path / "scans")
    return tmp_path


@pytest.fixture
def coarse(monkeypatch):
    """phantom.main, too, makes large voxels."""
    monkeypatch.setattr(phantom, "write_scans", functools.partial(phantom.write_scans, scale=SCALE))


# A command that is stopped

@POSIX
def test_main__ctrl_c_says_one_line_and_leaves_no_process(stopped):
    """Status 130, and beside lines of progress the one that says how to resume; no worker stays."""
    done = stopped["Ctrl-C"]
    lines = [line for line in done.err.splitlines() if line and not line.startswith("synthetic scans ")]
    assert done.status == 130
    assert len(lines) == 1 and "interrupted" in lines[0] and "resume" in lines[0], done.err


@POSIX
def test_main__ctrl_c_again_and_again_says_the_same_line(stopped):
    """Whoever holds Ctrl-C down gets the one line, and no traceback of a worker."""
    done = stopped["Ctrl-C again and again"]
    assert done.status == 130 and done.err.count("interrupted") == 1 and "Traceback" not in done.err


@POSIX
@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM"])
def test_main__workers_end_with_a_killed_parent(stopped, name):
    """Nothing holds the command's output once its process is killed: `communicate` would not return."""
    assert stopped[name].status == -signal.Signals[name]


@POSIX
@pytest.mark.parametrize("name", ["Ctrl-C", "SIGKILL"])
def test_main__a_stopped_command_resumes_to_the_same_bytes(coarse, stopped, whole, tmp_path, run, name):
    """Scans that were whole are not written again; the set is that of an undisturbed command."""
    folder = Path(shutil.copytree(stopped[name].run, tmp_path / "run")) / "scans"
    kept = written_at(folder)
    assert kept and not (folder / "annotations.csv").exists()

    done = run(phantom, "--run", folder.parent, "--scans-count", COUNT, "--workers", 2)
    assert done.status == 0, done.err
    assert files(folder) == files(whole) and not list(folder.glob(".2.25.*"))
    assert kept.items() <= written_at(folder).items()


@POSIX
def test_main__ctrl_c_leaves_whole_scans_alone(stopped, whole):
    """Every file that it leaves is of a scan with a record, as if undisturbed; the scan that was in work is there."""
    folder = stopped["Ctrl-C"].run / "scans"
    left = files(folder)
    of_scans = {name for name in left if not name.endswith(".json")}
    assert len(list(folder.glob("truth/*.json"))) >= 2
    assert of_scans == set(written_at(folder))
    assert left.items() <= files(whole).items()


# What is kept

@pytest.mark.parametrize("pattern", ["subset0/*.raw", "subset1/*/001.dcm", "truth/*.npz", "truth/*.json"])
@pytest.mark.parametrize("change", [lambda data: data[:-9], lambda data: data.replace(b"1", b"2", 1), None],
                         ids=["cut short", "changed", "missing"])
def test_write_scans__a_damaged_scan_is_made_again(whole, copy, pattern, change):
    """A file that is not as it was written, a record too, does not count as kept."""
    path = sorted(copy.glob(f"scans/{pattern}"))[0]
    before = path.read_bytes()
    path.unlink()
    if change:
        path.write_bytes(change(before))
        assert path.read_bytes() != before
    phantom.write_scans(copy / "scans", COUNT, workers=2, scale=SCALE)
    assert files(copy / "scans") == files(whole)


@pytest.mark.parametrize("option", [("--seed", 1), ("--scans-count", COUNT - 1)], ids=["seed", "count"])
@pytest.mark.parametrize("half", [True, False], ids=["half-made", "whole"])
def test_main__scans_of_other_options_are_not_mixed(coarse, copy, run, option, half):
    """Another --seed or --scans-count in the same folder is refused in one line, and nothing is changed."""
    if half:
        (copy / "scans" / "annotations.csv").unlink()
    before = files(copy)
    done = run(phantom, "--run", copy, "--scans-count", COUNT, *option)
    assert in_one_line(done, "parameters.json", option[0][2:].split("-")[-1], "delete")
    assert files(copy) == before


def test_main__scans_of_unknown_options_are_not_mixed(coarse, copy, run):
    """A folder that holds scans, but not their parameters, is refused as it is."""
    (copy / "scans" / "parameters.json").unlink()
    before = files(copy)
    assert in_one_line(run(phantom, "--run", copy, "--scans-count", COUNT), "not known", "delete")
    assert files(copy) == before


@pytest.mark.parametrize("option", ["--scans-count", "--workers", "--seed"])
def test_main__a_number_that_is_too_small_is_one_line(tmp_path, run, option):
    """Nothing can be made of -1 scans, by -1 workers, from the seed -1."""
    assert in_one_line(run(phantom, "--run", tmp_path, option, -1), option, "-1")
    assert not list(tmp_path.iterdir())


# What is made

def test_write_scans__bytes_do_not_depend_on_workers(tmp_path):
    """One worker or three, the set is the same."""
    one = phantom.write_scans(tmp_path / "one", 4, seed=3, workers=1, scale=SCALE)
    three = phantom.write_scans(tmp_path / "three", 4, seed=3, workers=3, scale=SCALE)
    assert files(one) == files(three)


def test_write_scans__the_program_finds_every_scan_and_nodule(whole):
    """preprocessing.py reads as many series as were made, and annotations of these series alone."""
    sources = preprocessing.find_scans(whole)
    annotations = preprocessing.read_annotations(whole / "annotations.csv")
    uids = [source.seriesuid for source in sources]
    assert sorted(uids) == sorted(phantom.series_uid(0, index) for index in range(COUNT))
    assert set(annotations) == set(uids)


def test_write_truth__reads_back(tmp_path):
    """Lungs and labels are what the phantom holds, whatever the number of voxels is."""
    made = phantom.make_phantom(0, scale=5.0)
    made = made._replace(lungs=made.lungs[:, :-1, :-2], nodule_labels=made.nodule_labels[:, :-1, :-2])
    scan_files.write_truth(tmp_path / "truth.npz", made)
    lungs, labels = scan_files.read_truth(tmp_path / "truth.npz")
    assert np.array_equal(lungs, made.lungs) and lungs.dtype == bool
    assert np.array_equal(labels, made.nodule_labels) and labels.dtype == np.uint8 and labels.any()
