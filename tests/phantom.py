"""Synthetic chest CT scans in LUNA16's own formats, for the demo and the tests.

LUNA16 cannot be downloaded here, so this file draws chests: body, bones, heart, lungs with their
vessels and airways, nodules that are annotated and look-alikes that are not.

    python tests/phantom.py --run runs/demo --scans-count 30 --workers 2      # 1 to 2 s a scan

Frames. All anatomy is written in millimetres in the patient's axes (LPS: x to the left, y to the
back, z to the head) of a standard body with its origin near the carina; a patient is that body
stretched and moved. A grid, with any direction matrix, only samples it. Arrays are (z, y, x).
"""

import argparse
import concurrent.futures
import contextlib
import csv
import hashlib
import multiprocessing
import os
import time
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pydicom
from scipy import ndimage

AIR, FAT, MUSCLE, CORTEX, MARROW = -1000, -105, 55, 560, 190  # HU
SOFT = 1.6  # mm over which an edge fades: half of it is the scanner's, half a voxel's
APEX, FLOOR, HALF_WIDTH = 98, -152, 132  # top, bottom and half the width of the lungs, mm
STRAIGHT, TURNED, REVERSED, OBLIQUE = (1, 1, 1), (-1, -1, 1), (1, 1, -1), None
# An index's direction (diagonal), in turn. Odd indices become DICOM, whose slices have no order of
# their own, so only right-handed ones stand there.
DIRECTIONS = [STRAIGHT, STRAIGHT, TURNED, TURNED, OBLIQUE, STRAIGHT,
              REVERSED, OBLIQUE, STRAIGHT, STRAIGHT, REVERSED, TURNED]


class Nodule(NamedTuple):
    """centre (x, y, z) in world mm, diameter in mm: what annotations.csv says."""
    centre: tuple
    diameter: float
    shape: str  # 'round', 'lobulated' or 'spiculated'
    texture: str  # 'solid' or 'ground-glass'
    site: str  # 'isolated', 'vessel' or 'pleura'


class Phantom(NamedTuple):
    """A scan with its truth; hu, lungs and nodule_labels are (z, y, x) in the file's order."""
    seriesuid: str
    patient: str
    hu: np.ndarray  # int16
    spacing: tuple  # (x, y, z), mm
    origin: tuple  # (x, y, z) of voxel (0, 0, 0), mm
    direction: np.ndarray  # 3×3, LPS, columns = the x, y, z index axes
    nodules: list
    lungs: np.ndarray  # bool, all inside the pleura: vessels, airways and nodules too
    nodule_labels: np.ndarray  # uint8, 0 = none, i + 1 = nodules[i]; clipped at the pleura


class Grid(NamedTuple):
    """Where a scan's voxels lie: position = origin + step @ (x, y, z index), in mm."""
    shape: tuple  # (z, y, x)
    step: np.ndarray  # 3×3, columns = one voxel along x, y, z
    origin: np.ndarray  # (x, y, z)

    def in_body(self, position, size):
        """The same voxels in the standard body's frame, which `size` stretches to the patient's."""
        return Grid(self.shape, self.step / size[:, None], (self.origin - position) / size)

    def slabs(self, thick=6):
        """Parts of a few slices, (slice of z, Grid): whole volumes do not fit the cache."""
        for k in range(0, self.shape[0], thick):
            shape = (min(thick, self.shape[0] - k), *self.shape[1:])
            yield slice(k, k + thick), Grid(shape, self.step, self.origin + self.step[:, 2] * k)

    def box(self, low=None, high=None, margin=4.0):
        """Slices (z, y, x) around the corners low, high (x, y, z) and the voxels' x, y, z there.

        The three coordinates broadcast to the box; where the axes are straight each is a line.
        """
        first, last = np.zeros(3, int), np.array(self.shape[::-1])
        if low is not None:
            inverse = np.linalg.inv(self.step)
            middle = inverse @ (np.add(low, high) / 2 - self.origin)
            reach = np.abs(inverse) @ (np.subtract(high, low) / 2 + margin)
            first = np.clip(np.floor(middle - reach).astype(int), 0, last)
            last = np.clip(np.ceil(middle + reach).astype(int) + 1, first, last)
        i, j, k = (np.arange(a, b, dtype=np.float32) for a, b in zip(first, last))
        axes = i, j[:, None], k[:, None, None]
        position = []
        for row, start in zip(self.step.astype(np.float32), self.origin.astype(np.float32)):
            terms = [axis * w for axis, w in zip(axes, row) if abs(w) > 1e-9]
            position.append(start + sum(terms[1:], terms[0]))
        return tuple(slice(a, b) for a, b in zip(first[::-1], last[::-1])), position

    def points(self, flat):
        """Positions (n, 3), x y z, of flat voxel indices."""
        return np.stack(np.unravel_index(flat, self.shape)[::-1], 1) @ self.step.T + self.origin


# ------------------------------------------------------------------ shapes as signed distances, mm

def egg(position, half_width, front, back, flat, top=None):
    """Distance to a trunk: oval sections, `flat` mm straight at front and back, domed to `top`."""
    x, y, z = position
    wide, deep = half_width - flat, (back - front) / 2
    u = (np.maximum(np.abs(x) - flat, 0) / wide) ** 2
    v = ((y - (front + back) / 2) / deep) ** 2
    w = np.maximum((z - 20) / (top - 20), 0) ** 2 if top else np.float32(0)
    slope = u / wide ** 2 + (v / deep ** 2 + (w / (top - 20) ** 2 if top else 0))
    np.sqrt(slope, out=slope)
    slope += 1e-3
    return (u + (v + w - 1)) / slope * np.float32(0.5)


