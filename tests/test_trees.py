"""Trees of scans as they ship: LUNA16 as it unpacks, what macOS leaves, scans that are there twice, odd tables.

    python -m pytest tests/test_trees.py -v
"""

import os
import shutil

import lungaug

import numpy as np
import pytest

import preprocessing
import scan_files
from helpers import change, made, refused, run_main, series, write_mixed_chests
from preprocessing import find_annotations, find_scans, read_annotations


HEAD = "seriesuid,coordX,coordY,coordZ,diameter_mm"
NODULES = {"1.2.3": [(-1.5, 2.0, 30.0, 6.25)], "1.2.4": [(0.5, 0.0, 0.0, 3.0)]}


def metaimage(folder, uid="1.2.3", add=0):
    """A small MetaImage in a folder; add: to every voxel. Returns its path."""
    scan = made(uid=uid)
    return scan_files.write_metaimage(folder, scan._replace(hu=scan.hu + np.int16(add)))


def mask(folder, uid="1.2.3"):
    """A lung mask in LUNA16's values, under a scan's own UID."""
    scan = made(uid=uid)
    return scan_files.write_metaimage(folder, scan._replace(hu=np.where(scan.hu % 2, 3, 4).astype(np.int16)))


def found(folder):
    """The series UIDs of the scans in a tree that can be used."""
    return [source.seriesuid for source in find_scans(folder) if source.conflict is None]


# LUNA16 as it unpacks

def test_find_scans__lung_masks_are_ignored_and_counted(tmp_path, capsys):
    """seg-lungs-LUNA16 holds a mask under each scan's own UID: ignored, in one line."""
    metaimage(tmp_path / "subset0", "1.2.3")
    metaimage(tmp_path / "subset1", "1.2.4")
    for uid in ("1.2.3", "1.2.4"):
        mask(tmp_path / "seg-lungs-LUNA16", uid)
    sources = find_scans(tmp_path)
    assert [source.files[0].parent.name for source in sources] == ["subset0", "subset1"]
    assert capsys.readouterr().out == "ignored: 2 lung masks\n"


def test_find_scans__masks_in_a_folder_of_any_name(tmp_path, capsys):
    """A file of a few small whole numbers beside the scan of the same UID is a mask wherever it lies."""
    path = metaimage(tmp_path / "subset0")
    mask(tmp_path / "another")
    source, = find_scans(tmp_path)
    assert source.files == (path,)
    assert source.conflict is None
    assert capsys.readouterr().out == "ignored: 1 lung masks\n"


@pytest.mark.parametrize("name", ["._1.2.3.mhd", ".DS_Store", "__MACOSX/1.2.3.mhd", "__MACOSX/sub/x.dcm", "Thumbs.db"])
def test_find_scans__what_systems_leave_is_ignored(tmp_path, capsys, name):
    """macOS and Windows leave files that look like scans; they are counted."""
    metaimage(tmp_path / "subset0")
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\0\5\x16\7")
    assert found(tmp_path) == ["1.2.3"]
    assert capsys.readouterr().out == "ignored: 1 files of an operating system\n"


# The same scan twice

@pytest.mark.parametrize("compressed", [False, True])
def test_find_scans__the_same_scan_twice_is_read_once(tmp_path, capsys, compressed):
    """Equal bytes, or equal HU in another form: one Source, and a line that names both paths."""
    first = metaimage(tmp_path / "a")
    second = scan_files.write_metaimage(tmp_path / "b", made(), compressed=compressed)
    source, = find_scans(tmp_path)
    assert (source.files, source.conflict) == ((first,), None)
    assert capsys.readouterr().out == f"ignored: {second} is the same scan as {first}\n"


def test_find_scans__different_scans_of_one_uid_are_a_conflict(tmp_path):
    """Neither is used: reading it says so, with both paths; other scans are as before."""
    first = metaimage(tmp_path / "a")
    second = metaimage(tmp_path / "b", add=1)
    metaimage(tmp_path / "a", "1.2.4")
    assert found(tmp_path) == ["1.2.4"]
    conflict, _ = find_scans(tmp_path)
    refused(lambda: preprocessing.read_source(conflict), first, second)


