"""Preprocessing: section 2, from CT scans to cubes with and without nodules.

    python preprocessing.py --scans LUNA16 --run runs/luna16 --workers 8     # your scans
    python preprocessing.py                                                  # none at hand: synthetic ones, made first

Reads MetaImage and DICOM (2), brings them to 1×1×1 mm (2.1.1) and [-1, 1] (2.1.2), finds the lungs (2.1.3), cuts
cubes (2.1.4), splits by patient (2.1.5) and flips (2.1.6). Leaves <run>/prepared: dataset.json; a volume, a picture
and a record for each scan.

Arrays are (z, y, x). Millimetres are (x, y, z) along the patient's axes, LPS: x rises to the left, y to the back, z
to the head. HU are Hounsfield units.
"""

import csv
import functools
import itertools
import os
import signal
import zlib
from collections import defaultdict
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pydicom
from scipy import ndimage, sparse

import lungaug
from lungaug import Refusal, check

AIR, BONE = -1000, 400              # 2.1.2: the range kept, in HU
CUBES = (6, 12, 24, 48, 96, 192)    # 3·2^k, the sides that the networks halve to 3


class Scan(NamedTuple):
    """A CT scan as its file has it: voxel hu[k, j, i] lies at origin + direction · (spacing · (i, j, k))."""
    seriesuid: str
    hu: np.ndarray          # (z, y, x), int16, or float32 where the file holds fractions
    spacing: np.ndarray     # (x, y, z), mm
    origin: np.ndarray      # (x, y, z), mm, LPS
    direction: np.ndarray   # 3×3, LPS: its columns are the x, y, z index axes


class Volume(NamedTuple):
    """A scan at 1 mm along the patient's axes: voxel hu[z, y, x] lies at origin + (x, y, z)."""
    hu: np.ndarray          # (z, y, x)
    origin: np.ndarray      # (x, y, z), mm, LPS


class Source(NamedTuple):
    """Where a scan lies: one MetaImage header, or the files of one DICOM series."""
    seriesuid: str
    patient: str
    files: tuple


# 2 Dataset: LUNA16's MetaImage, LIDC-IDRI's DICOM

def find_scans(folder):
    """Every scan in a tree of folders, a Source each, in the order of their series UIDs. Raises Refusal.

    A MetaImage's series UID is its file's name, as in LUNA16. DICOM files are told apart by SeriesInstanceUID,
    wherever they lie. Files that are neither are passed over; links to folders are not followed.
    """
    sources, series = [], defaultdict(list)
    for path in sorted(Path(root) / name for root, _, names in os.walk(folder) for name in names):
        if path.suffix.lower() in (".mhd", ".mha") and not path.is_fifo():      # a pipe would be waited for
            sources.append(Source(path.stem, path.stem, (path,)))
        elif path.is_file():
            tags = read_tags(path, ["SeriesInstanceUID", "PatientID", "Modality"])
            if tags.get("SeriesInstanceUID") and (tags.get("Modality") or "CT") == "CT":    # no radiograph, no report
                series[str(tags["SeriesInstanceUID"])].append((path, str(tags.get("PatientID") or "")))
    for uid, files in series.items():
        sources.append(Source(uid, files[0][1] or uid, tuple(path for path, _ in files)))
    check(sources, folder, "no MetaImage and no DICOM file in it", "give the folder that holds the scans with --scans")
    sources.sort(key=lambda source: source.seriesuid)
    for one, other in itertools.pairwise(sources):
        check(one.seriesuid != other.seriesuid, other.files[0], f"the series of {one.files[0]}", "keep one of them")
    return sources


def read_scan(path):
    """A Scan from a MetaImage header (.mhd, .mha) or from a folder that holds one DICOM series. Raises Refusal."""
    path = Path(path)
    sources = find_scans(path) if path.is_dir() else [Source(path.stem, path.stem, (path,))]
    check(len(sources) == 1, path, f"{len(sources)} scans in it", "name the folder of one")
    return read_source(sources[0])


def read_source(source):
    """A Source's Scan. Whatever a broken file makes a reader raise becomes one Refusal that names the file."""
    where = source.files[0]
    with lungaug.refusing(where, "replace the file"):
        scan = (read_metaimage if where.suffix.lower() in (".mhd", ".mha") else read_dicom)(source)
    check(min(scan.hu.shape) > 1, where, f"{scan.hu.shape} voxels", "three axes of two voxels at least are wanted")
    check((scan.spacing > 1e-3).all() and (scan.spacing < 100).all(), where, f"spacing {scan.spacing}",
          "from 0.001 to 100 mm are read here")
    lengths, span = np.linalg.norm(scan.direction, axis=0), abs(np.linalg.det(scan.direction))
    check(np.allclose(lengths, 1, atol=1e-3) and span > 0.5, where, f"direction {scan.direction.T.ravel()}",
          "three axes of length 1 that span the space are wanted")
    return scan


def to_hu(values, where):
    """Values as int16 HU, or float32 where they have fractions."""
    if values.dtype == np.int16:
        return values
    check((np.abs(values) < 1e12).all(), where, "voxels that are no numbers, or above 10¹²", "replace the file")
    values = np.clip(values, -32768, 32767)
    whole = values.astype(np.int16)
    return whole if (whole == values).all() else values.astype(np.float32)


ELEMENTS = {"MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2", "MET_INT": "i4",
            "MET_UINT": "u4", "MET_LONG": "i4", "MET_ULONG": "u4", "MET_FLOAT": "f4", "MET_DOUBLE": "f8"}
