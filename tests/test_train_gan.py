"""Section 4.1: settings, randomness, one step of each network, the order of the steps, stop and resume.

    python -m pytest tests/test_train_gan.py -v

The prepared data are noise: cubes of 6 voxels, networks of width 1, batches of 4 or 5.
"""

import itertools
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import lungaug
from lungaug import OPTIONS, Refusal

import numpy as np
import pytest
import torch
from scipy import stats
from torch import distributed

import preprocessing
import train_classifier
import train_gan
import wrong_versions
from helpers import cubes_of, descendants, early, eight, small_run
from losses import critic_loss, generator_loss
from models import Critic, Generator
from train_gan import (
    Trainer,
    auxiliary_scale,
    critic_iteration,
    decayed_rate,
    draw_batch,
    draw_epsilon,
    draw_labels,
    draw_latent,
    generator_iteration,
)


CPU = torch.device("cpu")
NO_CUBES = SimpleNamespace(cube=6, fingerprint=0)       # what a Trainer asks of a Dataset


def small_dataset(run):
    """Prepared data of random HU in `run`, volumes with unequal sides; their Dataset, cube 6."""
    rng, scans = np.random.default_rng(1), []
    for split in ("train", "validation", "test"):
        hu = rng.integers(-1000, 401, (20, 21, 22)).astype(np.int16)
        lungaug.write(run / "prepared" / f"{split}.npy", hu)
        scans.append({"split": split, "volume": f"{split}.npy", "positives": rng.integers(3, 17, (6, 3)).tolist(),
                      "negatives": rng.integers(3, 17, (50, 3)).tolist()})
    lungaug.write(run / "prepared" / "dataset.json", {"parameters": {"cube": 6}, "preset": "demo", "scans": scans})
    return preprocessing.open_dataset(run)


def batches_of(trainer, dataset):
    """The batches of reals from the trainer's epoch on."""
    return train_gan.read_batches(trainer.options, dataset, trainer.epoch)


def options(**changes):
    """train_gan.py's options for a small training: the demo preset's, with these changes."""
    small = lungaug.apply_preset(lungaug.parse("", "train_gan", words=[]), "train_gan", "demo")
    vars(small).update({"width": 1, "batch_size": 4, "epochs": 4, "critic_iterations": 5, "generator_multiple": 1,
                        "decay_start": 1.0, "checkpoint_minutes": 0.0, **changes})
    return small


def small_trainer(double=False, **changes):
    """A new Trainer; double: networks in float64, for comparisons to rounding (the fakes are float32 even so)."""
    trainer = Trainer(options(**changes), NO_CUBES, CPU)
    if double:
        trainer.critic.double()
        trainer.generator.double().register_forward_pre_hook(lambda module, z: z[0].double())
    return trainer


def batch(n=5, dtype=torch.float32):
    """Real cubes of noise, and their labels."""
    source = torch.Generator().manual_seed(5)
    return torch.rand(n, 1, 6, 6, 6, generator=source, dtype=dtype) * 2 - 1, torch.arange(n) % 2


def weights(network):
    """All of a network's weights as one new vector."""
    return torch.cat([p.detach().flatten().clone() for p in network.parameters()])


def gradients(network):
    return torch.cat([p.grad.flatten().clone() for p in network.parameters()])


def source(seed=1):
    return torch.Generator().manual_seed(seed)


def leaves(value):
    """Every number, text and array's bytes in nested dicts and lists, in order, with its keys."""
    if isinstance(value, dict):
        return [leaf for key in value for leaf in (key, *leaves(value[key]))]
    if isinstance(value, (list, tuple)):
        return [leaf for part in value for leaf in leaves(part)]
    return [(value.dtype, value.shape, value.numpy().tobytes()) if torch.is_tensor(value) else value]


# 4.1 Batches of reals

def test_rule_2_1_5_training_only__no_other_cube_is_drawn(tmp_path):
    """Of a data set with cubes in all three sets, 200 draws are of the training set's, and each of those is drawn."""
    dataset = small_run(tmp_path)
    cubes, labels = draw_batch(dataset, 200, np.random.default_rng(0))
    positives = {cube.tobytes() for cube in cubes[labels == 1, 0].round(4)}
    negatives = {cube.tobytes() for cube in cubes[labels == 0, 0].round(4)}
    flips = eight(cubes_of(dataset, "positives", "train")).astype(np.float32).round(4)
    assert positives == {cube.tobytes() for cube in flips}
    as_they_are = cubes_of(dataset, "negatives", "train").astype(np.float32).round(4)
    assert negatives == {cube.tobytes() for cube in as_they_are}


def test_rule_4_1_balanced_batch__half_and_half(dataset):
    """Half of a batch is positive and comes first; of an odd batch the odd one is negative."""
    for count, positives in ((8, 4), (7, 3)):
        cubes, labels = draw_batch(dataset, count, np.random.default_rng(0))
        assert cubes.shape == (count, 1, 12, 12, 12) and labels.tolist() == [1] * positives + [0] * (count - positives)


def test_rule_4_1_balanced_batch__labels_tell_positives_from_negatives(dataset):
    """Label 1 goes with the positives' volume, label 0 with the negatives'."""
    cubes, labels = draw_batch(dataset, 40, np.random.default_rng(0))
    known = [np.sort(preprocessing.read_cubes(dataset, part["train"]).reshape(2, -1))
             for part in (dataset.negatives, dataset.positives)]
    assert all((np.sort(cube.ravel()) == known[label]).all(1).any() for cube, label in zip(cubes, labels))


def batch_flips(dataset, label, count=800):
    """Which (nodule, flip) each cube of a label is in a large batch; no other cube fits."""
    part = dataset.positives if label else dataset.negatives
    known = {cube.tobytes(): (row, flip) for row in range(2) for flip, cube in
             enumerate(preprocessing.all_flips(preprocessing.read_cubes(dataset, part["train"][[row]])[0, 0]))}
    cubes, labels = draw_batch(dataset, count, np.random.default_rng(0))
    return np.array([known[cube.tobytes()] for cube in cubes[labels == label]])


def test_rule_4_1_balanced_batch__positives_are_flipped_at_random(dataset):
    """Of 400 positives every nodule and every flip has its share, within five standard deviations."""
    found = batch_flips(dataset, 1)
    assert np.abs(np.bincount(found[:, 1], minlength=8) - 50).max() < 5 * np.sqrt(400 / 8 * 7 / 8)
    assert np.abs(np.bincount(found[:, 0], minlength=2) - 200).max() < 5 * np.sqrt(400 / 4)


