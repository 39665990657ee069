"""Beyond the thesis: operating points, differences with intervals, the quality of what was generated.

    python -m pytest tests/test_beyond.py -v
"""

import itertools
import math
import re
import warnings
from types import SimpleNamespace

import lungaug

import numpy as np
import pytest
import torch
from scipy import linalg, stats
from scipy.spatial.distance import cdist

import evaluate
import preprocessing
from evaluate import Confusion
from helpers import CPU, cubes_of, eight, in_one_line, small_run
from models import Classifier, Critic, Generator


def random_scores(seed, n=12, values=5):
    """Labels and scores of which many are equal."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 2, n), rng.integers(0, values, n) / values


# Counting

def test_rule_beyond_flip_weight__a_nodule_weighs_as_much_as_a_negative():
    """Two nodules with eight flips and three negatives weigh 2 and 3."""
    weights = evaluate.flip_weights(np.repeat([1, 0], [16, 3]))
    assert weights[:16].sum() == 2 and weights[16:].sum() == 3 and len(set(weights[:16])) == 1


def test_rule_beyond_flip_weight__of_the_flips_that_are_there():
    """Where a split has three flips of one nodule and one of another, each nodule weighs 1 all the same."""
    rows = np.array([(0, 1, 1, 1)] * 3 + [(0, 2, 2, 2)] + [(0, 3, 3, 3)] * 2)
    assert evaluate.flip_weights([1, 1, 1, 1, 0, 0], rows) == pytest.approx([1 / 3] * 3 + [1, 1, 1])
    assert evaluate.flip_weights([0, 0], rows[4:]).tolist() == [1, 1]


def test_rule_beyond_flip_weight__a_matrix_of_weights():
    """TP, FP, FN and TN are sums of weights: 2·⅛, 1, ⅛ and 2."""
    weights = np.array([0.125, 0.125, 0.125, 1, 1, 1])
    confusion = evaluate.confusion_matrix([1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 0, 0], weights)
    assert confusion == Confusion(tp=0.25, fp=1, fn=0.125, tn=2)


# Operating points

def auc_by_pairs(labels, scores):
    """The share of pairs in the right order, a tie being half."""
    pairs = list(itertools.product(scores[labels == 1], scores[labels == 0]))
    return sum((p > q) + (p == q) / 2 for p, q in pairs) / len(pairs) if pairs else math.nan


@pytest.mark.parametrize("seed", range(30))
def test_eq_beyond_roc_auc__is_the_share_of_pairs_in_order(seed):
    """Over all pairs of a positive and a negative, ties half."""
    labels, scores = random_scores(seed)
    assert evaluate.roc_auc(labels, scores) == pytest.approx(auc_by_pairs(labels, scores), nan_ok=True, abs=1e-14)


@pytest.mark.parametrize("labels, scores, auc", [
    ([1, 1, 0, 0], [4, 3, 2, 1], 1), ([1, 1, 0, 0], [1, 2, 3, 4], 0), ([1, 0, 1, 0], [5, 5, 5, 5], 0.5),
    # By hand: 3 > 1, 3 > 2, 2 > 1, and a tie of 2 with 2.
    ([1, 1, 0, 0], [3, 2, 2, 1], 3.5 / 4)])
def test_eq_beyond_roc_auc__by_hand(labels, scores, auc, compared):
    """Perfect, reversed, all tied, one tie."""
    compared("area", evaluate.roc_auc(labels, scores), float(auc))
    assert evaluate.roc_auc(labels, scores) == auc


@pytest.mark.parametrize("label", [0, 1])
def test_eq_beyond_roc_auc__of_one_class_is_nan(label):
    """Without positives, or without negatives, there is no pair; nor is there one in an empty set."""
    assert math.isnan(evaluate.roc_auc([label] * 3, [1, 2, 3])) and math.isnan(evaluate.roc_auc([], []))


def test_eq_beyond_roc_auc__a_constant_classifier_has_a_half_and_order_is_all_that_counts():
    """A rising function of the scores changes nothing."""
    labels, scores = random_scores(1, 40, 20)
    assert evaluate.roc_auc(labels, np.exp(3 * scores)) == evaluate.roc_auc(labels, scores)


def test_eq_beyond_roc_auc__weights_are_repetitions():
    """A cube of weight 3 counts as three cubes with its score; eighths of all weights change nothing."""
    labels, scores = random_scores(4, 20, 6)
    weights = np.random.default_rng(0).integers(1, 4, 20)
    repeated = auc_by_pairs(labels.repeat(weights), scores.repeat(weights))
    assert evaluate.roc_auc(labels, scores, weights) == pytest.approx(repeated, abs=1e-14)
    assert evaluate.roc_auc(labels, scores, weights / 8) == evaluate.roc_auc(labels, scores, weights)


def average_precision_by_loop(labels, scores):
    """The sum over thresholds of precision times what recall gains."""
    total, before = 0, 0
    for threshold in sorted(set(scores), reverse=True):
        called = scores >= threshold
        recall = labels[called].sum() / labels.sum()
        total += (recall - before) * labels[called].mean()
        before = recall
    return total


@pytest.mark.parametrize("seed", range(30))
def test_eq_beyond_average_precision__is_the_loop_over_thresholds(seed):
    """Equal scores are called positive together, in whatever order they stand."""
    labels, scores = random_scores(seed)
    expected = average_precision_by_loop(labels, scores) if labels.any() else math.nan
    assert evaluate.average_precision(labels, scores) == pytest.approx(expected, nan_ok=True, abs=1e-14)
    order = np.random.default_rng(seed).permutation(len(labels))
    assert evaluate.average_precision(labels[order], scores[order]) == pytest.approx(expected, nan_ok=True, abs=1e-14)


@pytest.mark.parametrize("labels, scores, expected", [
    # The example of scikit-learn's documentation.
    ([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8], 0.8333333333333333),
    ([1, 0, 0, 0], [5, 5, 5, 5], 0.25), ([1, 1], [1, 2], 1), ([0, 1], [2, 1], 0.5)])
def test_eq_beyond_average_precision__published_and_by_hand(labels, scores, expected):
    """All tied, it is the prevalence; without negatives, 1."""
    assert evaluate.average_precision(labels, scores) == pytest.approx(expected, abs=1e-15)


def test_eq_beyond_average_precision__without_positives_is_nan():
    """No recall, no average."""
    assert math.isnan(evaluate.average_precision([0, 0], [1, 2])) and math.isnan(evaluate.average_precision([], []))


def test_eq_beyond_average_precision__weights_are_repetitions():
    """A cube of weight 3 counts as three cubes with its score."""
    labels, scores = random_scores(3, 20, 6)
    weights = np.random.default_rng(0).integers(1, 4, 20)
    repeated = evaluate.average_precision(labels.repeat(weights), scores.repeat(weights))
    assert evaluate.average_precision(labels, scores, weights) == pytest.approx(repeated, abs=1e-14)


def test_rule_beyond_sensitivity_at__the_most_that_the_rate_allows():
    """Negatives at 9, 5, 3, 1: at 0 found are the positives above 9, at ¼ those above 5, a tie with 5 excluded."""
    labels = [1, 0, 1, 1, 0, 1, 0, 0]
    scores = [10, 9, 8, 5, 5, 4, 3, 1]
    reached = [evaluate.sensitivity_at(labels, scores, rate) for rate in (0, 0.24, 0.25, 0.49, 0.5, 1)]
    assert reached == [0.25, 0.25, 0.5, 0.5, 1, 1]


@pytest.mark.parametrize("n_false", range(1, 100))
def test_rule_beyond_sensitivity_at__a_rate_allows_as_many_as_it_says(n_false):
    """Of 100 negatives a rate of 0.29 allows 29, although 0.29·100 is a little less in floating point."""
    labels = [1] + 100 * [0]
    scores = [0.5] + n_false * [0.7] + (100 - n_false) * [0.3]
    assert evaluate.sensitivity_at(labels, scores, n_false / 100) == 1
    assert evaluate.sensitivity_at(labels, scores, (n_false - 1) / 100) == 0


def test_rule_beyond_sensitivity_at__nothing_is_found_where_the_best_is_a_negative():
    """0 at a rate of 0, and nan without a class."""
    assert evaluate.sensitivity_at([0, 1], [2, 1], 0) == 0
    assert math.isnan(evaluate.sensitivity_at([1, 1], [2, 1], 0.5))
    assert math.isnan(evaluate.sensitivity_at([0, 0], [2, 1], 0.5))


def test_rule_beyond_sensitivity_at__weights_are_repetitions():
    """A cube of weight 3 counts as three cubes, among the positives and among the negatives."""
    labels, scores = random_scores(5, 30, 9)
    weights = np.random.default_rng(1).integers(1, 4, 30)
    repeated = labels.repeat(weights), scores.repeat(weights)
    for rate in (0, 0.1, 0.24, 0.5, 1):
        ours = evaluate.sensitivity_at(labels, scores, rate, weights)
        assert ours == pytest.approx(evaluate.sensitivity_at(*repeated, rate), abs=1e-14)


@pytest.mark.parametrize("seed", range(10))
def test_rule_beyond_sensitivity_at__is_the_best_of_all_thresholds(seed):
    """A loop over all thresholds, with a weight for each cube, finds no more and no less; nor does the whole curve."""
    labels, scores = random_scores(seed, 20, 7)
    labels[:2] = 0, 1
    weights = np.random.default_rng(seed).integers(1, 9, 20) / 8
    rates = [0, 0.125, 0.3, 0.75, 1]
    expected = []
    for rate in rates:
        found = [0.0]
        for called in (scores >= threshold for threshold in scores):
            if weights[called & (labels == 0)].sum() <= rate * weights[labels == 0].sum():
                found.append(weights[called & (labels == 1)].sum() / weights[labels == 1].sum())
        expected.append(max(found))
    assert evaluate.roc_curve(labels, scores, rates, weights) == pytest.approx(expected, abs=1e-14)
    assert [evaluate.sensitivity_at(labels, scores, rate, weights) for rate in rates] == pytest.approx(expected)


def uneven_flips():
    """A Scored with --split cube: a nodule of eight flips that is found, one of a single flip that is not."""
    labels = np.repeat([1, 0], [9, 100])
    rows = np.concatenate([np.zeros((8, 4), int), np.ones((101, 4), int)])
    scores = np.concatenate([np.full(8, 0.99), [0.01], np.linspace(0.005, 0.985, 100)])
    return evaluate.Scored(labels, evaluate.flip_weights(labels, rows), np.zeros(109, int), {"real": scores[None]})


def test_rule_beyond_flip_weight__in_every_measure():
    """Of two nodules one is found, whether it has eight flips in the split or one: AUC and sensitivities are halves."""
    test = uneven_flips()
    scores = test.scores["real"][0]
    row = evaluate.operating_points(test, scores, evaluate.measure(test, scores), 0.5, 0.1)
    assert row["auc"] == pytest.approx(0.505, abs=1e-9)
    assert evaluate.roc_auc(test.labels, scores) == pytest.approx((8 + 0.01) / 9, abs=1e-9)
    assert [row[f"sensitivity_at_{rate}"] for rate in evaluate.FALSE_POSITIVE_RATES] == pytest.approx([0.5] * 5)
    # The chart begins at the lowest sensitivity.
    assert re.search('data-y="([^ ]*) ', evaluate.figure_roc(test))[1] == "0.5"


@pytest.mark.parametrize("seed", range(20))
def test_rule_beyond_best_threshold__no_other_has_a_higher_f1(seed):
    """Of all thresholds, on the set on which it is chosen, none is better."""
    labels, scores = random_scores(seed, 14, 9)
    labels[0] = 1
    weights = evaluate.flip_weights(labels)

    def f1(threshold):
        return evaluate.f1(evaluate.confusion_matrix(labels, scores > threshold, weights))

    best = evaluate.best_threshold(labels, scores, weights)
    candidates = [f1(threshold) for threshold in np.linspace(-0.01, 0.99, 101)]
    assert f1(best) == pytest.approx(np.nanmax(candidates), abs=1e-14)


def test_rule_beyond_best_threshold__lies_between_two_scores():
    """Positives at .9 and .6, negatives at .4 and .2: half-way, .5; below all scores; without positives ½ itself."""
    assert evaluate.best_threshold([1, 1, 0, 0], [0.9, 0.6, 0.4, 0.2], np.ones(4)) == pytest.approx(0.5)
    assert evaluate.best_threshold([1, 1], [0.9, 0.6], np.ones(2)) < 0.6
    assert evaluate.best_threshold([0, 0], [0.9, 0.6], np.ones(2)) == 0.5


@pytest.mark.parametrize("prevalence", [0.5, 0.1, 0.0014])
def test_eq_beyond_prior__is_bayes_rule(prevalence):
    """Above the threshold the odds of training, times those of the prior, are above 1; below they are not."""
    threshold = evaluate.prior_threshold(prevalence)
    for probability, above in ((threshold + 1e-6, True), (threshold - 1e-6, False)):
        odds = probability / (1 - probability) * prevalence / (1 - prevalence)
        assert (odds > 1) == above


def test_eq_beyond_prior__a_balanced_prior_changes_nothing():
    """π = ½ is how it was trained: the threshold is argmax's."""
    assert evaluate.prior_threshold(0.5) == 0.5