SYNONYMS = {"Position": "Offset", "Origin": "Offset", "Rotation": "TransformMatrix", "Orientation": "TransformMatrix",
            "ElementByteOrderMSB": "BinaryDataByteOrderMSB"}
DEFAULTS = {"NDims": "3", "Offset": "0 0 0", "TransformMatrix": "1 0 0 0 1 0 0 0 1", "HeaderSize": "0",
            "BinaryData": "True", "BinaryDataByteOrderMSB": "False", "CompressedData": "False",
            "ElementNumberOfChannels": "1"}
COUNTS = {"DimSize": 3, "ElementSpacing": 3, "Offset": 3, "TransformMatrix": 9}     # numbers in a key's value
MOST_VOXELS, MOST_SIDE = 2 ** 29, 4096      # twice a whole body at 512 × 512


def metaimage_header(path):
    """A MetaImage's keys and values, as text, and where LOCAL data would begin: after ElementDataFile, the last key."""
    keys = dict(DEFAULTS)
    with path.open("rb") as file:
        for line in itertools.islice(iter(lambda: file.readline(4096), b""), 1000):
            key, _, value = (part.strip() for part in os.fsdecode(line).partition("="))
            keys[SYNONYMS.get(key, key)] = value
            if key == "ElementDataFile":
                keys.setdefault("ElementSpacing", keys.get("ElementSize", ""))
                return keys, file.tell()
    raise Refusal(path, "no ElementDataFile in its header", "replace the file: it is cut short, or no MetaImage")


def read_metaimage(source):
    """MetaImage: header and data in one file (.mha, LOCAL) or two (.mhd), compressed or not, either byte order.

    TransformMatrix lists the x, y and z index axes one after the other: it is direction, transposed.
    """
    path, = source.files
    keys, start = metaimage_header(path)
    for key, known in (("NDims", ["3"]), ("BinaryData", ["True"]), ("ElementNumberOfChannels", ["1"]),
                       ("ElementType", ELEMENTS)):
        check(keys.get(key) in known, path, f"{key} = {keys.get(key)}", f"{', '.join(known)} is read here")
    numbers = {key: np.array(keys.get(key, "").split(), float) for key in COUNTS}
    for key, count in COUNTS.items():
        check(len(numbers[key]) == count and (abs(numbers[key]) < 1e6).all(), path, f"{key} = {keys.get(key)}",
              f"{count} numbers below a million are wanted")
    size = numbers["DimSize"][::-1]
    whole = (size % 1 == 0).all() and size.min() >= 1
    check(whole and size.max() <= MOST_SIDE and size.prod() <= MOST_VOXELS, path, f"DimSize = {keys['DimSize']}",
          f"three whole numbers from 1 to {MOST_SIDE:,}, and {MOST_VOXELS:,} voxels at most, are wanted")
    name = keys["ElementDataFile"]
    check(Path(name).name == name, path, f"ElementDataFile = {name}", "LOCAL or a file beside the header is read here")
    data, start = (path, start) if name.upper() == "LOCAL" else (path.with_name(name), int(keys["HeaderSize"]))
    check(data.is_file(), data, "is not there", f"{path.name} names it as its data")
    big, packed = (keys[key][:1] in ("T", "t", "1") for key in ("BinaryDataByteOrderMSB", "CompressedData"))
    element = np.dtype(ELEMENTS[keys["ElementType"]]).newbyteorder(">" if big else "<")
    found = read_voxels(data, start, int(size.prod()) * element.itemsize, packed)
    hu = to_hu(np.frombuffer(found, element).reshape(size.astype(int)), data)
    direction = numbers["TransformMatrix"].reshape(3, 3).T
    return Scan(source.seriesuid, hu, numbers["ElementSpacing"], numbers["Offset"], direction)


