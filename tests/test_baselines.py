"""The systems that DILBERT is compared with: what each is known for, and that the same commands train them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import CONFIG, init_params, make_batch, tiny_run_config, to_device

from dilbert_jax import run
from dilbert_jax.config import check_config
from dilbert_jax.models import SYSTEMS, make_network
from dilbert_jax.training import step as steps
from dilbert_jax.training.loop import stage_names

pytestmark = pytest.mark.numerics
BASELINES = sorted(SYSTEMS.keys() - {"dilbert"})


def test_every_token_of_bert_looks_at_all_streams_from_the_first_block():
    config = dataclasses.replace(CONFIG, name="bert", num_layers=1)
    params = init_params(config=config)
    streams = {"entity": 3, "description": 2, "region": 4}
    rng = np.random.default_rng(0)
    hidden = {s: jnp.asarray(rng.standard_normal((1, n, 16)), jnp.float32) for s, n in streams.items()}
    masks = {s: jnp.ones((1, n), bool) for s, n in streams.items()}
    model = make_network(config)

    def total(hidden, stream):
        fused, looks = model.apply({"params": params}, hidden, masks, True, method=type(model).fuse)
        assert looks["entity"].shape == (1, 2, 2, 3) and looks["region"].shape == (1, 2, 2, 4)
        return jnp.sin(fused[stream]).sum()

    for stream in streams:
        gradient = jax.grad(total)(hidden, stream)
        assert all(float(jnp.abs(gradient[other]).max()) > 1e-4 for other in streams)


def test_segments_tell_streams_of_bert_apart():
    config = dataclasses.replace(CONFIG, name="bert")
    params = init_params(config=config)
    assert params["segment"]["embedding"].shape == (3, 16)


@pytest.mark.parametrize("name", BASELINES)
def test_a_few_clips_are_learned_by_heart(name):
    config = dataclasses.replace(CONFIG, name=name, dropout=0.0)
    model, loss = make_network(config), steps.LossConfig()
    batch = to_device(make_batch())
    params, optimizer = init_params(config=config), optax.adam(3e-3)

    @jax.jit
    def update(params, state):
        def objective(p):
            return steps.pretraining_objective(model, loss, {"student": p}, None, batch, jax.random.key(0))[0]

        value, gradient = jax.value_and_grad(objective)(params)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, value

    state, values = optimizer.init(params), []
    for _ in range(120):
        params, state, value = update(params, state)
        values.append(float(value))
    assert values[-1] < 0.1 * values[0]


@pytest.mark.parametrize("name", BASELINES)
def test_the_same_command_trains_and_evaluates_a_baseline(name, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "use_compilation_cache", lambda: None)
    config = tiny_run_config(data_dir=str(tmp_path / "data"))
    config.model.name = name
    with pytest.raises(ValueError, match="single_network"):
        check_config(config)
    config.train.single_network = True
    assert stage_names(config) == ("student", "finetune")
    report = run.train_and_report(config, tmp_path / "run")
    assert report.exists() and (tmp_path / "run" / "eval.json").exists()
    assert not (tmp_path / "run" / "checkpoints" / "mutual").exists()


def test_an_unknown_system_is_named():
    with pytest.raises(ValueError, match="'gpt'; choose one of dilbert, bert"):
        make_network(dataclasses.replace(CONFIG, name="gpt"))
    config = tiny_run_config()
    config.model.name = "gpt"
    with pytest.raises(ValueError, match="name is 'gpt'"):
        check_config(config)
