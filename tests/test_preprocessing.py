"""Section 2 from a scan in memory to cubes, then the whole of preprocessing.py as a user runs it.

    python -m pytest tests/test_preprocessing.py -v
    LUNGAUG_LUNA16_MINI=<folder of three real scans> \
        python -m pytest tests/test_preprocessing.py -k real -v

Geometry is checked by what must hold: a scan whose HU are its own x, y or z in mm holds its own
coordinates after resampling; and against the plain version, a sum over eight corners per point.
Sides are unequal, so that a swapped axis shows. How files are read is test_readers.py's subject.
"""

import csv
import itertools
import json
import os
import shutil
import tracemalloc
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import SimpleNamespace

import lungaug
from lungaug import Refusal

import numpy as np
import pytest
from scipy import ndimage

import phantom
import preprocessing
import scan_files
import train_gan
from helpers import early, refused, run_python, small_run
from preprocessing import Scan, Source, Volume


ROOT = Path(__file__).resolve().parent.parent
THESIS = {option.dest: option.thesis for option in lungaug.options_of("preprocessing")}


def turn(axis, degrees):
    """3×3: a rotation about the x, y or z axis."""
    first, second = [i for i in range(3) if i != axis]
    angle = np.radians(degrees)
    matrix = np.eye(3)
    matrix[first, first] = matrix[second, second] = np.cos(angle)
    matrix[first, second] = -np.sin(angle)
    matrix[second, first] = np.sin(angle)
    return matrix


# A gantry tilted by 20°: the third index axis is not normal to the slices.
TILT = np.column_stack([(1, 0, 0), (0, 1, 0), (0, np.sin(np.pi / 9), np.cos(np.pi / 9))])
SAGITTAL = np.array([[0.0, 0, 1], [1, 0, 0], [0, -1, 0]])
DIRECTIONS = {
    "identity": np.eye(3),
    "one axis flipped": np.diag([1.0, 1, -1]),
    "two axes flipped": np.diag([-1.0, -1, 1]),
    "sagittal": SAGITTAL,
    "coronal": np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]]),
    "permuted and flipped": np.array([[0.0, -1, 0], [0, 0, 1], [1, 0, 0]]),
    "oblique": turn(0, 12) @ turn(1, -9) @ turn(2, 17),
    "oblique and flipped": turn(2, 25) @ np.diag([-1.0, 1, -1]),
    "oblique and sagittal": turn(1, 14) @ SAGITTAL,
    "gantry tilt": TILT,
    "gantry tilt, flipped": TILT @ np.diag([-1.0, 1, -1]),
}
AXES_AGREE = [name for name, matrix in DIRECTIONS.items() if np.count_nonzero(matrix) == 3]
every_direction = pytest.mark.parametrize("name", DIRECTIONS)

SHAPE = (9, 11, 14)                             # (z, y, x)
LAST_INDEX = np.array(SHAPE[::-1]) - 1          # (x, y, z)
SPACING = np.array([0.7, 1.3, 2.5])             # (x, y, z), mm
ORIGIN = np.array([-31.4, 17.3, -205.9])        # (x, y, z), mm


def indices(shape):
    """Every voxel's index (x, y, z), in the order of the array (z, y, x): (n, 3)."""
    return np.indices(shape).reshape(3, -1).T[:, ::-1]


def places(scan):
    """Every voxel's place in mm, origin + direction · (spacing · index): (n, 3)"""
    steps = [scan.direction @ (scan.spacing * index) for index in indices(scan.hu.shape)]
    return scan.origin + np.array(steps)


def scan_of(hu, direction, spacing=SPACING, origin=ORIGIN):
    spacing = np.array(spacing, float)
    origin = np.array(origin, float)
    return Scan("1.2.3", hu, spacing, origin, np.array(direction, float))


def coordinates(name, axis):
    """A scan in float64 whose HU are its own x, y or z in mm."""
    scan = scan_of(np.empty(SHAPE), DIRECTIONS[name])
    return scan._replace(hu=places(scan)[:, axis].reshape(SHAPE))


def grid_points(volume):
    """Every grid point's place in mm, (n, 3)."""
    return volume.origin + indices(volume.hu.shape)


def index_in(scan, points):
    """Where points (n, 3) in mm lie in a scan: indices (x, y, z) with fractions."""
    return np.linalg.solve(scan.direction * scan.spacing, (points - scan.origin).T).T


def noise(shape, dtype=np.int16):
    return np.random.default_rng(0).integers(-1000, 400, shape).astype(dtype)


def box(shape, *corners, inside=-850, outside=40):
    """A volume of tissue with boxes (low, high) of lung in it."""
    hu = np.full(shape, outside, np.int16)
    for low, high in corners:
        hu[tuple(map(slice, low, high))] = inside
    return hu


def dice(mask, truth):
    return 2 * (mask & truth).sum() / (mask.sum() + truth.sum())


# 2.1.1 Aspect ratio

@pytest.mark.parametrize("axis", range(3), ids="xyz")
@every_direction
def test_rule_2_1_1_resample__coordinates_survive(name, axis):
    """A scan whose HU are its own x, y or z holds them at every grid point, in any direction."""
    scan = coordinates(name, axis)
    volume = preprocessing.resample(scan)
    points = grid_points(volume)

    index = index_in(scan, points)
    within = ((index > -1e-9) & (index < LAST_INDEX + 1e-9)).all(1)
    assert within.sum() > 500
    assert np.abs(volume.hu.ravel() - points[:, axis])[within].max() < 1e-9


def test_rule_2_1_1_resample__int16_is_rounded_to_the_nearest():
    """In whole HU, positive and negative, a point is half a unit off at most."""
    scan = scan_of(noise(SHAPE), DIRECTIONS["oblique"])
    volume = preprocessing.resample(scan)
    exact = preprocessing.resample(scan._replace(hu=scan.hu.astype(float)))
    assert volume.hu.dtype == np.int16
    assert np.abs(volume.hu - exact.hu).max() < 0.5 + 1e-9


def sum_over_eight_corners(hu, index):
    """Linear interpolation by its definition: Σ weight · HU of the eight voxels around.

    hu: (z, y, x); index: (n, 3), (x, y, z) with fractions. Outside lies air.
    """
    size = np.array(hu.shape[::-1])
    lowest = np.floor(index).astype(int)
    total = np.zeros(len(index))
    for offset in itertools.product((0, 1), repeat=3):
        corner = lowest + offset
        weight = np.prod(1 - np.abs(index - corner), axis=1)
        inside = ((corner >= 0) & (corner < size)).all(1)
        x, y, z = np.clip(corner, 0, size - 1).T
        total += weight * np.where(inside, hu[z, y, x], -1000)
    return total


@every_direction
def test_rule_2_1_1_resample__equals_the_sum_over_eight_corners(name):
    """Linear interpolation by its definition gives the same HU, with air outside the scan."""
    scan = scan_of(noise(SHAPE, float), DIRECTIONS[name])
    volume = preprocessing.resample(scan)
    expected = sum_over_eight_corners(scan.hu, index_in(scan, grid_points(volume)))
    # A grid point on the last voxel may lie 1e-13 past it.
    assert np.abs(volume.hu.ravel() - expected).max() < 1e-6


@pytest.mark.parametrize("name", AXES_AGREE)
def test_rule_2_1_1_axes__equals_the_full_matrix(name):
    """The fast way of agreeing axes equals a full matrix: a turn by 1e-10 takes the slow way."""
    scan = scan_of(noise(SHAPE, float), DIRECTIONS[name])
    origin, shape = preprocessing.grid(scan)
    fast = preprocessing.resample(scan)

    turned = scan._replace(direction=turn(1, 1e-10) @ scan.direction)
    slow = preprocessing.resample(turned, origin, shape)
    assert np.abs(fast.hu - slow.hu).max() < 1e-6


@pytest.mark.parametrize("dtype, tolerance", [
    (float, 1e-10), (">f8", 1e-10), (np.float32, 1e-3), (np.int16, 0)])
def test_rule_2_1_1_axes__equals_affine_transform(dtype, tolerance):
    """SciPy's way, point by point: the same to a number's own digits, and rounded in whole HU."""
    hu = noise(SHAPE, dtype)
    start = (0.3, 1.2, 0)
    step = (0.41, 0.77, 1.3)
    shape = (20, 13, 11)
    plain = ndimage.affine_transform(hu.astype(float), np.array(step), start, shape, order=1,
                                     mode="nearest")
    if dtype == np.int16:
        plain = np.rint(plain)

    result = preprocessing.interpolate_axes(hu, start, step, shape)
    assert result.dtype == dtype and result.shape == shape
    assert np.abs(result - plain).max() <= tolerance


def test_rule_2_1_1_axes__past_an_end_the_last_voxel_stays():
    """Points before the first and after the last voxel hold that voxel's HU, even of one slice."""
    hu = noise((3, 2, 2))
    result = preprocessing.interpolate_axes(hu, (-1.5, 0, 0), (1.5, 1, 1), (5, 2, 2))
    assert np.array_equal(result[[0, 1, 3, 4]], hu[[0, 0, 2, 2]])

    slice_alone = preprocessing.interpolate_axes(hu[:1], (-1, 0, 0), (1, 1, 1), (3, 2, 2))
    assert np.array_equal(slice_alone, hu[[0, 0, 0]])


def test_rule_2_1_1_axes__a_long_axis_takes_two_weights_a_point():
    """Linear in the axis: a full matrix of 200,000 × 250,000 weights would take 373 GiB."""
    assert preprocessing.line_weights(200_000, 0, 0.8, 250_000).nnz <= 500_000


@pytest.mark.parametrize("name", ["oblique", "gantry tilt"])
def test_rule_2_1_1_resample__outside_lies_air(name):
    """A grid point a voxel or more outside an oblique scan is -1000 HU."""
    scan = scan_of(np.full(SHAPE, 40, np.int16), DIRECTIONS[name])
    volume = preprocessing.resample(scan)
    index = index_in(scan, grid_points(volume))
    outside = ((index < -1.001) | (index > LAST_INDEX + 1.001)).any(1)
    assert outside.sum() > 100
    assert (volume.hu.ravel()[outside] == -1000).all()
    assert (volume.hu == 40).sum() > 500


def test_rule_2_1_1_resample__one_point_by_hand(compared):
    """Voxels of 2 mm along x, 0 and 100 HU: 1 mm lies half-way, at 50; so along y and along z, by 200 and by 400."""
    hu = np.array([[[0, 100], [200, 300]], [[400, 500], [600, 700]]])
    volume = preprocessing.resample(scan_of(hu.astype(np.int16), np.eye(3), spacing=(2, 2, 2)))
    points = [volume.hu[0, 0, 1], volume.hu[0, 1, 0], volume.hu[1, 0, 0], volume.hu[1, 1, 1]]
    compared("HU", points, [50, 100, 200, 350])
    assert points == [50, 100, 200, 350]


