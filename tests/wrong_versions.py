"""Mistakes that people publish, each as a function that takes the right one's place.

    python tests/wrong_versions.py                       # each in turn; its guard must fail
    python tests/wrong_versions.py sigmoid_score         # one of them
    python tests/wrong_versions.py --list                # their names, a line each
    python lungaug.py audit --wrong sigmoid_score        # for a lecture: right, wrong, what differs
    python tests/wrong_versions.py sigmoid_score -- train_gan.py --run runs/e1 --epochs 60
    LUNGAUG_WRONG=sigmoid_score python -m pytest tests/test_models.py

With a stage behind --, that stage is run with the mistake in place: what it leaves says so.

Most were found in well-known repositories. A wrong version has the arguments and the result of the
right one. Where it calls a right function by a name that is imported below, it gets the right one,
whatever has been replaced. The table at the end of the file says whose place each one takes, and
which id guards against it. Exit status 1 where a guard passes, or none of its tests can be run.
"""

import argparse
import importlib
import inspect
import itertools
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import lungaug

import numpy as np
import pydicom
import torch
from torch import nn

import evaluate
import train_classifier
import train_gan
from evaluate import roc_auc
from losses import (
    auxiliary_cross_entropy,
    critic_loss,
    generator_loss,
    gradient_penalty,
    interpolate,
    wasserstein_estimate,
)
from models import LATENT, Critic, conditional_latent, one_hot
from preprocessing import cut, far_end, first_flips, read_dicom, reorient, resample, split_patients
from train_gan import accumulate


MODULES = ("lungaug", "preprocessing", "models", "losses", "train_gan", "train_classifier",
           "evaluate")


# 1.3.5 The interpolation between reals and fakes

def one_epsilon_per_batch(real, fake, epsilon):
    """One ε for the whole batch."""
    return epsilon[0] * real + (1 - epsilon[0]) * fake


def one_epsilon_per_voxel(real, fake, epsilon):
    """ε drawn for each voxel."""
    epsilon = torch.rand_like(real)
    return epsilon * real + (1 - epsilon) * fake


def epsilon_is_one(real, fake, epsilon):
    """ε = 1: the penalty sees reals only."""
    return real


# 1.3.5 The gradient penalty

def gradient_between(critic, real, fake, epsilon, create_graph=True):
    """∇_x̂ f(x̂), of the same shape as the cubes: right, and a start for the wrong penalties."""
    x_hat = interpolate(real, fake, epsilon).detach().requires_grad_()
    score, _ = critic(x_hat)
    gradient, = torch.autograd.grad(score.sum(), x_hat, retain_graph=True,
                                    create_graph=create_graph)
    return gradient


def norm_over_channels(critic, real, fake, epsilon):
    """The norm over the channel axis alone: the slope of each voxel is driven to 1."""
    gradient = gradient_between(critic, real, fake, epsilon)
    norm = torch.linalg.vector_norm(gradient, dim=1)
    return (norm - 1) ** 2


def norm_of_the_batch(critic, real, fake, epsilon):
    """The norm of the whole batch's gradient, in place of each sample's."""
    gradient = gradient_between(critic, real, fake, epsilon)
    norm = torch.linalg.vector_norm(gradient).expand(len(real))
    return (norm - 1) ** 2


def penalty_without_graph(critic, real, fake, epsilon):
    """The penalty without create_graph: no gradient of it reaches the weights."""
    gradient = gradient_between(critic, real, fake, epsilon, create_graph=False)
    norm = torch.linalg.vector_norm(gradient.flatten(1), dim=1)
    return (norm - 1) ** 2


def bare_square_root(critic, real, fake, epsilon):
    """A bare square root: its derivative is NaN where the gradient is 0."""
    gradient = gradient_between(critic, real, fake, epsilon)
    norm = gradient.flatten(1).pow(2).sum(1).sqrt()
    return (norm - 1) ** 2


# 3.3.1 The critic's loss

def critic_signs_swapped(critic, real, real_labels, fake, fake_labels, epsilon, penalty_scale,
                         auxiliary_scale):
    """The critic's signs swapped: it scores reals low."""
    loss = critic_loss(critic, real, real_labels, fake, fake_labels, epsilon, penalty_scale,
                       auxiliary_scale)
    total = loss.wasserstein + penalty_scale * loss.penalty + auxiliary_scale * loss.auxiliary
    return loss._replace(total=total)


