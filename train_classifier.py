"""Augmentation and classifier training: sections 4.2, 4.3 and 4.4.

    python train_classifier.py --run runs/demo                  # after train_gan.py
    python train_classifier.py --run runs/demo --overwrite      # draw and train anew; the GAN stays

The GAN generates cubes, its critic scores them, the best are selected (4.3); then classifiers are
trained (4.4, 5.2): on real data with conventional augmentation, on real and generated data mixed,
on generated data alone; and, as a control, on real data for as many steps as the mixed data take.
Each is trained --repeats times. Leaves <run>/classifiers: generated/positive.npy and negative.npy;
samples.png; checkpoint.pt and log.jsonl of real, longer, mixed and fake.
"""

import math
from functools import partial
from pathlib import Path
from typing import NamedTuple

import lungaug
from lungaug import check

import numpy as np
import torch

import preprocessing
from losses import classifier_loss
from models import Classifier, Critic, Generator, draw_latent, memory_layout


ARMS = ("real", "longer", "mixed", "fake")
CLASS_NAMES = {1: "positive", 0: "negative"}
# Adam's two rates of forgetting, of section 4.4.1   [num_4_4_adam]
BETAS = (0.9, 0.999)
# Cubes that are generated at a time.
BATCH = 64
# Rejected cubes that are kept, for the pictures.
REJECTED = 16
# Cubes in a row of samples.png.
SAMPLES = 16
# What to do where a file could not be read for want of memory.
RUN_AGAIN = "run the same command again"


# 4.2 Conventional augmentation: the eight flips of each positive, and no noise, which would blur
# the Hounsfield scale

def conventional_positives(dataset, split):
    """Every positive of a split with its eight flips   [rule_4_2_flips]

    Returns rows (8n, 4) and flips (8n,): fewer where cubes were split (--split cube).
    """
    return preprocessing.positives_with_flips(dataset, split)


def no_flips(rows):
    """The rows (n, 4) as they are, with the flip 0, which is none: rows, flips (n,)"""
    return rows, np.zeros(len(rows), int)


# 4.3 Generative augmentation: generate, score, select

def select(scores, probabilities, score_threshold, class_probability):
    """f(x) ≥ threshold and ŷ(class) ≥ p: real enough, confidently of its class   [rule_4_3_select]

    scores f(x), probabilities ŷ of the requested class: (n,). Returns bool (n,). The thesis asks
    for a critic loss below a threshold. That loss is −f(x): the score must be above a threshold.
    """
    is_real_enough = scores >= score_threshold
    is_sure = probabilities >= class_probability
    return is_real_enough & is_sure


def score_reals(critic, dataset, label, device, most=2048):
    """Critic scores f(x) of the real training cubes of one class, (n,).

    Positives are scored with their flips. Where there are more than `most` cubes, that many of them
    are scored, evenly chosen: they are enough for a quantile.
    """
    if label == 1:
        rows, flips = conventional_positives(dataset, "train")
    else:
        rows, flips = no_flips(dataset.negatives["train"])
    chosen = lungaug.evenly(len(rows), most)
    rows = rows[chosen]
    flips = flips[chosen]

    def read_cubes(numbers):
        return preprocessing.read_cubes(dataset, rows[numbers], flips[numbers])

    def score(cubes):
        return critic(cubes)[0]

    return lungaug.predict(score, read_cubes, len(rows), device)


def to_stored_hu(cubes):
    """Cubes (n, 1, c, c, c) in [-1, 1], on any device, as int16 HU (n, c, c, c)."""
    hu = preprocessing.denormalize(cubes[:, 0].cpu().numpy())
    return np.rint(hu).astype(np.int16)


def best_rejected(rejected, scores, cubes):
    """The list of (score, cube) with these cubes added, best score first, at most REJECTED long.

    It is cut after every batch, because a GAN of few epochs may have thousands of cubes rejected.
    """
    pairs = [*rejected, *zip(scores, cubes)]
    pairs.sort(key=lambda pair: -pair[0])
    return pairs[:REJECTED]


class Generated(NamedTuple):
    """What `generate` made of one class; cubes are int16 HU (n, c, c, c).

    rejected: those of the rejected that scored best, at most REJECTED. rate: accepted per attempt.
    """
    accepted: np.ndarray
    rejected: np.ndarray
    rate: float


