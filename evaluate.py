"""Evaluation: section 5, whether generative augmentation helped, and whether its nodules are new.

    python evaluate.py --run runs/demo            # after train_classifier.py
    python evaluate.py report --run runs/demo     # draw report.html again

Scores the test set with the three classifiers and with the critic's auxiliary head: Tables 2–5
beside the thesis'. Finds the nearest real training sample of generated ones: figures 9–14. First
it draws the figures of sections 2 and 4, which need no finished training: run it at any time to
watch one. Leaves <run>/evaluation: results.json (every number of every table), scores.csv (every
test cube), figures 2, 3, 7 to 14, nodules.png; and <run>/report.html, one page of all of it.
"""

import base64
import csv
import html
import io
import itertools
import math
import sys
from pathlib import Path
from typing import NamedTuple

import lungaug

import numpy as np
import torch
from scipy.spatial.distance import cdist

import preprocessing
from models import Classifier, Critic


# 5.1 GAN generated samples: novelty

def nearest_neighbours(queries, references):
    """argmin_r ‖q − r‖₂ for each query q   [eq_5_1_nearest_neighbour]

    queries (n, …), references (m, …) of the same shape beyond the first axis, m ≥ 1.
    Returns (indices (n,), distances (n,)); of references equally near, the first.
    """
    queries = np.reshape(queries, (len(queries), -1))
    references = np.reshape(references, (len(references), -1))
    distances = cdist(queries, references)      # (n, m)

    indices = distances.argmin(1)
    return indices, distances[np.arange(len(indices)), indices]


def nearest_training(queries, dataset, rows, flips, size=128):
    """nearest_neighbours of queries (n, c, c, c) among the dataset's cubes at `rows` and `flips`.

    The cubes are read `size` at a time. Returns numbers of rows (n,) and distances (n,).
    """
    nearest = np.zeros(len(queries), int)
    smallest = np.full(len(queries), np.inf)
    progress = lungaug.Progress("nearest neighbours", len(rows))
    for start in range(0, len(rows), size):
        chunk = slice(start, start + size)
        cubes = preprocessing.read_cubes(dataset, rows[chunk], flips[chunk])[:, 0]
        indices, distances = nearest_neighbours(queries, cubes)

        # Keep what is nearer than everything before.
        nearer = distances < smallest
        nearest[nearer] = start + indices[nearer]
        smallest[nearer] = distances[nearer]
        progress.update(min(start + size, len(rows)))
    return nearest, smallest


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
    """Counts of (label, prediction): TP 1, 1; FP 0, 1; FN 1, 0; TN 0, 0   [eq_5_2_confusion]

    labels, predictions: (n,), 1 = positive.
    """
    labels = np.asarray(labels, bool)
    predictions = np.asarray(predictions, bool)
    return Confusion(
        tp=int((labels & predictions).sum()),
        fp=int((~labels & predictions).sum()),
        fn=int((labels & ~predictions).sum()),
        tn=int((~labels & ~predictions).sum()),
    )


def ratio(numerator, denominator):
    """numerator/denominator, and nan for 0/0."""
    return numerator / denominator if denominator else math.nan


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
    """2·TP/(2·TP + FP + FN), of precision and sensitivity the harmonic mean   [eq_5_2_f1]

    c: Confusion.
    """
    return ratio(2 * c.tp, 2 * c.tp + c.fp + c.fn)


def metrics(confusion):
    """Metrics(sensitivity, specificity, precision, f1) of a Confusion; nan where a ratio is 0/0."""
    return Metrics(
        sensitivity=sensitivity(confusion),
        specificity=specificity(confusion),
        precision=precision(confusion),
        f1=f1(confusion),
    )


# Tables 2–5: arm, title, and the thesis' matrix

TABLES = {
    2: ("real", "Conventional augmentation baseline",
        Confusion(1583, 2776, 50, 113451)),     # [num_table_2]
    3: ("mixed", "Generative augmentation mixed with real data",
        Confusion(1377, 750, 256, 115477)),     # [num_table_3]
    4: ("fake", "Completely fake data",
        Confusion(919, 8539, 714, 107688)),     # [num_table_4]
    5: ("critic", "Critic auxiliary classifier, no fine-tuning",
        Confusion(1215, 815, 418, 115412)),     # [num_table_5]
}
TRAINED_ARMS = ("real", "mixed", "fake")    # the critic's head is not trained again