def hinge_loss(critic, real, real_labels, fake, fake_labels, epsilon, penalty_scale,
               auxiliary_scale):
    """A hinge under the name Wasserstein."""
    loss = critic_loss(critic, real, real_labels, fake, fake_labels, epsilon, penalty_scale,
                       auxiliary_scale)
    real_score, _ = critic(real)
    fake_score, _ = critic(fake.detach())
    hinge = (1 - real_score).relu().mean() + (1 + fake_score).relu().mean()
    total = hinge + penalty_scale * loss.penalty + auxiliary_scale * loss.auxiliary
    return loss._replace(total=total)


def penalty_stepped_apart(critic, real, real_labels, fake, fake_labels, epsilon, penalty_scale,
                          auxiliary_scale):
    """The penalty taken out of the loss, for an optimizer step of its own."""
    loss = critic_loss(critic, real, real_labels, fake, fake_labels, epsilon, penalty_scale,
                       auxiliary_scale)
    return loss._replace(total=-loss.wasserstein + auxiliary_scale * loss.auxiliary)


def fakes_not_detached(critic, real, real_labels, fake, fake_labels, epsilon, penalty_scale,
                       auxiliary_scale):
    """The critic's loss reaches the generator."""
    loss = critic_loss(critic, real, real_labels, fake, fake_labels, epsilon, penalty_scale,
                       auxiliary_scale)
    score, logits = critic(torch.cat([real, fake]))
    labels = torch.cat([real_labels, fake_labels])
    n = len(real)

    wasserstein = wasserstein_estimate(score[:n], score[n:])
    penalty = gradient_penalty(critic, real, fake, epsilon).mean()
    auxiliary = auxiliary_cross_entropy(logits, labels)
    return loss._replace(total=-wasserstein + penalty_scale * penalty + auxiliary_scale * auxiliary)


def auxiliary_on_reals_only(critic, real, real_labels, fake, fake_labels, epsilon, penalty_scale,
                            auxiliary_scale):
    """The auxiliary loss on reals only."""
    loss = critic_loss(critic, real, real_labels, fake, fake_labels, epsilon, penalty_scale,
                       auxiliary_scale)
    _, logits = critic(real)
    auxiliary = auxiliary_cross_entropy(logits, real_labels)
    total = -loss.wasserstein + penalty_scale * loss.penalty + auxiliary_scale * auxiliary
    return loss._replace(total=total, auxiliary=auxiliary)


def softmax_twice(logits, labels):
    """A softmax before a cross-entropy that takes logits."""
    return auxiliary_cross_entropy(logits.softmax(1), labels)


# 3.3.2 The generator's loss

def generator_sign_swapped(critic, fake, labels, auxiliary_scale):
    """The generator's sign swapped: it makes what the critic calls fake."""
    loss = generator_loss(critic, fake, labels, auxiliary_scale)
    return loss._replace(total=loss.score + auxiliary_scale * loss.auxiliary)


def own_prediction_as_truth(critic, fake, labels, auxiliary_scale):
    """The generator's cross-entropy against the critic's own prediction, as 1.3.4 has it."""
    _, logits = critic(fake)
    return generator_loss(critic, fake, logits.argmax(1), auxiliary_scale)


# 3.1 The networks

right_forward = Critic.forward


def sigmoid_score(self, x):
    """A sigmoid on the critic's score."""
    score, logits = right_forward(self, x)
    return score.sigmoid(), logits


def batch_norm(channels):
    """Batch norm in the critic: the score of a sample depends on the others."""
    return nn.BatchNorm3d(channels)


def one_hot_reversed(labels):
    """The one-hot reversed: [1, 0] for a positive."""
    return one_hot(1 - labels)


# 4.1 The draws

def epsilon_normal(count, rng, device):
    """ε normal, in place of uniform."""
    return torch.randn(count, generator=rng).to(device)


def two_latents(labels, rng):
    """z uniform in training, and normal when samples are generated."""
    noise = torch.rand(len(labels), LATENT, generator=rng)
    return conditional_latent(noise.to(labels.device), labels)


