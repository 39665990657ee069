"""GAN training: section 4.1, the auxiliary classifier Wasserstein GAN with gradient penalty.

    python train_gan.py                              # without prepared scans: synthetic ones first
    python train_gan.py --run runs/luna16            # the thesis preset, on your prepared scans
    python train_gan.py --run runs/demo --epochs 900 # resume from the checkpoint, up to epoch 900
    python train_gan.py --run runs/e1 --prepared runs/demo      # on another run's prepared scans
    torchrun --nproc-per-node 2 -- train_gan.py --run runs/luna16   # on two GPUs

An epoch is five critic iterations (two in the demo) and one generator iteration. Leaves
<run>/gan: checkpoint.pt, log.jsonl (every term of every epoch) and progression.png (a fixed z
through the training); `python evaluate.py` draws figure 7, the loss curves, at any time. Stopped at
any time, the same command resumes from the checkpoint and ends with the same bytes.
"""

import itertools
import math
import os
import time
from collections import deque

import lungaug
from lungaug import check

import numpy as np
import torch
from torch import distributed

import preprocessing
from losses import critic_loss, generator_loss
from models import Critic, Generator, draw_latent, memory_layout


BETAS = (0.0, 0.9)      # 4.1.1   [num_4_1_adam]
FIXED = 4               # samples of each class whose z stays fixed
MOMENTS = 8             # pictures of them during the training, besides the one before it
PROBE = 3               # the remaining time is estimated from this many first epochs
SMOOTHED = 20           # epochs over which the terminal's Wasserstein estimates are averaged


# 4.1.1 Training: α, real batches, labels, ε (z is drawn in models.py)

def auxiliary_scale(epoch, epochs, early, late):
    """α = 1 at the beginning, 10 from the last quarter of the epochs   [rule_4_1_alpha]

    epoch counts from 0; early, late: the two values.
    """
    return early if epoch < 0.75 * epochs else late


def decayed_rate(epoch, epochs, rate, start):
    """η·min(1, (1 − e/E)/(1 − s)): linear to 0 from the share s of E epochs on   [rule_4_1_decay]

    epoch e counts from 0; rate: η, the generator's; start: s, where 1, the thesis', lets η stay as
    it is.
    """
    elapsed = epoch / epochs
    if elapsed <= start:
        return rate
    return rate * (1 - elapsed) / (1 - start)


def draw_batch(dataset, count, rng):
    """Half positives, flipped at random; half negatives, as they are   [rule_4_1_balanced_batch]

    Every cube is of the training set   [rule_2_1_5_training_only]

    Each positive has a flip of its own. Returns cubes (count, 1, c, c, c) in [-1, 1] and labels
    (count,) int64, positives first.
    """
    n_positives = count // 2
    n_negatives = count - n_positives
    positives = dataset.positives["train"]
    negatives = dataset.negatives["train"]
    flips = None
    if dataset.flips is not None:
        # Cubes were split: a nodule's other flips are in the validation or the test set.
        positives, flips = preprocessing.positives_with_flips(dataset, "train")

    # Draw cubes of each class, and flips where every positive has all eight.
    chosen = rng.integers(len(positives), size=n_positives)
    chosen_negatives = rng.integers(len(negatives), size=n_negatives)
    if flips is None:
        chosen_flips = rng.integers(len(preprocessing.FLIPS), size=n_positives)
    else:
        chosen_flips = flips[chosen]

    rows, row_flips, labels = preprocessing.join_classes(
        positives[chosen], chosen_flips, negatives[chosen_negatives])
    return preprocessing.read_cubes(dataset, rows, row_flips), labels


def read_batches(options, dataset, first_epoch):
    """The batches of reals of every critic iteration from an epoch on, read ahead: cubes, labels.

    Each is drawn from a generator that depends on the seed, the epoch and the iteration alone, so
    that a training that is resumed, with whatever number of threads, gets the same ones.
    """
    epochs = range(first_epoch, options.epochs)
    iterations = itertools.product(epochs, range(options.critic_iterations))

    def read(epoch_and_iteration):
        rng = lungaug.stream(options.seed, "gan batches", *epoch_and_iteration)
        return draw_batch(dataset, options.batch_size, rng)

    return lungaug.read_ahead(read, iterations)


