"""Outside weights: a Hugging Face BERT in the entity stream, torchvision's R3D-18 in the 3-D CNN."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import CONFIG, make_batch

from dilbert_jax.models import Dilbert
from dilbert_jax.models.r3d import R3D18
from dilbert_jax.training.objectives import VISUAL

safetensors = pytest.importorskip("safetensors.numpy")
from dilbert_jax.parity.outside import with_bert, with_r3d_18  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.numerics]


@pytest.fixture(scope="module")
def bert(reference_dir, tmp_path_factory):
    """The recorded tiny BERT as a Hugging Face folder, and what it answered."""
    file = np.load(reference_dir / "hf_bert_tiny.npz", allow_pickle=False)
    folder = tmp_path_factory.mktemp("bert")
    tensors = {k.removeprefix("w/"): file[k] for k in file.files if k.startswith("w/")}
    safetensors.save_file(
        {k: np.ascontiguousarray(v) for k, v in tensors.items()}, folder / "model.safetensors"
    )
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", **json.loads(str(file["cfg"]))}))
    return folder, file, json.loads(str(file["cfg"]))


def dilbert_like(cfg, length, **changes):
    """A DILBERT of BERT's size whose entity stream is BERT's: no region is valid, so nothing is added to it."""
    return dataclasses.replace(
        CONFIG,
        vocab_size=cfg["vocab_size"],
        hidden_size=cfg["hidden_size"],
        num_layers=cfg["num_hidden_layers"],
        num_heads=cfg["num_attention_heads"],
        ffn_size=cfg["intermediate_size"],
        max_tokens=length,
        dropout=0.0,
        tnt_mode="add_resized",
        **changes,
    )


def start(config, batch):
    def run(module, batch):
        encoded = module.encode(**{name: batch[name] for name in VISUAL})
        return encoded, module.pretrain(encoded, batch["mlm_positions"])

    model = Dilbert(config)
    params = jax.jit(lambda key, b: model.init(key, b, method=run)["params"])(jax.random.key(0), batch)
    return params, jax.jit(lambda p, b: model.apply({"params": p}, b, method=run))


def test_the_entity_stream_answers_as_the_bert_it_started_from(bert):
    folder, file, cfg = bert
    ids = file["in/input_ids"].astype(np.int32)
    batch = make_batch(batch_size=len(ids))
    batch["region_mask"][:] = False
    batch |= {
        "token_ids": ids,
        "token_types": np.zeros_like(ids),
        "token_mask": file["in/attention_mask"] == 1,
        "mlm_positions": np.tile(np.arange(4, dtype=np.int32), (len(ids), 1)),
    }
    params, run = start(dilbert_like(cfg, ids.shape[1]), batch)
    params = with_bert(params, folder, cfg["num_attention_heads"])
    words = params["entity_embedding"]
    table = np.asarray(file["w/bert.embeddings.token_type_embeddings.weight"])
    np.testing.assert_array_equal(words["token_type"]["embedding"], np.repeat(table[:1], 6, axis=0))
    # The recording has second sentences too: with BERT's own second row, every word can be compared.
    own = np.array(words["token_type"]["embedding"])
    own[:2] = table
    params["entity_embedding"]["token_type"]["embedding"] = own
    batch["token_types"] = file["in/token_type_ids"].astype(np.int32)
    encoded, logits = run(params, batch)
    last = file[f"out/hidden_{cfg['num_hidden_layers']}"]
    np.testing.assert_allclose(encoded.streams["entity"], last, atol=2e-5)
    np.testing.assert_allclose(logits["mlm"], file["out/prediction_logits"][:, :4], atol=5e-5)


def test_what_does_not_fit_a_bert_is_named(bert, tmp_path):
    folder, _, cfg = bert
    batch = make_batch(batch_size=1)
    heads = cfg["num_attention_heads"]

    def refused(match, folder=folder, num_heads=heads, **changes):
        config = dataclasses.replace(dilbert_like(cfg, 12), **changes)
        shapes = jax.eval_shape(lambda: start_params(config, batch))
        with pytest.raises(ValueError, match=match):
            with_bert(shapes, folder, num_heads)

    refused(r"word_embeddings\.weight gives .* entity_embedding/word/embedding is \(50", vocab_size=50)
    refused(r"encoder\.layer\.7\.attention\.self\.query\.weight is missing", num_layers=8)
    refused(r"attention\.self\.query\.weight gives .*intermediate\.dense", hidden_size=16, ffn_size=24)
    refused("num_attention_heads is", num_heads=heads + 1)
    refused(r"config\.json: no readable JSON", folder=tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    refused("'model_type' is 'gpt2'", folder=tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    (tmp_path / "config.json").write_text("{}")
    refused("no readable safetensors file", folder=tmp_path)


def start_params(config, batch):
    arguments = [jnp.asarray(batch[name]) for name in VISUAL]
    names = jnp.zeros((2, 3), jnp.int32), jnp.ones((2, 3), bool)
    return Dilbert(config).init(jax.random.key(0), *arguments, batch["mlm_positions"], *names)["params"]


def test_r3d_18_takes_every_tensor_of_torchvision(tmp_path):
    frames = jnp.zeros((1, 8, 32, 32)), jnp.ones((1, 8), bool)
    shapes = jax.eval_shape(R3D18().init, jax.random.key(0), *frames)["params"]
    rng = np.random.default_rng(0)
    state = torchvision_state(rng)
    path = tmp_path / "r3d_18.safetensors"
    safetensors.save_file(state, path)
    params = with_r3d_18({"video": shapes, "other": {"kernel": np.ones(2)}}, path)
    video = params["video"]
    np.testing.assert_array_equal(
        video["layer3_block0"]["conv2"]["kernel"], state["layer3.0.conv2.0.weight"].transpose(2, 3, 4, 1, 0)
    )
    np.testing.assert_array_equal(
        video["layer2_block0"]["downsample_norm"]["running_var"], state["layer2.0.downsample.1.running_var"]
    )
    np.testing.assert_array_equal(video["stem_norm"]["scale"], state["stem.1.weight"])
    assert not [leaf for leaf in jax.tree.leaves(params) if isinstance(leaf, jax.ShapeDtypeStruct)]
    np.testing.assert_array_equal(params["other"]["kernel"], 1.0)

    del state["layer1.0.conv1.0.weight"]
    state["layer1.0.conv9.0.weight"] = np.zeros(1, np.float32)
    state["stem.1.weight"] = np.zeros(3, np.float32)
    safetensors.save_file(state, path)
    with pytest.raises(ValueError) as caught:
        with_r3d_18({"video": shapes}, path)
    for problem in (
        "layer1.0.conv1.0.weight is missing",
        "conv9.0.weight is unknown",
        "stem.1.weight gives (3,)",
    ):
        assert problem in str(caught.value)


def torchvision_state(rng):
    """Random tensors with the names and shapes of torchvision's r3d_18, classifier included."""

    def convolution(name, outputs, inputs, *kernel):
        state[f"{name}.0.weight"] = rng.normal(size=(outputs, inputs, *kernel)).astype(np.float32)
        for part in ("weight", "bias", "running_mean", "running_var"):
            state[f"{name}.1.{part}"] = rng.uniform(0.5, 1.5, outputs).astype(np.float32)
        state[f"{name}.1.num_batches_tracked"] = np.zeros((), np.int64)

    state: dict[str, np.ndarray] = {}
    convolution("stem", 64, 3, 3, 7, 7)
    inputs = 64
    for layer, outputs in enumerate((64, 128, 256, 512), start=1):
        for block in range(2):
            convolution(f"layer{layer}.{block}.conv1", outputs, inputs, 3, 3, 3)
            convolution(f"layer{layer}.{block}.conv2", outputs, outputs, 3, 3, 3)
            if inputs != outputs:
                convolution(f"layer{layer}.{block}.downsample", outputs, inputs, 1, 1, 1)
            inputs = outputs
    state["fc.weight"] = np.zeros((400, 512), np.float32)
    state["fc.bias"] = np.zeros(400, np.float32)
    return state


def test_pickles_and_other_networks_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"r3d_18\.pth: weights are read from \.safetensors alone"):
        with_r3d_18({"video": {"stem_conv": {"kernel": np.zeros(1)}}}, tmp_path / "r3d_18.pth")
    with pytest.raises(ValueError, match=r"this network has another 3-D CNN"):
        with_r3d_18({"video": {"stem": {"kernel": np.zeros(1)}}}, tmp_path / "r3d_18.safetensors")
