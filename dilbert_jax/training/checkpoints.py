"""Orbax checkpoints: one folder a stage, the newest few steps kept."""

from __future__ import annotations

import pathlib
import shutil
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils


def sync(moment: str) -> None:
    """Waits until every process has come here; at once where there is only one."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(moment)


class StageCheckpoints:
    """Saves and restores the pytree of one stage under `workdir/checkpoints/<stage>`."""

    def __init__(self, workdir: pathlib.Path, stage: str, keep: int = 2):
        self.folder = (workdir / "checkpoints" / stage).absolute()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=True, enable_async_checkpointing=False
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def latest_step(self) -> int | None:
        """The newest complete step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, tree: Any) -> None:
        """Saves a step that is not there yet; what a kill left half-written makes room for it."""
        if step != self.latest_step():
            if jax.process_index() == 0:
                for half_written in self.folder.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"):
                    shutil.rmtree(half_written)
            sync("half-written checkpoints removed")
            self._manager.save(step, args=ocp.args.PyTreeSave(tree))
            self._manager.wait_until_finished()

    def restore(self, like: Any, step: int | None = None) -> Any:
        """Restores into the structure, shapes and dtypes of `like` (arrays or ShapeDtypeStructs)."""
        return self._restore(like, step)

    def restore_part(self, like: Any, step: int | None = None) -> Any:
        """Restores the entries of `like` alone: weights are read whatever optimizer was saved beside them."""
        return self._restore(like, step, partial_restore=True)

    def _restore(self, like: Any, step: int | None, **options: bool) -> Any:
        step = self.latest_step() if step is None else step
        if step is None:
            raise FileNotFoundError(f"no checkpoint under {self.folder}; run the stage before it first")
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None) or device),
            like,
        )
        restore_args = ocp.checkpoint_utils.construct_restore_args(target)
        args = ocp.args.PyTreeRestore(target, restore_args=restore_args, **options)
        return self._manager.restore(step, args=args)

    def close(self) -> None:
        self._manager.close()