def ellipsoid(position, centre, radii, turn=0.0):
    """Distance to an ellipsoid turned by `turn` degrees about z; infinite radii make a cylinder."""
    x, y, z = (p - c for p, c in zip(position, centre))
    cos, sin = np.cos(np.radians(turn)), np.sin(np.radians(turn))
    x, y = (x * cos + y * sin, y * cos - x * sin) if turn else (x, y)
    u, v, w = ((p / r) ** 2 for p, r in zip((x, y, z), radii))
    slope = np.sqrt(sum(s / r ** 2 for s, r in zip((u, v, w), radii))) + 1e-3
    return ((u + v + w - 1) / slope * 0.5).astype(np.float32)


def capsule(position, start, end, start_radius, end_radius):
    """Distance to a tapering round rod from start to end (x, y, z)."""
    x, y, z = (p - np.float32(s) for p, s in zip(position, start))
    axis = np.subtract(end, start).astype(np.float32)
    along = (x * axis[0] + y * axis[1] + z * axis[2]) / max(float(axis @ axis), 1e-6)
    along = np.clip(along, 0, 1)
    square = (x - along * axis[0]) ** 2 + (y - along * axis[1]) ** 2 + (z - along * axis[2]) ** 2
    return np.sqrt(square) - (start_radius + along * np.float32(end_radius - start_radius))


def paint(hu, where, distance, value):
    """Blends `value` into hu[where] where distance < 0, with an edge SOFT mm wide."""
    cover = distance * np.float32(-1 / SOFT)
    cover += 0.5
    np.clip(cover, 0, 1, out=cover)
    cover *= value - hu[where]
    hu[where] += cover


def paint_ellipsoid(hu, grid, centre, radii, value, turn=0.0, lung=None, gap=2.0):
    """An ellipsoid of one grey value, which keeps `lung` (a distance) `gap` mm away."""
    reach = max(radii[:2]) if turn else np.array(radii)
    where, position = grid.box(np.subtract(centre, reach), np.add(centre, reach))
    distance = ellipsoid(position, centre, radii, turn)
    paint(hu, where, distance, value)
    push(lung, where, distance, gap)


def paint_tubes(hu, grid, tubes, value, lung=None, gap=2.0, only=None):
    """Rods (start, end, start radius, end radius); only=np.maximum leaves what is brighter."""
    for start, end, *radii in tubes:
        low, high = np.minimum(start, end) - max(radii), np.maximum(start, end) + max(radii)
        where, position = grid.box(low, high, 2.0)
        distance = capsule(position, start, end, *radii)
        paint(hu, where, distance, only(hu[where], np.float32(value)) if only else value)
        push(lung, where, distance, gap)


def push(lung, where, distance, gap):
    """Moves the lungs' surface `gap` mm away from a shape."""
    if lung is not None:
        np.maximum(lung[where], gap - distance, out=lung[where])


def polyline(points, *radii):
    """Rods through points, their radii from the first of `radii` to the last."""
    r = np.linspace(radii[0], radii[-1], len(points))
    return list(zip(points[:-1], points[1:], r[:-1], r[1:]))


# ------------------------------------------------------------------ the standard body

def chest_front(z):
    """y of the front of the chest cavity: it leans back towards the neck."""
    return -84 + 0.16 * np.maximum(z + 50, 0)


def chest_back(z):
    """y of the back of the chest cavity: it follows the spine's curve."""
    return 84 - 0.0010 * (z + 10) ** 2


def chest_wall(grid):
    """Distance to the inner surface of the ribs and spine; it goes on below the diaphragm."""
    position = grid.box()[1]
    z = position[2]
    narrowing = np.where(z > -70, np.float32(0.0014), np.float32(0.0004)) * (z + 70) ** 2
    wall = egg(position, HALF_WIDTH - narrowing, chest_front(z), chest_back(z), 25, APEX)
    where, (x, y, z) = grid.box((-40, 20, -1000), (40, 130, 1000))
    spine = 33 - np.sqrt(x ** 2 + (np.minimum(y - chest_back(z) - 4, 0) * 0.85) ** 2)
    np.maximum(wall[where], spine, out=wall[where])
    return wall


def diaphragm(position):
    """Distance above (negative) or below the two domes of the diaphragm; the right is higher."""
    x, y, z = position
    domes = []
    for side, top in ((-66, -72), (66, -82)):
        square = ((x - side) / 72) ** 2 + ((y + 12) / 80) ** 2
        domes.append(top - 75 * square / (1 + square / 3))
    return (np.maximum(np.maximum(*domes), FLOOR) - z) * np.float32(0.7)


def draw_body(hu, grid, person, cage):
    """Skin, fat with breasts in half of the patients, muscle, and fat between muscle layers."""
    where, position = grid.box()
    x, y, z = position
    shoulders = 170 + 14 / (1 + np.exp(-(z - 55) / 12))
    skin = egg(position, shoulders, chest_front(z) - 24 - person.fat, 116, 50)
    if person.breasts:
        for side in (-80, 80):
            near, local = grid.box((side - 65, -160, -95), (side + 65, -40, 45))
            breast = ellipsoid(local, (side, -92, -28), (62, 36, 62))
            np.minimum(skin[near], breast, out=skin[near])
    paint(hu, where, skin, -10)
    paint(hu, where, skin + 2, FAT)
    inner = skin + person.fat * (0.7 + 0.5 * (x / 170) ** 2)
    paint(hu, where, np.maximum(inner, ellipsoid((x, y, z), (0, 0, 0), (175, 103, np.inf))), MUSCLE)
    paint(hu, where, np.maximum(np.abs(cage - 15) - 1.4, inner + 3), FAT + 30)
    paint(hu, where, cage, FAT + 45)
    for side in (-134, 134):  # armpits
        paint_ellipsoid(hu, grid, (side, 5, 78), (17, 34, 52), FAT)


