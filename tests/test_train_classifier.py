"""Sections 4.2, 4.3 and 4.4: flips, generate–score–select, arms, batches, the best epoch, resuming.

    python -m pytest tests/test_train_classifier.py -v

A run's prepared data are noise here, one scan per split; generator and critic are functions whose
answer is known.
"""

import itertools
import shutil
from pathlib import Path

import lungaug
from lungaug import Refusal

import numpy as np
import pytest
import torch
from scipy import stats

import evaluate
import preprocessing
import train_classifier
from helpers import CPU, as_set, cubes_of, eight, same_state, scaled, small_run, write_generated
from models import Critic, Generator


def options(*words):
    """The options of train_classifier, those of the thesis where not typed."""
    typed = lungaug.parse("", "train_classifier", words=words)
    return lungaug.apply_preset(typed, "train_classifier", "thesis")


def train(run, arm="real", *words, classes=None):
    """Train one arm on the small run. Returns its checkpoint, or None where the arm is skipped."""
    training = open_training(run, arm, *words, classes=classes)
    if training is None:
        return None
    train_classifier.train_all([training], run, CPU)
    return lungaug.load_checkpoint(training.folder / "checkpoint.pt", "")


def open_training(run, arm="real", *words, classes=None, repeat=1):
    """The Training of an arm on the small run, in batches of 8; None where the arm is skipped."""
    dataset = preprocessing.open_dataset(run)
    typed = options("--batch-size", "8", *words)
    return train_classifier.open_training(arm, run, dataset, typed, classes, CPU, repeat)


def preset(name):
    """The thesis' value of a classifier option."""
    rows = lungaug.options_of("train_classifier")
    return next(option.thesis for option in rows if option.name == name)


# The numbers of 4.4.1


def test_num_4_4_batch_size__is_64():
    """Batch size 64, of 32 positive and 32 negative samples."""
    size = preset("--batch-size")
    batches = train_classifier.balanced_batches(1000, 1000, size, lungaug.stream(0))
    positives, negatives = next(batches)
    assert size == 64
    assert len(positives) == len(negatives) == 32


def test_num_4_4_learning_rate__is_a_thousandth_then_a_tenth_of_it():
    """Initial learning rate 10⁻³, decayed to 10⁻⁴."""
    assert preset("--learning-rate") == 1e-3
    assert preset("--late-learning-rate") == 1e-4


def test_num_4_4_epochs__are_60_and_the_rate_falls_at_30():
    """60 epochs in total; at epoch 30 the learning rate is decayed."""
    assert preset("--epochs") == 60
    assert preset("--decay-epoch") == 30


def test_num_4_4_adam__reaches_the_optimizer(tmp_path):
    """β₁ = 0.9, β₂ = 0.999, as the optimizer of a trained arm has them."""
    small_run(tmp_path)
    state = train(tmp_path, "real", "--epochs", "1")
    group, = state["optimizer"]["param_groups"]
    assert train_classifier.BETAS == tuple(group["betas"]) == (0.9, 0.999)


# 4.2 Conventional augmentation


def test_rule_4_2_flips__the_positives_are_the_eight_flips_and_no_noise(tmp_path):
    """The real positives trained on are each nodule's eight flips, to the voxel, each once."""
    dataset = small_run(tmp_path)
    rows, flips = train_classifier.conventional_positives(dataset, "train")
    cubes = preprocessing.read_cubes(dataset, rows, flips)[:, 0]
    assert len(cubes) == 24
    assert as_set(cubes) == as_set(eight(cubes_of(dataset, "positives", "train")))


def test_rule_4_2_flips__negatives_are_not_flipped(tmp_path):
    """Flips are for the scarce positives; a negative is trained on as it is."""
    dataset = small_run(tmp_path)
    _, negatives = train_classifier.arm_pools("real", tmp_path, dataset)
    assert as_set(negatives.read(np.arange(5))) == as_set(cubes_of(dataset, "negatives", "train"))


# 4.3 Generative augmentation


def test_rule_4_3_select__rows_by_hand_both_edges_belong():
    """Both thresholds must be reached; a sample that just reaches both is taken."""
    scores = np.array([1, 0.5, 0.5, 0.49, 2, 9])
    probabilities = np.array([0.95, 0.9, 0.89, 0.95, 0.1, 0.9])
    passes = train_classifier.select(scores, probabilities, 0.5, 0.9)
    assert passes.tolist() == [True, True, False, False, False, True]


def test_rule_4_3_select__a_low_critic_loss_is_a_high_score():
    """The critic loss of a sample is −f(x): a loss below −0.7 is a score above 0.7."""
    scores = np.linspace(-3, 3, 50)
    passes = train_classifier.select(scores, np.ones(50), 0.7, 0.9)
    assert np.array_equal(passes, -scores <= -0.7)


def uniform(z):
    """A generator whose cube is everywhere tanh of the third latent entry."""
    return torch.tanh(z[:, 2]).reshape(-1, 1, 1, 1, 1).expand(-1, 1, 6, 6, 6)


def critic(x):
    """A critic whose score is the first voxel v, and ŷ₁ = 1/(1 + e^(−4v)): bright is positive."""
    voxel = x[:, 0, 0, 0, 0]
    logits = torch.stack([torch.zeros_like(voxel), 4 * voxel], dim=1)
    return voxel, logits


def run_generate(label, requested, threshold, *words):
    """generate() with `uniform` and `critic`: what it returns, and the latents of each batch."""
    latents = []

    def generator(z):
        latents.append(z)
        return uniform(z)

    generated = train_classifier.generate(
        generator, critic, label, requested, threshold, options(*words), CPU)
    return generated, latents