def test_rule_2_1_1_resample__a_step_of_one_voxel_moves_the_array_by_one():
    """At 1 mm already, the volume is the scan itself, shifted by nothing, its origin too."""
    scan = scan_of(noise(SHAPE), np.eye(3), spacing=(1, 1, 1))
    volume = preprocessing.resample(scan)
    assert np.array_equal(volume.hu, scan.hu)
    assert np.array_equal(volume.origin, ORIGIN)


@pytest.mark.parametrize("name", ["sagittal", "oblique"])
def test_rule_2_1_1_resample__a_part_equals_that_part_of_the_whole(name):
    """A requested region of the grid holds the same voxels, so that a crop moves no nodule."""
    scan = scan_of(noise(SHAPE, float), DIRECTIONS[name])
    whole = preprocessing.resample(scan)
    origin = whole.origin + (2, 3, 1)
    region = preprocessing.resample(scan, origin, (5, 4, 6))
    assert np.abs(region.hu - whole.hu[1:6, 3:7, 2:8]).max() < 1e-6
    assert np.array_equal(region.origin, origin)


@every_direction
def test_rule_2_1_1_resample__reorient_keeps_every_voxels_place(name):
    """Reoriented, each voxel lies where it lay: a mirrored index is n − 1 − i, not n − i."""
    scan = scan_of(np.arange(np.prod(SHAPE)).reshape(SHAPE), DIRECTIONS[name])
    reoriented = preprocessing.reorient(scan)
    # HU are the voxels' numbers, so sorting by them restores the order.
    order = np.argsort(reoriented.hu, axis=None)
    assert np.abs(places(reoriented)[order] - places(scan)).max() < 1e-9


@every_direction
def test_rule_2_1_1_resample__reorient_turns_index_axes_to_the_patients(name):
    """Reoriented, each index axis runs mostly along its own axis of the patient, and forwards."""
    scan = scan_of(np.zeros(SHAPE), DIRECTIONS[name])
    direction = preprocessing.reorient(scan).direction
    assert np.array_equal(np.abs(direction).argmax(0), [0, 1, 2])
    assert (np.diag(direction) > 0).all()


@every_direction
def test_rule_2_1_1_exact_grid__starts_at_the_corner_most_centre(name):
    """The origin is the least x, y and z of the voxels' centres: no voxel lies before the grid."""
    scan = scan_of(np.zeros(SHAPE), DIRECTIONS[name])
    origin, _ = preprocessing.grid(scan)
    assert np.abs(origin - places(scan).min(0)).max() < 1e-9


@every_direction
def test_rule_2_1_1_exact_grid__ends_within_1_mm_before_the_last_voxel(name):
    """Points 1 mm apart never pass the last voxel's centre, and stop less than 1 mm short of it."""
    scan = scan_of(np.zeros(SHAPE), DIRECTIONS[name])
    origin, shape = preprocessing.grid(scan)
    last_point = origin + np.array(shape[::-1]) - 1
    remainder = places(scan).max(0) - last_point
    assert (remainder > -1e-5).all() and (remainder < 1).all()


def ramp_along_z(count, spacing):
    """A scan whose HU are the distance from its first slice in mm."""
    hu = np.zeros((count, 2, 3)) + np.arange(count)[:, None, None] * spacing[2]
    return scan_of(hu, np.eye(3), spacing)


def test_rule_2_1_1_exact_grid__133_slices_of_2_5_mm():
    """132 gaps of 2.5 mm are 330 mm: 331 points; a zoom by 2.5 would give 332."""
    volume = preprocessing.resample(ramp_along_z(133, (0.9, 1.1, 2.5)))
    assert volume.hu.shape == (331, 2, 2)
    assert np.abs(volume.hu[:, 0, 0] - np.arange(331)).max() < 1e-9


def test_rule_2_1_1_exact_grid__no_rounded_zoom():
    """Point k is exactly k mm from the first centre; a zoom would squeeze 10.4 mm into 10 or 11."""
    volume = preprocessing.resample(ramp_along_z(14, (1, 1, 0.8)))
    assert np.abs(volume.hu[:, 0, 0] - np.arange(11)).max() < 1e-9


def test_rule_2_1_1_exact_grid__a_float_just_below_a_whole_number_loses_no_point():
    """100 gaps of 0.29 mm are 28.999999999999996 in floats, 29 mm on the patient: 30 points."""
    assert 0.29 * 100 < 29
    _, shape = preprocessing.grid(scan_of(np.zeros((101, 2, 3)), np.eye(3), (1, 1, 0.29)))
    assert list(shape) == [30, 2, 3]


def test_reorient__keeps_what_reading_ignored():
    """The series' own words stay with the scan, whatever its axes."""
    scan = scan_of(np.zeros(SHAPE), SAGITTAL)._replace(ignored=("scout.dcm: a localizer",))
    assert preprocessing.reorient(scan).ignored == scan.ignored


# 2.1.2 Hounsfield unit normalization

def test_rule_2_1_2_clip__bounds_and_dtype():
    """Air and bone bound HU, what lies between stays, and the dtype is kept."""
    hu = np.array([-32768, -1001, -1000, -999, 0, 399, 400, 401, 32767], np.int16)
    clipped = preprocessing.clip_hu(hu)
    assert clipped.tolist() == [-1000, -1000, -1000, -999, 0, 399, 400, 400, 400]
    assert clipped.dtype == np.int16


def test_eq_2_1_2_normalize__ends_and_middle(compared):
    """−1000 HU → −1, 400 HU → 1, −300 HU, half-way, → 0; water, 0 HU → 3/7."""
    x = preprocessing.normalize(np.array([-1000, 400, -300, 0], np.int16))
    compared("x", x, [-1.0, 1.0, 0.0, 3 / 7])
    assert x.dtype == np.float32
    assert np.abs(x - [-1, 1, 0, 3 / 7]).max() < 2e-7


def test_eq_2_1_2_normalize__clips_before_scaling():
    """What lies outside the range becomes ±1: no overflow, no scaling by the volume's range."""
    x = preprocessing.normalize(np.array([-32768, -2048, -1024, 401, 3071, 32767], np.int16))
    assert np.abs(x - [-1, -1, -1, 1, 1, 1]).max() < 2e-7


def test_eq_2_1_2_normalize__never_leaves_its_range():
    """Every whole HU lands in [-1, 1], rounding included, in steps of 2/1400."""
    x = preprocessing.normalize(np.arange(-1100, 500))
    assert x.min() == -1 and x.max() == 1
    assert np.abs(np.diff(x[100:1501]) - 2 / 1400).max() < 3e-7


def test_eq_2_1_2_denormalize__ends_and_middle():
    """−1 → −1000 HU, 1 → 400 HU, 0 → −300 HU."""
    assert preprocessing.denormalize(np.array([-1, 1, 0])).tolist() == [-1000, 400, -300]


def test_eq_2_1_2_denormalize__is_the_inverse():
    """HU → x → HU gives every whole HU of the range back, to float32's last digits."""
    hu = np.arange(-1000, 401)
    restored = preprocessing.denormalize(preprocessing.normalize(hu))
    assert np.abs(restored - hu).max() < 3e-4


# 2.1.3 Lung segmentation

def ball(radius, shape=None, centre=None):
    """bool: the voxels within `radius` of `centre`, alone or in a volume of `shape`."""
    if shape is None:
        shape = (2 * int(radius) + 1,) * 3
    if centre is None:
        centre = [(n - 1) / 2 for n in shape]
    offsets = np.indices(shape) - np.reshape(centre, (3, 1, 1, 1))
    return (offsets ** 2).sum(0) <= radius ** 2


def blobs(shape):
    """bool: random lumps with gaps and holes of a few voxels, also at the border."""
    return ndimage.gaussian_filter(np.random.default_rng(3).normal(size=shape), 2) > 0.06


@pytest.mark.parametrize("radius", [5, 6, 7])
def test_rule_2_1_3_closing__is_nearly_that_of_a_ball(radius):
    """Dice with a closing by an explicit ball is above 0.99; crosses or cubes alone reach 0.982."""
    # Make a block with a notch and, beside it, a ball.
    mask = np.zeros((5 * radius, 6 * radius, 7 * radius), bool)
    mask[radius:4 * radius, 2 * radius:5 * radius, 2 * radius:5 * radius] = True
    mask[2 * radius:3 * radius, 2 * radius:3 * radius, 2 * radius:5 * radius] = False
    mask |= ball(radius * 0.8, mask.shape, (radius, 1.2 * radius, 5.8 * radius))

    inner = slice(radius, -radius)
    exact = ndimage.binary_closing(np.pad(mask, radius), ball(radius))[inner, inner, inner]
    assert (exact & ~mask).sum() > 300
    assert dice(preprocessing.close_ball(mask, radius), exact) > 0.99


@pytest.mark.parametrize("offset", [
    (1, 0, 0), (0, 1, 0), (0, 0, 1), (0.7071, 0.7071, 0), (0.577, 0.577, -0.577)])
def test_rule_2_1_3_closing__reaches_as_far_in_every_direction(offset):
    """A gap of 1.4 r is filled, one of 2.6 r is not, along axes and diagonals alike."""
    radius = 6
    from_middle = np.indices((53, 55, 57)) - np.reshape([26, 27, 28], (3, 1, 1, 1))
    distance = np.abs((from_middle * np.reshape(offset, (3, 1, 1, 1))).sum(0))
    for gap, filled in ((1.4 * radius, True), (2.6 * radius, False)):
        walls = distance > gap / 2
        assert preprocessing.close_ball(walls, radius)[26, 27, 28] == filled


def test_rule_2_1_3_closing__fills_a_small_hole_and_not_a_far_bigger():
    """A hole of radius 0.7 r goes, one of 2 r stays open in its middle."""
    for radius, filled in ((4, True), (12, False)):
        mask = ~ball(radius, (41, 43, 45), (20, 21, 22))
        assert preprocessing.close_ball(mask, 6)[20, 21, 22] == filled


def test_rule_2_1_3_closing__takes_nothing_away():
    """M ⊆ closing of M, at the border of the array too."""
    mask = blobs((24, 27, 31))
    assert mask[0].any() and mask[:, :, -1].any()
    assert preprocessing.close_ball(mask, 4)[mask].all()


