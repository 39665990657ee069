"""Section 5: nearest neighbours, the confusion matrix and its metrics, Tables 2–5, what they do not show; the figures.

    python -m pytest tests/test_evaluate.py -v
"""

import csv
import itertools
import json
import math
import os
import zlib
from collections import Counter
from fractions import Fraction
from xml.etree import ElementTree

import lungaug
from lungaug import Refusal

import numpy as np
import pytest
import torch
from scipy import stats

import evaluate
import preprocessing
from evaluate import Confusion, Line, Metrics
from helpers import CPU, as_set, cubes_of, eight, same_state, small_run, write_generated
from models import Classifier, Critic


THESIS = {      # section 5.2, as printed: TP, FP, FN, TN; sensitivity, specificity, precision, F1
    2: ((1583, 2776, 50, 113451), "0.969 0.976 0.363 0.528"),
    3: ((1377, 750, 256, 115477), "0.843 0.994 0.647 0.732"),
    4: ((919, 8539, 714, 107688), "0.563 0.927 0.097 0.166"),
    5: ((1215, 815, 418, 115412), "0.744 0.993 0.598 0.663"),
}


def printed(confusion):
    """The four metrics of a matrix with three decimals, half up, from exact fractions."""
    tp, fp, fn, tn = map(Fraction, confusion)
    precision, sensitivity = tp / (tp + fp), tp / (tp + fn)
    exact = sensitivity, tn / (tn + fp), precision, 2 / (1 / precision + 1 / sensitivity)
    return " ".join(f"0.{math.floor(1000 * value + Fraction(1, 2)):03d}" for value in exact)


# 5.1 Novelty

def nearest_by_loop(queries, references):
    """argmin and min of the l2 norm, pair by pair."""
    found = [min((math.sqrt(((q.astype(float) - r) ** 2).sum()), i) for i, r in enumerate(references)) for q in queries]
    return [i for _, i in found], [distance for distance, _ in found]


@pytest.mark.parametrize("shape", [(7,), (3, 4), (2, 3, 4), (1, 3, 2, 4)])
def test_eq_5_1_nearest_neighbour__is_the_loops(shape):
    """For cubes of any number of axes: the index and the l2 distance that a loop over all pairs finds."""
    rng = np.random.default_rng(len(shape))
    queries, references = rng.normal(size=(6, *shape)), rng.normal(size=(11, *shape))
    indices, distances = evaluate.nearest_neighbours(queries, references)
    expected = nearest_by_loop(queries, references)
    assert indices.tolist() == expected[0] and np.allclose(distances, expected[1], rtol=1e-12, atol=0)


def test_eq_5_1_nearest_neighbour__by_hand(compared):
    """(0, 0) among (3, 4), (1, 1), (6, 8): the second, at √2; (6, 7): the third, at 1."""
    indices, distances = evaluate.nearest_neighbours([[0, 0], [6, 7]], [[3, 4], [1, 1], [6, 8]])
    compared("nearest", indices, [1, 2])
    compared("at distances", distances, [math.sqrt(2), 1.0])
    assert indices.tolist() == [1, 2] and distances.tolist() == [math.sqrt(2), 1]


def test_eq_5_1_nearest_neighbour__ties_give_the_first():
    """Of references equally near the first counts."""
    indices, _ = evaluate.nearest_neighbours([[0.0, 0]], [[2, 0], [0, 1], [1, 0], [-1, 0]])
    assert indices.tolist() == [1]


def test_eq_5_1_nearest_neighbour__float32_and_int16_do_not_round_or_overflow():
    """int16 HU neither wrap in a difference nor in a square; a float32 copy lies at exactly 0."""
    hu = np.array([[-32768, 0], [32767, 0]], np.int16)
    assert evaluate.nearest_neighbours(hu[:1], hu[1:])[1].tolist() == [65535]
    cubes = np.random.default_rng(0).normal(size=(5, 4, 4, 4)).astype(np.float32)
    assert evaluate.nearest_neighbours(cubes[3:4], cubes)[1].tolist() == [0]


@pytest.mark.parametrize("size", [1, 5, 7, 29, 128])
def test_eq_5_1_nearest_neighbour__in_parts_as_at_once(tmp_path, size):
    """Whatever the number of cubes read at a time, the result is that of all at once."""
    dataset = small_run(tmp_path)
    rows, flips, _ = preprocessing.labelled(dataset, "train")
    queries = np.random.default_rng(3).uniform(-1, 1, (4, 6, 6, 6))
    references = np.concatenate([eight(cubes_of(dataset, "positives", "train")),
                                 cubes_of(dataset, "negatives", "train")])
    assert len(rows) == len(references) == 29
    where, distances = evaluate.nearest_training(queries, dataset, rows, flips, size)
    _, expected = evaluate.nearest_neighbours(queries, references)
    assert np.allclose(distances, expected, atol=1e-5)
    found = preprocessing.read_cubes(dataset, rows[where], flips[where])[:, 0]
    assert np.allclose(np.sqrt(((queries - found) ** 2).sum((1, 2, 3))), expected, atol=1e-5)


@pytest.mark.parametrize("row", [0, 4, 5, 28])
def test_eq_5_1_nearest_neighbour__finds_the_first_and_the_last(tmp_path, row):
    """A copy of the first or last cube, of the data or of a part, is found at its place."""
    dataset = small_run(tmp_path)
    rows, flips, _ = preprocessing.labelled(dataset, "train")
    copy = preprocessing.read_cubes(dataset, rows[[row]], flips[[row]])[:, 0]
    assert [found.tolist() for found in evaluate.nearest_training(copy, dataset, rows, flips, 5)] == [[row], [0]]


@pytest.mark.parametrize("size", [1, 2, 3, 128])
def test_eq_5_1_nearest_neighbour__ties_give_the_first_over_the_parts(tmp_path, size):
    """The same cube again in a later part does not replace the first."""
    dataset = small_run(tmp_path)
    rows, flips = np.tile(dataset.negatives["train"][:2], (3, 1)), np.zeros(6, int)
    queries = cubes_of(dataset, "negatives", "train")[1:2]
    assert evaluate.nearest_training(queries, dataset, rows, flips, size)[0].tolist() == [1]


@pytest.mark.parametrize("kind, axes, label", [("positives", (), 1), ("positives", (1, 2), 1), ("negatives", (), 0)])
def test_draw_novelty__a_copy_of_a_training_cube_is_caught(tmp_path, kind, axes, label):
    """A generator that memorised a training cube, or a flip of one, is shown with distance 0 and the cube's label."""
    dataset = small_run(tmp_path)
    write_generated(tmp_path)
    copy = np.flip(cubes_of(dataset, kind, "train")[2], axes)
    made = np.concatenate([np.rint(copy[None] * 700 - 300).astype(np.int16), np.full((5, 6, 6, 6), 400, np.int16)])
    lungaug.write(tmp_path / "classifiers" / "generated" / "positive.npy", made)
    preprocessing.open_array.cache_clear()
    found = evaluate.draw_novelty(tmp_path / "evaluation", tmp_path, dataset)
    first, *others = found["generated"]
    assert first["distance"] == 0 and first["nearest_label"] == label and first["nearest_seriesuid"] == "1.2.train"
    assert all(other["distance"] > 1 for other in others)
    assert all(distance > 1 for distance in found["held_out_distances"])


