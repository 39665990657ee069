"""Evaluation: section 5, whether generative augmentation helped, and whether the generated nodules are new.

    python evaluate.py --run runs/demo       # after train_classifier.py

Scores the test set with the three classifiers and with the critic's auxiliary head: Tables 2–5 beside the thesis'.
Finds the nearest real training sample of generated ones: figures 9–14. Leaves <run>/evaluation: results.json (every
number of every table), scores.csv (every test cube), figure_9.png … figure_14.png, samples.png.
"""

import csv
import io
import math
import time
from typing import NamedTuple

import numpy as np
import torch
from scipy.spatial.distance import cdist

import lungaug
import preprocessing
from models import Classifier, Critic


# 5.1 GAN generated samples: novelty

def nearest_neighbours(queries, references):
    """argmin_r ‖q − r‖₂ for each query q   [eq_5_1_nearest_neighbour]

    queries (n, …), references (m, …) of the same shape beyond the first axis, m ≥ 1.
    Returns (indices (n,), distances (n,)); of references equally near, the first.
    """
    distances = cdist(np.reshape(queries, (len(queries), -1)), np.reshape(references, (len(references), -1)))
    indices = distances.argmin(1)
    return indices, distances[np.arange(len(indices)), indices]


def nearest_training(queries, dataset, rows, flips, size=128):
    """nearest_neighbours of queries (n, c, c, c) among the dataset's cubes at `rows`, `flips`, read `size` at a time."""
    best, where = np.full(len(queries), np.inf), np.zeros(len(queries), int)
    step = lungaug.progress("nearest neighbours", len(rows))
    for start in range(0, len(rows), size):
        part = slice(start, start + size)
        cubes = preprocessing.read_cubes(dataset, rows[part], flips[part])[:, 0]
        indices, distances = nearest_neighbours(queries, cubes)
        nearer = distances < best
        best[nearer], where[nearer] = distances[nearer], start + indices[nearer]
        step(min(start + size, len(rows)))
    return where, best


# 5.2 Classification metrics

class Confusion(NamedTuple):
    tp: int
    fp: int
    fn: int
    tn: int


class Metrics(NamedTuple):
    sensitivity: float
    specificity: float
    precision: float
    f1: float


def confusion_matrix(labels, predictions):
    """Counts of (label, prediction): TP (1, 1), FP (0, 1), FN (1, 0), TN (0, 0)   [eq_5_2_confusion]

    labels, predictions: (n,), 1 = positive.
    """
    labels, predictions = np.asarray(labels, bool), np.asarray(predictions, bool)
    return Confusion(*(int(n) for n in ((labels & predictions).sum(), (~labels & predictions).sum(),
                                        (labels & ~predictions).sum(), (~labels & ~predictions).sum())))


def ratio(part, whole):
    """part/whole, and nan for 0/0."""
    return part / whole if whole else math.nan


def sensitivity(c):
    """TP/(TP + FN)   [eq_5_2_sensitivity]; c: Confusion"""
    return ratio(c.tp, c.tp + c.fn)


def specificity(c):
    """TN/(TN + FP)   [eq_5_2_specificity]; c: Confusion"""
    return ratio(c.tn, c.tn + c.fp)


def precision(c):
    """TP/(TP + FP)   [eq_5_2_precision]; c: Confusion"""
    return ratio(c.tp, c.tp + c.fp)


def f1(c):
    """2·TP/(2·TP + FP + FN), the harmonic mean of precision and sensitivity   [eq_5_2_f1]; c: Confusion"""
    return ratio(2 * c.tp, 2 * c.tp + c.fp + c.fn)


def metrics(confusion):
    """Metrics(sensitivity, specificity, precision, f1) of a Confusion; nan where a ratio is 0/0."""
    return Metrics(sensitivity(confusion), specificity(confusion), precision(confusion), f1(confusion))


# Tables 2–5: arm, title, and the thesis' matrix

TABLES = {
    2: ("real", "Conventional augmentation baseline", Confusion(1583, 2776, 50, 113451)),      # [num_table_2]
    3: ("mixed", "Generative augmentation mixed with real data", Confusion(1377, 750, 256, 115477)),      # [num_table_3]
    4: ("fake", "Completely fake data", Confusion(919, 8539, 714, 107688)),      # [num_table_4]
    5: ("critic", "Critic auxiliary classifier, no fine-tuning", Confusion(1215, 815, 418, 115412)),      # [num_table_5]
}


