"""--prepared: one run's prepared scans, used by other runs.

    python -m pytest tests/test_prepared.py -v
"""

import importlib
import json
import os
import shutil
from pathlib import Path

import lungaug

import pytest

import evaluate
import preprocessing
import train_classifier
import train_gan
from helpers import early, in_one_line, run_main, run_python, write_chests


WORDS = ("--cube", "6", "--negatives", "20", "--workers", "1", "--max-slice-mm", "4", "--preset", "demo")
SHORT = ("--epochs", "2", "--batch-size", "8")


def write_scans(folder):
    """Write four small scans to subset0, subset1, subset7 and subset8 of a folder."""
    return write_chests(folder, range(4), ["subset0", "subset1", "subset7", "subset8"])


def prepare_demo(folder, scans):
    """Prepare them in a run."""
    done = run_main(preprocessing, "--scans", scans, "--run", folder, *WORDS)
    assert done.status == 0, done.err
    return folder


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    return write_scans(tmp_path_factory.mktemp("scans") / "LUNA16")


@pytest.fixture(scope="module")
def demo(scans, tmp_path_factory):
    """A run in which they are prepared; not to be changed."""
    return prepare_demo(tmp_path_factory.mktemp("runs") / "demo", scans)


@pytest.fixture
def runs(demo, tmp_path):
    """A folder with a copy of that run, demo."""
    shutil.copytree(demo, tmp_path / "demo")
    return tmp_path


def contents(folder):
    """The bytes of every file in a folder."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def share(run, runs, *words, name="e1"):
    """Let runs/e1 use the prepared scans of runs/demo."""
    done = run(preprocessing, "--run", runs / name, "--prepared", runs / "demo", *words)
    assert done.status == 0, done.err
    return done.out


def named(run_folder):
    return json.loads((run_folder / "prepared" / "other_run.json").read_bytes())["run"]


# What works

def test_prepared__every_stage_follows_and_the_other_run_is_left_alone(runs, run):
    """It is named once; the other stages and a longer training know it. demo gains a lock file alone."""
    before = contents(runs / "demo")
    share(run, runs)
    words = ("--run", runs / "e1", *SHORT)
    done = run(train_gan, *words, "--width", "1", "--prepared", runs / "demo")
    assert done.status == 0, done.err
    assert run(train_gan, *words, "--width", "1", "--epochs", "3").status == 0
    accept_all = ("--class-probability", "0", "--score-quantile", "0")
    assert run(train_classifier, *words, *accept_all, "--repeats", "1").status == 0
    done = run(evaluate, "--run", runs / "e1")
    assert done.status == 0, done.err

    after = contents(runs / "demo")
    new = set(after) - set(before)
    assert {path: after[path] for path in before} == before
    assert [path.parent.name for path in new] == ["prepared"]
    assert all(path.name.startswith(".training_in_e1-") and path.suffix == ".lock" for path in new)
    assert not list((runs / "e1" / "prepared").glob("*.npy"))


def test_prepared__the_networks_are_those_of_a_run_of_its_own(runs, run, demo):
    """A GAN on shared scans ends with the bytes of one on the same scans in its own folder."""
    share(run, runs)
    for name in ("demo", "e1"):
        assert run(train_gan, "--run", runs / name, *SHORT, "--width", "1").status == 0
    one = (runs / "demo" / "gan" / "checkpoint.pt").read_bytes()
    assert one == (runs / "e1" / "gan" / "checkpoint.pt").read_bytes()


def test_prepared__the_page_shows_the_other_runs_scans(runs, run):
    """The page's section 2 is that of demo, with its picture, and says whose it is."""
    out = share(run, runs)
    assert "Table 1" in out
    assert f"Prepared scans of {runs}/demo: preset demo, cube 6." in out
    pages = [json.loads((runs / name / "prepared" / "options.json").read_bytes())["page"] for name in ("demo", "e1")]
    heading, says, *items = pages[1]
    assert [heading, *items[:-2]] == pages[0][:-2]
    assert says["text"] == f"The prepared scans are those of {runs}/demo."
    picture = next(item["file"] for item in items if item["kind"] == "figure")
    assert (runs / "e1/prepared" / picture).read_bytes() == (runs / "demo/prepared" / picture).read_bytes()


def test_prepared__a_folder_with_both_runs_can_be_moved(runs, run, tmp_path):
    """The place is kept relative to the run."""
    share(run, runs)
    assert named(runs / "e1") == "../demo"
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for name in ("demo", "e1"):
        (runs / name).rename(moved / name)
    assert preprocessing.open_dataset(moved / "e1").folder == moved / "demo" / "prepared"


