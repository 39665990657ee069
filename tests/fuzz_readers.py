"""Damaged and hostile files by the thousand: a reader gives a right result or our one line, nothing else.

    python tests/fuzz_readers.py                     # 6,000 inputs
    python tests/fuzz_readers.py --short             # as many as fit a minute
    python tests/fuzz_readers.py --seed 7 --only dicom

Each input is a valid file, changed by its number alone: bits flipped, bytes cut, doubled, swapped or put in, numbers
made huge, negative, fractional or no number, words swapped. A finding is any exception but Refusal, a Refusal of more
than one line, more than 5 s, more than 1 GB, a scan that breaks its own contract, or a file written outside the run.
"""

import argparse
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path


sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import lungaug

import numpy as np
import pydicom

import evaluate
import phantom
import preprocessing
import scan_files
import train_gan


NUMBERS = (b"0", b"-1", b"1e309", b"nan", b"inf", b"99999999999999999999", b"2147483648", b"-0.0", b"1e-320", b"0x10",
           b"", b"3.7")
WORDS = (b"True", b"False", b"LOCAL", b"LIST", b"MET_FLOAT", b"MET_SHORT", b"../x.raw", b"/etc/passwd", b"null", b"[]",
         b"{}", b"\x00", b"\xff\xfe",
         b"\r\n", b",", b"=", "\N{RIGHT-TO-LEFT OVERRIDE}".encode())


PARAMETERS = {"cube": 12, "max_slice_mm": 2.5}
RECORD = {"seriesuid": "1.2.3", "patient": "p", "volume": "1.2.3.npy", "crc32": 0, "origin": [0.0, 0.0, 0.0],
          "litres": 4.0,
          "positives": [[9, 9, 9]], "diameters": [6.0], "negatives": [[3, 4, 5], [20, 20, 20]], "split": "train"}


def damage(data, rng):
    """The bytes with one to four changes."""
    data = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        if not data:
            break
        a, b = sorted(int(i) for i in rng.integers(0, len(data) + 1, 2))
        kind = rng.integers(9)
        if kind == 0:       # a bit
            data[min(a, len(data) - 1)] ^= 1 << int(rng.integers(8))
        elif kind == 1:     # cut short
            del data[b:]
        elif kind == 2:     # a piece out
            del data[a:min(b, a + 40)]
        elif kind == 3:     # a piece doubled
            data[a:a] = data[a:min(b, a + 40)]
        elif kind == 4:     # bytes at random
            data[a:a + 4] = rng.bytes(4)
        elif kind in (5, 6):        # a number
            places = list(re.finditer(rb"-?\d+(?:\.\d+)?", data[:4000]))
            if places:
                place = places[rng.integers(len(places))]
                data[place.start():place.end()] = NUMBERS[rng.integers(len(NUMBERS))]
        elif kind == 7:     # a word
            places = list(re.finditer(rb"[A-Za-z_]{3,}", data[:4000]))
            if places:
                place = places[rng.integers(len(places))]
                data[place.start():place.end()] = WORDS[rng.integers(len(WORDS))]
        else:               # two lines swapped
            lines = bytes(data).splitlines(keepends=True)
            i, j = rng.integers(0, len(lines), 2)
            lines[i], lines[j] = lines[j], lines[i]
            data = bytearray(b"".join(lines))
    return bytes(data)


def right_scan(scan):
    """Raise AssertionError where a Scan breaks its own contract."""
    assert scan.hu.ndim == 3 and scan.hu.dtype in (np.int16, np.float32) and np.isfinite(scan.hu).all()
    assert scan.spacing.shape == scan.origin.shape == (3,) and scan.direction.shape == (3, 3)
    assert (scan.spacing > 0).all() and np.isfinite(scan.origin).all() and abs(np.linalg.det(scan.direction)) > 0.4


def read_annotations(path):
    for nodules in preprocessing.read_annotations(path).values():
        assert all(np.isfinite(nodule).all() and len(nodule) == 4 and nodule[3] > 0 for nodule in nodules)


def read_dataset(path):
    dataset = preprocessing.open_dataset(path.parent.parent)
    train_gan.draw_batch(dataset, 4, np.random.default_rng(0))


def read_volume(path):
    preprocessing.open_array.cache_clear()
    read_dataset(path.parent / "dataset.json")


def read_record(path):
    """A damaged record is found to be one, or still says what it said."""
    source = preprocessing.Source("1.2.3", "p", ())
    record = preprocessing.read_record(source, path.parent, PARAMETERS)
    assert record in ({}, RECORD), record
    preprocessing.is_whole(record, path.parent)


def read_checkpoint(path):
    lungaug.load_checkpoint(path, "")


def read_log(path):
    lungaug.read_log(path)
    lungaug.rewind_log(path, 3)


def read_report(path):
    evaluate.draw_report(path.parent.parent)


