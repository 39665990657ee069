"""Small edits to the mathematics, one at a time; does the audit notice each?

    python tests/mutate.py               # all of them, two at a time
    python tests/mutate.py --short       # every twelfth
    python tests/mutate.py --file losses.py

The edits are made by syntax: a sign or an operator turned, a comparison's edge moved, a number
changed, mean for sum, a term dropped, a call to detach or flip removed, a pair swapped. Edited are
the functions whose docstring has an audit id, and those named in MORE. A mutant survives if all
tests of the audit that touch its file pass; one that runs for ever does not. The tests of the
function's own ids are run first, because most mutants fail there within seconds. EQUIVALENT names
those that change nothing, with the reason. Exit status 1 where another survives, or where an entry
of EQUIVALENT is stale.
"""

import argparse
import ast
import copy
import re
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import lungaug

import audit


# A loop may have no end with an edit in it. All tests of a file take a minute or two, those of one
# function's ids a few seconds.
SECONDS = 300
FIRST_SECONDS = 100

# The files with mathematics, and the test files that must notice an edit.
TESTS = {
    "losses.py": ["test_losses.py", "test_background.py"],
    "models.py": ["test_models.py"],
    # Most of its edited functions are beyond the thesis.
    "evaluate.py": ["test_beyond.py", "test_evaluate.py"],
    "preprocessing.py": ["test_preprocessing.py", "test_readers.py"],
    "train_gan.py": ["test_train_gan.py"],
    "train_classifier.py": ["test_train_classifier.py"],
}

# Functions and classes without an id that are edited, too.
MORE = (
    "models.conv",
    "models.mean_of_shifts",
    "models.UpsampleConv3d",
    "models.ConvDownsample3d",
    "models.at_least_float32",
    "preprocessing.affine",
    "preprocessing.index_axes",
    "preprocessing.mirrored_axes",
    "preprocessing.far_end",
    "preprocessing.reorient",
    "preprocessing.line_weights",
    "preprocessing.border_labels",
    "preprocessing.crop_cube",
    "preprocessing.meets_sphere",
    "preprocessing.cut_places",
    "preprocessing.subset_of",
    "preprocessing.with_flips",
    "preprocessing.split_rows_by_cube",
    "preprocessing.positives_with_flips",
    "preprocessing.first_flips",
    "preprocessing.plane_of",
    "preprocessing.sort_slices",
    "preprocessing.slice_hu",
    "train_gan.accumulate",
    "train_gan.mean_terms",
    "train_classifier.f1_score",
    "evaluate.read_in_parts",
    "evaluate.nearest_training",
    "evaluate.ratio",
    "evaluate.metrics",
    "evaluate.count_at_thresholds",
    "evaluate.roc_curve",
    "evaluate.training_cubes",
    "evaluate.are_new",
)

# (file.function, kind of edit, what is edited) → why nothing changes. A number is named with the
# argument that it is given to, if that has a name.
EQUIVALENT = {
    ("models.conv", "number", "2"): "kernels are 1 and 3: 0 and 1 either way",
    ("models.Classifier", "number", "1"):
        "the width does not change how many levels there are",
    ("evaluate.nearest_neighbours", "number", "1"):
        "NumPy takes any negative side for what is left",
    ("evaluate.nearest_training", "number", "size=128"): "the result is that of any size",
    ("evaluate.welch_interval", "call", "sum → mean"): "where the sum is 0 the mean is 0",
    ("evaluate.welch_interval", "swapped", "return"): "without an error both ends are one",
    ("evaluate.pairwise_distances", "number", "1"): "NumPy takes any negative side for what is left",
    ("evaluate.pairwise_distances", "truth", "copy=False"): "a copy has the same values",
    ("train_classifier.f1_score", "number", "1"): "where the sum is 1 there is no hit",
    ("preprocessing.index_axes", "call", "sum → mean"):
        "a mean of three is largest where their sum is",
    ("preprocessing.mirrored_axes", "operator", "< → <="):
        "an axis across its own may be taken in either sense: far_end follows",
    ("preprocessing.close_ball", "number", "3"):
        "three axes have no fourth step: 3 is the whole cube already",
    ("preprocessing.lung_mask", "number", "border_value=1"): "any value but 0 is true",
    ("preprocessing.lung_mask", "number", "0"):
        "a component of one voxel is no quarter of a lung",
    ("preprocessing.interpolate_axes", "number", "2"):
        "what is kept in memory changes no result",
    ("preprocessing.cut", "operator", ">= → >"): "where they are equal the slice is empty",
    ("preprocessing.draw_negatives", "operator", "+ → -"): "a uniform draw about 0 has no sign",
    ("preprocessing.read_dicom", "number", "0"): "the slices of one volume share their plane",
    ("preprocessing.draw_negatives", "number", "100"): "a round more, where 100 find none",
    ("train_gan.decayed_rate", "operator", "<= → <"): "where they are equal the factor is 1",
    ("train_gan.mean_terms", "number", "0"): "the terms have the same names in each iteration",
    ("train_gan.sample_fixed", "number", "2"): "a sample does not depend on those beside it",
}

