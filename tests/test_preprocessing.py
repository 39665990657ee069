"""Section 2 from a scan in memory to cubes, then the whole of preprocessing.py as a user runs it.

    python -m pytest tests/test_preprocessing.py -v
    LUNGAUG_LUNA16_MINI=<folder of three real scans> python -m pytest tests/test_preprocessing.py -k real -v

Geometry is checked by what must hold: a scan whose HU are its own x, y or z in mm holds its own coordinates after
resampling; and against the plain version, a sum over eight corners for each point. Sides are unequal, so that a swapped
axis shows. How files are read is test_readers.py's.
"""

import csv
import itertools
import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import ndimage

import lungaug
import phantom
import preprocessing
import train_gan
from lungaug import Refusal
from preprocessing import Scan, Source, Volume

ROOT = Path(__file__).resolve().parent.parent
PRESETS = {row.name: row for row in lungaug.PRESETS if row.stage == "preprocessing"}


def turn(axis, degrees):
    """3×3: a rotation about the x, y or z axis."""
    a, b = [i for i in range(3) if i != axis]
    matrix, angle = np.eye(3), np.radians(degrees)
    matrix[[a, b, a, b], [a, b, b, a]] = np.cos(angle), np.cos(angle), -np.sin(angle), np.sin(angle)
    return matrix


TILT = np.column_stack([(1, 0, 0), (0, 1, 0), (0, np.sin(np.radians(20)), np.cos(np.radians(20)))])     # of the gantry
DIRECTIONS = {
    "identity": np.eye(3),
    "one axis flipped": np.diag([1.0, 1, -1]),
    "two axes flipped": np.diag([-1.0, -1, 1]),
    "sagittal": np.array([[0.0, 0, 1], [1, 0, 0], [0, -1, 0]]),
    "coronal": np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]]),
    "permuted and flipped": np.array([[0.0, -1, 0], [0, 0, 1], [1, 0, 0]]),
    "oblique": turn(0, 12) @ turn(1, -9) @ turn(2, 17),
    "oblique and flipped": turn(2, 25) @ np.diag([-1.0, 1, -1]),
    "oblique and sagittal": turn(1, 14) @ np.array([[0.0, 0, 1], [1, 0, 0], [0, -1, 0]]),
    "gantry tilt": TILT,
    "gantry tilt, flipped": TILT @ np.diag([-1.0, 1, -1]),
}
AXES_AGREE = [name for name, matrix in DIRECTIONS.items() if np.count_nonzero(matrix) == 3]
every_direction = pytest.mark.parametrize("name", DIRECTIONS)
SHAPE, SPACING, ORIGIN = (9, 11, 14), np.array([0.7, 1.3, 2.5]), np.array([-31.4, 17.3, -205.9])


def indices(shape):
    """Every voxel's index, (x, y, z), in the order of the array (z, y, x): (n, 3)."""
    return np.indices(shape).reshape(3, -1).T[:, ::-1]


def places(scan):
    """Every voxel's place in mm, (n, 3), from the definition: origin + direction · (spacing · index)."""
    return np.array([scan.origin + scan.direction @ (scan.spacing * index) for index in indices(scan.hu.shape)])


def scan_of(hu, direction, spacing=SPACING, origin=ORIGIN):
    return Scan("1.2.3", hu, np.array(spacing, float), np.array(origin, float), np.array(direction, float))


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


# 2.1.1 Aspect ratio

@pytest.mark.parametrize("axis", range(3), ids="xyz")
@every_direction
def test_rule_2_1_1_resample__coordinates_survive(name, axis):
    """A scan whose HU are its own x, y or z holds them at every grid point within it, whatever its direction."""
    scan = coordinates(name, axis)
    volume = preprocessing.resample(scan)
    points = grid_points(volume)
    index = index_in(scan, points)
    within = ((index > -1e-9) & (index < np.array(SHAPE[::-1]) - 1 + 1e-9)).all(1)
    assert within.sum() > 500
    assert np.abs(volume.hu.ravel() - points[:, axis])[within].max() < 1e-9


def test_rule_2_1_1_resample__int16_is_rounded_to_the_nearest():
    """In whole HU, positive and negative, a point is half a unit off at most."""
    scan = scan_of(noise(SHAPE), DIRECTIONS["oblique"])
    volume, exact = preprocessing.resample(scan), preprocessing.resample(scan._replace(hu=scan.hu.astype(float)))
    assert volume.hu.dtype == np.int16 and np.abs(volume.hu - exact.hu).max() < 0.5 + 1e-9


@every_direction
def test_rule_2_1_1_resample__equals_the_sum_over_eight_corners(name):
    """Linear interpolation as its definition has it, Σ weight · HU of the eight voxels around, air where none is."""
    scan = scan_of(noise(SHAPE, float), DIRECTIONS[name])
    volume = preprocessing.resample(scan)
    index = index_in(scan, grid_points(volume))
    low, expected = np.floor(index).astype(int), np.zeros(len(index))
    for corner in itertools.product((0, 1), repeat=3):
        weight = np.prod(1 - np.abs(index - low - corner), axis=1)
        x, y, z = (low + corner).T
        there = ((low + corner >= 0) & (low + corner < SHAPE[::-1])).all(1)
        expected += weight * np.where(there, scan.hu[np.clip(z, 0, 8), np.clip(y, 0, 10), np.clip(x, 0, 13)], -1000)
    assert np.abs(volume.hu.ravel() - expected).max() < 1e-6    # a grid point on the last voxel may lie 1e-13 past it


@pytest.mark.parametrize("name", AXES_AGREE)
def test_rule_2_1_1_axes__equals_the_full_matrix(name):
    """The quick way of agreeing axes gives what a full matrix gives: a turn by 1e-10 takes the slow one."""
    scan = scan_of(noise(SHAPE, float), DIRECTIONS[name])
    quick, origin, shape = preprocessing.resample(scan), *preprocessing.grid(scan)
    slow = preprocessing.resample(scan._replace(direction=turn(1, 1e-10) @ scan.direction), origin, shape)
    assert np.abs(quick.hu - slow.hu).max() < 1e-6


@pytest.mark.parametrize("dtype, far", [(float, 1e-10), (">f8", 1e-10), (np.float32, 1e-3), (np.int16, 0)])
def test_rule_2_1_1_axes__equals_affine_transform(dtype, far):
    """The plain way: scipy's, point by point; to a number's own digits, and in whole HU the same rounding."""
    hu, start, step, shape = noise(SHAPE, dtype), (0.3, 1.2, 0), (0.41, 0.77, 1.3), (20, 13, 11)
    plain = ndimage.affine_transform(hu.astype(float), np.array(step), start, shape, order=1, mode="nearest")
    plain = np.rint(plain) if dtype == np.int16 else plain
    found = preprocessing.interpolate_axes(hu, start, step, shape)
    assert found.dtype == dtype and found.shape == shape and np.abs(found - plain).max() <= far


def test_rule_2_1_1_axes__past_an_end_the_last_voxel_stays():
    """Points before the first and after the last voxel along z hold that voxel's HU, even of a single slice."""
    hu = noise((3, 2, 2))
    found = preprocessing.interpolate_axes(hu, (-1.5, 0, 0), (1.5, 1, 1), (5, 2, 2))
    assert np.array_equal(found[[0, 1, 3, 4]], hu[[0, 0, 2, 2]])
    assert np.array_equal(preprocessing.interpolate_axes(hu[:1], (-1, 0, 0), (1, 1, 1), (3, 2, 2)), hu[[0, 0, 0]])


def test_rule_2_1_1_axes__a_long_axis_takes_two_weights_a_point():
    """Linear in the axis: a full matrix of 200,000 × 250,000 weights would take 373 GiB."""
    assert preprocessing.line_weights(200_000, 0, 0.8, 250_000).nnz <= 500_000


