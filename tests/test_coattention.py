"""ViLBERT's co-attention block against recorded values of its public code."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dilbert_jax.models.coattention import CoAttentionBlock

pytestmark = pytest.mark.numerics

# Stream here, its number in `biattention` and `biOutput`, its letter elsewhere.
STREAMS = (("region", 1, "v"), ("entity", 2, "t"))


@pytest.fixture(scope="module")
def recorded(reference_dir):
    return np.load(reference_dir / "vilbert_coattention.npz", allow_pickle=False)


def block_of(cfg, dtype=jnp.float32):
    return CoAttentionBlock(
        hidden_sizes=(cfg["v_hidden_size"], cfg["hidden_size"]),
        inner_size=cfg["bi_hidden_size"],
        num_heads=cfg["bi_num_attention_heads"],
        ffn_sizes=(cfg["v_intermediate_size"], cfg["intermediate_size"]),
        dtype=dtype,
    )


def vilbert_params(file, dtype):
    """Weights of BertConnectionLayer, [in, out] as in this project."""

    def get(name):
        return jnp.asarray(file[f"w/{name}"], dtype)

    def dense(name):
        return {"kernel": get(f"{name}.weight").T, "bias": get(f"{name}.bias")}

    def norm(name):
        return {"scale": get(f"{name}.weight"), "bias": get(f"{name}.bias")}

    params = {}
    for stream, number, letter in STREAMS:
        for kind in ("query", "key", "value"):
            params[f"{stream}_{kind}"] = {"dense": dense(f"biattention.{kind}{number}")}
        params[f"{stream}_ffn"] = {
            "attention_output": dense(f"biOutput.dense{number}"),
            "attention_norm": norm(f"biOutput.LayerNorm{number}"),
            "intermediate": dense(f"{letter}_intermediate.dense"),
            "output": dense(f"{letter}_output.dense"),
            "output_norm": norm(f"{letter}_output.LayerNorm"),
        }
    return params


@pytest.mark.parametrize(("precision", "tolerance"), [("f32", 1e-5), ("f64", 1e-9)])
def test_co_attention_equals_the_public_vilbert(recorded, precision, tolerance):
    with jax.enable_x64(precision == "f64"):
        dtype = jnp.float64 if precision == "f64" else jnp.float32
        block = block_of(json.loads(str(recorded["cfg"])), dtype)
        params = vilbert_params(recorded, dtype)
        hidden = {s: jnp.asarray(recorded[f"in_{letter}"], dtype) for s, _, letter in STREAMS}
        masks = {s: jnp.asarray(recorded[f"mask_{letter}"] == 1) for s, _, letter in STREAMS}
        assert not all(bool(mask.all()) for mask in masks.values())

        def run(hidden):
            return block.apply({"params": params}, hidden, masks)

        (out, weights), pull_back = jax.vjp(jax.jit(run), hidden)
        maps = {"region": "attn_text_over_image", "entity": "attn_image_over_text"}
        zero = jax.tree.map(jnp.zeros_like, weights)
        # The file does not name its loss; 0.3 sum(out_v) + sum(out_t^2) explains its gradients to rounding.
        cotangent = {"region": jnp.full_like(out["region"], 0.3), "entity": 2.0 * out["entity"]}
        (gradient,) = pull_back((cotangent, zero))
        for stream, _, letter in STREAMS:
            for ours, name in (
                (out[stream], f"out_{letter}"),
                (weights[stream], maps[stream]),
                (gradient[stream], f"grad_in_{letter}"),
            ):
                expected = recorded[f"{precision}/{name}"]
                assert ours.dtype == expected.dtype
                np.testing.assert_allclose(ours, expected, rtol=tolerance, atol=tolerance, err_msg=name)


def random_streams(rng):
    hidden = {"region": rng.normal(size=(2, 5, 12)), "entity": rng.normal(size=(2, 6, 8))}
    masks = {s: np.arange(x.shape[1]) < np.asarray([[3], [x.shape[1]]]) for s, x in hidden.items()}
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), hidden), masks


SMALL = CoAttentionBlock((12, 8), inner_size=16, num_heads=4, ffn_sizes=(20, 24), dropout=0.5)
apply_small = jax.jit(SMALL.apply, static_argnames="deterministic")


def test_shapes_follow_each_streams_own_widths(rng):
    hidden, masks = random_streams(rng)
    params = jax.jit(SMALL.init)(jax.random.key(0), hidden, masks)["params"]
    out, weights = apply_small({"params": params}, hidden, masks)
    assert {s: x.shape for s, x in out.items()} == {"region": (2, 5, 12), "entity": (2, 6, 8)}
    assert {s: x.shape for s, x in weights.items()} == {"region": (2, 4, 6, 5), "entity": (2, 4, 5, 6)}
    assert params["region_ffn"]["attention_output"]["kernel"].shape == (16, 12)
    assert params["entity_ffn"]["intermediate"]["kernel"].shape == (8, 24)


def test_masked_positions_change_nothing_and_dropout_does(rng):
    hidden, masks = random_streams(rng)
    params = jax.jit(SMALL.init)(jax.random.key(0), hidden, masks)["params"]
    out, weights = apply_small({"params": params}, hidden, masks)
    altered = {s: jnp.where(masks[s][..., None], x, 9.0) for s, x in hidden.items()}
    again, _ = apply_small({"params": params}, altered, masks)
    for stream, mask in masks.items():
        np.testing.assert_array_equal(out[stream][mask], again[stream][mask])
        assert not np.any(np.asarray(weights[stream])[0, :, :, ~mask[0]])
    rngs = {"dropout": jax.random.key(1)}
    dropped, _ = apply_small({"params": params}, hidden, masks, deterministic=False, rngs=rngs)
    assert not np.allclose(dropped["region"], out["region"])


def test_wrong_streams_are_named(rng):
    hidden, masks = random_streams(rng)
    with pytest.raises(ValueError, match=r"widths \(12, 8\), not \(8, 12\)"):
        CoAttentionBlock((8, 12), 16, 4, (20, 24)).init(jax.random.key(0), hidden, masks)
    with pytest.raises(ValueError, match=r"hidden states \['region'\]"):
        SMALL.init(jax.random.key(0), {"region": hidden["region"]}, masks)
