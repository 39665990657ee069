"""Preparing scans again, in parts, at the same time or otherwise; scans that are no chest's, rows that are no scan's.

    python -m pytest tests/test_restart.py -v

preprocessing.py is run as a user would, in this process where that does: its status, what it says, what it leaves.
"""

import json
import re
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import lungaug
from lungaug import Refusal

import numpy as np
import pydicom
import pytest

import evaluate
import phantom
import preprocessing
import scan_files
import train_classifier
import train_gan
from helpers import at_once, early, ellipse, in_one_line, run_main, run_python, small_chest, write_mixed_chests


WORDS = ("--cube", "12", "--negatives", "20", "--workers", "1", "--max-slice-mm", "20")
PARAMETERS = {"cube": 12, "negatives": 20, "max_slice_mm": 20, "seed": 0}


def prepared(run):
    """The bytes of what preprocessing leaves for the other stages and for people, less its own options and times."""
    files = (path for path in (run / "prepared").iterdir() if not path.name.startswith("."))
    return {path.name: path.read_bytes() for path in files if path.name not in ("options.json", "parameters.json")}


def info(run):
    return json.loads((run / "prepared" / "dataset.json").read_bytes())


@pytest.fixture(scope="module")
def scans(chests):
    """A folder of four small scans of three patients: two MetaImage, two DICOM."""
    return chests


@pytest.fixture(scope="module")
def once(scans, tmp_path_factory):
    """A run in which they were prepared once, at one go."""
    folder = tmp_path_factory.mktemp("once") / "R"
    done = run_main(preprocessing, "--scans", scans, "--run", folder, *WORDS)
    assert done.status == 0, done.err
    return folder


@pytest.fixture
def again(once, tmp_path):
    """A copy of that run, to be changed."""
    return Path(shutil.copytree(once, tmp_path / "R"))


SPAWNED = """
import multiprocessing, sys
if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    sys.path.insert(0, sys.argv.pop(1))
    import lungaug, preprocessing
    lungaug.command(preprocessing.main)
"""


@early
def processes(folder):
    """Two commands in processes of their own: .spawned, whose workers are started anew, and .part, lungaug.py over all
    stages with half of the scans; each with its run and what it said. .scans: those that they prepare."""
    (folder / "spawned.py").write_text(SPAWNED)
    scans = folder / "scans"
    scans.mkdir()
    words = ["--scans", write_mixed_chests(scans), *WORDS, "--run"]
    spawned, part = at_once(
        lambda: run_python(folder / "spawned.py", lungaug.HERE, *words, folder / "spawned", "--workers", 2),
        lambda: run_python(lungaug.__file__, *words, folder / "part", "--preset", "demo", "--part", "1/2"))
    return SimpleNamespace(scans=scans, spawned=(folder / "spawned", spawned), part=(folder / "part", part))


def test_workers__spawned_as_on_windows_and_macos(processes, run, tmp_path):
    """Windows and macOS start workers anew, Linux copies the process: the same bytes, as without workers."""
    folder, done = processes.spawned
    assert done.status == 0, done.err
    assert run(preprocessing, "--scans", processes.scans, "--run", tmp_path / "R", *WORDS).status == 0
    assert prepared(folder) == prepared(tmp_path / "R")


# Again

def test_alone__a_second_preparation_of_the_same_part_is_refused(scans, again, run):
    """While one process is at a part, the same command is one line and touches nothing; later it works."""
    before = prepared(again)
    (again / "prepared" / "dataset.json").unlink()
    with lungaug.lock(again / "prepared", "preparing part 1 of 1"):
        done = run(preprocessing, "--scans", scans, "--run", again, *WORDS)
        assert in_one_line(done, "prepared", "another process", "part 1 of 1")
        assert not (again / "prepared" / "dataset.json").exists()
    assert run(preprocessing, "--scans", scans, "--run", again, *WORDS).status == 0 and prepared(again) == before


@pytest.mark.parametrize("stage, folder", [(train_gan, "gan"), (train_classifier, "classifiers")])
def test_alone__a_second_training_is_refused(again, run, stage, folder):
    """Two trainings in one run would write into one log: the second is one line."""
    with lungaug.lock(again / folder, "training"):
        assert in_one_line(run(stage, "--run", again), folder, "another process")


