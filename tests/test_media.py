"""Reading media: every test writes its own files or uses those that pydicom ships."""

import io
import os
import time
import types
import warnings
import zlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pydicom
import pytest
from PIL import Image, ImageDraw, ImageFont
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels import apply_color_lut
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    RLELossless,
)

from dilbert_jax.media import Clip, MediaError, clip, dicom, find_media, read_clip, read_stills
from dilbert_jax.media.codestream import count_precincts, read_frame_size

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


# --- video and animation ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "codec", "container"),
    [
        ("a.mp4", "mpeg4", None),
        ("a.mov", "mpeg4", "mov"),
        ("a.avi", "mpeg4", None),
        ("a.mpeg", "mpeg1video", "mpeg"),
        ("a.mpg", "mpeg2video", "vob"),
        ("a.mkv", "mpeg4", None),
        ("a.m1v", "mpeg1video", "mpeg1video"),
        ("mjpeg.avi", "mjpeg", None),
    ],
)
def test_video_containers_decode_to_the_written_frames(tmp_path, name, codec, container):
    frames = make_gray(9)
    pixel_format = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    rate = 25
    path = write_video(tmp_path / name, frames, codec, container, rate, pixel_format)
    result = read_raw(path)
    assert result.frames.dtype == np.uint8 and result.frames.shape == frames.shape
    assert np.abs(result.frames.astype(int) - frames).mean() < 4
    assert result.fps == pytest.approx(rate, rel=0.01)
    assert codec in result.decoder and av.__version__ in result.decoder
    assert result.frame_index == tuple(range(9))


def test_video_luma_keeps_black_white_and_the_weights_of_colours(tmp_path):
    colours = np.zeros((1, 64, 64, 3), np.uint8)
    for i, colour in enumerate([(255, 255, 255), (0, 0, 0), (255, 0, 0), (0, 255, 0)]):
        colours[0, :, i * 16 : (i + 1) * 16] = colour
    path = tmp_path / "c.avi"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("ffv1", rate=10)
        stream.height = stream.width = 64
        stream.pix_fmt = "yuv444p"
        for frame in np.repeat(colours, 2, 0):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(stream.encode(None))
    row = read_raw(path).frames[0, 32, 8::16].astype(int)
    assert np.abs(row - [255, 0, 76, 150]).max() <= 2


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".dcm"])
def test_selection_is_evenly_spaced_with_first_and_last(tmp_path, suffix):
    frames = make_gray(11)
    path = tmp_path / f"a{suffix}"
    if suffix == ".mp4":
        write_video(path, frames, "mpeg4")
    elif suffix == ".gif":
        images = [Image.fromarray(frame) for frame in frames]
        images[0].save(path, save_all=True, append_images=images[1:], duration=50)
    else:
        write_dicom(path, frames)
    everything = read_raw(path)
    assert len(everything.frames) == 11
    some = read_raw(path, max_frames=5)
    assert some.frame_index == (0, 2, 5, 8, 10)
    np.testing.assert_array_equal(some.frames, everything.frames[list(some.frame_index)])
    assert read_raw(path, max_frames=1).frame_index == (0,)
    np.testing.assert_array_equal(read_raw(path, max_frames=99).frames, everything.frames)


def test_video_counts_what_decodes_not_what_the_header_says(tmp_path):
    path = write_video(tmp_path / "a.avi", make_gray(12), "mjpeg", pixel_format="yuvj420p")
    data = bytearray(path.read_bytes())
    for tag, offset in ((b"avih", 8 + 16), (b"strh", 8 + 32)):
        at = data.index(tag) + offset
        assert int.from_bytes(data[at : at + 4], "little") == 12
        data[at : at + 4] = (40).to_bytes(4, "little")
    path.write_bytes(data)
    assert len(read_raw(path).frames) == 12
    assert read_raw(path, max_frames=3).frame_index == (0, 6, 11)


def test_gif_rgba_is_composed_over_black_with_its_own_rate(tmp_path):
    images = []
    for t in range(4):
        pixels = np.zeros((40, 50, 4), np.uint8)
        pixels[:, :25] = (10 + 60 * t, 10 + 60 * t, 10 + 60 * t, 255)
        pixels[:, 25:] = (255, 255, 255, 0)
        images.append(Image.fromarray(pixels))
    images[0].save(tmp_path / "a.gif", save_all=True, append_images=images[1:], duration=100, disposal=2)
    result = read_raw(tmp_path / "a.gif")
    assert result.frames.shape == (4, 40, 50)
    assert result.fps == pytest.approx(10)
    assert [int(f[20, 10]) for f in result.frames] == [10, 70, 130, 190]
    assert not result.frames[:, :, 26:].any()


def test_a_hundred_frames_read_well_under_a_second(tmp_path):
    path = write_video(tmp_path / "a.mp4", make_gray(100, 480, 640), "mpeg4")
    read_clip(path)
    start = time.perf_counter()
    assert read_clip(path).frames.shape == (100, 480, 640)
    assert time.perf_counter() - start < 1.0


# --- stills -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.bmp", "a.tif"])
def test_grayscale_stills_keep_their_values(tmp_path, name):
    frame = make_gray(1)[0]
    Image.fromarray(frame).save(tmp_path / name)
    result = read_raw(tmp_path / name)
    assert result.frames.shape == (1, 64, 96) and result.fps is None and result.pixel_spacing_mm is None
    assert np.abs(result.frames[0].astype(int) - frame).max() <= (12 if name == "a.jpg" else 0)
    assert result.decoder.startswith("pillow ") and result.source == str(tmp_path / name)