def draw_labels(count, rng, device):
    """y_fake, uniform over the two classes   [rule_3_3_1_random_labels]; (count,) int64"""
    return torch.randint(0, 2, (count,), generator=rng).to(device)


def draw_epsilon(count, rng, device):
    """ε ~ U[0, 1], one draw per sample   [rule_3_3_1_epsilon]; (count,)"""
    return torch.rand(count, generator=rng).to(device)


# 4.1.1 What training changes; a checkpoint

class Trainer:
    """All that training changes: two networks, their optimizers, the randomness.

    A checkpoint is its `state`. options: parsed by train_gan.py; dataset: a preprocessing.Dataset.
    """

    def __init__(self, options, dataset, device):
        self.options = options
        self.device = device
        self.epoch = 0
        self.moments = []       # (epoch, cubes) of the fixed z

        # A checkpoint must agree with the command that resumes it on these. `epochs` is not among
        # them, for a training may be made longer, nor is `micro_batch`, which saves memory only.
        self.settings = lungaug.settings_of(options, "gan")
        self.settings["cube"] = dataset.cube
        self.settings["prepared"] = dataset.fingerprint

        # Build the networks.
        lungaug.allow_tf32(options.precision)
        lungaug.seed_weights(options.seed, "gan weights")
        layout = {"device": device, "memory_format": memory_layout(device)}
        self.generator = Generator(dataset.cube, options.width).to(**layout)
        self.critic = Critic(dataset.cube, options.width).to(**layout)
        self.generator_optimizer = adam(self.generator, options.learning_rate)
        self.critic_optimizer = adam(self.critic, options.learning_rate)

        # What an iteration draws; each seeds it anew.
        self.rng = torch.Generator()
        self.seed_iteration(0)

        # Draw the z that stays fixed: negatives, then positives.
        self.fixed_labels = torch.arange(2).repeat_interleave(FIXED).to(device)
        fixed_rng = lungaug.torch_stream(options.seed, "gan fixed z")
        self.fixed_latent = draw_latent(self.fixed_labels, fixed_rng)

    def seed_iteration(self, iteration):
        """Seed `rng`, from which an iteration draws y, z and ε.

        iteration: its number in the epoch; the generator's follows the critic's. The seed depends
        on the run's seed, the epoch and this number alone: a checkpoint needs no state of `rng`.
        """
        seed = lungaug.seed_number(self.options.seed, "gan noise", self.epoch, iteration)
        self.rng.manual_seed(seed)

    def state(self):
        """The checkpoint: numbers, lists, and tensors."""
        return {
            "settings": self.settings,
            "epochs": self.options.epochs,
            "epoch": self.epoch,
            "moments": self.moments,
            "generator": self.generator.state_dict(),
            "critic": self.critic.state_dict(),
            "generator_optimizer": self.generator_optimizer.state_dict(),
            "critic_optimizer": self.critic_optimizer.state_dict(),
        }

    def restore(self, state):
        """Continue from a checkpoint."""
        self.epoch = state["epoch"]
        self.moments = state["moments"]
        self.generator.load_state_dict(state["generator"])
        self.critic.load_state_dict(state["critic"])
        self.generator_optimizer.load_state_dict(state["generator_optimizer"])
        self.critic_optimizer.load_state_dict(state["critic_optimizer"])


def adam(network, learning_rate):
    return torch.optim.Adam(network.parameters(), learning_rate, BETAS)


# 4.1.1 Several processes, and micro-batches

