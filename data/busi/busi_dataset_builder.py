"""BUSI: breast ultrasound stills with lesion masks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np

from dilbert_jax.data.builder import UltrasoundBuilder
from dilbert_jax.data.grouping import group_near_duplicates, hash_image, merge_groups
from dilbert_jax.data.masks import Lesion, describe_place, measure_lesion, read_mask_image
from dilbert_jax.data.reading import describe_folder, find_root
from dilbert_jax.data.record import Record, Region, StudyEntry
from dilbert_jax.media import MediaError, read_clip

CONDITIONS = {"benign": "benign_lesion", "malignant": "malignant_lesion", "normal": "normal"}
_WORDS = {
    "round": "round",
    "oval": "oval",
    "irregular": "irregular",
    "anechoic": "anechoic",
    "hypoechoic": "hypoechoic",
    "isoechoic": "isoechoic",
    "hyperechoic": "hyperechoic",
}
_PHRASES = {
    "parallel_orientation": "parallel orientation",
    "taller_than_wide": "taller than wide",
    "posterior_enhancement": "posterior enhancement",
    "posterior_shadowing": "posterior shadowing",
}


class Builder(UltrasoundBuilder):
    """One study per image; groups are near-duplicates, since the source names no patients."""

    TITLE: ClassVar[str] = "BUSI (Breast Ultrasound Images)"
    SOURCE: ClassVar[str] = (
        "Al-Dhabyani et al., Data in Brief 28, 2020; https://scholar.cu.edu.eg/?q=afahmy/pages/dataset"
    )
    LICENCE: ClassVar[str] = "CC BY 4.0 for the article; none stated for the images: do not redistribute"
    LAYOUT: ClassVar[str] = (
        "Dataset_BUSI_with_GT/{benign,malignant,normal}/ with 'benign (1).png' and 'benign (1)_mask.png'"
    )

    def _studies(self, manual_dir: Path | None) -> Iterator[StudyEntry]:
        assert manual_dir is not None
        root = find_root(manual_dir, ("Dataset_BUSI_with_GT", "."), tuple(CONDITIONS))
        if root is None:
            raise self.layout_error(describe_folder(manual_dir))
        images, masks = self._list_files(root)
        if not images:
            raise self.layout_error(f"no image like 'benign (1).png' under {root.name}/")
        if not masks:
            raise self.layout_error(f"{len(images)} images and not one mask file ('... _mask.png')")
        for key in sorted(masks.keys() - images.keys()):
            self.skip(masks[key][0].name, "mask whose image is absent", known_gap=True)
        usable = self._hash_images(images, masks)
        names = [f"{label}_{number:04d}" for label, number in usable]
        pairs = group_near_duplicates(np.stack(list(usable.values()))) if usable else []
        groups = merge_groups(names, [(names[i], names[j]) for i, j in pairs])
        for name, key in zip(names, usable, strict=True):
            path = images[key]
            yield StudyEntry(
                study_id=name,
                group_id=f"duplicates_of_{groups[name]}",
                stratum=CONDITIONS[key[0]],
                source=path.relative_to(root).as_posix(),
                read=lambda name=name, key=key, path=path: read_study(  # type: ignore[misc]
                    name, f"duplicates_of_{groups[name]}", key[0], path, masks.get(key, []), root
                ),
            )

    def _list_files(
        self, root: Path
    ) -> tuple[dict[tuple[str, int], Path], dict[tuple[str, int], list[Path]]]:
        images: dict[tuple[str, int], Path] = {}
        masks: dict[tuple[str, int], list[Path]] = {}
        for label in CONDITIONS:
            for path in sorted((root / label).glob("*.[pP][nN][gG]")):
                match = re.fullmatch(rf"{label} \((\d+)\)(_mask(?:_\d+)?)?\.png", path.name, re.IGNORECASE)
                if match is None:
                    self.skip(path.name, f"file name is not like '{label} (1).png' or '{label} (1)_mask.png'")
                elif match[2]:
                    masks.setdefault((label, int(match[1])), []).append(path)
                else:
                    images[label, int(match[1])] = path
        return images, masks

    def _hash_images(
        self, images: dict[tuple[str, int], Path], masks: dict[tuple[str, int], list[Path]]
    ) -> dict[tuple[str, int], np.ndarray]:
        usable = {}
        for key, path in sorted(images.items()):
            if key[0] != "normal" and key not in masks:
                self.skip(path.name, "lesion image without a mask")
                continue
            try:
                usable[key] = hash_image(read_clip(path, blank_outside_sector=False).frames[0])
            except MediaError as error:
                self.skip(path.name, error.reason)
        return usable


def read_study(
    study_id: str, group_id: str, label: str, path: Path, mask_paths: list[Path], root: Path
) -> Record:
    """Reads one image with its masks; boxes, descriptors and the synthetic report come from the masks."""
    clip = read_clip(path)
    frame = clip.frames[0]
    masks = [read_mask_image(p, frame.shape, "L") > 127 for p in mask_paths]
    lesions: list[Lesion] = []
    if label == "normal":
        if any(mask.any() for mask in masks):
            raise ValueError(f"mask {mask_paths[0].name} of a normal image is not empty; check the folder")
    else:
        for mask, mask_path in zip(masks, mask_paths, strict=True):
            if not mask.any():
                raise ValueError(f"mask {mask_path.name} of a lesion image is empty")
            lesions.append(measure_lesion(frame, mask))
    lesions.sort(key=lambda lesion: -lesion.width_share)
    found = dict.fromkeys(d for lesion in lesions for d in lesion.descriptors)
    return Record(
        study_id=study_id,
        group_id=group_id,
        frames=clip.frames,
        organ="breast",
        condition=CONDITIONS[label],
        findings=("mass", *found) if lesions else (),
        report=compose_report(label, lesions),
        language="en",
        report_is_synthetic=True,
        regions=tuple(Region(0, lesion.box, "lesion") for lesion in lesions),
        source=";".join(p.relative_to(root).as_posix() for p in (path, *mask_paths)),
        decoder=clip.decoder,
        kept_whole=not clip.blanked,
    )


def compose_report(label: str, lesions: list[Lesion]) -> str:
    """A report in words of the measurements; the folder's label is its impression."""
    if not lesions:
        return "Breast ultrasound. Normal glandular tissue. No mass is seen. Impression: normal."
    sentences = ["Breast ultrasound."]
    if len(lesions) > 1:
        sentences.append(f"{len(lesions)} masses.")
    for lesion in lesions:
        words = [_WORDS[d] for d in lesion.descriptors if d in _WORDS]
        phrases = [_PHRASES[d] for d in lesion.descriptors if d in _PHRASES]
        sentence = f"{' '.join([*words, 'mass'])} in the {describe_place(lesion.box)} part of the image"
        sentence = sentence[0].upper() + sentence[1:]
        share = f"{max(1, round(100 * lesion.width_share))} % of the image wide"
        sentences.append(", ".join([sentence, share, *phrases]) + ".")
    sentences.append(f"Impression: {label} lesion.")
    return " ".join(sentences)
