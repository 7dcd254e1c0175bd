"""Named entities of a report: the graph's names, longest match, each present, uncertain or absent."""

from __future__ import annotations

import dataclasses
import functools
import re
import unicodedata
import weakref

import ahocorasick

from dilbert_jax.knowledge.graph import KnowledgeGraph, check_language, fold
from dilbert_jax.knowledge.scope import Cue, find_cues

STATUSES = ("present", "uncertain", "absent")
_DASHES = frozenset("-\u2010\u2011\u2012\u2013\u2014\u2015\u2212")
_WORD = frozenset("abcdefghijklmnopqrstuvwxyz0123456789_")
_PREPOSITION = re.compile(
    r"\b(?:in|within|of|at|on|inside|around|from|to|near)\b(?!.*(?:,|\b(?:or|nor|and)\b))"
)
_CAUSE = re.compile(r"(?:因|由于|受|due to|because of)\s*$")
_LIST = re.compile(r"\s*(?:、|及|和|与|或|,|,?\s*\b(?:and|or)\b)\s*(?:the\s+)?")


@dataclasses.dataclass(frozen=True)
class Entity:
    """A concept named in a report.

    Attributes:
      concept: concept id.
      start, end: character offsets into the report, end exclusive.
      status: "present", "uncertain" or "absent".
    """

    concept: str
    start: int
    end: int
    status: str


@dataclasses.dataclass(frozen=True)
class _Name:
    length: int
    concept: str
    absent: bool


class _Lexicon:
    """One language of a graph as an Aho-Corasick automaton over folded names."""

    def __init__(self, graph: KnowledgeGraph, language: str):
        names: dict[str, _Name] = {}
        for concept in graph.concepts.values():
            for listed, absent in ((concept.names, False), (concept.absent_names, True)):
                for name in map(fold, listed[language]):
                    names[name] = _Name(len(name), concept.id, absent)
        if language == "en":
            for name, entry in list(names.items()):
                if graph.concepts[entry.concept].type == "descriptor" and " " not in name:
                    continue  # an adjective has no plural
                plural = _pluralize(name)
                names.setdefault(plural, _Name(len(plural), entry.concept, entry.absent))
        self.automaton = ahocorasick.Automaton()
        for name, entry in names.items():
            self.automaton.add_word(name, entry)
        self.automaton.make_automaton()
        # Where something is (organ, region, left, upper) stays so when a finding there is denied.
        self.places = frozenset(
            concept.id
            for concept in graph.concepts.values()
            if is_location(concept.id, graph)
            or (concept.type in ("organ", "region") and not _is_finding(concept.id, graph))
        )
        self.anatomy = frozenset(c for c in self.places if graph.concepts[c].type != "descriptor")
        self.conditions = frozenset(c.id for c in graph.concepts.values() if c.type == "condition")

    def match(self, text: str) -> list[tuple[int, _Name]]:
        """(begin, name) of the leftmost longest whole-word names in folded text, without overlap."""
        found = []
        for last, name in self.automaton.iter(text):
            begin, end = last + 1 - name.length, last + 1
            if begin and text[begin] in _WORD and text[begin - 1] in _WORD:
                continue
            if end < len(text) and text[last] in _WORD and text[end] in _WORD:
                continue
            if text[last] == "大" and text[end : end + 1] == "小":
                continue  # 脾大小正常 speaks of the size, not of 脾大
            found.append((begin, name))
        found.sort(key=lambda item: (item[0], -item[1].length))
        kept: list[tuple[int, _Name]] = []
        cursor = 0
        for begin, name in found:
            if begin >= cursor:
                kept.append((begin, name))
                cursor = begin + name.length
        return kept


def is_location(concept_id: str, graph: KnowledgeGraph) -> bool:
    """A descriptor that is located somewhere and modifies anatomy only (left, upper, subcapsular)."""
    edges = [r for r in graph.neighbours(concept_id, ("located_at", "modifies")) if r.source == concept_id]
    modified = {graph.concepts[r.target].type for r in edges if r.type == "modifies"}
    return (
        graph.concepts[concept_id].type == "descriptor"
        and any(r.type == "located_at" for r in edges)
        and modified <= {"organ", "region"}
    )


def _is_finding(concept_id: str, graph: KnowledgeGraph) -> bool:
    """A region that is another word for a finding (lesion) is denied like one."""
    return any(
        graph.concepts[end].type == "finding"
        for relation in graph.neighbours(concept_id, ("synonym_of",))
        for end in (relation.source, relation.target)
    )


def _pluralize(name: str) -> str:
    if not name[-1].isascii() or not name[-1].isalpha() or (name.endswith("s") and not name.endswith("ss")):
        return name
    if name.endswith("y") and name[-2:-1] not in ("a", "e", "i", "o", "u"):
        return name[:-1] + "ies"
    return name + ("es" if name.endswith(("ss", "x", "z", "ch", "sh")) else "s")


_LEXICONS: weakref.WeakKeyDictionary[KnowledgeGraph, dict[str, _Lexicon]] = weakref.WeakKeyDictionary()


def _lexicon(graph: KnowledgeGraph, language: str) -> _Lexicon:
    lexicons = _LEXICONS.setdefault(graph, {})
    if language not in lexicons:
        lexicons[language] = _Lexicon(graph, language)
    return lexicons[language]


