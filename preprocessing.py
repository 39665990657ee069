"""Preprocessing: section 2, from CT scans to cubes with and without nodules.

    python preprocessing.py --scans LUNA16 --run runs/luna16 --workers 8     # your scans
    python preprocessing.py                                                  # synthetic ones
    python preprocessing.py --run runs/e1 --prepared runs/luna16             # another run's

Reads MetaImage and DICOM (2), resamples them to 1×1×1 mm (2.1.1) and scales them to [-1, 1]
(2.1.2), finds the lungs (2.1.3), cuts cubes (2.1.4), splits them (2.1.5) and flips (2.1.6).
Leaves <run>/prepared: dataset.json; a volume, a picture and a record of each scan.

The order of this file: axes; 2.1.1 to 2.1.6 and Table 1, rule by rule; from a scan to its cubes;
the prepared data as the other stages read them; the command; and, as an appendix, the file formats.
"""

import csv
import functools
import io
import itertools
import os
import re
import zlib
from collections import defaultdict
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import lungaug
from lungaug import Refusal, check

import numpy as np
import pydicom
from scipy import ndimage, sparse


AIR = -1000     # HU, 2.1.2: the lower end of the range that is kept
BONE = 400      # HU, 2.1.2: the upper end
LUNG_BELOW = -500   # HU, 2.1.3: what is less dense is lung, or air outside it
TOLERANCE = 1e-3    # mm, and of direction cosines: what a file's decimals may be off


# Axes: arrays are (z, y, x). Millimetres are (x, y, z) along the patient's axes, LPS: x rises to
# the left, y to the back, z to the head. HU are Hounsfield units.

class Scan(NamedTuple):
    """A CT scan as its file holds it.

    Voxel hu[k, j, i] lies at origin + direction · (spacing · (i, j, k)).
    """
    seriesuid: str
    hu: np.ndarray          # (z, y, x), int16, or float32 where the file holds fractions
    spacing: np.ndarray     # (x, y, z), mm
    origin: np.ndarray      # (x, y, z), mm, LPS
    direction: np.ndarray   # 3×3, LPS: its columns are the x, y, z index axes
    ignored: tuple = ()     # what the series holds beside its slices, a phrase each


class Volume(NamedTuple):
    """A scan at 1 mm along the patient's axes: voxel hu[z, y, x] lies at origin + (x, y, z)."""
    hu: np.ndarray          # (z, y, x)
    origin: np.ndarray      # (x, y, z), mm, LPS


class Source(NamedTuple):
    """Where a scan lies: one MetaImage header, or the files of one DICOM series."""
    seriesuid: str
    patient: str            # as DICOM names it; a MetaImage names none, and counts as one by itself
    files: tuple
    conflict: Path = None   # another file of the same series with other contents: neither is used


def reverse_axes(values):
    """(x, y, z) ↔ (z, y, x) along the last axis; a view.

    Every change between millimetres and an index goes through here.
    """
    return np.asarray(values)[..., ::-1]


def affine(scan):
    """The 3×3 matrix that takes an index (i, j, k) along x, y, z to millimetres from the origin."""
    return scan.direction * scan.spacing


def to_index(scan, points):
    """The scan's index (z, y, x), with fractions, at points (x, y, z) in mm; (n, 3) → (n, 3)."""
    return reverse_axes((points - scan.origin) @ np.linalg.inv(affine(scan)).T)


def to_world(scan, index):
    """The points (x, y, z) in mm at the scan's index (z, y, x); (n, 3) → (n, 3)."""
    return reverse_axes(index) @ affine(scan).T + scan.origin


def to_grid(origin, points):
    """The 1 mm grid's index (z, y, x), with fractions, at points (x, y, z) in mm; same shape.

    origin: the grid's, (x, y, z) in mm.
    """
    return reverse_axes(np.asarray(points, float) - origin)


def exceeds(values, limit):
    """Whether values lie above a limit by more than rounding: values > limit + TOLERANCE

    values: mm or direction cosines, any shape; the result has it, too. Programs write 2.5 mm as
    2.5000000985, or as positions of a few decimals.
    """
    return np.asarray(values) > limit + TOLERANCE


def differs(one, other):
    """Whether two numbers, or two arrays anywhere, differ by more than rounding: see `exceeds`."""
    return bool(exceeds(np.abs(np.subtract(one, other)), 0).any())


def slice_distance(scan):
    """The spacing in mm of the index axis nearest to the patient's z: between axial slices.

    A MetaImage's axes may come in any order, so it need not be the last.
    """
    _, _, slice_axis = index_axes(scan.direction)
    return float(scan.spacing[slice_axis])


# 2.1.1 Aspect ratio

def index_axes(direction):
    """For each of the patient's axes x, y, z the index axis nearest along it, each once."""
    alignment = np.abs(direction)

    def total(order):
        return alignment[range(3), order].sum()

    return max(itertools.permutations(range(3)), key=total)


def mirrored_axes(axes):
    """Which index axes run against the patient's; axes: 3×3, in the patient's order.

    Bool (x, y, z).
    """
    return np.diag(axes) < 0


def far_end(axes, spacing, shape, mirrored):
    """The way, (x, y, z) in mm, from the first voxel to the last one along the mirrored axes.

    axes: 3×3; spacing: (x, y, z); shape: (z, y, x); mirrored: bool (x, y, z). The last of n voxels
    has the index n − 1.
    """
    last_index = reverse_axes(shape) - 1
    return (axes * spacing) @ np.where(mirrored, last_index, 0)


def reorient(scan):
    """The same scan with its index axes in the order and sense nearest to the patient's; a view.

    A mirrored axis of n voxels takes index i to n − 1 − i, and the origin to its other end.
    """
    # Put the axes in the patient's order. Index axis i is hu's axis 2 − i, for hu is (z, y, x).
    order = index_axes(scan.direction)
    axes = scan.direction[:, order]
    spacing = scan.spacing[list(order)]
    hu = scan.hu.transpose([2 - order[axis] for axis in (2, 1, 0)])

    # Mirror those that run against the patient's.
    mirrored = mirrored_axes(axes)
    origin = scan.origin + far_end(axes, spacing, hu.shape, mirrored)
    hu = flip(hu, reverse_axes(mirrored))
    axes = np.where(mirrored, -axes, axes)
    return scan._replace(hu=hu, spacing=spacing, origin=origin, direction=axes)


def grid(scan):
    """The 1 mm grid on the patient's axes around a scan   [rule_2_1_1_exact_grid]

    It starts at the lowest corner of the box around all voxel centres (a voxel's centre where the
    axes agree), and its points are exactly 1 mm apart. Returns origin (x, y, z) in mm and shape
    (z, y, x).
    """
    # The columns of `edges` lead from the first voxel to the last along each index axis, in mm.
    edges = affine(scan) * (reverse_axes(scan.hu.shape) - 1)
    lowest = scan.origin + np.minimum(edges, 0).sum(1)
    extent = np.abs(edges).sum(1)

    # A sum of fractions such as 0.7 mm may fall just short of a whole number.
    points = np.floor(extent + 1e-6).astype(int) + 1
    return lowest, reverse_axes(points)


def resample(scan, origin=None, shape=None):
    """HU at 1×1×1 mm, linear: index = (direction·spacing)⁻¹ · (x − origin)   [rule_2_1_1_resample]

    origin (x, y, z) in mm and shape (z, y, x): the part of the grid to fill (default: all of it);
    they must lie within `grid(scan)`. Returns Volume(hu (z, y, x) in the scan's dtype, origin);
    where an oblique scan does not reach lies air. Interpolation is linear, because a higher order
    overshoots at bone and metal.
    """
    scan = reorient(scan)
    if origin is None:
        origin, shape = grid(scan)

    # The map from the grid to the scan's index, both (z, y, x): the matrix is reversed both ways.
    matrix = np.linalg.inv(affine(scan))[::-1, ::-1]
    start = matrix @ reverse_axes(origin - scan.origin)

    # Where the axes agree, the matrix is diagonal, and each axis can be interpolated on its own.
    if np.count_nonzero(matrix) == 3:
        hu = interpolate_axes(scan.hu, start, np.diag(matrix), shape)
    else:
        hu = ndimage.affine_transform(scan.hu, matrix, start, tuple(shape), order=1,
                                      mode="grid-constant", cval=AIR)
    return Volume(hu, origin)


def line_weights(size, start, step, count):
    """W[k, i] = max(0, 1 − |x_k − i|), x_k = start + step·k, as a sparse matrix (count, size)

    Past an end of the line, the last voxel has all the weight.
    """
    # Each point lies between two voxels.
    x = (start + step * np.arange(count))[:, None]
    neighbours = np.floor(x).astype(int) + [0, 1]           # (count, 2)
    weights = (1 - np.abs(x - neighbours)).ravel()

    columns = np.clip(neighbours, 0, size - 1).ravel()
    row_starts = 2 * np.arange(count + 1)
    return sparse.csr_array((weights, columns, row_starts), shape=(count, size))


def interpolate_axes(hu, start, step, shape):
    """Σᵢ W_z[k, i] · (W_y · hu[i] · W_xᵀ): linear at start + step·k   [rule_2_1_1_axes]

    One axis after the other. hu: (z, y, x); start, step: in its voxels along z, y, x; shape:
    (z, y, x) of the result, in hu's dtype. Past an end HU are the last voxel's. Two slices at a
    time are in memory, and no point needs its eight corners.
    """
    dtype = np.result_type(hu, np.float32)
    along_z, along_y, along_x = [
        line_weights(hu.shape[axis], start[axis], step[axis], shape[axis]).astype(dtype)
        for axis in range(3)
    ]

    # Neighbouring slices of the result share slices of the scan.
    @functools.lru_cache(2)
    def in_plane(i):
        return (along_x @ (along_y @ hu[i].astype(dtype)).T).T

    # Mix each slice of the result from the one or two slices of the scan around it.
    result = np.empty(shape, hu.dtype)
    for k in range(shape[0]):
        weighted = slice(along_z.indptr[k], along_z.indptr[k + 1])
        pairs = zip(along_z.indices[weighted], along_z.data[weighted])
        mixed = sum(weight * in_plane(i) for i, weight in pairs)
        result[k] = mixed if hu.dtype.kind == "f" else np.rint(mixed)
    return result


# 2.1.2 Hounsfield unit normalization

def clip_hu(hu, out=None):
    """min(max(HU, -1000), 400)   [rule_2_1_2_clip]; any shape, dtype kept; into `out` if given"""
    return np.clip(hu, AIR, BONE, out=out)


def normalize(hu):
    """x = 2·(HU + 1000)/1400 − 1, HU clipped first   [eq_2_1_2_normalize]

    Any shape → float32 in [-1, 1].
    """
    # Compute in place: for 64 cubes the system takes twenty times as long to hand out the memory of
    # new arrays as the arithmetic takes.
    x = np.array(hu, np.float32)
    clip_hu(x, out=x)
    x -= AIR
    x *= np.float32(2 / (BONE - AIR))
    x -= 1
    return x


def denormalize(x):
    """HU = 1400·(x + 1)/2 − 1000   [eq_2_1_2_denormalize]; x in [-1, 1], any shape → float32"""
    return (np.asarray(x, np.float32) + 1) * np.float32((BONE - AIR) / 2) + AIR


# 2.1.3 Lung segmentation

CLOSING_RADIUS = 10     # mm: closes over vessels, and over nodules at the pleura
GAS = -940              # HU: the lungs' mean lies above it, that of gas in the bowel below
THIN_WALL = 2           # mm: through a thinner wall, noise lets the lungs leak into bowel gas
COARSE = 2              # mm: the mask's resolution, which needs an eighth of the voxels


def close_ball(mask, radius):
    """(M ⊕ B) ⊖ B, closing by nearly a ball of `radius` voxels   [rule_2_1_3_closing]

    mask: bool (z, y, x). Many small elements in turn are far quicker than one large one.
    """
    cross = ndimage.generate_binary_structure(3, 1)
    cube = ndimage.generate_binary_structure(3, 3)
    # Crosses alone make a pointed octahedron, cubes alone a cube; a third of cubes is nearly a
    # ball.
    cubes = round(radius / 3)
    crosses = radius - cubes

    mask = np.pad(mask, radius)
    for operation in (ndimage.binary_dilation, ndimage.binary_erosion):
        mask = operation(mask, cross, iterations=crosses)
        # With 0 iterations SciPy would go on until nothing changes.
        if cubes:
            mask = operation(mask, cube, iterations=cubes)
    return mask[radius:-radius, radius:-radius, radius:-radius]