@pytest.mark.parametrize("option, value, says", [
    ("--seed", "1", "seed 0, not 1"), ("--negatives", "10", "negatives 20, not 10"),
    ("--split", "cube", "split patient, not cube"),
    ("--max-slice-mm", "10", "max_slice_mm 20.0, not 10.0")])
def test_claim__a_changed_parameter_is_refused_and_overwrite_is_named(scans, again, run, option, value, says):
    """Another --seed, --negatives or --split, a lower --max-slice-mm: one line with both values and the way out."""
    before = prepared(again)
    assert in_one_line(run(preprocessing, "--scans", scans, "--run", again, *WORDS, option, value), says, "--overwrite")
    assert prepared(again) == before


@pytest.fixture
def uneven(scans, tmp_path):
    """The four scans and one with every second slice, 8 mm apart."""
    folder = Path(shutil.copytree(scans, tmp_path / "uneven"))
    chest = small_chest(4)
    scan_files.write_metaimage(folder, chest._replace(hu=chest.hu[::2], spacing=(4, 4, 8)))
    return folder


def test_claim__a_higher_slice_limit_prepares_what_was_skipped(uneven, run, tmp_path, monkeypatch):
    """--max-slice-mm from 5 to 9: the scan of 8 mm alone is read, and the end is that of 9 from the start. Lowered
    again it is refused."""
    words = [*("--scans", uneven), *WORDS[:-1]]
    assert run(preprocessing, "--run", tmp_path / "R", *words, 5).status == 0
    assert len(info(tmp_path / "R")["skipped"]) == 1
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "R/prepared").glob("*.npy")}

    done = run(preprocessing, "--run", tmp_path / "R", *words, 9)
    assert done.status == 0 and len(info(tmp_path / "R")["scans"]) == 5
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert run(preprocessing, "--run", tmp_path / "new", *words, 9).status == 0
    assert prepared(tmp_path / "R") == prepared(tmp_path / "new")
    assert in_one_line(run(preprocessing, "--run", tmp_path / "R", *words, 5), "max_slice_mm 9.0, not 5.0")


def test_claim__a_raise_that_was_stopped_keeps_what_was_used(uneven, run, tmp_path, monkeypatch):
    """The limit raised to 7, stopped before any scan, then to 9: the volumes of 5 are not written again."""
    words = [*("--scans", uneven), "--run", tmp_path / "R", *WORDS[:-1]]
    assert run(preprocessing, *words, 5).status == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "R/prepared").glob("*.npy")}
    with monkeypatch.context() as patch:
        patch.setattr(preprocessing, "prepare", interrupt)
        assert run(preprocessing, *words, 7).status == 130
    assert run(preprocessing, *words, 9).status == 0 and len(info(tmp_path / "R")["scans"]) == 5
    assert before == {path: path.stat().st_mtime_ns for path in before}


def interrupt(*arguments):
    raise KeyboardInterrupt


def test_claim__a_part_whose_options_another_part_changed_says_so(uneven, run, tmp_path, monkeypatch):
    """While part 2 of 2 is prepared under a limit of 5, part 1 raises it to 9: part 2 says so, and does not end as if
    all were well; run again with 9, it completes the run."""
    words = [*("--scans", uneven), "--run", tmp_path / "R", *WORDS[:-1]]
    prepare = preprocessing.prepare

    def prepare_and_be_overtaken(*arguments):
        prepare(*arguments)
        monkeypatch.setattr(preprocessing, "prepare", prepare)
        run(preprocessing, *words, 9, "--part", "1/2")

    monkeypatch.setattr(preprocessing, "prepare", prepare_and_be_overtaken)
    done = run(preprocessing, *words, 5, "--part", "2/2")
    *_, line = done.err.splitlines()
    assert done.status == 2 and "max_slice_mm 9.0, not 5.0" in line and "another part changed it" in line
    assert run(preprocessing, *words, 9, "--part", "2/2").status == 0
    assert len(info(tmp_path / "R")["scans"]) == 5


