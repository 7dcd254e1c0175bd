"""How the named entities of an annotation match the clip's frames and regions (the paper's Figures 9 and
10)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, PathPatch, Rectangle
from matplotlib.path import Path

from dilbert_jax.evaluation.figures import INK, MUTED, display_name, encode_figure, figure_style

ENTITY_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#a3507f", "#b07c00", "#3c8fc4")
MAX_LINE_POINTS = 6.0
MIN_SCORE = 0.05  # below, a line is thinner than print holds


def entity_frame_graph(
    annotation: Mapping[str, Any],
    frames: np.ndarray,
    *,
    entities: Sequence[str] | None = None,
    max_entities: int = 4,
    max_frames: int = 10,
    language: str = "en",
) -> bytes:
    """Draws which frames associate with selected entities: thumbnails joined to entities, line width by
    score.

    Args:
      annotation: as docs/annotation_schema.md; its `frame_index` counts in `frames`.
      frames: uint8 [T, H, W], the annotated clip.
      entities: concept ids to draw; by default those that match a drawn frame best.
      max_entities: how many by default.
      max_frames: how many of the frames with a score are drawn, evenly spaced.
      language: of the names, "en" or "zh" (English where no installed font has the characters).

    Returns:
      PNG.

    Raises:
      ValueError: an unknown entity, or a frame number outside the clip.
    """
    numbers = list(annotation["frame_index"])
    check_frames(numbers, frames)
    kept = np.unique(np.linspace(0, len(numbers) - 1, min(max_frames, len(numbers))).round().astype(int))
    candidates = select_entities(annotation, entities)
    best = {e["id"]: max((e["frame_scores"][i] for i in kept), default=0.0) for e in candidates}
    chosen = candidates if entities is not None else best_matched(candidates, best, max_entities)
    width, height = 9.0, 3.5
    with mpl.rc_context(figure_style()):
        figure, axis = _canvas(width, height)
        step = width / len(kept)
        thumb_width = min(step * 0.9, 1.5)
        aspect = frames.shape[1] / frames.shape[2]
        thumb_width = min(thumb_width, 1.25 / aspect)
        thumb_height = thumb_width * aspect
        bottom = height - 0.3 - thumb_height
        centres = (np.arange(len(kept)) + 0.5) * step
        for centre, position in zip(centres, kept, strict=True):
            number = numbers[position]
            corner = (centre - thumb_width / 2, bottom + thumb_height)
            _image(axis, frames[number], corner, thumb_width, thumb_height)
            axis.text(
                centre, height - 0.06, f"frame {number}", ha="center", va="top", fontsize=7.5, color=MUTED
            )
        nodes = (np.arange(len(chosen)) + 0.5) * width / len(chosen)
        for node, entity, colour in zip(nodes, chosen, ENTITY_COLOURS * len(chosen), strict=False):
            for centre, position in zip(centres, kept, strict=True):
                score = entity["frame_scores"][position]
                _link(axis, (node, 0.52), (centre, bottom), score, colour, vertical=True)
            box_width = min(2.1, width / len(chosen) - 0.15)
            _node(axis, (node, 0.3), entity, best[entity["id"]], colour, language, box_width)
        _legend(axis, (width, 0.0))
        return encode_figure(figure)


def entity_region_figure(
    annotation: Mapping[str, Any],
    frames: np.ndarray,
    *,
    frame: int | None = None,
    entities: Sequence[str] | None = None,
    max_entities: int = 6,
    max_regions: int = 6,
    language: str = "en",
) -> bytes:
    """Draws one frame with its regions beside the entities, joined by lines whose width is the match score.

    Args:
      annotation: as docs/annotation_schema.md.
      frames: uint8 [T, H, W], the annotated clip.
      frame: frame number; by default the one whose regions match the entities best.
      entities: concept ids to draw; by default those that match a drawn region best.
      max_entities: how many by default.
      max_regions: the best-matched regions of the frame that are drawn.
      language: of the names, "en" or "zh" (English where no installed font has the characters).

    Returns:
      PNG.

    Raises:
      ValueError: an unknown entity, a frame without regions or outside the clip.
    """
    candidates = select_entities(annotation, entities)
    regions = annotation["regions"]
    check_frames([r["frame"] for r in regions], frames)
    scores = np.asarray([e["region_scores"] for e in candidates], float)
    scores = scores.reshape(len(candidates), len(regions))
    if frame is None and regions:
        frame = regions[int(scores.max(0).argmax())]["frame"]
    shown = [i for i, r in enumerate(regions) if r["frame"] == frame]
    if not shown:
        raise ValueError(
            f"frame {frame} has no region; choose one of {sorted({r['frame'] for r in regions})}"
        )
    shown = sorted(sorted(shown, key=lambda i: -scores[:, i].max())[:max_regions])
    # After the frame: an entity that matches another frame's regions alone would stand here without a line.
    best = {e["id"]: float(row[shown].max()) for e, row in zip(candidates, scores, strict=True)}
    chosen = candidates if entities is not None else best_matched(candidates, best, max_entities)
    scores = scores[[candidates.index(e) for e in chosen]]
    width, height = 9.2, 3.6
    top = height - 0.25
    image_height = min(top - 0.1, 4.2 * frames.shape[1] / frames.shape[2])
    image_width = image_height * frames.shape[2] / frames.shape[1]
    with mpl.rc_context(figure_style()):
        figure, axis = _canvas(width, height)
        _image(axis, frames[frame], (0.0, top), image_width, image_height)
        axis.text(0, top + 0.05, f"frame {frame}", va="bottom", fontsize=7.5, color=MUTED)
        # The regions again as a column of crops: lines drawn across the frame would hide what they are about.
        slot = (top - 0.1) / len(shown)
        crop_x, crops = image_width + 0.75, {}
        corners: list[tuple[float, float]] = []
        for label, index in enumerate(shown, start=1):
            ymin, xmin, ymax, xmax = regions[index]["box"]
            colour = ENTITY_COLOURS[int(scores[:, index].argmax()) % len(ENTITY_COLOURS)]
            corner = (xmin * image_width, top - ymin * image_height)
            size = ((xmax - xmin) * image_width, (ymax - ymin) * image_height)
            axis.add_patch(
                Rectangle((corner[0], corner[1] - size[1]), *size, fill=False, ec=colour, lw=1.3, zorder=4)
            )
            taken = sum(np.allclose(corner, other, atol=0.1) for other in corners)
            corners.append(corner)
            _badge(
                axis, (corner[0] + 0.16 * taken, corner[1]), label, colour
            )  # beside that of a region around it
            crop = _crop(frames[frame], regions[index]["box"])
            scale = min((slot - 0.08) / size[1], 0.9 / size[0])
            crop_size = (size[0] * scale, size[1] * scale)
            middle = top - (label - 0.5) * slot
            crop_corner = (crop_x - crop_size[0] / 2, middle + crop_size[1] / 2)
            _image(axis, crop, crop_corner, *crop_size)
            _badge(axis, crop_corner, label, colour)
            crops[index] = (crop_x + crop_size[0] / 2 + 0.03, middle)
        node_width = 1.9
        node_x = width - node_width / 2
        ys = top - (np.arange(len(chosen)) + 0.5) * (top - 0.1) / len(chosen)
        for y, row, entity, colour in zip(ys, scores, chosen, ENTITY_COLOURS * len(chosen), strict=False):
            for index in shown:
                _link(axis, crops[index], (node_x - node_width / 2, y), row[index], colour)
            _node(axis, (node_x, y), entity, best[entity["id"]], colour, language, node_width)
        _legend(axis, (width, 0.0))
        return encode_figure(figure)


def select_entities(annotation: Mapping[str, Any], entities: Sequence[str] | None) -> list[Mapping[str, Any]]:
    """Entities of the annotation by id, in that order, or all of them.

    Raises:
      ValueError: an id that the annotation lacks, or no entity at all.
    """
    by_id = {e["id"]: e for e in annotation["entities"]}
    missing = [e for e in entities or () if e not in by_id]
    if missing:
        raise ValueError(f"the annotation has no entity {missing[0]!r}; it has {', '.join(by_id)}")
    chosen = [by_id[e] for e in (by_id if entities is None else entities)]
    if not chosen:
        raise ValueError("the annotation lists no entity, so there is no match to draw")
    return chosen


def best_matched(
    entities: Sequence[Mapping[str, Any]], best: Mapping[str, float], max_entities: int
) -> list[Mapping[str, Any]]:
    """The entities with the highest `best` (by id), best first, without those too weak for a line where any
    has one."""
    ranked = sorted(entities, key=lambda e: -best[e["id"]])[:max_entities]
    return [e for e in ranked if best[e["id"]] >= MIN_SCORE] or ranked


def check_frames(numbers: Sequence[int], frames: np.ndarray) -> None:
    """Raises `ValueError` when `frames` is no grayscale clip or lacks a frame that the annotation names."""
    if frames.ndim != 3 or frames.dtype != np.uint8:
        raise ValueError(f"frames are {frames.dtype} {frames.shape}; expected uint8 [T, H, W]")
    outside = [n for n in numbers if not 0 <= n < len(frames)]
    if outside:
        raise ValueError(
            f"the annotation names frame {max(outside)}, but the clip passed has {len(frames)} frames"
        )


def _canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure measured in inches, without axes."""
    figure = Figure(figsize=(width + 0.1, height + 0.1))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set_axis_off()
    axis.set(xlim=(-0.05, width + 0.05), ylim=(-0.05, height + 0.05), aspect="equal", autoscale_on=False)
    return figure, axis


