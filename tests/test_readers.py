"""Section 2, Dataset: how scans and annotations are read, whatever form they come in, and what is refused.

    python -m pytest tests/test_readers.py -v

One phantom written as .mhd, .zraw, .mha and DICOM must give one Scan. What MetaImage's keys mean is what MetaIO's own
reader (Kitware's metaObject.cxx, metaImage.cxx) makes of them; DICOM's are those of PS3.3, C.7.6.2.
"""

import os
import shutil
import tracemalloc
import warnings
import zlib

from lungaug import Refusal

import numpy as np
import pydicom
import pytest

import phantom
import preprocessing
import scan_files
from helpers import SHAPE, change, made, refused, same_scan, series
from preprocessing import Source, find_scans, read_annotations, read_scan, resample


TYPES = {"MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2", "MET_INT": "i4", "MET_UINT": "u4",
         "MET_LONG": "i4", "MET_ULONG": "u4", "MET_FLOAT": "f4", "MET_DOUBLE": "f8"}

OBLIQUE = np.array([[0.6, -0.768, 0.224], [0.8, 0.576, -0.168], [0, 0.28, 0.96]])     # a rotation that four digits hold
TILT = np.array([[1, 0, 0], [0, 1, 0.28], [0, 0, 0.96]])
SAGITTAL = np.array([[0, 0, 1], [1, 0, 0], [0, 1, 0]])
CORONAL = np.array([[1, 0, 0], [0, 0, 1], [0, -1, 0]])
RIGHT_HANDED = {"identity": np.eye(3), "turned": np.diag([-1, -1, 1]), "feet first": np.diag([1, -1, -1]),
                "sagittal": SAGITTAL,
                "coronal": CORONAL, "oblique": OBLIQUE}


# MetaImage


def metaimage(folder, data, end="\n", name="a.mhd", **changes):
    """A MetaImage of these bytes with other keys, or without those that are None; data None writes no file of data."""
    keys = {"NDims": "3", "DimSize": "7 5 4", "ElementSpacing": "0.7 0.8 1.3", "ElementType": "MET_SHORT", **changes}
    keys["ElementDataFile"] = keys.pop("ElementDataFile", "a.raw")
    text = "".join(f"{key} = {value}{end}" for key, value in keys.items() if value is not None).encode()
    local = keys["ElementDataFile"] == "LOCAL"
    (folder / name).write_bytes(text + (data or b"") * local)
    if not local and data is not None:
        (folder / "a.raw").write_bytes(data)
    return folder / name


VALUES = np.random.default_rng(1).integers(-100, 100, SHAPE).astype("<i2")
DATA = VALUES.tobytes()


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("order", ["<", ">"], ids=["little", "big"])
@pytest.mark.parametrize("kind", TYPES)
def test_read_scan__every_element_type(tmp_path, kind, order, compressed):
    """Every type, in both byte orders, compressed or not: whole numbers become int16, fractions stay float32."""
    values = np.abs(VALUES) if TYPES[kind][0] == "u" else VALUES + 0.25 if TYPES[kind][0] == "f" else VALUES
    data = values.astype(np.dtype(TYPES[kind]).newbyteorder(order)).tobytes()
    path = metaimage(tmp_path, zlib.compress(data) if compressed else data, ElementType=kind, CompressedData=compressed,
                     BinaryDataByteOrderMSB=order == ">")
    hu = read_scan(path).hu
    assert np.array_equal(hu, values)
    assert hu.dtype == (np.float32 if TYPES[kind][0] == "f" else np.int16) and hu.dtype.isnative


@pytest.mark.parametrize("kind, value, hu",
                         [("MET_USHORT", 40000, 32767), ("MET_INT", -70000, -32768), ("MET_UINT", 4294967295, 32767)])
def test_read_scan__values_past_int16_are_clipped(tmp_path, kind, value, hu):
    """What does not fit into int16 becomes its end, and does not wrap around to the other."""
    path = metaimage(tmp_path, np.full(SHAPE, value).astype("<" + TYPES[kind]).tobytes(), ElementType=kind)
    assert (read_scan(path).hu == hu).all()


@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["LF", "CRLF"])
@pytest.mark.parametrize("compressed", [False, True])
def test_read_scan__local_data_in_one_mha(tmp_path, compressed, end):
    """LOCAL data begin behind the line that says so, with either line end, though they look like line ends."""
    data = np.full(SHAPE, 0x0a0d, "<i2").tobytes()
    path = metaimage(tmp_path, zlib.compress(data) if compressed else data, end, "a.mha", CompressedData=compressed,
                     ElementDataFile="LOCAL")
    assert (read_scan(path).hu == 0x0a0d).all()


def test_read_scan__crlf_header(tmp_path):
    """A header from Windows names the same file."""
    assert np.array_equal(read_scan(metaimage(tmp_path, DATA, "\r\n")).hu, VALUES)


@pytest.mark.parametrize("size", [12, -1])
def test_read_scan__header_size(tmp_path, size):
    """HeaderSize bytes are passed over; −1 takes the file's last bytes."""
    assert np.array_equal(read_scan(metaimage(tmp_path, b"x" * 12 + DATA, HeaderSize=size)).hu, VALUES)


def test_read_scan__axes_are_x_fastest(tmp_path):
    """DimSize is x, y, z and x runs fastest: hu is (z, y, x)."""
    scan = read_scan(metaimage(tmp_path, np.arange(140, dtype="<i2").tobytes()))
    assert scan.hu.shape == SHAPE and (scan.hu[0, 0, 1], scan.hu[0, 1, 0], scan.hu[1, 0, 0]) == (1, 7, 35)
    assert scan.spacing.tolist() == [0.7, 0.8, 1.3]


@pytest.mark.parametrize("key, value, field, expected", [
    *((key, "1 2 3", "origin", [1, 2, 3]) for key in ("Offset", "Position", "Origin")),
    *((key, "0 1 0 0 0 1 1 0 0", "direction", [[0, 0, 1], [1, 0, 0], [0, 1, 0]])
      for key in ("TransformMatrix", "Rotation", "Orientation"))])
def test_read_scan__synonyms(tmp_path, key, value, field, expected):
    """MetaIO's other names for a key mean the same; the matrix lists the x, y, z axes in turn, direction's columns."""
    assert getattr(read_scan(metaimage(tmp_path, DATA, **{key: value})), field).tolist() == expected


def test_read_scan__without_place_lies_at_the_origin(tmp_path):
    """MetaIO's defaults: Offset 0 0 0 and the identity."""
    scan = read_scan(metaimage(tmp_path, DATA))
    assert scan.origin.tolist() == [0, 0, 0] and np.array_equal(scan.direction, np.eye(3))


def test_read_scan__element_size_alone_is_the_spacing(tmp_path):
    """Where there is no ElementSpacing, ElementSize is taken for it, as MetaIO does."""
    assert read_scan(metaimage(tmp_path, DATA, ElementSpacing=None,
                               ElementSize="0.5 0.6 2")).spacing.tolist() == [0.5, 0.6, 2]


def test_read_scan__element_size_is_no_spacing_beside_one(tmp_path):
    """ElementSize is a voxel's extent, so slice thickness: ElementSpacing goes before, wherever it stands."""
    path = metaimage(tmp_path, DATA, ElementSpacing=None)
    path.write_text("ElementSize = 0.7 0.8 5\nElementSpacing = 0.7 0.8 1.3\n" + path.read_text(encoding="utf-8"))
    assert read_scan(path).spacing.tolist() == [0.7, 0.8, 1.3]


