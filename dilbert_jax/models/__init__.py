"""Linen modules: 3-D CNN, embeddings, tangled-transformer blocks, heads and the DILBERT model.

Axis letters used in shape comments:
  B clips; T frames; H, W height and width in pixels or feature cells; C channels; A description tokens
  (temporal steps of the 3-D CNN's feature map); R regions; L report tokens; M masked positions;
  D hidden size; N attention heads; K head width; V vocabulary; E candidate entities.
"""

from dilbert_jax.models.dilbert import Dilbert, DilbertConfig

__all__ = ["Dilbert", "DilbertConfig"]
