"""The model: shapes, convolution and region pooling against plain references, padding invariance."""

import dataclasses
import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from tiny import CONFIG, NAMES, A, B, E, L, M, R, init_params, make_batch

from dilbert_jax import models
from dilbert_jax.config import MODEL_PRESETS, check_config, default_config
from dilbert_jax.models import SYSTEMS, make_network
from dilbert_jax.models.attention import attend
from dilbert_jax.models.conv3d import conv3d, patchify
from dilbert_jax.models.embeddings import sinusoids
from dilbert_jax.models.regions import pool_regions
from dilbert_jax.training.objectives import VISUAL

# One worker: what a test has traced and compiled, the next one uses.
pytestmark = [pytest.mark.numerics, pytest.mark.xdist_group("models")]


@pytest.fixture(scope="module", params=SYSTEMS)
def network(request):
    """Every system: its configuration and parameters; the CNN that all share has two stages in one of them."""
    stages = {"channels": (8, 16), "blocks": (1, 1)} if request.param == "dilbert" else {}
    config = dataclasses.replace(CONFIG, name=request.param, **stages)
    return config, init_params(config=config)


def encode(network, batch, zeroed=False):
    """Encodes a batch deterministically, all or no description tokens blanked, and runs both sets of heads."""
    config, params = network
    steps = batch["frame_mask"].shape[1] // config.stem_patch[0]
    # An argument in every case: tests that differ in it alone share a program, and compiling dominates.
    zeroed = np.full((len(batch["frames"]), steps), zeroed)
    return _forward(config)({"params": params}, batch, zeroed)


@functools.cache  # or every call would trace it again
def _forward(config):
    def run(module, batch, zeroed):
        encoded = module.encode(*(batch[name] for name in VISUAL), description_zeroed=zeroed)
        return encoded, module.pretrain(encoded, batch["mlm_positions"]), module.annotate(encoded, *NAMES)

    return jax.jit(nn.apply(run, make_network(config)))


@pytest.mark.parametrize("strides", [(1, 1, 1), (1, 2, 2), (2, 2, 2)])
@pytest.mark.parametrize("kernel_size", [(3, 3, 3), (1, 3, 3), (3, 1, 1)])
def test_conv3d_equals_the_general_convolution(strides, kernel_size):
    x = jax.random.normal(jax.random.key(0), (2, 5, 7, 6, 3))
    kernel = jax.random.normal(jax.random.key(1), (*kernel_size, 3, 4))
    padding = [(k // 2, k // 2) for k in kernel_size]
    numbers = ("NDHWC", "DHWIO", "NDHWC")

    def reference(x, kernel):
        return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=numbers)

    np.testing.assert_allclose(conv3d(x, kernel, strides), reference(x, kernel), atol=1e-4)
    weight = jax.random.normal(jax.random.key(2), reference(x, kernel).shape)
    ours = jax.jit(jax.grad(lambda x, k: (conv3d(x, k, strides) * weight).sum(), (0, 1)))(x, kernel)
    theirs = jax.jit(jax.grad(lambda x, k: (reference(x, k) * weight).sum(), (0, 1)))(x, kernel)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3)


def test_conv3d_names_the_shapes_it_cannot_use():
    with pytest.raises(ValueError, match=r"\(2, 5, 7, 6, 3\).*\(3, 3, 3, 2, 4\)"):
        conv3d(jnp.zeros((2, 5, 7, 6, 3)), jnp.zeros((3, 3, 3, 2, 4)))
    with pytest.raises(ValueError, match="odd kernel"):
        conv3d(jnp.zeros((2, 5, 7, 6, 3)), jnp.zeros((2, 3, 3, 3, 4)))


def test_patchify_keeps_each_block_together():
    x = np.arange(2 * 4 * 4 * 4).reshape(2, 4, 4, 4, 1)
    patches = patchify(jnp.asarray(x), (2, 2, 2))
    assert patches.shape == (2, 2, 2, 2, 8)
    np.testing.assert_array_equal(patches[1, 0, 1, 0], x[1, 0:2, 2:4, 0:2, 0].ravel())


def test_region_pooling_averages_exactly_the_box():
    features = np.random.default_rng(0).normal(size=(1, 3, 4, 4, 2))
    boxes = np.asarray([[[0.25, 0.5, 0.75, 1.0], [0.125, 0.0, 0.375, 0.25]]])
    pooled = pool_regions(jnp.asarray(features), jnp.asarray(boxes), jnp.asarray([[1.0, 0.5]]), bins=1)
    np.testing.assert_allclose(pooled[0, 0], features[0, 1, 1:3, 2:4].mean((0, 1)), rtol=1e-5)
    # Half of row 0 and half of row 1, halfway between steps 0 and 1.
    expected = features[0, :2, 0:2, 0].mean((0, 1))
    np.testing.assert_allclose(pooled[0, 1], expected, rtol=1e-5)