def test_part__the_other_stages_wait_for_the_other_parts(processes):
    """python lungaug.py --part 1/2 prepares its part and stops; it does not train, and makes no synthetic scans."""
    folder, done = processes.part
    assert done.status == 0 and "once every part is prepared" in done.out
    assert "train_gan" not in done.out and not (folder / "scans").exists()


def test_claim__a_higher_slice_limit_waits_for_a_training(uneven, run, tmp_path):
    """A training that runs reads the volumes: the new limit is refused, in one line, and nothing changes."""
    words = [*("--scans", uneven), "--run", tmp_path / "R", *WORDS[:-1]]
    assert run(preprocessing, *words, 5).status == 0
    before = prepared(tmp_path / "R")
    with lungaug.lock(tmp_path / "R" / "gan", "training"):
        assert in_one_line(run(preprocessing, *words, 9), "another process is already training")
    assert prepared(tmp_path / "R") == before


def test_claim__overwrite_makes_the_run_that_a_new_folder_would_hold(scans, again, run, tmp_path):
    """--overwrite with --negatives 10 leaves what these options leave in an empty folder, and it stays so."""
    words = ("--scans", scans, *WORDS, "--negatives", "10")
    assert run(preprocessing, "--run", again, *words, "--overwrite").status == 0
    assert run(preprocessing, "--run", tmp_path / "new", *words).status == 0
    assert prepared(again) == prepared(tmp_path / "new")
    assert {len(scan["negatives"]) for scan in info(again)["scans"]} == {10}
    assert run(preprocessing, "--run", again, *words).status == 0
    assert in_one_line(run(preprocessing, "--scans", scans, "--run", again, *WORDS), "negatives 10, not 20")


def test_claim__half_an_overwrite_does_not_pass_for_prepared(scans, again, run):
    """With one of two parts prepared again for other cubes, the old dataset.json does not lead to the new volumes."""
    words = ("--scans", scans, "--run", again, *WORDS, "--cube", "24", "--overwrite")
    assert run(preprocessing, *words, "--part", "1/2").status == 0
    try:
        dataset = preprocessing.open_dataset(again)
    except Refusal:
        return
    preprocessing.open_array.cache_clear()
    assert all(preprocessing.is_whole(scan, dataset.folder) for scan in dataset.info["scans"])


def test_claim__an_overwrite_that_was_stopped_does_not_keep_the_old(scans, again, run, monkeypatch):
    """Stopped before its first scan, it has left no record that a run without --overwrite would take for done."""
    words = ("--scans", scans, "--run", again, *WORDS)
    monkeypatch.setattr(preprocessing, "prepare", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(preprocessing, *words, "--overwrite")
    assert not list((again / "prepared").glob("1.*.json"))


def test_scans__what_is_no_folder_is_one_line(run, tmp_path):
    """A folder's name mistyped is said to be none."""
    done = run(preprocessing, "--scans", tmp_path / "typo", "--run", tmp_path / "R")
    assert in_one_line(done, "typo", "not a folder", "--scans")


@pytest.mark.parametrize("words", [[], ["--overwrite"]])
def test_preprocessing__without_scans_takes_no_synthetic_ones_for_the_users(run, again, words):
    """Where --scans was forgotten nothing is made and nothing lost; train_gan.py, which calls it, stops there too."""
    before = sorted(path.name for path in again.rglob("*"))
    assert in_one_line(run(preprocessing, "--run", again, *words), "parameters.json", "your scans", "--scans")
    assert before == sorted(path.name for path in again.rglob("*"))


def test_train_gan__does_not_begin_on_half_of_the_scans(run, again):
    """Where preparing the user's scans was not finished, training ends with preprocessing's refusal."""
    (again / "prepared" / "dataset.json").unlink()
    before = sorted(path.name for path in again.rglob("*"))
    assert run(train_gan, "--run", again).status == 2
    assert before == sorted(path.name for path in again.rglob("*"))


def test_preprocessing__a_damaged_record_of_its_parameters_is_overwritten(run, scans, again):
    """With the scans and --overwrite, a parameters.json that does not read is no obstacle."""
    before = prepared(again)
    (again / "prepared" / "parameters.json").write_text("{")
    done = run(preprocessing, "--scans", scans, "--run", again, *WORDS, "--overwrite")
    assert done.status == 0 and prepared(again) == before


def test_preprocessing__a_device_that_is_not_there_is_told_of_first(run, tmp_path):
    """Before hours of preparing, not after."""
    assert in_one_line(run(preprocessing, "--run", tmp_path / "R", "--device", "nonsense"), "--device nonsense")
    assert not (tmp_path / "R").exists()


def test_preprocessing__a_run_that_is_a_file_is_one_line(run, tmp_path):
    """Before a synthetic scan is made."""
    (tmp_path / "a.txt").write_text("x")
    assert in_one_line(run(preprocessing, "--run", tmp_path / "a.txt"), "a.txt", "File exists")


def test_train_gan__goes_on_with_half_of_the_synthetic_scans(run, tmp_path, monkeypatch):
    """Stopped while it prepared the synthetic scans, the same command prepares the rest of them first."""
    lungaug.write(tmp_path / "prepared" / "parameters.json", {"scans": "synthetic"})
    commands = []
    monkeypatch.setattr(lungaug, "run_script", lambda *words: commands.append(words[0]))
    assert in_one_line(run(train_gan, "--run", tmp_path), "dataset.json") and commands == ["preprocessing.py"]


SPOILT = {"cut short": lambda data: data[:-1000], "cut in its head": lambda data: data[:70], "empty": lambda data: b"",
          "a bit in a voxel": lambda data: data[:-999] + bytes([data[-999] ^ 4]) + data[-998:],
          "a bit in its head": lambda data: data[:9] + bytes([data[9] ^ 128]) + data[10:],
          "longer": lambda data: data + b"x"}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT.keys())