def test_rule_beyond_best_threshold__comes_from_the_validation_set():
    """On a test set whose scores are all lower, the F1 is that of the validation set's threshold, not of the best."""
    labels = np.repeat([1, 0], [8, 4])
    test = evaluate.Scored(labels, evaluate.flip_weights(labels), np.zeros(12, int),
                           {"real": np.repeat([[0.3, 0.1]], [8, 4], axis=1)})
    validation = test._replace(scores={"real": np.repeat([[0.9, 0.7]], [8, 4], axis=1)})
    summary = evaluate.summarize_arm("real", test, validation, evaluate.measure_arms(test), 0.5)
    assert summary["f1_validation"]["mean"] == 0 and summary["auc"]["mean"] == 1
    on_itself = evaluate.summarize_arm("real", test, test, evaluate.measure_arms(test), 0.5)
    assert on_itself["f1_validation"]["mean"] == 1 and on_itself["f1_argmax"]["mean"] == 0


# Differences

def of_scans(seed, n_scans=6, n=90):
    """Labels, scores of two classifiers and the scan of each cube; no scan is empty."""
    rng = np.random.default_rng(seed)
    scans = np.concatenate([np.arange(n_scans), rng.integers(0, n_scans, n - n_scans)])
    labels = rng.integers(0, 2, n)
    scores = rng.integers(0, 12, (2, n)) / 12 + 0.2 * labels
    return labels, scores, scans


