"""Layers and optimizer against outside witnesses.

Recorded values of PyTorch's Conv3d and SGD, Hugging Face's BERT and PaddleVideo's ActBERT; a NumPy rewrite of TNT.
"""

import json
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dilbert_jax.models.attention import TransformerBlock
from dilbert_jax.models.conv3d import conv3d
from dilbert_jax.models.embeddings import NUM_TOKEN_TYPES, EntityEmbedding
from dilbert_jax.models.heads import Transform
from dilbert_jax.models.tangled import STREAMS, TangledBlock, resize_nearest
from dilbert_jax.training.optimizer import OptimizerConfig, make_optimizer

pytestmark = pytest.mark.numerics


@pytest.fixture(scope="module")
def vectors(reference_dir):
    return lambda name: np.load(reference_dir / f"{name}.npz", allow_pickle=False)


# --- 3-D convolution (PyTorch) ----------------------------------------------------------------------------

# Name in the file -> strides; kernels are odd and padded by half, as conv3d does.
CONVOLUTIONS = {
    "k3s1p1": (1, 1, 1),
    "k3s2p1_odd": (2, 2, 2),
    "k3s(1,2,2)p1": (1, 2, 2),
    "k(3,7,7)s(1,2,2)p(1,3,3)_stem": (1, 2, 2),
    "k(1,3,3)p(0,1,1)": (1, 1, 1),
    "k(3,1,1)p(1,0,0)": (1, 1, 1),
    "k1s2": (2, 2, 2),
}


