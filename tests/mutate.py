"""Small edits to the mathematics, one at a time; does the audit notice each?

    python tests/mutate.py               # all of them, two at a time
    python tests/mutate.py --short       # every twelfth
    python tests/mutate.py --file losses.py

The edits are made by syntax: a sign or an operator turned, a comparison's edge moved, a number changed, an axis or an
index moved, mean for sum, a term dropped, a call to detach or flip taken out, a label swapped. A mutant survives if all
tests of the audit that touch its file pass. EQUIVALENT names those that change nothing, by their line, with the reason.
Exit status 1 where another survives.
"""

import argparse
import ast
import copy
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

import audit

# The mathematics: file → the functions that are edited, and the test files that must notice.
TARGETS = {
    "losses.py": (None, ["test_losses.py", "test_background.py"]),
    "models.py": (None, ["test_models.py"]),
    "evaluate.py": (("nearest_neighbours", "nearest_training", "confusion_matrix", "ratio", "sensitivity",
                     "specificity", "precision", "f1", "metrics"), ["test_evaluate.py"]),
    "preprocessing.py": (("affine", "reorient", "grid", "resample", "line_weights", "interpolate_axes", "clip_hu",
                          "normalize", "denormalize", "close_ball", "lung_mask", "nearest_voxel", "cut", "crop_cube",
                          "meets_sphere", "draw_negatives", "split_patients", "flip", "all_flips", "with_flips",
                          "slice_hu"), ["test_preprocessing.py", "test_readers.py"]),
    "train_gan.py": (("auxiliary_scale", "draw_batch", "draw_latent", "draw_labels", "draw_epsilon", "critic_iteration",
                      "generator_iteration", "train_epoch"), ["test_train_gan.py"]),
    "train_classifier.py": (("select", "learning_rate", "balanced_batches", "f1_score"), ["test_train_classifier.py"]),
}
EQUIVALENT = {      # the changed line → why nothing changes
    "models.conv: return nn.Conv3d(into, out, kernel, padding=kernel // (3))":
        "kernels are 1 and 3: 0 and 1 either way",
    "models.UpBlock: self.body = nn.Sequential(UpsampleConv3d(into, out, 3, padding=(2)), norm(out), activation(),":
        "UpsampleConv3d's forward has a padding of its own",
    "models.DownBlock: ConvDownsample3d(into, out, 3, padding=(2)), norm(out), activation())":
        "ConvDownsample3d's forward has a padding of its own",
    "models.Classifier: for level in range(1, len(channels(cube, (2)))):":
        "the width does not change how many levels there are",
    "evaluate.nearest_neighbours: distances = cdist(np.reshape(queries, (len(queries), -(2))), np.reshape(references, (len(references), -1)))":
        "NumPy takes any negative side for what is left",
    "evaluate.nearest_neighbours: distances = cdist(np.reshape(queries, (len(queries), -1)), np.reshape(references, (len(references), -(2))))":
        "NumPy takes any negative side for what is left",
    "evaluate.nearest_training: def nearest_training(queries, dataset, rows, flips, size=(129)):":
        "the result is that of any size",
    "train_classifier.f1_score: return float(2 * hits / max((2), labels.sum() + predictions.sum()))":
        "where the sum is 1 there is no hit",
    "preprocessing.reorient: order = max(itertools.permutations(range(3)), key=lambda p: np.abs(scan.direction[range(3), p]).mean())":
        "a mean of three is largest where their sum is",
    "preprocessing.reorient: back = (np.diag(axes) <= 0)":
        "an axis across its own may be taken in either sense: far follows",
    "preprocessing.close_ball: cross, cube = (ndimage.generate_binary_structure(3, n) for n in (1, (4)))":
        "three axes have no fourth step: 3 is the whole cube already",
    "preprocessing.lung_mask: labels, _ = ndimage.label(ndimage.binary_erosion(air, iterations=thin, border_value=(2)))":
        "any value but 0 is true",
    "preprocessing.interpolate_axes: @functools.lru_cache((3))": "what is kept in memory changes no result",
    "preprocessing.cut: if ((low <= high)).all():": "where they are equal the slice is empty",
    "preprocessing.draw_negatives: drawn = (lungs[rng.integers(len(lungs), size=count)] - rng.uniform(-1, 1, (count, 3)))":
        "a uniform draw about 0 has no sign",
    "preprocessing.draw_negatives: for _ in range((101)):": "a round more, where 100 find none",
    "train_gan.train_epoch: critic = {key: sum(terms[key] for terms in rounds) / len(rounds) for key in rounds[(1)]}":
        "the terms have the same names in each round",
}