def make_targets(folder):
    """name → (the file that is damaged, what reads it): valid files of every kind, small."""
    scan = phantom.Phantom("1.2.3", "p", np.arange(6 * 7 * 8, dtype=np.int16).reshape(6, 7, 8), (0.7, 0.8, 2.5),
                           (-10.0, 5.5, -300.25), np.eye(3), [],
                           np.zeros((6, 7, 8), bool), np.zeros((6, 7, 8), np.uint8))
    places = {}
    for name, options in (("raw", {}), ("zraw", {"compressed": True}), ("mha", {"local": True})):
        (folder / name).mkdir()
        places[name] = Path(scan_files.write_metaimage(folder / name, scan, **options))
    dicom = Path(scan_files.write_dicom(folder / "dicom", scan))
    run = folder / "run"
    volume = np.random.default_rng(0).integers(-1000, 400, (30, 31, 32)).astype(np.int16)
    lungaug.write(run / "prepared" / "1.2.3.npy", volume)
    lungaug.write(run / "prepared" / "dataset.json", {"parameters": {"cube": 12}, "preset": "demo", "synthetic": True,
                                                      "table_1": preprocessing.table_1([RECORD], {}), "skipped": [],
                                                      "scans": [RECORD]})
    lungaug.write(run / "prepared" / "1.2.3.json",
                  RECORD | {"fingerprint": preprocessing.record_fingerprint(RECORD, PARAMETERS)})
    lungaug.write(folder / "checkpoint.pt", {"epoch": 1, "weights": {"a": np.zeros(0).tolist()}, "draws": "{}"})
    for name in ("prepared", "gan", "classifiers", "evaluation"):
        items = [lungaug.Heading("2 Dataset"), lungaug.Table("Table.", ["a"], [["b"]]),
                 lungaug.Figure("A figure.", "x.png")]
        lungaug.save_page(run / name, argparse.Namespace(run="r"), items)
    for epoch in range(1, 6):
        lungaug.append_log(folder / "log.jsonl", {"epoch": epoch, "loss": 0.5})
    head = ",".join(preprocessing.COLUMNS)
    (folder / "annotations.csv").write_text(f"{head}\n1.2.3,1.5,-2.5,3.25,6.4\n1.2.4,1,2,3,4\n")
    scan_reader = lambda path: right_scan(preprocessing.read_scan(path))
    return {
        "header": (places["raw"], scan_reader), "mha": (places["mha"], scan_reader),
        "raw": (places["raw"].with_suffix(".raw"), lambda path: scan_reader(path.with_suffix(".mhd"))),
        "zraw": (places["zraw"].with_suffix(".zraw"), lambda path: scan_reader(path.with_suffix(".mhd"))),
        "dicom": (sorted(dicom.glob("*.dcm"))[2], lambda path: scan_reader(path.parent)),
        "annotations": (folder / "annotations.csv", read_annotations),
        "dataset": (run / "prepared" / "dataset.json", read_dataset),
        "record": (run / "prepared" / "1.2.3.json", read_record),
        "volume": (run / "prepared" / "1.2.3.npy", read_volume),
        "checkpoint": (folder / "checkpoint.pt", read_checkpoint),
        "log": (folder / "log.jsonl", read_log), "report": (run / "gan" / "options.json", read_report)}


def too_long(*_):
    raise TimeoutError("more than 5 s")


def attempt(path, reader, data):
    """None, or what went wrong when the reader met these bytes."""
    path.write_bytes(data)
    signal.alarm(5)
    try:
        reader(path)
    except lungaug.Refusal as refusal:
        one_line = len(str(refusal).splitlines()) == 1 and str(refusal).isprintable()
        return None if one_line else f"not one line: {refusal!r}"
    except Exception:
        return traceback.format_exc()
    finally:
        signal.alarm(0)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=6000, help="inputs (default 6000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="one kind of file")
    parser.add_argument("--short", action="store_true", help="stop after a minute")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    signal.signal(signal.SIGALRM, too_long)
    start, findings, done = time.monotonic(), {}, 0
    with tempfile.TemporaryDirectory() as folder:
        targets = make_targets(Path(folder))
        targets = {name: target for name, target in targets.items() if arguments.only in (None, name)}
        for path, reader in targets.values():       # the valid files read, or there is nothing to learn
            assert attempt(path, reader, path.read_bytes()) is None, attempt(path, reader, path.read_bytes())
        now = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text(encoding="utf-8"))[1]) * 1024
        resource.setrlimit(resource.RLIMIT_AS, (now + 2 ** 30, resource.RLIM_INFINITY))
        before = {path.parent: set(path.parent.iterdir()) for path, _ in targets.values()}
        for number in range(arguments.count):
            if arguments.short and time.monotonic() - start > 60:
                break
            name = list(targets)[number % len(targets)]
            path, reader = targets[name]
            valid = path.read_bytes()
            wrong = attempt(path, reader, damage(valid, np.random.default_rng([arguments.seed, number])))
            path.write_bytes(valid)
            done += 1
            if wrong:
                kind = wrong.strip().splitlines()[-1].split(":")[0][:80]
                findings.setdefault(f"{name}: {kind}", (number, wrong))
        strange = [path for parent, names in before.items() for path in set(parent.iterdir()) - names
                   if path.name != "report.html"]
    for title, (number, wrong) in findings.items():
        print(f"--- input {number}, {title}\n{wrong}")
    print(f"{done} inputs of {len(targets)} kinds in {time.monotonic() - start:.0f} s: "
          f"{len(findings)} findings, {len(strange)} strange files")
    return 1 if findings or strange else 0


if __name__ == "__main__":
    lungaug.command(main)
