"""Synthetic chest CT scans in the formats of LUNA16, for the demo and the tests.

    python tests/phantom.py --run runs/demo --scans-count 30 --workers 2      # 1 to 2 s a scan

The same command resumes where it was stopped.

LUNA16 is large and not ours to ship, so this file draws chests: body, bones, heart, lungs with
their vessels and airways, nodules that are annotated and look-alikes that are not.

Frames. All anatomy is written in millimetres in the patient's axes (LPS: x to the left, y to the
back, z to the head) of a standard body with its origin near the carina. A patient is that body
stretched and moved. A grid, with any direction matrix, only samples it. Arrays are (z, y, x).

Names. hu is the volume, in HU; lung and cage are volumes of distances in mm to the surface of the
lungs and of the chest cavity, negative inside. `where` is the slices (z, y, x) of a box of voxels,
`position` the x, y and z of these voxels. A tube is (start, end, start radius, end radius).
"""

import argparse
import os
import shutil
import sys
from concurrent.futures import FIRST_COMPLETED, wait
from pathlib import Path
from typing import NamedTuple


sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import lungaug

import numpy as np
from scipy import ndimage
from scipy.spatial import KDTree

from scan_files import make_uid, write_annotations, write_dicom, write_metaimage, write_truth


# Grey values, HU
AIR = -1000
FAT = -105
MUSCLE = 55
CORTEX = 560
MARROW = 190

# An edge fades over this many mm: half of it is the scanner's, half a voxel's.
SOFT = 1.6

# Top, bottom and half the width of the lungs, mm
APEX = 98
FLOOR = -152
HALF_WIDTH = 132

# The diagonal of each index's direction, in turn. Odd indices become DICOM, whose slices have no
# order of their own, so only right-handed directions stand there.
STRAIGHT = (1, 1, 1)
TURNED = (-1, -1, 1)
REVERSED = (1, 1, -1)
OBLIQUE = None
DIRECTIONS = [STRAIGHT, STRAIGHT, TURNED, TURNED, OBLIQUE, STRAIGHT,
              REVERSED, OBLIQUE, STRAIGHT, STRAIGHT, REVERSED, TURNED]


class Nodule(NamedTuple):
    """A nodule, with what annotations.csv says of it."""
    centre: tuple           # (x, y, z), world mm
    diameter: float         # mm
    shape: str              # "round", "lobulated" or "spiculated"
    texture: str            # "solid" or "ground-glass"
    site: str               # "isolated", "vessel" or "pleura"


class Phantom(NamedTuple):
    """A scan with its truth; hu, lungs and nodule_labels are (z, y, x) in the file's order."""
    seriesuid: str
    patient: str
    hu: np.ndarray          # int16
    spacing: tuple          # (x, y, z), mm
    origin: tuple           # (x, y, z) of voxel (0, 0, 0), mm
    direction: np.ndarray   # (3, 3), LPS, columns = the x, y, z index axes
    nodules: list
    lungs: np.ndarray       # bool, all inside the pleura: vessels, airways and nodules too
    nodule_labels: np.ndarray   # uint8, 0 = none, i + 1 = nodules[i]; clipped at the pleura


class Grid(NamedTuple):
    """Where a scan's voxels lie: position = origin + step @ (x, y, z index), in mm."""
    shape: tuple            # (z, y, x)
    step: np.ndarray        # (3, 3), columns = one voxel along x, y, z
    origin: np.ndarray      # (x, y, z)

    def in_body(self, position, size):
        """The same voxels in the standard body's frame, which `size` stretches to the patient's."""
        return Grid(self.shape, self.step / size[:, None], (self.origin - position) / size)

    def slabs(self, thick=6):
        """Parts of a few slices, (slice of z, Grid): a whole volume does not fit the cache."""
        for k in range(0, self.shape[0], thick):
            shape = (min(thick, self.shape[0] - k), *self.shape[1:])
            yield slice(k, k + thick), Grid(shape, self.step, self.origin + self.step[:, 2] * k)

    def box(self, low=None, high=None, margin=4.0):
        """`where` and `position` of the voxels around the corners low, high (x, y, z); all without.

        The three coordinates broadcast to the box; where the axes are straight each is a line.
        """
        # Find the first index and the one behind the last, (x, y, z).
        first = np.zeros(3, int)
        last = np.array(self.shape[::-1])
        if low is not None:
            inverse = np.linalg.inv(self.step)
            middle = inverse @ (np.add(low, high) / 2 - self.origin)
            reach = np.abs(inverse) @ (np.subtract(high, low) / 2 + margin)
            first = np.clip(np.floor(middle - reach).astype(int), 0, last)
            last = np.clip(np.ceil(middle + reach).astype(int) + 1, first, last)
        where = tuple(slice(a, b) for a, b in zip(first[::-1], last[::-1]))

        # Multiply only what is not zero, so that a straight axis stays a line.
        i, j, k = (np.arange(a, b, dtype=np.float32) for a, b in zip(first, last))
        axes = (i, j[:, None], k[:, None, None])
        position = []
        for row, start in zip(self.step.astype(np.float32), self.origin.astype(np.float32)):
            terms = [axis * weight for axis, weight in zip(axes, row) if abs(weight) > 1e-9]
            position.append(start + sum(terms[1:], terms[0]))
        return where, position

    def points(self, flat):
        """Positions (n, 3), x y z, of flat voxel indices (n,)."""
        indices = np.stack(np.unravel_index(flat, self.shape)[::-1], 1)
        return indices @ self.step.T + self.origin


# Shapes, as distances to their surfaces in mm: negative inside, exact only near the surface

def egg(position, half_width, front, back, flat, top=None):
    """Distance to a trunk: oval sections, `flat` mm straight at front and back, domed to `top`."""
    x, y, z = position
    wide = half_width - flat
    deep = (back - front) / 2
    u = (np.maximum(np.abs(x) - flat, 0) / wide) ** 2
    v = ((y - (front + back) / 2) / deep) ** 2

    # The dome begins 20 mm above the origin.
    w = np.float32(0)
    dome_slope = 0
    if top:
        w = np.maximum((z - 20) / (top - 20), 0) ** 2
        dome_slope = w / (top - 20) ** 2

    slope = u / wide ** 2 + (v / deep ** 2 + dome_slope)
    np.sqrt(slope, out=slope)
    slope += 1e-3
    return (u + (v + w - 1)) / slope * np.float32(0.5)


