"""Lungaug: everything that the thesis has no section for, and the command that runs every stage.

    python lungaug.py                                      # no data at hand: synthetic scans, demo preset, report.html
    python lungaug.py --scans LUNA16 --run runs/luna16     # the thesis, on your scans
    python lungaug.py report --run runs/demo               # draw report.html again

Any option of a stage (`python train_gan.py --help`) may be given here and goes to the stages that know it.
In this file: presets, errors, randomness, safe files, checkpoints and logs, progress, drawing, the report.
It imports no other file of ours: each stage is run as the command that a student would type.
"""

import argparse
import base64
import html
import json
import os
import platform
import re
import shlex
import struct
import subprocess
import sys
import time
import zlib
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

HERE = Path(__file__).resolve().parent


# Presets: the one table of settings. It makes the options of every stage and README's table.

class Preset(NamedTuple):
    stage: str
    name: str
    thesis: object
    demo: object
    unit: str
    why: str


PRESETS = (
    Preset("preprocessing", "cube", 48, 24, "voxels of 1 mm", "2.1.4 [num_2_1_4_cube]; 24 is an eighth of the work"),
    Preset("preprocessing", "negatives", 655, 655, "a scan", "Table 1: 581,130 in 888 scans [num_2_1_4_negatives]"),
    Preset("train_gan", "width", 16, 2, "channels at full size", "lost with figures 4–6; 2 learns in minutes on two cores"),
    Preset("train_gan", "batch-size", 64, 16, "cubes", "4.1.1 [num_4_1_batch_size]; 16 gives more steps a minute"),
    Preset("train_gan", "learning-rate", 1e-4, 1e-3, "", "4.1.1 [num_4_1_learning_rate]; a small network for a few minutes bears 1e-3"),
    Preset("train_gan", "penalty-scale", 10.0, 10.0, "λ", "4.1.1 [num_4_1_lambda]"),
    Preset("train_gan", "auxiliary-scale", 1.0, 10.0, "α", "4.1.1, at the beginning; few epochs learn the classes only under 10"),
    Preset("train_gan", "late-auxiliary-scale", 10.0, 10.0, "α", "4.1.1, at the end"),
    Preset("train_gan", "critic-iterations", 5, 5, "an epoch", "4.1.1, then one of the generator"),
    Preset("train_gan", "epochs", 20000, 300, "of 5 + 1 iterations", "4.1.1 [num_4_1_epochs]; 300 take five minutes"),
    Preset("train_classifier", "score-quantile", 0.5, 0.5, "of the reals' scores", "4.3, “some threshold”: real enough is the median real"),
    Preset("train_classifier", "class-probability", 0.9, 0.9, "", "4.3, “confident above a threshold”"),
    Preset("train_classifier", "attempts", 20, 20, "for each one wanted", "a GAN that cannot deliver must not run for ever"),
    Preset("train_classifier", "batch-size", 64, 64, "cubes, half positive", "4.4.1 [num_4_4_batch_size]"),
    Preset("train_classifier", "learning-rate", 1e-3, 1e-3, "", "4.4.1 [num_4_4_learning_rate]"),
    Preset("train_classifier", "late-learning-rate", 1e-4, 1e-4, "", "4.4.1"),
    Preset("train_classifier", "decay-epoch", 30, 10, "", "4.4.1: half-way"),
    Preset("train_classifier", "epochs", 60, 20, "over the positives", "4.4.1 [num_4_4_epochs]; 20 do for a few hundred cubes"),
)


def whole(least):
    """A parser of whole numbers from `least` on, for argparse."""
    def parse(text):
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is below {least}")
        return value
    parse.__name__ = "whole number"
    return parse


