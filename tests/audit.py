"""The audit: every equation, number and rule of the thesis by its id, with the verdict of its tests.

    python lungaug.py audit                                  # or python tests/audit.py
    python lungaug.py audit --wrong                          # the published mistakes, a line each
    python lungaug.py audit --wrong one_epsilon_per_batch    # one in place: which tests of its id fail?
    python tests/audit.py --write                            # the tables in README and thesis/

An id stands in brackets behind its formula in the docstring of the function that implements it,
in a comment behind or above a constant, or in the source of an option. Its tests are named
test_<id>__<property>. A line below an id's verdict holds the numbers that a test of it compared.

Exit status: 0 where every id has tests and passes them, or else 1. With --wrong NAME: 1 where the
mistake is caught, as then a test fails; 0 where it is missed; 2 where tests could not be run.
"""

import argparse
import ast
import functools
import io
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import tokenize
import xml.etree.ElementTree
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import lungaug

import wrong_versions


FILES = tuple(f"{module}.py" for module in wrong_versions.MODULES)
ID = r"(?:eq|rule|num)_[0-9a-z_]+"
# With this behind -k, pytest runs all tests of the audit.
EVERY_ID = "eq_ or rule_ or num_"

# The sections of the ids that do not begin with theirs.
SECTIONS = {
    "num_table_1": [2, 1, 5],
    "num_table_2": [5, 2, 2],
    "num_table_3": [5, 2, 3],
    "num_table_4": [5, 2, 4],
    "num_table_5": [5, 2, 5],
}


class WithoutCode(NamedTuple):
    """A statement of the thesis that no code follows, and why."""
    section: str
    says: str
    reason: str


WITHOUT_CODE = (
    WithoutCode("1.1", "1.4% of the samples are positive",
                "follows from Table 1: 8,160 of 589,290"),
    WithoutCode("abstract, 1.2", "1% of the cubes have a nodule; generative augmentation helps",
                "a rounded 1.4%; the hypothesis, which the verdict tests: rule_beyond_verdict"),
    WithoutCode("1.1", "rotations as conventional augmentation",
                "the thesis itself only flips (2.1.6, 4.2)"),
    WithoutCode("1.3.1", "some network approximates any function",
                "says that one exists: there is nothing to run"),
    WithoutCode("1.3.1, 1.3.2, 1.3.3",
                "batch normalization; residual networks converge faster; GAN training is unstable",
                "reports of experience, no rule; no norm over a batch is used"),
    WithoutCode("1.3.6, 1.3.7", "what [10] and [11] measured",
                "background: other data, other networks"),
    WithoutCode("2", "7371 lesions marked by at least one reader, 888 scans",
                "counts of LIDC-IDRI and LUNA16: the program reads as many scans as it is given"),
    WithoutCode("2", "nodules of at least 3 mm, marked by 3 of 4 readers",
                "LUNA16's annotations.csv was made so, and is taken as it is"),
    WithoutCode("2.1.2", "HU of air, water, cancellous bone and lung",
                "reasons for the range [-1000, 400], not steps"),
    WithoutCode("2.1.3", "OpenCV",
                "scipy.ndimage does the same in three dimensions, and is needed anyway"),
    WithoutCode("4.1.1", "α is raised once both networks have stabilized",
                "a judgement by eye: here after three quarters of the epochs, rule_4_1_alpha"),
    WithoutCode("5.1", "samples are varied and look real",
                "a judgement by eye; beyond the thesis it is measured (eq_beyond_two_sample and others)"),
    WithoutCode("5.3", "the networks' capacity was not sufficient",
                "the author's guess; --width makes them larger"),
    WithoutCode("5.3", "the distance flattened out around 70",
                "depends on the lost width and on 20,000 epochs on LUNA16"),
    WithoutCode("5.3", "the fake-trained classifier converges at once and tests badly; "
                       "the mixed one is like the critic",
                "observations of that run; figure 8 and Tables 3–5 show yours"),
    WithoutCode("6", "larger networks; nodule size, texture and malignancy as conditions",
                "proposals, not carried out in the thesis"),
)


# Where the ids stand

class Entry(NamedTuple):
    """An id, its formula or rule, and where it stands: file.function or file.CONSTANT, its line."""
    id: str
    formula: str
    where: str
    line: int