def test_prepared__of_a_run_that_uses_anothers_is_the_other(runs, run):
    """e2 is given e1, which uses demo: e2 names demo itself, and does not need e1."""
    share(run, runs)
    done = run(preprocessing, "--run", runs / "e2", "--prepared", runs / "e1")
    assert done.status == 0, done.err
    assert named(runs / "e2") == "../demo"
    shutil.rmtree(runs / "e1")
    assert len(preprocessing.open_dataset(runs / "e2").info["scans"]) == 4


def test_prepared__is_remembered_also_under_overwrite(runs, run):
    """preprocessing.py alone does not make synthetic scans of its own."""
    share(run, runs)
    for words in ((), ("--overwrite",)):
        done = run(preprocessing, "--run", runs / "e1", *words)
        assert done.status == 0, done.err
        assert "Prepared scans of" in done.out
    assert not (runs / "e1" / "scans").exists()


def test_prepared__scans_of_its_own_take_their_place_under_overwrite(runs, run, scans):
    """--scans and --overwrite prepare scans in the run itself; then it names no other."""
    share(run, runs)
    words = ("--run", runs / "e1", "--scans", scans, *WORDS, "--negatives", "10")
    assert in_one_line(run(preprocessing, *words), "demo", "negatives 20, not 10")
    done = run(preprocessing, *words, "--overwrite")
    assert done.status == 0, done.err
    assert preprocessing.open_dataset(runs / "e1").folder == runs / "e1" / "prepared"


def test_prepared__another_seed_is_for_the_networks(runs, run):
    """The same scans serve networks of many seeds; a line says that the scans keep theirs."""
    out = share(run, runs, "--seed", "3")
    assert "--seed 3 is for the networks: these scans were prepared with 0." in out


def test_prepared__the_same_options_typed_again_are_taken(runs, run, scans):
    """What was typed is what the scans were prepared with."""
    share(run, runs, "--scans", scans, *WORDS, "--annotations", scans / "annotations.csv")


def test_prepared__lungaug_passes_it_on_and_each_stage_knows_it(runs, run, monkeypatch):
    """python lungaug.py --prepared: the first stage names the run, the second finds it named; so does each later run.
    """
    commands = []

    def run_here(script, *words):
        commands.append(script)
        done = run(importlib.import_module(script.removesuffix(".py")), *words)
        assert done.status == 0, done.err

    monkeypatch.setattr(lungaug, "run_script", run_here)
    words = ("--run", runs / "e1", *SHORT, "--width", "1", "--class-probability", "0", "--score-quantile", "0",
             "--repeats", "1")
    for more in (("--prepared", runs / "demo"), ()):
        assert run(lungaug, *words, *more).status == 0
    assert commands == 2 * [f"{stage}.py" for stage in lungaug.STAGES]
    assert "The prepared scans are those of" in (runs / "e1" / "report.html").read_text(encoding="utf-8")


@early
def begun(folder):
    """A folder in which train_gan.py began a run, e1, on the scans of another, demo; and what it said."""
    demo = prepare_demo(folder / "demo", write_scans(folder / "LUNA16"))
    return folder, run_python(train_gan.__file__, "--run", folder / "e1", "--prepared", demo, *SHORT, "--width", 1)


def test_prepared__train_gan_begins_a_run_on_it(begun):
    """On a fresh run it prints and runs the command that names the other run."""
    folder, done = begun
    assert done.status == 0, done.err
    assert f"$ python preprocessing.py --run {folder}/e1 --prepared {folder}/demo\n" in done.out


# What is refused

def test_prepared__a_run_that_is_none_is_refused(runs, run):
    """A folder that does not exist, or holds nothing prepared: one line, and the run is not begun."""
    (runs / "empty").mkdir()
    done = run(preprocessing, "--run", runs / "e1", "--prepared", runs / "typo")
    assert in_one_line(done, f"{runs}/typo: is not a folder — give a run that is prepared with --prepared")
    for name in ("empty", "demo/prepared"):
        done = run(preprocessing, "--run", runs / "e1", "--prepared", runs / name)
        assert in_one_line(done, f"{name}/prepared/dataset.json: not found", "a run that is prepared")
    assert not (runs / "e1").exists()


