"""Section 2 on what real scans and tables bring: rounded numbers, misplaced nodules, objects that are no slices.

    python -m pytest tests/test_real_scans.py -v

Each input is a small scan made here, with one flaw that users have reported. How formats are read is test_readers.py's
subject.
"""

import shutil

from lungaug import Refusal

import numpy as np
import pydicom
import pytest

import phantom
import preprocessing
import scan_files
from helpers import change, made, refused, same_scan, series


ORIGIN = (-95.0, -80.0, -60.0)
PARAMETERS = {"cube": 12, "negatives": 20, "seed": 0, "max_slice_mm": 2.5}


def trunk(spacing=(2.4, 2.4, 2.5)):
    """Air around tissue around two boxes of lung, 60 × 100 × 90 mm each: a chest of 1.2 litres."""
    hu = np.full((52, 70, 82), -1000, np.int16)
    hu[:, 6:-6, 6:-6] = 40
    hu[8:44, 14:56, 14:39] = -850
    hu[8:44, 14:56, 43:68] = -850
    return phantom.Phantom("1.2.3", "P1", hu, spacing, ORIGIN, np.eye(3), [], None, None)


def prepared(path, folder, nodules=()):
    """The record of the scan in a folder or in a file, prepared; raises its Refusal."""
    source, = preprocessing.find_scans(path)
    return preprocessing.prepare_scan(source, list(nodules), folder, PARAMETERS)


# Limits

@pytest.mark.parametrize("spacing", [2.5, 2.5000000985, 2.50001])
def test_num_2_slices__a_rounded_limit_is_within_it(tmp_path, spacing):
    """2.5000000985 mm, as SimpleITK writes 2.5 into a MetaImage, is at most 2.5."""
    scan_files.write_metaimage(tmp_path / "scans", trunk((2.4, 2.4, spacing)))
    assert prepared(tmp_path / "scans", tmp_path)["litres"] > 1


def test_num_2_slices__rounded_positions_are_within_the_limit(tmp_path):
    """A DICOM series whose positions make 2.50001 mm is one of 2.5 mm."""
    folder = series(tmp_path / "scans", trunk())
    for k, path in enumerate(sorted(folder.iterdir())):
        change(path, ImagePositionPatient=["-95", "-80", f"{-60 + 2.50001 * k:.5f}"])
    assert prepared(folder, tmp_path)["litres"] > 1


@pytest.mark.parametrize("spacing", [2.502, 2.6])
def test_num_2_slices__slices_further_apart_are_refused_with_their_distance(tmp_path, spacing):
    """Two thousandths above the limit is more than rounding; the line gives the distance."""
    scan_files.write_metaimage(tmp_path / "scans", trunk((1.5, 1.5, spacing)))
    refused(lambda: prepared(tmp_path / "scans", tmp_path), f"slices {spacing} mm apart", "at most 2.5 mm")


PERMUTED = {        # spacing of the index axes, and their directions: z is the axis whose spacing is 2.5 mm
    "axial": ((3, 3, 2.5), np.eye(3)),
    "z first": ((2.5, 3, 3), [[0, 1, 0], [0, 0, 1], [1, 0, 0]]),
    "z second": ((3, 2.5, 3), [[1, 0, 0], [0, 0, 1], [0, -1, 0]]),
}


@pytest.mark.parametrize("name", PERMUTED)
def test_num_2_slices__the_limit_is_about_slices_not_pixels(name):
    """Of a MetaImage's axes, in any order, the one nearest to the patient's z has the slices' distance."""
    spacing, direction = PERMUTED[name]
    scan = preprocessing.Scan("1.2.3", np.zeros((4, 4, 4)), np.array(spacing), np.zeros(3), np.array(direction))
    assert preprocessing.slice_distance(scan) == 2.5


def test_num_2_slices__wide_pixels_are_not_slices(tmp_path):
    """Pixels of 3 mm with slices 2.5 mm apart are within the limit of 2.5 mm, which LUNA16 sets for slices."""
    scan_files.write_metaimage(tmp_path / "scans", trunk((3, 3, 2.5)))
    assert prepared(tmp_path / "scans", tmp_path)["litres"] > 1


