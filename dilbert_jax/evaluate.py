"""Evaluates a trained run on its test studies: the four pre-training tasks, annotation, eval.json and report.html."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import dilbert_jax
from dilbert_jax.annotation import compose, predict
from dilbert_jax.clips import select_evenly
from dilbert_jax.evaluation.metrics import (
    classification_report,
    majority_predictions,
    multilabel_report,
)
from dilbert_jax.evaluation.retrieval import matching_accuracy, recall_at_k
from dilbert_jax.experiment import Experiment, open_experiment
from dilbert_jax.flops import count_flops, count_parameters
from dilbert_jax.input_pipeline import evaluation_batches
from dilbert_jax.models.network import Network
from dilbert_jax.report import RANKED_TASKS, render_report
from dilbert_jax.thresholds import Thresholds, choose_threshold, decide_findings
from dilbert_jax.training.log import read_metrics
from dilbert_jax.training.objectives import annotation_forward, pretraining_forward, task_masks, task_targets
from dilbert_jax.training.stages import network_names, network_params, stage_names
from dilbert_jax.training.step import device_entries

Decisions = dict[str, dict[str, Any]]
SCHEMA = "dilbert-jax/evaluation/1"
BATCH_SIZE = 32
COUNTED_EXAMPLES = 2000  # of training, that say how frequent each answer is


def evaluate(
    config: Any, workdir: pathlib.Path, *, split: str = "test", command: str = "", progress: bool = True
) -> dict[str, Any]:
    """Evaluates both networks of a finished run and writes eval.json and report.html into the workdir.

    Args:
      config: the run's configuration.
      workdir: a run whose stages are complete.
      split: which studies; thresholds always come from validation.
      command: what the user typed, for the record.
      progress: show a progress bar.

    Returns:
      The content of eval.json (docs/evaluation.md).
    """
    experiment = open_experiment(config, workdir)
    context, store = experiment.context, experiment.store
    indices = experiment.indices[split]
    if not len(indices):
        raise ValueError(f"data set {config.data.name!r} has no {split} study to evaluate on")
    resamples = config.evaluate.num_resamples
    networks: dict[str, Any] = {}
    predictions, thresholds, decided = {}, {}, {}
    for network in tqdm(network_names(config), desc="evaluating", unit="network", disable=not progress):
        params, _ = network_params(context, workdir, stage_names(config)[-2], network)  # pre-trained
        pretraining = _pretraining_tasks(experiment, params, indices)
        params, step = network_params(context, workdir, "finetune", network)
        thresholds[network] = _choose_thresholds(experiment, params)
        predictions[network] = predict_all(experiment, params, indices)
        decided[network] = _decide(experiment, predictions[network], indices, thresholds[network])
        networks[network] = {
            "step": step,
            "pretraining": pretraining,
            "annotation": report_decisions(decided[network], resamples),
        }
    baselines = _baseline_decisions(experiment, decided["student"])
    _save_decisions(decided | baselines, workdir / "decisions.json")
    thresholds["student"].save(workdir / "thresholds.json")
    evaluation = {
        "schema": SCHEMA,
        "dataset": config.data.name,
        "split": split,
        "fold": config.data.fold if config.data.folds else None,
        "folds": config.data.folds or None,
        "num_clips": len(indices),
        "num_groups": len({store.studies[i].group_id for i in indices}),
        "num_train_clips": len(experiment.indices["train"]),
        "device": str(jax.devices()[0].device_kind),
        "command": command,
        "versions": {
            "dilbert-jax": dilbert_jax.__version__,
            **{name: importlib.metadata.version(name) for name in ("jax", "flax", "optax", "numpy")},
        },
        "synthetic_reports": sum(store.studies[i].report_is_synthetic for i in indices),
        "synthetic_data": config.data.name.partition("/")[0] == "phantom",
        "data_fingerprint": experiment.dataset["fingerprint"],
        "seed": config.seed,
        "system": config.model.name,
        "parameters": count_parameters(params),
        "flops_per_clip": _annotation_flops(experiment, params),
        "networks": networks,
        "baseline": {name: report_decisions(d, resamples) for name, d in baselines.items()},
    }
    (workdir / "eval.json").write_text(
        json.dumps(evaluation, indent=1, ensure_ascii=False, allow_nan=False), encoding="utf-8"
    )
    examples = example_annotations(
        experiment,
        predictions["student"],
        indices,
        thresholds["student"],
        networks["student"]["step"],
        config.evaluate.num_examples,
    )
    history = read_metrics(workdir / "metrics.jsonl") if (workdir / "metrics.jsonl").exists() else []
    render_report(evaluation, history, examples, workdir / "report.html", graph=context.graph)
    return evaluation


def _annotation_flops(experiment: Experiment, params: Any) -> int:
    """Model FLOPs of annotating one clip."""
    context = experiment.context
    index = int(experiment.indices["train"][0])
    example = experiment.builder.annotation(index, np.random.default_rng(0), train=False)
    batch = {k: jax.ShapeDtypeStruct((1, *np.shape(v)), np.asarray(v).dtype) for k, v in example.items()}
    names = jnp.asarray(context.entity_names[0]), jnp.asarray(context.entity_names[1])
    forward = functools.partial(annotation_forward, context.model, names=names, dropout=None)
    return count_flops(lambda p, b: forward(p, b)[0], params, device_entries(batch))


def summarize(evaluation: dict[str, Any]) -> str:
    """A few lines for the console: the main figures of both networks with their 95 % intervals."""
    cost = f"{evaluation['parameters'] / 1e6:.2f} M parameters, {evaluation['flops_per_clip'] / 1e6:.0f} MFLOP a clip"
    clips = f"{evaluation['num_clips']} {evaluation['split']} clips of {evaluation['num_groups']} groups"
    lines = [f"{evaluation['system']} ({cost}): {clips}"]
    for network, result in evaluation["networks"].items():
        parts = [f"CMM accuracy {result['pretraining']['cmm']['accuracy']:.3f}"]
        for head, report in result["annotation"].items():
            name, interval = (
                ("accuracy", report["accuracy"]) if head == "organ" else ("macro F1", report["macro"]["f1"])
            )
            text = f"{head} {name} {interval['value']:.3f}"
            if interval["low"] is not None:
                text += f" [{interval['low']:.3f}, {interval['high']:.3f}]"
            parts.append(text)
        lines.append(f"{network}: " + ", ".join(parts))
    return "\n".join(lines)


def _pretraining_tasks(experiment: Experiment, params: Any, indices: np.ndarray) -> dict[str, Any]:
    """R@1, R@10 and chance of MLM, MDC and MOC, accuracy of CMM, on masked copies of the clips."""
    context = experiment.context
    config = context.config
    forward = _compiled_answers(context.model)
    collected: dict[str, list[np.ndarray]] = {}
    # Words masked at random, and words that the graph chose: systems that were trained on either answer both.
    for guided in (False, True):
        for inputs, questions in _ask(experiment, indices, guided, config.evaluate.mask_repeats):
            logits = jax.device_get(forward(params, inputs))
            for name, (task, mask, targets) in questions.items():
                collected.setdefault(f"{name}/logits", []).append(logits[task][mask])
                collected.setdefault(f"{name}/targets", []).append(targets[mask])
    joined = {name: np.concatenate(values) for name, values in collected.items()}
    ranked = [task for task in RANKED_TASKS if task != "cmm"]
    counts = count_answers(experiment, {task: joined[f"{task}/logits"].shape[1] for task in ranked})
    # What every training clip holds, as the organ of a set with one organ, is no answer to be ranked.
    told_apart = {}
    if context.loss.mdc_target == "description":
        train = experiment.indices["train"]
        held = np.sum([experiment.builder.targets(int(i))["classes"] for i in train], axis=0)
        told_apart["mdc"] = held < len(train)
    tasks = {
        task: rank_classes(
            joined[f"{task}/logits"], joined[f"{task}/targets"], counts[task], told_apart.get(task)
        )
        for task in ranked
    }
    tasks["cmm"] = matching_accuracy(joined["cmm/logits"], joined["cmm/targets"])
    return tasks


@functools.lru_cache(maxsize=4)
def _compiled_answers(model: Network) -> Any:
    """Logits of the pre-training tasks, compiled once for all networks of a run."""
    return jax.jit(lambda params, batch: pretraining_forward(model, params, batch, None)[0])


def rank_classes(
    logits: np.ndarray, targets: np.ndarray, counts: np.ndarray, kept: np.ndarray | None = None
) -> dict[str, Any]:
    """`recall_at_k` among the classes that are `kept` (bool [C]; None = all)."""
    if kept is not None:
        logits, targets, counts = logits[:, kept], targets[:, kept], counts[kept]
    return recall_at_k(logits, targets, training_counts=counts)


def _ask(
    experiment: Experiment, indices: np.ndarray, guided: bool, repeats: int
) -> Iterator[tuple[dict[str, jax.Array], dict[str, tuple[str, np.ndarray, np.ndarray]]]]:
    """Batches of masked clips, and of each question its task, which positions are asked, and the right answers."""
    loss = experiment.context.loss
    build = functools.partial(experiment.builder.pretraining, guided=guided)
    for batch, real in evaluation_batches(build, indices, BATCH_SIZE, seed=7, repeats=repeats):
        inputs = {k: jnp.asarray(v) for k, v in device_entries(batch).items()}
        masks, targets = jax.device_get((task_masks(inputs, loss), task_targets(inputs, loss)))
        yield (
            inputs,
            {
                f"{task}_guided" if guided else task: (
                    task,
                    masks[task] & real.reshape(-1, *[1] * (masks[task].ndim - 1)),
                    targets[task],
                )
                for task in (("mlm",) if guided else ("mlm", "mdc", "moc", "cmm"))
            },
        )


def count_answers(experiment: Experiment, num_classes: Mapping[str, int]) -> dict[str, np.ndarray]:
    """How often each class is the right answer where training clips are asked, masked as those of the test are."""
    train = experiment.indices["train"]
    train = train[select_evenly(len(train), COUNTED_EXAMPLES)]
    counts = {name: np.zeros(num, np.int64) for name, num in num_classes.items()}
    for guided in (False, True):
        for _, questions in _ask(experiment, train, guided, -(-COUNTED_EXAMPLES // len(train))):
            for name in counts.keys() & questions.keys():
                _, mask, targets = questions[name]
                right = targets[mask]
                counts[name] += (
                    right.sum(0) if right.ndim == 2 else np.bincount(right, minlength=num_classes[name])
                )
    return counts


def predict_all(experiment: Experiment, params: Any, indices: np.ndarray) -> dict[str, np.ndarray]:
    """Annotation probabilities of every study, in order, with the examples they came from."""
    rows: dict[str, list[np.ndarray]] = {}
    for batch, real in evaluation_batches(experiment.builder.annotation, indices, BATCH_SIZE, seed=7):
        output = predict(experiment.context, params, batch)
        for name, values in {**output, **{f"batch/{k}": v for k, v in batch.items()}}.items():
            rows.setdefault(name, []).append(values[real])
    return {name: np.concatenate(values) for name, values in rows.items()}


def _choose_thresholds(experiment: Experiment, params: Any) -> Thresholds:
    """Best-F1 thresholds on the validation studies."""
    labels, indices = experiment.context.labels, experiment.indices["validation"]
    if not len(indices):
        return Thresholds({}, {})
    output = predict_all(experiment, params, indices)

    def choose(
        ids: tuple[str, ...], probabilities: np.ndarray, targets: np.ndarray, mask: np.ndarray
    ) -> dict[str, float]:
        chosen = {}
        for column, concept in enumerate(ids):
            keep = mask[:, column]
            value = choose_threshold(probabilities[keep, column], targets[keep, column])
            if value is not None:
                chosen[concept] = value
        return chosen

    finding_mask = np.repeat(output["batch/findings_mask"][:, None], len(labels.findings), 1)
    return Thresholds(
        findings=choose(labels.findings, output["findings"], output["batch/findings"], finding_mask),
        entities=choose(
            labels.entities, output["entities"], output["batch/entities"], output["batch/entities_mask"]
        ),
    )


def _decide(
    experiment: Experiment, output: dict[str, np.ndarray], indices: np.ndarray, thresholds: Thresholds
) -> Decisions:
    """What a network answers in each head, beside what is true; unlabelled studies are left out."""
    labels = experiment.context.labels
    studies = [experiment.store.studies[i] for i in indices]
    decisions: Decisions = {}

    def add(
        head: str, ids: Sequence[str], targets: np.ndarray, predictions: np.ndarray, known: np.ndarray
    ) -> None:
        if len(ids) and known.any():
            decisions[head] = {
                "class_ids": list(ids),
                "targets": targets[known],
                "predictions": predictions[known],
                "groups": np.asarray([s.group_id for s in studies])[known],
                "study_ids": np.asarray([s.study_id for s in studies])[known],
            }

    for head, ids in (("organ", labels.organs), ("condition", labels.conditions)):
        targets = output[f"batch/{head}"]
        if len(ids) > 1:
            add(head, ids, targets, output[head].argmax(-1), targets >= 0)
    known = output["batch/findings_mask"]
    decided = decide_findings(labels, thresholds, output["findings"])
    add("findings", labels.findings, output["batch/findings"], decided, known)
    # An uncertain entity counts neither way: it is answered as it is labelled, absent.
    limits = np.asarray([thresholds.entity(e) for e in labels.entities])
    sure = output["batch/entities_mask"]
    everything = np.ones(len(indices), bool)
    targets, predictions = output["batch/entities"] & sure, (output["entities"] >= limits) & sure
    add("entities", labels.entities, targets, predictions, everything)
    return decisions


def report_decisions(decisions: Decisions, num_resamples: int) -> dict[str, Any]:
    """Sensitivity, precision and F1 (14)-(16) of every head, with intervals over groups."""
    reports = {}
    for head, d in decisions.items():
        targets, predictions = np.asarray(d["targets"]), np.asarray(d["predictions"])
        report = multilabel_report if targets.ndim == 2 else classification_report
        reports[head] = report(
            targets, predictions, d["class_ids"], np.asarray(d["groups"]), num_resamples=num_resamples
        )
    return reports


def _baseline_decisions(experiment: Experiment, decisions: Decisions) -> dict[str, Decisions]:
    """What needs no model: the commonest training label, and, for many-label heads, always "present"."""
    train = [experiment.builder.targets(int(i)) for i in experiment.indices["train"]]
    majority: Decisions = {}
    always: Decisions = {}
    for head, d in decisions.items():
        targets = np.stack([t[head] for t in train])
        if targets.ndim == 2 or (targets >= 0).any():
            majority[head] = {**d, "predictions": majority_predictions(targets, len(d["targets"]))}
        if targets.ndim == 2:
            always[head] = {**d, "predictions": np.ones_like(d["targets"])}
    return {"majority": majority, "always_present": always}


def _save_decisions(decided: dict[str, Decisions], path: pathlib.Path) -> None:
    """Keeps every answer, so that folds and seeds can be pooled (`dilbert_jax.pool`)."""
    plain = {
        system: {
            head: {
                name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in d.items()
            }
            for head, d in heads.items()
        }
        for system, heads in decided.items()
    }
    path.write_text(json.dumps(plain, ensure_ascii=False), encoding="utf-8")


def example_annotations(
    experiment: Experiment,
    output: dict[str, np.ndarray],
    indices: np.ndarray,
    thresholds: Thresholds,
    step: int,
    num_examples: int,
) -> list[tuple[dict[str, Any], np.ndarray]]:
    """Annotations of a few test clips, spread over the organs and conditions, with the frames they look at."""
    context, store = experiment.context, experiment.store
    seen: dict[tuple[str, str], int] = {}
    ranked = []
    for row, index in enumerate(indices):
        study = store.studies[index]
        key = (study.organ, study.condition)
        seen[key] = seen.get(key, 0) + 1
        ranked.append((seen[key], row))
    chosen = [row for _, row in sorted(ranked)][:num_examples]
    examples = []
    for row in chosen:
        study, frames = store.studies[indices[row]], store.frames(int(indices[row]))
        example = {k.removeprefix("batch/"): v[row] for k, v in output.items() if k.startswith("batch/")}
        # Shown at the model's resolution: frame numbers count the stored frames.
        number = {source: i for i, source in enumerate(study.frame_index)}
        example["frame_index"] = np.asarray([number[int(i)] for i in example["frame_index"]])
        source = {
            "file": study.study_id,
            "sha256": "",
            "num_frames": len(frames),
            "height": frames.shape[1],
            "width": frames.shape[2],
            "fps": None,
            "pixel_spacing_mm": None,
            "decoder": "stored clip",
        }
        model = {
            "network": "student",
            "stage": "finetune",
            "step": step,
            "dataset": context.config.data.name,
        }
        prediction = {k: v[row] for k, v in output.items() if not k.startswith("batch/")}
        entry = compose(
            context, prediction, example, example["boxes"], thresholds, source=source, model=model
        )
        entry["reference"] = {
            "organ": study.organ,
            "condition": study.condition,
            "findings": list(study.findings),
            "report": study.report,
            "language": study.language,
            "report_is_synthetic": study.report_is_synthetic,
        }
        examples.append((entry, np.asarray(frames)))
    return examples
