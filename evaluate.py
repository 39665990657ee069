"""Evaluation: section 5, whether generative augmentation helped, and whether its nodules are new.

    python evaluate.py --run runs/demo                  # after train_classifier.py
    python evaluate.py report --run runs/demo           # draw report.html again
    python evaluate.py --compare runs/demo runs/e1      # arms and loss curves of several runs

Scores the test set with the classifiers and with the critic's auxiliary head: Tables 2–5 beside the
thesis'. Finds the nearest real training sample of generated ones: figures 9–14. Beyond the thesis:
differences between the arms with intervals, operating points, and how good the generated cubes are.
First it draws the figures of sections 2 and 4, which need no finished training: run it at any time
to watch one. Leaves <run>/evaluation: results.json (every number of every table), scores.csv (every
test cube), figures 2, 3, 7 to 14, nodules.png, roc.svg, profiles.svg, in_step.png, the best nodules
and the worst errors; and <run>/report.html, one page of all of it.
"""

import argparse
import base64
import contextlib
import csv
import functools
import hashlib
import html
import io
import itertools
import json
import math
import re
import struct
import sys
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import lungaug
from lungaug import check

import numpy as np
import torch
from scipy import stats
from scipy.spatial.distance import cdist

import preprocessing
from models import Classifier, Critic, Generator, draw_latent, memory_layout


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


def read_in_parts(dataset, rows, flips, size):
    """The cubes at `rows` and `flips`, `size` at a time: start and cubes (n, c, c, c), n ≤ size.

    start: the place of the first of them in `rows`.
    """
    for start in range(0, len(rows), size):
        part = slice(start, start + size)
        yield start, preprocessing.read_cubes(dataset, rows[part], flips[part])[:, 0]


def nearest_training(queries, dataset, rows, flips, size=128):
    """nearest_neighbours of queries (n, c, c, c) among the dataset's cubes at `rows` and `flips`.

    The cubes are read `size` at a time. Returns numbers of rows (n,) and distances (n,).
    """
    nearest = np.zeros(len(queries), int)
    smallest = np.full(len(queries), np.inf)
    progress = lungaug.Progress("nearest neighbours", len(rows))
    for start, cubes in read_in_parts(dataset, rows, flips, size):
        indices, distances = nearest_neighbours(queries, cubes)

        # Keep what is nearer than everything before.
        nearer = distances < smallest
        nearest[nearer] = start + indices[nearer]
        smallest[nearer] = distances[nearer]
        progress.update(start + len(cubes))
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


def confusion_matrix(labels, predictions, weights=None):
    """Counts of (label, prediction): TP 1, 1; FP 0, 1; FN 1, 0; TN 0, 0   [eq_5_2_confusion]

    labels, predictions: (n,), 1 = positive. weights: (n,), what each counts; 1 where not given.
    """
    labels = np.asarray(labels, bool)
    predictions = np.asarray(predictions, bool)

    def count(cells):
        if weights is None:
            return int(cells.sum())
        return float(weights[cells].sum())

    return Confusion(
        tp=count(labels & predictions),
        fp=count(~labels & predictions),
        fn=count(labels & ~predictions),
        tn=count(~labels & ~predictions),
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
# The control of Table 3, which the thesis lacks: real data, in as many steps as the mixed data.
CONTROL = ("longer", "Control: real data, trained for as many steps as Table 3's")
# The critic's head is an arm, too, but is not trained again.
TRAINED_ARMS = ("real", "longer", "mixed", "fake")
CLASS_NAMES = {1: "positive", 0: "negative"}


class CriticHead(torch.nn.Module):
    """The critic's auxiliary head as a classifier, not trained further   [rule_5_2_critic_head]

    Cube (n, 1, c, c, c) in [-1, 1] → class logits (n, 2).
    """

    def __init__(self, critic):
        super().__init__()
        self.critic = critic

    def forward(self, x):
        _, logits = self.critic(x)
        return logits


def report_unfinished(path, state):
    """Print a line if a training was stopped before its last epoch, or made with a mistake."""
    if state["epoch"] < state["epochs"]:
        print(f"{path}: stopped at epoch {state['epoch']} of {state['epochs']}.")
    mistake = state["settings"].get("mistake")
    if mistake:
        print(f"{path}: made with the mistake {mistake} (tests/wrong_versions.py).")


def load_critic(path, dataset, again):
    """The critic's auxiliary head, from the GAN's checkpoint; again: the command that trains it."""
    state = lungaug.load_checkpoint(path, again, again, prepared=dataset.fingerprint)
    with lungaug.refuse_on_error(path, again):
        critic = Critic(dataset.cube, state["settings"]["width"])
        critic.load_state_dict(state["critic"])
        report_unfinished(path, state)
    return CriticHead(critic)


def load_generator(path, dataset, again):
    """The generator, from the GAN's checkpoint; again: the command that trains it."""
    state = lungaug.load_checkpoint(path, again, again, prepared=dataset.fingerprint)
    with lungaug.refuse_on_error(path, again):
        generator = Generator(dataset.cube, state["settings"]["width"])
        generator.load_state_dict(state["generator"])
    return generator


def load_classifier(path, dataset, classes, remedy, again):
    """A classifier at its best epoch.

    classes: the record of the generated cubes with which it must have been trained; None for real.
    remedy, again: the command for a checkpoint that is missing, and for one that is of no use.
    """
    state = lungaug.load_checkpoint(path, remedy, again, prepared=dataset.fingerprint,
                                    generated=classes)
    with lungaug.refuse_on_error(path, again):
        classifier = Classifier(dataset.cube)
        classifier.load_state_dict(state["best"]["classifier"])
        report_unfinished(path, state)
    return classifier


def read_generated(run, gan_crc32):
    """What 4.3 records of each class that it generated: {"positive": {"accepted", …}, "negative"}.

    Raises Refusal where the record is missing or damaged, or where another GAN made the cubes:
    gan_crc32 is the CRC-32 of this one's checkpoint.
    """
    path = run / "classifiers" / "generated" / "generated.json"
    record = lungaug.read_json(path, f"run python train_classifier.py --run {run} first")
    remedy = (f"run python train_classifier.py --run {run} --overwrite, which generates again and "
              "keeps the GAN")
    with lungaug.refuse_on_error(path, remedy):
        lungaug.require_settings(path, record["settings"], {"gan_crc32": gan_crc32}, remedy)
        classes = record["classes"]
        for name in CLASS_NAMES.values():
            is_counted = type(classes[name]["accepted"]) is int
            check(is_counted, path, f"does not say how many {name}s were accepted", remedy)
    return classes


def has_cubes(arm, classes):
    """Whether the GAN made cubes of each class that an arm takes from it; of `read_generated`."""
    names = ["positive", "negative"] if arm == "fake" else ["positive"]
    return all(classes[name]["accepted"] > 0 for name in names)


def trained_arms(run, classes):
    """The arms that were trained, or should have been; classes: of `read_generated`.

    An arm for which the GAN made nothing was not trained.
    """
    arms = []
    for arm in TRAINED_ARMS:
        path = lungaug.arm_folder(run, arm, 1) / "checkpoint.pt"
        if arm == "real" or path.exists() or has_cubes(arm, classes):
            arms.append(arm)
    return arms


def count_epochs(run, arm, repeat):
    """For how many epochs a classifier has been trained, by its log; None where there is none."""
    folder = lungaug.arm_folder(run, arm, repeat)
    if not (folder / "checkpoint.pt").exists():
        return None
    return len(lungaug.read_log(folder / "log.jsonl"))


def require_equal_epochs(run, arms):
    """Raise Refusal unless the first repeat of these arms has been trained for as many epochs.

    The control `longer` is one only while it takes as many steps as `mixed`.
    """
    counts = {arm: count_epochs(run, arm, 1) for arm in arms}
    # One that is missing is told when it is loaded.
    counts = {arm: count for arm, count in counts.items() if count is not None}
    longest = max(counts, key=counts.get, default=None)
    for arm, count in counts.items():
        check(count == counts[longest], lungaug.arm_folder(run, arm, 1),
              f"has been trained for {count} epochs, and the arm {longest} for {counts[longest]}",
              f"run python train_classifier.py --run {run} --epochs {counts[longest]}, until it "
              "ends")


def is_repeat_whole(run, arms, repeat):
    """Whether each of these arms has been trained for as many epochs as `real` at first."""
    counts = [count_epochs(run, arm, repeat) for arm in arms]
    return None not in counts and set(counts) == {count_epochs(run, "real", 1)}


def count_repeats(run, arms):
    """How many repeats of training are alike in length, in each of these arms; at least 1."""
    repeats = 1
    while is_repeat_whole(run, arms, repeats + 1):
        repeats += 1

    left_out = lungaug.arm_folder(run, "real", repeats + 1)
    if (left_out / "checkpoint.pt").exists():
        print(f"{left_out}: not counted, as an arm has fewer epochs than in the first repeat; run "
              f"python train_classifier.py --run {run} with --repeats {repeats + 1} or more.")
    return repeats


def load_networks(run, dataset, device):
    """arm → the networks that give its class logits, one per repeat. Raises Refusal.

    Arms that were not trained are missing; there is one critic. All must come from this dataset and
    from one GAN: others may have been trained on cubes that are in the test set here.
    """
    # Load the critic, and read what its GAN has generated.
    gan = run / "gan" / "checkpoint.pt"
    gan_crc32 = lungaug.file_crc32(gan, f"run python train_gan.py --run {run} first")
    critic = load_critic(gan, dataset, f"run python train_gan.py --run {run} --overwrite")
    classes = read_generated(run, gan_crc32)

    # Choose the arms and the repeats that can be compared.
    arms = trained_arms(run, classes)
    require_equal_epochs(run, arms)
    repeats = count_repeats(run, arms)

    # Load their classifiers.
    remedy = f"run python train_classifier.py --run {run} first"
    again = (f"run python train_classifier.py --run {run} --overwrite, which generates again and "
             "keeps the GAN")
    networks = {}
    for arm in arms:
        made_with = None if arm == "real" else classes
        networks[arm] = []
        for repeat in range(1, repeats + 1):
            path = lungaug.arm_folder(run, arm, repeat) / "checkpoint.pt"
            classifier = load_classifier(path, dataset, made_with, remedy, again)
            networks[arm].append(classifier.to(memory_format=memory_layout(device)))
    networks["critic"] = [critic]

    for network in itertools.chain.from_iterable(networks.values()):
        network.eval().to(device)
    return networks


def predict_labels(probabilities):
    """Positive where ŷ(positive) > ½   [rule_5_2_argmax]; (n,) → bool (n,)"""
    return probabilities > 0.5


class Scored(NamedTuple):
    """A split's cubes, and the probability ŷ(positive) that each classifier gives them.

    labels: (n,), 1 = positive; weights: (n,), of `flip_weights`; scans: (n,), the number of each
    cube's scan, from 0 on; scores: arm → (repeats, n).
    """
    labels: np.ndarray
    weights: np.ndarray
    scans: np.ndarray
    scores: dict


def score_split(networks, dataset, split, device):
    """Scored: the cubes of a split, scored by each network; networks: of `load_networks`."""
    rows, flips, labels = preprocessing.labelled(dataset, split)
    every_network = list(itertools.chain.from_iterable(networks.values()))

    def read_cubes(numbers):
        return preprocessing.read_cubes(dataset, rows[numbers], flips[numbers])

    def probabilities(cubes):
        columns = [network(cubes).softmax(1)[:, 1] for network in every_network]
        return torch.stack(columns, dim=1)      # (n, networks)

    # Every network scores a cube while it is in memory.
    columns = lungaug.predict(probabilities, read_cubes, len(rows), device).T
    # In float32 a threshold between two neighbours would be one of them.
    columns = columns.astype(float)
    scores = {}
    first = 0
    for arm, networks_of_arm in networks.items():
        scores[arm] = columns[first:first + len(networks_of_arm)]
        first += len(networks_of_arm)

    _, scans = np.unique(rows[:, 0], return_inverse=True)
    return Scored(labels, flip_weights(labels, rows), scans, scores)


def centre_mm(dataset, row):
    """Where a row (scan, z, y, x) of the dataset is: (x, y, z) in mm, (3,)."""
    scan, *voxel = row
    return np.array(dataset.info["scans"][scan]["origin"]) + voxel[::-1]


def write_scores(path, dataset, scores):
    """Write scores.csv: each test cube's series UID, centre, flip, label, probability of each arm.

    The centre is (x, y, z) in mm; the flip is a number from 0 to 7. scores: arm → (repeats, n); the
    columns of an arm are real, real_2, real_3, …
    """
    rows, flips, labels = preprocessing.labelled(dataset, "test")
    columns = {}
    for arm, repeats in scores.items():
        columns[arm] = repeats[0]
        for repeat, probabilities in enumerate(repeats[1:], 2):
            columns[f"{arm}_{repeat}"] = probabilities

    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["seriesuid", "x", "y", "z", "flip", "label", *columns])
    for i, row in enumerate(rows.tolist()):
        seriesuid = dataset.info["scans"][row[0]]["seriesuid"]
        centre_text = [f"{coordinate:.2f}" for coordinate in centre_mm(dataset, row)]
        score_text = [f"{probabilities[i]:.9g}" for probabilities in columns.values()]
        table.writerow([seriesuid, *centre_text, flips[i], labels[i], *score_text])
    lungaug.write(path, text.getvalue())


def spread(values):
    """The standard deviation over repeats; nan for one."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def summarize_repeats(confusions):
    """The mean Confusion of the repeats, their mean Metrics, and the spread of each metric.

    Returns {"confusion", "metrics", "spread"}, each {name: number}.
    """
    counts = {}
    for name in Confusion._fields:
        values = [getattr(confusion, name) for confusion in confusions]
        counts[name] = values[0] if len(values) == 1 else float(np.mean(values))

    means = {}
    spreads = {}
    for name in Metrics._fields:
        values = [getattr(metrics(confusion), name) for confusion in confusions]
        means[name] = float(np.mean(values))
        spreads[name] = spread(values)
    return {"confusion": counts, "metrics": means, "spread": spreads}


def null_for_nan(value):
    """What JSON holds for a value: null for nan, which it lacks, within lists and dicts, too."""
    if isinstance(value, dict):
        return {key: null_for_nan(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [null_for_nan(inner) for inner in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def table_of(arm, title, test):
    """One of Tables 2–5 as results.json holds it, without the thesis' column.

    "flips": positives counted with their eight flips, as in the thesis; "nodules": each nodule
    once, a flip weighing ⅛. An arm that was not trained has neither.
    """
    table = {"arm": arm, "title": title}
    if arm in test.scores:
        with_flips = []
        once = []
        for scores in test.scores[arm]:
            predictions = predict_labels(scores)
            with_flips.append(confusion_matrix(test.labels, predictions))
            once.append(confusion_matrix(test.labels, predictions, test.weights))
        table["flips"] = summarize_repeats(with_flips)
        table["nodules"] = summarize_repeats(once)
    return table


def tables(test):
    """Tables 2–5 as results.json holds them, each beside the thesis'; test: Scored."""
    return {number: table_of(arm, title, test) | {"thesis": summarize_repeats([thesis])}
            for number, (arm, title, thesis) in TABLES.items()}


def with_control(results):
    """(number, table) of Tables 2–5, and the control between the two that the thesis compares."""
    rows = []
    for number, table in results["tables"].items():
        rows.append((number, table))
        if table["arm"] == "real":
            rows.append((None, results["control"]))
    return rows


def table_title(number, table):
    """The title of one of Tables 2–5, and why it is empty where the arm was not trained."""
    title = table["title"] if number is None else f"Table {number}. {table['title']}"
    if "flips" not in table:
        title += " (not trained: no generated samples)"
    return title