def test_eq_beyond_influence__of_a_mean_is_the_value_less_the_mean():
    """One value per scan: the influence on the mean is the value less the mean; on the sum, S − 1 times the value."""
    values = np.array([1.0, 5, 6, 8])
    scans = np.arange(4)
    means = evaluate.scan_influences(lambda cubes: values[cubes].mean(), scans)
    assert means == pytest.approx(values - 5)
    sums = evaluate.scan_influences(lambda cubes: values[cubes].sum(), scans)
    assert sums == pytest.approx(3 * values)


def test_eq_beyond_influence__leaves_out_all_cubes_of_a_scan():
    """Of two scans with two cubes each: the means without the one and without the other."""
    values, scans = np.array([1.0, 2, 10, 20]), np.array([0, 1, 0, 1])
    assert evaluate.scan_influences(lambda cubes: values[cubes].mean(), scans) == pytest.approx(
        [8.25 - 11, 8.25 - 5.5])


@pytest.mark.parametrize("seed", range(3))
def test_eq_beyond_influence__of_many_scans_is_nearly_the_derivative(seed):
    """With 200 scans, the influence on F1 is S·∂F1/∂wₛ, by hand, within a twentieth of its deviation."""
    labels, (scores, _), scans = of_scans(seed, n_scans=200, n=8000)
    weights, predictions = evaluate.flip_weights(labels), scores > 0.6

    def f1(cubes):
        return evaluate.f1(evaluate.confusion_matrix(labels[cubes], predictions[cubes], weights[cubes]))

    tp = np.bincount(scans, weights * (labels * predictions))
    counted = 2 * tp + np.bincount(scans, weights * (labels != predictions))
    derivative = 200 * (2 * tp - f1(scans >= 0) * counted) / counted.sum()
    ours = evaluate.scan_influences(f1, scans)
    assert np.abs(ours - derivative).max() < 0.05 * derivative.std()


def test_eq_beyond_t_interval__by_hand():
    """Influences 1, 2, 3 about 0.5: s = 1, so ± t/√3 with t = 4.3027 of 2 degrees of freedom."""
    low, high = evaluate.t_interval(0.5, np.array([1.0, 2, 3]))
    assert (low, high) == pytest.approx((0.5 - 4.302653 / math.sqrt(3), 0.5 + 4.302653 / math.sqrt(3)), abs=1e-6)


def test_eq_beyond_t_interval__of_a_mean_is_students():
    """For a mean, whose influences are its values less the mean, it is Student's interval."""
    values = np.random.default_rng(0).normal(size=7)
    expected = stats.t.interval(0.95, 6, values.mean(), stats.sem(values))
    assert evaluate.t_interval(values.mean(), values - values.mean()) == pytest.approx(expected, abs=1e-12)


def test_eq_beyond_t_interval__one_scan_has_none():
    """What a single scan says about others is unknown: nan."""
    assert all(map(math.isnan, evaluate.t_interval(0.5, np.array([0.0]))))


def test_eq_beyond_welch__is_welchs_test():
    """For means, whose influences are values less the mean, it is the interval of Welch's t test."""
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=6), 3 * rng.normal(size=11) + 1
    errors = [evaluate.standard_error(values - values.mean()) for values in (one, other)]
    expected = stats.ttest_ind(one, other, equal_var=False).confidence_interval(0.95)
    ours = evaluate.welch_interval(one.mean() - other.mean(), errors, (6, 11))
    assert ours == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert evaluate.welch_interval(0.25, (0, 0), (6, 11)) == (0.25, 0.25)


def test_summarize_arm__intervals_are_those_of_the_mean_over_repeats():
    """F1 and AUC have the t interval of the mean of the repeats' influences; of one scan there is none."""
    test = scored_arms(mixed=0.3)
    summary = evaluate.summarize_arm("mixed", test, test, evaluate.measure_arms(test), 0.1)
    influences = [row.auc_influences for row in evaluate.measure_arms(test)["mixed"]]
    low, high = evaluate.t_interval(summary["auc"]["mean"], np.mean(influences, axis=0))
    assert (summary["auc"]["low"], summary["auc"]["high"]) == pytest.approx((max(low, 0), min(high, 1)))
    assert 0 <= summary["f1_argmax"]["low"] and summary["f1_argmax"]["high"] <= 1
    assert summary["f1_argmax"]["low"] < summary["f1_argmax"]["mean"] < summary["f1_argmax"]["high"]
    one_scan = test._replace(scans=np.zeros(400, int))
    alone = evaluate.summarize_arm("mixed", one_scan, test, evaluate.measure_arms(one_scan), 0.1)
    assert math.isnan(alone["auc"]["low"]) and "[–, –]" in evaluate.format_interval(alone["auc"])


def scored_arms(seed=0, repeats=3, **gains):
    """A Scored of arms whose positives score higher by the gains, in `repeats` repeats."""
    labels, _, scans = of_scans(seed, n_scans=6, n=400)
    rng = np.random.default_rng(seed)
    scores = {arm: rng.uniform(0, 0.6, (repeats, 400)) + gain * labels for arm, gain in gains.items()}
    return evaluate.Scored(labels, evaluate.flip_weights(labels), scans, scores)


def test_compare__is_the_mean_over_paired_repeats():
    """The difference is the mean of the repeats' differences; the spread their standard deviation."""
    test = scored_arms(mixed=0.3, longer=0.2)
    differences = []
    for ours, others in zip(test.scores["mixed"], test.scores["longer"]):
        differences.append(auc_by_pairs(test.labels, ours) - auc_by_pairs(test.labels, others))
    row = evaluate.compare(evaluate.measure_arms(test), "mixed", "longer")["auc"]
    assert row["difference"] == pytest.approx(np.mean(differences), abs=1e-12)
    assert row["spread"] == pytest.approx(np.std(differences, ddof=1), abs=1e-12)


def test_compare__an_arm_with_itself_has_no_difference():
    """0, with an interval of no width: the arms are compared cube by cube, not as if independent."""
    test = scored_arms(mixed=0.3)
    for row in evaluate.compare(evaluate.measure_arms(test), "mixed", "mixed").values():
        assert row["difference"] == row["low"] == row["high"] == row["spread"] == 0


def test_compare__flips_do_not_narrow_the_interval():
    """A nodule's eight flips with the same score give the interval of the nodule alone."""
    labels, scores, scans = of_scans(2, n=80)
    alone = evaluate.Scored(labels, np.ones(80), scans, dict(zip("ab", scores[:, None])))
    times = np.where(labels == 1, 8, 1)
    flipped = evaluate.Scored(labels.repeat(times), evaluate.flip_weights(labels.repeat(times)), scans.repeat(times),
                              {name: scores[:, None].repeat(times, axis=2)[i] for i, name in enumerate("ab")})
    for name in ("f1", "auc"):
        one, other = (evaluate.compare(evaluate.measure_arms(test), "a", "b")[name] for test in (alone, flipped))
        assert [other[key] for key in ("difference", "low", "high")] == pytest.approx(
            [one[key] for key in ("difference", "low", "high")], abs=1e-12)