def test_prepare_one__a_damaged_volume_is_made_again(scans, once, again, run, spoil):
    """A volume cut short, or with a bit flipped, is found and comes back as it was; the others are not touched."""
    path, *others = sorted((again / "prepared").glob("*.npy"))
    path.write_bytes(spoil(path.read_bytes()))
    times = [other.stat().st_mtime_ns for other in others]
    assert run(preprocessing, "--scans", scans, "--run", again, *WORDS).status == 0
    assert np.array_equal(np.load(path), np.load(once / "prepared" / path.name))
    assert times == [other.stat().st_mtime_ns for other in others]
    assert {name: data for name, data in prepared(again).items() if name != path.name} == \
        {name: data for name, data in prepared(once).items() if name != path.name}


def test_prepare_one__a_record_that_was_changed_is_made_again(scans, once, again, run):
    """A digit that turned in a positive's place is found, and comes back."""
    path = again / "prepared" / f"{info(again)['scans'][0]['seriesuid']}.json"
    record = json.loads(path.read_bytes())
    record["positives"][0][0] += 1
    path.write_text(json.dumps(record, indent=1) + "\n")
    assert run(preprocessing, "--scans", scans, "--run", again, *WORDS).status == 0
    assert prepared(again) == prepared(once)


@pytest.mark.parametrize("order", [(1, 2), (2, 1)])
def test_part__two_parts_leave_the_bytes_of_one_run(scans, once, run, tmp_path, order):
    """--part 1/2 and 2/2, whichever comes first, leave what one run leaves; the first says what is missing."""
    words = ("--scans", scans, "--run", tmp_path / "R", *WORDS)
    first, second = (run(preprocessing, *words, "--part", f"{part}/2") for part in order)
    assert (first.status, second.status) == (0, 0) and "2 scans belong to other parts" in first.out
    assert prepared(tmp_path / "R") == prepared(once)


def test_writing__leftovers_of_a_kill_do_no_harm(scans, once, again, run):
    """Half a file under the hidden name that a kill leaves it: the run ends with the same bytes."""
    for name in (".dataset.json.4242", f".{info(again)['scans'][0]['volume']}.4242"):
        (again / "prepared" / name).write_bytes(b"{")
    (again / "prepared" / "dataset.json").unlink()
    assert run(preprocessing, "--scans", scans, "--run", again, *WORDS).status == 0
    assert prepared(again) == prepared(once)