def test_read_scan__element_byte_order_msb(tmp_path):
    """ElementByteOrderMSB is another name of BinaryDataByteOrderMSB."""
    assert np.array_equal(read_scan(metaimage(tmp_path, VALUES.astype(">i2").tobytes(), ElementByteOrderMSB="True")).hu,
                          VALUES)


@pytest.mark.parametrize("yes", ["true", "T", "1"])
@pytest.mark.parametrize("key", ["BinaryDataByteOrderMSB", "CompressedData"])
def test_read_scan__true_in_any_spelling_is_never_false(tmp_path, key, yes):
    """MetaIO takes what begins with T, t or 1 for true: it is read so, or refused, but never with the bytes swapped."""
    data = zlib.compress(DATA) if key == "CompressedData" else VALUES.astype(">i2").tobytes()
    try:
        assert np.array_equal(read_scan(metaimage(tmp_path, data, **{key: yes})).hu, VALUES)
    except Refusal as refusal:
        assert key in str(refusal)


@pytest.mark.parametrize("direction", [SAGITTAL, OBLIQUE, TILT], ids=["sagittal", "oblique", "tilt"])
def test_rule_2_1_1_resample__metaimage_direction_is_read_as_columns(tmp_path, direction):
    """Written as ITK writes it, the x axis first, a direction that is not its own transpose comes back itself."""
    assert not np.allclose(direction, np.transpose(direction))
    assert np.array_equal(read_scan(scan_files.write_metaimage(tmp_path, made(direction))).direction, direction)


BAD = {     # keys, and the words that the Refusal must hold
    "short data": (dict(ElementDataFile="short.raw"), ["short.raw", "279 bytes", "280"]),
    "long data": (dict(ElementDataFile="long.raw"), ["long.raw", "280"]),
    "missing data": (dict(ElementDataFile="none.raw"), ["none.raw", "a.mhd"]),
    "data are a folder": (dict(ElementDataFile="folder"), ["folder"]),
    "data above": (dict(ElementDataFile="../a.raw"), ["a.mhd", "../a.raw"]),
    "data elsewhere": (dict(ElementDataFile="/etc/passwd"), ["a.mhd", "/etc/passwd"]),
    "data below": (dict(ElementDataFile="folder/a.raw"), ["a.mhd", "folder/a.raw"]),
    "a list of files": (dict(ElementDataFile="LIST"), ["LIST"]),
    "numbered files": (dict(ElementDataFile="a%02d.raw 1 4 1"), ["a%02d"]),
    "2-D": (dict(NDims=2, DimSize="28 5", ElementSpacing="1 1"), ["a.mhd", "NDims = 2"]),
    "4-D": (dict(NDims=4, DimSize="7 5 2 2", ElementSpacing="1 1 1 1"), ["a.mhd", "NDims = 4"]),
    "channels": (dict(ElementNumberOfChannels=3), ["a.mhd", "ElementNumberOfChannels = 3"]),
    "no type": (dict(ElementType=None), ["a.mhd", "ElementType"]),
    "unknown type": (dict(ElementType="MET_STRING"), ["a.mhd", "MET_STRING"]),
    "text, not bytes": (dict(BinaryData="False"), ["a.mhd", "BinaryData"]),
    "no size": (dict(DimSize=None), ["a.mhd", "DimSize"]),
    "a zero size": (dict(DimSize="7 0 4"), ["a.mhd", "DimSize = 7 0 4"]),
    "a negative size": (dict(DimSize="-7 -5 4"), ["a.mhd", "DimSize = -7 -5 4"]),
    "a terabyte": (dict(DimSize="10000 10000 10000"), ["a.mhd", "DimSize = 10000 10000 10000"]),
    "past any number": (dict(DimSize="1e300 1e300 1e300"), ["a.mhd", "DimSize"]),
    "a size with a fraction": (dict(DimSize="7.9 5 4"), ["a.mhd", "DimSize = 7.9 5 4"]),
    "a size of words": (dict(DimSize="seven five four"), ["a.mhd"]),
    "one slice": (dict(DimSize="28 5 1"), ["a.mhd", "(1, 5, 28)"]),
    "no spacing": (dict(ElementSpacing=None), ["a.mhd", "ElementSpacing"]),
    "zero spacing": (dict(ElementSpacing="0.7 0 1.3"), ["a.mhd", "spacing"]),
    "negative spacing": (dict(ElementSpacing="0.7 0.8 -1.3"), ["a.mhd", "spacing"]),
    "spacing in metres": (dict(ElementSpacing="700 800 1300"), ["a.mhd", "spacing"]),
    "spacing NaN": (dict(ElementSpacing="0.7 0.8 nan"), ["a.mhd", "ElementSpacing"]),
    "spacing of next to nothing": (dict(ElementSpacing="1e-320 1 1"), ["a.mhd", "spacing"]),
    "place out of this world": (dict(Offset="1e17 1e17 1e17"), ["a.mhd", "Offset"]),
    "an offset of two": (dict(Offset="1 2"), ["a.mhd", "Offset = 1 2"]),
    "an infinite offset": (dict(Offset="1 2 inf"), ["a.mhd", "Offset = 1 2 inf"]),
    "a flat direction": (dict(TransformMatrix="1 0 0 0 1 0 0 1 0"), ["a.mhd", "direction"]),
    "a stretched direction": (dict(TransformMatrix="2 0 0 0 1 0 0 0 1"), ["a.mhd", "direction"]),
    "a header size of words": (dict(HeaderSize="some"), ["a.mhd"]),
    "a negative header size": (dict(HeaderSize=-5), ["280"]),
    "a header past the file": (dict(HeaderSize=10 ** 12), ["280"]),
    "a header past any file": (dict(HeaderSize=10 ** 18), ["280", "HeaderSize"]),
    "compressed, but it is not": (dict(CompressedData=True), ["a.mhd"]),
    "a hostile name": (dict(ElementDataFile="\x1b[31m\x00.raw"), ["\\x1b"]),
}


@pytest.mark.parametrize("name", BAD)
def test_read_scan__bad_metaimage_is_refused(tmp_path, name):
    """One line that names the file and what was found in it, whatever a header or its data hold."""
    keys, words = BAD[name]
    (tmp_path / "folder").mkdir()
    (tmp_path / "short.raw").write_bytes(DATA[:-1])
    (tmp_path / "long.raw").write_bytes(DATA + b"x")
    path = metaimage(tmp_path, DATA, **keys)
    shutil.copy(tmp_path / "a.raw", tmp_path / "folder/a.raw")
    refused(lambda: read_scan(path), *words)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_read_scan__voxels_that_are_not_finite_are_refused(tmp_path, value):
    """NaN and ±∞ are no HU."""
    values = VALUES.astype("<f4")
    values[1, 2, 3] = value
    path = metaimage(tmp_path, values.tobytes(), ElementType="MET_FLOAT")
    refused(lambda: read_scan(path), "a.raw", "NaN or infinite")


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("value", [1e300, -np.finfo(np.float32).max, 1e12])
def test_read_scan__doubles_past_all_measure_are_refused(tmp_path, value):
    """1e300, finite as a double, is ∞ as float32, and the lowest float marks what was not measured: no HU either."""
    path = metaimage(tmp_path, np.full(SHAPE, value, float).tobytes(), ElementType="MET_DOUBLE")
    refused(lambda: read_scan(path), "a.raw", "above 10¹²")


