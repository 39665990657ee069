"""--split as a user types it: cubes, whose test set leaks, and LUNA16's folders; what changes with it and what stays.

    python -m pytest tests/test_split.py -v

How patients, cubes and folders are divided is test_preprocessing.py's subject.
"""

import json
import shutil

import lungaug

import numpy as np
import pytest

import evaluate
import preprocessing
import train_classifier
import train_gan
from helpers import CPU, in_one_line, run_main, write_chests
from models import Classifier, Generator


WORDS = ("--cube", "6", "--negatives", "20", "--workers", "1", "--max-slice-mm", "4", "--preset", "demo")


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """Four small scans in subset0, subset1, subset7 and, unpacked into itself, subset9."""
    folder = tmp_path_factory.mktemp("scans") / "LUNA16"
    return write_chests(folder, range(4), ["subset0", "subset1", "subset7", "subset9/subset9"])


def prepare(run, scans, folder, *words):
    """Prepare scans in a run. Returns what the command said, and dataset.json."""
    done = run(preprocessing, "--scans", scans, "--run", folder, *WORDS, *words)
    assert done.status == 0, done.err
    return done.out, json.loads((folder / "prepared" / "dataset.json").read_bytes())


@pytest.fixture(scope="module")
def once(scans, tmp_path_factory):
    """--split → a run whose scans are divided so, not to be changed, and what the command said."""
    folder = tmp_path_factory.mktemp("once")
    words = ("--scans", scans, *WORDS, "--run")
    runs = {"patient": (folder / "patient", run_main(preprocessing, *words, folder / "patient"))}

    # Another split takes the same volumes.
    for split in ("cube", "subsets"):
        place = shutil.copytree(folder / "patient", folder / split)
        runs[split] = (place, run_main(preprocessing, *words, place, "--split", split, "--overwrite"))

    for _, done in runs.values():
        assert done.status == 0, done.err
    return runs


@pytest.fixture
def divided(once, tmp_path):
    """divided(split) makes tmp_path a run whose scans are divided so, to be changed: what the command said, and
    dataset.json."""
    def begin(split):
        place, done = once[split]
        shutil.copytree(place, tmp_path, dirs_exist_ok=True)
        return done.out, json.loads((tmp_path / "prepared" / "dataset.json").read_bytes())
    return begin


def volumes(folder):
    """When each volume and picture was written."""
    paths = [*(folder / "prepared").glob("*.npy"), *(folder / "prepared").glob("*.png")]
    return {path.name: path.stat().st_mtime_ns for path in paths}


def nodules(dataset, split):
    return set(map(tuple, dataset.positives[split].tolist()))


def test_split_patient__is_the_default_and_no_nodule_is_on_two_sides(divided, tmp_path):
    """dataset.json says so; each nodule is in one split with its eight flips, and nothing warns of a leak."""
    out, info = divided("patient")
    dataset = preprocessing.open_dataset(tmp_path)
    assert info["parameters"]["split"] == "patient"
    assert "leak" not in out
    assert not nodules(dataset, "train") & nodules(dataset, "test")
    for split, row in info["table_1"].items():
        rows, _ = preprocessing.positives_with_flips(dataset, split)
        assert len(rows) == row["positive"] == 8 * row["nodules"]


def test_split_cube__one_nodule_is_on_two_sides_and_a_line_says_so(divided, tmp_path):
    """16 nodules are 128 cubes: 89, 13 and 26. The command and the page say that the test set leaks."""
    out, info = divided("cube")
    dataset = preprocessing.open_dataset(tmp_path)
    both = nodules(dataset, "train") & nodules(dataset, "test")
    assert both
    assert [row["positive"] for row in info["table_1"].values()] == [89, 13, 26]
    assert [row["negative"] for row in info["table_1"].values()] == [56, 7, 17]

    line = (f"--split cube: the test set leaks. Of its {len(dataset.positives['test'])} nodules, {len(both)} are in "
            "the training set, too, in other flips: the results say nothing of new patients.")
    assert f"warning: {line}\n" in out
    page = json.loads((tmp_path / "prepared" / "options.json").read_bytes())["page"]
    assert {"kind": "text", "text": line} in page