def test_rule_4_1_balanced_batch__negatives_are_used_as_they_are(dataset):
    """2.1.6: negatives are not flipped; each is drawn as often as another."""
    found = batch_flips(dataset, 0)
    assert (found[:, 1] == 0).all() and np.abs(np.bincount(found[:, 0], minlength=2) - 200).max() < 5 * np.sqrt(400 / 4)


def test_rule_4_1_balanced_batch__of_split_cubes_only_flips_of_the_training_set(dataset):
    """--split cube: a nodule's flips that are in the test set are never drawn; the others each have their share."""
    training = {(0, 0), (0, 3), (1, 1), (1, 2), (1, 5), (1, 7)}
    flips = np.zeros((2, 8), bool)
    flips[tuple(zip(*training))] = True
    found = batch_flips(dataset._replace(flips={"train": flips}), 1)
    drawn, counts = np.unique(found, axis=0, return_counts=True)
    assert set(map(tuple, drawn.tolist())) == training
    assert np.abs(counts - 400 / 6).max() < 5 * np.sqrt(400 / 6 * 5 / 6)


# 4.1.1 The settings

def thesis(name):
    row, = (row for row in OPTIONS if row.stages == ("train_gan",) and row.name == f"--{name}")
    return row.thesis


def test_num_4_1_batch_size__of_the_thesis():
    """Batch size 64."""
    assert thesis("batch-size") == 64


def test_num_4_1_batch_size__of_reals_and_of_fakes(tmp_path, monkeypatch):
    """Each of the six iterations of an epoch is on --batch-size samples of each kind."""
    counts, trainer = [], small_trainer(batch_size=6)
    trainer.generator.register_forward_pre_hook(lambda module, z: counts.append(len(z[0])))
    draw = train_gan.draw_batch
    monkeypatch.setattr(train_gan, "draw_batch", lambda dataset, n, rng: counts.append(n) or draw(dataset, n, rng))
    train_gan.train_epoch(trainer, batches_of(trainer, small_dataset(tmp_path)))
    # The reals are drawn by threads, ahead: of other epochs, too.
    assert set(counts) == {6} and len(counts) >= 11


def test_num_4_1_learning_rate__of_the_thesis():
    """Learning rate 1e-4."""
    assert thesis("learning-rate") == 1e-4


def test_num_4_1_learning_rate__of_both_optimizers():
    """Adam's first step with β₁ = 0 moves a weight of gradient 1 by the learning rate."""
    trainer = small_trainer(double=True, learning_rate=0.25)
    for network, step in ((trainer.generator, trainer.generator_optimizer), (trainer.critic, trainer.critic_optimizer)):
        assert steps_of_adam(network, step, [1]) == pytest.approx([-0.25], rel=1e-7)


def test_num_4_1_lambda__of_the_thesis():
    """λ = 10."""
    assert thesis("penalty-scale") == 10


def test_num_4_1_lambda__scales_the_penalty_of_the_step():
    """The step's gradients are affine in λ: those of λ = 20 are twice those of λ = 10 less those of λ = 0."""
    at = []
    for scale in (0.0, 10.0, 20.0):
        trainer = small_trainer(double=True, penalty_scale=scale)
        critic_iteration(trainer, *batch(dtype=torch.float64), 1)
        at.append(gradients(trainer.critic))
    assert torch.allclose(at[2], 2 * at[1] - at[0], rtol=1e-9, atol=1e-9) and (at[1] - at[0]).abs().max() > 1


def test_num_4_1_epochs__of_the_thesis():
    """20,000 epochs."""
    assert thesis("epochs") == 20000


def test_num_4_1_epochs__are_trained(tmp_path, monkeypatch):
    """train() runs --epochs epochs, each a row of the log."""
    monkeypatch.setattr(train_gan, "train_epoch", fake_epoch)
    trainer = small_trainer(epochs=7)
    train_gan.train(trainer, None, tmp_path)
    assert [row["epoch"] for row in lungaug.read_log(tmp_path / "log.jsonl")] == [1, 2, 3, 4, 5, 6, 7]
    assert trainer.epoch == 7


def fake_epoch(trainer, batches, loss=0.0):
    """An epoch in no time: a row of the log."""
    trainer.epoch += 1
    names = ("wasserstein", "penalty", "auxiliary", "real_accuracy", "fake_accuracy")
    return {"epoch": trainer.epoch, "alpha": 1, "critic": dict.fromkeys(names, loss), "generator": {"auxiliary": 0.0}}


def steps_of_adam(network, step, slopes):
    """How far one weight moves at each of these gradients, one step after the other."""
    weight, moves = next(network.parameters()), []
    for slope in slopes:
        before = weight.detach().clone()
        weight.grad = torch.full_like(weight, slope)
        step.step()
        moves.append((weight.detach() - before).flatten()[0].item())
    return moves


def test_num_4_1_adam__of_the_thesis():
    """β₁ = 0, β₂ = 0.9."""
    assert train_gan.BETAS == (0, 0.9)


@pytest.mark.parametrize("name", ["generator", "critic"])
def test_num_4_1_adam__first_two_steps_by_hand(name):
    """Gradients 3, then 4: −lr·3/√9; then −lr·4/√v, v = (0.9·0.1·9 + 0.1·16)/(1 − 0.9²) = 2.41/0.19."""
    trainer = small_trainer(double=True, learning_rate=0.01)
    moves = steps_of_adam(getattr(trainer, name), getattr(trainer, f"{name}_optimizer"), [3, 4])
    assert moves == pytest.approx([-0.01, -0.04 / math.sqrt(2.41 / 0.19)], rel=1e-8)


# α

@pytest.mark.parametrize("epoch, alpha", [(0, 1), (14999, 1), (15000, 10), (19999, 10)])
def test_rule_4_1_alpha__edges(epoch, alpha):
    """1 from the start to just below three quarters of 20,000 epochs, 10 from there to the end."""
    assert auxiliary_scale(epoch, 20000, 1, 10) == alpha


def test_rule_4_1_alpha__of_the_thesis():
    """α = 1 at the beginning, 10 at the end."""
    assert (thesis("auxiliary-scale"), thesis("late-auxiliary-scale")) == (1, 10)


