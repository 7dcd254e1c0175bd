"""Boxes and augmentation: what moves with the pixels, and what stays as it was."""

import numpy as np
import pytest
from numpy_reference import iou_of_two

from dilbert_jax.augmentation import LEAST_VISIBLE, SMALLEST_CROP, augment
from dilbert_jax.boxes import box_iou

SIZE = 32


def test_overlap_equals_a_plain_loop(rng):
    low = rng.uniform(0, 0.7, (40, 2))
    boxes = np.concatenate([low, low + rng.uniform(0.05, 0.3, (40, 2))], -1)
    boxes[3] = 0.0  # an empty slot
    a, b = boxes[:25], boxes[10:]
    expected = [[iou_of_two(x, y) for y in b] for x in a]
    np.testing.assert_allclose(box_iou(a, b), expected, atol=1e-12)
    assert box_iou(a, b)[15, 5] == pytest.approx(1.0)


def test_augmentation_moves_boxes_and_sector_with_the_pixels():
    """A bright block in a dim sector stays where its box says, to half a pixel: places fall between pixels."""
    flipped = moved = enlarged = cut = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        low, side, extent = np.asarray([[4, 3], [22, 26], [9, 6]])
        corner = low + rng.integers(0, side - extent + 1)
        frames = np.zeros((3, SIZE, SIZE), np.uint8)
        frames[:, 4:26, 3:29] = 60
        frames[:, corner[0] : corner[0] + 9, corner[1] : corner[1] + 6] = 200
        boxes = np.concatenate([corner, corner + extent])[None].astype(np.float32) / SIZE
        sector = np.asarray([[4, 3, 26, 29]], np.float32) / SIZE
        before = boxes.copy()
        out, new, new_sector = augment(frames, boxes, sector, rng, mirror=True)
        np.testing.assert_array_equal(boxes, before)
        np.testing.assert_array_equal(out[0], out[2])  # the same for all frames
        assert out.dtype == np.uint8 and new.dtype == new_sector.dtype == np.float32
        for lit, box, atol in ((out[1] > 0, new_sector[0], 1e-6), (out[1] > 110, new[0], 0.5 / SIZE + 1e-6)):
            rows, columns = np.flatnonzero(lit.any(1)), np.flatnonzero(lit.any(0))
            painted = np.asarray([rows[0], columns[0], rows[-1] + 1, columns[-1] + 1]) / SIZE
            np.testing.assert_allclose(box, painted, atol=atol)
        height, width = (new[0, 2:] - new[0, :2]) * SIZE
        assert 0 < height <= 9 / SMALLEST_CROP + 1e-3 and 0 < width <= 6 / SMALLEST_CROP + 1e-3
        flipped += abs(new_sector[0, 1] - sector[0, 1]) > 0.06 + 1 / SIZE
        flipped += abs(new[0, 1] - before[0, 1]) > 0.2
        moved += new_sector[0, 0] != sector[0, 0]
        enlarged += height > 9.2
        cut += height < 8.8 or width < 5.8
    assert flipped > 50 and moved > 100 and enlarged > 50 and cut > 10


def test_a_sector_of_a_pixel_may_leave_the_canvas(rng):
    frames = np.full((2, SIZE, SIZE), 90, np.uint8)
    corner = np.asarray([[0.0, 0.0, 1 / SIZE, 1 / SIZE]])
    outcomes = {bool(augment(frames, corner, corner, rng, True)[0].any()) for _ in range(60)}
    assert outcomes == {True, False}


def test_a_box_that_is_all_but_cut_away_becomes_empty(rng):
    frames, sector = np.full((1, SIZE, SIZE), 90, np.uint8), np.asarray([[0.0, 0.0, 1.0, 1.0]])
    edge = np.asarray([[0.0, 0.3, 0.06, 0.6], [0.94, 0.3, 1.0, 0.6], [0.0, 0.0, 1.0, 1.0]])
    seen = np.stack([augment(frames, edge, sector, rng, False)[1] for _ in range(300)])
    size = np.prod(seen[..., 2:] - seen[..., :2], axis=-1)
    assert (size[:, :2] == 0).any(0).all() and not (size[:, 2] == 0).any()
    assert not ((size > 0) & (size < LEAST_VISIBLE * 0.06 * 0.3)).any()


