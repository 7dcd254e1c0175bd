"""DICOM: pixel values, frame rate and calibration, and what of a screen is blanked."""

import numpy as np
import pydicom
import pytest
from media_samples import PATIENT, encode, make_dataset, make_gray, make_region, read_raw, write_dicom
from PIL import Image, ImageDraw, ImageFont
from pydicom.data import get_testdata_file
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

from dilbert_jax.media import MediaError, dicom, read_clip


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