def test_rule_4_1_alpha__reaches_both_losses(tmp_path, monkeypatch):
    """Epochs 0 to 3 of 4 hand 1, 1, 1, 10 to each critic iteration and to the generator's, and to the log."""
    seen, zero = [], {"total": 0.0}
    monkeypatch.setattr(train_gan, "critic_iteration", lambda trainer, real, labels, scale: seen.append(scale) or zero)
    monkeypatch.setattr(train_gan, "generator_iteration", lambda trainer, count, scale: seen.append(scale) or zero)
    trainer = small_trainer(epochs=4, auxiliary_scale=1.0, late_auxiliary_scale=10.0)
    batches = batches_of(trainer, small_dataset(tmp_path))
    assert [train_gan.train_epoch(trainer, batches)["alpha"] for _ in range(4)] == [1, 1, 1, 10]
    assert seen == [1] * 18 + [10] * 6


# The learning rate's decay

@pytest.mark.parametrize("epoch, rate", [(0, 1), (50, 1), (51, 0.98), (75, 0.5), (99, 0.02)])
def test_rule_4_1_decay__by_hand(epoch, rate):
    """η = 1, from half of 100 epochs on a line to 0 at epoch 100: the last epoch, 99, has 0.02 still."""
    assert decayed_rate(epoch, 100, 1.0, 0.5) == pytest.approx(rate, rel=1e-12)


@pytest.mark.parametrize("start", [0, 0.3, 0.9])
def test_rule_4_1_decay__no_epoch_is_without_a_step(start):
    """The rate never rises, and is above 0 in the last epoch, too."""
    rates = [decayed_rate(epoch, 20, 1e-3, start) for epoch in range(20)]
    assert rates == sorted(rates, reverse=True) and rates[0] == 1e-3 and rates[-1] > 0


def test_rule_4_1_decay__is_off_in_the_thesis():
    """The thesis has one learning rate: at its --decay-start every epoch has it."""
    assert {decayed_rate(epoch, 20000, 1e-4, thesis("decay-start")) for epoch in range(20000)} == {1e-4}


def test_rule_4_1_decay__of_the_generator_alone(tmp_path):
    """Epochs 0 to 3 of 4, from half of them on: 1, 1, 1, ½ of the learning rate; the critic's stays."""
    trainer = small_trainer(epochs=4, learning_rate=0.25, decay_start=0.5)
    batches = batches_of(trainer, small_dataset(tmp_path))
    seen = []
    for _ in range(4):
        train_gan.train_epoch(trainer, batches)
        optimizers = (trainer.generator_optimizer, trainer.critic_optimizer)
        seen.append([group["lr"] for optimizer in optimizers for group in optimizer.param_groups])
    assert seen == [[0.25, 0.25]] * 3 + [[0.125, 0.25]]


@pytest.mark.parametrize("name", ["one_to_five", "short_batches_skipped", "reals_used_five_times", "critics_last_z"])
def test_wrong_epochs__have_one_mistake_each(name, tmp_path):
    """For a lecture a mistake in an epoch leaves all else as it is, the decay of the learning rate, too."""
    trainer = small_trainer(epochs=4, learning_rate=0.25, decay_start=0.5)
    trainer.epoch = 3
    getattr(wrong_versions, name)(trainer, batches_of(trainer, small_dataset(tmp_path)))
    optimizers = (trainer.generator_optimizer, trainer.critic_optimizer)
    assert [group["lr"] for optimizer in optimizers for group in optimizer.param_groups] == [0.125, 0.25]


# 3.3.1 What is drawn: labels, ε, z

def test_rule_3_3_1_random_labels__uniform_over_the_two_classes():
    """10,000 labels, each 0 or 1: the share of 1 within 4 standard deviations of ½."""
    labels = draw_labels(10000, source(), CPU)
    assert set(labels.tolist()) == {0, 1} and abs(labels.double().mean().item() - 0.5) < 4 * 0.005


def test_rule_3_3_1_random_labels__independent():
    """Of 10,000 pairs of neighbours each of the four kinds is a quarter (χ² at one in a thousand)."""
    pairs = draw_labels(20000, source(), CPU).reshape(-1, 2)
    assert stats.chisquare(torch.bincount(2 * pairs[:, 0] + pairs[:, 1], minlength=4)).pvalue > 1e-3


def test_rule_3_3_1_epsilon__uniform_on_zero_to_one():
    """10,000 draws, none outside [0, 1], follow U[0, 1] (Kolmogorov–Smirnov at one in a thousand); not normal."""
    epsilon = draw_epsilon(10000, source(), CPU)
    assert 0 <= epsilon.min() and epsilon.max() <= 1 and stats.kstest(epsilon, "uniform").pvalue > 1e-3


def test_rule_3_3_1_epsilon__mean_and_variance():
    """Mean ½ and variance 1/12, each within 4 standard deviations of 10,000 draws."""
    epsilon = draw_epsilon(10000, source(), CPU).double()
    assert abs(epsilon.mean().item() - 1 / 2) < 4 * math.sqrt(1 / 12 / 10000)
    assert abs(epsilon.var().item() - 1 / 12) < 4 * math.sqrt(1 / 180 / 10000)


def record(monkeypatch, name):
    """Have train_gan's loss `name` append its arguments to the list that is returned."""
    calls, loss = [], getattr(train_gan, name)
    monkeypatch.setattr(train_gan, name, lambda *arguments: calls.append(arguments) or loss(*arguments))
    return calls


def test_rule_3_3_1_epsilon__one_a_sample_at_each_iteration(monkeypatch):
    """The critic's loss gets (n,) values, all different, and others at the next iteration."""
    trainer, calls = small_trainer(), record(monkeypatch, "critic_loss")
    for _ in range(2):
        critic_iteration(trainer, *batch(5), 1)
    first, second = (call[5] for call in calls)
    assert first.shape == second.shape == (5,) and len(torch.cat([first, second]).unique()) == 10


def test_rule_3_3_1_latent__one_hot_in_front():
    """(n, 128) with [0, 1] in front for a positive, [1, 0] for a negative."""
    latent = draw_latent(torch.tensor([1, 0]), source())
    assert latent.shape == (2, 128) and latent[:, :2].tolist() == [[0, 1], [1, 0]]