class CriticHead(torch.nn.Module):
    """A critic's auxiliary head, as a classifier: cube (n, 1, c, c, c) → class logits (n, 2)."""

    def __init__(self, critic):
        super().__init__()
        self.critic = critic

    def forward(self, x):
        _, logits = self.critic(x)
        return logits


def report_unfinished(path, state):
    """Print a line if a training was stopped before its last epoch."""
    if state["epoch"] < state["epochs"]:
        print(f"{path}: stopped at epoch {state['epoch']} of {state['epochs']}.")


RETRAIN = "train it again with --overwrite"


def load_critic(path, dataset, remedy):
    """The critic's auxiliary head, from the GAN's checkpoint."""
    state = lungaug.load_checkpoint(path, remedy, prepared=dataset.fingerprint)
    with lungaug.refuse_on_error(path, RETRAIN):
        critic = Critic(dataset.cube, state["settings"]["width"])
        critic.load_state_dict(state["critic"])
        report_unfinished(path, state)
    return CriticHead(critic)


def load_classifier(path, dataset, classes, remedy):
    """A classifier at its best epoch.

    classes: the record of the generated cubes with which it must have been trained; None for real.
    """
    state = lungaug.load_checkpoint(path, remedy, prepared=dataset.fingerprint, generated=classes)
    with lungaug.refuse_on_error(path, RETRAIN):
        classifier = Classifier(dataset.cube)
        classifier.load_state_dict(state["best"]["classifier"])
        report_unfinished(path, state)
    return classifier


def has_cubes(arm, classes):
    """Whether the GAN made cubes of each class that an arm takes from it, as 4.3's record says."""
    names = {"mixed": ["positive"], "fake": ["positive", "negative"]}[arm]
    return all(classes[name]["accepted"] > 0 for name in names)


def load_networks(run, dataset, device):
    """arm → the network that gives its class logits, for each arm that was trained. Raises Refusal.

    All must come from this dataset and from one GAN: others may have been trained on cubes that are
    in the test set here.
    """
    # Read the record of the generated cubes, and which GAN made them.
    gan = run / "gan" / "checkpoint.pt"
    gan_crc32 = lungaug.file_crc32(gan, f"run python train_gan.py --run {run} first")
    generated_json = run / "classifiers" / "generated" / "generated.json"
    remedy = f"run python train_classifier.py --run {run} first"
    generated = lungaug.read_json(generated_json, remedy)
    with lungaug.refuse_on_error(generated_json, remedy):
        generated_settings = generated["settings"]
        classes = generated["classes"]

    # Load each arm. An arm for which the GAN made nothing was not trained.
    networks = {}
    for arm in TRAINED_ARMS:
        path = run / "classifiers" / arm / "checkpoint.pt"
        if arm == "real":
            networks[arm] = load_classifier(path, dataset, None, remedy)
        elif path.exists() or has_cubes(arm, classes):
            networks[arm] = load_classifier(path, dataset, classes, remedy)
    networks["critic"] = load_critic(gan, dataset, remedy)

    remedy = (f"run python train_classifier.py --run {run} --overwrite, which generates again and "
              "keeps the GAN")
    lungaug.require_settings(generated_json, generated_settings, {"gan_crc32": gan_crc32}, remedy)
    return {arm: network.eval().to(device) for arm, network in networks.items()}


def predict_labels(probabilities):
    """Positive where ŷ(positive) > ½   [rule_5_2_argmax]; (n,) → bool (n,)"""
    return probabilities > 0.5


def score_test(networks, dataset, device):
    """arm → the probability ŷ(positive) of each test cube, (n,)."""
    rows, flips, _ = preprocessing.labelled(dataset, "test")

    def read_cubes(numbers):
        return preprocessing.read_cubes(dataset, rows[numbers], flips[numbers])

    def probabilities(cubes):
        of_arms = [network(cubes).softmax(1)[:, 1] for network in networks.values()]
        return torch.stack(of_arms, dim=1)      # (n, arms)

    # Every arm scores a cube while it is in memory.
    scores = lungaug.predict(probabilities, read_cubes, len(rows), device)
    return dict(zip(networks, scores.T))