def test_prepared__the_run_itself_is_refused(runs, run):
    """Also by another name, and by way of a run that uses it."""
    share(run, runs)
    os.symlink(runs / "demo", runs / "link")
    for name in ("demo", "link", "e1"):
        done = run(preprocessing, "--run", runs / "demo", "--prepared", runs / name)
        assert in_one_line(done, f"{name}: is this run itself", "another --run")


@pytest.mark.parametrize("words", [[], ["--overwrite"]])
def test_prepared__a_run_with_scans_of_its_own_is_refused(runs, run, words):
    """They may have taken hours: not even --overwrite throws them away for another run's."""
    shutil.copytree(runs / "demo", runs / "e1")
    before = contents(runs / "e1")
    done = run(preprocessing, "--run", runs / "e1", "--prepared", runs / "demo", *words)
    assert in_one_line(done, "e1/prepared: holds prepared scans of this run's own", "remove this folder")
    assert contents(runs / "e1") == before


@pytest.mark.parametrize("words, says", [
    (("--cube", "12"), "cube 6, not 12"),
    (("--negatives", "21"), "negatives 20, not 21"),
    (("--max-slice-mm", "5"), "max_slice_mm 4.0, not 5.0"),
    (("--split", "cube"), "split patient, not cube"),
    (("--scans", "elsewhere"), "scans /"),
    (("--annotations", "other.csv"), "annotations "),
])
def test_prepared__options_that_the_scans_do_not_have_are_refused(runs, run, monkeypatch, words, says):
    """Typed options on which prepared scans depend: one line with both values."""
    monkeypatch.chdir(runs)
    (runs / "other.csv").write_text("a,b\n", encoding="utf-8")
    done = run(preprocessing, "--run", "e1", "--prepared", "demo", *words)
    assert in_one_line(done, "demo/prepared/dataset.json", says, "leave these options out")
    assert not (runs / "e1").exists()


def trained(run, runs):
    """runs/e1 with a GAN trained on demo's scans."""
    share(run, runs)
    assert run(train_gan, "--run", runs / "e1", *SHORT, "--width", "1").status == 0
    return runs / "e1"


@pytest.mark.parametrize("stage", [train_gan, train_classifier, evaluate])
def test_prepared__scans_that_were_moved_are_missed(runs, run, stage):
    """The line names the file that names them; given their new place, the run goes on with its GAN."""
    e1 = trained(run, runs)
    (runs / "demo").rename(runs / "moved")
    done = run(stage, "--run", e1)
    assert in_one_line(done, f"e1/prepared/other_run.json: names {runs}/demo, which has no prepared scans",
                       f"python preprocessing.py --run {e1} --prepared RUN")
    done = run(preprocessing, "--run", e1, "--prepared", runs / "moved")
    assert done.status == 0, done.err
    assert run(train_gan, "--run", e1, *SHORT, "--width", "1").status == 0


@pytest.mark.parametrize("stage", [train_gan, train_classifier, evaluate])
def test_prepared__scans_that_were_prepared_otherwise_are_refused(runs, run, scans, stage):
    """A GAN has seen the old ones. The line says what happened; giving the scans again says that the GAN is another's.
    """
    e1 = trained(run, runs)
    words = ("--scans", scans, "--run", runs / "demo", *WORDS, "--negatives", "10", "--overwrite")
    assert run(preprocessing, *words).status == 0
    done = run(stage, "--run", e1)
    assert in_one_line(done, f"the scans of {runs}/demo were prepared anew, with other content",
                       f"python preprocessing.py --run {e1} --prepared {runs}/demo")

    again = ("--run", e1, "--prepared", runs / "demo")
    done = run(preprocessing, *again)
    assert in_one_line(done, "e1/gan/checkpoint.pt: was trained on other scans", "--overwrite")
    assert run(preprocessing, *again, "--overwrite").status == 0
    assert in_one_line(run(train_gan, "--run", e1, *SHORT, "--width", "1"), "checkpoint.pt", "--overwrite")
    assert run(train_gan, "--run", e1, *SHORT, "--width", "1", "--overwrite").status == 0