OPERATORS = {
    ast.Add: ("+", ast.Sub), ast.Sub: ("-", ast.Add),
    ast.Mult: ("*", ast.Div), ast.Div: ("/", ast.Mult),
    ast.FloorDiv: ("//", ast.Mult), ast.Pow: ("**", ast.Mult),
    ast.BitAnd: ("&", ast.BitOr), ast.BitOr: ("|", ast.BitAnd),
    ast.Lt: ("<", ast.LtE), ast.LtE: ("<=", ast.Lt),
    ast.Gt: (">", ast.GtE), ast.GtE: (">=", ast.Gt),
    ast.Eq: ("==", ast.NotEq), ast.NotEq: ("!=", ast.Eq),
}
CALLS = {
    "mean": "sum", "sum": "mean", "argmin": "argmax", "argmax": "argmin", "min": "max",
    "max": "min", "floor": "ceil", "maximum": "minimum", "minimum": "maximum", "rand": "randn",
    "randn": "rand", "binary_dilation": "binary_erosion", "log_softmax": "softmax",
}
REMOVED = ("detach", "flip", "flatten", "transpose")


# The wrong forms of a piece of syntax

class Edit(NamedTuple):
    """One edit of a syntax node: its kind and what is edited, as in EQUIVALENT, and the result."""
    kind: str
    what: str
    node: ast.AST


def changed(node, **fields):
    """A copy of a syntax node with other values in some fields."""
    new = copy.deepcopy(node)
    for name, value in fields.items():
        setattr(new, name, value)
    return new


def edits_of(node, name=""):
    """The Edits of one syntax node; name: of the argument that it is given to."""
    match node:
        case ast.BinOp(op=op) if type(op) in OPERATORS:
            symbol, other = OPERATORS[type(op)]
            other_symbol, _ = OPERATORS[other]
            yield Edit("operator", f"{symbol} → {other_symbol}", changed(node, op=other()))
            if symbol in "+-":
                yield Edit("term dropped", symbol, node.left)

        case ast.Compare(ops=[op]) if type(op) in OPERATORS:
            symbol, other = OPERATORS[type(op)]
            other_symbol, _ = OPERATORS[other]
            yield Edit("operator", f"{symbol} → {other_symbol}", changed(node, ops=[other()]))

        case ast.UnaryOp(op=ast.USub() | ast.Invert() | ast.Not()):
            symbol = {ast.USub: "-", ast.Invert: "~", ast.Not: "not"}[type(node.op)]
            yield Edit("sign", symbol, node.operand)

        case ast.Constant(value=bool(value)):
            yield Edit("truth", f"{name}={value}" if name else str(value),
                       changed(node, value=not value))

        case ast.Constant(value=int(value) | float(value)):
            yield Edit("number", f"{name}={value}" if name else str(value),
                       changed(node, value=value + 1))

        case ast.Attribute(attr=attribute) if attribute in CALLS:
            other = CALLS[attribute]
            yield Edit("call", f"{attribute} → {other}", changed(node, attr=other))

        case ast.Call(func=ast.Attribute(attr=attribute)) if attribute in REMOVED:
            yield Edit("call removed", attribute, node.func.value)

        case ast.Return(value=ast.Tuple(elts=[first, second])):
            swapped = ast.Tuple([second, first], ast.Load())
            yield Edit("swapped", "return", changed(node, value=swapped))


def argument_names(function):
    """id of a node → the name of the argument that it is given to, or is the default of."""
    names = {}
    for node in ast.walk(function):
        if isinstance(node, ast.keyword) and node.arg:
            names[id(node.value)] = node.arg
        if isinstance(node, ast.arguments):
            with_default = node.args[len(node.args) - len(node.defaults):]
            for argument, default in zip(with_default, node.defaults):
                names[id(default)] = argument.arg
    return names


def is_only_shown(node):
    """Whether this is a progress line, print or the text of an error: no mathematics."""
    if not isinstance(node, ast.Call):
        return isinstance(node, ast.JoinedStr)
    function = ast.unparse(node.func)
    return function in ("print", "progress.update", "Refusal")


def nodes_to_edit(function):
    """The syntax nodes of a function or class, without what is only shown."""
    nodes = [function]
    for child in ast.iter_child_nodes(function):
        if not is_only_shown(child):
            nodes += nodes_to_edit(child)
    return nodes


def put(tree, old, new):
    """Put the node `new` in the place of the node `old`."""
    for parent in ast.walk(tree):
        for field, value in ast.iter_fields(parent):
            if value is old:
                setattr(parent, field, new)
            elif isinstance(value, list):
                for index, item in enumerate(value):
                    if item is old:
                        value[index] = new


# The mutants of a file