def select_by_hand(latents, label, threshold, probability=0.9):
    """The voxel of each latent's cube, and whether the cube passes: two arrays (n,)."""
    voxels = np.tanh(torch.cat(latents)[:, 2].numpy())
    sign = 1 if label == 1 else -1
    probabilities = 1 / (1 + np.exp(-4 * sign * voxels))
    return voxels, (voxels >= threshold) & (probabilities >= probability)


@pytest.mark.parametrize("label, threshold", [(1, 0.2), (1, 0.7), (0, -0.8)])
def test_rule_4_3_generate_score_select__takes_the_first_that_pass(label, threshold):
    """Kept, as HU, are the first cubes whose score and probability of the requested class pass."""
    generated, latents = run_generate(label, 50, threshold)
    voxels, passes = select_by_hand(latents, label, threshold)
    cubes = generated.accepted
    assert cubes.dtype == np.int16 and cubes.shape == (50, 6, 6, 6)
    assert np.array_equal(cubes[:, 5, 0, 3], np.rint(voxels[passes][:50] * 700 - 300))
    assert generated.rate == passes.mean()


def test_rule_4_3_generate_score_select__stops_at_the_requested_number():
    """No batch is drawn after the one that brought the requested number."""
    generated, latents = run_generate(1, 50, 0.2)
    _, passes = select_by_hand(latents[:-1], 1, 0.2)
    assert len(generated.accepted) == 50
    assert passes.sum() < 50


def test_rule_4_3_generate_score_select__exactly_the_requested_number_is_enough():
    """Where a batch brings exactly the requested number, no second one is drawn."""
    generated, latents = run_generate(1, 64, -1, "--class-probability", "0")
    assert len(torch.cat(latents)) == 64
    assert len(generated.accepted) == 64
    assert len(generated.rejected) == 0
    assert generated.rate == 1


def test_rule_4_3_generate_score_select__attempts_are_capped():
    """Of a GAN of which nothing passes, exactly --attempts cubes per requested one are drawn."""
    generated, latents = run_generate(1, 33, 2, "--attempts", "3")
    assert len(torch.cat(latents)) == 99
    assert len(generated.accepted) == 0
    assert generated.rate == 0


def test_rule_4_3_generate_score_select__returns_what_passed_at_the_cap():
    """Where attempts run out, the accepted cubes are returned, fewer than requested."""
    generated, latents = run_generate(1, 100, 0.9, "--attempts", "2")
    _, passes = select_by_hand(latents, 1, 0.9)
    assert len(generated.accepted) == passes.sum() < 100
    assert generated.rate == passes.sum() / 200


@pytest.mark.parametrize("label, one_hot", [(1, [0, 1]), (0, [1, 0])])
def test_rule_4_3_generate_score_select__the_class_is_in_every_latent(label, one_hot):
    """Each latent carries the one-hot of the requested class."""
    _, latents = run_generate(label, 30, -1)
    assert (torch.cat(latents)[:, :2] == torch.tensor(one_hot)).all()


def test_rule_4_3_generate_score_select__noise_is_standard_normal():
    """The noise of generation is 𝒩(0, 1), as in training (Kolmogorov–Smirnov)."""
    _, latents = run_generate(1, 30, 2)
    noise = torch.cat(latents)[:, 2:].numpy()
    assert stats.kstest(noise.ravel(), "norm").pvalue > 0.01
    assert len(np.unique(noise[:, 5])) == len(noise)


def test_rule_4_3_generate_score_select__the_best_of_the_rejected_are_kept():
    """Beside the accepted, the best-scored of the rejected are kept, best first."""
    generated, latents = run_generate(1, 40, 0.5)
    voxels, passes = select_by_hand(latents, 1, 0.5)
    best = np.sort(voxels[~passes])[::-1][:train_classifier.REJECTED]
    assert len(best) == train_classifier.REJECTED
    assert np.array_equal(generated.rejected[:, 0, 0, 0], np.rint(best * 700 - 300))


def test_rule_4_3_select__the_real_scores_are_of_training_cubes(tmp_path):
    """The quantile is of the scores of each training positive's eight flips, and of each training negative once."""
    dataset = small_run(tmp_path)
    positives = eight(cubes_of(dataset, "positives", "train"))
    negatives = cubes_of(dataset, "negatives", "train")
    for label, cubes in ((1, positives), (0, negatives)):
        scores = train_classifier.score_reals(critic, dataset, label, CPU)
        assert len(scores) == len(cubes)
        assert np.allclose(np.sort(scores), np.sort(cubes[:, 0, 0, 0]), atol=1e-6)


def test_score_reals__at_most_so_many_over_the_whole_range(tmp_path):
    """Of more reals than `most`, `most` are scored, the first and the last among them."""
    dataset = small_run(tmp_path)
    scores = train_classifier.score_reals(critic, dataset, 1, CPU)
    five = train_classifier.score_reals(critic, dataset, 1, CPU, most=5)
    assert len(five) == 5 and set(five) <= set(scores)
    assert five[0] == scores[0] and five[-1] == scores[-1]


def run_generate_classes(run, monkeypatch, *words):
    """generate_classes on a small run whose GAN is `uniform` and `critic`: dataset and classes."""
    dataset = small_run(run)
    lungaug.write(run / "gan" / "checkpoint.pt", b"some GAN")
    monkeypatch.setattr(train_classifier, "load_gan", lambda *_: (uniform, critic))
    return dataset, train_classifier.generate_classes(run, dataset, options(*words), CPU)


def test_generate_classes__the_score_threshold_is_the_median_real(tmp_path, monkeypatch):
    """The threshold of each class is the median of its training reals' critic scores."""
    dataset, classes = run_generate_classes(tmp_path, monkeypatch)
    positives = eight(cubes_of(dataset, "positives", "train"))
    negatives = cubes_of(dataset, "negatives", "train")
    for name, cubes in (("positive", positives), ("negative", negatives)):
        median = np.median(cubes[:, 0, 0, 0])
        assert classes[name]["score_threshold"] == pytest.approx(median, abs=1e-6)


