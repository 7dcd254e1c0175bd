"""Results as self-contained HTML: a run's report, a clip's annotation, a folder's index
(templates/*.html)."""

from __future__ import annotations

import base64
import functools
import io
import os
import pathlib
import urllib.parse
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jinja2
import numpy as np
from PIL import Image

from dilbert_jax.evaluation import figures, match_figures
from dilbert_jax.knowledge import KnowledgeGraph

MAX_EMBEDDED_FRAMES = 128
PAGE_SIDE = 480  # pixels of the longer side of a frame, at most
# (longest side in pixels, JPEG quality), tried in this order until a clip fits the budget.
_LADDER = ((PAGE_SIDE, 85), (PAGE_SIDE, 75), (420, 70), (360, 65), (300, 60), (240, 50))
_BYTE_BUDGET = 5_200_000  # before base64, which adds a third
_MAX_PLAYED_RATE, _STILLS_RATE = 30.0, 8.0
_SHOWN_FINDINGS = 10
_MATCH_EXAMPLES = 2
TASK_TITLES = {
    "organ": "Organ",
    "condition": "Condition",
    "findings": "Findings",
    "entities": "Entities matched with the clip",
}
BASELINE_TITLES = {"majority": "majority of training", "always_present": "every finding, always"}
RANKED_TASKS = {
    "mlm": "masked language (MLM)",
    "mlm_guided": "the same, words chosen by the knowledge graph",
    "mdc": "masked description (MDC)",
    "moc": "masked organ (MOC)",
    "cmm": "cross-modal retrieval (CMM)",
}


def render_annotation(
    annotation: Mapping[str, Any],
    frames: np.ndarray,
    path: str | os.PathLike[str],
    *,
    source_frames: Sequence[int] = (),
) -> None:
    """Writes annotation.html: the scrubbable clip with its regions, entities and links, findings and
    description.

    Args:
      annotation: as docs/annotation_schema.md; its frame numbers count in `frames`.
      frames: uint8 [T, H, W]. At most 128 are embedded, evenly spaced and always those that the annotation
        names, scaled down to 480 px or less so that the file stays below 8 MB.
      path: file to write.
      source_frames: [T], the number that each of `frames` has in its source and that the page then shows, for
        a clip read in part; empty for a whole clip.

    Raises:
      ValueError: frames of another kind, or a frame number outside the clip.
    """
    regions = annotation["regions"]
    named = {int(r["frame"]) for r in regions} | {int(i) for i in annotation["frame_index"]}
    match_figures.check_frames(sorted(named), frames)
    if len(source_frames) not in (0, len(frames)):
        raise ValueError(
            f"{len(source_frames)} source_frames for {len(frames)} frames; expected one for each"
        )
    numbers = select_frames(len(frames), named)
    shown_numbers = [int(source_frames[i]) for i in numbers] if len(source_frames) else numbers
    total = max(shown_numbers[-1] + 1, len(frames))
    position = {number: i for i, number in enumerate(numbers)}
    images = encode_frames(frames[numbers])
    fps = annotation["source"].get("fps")
    entities = sorted(annotation["entities"], key=lambda e: (not e.get("supported", True), -e["score"]))
    strength = [max((e["region_scores"][r] for e in entities), default=0) for r in range(len(regions))]
    first = regions[int(np.argmax(strength))]["frame"] if regions else numbers[0]
    step = total / len(numbers)
    data = {
        "frames": images,
        "numbers": shown_numbers,
        "total": total,
        "fps": fps,
        "delay": round(1000 * max(step / fps, 1 / _MAX_PLAYED_RATE)) if fps else round(1000 / _STILLS_RATE),
        "regions": [
            {"frame": position[r["frame"]], "box": r["box"], "text": _describe_region(r)} for r in regions
        ],
        "entities": [{key: e[key] for key in ("type", "frame_scores", "region_scores")} for e in entities],
        "frame_index": [position[i] for i in annotation["frame_index"]],
        "first": position[first],
    }
    findings = sorted(annotation["findings"], key=lambda f: (not f["present"], -f["probability"]))
    shown = max(sum(f["present"] for f in findings), _SHOWN_FINDINGS)
    height, width = _fit(frames.shape[1:], PAGE_SIDE)
    render_page(
        "annotation.html",
        path,
        a=annotation,
        data=data,
        entities=entities,
        aspect=round(width / height, 4),
        width=width,
        height=height,
        num_embedded=len(numbers),
        total=total,
        shown_findings=findings[:shown],
        other_findings=findings[shown:],
        provenance=_provenance(annotation),
    )


