"""The ultrasound knowledge graph: concepts named in English and Chinese, and the relations between them."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import unicodedata
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

SCHEMA = "dilbert-jax/knowledge/1"
LANGUAGES = ("en", "zh")
CONCEPT_TYPES = ("organ", "region", "finding", "descriptor", "condition")
POSITIONAL = ("part_of", "located_at", "adjacent_to")
EVENT_DESCRIBING = ("shows", "moves_with", "causes", "modifies")
RELATION_TYPES = (*POSITIONAL, *EVENT_DESCRIBING, "suggestive_of", "synonym_of", "contradicts")
_ID = re.compile(r"[a-z][a-z0-9_]*")


@dataclasses.dataclass(frozen=True)
class Concept:
    """One thing a report can name.

    Attributes:
      id: lower-case identifier, unique in the graph.
      type: one of ``CONCEPT_TYPES``.
      names: language -> (preferred name, synonyms...); both languages always hold at least one.
      absent_names: language -> words that state the absence in themselves ("avascular", "不扩张").
    """

    id: str
    type: str
    names: Mapping[str, tuple[str, ...]]
    absent_names: Mapping[str, tuple[str, ...]]


@dataclasses.dataclass(frozen=True)
class Relation:
    """A directed, typed edge between two concept ids."""

    source: str
    type: str
    target: str


def fold(text: str) -> str:
    """Folds a name for comparison: compatibility form, lower case, hyphens as spaces, single spaces."""
    text = unicodedata.normalize("NFKC", text).lower()
    return re.sub(r"[\s\-\u2010-\u2015]+", " ", text).strip()


class KnowledgeGraph:
    """Concepts and relations, indexed for look-up; build it with ``load_graph``."""

    def __init__(self, concepts: Iterable[Concept], relations: Iterable[Relation]):
        """Indexes checked parts.

        Args:
          concepts: every concept, ids unique.
          relations: every relation, both ends among the concepts.
        """
        self.concepts: dict[str, Concept] = {concept.id: concept for concept in concepts}
        self.relations: tuple[Relation, ...] = tuple(dict.fromkeys(relations))
        edges: dict[str, list[Relation]] = {concept_id: [] for concept_id in self.concepts}
        for relation in self.relations:
            edges[relation.source].append(relation)
            if relation.target != relation.source:
                edges[relation.target].append(relation)
        self._edges = {concept_id: tuple(found) for concept_id, found in edges.items()}
        self._linked: dict[frozenset[str], frozenset[str]] = {}
        for relation in self.relations:
            pair = frozenset((relation.source, relation.target))
            self._linked[pair] = self._linked.get(pair, frozenset()) | {relation.type}
        self._allowed: dict[str, frozenset[str]] = {}

    def concept(self, concept_id: str) -> Concept:
        """Looks a concept up.

        Raises:
          ValueError: the id is not in the graph.
        """
        try:
            return self.concepts[concept_id]
        except KeyError:
            raise ValueError(
                f"concept {concept_id!r} is not in the knowledge graph; "
                "use an id of ultrasound.json or add it in an extension file"
            ) from None

    def name(self, concept_id: str, language: str) -> str:
        """Returns the preferred name of a concept.

        Args:
          concept_id: id of a concept in the graph.
          language: "en" or "zh".

        Raises:
          ValueError: unknown id or language.
        """
        return self.concept(concept_id).names[check_language(language)][0]

    def neighbours(self, concept_id: str, types: Iterable[str] | None = None) -> tuple[Relation, ...]:
        """Returns the relations that start or end at a concept.

        Args:
          concept_id: id of a concept in the graph.
          types: relation types to keep; all when None.

        Raises:
          ValueError: unknown id.
        """
        self.concept(concept_id)
        wanted = RELATION_TYPES if types is None else tuple(types)
        return tuple(relation for relation in self._edges[concept_id] if relation.type in wanted)

    def relation_types(self, first: str, second: str) -> frozenset[str]:
        """Returns the types of every relation between two concepts, in either direction."""
        return self._linked.get(frozenset((first, second)), frozenset())

    def parts(self, concept_id: str) -> frozenset[str]:
        """Returns a concept's parts (``part_of``, transitive), the concept itself included."""
        self.concept(concept_id)
        found, queue = {concept_id}, [concept_id]
        while queue:
            whole = queue.pop()
            for relation in self._edges[whole]:
                if relation.type == "part_of" and relation.target == whole and relation.source not in found:
                    found.add(relation.source)
                    queue.append(relation.source)
        return frozenset(found)

    def allows(self, organ: str, concept_id: str) -> bool:
        """Tells whether a concept can occur in an organ (or in a region such as ``abdomen``).

        A part or neighbour of the organ can. So can what the organ or a part of it ``shows``, what is
        ``located_at`` them, and what ``modifies`` any of these. A concept that is ``located_at`` some organs
        occurs in those organs only, whatever it modifies. ``synonym_of`` carries over.

        Args:
          organ: id of an organ or region.
          concept_id: id of any concept.

        Raises:
          ValueError: either id is unknown.
        """
        self.concept(concept_id)
        if organ not in self._allowed:
            self._allowed[organ] = self._reach(organ)
        return concept_id in self._allowed[organ]

    def conditions_of(self, organ: str) -> tuple[str, ...]:
        """Returns the ids of the conditions that an organ can be in, in the graph's order."""
        return tuple(
            c.id for c in self.concepts.values() if c.type == "condition" and self.allows(organ, c.id)
        )

    def _reach(self, organ: str) -> frozenset[str]:
        parts = self.parts(organ)
        near = {
            end
            for relation in self.neighbours(organ, ("adjacent_to",))
            for end in (relation.source, relation.target)
        }
        near |= {
            part for region in near if self.concepts[region].type == "region" for part in self.parts(region)
        }
        organs = {concept.id for concept in self.concepts.values() if concept.type == "organ"}
        # Parts are shared between organs (parenchyma, lobes): what names its organs stays inside them.
        homes = {
            concept_id: {r.target for r in edges if r.type == "located_at" and r.source == concept_id}
            & organs
            for concept_id, edges in self._edges.items()
        }
        inside = set(parts)
        for place in parts:
            for relation in self._edges[place]:
                if (relation.type == "shows" and relation.source == place) or (
                    relation.type == "located_at" and relation.target == place
                ):
                    inside.add(relation.target if relation.type == "shows" else relation.source)
        described = set(inside)
        for relation in self.relations:
            if relation.type == "modifies" and relation.target in inside:
                described.add(relation.source)
            if relation.type == "synonym_of" and {relation.source, relation.target} & inside:
                described |= {relation.source, relation.target}
        shown = {r.target for r in self._edges[organ] if r.type == "shows" and r.source == organ}
        kept = {c for c in described if c in parts | shown or not homes[c] or homes[c] & parts}
        # Organs come in as parts or neighbours only, not through what modifies or moves.
        return frozenset(c for c in kept | near if c not in organs or c in parts | near)