@pytest.mark.parametrize("quantile, extreme", [("0", np.min), ("1", np.max)])
def test_generate_classes__quantile_0_and_1_are_the_lowest_and_the_highest_score(
        tmp_path, monkeypatch, quantile, extreme):
    """--score-quantile 0 is the lowest score of a real cube, 1 the highest."""
    dataset, classes = run_generate_classes(
        tmp_path, monkeypatch, "--score-quantile", quantile, "--attempts", "1")
    scores = eight(cubes_of(dataset, "positives", "train"))[:, 0, 0, 0]
    assert classes["positive"]["score_threshold"] == pytest.approx(extreme(scores), abs=1e-6)


def test_generate_classes__as_many_as_the_reals_with_flips_of_both_classes(tmp_path, monkeypatch):
    """Requested of each class: eight times the training nodules. The files hold what is said."""
    _, classes = run_generate_classes(
        tmp_path, monkeypatch, "--class-probability", "0.5", "--score-quantile", "0")
    for name in ("positive", "negative"):
        cubes = np.load(tmp_path / "classifiers" / "generated" / f"{name}.npy")
        assert classes[name]["requested"] == 24
        assert classes[name]["accepted"] == len(cubes) <= 24


@pytest.mark.parametrize("generated, requested", [("0.5", 12), ("2", 48), ("0.01", 1)])
def test_generate_classes__as_many_per_real_one_as_asked_for(
        tmp_path, monkeypatch, generated, requested):
    """--generated 0.5: one for every two of the 24 flips of real positives; at least one."""
    _, classes = run_generate_classes(tmp_path, monkeypatch, "--generated", generated)
    assert classes["positive"]["requested"] == classes["negative"]["requested"] == requested


@pytest.mark.parametrize("quantile, probability, enough", [
    ("0", "0", True), ("0", "1", False), ("0.1", "1", False)])
def test_generate_classes__says_so_where_too_few_pass(
        tmp_path, monkeypatch, capsys, quantile, probability, enough):
    """Where fewer are accepted than requested, and only there, the output names the options.

    It does not ask for what cannot be done: a lower quantile than 0.
    """
    _, classes = run_generate_classes(
        tmp_path, monkeypatch, "--score-quantile", quantile, "--class-probability", probability)
    out = capsys.readouterr().out
    assert (classes["positive"]["accepted"] == 24) == enough
    assert ("lower" not in out and "Too few" not in out) == enough
    assert ("--score-quantile" in out) == (not enough and quantile != "0")


def test_generate_classes__a_second_time_they_are_read_back(tmp_path, monkeypatch):
    """The same command generates nothing again and returns the same counts."""
    dataset, classes = run_generate_classes(tmp_path, monkeypatch)
    monkeypatch.setattr(train_classifier, "generate", None)
    assert train_classifier.generate_classes(tmp_path, dataset, options(), CPU) == classes


@pytest.mark.parametrize("word, value", [
    ("--seed", "1"), ("--score-quantile", "0.4"), ("--class-probability", "0.8"),
    ("--attempts", "5")])
def test_generate_classes__other_options_are_refused(tmp_path, monkeypatch, word, value):
    """Cubes generated with other options are refused; the message names the option."""
    dataset, _ = run_generate_classes(tmp_path, monkeypatch)
    with pytest.raises(Refusal, match=word[2:].replace("-", "_")):
        train_classifier.generate_classes(tmp_path, dataset, options(word, value), CPU)


def test_generate_classes__another_gan_is_refused(tmp_path, monkeypatch):
    """Cubes of an earlier GAN are refused."""
    dataset, _ = run_generate_classes(tmp_path, monkeypatch)
    lungaug.write(tmp_path / "gan" / "checkpoint.pt", b"another")
    with pytest.raises(Refusal, match="gan_crc32"):
        train_classifier.generate_classes(tmp_path, dataset, options(), CPU)


def test_generate_classes__missing_or_changed_files_are_generated_again(tmp_path, monkeypatch):
    """Generated cubes are used again only where every file is as it was written."""
    _, classes = run_generate_classes(tmp_path, monkeypatch)
    folder = tmp_path / "classifiers" / "generated"
    before = {path.name: path.read_bytes() for path in folder.glob("*.npy")}
    (folder / "positive.npy").unlink()
    (folder / "negative_rejected.npy").write_bytes(b"changed")

    _, classes_again = run_generate_classes(tmp_path, monkeypatch)
    assert classes_again == classes
    assert {path.name: path.read_bytes() for path in folder.glob("*.npy")} == before


def test_generate_classes__cubes_that_do_not_fit_in_memory_have_a_remedy(tmp_path, monkeypatch):
    """Whether they are as they were is seen by reading them whole: where that fails, the line ends in what to do."""
    dataset, _ = run_generate_classes(tmp_path, monkeypatch)
    read_bytes = Path.read_bytes

    def fail(path):
        if path.suffix == ".npy":
            raise MemoryError
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(Refusal, match="positive.npy: out of memory .* — free memory, or run the same command again"):
        train_classifier.generate_classes(tmp_path, dataset, options(), CPU)


@pytest.mark.parametrize("name, field, value", [
    (None, None, []), ("negative", None, None), ("positive", "rate", None),
    ("positive", "accepted", "5"), ("negative", "requested", [1]),
    ("positive", "score_threshold", {})])
def test_generate_classes__a_damaged_record_is_one_line(
        tmp_path, monkeypatch, name, field, value):
    """A record of other JSON, or that lacks a number, is a Refusal that names it."""
    dataset, _ = run_generate_classes(tmp_path, monkeypatch)
    path = tmp_path / "classifiers" / "generated" / "generated.json"
    record = lungaug.read_json(path, "")
    if name is None:
        record["classes"] = value
    elif field is None:
        record["classes"][name] = value
    else:
        record["classes"][name][field] = value
    lungaug.write(path, record)
    with pytest.raises(Refusal, match="generated.json: .* — .*--overwrite"):
        train_classifier.generate_classes(tmp_path, dataset, options(), CPU)


