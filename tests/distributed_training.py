"""One of several processes that train the mutual stage together; tests/test_distributed.py starts them.

python distributed_training.py CONFIG.json WORKDIR STOP_AFTER [--distributed] [--linear]

With --linear the networks are linear functions of a clip's rows, which compile at once; all else is the same.
Goes to the end, or is told to stop after so many steps: only the last process gets the signal.
"""

import dataclasses
import pathlib
import sys

import jax
import jax.numpy as jnp

from dilbert_jax import run
from dilbert_jax.config import load_config
from dilbert_jax.experiment import open_experiment
from dilbert_jax.sharding import make_mesh
from dilbert_jax.training import loop, stages
from dilbert_jax.training.checkpoints import sync
from dilbert_jax.training.log import MetricsLog


def linear_objective(params, frozen, batch, rng):
    """How far a clip's rows are from saying whether the report is its own."""
    del frozen, rng
    rows = batch["frames"].astype(jnp.float32).mean((1, 3)) / 255.0
    losses = {
        f"{name}/loss": jnp.square(rows @ network["rows"] - batch["matched"]).mean()
        for name, network in params.items()
    }
    return sum(losses.values()), losses


def main() -> None:
    config, workdir = load_config(pathlib.Path(sys.argv[1])), pathlib.Path(sys.argv[2])
    stop_after = int(sys.argv[3])
    if "--distributed" in sys.argv:
        run.join_processes()
    run.use_compilation_cache()
    if jax.process_index():
        sync("opened")
    experiment = open_experiment(config, workdir)
    if not jax.process_index():
        sync("opened")

    class Interrupt(loop.DeferredInterrupt):
        """Requests a stop in the last process once the step has come."""

        asked = 0

        @property
        def requested(self) -> bool:
            self.asked += 1
            return self.asked > stop_after > 0 and jax.process_index() == jax.process_count() - 1

        @requested.setter
        def requested(self, value: bool) -> None:
            pass

    loop.DeferredInterrupt = Interrupt
    mesh = make_mesh()
    with jax.set_mesh(mesh):
        linear = "--linear" in sys.argv
        start = {
            name: {"rows": jnp.full(experiment.context.config.data.size, 0.1 * seed)}
            if linear
            else stages.initial_params(experiment, seed, mesh)
            for seed, name in enumerate(stages.NETWORKS)
        }
        stage = stages.make_stage("mutual", experiment, start, mesh)
        if linear:
            stage = dataclasses.replace(stage, objective=linear_objective, frozen={})
        try:
            loop.run_stage(stage, experiment, workdir, MetricsLog(workdir), mesh)
        except KeyboardInterrupt:
            print("stopped")


if __name__ == "__main__":
    main()
