"""The step on meshes of simulated devices: the same numbers for every layout, and shards where the rules say."""

import os
import pathlib
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from tiny import init_params

from dilbert_jax.config import default_config
from dilbert_jax.sharding import RULES, check_batch, local_part, make_mesh, partition_spec, shardings
from dilbert_jax.training.stages import make_stage

pytestmark = pytest.mark.numerics

SCRIPT = pathlib.Path(__file__).with_name("sharded_training.py")
# data, fsdp, tensor: every axis by itself and together, on 1, 2, 4 and 8 devices.
QUICK = ("1,1,1", "2,2,2")
OTHERS = ("2,1,1", "1,2,1", "1,1,2", "4,1,1", "2,2,1", "1,2,2", "8,1,1", "1,8,1", "4,1,2", "1,4,2")


def run_layouts(folder, layouts, *options):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
    output = folder / "results.npz"
    subprocess.run(
        [sys.executable, SCRIPT, output, *options, *layouts], check=True, env=environment, timeout=1800
    )
    return dict(np.load(output))


def assert_equal_runs(results, layout, base, loss_tolerance=1e-5, tolerance=2e-5):
    names = [name.removeprefix(f"{base}/") for name in results if name.startswith(f"{base}/")]
    assert len(names) > 60
    for name in names:
        ours, theirs = results[f"{layout}/{name}"], results[f"{base}/{name}"]
        if name.startswith("loss/"):
            np.testing.assert_allclose(
                ours, theirs, rtol=loss_tolerance, atol=1e-6, err_msg=f"{layout} {name}"
            )
        elif name.startswith("params/"):
            np.testing.assert_allclose(ours, theirs, atol=tolerance, err_msg=f"{layout} {name}")


def test_eight_devices_train_as_one_does(tmp_path):
    results = run_layouts(tmp_path, QUICK, "--plain")
    losses = results["1,1,1/loss/loss"]
    assert losses[-1] < losses[0]
    assert_equal_runs(results, "2,2,2", "1,1,1")
    assert results["1,1,1/held"] == 1 and results["2,2,2/held"] < 0.6


@pytest.mark.slow
def test_every_layout_trains_as_one_device_does(tmp_path):
    layouts = ("2,2,2", *OTHERS)
    results = run_layouts(tmp_path, ("1,1,1", *layouts))
    for layout in layouts:
        assert_equal_runs(results, layout, "1,1,1")


@pytest.mark.slow
def test_micro_batches_train_alike_on_one_and_eight_devices(tmp_path):
    results = run_layouts(tmp_path, ("1,1,1,2", "2,2,2,2"))
    assert_equal_runs(results, "2,2,2,2", "1,1,1,2")


def test_rules_place_the_parameters_as_they_say():
    sizes = {"data": 2, "fsdp": 2, "tensor": 2}
    for path, shape, expected in (
        ("student/layers_0/entity_query/dense/kernel", (8, 8), P("fsdp", "tensor")),
        ("student/layers_1/entity_query/dense/bias", (8,), P("tensor")),
        ("opt_state/0/trace/layers_2/region_ffn/output/kernel", (16, 8), P("tensor", "fsdp")),
        ("layers_0/region_ffn/output_norm/scale", (8,), P()),
        ("entity_embedding/word/embedding", (41, 8), P(None, "fsdp")),  # 41 words: no half of them
        ("video/stage1_block0/conv/kernel", (3, 3, 3, 4, 6), P(None, None, None, None, "fsdp")),
        ("step", (), P()),
    ):
        assert partition_spec(path, shape, sizes) == expected, path


def test_every_rule_is_in_use_and_every_large_parameter_has_one():
    shapes = jax.eval_shape(init_params)
    paths = {
        "/".join(str(k.key) for k in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)
    }
    sizes = {"data": 1, "fsdp": 2, "tensor": 2}
    specs = {path: partition_spec(path, leaf.shape, sizes) for path, leaf in paths.items()}
    used = {axes for axes in (tuple(a for a in spec if a) for spec in specs.values())}
    assert {tuple(a for a in axes if a) for _, axes in RULES} <= used
    for path, leaf in paths.items():
        assert leaf.ndim < 2 or "fsdp" in specs[path], f"no device shares {path}"


def test_one_device_is_a_mesh_too():
    mesh = make_mesh()
    assert dict(mesh.shape) == {"data": len(jax.devices()), "fsdp": 1, "tensor": 1}
    assert local_part(mesh, 4 * mesh.size) == (0, 1)
    placed = shardings({"a": np.zeros(3)}, mesh)
    assert placed["a"].spec == P()


def test_an_axis_of_one_device_is_not_named():
    """What comes out of a step names none either: the next one is the same program as after a checkpoint."""
    placed = shardings(jax.eval_shape(init_params), make_mesh(devices=jax.devices()[:1]))
    assert not any(axes for leaf in jax.tree.leaves(placed) for axes in leaf.spec)


def test_what_does_not_divide_is_named():
    with pytest.raises(ValueError, match=r"mesh.fsdp = 3 times mesh.tensor = 5 .* 1 devices"):
        make_mesh(3, 5, jax.devices()[:1])


def test_a_micro_batch_that_does_not_divide_is_named():
    """Each device would hold all of it, and compute all of it."""
    mesh = types.SimpleNamespace(shape={"data": 2, "fsdp": 4, "tensor": 2}, size=16)
    check_batch(mesh, 64, 8)
    for batch_size, k, needed in ((64, 16, 128), (24, 2, 16), (12, 1, 8)):
        named = rf"train.batch_size is {batch_size} and train.num_micro_batches {k}; .* multiple of {needed}: 8 devices"
        with pytest.raises(ValueError, match=named):
            check_batch(mesh, batch_size, k)
        with pytest.raises(ValueError, match=named):
            local_part(mesh, batch_size, k)


@pytest.mark.parametrize("stage", ["student", "finetune"])
def test_a_stage_checks_its_micro_batches(stage):
    mesh = types.SimpleNamespace(shape={"data": 8, "fsdp": 1, "tensor": 1}, size=8)
    config = default_config()
    config.train.update(batch_size=32, num_micro_batches=8)
    context = types.SimpleNamespace(config=config, model=None, loss=None)
    builder = types.SimpleNamespace(pretraining=None, annotation=None)
    experiment = types.SimpleNamespace(context=context, indices={"train": range(64)}, builder=builder)
    with pytest.raises(ValueError, match=r"train\.num_micro_batches 8; "):
        make_stage(stage, experiment, {}, mesh)