PLANES = {      # tags of every second slice, which differ from the others' by less than they are rounded to
    "pixel spacings": ("PixelSpacing", ["1.8204999", "1.8204999"], ["1.8205001", "1.8205001"]),
    "row cosines": ("ImageOrientationPatient", ["0.9999999", "0.0004999", "0", "-0.0004999", "0.9999999", "0"],
                    ["0.9999999", "0.0005001", "0", "-0.0005001", "0.9999999", "0"]),
}


@pytest.mark.parametrize("name", PLANES)
def test_rule_2_dicom_geometry__planes_that_differ_by_rounding_are_one_volume(tmp_path, name):
    """1.8204999 and 1.8205001 mm round to different thousandths, and are the same spacing."""
    tag, *values = PLANES[name]
    scan = made(shape=(6, 5, 7))
    folder = series(tmp_path / "s", scan)
    for k, path in enumerate(sorted(folder.iterdir())):
        change(path, **{tag: values[k % 2]})
    assert np.array_equal(preprocessing.read_scan(folder).hu, scan.hu)


def test_rule_2_dicom_geometry__planes_that_differ_by_more_are_not(tmp_path):
    """0.7 and 0.702 mm are two spacings."""
    folder = series(tmp_path / "s", made(shape=(6, 5, 7)))
    for path in sorted(folder.iterdir())[::2]:
        change(path, PixelSpacing=["0.802", "0.702"])
    refused(lambda: preprocessing.read_scan(folder), "pixel spacing")


def test_rule_2_dicom_geometry__uneven_slices_are_named_by_steps_that_occur(tmp_path):
    """Half of the steps 1.25 mm and half 2.5 mm: the line names these two, not 1.875, the median between them."""
    folder = series(tmp_path / "s", made(shape=(9, 5, 7)))
    for path, z in zip(sorted(folder.iterdir()), np.cumsum([0.0] + [1.25] * 4 + [2.5] * 4)):
        change(path, ImagePositionPatient=["0", "0", f"{z}"])
    refused(lambda: preprocessing.read_scan(folder), "after [0.0, 0.0, 5.0] mm lies [0.0, 0.0, 2.5] on, not "
            "[0.0, 0.0, 1.25]")


# Nodules that are not where the annotations say

NODULES = np.array([(-40, -20, 0, 10), (30, 10, 20, 8), (-20, 30, -10, 12)])     # (x, y, z, diameter), mm


def with_nodules(scan, nodules, hu=40):
    """The scan with balls of one density."""
    filled = scan.hu.copy()
    x, y, z = np.array(scan.origin)[:, None, None, None] + np.indices(scan.hu.shape)[::-1] * np.reshape(
        scan.spacing, (3, 1, 1, 1))
    for *centre, diameter in nodules:
        distance = np.sqrt((x - centre[0]) ** 2 + (y - centre[1]) ** 2 + (z - centre[2]) ** 2)
        filled[distance <= diameter / 2] = hu
    return scan._replace(hu=filled)


def record_of(folder, annotated, nodules=NODULES, hu=40, origin=ORIGIN):
    """The record of a trunk that holds `nodules` and is annotated with others, prepared."""
    scan = with_nodules(trunk()._replace(origin=origin), nodules, hu)
    scan_files.write_metaimage(folder / "scans", scan)
    return prepared(folder / "scans", folder, annotated)


@pytest.mark.parametrize("hu", [40, -600], ids=["solid", "ground glass"])
def test_misplaced_nodules__none_where_they_stand_out(tmp_path, hu):
    """Nodules at their annotated places, solid or ground-glass, give no warning."""
    assert "misplaced" not in record_of(tmp_path, NODULES, hu=hu)


def test_misplaced_nodules__one_at_the_pleura_is_none(tmp_path):
    """A nodule half in the wall has lung around its other half."""
    at_pleura = [(-61, -20, 0, 12)]
    assert "misplaced" not in record_of(tmp_path, at_pleura, nodules=at_pleura)