def check_language(language: str) -> str:
    """Returns the language when it is "en" or "zh", else raises ``ValueError``."""
    if language not in LANGUAGES:
        raise ValueError(f"language is {language!r}; expected one of {LANGUAGES}")
    return language


def load_graph(extra: Path | str | None = None) -> KnowledgeGraph:
    """Loads the ultrasound graph that ships with the package, merged with a user's own file.

    Args:
      extra: JSON file of the same shape (docs/knowledge.md). It may add concepts and relations, and names to
        existing concepts; it cannot change a concept's type or preferred names.

    Returns:
      The checked graph.

    Raises:
      ValueError: a file breaks the shape; the message names the file and the field.
    """
    return (
        _read_packaged()
        if extra is None
        else _build(_packaged_document(), ("ultrasound.json", str(extra)), extra)
    )


@functools.cache
def _read_packaged() -> KnowledgeGraph:
    return _build(_packaged_document(), ("ultrasound.json",), None)


def _packaged_document() -> Any:
    return json.loads((resources.files(__package__) / "ultrasound.json").read_text("utf-8"))


def _build(document: Any, sources: tuple[str, ...], extra: Path | str | None) -> KnowledgeGraph:
    concepts: dict[str, Concept] = {}
    owners: dict[tuple[str, str], str] = {}
    relations: list[Relation] = []
    documents = [document] if extra is None else [document, _read_json(Path(extra))]
    for source, content in zip(sources, documents, strict=True):
        _check_shape(content, source)
        for index, entry in enumerate(content.get("concepts", [])):
            concept = _read_concept(entry, f"{source}: concepts[{index}]", concepts)
            concepts[concept.id] = concept
            _claim_names(concept, source, owners)
        for index, entry in enumerate(content.get("relations", [])):
            relations.extend(_read_relations(entry, f"{source}: relations[{index}]", concepts))
    return KnowledgeGraph(concepts.values(), relations)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8-sig"))
    except OSError as error:
        raise ValueError(
            f"{path}: cannot be read ({error.strerror}); give the path of a JSON file"
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 text ({error.reason}); save it as UTF-8") from error
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}: line {error.lineno} is not valid JSON ({error.msg}); correct it"
        ) from error


