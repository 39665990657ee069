"""The whole program as a user runs it: four small scans, every stage, the report; again, resumed, refused.

    python -m pytest tests/test_run.py -v

One run is made by the command itself, a process a stage. Where only the bytes of a further run matter, its stages run
in one process, which saves starting torch five times.
"""

import csv
import errno
import html
import json
import math
import os
import re
import shutil
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import lungaug

import numpy as np
import pytest
import torch

import evaluate
import preprocessing
from evaluate import Confusion, confusion_matrix
from helpers import at_once, early, in_one_line, run_python, same_state, write_mixed_chests


HERE = Path(__file__).resolve().parent.parent
ARMS = ("real", "longer", "mixed", "fake")
SCRIPTS = ("preprocessing.py", "train_gan.py", "train_classifier.py", "evaluate.py")
WORDS = ("--preset demo --cube 12 --negatives 30 --epochs 3 --width 1 --batch-size 8 --attempts 3 --score-quantile 0.0 "
         "--class-probability 0.0 --workers 1 --max-slice-mm 10 --repeats 1").split()
STAY = ["prepared/dataset.json", "gan/checkpoint.pt", "gan/log.jsonl", "evaluation/results.json",
        "evaluation/scores.csv",
        *(f"classifiers/{arm}/{name}" for arm in ARMS for name in ("checkpoint.pt", "log.jsonl"))]
ONE_PROCESS = """
import importlib, sys
sys.path.insert(0, sys.argv[1])
import lungaug
def stage(script, *words):
    sys.argv = [script, *map(str, words)]
    importlib.import_module(script[:-3]).main()
lungaug.run_script = stage
sys.argv = ["lungaug.py", *sys.argv[2:]]
lungaug.main()
"""


def files(folder):
    """Every file below a folder, its path → its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@early
def tiny(folder):
    """The tiny run: .folder holds scans and run R; .before, its files before the command; .command, what that said.

    .twin: the same command into another run, T, its stages in one process, at the same time. .later: see `try_later`.
    """
    base = folder / "tiny"
    (base / "scans").mkdir(parents=True)
    write_mixed_chests(base / "scans")
    before = files(base)
    command, twin = at_once(
        lambda: run_python(HERE / "lungaug.py", "--scans", "scans", "--run", "R", *WORDS, cwd=base),
        lambda: run_python("-c", ONE_PROCESS, HERE, "--scans", "scans", "--run", "T", *WORDS, cwd=base))
    assert command.status == 0, command.err
    later = try_later(base, folder / "later")
    return SimpleNamespace(folder=base, run=base / "R", before=before, command=command, twin=twin, later=later)


@pytest.fixture(scope="module")
def twin(tiny):
    """The run that the stages left that ran in one process."""
    assert tiny.twin.status == 0, tiny.twin.err
    return tiny.folder / "T"


@pytest.fixture
def copy(tiny, tmp_path):
    """A copy of the tiny run, to be spoilt."""
    return Path(shutil.copytree(tiny.run, tmp_path / "C"))


@pytest.fixture(scope="module")
def later(tiny):
    """What further commands did."""
    return tiny.later


def try_later(tiny, folder):
    """What further commands did in processes of their own, and the files that they left or found.

    .moved: evaluate.py under python -O, in another folder; .report: lungaug.py report; .again: the twin's command;
    .changed: lungaug.py with another --cube.
    """
    folder.mkdir()
    run = tiny / "R"
    moved = Path(shutil.copytree(run, folder / "Läufe und mehr" / "R 2"))
    shutil.rmtree(moved / "evaluation")
    # The page is called after the run's folder.
    drawn = Path(shutil.copytree(run, folder / run.name))
    (drawn / "report.html").unlink()
    found = files(tiny / "T")
    words = ["24" if word == "12" else word for word in WORDS]

    ends = at_once(
        lambda: run_python("-O", HERE / "evaluate.py", "--run", moved, cwd=folder),
        lambda: run_python(HERE / "lungaug.py", "report", "--run", drawn, cwd=folder),
        lambda: run_python("-c", ONE_PROCESS, HERE, "--scans", "scans", "--run", "T", *WORDS, cwd=tiny),
        lambda: run_python(HERE / "lungaug.py", "--scans", "scans", "--run", "R", *words, cwd=tiny))
    return SimpleNamespace(**dict(zip(("moved", "report", "again", "changed"), ends)), moved_run=moved, drawn_run=drawn,
                           found=found)


# What the command does


def test_run__each_stages_command_is_printed_first_and_can_be_typed(tiny):
    """Each stage's command stands before its output, in the order of the thesis, as a student would type it."""
    commands = re.findall(r"^\$ python (\S+) (.*)$", tiny.command.out, re.M)
    assert tuple(script for script, _ in commands) == SCRIPTS and all("--run R" in words for _, words in commands)
    first, blank, command, *_ = tiny.command.out.strip().splitlines()
    assert first == "Stage 1 of 4." and not blank and command.startswith("$ python preprocessing.py")


