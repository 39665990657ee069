"""Write scans as files: MetaImage as in LUNA16, DICOM as in LIDC-IDRI, annotations.csv, the truth.

A scan is a phantom.Phantom, or whatever has its fields: hu (z, y, x) int16; spacing and origin
(x, y, z) in mm; direction (3, 3), whose columns are the x, y and z index axes in the patient's
axes (LPS). The same scan always gives the same bytes.
"""

import csv
import hashlib
import io
import zlib
from pathlib import Path

import lungaug

import numpy as np
import pydicom


ANNOTATIONS_HEAD = ("seriesuid", "coordX", "coordY", "coordZ", "diameter_mm")
EMPTY_TAGS = ("PatientBirthDate", "PatientSex", "ReferringPhysicianName", "AccessionNumber", "StudyID",
              "PositionReferenceIndicator")
XML_START = '<?xml version="1.0" encoding="UTF-8"?>\n'


def make_uid(*parts):
    """A DICOM UID under 2.25 (UUIDs as integers) that is the same for the same parts."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    number = int.from_bytes(digest[:16], "big")
    return f"2.25.{number}"


# MetaImage

def write_metaimage(folder, scan, compressed=False, local=False):
    """Write <seriesuid>.mhd and .raw (compressed: .zraw; local: one .mha); returns its path."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    data = scan.hu.astype("<i2").tobytes()
    compressed_size = None
    if compressed:
        data = zlib.compress(data, 1)
        compressed_size = len(data)

    # A .mha holds the voxels behind its header.
    if local:
        path = folder / f"{scan.seriesuid}.mha"
        path.write_bytes(metaimage_header(scan, "LOCAL", compressed_size) + data)
        return path

    data_path = folder / f"{scan.seriesuid}.{'zraw' if compressed else 'raw'}"
    data_path.write_bytes(data)
    path = folder / f"{scan.seriesuid}.mhd"
    path.write_bytes(metaimage_header(scan, data_path.name, compressed_size))
    return path


def metaimage_header(scan, data_file, compressed_size=None):
    """The bytes of a MetaImage header; compressed_size: bytes, None for voxels as they are."""
    # Each index axis leads away from one end of the patient: right or left, front or back, foot
    # or head.
    orientation = ""
    for ends, cosine in zip(("RL", "AP", "IS"), np.diag(scan.direction)):
        orientation += ends[1] if cosine < 0 else ends[0]

    header = {
        "ObjectType": "Image",
        "NDims": 3,
        "BinaryData": True,
        "BinaryDataByteOrderMSB": False,
        "CompressedData": compressed_size is not None,
    }
    if compressed_size is not None:
        header["CompressedDataSize"] = compressed_size
    header |= {
        # ITK writes the direction's columns one after the other, first the x index axis' cosines.
        "TransformMatrix": join_numbers(scan.direction.T.ravel()),
        "Offset": join_numbers(scan.origin),
        "CenterOfRotation": "0 0 0",
        "AnatomicalOrientation": orientation,
        "ElementSpacing": join_numbers(scan.spacing),
        "DimSize": join_numbers(scan.hu.shape[::-1]),
        "ElementType": "MET_SHORT",
        # This key ends the header.
        "ElementDataFile": data_file,
    }
    return "".join(f"{key} = {value}\n" for key, value in header.items()).encode()


def join_numbers(values):
    """Numbers with a space between them, each with as many digits as it has."""
    return " ".join(str(value).removesuffix(".0") for value in np.asarray(values).tolist())


# DICOM

def dicom_header(scan):
    """The tags that all images of a series share."""
    tags = pydicom.Dataset()
    tags.file_meta = pydicom.dataset.FileMetaDataset()
    tags.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    tags.file_meta.ImplementationClassUID = make_uid("phantom")
    tags.file_meta.ImplementationVersionName = "PHANTOM"
    tags.file_meta.MediaStorageSOPClassUID = pydicom.uid.CTImageStorage
    tags.SOPClassUID = pydicom.uid.CTImageStorage

    # Describe the examination.
    tags.Modality = "CT"
    tags.Manufacturer = "Phantom"
    tags.PatientPosition = "HFS"
    tags.PatientID = scan.patient
    tags.PatientName = scan.patient
    tags.StudyDate = "20000101"
    tags.StudyTime = "000000"
    tags.SeriesNumber = 1
    tags.AcquisitionNumber = 1
    tags.KVP = "120"
    for name in EMPTY_TAGS:
        setattr(tags, name, "")

    # Name the series, its study and its frame of reference.
    tags.SeriesInstanceUID = scan.seriesuid
    tags.StudyInstanceUID = make_uid(scan.seriesuid, "study")
    tags.FrameOfReferenceUID = make_uid(scan.seriesuid, "frame")

    # Describe the pixels: twelve bits hold them, unless the padding outside the scanner's circle
    # is below what the intercept reaches. Then they are signed.
    is_padded = scan.hu.min() < -1024
    tags.SamplesPerPixel = 1
    tags.PhotometricInterpretation = "MONOCHROME2"
    tags.PixelRepresentation = int(is_padded)
    tags.BitsAllocated = 16
    tags.BitsStored = 16 if is_padded else 12
    tags.HighBit = tags.BitsStored - 1
    tags.RescaleSlope = "1"
    tags.RescaleIntercept = "-1024"
    tags.RescaleType = "HU"
    return tags


