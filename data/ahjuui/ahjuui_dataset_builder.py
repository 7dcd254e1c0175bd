"""AHJUUI (private), or any hospital export: a folder with manifest.jsonl, one study a line."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from dilbert_jax.data.builder import UltrasoundBuilder
from dilbert_jax.data.reading import describe_folder, read_for_storage, resolve_inside
from dilbert_jax.data.record import LANGUAGES, SPLITS, Record, Region, StudyEntry
from dilbert_jax.data.weak_labels import label_report
from dilbert_jax.knowledge import Entity, KnowledgeGraph, extract_entities

MANIFEST = "manifest.jsonl"
REQUIRED = ("study_id", "patient_id", "media", "report", "language")
OPTIONAL = ("organ", "condition", "findings", "regions", "split")
MAX_LINE = 2**20  # characters; a study's line holds a report and paths


class Builder(UltrasoundBuilder):
    """One study per manifest line; groups are patients."""

    RELEASE_NOTES: ClassVar[dict[str, str]] = {
        **UltrasoundBuilder.RELEASE_NOTES,
        "1.1.0": "Weak labels: normal only where the report says so.",
    }
    READS_REPORTS: ClassVar[bool] = True
    TITLE: ClassVar[str] = "Hospital export (AHJUUI layout)"
    SOURCE: ClassVar[str] = "your own export: a folder with manifest.jsonl (docs/data.md)"
    LICENCE: ClassVar[str] = (
        "yours; prepared files hold your clips and reports: treat them as you treat the export"
    )
    LAYOUT: ClassVar[str] = "manifest.jsonl with one study a line, and the media that it names"

    def _studies(self, manual_dir: Path | None) -> Iterator[StudyEntry]:
        assert manual_dir is not None
        manifest = manual_dir / MANIFEST
        if not manifest.is_file():
            raise self.layout_error(describe_folder(manual_dir))
        seen: dict[str, int] = {}
        with manifest.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                line = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
                if not line.strip():
                    continue
                source = f"{MANIFEST} line {number}"
                try:
                    study = parse_line(line, manual_dir, self.graph)
                    earlier = seen.setdefault(study["study_id"], number)
                    if earlier != number:
                        raise ValueError(f"field 'study_id' is that of line {earlier}; it must be unique")
                except ValueError as error:
                    self.skip(source, str(error))
                    continue
                yield _make_entry(study, source, manual_dir, self.graph)


def _make_entry(study: dict[str, Any], source: str, folder: Path, graph: KnowledgeGraph) -> StudyEntry:
    group = hash_patient(study["patient_id"])
    labels = find_labels(study, graph)
    return StudyEntry(
        study_id=study["study_id"],
        group_id=group,
        stratum=f"{labels[0]} {labels[1]}",
        source=source,
        official_split=study.get("split", ""),
        read=lambda: read_study(study, group, labels, folder),
    )


def hash_patient(patient_id: str) -> str:
    """A name for the group that does not show the patient's number."""
    return "patient_" + hashlib.sha256(patient_id.encode()).hexdigest()[:16]


def parse_line(line: bytes, folder: Path, graph: KnowledgeGraph) -> dict[str, Any]:
    """Reads and checks one line of the manifest.

    Args:
      line: JSON object in UTF-8.
      folder: where the media lie.
      graph: the knowledge graph that labels are ids of.

    Returns:
      The object; ``study_id`` and ``patient_id`` are text in one form, so that they compare.

    Raises:
      ValueError: what is wrong, naming the field.
    """
    if len(line) > MAX_LINE:
        raise ValueError(f"line of {len(line)} bytes; the limit is {MAX_LINE}")
    try:
        study = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON in UTF-8 ({error})") from None
    if not isinstance(study, dict):
        raise ValueError(f"a {type(study).__name__} instead of a JSON object")
    absent = [name for name in REQUIRED if name not in study]
    if absent:
        raise ValueError(f"field {absent[0]!r} is absent")
    unknown = sorted(set(study) - set(REQUIRED) - set(OPTIONAL))
    if unknown:
        raise ValueError(f"unknown field {_shown(unknown[0])}; known are {', '.join(REQUIRED + OPTIONAL)}")
    for name, value in study.items():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError(
                f"field {name!r} holds half a character (a lone surrogate); export it anew"
            ) from None
    for name in ("study_id", "patient_id"):
        study[name] = _read_id(study[name], name)
    if not isinstance(study["report"], str):
        raise ValueError(
            f"field 'report' is a {type(study['report']).__name__}; expected text, \"\" for none"
        )
    if study["language"] not in LANGUAGES:
        raise ValueError(f"field 'language' is {_shown(study['language'])}; expected one of {LANGUAGES}")
    if study.get("split", "train") not in SPLITS:
        raise ValueError(f"field 'split' is {_shown(study['split'])}; expected one of {SPLITS}")
    _check_media(study["media"], folder)
    _check_labels(study, graph)
    _check_regions(study, graph)
    return study


def _shown(value: Any) -> str:
    """A value for a message: a short word or number as it stands, else its type, for it may tell of a patient."""
    text = repr(value) if isinstance(value, (str, int, float)) else ""
    return text if text and len(text) <= 40 and not re.search(r"\d{4}", text) else f"a {type(value).__name__}"


