"""CLUST: liver cines under free breathing with tracked vessel landmarks (2-D part)."""

from __future__ import annotations

import csv
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np

from dilbert_jax.data.builder import UltrasoundBuilder
from dilbert_jax.data.masks import describe_place
from dilbert_jax.data.reading import MAX_STORED_FRAMES, describe_folder, find_root, fit_for_storage
from dilbert_jax.data.record import Record, Region, StudyEntry
from dilbert_jax.media import read_stills

BOX_SHARE = 0.08  # side of a landmark's box over the shorter side of the frame
MOVES_MM = 3.0
MOVES_SHARE = 0.015  # of the frame's height, where uncalibrated


@dataclasses.dataclass(frozen=True)
class Landmark:
    """One tracked vessel: source frame number (1-based) -> (x, y) in pixels."""

    file: str
    points: dict[int, tuple[float, float]]


class Builder(UltrasoundBuilder):
    """One study per sequence: the 128 consecutive frames with most annotations; groups are subjects."""

    TITLE: ClassVar[str] = "CLUST 2015 (challenge on liver ultrasound tracking), 2-D"
    SOURCE: ClassVar[str] = "De Luca et al., Medical Physics 45(11), 2018; clust.ethz.ch"
    LICENCE: ClassVar[str] = "on registration with the challenge; its rules forbid passing the data on"
    LAYOUT: ClassVar[str] = (
        "TrainingSet/2D/<SEQ>/Data/00001.png and TrainingSet/2D/<SEQ>/Annotation/<SEQ>_1.txt"
    )

    def _studies(self, manual_dir: Path | None) -> Iterator[StudyEntry]:
        assert manual_dir is not None
        root = find_root(manual_dir, ("TrainingSet", "Training", "."), ("2D",))
        if root is None:
            raise self.layout_error(describe_folder(manual_dir))
        spacings = read_resolutions(root)
        for folder in sorted(p for p in (root / "2D").iterdir() if p.is_dir()):
            frames = list_frames(folder / "Data")
            if not frames:
                self.skip(folder.name, "sequence without numbered images in Data/")
                continue
            yield StudyEntry(
                study_id=folder.name.lower(),
                group_id=find_subject(folder.name),
                stratum=folder.name.split("-")[0].lower(),
                source=folder.relative_to(root).as_posix(),
                read=lambda folder=folder, frames=frames: read_study(  # type: ignore[misc]
                    folder, frames, spacings.get(folder.name.lower()), root
                ),
            )


def find_subject(sequence: str) -> str:
    """ "ETH-01-2" is the second sequence of subject "eth-01"."""
    return "-".join(sequence.lower().split("-")[:2])


def list_frames(folder: Path) -> dict[int, Path]:
    """Images by the number in their name (4 or 5 digits, or any other count).

    Raises:
      ValueError: two files with one number.
    """
    frames: dict[int, Path] = {}
    for path in sorted(folder.glob("*")):
        match = re.fullmatch(r"\D*?(\d+)\.(?:png|jpe?g|bmp)", path.name, re.IGNORECASE)
        if match is None:
            continue
        number = int(match[1])
        if number in frames:
            raise ValueError(f"{folder}: {frames[number].name} and {path.name} both are frame {number}")
        frames[number] = path
    return dict(sorted(frames.items()))


def read_resolutions(root: Path) -> dict[str, tuple[float, float]]:
    """(row, column) mm per pixel by sequence, from resolution.csv (scan, res_x, res_y) where there is one.

    Raises:
      ValueError: a line that is not a name and two positive numbers, with its number.
    """
    for path in (root / "resolution.csv", root / "2D" / "resolution.csv", root.parent / "resolution.csv"):
        if not path.is_file():
            continue
        spacings = {}
        with path.open(encoding="utf-8-sig", newline="") as file:
            for number, row in enumerate(csv.reader(file), start=1):
                if not row or (number == 1 and row[0].strip().lower() == "scan"):
                    continue
                try:
                    name, x, y = row[0].strip().lower(), float(row[1]), float(row[2])
                    valid = 0 < x < 10 and 0 < y < 10
                except (IndexError, ValueError):
                    valid = False
                if not valid:
                    raise ValueError(
                        f"{path} line {number}: {row}; expected scan,res_x,res_y in mm per pixel"
                    )
                spacings[name] = (y, x)
        return spacings
    return {}


