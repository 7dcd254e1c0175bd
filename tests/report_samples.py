"""Made-up inputs of the report's tests: an annotation, its frames, a history and an evaluation."""

from __future__ import annotations

from typing import Any

import numpy as np

from dilbert_jax.evaluation import metrics
from dilbert_jax.knowledge import load_graph

GRAPH = load_graph()
ORGANS = ["breast", "thyroid", "liver", "gallbladder", "kidney", "lung", "heart"]
CONDITIONS = ["normal", "cyst", "benign_lesion", "malignant_lesion", "stone", "diffuse_disease"]
FINDINGS = [
    "nodule",
    "mass",
    "calcification",
    "posterior_enhancement",
    "posterior_shadowing",
    "pulsation",
    "hypoechoic",
]
ENTITIES = [
    "liver",
    "cyst",
    "anechoic",
    "posterior_enhancement",
    "vessel",
    "round",
    "nodule",
    "gallbladder",
    "stone",
]


def names_of(concept: str) -> dict[str, str]:
    return {language: GRAPH.name(concept, language) for language in ("en", "zh")}


def make_frames(num_frames: int = 24, height: int = 240, width: int = 320, seed: int = 0) -> np.ndarray:
    """Speckle in a sector with a dark round lesion that drifts: uint8 [T, H, W]."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / height
    middle = width / height / 2
    depth = np.hypot(y + 0.25, x - middle)
    sector = (np.abs(np.arctan2(x - middle, y + 0.25)) < 0.62) & (depth < 1.2) & (depth > 0.3)
    frames = np.zeros((num_frames, height, width), np.uint8)
    for t in range(num_frames):
        noise = rng.rayleigh(1.0, (height // 2, width // 2)).repeat(2, 0).repeat(2, 1)[:height, :width]
        tissue = 70 + 30 * np.log(noise + 0.05) - 25 * y
        lesion = np.hypot(y - 0.5, x - middle - 0.1 + 0.004 * t) < 0.13
        tissue[lesion] -= 75
        shadow = (np.abs(x - middle - 0.1 + 0.004 * t) < 0.1) & (y > 0.63)
        tissue[shadow] += 28
        frames[t] = np.clip(np.where(sector, tissue, 0), 0, 255)
    return frames


def make_annotation(
    frames: np.ndarray, file: str = "IM_0017.dcm", seed: int = 0, max_steps: int = 8
) -> dict[str, Any]:
    """An annotation of `frames` in the documented schema, with a grid of regions on every described frame."""
    rng = np.random.default_rng(seed)
    index = np.unique(np.linspace(0, len(frames) - 1, max_steps).round().astype(int)).tolist()
    regions = []
    for frame in index[::2]:
        for row in range(2):
            for column in range(3):
                box = [0.1 + 0.42 * row, 0.12 + 0.26 * column, 0.5 + 0.42 * row, 0.36 + 0.26 * column]
                label = ["liver", "lesion", "vessel"][column]
                regions.append(
                    {
                        "frame": frame,
                        "box": [round(v, 4) for v in box],
                        "label": label,
                        "name": names_of(label),
                        "probability": round(float(rng.uniform(0.4, 0.95)), 4),
                    }
                )
    entities = []
    for rank, concept in enumerate(ENTITIES):
        strength = 0.96 - 0.11 * rank
        frame_scores = np.clip(strength * rng.beta(5, 2, len(index)) * 1.2, 0, 1)
        region_scores = np.clip(strength * rng.beta(1.2, 2.5, len(regions)) * 1.4, 0, 1)
        entities.append(
            {
                "id": concept,
                "type": GRAPH.concepts[concept].type,
                "name": names_of(concept),
                "score": round(strength, 4),
                "supported": strength > 0.5,
                "frame_scores": frame_scores.round(4).tolist(),
                "region_scores": region_scores.round(4).tolist(),
            }
        )

    def ranked(ids: list[str], first: str, probability: float) -> dict[str, Any]:
        others = [c for c in ids if c != first]
        shares = (1 - probability) * np.sort(rng.dirichlet(np.ones(len(others))))[::-1]
        return {
            "id": first,
            "name": names_of(first),
            "probability": probability,
            "alternatives": [
                {"id": c, "name": names_of(c), "probability": round(float(p), 4)}
                for c, p in zip(others, shares, strict=True)
            ],
        }

    findings = []
    for concept, probability in zip(FINDINGS, (0.08, 0.11, 0.22, 0.91, 0.31, 0.04, 0.77), strict=True):
        findings.append(
            {
                "id": concept,
                "name": names_of(concept),
                "probability": probability,
                "threshold": 0.45,
                "present": probability >= 0.45,
            }
        )
    return {
        "schema": "dilbert-jax/annotation/1",
        "notice": "Research use only. Not for clinical use.",
        "source": {
            "file": file,
            "sha256": "9f2c5d" + "0a1b" * 14 + "77",
            "num_frames": len(frames),
            "height": int(frames.shape[1]),
            "width": int(frames.shape[2]),
            "fps": 24.0,
            "pixel_spacing_mm": [0.21, 0.21],
            "decoder": "pydicom 3.0 pylibjpeg",
        },
        "model": {
            "network": "student",
            "stage": "finetune",
            "step": 1200,
            "version": "0.1.0",
            "dataset": "phantom",
        },
        "organ": ranked(ORGANS, "liver", 0.93),
        "condition": ranked(CONDITIONS, "cyst", 0.71),
        "findings": sorted(findings, key=lambda f: -f["probability"]),
        "entities": entities,
        "frame_index": index,
        "regions": regions,
        "description": {
            "en": "Liver: a round, anechoic lesion with posterior enhancement, in keeping with a cyst. "
            "No calcification is seen.",
            "zh": "肝脏:可见圆形无回声病灶,后方回声增强,考虑囊肿。未见钙化。",
        },
    }


def make_history(steps: int = 400, seed: int = 0) -> list[dict[str, Any]]:
    """Records as training writes them: four stages, two networks, a validation record at the end of each."""
    rng = np.random.default_rng(seed)
    terms = {
        "teacher": [f"teacher/{t}" for t in ("mlm", "mdc", "moc", "cmm", "loss")],
        "student": [f"student/{t}" for t in ("mlm", "mdc", "moc", "cmm", "soft_labels", "loss")],
        "mutual": [
            f"{n}/{t}" for n in ("teacher", "student") for t in ("mlm", "mdc", "moc", "cmm", "soft_labels")
        ]
        + ["relational_distance", "relational_angle", "loss"],
        "finetune": [
            f"{n}/{t}" for n in ("teacher", "student") for t in ("organ", "condition", "findings", "match")
        ],
    }
    history = []
    for stage, keys in terms.items():
        start = {k: rng.uniform(0.5, 5) for k in keys}
        rate = {k: rng.uniform(1, 5) for k in keys}
        for step in range(5, steps + 1, 5):
            values = {
                k: float(start[k] * (0.25 + 0.75 * np.exp(-rate[k] * step / steps)) * rng.normal(1, 0.06))
                for k in keys
            }
            history.append(
                {
                    "stage": stage,
                    "step": step,
                    "epoch": step / 20,
                    "split": "train",
                    "learning_rate": 0.024 * min(1, step / 20) * (1 + np.cos(np.pi * step / steps)) / 2,
                    "clips_per_second": 40.0,
                    "student/gradient_norm": 1.0,
                    **values,
                }
            )
        history.append(
            {"stage": stage, "step": steps, "split": "validation", **{k: v * 1.1 for k, v in values.items()}}
        )
    return history


def make_evaluation(seed: int = 0, num: int = 90, num_groups: int = 30) -> dict[str, Any]:
    """An evaluation whose figures come from made-up answers of known quality."""
    rng = np.random.default_rng(seed)
    groups = np.asarray([f"p{i:03d}" for i in rng.integers(0, num_groups, num)])
    organ = rng.integers(0, len(ORGANS), num)
    condition = rng.choice(len(CONDITIONS), num, p=[0.4, 0.2, 0.15, 0.1, 0.1, 0.05])
    findings = rng.random((num, len(FINDINGS))) < [0.5, 0.3, 0.2, 0.2, 0.15, 0.1, 0.4]

    def answers(right: float) -> dict[str, Any]:
        def spoil(targets: np.ndarray, classes: int) -> np.ndarray:
            return np.where(rng.random(num) < right, targets, rng.integers(0, classes, num))

        flipped = np.where(rng.random(findings.shape) < right, findings, ~findings)
        return {
            "organ": metrics.classification_report(organ, spoil(organ, len(ORGANS)), ORGANS, groups),
            "condition": metrics.classification_report(
                condition, spoil(condition, len(CONDITIONS)), CONDITIONS, groups
            ),
            "findings": metrics.multilabel_report(findings, flipped, FINDINGS, groups),
        }

    def pretraining(gain: float) -> dict[str, Any]:
        def task(first: float, tenth: float, classes: int) -> dict[str, Any]:
            return {
                "recall_at_1": first * gain,
                "recall_at_10": tenth,
                "chance_at_1": 1 / classes,
                "chance_at_10": min(1, 10 / classes),
                "frequent_at_1": 3 / classes,
                "frequent_at_10": min(1, 25 / classes),
                "num": 812,
                "num_classes": classes,
            }

        return {
            "mlm": task(0.62, 0.91, 640),
            "mdc": task(0.71, 0.97, 42),
            "moc": task(0.55, 1.0, 9),
            "cmm": {"accuracy": 0.83 * gain, "chance": 0.52, "num": 90},
        }

    baseline = {
        "organ": metrics.majority_baseline(organ, organ, ORGANS, groups),
        "condition": metrics.majority_baseline(condition, condition, CONDITIONS, groups),
        "findings": metrics.majority_baseline(findings, findings, FINDINGS, groups),
    }
    return {
        "schema": "dilbert-jax/evaluation/1",
        "dataset": "phantom",
        "split": "test",
        "fold": None,
        "num_clips": num,
        "num_groups": len(set(groups)),
        "device": "cpu (2 cores)",
        "command": "python eval.py --workdir=runs/quickstart",
        "versions": {"dilbert_jax": "0.1.0", "jax": "0.10.0", "flax": "0.12.1", "numpy": "2.3.1"},
        "synthetic_reports": True,
        "seed": 0,
        "system": "dilbert",
        "parameters": 798063,
        "flops_per_clip": 5867456,
        "networks": {
            "teacher": {"pretraining": pretraining(0.95), "annotation": answers(0.78)},
            "student": {"pretraining": pretraining(1.0), "annotation": answers(0.84)},
        },
        "baseline": {
            "majority": baseline,
            "always_present": {"findings": metrics.constant_report(findings, FINDINGS, groups)},
        },
    }
