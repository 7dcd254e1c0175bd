"""Masked temporal steps by contrast, as CBT and HERO train it."""

from __future__ import annotations

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from dilbert_jax.losses import masked_mean, noise_contrastive_loss
from dilbert_jax.models.attention import Dense

Array = jax.Array


class FrameHead(nn.Module):
    """Predicts what the 3-D CNN says of a temporal step from its hidden state."""

    @nn.compact
    def __call__(self, hidden: Array, features: Array) -> dict[str, Array]:
        """hidden [B, A, D], features [B, A, F] -> `predicted` and `shown`, both [B, A, F].

        What is shown is of zero mean and unit variance, and a target: no gradient flows into it.
        """
        shown = nn.LayerNorm(use_bias=False, use_scale=False, name="standard")(features)
        predicted = Dense(features.shape[-1], name="frame")(hidden)
        return {"predicted": predicted, "shown": jax.lax.stop_gradient(shown)}


def frame_contrast(outputs: Mapping[str, Array], batch: Mapping[str, Array]) -> Array:
    """Tells each masked temporal step from every other valid step of the batch.

    Args:
      outputs: of `FrameHead`, and `steps`, bool [B, A], the valid steps.
      batch: `description_zeroed` bool [B, A].

    Returns:
      Scalar in nats, a mean over the blanked steps; 0 where there is none. Scores are divided by the square root of
      the features' width.

    Source: `_calculate_mfm_loss` of UniVL's public code states the same sum over the batch.
    """
    width = outputs["shown"].shape[-1]
    predicted = outputs["predicted"].reshape(-1, width)
    shown, valid = outputs["shown"].reshape(-1, width), outputs["steps"].reshape(-1)
    scores = (predicted @ shown.T).astype(jnp.float32) / width**0.5  # [B A, B A]
    itself = jnp.eye(len(valid), dtype=bool)
    loss = noise_contrastive_loss(jnp.diagonal(scores), scores, valid[None, :] & ~itself)
    return masked_mean(loss, batch["description_zeroed"].reshape(-1) & valid)
