"""A run killed at random ends with the bytes of a run that nobody disturbed.

    python tests/chaos.py                        # ten kills; 3 minutes
    python tests/chaos.py --short                # three kills of smaller stages; 1 minute
    python tests/chaos.py --seed 7 --kills 30

Run A goes through every stage undisturbed. Run B, of the same scans, is stopped at random moments of
every stage, the whole process group, in turn by SIGKILL and by SIGINT, which is Ctrl-C: that must
end within seconds, with status 130 and without a traceback (but in the first tenth of a second,
while Python itself starts). After each kill the same commands run again: all stages from the first
on, or, with --short, from the killed one on. Then every file of the two runs is compared byte for
byte, except options.json and report.html, which hold each stage's command and time.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

import lungaug

import numpy as np

import phantom


SIGNALS = (signal.SIGKILL, signal.SIGINT)
INTERRUPT_SECONDS = 30      # within which a stage that gets Ctrl-C has ended, on a busy machine
HOLD_TIMES = ("options.json", "report.html")


# Run stages, whole or killed

def stage_commands(run, short):
    """Stage → its command, in the order of the thesis, with the smallest options."""
    gan_epochs = 12 if short else 60
    classifier_epochs = 5 if short else 20
    options = {
        "preprocessing":
            "--scans scans --cube 12 --negatives 20 --max-slice-mm 20 --workers 2",
        "train_gan":
            f"--width 1 --batch-size 4 --epochs {gan_epochs} --checkpoint-minutes 0",
        # Every generated cube passes, so that each arm has something to train on.
        "train_classifier":
            f"--batch-size 8 --epochs {classifier_epochs} --attempts 3 "
            f"--score-quantile 0 --class-probability 0 --repeats {1 if short else 2}",
        "evaluate":
            "",
    }
    commands = {}
    for stage, words in options.items():
        script = str(ROOT / f"{stage}.py")
        commands[stage] = [sys.executable, script, "--run", run, "--preset", "demo", *words.split()]
    return commands


def start(command, folder):
    """Start a stage in a process group of its own; its output goes to the file output.txt."""
    environment = dict(os.environ)
    # Two classifiers are trained at a time.
    environment["OMP_NUM_THREADS"] = "2"
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    with open(folder / "output.txt", "wb") as output:
        return subprocess.Popen(command, cwd=folder, stdout=output, stderr=output,
                                start_new_session=True, env=environment)


def exit_if_failed(status, command, folder):
    """End the script, with the stage's output, where a stage failed."""
    if status != 0:
        output = (folder / "output.txt").read_text(encoding="utf-8", errors="replace")
        sys.exit(f"{' '.join(command[1:])} failed:\n{output}")


def run_whole(command, folder):
    """Run a stage to its end. Returns the seconds that it took."""
    start_time = time.monotonic()
    status = start(command, folder).wait()
    exit_if_failed(status, command, folder)
    return time.monotonic() - start_time


def run_killed(command, folder, seconds, sent):
    """Run a stage and send its group a signal after `seconds`. Returns whether it still ran."""
    process = start(command, folder)
    try:
        status = process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, sent)
        status = process.wait(INTERRUPT_SECONDS)
        # A stage that has just ended has its own status.
        if sent == signal.SIGINT and status != 0:
            exit_if_not_interrupted(status, command, folder)
        return True
    exit_if_failed(status, command, folder)
    return False


def exit_if_not_interrupted(status, command, folder):
    """End the script, with the stage's output, where Ctrl-C was not one line and status 130."""
    output = (folder / "output.txt").read_text(encoding="utf-8", errors="replace")
    # Before lungaug.py is imported, and it has imported Python's own modules, no code of ours runs
    # that could say it in one line. The packages come later.
    has_begun = re.search(r"\b(numpy|torch|scipy|pydicom)\b|lungaug: ", output)
    if status == -signal.SIGINT and not has_begun:
        return
    if status != 130 or "Traceback" in output or output.count("lungaug: interrupted") != 1:
        sys.exit(f"{' '.join(command[1:])}, interrupted, ended with {status}:\n{output}")


# Kill run B

