"""The output spaces of a run: the organs, conditions, findings, region classes and entities told apart."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import pathlib
from collections.abc import Iterable, Sequence

from dilbert_jax.knowledge import KnowledgeGraph


@dataclasses.dataclass(frozen=True)
class LabelSpace:
    """Ordered concept ids of every output head; an index into one of these tuples is a label.

    Attributes:
      organs, conditions, findings: targets of fine-tuning.
      classes: findings, conditions and organs together, the classes of masked description classification (D9).
      regions: organ and tissue classes of masked organ classification.
      entities: candidates that annotation matches with regions and frames.
      exclusive: pairs of findings that contradict each other and never came together in a training study. Others may
        both hold: a clip can show two lesions.
    """

    organs: tuple[str, ...]
    conditions: tuple[str, ...]
    findings: tuple[str, ...]
    regions: tuple[str, ...]
    entities: tuple[str, ...]
    exclusive: tuple[tuple[str, str], ...] = ()

    @property
    def classes(self) -> tuple[str, ...]:
        return self.findings + self.conditions + self.organs

    def save(self, path: pathlib.Path) -> None:
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def load(cls, path: pathlib.Path) -> LabelSpace:
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            pairs = tuple((first, second) for first, second in fields.pop("exclusive", ()))
            return cls(**{name: tuple(ids) for name, ids in fields.items()}, exclusive=pairs)
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: not a label space ({error}); restore it or train again") from None


def build_label_space(
    organs: Iterable[str],
    conditions: Iterable[str],
    findings: Iterable[Sequence[str]],
    regions: Iterable[str],
    entities: Iterable[Sequence[str]],
    graph: KnowledgeGraph,
    min_count: int = 3,
) -> LabelSpace:
    """Collects the label space of a data set.

    Args:
      organs, conditions: one id a study; "" (unknown) is left out.
      findings: the findings of each study.
      regions: labels of all annotated boxes.
      entities: concepts present in each *training* study (report and labels).
      graph: gives the order, so that the same data always give the same indices.
      min_count: entities held by fewer training studies are no candidates.
    """
    rank = {concept: index for index, concept in enumerate(graph.concepts)}

    def order(ids: Iterable[str]) -> tuple[str, ...]:
        present = {i for i in ids if i}
        unknown = sorted(present - rank.keys())
        if unknown:
            raise ValueError(
                f"labels {unknown} are not in the knowledge graph; add them with a graph extension file"
            )
        return tuple(sorted(present, key=rank.__getitem__))

    organs, held = list(organs), [set(study) for study in entities]
    counts = collections.Counter(concept for study in held for concept in study)
    found = order(f for study in findings for f in study)
    return LabelSpace(
        organs=order(organs),
        conditions=order(conditions),
        findings=found,
        regions=order([*regions, *organs]),
        entities=order(c for c, n in counts.items() if n >= min_count),
        exclusive=tuple(
            pair
            for pair in itertools.combinations(found, 2)
            if "contradicts" in graph.relation_types(*pair)
            and not any(study.issuperset(pair) for study in held)
        ),
    )
