"""A run killed at random ends with the bytes of a run that nobody disturbed.

    python tests/chaos.py                        # ten kills, each followed by every stage from the first on; 3 minutes
    python tests/chaos.py --short                # three kills, after each the killed stage alone
    python tests/chaos.py --seed 7 --kills 30

Run A goes through every stage undisturbed. Run B, of the same scans, is killed (SIGKILL, the whole process group) at
random moments of every stage and started again with the same commands. Then every file of the two is compared byte
for byte, but for options.json, which holds times.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(Path(__file__).resolve().parent), str(HERE)]

import phantom

EPOCHS = {False: ("60", "20"), True: ("12", "5")}     # of the GAN and of the classifiers, by --short


def stage_commands(run, short):
    """Stage → its command, in the order of the thesis, with the smallest options."""
    common, (gan, classifiers) = ["--run", run, "--preset", "demo"], EPOCHS[short]
    words = {
        "preprocessing": "--scans scans --cube 12 --negatives 20 --max-slice-mm 20 --workers 2",
        "train_gan": f"--width 1 --batch-size 4 --epochs {gan} --checkpoint-minutes 0",
        "train_classifier": f"--batch-size 8 --epochs {classifiers} --attempts 3 --score-quantile 0 "
                            "--class-probability 0",
        "evaluate": ""}
    return {stage: [sys.executable, str(HERE / f"{stage}.py"), *common, *more.split()] for stage, more in words.items()}


def start(command, folder):
    """A stage's process, the first of a group of its own; what it says goes to the file `said`."""
    with open(folder / "said", "wb") as said:
        return subprocess.Popen(command, cwd=folder, stdout=said, stderr=said, start_new_session=True,
                                env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"})


def run_whole(command, folder):
    """Run a stage to its end; the seconds that it took. Ends the script where it fails."""
    begun = time.monotonic()
    if start(command, folder).wait():
        sys.exit(f"{' '.join(command[1:])} failed:\n{(folder / 'said').read_text(errors='replace')}")
    return time.monotonic() - begun


def run_killed(command, folder, seconds):
    """Run a stage and kill its group after `seconds`; whether the kill came before its end."""
    process = start(command, folder)
    try:
        if process.wait(seconds):
            sys.exit(f"{' '.join(command[1:])} failed:\n{(folder / 'said').read_text(errors='replace')}")
        return False
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return True


def progress(run):
    """How far a run has come: its files, and the rows of its logs."""
    rows = sum(len(path.read_bytes().splitlines()) for path in run.rglob("log.jsonl"))
    return f"{sum(path.is_file() for path in run.rglob('*'))} files, {rows} log rows there"


def draw_kills(took, kills, idle, rng):
    """(stage, seconds) of each kill, in the stages' order: every stage in turn, the longest first.

    Progress outlives a kill, so where a stage is killed n times a moment is uniform over 2/n of its work, which begins
    after `idle` seconds, the start of Python; over all of it for one or two.
    """
    turns = sorted(took, key=took.get, reverse=True)
    drawn = [turns[i % len(turns)] for i in range(kills)]
    spans = {stage: max(took[stage] - idle, 0.1) * min(1, 2 / max(1, drawn.count(stage))) for stage in took}
    return [(stage, idle + rng.random() * spans[stage]) for stage in sorted(drawn, key=list(took).index)]


def compare(a, b):
    """What differs between the two runs, a line each, and how many files there are; hidden ones do not count."""
    names = [{str(path.relative_to(run)) for path in run.rglob("[!.]*") if path.is_file()} for run in (a, b)]
    wrong = [f"{name}: in one run only" for name in sorted(names[0] ^ names[1])]
    for name in sorted(names[0] & names[1]):
        if Path(name).name != "options.json":
            wrong += [f"{name} differs"] if (a / name).read_bytes() != (b / name).read_bytes() else []
    return wrong, len(names[0])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, help="default 10, with --short 3")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="three kills, fewer epochs, within a minute")
    arguments = parser.parse_args()
    kills = arguments.kills or (3 if arguments.short else 10)
    begun, rng = time.monotonic(), np.random.default_rng(arguments.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        phantom.write_scans(folder / "scans", 3 if arguments.short else 6, scale=4.0, nodules=3)
        a, b = (stage_commands(run, arguments.short) for run in "AB")
        took = {stage: run_whole(command, folder) for stage, command in a.items()}
        print(f"undisturbed: {', '.join(f'{stage} {seconds:.1f} s' for stage, seconds in took.items())}", flush=True)
        idle = 0.8 * min(took.values())     # evaluation is mostly the start of Python and torch
        ended = 0
        for number, (stage, seconds) in enumerate(draw_kills(took, kills, idle, rng), 1):
            for before in b if not arguments.short else list(b)[ended:]:
                if before == stage:
                    break
                run_whole(b[before], folder)
            ended = list(b).index(stage)
            while not run_killed(b[stage], folder, seconds):
                seconds *= 0.7      # it had less left to do than that
            print(f"kill {number}/{kills}: {stage} after {seconds:.2f} s, with {progress(folder / 'B')}", flush=True)
        for command in list(b.values())[ended if arguments.short else 0:]:
            run_whole(command, folder)
        wrong, count = compare(folder / "A", folder / "B")
        left = [path.name for path in (folder / "B").rglob(".*") if path.suffix != ".lock"]
    for line in wrong:
        print(line)
    print(f"{kills} kills in {time.monotonic() - begun:.0f} s: {count} files, {len(wrong)} differences, "
          f"{len(left)} hidden leftovers {' '.join(left)}".rstrip())
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