def test_rule_3_3_1_latent__normal():
    """The other 126 entries follow 𝒩(0, 1) (Kolmogorov–Smirnov at one in a thousand), whatever the label."""
    latent = draw_latent(torch.arange(200) % 2, source())
    assert all(stats.kstest(latent[y::2, 2:].flatten(), "norm").pvalue > 1e-3 for y in (0, 1))


def seen_by_generator(trainer):
    """A list to which every z that the trainer's generator is given is appended."""
    latents = []
    trainer.generator.register_forward_pre_hook(lambda module, z: latents.append(z[0].detach().clone()))
    return latents


def test_rule_3_3_1_latent__same_in_both_steps_and_in_sampling():
    """The critic's step, the generator's step and 4.3's sampling draw their noise from 𝒩(0, 1)."""
    trainer = small_trainer(attempts=1, class_probability=0.9)
    latents = seen_by_generator(trainer)
    critic_iteration(trainer, *batch(60), 1)
    generator_iteration(trainer, 60, 1)
    train_classifier.generate(trainer.generator, trainer.critic, 1, 60, math.inf, trainer.options, CPU)
    assert len(latents) == 3 and all(stats.kstest(z[:, 2:].flatten(), "norm").pvalue > 1e-3 for z in latents)


# The critic's iteration

def test_rule_4_1_critic_step__leaves_the_generator():
    """The critic moves; the generator keeps every bit and gets no gradient."""
    trainer = small_trainer()
    generator, critic = weights(trainer.generator), weights(trainer.critic)
    critic_iteration(trainer, *batch(), 1)
    assert torch.equal(weights(trainer.generator), generator) and not torch.equal(weights(trainer.critic), critic)
    assert all(p.grad is None for p in trainer.generator.parameters())


def test_rule_4_1_critic_step__gets_what_it_is_given(monkeypatch):
    """L_f is of the reals with their labels, of G(z) with the labels in z, of λ and α."""
    trainer, (real, labels) = small_trainer(penalty_scale=7.0), batch()
    calls, latents = record(monkeypatch, "critic_loss"), seen_by_generator(trainer)
    critic_iteration(trainer, real, labels, 3)
    (critic, *data, epsilon, penalty_scale, scale), = calls
    with torch.no_grad():
        fake = trainer.generator(latents[0])
    assert (critic, penalty_scale, scale) == (trainer.critic, 7, 3)
    assert all(map(torch.equal, data, (real, labels, fake, latents[0][:, 1].long())))


def test_rule_4_1_critic_step__down_the_gradient_of_the_whole_loss(monkeypatch):
    """One step: each weight moves by −lr·g/(|g| + 10⁻⁸), g the gradient of L_f, penalty and cross-entropy in it."""
    trainer = small_trainer(double=True, learning_rate=0.125)
    calls, before = record(monkeypatch, "critic_loss"), weights(trainer.critic)
    twin = Critic(6, 1).double()
    twin.load_state_dict(trainer.critic.state_dict())
    critic_iteration(trainer, *batch(dtype=torch.float64), 2)
    critic_loss(twin, *calls[0][1:]).total.backward()
    g = gradients(twin)
    assert torch.allclose(weights(trainer.critic) - before, -0.125 * g / (g.abs() + 1e-8), rtol=1e-8, atol=1e-12)


def test_rule_4_1_critic_step__gradients_start_from_zero():
    """A gradient left from before does not count."""
    one, other = small_trainer(), small_trainer()
    for p in other.critic.parameters():
        p.grad = torch.ones_like(p)
    for trainer in (one, other):
        critic_iteration(trainer, *batch(), 1)
    assert torch.equal(weights(one.critic), weights(other.critic))


def test_rule_4_1_critic_step__reports_the_terms(monkeypatch):
    """What it returns is the loss's own terms, as numbers by their names."""
    trainer, terms = small_trainer(), []
    monkeypatch.setattr(train_gan, "critic_loss", lambda *arguments: terms.append(critic_loss(*arguments)) or terms[0])
    assert critic_iteration(trainer, *batch(), 1) == {name: value.item() for name, value in terms[0]._asdict().items()}


@pytest.mark.parametrize("size", [1, 2, 4, 9])
def test_rule_4_1_critic_step__micro_batches_make_the_same_gradients(size):
    """Five samples, `size` at a time: gradients, terms and draws are those of the whole batch."""
    whole, parts = small_trainer(double=True), small_trainer(double=True, micro_batch=size)
    terms = [critic_iteration(trainer, *batch(dtype=torch.float64), 2) for trainer in (whole, parts)]
    assert torch.allclose(gradients(parts.critic), gradients(whole.critic), rtol=1e-10, atol=1e-10)
    assert terms[1] == pytest.approx(terms[0], rel=1e-12)
    assert torch.equal(whole.rng.get_state(), parts.rng.get_state())


class Share(NamedTuple):
    """What one process of several handed to the sum over all: its gradients, and its terms."""
    gradients: list
    terms: dict


def shares(n_processes, iterate, monkeypatch, **changes):
    """The Share of each of n processes in one iteration, the processes one after the other, in this one."""
    every = []
    for process in range(n_processes):
        def keep(gradients, terms):
            every.append(Share([gradient.clone() for gradient in gradients], terms))
            return terms

        monkeypatch.setattr(train_gan, "process_place", lambda: (process, n_processes))
        monkeypatch.setattr(train_gan, "sum_over_processes", keep)
        iterate(small_trainer(double=True, **changes))
    return every


@pytest.mark.parametrize("n_processes, micro_batch", [(2, None), (3, 1), (2, 2)])
def test_rule_4_1_critic_step__processes_share_the_batch(monkeypatch, n_processes, micro_batch):
    """Five samples: the sums over the processes of gradients and terms are those of the whole batch in one."""
    reals = batch(dtype=torch.float64)
    whole = small_trainer(double=True)
    terms = critic_iteration(whole, *reals, 2)
    every = shares(n_processes, lambda trainer: critic_iteration(trainer, *reals, 2), monkeypatch,
                   micro_batch=micro_batch)
    summed = [sum(parts) for parts in zip(*(share.gradients for share in every))]
    assert torch.allclose(torch.cat([g.flatten() for g in summed]), gradients(whole.critic), rtol=1e-10, atol=1e-10)
    assert {name: sum(share.terms[name] for share in every) for name in terms} == pytest.approx(terms, rel=1e-12)