def test_every_mode_becomes_luma(tmp_path):
    rgb = np.zeros((8, 8, 3), np.uint8)
    rgb[...] = (200, 100, 50)
    expected = round(0.299 * 200 + 0.587 * 100 + 0.114 * 50)
    image = Image.fromarray(rgb)
    for mode in ("RGB", "RGBA"):
        image.convert(mode).save(tmp_path / f"{mode}.png")
    image.quantize(4).save(tmp_path / "P.png")
    image.convert("CMYK").save(tmp_path / "CMYK.tif")
    for name in ("RGB.png", "RGBA.png", "P.png", "CMYK.tif"):
        assert np.abs(read_raw(tmp_path / name).frames[0].astype(int) - expected).max() <= 3, name
    Image.fromarray(np.eye(8) > 0).save(tmp_path / "1.png")
    np.testing.assert_array_equal(read_raw(tmp_path / "1.png").frames[0], np.eye(8, dtype=np.uint8) * 255)
    wide = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    for name in ("16.png", "16.tif"):
        Image.fromarray(wide).save(tmp_path / name)
        np.testing.assert_array_equal(read_raw(tmp_path / name).frames[0], wide >> 8)
    half = Image.fromarray(np.full((8, 8, 4), (255, 255, 255, 128), np.uint8))
    half.save(tmp_path / "half.png")
    assert abs(int(read_raw(tmp_path / "half.png").frames[0, 0, 0]) - 128) <= 1


def test_content_decides_not_the_name(tmp_path):
    frame = make_gray(1)[0]
    (tmp_path / "image.dcm").write_bytes(encode(frame, "PNG"))
    np.testing.assert_array_equal(read_raw(tmp_path / "image.dcm").frames[0], frame)
    video = write_video(tmp_path / "clip.mp4", make_gray(3), "mpeg4").rename(tmp_path / "clip.jpg")
    assert len(read_raw(video).frames) == 3
    cine = write_dicom(tmp_path / "noextension", make_gray(2))
    assert len(read_raw(cine).frames) == 2


def test_read_stills_joins_images_of_one_size(tmp_path):
    frames = make_gray(3)
    paths = []
    for t, frame in enumerate(frames):
        paths.append(tmp_path / f"{t}.png")
        Image.fromarray(frame).save(paths[-1])
    result = read_stills(paths)
    assert isinstance(result, Clip) and result.fps is None and result.frame_index == (0, 1, 2)
    np.testing.assert_array_equal(result.frames, frames)
    np.testing.assert_array_equal(read_stills(paths[::-1]).frames, frames[::-1])
    Image.fromarray(frames[0][:-1]).save(paths[1])
    with pytest.raises(MediaError, match=r"1\.png: has 63 x 96 pixels and the sequence starts with 64 x 96"):
        read_stills(paths)
    cine = write_dicom(tmp_path / "cine.dcm", frames)
    with pytest.raises(MediaError, match="holds several frames"):
        read_stills([cine])
    with pytest.raises(ValueError, match="non-empty list"):
        read_stills([])
    with pytest.raises(ValueError, match="non-empty list"):
        read_stills(str(paths[0]))


# --- DICOM ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "syntax",
    [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian],
)
def test_native_dicom_keeps_its_values(tmp_path, syntax):
    frames = make_gray(4, 24, 40)
    result = read_raw(write_dicom(tmp_path / "a.dcm", frames, syntax=syntax))
    np.testing.assert_array_equal(result.frames, frames)
    assert result.decoder == f"pydicom {pydicom.__version__}"


def test_a_decoder_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(dicom._PLUGINS, JPEG2000Lossless, ("pylibjpeg", "pylibjpeg-elsewhere"))
    data = encapsulate([encode(make_gray(1, 24, 40)[0], "JPEG2000", no_jp2=True)])
    write_dicom(tmp_path / "a.dcm", data, syntax=JPEG2000Lossless, Rows=24, Columns=40, NumberOfFrames=1)
    with pytest.raises(MediaError, match=r"a\.dcm: is compressed as .*pip install pylibjpeg-elsewhere"):
        read_raw(tmp_path / "a.dcm")


def test_jpeg_ls_returns_the_values_of_the_same_image_uncompressed():
    compressed, native = (
        read_raw(get_testdata_file(name, download=False))
        for name in ("MR_small_jpeg_ls_lossless.dcm", "MR_small.dcm")
    )
    np.testing.assert_array_equal(compressed.frames, native.frames)
    assert "python-gdcm" in compressed.decoder


def test_compressed_dicom_names_its_one_decoder(tmp_path):
    frames = make_gray(3, 24, 40)
    for syntax, image_format, package in (
        (JPEGBaseline8Bit, "JPEG", "pillow"),
        (JPEG2000Lossless, "JPEG2000", "pylibjpeg-openjpeg"),
    ):
        options = {"no_jp2": True} if image_format == "JPEG2000" else {"quality": 95}
        data = encapsulate([encode(frame, image_format, **options) for frame in frames])
        path = tmp_path / f"{image_format}.dcm"
        write_dicom(path, data, syntax=syntax, Rows=24, Columns=40, NumberOfFrames=3)
        result = read_raw(path)
        assert np.abs(result.frames.astype(int) - frames).max() <= (0 if image_format == "JPEG2000" else 8)
        assert package in result.decoder and result.decoder == read_raw(path, max_frames=2).decoder
    dataset = make_dataset(frames)
    dataset.compress(RLELossless, generate_instance_uid=False)
    dataset.save_as(tmp_path / "rle.dcm", enforce_file_format=True)
    result = read_raw(tmp_path / "rle.dcm", max_frames=2)
    np.testing.assert_array_equal(result.frames, frames[[0, 2]])
    assert result.decoder == f"pydicom {pydicom.__version__}"