def test_load_gan__gives_the_saved_networks(tmp_path):
    """Generator and critic compute what the saved ones did, and take no gradient."""
    dataset = small_run(tmp_path)
    saved_generator = Generator(6, 1)
    saved_critic = Critic(6, 1)
    lungaug.write(tmp_path / "gan" / "checkpoint.pt", {
        "settings": {"cube": 6, "width": 1, "prepared": dataset.fingerprint},
        "generator": saved_generator.state_dict(), "critic": saved_critic.state_dict()})

    generator, critic = train_classifier.load_gan(tmp_path, dataset, CPU)
    z = torch.randn(3, 128)
    cubes = saved_generator(z)
    assert torch.equal(generator(z), cubes)
    assert torch.equal(critic(cubes)[0], saved_critic(cubes)[0])
    for network in (generator, critic):
        assert not any(weight.requires_grad for weight in network.parameters())


@pytest.mark.parametrize("size", [None, {"cube": 7, "width": 1}, {"cube": 12, "width": 1}])
def test_load_gan__what_does_not_fit_is_refused(tmp_path, size):
    """A checkpoint that is no GAN's, or of another size, is a Refusal that names it."""
    dataset = small_run(tmp_path)
    settings = None if size is None else size | {"prepared": dataset.fingerprint}
    lungaug.write(tmp_path / "gan" / "checkpoint.pt", {"settings": settings, "generator": {}})
    with pytest.raises(Refusal, match="gan/checkpoint.pt"):
        train_classifier.load_gan(tmp_path, dataset, CPU)


def test_load_gan__of_other_data_is_refused(tmp_path):
    """A GAN trained on another preparation may have seen this one's test patients."""
    dataset = small_run(tmp_path)
    settings = {"cube": 6, "width": 1, "prepared": 5}
    lungaug.write(tmp_path / "gan" / "checkpoint.pt", {"settings": settings})
    with pytest.raises(Refusal, match=f"made with prepared 5, .* — run python train_gan.py --run {tmp_path} --overwr"):
        train_classifier.load_gan(tmp_path, dataset, CPU)


# 4.4, 5.2 Arms and batches


def whole(pool):
    """All cubes of a pool, as a set."""
    return as_set(pool.read(np.arange(len(pool))))


def test_rule_5_2_arms__real_holds_no_generated_sample(tmp_path):
    """Conventional: eight flips of each nodule, and the real negatives; it needs no GAN."""
    dataset = small_run(tmp_path)
    positives, negatives = train_classifier.arm_pools("real", tmp_path, dataset)
    assert whole(positives) == as_set(eight(cubes_of(dataset, "positives", "train")))
    assert whole(negatives) == as_set(cubes_of(dataset, "negatives", "train"))


def test_rule_5_2_arms__mixed_adds_generated_positives_alone(tmp_path):
    """Mixed: the real positives with flips and the generated ones; the negatives are real."""
    dataset = small_run(tmp_path)
    generated = write_generated(tmp_path)
    positives, negatives = train_classifier.arm_pools("mixed", tmp_path, dataset)
    flips = eight(cubes_of(dataset, "positives", "train"))
    expected = np.concatenate([flips, scaled(generated["positive"])])
    assert len(positives) == 8 * 3 + 5
    assert whole(positives) == as_set(expected)
    assert whole(negatives) == as_set(cubes_of(dataset, "negatives", "train"))


def test_rule_5_2_arms__fake_holds_no_real_sample(tmp_path):
    """Only GAN synthesized data: generated positives and generated negatives, nothing else."""
    dataset = small_run(tmp_path)
    generated = write_generated(tmp_path)
    positives, negatives = train_classifier.arm_pools("fake", tmp_path, dataset)
    assert whole(positives) == as_set(scaled(generated["positive"]))
    assert whole(negatives) == as_set(scaled(generated["negative"]))


def test_pool__reads_the_requested_numbers(tmp_path):
    """Real and generated numbers, in any order, give those cubes, each as often as requested."""
    dataset = small_run(tmp_path)
    write_generated(tmp_path)
    pool, _ = train_classifier.arm_pools("mixed", tmp_path, dataset)
    cubes = np.concatenate([pool.read(np.array([number])) for number in range(29)])
    numbers = np.array([28, 3, 24, 0, 26, 7, 3])
    assert pool.read(numbers).dtype == np.float32
    assert as_set(pool.read(numbers)) == as_set(cubes[numbers])


@pytest.mark.parametrize("epoch, rate", [(0, 1e-3), (29, 1e-3), (30, 1e-4), (59, 1e-4)])
def test_rule_4_4_decay__falls_at_epoch_30(epoch, rate):
    """The epochs 0 to 29 have the early rate, 30 to 59 the late one."""
    assert train_classifier.learning_rate(epoch, 1e-3, 1e-4, 30) == rate


@pytest.mark.parametrize("epochs, rate", [(2, 5e-3), (3, 7e-4)])
def test_rule_4_4_decay__reaches_the_optimizer(tmp_path, epochs, rate):
    """After --decay-epoch epochs at the early rate the optimizer steps with the late one."""
    small_run(tmp_path)
    state = train(tmp_path, "real", "--epochs", str(epochs), "--decay-epoch", "2",
                  "--learning-rate", "5e-3", "--late-learning-rate", "7e-4")
    assert state["optimizer"]["param_groups"][0]["lr"] == rate