def test_rule_2_1_3_closing__closing_again_changes_nothing():
    """A closing is idempotent, which it is only where ⊕ and ⊖ take the same element."""
    closed = preprocessing.close_ball(np.pad(blobs((16, 17, 19)), 9), 4)
    assert np.array_equal(preprocessing.close_ball(closed, 4), closed)


@pytest.fixture(scope="module", params=[0, 2, 4], ids=["straight", "turned", "oblique"])
def chest(request):
    """A coarse phantom at 2 mm, all (z, y, x): .hu, .mask (ours), .truth.

    .body is each voxel's place (x, y, z) in the standard body: (3, z, y, x).
    """
    made = phantom.make_phantom(request.param, scale=2.5)
    scan = scan_of(preprocessing.clip_hu(made.hu), made.direction, made.spacing, made.origin)
    hu, mask = preprocessing.coarse_lungs(scan)
    points = (mask.origin + indices(mask.hu.shape) @ (mask.direction * mask.spacing).T)
    points = points.astype(np.float32)

    # Take the truth at the same points.
    index = index_in(scan, points)[:, ::-1].T
    lungs = made.lungs.astype(np.float32)
    truth = ndimage.map_coordinates(lungs, index, order=1).reshape(mask.hu.shape) > 0.5

    person = phantom.make_person(np.random.default_rng([0, request.param, 1]))
    body = ((points - person.position) / person.size).T.reshape(3, *mask.hu.shape)
    return SimpleNamespace(hu=hu.hu, mask=mask.hu, truth=truth, body=body)


def test_rule_2_1_3_lungs__voxels_are_1_mm_unless_said():
    """A notch of 12 voxels closes under the 10 mm ball; at 2 mm it is 24 mm wide, and stays."""
    hu = box((60, 60, 60), ((8, 8, 8), (52, 52, 52)), outside=0)
    hu[8:20, 24:36, 24:36] = 0
    assert preprocessing.lung_mask(hu)[12, 30, 30]
    assert not preprocessing.lung_mask(hu, 2)[12, 30, 30]


def test_rule_2_1_3_lungs__the_erosion_is_of_2_mm_at_2_mm_too():
    """Air of four voxels outlives an erosion of one voxel from each side, not one of two."""
    hu = box((40, 40, 40), ((5, 18, 5), (35, 22, 35)), outside=0)
    assert preprocessing.lung_mask(hu, 2)[20, 19, 20]


def test_rule_2_1_3_lungs__what_the_erosion_took_comes_back_and_one_voxel_more():
    """The dilation reaches three steps: two voxels of a face, and at an edge, where faces meet,
    what lies three steps from what was left, not four.
    """
    hu = box((50, 50, 50), ((10, 10, 10), (40, 40, 40)), outside=0)
    lungs = preprocessing.lung_mask(hu)
    assert lungs[10, 25, 25] and lungs[11, 10, 25]
    assert not lungs[10, 10, 25] and not lungs[9, 25, 25]


@pytest.mark.parametrize("face", [
    np.s_[:, :2, 5:-5], np.s_[:, -2:, 5:-5], np.s_[:, 5:-5, :2], np.s_[:, 5:-5, -2:]])
def test_rule_2_1_3_lungs__air_at_any_side_of_the_field_of_view_is_the_rooms(face):
    """The larger of two airs, two voxels thick at one of the four sides, is not the lung."""
    hu = box((60, 60, 60), ((20, 20, 20), (35, 35, 35)), outside=0)
    hu[face] = -1000
    lungs = preprocessing.lung_mask(hu, 2)
    assert lungs[27, 27, 27] and not lungs[face].any()


@pytest.mark.parametrize("depth, both", [(12, True), (11, False)])
def test_rule_2_1_3_lungs__two_where_the_second_has_a_quarter(depth, both):
    """Eroded by a voxel, 20 × 20 × 20 and 20 × 10 × 10 are lungs; 20 × 10 × 9 is too little."""
    first = ((5, 5, 5), (27, 27, 27))
    second = ((5, 40, 40), (27, 52, 40 + depth))
    lungs = preprocessing.lung_mask(box((60, 60, 60), first, second, outside=0), 2)
    assert lungs[15, 15, 15]
    assert lungs[15, 45, 45] == both


def test_rule_2_1_3_lungs__dice_with_the_truth(chest):
    """Dice of mask and truth, all inside the pleura, is above 0.95, in every direction."""
    assert dice(chest.mask, chest.truth) > 0.95


def test_rule_2_1_3_lungs__holds_no_room(chest):
    """The room's air, beyond the skin, is no lung, though it is the largest air there is."""
    x, y, _ = chest.body
    room = (chest.hu < -500) & ((np.abs(x) > 190) | (y < -130))
    assert room.sum() > 1000
    assert not chest.mask[room].any()


def test_rule_2_1_3_lungs__holds_no_table(chest):
    """The couch, foam in a shell at the back of the skin (y = 116), is no lung."""
    _, y, _ = chest.body
    table = (chest.hu < -500) & (y > 117)
    assert table.sum() > 1000
    assert not chest.mask[table].any()


def test_rule_2_1_3_lungs__holds_no_air_of_the_stomach(chest):
    """The gas under the left diaphragm, a wall's breadth from the lung, is no lung."""
    x, y, z = chest.body
    stomach = ((x - 70) / 34) ** 2 + ((y + 24) / 34) ** 2 + ((z + 122) / 26) ** 2 < 1
    gas = (chest.hu < -500) & stomach & (y < -38)
    assert gas.sum() > 500
    assert not chest.mask[gas].any()


def test_rule_2_1_3_lungs__vessels_and_nodules_inside_are_taken_in(chest):
    """What is dense within the lungs, from 6 mm below the pleura on, belongs to the mask."""
    inside = ndimage.binary_erosion(chest.truth, iterations=3) & (chest.hu > -500)
    assert inside.sum() > 100
    assert chest.mask[inside].mean() > 0.95


def test_rule_2_1_3_lungs__a_single_voxel_left_by_the_erosion_is_a_component():
    """At 2 mm the erosion leaves the middle of 3³ voxels of air, and the mask is not empty."""
    hu = box((11, 12, 13), ((4, 4, 5), (7, 7, 8)))
    assert preprocessing.lung_mask(hu, 2)[5, 5, 6]


@pytest.mark.parametrize("thickness, taken", [(10, True), (5, False)])
def test_rule_2_1_3_lungs__a_second_component_counts_from_a_quarter_on(thickness, taken):
    """Of lungs that do not touch, a second of 10/24 of the first is taken, one of 5/24 is not."""
    first = ((15, 15, 8), (39, 39, 32))
    second = ((15, 15, 55), (39, 39, 55 + thickness))
    mask = preprocessing.lung_mask(box((60, 60, 90), first, second))
    assert mask[27, 27, 20]
    assert mask[27, 27, 57] == taken


def test_rule_2_1_3_lungs__a_third_component_is_not_taken():
    """Two lungs at most: of three the smallest stays out, though it has more than a quarter."""
    largest = ((13, 13, 5), (37, 37, 29))
    middle = ((13, 13, 45), (37, 37, 67))
    smallest = ((13, 13, 83), (37, 37, 103))
    mask = preprocessing.lung_mask(box((50, 50, 110), largest, middle, smallest))
    assert mask[25, 25, 17] and mask[25, 25, 56] and not mask[25, 25, 93]


def test_rule_2_1_3_lungs__keeps_the_outline_of_a_lone_lung():
    """A convex lung comes back voxel for voxel: the dilation restores what the erosion took."""
    hu = np.where(ball(15.3, (45, 47, 49), (22, 23, 24)), -850, 40)
    assert np.array_equal(preprocessing.lung_mask(hu), hu == -850)


def test_rule_2_1_3_lungs__below_minus_500_alone_is_air():
    """-501 HU is air, -500 HU is not."""
    corners = ((10, 10, 10), (30, 30, 30))
    assert preprocessing.lung_mask(box((40, 41, 42), corners, inside=-501))[20, 20, 20]
    assert not preprocessing.lung_mask(box((40, 41, 42), corners, inside=-500)).any()


@pytest.mark.parametrize("face", [np.s_[:, :6], np.s_[:, -6:], np.s_[:, :, :6], np.s_[:, :, -6:]])
def test_rule_2_1_3_lungs__air_at_the_axial_border_is_the_room(face):
    """Air that reaches any of the four sides of the field of view is dropped, however large."""
    hu = box((40, 60, 60), ((10, 20, 20), (30, 40, 40)))
    hu[face] = -1000
    mask = preprocessing.lung_mask(hu)
    assert mask[20, 30, 30] and not mask[face].any()


def test_rule_2_1_3_lungs__air_at_the_first_and_last_slice_may_be_lung():
    """Lungs that the scan cuts at head or foot are still lungs: the room is at the sides only."""
    hu = box((24, 50, 52), ((0, 14, 14), (24, 36, 38)))
    assert preprocessing.lung_mask(hu)[[0, 12, 23], 25, 26].all()


def test_rule_2_1_3_lungs__a_hole_too_big_for_the_closing_is_filled():
    """A mass with lung all round it, 28 mm across, belongs to the lung."""
    hu = box((70, 72, 74), ((10, 10, 10), (60, 62, 64)))
    hu[ball(14, hu.shape, (35, 36, 37))] = 40
    assert preprocessing.lung_mask(hu)[35, 36, 37]


def test_rule_2_1_3_lungs__a_wall_of_3_mm_parts_lung_from_gas():
    """Gas beside a lung, joined to it by a thread of noise through a thin wall, stays out."""
    hu = box((50, 60, 60), ((10, 10, 10), (40, 40, 40)), ((12, 43, 12), (20, 50, 20)))
    hu[15, 40:43, 15] = -850
    mask = preprocessing.lung_mask(hu)
    assert mask[25, 25, 25] and not mask[12:20, 46:50, 12:20].any()


@pytest.mark.parametrize("hu", [-1000, 40], ids=["air", "tissue"])
def test_rule_2_1_3_lungs__no_lung_gives_an_empty_mask(hu):
    """A volume of nothing but air, or without any, has no lungs: all False, no exception."""
    mask = preprocessing.lung_mask(np.full((8, 9, 10), hu, np.int16))
    assert mask.shape == (8, 9, 10) and mask.dtype == bool
    assert not mask.any()