def number(text):
    """A finite number, not negative, for argparse."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 on")
    return value


STAGES = ("preprocessing", "train_gan", "train_classifier", "evaluate")

OPTIONS = (     # stages, name, default, settings for argparse
    (STAGES, "--run", None, dict(type=Path, help="the folder the run lives in (default runs/demo, or runs/<the name of --scans>)")),
    (STAGES, "--preset", None, dict(choices=("demo", "thesis"), help="the defaults (default: demo for synthetic scans, thesis for yours)")),
    (STAGES, "--seed", 0, dict(type=whole(0), help="the one source of all randomness (default 0)")),
    (STAGES, "--device", "auto", dict(help="auto, cpu, cuda, cuda:1, … (default auto)")),
    (STAGES[:1], "--scans", None, dict(type=Path, help="a tree of folders with MetaImage or DICOM scans (default: synthetic ones)")),
    (STAGES[:1], "--annotations", None, dict(type=Path, help="annotations.csv (default: the one in or above --scans)")),
    (STAGES[:1], "--workers", min(os.cpu_count() or 1, 8), dict(type=whole(1), help="processes, each with a scan in memory (default: one a core, at most 8)")),
    (STAGES[:1], "--strict", False, dict(action="store_true", help="stop at the first scan that cannot be used")),
    (STAGES[1:2], "--precision", "float32", dict(choices=("float32", "bfloat16"), help="bfloat16 halves memory and time on a GPU that has it")),
    (STAGES[1:2], "--micro-batch", None, dict(type=whole(1), help="cubes at a time where the batch does not fit in memory; the gradients are the same")),
    (STAGES[1:2], "--checkpoint-minutes", 5.0, dict(type=number, help="minutes between checkpoints (default 5)")),
    (STAGES[:3], "--overwrite", False, dict(action="store_true", help="start again, from nothing")),
)


def rows_of(stage):
    """A stage's options as (name, default, settings for argparse): its rows of OPTIONS and of PRESETS."""
    presets = [(f"--{row.name}", None, dict(type=whole(1) if isinstance(row.thesis, int) else number, metavar=row.name.split("-")[-1].upper(),
                                            help=f"{row.unit} (thesis {row.thesis}, demo {row.demo})".lstrip())) for row in PRESETS if row.stage == stage]
    return [row[1:] for row in OPTIONS if stage in row[0]] + presets


def parse(description, *stages, words=None):
    """What was typed: a Namespace with an attribute for each option of the stages, None where it was not typed."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    for name, (_, settings) in {row[0]: row[1:] for stage in stages[::-1] for row in rows_of(stage)}.items():
        parser.add_argument(name, default=None, **settings)
    return parser.parse_args(words)


def settle(arguments, stage, preset):
    """Fill what was not typed: from OPTIONS' defaults, then from the preset. Returns the same Namespace."""
    arguments.preset = arguments.preset or preset
    for name, default, _ in rows_of(stage):
        key = name[2:].replace("-", "_")
        if getattr(arguments, key) is None:
            row = next((row for row in PRESETS if (row.stage, f"--{row.name}") == (stage, name)), None)
            setattr(arguments, key, getattr(row, arguments.preset) if row else default)
    return arguments


def typed(arguments, stage):
    """The words that hand a stage those of the typed options that it knows."""
    words = []
    for name, *_ in rows_of(stage):
        value = getattr(arguments, name[2:].replace("-", "_"))
        words += [] if value is None else [name] if value is True else [name, value]
    return words


# Errors: what the user can act on is one line and exit status 2

class Refusal(Exception):
    """`lungaug: <file>: <what was found> — <what to do>`, for whatever the user can act on."""

    def __init__(self, where, found, do):
        super().__init__(where, found, do)

    def __str__(self):
        where, found, do = map(printable, self.args)
        return f"lungaug: {where}: {found} — {do}"


def check(holds, where, found, do):
    """Raise Refusal(where, found, do) unless it holds: the one way in which a bad file or option is turned away."""
    if not holds:
        raise Refusal(where, found, do)