def test_rule_4_4_balanced__each_positive_once_per_epoch():
    """An epoch passes over every positive exactly once, in an order of its own."""
    rng = lungaug.stream(0)
    orders = []
    for _ in range(2):
        batches = train_classifier.balanced_batches(70, 9, 64, rng)
        orders.append(np.concatenate([positives for positives, _ in batches]).tolist())
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(70))
    assert orders[0] != orders[1]


def test_rule_4_4_balanced__half_and_half_and_the_last_batch_is_kept():
    """Batches of 64 hold 32 + 32; the last, short one is kept, and balanced too."""
    batches = train_classifier.balanced_batches(70, 9, 64, lungaug.stream(0))
    sizes = [(len(positives), len(negatives)) for positives, negatives in batches]
    assert sizes == [(32, 32), (32, 32), (6, 6)]


def test_rule_4_4_balanced__erratum_the_last_batch_of_table_1_is_16_and_16():
    """5,712 = 178 · 32 + 16: not each batch of the thesis' own epoch holds 32 + 32."""
    batches = train_classifier.balanced_batches(5712, 9, 64, lungaug.stream(0))
    sizes = [(len(positives), len(negatives)) for positives, negatives in batches]
    assert sizes == [(32, 32)] * 178 + [(16, 16)]


def test_rule_4_4_balanced__negatives_come_from_all_of_them():
    """However few the positives, every negative can be drawn, the last one too."""
    drawn = set()
    for seed in range(30):
        batches = train_classifier.balanced_batches(6, 9, 4, lungaug.stream(seed))
        for _, negatives in batches:
            drawn.update(negatives.tolist())
    assert drawn == set(range(9))


def test_rule_4_4_balanced__the_labels_of_each_step(tmp_path, monkeypatch):
    """In each step of training half of the labels are 1, and those are the positives' cubes."""
    dataset = small_run(tmp_path)
    positives = as_set(eight(cubes_of(dataset, "positives", "train")))
    forward = train_classifier.Classifier.forward
    loss = train_classifier.classifier_loss
    inputs = []
    sizes = []

    def record_input(self, x):
        inputs.append(x.detach())
        return forward(self, x)

    def check_labels(logits, labels):
        # Validation takes no gradient; its labels are not those of a step.
        if logits.requires_grad:
            cubes = inputs[-1]
            assert 2 * labels.sum() == len(labels)
            assert all(cube in positives for cube in as_set(cubes[labels == 1].numpy()))
            assert not any(cube in positives for cube in as_set(cubes[labels == 0].numpy()))
            sizes.append(len(labels))
        return loss(logits, labels)

    monkeypatch.setattr(train_classifier.Classifier, "forward", record_input)
    monkeypatch.setattr(train_classifier, "classifier_loss", check_labels)
    train(tmp_path, "real", "--epochs", "1", "--batch-size", "20")
    assert sizes == [20, 20, 8]


# Validation, and the best epoch


def test_eq_5_2_f1__the_classifiers_own_is_that_of_the_tables():
    """The F1 that chooses the epoch is the one that section 5.2 reports; 0 where that is 0/0."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        count = rng.integers(1, 8)
        labels, predictions = rng.integers(0, 2, (2, count))
        reported = evaluate.f1(evaluate.confusion_matrix(labels, predictions))
        expected = 0 if np.isnan(reported) else reported
        assert train_classifier.f1_score(labels, predictions) == pytest.approx(expected, abs=1e-15)


class Bright(torch.nn.Module):
    """A classifier with the logits of `critic`: the brighter the first voxel, the surer."""

    def forward(self, x):
        return critic(x)[1]


def test_rule_5_2_best_kept__validation_f1_and_loss_by_hand(tmp_path):
    """F1 over each validation nodule's flips and the negatives; the loss weighs classes equally."""
    dataset = small_run(tmp_path, nodules=(1, 2, 1))
    positives = eight(cubes_of(dataset, "positives", "validation"))[:, 0, 0, 0]
    negatives = cubes_of(dataset, "negatives", "validation")[:, 0, 0, 0]
    f1, loss = train_classifier.validate(Bright(), dataset, CPU)

    tp = (positives > 0).sum()
    fp = (negatives > 0).sum()
    assert 0 < fp
    assert f1 == pytest.approx(2 * tp / (len(positives) + tp + fp), abs=1e-12)

    positive_loss = np.log1p(np.exp(-4 * positives)).mean()
    negative_loss = np.log1p(np.exp(4 * negatives)).mean()
    assert loss == pytest.approx((positive_loss + negative_loss) / 2, rel=1e-5)


def test_validate__without_positives_it_is_the_negatives_loss(tmp_path):
    """A validation set without nodules gives F1 0 and a finite loss, of the negatives alone."""
    dataset = small_run(tmp_path, nodules=(1, 0, 1))
    negatives = cubes_of(dataset, "negatives", "validation")[:, 0, 0, 0]
    f1, loss = train_classifier.validate(Bright(), dataset, CPU)
    assert f1 == 0
    assert loss == pytest.approx(np.log1p(np.exp(4 * negatives)).mean(), rel=1e-5)


@pytest.mark.parametrize("results, best", [
    # The highest F1, whatever the loss.
    ([(0.5, 1.0), (0.7, 2.0), (0.6, 0.1)], 2),
    # A tie of F1: the lower loss.
    ([(0.5, 1.0), (0.7, 2.0), (0.7, 1.9)], 3),
    ([(0.5, 1.0), (0.7, 1.9), (0.7, 2.0)], 2),
    # A full tie: the earlier epoch.
    ([(0.7, 1.0), (0.7, 1.0), (0.7, 1.0)], 1),
    # No true positive in any epoch.
    ([(0.0, 3.0), (0.0, 2.0), (0.0, 4.0)], 2),
])
def test_rule_5_2_best_kept__highest_f1_then_lowest_loss_then_first(
        tmp_path, monkeypatch, results, best):
    """The epoch of the best validation F1 is kept, with its weights."""
    small_run(tmp_path)
    weights = []

    def validate(classifier, dataset, device):
        state = classifier.state_dict()
        weights.append({key: value.clone() for key, value in state.items()})
        return results[len(weights) - 1]

    monkeypatch.setattr(train_classifier, "validate", validate)
    kept = train(tmp_path, "real", "--epochs", "3")["best"]
    assert (kept["epoch"], kept["f1"], kept["loss"]) == (best, *results[best - 1])
    assert same_state(dict(kept["classifier"]), weights[best - 1])
    # Training did change the weights.
    assert not same_state(weights[0], weights[1])