# What is left out

def change(folder, scans, text):
    """A copy of the scans' annotations with these lines behind it, or in place of it where they begin with its head."""
    table = (scans / "annotations.csv").read_text(encoding="utf-8")
    (folder / "a.csv").write_text(text if text.startswith("seriesuid") else table + text)
    return folder / "a.csv"


def test_read_annotations__rows_of_unknown_series_change_nothing(scans, once, run, tmp_path):
    """LUNA16's one table is of ten subsets: rows of scans that are not there are passed over."""
    table = change(tmp_path, scans, "1.2.99,1,2,3,4\n")
    assert run(preprocessing, "--scans", scans, "--annotations", table, "--run", tmp_path / "R", *WORDS).status == 0
    assert info(tmp_path / "R")["scans"] == info(once)["scans"]


def test_read_annotations__unknown_series_alone_are_refused(scans, run, tmp_path):
    """Where no row is of any scan there are no positives to train on: it is said before any scan is prepared."""
    table = change(tmp_path, scans, "seriesuid,coordX,coordY,coordZ,diameter_mm\n1.2.99,1,2,3,4\n")
    done = run(preprocessing, "--scans", scans, "--annotations", table, "--run", tmp_path / "R", *WORDS)
    assert in_one_line(done, "none of the scans' series is in it") and not (tmp_path / "R").exists()


def test_read_annotations__a_scan_with_a_nodule_outside_is_skipped(scans, run, tmp_path):
    """A row with x and z exchanged lies in no scan: it is skipped, its reason in dataset.json and in the output."""
    table = change(tmp_path, scans, "1.2.0,1,2,9000,4\n")
    done = run(preprocessing, "--scans", scans, "--annotations", table, "--run", tmp_path / "R", *WORDS)
    row, = info(tmp_path / "R")["skipped"]
    assert done.status == 0 and row["seriesuid"] == "1.2.0" and "outside" in row["problem"] and "9000" in row["problem"]
    number = table.read_text().splitlines().index("1.2.0,1,2,9000,4") + 1
    assert row["path"] == f"{table}, line {number}"
    assert preprocessing.reason_of(row) in done.out and len(info(tmp_path / "R")["scans"]) == 3


def test_strict__the_first_reason_ends_the_run(scans, run, tmp_path):
    """--strict: status 2, the reason as the last line, and no dataset.json that would pass for whole."""
    table = change(tmp_path, scans, "1.2.0,1,2,9000,4\n")
    done = run(preprocessing, "--scans", scans, "--annotations", table, "--run", tmp_path / "R", *WORDS, "--strict")
    assert done.status == 2 and "outside" in done.err.splitlines()[-1]
    assert not (tmp_path / "R" / "prepared" / "dataset.json").exists()


HOSTILE = ["../../x", "<script>alert(1)</script>", "/etc/x", "\x1b[31mred\x1b[0m"]


@pytest.fixture(scope="module")
def hostile(scans, tmp_path_factory):
    """The scans, beside DICOM series of two slices each whose UIDs are hostile, prepared: .folder, .done."""
    folder = tmp_path_factory.mktemp("hostile")
    shutil.copytree(scans, folder / "in" / "scans")
    for number, uid in enumerate(HOSTILE):
        made = small_chest(3)._replace(seriesuid=f"1.3.{number}", patient=uid, hu=np.zeros((2, 5, 7), np.int16))
        for path in scan_files.write_dicom(folder / "in" / "scans", made).glob("*.dcm"):
            tags = pydicom.dcmread(path)
            tags["SeriesInstanceUID"] = pydicom.DataElement("SeriesInstanceUID", "UI", uid, validation_mode=0)
            tags.save_as(path)
    folder = folder / "in"
    with warnings.catch_warnings():
        # pydicom says of each hostile UID that it is one.
        warnings.simplefilter("ignore")
        done = run_main(preprocessing, "--scans", folder / "scans", "--run", folder / "R", *WORDS)
    assert done.status == 0, done.err
    return SimpleNamespace(folder=folder, done=done)