def test_split_cube__the_gan_is_trained_on_the_training_cubes_alone(divided, tmp_path, monkeypatch):
    """2.1.5: of 200 batches every positive is a flip in the training set, none is one in the test set."""
    divided("cube")
    dataset = preprocessing.open_dataset(tmp_path)
    drawn = set()

    def keep(dataset, rows, flips):
        drawn.update((*row, flip) for row, flip in zip(rows.tolist(), flips.tolist()))

    monkeypatch.setattr(preprocessing, "read_cubes", keep)
    for seed in range(200):
        train_gan.draw_batch(dataset, 16, np.random.default_rng(seed))

    of_split = {}
    for split in preprocessing.SPLITS:
        rows, flips, _ = preprocessing.labelled(dataset, split)
        of_split[split] = {(*row, flip) for row, flip in zip(rows.tolist(), flips.tolist())}
    assert drawn == of_split["train"]
    assert not drawn & of_split["test"]


def test_split_cube__a_training_set_of_the_other_split_is_not_its_own(once):
    """The same scans split otherwise are other data: a GAN's checkpoint would be refused."""
    prints = {preprocessing.open_dataset(place).fingerprint for place, _ in once.values()}
    assert len(prints) == 3


def test_split_cube__goes_through_every_stage(divided, run, tmp_path):
    """A GAN, three classifiers and the tables: the test set's positives are the flips that lie in it."""
    _, info = divided("cube")
    words = ("--run", tmp_path, "--epochs", "2", "--batch-size", "8")
    assert run(train_gan, *words, "--width", "1").status == 0
    accept_all = ("--class-probability", "0", "--score-quantile", "0")
    assert run(train_classifier, *words, *accept_all, "--repeats", "1").status == 0
    done = run(evaluate, "--run", tmp_path)
    assert done.status == 0, done.err

    table = json.loads((tmp_path / "evaluation" / "results.json").read_bytes())["tables"]["2"]
    confusion = table["flips"]["confusion"]
    assert confusion["tp"] + confusion["fn"] == info["table_1"]["test"]["positive"] == 26
    assert confusion["fp"] + confusion["tn"] == info["table_1"]["test"]["negative"] == 17
    assert (tmp_path / "report.html").read_text(encoding="utf-8").count("the test set leaks") == 1


@pytest.mark.parametrize("n_unflipped", [0, 1])
def test_assess_class__of_a_cube_split_that_left_no_nodule_unflipped(divided, tmp_path, n_unflipped):
    """Each nodule is in the training set, but in other flips: generated cubes are held against one of those."""
    divided("cube")
    dataset = preprocessing.open_dataset(tmp_path)
    flips = dataset.flips["train"]
    flips[n_unflipped:, 0] = False
    flips[:, 1] = True
    empty = np.zeros((0, 6, 6, 6), np.int16)
    lungaug.write(tmp_path / "classifiers" / "generated" / "positive.npy", empty)

    networks = Generator(6, 1).eval(), Classifier(6).eval()
    found = evaluate.assess_class(1, tmp_path, dataset, *networks, 0, CPU)
    copies = found.qualities["copies of training cubes"]
    drawn = evaluate.one_flip_each(dataset, "train", 0)
    assert flips[np.arange(len(flips)), drawn].all()
    assert copies.n == len(flips) and copies.copy_ratio == 0


@pytest.mark.parametrize("split", preprocessing.SPLITS)
def test_open_dataset__a_split_without_cubes_is_one_line(divided, run, tmp_path, split):
    """Told before the GAN is trained, which takes no cubes but those to train on; its scans can be looked at."""
    _, info = divided("patient")
    for scan in info["scans"]:
        if scan["split"] == split:
            scan.update(positives=[], negatives=[])
    lungaug.write(tmp_path / "prepared" / "dataset.json", info)
    assert in_one_line(run(train_gan, "--run", tmp_path), "dataset.json", split, "give more scans, or another --seed")
    assert len(preprocessing.open_dataset(tmp_path, to_train=False).info["scans"]) == 4


def test_draw_novelty__of_a_cube_split_takes_held_out_cubes_that_are_not_in_training(divided, tmp_path):
    """A held-out cube is a flip that lies in the test set: it is not at distance 0 from the training set."""
    divided("cube")
    dataset = preprocessing.open_dataset(tmp_path)
    empty = np.zeros((0, 6, 6, 6), np.int16)
    folder = tmp_path / "classifiers" / "generated"
    for name in ("positive", "positive_rejected"):
        lungaug.write(folder / f"{name}.npy", empty)
    distances = evaluate.draw_novelty(tmp_path / "evaluation", tmp_path, dataset)["held_out_distances"]
    assert len(distances) == 6
    assert min(distances) > 0