def read_voxels(path, start, wanted, compressed):
    """The `wanted` bytes of a MetaImage's voxels from `start` on (−1: the file's last), all there are, or Refusal."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        start = size - wanted if start == -1 else start
        check(0 <= start <= size, path, f"{size:,} bytes, and voxels from byte {start:,} on", "mend HeaderSize")
        file.seek(start)
        unpack = zlib.decompressobj(wbits=47)       # zlib's own header or gzip's
        found = unpack.decompress(file.read(), wanted + 1) if compressed else file.read(min(wanted, size) + 1)
    count = f"{len(found):,}" if len(found) < wanted else f"more than {wanted:,}"
    check(len(found) == wanted, path, f"{count} bytes of voxels",
          f"DimSize and ElementType make {wanted:,}: mend the header or replace the data")
    return found


def read_tags(path, names):
    """{name: value} of the named tags that a DICOM file has; none where it does not read, or is no DICOM."""
    with suppress(Refusal), lungaug.refusing(path, ""):     # for want of tags its caller passes it over
        tags = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(names))
        return {name: tags[name].value for name in names if name in tags}
    return {}


GEOMETRY = {"ImagePositionPatient": 3, "ImageOrientationPatient": 6, "PixelSpacing": 2, "Rows": 1, "Columns": 1}


def read_dicom(source):
    """The series' one volume: its slices in the order of their positions along its normal   [rule_2_dicom_geometry]

    Geometry says which files belong together (orientation, size, pixel spacing): a localizer may carry the series'
    own UID and is left out. Spacing along z comes from the positions, not from SliceThickness. Under a gantry tilt the
    third index axis is not normal to the slices; direction says so, and resampling honours it. Raises Refusal; a
    missing or doubled slice is named by its place.
    """
    where, groups = source.files[0].parent, defaultdict(list)
    for path in source.files:
        tags = read_tags(path, GEOMETRY)
        with lungaug.refusing(path, "replace the file, or take it out"):
            numbers = {name: np.array(tags.get(name), float).ravel() for name in GEOMETRY}
        wrong = [name for name, part in numbers.items() if part.size != GEOMETRY[name] or not (abs(part) < 1e6).all()]
        check(not wrong, path, f"no {', no '.join(wrong)}", "replace the file, or take it out")
        place, *plane = numbers.values()
        groups[tuple(np.hstack(plane).round(3))].append((place, path, plane))
    (key, slices), *others = sorted(groups.items(), key=lambda group: -len(group[1]))
    check(len(slices) > 2, where, f"{len(source.files)} DICOM files, no three of one geometry", "a CT series is wanted")
    for other, found in others:
        check(len(found) < len(slices) / 4 and other[:6] != key[:6], found[0][1],
              f"of another side, size or pixel spacing, as {len(found)} of {len(source.files)} files", "keep one kind")
    normal = np.cross(*slices[0][2][0].reshape(2, 3))
    places, paths, planes = zip(*sorted(slices, key=lambda one: one[0] @ normal))
    steps = np.diff(places, axis=0)
    apart = [step for step in steps if step @ normal > 0.01] or [np.zeros(3)]   # copied whole, every second is 0
    usual, step = np.median(apart, axis=0), steps.mean(0)
    worst = np.abs(steps - usual).max(1).argmax()
    after, found, wanted = (np.round(vector, 3).tolist() for vector in (places[worst], steps[worst], usual))
    even = np.abs((steps - usual) @ normal).max() < usual @ normal / 2
    straight = np.abs(np.cumsum(steps - step, axis=0)).max() < usual @ normal / 4
    check(even and straight, where, f"the slice after {after} mm lies {found} on, not {wanted}",
          "slices lie evenly along a line: restore the missing ones, keep one of each")
    orientation, (down, across), *_ = planes[0]
    between = round(float(np.linalg.norm(step)), 6)         # positions are decimal strings: 1.8, not 1.7999999999999
    third = normal if np.allclose(step / between, normal, atol=1e-4) else step / between    # their decimals are no tilt
    hu, direction = np.stack([slice_hu(path) for path in paths]), np.stack([*orientation.reshape(2, 3), third], axis=1)
    return Scan(source.seriesuid, hu, np.array([across, down, between]), places[0], direction)


def slice_hu(path):
    """HU = slope · stored + intercept, each slice's own   [rule_2_rescale]; (y, x), int16 where all are whole"""
    with lungaug.refusing(path, "replace the file, or install what pydicom asks for"):
        tags = pydicom.dcmread(path)
        check(tags.pixel_array.ndim == 2, path, f"{tags.pixel_array.shape} pixels", "one HU a pixel is wanted")
        return to_hu(float(tags.RescaleSlope) * tags.pixel_array + float(tags.RescaleIntercept), path)


COLUMNS = ["seriesuid", "coordX", "coordY", "coordZ", "diameter_mm"]


def read_annotations(path):
    """LUNA16's annotations.csv: series UID → its nodules (x, y, z, diameter), mm, LPS, each once. Raises Refusal."""
    nodules = defaultdict(dict)
    with lungaug.refusing(path, "give LUNA16's annotations.csv"), open(path, newline="", encoding="utf-8-sig") as file:
        rows = csv.reader(file)
        check(next(rows, None) == COLUMNS, path, "another first line", f"{','.join(COLUMNS)} is wanted")
        for row in filter(None, rows):
            line = f"{path}, line {rows.line_num}"
            with lungaug.refusing(line, "numbers are wanted"):
                uid, *numbers = row[0].strip(), *map(float, row[1:])
            known = uid and len(numbers) == 4 and (np.abs(numbers) < 1e6).all() and numbers[3] > 0
            check(known, line, ",".join(row), "a series UID, coordinates and a diameter above 0, in mm, are wanted")
            nodules[uid][tuple(numbers)] = None
    return {uid: list(found) for uid, found in nodules.items()}


# 2.1.1 Aspect ratio

def affine(scan):
    """The 3×3 matrix that takes an index (i, j, k) along x, y, z to millimetres from the origin."""
    return scan.direction * scan.spacing


def reorient(scan):
    """The same scan, its index axes in the order and sense of the patient's as far as they go; a view.

    A mirrored axis of n voxels takes index i to n − 1 − i, and the origin to its other end.
    """
    order = max(itertools.permutations(range(3)), key=lambda p: np.abs(scan.direction[range(3), p]).sum())
    axes, spacing = scan.direction[:, order], scan.spacing[list(order)]
    hu = scan.hu.transpose([2 - order[axis] for axis in (2, 1, 0)])
    back = np.diag(axes) < 0
    far = axes * spacing @ np.where(back, np.array(hu.shape[::-1]) - 1, 0)
    return Scan(scan.seriesuid, flip(hu, back[::-1]), spacing, scan.origin + far, np.where(back, -axes, axes))


def grid(scan):
    """The 1 mm grid on the patient's axes, from the corner-most voxel centre on, exactly   [rule_2_1_1_exact_grid]

    Returns origin (x, y, z) in mm and shape (z, y, x).
    """
    edges = affine(scan) * (np.array(scan.hu.shape[::-1]) - 1)      # columns: from the first voxel to the last, in mm
    return scan.origin + np.minimum(edges, 0).sum(1), np.floor(np.abs(edges).sum(1) + 1e-6).astype(int)[::-1] + 1


