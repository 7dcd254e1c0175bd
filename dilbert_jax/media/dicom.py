"""DICOM through pydicom: single and multi-frame, every transfer syntax that its plugins decode."""

import importlib.metadata
import logging
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom import uid
from pydicom.encaps import generate_fragments, generate_frames
from pydicom.pixels import apply_color_lut, get_decoder

from dilbert_jax.media.clip import (
    MAX_FILE_BYTES,
    Decoded,
    MediaError,
    check_size,
    luma,
    printable,
    select_frames,
)
from dilbert_jax.media.codestream import count_precincts, read_frame_size

_log = logging.getLogger(__name__)

# Only these are ever read: what identifies the patient stays in the file.
_HEADER_TAGS = [
    "SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration", "NumberOfFrames", "Rows",
    "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelSpacing",
    "SequenceOfUltrasoundRegions", "FrameTime", "FrameTimeVector", "CineRate",
    "RecommendedDisplayFrameRate", "WindowCenter", "WindowWidth", "RescaleSlope", "RescaleIntercept",
    "RedPaletteColorLookupTableDescriptor", "GreenPaletteColorLookupTableDescriptor",
    "BluePaletteColorLookupTableDescriptor", "RedPaletteColorLookupTableData",
    "GreenPaletteColorLookupTableData", "BluePaletteColorLookupTableData",
    "SegmentedRedPaletteColorLookupTableData", "SegmentedGreenPaletteColorLookupTableData",
    "SegmentedBluePaletteColorLookupTableData", "ExtendedOffsetTable", "ExtendedOffsetTableLengths",
]  # fmt: skip

# One decoder a transfer syntax, since decoders differ by up to five grey levels on lossy JPEG. Pillow
# (libjpeg-turbo) takes 8-bit JPEG, gdcm lossless JPEG and JPEG-LS, pylibjpeg JPEG 2000. Only pylibjpeg-libjpeg reads
# 12-bit JPEG; its licence is GPL-3, so whoever needs it installs it (the extra "jpeg12"). RLE stays
# with pydicom's slower own decoder, because pylibjpeg-rle panics on damaged data and prints to the terminal.
_PLUGINS = {
    uid.JPEGBaseline8Bit: ("pillow", "pillow"),
    uid.JPEGExtended12Bit: ("pylibjpeg", "pylibjpeg-libjpeg"),
    uid.JPEGLossless: ("gdcm", "python-gdcm"),
    uid.JPEGLosslessSV1: ("gdcm", "python-gdcm"),
    uid.JPEGLSLossless: ("gdcm", "python-gdcm"),
    uid.JPEGLSNearLossless: ("gdcm", "python-gdcm"),
    uid.JPEG2000Lossless: ("pylibjpeg", "pylibjpeg-openjpeg"),
    uid.JPEG2000: ("pylibjpeg", "pylibjpeg-openjpeg"),
    uid.HTJ2KLossless: ("pylibjpeg", "pylibjpeg-openjpeg"),
    uid.HTJ2KLosslessRPCL: ("pylibjpeg", "pylibjpeg-openjpeg"),
    uid.HTJ2K: ("pylibjpeg", "pylibjpeg-openjpeg"),
    uid.RLELossless: ("pydicom", ""),
}
_NATIVE = (
    uid.ImplicitVRLittleEndian,
    uid.ExplicitVRLittleEndian,
    uid.ExplicitVRBigEndian,
    uid.DeflatedExplicitVRLittleEndian,
)
_MAX_PRECINCTS = 2**18  # writers use one a resolution, or some thousands
# Of a side. Scanners overshoot by a pixel or two, cropped exports on one axis, resized ones on both.
_REGION_TOLERANCE = 0.02