def render_index(entries: Iterable[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Writes the summary of a folder: one row a clip that links to its page, and every failed file with its
    reason.

    Args:
      entries: for each file `file` (its name) and either `annotation`, `href` (path of annotation.html
        relative to `path`) and optionally `frames` (uint8 [T, H, W]; the middle one becomes a thumbnail), or
        `reason`.
      path: file to write.

    Raises:
      ValueError: an entry with neither an annotation nor a reason.
    """
    done, failed = [], []
    for entry in entries:
        if entry.get("reason"):
            failed.append({"file": entry["file"], "reason": entry["reason"]})
        elif entry.get("annotation"):
            frames = entry.get("frames")
            thumbnail = (
                "" if frames is None else _data_uri(_encode(frames[len(frames) // 2], 120, 75), "jpeg")
            )
            # Quoting the colon too keeps a file name from becoming a link of another kind ("javascript:").
            href = urllib.parse.quote(os.fsencode(entry["href"]), safe="/")
            done.append({**entry, "href": href, "thumbnail": thumbnail})
        else:
            raise ValueError(f"{entry.get('file')}: the entry has neither 'annotation' nor 'reason'")
    render_page("index.html", path, done=done, failed=failed)


def render_report(
    evaluation: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    annotations: Sequence[tuple[Mapping[str, Any], np.ndarray]],
    path: str | os.PathLike[str],
    *,
    graph: KnowledgeGraph | None = None,
    notices: Sequence[str] = (),
) -> None:
    """Writes report.html: what a run reached, how it trained, and what its annotations look like.

    Args:
      evaluation: as docs/evaluation.md.
      history: records of metrics.jsonl, in order; may be empty.
      annotations: examples, each with its clip's frames uint8 [T, H, W]. An annotation may carry
        `reference`, the record's own labels (`organ`, `condition`, `findings` as ids; `report`,
        `report_is_synthetic`), which is then shown beside it.
      path: file to write.
      graph: names of the concepts; without it their ids are shown.
      notices: sentences that a reader must see before any figure.

    Raises:
      ValueError: an annotation does not fit its frames.
    """
    annotation = _annotation_tasks(evaluation, graph)
    pretraining = _pretraining(evaluation)
    stages = list(dict.fromkeys(r["stage"] for r in history))
    curves = [
        {"title": stage, **figure_image(figures.training_curves(history, stage))}
        for stage in stages
        if figures.collect_curves(history, stage)
    ]
    examples = [_example(a, frames, graph) for a, frames in annotations]
    sections = [
        ("annotation", "Annotation", annotation),
        ("classes", "By class", annotation),
        ("pretraining", "Pre-training tasks", pretraining["rows"]),
        ("curves", "Training curves", curves),
        ("matches", "Entities, frames and regions", examples),
        ("examples", "Examples", examples),
    ]
    facts = [
        ("clips", evaluation["num_clips"]),
        ("groups", evaluation["num_groups"]),
        ("device", evaluation["device"]),
        ("reports", "synthetic" if evaluation["synthetic_reports"] else "as written"),
        ("seed", evaluation["seed"]),
        ("system", evaluation["system"]),
        ("parameters", f"{evaluation['parameters'] / 1e6:.2f} M"),
        ("a clip", f"{evaluation['flops_per_clip'] / 1e6:.0f} MFLOP"),
    ]
    render_page(
        "report.html",
        path,
        e=evaluation,
        facts=facts,
        notices=list(notices),
        sections=[(name, title) for name, title, content in sections if content],
        annotation=annotation,
        pretraining=pretraining,
        curves=curves,
        matches=[m for a, frames in annotations[:_MATCH_EXAMPLES] for m in _matches(a, frames)],
        examples=examples,
    )


def select_frames(num_frames: int, named: Iterable[int], most: int = MAX_EMBEDDED_FRAMES) -> list[int]:
    """Evenly spaced frame numbers, at most `most`, together with all `named` ones; sorted."""
    wanted = set(named)
    if num_frames <= most:
        return list(range(num_frames))
    room = max(most - len(wanted), 0)
    return sorted(wanted | {int(i) for i in np.linspace(0, num_frames - 1, room).round()})


def encode_frames(frames: np.ndarray) -> list[str]:
    """JPEG data URIs of uint8 [T, H, W], as large and as good as the page's budget allows."""
    probes = frames[np.unique(np.linspace(0, len(frames) - 1, 4).round().astype(int))]
    for side, quality in _LADDER:
        size = max(len(_encode(frame, side, quality)) for frame in probes)
        if size * len(frames) <= _BYTE_BUDGET:
            break
    return [_data_uri(_encode(frame, side, quality), "jpeg") for frame in frames]


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dilbert_jax"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    return environment


def render_page(template: str, path: str | os.PathLike[str], **values: Any) -> None:
    """Fills a template of templates/ and writes the page."""
    text = _environment().get_template(template).render(**values)
    pathlib.Path(path).write_text(text, encoding="utf-8")


def _encode(frame: np.ndarray, side: int, quality: int) -> bytes:
    height, width = _fit(frame.shape, side)
    image = Image.fromarray(frame)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=2.0)
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=quality)
    return buffer.getvalue()


