"""What both implementations run on: architecture, losses, optimizer and batches."""

from __future__ import annotations

import dataclasses
import pathlib
import tempfile
from collections.abc import Mapping, Sequence

import ml_collections
import numpy as np

from dilbert_jax.config import check_config
from dilbert_jax.experiment import open_experiment
from dilbert_jax.input_pipeline import training_batches
from dilbert_jax.models import NetworkConfig
from dilbert_jax.parity import torch_losses
from dilbert_jax.random_inputs import random_batch, random_model, random_names
from dilbert_jax.training import objectives
from dilbert_jax.training.optimizer import OptimizerConfig

Batch = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Setting:
    """What both implementations run on.

    Attributes:
      model: the architecture; its dtype is replaced.
      loss, optimizer: of the mutual stage.
      batches: one pre-training batch a step.
      annotation: a batch of `ExampleBuilder.annotation`.
      names: word pieces of the candidate entities int [E, P] and their mask.
      source: where the batches are from, in words.
    """

    model: NetworkConfig
    loss: objectives.LossConfig
    optimizer: OptimizerConfig
    batches: Sequence[Batch]
    annotation: Batch
    names: tuple[np.ndarray, np.ndarray]
    source: str


def dataset_setting(config: ml_collections.ConfigDict, num_steps: int, learning_rate: float) -> Setting:
    """Takes batches from a configuration's data set, through the ordinary pipeline.

    Args:
      config: an experiment's configuration; its optimizer and dropout are replaced.
      num_steps: how many batches.
      learning_rate: peak rate of SGD.

    Returns:
      The setting, with no dropout.

    Raises:
      ValueError: a configuration or data that cannot work, or options that the PyTorch model does not have.
    """
    config = _prepared(config, learning_rate)
    with tempfile.TemporaryDirectory() as workdir:
        experiment = open_experiment(config, pathlib.Path(workdir))
    context, builder = experiment.context, experiment.builder
    indices, size = experiment.indices["train"], config.train.batch_size
    length_of = builder.padded_length
    batches = training_batches(builder.pretraining, indices, size, config.seed, length_of=length_of)
    annotation = training_batches(builder.annotation, indices, size, config.seed, length_of=length_of)
    return Setting(
        context.model.config,
        context.loss,
        OptimizerConfig(**config.optimizer),
        [next(batches) for _ in range(num_steps)],
        next(annotation),
        context.entity_names,
        f"data set {config.data.name}",
    )


def random_setting(config: ml_collections.ConfigDict, num_steps: int, learning_rate: float) -> Setting:
    """Makes random batches of a configuration's shapes, padded at random, without any data set.

    Args:
      config, num_steps, learning_rate: as in `dataset_setting`.

    Returns:
      The setting, with no dropout.

    Raises:
      ValueError: a configuration that cannot work, or options that the PyTorch model does not have.
    """
    config = _prepared(config, learning_rate)
    rng = np.random.default_rng(config.seed)
    batches = [random_batch(config, rng) for _ in range(num_steps)]
    annotation = random_batch(config, rng, report=False)
    return Setting(
        random_model(config),
        objectives.LossConfig(**config.loss),
        OptimizerConfig(**config.optimizer),
        batches,
        annotation,
        random_names(config, rng),
        "random batches",
    )


def _prepared(config: ml_collections.ConfigDict, learning_rate: float) -> ml_collections.ConfigDict:
    """A checked copy of the configuration with SGD and without dropout."""
    config = ml_collections.ConfigDict(config.to_dict())
    config.optimizer.update(name="sgd", learning_rate=learning_rate)
    config.model.dropout = 0.0
    check_config(config)
    torch_losses.check_supported(objectives.LossConfig(**config.loss))
    return config
