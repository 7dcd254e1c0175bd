"""POCUS: lung ultrasound cines and stills with labels and clinicians' comments."""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from dilbert_jax.data.builder import UltrasoundBuilder
from dilbert_jax.data.reading import describe_folder, find_root, read_for_storage
from dilbert_jax.data.record import Record, StudyEntry

METADATA = "dataset_metadata.csv"
CONDITIONS = {
    "regular": "normal",
    "bacterial pneumonia": "bacterial_pneumonia",
    "viral pneumonia": "viral_pneumonia",
    "covid-19": "covid19",
}
FINDING_COLUMNS = {
    "Effusion": "effusion",
    "Consolidations": "consolidation",
    "B-lines": "b_lines",
    "A-lines": "a_lines",
    "Pleural line irregularities": "pleural_irregularity",
    "Air bronchogram": "air_bronchogram",
}
COMMENT_COLUMNS = ("Comments from web site", "Comments first medical doctor (MD1)", "MD2")
# Comments that point elsewhere instead of describing the clip.
_EMPTY_COMMENTS = ("", "see filename", "none", "nan", "n/a", "-")
_MEDIA_SUFFIXES = (".mp4", ".avi", ".mpeg", ".mpg", ".gif", ".mov", ".jpg", ".jpeg", ".png")
_FOLDERS = ("pocus_videos/convex", "pocus_videos/linear", "pocus_images/convex", "pocus_images/linear")
_FINDING_WORDS = {
    "effusion": "pleural effusion",
    "consolidation": "consolidation",
    "b_lines": "B-lines",
    "a_lines": "A-lines",
    "pleural_irregularity": "pleural irregularities",
    "air_bronchogram": "air bronchogram",
}

# First match wins; \g groups name the patient. Everything else groups by the word after the class prefix.
_GROUP_RULES: tuple[tuple[str, str], ...] = (
    (r"reg_pat(\d+)image.*", "charlotte_patient_{0}"),
    (r"(?:pneu|reg|vir|cov)_northumbria_(\d+)_set(\d+)_.*", "northumbria_{0}_set_{1}"),
    (r"(?:pneu|reg|vir|cov)_northumbria_(\d+)_.*", "northumbria_{0}"),
    (r".*li(?:ft|tf)l.*?case_?0*(\d+).*", "litfl_case_{0}"),
    (r"reg_image_.*", "charlotte_session"),
)


class Builder(UltrasoundBuilder):
    """One study per clip or still; groups are patients where the file name tells, else the source."""

    TITLE: ClassVar[str] = "POCUS lung ultrasound"
    SOURCE: ClassVar[str] = (
        "Born et al., Applied Sciences 11(2), 2021; github.com/jannisborn/covid19_ultrasound"
    )
    LICENCE: ClassVar[str] = "per clip (column License); several state none: do not redistribute"
    LAYOUT: ClassVar[str] = "data/dataset_metadata.csv and data/pocus_videos/{convex,linear}/"

    def _studies(self, manual_dir: Path | None) -> Iterator[StudyEntry]:
        assert manual_dir is not None
        root = find_root(manual_dir, ("data", "."), (METADATA,))
        if root is None:
            raise self.layout_error(f"{describe_folder(manual_dir)}: no {METADATA}")
        rows = read_metadata(root / METADATA)
        files = [p for folder in _FOLDERS for p in sorted((root / folder).glob("*")) if p.is_file()]
        if not files:
            raise self.layout_error(f"{METADATA} and no media file under pocus_videos/ or pocus_images/")
        stems = [stem_of(path.name) for path in files]
        for stem in sorted(rows.keys() - set(stems)):
            for _ in rows[stem]:
                self.skip(stem, "media file absent from this copy", known_gap=True)
        for stem, path in zip(stems, files, strict=True):
            source = path.relative_to(root).as_posix()
            if stem not in rows:
                self.skip(source, f"no row in {METADATA}")
                continue
            row, conditions = rows[stem][0], {find_condition(r) for r in rows[stem]}
            if len(conditions) > 1:
                self.skip(source, f"rows of {METADATA} disagree on the label")
                continue
            condition = conditions.pop()
            if condition is None:
                self.skip(source, f"column 'Label' is {row['Label']!r}; expected one of {sorted(CONDITIONS)}")
                continue
            kind = "still" if "pocus_images" in source else "clip"
            study_id = f"{kind}_" + re.sub(r"[^0-9a-z]+", "_", stem.lower())
            yield StudyEntry(
                study_id=study_id,
                group_id=find_group(stem),
                stratum=condition,
                source=source,
                read=lambda s=study_id, p=path, r=row, c=condition, root=root: read_study(  # type: ignore[misc]
                    s, p, r, c, root
                ),
            )