def test_rule_2_1_3_lungs__are_sought_at_every_second_point_of_the_grid():
    """The 2 mm grid of the mask is every second point of the 1 mm grid."""
    scan = scan_of(noise(SHAPE), np.eye(3))
    coarse, _ = preprocessing.coarse_lungs(scan)
    whole = preprocessing.resample(scan)
    assert np.array_equal(coarse.hu, whole.hu[::2, ::2, ::2])
    assert np.array_equal(coarse.origin, whole.origin)


# 2.1.4 Positive and negative cube samples

def test_num_2_1_4_cube__48_voxels():
    """2.1.4: all cubes are 48×48×48 voxels."""
    assert THESIS["cube"] == 48
    volume = Volume(noise((5, 6, 7)), np.zeros(3))
    assert preprocessing.crop_cube(volume, (0, 0, 0), 48).shape == (48, 48, 48)


def test_num_2_1_4_negatives__of_table_1():
    """Table 1 holds 581,130 negatives of 888 scans: 655 per scan, rounded up."""
    negatives = 406791 + 58113 + 116226
    assert negatives == 581130
    assert THESIS["negatives"] == 655
    assert 654 < negatives / 888 <= 655


def test_num_2_slices__2_5_mm():
    """2: LUNA16 keeps scans with slices of 2.5 mm at most."""
    assert THESIS["max_slice_mm"] == 2.5