READINGS = {    # what is wrong with the coordinates → what the table says
    "x and y negated, RAS in place of LPS": NODULES * (-1, -1, 1, 1),
    "x negated": NODULES * (-1, 1, 1, 1),
    "y negated": NODULES * (1, -1, 1, 1),
    "voxel indices in place of mm": np.column_stack([(NODULES[:, :3] - ORIGIN) / (2.4, 2.4, 2.5), NODULES[:, 3]]),
    "those of another scan, or not in mm, LPS": NODULES + (7, -6, 20, 0),
}


@pytest.mark.parametrize("cause", READINGS)
def test_misplaced_nodules__within_the_lungs_are_told_by_their_density(tmp_path, cause):
    """All centres lie in the mask, but in lung as thin as its surroundings: each is named, with the likely cause."""
    record = record_of(tmp_path, READINGS[cause])
    assert record["misplaced"] == READINGS[cause].tolist()
    assert record["cause"] == cause


def test_misplaced_nodules__those_smaller_than_a_voxel_are_not_judged(tmp_path):
    """Between voxels 2.5 mm apart a nodule of 2.4 mm may vanish: that says nothing of its place; of 2.6 mm it does."""
    record = record_of(tmp_path, NODULES * (-1, -1, 1, 0) + (0, 0, 0, 2.4))
    larger = record_of(tmp_path, NODULES * (-1, -1, 1, 0) + (0, 0, 0, 2.6))
    assert "misplaced" not in record and len(larger["misplaced"]) == 3


def test_misplaced_nodules__a_single_faint_one_is_none(tmp_path):
    """One nodule of three that does not stand out may be faint: coordinates in another frame miss most."""
    assert "misplaced" not in record_of(tmp_path, NODULES, nodules=NODULES[:2])


def test_misplaced_nodules__a_single_one_far_outside_the_lungs_is_named(tmp_path):
    """A nodule 30 mm below the lungs is named, though the two others are right."""
    below = (-20, 30, -58, 6)
    record = record_of(tmp_path, [*NODULES[:2], below])
    assert record["misplaced"] == [list(below)]


BACK = NODULES + (0, 200, 0, 0)
OUTSIDE = {"RAS in place of LPS": BACK * (-1, -1, 1, 1), "another scan": BACK + (0, 0, 5000, 0)}


@pytest.mark.parametrize("cause", OUTSIDE)
def test_check_nodules__outside_the_volume_is_an_error_of_the_table(tmp_path, cause):
    """The line blames the annotations, not the scan's file: series, place and likely cause."""
    annotated = OUTSIDE[cause]
    x, y, z, _ = annotated[0]
    origin = np.add(ORIGIN, (0, 200, 0))
    refused(lambda: record_of(tmp_path, annotated, BACK, origin=origin), "the annotations: ", "of 1.2.3 lies outside",
            f"{x:g}, {y:g}, {z:g}", cause)
    assert not list(tmp_path.glob("*.npy"))


def test_command__misplaced_nodules_are_warned_of_a_scan_and_in_total(tmp_path, run):
    """Three scans in RAS: a line each and one of all, which gives the cause; the scans are prepared."""
    rows = []
    for uid in ("1.2.1", "1.2.2", "1.2.3"):
        scan_files.write_metaimage(tmp_path / "scans", with_nodules(trunk()._replace(seriesuid=uid), NODULES))
        rows += [(uid, -x, -y, z, diameter) for x, y, z, diameter in NODULES.tolist()]
    scan_files.write_annotations(tmp_path / "scans/annotations.csv", rows)

    done = run(preprocessing, "--scans", tmp_path / "scans", "--run", tmp_path / "run", "--cube", 12, "--negatives", 20,
               "--workers", 1)
    warnings = [line for line in done.out.splitlines() if line.startswith("warning: ")]
    *scans, total = [line for line in warnings if "few nodules" not in line]
    assert done.status == 0, done.err
    assert [line.split(": ")[1] for line in scans] == ["1.2.1", "1.2.2", "1.2.3"]
    assert all("3 of 3 nodules" in line and "40, 20, 0; " in line for line in scans)
    assert "9 nodules in 3 of 3 scans" in total and "RAS in place of LPS (3 scans)" in total