def test_encapsulated_dicom_counts_frames_that_are_there(tmp_path):
    frames = make_gray(3, 24, 40)
    data = encapsulate([encode(frame, "JPEG", quality=95) for frame in frames])
    path = tmp_path / "a.dcm"
    for declared in (9, 1):
        write_dicom(path, data, syntax=JPEGBaseline8Bit, Rows=24, Columns=40, NumberOfFrames=declared)
        assert len(read_raw(path).frames) == 3


def test_photometric_interpretations(tmp_path):
    frames = make_gray(1, 16, 16)
    path = tmp_path / "a.dcm"
    write_dicom(path, frames, "MONOCHROME1")
    np.testing.assert_array_equal(read_raw(path).frames, 255 - frames)
    rgb = np.zeros((1, 4, 4, 3), np.uint8)
    rgb[...] = (200, 100, 50)
    write_dicom(path, rgb, "RGB")
    assert (read_raw(path).frames == 124).all()
    # YBR_FULL: luma is stored, whatever the colour.
    ybr = np.zeros((1, 4, 4, 3), np.uint8)
    ybr[...] = (124, 86, 182)
    write_dicom(path, ybr, "YBR_FULL")
    assert (read_raw(path).frames == 124).all()
    palette = {}
    for colour, factor in (("Red", 1.0), ("Green", 0.5), ("Blue", 0.0)):
        palette[f"{colour}PaletteColorLookupTableDescriptor"] = [256, 0, 16]
        table = (np.arange(256) * 257 * factor).astype("<u2")
        palette[f"{colour}PaletteColorLookupTableData"] = table.tobytes()
    write_dicom(path, frames, "PALETTE COLOR", **palette)
    expected = frames * (0.299 + 0.587 * 0.5)
    assert np.abs(read_raw(path).frames - expected).max() <= 1.5