def _image(axis: Axes, image: np.ndarray, corner: tuple[float, float], width: float, height: float) -> None:
    """Places an image by its upper left corner, in inches."""
    extent = (corner[0], corner[0] + width, corner[1] - height, corner[1])
    axis.imshow(image, cmap="gray", vmin=0, vmax=255, extent=extent, zorder=3)


def _crop(frame: np.ndarray, box: Sequence[float]) -> np.ndarray:
    """The pixels under a box, at least one."""
    rows, columns = frame.shape
    top, left = min(int(box[0] * rows), rows - 1), min(int(box[1] * columns), columns - 1)
    return frame[top : max(top + 1, round(box[2] * rows)), left : max(left + 1, round(box[3] * columns))]


def _badge(axis: Axes, corner: tuple[float, float], label: int, colour: str) -> None:
    """A region's number in its upper left corner."""
    style = {"boxstyle": "round,pad=0.18", "fc": colour, "ec": "none"}
    where = (corner[0] + 0.08, corner[1] - 0.09)
    axis.text(*where, str(label), color="white", fontsize=6.5, ha="center", va="center", bbox=style, zorder=6)


def _link(
    axis: Axes,
    start: tuple[float, float],
    end: tuple[float, float],
    score: float,
    colour: str,
    vertical: bool = False,
) -> None:
    if score < MIN_SCORE:
        return
    if vertical:
        middle = (start[1] + end[1]) / 2
        controls = [(start[0], middle), (end[0], middle)]
    else:
        middle = (start[0] + end[0]) / 2
        controls = [(middle, start[1]), (middle, end[1])]
    path = Path([start, *controls, end], [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4])
    axis.add_patch(
        PathPatch(
            path,
            fill=False,
            ec=colour,
            lw=MAX_LINE_POINTS * score,
            alpha=0.2 + 0.6 * score,
            zorder=2,
            capstyle="butt",
        )
    )