def test_read_annotations__every_impossible_diameter_is_named_in_one_line(tmp_path):
    """0, a negative one and one above 100 mm: their lines and values; 100 mm itself is none of them."""
    path = tmp_path / "annotations.csv"
    scan_files.write_annotations(path, [("1.2.3", 0, 0, 0, diameter) for diameter in (0, 100, 5, -4, 400)])
    refused(lambda: preprocessing.read_annotations(path), path, "line 2 of 0 mm; line 5 of -4 mm; line 6 of 400 mm")


def test_read_annotations__a_row_that_is_there_twice_is_told(tmp_path, capsys):
    """One nodule, and one line that names the row and what it repeats; nothing is said of a table without."""
    path = tmp_path / "annotations.csv"
    scan_files.write_annotations(path, [("1.2.3", 1, 2, 3, 4), ("1.2.4", 1, 2, 3, 4)])
    preprocessing.read_annotations(path)
    assert capsys.readouterr().out == ""

    scan_files.write_annotations(path, [("1.2.3", 1, 2, 3, 4), ("1.2.3", 5, 6, 7, 8), ("1.2.3", 1, 2, 3.0, 4)])
    assert preprocessing.read_annotations(path) == {"1.2.3": [(1, 2, 3, 4), (5, 6, 7, 8)]}
    assert "line 4 repeats line 2" in capsys.readouterr().out

    # Beside an impossible diameter it is told, too: all that is wrong with a table can be corrected at one go.
    scan_files.write_annotations(path, [("1.2.3", 1, 2, 3, 4), ("1.2.3", 5, 6, 7, 0), ("1.2.3", 1, 2, 3, 4)])
    refused(lambda: preprocessing.read_annotations(path), "line 3 of 0 mm")
    assert "line 4 repeats line 2" in capsys.readouterr().out


# Objects of a series that are no slices

STACK = made(shape=(6, 5, 7))
SECONDARY = pydicom.uid.SecondaryCaptureImageStorage
NO_PLACE = dict(ImagePositionPatient=None, ImageOrientationPatient=None, PixelSpacing=None)
STRAYS = {      # what it is → tags of a copy of a slice one step past the last, and what the line calls it
    "dose report": (NO_PLACE | dict(Rows=None, Columns=None, PixelData=None), "without an image"),
    "screen shot": (NO_PLACE | dict(SOPClassUID=SECONDARY), "Secondary Capture"),
    "localizer without a place": (NO_PLACE | dict(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), "localizer"),
    "localizer": (dict(ImageOrientationPatient=["1", "0", "0", "0", "0", "-1"]), "another orientation"),
    "no pixels": (dict(PixelData=None), "without pixels"),
    "other spacing": (dict(PixelSpacing=["0.9", "0.7"]), "in-plane pixel spacing 0.9 × 0.7 mm, not 0.8 × 0.7"),
    "other size": (dict(Rows=7, Columns=5), "7 × 5 pixels, not 5 × 7"),
    "many slices in one file": (dict(SOPClassUID=pydicom.uid.EnhancedCTImageStorage), "Enhanced CT"),
}


def with_stray(folder, kind, scan=STACK):
    """A series with a stray object, stray.dcm, one step past its last slice."""
    series(folder, scan)
    x, y, z = scan.origin
    shutil.copy(folder / "000.dcm", folder / "stray.dcm")
    place = [str(x), str(y), f"{z + len(scan.hu) * scan.spacing[2]:.4f}"]
    change(folder / "stray.dcm", ImagePositionPatient=place)
    tags, _ = STRAYS[kind]
    change(folder / "stray.dcm", **tags)
    return folder


