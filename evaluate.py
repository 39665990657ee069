"""Evaluation: section 5, whether generative augmentation helped, and whether the generated nodules are new.

    python evaluate.py --run runs/demo       # after train_classifier.py

Scores the test set with the three classifiers and with the critic's auxiliary head: Tables 2–5 beside the thesis'.
Finds the nearest real training sample of generated ones: figures 9–14. Draws the figures of sections 2 and 4, too, and
first of all: while a training runs, this is how to look at it. Leaves <run>/evaluation: results.json (every number of
every table), scores.csv (every test cube), figures 2, 3, 7 to 14, nodules.png.
"""

import csv
import html
import io
import math
import zlib
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
    """nearest_neighbours of queries (n, c, c, c) among the dataset's cubes at `rows`, `flips`, `size` at a time."""
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
    2: ("real", "Conventional augmentation baseline", Confusion(1583, 2776, 50, 113451)),     # [num_table_2]
    3: ("mixed", "Generative augmentation mixed with real data", Confusion(1377, 750, 256, 115477)),     # [num_table_3]
    4: ("fake", "Completely fake data", Confusion(919, 8539, 714, 107688)),     # [num_table_4]
    5: ("critic", "Critic auxiliary classifier, no fine-tuning", Confusion(1215, 815, 418, 115412)),     # [num_table_5]
}


def load_networks(run, dataset, device):
    """arm → a function of cubes that gives class logits (n, 2), for each arm that was trained. Raises Refusal.

    All must come from this dataset and from one GAN: others may have been trained on what is the test set here.
    """
    networks, gan = {}, run / "gan" / "checkpoint.pt"
    made_with = run / "classifiers" / "generated" / "generated.json"
    do = f"run python train_classifier.py --run {run} first"
    gan_crc = zlib.crc32(lungaug.read(gan, f"run python train_gan.py --run {run} first"))
    with lungaug.refusing(made_with, do):
        made = lungaug.read(made_with, do)
        used, classes = made["settings"], made["classes"]
    for arm, *_ in TABLES.values():
        path = gan if arm == "critic" else run / "classifiers" / arm / "checkpoint.pt"
        if arm in ("mixed", "fake") and not path.exists():
            continue
        if arm == "critic":
            state = lungaug.load_checkpoint(path, do, prepared=dataset.fingerprint)
        else:
            delivered = None if arm == "real" else classes
            state = lungaug.load_checkpoint(path, do, prepared=dataset.fingerprint, delivered=delivered)
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
    lungaug.same_settings(made_with, used, {"gan_crc32": gan_crc},
                          f"python train_classifier.py --run {run} --overwrite makes it again and keeps the GAN")
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
    lungaug.write(path, text.getvalue())


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


def table_title(number, table):
    """The title of one of Tables 2–5, and why it is empty where the arm was not trained."""
    return f"Table {number}. {table['title']}{'' if 'flips' in table else ' (not trained: no generated samples)'}"


TABLE_HEAD = ("", "positives with flips", "positives as nodules", "thesis")


def table_cells(table):
    """One of Tables 2–5 as rows of text; – where the arm was not trained."""
    return [(key.replace("f1", "F1") if part == "metrics" else key.upper(),
             *(lungaug.shown(table[column][part][key] if column in table else None)
               for column in ("flips", "nodules", "thesis")))
            for part in ("confusion", "metrics") for key in table["thesis"][part]]


# 4.1.1, 4.4.1 Figures 7 and 8: curves, SVG with strings

def ticks(low, high):
    """Round numbers within [low, high], half a dozen or so."""
    step = 10 ** np.floor(np.log10(max(high - low, 1e-12)))
    step *= next(f for f in (0.1, 0.2, 0.5, 1, 2) if (high - low) / (step * f) <= 8)
    return [float(value) for value in np.arange(np.ceil(low / step), np.floor(high / step) + 1) * step + 0.0]


COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd")
CURVES = 460, 270       # width and height of one chart


