"""The ultrasound knowledge graph and everything that reads a report with it."""

from dilbert_jax.knowledge.graph import (
    CONCEPT_TYPES,
    EVENT_DESCRIBING,
    POSITIONAL,
    RELATION_TYPES,
    Concept,
    KnowledgeGraph,
    Relation,
    load_graph,
)

__all__ = [
    "CONCEPT_TYPES",
    "EVENT_DESCRIBING",
    "POSITIONAL",
    "RELATION_TYPES",
    "Concept",
    "KnowledgeGraph",
    "Relation",
    "load_graph",
]