def write_scores(path, dataset, scores):
    """Write scores.csv: each test cube's series UID, centre, flip, label, probability of each arm.

    The centre is (x, y, z) in mm; the flip is a number from 0 to 7.
    """
    rows, flips, labels = preprocessing.labelled(dataset, "test")
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["seriesuid", "x", "y", "z", "flip", "label", *scores])
    for i, (scan, *voxel) in enumerate(rows.tolist()):
        info = dataset.info["scans"][scan]
        centre = np.array(info["origin"]) + voxel[::-1]
        centre_text = [f"{coordinate:.2f}" for coordinate in centre]
        score_text = [f"{probability[i]:.9g}" for probability in scores.values()]
        table.writerow([info["seriesuid"], *centre_text, flips[i], labels[i], *score_text])
    lungaug.write(path, text.getvalue())


def as_json(confusion):
    """A Confusion and its Metrics as JSON holds them: nan is null."""
    values = {}
    for name, value in metrics(confusion)._asdict().items():
        values[name] = None if math.isnan(value) else value
    return {"confusion": confusion._asdict(), "metrics": values}


def tables(dataset, scores):
    """Tables 2–5 as results.json holds them, each beside the thesis'.

    "flips": positives counted with their eight flips, as in the thesis; "nodules": each once.
    """
    _, flips, labels = preprocessing.labelled(dataset, "test")
    unflipped = flips == 0
    results = {}
    for number, (arm, title, thesis) in TABLES.items():
        # An arm that was not trained has the thesis' column only.
        table = {"arm": arm, "title": title, "thesis": as_json(thesis)}
        if arm in scores:
            predictions = predict_labels(scores[arm])
            table["flips"] = as_json(confusion_matrix(labels, predictions))
            table["nodules"] = as_json(confusion_matrix(labels[unflipped], predictions[unflipped]))
        results[number] = table
    return results


def table_title(number, table):
    """The title of one of Tables 2–5, and why it is empty where the arm was not trained."""
    title = f"Table {number}. {table['title']}"
    if "flips" not in table:
        title += " (not trained: no generated samples)"
    return title


TABLE_HEAD = ("", "with eight flips", "each nodule once", "thesis")
TABLE_COLUMNS = ("flips", "nodules", "thesis")


def table_cells(table):
    """One of Tables 2–5 as rows of text; – where the arm was not trained."""
    rows = []
    for group in ("confusion", "metrics"):
        for name in table["thesis"][group]:
            label = name.upper() if len(name) == 2 else name        # TP, FP, FN, TN and F1
            numbers = [table[column][group][name] if column in table else None
                       for column in TABLE_COLUMNS]
            rows.append((label, *map(lungaug.format_number, numbers)))
    return rows


# 4.1.1, 4.4.1 Figures 7 and 8: curves, SVG with strings

COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd")
CHART_WIDTH = 460
CHART_HEIGHT = 270
LEFT = 58               # of the plot in the chart, in pixels, from the chart's left
RIGHT = 446
TOP = 38
BOTTOM = 228


class Line(NamedTuple):
    """One line of a chart: its name, its points, and the band around it, if it has one."""
    name: str
    x: list             # (n,)
    y: list             # (n,)
    band: tuple = None  # low (n,), high (n,)


def ticks(low, high):
    """Round numbers within [low, high], half a dozen or so."""
    # The step is 1, 2 or 5 times a power of ten, and leaves at most nine numbers.
    power = 10 ** np.floor(np.log10(max(high - low, 1e-12)))
    for factor in (0.1, 0.2, 0.5, 1, 2):
        step = power * factor
        if (high - low) / step <= 8:
            break

    values = np.arange(np.ceil(low / step), np.floor(high / step) + 1) * step
    # Adding 0 turns −0 into 0.
    return [float(value) for value in values + 0.0]


