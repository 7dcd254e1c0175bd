"""One of several processes that train the mutual stage together; tests/test_distributed.py starts them.

python distributed_training.py CONFIG.json WORKDIR STOP_AFTER [--distributed]

Goes to the end, or is told to stop after so many steps: only the last process gets the signal.
"""

import pathlib
import sys

import jax

from dilbert_jax import run
from dilbert_jax.config import load_config
from dilbert_jax.experiment import open_experiment
from dilbert_jax.sharding import make_mesh
from dilbert_jax.training import loop
from dilbert_jax.training.checkpoints import sync
from dilbert_jax.training.log import MetricsLog


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
        start = {
            name: loop._initial_params(experiment, seed, mesh) for seed, name in enumerate(loop.NETWORKS)
        }
        stage = loop._make_stage("mutual", experiment, start, mesh)
        try:
            loop._run_stage(stage, experiment, workdir, MetricsLog(workdir), mesh)
        except KeyboardInterrupt:
            print("stopped")


if __name__ == "__main__":
    main()