@pytest.mark.parametrize("size", ["odd", "even"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_conv3d_equals_pytorch(vectors, name, size):
    file = vectors("conv3d")
    recorded = {key: file[f"conv/{name}/{size}/{key}"] for key in ("x", "w", "b", "f64/y")}
    with jax.enable_x64(True):
        x = jnp.asarray(np.moveaxis(recorded["x"], 1, -1))  # NCDHW -> NDHWC
        kernel = jnp.asarray(recorded["w"].transpose(2, 3, 4, 1, 0))

        @jax.jit
        def with_gradients(x, kernel):
            y, pull_back = jax.vjp(lambda a, k: conv3d(a, k, CONVOLUTIONS[name]) + recorded["b"], x, kernel)
            return y, *pull_back(2.0 * y)  # of the sum of squares

        y, grad_x, grad_kernel = with_gradients(x, kernel)
        np.testing.assert_allclose(np.moveaxis(y, -1, 1), recorded["f64/y"], rtol=1e-9, atol=1e-11)
        for ours, key, axes in (
            (grad_x, "grad_x", (0, 4, 1, 2, 3)),
            (grad_kernel, "grad_w", (4, 3, 0, 1, 2)),
        ):
            expected = file[f"conv/{name}/{size}/f64/{key}"]
            np.testing.assert_allclose(ours.transpose(axes), expected, rtol=1e-9, atol=1e-10)


# --- SGD (PyTorch) ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "momentum", "decay"),
    [
        ("lr0.24_m0.9_wd1e-4", 0.9, 1e-4),
        ("lr0.1_m0.9_wd0", 0.9, 0.0),
        ("lr0.24_m0_wd1e-4", 0.0, 1e-4),
        ("cosine_lr0.24_m0.9_wd1e-4", 0.9, 1e-4),
    ],
)
def test_sgd_follows_pytorch(vectors, name, momentum, decay):
    file = vectors("sgd")
    config = OptimizerConfig("sgd", weight_decay=decay, momentum=momentum, clip_norm=0.0)
    with jax.enable_x64(True):
        rates = jnp.asarray(file[f"f64/{name}/lr"])
        x, y = jnp.asarray(file["X"]), jnp.asarray(file["y"])
        params = {key: jnp.asarray(file[f"init/{key}"]) for key in ("W1", "b1", "W2", "b2")}

        def loss(p):
            logits = jnp.tanh(x @ p["W1"] + p["b1"]) @ p["W2"] + p["b2"]
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        optimizer = make_optimizer(config, 40).replace(schedule=lambda step: rates[step])
        state = optimizer.init(params)

        @jax.jit
        def update(params, state):
            value, gradient = jax.value_and_grad(loss)(params)
            updates, state = optimizer.update(gradient, state, params)
            return value, optax.apply_updates(params, updates), state

        for step in range(40):
            value, params, state = update(params, state)
            np.testing.assert_allclose(value, file[f"f64/{name}/loss"][step], rtol=1e-9)
            for key, ours in params.items():
                expected = file[f"f64/{name}/{key}"][step]
                np.testing.assert_allclose(ours, expected, rtol=1e-8, atol=1e-12)


# --- BERT (Hugging Face) ----------------------------------------------------------------------------------


class Bert(nn.Module):
    """BERT from this project's layers; returns the hidden states, attention maps and word logits."""

    cfg: dict

    @nn.compact
    def __call__(self, ids, types, mask):
        c = self.cfg
        size, heads = c["hidden_size"], c["num_attention_heads"]
        embedding = EntityEmbedding(
            c["vocab_size"], size, c["max_position_embeddings"], 0.0, name="embedding"
        )
        hidden, attention = [embedding(ids, types)], []
        for i in range(c["num_hidden_layers"]):
            block = TransformerBlock(size, heads, c["intermediate_size"], 0.0, name=f"layer_{i}")
            state, weights = block(hidden[-1], mask)
            hidden.append(state)
            attention.append(weights)
        logits = embedding.attend(Transform(size, name="transform")(hidden[-1]))
        return hidden, attention, logits


def bert_params(file, num_layers, prefix="w"):
    def get(name):
        return jnp.asarray(file[f"{prefix}/{name}"])

    def dense(name):
        return {"kernel": get(f"{name}.weight").T, "bias": get(f"{name}.bias")}

    def norm(name):
        return {"scale": get(f"{name}.weight"), "bias": get(f"{name}.bias")}

    types = jnp.zeros((NUM_TOKEN_TYPES, file["w/bert.pooler.dense.bias"].size))
    params = {
        "embedding": {
            "word": {"embedding": get("bert.embeddings.word_embeddings.weight")},
            "position": {"embedding": get("bert.embeddings.position_embeddings.weight")},
            "token_type": {
                "embedding": types.at[:2].set(get("bert.embeddings.token_type_embeddings.weight"))
            },
            "norm": norm("bert.embeddings.LayerNorm"),
        },
        "transform": {
            "dense": dense("cls.predictions.transform.dense"),
            "norm": norm("cls.predictions.transform.LayerNorm"),
        },
    }
    for i in range(num_layers):
        layer = f"bert.encoder.layer.{i}"
        block = params[f"layer_{i}"] = {
            name: {"dense": dense(f"{layer}.attention.self.{name}")} for name in ("query", "key", "value")
        }
        block["ffn"] = {
            "attention_output": dense(f"{layer}.attention.output.dense"),
            "attention_norm": norm(f"{layer}.attention.output.LayerNorm"),
            "intermediate": dense(f"{layer}.intermediate.dense"),
            "output": dense(f"{layer}.output.dense"),
            "output_norm": norm(f"{layer}.output.LayerNorm"),
        }
    return params


def test_bert_layers_equal_hugging_face(vectors):
    file = vectors("hf_bert_tiny")
    cfg = json.loads(str(file["cfg"]))
    model = Bert(cfg)
    params = bert_params(file, cfg["num_hidden_layers"])
    ids, types = (jnp.asarray(file[f"in/{n}"].astype(np.int32)) for n in ("input_ids", "token_type_ids"))
    mask = jnp.asarray(file["in/attention_mask"] == 1)
    outside = ("bert.pooler.dense", "cls.seq_relationship")
    head = {f"{n}.{part}": jnp.asarray(file[f"w/{n}.{part}"]) for n in outside for part in ("weight", "bias")}
    head["cls.predictions.bias"] = jnp.asarray(file["w/cls.predictions.bias"])

    hidden, attention, logits = jax.jit(model.apply)({"params": params}, ids, types, mask)
    for i, state in enumerate(hidden):
        np.testing.assert_allclose(state, file[f"out/hidden_{i}"], atol=1e-5)
    for i, weights in enumerate(attention):
        np.testing.assert_allclose(weights, file[f"out/attn_{i}"], atol=1e-6)
    np.testing.assert_allclose(
        logits + head["cls.predictions.bias"], file["out/prediction_logits"], atol=2e-5
    )

    def loss(p):
        hidden, _, logits = model.apply({"params": p}, ids, types, mask)
        labels = jnp.asarray(file["in/labels"].astype(np.int32))
        word = optax.softmax_cross_entropy_with_integer_labels(
            logits + head["cls.predictions.bias"], jnp.maximum(labels, 0)
        )
        # The sentence task reads BERT's own tanh pooler, which is not a layer of this project.
        pooled = jnp.tanh(
            hidden[-1][:, 0] @ head["bert.pooler.dense.weight"].T + head["bert.pooler.dense.bias"]
        )
        pair = pooled @ head["cls.seq_relationship.weight"].T + head["cls.seq_relationship.bias"]
        following = jnp.asarray(file["in/next_sentence_label"].astype(np.int32))
        return (
            jnp.where(labels >= 0, word, 0.0).sum() / (labels >= 0).sum()
            + optax.softmax_cross_entropy_with_integer_labels(pair, following).mean()
        )

    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    np.testing.assert_allclose(value, file["out/loss"], rtol=1e-5)
    expected = bert_params(file, cfg["num_hidden_layers"], prefix="grad")
    for (path, ours), theirs in zip(
        jax.tree_util.tree_leaves_with_path(gradient), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-5, err_msg=jax.tree_util.keystr(path))


# --- tangled transformer (PaddleVideo; NumPy) -------------------------------------------------------------


def actbert_params(file):
    """Weights of PaddleVideo's layer, [in, out] as in this project; v = region, t = text, a = action."""

    def dense(name):
        weight, bias = (file[f"equal768/w/{name}.{part}"] for part in ("weight", "bias"))
        return {"kernel": weight, "bias": bias}

    def norm(name):
        return {
            "scale": file[f"equal768/w/{name}.weight"],
            "bias": file[f"equal768/w/{name}.bias"],
        }

    params = {}
    for number, (letter, stream) in enumerate(
        zip("vta", ("region", "entity", "description"), strict=True), start=1
    ):
        for kind in ("query", "key", "value"):
            params[f"{stream}_{kind}"] = {"dense": dense(f"ent_attention.{kind}{number}")}
        params[f"{stream}_ffn"] = {
            "attention_output": dense(f"ent_output.dense{number}"),
            "attention_norm": norm(f"ent_output.LayerNorm{number}"),
            "intermediate": dense(f"{letter}_intermediate.dense"),
            "output": dense(f"{letter}_output.dense"),
            "output_norm": norm(f"{letter}_output.LayerNorm"),
        }
    for stream, letter in (("entity", "t"), ("region", "v")):
        params[f"cross_{stream}_key"] = {"dense": dense(f"ent_attention.key_a{letter}")}
        # The public code has value_av, never uses it, and uses value_at twice.
        params[f"cross_{stream}_value"] = {"dense": dense("ent_attention.value_at")}
    return params


def test_add_resized_equals_the_public_actbert(vectors):
    file = vectors("actbert_tnt_paddle")
    letters = {"region": "v", "entity": "t", "description": "a"}
    hidden = {s: jnp.asarray(file[f"equal768/in_{c}"]) for s, c in letters.items()}
    masks = {s: jnp.asarray(file[f"equal768/mask_{c}"] == 1) for s, c in letters.items()}
    cfg = json.loads(str(file["equal768/cfg"]))
    block = TangledBlock(
        cfg["hidden_size"], cfg["bi_num_attention_heads"], cfg["intermediate_size"], mode="add_resized"
    )
    out, _ = jax.jit(block.apply)({"params": actbert_params(file)}, hidden, masks)
    for stream, letter in letters.items():
        np.testing.assert_allclose(out[stream], file[f"equal768/out_{letter}"], atol=2e-5, err_msg=stream)


@pytest.mark.parametrize(("source", "length"), [(5, 36), (5, 37), (5, 7), (7, 5), (3, 10), (6, 4)])
def test_resizing_picks_the_positions_of_paddle(vectors, source, length):
    expected = vectors("actbert_tnt_paddle")[f"interp/L{source}_M{length}"]
    ours = resize_nearest(jnp.arange(source, dtype=jnp.float32)[None, :, None], length)[0, :, 0]
    np.testing.assert_array_equal(ours, expected)


def tnt_stack_in_numpy(params, hidden, masks, num_heads):
    """Equations (1) and (2) and decision D4, written out sample by sample and head by head."""
    erf = np.vectorize(math.erf)

    def linear(name, x):
        return x @ np.float64(name["kernel"]) + np.float64(name["bias"])

    def norm(name, x):
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-12)
        return scaled * np.float64(name["scale"]) + np.float64(name["bias"])

    def multi_head(query, key, value, valid):
        width = query.shape[-1] // num_heads
        parts = []
        for head in range(num_heads):
            cut = slice(head * width, (head + 1) * width)
            scores = query[:, cut] @ key[valid][:, cut].T / np.sqrt(width)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            parts.append(weights / weights.sum(-1, keepdims=True) @ value[valid][:, cut])
        return np.concatenate(parts, -1)

    out = {stream: np.zeros(np.shape(x)) for stream, x in hidden.items()}
    for sample in range(len(hidden["entity"])):
        h = {s: np.float64(x[sample]) for s, x in hidden.items()}
        valid = {s: np.asarray(m[sample]) for s, m in masks.items()}
        key = {s: linear(params[f"{s}_key"]["dense"], h[s]) for s in STREAMS}
        value = {s: linear(params[f"{s}_value"]["dense"], h[s]) for s in STREAMS}
        extra_key, extra_value = {}, {}
        for s in ("entity", "region"):
            query = linear(params[f"cross_{s}_query"]["dense"], h["description"])
            fused = multi_head(query, key[s], value[s], valid[s])
            extra_key[s] = linear(params[f"cross_{s}_key"]["dense"], fused)
            extra_value[s] = linear(params[f"cross_{s}_value"]["dense"], fused)
        for s, others in (
            ("entity", ["region"]),
            ("region", ["entity"]),
            ("description", ["entity", "region"]),
        ):
            keys = np.concatenate([key[s], *(extra_key[o] for o in others)])
            values = np.concatenate([value[s], *(extra_value[o] for o in others)])
            usable = np.concatenate([valid[s], *(valid["description"] for _ in others)])
            context = multi_head(linear(params[f"{s}_query"]["dense"], h[s]), keys, values, usable)
            p = params[f"{s}_ffn"]
            x = norm(p["attention_norm"], h[s] + linear(p["attention_output"], context))
            y = linear(p["intermediate"], x)
            y = linear(p["output"], y * 0.5 * (1.0 + erf(y / np.sqrt(2.0))))
            out[s][sample] = norm(p["output_norm"], x + y)
    return out