@pytest.mark.parametrize("name", ["oblique", "gantry tilt"])
def test_rule_2_1_1_resample__outside_lies_air(name):
    """A grid point a voxel or more outside an oblique scan is -1000 HU."""
    scan = scan_of(np.full(SHAPE, 40, np.int16), DIRECTIONS[name])
    volume = preprocessing.resample(scan)
    index = index_in(scan, grid_points(volume))
    outside = ((index < -1.001) | (index > np.array(SHAPE[::-1]) + 0.001)).any(1)
    assert outside.sum() > 100 and (volume.hu.ravel()[outside] == -1000).all()
    assert (volume.hu == 40).sum() > 500


def test_rule_2_1_1_resample__a_step_of_one_voxel_moves_the_array_by_one():
    """At 1 mm already, the volume is the scan itself, shifted by nothing, its origin too."""
    scan = scan_of(noise(SHAPE), np.eye(3), spacing=(1, 1, 1))
    volume = preprocessing.resample(scan)
    assert np.array_equal(volume.hu, scan.hu) and np.array_equal(volume.origin, ORIGIN)


@pytest.mark.parametrize("name", ["sagittal", "oblique"])
def test_rule_2_1_1_resample__a_part_equals_that_part_of_the_whole(name):
    """The part of the grid that is asked for is the same voxels, so that a crop moves no nodule."""
    scan = scan_of(noise(SHAPE, float), DIRECTIONS[name])
    whole = preprocessing.resample(scan)
    part = preprocessing.resample(scan, whole.origin + (2, 3, 1), (5, 4, 6))
    assert np.abs(part.hu - whole.hu[1:6, 3:7, 2:8]).max() < 1e-6
    assert np.array_equal(part.origin, whole.origin + (2, 3, 1))


@every_direction
def test_rule_2_1_1_resample__reorient_keeps_every_voxels_place(name):
    """Reoriented, each voxel lies where it lay: a mirrored index is n − 1 − i, not n − i."""
    scan = scan_of(np.arange(np.prod(SHAPE)).reshape(SHAPE), DIRECTIONS[name])
    other = preprocessing.reorient(scan)
    found = places(other)[np.argsort(other.hu, axis=None)]
    assert np.abs(found - places(scan)).max() < 1e-9


@every_direction
def test_rule_2_1_1_resample__reorient_turns_index_axes_to_the_patients(name):
    """Reoriented, each index axis runs along its own axis of the patient more than along any other, and forwards."""
    direction = preprocessing.reorient(scan_of(np.zeros(SHAPE), DIRECTIONS[name])).direction
    assert np.array_equal(np.abs(direction).argmax(0), [0, 1, 2]) and (np.diag(direction) > 0).all()


@every_direction
def test_rule_2_1_1_exact_grid__starts_at_the_corner_most_centre(name):
    """The origin is the least x, y and z of the eight corner voxels' centres, so no voxel lies before the grid."""
    scan = scan_of(np.zeros(SHAPE), DIRECTIONS[name])
    origin, shape = preprocessing.grid(scan)
    assert np.abs(origin - places(scan).min(0)).max() < 1e-9


@every_direction
def test_rule_2_1_1_exact_grid__ends_within_1_mm_before_the_last_voxel(name):
    """Points 1 mm apart never pass the last voxel's centre, and stop less than 1 mm short of it."""
    scan = scan_of(np.zeros(SHAPE), DIRECTIONS[name])
    origin, shape = preprocessing.grid(scan)
    short = places(scan).max(0) - (origin + np.array(shape[::-1]) - 1)
    assert (short > -1e-5).all() and (short < 1).all()


def test_rule_2_1_1_exact_grid__133_slices_of_2_5_mm():
    """132 gaps of 2.5 mm are 330 mm: 331 points, the last on the last slice; a zoom by 2.5 would give 332."""
    scan = scan_of(np.arange(133.0)[:, None, None] * 2.5 + np.zeros((133, 2, 3)), np.eye(3), (0.9, 1.1, 2.5))
    volume = preprocessing.resample(scan)
    assert volume.hu.shape == (331, 2, 2)
    assert np.abs(volume.hu[:, 0, 0] - np.arange(331)).max() < 1e-9


def test_rule_2_1_1_exact_grid__no_rounded_zoom():
    """Point k is k mm from the first centre to the last digit, where 10.4 mm would be squeezed into 10 or 11."""
    scan = scan_of(np.arange(14)[:, None, None] * 0.8 + np.zeros((14, 2, 2)), np.eye(3), (1, 1, 0.8))
    assert np.abs(preprocessing.resample(scan).hu[:, 0, 0] - np.arange(11)).max() < 1e-9


def test_rule_2_1_1_exact_grid__a_float_just_below_a_whole_number_loses_no_point():
    """100 gaps of 0.29 mm are 28.999999999999996 in floats, and 29 mm on the patient: 30 points."""
    assert 0.29 * 100 < 29
    assert list(preprocessing.grid(scan_of(np.zeros((101, 2, 3)), np.eye(3), (1, 1, 0.29)))[1]) == [30, 2, 3]


# 2.1.2 Hounsfield unit normalization

def test_rule_2_1_2_clip__bounds_and_dtype():
    """Air and bone bound HU, what lies between stays, and the dtype is kept."""
    clipped = preprocessing.clip_hu(np.array([-32768, -1001, -1000, -999, 0, 399, 400, 401, 32767], np.int16))
    assert clipped.tolist() == [-1000, -1000, -1000, -999, 0, 399, 400, 400, 400] and clipped.dtype == np.int16


def test_eq_2_1_2_normalize__ends_and_middle():
    """−1000 HU → −1, 400 HU → 1, −300 HU, half-way, → 0; water, 0 HU → 3/7."""
    x = preprocessing.normalize(np.array([-1000, 400, -300, 0], np.int16))
    assert x.dtype == np.float32 and np.abs(x - [-1, 1, 0, 3 / 7]).max() < 2e-7


def test_eq_2_1_2_normalize__clips_before_scaling():
    """What lies outside the range, to int16's last value, becomes ±1: no overflow, no scaling by the volume's range."""
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
    assert np.abs(preprocessing.denormalize(preprocessing.normalize(hu)) - hu).max() < 3e-4


# 2.1.3 Lung segmentation

def ball(radius, shape=None, centre=None):
    """bool: the voxels within `radius` of `centre`, alone or in a volume of `shape`."""
    shape = shape or (2 * int(radius) + 1,) * 3
    centre = np.array(centre if centre is not None else [(n - 1) / 2 for n in shape]).reshape(3, 1, 1, 1)
    return ((np.indices(shape) - centre) ** 2).sum(0) <= radius ** 2


def blobs(shape):
    """bool: random lumps with gaps and holes of a few voxels, some at the border."""
    return ndimage.gaussian_filter(np.random.default_rng(3).normal(size=shape), 2) > 0.06


@pytest.mark.parametrize("radius", [5, 6, 7])
def test_rule_2_1_3_closing__is_nearly_that_of_a_ball(radius):
    """Dice with scipy's closing by an explicit ball is above 0.99; crosses alone, or cubes alone, reach 0.982."""
    mask = np.zeros((5 * radius, 6 * radius, 7 * radius), bool)
    mask[radius:4 * radius, 2 * radius:5 * radius, 2 * radius:5 * radius] = True
    mask[2 * radius:3 * radius, 2 * radius:3 * radius, 2 * radius:5 * radius] = False
    mask |= ball(radius * 0.8, mask.shape, (radius, 1.2 * radius, 5.8 * radius))
    exact = ndimage.binary_closing(np.pad(mask, radius), ball(radius))[(slice(radius, -radius),) * 3]
    close = preprocessing.close_ball(mask, radius)
    assert (exact & ~mask).sum() > 300 and 2 * (close & exact).sum() / (close.sum() + exact.sum()) > 0.99