def table_cell(summary, name):
    """A cell of Tables 2–5: a count or a metric of `summarize_repeats`; – where there is none."""
    if summary is None:
        return "–"
    if name in summary["confusion"]:
        return format_count(summary["confusion"][name])
    return format_spread(summary["metrics"][name], summary["spread"][name])


TABLE_HEAD = ("", "with eight flips", "each nodule once", "thesis")
TABLE_COLUMNS = ("flips", "nodules", "thesis")
# The rows of Tables 2–5: the name of each field of Confusion and Metrics on the page.
TABLE_ROWS = {
    "tp": "TP",
    "fp": "FP",
    "fn": "FN",
    "tn": "TN",
    "sensitivity": "sensitivity",
    "specificity": "specificity",
    "precision": "precision",
    "f1": "F1",
}


def table_cells(table):
    """One of Tables 2–5 as rows of text; – where there is no number."""
    columns = [table.get(column) for column in TABLE_COLUMNS]
    return [(title, *[table_cell(column, name) for column in columns])
            for name, title in TABLE_ROWS.items()]


def format_count(value):
    """A count, with one decimal where it is no whole number: the mean of repeats, or of flips."""
    return f"{value:,.1f}".removesuffix(".0")


def format_spread(mean, deviation):
    """A mean and its standard deviation, which is nan or None where there is none."""
    text = lungaug.format_number(mean)
    if deviation is None or math.isnan(deviation):
        return text
    return f"{text} ± {lungaug.format_number(deviation)}"


# Beyond the thesis: operating points. Tables 2–5 compare classifiers at one threshold each, and
# count each nodule eight times

def flip_weights(labels, rows=None):
    """⅛ for each of a nodule's eight flips, 1 for a negative   [rule_beyond_flip_weight]

    Eight flips of one nodule say little more than one of them does. labels: (n,), 1 = positive;
    rows: (n, 4), whose cubes they are. With --split cube a split has some of a nodule's flips: of k
    flips each weighs 1/k. Without rows there are eight.
    """
    is_positive = np.asarray(labels) == 1
    weights = np.where(is_positive, 1 / 8, 1.0)
    if rows is not None and is_positive.any():
        _, nodule, n_flips = np.unique(rows[is_positive], axis=0, return_inverse=True,
                                       return_counts=True)
        weights[is_positive] = 1 / n_flips[np.ravel(nodule)]
    return weights


class Counts(NamedTuple):
    """Weights of the positives (tp) and of the negatives (fp) with a score ≥ each threshold.

    thresholds: (k,), the scores that occur, falling; tp, fp: (k,); positives, negatives: the weight
    of all of them.
    """
    thresholds: np.ndarray
    tp: np.ndarray
    fp: np.ndarray
    positives: float
    negatives: float


def count_at_thresholds(labels, scores, weights=None):
    """Counts at every score that occurs; equal scores are called positive together.

    labels: (n,), 1 = positive; scores: (n,); weights: (n,), 1 each where they are not given.
    """
    labels = np.asarray(labels, bool)
    scores = np.asarray(scores, float)
    weights = np.ones(len(labels)) if weights is None else np.asarray(weights, float)
    order = np.argsort(-scores, kind="stable")
    sorted_scores = scores[order]

    # A threshold is the last of a row of equal scores.
    is_last = np.append(np.diff(sorted_scores) != 0, True)[:len(scores)]
    tp = np.cumsum((weights * labels)[order])[is_last]
    fp = np.cumsum((weights * ~labels)[order])[is_last]
    return Counts(sorted_scores[is_last], tp, fp, (weights * labels).sum(),
                  (weights * ~labels).sum())


def roc_auc(labels, scores, weights=None):
    """Σ w₊·w₋·([s₊ > s₋] + ½·[s₊ = s₋]) / (Σ w₊ · Σ w₋), over pairs   [eq_beyond_roc_auc]

    A pair is a positive and a negative: how often does the positive have the higher score? The area
    under the ROC curve (Hanley and McNeil 1982). labels: (n,), 1 = positive; scores: (n,); weights
    w: (n,), 1 each where they are not given. nan where a class is missing.
    """
    counts = count_at_thresholds(labels, scores, weights)
    tp_steps = np.diff(counts.tp, prepend=0)
    fp_steps = np.diff(counts.fp, prepend=0)

    # Of the negatives, those with a lower score than the positives of this step, and half of those
    # with the same one.
    outranked = counts.negatives - counts.fp + fp_steps / 2
    return float(ratio((tp_steps * outranked).sum(), counts.positives * counts.negatives))


def average_precision(labels, scores, weights=None):
    """Σₖ (Rₖ − Rₖ₋₁)·Pₖ over falling thresholds   [eq_beyond_average_precision]

    R is recall, which is sensitivity, and P precision. labels: (n,), 1 = positive; scores, weights:
    (n,). nan without positives.
    """
    counts = count_at_thresholds(labels, scores, weights)
    if counts.positives == 0:
        return math.nan
    recall = counts.tp / counts.positives
    precisions = counts.tp / (counts.tp + counts.fp)
    steps = np.diff(recall, prepend=0)
    return float((steps * precisions).sum())


def roc_curve(labels, scores, rates, weights=None):
    """`sensitivity_at` each of several rates of false positives, (k,).

    The scores are sorted once for all rates.
    """
    rates = np.asarray(rates, float)
    counts = count_at_thresholds(labels, scores, weights)
    if counts.positives == 0 or counts.negatives == 0:
        return np.full(len(rates), math.nan)

    # From threshold to threshold more is called positive: the last one allowed finds the most.
    n_allowed = np.searchsorted(counts.fp / counts.negatives, rates, side="right")
    most = np.append(0, counts.tp)[n_allowed]
    return most / counts.positives


def sensitivity_at(labels, scores, rate, weights=None):
    """max TP/(TP + FN) over thresholds with FP/(FP + TN) ≤ rate   [rule_beyond_sensitivity_at]

    labels: (n,), 1 = positive; scores: (n,); weights: (n,), 1 each where they are not given. nan
    where a class is missing.
    """
    sensitivities = roc_curve(labels, scores, [rate], weights)
    return float(sensitivities[0])


def best_threshold(labels, scores, weights):
    """argmaxₜ F1 of s > t, on the validation set   [rule_beyond_best_threshold]

    labels: (n,), 1 = positive; scores, weights: (n,). Returns a threshold half-way between two
    scores; ½ without positives. On the test set itself it would flatter every classifier.
    """
    counts = count_at_thresholds(labels, scores, weights)
    if counts.positives == 0:
        return 0.5
    half_f1 = counts.tp / (counts.tp + counts.fp + counts.positives)
    best = half_f1.argmax()

    # Below the lowest score, which may be 0, everything is called positive.
    lower = np.append(counts.thresholds, -math.inf)
    return float((lower[best] + lower[best + 1]) / 2)


def prior_threshold(prevalence):
    """ŷ > 1 − π, for a classifier trained on as many positives as negatives   [eq_beyond_prior]

    By Bayes: the odds ŷ/(1 − ŷ) times π/(1 − π) are above 1 there. prevalence: π, the share of
    positives where it is used. (Saerens, Latinne and Decaestecker 2002.)
    """
    return 1 - prevalence


# Beyond the thesis: differences with intervals. The unit is the scan: cubes of one scan are alike

def scan_influences(statistic, scans):
    """(S − 1)·(θ − θ₋ₛ) of each scan s of S, θ₋ₛ being θ without it   [eq_beyond_influence]

    The jackknife (Tukey 1958). statistic: gives θ of the cubes where a mask (n,) is true; scans:
    (n,), the scan of each cube, from 0 to S − 1. Returns (S,).
    """
    n_scans = scans.max() + 1
    whole = statistic(np.ones(len(scans), bool))
    without = [statistic(scans != scan) for scan in range(n_scans)]
    return (n_scans - 1) * (whole - np.array(without))


def standard_error(influences):
    """s/√S, s over the influences of S scans, (S,); nan for fewer than two scans."""
    n_scans = len(influences)
    if n_scans < 2:
        return math.nan
    return float(np.std(influences, ddof=1) / math.sqrt(n_scans))


def t_interval(estimate, influences):
    """θ ± t·s/√S, t of S − 1 degrees of freedom   [eq_beyond_t_interval]

    estimate: θ; influences: (S,), s is their standard deviation. Returns (low, high) of the 95%
    interval; nan for fewer than two scans. A percentile bootstrap of few scans is too narrow:
    tests/interval_coverage.py.
    """
    half = stats.t.ppf(0.975, len(influences) - 1) * standard_error(influences)
    return float(estimate - half), float(estimate + half)


def welch_interval(difference, errors, counts):
    """θ₁ − θ₂ ± t·√(e₁² + e₂²), for two sets of other scans   [eq_beyond_welch]

    The degrees of freedom of t are (e₁² + e₂²)²/Σ e⁴/(S − 1) (Welch 1947). errors: e, a pair of
    `standard_error`; counts: S, the scans of each. Returns (low, high) of the 95% interval.
    """
    variances = np.square(errors)
    # Two perfect classifiers have no error.
    if variances.sum() == 0:
        return difference, difference
    freedom = variances.sum() ** 2 / (variances ** 2 / (np.array(counts) - 1)).sum()
    half = stats.t.ppf(0.975, freedom) * math.sqrt(variances.sum())
    return float(difference - half), float(difference + half)


class Measured(NamedTuple):
    """F1 at argmax and AUC of one classifier, and each scan's influence on them, (S,)."""
    f1: float
    auc: float
    f1_influences: np.ndarray
    auc_influences: np.ndarray


def measure(test, scores):
    """Measured of one classifier's scores (n,) of a Scored's cubes; each nodule counts once."""
    predictions = predict_labels(scores)

    def f1_of(cubes):
        return f1(confusion_matrix(test.labels[cubes], predictions[cubes], test.weights[cubes]))

    def auc_of(cubes):
        return roc_auc(test.labels[cubes], scores[cubes], test.weights[cubes])

    everything = np.ones(len(scores), bool)
    return Measured(
        f1=f1_of(everything),
        auc=auc_of(everything),
        f1_influences=scan_influences(f1_of, test.scans),
        auc_influences=scan_influences(auc_of, test.scans),
    )


def measure_arms(test):
    """arm → the Measured of each of its repeats; test: Scored."""
    return {arm: [measure(test, scores) for scores in repeats]
            for arm, repeats in test.scores.items()}


def compare(measured, arm, other):
    """One arm minus another, in F1 and in AUC, each with a 95% interval over scans.

    measured: of `measure_arms`. Each difference is the mean over repeats, which are paired by their
    seeds; so is each scan's influence. The interval is for these trainings: it says what other test
    scans would give. What other trainings would give is not in it: `spread`, the standard deviation
    of the difference over repeats, shows that. Returns {"f1": …, "auc": …}, each {"difference",
    "low", "high", "spread"}.
    """
    pairs = list(zip(measured[arm], measured[other]))
    result = {}
    for name in ("f1", "auc"):
        differences = [getattr(a, name) - getattr(b, name) for a, b in pairs]
        influences = [getattr(a, f"{name}_influences") - getattr(b, f"{name}_influences")
                      for a, b in pairs]
        difference = float(np.mean(differences))
        low, high = t_interval(difference, np.mean(influences, axis=0))
        result[name] = {"difference": difference, "low": low, "high": high,
                        "spread": spread(differences)}
    return result


# Arm minus arm: the thesis' comparison, the fair one, and generated data alone.
COMPARED = (("mixed", "real"), ("mixed", "longer"), ("fake", "real"))


def compare_arms(measured):
    """{"mixed - real": `compare`, …} of those arms that were trained; of `measure_arms`."""
    return {f"{arm} - {other}": compare(measured, arm, other)
            for arm, other in COMPARED if arm in measured and other in measured}


def format_difference(row):
    """A difference with its interval: −0.022 [−0.045, 0.002]."""
    numbers = [lungaug.format_number(row[name], keep_sign=True)
               for name in ("difference", "low", "high")]
    return lungaug.with_minus(f"{numbers[0]} [{numbers[1]}, {numbers[2]}]")


def verdict(differences, n_scans, n_nodules):
    """Whether mixing in generated nodules is shown to help, in one sentence   [rule_beyond_verdict]

    differences: of `compare_arms`. Shown to help only where the interval of mixed − longer lies
    above 0 in F1 and in AUC: against real alone, the longer training would count as a gain. Where
    one of them lies below 0, the sentence says in what mixed is lower. The intervals are over test
    scans, for these trainings; see `compare`.
    """
    fair = differences.get("mixed - longer")
    if fair is None:
        return "Not shown to help: no classifier was trained on real and generated data."

    is_shown = all(row["low"] > 0 for row in fair.values())
    start = "Shown to help" if is_shown else "Not shown to help"
    lower = [name.upper() for name, row in fair.items() if row["high"] < 0]
    if lower:
        start += f" (lower in {' and '.join(lower)})"
    return (f"{start}: mixed − longer is {format_difference(fair['f1'])} in F1 and "
            f"{format_difference(fair['auc'])} in AUC (95% intervals for these trainings; "
            f"{preprocessing.counted(n_scans, 'test scan')} with "
            f"{preprocessing.counted(n_nodules, 'nodule')}).")


# 0.1%, 1%, 5%, and those of the thesis' Tables 3 and 2.
FALSE_POSITIVE_RATES = (0.001, 0.0065, 0.01, 0.0239, 0.05)


def f1_above(test, scores, threshold):
    """F1 where ŷ > threshold is called positive; each nodule counts once."""
    return f1(confusion_matrix(test.labels, scores > threshold, test.weights))


def operating_points(test, scores, measured, validation_threshold, prevalence):
    """What one classifier reaches on the test set: {name: value}. Each nodule counts once.

    scores: (n,); measured: of `measure`; validation_threshold: of `best_threshold`; prevalence: π,
    of the training set. No threshold of F1 depends on the test set.
    """
    row = {
        "f1_argmax": measured.f1,
        "f1_validation": f1_above(test, scores, validation_threshold),
        "f1_prior": f1_above(test, scores, prior_threshold(prevalence)),
        "auc": measured.auc,
        "average_precision": average_precision(test.labels, scores, test.weights),
    }
    for rate in FALSE_POSITIVE_RATES:
        row[f"sensitivity_at_{rate}"] = sensitivity_at(test.labels, scores, rate, test.weights)
    return row


def chosen_threshold(arm, repeat, test, validation):
    """The threshold of a repeat of an arm: that of the best F1 on the validation set.

    test, validation: Scored.
    """
    return best_threshold(validation.labels, validation.scores[arm][repeat], validation.weights)


def summarize_arm(arm, test, validation, measured, prevalence):
    """`operating_points` of an arm: {name: {"mean", "spread"}} over its repeats.

    measured: of `measure_arms`.
    """
    rows = []
    for repeat, scores in enumerate(test.scores[arm]):
        threshold = chosen_threshold(arm, repeat, test, validation)
        rows.append(operating_points(test, scores, measured[arm][repeat], threshold, prevalence))

    summary = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        summary[name] = {"mean": float(np.mean(values)), "spread": spread(values)}

    # F1 and AUC have an interval over the scans, too.
    for name, entry in (("f1", summary["f1_argmax"]), ("auc", summary["auc"])):
        repeats = [getattr(row, f"{name}_influences") for row in measured[arm]]
        influences = np.mean(repeats, axis=0)
        low, high = t_interval(entry["mean"], influences)
        # Neither can be below 0 or above 1. nan stays.
        entry["low"] = float(np.maximum(low, 0))
        entry["high"] = float(np.minimum(high, 1))
        entry["error"] = standard_error(influences)
    return summary


def training_prevalence(dataset):
    """π, the share of nodules among the training cubes, each nodule counted once."""
    rows, _, labels = preprocessing.labelled(dataset, "train")
    weights = flip_weights(labels, rows)
    return float(weights[labels == 1].sum() / weights.sum())


# Beyond the thesis: are the generated cubes any good? Five measures, each sees other faults