def border_labels(labels):
    """The labels that touch the border of the axial field of view: the air of the room.

    labels: int (z, y, x).
    """
    front_and_back = labels[:, [0, -1]]
    left_and_right = labels[:, :, [0, -1]]
    return np.concatenate([front_and_back.ravel(), left_and_right.ravel()])


def lung_mask(hu, step=1):
    """The largest air, HU < -500, but not the room's; closed and filled   [rule_2_1_3_lungs]

    1. Erode the air by 2 mm, which parts what meets through a thin wall, and label its components.
    2. Drop the room's, which touches the border of the axial field of view.
    3. Choose the largest, and the second where it has at least a quarter of the first: lungs that
       do not touch. Grow them back.
    4. Close them with a ball of 10 mm, and fill what they enclose.

    Departs from 2.1.3, which closes all air and then takes the largest volume: that is the room's,
    and closing first would join the lungs to the stomach's gas.

    hu: (z, y, x) HU, `step` mm apart. Returns bool (z, y, x); all False where there is no such air.
    """
    # 1. Separate and label the components of air.
    air = hu < LUNG_BELOW
    thin = max(1, round(THIN_WALL / step))
    eroded = ndimage.binary_erosion(air, iterations=thin, border_value=1)
    labels, _ = ndimage.label(eroded)

    # 2. Measure them; label 0 is what is not air, and the room is not lung.
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    sizes[border_labels(labels)] = 0

    # 3. Choose two, one or none.
    largest_two = np.argsort(sizes, kind="stable")[-2:]
    smallest_size = max(1, sizes.max() / 4)
    chosen = largest_two[sizes[largest_two] >= smallest_size]

    # Grow them back within the air, by one voxel more than was eroded: corners were lost, too.
    lungs = ndimage.binary_dilation(np.isin(labels, chosen), iterations=thin + 1, mask=air)

    # 4. Close and fill them, within the box around them.
    if lungs.any():
        box, = ndimage.find_objects(lungs.astype(np.int8))
        closed = close_ball(lungs[box], round(CLOSING_RADIUS / step))
        lungs[box] = ndimage.binary_fill_holes(closed)
    return lungs