# 4.1 The learning rate

def decay_to_zero_too_early(epoch, epochs, rate, start):
    """A decay that is through half-way: the rest of the epochs train nothing."""
    decayed = max(0, epoch / epochs - start)
    return rate * max(0, 1 - 2 * decayed / (1 - start))


# 4.1 The epoch. Its parts are called as train_gan.…, as they stand: none of them is wrong.

def begin_epoch(trainer):
    """As `train_gan.train_epoch` begins: set the learning rate. Returns this epoch's α."""
    options = trainer.options
    train_gan.set_learning_rate(trainer)
    return train_gan.auxiliary_scale(trainer.epoch, options.epochs, options.auxiliary_scale,
                                     options.late_auxiliary_scale)


def next_reals(trainer, batches):
    """A batch of reals and their labels, as tensors."""
    cubes, labels = next(batches)
    return torch.from_numpy(cubes).to(trainer.device), torch.from_numpy(labels).to(trainer.device)


def end_epoch(trainer, alpha, critic_terms, generator_terms):
    """Count the epoch; returns its row of the log, from the terms of each critic iteration."""
    trainer.epoch += 1
    means = {name: sum(terms[name] for terms in critic_terms) / len(critic_terms)
             for name in critic_terms[0]}
    return {"epoch": trainer.epoch, "alpha": alpha, "critic": means, "generator": generator_terms}


def one_to_five(trainer, batches):
    """One critic step to five of the generator."""
    alpha = begin_epoch(trainer)

    trainer.seed_iteration(0)
    real, labels = next_reals(trainer, batches)
    critic_terms = [train_gan.critic_iteration(trainer, real, labels, alpha)]

    for iteration in range(5):
        trainer.seed_iteration(1 + iteration)
        generator_terms = train_gan.generator_iteration(trainer, train_gan.generator_batch(trainer.options), alpha)
    return end_epoch(trainer, alpha, critic_terms, generator_terms)


def short_batches_skipped(trainer, batches):
    """Some of the five critic steps skipped."""
    alpha = begin_epoch(trainer)

    critic_terms = []
    for iteration in range(trainer.options.critic_iterations - 1):
        trainer.seed_iteration(iteration)
        real, labels = next_reals(trainer, batches)
        critic_terms.append(train_gan.critic_iteration(trainer, real, labels, alpha))

    trainer.seed_iteration(trainer.options.critic_iterations)
    generator_terms = train_gan.generator_iteration(trainer, train_gan.generator_batch(trainer.options), alpha)
    return end_epoch(trainer, alpha, critic_terms, generator_terms)


def reals_used_five_times(trainer, batches):
    """The same reals at each of the five critic steps."""
    alpha = begin_epoch(trainer)

    critic_terms = []
    real, labels = next_reals(trainer, batches)
    for iteration in range(trainer.options.critic_iterations):
        trainer.seed_iteration(iteration)
        critic_terms.append(train_gan.critic_iteration(trainer, real, labels, alpha))

    trainer.seed_iteration(trainer.options.critic_iterations)
    generator_terms = train_gan.generator_iteration(trainer, train_gan.generator_batch(trainer.options), alpha)
    return end_epoch(trainer, alpha, critic_terms, generator_terms)


def critics_last_z(trainer, batches):
    """The generator given the z of the critic's last step."""
    alpha = begin_epoch(trainer)

    critic_terms = []
    for iteration in range(trainer.options.critic_iterations):
        trainer.seed_iteration(iteration)
        real, labels = next_reals(trainer, batches)
        critic_terms.append(train_gan.critic_iteration(trainer, real, labels, alpha))

    trainer.seed_iteration(trainer.options.critic_iterations - 1)
    generator_terms = train_gan.generator_iteration(trainer, train_gan.generator_batch(trainer.options), alpha)
    return end_epoch(trainer, alpha, critic_terms, generator_terms)