def test_more_than_8_bits_are_scaled_or_windowed(tmp_path):
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(1, 8, 8)
    path = write_dicom(tmp_path / "a.dcm", values)
    assert np.abs(read_raw(path).frames - values / 257.0).max() <= 0.5
    write_dicom(path, values // 16, BitsStored=12, HighBit=11)
    assert np.abs(read_raw(path).frames - values / 257.0).max() <= 1
    signed = (values.astype(int) - 32768).astype(np.int16)
    write_dicom(path, signed, PixelRepresentation=1)
    assert np.abs(read_raw(path).frames - values / 257.0).max() <= 0.5
    write_dicom(path, values, WindowCenter=1000.5, WindowWidth=1001)
    assert read_raw(path).frames[0, 0, 0] == 0 and read_raw(path).frames[0, 1:].min() == 255


@pytest.mark.parametrize(
    ("elements", "fps"),
    [
        ({"FrameTime": "40"}, 25),
        ({"CineRate": "30"}, 30),
        ({"RecommendedDisplayFrameRate": "15"}, 15),
        ({"FrameTimeVector": ["0", "50", "50"]}, 20),
        ({"FrameTime": "0", "CineRate": "12"}, 12),
        ({}, None),
    ],
)
def test_dicom_frame_rate(tmp_path, elements, fps):
    assert read_raw(write_dicom(tmp_path / "a.dcm", make_gray(3), **elements)).fps == fps
    assert read_raw(write_dicom(tmp_path / "a.dcm", make_gray(1), **elements)).fps is None


def test_only_b_mode_regions_in_cm_calibrate_and_blank(tmp_path):
    frames = np.full((2, 100, 200), 90, np.uint8)
    regions = [
        make_region(0, 0, 199, 9, data_type=10),  # ECG trace
        make_region(0, 10, 199, 19, spatial=2),  # M-mode
        make_region(0, 80, 199, 99, units=4),  # seconds
        make_region(30, 40, 30, 30),  # empty
        make_region(20, 30, 119, 79),
    ]
    path = write_dicom(tmp_path / "a.dcm", frames, SequenceOfUltrasoundRegions=regions, PixelSpacing=[9, 9])
    result = read_clip(path)
    assert result.pixel_spacing_mm == pytest.approx((1.0, 0.5))
    assert result.region == pytest.approx((0.30, 0.10, 0.80, 0.60))
    inside = np.zeros((100, 200), bool)
    inside[30:80, 20:120] = True
    np.testing.assert_array_equal(result.frames, np.where(inside, 90, 0)[None].repeat(2, 0))
    assert (read_raw(path).frames == 90).all() and read_raw(path).region == (0, 0, 1, 1)


def test_regions_outside_the_image_are_clamped_or_rejected(tmp_path):
    frames = np.full((1, 100, 200), 90, np.uint8)
    path = tmp_path / "a.dcm"
    write_dicom(path, frames, SequenceOfUltrasoundRegions=[make_region(50, 20, 149, 300)])
    result = read_clip(path)
    assert result.region == pytest.approx((0.2, 0.25, 1.0, 0.75)) and result.pixel_spacing_mm is not None
    for outside in (make_region(84, 31, 595, 414), make_region(300, 20, 400, 60)):
        write_dicom(path, frames, SequenceOfUltrasoundRegions=[outside])
        result = read_clip(path)
        assert result.pixel_spacing_mm is None and (result.frames == 90).all()


def test_regions_of_different_scale_leave_no_spacing(tmp_path):
    regions = [make_region(0, 0, 49, 99), make_region(60, 0, 99, 99, delta=0.02)]
    path = write_dicom(
        tmp_path / "a.dcm", np.full((1, 100, 100), 90, np.uint8), SequenceOfUltrasoundRegions=regions
    )
    result = read_clip(path)
    assert result.pixel_spacing_mm is None and not result.frames[0, :, 50:60].any()
    assert (result.frames[0, :, :50] == 90).all() and (result.frames[0, :, 60:] == 90).all()


def test_pixel_spacing_without_regions(tmp_path):
    path = write_dicom(tmp_path / "a.dcm", make_gray(1), PixelSpacing=[0.2, 0.3])
    assert read_raw(path).pixel_spacing_mm == pytest.approx((0.2, 0.3))
    write_dicom(path, make_gray(1), PixelSpacing=[0, 0])
    assert read_raw(path).pixel_spacing_mm is None


@pytest.mark.parametrize(
    ("keyword", "value", "error"),
    [("PixelSpacing", b"0.2\\Doe ", "ValueError"), ("SequenceOfUltrasoundRegions", b"Doe ", "OSError")],
)
def test_a_malformed_calibration_does_not_cost_the_pixels(tmp_path, keyword, value, error, caplog):
    dataset = make_dataset(make_gray(2), syntax=ImplicitVRLittleEndian)
    dataset.add_new(
        keyword, "OB", value
    )  # an implicit data set holds no representation, so any bytes can stand there
    dataset.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    result = read_raw(tmp_path / "a.dcm")
    np.testing.assert_array_equal(result.frames, make_gray(2))
    assert result.pixel_spacing_mm is None
    assert caplog.messages == [
        f"{tmp_path / 'a.dcm'}: read without its calibration, which is malformed ({error})"
    ]


@pytest.mark.parametrize("name", ["ybr_color", "rgb_color", "palette_color", "jpeg2k"])
def test_examples_of_pydicom_match_its_own_luma(name):
    dataset = getattr(pydicom.examples, name)
    result = read_raw(pydicom.examples.get_path(name))
    pixels = dataset.pixel_array
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        pixels = (apply_color_lut(pixels, dataset) >> 8).astype(np.uint8)
    expected = pixels @ np.array([0.299, 0.587, 0.114])
    expected = expected[None] if expected.ndim == 2 else expected
    difference = np.abs(result.frames - expected)
    # The library's own way through YBR to RGB clips saturated colours, ours keeps the stored luma.
    assert difference.max() <= (7 if name == "ybr_color" else 1) and difference.mean() < 0.35
    assert result.fps == (pytest.approx(30, rel=1e-3) if name == "ybr_color" else None)


# --- de-identification ------------------------------------------------------------------------------------


def make_screen(num_frames=6, moving=True):
    """A speckled sector with an anechoic cyst on a dark screen, and where its tissue lies."""
    rng = np.random.default_rng(3)
    y, x = np.mgrid[:480, :640]
    angle, depth = np.arctan2(x - 320, y - 20.0), np.hypot(x - 320, y - 20.0)
    sector = (np.abs(angle) < 0.6) & (depth > 60) & (depth < 400)
    cyst = np.hypot(x - 330, y - 250) < 50
    frames = np.full((num_frames, 480, 640), 4, np.uint8)
    for frame in frames:
        speckle = np.clip(rng.gamma(2.0, 30.0, frame.shape), 6, 255)
        frame[sector] = speckle[sector]
        frame[cyst] = 4
        if not moving:
            frames[:] = frame
            break
    return frames, sector


def draw_text(frames, text, at):
    for frame in frames:
        image = Image.fromarray(frame)
        ImageDraw.Draw(image).text(at, text, fill=230, font=ImageFont.load_default(18))
        frame[...] = np.asarray(image)


@pytest.mark.parametrize("moving", [True, False])
def test_text_beside_the_sector_is_blanked_and_tissue_is_kept(tmp_path, moving):
    frames, sector = make_screen(moving=moving)
    clean = frames.copy()
    draw_text(frames, "DOE JANE 1970-01-01\nCITY HOSPITAL", (8, 8))
    draw_text(frames, "MI 1.1 TIS 0.4", (500, 30))
    draw_text(frames, "DR WHO", (20, 440))
    path = write_dicom(tmp_path / "a.dcm", frames)
    result = read_clip(path)
    kept = result.frames == frames
    assert kept[:, sector].all()
    text = frames != clean
    assert text.any() and not result.frames[text].any()
    ymin, xmin, ymax, xmax = result.region
    rows, columns = np.flatnonzero(sector.any(1)), np.flatnonzero(sector.any(0))
    assert ymin <= rows[0] / 480 <= ymin + 0.03 and ymax - 0.03 <= rows[-1] / 480 <= ymax
    assert xmin <= columns[0] / 640 <= xmin + 0.03 and xmax - 0.03 <= columns[-1] / 640 <= xmax


def test_a_calibrated_region_of_the_whole_screen_leaves_no_text(tmp_path):
    frames, sector = make_screen()
    clean = frames.copy()
    draw_text(frames, "DOE JANE 1970-01-01", (8, 8))
    text = frames != clean
    for region in (make_region(0, 0, 639, 479), make_region(0, 5, 639, 474)):
        path = write_dicom(tmp_path / "a.dcm", frames, SequenceOfUltrasoundRegions=[region])
        result = read_clip(path)
        assert text.any() and not result.frames[text].any()
        assert (result.frames == frames)[:, sector].all() and result.pixel_spacing_mm is not None
    # A smaller region is believed, and so is any where no sector stands out.
    path = write_dicom(tmp_path / "a.dcm", frames, SequenceOfUltrasoundRegions=[make_region(0, 0, 639, 449)])
    np.testing.assert_array_equal(read_clip(path).frames[:, :450], frames[:, :450])
    full = np.full((1, 100, 200), 90, np.uint8)
    path = write_dicom(tmp_path / "a.dcm", full, SequenceOfUltrasoundRegions=[make_region(0, 2, 199, 99)])
    assert read_clip(path).region == pytest.approx((0.02, 0, 1, 1))


def test_a_bright_wall_behind_a_shadow_is_kept_and_a_banner_is_not(tmp_path):
    rng = np.random.default_rng(5)
    frame = np.full((512, 512), 4, np.uint8)
    speckle = np.clip(rng.gamma(2.0, 30.0, frame.shape), 6, 255).astype(np.uint8)
    tissue, wall, banner = (np.zeros(frame.shape, bool) for _ in range(3))
    tissue[60:380, 150:400] = True
    wall[330:420, 84:112] = True  # 38 pixels of shadow away
    banner[8:32, 120:500] = True
    frame[tissue | wall] = speckle[tissue | wall]
    frame[banner] = 170
    frame[14:26, 130:490:6] = 255
    Image.fromarray(frame).save(tmp_path / "a.png")
    kept = read_clip(tmp_path / "a.png").frames[0] == frame
    assert kept[tissue].all() and kept[wall].mean() > 0.8
    assert not kept[banner].any()


def test_frames_full_of_tissue_or_of_nothing_stay_as_they_are(tmp_path):
    rng = np.random.default_rng(0)
    for frame in (
        np.clip(rng.gamma(2.0, 25.0, (300, 400)), 0, 255).astype(np.uint8),
        np.zeros((300, 400), np.uint8),
        np.full((300, 400), 77, np.uint8),
        make_gray(1, 16, 16)[0],
    ):
        Image.fromarray(frame).save(tmp_path / "a.png")
        result = read_clip(tmp_path / "a.png")
        np.testing.assert_array_equal(result.frames[0], frame)
        assert result.region == (0.0, 0.0, 1.0, 1.0)


def test_patient_fields_never_leave_the_file(tmp_path, caplog, capfd):
    path = write_dicom(tmp_path / "a.dcm", make_gray(2), FrameTime="40", PatientBirthDate="19700101")
    assert PATIENT not in repr(read_clip(path)) and "MRN" not in repr(read_clip(path))
    data = path.read_bytes()
    broken = tmp_path / "b.dcm"
    for cut in range(140, len(data), 97):
        broken.write_bytes(data[:cut])
        with pytest.raises(MediaError) as caught:
            read_clip(broken)
        assert "Doe" not in str(caught.value) and "MRN" not in str(caught.value)
        assert caught.value.__suppress_context__ or caught.value.__context__ is None
    captured = capfd.readouterr()
    assert not captured.out and not captured.err and not caplog.records


# --- broken input -----------------------------------------------------------------------------------------


def _png(frame=None):
    return encode(make_gray(1)[0] if frame is None else frame, "PNG")


def _huge_png():
    data = bytearray(_png())
    data[16:24] = (60_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    return bytes(data)


def _dicom_bytes(*args, **kwargs):
    buffer = io.BytesIO()
    make_dataset(*args, **kwargs).save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def _video_bytes(suffix, codec, num_frames=10, container=None):
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


def _sound_only():
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as out:
        stream = out.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), format="fltp", layout="stereo")
        frame.sample_rate = 44100
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return buffer.getvalue()