def ellipsoid(position, centre, radii, turn=0.0):
    """Distance to an ellipsoid turned by `turn` degrees about z; infinite radii make a cylinder."""
    x, y, z = (p - c for p, c in zip(position, centre))
    if turn:
        cos = np.cos(np.radians(turn))
        sin = np.sin(np.radians(turn))
        x, y = x * cos + y * sin, y * cos - x * sin

    u, v, w = ((p / radius) ** 2 for p, radius in zip((x, y, z), radii))
    slope = np.sqrt(u / radii[0] ** 2 + v / radii[1] ** 2 + w / radii[2] ** 2) + 1e-3
    return ((u + v + w - 1) / slope * 0.5).astype(np.float32)


def capsule(position, start, end, start_radius, end_radius):
    """Distance to a tapering round rod from start to end (x, y, z)."""
    x, y, z = (p - np.float32(s) for p, s in zip(position, start))
    axis = np.subtract(end, start).astype(np.float32)

    # Where along the rod, 0 to 1, the nearest point of its axis lies.
    along = (x * axis[0] + y * axis[1] + z * axis[2]) / max(float(axis @ axis), 1e-6)
    along = np.clip(along, 0, 1)
    square = (x - along * axis[0]) ** 2 + (y - along * axis[1]) ** 2 + (z - along * axis[2]) ** 2
    return np.sqrt(square) - (start_radius + along * np.float32(end_radius - start_radius))


def slice_of(shape, z, middle, half):
    """Distance to what lies of a shape within `half` mm of the height `middle`."""
    return np.maximum(shape, np.abs(z - middle) - half)


def polyline(points, *radii):
    """Tubes through points, their radii from the first of `radii` to the last."""
    radii = np.linspace(radii[0], radii[-1], len(points))
    return list(zip(points[:-1], points[1:], radii[:-1], radii[1:]))


# Painting shapes into a volume

def paint(hu, where, distance, value):
    """Blend `value` into hu[where] where distance < 0, with an edge SOFT mm wide."""
    cover = distance * np.float32(-1 / SOFT)
    cover += 0.5
    np.clip(cover, 0, 1, out=cover)
    cover *= value - hu[where]
    hu[where] += cover


def push(lung, where, distance, gap):
    """Move the lungs' surface `gap` mm away from a shape."""
    np.maximum(lung[where], gap - distance, out=lung[where])


def paint_ellipsoid(hu, grid, centre, radii, value, turn=0.0, lung=None, gap=2.0):
    """Paint an ellipsoid of one grey value, which keeps the lungs `gap` mm away."""
    reach = max(radii[:2]) if turn else np.array(radii)
    where, position = grid.box(np.subtract(centre, reach), np.add(centre, reach))
    distance = ellipsoid(position, centre, radii, turn)
    paint(hu, where, distance, value)
    if lung is not None:
        push(lung, where, distance, gap)


def paint_tubes(hu, grid, tubes, value, lung=None, gap=2.0, only=None):
    """Paint tubes of one grey value, which keep the lungs `gap` mm away.

    only: np.maximum leaves what is brighter as it is, np.minimum what is darker.
    """
    for start, end, start_radius, end_radius in tubes:
        radius = max(start_radius, end_radius)
        low = np.minimum(start, end) - radius
        high = np.maximum(start, end) + radius
        where, position = grid.box(low, high, 2.0)
        distance = capsule(position, start, end, start_radius, end_radius)

        tube_value = value
        if only:
            tube_value = only(hu[where], np.float32(value))
        paint(hu, where, distance, tube_value)
        if lung is not None:
            push(lung, where, distance, gap)


# The chest cavity of the standard body

def chest_front(z):
    """y of the front of the chest cavity: it leans back towards the neck."""
    return -84 + 0.16 * np.maximum(z + 50, 0)


def chest_back(z):
    """y of the back of the chest cavity: it follows the spine's curve."""
    return 84 - 0.0010 * (z + 10) ** 2


def chest_wall(grid):
    """Distance to the inner surface of ribs and spine, which continues below the diaphragm."""
    position = grid.box()[1]
    z = position[2]
    curvature = np.where(z > -70, np.float32(0.0014), np.float32(0.0004))
    half_width = HALF_WIDTH - curvature * (z + 70) ** 2
    wall = egg(position, half_width, chest_front(z), chest_back(z), 25, APEX)

    # The vertebrae stand out into the cavity.
    where, (x, y, z) = grid.box((-40, 20, -1000), (40, 130, 1000))
    in_front = np.minimum(y - chest_back(z) - 4, 0)
    spine = 33 - np.sqrt(x ** 2 + (in_front * 0.85) ** 2)
    np.maximum(wall[where], spine, out=wall[where])
    return wall


def diaphragm(position):
    """Distance above (negative) or below the two domes of the diaphragm; the right is higher."""
    right_dome = diaphragm_dome(position, -66, -72)
    left_dome = diaphragm_dome(position, 66, -82)
    height = np.maximum(np.maximum(right_dome, left_dome), FLOOR)
    return (height - position[2]) * np.float32(0.7)


def diaphragm_dome(position, middle, top):
    """z of a dome of the diaphragm whose highest point lies at x = middle, z = top."""
    x, y, _ = position
    square = ((x - middle) / 72) ** 2 + ((y + 12) / 80) ** 2
    return top - 75 * square / (1 + square / 3)


# What lies around the lungs

def draw_table(hu, grid, back):
    """The couch: a closed curved shell of carbon fibre around foam; `back` is y of the skin."""
    where, position = grid.box((-260, back - 90, -1000), (260, back + 60, 1000))
    x, y, _ = position
    top = back + 3 - x ** 2 / 1000
    bottom = back + 30 - x ** 2 / 520
    shell = np.maximum(np.maximum(top - y, y - bottom), np.abs(x) - 195)
    shell = np.broadcast_to(shell, hu[where].shape)
    paint(hu, where, shell, -150)
    paint(hu, where, shell + 2.2, -900)