def _node(
    axis: Axes,
    centre: tuple[float, float],
    entity: Mapping[str, Any],
    score: float,
    colour: str,
    language: str,
    width: float,
) -> None:
    height = 0.4
    corner = (centre[0] - width / 2, centre[1] - height / 2)
    box = FancyBboxPatch(
        corner, width, height, boxstyle="round,pad=0,rounding_size=0.06", fc="white", ec=colour, lw=1.4
    )
    box.set_zorder(5)
    axis.add_patch(box)
    name = display_name(entity["id"], entity.get("name"), language)
    size = 8.5 if len(name) < 13 * width else 7.0
    axis.text(centre[0], centre[1] + 0.07, name, ha="center", va="center", fontsize=size, zorder=6, color=INK)
    note = f"{entity['type']} · {score:.2f}"
    axis.text(
        centre[0], centre[1] - 0.11, note, ha="center", va="center", fontsize=6.5, color=MUTED, zorder=6
    )


def _legend(axis: Axes, corner: tuple[float, float]) -> None:
    """Line widths of three scores."""
    x = corner[0] - 2.1
    axis.text(x, corner[1], "match score", fontsize=6.5, color=MUTED, va="center")
    for i, score in enumerate((0.25, 0.5, 1.0)):
        left = x + 0.72 + 0.48 * i
        axis.plot(
            [left, left + 0.18],
            [corner[1]] * 2,
            color=MUTED,
            lw=MAX_LINE_POINTS * score,
            solid_capstyle="butt",
        )
        axis.text(left + 0.22, corner[1], f"{score:g}", fontsize=6.5, color=MUTED, va="center")