def draw_spine(hu, grid, lung):
    """Vertebrae 24 mm apart with discs, arches, and transverse and spinous processes."""
    for level in range(-8, 6):
        z = level * 24 + 8
        y = chest_back(z) - 31
        where, position = grid.box((-22, y - 20, z - 12), (22, y + 20, z + 12), 5)
        body = ellipsoid(position, (0, y, z), (19, 15.5, np.inf))
        push(lung, where, body, 4)
        paint(hu, where, np.maximum(body, np.abs(position[2] - z) - 13), 85)  # with its discs
        bone = np.maximum(body, np.abs(position[2] - z) - 9.5)
        paint(hu, where, bone, CORTEX - 100)
        paint(hu, where, bone + 2, MARROW)
        arch = [((s, y + 15, z), (s * 0.8, y + 27, z), 4, 4) for s in (-13, 13)]
        arch += [((s * 10, y + 27, z), (s * 34, y + 33, z + 2), 5, 4) for s in (-1, 1)]
        arch += [((s * 10, y + 27, z), (0, y + 38, z - 4), 4, 4) for s in (-1, 1)]
        arch += [((0, y + 38, z - 4), (0, y + 58, z - 18), 4, 3)]
        paint_tubes(hu, grid, arch, CORTEX - 150)
    cord = [(0, chest_back(z) - 10, z) for z in range(-200, 141, 20)]
    paint_tubes(hu, grid, polyline(cord, 9), 25)


def draw_ribs(hu, grid, cage):
    """Twelve pairs of tilted arcs just outside the cavity, cartilage towards the sternum."""
    flat = np.flatnonzero((cage > 0) & (cage < 14))
    x, y, z = grid.points(flat).astype(np.float32).T
    angle = np.arctan2(np.abs(x) - 8, y - 5) / np.pi  # 0 at the spine, 1 at the sternum
    phase = (z + 68 * np.clip(angle, 0, 1) ** 1.3 - 8) / 24
    height = (phase - np.round(phase)) * 24 * 0.85
    distance = (np.sqrt(((cage.flat[flat] - 6.5) / 4.2) ** 2 + (height / 6.5) ** 2) - 1) * 4.6
    distance = np.maximum(distance, np.maximum(12 - np.abs(x), z - APEX + 6))
    values, cartilage = hu.flat[flat], angle > 0.80
    paint(values, ..., distance, np.where(cartilage, np.float32(110), np.float32(CORTEX - 60)))
    paint(values, ..., distance + 1.8, np.where(cartilage, np.float32(130), np.float32(MARROW)))
    hu.flat[flat] = values


def draw_girdle(hu, grid):
    """Sternum, clavicles and shoulder blades (the arms are raised, out of view)."""
    for middle, half, wide in ((-12, 50, 17), (58, 17, 26)):
        where, (x, y, z) = grid.box((-wide, -110, middle - half), (wide, -60, middle + half))
        plate = ellipsoid((x, y - chest_front(z) + 8, z), (0, 0, 0), (wide, 6.5, np.inf))
        plate = np.maximum(plate, np.abs(z - middle) - half)
        paint(hu, where, plate, CORTEX - 100)
        paint(hu, where, plate + 1.8, MARROW)
    for side in (-1, 1):
        points = [(20, -64, 72), (60, -62, 84), (105, -30, 98), (140, 5, 108)]
        points = [(side * x, y, z) for x, y, z in points]
        paint_tubes(hu, grid, polyline(points, 7, 5.5), CORTEX - 60)
        paint_tubes(hu, grid, polyline(points, 4.5, 3), MARROW)
        paint_ellipsoid(hu, grid, (side * 112, 72, 28), (36, 4.2, 66), CORTEX - 60, turn=-side * 42)
        paint_ellipsoid(hu, grid, (side * 112, 72, 28), (34, 2.4, 64), MARROW, turn=-side * 42)
        blade = [(side * 98, 92, 62), (side * 122, 86, 76), (side * 146, 50, 92)]
        paint_tubes(hu, grid, polyline(blade, 4, 8), CORTEX - 150)


def draw_abdomen(hu, grid, person, cage):
    """Under the diaphragm: liver right, spleen and stomach left, with the bubble that traps."""
    where, position = grid.box((-150, -120, -260), (150, 120, -66))
    x, y, z = position
    below = np.maximum(cage[where] + 3, -diaphragm(position) + 3)
    paint(hu, where, below - 3, MUSCLE)
    paint(hu, where, below, FAT)
    edge = x - 30 + 0.35 * (y + 40) - 0.25 * (z + 90)
    paint(hu, where, np.maximum(below, edge), person.liver)
    inside = hu[where].copy()
    paint_ellipsoid(hu, grid, (82, 38, -128), (38, 44, 42), person.liver + 15)
    paint_ellipsoid(hu, grid, (70, -22, -126), (42, 42, 36), 35)
    bubble = ellipsoid(position, (70, -24, -122), (38, 38, 30))
    paint(hu, where, np.maximum(bubble, y + 36), AIR + 10)  # gas rises to the front
    outside = np.clip((below + SOFT) / SOFT, 0, 1)
    hu[where] += outside * (inside - hu[where])