@pytest.mark.parametrize("count", [2, 4])
def test_read_scan__ndims_against_dim_size_is_refused(tmp_path, count):
    """NDims = 2 or 4 beside three sizes: the header contradicts itself."""
    with pytest.raises(Refusal, match="a.mhd"):
        read_scan(metaimage(tmp_path, DATA, NDims=count))


def test_read_scan__keys_without_spaces(tmp_path):
    """Spaces around = are a habit of the writers', no part of the format."""
    path = metaimage(tmp_path, DATA)
    path.write_text(path.read_text(encoding="utf-8").replace(" = ", "="))
    assert np.array_equal(read_scan(path).hu, VALUES)


def test_read_scan__keys_among_tabs_and_spaces(tmp_path):
    """Blanks before a key, behind a value and several between numbers are no part of either."""
    path = metaimage(tmp_path, DATA, " \t\r\n", DimSize="7  5\t4", ElementSpacing="  0.7   0.8 1.3")
    path.write_bytes(b"".join(b"  " + line for line in path.read_bytes().splitlines(keepends=True)))
    scan = read_scan(path)
    assert np.array_equal(scan.hu, VALUES) and scan.spacing.tolist() == [0.7, 0.8, 1.3]


def test_read_scan__a_data_file_with_a_space_in_its_name(tmp_path):
    """The name of the data is the whole rest of its line."""
    (tmp_path / "a b.raw").write_bytes(DATA)
    assert np.array_equal(read_scan(metaimage(tmp_path, None, ElementDataFile="a b.raw")).hu, VALUES)


@pytest.mark.parametrize("size", ["7 5 3", "7 5 5", "7 5", "7 5 4 1"])
def test_read_scan__dim_size_against_the_data_is_refused(tmp_path, size):
    """Fewer or more voxels than the data hold, or another number of axes: the bytes are not read as another shape."""
    refused(lambda: read_scan(metaimage(tmp_path, DATA, DimSize=size)), "a.")


def test_rule_2_1_1_resample__skew_metaimage_axes_are_honoured(tmp_path):
    """Axes of length 1 that are not at right angles, as of a tilted gantry, go through the affine as they are."""
    matrix = "1 0 0 0 1 0 0 0.28 0.96"
    scan = read_scan(metaimage(tmp_path, DATA, TransformMatrix=matrix, ElementSpacing="1 1 2"))
    assert np.allclose(preprocessing.affine(scan) @ [3, 2, 1], [3, 2.56, 1.92])


@pytest.mark.parametrize("text", [b"", b"ObjectType = Image\n", bytes(range(256)) * 600],
                         ids=["empty", "cut short", "bytes"])
def test_read_scan__what_is_no_header_is_refused(tmp_path, text):
    """A file without ElementDataFile is no MetaImage."""
    (tmp_path / "a.mhd").write_bytes(text)
    refused(lambda: read_scan(tmp_path / "a.mhd"), "a.mhd", "ElementDataFile")


@pytest.mark.parametrize("cut", [lambda data: data[:60], lambda data: data[:-60],
                                 lambda data: data[:50] + b"xxxx" + data[54:]],
                         ids=["little of it", "most of it", "spoilt"])
def test_read_scan__spoilt_compressed_data_are_refused(tmp_path, cut):
    """Compressed data cut short or spoilt do not pass for whole."""
    refused(lambda: read_scan(metaimage(tmp_path, cut(zlib.compress(DATA)), CompressedData=True)), "a.")


def peak(read):
    """The most memory, in bytes, that a refused read took."""
    tracemalloc.start()
    refused(read)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return most


def test_read_scan__a_zlib_bomb_takes_no_memory(tmp_path):
    """Data that unpack to 64 MB where the header makes 280 bytes are refused after 280 bytes, not after 64 MB."""
    path = metaimage(tmp_path, zlib.compress(bytes(2 ** 26), 1), CompressedData=True)
    assert peak(lambda: read_scan(path)) < 2 ** 21


def test_read_scan__a_boast_takes_no_memory(tmp_path):
    """A header that makes 256 MB of a few bytes, compressed or not, is refused before memory is taken."""
    for compressed in (False, True):
        path = metaimage(tmp_path, zlib.compress(DATA), DimSize="512 512 512", CompressedData=compressed)
        assert peak(lambda: read_scan(path)) < 2 ** 20


def test_read_scan__a_file_that_is_not_there_is_refused(tmp_path):
    """A link to nothing, which a moved data set leaves, is one bad scan with its reason, not the end of the run."""
    os.symlink(tmp_path / "gone.mhd", tmp_path / "a.mhd")
    refused(lambda: read_scan(tmp_path / "a.mhd"), "a.mhd")


# One phantom in every form


@pytest.fixture(scope="module", params=["identity", "turned", "feet first", "oblique"])
def forms(request, tmp_path_factory):
    """A coarse chest as four kinds of file, read: form → Scan; and the phantom itself."""
    folder = tmp_path_factory.mktemp("forms")
    chest = phantom.make_phantom(3, scale=5, direction=RIGHT_HANDED[request.param])
    ways = {"mhd": {}, "zraw": {"compressed": True}, "mha": {"local": True},
            "zlib mha": {"local": True, "compressed": True}}
    scans = {form: read_scan(scan_files.write_metaimage(folder / form, chest, **way)) for form, way in ways.items()}
    return chest, scans | {"DICOM": read_scan(scan_files.write_dicom(folder, chest))}


def test_rule_2_dicom_geometry__every_form_gives_the_same_scan(forms):
    """.mhd, .zraw, .mha and DICOM hold the phantom's own voxels, spacing, origin and direction."""
    chest, scans = forms
    assert len(scans) == 5
    for scan in scans.values():
        assert scan.seriesuid == chest.seriesuid
        same_scan(scan, chest)


def test_rule_2_dicom_geometry__every_form_gives_the_same_volume(forms):
    """Resampled, every form gives the same grid and, voxel for voxel, the same HU."""
    _, scans = forms
    (first, shape), *others = map(preprocessing.grid, scans.values())
    middle = first + np.array(shape[::-1]) // 2 - 30
    volume, *volumes = [resample(scan, middle, (60, 61, 62)).hu for scan in scans.values()]
    assert all(np.array_equal(origin, first) and np.array_equal(other, shape) for origin, other in others)
    assert volume.std() > 100 and all(np.array_equal(other, volume) for other in volumes)


def test_rule_2_dicom_geometry__left_handed_axes_give_the_same_volume(tmp_path):
    """A mirrored MetaImage and the DICOM series of the same voxels, whose slices have no order, are one volume."""
    mirrored = made(np.diag([1.0, 1, -1]))
    one = read_scan(scan_files.write_metaimage(tmp_path, mirrored))
    other = read_scan(scan_files.write_dicom(tmp_path, mirrored))
    assert np.array_equal(resample(one).hu, resample(other).hu)


# DICOM


@pytest.mark.parametrize("name", RIGHT_HANDED)
def test_rule_2_dicom_geometry__order_is_along_the_normal(tmp_path, name):
    """Slices are ordered by position along their normal, axial, sagittal or coronal, whatever names and numbers say."""
    scan = made(RIGHT_HANDED[name])
    same_scan(read_scan(series(tmp_path / "s", scan, names=["c", "a", "d", "b"], numbers=[2, 4, 1, 3])), scan)


