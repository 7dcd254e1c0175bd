"""Linen modules: 3-D CNN, embeddings, tangled-transformer blocks, heads, DILBERT and its rivals.

Axis letters used in shape comments:
  B clips; T frames; H, W height and width in pixels or feature cells; C channels; A description tokens
  (temporal steps of the 3-D CNN's feature map); R regions; L report tokens; M masked positions;
  D hidden size; N attention heads; K head width; V vocabulary; E candidate entities.
"""

import importlib

from dilbert_jax.models import dilbert
from dilbert_jax.models.baselines import actbert, bert, cbt, hero, mmft_bert, videobert
from dilbert_jax.models.dilbert import Dilbert
from dilbert_jax.models.network import Network, NetworkConfig, System, init_params

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

__all__ = [
    "SYSTEMS",
    "Dilbert",
    "Network",
    "NetworkConfig",
    "System",
    "find_system",
    "init_params",
    "make_network",
]


def find_system(name: str) -> System:
    """A system by its name in `SYSTEMS`, or by the dotted path of a module that holds one as `SYSTEM`.

    Raises:
      ValueError: neither.
    """
    if name in SYSTEMS:
        return SYSTEMS[name]
    if "." in name:
        try:
            system = getattr(importlib.import_module(name), "SYSTEM", None)
        except ImportError as error:
            raise ValueError(f"model.name is {name!r}, which cannot be imported: {error}") from None
        if isinstance(system, System):
            return system
        raise ValueError(f"model.name is {name!r}, a module without a dilbert_jax.models.System named SYSTEM")
    raise ValueError(
        f"model.name is {name!r}; choose one of {', '.join(SYSTEMS)}, or a module as in docs/extending.md"
    )


def make_network(config: NetworkConfig) -> Network:
    """The network of a configuration, by its name; raises as `find_system`."""
    return find_system(config.name).network(config)