def load_networks(run, dataset, device):
    """arm → a function of cubes that gives class logits (n, 2), for each arm that was trained. Raises Refusal.

    All must come from this dataset and from one GAN: others may have been trained on what is the test set here.
    """
    networks, gan, asked = {}, run / "gan" / "checkpoint.pt", {"prepared": lungaug.fingerprint(dataset.info["scans"])}
    made_with, do = run / "classifiers" / "generated" / "generated.json", f"run python train_classifier.py --run {run} first"
    with lungaug.refusing(made_with, do):
        made = lungaug.read_json(made_with, do)
        used, classes = made["settings"], made["classes"]
    for arm, *_ in TABLES.values():
        path = gan if arm == "critic" else run / "classifiers" / arm / "checkpoint.pt"
        if arm in ("mixed", "fake") and not path.exists():
            continue
        if arm == "critic":
            state = lungaug.load_checkpoint(path, f"run python train_gan.py --run {run} first", **asked)
        else:
            state = lungaug.load_checkpoint(path, do, delivered=None if arm == "real" else classes, **asked)
        with lungaug.refusing(path, "train it again with --overwrite"):
            if arm == "critic":
                network, weights = Critic(dataset.cube, state["settings"]["width"]), state["critic"]
            else:
                network, weights = Classifier(dataset.cube), state["best"]["classifier"]
            network.load_state_dict(weights)
            if state["epoch"] < state["epochs"]:
                print(f"{path}: stopped at epoch {state['epoch']} of {state['epochs']}.")
        network.eval().to(device)
        networks[arm] = (lambda x, critic=network: critic(x)[1]) if arm == "critic" else network
    lungaug.same_settings(made_with, used, {"gan_crc32": lungaug.file_crc(gan, "")})
    return networks


def score_test(networks, dataset, device):
    """Positive where ŷ(positive) > ½   [rule_5_2_argmax]: arm → that probability for each test cube (n,)"""
    rows, flips, _ = preprocessing.labelled(dataset, "test")

    def every(x):
        return torch.stack([network(x).softmax(1)[:, 1] for network in networks.values()], dim=1)

    scores = lungaug.predict(every, lambda part: preprocessing.read_cubes(dataset, rows[part], flips[part]),
                             len(rows), device)
    return dict(zip(networks, scores.T))


def write_scores(path, dataset, scores):
    """scores.csv: a test cube's series UID, centre (x, y, z) in mm, flip (0–7), label, and each arm's probability."""
    rows, flips, labels = preprocessing.labelled(dataset, "test")
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["seriesuid", "x", "y", "z", "flip", "label", *scores])
    for i, (scan, *voxel) in enumerate(rows.tolist()):
        info = dataset.info["scans"][scan]
        centre = np.array(info["origin"]) + voxel[::-1]
        table.writerow([info["seriesuid"], *(f"{v:.2f}" for v in centre), flips[i], labels[i],
                        *(f"{probability[i]:.9g}" for probability in scores.values())])
    lungaug.write_text(path, text.getvalue())


def both(confusion):
    """A Confusion and its Metrics as JSON holds them: nan is null."""
    numbers = {key: None if math.isnan(value) else value for key, value in metrics(confusion)._asdict().items()}
    return {"confusion": confusion._asdict(), "metrics": numbers}


def tables(dataset, scores):
    """Tables 2–5 as results.json holds them, with positives counted with their flips, as nodules, and the thesis'."""
    _, flips, labels = preprocessing.labelled(dataset, "test")
    out = {}
    for number, (arm, title, thesis) in TABLES.items():
        out[number] = {"arm": arm, "title": title, "thesis": both(thesis)}
        if arm in scores:
            for name, chosen in (("flips", slice(None)), ("nodules", flips == 0)):
                out[number][name] = both(confusion_matrix(labels[chosen], scores[arm][chosen] > 0.5))
    return out


TABLE_HEAD = ("", "positives with flips", "positives as nodules", "thesis")


def table_cells(table):
    """One of Tables 2–5 as rows of text; – where the arm was not trained."""
    return [(key if part == "metrics" else key.upper(),
             *(lungaug.shown(table[column][part][key] if column in table else None)
               for column in ("flips", "nodules", "thesis")))
            for part in ("confusion", "metrics") for key in table["thesis"][part]]


# Figures 9–14 and the samples

def load_generated(run, name):
    """Generated cubes of a class, int16 HU (n, c, c, c): the accepted, and the best-scored of the rejected."""
    folder = run / "classifiers" / "generated"
    accepted, rejected = (preprocessing.open_array(folder / f"{name}{kind}.npy") for kind in ("", "_rejected"))
    return accepted, rejected


