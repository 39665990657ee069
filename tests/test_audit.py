"""The audit's own bookkeeping: ids, README, tests and settings hold together."""

import re

import audit
import lungaug
import wrong_versions

README = (audit.ROOT / "README.md").read_text()


def test_ids__at_least_sixty_each_once():
    """Every id stands at one place."""
    ids = [entry.id for entry in audit.entries()]
    assert len(ids) == len(set(ids)) >= 60


def test_ids__each_has_a_test_and_each_test_an_id():
    """Docstrings and test names agree, both ways."""
    assert {entry.id for entry in audit.entries()} == set(audit.tests())


def test_readme__holds_the_audit_table():
    """README's table is the one that `python tests/audit.py --markdown` prints."""
    assert audit.markdown() in README


def test_readme__names_only_ids_and_tests_that_exist():
    """No id in README's prose or tables has gone."""
    ids, names = {entry.id for entry in audit.entries()}, {name for some in audit.tests().values() for name in some}
    for word in re.findall(rf"`((?:test_)?{audit.ID})`", README):
        assert word in ids or word.removeprefix("test_") in ids or word in names, word


def test_readme__holds_the_presets():
    """README's table of presets is PRESETS."""
    for row in lungaug.PRESETS:
        cells = (f"`{row.stage}`", f"`--{row.name}`", f"{row.thesis:g}", f"{row.demo:g}", row.unit, row.why)
        assert f"| {' | '.join(cells)} |" in README, row.name


def test_wrong_versions__each_can_be_put_in_place(tmp_path):
    """Each mistake's text still stands once in its file, and its guard is an id with tests."""
    named = audit.tests()
    for name, wrong in wrong_versions.WRONG.items():
        (tmp_path / name).mkdir()
        root = audit.copy_tree(tmp_path / name)
        assert wrong.says in wrong_versions.put(name, root) and named[wrong.guard], name
        assert (root / wrong.file).read_text() != (audit.ROOT / wrong.file).read_text()