def headers_beside_data(tmp_path, suffix, values):
    """A header of this suffix and x.raw in folder a, the same header beside other voxels in b; the headers.

    values: HU of all voxels in a, and in b.
    """
    scan = made()
    paths = []
    for name, value in zip("ab", values):
        folder = tmp_path / name
        folder.mkdir()
        paths.append(folder / f"{scan.seriesuid}{suffix}")
        paths[-1].write_bytes(scan_files.metaimage_header(scan, "x.raw"))
        (folder / "x.raw").write_bytes(np.full(scan.hu.shape, value, "<i2").tobytes())
    return paths


@pytest.mark.parametrize("suffix", [".mhd", ".mha"])
def test_find_scans__equal_headers_beside_different_data_are_a_conflict(tmp_path, capsys, suffix):
    """The bytes of the headers are the same, the voxels are not: neither is dropped as a copy."""
    first, second = headers_beside_data(tmp_path, suffix, (-700, -100))
    source, = find_scans(tmp_path)
    assert source.conflict == second
    assert "same scan" not in capsys.readouterr().out
    refused(lambda: preprocessing.read_source(source), first, second)


@pytest.mark.parametrize("suffix", [".mhd", ".mha"])
def test_find_scans__equal_headers_beside_equal_data_are_one_scan(tmp_path, capsys, suffix):
    """A folder that was copied whole: their voxels are compared, and one is taken."""
    first, second = headers_beside_data(tmp_path, suffix, (-700, -700))
    source, = find_scans(tmp_path)
    assert (source.files, source.conflict) == ((first,), None)
    assert capsys.readouterr().out == f"ignored: {second} is the same scan as {first}\n"


@pytest.mark.parametrize("data", [b"", b"\0\5\x16\7", b"NDims = 3\n"])
def test_find_scans__copies_of_a_damaged_header_are_one_scan(tmp_path, capsys, data):
    """A header that cannot be read names no other file: its bytes are all there is. Reading it is refused as ever."""
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.2.3.mha").write_bytes(data)
    source, = find_scans(tmp_path)
    assert source.conflict is None
    assert "is the same scan as" in capsys.readouterr().out
    refused(lambda: preprocessing.read_source(source), tmp_path / "a")


def test_find_scans__the_same_voxels_elsewhere_are_another_scan(tmp_path):
    """Equal HU with another origin would put the nodules elsewhere: a conflict."""
    metaimage(tmp_path / "a")
    scan_files.write_metaimage(tmp_path / "b", made()._replace(origin=(0.0, 0.0, 0.0)))
    assert found(tmp_path) == []


def test_find_scans__a_series_copied_to_two_folders_is_one(tmp_path, capsys):
    """Each slice that is there twice is taken once."""
    folder = series(tmp_path / "a", made())
    shutil.copytree(folder, tmp_path / "b")
    source, = find_scans(tmp_path)
    assert len(source.files) == 4
    assert "4 files of series 1.2.3 that are there twice" in capsys.readouterr().out


def test_find_scans__slices_that_share_an_instance_uid_are_all_taken(tmp_path):
    """Some programs give every slice the same SOPInstanceUID: geometry tells them apart."""
    folder = series(tmp_path / "a", made())
    for path in folder.iterdir():
        change(path, SOPInstanceUID="1.2.3.4")
    source, = find_scans(tmp_path)
    assert np.array_equal(preprocessing.read_source(source).hu, made().hu)


def test_find_scans__two_stacks_of_one_series_are_refused_by_their_place(tmp_path):
    """Two volumes at one place under one UID cannot be told apart: neither is taken."""
    series(tmp_path / "a", made())
    other = made()
    series(tmp_path / "b", other._replace(hu=other.hu[::-1].copy()))
    source, = find_scans(tmp_path)
    refused(lambda: preprocessing.read_source(source), "[0.0, 0.0, 0.0] on", "keep one of each")


# Folders

def test_find_scans__linked_folders_are_followed_once(tmp_path):
    """A link to a folder elsewhere is followed; one that leads back up is no second scan and no endless loop."""
    metaimage(tmp_path / "elsewhere" / "subset0")
    (tmp_path / "scans").mkdir()
    os.symlink(tmp_path / "elsewhere", tmp_path / "scans" / "link")
    os.symlink(tmp_path / "scans", tmp_path / "elsewhere" / "subset0" / "up")
    assert found(tmp_path / "scans") == ["1.2.3"]