@pytest.mark.parametrize("accepted", [0, 2, 6, 9])
def test_draw_novelty__six_figures_and_which_were_accepted(tmp_path, accepted):
    """Figures 9–14 show accepted samples, then the best of the rejected, and say which is which."""
    dataset = small_run(tmp_path)
    write_generated(tmp_path, positives=accepted)
    rejected = np.full((6, 6, 6, 6), -1000, np.int16)
    lungaug.write(tmp_path / "classifiers" / "generated" / "positive_rejected.npy", rejected)
    preprocessing.open_array.cache_clear()
    found = evaluate.draw_novelty(tmp_path, tmp_path, dataset)["generated"]
    assert [row["figure"] for row in found] == [9, 10, 11, 12, 13, 14]
    assert [row["accepted"] for row in found] == [True] * min(accepted, 6) + [False] * (6 - min(accepted, 6))
    assert all((tmp_path / f"figure_{number}.png").stat().st_size for number in range(9, 15))


def test_draw_novelty__the_figures_are_of_samples_from_all_of_the_accepted(tmp_path, monkeypatch):
    """Of more than six accepted samples the figures show the first, the last, some between, each beside its nearest."""
    dataset, pairs = small_run(tmp_path), []
    made = write_generated(tmp_path, positives=11)["positive"] / 700 + 3 / 7
    monkeypatch.setattr(evaluate, "pair",
                        lambda left, right, window: pairs.append((left, right)) or np.zeros((1, 1), np.uint8))
    found = evaluate.draw_novelty(tmp_path, tmp_path, dataset)["generated"]
    assert pairs[::2] == pairs[1::2]        # each in both windows
    del pairs[1::2]
    assert np.allclose([left for left, _ in pairs], made[::2], atol=1e-5)
    assert np.allclose([np.linalg.norm(left - right) for left, right in pairs], [row["distance"] for row in found],
                       atol=1e-4)


def test_draw_novelty__distances_are_those_of_a_loop(tmp_path):
    """The distances reported, of generated and of held-out samples, are those to the nearest training cube."""
    dataset = small_run(tmp_path)
    made = write_generated(tmp_path, positives=6)["positive"] / 700 + 3 / 7
    training = np.concatenate([eight(cubes_of(dataset, "positives", "train")), cubes_of(dataset, "negatives", "train")])
    found = evaluate.draw_novelty(tmp_path, tmp_path, dataset)
    assert np.allclose([row["distance"] for row in found["generated"]], nearest_by_loop(made, training)[1], atol=1e-4)
    test = cubes_of(dataset, "positives", "test")
    assert np.allclose(found["held_out_distances"], nearest_by_loop(test, training)[1], atol=1e-4)


# 5.2 Classification metrics

def test_eq_5_2_confusion__rows_by_hand(compared):
    """Truth 1 1 1 0 0 0 0, prediction 1 1 0 1 0 0 0: TP 2, FP 1, FN 1, TN 3."""
    confusion = evaluate.confusion_matrix([1, 1, 1, 0, 0, 0, 0], [1, 1, 0, 1, 0, 0, 0])
    compared("TP, FP, FN, TN", confusion, [2, 1, 1, 3])
    assert confusion == Confusion(tp=2, fp=1, fn=1, tn=3)


def test_eq_5_2_confusion__is_the_count_of_pairs():
    """Random labels and predictions: each cell counts its (label, prediction) pair."""
    rng = np.random.default_rng(0)
    for n in range(40):
        labels, predictions = rng.integers(0, 2, (2, n))
        pairs = Counter(zip(labels.tolist(), predictions.tolist()))
        assert evaluate.confusion_matrix(labels, predictions) == (pairs[1, 1], pairs[0, 1], pairs[1, 0], pairs[0, 0])


def test_eq_5_2_confusion__numbers_of_python_that_json_holds():
    """The counts are plain whole numbers, also of numpy booleans and lists."""
    confusion = evaluate.confusion_matrix(np.array([True, False]), [1, 0])
    assert json.loads(json.dumps(confusion._asdict())) == {"tp": 1, "fp": 0, "fn": 0, "tn": 1}


SMALL = [Confusion(*cells) for cells in itertools.product(range(4), repeat=4)]


def probability(hits, cases):
    """hits of cases, nan where there is no case."""
    return hits / cases if cases else math.nan


ONE_CONFUSION = Confusion(tp=3, fp=1, fn=2, tn=4)     # one of SMALL's kind, whose metrics the audit prints


def test_eq_5_2_sensitivity__share_of_the_positives_found(compared):
    """TP of TP + FN, in every small matrix; nan without positives."""
    compared("sensitivity", evaluate.sensitivity(ONE_CONFUSION), 3 / 5)
    assert all(np.array_equal(evaluate.sensitivity(c), probability(c.tp, c.tp + c.fn), equal_nan=True) for c in SMALL)


def test_eq_5_2_specificity__share_of_the_negatives_left_alone(compared):
    """TN of TN + FP, in every small matrix; nan without negatives."""
    compared("specificity", evaluate.specificity(ONE_CONFUSION), 4 / 5)
    assert all(np.array_equal(evaluate.specificity(c), probability(c.tn, c.tn + c.fp), equal_nan=True) for c in SMALL)


def test_eq_5_2_specificity__is_the_sensitivity_of_the_classes_exchanged():
    """With the classes exchanged, TP is TN and FP is FN, and specificity is sensitivity."""
    swapped = [Confusion(c.tn, c.fn, c.fp, c.tp) for c in SMALL]
    assert all(np.array_equal(evaluate.specificity(c), evaluate.sensitivity(s), equal_nan=True)
               for c, s in zip(SMALL, swapped))


def test_eq_5_2_precision__share_of_the_alarms_that_are_right(compared):
    """TP of TP + FP, in every small matrix; nan without an alarm."""
    compared("precision", evaluate.precision(ONE_CONFUSION), 3 / 4)
    assert all(np.array_equal(evaluate.precision(c), probability(c.tp, c.tp + c.fp), equal_nan=True) for c in SMALL)


def test_eq_5_2_f1__is_the_harmonic_mean(compared):
    """2/(1/precision + 1/sensitivity), wherever something is found."""
    compared("F1", evaluate.f1(ONE_CONFUSION), 2 / 3)
    for c in (c for c in SMALL if c.tp):
        assert evaluate.f1(c) == pytest.approx(2 / ((c.tp + c.fp) / c.tp + (c.tp + c.fn) / c.tp), rel=1e-14)


def test_eq_5_2_f1__is_0_where_all_is_wrong_and_nan_where_there_is_nothing():
    """No hit among alarms or positives: 0; neither a positive nor an alarm: nan."""
    assert evaluate.f1(Confusion(0, 2, 0, 5)) == evaluate.f1(Confusion(0, 0, 3, 5)) == 0
    assert math.isnan(evaluate.f1(Confusion(0, 0, 0, 5)))


@pytest.mark.parametrize("table", [2, 3, 4])
def test_eq_5_2_f1__all_printed_metrics(table):
    """Tables 2–4: all printed metrics are their matrix' with three decimals, rounded, not cut off."""
    confusion, metrics = THESIS[table]
    ours = " ".join(map(lungaug.format_number, evaluate.metrics(Confusion(*confusion))))
    assert ours == metrics == printed(confusion)


def test_metrics__names_go_with_values():
    """Each field of Metrics is the function of its name."""
    c = Confusion(5, 3, 2, 7)
    assert evaluate.metrics(c) == Metrics(sensitivity=5 / 7, specificity=7 / 10, precision=5 / 8, f1=10 / 15)


