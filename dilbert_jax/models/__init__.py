"""Linen modules: 3-D CNN, embeddings, tangled-transformer blocks, heads, DILBERT and its rivals.

Axis letters used in shape comments:
  B clips; T frames; H, W height and width in pixels or feature cells; C channels; A description tokens
  (temporal steps of the 3-D CNN's feature map); R regions; L report tokens; M masked positions;
  D hidden size; N attention heads; K head width; V vocabulary; E candidate entities.
"""

from dilbert_jax.models import dilbert
from dilbert_jax.models.baselines import actbert, bert, cbt, hero, mmft_bert, videobert
from dilbert_jax.models.dilbert import Dilbert
from dilbert_jax.models.network import Network, NetworkConfig, System

# The systems by `model.name`, in the order of the paper's tables.
SYSTEMS: dict[str, System] = {
    "bert": bert.SYSTEM,
    "videobert": videobert.SYSTEM,
    "cbt": cbt.SYSTEM,
    "hero": hero.SYSTEM,
    "mmft_bert": mmft_bert.SYSTEM,
    "actbert": actbert.SYSTEM,
    "dilbert": dilbert.SYSTEM,
}

__all__ = ["SYSTEMS", "Dilbert", "Network", "NetworkConfig", "System", "make_network"]


def make_network(config: NetworkConfig) -> Network:
    """The network of a configuration, by its name.

    Raises:
      ValueError: no system of that name.
    """
    if config.name not in SYSTEMS:
        raise ValueError(f"model.name is {config.name!r}; choose one of {', '.join(SYSTEMS)}")
    return SYSTEMS[config.name].network(config)