def entries():
    """Every Entry of the seven files and of tests/test_background.py, in the thesis' order."""
    every = []
    for name in (*FILES, "tests/test_background.py"):
        path = ROOT / name
        text = path.read_text(encoding="utf-8")
        every += docstring_entries(path.stem, text)
        every += constant_entries(path.stem, text)
    every += option_entries()
    return sorted(every, key=section_of)


def section_of(entry):
    """The section of an id as numbers, to sort by: eq_3_3_1_critic_loss → [3, 3, 1]."""
    if entry.id in SECTIONS:
        return SECTIONS[entry.id]
    # What the thesis lacks comes last.
    if is_beyond(entry):
        return [9]
    return [int(number) for number in re.findall(r"_(\d)(?=_)", entry.id)]


def is_beyond(entry):
    """Whether an id belongs to no section of the thesis."""
    return "_beyond_" in entry.id


@functools.cache
def docstring_entries(stem, text):
    """The entries in docstrings: the formula is what leads up to the id in its paragraph."""
    every = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            continue
        for paragraph in (ast.get_docstring(node) or "").split("\n\n"):
            # Splitting at a pattern in parentheses gives formula, id, formula, id, …, the rest.
            pieces = re.split(rf"\[({ID})\]", paragraph)
            for index in range(1, len(pieces), 2):
                formula = pieces[index - 1]
                # What follows another id on its line belongs to that one.
                if index > 1 and "\n" in formula:
                    formula = formula.split("\n", 1)[1]
                where = f"{stem}.{node.name}"
                every.append(Entry(pieces[index], in_one_line(formula), where, node.lineno))
    return every


def in_one_line(formula):
    """A formula with single spaces, without the marks that join it to its neighbours."""
    return " ".join(formula.split()).strip(" ;,.:")


@functools.cache
def constant_entries(stem, text):
    """The entries in comments behind or above a constant, or a row of a table of constants."""
    units = constant_units(text)
    lines = text.splitlines()
    every = []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type != tokenize.COMMENT:
            continue

        # A comment on a line of its own belongs to the code below.
        line = token.start[0]
        while line < len(lines) and re.match(r"\s*(#|$)", lines[line - 1]):
            line += 1

        around = [unit for unit in units if unit.first <= line <= unit.last]
        for found_id in re.findall(rf"\[({ID})\]", token.string):
            if around:
                innermost = around[-1]
                where = f"{stem}.{innermost.name}"
                every.append(Entry(found_id, innermost.text, where, innermost.first))
    return every


class Unit(NamedTuple):
    """What an id in a comment can belong to: a constant, or a row of a table of constants."""
    # The name of the constant.
    name: str
    text: str
    # Its first and its last line.
    first: int
    last: int


def constant_units(text):
    """The Units of a file, each constant before its rows."""
    units = []
    for node in ast.parse(text).body:
        if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Name):
            continue
        name = node.targets[0].id
        units.append(Unit(name, ast.unparse(node), node.lineno, node.end_lineno))
        units += rows_of(name, node.value)
    return units


def rows_of(name, table):
    """The rows of a table: the items of a dictionary, the tuples or calls of a tuple."""
    rows = []
    if isinstance(table, ast.Dict):
        for key, value in zip(table.keys, table.values):
            row_text = f"{ast.unparse(key)}: {ast.unparse(value)}"
            rows.append(Unit(name, row_text, key.lineno, value.end_lineno))
    elif isinstance(table, (ast.Tuple, ast.List)):
        for row in table.elts:
            # A tuple of plain numbers is no table.
            if not isinstance(row, ast.Constant):
                rows.append(Unit(name, ast.unparse(row), row.lineno, row.end_lineno))
    return rows


def option_entries():
    """The entries in the sources of options; the value is the thesis'."""
    rows = constant_units((ROOT / "lungaug.py").read_text(encoding="utf-8"))
    every = []
    for option in lungaug.OPTIONS:
        for found_id in re.findall(rf"\[({ID})\]", option.source):
            # The table holds its rows: the last unit with this id is the option's own.
            line = [row.first for row in rows if f"[{found_id}]" in row.text][-1]
            where = f"lungaug.OPTIONS ({', '.join(option.stages)})"
            every.append(Entry(found_id, f"{option.name} = {option.thesis}", where, line))
    return every


# The tests of an id

def test_files():
    return sorted((ROOT / "tests").glob("test_*.py"))


def test_names(path):
    """The names of a file's tests that belong to an id."""
    return names_in(path.read_text(encoding="utf-8"))