def _gif():
    images = [Image.fromarray(frame) for frame in make_gray(4)]
    buffer = io.BytesIO()
    images[0].save(buffer, "GIF", save_all=True, append_images=images[1:])
    return buffer.getvalue()


def _encapsulated(frames_bytes, syntax=JPEGBaseline8Bit, **elements):
    sizes = {"Rows": 24, "Columns": 40, "NumberOfFrames": 1} | elements
    return _dicom_bytes(encapsulate(frames_bytes), syntax=syntax, **sizes)


def _wide_jpeg2000():
    data = bytearray(encode(make_gray(1, 24, 40)[0], "JPEG2000", no_jp2=True))
    data[8:16] = (60_000).to_bytes(4, "big") * 2
    return bytes(data)


def _endless_jp2():
    """A JP2 file with a box of length 0 before its code stream; a walk over the boxes never gets past it."""
    data = encode(make_gray(1, 24, 40)[0], "JPEG2000")
    at = data.index(b"jp2c") - 4
    return data[:at] + b"\0\0\0\0uuid" + data[at:]


def _damaged_jp2_sample():
    """A file that pydicom ships, a byte changed: its last box before the code stream ends on zeros."""
    data = bytearray(Path(get_testdata_file("GDCMJ2K_TextGBR.dcm", download=False)).read_bytes())
    assert data[2408:2416] == b"\0\0\0\x1cuuid"
    data[2411] = 0x35
    return bytes(data)


def _tiny_precincts(side=1024):
    data = bytearray(encode(make_gray(1, side, side)[0], "JPEG2000", no_jp2=True, precinct_size=(64, 64)))
    at = data.index(b"\xff\x52") + 14
    data[at : at + 6] = bytes(6)
    return bytes(data)


