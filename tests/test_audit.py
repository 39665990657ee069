"""The audit's own bookkeeping: ids, documents, tests, wrong versions and options hold together."""

import ast
import inspect
import json
import os
import re
from types import SimpleNamespace

import lungaug

import pytest
import torch

import audit
import evaluate
import mutate
import train_classifier
import wrong_versions
from helpers import at_once, early, in_one_line, run_main, run_python, small_run


def test_ids__at_least_sixty_each_once():
    """Every id stands at one place."""
    ids = [entry.id for entry in audit.entries()]
    assert len(ids) == len(set(ids)) >= 60


def test_ids__each_has_a_test_and_each_test_an_id():
    """Docstrings and test names agree, both ways."""
    assert {entry.id for entry in audit.entries()} == set(audit.tests_by_id())


CONSTANTS = '''
# A comment about nothing.
ONE = 1     # 1.1   [num_one]

# [num_two]
# A second line above.
TWO = (
    0.5,
    2,
)
TABLE = {
    # [num_three]
    3: ("three",
        3.0),
    4: ("four",
        4.0),   # [num_four]
}
# [num_five]: nothing stands below.
'''


def test_ids__of_constants_wherever_the_comment_stands():
    """Behind or above, in one line or wrapped: an id belongs to its constant or row."""
    entries = audit.constant_entries("file", CONSTANTS)
    assert entries == [
        audit.Entry("num_one", "ONE = 1", "file.ONE", 3),
        audit.Entry("num_two", "TWO = (0.5, 2)", "file.TWO", 7),
        audit.Entry("num_three", "3: ('three', 3.0)", "file.TABLE", 13),
        audit.Entry("num_four", "4: ('four', 4.0)", "file.TABLE", 15),
    ]


def test_ids__of_docstrings_wrapped_or_not():
    """A formula may take two lines; what follows an id in its line belongs to that id."""
    text = '''def f():
    """a = b +
    c   [eq_one]; n of them
    d = e   [eq_two]

    Returns a [-1, 1].
    """
'''
    assert audit.docstring_entries("file", text) == [
        audit.Entry("eq_one", "a = b + c", "file.f", 1), audit.Entry("eq_two", "d = e", "file.f", 1)]


def test_ids__are_linked_to_the_line_where_they_stand():
    """Each link leads to an existing file, and the function, constant or option begins at its line."""
    for entry in audit.entries():
        target, line = re.search(r"\]\((.*)#L(\d+)\)$", audit.link_to(entry)).groups()
        path = (audit.ROOT / audit.AUDIT).parent / target
        first = path.read_text(encoding="utf-8").splitlines()[int(line) - 1]
        assert re.match(r"\s*(def |class |[A-Z_]+ = |Option\(|\d: |@)", first), entry


@pytest.mark.parametrize("document, name, make", audit.TABLES)
def test_documents__hold_the_tables(document, name, make):
    """The tables of options and of the audit are those of the code; where a line has moved, they still are."""
    text = audit.read_document(document)
    made = audit.with_table(text, name, make())
    up_to_date = audit.without_lines(made) == audit.without_lines(text)
    assert up_to_date, f"{document}: the table is not that of the code: run {audit.WRITE}"


def test_documents__the_audit_says_each_id_in_words():
    """What --write cannot make: the hand-written column has no gap, and a formula with bars does not shift it."""
    says = audit.words_by_id()
    assert not [entry.id for entry in audit.entries() if not says.get(entry.id)]
    assert says["rule_beyond_equal_steps"].startswith("The control `longer`")


def test_documents__a_line_that_moved_makes_no_difference():
    """An edit elsewhere leaves the tables up to date; another file does not."""
    text = audit.read_document(audit.AUDIT)
    moved = text.replace(".py#L", ".py#L9")
    assert moved != text and audit.without_lines(moved) == audit.without_lines(text)
    assert audit.without_lines(text.replace("losses.py", "models.py")) != audit.without_lines(text)