def curves(title, lines, x_label, y_label):
    """A chart, a group of SVG. lines: (name, x (n,), y (n,), band), the band (low (n,), high (n,)) shaded, or None."""
    (width, height), right, bottom = CURVES, CURVES[0] - 14, CURVES[1] - 42
    values = np.concatenate([np.ravel(part) for _, _, y, band in lines for part in (y, *(band or ()))])
    values = values[np.isfinite(values)] if np.isfinite(values).any() else np.zeros(1)
    low, high = values.min(), values.max()
    low, high = (low, high) if high - low > 1e-12 else (low - 0.5, high + 0.5)
    first, last = min(x[0] for _, x, _, _ in lines), max(x[-1] for _, x, _, _ in lines)

    def place(x, y):
        across, up = (x - first) / max(last - first, 1e-12), (y - low) / (high - low)
        return 58 + across * (right - 58), bottom - up * (bottom - 38)

    def points(x, y):
        return " ".join(f"{a:.1f},{b:.1f}" for a, b in (place(*point) for point in zip(x, y)) if np.isfinite(b))

    def text(x, y, words, anchor="middle", more=""):
        return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {more}>{html.escape(words)}</text>'

    legend, out = [], [text(width / 2, 15, title), text(width / 2, height - 8, x_label),
                   text(0, 0, y_label, more=f'transform="translate(13 {height / 2}) rotate(-90)"')]
    for value in ticks(low, high):
        y = place(first, value)[1]
        out.append(f'<path d="M58 {y:.1f}H{right}" stroke="#ddd"/>' + text(53, y + 4, f"{value:g}", "end"))
    out += [text(place(value, low)[0], bottom + 15, f"{value:g}") for value in ticks(first, last)]
    for i, (name, x, y, band) in enumerate(lines):
        colour = COLOURS[i % len(COLOURS)]
        if band:
            around = f"{points(x, band[1])} {points(x[::-1], band[0][::-1])}"
            out.append(f'<polygon fill="{colour}" fill-opacity=".2" points="{around}"/>')
        out.append(f'<polyline fill="none" stroke="{colour}" stroke-width="1.6" points="{points(x, y)}"/>')
        legend.append(f'<tspan fill="{colour}" dx="12">{html.escape(name)}</tspan>')
    out.append(f'<text x="{right}" y="29" text-anchor="end">{"".join(legend)}</text>')
    return f'<g><rect width="{width}" height="{height}" fill="#fff"/>{"".join(out)}</g>'


def beside(*charts, columns=2):
    """Charts of `curves` in reading order, an SVG file's text."""
    width, height = CURVES
    moved = [f'<g transform="translate({i % columns * width} {i // columns * height})">{chart}</g>'
             for i, chart in enumerate(charts)]
    wide, high = min(columns, len(charts)) * width, -(-len(charts) // columns) * height
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" width="{wide}" height="{high}" '
            f'font-family="sans-serif" font-size="11">{"".join(moved)}</svg>')


