"""KMVE: Chinese hospital reports of thyroid, breast and liver with two stills each."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from dilbert_jax.data.builder import UltrasoundBuilder
from dilbert_jax.data.grouping import merge_groups
from dilbert_jax.data.reading import describe_folder, find_root, hash_file, read_for_storage, resolve_inside
from dilbert_jax.data.record import Record, StudyEntry
from dilbert_jax.data.weak_labels import label_report

# Index file, image folder, organ.
PARTS = (
    ("new_Thyroid2.json", "Thyroid_report", "thyroid"),
    ("new_Mammary2.json", "Mammary_report", "breast"),
    ("new_Liver2.json", "Liver_report", "liver"),
)
OFFICIAL_SPLITS = {"train": "train", "val": "test", "test": "test"}


class Builder(UltrasoundBuilder):
    """One study per report; the official validation part is the test split, train is cut further."""

    RELEASE_NOTES: ClassVar[dict[str, str]] = {
        **UltrasoundBuilder.RELEASE_NOTES,
        "1.1.0": "Weak labels: normal only where the report says so.",
    }
    READS_REPORTS: ClassVar[bool] = True
    TITLE: ClassVar[str] = "KMVE (Chinese ultrasound reports)"
    SOURCE: ClassVar[str] = (
        "Li et al., ultrasound report generation; github.com/LijunRio/Ultrasound-Report-Generation"
    )
    LICENCE: ClassVar[str] = "none stated for the data: research only, do not redistribute"
    LAYOUT: ClassVar[str] = (
        "Data/new_{Thyroid,Mammary,Liver}2.json and Data/{Thyroid,Mammary,Liver}_report/<uid>_1.jpeg"
    )

    def _studies(self, manual_dir: Path | None) -> Iterator[StudyEntry]:
        assert manual_dir is not None
        root = find_root(manual_dir, ("Data", "."), tuple(index for index, _, _ in PARTS))
        if root is None:
            raise self.layout_error(describe_folder(manual_dir))
        entries = []
        for index, folder, organ in PARTS:
            if not (root / index).is_file():
                continue  # one organ alone is a valid copy
            for row in read_index(root / index):
                entry = self._index_row(row, root, index, folder, organ)
                if entry is not None:
                    entries.append(entry)
        yield from self._group(entries, root)

    def _index_row(
        self, row: dict[str, Any], root: Path, index: str, folder: str, organ: str
    ) -> tuple[str, str, list[Path], dict[str, Any], str] | None:
        source = f"{index} uid {row.get('uid')}"
        problem = check_row(row)
        if problem:
            self.skip(source, problem)
            return None
        try:
            paths = [resolve_inside(root / folder, name) for name in dict.fromkeys(row["image_path"])]
        except ValueError as error:
            self.skip(source, str(error))
            return None
        if not all(path.is_file() for path in paths):
            self.skip(source, "image absent from this copy", known_gap=True)
            return None
        return f"{organ}_{row['uid']}", source, paths, row, organ

    def _group(self, entries: list[Any], root: Path) -> Iterator[StudyEntry]:
        """Studies that share a uid or an identical image file form a group, and stay on the test side."""
        owner: dict[str, str] = {}
        pairs = []
        for study_id, _, paths, row, _ in entries:
            for key in (f"uid {row['uid']}", *(hash_file(path) for path in paths)):
                pairs.append((study_id, owner.setdefault(key, study_id)))
        groups = merge_groups([entry[0] for entry in entries], pairs)
        tested = {groups[e[0]] for e in entries if OFFICIAL_SPLITS[e[3]["split"]] == "test"}
        for study_id, source, paths, row, organ in entries:
            split = OFFICIAL_SPLITS[row["split"]]
            if split == "train" and groups[study_id] in tested:
                self.skip(
                    source, "training report that shares an image with the official val part", known_gap=True
                )
                continue
            condition, findings = label_report(row["finding"], "zh", organ, self.graph)
            record = {
                "study_id": study_id,
                "group_id": f"study_{groups[study_id]}",
                "organ": organ,
                "condition": condition,
                "findings": findings,
                "report": row["finding"].strip(),
                "language": "zh",
                "report_is_synthetic": False,
                "official_split": split,
                "source": ";".join(path.relative_to(root).as_posix() for path in paths),
            }
            yield StudyEntry(
                study_id=study_id,
                group_id=record["group_id"],
                stratum=f"{organ} {condition}",
                source=source,
                official_split=split,
                read=lambda paths=paths, record=record: read_study(paths, record),  # type: ignore[misc]
            )


def read_index(path: Path) -> list[dict[str, Any]]:
    """All rows of an index file (UTF-8, with or without byte order mark), of every part.

    Raises:
      ValueError: not JSON, or not an object of lists.
    """
    try:
        parts = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid UTF-8 JSON ({error})") from None
    if not isinstance(parts, dict) or not all(isinstance(rows, list) for rows in parts.values()):
        raise ValueError(f"{path}: expected an object with lists 'train', 'val' and 'test'")
    return [row if isinstance(row, dict) else {} for rows in parts.values() for row in rows]


def check_row(row: dict[str, Any]) -> str:
    """What is wrong with a row of the index, or ""."""
    if not isinstance(row.get("uid"), (int, str)):
        return "field 'uid' is absent"
    if not isinstance(row.get("finding"), str) or not row["finding"].strip():
        return "field 'finding' holds no text"
    paths = row.get("image_path")
    if not isinstance(paths, list) or not paths or not all(isinstance(p, str) for p in paths):
        return "field 'image_path' is no list of file names"
    if row.get("split") not in OFFICIAL_SPLITS:
        return f"field 'split' is {row.get('split')!r}; expected one of {sorted(OFFICIAL_SPLITS)}"
    return ""


def read_study(paths: list[Path], record: dict[str, Any]) -> Record:
    """Reads the stills of a report as one sequence (one frame where the report lists an image twice)."""
    clip = read_for_storage(paths)
    return Record(frames=clip.frames, decoder=clip.decoder, kept_whole=not clip.blanked, **record)