def test_rule_4_1_generator_step__processes_share_the_batch(monkeypatch):
    """The same of the generator's step, for two processes."""
    whole = small_trainer(double=True)
    generator_iteration(whole, 5, 2)
    every = shares(2, lambda trainer: generator_iteration(trainer, 5, 2), monkeypatch)
    summed = [sum(parts) for parts in zip(*(share.gradients for share in every))]
    assert torch.allclose(torch.cat([g.flatten() for g in summed]), gradients(whole.generator), rtol=1e-10, atol=1e-12)


# The generator's iteration

def test_rule_4_1_generator_step__leaves_the_critic():
    """The generator moves; the critic keeps every bit, its gradients too, and can learn again."""
    trainer = small_trainer()
    critic_iteration(trainer, *batch(), 1)
    generator, critic, slopes = weights(trainer.generator), weights(trainer.critic), gradients(trainer.critic)
    generator_iteration(trainer, 5, 1)
    assert torch.equal(weights(trainer.critic), critic) and not torch.equal(weights(trainer.generator), generator)
    assert torch.equal(gradients(trainer.critic), slopes) and all(p.requires_grad for p in trainer.critic.parameters())


def test_rule_4_1_generator_step__down_the_gradient_of_the_whole_loss(monkeypatch):
    """One step: each weight moves by −lr·g/(|g| + 10⁻⁸), g the gradient of L_G for the labels in z."""
    trainer = small_trainer(double=True, learning_rate=0.125)
    before, latents = weights(trainer.generator), seen_by_generator(trainer)
    twin, critic = Generator(6, 1).double(), Critic(6, 1).double()
    for copy, network in ((twin, trainer.generator), (critic, trainer.critic)):
        copy.load_state_dict(network.state_dict())
    generator_iteration(trainer, 5, 2)
    z, = latents
    generator_loss(critic, twin(z), z[:, 1].long(), 2).total.backward()
    g = gradients(twin)
    assert torch.allclose(weights(trainer.generator) - before, -0.125 * g / (g.abs() + 1e-8), rtol=1e-8, atol=1e-12)


def test_rule_4_1_generator_step__gradients_start_from_zero():
    """A gradient left from before does not count."""
    one, other = small_trainer(), small_trainer()
    for p in other.generator.parameters():
        p.grad = torch.ones_like(p)
    for trainer in (one, other):
        generator_iteration(trainer, 5, 1)
    assert torch.equal(weights(one.generator), weights(other.generator))


def test_rule_4_1_generator_step__reports_the_terms(monkeypatch):
    """What it returns is the loss's own terms, as numbers by their names."""
    trainer, terms = small_trainer(), []
    monkeypatch.setattr(train_gan, "generator_loss", lambda *a: terms.append(generator_loss(*a)) or terms[0])
    assert generator_iteration(trainer, 5, 1) == {name: value.item() for name, value in terms[0]._asdict().items()}


@pytest.mark.parametrize("size", [1, 2, 4, 9])
def test_rule_4_1_generator_step__micro_batches_make_the_same_gradients(size):
    """Five samples, `size` at a time: gradients, terms and draws are those of the whole batch."""
    whole, parts = small_trainer(double=True), small_trainer(double=True, micro_batch=size)
    terms = [generator_iteration(trainer, 5, 2) for trainer in (whole, parts)]
    assert torch.allclose(gradients(parts.generator), gradients(whole.generator), rtol=1e-10, atol=1e-12)
    assert terms[1] == pytest.approx(terms[0], rel=1e-12)
    assert torch.equal(whole.rng.get_state(), parts.rng.get_state())


# The generator's batch

def test_rule_4_1_generator_batch__of_the_thesis():
    """The thesis names one batch size, so m = 1 there; the demo's is its own choice, with its reason in Choices."""
    assert thesis("generator-multiple") == 1


@pytest.mark.parametrize("multiple", [1, 2, 3])
def test_rule_4_1_generator_batch__samples_of_each_step(tmp_path, multiple):
    """In an epoch five critic steps see n fakes each, the generator's step sees m·n."""
    trainer = small_trainer(generator_multiple=multiple)
    latents = seen_by_generator(trainer)
    train_gan.train_epoch(trainer, batches_of(trainer, small_dataset(tmp_path)))
    assert [len(z) for z in latents] == [4] * 5 + [4 * multiple]


def test_rule_4_1_generator_batch__as_many_micro_batches_as_the_critics(tmp_path):
    """Two for either, so that two processes share a step of each as one process with --micro-batch would."""
    trainer = small_trainer(generator_multiple=3, micro_batch=2)
    latents = seen_by_generator(trainer)
    train_gan.train_epoch(trainer, batches_of(trainer, small_dataset(tmp_path)))
    assert [len(z) for z in latents] == [2, 2] * 5 + [6, 6]


@pytest.mark.parametrize("process, count", [(0, 4), (1, 3)])
def test_rule_4_1_generator_batch__is_shared_as_the_critics(tmp_path, monkeypatch, process, count):
    """Of seven reals the first of two processes takes four, of fourteen generated cubes eight: as one process with
    --micro-batch 4 splits them, so that the bytes are the same."""
    monkeypatch.setattr(train_gan, "process_place", lambda: (process, 2))
    monkeypatch.setattr(train_gan, "sum_over_processes", lambda gradients, terms: terms)
    trainer = small_trainer(batch_size=7, generator_multiple=2)
    latents = seen_by_generator(trainer)
    train_gan.train_epoch(trainer, batches_of(trainer, small_dataset(tmp_path)))
    assert [len(z) for z in latents] == [count] * 5 + [2 * count]


# Five to one

def recorded_epoch(run, monkeypatch, epochs=1):
    """One epoch, or more: its steps as (name, reals or count), and the z of each, in their order."""
    trainer, steps = small_trainer(), []
    for name in ("critic_iteration", "generator_iteration"):
        def recorded(trainer, data, *rest, name=name, step=getattr(train_gan, name)):
            steps.append((name, data))
            return step(trainer, data, *rest)

        monkeypatch.setattr(train_gan, name, recorded)
    latents = seen_by_generator(trainer)
    batches = batches_of(trainer, small_dataset(run))
    for _ in range(epochs):
        train_gan.train_epoch(trainer, batches)
    return trainer, steps, latents


def test_rule_4_1_five_to_one__of_the_thesis():
    """Five critic iterations in the thesis; the demo's are its own choice, which README gives a reason for."""
    assert thesis("critic-iterations") == 5