def coarse_lungs(scan):
    """HU and lung mask at 2 mm on the scan's own axes, where its field of view ends with the array.

    Returns two Scans, whose hu are HU and the mask, (z, y, x).
    """
    scan = reorient(scan)
    spacing = reverse_axes(scan.spacing)
    length = (np.array(scan.hu.shape) - 1) * spacing
    shape = (length // COARSE + 1).astype(int)

    hu = interpolate_axes(scan.hu, np.zeros(3), COARSE / spacing, shape)
    coarse = scan._replace(hu=hu, spacing=np.full(3, float(COARSE)))
    mask = coarse._replace(hu=lung_mask(hu, COARSE))
    return coarse, mask


# 2.1.4 Positive and negative cube samples

def nearest_voxel(origin, centre):
    """The grid point (z, y, x) nearest to `centre`   [rule_2_1_4_centre]

    origin, centre: (x, y, z) in mm; centre may be (n, 3).
    """
    return np.floor(to_grid(origin, centre) + 0.5).astype(int)


def cut(hu, voxel, side):
    """The cube whose voxel side//2 is hu[voxel]; beyond the edge lies air   [rule_2_1_4_padding]

    hu: (z, y, x); voxel: (z, y, x), it may lie outside. Returns (side, side, side), hu's dtype.
    """
    cube = np.full((side, side, side), AIR, hu.dtype)

    # Find what lies inside, from `low` to `high` along each axis. (Plain numbers take a fraction of
    # the time that arrays of three would.)
    inside_cube = []
    inside_volume = []
    for centre, size in zip(voxel, hu.shape):
        start = centre - side // 2
        low = max(start, 0)
        high = min(start + side, size)
        if low >= high:
            return cube
        inside_cube.append(slice(low - start, high - start))
        inside_volume.append(slice(low, high))

    # Copy it; the rest stays air, -1000 HU.
    cube[tuple(inside_cube)] = hu[tuple(inside_volume)]
    return cube


def crop_cube(volume, centre, side):
    """The cube (side, side, side) of a Volume's HU around the voxel nearest to `centre`.

    centre: (x, y, z) in mm.
    """
    return cut(volume.hu, nearest_voxel(volume.origin, centre), side)


def meets_sphere(voxels, side, centre, radius):
    """Whether the cube of `side` voxels around each of `voxels` meets the sphere: bool (n,)

    voxels: (n, 3); centre: (3,); radius; all in voxels.
    """
    low = voxels - side // 2 - 0.5
    nearest_in_cube = np.clip(centre, low, low + side)
    return ((nearest_in_cube - centre) ** 2).sum(1) < radius ** 2


def draw_negatives(lungs, nodules, side, count, rng):
    """Centres uniform over the lungs whose cubes meet no nodule's sphere   [rule_2_1_4_negatives]

    lungs: (m, 3), the mask's voxels of 2 mm; nodules: (centre (3,), radius); all in voxels (z, y,
    x) of the 1 mm grid. Returns int (n, 3), n ≤ count: fewer where nearly every cube in these lungs
    meets a nodule.
    """
    centres = np.empty((0, 3), int)
    for _ in range(100):
        # Draw points within voxels of 2 mm, uniformly.
        chosen = lungs[rng.integers(len(lungs), size=count)]
        drawn = np.rint(chosen + rng.uniform(-1, 1, (count, 3))).astype(int)

        # Reject those whose cubes meet a nodule.
        for centre, radius in nodules:
            drawn = drawn[~meets_sphere(drawn, side, centre, radius)]

        centres = np.concatenate([centres, drawn])[:count]
        if len(centres) == count:
            break
    return centres


# 2.1.5 Train / validation / test split

SPLITS = {"train": 0.7, "validation": 0.1, "test": 0.2}


def split_patients(patients, seed):
    """70% / 10% / 20% of the patients, at least one each: patient → split   [rule_2_1_5_split]

    By patient, so that no cube of a training patient is in validation or test. A MetaImage names no
    patient, so each counts as one: two of one patient may come to different sets. Raises Refusal
    below three patients.
    """
    patients = sorted(set(patients))
    check(len(patients) >= 3, "the scans", f"{len(patients)} patients can be used",
          "give more scans: training, validation and test need at least one patient each")
    n_test = max(1, round(SPLITS["test"] * len(patients)))
    n_validation = max(1, round(SPLITS["validation"] * len(patients)))

    # Shuffle the patients, and cut the row in three.
    splits = {}
    for place, number in enumerate(lungaug.stream(seed, "split").permutation(len(patients))):
        if place < n_test:
            split = "test"
        elif place < n_test + n_validation:
            split = "validation"
        else:
            split = "train"
        splits[patients[number]] = split
    return splits


def split_records(records, seed):
    """The scans' records, each with the split of its patient."""
    splits = split_patients([record["patient"] for record in records], seed)
    return [record | {"split": splits[record["patient"]]} for record in records]


def cut_places(count):
    """The places of a row of `count` cubes, cut at int(0.7·n) and int((0.7 + 0.1)·n): split → slice

    In floating point this sum is a little below 0.8. So the thesis' Tables 2–5 have 1,633 of 8,160
    positives and 116,227 of 581,130 negatives, where its Table 1 has 1,632 and 116,226.
    """
    train_end = int(SPLITS["train"] * count)
    validation_end = int((SPLITS["train"] + SPLITS["validation"]) * count)
    return {
        "train": slice(0, train_end),
        "validation": slice(train_end, validation_end),
        "test": slice(validation_end, count),
    }


def split_cubes(count, rng):
    """Numbers of cubes, shuffled, then cut at 70% and 80% of the row   [rule_2_1_5_split_cubes]

    As the thesis seems to have done. Where the cubes are flips of nodules, those of one nodule come
    into several splits: the test set leaks. Returns split → numbers from 0 to count − 1, rising.
    """
    order = rng.permutation(count)
    return {split: np.sort(order[places]) for split, places in cut_places(count).items()}


SUBSETS = {"train": range(0, 7), "validation": range(7, 8), "test": range(8, 10)}
NOT_LUNA16 = "give LUNA16's ten folders, or --split patient"


def subset_of(path):
    """The number of the innermost folder subset0 … subset9 around a file; None where there is none.

    The downloads unpack to subset0/*.mhd, by some programs to subset0/subset0/*.mhd.
    """
    for name in reversed(path.parent.parts):
        match = re.fullmatch("subset([0-9])", name, re.IGNORECASE)
        if match:
            return int(match[1])
    return None


def check_subsets(paths, folder):
    """Raise Refusal where a split would hold none of the scans whose files these are.

    folder: of all scans, for the message.
    """
    found = {subset_of(path) for path in paths}
    for split, of_split in SUBSETS.items():
        names = ", ".join(f"subset{number}" for number in of_split)
        check(found.intersection(of_split), folder,
              f"no usable scan in {names}: the {split} set would be empty", NOT_LUNA16)


def split_by_subset(records, paths):
    """subset0 … subset6 train, 7 validates, 8 and 9 test   [rule_2_1_5_split_subsets]

    LUNA16's own ten folders. paths: series UID → a file of the scan. Returns the scans' records,
    each with its split. Raises Refusal where a scan lies in none of these folders.
    """
    with_split = []
    for record in records:
        path = paths[record["seriesuid"]]
        number = subset_of(path)
        check(number is not None, path, "lies in no folder subset0 … subset9", NOT_LUNA16)
        for split, of_split in SUBSETS.items():
            if number in of_split:
                with_split.append(record | {"split": split})
    return with_split


# 2.1.6 Conventional data augmentation

FLIPS = tuple(itertools.product((False, True), repeat=3))       # along z, y, x; the first is none


def flip(cube, flips):
    """A cube mirrored along the axes where `flips` (z, y, x) is true   [rule_2_1_6_flip]; a view"""
    mirrored = [axis for axis in range(3) if flips[axis]]
    return np.flip(cube, mirrored)


def all_flips(cube):
    """The eight mirror images of a cube, itself the first   [rule_2_1_6_all_flips]

    (s, s, s) → (8, s, s, s).
    """
    return np.stack([flip(cube, flips) for flips in FLIPS])


def with_flips(rows):
    """Every row of (n, 4) with each of its eight flips: rows (8n, 4), flips (8n,)

    A flip is its place in FLIPS.
    """
    return rows.repeat(len(FLIPS), axis=0), np.tile(np.arange(len(FLIPS)), len(rows))


# Table 1: the cubes of each split, and how many there are. A row (scan, z, y, x) is a scan's place
# among the records, and a cube's centre.

TABLE_1 = {"train": (5712, 406791), "validation": (816, 58113), "test": (1632, 116226)}


def rows_of_split(scans, kind, split=None):
    """The rows (n, 4) of a split's "positives" or "negatives"; of all scans where it is None."""
    rows = []
    for number, scan in enumerate(scans):
        if split is None or scan["split"] == split:
            rows += [(number, *voxel) for voxel in scan[kind]]
    return np.array(rows, np.int32).reshape(-1, 4)


def is_split_by_cube(parameters):
    """Whether --split cube was given; parameters: of dataset.json."""
    return parameters.get("split") == "cube"


def split_rows(scans, parameters):
    """A Dataset's `positives`, `negatives` and `flips`; parameters: of dataset.json."""
    # Where cubes were split, the records name no split: it follows from the seed alone.
    if is_split_by_cube(parameters):
        return split_rows_by_cube(scans, parameters["seed"])
    positives = {split: rows_of_split(scans, "positives", split) for split in SPLITS}
    negatives = {split: rows_of_split(scans, "negatives", split) for split in SPLITS}
    return positives, negatives, None


def split_rows_by_cube(scans, seed):
    """`positives`, `negatives` and `flips` where the cubes of all scans were split.

    The positives are flipped first: a nodule's eight flips may come into several splits.
    """
    # The cube 8·i + j is flip j of nodule i.
    nodules = rows_of_split(scans, "positives")
    rng = lungaug.stream(seed, "split cubes", "positives")
    positives = {}
    flips = {}
    for split, numbers in split_cubes(len(FLIPS) * len(nodules), rng).items():
        in_split = np.zeros((len(nodules), len(FLIPS)), bool)
        in_split.flat[numbers] = True
        has_flips = in_split.any(1)
        positives[split] = nodules[has_flips]
        flips[split] = in_split[has_flips]

    others = rows_of_split(scans, "negatives")
    rng = lungaug.stream(seed, "split cubes", "negatives")
    negatives = {}
    for split, numbers in split_cubes(len(others), rng).items():
        negatives[split] = others[numbers]
    return positives, negatives, flips


def table_1(scans, parameters):
    """Table 1: how many positives and negatives each split has   [num_table_1]

    Returns split → {"positive": count, "nodules": count, "negative": count, "thesis": the thesis'
    (positives, negatives)}. A nodule counts eight times as a positive, once per flip, as in the
    thesis; where cubes were split, once for each of its flips in the split. parameters: of
    dataset.json.
    """
    positives, negatives, flips = split_rows(scans, parameters)
    table = {}
    for split in SPLITS:
        nodules = len(positives[split])
        n_positives = len(FLIPS) * nodules if flips is None else int(flips[split].sum())
        table[split] = {"positive": n_positives, "nodules": nodules,
                        "negative": len(negatives[split]), "thesis": TABLE_1[split]}
    return table


# From a scan to its cubes

def scan_name(seriesuid):
    """A file name for a series, inside the folder whatever the UID says: a file may be hostile."""
    plain = "".join(letter if is_plain(letter) else "_" for letter in seriesuid)[:100]

    # A UID begins with a digit, so it is never the name of a file of ours, dataset or options.
    if plain == seriesuid and plain[:1].isdigit():
        return plain
    checksum = zlib.crc32(seriesuid.encode(errors="surrogatepass"))
    return f"_{plain}_{checksum:08x}"


def is_plain(letter):
    """Whether every file system takes a character: a letter, a digit, -, . or _"""
    return letter.isascii() and (letter.isalnum() or letter in "-._")


class Lungs(NamedTuple):
    """A scan at 2 mm and the mask of its lungs, whose voxels are bool."""
    coarse: Scan
    mask: Scan
    litres: float


def find_lungs(scan, path):
    """The scan's Lungs. Raises Refusal where they are not those of a whole chest."""
    coarse, mask = coarse_lungs(scan)
    litres_per_voxel = COARSE ** 3 * 1e-6
    litres = round(float(mask.hu.sum() * litres_per_voxel), 3)
    check(1 <= litres <= 12, path, f"{litres} litres of lung",
          "give a chest CT with both lungs in view")
    check(coarse.hu[mask.hu].mean() > GAS, path,
          f"the segmented region, {litres} litres, is gas below {GAS} HU, not lung",
          "give a chest CT")

    # Whole lungs taper off at the top and at the bottom.
    areas = mask.hu.sum((1, 2))
    check(max(areas[0], areas[-1]) < areas.max() / 2, path,
          "the lungs are truncated at the top or bottom of the scan",
          "give a scan of the whole chest")
    return Lungs(coarse, mask, litres)


# Whether the annotations fit the scan. The most frequent mistake is another frame of coordinates,
# and most centres that are mirrored lie in the lungs again: so density decides.

CONTRAST = 150      # HU: by so much a nodule is denser than the lung around it
LUNG_AROUND = 0.3   # of a nodule's surroundings at least this share is lung
FAR = 10            # mm: a nodule this far outside the lungs' mask is not at their border


def ball_points(count):
    """A lattice of `count` points along each axis, within the unit ball: (n, 3)."""
    line = np.linspace(-1, 1, count)
    points = np.stack(np.meshgrid(line, line, line), axis=-1).reshape(-1, 3)
    return points[(points ** 2).sum(1) <= 1]


def hu_at(scan, points):
    """HU (n,) at points (n, 3), (x, y, z) in mm: linear between voxels; beyond the scan, air."""
    return ndimage.map_coordinates(scan.hu, to_index(scan, points).T, order=1, cval=AIR)


def in_mask(mask, points):
    """Whether points (n, 3), (x, y, z) in mm, lie in the lungs' mask, a Scan; bool (n,)."""
    index = np.rint(to_index(mask, points)).astype(int)
    within = ((index >= 0) & (index < mask.hu.shape)).all(1)
    found = np.zeros(len(points), bool)
    found[within] = mask.hu[tuple(index[within].T)]
    return found


def stands_out(scan, mask, nodule):
    """Whether a nodule is at least CONTRAST denser than the lung around it, and there is some lung.

    nodule: (x, y, z, diameter) in mm. True of solid and of ground-glass nodules, and of those at a
    vessel or at the pleura; false of places in a wall, in the heart, or within the lung alone.
    """
    centre = nodule[:3]
    radius = nodule[3] / 2
    ball = ball_points(9)
    # The outer part of a small nodule is blurred.
    inside = hu_at(scan, centre + 0.7 * radius * ball)

    # Look at shells 2, 4 and 6 mm outside the nodule.
    directions = ball[(ball != 0).any(1)]
    directions = directions / np.linalg.norm(directions, axis=1, keepdims=True)
    shells = np.concatenate([centre + (radius + mm) * directions for mm in (2, 4, 6)])
    around = hu_at(scan, shells)
    lung = around[(around < LUNG_BELOW) & in_mask(mask, shells)]
    if len(lung) < LUNG_AROUND * len(around):
        return False
    return inside.mean() - lung.mean() >= CONTRAST


def far_from_lungs(mask, nodule):
    """Whether no voxel of the lungs' mask lies within FAR mm of a nodule's sphere."""
    reach = nodule[3] / 2 + FAR
    return not in_mask(mask, nodule[:3] + reach * ball_points(15)).any()


def misplaced_nodules(scan, mask, nodules):
    """Those of `nodules` (n, 4), (x, y, z, diameter) in mm, that seem misplaced.

    A nodule that does not stand out is hidden; one smaller than a voxel is not judged. If at most
    half of the nodules are hidden, only those also far from the lungs count as misplaced, for a
    nodule may be faint. If more are, all hidden ones do: a wrong frame hides nearly all.
    """
    hidden = np.array([not stands_out(scan, mask, nodule) for nodule in nodules], bool)
    hidden &= nodules[:, 3] >= scan.spacing.max()
    far = np.array([far_from_lungs(mask, nodule) for nodule in nodules], bool)
    if 2 * hidden.sum() > len(nodules):
        return nodules[hidden]
    return nodules[hidden & far]


def likely_cause(scan, mask, nodules):
    """What the coordinates of `nodules` (n, 4) may be: the reading in which most stand out."""
    centres = nodules[:, :3]
    readings = {
        "x and y negated, RAS in place of LPS": centres * (-1, -1, 1),
        "x negated": centres * (-1, 1, 1),
        "y negated": centres * (1, -1, 1),
        "voxel indices in place of mm": to_world(scan, reverse_axes(centres)),
    }
    counts = {}
    for name, places in readings.items():
        read_so = np.column_stack([places, nodules[:, 3]])
        counts[name] = sum(stands_out(scan, mask, nodule) for nodule in read_so)

    best = max(counts, key=counts.get)
    if 2 * counts[best] > len(nodules):
        return best
    return "those of another scan, or not in mm, LPS"


def check_nodules(scan, mask, nodules, citations):
    """Raise Refusal where a nodule's centre lies outside the scan's voxels.

    mask: the lungs', a Scan; nodules: (n, 4), (x, y, z, diameter) in mm; citations: nodule →
    "annotations.csv, line 12".
    """
    # Half a voxel is added, so that 0 is the border of the first voxel, not its centre.
    index = to_index(scan, nodules[:, :3]) + 0.5
    outside = ((index < 0) | (index > scan.hu.shape)).any(1)
    if outside.any():
        places = places_text(nodules[outside])
        cause = likely_cause(scan, mask, nodules)
        citation = citations.get(tuple(nodules[outside][0]), "the annotations")
        raise Refusal(citation,
                      f"a nodule of {scan.seriesuid} lies outside its scan, at {places}",
                      f"fix the coordinates: they may be {cause}")


def places_text(nodules):
    """The centres of nodules (n, 4) in mm as text; of many, the first three."""
    places = [", ".join(f"{number:g}" for number in nodule[:3]) for nodule in nodules]
    text = "; ".join(places[:3])
    if len(places) > 3:
        text += f"; and {len(places) - 3} more"
    return f"{text} mm"


def region_around(points, cube, shape):
    """The part of the grid that holds every cube around these points: start and stop (z, y, x).

    points: int (n, 3); shape: the grid's.
    """
    # A negative's centre may lie a millimetre outside the mask's outermost points.
    margin = cube // 2 + 1
    start = np.maximum(points.min(0) - margin, 0)
    stop = np.minimum(points.max(0) + margin + 1, shape)
    return start, stop


def read_clipped_scan(source, limit):
    """A Scan whose HU are clipped and rounded, and the mm between its slices.

    Raises Refusal where those exceed `limit`.
    """
    scan = read_source(source)
    slice_mm = slice_distance(scan)
    check(not exceeds(slice_mm, limit), source.files[0], f"slices {slice_mm:g} mm apart",
          f"LUNA16 keeps at most {limit:g} mm; --max-slice-mm raises it")

    hu = clip_hu(scan.hu)
    if hu.dtype.kind == "f":
        # astype alone would cut the fractions off, and make air denser by half a HU.
        hu = np.rint(hu)
    return scan._replace(hu=hu.astype(np.int16)), slice_mm


def draw_lungs(lungs, centres, diameters):
    """A scan's picture: the lungs' outline, and nodules of these centres and diameters in mm."""
    coarse_centres = to_index(lungs.coarse, centres)
    coarse_radii = diameters / 2 / COARSE
    return scan_picture(lungs.coarse.hu, lungs.mask.hu, coarse_centres, coarse_radii)


def warning_entries(scan, lungs, nodules, folder):
    """The entries of a scan's record that warn: of misplaced nodules, of what reading ignored.

    Mostly {}. folder: where the scan's files are.
    """
    entries = {}
    if scan.ignored:
        entries["ignored"] = f"{folder}: {'; '.join(scan.ignored)}"

    misplaced = misplaced_nodules(scan, lungs.mask, nodules)
    if len(misplaced):
        entries["misplaced"] = misplaced.tolist()
        entries["cause"] = likely_cause(scan, lungs.mask, misplaced)
    return entries


def prepare_scan(source, nodules, folder, parameters, citations=None):
    """Read a scan, find its lungs, fill the 1 mm grid around them, draw negatives.

    nodules: (x, y, z, diameter) in mm; citations: nodule → "annotations.csv, line 12", for
    messages. Leaves the volume, with half a cube of margin around lungs and nodules, and a picture
    in `folder`; returns the scan's record. Raises Refusal.
    """
    path = source.files[0]
    cube = parameters["cube"]
    nodules = np.array(nodules).reshape(-1, 4)
    centres = nodules[:, :3]
    diameters = nodules[:, 3]

    # Read the scan and find its lungs.
    scan, slice_mm = read_clipped_scan(source, parameters["max_slice_mm"])
    lungs = find_lungs(scan, path)
    check_nodules(scan, lungs.mask, nodules, citations or {})

    # Fill the 1 mm grid around lungs and nodules.
    corner, shape = grid(scan)
    positives = nearest_voxel(corner, centres)
    lung_points = to_grid(corner, to_world(lungs.mask, np.argwhere(lungs.mask.hu)))
    reach = np.concatenate([np.rint(lung_points).astype(int), positives])
    start, stop = region_around(reach, cube, shape)
    volume = resample(scan, corner + reverse_axes(start), stop - start)

    # Draw negatives.
    spheres = list(zip(to_grid(corner, centres), diameters / 2))
    rng = lungaug.stream(parameters["seed"], "negatives", source.seriesuid)
    negatives = draw_negatives(lung_points, spheres, cube, parameters["negatives"], rng)

    # Write the volume and the picture.
    name = scan_name(source.seriesuid)
    lungaug.write(folder / f"{name}.npy", volume.hu)
    lungaug.write(folder / f"{name}.png", draw_lungs(lungs, centres, diameters))

    # Describe the scan.
    return {
        "seriesuid": source.seriesuid,
        "patient": source.patient,
        "volume": f"{name}.npy",
        "crc32": zlib.crc32(volume.hu.tobytes()),
        "origin": volume.origin.tolist(),
        "slice_mm": slice_mm,
        "litres": lungs.litres,
        "positives": (positives - start).tolist(),
        "diameters": diameters.tolist(),
        "negatives": (negatives - start).tolist(),
        **warning_entries(scan, lungs, nodules, path.parent),
    }


def misplaced_text(record):
    """What a record says of its nodules that seem misplaced, in one line."""
    nodules = record["misplaced"]
    of_all = f"{len(nodules)} of {len(record['positives'])} nodules"
    return lungaug.printable(
        f"the scan shows no nodule at the place of {of_all}: {places_text(nodules)} — "
        f"the coordinates may be {record['cause']}")


def print_misplaced(records):
    """Warn of the scans whose nodules seem misplaced: a line each, and one of them all."""
    misplaced = [record for record in records if "misplaced" in record]
    for record in misplaced:
        print(f"warning: {lungaug.printable(record['seriesuid'])}: {misplaced_text(record)}")
    if not misplaced:
        return

    causes = [record["cause"] for record in misplaced]
    cause = max(causes, key=causes.count)
    count = sum(len(record["misplaced"]) for record in misplaced)
    print(f"warning: {count} nodules in {len(misplaced)} of {len(records)} scans seem misplaced — "
          f"look at their pictures; the coordinates may be {cause} ({causes.count(cause)} scans)")


RED = (230, 60, 50)
GREEN = (60, 220, 90)


def scan_picture(hu, lungs, centres, radii):
    """A PNG of three planes at 2 mm: the lungs outlined in red, nodules ringed in green.

    The planes lie through the largest nodule, or through the right lung where there is none. hu,
    lungs: (z, y, x); centres (n, 3), radii (n,): the nodules, in voxels.
    """
    if len(radii):
        through = centres[radii.argmax()]
    else:
        through = np.quantile(np.argwhere(lungs), 0.25, axis=0)
    last = np.array(hu.shape) - 1
    through = np.clip(np.rint(through).astype(int), 0, last)

    axial = plane_picture(hu, lungs, centres, radii, 0, through[0])
    # Turn the other two, so that superior is up.
    coronal = plane_picture(hu, lungs, centres, radii, 1, through[1])[::-1]
    sagittal = plane_picture(hu, lungs, centres, radii, 2, through[2])[::-1]

    # Put them side by side, the shorter ones filled up with black.
    pictures = [axial, coronal, sagittal]
    height = max(len(picture) for picture in pictures)
    columns = []
    for picture in pictures:
        missing_rows = height - len(picture)
        columns.append(np.pad(picture, ((0, missing_rows), (2, 2), (0, 0))))
    return lungaug.png(np.hstack(columns), 2)


def plane_picture(hu, lungs, centres, radii, axis, place):
    """The plane across `axis` at `place`: grey, with lungs and nodules outlined; uint8 (…, …, 3)"""
    mask = lungs.take(place, axis)
    grey = lungaug.grey(normalize(hu.take(place, axis)))
    picture = np.stack([grey, grey, grey], axis=-1)
    picture[mask ^ ndimage.binary_erosion(mask)] = RED

    # Ring what the plane cuts of each nodule, 2 mm outside it.
    rows, columns = np.indices(mask.shape)
    in_plane = np.delete(centres, axis, 1)
    depths = centres[:, axis] - place
    for (row, column), depth, radius in zip(in_plane, depths, radii + 1):
        disc = (rows - row) ** 2 + (columns - column) ** 2 + depth ** 2 < radius ** 2
        picture[ndimage.binary_dilation(disc) ^ disc] = GREEN
    return picture


# The prepared data, as the other stages read them

class Dataset(NamedTuple):
    """What preprocessing left. A row (scan, z, y, x): a scan's place in `info`, a cube's centre."""
    folder: Path
    info: dict              # dataset.json
    cube: int
    positives: dict         # split → rows, int (n, 4), each nodule once
    negatives: dict
    fingerprint: int        # of its scans: whatever is made from them records it
    flips: dict = None      # split → which flips of each positive lie in it, bool (n, 8); None: all


def open_dataset(run, to_train=True):
    """The Dataset in <run>/prepared, or in that of the run that it names. Raises Refusal.

    to_train: whether the training set must hold both classes.
    """
    other = other_run(run)
    if other is not None:
        return open_others_dataset(run, other, to_train)
    path = Path(run) / "prepared" / "dataset.json"
    return read_dataset(path, f"run python preprocessing.py --run {run} first", to_train)


def read_dataset(path, if_missing, to_train):
    """The Dataset of a dataset.json; if_missing: the remedy where there is none. Raises Refusal."""
    info = lungaug.read_json(path, if_missing)
    remedy = "run preprocessing.py again"
    with lungaug.refuse_on_error(path, remedy):
        # A damaged file may say anything: check what is used as a size or as a path.
        scans = info["scans"]
        cube = info["parameters"]["cube"]
        names = [scan["volume"] for scan in scans]
        check(info["preset"] in ("demo", "thesis"), path, "invalid preset", remedy)
        check(type(cube) is int and cube in lungaug.CUBES, path, "invalid cube size", remedy)
        check(all(Path(name).name == name for name in names), path, "invalid file name", remedy)

        positives, negatives, flips = split_rows(scans, info["parameters"])
        more = "give more scans, or another --seed"
        for kind, rows in (("positives", positives), ("negatives", negatives)):
            check(not to_train or len(rows["train"]) > 0, path, f"training scans without {kind}",
                  more)
        for split in SPLITS:
            count = len(positives[split]) + len(negatives[split])
            check(not to_train or count > 0, path, f"the {split} set has no cubes", more)

        # The records say how they are split, unless cubes are.
        split_by = scans if flips is None else [scans, info["parameters"]["seed"]]
        fingerprint = lungaug.fingerprint(split_by)
        return Dataset(path.parent, info, cube, positives, negatives, fingerprint, flips)


# Another run's prepared scans (--prepared): <run>/prepared/other_run.json names it

def other_run(run):
    """The run whose prepared scans a run uses; None where it has its own, or none yet.

    Raises Refusal where the file that names it is damaged.
    """
    if not lungaug.uses_other_run(Path(run)):
        return None
    path = Path(run) / "prepared" / lungaug.OTHER_RUN
    remedy = f"name the run again: python preprocessing.py --run {run} --prepared RUN"
    with lungaug.refuse_on_error(path, remedy):
        named = lungaug.read_json(path, remedy)["run"]
        return short(Path(run).resolve() / named)


def short(path):
    """A path from the current folder on, where it lies below it: as a user would type it."""
    path = path.resolve()
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def is_same_folder(one, other):
    """Whether two paths lead to one folder; it need not exist."""
    return Path(one).resolve() == Path(other).resolve()


def uses_prepared_of(run, other):
    """Whether a run uses the prepared scans of another, or the same ones as it."""
    used = other_run(run)
    return used is not None and is_same_folder(used, other_run(other) or other)


def open_others_dataset(run, other, to_train):
    """The Dataset of the run `other`, for the run that uses its prepared scans.

    Raises Refusal where they are gone, or are no longer those that this run was given.
    """
    names_it = Path(run) / "prepared" / lungaug.OTHER_RUN
    path = other / "prepared" / "dataset.json"
    command = f"python preprocessing.py --run {run} --prepared"
    check(path.exists(), names_it, f"names {other}, which has no prepared scans",
          f"put them back, or name the run that has them: {command} RUN")

    dataset = read_dataset(path, "put it back", to_train)
    remedy = f"prepare them as they were, or use them as they are: {command} {other}"
    with lungaug.refuse_on_error(names_it, remedy):
        known = lungaug.read_json(names_it, remedy)["fingerprint"]
        check(known == dataset.fingerprint, names_it,
              f"the scans of {other} were prepared anew, with other content", remedy)
    return dataset


@contextmanager
def keep_prepared(run):
    """Keep another run's prepared scans as they are for the block, in which this run reads them."""
    other = other_run(run)
    # Scans that somebody shares may lie where nothing can be written.
    if other is None or not os.access(other / "prepared", os.W_OK):
        yield
        return

    # Each run that trains has a lock of its own, for several may do so at the same time.
    path = Path(run).resolve()
    name = "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in path.name)
    checksum = zlib.crc32(os.fsencode(path))
    with lungaug.lock(other / "prepared", f"training in {name}-{checksum:08x} on the scans"):
        yield


@contextmanager
def lock_trainings(run):
    """Keep any training from reading a run's prepared scans for the block.

    Raises Refusal where one does: in this run, or in another that uses them.
    """
    with ExitStack() as stack:
        for stage in ("gan", "classifiers"):
            if (run / stage).exists():
                stack.enter_context(lungaug.lock(run / stage, "training"))

        for path in sorted((run / "prepared").glob(".training_in_*_on_the_scans.lock")):
            activity = path.name.removeprefix(".").removesuffix(".lock").replace("_", " ")
            stack.enter_context(lungaug.lock(run / "prepared", activity))
        yield


# What the other stages take from a Dataset

def positives_with_flips(dataset, split):
    """A split's positives with their flips, each nodule's together: rows (m, 4), flips (m,)

    A nodule has all eight, unless cubes were split (--split cube): then those in this split.
    """
    rows = dataset.positives[split]
    if dataset.flips is None:
        return with_flips(rows)
    places, flips = np.nonzero(dataset.flips[split])
    return rows[places], flips


def first_flips(dataset, split):
    """For each row of a split's positives the first of its flips in this split, (n,): mostly 0."""
    if dataset.flips is None:
        return np.zeros(len(dataset.positives[split]), int)
    return dataset.flips[split].argmax(1)


def join_classes(positives, positive_flips, negatives):
    """Both classes in one: rows (n, 4), flips (n,), labels (n,) int64, positives first.

    positives, negatives: rows. Negatives have the flip 0, which is none.
    """
    negative_flips = np.zeros(len(negatives), int)
    rows = np.concatenate([positives, negatives])
    flips = np.concatenate([positive_flips, negative_flips])
    labels = np.repeat(np.array([1, 0], np.int64), [len(positives), len(negatives)])
    return rows, flips, labels


def labelled(dataset, split):
    """A split's cubes to score, each positive with its flips: rows (n, 4), flips (n,), labels (n,)

    Positives come first; negatives are as they are.
    """
    positives, positive_flips = positives_with_flips(dataset, split)
    return join_classes(positives, positive_flips, dataset.negatives[split])


@functools.lru_cache(maxsize=128)
def open_array(path, cube=None):
    """A volume (z, y, x), or n cubes (n, cube, cube, cube), on disk: mapped, not read.

    128 of them stay open, since some systems allow a process no more than 256 files.

    Raises Refusal where it is missing or has another shape or type.
    """
    remedy = "run the stage that made it again"
    with lungaug.refuse_on_error(path, remedy):
        array = np.load(path, mmap_mode="r")
        if cube:
            has_shape = array.shape[1:] == (cube, cube, cube)
        else:
            has_shape = array.ndim == 3
        check(has_shape and array.dtype == np.int16, path, f"{array.dtype}, {array.shape}", remedy)
        # A plain array of the same mapped memory: a memmap takes longer to slice.
        return np.asarray(array)


def read_cubes(dataset, rows, flips=None):
    """The cubes at `rows` (n, 4), flipped by `flips` (n,): float32 (n, 1, c, c, c) in [-1, 1]"""
    side = dataset.cube
    cubes = np.empty((len(rows), 1, side, side, side), np.int16)
    for i, (scan, *voxel) in enumerate(rows.tolist()):
        volume = open_array(dataset.folder / dataset.info["scans"][scan]["volume"])
        cube = cut(volume, voxel, side)
        if flips is not None:
            cube = flip(cube, FLIPS[flips[i]])
        cubes[i, 0] = cube
    return normalize(cubes)


# The command: records, workers, parts

def record_path(source, folder):
    return folder / f"{scan_name(source.seriesuid)}.json"


def read_record(source, folder, parameters):
    """A scan's record of an earlier run with the same parameters.

    {} where there is none, or a damaged one, or one of a scan whose slices are now too thick.
    """
    limit = parameters["max_slice_mm"]
    try:
        record = lungaug.read_json(record_path(source, folder), "")
        expected = record.pop("fingerprint")
        is_same = expected == record_fingerprint(record, parameters)
        is_too_thick = exceeds(record.get("slice_mm", 0), limit)
    except (Refusal, AttributeError, KeyError, TypeError):
        return {}
    return record if is_same and not is_too_thick else {}


def record_fingerprint(record, parameters):
    """CRC-32 of a record and of the parameters on which it depends.

    A scan is the same however the scans are split; one that is used would be the same under a
    higher --max-slice-mm.
    """
    irrelevant = ["split"] if "problem" in record else ["split", "max_slice_mm"]
    relevant = {name: value for name, value in parameters.items() if name not in irrelevant}
    return lungaug.fingerprint([relevant, record])


def is_whole(record, folder):
    """Whether a record's volume exists and passes its checksum."""
    if "volume" not in record:
        return False
    try:
        return zlib.crc32(open_array(folder / record["volume"])) == record["crc32"]
    except Refusal:
        return False


def prepare_one(source, nodules, folder, parameters, citations=None):
    """Make a scan's record, unless a whole one exists; returns it. Arguments as of `prepare_scan`.

    The record of a scan that cannot be used holds the path, the problem and the remedy. What
    reading ignored is returned, but not written: it is told once.
    """
    record = read_record(source, folder, parameters)
    if is_whole(record, folder):
        return record

    try:
        record = prepare_scan(source, nodules, folder, parameters, citations)
    except Refusal as refusal:
        record = skipped_record(source, refusal)
    except MemoryError:
        refusal = Refusal(source.files[0], "out of memory", "give fewer --workers")
        record = skipped_record(source, refusal)

    result = {key: value for key, value in record.items() if key != "ignored"}
    write_record(source, folder, parameters, result)
    return record


def write_record(source, folder, parameters, record):
    """Write a scan's record, with a fingerprint of itself and of the parameters."""
    fingerprint = record_fingerprint(record, parameters)
    lungaug.write(record_path(source, folder), record | {"fingerprint": fingerprint})


def skipped_record(source, refusal):
    """The record of a scan that cannot be used."""
    return {"seriesuid": source.seriesuid, "path": str(refusal.path),
            "problem": str(refusal.problem), "remedy": str(refusal.remedy)}


def reason_of(record):
    """Why a scan is skipped, in one line."""
    path, problem, remedy = map(lungaug.printable, (record["path"], record["problem"],
                                                    record["remedy"]))
    return f"{path}: {problem} — {remedy}"


def prepare(sources, annotations, folder, parameters, options):
    """Make every source's record, in --workers processes.

    annotations: as `cited_annotations` returns them. Under --strict the first scan that cannot be
    used raises its Refusal.
    """
    progress = lungaug.Progress("scans", len(sources))
    workers = min(options.workers, max(1, len(sources)))
    ignored = []
    with lungaug.start_pool(workers) as pool:
        jobs = []
        for source in sources:
            citations = annotations.get(source.seriesuid, {})
            jobs.append(lungaug.submit(pool, prepare_one, source, list(citations), folder,
                                       parameters, citations))

        for done, job in enumerate(jobs, 1):
            record = job.result()
            if "ignored" in record:
                ignored.append(record["ignored"])

            if "problem" not in record:
                progress.update(done, record["seriesuid"])
                continue
            if options.strict:
                raise Refusal(record["path"], record["problem"], record["remedy"])
            progress.update(done, f"skipped: {record['seriesuid']}")

    for text in ignored:
        print(f"ignored: {lungaug.printable(text)}")


def split_scans(records, sources, options):
    """The records of usable scans, each with the split that --split gives it. Raises Refusal.

    They are left as they are where cubes are split in place of scans.
    """
    if options.split == "cube":
        return records
    if options.split == "patient":
        return split_records(records, options.seed)

    usable = {record["seriesuid"] for record in records}
    paths = {source.seriesuid: source.files[0] for source in sources if source.seriesuid in usable}
    scans = split_by_subset(records, paths)
    check_subsets(paths.values(), options.scans or "the synthetic scans")
    return scans


def write_dataset(records, sources, folder, parameters, options):
    """Write dataset.json of what all parts left, and print which scans are skipped."""
    skipped = [record for record in records if "problem" in record]
    for record in skipped:
        print(f"skipped: {reason_of(record)}")

    usable = [record for record in records if "problem" not in record]
    print_misplaced(usable)
    check(usable, options.scans or "the synthetic scans", "none can be used",
          "see the reasons above")
    scans = split_scans(usable, sources, options)
    lungaug.write(folder / "dataset.json", {
        "parameters": parameters,
        "preset": options.preset,
        "synthetic": options.scans is None,
        "table_1": table_1(scans, parameters),
        "skipped": skipped,
        "scans": scans,
    })


def find_annotations(scans):
    """annotations.csv in the scans' folder, in a folder directly below it, or in the one above it.

    LUNA16's own lies in CSVFILES, beside the subsets. Raises Refusal where there is none, or where
    two differ.
    """
    scans = scans.resolve()
    places = [scans, *sorted(path for path in scans.iterdir() if path.is_dir()), scans.parent]
    tables = [place / "annotations.csv" for place in places]
    found = [table for table in tables if table.is_file()]
    check(found, scans, "no annotations.csv in it, in a folder below it or in the folder above",
          "give it with --annotations")

    first, *others = found
    for other in others:
        check(same_bytes([first], [other]), first, f"differs from {other}",
              "give the right one with --annotations")
    return first


def print_annotations(table, annotations, sources):
    """Say which table of nodules is used, and how many of them belong to a scan."""
    uids = {source.seriesuid for source in sources}
    matched = {uid: nodules for uid, nodules in annotations.items() if uid in uids}
    n_matched = sum(len(nodules) for nodules in matched.values())
    n_unmatched = sum(len(nodules) for nodules in annotations.values()) - n_matched
    n_foreign = len(annotations) - len(matched)
    print(f"{lungaug.printable(table)}: {counted(n_matched, 'nodule')} in "
          f"{counted(len(matched), 'scan')}; {counted(len(uids) - len(matched), 'scan')} without a "
          f"nodule; {counted(n_unmatched, 'nodule')} of {n_foreign:,} series that are not among "
          "the scans.", flush=True)


def synthetic_scans(run, options):
    """The folder of the run's synthetic scans, made first where they are missing.

    Raises Refusal.
    """
    # A run that was begun with the user's scans must not silently turn into a synthetic one.
    parameters = run / "prepared" / "parameters.json"
    remedy = "run python preprocessing.py with the --scans it had, or give another --run"
    if parameters.exists():
        with lungaug.refuse_on_error(parameters, remedy):
            origin = lungaug.read_json(parameters, remedy)["scans"]
            check(origin == "synthetic", parameters,
                  "was made of your scans, not of synthetic ones", remedy)

    # The generator of synthetic scans lives with the tests, which need them, too.
    scans = run / "scans"
    if not (scans / "annotations.csv").exists():
        generator = lungaug.HERE / "tests" / "phantom.py"
        check(generator.exists(), generator, "not found",
              "restore the folder tests, or give --scans")
        run.mkdir(parents=True, exist_ok=True)
        lungaug.run_script("tests/phantom.py", "--run", run, "--seed", options.seed,
                           "--workers", options.workers)
    return scans


def find_data(options):
    """The sources, the annotations and the parameters of this command. Raises Refusal."""
    if options.scans is None:
        scans = synthetic_scans(options.run, options)
        origin = "synthetic"
    else:
        scans = options.scans
        origin = str(scans.resolve())
        check(scans.is_dir(), scans, "is not a folder", "give the folder of the scans with --scans")

    table = options.annotations or find_annotations(scans)
    annotations = cited_annotations(table)
    sources = find_scans(scans)
    check(any(source.seriesuid in annotations for source in sources), table,
          "none of the scans' series is in it",
          "a MetaImage's series UID is its file's name, a DICOM file's is its tag")
    print_annotations(table, annotations, sources)
    if options.split == "subsets":
        # Say now, not after all scans are prepared, that a folder is missing.
        check_subsets([source.files[0] for source in sources], scans)

    parameters = lungaug.settings_of(options, "prepared")
    parameters["scans"] = origin
    parameters["annotations"] = lungaug.file_crc32(table, "give it with --annotations")
    return sources, annotations, parameters


def raises_limit(folder, parameters):
    """Whether a folder holds what differs by a lower --max-slice-mm alone. Raises Refusal."""
    path = folder / "parameters.json"
    if not path.exists():
        return False
    earlier = lungaug.read_json(path, "start over with --overwrite")
    with lungaug.refuse_on_error(path, "start over with --overwrite"):
        limit = parameters["max_slice_mm"]
        return earlier | {"max_slice_mm": limit} == parameters and earlier["max_slice_mm"] < limit


def changes_split(folder, parameters):
    """Whether a folder holds what differs by --split alone: no scan need be prepared again."""
    try:
        earlier = lungaug.read_json(folder / "parameters.json", "")
        return earlier != parameters and earlier | {"split": parameters["split"]} == parameters
    except (Refusal, TypeError):
        return False


def claim_prepared(part, folder, parameters, options):
    """Reserve the folder for these parameters; under --overwrite, remove this part's records.

    A higher --max-slice-mm needs no --overwrite: only scans skipped before are then prepared. With
    another --split the records stay, also under --overwrite.
    """
    changes = options.overwrite or raises_limit(folder, parameters)
    discards_scans = options.overwrite and not changes_split(folder, parameters)
    with ExitStack() as stack:
        if changes:
            stack.enter_context(lock_trainings(options.run))
        lungaug.claim_folder(folder, parameters, changes)
        if changes:
            lungaug.remove(folder, "dataset.json", "options.json", lungaug.OTHER_RUN)
        if discards_scans:
            lungaug.remove(folder, *[record_path(source, folder).name for source in part])


def prepare_part(sources, annotations, parameters, folder, options):
    """Prepare this command's part of the scans, and all together once every part is done.

    Returns whether dataset.json was written.
    """
    index, count = map(int, options.part.split("/"))
    part = sources[index - 1::count]
    with lungaug.lock(folder, f"preparing part {index} of {count}"):
        claim_prepared(part, folder, parameters, options)
        prepare(part, annotations, folder, parameters, options)

        # Another part may have been started with other options in the meantime.
        lungaug.require_settings(folder / "parameters.json",
                                 lungaug.read_json(folder / "parameters.json", ""), parameters,
                                 "another part changed it: run this one again with its options")
        records = [read_record(source, folder, parameters) for source in sources]
        missing = records.count({})
        if missing:
            print(f"This part is done; {missing} scans belong to other parts. "
                  "The part that finishes last writes dataset.json.")
            return False
        write_dataset(records, sources, folder, parameters, options)
        return True


def leak_text(dataset):
    """What must be said of a run whose cubes were split, in one line."""
    in_training = set(map(tuple, dataset.positives["train"]))
    in_test = list(map(tuple, dataset.positives["test"]))
    n_both = sum(nodule in in_training for nodule in in_test)
    nodules = counted(len(in_test), "nodule")
    return (f"--split cube: the test set leaks. Of its {nodules}, {n_both:,} are in the training "
            "set, too, in other flips: the results say nothing of new patients.")


def table_1_item(info):
    """Table 1 for the terminal and the page."""
    rows = []
    for split, row in info["table_1"].items():
        numbers = (row["positive"], row["nodules"], row["negative"], *row["thesis"])
        rows.append((f"{split.capitalize()} ({SPLITS[split]:.0%})",
                     *map(lungaug.format_number, numbers)))

    kind = "of your scans"
    if info["synthetic"]:
        kind = "synthetic scans (a functional test, no clinical meaning)"
    title = (f"Table 1. Sample counts, {len(info['scans'])} {kind}. "
             "Each nodule counts eight times, once per flip.")
    if is_split_by_cube(info["parameters"]):
        title += " Cubes were split: a nodule is counted in each set that has flips of it."
    head = ("", "positive", "nodules", "negative", "thesis: positive", "negative")
    return lungaug.Table(title, head, rows)


def page(dataset):
    """What the report shows of section 2."""
    info = dataset.info
    items = [lungaug.Heading("2 Dataset"), table_1_item(info)]
    if is_split_by_cube(info["parameters"]):
        items.append(lungaug.Text(leak_text(dataset)))
    if info["skipped"]:
        rows = [(record["seriesuid"], reason_of(record)) for record in info["skipped"]]
        items.append(lungaug.Table("Skipped scans.", ("series", "reason"), rows))

    misplaced = [scan for scan in info["scans"] if "misplaced" in scan]
    if misplaced:
        rows = [(scan["seriesuid"], misplaced_text(scan)) for scan in misplaced]
        items.append(lungaug.Table("Scans with misplaced nodules.", ("series", "warning"), rows))

    # Show the scan with the most nodules.
    scan = max(info["scans"], key=lambda scan: len(scan["positives"]))
    if scan["positives"]:
        shown = f"Scan {scan['seriesuid']}, the one with the most nodules"
        through = "its largest nodule"
    else:
        shown = f"Scan {scan['seriesuid']}; none has a nodule"
        through = "the right lung"
    caption = (f"{shown}: axial, coronal and sagittal plane through {through}, −1000 HU black and "
               "400 HU white. Red: the outline of the lungs, within which negatives are drawn. "
               "Green: nodules, 2 mm outside their outline. A nodule far outside the red line "
               "would be cut from the wrong place. Radiological view: the patient's left is on the "
               "right.")
    items.append(lungaug.Figure(caption, scan["volume"].replace(".npy", ".png"),
                                code=("preprocessing.scan_picture", "preprocessing.lung_mask",
                                      "preprocessing.draw_negatives"),
                                pixel_mm=1))
    return items


FEW_NODULES = 10


def counted(count, noun):
    """1 scan, 2 scans, 1,186 nodules"""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def print_summary(dataset):
    """Print Table 1, and a sentence on the scans."""
    info = dataset.info
    lungaug.print_table(*table_1_item(info))
    if is_split_by_cube(info["parameters"]):
        print(f"warning: {leak_text(dataset)}")
    for split, rows in dataset.positives.items():
        if len(rows) == 0:
            print(f"warning: the {split} set has no nodule")
        elif len(rows) < FEW_NODULES:
            print(f"warning: the {split} set has few nodules: {len(rows)}")

    with_nodules = [scan for scan in info["scans"] if scan["positives"]]
    n_nodules = sum(len(scan["positives"]) for scan in with_nodules)
    n_thesis = sum(positives for positives, _ in TABLE_1.values())
    print(f"{counted(n_nodules, 'nodule')} in {counted(len(with_nodules), 'scan')}; the thesis' "
          f"Table 1 has {n_thesis:,} positives, {n_thesis // len(FLIPS):,} nodules with eight "
          "flips each.")
    litres = [scan["litres"] for scan in info["scans"]]
    print(f"{len(litres)} scans, {len(info['skipped'])} skipped; lungs of {min(litres):.1f} to "
          f"{max(litres):.1f} litres. One picture per scan in {dataset.folder}.")


# The command with --prepared: nothing is read but another run's dataset.json

def typed_parameters(options):
    """What was typed of what prepared scans depend on, as dataset.json has it, but the seed."""
    settings = lungaug.settings_of(options, "prepared")
    typed = {name: value for name, value in settings.items() if value is not None}
    # Networks of another seed may be trained on the same scans.
    typed.pop("seed", None)
    if options.scans:
        typed["scans"] = str(options.scans.resolve())
    if options.annotations:
        typed["annotations"] = lungaug.file_crc32(options.annotations, "leave out --annotations")
    return typed


def check_trained_on(run, other, dataset):
    """Raise Refusal where a run has a GAN that was trained on other scans than this Dataset's."""
    path = run / "gan" / "checkpoint.pt"
    if not path.exists():
        return
    remedy = "give another --run, or start over with --overwrite"
    state = lungaug.load_checkpoint(path, remedy)
    with lungaug.refuse_on_error(path, remedy):
        check(state["settings"]["prepared"] == dataset.fingerprint, path,
              f"was trained on other scans than those of {other}", remedy)


def choose_other_run(options):
    """The run whose prepared scans are to be used: that of --prepared, or the one named before.

    Where that one uses another's itself, it is the other. Raises Refusal where it cannot be used.
    """
    run = options.run
    folder = run / "prepared"
    given = options.prepared
    if given is None:
        return other_run(run)

    check(given.is_dir(), given, "is not a folder", "give a run that is prepared with --prepared")
    other = other_run(given) or given
    check(not is_same_folder(other, run), given, "is this run itself, or uses its prepared scans",
          "give another --run, or leave out --prepared")
    has_own = (folder / "parameters.json").exists() or (folder / "dataset.json").exists()
    check(not has_own, folder, "holds prepared scans of this run's own",
          "give another --run, leave out --prepared, or remove this folder")
    return other


def name_other_run(run, other, fingerprint):
    """Write down whose prepared scans a run uses, by a path from the run: both can be moved."""
    try:
        place = Path(os.path.relpath(other.resolve(), run.resolve()))
    except ValueError:
        # On Windows no path leads from one drive to another.
        place = other.resolve()
    named = {"run": place.as_posix(), "fingerprint": fingerprint}

    path = run / "prepared" / lungaug.OTHER_RUN
    try:
        known = lungaug.read_json(path, "")
    except Refusal:
        known = None
    if known == named:
        return
    # A training that runs at this moment reads what was named before.
    with lock_trainings(run):
        lungaug.write(path, named)


def use_prepared(options):
    """Let a run use another run's prepared scans from now on. Returns the other run.

    Raises Refusal where they cannot be used, or are not what was typed or what its GAN has seen.
    """
    run = options.run
    other = choose_other_run(options)
    path = other / "prepared" / "dataset.json"
    dataset = read_dataset(path, "give a run that is prepared with --prepared", to_train=False)
    lungaug.require_settings(path, dataset.info["parameters"], typed_parameters(options),
                             "leave these options out, or prepare scans with them in another --run")
    if not options.overwrite:
        check_trained_on(run, other, dataset)
    name_other_run(run, other, dataset.fingerprint)
    return other


def page_of_other(dataset, other, folder):
    """What the report shows of another run's prepared scans; its picture is copied to `folder`."""
    heading, *items = page(dataset)
    for item in items:
        if isinstance(item, lungaug.Figure) and (dataset.folder / item.file).exists():
            lungaug.write(folder / item.file, lungaug.read_bytes(dataset.folder / item.file, ""))
    return [heading, lungaug.Text(f"The prepared scans are those of {other}."), *items]


def main_with_other_run(options):
    """The command where the prepared scans are another run's."""
    lungaug.pick_device(options.device or "auto")
    other = use_prepared(options)
    dataset = open_dataset(options.run, to_train=False)
    info = dataset.info
    print(f"Prepared scans of {other}: preset {info['preset']}, cube {dataset.cube}.")
    seed = info["parameters"].get("seed")
    if options.seed not in (None, seed):
        print(f"--seed {options.seed} is for the networks: these scans were prepared with {seed}.")
    print_summary(dataset)

    options.prepared = other
    folder = options.run / "prepared"
    lungaug.save_page(folder, options, page_of_other(dataset, other, folder))


def main():
    options = lungaug.parse(__doc__, "preprocessing")
    # Scans of its own take the place of another run's under --overwrite alone.
    has_new_scans = options.scans and options.overwrite
    if options.prepared or (lungaug.uses_other_run(options.run) and not has_new_scans):
        main_with_other_run(options)
        return

    synthetic = options.scans is None
    lungaug.apply_preset(options, "preprocessing", "demo" if synthetic else "thesis")
    kind = "synthetic scans" if synthetic else "your scans"
    print(f"Preset {options.preset}: {kind}.", flush=True)
    # The next stages need the device: say now, not in hours, that it is not available.
    lungaug.pick_device(options.device)

    sources, annotations, parameters = find_data(options)
    folder = options.run / "prepared"
    if not prepare_part(sources, annotations, parameters, folder, options):
        return

    dataset = open_dataset(options.run, to_train=False)
    print_summary(dataset)
    lungaug.save_page(folder, options, page(dataset))


# Appendix: file formats. 2 Dataset: LUNA16's MetaImage, LIDC-IDRI's DICOM, the annotations

def is_metaimage(path):
    return path.suffix.lower() in (".mhd", ".mha")


def find_scans(folder):
    """Every scan in a tree of folders, as Sources in the order of their series UIDs.

    A MetaImage's series UID is its file's name, as in LUNA16; it names no patient, so each counts
    as one. DICOM files belong together by their SeriesInstanceUID, in whatever folder they are.
    Other files are ignored: masks and what an operating system leaves are counted in a line. Raises
    Refusal where there is no scan.
    """
    paths, ignored = files_below(folder)
    sources = []
    series = defaultdict(list)      # series UID → (path, tags) of its files
    for path in paths:
        # Opening a pipe would wait for somebody to write to it.
        if path.is_fifo():
            continue
        if is_metaimage(path):
            sources.append(Source(path.stem, path.stem, (path,)))
        elif path.is_file():
            tags = read_tags(path, ["SeriesInstanceUID", "PatientID", "Modality", "SOPInstanceUID"])
            if is_ct_slice(tags):
                series[str(tags["SeriesInstanceUID"])].append((path, tags))

    for uid, slices in series.items():
        sources.append(dicom_source(uid, slices))

    check(sources, folder, "no MetaImage and no DICOM file in it",
          "give the folder of the scans with --scans")
    sources, n_masks = resolve_doubles(sources)
    ignored["lung masks"] += n_masks
    print_ignored(ignored)
    return sources


MASKS = "seg-lungs"     # how the name of LUNA16's folder of lung masks begins
SYSTEM_FOLDERS = ("__macosx", ".trashes", ".spotlight-v100", "$recycle.bin",
                  "system volume information")
SYSTEM_FILES = (".ds_store", "thumbs.db", "desktop.ini")


def files_below(folder):
    """Every file in a tree of folders, in the order of their paths, and counts of those ignored.

    Links to folders are followed, each folder once. A folder that may not be read is named.
    """
    def say_unreadable(error):
        print(lungaug.printable(f"ignored: {error.filename}: {error.strerror}"))

    paths = []
    ignored = {"lung masks": 0, "files of an operating system": 0}
    seen = set()
    for root, folders, names in os.walk(folder, followlinks=True, onerror=say_unreadable):
        # Go down into each folder once: a link may lead back up.
        real = os.path.realpath(root)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()

        kind = kind_of_folder(root, folder)
        for name in names:
            if kind == "masks":
                ignored["lung masks"] += is_metaimage(Path(name))
            elif kind == "system" or is_system_file(name):
                ignored["files of an operating system"] += 1
            else:
                paths.append(Path(root) / name)
    return sorted(paths), ignored


def kind_of_folder(root, folder):
    """"masks" in LUNA16's folder of lung masks, "system" in one of an operating system, else ""."""
    for part in Path(root).relative_to(folder).parts:
        if part.lower().startswith(MASKS):
            return "masks"
        if part.lower() in SYSTEM_FOLDERS:
            return "system"
    return ""


def is_system_file(name):
    """Whether macOS or Windows left this file: ._x.mhd holds what macOS knows of x.mhd."""
    return name.startswith("._") or name.lower() in SYSTEM_FILES


def print_ignored(ignored):
    """Say in one line how many files of each kind are ignored."""
    counts = [f"{count:,} {kind}" for kind, count in ignored.items() if count]
    if counts:
        print(f"ignored: {', '.join(counts)}")


def dicom_source(uid, slices):
    """A DICOM series as a Source; slices: (path, tags) of its files.

    A file that is there twice is taken once. Files that differ are all taken, for geometry to
    decide: some programs give every slice the same SOPInstanceUID.
    """
    _, first_tags = slices[0]
    patient = str(first_tags.get("PatientID") or "") or uid
    first_of = {}       # SOPInstanceUID, or the path where there is none → the first file
    files = []
    repeated = []
    for path, tags in slices:
        first = first_of.setdefault(str(tags.get("SOPInstanceUID") or path), path)
        if first != path and same_bytes([first], [path]):
            repeated.append(path)
        else:
            files.append(path)

    if repeated:
        print(lungaug.printable(f"ignored: {len(repeated)} files of series {uid} that are there "
                                f"twice, such as {repeated[0]}"))
    return Source(uid, patient, tuple(files))


# The same scan twice

def resolve_doubles(sources):
    """One Source for each series UID, in their order, and how many lung masks were dropped."""
    of_uid = defaultdict(list)
    for source in sources:
        of_uid[source.seriesuid].append(source)

    kept = []
    n_masks = 0
    for uid in sorted(of_uid):
        candidates = of_uid[uid]
        if len(candidates) > 1:
            scans = [source for source in candidates if not holds_a_mask(source)]
            n_masks += len(candidates) - len(scans) if scans else 0
            candidates = scans or candidates
        kept.append(choose_double(candidates))
    return kept, n_masks


def choose_double(candidates):
    """The first of several Sources of one series UID; a conflict where another one differs."""
    first, *others = candidates
    for other in others:
        if not (same_bytes(first.files, other.files) or same_scan(first, other)):
            return first._replace(conflict=other.files[0])
        print(lungaug.printable(f"ignored: {other.files[0]} is the same scan as {first.files[0]}"))
    return first


def same_bytes(files, other_files):
    """Whether two lists of files have the same contents, file by file.

    False for a header beside its data; `same_scan` decides those.
    """
    if len(files) != len(other_files):
        return False
    for path, other in zip(files, other_files):
        # Two headers may be alike and name data that differ.
        if is_metaimage(path) and names_data_file(path):
            return False
        if path.stat().st_size != other.stat().st_size:
            return False
        if lungaug.file_crc32(path, "") != lungaug.file_crc32(other, ""):
            return False
    return True


def names_data_file(path):
    """Whether a MetaImage's voxels lie in another file; False where its header is damaged."""
    try:
        with lungaug.refuse_on_error(path, ""):
            keys, _ = metaimage_header(path)
    except Refusal:
        return False
    return not is_local(keys)


def same_scan(source, other):
    """Whether two Sources hold the same HU at the same places; False where one cannot be read."""
    try:
        one = read_source(source)
        two = read_source(other)
    except Refusal:
        return False
    if one.hu.shape != two.hu.shape or not np.array_equal(one.hu, two.hu):
        return False
    return not (differs(one.spacing, two.spacing) or differs(one.origin, two.origin)
                or differs(one.direction, two.direction))


def holds_a_mask(source):
    """Whether a MetaImage holds a few small whole numbers, as a mask does; a CT never does."""
    try:
        hu = read_source(source).hu
    except Refusal:
        return False
    return hu.min() >= 0 and hu.max() < 16


def is_ct_slice(tags):
    """Whether a file's tags are those of a CT image: not of a radiograph, not of a report."""
    modality = tags.get("Modality") or "CT"
    return bool(tags.get("SeriesInstanceUID")) and modality == "CT"


def read_scan(path):
    """A Scan from a MetaImage header (.mhd, .mha) or a folder that holds one DICOM series.

    Raises Refusal.
    """
    path = Path(path)
    if path.is_dir():
        sources = find_scans(path)
    else:
        sources = [Source(path.stem, path.stem, (path,))]
    check(len(sources) == 1, path, f"{len(sources)} scans in it", "name the folder of one")
    return read_source(sources[0])


def read_source(source):
    """A Source's Scan. Whatever a broken file makes a reader raise becomes one Refusal."""
    path = source.files[0]
    check(source.conflict is None, path, f"differs from {source.conflict}, of the same series UID",
          "keep the right one of them")
    with lungaug.refuse_on_error(path, "replace the file"):
        if is_metaimage(path):
            scan = read_metaimage(source)
        else:
            scan = read_dicom(source)
    check_geometry(scan, path)
    return scan


def check_geometry(scan, path):
    """Raise Refusal unless a Scan's voxels, spacing and direction can be those of a scan."""
    check(min(scan.hu.shape) > 1, path, f"{scan.hu.shape} voxels",
          "at least two voxels along each of three axes are expected")
    check((scan.spacing > 1e-3).all() and (scan.spacing < 100).all(), path,
          f"spacing {scan.spacing}", "only spacings from 0.001 to 100 mm are supported")

    lengths = np.linalg.norm(scan.direction, axis=0)
    determinant = abs(np.linalg.det(scan.direction))
    check(not differs(lengths, 1) and determinant > 0.5, path,
          f"direction {scan.direction.T.ravel()}",
          "three axes of length 1 that span the space are expected")


def to_hu(values, path):
    """Values as int16 HU, or as float32 where they have fractions. Raises Refusal."""
    if values.dtype == np.int16:
        return values
    # NaN fails this comparison, too.
    check((np.abs(values) < 1e12).all(), path, "NaN or infinite voxels, or some above 10¹²",
          "replace the file")

    values = np.clip(values, -32768, 32767)
    whole = values.astype(np.int16)
    return whole if (whole == values).all() else values.astype(np.float32)


# MetaImage

ELEMENTS = {"MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2",
            "MET_INT": "i4", "MET_UINT": "u4", "MET_LONG": "i4", "MET_ULONG": "u4",
            "MET_FLOAT": "f4", "MET_DOUBLE": "f8"}
SYNONYMS = {"Position": "Offset", "Origin": "Offset", "Rotation": "TransformMatrix",
            "Orientation": "TransformMatrix", "ElementByteOrderMSB": "BinaryDataByteOrderMSB"}
DEFAULTS = {"NDims": "3", "Offset": "0 0 0", "TransformMatrix": "1 0 0 0 1 0 0 0 1",
            "HeaderSize": "0", "BinaryData": "True", "BinaryDataByteOrderMSB": "False",
            "CompressedData": "False", "ElementNumberOfChannels": "1"}
SUPPORTED = {"NDims": ["3"], "BinaryData": ["True"], "ElementNumberOfChannels": ["1"],
             "ElementType": list(ELEMENTS)}
MAX_HEADER_LINES = 1000
MAX_LINE = 4096             # bytes
MAX_SIDE = 4096
MAX_VOXELS = 2 ** 29        # twice a whole body at 512 × 512


def metaimage_header(path):
    """A MetaImage's keys and values, as text, and the byte at which LOCAL data would begin.

    They begin after ElementDataFile, which is the last key. Raises Refusal.
    """
    keys = dict(DEFAULTS)
    with path.open("rb") as file:
        for _ in range(MAX_HEADER_LINES):
            line = file.readline(MAX_LINE)
            if not line:
                break
            key, _, value = os.fsdecode(line).partition("=")
            key = key.strip()
            keys[SYNONYMS.get(key, key)] = value.strip()

            if key == "ElementDataFile":
                keys.setdefault("ElementSpacing", keys.get("ElementSize", ""))
                return keys, file.tell()
    raise Refusal(path, "no ElementDataFile in its header",
                  "replace the file: it is truncated, or not a MetaImage")


def metaimage_numbers(keys, key, count, path):
    """The `count` numbers of a key, as an array. Raises Refusal."""
    numbers = np.array(keys.get(key, "").split(), float)
    check(len(numbers) == count and (abs(numbers) < 1e6).all(), path, f"{key} = {keys.get(key)}",
          f"expected {count} numbers below a million")
    return numbers


def metaimage_size(keys, path):
    """DimSize as a shape (z, y, x). Raises Refusal."""
    size = reverse_axes(metaimage_numbers(keys, "DimSize", 3, path))
    is_whole = (size % 1 == 0).all() and size.min() >= 1
    is_small = size.max() <= MAX_SIDE and size.prod() <= MAX_VOXELS
    check(is_whole and is_small, path, f"DimSize = {keys['DimSize']}",
          f"expected three whole numbers from 1 to {MAX_SIDE:,}, and at most {MAX_VOXELS:,} voxels")
    return size.astype(int)


def is_true(text):
    """Whether MetaImage takes a value for true."""
    return text[:1] in ("T", "t", "1")


def is_local(keys):
    """Whether a MetaImage's voxels follow its header in the same file."""
    return keys["ElementDataFile"].upper() == "LOCAL"


def metaimage_data(keys, path, header_end):
    """The file that holds the voxels, and the byte at which they begin. Raises Refusal."""
    if is_local(keys):
        return path, header_end

    # Some programs write ./x.raw for the file beside the header.
    name = re.sub(r"^(\./|\.\\)", "", keys["ElementDataFile"])
    check(Path(name).name == name, path, f"ElementDataFile = {name}",
          "only LOCAL or a file beside the header is supported")
    data = path.with_name(name)
    check(data.is_file(), data, "not found", f"{path.name} names it as its data")
    return data, int(keys["HeaderSize"])


def read_metaimage(source):
    """MetaImage: header and data in one file (.mha, LOCAL) or in two (.mhd), compressed or not.

    Either byte order is read. TransformMatrix lists the x, y and z index axes one after the other:
    it is direction, transposed. Raises Refusal.
    """
    path, = source.files
    keys, header_end = metaimage_header(path)
    for key, accepted in SUPPORTED.items():
        check(keys.get(key) in accepted, path, f"{key} = {keys.get(key)}",
              f"only {', '.join(accepted)} is supported")

    shape = metaimage_size(keys, path)
    spacing = metaimage_numbers(keys, "ElementSpacing", 3, path)
    origin = metaimage_numbers(keys, "Offset", 3, path)
    direction = metaimage_numbers(keys, "TransformMatrix", 9, path).reshape(3, 3).T

    # Read the voxels.
    data, start = metaimage_data(keys, path, header_end)
    byte_order = ">" if is_true(keys["BinaryDataByteOrderMSB"]) else "<"
    element = np.dtype(ELEMENTS[keys["ElementType"]]).newbyteorder(byte_order)
    size = int(shape.prod()) * element.itemsize
    raw = read_voxels(data, start, size, is_true(keys["CompressedData"]))
    hu = to_hu(np.frombuffer(raw, element).reshape(shape), data)
    return Scan(source.seriesuid, hu, spacing, origin, direction)


def read_voxels(path, start, size, compressed):
    """The `size` bytes of a MetaImage's voxels, from the byte `start` on. Raises Refusal.

    start −1: the last bytes of the file. The file must hold them all, and not more.
    """
    with path.open("rb") as file:
        file_size = file.seek(0, os.SEEK_END)
        if start == -1:
            start = file_size - size
        check(0 <= start <= file_size, path,
              f"{file_size:,} bytes, and voxels from byte {start:,} on", "fix HeaderSize")
        file.seek(start)

        # Ask for one byte more than there should be, to see whether there are more.
        if compressed:
            # 47 accepts zlib's own header and gzip's.
            raw = zlib.decompressobj(wbits=47).decompress(file.read(), size + 1)
        else:
            raw = file.read(min(size, file_size) + 1)

    count = f"{len(raw):,}" if len(raw) < size else f"more than {size:,}"
    check(len(raw) == size, path, f"{count} bytes of voxels",
          f"DimSize and ElementType make {size:,}: fix the header or replace the data")
    return raw


# DICOM

class SliceHeader(NamedTuple):
    """What the geometry of a DICOM slice needs of its tags."""
    path: Path
    position: np.ndarray        # (x, y, z) of the first pixel's centre, mm, LPS
    orientation: np.ndarray     # (6,): the direction along a row, then down a column
    pixel_spacing: np.ndarray   # (2,): between rows, then between columns, mm
    shape: np.ndarray           # (2,): rows, columns


class Stray(NamedTuple):
    """An object that carries a series' UID and is no slice of its volume."""
    path: Path
    reason: str             # what it is, in a few words
    header: SliceHeader     # None where it has no geometry


GEOMETRY = {"ImagePositionPatient": 3, "ImageOrientationPatient": 6, "PixelSpacing": 2,
            "Rows": 1, "Columns": 1}        # tag → how many numbers it holds
ENHANCED = (pydicom.uid.EnhancedCTImageStorage, pydicom.uid.LegacyConvertedEnhancedCTImageStorage)
MULTI_FRAME = "an Enhanced CT object, many slices in one file"


def read_tags(path, names):
    """{name: value} of the named tags of a DICOM file; {} where it is damaged or not DICOM."""
    try:
        with lungaug.refuse_on_error(path, ""):
            tags = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(names))
            return {name: tags[name].value for name in names if name in tags}
    except Refusal:
        # Without tags the caller ignores the file, or names the tags that it lacks.
        return {}


