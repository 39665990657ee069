"""GAN training: section 4.1, the auxiliary classifier Wasserstein GAN with gradient penalty.

    python train_gan.py                              # nothing prepared yet: synthetic scans first, then the demo preset
    python train_gan.py --run runs/luna16            # the thesis preset on your prepared scans
    python train_gan.py --run runs/demo --epochs 900 # goes on from the checkpoint, to epoch 900

An epoch is five critic iterations and one generator iteration. Leaves <run>/gan: checkpoint.pt, log.jsonl (every term
of every epoch) and progression.png (a fixed z through the training); `python evaluate.py` draws figure 7, the loss
curves, at any time. Stopped at any time, the same command goes on from the checkpoint and ends with the same bytes.
"""

import time

import numpy as np
import torch

import lungaug
import preprocessing
from losses import critic_loss, generator_loss
from lungaug import check
from models import LATENT, Critic, Generator, conditional_latent

BETAS = (0.0, 0.9)      # 4.1.1   [num_4_1_adam]
FIXED = 4               # samples of each class drawn from the z that stays fixed
MOMENTS = 8             # times that they are drawn through the training, and once before
PROBE = 3               # epochs from which the time left is foretold
STATUS = "W {wasserstein:.2f}, class accuracy {real_accuracy:.2f} on reals, {fake_accuracy:.2f} on fakes"


# 4.1.1 Training: α, real batches, z, labels, ε

def auxiliary_scale(epoch, epochs, early, late):
    """α = 1 at the beginning, 10 at the end: late from the last quarter on   [rule_4_1_alpha]; epoch counts from 0"""
    return early if epoch < 0.75 * epochs else late