def _deep_dicom():
    item = b"\xfe\xff\x00\xe0\xff\xff\xff\xff"
    nested = (b"\x08\x00\x40\x11SQ\x00\x00\xff\xff\xff\xff" + item) * 20_000
    whole = _dicom_bytes(make_gray(1))
    at = whole.index(b"\x08\x00\x16\x00UI")
    return whole[:at] + nested


JPEG_FRAME = encode(make_gray(1, 24, 40)[0], "JPEG")
BROKEN = {
    "zero_bytes.png": (lambda: b"", "0 bytes"),
    "text.png": (lambda: b"this is no image\n" * 50, "no DICOM, video or image"),
    "text.dcm": (lambda: b"(0010,0010) name\n" * 50, "no DICOM, video or image"),
    "random.mp4": (lambda: np.random.default_rng(0).bytes(5000), "no DICOM, video or image"),
    "truncated.png": (
        lambda: _png(np.random.default_rng(0).integers(0, 255, (90, 90), np.uint8))[:2000],
        "decoded",
    ),
    "truncated.jpg": (
        lambda: encode(make_gray(1, 240, 320)[0], "JPEG")[:2000],
        "cannot be decoded as an image",
    ),
    "truncated.tif": (lambda: encode(make_gray(1)[0], "TIFF")[:3000], "cannot be decoded as an image"),
    "truncated.bmp": (lambda: encode(make_gray(1)[0], "BMP")[:3000], "cannot be decoded as an image"),
    "truncated.gif": (lambda: _gif()[:600], "cannot be decoded as an image"),
    "only_magic.png": (lambda: b"\x89PNG\r\n\x1a\n", "cannot be decoded as an image"),
    "bomb.png": (_huge_png, "pixels"),
    "truncated.mp4": (lambda: _video_bytes(".mp4", "mpeg4")[:2000], "cannot be decoded as video"),
    "truncated.avi": (lambda: _video_bytes(".avi", "mpeg4", 40)[:-4000], "truncated or damaged|as video"),
    "only_ftyp.mp4": (lambda: b"\0\0\0\x18ftypisom\0\0\0\0isommp41" + b"\0" * 40, "video"),
    "only_riff.avi": (lambda: b"RIFF\xff\0\0\0AVI LIST", "video"),
    "no_frame.avi": (lambda: _video_bytes(".avi", "mpeg4", 0), "no video frame can be decoded|as video"),
    "sound.mp4": (_sound_only, "holds no video stream"),
    "pack_only.mpeg": (lambda: b"\0\0\x01\xba" + b"\x21" + b"\0" * 3000, "video"),
    "only_dicm.dcm": (lambda: b"\0" * 128 + b"DICM", "DICOM"),
    "no_pixels.dcm": (lambda: _dicom_bytes(b""), "no DICOM pixel data"),
    "truncated.dcm": (lambda: _dicom_bytes(make_gray(4))[:-5000], "truncated"),
    "frames.dcm": (lambda: _dicom_bytes(make_gray(1), NumberOfFrames=2_000_000_000), "truncated"),
    "rows.dcm": (lambda: _dicom_bytes(make_gray(1), Rows=65535, Columns=65535), "limit is"),
    "zero_rows.dcm": (lambda: _dicom_bytes(make_gray(1), Rows=0), "empty frame"),
    "no_rows.dcm": (lambda: _dicom_bytes(b"ab"), "Rows"),
    "samples.dcm": (lambda: _dicom_bytes(make_gray(1), SamplesPerPixel=7), "SamplesPerPixel"),
    "syntax.dcm": (lambda: _encapsulated([JPEG_FRAME], pydicom.uid.MPEG2MPML), "not supported"),
    "damaged_jpeg.dcm": (lambda: _encapsulated([JPEG_FRAME[:200]]), "cannot be decoded"),
    "no_jpeg.dcm": (lambda: _encapsulated([b"nothing of the kind "]), "holds no JPEG"),
    "other_size.dcm": (lambda: _encapsulated([JPEG_FRAME], Rows=99), "encoded with 24 x 40"),
    "bomb_j2k.dcm": (
        lambda: _encapsulated([_wide_jpeg2000()], JPEG2000Lossless),
        "encoded with 60000 x 60000",
    ),
    "endless_j2k.dcm": (
        lambda: _encapsulated([_endless_jp2()], JPEG2000Lossless),
        "frame 0 holds no JPEG or JPEG 2000 image",
    ),
    "endless_j2k_sample.dcm": (_damaged_jp2_sample, "frame 0 holds no JPEG or JPEG 2000 image"),
    "precincts_j2k.dcm": (
        lambda: _encapsulated([_tiny_precincts()], JPEG2000Lossless, Rows=1024, Columns=1024),
        "frame 0 is divided into about 1[0-9]{6} JPEG 2000 precincts; the limit is 262144",
    ),
    "bomb_rle.dcm": (lambda: _encapsulated([b"\0" * 9000], RLELossless), "more RLE data"),
    "truncated_jpeg.dcm": (lambda: _encapsulated([JPEG_FRAME])[:-200], "DICOM"),
    "palette.dcm": (lambda: _dicom_bytes(make_gray(1), "PALETTE COLOR"), "cannot be decoded"),
    "deep.dcm": (_deep_dicom, "DICOM"),
}


@pytest.mark.parametrize("name", sorted(BROKEN))
def test_broken_input_gives_one_clear_error(tmp_path, name, capfd):
    make, pattern = BROKEN[name]
    path = tmp_path / name
    path.write_bytes(make())
    start = time.perf_counter()
    with warnings.catch_warnings(), pytest.raises(MediaError, match=pattern) as caught:
        warnings.simplefilter("error")
        read_clip(path)
    assert time.perf_counter() - start < 5
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
    assert caught.value.path == path
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err == ""


