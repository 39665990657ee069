"""How fast preprocessing is, as ratios to plainer ways, side by side in one run; medians over the scans.

    python tests/bench_preprocessing.py --scans DIR      # a few scans; minutes, for the plain ways are slow

ours      a scan from its files to its cubes, as preprocessing.py does it
public    the recipe in wide use: zoom of order 3, then a 2-D segmentation of the lungs slice by slice
plain     full resolution: zoom of order 3, then lung_mask at 1 mm with one large ball for the closing

Then: our mask, made at 2 mm, against the plain way's (Dice), two processes against one, the peak memory of a process,
the disk a scan takes, and what they make for 888 scans.
"""

import argparse
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import lungaug

import numpy as np
from scipy import ndimage

import preprocessing
from preprocessing import clip_hu, coarse_lungs, find_scans, lung_mask, prepare_scan, read_source, reorient


PARAMETERS = {"cube": 48, "negatives": 655, "max_slice_mm": 2.5, "seed": 0}
ALL = 888


def disk(radius):
    """A flat disk of `radius` pixels."""
    y, x = np.ogrid[-radius:radius + 1, -radius:radius + 1]
    return x * x + y * y <= radius * radius


def slice_mask(image):
    """The 2-D recipe on one slice: threshold, clear the border, keep the two largest, erode, close, fill."""
    labels, _ = ndimage.label(image < -400)
    border = np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))
    labels[np.isin(labels, border)] = 0
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    mask = np.isin(labels, np.argsort(sizes)[-2:]) & (labels > 0)
    mask = ndimage.binary_erosion(mask, disk(2))
    mask = ndimage.binary_closing(mask, disk(10))
    return ndimage.binary_fill_holes(mask)


def public_recipe(source):
    """zoom of order 3 to 1 mm, then the lungs slice by slice."""
    scan = read_source(source)
    hu = ndimage.zoom(scan.hu, scan.spacing[::-1], order=3)
    return hu, np.stack([slice_mask(image) for image in hu])


def plain(source):
    """zoom of order 3 to 1 mm, then lung_mask at full resolution, closed by one ball."""
    def close_ball(mask, radius):
        z, y, x = np.ogrid[-radius:radius + 1, -radius:radius + 1, -radius:radius + 1]
        return ndimage.binary_closing(np.pad(mask, radius),
                                      x * x + y * y + z * z <= radius * radius)[(slice(radius, -radius),) * 3]

    scan, ours = reorient(read_source(source)), preprocessing.close_ball
    hu = ndimage.zoom(clip_hu(scan.hu), scan.spacing[::-1], order=3)
    preprocessing.close_ball = close_ball
    try:
        return hu, lung_mask(hu)
    finally:
        preprocessing.close_ball = ours


def timed(times, function, *arguments):
    """The function's result; its seconds are added to the list."""
    start = time.perf_counter()
    result = function(*arguments)
    times.append(time.perf_counter() - start)
    return result


def dice(source, full):
    """Our mask at 2 mm, brought to the grid of the plain way's, against that."""
    scan = read_source(source)
    _, mask = coarse_lungs(scan._replace(hu=clip_hu(scan.hu)))
    scan = reorient(scan)
    ends, full_ends = np.array(scan.hu.shape) - 1, np.array(full.shape) - 1     # zoom keeps both ends
    step = ends * scan.spacing[::-1] / full_ends / 2
    ours = ndimage.affine_transform(mask.hu.astype(np.float32), step, output_shape=full.shape, order=1) > 0.5
    return 2 * (full & ours).sum() / (full.sum() + ours.sum())


def parallel(sources, nodules, workers):
    """Wall seconds of `prepare` over the scans, four times each; peak memory a process and disk a scan, in MB."""
    many = [source._replace(seriesuid=f"{source.seriesuid}.{i}") for i in range(4) for source in sources]
    annotations = {source.seriesuid: nodules.get(source.seriesuid.rpartition(".")[0], []) for source in many}
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        preprocessing.prepare(many, annotations, Path(folder), PARAMETERS,
                              argparse.Namespace(workers=workers, strict=True))
        wall = time.perf_counter() - start
        size = sum(path.stat().st_size for path in Path(folder).iterdir())
    return wall, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024, size / 1e6 / len(many), len(many)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--scans", type=Path, required=True, help="a folder with a few scans and their annotations.csv")
    parser.add_argument("--skip-plain", action="store_true", help="leave out the full-resolution way, the slowest")
    arguments = parser.parse_args()
    sources = find_scans(arguments.scans)
    nodules = preprocessing.read_annotations(preprocessing.find_annotations(arguments.scans))
    times, agree = {"ours": [], "public": [], "plain": []}, []
    with tempfile.TemporaryDirectory() as folder:
        for source in sources:
            for _ in range(3):
                timed(times["ours"], prepare_scan, source, nodules.get(source.seriesuid, []), Path(folder), PARAMETERS)
            timed(times["public"], public_recipe, source)
            if not arguments.skip_plain:
                agree.append(dice(source, timed(times["plain"], plain, source)[1]))
    ours = statistics.median(times["ours"])
    for name, values in times.items():
        if values:
            middle = statistics.median(values)
            print(f"{name:<8}{middle:8.2f} s a scan   {middle / ours:6.1f} × ours")
    if agree:
        print(f"Dice of our mask with the plain way's: {', '.join(f'{value:.4f}' for value in agree)}")
    one, two = parallel(sources, nodules, 1), parallel(sources, nodules, 2)
    print(f"{one[3]} scans: one process {one[0]:.1f} s, two {two[0]:.1f} s: {one[0] / two[0]:.2f} ×; "
          f"peak memory {two[1]:.0f} MB a process; disk {one[2]:.0f} MB a scan")
    print(f"{ALL} scans: {ALL / one[3] * one[0] / 60:.0f} min in one process, {ALL / one[3] * two[0] / 60:.0f} in two; "
          f"{ALL * one[2] / 1000:.0f} GB")


if __name__ == "__main__":
    lungaug.command(main)