def test_find_scans__a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch, capsys):
    """The rest of the tree is read."""
    metaimage(tmp_path / "subset0")
    closed = tmp_path / "subset1"
    closed.mkdir()
    scandir = os.scandir

    def guarded(path):
        if str(path) == str(closed):
            raise PermissionError(13, "Permission denied", str(closed))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    assert found(tmp_path) == ["1.2.3"]
    assert capsys.readouterr().out == f"ignored: {closed}: Permission denied\n"


@pytest.mark.parametrize("name", ["./1.2.3.raw", ".\\1.2.3.raw"])
def test_read_scan__data_named_relative_to_the_header(tmp_path, name):
    """./x.raw is the file beside the header."""
    path = metaimage(tmp_path)
    expected = preprocessing.read_scan(path).hu
    path.write_text(path.read_text(encoding="utf-8").replace("1.2.3.raw", name), encoding="utf-8")
    assert np.array_equal(preprocessing.read_scan(path).hu, expected)


# annotations.csv: where it is

def write_table(folder, text=HEAD):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "annotations.csv"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("place", [".", "CSVFILES", "any other folder", ".."])
def test_find_annotations__near_the_scans(tmp_path, place):
    """In the folder of the scans, in one directly below it, or in the one above it."""
    scans = tmp_path / "above" / "scans"
    scans.mkdir(parents=True)
    path = write_table((scans / place).resolve())
    assert find_annotations(scans) == path


@pytest.mark.parametrize("place", ["../..", "a/b"])
def test_find_annotations__no_further(tmp_path, place):
    """A table two folders up or down belongs to something else."""
    scans = tmp_path / "above" / "scans"
    scans.mkdir(parents=True)
    write_table((scans / place).resolve())
    refused(lambda: find_annotations(scans), scans, "in it, in a folder below it or in the folder above")


def test_find_annotations__two_that_differ_are_refused(tmp_path):
    """Both are named; two copies of the same table are one."""
    first = write_table(tmp_path)
    second = write_table(tmp_path / "CSVFILES")
    assert find_annotations(tmp_path) == first
    second.write_text(f"{HEAD}\n1.2.3,1,2,3,4\n", encoding="utf-8")
    refused(lambda: find_annotations(tmp_path), first, second)


# annotations.csv: what is in it

TABLES = {
    "plain": f"{HEAD}\n1.2.3,-1.5,2,30,6.25\n1.2.4,.5,0,0,3\n",
    "other order, one more column":
        "diameter_mm,agreement,coordZ,coordY,coordX,seriesuid\n6.25,4,30,2,-1.5,1.2.3\n3,3,0,0,.5,1.2.4\n",
    "semicolons and decimal commas":
        "seriesuid;coordX;coordY;coordZ;diameter_mm\n1.2.3;-1,5;2;30;6,25\n1.2.4;0,5;0;0;3\n",
    "tabs": f"{HEAD}\n1.2.3,-1.5,2,30,6.25\n1.2.4,.5,0,0,3\n".replace(",", "\t"),
    "names of files": f"{HEAD}\n1.2.3.mhd,-1.5,2,30,6.25\n1.2.4.MHA,.5,0,0,3\n",
    "empty cells and lines": f"{HEAD},\n,,,,,\n1.2.3,-1.5,2,30,6.25,\n\n 1.2.4 , .5 ,0,0,3,\n",
    "capitals and quotes":
        '"SeriesUID","CoordX","CoordY","CoordZ","Diameter_mm"\n"1.2.3",-1.5,2,30,6.25\n1.2.4,.5,0,0,3\n',
}


@pytest.mark.parametrize("text", TABLES.values(), ids=TABLES)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_read_annotations__as_spreadsheets_write_them(tmp_path, text, end, encoding):
    """Columns are found by their names; the numbers are the same in every form."""
    path = tmp_path / "annotations.csv"
    path.write_bytes(text.replace("\n", end).encode(encoding))
    assert read_annotations(path) == NODULES


def test_read_annotations__a_missing_column_is_named(tmp_path):
    """The line says which is missing, and what was found."""
    path = write_table(tmp_path, "seriesuid,x,y,z,diameter_mm\n1.2.3,1,2,3,4\n")
    refused(lambda: read_annotations(path), path, "no column coordX, coordY, coordZ", "but seriesuid, x, y")


# The command

