"""Optimizers and the learning-rate schedule (PAPER section 7, decision D22)."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

Array = jax.Array


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
      video_rate_scale: learning rate of the 3-D CNN relative to that of everything else.
    """

    name: str = "sgd"
    learning_rate: float = 0.24
    weight_decay: float = 1e-4
    momentum: float = 0.9
    warmup_fraction: float = 0.05
    clip_norm: float = 1.0
    video_rate_scale: float = 1.0


@flax.struct.dataclass
class Schedule:
    """Learning rate by step: linear warm-up from zero, then cosine to zero.

    Optax has the same schedule with numbers that are fixed in a compiled program; here they are its inputs, so that
    stages of other lengths and rates share one.

    Attributes:
      peak: the largest rate.
      warmup: steps until then; num_steps: steps until zero.
    """

    peak: Array | float
    warmup: Array | int
    num_steps: Array | int

    def __call__(self, step: Array | int) -> Array:
        progress = jnp.clip((step - self.warmup) / (self.num_steps - self.warmup), 0.0, 1.0)
        falling = 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
        return self.peak * jnp.where(step < self.warmup, step / self.warmup, falling)


@flax.struct.dataclass
class Optimizer:
    """An `optax.GradientTransformation` that programs can take as an argument: see `OptimizerConfig` for the fields."""

    schedule: Schedule
    name: str = flax.struct.field(pytree_node=False)
    weight_decay: float = flax.struct.field(pytree_node=False)
    momentum: float = flax.struct.field(pytree_node=False)
    clip_norm: float = flax.struct.field(pytree_node=False)
    video_rate_scale: float = flax.struct.field(pytree_node=False)

    def init(self, params: Any) -> Any:
        return self._transformation().init(params)

    def update(self, gradient: Any, state: Any, params: Any, norm: Array | None = None) -> tuple[Any, Any]:
        """What to add to the parameters, and the optimizer's next state; `norm` is the gradient's, if known."""
        return self._transformation().update(gradient, state, params, norm=norm)

    def _transformation(self) -> optax.GradientTransformationExtraArgs:
        clip = _clip(self.clip_norm) if self.clip_norm else optax.identity()
        if self.name == "sgd":
            decay = optax.add_decayed_weights(self.weight_decay, mask=_decayed)
            rules = [decay, optax.sgd(self.schedule, momentum=self.momentum)]
        else:
            rules = [optax.adamw(self.schedule, weight_decay=self.weight_decay, mask=_decayed)]
        if self.video_rate_scale != 1.0:  # an update is the rate times what depends on no rate
            rules.append(optax.masked(optax.scale(self.video_rate_scale), _of_video))
        return optax.chain(clip, *rules)


def _clip(max_norm: float) -> optax.GradientTransformationExtraArgs:
    """`optax.clip_by_global_norm` for a norm that need not be computed once more."""

    def update(gradient: Any, state: Any, params: Any = None, *, norm: Array | None = None, **_: Any) -> Any:
        del params
        norm = optax.tree.norm(gradient) if norm is None else norm
        scale = jnp.where(norm < max_norm, 1.0, max_norm / norm)
        return jax.tree.map(lambda g: g * scale.astype(g.dtype), gradient), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def make_schedule(config: OptimizerConfig, num_steps: int) -> Schedule:
    """Warm-up over the first share of `num_steps`, then cosine to zero; the first step has rate 0, even if alone."""
    warmup = min(max(1, round(config.warmup_fraction * num_steps)), max(num_steps - 1, 1))
    return Schedule(config.learning_rate, warmup, max(num_steps, warmup + 1))


def _decayed(params: Any) -> Any:
    """Which parameters weight decay reaches: all but the running statistics of a frozen batch norm and visual words."""

    def is_trained(path: tuple[Any, ...], _: Any) -> bool:
        return not str(getattr(path[-1], "key", "")).startswith(("running_", "centres_"))

    return jax.tree_util.tree_map_with_path(is_trained, params)


def _of_video(params: Any) -> Any:
    """Which parameters are the 3-D CNN's."""
    return jax.tree_util.tree_map_with_path(lambda path, _: getattr(path[0], "key", "") == "video", params)


def make_optimizer(config: OptimizerConfig, num_steps: int) -> Optimizer:
    """Builds the optimizer for a stage of `num_steps` steps.

    Raises:
      ValueError: an unknown name.
    """
    if config.name not in ("sgd", "adamw"):
        raise ValueError(f"optimizer.name is {config.name!r}; choose 'sgd' or 'adamw'")
    schedule = make_schedule(config, num_steps)
    return Optimizer(
        schedule, config.name, config.weight_decay, config.momentum, config.clip_norm, config.video_rate_scale
    )