def test_train__a_loss_that_is_not_finite_is_refused(tmp_path, monkeypatch):
    """NaN stops the training in one line, and leaves no checkpoint."""
    small_run(tmp_path)
    monkeypatch.setattr(train_classifier, "validate", lambda *_: (0.0, float("nan")))
    with pytest.raises(Refusal, match="NaN or infinite in epoch 1"):
        train(tmp_path)
    assert not (tmp_path / "classifiers" / "real" / "checkpoint.pt").exists()


@pytest.mark.parametrize("steady", [False, True])
@pytest.mark.parametrize("function, call", [("write", 3), ("write", 4), ("append_log", 3)])
def test_train__stopped_and_resumed_it_ends_with_the_same_bytes(
        tmp_path, monkeypatch, function, call, steady):
    """Stopped before, or between, log and checkpoint, then resumed: the same files.

    steady: no epoch is better than the first, so the best weights are those that were restored.
    """
    if steady:
        monkeypatch.setattr(train_classifier, "validate", lambda *_: (0.5, 1.0))
    words = ("mixed", "--epochs", "4", "--decay-epoch", "2")
    for name in ("whole", "stopped"):
        small_run(tmp_path / name)
        write_generated(tmp_path / name)
    whole = train(tmp_path / "whole", *words)

    # Stop at the given call of the function.
    original = getattr(lungaug, function)
    calls = []

    def stop(*arguments):
        calls.append(arguments)
        if len(calls) == call:
            raise KeyboardInterrupt
        original(*arguments)

    monkeypatch.setattr(lungaug, function, stop)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "stopped", *words)
    monkeypatch.setattr(lungaug, function, original)

    # Resume, and compare every file.
    assert same_state(train(tmp_path / "stopped", *words), whole)
    for file in ("log.jsonl", "checkpoint.pt"):
        paths = [tmp_path / name / "classifiers" / "mixed" / file for name in ("whole", "stopped")]
        assert paths[0].read_bytes() == paths[1].read_bytes()
    rows = lungaug.read_log(tmp_path / "stopped" / "classifiers" / "mixed" / "log.jsonl")
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]


def test_train__the_log_holds_the_mean_loss_of_the_epochs_batches(tmp_path, monkeypatch):
    """train_loss is the mean over an epoch's batches; validation_f1 and _loss are validate's."""
    small_run(tmp_path)
    classifier_loss = train_classifier.classifier_loss
    losses = []

    def record_loss(logits, labels):
        loss = classifier_loss(logits, labels)
        losses.append(loss.item())
        return loss

    monkeypatch.setattr(train_classifier, "classifier_loss", record_loss)
    monkeypatch.setattr(train_classifier, "validate", lambda *_: (0.25, 0.75))
    train(tmp_path, "real", "--epochs", "2")

    # An epoch has six batches: 24 positives, four per batch.
    means = np.array(losses).reshape(2, 6).mean(axis=1)
    rows = lungaug.read_log(tmp_path / "classifiers" / "real" / "log.jsonl")
    assert np.allclose([row["train_loss"] for row in rows], means, rtol=1e-6)
    for row in rows:
        assert row["validation_f1"] == 0.25 and row["validation_loss"] == 0.75


def test_trainer__the_arms_start_from_the_same_weights(tmp_path):
    """The arms differ in their data alone: before the first step all have the same weights."""
    dataset = small_run(tmp_path)
    starts = []
    for arm in train_classifier.ARMS:
        trainer = train_classifier.Trainer(arm, options(), dataset, None, CPU)
        starts.append(trainer.classifier.state_dict())
    assert all(same_state(starts[0], start) for start in starts[1:])


def test_trainer__the_arms_of_a_repeat_start_from_the_same_weights(tmp_path):
    """Arms are paired: of one repeat they start alike, and another repeat starts from others."""
    dataset = small_run(tmp_path)
    starts = {}
    for repeat in (1, 2, 3):
        for arm in ("real", "mixed"):
            trainer = train_classifier.Trainer(arm, options(), dataset, None, CPU, repeat)
            starts[arm, repeat] = trainer.classifier.state_dict()
        assert same_state(starts["real", repeat], starts["mixed", repeat])
    assert not same_state(starts["real", 1], starts["real", 2])
    assert not same_state(starts["real", 2], starts["real", 3])


def test_open_training__a_repeat_lies_in_a_folder_of_its_own(tmp_path):
    """The first repeat keeps its path and its bytes, whatever follows; no two repeats are alike."""
    small_run(tmp_path)
    folder = tmp_path / "classifiers" / "real"
    train(tmp_path, "real", "--epochs", "1")
    first = (folder / "checkpoint.pt").read_bytes()

    others = [open_training(tmp_path, "real", "--epochs", "1", repeat=repeat) for repeat in (2, 3)]
    train_classifier.train_all(others, tmp_path, CPU)
    checkpoints = [folder / "checkpoint.pt", folder / "repeat_2" / "checkpoint.pt",
                   folder / "repeat_3" / "checkpoint.pt"]
    assert checkpoints[0].read_bytes() == first
    assert len({path.read_bytes() for path in checkpoints}) == 3