def resample(scan, origin=None, shape=None):
    """HU at 1×1×1 mm by linear interpolation: index = (direction·spacing)⁻¹ · (x − origin)   [rule_2_1_1_resample]

    origin (x, y, z) in mm and shape (z, y, x): the part of the grid to fill (default: all of it).
    Returns Volume(hu (z, y, x) in the scan's dtype, origin); where an oblique scan does not reach lies air. Linear,
    because a higher order overshoots at bone and metal.
    """
    scan = reorient(scan)
    origin, shape = (origin, shape) if origin is not None else grid(scan)
    matrix = np.linalg.inv(affine(scan))[::-1, ::-1]
    start = matrix @ (origin - scan.origin)[::-1]
    if np.count_nonzero(matrix) == 3:       # the axes agree
        return Volume(interpolate_axes(scan.hu, start, np.diag(matrix), shape), origin)
    hu = ndimage.affine_transform(scan.hu, matrix, start, tuple(shape), order=1, mode="grid-constant", cval=AIR)
    return Volume(hu, origin)


def line_weights(size, start, step, count):
    """W[k, i] = max(0, 1 − |x_k − i|), x_k = start + step·k; past an end the last voxel has all; (count, size), sparse"""
    x = (start + step * np.arange(count))[:, None]
    near = np.floor(x).astype(int) + [0, 1]
    entries = (1 - np.abs(x - near)).ravel(), np.clip(near, 0, size - 1).ravel(), 2 * np.arange(count + 1)
    return sparse.csr_array(entries, shape=(count, size))


def interpolate_axes(hu, start, step, shape):
    """Σᵢ W_z[k, i] · (W_y · hu[i] · W_xᵀ): linear interpolation at start + step·k, axis by axis   [rule_2_1_1_axes]

    hu: (z, y, x); start, step: in its voxels along z, y, x; shape: (z, y, x) of the result, in hu's dtype. Past an end
    HU are the last voxel's. Two slices at a time are in memory, and no point asks for eight corners.
    """
    real, found = np.result_type(hu, np.float32), np.empty(shape, hu.dtype)
    along_z, along_y, along_x = (line_weights(*axis).astype(real) for axis in zip(hu.shape, start, step, shape))

    @functools.lru_cache(2)
    def in_plane(i):
        return (along_x @ (along_y @ hu[i].astype(real)).T).T

    for image, (first, last) in zip(found, itertools.pairwise(along_z.indptr)):
        exact = sum(weight * in_plane(i) for i, weight in zip(along_z.indices[first:last], along_z.data[first:last]))
        image[:] = exact if hu.dtype.kind == "f" else np.rint(exact)
    return found


# 2.1.2 Hounsfield unit normalization

def clip_hu(hu):
    """min(max(HU, -1000), 400)   [rule_2_1_2_clip]; any shape, dtype kept"""
    return np.clip(hu, AIR, BONE)


def normalize(hu):
    """x = 2·(HU + 1000)/1400 − 1, HU clipped first   [eq_2_1_2_normalize]; any shape → float32 in [-1, 1]"""
    return (clip_hu(np.asarray(hu, np.float32)) - AIR) * np.float32(2 / (BONE - AIR)) - 1


def denormalize(x):
    """HU = 1400·(x + 1)/2 − 1000   [eq_2_1_2_denormalize]; x in [-1, 1], any shape → float32"""
    return (np.asarray(x, np.float32) + 1) * np.float32((BONE - AIR) / 2) + AIR


# 2.1.3 Lung segmentation

CLOSING_RADIUS = 10     # mm: takes in vessels, and nodules at the pleura
GAS = -940              # HU: lungs' mean lies above it, that of gas in the bowel below
THIN_WALL = 2           # mm: through less, noise lets the lungs leak into gas in the bowel


def close_ball(mask, radius):
    """(M ⊕ B) ⊖ B, closing by nearly a ball of `radius` voxels   [rule_2_1_3_closing]

    mask: bool (z, y, x). Small elements in turn are far quicker than one large one.
    """
    cross, cube = (ndimage.generate_binary_structure(3, n) for n in (1, 3))
    cubes = round(radius / 3)       # crosses alone make a pointed octahedron, cubes alone a cube
    mask = np.pad(mask, radius)
    for operation in (ndimage.binary_dilation, ndimage.binary_erosion):
        mask = operation(mask, cross, iterations=radius - cubes)
        mask = operation(mask, cube, iterations=cubes) if cubes else mask
    return mask[(slice(radius, -radius),) * 3]


def lung_mask(hu, step=1):
    """HU < -500, the room's air dropped; the largest component; closed, its holes filled   [rule_2_1_3_lungs]

    hu: (z, y, x) HU, `step` mm apart. Returns bool (z, y, x); all False where there is no such air.
    The room is air that reaches the border of the axial field of view. Two components are taken where the second has
    at least a quarter of the first: lungs that do not touch. They are chosen before the closing, which would join
    them to the stomach's gas, and after an erosion by 2 mm, which parts what meets through a thin wall.
    """
    air, thin = hu < -500, max(1, round(THIN_WALL / step))
    labels, _ = ndimage.label(ndimage.binary_erosion(air, iterations=thin, border_value=1))
    sizes = np.bincount(labels.ravel())
    room = np.concatenate([labels[:, [0, -1]].ravel(), labels[:, :, [0, -1]].ravel()])
    sizes[0] = sizes[room] = 0      # 0: what is no air
    two = np.argsort(sizes, kind="stable")[-2:]
    chosen = two[sizes[two] >= max(1, sizes.max() / 4)]     # two, one or none
    lungs = ndimage.binary_dilation(np.isin(labels, chosen), iterations=thin + 1, mask=air)
    for box in ndimage.find_objects(lungs.astype(np.int8)):     # the one around them all
        lungs[box] = ndimage.binary_fill_holes(close_ball(lungs[box], round(CLOSING_RADIUS / step)))
    return lungs


