"""Sections 4.2, 4.3, 4.4: flips, generate–score–select, the arms, balanced batches, the best epoch, stop and resume.

    python -m pytest tests/test_train_classifier.py -v

A run's prepared data are noise here, a scan for each split; generator and critic are functions with a known answer.
"""

import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from scipy import stats

import evaluate
import lungaug
import preprocessing
import train_classifier
from lungaug import PRESETS, Refusal
from models import Critic, Generator

CPU = torch.device("cpu")
AXES = [axes for n in range(4) for axes in itertools.combinations(range(3), n)]      # the eight sets of mirrored axes


def small_run(run, cube=6, nodules=(3, 2, 2), negatives=(5, 3, 4)):
    """Prepared data of random HU in `run`, so many nodules and negatives in train, validation, test; their Dataset."""
    rng, scans = np.random.default_rng(1), []
    for split, *counts in zip(("train", "validation", "test"), nodules, negatives):
        hu = rng.integers(-1000, 401, (20, 21, 22)).astype(np.int16)
        lungaug.write(run / "prepared" / f"{split}.npy", hu)
        positives, others = (rng.integers(cube // 2, 20 - cube // 2, (n, 3)).tolist() for n in counts)
        scans.append({"seriesuid": f"1.2.{split}", "patient": split, "split": split, "volume": f"{split}.npy",
                      "origin": [-10.5, 20.25, 30.0], "positives": positives, "negatives": others})
    lungaug.write(run / "prepared" / "dataset.json", {
        "parameters": {"cube": cube}, "preset": "thesis", "synthetic": True, "left_out": [],
        "table_1": preprocessing.table_1(scans), "scans": scans})
    return preprocessing.open_dataset(run)


def cubes_of(dataset, kind, split):
    """The cubes (n, c, c, c) in [-1, 1] of the scan of a split, cut and scaled by hand; all lie inside."""
    scan, = (scan for scan in dataset.info["scans"] if scan["split"] == split)
    hu, half = np.load(dataset.folder / scan["volume"]).astype(float), dataset.cube // 2
    return np.array([hu[z - half:z + half, y - half:y + half, x - half:x + half]
                     for z, y, x in scan[kind]]) / 700 + 3 / 7


def eight(cubes):
    """Each cube mirrored along each set of axes, by numpy."""
    return np.array([np.flip(cube, axes) for cube in cubes for axes in AXES])


def as_set(cubes):
    """Cubes in [-1, 1] as a sorted list of whole HU: equal where the same ones are there as often, in any order."""
    hu = 700 * np.reshape(cubes, (len(cubes), -1)).astype(float) - 300
    assert np.abs(hu - np.rint(hu)).max() < 1e-3
    return sorted(np.rint(hu).astype(int).tolist())


def options(*words):
    """The options of train_classifier, those of the thesis where not typed."""
    return lungaug.settle(lungaug.parse("", "train_classifier", words=words), "train_classifier", "thesis")


def write_generated(run, positives=5, negatives=4, cube=6):
    """Generated cubes of noise in a run, so many of each class; returns them, int16 HU."""
    rng, made = np.random.default_rng(2), {}
    for name, count in (("positive", positives), ("negative", negatives)):
        made[name] = rng.integers(-1000, 401, (count, cube, cube, cube)).astype(np.int16)
        lungaug.write(run / "classifiers" / "generated" / f"{name}.npy", made[name])
        lungaug.write(run / "classifiers" / "generated" / f"{name}_rejected.npy", made[name])
    return made


def train(run, arm="real", *words, delivered=None):
    """Train one arm on the small run; returns its checkpoint."""
    words = ("--batch-size", "8", *words)
    train_classifier.train_arm(arm, run, preprocessing.open_dataset(run), options(*words), delivered, CPU)
    return lungaug.load_checkpoint(run / "classifiers" / arm / "checkpoint.pt", "")


def preset(name):
    """The thesis' value of a classifier setting."""
    return next(row.thesis for row in PRESETS if (row.stage, row.name) == ("train_classifier", name))


# The numbers of 4.4.1

def test_num_4_4_batch_size__is_64():
    """Batch size 64, of 32 positive and 32 negative samples."""
    assert preset("batch-size") == 64
    assert len(next(train_classifier.balanced_batches(1000, 1000, preset("batch-size"), lungaug.stream(0)))[0]) == 32


def test_num_4_4_learning_rate__is_a_thousandth_then_a_tenth_of_it():
    """Initial learning rate 10⁻³, decayed to 10⁻⁴."""
    assert (preset("learning-rate"), preset("late-learning-rate")) == (1e-3, 1e-4)


def test_num_4_4_epochs__are_60_and_the_rate_falls_at_30():
    """60 epochs in total; at epoch 30 the learning rate is decayed."""
    assert (preset("epochs"), preset("decay-epoch")) == (60, 30)


def test_num_4_4_adam__reaches_the_optimizer(tmp_path):
    """β₁ = 0.9, β₂ = 0.999, as the optimizer of a trained arm has them."""
    small_run(tmp_path)
    group, = train(tmp_path, "real", "--epochs", "1")["optimizer"]["param_groups"]
    assert train_classifier.BETAS == (0.9, 0.999) == tuple(group["betas"])


# 4.2 Conventional augmentation

def test_rule_4_2_flips__the_positives_are_the_eight_flips_and_no_noise(tmp_path):
    """The real positives trained on are each nodule's eight flips, to the voxel, each once."""
    dataset = small_run(tmp_path)
    found = preprocessing.read_cubes(dataset, *train_classifier.conventional_positives(dataset, "train"))[:, 0]
    assert as_set(found) == as_set(eight(cubes_of(dataset, "positives", "train"))) and len(found) == 24


def test_rule_4_2_flips__negatives_are_not_flipped(tmp_path):
    """Flips are for the scarce positives; a negative is trained on as it is."""
    dataset = small_run(tmp_path)
    _, negatives = train_classifier.arm_pools("real", tmp_path, dataset)
    assert as_set(negatives.read(np.arange(5))) == as_set(cubes_of(dataset, "negatives", "train"))


# 4.3 Generative augmentation

def test_rule_4_3_select__rows_by_hand_both_edges_belong():
    """Both thresholds must be reached; a sample that just reaches both is taken."""
    scores, probabilities = np.array([1, 0.5, 0.5, 0.49, 2, 9]), np.array([0.95, 0.9, 0.89, 0.95, 0.1, 0.9])
    assert train_classifier.select(scores, probabilities, 0.5, 0.9).tolist() == [True, True, False, False, False, True]


def test_rule_4_3_select__a_low_critic_loss_is_a_high_score():
    """The critic loss of a sample is −f(x): what falls below a loss threshold is what scores above minus it."""
    scores = np.linspace(-3, 3, 50)
    assert np.array_equal(train_classifier.select(scores, np.ones(50), 0.7, 0.9), -scores <= -0.7)


def tell(z):
    """A generator whose cube is everywhere tanh of the third latent entry."""
    return torch.tanh(z[:, 2]).reshape(-1, 1, 1, 1, 1).expand(-1, 1, 6, 6, 6)


def critic(x):
    """A critic whose score is the first voxel, surer of "positive" the brighter it is: ŷ₁ = 1/(1 + e^(−4x))."""
    return x[:, 0, 0, 0, 0], 4 * torch.stack([torch.zeros(len(x)), x[:, 0, 0, 0, 0]], dim=1)


def run_generate(label, wanted, threshold, *words):
    """generate() with `tell` and `critic`: its result, and the latents that it drew, batch by batch."""
    seen = []
    result = train_classifier.generate(lambda z: seen.append(z) or tell(z), critic, label, wanted, threshold,
                                       options(*words), CPU)
    return *result, seen


def accepted_by_hand(latents, label, threshold, probability):
    """The voxel of each latent's cube, and whether it is taken, one by one."""
    voxels = np.tanh(torch.cat(latents)[:, 2].numpy())
    sure = [1 / (1 + np.exp(-4 * v if label else 4 * v)) for v in voxels]
    return voxels, np.array([v >= threshold and p >= probability for v, p in zip(voxels, sure)])


@pytest.mark.parametrize("label, threshold", [(1, 0.2), (1, 0.7), (0, -0.8)])
def test_rule_4_3_generate_score_select__takes_the_first_that_pass_one_by_one(label, threshold):
    """Kept are the first `wanted` samples whose score and probability of the asked class pass, as HU."""
    cubes, _, rate, latents = run_generate(label, 50, threshold)
    voxels, taken = accepted_by_hand(latents, label, threshold, 0.9)
    assert cubes.dtype == np.int16 and cubes.shape == (50, 6, 6, 6)
    assert np.array_equal(cubes[:, 5, 0, 3], np.rint(voxels[taken][:50] * 700 - 300))
    assert rate == taken.mean()


def test_rule_4_3_generate_score_select__stops_at_wanted():
    """No batch is drawn after the one that brought the number wanted."""
    cubes, _, _, latents = run_generate(1, 50, 0.2)
    assert len(cubes) == 50 and accepted_by_hand(latents[:-1], 1, 0.2, 0.9)[1].sum() < 50


def test_rule_4_3_generate_score_select__exactly_wanted_is_enough():
    """Where a batch brings exactly the number wanted, no other is drawn."""
    cubes, rejected, rate, latents = run_generate(1, 64, -1, "--class-probability", "0")
    assert len(cubes) == 64 == sum(map(len, latents)) and len(rejected) == 0 and rate == 1


def test_rule_4_3_generate_score_select__attempts_are_capped():
    """A GAN that delivers nothing is asked --attempts times for each one wanted, and not once more."""
    cubes, _, rate, latents = run_generate(1, 33, 2, "--attempts", "3")
    assert sum(map(len, latents)) == 99 and len(cubes) == 0 and rate == 0


def test_rule_4_3_generate_score_select__delivers_what_it_has_at_the_cap():
    """Where attempts run out, the accepted ones are delivered, fewer than wanted."""
    cubes, _, rate, latents = run_generate(1, 100, 0.9, "--attempts", "2")
    _, taken = accepted_by_hand(latents, 1, 0.9, 0.9)
    assert len(cubes) == taken.sum() < 100 and rate == taken.sum() / 200


@pytest.mark.parametrize("label, hot", [(1, [0, 1]), (0, [1, 0])])
def test_rule_4_3_generate_score_select__the_class_is_in_every_latent(label, hot):
    """Each latent carries the one-hot of the class that is asked for."""
    *_, latents = run_generate(label, 30, -1)
    assert (torch.cat(latents)[:, :2] == torch.tensor(hot)).all()


def test_rule_4_3_generate_score_select__noise_is_standard_normal():
    """Sampling noise is 𝒩(0, 1), as in training (Kolmogorov–Smirnov)."""
    *_, latents = run_generate(1, 30, 2)
    noise = torch.cat(latents)[:, 2:].numpy()
    assert stats.kstest(noise.ravel(), "norm").pvalue > 0.01 and len(np.unique(noise[:, 5])) == len(noise)


def test_rule_4_3_generate_score_select__the_spare_are_the_best_of_the_rejected():
    """Beside the accepted, the best-scored of those that were not are kept, best first."""
    _, spare, _, latents = run_generate(1, 40, 0.5)
    voxels, taken = accepted_by_hand(latents, 1, 0.5, 0.9)
    best = np.sort(voxels[~taken])[::-1][:len(spare)]
    assert len(spare) and np.array_equal(spare[:, 0, 0, 0], np.rint(best * 700 - 300))


def test_score_reals__positives_with_flips_negatives_as_they_are(tmp_path):
    """The reals' scores are over each positive's eight flips, and over each negative once."""
    dataset = small_run(tmp_path)
    for label, cubes in ((1, eight(cubes_of(dataset, "positives", "train"))),
                         (0, cubes_of(dataset, "negatives", "train"))):
        scores = train_classifier.score_reals(critic, dataset, label, CPU)
        assert np.allclose(np.sort(scores), np.sort(cubes[:, 0, 0, 0]), atol=1e-6) and len(scores) == len(cubes)


def test_score_reals__at_most_so_many_over_the_whole_range(tmp_path):
    """Where there are more reals than `most`, `most` of them are scored, the first and the last among them."""
    dataset = small_run(tmp_path)
    every, some = (train_classifier.score_reals(critic, dataset, 1, CPU, most=most) for most in (2048, 5))
    assert len(some) == 5 and set(some) <= set(every) and (some[0], some[-1]) == (every[0], every[-1])


def run_generate_classes(run, monkeypatch, *words):
    """generate_classes on a small run whose GAN is `tell` and `critic`."""
    dataset = small_run(run)
    lungaug.write(run / "gan" / "checkpoint.pt", b"some GAN")
    monkeypatch.setattr(train_classifier, "load_gan", lambda run, dataset, device: (tell, critic))
    return dataset, train_classifier.generate_classes(run, dataset, options(*words), CPU)


def test_generate_classes__the_score_threshold_is_the_median_real(tmp_path, monkeypatch):
    """The threshold of each class is the median of its training reals' critic scores."""
    dataset, classes = run_generate_classes(tmp_path, monkeypatch)
    positives, negatives = eight(cubes_of(dataset, "positives", "train")), cubes_of(dataset, "negatives", "train")
    middle = np.sort(positives[:, 0, 0, 0])[11:13].mean(), np.sort(negatives[:, 0, 0, 0])[2]
    assert np.allclose([classes["positive"]["score_threshold"], classes["negative"]["score_threshold"]], middle,
                       atol=1e-6)


@pytest.mark.parametrize("quantile, pick", [("0", np.min), ("1", np.max)])
def test_generate_classes__quantile_0_and_1_are_the_worst_and_the_best_real(tmp_path, monkeypatch, quantile, pick):
    """--score-quantile 0 asks for the worst real's score, 1 for the best one's."""
    dataset, classes = run_generate_classes(tmp_path, monkeypatch, "--score-quantile", quantile, "--attempts", "1")
    scores = eight(cubes_of(dataset, "positives", "train"))[:, 0, 0, 0]
    assert np.isclose(classes["positive"]["score_threshold"], pick(scores), atol=1e-6)


def test_generate_classes__as_many_as_the_reals_with_flips_of_both_classes(tmp_path, monkeypatch):
    """Wanted of each class: eight times the training nodules; files hold what is reported."""
    _, classes = run_generate_classes(tmp_path, monkeypatch, "--class-probability", "0.5", "--score-quantile", "0")
    for name in ("positive", "negative"):
        made = np.load(tmp_path / "classifiers" / "generated" / f"{name}.npy")
        assert classes[name]["wanted"] == 24 and classes[name]["accepted"] == len(made) <= 24


@pytest.mark.parametrize("probability, delivers", [("0", True), ("1", False)])
def test_generate_classes__says_so_where_the_gan_does_not_deliver(tmp_path, monkeypatch, capsys, probability, delivers):
    """Where fewer are accepted than wanted, and only there, the output says so and names the options."""
    _, classes = run_generate_classes(tmp_path, monkeypatch, "--score-quantile", "0", "--class-probability",
                                      probability)
    assert (classes["positive"]["accepted"] == 24) == delivers
    assert ("lower --score-quantile" not in capsys.readouterr().out) == delivers


def test_generate_classes__a_second_time_they_are_read_back(tmp_path, monkeypatch):
    """The same command generates nothing again and returns the same counts."""
    dataset, classes = run_generate_classes(tmp_path, monkeypatch)
    monkeypatch.setattr(train_classifier, "generate", None)
    assert train_classifier.generate_classes(tmp_path, dataset, options(), CPU) == classes


@pytest.mark.parametrize("word, value", [("--seed", "1"), ("--score-quantile", "0.4"), ("--class-probability", "0.8"),
                                         ("--attempts", "5")])
def test_generate_classes__other_options_are_refused(tmp_path, monkeypatch, word, value):
    """Cubes generated with other options are not passed off as those asked for; the message names the option."""
    dataset, _ = run_generate_classes(tmp_path, monkeypatch)
    with pytest.raises(Refusal, match=word[2:].replace("-", "_")):
        train_classifier.generate_classes(tmp_path, dataset, options(word, value), CPU)


def test_generate_classes__another_gan_is_refused(tmp_path, monkeypatch):
    """Cubes of a GAN that was trained on since are not passed off as the present one's."""
    dataset, _ = run_generate_classes(tmp_path, monkeypatch)
    lungaug.write(tmp_path / "gan" / "checkpoint.pt", b"another")
    with pytest.raises(Refusal, match="gan_crc32"):
        train_classifier.generate_classes(tmp_path, dataset, options(), CPU)


def test_load_gan__gives_the_saved_networks(tmp_path):
    """Generator and critic compute what the saved ones did, and take no gradient."""
    generator, saved, z, dataset = Generator(6, 1), Critic(6, 1), torch.randn(3, 128), small_run(tmp_path)
    lungaug.write(tmp_path / "gan" / "checkpoint.pt", {
        "settings": {"cube": 6, "width": 1, "prepared": lungaug.fingerprint(dataset.info["scans"])},
        "generator": generator.state_dict(), "critic": saved.state_dict()})
    found = train_classifier.load_gan(tmp_path, dataset, CPU)
    assert torch.equal(found[0](z), generator(z)) and torch.equal(found[1](generator(z))[0], saved(generator(z))[0])
    assert not any(weight.requires_grad for network in found for weight in network.parameters())


@pytest.mark.parametrize("settings", [None, {"cube": 7, "width": 1}, {"cube": 12, "width": 1}])
def test_load_gan__what_does_not_fit_is_refused(tmp_path, settings):
    """A checkpoint that is no GAN's, or of another size, is a Refusal that names it."""
    dataset = small_run(tmp_path)
    found = settings and settings | {"prepared": lungaug.fingerprint(dataset.info["scans"])}
    lungaug.write(tmp_path / "gan" / "checkpoint.pt", {"settings": found, "generator": {}})
    with pytest.raises(Refusal, match="gan/checkpoint.pt"):
        train_classifier.load_gan(tmp_path, dataset, CPU)


def test_load_gan__of_other_data_is_refused(tmp_path):
    """A GAN of another preparation has perhaps seen this one's test patients."""
    dataset = small_run(tmp_path)
    lungaug.write(tmp_path / "gan" / "checkpoint.pt", {"settings": {"cube": 6, "width": 1, "prepared": 5}})
    with pytest.raises(Refusal, match="made with prepared 5"):
        train_classifier.load_gan(tmp_path, dataset, CPU)


def test_generate_classes__files_that_are_gone_or_changed_are_made_again(tmp_path, monkeypatch):
    """Generated cubes are there when they read back as they were written."""
    dataset, classes = run_generate_classes(tmp_path, monkeypatch)
    folder = tmp_path / "classifiers" / "generated"
    before = {path.name: path.read_bytes() for path in folder.glob("*.npy")}
    (folder / "positive.npy").unlink()
    (folder / "negative_rejected.npy").write_bytes(b"else")
    assert run_generate_classes(tmp_path, monkeypatch)[1] == classes
    assert {path.name: path.read_bytes() for path in folder.glob("*.npy")} == before


# 4.4, 5.2 Arms and batches

def test_rule_5_2_arms__real_holds_no_generated_sample(tmp_path):
    """Conventional: eight flips of each nodule, and the real negatives; it needs no GAN."""
    dataset = small_run(tmp_path)
    positives, negatives = train_classifier.arm_pools("real", tmp_path, dataset)
    assert as_set(positives.read(np.arange(len(positives)))) == as_set(eight(cubes_of(dataset, "positives", "train")))
    assert as_set(negatives.read(np.arange(len(negatives)))) == as_set(cubes_of(dataset, "negatives", "train"))


def test_rule_5_2_arms__mixed_adds_generated_positives_alone(tmp_path):
    """Mixed: the real positives with flips and the generated ones; the negatives are real."""
    dataset, made = small_run(tmp_path), write_generated(tmp_path)
    positives, negatives = train_classifier.arm_pools("mixed", tmp_path, dataset)
    both = np.concatenate([eight(cubes_of(dataset, "positives", "train")), made["positive"] / 700 + 3 / 7])
    assert len(positives) == 8 * 3 + 5 and as_set(positives.read(np.arange(29))) == as_set(both)
    assert as_set(negatives.read(np.arange(len(negatives)))) == as_set(cubes_of(dataset, "negatives", "train"))


def test_rule_5_2_arms__fake_holds_no_real_sample(tmp_path):
    """Only GAN synthesized data: generated positives and generated negatives, and nothing else."""
    dataset, made = small_run(tmp_path), write_generated(tmp_path)
    for pool, name in zip(train_classifier.arm_pools("fake", tmp_path, dataset), ("positive", "negative")):
        assert as_set(pool.read(np.arange(len(pool)))) == as_set(made[name] / 700 + 3 / 7)


def test_pool__reads_the_numbers_that_are_asked(tmp_path):
    """Real and generated numbers asked in any order give those cubes, each as often as asked."""
    dataset, made = small_run(tmp_path), write_generated(tmp_path)
    pool, _ = train_classifier.arm_pools("mixed", tmp_path, dataset)
    every = np.concatenate([pool.read(np.array([i])) for i in range(29)])
    asked = np.array([28, 3, 24, 0, 26, 7, 3])
    assert pool.read(asked).dtype == np.float32 and as_set(pool.read(asked)) == as_set(every[asked])


@pytest.mark.parametrize("epoch, rate", [(0, 1e-3), (29, 1e-3), (30, 1e-4), (59, 1e-4)])
def test_rule_4_4_decay__falls_at_epoch_30(epoch, rate):
    """The epochs 0 to 29 have the early rate, 30 to 59 the late one."""
    assert train_classifier.learning_rate(epoch, 1e-3, 1e-4, 30) == rate


@pytest.mark.parametrize("epochs, rate", [(2, 5e-3), (3, 7e-4)])
def test_rule_4_4_decay__reaches_the_optimizer(tmp_path, epochs, rate):
    """After --decay-epoch epochs at the early rate the optimizer steps with the late one."""
    small_run(tmp_path)
    state = train(tmp_path, "real", "--epochs", str(epochs), "--decay-epoch", "2", "--learning-rate", "5e-3",
                  "--late-learning-rate", "7e-4")
    assert state["optimizer"]["param_groups"][0]["lr"] == rate


def test_rule_4_4_balanced__each_positive_once_an_epoch():
    """An epoch passes over every positive exactly once, in an order of its own."""
    rng = lungaug.stream(0)
    one, two = (np.concatenate([part for part, _ in train_classifier.balanced_batches(70, 9, 64, rng)])
                for _ in range(2))
    assert sorted(one) == sorted(two) == list(range(70)) and one.tolist() != two.tolist()


def test_rule_4_4_balanced__half_and_half_and_the_last_batch_is_kept():
    """Batches of 64 hold 32 + 32; the last, short one is kept, and balanced too."""
    sizes = [(len(some), len(others))
             for some, others in train_classifier.balanced_batches(70, 9, 64, lungaug.stream(0))]
    assert sizes == [(32, 32), (32, 32), (6, 6)]


def test_rule_4_4_balanced__negatives_come_from_all_of_them():
    """However few the positives, every negative can be drawn, the last one too."""
    drawn = [others for _ in range(30) for _, others in train_classifier.balanced_batches(6, 9, 4, lungaug.stream(_))]
    assert set(np.concatenate(drawn).tolist()) == set(range(9))


def test_rule_4_4_balanced__the_labels_of_each_step(tmp_path, monkeypatch):
    """In each step of training half of the labels are 1, and those are the positives' cubes."""
    dataset, seen = small_run(tmp_path), []
    positives = as_set(eight(cubes_of(dataset, "positives", "train")))

    def spy(self, x):
        seen.append(x.detach())
        return forward(self, x)

    def check_labels(logits, labels):
        if logits.requires_grad:
            assert 2 * labels.sum() == len(labels)
            assert all(cube in positives for cube in as_set(seen[-1][labels == 1].numpy()))
            assert not any(cube in positives for cube in as_set(seen[-1][labels == 0].numpy()))
            sizes.append(len(labels))
        return loss(logits, labels)

    sizes, forward, loss = [], train_classifier.Classifier.forward, train_classifier.classifier_loss
    monkeypatch.setattr(train_classifier.Classifier, "forward", spy)
    monkeypatch.setattr(train_classifier, "classifier_loss", check_labels)
    train(tmp_path, "real", "--epochs", "1", "--batch-size", "20")
    assert sizes == [20, 20, 8]


# Validation, and the best epoch

def test_eq_5_2_f1__the_classifiers_own_is_that_of_the_tables():
    """The F1 that chooses the epoch is the one that section 5.2 reports; 0 where that is 0/0."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        labels, predictions = rng.integers(0, 2, (2, rng.integers(1, 8)))
        reported = evaluate.f1(evaluate.confusion_matrix(labels, predictions))
        found = train_classifier.f1_score(labels, predictions)
        assert found == pytest.approx(0 if np.isnan(reported) else reported, abs=1e-15)


class Bright(torch.nn.Module):
    """A classifier that is the surer of "positive" the brighter the first voxel is."""

    def forward(self, x):
        return critic(x)[1]


def test_validate__f1_and_loss_by_hand(tmp_path):
    """F1 over the eight flips of each validation nodule and the negatives; cross-entropy, each class weighing half."""
    dataset = small_run(tmp_path, nodules=(1, 2, 1))
    positive, negative = (cubes[:, 0, 0, 0] for cubes in (eight(cubes_of(dataset, "positives", "validation")),
                                                        cubes_of(dataset, "negatives", "validation")))
    f1, loss = train_classifier.validate(Bright(), dataset, CPU)
    tp, fp = (positive > 0).sum(), (negative > 0).sum()
    assert 0 < fp and f1 == pytest.approx(2 * tp / (len(positive) + tp + fp), abs=1e-12)
    assert loss == pytest.approx((np.log1p(np.exp(-4 * positive)).mean() + np.log1p(np.exp(4 * negative)).mean()) / 2,
                                 rel=1e-5)


def test_validate__without_positives_it_is_the_negatives_loss(tmp_path):
    """A validation set without nodules gives F1 0 and a finite loss, of the negatives alone."""
    dataset = small_run(tmp_path, nodules=(1, 0, 1))
    f1, loss = train_classifier.validate(Bright(), dataset, CPU)
    negative = cubes_of(dataset, "negatives", "validation")[:, 0, 0, 0]
    assert f1 == 0 and loss == pytest.approx(np.log1p(np.exp(4 * negative)).mean(), rel=1e-5)


@pytest.mark.parametrize("results, best", [
    ([(0.5, 1.0), (0.7, 2.0), (0.6, 0.1)], 2),      # the highest F1, whatever the loss
    ([(0.5, 1.0), (0.7, 2.0), (0.7, 1.9)], 3),      # a tie: the lower loss
    ([(0.5, 1.0), (0.7, 1.9), (0.7, 2.0)], 2),
    ([(0.7, 1.0), (0.7, 1.0), (0.7, 1.0)], 1),      # a full tie: the earlier
    ([(0.0, 3.0), (0.0, 2.0), (0.0, 4.0)], 2),      # no positive found in any epoch
])
def test_rule_5_2_best_kept__highest_f1_then_lowest_loss_then_first(tmp_path, monkeypatch, results, best):
    """The epoch of the best validation F1 is kept, ties by the lower loss, then the earlier; with its weights."""
    small_run(tmp_path)
    weights = []

    def validate(classifier, dataset, device):
        weights.append({key: value.clone() for key, value in classifier.state_dict().items()})
        return results[len(weights) - 1]

    monkeypatch.setattr(train_classifier, "validate", validate)
    kept = train(tmp_path, "real", "--epochs", "3")["best"]
    assert (kept["epoch"], kept["f1"], kept["loss"]) == (best, *results[best - 1])
    assert all(torch.equal(kept["classifier"][key], weights[best - 1][key]) for key in weights[0])
    assert not all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_train_arm__a_loss_that_is_no_number_is_refused(tmp_path, monkeypatch):
    """NaN stops the training in one line, and no checkpoint of it is left."""
    small_run(tmp_path)
    monkeypatch.setattr(train_classifier, "validate", lambda *_: (0.0, float("nan")))
    with pytest.raises(Refusal, match="no number in epoch 1"):
        train(tmp_path)
    assert not (tmp_path / "classifiers" / "real" / "checkpoint.pt").exists()


def same(one, other):
    """Whether two states are equal to the last bit, in every tensor, number and text."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if torch.is_tensor(one) else one == other


@pytest.mark.parametrize("steady", [False, True])
@pytest.mark.parametrize("function, call", [("write", 3), ("write", 4), ("append_log", 3)])
def test_train_arm__stopped_and_resumed_it_ends_with_the_same_bytes(tmp_path, monkeypatch, function, call, steady):
    """A training stopped before, or between, log and checkpoint ends with the files of one that was not.

    Where no epoch is better than the first, its weights are those of the checkpoint that was read.
    """
    if steady:
        monkeypatch.setattr(train_classifier, "validate", lambda *_: (0.5, 1.0))
    for name in ("whole", "stopped"):
        small_run(tmp_path / name)
        write_generated(tmp_path / name)
    whole = train(tmp_path / "whole", "mixed", "--epochs", "4", "--decay-epoch", "2")
    calls, original = [], getattr(lungaug, function)

    def stop(*arguments):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        original(*arguments)

    monkeypatch.setattr(lungaug, function, stop)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "stopped", "mixed", "--epochs", "4", "--decay-epoch", "2")
    monkeypatch.setattr(lungaug, function, original)
    assert same(train(tmp_path / "stopped", "mixed", "--epochs", "4", "--decay-epoch", "2"), whole)
    folders = [tmp_path / name / "classifiers" / "mixed" for name in ("whole", "stopped")]
    logs, states = ([(folder / name).read_bytes() for folder in folders] for name in ("log.jsonl", "checkpoint.pt"))
    assert logs[0] == logs[1] and states[0] == states[1]
    assert [json.loads(line)["epoch"] for line in logs[0].splitlines()] == [1, 2, 3, 4]


def test_train_arm__the_log_holds_the_mean_loss_of_the_epochs_batches(tmp_path, monkeypatch):
    """train_loss is the mean over an epoch's batches; validation_f1 and _loss are those of the epoch's validation."""
    small_run(tmp_path)
    losses, loss = [], train_classifier.classifier_loss
    monkeypatch.setattr(train_classifier, "classifier_loss", lambda *words: losses.append(loss(*words)) or losses[-1])
    monkeypatch.setattr(train_classifier, "validate", lambda *_: (0.25, 0.75))
    train(tmp_path, "real", "--epochs", "2")
    rows = [json.loads(line) for line in (tmp_path / "classifiers" / "real" / "log.jsonl").read_text().splitlines()]
    batches = np.array([value.item() for value in losses]).reshape(2, 6)
    assert np.allclose([row["train_loss"] for row in rows], batches.mean(1), rtol=1e-6)
    assert [(row["validation_f1"], row["validation_loss"]) for row in rows] == [(0.25, 0.75)] * 2


def test_train_arm__the_arms_start_from_the_same_weights(tmp_path, monkeypatch):
    """The arms differ in their data alone: before the first step all have the same weights."""
    small_run(tmp_path), write_generated(tmp_path)
    starts = []
    monkeypatch.setattr(torch.optim, "Adam", lambda parameters, *_: starts.append([p.clone() for p in parameters])
                        or 1 / 0)
    for arm in train_classifier.ARMS:
        with pytest.raises(ZeroDivisionError):
            train(tmp_path, arm)
    assert len(starts) == 3 and same(starts[0], starts[1]) and same(starts[0], starts[2])


@pytest.mark.parametrize("word, value", [("--seed", "1"), ("--batch-size", "10"), ("--learning-rate", "0.1"),
                                         ("--late-learning-rate", "0.1"), ("--decay-epoch", "9")])
def test_train_arm__other_options_than_the_checkpoints_are_refused(tmp_path, word, value):
    """A checkpoint made with other options is not gone on with; the message names the option."""
    small_run(tmp_path)
    train(tmp_path, "real", "--epochs", "1")
    with pytest.raises(Refusal, match=word[2:].replace("-", "_")):
        train(tmp_path, "real", "--epochs", "2", word, value)


def test_train_arm__other_generated_samples_than_the_checkpoints_are_refused(tmp_path):
    """A classifier trained on other generated samples is not gone on with."""
    small_run(tmp_path), write_generated(tmp_path)
    train(tmp_path, "mixed", "--epochs", "1", delivered={"positive": {"accepted": 5}})
    with pytest.raises(Refusal, match="delivered"):
        train(tmp_path, "mixed", "--epochs", "2", delivered={"positive": {"accepted": 6}})


def test_train_arm__other_prepared_data_than_the_checkpoints_are_refused(tmp_path):
    """A finished classifier is not passed off as trained on scans that were prepared since."""
    small_run(tmp_path)
    train(tmp_path, "real", "--epochs", "1")
    shutil.rmtree(tmp_path / "prepared")
    small_run(tmp_path, nodules=(4, 2, 2))
    with pytest.raises(Refusal):
        train(tmp_path, "real", "--epochs", "1")


def test_train_arm__an_arm_left_out_leaves_no_older_classifier(tmp_path):
    """Where a GAN trained again delivers nothing, the arm left out is not evaluated from an older checkpoint."""
    small_run(tmp_path), write_generated(tmp_path)
    train(tmp_path, "mixed", "--epochs", "1")
    shutil.rmtree(tmp_path / "classifiers" / "generated")
    preprocessing.open_array.cache_clear()
    write_generated(tmp_path, positives=0)
    train_classifier.train_arm("mixed", tmp_path, preprocessing.open_dataset(tmp_path), options("--overwrite"), None,
                               CPU)
    assert not (tmp_path / "classifiers" / "mixed" / "checkpoint.pt").exists()


def test_draw_samples__a_row_a_kind_and_black_where_there_are_too_few(tmp_path, monkeypatch):
    """Rows of middle slices: real positives, generated ones, real negatives, generated ones; nothing made up."""
    dataset, sheets = small_run(tmp_path), []
    made = write_generated(tmp_path, positives=3, negatives=20)
    monkeypatch.setattr(lungaug, "tile", lambda images, columns: sheets.append((np.asarray(images), columns))
                        or np.zeros((1, 1), np.uint8))
    train_classifier.draw_samples(tmp_path / "classifiers", dataset)
    (images, columns), = sheets
    rows = images.reshape(4, 16, 6, 6)
    assert columns == 16
    real = [lungaug.grey(cubes_of(dataset, kind, "train")[:, 3]) for kind in ("positives", "negatives")]
    assert all(np.array_equal(row[[0, -1]], middles[[0, -1]]) for row, middles in zip(rows[::2], real))
    assert np.array_equal(rows[1, :3], lungaug.grey(made["positive"][:, 3] / 700 + 3 / 7)) and not rows[1, 6:].any()
    assert np.array_equal(rows[3], lungaug.grey(made["negative"][:16, 3] / 700 + 3 / 7))


def test_figure_8__no_chart_of_an_arm_that_was_left_out(tmp_path):
    """Where an arm is left out, figure 8 does not show the losses of the classifier that it had before."""
    small_run(tmp_path), write_generated(tmp_path)
    train(tmp_path, "mixed", "--epochs", "1")
    write_generated(tmp_path, positives=0)
    preprocessing.open_array.cache_clear()
    for arm in ("real", "mixed"):
        train_classifier.train_arm(arm, tmp_path, preprocessing.open_dataset(tmp_path),
                                   options("--overwrite", "--epochs", "1"), None, CPU)
    evaluate.draw_curves(tmp_path, tmp_path)
    figure = (tmp_path / "figure_8.svg").read_text()
    assert "real data" in figure and "mixed data" not in figure


def test_figure_8__a_chart_an_arm_with_both_losses(tmp_path):
    """Figure 8 has a chart for each arm that was trained, each with a training and a validation curve."""
    small_run(tmp_path), write_generated(tmp_path)
    for arm in ("real", "fake"):
        train(tmp_path, arm, "--epochs", "2")
    evaluate.draw_curves(tmp_path, tmp_path)
    figure = (tmp_path / "figure_8.svg").read_text()
    assert figure.count("<polyline") == 4 and figure.count(">validation<") == figure.count(">train<") == 2