def draw_mediastinum(hu, grid, person, lung):
    """Heart, great vessels, oesophagus and the fat around them; each pushes the lungs aside."""
    where, (x, y, z) = grid.box((-70, -110, FLOOR), (70, 80, 110))
    width = 19 + 0.35 * np.maximum(z - 45, 0) + 0.08 * np.maximum(-z - 20, 0)
    core = (np.sqrt((x / width) ** 2 + ((y + 2) / 62) ** 2) - 1) * width
    core = np.minimum(core, np.maximum(np.abs(x - 2) - 2.6, y - 20))  # where the lungs meet
    push(lung, where, core, 0)
    blood, wall = person.blood, 60 + 0.3 * person.blood
    paint_ellipsoid(hu, grid, (-14, -28, -52), (38, 36, 44), blood - 10, lung=lung, gap=4)
    paint_ellipsoid(hu, grid, (10, -42, -64), (42, 30, 34), blood - 10, lung=lung, gap=4)
    paint_ellipsoid(hu, grid, (30, -30, -62), (54, 38, 38), wall, turn=-38, lung=lung, gap=4)
    paint_ellipsoid(hu, grid, (28, -28, -62), (40, 25, 27), blood, turn=-38)
    paint_ellipsoid(hu, grid, (2, 8, -42), (32, 18, 22), blood, lung=lung)
    aorta = [(2, -26, -35), (-14, -24, 0), (-9, -16, 26), (10, 2, 36), (23, 22, 28),
             (26, 36, 4), (25, 38, -60), (14, 36, -120), (2, 32, -200)]
    paint_tubes(hu, grid, polyline(aorta, 15, 11), blood, lung, 3)
    arteries = polyline([(8, -34, -28), (18, -22, -6), (36, 2, -8)], 14, 9)
    arteries += polyline([(18, -20, -10), (-8, -4, -14), (-38, 0, -16)], 11, 8)
    veins = polyline([(-24, -14, 62), (-25, -10, -30)], 9, 10)
    veins += polyline([(34, 4, -34), (4, 6, -42), (-36, 2, -34)], 7)
    ways = ((-6, -14, -14, -22), (6, -4, 14, 20), (16, 6, 26, 38), (-22, -18, -26, -34))
    neck = [polyline([(a, b, 34), (c, b - 4, 62), (d, b - 14, 140)], 6, 5) for a, b, c, d in ways]
    paint_tubes(hu, grid, arteries + veins + sum(neck, []), blood, lung, 1.5)
    gullet = [(4, 24, 140), (4, 23, 30), (-2, 23, -20), (8, 20, -80), (28, 0, -110)]
    paint_tubes(hu, grid, polyline(gullet, 7), 42, lung, 2)
    paint_tubes(hu, grid, polyline(gullet[1:3], 1.4), -400)


def draw_table(hu, grid, back):
    """The couch: a closed curved shell of carbon fibre around foam; `back` is y of the skin."""
    where, position = grid.box((-260, back - 90, -1000), (260, back + 60, 1000))
    x, y, _ = position
    top, bottom = back + 3 - x ** 2 / 1000, back + 30 - x ** 2 / 520
    shell = np.maximum(np.maximum(top - y, y - bottom), np.abs(x) - 195)
    shell = np.broadcast_to(shell, hu[where].shape)
    paint(hu, where, shell, -150)
    paint(hu, where, shell + 2.2, -900)


# ------------------------------------------------------------------ inside the lungs

class Tree(NamedTuple):
    """Branching tubes: nodes (n, 3) x y z in mm; parent index and radius a node, root first."""
    nodes: np.ndarray
    parents: np.ndarray
    radii: np.ndarray

    def tubes(self, grow=0.0):
        """Rods from every parent to its child, `grow` mm thicker."""
        start = np.minimum(self.radii[self.parents], 1.6 * self.radii) + grow
        return [(self.nodes[p], self.nodes[i], start[i], self.radii[i] + grow)
                for i, p in enumerate(self.parents) if i]


def grow_tree(rng, root, targets, tip):
    """A tree from root through every target: short in wire and short in way, bent a little.

    Each target, nearest first, joins the node that makes (distance + 0.4 × way from the root)
    least. Radii follow Murray's law, r³ = Σ r³ of the branches, from `tip` mm at the ends.
    """
    targets = targets[np.argsort(np.linalg.norm(targets - root, axis=1))]
    nodes, parents = np.empty((2 * len(targets) + 1, 3)), np.zeros(2 * len(targets) + 1, int)
    way = np.zeros(len(nodes))
    nodes[0], n = root, 1
    for target in targets:
        gap = np.linalg.norm(nodes[:n] - target, axis=1)
        best = int(np.argmin(gap + 0.4 * way[:n]))
        middle = (nodes[best] + target) / 2 + rng.normal(0, 0.07 * gap[best], 3)
        nodes[n:n + 2], parents[n:n + 2] = (middle, target), (best, n)
        way[n:n + 2] = way[best] + gap[best] * np.array([0.5, 1.0])
        n += 2
    cubes = np.zeros(n)
    for i in range(n - 1, 0, -1):  # children come after their parents
        cubes[i] = cubes[i] or tip ** 3
        cubes[parents[i]] += cubes[i]
    return Tree(nodes, parents, np.cbrt(cubes))