def read_landmark(path: Path) -> Landmark:
    """Reads an annotation file: lines "frame x y" separated by tabs, spaces or commas, no header.

    Raises:
      ValueError: naming file and line.
    """
    points: dict[int, tuple[float, float]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
        if not line.strip():
            continue
        fields = [f for f in re.split(r"[\s,;]+", line.strip()) if f]
        try:
            frame, x, y = (float(f) for f in fields)
            if frame != int(frame) or not np.isfinite([x, y]).all():
                raise ValueError
        except ValueError:
            raise ValueError(f"{path.name} line {number}: {line.strip()!r}; expected 'frame x y'") from None
        points[int(frame)] = (x, y)
    return Landmark(path.name, points)


def choose_window(numbers: list[int], landmarks: list[Landmark]) -> list[int]:
    """The first run of up to 128 consecutive frames that holds most annotations.

    Consecutive, since landmarks are tracked: frames picked evenly from thousands would lose the motion.
    """
    weight = {n: sum(n in landmark.points for landmark in landmarks) for n in numbers}
    best, best_weight = numbers[:MAX_STORED_FRAMES], -1
    for start in range(max(1, len(numbers) - MAX_STORED_FRAMES + 1)):
        window = numbers[start : start + MAX_STORED_FRAMES]
        total = sum(weight[n] for n in window)
        if total > best_weight:
            best, best_weight = window, total
    return best


def read_study(
    folder: Path, frames: dict[int, Path], spacing: tuple[float, float] | None, root: Path
) -> Record:
    """Reads a window of a sequence; each landmark gives a box of fixed size in the frames that state it."""
    landmarks = [read_landmark(p) for p in sorted((folder / "Annotation").glob("*.txt"))]
    for landmark in landmarks:
        beyond = sorted(landmark.points.keys() - frames.keys())
        if beyond:
            raise ValueError(f"{landmark.file}: frame {beyond[0]} has no image in Data/")
    window = choose_window(list(frames), landmarks)
    clip = read_stills([frames[n] for n in window])
    height, width = clip.frames.shape[1:]
    stored = fit_for_storage(dataclasses.replace(clip, pixel_spacing_mm=spacing or clip.pixel_spacing_mm))
    regions, moves = [], []
    for landmark in landmarks:
        points = [(i, *landmark.points[n]) for i, n in enumerate(window) if n in landmark.points]
        for i, x, y in points:
            if not (0 <= x <= width and 0 <= y <= height):
                raise ValueError(
                    f"{landmark.file}: frame {window[i]} has ({x:g}, {y:g}), "
                    f"outside the {height} x {width} image"
                )
            regions.append(Region(i, box_around(x, y, height, width), "vessel"))
        if points:
            depths = [y for _, _, y in points]
            moves.append(max(depths) - min(depths))
    travel = max(moves, default=0.0)
    travel_mm = travel * spacing[0] if spacing else None
    moving = travel_mm >= MOVES_MM if travel_mm is not None else travel >= MOVES_SHARE * height
    return Record(
        study_id=folder.name.lower(),
        group_id=find_subject(folder.name),
        frames=stored.frames,
        pixel_spacing_mm=stored.pixel_spacing_mm,
        organ="liver",
        condition="",
        findings=("respiratory_motion",) if moving else (),
        report=compose_report(regions, len(moves), travel_mm, moving),
        language="en",
        report_is_synthetic=True,
        regions=tuple(regions),
        source=(folder / "Data").relative_to(root).as_posix() + f";frames {window[0]}-{window[-1]}",
        decoder=stored.decoder,
        kept_whole=not stored.blanked,
    )


def box_around(x: float, y: float, height: int, width: int) -> tuple[float, float, float, float]:
    """A square around a point, moved inside the frame: (ymin, xmin, ymax, xmax) in [0, 1]."""
    side = BOX_SHARE * min(height, width)
    top = min(max(y - side / 2, 0.0), height - side)
    left = min(max(x - side / 2, 0.0), width - side)
    return (top / height, left / width, (top + side) / height, (left + side) / width)


def compose_report(regions: list[Region], count: int, travel_mm: float | None, moving: bool) -> str:
    """Names the tracked vessels, their place and how far they travel."""
    sentences = ["Liver ultrasound during free breathing."]
    if regions:
        place = describe_place(regions[0].box)
        sentences.append(
            f"A vessel is seen in the {place} part of the image."
            if count == 1
            else f"{count} vessels are seen, the first in the {place} part of the image."
        )
    if moving:
        distance = f" over {travel_mm:.0f} mm" if travel_mm is not None else ""
        sentences.append(f"Respiratory motion{distance}.")
    return " ".join(sentences)