def radial_profile(cubes):
    """h(r), the mean HU of a cube's voxels about r mm from its centre   [eq_beyond_radial_profile]

    cubes: (n, c, c, c) in [-1, 1], with 1 mm voxels; distances are rounded. Returns the mean and
    the standard deviation over the cubes, (c/2,) each, for r = 0, 1, …, c/2 − 1.
    """
    *_, side = cubes.shape
    steps = np.arange(side) - side // 2
    z, y, x = np.meshgrid(steps, steps, steps, indexing="ij")
    shell = np.rint(np.sqrt(z ** 2 + y ** 2 + x ** 2)).astype(int)

    profiles = np.empty((len(cubes), side // 2))
    for radius in range(side // 2):
        profiles[:, radius] = preprocessing.denormalize(cubes[:, shell == radius]).mean(axis=1)
    return profiles.mean(axis=0), profiles.std(axis=0)


def profile_difference(cubes, references):
    """max |h(r) − h_real(r)| for r ≤ c/3, in HU   [rule_beyond_profile_difference]

    cubes, references: (n, c, c, c) in [-1, 1]; references are real. Farther out lies what surrounds
    a nodule.
    """
    mean, _ = radial_profile(cubes)
    reference_mean, _ = radial_profile(references)
    *_, side = cubes.shape
    farthest = side // 3
    return float(np.abs(mean - reference_mean)[:farthest + 1].max())


def share_called_positive(probabilities):
    """Which share the real-trained classifier calls positive, ŷ > ½   [rule_beyond_called_positive]

    probabilities: ŷ(positive), (n,). It should be near that of real positives, or of negatives.
    """
    return float(predict_labels(probabilities).mean())


def pairwise_distances(queries, references):
    """‖q − r‖₂ = √(‖q‖² + ‖r‖² − 2·q·r) for each query and reference   [eq_beyond_distances]

    queries (n, …), references (m, …). Returns (n, m). As a matrix product it takes a hundredth of
    the time of differences; in float64 a copy lies within 10⁻⁴ of 0.
    """
    queries = np.reshape(queries, (len(queries), -1)).astype(float, copy=False)
    references = np.reshape(references, (len(references), -1)).astype(float, copy=False)
    query_squares = np.einsum("ij,ij->i", queries, queries)
    reference_squares = np.einsum("ij,ij->i", references, references)

    products = queries @ references.T
    squares = query_squares[:, None] + reference_squares - 2 * products
    return np.sqrt(np.maximum(squares, 0))


def distances_to_training(kinds, dataset, rows, flips, size=128):
    """kind → distances (n, m) of its cubes to the training cubes at `rows` and `flips`, (m,).

    kinds: kind → cubes (n, c, c, c). `size` training cubes are in memory at a time.
    """
    parts = {kind: [] for kind in kinds}
    for _, training in read_in_parts(dataset, rows, flips, size):
        for kind, cubes in kinds.items():
            parts[kind].append(pairwise_distances(cubes, training))
    return {kind: np.concatenate(blocks, axis=1) for kind, blocks in parts.items()}


def copy_ratio(distances):
    """The mean of d₁/d₂, nearest over second nearest training distance   [eq_beyond_copy_ratio]

    distances: (n, m) of n cubes to the training set. Near 1 for what lies between training cubes,
    0 for a copy of one.
    """
    nearest, second = np.sort(distances, axis=1)[:, :2].T
    # Two equal training cubes say nothing about a copy.
    ratios = np.divide(nearest, second, out=np.ones(len(second)), where=second > 0)
    return float(ratios.mean())


def copying_test(generated, held_out):
    """Z = (U − nm/2)/√(nm(n + m + 1)/12), U = #{L(q) > L(p)} + ½#{=}   [eq_beyond_copying_test]

    C_T of Meehan, Chaudhuri and Dasgupta (2020), with the class as its only cell. generated L(q),
    held_out L(p): distances to the nearest training cube, (n,), (m,). Far below 0, about -3, where
    generated cubes lie nearer to the training set than held-out ones do: copies. Far above 0 where
    they lie farther away. nan without held-out ones, as where each of them was trained on, too.
    """
    n = len(generated)
    m = len(held_out)
    if n == 0 or m == 0:
        return math.nan
    ranks = stats.rankdata(np.concatenate([generated, held_out]))
    u = ranks[:n].sum() - n * (n + 1) / 2
    return float((u - n * m / 2) / math.sqrt(n * m * (n + m + 1) / 12))


def two_sample_accuracy(cubes, references):
    """Share of the union whose nearest other cube is of its own set   [eq_beyond_two_sample]

    Leave-one-out 1-nearest-neighbour accuracy (Lopez-Paz and Oquab 2017). cubes, references:
    (n, c, c, c), as many of each. ½ where both are alike, 1 where they are apart, 0 for copies.
    Of one and the same fault it rises a little with n: compare sets of one size.
    """
    union = np.concatenate([cubes, references], dtype=float)
    is_reference = np.arange(len(union)) >= len(cubes)
    distances = pairwise_distances(union, union)
    np.fill_diagonal(distances, np.inf)
    nearest = distances.argmin(axis=1)
    return float((is_reference[nearest] == is_reference).mean())


def frechet_distance(features, references):
    """‖μ₁ − μ₂‖² + Tr(Σ₁ + Σ₂ − 2·(Σ₁Σ₂)^½)   [eq_beyond_frechet]

    Of features of two sets, (n, k) and (m, k) (Heusel et al. 2017), here of the real-trained
    classifier. It depends on n: compare only sets of one size.
    """
    mean_difference = features.mean(axis=0) - references.mean(axis=0)
    covariance = np.cov(features, rowvar=False)
    reference_covariance = np.cov(references, rowvar=False)

    # The trace of a root is the sum of the eigenvalues' roots; they are ≥ 0 but for rounding.
    eigenvalues = np.linalg.eigvals(covariance @ reference_covariance).real
    trace_of_root = np.sqrt(np.maximum(eigenvalues, 0)).sum()
    traces = np.trace(covariance) + np.trace(reference_covariance)
    distance = mean_difference @ mean_difference + traces - 2 * trace_of_root
    # Of a set and itself, rounding may leave a little less than nothing.
    return float(max(distance, 0))


class Quality(NamedTuple):
    """A row of the table of quality: n cubes of a kind against training cubes of their class.

    centre_hu, centre_spread: mean and standard deviation over the cubes. profile_difference: in HU.
    copying: C_T.
    """
    n: int
    centre_hu: float
    centre_spread: float
    profile_difference: float
    called_positive: float
    copy_ratio: float
    copying: float
    two_sample: float
    frechet: float


class RealCubes(NamedTuple):
    """The real cubes that generated ones are compared with.

    references: (n, c, c, c), training cubes, each nodule in one of its flips. reference_features:
    (k, 64), the classifier's, of as many of them as the Fréchet distance takes. held_out_nearest:
    (j,), from each held-out cube that is not in the training set to the nearest training cube.
    """
    references: np.ndarray
    reference_features: np.ndarray
    held_out_nearest: np.ndarray


def assess(cubes, distances, real, classifier, device):
    """The Quality of cubes (n, c, c, c) in [-1, 1], by the real-trained classifier and RealCubes.

    distances: (n, m) to the training cubes of the class, of `training_cubes`.
    """
    mean, deviation = radial_profile(cubes)
    probabilities, features = classify(classifier, cubes, device)

    # Compare as many cubes of either set.
    n_pairs = min(len(cubes), len(real.references))
    n_features = len(real.reference_features)
    return Quality(
        n=len(cubes),
        centre_hu=float(mean[0]),
        centre_spread=float(deviation[0]),
        profile_difference=profile_difference(cubes, real.references),
        called_positive=share_called_positive(probabilities),
        copy_ratio=copy_ratio(distances),
        copying=copying_test(distances.min(axis=1), real.held_out_nearest),
        two_sample=two_sample_accuracy(evenly_chosen(cubes, n_pairs),
                                       evenly_chosen(real.references, n_pairs)),
        frechet=frechet_distance(evenly_chosen(features, n_features), real.reference_features),
    )


def evenly_chosen(items, most):
    """At most `most` of the items, evenly spaced."""
    return items[lungaug.evenly(len(items), most)]


def reader(cubes):
    """The function that `lungaug.predict` reads cubes (n, c, c, c) in [-1, 1] with."""
    return lambda numbers: np.float32(cubes[numbers])[:, None]


def classify(classifier, cubes, device):
    """The probabilities ŷ(positive) (n,) and the features (n, 64) that a classifier gives cubes."""
    *layers, last = classifier

    def outputs(x):
        features = torch.nn.Sequential(*layers)(x)
        probability = last(features).softmax(1)[:, 1:]
        return torch.cat([probability, features], dim=1)

    both = lungaug.predict(outputs, reader(cubes), len(cubes), device)
    return both[:, 0], both[:, 1:]


# At most this many cubes of a kind are assessed.
MOST_CUBES = 256
# Negatives are compared with at most this many of the training set, positives with all of theirs.
MOST_NEGATIVES = 2048


def training_cubes(dataset, label):
    """The training cubes that a generated one may be a copy of: rows (m, 4) and flips (m,).

    Nodules have all eight flips, with --split cube, too, where the GAN sees only some of them: a
    mirrored copy is a copy. So a cube and its flips are equally far from the nearest. Of the
    negatives, which the GAN sees as they are, at most MOST_NEGATIVES are taken, evenly chosen.
    """
    if label == 1:
        return preprocessing.with_flips(dataset.positives["train"])
    rows = evenly_chosen(dataset.negatives["train"], MOST_NEGATIVES)
    return rows, np.zeros(len(rows), int)


def one_flip_each(dataset, split, seed):
    """For each of a split's nodules one of its flips, drawn evenly   [rule_beyond_quality_flips]

    The GAN is trained on flipped nodules, and generates such. With an even side c a flip moves the
    centre from voxel c/2 to c/2 − 1: beside unflipped ones a perfect generator would fail. With
    --split cube the flips are those that lie in the split. Returns (n,).
    """
    rng = lungaug.stream(seed, "quality flips", split)
    is_in_split = np.ones((len(dataset.positives[split]), len(preprocessing.FLIPS)), bool)
    if dataset.flips is not None:
        is_in_split = dataset.flips[split]

    # Draw a lot for each flip; the highest wins.
    lots = np.where(is_in_split, rng.random(is_in_split.shape), -np.inf)
    return lots.argmax(axis=1)


def compared_with(dataset, label, split, seed):
    """The real cubes that generated ones are compared with: rows (n, 4) and flips (n,).

    At most MOST_CUBES of a class of a split, evenly chosen; each nodule once, in one of its flips.
    """
    if label == 1:
        rows = dataset.positives[split]
        flips = one_flip_each(dataset, split, seed)
    elif split == "train":
        # Of those to which distances are taken, so that a copy of one lies at 0.
        rows, flips = training_cubes(dataset, label)
    else:
        rows = dataset.negatives[split]
        flips = np.zeros(len(rows), int)
    return evenly_chosen(rows, MOST_CUBES), evenly_chosen(flips, MOST_CUBES)


def are_new(rows, seen):
    """Which of the rows (n, 4) are not among the rows `seen` (m, 4): bool (n,)"""
    seen = set(map(tuple, seen.tolist()))
    return np.array([tuple(row) not in seen for row in rows.tolist()], bool)


@torch.no_grad()
def generate_unselected(generator, label, count, seed, device):
    """Cubes of a class as the generator makes them, before any selection.

    Returns (count, c, c, c) in [-1, 1].
    """
    rng = lungaug.torch_stream(seed, "quality", label)
    labels = torch.full((count,), label)
    latent = draw_latent(labels, rng)
    parts = [generator(part.to(device))[:, 0].cpu().numpy() for part in latent.split(64)]
    return np.concatenate(parts)


def kinds_of_cubes(accepted, unselected, references, held_out, rng):
    """What is assessed of a class: kind → cubes (n, c, c, c). The last three are faults on purpose.

    accepted, unselected: generated cubes; references, held_out: real ones; each (n, c, c, c) in
    [-1, 1], as what is returned is. rng: for the noise.
    """
    noise = rng.normal(references.mean(), references.std(), references.shape)
    return {
        "held-out real": held_out,
        "generated and accepted": accepted,
        "generated, before selection": unselected,
        "noise": np.clip(noise, -1, 1).astype(np.float32),
        "copies of training cubes": references,
        "one real cube, repeated": np.repeat(held_out[:1], len(references), axis=0),
    }


def score_selection(critic, classifier, cubes, device):
    """Spearman's ρ between f(x) and ŷ(positive) of generated positives   [eq_beyond_selection]

    Below 0 the critic's score prefers cubes of which the real-trained classifier is less sure.
    cubes: (n, c, c, c) in [-1, 1]. nan where either is constant.
    """
    scores = lungaug.predict(lambda x: critic(x)[0], reader(cubes), len(cubes), device)
    probabilities, _ = classify(classifier, cubes, device)
    if np.ptp(scores) == 0 or np.ptp(probabilities) == 0:
        return math.nan
    return float(stats.spearmanr(scores, probabilities).statistic)


class Assessed(NamedTuple):
    """What is known of the generated cubes of one class.

    qualities: kind → Quality; profiles: kind → mean and standard deviation of h(r), (c/2,) each;
    unselected: the cubes before selection, (n, c, c, c) in [-1, 1].
    """
    qualities: dict
    profiles: dict
    unselected: np.ndarray


def assess_class(label, run, dataset, generator, classifier, seed, device):
    """Assessed: the cubes of one class; classifier: the real-trained one."""
    name = CLASS_NAMES[label]

    # Read real cubes to compare with, of the training set and of the test set.
    reference_rows, reference_flips = compared_with(dataset, label, "train", seed)
    references = preprocessing.read_cubes(dataset, reference_rows, reference_flips)[:, 0]
    held_out_rows, held_out_flips = compared_with(dataset, label, "test", seed)
    held_out = preprocessing.read_cubes(dataset, held_out_rows, held_out_flips)[:, 0]

    # Read and make the generated ones.
    path = run / "classifiers" / "generated" / f"{name}.npy"
    accepted = evenly_chosen(preprocessing.open_array(path, dataset.cube), MOST_CUBES)
    unselected = generate_unselected(generator, label, MOST_CUBES, seed, device)

    rng = lungaug.stream(seed, "quality", name)
    kinds = kinds_of_cubes(preprocessing.normalize(accepted), unselected, references, held_out, rng)

    # A mean or a covariance takes two cubes or more.
    kinds = {kind: cubes for kind, cubes in kinds.items() if len(cubes) > 1}

    # With --split cube a test nodule may be in the training set, in another flip: then it does not
    # tell how near a new one lies.
    training_rows, training_flips = training_cubes(dataset, label)
    distances = distances_to_training(kinds, dataset, training_rows, training_flips)
    held_out_nearest = distances["held-out real"].min(axis=1)
    held_out_nearest = held_out_nearest[are_new(held_out_rows, training_rows)]

    # The Fréchet distance of every kind is of as many cubes.
    n_features = min(len(held_out), len(references))
    _, features = classify(classifier, evenly_chosen(references, n_features), device)
    real = RealCubes(references, features, held_out_nearest)
    qualities = {kind: assess(cubes, distances[kind], real, classifier, device)
                 for kind, cubes in kinds.items()}
    profiles = {"real": radial_profile(references)}
    for kind in ("generated and accepted", "generated, before selection"):
        if kind in kinds:
            profiles[kind] = radial_profile(kinds[kind])
    return Assessed(qualities, profiles, unselected)


def assess_generated(run, dataset, networks, seed, device):
    """The quality of the generated cubes of both classes; networks: of `load_networks`.

    Returns what results.json holds, and class → profiles, for the figure. A class of which the test
    set has fewer than two cubes is not assessed.
    """
    # The volumes that were read so far stay mapped, and count as memory.
    preprocessing.open_array.cache_clear()

    path = run / "gan" / "checkpoint.pt"
    again = f"run python train_gan.py --run {run} --overwrite"
    generator = load_generator(path, dataset, again).eval().to(device)
    classifier = networks["real"][0]
    critic_head = networks["critic"][0]

    quality = {}
    profiles = {}
    for label, name in CLASS_NAMES.items():
        rows = dataset.positives if label == 1 else dataset.negatives
        if len(rows["test"]) < 2 or len(rows["train"]) < 2:
            continue
        assessed = assess_class(label, run, dataset, generator, classifier, seed, device)
        quality[name] = {kind: row._asdict() for kind, row in assessed.qualities.items()}
        profiles[name] = assessed.profiles
        if label == 1:
            quality["selection"] = score_selection(critic_head.critic, classifier,
                                                   assessed.unselected, device)
    return quality, profiles


# 4.1.1, 4.4.1 Figures 7 and 8: curves, SVG with strings

COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#7f7f7f")
# In pixels: the size of a chart, and where its plot lies, from the chart's left and top.
CHART_WIDTH = 460
CHART_HEIGHT = 270
LEFT = 58
RIGHT = 446
TOP = 38
BOTTOM = 228


class Line(NamedTuple):
    """One line of a chart: its name, its points, and the band around it, if it has one.

    x, y: (n,); band: low (n,) and high (n,). A dashed line lets another one show through.
    """
    name: str
    x: list
    y: list
    band: tuple = None
    dashed: bool = False


class Point(NamedTuple):
    """One point of a chart, with its name beside it."""
    name: str
    x: float
    y: float
    colour: str


class Mark(NamedTuple):
    """A value of x at which something changes, with its name."""
    name: str
    x: float


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
            parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{RIGHT}" stroke="#ddd"/>')
            parts.append(chart_text(LEFT - 5, y + 4, f"{value:g}", "end"))
        for value in ticks(self.first, self.last):
            parts.append(chart_text(self.x(value), BOTTOM + 15, f"{value:g}"))
        return "".join(parts)

    def mark(self, mark):
        """A Mark: a dashed line across the plot, and its name at the top."""
        x = self.x(mark.x)
        anchor = "start" if x < (LEFT + RIGHT) / 2 else "end"
        place = x + 4 if anchor == "start" else x - 4
        line = f'<path class="mark" d="M{x:.1f} {TOP}V{BOTTOM}" stroke="#777" '
        return (f'{line}stroke-dasharray="4 3"/>'
                f'{chart_text(place, TOP + 10, mark.name, anchor)}')

    def curve(self, line, colour):
        """A line and its band."""
        parts = []
        if line.band:
            low, high = line.band
            around = f"{self.points(line.x, high)} {self.points(line.x[::-1], low[::-1])}"
            parts.append(f'<polygon fill="{colour}" fill-opacity=".2" points="{around}"/>')
        points = self.points(line.x, line.y)
        name = html.escape(line.name)
        dashes = 'stroke-dasharray="4 4" ' if line.dashed else ""
        parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="1.6" {dashes}'
                     f'data-name="{name}" points="{points}"/>')
        return "".join(parts)

    def dot(self, point):
        """A Point, and its name beside it."""
        x = self.x(point.x)
        y = self.y(point.y)
        circle = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{point.colour}" stroke="#fff"/>'
        return circle + chart_text(x + 7, y + 4, point.name, "start")


def legend(lines):
    """The lines' names in their colours, above the plot."""
    names = []
    for line, colour in zip(lines, itertools.cycle(COLOURS)):
        names.append(f'<tspan fill="{colour}" dx="12">{html.escape(line.name)}</tspan>')
    return f'<text x="{RIGHT}" y="29" text-anchor="end">{"".join(names)}</text>'


def curves(title, lines, x_label, y_label, points=(), marks=(), y_range=None):
    """A chart of Lines, Points and Marks, as a group of SVG.

    y_range: (low, high) of the y axis, for charts that are compared; by default that of the lines.
    The group says its ranges, so that the page's script can turn pixels into values.
    """
    dots = [Line(point.name, [point.x], [point.y]) for point in points]
    axes = Axes(x_limits(lines), y_range or y_limits([*lines, *dots]))
    turned = f'transform="translate(13 {CHART_HEIGHT / 2}) rotate(-90)"'
    parts = [
        f'<rect class="chart-paper" width="{CHART_WIDTH}" height="{CHART_HEIGHT}" fill="#fff"/>',
        chart_text(CHART_WIDTH / 2, 15, title),
        chart_text(CHART_WIDTH / 2, CHART_HEIGHT - 8, x_label),
        chart_text(0, 0, y_label, more=turned),
        axes.grid(),
    ]
    for line, colour in zip(lines, itertools.cycle(COLOURS)):
        parts.append(axes.curve(line, colour))
    parts += [axes.dot(point) for point in points]
    parts += [axes.mark(mark) for mark in marks]
    parts.append(legend(lines))
    ranges = (f'data-x="{axes.first:g} {axes.last:g}" data-y="{axes.low:.9g} {axes.high:.9g}" '
              f'data-label="{html.escape(x_label)}"')
    return f'<g class="chart" {ranges}>{"".join(parts)}</g>'


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
            f'width="{width}" height="{height}" font-family="sans-serif" font-size="12">'
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


# The values that a term can have; a band of ±1.96 standard deviations may reach beyond them.
POSSIBLE = {
    "wasserstein": (-np.inf, np.inf),
    "auxiliary": (0, np.inf),
    "penalty": (0, np.inf),
    "real_accuracy": (0, 1),
    "fake_accuracy": (0, 1),
}


def gan_line(name, rows, network, term):
    """A term of a network's loss through the GAN log's rows, as a smoothed Line with its band.

    The band is cut off at the values that the term can have.
    """
    epochs = [row["epoch"] for row in rows]
    window = max(3, len(rows) // 40)
    mean, (low, high) = smooth([row[network][term] for row in rows], window)
    lowest, highest = POSSIBLE[term]
    return Line(name, epochs, mean, (np.maximum(low, lowest), np.minimum(high, highest)))


def alpha_marks(rows):
    """A Mark at each epoch of the GAN log's rows from which α has another value."""
    marks = []
    for before, row in itertools.pairwise(rows):
        if row.get("alpha") != before.get("alpha"):
            marks.append(Mark(f"α = {row['alpha']:g}", row["epoch"]))
    return marks


# The charts of figure 7: title, label of the y axis, and lines, each a name, a network and a term.
GAN_CHARTS = (
    ("Wasserstein distance estimate", "estimate",
     [("f(real) − f(fake)", "critic", "wasserstein")]),
    ("Auxiliary classification", "cross-entropy",
     [("critic, reals and fakes", "critic", "auxiliary"),
      ("generator, fakes", "generator", "auxiliary")]),
    ("Gradient penalty", "penalty",
     [("(‖∇f‖ − 1)²", "critic", "penalty")]),
    ("Class accuracy of the critic", "accuracy",
     [("on reals", "critic", "real_accuracy"),
      ("on fakes", "critic", "fake_accuracy")]),
)
# With a line per run there is room for one term of the critic in each: title, label, term.
GAN_CHARTS_OF_RUNS = (
    ("Wasserstein distance estimate", "estimate", "wasserstein"),
    ("Auxiliary classification of the critic", "cross-entropy", "auxiliary"),
    ("Gradient penalty", "penalty", "penalty"),
    ("Class accuracy of the critic on fakes", "accuracy", "fake_accuracy"),
)


def figure_7(rows):
    """The GAN log's rows as one SVG of four charts of smoothed curves with 95% bands."""
    marks = alpha_marks(rows)
    charts = []
    for title, y_label, terms in GAN_CHARTS:
        lines = [gan_line(name, rows, network, term) for name, network, term in terms]
        charts.append(curves(title, lines, "epoch", y_label, marks=marks))
    return side_by_side(charts)


def figure_7_of_runs(logs):
    """Figure 7 of several runs in one SVG, a line per run; logs: name → the GAN log's rows."""
    charts = []
    for title, y_label, term in GAN_CHARTS_OF_RUNS:
        lines = [gan_line(name, rows, "critic", term) for name, rows in logs.items()]
        charts.append(curves(title, lines, "epoch", y_label))
    return side_by_side(charts)


def figure_8(logs):
    """Training and validation loss of each classifier, one SVG; logs: arm → its log's rows.

    All charts have one y axis, so that their heights compare; the epoch that is kept is marked.
    """
    arm_lines = {}
    for arm, rows in logs.items():
        epochs = [row["epoch"] for row in rows]
        arm_lines[arm] = []
        for name in ("train", "validation"):
            losses = [row[f"{name}_loss"] for row in rows]
            arm_lines[arm].append(Line(name, epochs, losses))
    y_range = y_limits(itertools.chain.from_iterable(arm_lines.values()))

    charts = []
    for arm, lines in arm_lines.items():
        kept = kept_epoch(logs[arm])
        charts.append(curves(f"Classifier, {arm} data", lines, "epoch", "cross-entropy",
                             marks=[Mark(f"kept: {kept}", kept)], y_range=y_range))
    return side_by_side(charts)


def kept_epoch(rows):
    """The epoch of a classifier's log whose weights are kept, as `train_classifier.keep_best`."""
    best = max(rows, key=lambda row: (row["validation_f1"], -row["validation_loss"]))
    return best["epoch"]


def figure_roc(test):
    """ROC curves of the arms, each the mean over repeats, and the thesis' Tables 2–5, one SVG.

    The whole curves, and the part below a false positive rate of 10%, where the thesis' points lie,
    each in the colour of its arm.
    """
    colours = dict(zip(test.scores, COLOURS))
    points = []
    for number, (arm, _, thesis) in TABLES.items():
        colour = colours.get(arm, "#444")
        rate = 1 - specificity(thesis)
        points.append(Point(f"Table {number}", rate, sensitivity(thesis), colour))

    charts = []
    for widest in (1.0, 0.1):
        rates = np.linspace(0, widest, 101)
        lines = []
        for arm, repeats in test.scores.items():
            sensitivities = [roc_curve(test.labels, scores, rates, test.weights)
                             for scores in repeats]
            lines.append(Line(arm, rates, np.mean(sensitivities, axis=0)))
        # The points of the thesis lie too close to each other in the whole curve.
        shown = points if widest < 1 else ()
        title = "ROC" if widest == 1 else "ROC, few false positives"
        charts.append(curves(title, lines, "false positive rate", "sensitivity", shown))
    return side_by_side(charts)


def figure_profiles(profiles):
    """Mean HU by distance from the centre, with ± a standard deviation, a chart a class, one SVG.

    profiles: class → kind → (mean, standard deviation), of `assess_generated`. Where nearly all
    cubes are accepted, those before selection hardly differ: they are dashed, without a band.
    """
    charts = []
    for name, kinds in profiles.items():
        lines = []
        for kind, (mean, deviation) in kinds.items():
            radii = np.arange(len(mean))
            if kind == "generated, before selection":
                lines.append(Line("before selection", radii, mean, dashed=True))
            else:
                short = kind.removeprefix("generated and ")
                band = (mean - deviation, mean + deviation)
                lines.append(Line(short, radii, mean, band))
        charts.append(curves(f"HU of {name}s by distance", lines, "mm from the centre", "HU"))
    return side_by_side(charts)


@contextlib.contextmanager
def refuse_damaged_log(run, folder, script):
    """Turn what a damaged log in <run>/<folder> raises, an overflow too, into a Refusal.

    script: the one that writes it anew.
    """
    again = f"its log.jsonl is damaged: run python {script} --run {run} --overwrite"
    with lungaug.refuse_on_error(run / folder, again), np.errstate(over="raise", invalid="raise"):
        yield


def draw_curves(folder, run):
    """Draw figure_7.svg and figure_8.svg of the logs that exist, a running training's too.

    A figure of a log that is gone is removed.
    """
    lungaug.remove(folder, "figure_7.svg", "figure_8.svg")

    gan_rows = lungaug.read_log(run / "gan" / "log.jsonl")
    if gan_rows:
        with refuse_damaged_log(run, "gan", "train_gan.py"):
            lungaug.write(folder / "figure_7.svg", figure_7(gan_rows))

    logs = {}
    for arm in TRAINED_ARMS:
        rows = lungaug.read_log(run / "classifiers" / arm / "log.jsonl")
        if rows:
            logs[arm] = rows
    if logs:
        with refuse_damaged_log(run, "classifiers", "train_classifier.py"):
            lungaug.write(folder / "figure_8.svg", figure_8(logs))


# 2.1.7, 5.1 Figures 2, 3 and 9–14: cubes

# Cubes that figures 2 and 3 show, each.
SLICED = 3
# The grey between the pictures of a sheet is seen on white and on black paper.
SHEET = 90
# How many pixels wide a slice is drawn, about: in sheets of many, and in those of few.
SMALL = 48
LARGE = 96


def shades(x, window=None):
    """[-1, 1] → 0…255 in a window of lungaug.WINDOWS, or over the whole range; any shape, uint8"""
    if window is None:
        return lungaug.grey(x)
    return lungaug.windowed(preprocessing.denormalize(x), window)


def write_sheet(path, sheet, side, width=SMALL):
    """Write a sheet of slices of cubes of this side, each about `width` pixels wide, as a PNG."""
    lungaug.write(path, lungaug.png(sheet, lungaug.zoom(side, width)))


def pixel_mm(dataset, width=SMALL):
    """The side in mm of a pixel of `write_sheet`, for the page's scale bar."""
    return 1 / lungaug.zoom(dataset.cube, width)


def slices(cube, columns=12, window=None):
    """All axial slices in reading order, superior to inferior   [rule_2_1_7_reading_order]

    cube: (z, y, x) in [-1, 1], z rising to superior. Returns uint8 grey.
    """
    return lungaug.tile(shades(cube[::-1], window), columns, gap=1)


def planes(cube, window=None):
    """The middle planes of a cube (z, y, x) in [-1, 1], side by side, superior up; uint8 grey.

    They are the axial, the coronal and the sagittal one.
    """
    middle = cube.shape[0] // 2
    axial = cube[middle]
    coronal = cube[::-1, middle]
    sagittal = cube[::-1, :, middle]
    return lungaug.tile(shades(np.stack([axial, coronal, sagittal]), window), 3, gap=1)


def draw_slices(path, dataset, rows):
    """Draw some of the cubes at `rows`, slice by slice, in both windows: figures 2 and 3."""
    chosen = rows[lungaug.evenly(len(rows), SLICED)]
    cubes = preprocessing.read_cubes(dataset, chosen)[:, 0]
    sheets = [slices(cube, window=window) for cube in cubes for window in lungaug.WINDOWS]
    sheet = lungaug.tile(sheets, 1, gap=6, paper=SHEET)
    write_sheet(path, sheet, dataset.cube)


def draw_cubes(folder, dataset):
    """Draw figures 2 (positives) and 3 (negatives), and nodules.png.

    The last shows the middle planes of up to 24 nodules.
    """
    draw_slices(folder / "figure_2.png", dataset, dataset.positives["train"])
    draw_slices(folder / "figure_3.png", dataset, dataset.negatives["train"])

    all_positives = np.concatenate(list(dataset.positives.values()))
    cubes = preprocessing.read_cubes(dataset, all_positives[:24])[:, 0]
    sheet = lungaug.tile([planes(cube, "lung window") for cube in cubes], 4, gap=6,
                         paper=SHEET)
    lungaug.write(folder / "nodules.png", lungaug.png(sheet, 2))


def pair(left, right, window=None):
    """Two cubes in [-1, 1] side by side: their middle planes, threefold, above all their slices."""
    halves = []
    for cube in (left, right):
        sheet = slices(cube, window=window)
        middle = planes(cube, window).repeat(3, axis=0).repeat(3, axis=1)

        # Fill up with grey to the sheet's width, and leave three rows in between.
        missing_columns = sheet.shape[1] - middle.shape[1]
        middle = np.pad(middle, ((0, 3), (0, missing_columns)), constant_values=SHEET)
        halves.append(np.concatenate([middle, sheet]))
    return lungaug.tile(halves, 2, gap=8, paper=SHEET)


def in_both_windows(pictures):
    """A sheet of two rows, one per window of lungaug.WINDOWS; pictures(window): one row, uint8."""
    rows = [pictures(window) for window in lungaug.WINDOWS]
    return lungaug.tile(rows, 1, gap=1, paper=SHEET)


def tile_row(images, window):
    """Images (n, rows, columns) in [-1, 1] side by side in a window; uint8 grey."""
    return lungaug.tile(shades(images, window), len(images), gap=1)


def draw_in_step(path, *cubes):
    """Draw cubes side by side, slice by slice, each slice in both windows, superior first."""
    sheets = []
    side = len(cubes[0])
    for z in reversed(range(side)):
        slices_at_z = np.stack([cube[z] for cube in cubes])
        sheets.append(in_both_windows(functools.partial(tile_row, slices_at_z)))
    write_sheet(path, lungaug.tile(sheets, 1, gap=0), side)


def choose_generated(run, dataset, count):
    """Generated positives for figures 9–14: cubes in [-1, 1] (n, c, c, c), and how many passed.

    n ≤ count. Accepted ones, evenly chosen; where they are fewer than `count`, the best of the
    rejected follow.
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
        sheet = in_both_windows(functools.partial(pair, query, training_cube))
        write_sheet(folder / f"figure_{9 + i}.png", sheet, dataset.cube)
        if i == 0 and len(held_out):
            draw_in_step(folder / "in_step.png", held_out[0], query, training_cube)

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


# Beyond the thesis: the best nodules and the worst errors, to look at

def draw_planes(path, cube):
    """Draw the middle planes of a cube (c, c, c) in [-1, 1], in both windows."""
    sheet = in_both_windows(functools.partial(planes, cube))
    write_sheet(path, sheet, len(cube), LARGE)


def place_of(dataset, row):
    """Where a row (scan, z, y, x) is: {"seriesuid", "centre"}, the centre (x, y, z) in mm."""
    centre = [round(float(mm), 2) for mm in centre_mm(dataset, row)]
    return {"seriesuid": dataset.info["scans"][row[0]]["seriesuid"], "centre": centre}


def draw_best(folder, run, dataset, test, classifier, device):
    """Draw the test positive and the accepted generated one that a classifier is surest of.

    classifier: the real-trained one, of the first repeat. Leaves best_real.png and
    best_generated.png; returns what results.json holds of them, without an entry for a missing one.
    """
    best = {}
    rows, flips, labels = preprocessing.labelled(dataset, "test")
    positives = np.flatnonzero(labels == 1)
    if len(positives):
        scores = test.scores["real"][0][positives]
        chosen = positives[[scores.argmax()]]
        cube = preprocessing.read_cubes(dataset, rows[chosen], flips[chosen])[0, 0]
        draw_planes(folder / "best_real.png", cube)
        best["real"] = {"probability": float(scores.max())} | place_of(dataset, rows[chosen[0]])

    path = run / "classifiers" / "generated" / "positive.npy"
    accepted = preprocessing.open_array(path, dataset.cube)
    if len(accepted):
        def read(numbers):
            return preprocessing.normalize(accepted[numbers])[:, None]

        def probability(cubes):
            return classifier(cubes).softmax(1)[:, 1]

        scores = lungaug.predict(probability, read, len(accepted), device)
        number = int(scores.argmax())
        draw_planes(folder / "best_generated.png", preprocessing.normalize(accepted[number]))
        best["generated"] = {"probability": float(scores.max()), "number": number}
    return best


# At most this many errors of each kind are drawn.
MOST_ERRORS = 6
ERROR_KINDS = ("false positive", "false negative")


def number_places(rows):
    """A number for each of the rows (n, 4), the same where rows are equal: (n,)."""
    _, numbers = np.unique(rows, axis=0, return_inverse=True)
    return np.ravel(numbers)


def worst_errors(test, arm, places):
    """kind → numbers of a Scored's cubes that an arm gets wrong, the worst first.

    The probability is the mean over repeats. Of a nodule's flips, which have one number in `places`
    (n,), the worst one stands for it.
    """
    probabilities = np.mean(test.scores[arm], axis=0)
    found = predict_labels(probabilities)
    order = np.argsort(probabilities, kind="stable")
    false_positives = [i for i in order[::-1] if found[i] and test.labels[i] == 0]

    # The first of a nodule's flips in this order is the worst.
    false_negatives = {}
    for i in order:
        if not found[i] and test.labels[i] == 1:
            false_negatives.setdefault(places[i], i)
    return {"false positive": false_positives[:MOST_ERRORS],
            "false negative": list(false_negatives.values())[:MOST_ERRORS]}


def draw_errors(folder, dataset, test, arm):
    """Draw errors_<arm>.png: middle axial slices, false positives above false negatives.

    Each row is drawn in both windows. Returns the errors, as results.json holds them.
    """
    rows, flips, _ = preprocessing.labelled(dataset, "test")
    probabilities = np.mean(test.scores[arm], axis=0)
    middle = dataset.cube // 2
    records = []
    sheets = []
    for kind, numbers in worst_errors(test, arm, number_places(rows)).items():
        # Draw.
        cubes = preprocessing.read_cubes(dataset, rows[numbers], flips[numbers])[:, 0]
        for window in lungaug.WINDOWS:
            pictures = np.full((MOST_ERRORS, dataset.cube, dataset.cube), SHEET, np.uint8)
            pictures[:len(cubes)] = shades(cubes[:, middle], window)
            sheets.append(lungaug.tile(pictures, MOST_ERRORS, gap=1, paper=SHEET))

        # Record.
        for number in numbers:
            records.append({"kind": kind, "probability": float(probabilities[number]),
                            **place_of(dataset, rows[number]), "flip": int(flips[number])})

    write_sheet(folder / f"errors_{arm}.png", lungaug.tile(sheets, 1, gap=0), dataset.cube, LARGE)
    return records


def format_distances(values):
    return ", ".join(f"{value:.1f}" for value in values)


# The page: what evaluate.py itself shows, and the report of all stages

class Thresholds(NamedTuple):
    """Confusion matrices of the arms at many thresholds, which a slider of the page chooses.

    thresholds: (k,), rising; counts: arm → (k, 4): TP, FP, FN, TN, each the mean over the repeats.
    """
    caption: str
    thresholds: list
    counts: dict
    code: tuple = ()


# 161 thresholds, evenly spaced in the logarithm of the odds: most probabilities are near 0 or 1.
LOG_ODDS = np.linspace(-8, 8, 161)


def thresholds_of(test):
    """The Thresholds of a Scored, positives counted with their flips as in Tables 2–5."""
    values = 1 / (1 + np.exp(-LOG_ODDS))
    counts = {}
    for arm, repeats in test.scores.items():
        counts[arm] = []
        for threshold in values:
            confusions = [confusion_matrix(test.labels, scores > threshold) for scores in repeats]
            means = np.mean(confusions, axis=0)
            counts[arm].append([round(float(mean), 1) for mean in means])
    caption = ("What a threshold does. Move it: to the left nearly every cube is called positive, "
               "to the right hardly any. The dots near the curves of the ROC below move along. "
               "Tables 2–5 stand at ½. Positives are counted with their flips, and counts are "
               "means over the repeats; the metrics are those of the mean counts, where Tables "
               "2–5 give the mean of the repeats' metrics.")
    return Thresholds(caption, values.tolist(), counts,
                      code=("evaluate.confusion_matrix", "evaluate.predict_labels"))


def sample_names(rows):
    """The names of the rows of figure 2 or 3; rows: of the cubes from which it shows some."""
    return [f"sample {number}, {window}" for number in range(1, min(SLICED, len(rows)) + 1)
            for window in lungaug.WINDOWS]


def sample_items(dataset):
    """What the page shows of section 2.1.7: figures that need no training."""
    centre = dataset.cube // 2
    reading = (f"each of its {dataset.cube} axial slices of 1 mm, from superior (top left) to "
               f"inferior, row by row, in both windows ({lungaug.WINDOWS_SAY})")
    return [
        lungaug.Heading("2.1.7 Processed samples"),
        lungaug.Figure("Nodules of the data set in their middle planes, in the lung window. The "
                       "nodule is in the middle of each plane; axial planes show the patient from "
                       "below, anterior up, the others have superior up. Look at how different in "
                       "size, sharpness and surroundings they are: that is what the generator "
                       "has to learn.",
                       "nodules.png", code=("evaluate.draw_cubes", "evaluate.planes"),
                       columns=("axial, coronal, sagittal",) * 4, pixel_mm=0.5),
        lungaug.Figure(f"Figure 2. Positive samples, {reading}. The nodule's centre is in slice "
                       f"{centre}: it appears in the slices before and is gone some slices later.",
                       "figure_2.png", code=("evaluate.draw_slices", "evaluate.slices"),
                       rows=sample_names(dataset.positives["train"]),
                       pixel_mm=pixel_mm(dataset)),
        lungaug.Figure(f"Figure 3. Negative samples, {reading}. They are drawn at random within "
                       "the lungs, away from nodules. A vessel runs through many slices, where a "
                       "nodule is round; black in the mediastinal window is lung without either.",
                       "figure_3.png", code=("evaluate.draw_slices",
                                             "preprocessing.draw_negatives"),
                       rows=sample_names(dataset.negatives["train"]),
                       pixel_mm=pixel_mm(dataset)),
    ]


def curve_items(folder):
    """What the page shows of the trainings: figures 7 and 8, as far as they are drawn."""
    items = []
    if (folder / "figure_7.svg").exists():
        items += [
            lungaug.Heading("4.1 Wasserstein GAN: loss curves"),
            lungaug.Figure("Figure 7. The GAN's losses: running means, with bands that hold about "
                           "95% of the values around them, cut off where no value is possible. "
                           "The estimate f(real) − f(fake) rises while the critic learns, then "
                           "falls as fakes become like reals; single values may be negative. Near "
                           "0 it says that this critic tells them apart no longer, and not that "
                           "the generator has variety. The penalty should stay small: slopes near "
                           "1. An accuracy of 1 on fakes is no success by itself: the generator "
                           "is rewarded for fakes whose class is plain. Dashed: a new α.",
                           "figure_7.svg",
                           code=("evaluate.figure_7", "losses.critic_loss",
                                 "losses.gradient_penalty", "losses.generator_loss",
                                 "train_gan.auxiliary_scale", "evaluate.smooth")),
        ]
    if (folder / "figure_8.svg").exists():
        items += [
            lungaug.Heading("4.4 Classifier"),
            lungaug.Figure("Figure 8. Training and validation loss of the classifiers, of the "
                           "first repeat, all on one axis. Where the training loss falls and the "
                           "validation loss rises, a classifier learns its training set by heart. "
                           "Dashed: the epoch of the best validation F1, whose weights are kept. "
                           "The validation set is real for every arm: the loss of the arm fake "
                           "shows how far generated cubes are from real ones. The control "
                           "longer has as many steps as mixed.",
                           "figure_8.svg",
                           code=("evaluate.figure_8", "losses.classifier_loss",
                                 "train_classifier.validate", "train_classifier.keep_best")),
        ]
    return items


def best_items(results, dataset):
    """The best real nodule and the best generated one, large."""
    items = [lungaug.Heading("A real nodule and a generated one")]
    best = results["best"]
    common = dict(rows=list(lungaug.WINDOWS), columns=("axial", "coronal", "sagittal"),
                  pixel_mm=pixel_mm(dataset, LARGE))
    sure = ("of which the classifier that was trained on real data is surest, ŷ = "
            "{probability:.4f}")
    if "real" in best:
        caption = (f"Real: the test nodule {sure.format(**best['real'])}. "
                   f"{place_text(best['real'])}. Windows: {lungaug.WINDOWS_SAY}.")
        items.append(lungaug.Figure(caption, "best_real.png",
                                    code=("evaluate.draw_best", "evaluate.planes"), **common))
    if "generated" in best:
        caption = (f"Generated: the accepted positive {sure.format(**best['generated'])}. It is "
                   "the best one, not a typical one: section 4.3 shows others.")
        items.append(lungaug.Figure(caption, "best_generated.png",
                                    code=("evaluate.draw_best", "train_classifier.generate"),
                                    **common))
    return items if len(items) > 1 else []


def place_text(place):
    """A scan and a place in it, as a line of text."""
    centre = lungaug.with_minus(", ".join(f"{mm:.1f}" for mm in place["centre"]))
    return f"Series {place['seriesuid']} at ({centre}) mm"


def class_name(label):
    """positive (a nodule), or negative (no nodule)."""
    return f"{CLASS_NAMES[label]}, {'a nodule' if label == 1 else 'no nodule'}"


def novelty_items(novelty, dataset):
    """Section 5.1: cubes in step, figures 9–14 with their captions, and distances."""
    records = novelty["generated"]
    items = [lungaug.Heading("5.1 Generated samples")]
    if records and novelty["held_out_distances"]:
        nearest = class_name(records[0]["nearest_label"])
        caption = ("Slice by slice in step: a real test nodule, the generated one of figure 9, "
                   f"and the training cube nearest to that, which is {nearest}. Above the lung "
                   "window, below the mediastinal one. Move the slider from superior to "
                   "inferior: a copy would match its training cube in every slice.")
        names = [f"slice {number} of {dataset.cube}" for number in range(1, dataset.cube + 1)]
        items.append(lungaug.Figure(
            caption, "in_step.png", code=("evaluate.draw_in_step", "evaluate.nearest_neighbours"),
            rows=names, columns=("real, test set", "generated", f"nearest: {nearest}"),
            pixel_mm=pixel_mm(dataset), first=dataset.cube // 2 - 1))

    for record in records:
        generated = "Generated" if record["accepted"] else "Generated, not accepted in 4.3"
        nearest = class_name(record["nearest_label"])
        caption = (f"Figure {record['figure']}. {generated} (left); the nearest training sample, "
                   f"l2 distance {record['distance']:.1f} (right), which is {nearest}. Above, "
                   "threefold: the middle axial, coronal and sagittal plane; below: all axial "
                   "slices from superior to inferior, to which the bar belongs. Windows: "
                   f"{lungaug.WINDOWS_SAY}.")
        items.append(lungaug.Figure(
            caption, f"figure_{record['figure']}.png",
            code=("evaluate.draw_novelty", "evaluate.nearest_neighbours"),
            rows=list(lungaug.WINDOWS), columns=("generated", f"nearest: {nearest}"),
            pixel_mm=pixel_mm(dataset)))

    # List the distances, those of real nodules as the scale.
    generated_distances = [record["distance"] for record in records]
    rows = [("generated", format_distances(generated_distances)),
            ("real test positives", format_distances(novelty["held_out_distances"]))]
    items.append(lungaug.Table(
        "Distance to the nearest training sample; 0 would be a copy. What surrounds a nodule has "
        "most of the voxels: a small distance may be an empty lung beside an empty lung, and the "
        "nearest is often a negative. Generated cubes are smoother than a scan, and may lie nearer "
        "than any new real one without being copies: compare the pictures.",
        ("", "l2 distances"), rows))
    return items


# The two arms that the thesis compares
ERROR_ARMS = ("real", "mixed")


def error_items(results, dataset):
    """The worst errors of two arms: pictures, and where they are."""
    items = [lungaug.Heading("Beyond the thesis: the worst errors")]
    for arm, records in results["errors"].items():
        rows = [f"{kind}s, {window}" for kind in ERROR_KINDS for window in lungaug.WINDOWS]
        caption = (f"The worst errors of the arm {arm}, each the middle axial slice; the mean "
                   "probability over the repeats falls from left to right for false positives, "
                   "and rises for false negatives. Would you have called them? A bright vessel "
                   "cut across looks like a nodule in one slice; grey fields are empty.")
        items.append(lungaug.Figure(caption, f"errors_{arm}.png",
                                    code=("evaluate.draw_errors", "evaluate.worst_errors"),
                                    rows=rows,
                                    columns=[str(n) for n in range(1, MOST_ERRORS + 1)],
                                    pixel_mm=pixel_mm(dataset, LARGE)))
        items.append(lungaug.Table(f"Where the errors of the arm {arm} are, in the order of the "
                                   "picture.",
                                   ("error", "ŷ", "flip", "x, y, z in mm", "series"),
                                   error_rows(records)))
    return items


def error_rows(records):
    """The rows of a table of errors, as text."""
    rows = []
    for record in records:
        centre = lungaug.with_minus(", ".join(f"{mm:.1f}" for mm in record["centre"]))
        rows.append((record["kind"], f"{record['probability']:.4f}", str(record["flip"]), centre,
                     record["seriesuid"]))
    return rows


# The headings of the tables
ARMS_HEAD = ("arm", "F1 with flips", "thesis", "F1", "AUC", "average precision")
DIFFERENCE_HEAD = ("arm − arm", "F1", "spread", "AUC", "spread")
UNPAIRED_HEAD = ("difference", "arm", "F1", "AUC")
OPERATING_HEAD = ("arm", "F1: ŷ > ½", "validation", "prior",
                  *[f"sens. at {rate:.2%}" for rate in FALSE_POSITIVE_RATES])
QUALITY_HEAD = ("", "n", "centre, HU", "profile differs by", "called positive", "d₁/d₂", "C_T",
                "1-NN", "Fréchet")


def format_summary(summary, *names):
    """Some entries of `summarize_arm` as text: mean ± spread."""
    return [format_spread(summary[name]["mean"], summary[name]["spread"]) for name in names]


def format_interval(entry):
    """A mean with its 95% interval: 0.985 [0.970, 1.000]."""
    numbers = [lungaug.format_number(entry[name]) for name in ("mean", "low", "high")]
    return lungaug.with_minus(f"{numbers[0]} [{numbers[1]}, {numbers[2]}]")


def arm_rows(results):
    """The rows of the table of arms, as text; – for what there is not."""
    rows = []
    for _, table in with_control(results):
        arm = table["arm"]
        thesis = "–"
        if "thesis" in table:
            thesis = lungaug.format_number(table["thesis"]["metrics"]["f1"])
        if arm not in results["arms"]:
            rows.append((arm, "–", thesis, "–", "–", "–"))
            continue
        flips = table["flips"]
        with_flips = format_spread(flips["metrics"]["f1"], flips["spread"]["f1"])
        summary = results["arms"][arm]
        rows.append((arm, with_flips, thesis, format_interval(summary["f1_argmax"]),
                     format_interval(summary["auc"]),
                     *format_summary(summary, "average_precision")))
    return rows


def operating_rows(results):
    """The rows of the table of operating points, as text."""
    names = ("f1_argmax", "f1_validation", "f1_prior",
             *[f"sensitivity_at_{rate}" for rate in FALSE_POSITIVE_RATES])
    return [(arm, *format_summary(summary, *names)) for arm, summary in results["arms"].items()]


def difference_rows(results):
    """The rows of the table of differences, as text."""
    rows = []
    for name, row in results["differences"].items():
        cells = []
        for measure_name in ("f1", "auc"):
            cells.append(format_difference(row[measure_name]))
            cells.append(lungaug.format_number(row[measure_name]["spread"]))
        rows.append((lungaug.with_minus(name), *cells))
    return rows


QUALITY_WORDS = (
    ("n", "cubes in the row; rows of fewer are less sure"),
    ("centre, HU", "the HU at the centre: mean ± standard deviation over the cubes"),
    ("profile differs by", "the largest difference of the radial profile from that of training "
                           "cubes"),
    ("called positive", "the share that the real-trained classifier calls positive; more than of "
                        "held-out real nodules means easy cases"),
    ("d₁/d₂", "the distance to the nearest training cube over that to the second nearest; 0 for "
              "copies"),
    ("C_T", "near 0 where they lie as far from the training set as new nodules do; −3 or less "
            "where they lie nearer: copies, or a few typical cubes; – where no test nodule is new "
            "to the GAN"),
    ("1-NN", "how often the nearest neighbour tells them from as many training cubes: 1 if they "
             "are apart, 0 for copies, ½ if they are alike – but noise may have ½, too; it rises "
             "a little with n: for one fault from .59 of 27 cubes to .61 of 108"),
    ("Fréchet", "the distance of the classifier's 64 features from those of training cubes, of as "
                "many cubes as are held out; of fewer cubes than features it is mostly chance"),
)


def quality_rows(qualities):
    """The rows of the table of quality of a class, as text; qualities: kind → Quality as a dict."""
    rows = []
    for kind, row in qualities.items():
        rows.append((
            kind,
            str(row["n"]),
            lungaug.with_minus(f"{row['centre_hu']:.0f} ± {row['centre_spread']:.0f}"),
            f"{row['profile_difference']:.0f} HU",
            lungaug.format_number(row["called_positive"]),
            lungaug.format_number(row["copy_ratio"]),
            format_copying(row["copying"]),
            lungaug.format_number(row["two_sample"]),
            f"{row['frechet']:.2f}",
        ))
    return rows


def format_copying(value):
    """C_T as a table shows it; None, where it is not known, as –."""
    if value is None:
        return "–"
    return lungaug.with_minus(f"{value:.1f}")


# Of 256 cubes whose scores have nothing to do with it, 95% of the ρ lie within ±2/√256.
UNRELATED = 0.125


def selection_sentence(rho):
    """What Spearman's ρ of `score_selection` says about the selection by score."""
    if rho is None or math.isnan(rho):
        return "Whether the critic's score chooses better cubes cannot be said: it is constant."
    if abs(rho) < UNRELATED:
        says = "the score says next to nothing about the probability"
    elif rho < 0:
        says = "it prefers those of which the classifier is less sure"
    else:
        says = ("it prefers those of which the classifier is surer: more typical ones, which need "
                "not be better")
    return (f"Does the critic's score choose better nodules? Between it and the real-trained "
            f"classifier's probability of a generated positive Spearman's ρ is "
            f"{lungaug.with_minus(f'{rho:.2f}')}: {says}.")


def help_items(results, dataset):
    """What the page says first: did it help?"""
    items = [lungaug.Heading("Did it help?"), lungaug.Text(results["verdict"])]
    if dataset.info["synthetic"]:
        items.append(lungaug.Text("The scans are synthetic: the numbers show that the program "
                                  "works, and say nothing about patients."))
    return [
        *items,
        lungaug.Table("The arms: F1 with flips, and that of the thesis, on its own scans; then "
                      "F1, AUC and average precision with each nodule counted once; in brackets "
                      f"95% intervals over the test scans. {repeats_sentence(results)}",
                      ARMS_HEAD, arm_rows(results)),
        lungaug.Table("Differences, each nodule counted once, with 95% intervals over the test "
                      "scans, for these trainings: what others would give is not in them. It "
                      "shows in the spread, the standard deviation over the repeats. Only mixed − "
                      "longer is a fair comparison: both take as many steps.",
                      DIFFERENCE_HEAD, difference_rows(results)),
    ]


def repeats_sentence(results):
    """How often each arm was trained, and on what it was tested."""
    counts = results["counts"]
    repeats = counts["repeats"]
    trained = "Each is trained once"
    if repeats > 1:
        trained = f"Each but critic is trained {repeats} times: mean ± standard deviation"
    scans = preprocessing.counted(counts["scans"], "scan")
    nodules = preprocessing.counted(counts["nodules"], "nodule")
    negatives = preprocessing.counted(counts["negatives"], "negative")
    return f"{trained}; tested on {scans} with {nodules} and {negatives}."


def beyond_items(results, thresholds):
    """What the page says beyond the thesis: operating points, and the quality of what was made."""
    items = [
        lungaug.Heading("Beyond the thesis: operating points"),
        thresholds,
        lungaug.Figure("ROC curves of the arms, means over the repeats: the whole, and the part "
                       "where few negatives are called positive. At one false positive rate the "
                       "higher curve is better; of two that cross, neither always is. The dots "
                       "with names are the thesis' Tables 2 to 5, each in the colour of its arm.",
                       "roc.svg",
                       code=("evaluate.figure_roc", "evaluate.sensitivity_at",
                             "evaluate.roc_auc")),
        lungaug.Table("F1 at three thresholds: ½, which is argmax; the best one of the validation "
                      "set; the one that corrects for training on as many positives as negatives. "
                      "Then the sensitivity at false positive rates; 0.65% and 2.39% are those of "
                      "the thesis' Tables 3 and 2. Each nodule counts once.",
                      OPERATING_HEAD, operating_rows(results)),
        lungaug.Heading("Beyond the thesis: quality of the generated cubes"),
    ]
    for name in CLASS_NAMES.values():
        if name in results["quality"]:
            caption = f"Generated {name}s beside real ones and three faults."
            rows = quality_rows(results["quality"][name])
            items.append(lungaug.Table(caption, QUALITY_HEAD, rows))
    if results["quality"]:
        items.append(lungaug.Table("What the columns say. Real nodules are flipped at random here, "
                                   "like those that the GAN was trained on.",
                                   ("column", "what it is"), QUALITY_WORDS))
    if "selection" in results["quality"]:
        items.append(lungaug.Text(selection_sentence(results["quality"]["selection"])))
    items.append(lungaug.Figure("Mean HU by distance from the centre, ± a standard deviation "
                                "over cubes: real training cubes, accepted ones, and, dashed, "
                                "those before selection. A nodule is dense in the middle and "
                                "falls off to lung. A generated curve above the real one means "
                                "nodules that are too bright or too large, below it pale or "
                                "small ones; a narrower band means less variety.",
                                "profiles.svg",
                                code=("evaluate.figure_profiles", "evaluate.radial_profile")))
    return items


def page(results, dataset, folder, thresholds):
    """What the report shows: whether it helped, sections 2, 4 and 5 in figures, and beyond.

    folder: where the figures are; thresholds: of `thresholds_of`.
    """
    # Draw up Tables 2–5.
    metric_tables = []
    for number, table in with_control(results):
        title = table_title(number, table)
        metric_tables.append(lungaug.Table(title, TABLE_HEAD, table_cells(table)))

    return [
        *help_items(results, dataset),
        *best_items(results, dataset),
        *sample_items(dataset),
        *curve_items(folder),
        *novelty_items(results["novelty"], dataset),
        lungaug.Heading("5.2 Classification metrics"),
        *metric_tables,
        *beyond_items(results, thresholds),
        *error_items(results, dataset),
    ]


# The page's look. Two schemes of colour, three sizes of screen, and paper.
STYLE = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1b1d20;--soft:#555b63;--line:#d6d9dd;
--box:#f1f5fa;--mark:#0a58ca;--chart:#fff}
@media (prefers-color-scheme:dark){:root{--paper:#15171a;--ink:#e9eaec;--soft:#adb3bb;
--line:#3c4148;--box:#20252c;--mark:#8ab4f8;--chart:#1d2024}}
html{font-size:clamp(16px,1.15vw,24px);scroll-padding-top:1rem}
body{font:1rem/1.5 system-ui,sans-serif;max-width:78rem;margin:0 auto;padding:1rem;
background:var(--paper);color:var(--ink)}
h1{font-size:1.5rem;line-height:1.25}
h2{font-size:1.25rem;border-bottom:2px solid var(--line);margin-top:2.5rem}
p,figcaption{max-width:52rem}
a{color:var(--mark)}
code{font-size:.9em;overflow-wrap:anywhere}
figcaption,.caption{color:var(--soft)}
h1,h2,p,li,figcaption{overflow-wrap:anywhere}
.caption{margin:1.2rem 0 .3rem}
nav ul{columns:2 18rem;padding-left:1.2rem;margin:.3rem 0}
nav li li{display:inline;margin-right:.7em;font-size:.9em}
nav ul ul{columns:auto;padding:0}
nav li{break-inside:avoid}
summary{font-weight:600}
#did-it-help{background:var(--box);border-left:.4rem solid var(--mark);padding:.1rem 1rem 1rem}
#did-it-help h2{border:0;margin:.8rem 0 0}
#did-it-help>p:first-of-type{font-size:1.25rem;font-weight:600;margin:.3rem 0;max-width:none}
#a-real-nodule-and-a-generated-one{display:flex;flex-wrap:wrap;gap:0 2rem}
#a-real-nodule-and-a-generated-one h2{flex:1 0 100%;margin-bottom:0}
#a-real-nodule-and-a-generated-one figure{flex:1 1 20rem;min-width:0}
[id="5-2-classification-metrics"]{display:flex;flex-wrap:wrap;gap:0 3rem}
[id="5-2-classification-metrics"] h2{flex:1 0 100%;margin-bottom:0}
[id="5-2-classification-metrics"] .table{max-width:100%}
[id="5-2-classification-metrics"] .caption{max-width:24rem}
.scroll{overflow-x:auto;max-width:100%}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
td,th{padding:.2rem .7rem;text-align:right;border-bottom:1px solid var(--line);vertical-align:top}
td{white-space:nowrap}
td.long{white-space:normal;min-width:16rem;text-align:left;overflow-wrap:anywhere}
table:has(td.long:last-child) th:last-child{text-align:left}
td:first-child,th:first-child{text-align:left;padding-left:.2rem}
tr.changed td{font-weight:600}
figure{margin:1.5rem 0}
.sheet{display:grid;grid-template-columns:auto minmax(0,1fr);gap:.2rem .4rem;
max-width:max(20rem,calc(85vh*var(--ratio)));margin-bottom:.4rem}
.columns,.view,.scale{grid-column:2}
.scale{grid-row:3}
.columns{grid-row:1;display:grid;grid-auto-flow:column;grid-auto-columns:minmax(0,1fr);text-align:center}
.rows{grid-column:1;grid-row:2;display:grid;grid-auto-rows:minmax(0,1fr);align-items:center;
text-align:right;max-width:7rem}
.columns,.rows,.scale{font-size:.8rem;line-height:1.15;color:var(--soft)}
.view{grid-row:2;overflow:hidden;align-self:start}
.view img{display:block;width:100%;height:auto;image-rendering:pixelated}
.columns span{overflow:hidden;padding:0 .1em}
@media (max-width:600px){.rows{max-width:4.8rem}}
.scale span{display:block;border:1px solid var(--ink);border-top:0;height:.3rem}
.control{display:none;align-items:center;gap:.6rem;flex-wrap:wrap;margin:.4rem 0}
.js .control{display:flex}
.control label{display:contents}
.control button{font:inherit;font-size:.9rem}
.control input{flex:1 1 12rem;max-width:40rem;min-width:10rem;height:2rem;accent-color:var(--mark)}
.control output{min-width:9rem;font-variant-numeric:tabular-nums;font-weight:600}
[data-first] .sheet{max-width:20rem}
.few .sheet{max-width:44rem}
.js [data-first] .sheet{max-width:min(70rem,max(18rem,calc(70vh*var(--ratio)*var(--count))))}
.js [data-first] .rows{display:none}
.js [data-first] img{aspect-ratio:calc(var(--ratio)*var(--count));object-fit:cover;
object-position:0 calc(100%*var(--shown)/max(1,var(--count) - 1))}
.js [data-first].all .rows{display:grid}
.js [data-first].all .sheet{max-width:24rem}
.js .few.all .sheet{max-width:44rem}
.js [data-first].all img{aspect-ratio:var(--ratio)}
.charts{display:grid;gap:1rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr))}
.charts svg{width:100%;height:auto;display:block}
.charts figcaption{grid-column:1/-1}
.chart-paper{fill:var(--chart)}
.charts text{fill:var(--ink)}
.grid{stroke:var(--line)}
.mark{stroke:var(--soft)}
.hover{stroke:var(--ink);stroke-width:.7}
.charts .tip-paper{fill:var(--box);stroke:var(--line)}
@media screen and (prefers-color-scheme:dark){.charts svg{filter:brightness(1.3)}}
.next{border:1px solid var(--mark);padding:.5rem 1rem}
@media print{
:root{color-scheme:light;--paper:#fff;--ink:#000;--soft:#333;--line:#ccc;--box:#f4f4f4;
--mark:#000;--chart:#fff}
html{font-size:10.5px}
@page{size:A4;margin:14mm}
body{max-width:none;padding:0}
h1,h2,.caption{break-after:avoid}
figure,table,tr,svg{break-inside:avoid}
.sheet{max-width:min(100%,calc(11cm*var(--ratio)))}
.js [data-first] .sheet{max-width:min(100%,calc(9cm*var(--ratio)*var(--count)))}
.caption{break-inside:avoid}
nav{break-inside:avoid}
.scroll{overflow:visible}
table{font-size:.9em}
td,th{padding:.15rem .35rem}
.control label,.control button{display:none}
.few .control{display:none}
.js .few .sheet{max-width:12cm}
.js .few .rows{display:grid}
.js .few img{aspect-ratio:var(--ratio)}
*{-webkit-print-color-adjust:exact;print-color-adjust:exact}
}
"""

# The page's script: sliders, and values under the pointer. The page can be read without it.
SCRIPT = """
"use strict";
document.documentElement.classList.add("js");

// Sliders that show one row of a picture.
for (const figure of document.querySelectorAll("[data-first]")) {
  const slider = figure.querySelector("input");
  const names = [...figure.querySelectorAll(".rows span")].map(span => span.textContent);
  const show = () => {
    figure.style.setProperty("--shown", slider.value);
    figure.querySelector("output").textContent = names[slider.value];
    slider.setAttribute("aria-valuetext", names[slider.value]);
  };
  slider.addEventListener("input", show);
  figure.querySelector("button").addEventListener("click", event => {
    const all = figure.classList.toggle("all");
    event.target.textContent = all ? "one by one" : "all at once";
    event.target.setAttribute("aria-pressed", all);
  });
  show();
}

// Values of an SVG's chart.
const svgNamespace = "http://www.w3.org/2000/svg";
const plot = JSON.parse(document.body.dataset.plot);
const numbers = text => text.split(" ").map(Number);
const add = (parent, name, attributes) => {
  const element = document.createElementNS(svgNamespace, name);
  for (const key in attributes) element.setAttribute(key, attributes[key]);
  parent.append(element);
  return element;
};
const short = value => String(Number(value.toPrecision(4)));

class Chart {
  constructor(group) {
    this.group = group;
    this.xRange = numbers(group.dataset.x);
    this.yRange = numbers(group.dataset.y);
    this.lines = [...group.querySelectorAll("polyline")].map(line => ({
      name: line.dataset.name, colour: line.getAttribute("stroke"),
      points: line.getAttribute("points").split(" ").filter(Boolean)
        .map(pair => pair.split(",").map(Number))}));
  }
  toX(value) {
    const share = (value - this.xRange[0]) / (this.xRange[1] - this.xRange[0]);
    return plot.left + share * (plot.right - plot.left);
  }
  toY(value) {
    const share = (value - this.yRange[0]) / (this.yRange[1] - this.yRange[0]);
    return plot.bottom - share * (plot.bottom - plot.top);
  }
  fromX(pixel) {
    const share = (pixel - plot.left) / (plot.right - plot.left);
    return this.xRange[0] + share * (this.xRange[1] - this.xRange[0]);
  }
  fromY(pixel) {
    const share = (plot.bottom - pixel) / (plot.bottom - plot.top);
    return this.yRange[0] + share * (this.yRange[1] - this.yRange[0]);
  }
  // Show each line's value nearest to a place in pixels.
  tell(pixel) {
    this.hide();
    const words = [];
    let place = null;
    for (const line of this.lines) {
      let nearest = null;
      for (const point of line.points) {
        if (!nearest || Math.abs(point[0] - pixel) < Math.abs(nearest[0] - pixel)) nearest = point;
      }
      if (!nearest) continue;
      place = nearest[0];
      words.push([`${line.name}: ${short(this.fromY(nearest[1]))}`, line.colour]);
    }
    if (place === null) return;
    const label = this.group.dataset.label;
    const x = this.fromX(place);
    words.unshift([`${label} ${label === "epoch" ? Math.round(x) : short(x)}`, ""]);

    this.tip = add(this.group, "g", {class: "tip"});
    add(this.tip, "path", {class: "hover", d: `M${place} ${plot.top}V${plot.bottom}`});
    const width = 14 + 6.6 * Math.max(...words.map(word => word[0].length));
    const beside = place < (plot.left + plot.right) / 2 ? place + 8 : place - 8 - width;
    const left = Math.max(2, Math.min(beside, plot.width - width - 2));
    add(this.tip, "rect", {class: "tip-paper", x: left, y: plot.top + 16, width,
                           height: 8 + 16 * words.length, rx: 4});
    words.forEach(([word, colour], i) => {
      const text = add(this.tip, "text", {x: left + 7, y: plot.top + 32 + 16 * i});
      text.textContent = word;
      if (colour) text.style.fill = colour;
    });
  }
  hide() {
    if (this.tip) this.tip.remove();
    this.tip = null;
  }
}

const charts = [];
for (const group of document.querySelectorAll("g.chart")) {
  const chart = new Chart(group);
  charts.push(chart);
  const svg = group.ownerSVGElement;
  let place = (plot.left + plot.right) / 2;
  const tell = () => chart.tell(place);
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect();
    place = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    tell();
  });
  svg.addEventListener("pointerleave", () => chart.hide());
  svg.addEventListener("focus", tell);
  svg.addEventListener("blur", () => chart.hide());
  svg.addEventListener("keydown", event => {
    const step = {ArrowLeft: -4, ArrowRight: 4}[event.key];
    if (!step) return;
    event.preventDefault();
    place = Math.min(plot.right, Math.max(plot.left, place + step));
    tell();
  });
}

// The threshold, the matrix of each arm at it, and its dot on the ROC curves.
for (const figure of document.querySelectorAll("[data-thresholds]")) {
  const thresholds = JSON.parse(figure.dataset.thresholds);
  const counts = JSON.parse(figure.dataset.counts);
  const slider = figure.querySelector("input");
  const rows = [...figure.querySelectorAll("tr")].slice(1);
  const roc = charts.filter(chart => chart.group.dataset.label === "false positive rate");
  let dots = [];
  const ratio = (part, whole) => whole ? part / whole : NaN;
  const text = value => Number.isNaN(value) ? "\\u2013" : value.toFixed(3);
  const show = () => {
    const threshold = thresholds[slider.value];
    const words = threshold.toPrecision(4);
    figure.querySelector("output").textContent = words;
    slider.setAttribute("aria-valuetext", words);
    dots.forEach(dot => dot.remove());
    dots = [];
    Object.keys(counts).forEach((arm, i) => {
      const [tp, fp, fn, tn] = counts[arm][slider.value];
      const sensitivity = ratio(tp, tp + fn);
      const values = [sensitivity, ratio(tn, tn + fp), ratio(tp, tp + fp),
                      ratio(2 * tp, 2 * tp + fp + fn)];
      const cells = [...rows[i].cells].slice(1);
      [tp, fp, fn, tn].forEach((count, j) => {
        cells[j].textContent = count.toLocaleString("en");
      });
      values.forEach((value, j) => { cells[4 + j].textContent = text(value); });
      for (const chart of roc) {
        const rate = ratio(fp, fp + tn);
        const line = chart.lines.find(other => other.name === arm);
        if (!line || !(rate <= chart.xRange[1]) || Number.isNaN(sensitivity)) continue;
        dots.push(add(chart.group, "circle", {class: "dot", cx: chart.toX(rate),
          cy: chart.toY(sensitivity), r: 5, fill: line.colour, stroke: "#fff"}));
      }
    });
  };
  slider.addEventListener("input", show);
  show();
}
"""

# Nothing but what stands in the page may be loaded, and no other script may run.
SCRIPT_HASH = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
POLICY = ("default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
          f"script-src 'sha256-{SCRIPT_HASH}'")
TITLE = "Generated lung nodules as training data"

# The folders of a run whose stages leave a page, in the order of the stages, and the headings in
# the order of the page. The contents follow the first two.
PAGE_FOLDERS = ("prepared", "gan", "classifiers", "evaluation")
BEFORE_CONTENTS = ("Did it help?", "A real nodule and a generated one")
HEADINGS = (
    *BEFORE_CONTENTS,
    "2 Dataset",
    "2.1.7 Processed samples",
    "4.1 Wasserstein GAN: loss curves",
    "4.1 Wasserstein GAN: samples through the training",
    "4.3 Generative augmentation",
    "4.4 Classifier",
    "5.1 Generated samples",
    "5.2 Classification metrics",
    "Beyond the thesis: operating points",
    "Beyond the thesis: the worst errors",
    "Beyond the thesis: quality of the generated cubes",
    "This run",
)


def escaped(text):
    """Text for the page: a file may have named itself anything."""
    return html.escape(lungaug.printable(text, 2000))


def anchor(text):
    """A name for an id of the page: small letters, digits and hyphens."""
    return re.sub("[^a-z0-9]+", "-", str(text).lower()).strip("-") or "part"


# A text of more characters than this may break at its spaces, a number never.
LONG = 40


def cell_html(tag, cell):
    """A cell of a table; tag: th or td."""
    text = str(cell)
    mark = ' class="long"' if tag == "td" and len(text) > LONG and " " in text else ""
    return f"<{tag}{mark}>{escaped(cell)}</{tag}>"


def row_html(tag, cells, mark=""):
    """A row of a table; tag: th or td; mark: a class of the row."""
    inner = "".join(cell_html(tag, cell) for cell in cells)
    attribute = f' class="{mark}"' if mark else ""
    return f"<tr{attribute}>{inner}</tr>"


def table_html(caption, head, rows, marked=()):
    """A table, which scrolls where it is too wide; every cell is escaped.

    marked: the numbers of rows that stand out.
    """
    lines = [row_html("td", row, "changed" if number in marked else "")
             for number, row in enumerate(rows)]
    return (f'<div class="table"><p class="caption">{escaped(caption)}</p>'
            f'<div class="scroll" tabindex="0"><table><thead>{row_html("th", head)}</thead>'
            f"<tbody>{''.join(lines)}</tbody></table></div></div>")


def code_html(names):
    """The functions that made a figure, as the end of its caption."""
    if not names:
        return ""
    return " Code: " + ", ".join(f"<code>{escaped(name)}</code>" for name in names) + "."


def names_html(kind, names):
    """Names along a picture; kind: rows or columns."""
    if not names:
        return ""
    spans = "".join(f"<span>{escaped(name)}</span>" for name in names)
    return f'<div class="{kind}">{spans}</div>'


SCALE_MM = (5, 10, 20, 50, 100, 200)


def scale_html(width_mm):
    """A scale bar below a picture of this width: a round length near an eighth of it."""
    length = min(SCALE_MM, key=lambda mm: abs(mm - width_mm / 8))
    share = 100 * length / width_mm
    return f'<div class="scale"><span style="width:{share:.2f}%"></span>{length} mm</div>'


def png_size(data):
    """Width and height of a PNG file in pixels; (1, 1) where it is none."""
    if len(data) < 24:
        return 1, 1
    width, height = struct.unpack(">II", data[16:24])
    return max(width, 1), max(height, 1)


def alt_text(caption):
    """What a picture shows, for those who cannot see it: a caption's first words, to . or :"""
    without_number = re.sub(r"^Figure \d+\. ", "", caption)
    first, *_ = re.split(r"[.:] ", without_number)
    return first


def picture_html(path, item):
    """A PNG, inline, with the names of its rows and columns and a scale bar."""
    data = path.read_bytes()
    width, height = png_size(data)
    base64_data = base64.b64encode(data).decode()
    alt = escaped(alt_text(item["caption"]))
    scale = scale_html(width * item["pixel_mm"]) if item.get("pixel_mm") else ""
    return (f'<div class="sheet" style="--ratio:{width / height:.4f}">'
            f'{names_html("columns", item.get("columns"))}{names_html("rows", item.get("rows"))}'
            f'<div class="view"><img width="{width}" height="{height}" alt="{alt}" '
            f'src="data:image/png;base64,{base64_data}"></div>{scale}</div>')


SVG = "http://www.w3.org/2000/svg"
ElementTree.register_namespace("", SVG)


def charts_html(path):
    """The charts of an SVG of `side_by_side`, each one an SVG of its own: a phone stacks them."""
    with lungaug.refuse_on_error(path, "run python evaluate.py again"):
        root = ElementTree.fromstring(path.read_text(encoding="utf-8"))
    charts = []
    for chart in root.iterfind(f".//{{{SVG}}}g[@class='chart']"):
        title = "".join(chart.find(f"{{{SVG}}}text").itertext())
        inner = ElementTree.tostring(chart, encoding="unicode")
        charts.append(f'<svg viewBox="0 0 {CHART_WIDTH} {CHART_HEIGHT}" role="img" tabindex="0" '
                      f'aria-label="Chart: {escaped(title)}" font-family="sans-serif" '
                      f'font-size="12">{inner}</svg>')
    return "".join(charts)


# On paper, a figure with a slider shows all its rows up to this many.
FEW_ROWS = 12


def figure_html(path, item):
    """A picture or charts, inline, with the caption; a line that says so where it was not made.

    item: a Figure as options.json holds it.
    """
    caption = escaped(item["caption"]) + code_html(item.get("code"))
    if not path.exists():
        return f"<p>{caption} (Not made in this run.)</p>"
    place = f'id="{anchor(path.parent.name)}-{anchor(path.stem)}"'
    if path.suffix == ".svg":
        return (f'<figure class="charts" {place}>{charts_html(path)}'
                f"<figcaption>{caption}</figcaption></figure>")

    first = item.get("first")
    count = len(item.get("rows") or ())
    if first is None or not count:
        return (f"<figure {place}>{picture_html(path, item)}"
                f"<figcaption>{caption}</figcaption></figure>")

    # A slider shows one row of the picture.
    first = min(max(int(first), 0), count - 1)
    label = str(item["rows"][0]).partition(" ")[0].capitalize()
    control = slider_html(label, count, first) + '<button type="button">all at once</button></div>'
    few = ' class="few"' if count <= FEW_ROWS else ""
    return (f'<figure {place}{few} data-first="{first}" style="--count:{count};--shown:{first}">'
            f"{control}{picture_html(path, item)}<figcaption>{caption}</figcaption></figure>")


def slider_html(label, count, first):
    """A slider from 0 to count − 1 in a box that the caller closes; only the script shows it."""
    return (f'<div class="control"><label>{escaped(label)} <input type="range" min="0" '
            f'max="{count - 1}" value="{first}"></label><output></output>')


THRESHOLD_HEAD = ("arm", "TP", "FP", "FN", "TN", "sensitivity", "specificity", "precision", "F1")


def thresholds_html(item):
    """Thresholds: a slider and a table, which shows ½ where no script runs."""
    thresholds = item["thresholds"]
    middle = len(thresholds) // 2
    rows = []
    for arm, counts in item["counts"].items():
        confusion = Confusion(*counts[middle])
        values = map(lungaug.format_number, metrics(confusion))
        rows.append((arm, *map(format_count, confusion), *values))
    data = (f'data-thresholds="{html.escape(json.dumps(thresholds))}" '
            f'data-counts="{html.escape(json.dumps(item["counts"]))}"')
    caption = escaped(item["caption"]) + code_html(item.get("code"))
    return (f'<figure id="threshold" {data}>'
            f'{slider_html("Threshold", len(thresholds), middle)}</div>'
            f'{table_html("Confusion matrices at the threshold", THRESHOLD_HEAD, rows)}'
            f"<figcaption>{caption}</figcaption></figure>")


def item_html(item, folder):
    """A Text, Figure, Table or Thresholds, as options.json holds it, as HTML."""
    if item["kind"] == "figure":
        # Only a file of the stage's own folder is read, whatever options.json says.
        return figure_html(folder / Path(item["file"]).name, item)
    if item["kind"] == "table":
        return table_html(item["caption"], item["head"], item["rows"])
    if item["kind"] == "thresholds":
        return thresholds_html(item)
    return f"<p>{escaped(item['text'])}</p>"


def stage_rows(pages):
    """When each stage was run, how long it took, and how; pages: stage → JSON."""
    rows = []
    for stage, page in pages.items():
        facts = page.get("facts") or {}
        rows.append((stage, *[facts.get(name, "–") for name in ("time", "date", "command")]))
    return rows


def joined(values):
    """What stages say, as one text; values: stage → value. Where they differ, each by its name."""
    distinct = list(dict.fromkeys(values.values()))
    if len(distinct) == 1:
        return str(distinct[0])
    parts = []
    for value in distinct:
        stages = [stage for stage, other in values.items() if other == value]
        parts.append(f"{value} ({', '.join(stages)})")
    return "; ".join(parts)


def machine_rows(pages):
    """On what machine and with which versions the stages were run; pages: stage → JSON."""
    by_name = {}
    for stage, page in pages.items():
        for name, value in (page.get("facts") or {}).items():
            if name not in ("time", "date", "command"):
                by_name.setdefault(name, {})[stage] = str(value)
    return [(name, joined(values)) for name, values in by_name.items()]


def option_rows(pages):
    """The stages' options: rows of text, and the numbers of those that differ from the preset's."""
    by_option = {}
    for stage, page in pages.items():
        options = page.get("options") or {}
        preset = options.get("preset")
        for option in lungaug.options_of(stage):
            if option.dest not in options:
                continue
            value = options[option.dest]
            default = getattr(option, preset) if preset in ("demo", "thesis") else None
            # Where the preset has no value, none can differ from it.
            differs = default is not None and value != default
            text = "–" if value is None else str(value)
            row = (option.name, text, str(default) if differs else "the same", differs)
            by_option.setdefault(row, []).append(stage)

    rows = []
    changed = []
    for (*cells, differs), stages in by_option.items():
        if differs:
            changed.append(len(rows))
        names = "all" if len(stages) == len(pages) else ", ".join(stages)
        rows.append((*cells, names))
    return rows, changed


def run_html(pages):
    """How the stages were run: times, machine, versions, options; pages: stage → JSON."""
    rows, changed = option_rows(pages)
    return [
        table_html("The last command of each stage; one that resumes does only what is left.",
                   ("stage", "time", "date", "command"), stage_rows(pages)),
        table_html("Machine and versions.", ("", "of the stages"), machine_rows(pages)),
        table_html("Options. Those that differ from the preset's are bold.",
                   ("option", "value", "preset", "stages"), rows, changed),
    ]


def contents_html(sections):
    """A table of contents: a link to each heading, and to each of its figures."""
    lines = []
    for heading, items in sections.items():
        figures = []
        for name in re.findall('<figure[^>]* id="([^"]*)"', "".join(items)):
            title = name.partition("-")[2].replace("-", " ") or name
            # A scan's picture is named after its series.
            if re.fullmatch("[0-9 ]+", title):
                title = "scan"
            figures.append(f'<li><a href="#{name}">{title}</a></li>')
        inner = f"<ul>{''.join(figures)}</ul>" if figures else ""
        lines.append(f'<li><a href="#{anchor(heading)}">{escaped(heading)}</a>{inner}</li>')
    return (f"<nav><details open><summary>Contents</summary><ul>{''.join(lines)}</ul></details>"
            "</nav>")


def section_html(heading, items):
    """A heading and what belongs to it."""
    return (f'<section id="{anchor(heading)}"><h2>{escaped(heading)}</h2>{"".join(items)}'
            "</section>")


def next_stage(run, stages=lungaug.STAGES):
    """The first of some stages that has not finished in a run; None where all have."""
    for stage, folder in zip(lungaug.STAGES, PAGE_FOLDERS):
        if stage in stages and not (run / folder / "options.json").exists():
            return stage
    return None


def read_pages(run):
    """stage → the page that it left in a run, as JSON. Raises Refusal where there is none."""
    remedy = f"run python lungaug.py --run {run} first"
    pages = {}
    for stage, name in zip(lungaug.STAGES, PAGE_FOLDERS):
        path = run / name / "options.json"
        if path.exists():
            pages[stage] = lungaug.read_json(path, remedy)
    check(pages, run / PAGE_FOLDERS[0] / "options.json", "not found", remedy)
    return pages


def page_sections(run, pages):
    """heading → its items as HTML, in the order of the page, less those without any."""
    remedy = f"run python lungaug.py --run {run} first"
    sections = {heading: [] for heading in HEADINGS}
    folders = dict(zip(lungaug.STAGES, PAGE_FOLDERS))
    for stage, left in pages.items():
        path = run / folders[stage] / "options.json"
        # A page begins with a heading; what stands before one in a damaged page has no section.
        section = None
        with lungaug.refuse_on_error(path, remedy):
            for item in left["page"]:
                if item["kind"] == "heading":
                    section = sections.setdefault(item["text"], [])
                else:
                    section.append(item_html(item, path.parent))
            # What it says of the run must be readable, too.
            run_html({stage: left})

    sections["This run"] += run_html(pages)
    return {heading: items for heading, items in sections.items() if items}


def draw_report(run):
    """Draw <run>/report.html from the pages that the stages left, in the thesis' order.

    Of a run that is not finished it shows what there is. Returns its path. Raises Refusal where no
    stage has left a page.
    """
    pages = read_pages(run)
    sections = page_sections(run, pages)
    name = escaped(run.resolve().name)
    first_page = next(iter(pages.values()))
    preset = (first_page.get("options") or {}).get("preset") or "unknown"
    plot = json.dumps({"left": LEFT, "right": RIGHT, "top": TOP, "bottom": BOTTOM,
                       "width": CHART_WIDTH})

    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width,initial-scale=1">',
        f"<title>{name}: lung nodule augmentation, preset {escaped(preset)}</title>",
        f"<style>{STYLE}</style></head>",
        f'<body data-plot="{html.escape(plot)}"><h1>{TITLE}: run {name}, '
        f"preset {escaped(preset)}</h1>",
    ]
    missing = next_stage(run)
    if missing:
        parts.append('<p class="next">This run is not finished. Next: '
                     f"<code>python {missing}.py --run {escaped(run)}</code></p>")

    before = [heading for heading in BEFORE_CONTENTS if heading in sections]
    parts += [section_html(heading, sections[heading]) for heading in before]
    parts.append(contents_html(sections))
    parts += [section_html(heading, items) for heading, items in sections.items()
              if heading not in before]
    parts.append(f"<script>{SCRIPT}</script></body></html>\n")
    lungaug.write(run / "report.html", "".join(parts))
    return run / "report.html"


def redraw_report():
    """The command `python evaluate.py report`."""
    options = lungaug.parse("Draw report.html again.", "evaluate", words=sys.argv[2:])
    print(draw_report(options.run))


def unpaired_rows(results, others):
    """The rows of the table of differences between two runs, an arm each, as text."""
    rows = []
    counts = (results["counts"]["scans"], others["counts"]["scans"])
    for arm, summary in results["arms"].items():
        if arm not in others["arms"]:
            continue
        cells = []
        for name in ("f1_argmax", "auc"):
            cells.append(unpaired_cell(summary[name], others["arms"][arm][name], counts))
        rows.append((arm, *cells))
    return rows


def unpaired_cell(entry, other, counts):
    """One entry of a summary minus another's, with its interval; – for what there is not.

    A test set of one scan, or with nodules in one alone, has no interval.
    """
    if entry["mean"] is None or other["mean"] is None:
        return "–"
    difference = entry["mean"] - other["mean"]
    if entry["error"] is None or other["error"] is None:
        return format_difference({"difference": difference, "low": None, "high": None})
    low, high = welch_interval(difference, (entry["error"], other["error"]), counts)
    return format_difference({"difference": difference, "low": low, "high": high})


def print_arms_of_runs(runs_results):
    """Print the arms of several runs in one table, and each arm's difference from the first run.

    runs_results: run → its results.json. Raises Refusal where that is damaged.
    """
    first_run, *_ = runs_results
    rows = []
    differences = []
    test_sets = set()
    for run, results in runs_results.items():
        with lungaug.refuse_on_error(run / "evaluation" / "results.json", "run evaluate.py again"):
            rows += [(str(run), *cells) for cells in arm_rows(results)]
            verdict_word = results["verdict"].partition(":")[0]
            rows.append((str(run), verdict_word, *[""] * (len(ARMS_HEAD) - 1)))
            test_sets.add(results["counts"]["prepared"])
            if run != first_run:
                name = f"{run} − {first_run}"
                differences += [(name, *cells)
                                for cells in unpaired_rows(results, runs_results[first_run])]

    lungaug.print_table("Arms of each run", ("run", *ARMS_HEAD), rows)
    if differences:
        lungaug.print_table("Differences, with 95% intervals that treat the two test sets as "
                            "independent, for these trainings", UNPAIRED_HEAD, differences)
    if len(test_sets) > 1:
        print("\nThe runs are tested on different scans, splits or cubes: their numbers differ for "
              "that reason, too.")


def parse_compared(words):
    """The runs that stand behind `python evaluate.py --compare`; --help explains it."""
    parser = argparse.ArgumentParser(
        prog="evaluate.py --compare", usage="python %(prog)s RUN [RUN ...]", allow_abbrev=False,
        description="Show several runs beside each other: a table of their arms, the differences "
                    "from the first run, and their GANs' loss curves in one picture, "
                    "comparison.svg in the first run's evaluation folder.")
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN",
                        help="folder of a run; one that is not evaluated yet has curves only")
    return parser.parse_args(words).runs