def decode_dicom(path: Path, max_frames: int | None) -> Decoded:
    """Decode the pixels of a DICOM file.

    Args:
        path: the file, with or without the 128-byte preamble.
        max_frames: most frames to keep, evenly spaced; None for all.

    Returns:
        Grayscale frames: MONOCHROME1 is inverted, palettes are applied, more than 8 bits are shown through
        the file's first window or else scaled from the stored range; with the regions calibrated in cm.

    Raises:
        MediaError: the file is broken, too large, or its pixels cannot be decoded.
    """
    try:
        dataset = _read_header(path)
    except MediaError:
        raise
    except RecursionError:
        raise MediaError(path, "nests DICOM sequences too deeply") from None
    except Exception as error:
        # The library's text may quote header values, so only the kind of error is passed on.
        raise MediaError(path, f"has a damaged DICOM header ({type(error).__name__})") from None
    try:
        return _decode(path, dataset, max_frames)
    except MediaError:
        raise
    except Exception as error:
        raise MediaError(
            path, f"has DICOM pixel data that cannot be decoded ({type(error).__name__})"
        ) from None


def _read_header(path: Path) -> pydicom.Dataset:
    """The technical header and the encoded pixel data."""
    with path.open("rb") as file:
        has_preamble = file.read(132)[128:] == b"DICM"
    if has_preamble:
        _check_deflated(path)
    dataset = pydicom.dcmread(path, force=not has_preamble, specific_tags=[*_HEADER_TAGS, "PixelData"])
    if not getattr(dataset, "file_meta", None):
        dataset.file_meta = pydicom.dataset.FileMetaDataset()
    if "TransferSyntaxUID" not in dataset.file_meta:
        implicit, little = dataset.original_encoding
        explicit = uid.ExplicitVRLittleEndian if little else uid.ExplicitVRBigEndian
        dataset.file_meta.TransferSyntaxUID = uid.ImplicitVRLittleEndian if implicit else explicit
    return dataset


def _check_deflated(path: Path) -> None:
    """Inflate a deflated data set piece by piece, since pydicom would inflate a bomb in one go."""
    meta = pydicom.filereader.read_file_meta_info(path)
    if meta.get("TransferSyntaxUID") != uid.DeflatedExplicitVRLittleEndian:
        return
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    total = 0
    with path.open("rb") as file:
        file.seek(144 + int(meta.FileMetaInformationGroupLength))
        while block := file.read(2**16):
            while block:
                total += len(inflater.decompress(block, 2**22))
                block = inflater.unconsumed_tail
                if total > MAX_FILE_BYTES:
                    raise MediaError(path, f"inflates to more than {MAX_FILE_BYTES} bytes")