SWAPS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
         ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
         ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.Pow: ast.Mult}
CALLS = {"mean": "sum", "sum": "mean", "argmin": "argmax", "argmax": "argmin", "min": "max", "max": "min",
         "floor": "ceil", "maximum": "minimum", "minimum": "maximum", "rand": "randn", "randn": "rand",
         "binary_dilation": "binary_erosion", "log_softmax": "softmax"}


def mutants_of(node):
    """The wrong forms of one syntax node, each a new node."""
    def changed(**fields):
        other = copy.deepcopy(node)
        for name, value in fields.items():
            setattr(other, name, value)
        return other

    if isinstance(node, ast.BinOp) and type(node.op) in SWAPS:
        yield changed(op=SWAPS[type(node.op)]())
        if isinstance(node.op, (ast.Add, ast.Sub)):
            yield node.left     # a term dropped
    elif isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in SWAPS:
        yield changed(ops=[SWAPS[type(node.ops[0])]()])
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.Invert, ast.Not)):
        yield node.operand
    elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
        yield changed(value=node.value + 1)
    elif isinstance(node, ast.Constant) and type(node.value) is bool:
        yield changed(value=not node.value)
    elif isinstance(node, ast.Attribute) and node.attr in CALLS:
        yield changed(attr=CALLS[node.attr])
    elif (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
          and node.func.attr in ("detach", "flip", "flatten", "transpose")):
        yield node.func.value   # the call taken out
    elif isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple) and len(node.value.elts) == 2:
        yield changed(value=ast.Tuple(node.value.elts[::-1], ast.Load()))


def mutants(path, functions):
    """(what, source) of every mutant of a file; only within the named functions, if any are named."""
    text = path.read_text()
    tree = ast.parse(text)
    lines = text.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line.encode()))
    data = text.encode()
    for top in tree.body:
        if not isinstance(top, (ast.FunctionDef, ast.ClassDef)) or top.name in ("main", "layer_table", "accuracy"):
            continue
        if functions and top.name not in functions:
            continue
        told = {id(node) for call in ast.walk(top)
                if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "step"
                for node in ast.walk(call)}     # the progress line is no mathematics
        for node in ast.walk(top):
            if not hasattr(node, "end_col_offset") or id(node) in told:
                continue
            begin, end = starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset
            for other in mutants_of(node):
                new = ast.unparse(other)
                new = new if isinstance(node, ast.stmt) else f"({new})"
                if isinstance(node, ast.Attribute):
                    new = new[1:-1]
                line = data[starts[node.lineno - 1]:begin] + new.encode() + data[end:starts[node.end_lineno]]
                what, changed = " ".join(line.decode().split()), data[:begin] + new.encode() + data[end:]
                yield f"{path.stem}.{top.name}: {what}", changed.decode()


def survives(job):
    """Whether every test passes with the mutant in place."""
    name, source, tests = job
    with tempfile.TemporaryDirectory() as folder:
        root = audit.copy_tree(folder)
        (root / name).write_text(source)
        results = audit.run(root, [f"tests/{test}" for test in tests], stop=True)
    return bool(results) and all(results.values())


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--short", action="store_true", help="every twelfth mutant")
    parser.add_argument("--file", choices=TARGETS, help="of one file")
    arguments = parser.parse_args()
    jobs = [(what, (name, source, tests)) for name, (functions, tests) in TARGETS.items()
            if arguments.file in (None, name)
            for what, source in mutants(audit.ROOT / name, functions)]
    jobs = jobs[::12] if arguments.short else jobs
    alive = 0
    with ThreadPoolExecutor(2) as pool:
        for i, ((what, _), lives) in enumerate(zip(jobs, pool.map(survives, [job for _, job in jobs])), 1):
            reason = EQUIVALENT.get(what)
            alive += lives and not reason
            if lives:
                print(f"SURVIVES {what}" if not reason else f"equivalent {what}: {reason}", flush=True)
            if i % 20 == 0:
                print(f"{i}/{len(jobs)}", file=sys.stderr, flush=True)
    print(f"{len(jobs)} mutants, {alive} survive.")
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main())
