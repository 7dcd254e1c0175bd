"""De-identification: where the ultrasound image lies in the frame, and blanking of all else."""

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage
from scipy.spatial import ConvexHull, QhullError

from dilbert_jax.media.clip import WHOLE_IMAGE

_WORKING_SIZE = 256  # longest side of the grid for the search, in cells
_SAMPLED_FRAMES = 24
_MIN_SIDE = 48  # pixels; smaller images hold no room for text beside a sector
_DARKEST_BACKGROUND = 128  # a lighter flat area is saturated tissue
_MIN_BACKGROUND = 0.02  # of all pixels; with less flat background there is nothing to blank
_MIN_CONTRAST = 3  # grey levels inside speckle, between neighbouring cells
_MIN_OFFSET = 1.5  # grey levels between the mean of a cell and the background
_PANEL_OFFSET = 20  # grey levels of a control panel above the background; tissue is never exactly flat there
_LIGHTEST_PANEL = 160  # lighter flat areas may be saturated tissue
_TEXT_WINDOW = 7  # cells, about a line of text
_TEXT_DARK = (0.3, 0.97)  # share of background around strokes of text
_TEXT_BRIGHT = 60  # grey levels of the strokes above the background
_TEXT_STILL = 16  # grey levels; what changes more over the clip is no text
_OPENING = 0.035  # of the shorter side: lines of text are thinner than twice this
_EDGE = 5  # cells that the opening and the text window take off a tissue edge
_REACH = 24  # cells within which scattered echoes away from text belong to the tissue
_SMALL_OPENING = 4  # cells; an island of tissue beside the sector is thicker than twice this, text is not
_MAX_FLAT = 0.1  # of an island; colour bars and banners are flatter
_MAX_ISLAND = 0.02  # of the frame; banners and tables are larger
_MIN_PART = 0.1  # of the largest part: a second image of a split screen is larger, a logo smaller
_MIN_AREA = 0.08  # of the frame
_MAX_REGION = 0.95  # of the frame; a larger calibrated region is the screen, text and all
_MAX_OUTSIDE = 0.35  # of the echoes: more than this outside the sector means that it was not found


def blank_outside(
    frames: np.ndarray, regions: tuple[tuple[int, int, int, int], ...] = ()
) -> tuple[np.ndarray, tuple[float, float, float, float]]:
    """Set every pixel outside the calibrated regions, or else outside the detected scan sector, to 0.

    Regions that cover nearly the whole frame leave text beside the sector, which is then detected within them.
    Where no sector can be told from its surroundings the frames stay as they are: tissue must not be lost.

    Args:
        frames: uint8 [T, H, W].
        regions: calibrated pixel boxes (y0, x0, y1, x1) inside the frame; may be empty.

    Returns:
        Blanked frames uint8 [T, H, W], and the bounding box (ymin, xmin, ymax, xmax) in [0, 1] of the rest.
    """
    height, width = frames.shape[1:]
    keep = np.full((height, width), not regions)
    for y0, x0, y1, x1 in regions:
        keep[y0:y1, x0:x1] = True
    if keep.mean() > _MAX_REGION and (found := detect_sector(frames)) is not None:
        keep &= found
    rows, columns = np.flatnonzero(keep.any(1)), np.flatnonzero(keep.any(0))
    if keep.all():
        return frames, WHOLE_IMAGE
    ymin, ymax = float(rows[0] / height), float((rows[-1] + 1) / height)
    xmin, xmax = float(columns[0] / width), float((columns[-1] + 1) / width)
    return frames * keep.astype(np.uint8), (ymin, xmin, ymax, xmax)