SHEARED = np.array([[0, 0, 0.96], [1, 0, 0], [0, 1, -0.28]])    # sagittal under a tilt: z falls as the normal rises


@pytest.mark.parametrize("direction", [OBLIQUE, TILT, SHEARED], ids=["oblique", "tilt", "sheared sagittal"])
def test_rule_2_dicom_geometry__voxels_lie_where_their_tags_say(tmp_path, direction):
    """Each file's pixel (row j, column i) lies at IPP + i · row cosines · Δcolumn + j · column cosines · Δrow.

    DICOM PS3.3 C.7.6.2.1.1.
    """
    folder = series(tmp_path / "s", made(direction), names=["c", "a", "d", "b"], numbers=[2, 4, 1, 3])
    scan, seen = read_scan(folder), set()
    j, i = np.indices(SHAPE[1:])
    for path in folder.iterdir():
        tags = pydicom.dcmread(path)
        row, column = np.array(tags.ImageOrientationPatient, float).reshape(2, 3)
        down, across = map(float, tags.PixelSpacing)
        places = np.array(tags.ImagePositionPatient, float) + i[..., None] * across * row + j[..., None] * down * column
        k, = (k for k, hu in enumerate(scan.hu) if np.array_equal(hu, tags.pixel_array.astype(int) - 1024))
        index = np.stack([i, j, np.full_like(i, k)], axis=-1)
        assert np.abs(scan.origin + scan.spacing * index @ scan.direction.T - places).max() < 1e-5
        seen.add(k)
    assert seen == set(range(4))


def test_rule_2_dicom_geometry__spacing_is_from_the_positions(tmp_path):
    """Neither SliceThickness nor SpacingBetweenSlices is the distance between slices: their positions are."""
    scan = read_scan(series(tmp_path / "s", made(), header={"SliceThickness": "5", "SpacingBetweenSlices": "2.5"}))
    assert scan.spacing.tolist() == [0.7, 0.8, 1.3]


def test_rule_2_dicom_geometry__pixel_spacing_is_row_then_column(tmp_path):
    """PixelSpacing gives the distance between rows, y, first (PS3.3 10.7.1.3): spacing is (x, y, z)."""
    scan = made()
    folder = series(tmp_path / "s", scan)
    assert pydicom.dcmread(folder / "000.dcm").PixelSpacing == [0.8, 0.7]
    assert read_scan(folder).spacing[:2].tolist() == [0.7, 0.8]


def test_rule_2_dicom_geometry__gantry_tilt_is_in_the_direction(tmp_path):
    """Under a tilt each slice is shifted in its plane: direction's third column says so, and spacing is along it."""
    scan = made(TILT)
    same_scan(read_scan(series(tmp_path / "s", scan)), scan)


@pytest.mark.parametrize("axis", range(3), ids="xyz")
def test_rule_2_1_1_resample__coordinates_survive_a_gantry_tilt_in_dicom(tmp_path, axis):
    """A tilted series whose HU are its own coordinates, in 1/20 mm, holds them at 1 mm: half a unit a rounding."""
    scan = made(TILT, shape=(6, 12, 14), spacing=(0.9, 1.1, 2.3))._replace(origin=(-4, 3, -7))
    index = np.indices(scan.hu.shape)[::-1].reshape(3, -1)
    places = np.array(scan.origin)[:, None] + scan.direction * scan.spacing @ index
    scan = scan._replace(hu=np.rint(20 * places[axis]).astype(np.int16).reshape(scan.hu.shape))
    volume = resample(read_scan(series(tmp_path / "s", scan)))
    points = volume.origin[:, None] + np.indices(volume.hu.shape)[::-1].reshape(3, -1)
    index = np.linalg.solve(scan.direction * scan.spacing, points - np.array(scan.origin)[:, None])
    within = ((index >= 0) & (index <= np.array(scan.hu.shape[::-1])[:, None] - 1)).all(0)
    assert within.sum() > 500 and np.abs(volume.hu.ravel() - 20 * points[axis])[within].max() < 1.01


def test_rule_2_dicom_geometry__a_localizer_is_left_out(tmp_path):
    """A scout image under the series' own UID is none of its slices."""
    scan = made(shape=(8, 8, 10))
    folder = scan_files.write_dicom(tmp_path, scan, localizer=True)
    assert len(list(folder.glob("*.dcm"))) == 9
    same_scan(read_scan(folder), scan)


@pytest.mark.parametrize("gap", [1, 2])
def test_rule_2_dicom_geometry__a_missing_slice_is_refused_by_its_place(tmp_path, gap):
    """Where slices are missing the last before the gap is named, and the gap's size."""
    folder = series(tmp_path / "s", made(shape=(9, 5, 7)), keep=[k for k in range(9) if not 4 <= k < 4 + gap])
    refused(lambda: read_scan(folder), folder, f"{-205.9 + 3 * 1.3:.1f}] mm",
            f"[0.0, 0.0, {(1 + gap) * 1.3:.1f}] on, not [0.0, 0.0, 1.3]", "missing")


def test_rule_2_dicom_geometry__a_doubled_slice_is_refused_by_its_place(tmp_path):
    """Two files at one place that differ are one too many."""
    folder = series(tmp_path / "s", made(shape=(9, 5, 7)))
    shutil.copy(folder / "003.dcm", folder / "copy.dcm")
    change(folder / "copy.dcm", SliceThickness="9")
    refused(lambda: read_scan(folder), folder, f"{-205.9 + 3 * 1.3:.1f}] mm", "[0.0, 0.0, 0.0] on, not [0.0, 0.0, 1.3]",
            "keep one of each")


def test_rule_2_dicom_geometry__two_equal_stacks_are_refused(tmp_path):
    """Two volumes under one UID cannot be told apart: neither is taken."""
    folder = series(tmp_path / "s", made(shape=(6, 5, 7)))
    series(folder, made(shape=(6, 5, 7), spacing=(0.9, 0.8, 1.3)), names=[f"other{k}" for k in range(6)])
    refused(lambda: read_scan(folder), folder, "6 of 12 files")


def test_rule_2_dicom_geometry__a_missing_slice_under_a_tilt_is_refused(tmp_path):
    """The place before the gap and the step across it are named, along the tilted series' own line."""
    folder = series(tmp_path / "s", made(TILT, shape=(9, 5, 7)), keep=[0, 1, 2, 3, 5, 6, 7, 8])
    refused(lambda: read_scan(folder), folder, f"{-205.9 + 3 * 1.3 * 0.96:.3f}] mm",
            f"{round(2 * 1.3 * 0.96, 3)}] on, not", "missing")


@pytest.mark.parametrize("steps", [[0.81, 1.38, 0.81] * 3, [1.0] * 5 + [1.6, 0.4], [0.005] * 6])
def test_rule_2_dicom_geometry__uneven_steps_are_refused(tmp_path, steps):
    """A step of half as much again as the usual, or less than half of it, is no even series, though no slice lies far
    from its place in one; nor are slices that lie all but upon each other."""
    folder = series(tmp_path / "s", made(shape=(len(steps) + 1, 5, 7)))
    for path, z in zip(sorted(folder.iterdir()), np.cumsum([-200, *steps])):
        change(path, ImagePositionPatient=["0", "0", f"{z:.3f}"])
    refused(lambda: read_scan(folder), folder, "evenly")