def test_compare__uneven_flips_do_not_move_the_interval():
    """Where nodules have from one to eight flips, differences and intervals are those of one flip each."""
    labels, scores, scans = of_scans(3, n=80)
    rows = np.arange(80)[:, None] * np.ones(4, int)
    times = np.where(labels == 1, np.random.default_rng(0).integers(1, 9, 80), 1)
    alone = evaluate.Scored(labels, np.ones(80), scans, dict(zip("ab", scores[:, None])))
    weights = evaluate.flip_weights(labels.repeat(times), rows.repeat(times, axis=0))
    flipped = evaluate.Scored(labels.repeat(times), weights, scans.repeat(times),
                              {name: scores[:, None].repeat(times, axis=2)[i] for i, name in enumerate("ab")})
    for name in ("f1", "auc"):
        one, other = (evaluate.compare(evaluate.measure_arms(test), "a", "b")[name] for test in (alone, flipped))
        assert [other[key] for key in ("difference", "low", "high")] == pytest.approx(
            [one[key] for key in ("difference", "low", "high")], abs=1e-12)


def test_compare_arms__the_three_differences_of_those_trained():
    """mixed − real, mixed − longer, fake − real; without an arm, those of the others."""
    measured = evaluate.measure_arms(scored_arms(real=0.1, longer=0.2, mixed=0.3, fake=0.1, critic=0.1))
    assert list(evaluate.compare_arms(measured)) == ["mixed - real", "mixed - longer", "fake - real"]
    assert list(evaluate.compare_arms({arm: measured[arm] for arm in ("real", "fake")})) == ["fake - real"]
    assert evaluate.compare_arms(measured)["mixed - real"]["auc"]["difference"] > 0


def interval(low, high):
    return {"difference": (low + high) / 2, "low": low, "high": high, "spread": 0.0}


@pytest.mark.parametrize("f1, auc, shown", [
    ((0.01, 0.1), (0.02, 0.1), True),
    # One of them is not enough, nor is 0 itself, nor a harm.
    ((0.01, 0.1), (-0.02, 0.1), False), ((-0.01, 0.1), (0.02, 0.1), False), ((0.0, 0.1), (0.02, 0.1), False),
    ((-0.2, -0.1), (-0.2, -0.1), False), ((math.nan, math.nan), (0.02, 0.1), False)])
def test_rule_beyond_verdict__only_where_mixed_exceeds_longer_in_both(f1, auc, shown):
    """Both intervals lie above 0; what mixed gains over real does not count."""
    differences = {"mixed - real": {"f1": interval(0.5, 0.6), "auc": interval(0.5, 0.6)},
                   "mixed - longer": {"f1": interval(*f1), "auc": interval(*auc)}}
    sentence = evaluate.verdict(differences, 5, 27)
    assert sentence.startswith("Shown to help") == shown and sentence.startswith("Not shown to help") != shown
    assert "5 test scans" in sentence and "27 nodules" in sentence and sentence.count("[") == 2


@pytest.mark.parametrize("f1, auc, start", [
    ((-0.2, -0.1), (-0.2, 0.1), "Not shown to help (lower in F1): mixed"),
    ((0.1, 0.2), (-0.2, -0.1), "Not shown to help (lower in AUC): mixed"),
    ((-0.2, -0.1), (-0.0002, -0.0001), "Not shown to help (lower in F1 and AUC): mixed"),
    # Not below 0, and nothing known.
    ((-0.2, 0.0), (-0.2, 0.1), "Not shown to help: mixed"),
    ((math.nan, math.nan), (-0.2, 0.1), "Not shown to help: mixed"),
    ((0.1, 0.2), (0.1, 0.2), "Shown to help: mixed")])
def test_rule_beyond_verdict__a_harm_is_told(f1, auc, start):
    """Where an interval lies below 0 the sentence says in what; it does not read as if nothing were known."""
    sentence = evaluate.verdict({"mixed - longer": {"f1": interval(*f1), "auc": interval(*auc)}}, 5, 27)
    assert sentence.startswith(start)


def test_rule_beyond_verdict__is_of_these_trainings():
    """The interval is over scans: the sentence says that other trainings are another question."""
    fair = {"f1": interval(0.02, 0.1), "auc": interval(0.01, 0.1)}
    assert "95% intervals for these trainings" in evaluate.verdict({"mixed - longer": fair}, 5, 27)


def test_rule_beyond_verdict__a_narrow_gain_does_not_look_like_zero():
    """An interval that lies above 0 by 0.0002 is shown so, not as one that begins at 0.000."""
    fair = {"f1": interval(0.0002, 0.1), "auc": interval(0.01, 0.1)}
    assert "[0.0002, 0.100]" in evaluate.verdict({"mixed - longer": fair}, 5, 27)


def test_rule_beyond_verdict__without_a_mixed_arm():
    """Where the GAN made nothing, nothing is shown."""
    assert evaluate.verdict({}, 5, 27).startswith("Not shown to help: no classifier")


# The quality of generated cubes: sets made so that it is known which faults they have

SIDE = 12


def blobs(n, seed, height=1200.0, radius=3.0, spread=0.15):
    """n bright balls of about a radius in a dark cube, in [-1, 1], each with noise of its own: "nodules"."""
    rng = np.random.default_rng(seed)
    steps = np.arange(SIDE) - SIDE // 2
    distance = np.sqrt(sum(axis ** 2 for axis in np.meshgrid(steps, steps, steps)))
    radii = radius * rng.normal(1, spread, n)
    hu = -900 + height / (1 + np.exp(2 * (distance - radii[:, None, None, None])))
    hu += rng.normal(0, 40, hu.shape)
    return np.clip(hu / 700 + 3 / 7, -1, 1)