def test_augmentation_repeats_pixels_and_mixes_none():
    """Rows and columns coded in the grey levels come out in order, each at most twice in a row."""
    code = np.arange(SIZE)[None, :] * 3 + 100
    frames = np.stack([np.broadcast_to(code.T, (SIZE, SIZE)), np.broadcast_to(code, (SIZE, SIZE))])
    whole, none = np.asarray([[0.0, 0.0, 1.0, 1.0]]), np.zeros((0, 4))
    for seed in range(30):
        out, _, sector = augment(frames.astype(np.uint8), none, whole, np.random.default_rng(seed), True)
        top, left, bottom, right = np.rint(sector[0] * SIZE).astype(int)
        by_row, by_column = out[:, top:bottom, left:right].astype(int)
        assert (by_row == by_row[:, :1]).all()  # one source row, one gain
        steps = np.diff(by_column, axis=1) * np.sign(by_column[0, -1] - by_column[0, 0])
        assert (steps >= 0).all()
        same = np.diff(by_column[np.argmin(by_column.max(1))]) == 0
        assert not (same[1:] & same[:-1]).any() and same.mean() < 0.15


def test_speckle_stays_as_coarse_and_as_strong(rng):
    """Fully developed speckle keeps its contrast and is not smoothed (bilinear zoom would correlate neighbours)."""
    frames = np.minimum(rng.rayleigh(40, (2, 64, 64)), 255).astype(np.uint8)
    whole, none = np.asarray([[0.0, 0.0, 1.0, 1.0]]), np.zeros((0, 4))
    for seed in range(20):
        out, _, sector = augment(frames, none, whole, np.random.default_rng(seed), True)
        top, left, bottom, right = np.rint(sector[0] * 64).astype(int)
        seen = out[:, top:bottom, left:right].astype(float)
        contrast = seen.std(axis=(0, 2)) / seen.mean(axis=(0, 2))  # of each depth; gamma changes it
        assert 0.75 * 0.52 < contrast.mean() < 1.3 * 0.52
        flat = seen - seen.mean(axis=(0, 2), keepdims=True)
        assert (flat[:, :, 1:] * flat[:, :, :-1]).mean() / flat.var() < 0.15


def test_the_gain_over_depth_is_smooth_and_the_same_along_a_row(rng):
    frames, whole = np.full((1, 64, 64), 120, np.uint8), np.asarray([[0.0, 0.0, 1.0, 1.0]])
    spread = []
    for _ in range(40):
        out, _, sector = augment(frames, np.zeros((0, 4)), whole, rng, True)
        top, left, bottom, right = np.rint(sector[0] * 64).astype(int)
        seen = out[0, top:bottom, left:right].astype(int)
        assert (seen == seen[:, :1]).all()
        assert np.abs(np.diff(seen[:, 0])).max() <= 4
        spread.append(np.ptp(seen[:, 0]) / seen.mean())
    assert np.median(spread) > 0.02 and max(spread) < 0.3


def test_augmentation_keeps_black_black_and_changes_the_gain(rng):
    frames = np.full((1, SIZE, SIZE), 100, np.uint8)
    levels = [
        augment(frames, np.zeros((0, 4)), np.asarray([[0, 0, 1, 1.0]]), rng, False)[0][0, 16, 16]
        for _ in range(50)
    ]
    assert min(levels) < 80 < 120 < max(levels)
    black, _, _ = augment(np.zeros_like(frames), np.zeros((0, 4)), np.asarray([[0, 0, 1, 1.0]]), rng, True)
    assert not black.any()