def slice_header(path, tags):
    """A DICOM file's SliceHeader, from its tags. Raises Refusal, which names the missing ones."""
    remedy = "replace the file, or remove it"
    values = {}
    missing = []
    for name, count in GEOMETRY.items():
        with lungaug.refuse_on_error(path, remedy):
            numbers = np.array(tags.get(name), float).ravel()
        values[name] = numbers
        if numbers.size != count or not (abs(numbers) < 1e6).all():
            missing.append(name)
    check(not missing, path, f"no {', no '.join(missing)}", remedy)
    return SliceHeader(
        path=path,
        position=values["ImagePositionPatient"],
        orientation=values["ImageOrientationPatient"],
        pixel_spacing=values["PixelSpacing"],
        shape=np.concatenate([values["Rows"], values["Columns"]]),
    )


def plane_of(header):
    """What the slices of one volume have in common: orientation, pixel spacing and size, (10,)"""
    return np.hstack([header.orientation, header.pixel_spacing, header.shape])


def group_by_plane(headers):
    """Lists of SliceHeaders whose planes agree, the largest first.

    Planes are compared, not rounded: 1.8204999 and 1.8205001 mm agree, though they round apart.
    """
    groups = []
    for header in headers:
        plane = plane_of(header)
        for group in groups:
            if not differs(plane, plane_of(group[0])):
                group.append(header)
                break
        else:
            groups.append([header])
    return sorted(groups, key=len, reverse=True)


