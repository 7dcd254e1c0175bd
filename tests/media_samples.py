"""Media that the tests write."""

import io

import av
import numpy as np
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
)

from dilbert_jax.media import read_clip

PATIENT = "Doe^Jane"


def make_gray(num_frames=5, height=64, width=96, seed=0):
    """Frames of coarse noise, brighter from frame to frame, so that order and selection show."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 100, (height // 8, width // 8))
    pattern = np.kron(coarse, np.ones((8, 8), int))
    return np.stack([np.clip(pattern + 20 + 8 * t, 0, 255) for t in range(num_frames)]).astype(np.uint8)


def write_video(path, frames, codec, container=None, rate=20, pixel_format="yuv420p"):
    with av.open(str(path), "w", format=container) as out:
        stream = out.add_stream(codec, rate=rate)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pixel_format
        stream.bit_rate = 8_000_000
        for frame in frames:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.stack([frame] * 3, -1), format="rgb24")))
        out.mux(stream.encode(None))
    return path


def make_dataset(pixels, photometric="MONOCHROME2", syntax=ExplicitVRLittleEndian, **elements):
    """A data set of pixels [T, H, W] or [T, H, W, 3], or of encoded bytes with Rows and Columns."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.6.1"
    dataset.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    dataset.SOPClassUID, dataset.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.6.1", "1.2.3"
    dataset.PatientName, dataset.PatientID, dataset.Modality = PATIENT, "MRN-4711", "US"
    dataset.BurnedInAnnotation = "NO"
    dataset.PhotometricInterpretation = photometric
    dataset.PixelRepresentation = 0
    if isinstance(pixels, np.ndarray):
        dataset.NumberOfFrames, dataset.Rows, dataset.Columns = pixels.shape[:3]
        dataset.SamplesPerPixel = pixels.shape[3] if pixels.ndim == 4 else 1
        bits = pixels.dtype.itemsize * 8
        big = syntax == ExplicitVRBigEndian
        data = pixels.astype(pixels.dtype.newbyteorder(">" if big else "<")).tobytes()
        pixels = data + b"\0" * (len(data) % 2)
    else:
        bits = 8
        dataset.SamplesPerPixel = 1
    dataset.BitsAllocated = dataset.BitsStored = bits
    dataset.HighBit = bits - 1
    if dataset.SamplesPerPixel == 3:
        dataset.PlanarConfiguration = 0
    for keyword, value in elements.items():
        setattr(dataset, keyword, value)
    dataset.PixelData = pixels
    dataset["PixelData"].VR = "OW" if bits > 8 else "OB"
    dataset["PixelData"].is_undefined_length = syntax.is_encapsulated
    return dataset


def write_dicom(path, *args, **kwargs):
    make_dataset(*args, **kwargs).save_as(path, enforce_file_format=True)
    return path


def encode(frame, image_format, **options):
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, image_format, **options)
    return buffer.getvalue()


def make_region(x0, y0, x1, y1, data_type=1, units=3, delta=0.05, spatial=1):
    region = Dataset()
    region.RegionSpatialFormat, region.RegionDataType = spatial, data_type
    region.PhysicalUnitsXDirection = region.PhysicalUnitsYDirection = units
    region.RegionLocationMinX0, region.RegionLocationMinY0 = max(x0, 0), max(y0, 0)
    region.RegionLocationMaxX1, region.RegionLocationMaxY1 = x1, y1
    region.PhysicalDeltaX, region.PhysicalDeltaY = delta, delta * 2
    region.RegionFlags = 0
    return region


def read_raw(path, **options):
    return read_clip(path, blank_outside_sector=False, **options)


def png_bytes(frame=None):
    return encode(make_gray(1)[0] if frame is None else frame, "PNG")


def dicom_bytes(*args, **kwargs):
    buffer = io.BytesIO()
    make_dataset(*args, **kwargs).save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def video_bytes(suffix, codec, num_frames=10, container=None):
    buffer = io.BytesIO()
    buffer.name = f"a{suffix}"
    frames = make_gray(max(1, num_frames))
    with av.open(buffer, "w", format=container or suffix[1:]) as out:
        stream = out.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        out.start_encoding()
        for frame in frames[:num_frames]:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.stack([frame] * 3, -1), format="rgb24")))
        if num_frames:
            out.mux(stream.encode(None))
    return buffer.getvalue()


def gif_bytes():
    images = [Image.fromarray(frame) for frame in make_gray(4)]
    buffer = io.BytesIO()
    images[0].save(buffer, "GIF", save_all=True, append_images=images[1:])
    return buffer.getvalue()