def test_run__each_stage_is_announced(tiny):
    """Before each command its number; while trainings are left their time, too, once the scans are prepared."""
    lines = re.findall(r"^(Stage .*)\n\n\$ python (\S+)", tiny.command.out, re.M)
    assert tuple(script for _, script in lines) == SCRIPTS
    texts = [text for text, _ in lines]
    assert texts == ["Stage 1 of 4.", "Stage 2 of 4, less than a minute left.",
                     "Stage 3 of 4, less than a minute left.", "Stage 4 of 4."]


def test_run__each_stage_is_given_its_own_options_alone(tiny):
    """--cube goes to preprocessing alone, --width to the GAN, --epochs to both trainings."""
    words = dict(re.findall(r"^\$ python (\S+) (.*)$", tiny.command.out, re.M))
    with_option = {option: {script for script in SCRIPTS if option in words[script].split()}
                   for option in ("--cube", "--width", "--epochs", "--attempts", "--preset")}
    assert with_option == {"--cube": {SCRIPTS[0]}, "--width": {SCRIPTS[1]}, "--epochs": set(SCRIPTS[1:3]),
                           "--attempts": {SCRIPTS[2]}, "--preset": set(SCRIPTS)}


def test_run__stderr_holds_progress_and_no_warning(tiny):
    """Every line on stderr is one of progress, done/total; none is a warning."""
    lines = tiny.command.err.splitlines()
    assert lines and all(re.match(r"[a-z ]+ \d+/\d+(  |$)", line) for line in lines), tiny.command.err


def test_run__nothing_is_written_outside_the_run(tiny):
    """Beside the run, the folder is as it was: the scans are not touched, no file is added."""
    after = {path: data for path, data in files(tiny.folder).items() if path.split("/")[0] not in ("R", "T")}
    assert after == tiny.before


def test_run__the_names_that_stay_are_there(tiny):
    """The files that other people's scripts look for, and no half-written ones."""
    found = set(files(tiny.run))
    assert {*STAY, "report.html"} <= found
    assert not [path for path in found if Path(path).name.startswith(".") and not path.endswith(".lock")]


def test_run__moved_and_renamed_it_is_evaluated_the_same(tiny, later):
    """In another folder, with a space and umlauts in its name, and under python -O, which drops every assert: tables
    and scores are the same bytes."""
    assert later.moved.status == 0, later.moved.err
    before, after = files(tiny.run / "evaluation"), files(later.moved_run / "evaluation")
    del before["options.json"], after["options.json"]
    assert after == before


def test_run__every_json_file_is_one_that_other_programs_read(tiny):
    """No NaN and no Infinity, which JSON has not, in any file or line of a log."""
    def refuse(constant):
        raise ValueError(constant)

    texts = [path.read_text(encoding="utf-8") for path in tiny.run.rglob("*.json")]
    for path in tiny.run.rglob("*.jsonl"):
        texts += path.read_text(encoding="utf-8").splitlines()
    assert len(texts) > 20
    for text in texts:
        json.loads(text, parse_constant=refuse)


def test_run__scores_csv_opens_in_a_spreadsheet(tiny):
    """A head and rows of as many cells, in ASCII; series UIDs have two dots and more, so that none is taken for a
    number; the scores are probabilities."""
    data = (tiny.run / "evaluation" / "scores.csv").read_bytes()
    head, *rows = csv.reader(data.decode("ascii").splitlines())
    assert head[:6] == ["seriesuid", "x", "y", "z", "flip", "label"] and {len(row) for row in rows} == {len(head)}
    assert all(row[0].count(".") >= 2 for row in rows)
    assert all(0 <= float(cell) <= 1 for row in rows for cell in row[6:])


