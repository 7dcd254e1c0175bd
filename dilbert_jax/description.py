"""The text of an annotation: what the knowledge graph allows to be said of what the network sees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dilbert_jax.knowledge import KnowledgeGraph, describe
from dilbert_jax.knowledge.describe import HEADS

MAX_ABSENT = 3
# Words of reports that say nothing of a clip by themselves: it does not show which side of the body it is, and
# "internal" belongs to another word ("internal echoes").
UNSAID = ("left", "right", "bilateral", "internal")


def write_description(annotation: Mapping[str, Any], graph: KnowledgeGraph) -> dict[str, str]:
    """Composes the text, by language, from what the graph allows in the organ and the clip supports.

    Args:
      annotation: organ, condition, findings and entities as in docs/annotation_schema.md.
      graph: what belongs to an organ, contradicts or speaks for disease.
    """
    organ = annotation["organ"]["id"] if annotation["organ"] else ""
    condition = annotation["condition"]["id"] if annotation["condition"] else ""
    supported = {e["id"]: e["supported"] for e in annotation["entities"]}

    def allowed(concept: str) -> bool:
        return concept not in UNSAID and (not organ or graph.allows(organ, concept))

    # A finding must hold in both heads; one that is no match candidate stands on its own probability. Of two that
    # contradict each other the better supported one stays.
    scores = {f["id"]: f["probability"] for f in annotation["findings"]}
    scores |= {e["id"]: e["score"] for e in annotation["entities"]}
    claims = [f["id"] for f in annotation["findings"] if f["present"] and supported.get(f["id"], True)]
    claims += [
        e["id"] for e in annotation["entities"] if e["supported"] and e["type"] in ("region", "descriptor")
    ]
    kept: list[str] = []
    for concept in sorted(dict.fromkeys(claims), key=lambda c: -scores[c]):
        if allowed(concept) and not any("contradicts" in graph.relation_types(concept, k) for k in kept):
            kept.append(concept)
    # The heads decide one by one: "normal" may lead among the conditions while a lesion is seen. The ranking of the
    # conditions keeps it; the text gives no impression rather than one that its own findings refute.
    if condition == "normal" and any(_refutes_normal(concept, organ, graph) for concept in kept):
        condition = ""
    labelled = {f["id"] for f in annotation["findings"]}
    findings = [c for c in kept if c in labelled]
    present = [c for c in kept if c not in labelled]
    absent = _denied(annotation, kept, supported, graph)
    return {
        language: describe(
            organ, condition, findings, language=language, graph=graph, present=present, absent=absent
        )
        for language in ("en", "zh")
    }


def _denied(
    annotation: Mapping[str, Any], kept: Sequence[str], supported: Mapping[str, bool], graph: KnowledgeGraph
) -> list[str]:
    """Ids of the findings that the text denies, ``MAX_ABSENT`` at most, the least probable first.

    They are those that would speak for a condition of the organ: of all that it can show the least probable is what
    nobody would look for. A sign of health is not denied, nor are both of two findings that contradict each other.
    """
    organ = annotation["organ"]["id"] if annotation["organ"] else ""
    denied: list[str] = []
    for finding in sorted(annotation["findings"], key=lambda f: f["probability"]):
        concept = finding["id"]
        if (
            not finding["present"]
            and concept not in kept
            and not supported.get(concept, False)
            and graph.concepts[concept].type == "finding"
            and "suggestive_of" not in graph.relation_types(concept, "normal")
            and not any("contradicts" in graph.relation_types(concept, d) for d in denied)
            and _speaks_for_disease(concept, organ, graph)
        ):
            denied.append(concept)
    return denied[:MAX_ABSENT]


def _speaks_for_disease(finding: str, organ: str, graph: KnowledgeGraph) -> bool:
    """Whether the graph links a finding of an organ to a condition of that organ other than "normal"."""
    if not organ or not graph.allows(organ, finding):
        return False
    return any(
        "suggestive_of" in graph.relation_types(finding, condition)
        or graph.relation_types(condition, finding) & {"causes", "shows"}
        for condition in graph.conditions_of(organ)
        if condition != "normal"
    )


def _refutes_normal(concept: str, organ: str, graph: KnowledgeGraph) -> bool:
    """Whether a concept that is seen, a focal lesion or a sign of disease, leaves no room for "normal"."""
    types = graph.relation_types(concept, "normal")
    if concept in HEADS or "contradicts" in types:
        return True
    # Of descriptors many belong to health and disease alike.
    finding = graph.concept(concept).type == "finding"
    return finding and "suggestive_of" not in types and _speaks_for_disease(concept, organ, graph)