def test_hostile_uid__is_skipped_with_its_reason(hostile):
    """Each is in dataset.json as its file has it, and each reason is printed at the end."""
    rows = info(hostile.folder / "R")["skipped"]
    assert {row["seriesuid"] for row in rows} == set(HOSTILE) and all("2 DICOM files" in row["problem"] for row in rows)
    assert hostile.done.out.count("skipped: ") == len(HOSTILE) and len(info(hostile.folder / "R")["scans"]) == 4


def test_hostile_uid__never_becomes_a_path_outside_the_run(hostile):
    """Whatever the UID, new files lie in the run, flat in its folder, and under names of letters, digits, - . and _."""
    there = [path for path in hostile.folder.parent.rglob("*") if path.is_file()]
    made = [path for path in there if hostile.folder / "scans" not in path.parents]
    assert {path.parent for path in made} == {hostile.folder / "R" / "prepared"}
    assert len(made) == 4 * 3 + len(HOSTILE) + 4    # three of each scan, a record of each refused; the folder's own
    assert all(re.fullmatch(r"[\w.\-]+", path.name, re.ASCII) for path in made)


def test_hostile_uid__cannot_steer_the_terminal_nor_the_page(hostile):
    """Printed it holds no control character; on the page it is text."""
    said = hostile.done.out + hostile.done.err
    assert all(c.isprintable() or c == "\n" for c in said)
    options = json.loads((hostile.folder / "R" / "prepared" / "options.json").read_bytes())
    folder = hostile.folder / "R" / "prepared"
    page = "".join(evaluate.item_html(item, folder) for item in options["page"] if item["kind"] != "heading")
    assert "&lt;script&gt;" in page and "<script" not in page and "\x1b" not in page and "Skipped scans" in page


# What is no chest

def refusal(folder, hu, spacing=(3, 3, 3), parameters=PARAMETERS):
    """Why a scan of these HU is skipped, its record then in `folder`; None where it was prepared."""
    made = phantom.Phantom("1.2.3", "", hu.astype(np.int16), spacing, (0, 0, 0), np.eye(3), [], None, None)
    source = preprocessing.Source("1.2.3", "1.2.3", (scan_files.write_metaimage(folder, made),))
    record = preprocessing.prepare_one(source, [], folder / "out", parameters)
    return preprocessing.reason_of(record) if "problem" in record else None


@pytest.fixture(scope="module")
def chest():
    return phantom.make_phantom(0, scale=3, nodules=0, direction=np.eye(3))


def head():
    """A head of 3 mm voxels: brain, skull, and sinuses and airway of a quarter litre; air around."""
    hu = np.full((80, 80, 80), -1000)
    for radius, value in ((32, 40), (29, 900), (26, 35)):
        hu[ellipse(hu.shape, (42, 40, 40), (radius * 1.2, radius, radius * 0.85))] = value
    hu[ellipse(hu.shape, (30, 24, 40), (10, 8, 12))] = -1000
    return hu


def abdomen(gas):
    """An abdomen of 3 mm voxels whose bowel holds rods of gas, radius `gas` voxels."""
    hu = np.full((120, 100, 130), -1000)
    hu[ellipse(hu.shape, (60, 50, 65), (np.inf, 40, 55))] = -100
    hu[ellipse(hu.shape, (60, 50, 65), (np.inf, 34, 48))] = 50
    for x in (35, 95):
        hu[20:100][ellipse((80, *hu.shape[1:]), (40, 50, x), (np.inf, gas, gas))] = -990
    return hu


def legs():
    """Two thighs of 3 mm voxels with the air between them."""
    hu = np.full((100, 70, 130), -1000)
    for x in (35, 95):
        hu[ellipse(hu.shape, (50, 35, x), (np.inf, 25, 28))] = 50
        hu[ellipse(hu.shape, (50, 35, x), (np.inf, 5, 5))] = 1200
    return hu


OTHER = {"head": head, "abdomen": lambda: abdomen(4), "abdomen full of gas": lambda: abdomen(12), "legs": legs,
         "air": lambda: np.full((60, 60, 60), -1000), "water": lambda: np.zeros((60, 60, 60)),
         "bone": lambda: np.full((60, 60, 60), 3000)}


