"""How long a step of the critic and one of the generator take, as ratios to plainer ways, side by side in one run.

    python tests/bench_gan_step.py                  # the demo's size, and the thesis': minutes
    python tests/bench_gan_step.py --demo           # the demo's size alone

A step is what train_gan.py does: draw, loss, gradients, Adam. The ways are timed in turn, so that what else the machine
does meets all of them:

ours      models.py as it is, float32
plain     the formulas as they are written (tests/plain_networks.py): no fused layers, contiguous, float32

On a GPU, also ours under --precision tf32 and bfloat16. A row gives ours over plain, the median with the lowest and the
highest of the turns, and the peak memory of each (on a CPU of a process that does nothing else).
"""

import argparse
import copy
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path


HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import lungaug

import torch

import train_gan
from plain_networks import PlainCritic, PlainGenerator


# The sizes of the two presets; on a CPU a batch of the thesis' is cut to what takes seconds.
SIZES = {
    "demo": {"cube": 24, "width": 4, "batch_size": 8, "generator_multiple": 2, "turns": 15},
    "thesis": {"cube": 48, "width": 16, "batch_size": 64, "generator_multiple": 1, "turns": 5},
}
CPU_BATCH = 4
WAYS = ("ours", "plain")
GPU_WAYS = ("tf32", "bfloat16")


class FakeDataset:
    """What a Trainer asks of a dataset."""
    fingerprint = 0

    def __init__(self, cube):
        self.cube = cube


def processor_name():
    """The CPU's name, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        match = re.search(r"model name\s*: (.*)", info.read_text())
        if match:
            return match.group(1).strip()
    return platform.processor() or platform.machine()


def make_trainer(way, size, device):
    """A Trainer of this size; with the plain networks' step where the way is `plain`."""
    words = ["--width", str(size["width"]), "--batch-size", str(size["batch_size"]),
             "--generator-multiple", str(size["generator_multiple"])]
    if way in GPU_WAYS:
        words += ["--precision", way]
    options = lungaug.apply_preset(lungaug.parse("", "train_gan", words=words), "train_gan", "thesis")
    trainer = train_gan.Trainer(options, FakeDataset(size["cube"]), device)

    if way == "plain":
        # The parameters in memory as they come, too, so that no layout but the plain one is used.
        trainer.generator = PlainGenerator(copy.deepcopy(trainer.generator).to(memory_format=torch.contiguous_format))
        trainer.critic = PlainCritic(copy.deepcopy(trainer.critic).to(memory_format=torch.contiguous_format))
        trainer.generator_optimizer = train_gan.adam(trainer.generator, options.learning_rate)
        trainer.critic_optimizer = train_gan.adam(trainer.critic, options.learning_rate)
    return trainer


def critic_step(trainer, size):
    cube = size["cube"]
    real = torch.rand(size["batch_size"], 1, cube, cube, cube, generator=torch.Generator().manual_seed(0)) * 2 - 1
    labels = torch.arange(size["batch_size"]) % 2
    train_gan.critic_iteration(trainer, real.to(trainer.device), labels.to(trainer.device), 1.0)


def generator_step(trainer, size):
    train_gan.generator_iteration(trainer, train_gan.generator_batch(trainer.options), 1.0)


STEPS = {"critic": critic_step, "generator": generator_step}


def seconds(step, trainer, size):
    """Seconds of one step. A GPU is waited for."""
    lungaug.allow_tf32(trainer.options.precision)
    start = time.perf_counter()
    step(trainer, size)
    if trainer.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_megabytes(way, size_name, step_name, device):
    """Peak memory of a step: that of the GPU, or of a process that does this alone."""
    if device.type == "cuda":
        trainer = make_trainer(way, SIZES[size_name], device)
        torch.cuda.reset_peak_memory_stats()
        seconds(STEPS[step_name], trainer, SIZES[size_name])
        return torch.cuda.max_memory_allocated() / 2 ** 20

    words = [sys.executable, __file__, "--memory-of", way, size_name, step_name]
    return float(subprocess.run(words, check=True, capture_output=True, text=True).stdout)


def print_memory(way, size_name, step_name):
    """Make two steps and print this process' peak memory, in MB."""
    cut_batches()
    size = SIZES[size_name]
    trainer = make_trainer(way, size, torch.device("cpu"))
    for _ in range(2):
        STEPS[step_name](trainer, size)
    print(process_peak())


def process_peak():
    """This process' peak memory, in MB."""
    status = Path("/proc/self/status")
    if status.exists():
        # Linux lets getrusage begin with the peak of the parent.
        return int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text()).group(1)) / 2 ** 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20


def cut_batches():
    """Cut the thesis' batch to what a CPU steps in seconds."""
    SIZES["thesis"]["batch_size"] = CPU_BATCH


def compare(size_name, step_name, ways, device):
    """Print the rows of a step: each way but the plain one over the plain one."""
    size = SIZES[size_name]
    step = STEPS[step_name]
    trainers = {way: make_trainer(way, size, device) for way in ways}
    for trainer in trainers.values():
        seconds(step, trainer, size)

    times = {way: [] for way in ways}
    for _ in range(size["turns"]):
        for way in ways:
            times[way].append(seconds(step, trainers[way], size))

    batch = size["batch_size"] * (size["generator_multiple"] if step_name == "generator" else 1)
    shape = f"{size_name}, {size['cube']}³, width {size['width']}, batch {batch}"
    plain_peak = peak_megabytes("plain", size_name, step_name, device)
    for way in ways:
        if way == "plain":
            continue
        ratios = sorted(mine / plain for mine, plain in zip(times[way], times["plain"]))
        peak = peak_megabytes(way, size_name, step_name, device)
        print(f"| {shape} | {step_name} | {way} | {statistics.median(times[way]) * 1000:,.0f} ms | "
              f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) | "
              f"{peak:,.0f} MB against {plain_peak:,.0f} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--demo", action="store_true", help="the demo's size alone")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--memory-of", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        print_memory(*arguments.memory_of)
        return

    device = lungaug.pick_device(arguments.device)
    on_gpu = device.type == "cuda"
    if not on_gpu:
        cut_batches()
    name = torch.cuda.get_device_name(device) if on_gpu else f"{processor_name()}, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}\n")
    print("| size | step of the | way | time | over plain | peak memory |\n| --- | --- | --- | --- | --- | --- |")
    ways = WAYS + GPU_WAYS if on_gpu else WAYS
    for size_name in ("demo",) if arguments.demo else tuple(SIZES):
        for step_name in STEPS:
            compare(size_name, step_name, ways, device)


if __name__ == "__main__":
    lungaug.command(main)
