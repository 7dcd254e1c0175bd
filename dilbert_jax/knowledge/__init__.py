"""The ultrasound knowledge graph and everything that reads a report with it."""

from dilbert_jax.knowledge.captions import caption
from dilbert_jax.knowledge.describe import describe
from dilbert_jax.knowledge.entities import Entity, extract_entities
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
from dilbert_jax.knowledge.masking import MaskedReport, mask_report, related_entities
from dilbert_jax.knowledge.tokenizer import EncodedReport, ReportTokenizer

__all__ = [
    "CONCEPT_TYPES",
    "EVENT_DESCRIBING",
    "POSITIONAL",
    "RELATION_TYPES",
    "Concept",
    "EncodedReport",
    "Entity",
    "KnowledgeGraph",
    "MaskedReport",
    "Relation",
    "ReportTokenizer",
    "caption",
    "describe",
    "extract_entities",
    "load_graph",
    "mask_report",
    "related_entities",
]