def printable(text, most=300):
    """`text` on one line: what a file says about itself may hold line ends and terminal codes."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
    return text if len(text) <= most else text[:most] + "…"


def command(main):
    """Run a stage's main(); a Refusal, or an error of the file system, is one line on stderr and exit status 2."""
    try:
        sys.exit(main())
    except Refusal as refusal:
        print(refusal, file=sys.stderr)
    except OSError as error:
        print(Refusal(error.filename or "the file system", error.strerror or error, "make room or mend the path, then run it again"),
              file=sys.stderr)
    except KeyboardInterrupt:
        print("\nlungaug: stopped — the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
    sys.exit(2)


# Randomness: one --seed, and a generator of its own for each use, named

def stream(seed, *names):
    """A numpy Generator that depends on the seed and the names alone."""
    return np.random.default_rng([seed, *(zlib.crc32(str(name).encode()) for name in names)])


def torch_stream(seed, *names):
    """A torch Generator on the CPU (the same numbers whatever the device) that depends on the seed and the names alone."""
    return torch.Generator().manual_seed(int(stream(seed, *names).integers(2 ** 62)))


def stream_state(generator):
    """A numpy Generator's state as text, for a checkpoint."""
    return json.dumps(generator.bit_generator.state)


def restore_stream(generator, text):
    generator.bit_generator.state = json.loads(text)


def pick_device(name):
    """torch.device for --device; auto is a GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise Refusal(f"--device {name}", str(error).splitlines()[0], "use --device cpu, or a device that this torch has") from None
    return device


# Safe files: write beside, fsync, rename; a reader never sees half a file

@contextmanager
def writing(path):
    """Yield a binary file that takes the name `path` only when it is whole and on the disk."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(beside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_bytes(path, data):
    with writing(path) as file:
        file.write(data)


def write_text(path, text):
    write_bytes(path, text.encode())


def write_array(path, array):
    with writing(path) as file:
        np.save(file, array)


def write_json(path, value):
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_json(path, do):
    """The JSON file's value; `do` is what to tell the user where it is missing or broken."""
    try:
        return json.loads(Path(path).read_bytes())
    except FileNotFoundError:
        raise Refusal(path, "is not there", do) from None
    except (ValueError, RecursionError) as error:
        raise Refusal(path, f"is no JSON ({error})", do) from None


def claim(folder, parameters, overwrite):
    """Make the folder, for output with these parameters alone: Refusal where it holds other output; --overwrite empties it."""
    path = Path(folder) / "parameters.json"
    if overwrite:
        for old in (path for path in Path(folder).glob("*") if path.suffix in (".npy", ".png", ".json")):
            old.unlink()
    elif path.exists():
        same_settings(path, read_json(path, "remove the folder"), parameters)
    write_json(path, parameters)


# Checkpoints and logs

def save_checkpoint(path, state):
    with writing(path) as file:
        torch.save(state, file)


def load_checkpoint(path, do):
    """The state that `save_checkpoint` wrote (tensors, numbers, text, lists and dicts: no code is run)."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise Refusal(path, "is not there", do) from None
    except OSError:
        raise
    except Exception as error:      # a damaged file raises anything: pickle, zip, runtime, key, attribute errors
        raise Refusal(path, f"does not read back ({type(error).__name__})", "remove it, or start again with --overwrite") from None


def same_settings(path, found, asked):
    """Raise Refusal, naming what differs, unless a checkpoint's settings are those asked for."""
    found = found if isinstance(found, dict) else {}
    wrong = [f"{key} {found.get(key)}, not {value}" for key, value in asked.items() if found.get(key) != value]
    check(not wrong, path, f"made with {'; '.join(wrong)}", "give the same options, another --run, or --overwrite")


def append_log(path, row):
    """One more JSON line at the end of the log."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")


def read_log(path):
    """The log's rows; a last line cut short by a kill is passed over. An empty list where there is none."""
    rows = []
    for line in Path(path).read_text().splitlines() if Path(path).exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def rewind_log(path, epoch):
    """Keep the rows up to `epoch`, the checkpoint's, so that a resumed run's log is the uninterrupted run's."""
    rows = [row for row in read_log(path) if row["epoch"] <= epoch]
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def record_stage(folder, arguments, seconds):
    """Leave the options and the time of a stage in <folder>/options.json, for the report."""
    shown = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    write_json(Path(folder) / "options.json", {"command": shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]), "options": shown,
                                               "seconds": round(seconds, 1), "versions": versions})