@pytest.mark.parametrize("kind", STRAYS)
def test_rule_2_dicom_geometry__a_stray_object_is_named_and_the_series_read(tmp_path, kind):
    """The scan is as without the object, and holds one phrase with its name and what it is."""
    scan = preprocessing.read_scan(with_stray(tmp_path / "s", kind))
    ignored, = scan.ignored
    same_scan(scan, STACK)
    assert ignored.startswith("stray.dcm: ") and STRAYS[kind][1] in ignored


def test_rule_2_dicom_geometry__a_clean_series_ignores_nothing(tmp_path):
    """Six slices are six slices."""
    assert preprocessing.read_scan(series(tmp_path / "s", STACK)).ignored == ()


@pytest.mark.parametrize("tags, says", [
    (dict(PixelSpacing=["0.9", "0.7"]), "in-plane pixel spacing 0.9 × 0.7 mm, not 0.8 × 0.7"),
    (dict(Rows=7, Columns=5), "7 × 5 pixels, not 5 × 7"),
    (dict(PixelData=None), "without pixels")])
def test_rule_2_dicom_geometry__one_whose_absence_leaves_a_gap_is_refused(tmp_path, tags, says):
    """Without it the rest is no even volume: the line names the file, its difference and the gap."""
    folder = series(tmp_path / "s", STACK)
    change(folder / "003.dcm", **tags)
    refused(lambda: preprocessing.read_scan(folder), "003.dcm", says, "[0.0, 0.0, 2.6] on, not [0.0, 0.0, 1.3]")


def test_rule_2_dicom_geometry__a_localizer_is_not_blamed_for_a_gap(tmp_path):
    """Where a slice is missing beside a localizer, the line speaks of the gap alone."""
    folder = with_stray(tmp_path / "s", "localizer")
    (folder / "002.dcm").unlink()
    with pytest.raises(Refusal, match="missing") as caught:
        preprocessing.read_scan(folder)
    assert "stray.dcm" not in str(caught.value)


def test_rule_2_dicom_geometry__several_of_another_spacing_are_no_strays(tmp_path):
    """Two of six slices at an end are a part of the chest, which must not get lost."""
    folder = series(tmp_path / "s", STACK)
    for name in ("004.dcm", "005.dcm"):
        change(folder / name, PixelSpacing=["0.9", "0.7"])
    refused(lambda: preprocessing.read_scan(folder), "004.dcm", "in-plane pixel spacing", "2 of 6 files")


def test_read_scan__an_enhanced_object_alone_is_refused_with_its_name(tmp_path):
    """All slices in one file: the line says what it is and how to convert it."""
    folder = series(tmp_path / "s", STACK, keep=[0])
    change(folder / "000.dcm", SOPClassUID=pydicom.uid.EnhancedCTImageStorage, NumberOfFrames=2,
           PixelData=bytes(140))
    refused(lambda: preprocessing.read_scan(folder), "000.dcm", "Enhanced CT", "convert")


def test_command__what_a_series_ignores_is_one_line(tmp_path, run):
    """The scan with a dose report is prepared with the two others; its record is as without the object."""
    scans = tmp_path / "scans"
    for uid in ("1.2.1", "1.2.2"):
        scan_files.write_metaimage(scans, with_nodules(trunk()._replace(seriesuid=uid), NODULES))
    with_stray(scans / "s", "dose report", with_nodules(trunk(), NODULES))
    scan_files.write_annotations(scans / "annotations.csv",
                              [(uid, *nodule) for uid in ("1.2.1", "1.2.2", "1.2.3") for nodule in NODULES.tolist()])

    done = run(preprocessing, "--scans", scans, "--run", tmp_path / "run", "--cube", 12, "--negatives", 20)
    line, = [line for line in done.out.splitlines() if line.startswith("ignored: ")]
    assert done.status == 0 and f"{scans / 's'}: stray.dcm: without an image" in line
    assert "3 scans, 0 skipped" in done.out and "warning: 1.2" not in done.out
    assert "stray" not in (tmp_path / "run/prepared/1.2.3.json").read_text(encoding="utf-8")