def test_video_cut_in_its_frames_is_refused(tmp_path):
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w", options={"movflags": "faststart"}) as out:
        stream = out.add_stream("mpeg4", rate=25)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        for frame in make_gray(40):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.stack([frame] * 3, -1), format="rgb24")))
        out.mux(stream.encode(None))
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat") and len(read_clip(path).frames) == 40
    path.write_bytes(data[: len(data) * 3 // 4])
    with pytest.raises(MediaError, match="truncated or damaged after"):
        read_clip(path)


@pytest.mark.parametrize(("name", "codec"), [("a.mkv", "mpeg4"), ("a.webm", "libvpx")])
def test_matroska_shorter_than_it_says_is_refused(tmp_path, name, codec):
    path = write_video(tmp_path / name, make_gray(40), codec)
    data = path.read_bytes()
    path.write_bytes(data + b"\0" * 9)
    assert len(read_clip(path).frames) == 40
    for cut in (1, len(data) // 10, len(data) // 2, len(data) * 3 // 4):
        path.write_bytes(data[:-cut])
        with pytest.raises(
            MediaError, match=f"is truncated: it says {len(data)} bytes and has {len(data) - cut}"
        ):
            read_clip(path, max_frames=4)


def test_matroska_of_unknown_size_is_read(tmp_path):
    """A recorder that writes to a pipe cannot go back and enter the size."""
    frames, buffer = make_gray(), io.BytesIO()
    pipe = types.SimpleNamespace(write=buffer.write)
    with av.open(pipe, "w", format="matroska") as out:
        stream = out.add_stream("mpeg4", rate=20)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        for frame in frames:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.stack([frame] * 3, -1), format="rgb24")))
        out.mux(stream.encode(None))
    assert b"\x18\x53\x80\x67\x01" + b"\xff" * 7 in buffer.getvalue()
    (tmp_path / "a.mkv").write_bytes(buffer.getvalue())
    assert len(read_clip(tmp_path / "a.mkv").frames) == 5