def test_attention_ignores_masked_keys_and_survives_none():
    q, k, v = (jax.random.normal(jax.random.key(i), (1, 3, 2, 4)) for i in range(3))
    context, weights = attend(q, k, v, jnp.asarray([[True, False, True]]))
    assert float(weights[..., 1].max()) == 0.0
    np.testing.assert_allclose(weights.sum(-1), 1.0, rtol=1e-6)
    context, weights = attend(q, k, v, jnp.zeros((1, 3), bool))
    assert float(jnp.abs(context).max()) == 0.0 and bool(jnp.isfinite(weights).all())


def test_shapes_of_all_heads(network):
    encoded, tasks, annotation = encode(network, make_batch())
    assert encoded.fused.shape == (B, CONFIG.hidden_size)
    assert tasks["mlm"].shape == (B, M, 40)
    assert tasks["mdc"].shape == (B, A, 5)
    assert tasks["moc"].shape == (B, R, 4)
    assert tasks["cmm"].shape == (B, 2)
    assert tasks["summary"].shape == (B, 2, 5)
    assert annotation["organ"].shape == (B, 3)
    assert annotation["match"]["region"].shape == (B, E, R)
    assert annotation["match"]["frame"].shape == (B, E, A)
    assert encoded.cross_weights["entity"].shape == (B, 2, A, L)


def assert_same(first, second, tolerance=2e-5):
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance)


def test_blocks_that_make_places_alike_do_not_hide_them(network):
    """Entities are matched with what each place showed before the blocks, too."""
    config, params = network
    encoded, _, _ = encode(network, make_batch())
    alike = {name: jnp.broadcast_to(x.mean(1, keepdims=True), x.shape) for name, x in encoded.streams.items()}
    model = make_network(config)
    annotate = jax.jit(functools.partial(model.apply, method=model.annotate))
    match = annotate({"params": params}, encoded.replace(streams=alike), *NAMES)["match"]
    assert float(match["frame"].std(-1).min()) > 1e-3
    assert float(match["region"].std(-1).min()) > 1e-3


def test_padded_tokens_change_nothing(network):
    batch = make_batch()
    batch["token_mask"][:, -3:] = False
    batch["mlm_positions"] = np.minimum(batch["mlm_positions"], L - 4)
    _, tasks, annotation = encode(network, batch)
    batch["token_ids"][:, -3:] = 7
    batch["token_types"][:, -3:] = 2
    _, other_tasks, other_annotation = encode(network, batch)
    assert_same((tasks, annotation), (other_tasks, other_annotation))


def test_padded_regions_change_nothing(network):
    batch = make_batch()
    batch["region_mask"][:, -2:] = False
    _, tasks, annotation = encode(network, batch)
    batch["boxes"][:, -2:] = [0.1, 0.1, 0.9, 0.9]
    _, other_tasks, other_annotation = encode(network, batch)
    for t in (tasks, other_tasks):
        t["moc"] = t["moc"][:, :-2]
    for a in (annotation, other_annotation):
        a["match"]["region"] = a["match"]["region"][..., :-2]
    assert_same((tasks, annotation), (other_tasks, other_annotation))


def test_the_amount_of_padding_changes_nothing(network):
    """Not only what stands in the padding, but how much of it there is: fewer tokens and regions, more frames."""
    first = make_batch()
    first["token_mask"][:, -3:] = False
    first["region_mask"][:, -2:] = False
    first["mlm_positions"] = np.minimum(first["mlm_positions"], L - 4)
    second = dict(first)
    for name in ("token_ids", "token_types", "token_mask"):
        second[name] = first[name][:, :-3]
    for name in ("boxes", "box_frames", "region_mask"):
        second[name] = first[name][:, :-2]
    noise = np.random.default_rng(5).integers(0, 256, (B, 4, 16, 16)).astype(np.uint8)
    second["frames"] = np.concatenate([first["frames"], noise], axis=1)
    second["frame_mask"] = np.concatenate([first["frame_mask"], np.zeros((B, 4), bool)], axis=1)
    encoded, tasks, annotation = encode(network, first)
    other_encoded, other_tasks, other_annotation = encode(network, second)
    tasks["moc"] = tasks["moc"][:, :-2]
    annotation["match"]["region"] = annotation["match"]["region"][..., :-2]
    other_tasks["mdc"] = other_tasks["mdc"][:, :A]
    other_annotation["match"]["frame"] = other_annotation["match"]["frame"][..., :A]
    assert_same((tasks, annotation), (other_tasks, other_annotation))
    assert_same(encoded.streams["entity"][:, :-3], other_encoded.streams["entity"])
    assert_same(encoded.fused, other_encoded.fused)


def test_zeroed_description_hides_the_frames_from_its_own_token(network):
    batch = make_batch()
    batch["region_mask"][:] = False
    _, tasks, _ = encode(network, batch, zeroed=True)
    batch["frames"] = make_batch(seed=9)["frames"]
    _, other, _ = encode(network, batch, zeroed=True)
    assert_same(tasks["mdc"], other["mdc"])
    _, seen, _ = encode(network, batch)
    assert float(jnp.abs(seen["mdc"] - other["mdc"]).max()) > 1e-3