@pytest.mark.parametrize("offset", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0.7071, 0.7071, 0), (0.577, 0.577, -0.577)])
def test_rule_2_1_3_closing__reaches_as_far_in_every_direction(offset):
    """A gap of 1.4 r between two far walls is filled, one of 2.6 r is not, along axes and diagonals alike."""
    radius, shape = 6, (53, 55, 57)
    middle = np.reshape([26, 27, 28], (3, 1, 1, 1))
    along = np.abs(((np.indices(shape) - middle) * np.reshape(offset, (3, 1, 1, 1))).sum(0))
    for gap, filled in ((1.4 * radius, True), (2.6 * radius, False)):
        assert preprocessing.close_ball(along > gap / 2, radius)[26, 27, 28] == filled


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
    once = preprocessing.close_ball(np.pad(blobs((16, 17, 19)), 9), 4)
    assert np.array_equal(preprocessing.close_ball(once, 4), once)


@pytest.fixture(scope="module", params=[0, 2, 4], ids=["straight", "turned", "oblique"])
def chest(request):
    """A coarse phantom's mask at 2 mm; truth at the same points; each one's place in the standard body (3, z, y, x)."""
    made = phantom.make_phantom(request.param, scale=2.5)
    scan = scan_of(made.hu, made.direction, made.spacing, made.origin)
    hu, mask = preprocessing.coarse_lungs(scan._replace(hu=preprocessing.clip_hu(scan.hu)))
    points = (mask.origin + indices(mask.hu.shape) @ (mask.direction * mask.spacing).T).astype(np.float32)
    index = index_in(scan, points)[:, ::-1].T
    truth = ndimage.map_coordinates(made.lungs.astype(np.float32), index, order=1).reshape(mask.hu.shape) > 0.5
    person = phantom.make_person(np.random.default_rng([0, request.param, 1]))
    body = ((points - person.position) / person.size).T.reshape(3, *mask.hu.shape)
    return SimpleNamespace(hu=hu.hu, mask=mask.hu, truth=truth, body=body)


def test_rule_2_1_3_lungs__voxels_are_1_mm_unless_said():
    """A notch 12 mm wide closes under the 10 mm ball; taken for 2 mm voxels it is 24 mm wide, and stays."""
    hu = np.zeros((60, 60, 60), np.int16)
    hu[8:52, 8:52, 8:52] = -850
    hu[8:20, 24:36, 24:36] = 0
    assert preprocessing.lung_mask(hu)[12, 30, 30] and not preprocessing.lung_mask(hu, 2)[12, 30, 30]


def test_rule_2_1_3_lungs__the_erosion_is_of_2_mm_at_2_mm_too():
    """Air 8 mm thick, four voxels, outlives an erosion of one voxel from each side, not one of two."""
    hu = np.zeros((40, 40, 40), np.int16)
    hu[5:35, 18:22, 5:35] = -850
    assert preprocessing.lung_mask(hu, 2)[20, 19, 20]


def test_rule_2_1_3_lungs__what_the_erosion_took_comes_back_and_one_voxel_more():
    """Two voxels of each face, and of an edge, where faces meet, what lies three steps from what was left, not four."""
    hu = np.zeros((50, 50, 50), np.int16)
    hu[10:40, 10:40, 10:40] = -850
    lungs = preprocessing.lung_mask(hu)
    assert lungs[10, 25, 25] and lungs[11, 10, 25] and not lungs[10, 10, 25] and not lungs[9, 25, 25]


@pytest.mark.parametrize("face", [np.s_[:, :2, 5:-5], np.s_[:, -2:, 5:-5], np.s_[:, 5:-5, :2], np.s_[:, 5:-5, -2:]])
def test_rule_2_1_3_lungs__air_at_any_side_of_the_field_of_view_is_the_rooms(face):
    """The larger of two airs, two voxels thick at one of the four sides, is not the lung; the one inside is."""
    hu = np.zeros((60, 60, 60), np.int16)
    hu[face] = -1000
    hu[20:35, 20:35, 20:35] = -850
    lungs = preprocessing.lung_mask(hu, 2)
    assert lungs[27, 27, 27] and not lungs[face].any()


@pytest.mark.parametrize("depth, both", [(12, True), (11, False)])
def test_rule_2_1_3_lungs__two_where_the_second_has_a_quarter(depth, both):
    """Less a voxel of each face, 20 × 20 × 20 and 20 × 10 × 10 are lungs, just a quarter; 20 × 10 × 9 is too little."""
    hu = np.zeros((60, 60, 60), np.int16)
    hu[5:27, 5:27, 5:27] = -850
    hu[5:27, 40:52, 40:40 + depth] = -850
    lungs = preprocessing.lung_mask(hu, 2)
    assert lungs[15, 15, 15] and lungs[15, 45, 45] == both


def test_rule_2_1_3_lungs__dice_with_the_truth(chest):
    """Dice of the mask and all that lies inside the pleura is 0.95 at least; the scan's direction does not matter."""
    assert 2 * (chest.mask & chest.truth).sum() / (chest.mask.sum() + chest.truth.sum()) > 0.95


def test_rule_2_1_3_lungs__holds_no_room(chest):
    """The room's air, beyond the skin, is no lung, though it is the largest air there is."""
    x, y, z = chest.body
    room = (chest.hu < -500) & ((np.abs(x) > 190) | (y < -130))
    assert room.sum() > 1000 and not chest.mask[room].any()


def test_rule_2_1_3_lungs__holds_no_table(chest):
    """The couch, foam in a shell at the back of the skin (y = 116), is no lung."""
    table = (chest.hu < -500) & (chest.body[1] > 117)
    assert table.sum() > 1000 and not chest.mask[table].any()


def test_rule_2_1_3_lungs__holds_no_air_of_the_stomach(chest):
    """The gas under the left diaphragm, a wall's breadth from the lung, is no lung."""
    x, y, z = chest.body
    gas = (chest.hu < -500) & (((x - 70) / 34) ** 2 + ((y + 24) / 34) ** 2 + ((z + 122) / 26) ** 2 < 1) & (y < -38)
    assert gas.sum() > 500 and not chest.mask[gas].any()


def test_rule_2_1_3_lungs__vessels_and_nodules_inside_are_taken_in(chest):
    """What is dense within the lungs, 6 mm from the pleura on, belongs to the mask: closing and holes."""
    inside = ndimage.binary_erosion(chest.truth, iterations=3) & (chest.hu > -500)
    assert inside.sum() > 100 and chest.mask[inside].mean() > 0.95


def test_rule_2_1_3_lungs__a_single_voxel_left_by_the_erosion_is_a_component():
    """At 2 mm, 3³ voxels of air in a body: the erosion leaves their middle, and the mask is not empty."""
    hu = box((11, 12, 13), ((4, 4, 5), (7, 7, 8)))
    assert preprocessing.lung_mask(hu, 2)[5, 5, 6]


@pytest.mark.parametrize("thick, taken", [(10, True), (5, False)])
def test_rule_2_1_3_lungs__a_second_component_counts_from_a_quarter_on(thick, taken):
    """Lungs that do not touch are both taken; a second of 10/24 of the first is, one of 5/24 is not."""
    hu = box((60, 60, 90), ((15, 15, 8), (39, 39, 32)), ((15, 15, 55), (39, 39, 55 + thick)))
    mask = preprocessing.lung_mask(hu)
    assert mask[27, 27, 20] and mask[27, 27, 57] == taken


def test_rule_2_1_3_lungs__a_third_component_is_not_taken():
    """Two lungs at most: of three the least is left, though it is as large as a quarter."""
    hu = box((50, 50, 110), ((13, 13, 5), (37, 37, 29)), ((13, 13, 45), (37, 37, 67)), ((13, 13, 83), (37, 37, 103)))
    mask = preprocessing.lung_mask(hu)
    assert mask[25, 25, 17] and mask[25, 25, 56] and not mask[25, 25, 93]


def test_rule_2_1_3_lungs__keeps_the_outline_of_a_lone_lung():
    """A convex lung comes back voxel for voxel: what the erosion took the dilation gives, and no more."""
    hu = np.where(ball(15.3, (45, 47, 49), (22, 23, 24)), -850, 40)
    assert np.array_equal(preprocessing.lung_mask(hu), hu == -850)