@pytest.mark.parametrize("script", SCRIPTS[:3])
def test_run__each_stage_says_its_preset_first(tiny, script):
    """The first line of a stage that has settings says which preset they follow."""
    assert tiny.command.out.split(f"$ python {script}")[1].splitlines()[1].startswith("Preset demo")


# What the numbers are


def read_scores(run):
    with open(run / "evaluation" / "scores.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_results__metrics_recompute_from_their_confusion(tiny):
    """Each metric in results.json is the ratio of its matrix' cells; null for 0/0."""
    tables = json.loads((tiny.run / "evaluation" / "results.json").read_bytes())["tables"]
    assert list(tables) == ["2", "3", "4", "5"]
    for table in tables.values():
        for column in ("flips", "nodules", "thesis"):
            tp, fp, fn, tn = (table[column]["confusion"][key] for key in ("tp", "fp", "fn", "tn"))
            ratios = ((tp, tp + fn), (tn, tn + fp), (tp, tp + fp), (2 * tp, 2 * tp + fp + fn))
            expected = [part / whole if whole else None for part, whole in ratios]
            assert [table[column]["metrics"][key]
                    for key in ("sensitivity", "specificity", "precision", "f1")] == expected


def test_results__scores_recompute_the_confusion(tiny):
    """The matrices of results.json are those counted from scores.csv, with flips and as nodules."""
    tables = json.loads((tiny.run / "evaluation" / "results.json").read_bytes())["tables"]
    for table in tables.values():
        lines = read_scores(tiny.run)
        labels, found = [int(line["label"]) for line in lines], [float(line[table["arm"]]) > 0.5 for line in lines]
        with_flips = confusion_matrix(labels, found)
        assert with_flips == Confusion(**table["flips"]["confusion"])
        once = with_flips._replace(tp=with_flips.tp / 8, fn=with_flips.fn / 8)
        assert once == Confusion(**table["nodules"]["confusion"])


def test_results__the_test_set_is_table_1s_and_no_training_patients(tiny):
    """scores.csv holds Table 1's test counts, of series of the test split alone; no patient is in two splits."""
    dataset = json.loads((tiny.run / "prepared" / "dataset.json").read_bytes())
    labels, row = [line["label"] for line in read_scores(tiny.run)], dataset["table_1"]["test"]
    assert (labels.count("1"), labels.count("0")) == (row["positive"], row["negative"])
    assert row["positive"] == 8 * row["nodules"]
    splits = {line["seriesuid"]: line["split"] for line in dataset["scans"]}
    assert {splits[line["seriesuid"]] for line in read_scores(tiny.run)} == {"test"}
    pairs = {(scan["patient"], scan["split"]) for scan in dataset["scans"]}
    assert len(pairs) == len({scan["patient"] for scan in dataset["scans"]})


def test_results__nodules_are_those_of_the_annotations(tiny):
    """Each positive centre is within half a voxel of an annotated nodule, in mm, axis by axis; and all are there."""
    with open(tiny.folder / "scans" / "annotations.csv", newline="") as file:
        annotated = [(row["seriesuid"], *(float(row[f"coord{axis}"]) for axis in "XYZ"))
                     for row in csv.DictReader(file)]
    scans = json.loads((tiny.run / "prepared" / "dataset.json").read_bytes())["scans"]
    found = [(scan["seriesuid"], *(np.array(scan["origin"]) + voxel[::-1])) for scan in scans
             for voxel in scan["positives"]]
    assert Counter(uid for uid, *_ in found) == Counter(uid for uid, *_ in annotated) and found
    for uid, *centre in found:
        assert any(uid == other and np.abs(np.subtract(centre, place)).max() <= 0.5 + 1e-9
                   for other, *place in annotated)


@pytest.mark.parametrize("folder", ["gan", *(f"classifiers/{arm}" for arm in ARMS)])
def test_logs__a_finite_row_an_epoch(tiny, folder):
    """Each log has a row for each epoch, in order, and every number in it is finite."""
    def numbers(value):
        return [n for v in value.values() for n in numbers(v)] if isinstance(value, dict) else [value]

    rows = [json.loads(line) for line in (tiny.run / folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert all(math.isfinite(number) for row in rows for number in numbers(row))


# The same seed, the same bytes


def test_twin__the_prepared_data_are_the_same_bytes(tiny, twin):
    """dataset.json, and every volume, picture and record beside it."""
    one, other = files(tiny.run / "prepared"), files(twin / "prepared")
    assert one.keys() == other.keys() and [name for name in one if one[name] != other[name]] == ["options.json"]


@pytest.mark.parametrize("folder", ["gan", *(f"classifiers/{arm}" for arm in ARMS)])
def test_twin__the_checkpoints_are_the_same_tensors(tiny, twin, folder):
    """Weights, optimizers, randomness and kept samples agree to the last bit."""
    one, other = (torch.load(run / folder / "checkpoint.pt", weights_only=True) for run in (tiny.run, twin))
    assert same_state(one, other)


@pytest.mark.parametrize("path", [path for path in STAY if not path.endswith(".pt")])
def test_twin__logs_and_results_are_the_same_bytes(tiny, twin, path):
    """Logs, scores and results agree byte by byte."""
    assert (tiny.run / path).read_bytes() == (twin / path).read_bytes()


def test_again__the_same_command_changes_nothing(tiny, twin, later):
    """A finished run's command trains nothing again: checkpoints, logs and results keep their bytes."""
    before, command, after = later.found, later.again, files(twin)
    assert command.status == 0 and before.keys() == after.keys() and not re.search("epochs|generated", command.err)
    assert re.search("epochs 3/3", tiny.command.err) and re.search("generated positives", tiny.command.err)
    assert {Path(path).name for path in before if before[path] != after[path]} <= {"options.json", "report.html"}


# What is refused


def test_changed_option__on_a_finished_run_is_refused_in_one_line(tiny, monkeypatch, run):
    """--width 2 on a run of width 1 is one line that names both and what to do; nothing is lost."""
    before = files(tiny.run)
    monkeypatch.chdir(tiny.folder)
    done = run(__import__("train_gan"), "--run", "R", *own_words("train_gan"), "--width", "2")
    assert in_one_line(done, "R/gan/checkpoint.pt", "width 1, not 2", "--overwrite") and files(tiny.run) == before


def test_changed_option__stops_the_whole_command_with_its_status(later):
    """Where a stage refuses, the command over all stages ends there, with status 2 and that one line."""
    done = later.changed
    assert in_one_line(done, "R/prepared/parameters.json", "cube 12, not 24") and "train_gan.py" not in done.out


def own_words(stage):
    """Those of the tiny run's options that a stage knows, but --run, the first."""
    return map(str, lungaug.command_words(lungaug.parse("", *lungaug.STAGES, words=WORDS), stage)[2:])


@pytest.mark.parametrize("stage, gone, first", [
    ("train_classifier", "prepared", "preprocessing.py"), ("train_classifier", "gan", "train_gan.py"),
    ("evaluate", "prepared", "preprocessing.py")])
def test_without_its_input__a_stage_says_what_to_run(copy, run, stage, gone, first):
    """A stage run too early, or without its input, names the missing file and the command that makes it."""
    shutil.rmtree(copy / gone)
    done = run(__import__(stage), "--run", copy)
    assert in_one_line(done, f"{copy}/{gone}", "not found", f"python {first}")


@pytest.mark.parametrize("gone, first", [
    ("gan", "train_gan.py"), ("classifiers", "train_classifier.py"), ("gan/options.json", "train_gan.py"),
    ("classifiers/options.json", "train_classifier.py")])
def test_without_its_input__evaluate_draws_what_there_is(copy, run, gone, first):
    """While a training runs, or before it, the figures that need none are drawn, and the page says what comes next."""
    (shutil.rmtree if (copy / gone).is_dir() else os.remove)(copy / gone)
    done = run(evaluate, "--run", copy)
    assert done.status == 0 and done.err == "" and f"python {first} --run {copy}" in done.out.splitlines()[-1]
    page = Page((copy / "report.html").read_text(encoding="utf-8"))
    assert f"Next: python {first} --run {copy}" in page.text
    assert "Figure 2." in page.text and "Table 2." not in page.text
    assert ("Figure 7." in page.text) == (gone != "gan") and ("Figure 8." in page.text) == (gone != "classifiers")


def test_without_its_input__report_of_one_stage_is_its_page(copy, run):
    """The page of a run of which only the scans are prepared shows Table 1 and says which command comes next."""
    for name in ("gan", "classifiers", "evaluation"):
        shutil.rmtree(copy / name)
    assert run(evaluate, "report", "--run", copy).status == 0
    page = Page((copy / "report.html").read_text(encoding="utf-8"))
    assert "Table 1." in page.text and "Next: python train_gan.py" in page.text and "Figure" not in page.text


def test_without_its_input__report_says_what_to_run(tmp_path, run):
    """A report of a run that is not there is one line."""
    done = run(evaluate, "report", "--run", tmp_path / "none")
    assert in_one_line(done, "none", "not found", "python lungaug.py")


READ_ONLY = {"mounted": errno.EROFS, "permitted": errno.EACCES}


def make_read_only(patch, folder, number):
    """Let nothing below a folder be made, renamed or removed, which root may do whatever its permissions are.

    number: EROFS, of a disk mounted read-only, where files that are there cannot be opened for writing, either.
    """
    def is_below(path):
        return folder in Path(path).absolute().parents

    def refuse(path):
        raise OSError(number, os.strerror(number), str(path))

    def guard(function):
        def guarded(path, *more, **named):
            # Of a rename the target may lie below, too.
            if any(isinstance(part, (str, Path)) and is_below(part) for part in (path, *more)):
                refuse(path)
            return function(path, *more, **named)
        return guarded

    def guarded_open(path, mode="r", *more, **named):
        is_written = set(mode) & set("wax+") and isinstance(path, (str, Path)) and is_below(path)
        if is_written and (number == errno.EROFS or not Path(path).exists()):
            refuse(path)
        return opened(path, mode, *more, **named)

    opened = open
    patch.setattr("builtins.open", guarded_open)
    patch.setattr("io.open", guarded_open)
    for name in ("mkdir", "replace", "rename", "unlink", "rmdir"):
        patch.setattr(os, name, guard(getattr(os, name)))


@pytest.mark.parametrize("why", READ_ONLY)
@pytest.mark.parametrize("stage, gone, more", [
    ("preprocessing", None, []), ("preprocessing", None, ["--overwrite"]), ("preprocessing", "prepared", []),
    ("train_gan", None, []), ("train_gan", None, ["--overwrite"]), ("train_gan", "gan", []),
    ("train_classifier", None, []), ("train_classifier", None, ["--overwrite"]),
    ("train_classifier", "classifiers", []), ("evaluate", None, []), ("evaluate", "evaluation", []),
    ("evaluate", None, ["report"])])
def test_read_only__is_one_line_and_changes_nothing(tiny, copy, monkeypatch, run, stage, gone, more, why):
    """A finished run that may only be read, or one that lacks a stage: the line names what could not be written."""
    if gone:
        shutil.rmtree(copy / gone)
    if stage == "preprocessing":
        more = [*more, "--scans", tiny.folder / "scans"]
    before = files(copy)
    with monkeypatch.context() as patch:
        make_read_only(patch, copy, READ_ONLY[why])
        done = run(__import__(stage), *more, "--run", copy, *own_words(stage))
    assert in_one_line(done, f"{copy}/", os.strerror(READ_ONLY[why]), "fix this")
    assert files(copy) == before


def test_read_only__a_run_that_cannot_be_made_is_one_line(tiny, monkeypatch, tmp_path, run):
    """Neither for the user's scans nor for synthetic ones, of which none is made."""
    with monkeypatch.context() as patch:
        make_read_only(patch, tmp_path, errno.EROFS)
        for words in (["--scans", tiny.folder / "scans"], []):
            done = run(preprocessing, "--run", tmp_path / "new", *words, *own_words("preprocessing"))
            assert in_one_line(done, f"{tmp_path}/new", os.strerror(errno.EROFS), "fix this")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path, stage", [
    ("prepared/dataset.json", "evaluate"), ("gan/checkpoint.pt", "train_gan"), ("gan/checkpoint.pt", "evaluate"),
    ("classifiers/real/checkpoint.pt", "train_classifier"), ("classifiers/real/checkpoint.pt", "evaluate"),
    ("classifiers/generated/generated.json", "train_classifier"), ("classifiers/generated/positive.npy", "evaluate")])
def test_damaged__a_file_cut_short_is_one_line_that_names_it(copy, run, path, stage):
    """A stage that finds its input cut short names the file."""
    data = (copy / path).read_bytes()
    (copy / path).write_bytes(data[:len(data) // 2])
    assert in_one_line(run(__import__(stage), "--run", copy, *own_words(stage)), path)


def test_stale__a_gan_trained_on_other_scans_is_refused(copy, run):
    """Where the data were prepared again, otherwise, a finished GAN is not passed off as trained on them."""
    path = copy / "prepared" / "dataset.json"
    dataset = json.loads(path.read_bytes())
    next(scan for scan in dataset["scans"] if scan["split"] == "train")["negatives"].pop()
    lungaug.write(path, dataset)
    done = run(__import__("train_gan"), "--run", copy, *own_words("train_gan"))
    assert in_one_line(done, "gan/checkpoint.pt")


def test_stale__cubes_of_other_scans_are_refused_and_left_alone(copy, run):
    """Where the data were prepared again with another cube, the classifiers' stage says so before it draws."""
    path = copy / "prepared" / "dataset.json"
    dataset = json.loads(path.read_bytes())
    dataset["parameters"]["cube"] = 24
    next(scan for scan in dataset["scans"] if scan["split"] == "train")["negatives"].pop()
    lungaug.write(path, dataset)
    before = files(copy)
    done = run(__import__("train_classifier"), "--run", copy, *own_words("train_classifier"))
    assert in_one_line(done, "generated.json", "prepared", "--overwrite") and files(copy) == before


def test_stale__overwriting_for_a_gan_of_other_scans_loses_nothing(copy, run):
    """Under --overwrite, too, the classifiers stay where the GAN is of other scans and none could be made again."""
    path = copy / "prepared" / "dataset.json"
    dataset = json.loads(path.read_bytes())
    next(scan for scan in dataset["scans"] if scan["split"] == "train")["negatives"].pop()
    lungaug.write(path, dataset)
    before = files(copy)
    done = run(__import__("train_classifier"), "--run", copy, "--overwrite", *own_words("train_classifier"))
    assert in_one_line(done, "gan/checkpoint.pt", "prepared", "--overwrite") and files(copy) == before


@pytest.mark.parametrize("log, row", [
    ("gan", '{"epoch": 1}'), ("gan", '{"epoch": 1, "critic": 5}'),
    ("classifiers/real", '{"epoch": 1, "train_loss": 1}'),
    ("gan", json.dumps({"epoch": 1, "generator": {"auxiliary": 1}, "critic": dict.fromkeys(
        ("wasserstein", "auxiliary", "penalty", "real_accuracy", "fake_accuracy"), float("inf"))}))])
def test_damaged__a_log_of_other_rows_is_one_line(copy, run, log, row):
    """A log whose rows are not those of a training, or hold no numbers, is named before a curve is drawn of it."""
    (copy / log / "log.jsonl").write_text(row + "\n")
    assert in_one_line(run(__import__("evaluate"), "--run", copy), log.split("/")[0], "log.jsonl", "--overwrite")


@pytest.mark.parametrize("row", ['{"epoch": 1}', '{"epoch": 1, "critic": 5}',
                                 '{"epoch": 1, "critic": {"wasserstein": "x"}}'])
def test_damaged__a_finished_trainings_log_of_other_rows_is_one_line(copy, run, row):
    """A training that has nothing left to do, but to tell of its log, names it where its rows tell nothing."""
    path = copy / "gan" / "log.jsonl"
    count = len(path.read_bytes().splitlines())
    path.write_text("".join(row.replace("1", str(n), 1) + "\n" for n in range(1, count + 1)))
    done = run(__import__("train_gan"), "--run", copy, *own_words("train_gan"))
    assert in_one_line(done, "log.jsonl", "--overwrite")


@pytest.mark.parametrize("cube", [12.0, "12", True, 13, None])
def test_damaged__a_cube_that_is_no_side_is_one_line(copy, run, cube):
    """12.0 and "12" are not 12: what is no whole number of the list is named before a cube is cut."""
    path = copy / "prepared" / "dataset.json"
    dataset = json.loads(path.read_bytes())
    dataset["parameters"]["cube"] = cube
    lungaug.write(path, dataset)
    assert in_one_line(run(__import__("evaluate"), "--run", copy), "dataset.json", "run preprocessing.py again")


@pytest.mark.parametrize("shape", [(2, 12, 12, 12, 12), (30, 30), (2, 6, 6, 6)])
@pytest.mark.parametrize("name", ["prepared/*", "classifiers/generated/positive"])
def test_damaged__an_array_of_another_shape_is_one_line(copy, run, name, shape):
    """Volumes have three axes and generated cubes their side; another array is named before it is used."""
    for path in copy.glob(f"{name}.npy"):
        lungaug.write(path, np.zeros(shape, np.int16))
    preprocessing.open_array.cache_clear()
    assert in_one_line(run(__import__("evaluate"), "--run", copy), ".npy", "made it again")


@pytest.mark.parametrize("stage, function, log", [("train_gan", "train_epoch", "gan/log.jsonl"),
                                                 ("train_classifier", "validate", "classifiers/real/log.jsonl")])
def test_overwrite__stopped_at_its_start_leaves_no_half_log(copy, monkeypatch, run, stage, function, log):
    """--overwrite, stopped in its first epoch, then the command without it: as many rows as epochs, or a line."""
    module = __import__(stage)

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, function, stop)
        assert run(module, "--run", copy, *own_words(stage), "--overwrite").status == 130
    done = run(module, "--run", copy, *own_words(stage))
    if done.status:
        assert in_one_line(done, "--overwrite")
    else:
        assert [row["epoch"] for row in lungaug.read_log(copy / log)] == [1, 2, 3]


def test_more_epochs__stopped_in_the_first_repeat_give_no_verdict(copy, monkeypatch, run):
    """A finished run, trained on and stopped when mixed has fewer epochs than longer: the stage is not finished."""
    module = __import__("train_classifier")
    words = ["--run", copy, *own_words("train_classifier"), "--epochs", "4"]
    train = module.train

    def stop_at_mixed(training, *more):
        if training.trainer.arm == "mixed":
            raise KeyboardInterrupt
        train(training, *more)

    with monkeypatch.context() as patch:
        patch.setattr(module, "train", stop_at_mixed)
        assert run(module, *words).status == 130
    done = run(evaluate, "--run", copy)
    assert done.status == 0 and "python train_classifier.py" in done.out.splitlines()[-1]

    assert run(module, *words).status == 0
    assert run(evaluate, "--run", copy).status == 0


def test_hostile_file_name__is_refused_in_one_line(tmp_path):
    """A scan whose file name is no UTF-8 is skipped with a reason, not by a traceback."""
    (tmp_path / os.fsdecode(b"\xff.mhd")).write_bytes(b"ObjectType = Image\n")
    source, = preprocessing.find_scans(tmp_path)
    parameters = {"cube": 12, "negatives": 3, "max_slice_mm": 9, "seed": 0}
    record = preprocessing.prepare_one(source, [], tmp_path, parameters)
    assert "ElementDataFile" in record["problem"] and preprocessing.reason_of(record).encode()


# The report


class Page(HTMLParser):
    """A page's elements (tag, attributes), its text, and whether tags close in the order they were opened."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.words, self.open = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.open += [] if tag in ("meta", "img", "input") else [tag]

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def only_its_own_script(text):
    """Whether a page has one script, ours, and forbids others."""
    return re.findall("<script.*?</script>", text, re.S) == [f"<script>{evaluate.SCRIPT}</script>"] and (
        f'http-equiv="Content-Security-Policy" content="{evaluate.POLICY}"' in text)


def test_report__needs_nothing_else(tiny):
    """No link out of the page, no source beside data in it, no script but its own; tags close in order."""
    text = (tiny.run / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert set(re.findall(r"https?://[^\"' <]*", text)) <= {"http://www.w3.org/2000/svg"}
    assert {"img", "svg", "table"} <= {tag for tag, _ in page.elements} and set(page.open) <= {"html", "body"}
    assert not {tag for tag, _ in page.elements} & {"link", "iframe", "object"}
    assert only_its_own_script(text)
    assert "@import" not in text and "url(" not in text
    for _, attributes in page.elements:
        assert attributes.get("src", "data:").startswith("data:")
        assert attributes.get("href", "#").startswith("#")
        assert not {"xlink:href", "onload"} & set(attributes)


@pytest.mark.parametrize("word", [*(f"Table {n}." for n in range(1, 6)),
                                  *(f"Figure {n}." for n in (2, 3, 7, 8, *range(9, 15)))])
def test_report__has_every_table_and_figure_once(tiny, word):
    """Tables 1–5 and figures 2, 3, 7, 8 and 9–14 are on the page, each once, under their captions."""
    assert Page((tiny.run / "report.html").read_text(encoding="utf-8")).text.count(word) == 1


def test_report__no_picture_is_missing(tiny):
    """Every figure of a whole run is drawn, and every PNG in it is one."""
    text = (tiny.run / "report.html").read_text(encoding="utf-8")
    assert "Not made in this run" not in text and len(re.findall("<figure", text)) >= 10
    assert all(data.startswith("iVBORw0KGgo") for data in re.findall("base64,([^\"]*)", text)) and "base64," in text


def test_report__shows_the_results_own_numbers(tiny):
    """Tables 2–5 on the page hold the cells of results.json, ours and the thesis'."""
    tables = json.loads((tiny.run / "evaluation" / "results.json").read_bytes())["tables"]
    rows = re.findall("<tr[^>]*>(.*?)</tr>", (tiny.run / "report.html").read_text(encoding="utf-8"))
    cells = [[html.unescape(cell) for cell in re.findall("<td>(.*?)</td>", row)] for row in rows]
    for table in tables.values():
        for key in ("tp", "fp", "fn", "tn"):
            counts = [table[column]["confusion"][key] for column in ("flips", "nodules", "thesis")]
            assert [key.upper(), *(f"{count:,.1f}".removesuffix(".0") for count in counts)] in cells
        for key in ("sensitivity", "specificity", "precision", "f1"):
            values = [table[column]["metrics"][key] for column in ("flips", "nodules", "thesis")]
            assert [key.replace("f1", "F1"), *("–" if value is None else f"{value:.3f}" for value in values)] in cells


def test_report__is_drawn_again_by_its_command(tiny, later):
    """`lungaug.py report --run R` draws the same page from what the stages left, and says where it is."""
    done, page = later.report, later.drawn_run / "report.html"
    assert done.status == 0 and done.out.splitlines()[-1] == str(page)
    assert page.read_bytes() == (tiny.run / "report.html").read_bytes()


def test_report__what_a_file_says_of_itself_is_escaped(copy, monkeypatch, run):
    """A series UID and a reason with mark-up, from a hostile file, are text on the page, whichever stage shows them."""
    hostile, path = "<script>alert(1)</script>\"'&", copy / "prepared" / "dataset.json"
    dataset = json.loads(path.read_bytes())
    made_from = lungaug.fingerprint(dataset["scans"])
    monkeypatch.setattr(lungaug, "fingerprint", lambda scans: made_from)    # as if all had been trained on these
    for scan in dataset["scans"]:
        scan["seriesuid"] = scan["patient"] = hostile
    dataset["skipped"] = [{"seriesuid": hostile, "path": hostile, "problem": hostile, "remedy": hostile}]
    lungaug.write(path, dataset)
    items = [*preprocessing.page(preprocessing.open_dataset(copy)), lungaug.Text(hostile)]
    lungaug.save_page(copy / "prepared", SimpleNamespace(), items)
    assert run(evaluate, "--run", copy).status == 0
    text = (copy / "report.html").read_text(encoding="utf-8")
    assert only_its_own_script(text) and Page(text).text.count(hostile) >= 3


def test_readme__its_lines_of_python_draw_eight_nodules(tiny, tmp_path, monkeypatch):
    """README's example loads the GAN of runs/demo and draws eight cubes of it side by side."""
    code = re.search("```python\n(.*?)```", (HERE / "README.md").read_text(encoding="utf-8"), re.S)[1]
    shutil.copytree(tiny.run, tmp_path / "runs" / "demo")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    assert names["cubes"].shape == (8, 12, 12, 12) and np.abs(names["cubes"]).max() <= 1
    assert (tmp_path / "nodules.png").read_bytes().startswith(b"\x89PNG")