@functools.cache
def names_in(text):
    """The same of the text of a file."""
    return [node.name for node in ast.parse(text).body
            if isinstance(node, ast.FunctionDef) and re.match(f"test_{ID}$", node.name)]


def id_of(test):
    """test_eq_1_3_5_interpolate__ends → eq_1_3_5_interpolate; None for a test without an id."""
    if not re.match(f"test_{ID}", test):
        return None
    return test.removeprefix("test_").split("[")[0].split("__")[0]


def tests_by_id():
    """id → the names of its tests, by reading the test files."""
    by_id = {}
    for path in test_files():
        for name in test_names(path):
            by_id.setdefault(id_of(name), []).append(name)
    return by_id


class Verdict(NamedTuple):
    """How a test ended. A skipped test has not passed."""
    passed: bool
    # The lines of the numbers that it compared, by the fixture `compared`.
    compared: tuple
    # What pytest says of the failure.
    message: str


def run_pytest(root, paths, select=EVERY_ID, stop=False, wrong="", seconds=None, seen=None):
    """Run tests: {name: Verdict}; {} where they do not end.

    root: the tree to run them in; paths: the test files; select: pytest's -k; stop: at the first
    failure; wrong: the name of a published mistake to put in place; seconds: to wait for the end;
    seen: called with the name of each test that has ended.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-k", select,
                   f"--junitxml={report}", *map(str, paths)]
        if stop:
            command.append("-x")
        # Unbuffered, so that each test's line is read as it ends.
        environment = os.environ | {"LUNGAUG_WRONG": wrong, "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(command, cwd=root, env=environment, stdout=subprocess.PIPE,
                                   stderr=subprocess.STDOUT, text=True, encoding="utf-8",
                                   errors="replace")
        watch = threading.Timer(seconds or threading.TIMEOUT_MAX, process.kill)
        watch.daemon = True
        watch.start()
        for line in process.stdout:
            name = re.match(r"\S+\.py::(test_\w+).* (?:PASSED|FAILED|ERROR|SKIPPED)", line)
            if name and seen:
                seen(name[1])
        process.wait()
        watch.cancel()

        # pytest writes no report where it could not begin, or was killed.
        if not report.exists():
            return {}
        cases = xml.etree.ElementTree.parse(report).iter("testcase")
        return {case.get("name"): verdict_of(case) for case in cases}


def verdict_of(case):
    """The Verdict of a testcase in pytest's report."""
    messages = []
    for problem in map(case.find, ("failure", "error", "skipped")):
        if problem is None:
            continue
        message = problem.get("message", "")
        # Of a file that cannot be imported the last line of the traceback says why.
        if message == "collection failure":
            message = problem.text.splitlines()[-1].removeprefix("E").strip()
        messages.append(message)
    compared = [found.get("value") for found in case.iter("property")
                if found.get("name") == "compared"]
    return Verdict(not messages, tuple(compared), "".join(messages))


def verdicts_by_id(select=EVERY_ID, wrong="", seen=None):
    """Run the audit's tests, two processes at a time: id → {test: Verdict}.

    Under None it holds what kept tests from running: {a test file: Verdict}.
    """
    words = select.split(" or ")
    paths = [path for path in test_files()
             if any(word in name for name in test_names(path) for word in words)]

    # The longest file goes first, so that it is not waited for at the end.
    paths.sort(key=lambda path: path.stat().st_size, reverse=True)

    def run_file(path):
        return run_pytest(ROOT, [path], select, wrong=wrong, seen=seen)

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(run_file, paths))

    by_id = {}
    for path, result in zip(paths, results):
        if not result:
            result = {path.name: Verdict(False, (), "pytest could not begin, or was killed")}
        for name, verdict in result.items():
            # A file that cannot be imported is a case without an id, which has not passed.
            if id_of(name) or not verdict.passed:
                by_id.setdefault(id_of(name), {})[name] = verdict
    return by_id


def show_progress():
    """A function for `seen` of `run_pytest` that shows how many of all ids have had their tests."""
    waiting = {test_id: set(names) for test_id, names in tests_by_id().items()}
    progress = lungaug.Progress("ids", len(waiting))
    total = len(waiting)
    # Two threads read what two processes print.
    one_at_a_time = threading.Lock()

    def seen(name):
        with one_at_a_time:
            of_id = waiting.get(id_of(name))
            if not of_id:
                return
            of_id.discard(name)
            if not of_id:
                del waiting[id_of(name)]
                progress.update(total - len(waiting))

    return seen