def test_rule_2_1_3_lungs__below_minus_500_alone_is_air():
    """-501 HU is air, -500 HU is not."""
    corners = ((10, 10, 10), (30, 30, 30))
    assert preprocessing.lung_mask(box((40, 41, 42), corners, inside=-501))[20, 20, 20]
    assert not preprocessing.lung_mask(box((40, 41, 42), corners, inside=-500)).any()


@pytest.mark.parametrize("face", [(slice(None), 0), (slice(None), -1), (slice(None), slice(None), 0),
                                  (slice(None), slice(None), -1)])
def test_rule_2_1_3_lungs__air_at_the_axial_border_is_the_room(face):
    """Air that reaches any of the four sides of the field of view is dropped, however large."""
    hu = box((40, 60, 60), ((10, 20, 20), (30, 40, 40)))
    hu[face] = -1000
    hu[tuple(s if isinstance(s, slice) else slice(0, 6) if s == 0 else slice(-6, None) for s in face)] = -1000
    mask = preprocessing.lung_mask(hu)
    assert mask[20, 30, 30] and not mask[face].any()


def test_rule_2_1_3_lungs__air_at_the_first_and_last_slice_may_be_lung():
    """Lungs that the scan cuts at head or foot are still lungs: only the sides of the field of view are the room's."""
    assert preprocessing.lung_mask(box((24, 50, 52), ((0, 14, 14), (24, 36, 38))))[[0, 12, 23], 25, 26].all()


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
    assert mask.shape == (8, 9, 10) and mask.dtype == bool and not mask.any()


def test_rule_2_1_3_lungs__are_sought_at_every_second_point_of_the_grid():
    """The 2 mm grid of the mask is every second point of the 1 mm grid."""
    scan = scan_of(noise(SHAPE), np.eye(3))
    coarse, whole = preprocessing.coarse_lungs(scan)[0], preprocessing.resample(scan)
    assert np.array_equal(coarse.hu, whole.hu[::2, ::2, ::2]) and np.array_equal(coarse.origin, whole.origin)


# 2.1.4 Positive and negative cube samples

def test_num_2_1_4_cube__48_voxels():
    """2.1.4: all cubes are 48×48×48 voxels."""
    assert PRESETS["cube"].thesis == 48
    assert preprocessing.crop_cube(Volume(noise((5, 6, 7)), np.zeros(3)), (0, 0, 0), 48).shape == (48,) * 3