@pytest.mark.parametrize("epochs, is_finished", [("2", True), ("3", False)])
def test_train_all__a_stage_with_epochs_left_is_not_finished(tmp_path, epochs, is_finished):
    """Before more epochs are trained the stage's page goes: until its end the arms are unequal."""
    small_run(tmp_path)
    train(tmp_path, "real", "--epochs", "2")
    path = tmp_path / "classifiers" / "options.json"
    lungaug.write(path, {"page": []})
    before = path.read_bytes()
    train(tmp_path, "real", "--epochs", epochs)
    assert path.exists() == is_finished
    assert not is_finished or path.read_bytes() == before


# Several at a time


def train_every_arm(run, *words):
    """Train every arm on the small run, twice, for two epochs."""
    dataset = preprocessing.open_dataset(run)
    typed = options("--batch-size", "8", "--epochs", "2", "--repeats", "2", *words)
    trainings = train_classifier.open_trainings(run, dataset, typed, {}, CPU)
    train_classifier.train_all(trainings, run, CPU)


def trained_files(run):
    """The bytes of each checkpoint and log of a run's classifiers, by path."""
    folder = run / "classifiers"
    paths = [*folder.rglob("checkpoint.pt"), *folder.rglob("log.jsonl")]
    return {path.relative_to(run): path.read_bytes() for path in paths}


def small_runs(folder, *names):
    """Small runs of these names in the folder, with generated cubes: their paths."""
    for name in names:
        small_run(folder / name)
        write_generated(folder / name)
    return [folder / name for name in names]


def test_train_all__side_by_side_as_one_after_the_other(tmp_path, threads):
    """The number of threads, and so of trainings at a time, changes no byte."""
    runs = small_runs(tmp_path, "one", "four")
    for run, count in zip(runs, (1, 4)):
        threads(count)
        train_every_arm(run)
    files = [trained_files(run) for run in runs]
    # Four arms, each twice, leave a checkpoint and a log each.
    assert len(files[0]) == 16
    assert files[0] == files[1]


def test_train_all__stopped_by_a_failure_and_resumed_it_ends_with_the_same_bytes(
        tmp_path, monkeypatch, threads):
    """Where one training fails the others stop half-way, and the same command makes up for it."""
    threads(3)
    whole, stopped = small_runs(tmp_path, "whole", "stopped")
    train_every_arm(whole)

    # The fifth loss, whichever training it is of, is not finite.
    validate = train_classifier.validate
    numbers = itertools.count(1)

    def fail_late(*arguments):
        f1, loss = validate(*arguments)
        return f1, float("nan") if next(numbers) == 5 else loss

    monkeypatch.setattr(train_classifier, "validate", fail_late)
    with pytest.raises(Refusal, match="NaN or infinite"):
        train_every_arm(stopped)
    assert trained_files(stopped) != trained_files(whole)

    monkeypatch.setattr(train_classifier, "validate", validate)
    train_every_arm(stopped)
    assert trained_files(stopped) == trained_files(whole)


def test_open_trainings__repeat_by_repeat(tmp_path):
    """All arms of a repeat come before the next one; real does not depend on what was generated."""
    [run] = small_runs(tmp_path, "run")
    dataset = preprocessing.open_dataset(run)
    classes = {"positive": {"accepted": 5}}
    trainings = train_classifier.open_trainings(run, dataset, options("--repeats", "2"), classes, CPU)
    order = [(training.trainer.repeat, training.trainer.arm) for training in trainings]
    assert order == [(repeat, arm) for repeat in (1, 2) for arm in train_classifier.ARMS]
    for training in trainings:
        expected = None if training.trainer.arm == "real" else classes
        assert training.trainer.settings["generated"] == expected


# The control of the mixed arm


def count_steps(run, monkeypatch, arm, *words):
    """Train an arm: the rate and the size of the batch of each step of its optimizer."""
    steps = []
    step = torch.optim.Adam.step
    loss = train_classifier.classifier_loss

    def record_step(optimizer):
        steps.append((optimizer.param_groups[0]["lr"], sizes[-1]))
        return step(optimizer)

    def record_loss(logits, labels):
        sizes.append(len(labels))
        return loss(logits, labels)

    sizes = []
    monkeypatch.setattr(torch.optim.Adam, "step", record_step)
    monkeypatch.setattr(train_classifier, "classifier_loss", record_loss)
    train(run, arm, *words)
    monkeypatch.undo()
    return steps


@pytest.mark.parametrize("generated", [1, 5, 24, 50])
def test_rule_beyond_equal_steps__rates_and_batches_of_mixed(tmp_path, monkeypatch, generated):
    """Longer takes the steps of mixed, one by one at the same rate and of the same batch size."""
    small_run(tmp_path)
    write_generated(tmp_path, positives=generated)
    words = ("--epochs", "2", "--decay-epoch", "1", "--batch-size", "10")
    mixed = count_steps(tmp_path, monkeypatch, "mixed", *words)
    longer = count_steps(tmp_path, monkeypatch, "longer", *words)
    real = count_steps(tmp_path, monkeypatch, "real", *words)
    assert longer == mixed
    assert sum(size for _, size in real) == 2 * 2 * 24
    assert sum(size for _, size in longer) == 2 * 2 * (24 + generated)


def test_rule_beyond_equal_steps__of_real_cubes_alone(tmp_path):
    """The control sees no generated cube; each real positive comes as often as any, or once more."""
    dataset = small_run(tmp_path)
    write_generated(tmp_path, positives=12)
    positives, negatives = train_classifier.arm_pools("longer", tmp_path, dataset)
    assert whole(positives) == as_set(eight(cubes_of(dataset, "positives", "train")))
    assert whole(negatives) == as_set(cubes_of(dataset, "negatives", "train"))

    drawn = train_classifier.positives_per_epoch("longer", tmp_path, dataset)
    assert drawn == train_classifier.positives_per_epoch("mixed", tmp_path, dataset) == 36
    batches = train_classifier.balanced_batches(24, 5, 10, lungaug.stream(0), drawn)
    numbers = np.concatenate([numbers for numbers, _ in batches])
    counts = np.bincount(numbers, minlength=24)
    assert len(numbers) == 36 and set(counts) == {1, 2}