class Mutant(NamedTuple):
    """A file with one edit."""
    file: str
    key: tuple      # as in EQUIVALENT: file.function, kind, what
    line: int       # where the edit was made
    source: str
    ids: list       # whose tests are run first

    def __str__(self):
        function, kind, what = self.key
        return f"{function} (line {self.line}): {kind} {what}"


def edited_functions(file):
    """{file.function: its syntax} of what is edited in a file, and the whole file's syntax."""
    tree = ast.parse((audit.ROOT / file).read_text(encoding="utf-8"))
    functions = {}
    for node in tree.body:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            continue
        name = f"{Path(file).stem}.{node.name}"
        documented = re.search(rf"\[{audit.ID}\]", ast.get_docstring(node) or "")
        if documented or name in MORE:
            functions[name] = node
    return functions, tree


def ids_of(name, functions):
    """The audit's ids of a function, or, where it has none, of those in its file that call it."""
    docstring = ast.get_docstring(functions[name]) or ""
    own = re.findall(rf"\[({audit.ID})\]", docstring)
    if own:
        return own

    ids = []
    for caller, function in functions.items():
        names = {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}
        if caller != name and name.split(".")[1] in names:
            ids += ids_of(caller, functions)
    return ids


def edits(functions):
    """Every edit of some functions: (file.function, the syntax node, its Edit)."""
    for name, function in functions.items():
        names = argument_names(function)
        for node in nodes_to_edit(function):
            for edit in edits_of(node, names.get(id(node), "")):
                yield name, node, edit


def keys(file):
    """What EQUIVALENT may name in a file: (file.function, kind, what)."""
    functions, _ = edited_functions(file)
    return {(name, edit.kind, edit.what) for name, _, edit in edits(functions)}


def mutants(file):
    """Every Mutant of a file."""
    functions, tree = edited_functions(file)
    every = []
    for name, node, edit in edits(functions):
        put(tree, node, edit.node)
        source = ast.unparse(tree)
        put(tree, edit.node, node)
        key = (name, edit.kind, edit.what)
        every.append(Mutant(file, key, node.lineno, source, ids_of(name, functions)))
    return every


def gone(names):
    """Those of these file.function that are not edited in any file."""
    edited = {name for file in TESTS for name in edited_functions(file)[0]}
    return sorted(set(names) - edited)


# Run the tests on each

def copy_tree(folder):
    """Copy the program and its tests to a folder."""
    for name in (*audit.FILES, "README.md", "requirements.txt"):
        shutil.copy(audit.ROOT / name, folder)
    shutil.copytree(audit.ROOT / "tests", folder / "tests",
                    ignore=shutil.ignore_patterns("__pycache__"))


def survives(mutant):
    """Whether every test passes with the mutant in place."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        copy_tree(root)
        (root / mutant.file).write_text(mutant.source, encoding="utf-8")
        paths = [f"tests/{name}" for name in TESTS[mutant.file]]
        names = [name for path in paths for name in audit.test_names(root / path)]
        tested = [one for one in mutant.ids if any(one in name for name in names)]
        runs = [(" or ".join(tested), FIRST_SECONDS)] if tested else []
        for select, seconds in (*runs, (audit.EVERY_ID, SECONDS)):
            results = audit.run_pytest(root, paths, select, stop=True, seconds=seconds)
            if not results or not all(verdict.passed for verdict in results.values()):
                return False
    return True


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--short", action="store_true", help="every twelfth mutant")
    parser.add_argument("--file", choices=TESTS, help="of one file")
    options = parser.parse_args()

    # A list that names what is not there any more would be wrong in silence.
    missing = gone([*MORE, *(function for function, _, _ in EQUIVALENT)])
    if missing:
        print(f"tests/mutate.py: MORE or EQUIVALENT names {', '.join(missing)}: "
              "give the new name, or remove the entry")
        return 1

    files = [options.file] if options.file else list(TESTS)
    every = [mutant for file in files for mutant in mutants(file)]
    if options.short:
        every = every[::12]

    alive = 0
    used = set()
    with ThreadPoolExecutor(2) as pool:
        for count, (mutant, lives) in enumerate(zip(every, pool.map(survives, every)), 1):
            if lives and mutant.key in EQUIVALENT:
                used.add(mutant.key)
                print(f"equivalent {mutant}: {EQUIVALENT[mutant.key]}", flush=True)
            elif lives:
                alive += 1
                print(f"SURVIVES {mutant}", flush=True)
            if count % 20 == 0:
                print(f"{count}/{len(every)}", file=sys.stderr, flush=True)

    # Only the mutants that were run can show that an entry is needed.
    stale = set()
    if not options.short:
        stems = [Path(file).stem for file in files]
        stale = {key for key in EQUIVALENT if key[0].split(".")[0] in stems} - used
    for key in sorted(stale):
        print(f"STALE {', '.join(key)}: no mutant survives for this reason; remove the entry")
    print(f"{len(every)} mutants, {alive} survive, {len(stale)} stale entries.")
    return 1 if alive or stale else 0


if __name__ == "__main__":
    lungaug.command(main)