def _fit(shape: Sequence[int], side: int) -> tuple[int, int]:
    """Height and width scaled down to `side` on the longer one; never up."""
    scale = min(1.0, side / max(shape))
    return max(1, round(shape[0] * scale)), max(1, round(shape[1] * scale))


def _data_uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


def figure_image(png: bytes) -> dict[str, Any]:
    """A figure at its size in print: 144 dots to the inch in the file, 96 pixels on the page."""
    with Image.open(io.BytesIO(png)) as image:
        width = image.width
    return {"image": _data_uri(png, "png"), "width": round(width / 1.5)}


def _describe_region(region: Mapping[str, Any]) -> str:
    if not region.get("label"):
        return "region"
    probability = region.get("probability")
    text = figures.display_name(region["label"], region.get("name"))
    return text if probability is None else f"{text} {probability:.2f}"


def _provenance(annotation: Mapping[str, Any]) -> list[tuple[str, str]]:
    source, model = annotation["source"], annotation["model"]
    rows = [("file", source["file"]), ("SHA-256", source["sha256"]), ("decoder", source["decoder"])]
    rows += [("model", f"{model['network']}, stage {model['stage']}, step {model['step']}")]
    rows += [("trained on", model["dataset"]), ("version", f"dilbert-jax {model['version']}")]
    return [(key, str(value)) for key, value in rows if value not in (None, "")]


def _names(concept: str, graph: KnowledgeGraph | None) -> dict[str, str]:
    if graph is None or concept not in graph.concepts:
        return {"en": concept.replace("_", " "), "zh": ""}
    return {language: graph.name(concept, language) for language in ("en", "zh")}


def _annotation_tasks(evaluation: Mapping[str, Any], graph: KnowledgeGraph | None) -> list[dict[str, Any]]:
    """Tables and figures of every task that at least one network has a report of."""
    tasks = []
    for task, title in TASK_TITLES.items():
        networks = {
            name: network["annotation"][task]
            for name, network in evaluation["networks"].items()
            if network.get("annotation", {}).get(task)
        }
        if not networks:
            continue
        baselines = {n: b[task] for n, b in evaluation.get("baseline", {}).items() if b.get(task)}
        main = "student" if "student" in networks else next(iter(networks))
        report = networks[main]
        rows = [
            {
                "name": BASELINE_TITLES.get(name, name),
                "report": r,
                "baseline": name in baselines,
                "colour": figures.SYSTEM_COLOURS.get(name, figures.MUTED),
            }
            for name, r in (networks | baselines).items()
        ]
        names = {row["id"]: _names(row["id"], graph) for row in report["per_class"]}
        drawn = []
        if any(row["support"] for row in report["per_class"]):
            bars = networks | {n: b for n, b in baselines.items() if n == "majority"}
            drawn.append(
                {
                    "caption": "F1 by class, with 95 % intervals.",
                    **figure_image(figures.class_f1_bars(bars, names)),
                }
            )
        if report.get("confusion"):
            png = figures.confusion_figure(report["confusion"], [r["id"] for r in report["per_class"]], names)
            drawn.append(
                {"caption": f"Confusion of the {main}; shade: share of the true class.", **figure_image(png)}
            )
        tasks.append(
            {
                "title": title,
                "num": report["num"],
                "num_groups": report["num_groups"],
                "has_accuracy": "accuracy" in report,
                "rows": rows,
                "per_class_of": main,
                "per_class": [
                    {**row, "name": names[row["id"]]}
                    for row in sorted(report["per_class"], key=lambda r: -r["support"])
                ],
                "colour": figures.SYSTEM_COLOURS.get(main, figures.MUTED),
                "figures": drawn,
            }
        )
    return tasks