@pytest.mark.parametrize("document", audit.DOCUMENTS)
def test_documents__name_only_ids_and_tests_that_exist(document):
    """Every id and every test that the prose or a table names exists."""
    ids = {entry.id for entry in audit.entries()}
    names = {name for of_id in audit.tests_by_id().values() for name in of_id}
    for word in re.findall(rf"`((?:test_)?{audit.ID})`", audit.read_document(document)):
        assert word in names or word.removeprefix("test_") in ids, word


@pytest.mark.parametrize("document", audit.DOCUMENTS)
def test_documents__link_only_files_that_exist(document):
    """A link within the repository leads to a file of it."""
    folder = (audit.ROOT / document).parent
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", audit.read_document(document)):
        assert (folder / target).exists(), target


def test_documents__name_only_wrong_versions_that_exist():
    """The examples of --wrong run."""
    named = [name for document in audit.DOCUMENTS
             for name in re.findall(r"--wrong ([a-z]\w*)", audit.read_document(document))]
    assert named and set(named) <= set(wrong_versions.WRONG)


# The numbers that tests compared

# The main equations: the audit prints for each what a test compared.
COMPARED = ("eq_1_3_5_interpolate", "eq_1_3_5_gradient_penalty", "eq_3_3_1_auxiliary", "eq_3_3_1_critic_loss",
            "eq_3_3_2_generator_loss", "eq_2_1_2_normalize", "rule_2_1_1_resample", "eq_5_1_nearest_neighbour",
            "eq_5_2_confusion", "eq_5_2_sensitivity", "eq_5_2_specificity", "eq_5_2_precision", "eq_5_2_f1",
            "eq_beyond_roc_auc")


def test_compared__each_main_equation_has_a_test_that_does():
    """By reading the test files: a test of the id takes the fixture, and calls it before its last assertion."""
    ids = set()
    for path in audit.test_files():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if not isinstance(node, ast.FunctionDef) or not audit.id_of(node.name):
                continue
            if "compared" in [argument.arg for argument in node.args.args]:
                ids.add(audit.id_of(node.name))
                body = ast.unparse(node)
                assert body.rindex("compared(") < body.rindex("assert "), node.name
    assert set(COMPARED) <= ids


@early
def interpolate_by_hand(folder):
    """The results of a test with a mistake in place, and the names of the tests that ended."""
    seen = []
    results = audit.run_pytest(audit.ROOT, ["tests/test_losses.py"], "eq_1_3_5_interpolate__by_hand",
                               wrong="one_epsilon_per_batch", seen=seen.append)
    return results, seen


def test_compared__numbers_come_back_from_a_run_of_the_tests(interpolate_by_hand):
    """Under a mistake, too: the line holds the wrong numbers beside those by hand; each test that ends is told."""
    results, seen = interpolate_by_hand
    (name, found), = results.items()
    assert seen == [name] == ["test_eq_1_3_5_interpolate__by_hand"] and not found.passed
    assert found.compared == ("x̂ 7.00 7.00 7.00, by hand 7.00 4.00 8.00",) and "assert" in found.message


@pytest.mark.parametrize("compared, message, line", [
    (("penalty 16.00, by hand 4.00",), "assert 16.0 == 4.0", "penalty 16.00, by hand 4.00"),
    ((), "AssertionError: assert 16.0 == 4.0\n +  where 16.0 = f()", "by_hand: 16.0, expected 4.0"),
    ((), "assert (2 == 3)", "by_hand: 2, expected 3"),
    ((), "assert ([1.0] == [1] and tensor(False))", "test_eq_1__by_hand[x]"),
    ((), "assert False\n +  where 1 == 2", "test_eq_1__by_hand[x]"),
    ((), "RuntimeError: no 1", "test_eq_1__by_hand[x]")])
def test_what_differs__is_one_line(compared, message, line):
    """The numbers that a test recorded, or those of its failed comparison, or else its name."""
    assert audit.what_differs("test_eq_1__by_hand[x]", audit.Verdict(False, compared, message)) == line


