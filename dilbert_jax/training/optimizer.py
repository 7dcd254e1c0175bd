"""Optimizers and the learning-rate schedule (PAPER section 7, decision D22)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import optax


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer settings.

    Attributes:
      name: "sgd" (momentum, coupled L2 as torch.optim.SGD: the paper's) or "adamw".
      learning_rate: peak rate.
      weight_decay: coupled for sgd (added to the gradient before momentum), decoupled for adamw.
      momentum: for sgd.
      warmup_fraction: share of the steps with a linear warm-up; cosine to zero after it.
      clip_norm: global gradient norm; 0 = no clipping.
    """

    name: str = "sgd"
    learning_rate: float = 0.24
    weight_decay: float = 1e-4
    momentum: float = 0.9
    warmup_fraction: float = 0.05
    clip_norm: float = 1.0


def make_schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Linear warm-up over the first share of `num_steps`, then cosine to zero."""
    warmup = min(max(1, round(config.warmup_fraction * num_steps)), max(num_steps - 1, 1))
    return optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, warmup, max(num_steps, warmup + 1))


def _decayed(params: Any) -> Any:
    """Which parameters weight decay reaches: all but the running statistics of a frozen batch norm and visual words."""

    def is_trained(path: tuple[Any, ...], _: Any) -> bool:
        return not str(getattr(path[-1], "key", "")).startswith(("running_", "centres_"))

    return jax.tree_util.tree_map_with_path(is_trained, params)


def make_optimizer(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
    """Builds the optimizer for a stage of `num_steps` steps."""
    schedule = make_schedule(config, num_steps)
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    if config.name == "sgd":
        decay = optax.add_decayed_weights(config.weight_decay, mask=_decayed)
        return optax.chain(clip, decay, optax.sgd(schedule, momentum=config.momentum))
    if config.name == "adamw":
        return optax.chain(clip, optax.adamw(schedule, weight_decay=config.weight_decay, mask=_decayed))
    raise ValueError(f"optimizer.name is {config.name!r}; choose 'sgd' or 'adamw'")
