"""USSS: real (RUS) and simulated (AUS) abdominal ultrasound with organ masks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np

from dilbert_jax.data.builder import UltrasoundBuilder, hash_frames
from dilbert_jax.data.grouping import merge_groups
from dilbert_jax.data.masks import describe_place, find_part_boxes, read_mask_image
from dilbert_jax.data.reading import describe_folder, find_root
from dilbert_jax.data.record import Record, Region, StudyEntry
from dilbert_jax.media import MediaError, read_clip, read_stills

WINDOW = 8  # frames of a pseudo-cine
MIN_REGION_SHARE = 0.0008  # of the image: smaller parts are seams between two colours
MASK_COLOURS: dict[str, tuple[int, int, int]] = {
    "liver": (100, 0, 100),
    "kidney": (255, 255, 0),
    "pancreas": (0, 0, 255),
    "vessel": (255, 0, 0),
    "adrenal_gland": (0, 255, 255),
    "gallbladder": (0, 255, 0),
    "bone": (255, 255, 255),
    "spleen": (255, 0, 255),
}
BACKGROUND_COLOURS = ((0, 0, 0), (10, 10, 10))
ORGANS = ("liver", "kidney", "pancreas", "gallbladder", "spleen")
_NAMES = {"vessel": "vessel", "adrenal_gland": "adrenal gland", "bone": "bone"}


class Builder(UltrasoundBuilder):
    """RUS: windows of consecutive frames of a subject; AUS: single simulated images, grouped by CT."""

    TITLE: ClassVar[str] = "USSS (US simulation and segmentation)"
    SOURCE: ClassVar[str] = (
        "Vitale, Orlando, Iarussi, Larrabide, IJCARS 15, 2020; kaggle.com/ignaciorlando/ussimandsegm"
    )
    LICENCE: ClassVar[str] = "stated as unknown by the source: do not redistribute"
    LAYOUT: ClassVar[str] = "abdominal_US/abdominal_US/{RUS,AUS}/images/{train,test}/"

    def _studies(self, manual_dir: Path | None) -> Iterator[StudyEntry]:
        assert manual_dir is not None
        root = find_root(manual_dir, ("abdominal_US/abdominal_US", "abdominal_US", "."), ("RUS", "AUS"))
        if root is None:
            raise self.layout_error(describe_folder(manual_dir))
        images = self._list_images(root)
        if not images:
            raise self.layout_error("no image like RUS/images/train/c1.jpg or AUS/images/train/ct2-1.png")
        groups = self._drop_and_merge(images, root)
        self._report_lone_masks(root)
        yield from _window_real(images, groups, root)
        yield from _single_simulated(images, groups, root)

    def _list_images(self, root: Path) -> dict[Path, tuple[str, str, str, int]]:
        """Every image: (kind, split, subject or CT, number)."""
        images = {}
        for kind, pattern in (("RUS", r"([a-z])(\d+)"), ("AUS", r"(ct\d+)-(\d+)")):
            for split in ("train", "test"):
                for path in sorted((root / kind / "images" / split).glob("*")):
                    match = re.fullmatch(pattern + r"\.(?:jpe?g|png)", path.name, re.IGNORECASE)
                    if match is None:
                        self.skip(
                            path.relative_to(root).as_posix(), f"file name is not that of a {kind} image"
                        )
                        continue
                    images[path] = (kind, split, match[1].lower(), int(match[2]))
        return images

    def _drop_and_merge(self, images: dict[Path, tuple[str, str, str, int]], root: Path) -> dict[str, str]:
        """Drops what crosses the official splits and unreadable files; group of every subject or CT."""
        test_groups = {f"{kind}_{who}".lower() for kind, split, who, _ in images.values() if split == "test"}
        first_with: dict[str, Path] = {}
        pairs = []
        # Test images first: of a duplicate pair across the splits the training image goes.
        for path in sorted(images, key=lambda p: (images[p][1] != "test", p)):
            kind, split, who, _ = images[path]
            name = f"{kind}_{who}".lower()
            source = path.relative_to(root).as_posix()
            if split == "train" and name in test_groups:
                self.skip(source, "training image of a subject of the official test split", known_gap=True)
                del images[path]
                continue
            try:
                key = hash_frames(read_clip(path, blank_outside_sector=False).frames)
            except MediaError as error:
                self.skip(source, error.reason)
                del images[path]
                continue
            other = first_with.setdefault(key, path)
            if other is path:
                continue
            if images[other][1] != split:
                self.skip(
                    source, "training image identical to one of the official test split", known_gap=True
                )
                del images[path]
            else:
                pairs.append((name, f"{images[other][0]}_{images[other][2]}".lower()))
        names = sorted({f"{kind}_{who}".lower() for kind, _, who, _ in images.values()})
        return merge_groups(names, pairs)

    def _report_lone_masks(self, root: Path) -> None:
        for path in sorted(root.glob("*/annotations/*/*.png")):
            if _image_of_mask(path) is None:
                self.skip(path.relative_to(root).as_posix(), "mask whose image is absent", known_gap=True)


def _window_real(
    images: dict[Path, tuple[str, str, str, int]], groups: dict[str, str], root: Path
) -> Iterator[StudyEntry]:
    """Windows of up to WINDOW consecutive numbers of one subject; a gap in the numbers ends a window."""
    frames = sorted(
        (who, split, number, path) for path, (kind, split, who, number) in images.items() if kind == "RUS"
    )
    window: list[tuple[str, str, int, Path]] = []
    for frame in frames:
        follows = window and frame[:2] == window[-1][:2] and frame[2] == window[-1][2] + 1
        if window and (not follows or len(window) == WINDOW):
            yield _make_entry("rus", window, groups, root)
            window = []
        window.append(frame)
    if window:
        yield _make_entry("rus", window, groups, root)


def _single_simulated(
    images: dict[Path, tuple[str, str, str, int]], groups: dict[str, str], root: Path
) -> Iterator[StudyEntry]:
    for path, (kind, split, who, number) in sorted(images.items()):
        if kind == "AUS":
            yield _make_entry("aus", [(who, split, number, path)], groups, root)


def _make_entry(
    kind: str, window: list[tuple[str, str, int, Path]], groups: dict[str, str], root: Path
) -> StudyEntry:
    who, split, number, first = window[0]
    study_id = f"{kind}_{who}_{number:04d}"
    group_id = groups[f"{kind}_{who}"]
    paths = [path for _, _, _, path in window]
    return StudyEntry(
        study_id=study_id,
        group_id=group_id,
        stratum=kind,
        source=first.relative_to(root).as_posix(),
        read=lambda: read_study(study_id, group_id, split, paths, root),
        official_split=split,
    )


def _image_of_mask(mask_path: Path) -> Path | None:
    folder = mask_path.parent.parent.parent / "images" / mask_path.parent.name
    for suffix in (".jpg", ".png", ".jpeg"):
        if (folder / (mask_path.stem + suffix)).exists():
            return folder / (mask_path.stem + suffix)
    return None


def label_colours(mask: np.ndarray) -> np.ndarray:
    """Label of the nearest colour of every pixel.

    Args:
      mask: uint8 [H, W, 3]; edges are anti-aliased and some colours are off by a little.

    Returns:
      uint8 [H, W]: 0 background, i + 1 the i-th of MASK_COLOURS.
    """
    palette = np.asarray([*MASK_COLOURS.values(), *BACKGROUND_COLOURS], np.int32)
    numbers = np.asarray([*range(1, len(MASK_COLOURS) + 1), 0, 0], np.uint8)
    colours, inverse = np.unique(mask.reshape(-1, 3), axis=0, return_inverse=True)
    distance = ((colours[:, None, :].astype(np.int32) - palette[None]) ** 2).sum(-1)
    return numbers[distance.argmin(1)][inverse].reshape(mask.shape[:2])


def read_study(study_id: str, group_id: str, split: str, paths: list[Path], root: Path) -> Record:
    """Reads a window; regions come from the masks that its frames have, the organ is the largest of them."""
    clip = read_stills(paths)
    regions: list[Region] = []
    areas: dict[str, int] = {}
    sources = [path.relative_to(root).as_posix() for path in paths]
    for frame, path in enumerate(paths):
        mask_path = path.parent.parent.parent / "annotations" / path.parent.name / f"{path.stem}.png"
        if not mask_path.is_file():
            continue
        sources.append(mask_path.relative_to(root).as_posix())
        labels = label_colours(read_mask_image(mask_path, clip.frames.shape[1:]))
        for number, label in enumerate(MASK_COLOURS, start=1):
            part = labels == number
            boxes = find_part_boxes(part, max(1, round(MIN_REGION_SHARE * part.size)))
            regions += [Region(frame, box, label) for box in boxes]
            if boxes and label in ORGANS:
                areas[label] = areas.get(label, 0) + int(part.sum())
    return Record(
        study_id=study_id,
        group_id=group_id,
        frames=clip.frames,
        organ=max(areas, key=lambda organ: (areas[organ], organ)) if areas else "abdomen",
        condition="",
        report=compose_report(regions),
        language="en",
        report_is_synthetic=True,
        regions=tuple(regions),
        official_split=split,
        source=";".join(sources),
        decoder=clip.decoder,
        kept_whole=not clip.blanked,
    )


def compose_report(regions: list[Region]) -> str:
    """Names what the masks show and where its largest part lies."""
    if not regions:
        return "Abdominal ultrasound."
    sentences = ["Abdominal ultrasound."]
    for label in MASK_COLOURS:
        found = [r.box for r in regions if r.label == label]
        if found:
            box = max(found, key=lambda b: (b[2] - b[0]) * (b[3] - b[1]))
            name = _NAMES.get(label, label)
            sentences.append(f"The {name} is seen in the {describe_place(box)} part of the image.")
    return " ".join(sentences)