def test_progress__counts_an_id_once_all_its_tests_have_ended(monkeypatch, capsys):
    """Two ids, three tests, in any order; a test twice, as a parametrized one, or of no id counts nothing."""
    monkeypatch.setattr(audit, "tests_by_id",
                        lambda: {"eq_1": ["test_eq_1__a", "test_eq_1__b"], "eq_2": ["test_eq_2__a"]})
    seen = audit.show_progress()
    for name in ("test_eq_1__a", "test_eq_1__a", "test_other", "test_eq_2__a"):
        seen(name)
    assert "ids 1/2" in capsys.readouterr().err
    seen("test_eq_1__b")
    assert "ids 2/2" in capsys.readouterr().err


def test_command__of_all_ids_prints_what_was_compared_and_the_time(monkeypatch, capsys):
    """An id's verdict, its comparison below it, failed tests by name, and how long it took."""
    ok, bad = audit.Verdict(True, ("x̂ 7.00, by hand 7.00",), ""), audit.Verdict(False, (), "")
    results = {entry.id: {f"test_{entry.id}": ok} for entry in audit.entries()}
    results["eq_5_2_f1"] = {"test_eq_5_2_f1__a": bad}
    monkeypatch.setattr(audit, "verdicts_by_id", lambda **_: results)
    assert audit.check_all() == 1
    out = capsys.readouterr().out
    assert re.search(r"^ok      eq_1_3_5_interpolate +losses.interpolate\n        x̂ 7.00, by hand 7.00$", out, re.M)
    assert re.search(r"^FAILS   eq_5_2_f1 .*\n        test_eq_5_2_f1__a$", out, re.M)
    assert re.search(r"1 ids not ok, after \d+ s\.\n$", out)


def test_mutants__have_the_ids_whose_tests_are_run_first():
    """A function's own id, or the ids of those that call it; none where nothing in the file with an id does."""
    functions, _ = mutate.edited_functions("models.py")
    assert mutate.ids_of("models.norm", functions) == ["rule_3_1_layer_norm"]
    ids = mutate.ids_of("models.mean_of_shifts", functions)
    assert "rule_3_1_1_residual_up" in ids and "rule_3_1_layer_norm" not in ids
    functions, _ = mutate.edited_functions("preprocessing.py")
    assert mutate.ids_of("preprocessing.crop_cube", functions) == []


BROKEN = {
    "test_import.py": "import nonsense\n\n\ndef test_eq_1_3_5_interpolate__a():\n    pass\n",
    "test_killed.py": "import os\n\n\ndef test_eq_5_2_f1__a():\n    os._exit(1)\n",
    "test_fine.py": "def test_eq_5_2_precision__a():\n    pass\n",
}


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """Three test files in place of the audit's own: one cannot be imported, one ends pytest, one passes."""
    for name, text in BROKEN.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.setattr(audit, "test_files", lambda: sorted(tmp_path.glob("test_*.py")))


def test_command__tests_that_could_not_run_are_told_from_ids_without_a_test(broken, monkeypatch, capsys):
    """Each id whose tests could not be run, and why, by the name of the file; status 1."""
    assert audit.check_all() == 1
    out = capsys.readouterr().out
    assert re.findall(r"^NOT RUN +(\w+)", out, re.M) == ["eq_1_3_5_interpolate", "eq_5_2_f1"]
    assert re.findall(r"^ok +(\w+)", out, re.M) == ["eq_5_2_precision"]
    assert re.search(r"^no test +eq_5_2_sensitivity ", out, re.M)
    assert re.search(r"^ERROR   \S*test_import: ModuleNotFoundError: No module named 'nonsense'$", out, re.M)
    assert re.search(r"^ERROR   test_killed.py: pytest could not begin, or was killed$", out, re.M)
    assert " ids, 1 tests: " in out

    # An error alone is enough for status 1.
    monkeypatch.setattr(audit, "print_verdicts", lambda results: 0)
    assert audit.check_all() == 1


def test_command__its_help_says_what_the_status_means(run):
    """Status 1 of --wrong is no error, but a mistake that is caught."""
    out = " ".join(run(audit, "--help").out.split())
    assert out.endswith("With --wrong NAME: 1 where the mistake is caught, as then a test fails; 0 where it is missed; "
                        "2 where tests could not be run.")


