"""R3D-18, batch normalization and pooling: PyTorch's recorded values; a NumPy rewrite of torchvision's network."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dilbert_jax.models.pooling import average_pool3d, max_pool3d
from dilbert_jax.models.r3d import R3D18, BatchNorm3D, kinetics_channels

pytestmark = pytest.mark.numerics

PRECISIONS = pytest.mark.parametrize(("precision", "tolerance"), [("f32", 1e-5), ("f64", 1e-9)])


@pytest.fixture(scope="module")
def recorded(reference_dir):
    return np.load(reference_dir / "conv3d.npz", allow_pickle=False)


def channels_last(x, dtype=None):
    return jnp.asarray(np.moveaxis(x, 1, -1), dtype)


# --- pooling (PyTorch) ------------------------------------------------------------------------------------

# Name in the file -> window, strides, padding.
K3_S2_P1 = ((3, 3, 3), (2, 2, 2), (1, 1, 1))
K2_S2 = ((2, 2, 2), None, (0, 0, 0))
POOLINGS = {
    "max_k3s2p1": (max_pool3d, K3_S2_P1, {}),
    "max_k2s2": (max_pool3d, K2_S2, {}),
    "max_k(1,3,3)s(1,2,2)p(0,1,1)": (max_pool3d, ((1, 3, 3), (1, 2, 2), (0, 1, 1)), {}),
    "avg_k2s2": (average_pool3d, K2_S2, {}),
    "avg_k3s2p1_countpad": (average_pool3d, K3_S2_P1, {}),
    "avg_k3s2p1_nocountpad": (average_pool3d, K3_S2_P1, {"count_include_pad": False}),
}


@pytest.mark.parametrize("size", ["odd", "even"])
@pytest.mark.parametrize("name", POOLINGS)
def test_pooling_equals_pytorch(recorded, name, size):
    pool, arguments, options = POOLINGS[name]
    with jax.enable_x64(True):
        x = channels_last(recorded[f"pool/{size}/x"])

        @jax.jit
        def with_gradient(x):
            y, pull_back = jax.vjp(lambda a: pool(a, *arguments, **options), x)
            # The file does not name its loss; sum(y * arange / 100), y in PyTorch's order, explains its gradients.
            batch, *grid, channels = y.shape
            cotangent = jnp.arange(y.size, dtype=y.dtype).reshape(batch, channels, *grid) / 100
            return y, *pull_back(jnp.moveaxis(cotangent, 1, -1))

        y, gradient = with_gradient(x)
    expected = recorded[f"pool/{size}/{name}/y"]
    np.testing.assert_allclose(np.moveaxis(y, -1, 1), expected, rtol=1e-12, atol=1e-14)
    expected = recorded[f"pool/{size}/{name}/grad_x"]
    np.testing.assert_allclose(np.moveaxis(gradient, -1, 1), expected, rtol=1e-12, atol=1e-14)


def test_pooling_pads_maxima_with_nothing_and_keeps_the_type():
    x = jnp.full((1, 2, 4, 4, 3), -5.0, jnp.bfloat16)
    assert float(max_pool3d(x, *K3_S2_P1).max()) == -5.0
    for count_include_pad in (True, False):
        assert average_pool3d(x, *K3_S2_P1, count_include_pad=count_include_pad).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("shape", "window", "padding"),
    [((4, 4, 4, 3), (2, 2, 2), (0, 0, 0)), ((1, 4, 4, 4, 3), (2, 2), (0, 0, 0)),
     ((1, 4, 4, 4, 3), (3, 3, 3), (2, 1, 1)), ((1, 2, 4, 4, 3), (3, 3, 3), (0, 0, 0))],
)  # fmt: skip
def test_pooling_refuses_what_pytorch_refuses(shape, window, padding):
    for pool in (max_pool3d, average_pool3d):
        with pytest.raises(ValueError, match=r"pooling"):
            pool(jnp.zeros(shape), window, padding=padding)


# --- batch normalization (PyTorch) ------------------------------------------------------------------------


def train(layer, params, statistics, x):
    """Output, pull-back and moved statistics of one training step."""

    def run(params, x):
        variables = {"params": params, "batch_stats": statistics}
        return layer.apply(variables, x, use_running_average=False, mutable="batch_stats")

    y, pull_back, moved = jax.vjp(run, params, x, has_aux=True)
    return y, pull_back, moved["batch_stats"]


@PRECISIONS
@pytest.mark.parametrize(("momentum", "epsilon"), [(0.1, 1e-5), (0.01, 1e-3)])
def test_batch_norm_equals_pytorch(recorded, momentum, epsilon, precision, tolerance):
    case = f"bn/mom{momentum:g}_eps{epsilon:g}/{precision}"

    def check(ours, name, tolerance=tolerance):
        expected = recorded[f"{case}/{name}"]
        ours = np.moveaxis(ours, -1, 1) if np.ndim(ours) == 5 else ours
        assert ours.dtype == expected.dtype
        # Sums over a batch carry its rounding: compare with the largest entry, not with a small one.
        np.testing.assert_allclose(
            ours, expected, rtol=tolerance, atol=tolerance * max(1, abs(expected).max()), err_msg=name
        )

    with jax.enable_x64(precision == "f64"):
        dtype = jnp.float64 if precision == "f64" else jnp.float32
        layer = BatchNorm3D(epsilon, momentum, dtype=dtype)
        params = {
            "scale": jnp.asarray(recorded[f"{case}/gamma"]),
            "bias": jnp.asarray(recorded[f"{case}/beta"]),
        }
        statistics = {"mean": jnp.zeros(4, dtype), "var": jnp.ones(4, dtype)}
        for step in range(3):
            x = channels_last(recorded[f"{case}/step{step}/x"])
            y, pull_back, statistics = train(layer, params, statistics, x)
            check(y, f"step{step}/y")
            grad_params, grad_x = pull_back(3.0 * y**2)  # of the sum of cubes
            check(grad_x, f"step{step}/grad_x")
            check(grad_params["scale"], f"step{step}/grad_gamma")
            check(statistics["mean"], f"step{step}/running_mean")
            check(statistics["var"], f"step{step}/running_var")
        x = channels_last(recorded[f"{case}/eval/x"])
        check(layer.apply({"params": params, "batch_stats": statistics}, x), "eval/y")
        frozen = params | {"running_mean": statistics["mean"], "running_var": statistics["var"]}
        layer = BatchNorm3D(epsilon, frozen=True, dtype=dtype)
        check(layer.apply({"params": frozen}, x), "eval/y")


@PRECISIONS
def test_batch_norm_of_two_values_shows_both_conventions(recorded, precision, tolerance):
    case = f"bn/tiny_n2/{precision}"
    with jax.enable_x64(precision == "f64"):
        x = channels_last(recorded[f"{case}/x"])
        variances = {}
        for unbiased in (True, False):
            layer = BatchNorm3D(unbiased_running_variance=unbiased, dtype=x.dtype)
            variables = layer.init(jax.random.key(0), x)
            y, _, statistics = train(layer, variables["params"], variables["batch_stats"], x)
            np.testing.assert_allclose(np.moveaxis(y, -1, 1), recorded[f"{case}/y"], rtol=tolerance)
            variances[unbiased] = np.asarray(statistics["var"])
    np.testing.assert_allclose(variances[True], recorded[f"{case}/running_var"], rtol=tolerance)
    biased = recorded[f"{case}/batch_var_biased"]
    np.testing.assert_allclose(variances[False], 0.9 + 0.1 * biased, rtol=tolerance)
    # (n - 1) / n of what PyTorch adds.
    np.testing.assert_allclose(variances[False] - 0.9, (variances[True] - 0.9) / 2, rtol=10 * tolerance)


def test_batch_norm_initializes_without_moving_its_statistics(rng):
    x = jnp.asarray(rng.normal(3.0, 2.0, (2, 2, 3, 3, 4)), jnp.float32)
    variables = BatchNorm3D().init(jax.random.key(0), x, use_running_average=False)
    np.testing.assert_array_equal(variables["batch_stats"]["mean"], 0.0)
    np.testing.assert_array_equal(variables["batch_stats"]["var"], 1.0)
    y = BatchNorm3D(dtype=jnp.bfloat16).apply(variables, x.astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16


def test_frozen_statistics_get_no_gradient(rng):
    x = jnp.asarray(rng.normal(size=(1, 2, 3, 3, 4)), jnp.float32)
    layer = BatchNorm3D(frozen=True)
    variables = layer.init(jax.random.key(0), x)
    assert set(variables) == {"params"}
    gradient = jax.grad(lambda p: (layer.apply({"params": p}, x) ** 3).sum())(variables["params"])
    for name, values in gradient.items():
        assert bool(jnp.any(values != 0)) == (name in ("scale", "bias")), name


def test_batch_norm_names_what_it_cannot_do():
    x = jnp.zeros((1, 1, 1, 1, 4))
    with pytest.raises(ValueError, match=r"more than one value a channel; got \(1, 1, 1, 1, 4\)"):
        BatchNorm3D().init(jax.random.key(0), x, use_running_average=False)
    with pytest.raises(ValueError, match="frozen"):
        BatchNorm3D(frozen=True).init(jax.random.key(0), x, use_running_average=False)
    with pytest.raises(ValueError, match=r"\[B,T,H,W,C\]; got \(2, 4\)"):
        BatchNorm3D().init(jax.random.key(0), jnp.zeros((2, 4)))


# --- R3D-18 (torchvision) ---------------------------------------------------------------------------------

WIDTHS = (64, 128, 256, 512)


def torchvision_shapes():
    """Names and shapes in the state dict of torchvision's r3d_18, without `fc` and `num_batches_tracked`."""
    shapes = {"stem.0.weight": (64, 3, 3, 7, 7)}
    norms = {"stem.1": 64}
    entering = 64
    for layer, width in enumerate(WIDTHS, start=1):
        for block in range(2):
            name = f"layer{layer}.{block}"
            shapes[f"{name}.conv1.0.weight"] = (width, entering, 3, 3, 3)
            shapes[f"{name}.conv2.0.weight"] = (width, width, 3, 3, 3)
            norms |= {f"{name}.conv1.1": width, f"{name}.conv2.1": width}
            if entering != width:
                shapes[f"{name}.downsample.0.weight"] = (width, entering, 1, 1, 1)
                norms[f"{name}.downsample.1"] = width
            entering = width
    for name, width in norms.items():
        shapes |= {f"{name}.{part}": (width,) for part in ("weight", "bias", "running_mean", "running_var")}
    return shapes