def why_no_slice(tags):
    """What a DICOM object is that cannot be a slice, in a few words; "" where it may be one.

    A CT image that lacks a tag may: it is a damaged slice, and must not be passed over.
    """
    kind = pydicom.uid.UID(str(tags.get("SOPClassUID") or pydicom.uid.CTImageStorage))
    if kind in ENHANCED:
        return MULTI_FRAME
    if not tags or all(tags.get(name) for name in GEOMETRY):
        return ""

    if not (tags.get("Rows") and tags.get("Columns")):
        return "without an image"
    if kind != pydicom.uid.CTImageStorage:
        return f"{kind.name}, not CT"
    return "a localizer" if "LOCALIZER" in (tags.get("ImageType") or []) else ""


def has_pixels(path):
    """Whether a DICOM file has pixels; they are not read. Raises Refusal."""
    with lungaug.refuse_on_error(path, "replace the file, or remove it"):
        return "PixelData" in pydicom.dcmread(path, defer_size=1024, specific_tags=["PixelData"])


def read_headers(paths):
    """The SliceHeaders and the Strays among a series' files. Raises Refusal at a damaged slice."""
    headers = []
    strays = []
    for path in paths:
        tags = read_tags(path, ["SOPClassUID", "ImageType", *GEOMETRY])
        reason = why_no_slice(tags)
        if reason:
            strays.append(Stray(path, reason, None))
            continue

        header = slice_header(path, tags)
        if has_pixels(path):
            headers.append(header)
        else:
            strays.append(Stray(path, "without pixels", header))
    return headers, strays