def file_crc(path, do):
    """CRC-32 of a file's bytes, to tell whether what was made from it still fits."""
    try:
        return zlib.crc32(Path(path).read_bytes())
    except FileNotFoundError:
        raise Refusal(path, "is not there", do) from None


@torch.no_grad()
def predict(network, cubes, count, device, size=256):
    """network over `count` cubes, `size` at a time; cubes(indices) → (n, 1, c, c, c) float32. Returns a numpy array (count, …)."""
    parts = [network(torch.from_numpy(cubes(part)).to(device)).float().cpu().numpy() for part in np.split(np.arange(count), range(size, count, size))]
    return np.concatenate(parts)


# Progress

def progress(label, total, every=15.0):
    """A function `step(done, text="")` that shows done/total, rate and time left: one line on a terminal, a line now and then elsewhere."""
    start, shown, first = time.monotonic(), [0.0], []

    def step(done, text=""):
        now, live = time.monotonic(), sys.stderr.isatty()
        first.append(done) if not first else None
        if done < total and now - shown[0] < (0.2 if live else every):
            return
        shown[0] = now
        rate = (done - first[0]) / max(now - start, 1e-9)
        left = f", {duration((total - done) / rate)} left" if rate > 0 and done < total else ""
        line = f"{label} {done}/{total}  {f'{rate:.1f}/s' if rate >= 1 else f'{rate * 60:.1f}/min'}{left}  {text}"
        print(f"\r\x1b[K{line}" if live else line, end="" if live and done < total else "\n", file=sys.stderr, flush=True)

    return step


def duration(seconds):
    """45 s, 12 min, 3.4 h, 2.1 days."""
    for size, unit in ((86400, "days"), (3600, "h")):
        if seconds >= 2 * size or (unit == "h" and seconds >= size):
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"


# Drawing: PNG with zlib, SVG with strings

def png(pixels):
    """A PNG file's bytes. pixels: uint8, (rows, columns) grey or (rows, columns, 3) red-green-blue."""
    pixels = np.ascontiguousarray(pixels, np.uint8)
    height, width = pixels.shape[:2]
    rows = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, -1)], axis=1)

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2 if pixels.ndim == 3 else 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows.tobytes(), 6)) + chunk(b"IEND", b"")


def grey(x):
    """[-1, 1] → 0…255, so that -1000 HU is black and 400 HU white; any shape."""
    return np.clip(np.rint((np.asarray(x, np.float32) + 1) * 127.5), 0, 255).astype(np.uint8)