def y_limits(lines):
    """The lowest and the highest finite value of all lines and bands, never the same."""
    values = []
    for line in lines:
        values.append(np.ravel(line.y))
        if line.band:
            values += [np.ravel(line.band[0]), np.ravel(line.band[1])]
    values = np.concatenate(values)
    values = values[np.isfinite(values)]

    low = values.min() if len(values) else 0.0
    high = values.max() if len(values) else 0.0
    if high - low <= 1e-12:
        return low - 0.5, high + 0.5
    return low, high


def x_limits(lines):
    """Where the first line begins and the last one ends."""
    return min(line.x[0] for line in lines), max(line.x[-1] for line in lines)


def chart_text(x, y, words, anchor="middle", more=""):
    """A piece of text in a chart, as SVG."""
    words = html.escape(words)
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {more}>{words}</text>'


class Axes:
    """The plot of a chart: it turns values into pixels."""

    def __init__(self, x_range, y_range):
        self.first, self.last = x_range
        self.low, self.high = y_range

    def x(self, value):
        """Pixels from the chart's left."""
        share = (value - self.first) / max(self.last - self.first, 1e-12)
        return LEFT + share * (RIGHT - LEFT)

    def y(self, value):
        """Pixels from the chart's top."""
        share = (value - self.low) / (self.high - self.low)
        return BOTTOM - share * (BOTTOM - TOP)

    def points(self, xs, ys):
        """Points as SVG lists them; those whose value is not finite are skipped."""
        pairs = []
        for x, y in zip(xs, ys):
            if np.isfinite(y):
                pairs.append(f"{self.x(x):.1f},{self.y(y):.1f}")
        return " ".join(pairs)

    def grid(self):
        """Horizontal lines with their values, and the values below the plot."""
        parts = []
        for value in ticks(self.low, self.high):
            y = self.y(value)
            parts.append(f'<path d="M{LEFT} {y:.1f}H{RIGHT}" stroke="#ddd"/>')
            parts.append(chart_text(LEFT - 5, y + 4, f"{value:g}", "end"))
        for value in ticks(self.first, self.last):
            parts.append(chart_text(self.x(value), BOTTOM + 15, f"{value:g}"))
        return "".join(parts)

    def curve(self, line, colour):
        """A line and its band."""
        parts = []
        if line.band:
            low, high = line.band
            around = f"{self.points(line.x, high)} {self.points(line.x[::-1], low[::-1])}"
            parts.append(f'<polygon fill="{colour}" fill-opacity=".2" points="{around}"/>')
        points = self.points(line.x, line.y)
        parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="1.6" '
                     f'points="{points}"/>')
        return "".join(parts)


def legend(lines):
    """The lines' names in their colours, above the plot."""
    names = []
    for line, colour in zip(lines, itertools.cycle(COLOURS)):
        names.append(f'<tspan fill="{colour}" dx="12">{html.escape(line.name)}</tspan>')
    return f'<text x="{RIGHT}" y="29" text-anchor="end">{"".join(names)}</text>'


def curves(title, lines, x_label, y_label):
    """A chart of Lines, as a group of SVG."""
    axes = Axes(x_limits(lines), y_limits(lines))
    turned = f'transform="translate(13 {CHART_HEIGHT / 2}) rotate(-90)"'
    parts = [
        f'<rect width="{CHART_WIDTH}" height="{CHART_HEIGHT}" fill="#fff"/>',
        chart_text(CHART_WIDTH / 2, 15, title),
        chart_text(CHART_WIDTH / 2, CHART_HEIGHT - 8, x_label),
        chart_text(0, 0, y_label, more=turned),
        axes.grid(),
    ]
    for line, colour in zip(lines, itertools.cycle(COLOURS)):
        parts.append(axes.curve(line, colour))
    parts.append(legend(lines))
    return f"<g>{''.join(parts)}</g>"


def side_by_side(charts, columns=2):
    """Charts of `curves` in reading order, as the text of an SVG file."""
    moved = []
    for i, chart in enumerate(charts):
        row, column = divmod(i, columns)
        place = f"translate({column * CHART_WIDTH} {row * CHART_HEIGHT})"
        moved.append(f'<g transform="{place}">{chart}</g>')

    width = min(columns, len(charts)) * CHART_WIDTH
    height = math.ceil(len(charts) / columns) * CHART_HEIGHT
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" font-family="sans-serif" font-size="11">'
            f'{"".join(moved)}</svg>')


