"""Layers and optimizer against recorded values of outside code: PyTorch's Conv3d and SGD, Hugging Face's BERT."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dilbert_jax.models.attention import FeedForward, HeadsProjection, attend
from dilbert_jax.models.conv3d import conv3d
from dilbert_jax.models.embeddings import NUM_TOKEN_TYPES, EntityEmbedding
from dilbert_jax.models.heads import Transform
from dilbert_jax.training.optimizer import OptimizerConfig, make_optimizer


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
        y, pull_back = jax.vjp(lambda a, k: conv3d(a, k, CONVOLUTIONS[name]) + recorded["b"], x, kernel)
        np.testing.assert_allclose(np.moveaxis(y, -1, 1), recorded["f64/y"], rtol=1e-9, atol=1e-11)
        grad_x, grad_kernel = pull_back(2.0 * y)  # of the sum of squares
        for ours, key, axes in (
            (grad_x, "grad_x", (0, 4, 1, 2, 3)),
            (grad_kernel, "grad_w", (4, 3, 0, 1, 2)),
        ):
            expected = file[f"conv/{name}/{size}/f64/{key}"]
            np.testing.assert_allclose(ours.transpose(axes), expected, rtol=1e-9, atol=1e-10)


# --- SGD (PyTorch) ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "rate", "momentum", "decay"),
    [
        ("lr0.24_m0.9_wd1e-4", 0.24, 0.9, 1e-4),
        ("lr0.1_m0.9_wd0", 0.1, 0.9, 0.0),
        ("lr0.24_m0_wd1e-4", 0.24, 0.0, 1e-4),
    ],
)
def test_sgd_follows_pytorch(vectors, monkeypatch, name, rate, momentum, decay):
    file = vectors("sgd")
    config = OptimizerConfig("sgd", rate, weight_decay=decay, momentum=momentum, clip_norm=0.0)
    monkeypatch.setattr(
        "dilbert_jax.training.optimizer.make_schedule", lambda *_: optax.constant_schedule(rate)
    )
    with jax.enable_x64(True):
        x, y = jnp.asarray(file["X"]), jnp.asarray(file["y"])
        params = {key: jnp.asarray(file[f"init/{key}"]) for key in ("W1", "b1", "W2", "b2")}

        def loss(p):
            logits = jnp.tanh(x @ p["W1"] + p["b1"]) @ p["W2"] + p["b2"]
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        optimizer = make_optimizer(config, 40)
        state = optimizer.init(params)
        for step in range(40):
            value, gradient = jax.value_and_grad(loss)(params)
            np.testing.assert_allclose(value, file[f"f64/{name}/loss"][step], rtol=1e-9)
            updates, state = optimizer.update(gradient, state, params)
            params = optax.apply_updates(params, updates)
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
            query, key, value = (
                HeadsProjection(heads, size, name=f"{i}_{n}")(hidden[-1]) for n in ("query", "key", "value")
            )
            context, weights = attend(query, key, value, mask)
            block = FeedForward(size, c["intermediate_size"], 0.0, name=f"{i}_ffn")
            hidden.append(block(hidden[-1], context, True))
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
        for name in ("query", "key", "value"):
            params[f"{i}_{name}"] = {"dense": dense(f"{layer}.attention.self.{name}")}
        params[f"{i}_ffn"] = {
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

    hidden, attention, logits = model.apply({"params": params}, ids, types, mask)
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

    value, gradient = jax.value_and_grad(loss)(params)
    np.testing.assert_allclose(value, file["out/loss"], rtol=1e-5)
    expected = bert_params(file, cfg["num_hidden_layers"], prefix="grad")
    for (path, ours), theirs in zip(
        jax.tree_util.tree_leaves_with_path(gradient), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-5, err_msg=jax.tree_util.keystr(path))