def test_rule_2_dicom_geometry__a_series_out_of_line_is_refused(tmp_path):
    """Slices at even heights that do not lie along a line are no volume."""
    folder = series(tmp_path / "s", made(shape=(6, 5, 7)))
    tags = pydicom.dcmread(folder / "002.dcm")
    tags.ImagePositionPatient[0] += 5
    tags.save_as(folder / "002.dcm")
    refused(lambda: read_scan(folder), folder, "[5.0, 0.0, 1.3] on, not [0.0, 0.0, 1.3]")


def test_rule_2_dicom_geometry__two_images_are_no_volume(tmp_path):
    """A chest radiograph in two views, or a localizer alone, is refused."""
    folder = series(tmp_path / "s", made(), keep=[0, 1])
    refused(lambda: read_scan(folder), folder, "2 DICOM files")


def test_rule_2_rescale__each_slices_own(tmp_path):
    """HU = slope · stored + intercept, with each slice's own slope and intercept; whole ones give int16."""
    rescale = [(1, -1024), (2, -1000), (3, 7), (1, 0)]
    scan = made()
    stored = scan.hu.astype(int) + 1024
    hu = read_scan(series(tmp_path / "s", scan, rescale=rescale)).hu
    assert hu.dtype == np.int16
    assert np.array_equal(hu, [slope * image + intercept for image, (slope, intercept) in zip(stored, rescale)])


@pytest.mark.parametrize("rescale", [(0.5, -1024), (1, -1024.25)])
def test_rule_2_rescale__fractions_give_float32(tmp_path, rescale):
    """A slope or an intercept with a fraction, in one slice alone, gives float32 with the fractions."""
    scan = made()
    hu = read_scan(series(tmp_path / "s", scan, rescale=[(1, -1024)] * 3 + [rescale])).hu
    assert hu.dtype == np.float32
    assert np.array_equal(hu[:3], scan.hu[:3])
    assert np.array_equal(hu[3], rescale[0] * (scan.hu[3] + 1024.0) + rescale[1])


@pytest.mark.parametrize("rescale, hu", [((2000, 0), 32767), ((1, -100000), -32768)])
def test_rule_2_rescale__past_int16_is_clipped(tmp_path, rescale, hu):
    """What slope and intercept take past int16, up or down, becomes its end and does not wrap around."""
    assert (read_scan(series(tmp_path / "s", made(), rescale=[rescale] * 4)).hu == hu).all()


def test_rule_2_rescale__signed_pixels(tmp_path):
    """-2048, as GE fills the corners with, is stored signed and comes back."""
    scan = made()
    scan.hu[:, 0, 0] = -2048
    same_scan(read_scan(scan_files.write_dicom(tmp_path, scan)), scan)


def test_rule_2_rescale__missing_is_refused(tmp_path):
    """Without slope or intercept stored values are no HU, so they are not taken for them."""
    folder = series(tmp_path / "s", made())
    tags = pydicom.dcmread(folder / "002.dcm")
    del tags.RescaleIntercept
    tags.save_as(folder / "002.dcm")
    refused(lambda: read_scan(folder), "RescaleIntercept")


def test_rule_2_rescale__does_not_wrap_around(tmp_path):
    """A product past int32, 3,000,000 · 1000, is clipped to int16's upper end: above, not below."""
    scan = made()
    scan.hu[:] = -24
    assert (read_scan(series(tmp_path / "s", scan, rescale=[(3000000, 0)] * 4)).hu == 32767).all()


def test_rule_2_rescale__compressed_pixels(tmp_path):
    """RLE Lossless, a transfer syntax of DICOM's that needs no other library, gives the same scan."""
    scan = made()
    folder = series(tmp_path / "s", scan)
    for path in folder.iterdir():
        tags = pydicom.dcmread(path)
        tags.compress(pydicom.uid.RLELossless)
        tags.save_as(path)
    same_scan(read_scan(folder), scan)


ODD = {     # tags of every slice that make it no plane of CT numbers
    "colours": dict(SamplesPerPixel=3, PhotometricInterpretation="RGB", PlanarConfiguration=0, BitsAllocated=8,
                    BitsStored=8, HighBit=7,
                    PixelData=bytes(106)),
    "frames": dict(NumberOfFrames=2, PixelData=bytes(140)),
    "three pixel spacings": dict(PixelSpacing=["0.7", "0.8", "0.9"]),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ODD)
def test_read_scan__slices_that_are_no_planes_are_refused(tmp_path, name):
    """A series of colour images or of images with frames has no one HU a voxel: refused here, no traceback later."""
    folder = series(tmp_path / "s", made())
    for path in folder.iterdir():
        tags = pydicom.dcmread(path)
        for key, value in ODD[name].items():
            setattr(tags, key, value)
        tags.save_as(path)
    with pytest.raises(Refusal, match="s/"):
        read_scan(folder)


def test_read_scan__one_slice_of_frames_is_refused_by_its_name(tmp_path):
    """One file with two frames among single slices is named itself, not the first of the series."""
    folder = series(tmp_path / "s", made())
    change(folder / "002.dcm", NumberOfFrames=2, PixelData=bytes(140))
    refused(lambda: read_scan(folder), "002.dcm", "(2, 5, 7)")