@pytest.mark.parametrize("side", [6, 7])
def test_rule_2_1_4_centre__is_the_nearest_grid_point(side):
    """Voxel side // 2 of the cube is the grid point nearest to the annotation."""
    volume = Volume(noise((21, 23, 26)), np.array([-30.25, 12.5, -200.75]))
    rng = np.random.default_rng(1)
    middle = (side // 2, side // 2, side // 2)
    for centre in volume.origin + rng.uniform(5, 15, (20, 3)):
        nearest = ((grid_points(volume) - centre) ** 2).sum(1).argmin()
        cube = preprocessing.crop_cube(volume, centre, side)
        assert cube.shape == (side, side, side)
        assert cube[middle] == volume.hu.ravel()[nearest]


def test_rule_2_1_4_centre__takes_xyz_and_gives_zyx():
    """Millimetres (x, y, z) become an index (z, y, x), for one centre and for many."""
    origin = np.array([10, 20, 30])
    assert preprocessing.nearest_voxel(origin, (11, 24, 39)).tolist() == [9, 4, 1]
    voxels = preprocessing.nearest_voxel(origin, [(11, 24, 39), (9.6, 20.4, 30)])
    assert voxels.tolist() == [[9, 4, 1], [0, 0, 0]]


def test_rule_2_1_4_centre__neighbours_keep_their_order():
    """The cube is the volume's own voxels around the centre, no axis turned or swapped."""
    volume = Volume(noise((21, 23, 26)), np.zeros(3))
    cube = preprocessing.crop_cube(volume, (12, 11, 10), 6)
    assert np.array_equal(cube, volume.hu[7:13, 8:14, 9:15])


@pytest.mark.parametrize("voxel", [
    (0, 10, 10), (12, 10, 10), (6, 0, 10), (6, 14, 10), (6, 10, 0), (6, 10, 17),
    (0, 0, 0), (12, 14, 17), (-2, 10, 19)])
@pytest.mark.parametrize("side", [6, 7])
def test_rule_2_1_4_padding__pads_and_never_shifts(voxel, side):
    """At each border, and past it, the cube is that of the volume in endless air."""
    hu = noise((13, 15, 18))
    margin = 20
    in_air = np.pad(hu, margin, constant_values=-1000)
    z, y, x = np.array(voxel) + margin - side // 2
    expected = in_air[z:z + side, y:y + side, x:x + side]

    cube = preprocessing.cut(hu, voxel, side)
    assert np.array_equal(cube, expected)
    assert cube.dtype == hu.dtype


def test_rule_2_1_4_padding__a_cube_larger_than_the_volume_holds_it_once():
    """A volume smaller than the cube is padded on every side at once."""
    hu = noise((3, 4, 5))
    cube = preprocessing.cut(hu, (1, 2, 2), 12)
    assert np.array_equal(cube[5:8, 4:8, 4:9], hu)


@pytest.mark.parametrize("centre", [(-500, 0, 0), (0, 500, 0), (0, 0, -500), (500, 500, 500)])
def test_rule_2_1_4_padding__far_outside_lies_air(centre):
    """A centre far outside gives a cube of -1000 HU, no exception and no voxels of the border."""
    volume = Volume(noise((13, 15, 18)), np.zeros(3))
    assert (preprocessing.crop_cube(volume, centre, 6) == -1000).all()


def distances(voxels, side, centre):
    """From a point to the nearest voxel box of each cube: (n,), over every voxel of every cube."""
    offsets = np.array(list(itertools.product(range(side), repeat=3))) - side // 2
    gaps = np.abs(voxels[:, None] + offsets - np.asarray(centre)) - 0.5
    return np.sqrt((np.maximum(gaps, 0) ** 2).sum(2).min(1))


@pytest.mark.parametrize("centre, radius", [
    ((0.3, -1.2, 2.6), 4.2), ((0, 0, 0), 1.5), ((3.5, 0.1, -2.2), 7)])
@pytest.mark.parametrize("side", [4, 5])
def test_rule_2_1_4_negatives__meets_sphere_against_brute_force(side, centre, radius):
    """Cube and sphere meet where the nearest box of the cube's voxels is nearer than the radius."""
    voxels = np.random.default_rng(2).integers(-12, 12, (3000, 3))
    expected = distances(voxels, side, centre) < radius
    assert 0.01 < expected.mean() < 0.9
    assert np.array_equal(preprocessing.meets_sphere(voxels, side, centre, radius), expected)


# A mask's voxels of 2 mm, and nodules (centre, radius): all in voxels (z, y, x) of the 1 mm grid.
LUNGS = np.argwhere(np.ones((20, 24, 30), bool)) * 2.0 + (30, 40, 50)
SPHERES = [((45.4, 60.3, 70.2), 6.0), ((60.0, 50.7, 90.1), 3.3), ((35.2, 80.5, 100.9), 10.4)]


def draw_negatives(count, lungs=LUNGS, spheres=()):
    """Centres of cubes of 6 voxels, from a fresh random stream."""
    return preprocessing.draw_negatives(lungs, spheres, 6, count, np.random.default_rng(0))


def test_rule_2_1_4_negatives__no_draw_meets_a_nodule():
    """Of 10,000 cubes none comes nearer to a nodule's centre than its radius, by voxel boxes.

    Nor is any kept farther away than it must be.
    """
    drawn = draw_negatives(10000, spheres=SPHERES)
    assert drawn.shape == (10000, 3) and drawn.dtype.kind == "i"
    clearances = [distances(drawn, 6, centre).min() - radius for centre, radius in SPHERES]
    assert min(clearances) >= 0 and max(clearances) < 1


def test_rule_2_1_4_negatives__memory_is_that_of_what_is_wanted():
    """100,000 centres are 2.4 MB: only a handful of arrays of that size are held at a time."""
    tracemalloc.start()
    drawn = draw_negatives(100_000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert drawn.nbytes == 2_400_000
    assert peak < 10 * drawn.nbytes


def share_by_octant(points):
    """The share of points (n, 3) in each of eight octants around the middle of LUNGS."""
    # 1e-9 puts a point on the border on the same side, whatever its rounding.
    octants = (points + 1e-9 >= (50, 64, 80)) @ [4, 2, 1]
    return np.bincount(octants, minlength=8) / len(points)


def test_rule_2_1_4_negatives__uniform_over_the_lungs():
    """Each octant of unequal lungs has its share of 10,000 draws, within 5 standard deviations."""
    # Cut a corner off the lungs, so that the octants' shares differ.
    lungs = LUNGS[(LUNGS[:, 0] < 50) | (LUNGS[:, 1] < 60)]
    expected = share_by_octant(lungs)
    assert np.ptp(expected) > 0.05

    share = share_by_octant(draw_negatives(10000, lungs) + 0.5)
    deviation = np.sqrt(1 / 4 / 10000)
    assert np.abs(share - expected).max() < 5 * deviation


def test_rule_2_1_4_negatives__every_voxel_of_1_mm_can_be_drawn():
    """Odd and even voxels come equally often, though the mask's are 2 mm apart."""
    odd = draw_negatives(10000, LUNGS + 0.3) % 2
    deviation = np.sqrt(1 / 4 / 10000)
    assert np.abs(odd.mean(0) - 0.5).max() < 5 * deviation


def test_rule_2_1_4_negatives__stays_within_a_voxel_of_the_mask():
    """A draw lies in a mask's voxel of 2 mm, so 1 mm at most from its centre before rounding."""
    drawn = draw_negatives(5000)
    assert (drawn.min(0) == LUNGS.min(0) - 1).all()
    assert (drawn.max(0) == LUNGS.max(0) + 1).all()


def test_rule_2_1_4_negatives__fewer_where_impossible():
    """Where a nodule fills the lungs there are none, and the search ends."""
    assert draw_negatives(10, spheres=[((50, 64, 80), 90.0)]).shape == (0, 3)


def test_rule_2_1_4_negatives__found_where_they_are_rare():
    """Where one place in thirty is free, the requested number is still reached."""
    centre = (50, 64, 80)
    drawn = draw_negatives(200, spheres=[(centre, 32.0)])
    assert len(drawn) == 200
    assert (distances(drawn, 6, centre) >= 32).all()


# 2.1.5 Train / validation / test split

def split_sizes(patients, seed):
    """The number of patients in train, validation and test."""
    splits = list(preprocessing.split_patients(patients, seed).values())
    return [splits.count(name) for name in ("train", "validation", "test")]


def test_rule_2_1_5_split__70_10_20_of_100_patients():
    """100 patients are divided into 70, 10 and 20, each patient in one split."""
    assert split_sizes([f"P{i}" for i in range(100)], 0) == [70, 10, 20]


def test_rule_2_1_5_split__shares_are_those_of_the_thesis():
    """70%, 10% and 20%, the whole of the data."""
    assert preprocessing.SPLITS == {"train": 0.7, "validation": 0.1, "test": 0.2}


@pytest.mark.parametrize("count", [3, 4, 7])
def test_rule_2_1_5_split__one_each_of_few(count):
    """However few patients, three at least, no split is empty, and training has the most."""
    sizes = split_sizes([str(i) for i in range(count)], 1)
    assert min(sizes) >= 1
    assert sizes[0] == max(sizes)


def test_rule_2_1_5_split__two_patients_are_refused():
    """Of two patients there are no three splits, however many scans they have."""
    with pytest.raises(Refusal, match="2 patients can be used — give more scans"):
        preprocessing.split_patients(["a", "b", "a", "b"], 0)


def test_rule_2_1_5_split__a_patients_scans_count_once():
    """A patient with many scans is one patient of the shares."""
    patients = [f"P{i}" for i in range(10)]
    repeated = patients + ["P3"] * 50
    split = preprocessing.split_patients(patients, 0)
    assert preprocessing.split_patients(repeated, 0) == split


@pytest.mark.parametrize("seed", range(5))
def test_rule_2_1_5_split__a_patients_scans_stay_together(seed):
    """Each patient's scans are all in one split: no test patient was seen in training."""
    records = [{"seriesuid": f"S{patient}.{scan}", "patient": f"P{patient}"}
               for patient in range(20) for scan in range(2)]

    splits_of = {}
    for record in preprocessing.split_records(records, seed):
        splits_of.setdefault(record["patient"], set()).add(record["split"])

    assert len(splits_of) == 20
    assert all(len(splits) == 1 for splits in splits_of.values())


def test_rule_2_1_5_split__drawn_from_the_seed():
    """A seed gives one split, in whatever order the scans come; a different seed another."""
    patients = [f"P{i}" for i in range(30)]
    split = preprocessing.split_patients(patients, 5)
    assert preprocessing.split_patients(patients[::-1], 5) == split
    assert preprocessing.split_patients(patients, 6) != split


def test_rule_2_1_5_split__every_patient_may_come_into_any():
    """Over 200 seeds each patient is in test a fifth of the time: the order does not show."""
    patients = [f"P{i}" for i in range(20)]
    times_in_test = dict.fromkeys(patients, 0)
    for seed in range(200):
        for patient, split in preprocessing.split_patients(patients, seed).items():
            times_in_test[patient] += split == "test"

    deviation = np.sqrt(200 * 0.2 * 0.8)
    assert np.abs(np.array(list(times_in_test.values())) - 40).max() < 5 * deviation


def counts_of_parts(count):
    """How many of `count` cubes each split has."""
    parts = preprocessing.split_cubes(count, lungaug.stream(0))
    return [len(parts[split]) for split in ("train", "validation", "test")]


def test_rule_2_1_5_split_cubes__has_the_counts_of_the_thesis_own_tables():
    """8,160 and 581,130 are cut as in its Tables 2–5: the test sets are one larger than in Table 1."""
    assert counts_of_parts(8160) == [5712, 815, 1633]
    assert counts_of_parts(581130) == [406791, 58112, 116227]
    assert [row[0] for row in preprocessing.TABLE_1.values()] == [5712, 816, 1632]


@pytest.mark.parametrize("count", [0, 1, 7, 8, 100])
def test_rule_2_1_5_split_cubes__each_cube_is_in_one_part(count):
    """No cube is lost, none is in two parts, and each part is in rising order."""
    parts = preprocessing.split_cubes(count, lungaug.stream(3))
    assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(count))
    for numbers in parts.values():
        assert np.array_equal(numbers, np.sort(numbers))


def test_rule_2_1_5_split_cubes__by_position_in_the_shuffled_row():
    """The first seven tenths of the row train, the next tenth validates, the rest tests."""
    row = np.random.default_rng(4).permutation(40).tolist()
    parts = preprocessing.split_cubes(40, np.random.default_rng(4))
    assert set(parts["train"]) == set(row[:28])
    assert set(parts["validation"]) == set(row[28:31])      # 0.7 + 0.1 is below 0.8
    assert set(parts["test"]) == set(row[31:])


def three_scans(nodules=(2, 0, 3), negatives=10):
    """Records of scans without a split, each cube at a place of its own."""
    scans = []
    place = 0
    for number, count in enumerate(nodules):
        voxels = [[place + i, 5, 6] for i in range(count + negatives)]
        place += count + negatives
        scans.append({"seriesuid": f"1.{number}", "positives": voxels[:count], "negatives": voxels[count:]})
    return scans


def cube_dataset(scans, seed=0):
    """The Dataset of these records, split by cube."""
    positives, negatives, flips = preprocessing.split_rows(scans, {"split": "cube", "seed": seed})
    info = {"scans": scans, "parameters": {"split": "cube", "seed": seed}}
    return preprocessing.Dataset(None, info, 12, positives, negatives, 0, flips)


def flipped_cubes(dataset, split):
    """Every positive of a split as (scan, z, y, x, flip)."""
    rows, flips = preprocessing.positives_with_flips(dataset, split)
    return [(*row, number) for row, number in zip(rows.tolist(), flips.tolist())]


def test_rule_2_1_5_split_cubes__every_flip_is_in_one_split_and_nodules_in_several():
    """The eight flips of five nodules are 40 cubes; the test set shares nodules with the training set."""
    dataset = cube_dataset(three_scans())
    of_split = {split: flipped_cubes(dataset, split) for split in preprocessing.SPLITS}
    expected = [(scan, *voxel, number) for scan, record in enumerate(three_scans())
                for voxel in record["positives"] for number in range(8)]
    assert sorted(sum(of_split.values(), [])) == expected
    assert [len(cubes) for cubes in of_split.values()] == [28, 3, 9]

    nodules = {split: {cube[:4] for cube in cubes} for split, cubes in of_split.items()}
    assert nodules["train"] & nodules["test"]
    for split, rows in dataset.positives.items():
        assert len(rows) == len(nodules[split])
        assert set(map(tuple, rows.tolist())) == nodules[split]


def test_rule_2_1_5_split_cubes__negatives_likewise():
    """Each of the 30 negatives is in one split: 21, 2 and 7; one scan has them in several."""
    dataset = cube_dataset(three_scans(negatives=10))
    rows = {split: list(map(tuple, part.tolist())) for split, part in dataset.negatives.items()}
    assert [len(part) for part in rows.values()] == [21, 2, 7]
    assert len(set(sum(rows.values(), []))) == 30
    assert {row[0] for row in rows["train"]} & {row[0] for row in rows["test"]}


def test_rule_2_1_5_split_cubes__each_class_is_shuffled_on_its_own():
    """40 flips of five nodules and 40 negatives do not come into the test set by the same numbers."""
    dataset = cube_dataset(three_scans(nodules=(5, 0, 0), negatives=40)[:1])
    positives = [8 * z + number for _, z, _, _, number in flipped_cubes(dataset, "test")]
    negatives = [z - 5 for _, z, _, _ in dataset.negatives["test"].tolist()]
    assert len(positives) == len(negatives) == 9
    assert positives != negatives


def test_rule_2_1_5_split_cubes__follows_from_the_seed():
    """One seed gives one split, another seed another."""
    scans = three_scans()
    assert flipped_cubes(cube_dataset(scans), "test") == flipped_cubes(cube_dataset(scans), "test")
    assert flipped_cubes(cube_dataset(scans), "test") != flipped_cubes(cube_dataset(scans, seed=1), "test")


def test_rule_2_1_5_split_cubes__a_nodules_first_flip_in_the_split():
    """Pictures and distances take a flip that is in the split, not the cube as it is."""
    dataset = cube_dataset(three_scans())
    cubes = flipped_cubes(dataset, "test")
    first = [min(number for *nodule, number in cubes if nodule == row) for row in dataset.positives["test"].tolist()]
    assert preprocessing.first_flips(dataset, "test").tolist() == first
    assert max(first) > 0


def test_first_flips__none_where_each_nodule_has_all_eight(dataset):
    """A split by patient takes the cubes as they are."""
    assert preprocessing.first_flips(dataset, "train").tolist() == [0, 0]


def test_positives_with_flips__all_eight_of_each_where_patients_are_split(dataset):
    """The same as with_flips, in its order."""
    rows, flips = preprocessing.positives_with_flips(dataset, "train")
    expected_rows, expected_flips = preprocessing.with_flips(dataset.positives["train"])
    assert np.array_equal(rows, expected_rows) and np.array_equal(flips, expected_flips)


@pytest.mark.parametrize("split", preprocessing.SPLITS)
def test_labelled__of_a_cube_split_scores_the_flips_that_lie_in_it(split):
    """Positives are those of positives_with_flips, then each negative once, unflipped."""
    dataset = cube_dataset(three_scans())
    rows, flips, labels = preprocessing.labelled(dataset, split)
    positives, positive_flips = preprocessing.positives_with_flips(dataset, split)
    assert np.array_equal(rows[labels == 1], positives)
    assert np.array_equal(flips[labels == 1], positive_flips)
    assert np.array_equal(rows[labels == 0], dataset.negatives[split])
    assert not flips[labels == 0].any()


FOLDERS = [
    (PurePosixPath("LUNA16/subset3/1.2.mhd"), 3),
    (PurePosixPath("/data/LUNA16/subset9/subset9/1.2.mhd"), 9),
    (PurePosixPath("subset1/more/subset7/deep/1.2.mhd"), 7),
    (PurePosixPath("LUNA16/Subset0/1.2/000.dcm"), 0),
    (PureWindowsPath(r"D:\LUNA16\subset8\1.2.mhd"), 8),
    (PurePosixPath("LUNA16/subset10/1.2.mhd"), None),
    (PurePosixPath("LUNA16/subset/1.2.mhd"), None),
    (PurePosixPath("LUNA16/my subset1/1.2.mhd"), None),
    (PurePosixPath("LUNA16/subset4.mhd"), None),
    (PurePosixPath("1.2.mhd"), None),
]


@pytest.mark.parametrize("path, number", FOLDERS, ids=str)
def test_rule_2_1_5_split_subsets__the_innermost_folder_counts(path, number):
    """At any depth, on any system, in any case of letters; a name that only looks alike is none."""
    assert preprocessing.subset_of(path) == number


def test_rule_2_1_5_split_subsets__seven_train_one_validates_two_test():
    """subset0 to 6, subset7, subset8 and 9; each record is otherwise as it was."""
    records = [{"seriesuid": f"1.{number}", "patient": "P"} for number in range(10)]
    paths = {f"1.{number}": Path(f"LUNA16/subset{number}/1.{number}.mhd") for number in range(10)}
    scans = preprocessing.split_by_subset(records, paths)
    assert [scan["split"] for scan in scans] == ["train"] * 7 + ["validation"] + ["test"] * 2
    assert [{"seriesuid": scan["seriesuid"], "patient": scan["patient"]} for scan in scans] == records


def test_rule_2_1_5_split_subsets__a_scan_in_none_is_refused():
    """The line names its file."""
    paths = {"1.0": Path("LUNA16/subset0/1.0.mhd"), "1.1": Path("LUNA16/other/1.1.mhd")}
    records = [{"seriesuid": uid} for uid in paths]
    refused(lambda: preprocessing.split_by_subset(records, paths), "other/1.1.mhd", "in no folder subset0")


@pytest.mark.parametrize("numbers, says", [
    ((7, 8, 9), "subset0, subset1, subset2, subset3, subset4, subset5, subset6: the train set"),
    ((0, 9), "in subset7: the validation set"),
    ((6, 7), "in subset8, subset9: the test set"),
    ((), "the train set"),
])
def test_rule_2_1_5_split_subsets__an_empty_split_is_refused(numbers, says):
    """The line names the folders that are missing."""
    paths = [Path(f"LUNA16/subset{number}/1.mhd") for number in numbers]
    refused(lambda: preprocessing.check_subsets(paths, "LUNA16"), "LUNA16", says, "--split patient")


@pytest.mark.parametrize("numbers", [(0, 7, 8), (6, 7, 9)])
def test_rule_2_1_5_split_subsets__one_folder_each_will_do(numbers):
    """No split is empty, and nothing is said."""
    preprocessing.check_subsets([Path(f"LUNA16/subset{number}/1.mhd") for number in numbers], "LUNA16")


# 2.1.6 Conventional data augmentation

CUBE = np.arange(24).reshape(2, 3, 4)


@pytest.mark.parametrize("flips, expected", [
    ((True, False, False), CUBE[::-1]),
    ((False, True, False), CUBE[:, ::-1]),
    ((False, False, True), CUBE[:, :, ::-1]),
    ((False, False, False), CUBE),
    ((True, False, True), CUBE[::-1, :, ::-1]),
])
def test_rule_2_1_6_flip__mirrors_the_named_axes_alone(flips, expected):
    """The flags are along z, y, x, and an unnamed axis stays."""
    assert np.array_equal(preprocessing.flip(CUBE, flips), expected)


def test_rule_2_1_6_flip__twice_is_none():
    """Each flip is its own inverse."""
    for flips in preprocessing.FLIPS:
        flipped = preprocessing.flip(CUBE, flips)
        assert np.array_equal(preprocessing.flip(flipped, flips), CUBE)


def test_rule_2_1_6_all_flips__eight_distinct_the_first_the_cube_itself():
    """2³ mirror images along z, y, x, no two alike, the first unflipped."""
    cube = noise((5, 5, 5))
    expected = [cube[::z, ::y, ::x] for z, y, x in itertools.product((1, -1), repeat=3)]
    assert np.array_equal(expected[0], cube)
    assert np.array_equal(preprocessing.all_flips(cube), expected)
    assert len({image.tobytes() for image in expected}) == 8


def test_rule_2_1_6_all_flips__with_flips_gives_each_row_each_flip_once():
    """n rows become 8n, every pair of a row and a flip once, a row's eight together."""
    rows, flips = preprocessing.with_flips(np.array([[0, 5, 6, 7], [3, 2, 1, 0]]))
    assert rows.tolist() == [[0, 5, 6, 7]] * 8 + [[3, 2, 1, 0]] * 8
    assert flips.tolist() == [*range(8), *range(8)]


# The prepared data, as the other stages read them

def test_read_cubes__are_normalize_of_flip_of_cut(dataset):
    """(n, 1, c, c, c) float32, each the cut at its row, flipped by its own flip, then scaled."""
    rows = np.array([(0, 10, 12, 14), (1, 3, 20, 9), (0, 3, 20, 9)])
    flips = np.array([0, 3, 6])
    cubes = preprocessing.read_cubes(dataset, rows, flips)
    assert cubes.shape == (3, 1, 12, 12, 12) and cubes.dtype == np.float32

    for cube, (scan, *voxel), number in zip(cubes, rows, flips):
        hu = preprocessing.cut(np.load(dataset.folder / f"{scan}.npy"), voxel, 12)
        flipped = preprocessing.all_flips(hu)[number]
        assert np.array_equal(cube[0], preprocessing.normalize(flipped))


def test_labelled__positives_in_all_flips_then_negatives_in_none(dataset):
    """Each positive is scored eight times, label 1, then each negative once, unflipped, label 0."""
    rows, flips, labels = preprocessing.labelled(dataset, "train")
    assert labels.tolist() == [1] * 16 + [0] * 2
    assert flips.tolist() == [*range(8), *range(8), 0, 0]
    assert np.array_equal(rows[labels == 1], dataset.positives["train"].repeat(8, axis=0))
    assert np.array_equal(rows[labels == 0], dataset.negatives["train"])


def test_read_cubes__are_as_they_are_without_flips(dataset):
    """No flips named means none made."""
    rows = dataset.positives["train"]
    unflipped = preprocessing.read_cubes(dataset, rows, np.zeros(2, int))
    assert np.array_equal(preprocessing.read_cubes(dataset, rows), unflipped)


# Table 1

def test_num_table_1__thesis_cut_cubes_at_exactly_70_10_20():
    """The erratum: Table 1 is exactly 70, 10 and 20% of all cubes, so cubes were divided.

    They are 1,020 × 8 positives and 581,130 negatives.
    """
    for split, tenths in (("train", 7), ("validation", 1), ("test", 2)):
        positive, negative = preprocessing.TABLE_1[split]
        assert 10 * positive == tenths * 1020 * 8
        assert 10 * negative == tenths * 581130


def test_num_table_1__of_split_cubes_counts_the_flips_that_are_there():
    """40 flips of five nodules in 28, 3 and 9; a nodule counts in each split that has flips of it."""
    table = preprocessing.table_1(three_scans(), {"split": "cube", "seed": 0})
    assert [row["positive"] for row in table.values()] == [28, 3, 9]
    assert [row["negative"] for row in table.values()] == [21, 2, 7]
    assert table["train"]["nodules"] == 5 and sum(row["nodules"] for row in table.values()) > 5


def test_num_table_1__erratum_its_tables_cut_cubes_by_a_sum_below_four_fifths():
    """0.7 + 0.1 is below 0.8 in floating point: one more positive and one more negative are test cubes."""
    assert 0.7 + 0.1 < 0.8
    for count, in_table_1 in ((8160, 1632), (581130, 116226)):
        assert count - int((0.7 + 0.1) * count) == in_table_1 + 1
        test = preprocessing.cut_places(count)["test"]
        assert test.stop - test.start == in_table_1 + 1


def test_num_table_1__counts_with_flips_and_as_nodules():
    """Positives count eight times as samples and once as nodules; negatives once."""
    counts = (("train", 3, 20), ("test", 1, 7), ("train", 2, 15), ("validation", 0, 11))
    scans = []
    for split, positives, negatives in counts:
        scans.append({"split": split, "positives": [(5, 6, 7)] * positives, "negatives": [(5, 6, 7)] * negatives})

    table = preprocessing.table_1(scans, {})
    columns = ("positive", "nodules", "negative")
    assert [table["train"][column] for column in columns] == [40, 5, 35]
    assert [table["validation"][column] for column in columns] == [0, 0, 11]
    assert [table["test"][column] for column in columns] == [8, 1, 7]


# A scan, from its files to its cubes

UNSAFE = ["../x", "/abs", ".hid", "..", ".", "", "a/b", "a\\b", "1.2 3", "nul\0", "n\nl",
          "x" * 300, "x" * 301, "é", "è", "1.2.3é", "_1.2.3", "_a_00000000", "\udcff"]


@pytest.mark.parametrize("uid", UNSAFE)
def test_scan_name__never_leaves_the_folder(uid, tmp_path):
    """Whatever the UID, its file lies in the folder, is not hidden, its name short and plain."""
    name = preprocessing.scan_name(uid)
    assert (tmp_path / f"{name}.npy").resolve().parent == tmp_path.resolve()
    assert name and name.isascii() and len(name) < 150
    assert not name.startswith(".")
    assert not set(name) & set("/\\:\0\n *")


def test_scan_name__keeps_a_dicom_uid():
    """A UID as DICOM has it is its own name."""
    assert preprocessing.scan_name("1.3.6.1.4.1.14519.5.2.1") == "1.3.6.1.4.1.14519.5.2.1"


@pytest.mark.parametrize("uid", ["parameters", "dataset", "options", "nodules", "figure_2"])
def test_scan_name__is_none_of_our_own(uid):
    """A scan may be called anything: its files do not take the place of ours."""
    assert preprocessing.scan_name(uid) != uid


def test_scan_name__is_injective():
    """No two UIDs share a name, nor does a UID take the safe name of a different one."""
    uids = {uid for uid in UNSAFE if uid != "\udcff"}
    uids |= {preprocessing.scan_name(uid) for uid in uids}
    names = {preprocessing.scan_name(uid) for uid in uids}
    assert len(names) == len(uids)


def test_scan_name__and_its_draws_take_any_file_name():
    """File names that are not UTF-8 (surrogates, in Python) have names and streams of their own."""
    first, second = "\udcff", "\udcfe"
    assert preprocessing.scan_name(first) != preprocessing.scan_name(second)
    first_stream = lungaug.stream(0, "negatives", first)
    second_stream = lungaug.stream(0, "negatives", second)
    assert first_stream.random() != second_stream.random()


PARAMETERS = {"cube": 12, "negatives": 6000, "seed": 0, "max_slice_mm": 9}


def write_scan(folder, hu, spacing=(3, 3, 3), origin=(0, 0, 0), direction=None):
    """A MetaImage of these HU; returns its Source."""
    if direction is None:
        direction = np.eye(3)
    made = phantom.Phantom("1.2.3", "", hu.astype(np.int16), spacing, origin, direction, [],
                           None, None)
    return Source("1.2.3", "1.2.3", (scan_files.write_metaimage(folder, made),))


@pytest.fixture(scope="module")
def trunk(tmp_path_factory):
    """An oblique trunk with one box of lung, prepared.

    .scan, .source, .nodules (x, y, z, diameter), .folder, .record, .whole: the Volume at 1 mm.
    """
    folder = tmp_path_factory.mktemp("trunk")

    # Make tissue in air, and a box of lung in it.
    hu = np.full((52, 66, 75), -1000, np.int16)
    hu[:, 6:-6, 6:-6] = noise((52, 54, 63)) // 20
    hu[10:42, 16:48, 18:58] = -850 + noise((32, 32, 40)) // 20
    direction = np.round(turn(2, 8) @ turn(0, -6) @ np.diag([-1, 1, 1]), 10)
    scan = scan_of(hu, direction, spacing=(3.1, 3.7, 4.3), origin=(141.3, -77.9, 33.7))

    # Annotate four nodules.
    nodules = []
    for *index, diameter in ((27.3, 24.4, 16.2, 31.3), (48.6, 24.7, 17.4, 24.2),
                             (28.2, 39.3, 33.6, 17.6), (47.7, 39.9, 34.8, 28.9)):
        centre = scan.origin + direction @ (scan.spacing * index)
        nodules.append((*centre.tolist(), diameter))

    source = write_scan(folder, hu, tuple(scan.spacing), tuple(scan.origin), direction)
    record = preprocessing.prepare_scan(source, nodules, folder, PARAMETERS)
    whole = preprocessing.resample(scan)
    return SimpleNamespace(scan=scan, source=source, nodules=nodules, folder=folder, record=record,
                           whole=whole)


def centres_of(record, kind):
    """Where a record's cubes have their centre voxels, in mm (x, y, z)."""
    return np.array(record["origin"]) + np.array(record[kind])[:, ::-1]


def test_rule_2_1_4_centre__a_prepared_positive_is_at_its_annotation(trunk):
    """After cropping to the lungs, each positive is half a voxel at most from its annotation."""
    annotated = np.array(trunk.nodules)[:, :3]
    assert np.abs(centres_of(trunk.record, "positives") - annotated).max() <= 0.5 + 1e-9


def test_rule_2_1_4_negatives__a_prepared_negative_meets_no_nodule(trunk):
    """In millimetres, at the annotated places, not rounded: no cube of 12 mm meets a sphere."""
    drawn = centres_of(trunk.record, "negatives")
    assert len(drawn) == 6000
    for *centre, diameter in trunk.nodules:
        nearest_in_cube = np.clip(centre, drawn - 6.5, drawn + 5.5)
        distance = np.linalg.norm(nearest_in_cube - centre, axis=1)
        assert distance.min() >= diameter / 2


def test_rule_2_1_4_negatives__a_prepared_negative_is_in_the_lungs(trunk):
    """In the scan's own voxels, negatives fill the box of lung, to the mask's 2 mm."""
    index = index_in(trunk.scan, centres_of(trunk.record, "negatives"))
    low = np.array([18, 16, 10])
    high = np.array([57, 47, 41])
    tolerance = 3.5 / trunk.scan.spacing
    assert (index > low - tolerance).all() and (index < high + tolerance).all()
    assert (index.min(0) < low + tolerance).all() and (index.max(0) > high - tolerance).all()


@pytest.mark.parametrize("kind", ["positives", "negatives"])
def test_rule_2_1_4_padding__only_past_the_scans_edge(trunk, kind):
    """The stored region is large enough: its cubes are those of the whole scan, without padding."""
    stored = np.load(trunk.folder / trunk.record["volume"])
    offset = np.array(trunk.record["origin"]) - trunk.whole.origin
    start = np.rint(offset).astype(int)[::-1]
    for voxel in np.array(trunk.record[kind]):
        cube = preprocessing.cut(stored, voxel, 12)
        assert np.array_equal(cube, preprocessing.cut(trunk.whole.hu, voxel + start, 12))


def test_prepare_scan__litres_are_those_of_the_box(trunk):
    """The record's litres are the box's, to 5%."""
    litres = 32 * 32 * 40 * 3.1 * 3.7 * 4.3e-6
    assert trunk.record["litres"] == pytest.approx(litres, rel=0.05)


def test_prepare_scan__a_nodule_between_an_oblique_scan_and_its_grids_corner_is_outside(
        trunk, tmp_path):
    """The grid's box is larger than an oblique scan: its corners hold no voxel, and no nodule."""
    corner, _ = preprocessing.grid(trunk.scan)
    nodule = (*(corner + 3).tolist(), 5.0)
    with pytest.raises(Refusal, match="outside"):
        preprocessing.prepare_scan(trunk.source, [nodule], tmp_path, PARAMETERS)


@pytest.mark.parametrize("change, says", [({"max_slice_mm": 4.2}, "4.3 mm"), ({}, "outside")])
def test_prepare_scan__refuses(trunk, change, says, tmp_path):
    """Slices too far apart, or an annotation outside the scan, are refused with their values."""
    nodules = [*trunk.nodules, (999.0, 0.0, 0.0, 5.0)]
    with pytest.raises(Refusal, match=says):
        preprocessing.prepare_scan(trunk.source, nodules, tmp_path, PARAMETERS | change)
    assert not list(tmp_path.glob("*.npy"))


def test_page__without_a_nodule_shows_the_right_lung(tmp_path):
    """The caption names what the picture shows: the largest nodule of the scan with most, or a lung."""
    dataset = small_run(tmp_path)
    with_nodules, = [item for item in preprocessing.page(dataset) if isinstance(item, lungaug.Figure)]
    assert "Scan 1.2.train, the one with the most nodules: " in with_nodules.caption
    assert "plane through its largest nodule, " in with_nodules.caption

    for scan in dataset.info["scans"]:
        scan["positives"] = []
    without, = [item for item in preprocessing.page(dataset) if isinstance(item, lungaug.Figure)]
    assert "Scan 1.2.train; none has a nodule: " in without.caption
    assert "plane through the right lung, " in without.caption


@pytest.mark.parametrize("hu, says", [
    (np.full((30, 40, 40), 40), "litres of lung"),
    (box((40, 60, 60), ((0, 12, 12), (30, 48, 48))), "truncated at the top or bottom"),
], ids=["no lungs", "truncated lungs"])
def test_prepare_scan__refuses_what_is_no_whole_chest(tmp_path, hu, says):
    """A scan without lungs, and one that truncates them, are refused."""
    source = write_scan(tmp_path, hu)
    with pytest.raises(Refusal, match=says):
        preprocessing.prepare_scan(source, [], tmp_path / "out", PARAMETERS)


def test_prepare_scan__fractions_of_hu_are_rounded_not_cut_off(tmp_path):
    """A MetaImage of floats from -1200 to 600 HU: each is within half a HU of the clipped one, and none is biased."""
    hu = np.random.default_rng(0).uniform(-1200, 600, (20, 30, 40)).astype(np.float32)
    header = scan_files.metaimage_header(scan_of(hu, np.eye(3)), "LOCAL").replace(b"MET_SHORT", b"MET_FLOAT")
    (tmp_path / "1.2.3.mha").write_bytes(header + hu.astype("<f4").tobytes())
    scan, slice_mm = preprocessing.read_clipped_scan(Source("1.2.3", "", (tmp_path / "1.2.3.mha",)), 2.5)
    errors = scan.hu - np.clip(hu, -1000, 400)
    assert scan.hu.dtype == np.int16 and slice_mm == 2.5
    assert np.abs(errors).max() <= 0.5 and abs(errors.mean()) < 0.02


def planes_of(monkeypatch, hu, *others):
    """scan_picture's axial, coronal and sagittal plane as pixels (rows, columns, 3)."""
    monkeypatch.setattr(lungaug, "png", lambda pixels, factor: pixels)
    sheet = preprocessing.scan_picture(hu, *others)

    # Each plane has a margin of two columns on either side.
    depth, height, width = hu.shape
    planes = []
    left = 2
    for rows, columns in ((height, width), (depth, width), (depth, height)):
        planes.append(sheet[:rows, left:left + columns])
        left += columns + 4
    return planes


def coloured(plane, channel):
    """Where a plane is mostly of one colour, 0 red or 1 green: (n, 2), row and column."""
    rest = np.delete(plane, channel, axis=2).max(2).astype(int)
    return np.argwhere(plane[..., channel] > rest + 100)


def test_scan_picture__rings_the_largest_nodule_in_its_three_planes(monkeypatch):
    """A green ring lies a voxel outside the nodule in each plane through it; superior is up."""
    hu = np.full((40, 44, 48), -850, np.int16)
    lungs = np.ones(hu.shape, bool)
    centres = np.array([[8.0, 8, 8], [28, 30, 34]])
    planes = planes_of(monkeypatch, hu, lungs, centres, np.array([3.0, 6]))
    for plane, centre in zip(planes, ((30, 34), (39 - 28, 34), (39 - 28, 30))):
        distance = np.linalg.norm(coloured(plane, 1) - np.array(centre), axis=1)
        assert len(distance) > 30
        assert distance.min() >= 7 and distance.max() < 8.1


def test_scan_picture__outlines_the_lungs(monkeypatch):
    """Red are the mask's outermost voxels; without a nodule the planes pass through the lungs."""
    hu = np.full((40, 44, 48), 40, np.int16)
    lungs = np.zeros(hu.shape, bool)
    lungs[10:30, 12:32, 6:42] = True
    planes = planes_of(monkeypatch, hu, lungs, np.zeros((0, 3)), np.zeros(0))
    for plane, (rows, columns) in zip(planes, ((20, 36), (20, 36), (20, 20))):
        red = coloured(plane, 0)
        assert len(red) == 2 * (rows + columns) - 4
        assert np.array_equal(np.ptp(red, axis=0) + 1, (rows, columns))
        assert len(coloured(plane, 1)) == 0


def test_prepare_scan__its_picture_has_each_nodule_where_it_is_annotated(
        trunk, tmp_path, monkeypatch):
    """Rings' centres and radii, in voxels of 2 mm on the scan's own axes, are the annotations'."""
    calls = []

    def record_call(hu, lungs, centres, radii):
        calls.append((centres, radii))
        return b""

    monkeypatch.setattr(preprocessing, "scan_picture", record_call)
    preprocessing.prepare_scan(trunk.source, trunk.nodules, tmp_path, PARAMETERS)
    (centres, radii), = calls

    scan = preprocessing.reorient(trunk.scan)
    ringed = []
    for centre, radius in zip(centres, radii):
        place = scan.origin + scan.direction @ (2 * centre[::-1])
        ringed.append((*place, 4 * radius))
    assert np.abs(np.array(ringed) - trunk.nodules).max() < 1e-6


# The command

WORDS = ("--cube", "12", "--negatives", "20", "--workers", "1", "--max-slice-mm", "9")


def prepare(folder, *words):
    """Run preprocessing.py in a folder as a user would, with a home that must stay empty."""
    home = folder / "home"
    home.mkdir(exist_ok=True)
    environment = os.environ | {"HOME": str(home), "PYTHONDONTWRITEBYTECODE": "1",
                                "OMP_NUM_THREADS": "1"}
    return run_python(ROOT / "preprocessing.py", *words, cwd=folder, env=environment)


def contents(folder):
    """Every file below a folder: its path → its bytes."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


BROKEN = ("NDims = 3\nDimSize = 9 9 9\nElementSpacing = 1 1 1\nElementType = MET_SHORT\n"
          "ElementDataFile = bad.raw\n")


@early
def finished(folder):
    """Four coarse scans of three patients and a truncated one, prepared.

    .folder, .before: its files before the run, .done: the command's result, .info: dataset.json.
    The truncated scan's name, which is its series UID, holds a terminal's code.
    """
    phantom.write_scans(folder / "scans", 4, scale=3)
    (folder / "scans/bad\x1b[31m.mhd").write_text(BROKEN, encoding="utf-8")
    (folder / "scans/bad.raw").write_bytes(bytes(100))

    before = contents(folder)
    done = prepare(folder, "--scans", folder / "scans", "--run", "R", *WORDS)
    assert done.status == 0, done.err
    return SimpleNamespace(folder=folder, before=before, done=done, info=read_info(folder))


@pytest.fixture
def again(finished, tmp_path):
    """A copy of the run, to be changed."""
    shutil.copytree(finished.folder / "R", tmp_path / "R")
    return tmp_path


def read_info(folder):
    return json.loads((folder / "R/prepared/dataset.json").read_bytes())


def annotations(folder):
    """annotations.csv as the test reads it: series UID → rows (x, y, z, diameter)."""
    nodules = {}
    with open(folder / "scans/annotations.csv", newline="", encoding="utf-8") as file:
        for uid, *cells in list(csv.reader(file))[1:]:
            nodules.setdefault(uid, []).append([float(cell) for cell in cells])
    return nodules


def products(folder):
    """The bytes of every volume, record and dataset.json."""
    names = {}
    for name, data in contents(folder / "R/prepared").items():
        # A record bears the name of its series, which begins with a digit.
        if name.endswith(".npy") or name[0].isdigit() or name == "dataset.json":
            names[name] = data
    return names


def is_one_line(done, *words):
    """Whether a command ended with status 2 and, last on stderr, a Refusal that holds the words."""
    *_, line = done.err.strip().split("\n")
    is_refusal = line.startswith("lungaug: ") and " — " in line
    holds_words = all(word in line for word in words)
    no_traceback = "Traceback" not in done.err
    return done.status == 2 and is_refusal and holds_words and no_traceback


def test_command__dataset_json_holds_every_scan_and_annotation(finished):
    """Each scan once, in order; each annotation a positive at its place; 20 negatives each."""
    scans = finished.info["scans"]
    nodules = annotations(finished.folder)
    assert [scan["seriesuid"] for scan in scans] == sorted(nodules)
    for scan in scans:
        expected = np.array(nodules[scan["seriesuid"]])
        assert np.abs(centres_of(scan, "positives") - expected[:, :3]).max() <= 0.5 + 1e-6
        assert scan["diameters"] == expected[:, 3].tolist()
        assert len(scan["negatives"]) == 20
        assert 2 < scan["litres"] < 8

    assert finished.info["preset"] == "thesis"
    assert not finished.info["synthetic"]
    assert finished.info["parameters"]["cube"] == 12


def test_rule_2_1_5_split__two_series_of_one_patient_land_in_one(finished):
    """Two of the four series are one patient's and share a split; three patients fill all three."""
    scans = finished.info["scans"]
    splits = {}
    for scan in scans:
        splits.setdefault(scan["patient"], set()).add(scan["split"])
    assert len(scans) == 4 and len(splits) == 3
    assert all(len(patients_splits) == 1 for patients_splits in splits.values())
    assert set.union(*splits.values()) == {"train", "validation", "test"}


def test_num_table_1__of_a_run_counts_its_cubes(finished):
    """The run's Table 1 adds up to all annotations, eight times with flips, and all negatives."""
    rows = finished.info["table_1"].values()
    nodules = sum(map(len, annotations(finished.folder).values()))
    assert sum(row["nodules"] for row in rows) == nodules
    assert sum(row["positive"] for row in rows) == 8 * nodules
    assert sum(row["negative"] for row in rows) == 80
    assert "Table 1" in finished.done.out


def test_command__volumes_are_the_scans_at_1_mm(finished):
    """A volume is its scan's clipped HU at 1 mm where the record says, to half a unit."""
    source = preprocessing.find_scans(finished.folder / "scans")[0]
    scan = preprocessing.read_source(source)
    record = finished.info["scans"][0]
    volume = np.load(finished.folder / "R/prepared" / record["volume"])
    assert volume.dtype == np.int16
    assert volume.min() >= -1000 and volume.max() <= 400

    # Interpolate at 5,000 of its voxels.
    voxels = np.random.default_rng(0).integers(0, volume.shape, (5000, 3))
    index = index_in(scan, np.array(record["origin"]) + voxels[:, ::-1])[:, ::-1]
    hu = np.clip(scan.hu, -1000, 400).astype(float)
    exact = ndimage.map_coordinates(hu, index.T, order=1, mode="grid-constant", cval=-1000)
    assert np.abs(volume[tuple(voxels.T)] - exact).max() < 0.51


def test_command__writes_nothing_outside_the_run(finished):
    """Scans and home folder are as they were; all new files lie under --run."""
    after = contents(finished.folder)
    new = set(after) - set(finished.before)
    assert {name: after.get(name) for name in finished.before} == finished.before
    assert all(name.startswith("R/prepared/") for name in new)


def test_command__open_dataset_reads_it_back(finished):
    """The next stages open each split's rows, and cubes of the requested side in [-1, 1]."""
    dataset = preprocessing.open_dataset(finished.folder / "R")
    for split, row in finished.info["table_1"].items():
        assert len(dataset.positives[split]) == row["nodules"]
        assert len(dataset.negatives[split]) == row["negative"]
    cubes, _ = train_gan.draw_batch(dataset, 6, np.random.default_rng(0))
    assert cubes.shape == (6, 1, 12, 12, 12)
    assert np.abs(cubes).max() <= 1 and cubes.std() > 0.05


def test_command__again_keeps_every_byte_and_remakes_what_is_gone(finished, again, run):
    """Run again, a removed and a truncated volume come back the same; the rest is not touched."""
    before = products(again)
    gone, truncated, *whole = sorted((again / "R/prepared").glob("*.npy"))
    gone.unlink()
    truncated.write_bytes(truncated.read_bytes()[:-1000])
    times = [path.stat().st_mtime_ns for path in whole]

    done = run(preprocessing, "--scans", finished.folder / "scans", "--run", again / "R", *WORDS)
    assert done.status == 0, done.err
    assert products(again) == before
    assert [path.stat().st_mtime_ns for path in whole] == times


def test_command__another_cube_is_refused(finished, again, run):
    """A run keeps its parameters: --cube 24 is one line, status 2, and changes nothing."""
    before = contents(again)
    done = run(preprocessing, "--scans", finished.folder / "scans", "--run", again / "R", *WORDS,
               "--cube", "24")
    assert is_one_line(done, "cube 12, not 24")
    assert len(done.err.strip().split("\n")) == 1
    assert contents(again) == before


def test_command__other_annotations_do_not_pass_for_the_old(finished, again, run):
    """Without the last row of annotations.csv, the old positives are refused."""
    before = products(again)
    rows = (finished.folder / "scans/annotations.csv").read_text(encoding="utf-8")
    shorter = again / "shorter.csv"
    shorter.write_text("\n".join(rows.splitlines()[:-1]) + "\n", encoding="utf-8")

    done = run(preprocessing, "--scans", finished.folder / "scans", "--annotations", shorter,
               "--run", again / "R", *WORDS)
    assert is_one_line(done, "annotations")
    assert products(again) == before


def test_command__a_broken_scan_is_skipped_with_its_reason(finished):
    """The others are prepared; dataset.json and the command say which was skipped and why."""
    skipped, = finished.info["skipped"]
    assert skipped["seriesuid"].startswith("bad")
    assert skipped["path"].endswith("bad.raw")
    assert "100 bytes" in skipped["problem"]
    assert "bad.raw" in finished.done.out
    assert len(finished.info["scans"]) == 4


def test_command__a_uid_cannot_steer_the_terminal(finished):
    """A terminal's code in a file's name is not printed as it is."""
    assert "bad" in finished.done.err
    assert "\x1b" not in finished.done.out + finished.done.err


def test_command__strict_makes_a_broken_scan_fatal(finished, again, run):
    """--strict: status 2, a line that names the file, no dataset.json that would pass for whole."""
    path = again / "R/prepared/dataset.json"
    path.unlink()
    done = run(preprocessing, "--scans", finished.folder / "scans", "--run", again / "R", *WORDS,
               "--strict")
    assert is_one_line(done, "bad.raw", "100 bytes")
    assert not path.exists()


# Real scans

REAL = os.environ.get("LUNGAUG_LUNA16_MINI", "")
# Mean HU of 3×3×3 voxels at each nodule, from the scans' README; by the end of the series UID.
MEAN_HU = {
    "179049373636438705059720603192": [86],
    "170706757615202213033480003264": [17, -222, -1],
    "272348349298439120568330857680": [144],
}


@pytest.mark.skipif(not REAL, reason="LUNGAUG_LUNA16_MINI names no folder of real scans")
@pytest.mark.parametrize("name", MEAN_HU)
def test_real_scans__nodules_are_where_they_were(tmp_path, name):
    """Every annotation is a positive; at its centre the volume is as dense as the scan.

    To 40 HU, which resampling at 1 mm may blur.
    """
    annotated = preprocessing.read_annotations(Path(REAL) / "annotations.csv")
    sources = preprocessing.find_scans(REAL)
    assert len(sources) == len(MEAN_HU)
    source, = [source for source in sources if source.seriesuid.endswith(f".{name}")]
    nodules = annotated[source.seriesuid]

    parameters = {"cube": 48, "negatives": 50, "seed": 0, "max_slice_mm": 2.5}
    record = preprocessing.prepare_scan(source, nodules, tmp_path, parameters)
    assert len(record["positives"]) == len(nodules)
    assert len(record["negatives"]) == 50
    assert 2 < record["litres"] < 8

    # Compare the 27 voxels around each nodule's centre.
    scan = preprocessing.read_source(source)
    volume = np.load(tmp_path / record["volume"]).astype(float)
    for nodule, mean_hu in zip(nodules, MEAN_HU[name]):
        centre = np.rint(index_in(scan, np.array([nodule[:3]]))).astype(int)
        index = centre + indices((3, 3, 3)) - 1
        assert abs(scan.hu[tuple(index[:, ::-1].T)].mean() - mean_hu) <= 0.5

        points = scan.origin + index @ (scan.direction * scan.spacing).T - record["origin"]
        blurred = ndimage.map_coordinates(volume, points[:, ::-1].T, order=1)
        assert abs(blurred.mean() - mean_hu) < 40
