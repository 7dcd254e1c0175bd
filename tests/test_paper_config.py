"""The paper's own size: it builds, and one real step of mutual learning changes both networks."""

import functools
import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_export import make_small_export

from dilbert_jax.config import check_config
from dilbert_jax.experiment import open_experiment
from dilbert_jax.input_pipeline import training_batches
from dilbert_jax.training import objectives
from dilbert_jax.training import step as steps
from dilbert_jax.training.optimizer import OptimizerConfig, make_optimizer

pytestmark = pytest.mark.numerics

CONFIG = pathlib.Path(__file__).parents[1] / "configs" / "paper.py"


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    root = tmp_path_factory.mktemp("paper")
    make_small_export(root / "export")
    config = runpy.run_path(str(CONFIG))["get_config"]()
    check_config(config)
    # The export has few words; the vocabulary is what it is.
    config.data.update(manual_dir=str(root / "export"), data_dir=str(root / "prepared"), vocab_size=700)
    return open_experiment(config, root / "run")


def make_update(experiment):
    config = experiment.context.config
    objective = functools.partial(
        objectives.mutual_objective, experiment.context.model, experiment.context.loss
    )
    # The first step of the schedule has rate 0: without warm-up it is the literal 0.24.
    settings = {**config.optimizer, "warmup_fraction": 0.0}
    optimizer = make_optimizer(OptimizerConfig(**settings), 100)
    return optimizer, steps.make_step(objective, optimizer)


def take(experiment, batch_size):
    builder, indices = experiment.builder, experiment.indices["train"]
    batch = next(training_batches(builder.pretraining, indices, batch_size, 0))
    return {name: jnp.asarray(value) for name, value in steps.device_entries(batch).items()}


@pytest.mark.slow
def test_it_builds_at_its_full_batch(experiment):
    config = experiment.context.config
    model = experiment.context.model.config
    assert (model.num_layers, model.hidden_size, model.num_heads, model.ffn_size) == (12, 768, 12, 3072)
    assert (config.optimizer.name, config.optimizer.learning_rate, config.train.batch_size) == (
        "sgd",
        0.24,
        32,
    )
    batch = take(experiment, 32)
    assert batch["frames"].shape == (32, 128, 128, 128)
    optimizer, update = make_update(experiment)
    params = jax.eval_shape(experiment.context.init_params, jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(params)) > 1.5e8
    networks = {name: params for name in objectives.NETWORKS}
    state = jax.eval_shape(lambda p: steps.TrainState.create(p, optimizer), networks)
    new, metrics = jax.eval_shape(update, state, networks, batch, jax.random.key(0))
    assert jax.tree.map(lambda x: x.shape, new.params) == jax.tree.map(lambda x: x.shape, networks)
    assert {f"{n}/{t}" for n in objectives.NETWORKS for t in objectives.PAPER_TASKS} <= metrics.keys()


@pytest.mark.slow
def test_it_takes_a_real_step(experiment):
    optimizer, update = make_update(experiment)
    params = {n: experiment.context.init_params(jax.random.key(i)) for i, n in enumerate(objectives.NETWORKS)}
    before = {n: np.asarray(p["mlm_transform"]["dense"]["kernel"]) for n, p in params.items()}
    state = steps.TrainState.create(jax.tree.map(jnp.array, params), optimizer)
    batch = take(experiment, 2)
    for _ in range(2):  # the schedule's very first rate is 0
        state, metrics = update(state, params, batch, jax.random.key(0))
        assert np.isfinite(float(metrics["loss"]))
    assert int(state.step) == 2
    for name in objectives.NETWORKS:
        assert (
            np.abs(np.asarray(state.params[name]["mlm_transform"]["dense"]["kernel"]) - before[name]).max()
            > 0
        )