def test_read_scan__a_place_that_is_no_number_is_refused_by_its_name(tmp_path):
    """Spoilt text where a number should stand: the file is named that holds it."""
    path = series(tmp_path / "s", made()) / "002.dcm"
    data = path.read_bytes()
    assert data.count(b"0.8\\0.7") == 1
    path.write_bytes(data.replace(b"0.8\\0.7", b"0.8\\0,7"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(Refusal, match="002.dcm"):
            read_scan(path.parent)


def test_read_scan__a_slice_cut_short_is_refused_by_its_name(tmp_path):
    """A file whose pixels are cut short is named itself, not the first of the series."""
    folder = series(tmp_path / "s", made())
    (folder / "002.dcm").write_bytes((folder / "002.dcm").read_bytes()[:-20])
    refused(lambda: read_scan(folder), "002.dcm")


def test_read_scan__what_only_looks_like_dicom_is_refused(tmp_path):
    """A file with DICOM's mark and rubbish behind it is passed over, so its slice is missing."""
    folder = series(tmp_path / "s", made(shape=(9, 5, 7)))
    (folder / "004.dcm").write_bytes(bytes(128) + b"DICM" + bytes(range(256)))
    refused(lambda: read_scan(folder), folder, "missing")


def test_read_scan__slices_of_several_frames_are_refused(tmp_path):
    """A DICOM series whose files hold two frames each is refused, as one line, and ends no run."""
    folder = series(tmp_path / "s", made())
    for path in folder.iterdir():
        tags = pydicom.dcmread(path)
        tags.NumberOfFrames, tags.PixelData = 2, tags.PixelData * 2
        tags.save_as(path)
    refused(lambda: read_scan(folder), folder)
    source, = preprocessing.find_scans(folder)
    parameters = {"cube": 12, "negatives": 3, "max_slice_mm": 9, "seed": 0}
    assert "one value per pixel" in preprocessing.prepare_one(source, [], tmp_path, parameters)["remedy"]


def test_read_scan__a_data_file_named_in_utf_8(tmp_path):
    """A data file's name is taken as the file system writes it."""
    (tmp_path / "Müller.raw").write_bytes(DATA)
    assert np.array_equal(read_scan(metaimage(tmp_path, None, ElementDataFile="Müller.raw")).hu, VALUES)


def test_read_scan__two_series_in_one_folder_are_refused(tmp_path):
    """A folder of two series is no one scan, and the line says how many there are."""
    folder = series(tmp_path / "s", made())
    series(folder, made(uid="1.2.4"), names=list("abcd"))
    refused(lambda: read_scan(folder), folder, "2 scans")


@pytest.mark.parametrize("name", ["ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "Rows", "Columns",
                                  "RescaleSlope", "RescaleIntercept", "PixelData", "BitsAllocated", "SamplesPerPixel"])
@pytest.mark.parametrize("count", [1, 9])
def test_read_scan__a_missing_tag_is_refused(tmp_path, name, count):
    """Without a tag that says where a slice lies or what its numbers mean, in one or in all, nothing is guessed."""
    folder = series(tmp_path / "s", made(shape=(9, 5, 7)))
    for path in sorted(folder.iterdir())[4:5] if count == 1 else folder.iterdir():
        change(path, **{name: None})
    refused(lambda: read_scan(folder), folder)


def test_read_tags__a_file_that_may_not_be_read_is_not_passed_over(tmp_path, monkeypatch):
    """Without permission, or from a failing disk, a slice is not left out in silence: the error reaches the user."""
    folder, read = series(tmp_path / "s", made()), pydicom.dcmread

    def failing(path, **words):
        if path.name == "000.dcm":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path, **words)

    monkeypatch.setattr(pydicom, "dcmread", failing)
    with pytest.raises(PermissionError, match="000.dcm"):
        find_scans(folder)


@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.8, 0.95, 0.99])
def test_read_scan__a_dicom_file_cut_anywhere_is_refused(tmp_path, share):
    """Cut in its header or in its pixels, a slice is missing or broken: the series does not pass for whole."""
    folder = series(tmp_path / "s", made(shape=(9, 5, 7)))
    data = (folder / "004.dcm").read_bytes()
    (folder / "004.dcm").write_bytes(data[:int(share * len(data))])
    with pytest.raises(Refusal, match="s"):
        read_scan(folder)


MIXED = {"orientations": dict(ImageOrientationPatient=["1", "0", "0", "0", "0", "-1"]),
         "sizes": dict(Rows=7, Columns=5), "pixel spacings": dict(PixelSpacing=["0.9", "0.9"])}


@pytest.mark.parametrize("count", [1, 3, 4, 5])
@pytest.mark.parametrize("name", MIXED)
def test_rule_2_dicom_geometry__mixed_slices_are_refused(tmp_path, name, count):
    """Slices of another orientation, size or pixel spacing within a stack, few or half of it, are not put into it."""
    folder = series(tmp_path / "s", made(shape=(9, 5, 7)))
    for path in sorted(folder.iterdir())[2:2 + count]:
        change(path, **MIXED[name])
    refused(lambda: read_scan(folder), folder)


def test_rule_2_rescale__compressed_pixels_without_a_plugin_name_the_package(tmp_path):
    """JPEG-LS needs another package than the five: the line names the slice and what to install."""
    folder = series(tmp_path / "s", made())
    for path in folder.iterdir():
        tags = pydicom.dcmread(path)
        tags.file_meta.TransferSyntaxUID = pydicom.uid.JPEGLSLossless
        tags.PixelData = pydicom.encaps.encapsulate([bytes(10)])
        tags["PixelData"].VR = "OB"
        tags.save_as(path)
    refused(lambda: read_scan(folder), "000.dcm", "JPEG-LS", "pylibjpeg", "install")


def test_rule_2_rescale__photometric_interpretation_is_for_display(tmp_path):
    """MONOCHROME1 says that low values are shown white (PS3.3 C.7.6.3.1.2): HU are as without it."""
    scan = made()
    same_scan(read_scan(series(tmp_path / "s", scan, header=dict(PhotometricInterpretation="MONOCHROME1"))), scan)


@pytest.mark.parametrize("padding", [-2000, -3024, -32768])
def test_rule_2_rescale__padding_comes_to_air(tmp_path, padding):
    """What lies outside the scanner's circle, however low, is clipped to air; no other voxel changes, none wraps."""
    scan = made(shape=(6, 12, 14))
    clean = scan._replace(hu=scan.hu.copy())
    circle = np.hypot(*np.ogrid[-1:1:12j, -1:1:14j]) > 1
    scan.hu[:, circle], clean.hu[:, circle] = padding, -1000
    tags = dict(PixelPaddingValue=padding + 1024, PixelRepresentation=1, BitsStored=16, HighBit=15)
    read = read_scan(series(tmp_path / "s", scan, header=tags, rescale=[(1, -1024)] * 6))
    hu = preprocessing.clip_hu(read.hu)
    assert np.array_equal(hu, np.clip(clean.hu, -1000, 400)) and (hu[:, circle] == -1000).all()


def no_image(path, kind, uid):
    """A DICOM object without an image: contours (RTSTRUCT) or a report (SR)."""
    tags = scan_files.dicom_header(made(uid=uid))
    for name in ("SamplesPerPixel", "PhotometricInterpretation", "PixelRepresentation", "BitsAllocated", "BitsStored",
                 "HighBit", "RescaleSlope", "RescaleIntercept", "RescaleType"):
        delattr(tags, name)
    where = {"RTSTRUCT": "RTStructureSetStorage", "SR": "ComprehensiveSRStorage"}[kind]
    tags.Modality, tags.SOPClassUID = kind, getattr(pydicom.uid, where)
    tags.file_meta.MediaStorageSOPClassUID = tags.SOPClassUID
    tags.file_meta.MediaStorageSOPInstanceUID = tags.SOPInstanceUID = "1.2.99"
    pydicom.dcmwrite(path, tags, enforce_file_format=True)


@pytest.mark.parametrize("kind", ["RTSTRUCT", "SR"])
@pytest.mark.parametrize("uid", ["1.2.3", "1.2.4"], ids=["the series' own UID", "another"])
def test_find_scans__dicom_that_is_no_image_does_no_harm(tmp_path, kind, uid):
    """Contours or a report beside the slices: the scan is read as without, and no scan is made of them."""
    scan = made()
    no_image(series(tmp_path / "s", scan) / "a.dcm", kind, uid)
    source, = find_scans(tmp_path)
    same_scan(preprocessing.read_source(source), scan)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_rule_2_dicom_geometry__a_slice_of_another_spacing_is_refused_by_its_name(tmp_path, k):
    """Its absence leaves a gap, so it is no stray object, and the line says what it differs in."""
    folder = series(tmp_path / "s", made(shape=(6, 4, 5)))
    tags = pydicom.dcmread(folder / f"{k:03d}.dcm")
    tags.PixelSpacing = [0.9, 0.9]
    tags.save_as(folder / f"{k:03d}.dcm")
    refused(lambda: read_scan(folder), f"{k:03d}.dcm", "pixel spacing")


@pytest.mark.parametrize("value", ["", "1", ["1", "0", "0", "0", "1"], ["1", "0", "0", "0", "1", "1e300"]])
def test_rule_2_dicom_geometry__an_end_slice_without_its_orientation_is_refused_by_its_name(tmp_path, value):
    """An orientation that is not six numbers does not make a localizer of a slice, whose absence would leave no gap."""
    folder = series(tmp_path / "s", made(shape=(6, 4, 5)))
    change(folder / "005.dcm", ImageOrientationPatient=value)
    refused(lambda: read_scan(folder), "005.dcm", "ImageOrientationPatient")