def test_wrong_versions__a_guard_that_could_not_run_misses_nothing(broken, monkeypatch, capsys):
    """`audit --wrong` ends in one line with the reason, and status 2; the run over all mistakes says so, too."""
    done = run_main(audit, "--wrong", "one_epsilon_per_batch")
    assert in_one_line(done, "eq_1_3_5_interpolate: not all of its tests could be run; ", "named 'nonsense' — ")
    assert "MISSED" not in done.out

    assert wrong_versions.check_guards(["one_epsilon_per_batch"]) == 1
    out = capsys.readouterr().out
    assert "NOT RUN one_epsilon_per_batch" in out and "\n0 of 1 mistakes caught" in out


# Wrong versions

@early
def lecture(folder):
    """What `audit --wrong` did."""
    return run_main(audit, "--wrong", "one_epsilon_per_batch")


def test_wrong_versions__for_a_lecture(lecture):
    """`audit --wrong NAME` shows both functions, runs the guard alone, and says what differs; it ends with 1."""
    out = lecture.out
    assert lecture.status == 1 and lecture.err == ""
    assert "right: losses.interpolate" in out and "def one_epsilon_per_batch(" in out
    assert "\neq_1_3_5_interpolate: 2 of its 3 tests fail.\n        x̂ 7.00 7.00 7.00, by hand 7.00 4.00 8.00\n" in out
    assert re.search(r"The mistake is caught, after \d+ s\.", out)


@pytest.mark.parametrize("module, words", [(audit, ["--wrong"]), (wrong_versions, ["--list"])])
def test_wrong_versions__are_listed_a_line_each(run, module, words):
    """Without a name, and by --list: each name with what it is."""
    lines = run(module, *words).out.splitlines()
    assert len(lines) == len(wrong_versions.WRONG)
    assert "one_epsilon_per_batch     One ε for the whole batch." in lines


@pytest.mark.parametrize("module, words, said", [
    (audit, ["--wrong", "bare_square_rot"], "did you mean bare_square_root?"),
    (wrong_versions, ["one_epsilon_per_bach"], "did you mean one_epsilon_per_batch?"),
    (wrong_versions, ["zzz"], "--list shows the names"),
    (wrong_versions, ["batch_norm", "--", "train_gn.py"], "did you mean train_gan.py?"),
    (wrong_versions, ["batch_norm", "--", "lungaug.py"], "is no stage"),
    (wrong_versions, ["--", "train_gan.py"], "needs the name of the mistake")])
def test_wrong_versions__mistyped_is_one_line(module, words, said):
    """A name or a stage that is not there, with the nearest that is."""
    assert in_one_line(run_main(module, *words), said)


WRONG_STAGE = audit.ROOT / "tests" / "wrong_versions.py"


@early
def mistaken(folder):
    """A small run whose GAN was trained with one ε for the batch: .run, and .done, what the command said.

    .right: a run of the right stage. .other, .without: resumed with another mistake, and with none. .none: a stage with
    a mistake in a folder without a run. .workers: what functions a worker has, without a mistake and with one.
    """
    for name in ("wrong", "right"):
        small_run(folder / name)
    small = ["--width", 1, "--batch-size", 4, "--epochs", 2]
    words = ["train_gan.py", "--run", folder / "wrong", *small]
    worker = ("import os, runpy, preprocessing\n"
              "for os.environ['LUNGAUG_WRONG'] in ('', 'axes_transposed'):\n"
              "    runpy.run_path('tests/wrong_versions.py', run_name='__mp_main__')\n"
              "    print(preprocessing.nearest_voxel.__name__)")

    done, right = at_once(
        lambda: run_python(WRONG_STAGE, "one_epsilon_per_batch", "--", *words),
        lambda: run_python(audit.ROOT / "train_gan.py", "--run", folder / "right", *small))
    assert done.status == 0 and right.status == 0, done.err + right.err

    def resume():
        # One after the other: two may not train in one folder.
        yield run_python(WRONG_STAGE, "epsilon_is_one", "--", *words)
        yield run_python(audit.ROOT / words[0], *words[1:])

    (other, without), none, workers = at_once(
        lambda: list(resume()),
        lambda: run_python(WRONG_STAGE, "flips_as_independent", "--", "evaluate.py", "--run", folder / "none"),
        lambda: run_python("-c", worker, cwd=audit.ROOT))
    return SimpleNamespace(run=folder / "wrong", done=done, right=folder / "right", other=other, without=without,
                           none=none, workers=workers)


