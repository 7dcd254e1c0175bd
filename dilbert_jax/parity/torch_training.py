"""Training in PyTorch: networks, an optimizer each, the update of `dilbert_jax.training`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from dilbert_jax.parity import MISSING_EXTRA
from dilbert_jax.parity.torch_model import TorchDilbert
from dilbert_jax.training.optimizer import OptimizerConfig

try:
    import torch
    from torch import Tensor, nn
except ImportError as error:
    raise ImportError(MISSING_EXTRA) from error


def to_tensors(
    batch: Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """Turns a batch of the input pipeline into tensors.

    Args:
      batch: NumPy arrays by name.
      dtype: of the floating-point entries.
      device: where the tensors go.

    Returns:
      Tensors by the same names.
    """
    tensors = {name: torch.from_numpy(np.array(value)).to(device) for name, value in batch.items()}
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}


def learning_rate(config: OptimizerConfig, step: int, num_steps: int) -> float:
    """The rate of `dilbert_jax.training.optimizer.make_schedule`: linear warm-up, then cosine to zero.

    Args:
      config: peak rate and share of warm-up.
      step: updates made so far.
      num_steps: updates of the stage.

    Returns:
      The rate of the next update.
    """
    warmup = min(max(1, round(config.warmup_fraction * num_steps)), max(num_steps - 1, 1))
    if step < warmup:
        return config.learning_rate * step / warmup
    progress = min((step - warmup) / (max(num_steps, warmup + 1) - warmup), 1.0)
    return config.learning_rate * 0.5 * (1.0 + math.cos(math.pi * progress))


def clip_global_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scales all gradients by max_norm / norm where the norm reaches max_norm, in place.

    `torch.nn.utils.clip_grad_norm_` divides by norm + 1e-6; Optax, and this, by the norm itself.

    Args:
      parameters: those whose gradients count as one vector.
      max_norm: the largest norm; 0 = no clipping.

    Returns:
      The norm before clipping, a scalar.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients]))
    if max_norm:
        scale = torch.where(norm < max_norm, 1.0, max_norm / norm)
        for gradient in gradients:
            gradient.mul_(scale)
    return norm


def _groups(network: TorchDilbert, video_rate_scale: float) -> list[dict[str, Any]]:
    """The 3-D CNN's parameters and all others, each with what its learning rate is multiplied by."""
    video: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in network.named_parameters():
        (video if name.startswith("video.") else others).append(parameter)
    return [{"params": others, "rate_scale": 1.0}, {"params": video, "rate_scale": video_rate_scale}]


class Training:
    """Networks under one objective, each with its own optimizer.

    Attributes:
      networks: by name; updated in place.
      steps_done: updates made so far.
    """

    def __init__(
        self,
        networks: Mapping[str, TorchDilbert],
        objective: Callable[[Mapping[str, Tensor]], tuple[Tensor, dict[str, Tensor]]],
        optimizer: OptimizerConfig,
        num_steps: int,
        rate: Callable[[int], float] | None = None,
    ) -> None:
        """Makes the optimizers.

        Args:
          networks: trained in place, in the mode (train or eval) that they are in.
          objective: batch -> (sum of the networks' losses, terms as "network/term").
          optimizer: settings; coupled weight decay for sgd, after clipping.
          num_steps: updates of the stage.
          rate: step -> learning rate, in place of `learning_rate`.

        Raises:
          ValueError: an unknown optimizer.
        """
        self.networks, self.config, self._objective = networks, optimizer, objective
        self._rate = rate or (lambda step: learning_rate(optimizer, step, num_steps))
        self.steps_done = 0
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        for name, network in networks.items():
            if optimizer.name == "sgd":
                self.optimizers[name] = torch.optim.SGD(
                    _groups(network, optimizer.video_rate_scale),
                    lr=optimizer.learning_rate,
                    momentum=optimizer.momentum,
                    weight_decay=optimizer.weight_decay,
                )
            elif optimizer.name == "adamw":
                self.optimizers[name] = torch.optim.AdamW(
                    _groups(network, optimizer.video_rate_scale),
                    lr=optimizer.learning_rate,
                    weight_decay=optimizer.weight_decay,
                )
            else:
                raise ValueError(f"optimizer.name is {optimizer.name!r}; choose 'sgd' or 'adamw'")
            # Without a gradient PyTorch skips a parameter; Optax decays it all the same.
            for parameter in network.parameters():
                parameter.grad = torch.zeros_like(parameter)

    def update(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One update of all networks.

        Args:
          batch: from `to_tensors`.

        Returns:
          Every loss term as "network/term", the gradient norms before clipping, and the sum "loss"; detached scalars.
        """
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=False)
        loss, metrics = self._objective(batch)
        loss.backward()
        rate = self._rate(self.steps_done)
        for name, optimizer in self.optimizers.items():
            norm = clip_global_norm(self.networks[name].parameters(), self.config.clip_norm)
            metrics[f"{name}/gradient_norm"] = norm
            for group in optimizer.param_groups:
                group["lr"] = rate * group["rate_scale"]
            optimizer.step()
        self.steps_done += 1
        return {name: value.detach() for name, value in {**metrics, "loss": loss}.items()}