def _pretraining(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """Rows of the recall table and of matching accuracy."""
    networks = {n: v["pretraining"] for n, v in evaluation["networks"].items() if v.get("pretraining")}
    frequent = any("frequent_at_1" in t for tasks in networks.values() for t in tasks.values())
    rows = []
    for task, title in RANKED_TASKS.items():
        results = [tasks.get(task, {}) for tasks in networks.values()]
        held = next((r for r in results if "recall_at_1" in r), None)
        if held is None:
            continue
        values = [(r.get("recall_at_1"), r.get("recall_at_10")) for r in results]
        values.append((held.get("chance_at_1"), held.get("chance_at_10")))
        if frequent:
            values.append((held.get("frequent_at_1"), held.get("frequent_at_10")))
        rows.append(
            {"title": title, "num": held.get("num"), "num_classes": held.get("num_classes"), "cells": values}
        )
    matching = [
        {"name": name, **{key: tasks["cmm"].get(key) for key in ("accuracy", "chance", "num")}}
        for name, tasks in networks.items()
        if "accuracy" in tasks.get("cmm", {})
    ]
    return {"networks": list(networks), "frequent": frequent, "rows": rows, "matching": matching}


def _example(
    annotation: Mapping[str, Any], frames: np.ndarray, graph: KnowledgeGraph | None
) -> dict[str, Any]:
    match_figures.check_frames(annotation["frame_index"], frames)
    chosen = np.unique(np.linspace(0, len(frames) - 1, min(6, len(frames))).round().astype(int))
    reference = annotation.get("reference")
    rows = []
    for task in ("organ", "condition"):
        label = annotation[task]
        truth = (reference or {}).get(task) or ""
        rows.append(
            {
                "title": task,
                "annotated": f"{label['name']['en']} ({label['probability']:.2f})" if label else "–",
                "reference": _names(truth, graph)["en"] if truth else "–",
                "agrees": label["id"] == truth if label and truth else None,
            }
        )
    present = [f for f in annotation["findings"] if f["present"]]
    truths = sorted((reference or {}).get("findings") or ())
    rows.append(
        {
            "title": "findings",
            "annotated": ", ".join(f"{f['name']['en']} ({f['probability']:.2f})" for f in present) or "–",
            "reference": ", ".join(_names(t, graph)["en"] for t in truths) or "–",
            "agrees": None,
        }
    )
    strip = [_data_uri(_encode(frames[i], 200, 80), "jpeg") for i in chosen]
    return {"annotation": annotation, "strip": strip, "rows": rows, "reference": reference}


def _matches(annotation: Mapping[str, Any], frames: np.ndarray) -> list[dict[str, Any]]:
    """The two match figures of one example, where it has what they draw."""
    drawn = []
    file = annotation["source"]["file"]
    if annotation["entities"] and len(annotation["frame_index"]) > 1:
        png = match_figures.entity_frame_graph(annotation, frames)
        caption = f"{file}: which frames associate with the best-matched entities. Line width: match score."
        drawn.append({"caption": caption, **figure_image(png)})
    if annotation["entities"] and annotation["regions"]:
        png = match_figures.entity_region_figure(annotation, frames)
        caption = f"{file}: which regions of the frame match which entity. Line width: match score."
        drawn.append({"caption": caption, **figure_image(png)})
    return drawn
