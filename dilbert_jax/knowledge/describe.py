"""A natural-language description of a clip from its labels and matched entities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dilbert_jax.knowledge.entities import is_location
from dilbert_jax.knowledge.graph import KnowledgeGraph, check_language
from dilbert_jax.knowledge.wording import (
    Lesion,
    capitalize,
    is_adjective,
    is_plural,
    join_chinese,
    join_english,
    lesion_chinese,
    lesion_english,
    lower_first,
    organ_english,
    place_chinese,
    place_english,
    states_chinese,
    states_english,
    with_article,
)

# The focal finding that descriptors belong to, most specific first.
HEADS = ("mass", "nodule", "polyp", "patchy_area", "lesion")
SUGGESTIONS = {
    "en": (
        "Appearance suggests {}.",
        "Findings are suggestive of {}.",
        "The appearance is consistent with {}.",
    ),
    "zh": ("考虑{}。", "提示{}。", "{}可能。"),
}
_NOTHING = {"en": "Nothing further is described.", "zh": "无其他描述。"}
_NORMAL = {"en": "Normal appearance.", "zh": "表现正常。"}

Mention = str | tuple[str, Sequence[str]]


def describe(
    organ: str,
    condition: str,
    findings: Sequence[str],
    *,
    language: str,
    graph: KnowledgeGraph,
    present: Sequence[Mention] = (),
    absent: Sequence[str] = (),
) -> str:
    """Composes the description of a clip from its labels and matched entities.

    Reading it with ``extract_entities`` gives the concepts back: present, absent, and the condition uncertain
    (an impression), save "normal", which is present.

    Args:
      organ: concept id of the organ examined.
      condition: concept id of the condition; "" says nothing about it.
      findings: concept ids that hold.
      language: "en" or "zh".
      graph: the knowledge graph.
      present: further concepts that hold: an id, or (id, places) with the ids of the sides and regions where
        it is. The condition itself need not be repeated here.
      absent: concept ids looked for and not found.

    Returns:
      A few sentences, the organ's name first.

    Raises:
      ValueError: unknown id or language, a concept both present and absent, a side said to be absent.
    """
    check_language(language)
    places: dict[str, tuple[str, ...]] = {}
    for mention in (*findings, *present):
        concept, where = (mention, ()) if isinstance(mention, str) else mention
        for concept_id in (concept, *where):
            graph.concept(concept_id)
        places[concept] = tuple(dict.fromkeys((*places.get(concept, ()), *where)))
    absent = tuple(dict.fromkeys(absent))
    _check_absent(absent, places, graph)
    graph.concept(organ)
    sentences = present_sentences(organ, condition, places, language, graph)
    sentences += _absent_sentences(absent, language, graph)
    sentences += condition_sentence(condition, places, language, graph)
    sentences = sentences or [_NOTHING[language]]
    if language == "zh":
        return f"{graph.name(organ, 'zh')}：{''.join(sentences)}"
    return f"{capitalize(graph.name(organ, 'en'))}: " + " ".join(
        [lower_first(sentence) if index == 0 else sentence for index, sentence in enumerate(sentences)]
    )


def _check_absent(absent: Sequence[str], present: Mapping[str, object], graph: KnowledgeGraph) -> None:
    for concept_id in absent:
        if concept_id in present:
            raise ValueError(f"concept {concept_id!r} is given as present and as absent; keep one")
        if is_location(concept_id, graph):
            raise ValueError(
                f"concept {concept_id!r} in 'absent' is a position; say what is absent there instead"
            )


def present_sentences(
    organ: str, condition: str, places: Mapping[str, tuple[str, ...]], language: str, graph: KnowledgeGraph
) -> list[str]:
    """Says what holds: the organ as a whole, its main focal finding, everything else.

    Args:
      organ, condition, language, graph: as in ``describe``.
      places: concept id -> ids of the sides and regions where it is.

    Returns:
      Sentences.
    """
    kinds = {concept: graph.concept(concept).type for concept in places}
    sides = tuple(c for c in places if is_location(c, graph))
    areas = [c for c in places if kinds[c] in ("organ", "region") and c not in (organ, *HEADS)]
    head = next((c for c in HEADS if c in places), "")
    descriptors = [c for c in places if kinds[c] == "descriptor" and c not in sides]
    of_head = [c for c in descriptors if head and "modifies" in graph.relation_types(c, head)]
    others = [
        c for c in places if kinds[c] in ("finding", "condition") and c not in (head, condition, "normal")
    ]
    at_head = [
        c
        for c in others
        if head
        and kinds[c] == "finding"
        and c not in HEADS
        and graph.relation_types(c, head) & {"shows", "located_at"}
    ]
    others = [c for c in others if c not in at_head]
    places_of_head = tuple(dict.fromkeys((*(places[head] if head else ()), *sides)))
    lesions = [Lesion(head, tuple(of_head), tuple(at_head), places_of_head)] if head else []
    loose = [c for c in descriptors if c not in of_head]
    of_organ = [c for c in loose if "modifies" in graph.relation_types(c, organ)]
    loose = [c for c in loose if c not in of_organ]
    for concept in others:
        own = tuple(c for c in loose if "modifies" in graph.relation_types(c, concept))
        if own:
            lesions.append(Lesion(concept, own, (), places[concept] or (() if head else sides)))
            loose = [c for c in loose if c not in own]
    others = [c for c in others if all(c != lesion.head for lesion in lesions)]
    sentences = []
    if of_organ:
        sentences.append(
            organ_english(organ, of_organ, graph) if language == "en" else states_chinese(of_organ, graph)
        )
    for lesion in lesions:
        sentences.append(
            lesion_english(lesion, organ, graph) if language == "en" else lesion_chinese(lesion, graph)
        )
    if loose:
        sentences.append(states_english(loose, graph) if language == "en" else states_chinese(loose, graph))
    groups: dict[tuple[str, ...], list[str]] = {}
    for concept in others:
        groups.setdefault(places[concept] or (() if head else sides), []).append(concept)
    for place, concepts in groups.items():
        sentences.append(_seen(concepts, place, organ, language, graph))
    said = {c for place in (*groups, *(lesion.place for lesion in lesions)) for c in place}
    areas = [c for c in (*sides, *areas) if c not in said]
    if areas:
        sentences.append(_shown(areas, organ, language, graph))
    return sentences


def _seen(
    concepts: Sequence[str], place: Sequence[str], organ: str, language: str, graph: KnowledgeGraph
) -> str:
    if language == "zh":
        return f"{place_chinese(place, graph)}可见{join_chinese([graph.name(c, 'zh') for c in concepts])}。"
    items = [with_article(c, graph) for c in concepts]
    verb = "are" if len(items) > 1 or is_plural(items[0]) else "is"
    return (
        f"{capitalize(join_english(items))} {verb} seen {place_english(place, organ, graph)}".rstrip() + "."
    )


def _shown(areas: Sequence[str], organ: str, language: str, graph: KnowledgeGraph) -> str:
    """Places that nothing is said about."""
    if language == "zh":
        return f"切面包括{join_chinese([graph.name(c, 'zh') for c in areas])}。"
    return f"The view includes {place_english(areas, organ, graph).removeprefix('in ')}."


def _absent_sentences(absent: Sequence[str], language: str, graph: KnowledgeGraph) -> list[str]:
    kinds = {c: graph.concept(c).type for c in absent}
    anatomy = [c for c in absent if kinds[c] in ("organ", "region")]
    states = [c for c in absent if c == "normal" or (kinds[c] == "descriptor" and is_adjective(c, graph))]
    things = [c for c in absent if c not in anatomy and c not in states]
    names = {c: graph.name(c, language) for c in absent}
    sentences = []
    if things:
        listed = [names[c] for c in things]
        if language == "zh":
            sentences.append(f"未见{join_chinese(listed)}。")
        else:
            verb = "are" if is_plural(listed[-1]) else "is"
            sentences.append(f"No {join_english(listed, 'or')} {verb} seen.")
    if states:
        listed = [names[c] for c in states]
        sentences.append(
            f"未见{join_chinese(listed)}表现。"
            if language == "zh"
            else f"No {join_english(listed, 'or')} appearance is seen."
        )
    for concept in anatomy:
        sentences.append(
            f"未探及{names[concept]}。" if language == "zh" else f"The {names[concept]} is not seen."
        )
    return sentences


def condition_sentence(
    condition: str, places: Mapping[str, object], language: str, graph: KnowledgeGraph, choice: int = 0
) -> list[str]:
    """Says the condition as an impression; ``choice`` indexes ``SUGGESTIONS``."""
    if condition == "normal" or (not condition and "normal" in places):
        return [_NORMAL[language]]
    if not condition:
        return []
    name = graph.name(condition, "zh") if language == "zh" else with_article(condition, graph)
    normal = [_NORMAL[language]] if "normal" in places else []
    return [*normal, SUGGESTIONS[language][choice].format(name)]