def test_paths_that_are_no_files(tmp_path):
    with pytest.raises(MediaError, match="no such file"):
        read_clip(tmp_path / "absent.png")
    with pytest.raises(MediaError, match="is a folder"):
        read_clip(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(MediaError, match="not a regular file"):
        read_clip(tmp_path / "pipe")
    with pytest.raises(MediaError, match="cannot be opened"):
        read_clip("a\0b")
    with pytest.raises(ValueError, match="max_frames must be at least 1"):
        read_clip(tmp_path / "absent.png", max_frames=0)


def test_unreadable_file(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(_png())

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    # A mode of 000 does not stop a superuser, so the refusal is simulated.
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(MediaError, match=r"a\.png: cannot be opened \(Permission denied\)"):
        read_clip(path)


def test_limits_hold_before_decoding(tmp_path, monkeypatch):
    frames = make_gray(6)
    video = write_video(tmp_path / "a.mp4", frames, "mpeg4")
    cine = write_dicom(tmp_path / "a.dcm", frames)
    images = [Image.fromarray(frame) for frame in frames]
    images[0].save(tmp_path / "a.gif", save_all=True, append_images=images[1:])
    paths = (video, cine, tmp_path / "a.gif")
    monkeypatch.setattr(clip, "MAX_CLIP_BYTES", 3 * 64 * 96)
    for path in paths:
        with pytest.raises(MediaError, match="read fewer frames with max_frames"):
            read_clip(path)
        assert len(read_clip(path, max_frames=3).frames) == 3
    monkeypatch.setattr(clip, "MAX_DECODED_PIXELS", 5 * 64 * 96)
    for path in paths:
        with pytest.raises(MediaError, match="too much to decode"):
            read_clip(path, max_frames=2)
    monkeypatch.setattr(clip, "MAX_FRAME_PIXELS", 64 * 95)
    for path in paths:
        with pytest.raises(MediaError, match="the limit is"):
            read_clip(path, max_frames=2)


def test_deflate_bomb_is_stopped(tmp_path, monkeypatch):
    path = write_dicom(
        tmp_path / "a.dcm", np.zeros((20, 64, 64), np.uint8), syntax=DeflatedExplicitVRLittleEndian
    )
    assert path.stat().st_size < 5000 and len(read_clip(path).frames) == 20
    monkeypatch.setattr(dicom, "MAX_FILE_BYTES", 50_000)
    with pytest.raises(MediaError, match="inflates to more than"):
        read_clip(path)


def test_damaged_bytes_never_raise_anything_else(tmp_path, capfd):
    rng = np.random.default_rng(1)
    encapsulated = encapsulate([JPEG_FRAME, JPEG_FRAME])
    sources = {
        "png": _png(),
        "gif": _gif(),
        "jpg": encode(make_gray(1)[0], "JPEG"),
        "tif": encode(make_gray(1)[0], "TIFF"),
        "mp4": _video_bytes(".mp4", "mpeg4"),
        "avi": _video_bytes(".avi", "mpeg4"),
        "mpeg": _video_bytes(".mpeg", "mpeg1video"),
        "dcm": _dicom_bytes(
            make_gray(2), FrameTime="40", SequenceOfUltrasoundRegions=[make_region(1, 1, 50, 50)]
        ),
        "jpeg.dcm": _dicom_bytes(
            encapsulated, syntax=JPEGBaseline8Bit, Rows=24, Columns=40, NumberOfFrames=2
        ),
    }
    outcomes = {"read": 0, "refused": 0}
    for suffix, data in sources.items():
        path = tmp_path / f"a.{suffix}"
        for _ in range(12):
            damaged = bytearray(data)
            for position in rng.integers(0, min(len(data), 1500), 12):
                damaged[position] = rng.integers(0, 256)
            path.write_bytes(damaged)
            try:
                assert read_clip(path, max_frames=4).frames.ndim == 3
                outcomes["read"] += 1
            except MediaError:
                outcomes["refused"] += 1
    assert outcomes["read"] and outcomes["refused"]
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err == ""


def test_library_warnings_stay_inside_and_filters_are_restored(tmp_path):
    before = list(warnings.filters)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        read_clip(pydicom.examples.get_path("palette_color"))
    assert not caught and warnings.filters == before


# --- finding ----------------------------------------------------------------------------------------------


def test_find_media_lists_by_content_in_natural_order(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("frame10.png", "frame2.png", "sub/x.bin", ".hidden.png"):
        (tmp_path / name).write_bytes(_png())
    (tmp_path / "notes.png").write_text("not an image, whatever its name")
    (tmp_path / "table.csv").write_text("a,b\n1,2\n")
    (tmp_path / "DICOMDIR").write_bytes(_dicom_bytes(make_gray(1)))
    write_dicom(tmp_path / "clip", make_gray(2))
    (tmp_path / "broken_link.png").symlink_to(tmp_path / "absent")
    names = [str(path.relative_to(tmp_path)) for path in find_media(tmp_path)]
    # What only its name calls media is listed too: reading says why it is none.
    assert names == ["broken_link.png", "clip", "frame2.png", "frame10.png", "notes.png", "sub/x.bin"]
    assert find_media(tmp_path / "table.csv") == [tmp_path / "table.csv"]
    with pytest.raises(MediaError, match="no such file or folder"):
        find_media(tmp_path / "absent")


def test_find_media_lists_what_cannot_be_opened(tmp_path, monkeypatch):
    for name in ("IM0001", "a.png"):
        (tmp_path / name).write_bytes(_png())

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    assert [path.name for path in find_media(tmp_path)] == ["IM0001", "a.png"]


def test_a_name_that_is_not_utf_8_can_be_written(tmp_path):
    path = tmp_path / os.fsdecode(b"\xd6\xd0 \xe4\xb8\xad.png")
    path.write_bytes(_png())
    assert read_clip(path).source == read_stills([path]).source == str(tmp_path / r"\udcd6\udcd0 中.png")
    path.write_bytes(b"")
    with pytest.raises(MediaError) as caught:
        read_clip(path)
    assert (
        caught.value.path == path
        and str(caught.value) == f"{tmp_path}/\\udcd6\\udcd0 中.png: is empty (0 bytes)"
    )


def test_frame_sizes_of_code_streams():
    frame = make_gray(1, 24, 40)[0]
    assert read_frame_size(encode(frame, "JPEG")) == (24, 40)
    assert read_frame_size(encode(frame, "JPEG", progressive=True)) == (24, 40)
    assert read_frame_size(encode(frame, "JPEG2000")) == (24, 40)
    assert read_frame_size(encode(frame, "PNG")) is None and read_frame_size(b"\xff\xd8\xff") is None
    # A size in a box before the code stream is not the size that a decoder will see.
    wrapped = encode(frame, "JPEG2000")
    at = wrapped.index(b"jp2c") - 4
    decoy = b"\0\0\0\x24uuid\xff\x4f\xff\x51" + (1).to_bytes(4, "big") * 6
    assert read_frame_size(wrapped[:at] + decoy + wrapped[at:]) == (24, 40)
    assert read_frame_size(b"junk" + encode(frame, "JPEG2000", no_jp2=True)) is None


def test_precincts_are_counted_in_every_header_that_sets_them():
    frame = make_gray(1, 256, 512)[0]
    plain = encode(frame, "JPEG2000", no_jp2=True)
    assert count_precincts(plain) == 0 and count_precincts(encode(frame, "JPEG")) == 0
    sized = encode(frame, "JPEG2000", no_jp2=True, precinct_size=(64, 64))
    # The finest resolution takes 4 x 8 precincts of 64 pixels, coarser ones as many or fewer.
    assert 32 <= count_precincts(sized) <= 6 * 5 * 9
    at = sized.index(b"\xff\x52") + 14
    small = sized[:at] + bytes(6) + sized[at + 6 :]
    assert count_precincts(small) >= 256 * 512
    # The same coding style as a COC of the first component, and in the header of the first tile part.
    style = small[at - 10 : at + 6]
    for marker, segment in ((b"\xff\x53", b"\0\1" + style[5:]), (b"\xff\x52", style)):
        setting = marker + (len(segment) + 2).to_bytes(2, "big") + segment
        sot = plain.index(b"\xff\x90")
        for place in (sot, sot + 12):
            assert count_precincts(plain[:place] + setting + plain[place:]) >= 256 * 512


def test_code_stream_in_a_jp2_file_reads():
    assert read_raw(get_testdata_file("GDCMJ2K_TextGBR.dcm", download=False)).frames.shape == (1, 400, 400)


def test_frame_rate_of_fractions(tmp_path):
    path = write_video(tmp_path / "a.mp4", make_gray(6), "mpeg4", rate=Fraction(30000, 1001))
    assert read_raw(path).fps == pytest.approx(29.97, rel=1e-3)