def test_run_stage__says_that_it_was_made_with_the_mistake(mistaken):
    """First and last on the terminal, and on the page that the stage leaves, behind its heading."""
    warning = "MADE WITH A MISTAKE, one_epsilon_per_batch: One ε for the whole batch."
    lines = mistaken.done.out.splitlines()
    assert lines[0] == lines[-1] == warning
    page = json.loads((mistaken.run / "gan" / "options.json").read_bytes())["page"]
    assert [item["kind"] for item in page[:2]] == ["heading", "text"] and page[1]["text"] == warning


def test_run_stage__results_of_an_evaluation_name_the_mistake(tmp_path, monkeypatch):
    """results.json holds the settings of the evaluation, and with a mistake in place its name."""
    options = lungaug.parse(evaluate.__doc__, "evaluate", words=["--run", str(tmp_path), "--seed", "3"])
    assert lungaug.settings_of(options, "results") == {"seed": 3}
    monkeypatch.setattr(lungaug, "settings_of", lungaug.settings_of)
    monkeypatch.setattr(lungaug, "save_page", lungaug.save_page)
    wrong_versions.mark_files("flips_are_independent", "warning")
    assert lungaug.settings_of(options, "results") == {"seed": 3, "mistake": "flips_are_independent"}


def test_run_stage__the_mistake_was_in_place(mistaken):
    """The critic's penalty in the first epoch is another than the right stage's, all else being the same."""
    wrong, right = (json.loads((run / "gan" / "log.jsonl").read_text().splitlines()[0])["critic"]
                    for run in (mistaken.run, mistaken.right))
    assert wrong["penalty"] != right["penalty"]


def test_run_stage__its_checkpoint_names_the_mistake(mistaken):
    """So a right training is never resumed with the mistake, nor one mistake with another."""
    state = torch.load(mistaken.run / "gan" / "checkpoint.pt", weights_only=True)
    assert state["settings"]["mistake"] == "one_epsilon_per_batch"
    assert in_one_line(mistaken.other, "mistake one_epsilon_per_batch, not epsilon_is_one", "--overwrite")
    assert in_one_line(mistaken.without, "mistake one_epsilon_per_batch, not None", "--overwrite")


def test_run_stage__a_classifier_made_with_a_mistake_is_not_resumed_without_it(tmp_path):
    """The checkpoint's settings, which name the mistake, are not those of the right stage; nor are the cubes'."""
    dataset = small_run(tmp_path)
    options = lungaug.parse("", "train_classifier", words=["--batch-size", "4"])
    lungaug.apply_preset(options, "train_classifier", "thesis")
    trainer = train_classifier.Trainer("real", options, dataset, None, torch.device("cpu"))
    lungaug.write(tmp_path / "checkpoint.pt", trainer.state() | {"settings": trainer.settings | {"mistake": "x"}})
    with pytest.raises(lungaug.Refusal, match="mistake x, not None"):
        lungaug.resume(trainer, tmp_path)
    lungaug.write(tmp_path / "generated.json", {"settings": {"mistake": "x"}, "classes": {}, "files": {}})
    with pytest.raises(lungaug.Refusal, match="mistake x, not None"):
        train_classifier.read_generated(tmp_path, {}, "run it again")


def test_run_stage__worker_processes_that_start_anew_have_the_mistake(mistaken):
    """Where a worker imports everything again, as on Windows, this file puts the mistake in place once more."""
    assert mistaken.workers.out.split() == ["nearest_voxel", "axes_transposed"], mistaken.workers.err


def test_run_stage__errors_are_the_stages_own(mistaken):
    """One line and status 2, as without the mistake."""
    assert in_one_line(mistaken.none, "none", "not found", "python")