def compare_runs(runs):
    """The command `python evaluate.py --compare RUN …`: one table of arms, one picture of curves.

    A run that is not evaluated yet has curves only. Leaves comparison.svg in the first run's
    evaluation folder.
    """
    check(len(runs) > 0, "--compare", "no runs", "give the folders of runs")
    runs_results = {}
    logs = {}
    for run in runs:
        path = run / "evaluation" / "results.json"
        log = lungaug.read_log(run / "gan" / "log.jsonl")
        if log:
            # Draw it alone first: of a damaged one, the message then names the run.
            with refuse_damaged_log(run, "gan", "train_gan.py"):
                figure_7_of_runs({str(run): log})
            logs[str(run)] = log
        if path.exists():
            remedy = f"run python evaluate.py --run {run} again"
            runs_results[run] = lungaug.read_json(path, remedy)
        else:
            check(log, run, "has neither a GAN nor results", f"run python lungaug.py --run {run}")
            print(f"{run}: not evaluated, so its curves only.")

    if runs_results:
        print_arms_of_runs(runs_results)
    if logs:
        path = runs[0] / "evaluation" / "comparison.svg"
        figure = figure_7_of_runs(logs)
        lungaug.write(path, figure)
        print(f"\nFigure 7 of {len(logs)} runs: {path}.")


