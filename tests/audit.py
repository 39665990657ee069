"""The audit: every equation, number and rule of the thesis by its id, with the verdict of its tests.

    python lungaug.py audit                              # or python tests/audit.py
    python lungaug.py audit --wrong one_epsilon_a_batch  # with a published mistake in place: which checks catch it?
    python tests/audit.py --markdown                     # README's audit table

An id stands in brackets behind its formula, first in the docstring of the function that implements it; its tests are
named test_<id>__<property>. Exit status 1 where an id has no test or fails one.
"""

import argparse
import ast
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
FILES = ("preprocessing.py", "models.py", "losses.py", "train_gan.py", "train_classifier.py", "evaluate.py",
         "lungaug.py")
TABLES = {"num_table_1": [2, 1, 5]} | {f"num_table_{n}": [5, 2, n] for n in (2, 3, 4, 5)}      # the section of each
ID = r"(?:eq|rule|num)_[0-9a-z_]+"
LEFT_OUT = (    # section, what it says, and why no code follows it
    ("1.1", "1.4% of the samples are positive", "follows from Table 1: 8,160 of 589,290"),
    ("1.1", "rotations as conventional augmentation", "the thesis itself flips only (2.1.6, 4.2)"),
    ("1.3.1", "some network approximates any function", "says that one exists: nothing to run"),
    ("1.3.1, 1.3.2, 1.3.3", "batch normalization; residual networks converge faster; GAN training is unstable",
     "experience told, no rule; no norm over a batch is used"),
    ("1.3.6, 1.3.7", "what [10] and [11] measured", "other data, other networks: background"),
    ("2", "7371 lesions marked by one reader or more, 888 scans",
     "counts of LIDC-IDRI and LUNA16: however many scans there are, are read"),
    ("2", "nodules of 3 mm or more, marked by 3 of 4 readers",
     "LUNA16's annotations.csv is made so, and taken as it is"),
    ("2.1.2", "HU of air, water, cancellous bone and lung", "reasons for the range [-1000, 400], not steps"),
    ("2.1.3", "OpenCV", "scipy.ndimage does the same in three dimensions, and is here already"),
    ("4.1.1", "α is raised once both networks have stabilized",
     "a judgement by eye: three quarters of the epochs, rule_4_1_alpha"),
    ("5.3", "the distance flattened out around 70", "hangs on the lost width and on 20,000 epochs on LUNA16"),
    ("5.3", "the fake-trained classifier converges at once and tests badly; the mixed one is like the critic",
     "observations of that run; figure 8 and Tables 3–5 show yours"),
    ("6", "larger networks; nodule size, texture and malignancy as conditions", "proposals, not done in the thesis"),
)


class Entry(NamedTuple):
    """An id, its formula or rule in words, and where it is: file.function, or file.CONSTANT."""
    id: str
    formula: str
    where: str


def entries(root=ROOT):
    """Every Entry of the seven files and of tests/test_background.py, in the order of the sections."""
    found = []
    for name in (*FILES, "tests/test_background.py"):
        text, stem, constant = (root / name).read_text(), Path(name).stem, ""
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and (doc := ast.get_docstring(node)):
                found += [Entry(id, " ".join(formula.split()).strip(" ;,.:"), f"{stem}.{node.name}")
                          for formula, id in re.findall(rf"([^\n\[]*(?:\[[^\n\[\]]*\][^\n\[]*)*)\[({ID})\]", doc)]
        for line in text.splitlines():      # constants, rows of tables, and the rows of PRESETS
            constant = name[1] if (name := re.match(r"([A-Z_0-9]+) = ", line)) else constant
            if mark := re.search(rf"^(.*\S) +#.*\[({ID})\]", line):
                found.append(Entry(mark[2], mark[1].strip(" ,"), f"{stem}.{constant}"))
            elif (mark := re.match(rf'    Preset\("(\w+)", "([\w-]+)", ([\w.-]+), .*\[({ID})\]', line)):
                found.append(Entry(mark[4], f"{mark[2]} = {mark[3]}", f"lungaug.PRESETS ({mark[1]})"))

    def section(entry):
        return TABLES.get(entry.id) or [int(n) for n in re.findall(r"_(\d)(?=_)", entry.id)]

    return sorted(found, key=section)