def test_wrong_versions__thirty_seven_with_a_guard_each():
    """Each has a name of its own, says in a sentence what it is, and has a guard with tests."""
    assert len(wrong_versions.WRONG) == len(wrong_versions.ROWS) >= 37
    tests = audit.tests_by_id()
    for name, row in wrong_versions.WRONG.items():
        assert row.says.endswith(".") and tests[row.guard], name


@pytest.mark.parametrize("name", wrong_versions.WRONG)
def test_wrong_versions__fit_in_the_place_of_the_right_one(name):
    """The right function exists, and takes the same arguments."""
    for function, target in wrong_versions.replacements(name):
        owner, attribute = wrong_versions.locate(name, target)
        right = inspect.signature(getattr(owner, attribute))
        assert list(inspect.signature(function).parameters) == list(right.parameters), target


def test_wrong_versions__without_a_right_one_say_what_to_change(monkeypatch):
    """Where the right function has been renamed, the message names the entry to change."""
    row = wrong_versions.Wrong(wrong_versions.batch_norm, "models.old_name", "rule_3_1_layer_norm")
    monkeypatch.setitem(wrong_versions.WRONG, "batch_norm", row)
    with pytest.raises(LookupError, match="batch_norm takes the place of models.old_name"):
        wrong_versions.install("batch_norm")


@early
def installed(folder):
    """What two processes did with a mistake in place: Python, and pytest with a test file of its own."""
    code = ("import wrong_versions as w; w.install('hinge_loss'); import losses, train_gan; "
            "assert losses.critic_loss is train_gan.critic_loss is w.hinge_loss; "
            "assert w.critic_loss is not w.hinge_loss")
    (folder / "conftest.py").write_bytes((audit.ROOT / "tests" / "conftest.py").read_bytes())
    (folder / "test_it.py").write_text(
        "from losses import interpolate\n\n\n"
        "def test_it():\n    assert interpolate.__name__ == 'epsilon_is_one'\n", encoding="utf-8")
    folders = os.pathsep.join(map(str, (audit.ROOT, audit.ROOT / "tests")))
    environment = os.environ | {"LUNGAUG_WRONG": "epsilon_is_one", "PYTHONPATH": folders}
    return at_once(lambda: run_python("-c", code, cwd=audit.ROOT / "tests"),
                   lambda: run_python("-m", "pytest", "-q", "-p", "no:cacheprovider", cwd=folder, env=environment))


def test_wrong_versions__stand_in_every_file(installed):
    """In the file that defines the right function, and in those that imported it by name."""
    by_python, _ = installed
    assert by_python.status == 0, by_python.err


def test_wrong_versions__are_put_in_place_for_the_tests(installed):
    """LUNGAUG_WRONG reaches the names that a test file imports."""
    _, by_pytest = installed
    assert by_pytest.status == 0, by_pytest.out


def test_wrong_versions__are_shown_beside_the_right_one():
    """`audit --wrong` prints both sources."""
    text = wrong_versions.show("softmax_twice")
    assert "right: losses.auxiliary_cross_entropy" in text and "def auxiliary_cross_entropy(" in text
    assert "wrong: " in text and "def softmax_twice(" in text


# Mutation

def test_mutate__names_only_functions_that_exist():
    """What its lists name is edited, so that no entry is wrong in silence."""
    assert mutate.gone([*mutate.MORE, *(name for name, _, _ in mutate.EQUIVALENT)]) == []


def test_mutate__each_edit_changes_the_program_and_is_taken_back():
    """Every mutant of a file compiles, differs from the file, and from the others."""
    _, tree = mutate.edited_functions("losses.py")
    sources = [mutant.source for mutant in mutate.mutants("losses.py")]
    assert len(sources) == len(set(sources)) > 10
    for source in sources:
        compile(source, "losses.py", "exec")
    original = audit.ast.unparse(tree)
    assert original not in sources


def test_mutate__equivalent_entries_fit_a_mutant():
    """Each entry's kind of edit is one that its function has."""
    keys = set().union(*map(mutate.keys, mutate.TESTS))
    assert set(mutate.EQUIVALENT) <= keys