def test_frame_order_matters(network):
    batch = make_batch()
    encoded, _, _ = encode(network, batch)
    batch["frames"] = batch["frames"][:, ::-1]
    reversed_, _, _ = encode(network, batch)
    assert float(jnp.abs(encoded.fused - reversed_.fused).max()) > 1e-4


def shapes_of_params(model, batch):
    """As Flax finds them from arguments of these shapes."""
    arguments = [*(batch[name] for name in VISUAL), batch["mlm_positions"], *NAMES]
    return jax.eval_shape(model.init, jax.random.key(0), *arguments)["params"]


@pytest.mark.parametrize("name", SYSTEMS)
@pytest.mark.parametrize(
    "preset", ["tiny", "small", *(pytest.param(p, marks=pytest.mark.slow) for p in ("medium", "base"))]
)
def test_every_preset_builds(preset, name):
    fields = {**MODEL_PRESETS[preset], "stem_patch": (2, 4, 4), "max_tokens": L, "dropout": 0.1, "name": name}
    config = dataclasses.replace(CONFIG, **fields)
    batch = {k: jax.ShapeDtypeStruct((1, *v.shape[1:]), v.dtype) for k, v in make_batch().items()}
    batch["frames"] = jax.ShapeDtypeStruct((1, 4, 64, 64), np.uint8)
    model = make_network(config)
    shapes = shapes_of_params(model, batch)
    count = sum(x.size for x in jax.tree.leaves(shapes))
    assert count > {"tiny": 1e5, "small": 1e6, "medium": 5e6, "base": 1e8}[preset]
    assert shapes == jax.eval_shape(functools.partial(models.init_params, model), jax.random.key(0))


def test_parameters_of_r3d_18_do_not_depend_on_the_clip():
    model = make_network(dataclasses.replace(CONFIG, video="r3d_18"))
    batch = {k: jax.ShapeDtypeStruct((2, *v.shape[1:]), v.dtype) for k, v in make_batch().items()}
    batch["frames"] = jax.ShapeDtypeStruct((2, 16, 112, 96), np.uint8)
    batch["frame_mask"] = jax.ShapeDtypeStruct((2, 16), bool)
    expected = shapes_of_params(model, batch)
    assert expected == jax.eval_shape(functools.partial(models.init_params, model), jax.random.key(0))


@pytest.mark.parametrize("stages", [1, 4, 5, 6])
def test_a_cnn_of_any_number_of_stages_is_initialised(stages):
    config = default_config("tiny")
    config.model.update(channels=(8,) * stages, blocks=(1,) * stages)
    config.data.size = 4 * 2**stages  # the smallest that is accepted
    check_config(config)
    model = make_network(
        dataclasses.replace(CONFIG, channels=config.model.channels, blocks=config.model.blocks)
    )
    params = jax.eval_shape(functools.partial(models.init_params, model), jax.random.key(0))
    assert f"stage{stages - 1}_block0" in params["video"]


def test_positions_start_where_a_step_is_one_rotation():
    table = np.asarray(sinusoids(jax.random.key(0), (96, 72)), np.float64)
    assert table.std() == pytest.approx(0.03, rel=0.05)
    step = np.linalg.lstsq(table[:-1], table[1:], rcond=None)[0]
    np.testing.assert_allclose(table[:-1] @ step, table[1:], atol=1e-6)
    np.testing.assert_allclose(
        np.linalg.norm(table, axis=1), 0.03 * 72**0.5, rtol=1e-6
    )  # the step only turns
    distance = np.linalg.norm(table[:, None] - table[None], axis=-1)
    assert (distance + np.eye(96)).min() > 0.05  # no two alike
    assert sinusoids(jax.random.key(0), (1, 5)).shape == (1, 5)


@pytest.mark.parametrize("name", ["dilbert", "videobert", "hero"])
def test_learned_positions_start_from_sinusoids(name):
    params = init_params(config=dataclasses.replace(CONFIG, name=name))
    found = {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(params)}
    tables = {path: x for path, x in found.items() if "'position'" in path or "'place'" in path}
    assert len(tables) >= 2
    for table in tables.values():
        np.testing.assert_array_equal(table, sinusoids(jax.random.key(0), table.shape))


def module_path(path):
    return "/".join(str(key.key) for key in path)


@pytest.mark.parametrize("name", SYSTEMS)
def test_matrices_of_the_transformers_start_as_berts(name):
    """BERT's 0.02 at width 768, in proportion to 1/sqrt(width)."""
    params = init_params(config=dataclasses.replace(CONFIG, name=name))
    projection = r"(query|key|value)/dense|attention_output|intermediate|output"
    found = ((module_path(path), x) for path, x in jax.tree_util.tree_leaves_with_path(params))
    matrices = [x for path, x in found if re.search(rf"({projection})/kernel$", path)]
    assert len(matrices) >= 2 * 6
    width = CONFIG.hidden_size
    for matrix in matrices:
        np.testing.assert_allclose(
            matrix.std(), 0.02 * np.sqrt(768 / width), rtol=5 / np.sqrt(2 * matrix.size)
        )