def print_results(results):
    """Print the distances, the quality, the arms, and the verdict; Tables 2–5 are on the page."""
    novelty = results["novelty"]
    generated = format_distances(record["distance"] for record in novelty["generated"])
    held_out = format_distances(novelty["held_out_distances"])
    print(f"\nl2 distance to the nearest training cube: generated {generated}; "
          f"real test positives {held_out}.")

    for name in CLASS_NAMES.values():
        if name in results["quality"]:
            lungaug.print_table(f"Quality of generated {name}s", QUALITY_HEAD,
                                quality_rows(results["quality"][name]))
    if "selection" in results["quality"]:
        print(f"\n{selection_sentence(results['quality']['selection'])}")

    lungaug.print_table("Operating points, each nodule counted once", OPERATING_HEAD,
                        operating_rows(results))
    lungaug.print_table("Differences, with 95% intervals over test scans, for these trainings; "
                        "spread: standard deviation over the repeats",
                        DIFFERENCE_HEAD, difference_rows(results))
    lungaug.print_table(f"The arms. {repeats_sentence(results)}", ARMS_HEAD, arm_rows(results))
    print(f"\n{results['verdict']}")


def compare_and_count(dataset, test, validation):
    """The verdict and the numbers on which it rests, as results.json holds them."""
    prevalence = training_prevalence(dataset)
    measured = measure_arms(test)
    differences = compare_arms(measured)
    n_scans = int(test.scans.max() + 1)
    n_nodules = len(dataset.positives["test"])
    return {
        "verdict": verdict(differences, n_scans, n_nodules),
        "counts": {
            "prepared": dataset.fingerprint,
            "repeats": len(test.scores["real"]),
            "scans": n_scans,
            "nodules": n_nodules,
            "negatives": int((test.labels == 0).sum()),
        },
        "tables": tables(test),
        "control": table_of(*CONTROL, test),
        "arms": {arm: summarize_arm(arm, test, validation, measured, prevalence)
                 for arm in test.scores},
        "differences": differences,
    }


