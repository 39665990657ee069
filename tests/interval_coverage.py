"""How often do 95% intervals of a difference hold the truth, by 5 test scans and by 20?

    python tests/interval_coverage.py                  # 1,000 test sets of each size; 5 minutes
    python tests/interval_coverage.py --sets 200

Draws test sets of which the truth is known: two classifiers with the same errors by scan, and some
of their own. For each set it makes the t interval of evaluate.py, on influences of scans, and the
usual percentile bootstrap over scans, of the differences in F1 and AUC; and counts how often each
holds the true difference, which is that of one test set of 20,000 scans.
"""

import argparse
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import lungaug

import numpy as np

import evaluate


NODULES = 5         # of a scan, on average
NEGATIVES = 60
DRAWS = 400         # of a bootstrap


def draw_set(n_scans, rng):
    """A test set: labels, scans, and the probabilities of two classifiers, (2, n).

    A scan has a difficulty of its own, which shifts the scores of all its cubes in both
    classifiers, and one that shifts them in one; each nodule and negative has its own as well.
    """
    labels = []
    scans = []
    scores = []
    for scan in range(n_scans):
        n_nodules = 1 + rng.poisson(NODULES - 1)
        of_scan = np.repeat([1, 0], [n_nodules, NEGATIVES])
        common = 0.7 * rng.normal()
        own = 0.5 * rng.normal(size=(2, 1))
        of_cube = rng.normal(size=len(of_scan)) + 0.5 * rng.normal(size=(2, len(of_scan)))
        gain = np.array([[2.6], [2.3]])
        logits = gain * (of_scan - 0.6) + common + own + of_cube
        labels.append(of_scan)
        scans.append(np.full(len(of_scan), scan))
        scores.append(1 / (1 + np.exp(-logits)))
    return np.concatenate(labels), np.concatenate(scans), np.concatenate(scores, axis=1)


def scored(labels, scans, scores):
    """The set as evaluate.py has it: each cube weighs 1, one repeat each of the arms a and b."""
    return evaluate.Scored(labels, np.ones(len(labels)), scans,
                           {"a": scores[:1], "b": scores[1:]})


def difference(labels, scores):
    """The differences in F1 and in AUC, by name."""
    f1s = [evaluate.f1(evaluate.confusion_matrix(labels, of_one > 0.5)) for of_one in scores]
    aucs = [evaluate.roc_auc(labels, of_one) for of_one in scores]
    return {"f1": f1s[0] - f1s[1], "auc": aucs[0] - aucs[1]}


def bootstrap(labels, scans, scores, rng):
    """Percentile intervals of the differences, over scans drawn with replacement: name → (low, high)."""
    of_scan = [np.flatnonzero(scans == scan) for scan in range(scans.max() + 1)]
    drawn = {"f1": [], "auc": []}
    for _ in range(DRAWS):
        chosen = rng.integers(len(of_scan), size=len(of_scan))
        cubes = np.concatenate([of_scan[scan] for scan in chosen])
        for name, value in difference(labels[cubes], scores[:, cubes]).items():
            drawn[name].append(value)
    return {name: tuple(np.percentile(values, [2.5, 97.5])) for name, values in drawn.items()}


def count_coverage(n_scans, n_sets, truth, rng):
    """(method, name) → how often, and how wide on average, the interval is."""
    hits = {}
    widths = {}
    progress = lungaug.Progress(f"sets of {n_scans} scans", n_sets)
    for done in range(1, n_sets + 1):
        labels, scans, scores = draw_set(n_scans, rng)
        measured = evaluate.measure_arms(scored(labels, scans, scores))
        rows = evaluate.compare(measured, "a", "b")
        intervals = {("t", name): (row["low"], row["high"]) for name, row in rows.items()}
        for name, interval in bootstrap(labels, scans, scores, rng).items():
            intervals["bootstrap", name] = interval

        for key, (low, high) in intervals.items():
            hits[key] = hits.get(key, 0) + (low <= truth[key[1]] <= high)
            widths[key] = widths.get(key, 0.0) + high - low
        progress.update(done)
    return {key: (hits[key] / n_sets, widths[key] / n_sets) for key in hits}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sets", type=int, default=1000, help="test sets of each size")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = lungaug.stream(options.seed, "coverage")

    labels, _, scores = draw_set(20_000, rng)
    truth = difference(labels, scores)
    print(f"true difference: F1 {truth['f1']:.4f}, AUC {truth['auc']:.4f}")

    rows = []
    for n_scans in (5, 20):
        coverage = count_coverage(n_scans, options.sets, truth, rng)
        for (method, name), (share, width) in coverage.items():
            rows.append((str(n_scans), method, name.upper(), f"{share:.3f}", f"{width:.3f}"))
    lungaug.print_table(f"Share of 95% intervals that hold the truth, {options.sets:,} test sets",
                        ("scans", "method", "of", "holds", "width"), rows)


if __name__ == "__main__":
    lungaug.command(main)
