"""Reading the real data sets under DILBERT_DATA_DIR: every file of them, and none of its tissue lost."""

import os
from pathlib import Path

import numpy as np
import pytest
from pydicom.data import get_testdata_file
from scipy import ndimage

from dilbert_jax.media import find_media, read_clip
from dilbert_jax.media.sector import blank_outside

pytestmark = pytest.mark.real_data
ROOT = Path(os.environ.get("DILBERT_DATA_DIR", "/nonexistent"))
needs_data = pytest.mark.skipif(not ROOT.is_dir(), reason="DILBERT_DATA_DIR is unset")


def lost_share(frames, blanked):
    """Share of clearly textured matter, neither dark nor flat, that blanking removed; text counts too."""
    brightest = frames.max(0).astype(np.float32)
    level = ndimage.uniform_filter(brightest, 15)
    variance = ndimage.uniform_filter(brightest**2, 15) - level**2
    tissue = (level > 24) & (variance > 9)
    return (tissue & (frames != blanked).any(0)).sum() / max(1, tissue.sum())


@pytest.mark.slow  # preparing the set, which the quick tests do, reads every clip too
@needs_data
def test_every_pocus_clip_reads_and_keeps_its_tissue(capfd):
    paths = find_media(ROOT / "pocus" / "data" / "pocus_videos")
    kinds = {}
    for path in paths:
        kinds[path.suffix.lower()] = kinds.get(path.suffix.lower(), 0) + 1
        raw = read_clip(path, blank_outside_sector=False)
        blanked, region = blank_outside(raw.frames)
        assert raw.frames.dtype == np.uint8 and len(raw.frames) > 10 and raw.fps and 5 < raw.fps < 60, path
        assert lost_share(raw.frames, blanked) < 0.02, path
        assert 0 <= region[0] < region[2] <= 1 and 0 <= region[1] < region[3] <= 1, path
        few = read_clip(path, max_frames=4, blank_outside_sector=False)
        assert few.frame_index[0] == 0 and few.frame_index[-1] == len(raw.frames) - 1, path
        np.testing.assert_array_equal(few.frames, raw.frames[list(few.frame_index)])
    assert kinds == {".mp4": 33, ".avi": 21, ".mpeg": 16, ".gif": 3, ".mov": 2}
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err == ""


@needs_data
@pytest.mark.parametrize(
    ("folder", "count", "limit"),
    [
        ("pocus/data/pocus_images", 12, 0.02),
        ("busi", 341, 0.02),
        ("usss/abdominal_US/abdominal_US/RUS/images", 420, 0.02),
        ("usss/abdominal_US/abdominal_US/AUS/images", 18, 0.02),
        ("kmve/Data", 839, 0.15),
    ],
)
@pytest.mark.parametrize("every", [25, pytest.param(1, marks=pytest.mark.slow)])
def test_every_still_reads_and_keeps_its_tissue(folder, count, limit, every):
    paths = find_media(ROOT / folder)
    assert len(paths) == count
    paths = paths[::every]
    shares = {}
    for path in paths:
        raw = read_clip(path, blank_outside_sector=False)
        assert raw.frames.dtype == np.uint8 and len(raw.frames) == 1 and raw.fps is None
        if "mask" not in path.name:
            shares[path] = lost_share(raw.frames, blank_outside(raw.frames)[0])
    worst = max(shares, key=lambda path: shares[path])
    assert shares[worst] < limit, f"{worst} loses {shares[worst]:.3f}"


def test_sonosite_cine_is_calibrated_and_its_overlay_blanked():
    path = get_testdata_file("color3d_jpeg_baseline.dcm", download=False)
    if path is None:
        pytest.skip("pydicom-data is not installed")
    result = read_clip(path)
    assert result.frames.shape == (120, 480, 640)
    assert result.fps == pytest.approx(30, rel=1e-3)
    assert result.pixel_spacing_mm == pytest.approx((0.5105, 0.5105), rel=1e-3)
    assert result.region == pytest.approx((31 / 480, 84 / 640, 415 / 480, 596 / 640))
    assert not result.frames[:, :31].any() and not result.frames[:, :, :84].any()
    assert result.frames[:, 60:400, 200:450].mean() > 10