def draw_batch(dataset, count, rng):
    """Training cubes, half positive with a random flip each, half negative as they are   [rule_4_1_balanced_batch]

    Returns cubes (count, 1, c, c, c) in [-1, 1] and labels (count,), positives first.
    """
    labels = (np.arange(count) < count // 2).astype(np.int64)
    rows = [part["train"][rng.integers(len(part["train"]), size=n)]
            for part, n in ((dataset.positives, labels.sum()), (dataset.negatives, count - labels.sum()))]
    return preprocessing.read_cubes(dataset, np.concatenate(rows), rng.integers(8, size=count) * labels), labels


def draw_latent(labels, noise):
    """z ~ 𝒩(0, 1), the labels' one-hot in front   [rule_3_3_1_latent]; labels (n,), noise: a Generator → (n, 128)"""
    return conditional_latent(torch.randn(len(labels), LATENT, generator=noise).to(labels.device), labels)


def draw_labels(count, noise, device):
    """y_fake, uniform over the two classes   [rule_3_3_1_random_labels]; (count,) int64"""
    return torch.randint(0, 2, (count,), generator=noise).to(device)


def draw_epsilon(count, noise, device):
    """ε ~ U[0, 1], one a sample   [rule_3_3_1_epsilon]; (count,)"""
    return torch.rand(count, generator=noise).to(device)


# 4.1.1 What training changes; a checkpoint

class Trainer:
    """All that training changes: two networks, their optimizers, the randomness. A checkpoint is its `state`."""

    def __init__(self, arguments, cube, device):
        self.arguments, self.device, self.epoch, self.moments = arguments, device, 0, []
        torch.manual_seed(int(lungaug.stream(arguments.seed, "gan weights").integers(2 ** 62)))
        layout = dict(device=device, memory_format=torch.channels_last_3d)
        self.generator = Generator(cube, arguments.width).to(**layout)
        self.critic = Critic(cube, arguments.width).to(**layout)
        self.generator_step, self.critic_step = (torch.optim.Adam(network.parameters(), arguments.learning_rate, BETAS)
                                                 for network in (self.generator, self.critic))
        self.noise = lungaug.torch_stream(arguments.seed, "gan noise")
        self.draws = lungaug.stream(arguments.seed, "gan batches")
        self.fixed_labels = torch.arange(2).repeat_interleave(FIXED).to(device)
        self.fixed_latent = draw_latent(self.fixed_labels, lungaug.torch_stream(arguments.seed, "gan fixed z"))

    def parts(self):
        return {name: getattr(self, name) for name in ("generator", "critic", "generator_step", "critic_step")}

    def state(self):
        return {"settings": settings(self.arguments), "epochs": self.arguments.epochs, "epoch": self.epoch,
                "moments": self.moments, "noise": self.noise.get_state(), "draws": self.draws.bit_generator.state,
                **{name: part.state_dict() for name, part in self.parts().items()}}

    def restore(self, state):
        self.epoch, self.moments = state["epoch"], state["moments"]
        self.noise.set_state(state["noise"])
        self.draws.bit_generator.state = state["draws"]
        for name, part in self.parts().items():
            part.load_state_dict(state[name])


def settings(arguments):
    """What a checkpoint must agree on with the command that resumes it."""
    names = ("seed", "cube", "width", "batch_size", "learning_rate", "penalty_scale", "auxiliary_scale",
             "late_auxiliary_scale", "critic_iterations", "precision", "prepared")
    return {name: getattr(arguments, name, None) for name in names}


# 4.1.1 An iteration of the critic, one of the generator, an epoch

def half_precision(trainer):
    """Autocast to bfloat16 under --precision bfloat16; weights and optimizers stay float32."""
    return torch.autocast(trainer.device.type, torch.bfloat16, enabled=trainer.arguments.precision == "bfloat16")


def parts_of(count, most):
    """Slices of at most `most` samples that cover `count` (a micro-batch each), with their share of the batch."""
    return [(slice(i, min(i + most, count)), (min(i + most, count) - i) / count) for i in range(0, count, most)]


def mean_of_parts(parts):
    """The batch's loss terms from its micro-batches' (share, terms): each term is a mean, so the shares weigh it."""
    return {key: sum(share * getattr(terms, key).item() for share, terms in parts) for key in parts[0][1]._fields}


def critic_iteration(trainer, real, labels, scale):
    """One Adam step of the critic down L_f, on fresh z; the generator stays as it is   [rule_4_1_critic_step]

    real: (n, 1, c, c, c) in [-1, 1]; labels: (n,); scale: α. Returns the terms of L_f, numbers by name.
    """
    a, device, parts = trainer.arguments, trainer.device, []
    fake_labels = draw_labels(len(real), trainer.noise, device)
    latent, epsilon = draw_latent(fake_labels, trainer.noise), draw_epsilon(len(real), trainer.noise, device)
    trainer.critic_step.zero_grad()
    for part, share in parts_of(len(real), a.micro_batch or len(real)):
        with half_precision(trainer):
            with torch.no_grad():
                fake = trainer.generator(latent[part]).float()
            terms = critic_loss(trainer.critic, real[part], labels[part], fake, fake_labels[part], epsilon[part],
                                a.penalty_scale, scale)
        (share * terms.total).backward()
        parts.append((share, terms))
    trainer.critic_step.step()
    return mean_of_parts(parts)


def generator_iteration(trainer, count, scale):
    """One Adam step of the generator down L_G, on fresh z; the critic stays as it is   [rule_4_1_generator_step]

    count: samples; scale: α. Returns the terms of L_G, numbers by name.
    """
    a, parts = trainer.arguments, []
    labels = draw_labels(count, trainer.noise, trainer.device)
    latent = draw_latent(labels, trainer.noise)
    trainer.generator_step.zero_grad()
    trainer.critic.requires_grad_(False)
    for part, share in parts_of(count, a.micro_batch or count):
        with half_precision(trainer):
            terms = generator_loss(trainer.critic, trainer.generator(latent[part]), labels[part], scale)
        (share * terms.total).backward()
        parts.append((share, terms))
    trainer.critic.requires_grad_(True)
    trainer.generator_step.step()
    return mean_of_parts(parts)


def train_epoch(trainer, dataset):
    """Five critic iterations, fresh reals at each, then one of the generator   [rule_4_1_five_to_one]

    Returns the epoch's row of the log.
    """
    a = trainer.arguments
    scale = auxiliary_scale(trainer.epoch, a.epochs, a.auxiliary_scale, a.late_auxiliary_scale)
    rounds = []
    for _ in range(a.critic_iterations):
        batch = draw_batch(dataset, a.batch_size, trainer.draws)
        real, labels = (torch.from_numpy(part).to(trainer.device) for part in batch)
        rounds.append(critic_iteration(trainer, real, labels, scale))
    generator = generator_iteration(trainer, a.batch_size, scale)
    trainer.epoch += 1
    critic = {key: sum(terms[key] for terms in rounds) / len(rounds) for key in rounds[0]}
    return {"epoch": trainer.epoch, "alpha": scale, "critic": critic, "generator": generator}


def is_finite(row):
    return all(np.isfinite(value) for terms in (row["critic"], row["generator"]) for value in terms.values())


# 4.1.1 A fixed z through the training

@torch.no_grad()
def sample_fixed(trainer):
    """Keep G(z), z fixed, in `moments`   [rule_4_1_fixed_z]: uint8 (2·FIXED, c, c, c), negatives first"""
    cubes = torch.cat([trainer.generator(z) for z in trainer.fixed_latent.split(2)])
    trainer.moments.append((trainer.epoch, torch.from_numpy(lungaug.grey(cubes[:, 0].float().cpu().numpy()))))


def draw_progression(folder, trainer):
    """progression.png, of the fixed z: a row a moment, the middle slice of each sample."""
    images = [cube[cube.shape[0] // 2].numpy() for _, cubes in trainer.moments for cube in cubes]
    sheet = lungaug.tile(images, 2 * FIXED)
    lungaug.write(folder / "progression.png", lungaug.png(sheet, 96 // images[0].shape[0] or 1))


# Start, go on, stop

def load_or_start(folder, arguments, cube, device):
    """A Trainer at its checkpoint, or a new one where there is none or under --overwrite."""
    trainer, path = Trainer(arguments, cube, device), folder / "checkpoint.pt"
    if arguments.overwrite:
        lungaug.discard(folder, "checkpoint.pt", "log.jsonl", "options.json")
    if path.exists():
        state = lungaug.load_checkpoint(path, "", **settings(arguments))
        with lungaug.refusing(path, "start again with --overwrite"):
            trainer.restore(state)
    lungaug.rewind_log(folder / "log.jsonl", trainer.epoch)
    return trainer


def warn_of_hours(seconds):
    """Say so, after the first epochs, where the rest will take more than an hour."""
    if seconds > 3600:
        print(f"This will take about {lungaug.duration(seconds)}: fewer --epochs, a smaller --width or --preset demo "
              "shorten it; stopped at any time, the same command, without --overwrite, goes on.", flush=True)


def train(trainer, dataset, folder):
    """Draw, criticise five times, generate, log, save; a checkpoint every --checkpoint-minutes and at the end."""
    a = trainer.arguments
    begun, started = trainer.epoch, time.monotonic()
    step, saved = lungaug.progress("epochs", a.epochs), started
    moments = {round(a.epochs * i / MOMENTS) for i in range(MOMENTS + 1)}
    if trainer.epoch == 0:
        sample_fixed(trainer)
    while trainer.epoch < a.epochs:
        row = train_epoch(trainer, dataset)
        check(is_finite(row), folder / "log.jsonl", f"a loss that is no number in epoch {trainer.epoch}",
              "start again with a lower --learning-rate and --overwrite")
        lungaug.append_log(folder / "log.jsonl", row)
        if trainer.epoch in moments:
            sample_fixed(trainer)
            draw_progression(folder, trainer)
        step(trainer.epoch, STATUS.format(**row["critic"]))
        if trainer.epoch == begun + PROBE:
            warn_of_hours((time.monotonic() - started) / PROBE * (a.epochs - trainer.epoch))
        if time.monotonic() - saved > 60 * a.checkpoint_minutes or trainer.epoch == a.epochs:
            lungaug.write(folder / "checkpoint.pt", trainer.state())
            saved = time.monotonic()


def main():
    arguments = lungaug.parse(__doc__.split("\n")[0], "train_gan")
    run = arguments.run
    if not (run / "prepared" / "dataset.json").exists():
        print(f"The scans of {run} are not all prepared: this first.", flush=True)
        lungaug.stage("preprocessing.py", "--run", run, "--seed", arguments.seed or 0)
    dataset = preprocessing.open_dataset(run)
    lungaug.settle(arguments, "train_gan", dataset.info["preset"])
    arguments.cube, arguments.prepared = dataset.cube, dataset.fingerprint
    device = lungaug.pick_device(arguments.device)
    folder = run / "gan"
    with lungaug.alone(folder, "training"):
        trainer = load_or_start(folder, arguments, dataset.cube, device)
        print(f"Preset {arguments.preset}, cube {dataset.cube}, width {arguments.width}, on {device}; "
              f"epochs {trainer.epoch} to {arguments.epochs}.", flush=True)
        train(trainer, dataset, folder)
        draw_progression(folder, trainer)
    with lungaug.refusing(folder / "log.jsonl", "start again with --overwrite"):
        estimates = [row["critic"]["wasserstein"] for row in lungaug.read_log(folder / "log.jsonl")]
        count = min(20, len(estimates))
        means = np.convolve(estimates, np.full(count, 1 / count), "valid")
    print(f"Wasserstein estimate, mean of {count} epochs: peak {max(means):.2f}, now {means[-1]:.2f}. "
          f"Picture: {folder / 'progression.png'}; python evaluate.py --run {run} draws the curves, figure 7.")
    lungaug.record_stage(folder, arguments, [
        "4.1 Wasserstein GAN: samples through the training",
        ("The same z from the start of the training (top) to its end: four negatives, then four positives, each the "
         "middle axial slice.", "progression.png")])


if __name__ == "__main__":
    lungaug.command(main)