def smooth(values, window):
    """Running mean over a centred window, and its 95% band, ±1.96 standard deviations within it   [rule_4_1_smoothed]

    values: (n,). Returns the mean (n,) and the band's (low, high).
    """
    values = np.asarray(values, float)
    out = np.empty((2, len(values)))
    for i in range(len(values)):
        part = values[max(0, i - window // 2):i + window // 2 + 1]
        out[:, i] = part.mean(), 1.96 * part.std()
    return out[0], (out[0] - out[1], out[0] + out[1])


def figure_7(rows):
    """The log's rows as one SVG of smoothed curves with 95% bands: estimate, cross-entropy, penalty, accuracy."""
    epochs, window = [row["epoch"] for row in rows], max(3, len(rows) // 40)

    def line(name, key, part="critic"):
        middle, band = smooth([row[part][key] for row in rows], window)
        return name, epochs, middle, band

    return beside(*(curves(title, lines, "epoch", unit) for title, unit, lines in (
        ("Wasserstein distance estimate", "estimate", [line("f(real) − f(fake)", "wasserstein")]),
        ("Auxiliary classification", "cross-entropy", [line("critic, reals and fakes", "auxiliary"),
                                                       line("generator, fakes", "auxiliary", "generator")]),
        ("Gradient penalty", "penalty", [line("(‖∇f‖ − 1)²", "penalty")]),
        ("Class accuracy of the critic", "accuracy", [line("on reals", "real_accuracy"),
                                                      line("on fakes", "fake_accuracy")]))))


def figure_8(logs):
    """Training and validation loss of each classifier, one SVG; logs: arm → its log's rows."""
    charts = []
    for arm, rows in logs.items():
        epochs = [row["epoch"] for row in rows]
        lines = [(name, epochs, [row[f"{name}_loss"] for row in rows], None) for name in ("train", "validation")]
        charts.append(curves(f"Classifier, {arm} data", lines, "epoch", "cross-entropy"))
    return beside(*charts, columns=3)


def draw_curves(folder, run):
    """figure_7.svg and figure_8.svg, of the logs that are there, a running training's too."""
    logs = {arm: lungaug.read_log(run / "classifiers" / arm / "log.jsonl") for arm, *_ in TABLES.values()}
    logs, rows = {arm: rows for arm, rows in logs.items() if rows}, lungaug.read_log(run / "gan" / "log.jsonl")
    for number, figure, shown, where in ((7, figure_7, rows, "gan"), (8, figure_8, logs, "classifiers")):
        do = "its log.jsonl is damaged: train again with --overwrite"
        with lungaug.refusing(run / where, do), np.errstate(over="raise", invalid="raise"):
            if shown:
                lungaug.write(folder / f"figure_{number}.svg", figure(shown))


# 2.1.7, 5.1 Figures 2, 3 and 9–14: cubes

def slices(cube, columns=12):
    """All axial slices of a cube in reading order, superior to inferior   [rule_2_1_7_reading_order]

    cube: (z, y, x) in [-1, 1], z rising to superior. Returns uint8 grey.
    """
    return lungaug.tile(lungaug.grey(cube[::-1]), columns, gap=1)


def planes(cube):
    """The middle planes of a cube (z, y, x) in [-1, 1]: axial, coronal, sagittal, superior up, side by side; uint8."""
    c = cube.shape[0] // 2
    return lungaug.tile(lungaug.grey(np.stack([cube[c], cube[::-1, c], cube[::-1, :, c]])), 3, gap=1)


def draw_cubes(folder, dataset, shown=3):
    """Figures 2 (positives) and 3 (negatives), slice by slice; nodules.png, the middle planes of 24 nodules at most."""
    for number, rows in ((2, dataset.positives["train"]), (3, dataset.negatives["train"])):
        chosen = np.unique(np.linspace(0, len(rows) - 1, shown).astype(int))
        cubes = preprocessing.read_cubes(dataset, rows[chosen])[:, 0]
        sheet = lungaug.tile([slices(cube) for cube in cubes], 1, gap=6, paper=255)
        lungaug.write(folder / f"figure_{number}.png", lungaug.png(sheet, 48 // dataset.cube or 1))
    cubes = preprocessing.read_cubes(dataset, np.concatenate(list(dataset.positives.values()))[:24])[:, 0]
    sheet = lungaug.tile([planes(cube) for cube in cubes], 4, gap=6, paper=255)
    lungaug.write(folder / "nodules.png", lungaug.png(sheet, 2))


def pair(left, right):
    """Two cubes in [-1, 1] side by side: their middle planes, threefold, over all slices, superior to inferior."""
    halves = []
    for cube in (left, right):
        sheet, middle = slices(cube), planes(cube).repeat(3, 0).repeat(3, 1)
        middle = np.pad(middle, ((0, 3), (0, sheet.shape[1] - middle.shape[1])), constant_values=255)
        halves.append(np.concatenate([middle, sheet]))
    return lungaug.tile(halves, 2, gap=8, paper=255)


def draw_novelty(folder, run, dataset, count=6):
    """Figures 9–14: a generated positive beside its nearest training cube; and the distances, for results.json.

    The nearest is sought among all training cubes: positives with their flips, negatives as they are. For scale, the
    same distance is taken for as many real test positives: a copy of training data would be far nearer than they are.
    """
    generated = run / "classifiers" / "generated"
    accepted, rejected = (preprocessing.open_array(generated / f"positive{kind}.npy", dataset.cube)
                          for kind in ("", "_rejected"))
    chosen = accepted[np.linspace(0, len(accepted) - 1, min(count, len(accepted))).astype(int)]
    queries = preprocessing.normalize(np.concatenate([chosen, rejected])[:count])
    test = dataset.positives["test"][:count]
    held_out = preprocessing.read_cubes(dataset, test)[:, 0] if len(test) else queries[:0]
    rows, flips, labels = preprocessing.labelled(dataset, "train")
    where, distances = nearest_training(np.concatenate([queries, held_out]), dataset, rows, flips)
    nearest = preprocessing.read_cubes(dataset, rows[where[:len(queries)]], flips[where[:len(queries)]])[:, 0]
    for i, (left, right) in enumerate(zip(queries, nearest)):
        lungaug.write(folder / f"figure_{9 + i}.png", lungaug.png(pair(left, right), 48 // dataset.cube or 1))
    found = [{"figure": 9 + i, "accepted": i < len(chosen), "distance": float(distances[i]),
              "nearest_label": int(labels[where[i]]),
              "nearest_seriesuid": dataset.info["scans"][rows[where[i], 0]]["seriesuid"]}
             for i in range(len(queries))]
    return {"generated": found, "held_out_distances": distances[len(queries):].tolist()}


def distances(values):
    return ", ".join(f"{value:.1f}" for value in values)


def page(results):
    """What the report shows: the figures of sections 2 and 4, and section 5."""
    pictures = [(f"Figure {row['figure']}. Generated{'' if row['accepted'] else ', not accepted in 4.3'} (left); the "
                 f"nearest training sample, l2 distance {row['distance']:.1f} (right).", f"figure_{row['figure']}.png")
                for row in results["novelty"]["generated"]]
    captioned = [(table_title(number, table), TABLE_HEAD, table_cells(table))
                 for number, table in results["tables"].items()]
    generated, held_out = results["novelty"].values()
    nearest = [("generated", distances(row["distance"] for row in generated)),
               ("real test positives", distances(held_out))]
    return ["2.1.7 Processed samples",
            ("Nodules, each in its three middle planes: axial, coronal, sagittal.", "nodules.png"),
            ("Figure 2. Positive samples, slice by slice from superior to inferior.", "figure_2.png"),
            ("Figure 3. Negative samples, slice by slice from superior to inferior.", "figure_3.png"),
            "4.1 Wasserstein GAN: loss curves", ("Figure 7. Loss curves, smoothed, with 95% bands.", "figure_7.svg"),
            "4.4 Classifier", ("Figure 8. Training and validation loss.", "figure_8.svg"),
            "5.1 Generated samples", *pictures,
            ("The nearest training sample. A copy of it would lie at 0.", ("", "l2 distances"), nearest),
            "5.2 Classification metrics", *captioned]


def main():
    arguments = lungaug.parse(__doc__.split("\n")[0], "evaluate")
    run = arguments.run
    dataset = preprocessing.open_dataset(run)
    lungaug.settle(arguments, "evaluate", dataset.info["preset"])
    device, folder = lungaug.pick_device(arguments.device), run / "evaluation"
    draw_cubes(folder, dataset)
    draw_curves(folder, run)
    print(f"Figures 2, 3 and, as far as there are logs, 7 and 8: {folder}", flush=True)
    scores = score_test(load_networks(run, dataset, device), dataset, device)
    write_scores(folder / "scores.csv", dataset, scores)
    results = {"tables": tables(dataset, scores), "novelty": draw_novelty(folder, run, dataset)}
    for number, table in results["tables"].items():
        lungaug.print_table(table_title(number, table), TABLE_HEAD, table_cells(table))
    generated, held_out = results["novelty"].values()
    print(f"\nl2 distance to the nearest training cube: generated {distances(row['distance'] for row in generated)}; "
          f"real test positives {distances(held_out)}.")
    lungaug.write(folder / "results.json", results)
    lungaug.record_stage(folder, arguments, page(results))


if __name__ == "__main__":
    lungaug.command(main)