def detect_sector(frames: np.ndarray) -> np.ndarray | None:
    """Find the scan sector of a clip: convex parts that hold echoes in at least one frame.

    Args:
        frames: uint8 [T, H, W].

    Returns:
        bool [H, W], True inside the sector; None if none stands out.
    """
    height, width = frames.shape[1:]
    if min(height, width) < _MIN_SIDE:
        return None
    sampled = frames[np.linspace(0, len(frames) - 1, min(len(frames), _SAMPLED_FRAMES)).round().astype(int)]
    screen = _find_background(sampled)
    if screen is None:
        return None
    background, panels = screen
    scale = min(1.0, _WORKING_SIZE / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    echoes, text = _find_echoes(sampled, background, size)
    # Closing takes the writing on a panel along with it.
    echoes &= ~_close(_shrink(panels.astype(np.float32), size) > 0.5, 2)
    tissue = _close(echoes & ~text, 3)
    scattered = echoes & ~_dilate(text, _EDGE)
    radius = max(2, round(_OPENING * min(size)))
    # The edge padding keeps tissue that a cropped frame cuts off.
    padded = np.pad(tissue, radius, mode="edge")
    opened = _open(padded, radius)[radius:-radius, radius:-radius]
    labels, count = ndimage.label(opened)
    if count == 0:
        return None
    areas = np.bincount(labels.ravel())[1:]
    keep = np.zeros(tissue.shape, bool)
    for label in np.flatnonzero(areas >= _MIN_PART * areas.max()) + 1:
        part = labels == label
        part = part | (_dilate(part, _EDGE) & echoes) | (_dilate(part, _REACH) & scattered)
        keep |= part
    solid = _open(tissue, _SMALL_OPENING) & scattered
    keep = _add_islands(keep, solid, _find_flat(sampled[0], background, size))
    # One hull around all parts, since a shadow or a cyst can split the tissue of one sector.
    hull = _fill_hull(keep)
    if hull is None:
        return None
    keep = _dilate(hull, 2)
    if keep.mean() < _MIN_AREA or (tissue & ~keep).sum() > _MAX_OUTSIDE * tissue.sum():
        return None
    full = Image.fromarray(keep.astype(np.uint8) * 255).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(full) > 64


def _add_islands(keep: np.ndarray, solid: np.ndarray, flat: np.ndarray) -> np.ndarray:
    """Add solid pieces near the hull: a diaphragm or bowel wall behind a shadow; no bars and banners."""
    hull = _fill_hull(keep)
    if hull is None:
        return keep
    labels, count = ndimage.label(solid)
    numbers = np.arange(count + 1)
    near = ndimage.mean(_dilate(hull, _REACH), labels, numbers) >= 0.5
    speckled = ndimage.mean(flat, labels, numbers) < _MAX_FLAT
    small = np.bincount(labels.ravel(), minlength=count + 1) < _MAX_ISLAND * labels.size
    return keep | (labels > 0) & (near & speckled & small)[labels]


def _find_flat(frame: np.ndarray, background: int, size: tuple[int, int]) -> np.ndarray:
    """Share of each cell that is even and lighter than the background, as drawings are, float32."""
    spread = ndimage.maximum_filter(frame, 3) - ndimage.minimum_filter(frame, 3)
    even = (spread <= 2) & (frame >= background + _PANEL_OFFSET)
    return _shrink(even.astype(np.float32), size)


def _find_background(sampled: np.ndarray) -> tuple[int, np.ndarray] | None:
    """The grey level of the flat screen around the sector, and the lighter panels on it (bool [H, W]).

    None if there is no flat area.
    """
    counts = np.zeros(256, np.int64)
    panels = np.ones(sampled.shape[1:], bool)
    looked_at = sampled[:: max(1, len(sampled) // 4)]
    for frame in looked_at:
        spread = ndimage.maximum_filter(frame, 3) - ndimage.minimum_filter(frame, 3)
        counts += np.bincount(frame[spread <= 1], minlength=256)
        panels &= (spread == 0) & (frame == looked_at[0])
    counts = counts[:_DARKEST_BACKGROUND]
    if counts.max() < _MIN_BACKGROUND * looked_at.size:
        return None
    background = int(counts.argmax())
    return background, panels & (looked_at[0] >= background + _PANEL_OFFSET) & (
        looked_at[0] < _LIGHTEST_PANEL
    )


def _find_echoes(
    sampled: np.ndarray, background: int, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Cells (bool) where some frame differs from the background, and those where it does so like text.

    Text is bright strokes on bare background that stay where they are.
    """
    shape = size[::-1]
    echoes, text = np.zeros(shape, bool), np.ones(shape, bool)
    darkest, brightest = np.full(shape, 255.0, np.float32), np.zeros(shape, np.float32)
    for frame in sampled:
        level = _shrink(frame.astype(np.float32), size)
        spread = ndimage.maximum_filter(level, 3) - ndimage.minimum_filter(level, 3)
        contrast = np.abs(level - background)
        echoes |= (spread >= _MIN_CONTRAST) & (contrast > 0) | (contrast >= _MIN_OFFSET)
        bare = np.abs(frame.astype(np.int16) - background) <= 2
        dark = ndimage.uniform_filter(_shrink(bare.astype(np.float32), size), _TEXT_WINDOW)
        above = ndimage.uniform_filter(np.maximum(level - background, 0), _TEXT_WINDOW)
        stroke = above / np.maximum(1 - dark, 0.01)
        text &= (dark >= _TEXT_DARK[0]) & (dark <= _TEXT_DARK[1]) & (stroke >= _TEXT_BRIGHT)
        darkest, brightest = np.minimum(darkest, level), np.maximum(brightest, level)
    return echoes, text & (brightest - darkest < _TEXT_STILL)


def _shrink(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX))


def _dilate(mask: np.ndarray, radius: int) -> np.ndarray:
    """By a disk, through distances: a large disk costs no more than a small one."""
    if not mask.any():  # there is nothing to be near to
        return mask
    return ndimage.distance_transform_edt(~mask) <= radius


def _erode(mask: np.ndarray, radius: int) -> np.ndarray:
    """By a disk; beyond the border nothing is set."""
    return ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1] > radius


def _open(mask: np.ndarray, radius: int) -> np.ndarray:
    return _dilate(_erode(mask, radius), radius)


def _close(mask: np.ndarray, radius: int) -> np.ndarray:
    padded = np.pad(mask, radius)
    return _erode(_dilate(padded, radius), radius)[radius:-radius, radius:-radius]


def _fill_hull(mask: np.ndarray) -> np.ndarray | None:
    """The filled convex hull of a mask, None if its points lie on a line."""
    points = np.argwhere(mask & ~ndimage.binary_erosion(mask))
    try:
        corners = points[ConvexHull(points).vertices]
    except (QhullError, ValueError):
        return None
    canvas = Image.new("1", mask.shape[::-1])
    ImageDraw.Draw(canvas).polygon([(int(x), int(y)) for y, x in corners], fill=1, outline=1)
    return np.asarray(canvas).copy()