def write_image(path, tags, hu, position, axes, spacing, number, kind="AXIAL"):
    """Write one DICOM image: the series' tags, changed to be this image's.

    hu: (rows, columns). position: (x, y, z) of its first pixel, mm. axes: the direction cosines
    of a row, then of a column. spacing: of the rows, then of the columns, mm.
    """
    image_uid = make_uid(tags.SeriesInstanceUID, number)
    tags.file_meta.MediaStorageSOPInstanceUID = image_uid
    tags.SOPInstanceUID = image_uid
    tags.InstanceNumber = number
    tags.ImageType = ["ORIGINAL", "PRIMARY", kind]

    tags.ImagePositionPatient = decimal_strings(position)
    tags.ImageOrientationPatient = decimal_strings(axes)
    tags.PixelSpacing = decimal_strings(spacing)
    tags.Rows = hu.shape[0]
    tags.Columns = hu.shape[1]
    stored = hu + np.int16(1024)
    tags.PixelData = stored.astype("<i2").tobytes()
    pydicom.dcmwrite(path, tags, enforce_file_format=True)


def write_dicom(folder, scan, localizer=False, thickness=1.0):
    """Write <seriesuid>/NNN.dcm, in an order that is not the patient's; returns that folder.

    localizer: whether a scout image has the same series UID. thickness: the slices', in steps
    between slices; above 1 they overlap. An XML file of marks lies beside, as in LIDC-IDRI.
    """
    folder = Path(folder) / scan.seriesuid
    folder.mkdir(parents=True, exist_ok=True)
    count = len(scan.hu)
    tags = dicom_header(scan)
    tags.SliceThickness = decimal_strings([scan.spacing[2] * thickness])[0]

    # Shuffle names and instance numbers, each in an order of its own.
    rng = np.random.default_rng(int(scan.seriesuid.rpartition(".")[2]))
    file_numbers = rng.permutation(count) + 1
    instance_numbers = rng.permutation(count) + 1

    x_axis, y_axis, z_axis = scan.direction.T
    row_and_column = [*x_axis, *y_axis]
    pixel_spacing = (scan.spacing[1], scan.spacing[0])
    for k in range(count):
        path = folder / f"{file_numbers[k]:03d}.dcm"
        position = np.array(scan.origin) + z_axis * scan.spacing[2] * k
        write_image(path, tags, scan.hu[k], position, row_and_column, pixel_spacing,
                    int(instance_numbers[k]))

    if localizer:
        write_localizer(folder / f"{count + 1:03d}.dcm", tags, scan)
    series = f"<SeriesInstanceUid>{scan.seriesuid}</SeriesInstanceUid>"
    marks = f"<LidcReadMessage><ResponseHeader>{series}</ResponseHeader></LidcReadMessage>\n"
    (folder / "069.xml").write_text(XML_START + marks, encoding="utf-8")
    return folder


def write_localizer(path, tags, scan):
    """Write a scout image: the patient from the front, every other column, the last slice on top."""
    count = len(scan.hu)
    x_axis, _, z_axis = scan.direction.T
    projection = np.clip(scan.hu, -1024, None).mean(1).astype(np.int16)
    scout = projection[::-1, ::2]
    top = np.array(scan.origin) + z_axis * scan.spacing[2] * (count - 1)
    spacing = (scan.spacing[2], 2 * scan.spacing[0])
    write_image(path, tags, scout, top, [*x_axis, *-z_axis], spacing, count + 1, "LOCALIZER")


def decimal_strings(values):
    """DICOM decimal strings, at most 16 characters each."""
    return [f"{value:.10g}" for value in values]


# Annotations and truth

def write_annotations(path, rows):
    """Write LUNA16's annotations.csv, whole or not at all.

    rows: (seriesuid, x, y, z, diameter) of each nodule, in mm.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(ANNOTATIONS_HEAD)
    writer.writerows(rows)
    lungaug.write(Path(path), text.getvalue())


def write_truth(path, scan):
    """Write the lungs as bits and the voxels of the nodules, in one small file (.npz)."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    voxels = np.flatnonzero(scan.nodule_labels)
    np.savez_compressed(path, shape=scan.lungs.shape, lungs=np.packbits(scan.lungs),
                        voxels=voxels.astype(np.int32), labels=scan.nodule_labels.flat[voxels])


def read_truth(path):
    """(lungs, nodule_labels), each (z, y, x) in the scan file's order: bool and uint8"""
    with np.load(path) as truth:
        shape = tuple(truth["shape"])
        bits = np.unpackbits(truth["lungs"], count=int(np.prod(shape)))
        lungs = bits.reshape(shape).astype(bool)
        nodule_labels = np.zeros(shape, np.uint8)
        nodule_labels.flat[truth["voxels"]] = truth["labels"]
    return lungs, nodule_labels