def random_state(rng):
    """A state dict whose statistics, scales and biases all count, and whose activations stay near one."""
    state = {}
    for name, shape in torchvision_shapes().items():
        if len(shape) == 5:
            state[name] = rng.normal(0.0, np.sqrt(2.0 / np.prod(shape[1:])), shape)
        elif name.endswith(("running_var", "weight")):
            state[name] = rng.uniform(0.5, 1.5, shape)
        else:
            state[name] = rng.normal(0.0, 0.2, shape)
    return state


def r3d_params(state):
    """This project's tree of parameters from torchvision's names."""
    parts = {"weight": "scale", "bias": "bias", "running_mean": "running_mean", "running_var": "running_var"}
    modules = {"0": "conv", "1": "norm"}
    params = {}
    for name, value in state.items():
        *path, module, part = name.split(".")
        if path[0] == "stem":
            leaf = params.setdefault(f"stem_{modules[module]}", {})
        else:
            layer, block, place = path
            inner = (
                f"downsample_{modules[module]}"
                if place == "downsample"
                else place.replace("conv", modules[module])
            )
            leaf = params.setdefault(f"{layer}_block{block}", {}).setdefault(inner, {})
        if module == "0":
            leaf["kernel"] = value.transpose(2, 3, 4, 1, 0)
        else:
            leaf[parts[part]] = value
    return params


