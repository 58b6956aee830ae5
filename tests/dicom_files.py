"""DICOM series made on the spot: classic ones, a file for each slice, and enhanced multi-frame ones.

And what tests ask of scans and masks that are read back.
"""

from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian, generate_uid
from pydicom.valuerep import format_number_as_ds

from medvisionllama.data.formats import dicom
from medvisionllama.data.formats.dicom_labels import read_classes

MR = "1.2.840.10008.5.1.4.1.1.4"
ENHANCED_MR = "1.2.840.10008.5.1.4.1.1.4.1"
AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
SPACING = (0.5, 0.75, 5.0)
"""Between columns (x), rows (y) and slices (z)."""
ORIGIN = (-10.0, 20.0, 30.0)
PATIENT = ("Doe^Janet", "ID-4711")


def ds(*values):
    """As DICOM writes numbers: at most 16 characters."""
    return [format_number_as_ds(float(value)) for value in values]


def rotation(angles):
    """Row and column direction of a plane turned about x, y and z."""
    a, b, c = angles
    turn = np.eye(3)
    for axis, angle in enumerate((a, b, c)):
        own = np.eye(3)
        i, j = (axis + 1) % 3, (axis + 2) % 3
        own[i, i] = own[j, j] = np.cos(angle)
        own[i, j], own[j, i] = -np.sin(angle), np.sin(angle)
        turn = turn @ own
    return tuple(turn[:, :2].T.ravel())


def affine_of(orientation=AXIAL, spacing=SPACING, origin=ORIGIN):
    """The matrix to RAS that a reader should find."""
    along, down = np.reshape(orientation, (2, 3))
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = along * spacing[0], down * spacing[1]
    affine[:3, 2] = np.cross(along, down) * spacing[2]
    affine[:3, 3] = origin
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def common(shape, dtype, kind):
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = kind
    dataset.SOPClassUID = kind
    dataset.PatientName, dataset.PatientID = PATIENT
    dataset.PatientBirthDate, dataset.PatientSex = "19700101", "F"
    dataset.StudyDate, dataset.StudyTime = "20200101", "120000"
    dataset.AccessionNumber, dataset.StudyID = "A1", "S1"
    dataset.Modality = "MR"
    dataset.SeriesNumber = 7
    dataset.SeriesDescription = "Scan"
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.Rows, dataset.Columns = shape[-2:]
    dataset.BitsAllocated = dataset.BitsStored = 8 * np.dtype(dtype).itemsize
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(np.dtype(dtype).kind == "i")
    return dataset


def classic(stored, *, orientation=AXIAL, spacing=SPACING, origin=ORIGIN):
    """Datasets of a series with voxels `[z, y, x]`, from the low end of the normal to the high one."""
    study, series, frame = generate_uid(), generate_uid(), generate_uid()
    normal = np.cross(orientation[:3], orientation[3:])
    datasets = []
    for index, plane in enumerate(stored):
        dataset = common(stored.shape, stored.dtype, MR)
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.FrameOfReferenceUID = (
            study,
            series,
            frame,
        )
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        dataset.InstanceNumber = index + 1
        dataset.ImageOrientationPatient = ds(*orientation)
        dataset.ImagePositionPatient = ds(*(np.array(origin) + index * spacing[2] * normal))
        dataset.PixelSpacing = ds(spacing[1], spacing[0])
        dataset.SliceThickness = ds(spacing[2])[0]
        dataset.PixelData = np.ascontiguousarray(plane).tobytes()
        datasets.append(dataset)
    return datasets


def save(datasets, folder: Path, names=None):
    """Write the datasets; without names in an order that says nothing, and without suffix."""
    folder.mkdir(parents=True, exist_ok=True)
    order = np.random.default_rng(0).permutation(len(datasets))
    paths = []
    for index, dataset in enumerate(datasets):
        paths.append(folder / (names[index] if names else f"IM{order[index]:04d}"))
        dataset.save_as(paths[-1], enforce_file_format=True)
    return paths


def item(**values):
    dataset = Dataset()
    for name, value in values.items():
        setattr(dataset, name, value)
    return dataset


def enhanced(stored, *, orientation=AXIAL, spacing=SPACING, origin=ORIGIN, order=None, slopes=None):
    """One multi-frame dataset; `order` says which slice each frame holds."""
    order = range(len(stored)) if order is None else order
    normal = np.cross(orientation[:3], orientation[3:])
    dataset = common(stored.shape, stored.dtype, ENHANCED_MR)
    for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "SOPInstanceUID"):
        setattr(dataset, keyword, generate_uid())
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.InstanceNumber = 1
    dataset.NumberOfFrames = len(stored)
    shared = Dataset()
    shared.PlaneOrientationSequence = Sequence([item(ImageOrientationPatient=ds(*orientation))])
    shared.PixelMeasuresSequence = Sequence(
        [item(PixelSpacing=ds(spacing[1], spacing[0]), SliceThickness=ds(spacing[2])[0])]
    )
    dataset.SharedFunctionalGroupsSequence = Sequence([shared])
    frames = []
    for slot, place in enumerate(order):
        own = Dataset()
        position = np.array(origin) + place * spacing[2] * normal
        own.PlanePositionSequence = Sequence([item(ImagePositionPatient=ds(*position))])
        own.FrameContentSequence = Sequence([item(DimensionIndexValues=[slot + 1])])
        if slopes is not None:
            values = item(RescaleSlope=str(slopes[place]), RescaleIntercept="-3", RescaleType="US")
            own.PixelValueTransformationSequence = Sequence([values])
        frames.append(own)
    dataset.PerFrameFunctionalGroupsSequence = Sequence(frames)
    dataset.PixelData = np.ascontiguousarray(stored[list(order)]).tobytes()
    return dataset


def read_voxels(source):
    """The voxels `[channel, x, y, z]` of a scan or a mask."""
    return dicom.read(source)[0]


def read_seg(path, header, classes=None):
    """A mask on the grid of its scan, which may be rounded: numbers of segments, or values of `classes`."""
    if classes is not None:
        mask = read_classes(path, classes)
        return on_grid(mask.array, mask.affine, header, atol=0.1)
    array, own = dicom.read(path)
    return on_grid(array[0], own.affine, header, atol=0.1)


def on_grid(array, affine, header, *, atol=1e-3):
    """Put every voxel of a mask at its place in the patient, on the scan's grid."""
    index = np.argwhere(array)
    world = affine @ np.c_[index, np.ones(len(index))].T
    place = (np.linalg.inv(header.affine) @ world)[:3].T
    np.testing.assert_allclose(place, np.rint(place), rtol=0, atol=atol)
    whole = np.zeros(header.shape, array.dtype)
    whole[tuple(np.rint(place).astype(int).T)] = array[tuple(index.T)]
    return whole