def skin_surface(grid, position, person):
    """Distance to the skin, with breasts in half of the patients."""
    z = position[2]
    shoulders = 170 + 14 / (1 + np.exp(-(z - 55) / 12))
    skin = egg(position, shoulders, chest_front(z) - 24 - person.fat, 116, 50)
    if person.breasts:
        for side in (-80, 80):
            near, local = grid.box((side - 65, -160, -95), (side + 65, -40, 45))
            breast = ellipsoid(local, (side, -92, -28), (62, 36, 62))
            np.minimum(skin[near], breast, out=skin[near])
    return skin


def draw_body(hu, grid, person, cage):
    """Skin, the fat under it, muscle, and the fat between the muscles' layers."""
    where, position = grid.box()
    skin = skin_surface(grid, position, person)
    paint(hu, where, skin, -10)
    paint(hu, where, skin + 2, FAT)

    # The fat under the skin is thicker at the sides.
    inside_fat = skin + person.fat * (0.7 + 0.5 * (position[0] / 170) ** 2)
    trunk = ellipsoid(position, (0, 0, 0), (175, 103, np.inf))
    paint(hu, where, np.maximum(inside_fat, trunk), MUSCLE)

    # A layer of fat lies between the muscles, another one around the cavity, more in the armpits.
    between_muscles = np.maximum(np.abs(cage - 15) - 1.4, inside_fat + 3)
    paint(hu, where, between_muscles, FAT + 30)
    paint(hu, where, cage, FAT + 45)
    for side in (-134, 134):
        paint_ellipsoid(hu, grid, (side, 5, 78), (17, 34, 52), FAT)


def draw_spine(hu, grid, lung):
    """Fourteen vertebrae, 24 mm apart, and the spinal cord."""
    for level in range(-8, 6):
        draw_vertebra(hu, grid, lung, level * 24 + 8)
    cord = [(0, chest_back(z) - 10, z) for z in range(-200, 141, 20)]
    paint_tubes(hu, grid, polyline(cord, 9), 25)


def draw_vertebra(hu, grid, lung, z):
    """A vertebra at the height z: body with its discs, arch, transverse and spinous processes."""
    y = chest_back(z) - 31
    where, position = grid.box((-22, y - 20, z - 12), (22, y + 20, z + 12), 5)
    column = ellipsoid(position, (0, y, z), (19, 15.5, np.inf))
    push(lung, where, column, 4)

    # The discs are what the bone leaves of the column.
    paint(hu, where, slice_of(column, position[2], z, 13), 85)
    bone = slice_of(column, position[2], z, 9.5)
    paint(hu, where, bone, CORTEX - 100)
    paint(hu, where, bone + 2, MARROW)

    pedicles = [((side * 13, y + 15, z), (side * 10.4, y + 27, z), 4, 4) for side in (-1, 1)]
    transverse = [((side * 10, y + 27, z), (side * 34, y + 33, z + 2), 5, 4) for side in (-1, 1)]
    laminae = [((side * 10, y + 27, z), (0, y + 38, z - 4), 4, 4) for side in (-1, 1)]
    spinous = [((0, y + 38, z - 4), (0, y + 58, z - 18), 4, 3)]
    paint_tubes(hu, grid, pedicles + transverse + laminae + spinous, CORTEX - 150)


def draw_ribs(hu, grid, cage):
    """Twelve pairs of tilted arcs just outside the cavity, cartilage towards the sternum."""
    flat = np.flatnonzero((cage > 0) & (cage < 14))
    x, y, z = grid.points(flat).astype(np.float32).T

    # The angle is 0 at the spine and 1 at the sternum; a rib sinks on its way there.
    angle = np.arctan2(np.abs(x) - 8, y - 5) / np.pi
    level = (z + 68 * np.clip(angle, 0, 1) ** 1.3 - 8) / 24
    height = (level - np.round(level)) * 24 * 0.85

    # A rib's section is an oval; between spine and apex there is none.
    depth = cage.flat[flat] - 6.5
    distance = (np.sqrt((depth / 4.2) ** 2 + (height / 6.5) ** 2) - 1) * 4.6
    distance = np.maximum(distance, np.maximum(12 - np.abs(x), z - APEX + 6))

    values = hu.flat[flat]
    is_cartilage = angle > 0.80
    shell = np.where(is_cartilage, np.float32(110), np.float32(CORTEX - 60))
    core = np.where(is_cartilage, np.float32(130), np.float32(MARROW))
    paint(values, ..., distance, shell)
    paint(values, ..., distance + 1.8, core)
    hu.flat[flat] = values


def draw_girdle(hu, grid):
    """Sternum, clavicles and shoulder blades (the arms are raised, out of view)."""
    draw_sternum_part(hu, grid, -12, 50, 17)
    draw_sternum_part(hu, grid, 58, 17, 26)
    for side in (-1, 1):
        draw_clavicle(hu, grid, side)
        draw_shoulder_blade(hu, grid, side)


def draw_sternum_part(hu, grid, middle, half, wide):
    """A part of the sternum: `half` mm up and down from z = middle, `wide` mm to both sides."""
    where, (x, y, z) = grid.box((-wide, -110, middle - half), (wide, -60, middle + half))
    plate = ellipsoid((x, y - chest_front(z) + 8, z), (0, 0, 0), (wide, 6.5, np.inf))
    plate = slice_of(plate, z, middle, half)
    paint(hu, where, plate, CORTEX - 100)
    paint(hu, where, plate + 1.8, MARROW)


def draw_clavicle(hu, grid, side):
    """A clavicle; side: -1 for the right, 1 for the left."""
    points = [(side * 20, -64, 72), (side * 60, -62, 84), (side * 105, -30, 98),
              (side * 140, 5, 108)]
    paint_tubes(hu, grid, polyline(points, 7, 5.5), CORTEX - 60)
    paint_tubes(hu, grid, polyline(points, 4.5, 3), MARROW)