def read_metadata(path: Path) -> dict[str, list[dict[str, str]]]:
    """Rows of the CSV by file stem; text stays text (a licence "None" is a word, not a missing value).

    Raises:
      ValueError: no CSV in UTF-8, or a column that the builder needs is absent.
    """
    rows: dict[str, list[dict[str, str]]] = defaultdict(list)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        try:
            needed = ("Filename", "Label", *FINDING_COLUMNS, *COMMENT_COLUMNS)
            absent = [c for c in needed if c not in (reader.fieldnames or ())]
            for row in reader if not absent else ():
                rows[stem_of(row["Filename"] or "")].append({k: v or "" for k, v in row.items() if k})
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: is not UTF-8 text ({error.reason}); save it as UTF-8") from error
        except csv.Error as error:
            raise ValueError(
                f"{path} line {reader.reader.line_num}: {error}; is this the set's own {METADATA}?"
            ) from error
    if absent:
        raise ValueError(f"{path}: columns {absent} are absent; is this the set's own {METADATA}?")
    return dict(rows)


def stem_of(name: str) -> str:
    """File name without a media extension of any case; other dots belong to the name."""
    name = name.strip()
    suffix = Path(name).suffix
    return name[: -len(suffix)] if suffix.lower() in _MEDIA_SUFFIXES else name


def find_condition(row: dict[str, str]) -> str | None:
    """Concept id of a row's label, or None when it is unknown."""
    return CONDITIONS.get(row["Label"].strip().lower())


def find_group(stem: str) -> str:
    """Patient of a clip where its name tells; else its source, which may join several patients.

    Class prefixes do not separate groups: one patient has healthy and diseased clips.
    """
    name = stem.lower()
    for pattern, group in _GROUP_RULES:
        match = re.fullmatch(pattern, name)
        if match:
            return group.format(*match.groups())
    words = [w for w in re.split(r"[^a-z0-9]+", name) if w]
    if len(words) > 1 and words[0] in ("cov", "pneu", "pneumonia", "reg", "vir", "viral"):
        words = words[1:]
    return "source_" + (words[0] if words else "unnamed")


def read_study(study_id: str, path: Path, row: dict[str, str], condition: str, root: Path) -> Record:
    """Reads a clip; frames and rate are what decodes (the table's counts are wrong for many files)."""
    clip = read_for_storage([path])
    findings = tuple(concept for column, concept in FINDING_COLUMNS.items() if row[column].strip() == "1")
    report, synthetic = compose_report(row, condition, findings)
    return Record(
        study_id=study_id,
        group_id=find_group(stem_of(path.name)),
        frames=clip.frames,
        fps=clip.fps,
        pixel_spacing_mm=clip.pixel_spacing_mm,
        organ="lung",
        condition=condition,
        findings=findings,
        report=report,
        language="en",
        report_is_synthetic=synthetic,
        source=path.relative_to(root).as_posix(),
        decoder=clip.decoder,
        kept_whole=not clip.blanked,
    )


def compose_report(row: dict[str, str], condition: str, findings: tuple[str, ...]) -> tuple[str, bool]:
    """The comments, each once, as one text; without any, composed from the labels (True: synthetic)."""
    texts: list[str] = []
    for column in COMMENT_COLUMNS:
        text = " ".join(row[column].split())
        if text.lower() in _EMPTY_COMMENTS or text.lower() in (t.lower() for t in texts):
            continue
        texts.append(text)
    if texts:
        return " ".join(t if t[-1] in ".!?" else t + "." for t in texts), False
    words = ", ".join(_FINDING_WORDS[f] for f in findings) or (
        "normal lung" if condition == "normal" else "no finding noted"
    )
    label = {"normal": "normal", "covid19": "COVID-19"}.get(condition, condition.replace("_", " "))
    return f"Lung ultrasound: {words}. Impression: {label}.", True
