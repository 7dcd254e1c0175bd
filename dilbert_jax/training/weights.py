"""How weights and biases are spread, for the figure that follows them over the steps."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)


@jax.jit
def weight_quantiles(params: Any) -> dict[str, jax.Array]:
    """`QUANTILES` of all weights (arrays named kernel or embedding) and of all biases of one network."""
    kinds: dict[str, list[jax.Array]] = {"weights": [], "biases": []}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = str(getattr(path[-1], "key", ""))
        kind = {"kernel": "weights", "embedding": "weights", "bias": "biases"}.get(name)
        if kind:
            kinds[kind].append(leaf.ravel().astype(jnp.float32))
    levels = jnp.asarray(QUANTILES)
    return {kind: jnp.quantile(jnp.concatenate(leaves), levels) for kind, leaves in kinds.items() if leaves}