@functools.lru_cache(maxsize=65536)
def _fold_character(character: str) -> str:
    if character in _DASHES:
        return " "
    return unicodedata.normalize("NFKC", character).lower().replace("\u2019", "'")


def fold_text(text: str, language: str) -> tuple[str, list[int]]:
    """Folds a report for matching and keeps the way back.

    Args:
      text: the report.
      language: "en" or "zh"; in English a single line break inside a sentence counts as a space.

    Returns:
      The folded text, and for each of its characters (plus one at the end) the offset in ``text``.
    """
    folded: list[str] = []
    offsets: list[int] = []
    for index, character in enumerate(text):
        for piece in _fold_character(character):
            if piece.isspace():
                piece = "\n" if character in "\n\r" and _breaks_sentence(text, index, language) else " "
                if folded and folded[-1] in " \n":
                    # A run of blanks counts once, as a break where any of them is one.
                    folded[-1] = "\n" if "\n" in (piece, folded[-1]) else " "
                    continue
            folded.append(piece)
            offsets.append(index)
    offsets.append(len(text))
    return "".join(folded), offsets


def _breaks_sentence(text: str, index: int, language: str) -> bool:
    rest = text[index + 1 :].lstrip(" \t\r")
    return language == "zh" or not rest[:1].islower()


def extract_entities(text: str, language: str, graph: KnowledgeGraph) -> list[Entity]:
    """Finds the graph's concepts in a report.

    The longest name wins; English names match whole words, in any case, singular or plural, with hyphen or
    space. A denied finding leaves the place it is denied in present ("no mass in the left breast").

    Args:
      text: the report.
      language: "en" or "zh".
      graph: the knowledge graph.

    Returns:
      Entities in reading order, without overlap.

    Raises:
      ValueError: unknown language.
    """
    lexicon = _lexicon(graph, check_language(language))
    folded, offsets = fold_text(text, language)
    matches = lexicon.match(folded)
    if not matches:
        return []
    spans = [(begin, begin + name.length) for begin, name in matches]
    marks: list[list[Cue]] = [[] for _ in matches]
    for cue in find_cues(folded, language, spans):
        for index in _governed(cue, folded, spans, [name.concept for _, name in matches], lexicon):
            marks[index].append(cue)
    return [
        Entity(
            name.concept,
            offsets[begin],
            offsets[begin + name.length - 1] + 1,
            "absent" if name.absent else _status(cues),
        )
        for (begin, name), cues in zip(matches, marks, strict=True)
    ]


def _governed(
    cue: Cue, text: str, spans: list[tuple[int, int]], concepts: list[str], lexicon: _Lexicon
) -> list[int]:
    """Indices of the entities that a cue speaks about."""
    begin, end = cue.reach
    inside = [i for i, (b, e) in enumerate(spans) if begin <= b and e <= end]
    if not cue.forward:
        inside = [i for i in inside if not _CAUSE.search(text[max(0, spans[i][0] - 12) : spans[i][0]])]
    core = [i for i in inside if concepts[i] not in lexicon.places]
    denied_backward = not cue.forward and cue.status == "absent"
    if denied_backward and inside and concepts[inside[-1]] in lexicon.anatomy:
        between = text[spans[core[-1]][1] : spans[inside[-1]][0]] if core else ""
        # 结节淋巴门结构消失 denies the hilum next to the cue; "a mass in the breast is not seen" the mass.
        if not _PREPOSITION.search(between):
            return _listed_anatomy(inside, text, spans, concepts, lexicon)
    if not cue.forward and cue.status == "uncertain":
        conditions = [i for i in core if concepts[i] in lexicon.conditions]
        core = conditions or core
    if not core:
        if not cue.forward or cue.status == "uncertain":
            return []
        return [
            i
            for i in inside
            if concepts[i] in lexicon.anatomy
            and not (cue.forward and _PREPOSITION.search(text, cue.end, spans[i][0]))
        ]
    if not cue.forward:
        return core
    kept: list[int] = []
    for i in core:
        # "no mass in the enlarged liver" denies the mass, not what follows the preposition.
        if kept and _PREPOSITION.search(text[spans[kept[-1]][1] : spans[i][0]]):
            continue
        kept.append(i)
    return kept


def _listed_anatomy(
    inside: list[int], text: str, spans: list[tuple[int, int]], concepts: list[str], lexicon: _Lexicon
) -> list[int]:
    """The last of the entities and those listed with it ("the spleen and the kidney")."""
    listed = [inside[-1]]
    for i in reversed(inside[:-1]):
        if concepts[i] in lexicon.anatomy and _LIST.fullmatch(text[spans[i][1] : spans[listed[-1]][0]]):
            listed.append(i)
        else:
            break
    return listed


def _status(cues: list[Cue]) -> str:
    """Absent beats uncertain unless the doubt is about the denial ("possibly no effusion")."""
    if not cues:
        return "present"
    absent = [cue.begin for cue in cues if cue.status == "absent"]
    doubts = [cue.begin for cue in cues if cue.status == "uncertain" and cue.forward]
    if not absent or (doubts and min(doubts) < min(absent)):
        return "uncertain"
    return "absent"