def main():
    if sys.argv[1:2] == ["report"]:
        redraw_report()
        return
    if sys.argv[1:2] == ["--compare"]:
        compare_runs(parse_compared(sys.argv[2:]))
        return

    options = lungaug.parse(__doc__, "evaluate")
    run = options.run
    dataset = preprocessing.open_dataset(run)
    lungaug.apply_preset(options, "evaluate", dataset.info["preset"])
    device = lungaug.pick_device(options.device)
    # --precision is for the training of the GAN alone.
    lungaug.allow_tf32("float32")
    folder = run / "evaluation"
    lungaug.remove_stale(run)

    # Draw first what needs no trained network, to look at a training that runs.
    draw_cubes(folder, dataset)
    draw_curves(folder, run)
    print(f"Wrote figures 2, 3 and (where logs exist) 7, 8 to {folder}.", flush=True)
    missing = next_stage(run, lungaug.STAGES[1:3])
    if missing:
        lungaug.save_page(folder, options, [*sample_items(dataset), *curve_items(folder)])
        print(f"{draw_report(run)}: what there is so far. For the rest run "
              f"python {missing}.py --run {run} first, until it ends.")
        return

    # Score the validation set, for a threshold, and the test set.
    networks = load_networks(run, dataset, device)
    validation = score_split(networks, dataset, "validation", device)
    test = score_split(networks, dataset, "test", device)
    write_scores(folder / "scores.csv", dataset, test.scores)

    # Compare the arms, and look at what was generated.
    results = compare_and_count(dataset, test, validation)
    results["settings"] = lungaug.settings_of(options, "results")
    results["novelty"] = draw_novelty(folder, run, dataset)
    results["quality"], profiles = assess_generated(run, dataset, networks, options.seed, device)
    results["best"] = draw_best(folder, run, dataset, test, networks["real"][0], device)
    results["errors"] = {arm: draw_errors(folder, dataset, test, arm)
                         for arm in ERROR_ARMS if arm in test.scores}
    results = null_for_nan(results)

    # Report.
    lungaug.write(folder / "roc.svg", figure_roc(test))
    lungaug.write(folder / "profiles.svg", figure_profiles(profiles))
    lungaug.write(folder / "results.json", results)
    print_results(results)
    lungaug.save_page(folder, options, page(results, dataset, folder, thresholds_of(test)))
    draw_report(run)


if __name__ == "__main__":
    lungaug.command(main)