def draw_shoulder_blade(hu, grid, side):
    """A shoulder blade with its spine; side: -1 for the right, 1 for the left."""
    centre = (side * 112, 72, 28)
    paint_ellipsoid(hu, grid, centre, (36, 4.2, 66), CORTEX - 60, turn=-side * 42)
    paint_ellipsoid(hu, grid, centre, (34, 2.4, 64), MARROW, turn=-side * 42)
    spine = [(side * 98, 92, 62), (side * 122, 86, 76), (side * 146, 50, 92)]
    paint_tubes(hu, grid, polyline(spine, 4, 8), CORTEX - 150)


def draw_abdomen(hu, grid, person, cage):
    """Under the diaphragm: liver on the right, spleen and stomach on the left."""
    where, position = grid.box((-150, -120, -260), (150, 120, -66))
    x, y, z = position
    below = np.maximum(cage[where] + 3, -diaphragm(position) + 3)
    paint(hu, where, below - 3, MUSCLE)
    paint(hu, where, below, FAT)

    liver_edge = x - 30 + 0.35 * (y + 40) - 0.25 * (z + 90)
    paint(hu, where, np.maximum(below, liver_edge), person.liver)

    before = hu[where].copy()
    paint_ellipsoid(hu, grid, (82, 38, -128), (38, 44, 42), person.liver + 15)
    draw_stomach(hu, grid, where, position)

    # Put back what spleen and stomach cover above the diaphragm.
    outside = np.clip((below + SOFT) / SOFT, 0, 1)
    hu[where] += outside * (before - hu[where])


def draw_stomach(hu, grid, where, position):
    """The stomach, with gas that rises to its front: dark as a lung, a trap for its mask."""
    paint_ellipsoid(hu, grid, (70, -22, -126), (42, 42, 36), 35)
    hollow = ellipsoid(position, (70, -24, -122), (38, 38, 30))
    gas = np.maximum(hollow, position[1] + 36)
    paint(hu, where, gas, AIR + 10)


# Between the lungs: each organ pushes them aside

def draw_mediastinum(hu, grid, person, lung):
    """Heart, great vessels and oesophagus, and the fat around them."""
    push_lungs_apart(grid, lung)
    draw_heart(hu, grid, person.blood, lung)
    draw_aorta(hu, grid, person.blood, lung)
    draw_great_vessels(hu, grid, person.blood, lung)
    draw_oesophagus(hu, grid, lung)


def push_lungs_apart(grid, lung):
    """Keep a place for the mediastinum: a core, and a thin sheet in front where the lungs meet."""
    where, (x, y, z) = grid.box((-70, -110, FLOOR), (70, 80, 110))
    width = 19 + 0.35 * np.maximum(z - 45, 0) + 0.08 * np.maximum(-z - 20, 0)
    core = (np.sqrt((x / width) ** 2 + ((y + 2) / 62) ** 2) - 1) * width
    sheet = np.maximum(np.abs(x - 2) - 2.6, y - 20)
    push(lung, where, np.minimum(core, sheet), 0)


def draw_heart(hu, grid, blood, lung):
    """Right atrium, right ventricle, left ventricle with its wall, left atrium; blood: in HU."""
    wall = 60 + 0.3 * blood
    paint_ellipsoid(hu, grid, (-14, -28, -52), (38, 36, 44), blood - 10, lung=lung, gap=4)
    paint_ellipsoid(hu, grid, (10, -42, -64), (42, 30, 34), blood - 10, lung=lung, gap=4)
    paint_ellipsoid(hu, grid, (30, -30, -62), (54, 38, 38), wall, turn=-38, lung=lung, gap=4)
    paint_ellipsoid(hu, grid, (28, -28, -62), (40, 25, 27), blood, turn=-38)
    paint_ellipsoid(hu, grid, (2, 8, -42), (32, 18, 22), blood, lung=lung)


def draw_aorta(hu, grid, blood, lung):
    """The aorta: up, over the arch, down along the spine; blood: in HU."""
    points = [(2, -26, -35), (-14, -24, 0), (-9, -16, 26), (10, 2, 36), (23, 22, 28),
              (26, 36, 4), (25, 38, -60), (14, 36, -120), (2, 32, -200)]
    paint_tubes(hu, grid, polyline(points, 15, 11), blood, lung, 3)


def draw_great_vessels(hu, grid, blood, lung):
    """Pulmonary arteries, veins to the heart, vessels of the neck; blood: in HU."""
    left_artery = polyline([(8, -34, -28), (18, -22, -6), (36, 2, -8)], 14, 9)
    right_artery = polyline([(18, -20, -10), (-8, -4, -14), (-38, 0, -16)], 11, 8)
    vena_cava = polyline([(-24, -14, 62), (-25, -10, -30)], 9, 10)
    lung_veins = polyline([(34, 4, -34), (4, 6, -42), (-36, 2, -34)], 7)
    tubes = left_artery + right_artery + vena_cava + lung_veins

    # The vessels of the neck: x at three heights, and y at the lowest.
    neck = [((-6, -14, -22), -14), ((6, 14, 20), -4), ((16, 26, 38), 6), ((-22, -26, -34), -18)]
    for (low_x, middle_x, high_x), y in neck:
        points = [(low_x, y, 34), (middle_x, y - 4, 62), (high_x, y - 14, 140)]
        tubes += polyline(points, 6, 5)
    paint_tubes(hu, grid, tubes, blood, lung, 1.5)


def draw_oesophagus(hu, grid, lung):
    """The oesophagus, with a little air in it."""
    points = [(4, 24, 140), (4, 23, 30), (-2, 23, -20), (8, 20, -80), (28, 0, -110)]
    paint_tubes(hu, grid, polyline(points, 7), 42, lung, 2)
    paint_tubes(hu, grid, polyline(points[1:3], 1.4), -400)


# Inside the lungs

