"""Linen modules: 3-D CNN, embeddings, tangled-transformer blocks, heads, DILBERT and its rivals.

Axis letters used in shape comments:
  B clips; T frames; H, W height and width in pixels or feature cells; C channels; A description tokens
  (temporal steps of the 3-D CNN's feature map); R regions; L report tokens; M masked positions;
  D hidden size; N attention heads; K head width; V vocabulary; E candidate entities.
"""

from dilbert_jax.models.baselines.bert import Bert
from dilbert_jax.models.dilbert import Dilbert
from dilbert_jax.models.network import Network, NetworkConfig

# The systems by `model.name`.
SYSTEMS: dict[str, type[Network]] = {"dilbert": Dilbert, "bert": Bert}

__all__ = ["SYSTEMS", "Bert", "Dilbert", "Network", "NetworkConfig", "make_network"]


def make_network(config: NetworkConfig) -> Network:
    """The network of a configuration, by its name.

    Raises:
      ValueError: no system of that name.
    """
    if config.name not in SYSTEMS:
        raise ValueError(f"model.name is {config.name!r}; choose one of {', '.join(SYSTEMS)}")
    return SYSTEMS[config.name](config)
