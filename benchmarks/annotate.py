"""Time of annotating: the network alone and the whole way from a decoded clip, for one clip and for a batch.

    python benchmarks/annotate.py --preset quickstart --json annotate.json

`jax` is `dilbert_jax.annotation.predict`, from NumPy arrays to NumPy arrays; `torch` (where PyTorch is installed) does
the same with the eager PyTorch network of `dilbert_jax.parity` and the same weights; `annotate` is `annotate_clips`,
which also scales the frames, lays the regions and composes the text. Weights are random, clips are noise of 64 frames
of 480 x 640. Rounds are interleaved, so that a slow moment of the machine meets all of them; the largest difference
between the outputs of `jax` and `torch` is printed. PyTorch's threads wait by spinning: where other work shares the
cores, set OMP_NUM_THREADS=1, or it comes out several times too slow.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import runpy
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from dilbert_jax.annotation import Thresholds, annotate_clips, build_visual, predict
from dilbert_jax.config import MODEL_PRESETS, default_config
from dilbert_jax.experiment import ModelContext, make_context
from dilbert_jax.knowledge import ReportTokenizer, load_graph
from dilbert_jax.labels import LabelSpace
from dilbert_jax.media import Clip
from dilbert_jax.training.step import VISUAL

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

    network = make_network(jax.device_get(params), context.model.config)
    names = tuple(torch.from_numpy(x) for x in context.entity_names)

    def run(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        with torch.inference_mode():
            encoded = network.encode_batch(to_tensors({name: batch[name] for name in VISUAL}))
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
            return {name: value.numpy() for name, value in outputs.items()}

    return run


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=PRESETS, default="quickstart")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15, help="timed calls of each")
    parser.add_argument("--json", help="write the figures to this file")
    arguments = parser.parse_args()

    context = make_setting(arguments.preset)
    params = context.init_params(jax.random.key(0))
    num_parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    clips = make_clips(arguments.batch_size)
    examples = [build_visual(context, clip.frames)[0] for clip, _ in clips]
    batch = {name: np.stack([e[name] for e in examples]) for name in VISUAL}
    networks: dict[str, Callable[..., Any]] = {"jax": lambda b: predict(context, params, b)}
    torch_threads = None
    if importlib.util.find_spec("torch") is not None:
        import torch

        networks["torch"], torch_threads = make_torch(context, params), torch.get_num_threads()

    runs: dict[tuple[str, int], Callable[[], Any]] = {}
    for size in (1, arguments.batch_size):
        part, few = {name: values[:size] for name, values in batch.items()}, clips[:size]
        for name, network in networks.items():
            runs[name, size] = lambda network=network, part=part: network(part)  # type: ignore[misc]
        runs["annotate", size] = lambda few=few, size=size: list(  # type: ignore[misc]
            annotate_clips(context, params, few, Thresholds({}, {}), model={}, batch_size=size)
        )
    seconds: dict[tuple[str, int], list[float]] = {key: [] for key in runs}
    first: dict[tuple[str, int], float] = {}
    outputs: dict[tuple[str, int], Any] = {}
    for repetition in range(arguments.rounds + 1):
        for key, run in runs.items():
            start = time.perf_counter()
            outputs[key] = run()
            taken = time.perf_counter() - start
            if repetition:
                seconds[key].append(taken)
            else:
                first[key] = taken

    rows = []
    print(f"{arguments.preset}: {num_parameters / 1e6:.1f} M parameters")
    print(f"{'what':>9} {'batch':>5} {'ms a clip':>24} {'clips/s':>8} {'first call s':>13} {'of torch':>22}")
    for (name, size), values in seconds.items():
        low, median, high = (1e3 * q / size for q in np.quantile(values, [0.25, 0.5, 0.75]))
        row: dict[str, Any] = {
            "what": name,
            "batch": size,
            "milliseconds_a_clip": {"median": median, "quartiles": [low, high]},
            "clips_per_second": 1e3 / median,
            "first_call_s": first[name, size],
        }
        line = f"{name:>9} {size:5} {median:9.2f} [{low:5.2f}, {high:6.2f}] {1e3 / median:8.1f}"
        line += f" {first[name, size]:13.1f}"
        if name == "jax" and "torch" in networks:
            ratios = np.asarray(values) / np.asarray(seconds["torch", size])
            low, median, high = np.quantile(ratios, [0.25, 0.5, 0.75])
            row["of_torch"] = {"median": median, "quartiles": [low, high]}
            pairs = [(outputs["jax", size][o], outputs["torch", size][o]) for o in outputs["jax", size]]
            row["largest_difference_from_torch"] = max(float(np.abs(a - b).max()) for a, b in pairs)
            line += f" {median:6.3f} [{low:.3f}, {high:.3f}]"
        rows.append(row)
        print(line)
        if "largest_difference_from_torch" in row:
            print(f"{'':>15} largest difference from torch {row['largest_difference_from_torch']:.1e}")
    if arguments.json:
        packages = ["jax", "jaxlib", "flax", "numpy"] + ["torch"] * ("torch" in networks)
        about = {
            "device": jax.devices()[0].device_kind,
            "cores": os.cpu_count(),
            "load_average": os.getloadavg()[0],
            "versions": {name: importlib.metadata.version(name) for name in packages},
            "parameters": num_parameters,
            "torch_threads": torch_threads,
            **vars(arguments),
        }
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump({"about": about, "rows": rows}, file, indent=2)


if __name__ == "__main__":
    main()
