"""A disk that is full or fails: one line that names the file, nothing lost, the same command continues.

    python -m pytest tests/test_faults.py -v
"""

import contextlib
import errno
import itertools
import multiprocessing
import os
import pickle
import shutil
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import lungaug

import numpy as np
import pytest
import torch

import evaluate
import preprocessing
import scan_files
import train_classifier
import train_gan
from helpers import early, in_one_line, run_main, small_chest, small_run


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


def write_under_a_limit(path, value, errors):
    """Write a file as a command does where none may grow; errors: the file of what is said on stderr."""
    # Windows has no such module.
    import resource
    os.dup2(os.open(errors, os.O_CREAT | os.O_APPEND | os.O_WRONLY), 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    lungaug.command(lambda: lungaug.write(path, value))


@early
def limited(folder):
    """.folder, in which files could not grow, and .statuses and .errors of the processes that wrote some there."""
    errors = folder / "errors.txt"
    place = folder / "files"
    place.mkdir()
    statuses = []
    for name, value in VALUES.items():
        # A copy of this process, which has imported the packages.
        process = multiprocessing.get_context("fork").Process(target=write_under_a_limit,
                                                              args=(place / name, value, errors))
        process.start()
        process.join()
        statuses.append(process.exitcode)
    return SimpleNamespace(folder=place, statuses=statuses, errors=errors.read_text(encoding="utf-8"))


@pytest.mark.skipif(os.name == "nt", reason="Windows limits no file's size")
def test_write__where_files_may_not_grow(limited):
    """A limit on the size of files, in a process of its own for each: one line, exit 2, no traceback."""
    assert limited.statuses == [2] * len(VALUES), limited.errors
    for line, name in itertools.zip_longest(limited.errors.splitlines(), VALUES):
        assert line.startswith(f"lungaug: {limited.folder / name}: ")
    assert list(limited.folder.iterdir()) == []


def test_append_log__a_fault_names_the_log(tmp_path, capsys):
    """Where the log is a folder, say, the line names it."""
    path = tmp_path / "log.jsonl"
    path.mkdir()
    with pytest.raises(SystemExit) as stopped:
        lungaug.command(lambda: lungaug.append_log(path, {"epoch": 1}))
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith(f"lungaug: {path}: ")


# Each write of a whole run fails once

ERRORS = (errno.ENOSPC, errno.EIO, errno.EACCES)
COMMANDS = (
    (train_gan, "--width", 1, "--batch-size", 4, "--epochs", 3, "--checkpoint-minutes", 0),
    (train_classifier, "--batch-size", 8, "--epochs", 2, "--attempts", 3, "--score-quantile", 0,
     "--class-probability", 0, "--repeats", 2),
    (evaluate,),
)
HOLD_TIMES = ("options.json", "report.html")


class FailingFile:
    """A file whose write leaves half of what it is given where `step` raises."""

    def __init__(self, file, step):
        self.file = file
        self.step = step
        self.writes = itertools.count()

    def write(self, data):
        try:
            self.step(f"write {next(self.writes)}", self.file.name)
        except OSError:
            self.file.write(data[:len(data) // 2])
            raise
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()


def before_each(patch, step):
    """Let step(what, path) be called before each write, fsync and rename of lungaug.py; where it raises, that fails."""
    opened = []

    def open_failing(path, *arguments, **more):
        opened.append(path)
        return FailingFile(open(path, *arguments, **more), step)

    def after_step(function):
        def stepping(*arguments):
            # What is synced or renamed is the file that was opened last.
            step(function.__name__, opened[-1])
            return function(*arguments)
        return stepping

    patch.setattr(lungaug, "open", open_failing, raising=False)
    for name in ("fsync", "replace"):
        patch.setattr(os, name, after_step(getattr(os, name)))


def fail_at(patch, count):
    """Let the count-th write, fsync or rename fail, each kind of error in turn; a list that holds those to come."""
    left = [count]

    def step(*_):
        left[0] -= 1
        if left[0] == 0:
            number = ERRORS[count % len(ERRORS)]
            raise OSError(number, os.strerror(number))

    before_each(patch, step)
    return left


def fail_anew(patch, failed):
    """Let the first write, fsync or rename fail that is not in `failed`, (what, path), and put it there; a list of it.
    """
    failing = []

    def step(what, path):
        if not failing and (what, str(path)) not in failed:
            failing.append((what, str(path)))
            failed.update(failing)
            number = ERRORS[len(failed) % len(ERRORS)]
            raise OSError(number, os.strerror(number))

    before_each(patch, step)
    return failing


def contents(run):
    """Name → bytes of a run's files, less those that hold a command's time, and the locks."""
    files = [path for path in run.rglob("*") if path.is_file() and path.name not in HOLD_TIMES]
    return {str(path.relative_to(run)): path.read_bytes() for path in files if path.suffix != ".lock"}


def fail_each_write(stage, quiet, faulty, *words):
    """Run a stage in `quiet`, and in `faulty` again and again: first its first write fails, then its second, and so on.

    Returns what the failing commands said, what the whole one said, and whether both hold the same files.
    """
    done = run_main(stage, "--run", quiet, "--preset", "demo", *words)
    assert done.status == 0, f"{stage.__name__}: {done.err}"
    failed = []
    for count in itertools.count(1):
        with pytest.MonkeyPatch.context() as patch:
            left = fail_at(patch, count)
            done = run_main(stage, "--run", faulty, "--preset", "demo", *words)
        if left[0] > 0:
            return failed, done, contents(faulty) == contents(quiet)
        failed.append(done)


@early
def failed_stages(folder):
    """Stage → what `fail_each_write` returns."""
    quiet, faulty = folder / "quiet", folder / "faulty"
    small_run(quiet, nodules=(6, 4, 4))
    shutil.copytree(quiet, faulty)
    return {stage.__name__: fail_each_write(stage, quiet, faulty, *words) for stage, *words in COMMANDS}


@pytest.mark.parametrize("stage", [stage.__name__ for stage, *_ in COMMANDS])
def test_stages__each_write_that_fails_once_is_one_line_and_nothing_is_lost(failed_stages, stage):
    """The first write of a stage fails, then, as the same command runs again, the second, and so on: each time it is
    one line, and in the end the files are those of a run that nothing befell."""
    failed, done, equal = failed_stages[stage]
    for count, failing in enumerate(failed, 1):
        *_, line = failing.err.splitlines(keepends=True)
        failing.err = line
        assert in_one_line(failing, "run the same command again"), count
    assert len(failed) > 5
    assert done.status == 0, done.err
    assert equal


@pytest.mark.parametrize("stage, words", [(stage, words) for stage, *words in COMMANDS[:2]],
                         ids=["train_gan", "train_classifier"])
def test_stages__after_a_power_cut_no_log_ends_before_its_checkpoint(tmp_path, monkeypatch, run, stage, words):
    """What a power cut leaves of a log is what was synced: at the moment at which a checkpoint takes its name, those
    are all rows up to its epoch."""
    small_run(tmp_path, nodules=(6, 4, 4))
    if stage is train_classifier:
        assert run(train_gan, "--run", tmp_path, "--preset", "demo", *COMMANDS[0][1:]).status == 0
    synced, checked = {}, []
    fsync, replace = os.fsync, os.replace

    def record_fsync(descriptor):
        fsync(descriptor)
        found = os.fstat(descriptor)
        synced[found.st_ino] = found.st_size

    def check_replace(source, target):
        if Path(target).name == "checkpoint.pt":
            log = Path(target).with_name("log.jsonl").stat()
            assert synced.get(log.st_ino) == log.st_size > 0
            checked.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", check_replace)
    done = run(stage, "--run", tmp_path, "--preset", "demo", *words)
    assert done.status == 0, done.err
    assert len(checked) >= 3


class ThisProcess:
    """A pool whose one worker is this process, where a fault can be put; an error comes back as from another one, and
    jobs behind it do not begin."""

    def __init__(self):
        self.failed = False

    def submit(self, function, *arguments):
        job = Future()
        if self.failed:
            return job
        try:
            job.set_result(function(*arguments))
        except Exception as error:
            self.failed = True
            job.set_exception(pickle.loads(pickle.dumps(error)))
        return job


def test_preprocessing__each_write_that_fails_once_is_one_line_and_nothing_is_lost(tmp_path, monkeypatch, run):
    """Each write, fsync and rename of each file fails once, in a command of its own: each time it is one line that
    names the file, and no file is lost; in the end the files are those of a run that nothing befell."""
    rows = []
    for number in (1, 2, 3):
        chest = small_chest(number)
        scan_files.write_metaimage(tmp_path / "scans", chest)
        rows += [(chest.seriesuid, *row) for row in chest.nodules]
    (tmp_path / "scans" / "1.2.4.mhd").write_text("a scan that is skipped: its record is a file, too")
    scan_files.write_annotations(tmp_path / "scans" / "annotations.csv", rows)
    monkeypatch.setattr(lungaug, "start_pool", lambda workers: contextlib.nullcontext(ThisProcess()))

    # The lungs of a scan are looked for in the quiet run alone: they are no file, and take half of the time.
    lungs, find_lungs = {}, preprocessing.find_lungs

    def find_once(scan, path):
        if path not in lungs:
            lungs[path] = find_lungs(scan, path)
        return lungs[path]

    monkeypatch.setattr(preprocessing, "find_lungs", find_once)

    words = ["--scans", tmp_path / "scans", "--cube", 12, "--negatives", 5, "--max-slice-mm", 20, "--run"]
    quiet, faulty = tmp_path / "quiet", tmp_path / "faulty"
    assert run(preprocessing, *words, quiet).status == 0

    failed, there = set(), {}
    while True:
        with monkeypatch.context() as patch:
            failing = fail_anew(patch, failed)
            done = run(preprocessing, *words, faulty)
        if not failing:
            break
        *_, line = done.err.splitlines(keepends=True)
        done.err = line
        (what, path), = failing
        # A file is written under a hidden name first: .dataset.json.4242
        name = Path(path).name[1:].rpartition(".")[0]
        assert in_one_line(done, str(faulty / "prepared" / name), "run the same command again"), what
        assert there.items() <= contents(faulty).items()
        there = contents(faulty)

    assert done.status == 0
    assert contents(faulty) == contents(quiet)
    # Each file's fsync and rename have failed, and each of its writes.
    names = {Path(path).name[1:].rpartition(".")[0] for what, path in failed if what == "fsync"}
    assert names == {path.name for path in (quiet / "prepared").iterdir() if path.suffix != ".lock"}
    assert len(failed) >= 3 * len(names)