@pytest.mark.parametrize("k", [0, 3])
@pytest.mark.parametrize("name", ["ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"])
def test_rule_2_dicom_geometry__a_slice_without_its_place_is_refused_by_its_name(tmp_path, k, name):
    """A slice that does not say where it lies is not left out in silence, at an end of the series either."""
    folder = series(tmp_path / "s", made())
    tags = pydicom.dcmread(folder / f"{k:03d}.dcm")
    delattr(tags, name)
    tags.save_as(folder / f"{k:03d}.dcm")
    refused(lambda: read_scan(folder), f"{k:03d}.dcm", name)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_find_scans__a_pipe_is_not_waited_for(tmp_path):
    """A named pipe is no file, whatever its name ends in: reading it would wait for a writer for good."""
    series(tmp_path / "s", made())
    for name in ("pipe.mhd", "pipe.dcm"):
        os.mkfifo(tmp_path / name)
    assert [source.seriesuid for source in find_scans(tmp_path)] == ["1.2.3"]


def test_find_scans__a_dangling_link_is_told_of(tmp_path):
    """A link whose file was not fetched, as data managers leave them, is a scan that fails, not none."""
    (tmp_path / "1.2.4.mhd").symlink_to("not there")
    source, = find_scans(tmp_path)
    refused(lambda: preprocessing.read_source(source), "1.2.4.mhd", "not found")


def test_find_scans__an_empty_modality_is_none(tmp_path):
    """A Modality without a value says nothing against CT."""
    series(tmp_path / "ct", made(), header={"Modality": ""})
    assert [source.seriesuid for source in find_scans(tmp_path)] == ["1.2.3"]


def test_find_scans__radiographs_are_passed_over(tmp_path):
    """LIDC-IDRI has chest radiographs beside its CT: a series of another modality is no scan that failed."""
    series(tmp_path / "ct", made())
    series(tmp_path / "dx", made(uid="1.2.9"), header={"Modality": "DX"})
    assert [source.seriesuid for source in find_scans(tmp_path)] == ["1.2.3"]


def test_find_scans__ten_thousand_tiny_files_are_passed_over(tmp_path):
    """A tree full of small files that are no DICOM, empty ones among them, holds the one scan that it holds."""
    series(tmp_path / "s", made())
    for number in range(10000):
        folder = tmp_path / f"{number % 100}"
        folder.mkdir(exist_ok=True)
        (folder / f"{number}.dcm").write_bytes(b"tiny" * (number % 3))
    assert [source.seriesuid for source in find_scans(tmp_path)] == ["1.2.3"]


@pytest.mark.parametrize("uid", ["../../x", "<script>", "/etc/x", "\x1b[31mred\x1b[0m", "a\nb", "con:"])
def test_find_scans__a_hostile_series_uid_does_not_escape(tmp_path, uid):
    """Whatever a DICOM file calls its series: a refusal is one plain line, and its files stay inside."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = series(tmp_path / "s", made(uid=uid))
        source, = find_scans(folder)
    parameters = {"cube": 12, "negatives": 3, "max_slice_mm": 9, "seed": 0}
    record = preprocessing.prepare_one(source, [], tmp_path / "out", parameters)
    assert "litres of lung" in record["problem"] and preprocessing.reason_of(record).isprintable()
    assert {path.parent for path in tmp_path.rglob("*") if path.is_file()} == {folder, tmp_path / "out"}


@pytest.mark.parametrize("side, reason", [(4096, "0.0 litres"), (4097, "DimSize = 2 2 4097")])
def test_prepare_one__a_scan_of_one_long_line_is_skipped(tmp_path, side, reason):
    """A side of 4,096 voxels is tried, and holds no lungs; a longer one, which might take hours, is refused unread."""
    metaimage(tmp_path, bytes(8 * side), DimSize=f"2 2 {side}", ElementSpacing="2 2 2.5")
    parameters = {"cube": 12, "negatives": 3, "max_slice_mm": 9, "seed": 0}
    source, = find_scans(tmp_path)
    assert reason in str(preprocessing.prepare_one(source, [], tmp_path / "out", parameters))


def test_prepare_one__a_scan_too_large_for_the_memory_is_skipped(tmp_path, monkeypatch):
    """The other scans are prepared: its reason is one line, with its file and what to do."""
    def full(*_):
        raise MemoryError("Unable to allocate 373. GiB")

    source = Source("1.2", "1.2", (tmp_path / "1.2.mhd",))
    monkeypatch.setattr(preprocessing, "prepare_scan", full)
    record = preprocessing.prepare_one(source, [], tmp_path / "out", {"seed": 0, "max_slice_mm": 2.5})
    assert preprocessing.reason_of(record) == f"{tmp_path / '1.2.mhd'}: out of memory — give fewer --workers"
    assert preprocessing.read_record(source, tmp_path / "out", {"seed": 0, "max_slice_mm": 2.5}) == record


# find_scans


def test_find_scans__two_series_in_one_folder_are_told_apart(tmp_path):
    """By SeriesInstanceUID, each with its own files and its own patient."""
    series(tmp_path / "s", made())
    series(tmp_path / "s", made(uid="1.2.4", patient="P2"), names=list("abcd"))
    assert [(s.seriesuid, s.patient, sorted(path.name for path in s.files)) for s in find_scans(tmp_path)] == [
        ("1.2.3", "P1", [f"00{k}.dcm" for k in range(4)]), ("1.2.4", "P2", list("abcd"))]


def test_find_scans__one_series_in_two_folders_is_one(tmp_path):
    """A series is its UID's, however its files are spread and named."""
    series(tmp_path / "a", made(), keep=[0, 3])
    series(tmp_path / "b", made(), names=["one", "two", "three", "four"], keep=[1, 2])
    source, = find_scans(tmp_path)
    same_scan(preprocessing.read_source(source), made())


def test_find_scans__is_recursive_and_sorted(tmp_path):
    """Scans of both kinds in any depth, in the order of their series UIDs; whatever lies beside is passed over."""
    scan_files.write_metaimage(tmp_path / "z", made(uid="1.2.1"))
    scan_files.write_dicom(tmp_path / "a/deep/er", made(uid="1.2.4"))
    scan_files.write_metaimage(tmp_path / "a", made(uid="1.2.9"), local=True)
    series(tmp_path / "a/b", made(uid="1.2.2"))
    for name in ("notes.txt", "069.xml", "empty", "a/image.png"):
        (tmp_path / name).write_text("no scan" * (name != "empty"))
    assert [source.seriesuid for source in find_scans(tmp_path)] == ["1.2.1", "1.2.2", "1.2.4", "1.2.9"]


def test_find_scans__an_xml_beside_the_slices_is_passed_over(tmp_path):
    """LIDC-IDRI's marks lie beside the slices and name the series: they are no slice."""
    folder = scan_files.write_dicom(tmp_path, made())
    source, = find_scans(tmp_path)
    assert len(list(folder.iterdir())) == 5 and len(source.files) == 4
    assert all(path.suffix == ".dcm" for path in source.files)