@torch.no_grad()
def generate(generator, critic, label, requested, threshold, options, device):
    """Generate cubes of a class, score them, select   [rule_4_3_generate_score_select]

    requested: how many cubes to accept; after --attempts times as many it ends with fewer.
    threshold: the lowest score f(x) that passes. Returns Generated; its rejected cubes are for the
    pictures of a GAN of which few or none pass.
    """
    rng = lungaug.torch_stream(options.seed, "generate", label)
    progress = lungaug.Progress(f"generated {CLASS_NAMES[label]}s", requested)
    limit = requested * options.attempts
    attempts = 0
    n_accepted = 0
    accepted_batches = []
    # Pairs of score and cube, the best score first.
    rejected = []

    while n_accepted < requested and attempts < limit:
        # Generate. z is drawn on the CPU, so that it is the same for every device.
        labels = torch.full((min(BATCH, limit - attempts),), label)
        latent = draw_latent(labels, rng)
        cubes = generator(latent.to(device))
        attempts += len(labels)

        # Score.
        scores, logits = critic(cubes)
        probabilities = logits.softmax(1)[:, label]
        passes = select(scores, probabilities, threshold, options.class_probability)

        # Select.
        scores = scores.cpu().numpy()
        passes = passes.cpu().numpy()
        hu = to_stored_hu(cubes)
        accepted_batches.append(hu[passes])
        n_accepted += int(passes.sum())
        rejected = best_rejected(rejected, scores[~passes], hu[~passes])
        progress.update(min(requested, n_accepted), f"{attempts} attempts")

    # The last batch may have brought more than were requested.
    accepted = np.concatenate(accepted_batches)[:requested]
    rejected_cubes = [cube for _, cube in rejected]
    shape = (len(rejected), *accepted.shape[1:])
    rejected_cubes = np.array(rejected_cubes, np.int16).reshape(shape)
    return Generated(accepted, rejected_cubes, n_accepted / attempts)


def load_gan(run, dataset, device):
    """Generator and critic of <run>/gan/checkpoint.pt, trained on this dataset. Raises Refusal."""
    path = run / "gan" / "checkpoint.pt"
    remedy = f"run python train_gan.py --run {run} first"
    again = f"run python train_gan.py --run {run} --overwrite"
    state = lungaug.load_checkpoint(path, remedy, again, prepared=dataset.fingerprint)

    with lungaug.refuse_on_error(path, again):
        cube = state["settings"]["cube"]
        width = state["settings"]["width"]
        generator = Generator(cube, width)
        generator.load_state_dict(state["generator"])
        critic = Critic(cube, width)
        critic.load_state_dict(state["critic"])

    generator.eval().requires_grad_(False).to(device)
    critic.eval().requires_grad_(False).to(device)
    return generator, critic


def generate_class(label, networks, folder, dataset, options, device):
    """Generate one class and save its cubes. Returns its row of generated.json.

    networks: generator and critic; folder: for <class>.npy and <class>_rejected.npy.
    """
    generator, critic = networks
    name = CLASS_NAMES[label]

    # Score the real cubes of the class: a generated one must reach a quantile of their scores.
    real_scores = score_reals(critic, dataset, label, device)
    threshold = float(np.quantile(real_scores, options.score_quantile))

    # Request, of either class, as many cubes as there are real positives with their flips, or
    # --generated times as many.
    positives, _ = conventional_positives(dataset, "train")
    requested = max(1, round(options.generated * len(positives)))
    generated = generate(generator, critic, label, requested, threshold, options, device)

    # Save them.
    lungaug.write(folder / f"{name}.npy", generated.accepted)
    lungaug.write(folder / f"{name}_rejected.npy", generated.rejected)

    row = {"requested": requested, "accepted": len(generated.accepted), "rate": generated.rate,
           "score_threshold": threshold}
    print_class(name, row, options)
    return row


def print_class(name, row, options):
    """Say how many cubes of a class passed, and what to change where they are too few."""
    print(f"Generated {name}s: {row['accepted']} of {row['requested']} requested, acceptance rate "
          f"{row['rate']:.1%} (score ≥ {row['score_threshold']:.2f}, "
          f"class probability ≥ {options.class_probability}).", flush=True)
    if row["accepted"] < row["requested"]:
        # What is 0 cannot be lowered.
        can_be_lowered = []
        if options.score_quantile > 0:
            can_be_lowered.append(f"--score-quantile (now {options.score_quantile})")
        if options.class_probability > 0:
            can_be_lowered.append(f"--class-probability (now {options.class_probability})")
        advice = f", or lower {' or '.join(can_be_lowered)}" if can_be_lowered else ""
        print(f"  Too few passed within {options.attempts} attempts per requested cube. Train the "
              f"GAN longer{advice}.", flush=True)