class Tree(NamedTuple):
    """Branching tubes; the root is node 0, its own parent."""
    nodes: np.ndarray       # (n, 3), x y z in mm
    parents: np.ndarray     # (n,), the index of each node's parent, which comes before it
    radii: np.ndarray       # (n,), mm

    def tubes(self, grow=0.0):
        """Tubes from every parent to its child, `grow` mm thicker."""
        # A thin branch begins thin, also where it leaves a thick one.
        start_radii = np.minimum(self.radii[self.parents], 1.6 * self.radii) + grow
        end_radii = self.radii + grow
        tubes = []
        for child in range(1, len(self.parents)):
            parent = self.parents[child]
            tubes.append((self.nodes[parent], self.nodes[child], start_radii[child],
                          end_radii[child]))
        return tubes


def grow_tree(rng, root, targets, tip):
    """A tree from root (x, y, z) through every target (n, 3): little wire, short ways, bent.

    Each target, the nearest first, joins the node that makes distance + 0.4 · way from the root
    least, by a node half-way. Radii follow Murray's law, r³ = Σ r³ of the branches, from `tip` mm
    at the ends.
    """
    targets = targets[np.argsort(np.linalg.norm(targets - root, axis=1))]
    nodes = np.empty((2 * len(targets) + 1, 3))
    parents = np.zeros(len(nodes), int)
    ways = np.zeros(len(nodes))
    nodes[0] = root

    n = 1
    for target in targets:
        distances = np.linalg.norm(nodes[:n] - target, axis=1)
        nearest = int(np.argmin(distances + 0.4 * ways[:n]))
        distance = distances[nearest]
        bend = rng.normal(0, 0.07 * distance, 3)
        nodes[n] = (nodes[nearest] + target) / 2 + bend
        nodes[n + 1] = target
        parents[n] = nearest
        parents[n + 1] = n
        ways[n] = ways[nearest] + distance * 0.5
        ways[n + 1] = ways[nearest] + distance
        n += 2

    # Sum from the ends to the root: children come after their parents.
    cubed_radii = np.zeros(n)
    for i in range(n - 1, 0, -1):
        if cubed_radii[i] == 0:
            cubed_radii[i] = tip ** 3
        cubed_radii[parents[i]] += cubed_radii[i]
    return Tree(nodes, parents, np.cbrt(cubed_radii))