def draw_kills(durations, count, startup, rng):
    """Draw (stage, seconds) of each kill, in the order of the stages.

    durations: the seconds of each whole stage; startup: those that Python takes to start. Every
    stage is killed in turn, the longest first. Progress outlives a kill, so where a stage is killed
    n times, a moment is uniform over 2/n of its work; over all of it for n = 1 or 2.
    """
    longest_first = sorted(durations, key=durations.get, reverse=True)
    drawn = [longest_first[i % len(longest_first)] for i in range(count)]
    spans = {}
    for stage, duration in durations.items():
        work = max(duration - startup, 0.1)
        spans[stage] = work * min(1, 2 / max(1, drawn.count(stage)))

    order = list(durations)
    drawn.sort(key=order.index)
    return [(stage, startup + rng.random() * spans[stage]) for stage in drawn]


def describe(run):
    """How far a run has come: its files, and the rows of its logs."""
    n_files = sum(path.is_file() for path in run.rglob("*"))
    n_rows = sum(len(path.read_bytes().splitlines()) for path in run.rglob("log.jsonl"))
    return f"{n_files} files, {n_rows} log rows"


def disturb(commands, kills, folder, short):
    """Run all stages of B, killing them at the moments of `draw_kills`."""
    stages = list(commands)
    first = 0       # the stage from which the commands run again after a kill
    for number, (stage, seconds) in enumerate(kills, 1):
        killed = stages.index(stage)
        for earlier in stages[first:killed]:
            run_whole(commands[earlier], folder)

        # A stage may end before it is killed, as earlier kills left it less to do.
        sent = SIGNALS[number % len(SIGNALS)]
        while not run_killed(commands[stage], folder, seconds, sent):
            seconds *= 0.7
        print(f"kill {number}/{len(kills)}: {stage}, {sent.name} after {seconds:.2f} s, "
              f"with {describe(folder / 'B')}", flush=True)
        if short:
            first = killed

    for stage in stages[first:]:
        run_whole(commands[stage], folder)


# Compare the runs

def files_of(run):
    """The names, within the run, of its files that are not hidden."""
    return {str(path.relative_to(run)) for path in run.rglob("[!.]*") if path.is_file()}


def compare(run_a, run_b):
    """What differs between the two runs, one line each."""
    names_a = files_of(run_a)
    names_b = files_of(run_b)
    differences = [f"{name}: in one run only" for name in sorted(names_a ^ names_b)]
    for name in sorted(names_a & names_b):
        if Path(name).name in HOLD_TIMES:
            continue
        if (run_a / name).read_bytes() != (run_b / name).read_bytes():
            differences.append(f"{name} differs")
    return differences


def leftovers(run):
    """The names of hidden files, such as half-written ones; locks are meant to stay."""
    return [path.name for path in run.rglob(".*") if path.suffix != ".lock"]


def chaos(folder, short, n_kills, rng):
    """Run A undisturbed and B killed, in `folder`: differences, leftovers, how many files."""
    n_scans = 3 if short else 6
    phantom.write_scans(folder / "scans", n_scans, scale=4.0, nodules=3)

    durations = {}
    for stage, command in stage_commands("A", short).items():
        durations[stage] = run_whole(command, folder)
    times = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in durations.items())
    print(f"undisturbed: {times}", flush=True)

    # The shortest stage, evaluation, is mostly the start of Python and torch.
    startup = 0.8 * min(durations.values())
    kills = draw_kills(durations, n_kills, startup, rng)
    disturb(stage_commands("B", short), kills, folder, short)

    differences = compare(folder / "A", folder / "B")
    return differences, leftovers(folder / "B"), len(files_of(folder / "A"))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, help="default 10, with --short 3")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true",
                        help="three kills, fewer epochs, within a minute")
    options = parser.parse_args()
    # In the background of a script Ctrl-C is ignored, and so it would be by the stages.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    n_kills = options.kills or (3 if options.short else 10)
    rng = np.random.default_rng(options.seed)

    start_time = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        differences, hidden, n_files = chaos(Path(name), options.short, n_kills, rng)

    for line in differences:
        print(line)
    print(f"{n_kills} kills in {time.monotonic() - start_time:.0f} s: {n_files} files, "
          f"{len(differences)} differences, {len(hidden)} hidden leftovers "
          f"{' '.join(hidden)}".rstrip())
    return 1 if differences else 0


if __name__ == "__main__":
    lungaug.command(main)