def generated_settings(run, dataset, options):
    """What generated cubes depend on: options, the prepared data, the GAN."""
    remedy = f"run python train_gan.py --run {run} first"
    settings = lungaug.settings_of(options, "generated")
    settings["prepared"] = dataset.fingerprint
    settings["gan_crc32"] = lungaug.file_crc32(run / "gan" / "checkpoint.pt", remedy)
    return settings


def is_whole(folder, checksums):
    """Whether each file of {name: CRC-32} exists in the folder and is as it was written."""
    for name, crc32 in checksums.items():
        path = folder / name
        if not path.exists() or lungaug.file_crc32(path, RUN_AGAIN) != crc32:
            return False
    return True


def read_generated(folder, settings, remedy):
    """The classes that generated.json records; None where it or a file of cubes is missing.

    Raises Refusal where they were made with other settings.
    """
    path = folder / "generated.json"
    if not path.exists():
        return None

    with lungaug.refuse_on_error(path, remedy):
        record = lungaug.read_json(path, remedy)
        # Cubes made with a deliberate mistake, of tests/wrong_versions.py, must not be used
        # without it.
        expected = {"mistake": None} | settings
        lungaug.require_settings(path, record["settings"], expected, remedy)
        classes = record["classes"]
        for name in CLASS_NAMES.values():
            for field in ("requested", "accepted", "rate", "score_threshold"):
                check(isinstance(classes[name][field], (int, float)), path,
                      f"{field} of the {name}s is no number", remedy)
        return classes if is_whole(folder, record["files"]) else None


def generate_classes(run, dataset, options, device):
    """Generate each class, unless an earlier command with the same settings did.

    Returns {"positive": {"requested", "accepted", "rate", "score_threshold"}, "negative": …}.
    """
    folder = run / "classifiers" / "generated"
    path = folder / "generated.json"
    settings = generated_settings(run, dataset, options)
    remedy = (f"give the same options, or run python train_classifier.py --run {run} --overwrite, "
              "which keeps the GAN")
    classes = read_generated(folder, settings, remedy)
    if classes is not None:
        return classes

    # Remove the record first, so that a kill leaves no old record beside new cubes.
    path.unlink(missing_ok=True)

    # Generate. The checksums let the next command see whether the files are still whole.
    networks = load_gan(run, dataset, device)
    classes = {}
    checksums = {}
    for label, name in CLASS_NAMES.items():
        classes[name] = generate_class(label, networks, folder, dataset, options, device)
        for file in (f"{name}.npy", f"{name}_rejected.npy"):
            checksums[file] = lungaug.file_crc32(folder / file, RUN_AGAIN)

    lungaug.write(path, {"settings": settings, "classes": classes, "files": checksums})
    return classes


def open_generated(run, dataset, name):
    """Generated cubes of a run, by the name of their file: int16 HU (n, c, c, c), not in memory."""
    path = run / "classifiers" / "generated" / f"{name}.npy"
    return preprocessing.open_array(path, dataset.cube)