# The documents and their tables

WRITE = "python tests/audit.py --write"
CHOICES = "tests/thesis/choices.md"
ERRATA = "tests/thesis/errata.md"
AUDIT = "tests/thesis/audit.md"
DOCUMENTS = ("README.md", CHOICES, ERRATA, AUDIT)


def read_document(document):
    return (ROOT / document).read_text(encoding="utf-8")


def markdown(head, rows):
    """A table in Markdown."""
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for row in rows:
        # A bar would end the cell, and <name …> would be taken for HTML.
        cells = [re.sub("<(?=[a-z])", "&lt;", cell.replace("|", "\\|")) for cell in row]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def options_table():
    """README's table of options."""
    head = ("stage", "option", "thesis", "demo", "range", "what it is", "source")
    rows = []
    for option in lungaug.OPTIONS:
        stages = "all" if option.stages == lungaug.STAGES else ", ".join(option.stages)
        rows.append((stages, f"`{option.name}`", default_cell(option, option.thesis),
                     default_cell(option, option.demo), range_cell(option), option.help,
                     option.source))
    return markdown(head, rows)


def default_cell(option, value):
    """An option's default value as text; empty where it has none."""
    # The default of --workers depends on the machine, and README shall not.
    if value is None or option.name == "--workers":
        return ""
    if option.kind is bool:
        return "on" if value else "off"
    return f"{value:g}" if option.kind is float else str(value)


def range_cell(option):
    """The values that an option takes, as text."""
    if option.choices:
        return ", ".join(map(str, option.choices))
    if option.low is None:
        return ""
    if option.high == lungaug.NO_LIMIT:
        return f"from {option.low:g}"
    return f"{option.low:g} to {option.high:g}"


def notes_by_id():
    """id → "choice", "erratum" or both, by the documents that name it."""
    by_id = {}
    for document, note in ((CHOICES, "choice"), (ERRATA, "erratum")):
        # A test's name in full has its property behind the id.
        names = re.findall(rf"`(?:test_)?({ID})`", read_document(document))
        for found_id in sorted({name.split("__")[0] for name in names}):
            by_id[found_id] = f"{by_id[found_id]}, {note}" if found_id in by_id else note
    return by_id


def words_by_id():
    """id → what it says in words, which are written by hand in the audit's own document."""
    by_id = {}
    for line in read_document(AUDIT).splitlines():
        cells = re.split(r" \| ", line.strip("| "))
        if re.fullmatch(f"`{ID}`", cells[0]):
            by_id[cells[0].strip("`")] = cells[2].strip()
    return by_id


def link_to(entry):
    """Where an entry stands, as a link from the audit's document to its line."""
    stem = entry.where.split(".")[0]
    path = f"../{stem}.py" if stem.startswith("test_") else f"../../{stem}.py"
    return f"[`{entry.where}`]({path}#L{entry.line})"


def properties(names):
    """The properties that tests check: their names behind the id, or whole where there is none."""
    return ", ".join(name.split("__")[-1] for name in names)


def audit_table():
    """The audit's table."""
    head = ("id", "equation, number or rule", "in words", "where", "tests", "note")
    tests_of = tests_by_id()
    note_of = notes_by_id()
    words_of = words_by_id()
    of_thesis = []
    beyond = []
    for entry in entries():
        row = (f"`{entry.id}`", entry.formula, words_of.get(entry.id, ""), link_to(entry),
               properties(tests_of.get(entry.id, [])), note_of.get(entry.id, ""))
        (beyond if is_beyond(entry) else of_thesis).append(row)

    without_code = [(row.section, "", row.says, "no code", "", row.reason)
                    for row in WITHOUT_CODE]
    heading = ("**Beyond the thesis**", "", "", "", "", "")
    return markdown(head, [*of_thesis, *without_code, heading, *beyond])


# The document, the name of its table between the marks, and the function that makes it.
TABLES = (("README.md", "options", options_table), (AUDIT, "audit", audit_table))


def with_table(text, name, table):
    """A document's text with the table between its marks made anew."""
    begin = f"<!-- table: {name} -->\n"
    if text.count(begin) != 1:
        raise ValueError(f"the line {begin.strip()} must stand once in its document")
    before, after = text.split(begin)
    _, end, after = after.partition("<!-- end -->")
    if not end:
        raise ValueError(f"no <!-- end --> after {begin.strip()}")
    return f"{before}{begin}\n{table}\n\n{end}{after}"


