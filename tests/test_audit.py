"""The audit's own bookkeeping: ids, documents, tests, wrong versions and options hold together."""

import inspect
import os
import re
import subprocess
import sys

import pytest

import audit
import mutate
import wrong_versions


def test_ids__at_least_sixty_each_once():
    """Every id stands at one place."""
    ids = [entry.id for entry in audit.entries()]
    assert len(ids) == len(set(ids)) >= 60


def test_ids__each_has_a_test_and_each_test_an_id():
    """Docstrings and test names agree, both ways."""
    assert {entry.id for entry in audit.entries()} == set(audit.tests())


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
        target, line = re.search(r"\]\((.*)#L(\d+)\)$", audit.link(entry)).groups()
        path = (audit.ROOT / audit.AUDIT).parent / target
        first = path.read_text(encoding="utf-8").splitlines()[int(line) - 1]
        assert re.match(r"\s*(def |class |[A-Z_]+ = |Option\(|\d: |@)", first), entry


@pytest.mark.parametrize("document, name, make", audit.TABLES)
def test_documents__hold_the_tables(document, name, make):
    """The tables of options and of the audit are those of the code; where a line has moved, they still are."""
    text = audit.read(document)
    made = audit.with_table(text, name, make())
    up_to_date = audit.without_lines(made) == audit.without_lines(text)
    assert up_to_date, f"{document}: the table is not that of the code: run {audit.WRITE}"


def test_documents__the_audit_says_each_id_in_words():
    """What --write cannot make: the hand-written column has no gap, and a formula with bars does not shift it."""
    says = audit.words()
    assert not [entry.id for entry in audit.entries() if not says.get(entry.id)]
    assert says["rule_beyond_equal_steps"].startswith("The control `longer`")


def test_documents__a_line_that_moved_makes_no_difference():
    """An edit elsewhere leaves the tables up to date; another file does not."""
    text = audit.read(audit.AUDIT)
    moved = text.replace(".py#L", ".py#L9")
    assert moved != text and audit.without_lines(moved) == audit.without_lines(text)
    assert audit.without_lines(text.replace("losses.py", "models.py")) != audit.without_lines(text)


@pytest.mark.parametrize("document", audit.DOCUMENTS)
def test_documents__name_only_ids_and_tests_that_exist(document):
    """Every id and every test that the prose or a table names exists."""
    ids = {entry.id for entry in audit.entries()}
    names = {name for of_id in audit.tests().values() for name in of_id}
    for word in re.findall(rf"`((?:test_)?{audit.ID})`", audit.read(document)):
        assert word in names or word.removeprefix("test_") in ids, word


@pytest.mark.parametrize("document", audit.DOCUMENTS)
def test_documents__link_only_files_that_exist(document):
    """A link within the repository leads to a file of it."""
    folder = (audit.ROOT / document).parent
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", audit.read(document)):
        assert (folder / target).exists(), target


def test_documents__name_only_wrong_versions_that_exist():
    """The examples of --wrong run."""
    named = [name for document in audit.DOCUMENTS for name in re.findall(r"--wrong ([a-z]\w*)", audit.read(document))]
    assert named and set(named) <= set(wrong_versions.WRONG)


# Wrong versions

def test_wrong_versions__thirty_seven_with_a_guard_each():
    """Each has a name of its own, says in a sentence what it is, and has a guard with tests."""
    assert len(wrong_versions.WRONG) == len(wrong_versions.ROWS) >= 37
    tests = audit.tests()
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


def test_wrong_versions__stand_in_every_file():
    """In the file that defines the right function, and in those that imported it by name."""
    code = ("import wrong_versions as w; w.install('hinge_loss'); import losses, train_gan; "
            "assert losses.critic_loss is train_gan.critic_loss is w.hinge_loss; "
            "assert w.critic_loss is not w.hinge_loss")
    subprocess.run([sys.executable, "-c", code], cwd=audit.ROOT / "tests", check=True)


def test_wrong_versions__are_put_in_place_for_the_tests(tmp_path):
    """LUNGAUG_WRONG reaches the names that a test file imports."""
    for name in ("wrong_versions.py", "conftest.py"):
        (tmp_path / name).write_bytes((audit.ROOT / "tests" / name).read_bytes())
    (tmp_path / "test_it.py").write_text(
        "from losses import interpolate\n\n\n"
        "def test_it():\n    assert interpolate.__name__ == 'epsilon_is_one'\n", encoding="utf-8")
    environment = os.environ | {"LUNGAUG_WRONG": "epsilon_is_one", "PYTHONPATH": str(audit.ROOT)}
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"],
                          cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


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
