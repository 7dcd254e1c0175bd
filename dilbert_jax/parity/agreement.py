"""How far both implementations agree, and its report."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version

import jax
import numpy as np

from dilbert_jax.parity.setting import Setting

DTYPES = ("float64", "float32")
# Largest relative difference that counts as agreement.
TOLERANCES = {"float64": 1e-8, "float32": 1e-3}
# A loss term below this share of its network's loss is measured against that share.
SMALL_TERM = 1e-3


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Relative differences in one dtype.

    Attributes:
      dtype: "float64" or "float32".
      outputs: per output, largest difference over the largest value.
      gradients: per objective and layer, norm of the difference over the norm of the gradient.
      trajectory: per loss term, values [2, steps]: JAX, PyTorch.
      parameters: per network, norm of the difference over the norm, of what the steps changed in the worst layer.
    """

    dtype: str
    outputs: dict[str, float]
    gradients: dict[str, dict[str, float]]
    trajectory: dict[str, np.ndarray]
    parameters: dict[str, float]

    def term_differences(self) -> dict[str, np.ndarray]:
        """Per loss term, the relative difference at every step (see `SMALL_TERM`)."""
        out = {}
        for term, (ours, theirs) in self.trajectory.items():
            loss = term.split("/")[0] + "/loss" if "/" in term else "loss"
            floor = SMALL_TERM * np.abs(self.trajectory[loss][0])
            out[term] = np.abs(ours - theirs) / np.maximum(np.maximum(np.abs(ours), floor), 1e-300)
        return out

    def largest(self) -> dict[str, float]:
        """The largest difference of each part; NaN counts as the largest."""
        parts = {"forward pass": list(self.outputs.values())}
        parts |= {f"gradients, {name}": list(layers.values()) for name, layers in self.gradients.items()}
        parts |= {"loss trajectory": [float(np.max(d)) for d in self.term_differences().values()]}
        return {name: float(np.max(values)) for name, values in parts.items()}

    def missed(self) -> list[str]:
        """Parts that do not agree within the dtype's tolerance."""
        return [name for name, value in self.largest().items() if not value <= TOLERANCES[self.dtype]]


def render(setting: Setting, agreements: Sequence[Agreement], few: int = 5) -> str:
    """Writes the comparison as Markdown tables.

    Args:
      setting: what was run.
      agreements: one a dtype.
      few: how many layers with the largest gradient difference to list.

    Returns:
      Text.
    """
    o = setting.optimizer
    lines = [
        f"JAX {jax.__version__} on {jax.default_backend()}, PyTorch {version('torch')} on cpu; {setting.source}, "
        f"batches of {len(setting.batches[0]['frames'])}, no dropout; mutual stage, {len(setting.batches)} steps of "
        f"SGD (in place of the configuration's optimizer): peak learning rate {o.learning_rate:g}, momentum "
        f"{o.momentum:g}, weight decay {o.weight_decay:g}, gradient norm clipped at {o.clip_norm:g}.",
    ]
    for agreement in agreements:
        tolerance = TOLERANCES[agreement.dtype]
        lines += ["", f"## {agreement.dtype}: relative difference, at most {tolerance:g} wanted", ""]
        lines += _table(
            ["part", "largest", "agrees"],
            [
                [name, f"{value:.1e}", "yes" if value <= tolerance else "NO"]
                for name, value in agreement.largest().items()
            ],
        )
        lines += ["", *_table(["output", "difference"], _sorted_rows(agreement.outputs))]
        for objective, layers in agreement.gradients.items():
            modules: dict[str, float] = {}
            for layer, value in layers.items():
                module = layer.split("/")[0]
                modules[module] = float(np.maximum(modules.get(module, 0.0), value))
            worst = ", ".join(f"{name} {value}" for name, value in _sorted_rows(layers)[:few])
            lines += ["", *_table([f"module ({objective})", "worst layer's gradient"], _sorted_rows(modules))]
            lines += ["", f"Largest: {worst}"]
        differences = agreement.term_differences()
        rows = []
        for term, (ours, theirs) in agreement.trajectory.items():
            at = int(np.argmax(differences[term]))
            figures = [f"{v:.9g}" for v in (ours[0], theirs[0], ours[-1], theirs[-1])]
            rows.append([term, *figures, f"{differences[term][at]:.1e}", str(at)])
        header = ["term", "JAX first", "PyTorch first", "JAX last", "PyTorch last", "difference", "at step"]
        lines += ["", *_table(header, rows)]
        changed = ", ".join(f"{name} {value:.1e}" for name, value in agreement.parameters.items())
        lines += [
            "",
            f"Difference of what the steps changed in the parameters, in the worst layer: {changed}",
        ]
    lines += [
        "",
        f"Outputs: largest difference over largest value. Gradients: norm of the difference over the layer's norm. "
        f"Terms: over the term's own value, or over {SMALL_TERM:g} of its network's loss where that is more.",
    ]
    return "\n".join(lines) + "\n"


def to_json(setting: Setting, agreements: Sequence[Agreement]) -> str:
    """Writes the comparison as JSON: settings, all differences, and both trajectories."""
    record = {
        "jax": jax.__version__,
        "torch": version("torch"),
        "source": setting.source,
        "batch_size": len(setting.batches[0]["frames"]),
        "steps": len(setting.batches),
        "model": dataclasses.asdict(setting.model),
        "loss": dataclasses.asdict(setting.loss),
        "optimizer": dataclasses.asdict(setting.optimizer),
        "agreements": [
            {
                "dtype": a.dtype,
                "tolerance": TOLERANCES[a.dtype],
                "largest": a.largest(),
                "missed": a.missed(),
                "outputs": a.outputs,
                "gradients": a.gradients,
                "trajectory": {
                    term: {"jax": ours.tolist(), "torch": theirs.tolist()}
                    for term, (ours, theirs) in a.trajectory.items()
                },
                "parameters": a.parameters,
            }
            for a in agreements
        ],
    }
    return json.dumps(record, indent=1)


def _sorted_rows(values: Mapping[str, float]) -> list[list[str]]:
    """Largest first."""
    return [[name, f"{value:.1e}"] for name, value in sorted(values.items(), key=lambda item: -item[1])]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table with aligned columns."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [
        " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in [header, *rows]
    ]
    lines.insert(1, " | ".join("-" * w for w in widths))
    return [f"| {line} |" for line in lines]