def coarse_lungs(scan):
    """The lungs at 2 mm, an eighth of the voxels, on the scan's own axes: its field of view ends where the array does.

    Returns HU and mask, (z, y, x), as Scans.
    """
    scan = reorient(scan)
    shape = ((np.array(scan.hu.shape) - 1) * scan.spacing[::-1] // 2 + 1).astype(int)
    hu = interpolate_axes(scan.hu, np.zeros(3), 2 / scan.spacing[::-1], shape)
    return tuple(scan._replace(hu=array, spacing=np.full(3, 2.0)) for array in (hu, lung_mask(hu, 2)))


# 2.1.4 Positive and negative cube samples

def nearest_voxel(origin, centre):
    """The grid point (z, y, x) nearest to `centre`   [rule_2_1_4_centre]; both (x, y, z) in mm, or centre (n, 3)"""
    return np.floor((np.asarray(centre, float) - origin)[..., ::-1] + 0.5).astype(int)


def cut(hu, voxel, side):
    """The cube whose voxel side//2 is hu[voxel]; beyond the edge lies air, -1000 HU   [rule_2_1_4_padding]

    hu: (z, y, x); voxel: (z, y, x), it may lie outside. Returns (side, side, side), hu's dtype.
    """
    cube = np.full((side,) * 3, AIR, hu.dtype)
    start = np.asarray(voxel) - side // 2
    low, high = np.maximum(start, 0), np.minimum(start + side, hu.shape)
    if (low < high).all():
        cube[tuple(map(slice, low - start, high - start))] = hu[tuple(map(slice, low, high))]
    return cube


def crop_cube(volume, centre, side):
    """The cube (side, side, side) of a Volume's HU around the voxel nearest to `centre` (x, y, z) in mm."""
    return cut(volume.hu, nearest_voxel(volume.origin, centre), side)


def meets_sphere(voxels, side, centre, radius):
    """Whether the cube of `side` voxels around each of `voxels` (n, 3) meets the sphere: bool (n,); all in voxels"""
    low = voxels - side // 2 - 0.5
    return ((np.clip(centre, low, low + side) - centre) ** 2).sum(1) < radius ** 2


def draw_negatives(lungs, nodules, side, count, rng):
    """Centres uniform over the lungs, rejected where the cube meets a nodule's sphere   [rule_2_1_4_negatives]

    lungs: (m, 3), the mask's voxels of 2 mm; nodules: (centre (3,), radius); all in voxels (z, y, x) of the 1 mm grid.
    Returns int (n, 3), n ≤ count: fewer where nearly every cube in these lungs meets a nodule.
    """
    found = np.empty((0, 3), int)
    for _ in range(100):
        drawn = lungs[rng.integers(len(lungs), size=count)] + rng.uniform(-1, 1, (count, 3))
        drawn = np.rint(drawn).astype(int)
        for centre, radius in nodules:
            drawn = drawn[~meets_sphere(drawn, side, centre, radius)]
        found = np.concatenate([found, drawn])[:count]
        if len(found) == count:
            break
    return found


# 2.1.5 Train / validation / test split

SPLITS = {"train": 0.7, "validation": 0.1, "test": 0.2}


def split_patients(patients, seed):
    """70% / 10% / 20% of the patients, one each at least: patient → split   [rule_2_1_5_split]

    By patient, so that no cube of a training patient is in validation or test. Raises Refusal below three patients.
    """
    patients = sorted(set(patients))
    check(len(patients) >= 3, "the scans", f"patients that can be used: {len(patients)}",
          "training, validation and test want one each: give more scans")
    validation, test = (max(1, round(SPLITS[split] * len(patients))) for split in ("validation", "test"))
    order = [patients[i] for i in lungaug.stream(seed, "split").permutation(len(patients))]
    return dict(zip(order, ["test"] * test + ["validation"] * validation + ["train"] * len(patients)))


# 2.1.6 Conventional data augmentation

FLIPS = tuple(itertools.product((False, True), repeat=3))       # along z, y, x; the first is none


def flip(cube, flips):
    """A cube mirrored along the axes where `flips` (z, y, x) is true   [rule_2_1_6_flip]; a view"""
    return cube[tuple(slice(None, None, -1 if mirrored else None) for mirrored in flips)]


def all_flips(cube):
    """The eight mirror images of a cube (s, s, s), itself the first   [rule_2_1_6_all_flips]; (8, s, s, s)"""
    return np.stack([flip(cube, flips) for flips in FLIPS])


def with_flips(rows):
    """Every row of (n, 4) with each of its eight flips: rows (8n, 4), flips (8n,), numbers into FLIPS"""
    return rows.repeat(8, axis=0), np.tile(np.arange(8), len(rows))


# A scan, from its files to its cubes

def scan_name(seriesuid):
    """A file name for a series, within the folder whatever the UID says: a hostile file may have made it anything."""
    plain = "".join(c if c.isascii() and (c.isalnum() or c in "-._") else "_" for c in seriesuid)[:100]
    is_uid = plain == seriesuid and plain[:1].isdigit()     # so never one of our own files' names, dataset or options
    return plain if is_uid else f"_{plain}_{zlib.crc32(seriesuid.encode(errors='surrogatepass')):08x}"


def prepare_scan(source, nodules, folder, parameters):
    """Read a scan, find its lungs, fill the 1 mm grid around lungs and nodules (half a cube to spare), draw negatives.

    Leaves the volume and a picture in `folder`; returns the scan's record. Raises Refusal.
    """
    where, cube = source.files[0], parameters["cube"]
    scan = read_source(source)
    check(scan.spacing.max() <= parameters["max_slice_mm"], where, f"slices {scan.spacing.max():g} mm apart",
          f"LUNA16 keeps {parameters['max_slice_mm']:g} mm at most; --max-slice-mm raises it")
    scan = scan._replace(hu=clip_hu(scan.hu).astype(np.int16))
    coarse, mask = coarse_lungs(scan)
    litres, areas = round(float(mask.hu.sum() * 8e-6), 3), mask.hu.sum((1, 2))
    check(1 <= litres <= 12, where, f"{litres} litres of lung", "a chest CT with both lungs in view is wanted")
    check(coarse.hu[mask.hu].mean() > GAS, where, f"{litres} litres of gas below {GAS} HU", "a chest CT is wanted")
    check(max(areas[0], areas[-1]) < areas.max() / 2, where, "lungs cut at an end", "a whole chest is wanted")
    (corner, shape), nodules = grid(scan), np.array(nodules).reshape(-1, 4)
    index = (nodules[:, :3] - scan.origin) @ np.linalg.inv(affine(scan)).T + 0.5        # from the first voxel's corner
    outside = ((index < 0) | (index > scan.hu.shape[::-1])).any(1)
    check(not outside.any(), where, f"a nodule outside it, at {str(nodules[outside, :3].tolist())[1:-1]} mm",
          "mend the annotations: (x, y, z) in mm, LPS, are wanted")
    centres = nearest_voxel(corner, nodules[:, :3])
    lungs = (np.argwhere(mask.hu)[:, ::-1] @ affine(mask).T + mask.origin - corner)[:, ::-1]
    reach = np.concatenate([np.rint(lungs).astype(int), centres])
    margin = cube // 2 + 1      # a negative's centre may lie a millimetre outside the mask's outermost points
    start, stop = np.maximum(reach.min(0) - margin, 0), np.minimum(reach.max(0) + margin + 1, shape)
    volume = resample(scan, corner + start[::-1], stop - start)
    spheres = [((nodule[:3] - corner)[::-1], nodule[3] / 2) for nodule in nodules]
    rng = lungaug.stream(parameters["seed"], "negatives", source.seriesuid)
    negatives = draw_negatives(lungs, spheres, cube, parameters["negatives"], rng)
    name = scan_name(source.seriesuid)
    lungaug.write(folder / f"{name}.npy", volume.hu)
    places = ((nodules[:, :3] - coarse.origin) @ np.linalg.inv(affine(coarse)).T)[:, ::-1]
    lungaug.write(folder / f"{name}.png", scan_picture(coarse.hu, mask.hu, places, nodules[:, 3] / 4))
    return {"seriesuid": source.seriesuid, "patient": source.patient, "volume": f"{name}.npy",
            "crc32": zlib.crc32(volume.hu.tobytes()), "origin": volume.origin.tolist(), "litres": litres,
            "positives": (centres - start).tolist(), "diameters": nodules[:, 3].tolist(),
            "negatives": (negatives - start).tolist()}


def scan_picture(hu, lungs, centres, radii):
    """A PNG of three planes at 2 mm through the largest nodule, or through the right lung where there is none.

    hu, lungs: (z, y, x), the lungs outlined in red; centres (n, 3), radii (n,): nodules, in voxels, ringed in green.
    """
    pictures, through = [], centres[radii.argmax()] if len(radii) else np.quantile(np.argwhere(lungs), 0.25, axis=0)
    for axis, at in enumerate(np.clip(np.rint(through).astype(int), 0, np.array(hu.shape) - 1)):
        mask = lungs.take(at, axis)
        picture = np.stack([lungaug.grey(normalize(hu.take(at, axis)))] * 3, axis=-1)
        picture[mask ^ ndimage.binary_erosion(mask)] = 230, 60, 50
        rows, columns = np.indices(mask.shape)
        for (row, column), depth, radius in zip(np.delete(centres, axis, 1), centres[:, axis] - at, radii + 1):
            disc = (rows - row) ** 2 + (columns - column) ** 2 + depth ** 2 < radius ** 2
            picture[ndimage.binary_dilation(disc) ^ disc] = 60, 220, 90
        pictures.append(picture if axis == 0 else picture[::-1])        # superior is up
    tall = max(map(len, pictures))
    sheet = np.hstack([np.pad(picture, ((0, tall - len(picture)), (2, 2), (0, 0))) for picture in pictures])
    return lungaug.png(sheet, 2)


def read_record(source, folder, parameters):
    """The record that an earlier run left of a scan with the same parameters; {} where there is none that is whole."""
    path = folder / f"{scan_name(source.seriesuid)}.json"
    with suppress(Refusal), lungaug.refusing(path, ""):
        record = lungaug.read(path, "")
        return record if record.pop("fingerprint") == lungaug.fingerprint([parameters, record]) else {}
    return {}


def is_whole(record, folder):
    """Whether a record's volume is there and reads back as it was written."""
    with suppress(Refusal), lungaug.refusing(folder, ""):
        return zlib.crc32(open_array(folder / record["volume"])) == record["crc32"]
    return False


def prepare_one(source, nodules, folder, parameters):
    """Make a scan's record, unless a whole one is there; of one that cannot be used, the reason, which is returned."""
    if is_whole(read_record(source, folder, parameters), folder):
        return None
    try:
        record, refusal = prepare_scan(source, nodules, folder, parameters), None
    except (Refusal, MemoryError) as error:
        too_large = Refusal(source.files[0], "too large for the memory", "give fewer --workers")
        refusal = error if isinstance(error, Refusal) else too_large
        record = {"seriesuid": source.seriesuid, "reason": str(refusal)}
    whole = record | {"fingerprint": lungaug.fingerprint([parameters, record])}
    lungaug.write(folder / f"{scan_name(source.seriesuid)}.json", whole)
    return refusal


# The prepared data, as the other stages use them

class Dataset(NamedTuple):
    """What preprocessing left. A row (scan, z, y, x) is a scan's number in `info` and its cube's centre voxel."""
    folder: Path
    info: dict              # dataset.json
    cube: int
    positives: dict         # split → rows, int (n, 4)
    negatives: dict
    fingerprint: int        # of its scans: what is made from them remembers it


def open_dataset(run):
    """The Dataset in <run>/prepared. Raises Refusal where there is none to train on."""
    path = Path(run) / "prepared" / "dataset.json"
    info, do = lungaug.read(path, f"run python preprocessing.py --run {run} first"), "run preprocessing.py again"

    def rows(kind, split):
        found = [(i, *voxel) for i, scan in enumerate(info["scans"]) if scan["split"] == split for voxel in scan[kind]]
        check(found or split != "train", path, f"training scans without {kind}", "give more scans, or another --seed")
        return np.array(found, np.int32).reshape(-1, 4)

    with lungaug.refusing(path, do):
        cube, names = info["parameters"]["cube"], [scan["volume"] for scan in info["scans"]]
        plain = all(Path(name).name == name for name in names)
        known = info["preset"] in ("demo", "thesis") and type(cube) is int and cube in CUBES and plain
        check(known, path, "a preset, cube or file name of no use", do)
        kinds = [{split: rows(kind, split) for split in SPLITS} for kind in ("positives", "negatives")]
        return Dataset(path.parent, info, cube, *kinds, lungaug.fingerprint(info["scans"]))


def labelled(dataset, split):
    """A split's cubes to score: rows (n, 4), flips (n,), labels (n,); positives first, each with its eight flips."""
    positives, flips = with_flips(dataset.positives[split])
    negatives = dataset.negatives[split]
    labels = np.repeat([1, 0], [len(positives), len(negatives)])
    return np.concatenate([positives, negatives]), np.concatenate([flips, np.zeros(len(negatives), int)]), labels


@functools.lru_cache(maxsize=256)
def open_array(path, cube=None):
    """A volume (z, y, x), or n cubes (n, cube, cube, cube), on disk: mapped, not read. Raises Refusal."""
    with lungaug.refusing(path, "run the stage that made it again"):
        array = np.load(path, mmap_mode="r")
        known = array.dtype == np.int16 and (array.shape[1:] == (cube,) * 3 if cube else array.ndim == 3)
        check(known, path, f"{array.dtype}, {array.shape}", "run the stage that made it again")
        return array


def read_cubes(dataset, rows, flips=None):
    """The cubes at `rows` (n, 4), each with its flip of `flips` (n,): float32 (n, 1, c, c, c) in [-1, 1]"""
    cubes = np.empty((len(rows), 1, *[dataset.cube] * 3), np.int16)
    for i, (scan, *voxel) in enumerate(rows):
        cube = cut(open_array(dataset.folder / dataset.info["scans"][scan]["volume"]), voxel, dataset.cube)
        cubes[i, 0] = cube if flips is None else flip(cube, FLIPS[flips[i]])
    return normalize(cubes)


# Table 1

TABLE_1 = {"train": (5712, 406791), "validation": (816, 58113), "test": (1632, 116226)}


def table_1(scans):
    """Table 1: split → nodules, positives (eight flips each: the thesis' are 8·n), negatives   [num_table_1]"""
    table = {}
    for split in SPLITS:
        nodules, negatives = (sum(len(scan[kind]) for scan in scans if scan["split"] == split)
                              for kind in ("positives", "negatives"))
        table[split] = {"positive": 8 * nodules, "nodules": nodules, "negative": negatives, "thesis": TABLE_1[split]}
    return table


def page(dataset):
    """What the report shows of section 2."""
    info = dataset.info
    counts = [(f"{split.capitalize()} ({SPLITS[split]:.0%})",
               *map(lungaug.shown, (row["positive"], row["nodules"], row["negative"], *row["thesis"])))
              for split, row in info["table_1"].items()]
    most = max(info["scans"], key=lambda scan: len(scan["positives"]))
    kind = "synthetic scans: they show that it works, nothing of patients" if info["synthetic"] else "of your scans"
    left_out = [(row["seriesuid"], row["reason"]) for row in info["left_out"]]
    return ["2 Dataset",
            (f"Table 1. Sample counts, {len(info['scans'])} {kind}. Each nodule's eight flips count.",
             ("", "positive", "nodules", "negative", "thesis: positive", "negative"), counts),
            *([("Scans left out.", ("series", "why"), left_out)] if left_out else []),
            (f"Scan {most['seriesuid']}: axial, coronal and sagittal plane through its largest nodule. "
             "Red: the lungs. Green: 2 mm around the nodules that a plane meets. The patient's left is at the right.",
             most["volume"].replace(".npy", ".png"))]


def find_annotations(scans):
    """annotations.csv in the scans' folder, or in the nearest folder above it. Raises Refusal."""
    for folder in (scans.resolve(), *scans.resolve().parents):
        if (folder / "annotations.csv").is_file():
            return folder / "annotations.csv"
    raise Refusal(scans, "no annotations.csv in it or above it", "give it with --annotations")


def prepare(sources, annotations, folder, parameters, arguments):
    """Make every source's record, in --workers processes; raises the first Refusal under --strict."""
    step = lungaug.progress("scans", len(sources))
    workers = min(arguments.workers, len(sources) or 1)
    with ProcessPoolExecutor(workers, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)) as pool:
        jobs = [pool.submit(prepare_one, source, annotations.get(source.seriesuid, []), folder, parameters)
                for source in sources]
        try:
            for done, (source, job) in enumerate(zip(sources, jobs), 1):
                if arguments.strict and job.result():
                    raise job.result()
                step(done, f"left out: {source.seriesuid}" if job.result() else source.seriesuid)
        except BrokenExecutor:
            raise Refusal(folder, "a process was killed, perhaps for want of memory", "give fewer --workers") from None
        finally:
            pool.shutdown(cancel_futures=True)