def test_eq_beyond_radial_profile__of_a_known_function():
    """A cube whose HU are -10·r about its centre voxel: h(r) is the shell's mean of that, without spread."""
    steps = np.arange(SIDE) - SIDE // 2
    distance = np.sqrt(sum(axis ** 2 for axis in np.meshgrid(steps, steps, steps)))
    cube = (-10 * distance) / 700 + 3 / 7
    mean, deviation = evaluate.radial_profile(np.stack([cube, cube]))
    assert mean[0] == pytest.approx(0, abs=1e-9) and np.abs(mean + 10 * np.arange(SIDE // 2)).max() < 5
    shell = distance[np.rint(distance) == 3]
    assert mean[3] == pytest.approx(-10 * shell.mean(), abs=1e-4) and not deviation.round(4).any()      # float32


def test_eq_beyond_radial_profile__mean_and_spread_over_the_cubes():
    """Two constant cubes of -1000 and 400 HU: mean -300, standard deviation 700, at every radius."""
    cubes = np.stack([np.full((6, 6, 6), -1.0), np.full((6, 6, 6), 1.0)])
    mean, deviation = evaluate.radial_profile(cubes)
    assert np.allclose(mean, -300) and np.allclose(deviation, 700) and mean.shape == deviation.shape == (3,)


def test_rule_beyond_profile_difference__within_a_third_of_the_side():
    """A difference at r ≤ 4 of a cube of 12 counts; one at its corner does not."""
    cubes = blobs(4, 0)
    near, far = cubes.copy(), cubes.copy()
    near[:, 6, 6, 6] -= 1
    far[:, 0, 0, 0] += 1
    assert evaluate.profile_difference(near, cubes) == pytest.approx(700, rel=1e-6)
    assert evaluate.profile_difference(far, cubes) == 0


def test_rule_beyond_profile_difference__ends_at_a_third_of_the_side():
    """In a cube of 12 a voxel 4 mm from the centre counts, one 5 mm from it does not."""
    cubes = blobs(4, 0)
    at_4_mm, at_5_mm = cubes.copy(), cubes.copy()
    at_4_mm[:, 6, 6, 10] -= 1
    at_5_mm[:, 6, 6, 11] -= 1
    assert evaluate.profile_difference(at_4_mm, cubes) > 1 and evaluate.profile_difference(at_5_mm, cubes) == 0


def test_rule_beyond_called_positive__the_share_above_a_half():
    """Two of four, a probability of exactly ½ being negative."""
    assert evaluate.share_called_positive(np.array([0.9, 0.51, 0.5, 0.1])) == 0.5


def test_eq_beyond_distances__are_those_of_differences():
    """The matrix product gives the distances of differences; of a float32 copy less than 10⁻⁴."""
    rng = np.random.default_rng(0)
    queries, references = rng.uniform(-1, 1, (5, 24, 24, 24)), rng.uniform(-1, 1, (7, 24, 24, 24))
    ours = evaluate.pairwise_distances(queries, references)
    assert np.allclose(ours, cdist(queries.reshape(5, -1), references.reshape(7, -1)), rtol=1e-12)
    copies = references.astype(np.float32)
    assert np.diagonal(evaluate.pairwise_distances(copies, copies)).max() < 1e-4


@pytest.mark.parametrize("size", [1, 5, 29, 128])
def test_distances_to_training__in_parts_as_at_once(tmp_path, size):
    """However many training cubes are read at a time, each kind's distances to all of them, flips included."""
    dataset = small_run(tmp_path)
    rows, flips, _ = preprocessing.labelled(dataset, "train")
    training = np.concatenate([eight(cubes_of(dataset, "positives", "train")),
                               cubes_of(dataset, "negatives", "train")])
    kinds = {"a": np.random.default_rng(0).uniform(-1, 1, (4, 6, 6, 6)), "b": training[3:5]}
    found = evaluate.distances_to_training(kinds, dataset, rows, flips, size)
    for kind, cubes in kinds.items():
        expected = cdist(cubes.reshape(len(cubes), -1), training.reshape(29, -1))
        # The order of the flips is the program's own.
        assert np.allclose(np.sort(found[kind]), np.sort(expected), atol=1e-4)


def test_eq_beyond_copy_ratio__by_hand():
    """Distances 1, 2, 4 and 3, 3, 9: the mean of ½ and 1; a copy has 0, two equal training cubes 1."""
    assert evaluate.copy_ratio(np.array([[4, 1, 2], [9, 3, 3.0]])) == 0.75
    assert evaluate.copy_ratio(np.array([[0, 5.0]])) == 0 and evaluate.copy_ratio(np.array([[0, 0.0]])) == 1
    assert evaluate.copy_ratio(np.array([[0.2, 0.4]])) == 0.5


@pytest.mark.parametrize("seed", range(10))
def test_eq_beyond_copying_test__is_the_count_of_pairs(seed):
    """U counts the pairs in which the generated cube lies farther away, ties half; then its mean and deviation."""
    rng = np.random.default_rng(seed)
    generated, held_out = rng.integers(0, 9, 14), rng.integers(0, 9, 11)
    farther = generated[:, None] - held_out
    u = (farther > 0).sum() + (farther == 0).sum() / 2
    expected = (u - 14 * 11 / 2) / math.sqrt(14 * 11 * 26 / 12)
    assert evaluate.copying_test(generated, held_out) == pytest.approx(expected, abs=1e-12)


def test_eq_beyond_copying_test__sign():
    """Nearer than held-out ones: far below 0; farther: far above; alike: 0; of none: nan."""
    near, far = np.linspace(1, 2, 30), np.linspace(3, 4, 30)
    assert evaluate.copying_test(near, far) < -6 and evaluate.copying_test(far, near) > 6
    assert evaluate.copying_test(near, near) == 0 and math.isnan(evaluate.copying_test(near[:0], far))
    assert evaluate.copying_test(near[:1], far) < 0 < evaluate.copying_test(far, near[:1])
    assert math.isnan(evaluate.copying_test(near, far[:0]))


def test_eq_beyond_two_sample__apart_alike_and_copied():
    """Two far clusters 1, one distribution about ½, copies 0."""
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(2, 200, 3))
    assert evaluate.two_sample_accuracy(one, other + 100) == 1
    assert abs(evaluate.two_sample_accuracy(one, other) - 0.5) < 3 * math.sqrt(0.25 / 400) + 0.02
    assert evaluate.two_sample_accuracy(one, one.copy()) == 0


def test_eq_beyond_two_sample__rises_a_little_with_the_number_of_cubes():
    """Of one and the same fault, normals that are shifted, 27 of each show less than 108: about .59 and .61."""
    rng = np.random.default_rng(0)
    accuracies = {}
    for n in (27, 108):
        found = []
        for _ in range(200):
            one, other = rng.normal(size=(2, n, 20))
            found.append(evaluate.two_sample_accuracy(one, other + 1.5 / math.sqrt(20)))
        accuracies[n] = np.mean(found)
    assert 0.57 < accuracies[27] < 0.605 < accuracies[108] < 0.63


def test_eq_beyond_frechet__is_scipys_root():
    """With scipy's matrix root in place of eigenvalues; 0 for a set and itself."""
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(60, 5)), rng.normal(size=(50, 5)) @ rng.normal(size=(5, 5)) + 1
    first, second = np.cov(one.T), np.cov(other.T)
    root = linalg.sqrtm(first @ second).real
    expected = ((one.mean(0) - other.mean(0)) ** 2).sum() + np.trace(first + second - 2 * root)
    assert evaluate.frechet_distance(one, other) == pytest.approx(expected, rel=1e-9)
    assert evaluate.frechet_distance(one, one) == pytest.approx(0, abs=1e-9)


def test_eq_beyond_frechet__of_normals_by_hand():
    """Means 3 apart, deviations 1 and 2 in one dimension of two: 9 + (2 − 1)²."""
    rng = np.random.default_rng(1)
    one, other = rng.normal(size=(2, 200_000, 2))
    other[:, 0] = 2 * other[:, 0] + 3
    assert evaluate.frechet_distance(one, other) == pytest.approx(10, rel=0.02)


@pytest.fixture(scope="module")
def assessed():
    """kind → Quality of constructed sets, against the same training set; a classifier by brightness."""
    training, held_out = blobs(120, 1), blobs(60, 2)
    nearest = evaluate.pairwise_distances(held_out, training).min(axis=1)
    torch.manual_seed(0)
    classifier = Classifier(SIDE).eval()
    _, features = evaluate.classify(classifier, evaluate.evenly_chosen(training, 60), CPU)
    real = evaluate.RealCubes(training, features, nearest)
    rng = np.random.default_rng(3)
    kinds = evaluate.kinds_of_cubes(blobs(120, 4), blobs(120, 5, height=500), training, held_out, rng)
    return {kind: evaluate.assess(cubes, evaluate.pairwise_distances(cubes, training), real, classifier, CPU)
            for kind, cubes in kinds.items()}


def test_assess__right_cubes_look_like_held_out_ones(assessed):
    """Cubes of the right distribution: no measure tells them from held-out real ones."""
    right, held_out = assessed["generated and accepted"], assessed["held-out real"]
    assert right.profile_difference < 40 and abs(right.copying) < 3 and abs(right.two_sample - 0.5) < 0.15
    assert abs(right.copy_ratio - held_out.copy_ratio) < 0.05 and right.frechet < 3 * held_out.frechet