def turned(header, other):
    """Whether two slices have different orientations."""
    return differs(header.orientation, other.orientation)


def plane_difference(header, other):
    """In what the plane of a slice differs from another's, in a few words."""
    # A localizer has other sizes, too, of which nothing more is learned.
    if turned(header, other):
        return "another orientation, as of a localizer"

    differences = []
    if (header.shape != other.shape).any():
        differences.append(f"{pair_text(header.shape)} pixels, not {pair_text(other.shape)}")
    if differs(header.pixel_spacing, other.pixel_spacing):
        differences.append(f"in-plane pixel spacing {pair_text(header.pixel_spacing)} mm, "
                           f"not {pair_text(other.pixel_spacing)}")
    return ", ".join(differences)


def pair_text(pair):
    """0.7 × 0.8: what a slice has between or of its rows, then columns."""
    return f"{pair[0]:g} × {pair[1]:g}"


def slices_of_volume(headers, folder):
    """Those SliceHeaders that make a volume, and Strays: the largest group of one plane, the rest.

    A localizer may carry the series' own UID: a few files of another orientation are strays, and
    so is one in twenty, or a single one, of another size or pixel spacing. Raises Refusal where
    there are more.
    """
    largest, *rest = group_by_plane(headers)
    check(len(largest) > 2, folder, f"{len(headers)} DICOM files, no three of one geometry",
          "a CT series is expected")

    strays = []
    for group in rest:
        difference = plane_difference(group[0], largest[0])
        if turned(group[0], largest[0]):
            are_few = len(group) < len(largest) / 4
        else:
            are_few = len(group) <= max(1, len(largest) / 20)
        check(are_few, group[0].path, f"{difference}, as {len(group)} of {len(headers)} files",
              "keep one kind")
        strays += [Stray(header.path, difference, header) for header in group]
    return largest, strays


