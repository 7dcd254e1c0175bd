"""Annotating: the network alone and the whole way from decoded frames, for one clip and for a batch.

    python -m benchmarks.annotate --presets quickstart base

The network is `dilbert_jax.annotation.predict`, from NumPy arrays to NumPy arrays; beside it, where PyTorch is
installed, its eager network of `dilbert_jax.parity` with the same weights. The whole way is `annotate_clips`, which
also scales the frames, lays the regions and composes the text. Weights are random, clips are noise of 64 frames of
480 x 640.
"""

from __future__ import annotations

import argparse
import functools
import pathlib
import runpy
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from benchmarks import common
from dilbert_jax.annotation import annotate_clips, build_visual, predict
from dilbert_jax.config import MODEL_PRESETS, default_config
from dilbert_jax.experiment import ModelContext, make_context
from dilbert_jax.knowledge import ReportTokenizer, load_graph
from dilbert_jax.labels import LabelSpace
from dilbert_jax.media import Clip
from dilbert_jax.thresholds import Thresholds
from dilbert_jax.training.objectives import VISUAL

QUICKSTART = pathlib.Path(__file__).resolve().parents[1] / "configs" / "quickstart.py"
PRESETS = ("quickstart", *MODEL_PRESETS)


def make_setting(preset: str) -> ModelContext:
    """A network of the preset's size with the quickstart's inputs and numbers of labels."""
    config = runpy.run_path(str(QUICKSTART))["get_config"]()
    if preset != "quickstart":
        config.model = default_config(preset).model
    graph = load_graph(None)

    def first(kind: str, count: int) -> tuple[str, ...]:
        return tuple(c for c, concept in graph.concepts.items() if concept.type == kind)[:count]

    organs, conditions, findings = first("organ", 7), first("condition", 6), first("finding", 25)
    labels = LabelSpace(organs, conditions, findings, organs, organs + conditions + findings)
    names = [graph.name(c, language) for c in graph.concepts for language in ("en", "zh")]
    tokenizer = ReportTokenizer.train(names, config.data.vocab_size)
    return make_context(config, graph, tokenizer, labels)


def make_clips(count: int) -> list[tuple[Clip, str]]:
    rng = np.random.default_rng(0)
    return [
        (Clip(rng.integers(0, 256, (64, 480, 640), np.uint8), 25.0, None, "noise", f"{i}.mp4"), "")
        for i in range(count)
    ]


def make_torch(
    context: ModelContext, params: Any
) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """`predict` by the eager PyTorch network with the same weights."""
    import torch

    from dilbert_jax.parity.compare import make_torch as make_network
    from dilbert_jax.parity.torch_training import to_tensors

    device = common.torch_device()
    network = make_network(jax.device_get(params), context.model.config).to(device)
    names = tuple(torch.from_numpy(x).to(device) for x in context.entity_names)

    def run(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        with torch.inference_mode():
            encoded = network.encode_batch(to_tensors({name: batch[name] for name in VISUAL}, device=device))
            logits = network.annotate(encoded, *names)
            match = logits["match"]
            outputs = {
                "organ": logits["organ"].softmax(-1),
                "condition": logits["condition"].softmax(-1),
                "findings": logits["findings"].sigmoid(),
                "entities": match["clip"].sigmoid(),
                "frame_scores": match["frame"].sigmoid(),
                "region_scores": match["region"].sigmoid(),
                "region_logits": match["region"],
            }
            return {name: value.cpu().numpy() for name, value in outputs.items()}

    return run


def annotate_all(context: ModelContext, params: Any, clips: list[tuple[Clip, str]]) -> list[Any]:
    """Annotations of all clips, in one batch."""
    nothing = Thresholds({}, {})
    return list(annotate_clips(context, params, clips, nothing, model={}, batch_size=len(clips)))


def measure(arguments: argparse.Namespace) -> Iterator[common.Row]:
    for preset in arguments.presets:
        context = make_setting(preset)
        params = context.init_params(jax.random.key(0))
        clips = make_clips(arguments.batch_size)
        examples = [build_visual(context, clip.frames)[0] for clip, _ in clips]
        batch = {name: np.stack([e[name] for e in examples]) for name in VISUAL}
        networks: dict[str, Callable[..., Any]] = {"network": functools.partial(predict, context, params)}
        if common.has_torch():
            networks["PyTorch eager"] = make_torch(context, params)
        for size in (1, arguments.batch_size):
            part, few = {name: values[:size] for name, values in batch.items()}, clips[:size]
            runs = {name: functools.partial(network, part) for name, network in networks.items()}
            runs["whole way"] = functools.partial(annotate_all, context, params, few)
            seconds, first = common.time_in_turn(runs, arguments.rounds)
            outputs = [network(part) for network in networks.values()]
            setting = f"{preset}, clips at once: {size}"
            own = common.quartiles(seconds["network"], 1e3 / size)
            if len(outputs) == 2:
                difference = max(float(np.abs(v - outputs[1][name]).max()) for name, v in outputs[0].items())
                yield common.compare(
                    f"{setting}, network",
                    seconds,
                    "network",
                    "PyTorch eager",
                    per=size,
                    quantity="ms a clip",
                    first_call_s=first,
                    largest_difference=difference,
                )
            else:
                yield common.Row(f"{setting}, network", "ms a clip", own, more={"first_call_s": first})
            whole = common.quartiles(seconds["whole way"], 1e3 / size)
            yield common.Row(f"{setting}, from decoded frames to text", "ms a clip", whole)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=["quickstart", "base"])
    parser.add_argument("--batch-size", type=int, default=8)


if __name__ == "__main__":
    common.main(__doc__, measure, add_arguments, rounds=15)
