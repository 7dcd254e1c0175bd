"""Captions for data sets without reports, synthesized from labels and measured masks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dilbert_jax.knowledge.describe import HEADS, SUGGESTIONS, condition_sentence, present_sentences
from dilbert_jax.knowledge.graph import KnowledgeGraph, check_language, load_graph
from dilbert_jax.knowledge.wording import (
    Lesion,
    capitalize,
    lesion_chinese,
    lesion_english,
    lower_first,
    place_chinese,
)

_MEASUREMENT_FIELDS = (
    "concept",
    "count",
    "size_mm",
    "size_fraction",
    "position",
    "shape",
    "echogenicity",
    "margin",
    "orientation",
    "posterior",
)


def caption(
    organ: str,
    condition: str,
    findings: Sequence[str],
    measurements: Sequence[Mapping[str, Any]],
    *,
    language: str,
    rng: np.random.Generator,
    graph: KnowledgeGraph | None = None,
) -> str:
    """Synthesizes a report from labels and measured masks, in varying words.

    Args:
      organ: concept id of the organ; condition: concept id or ""; findings: concept ids that hold.
      measurements: one mapping a measured lesion or structure. Fields, all optional: "concept" (id of what
        was measured, default "lesion"), "count" (int >= 1), "size_mm" (length or (width, height) in mm),
        "size_fraction" (area over image area, in (0, 1]), "position" (ids among left, right, upper, lower,
        middle: where in the image), "shape", "echogenicity", "margin", "orientation", "posterior" (ids).
      language: "en" or "zh".
      rng: chooses among wordings; the same state gives the same caption.
      graph: the knowledge graph; the packaged one when None.

    Returns:
      A few sentences. They state what labels and masks say, nothing else.

    Raises:
      ValueError: unknown id, language, field or value.
    """
    graph = graph or load_graph()
    check_language(language)
    lesions = [_measured(m, index, language, graph, rng) for index, m in enumerate(measurements)]
    said = {c for lesion in lesions for c in (lesion.head, *lesion.descriptors, *lesion.attachments)}
    rest: dict[str, tuple[str, ...]] = {c: () for c in findings if c not in said}
    for concept in rest:
        graph.concept(concept)
    generic = [c for c in rest if c in HEADS]
    if lesions and generic:
        # The label names what the mask only measured.
        lesions = [
            dataclasses.replace(lesion, head=generic[0]) if lesion.head == "lesion" else lesion
            for lesion in lesions
        ]
        rest.pop(generic[0])
    if len(lesions) == 1:
        owned = [c for c in rest if "modifies" in graph.relation_types(c, lesions[0].head)]
        held = [c for c in rest if graph.relation_types(c, lesions[0].head) & {"shows", "located_at"}]
        held = [c for c in held if graph.concept(c).type == "finding" and c not in HEADS]
        lesions = [
            dataclasses.replace(
                lesions[0],
                descriptors=(*lesions[0].descriptors, *owned),
                attachments=(*lesions[0].attachments, *held),
            )
        ]
        rest = {c: () for c in rest if c not in owned and c not in held}
    sentences = [
        lesion_english(x, organ, graph) if language == "en" else lesion_chinese(x, graph) for x in lesions
    ]
    others = present_sentences(organ, condition, rest, language, graph)
    sentences = [*others, *sentences] if rng.random() < 0.5 else [*sentences, *others]
    choice = int(rng.integers(len(SUGGESTIONS[language])))
    ending = condition_sentence(condition, rest, language, graph, choice)
    sentences = [*ending, *sentences] if rng.random() < 0.2 else [*sentences, *ending]
    return _opened(organ, sentences, language, graph, rng)


def _opened(
    organ: str, sentences: Sequence[str], language: str, graph: KnowledgeGraph, rng: np.random.Generator
) -> str:
    name = graph.name(organ, language)
    if language == "zh":
        opening = ("{}：", "{}超声：", "{}扫查：")[int(rng.integers(3))]
        return opening.format(name) + "".join(sentences)
    opening = ("{}:", "{} ultrasound.", "Scan of the {}.")[int(rng.integers(3))]
    first, *others = sentences or [""]
    first = lower_first(first) if opening.endswith(":") else first
    return " ".join([capitalize(opening.format(name)), first, *others]).rstrip()


def _measured(
    measurement: Mapping[str, Any], index: int, language: str, graph: KnowledgeGraph, rng: np.random.Generator
) -> Lesion:
    where = f"measurements[{index}]"
    unknown = sorted(set(measurement) - set(_MEASUREMENT_FIELDS))
    if unknown:
        raise ValueError(f"{where}: unknown field {unknown[0]!r}; expected one of {_MEASUREMENT_FIELDS}")
    fields = ("shape", "echogenicity", "margin", "orientation")
    descriptors = tuple(measurement[f] for f in fields if measurement.get(f))
    posterior = tuple(measurement[f] for f in ("posterior",) if measurement.get(f))
    position = measurement.get("position") or ()
    position = (position,) if isinstance(position, str) else tuple(position)
    head = measurement.get("concept") or "lesion"
    for concept in (head, *descriptors, *posterior, *position):
        graph.concept(concept)
    count = measurement.get("count", 1)
    if not isinstance(count, int | np.integer) or count < 1:
        raise ValueError(f"{where}: field 'count' is {count!r}; expected a whole number of at least 1")
    return Lesion(
        head,
        descriptors,
        posterior,
        count=int(count),
        size=_size(measurement, where, language, rng),
        frame_place=_frame_place(position, language, graph),
    )


def _frame_place(position: Sequence[str], language: str, graph: KnowledgeGraph) -> str:
    if not position:
        return ""
    if language == "zh":
        return f"位于图像{place_chinese(position, graph)}"
    rows_first = sorted(position, key=lambda c: c not in ("upper", "lower"))
    return f"in the {' '.join(graph.name(c, 'en') for c in rows_first)} part of the image"


def _size(measurement: Mapping[str, Any], where: str, language: str, rng: np.random.Generator) -> str:
    length = measurement.get("size_mm")
    fraction = measurement.get("size_fraction")
    if length is not None:
        values = np.atleast_1d(np.asarray(length, float))
        if values.size > 3 or not np.all(np.isfinite(values)) or np.any(values <= 0):
            raise ValueError(
                f"{where}: field 'size_mm' is {length!r}; expected one to three positive lengths in mm"
            )
        numbers = [f"{value:.0f}" if value >= 10 else f"{value:.1f}" for value in values]
        if language == "zh":
            return f"大小约{'×'.join(numbers)}mm"
        return ("about ", "")[int(rng.integers(2))] + " x ".join(numbers) + " mm"
    if fraction is not None:
        if not 0 < fraction <= 1:
            raise ValueError(f"{where}: field 'size_fraction' is {fraction!r}; expected a share in (0, 1]")
        percent = max(1, round(100 * float(fraction)))
        return f"about {percent} % of the image" if language == "en" else f"约占图像{percent}%"
    return ""