def tests(root=ROOT):
    """id → the names of its tests, by reading the test files."""
    named = {}
    for path in sorted((root / "tests").glob("test_*.py")):
        for test in re.findall(rf"^def (test_{ID})\b", path.read_text(), re.M):
            named.setdefault(test.removeprefix("test_").split("__")[0], []).append(test)
    return named


def notes(readme):
    """id → "choice" or "erratum", by the tables of README that name it."""
    parts = re.split(r"^## ", readme, flags=re.M)
    marked = {}
    for title, note in (("Choices", "choice"), ("Errata", "erratum")):
        for part in parts:
            if part.startswith(title):
                marked |= {id: note for id in re.findall(rf"`(?:test_)?({ID})`", part)}
    return marked


def markdown(root=ROOT):
    """README's audit table."""
    named, marked = tests(root), notes((root / "README.md").read_text())
    lines = ["| id | equation, number or rule | where | tests | note |", "| --- | --- | --- | --- | --- |"]
    for entry in entries(root):
        formula = entry.formula.replace("|", "\\|")
        count, note = len(named.get(entry.id, [])), marked.get(entry.id, "")
        lines.append(f"| `{entry.id}` | {formula} | `{entry.where}` | {count} | {note} |")
    lines += [f"| {section} | {says} | left out | | {why} |" for section, says, why in LEFT_OUT]
    return "\n".join(lines)


def run(root, paths, select="eq_ or rule_ or num_", stop=False):
    """{test name: passed} of the tests that `select` names in these files of the tree `root`; `stop` at a failure."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", select,
                        f"--junitxml={report}", *(["-x"] if stop else []), *paths], cwd=root, capture_output=True)
        if not report.exists():
            return {}
        cases = xml.etree.ElementTree.parse(report).iter("testcase")
        return {case.get("name"): not any(case.find(bad) is not None for bad in ("failure", "error", "skipped"))
                for case in cases}


def verdicts(root=ROOT, select="eq_ or rule_ or num_"):
    """id → {test name: passed}, from running the tests, two processes at a time."""
    paths = sorted(map(str, (root / "tests").glob("test_*.py")), key=lambda path: "preprocessing" not in path)
    paths = [path for path in paths
             if re.search(rf"^def test_(?:{select.replace(' or ', '|')})", Path(path).read_text(), re.M)]
    with ThreadPoolExecutor(2) as pool:
        parts = list(pool.map(lambda path: run(root, [path], select), paths))
    found = {}
    for name, passed in (item for part in parts for item in part.items()):
        if name.startswith(("test_eq_", "test_rule_", "test_num_")):
            found.setdefault(re.sub(r"^test_|\[.*", "", name).split("__")[0], {})[name] = passed
    return found


def copy_tree(folder, root=ROOT):
    """A copy of the program and its tests, to change."""
    for name in (*FILES, "README.md", "requirements.txt"):
        shutil.copy(root / name, folder)
    shutil.copytree(root / "tests", Path(folder) / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    return Path(folder)


def main():
    from wrong_versions import WRONG, put

    parser = argparse.ArgumentParser(prog="python lungaug.py audit", description=__doc__.split("\n")[0])
    parser.add_argument("--wrong", choices=sorted(WRONG), metavar="NAME",
                        help=f"a mistake to put in place: {', '.join(sorted(WRONG))}")
    parser.add_argument("--markdown", action="store_true", help="print README's table instead")
    arguments = parser.parse_args()
    if arguments.markdown:
        print(markdown())
        return 0
    with tempfile.TemporaryDirectory() as folder:
        root = ROOT
        if arguments.wrong:
            root = copy_tree(folder)
            print(put(arguments.wrong, root))
        found = verdicts(root)
    bad = 0
    for entry in entries():
        results = found.get(entry.id, {})
        verdict = "no test" if not results else "ok" if all(results.values()) else "FAILS"
        bad += verdict != "ok"
        if verdict != "ok" or not arguments.wrong:
            print(f"{verdict:<8}{entry.id:<40}{entry.where}")
        for name in [name for name, passed in results.items() if not passed]:
            print(f"        {name}")
    caught = " The mistake is caught." if arguments.wrong and bad else ""
    print(f"{len(entries())} ids, {sum(map(len, found.values()))} tests: {bad} ids not ok.{caught}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