def batch_drawn_twice(options, dataset, first_epoch):
    """Each batch of reals drawn twice: the seed does not tell an iteration from the next."""
    epochs = range(first_epoch, options.epochs)
    for epoch, iteration in itertools.product(epochs, range(options.critic_iterations)):
        rng = lungaug.stream(options.seed, "gan batches", epoch, iteration // 2)
        yield train_gan.draw_batch(dataset, options.batch_size, rng)


def one_share_for_all(loss_of, count, size, network):
    """Every process the same share of the batch, as where all have one stream of random numbers."""
    process_place = train_gan.process_place
    _, n_processes = process_place()
    train_gan.process_place = lambda: (0, n_processes)
    try:
        return accumulate(loss_of, count, size, network)
    finally:
        train_gan.process_place = process_place


# 2 The slices of a DICOM series

def slices_sorted_by_z(headers, normal):
    """Slices sorted by z alone."""
    return sorted(headers, key=lambda header: header.position[2])


def thickness_for_spacing(source):
    """SliceThickness taken for the distance between slices."""
    scan = read_dicom(source)
    between_columns, between_rows, _ = scan.spacing
    thickness = float(pydicom.dcmread(source.files[0]).SliceThickness)
    return scan._replace(spacing=np.array([between_columns, between_rows, thickness]))


def localizer_kept(header):
    """A localizer under the series' own UID kept as a slice: all files make one volume."""
    return ()


def no_rescale(stored, slope, intercept):
    """Stored values taken for HU."""
    return 1.0 * stored


# 2.1.1 The grid of 1 mm

def direction_ignored(scan):
    """The direction matrix ignored."""
    return np.eye(3) * scan.spacing


def direction_transposed(scan):
    """The direction matrix from the wrong side: the scan is turned the wrong way."""
    return scan.direction.T * scan.spacing


def any_flip_is_both(axes):
    """Any mirrored axis taken for x and y mirrored."""
    any_mirrored = (np.diag(axes) < 0).any()
    return np.array([any_mirrored, any_mirrored, False])


def mirror_off_by_one(axes, spacing, shape, mirrored):
    """A mirrored index of n − i in place of n − 1 − i."""
    return far_end(axes, spacing, np.array(shape) + 1, mirrored)


def rounded_zoom(scan, origin=None, shape=None):
    """A zoom by a rounded factor, which moves nodules."""
    scan = reorient(scan)
    size = np.array(scan.hu.shape[::-1])
    spacing = np.round(size * scan.spacing) / size
    return resample(scan._replace(spacing=spacing), origin, shape)


# 2.1.3 to 2.1.5 The lungs, the cubes, the split

def room_air_as_lung(labels):
    """The largest air taken for the lung: it is the room's."""
    return np.array([], int)


def axes_transposed(origin, centre):
    """Millimetres (x, y, z) taken for an index (z, y, x)."""
    return np.floor(np.asarray(centre, float) - origin + 0.5).astype(int)


def crop_shifted(hu, voxel, side):
    """A crop at the border shifted in place of padded: the nodule is off its centre."""
    last_start = np.maximum(np.array(hu.shape) - side, 0)
    start = np.clip(np.asarray(voxel) - side // 2, 0, last_start)
    return cut(hu, start + side // 2, side)


def split_by_scan(records, seed):
    """Scans split in place of patients: one patient's scans in training and in test."""
    splits = split_patients([record["seriesuid"] for record in records], seed)
    return [record | {"split": splits[record["seriesuid"]]} for record in records]


# Beyond the thesis

def flips_as_independent(labels, rows=None):
    """Eight flips of one nodule counted as eight nodules."""
    return np.ones(len(labels))


def ties_as_wins(labels, scores, weights=None):
    """The area under the ROC curve with a tie counted as the right order."""
    labels = np.asarray(labels, bool)
    scores = np.asarray(scores)
    weights = np.ones(len(labels)) if weights is None else np.asarray(weights)
    wins = scores[labels][:, None] >= scores[~labels]
    pairs = weights[labels][:, None] * weights[~labels]
    return float((pairs * wins).sum() / pairs.sum())


def area_without_weights(labels, scores, weights=None):
    """The area under the ROC curve that counts a nodule as often as the split has flips of it."""
    return roc_auc(labels, scores)


def precision_by_trapezia(labels, scores, weights=None):
    """Precision joined by straight lines between thresholds, which promises what none reaches."""
    counts = evaluate.count_at_thresholds(labels, scores, weights)
    recall = np.append(0, counts.tp / counts.positives)
    precisions = counts.tp / (counts.tp + counts.fp)
    return float(np.trapezoid(np.append(precisions[0], precisions), recall))


def threshold_on_the_test_set(arm, repeat, test, validation):
    """The threshold of the best F1 chosen on the very set on which that F1 is reported."""
    return evaluate.best_threshold(test.labels, test.scores[arm][repeat], test.weights)


def percentile_bootstrap(estimate, influences):
    """A percentile bootstrap over scans, which is too narrow where there are few of them."""
    rng = np.random.default_rng(0)
    drawn = rng.integers(len(influences), size=(2000, len(influences)))
    means = estimate + influences[drawn].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def references_without_flips(dataset, split, seed):
    """Nodules of a GAN that was trained on flipped ones compared with unflipped ones."""
    return first_flips(dataset, split)


def control_with_fewer_steps(arm, run, dataset):
    """The control trained for as many epochs as the mixed arm: half of its steps."""
    positives, _ = train_classifier.arm_pools(arm, run, dataset)
    return len(positives)


# The table

class Wrong(NamedTuple):
    """A row of the table. A mistake that needs several functions has the others in `more`."""
    function: object    # the wrong one
    target: str         # whose place it takes: file.function, or file.Class.method
    guard: str          # the id whose tests must fail
    more: tuple = ()    # of (function, target)

    @property
    def says(self):
        """What the mistake is, in a line."""
        return inspect.getdoc(self.function).splitlines()[0]


ROWS = (
    # 1.3.5
    Wrong(one_epsilon_per_batch, "losses.interpolate", "eq_1_3_5_interpolate"),
    Wrong(one_epsilon_per_voxel, "losses.interpolate", "eq_1_3_5_interpolate"),
    Wrong(epsilon_is_one, "losses.interpolate", "eq_1_3_5_interpolate"),
    Wrong(norm_over_channels, "losses.gradient_penalty", "eq_1_3_5_gradient_penalty"),
    Wrong(norm_of_the_batch, "losses.gradient_penalty", "eq_1_3_5_gradient_penalty"),
    Wrong(penalty_without_graph, "losses.gradient_penalty", "eq_1_3_5_gradient_penalty"),
    Wrong(bare_square_root, "losses.gradient_penalty", "eq_1_3_5_gradient_penalty"),
    # 3.3
    Wrong(critic_signs_swapped, "losses.critic_loss", "eq_3_3_1_critic_loss"),
    Wrong(hinge_loss, "losses.critic_loss", "eq_3_3_1_critic_loss"),
    Wrong(penalty_stepped_apart, "losses.critic_loss", "eq_3_3_1_critic_loss"),
    Wrong(fakes_not_detached, "losses.critic_loss", "eq_3_3_1_critic_loss"),
    Wrong(auxiliary_on_reals_only, "losses.critic_loss", "rule_3_3_1_concatenation"),
    Wrong(softmax_twice, "losses.auxiliary_cross_entropy", "eq_3_3_1_auxiliary"),
    Wrong(generator_sign_swapped, "losses.generator_loss", "eq_3_3_2_generator_loss"),
    Wrong(own_prediction_as_truth, "losses.generator_loss", "eq_3_3_2_generator_loss"),
    # 3.1
    Wrong(sigmoid_score, "models.Critic.forward", "rule_3_1_critic"),
    Wrong(batch_norm, "models.norm", "rule_3_1_layer_norm"),
    Wrong(one_hot_reversed, "models.one_hot", "rule_3_1_one_hot"),
    # 4.1. train_gan has draw_latent from models: there alone it is wrong.
    Wrong(epsilon_normal, "train_gan.draw_epsilon", "rule_3_3_1_epsilon"),
    Wrong(two_latents, "train_gan.draw_latent", "rule_3_3_1_latent"),
    Wrong(decay_to_zero_too_early, "train_gan.decayed_rate", "rule_4_1_decay"),
    Wrong(one_to_five, "train_gan.train_epoch", "rule_4_1_five_to_one"),
    Wrong(short_batches_skipped, "train_gan.train_epoch", "rule_4_1_five_to_one"),
    Wrong(reals_used_five_times, "train_gan.train_epoch", "rule_4_1_five_to_one"),
    Wrong(critics_last_z, "train_gan.train_epoch", "rule_4_1_five_to_one"),
    Wrong(batch_drawn_twice, "train_gan.read_batches", "rule_4_1_five_to_one"),
    Wrong(one_share_for_all, "train_gan.accumulate", "rule_4_1_critic_step"),
    # 2
    Wrong(slices_sorted_by_z, "preprocessing.sort_slices", "rule_2_dicom_geometry"),
    Wrong(thickness_for_spacing, "preprocessing.read_dicom", "rule_2_dicom_geometry"),
    Wrong(localizer_kept, "preprocessing.plane_of", "rule_2_dicom_geometry"),
    Wrong(no_rescale, "preprocessing.rescale", "rule_2_rescale"),
    Wrong(direction_ignored, "preprocessing.affine", "rule_2_1_1_resample"),
    Wrong(direction_transposed, "preprocessing.affine", "rule_2_1_1_resample"),
    Wrong(any_flip_is_both, "preprocessing.mirrored_axes", "rule_2_1_1_resample"),
    Wrong(mirror_off_by_one, "preprocessing.far_end", "rule_2_1_1_resample"),
    Wrong(rounded_zoom, "preprocessing.resample", "rule_2_1_1_resample"),
    Wrong(room_air_as_lung, "preprocessing.border_labels", "rule_2_1_3_lungs"),
    Wrong(axes_transposed, "preprocessing.nearest_voxel", "rule_2_1_4_centre"),
    Wrong(crop_shifted, "preprocessing.cut", "rule_2_1_4_padding"),
    Wrong(split_by_scan, "preprocessing.split_records", "rule_2_1_5_split"),
    # Beyond the thesis
    Wrong(flips_as_independent, "evaluate.flip_weights", "rule_beyond_flip_weight"),
    Wrong(ties_as_wins, "evaluate.roc_auc", "eq_beyond_roc_auc"),
    Wrong(area_without_weights, "evaluate.roc_auc", "rule_beyond_flip_weight"),
    Wrong(precision_by_trapezia, "evaluate.average_precision", "eq_beyond_average_precision"),
    Wrong(threshold_on_the_test_set, "evaluate.chosen_threshold",
          "rule_beyond_best_threshold"),
    Wrong(percentile_bootstrap, "evaluate.t_interval", "eq_beyond_t_interval"),
    Wrong(references_without_flips, "evaluate.one_flip_each", "rule_beyond_quality_flips"),
    Wrong(control_with_fewer_steps, "train_classifier.positives_per_epoch",
          "rule_beyond_equal_steps"),
)
WRONG = {row.function.__name__: row for row in ROWS}


# Put one in place

def replacements(name):
    """Every (wrong function, target) of a mistake."""
    row = WRONG[name]
    return [(row.function, row.target), *row.more]


def locate(name, target):
    """The module or class that holds the target, and the target's name in it."""
    module, *path, attribute = target.split(".")
    owner = importlib.import_module(module)
    for step in path:
        owner = getattr(owner, step, None)
    if not hasattr(owner, attribute):
        raise LookupError(f"tests/wrong_versions.py: {name} takes the place of {target}, which does "
                          "not exist any more: in ROWS, name the function that has its job now")
    return owner, attribute


def install(name):
    """Put a mistake in place in this process, in every file of ours that has the right function.

    A function is replaced in the file that defines it and in those that imported it by name; where
    the target only imported it, in the target alone.
    """
    modules = [importlib.import_module(module) for module in MODULES]
    for function, target in replacements(name):
        owner, attribute = locate(name, target)
        right = getattr(owner, attribute)
        setattr(owner, attribute, function)
        if right.__module__ != target.split(".")[0]:
            continue

        for module in modules:
            for key, value in list(vars(module).items()):
                if value is right:
                    setattr(module, key, function)


def show(name):
    """The text for a lecture: what the mistake is, the right function's source, the wrong one's."""
    lines = [f"{name}: {WRONG[name].says}"]
    for function, target in replacements(name):
        owner, attribute = locate(name, target)
        right = getattr(owner, attribute)
        lines += [f"\nright: {target}\n", inspect.getsource(right).rstrip()]
        lines += [f"\nwrong: tests/{Path(__file__).name}\n", inspect.getsource(function).rstrip()]
    return "\n".join(lines) + "\n"


def list_of_names():
    """A line for each mistake: its name and what it is."""
    return "\n".join(f"{name:<26}{row.says}" for name, row in WRONG.items())


def check_name(name):
    """Raise Refusal where no mistake has this name."""
    remedy = (lungaug.suggestion(name, WRONG)
              or "python tests/wrong_versions.py --list shows the names")
    lungaug.check(name in WRONG, name, "no published mistake has this name", remedy)


# Run a stage with one in place

def run_stage(name, script, words):
    """Run a stage in this process with a mistake in place. Returns its exit status."""
    scripts = [f"{stage}.py" for stage in lungaug.STAGES]
    remedy = lungaug.suggestion(script, scripts) or f"give one of {', '.join(scripts)}"
    lungaug.check(script in scripts, script, "is no stage", remedy)

    warning = f"MADE WITH A MISTAKE, {name}: {WRONG[name].says}"
    print(warning, flush=True)
    install(name)
    mark_files(name, warning)
    # Where worker processes are started anew, they read it at the end of this file.
    os.environ["LUNGAUG_WRONG"] = name

    sys.argv = [script, *words]
    status = importlib.import_module(Path(script).stem).main()
    print(warning, flush=True)
    return status


def mark_files(name, warning):
    """Let what a stage leaves name the mistake: the settings of its files, and its page.

    So a right training is not resumed with the mistake, and the report says what it shows.
    """
    settings_of = lungaug.settings_of
    save_page = lungaug.save_page

    def marked_settings_of(options, record):
        return settings_of(options, record) | {"mistake": name}

    def save_marked_page(folder, options, items):
        heading, *rest = items
        save_page(folder, options, [heading, lungaug.Text(warning), *rest])

    lungaug.settings_of = marked_settings_of
    lungaug.save_page = save_marked_page


# Does each guard fail?

def run_guard(name):
    """{test: Verdict} of a mistake's guard, with the mistake in place."""
    # audit imports this file, so it cannot be imported before this file is complete.
    import audit

    guard = WRONG[name].guard
    return audit.verdicts_by_id(select=guard, wrong=name).get(guard, {})


def check_guards(names):
    """Put each mistake in place and run its guard. Returns the exit status."""
    for name in names:
        for _, target in replacements(name):
            locate(name, target)

    missed = 0
    with ThreadPoolExecutor(2) as pool:
        for name, results in zip(names, pool.map(run_guard, names)):
            failed = not all(found.passed for found in results.values())
            verdict = "caught" if failed else "MISSED"
            if not results:
                verdict = "NOT RUN"
            print(f"{verdict:<8}{name:<26}{WRONG[name].guard} ({len(results)} tests)", flush=True)
            if not failed:
                missed += 1

    print(f"{len(names) - missed} of {len(names)} mistakes caught by their guards.")
    return 1 if missed else 0


def main():
    # What follows -- is a stage's own command, which argparse must not read.
    words = sys.argv[1:]
    stage_words = []
    if "--" in words:
        place = words.index("--")
        stage_words = words[place + 1:]
        words = words[:place]

    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        usage="python tests/%(prog)s [NAME] [-- STAGE.py [options of the stage]]")
    parser.add_argument("name", nargs="?", metavar="NAME", help="one mistake")
    parser.add_argument("--only", dest="name_again", metavar="NAME", help="the same")
    parser.add_argument("--list", action="store_true", help="list the names, a line each")
    options = parser.parse_args(words)
    if options.list:
        print(list_of_names())
        return 0

    name = options.name or options.name_again
    if name:
        check_name(name)
    if not stage_words:
        return check_guards([name] if name else list(WRONG))
    lungaug.check(name, "--", "a stage needs the name of the mistake before it",
                  "python tests/wrong_versions.py --list shows the names")
    return run_stage(name, stage_words[0], stage_words[1:])


if __name__ == "__mp_main__" and os.environ.get("LUNGAUG_WRONG"):
    install(os.environ["LUNGAUG_WRONG"])

if __name__ == "__main__":
    lungaug.command(main)