def test_prepared__scans_that_were_prepared_otherwise_can_be_taken_before_a_gan_is(runs, run, scans):
    """Without a GAN nothing stands against them."""
    share(run, runs)
    words = ("--scans", scans, "--run", runs / "demo", *WORDS, "--negatives", "10", "--overwrite")
    assert run(preprocessing, *words).status == 0
    assert in_one_line(run(train_gan, "--run", runs / "e1"), "were prepared anew, with other content")
    share(run, runs)
    assert len(preprocessing.open_dataset(runs / "e1").negatives["test"]) == 10


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"run": 5}', '{"run": "../demo"}', '{"run": "a\\u0000b"}'])
def test_prepared__a_damaged_name_is_one_line_and_can_be_given_again(runs, run, text):
    """The line says how."""
    share(run, runs)
    (runs / "e1" / "prepared" / "other_run.json").write_text(text, encoding="utf-8")
    done = run(train_gan, "--run", runs / "e1", *SHORT)
    assert in_one_line(done, "other_run.json", f"python preprocessing.py --run {runs}/e1 --prepared")
    share(run, runs)
    assert preprocessing.open_dataset(runs / "e1").cube == 6


# Locks

@pytest.mark.parametrize("words", [("--overwrite",), ("--overwrite", "--split", "cube"), ("--max-slice-mm", "5")])
def test_prepared__overwriting_scans_that_another_run_trains_on_is_refused(runs, run, scans, words):
    """One line names the run that reads them, and nothing changes; afterwards it is allowed."""
    share(run, runs)
    command = ("--scans", scans, "--run", runs / "demo", *WORDS, *words)
    with preprocessing.keep_prepared(runs / "e1"):
        before = contents(runs / "demo")
        done = run(preprocessing, *command)
        assert in_one_line(done, "demo/prepared", "another process is already training in e1-", "wait for it")
        assert contents(runs / "demo") == before
    assert run(preprocessing, *command).status == 0


def test_prepared__several_runs_train_on_the_same_scans_at_once(runs, run):
    """Also two of one name in different folders."""
    share(run, runs)
    share(run, runs, name="other/e1")
    with preprocessing.keep_prepared(runs / "e1"), preprocessing.keep_prepared(runs / "other/e1"):
        assert len(list((runs / "demo" / "prepared").glob(".training_in_e1-*.lock"))) == 2
        with lungaug.lock(runs / "demo" / "gan", "training"), preprocessing.keep_prepared(runs / "demo"):
            pass


@pytest.mark.parametrize("stage", [train_gan, train_classifier])
def test_prepared__a_training_holds_the_lock(runs, run, monkeypatch, stage):
    """While train_gan.py or train_classifier.py trains on them, the scans are locked."""
    e1 = trained(run, runs)
    held = []

    def look(*_):
        held.append(run(preprocessing, "--run", runs / "demo", "--scans", "x", "--overwrite").status)
        with pytest.raises(lungaug.Refusal, match="training in e1-"):
            with preprocessing.lock_trainings(runs / "demo"):
                pass
        raise lungaug.Refusal("stopped", "here", "go on")

    monkeypatch.setattr(stage, "train_in" if stage is train_gan else "generate_classes", look)
    assert in_one_line(run(stage, "--run", e1), "stopped")
    assert held == [2]


def test_prepared__scans_in_a_folder_that_is_closed_are_used_without_a_lock(runs, run, monkeypatch):
    """Somebody else's scans may be readable alone: nothing is written, and nothing is refused."""
    share(run, runs)
    before = contents(runs / "demo")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with preprocessing.keep_prepared(runs / "e1"):
        assert contents(runs / "demo") == before


def test_prepared__naming_another_run_waits_for_a_training(runs, run):
    """While e1 trains on demo's scans, it cannot be given others; the same ones it can."""
    share(run, runs)
    shutil.copytree(runs / "demo", runs / "two")
    with lungaug.lock(runs / "e1" / "gan", "training"):
        share(run, runs)
        done = run(preprocessing, "--run", runs / "e1", "--prepared", runs / "two")
        assert in_one_line(done, "another process is already training")
    assert named(runs / "e1") == "../demo"


def test_prepared__from_one_drive_to_another_the_whole_path_is_kept(runs, run, monkeypatch):
    """On Windows no relative path leads from D: to C:."""
    def fail(*_):
        raise ValueError("path is on mount 'C:', start on mount 'D:'")

    with monkeypatch.context() as patch:
        patch.setattr(os.path, "relpath", fail)
        share(run, runs)
    assert Path(named(runs / "e1")) == runs / "demo"
    assert preprocessing.open_dataset(runs / "e1").folder == runs / "demo" / "prepared"


def test_prepared__paths_below_the_current_folder_are_shown_from_there(runs, run, monkeypatch):
    """As a user types them: demo, not the whole path."""
    monkeypatch.chdir(runs)
    done = run(preprocessing, "--run", "e1", "--prepared", "demo")
    assert "Prepared scans of demo: preset demo, cube 6." in done.out
    assert preprocessing.other_run("e1") == Path("demo")