def test_find_scans__suffixes_in_capitals(tmp_path):
    """What came through Windows, .MHD or .MHA, is found too."""
    metaimage(tmp_path, DATA, name="A.MHD")
    metaimage(tmp_path, DATA, name="B.MHA", ElementDataFile="LOCAL")
    assert [source.seriesuid for source in find_scans(tmp_path)] == ["A", "B"]


@pytest.mark.parametrize("kind", ["DICOMDIR", "rubbish"])
def test_find_scans__dicom_of_no_series_is_passed_over(tmp_path, kind):
    """A DICOMDIR, the index on every DICOM disc (PS3.10), or a broken file has no SeriesInstanceUID: it is no scan."""
    series(tmp_path, made())
    index = pydicom.Dataset()
    index.file_meta = pydicom.dataset.FileMetaDataset()
    index.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    index.file_meta.MediaStorageSOPClassUID = pydicom.uid.MediaStorageDirectoryStorage
    index.file_meta.MediaStorageSOPInstanceUID = "1.2.99"
    index.FileSetID, index.DirectoryRecordSequence = "DISC", []
    pydicom.dcmwrite(tmp_path / "DICOMDIR", index, enforce_file_format=True)
    if kind == "rubbish":
        (tmp_path / "DICOMDIR").write_bytes(bytes(128) + b"DICM" + bytes(range(256)))
    assert [source.seriesuid for source in find_scans(tmp_path)] == ["1.2.3"]


def test_find_scans__without_a_patient_the_series_is_its_own(tmp_path):
    """MetaImage and anonymous DICOM have no PatientID: each series is a patient, as in LUNA16."""
    scan_files.write_metaimage(tmp_path, made(uid="1.2.1"))
    series(tmp_path / "s", made(uid="1.2.2", patient=""))
    assert [source.patient for source in find_scans(tmp_path)] == ["1.2.1", "1.2.2"]


def test_find_scans__links_in_a_circle_do_not_hang(tmp_path):
    """A link to a folder above, and one to itself, are not followed: each scan is found once."""
    scan_files.write_metaimage(tmp_path / "a", made())
    os.symlink(tmp_path, tmp_path / "a/up")
    os.symlink(tmp_path / "self", tmp_path / "self")
    assert len(find_scans(tmp_path)) == 1


@pytest.mark.parametrize("other", ["mha", "folder", "DICOM"])
def test_find_scans__the_same_scan_in_two_forms_is_read_once(tmp_path, capsys, other):
    """One UID in two places or formats with the same voxels is one scan: a line names both."""
    scan_files.write_metaimage(tmp_path, made())
    if other == "DICOM":
        scan_files.write_dicom(tmp_path / "d", made())
    else:
        scan_files.write_metaimage(tmp_path if other == "mha" else tmp_path / "d", made(), local=other == "mha")
    source, = find_scans(tmp_path)
    out = capsys.readouterr().out
    assert source.conflict is None
    assert "1.2.3.mhd" in out
    assert {"mha": "1.2.3.mha", "folder": "d/1.2.3.mhd", "DICOM": ".dcm"}[other] in out


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir(),
                                  lambda path: (path.mkdir(), (path / "a.txt").write_text("x"))],
                         ids=["no folder", "empty", "no scan in it"])
@pytest.mark.parametrize("read", [find_scans, read_scan])
def test_find_scans__no_scan_is_refused(tmp_path, read, make):
    """A folder without a scan, or none at all, is one line that names it."""
    make(tmp_path / "scans")
    refused(lambda: read(tmp_path / "scans"), "scans")


# annotations.csv

HEAD = "seriesuid,coordX,coordY,coordZ,diameter_mm"
ROWS = "1.2.3,-1.5,2,3e1,6.25\n1.2.4,0,0,0,3\n1.2.3,4,5,6,7\n"
NODULES = {"1.2.3": [(-1.5, 2.0, 30.0, 6.25), (4.0, 5.0, 6.0, 7.0)], "1.2.4": [(0.0, 0.0, 0.0, 3.0)]}


def table(folder, text, encoding="utf-8"):
    (folder / "annotations.csv").write_bytes(text.encode(encoding))
    return folder / "annotations.csv"


@pytest.mark.parametrize("text, encoding", [
    (f"{HEAD}\n{ROWS}", "utf-8"), (f"{HEAD}\n{ROWS}", "utf-8-sig"), (f"{HEAD}\n{ROWS}".replace("\n", "\r\n"), "utf-8"),
    (f"{HEAD}\n{ROWS}".rstrip(), "utf-8"), (f"{HEAD}\n\n{ROWS}\n\n", "utf-8")],
    ids=["plain", "BOM", "CRLF", "no last line end", "empty lines"])
def test_read_annotations__in_any_of_its_forms(tmp_path, text, encoding):
    """LUNA16's table gives each series its nodules in their order, (x, y, z) and diameter in mm."""
    assert read_annotations(table(tmp_path, text, encoding)) == NODULES


def test_read_annotations__the_same_row_twice_is_one_nodule(tmp_path):
    """A row that is there again, with other digits for the same numbers, is not a second nodule."""
    assert read_annotations(table(tmp_path, f"{HEAD}\n{ROWS}1.2.4,0.0,0.0,-0.0,3.00\n{ROWS}")) == NODULES


def test_read_annotations__none_is_no_error(tmp_path):
    """A table without a row says that no scan has a nodule."""
    assert read_annotations(table(tmp_path, f"{HEAD}\n")) == {}


@pytest.mark.parametrize("row", ["1.2.3,1,2,3,nan", "1.2.3,1,inf,3,4", "1.2.3,1,2,3,1e300", "1.2.3,1,2,3,0",
                                 "1.2.3,1,2,3,-4", "1.2.3,1,2,3",
                                 "1.2.3", "1.2.3,1,2,3,4,5",
                                 "1.2.3,one,2,3,4", "1.2.3,1,2,,4"])
def test_read_annotations__a_bad_row_is_refused_by_its_line(tmp_path, row):
    """NaN, ∞, no diameter, text, too few or too many columns: the file and the line are named."""
    path = table(tmp_path, f"{HEAD}\n{ROWS}{row}\n{ROWS}")
    refused(lambda: read_annotations(path), path, "line 5")


@pytest.mark.parametrize("text", ["", ROWS, "seriesuid,x,y,z,d\n"], ids=["empty", "none", "other names"])
def test_read_annotations__another_header_is_refused(tmp_path, text):
    """Columns without their names could be anything."""
    refused(lambda: read_annotations(table(tmp_path, text)), "annotations.csv", HEAD)


@pytest.mark.parametrize("text", ["", "\n \n", " , \n"])
def test_read_annotations__an_empty_table_is_refused(tmp_path, text):
    """A file without a cell that holds something lacks every column: it says so, and what is expected."""
    refused(lambda: read_annotations(table(tmp_path, text)), "annotations.csv: holds no row", HEAD)


@pytest.mark.parametrize("data", [bytes(range(256)), f"{HEAD}\n".encode() + b"\xff\xfe,1,2,3,4\n",
                                  f"{HEAD}\n{ROWS}".encode("utf-16")],
                         ids=["bytes", "latin", "UTF-16"])
def test_read_annotations__what_is_no_text_is_refused(tmp_path, data):
    """A file that is not UTF-8 is one line, no traceback."""
    (tmp_path / "annotations.csv").write_bytes(data)
    refused(lambda: read_annotations(tmp_path / "annotations.csv"), "annotations.csv")