def test_stack_equals_a_float64_rewrite():
    rng = np.random.default_rng(0)
    sizes = {"entity": 7, "description": 4, "region": 5}
    hidden = {s: rng.normal(size=(3, n, 24)) for s, n in sizes.items()}
    masks = {s: np.arange(n) < rng.integers(2, n + 1, (3, 1)) for s, n in sizes.items()}
    with jax.enable_x64(True):
        block = TangledBlock(24, 4, 40, dtype=jnp.float64)
        params = jax.jit(block.init)(jax.random.key(0), hidden, masks)["params"]
        # Biases and scales that are not the initial zeros and ones, so that every one of them counts.
        params = jax.tree.map(lambda p: p + jnp.asarray(0.1 * rng.normal(size=p.shape)), params)
        out, _ = jax.jit(block.apply)({"params": params}, hidden, masks)
        params = jax.tree.map(np.asarray, params)
    expected = tnt_stack_in_numpy(params, hidden, masks, 4)
    for stream in STREAMS:
        # Softmax and scores stay float32 in the layer, whatever the compute type.
        np.testing.assert_allclose(out[stream], expected[stream], atol=2e-6, err_msg=stream)


def test_the_modes_differ_and_an_unknown_one_is_refused():
    hidden = {s: jnp.ones((1, 3, 8)) * i for i, s in enumerate(STREAMS)}
    masks = {s: jnp.ones((1, 3), bool) for s in STREAMS}
    counts = {}
    for mode in ("stack", "add_resized"):
        block = TangledBlock(8, 2, 16, mode=mode)
        params = jax.eval_shape(block.init, jax.random.key(0), hidden, masks)["params"]
        counts[mode] = {name for name in params if name.startswith("cross")}
    assert counts["stack"] - counts["add_resized"] == {"cross_entity_query", "cross_region_query"}
    with pytest.raises(ValueError, match=r"TNT mode is 'concat'; choose one of stack, add_resized"):
        TangledBlock(8, 2, 16, mode="concat").init(jax.random.key(0), hidden, masks)