def without_lines(text):
    """A document's text without the lines of its links: they move with every edit above them."""
    return re.sub(r"(\.py)#L\d+", r"\1", text)


# The command

def error_lines(results):
    """What kept tests from running, one line each; results: of `verdicts_by_id`."""
    errors = results.get(None, {})
    return [lungaug.printable(f"{name}: {found.message}") for name, found in errors.items()]


def print_verdicts(results):
    """Print a line per id, per failed test and per comparison; returns how many ids are not ok."""
    has_tests = tests_by_id()
    note_of = notes_by_id()
    bad = 0
    for entry in entries():
        of_id = results.get(entry.id, {})
        failed = [name for name, found in of_id.items() if not found.passed]
        verdict = "ok"
        if not of_id:
            verdict = "NOT RUN" if entry.id in has_tests else "no test"
        elif failed:
            verdict = "FAILS"

        if verdict != "ok":
            bad += 1
        # Where the thesis is silent or wrong, ok is said of what the documents say holds.
        note = f"   ({note_of[entry.id]})" if entry.id in note_of else ""
        print(f"{verdict:<8}{entry.id:<40}{entry.where}{note}")
        for found in of_id.values():
            for line in found.compared:
                print(f"        {line}")
        for name in failed:
            print(f"        {name}")
    return bad


def what_differs(name, found):
    """A failed test in one line: the numbers that differ, or its name where it compared none."""
    if found.compared:
        return found.compared[-1]
    first_line = found.message.partition("\n")[0].removeprefix("AssertionError: ")
    both = re.fullmatch(r"assert \(?(.*?\d.*?) == (.*?\d.*?)\)?", first_line)
    # Of two comparisons the first may hold.
    if not both or " and " in first_line:
        return name
    left, right = [lungaug.printable(side, 60) for side in both.groups()]
    return f"{properties([name.split('[')[0]])}: {left}, expected {right}"


def check_mistake(name):
    """Show a mistake beside what is right, and which tests of its guard fail. Returns the status."""
    start = time.monotonic()
    guard = wrong_versions.WRONG[name].guard
    print(wrong_versions.show(name), flush=True)
    results = verdicts_by_id(select=guard, wrong=name)
    of_guard = results.get(guard, {})
    errors = error_lines(results)
    lungaug.check(of_guard and not errors, guard,
                  "; ".join(["not all of its tests could be run", *errors]),
                  "correct this and run the same command again")
    failed = {test: found for test, found in of_guard.items() if not found.passed}

    print(f"{guard}: {len(failed)} of its {len(of_guard)} tests fail.")
    for test, found in failed.items():
        print(f"        {what_differs(test, found)}")
    verdict = "caught" if failed else "MISSED"
    print(f"The mistake is {verdict}, after "
          f"{lungaug.format_duration(time.monotonic() - start)}.")
    return 1 if failed else 0


def check_all():
    """Print every id with the verdict of its tests. Returns the exit status."""
    start = time.monotonic()
    results = verdicts_by_id(seen=show_progress())
    bad = print_verdicts(results)
    errors = error_lines(results)
    for line in errors:
        print(f"ERROR   {line}")
    print("choice, erratum: what holds where the thesis is silent or wrong is in tests/thesis.")
    count = sum(len(of_id) for test_id, of_id in results.items() if test_id)
    print(f"{len(entries())} ids, {count} tests: {bad} ids not ok, after "
          f"{lungaug.format_duration(time.monotonic() - start)}.")
    return 1 if bad or errors else 0


def main():
    what, *_, exit_status = __doc__.split("\n\n")
    parser = argparse.ArgumentParser(prog="python lungaug.py audit", description=what,
                                     epilog=exit_status)
    parser.add_argument("--wrong", nargs="?", const="", metavar="NAME",
                        help="a published mistake to put in place; without a name, list them")
    parser.add_argument("--write", action="store_true",
                        help="write the tables in README.md and tests/thesis/audit.md instead")
    options = parser.parse_args()
    if options.write:
        for document, name, make in TABLES:
            text = with_table(read_document(document), name, make())
            (ROOT / document).write_text(text, encoding="utf-8")
        return 0

    if options.wrong is None:
        return check_all()
    if options.wrong == "":
        print(wrong_versions.list_of_names())
        return 0
    wrong_versions.check_name(options.wrong)
    return check_mistake(options.wrong)


if __name__ == "__main__":
    lungaug.command(main)