def r3d_in_numpy(state, frames):
    """Torchvision's forward pass in NCDHW and evaluation mode; frames [B, 3, T, H, W]."""

    def convolve(x, name, strides, padding):
        kernel = state[f"{name}.weight"]
        x = np.pad(x, ((0, 0), (0, 0), *((p, p) for p in padding)))
        windows = np.lib.stride_tricks.sliding_window_view(x, kernel.shape[2:], axis=(2, 3, 4))
        windows = windows[:, :, :: strides[0], :: strides[1], :: strides[2]]
        return np.moveaxis(np.tensordot(windows, kernel, ((1, 5, 6, 7), (1, 2, 3, 4))), -1, 1)

    def norm(x, name):
        weight, bias, mean, variance = (
            state[f"{name}.{part}"][:, None, None, None]
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        return (x - mean) / np.sqrt(variance + 1e-5) * weight + bias

    x = np.maximum(norm(convolve(frames, "stem.0", (1, 2, 2), (1, 3, 3)), "stem.1"), 0)
    for layer, block in itertools.product((1, 2, 3, 4), (0, 1)):
        name = f"layer{layer}.{block}"
        strides = (2, 2, 2) if layer > 1 and block == 0 else (1, 1, 1)
        y = np.maximum(norm(convolve(x, f"{name}.conv1.0", strides, (1, 1, 1)), f"{name}.conv1.1"), 0)
        y = norm(convolve(y, f"{name}.conv2.0", (1, 1, 1), (1, 1, 1)), f"{name}.conv2.1")
        if f"{name}.downsample.0.weight" in state:
            x = norm(convolve(x, f"{name}.downsample.0", strides, (0, 0, 0)), f"{name}.downsample.1")
        x = np.maximum(x + y, 0)
    return x


def test_r3d_has_the_parameters_of_torchvision():
    inputs = jnp.zeros((1, 8, 32, 32)), jnp.ones((1, 8), bool)
    variables = jax.eval_shape(R3D18().init, jax.random.key(0), *inputs)
    assert set(variables) == {"params"}
    leaves = jax.tree_util.tree_leaves_with_path(variables["params"])
    ours = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in leaves}
    state = {name: np.broadcast_to(0.0, shape) for name, shape in torchvision_shapes().items()}
    theirs = jax.tree_util.tree_leaves_with_path(r3d_params(state))
    assert ours == {jax.tree_util.keystr(p, simple=True, separator="/"): x.shape for p, x in theirs}
    trainable = sum(np.prod(shape) for name, shape in ours.items() if "/running_" not in name)
    assert trainable == 33_371_472 - (512 * 400 + 400)  # torchvision's count, less `fc`