def test_split_subsets__by_folder_at_any_depth(divided, tmp_path):
    """subset0 and subset1 train, subset7 validates, subset9 within subset9 tests."""
    _, info = divided("subsets")
    assert [scan["split"] for scan in info["scans"]] == ["train", "train", "validation", "test"]
    assert info["parameters"]["split"] == "subsets"


def test_split_subsets__a_usable_scan_elsewhere_is_refused(run, tmp_path):
    """One line names its file; what was prepared serves another --split."""
    scans = write_chests(tmp_path / "scans", range(4), ["subset0", "elsewhere", "subset7", "subset9"])
    words = ("--scans", scans, "--run", tmp_path / "R", *WORDS)
    done = run(preprocessing, *words, "--split", "subsets")
    *_, line = done.err.splitlines()
    assert done.status == 2
    assert line == (f"lungaug: {scans}/elsewhere/1.2.1.mhd: lies in no folder subset0 … subset9 — "
                    "give LUNA16's ten folders, or --split patient")
    before = volumes(tmp_path / "R")
    assert run(preprocessing, *words, "--overwrite").status == 0
    assert volumes(tmp_path / "R") == before


def test_split_subsets__a_scan_that_cannot_be_used_may_lie_anywhere(run, tmp_path):
    """A truncated file outside the folders is skipped, as ever."""
    scans = write_chests(tmp_path / "scans", range(4), ["subset0", "elsewhere", "subset7", "subset9"])
    (scans / "elsewhere" / "1.2.1.raw").write_bytes(bytes(100))
    _, info = prepare(run, scans, tmp_path / "R", "--split", "subsets")
    assert [scan["split"] for scan in info["scans"]] == ["train", "validation", "test"]
    assert len(info["skipped"]) == 1


def test_split_subsets__a_missing_folder_is_told_before_anything_is_prepared(run, tmp_path):
    """One line names the folder and the split; no volume has been written."""
    scans = write_chests(tmp_path / "scans", range(3), ["subset0", "subset1", "subset9"])
    done = run(preprocessing, "--scans", scans, "--run", tmp_path / "R", *WORDS, "--split", "subsets")
    assert in_one_line(done, "no usable scan in subset7: the validation set would be empty", "--split patient")
    assert not (tmp_path / "R").exists()


def test_split_subsets__a_folder_without_a_usable_scan_is_refused(run, tmp_path):
    """The only scan of subset7 is truncated."""
    scans = write_chests(tmp_path / "scans", range(3), ["subset0", "subset7", "subset9"])
    (scans / "subset7" / "1.2.1.raw").write_bytes(bytes(100))
    done = run(preprocessing, "--scans", scans, "--run", tmp_path / "R", *WORDS, "--split", "subsets")
    *_, line = done.err.splitlines()
    assert done.status == 2
    assert "no usable scan in subset7" in line


def test_split__another_one_keeps_every_volume(scans, run, tmp_path):
    """It needs --overwrite, as training data change, but no scan is read again; then it is the run of a new folder."""
    expected = {}
    for split in ("cube", "subsets"):
        _, expected[split] = prepare(run, scans, tmp_path / split, "--split", split)
    _, expected["patient"] = prepare(run, scans, tmp_path / "R")

    before = volumes(tmp_path / "R")
    for split in ("cube", "subsets", "patient"):
        done = run(preprocessing, "--scans", scans, "--run", tmp_path / "R", *WORDS, "--split", split)
        assert in_one_line(done, f"not {split}", "--overwrite")
        _, info = prepare(run, scans, tmp_path / "R", "--split", split, "--overwrite")
        assert volumes(tmp_path / "R") == before
        assert info == expected[split]


def test_split__overwrite_with_the_same_one_prepares_again(scans, run, tmp_path):
    """--overwrite alone discards the records, as ever."""
    prepare(run, scans, tmp_path)
    before = volumes(tmp_path)
    prepare(run, scans, tmp_path, "--overwrite")
    assert all(volumes(tmp_path)[name] > written for name, written in before.items())