def gather(records, folder, parameters, arguments):
    """Write dataset.json of what all parts left, and say which scans are left out."""
    left_out = [record for record in records if "reason" in record]
    for row in left_out:
        print(f"left out: {row['reason'].removeprefix('lungaug: ')}")
    records = [record for record in records if "reason" not in record]
    check(records, arguments.scans or "the synthetic scans", "none can be used", "see the reasons above")
    splits = split_patients([record["patient"] for record in records], arguments.seed)
    scans = [record | {"split": splits[record["patient"]]} for record in records]
    lungaug.write(folder / "dataset.json", {
        "parameters": parameters, "preset": arguments.preset, "synthetic": arguments.scans is None,
        "table_1": table_1(scans), "left_out": left_out, "scans": scans})


def main():
    arguments = lungaug.parse(__doc__.split("\n")[0], "preprocessing")
    run, synthetic = arguments.run, arguments.scans is None
    lungaug.settle(arguments, "preprocessing", "demo" if synthetic else "thesis")
    print(f"Preset {arguments.preset}: {'synthetic scans' if synthetic else 'your scans'}.", flush=True)
    lungaug.pick_device(arguments.device)       # the next stages': better told now than in hours
    check(arguments.cube in CUBES, "--cube", arguments.cube, f"one of {', '.join(map(str, CUBES))} is wanted")
    scans, folder = arguments.scans or run / "scans", run / "prepared"
    check(synthetic or scans.is_dir(), scans, "is no folder", "give the folder that holds the scans with --scans")
    begun, do = folder / "parameters.json", "run python preprocessing.py with the --scans it had, or give another --run"
    with lungaug.refusing(begun, do):
        if synthetic and begun.exists():
            check(lungaug.read(begun, do)["scans"] == "synthetic", begun, "your scans, not synthetic ones", do)
    if synthetic and not (scans / "annotations.csv").exists():
        run.mkdir(parents=True, exist_ok=True)
        lungaug.stage("tests/phantom.py", "--run", run, "--seed", arguments.seed, "--workers", arguments.workers)
    table = arguments.annotations or find_annotations(scans)
    annotations, sources = read_annotations(table), find_scans(scans)
    check(any(source.seriesuid in annotations for source in sources), table, "no series of the scans in it",
          "a MetaImage's series UID is its file's name, a DICOM file's is its tag")
    origin = "synthetic" if synthetic else str(scans.resolve())
    parameters = {"scans": origin, "annotations": zlib.crc32(table.read_bytes()),
                  **{key: getattr(arguments, key) for key in ("cube", "negatives", "max_slice_mm", "seed")}}
    part, parts = map(int, arguments.part.split("/"))
    with lungaug.alone(folder, f"part {part} of {parts}"):
        lungaug.claim(folder, parameters, arguments.overwrite)
        mine = sources[part - 1::parts]
        if arguments.overwrite:
            records = (f"{scan_name(source.seriesuid)}.json" for source in mine)
            lungaug.discard(folder, "dataset.json", "options.json", *records)
        prepare(mine, annotations, folder, parameters, arguments)
        records = [read_record(source, folder, parameters) for source in sources]
        if not all(records):
            print(f"This part is done; {records.count({})} scans are other parts'. The last part writes dataset.json.")
            return
        gather(records, folder, parameters, arguments)
    dataset = open_dataset(run)
    items = page(dataset)
    lungaug.print_table(*items[1])      # Table 1
    litres = [scan["litres"] for scan in dataset.info["scans"]]
    print(f"{len(litres)} scans, {len(dataset.info['left_out'])} left out; lungs of {min(litres):.1f} to "
          f"{max(litres):.1f} litres. Pictures in {folder}: one a scan.")
    lungaug.record_stage(folder, arguments, items)


if __name__ == "__main__":
    lungaug.command(main)