def test_rule_4_1_five_to_one__order(tmp_path, monkeypatch):
    """Five iterations of the critic, then one of the generator."""
    _, steps, _ = recorded_epoch(tmp_path, monkeypatch)
    assert [name for name, _ in steps] == ["critic_iteration"] * 5 + ["generator_iteration"]


def test_rule_4_1_five_to_one__steps_of_the_optimizers(tmp_path, monkeypatch):
    """After an epoch Adam has counted five steps of each weight of the critic and one of the generator's."""
    trainer, _, _ = recorded_epoch(tmp_path, monkeypatch)
    counted = [{state["step"].item() for state in step.state.values()}
               for step in (trainer.critic_optimizer, trainer.generator_optimizer)]
    assert counted == [{5}, {1}] and trainer.epoch == 1


def test_rule_4_1_five_to_one__fresh_z_at_each(tmp_path, monkeypatch):
    """Six draws of z in an epoch, the generator's own among them: no noise is used twice, in the next epoch neither."""
    _, _, latents = recorded_epoch(tmp_path, monkeypatch, epochs=2)
    assert len(latents) == 12 and len(torch.cat(latents)[:, 2:].unique()) == 12 * 4 * 126


def test_rule_4_1_five_to_one__fresh_reals_at_each(tmp_path, monkeypatch):
    """The five batches of reals of two epochs all differ."""
    _, steps, _ = recorded_epoch(tmp_path, monkeypatch, epochs=2)
    reals = [data for name, data in steps if name == "critic_iteration"]
    assert len(reals) == 10
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(reals, 2))


@pytest.mark.parametrize("threads", [1, 4])
def test_rule_4_1_five_to_one__reals_depend_on_epoch_and_iteration_alone(tmp_path, monkeypatch, threads):
    """Read from epoch 2 on by any number of threads, the batches are those that a reading from the start has there."""
    dataset = small_dataset(tmp_path)
    words = options(critic_iterations=3, epochs=4)
    from_start = list(train_gan.read_batches(words, dataset, 0))
    monkeypatch.setattr(lungaug, "READ_THREADS", threads)
    resumed = list(train_gan.read_batches(words, dataset, 2))
    assert (len(from_start), len(resumed)) == (12, 6)
    assert all(map(np.array_equal, sum(from_start[6:], ()), sum(resumed, ())))


def test_rule_4_1_five_to_one__log_holds_the_mean_of_the_five(tmp_path, monkeypatch):
    """Critic terms 1, 2, 3, 4, 10 are logged as 4, beside the generator's own."""
    values = iter([1, 2, 3, 4, 10])
    monkeypatch.setattr(train_gan, "critic_iteration", lambda *a: {"total": next(values)})
    monkeypatch.setattr(train_gan, "generator_iteration", lambda *a: {"total": 7})
    trainer = small_trainer()
    row = train_gan.train_epoch(trainer, batches_of(trainer, small_dataset(tmp_path)))
    assert (row["epoch"], row["critic"], row["generator"]) == (1, {"total": 4}, {"total": 7})


# The z that stays fixed

def test_rule_4_1_fixed_z__stays_through_the_training(tmp_path):
    """An epoch leaves it as it was: four negatives, then four positives, by their one-hot."""
    trainer = small_trainer()
    before = trainer.fixed_latent.clone()
    train_gan.train_epoch(trainer, batches_of(trainer, small_dataset(tmp_path)))
    assert torch.equal(trainer.fixed_latent, before) and before[:, :2].tolist() == [[1, 0]] * 4 + [[0, 1]] * 4


def test_rule_4_1_fixed_z__is_drawn_by_the_generator_of_the_moment(tmp_path):
    """Each moment holds its epoch and round(127.5·(G(z) + 1)) to half a grey by the generator as it was then."""
    trainer = small_trainer()
    batches = batches_of(trainer, small_dataset(tmp_path))
    for epoch in (0, 1):
        train_gan.sample_fixed(trainer)
        exact = (trainer.generator(trainer.fixed_latent).double()[:, 0] + 1) * 127.5
        assert trainer.moments[epoch][0] == epoch and (trainer.moments[epoch][1] - exact).abs().max() < 0.501
        train_gan.train_epoch(trainer, batches)


def test_rule_4_1_fixed_z__drawing_it_changes_nothing():
    """Weights, optimizers and randomness are the same before and after."""
    trainer = small_trainer()
    before = leaves(trainer.state())
    train_gan.sample_fixed(trainer)
    trainer.moments.clear()
    assert leaves(trainer.state()) == before


def test_rule_4_1_fixed_z__from_the_start_to_the_end(tmp_path, monkeypatch):
    """Drawn before the first epoch and at each eighth of the training."""
    monkeypatch.setattr(train_gan, "train_epoch", fake_epoch)
    trainer = small_trainer(epochs=16)
    train_gan.train(trainer, None, tmp_path)
    assert [epoch for epoch, _ in trainer.moments] == [0, 2, 4, 6, 8, 10, 12, 14, 16]


# Seeds, stop and resume, losses that are not finite

def test_trainer__seed_decides_the_weights():
    """Same seed, same weights and z, whatever torch's global randomness was; another seed, others."""
    one, again, other = (torch.manual_seed(i) and small_trainer(seed=seed) for i, seed in enumerate((3, 3, 4)))
    for part in (lambda t: weights(t.generator), lambda t: weights(t.critic), lambda t: t.fixed_latent,
                 lambda t: t.rng.get_state()):
        assert torch.equal(part(one), part(again)) and not torch.equal(part(one), part(other))


def test_trainer__state_survives_the_disk(tmp_path):
    """A trained Trainer's state, saved, loaded and restored in a new one, is that state again, bit for bit."""
    trainer, new = small_trainer(), small_trainer()
    train_gan.sample_fixed(trainer)
    train_gan.train_epoch(trainer, batches_of(trainer, small_dataset(tmp_path)))
    lungaug.write(tmp_path / "checkpoint.pt", trainer.state())
    assert leaves(new.state()) != leaves(trainer.state())
    new.restore(lungaug.load_checkpoint(tmp_path / "checkpoint.pt", ""))
    assert leaves(new.state()) == leaves(trainer.state())