def test_num_2_1_4_negatives__of_table_1():
    """Table 1 holds 581,130 negatives of 888 scans: 655 a scan, rounded up."""
    assert 406791 + 58113 + 116226 == 581130
    assert PRESETS["negatives"].thesis == -(-581130 // 888) == 655


def test_num_2_slices__2_5_mm():
    """2: LUNA16 keeps scans with slices of 2.5 mm at most."""
    assert PRESETS["max-slice-mm"].thesis == 2.5


@pytest.mark.parametrize("side", [6, 7])
def test_rule_2_1_4_centre__is_the_nearest_grid_point(side):
    """Voxel side // 2 of the cube is the grid point nearest to the annotation, in a volume of unequal sides."""
    volume = Volume(noise((21, 23, 26)), np.array([-30.25, 12.5, -200.75]))
    rng = np.random.default_rng(1)
    for centre in volume.origin + rng.uniform(5, 15, (20, 3)):
        nearest = ((grid_points(volume) - centre) ** 2).sum(1).argmin()
        cube = preprocessing.crop_cube(volume, centre, side)
        assert cube.shape == (side,) * 3 and cube[(side // 2,) * 3] == volume.hu.ravel()[nearest]


def test_rule_2_1_4_centre__takes_xyz_and_gives_zyx():
    """Millimetres (x, y, z) become an index (z, y, x), for one centre and for many."""
    assert preprocessing.nearest_voxel(np.array([10, 20, 30]), (11, 24, 39)).tolist() == [9, 4, 1]
    assert preprocessing.nearest_voxel(np.array([10, 20, 30]),
                                       [(11, 24, 39), (9.6, 20.4, 30)]).tolist() == [[9, 4, 1], [0, 0, 0]]


def test_rule_2_1_4_centre__neighbours_keep_their_order():
    """The cube is the volume's own voxels around the centre, no axis turned or swapped."""
    volume = Volume(noise((21, 23, 26)), np.zeros(3))
    assert np.array_equal(preprocessing.crop_cube(volume, (12, 11, 10), 6), volume.hu[7:13, 8:14, 9:15])


@pytest.mark.parametrize("voxel", [(0, 10, 10), (12, 10, 10), (6, 0, 10), (6, 14, 10), (6, 10, 0), (6, 10, 17),
                                   (0, 0, 0), (12, 14, 17), (-2, 10, 19)])
@pytest.mark.parametrize("side", [6, 7])
def test_rule_2_1_4_padding__pads_and_never_shifts(voxel, side):
    """At each border, and past it, the cube is that of the volume in endless air."""
    hu, far = noise((13, 15, 18)), 20
    start = np.array(voxel) + far - side // 2
    expected = np.pad(hu, far, constant_values=-1000)[tuple(slice(s, s + side) for s in start)]
    cube = preprocessing.cut(hu, voxel, side)
    assert np.array_equal(cube, expected) and cube.dtype == hu.dtype


def test_rule_2_1_4_padding__a_cube_larger_than_the_volume_holds_it_once():
    """A volume smaller than the cube is padded on every side at once."""
    hu = noise((3, 4, 5))
    assert np.array_equal(preprocessing.cut(hu, (1, 2, 2), 12)[5:8, 4:8, 4:9], hu)


@pytest.mark.parametrize("centre", [(-500, 0, 0), (0, 500, 0), (0, 0, -500), (500, 500, 500)])
def test_rule_2_1_4_padding__far_outside_lies_air(centre):
    """A centre far outside gives a cube of -1000 HU, not an exception and not a border's voxels."""
    assert (preprocessing.crop_cube(Volume(noise((13, 15, 18)), np.zeros(3)), centre, 6) == -1000).all()


def distances(voxels, side, centre):
    """From a point to the nearest voxel box of each cube: (n,), over every voxel of every cube."""
    offsets = np.array(list(itertools.product(range(side), repeat=3))) - side // 2
    gaps = np.abs(voxels[:, None] + offsets - np.asarray(centre)) - 0.5
    return np.sqrt((np.maximum(gaps, 0) ** 2).sum(2).min(1))


@pytest.mark.parametrize("side", [4, 5])
def test_rule_2_1_4_negatives__meets_sphere_against_brute_force(side):
    """Whether cube and sphere meet is whether the nearest box of its voxels is nearer than the radius."""
    voxels = np.random.default_rng(2).integers(-12, 12, (3000, 3))
    for centre, radius in (((0.3, -1.2, 2.6), 4.2), ((0, 0, 0), 1.5), ((3.5, 0.1, -2.2), 7)):
        expected = distances(voxels, side, centre) < radius
        assert 0.01 < expected.mean() < 0.9
        assert np.array_equal(preprocessing.meets_sphere(voxels, side, centre, radius), expected)


LUNGS = np.argwhere(np.ones((20, 24, 30), bool)) * 2.0 + (30, 40, 50)      # a mask's voxels of 2 mm, in voxels of 1 mm
SPHERES = [((45.4, 60.3, 70.2), 6.0), ((60.0, 50.7, 90.1), 3.3), ((35.2, 80.5, 100.9), 10.4)]


def test_rule_2_1_4_negatives__no_draw_meets_a_nodule():
    """Of 10,000 cubes none comes nearer to any nodule's centre than its radius, by each voxel's own box."""
    drawn = preprocessing.draw_negatives(LUNGS, SPHERES, 6, 10000, np.random.default_rng(0))
    assert drawn.shape == (10000, 3) and drawn.dtype.kind == "i"
    nearest = [distances(drawn, 6, centre).min() - radius for centre, radius in SPHERES]
    assert min(nearest) >= 0 and max(nearest) < 1       # and none is kept farther away than it must


def test_rule_2_1_4_negatives__memory_is_that_of_what_is_wanted():
    """100,000 centres are 2.4 MB: no more than a handful of arrays of that size are held at a time."""
    tracemalloc.start()
    found = preprocessing.draw_negatives(LUNGS, [], 6, 100_000, np.random.default_rng(0))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.nbytes == 2_400_000 and peak < 10 * found.nbytes


def test_rule_2_1_4_negatives__uniform_over_the_lungs():
    """Every octant of unequal lungs has its share of 10,000 draws, within five standard deviations."""
    lungs = LUNGS[(LUNGS[:, 0] < 50) | (LUNGS[:, 1] < 60)]      # not a box: the octants' shares differ
    middle = (50, 64, 80)
    octant = lambda points: (points + 1e-9 >= middle) @ [4, 2, 1]
    share = np.bincount(octant(lungs), minlength=8) / len(lungs)
    count = np.bincount(octant(preprocessing.draw_negatives(lungs, [], 6, 10000, np.random.default_rng(0)) + 0.5),
                        minlength=8)
    assert np.abs(count - 10000 * share).max() < 5 * np.sqrt(10000 / 4) and np.ptp(share) > 0.05


def test_rule_2_1_4_negatives__every_voxel_of_1_mm_can_be_drawn():
    """Odd and even voxels come equally often along each axis, though the mask's are 2 mm apart."""
    drawn = preprocessing.draw_negatives(LUNGS + 0.3, [], 6, 10000, np.random.default_rng(0))
    assert np.abs((drawn % 2).mean(0) - 0.5).max() < 5 * np.sqrt(0.25 / 10000)


def test_rule_2_1_4_negatives__stays_within_a_voxel_of_the_mask():
    """A draw lies in a mask's voxel of 2 mm, so 1 mm at most from its centre before rounding."""
    drawn = preprocessing.draw_negatives(LUNGS, [], 6, 5000, np.random.default_rng(0))
    assert (drawn.min(0) == LUNGS.min(0) - 1).all() and (drawn.max(0) == LUNGS.max(0) + 1).all()


def test_rule_2_1_4_negatives__fewer_where_impossible():
    """Where a nodule fills the lungs there are none, and the search ends."""
    assert preprocessing.draw_negatives(LUNGS, [((50, 64, 80), 90.0)], 6, 10, np.random.default_rng(0)).shape == (0, 3)


def test_rule_2_1_4_negatives__found_where_they_are_rare():
    """Where one place in thirty is free, all that are asked for are still found."""
    spheres = [((50, 64, 80), 32.0)]
    drawn = preprocessing.draw_negatives(LUNGS, spheres, 6, 200, np.random.default_rng(0))
    assert len(drawn) == 200 and (distances(drawn, 6, spheres[0][0]) >= 32).all()


# 2.1.5 Train / validation / test split

def test_rule_2_1_5_split__70_10_20_of_100_patients():
    """100 patients part into 70, 10 and 20, each patient in one."""
    split = preprocessing.split_patients([f"P{i}" for i in range(100)], 0)
    assert len(split) == 100
    assert [list(split.values()).count(part) for part in ("train", "validation", "test")] == [70, 10, 20]


def test_rule_2_1_5_split__shares_are_those_of_the_thesis():
    """70%, 10% and 20%, the whole of the data."""
    assert preprocessing.SPLITS == {"train": 0.7, "validation": 0.1, "test": 0.2}


@pytest.mark.parametrize("count", [3, 4, 7])
def test_rule_2_1_5_split__one_each_of_few(count):
    """However few patients, three at least, no split is empty, and training has no less than another."""
    found = list(preprocessing.split_patients(map(str, range(count)), 1).values())
    assert min(map(found.count, preprocessing.SPLITS)) >= 1
    assert found.count("train") == max(map(found.count, preprocessing.SPLITS))


def test_rule_2_1_5_split__two_patients_are_refused():
    """Of two patients there are no three splits, however many scans they have."""
    with pytest.raises(Refusal, match="patients that can be used: 2 — training, validation and test"):
        preprocessing.split_patients(["a", "b", "a", "b"], 0)


def test_rule_2_1_5_split__a_patients_scans_count_once():
    """A patient with many scans is one patient of the shares."""
    patients = [f"P{i}" for i in range(10)]
    assert preprocessing.split_patients(patients + ["P3"] * 50, 0) == preprocessing.split_patients(patients, 0)


def test_rule_2_1_5_split__drawn_from_the_seed():
    """One seed gives one split, in whatever order the scans come; another seed gives another."""
    patients = [f"P{i}" for i in range(30)]
    assert preprocessing.split_patients(patients[::-1], 5) == preprocessing.split_patients(patients, 5)
    assert preprocessing.split_patients(patients, 6) != preprocessing.split_patients(patients, 5)


def test_rule_2_1_5_split__every_patient_may_come_into_any():
    """Over 200 seeds each patient is in test a fifth of the time, within five standard deviations: no order shows."""
    patients = [f"P{i}" for i in range(20)]
    times = [sum(preprocessing.split_patients(patients, seed)[patient] == "test" for seed in range(200))
             for patient in patients]
    assert np.abs(np.array(times) - 40).max() < 5 * np.sqrt(200 * 0.2 * 0.8)


# 2.1.6 Conventional data augmentation

CUBE = np.arange(24).reshape(2, 3, 4)


@pytest.mark.parametrize("flips, expected", [((True, False, False), CUBE[::-1]), ((False, True, False), CUBE[:, ::-1]),
                                             ((False, False, True), CUBE[:, :, ::-1]), ((False, False, False), CUBE),
                                             ((True, False, True), CUBE[::-1, :, ::-1])])
def test_rule_2_1_6_flip__mirrors_the_named_axes_alone(flips, expected):
    """The flags are along z, y, x, and an unnamed axis stays."""
    assert np.array_equal(preprocessing.flip(CUBE, flips), expected)


def test_rule_2_1_6_flip__twice_is_none():
    """Each flip is its own inverse."""
    assert all(np.array_equal(preprocessing.flip(preprocessing.flip(CUBE, flips), flips), CUBE)
               for flips in preprocessing.FLIPS)


def test_rule_2_1_6_all_flips__eight_distinct_the_first_the_cube_itself():
    """2³ mirror images along z, y, x, no two alike, the first unflipped."""
    cube = noise((5, 5, 5))
    mirrored = [cube[::a, ::b, ::c] for a in (1, -1) for b in (1, -1) for c in (1, -1)]
    assert np.array_equal(preprocessing.all_flips(cube), mirrored) and len({image.tobytes() for image in mirrored}) == 8


def test_rule_2_1_6_all_flips__with_flips_gives_each_row_each_flip_once():
    """n rows become 8n, every pair of a row and a flip once, a row's eight together."""
    rows, flips = preprocessing.with_flips(np.array([[0, 5, 6, 7], [3, 2, 1, 0]]))
    assert rows.tolist() == [[0, 5, 6, 7]] * 8 + [[3, 2, 1, 0]] * 8
    assert flips.tolist() == [*range(8)] * 2


# The prepared data, as the other stages use them

def test_read_cubes__are_normalize_of_flip_of_cut(dataset):
    """(n, 1, c, c, c) float32, each the cut at its row, flipped by its own flip, then scaled."""
    rows, flips = np.array([(0, 10, 12, 14), (1, 3, 20, 9), (0, 3, 20, 9)]), np.array([0, 3, 6])
    cubes = preprocessing.read_cubes(dataset, rows, flips)
    assert cubes.shape == (3, 1, 12, 12, 12) and cubes.dtype == np.float32
    for cube, (scan, *voxel), flips_of_one in zip(cubes, rows, flips):
        hu = preprocessing.cut(np.load(dataset.folder / f"{scan}.npy"), voxel, 12)
        assert np.array_equal(cube[0], preprocessing.normalize(preprocessing.all_flips(hu)[flips_of_one]))


def test_labelled__positives_in_all_flips_then_negatives_in_none(dataset):
    """What is scored: each positive eight times, label 1, then each negative once, unflipped, label 0."""
    rows, flips, labels = preprocessing.labelled(dataset, "train")
    assert labels.tolist() == [1] * 16 + [0] * 2 and flips.tolist() == [*range(8)] * 2 + [0] * 2
    assert (rows[labels == 1] == dataset.positives["train"].repeat(8, axis=0)).all()
    assert (rows[labels == 0] == dataset.negatives["train"]).all()


def test_read_cubes__are_as_they_are_without_flips(dataset):
    """No flips named means none made."""
    rows = dataset.positives["train"]
    assert np.array_equal(preprocessing.read_cubes(dataset, rows),
                          preprocessing.read_cubes(dataset, rows, np.zeros(2, int)))


# Table 1

def test_num_table_1__thesis_cut_cubes_at_exactly_70_10_20():
    """The erratum: Table 1 is exactly 70, 10 and 20% of 1,020 × 8 positives and 581,130 negatives: it cut cubes."""
    for split, tenths in (("train", 7), ("validation", 1), ("test", 2)):
        assert preprocessing.TABLE_1[split] == (1020 * 8 * tenths // 10, 581130 * tenths // 10)
        assert 1020 * 8 * tenths % 10 == 581130 * tenths % 10 == 0


def test_num_table_1__counts_with_flips_and_as_nodules():
    """Each split's positives count eight times as samples and once as nodules; negatives once."""
    scans = [{"split": split, "positives": [0] * p, "negatives": [0] * n} for split, p, n in
             (("train", 3, 20), ("test", 1, 7), ("train", 2, 15), ("validation", 0, 11))]
    counts = {split: (row["positive"], row["nodules"], row["negative"])
              for split, row in preprocessing.table_1(scans).items()}
    assert counts == {"train": (40, 5, 35), "validation": (0, 0, 11), "test": (8, 1, 7)}


# A scan, from its files to its cubes

UNSAFE = ["../x", "/abs", ".hid", "..", ".", "", "a/b", "a\\b", "1.2 3", "nul\0", "n\nl", "x" * 300, "x" * 301, "é",
          "è", "1.2.3é", "_1.2.3",
          "_a_00000000", "\udcff"]


@pytest.mark.parametrize("uid", UNSAFE)
def test_scan_name__never_leaves_the_folder(uid, tmp_path):
    """Whatever the UID, its file lies in the folder itself, is not hidden, and its name is short and plain."""
    name = preprocessing.scan_name(uid)
    assert (tmp_path / f"{name}.npy").resolve().parent == tmp_path.resolve()
    assert name and name.isascii() and not name.startswith(".")
    assert len(name) < 150 and not set(name) & set("/\\:\0\n *")


def test_scan_name__keeps_a_dicom_uid():
    """A UID as DICOM has it is its own name."""
    assert preprocessing.scan_name("1.3.6.1.4.1.14519.5.2.1") == "1.3.6.1.4.1.14519.5.2.1"


@pytest.mark.parametrize("uid", ["parameters", "dataset", "options", "nodules", "figure_2"])
def test_scan_name__is_none_of_our_own(uid):
    """A scan may be called anything: its files do not take the place of ours."""
    assert preprocessing.scan_name(uid) != uid


def test_scan_name__is_injective():
    """No two UIDs share a name, nor does one take the plain name that another has."""
    uids = [uid for uid in UNSAFE if uid != "\udcff"]
    uids += [preprocessing.scan_name(uid) for uid in uids]      # a UID that is another's safe name
    assert len({preprocessing.scan_name(uid) for uid in set(uids)}) == len(set(uids))


def test_scan_name__and_its_draws_take_any_file_name():
    """A file's name that is no UTF-8 (surrogates, in Python) has a name of its own and a random stream of its own."""
    streams = [lungaug.stream(0, "negatives", uid).random() for uid in ("\udcff", "\udcfe")]
    assert streams[0] != streams[1] and preprocessing.scan_name("\udcff") != preprocessing.scan_name("\udcfe")


PARAMETERS = {"cube": 12, "negatives": 6000, "seed": 0, "max_slice_mm": 9}


@pytest.fixture(scope="module")
def trunk(tmp_path_factory):
    """An oblique trunk with one box of lung, prepared: .scan, .record, .folder, .source, .nodules, .whole (at 1 mm)."""
    folder = tmp_path_factory.mktemp("trunk")
    hu = np.full((52, 66, 75), -1000, np.int16)
    hu[:, 6:-6, 6:-6] = noise((52, 54, 63)) // 20
    hu[10:42, 16:48, 18:58] = -850 + noise((32, 32, 40)) // 20
    direction = np.round(turn(2, 8) @ turn(0, -6) @ np.diag([-1, 1, 1]), 10)
    made = phantom.Phantom("1.2.3", "", hu, (3.1, 3.7, 4.3), (141.3, -77.9, 33.7), direction, [], None, None)
    scan = scan_of(hu, direction, made.spacing, made.origin)
    centres = [scan.origin + direction @ (scan.spacing * index)
               for index in ((27.3, 24.4, 16.2), (48.6, 24.7, 17.4), (28.2, 39.3, 33.6), (47.7, 39.9, 34.8))]
    nodules = [(*centre.tolist(), diameter) for centre, diameter in zip(centres, (31.3, 24.2, 17.6, 28.9))]
    source = Source("1.2.3", "1.2.3", (phantom.write_metaimage(folder, made),))
    record = preprocessing.prepare_scan(source, nodules, folder, PARAMETERS)
    return SimpleNamespace(scan=scan, record=record, folder=folder, source=source, nodules=nodules,
                           whole=preprocessing.resample(scan))


def centres_of(record, kind):
    """Where a record's cubes have their centre voxels, in mm (x, y, z)."""
    return np.array(record["origin"]) + np.array(record[kind])[:, ::-1]


def test_rule_2_1_4_centre__a_prepared_positive_is_at_its_annotation(trunk):
    """After cropping to the lungs, each positive's centre voxel is half a voxel at most from its annotation."""
    wanted = np.array(trunk.nodules)[:, :3]
    assert np.abs(centres_of(trunk.record, "positives") - wanted).max() <= 0.5 + 1e-9


def test_rule_2_1_4_negatives__a_prepared_negative_meets_no_nodule(trunk):
    """In millimetres, at the annotated places, not those rounded to voxels: no cube of 12 mm meets a sphere."""
    drawn = centres_of(trunk.record, "negatives")
    assert len(drawn) == 6000
    for *centre, diameter in trunk.nodules:
        low, high = drawn - 6.5, drawn + 5.5
        gaps = np.clip(centre, low, high) - centre
        assert np.sqrt((gaps ** 2).sum(1)).min() >= diameter / 2


def test_rule_2_1_4_negatives__a_prepared_negative_is_in_the_lungs(trunk):
    """Seen from the scan's own voxels, negatives fill the box of lung and stay in it, to the mask's 2 mm."""
    index = index_in(trunk.scan, centres_of(trunk.record, "negatives"))
    low, high, mm = np.array([18, 16, 10]), np.array([57, 47, 41]), 3.5 / trunk.scan.spacing
    assert (index > low - mm).all() and (index < high + mm).all()
    assert (index.min(0) < low + mm).all() and (index.max(0) > high - mm).all()


@pytest.mark.parametrize("kind", ["positives", "negatives"])
def test_rule_2_1_4_padding__only_past_the_scans_edge(trunk, kind):
    """The stored part is large enough: each cube cut from it is the one cut from the whole scan, no air put in."""
    stored = np.load(trunk.folder / trunk.record["volume"])
    shift = np.rint(np.array(trunk.record["origin"]) - trunk.whole.origin).astype(int)[::-1]
    wrong = [voxel for voxel in trunk.record[kind] if not np.array_equal(
        preprocessing.cut(stored, voxel, 12), preprocessing.cut(trunk.whole.hu, np.array(voxel) + shift, 12))]
    assert not wrong


def test_prepare_scan__litres_are_those_of_the_box(trunk):
    """The record's litres are the box's, to 5%."""
    assert abs(trunk.record["litres"] / (32 * 32 * 40 * 3.1 * 3.7 * 4.3e-6) - 1) < 0.05


def test_prepare_scan__a_nodule_between_an_oblique_scan_and_its_grids_corner_is_outside(trunk, tmp_path):
    """The 1 mm grid's box is larger than an oblique scan: its corners hold no voxel, and no nodule."""
    corner = preprocessing.grid(trunk.scan)[0] + 3
    with pytest.raises(Refusal, match="outside"):
        preprocessing.prepare_scan(trunk.source, [(*corner.tolist(), 5.0)], tmp_path, PARAMETERS)


@pytest.mark.parametrize("change, says", [({"max_slice_mm": 4.2}, "4.3 mm"), ({}, "outside")])
def test_prepare_scan__refuses(trunk, change, says, tmp_path):
    """Slices too far apart, or an annotation outside the scan, are refused with what was found."""
    with pytest.raises(Refusal, match=says):
        preprocessing.prepare_scan(trunk.source, [*trunk.nodules, (999.0, 0.0, 0.0, 5.0)], tmp_path,
                                   PARAMETERS | change)
    assert not list(tmp_path.glob("*.npy"))


@pytest.mark.parametrize("hu, says", [(np.full((30, 40, 40), 40), "litres of lung"),
                                      (box((40, 60, 60), ((0, 12, 12), (30, 48, 48))), "cut at an end")])
def test_prepare_scan__refuses_what_is_no_whole_chest(tmp_path, hu, says):
    """A scan without lungs, and one that cuts them, are refused."""
    made = phantom.Phantom("1.2.3", "", hu.astype(np.int16), (3, 3, 3), (0, 0, 0), np.eye(3), [], None, None)
    source = Source("1.2.3", "1.2.3", (phantom.write_metaimage(tmp_path, made),))
    with pytest.raises(Refusal, match=says):
        preprocessing.prepare_scan(source, [], tmp_path / "out", PARAMETERS)


def panes_of(monkeypatch, hu, *rest):
    """scan_picture's three planes as pixels (rows, columns, 3), each without its margin: axial, coronal, sagittal."""
    monkeypatch.setattr(lungaug, "png", lambda pixels, factor: pixels)
    sheet, panes, left = preprocessing.scan_picture(hu, *rest), [], 2
    for rows, columns in np.delete(np.tile(hu.shape, (3, 1)).ravel(), [0, 4, 8]).reshape(3, 2):
        panes.append(sheet[:rows, left:left + columns])
        left += columns + 4
    return panes


def coloured(pane, colour):
    """Where a pane has more of a colour (0 red, 1 green) than of the others: (n, 2), row and column."""
    others = np.delete(pane, colour, axis=2).max(2)
    return np.argwhere(pane[..., colour] > others.astype(int) + 100)


def test_scan_picture__rings_the_largest_nodule_in_its_three_planes(monkeypatch):
    """A green ring a voxel outside the nodule, in each plane through its centre; superior is up; others elsewhere."""
    hu, lungs = np.full((40, 44, 48), -850, np.int16), np.ones((40, 44, 48), bool)
    panes = panes_of(monkeypatch, hu, lungs, np.array([[8.0, 8, 8], [28, 30, 34]]), np.array([3.0, 6]))
    for pane, centre in zip(panes, ((30, 34), (39 - 28, 34), (39 - 28, 30))):
        away = np.linalg.norm(coloured(pane, 1) - np.array(centre), axis=1)
        assert len(away) > 30 and away.min() >= 7 and away.max() < 8.1


def test_scan_picture__outlines_the_lungs(monkeypatch):
    """Red are the outermost voxels of the mask and no others; without a nodule the planes pass through the lungs."""
    hu, lungs = np.full((40, 44, 48), 40, np.int16), np.zeros((40, 44, 48), bool)
    lungs[10:30, 12:32, 6:42] = True
    for pane, sides in zip(panes_of(monkeypatch, hu, lungs, np.zeros((0, 3)), np.zeros(0)),
                           ((20, 36), (20, 36), (20, 20))):
        red = coloured(pane, 0)
        assert len(red) == 2 * sum(sides) - 4 and np.array_equal(np.ptp(red, axis=0) + 1, sides)
        assert len(coloured(pane, 1)) == 0


def test_prepare_scan__its_picture_has_each_nodule_where_it_is_annotated(trunk, tmp_path, monkeypatch):
    """Rings' centres and radii, in voxels of 2 mm on the scan's own axes, are the annotations' millimetres."""
    told, own = [], preprocessing.reorient(trunk.scan)
    monkeypatch.setattr(preprocessing, "scan_picture", lambda *rest: told.extend(rest) or b"")
    preprocessing.prepare_scan(trunk.source, trunk.nodules, tmp_path, PARAMETERS)
    _, _, centres, radii = told
    found = [own.origin + own.direction @ (2 * centre[::-1]) for centre in centres]
    assert np.abs(np.column_stack([found, 4 * radii]) - trunk.nodules).max() < 1e-6


# The command

WORDS = ("--cube", "12", "--negatives", "20", "--workers", "1", "--max-slice-mm", "9")


def prepare(folder, *words):
    """Run preprocessing.py in a folder as a user would, with a home that must stay empty."""
    (folder / "home").mkdir(exist_ok=True)
    settings = os.environ | {"HOME": str(folder / "home"), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, ROOT / "preprocessing.py", *map(str, words)], cwd=folder, env=settings,
                          capture_output=True, text=True)


def contents(folder):
    """Every file below a folder, its path → its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


BROKEN = "NDims = 3\nDimSize = 9 9 9\nElementSpacing = 1 1 1\nElementType = MET_SHORT\nElementDataFile = bad.raw\n"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Four coarse scans of three patients and one cut short, prepared: .folder, .before (its files then), .done, .info.

    The broken one's name, which is its series UID, holds a terminal's code.
    """
    folder = tmp_path_factory.mktemp("command")
    phantom.write_scans(folder / "scans", 4, scale=3)
    (folder / "scans/bad\x1b[31m.mhd").write_text(BROKEN)
    (folder / "scans/bad.raw").write_bytes(bytes(100))
    before = contents(folder)
    done = prepare(folder, "--scans", folder / "scans", "--run", "R", *WORDS)
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(folder=folder, before=before, done=done,
                           info=json.loads((folder / "R/prepared/dataset.json").read_bytes()))


@pytest.fixture
def again(finished, tmp_path):
    """A copy of the run, to be changed."""
    shutil.copytree(finished.folder / "R", tmp_path / "R")
    return tmp_path


def annotations(folder):
    with open(folder / "scans/annotations.csv", newline="") as file:
        rows = list(csv.reader(file))[1:]
    return {uid: [[float(cell) for cell in row[1:]] for row in rows if row[0] == uid]
            for uid in sorted({row[0] for row in rows})}


def products(folder):
    """The bytes of every volume, record and dataset.json."""
    return {name: data for name, data in contents(folder / "R/prepared").items() if name.endswith(".npy")
            or name[0].isdigit() or name == "dataset.json"}


def one_line(done, *words):
    """Whether a command ended with status 2 and a last line on stderr, formed as a Refusal, that holds the words."""
    *others, line = done.stderr.strip().split("\n")
    return (done.returncode == 2 and not any("Traceback" in other for other in others)
            and line.startswith("lungaug: ") and " — " in line and all(word in line for word in words))


def test_command__dataset_json_holds_every_scan_and_annotation(finished):
    """Each scan once, in order; each annotation a positive at its place; 20 negatives each."""
    scans, wanted = finished.info["scans"], annotations(finished.folder)
    assert [scan["seriesuid"] for scan in scans] == sorted(wanted)
    for scan in scans:
        rows = np.array(wanted[scan["seriesuid"]])
        assert np.abs(centres_of(scan, "positives") - rows[:, :3]).max() <= 0.5 + 1e-6
        assert scan["diameters"] == rows[:, 3].tolist() and len(scan["negatives"]) == 20 and 2 < scan["litres"] < 8
    assert finished.info["preset"] == "thesis"
    assert not finished.info["synthetic"] and finished.info["parameters"]["cube"] == 12


def test_rule_2_1_5_split__two_series_of_one_patient_land_in_one(finished):
    """Two of the four series are one patient's: they share a split, and the three patients fill the three."""
    scans = finished.info["scans"]
    of = {patient: {scan["split"] for scan in scans if scan["patient"] == patient}
          for patient in {scan["patient"] for scan in scans}}
    assert len(scans) == 4 and len(of) == 3 and all(len(splits) == 1 for splits in of.values())
    assert set.union(*of.values()) == {"train", "validation", "test"}


def test_num_table_1__of_a_run_counts_its_cubes(finished):
    """The run's Table 1 adds up to all annotations, eight times with flips, and all negatives; it is printed."""
    table = finished.info["table_1"].values()
    nodules = sum(map(len, annotations(finished.folder).values()))
    assert sum(row["nodules"] for row in table) == nodules and sum(row["positive"] for row in table) == 8 * nodules
    assert sum(row["negative"] for row in table) == 80 and "Table 1" in finished.done.stdout


def test_command__volumes_are_the_scans_at_1_mm(finished):
    """A stored volume is its scan's clipped HU at 1 mm where the record says, interpolated here: half a unit."""
    source = preprocessing.find_scans(finished.folder / "scans")[0]
    record, scan = finished.info["scans"][0], preprocessing.read_source(source)
    volume = np.load(finished.folder / "R/prepared" / record["volume"])
    assert volume.dtype == np.int16 and volume.min() >= -1000 and volume.max() <= 400
    voxels = np.random.default_rng(0).integers(0, volume.shape, (5000, 3))
    index = index_in(scan, np.array(record["origin"]) + voxels[:, ::-1])[:, ::-1]
    exact = ndimage.map_coordinates(np.clip(scan.hu, -1000, 400).astype(float), index.T, order=1, mode="grid-constant",
                                    cval=-1000)
    assert np.abs(volume[tuple(voxels.T)] - exact).max() < 0.51


def test_command__writes_nothing_outside_the_run(finished):
    """Scans and home folder are as they were; all new files lie under --run."""
    now = contents(finished.folder)
    assert {name: now.get(name) for name in finished.before} == finished.before
    assert all(name.startswith("R/prepared/") for name in set(now) - set(finished.before))


def test_command__open_dataset_reads_it_back(finished):
    """What the other stages open has each split's rows, and cubes of the asked side in [-1, 1]."""
    dataset = preprocessing.open_dataset(finished.folder / "R")
    for split, row in finished.info["table_1"].items():
        assert (len(dataset.positives[split]), len(dataset.negatives[split])) == (row["nodules"], row["negative"])
    cubes, labels = train_gan.draw_batch(dataset, 6, np.random.default_rng(0))
    assert cubes.shape == (6, 1, 12, 12, 12) and np.abs(cubes).max() <= 1 and cubes.std() > 0.05


def test_command__again_keeps_every_byte_and_remakes_what_is_gone(finished, again):
    """Run twice, with a volume removed and another cut short: the rest is not touched, those two come back the same."""
    before, (gone, short, *whole) = products(again), sorted((again / "R/prepared").glob("*.npy"))
    gone.unlink()
    short.write_bytes(short.read_bytes()[:-1000])
    times = {path: path.stat().st_mtime_ns for path in whole}
    done = prepare(again, "--scans", finished.folder / "scans", "--run", "R", *WORDS)
    assert done.returncode == 0, done.stderr
    assert products(again) == before and times == {path: path.stat().st_mtime_ns for path in whole}


def test_command__another_cube_is_refused(finished, again):
    """A run keeps its parameters: --cube 24 is one line on stderr, status 2, and changes nothing."""
    before = contents(again)
    done = prepare(again, "--scans", finished.folder / "scans", "--run", "R", *WORDS, "--cube", "24")
    assert one_line(done, "cube 12, not 24") and len(done.stderr.strip().split("\n")) == 1 and contents(again) == before


def test_command__other_annotations_do_not_pass_for_the_old(finished, again):
    """Done means done with this input: with annotations.csv mended, the old positives are refused or made again."""
    path = again / "mended.csv"
    path.write_text("".join((finished.folder / "scans/annotations.csv").read_text().splitlines(keepends=True)[:-1]))
    done = prepare(again, "--scans", finished.folder / "scans", "--annotations", path, "--run", "R", *WORDS)
    found = sum(len(scan["positives"])
                for scan in json.loads((again / "R/prepared/dataset.json").read_bytes())["scans"])
    assert one_line(done, "annotations") or found == sum(map(len, annotations(finished.folder).values())) - 1


def test_command__a_broken_scan_is_left_out_with_its_reason(finished):
    """The others are prepared; dataset.json and the command say which was left out and why."""
    (left,) = finished.info["left_out"]
    assert left["seriesuid"].startswith("bad") and "bad.raw" in left["reason"] and "100 bytes" in left["reason"]
    assert "bad.raw" in finished.done.stdout and len(finished.info["scans"]) == 4


def test_command__a_uid_cannot_steer_the_terminal(finished):
    """A terminal's code in a file's name is not printed as it is."""
    assert "bad" in finished.done.stderr and "\x1b" not in finished.done.stdout + finished.done.stderr


def test_command__strict_makes_a_broken_scan_fatal(finished, again):
    """--strict: status 2 and a line that names the file; no dataset.json that would pass for whole."""
    (again / "R/prepared/dataset.json").unlink()
    done = prepare(again, "--scans", finished.folder / "scans", "--run", "R", *WORDS, "--strict")
    assert one_line(done, "bad.raw", "100 bytes") and not (again / "R/prepared/dataset.json").exists()


# Real scans

REAL = os.environ.get("LUNGAUG_LUNA16_MINI", "")
DENSE = {"179049373636438705059720603192": [86], "170706757615202213033480003264": [17, -222, -1],
         "272348349298439120568330857680": [144]}       # mean HU of 3×3×3 voxels at each nodule, from the scans' README


@pytest.mark.skipif(not REAL, reason="LUNGAUG_LUNA16_MINI names no folder of real scans")
def test_real_scans__nodules_are_where_they_were(tmp_path):
    """Every annotation a positive; 2 to 8 litres; as dense at its centre as in the scan, to what 1 mm blurs (40 HU)."""
    annotated = preprocessing.read_annotations(Path(REAL) / "annotations.csv")
    sources = preprocessing.find_scans(REAL)
    assert sorted(source.seriesuid.split(".")[-1] for source in sources) == sorted(DENSE)
    for source in sources:
        nodules, scan = annotated[source.seriesuid], preprocessing.read_source(source)
        record = preprocessing.prepare_scan(source, nodules, tmp_path,
                                            {"cube": 48, "negatives": 50, "seed": 0, "max_slice_mm": 2.5})
        assert len(record["positives"]) == len(nodules) and 2 < record["litres"] < 8 and len(record["negatives"]) == 50
        volume = np.load(tmp_path / record["volume"])
        for nodule, dense in zip(nodules, DENSE[source.seriesuid.split(".")[-1]]):
            near = np.rint(index_in(scan, np.array([nodule[:3]]))).astype(int) + indices((3, 3, 3)) - 1
            assert abs(scan.hu[tuple(near[:, ::-1].T)].mean() - dense) <= 0.5
            points = scan.origin + near @ (scan.direction * scan.spacing).T - record["origin"]
            assert abs(ndimage.map_coordinates(volume.astype(float), points[:, ::-1].T, order=1).mean() - dense) < 40