def _read_id(value: Any, name: str) -> str:
    """One text for "p4", "p4 " and "ｐ４", and for 4 and 4.0; messages show no value."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:  # larger ones have lost digits
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise ValueError(f"field {name!r} is a {type(value).__name__}; expected text or a whole number")
    value = unicodedata.normalize("NFKC", value).strip()
    if not value:
        raise ValueError(f"field {name!r} is empty; expected text")
    return value


def _check_media(media: Any, folder: Path) -> None:
    if not isinstance(media, list) or not media or not all(isinstance(m, str) for m in media):
        raise ValueError(f"field 'media' is a {type(media).__name__}; expected a list of relative paths")
    for name in media:
        if not resolve_inside(folder, name).is_file():
            raise ValueError(f"field 'media': no file {name!r}")


def _check_labels(study: dict[str, Any], graph: KnowledgeGraph) -> None:
    concepts = graph.concepts
    findings = study.get("findings", [])
    if not isinstance(findings, list):
        raise ValueError(f"field 'findings' is a {type(findings).__name__}; expected a list of concept ids")
    for name, value, types in (
        ("organ", study.get("organ", ""), ("organ", "region")),
        ("condition", study.get("condition", ""), ("condition", "finding")),
        *(("findings", finding, ("finding", "descriptor")) for finding in findings),
    ):
        if value == "" and name != "findings":
            continue
        if not isinstance(value, str) or value not in concepts or concepts[value].type not in types:
            raise ValueError(
                f"field {name!r}: {_shown(value)} is no {' or '.join(types)} of the knowledge graph "
                "(see docs/data.md for the ids)"
            )


def _check_regions(study: dict[str, Any], graph: KnowledgeGraph) -> None:
    regions = study.get("regions", [])
    if not isinstance(regions, list):
        raise ValueError(f"field 'regions' is a {type(regions).__name__}; expected a list")
    concepts = graph.concepts
    for i, region in enumerate(regions):
        name = f"field 'regions'[{i}]"
        if not isinstance(region, dict) or set(region) != {"media", "frame", "box", "organ"}:
            raise ValueError(f"{name}: expected exactly the fields media, frame, box, organ")
        if not _is_index(region["media"]) or region["media"] >= len(study["media"]):
            raise ValueError(f"{name}: media {_shown(region['media'])} is no index into 'media'")
        if not _is_index(region["frame"]):
            raise ValueError(f"{name}: frame {_shown(region['frame'])} is no frame number (0 is the first)")
        box = region["box"]
        numbers = isinstance(box, list) and len(box) == 4
        numbers = numbers and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in box)
        shown = box if numbers else f"is a {type(box).__name__}"
        if not numbers or not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
            raise ValueError(f"{name}: box {shown}; expected [ymin, xmin, ymax, xmax] in [0, 1]")
        organ = region["organ"]
        if (
            not isinstance(organ, str)
            or organ not in concepts
            or concepts[organ].type not in ("organ", "region")
        ):
            raise ValueError(f"{name}: organ {_shown(organ)} is no organ or region of the knowledge graph")


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def find_labels(study: dict[str, Any], graph: KnowledgeGraph) -> tuple[str, str, tuple[str, ...]]:
    """(organ, condition, findings): as stated, else read from the report (the organ named most often)."""
    report, language = study["report"], study["language"]
    organ = study.get("organ", "")
    if not organ and report.strip():
        entities = extract_entities(report, language, graph)
        organs = [e.concept for e in entities if graph.concepts[e.concept].type == "organ"]
        organs = organs or _organs_inside(report, language, entities, graph)
        organ = max(sorted(set(organs)), key=organs.count, default="")
    condition, findings = label_report(report, language, organ, graph)
    return organ, study.get("condition", condition), tuple(study.get("findings", findings))


def _organs_inside(report: str, language: str, entities: list[Entity], graph: KnowledgeGraph) -> list[str]:
    """Organs that longer names hold (肾 in 肾结石), where the graph lets them have what is named."""
    organs = KnowledgeGraph((c for c in graph.concepts.values() if c.type == "organ"), ())
    found = []
    for entity in entities:
        for inner in extract_entities(report[entity.start : entity.end], language, organs):
            region = graph.concepts[entity.concept].type == "region"
            # The kidney may have an adrenal gland beside it, which is another organ's name all the same.
            within = graph.parts(inner.concept) if region else ()
            if entity.concept in within or (not region and graph.allows(inner.concept, entity.concept)):
                found.append(inner.concept)
    return found


def read_study(
    study: dict[str, Any], group: str, labels: tuple[str, str, tuple[str, ...]], folder: Path
) -> Record:
    """Reads the media of a study: one file of any kind, or several stills as one sequence."""
    clip = read_for_storage([folder / name for name in study["media"]])
    regions = []
    for i, region in enumerate(study.get("regions", [])):
        # In a sequence of stills the file is the frame.
        frame = region["frame"] if len(study["media"]) == 1 else region["media"]
        if (len(study["media"]) > 1 and region["frame"] != 0) or frame > clip.frame_index[-1]:
            raise ValueError(f"field 'regions'[{i}]: frame {region['frame']} is beyond the clip's last frame")
        nearest = min(range(len(clip.frame_index)), key=lambda k: abs(clip.frame_index[k] - frame))
        ymin, xmin, ymax, xmax = (float(side) for side in region["box"])
        regions.append(Region(nearest, (ymin, xmin, ymax, xmax), region["organ"]))
    organ, condition, findings = labels
    return Record(
        study_id=study["study_id"],
        group_id=group,
        frames=clip.frames,
        fps=clip.fps,
        pixel_spacing_mm=clip.pixel_spacing_mm,
        organ=organ,
        condition=condition,
        findings=findings,
        report=study["report"].strip(),
        language=study["language"],
        report_is_synthetic=False,
        regions=tuple(regions),
        official_split=study.get("split", ""),
        source=";".join(study["media"]),
        decoder=clip.decoder,
        kept_whole=not clip.blanked,
    )