def sort_slices(headers, normal):
    """The SliceHeaders in the order of their positions along the normal."""
    return sorted(headers, key=lambda header: header.position @ normal)


def most_frequent(steps):
    """The step among `steps` (n, 3) with which most of them agree; (3,), 0 where there are none."""
    if len(steps) == 0:
        return np.zeros(3)
    disagreeing = [exceeds(np.abs(steps - step), 0).any(1).sum() for step in steps]
    return steps[np.argmin(disagreeing)]


def even_step(positions, normal, folder):
    """The step (x, y, z) in mm from one slice to the next, the same for all: their mean.

    positions: (n, 3), in order. Raises Refusal where a step differs from the usual one by half of
    it along the normal, as at a missing or double slice, or where a slice lies a quarter of a step
    from its place in the even row. What is less uneven is taken for even.
    """
    steps = np.diff(positions, axis=0)
    # Of a series that was copied whole into itself, every second step is 0.
    advancing = steps[steps @ normal > 0.01]
    usual = np.median(advancing, axis=0) if len(advancing) else np.zeros(3)
    mean = steps.mean(0)

    distance = usual @ normal
    is_even = np.abs((steps - usual) @ normal).max() < distance / 2
    is_straight = np.abs(np.cumsum(steps - mean, axis=0)).max() < distance / 4
    if not (is_even and is_straight):
        # Name a step that the files hold; between two kinds of them the median holds neither.
        usual = most_frequent(advancing)
        worst = np.abs(steps - usual).max(1).argmax()
        place = positions[worst].round(3).tolist()
        actual = steps[worst].round(3).tolist()
        expected = usual.round(3).tolist()
        raise Refusal(folder, f"the slice after {place} mm lies {actual} on, not {expected}",
                      "slices must lie evenly along a line: "
                      "restore the missing ones, keep one of each")
    return mean