def tile(images, columns, gap=2, paper=40):
    """Equal-sized images (n, rows, columns[, 3]) side by side in reading order, `gap` pixels of grey `paper` between them."""
    images = np.asarray(images)
    lines = -(-len(images) // columns)
    height, width = images.shape[1] + gap, images.shape[2] + gap
    sheet = np.full((lines * height + gap, columns * width + gap, *images.shape[3:]), paper, np.uint8)
    for i, image in enumerate(images):
        top, left = (i // columns) * height + gap, (i % columns) * width + gap
        sheet[top:top + images.shape[1], left:left + images.shape[2]] = image
    return sheet


def enlarge(image, factor):
    """Each pixel becomes factor×factor."""
    return image.repeat(factor, 0).repeat(factor, 1)


def slices(cube, columns=12):
    """All axial slices of a cube in reading order, superior to inferior   [rule_2_1_7_reading_order]

    cube: (z, y, x) in [-1, 1], z rising to superior. Returns uint8 grey.
    """
    return tile(grey(cube[::-1]), columns, gap=1)


def planes(cube):
    """The three middle planes (axial, coronal, sagittal) of a cube (z, y, x) in [-1, 1], superior up, side by side."""
    c = cube.shape[0] // 2
    return tile(grey(np.stack([cube[c], cube[::-1, c], cube[::-1, :, c]])), 3, gap=1)


COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd")


def curves(title, lines, x_label, y_label, width=460, height=270):
    """An SVG of curves. lines: (name, x, y, (low, high) or None); the band between low and high is shaded."""
    lines = [(name, *(np.asarray(v, float) for v in (x, y)), band) for name, x, y, band in lines]
    seen = np.concatenate([v for _, _, y, band in lines for v in (y, *(band or ()))])
    seen, right = seen[np.isfinite(seen)], max(x[-1] for _, x, _, _ in lines)
    left, low, high = min(x[0] for _, x, _, _ in lines), *((seen.min(), seen.max()) if len(seen) else (0, 1))
    low, high = (low - 0.5, high + 0.5) if high - low < 1e-12 else (low, high)

    def place(x, y):
        return 58 + (x - left) / max(right - left, 1e-12) * (width - 72), height - 42 - (y - low) / (high - low) * (height - 74)

    def path(x, y):
        return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(*place(x, y)) if np.isfinite(b))

    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
           f'font-family="sans-serif" font-size="11"><rect width="100%" height="100%" fill="#fff"/>'
           f'<text x="{width / 2}" y="15" text-anchor="middle" font-size="13">{html.escape(title)}</text>']
    for value in ticks(low, high):
        y = place(left, value)[1]
        out.append(f'<path d="M58 {y:.1f}H{width - 14}" stroke="#ddd"/><text x="53" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    for value in ticks(left, right):
        x = place(value, low)[0]
        out.append(f'<text x="{x:.1f}" y="{height - 27}" text-anchor="middle">{value:g}</text>')
    for i, (name, x, y, band) in enumerate(lines):
        colour = COLOURS[i % len(COLOURS)]
        if band:
            out.append(f'<polygon fill="{colour}" fill-opacity=".2" points="{path(x, band[1])} {path(x[::-1], np.asarray(band[0])[::-1])}"/>')
        out.append(f'<polyline fill="none" stroke="{colour}" stroke-width="1.6" points="{path(x, y)}"/>'
                   f'<text x="{width - 18}" y="{33 + 14 * i}" text-anchor="end" fill="{colour}">{html.escape(name)}</text>')
    out.append(f'<text x="{width / 2}" y="{height - 8}" text-anchor="middle">{html.escape(x_label)}</text>'
               f'<text transform="translate(13 {height / 2}) rotate(-90)" text-anchor="middle">{html.escape(y_label)}</text></svg>')
    return "".join(out)


def beside(*pictures, columns=2):
    """SVGs of one size as one SVG, in reading order."""
    width, height = (int(re.search(f'{side}="([0-9]+)"', pictures[0])[1]) for side in ("width", "height"))
    lines = -(-len(pictures) // columns)
    inner = "".join(f'<g transform="translate({i % columns * width} {i // columns * height})">{picture}</g>' for i, picture in enumerate(pictures))
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {columns * width} {lines * height}" '
            f'width="{columns * width}" height="{lines * height}">{inner}</svg>')


def ticks(low, high):
    """Four to eight round numbers within [low, high]."""
    step = 10 ** np.floor(np.log10(max(high - low, 1e-12)))
    step *= next(f for f in (0.1, 0.2, 0.5, 1, 2) if (high - low) / (step * f) <= 8)
    return [round(float(v), 10) for v in np.arange(np.ceil(low / step), np.floor(high / step) + 1) * step]


def smooth(values, window):
    """Running mean over a centred window, and its 95% band, ±1.96 standard deviations within it   [rule_4_1_smoothed]

    values: (n,). Returns the mean (n,) and the band's (low, high).
    """
    values = np.asarray(values, float)
    out = np.empty((2, len(values)))
    for i in range(len(values)):
        part = values[max(0, i - window // 2):i + window // 2 + 1]
        out[:, i] = part.mean(), 1.96 * part.std()
    return out[0], (out[0] - out[1], out[0] + out[1])


# The stages, each as the command that a student would type

def default_run(run, scans=None):
    """--run, or runs/demo for synthetic scans, or runs/<name of the folder> for yours."""
    return run or Path("runs") / (Path(scans).resolve().name if scans else "demo")


def stage(script, *arguments):
    """Print the command, run it, and stop where it fails, with its exit status."""
    words = [str(word) for word in (script, *arguments)]
    print(f"\n$ python {shlex.join(words)}", flush=True)
    status = subprocess.run([sys.executable, HERE / words[0], *words[1:]]).returncode
    if status:
        sys.exit(status)


def shown(value):
    """A number as a table prints it: three decimals or a whole number with commas; – for none."""
    if value is None or value != value:
        return "–"
    return f"{value:.3f}" if isinstance(value, float) else f"{value:,}"


# The report

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:1000px;margin:2em auto;padding:0 1em;color:#222;background:#fff}
h1{font-size:1.5em}h2{font-size:1.15em;border-bottom:1px solid #ccc;margin-top:2em}table{border-collapse:collapse;margin:.6em 0}
td,th{padding:.15em .8em;text-align:right;border-bottom:1px solid #eee}td:first-child,th:first-child{text-align:left}
img,svg{max-width:100%;height:auto}img{image-rendering:pixelated}figure{margin:1em 0}figcaption,.note{color:#555;font-size:.9em}"""


def table_html(head, rows):
    lines = [f"<tr>{''.join(f'<{tag}>{html.escape(str(cell))}</{tag}>' for cell in cells)}</tr>" for tag, cells in [("th", head), *(("td", row) for row in rows)]]
    return f"<table>{''.join(lines)}</table>"


def figure_html(path, caption):
    """The picture inline, with its caption; a line that says so where the stage left none."""
    if not path.exists():
        return f'<p class="note">{html.escape(caption)}: no picture ({html.escape(path.name)} was not made).</p>'
    data = path.read_bytes()
    image = data.decode() if path.suffix == ".svg" else f'<img alt="{html.escape(caption)}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'
    return f"<figure>{image}<figcaption>{html.escape(caption)}</figcaption></figure>"


def report(run):
    """Draw <run>/report.html, one page that needs nothing else, from what the stages left in the run; returns its path."""
    do = f"run python lungaug.py --run {run} first"
    dataset, results = read_json(run / "prepared" / "dataset.json", do), read_json(run / "evaluation" / "results.json", do)
    stages = [(name, read_json(run / name / "options.json", do)) for name in ("prepared", "gan", "classifiers", "evaluation")]
    generated = read_json(run / "classifiers" / "generated" / "generated.json", do)["classes"]
    kind = "Synthetic scans: these numbers say that the program works, nothing about patients." if dataset["synthetic"] else "Your scans."
    page = ["<h1>Generative adversarial data augmentation for lung nodule detection</h1>",
            f'<p>Preset {dataset["preset"]}, {len(dataset["scans"])} scans, cube {dataset["parameters"]["cube"]}. <b>{kind}</b></p>',
            "<h2>2 Dataset</h2><p>Table 1. Sample counts; positives with their eight flips, as the thesis counts them.</p>",
            table_html(("", "positive", "nodules", "negative", "thesis positive", "thesis negative"),
                       [(name, *map(shown, (row["positive"], row["nodules"], row["negative"], *row["thesis"]))) for name, row in dataset["table_1"].items()])]
    if dataset["left_out"]:
        page += [f"<p>{len(dataset['left_out'])} scans were left out.</p>", table_html(("series", "reason"), [(r["seriesuid"], r["reason"]) for r in dataset["left_out"]])]
    folder = run / "prepared"
    first = max(dataset["scans"], key=lambda scan: len(scan["positives"]))
    page += [figure_html(folder / first["volume"].replace(".npy", ".png"), f"Scan {first['seriesuid']} at 1 mm: axial, coronal, sagittal; the lung mask's outline in red, nodules in green."),
             figure_html(folder / "nodules.png", "Nodules, each in its three middle planes: axial, coronal, sagittal."),
             figure_html(folder / "figure_2.png", "Figure 2. Positive samples, slice by slice from superior to inferior."),
             figure_html(folder / "figure_3.png", "Figure 3. Negative samples, slice by slice from superior to inferior."),
             "<h2>4.1 Wasserstein GAN</h2>",
             figure_html(run / "gan" / "figure_7.svg", "Figure 7. Loss curves, smoothed, with 95% bands."),
             figure_html(run / "gan" / "progression.png", "A fixed z through the training, a row a moment from the start to the end: four negatives, then four positives; middle axial slice."),
             "<h2>4.3 Generative augmentation</h2>",
             table_html(("class", "wanted", "accepted", "acceptance rate", "score at least"),
                        [(name, *map(shown, (row["wanted"], row["accepted"], row["rate"], row["score_threshold"]))) for name, row in generated.items()]),
             figure_html(run / "evaluation" / "samples.png", "Middle axial slices, a row each: real positives, generated positives, real negatives, generated negatives."),
             "<h2>4.4 Classifier</h2>", figure_html(run / "classifiers" / "figure_8.svg", "Figure 8. Training and validation loss."),
             "<h2>5.2 Classification metrics</h2>"]
    for number, table in results["tables"].items():
        rows = [(key, *(shown(table[column][part][key]) if column in table else "–" for column in ("flips", "nodules", "thesis")))
                for part in ("confusion", "metrics") for key in table["thesis"][part]]
        page += [f"<p>Table {number}. {table['title']}</p>", table_html(("", "this run, with flips", "this run, nodules", "thesis"), rows)]
    page.append("<h2>5.1 Novelty: generated (left), nearest real training sample (right)</h2>")
    for row in results["novelty"]["generated"]:
        note = "" if row["accepted"] else " Not accepted by 4.3: the best-scored of the rejected."
        page.append(figure_html(run / "evaluation" / f"figure_{row['figure']}.png", f"Figure {row['figure']}. l2 distance {row['distance']:.1f}.{note}"))
    page += ["<p>For scale, real test positives lie " + ", ".join(f"{d:.1f}" for d in results["novelty"]["held_out_distances"]) + " from their nearest training sample.</p>",
             "<h2>This run</h2>", table_html(("stage", "seconds", "command"), [(name, shown(s["seconds"]), s["command"]) for name, s in stages]),
             table_html(("option", "value"), [(f"{name}: {key}", value) for name, s in stages for key, value in s["options"].items()])]
    write_text(run / "report.html", f'<!doctype html><html lang="en"><meta charset="utf-8"><title>lungaug: {html.escape(str(run))}</title>'
                                    f"<style>{STYLE}</style><body>{''.join(page)}</body></html>\n")
    return run / "report.html"


def main():
    if sys.argv[1:2] == ["report"]:
        parser = argparse.ArgumentParser(description="Draw report.html again.", prog="lungaug.py report")
        parser.add_argument("--run", type=Path, default=default_run(None))
        print(report(parser.parse_args(sys.argv[2:]).run))
        return
    arguments, start = parse(__doc__.split("\n\n")[0], *STAGES), time.monotonic()
    arguments.run = default_run(arguments.run, arguments.scans)
    for name in STAGES:
        stage(f"{name}.py", *typed(arguments, name))
    print(f"\n{report(arguments.run)}: everything on one page, after {duration(time.monotonic() - start)}.")


if __name__ == "__main__":
    command(main)