def test_metrics__0_of_0_is_nan_printed_as_a_dash_and_null_in_json():
    """What has no value is nan, – in a table and null in results.json."""
    nothing = Confusion(0, 0, 0, 0)
    assert [lungaug.format_number(value) for value in evaluate.metrics(nothing)] == ["–"] * 4
    as_json = json.loads(json.dumps(evaluate.null_for_nan(evaluate.summarize_repeats([nothing])), allow_nan=False))
    assert as_json["metrics"] == as_json["spread"] == dict.fromkeys(Metrics._fields)


# The thesis' Tables 2–5

def test_num_table_2__the_printed_matrix_and_metrics():
    """Table 2, conventional baseline: .969, .976, .363, .528."""
    assert evaluate.TABLES[2][0] == "real" and evaluate.TABLES[2][2] == THESIS[2][0]
    assert printed(THESIS[2][0]) == THESIS[2][1] == shown(2)


def test_num_table_3__the_printed_matrix_and_metrics():
    """Table 3, mixed: .843, .994, .647, .732."""
    assert evaluate.TABLES[3][0] == "mixed" and evaluate.TABLES[3][2] == THESIS[3][0]
    assert printed(THESIS[3][0]) == THESIS[3][1] == shown(3)


def test_num_table_4__the_printed_matrix_and_metrics():
    """Table 4, only generated: .563, .927, .097, .166."""
    assert evaluate.TABLES[4][0] == "fake" and evaluate.TABLES[4][2] == THESIS[4][0]
    assert printed(THESIS[4][0]) == THESIS[4][1] == shown(4)


def test_num_table_5__the_printed_matrix():
    """Table 5, the critic's auxiliary head."""
    assert evaluate.TABLES[5][0] == "critic" and evaluate.TABLES[5][2] == THESIS[5][0]


def test_num_table_5__erratum_its_precision_is_cut_off():
    """Table 5: 1215/2030 = .59852 is .599 where the other fifteen are rounded; the thesis prints .598."""
    assert printed(THESIS[5][0]) == "0.744 0.993 0.599 0.663" == shown(5)
    assert THESIS[5][1] == "0.744 0.993 0.598 0.663" and math.floor(1000 * 1215 / 2030) == 598


def shown(table):
    """A table's metrics of the thesis' matrix, as our tables print them."""
    metrics = evaluate.summarize_repeats([evaluate.TABLES[table][2]])["metrics"]
    return " ".join(lungaug.format_number(metrics[key]) for key in Metrics._fields)


def test_num_table_1__erratum_two_test_samples_fewer_than_in_tables_2_to_5():
    """Each matrix holds 1,633 + 116,227 = 117,860 samples; Table 1's test set 1,632 + 116,226 = 117,858."""
    for (tp, fp, fn, tn), _ in THESIS.values():
        assert (tp + fn, fp + tn, tp + fp + fn + tn) == (1633, 116227, 117860)
    assert preprocessing.TABLE_1["test"] == (1632, 116226) and sum(preprocessing.TABLE_1["test"]) == 117858


def as_nodules(table):
    """A matrix of the thesis with its positives counted as 204 nodules in place of 8 × 204 flips."""
    confusion = Confusion(*THESIS[table][0])
    return confusion._replace(tp=confusion.tp / 8, fn=confusion.fn / 8)


def test_num_table_2__erratum_flips_inflate_precision():
    """Eight flips a positive count as eight hits: as nodules, .363 becomes .067; sensitivity stays."""
    assert 1632 == 8 * 204 and round(evaluate.precision(as_nodules(2)), 3) == 0.067
    assert evaluate.sensitivity(as_nodules(2)) == evaluate.sensitivity(Confusion(*THESIS[2][0]))


def test_num_table_3__erratum_flips_inflate_precision():
    """As nodules, .647 becomes .187."""
    assert round(evaluate.precision(as_nodules(3)), 3) == 0.187


def test_num_table_3__erratum_it_and_table_2_are_two_operating_points():
    """False alarms of 2.39% and .65%, misses of 3.1% and 15.7%: one has fewer of these, the other fewer of those."""
    conventional, mixed = (Confusion(*THESIS[table][0]) for table in (2, 3))
    assert [round(1 - evaluate.specificity(c), 4) for c in (conventional, mixed)] == [0.0239, 0.0065]
    assert [round(1 - evaluate.sensitivity(c), 3) for c in (conventional, mixed)] == [0.031, 0.157]


def test_num_table_1__erratum_one_and_a_half_percent_counts_flips():
    """8,160 of 589,290 is 1.4%; the 1,020 nodules among as many negatives are 0.175%."""
    assert round(8160 / 589_290, 3) == 0.014
    assert round(1020 / (1020 + 581_130), 5) == 0.00175


def test_num_table_1__erratum_166_nodules_of_luna16_are_missing():
    """LUNA16 has 1,186 nodules; Table 1 has 8 · 1,020, where 8 · 1,186 would be 9,488."""
    assert sum(positives for positives, _ in preprocessing.TABLE_1.values()) == 8 * 1020
    assert 1186 - 1020 == 166 and 8 * 1186 == 9488


def test_num_table_1__erratum_cut_in_floating_point():
    """1,633 and 116,227 are what is left of 8,160 and 581,130 after int((0.7 + 0.1)·n): 0.7 + 0.1 is below 0.8."""
    assert 0.7 + 0.1 < 0.8
    assert [n - int((0.7 + 0.1) * n) for n in (8160, 581_130)] == [1633, 116_227]