@pytest.mark.parametrize("name", OTHER)
def test_rule_2_1_3_lungs__another_part_of_the_body_is_skipped(tmp_path, name):
    """No lungs are made of a head's sinuses, of gas in the bowel or of the air between legs: a reason is kept."""
    reason = refusal(tmp_path, OTHER[name]())
    assert "lung" in reason and not list((tmp_path / "out").glob("*.npy"))
    assert preprocessing.reason_of(json.loads((tmp_path / "out" / "1.2.3.json").read_bytes())) == reason


@pytest.mark.parametrize("end, share", [*(("bases", share) for share in (0.3, 0.5, 0.7)),
                                        *(("apices", share) for share in (0.15, 0.3, 0.5, 0.7))])
def test_rule_2_1_3_lungs__cut_lungs_are_skipped(chest, tmp_path, share, end):
    """A scan that ends within the lungs, so that a tenth or more of them is missing above or below, gives no mask."""
    inside = np.flatnonzero(chest.lungs.any((1, 2)))
    gone = int(inside[0] + share * np.ptp(inside)) if end == "bases" else int(inside[-1] - share * np.ptp(inside))
    part = slice(gone, None) if end == "bases" else slice(gone)
    hu = chest.hu[part]
    assert chest.lungs[part].sum() < 0.9 * chest.lungs.sum()
    assert "lung" in str(refusal(tmp_path, hu, chest.spacing))


@pytest.mark.parametrize("most, says", [(2.5, "--max-slice-mm"), (20, None)])
def test_num_2_slices__max_slice_mm_lets_thick_slices_through(chest, tmp_path, most, says):
    """Slices of 3 mm and more are left out with the option named; with the option raised the same scan is prepared."""
    reason = refusal(tmp_path, chest.hu, chest.spacing, PARAMETERS | {"max_slice_mm": most})
    assert reason is None if says is None else says in str(reason)


def test_rule_2_1_3_lungs__a_whole_body_has_its_lungs_or_is_skipped(chest, tmp_path):
    """Head, neck, abdomen with gas and legs around a chest: either a reason, or the chest's own lungs."""
    hu, lungs = whole_body(chest)
    reason = refusal(tmp_path, hu, chest.spacing)
    if reason is None:
        spacing = np.array(chest.spacing, float)
        mask = preprocessing.coarse_lungs(preprocessing.Scan("1.2.3", hu, spacing, np.zeros(3), np.eye(3)))[1].hu
        index = [np.rint(np.arange(n) * 2 / mm).astype(int).clip(0, m - 1)
                 for n, mm, m in zip(mask.shape, chest.spacing[::-1], hu.shape)]
        truth = lungs[np.ix_(*index)]
        assert 2 * (mask & truth).sum() / (mask.sum() + truth.sum()) > 0.9


def whole_body(chest):
    """HU (z, y, x) and lungs of a chest with a head above it and a belly with gas and legs below it."""
    voxels = np.array(chest.spacing[::-1])
    below, above = (int(mm / voxels[0]) for mm in (900, 300))
    hu = np.full((below + len(chest.hu) + above, *chest.hu.shape[1:]), -1000, np.int16)
    hu[below:-above] = chest.hu
    middle = np.argwhere(chest.lungs).mean(0)[1:]
    legs, belly = slice(0, int(below * 0.7)), slice(int(below * 0.7), below)

    def paint(part, shift, radii, value):
        centre = (0, *(middle + np.array(shift) / voxels[1:]))
        hu[part][ellipse(hu[part].shape, centre, (np.inf, *(np.array(radii) / voxels[1:])))] = value

    paint(belly, (0, 0), (105, 160), 40)
    paint(slice(belly.start + 10, below - 10), (-30, 50), (30, 35), -990)
    for side in (-1, 1):
        paint(legs, (0, side * 85), (75, 75), 50)
    head = hu[-above:]
    centre = (above * 0.45, *middle)
    head[ellipse(head.shape, centre, (above * 0.5, *(np.array((95, 75)) / voxels[1:])))] = 40
    lungs = np.zeros(hu.shape, bool)
    lungs[below:-above] = chest.lungs
    return hu, lungs