def _is_installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _decode(path: Path, dataset: pydicom.Dataset, max_frames: int | None) -> Decoded:
    if not dataset.get("PixelData"):
        raise MediaError(path, "has no DICOM pixel data (PixelData is missing or empty)")
    rows, columns = _whole_number(path, dataset, "Rows"), _whole_number(path, dataset, "Columns")
    samples = _whole_number(path, dataset, "SamplesPerPixel", 1)
    stored_bits = _whole_number(path, dataset, "BitsStored", _whole_number(path, dataset, "BitsAllocated"))
    if samples not in (1, 3):
        raise MediaError(path, f"has SamplesPerPixel {samples}; 1 and 3 are understood")
    if not 1 <= stored_bits <= 32:
        raise MediaError(path, f"has BitsStored {stored_bits}; 1 to 32 are understood")
    check_size(path, rows, columns)
    syntax = uid.UID(dataset.file_meta.TransferSyntaxUID)
    if syntax not in _PLUGINS and syntax not in _NATIVE:
        name = syntax.name if syntax.is_valid and syntax.is_transfer_syntax else "unknown"
        raise MediaError(path, f"has a DICOM transfer syntax that is not supported ({name})")

    declared = _whole_number(path, dataset, "NumberOfFrames", 1) or 1
    if syntax in _NATIVE:
        num_frames = _count_native_frames(path, dataset, rows, columns, samples, declared)
    else:
        num_frames = _count_encoded_frames(path, dataset, syntax, rows, columns, samples, declared)
    chosen = select_frames(num_frames, max_frames)
    check_size(path, rows, columns, num_frames, len(chosen))
    dataset.NumberOfFrames = num_frames

    plugin, package = _PLUGINS.get(syntax, ("", ""))
    if package and not _is_installed(package):
        raise MediaError(
            path, f"is compressed as {syntax.name}, which needs another decoder: pip install {package}"
        )
    convert = _Grayscale(dataset, stored_bits)
    frames = np.empty((len(chosen), rows, columns), np.uint8)
    # Without as_rgb, YBR keeps its luma channel as stored: no second conversion can go wrong.
    decoded = get_decoder(syntax).iter_array(dataset, indices=chosen, decoding_plugin=plugin, as_rgb=False)
    for number, (pixels, properties) in enumerate(decoded):
        frames[number] = convert(pixels, str(properties["photometric_interpretation"]))
    decoder = f"pydicom {pydicom.__version__}"
    if package:
        decoder += f" {package} {importlib.metadata.version(package)}"
    try:
        regions, spacing = _read_regions(dataset, rows, columns)
    except Exception as error:
        # The pixels do without it. The library's text may quote header values.
        kind = type(error).__name__
        _log.warning("%s: read without its calibration, which is malformed (%s)", printable(path), kind)
        regions, spacing = (), None
    fps = _read_frame_rate(dataset) if num_frames > 1 else None
    return Decoded(frames, decoder, tuple(chosen), fps, spacing, regions)


def _whole_number(path: Path, dataset: pydicom.Dataset, keyword: str, default: int | None = None) -> int:
    try:
        value = dataset.get(keyword)
        if value is None and default is not None:
            return default
        return int(value)
    except Exception:
        raise MediaError(path, f"has no usable DICOM value for {keyword}; a whole number is needed") from None


def _count_native_frames(
    path: Path, dataset: pydicom.Dataset, rows: int, columns: int, samples: int, declared: int
) -> int:
    """Frames of uncompressed pixel data; fewer bytes than the header declares mean a cut file."""
    bits = rows * columns * samples * _whole_number(path, dataset, "BitsAllocated")
    if dataset.get("PhotometricInterpretation") == "YBR_FULL_422":
        bits = bits * 2 // 3
    length = len(dataset.PixelData)
    if declared < 1 or bits < 1:
        raise MediaError(path, f"declares {declared} frames of {bits} bits")
    if length * 8 < bits * declared:
        raise MediaError(
            path,
            f"is truncated: {declared} frames of {rows} x {columns} x {samples} need "
            f"{-(-bits * declared // 8)} bytes of pixel data and {length} are there",
        )
    return declared


