"""The 3-D convolution against XLA's own: values, both gradients, precisions, batching, sharding, choice of the form."""

import os
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from dilbert_jax.models.conv3d import _gradients_by_tap, conv3d


def general(x, kernel, strides=(1, 1, 1)):
    padding = [(size // 2, size // 2) for size in kernel.shape[:3]]
    return lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
    )


@partial(jax.jit, static_argnums=0)
def with_gradients(convolve, x, kernel, cotangent):
    y, pull_back = jax.vjp(convolve, x, kernel)
    return y, *pull_back(cotangent)


def draw(rng, shape, kernel_shape, strides=(1, 1, 1)):
    """Input, kernel and cotangent, float64."""
    out = (shape[0], *(-(-size // s) for size, s in zip(shape[1:4], strides, strict=True)), kernel_shape[-1])
    return tuple(rng.standard_normal(size) for size in (shape, kernel_shape, out))


def on_tpu(x, kernel):
    """The form with the gradients that are lowered for TPUs, wherever it runs."""

    @jax.custom_vjp
    def convolve(x, kernel):
        return general(x, kernel)

    convolve.defvjp(
        lambda x, kernel: (general(x, kernel), (x, kernel)), lambda s, g: _gradients_by_tap(*s, g)
    )
    return convolve(x, kernel)


@pytest.mark.parametrize("convolve", [conv3d, on_tpu])
@pytest.mark.parametrize(
    ("shape", "kernel_size", "features"),
    [
        ((2, 4, 6, 8, 3), (3, 3, 3), 5),  # even
        ((2, 5, 7, 5, 3), (3, 3, 3), 4),  # odd; the last tile of two frames is half empty
        ((1, 1, 4, 4, 2), (3, 3, 3), 2),  # fewer frames than taps
        ((1, 2, 3, 4, 1), (3, 1, 1), 1),
        ((2, 3, 6, 5, 4), (1, 3, 3), 2),
        ((1, 3, 1, 2, 1), (3, 3, 3), 1),  # a map smaller than the kernel
        ((2, 2, 6, 7, 2), (5, 3, 5), 3),  # five taps, two frames
        ((2, 3, 4, 4, 3), (1, 1, 1), 4),
    ],
)
def test_values_and_gradients_in_float64(rng, convolve, shape, kernel_size, features):
    with jax.enable_x64(True):
        arrays = draw(rng, shape, (*kernel_size, shape[-1], features))
        ours = with_gradients(convolve, *arrays)
        for a, b in zip(ours, with_gradients(general, *arrays), strict=True):
            assert a.dtype == jnp.float64
            np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("strides", [(1, 2, 2), (2, 1, 1)])
def test_strides_in_float64(rng, strides):
    with jax.enable_x64(True):
        arrays = draw(rng, (2, 5, 7, 6, 3), (3, 3, 3, 3, 4), strides)
        ours = with_gradients(lambda x, k: conv3d(x, k, strides), *arrays)
        theirs = with_gradients(lambda x, k: general(x, k, strides), *arrays)
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 2e-6), (jnp.bfloat16, 1e-2)])
def test_low_precision_is_as_close_as_rounding_allows(rng, dtype, tolerance):
    arrays = [jnp.asarray(a, dtype) for a in draw(rng, (2, 6, 8, 8, 16), (3, 3, 3, 16, 16))]
    with jax.enable_x64(True):
        exact = with_gradients(general, *(a.astype(jnp.float64) for a in arrays))
    for a, b in zip(with_gradients(conv3d, *arrays), exact, strict=True):
        assert a.dtype == dtype
        error = np.asarray(a, np.float64) - np.asarray(b)
        assert np.sqrt((error**2).mean()) < tolerance * np.asarray(b).std()


@pytest.mark.parametrize("kernel_axis", [None, 0])
def test_vmap_equals_a_loop(rng, kernel_axis):
    """Over clips, and over the kernels of two networks as well."""
    pairs = zip(*(draw(rng, (2, 3, 4, 5, 3), (3, 3, 3, 3, 2)) for _ in range(2)), strict=True)
    x, kernels, cotangents = (jnp.stack(pair).astype(jnp.float32) for pair in pairs)
    if kernel_axis is None:
        kernels = kernels[0]
    each = jax.vmap(partial(with_gradients, conv3d), in_axes=(0, kernel_axis, 0))
    batched = jax.jit(each)(x, kernels, cotangents)
    for i in range(2):
        kernel = kernels if kernel_axis is None else kernels[i]
        for a, b in zip(batched, with_gradients(general, x[i], kernel, cotangents[i]), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("platform", ["tpu", "cuda", "cpu"])
@pytest.mark.parametrize("strides", [(1, 1, 1), (2, 2, 2)])
def test_the_form_follows_the_platform_lowered_for(platform, strides):
    """Accelerators get 5-D convolutions, forward and backward, also when this process runs on a CPU."""
    x, kernel = jnp.zeros((2, 4, 6, 6, 3)), jnp.zeros((3, 3, 3, 3, 5))

    def gradients(x, kernel):
        return jax.value_and_grad(lambda x, k: jnp.sin(conv3d(x, k, strides)).sum(), (0, 1))(x, kernel)

    text = jax.export.export(jax.jit(gradients), platforms=[platform])(x, kernel).mlir_module()
    convolutions = [line for line in text.splitlines() if "stablehlo.convolution" in line]
    in_3d = ["0, 1, 2" in line.split("window")[0] for line in convolutions]
    if platform == "cpu":
        assert convolutions and not any(in_3d)
    else:
        # On a TPU the gradient of the kernel is a product.
        count = 2 if platform == "tpu" and strides == (1, 1, 1) else 3
        assert len(convolutions) == count and all(in_3d) and "stablehlo.while" not in text


pytestmark = pytest.mark.numerics

SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from dilbert_jax.models.conv3d import conv3d

assert jax.device_count() == 4
mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
keys = jax.random.split(jax.random.key(0), 3)
x, g = (jax.random.normal(key, (8, 5, 6, 7, 8)) for key in keys[:2])
kernel = jax.random.normal(keys[2], (3, 3, 3, 8, 8))

def run(x, kernel, g):
    y, pull_back = jax.vjp(conv3d, x, kernel)
    return y, *pull_back(g)

split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
arrays = jax.device_put(x, split), jax.device_put(kernel, whole), jax.device_put(g, split)
compiled = jax.jit(run).lower(*arrays).compile()
text = compiled.as_text()
assert not any(name in text for name in ("all-gather", "all-to-all", "collective-permute")), text
sharded = compiled(*arrays)
for output in sharded[:2]:
    assert output.sharding.is_equivalent_to(split, 5), output.sharding
for a, b in zip(sharded, jax.jit(run)(x, kernel, g)):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)
"""


def test_a_sharded_batch_stays_where_it_is():
    """Four simulated devices compute what one does, and no clip moves between them."""
    environment = dict(os.environ, JAX_PLATFORMS="cpu", XLA_FLAGS="--xla_force_host_platform_device_count=4")
    done = subprocess.run(
        [sys.executable, "-c", SHARDED], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
