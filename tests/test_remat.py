"""Blocks in a loop or in a row, kept or computed again: the same gradients, and less memory where that is asked for."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import CONFIG

from dilbert_jax.models import Network

# One worker: what a test has traced and compiled, the next one uses.
pytestmark = [pytest.mark.numerics, pytest.mark.xdist_group("remat")]

DEEP = dataclasses.replace(CONFIG, num_layers=4, hidden_size=32, ffn_size=128, dropout=0.2)
HIDDEN = jax.random.normal(jax.random.key(1), (8, 24, 32))
MASK = jnp.arange(24) < jnp.asarray([24, 20, 24, 9, 24, 24, 1, 24])[:, None]


class Blocks(Network):
    """A network's blocks alone."""

    def setup(self):
        self.layers = self.transformer()

    def __call__(self, hidden, mask):
        return self.run_blocks(self.layers, hidden, mask, deterministic=False)[0]


@pytest.fixture(scope="module")
def params():
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(2)}
    return jax.jit(Blocks(DEEP).init)(rngs, HIDDEN, MASK)["params"]


@functools.cache
def gradient(remat, unroll):
    """The jitted gradient by the parameters, with dropout."""
    network = Blocks(dataclasses.replace(DEEP, remat=remat, unroll=unroll))

    def loss(params):
        out = network.apply({"params": params}, HIDDEN, MASK, rngs={"dropout": jax.random.key(3)})
        return jnp.where(MASK[..., None], jnp.sin(out) ** 2, 0.0).mean()

    return jax.jit(jax.grad(loss))


@pytest.mark.parametrize(
    ("remat", "unroll"), [("none", 1), ("dots", 0), ("dots", 1), ("full", 0), ("full", 1), ("full", 4)]
)
def test_gradients_do_not_depend_on_what_is_kept_and_looped(params, remat, unroll):
    expected, ours = gradient("none", 0)(params), gradient(remat, unroll)(params)
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected))
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-5 * largest, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("unroll", [0, 1])
def test_computing_again_needs_less_memory(params, unroll):
    none, dots, full = (
        gradient(remat, unroll).lower(params).compile().memory_analysis().temp_size_in_bytes
        for remat in ("none", "dots", "full")
    )
    assert full < dots < none and full < 0.6 * none


@pytest.mark.parametrize(("unroll", "looped"), [(0, True), (1, True), (2, True), (4, False)])
def test_only_in_a_loop_may_xla_reuse_what_is_equal(params, unroll, looped):
    program = str(jax.make_jaxpr(gradient("full", unroll))(params))
    assert ("scan[" in program) is looped
    assert ("prevent_cse=False" in program) is looped and ("prevent_cse=True" in program) is not looped