@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """A tree of four small scans, two of them DICOM, as LUNA16 lays them out."""
    tree = tmp_path_factory.mktemp("clean") / "LUNA16"
    subset = tree / "subset0"
    subset.mkdir(parents=True)
    write_mixed_chests(subset)
    (subset / "annotations.csv").rename(tree / "annotations.csv")
    return tree


def prepared(run, scans):
    """What preprocessing.py says of a tree that it prepares in a run, and each file's bytes that it leaves."""
    done = run_main(preprocessing, "--scans", scans, "--run", run, "--preset", "demo", "--workers", "1",
                    "--max-slice-mm", "10")
    assert done.status == 0, done.err
    left = [path for path in (run / "prepared").iterdir() if path.suffix in (".npy", ".png")]
    files = {path.name: path.read_bytes() for path in left}
    scans = lungaug.read_json(run / "prepared" / "dataset.json", "")["scans"]
    return done.out, files, scans


@pytest.fixture(scope="module")
def even(clean, tmp_path_factory):
    """A run in which the clean tree was prepared."""
    folder = tmp_path_factory.mktemp("even")
    return folder, *prepared(folder, clean)


def test_command__a_tree_with_everything_in_it_is_the_clean_one(clean, even, tmp_path):
    """Masks, files of macOS, a copy of a scan and CSVFILES change no byte of what is prepared."""
    tree = tmp_path / "tree"
    shutil.copytree(clean, tree)
    (tree / "CSVFILES").mkdir()
    (tree / "annotations.csv").rename(tree / "CSVFILES" / "annotations.csv")

    header = next(tree.glob("subset*/*.mhd"))
    mask(tree / "seg-lungs-LUNA16", header.stem)
    (header.parent / f"._{header.name}").write_bytes(b"\0\5\x16\7")
    (tree / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    shutil.copytree(header.parent, tree / "backup")

    out, files, scans = prepared(tmp_path / "odd", tree)
    _, _, expected_files, expected_scans = even
    assert files == expected_files
    assert scans == expected_scans
    assert "ignored: 1 lung masks, 3 files of an operating system" in out
    assert "is the same scan as" in out
    assert "CSVFILES" in out


def test_command__says_what_the_annotations_match(chests, run, tmp_path):
    """The table that is used, the nodules that belong to a scan, those that belong to none, and the total."""
    table = tmp_path / "annotations.csv"
    text = (chests / "annotations.csv").read_text(encoding="utf-8")
    table.write_text(text + "9.9.9,1,2,3,4\n9.9.9,5,2,3,4\n", encoding="utf-8")
    count = len(text.splitlines()) - 1
    done = run(preprocessing, "--scans", chests, "--run", tmp_path / "run", "--annotations", table, "--preset", "demo",
               "--max-slice-mm", "10")
    assert f"{table}: {count} nodules in 4 scans; 0 scans without a nodule; 2 nodules of 1 series" in done.out
    assert f"\n{count} nodules in 4 scans; the thesis' Table 1 has 8,160 positives, 1,020 nodules" in done.out


def test_command__warns_of_splits_with_few_nodules(chests, run, tmp_path):
    """One nodule in all: two splits have none, and say so; what was prepared stays."""
    rows = (chests / "annotations.csv").read_text(encoding="utf-8").splitlines()
    table = write_table(tmp_path, "\n".join(rows[:2]))
    done = run(preprocessing, "--scans", chests, "--run", tmp_path / "run", "--annotations", table, "--preset", "demo",
               "--max-slice-mm", "10")
    assert done.status == 0, done.err
    assert done.out.count("has no nodule") == 2
    assert done.out.count("has few nodules: 1") == 1


@pytest.mark.parametrize("stage", ["gan", "classifiers"])
def test_command__overwrite_while_a_training_runs_is_refused(clean, even, run, stage):
    """Its volumes would change under it: one line, and nothing is removed."""
    folder, *_ = even
    before = sorted(path.name for path in (folder / "prepared").iterdir())
    with lungaug.lock(folder / stage, "training"):
        done = run(preprocessing, "--scans", clean, "--run", folder, "--preset", "demo", "--overwrite",
                   "--max-slice-mm", "10")
    assert done.status == 2
    assert "another process is already training" in done.err
    assert sorted(path.name for path in (folder / "prepared").iterdir()) == before