def _count_encoded_frames(
    path: Path,
    dataset: pydicom.Dataset,
    syntax: uid.UID,
    rows: int,
    columns: int,
    samples: int,
    declared: int,
) -> int:
    """Frames of compressed pixel data, each one's own size checked before a decoder may allocate for it."""
    if not dataset["PixelData"].is_undefined_length:
        raise MediaError(
            path, "has compressed DICOM pixel data of fixed length, which is not a valid encoding"
        )
    offsets = None
    if "ExtendedOffsetTable" in dataset and "ExtendedOffsetTableLengths" in dataset:
        offsets = (dataset.ExtendedOffsetTable, dataset.ExtendedOffsetTableLengths)
    num_fragments = sum(1 for _ in generate_fragments(dataset.PixelData))
    if num_fragments < 2:
        raise MediaError(path, "has no DICOM frame: its compressed pixel data is empty")
    # The first item is the offset table. Fewer fragments than declared frames: what is there counts.
    declared = max(1, min(declared, num_fragments - 1))
    uncompressed = rows * columns * samples * -(-_whole_number(path, dataset, "BitsAllocated") // 8)
    count = 0
    for encoded in generate_frames(dataset.PixelData, number_of_frames=declared, extended_offsets=offsets):
        if syntax == uid.RLELossless:
            # PackBits grows incompressible rows by 1 %; far more input would mean far more output.
            if len(encoded) > 2 * uncompressed + 4096:
                raise MediaError(
                    path, f"frame {count} holds more RLE data than {rows} x {columns} pixels can need"
                )
        elif (size := read_frame_size(encoded)) is None:
            raise MediaError(path, f"frame {count} holds no JPEG or JPEG 2000 image")
        elif size != (rows, columns):
            raise MediaError(
                path,
                f"frame {count} is encoded with {size[0]} x {size[1]} pixels and the header says "
                f"{rows} x {columns}",
            )
        elif (precincts := count_precincts(encoded)) > _MAX_PRECINCTS:
            raise MediaError(
                path,
                f"frame {count} is divided into about {precincts} JPEG 2000 precincts; the limit is "
                f"{_MAX_PRECINCTS}: write it with larger precincts",
            )
        count += 1
    return count


class _Grayscale:
    """Turns one decoded frame into uint8 [H, W]; palette and window are worked out once."""

    def __init__(self, dataset: pydicom.Dataset, stored_bits: int):
        self.signed = bool(dataset.get("PixelRepresentation", 0))
        self.stored_bits = stored_bits
        self.inverted = dataset.get("PhotometricInterpretation") == "MONOCHROME1"
        self.window = _read_window(dataset) if stored_bits > 8 else None
        self.palette = None
        if dataset.get("PhotometricInterpretation") == "PALETTE COLOR":
            # One grey level for each stored value, so that frames are a look-up and 16-bit palettes too.
            values = np.arange(2 ** min(stored_bits, 16), dtype=np.uint16 if stored_bits > 8 else np.uint8)
            colours = apply_color_lut(values[None], dataset)[0]
            self.palette = luma((colours >> 8 if colours.dtype == np.uint16 else colours).astype(np.uint8))

    def __call__(self, pixels: np.ndarray, photometric: str) -> np.ndarray:
        if self.palette is not None:
            return self.palette[pixels]
        if pixels.ndim == 3 and photometric.startswith("YBR"):
            # The first channel of YBR is ITU-R 601 luma already.
            gray = self._to_8_bits(pixels[..., 0])
            if photometric.startswith("YBR_PARTIAL"):
                gray = np.clip((gray.astype(np.float32) - 16) * (255 / 219), 0, 255).round().astype(np.uint8)
            return gray
        if pixels.ndim == 3:
            return luma(self._to_8_bits(pixels))
        gray = self._to_8_bits(pixels)
        return 255 - gray if self.inverted else gray

    def _to_8_bits(self, pixels: np.ndarray) -> np.ndarray:
        if self.stored_bits == 8 and pixels.dtype == np.uint8:
            return pixels
        if pixels.ndim == 2 and self.window is not None:
            low, high = self.window
        else:
            low = -(2 ** (self.stored_bits - 1)) if self.signed else 0
            high = low + 2**self.stored_bits - 1
        scaled = (pixels.astype(np.float64) - low) * (255 / (high - low))
        return np.clip(scaled, 0, 255).round().astype(np.uint8)


def _read_window(dataset: pydicom.Dataset) -> tuple[float, float] | None:
    """Stored values shown as black and white by the first window [DICOM PS3.3 C.11.2.1.2.1]."""
    centre, width = _first_number(dataset, "WindowCenter"), _first_number(dataset, "WindowWidth")
    slope = _first_number(dataset, "RescaleSlope") or 1.0
    intercept = _first_number(dataset, "RescaleIntercept") or 0.0
    if centre is None or width is None or width <= 1:
        return None
    low, high = centre - 0.5 - (width - 1) / 2, centre - 0.5 + (width - 1) / 2
    return (low - intercept) / slope, (high - intercept) / slope


def _first_number(dataset: Any, keyword: str) -> float | None:
    """The first value of an element as a finite number, None if there is none."""
    try:
        value = dataset.get(keyword)
        value = value[0] if isinstance(value, pydicom.multival.MultiValue) else value
        number = float(value)
    except Exception:
        return None
    return number if np.isfinite(number) else None


def _read_frame_rate(dataset: pydicom.Dataset) -> float | None:
    """Frames per second from the acquisition's times, then from the display rates."""
    frame_time = _first_number(dataset, "FrameTime")
    if frame_time and frame_time > 0:
        return 1000 / frame_time
    try:
        # The first entry of the vector is 0: it is the time before the first frame.
        mean = float(np.mean([float(v) for v in dataset.FrameTimeVector][1:]))
        if np.isfinite(mean) and mean > 0:
            return 1000 / mean
    except Exception:
        pass
    for keyword in ("CineRate", "RecommendedDisplayFrameRate"):
        rate = _first_number(dataset, keyword)
        if rate and rate > 0:
            return rate
    return None


def _read_regions(
    dataset: pydicom.Dataset, rows: int, columns: int
) -> tuple[tuple[tuple[int, int, int, int], ...], tuple[float, float] | None]:
    """B-mode regions calibrated in cm as pixel boxes (y0, x0, y1, x1), and their spacing in mm.

    A region is 2D (RegionSpatialFormat 1), tissue (RegionDataType 1), in cm on both axes (units code 3)
    [DICOM PS3.3 C.8.5.5]. Boxes are clamped to the image. One that reaches far outside on both axes belongs
    to another pixel grid (the export was resized), so neither its box nor its calibration holds.
    """
    sequence = dataset.get("SequenceOfUltrasoundRegions")
    if not sequence:
        values = dataset.get("PixelSpacing")
        if isinstance(values, pydicom.multival.MultiValue) and len(values) == 2:
            return (), _check_spacing(float(values[0]), float(values[1]))
        return (), None
    boxes, spacings = [], []
    for region in sequence:
        wanted = {
            "RegionSpatialFormat": 1,
            "RegionDataType": 1,
            "PhysicalUnitsXDirection": 3,
            "PhysicalUnitsYDirection": 3,
        }
        if any(_first_number(region, keyword) != value for keyword, value in wanted.items()):
            continue
        corners = [
            _first_number(region, f"RegionLocation{corner}")
            for corner in ("MinY0", "MinX0", "MaxY1", "MaxX1")
        ]
        if any(corner is None for corner in corners):
            continue
        y0, x0, y1, x1 = (int(corner) for corner in corners if corner is not None)
        overshoot_y, overshoot_x = max(-y0, y1 + 1 - rows), max(-x0, x1 + 1 - columns)
        if overshoot_y > _REGION_TOLERANCE * rows and overshoot_x > _REGION_TOLERANCE * columns:
            continue
        box = (max(y0, 0), max(x0, 0), min(y1 + 1, rows), min(x1 + 1, columns))
        if box[2] - box[0] < 2 or box[3] - box[1] < 2:
            continue
        boxes.append(box)
        deltas = _first_number(region, "PhysicalDeltaY"), _first_number(region, "PhysicalDeltaX")
        spacings.append(_check_spacing(abs(deltas[0] or 0) * 10, abs(deltas[1] or 0) * 10))
    # Two regions of different scale (split screen) leave no spacing that holds for the whole frame.
    first = spacings[0] if spacings else None
    alike = first and all(spacing and np.allclose(spacing, first, rtol=0.01) for spacing in spacings)
    return tuple(boxes), first if alike else None


def _check_spacing(row: float, column: float) -> tuple[float, float] | None:
    """A spacing that ultrasound can have: finite, positive, at most 10 mm a pixel."""
    return (row, column) if 0 < row <= 10 and 0 < column <= 10 else None