def middle_slices(cubes, count):
    """The middle axial slices of cubes (n, c, c, c) in [-1, 1], n ≤ count, in the lung window.

    Then black: uint8 (count, c, c).
    """
    side = cubes.shape[-1]
    slices = np.zeros((count, side, side), np.uint8)
    hu = preprocessing.denormalize(cubes[:, side // 2])
    slices[:len(cubes)] = lungaug.windowed(hu, "lung window")
    return slices


def draw_samples(run, dataset, count=SAMPLES):
    """Draw samples.png: middle axial slices, one row each.

    The rows are real and generated positives, real and generated negatives. Where fewer cubes were
    accepted, the rejected with the best scores follow, and then black.
    """
    sheet_rows = []
    for name, rows in (("positive", dataset.positives["train"]),
                       ("negative", dataset.negatives["train"])):
        # Real cubes, evenly chosen.
        chosen = rows[lungaug.evenly(len(rows), count)]
        real = preprocessing.read_cubes(dataset, chosen)[:, 0]
        sheet_rows.append(middle_slices(real, count))

        # Generated cubes, the first ones.
        accepted = open_generated(run, dataset, name)[:count]
        rejected = open_generated(run, dataset, f"{name}_rejected")
        generated = np.concatenate([accepted, rejected])[:count]
        sheet_rows.append(middle_slices(preprocessing.normalize(generated), count))

    sheet = lungaug.tile(np.concatenate(sheet_rows), count)
    pixels = lungaug.png(sheet, lungaug.zoom(dataset.cube, 48))
    lungaug.write(run / "classifiers" / "samples.png", pixels)


# 4.4, 5.2 Lung nodule detection classifier: its three data sets

class Pool:
    """Cubes of one class to train on, numbered: real ones first, then generated ones.

    real: rows (m, 4) and flips (m,) of the dataset; generated: int16 HU (n, c, c, c). Either may be
    missing.
    """

    def __init__(self, dataset, real=None, generated=None):
        if real is None:
            real = no_flips(np.zeros((0, 4), np.int32))
        if generated is None:
            generated = np.zeros((0, dataset.cube, dataset.cube, dataset.cube), np.int16)

        self.dataset = dataset
        self.rows, self.flips = real
        self.generated = generated

    def __len__(self):
        return len(self.rows) + len(self.generated)

    def read(self, numbers):
        """The cubes of these numbers, (n,): (n, 1, c, c, c) in [-1, 1], the real ones first."""
        is_real = numbers < len(self.rows)
        real = numbers[is_real]
        real_cubes = preprocessing.read_cubes(self.dataset, self.rows[real], self.flips[real])

        generated = numbers[~is_real] - len(self.rows)
        generated_cubes = preprocessing.normalize(self.generated[generated])[:, None]
        return np.concatenate([real_cubes, generated_cubes])


def arm_pools(arm, run, dataset):
    """The positives and the negatives of an arm, a Pool each   [rule_5_2_arms]

    real, longer: real cubes. mixed: real and generated positives, real negatives. fake: generated
    ones.
    """
    real_positives = conventional_positives(dataset, "train")
    real_negatives = no_flips(dataset.negatives["train"])
    if arm in ("real", "longer"):
        return Pool(dataset, real_positives), Pool(dataset, real_negatives)

    generated_positives = open_generated(run, dataset, "positive")
    if arm == "mixed":
        return Pool(dataset, real_positives, generated_positives), Pool(dataset, real_negatives)

    generated_negatives = open_generated(run, dataset, "negative")
    positives = Pool(dataset, generated=generated_positives)
    negatives = Pool(dataset, generated=generated_negatives)
    return positives, negatives


def positives_per_epoch(arm, run, dataset):
    """|mixed| in `longer`, else each positive of the arm once   [rule_beyond_equal_steps]

    An epoch of the mixed arm has more positives than one of the real arm, and so more steps of the
    optimizer. `longer` is its control: real cubes alone, in as many steps, each of them as large
    and at the same learning rate. What mixed gains over real may be training time; what it gains
    over longer is not.
    """
    rows, _ = conventional_positives(dataset, "train")
    if arm == "real":
        return len(rows)
    generated = open_generated(run, dataset, "positive")
    if arm == "fake":
        return len(generated)
    return len(rows) + len(generated)


# 4.4.1 Training

def learning_rate(epoch, early, late, decay):
    """10⁻³, and 10⁻⁴ from epoch 30 on   [rule_4_4_decay]

    epoch counts from 0; early, late: the two rates; decay: the epoch, 30 in the thesis.
    """
    return early if epoch < decay else late


def balanced_batches(positives, negatives, size, rng, drawn=None):
    """Numbers of an epoch's batches, half positive, half negative   [rule_4_4_balanced]

    positives, negatives: how many there are. drawn: how many positives the epoch takes, in pass
    after pass over all of them, each pass in a new order; one pass where it is not given. As many
    negatives are drawn, from all of them.
    """
    if drawn is None:
        drawn = positives
    passes = math.ceil(drawn / positives)
    order = np.concatenate([rng.permutation(positives) for _ in range(passes)])[:drawn]
    for start in range(0, drawn, size // 2):
        positive_numbers = order[start:start + size // 2]
        negative_numbers = rng.integers(negatives, size=len(positive_numbers))
        yield positive_numbers, negative_numbers


def steps_per_epoch(drawn, options):
    """How many batches `balanced_batches` makes of so many positives."""
    return math.ceil(drawn / (options.batch_size // 2))


def f1_score(labels, predictions):
    """F1 = 2·TP/(2·TP + FP + FN); labels, predictions (n,) of 0 and 1; 0 where the ratio is 0/0"""
    true_positives = (labels * predictions).sum()
    return float(2 * true_positives / max(1, labels.sum() + predictions.sum()))


def validate(classifier, dataset, device):
    """F1 and cross-entropy on the validation set, positives with their flips.

    The loss is the mean of the two classes' means, to compare with that of the balanced batches.
    """
    rows, flips, labels = preprocessing.labelled(dataset, "validation")

    def read_cubes(numbers):
        return preprocessing.read_cubes(dataset, rows[numbers], flips[numbers])

    logits = lungaug.predict(classifier, read_cubes, len(rows), device)
    f1 = f1_score(labels, logits.argmax(1))

    # A class without cubes has no mean: a validation set may be without nodules.
    logits = torch.from_numpy(logits)
    truth = torch.from_numpy(labels)
    class_losses = []
    for label in (0, 1):
        of_class = truth == label
        if of_class.any():
            class_losses.append(classifier_loss(logits[of_class], truth[of_class]).item())

    return f1, float(np.mean(class_losses))


class Trainer:
    """All that training a classifier changes: the network, its optimizer, the randomness, the best.

    A checkpoint is its `state`, as in train_gan.py. classes: what was generated, as
    `generate_classes` returns it; None for the arm real, which does not depend on it. repeat: from
    1 on; the arms of one repeat start with the same weights.
    """

    def __init__(self, arm, options, dataset, classes, device, repeat=1):
        self.arm = arm
        self.repeat = repeat
        self.options = options
        self.device = device
        self.epoch = 0
        self.best = {"f1": -1.0, "loss": math.inf, "epoch": -1, "classifier": None}

        # A checkpoint must agree with the command that resumes it on these. `epochs` is not among
        # them, for a training may be made longer.
        self.settings = lungaug.settings_of(options, "classifiers")
        self.settings["generated"] = classes
        self.settings["prepared"] = dataset.fingerprint

        # Build the network. The arms start with the same weights; they differ in their data and,
        # as an epoch passes over the positives once, in their steps per epoch.
        names = [] if repeat == 1 else [repeat]
        lungaug.seed_weights(options.seed, "classifier weights", *names)
        layout = {"device": device, "memory_format": memory_layout(device)}
        self.classifier = Classifier(dataset.cube).to(**layout)
        parameters = self.classifier.parameters()
        self.optimizer = torch.optim.Adam(parameters, options.learning_rate, BETAS)

        # Seed what is drawn during the training.
        self.draws = lungaug.stream(options.seed, "classifier batches", arm, *names)

    def state(self):
        """The checkpoint: numbers, lists, and tensors."""
        return {
            "settings": self.settings,
            "epochs": self.options.epochs,
            "epoch": self.epoch,
            "best": self.best,
            "classifier": self.classifier.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "draws": self.draws.bit_generator.state,
        }

    def restore(self, state):
        """Continue from a checkpoint."""
        self.epoch = state["epoch"]
        # Take the values and keep our own keys: pickle stores a string once and refers to it when
        # the same object comes again, so other string objects would give a checkpoint other bytes.
        self.best = self.best | state["best"]
        self.classifier.load_state_dict(state["classifier"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.draws.bit_generator.state = state["draws"]


def read_batch(pools, numbers, device):
    """A batch's cubes (n, 1, c, c, c) in [-1, 1] and labels (n,), positives first.

    pools, numbers: those of the positives and of the negatives.
    """
    positives, negatives = pools
    positive_numbers, negative_numbers = numbers
    cubes = np.concatenate([positives.read(positive_numbers), negatives.read(negative_numbers)])
    labels = np.repeat([1, 0], [len(positive_numbers), len(negative_numbers)])
    return torch.from_numpy(cubes).to(device), torch.from_numpy(labels).to(device)


def train_epoch(trainer, pools, drawn):
    """Train on so many positives and on as many negatives, batch by batch. Returns the mean loss.

    pools: the positives and the negatives, as `arm_pools` returns them; drawn: of
    `positives_per_epoch`.
    """
    options = trainer.options
    positives, negatives = pools

    # Set this epoch's learning rate.
    rate = learning_rate(trainer.epoch, options.learning_rate, options.late_learning_rate,
                         options.decay_epoch)
    for group in trainer.optimizer.param_groups:
        group["lr"] = rate

    losses = []
    batches = balanced_batches(len(positives), len(negatives), options.batch_size, trainer.draws,
                               drawn)

    def read(numbers):
        return read_batch(pools, numbers, trainer.device)

    for cubes, labels in lungaug.read_ahead(read, batches):
        # Step down the gradient.
        loss = classifier_loss(trainer.classifier(cubes), labels)
        trainer.optimizer.zero_grad()
        loss.backward()
        trainer.optimizer.step()
        losses.append(loss.item())

    trainer.epoch += 1
    return float(np.mean(losses))


def keep_best(trainer, f1, loss):
    """Keep the weights of the best validation F1, ties by the lower loss   [rule_5_2_best_kept]

    f1, loss: of the epoch that has just ended. Of epochs with both equal, the first is kept.
    """
    best = trainer.best
    is_better = f1 > best["f1"]
    is_better_tie = f1 == best["f1"] and loss < best["loss"]
    if is_better or is_better_tie:
        # Copy the weights: the next step of the optimizer changes them in place.
        state = trainer.classifier.state_dict()
        weights = {name: tensor.cpu().clone() for name, tensor in state.items()}
        trainer.best = {"f1": f1, "loss": loss, "epoch": trainer.epoch, "classifier": weights}


class Training(NamedTuple):
    """One classifier to train: all that its training changes, its data, its folder.

    pools: the positives and the negatives; drawn: how many positives an epoch takes.
    """
    trainer: Trainer
    pools: tuple
    drawn: int
    dataset: preprocessing.Dataset
    folder: Path


def train(training, progress):
    """Train, validate, keep the best, log, save.

    Every epoch is a checkpoint, so that a stopped run resumes and ends with the same bytes.
    progress: of all trainings together.
    """
    trainer = training.trainer
    folder = training.folder
    while trainer.epoch < trainer.options.epochs:
        # Train.
        train_loss = train_epoch(trainer, training.pools, training.drawn)

        # Validate.
        f1, loss = validate(trainer.classifier, training.dataset, trainer.device)
        check(math.isfinite(loss), folder / "checkpoint.pt",
              f"the loss is NaN or infinite in epoch {trainer.epoch}",
              "start over with a lower --learning-rate and --overwrite")

        # Keep the best.
        keep_best(trainer, f1, loss)

        # Log.
        row = {"epoch": trainer.epoch, "train_loss": train_loss, "validation_loss": loss,
               "validation_f1": f1}
        lungaug.append_log(folder / "log.jsonl", row)

        # Save.
        lungaug.save_checkpoint(trainer, folder)

        # As short as this, the line of progress fits on a terminal of 80 columns.
        numbers = f"loss {train_loss:.3f}, F1 {f1:.3f}"
        progress.advance(f"{trainer.arm}, repeat {trainer.repeat}: {numbers}")


def name_of(trainer):
    """An arm's name, with the number of the repeat where there is more than one."""
    if trainer.options.repeats == 1:
        return trainer.arm
    return f"{trainer.arm}, repeat {trainer.repeat} of {trainer.options.repeats}"


def missing_class(arm, run, dataset):
    """The class that an arm has no cubes of, "positives" or "negatives"; None where it has both.

    Without generated positives there is no mixed arm, and no control of it.
    """
    if arm != "real" and len(open_generated(run, dataset, "positive")) == 0:
        return "positives"
    _, negatives = arm_pools(arm, run, dataset)
    if len(negatives) == 0:
        return "negatives"
    return None


def open_training(arm, run, dataset, options, classes, device, repeat=1):
    """The Training of an arm, at its checkpoint or new; None where there is nothing to train on.

    classes: what was generated, as `generate_classes` returns it; None for the arm real.
    """
    folder = lungaug.arm_folder(run, arm, repeat)
    missing = missing_class(arm, run, dataset)
    if missing:
        if repeat == 1:
            print(f"{arm}: no generated {missing} to train on; skipped.", flush=True)
        # Remove the classifier of an earlier GAN, so that it is not taken for this one's.
        lungaug.remove(folder, "checkpoint.pt", "log.jsonl")
        return None

    trainer = Trainer(arm, options, dataset, classes, device, repeat)
    lungaug.resume(trainer, folder)
    lungaug.rewind_log(folder / "log.jsonl", trainer.epoch)
    pools = arm_pools(arm, run, dataset)
    drawn = positives_per_epoch(arm, run, dataset)
    return Training(trainer, pools, drawn, dataset, folder)


def open_trainings(run, dataset, options, classes, device):
    """The trainings of every arm and repeat that has something to train on.

    They begin in this order, repeat by repeat: all arms of one, then of the next.
    """
    trainings = []
    for repeat in range(1, options.repeats + 1):
        for arm in ARMS:
            generated = None if arm == "real" else classes
            training = open_training(arm, run, dataset, options, generated, device, repeat)
            if training:
                trainings.append(training)
    return trainings


def train_all(trainings, run, device):
    """Train classifiers side by side, each to its last epoch; say how each has ended."""
    epochs = sum(training.trainer.options.epochs for training in trainings)
    done = sum(training.trainer.epoch for training in trainings)
    if done < epochs:
        # Until the stage has its page again it is not finished, for evaluate.py: before its end
        # some arms have more epochs than others.
        lungaug.remove(run / "classifiers", "options.json")

        progress = lungaug.Progress("epochs", epochs)
        progress.update(done)
        calls = [partial(train, training, progress) for training in trainings]
        lungaug.side_by_side(calls, device)

    for training in trainings:
        print_training(training)


def print_training(training):
    """Say what a classifier was trained on, and how good its best epoch is."""
    trainer = training.trainer
    positives, negatives = training.pools
    steps = steps_per_epoch(training.drawn, trainer.options)
    best = trainer.best
    print(f"{name_of(trainer)}: {len(positives)} positives, {len(negatives)} negatives, "
          f"{steps} steps per epoch; best validation F1 {best['f1']:.3f}, at epoch "
          f"{best['epoch']}.", flush=True)


# 4.3 on the page, and the command

def page(classes, dataset):
    """What the report shows of section 4.3."""
    rows = []
    for name, row in classes.items():
        numbers = (row["requested"], row["accepted"], row["rate"], row["score_threshold"])
        cells = [lungaug.with_minus(lungaug.format_number(number)) for number in numbers]
        rows.append((name, *cells))
    head = ("class", "requested", "accepted", "acceptance rate", "score at least")
    return [
        lungaug.Heading("4.3 Generative augmentation"),
        lungaug.Table("Requested and accepted samples. A cube is accepted whose score f(x) is at "
                      "least a quantile of the real cubes' scores (--score-quantile: 0 is their "
                      "lowest, 0.5 their median), and of whose class the critic is sure "
                      "(train_classifier.select).", head, rows),
        lungaug.Figure("Real cubes and generated ones, each the middle axial slice in the lung "
                       "window. Compare a row with the one below it: are the generated ones as "
                       "sharp, as bright and as different from each other as the real ones? Where "
                       "too few were accepted, the best of the rejected follow, then black.",
                       "samples.png",
                       code=("train_classifier.draw_samples", "train_classifier.generate",
                             "train_classifier.select"),
                       rows=("real, with nodule", "generated, with nodule",
                             "real, without", "generated, without"),
                       pixel_mm=1 / lungaug.zoom(dataset.cube, 48)),
    ]


def main():
    options = lungaug.parse(__doc__, "train_classifier")
    run = options.run
    dataset = preprocessing.open_dataset(run)
    lungaug.apply_preset(options, "train_classifier", dataset.info["preset"])
    device = lungaug.pick_device(options.device)
    # --precision is for the training of the GAN alone.
    lungaug.allow_tf32("float32")
    print(f"Preset {options.preset}, cube {dataset.cube}, on {device}.", flush=True)

    folder = run / "classifiers"
    with lungaug.lock(folder, "training"), preprocessing.keep_prepared(run):
        if options.overwrite:
            # Load the GAN first: where it cannot be used, nothing may be lost.
            load_gan(run, dataset, device)
            lungaug.remove(folder, "**/checkpoint.pt", "**/log.jsonl", "*/generated.json",
                           "options.json")

        classes = generate_classes(run, dataset, options, device)
        draw_samples(run, dataset)
        trainings = open_trainings(run, dataset, options, classes, device)
        train_all(trainings, run, device)

    lungaug.save_page(folder, options, page(classes, dataset))


if __name__ == "__main__":
    lungaug.command(main)