def test_kinetics_channels_normalize_the_grey_values_as_torchvision(rng):
    grey = rng.integers(0, 256, (2, 3, 4, 4)) / 255.0
    expected = np.stack(
        [(grey - mean) / std for mean, std in ((0.43216, 0.22803), (0.394666, 0.22145), (0.37645, 0.216989))],
        axis=-1,
    )
    with jax.enable_x64(True):
        np.testing.assert_allclose(kinetics_channels(jnp.asarray((grey - 0.2) / 0.2)), expected, rtol=1e-12)


@pytest.fixture(scope="module")
def state():
    return random_state(np.random.default_rng(0))


def test_r3d_equals_a_float64_rewrite_of_torchvision(state, rng):
    frames = rng.normal(size=(1, 8, 32, 32))
    with jax.enable_x64(True):
        params = jax.tree.map(jnp.asarray, r3d_params(state))
        forward = jax.jit(R3D18(jnp.float64).apply)
        ours = forward({"params": params}, jnp.asarray(frames), jnp.ones((1, 8), bool))
        three = np.asarray(kinetics_channels(jnp.asarray(frames)))
    expected = r3d_in_numpy(state, np.moveaxis(three, -1, 1))
    assert expected.shape == (1, 512, 1, 2, 2) and np.mean(expected > 0) > 0.2
    assert ours.dtype == np.float64
    np.testing.assert_allclose(np.moveaxis(ours, -1, 1), expected, rtol=1e-9, atol=1e-9)


def test_frames_appended_to_a_clip_change_no_valid_step(state, rng):
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), r3d_params(state))
    frames = rng.normal(size=(1, 21, 32, 32)).astype(np.float32)
    forward = jax.jit(R3D18().apply)
    short = np.asarray(forward({"params": params}, frames[:, :11], np.ones((1, 11), bool)))
    # What lies in padded frames must not matter either.
    long = np.asarray(forward({"params": params}, frames, np.arange(21)[None] < 11))
    assert short.shape == (1, 2, 2, 2, 512) and long.shape == (1, 3, 2, 2, 512)
    np.testing.assert_allclose(long[:, :2], short, rtol=1e-4, atol=1e-4 * short.max())
    assert np.all(long[:, 2] == 0.0) and np.all(short.max((0, 2, 3, 4)) > 0)


def test_r3d_names_the_shapes_it_cannot_use():
    with pytest.raises(ValueError, match=r"\(1, 8, 32, 32\) and \(1, 4\)"):
        jax.eval_shape(R3D18().init, jax.random.key(0), jnp.zeros((1, 8, 32, 32)), jnp.ones((1, 4), bool))