def _check_shape(content: Any, source: str) -> None:
    if not isinstance(content, dict):
        raise ValueError(
            f"{source}: found {type(content).__name__}; expected an object with 'concepts' and 'relations'"
        )
    if content.get("schema") != SCHEMA:
        raise ValueError(f"{source}: field 'schema' is {content.get('schema')!r}; expected {SCHEMA!r}")
    unknown = sorted(set(content) - {"schema", "concepts", "relations"})
    if unknown:
        raise ValueError(
            f"{source}: unknown field {unknown[0]!r}; expected 'schema', 'concepts', 'relations'"
        )
    for field in ("concepts", "relations"):
        if not isinstance(content.get(field, []), list):
            raise ValueError(f"{source}: field {field!r} is {type(content[field]).__name__}; expected a list")


def _read_concept(entry: Any, where: str, known: Mapping[str, Concept]) -> Concept:
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: found {entry!r}; expected an object with 'id', 'type', 'en', 'zh'")
    unknown = sorted(set(entry) - {"id", "type", "absent", *LANGUAGES})
    if unknown:
        raise ValueError(
            f"{where}: unknown field {unknown[0]!r}; expected 'id', 'type', 'en', 'zh', 'absent'"
        )
    concept_id = entry.get("id")
    if not isinstance(concept_id, str) or not _ID.fullmatch(concept_id):
        raise ValueError(
            f"{where}: field 'id' is {concept_id!r}; expected lower-case letters, digits, underscores"
        )
    before = known.get(concept_id)
    kind = entry.get("type", before.type if before else None)
    if kind not in CONCEPT_TYPES:
        raise ValueError(
            f"{where}: field 'type' of {concept_id!r} is {kind!r}; expected one of {CONCEPT_TYPES}"
        )
    if before and kind != before.type:
        raise ValueError(
            f"{where}: field 'type' of {concept_id!r} is {kind!r}; it is already a {before.type!r}"
        )
    absent = entry.get("absent", {})
    if not isinstance(absent, dict) or set(absent) - set(LANGUAGES):
        raise ValueError(
            f"{where}: field 'absent' of {concept_id!r} is {absent!r}; expected names under 'en', 'zh'"
        )
    names = {}
    absent_names = {}
    for language in LANGUAGES:
        added = _read_names(entry.get(language, []), language, concept_id, where)
        names[language] = tuple(dict.fromkeys((*(before.names[language] if before else ()), *added)))
        if not names[language]:
            raise ValueError(f"{where}: field {language!r} of {concept_id!r} has no name; give at least one")
        added = _read_names(absent.get(language, []), f"absent.{language}", concept_id, where)
        absent_names[language] = tuple(
            dict.fromkeys((*(before.absent_names[language] if before else ()), *added))
        )
    return Concept(concept_id, kind, names, absent_names)


def _read_names(value: Any, field: str, concept_id: str, where: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(name, str) and fold(name) for name in value):
        raise ValueError(
            f"{where}: field {field!r} of {concept_id!r} is {value!r}; expected a list of non-empty names"
        )
    return value


def _claim_names(concept: Concept, source: str, owners: dict[tuple[str, str], str]) -> None:
    for language in LANGUAGES:
        for name in (*concept.names[language], *concept.absent_names[language]):
            owner = owners.setdefault((language, fold(name)), concept.id)
            if owner != concept.id:
                raise ValueError(
                    f"{source}: field {language!r} of {concept.id!r} holds {name!r}, which already names "
                    f"{owner!r}; a name may stand for one concept only"
                )
        both = {fold(n) for n in concept.names[language]} & {fold(n) for n in concept.absent_names[language]}
        if both:
            raise ValueError(
                f"{source}: {concept.id!r} lists {min(both)!r} as a name and as an 'absent' name; keep one"
            )


def _read_relations(entry: Any, where: str, concepts: Mapping[str, Concept]) -> Iterable[Relation]:
    if not isinstance(entry, dict) or set(entry) != {"source", "type", "target"}:
        raise ValueError(f"{where}: found {entry!r}; expected an object with 'source', 'type', 'target'")
    if entry["type"] not in RELATION_TYPES:
        raise ValueError(f"{where}: field 'type' is {entry['type']!r}; expected one of {RELATION_TYPES}")
    ends = {}
    for field in ("source", "target"):
        value = entry[field]
        ends[field] = [value] if isinstance(value, str) else value
        if not isinstance(ends[field], list) or not ends[field]:
            raise ValueError(f"{where}: field {field!r} is {value!r}; expected a concept id or a list of ids")
        for concept_id in ends[field]:
            if not isinstance(concept_id, str) or concept_id not in concepts:
                raise ValueError(f"{where}: field {field!r} names {concept_id!r}; no such concept is defined")
    for source in ends["source"]:
        for target in ends["target"]:
            if source == target:
                raise ValueError(
                    f"{where}: {source!r} is related to itself; remove it from 'source' or 'target'"
                )
            yield Relation(source, entry["type"], target)