def smooth(values, window):
    """Running mean over a centred window, and its 95% band   [rule_4_1_smoothed]

    values: (n,). The band is ±1.96 standard deviations of the values within the window. Returns the
    mean (n,) and the band's (low, high).
    """
    values = np.asarray(values, float)
    mean = np.empty(len(values))
    half_band = np.empty(len(values))
    for i in range(len(values)):
        inside = values[max(0, i - window // 2):i + window // 2 + 1]
        mean[i] = inside.mean()
        half_band[i] = 1.96 * inside.std()
    return mean, (mean - half_band, mean + half_band)


def figure_7(rows):
    """The GAN log's rows as one SVG of four charts of smoothed curves with 95% bands."""
    epochs = [row["epoch"] for row in rows]
    window = max(3, len(rows) // 40)

    def line(name, network, term):
        mean, band = smooth([row[network][term] for row in rows], window)
        return Line(name, epochs, mean, band)

    estimate = curves("Wasserstein distance estimate",
                      [line("f(real) − f(fake)", "critic", "wasserstein")], "epoch", "estimate")
    auxiliary = curves("Auxiliary classification",
                       [line("critic, reals and fakes", "critic", "auxiliary"),
                        line("generator, fakes", "generator", "auxiliary")],
                       "epoch", "cross-entropy")
    penalty = curves("Gradient penalty",
                     [line("(‖∇f‖ − 1)²", "critic", "penalty")], "epoch", "penalty")
    accuracy = curves("Class accuracy of the critic",
                      [line("on reals", "critic", "real_accuracy"),
                       line("on fakes", "critic", "fake_accuracy")], "epoch", "accuracy")
    return side_by_side([estimate, auxiliary, penalty, accuracy])


def figure_8(logs):
    """Training and validation loss of each classifier, one SVG; logs: arm → its log's rows."""
    charts = []
    for arm, rows in logs.items():
        epochs = [row["epoch"] for row in rows]
        lines = []
        for name in ("train", "validation"):
            lines.append(Line(name, epochs, [row[f"{name}_loss"] for row in rows]))
        charts.append(curves(f"Classifier, {arm} data", lines, "epoch", "cross-entropy"))
    return side_by_side(charts, columns=3)


def draw_curves(folder, run):
    """Draw figure_7.svg and figure_8.svg of the logs that exist, a running training's too."""
    remedy = "its log.jsonl is damaged: train again with --overwrite"

    gan_rows = lungaug.read_log(run / "gan" / "log.jsonl")
    if gan_rows:
        path = run / "gan"
        with lungaug.refuse_on_error(path, remedy), np.errstate(over="raise", invalid="raise"):
            lungaug.write(folder / "figure_7.svg", figure_7(gan_rows))

    logs = {}
    for arm in TRAINED_ARMS:
        rows = lungaug.read_log(run / "classifiers" / arm / "log.jsonl")
        if rows:
            logs[arm] = rows
    if logs:
        path = run / "classifiers"
        with lungaug.refuse_on_error(path, remedy), np.errstate(over="raise", invalid="raise"):
            lungaug.write(folder / "figure_8.svg", figure_8(logs))


# 2.1.7, 5.1 Figures 2, 3 and 9–14: cubes

def slices(cube, columns=12):
    """All axial slices in reading order, superior to inferior   [rule_2_1_7_reading_order]

    cube: (z, y, x) in [-1, 1], z rising to superior. Returns uint8 grey.
    """
    return lungaug.tile(lungaug.grey(cube[::-1]), columns, gap=1)


def planes(cube):
    """The middle planes of a cube (z, y, x) in [-1, 1], side by side, superior up; uint8 grey.

    They are the axial, the coronal and the sagittal one.
    """
    middle = cube.shape[0] // 2
    axial = cube[middle]
    coronal = cube[::-1, middle]
    sagittal = cube[::-1, :, middle]
    return lungaug.tile(lungaug.grey(np.stack([axial, coronal, sagittal])), 3, gap=1)


def draw_slices(path, dataset, rows, count=3):
    """Draw some of the cubes at `rows`, slice by slice: figures 2 and 3."""
    chosen = rows[lungaug.evenly(len(rows), count)]
    cubes = preprocessing.read_cubes(dataset, chosen)[:, 0]
    sheet = lungaug.tile([slices(cube) for cube in cubes], 1, gap=6, paper=255)
    lungaug.write(path, lungaug.png(sheet, lungaug.zoom(dataset.cube, 48)))


def draw_cubes(folder, dataset):
    """Draw figures 2 (positives) and 3 (negatives), and nodules.png.

    The last shows the middle planes of up to 24 nodules.
    """
    draw_slices(folder / "figure_2.png", dataset, dataset.positives["train"])
    draw_slices(folder / "figure_3.png", dataset, dataset.negatives["train"])

    all_positives = np.concatenate(list(dataset.positives.values()))
    cubes = preprocessing.read_cubes(dataset, all_positives[:24])[:, 0]
    sheet = lungaug.tile([planes(cube) for cube in cubes], 4, gap=6, paper=255)
    lungaug.write(folder / "nodules.png", lungaug.png(sheet, 2))


def pair(left, right):
    """Two cubes in [-1, 1] side by side: their middle planes, threefold, above all their slices."""
    halves = []
    for cube in (left, right):
        sheet = slices(cube)
        middle = planes(cube).repeat(3, axis=0).repeat(3, axis=1)

        # Fill up with white to the sheet's width, and leave three rows in between.
        missing_columns = sheet.shape[1] - middle.shape[1]
        middle = np.pad(middle, ((0, 3), (0, missing_columns)), constant_values=255)
        halves.append(np.concatenate([middle, sheet]))
    return lungaug.tile(halves, 2, gap=8, paper=255)


def choose_generated(run, dataset, count):
    """Generated positives for figures 9–14, in [-1, 1] (n, c, c, c), n ≤ count, and how many
    passed.

    Accepted ones, evenly chosen; where they are fewer than `count`, the best of the rejected
    follow.
    """
    folder = run / "classifiers" / "generated"
    accepted = preprocessing.open_array(folder / "positive.npy", dataset.cube)
    rejected = preprocessing.open_array(folder / "positive_rejected.npy", dataset.cube)
    chosen = accepted[lungaug.evenly(len(accepted), count)]
    cubes = np.concatenate([chosen, rejected])[:count]
    return preprocessing.normalize(cubes), len(chosen)


def draw_novelty(folder, run, dataset, count=6):
    """Draw figures 9–14: a generated positive beside its nearest training cube.

    The nearest is sought among all training cubes: positives with their flips, negatives as they
    are. For scale, the same distance is taken for up to as many real test positives, evenly chosen:
    a copy of training data would be far nearer than they are. Returns the distances, as
    results.json holds them.
    """
    # Read the generated cubes and the real ones of the test set.
    queries, n_accepted = choose_generated(run, dataset, count)
    held_out = queries[:0]
    test_rows = dataset.positives["test"]
    chosen = lungaug.evenly(len(test_rows), count)
    if len(chosen):
        test_flips = preprocessing.first_flips(dataset, "test")
        held_out = preprocessing.read_cubes(dataset, test_rows[chosen], test_flips[chosen])[:, 0]

    # Find the nearest of both in one pass over the training set.
    rows, flips, labels = preprocessing.labelled(dataset, "train")
    all_queries = np.concatenate([queries, held_out])
    nearest, distances = nearest_training(all_queries, dataset, rows, flips)

    records = []
    for i, query in enumerate(queries):
        # Draw the generated cube beside its nearest one.
        row = rows[[nearest[i]]]
        training_cube = preprocessing.read_cubes(dataset, row, flips[[nearest[i]]])[0, 0]
        picture = lungaug.png(pair(query, training_cube), lungaug.zoom(dataset.cube, 48))
        lungaug.write(folder / f"figure_{9 + i}.png", picture)

        # Record whose cube that is, and whether it has a nodule.
        scan = dataset.info["scans"][row[0, 0]]
        records.append({
            "figure": 9 + i,
            "accepted": i < n_accepted,
            "distance": float(distances[i]),
            "nearest_label": int(labels[nearest[i]]),
            "nearest_seriesuid": scan["seriesuid"],
        })
    return {"generated": records, "held_out_distances": distances[len(queries):].tolist()}


def format_distances(values):
    return ", ".join(f"{value:.1f}" for value in values)


# The page: what evaluate.py itself shows, and the report of all stages

def novelty_figures(records):
    """Figures 9–14 with their captions; records: of results.json."""
    figures = []
    for record in records:
        generated = "Generated" if record["accepted"] else "Generated, not accepted in 4.3"
        caption = (f"Figure {record['figure']}. {generated} (left); the nearest training sample, "
                   f"l2 distance {record['distance']:.1f} (right).")
        figures.append(lungaug.Figure(caption, f"figure_{record['figure']}.png"))
    return figures


def page(results):
    """What the report shows: the figures of sections 2 and 4, and section 5."""
    # List the distances, those of real nodules as the scale.
    novelty = results["novelty"]
    generated_distances = [record["distance"] for record in novelty["generated"]]
    distances = [("generated", format_distances(generated_distances)),
                 ("real test positives", format_distances(novelty["held_out_distances"]))]

    # Draw up Tables 2–5.
    metric_tables = []
    for number, table in results["tables"].items():
        title = table_title(number, table)
        metric_tables.append(lungaug.Table(title, TABLE_HEAD, table_cells(table)))

    return [
        lungaug.Heading("2.1.7 Processed samples"),
        lungaug.Figure("Nodules, each in its three middle planes: axial, coronal, sagittal.",
                       "nodules.png"),
        lungaug.Figure("Figure 2. Positive samples, slice by slice from superior to inferior.",
                       "figure_2.png"),
        lungaug.Figure("Figure 3. Negative samples, slice by slice from superior to inferior.",
                       "figure_3.png"),

        lungaug.Heading("4.1 Wasserstein GAN: loss curves"),
        lungaug.Figure("Figure 7. Loss curves, smoothed, with 95% bands.", "figure_7.svg"),

        lungaug.Heading("4.4 Classifier"),
        lungaug.Figure("Figure 8. Training and validation loss.", "figure_8.svg"),

        lungaug.Heading("5.1 Generated samples"),
        *novelty_figures(novelty["generated"]),
        lungaug.Table("Distance to the nearest training sample; 0 would be a copy.",
                      ("", "l2 distances"), distances),

        lungaug.Heading("5.2 Classification metrics"),
        *metric_tables,
    ]


PAGE_HEAD = """<!doctype html><html lang="en"><meta charset="utf-8"><title>lungaug</title><style>
body{font:15px/1.5 system-ui,sans-serif;max-width:1000px;margin:2em auto;padding:0 1em;color:#222}
h1{font-size:1.5em}h2{font-size:1.15em;border-bottom:1px solid #ccc;margin-top:2em}
table{border-collapse:collapse;margin:.6em 0}figure{margin:1em 0}
figcaption{color:#555;font-size:.9em}
td,th{padding:.15em .8em;text-align:right;border-bottom:1px solid #eee;overflow-wrap:anywhere}
td:first-child,th:first-child{text-align:left}
img,svg{max-width:100%;height:auto}img{image-rendering:pixelated}
</style><body><h1>Generative adversarial data augmentation for lung nodule detection</h1>"""

# The folders of a run whose stages leave a page, and their headings in the order of the thesis.
PAGE_FOLDERS = ("prepared", "gan", "classifiers", "evaluation")
HEADINGS = (
    "2 Dataset",
    "2.1.7 Processed samples",
    "4.1 Wasserstein GAN: loss curves",
    "4.1 Wasserstein GAN: samples through the training",
    "4.3 Generative augmentation",
    "4.4 Classifier",
    "5.1 Generated samples",
    "5.2 Classification metrics",
    "This run",
)


def escaped(text):
    """Text for the page: a file may have named itself anything."""
    return html.escape(lungaug.printable(text, 2000))


def row_html(tag, cells):
    """A row of a table; tag: th or td."""
    inner = "".join(f"<{tag}>{escaped(cell)}</{tag}>" for cell in cells)
    return f"<tr>{inner}</tr>"


def table_html(caption, head, rows):
    """A table; every cell is escaped."""
    lines = [row_html("th", head)]
    lines += [row_html("td", row) for row in rows]
    return f"<p>{escaped(caption)}</p><table>{''.join(lines)}</table>"


def figure_html(path, caption):
    """A picture, inline, with its caption; a line that says so where no stage made it."""
    if not path.exists():
        return f"<p>{escaped(caption)} (Not made in this run.)</p>"
    if path.suffix == ".svg":
        picture = path.read_text(encoding="utf-8")
    else:
        data = base64.b64encode(path.read_bytes()).decode()
        picture = f'<img src="data:image/png;base64,{data}">'
    return f"<figure>{picture}<figcaption>{escaped(caption)}</figcaption></figure>"


def item_html(item, folder):
    """A Text, Figure or Table, as options.json holds it, as HTML."""
    if item["kind"] == "figure":
        # Only a file of the stage's own folder is read, whatever options.json says.
        return figure_html(folder / Path(item["file"]).name, item["caption"])
    if item["kind"] == "table":
        return table_html(item["caption"], item["head"], item["rows"])
    return f"<p>{escaped(item['text'])}</p>"


def draw_report(run):
    """Draw <run>/report.html from the pages that the stages left, in the thesis' order.

    Returns its path. Raises Refusal where a stage has left no page.
    """
    sections = {heading: [] for heading in HEADINGS}
    for name in PAGE_FOLDERS:
        path = run / name / "options.json"
        remedy = f"run python lungaug.py --run {run} first"
        items = lungaug.read_json(path, remedy)
        # A page begins with a heading; what stands before one in a damaged page has no section.
        section = None
        with lungaug.refuse_on_error(path, remedy):
            for item in items["page"]:
                if item["kind"] == "heading":
                    section = sections.setdefault(item["text"], [])
                else:
                    section.append(item_html(item, path.parent))

    parts = [PAGE_HEAD]
    for heading, items in sections.items():
        if items:
            parts.append(f"<h2>{escaped(heading)}</h2>{''.join(items)}")
    parts.append("</body></html>\n")
    lungaug.write(run / "report.html", "".join(parts))
    return run / "report.html"


def redraw_report():
    """The command `python evaluate.py report`."""
    options = lungaug.parse("Draw report.html again.", "evaluate", words=sys.argv[2:])
    print(draw_report(options.run))


def print_results(results):
    """Print Tables 2–5 and the distances."""
    for number, table in results["tables"].items():
        lungaug.print_table(table_title(number, table), TABLE_HEAD, table_cells(table))

    novelty = results["novelty"]
    generated = format_distances(record["distance"] for record in novelty["generated"])
    held_out = format_distances(novelty["held_out_distances"])
    print(f"\nl2 distance to the nearest training cube: generated {generated}; "
          f"real test positives {held_out}.")


def main():
    if sys.argv[1:2] == ["report"]:
        redraw_report()
        return

    options = lungaug.parse(__doc__.split("\n")[0], "evaluate")
    run = options.run
    dataset = preprocessing.open_dataset(run)
    lungaug.apply_preset(options, "evaluate", dataset.info["preset"])
    device = lungaug.pick_device(options.device)
    # --precision is for the training of the GAN alone.
    lungaug.allow_tf32("float32")
    folder = run / "evaluation"

    # Draw first what needs no trained network, to look at a training that runs.
    draw_cubes(folder, dataset)
    draw_curves(folder, run)
    print(f"Wrote figures 2, 3 and (where logs exist) 7, 8 to {folder}.", flush=True)

    # Score the test set.
    networks = load_networks(run, dataset, device)
    scores = score_test(networks, dataset, device)
    write_scores(folder / "scores.csv", dataset, scores)

    # Report.
    novelty = draw_novelty(folder, run, dataset)
    results = {"tables": tables(dataset, scores), "novelty": novelty}
    print_results(results)
    lungaug.write(folder / "results.json", results)
    lungaug.save_page(folder, options, page(results))
    if all((run / name / "options.json").exists() for name in PAGE_FOLDERS):
        draw_report(run)


if __name__ == "__main__":
    lungaug.command(main)