def test_num_table_1__erratum_multiples_of_8_prove_nothing():
    """70%, 10% and 20% of 8,160 are multiples of 8 whether nodules or flips are cut; 70% of 581,130 is exact, too."""
    assert [8160 * share // 100 % 8 for share in (70, 10, 20)] == [0, 0, 0]
    assert preprocessing.TABLE_1["train"] == (8160 * 70 // 100, 581_130 * 70 // 100)


def matthews(c):
    """Matthews' correlation of truth and prediction."""
    return (c.tp * c.tn - c.fp * c.fn) / math.sqrt((c.tp + c.fp) * (c.tp + c.fn) * (c.tn + c.fp) * (c.tn + c.fn))


def test_num_table_3__erratum_its_rank_depends_on_the_prevalence():
    """Youden's index, the odds ratio and d′, which do not depend on the prevalence, rank the baseline first; F1,
    accuracy and Matthews' correlation, which do, rank the mixed classifier first."""
    conventional, mixed = (Confusion(*THESIS[table][0]) for table in (2, 3))
    for measure in (evaluate.f1, lambda c: (c.tp + c.tn) / sum(c), matthews):
        assert measure(mixed) > measure(conventional)
    for measure in (
            lambda c: evaluate.sensitivity(c) + evaluate.specificity(c) - 1,
            lambda c: c.tp * c.tn / (c.fp * c.fn),
            lambda c: stats.norm.ppf(evaluate.sensitivity(c)) + stats.norm.ppf(evaluate.specificity(c))):
        assert measure(conventional) > measure(mixed)


# The test set's scores

def brighter(x):
    """Class logits (n, 2): the brighter the first voxel the surer "positive"."""
    return torch.stack([torch.zeros(len(x)), 4 * x[:, 0, 0, 0, 0]], dim=1)


def darker(x):
    return -brighter(x)


def test_rule_5_2_argmax__probabilities_of_each_arm(tmp_path):
    """Each arm's score is its own softmax for "positive", on each nodule's eight flips and then the negatives."""
    dataset = small_run(tmp_path)
    cubes = np.concatenate([eight(cubes_of(dataset, "positives", "test")), cubes_of(dataset, "negatives", "test")])
    scored = evaluate.score_split({"real": [brighter, darker], "critic": [darker]}, dataset, "test", CPU)
    (first, second), (critic,) = scored.scores["real"], scored.scores["critic"]
    probability = 1 / (1 + np.exp(-4 * cubes[:, 0, 0, 0]))
    assert list(scored.scores) == ["real", "critic"] and first.shape == (20,)
    assert np.allclose(np.sort(first[:16]), np.sort(probability[:16]), atol=1e-6)
    assert np.allclose(first[16:], probability[16:], atol=1e-6)
    assert np.allclose(first + second, 1, atol=1e-6) and np.array_equal(second, critic)
    assert scored.labels.tolist() == [1] * 16 + [0] * 4 and scored.scans.tolist() == [0] * 20
    assert scored.weights.tolist() == [0.125] * 16 + [1] * 4


def test_rule_5_2_argmax__the_larger_logit_decides_and_a_tie_is_negative(tmp_path):
    """Positive where logit 1 is the larger; where both are equal argmax takes the first class, negative."""
    dataset = small_run(tmp_path, nodules=(1, 1, 1), negatives=(1, 1, 3))
    logits = torch.tensor([[0, 0.1], [0.1, 0], [5, 5], [-9, -8.9]] * 2 + [[0, 0], [0, 1e-3], [3, -3.0]])
    scored = evaluate.score_split({"real": [lambda x: logits]}, dataset, "test", CPU)
    assert (scored.scores["real"][0] > 0.5).tolist() == logits.argmax(1).bool().tolist()
    assert evaluate.tables(scored)[2]["flips"]["confusion"] == {"tp": 4, "fp": 1, "fn": 4, "tn": 2}


def scored(nodules, negatives, **scores):
    """A Scored of so many nodules with eight flips and negatives, all of one scan; scores: arm → repeats."""
    labels = np.repeat([1, 0], [8 * nodules, negatives])
    return evaluate.Scored(labels, evaluate.flip_weights(labels), np.zeros(len(labels), int),
                           {arm: np.array(of_arm, float) for arm, of_arm in scores.items()})


def test_tables__flips_and_nodules_are_counted_apart():
    """"flips" counts each nodule eight times, "nodules" the mean over its flips; the negatives are the same."""
    test = scored(2, 3, real=[[0.9] * 3 + [0.1] * 5 + [0.1] * 2 + [0.9] * 6 + [0.9, 0.1, 0.1]])
    table = evaluate.tables(test)[2]
    assert table["flips"]["confusion"] == {"tp": 9, "fp": 1, "fn": 7, "tn": 2}
    assert table["nodules"]["confusion"] == {"tp": 9 / 8, "fp": 1, "fn": 7 / 8, "tn": 2}
    assert table["nodules"]["metrics"]["sensitivity"] == table["flips"]["metrics"]["sensitivity"] == 9 / 16
    assert table["nodules"]["metrics"]["precision"] == pytest.approx(9 / 17)


def test_tables__mean_and_spread_over_the_repeats():
    """Of two repeats with 8 and 4 hits of 8: sensitivity .75, its standard deviation ½/√2; of one repeat, none."""
    test = scored(1, 2, real=[[0.9] * 8 + [0.1] * 2, [0.9] * 4 + [0.1] * 6], critic=[[0.9] * 10])
    flips = evaluate.tables(test)[2]["flips"]
    assert flips["confusion"] == {"tp": 6, "fp": 0, "fn": 2, "tn": 2}
    assert flips["metrics"]["sensitivity"] == 0.75
    assert flips["spread"]["sensitivity"] == pytest.approx(0.5 / math.sqrt(2)) and flips["spread"]["specificity"] == 0
    assert math.isnan(evaluate.tables(test)[5]["flips"]["spread"]["sensitivity"])


def test_tables__the_control_stands_between_tables_2_and_3():
    """The thesis' comparison and the fair one stand together: real, longer, mixed; the thesis has no control."""
    test = scored(1, 1, real=[[0.0] * 9], longer=[[0.9] * 9])
    results = {"tables": evaluate.tables(test), "control": evaluate.table_of(*evaluate.CONTROL, test)}
    in_order = [table for _, table in evaluate.with_control(results)]
    assert [table["arm"] for table in in_order] == ["real", "longer", "mixed", "fake", "critic"]
    assert list(results["tables"]) == [2, 3, 4, 5] and "thesis" not in results["control"]
    assert evaluate.table_cells(results["control"])[0] == ("TP", "8", "1", "–")
    assert evaluate.table_title(None, results["control"]).startswith("Control: real data")


def test_tables__an_arm_that_was_left_out_has_dashes():
    """An arm without a classifier keeps the thesis' column, and dashes for ours."""
    table = evaluate.tables(scored(1, 1, real=[np.zeros(9)]))[4]
    assert "flips" not in table and table["thesis"]["confusion"]["tp"] == 919
    assert [cells[1:] for cells in evaluate.table_cells(table)][:2] == [("–", "–", "919"), ("–", "–", "8,539")]


def test_table_cells__each_number_stands_beside_its_name():
    """A row of a table: its name, then flips, nodules and the thesis; a spread beside a mean of repeats."""
    once = [0.9] * 12 + [0.1] * 6 + [0.9]
    cells = evaluate.table_cells(evaluate.tables(scored(2, 3, real=[once]))[2])
    assert cells == [
        ("TP", "12", "1.5", "1,583"), ("FP", "1", "1", "2,776"), ("FN", "4", "0.5", "50"), ("TN", "2", "2", "113,451"),
        ("sensitivity", "0.750", "0.750", "0.969"), ("specificity", "0.667", "0.667", "0.976"),
        ("precision", "0.923", "0.600", "0.363"), ("F1", "0.828", "0.667", "0.528")]
    twice = evaluate.table_cells(evaluate.tables(scored(2, 3, real=[once, once]))[2])
    assert twice[4] == ("sensitivity", "0.750 ± 0.000", "0.750 ± 0.000", "0.969")


def test_labelled__the_test_set_positives_with_eight_flips_first(tmp_path):
    """The test set is each nodule's eight flips, label 1, then the negatives as they are, label 0."""
    dataset = small_run(tmp_path)
    rows, flips, labels = preprocessing.labelled(dataset, "test")
    cubes = preprocessing.read_cubes(dataset, rows, flips)[:, 0]
    assert labels.tolist() == [1] * 16 + [0] * 4 and flips.tolist() == [*range(8), *range(8), 0, 0, 0, 0]
    assert as_set(cubes[:8]) == as_set(eight(cubes_of(dataset, "positives", "test")[:1]))
    assert np.allclose(cubes[16:], cubes_of(dataset, "negatives", "test"), atol=1e-6)


def read_scores(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_write_scores__a_line_a_cube_that_matches(tmp_path):
    """scores.csv: series, the voxel's place in mm (x, y, z), flip, label and each arm's probability, in order."""
    dataset = small_run(tmp_path)
    first, second, critic = np.linspace([0, 1, 1], [1, 0, 0.5], 20, axis=1, dtype=np.float32)
    evaluate.write_scores(tmp_path / "scores.csv", dataset, {"real": [first, second], "critic": [critic]})
    scores = {"real": first, "real_2": second, "critic": critic}
    lines, scan = read_scores(tmp_path / "scores.csv"), dataset.info["scans"][2]
    assert len(lines) == 20 and {line["seriesuid"] for line in lines} == {"1.2.test"}
    assert [line["flip"] + line["label"] for line in lines] == [f"{flip}1" for flip in range(8)] * 2 + ["00"] * 4
    for line, (z, y, x) in zip(lines[::8] + lines[17:], scan["positives"] + scan["negatives"]):
        assert [float(line[axis]) for axis in "xyz"] == [x - 10.5, y + 20.25, z + 30.0]
    assert all(np.allclose([float(line[arm]) for line in lines], scores[arm], atol=1e-6) for arm in scores)


def test_write_scores__on_which_side_of_a_half_survives(tmp_path):
    """A probability just above or below ½ does not become ½ in the file, or the tables could not be counted from it."""
    dataset = small_run(tmp_path, nodules=(1, 1, 1), negatives=(1, 1, 2))
    scores = np.nextafter(np.float32(0.5), np.float32([0, 1] * 5), dtype=np.float32)
    evaluate.write_scores(tmp_path / "scores.csv", dataset, {"real": [scores]})
    assert [float(line["real"]) > 0.5 for line in read_scores(tmp_path / "scores.csv")] == [False, True] * 5


def test_write_scores__a_hostile_name_stays_in_its_cell(tmp_path):
    """A series UID with a comma, a quote and a line end is one cell, and reads back as it is."""
    dataset = small_run(tmp_path)
    dataset.info["scans"][2]["seriesuid"] = '1,2"3\n4'
    evaluate.write_scores(tmp_path / "scores.csv", dataset, {"real": [np.zeros(20)]})
    assert [line["seriesuid"] for line in read_scores(tmp_path / "scores.csv")] == ['1,2"3\n4'] * 20


def test_write_scores__a_file_name_that_is_no_utf_8_can_be_written(tmp_path):
    """A MetaImage's series UID is its file's name, which may hold any bytes; its test cubes are still written."""
    dataset = small_run(tmp_path)
    dataset.info["scans"][2]["seriesuid"] = os.fsdecode(b"\xff")
    evaluate.write_scores(tmp_path / "scores.csv", dataset, {"real": [np.zeros(20)]})
    assert (tmp_path / "scores.csv").read_bytes().count(b"\n") == 21


# What was trained

def trained_run(run, arms=evaluate.TRAINED_ARMS, accepted=3):
    """A small run with classifiers of which no two are alike, and a GAN; returns its networks and its dataset."""
    dataset, networks = small_run(run), {arm: Classifier(6) for arm in arms}
    classes = {name: {"accepted": accepted} for name in ("positive", "negative")}
    made_from = {"prepared": lungaug.fingerprint(dataset.info["scans"])}
    networks["critic"] = Critic(6, 1)
    lungaug.write(run / "gan" / "checkpoint.pt", {
        "settings": {"cube": 6, "width": 1} | made_from, "critic": networks["critic"].state_dict(), "epoch": 2,
        "epochs": 2})
    lungaug.write(run / "classifiers" / "generated" / "generated.json", {
        "settings": {"gan_crc32": zlib.crc32((run / "gan" / "checkpoint.pt").read_bytes())}, "classes": classes})
    for arm in arms:
        lungaug.write(run / "classifiers" / arm / "checkpoint.pt", {
            "settings": made_from | {"generated": None if arm == "real" else classes}, "epoch": 2, "epochs": 2,
            "best": {"classifier": networks[arm].state_dict()}, "classifier": Classifier(6).state_dict()})
    return networks, dataset


def spoil(path, key, value):
    """Write a checkpoint again with one of its settings, or of its other entries, changed."""
    state = lungaug.load_checkpoint(path, "")
    (state["settings"] if key in state["settings"] else state)[key] = value
    lungaug.write(path, state)


def test_rule_5_2_best_kept__is_what_each_arm_is_evaluated_by(tmp_path, capsys):
    """Each arm is its best epoch's classifier, not its last."""
    saved, dataset = trained_run(tmp_path)
    found = evaluate.load_networks(tmp_path, dataset, CPU)
    assert list(found) == ["real", "longer", "mixed", "fake", "critic"] and capsys.readouterr().out == ""
    assert all(len(of_arm) == 1 for of_arm in found.values())
    for arm in evaluate.TRAINED_ARMS:
        assert same_state(found[arm][0].state_dict(), saved[arm].state_dict())


def test_rule_5_2_critic_head__is_that_of_the_gans_checkpoint(tmp_path):
    """Its class logits are the critic's own, as the GAN's training left it."""
    (saved, dataset), x = trained_run(tmp_path), torch.randn(3, 1, 6, 6, 6)
    head, = evaluate.load_networks(tmp_path, dataset, CPU)["critic"]
    assert torch.equal(head(x), saved["critic"](x)[1])


@pytest.mark.parametrize("missing, repeats", [(None, 3), (("mixed", 3), 2), (("real", 2), 1)])
def test_load_networks__as_many_repeats_as_every_arm_has(tmp_path, missing, repeats):
    """A repeat of which an arm is missing, as while it is trained, is left out in every arm, and those after it."""
    _, dataset = trained_run(tmp_path)
    for arm in evaluate.TRAINED_ARMS:
        first = tmp_path / "classifiers" / arm / "checkpoint.pt"
        for repeat in (2, 3):
            if (arm, repeat) != missing:
                path = lungaug.arm_folder(tmp_path, arm, repeat) / "checkpoint.pt"
                path.parent.mkdir()
                path.write_bytes(first.read_bytes())
    found = evaluate.load_networks(tmp_path, dataset, CPU)
    assert {arm: len(of_arm) for arm, of_arm in found.items()} == dict.fromkeys(evaluate.TRAINED_ARMS, repeats) | {
        "critic": 1}


def test_load_networks__arms_left_out_are_passed_over(tmp_path):
    """Where the GAN delivered nothing, mixed and fake are not there, and the others are evaluated."""
    _, dataset = trained_run(tmp_path, arms=("real",), accepted=0)
    assert list(evaluate.load_networks(tmp_path, dataset, CPU)) == ["real", "critic"]


def test_load_networks__a_gan_that_was_made_with_a_mistake_is_told(tmp_path, capsys):
    """A right evaluation of a GAN with a published mistake in it says so."""
    _, dataset = trained_run(tmp_path)
    path = tmp_path / "gan" / "checkpoint.pt"
    state = lungaug.load_checkpoint(path, "")
    evaluate.report_unfinished(path, state)
    assert capsys.readouterr().out == ""
    state["settings"]["mistake"] = "one_epsilon_per_batch"
    evaluate.report_unfinished(path, state)
    assert "made with the mistake one_epsilon_per_batch" in capsys.readouterr().out


def test_load_networks__a_repeat_of_another_length_is_not_counted(tmp_path, capsys):
    """Where the first repeat was trained on, and the second was not: one repeat, and a line that says so."""
    _, dataset = trained_run(tmp_path)
    for arm in evaluate.TRAINED_ARMS:
        folders = [lungaug.arm_folder(tmp_path, arm, repeat) for repeat in (1, 2)]
        lungaug.write(folders[1] / "checkpoint.pt", (folders[0] / "checkpoint.pt").read_bytes())
        for folder, n_epochs in zip(folders, (3, 2)):
            for epoch in range(1, n_epochs + 1):
                lungaug.append_log(folder / "log.jsonl", {"epoch": epoch})
    found = evaluate.load_networks(tmp_path, dataset, CPU)
    assert {len(of_arm) for of_arm in found.values()} == {1}
    assert "repeat_2: not counted" in capsys.readouterr().out


def write_epochs(run, counts, repeat=1):
    """Let each arm's log have so many rows; counts: arm → number."""
    for arm, count in counts.items():
        for epoch in range(1, count + 1):
            lungaug.append_log(lungaug.arm_folder(run, arm, repeat) / "log.jsonl", {"epoch": epoch})


@pytest.mark.parametrize("counts, arm, most", [
    # Trained on with --epochs 5, and stopped before mixed and fake, or within mixed, or within real.
    ({"real": 5, "longer": 5, "mixed": 2, "fake": 2}, "mixed", 5),
    ({"real": 5, "longer": 5, "mixed": 4, "fake": 2}, "mixed", 5),
    ({"real": 3, "longer": 2, "mixed": 2, "fake": 2}, "longer", 3)])
def test_load_networks__arms_of_unequal_epochs_are_refused(tmp_path, counts, arm, most):
    """Longer is no control of a mixed arm of fewer steps: one line names the arm, and the command that ends it."""
    _, dataset = trained_run(tmp_path)
    write_epochs(tmp_path, counts)
    with pytest.raises(Refusal) as refusal:
        evaluate.load_networks(tmp_path, dataset, CPU)
    line = str(refusal.value)
    assert f"{arm}: has been trained for {counts[arm]} epochs" in line and "\n" not in line
    assert f"run python train_classifier.py --run {tmp_path} --epochs {most}," in line


def test_load_networks__a_repeat_in_which_arms_are_unequal_is_not_counted(tmp_path, capsys):
    """Trained on with more epochs, and stopped in the second repeat: the first alone counts, of all arms."""
    _, dataset = trained_run(tmp_path)
    arms = dict.fromkeys(evaluate.TRAINED_ARMS, 5)
    write_epochs(tmp_path, arms)
    write_epochs(tmp_path, arms | {"mixed": 2, "fake": 2}, repeat=2)
    for arm in arms:
        first, second = (lungaug.arm_folder(tmp_path, arm, repeat) / "checkpoint.pt" for repeat in (1, 2))
        lungaug.write(second, first.read_bytes())
    found = evaluate.load_networks(tmp_path, dataset, CPU)
    assert {len(networks) for networks in found.values()} == {1}
    assert "repeat_2: not counted, as an arm has fewer epochs" in capsys.readouterr().out


@pytest.mark.parametrize("classes", [{}, [], {"positive": {"accepted": 3}}, {"positive": {}, "negative": {}}, None,
                                     {"positive": {"accepted": "3"}, "negative": {"accepted": "3"}}])
def test_load_networks__a_damaged_record_of_the_generated_is_one_line(tmp_path, classes):
    """JSON that is none of ours is told as a damaged file, never by a traceback."""
    _, dataset = trained_run(tmp_path)
    path = tmp_path / "classifiers" / "generated" / "generated.json"
    record = lungaug.read_json(path, "")
    (tmp_path / "classifiers" / "mixed" / "checkpoint.pt").unlink()
    for damaged in (record | {"classes": classes}, classes):
        lungaug.write(path, damaged if isinstance(damaged, dict) else json.dumps(damaged))
        with pytest.raises(Refusal, match="generated.json: .* — run python train_classifier.py .*--overwrite"):
            evaluate.load_networks(tmp_path, dataset, CPU)


@pytest.mark.parametrize("gone", ["classifiers/real/checkpoint.pt", "gan/checkpoint.pt",
                                  "classifiers/mixed/checkpoint.pt", "classifiers/fake/checkpoint.pt",
                                  "classifiers/generated/generated.json"])
def test_load_networks__what_is_missing_is_one_line(tmp_path, gone):
    """Without the baseline's classifier, the GAN or the record of what it made, the message says what to run."""
    _, dataset = trained_run(tmp_path)
    (tmp_path / gone).unlink()
    script = "train_gan" if "gan" in gone else "train_classifier"
    with pytest.raises(Refusal, match=f"not found — run python {script}"):
        evaluate.load_networks(tmp_path, dataset, CPU)


@pytest.mark.parametrize("arm", ["real", "fake"])
def test_load_networks__what_was_trained_on_other_data_is_refused(tmp_path, arm):
    """A network of another preparation may have been trained on what is the test set now."""
    _, dataset = trained_run(tmp_path)
    spoil(tmp_path / "classifiers" / arm / "checkpoint.pt", "prepared", 5)
    with pytest.raises(Refusal, match=f"{arm}/checkpoint.pt: was made with prepared 5"):
        evaluate.load_networks(tmp_path, dataset, CPU)


def test_load_networks__classifiers_of_another_gan_are_refused(tmp_path):
    """A GAN that was trained on since is not the one whose samples the classifiers saw."""
    _, dataset = trained_run(tmp_path)
    spoil(tmp_path / "gan" / "checkpoint.pt", "epoch", 3)
    with pytest.raises(Refusal, match="generated.json: was made with gan_crc32"):
        evaluate.load_networks(tmp_path, dataset, CPU)


def test_load_networks__an_arm_of_other_samples_is_refused(tmp_path):
    """Two arms of one table saw the same generated samples."""
    _, dataset = trained_run(tmp_path)
    spoil(tmp_path / "classifiers" / "mixed" / "checkpoint.pt", "generated", {"positive": {"accepted": 4}})
    with pytest.raises(Refusal, match="mixed/checkpoint.pt: was made with generated"):
        evaluate.load_networks(tmp_path, dataset, CPU)


@pytest.mark.parametrize("path, key, script", [
    ("classifiers/real", "prepared", "train_classifier"), ("classifiers/mixed", "generated", "train_classifier"),
    ("classifiers/fake", None, "train_classifier"), ("gan", "prepared", "train_gan"), ("gan", None, "train_gan")])
def test_load_networks__what_is_stale_or_damaged_names_the_command_that_makes_it_again(tmp_path, path, key, script):
    """evaluate.py has no --overwrite, and none of the other stages' options: the line says which command has, and is
    short."""
    _, dataset = trained_run(tmp_path)
    checkpoint = tmp_path / path / "checkpoint.pt"
    if key:
        spoil(checkpoint, key, {"positive": {"accepted": 4, "requested": 4}} if key == "generated" else 5)
    elif path == "gan":
        checkpoint.write_bytes(checkpoint.read_bytes()[:-1000])
    else:
        spoil(checkpoint, "best", None)
    with pytest.raises(Refusal) as caught:
        evaluate.load_networks(tmp_path, dataset, CPU)
    assert caught.value.remedy.startswith(f"run python {script}.py --run {tmp_path} --overwrite")
    assert "{" not in str(caught.value) and len(str(caught.value)) < 400


def test_load_networks__of_other_scans_the_gan_is_named_first(tmp_path):
    """Where the scans were prepared anew, all was trained on others: the GAN must be trained again before the rest."""
    _, dataset = trained_run(tmp_path)
    with pytest.raises(Refusal, match="gan/checkpoint.pt.*python train_gan.py"):
        evaluate.load_networks(tmp_path, dataset._replace(fingerprint=5), CPU)


def test_load_networks__a_training_that_was_stopped_is_told(tmp_path, capsys):
    """An arm of fewer epochs than were asked for is evaluated, and said to be."""
    _, dataset = trained_run(tmp_path)
    spoil(tmp_path / "classifiers" / "fake" / "checkpoint.pt", "epochs", 60)
    evaluate.load_networks(tmp_path, dataset, CPU)
    assert capsys.readouterr().out.endswith("fake/checkpoint.pt: stopped at epoch 2 of 60.\n")


@pytest.mark.parametrize("state", [[1], {}, {"best": {"classifier": {}}}, {"best": None},
                                   {"best": {"classifier": Classifier(12).state_dict()}}])
def test_load_networks__a_checkpoint_that_does_not_fit_is_one_line(tmp_path, state):
    """A checkpoint of something else, or of another cube, is a Refusal that names it."""
    _, dataset = trained_run(tmp_path)
    path = tmp_path / "classifiers" / "mixed" / "checkpoint.pt"
    if state and isinstance(state, dict):
        state = lungaug.load_checkpoint(path, "") | state
    lungaug.write(path, state)
    with pytest.raises(Refusal, match="mixed/checkpoint.pt"):
        evaluate.load_networks(tmp_path, dataset, CPU)


def test_pair__generated_left_nearest_right():
    """The sheet's left half shows the first cube, its right half the second."""
    sheet = evaluate.pair(np.full((6, 6, 6), -1.0), np.full((6, 6, 6), 0.0))
    left, right = np.split(sheet, 2, axis=1)
    assert (left == 0).sum() == (right == 128).sum() > 0 and not (left == 128).any() and not (right == 0).any()


# Figures 7 and 8: curves

def ranges(kind):
    """Random (low, high) of a kind of size."""
    rng = np.random.default_rng(0)
    for _ in range(500):
        size = 10 ** rng.uniform(*{"tiny": (-11, -6), "usual": (-6, 6), "negative": (-6, 6), "huge": (6, 30),
                                   "far": (-2, 2)}[kind])
        low = {"negative": -1.5 * size, "far": 1e6}.get(kind, 0) + rng.uniform(-3, 3) * size
        yield low, low + size
    yield from ((0, 1), (0, 8), (1, 60), (-1, 1), (0, 20000)) if kind == "usual" else ()


@pytest.mark.parametrize("kind", ["tiny", "usual", "negative", "huge", "far"])
def test_ticks__are_round_even_and_within_the_range(kind):
    """1, 2 or 5 times a power of ten apart, each a multiple of that, none outside, three to nine of them."""
    for low, high in ranges(kind):
        values = np.array(evaluate.ticks(low, high))
        assert 3 <= len(values) <= 9, (low, high, values)
        steps, slack = np.diff(values), 1e-9 * max(abs(low), abs(high))
        step = np.median(steps)
        assert np.abs(steps - step).max() <= slack, (low, high, values)
        assert round(step / 10 ** np.floor(np.log10(step * 1.0001)), 3) in (1, 2, 5), (low, high, values)
        whole = values / step
        assert np.abs(whole - np.rint(whole)).max() < 1e-6 * max(1, np.abs(whole).max()), (low, high, values)
        assert low - slack <= values.min() and values.max() <= high + slack, (low, high, values)


NAN = float("nan")
LINES = {
    "plain": [Line("a", [1, 2, 3], [0.5, 0.25, 1])],
    "band": [Line("a", [1, 2, 3], np.array([1.0, 2, 3]), (np.array([0.0, 1, 2]), np.array([2.0, 3, 4])))],
    "two": [Line("a", [1, 2], [0, 1]), Line("b", [2, 3], [5, 9])],
    "nan": [Line("a", [1, 2, 3], [0.5, NAN, 1])],
    "all nan": [Line("a", [1, 2, 3], [NAN] * 3, (np.array([NAN] * 3), np.array([NAN] * 3)))],
    "infinite": [Line("a", [1, 2, 3], [0.5, float("inf"), -float("inf")])],
    "constant": [Line("a", [1, 2, 3], [7, 7, 7])],
    "one point": [Line("a", [1], [3.5], (np.array([3.5]), np.array([3.5])))],
    "huge": [Line("a", [1, 2], [-1e30, 1e30])],
    "tiny": [Line("a", [1, 2], [1e-13, 2e-13])],
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("lines", LINES.values(), ids=LINES.keys())
def test_curves__is_well_formed_with_finite_numbers(lines):
    """Whatever the values, the chart is XML, a curve a line, all points finite and within the picture, no warning."""
    tree = ElementTree.fromstring(evaluate.curves("t", lines, "x", "y"))
    curves = [node for node in tree.iter() if node.tag.endswith("polyline")]
    points = [tuple(map(float, point.split(","))) for curve in curves for point in curve.get("points").split()]
    finite = sum(np.isfinite(np.asarray(line.y, float)).sum() for line in lines)
    assert len(curves) == len(lines) and len(points) == finite
    words = [(float(node.get("x")), float(node.get("y"))) for node in tree.iter() if node.tag.endswith("text")]
    assert all(0 <= x <= 460 and 0 <= y <= 270 for x, y in points + words)


def test_curves__higher_values_stand_higher_and_later_ones_to_the_right():
    """x grows to the right and y upwards, in proportion."""
    tree = ElementTree.fromstring(evaluate.curves("t", [Line("a", [2, 3, 6], [5, 15, 45])], "x", "y"))
    points, = (node.get("points") for node in tree.iter() if node.tag.endswith("polyline"))
    (x0, y0), (x1, y1), (x2, y2) = (map(float, point.split(",")) for point in points.split())
    assert x0 < x1 < x2 and y0 > y1 > y2
    assert abs((x2 - x0) - 4 * (x1 - x0)) < 0.3 and abs((y0 - y2) - 4 * (y0 - y1)) < 0.3


def test_curves__a_constant_stands_in_the_middle():
    """A curve that never changes is drawn halfway between those that fill the chart."""
    def heights(values):
        tree = ElementTree.fromstring(evaluate.curves("t", [Line("a", [1, 2], values)], "x", "y"))
        points, = (node.get("points") for node in tree.iter() if node.tag.endswith("polyline"))
        return [float(point.split(",")[1]) for point in points.split()]

    assert heights([7, 7]) == [sum(heights([0, 1])) / 2] * 2


def test_curves__the_band_goes_out_along_its_top_and_back_along_its_bottom():
    """The shaded polygon is bounded by the two curves of the band, where they would be drawn themselves."""
    low, high = np.array([0.0, 1, 2]), np.array([5.0, 3, 4])
    tree = ElementTree.fromstring(evaluate.curves("t", [Line("a", [1, 2, 3], low, (low, high)),
                                                        Line("b", [1, 2, 3], high)], "x", "y"))
    bottom, top = (node.get("points").split() for node in tree.iter() if node.tag.endswith("polyline"))
    polygon, = (node.get("points").split() for node in tree.iter() if node.tag.endswith("polygon"))
    assert polygon == top + bottom[::-1]


def test_ticks__zero_has_no_sign():
    """A tick at zero reads 0, not -0."""
    assert "-0" not in [f"{value:g}" for value in evaluate.ticks(-1, 1)] and 0 in evaluate.ticks(-1, 1)


def test_curves__words_are_escaped():
    """A title, label or name with mark-up is text."""
    words = "<script>&\""
    tree = ElementTree.fromstring(evaluate.curves(words, [Line(words, [1, 2], [1, 2])], words, words))
    assert [node.text for node in tree.iter()].count(words) == 4


def test_side_by_side__charts_in_reading_order():
    """Three charts in two columns stand at (0, 0), (1, 0), (0, 1), in a picture that holds them."""
    charts = [evaluate.curves(name, LINES["plain"], "x", "y") for name in "abc"]
    tree = ElementTree.fromstring(evaluate.side_by_side(charts, columns=2))
    moved = [node.get("transform") for node in tree if node.tag.endswith("}g")]
    assert moved == ["translate(0 0)", "translate(460 0)", "translate(0 270)"]
    assert (tree.get("width"), tree.get("height")) == ("920", "540")


def test_rule_4_1_smoothed__windows_worked_by_hand():
    """0, 3, 6, 0 over three: means 1.5, 3, 3, 3 (two at the ends); bands ±1.96·(1.5, √6, √6, 3)."""
    mean, (low, high) = evaluate.smooth([0, 3, 6, 0], 3)
    half = 1.96 * np.array([1.5, math.sqrt(6), math.sqrt(6), 3])
    assert mean.tolist() == [1.5, 3, 3, 3]
    assert np.allclose(high - mean, half, rtol=1e-14) and np.allclose(mean - low, half, rtol=1e-14)


def test_rule_4_1_smoothed__the_window_is_centred_and_whole():
    """Over a window of 5 the middle of five values is the mean of all, and the first that of the first three."""
    middle, _ = evaluate.smooth([0, 0, 0, 10, 20], 5)
    assert middle.tolist() == [0, 2.5, 6, 7.5, 10]


def test_rule_4_1_smoothed__a_window_of_one_changes_nothing():
    """Over a window of one the curve is itself, and its band has no width."""
    values = np.random.default_rng(0).normal(size=9)
    middle, (low, high) = evaluate.smooth(values, 1)
    assert np.array_equal(middle, values) and np.array_equal(low, values) and np.array_equal(high, values)


def test_rule_4_1_smoothed__a_line_is_its_own_mean():
    """A centred window does not shift a straight line, but at its ends; its band is as wide everywhere between."""
    line = 2 * np.arange(20.0) + 1
    mean, (low, high) = evaluate.smooth(line, 5)
    assert np.allclose(mean[2:-2], line[2:-2], rtol=1e-14)
    assert np.allclose((high - low)[2:-2], 2 * 1.96 * 2 * math.sqrt(2))


def test_rule_4_1_smoothed__band_holds_95_percent():
    """Of normal values about 95% lie within the band of a long window: ±1.96 standard deviations, not of the mean."""
    values = np.random.default_rng(1).normal(size=4000)
    _, (low, high) = evaluate.smooth(values, 1001)
    assert abs(np.mean((low < values) & (values < high)) - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 4000)


def gan_row(epoch):
    """A row of the GAN's log, each term another number."""
    critic = dict(wasserstein=40 - epoch, penalty=1, auxiliary=2, real_accuracy=0.25, fake_accuracy=0.75)
    return {"epoch": epoch, "critic": critic, "generator": {"auxiliary": 3}}


def test_figure_7__a_smoothed_curve_and_its_band_for_each_term():
    """Four charts; the estimate, both cross-entropies, the penalty and both accuracies, each with its band."""
    tree = ElementTree.fromstring(evaluate.figure_7([gan_row(epoch) for epoch in range(1, 41)]))
    words = " ".join(tree.itertext())
    assert all(name in words
               for name in ("Wasserstein", "cross-entropy", "penalty", "accuracy", "on reals", "on fakes"))
    lines, bands = ([node.get("points").split() for node in tree.iter() if node.tag.endswith(kind)]
                    for kind in ("polyline", "polygon"))
    assert [len(line) for line in lines] == [40] * 6 and [len(band) for band in bands] == [80] * 6
    heights = [float(point.split(",")[1]) for point in lines[0]]
    assert heights == sorted(heights)       # the estimate falls: down the page


def test_draw_curves__of_a_training_that_still_runs(tmp_path):
    """Figure 7 is drawn from the rows that there are, a last one cut short passed over; no log, no figure."""
    evaluate.draw_curves(tmp_path, tmp_path)
    assert not list(tmp_path.iterdir())
    for epoch in (1, 2, 3):
        lungaug.append_log(tmp_path / "gan" / "log.jsonl", gan_row(epoch))
    with open(tmp_path / "gan" / "log.jsonl", "a") as file:
        file.write('{"epoch": 4, "cri')
    evaluate.draw_curves(tmp_path, tmp_path)
    figure = (tmp_path / "figure_7.svg").read_text(encoding="utf-8")
    assert figure == evaluate.figure_7([gan_row(epoch) for epoch in (1, 2, 3)])
    assert not (tmp_path / "figure_8.svg").exists()


# Figures 2, 3 and 9–14: cubes

def test_rule_2_1_7_reading_order__superior_first():
    """The highest slice stands top left, the lowest bottom right; rows are y, columns x."""
    cube = np.random.default_rng(0).uniform(-1, 1, (6, 6, 6))
    sheet = evaluate.slices(cube, columns=3)
    assert sheet.shape == (15, 22)
    for i, z in enumerate((5, 4, 3, 2, 1, 0)):
        top, left = 1 + i // 3 * 7, 1 + i % 3 * 7
        assert np.array_equal(sheet[top:top + 6, left:left + 6], lungaug.grey(cube[z]))


def test_planes__axial_coronal_sagittal_through_the_middle():
    """Voxel (z, y, x) of the middle planes: row y, column x; row −z, column x; row −z, column y."""
    cube = np.random.default_rng(0).uniform(-1, 1, (6, 6, 6))
    sheet, middle = evaluate.planes(cube), lungaug.grey(cube)
    assert sheet.shape == (8, 22)
    for a in range(6):
        for b in range(6):
            assert sheet[1 + a, 1 + b] == middle[3, a, b]
            assert sheet[6 - a, 8 + b] == middle[a, 3, b]
            assert sheet[6 - a, 15 + b] == middle[a, b, 3]


def test_rule_2_1_7_reading_order__superior_first_row_by_row():
    """Slice by slice, twelve to a row, from superior (the last z) to inferior, left to right and then down."""
    cube = np.linspace(-1, 1, 24)[:, None, None] + np.zeros((24, 24, 24))
    sheet = evaluate.slices(cube)
    middles = [int(sheet[1 + 12 + 25 * (i // 12), 1 + 12 + 25 * (i % 12)]) for i in range(24)]
    assert sheet.shape == (51, 301) and middles == lungaug.grey(np.linspace(1, -1, 24)).tolist()


def test_rule_2_1_7_reading_order__a_slice_is_shown_as_it_is():
    """Within a slice rows are y, anterior on top, and columns x: nothing turned."""
    cube = np.random.default_rng(0).uniform(-1, 1, (6, 5, 4))
    assert np.array_equal(evaluate.slices(cube, 3)[1:6, 1:5], lungaug.grey(cube[5]))
    assert np.array_equal(evaluate.slices(cube, 3)[7:12, 6:10], lungaug.grey(cube[1]))
