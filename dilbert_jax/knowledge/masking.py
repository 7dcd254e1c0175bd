"""Masked language modelling with the knowledge graph choosing what to mask first (ledger D8)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from dilbert_jax.knowledge.graph import EVENT_DESCRIBING, POSITIONAL, KnowledgeGraph
from dilbert_jax.knowledge.tokenizer import EncodedReport, ReportTokenizer

GUIDING = frozenset((*POSITIONAL, *EVENT_DESCRIBING))


@dataclasses.dataclass(frozen=True)
class MaskedReport:
    """A report with word pieces hidden; L = max_tokens.

    Attributes:
      token_ids: int32 [L], corrupted.
      token_types: int32 [L], 0 at every target position, so that the entity mark gives nothing away.
      target_mask: bool [L], True where the original word piece is to be predicted.
      targets: int32 [L], the original id at target positions, 0 elsewhere.
    """

    token_ids: np.ndarray
    token_types: np.ndarray
    target_mask: np.ndarray
    targets: np.ndarray


def related_entities(encoded: EncodedReport, graph: KnowledgeGraph) -> list[int]:
    """Finds the entities in positional or event-describing relation to another entity of the report.

    Args:
      encoded: the report; entities cut off by its length do not count.
      graph: the knowledge graph.

    Returns:
      Indices into ``encoded.entities``, ascending.
    """
    inside = sorted(set(encoded.entity_index[encoded.entity_index >= 0].tolist()))
    concepts = {encoded.entities[index].concept for index in inside}
    related = {
        concept
        for concept in concepts
        if any(
            relation.source in concepts and relation.target in concepts
            for relation in graph.neighbours(concept, GUIDING)
        )
    }
    return [index for index in inside if encoded.entities[index].concept in related]


def mask_report(
    encoded: EncodedReport,
    rng: np.random.Generator,
    tokenizer: ReportTokenizer,
    *,
    rate: float = 0.15,
    first: Sequence[int] = (),
) -> MaskedReport:
    """Hides word pieces for masked language modelling.

    Exactly max(1, round(rate * n)) of the n word pieces that are no special token become targets (none when
    n = 0). The entities named in ``first`` are taken first, in random order, each as a whole span while it
    fits; single random word pieces fill the rest. A target turns into [MASK] with probability
    0.8, into a random ordinary word piece with 0.1, and stays with 0.1.

    Args:
      encoded: the report.
      rng: source of randomness; the same state gives the same result.
      tokenizer: the tokenizer that encoded the report.
      rate: share of word pieces to hide, in (0, 1].
      first: indices into ``encoded.entities``, as of ``related_entities``; none chooses uniformly at random.

    Returns:
      The masked report.

    Raises:
      ValueError: ``rate`` outside (0, 1].
    """
    if not 0 < rate <= 1:
        raise ValueError(f"rate is {rate}; expected a share in (0, 1]")
    maskable = encoded.token_mask & tokenizer.is_ordinary[encoded.token_ids]
    available = np.flatnonzero(maskable)
    budget = max(1, round(rate * available.size)) if available.size else 0
    target_mask = np.zeros(encoded.token_ids.shape, bool)
    missing = budget
    if len(first) and budget:
        for index in rng.permutation(np.asarray(first, np.int64)):
            span = np.flatnonzero((encoded.entity_index == index) & maskable)
            if span.size <= missing:
                target_mask[span] = True
                missing -= span.size
            if not missing:
                break
    if missing:
        rest = np.flatnonzero(maskable & ~target_mask)
        target_mask[rng.choice(rest, missing, replace=False)] = True
    token_ids = encoded.token_ids.copy()
    positions = np.flatnonzero(target_mask)
    draws = rng.random(positions.size)
    ordinary = tokenizer.ordinary_ids
    replacements = rng.choice(ordinary, positions.size) if positions.size else ordinary[:0]
    token_ids[positions] = np.where(
        draws < 0.8, tokenizer.mask_id, np.where(draws < 0.9, replacements, token_ids[positions])
    )
    return MaskedReport(
        token_ids,
        np.where(target_mask, 0, encoded.token_types).astype(np.int32),
        target_mask,
        np.where(target_mask, encoded.token_ids, 0).astype(np.int32),
    )