def trained(folder, dataset, stop=None, **changes):
    """train() in `folder` from its checkpoint, or from the start; after `stop` epochs a Ctrl-C. Returns the Trainer."""
    trainer, epoch = train_gan.start_or_resume(folder, options(**changes), dataset, CPU), train_gan.train_epoch
    done = iter(range(4))       # no more than 4 epochs, even where they do not count

    def interrupted(trainer, batches):
        if next(done) == stop:
            raise KeyboardInterrupt
        return epoch(trainer, batches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gan, "train_epoch", interrupted)
        train_gan.train(trainer, dataset, folder)
    return trainer


@pytest.mark.parametrize("threads", [1, 4])
def test_train__resumed_ends_with_the_same_bytes(tmp_path, monkeypatch, threads):
    """Stopped after 2 of 4 epochs, the log a row and a half ahead: resumed, all is as in the uninterrupted training,
    whatever number of threads reads ahead."""
    dataset, one, two = small_dataset(tmp_path), tmp_path / "one", tmp_path / "two"
    with pytest.raises(KeyboardInterrupt):
        trained(two, dataset, stop=2)
    monkeypatch.setattr(lungaug, "READ_THREADS", threads)
    with open(two / "log.jsonl", "a") as file:
        file.write('{"epoch": 3, "critic": {}}\n{"epoch": 4, "cri')
    whole, resumed = trained(one, dataset), trained(two, dataset)
    assert resumed.epoch == 4 and leaves(resumed.state()) == leaves(whole.state())
    assert all((one / name).read_bytes() == (two / name).read_bytes()
               for name in ("checkpoint.pt", "log.jsonl", "progression.png"))


def test_train__checkpoint_is_the_trainer_at_the_end(tmp_path):
    """checkpoint.pt holds the last epoch's weights, optimizers and randomness, however seldom one is due."""
    trainer = trained(tmp_path / "gan", small_dataset(tmp_path), checkpoint_minutes=1e9)
    assert leaves(lungaug.load_checkpoint(tmp_path / "gan" / "checkpoint.pt", "")) == leaves(trainer.state())


def test_train__other_settings_do_not_resume(tmp_path):
    """A checkpoint made with another seed is refused, and said so; under --overwrite training starts from nothing."""
    dataset = small_dataset(tmp_path)
    trained(tmp_path / "gan", dataset)
    with pytest.raises(Refusal, match="seed 0, not 1"):
        train_gan.start_or_resume(tmp_path / "gan", options(seed=1), dataset, CPU)
    assert train_gan.start_or_resume(tmp_path / "gan", options(seed=1, overwrite=True), dataset, CPU).epoch == 0


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_train__a_loss_that_is_nan_or_infinite_stops(tmp_path, monkeypatch, loss):
    """In epoch 3 of 4: Refusal that says so; the checkpoint of epoch 2 and a log of two rows are left."""
    monkeypatch.setattr(train_gan, "train_epoch", lambda t, _: fake_epoch(t, _, loss if t.epoch == 2 else 0.0))
    with pytest.raises(Refusal,
                       match="NaN or infinite in epoch 3 — start over with a lower --learning-rate and --overwrite"):
        train_gan.train(small_trainer(), None, tmp_path)
    assert lungaug.load_checkpoint(tmp_path / "checkpoint.pt", "")["epoch"] == 2
    assert [row["epoch"] for row in lungaug.read_log(tmp_path / "log.jsonl")] == [1, 2]


@pytest.mark.parametrize("name", ["generator", "critic"])
def test_train__a_weight_that_is_nan_stops(tmp_path, name):
    """One NaN among the weights of either network is found in the next epoch's losses."""
    trainer = small_trainer()
    trainer.epoch = 1
    next(getattr(trainer, name).parameters()).data.view(-1)[0] = math.nan
    with pytest.raises(Refusal, match="NaN or infinite in epoch 2"):
        train_gan.train(trainer, small_dataset(tmp_path), tmp_path / "gan")
    assert not (tmp_path / "gan" / "checkpoint.pt").exists()


def test_autocast__weights_and_optimizers_stay_float32():
    """Under bfloat16 the critic computes another loss than under float32; its weights and Adam's state stay float32."""
    half, full = small_trainer(precision="bfloat16"), small_trainer()
    terms = [critic_iteration(trainer, *batch(), 1) for trainer in (half, full)]
    kept = [*half.critic.parameters(), *(t for state in half.critic_optimizer.state.values() for t in state.values())]
    assert {t.dtype for t in kept} == {torch.float32} and terms[0]["total"] != terms[1]["total"]


@pytest.mark.parametrize("precision, allowed", [("float32", False), ("tf32", True), ("bfloat16", True)])
def test_precision__tf32_is_allowed_or_not_for_both_kinds_of_products(precision, allowed):
    """PyTorch's own default allows it for convolutions and not for matrix products: --precision sets both."""
    for flags in (torch.backends.cudnn, torch.backends.cuda.matmul):
        flags.allow_tf32 = not allowed
    small_trainer(precision=precision)
    assert torch.backends.cudnn.allow_tf32 == torch.backends.cuda.matmul.allow_tf32 == allowed


def test_resume__fewer_epochs_than_were_trained_are_refused(tmp_path, run):
    """A checkpoint of epoch 3 is not one of --epochs 2, whatever options.json would say of it."""
    small_run(tmp_path)
    words = ["--run", tmp_path, "--preset", "demo", "--width", 1, "--batch-size", 4, "--epochs"]
    assert run(train_gan, *words, 3).status == 0
    *_, line = run(train_gan, *words, 2).err.splitlines()
    path = tmp_path / "gan" / "checkpoint.pt"
    assert line.startswith(f"lungaug: {path}: was trained for 3 epochs, more than --epochs 2")


def test_precision__cubes_leave_the_generator_in_float32():
    """Under bfloat16 tanh is computed in float32: its values are not all of 8 bits."""
    with torch.autocast("cpu", torch.bfloat16):
        cubes = Generator(6, 1)(torch.randn(2, 128))
    assert cubes.dtype == torch.float32 and not torch.equal(cubes, cubes.bfloat16().float())


def test_check_shares__more_processes_than_micro_batches(monkeypatch):
    """Four samples are two micro-batches of 2: two processes can share them, three cannot, and are told so."""
    for n_processes in (1, 2):
        monkeypatch.setattr(train_gan, "process_place", lambda: (0, n_processes))
        train_gan.check_shares(options(micro_batch=2))
    monkeypatch.setattr(train_gan, "process_place", lambda: (0, 3))
    with pytest.raises(Refusal, match="a batch has fewer micro-batches, 2, than there are processes, 3"):
        train_gan.check_shares(options(micro_batch=2))