def test_assess__which_measure_sees_copies(assessed):
    """d₁/d₂, C_T and the two-sample accuracy see copies; profile and Fréchet distance cannot."""
    copies = assessed["copies of training cubes"]
    assert copies.copy_ratio < 0.01 and copies.copying < -6 and copies.two_sample == 0
    assert copies.profile_difference == 0 and copies.frechet < assessed["held-out real"].frechet


def test_assess__which_measure_sees_one_cube_repeated(assessed):
    """The profile's spread, the two-sample accuracy and the Fréchet distance see it; d₁/d₂ cannot."""
    repeated, right = assessed["one real cube, repeated"], assessed["generated and accepted"]
    assert repeated.centre_spread < 1e-3 < right.centre_spread
    assert repeated.two_sample > 0.7 and repeated.frechet > 3 * right.frechet
    assert repeated.copy_ratio > 0.9


def test_assess__which_measure_sees_noise(assessed):
    """The profile, C_T and the Fréchet distance see noise; d₁/d₂ cannot: it is as far from every cube."""
    noise, right = assessed["noise"], assessed["generated and accepted"]
    assert noise.profile_difference > 300 and noise.copying > 6 and noise.frechet > 3 * right.frechet
    assert noise.copy_ratio > 0.9


def test_assess__which_measure_sees_pale_nodules(assessed):
    """Balls of 500 HU in place of 1200: the profile differs by about 700 HU at the centre, C_T is far above 0."""
    pale = assessed["generated, before selection"]
    assert 600 < pale.profile_difference < 800 and pale.copying > 6 and pale.two_sample > 0.9


# Flips of the real cubes that generated ones are compared with

def with_split_flips(dataset, split, is_in_split):
    """The Dataset of --split cube, of which a split has these flips, (n, 8), and the others all of them."""
    flips = {name: np.ones((len(rows), 8), bool) for name, rows in dataset.positives.items()}
    return dataset._replace(flips=flips | {split: is_in_split})


def test_rule_beyond_quality_flips__any_of_the_eight_by_the_seed(tmp_path):
    """All eight, about equally often; the seed and the split decide, and nothing else."""
    dataset = small_run(tmp_path, nodules=(800, 1, 800))
    flips = evaluate.one_flip_each(dataset, "train", 0)
    counts = np.bincount(flips, minlength=8)
    assert len(counts) == 8 and np.abs(counts - 100).max() < 40
    assert np.array_equal(flips, evaluate.one_flip_each(dataset, "train", 0))
    for others in (evaluate.one_flip_each(dataset, "train", 1), evaluate.one_flip_each(dataset, "test", 0)):
        assert not np.array_equal(flips, others)


def test_rule_beyond_quality_flips__of_those_that_lie_in_the_split(tmp_path):
    """With --split cube no flip of another split is drawn, and each of this one's can be."""
    dataset = small_run(tmp_path, nodules=(1, 1, 400))
    is_in_split = np.zeros((400, 8), bool)
    is_in_split[:, [1, 4, 6]] = True
    is_in_split[0, :] = [False] * 7 + [True]
    flips = evaluate.one_flip_each(with_split_flips(dataset, "test", is_in_split), "test", 0)
    assert flips[0] == 7 and set(flips[1:]) == {1, 4, 6}