def draw_parenchyma(hu, grid, rng, lung):
    """Air with its tissue: denser towards the back (the patient lies), mottled, with fissures."""
    coarse_shape = [n // 4 + 2 for n in hu.shape]
    coarse = rng.normal(0, 1, coarse_shape).astype(np.float32)
    mottle = ndimage.zoom(ndimage.gaussian_filter(coarse, 1.0), 4, order=1)
    mottle = mottle[tuple(map(slice, hu.shape))]

    level = rng.uniform(-885, -850)
    for k, slab in grid.slabs():
        x, y, z = slab.box()[1]
        from_fissure = np.abs(z - 24 + 0.9 * y + 0.002 * (np.abs(x) - 70) ** 2) * 0.7
        fissure = 130 * np.clip(1.3 - from_fissure, 0, 1)
        value = level + 0.45 * y + 55 * mottle[k] + fissure
        paint(hu[k], ..., lung[k], value)


def draw_trees(hu, grid, rng, person, cage, lung, scale):
    """Vessels, airways and look-alikes; returns the vessels' trees, in world mm."""
    inside = np.flatnonzero(lung < -3)
    points = grid.points(rng.permutation(inside)[:20000])
    carina = person.place(0, 7, 0)
    trachea = polyline([person.place(0, -12, 140), carina], 8.5)

    # Grow both kinds of tree from each lung's hilum: side -1 is the right, 1 the left.
    vessels = []
    airways = []
    for side in (-1, 1):
        own = points[(points[:, 0] - person.position[0]) * side > 0]
        vessel_root = person.place(side * 38, 0, -18)
        vessels.append(grow_tree(rng, vessel_root, own[:int(450 / scale)], 0.72))

        hilum = person.place(side * 40, 9, -22)
        from_hilum = np.linalg.norm(own - hilum, axis=1)
        near = own[(from_hilum > 25) & (from_hilum < 75)]
        airways.append(grow_tree(rng, hilum, near[:int(10 / scale) + 2], 1.2))
        trachea += polyline([carina, hilum], 6.5, 4.5)

    for tree in vessels:
        paint_tubes(hu, grid, tree.tubes(), 60, only=np.maximum)
    draw_airways(hu, grid, airways, trachea)
    draw_forks(hu, grid, rng, vessels)
    draw_mucus_plugs(hu, grid, airways)
    draw_plaque(hu, grid, rng, cage, lung)
    return vessels


def draw_airways(hu, grid, trees, trachea):
    """Windpipe and bronchi: all walls first, then what is hollow."""
    tubes = list(trachea)
    for tree in trees:
        tubes += tree.tubes()
    walls = []
    for start, end, start_radius, end_radius in tubes:
        walls.append((start, end, 1.15 * start_radius + 0.5, 1.15 * end_radius + 0.5))
    paint_tubes(hu, grid, walls, 0, only=np.maximum)
    paint_tubes(hu, grid, tubes, -970, only=np.minimum)


# Look-alikes: what a radiologist passes over

def draw_forks(hu, grid, rng, vessels):
    """Thicken two forks of thin vessels in each lung."""
    for tree in vessels:
        branches = np.bincount(tree.parents, minlength=len(tree.nodes))
        forks = np.flatnonzero((branches > 1) & (tree.radii < 2))
        for i in rng.choice(forks, min(2, len(forks)), replace=False):
            ball = (tree.nodes[i], tree.nodes[i], 1.7 * tree.radii[i], 0)
            paint_tubes(hu, grid, [ball], 40, only=np.maximum)


def draw_mucus_plugs(hu, grid, airways):
    """Fill the last stretch of a bronchus in each lung."""
    for tree in airways:
        paint_tubes(hu, grid, tree.tubes(grow=0.9)[-2:], 25, only=np.maximum)


def draw_plaque(hu, grid, rng, cage, lung):
    """A calcified plaque on the pleura, where the lung touches the chest wall."""
    flat = np.flatnonzero((cage > -2) & (cage < 0) & (lung > -2) & (lung < 0))
    if len(flat) == 0:
        return
    centre = grid.points(rng.choice(flat, 1))[0]
    where, position = grid.box(centre - 16, centre + 16)
    along = np.sqrt(sum((p - c) ** 2 for p, c in zip(position, centre)))
    plate = np.sqrt(((cage[where] + 1) / 2.2) ** 2 + (along / 13) ** 2)
    paint(hu, where, (plate - 1) * 2.2, 420)


# Nodules

def choose_nodules(rng, count, grid, lung, vessels):
    """Nodules in the lungs, none touching another, each at a place of its kind."""
    flat = np.flatnonzero(lung < -1.5)
    flat = rng.choice(flat, min(4000, len(flat)), replace=False)
    places = grid.points(flat)
    depths = -lung.flat[flat]
    from_vessels = distance_to_vessels(places, vessels)

    sites = rng.choice(["isolated", "vessel", "pleura"], count, p=[0.45, 0.25, 0.3]).tolist()
    nodules = []
    for site in sites:
        diameter = float(np.clip(rng.lognormal(np.log(6.4), 0.5), 3.25, 32))
        diameter = round(diameter, 6)
        cost = misfit(site, diameter / 2, depths, from_vessels) + rng.uniform(0, 1, len(places))

        # Keep away from the other nodules, whose spikes may reach 1.7 radii.
        for other in nodules:
            nearest = 0.85 * (diameter + other.diameter) + 4
            cost[np.linalg.norm(places - other.centre, axis=1) < nearest] = np.inf

        # Move the centre within its voxel, so that centres lie anywhere between voxels.
        centre = places[np.argmin(cost)] + grid.step @ rng.uniform(-0.3, 0.3, 3)
        centre = tuple(np.round(centre, 6).tolist())
        texture = "solid"
        if diameter > 5 and rng.random() < 0.3:
            texture = "ground-glass"
        shape = str(rng.choice(["round", "lobulated", "spiculated"], p=[0.4, 0.3, 0.3]))
        nodules.append(Nodule(centre, diameter, shape, texture, site))
    return nodules


def distance_to_vessels(places, vessels):
    """Distance (n,) of places (n, 3) to the nearest node, or middle of a tube, of the vessels."""
    wires = []
    for tree in vessels:
        wires.append(tree.nodes)
        wires.append(0.5 * tree.nodes + 0.5 * tree.nodes[tree.parents])
    distances, _ = KDTree(np.concatenate(wires)).query(places)
    return distances


def misfit(site, radius, depths, from_vessels):
    """How badly, in mm, places suit a nodule: (n,).

    depths: (n,), under the pleura. from_vessels: (n,), to the nearest vessel.
    """
    if site == "isolated":
        return np.maximum(radius + 4 - depths, 0) + np.maximum(radius + 3 - from_vessels, 0)
    if site == "vessel":
        return np.maximum(radius + 3 - depths, 0) + np.abs(from_vessels - 0.7 * radius)
    best_depth = np.clip(0.6 * radius, 1.6, 8)
    return 2 * np.abs(depths - best_depth) + np.maximum(radius + 1 - from_vessels, 0)


def nodule_distance(rng, position, nodule):
    """Distance to a nodule's surface: a ball, balls run together, or a ball with thin spikes."""
    radius = nodule.diameter / 2
    centre = np.array(nodule.centre)
    directions = rng.normal(0, 1, (12, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)

    if nodule.shape == "round":
        return ball(position, centre, radius)
    if nodule.shape == "lobulated":
        parts = [ball(position, centre, 0.84 * radius)]
        for direction in directions[:6]:
            parts.append(ball(position, centre + 0.55 * radius * direction, 0.45 * radius))
        return np.minimum.reduce(parts)

    reaches = rng.uniform(1.2, 1.7, 12)
    parts = []
    for direction, reach in zip(directions, reaches):
        end = centre + direction * radius * reach
        parts.append(capsule(position, centre, end, 0.35 * radius, 0.0))
    parts.append(ball(position, centre, 0.92 * radius))
    return np.minimum.reduce(parts)


def ball(position, centre, radius):
    """Distance to a ball."""
    return capsule(position, centre, centre, radius, radius)


def draw_nodules(hu, grid, rng, nodules, lung):
    """Paint the nodules; returns their labels, (z, y, x) uint8, clipped at the pleura."""
    labels = np.zeros(grid.shape, np.uint8)
    for label, nodule in enumerate(nodules, 1):
        centre = np.array(nodule.centre)
        reach = 1.7 * (nodule.diameter / 2)
        where, position = grid.box(centre - reach, centre + reach)
        distance = nodule_distance(rng, position, nodule)
        if nodule.texture == "solid":
            value = rng.uniform(0, 80)
        else:
            value = rng.uniform(-650, -450)

        # A nodule reaches up to the pleura, not into the ribs, and hides nothing brighter.
        inside = np.maximum(distance, lung[where] - 1)
        paint(hu, where, inside, np.maximum(hu[where], np.float32(value)))
        labels[where][(distance < 0) & (lung[where] < 0)] = label

        # The smallest may lie between voxel centres: label the voxel that holds the centre.
        index = np.linalg.solve(grid.step, centre - grid.origin)
        x, y, z = np.round(index).astype(int)
        labels[z, y, x] = label
    return labels


# Patient, scanner, scan

class Person(NamedTuple):
    """A patient: the standard body's position and stretch, and what the tissue is like."""
    position: np.ndarray    # (x, y, z), mm
    size: np.ndarray        # (x, y, z), 1 for the standard body
    fat: float              # mm under the skin
    breasts: bool
    blood: float            # HU; contrast medium makes it bright
    liver: float            # HU

    def place(self, *point):
        """World position of a point (x, y, z) of the standard body."""
        return self.position + self.size * point


def make_person(rng):
    """A patient drawn at random; contrast medium in six of ten."""
    size = rng.uniform([0.97, 0.95, 0.90], [1.07, 1.07, 1.04])
    position = rng.uniform([-12, -40, -320], [12, 10, -60])
    blood = 45
    if rng.random() >= 0.4:
        blood = rng.uniform(120, 210)
    fat = rng.uniform(8, 17)
    breasts = bool(rng.random() < 0.5)
    liver = 55 + 0.3 * blood
    return Person(position, size, fat, breasts, blood, liver)


def make_direction(rng, index):
    """The direction (3, 3) of scan `index`; some are a few degrees oblique."""
    diagonal = DIRECTIONS[index % len(DIRECTIONS)]
    if diagonal:
        return np.diag(diagonal).astype(float)

    degrees = rng.uniform(1.5, 4, 3) * rng.choice([-1, 1], 3)
    cos_a, cos_b, cos_c = np.cos(np.radians(degrees))
    sin_a, sin_b, sin_c = np.sin(np.radians(degrees))
    about_x = np.array([[1, 0, 0], [0, cos_a, -sin_a], [0, sin_a, cos_a]])
    about_y = np.array([[cos_b, 0, sin_b], [0, 1, 0], [-sin_b, 0, cos_b]])
    about_z = np.array([[cos_c, -sin_c, 0], [sin_c, cos_c, 0], [0, 0, 1]])

    # Ten digits fit a DICOM decimal string.
    return np.round(about_z @ about_y @ about_x, 10)


def make_grid(rng, person, direction, scale):
    """Grid and spacing (x, y, z): the lungs whole, 10 to 20 mm to spare at head and foot."""
    # The field shows the chest, but barely the shoulders.
    field = 356 * person.size[0] + rng.uniform(6, 26)
    pixels = int(rng.integers(31, 37)) * 8
    step = rng.choice([1.8, 2.0, 2.5])
    pixel_spacing = field / pixels * scale
    spacing = np.round([pixel_spacing, pixel_spacing, step * scale], 6)

    # Count the slices that hold the lungs along an axis which may be oblique.
    lungs = person.size * [0.3 * HALF_WIDTH, 30, (APEX - FLOOR) / 2]
    height = 2 * np.abs(direction[:, 2] * lungs).sum()
    slices = int(np.ceil((height + rng.uniform(24, 36)) / spacing[2]))
    side = round(pixels / scale)
    shape = (slices, side, side)

    # Put the middle voxel into the middle of the lungs.
    middle = person.position + person.size * [0, 8, (APEX + FLOOR) / 2]
    middle_index = (np.array(shape[::-1]) - 1) / 2
    origin = np.round(middle - direction * spacing @ middle_index, 6)
    return Grid(shape, direction * spacing, origin), spacing


def scan_noise(rng, shape, is_sharp):
    """Correlated gaussian noise of 15 to 45 HU; a sharp kernel's is stronger and finer."""
    noise = rng.standard_normal(shape, np.float32)
    taps = np.array([0.3, 0.8, 1, 0.8, 0.3])
    if is_sharp:
        taps = np.array([-0.12, 1, -0.12])
    for axis in (1, 2):
        noise = ndimage.correlate1d(noise, taps / np.linalg.norm(taps), axis)

    low, high = (28, 45) if is_sharp else (15, 28)
    return noise * np.float32(rng.uniform(low, high))


def expose(hu, rng):
    """The scanner: blur by half a voxel, noise, whole HU, and what lies outside its circle."""
    is_sharp = rng.random() < 0.35
    padding = rng.choice([-2048, -1024])
    for axis in range(3):
        hu = ndimage.correlate1d(hu, [0.14, 0.72, 0.14], axis)
    hu += scan_noise(rng, hu.shape, is_sharp)
    np.clip(np.rint(hu, out=hu), -1024, 3071, out=hu)
    hu = hu.astype(np.int16)

    across = np.linspace(-1, 1, hu.shape[2])
    outside = across[:, None] ** 2 + across ** 2 > 1
    hu[:, outside] = padding
    return hu


def make_phantom(index, seed=0, nodules=None, scale=1.0, direction=None):
    """Scan `index` of the series that `seed` starts; the same whatever else is made, or where.

    nodules: how many (default 3 to 8). scale: voxels so many times larger, 3 for quick tests.
    direction: (3, 3), in place of the index's own.
    """
    # The fourth of every ten scans is a second one of the second's patient.
    person_index = index - 2 if index % 10 == 3 else index
    person = make_person(np.random.default_rng([seed, person_index, 1]))
    rng = np.random.default_rng([seed, index])
    if direction is None:
        direction = make_direction(rng, index)
    direction = np.asarray(direction, float)
    grid, spacing = make_grid(rng, person, direction, scale)

    # Draw what can be drawn slab by slab, and the distances that the rest needs.
    body = grid.in_body(person.position, person.size)
    hu = np.full(grid.shape, AIR, np.float32)
    cage = np.empty_like(hu)
    lung = np.empty_like(hu)
    for z, slab in body.slabs():
        cage[z] = chest_wall(slab)
        lung[z] = np.maximum(cage[z], diaphragm(slab.box()[1]))
        draw_table(hu[z], slab, 116)
        draw_body(hu[z], slab, person, cage[z])
        draw_ribs(hu[z], slab, cage[z])
        draw_abdomen(hu[z], slab, person, cage[z])

    draw_girdle(hu, body)
    draw_spine(hu, body, lung)
    draw_mediastinum(hu, body, person, lung)
    draw_parenchyma(hu, body, rng, lung)

    # Trees and nodules keep their form in every patient, so they are drawn in world mm.
    vessels = draw_trees(hu, grid, rng, person, cage, lung, scale)
    count = int(rng.choice([3, 4, 5, 6, 7, 8], p=[0.2, 0.25, 0.2, 0.15, 0.1, 0.1]))
    if nodules is not None:
        count = nodules
    found = choose_nodules(rng, count, grid, lung, vessels)
    labels = draw_nodules(hu, grid, rng, found, lung)

    return Phantom(
        seriesuid=series_uid(seed, index),
        patient=f"PHANTOM-{seed}-{person_index:04d}",
        hu=expose(hu, rng),
        spacing=tuple(spacing.tolist()),
        origin=tuple(grid.origin.tolist()),
        direction=direction,
        nodules=found,
        lungs=lung < 0,
        nodule_labels=labels)


def series_uid(seed, index):
    """The series UID of scan `index` of the series that `seed` starts."""
    return make_uid(seed, index, "series")


# A set of scans: whatever is whole is kept, so that a stopped command resumes

def record_path(folder, seriesuid):
    return folder / "truth" / f"{seriesuid}.json"


def read_record(folder, seriesuid):
    """A scan's record of an earlier command.

    {} where there is none, or where it or a file of the scan is not as it was written.
    """
    try:
        record = lungaug.read_json(record_path(folder, seriesuid), "")
        expected = record.pop("fingerprint")
        if expected != lungaug.fingerprint(record):
            return {}
        for name, checksum in record["files"].items():
            if lungaug.file_crc32(folder / name, "") != checksum:
                return {}
    except (lungaug.Refusal, AttributeError, KeyError, TypeError):
        return {}
    return record


def make_scan(folder, index, seed, options):
    """Make scan `index` of a set with its truth, unless a whole one exists; returns its record.

    The record holds the scan's nodules and the checksums of its files. It is written last.
    """
    seriesuid = series_uid(seed, index)
    record = read_record(folder, seriesuid)
    if record:
        return record

    # Write the files beside their place, in a folder that an earlier command may have left.
    phantom = make_phantom(index, seed, **options)
    beside = folder / f".{seriesuid}"
    shutil.rmtree(beside, ignore_errors=True)
    try:
        write_scan(beside, index, phantom)
        record = {
            "seriesuid": seriesuid,
            "nodules": [nodule._asdict() for nodule in phantom.nodules],
            "files": move_files(beside, folder),
        }
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    fingerprint = lungaug.fingerprint(record)
    lungaug.write(record_path(folder, seriesuid), record | {"fingerprint": fingerprint})
    return record


def write_scan(folder, index, phantom):
    """Write a phantom as one of LUNA16's ten subsets has it, and its truth.

    Even indices become MetaImage (raw, compressed, one file, in turn), odd ones DICOM.
    """
    subset = folder / f"subset{index % 10}"
    turn = index // 2 % 3
    if index % 2:
        thickness = (1.0, 2.0, 1.25)[turn]
        write_dicom(subset, phantom, localizer=turn == 0, thickness=thickness)
    else:
        write_metaimage(subset, phantom, compressed=turn == 1, local=turn == 2)
    write_truth(folder / "truth" / f"{phantom.seriesuid}.npz", phantom)


def move_files(source, target):
    """Move all files below a folder to the same names below another one: name → CRC-32."""
    checksums = {}
    for path in sorted(source.rglob("*")):
        if path.is_dir():
            continue
        name = path.relative_to(source)
        checksums[name.as_posix()] = lungaug.file_crc32(path, "run the same command again")
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target / name)
    return checksums


def claim_set(folder, parameters):
    """Reserve a folder for the set of these parameters. Raises Refusal where it holds another."""
    path = folder / "parameters.json"
    remedy = f"give the same options or another --run, or delete {folder}"
    if path.exists():
        lungaug.require_settings(path, lungaug.read_json(path, remedy), parameters, remedy)
        return
    has_scans = any(folder.glob("subset*"))
    lungaug.check(not has_scans, folder, "holds scans of which the options are not known",
                  f"give another --run, or delete {folder}")
    lungaug.write(path, parameters)


def make_scans(folder, count, seed, workers, report, options):
    """Make the scans of a set in `workers` processes: series UID → record."""
    records = {}
    remaining = list(range(count))
    running = set()
    with lungaug.start_pool(workers) as pool:
        while remaining or running:
            # Submit no more than what begins at once: a stopped command waits for the rest.
            while remaining and len(running) < workers:
                job = lungaug.submit(pool, make_scan, folder, remaining.pop(0), seed, options)
                running.add(job)

            finished, running = wait(running, return_when=FIRST_COMPLETED)
            for job in finished:
                record = job.result()
                records[record["seriesuid"]] = record
                if report:
                    report(len(records), record["seriesuid"])
    return records


def write_scans(folder, count, seed=0, workers=1, report=None, **options):
    """Write `count` scans as LUNA16 lays them out; annotations.csv comes last, once all are there.

    The bytes do not depend on workers. Scans of an earlier call with the same parameters are kept.
    report(done, seriesuid) is called after each scan; options go to make_phantom. Raises Refusal.
    """
    folder = Path(folder)
    with lungaug.lock(folder, "making scans"):
        claim_set(folder, {"count": count, "seed": seed, "options": options})
        (folder / "annotations.csv").unlink(missing_ok=True)
        records = make_scans(folder, count, seed, min(workers, count), report, options)

        rows = []
        for index in range(count):
            seriesuid = series_uid(seed, index)
            for nodule in records[seriesuid]["nodules"]:
                rows.append((seriesuid, *nodule["centre"], nodule["diameter"]))
        write_annotations(folder / "annotations.csv", rows)
    return folder


def main():
    parser = argparse.ArgumentParser(description="Write synthetic chest CT scans to RUN/scans.")
    parser.add_argument("--run", type=Path, default="runs/demo", help="folder of the run")
    parser.add_argument("--scans-count", type=int, default=30, help="how many scans")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="processes; about 600 MB each")
    options = parser.parse_args()

    lowest = {"scans_count": 1, "seed": 0, "workers": 1}
    for name, low in lowest.items():
        value = getattr(options, name)
        lungaug.check(value >= low, f"--{name.replace('_', '-')}", f"{value} is too small",
                      f"give {low} or more")

    progress = lungaug.Progress("synthetic scans", options.scans_count)
    folder = write_scans(options.run / "scans", options.scans_count, options.seed, options.workers,
                         progress.update)
    print(f"wrote {folder}")


if __name__ == "__main__":
    lungaug.command(main)