def pair(left, right):
    """Two cubes in [-1, 1] side by side: their middle planes, enlarged, over all slices, superior to inferior."""
    halves = []
    for cube in (left, right):
        sheet, middle = lungaug.slices(cube), lungaug.enlarge(lungaug.planes(cube), 3)
        middle = np.pad(middle, ((0, 3), (0, sheet.shape[1] - middle.shape[1])), constant_values=40)
        halves.append(np.concatenate([middle, sheet]))
    return lungaug.enlarge(lungaug.tile(halves, 2, gap=8, paper=255), 48 // left.shape[0] or 1)


def draw_novelty(folder, run, dataset, count=6):
    """Figures 9–14: a generated positive beside its nearest training cube; and the distances, for results.json.

    The nearest is sought among all training cubes: positives with their flips, negatives as they are. For scale, the
    same distance is taken for as many real test positives: a copy of training data would be far nearer than they are.
    """
    accepted, rejected = load_generated(run, "positive")
    chosen = accepted[np.linspace(0, len(accepted) - 1, min(count, len(accepted))).astype(int)]
    queries = preprocessing.normalize(np.concatenate([chosen, rejected])[:count])
    test = dataset.positives["test"][:count]
    held_out = preprocessing.read_cubes(dataset, test)[:, 0] if len(test) else queries[:0]
    rows, flips, labels = preprocessing.labelled(dataset, "train")
    where, distances = nearest_training(np.concatenate([queries, held_out]), dataset, rows, flips)
    nearest = preprocessing.read_cubes(dataset, rows[where[:len(queries)]], flips[where[:len(queries)]])[:, 0]
    for i, (left, right) in enumerate(zip(queries, nearest)):
        lungaug.write_bytes(folder / f"figure_{9 + i}.png", lungaug.png(pair(left, right)))
    found = [{"figure": 9 + i, "accepted": i < len(chosen), "distance": float(distances[i]),
              "nearest_label": int(labels[where[i]]),
              "nearest_seriesuid": dataset.info["scans"][rows[where[i], 0]]["seriesuid"]}
             for i in range(len(queries))]
    return {"generated": found, "held_out_distances": distances[len(queries):].tolist()}


def draw_samples(folder, run, dataset, count=16):
    """samples.png: middle axial slices, a row each: real and generated positives, real and generated negatives."""
    middles = []
    for name, rows in (("positive", dataset.positives["train"]), ("negative", dataset.negatives["train"])):
        real = preprocessing.read_cubes(dataset, rows[np.linspace(0, len(rows) - 1, count).astype(int)])[:, 0]
        made = preprocessing.normalize(np.concatenate([part[:count] for part in load_generated(run, name)])[:count])
        made = np.concatenate([made, -np.ones((count - len(made), *made.shape[1:]), np.float32)])
        middles += [real[:, dataset.cube // 2], made[:, dataset.cube // 2]]
    sheet = lungaug.tile(lungaug.grey(np.concatenate(middles)), count)
    lungaug.write_bytes(folder / "samples.png", lungaug.png(lungaug.enlarge(sheet, 48 // dataset.cube or 1)))


def distances(values):
    return ", ".join(f"{value:.1f}" for value in values)


def page(results):
    """What the report shows of section 5."""
    pictures = [(f"Figure {row['figure']}. Generated{'' if row['accepted'] else ', not accepted in 4.3'} (left); the nearest "
                 f"training sample, l2 distance {row['distance']:.1f} (right).", f"figure_{row['figure']}.png")
                for row in results["novelty"]["generated"]]
    captioned = [(f"Table {number}. {table['title']}.", TABLE_HEAD, table_cells(table))
                 for number, table in results["tables"].items()]
    held_out = [(distances(results["novelty"]["held_out_distances"]),)]
    return ["5.1 Generated samples",
            ("Middle axial slices, a row each: real and generated positives, real and generated negatives.",
             "samples.png"),
            *pictures,
            ("For scale: a copy would lie at 0, and real test positives lie at", ("l2 distance",), held_out),
            "5.2 Classification metrics", *captioned]


def main():
    arguments, start = lungaug.parse(__doc__.split("\n")[0], "evaluate"), time.monotonic()
    run = arguments.run = lungaug.default_run(arguments.run)
    dataset = preprocessing.open_dataset(run)
    lungaug.settle(arguments, "evaluate", dataset.info["preset"])
    device, folder = lungaug.pick_device(arguments.device), run / "evaluation"
    scores = score_test(load_networks(run, dataset, device), dataset, device)
    write_scores(folder / "scores.csv", dataset, scores)
    results = {"tables": tables(dataset, scores), "novelty": draw_novelty(folder, run, dataset)}
    for number, table in results["tables"].items():
        lungaug.print_table(f"Table {number}. {table['title']}", TABLE_HEAD, table_cells(table))
    generated, held_out = results["novelty"].values()
    print(f"\nl2 distance to the nearest training cube: generated {distances(row['distance'] for row in generated)}; "
          f"real test positives {distances(held_out)}.")
    draw_samples(folder, run, dataset)
    lungaug.write_json(folder / "results.json", results)
    lungaug.record_stage(folder, arguments, time.monotonic() - start, page(results))


if __name__ == "__main__":
    lungaug.command(main)