def slice_spacing(step):
    """The distance between slices in mm, from the step between their positions."""
    # Positions are decimal strings: 1.8, not 1.7999999999999.
    return round(float(np.linalg.norm(step)), 6)


def third_axis(step, spacing, normal):
    """The unit vector from one slice to the next: the normal, unless the gantry was tilted."""
    axis = step / spacing
    # The positions' decimals alone are not a tilt.
    return normal if np.allclose(axis, normal, atol=1e-4) else axis


def check_slices(headers, strays):
    """Raise Refusal, which says what a series holds, where it holds no slices."""
    if headers or not strays:
        return
    path, reason, _ = strays[0]
    if reason == MULTI_FRAME:
        remedy = "convert it to one file per slice, as dcm4che's emf2sf does, or to MetaImage"
    else:
        remedy = "a CT series is expected"
    raise Refusal(path, reason, remedy)


def blame_stray(refusal, strays, first):
    """The Refusal of uneven slices, which names a stray that may be the missing slice.

    first: SliceHeader of the volume.
    """
    for path, reason, header in strays:
        if header is not None and not turned(header, first):
            return Refusal(path, f"{reason}; without it {refusal.problem}", refusal.remedy)
    return refusal


def read_dicom(source):
    """The volume of a series: its slices by position along their normal   [rule_2_dicom_geometry]

    Geometry says which files belong together. Spacing along z comes from the positions, not from
    SliceThickness. Under a gantry tilt the third index axis is not normal to the slices; direction
    says so, and resampling honours it. Raises Refusal; a missing or double slice is named by its
    place.
    """
    # Choose and sort the slices.
    folder = source.files[0].parent
    headers, strays = read_headers(source.files)
    check_slices(headers, strays)
    headers, others = slices_of_volume(headers, folder)
    strays += others
    along_row, down_column = headers[0].orientation.reshape(2, 3)
    normal = np.cross(along_row, down_column)
    headers = sort_slices(headers, normal)

    # Measure the distance between them.
    positions = np.array([header.position for header in headers])
    try:
        step = even_step(positions, normal, folder)
    except Refusal as refusal:
        raise blame_stray(refusal, strays, headers[0]) from None
    between_slices = slice_spacing(step)

    # Build the scan. Its x axis runs along a row, its y axis down a column.
    first = headers[0]
    along_row, down_column = first.orientation.reshape(2, 3)
    across_slices = third_axis(step, between_slices, normal)
    between_rows, between_columns = first.pixel_spacing
    return Scan(
        seriesuid=source.seriesuid,
        hu=np.stack([slice_hu(header.path) for header in headers]),
        spacing=np.array([between_columns, between_rows, between_slices]),
        origin=first.position,
        direction=np.stack([along_row, down_column, across_slices], axis=1),
        ignored=tuple(f"{stray.path.name}: {stray.reason}" for stray in strays),
    )


def rescale(stored, slope, intercept):
    """HU = slope · stored + intercept   [rule_2_rescale]; stored: (y, x)"""
    return float(slope) * stored + float(intercept)


def slice_hu(path):
    """A slice's HU (y, x), by its own slope and intercept; int16 where all are whole."""
    remedy = "replace the file, or install what pydicom asks for"
    with lungaug.refuse_on_error(path, remedy):
        tags = pydicom.dcmread(path)
        stored = tags.pixel_array
        check(stored.ndim == 2, path, f"{stored.shape} pixels", "expected one value per pixel")
        return to_hu(rescale(stored, tags.RescaleSlope, tags.RescaleIntercept), path)


# Annotations

COLUMNS = ["seriesuid", "coordX", "coordY", "coordZ", "diameter_mm"]


def read_annotations(path):
    """LUNA16's annotations.csv: series UID → its nodules (x, y, z, diameter), mm, LPS, each once.

    Columns are found by their names, in any order, beside others. A table that a spreadsheet wrote
    is read, too: with semicolons or tabs, decimal commas, a byte order mark. Raises Refusal.
    """
    return {uid: list(citations) for uid, citations in cited_annotations(path).items()}


def cited_annotations(path):
    """Nodules per series, each with where it was read: UID → {nodule: "annotations.csv, line 12"}.

    Raises Refusal.
    """
    lines = []
    places = None       # known after the first row
    width = 0
    with lungaug.refuse_on_error(path, "give LUNA16's annotations.csv"):
        text = Path(path).read_text(encoding="utf-8-sig")
        delimiter = delimiter_of(text)
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        for row in rows:
            # A line without a cell that holds something is no row.
            if not any(cell.strip() for cell in row):
                continue
            if places is None:
                places = column_places(row, path)
                width = len(row)
                continue

            line = f"{path}, line {rows.line_num}"
            check(not any(cell.strip() for cell in row[width:]), line, delimiter.join(row),
                  f"expected {width} columns, as in the first row")
            uid, nodule = read_annotation(row, places, delimiter, line)
            lines.append((rows.line_num, uid, nodule))

    check(places is not None, path, "holds no row", f"expected {','.join(COLUMNS)}")
    # Name the rows that repeat others first: whoever corrects the table wants to know them, too.
    annotations = nodules_of_series(lines, path)
    check_diameters(lines, path)
    return annotations


def delimiter_of(text):
    """What parts the columns of a table: that of , ; and tab which its first row has most of."""
    first_row = next((line for line in text.splitlines() if line.strip()), "")
    return max(",;\t", key=first_row.count)


def column_places(head, path):
    """Where each of COLUMNS stands in the table's first row. Raises Refusal."""
    names = [cell.strip().lower() for cell in head]
    missing = [column for column in COLUMNS if column.lower() not in names]
    found = ", ".join(cell.strip() for cell in head)
    check(not missing, path, f"no column {', '.join(missing)}, but {found}",
          f"expected {','.join(COLUMNS)}")
    return [names.index(column.lower()) for column in COLUMNS]


MAX_DIAMETER = 100      # mm; LUNA16's largest nodule measures 32 mm


def check_diameters(lines, path):
    """Raise Refusal, which names every row whose diameter cannot be a nodule's.

    lines: (line number, series UID, (x, y, z, diameter)).
    """
    bad = []
    for number, _, nodule in lines:
        diameter = nodule[3]
        if diameter <= 0 or exceeds(diameter, MAX_DIAMETER):
            bad.append(f"line {number} of {diameter:g} mm")
    check(not bad, path, f"diameters: {'; '.join(bad)}",
          f"expected a diameter above 0 and at most {MAX_DIAMETER} mm")


def nodules_of_series(lines, path):
    """Series UID → {nodule: its citation}, the first row's; a line names the rows that repeat it.

    lines: (line number, series UID, (x, y, z, diameter)).
    """
    nodules = defaultdict(dict)     # series UID → nodule → the line that it stands in
    repeated = []
    for number, uid, nodule in lines:
        first = nodules[uid].setdefault(nodule, number)
        if first != number:
            repeated.append(f"line {number} repeats line {first}")

    if repeated:
        print(lungaug.printable(f"{path}: each nodule is taken once: {'; '.join(repeated)}"))

    annotations = {}
    for uid, numbers in nodules.items():
        annotations[uid] = {nodule: f"{path}, line {number}" for nodule, number in numbers.items()}
    return annotations


def read_annotation(row, places, delimiter, line):
    """A row of annotations.csv: series UID and (x, y, z, diameter). Raises Refusal.

    places: where each of COLUMNS stands in a row.
    """
    expected = "expected a series UID, coordinates and a diameter, in mm"
    check(max(places) < len(row), line, delimiter.join(row), expected)
    uid, *cells = [row[place].strip() for place in places]

    # Some tables name the file in place of the series.
    uid = re.sub(r"\.(mhd|mha)$", "", uid, flags=re.IGNORECASE)

    # A comma is a decimal one where it does not part the columns.
    if delimiter != ",":
        cells = [cell.replace(",", ".") for cell in cells]
    with lungaug.refuse_on_error(line, "expected numbers"):
        numbers = tuple(float(cell) for cell in cells)
    is_valid = uid and (np.abs(numbers) < 1e6).all()
    check(is_valid, line, delimiter.join(row), expected)
    return uid, numbers


if __name__ == "__main__":
    lungaug.command(main)