def test_rule_beyond_equal_steps__the_other_arms_draw_each_positive_once(tmp_path):
    """real, mixed and fake: an epoch has as many positives as the arm."""
    dataset = small_run(tmp_path)
    write_generated(tmp_path, positives=12)
    drawn = {arm: train_classifier.positives_per_epoch(arm, tmp_path, dataset)
             for arm in ("real", "mixed", "fake")}
    assert drawn == {"real": 24, "mixed": 36, "fake": 12}


@pytest.mark.parametrize("word, value", [
    ("--seed", "1"), ("--batch-size", "10"), ("--learning-rate", "0.1"),
    ("--late-learning-rate", "0.1"), ("--decay-epoch", "9")])
def test_open_training__other_options_than_the_checkpoints_are_refused(tmp_path, word, value):
    """A checkpoint made with other options is not resumed; the message names the option."""
    small_run(tmp_path)
    train(tmp_path, "real", "--epochs", "1")
    with pytest.raises(Refusal, match=word[2:].replace("-", "_")):
        train(tmp_path, "real", "--epochs", "2", word, value)


def test_open_training__other_generated_samples_than_the_checkpoints_are_refused(tmp_path):
    """A classifier trained on other generated samples is not resumed."""
    small_run(tmp_path)
    write_generated(tmp_path)
    train(tmp_path, "mixed", "--epochs", "1", classes={"positive": {"accepted": 5}})
    with pytest.raises(Refusal, match="generated"):
        train(tmp_path, "mixed", "--epochs", "2", classes={"positive": {"accepted": 6}})


def test_open_training__other_prepared_data_than_the_checkpoints_are_refused(tmp_path):
    """A finished classifier is refused for scans that were prepared since."""
    small_run(tmp_path)
    train(tmp_path, "real", "--epochs", "1")
    shutil.rmtree(tmp_path / "prepared")
    small_run(tmp_path, nodules=(4, 2, 2))
    with pytest.raises(Refusal, match="prepared"):
        train(tmp_path, "real", "--epochs", "1")


@pytest.mark.parametrize("arm, counts, missing", [
    ("mixed", (0, 4), "positives"), ("longer", (0, 4), "positives"),
    ("fake", (0, 4), "positives"), ("fake", (5, 0), "negatives")])
def test_open_training__a_skipped_arm_leaves_no_older_classifier(
        tmp_path, capsys, arm, counts, missing):
    """Where nothing of a new GAN passes, an arm is skipped, and its older checkpoint is removed."""
    small_run(tmp_path)
    write_generated(tmp_path)
    assert train(tmp_path, arm, "--epochs", "1")
    write_generated(tmp_path, *counts)
    assert train(tmp_path, arm, "--epochs", "1") is None
    assert f"{arm}: no generated {missing} to train on; skipped." in capsys.readouterr().out


# Pictures


def test_draw_samples__one_row_per_kind_and_black_where_there_are_too_few(tmp_path, monkeypatch):
    """Rows: real positives, generated ones, real negatives, generated ones, in the lung window; then black."""
    def shown(cubes):
        return lungaug.windowed(700 * cubes[:, 3] - 300, "lung window")

    dataset = small_run(tmp_path)
    generated = write_generated(tmp_path, positives=3, negatives=20)
    sheets = []

    def record_sheet(images, columns):
        sheets.append((np.asarray(images), columns))
        return np.zeros((1, 1), np.uint8)

    monkeypatch.setattr(lungaug, "tile", record_sheet)
    train_classifier.draw_samples(tmp_path, dataset)
    (images, columns), = sheets
    assert columns == 16
    rows = images.reshape(4, 16, 6, 6)

    # Real cubes, 3 and 5.
    for row, kind in ((rows[0], "positives"), (rows[2], "negatives")):
        middles = shown(cubes_of(dataset, kind, "train"))
        assert np.array_equal(row[:len(middles)], middles)
        assert not row[len(middles):].any()

    # Three accepted positives, then the three rejected ones.
    positives = shown(scaled(generated["positive"]))
    assert np.array_equal(rows[1, :3], positives)
    assert np.array_equal(rows[1, 3:6], positives)
    assert not rows[1, 6:].any()

    # More accepted negatives than fit.
    negatives = shown(scaled(generated["negative"][:16]))
    assert np.array_equal(rows[3], negatives)


def test_figure_8__no_chart_of_a_skipped_arm(tmp_path):
    """Where an arm is skipped, figure 8 does not show the losses of its older classifier."""
    small_run(tmp_path)
    write_generated(tmp_path)
    train(tmp_path, "mixed", "--epochs", "1")
    write_generated(tmp_path, positives=0)
    for arm in ("real", "mixed"):
        train(tmp_path, arm, "--epochs", "1")

    evaluate.draw_curves(tmp_path, tmp_path)
    figure = (tmp_path / "figure_8.svg").read_text(encoding="utf-8")
    assert "real data" in figure and "mixed data" not in figure


def test_figure_8__one_chart_per_arm_with_both_losses(tmp_path):
    """Figure 8 has a chart for each trained arm, with a training and a validation curve."""
    small_run(tmp_path)
    write_generated(tmp_path)
    for arm in ("real", "fake"):
        train(tmp_path, arm, "--epochs", "2")

    evaluate.draw_curves(tmp_path, tmp_path)
    figure = (tmp_path / "figure_8.svg").read_text(encoding="utf-8")
    assert figure.count("<polyline") == 4
    assert figure.count(">validation<") == figure.count(">train<") == 2