# Several processes

needs_rendezvous = pytest.mark.skipif(os.name == "nt",
                                   reason="PyTorch for Windows lacks torchrun's rendezvous without libuv")
SHARED = ["--device", "cpu", "--width", 1, "--batch-size", 4, "--decay-start", 1, "--auxiliary-scale", 1,
          "--late-auxiliary-scale", 1, "--checkpoint-minutes", 0]
SHARED_IN_ONE = dict(micro_batch=2, decay_start=1.0, auxiliary_scale=1.0, late_auxiliary_scale=1.0, critic_iterations=2,
                     generator_multiple=2)


def start_torchrun(run, *words, processes=2):
    """Start to train in a run with that many processes on the CPU; its subprocess.Popen."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes, "--",
               lungaug.HERE / "train_gan.py", "--run", run, *words]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "encoding": "utf-8"}
    return subprocess.Popen(list(map(str, command)), env=environment, start_new_session=True, **pipes)


def torchrun(run, *words):
    """Train in a run with two processes on the CPU; fails where torchrun does. Returns what it printed."""
    process = start_torchrun(run, *words)
    out, err = process.communicate()
    assert process.returncode == 0, err
    return out


def same_training(run, other):
    """Whether two runs hold the same checkpoint and log, byte for byte."""
    return all((run / "gan" / name).read_bytes() == (other / "gan" / name).read_bytes()
               for name in ("checkpoint.pt", "log.jsonl"))


@early
def killed(folder):
    """Two processes that are killed (SIGKILL to all of torchrun's) after some of 24 epochs, then resumed by two.

    .stopped, a copy of the run as they left it; .epoch, how far they were, and .first, what they said; .run and .out of
    the resumed training.
    """
    run = folder / "two"
    small_dataset(run)
    process = start_torchrun(run, *SHARED, "--epochs", 24)
    while len(lungaug.read_log(run / "gan/log.jsonl")) < 2 and process.poll() is None:
        time.sleep(0.005)
    # Each of torchrun's processes has a group of its own.
    for pid in (process.pid, *descendants(process.pid)):
        os.kill(pid, signal.SIGKILL)
    first, _ = process.communicate()

    epoch = lungaug.load_checkpoint(run / "gan/checkpoint.pt", "")["epoch"]
    stopped = Path(shutil.copytree(run, folder / "stopped"))
    out = torchrun(run, *SHARED, "--epochs", 24)
    return SimpleNamespace(run=run, stopped=stopped, epoch=epoch, first=first, out=out)


@needs_rendezvous
@pytest.mark.skipif(not shutil.which("ps"), reason="needs ps")
def test_torchrun__killed_it_is_resumed_by_two_processes_or_by_one(killed, tmp_path):
    """Two processes equal one with two micro-batches: killed after some of 24 epochs and resumed, by two processes or
    by one, the training ends with the bytes of one process that nobody disturbed."""
    dataset = small_dataset(tmp_path / "one")
    train_in_one(tmp_path / "one/gan", dataset, epochs=24, **SHARED_IN_ONE)

    assert 1 <= killed.epoch < 24
    train_in_one(killed.stopped / "gan", dataset, epochs=24, **SHARED_IN_ONE)
    assert same_training(killed.stopped, tmp_path / "one")
    assert killed.first.count("2 processes, cpu; epochs 0 to 24.") == 1
    assert killed.out.count(f"2 processes, cpu; epochs {killed.epoch} to 24.") == 1
    assert same_training(killed.run, tmp_path / "one")


@needs_rendezvous
@pytest.mark.parametrize("is_first", [True, False])
def test_leave_processes__a_training_ends_with_the_processes_left(tmp_path, monkeypatch, run, is_first):
    """In the process that writes, and in the others: Python, as it ends, would abort a thread of gloo's that needs it,
    and torchrun would then stop the first process before its page is written."""
    small_run(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in place.items():
        monkeypatch.setenv(name, str(value))

    joined = []
    train_in = train_gan.train_in

    def train_joined(*arguments):
        joined.append(distributed.is_initialized())
        return train_in(*arguments)

    monkeypatch.setattr(train_gan, "train_in", train_joined)
    monkeypatch.setattr(train_gan, "is_first_process", lambda: is_first)
    try:
        done = run(train_gan, "--run", tmp_path, "--preset", "demo", "--width", 1, "--batch-size", 4, "--epochs", 1,
                   "--device", "cpu")
        is_left = not distributed.is_initialized()
    finally:
        train_gan.leave_processes()
    assert done.status == 0, done.err
    assert joined == [True] and is_left


def train_in_one(folder, dataset, **changes):
    """Train in this process, from the folder's checkpoint where there is one."""
    trainer = train_gan.start_or_resume(folder, options(**changes), dataset, CPU)
    train_gan.train(trainer, dataset, folder)


def test_record_epoch__shows_the_smoothed_estimate_and_alpha(tmp_path):
    """The mean of the estimates so far, then of the last twenty: one epoch's own jumps up and down."""
    trainer = small_trainer(epochs=1000, checkpoint_minutes=1e9)
    recorder = train_gan.Recorder(trainer, tmp_path)
    lines = []
    recorder.progress.update = lambda done, text: lines.append(text)

    for estimate, alpha in [(4.0, 3.0), (0.0, 10.0), *[(0.0, 1.0)] * 19]:
        trainer.epoch += 1
        critic = {"wasserstein": estimate, "real_accuracy": 0.5, "fake_accuracy": 1.0}
        recorder.record_epoch({"critic": critic, "alpha": alpha})

    assert lines[0] == "W 4.00, α 3, class accuracy 0.50 on reals, 1.00 on fakes"
    assert lines[1].startswith("W 2.00, α 10, ")
    assert lines[19].startswith("W 0.20, ") and lines[20].startswith("W 0.00, ")


def test_train_in__a_lost_picture_of_a_whole_training_is_drawn_again(tmp_path, capsys):
    """With no epoch left to train, progression.png comes back with its bytes, and the checkpoint stays."""
    dataset, folder = small_dataset(tmp_path), tmp_path / "gan"
    train_gan.train_in(folder, options(epochs=2, preset="demo"), dataset, CPU)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "progression.png").unlink()
    train_gan.train_in(folder, options(epochs=2, preset="demo"), dataset, CPU)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