def draw_parenchyma(hu, grid, rng, lung):
    """Air with its tissue: denser towards the back (the patient lies), mottled, with fissures."""
    coarse = rng.normal(0, 1, [n // 4 + 2 for n in hu.shape]).astype(np.float32)
    mottle = ndimage.zoom(ndimage.gaussian_filter(coarse, 1.0), 4, order=1)
    mottle = mottle[tuple(map(slice, hu.shape))]
    level = rng.uniform(-885, -850)
    for k, slab in grid.slabs():
        x, y, z = slab.box()[1]
        fissure = np.abs(z - 24 + 0.9 * y + 0.002 * (np.abs(x) - 70) ** 2) * 0.7
        value = level + 0.45 * y + 55 * mottle[k] + 130 * np.clip(1.3 - fissure, 0, 1)
        paint(hu[k], ..., lung[k], value)


def draw_airways(hu, grid, trees, trachea):
    """Windpipe and bronchi: a wall first, then what is hollow."""
    tubes = trachea + sum((t.tubes() for t in trees), [])
    walls = [(a, b, 1.15 * r + 0.5, 1.15 * s + 0.5) for a, b, r, s in tubes]
    paint_tubes(hu, grid, walls, 0, only=np.maximum)
    paint_tubes(hu, grid, tubes, -970, only=np.minimum)


def draw_lookalikes(hu, grid, rng, vessels, airways, cage, lung):
    """What a radiologist passes over: thick vessel forks, mucus plugs, a calcified plaque."""
    for tree in vessels:
        branches = np.bincount(tree.parents, minlength=len(tree.nodes))
        forks = np.flatnonzero((branches > 1) & (tree.radii < 2))
        for i in rng.choice(forks, min(2, len(forks)), replace=False):
            blob = tree.nodes[i], tree.nodes[i], 1.7 * tree.radii[i], 0
            paint_tubes(hu, grid, [blob], 40, only=np.maximum)
    for tree in airways:  # a plug fills the last stretch of a bronchus
        paint_tubes(hu, grid, tree.tubes(grow=0.9)[-2:], 25, only=np.maximum)
    flat = np.flatnonzero((cage > -2) & (cage < 0) & (lung > -2) & (lung < 0))
    if len(flat):
        centre = grid.points(rng.choice(flat, 1))[0]
        where, position = grid.box(centre - 16, centre + 16)
        along = np.sqrt(sum((p - c) ** 2 for p, c in zip(position, centre)))
        plate = np.sqrt(((cage[where] + 1) / 2.2) ** 2 + (along / 13) ** 2)
        paint(hu, where, (plate - 1) * 2.2, 420)


def draw_trees(hu, grid, rng, person, cage, lung, scale):
    """Vessels and airways from the hila, look-alikes; returns the vessels' trees, in world mm."""
    points = grid.points(rng.permutation(np.flatnonzero(lung < -3))[:20000])
    trachea = polyline([person.place(0, -12, 140), person.place(0, 7, 0)], 8.5)
    vessels, airways = [], []
    for side in (-1, 1):
        own = points[(points[:, 0] - person.position[0]) * side > 0]
        hilum = person.place(side * 40, 9, -22)
        vessels.append(grow_tree(rng, person.place(side * 38, 0, -18), own[:int(450 / scale)], 0.72))
        reach = np.linalg.norm(own - hilum, axis=1)
        near = own[(reach > 25) & (reach < 75)]
        airways.append(grow_tree(rng, hilum, near[:int(10 / scale) + 2], 1.2))
        trachea += polyline([person.place(0, 7, 0), hilum], 6.5, 4.5)
    paint_tubes(hu, grid, [t for tree in vessels for t in tree.tubes()], 60, only=np.maximum)
    draw_airways(hu, grid, airways, trachea)
    draw_lookalikes(hu, grid, rng, vessels, airways, cage, lung)
    return vessels


# ------------------------------------------------------------------ nodules

def misfit(site, r, depth, clear):
    """How badly (mm) places suit a nodule of radius r: depth under the pleura, way to a vessel."""
    if site == "isolated":
        return np.maximum(r + 4 - depth, 0) + np.maximum(r + 3 - clear, 0)
    if site == "vessel":
        return np.maximum(r + 3 - depth, 0) + np.abs(clear - 0.7 * r)
    return 2 * np.abs(depth - np.clip(0.6 * r, 1.6, 8)) + np.maximum(r + 1 - clear, 0)


def choose_nodules(rng, count, grid, lung, vessels):
    """Nodules in the lungs, none touching another, each at a place of its kind."""
    flat = np.flatnonzero(lung < -1.5)
    flat = rng.choice(flat, min(4000, len(flat)), replace=False)
    places, depth = grid.points(flat), -lung.flat[flat]
    wires = np.concatenate([w * t.nodes + (1 - w) * t.nodes[t.parents] for t in vessels for w in (1, 0.5)])
    square = (places ** 2).sum(1)[:, None] + (wires ** 2).sum(1) - 2 * places @ wires.T
    clear, nodules = np.sqrt(np.maximum(square.min(1), 0)), []
    for site in rng.choice(["isolated", "vessel", "pleura"], count, p=[0.45, 0.25, 0.3]).tolist():
        diameter = round(float(np.clip(rng.lognormal(np.log(6.4), 0.5), 3.25, 32)), 6)
        cost = misfit(site, diameter / 2, depth, clear) + rng.uniform(0, 1, len(places))
        for other in nodules:  # spikes reach 1.7 radii
            near = 0.85 * (diameter + other.diameter) + 4
            cost[np.linalg.norm(places - other.centre, axis=1) < near] = np.inf
        centre = places[np.argmin(cost)] + grid.step @ rng.uniform(-0.3, 0.3, 3)  # in the same voxel
        texture = "ground-glass" if diameter > 5 and rng.random() < 0.3 else "solid"
        shape = str(rng.choice(["round", "lobulated", "spiculated"], p=[0.4, 0.3, 0.3]))
        nodules.append(Nodule(tuple(np.round(centre, 6).tolist()), diameter, shape, texture, site))
    return nodules


def nodule_distance(rng, position, nodule):
    """Distance to a nodule's surface: a ball, balls run together, or a ball with thin spikes."""
    r, centre = nodule.diameter / 2, np.array(nodule.centre)
    directions = rng.normal(0, 1, (12, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    if nodule.shape == "round":
        return capsule(position, centre, centre, r, r)
    if nodule.shape == "lobulated":
        parts = [(centre, 0.84 * r)] + [(centre + 0.55 * r * d, 0.45 * r) for d in directions[:6]]
        return np.minimum.reduce([capsule(position, c, c, s, s) for c, s in parts])
    ends = [centre + d * r * reach for d, reach in zip(directions, rng.uniform(1.2, 1.7, 12))]
    spikes = [capsule(position, centre, end, 0.35 * r, 0.0) for end in ends]
    return np.minimum.reduce(spikes + [capsule(position, centre, centre, 0.92 * r, 0.92 * r)])


def draw_nodules(hu, grid, rng, nodules, lung):
    """Paints the nodules; returns their labels, (z, y, x) uint8, clipped at the pleura."""
    labels = np.zeros(grid.shape, np.uint8)
    for i, nodule in enumerate(nodules):
        r, centre = nodule.diameter / 2, np.array(nodule.centre)
        where, position = grid.box(centre - 1.7 * r, centre + 1.7 * r)
        distance = nodule_distance(rng, position, nodule)
        value = rng.uniform(0, 80) if nodule.texture == "solid" else rng.uniform(-650, -450)
        inside = np.maximum(distance, lung[where] - 1)  # up to the pleura, not into the ribs
        paint(hu, where, inside, np.maximum(hu[where], np.float32(value)))
        labels[where][(distance < 0) & (lung[where] < 0)] = i + 1
        x, y, z = np.round(np.linalg.solve(grid.step, centre - grid.origin)).astype(int)
        labels[z, y, x] = i + 1  # the smallest may lie between voxel centres
    return labels


# ------------------------------------------------------------------ patient, scanner, scan

class Person(NamedTuple):
    """A patient: the standard body's position (mm), stretch (x, y, z), and tissue."""
    position: np.ndarray
    size: np.ndarray
    fat: float  # mm under the skin
    breasts: bool
    blood: float  # HU; contrast medium makes it bright
    liver: float  # HU

    def place(self, *point):
        """World position of a point (x, y, z) of the standard body."""
        return self.position + self.size * point


def make_person(rng):
    """A patient drawn at random; contrast medium in six of ten."""
    size = rng.uniform([0.97, 0.95, 0.90], [1.07, 1.07, 1.04])
    position = rng.uniform([-12, -40, -320], [12, 10, -60])
    blood = 45 if rng.random() < 0.4 else rng.uniform(120, 210)
    return Person(position, size, rng.uniform(8, 17), bool(rng.random() < 0.5), blood, 55 + 0.3 * blood)


def make_direction(rng, index):
    """3×3 direction (columns = index axes, LPS) of scan `index`; some a few degrees oblique."""
    diagonal = DIRECTIONS[index % len(DIRECTIONS)]
    if diagonal:
        return np.diag(diagonal).astype(float)
    a, b, c = np.radians(rng.uniform(1.5, 4, 3) * rng.choice([-1, 1], 3))
    about_x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    about_y = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    about_z = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    return np.round(about_z @ about_y @ about_x, 10)  # ten digits fit a DICOM decimal string


def make_grid(rng, person, direction, scale):
    """Grid and spacing (x, y, z): the lungs whole, 10 to 20 mm to spare at head and foot."""
    field = 356 * person.size[0] + rng.uniform(6, 26)  # the chest, barely the shoulders
    pixels = int(rng.integers(31, 37)) * 8
    step = rng.choice([1.8, 2.0, 2.5])
    spacing = np.round([field / pixels * scale, field / pixels * scale, step * scale], 6)
    lungs = person.size * [0.3 * HALF_WIDTH, 30, (APEX - FLOOR) / 2]
    height = 2 * np.abs(direction[:, 2] * lungs).sum()
    slices = int(np.ceil((height + rng.uniform(24, 36)) / spacing[2]))
    shape = (slices, round(pixels / scale), round(pixels / scale))
    middle = person.position + person.size * [0, 8, (APEX + FLOOR) / 2]
    centre = (np.array(shape[::-1]) - 1) / 2
    origin = np.round(middle - direction * spacing @ centre, 6)
    return Grid(shape, direction * spacing, origin), spacing


def scan_noise(rng, shape, sharp):
    """Correlated gaussian noise of 15 to 45 HU; a sharp kernel's is stronger and finer."""
    noise = rng.standard_normal(shape, np.float32)
    taps = np.array([-0.12, 1, -0.12]) if sharp else np.array([0.3, 0.8, 1, 0.8, 0.3])
    for axis in (1, 2):
        noise = ndimage.correlate1d(noise, taps / np.linalg.norm(taps), axis)
    return noise * np.float32(rng.uniform(28, 45) if sharp else rng.uniform(15, 28))


def expose(hu, rng):
    """The scanner: blur by half a voxel, noise, whole HU, and what lies outside its circle."""
    sharp, outside = rng.random() < 0.35, rng.choice([-2048, -1024])
    for axis in range(3):
        hu = ndimage.correlate1d(hu, [0.14, 0.72, 0.14], axis)
    hu += scan_noise(rng, hu.shape, sharp)
    np.clip(np.rint(hu, out=hu), -1024, 3071, out=hu)
    hu = hu.astype(np.int16)
    across = np.linspace(-1, 1, hu.shape[2])
    hu[:, across[:, None] ** 2 + across ** 2 > 1] = outside
    return hu


def make_phantom(index, seed=0, nodules=None, scale=1.0, direction=None):
    """Scan `index` of the series that `seed` starts; the same whatever else is made, or where.

    nodules: how many (default 3 to 8); scale: voxels so many times larger, 3 for quick tests;
    direction: 3×3 in place of the index's own.
    """
    # The fourth of every ten scans is a second one of the second's patient.
    who = index - 2 if index % 10 == 3 else index
    person = make_person(np.random.default_rng([seed, who, 1]))
    rng = np.random.default_rng([seed, index])
    direction = make_direction(rng, index) if direction is None else np.asarray(direction, float)
    grid, spacing = make_grid(rng, person, direction, scale)
    body = grid.in_body(person.position, person.size)
    hu = np.full(grid.shape, AIR, np.float32)
    cage, lung = np.empty_like(hu), np.empty_like(hu)  # distances to their surfaces, mm
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
    vessels = draw_trees(hu, grid, rng, person, cage, lung, scale)
    count = int(rng.choice([3, 4, 5, 6, 7, 8], p=[0.2, 0.25, 0.2, 0.15, 0.1, 0.1]))
    found = choose_nodules(rng, count if nodules is None else nodules, grid, lung, vessels)
    labels = draw_nodules(hu, grid, rng, found, lung)
    return Phantom(make_uid(seed, index, "series"), f"PHANTOM-{seed}-{who:04d}", expose(hu, rng),
                   tuple(spacing.tolist()), tuple(grid.origin.tolist()), direction, found, lung < 0, labels)


def make_uid(*parts):
    """A DICOM UID under 2.25 (UUIDs as integers) that is the same for the same parts."""
    return f"2.25.{int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:16], 'big')}"


# ------------------------------------------------------------------ files

def write_metaimage(folder, phantom, compressed=False, local=False):
    """Writes <seriesuid>.mhd and .raw (compressed: .zraw; local: one .mha); returns its path."""
    folder, uid = Path(folder), phantom.seriesuid
    folder.mkdir(parents=True, exist_ok=True)
    data = phantom.hu.astype("<i2").tobytes()
    data = zlib.compress(data, 1) if compressed else data
    # ITK writes the direction's columns one after the other: first the x index axis' cosines.
    ends = "".join(pair[int(v < 0)] for pair, v in zip(("RL", "AP", "IS"), np.diag(phantom.direction)))
    file = f"{uid}.{'zraw' if compressed else 'raw'}"
    header = {"ObjectType": "Image", "NDims": 3, "BinaryData": True, "BinaryDataByteOrderMSB": False,
              "CompressedData": compressed, **({"CompressedDataSize": len(data)} if compressed else {}),
              "TransformMatrix": numbers(phantom.direction.T.ravel()), "Offset": numbers(phantom.origin),
              "CenterOfRotation": "0 0 0", "AnatomicalOrientation": ends,
              "ElementSpacing": numbers(phantom.spacing), "DimSize": numbers(phantom.hu.shape[::-1]),
              "ElementType": "MET_SHORT", "ElementDataFile": "LOCAL" if local else file}
    text = "".join(f"{key} = {value}\n" for key, value in header.items()).encode()
    path = folder / f"{uid}.{'mha' if local else 'mhd'}"
    path.write_bytes(text + data if local else text)
    if not local:
        (folder / file).write_bytes(data)
    return path


def numbers(values):
    """Numbers with a space between, as many digits as they have."""
    return " ".join(str(v).removesuffix(".0") for v in np.asarray(values).tolist())


def decimals(values):
    """DICOM decimal strings, at most 16 characters each."""
    return [f"{v:.10g}" for v in values]


def dicom_header(phantom):
    """What all images of a series share."""
    ds = pydicom.Dataset()
    ds.file_meta = pydicom.dataset.FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    ds.file_meta.ImplementationClassUID = make_uid("phantom")
    ds.file_meta.ImplementationVersionName = "PHANTOM"
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = pydicom.uid.CTImageStorage
    ds.Modality, ds.Manufacturer, ds.PatientPosition = "CT", "Phantom", "HFS"
    ds.PatientID = ds.PatientName = phantom.patient
    ds.StudyDate, ds.StudyTime = "20000101", "000000"
    for empty in ("PatientBirthDate", "PatientSex", "ReferringPhysicianName", "AccessionNumber",
                  "StudyID", "PositionReferenceIndicator"):
        setattr(ds, empty, "")
    ds.SeriesNumber, ds.AcquisitionNumber, ds.KVP = 1, 1, "120"
    ds.SeriesInstanceUID = phantom.seriesuid
    ds.StudyInstanceUID = make_uid(phantom.seriesuid, "study")
    ds.FrameOfReferenceUID = make_uid(phantom.seriesuid, "frame")
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    padded = phantom.hu.min() < -1024  # then pixels are signed, else twelve bits hold them
    ds.PixelRepresentation, ds.BitsAllocated, ds.BitsStored = int(padded), 16, 16 if padded else 12
    ds.HighBit = ds.BitsStored - 1
    ds.RescaleSlope, ds.RescaleIntercept, ds.RescaleType = "1", "-1024", "HU"
    return ds


def write_image(path, ds, hu, position, axes, spacing, number, kind="AXIAL"):
    """One DICOM image: hu (rows, columns), axes = direction cosines of a row, then of a column."""
    ds.ImageType = ["ORIGINAL", "PRIMARY", kind]
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = make_uid(ds.SeriesInstanceUID, number)
    ds.InstanceNumber = number
    ds.ImagePositionPatient, ds.ImageOrientationPatient = decimals(position), decimals(axes)
    ds.PixelSpacing = decimals(spacing)
    ds.Rows, ds.Columns = hu.shape
    ds.PixelData = (hu + np.int16(1024)).astype("<i2").tobytes()
    pydicom.dcmwrite(path, ds, enforce_file_format=True)


def write_dicom(folder, phantom, localizer=False, thickness=1.0):
    """Writes <seriesuid>/NNN.dcm, in an order that is not the patient's; returns that folder.

    localizer: a scout image under the same series UID; thickness: the slices', in steps (above 1
    they overlap). An XML file of marks lies beside, as in LIDC-IDRI.
    """
    folder = Path(folder) / phantom.seriesuid
    folder.mkdir(parents=True, exist_ok=True)
    ds, count = dicom_header(phantom), len(phantom.hu)
    x, y, z = phantom.direction.T
    ds.SliceThickness = decimals([phantom.spacing[2] * thickness])[0]
    rng = np.random.default_rng(int(phantom.seriesuid.rpartition(".")[2]))
    files, instances = rng.permutation(count), rng.permutation(count)
    for k in range(count):
        position = np.array(phantom.origin) + z * phantom.spacing[2] * k
        write_image(folder / f"{files[k] + 1:03d}.dcm", ds, phantom.hu[k], position, [*x, *y],
                    phantom.spacing[1::-1], int(instances[k]) + 1)
    if localizer:
        scout = np.clip(phantom.hu, -1024, None).mean(1).astype(np.int16)[::-1, ::2]
        top = np.array(phantom.origin) + z * phantom.spacing[2] * (count - 1)
        write_image(folder / f"{count + 1:03d}.dcm", ds, scout, top, [*x, *-z],
                    (phantom.spacing[2], 2 * phantom.spacing[0]), count + 1, "LOCALIZER")
    marks = f"<SeriesInstanceUid>{phantom.seriesuid}</SeriesInstanceUid>"
    (folder / "069.xml").write_text('<?xml version="1.0" encoding="UTF-8"?>\n<LidcReadMessage>'
                                    f"<ResponseHeader>{marks}</ResponseHeader></LidcReadMessage>\n")
    return folder


def write_truth(path, phantom):
    """Lungs as bits and the voxels of the nodules, in one small file."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    flat = np.flatnonzero(phantom.nodule_labels)
    np.savez_compressed(path, shape=phantom.lungs.shape, lungs=np.packbits(phantom.lungs),
                        voxels=flat.astype(np.int32), labels=phantom.nodule_labels.flat[flat])


def read_truth(path):
    """(lungs, nodule_labels), (z, y, x) in the scan file's order, bool and uint8."""
    with np.load(path) as truth:
        shape = tuple(truth["shape"])
        lungs = np.unpackbits(truth["lungs"], count=int(np.prod(shape))).reshape(shape).astype(bool)
        labels = np.zeros(shape, np.uint8)
        labels.flat[truth["voxels"]] = truth["labels"]
    return lungs, labels


def write_scan(folder, index, seed, options):
    """Makes scan `index` and writes it with its truth; returns its annotation rows and seconds."""
    start, turn = time.perf_counter(), index // 2 % 3
    phantom = make_phantom(index, seed, **options)
    subset = Path(folder) / f"subset{index % 10}"
    if index % 2:
        write_dicom(subset, phantom, localizer=turn == 0, thickness=(1.0, 2.0, 1.25)[turn])
    else:
        write_metaimage(subset, phantom, compressed=turn == 1, local=turn == 2)
    write_truth(Path(folder) / "truth" / f"{phantom.seriesuid}.npz", phantom)
    rows = [(phantom.seriesuid, *n.centre, n.diameter) for n in phantom.nodules]
    return rows, time.perf_counter() - start


def write_scans(folder, count, seed=0, workers=1, report=None, **options):
    """Writes `count` scans as LUNA16 lays them out; annotations.csv comes last: all is there.

    Half are MetaImage (raw, zraw, mha in turn), half DICOM. The bytes do not depend on workers.
    report(done, seconds) is called after each scan; options go to make_phantom.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "annotations.csv").unlink(missing_ok=True)
    rows, jobs = [], [(folder, index, seed, options) for index in range(count)]
    with contextlib.ExitStack() as stack:
        results = (write_scan(*job) for job in jobs)
        if workers > 1:  # spawn: a fork of a process with threads may hang
            pool = stack.enter_context(concurrent.futures.ProcessPoolExecutor(
                workers, multiprocessing.get_context("spawn")))
            results = pool.map(write_scan, *zip(*jobs))
        for done, (found, seconds) in enumerate(results, 1):
            rows += found
            if report:
                report(done, seconds)
    write_annotations(folder / "annotations.csv", rows)
    return folder


def write_annotations(path, rows):
    """LUNA16's annotations.csv, whole or not at all."""
    beside = path.with_suffix(".part")
    with open(beside, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["seriesuid", "coordX", "coordY", "coordZ", "diameter_mm"])
        writer.writerows(rows)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def main():
    parser = argparse.ArgumentParser(description="Write synthetic chest CT scans to RUN/scans.")
    parser.add_argument("--run", default="runs/demo", help="folder of the run")
    parser.add_argument("--scans-count", type=int, default=30, help="how many scans")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="processes; about 600 MB each")
    args = parser.parse_args()
    total = args.scans_count
    folder = write_scans(Path(args.run) / "scans", total, args.seed, args.workers,
                         lambda done, seconds: print(f"scan {done}/{total}, {seconds:.1f} s", flush=True))
    print(f"wrote {folder}")


if __name__ == "__main__":
    main()