def join_processes(name):
    """Join the processes that torchrun started, if it started this one. Returns the torch.device.

    name: of --device. Under torchrun each process takes a GPU of its own.
    """
    device = lungaug.pick_device(name)
    if "LOCAL_RANK" not in os.environ:
        return device

    if device.type == "cuda":
        device = lungaug.pick_device(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def leave_processes():
    """Leave the other processes, once everything is done with them.

    A process that ends without it may be aborted: threads of PyTorch's may still need Python.
    """
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def process_place():
    """This process' number, from 0 on, and how many there are."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def is_first_process():
    """Whether this process is the one that writes files and speaks, if need be for several."""
    process, _ = process_place()
    return process == 0


def wait_for_all():
    """Wait until every process has come here."""
    _, n_processes = process_place()
    if n_processes > 1:
        distributed.barrier()


def sum_over_processes(gradients, terms):
    """Add up, in place, gradients over all processes; returns the sums of the terms, by name."""
    # One long vector is sent once.
    together = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(together)
    sizes = [gradient.numel() for gradient in gradients]
    for gradient, part in zip(gradients, together.split(sizes)):
        gradient.copy_(part.view_as(gradient))

    values = torch.tensor(list(terms.values()), dtype=torch.float64, device=together.device)
    distributed.all_reduce(values)
    return dict(zip(terms, values.tolist()))


def autocast(trainer):
    """Autocast to bfloat16 under --precision bfloat16; weights and optimizers stay float32."""
    enabled = trainer.options.precision == "bfloat16"
    return torch.autocast(trainer.device.type, torch.bfloat16, enabled=enabled)


def micro_batches(count, size, n_processes):
    """Slices of `size` samples, the last perhaps shorter, that cover `count`.

    If size is None, each process gets one micro-batch.
    """
    if size is None:
        size = math.ceil(count / n_processes)
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def accumulate(loss_of, count, size, network):
    """Add up the gradients of a loss in a network over micro-batches of `size` samples.

    This saves memory, and shares a batch among processes. loss_of(samples): the loss of a slice of
    the batch, a named tuple with `total`. Each term is a mean over its samples, so a micro-batch
    counts with its share of the `count` samples. If size is None, each process gets one
    micro-batch. Returns the whole batch's terms, numbers by name.
    """
    process, n_processes = process_place()
    slices = micro_batches(count, size, n_processes)

    # Take this process' share of the micro-batches.
    means = {}
    for samples in slices[process::n_processes]:
        share = (samples.stop - samples.start) / count
        terms = loss_of(samples)
        (share * terms.total).backward()

        for name, value in terms._asdict().items():
            means[name] = means.get(name, 0) + share * value.item()

    if n_processes > 1:
        gradients = [parameter.grad for parameter in network.parameters()]
        means = sum_over_processes(gradients, means)
    return means


# 4.1.1 An iteration of the critic, one of the generator, an epoch

def critic_iteration(trainer, real, labels, alpha):
    """One Adam step of the critic down L_f, on fresh z   [rule_4_1_critic_step]

    The generator stays as it is. real: (n, 1, c, c, c) in [-1, 1]; labels: (n,); alpha: α, a
    number. Returns the fields of CriticLoss, numbers by name.
    """
    options = trainer.options

    # Draw y_fake, z and ε.
    fake_labels = draw_labels(len(real), trainer.rng, trainer.device)
    latent = draw_latent(fake_labels, trainer.rng)
    epsilon = draw_epsilon(len(real), trainer.rng, trainer.device)

    def loss_of(samples):
        with autocast(trainer):
            with torch.no_grad():
                fake = trainer.generator(latent[samples]).float()
            return critic_loss(trainer.critic, real[samples], labels[samples], fake,
                               fake_labels[samples], epsilon[samples], options.penalty_scale, alpha)

    # Step down the gradient.
    trainer.critic_optimizer.zero_grad()
    terms = accumulate(loss_of, len(real), options.micro_batch, trainer.critic)
    trainer.critic_optimizer.step()
    return terms


def generator_iteration(trainer, count, alpha):
    """One Adam step of the generator down L_G, on fresh z   [rule_4_1_generator_step]

    The critic stays as it is. count: samples; alpha: α, a number. Returns the fields of
    GeneratorLoss, numbers by name.
    """
    # Draw y and z.
    labels = draw_labels(count, trainer.rng, trainer.device)
    latent = draw_latent(labels, trainer.rng)

    def loss_of(samples):
        with autocast(trainer):
            fake = trainer.generator(latent[samples])
            return generator_loss(trainer.critic, fake, labels[samples], alpha)

    # Step down the gradient; the critic's own gradients are not needed.
    trainer.generator_optimizer.zero_grad()
    trainer.critic.requires_grad_(False)
    size = generator_micro_batch(count, trainer.options)
    terms = accumulate(loss_of, count, size, trainer.generator)
    trainer.critic.requires_grad_(True)
    trainer.generator_optimizer.step()
    return terms


def generator_micro_batch(count, options):
    """Samples of a micro-batch where a generator step has `count`.

    A step has as many micro-batches as the critic's, each of --generator-multiple times the
    samples. Several processes then share it as one with --micro-batch would split it.
    """
    _, n_processes = process_place()
    multiple = options.generator_multiple
    of_critic = options.micro_batch or math.ceil(count / multiple / n_processes)
    return multiple * of_critic


def generator_batch(options):
    """m·n samples of a generator step, n = --batch-size; m = 1   [rule_4_1_generator_batch]

    [9]'s own code has m = 2, and so has the demo.
    """
    return options.generator_multiple * options.batch_size


def mean_terms(iterations):
    """The mean of each term over several iterations; iterations: the terms of each, by name."""
    count = len(iterations)
    return {name: sum(terms[name] for terms in iterations) / count for name in iterations[0]}


def set_learning_rate(trainer):
    """Give the generator's optimizer this epoch's learning rate; the critic's stays as it is.

    A critic that slows down, too, no longer follows the generator, and cannot correct it.
    """
    options = trainer.options
    rate = decayed_rate(trainer.epoch, options.epochs, options.learning_rate, options.decay_start)
    for group in trainer.generator_optimizer.param_groups:
        group["lr"] = rate


def train_epoch(trainer, batches):
    """Five critic iterations on fresh reals, then one of the generator   [rule_4_1_five_to_one]

    --critic-iterations says how many; five is the thesis' number. batches: the iterator of
    `read_batches`. Returns the epoch's row of the log.
    """
    options = trainer.options
    set_learning_rate(trainer)
    alpha = auxiliary_scale(trainer.epoch, options.epochs, options.auxiliary_scale,
                            options.late_auxiliary_scale)

    # Criticize.
    iterations = []
    for iteration in range(options.critic_iterations):
        cubes, labels = next(batches)
        real = torch.from_numpy(cubes).to(trainer.device)           # (n, 1, c, c, c)
        real_labels = torch.from_numpy(labels).to(trainer.device)   # (n,)
        trainer.seed_iteration(iteration)
        iterations.append(critic_iteration(trainer, real, real_labels, alpha))

    # Generate.
    trainer.seed_iteration(options.critic_iterations)
    generator_terms = generator_iteration(trainer, generator_batch(options), alpha)

    trainer.epoch += 1
    return {"epoch": trainer.epoch, "alpha": alpha, "critic": mean_terms(iterations),
            "generator": generator_terms}


def check_finite(row, path):
    """Raise Refusal where a loss term of an epoch is NaN or infinite: training cannot recover."""
    terms = [*row["critic"].values(), *row["generator"].values()]
    check(all(math.isfinite(term) for term in terms), path,
          f"a loss is NaN or infinite in epoch {row['epoch']}",
          "start over with a lower --learning-rate and --overwrite")


# 4.1.1 A fixed z through the training

@torch.no_grad()
def sample_fixed(trainer):
    """Keep G(z), z fixed, in `moments`   [rule_4_1_fixed_z]

    Each moment's cubes are uint8 grey, (2·FIXED, c, c, c), negatives first.
    """
    # Generate two at a time, which takes little memory.
    cubes = torch.cat([trainer.generator(z) for z in trainer.fixed_latent.split(2)])
    pixels = lungaug.grey(cubes[:, 0].float().cpu().numpy())
    trainer.moments.append((trainer.epoch, torch.from_numpy(pixels)))


def draw_progression(folder, trainer):
    """Draw progression.png: the middle slice of each sample of the fixed z, one row per moment."""
    side = trainer.settings["cube"]
    middle_slices = []
    for _, cubes in trainer.moments:
        x = lungaug.from_grey(cubes[:, side // 2].numpy())
        middle_slices += list(lungaug.windowed(preprocessing.denormalize(x), "lung window"))

    sheet = lungaug.tile(middle_slices, 2 * FIXED)
    lungaug.write(folder / "progression.png", lungaug.png(sheet, lungaug.zoom(side, 96)))


def page(trainer):
    """What the report shows of the training: the fixed z from its start to its end."""
    epochs = [epoch for epoch, _ in trainer.moments]
    side = trainer.settings["cube"]
    caption = (f"The same {2 * FIXED} samples of z through the training, each the middle axial "
               f"slice of its cube of {side} mm in the lung window. Move the slider: noise turns "
               "into lung tissue (negatives) and into nodules (positives). Look at what the "
               "samples of a class have in common: where all end alike, the generator has lost "
               "its variety. In the last quarter α weighs the class loss more.")
    return [
        lungaug.Heading("4.1 Wasserstein GAN: samples through the training"),
        lungaug.Figure(caption, "progression.png",
                       code=("train_gan.draw_progression", "train_gan.sample_fixed",
                             "train_gan.auxiliary_scale"),
                       rows=[f"epoch {epoch:,}" for epoch in epochs],
                       columns=("without a nodule", "with a nodule"),
                       pixel_mm=1 / lungaug.zoom(side, 96), first=len(epochs) - 1),
    ]


# Start, resume, stop

def start_or_resume(folder, options, dataset, device):
    """A Trainer at its checkpoint, or a new one where there is none or under --overwrite."""
    trainer = Trainer(options, dataset, device)
    if options.overwrite and is_first_process():
        lungaug.remove(folder, "checkpoint.pt", "log.jsonl", "options.json")
    wait_for_all()

    lungaug.resume(trainer, folder)
    if is_first_process():
        lungaug.rewind_log(folder / "log.jsonl", trainer.epoch)
    return trainer


def warn_of_hours(seconds):
    """After the first epochs, warn if the rest will take more than an hour."""
    if seconds > 3600:
        print(f"Estimated time: {lungaug.format_duration(seconds)}. To shorten it, give fewer "
              "--epochs, a smaller --width or --preset demo. You can stop at any time; the same "
              "command, without --overwrite, resumes.", flush=True)


def status(row, estimate):
    """The status line of an epoch.

    row: the epoch's, of the log; estimate: the mean of the last Wasserstein estimates, which
    scatters less than the epoch's own.
    """
    critic = row["critic"]
    return (f"W {estimate:.2f}, α {row['alpha']:g}, class accuracy "
            f"{critic['real_accuracy']:.2f} on reals, {critic['fake_accuracy']:.2f} on fakes")


class Recorder:
    """What the first process keeps of a training: the log, pictures of the fixed z, checkpoints."""

    def __init__(self, trainer, folder):
        epochs = trainer.options.epochs
        self.trainer = trainer
        self.folder = folder
        self.progress = lungaug.Progress("epochs", epochs)
        self.estimates = deque(maxlen=SMOOTHED)
        self.moments = {round(epochs * i / MOMENTS) for i in range(MOMENTS + 1)}
        self.first_epoch = trainer.epoch
        self.start = time.monotonic()
        self.last_save = self.start

    def record_epoch(self, row):
        """Log an epoch that has just ended; where they are due, picture the fixed z, and save.

        row: the epoch's, of the log. A checkpoint is due every --checkpoint-minutes and at the end.
        """
        trainer = self.trainer
        options = trainer.options
        epochs_left = options.epochs - trainer.epoch

        # Log.
        lungaug.append_log(self.folder / "log.jsonl", row)
        self.estimates.append(row["critic"]["wasserstein"])
        estimate = sum(self.estimates) / len(self.estimates)
        self.progress.update(trainer.epoch, status(row, estimate))
        if trainer.epoch == self.first_epoch + PROBE:
            seconds_per_epoch = (time.monotonic() - self.start) / PROBE
            warn_of_hours(seconds_per_epoch * epochs_left)

        # Picture the fixed z.
        if trainer.epoch in self.moments:
            sample_fixed(trainer)
            draw_progression(self.folder, trainer)

        # Save.
        minutes = (time.monotonic() - self.last_save) / 60
        if minutes > options.checkpoint_minutes or epochs_left == 0:
            lungaug.save_checkpoint(trainer, self.folder)
            self.last_save = time.monotonic()


def train(trainer, dataset, folder):
    """Draw, criticize, generate, record, epoch by epoch."""
    batches = read_batches(trainer.options, dataset, trainer.epoch)
    recorder = Recorder(trainer, folder)
    if trainer.epoch == 0 and is_first_process():
        sample_fixed(trainer)

    while trainer.epoch < trainer.options.epochs:
        # Draw, criticize, generate.
        row = train_epoch(trainer, batches)
        check_finite(row, folder / "log.jsonl")

        # Record.
        if is_first_process():
            recorder.record_epoch(row)


def summary(path):
    """A sentence on the Wasserstein estimate: the peak and the last of its smoothed values."""
    with lungaug.refuse_on_error(path, "start over with --overwrite"):
        estimates = [row["critic"]["wasserstein"] for row in lungaug.read_log(path)]
        count = min(SMOOTHED, len(estimates))
        means = np.convolve(estimates, np.full(count, 1 / count), "valid")
    return (f"Wasserstein estimate, mean of {count} epochs: "
            f"peak {max(means):.2f}, now {means[-1]:.2f}.")


def prepare_first(options):
    """Run preprocessing.py if its data are not complete, or are to be another run's."""
    run = options.run
    if options.prepared:
        if not preprocessing.uses_prepared_of(run, options.prepared):
            arguments = ["--overwrite"] if options.overwrite else []
            lungaug.run_script("preprocessing.py", "--run", run, "--prepared", options.prepared,
                               *arguments)
    elif not lungaug.is_prepared(run):
        print(f"Preprocessing is not finished for {run}; running it now.", flush=True)
        arguments = ["--seed", options.seed or 0]
        if options.preset:
            arguments += ["--preset", options.preset]
        lungaug.run_script("preprocessing.py", "--run", run, *arguments)


def check_shares(options):
    """Raise Refusal where a batch has fewer micro-batches than there are processes."""
    _, n_processes = process_place()
    count = len(micro_batches(options.batch_size, options.micro_batch, n_processes))
    check(count >= n_processes, "torchrun",
          f"a batch has fewer micro-batches, {count}, than there are processes, {n_processes}",
          "give a smaller --nproc-per-node or --micro-batch, or a larger --batch-size")


def train_in(folder, options, dataset, device):
    """Train in a folder that this process, or the first of several, has locked: the Trainer."""
    trainer = start_or_resume(folder, options, dataset, device)
    _, n_processes = process_place()
    if is_first_process():
        place = f"{n_processes} processes, {device}" if n_processes > 1 else device
        print(f"Preset {options.preset}, cube {dataset.cube}, width {options.width}, on {place}; "
              f"epochs {trainer.epoch} to {options.epochs}.", flush=True)
        lungaug.warn_of_days(options, dataset.cube, options.epochs - trainer.epoch, device)
        if trainer.epoch < options.epochs:
            # Until it has its page again the stage is not finished, for evaluate.py.
            lungaug.remove(folder, "options.json")
        if trainer.moments:
            # The picture of an earlier command may be lost, and this one may have nothing to train.
            draw_progression(folder, trainer)
    train(trainer, dataset, folder)
    return trainer


def main():
    options = lungaug.parse(__doc__, "train_gan")
    run = options.run
    folder = run / "gan"
    # The preset is not known yet; --device is auto in both.
    device = join_processes(options.device or "auto")
    if is_first_process():
        prepare_first(options)
    wait_for_all()

    dataset = preprocessing.open_dataset(run)
    lungaug.apply_preset(options, "train_gan", dataset.info["preset"])
    check_shares(options)
    if not is_first_process():
        train_in(folder, options, dataset, device)
        leave_processes()
        return

    with lungaug.lock(folder, "training"), preprocessing.keep_prepared(run):
        trainer = train_in(folder, options, dataset, device)

    print(f"{summary(folder / 'log.jsonl')} Picture: {folder / 'progression.png'}; "
          f"python evaluate.py --run {run} draws the curves, figure 7.")
    lungaug.save_page(folder, options, page(trainer))
    leave_processes()


if __name__ == "__main__":
    lungaug.command(main)
