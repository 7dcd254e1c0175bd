"""Which findings and entities are present: thresholds on probabilities, chosen on validation studies."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import numpy as np

from dilbert_jax.labels import LabelSpace


@dataclasses.dataclass(frozen=True)
class Thresholds:
    """From which probability on a finding or an entity counts as present; chosen on validation studies."""

    findings: dict[str, float]
    entities: dict[str, float]
    default: float = 0.5

    def finding(self, concept: str) -> float:
        return self.findings.get(concept, self.default)

    def entity(self, concept: str) -> float:
        return self.entities.get(concept, self.default)

    def save(self, path: pathlib.Path) -> None:
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1), encoding="utf-8")

    @classmethod
    def load(cls, path: pathlib.Path) -> Thresholds:
        return cls(**json.loads(path.read_text(encoding="utf-8")))


def choose_threshold(probabilities: np.ndarray, targets: np.ndarray, min_positives: int = 5) -> float | None:
    """The probability that gives the best F1, or None when there are too few positives to choose by.

    Args:
      probabilities: [N]; targets: bool [N].
    """
    positives = int(targets.sum())
    if positives < min_positives or positives == len(targets):
        return None
    order = np.argsort(-probabilities, kind="stable")
    hits = np.cumsum(targets[order])
    f1 = 2 * hits / (np.arange(1, len(order) + 1) + positives)
    # Only between two different values is there a threshold.
    sorted_probabilities = probabilities[order]
    f1[:-1][sorted_probabilities[:-1] == sorted_probabilities[1:]] = -1.0
    best = int(f1.argmax())
    following = sorted_probabilities[best + 1] if best + 1 < len(order) else 0.0
    return float(np.clip((sorted_probabilities[best] + following) / 2, 0.05, 0.95))


def decide_findings(labels: LabelSpace, thresholds: Thresholds, probabilities: np.ndarray) -> np.ndarray:
    """Which findings are present: bool [N, F] from probabilities [N, F].

    Those that reach their threshold; of two that exclude each other the more probable.
    """
    index = {concept: i for i, concept in enumerate(labels.findings)}
    excludes = np.zeros((len(index), len(index)), bool)
    for first, second in labels.exclusive:
        excludes[index[first], index[second]] = excludes[index[second], index[first]] = True
    present = probabilities >= np.asarray([thresholds.finding(f) for f in labels.findings])
    for row, ranked in zip(present, np.argsort(-probabilities, axis=1, kind="stable"), strict=True):
        for finding in ranked:
            if row[finding]:
                row[excludes[finding]] = False
    return present