def write_cubes(run, cubes):
    """Prepare a run whose nodules are cubes in [-1, 1], split → (n, c, c, c), and as many black negatives.

    Returns its Dataset.
    """
    scans = []
    for split, of_split in cubes.items():
        n, side, *_ = of_split.shape
        # Side by side along x.
        hu = np.rint(700 * of_split - 300).astype(np.int16).transpose(1, 2, 0, 3).reshape(side, side, n * side)
        lungaug.write(run / "prepared" / f"{split}.npy", np.concatenate([hu, np.full_like(hu, -1000)], axis=2))
        places = [[side // 2, side // 2, side // 2 + side * i] for i in range(2 * n)]
        scans.append({"seriesuid": f"1.2.{split}", "patient": split, "split": split, "volume": f"{split}.npy",
                      "origin": [0.0, 0.0, 0.0], "positives": places[:n], "negatives": places[n:]})
    lungaug.write(run / "prepared" / "dataset.json", {
        "parameters": {"cube": side}, "preset": "demo", "synthetic": True, "skipped": [],
        "table_1": preprocessing.table_1(scans, {}), "scans": scans})
    return preprocessing.open_dataset(run)


def assess_positives(run, dataset, generated, seed=0):
    """kind → Quality of generated positives in [-1, 1]."""
    torch.manual_seed(0)
    lungaug.write(run / "classifiers" / "generated" / "positive.npy", np.rint(700 * generated - 300).astype(np.int16))
    preprocessing.open_array.cache_clear()
    classifier = Classifier(dataset.cube).eval()
    generator = Generator(dataset.cube, 1).eval()
    return evaluate.assess_class(1, run, dataset, generator, classifier, seed, CPU).qualities


def flipped_at_random(cubes, seed):
    rng = np.random.default_rng(seed)
    return np.array([preprocessing.all_flips(cube)[rng.integers(8)] for cube in cubes])


def test_rule_beyond_quality_flips__a_perfect_generator_is_not_told_from_real_ones(tmp_path):
    """New nodules, flipped at random as the GAN sees them: neither profile nor nearest neighbour finds a fault."""
    dataset = write_cubes(tmp_path, {"train": blobs(100, 1), "validation": blobs(2, 2), "test": blobs(100, 3)})
    qualities = assess_positives(tmp_path, dataset, flipped_at_random(blobs(100, 4), 0))
    for kind in ("generated and accepted", "held-out real"):
        assert qualities[kind].profile_difference < 60, kind
        assert abs(qualities[kind].two_sample - 0.5) < 0.12, kind


def test_rule_beyond_quality_flips__copies_in_any_flip_are_caught(tmp_path):
    """Whichever flip of a training nodule is generated, it is a copy; and a flip of all cubes changes no distance."""
    dataset = write_cubes(tmp_path, {"train": blobs(30, 1), "validation": blobs(2, 2), "test": blobs(30, 3)})
    copies = assess_positives(tmp_path, dataset, flipped_at_random(blobs(30, 1), 0))["generated and accepted"]
    assert copies.copy_ratio < 0.01 and copies.copying < -6
    one, other = (assess_positives(tmp_path, dataset, blobs(30, 4), seed) for seed in (0, 1))
    for kind in ("held-out real", "copies of training cubes"):
        assert one[kind].copy_ratio == pytest.approx(other[kind].copy_ratio, abs=1e-5)
        assert one[kind].copying == other[kind].copying


def test_eq_beyond_copy_ratio__all_eight_flips_where_cubes_were_split_too(tmp_path):
    """A copy of a training nodule is one in a flip that lies in the test set, too."""
    dataset = write_cubes(tmp_path, {"train": blobs(30, 1), "validation": blobs(2, 2), "test": blobs(30, 3)})
    is_in_split = np.zeros((30, 8), bool)
    is_in_split[:, 0] = True
    by_cube = with_split_flips(dataset, "train", is_in_split)
    rows, flips = evaluate.training_cubes(by_cube, 1)
    assert len(rows) == 8 * 30 and sorted(flips.tolist()) == sorted(30 * list(range(8)))
    copies = assess_positives(tmp_path, by_cube, np.flip(blobs(30, 1), (1, 2)))["generated and accepted"]
    assert copies.copy_ratio < 0.01 and copies.copying < -6


@pytest.mark.parametrize("most", [1, 3, 5, 2048])
def test_eq_beyond_copy_ratio__negatives_as_they_are(tmp_path, monkeypatch, most):
    """Evenly chosen where there are many; those that others are compared with are among them."""
    monkeypatch.setattr(evaluate, "MOST_NEGATIVES", most)
    dataset = small_run(tmp_path)
    rows, flips = evaluate.training_cubes(dataset, 0)
    assert rows.tolist() == dataset.negatives["train"][lungaug.evenly(5, most)].tolist()
    assert flips.tolist() == [0] * len(rows)
    references, _ = evaluate.compared_with(dataset, 0, "train", 0)
    assert not evaluate.are_new(references, rows).any()


def test_eq_beyond_copying_test__nodules_of_the_training_set_are_no_scale(tmp_path):
    """With --split cube a test nodule may be in the training set, in another flip: C_T is taken from the new ones."""
    training = blobs(30, 1)
    dataset = write_cubes(tmp_path, {"train": training, "validation": blobs(2, 2), "test": blobs(30, 3)})
    by_cube = with_split_flips(dataset, "train", np.ones((30, 8), bool))
    copies = flipped_at_random(training, 0)
    for n_seen in (25, 30):
        test_rows = np.concatenate([dataset.positives["train"][:n_seen], dataset.positives["test"][n_seen:]])
        leaking = by_cube._replace(positives=dataset.positives | {"test": test_rows})
        found = assess_positives(tmp_path, leaking, copies)
        assert found["held-out real"].copy_ratio < 0.25 and found["generated and accepted"].copy_ratio < 0.01
        # Without a new nodule nothing tells how near one lies.
        copying = [found[kind].copying for kind in ("generated and accepted", "copies of training cubes")]
        assert all(map(math.isnan, copying)) if n_seen == 30 else max(copying) < -3


def test_eq_beyond_selection__sign():
    """A critic that scores as the classifier does: ρ = 1; one that scores against it: −1; a constant one: nan."""
    cubes = np.random.default_rng(0).uniform(-1, 1, (20, 6, 6, 6)).astype(np.float32)
    torch.manual_seed(0)
    classifier = Classifier(6).eval()

    def critic(sign):
        return lambda x: (sign * (classifier(x)[:, 1] - classifier(x)[:, 0]), None)

    rho = [evaluate.score_selection(critic(sign), classifier, cubes, CPU) for sign in (1, -1, 0)]
    assert rho[:2] == pytest.approx([1, -1]) and math.isnan(rho[2])


@pytest.mark.parametrize("constant", ["critic", "classifier"])
def test_eq_beyond_selection__a_constant_has_none_and_no_warning(constant):
    """Where the scores, or the probabilities, are all the same, there is no order to compare: nan, without a word."""
    cubes = np.random.default_rng(0).uniform(-1, 1, (20, 6, 6, 6)).astype(np.float32)
    torch.manual_seed(0)
    classifier = Classifier(6).eval()
    if constant == "classifier":
        torch.nn.init.zeros_(classifier[-1].weight)
    scale = 0 if constant == "critic" else 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rho = evaluate.score_selection(lambda x: (scale * x[:, 0, 0, 0, 0], None), classifier, cubes, CPU)
    assert math.isnan(rho)


def test_generate_unselected__is_of_the_class_and_of_the_seed(tmp_path):
    """The latents carry the class; the same seed gives the same cubes, another one others."""
    torch.manual_seed(0)
    generator = Generator(6, 1).eval()
    cubes = evaluate.generate_unselected(generator, 1, 70, 3, CPU)
    assert cubes.shape == (70, 6, 6, 6) and np.abs(cubes).max() <= 1
    assert np.array_equal(cubes, evaluate.generate_unselected(generator, 1, 70, 3, CPU))
    for other in ((0, 70, 3), (1, 70, 4)):
        assert not np.array_equal(cubes, evaluate.generate_unselected(generator, *other, CPU))


@pytest.mark.parametrize("n_nodules, assessed", [((3, 2, 2), {"positive", "negative", "selection"}),
                                                 ((3, 2, 1), {"negative"}), ((1, 2, 2), {"negative"})])
def test_assess_generated__of_each_class_that_can_be(tmp_path, n_nodules, assessed):
    """A class of which training or test set has fewer than two cubes is left out, and nothing fails."""
    dataset = small_run(tmp_path, nodules=n_nodules)
    torch.manual_seed(0)
    state = {"settings": {"width": 1, "prepared": dataset.fingerprint}, "generator": Generator(6, 1).state_dict()}
    lungaug.write(tmp_path / "gan" / "checkpoint.pt", state)
    for name, count in (("positive", 0), ("negative", 5)):
        lungaug.write(tmp_path / "classifiers" / "generated" / f"{name}.npy", np.zeros((count, 6, 6, 6), np.int16))
    networks = {"real": [Classifier(6).eval()], "critic": [evaluate.CriticHead(Critic(6, 1)).eval()]}
    quality, profiles = evaluate.assess_generated(tmp_path, dataset, networks, 0, CPU)
    assert set(quality) == assessed and set(profiles) == assessed - {"selection"}
    for name in profiles:
        assert ("generated and accepted" in quality[name]) == (name == "negative")
        assert len(quality[name]) >= 5


# Several runs side by side

def evaluated_run(run, gain, prepared=1, log=True):
    """What `--compare` reads of a run: results.json, and a GAN's log."""
    test = scored_arms(real=0.1, longer=0.1, mixed=gain)
    arms = {arm: evaluate.summarize_arm(arm, test, test, evaluate.measure_arms(test), 0.1) for arm in test.scores}
    results = {"verdict": "Not shown to help: nothing", "counts": {"prepared": prepared, "scans": 6},
               "tables": evaluate.tables(test), "control": evaluate.table_of(*evaluate.CONTROL, test),
               "arms": arms}
    lungaug.write(run / "evaluation" / "results.json", evaluate.null_for_nan(results))
    for epoch in (1, 2, 3) if log else ():
        critic = dict(wasserstein=1.0, penalty=1, auxiliary=2, real_accuracy=0.25, fake_accuracy=0.75)
        lungaug.append_log(run / "gan" / "log.jsonl", {"epoch": epoch, "critic": critic,
                                                       "generator": {"auxiliary": 3}})
    return run



def test_compare_runs__one_table_and_one_picture(tmp_path, run):
    """Each run's arms in one table, its verdict, and a line of each in the four charts of figure 7."""
    first, second = evaluated_run(tmp_path / "one", 0.2), evaluated_run(tmp_path / "two", 0.5)
    done = run(evaluate, "--compare", first, second)
    assert done.status == 0 and done.err == "" and "different scans" not in done.out
    for folder in (first, second):
        assert sum(str(folder) in line for line in done.out.splitlines()) >= 6
    figure = (first / "evaluation" / "comparison.svg").read_text(encoding="utf-8")
    assert figure.count("<polyline") == 4 * 2 and f">{first}<" in figure and f">{second}<" in figure
    gain = next(line for line in done.out.splitlines() if "mixed" in line and "−" in line and str(second) in line)
    assert len(re.findall(r"\[[^]]+, [^]]+\]", gain)) == 2
    assert not (second / "evaluation" / "comparison.svg").exists()


@pytest.mark.parametrize("critic", [{}, {"wasserstein": "many"}])
def test_compare_runs__a_damaged_log_is_told_by_its_run(tmp_path, run, critic):
    """The line names the run whose log it is, and the whole command that writes it anew."""
    first, second = evaluated_run(tmp_path / "one", 0.2), evaluated_run(tmp_path / "two", 0.5)
    lungaug.append_log(second / "gan" / "log.jsonl", {"epoch": 4, "critic": critic, "generator": {}})
    done = run(evaluate, "--compare", first, second)
    assert done.status == 2 and done.err.startswith(f"lungaug: {second / 'gan'}: ")
    assert f"run python train_gan.py --run {second} --overwrite" in done.err and done.err.count("\n") == 1


def test_compare_runs__other_test_sets_are_told(tmp_path, run):
    """Runs that were tested on other scans, or another split, are compared, and it is said."""
    done = run(evaluate, "--compare", evaluated_run(tmp_path / "one", 0.2),
               evaluated_run(tmp_path / "two", 0.5, prepared=2, log=False))
    assert done.status == 0 and "different scans" in done.out


def test_compare_runs__without_results_the_curves_only(tmp_path, run):
    """Two GANs, of which one run is evaluated: both curves, the arms of that run alone; of none, no table."""
    first, second = evaluated_run(tmp_path / "one", 0.2), evaluated_run(tmp_path / "two", 0.5)
    (second / "evaluation" / "results.json").unlink()
    done = run(evaluate, "--compare", second, first)
    assert done.status == 0 and f"{second}: not evaluated" in done.out
    assert "Figure 7 of 2 runs" in done.out and str(second) not in done.out.split("Arms of each run")[1].split("Fig")[0]
    (first / "evaluation" / "results.json").unlink()
    assert "Arms of each run" not in run(evaluate, "--compare", first, second).out


def test_compare_runs__without_an_interval_there_is_a_dash(tmp_path, run):
    """A test set whose nodules lie in one scan has no error, one without nodules no mean: a dash each, exit 0."""
    first, second = evaluated_run(tmp_path / "one", 0.2), evaluated_run(tmp_path / "two", 0.5)
    path = second / "evaluation" / "results.json"
    results = lungaug.read_json(path, "")
    results["arms"]["mixed"]["auc"] |= {"low": None, "high": None, "error": None}
    results["arms"]["real"]["f1_argmax"] |= {"mean": None, "low": None, "high": None, "error": None}
    lungaug.write(path, results)
    for runs in ((first, second), (second, first)):
        done = run(evaluate, "--compare", *runs)
        assert done.status == 0 and "[–, –]" in done.out


def test_compare_runs__help_says_what_it_shows(run):
    """It is no run of this name, and status 0."""
    done = run(evaluate, "--compare", "--help")
    assert done.status == 0 and "RUN" in done.out and "comparison.svg" in done.out


def test_compare_runs__a_log_of_other_rows_is_one_line(tmp_path, run):
    """A log that is none of a GAN is told in one line."""
    lungaug.append_log(tmp_path / "gan" / "log.jsonl", {"epoch": 1})
    assert in_one_line(run(evaluate, "--compare", tmp_path), "log", "--overwrite")


@pytest.mark.parametrize("fault, words", [("none", "give the folders"), ("nothing", "run python lungaug.py --run"),
                                          ("damaged", "run evaluate.py again")])
def test_compare_runs__what_cannot_be_compared_is_one_line(tmp_path, run, fault, words):
    """No run at all, one of which there is nothing, or whose results are damaged."""
    runs = [evaluated_run(tmp_path / "one", 0.2), tmp_path / "two"]
    if fault == "damaged":
        lungaug.write(runs[1] / "evaluation" / "results.json", {"tables": {}})
    assert in_one_line(run(evaluate, "--compare", *([] if fault == "none" else runs)), words)


def test_figure_roc__curves_of_the_arms_and_the_thesis_points():
    """A curve per arm in two charts; Tables 2–5 as dots at their rates, each in the colour of its arm."""
    test = scored_arms(real=0.1, mixed=0.3, critic=0.1)
    figure = evaluate.figure_roc(test)
    assert figure.count("<polyline") == 6 and figure.count("<circle") == 4
    colours = dict(zip(test.scores, evaluate.COLOURS))
    dots = re.findall('<circle cx="([^"]*)" cy="([^"]*)" r="4" fill="([^"]*)"', figure)
    for (x, y, colour), (arm, _, thesis) in zip(dots, evaluate.TABLES.values()):
        share = (float(x) - evaluate.LEFT) / (evaluate.RIGHT - evaluate.LEFT)
        assert 0.1 * share == pytest.approx(1 - evaluate.specificity(thesis), abs=2e-5)
        assert colour == colours.get(arm, "#444") and evaluate.TOP <= float(y) <= evaluate.BOTTOM


def test_figure_profiles__a_chart_a_class_with_bands():
    """The mean of each kind, and a band of a standard deviation on both sides, but before selection.

    Those lie on the accepted ones where nearly all are accepted: a dashed line lets them show through.
    """
    profile = (np.linspace(-200, -800, 12), np.full(12, 50.0))
    figure = evaluate.figure_profiles({"positive": {"real": profile, "generated and accepted": profile,
                                                    "generated, before selection": profile},
                                       "negative": {"real": profile}})
    assert figure.count("<polyline") == 4 and figure.count("<polygon") == 3
    assert ">accepted<" in figure and ">before selection<" in figure
    assert re.findall("<polyline[^>]*dasharray[^>]*>", figure) == re.findall('<polyline[^>]*"before[^>]*>', figure)


def test_quality_rows__a_minus_sign_is_one():
    """Below 0 stands the sign of the other tables, no hyphen; what is not known is a dash."""
    row = evaluate.Quality(27, -245.9, 237.3, 25.7, 0.85, 0.92, -3.14, 0.43, 1.29)._asdict()
    (_, *cells), (_, *unknown) = evaluate.quality_rows({"a": row, "b": row | {"copying": None}})
    assert cells == ["27", "−246 ± 237", "26 HU", "0.850", "0.920", "−3.1", "0.430", "1.29"]
    assert unknown[5] == "–"


@pytest.mark.parametrize("synthetic", [True, False])
def test_help_items__say_that_scans_are_synthetic_where_they_are(monkeypatch, synthetic):
    """Beside the verdict, where nobody can miss it; never of a user's own scans."""
    for name in ("arm_rows", "difference_rows"):
        monkeypatch.setattr(evaluate, name, lambda results: [])
    results = {"verdict": "Not shown to help.",
               "counts": {"repeats": 3, "scans": 5, "nodules": 27, "negatives": 3275}}
    items = evaluate.help_items(results, SimpleNamespace(info={"synthetic": synthetic}))
    texts = [item.text for item in items if isinstance(item, lungaug.Text)]
    assert ("The scans are synthetic" in texts[-1]) == synthetic and texts[0] == "Not shown to help."


def test_selection_sentence__says_which_it_prefers():
    """A negative ρ is told as what it is; without one, why there is none."""
    assert "ρ is −0.69: " in evaluate.selection_sentence(-0.69)
    assert "less sure" in evaluate.selection_sentence(-0.69)
    assert "surer" in evaluate.selection_sentence(0.4)
    assert all("next to nothing" in evaluate.selection_sentence(rho) for rho in (-0.08, 0.0, 0.12))
    assert "cannot be said" in evaluate.selection_sentence(None)
