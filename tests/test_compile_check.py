"""Model FLOPs against hand counts, a compiled program's text, and the ahead-of-time check where libtpu is installed."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dilbert_jax.flops import count_flops
from dilbert_jax.hlo import read_program
from dilbert_jax.models.conv3d import conv3d

ROOT = pathlib.Path(__file__).parents[1]


# --- FLOPs ------------------------------------------------------------------------------------------------


def test_products_count_twice_their_factors_forward_and_backward():
    x, w = jnp.zeros((5, 7)), jnp.zeros((7, 3))
    assert count_flops(jnp.matmul, x, w) == 2 * 5 * 7 * 3
    both = jax.grad(lambda x, w: jnp.sin(x @ w).sum(), argnums=(0, 1))
    assert count_flops(both, x, w) == 3 * 2 * 5 * 7 * 3
    batched = jnp.zeros((4, 5, 7)), jnp.zeros((4, 7, 3))
    assert count_flops(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), *batched) == 4 * 2 * 5 * 7 * 3


def test_loops_count_every_round_and_jit_and_remat_are_looked_into():
    x, w = jnp.zeros((5, 5)), jnp.zeros((6, 5, 5))

    def run(x, w):
        return jax.lax.scan(lambda x, w: (jax.jit(jnp.matmul)(x, w), None), x, w)[0].sum()

    def twice(x, w):
        return jnp.sin(jnp.sin(x @ w) @ w).sum()

    assert count_flops(run, x, w) == 6 * 2 * 125
    plain, again = (count_flops(jax.value_and_grad(f), x, w[0]) for f in (twice, jax.checkpoint(twice)))
    assert again > plain


@pytest.mark.parametrize("kernel", [(1, 3, 3), (3, 3, 3), (3, 1, 1)])
def test_convolutions_count_every_tap_whatever_form_the_platform_takes(kernel):
    x, w = jnp.zeros((2, 4, 6, 6, 8)), jnp.zeros((*kernel, 8, 5))
    forward = 2 * (2 * 4 * 6 * 6 * 5) * int(np.prod(kernel)) * 8
    assert count_flops(conv3d, x, w) == forward
    both = jax.grad(lambda x, w: jnp.sin(conv3d(x, w)).sum(), argnums=(0, 1))
    assert count_flops(both, x, w) == 3 * forward


# --- a compiled program's text ----------------------------------------------------------------------------

PROGRAM = """HloModule jit_step, is_scheduled=true

%sum (a: f32[], b: f32[]) -> f32[] {
  ROOT %add.1 = f32[] add(%a, %b)
}

%fused (p: bf16[8,64]) -> bf16[128,64] {
  %all-gather.7 = bf16[128,64]{1,0} all-gather(%p), channel_id=3, replica_groups=mesh['x'=2,'y'=16], {'y'}
}

%fused.again (p: bf16[8,64]) -> bf16[128,64] {
  %all-gather.8 = bf16[128,64]{1,0} all-gather(%p), channel_id=3, replica_groups=mesh['x'=2,'y'=16], {'y'}
}

%all-reduce-scatter.1.clone (p: bf16[64,32]) -> bf16[4,32] {
  %all-reduce.5 = bf16[64,32]{1,0} all-reduce(%p), channel_id=1, replica_groups=[2,16]<=[32], to_apply=%sum
  ROOT %own.5 = bf16[4,32]{1,0} dynamic-slice(%all-reduce.5, %start, %zero)
}

%all-reduce-scatter.2 (p: bf16[32,32]) -> bf16[2,32] {
  %all-reduce.6 = bf16[32,32]{1,0} all-reduce(%p), channel_id=1, replica_groups=[2,16]<=[32], to_apply=%sum
  ROOT %own.6 = bf16[2,32]{1,0} dynamic-slice(%all-reduce.6, %start, %zero)
}

%condition (s: (s32[], f32[4])) -> pred[] {
  %bound = s32[]{:T(128)} constant(12)
  ROOT %lt = pred[] compare(%i, %bound), direction=LT
}

%body (s: (s32[], f32[4])) -> (s32[], f32[4]) {
  %start = bf16[128,64] fusion(%x), kind=kCustom, calls=%fused, backend_config={"estimated_cycles":"100"}
  %done = bf16[128,64] fusion(%start), kind=kCustom, calls=%fused.again, backend_config={"estimated_cycles":"10"}
  %share = bf16[4,32] fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1.clone
}

ENTRY %main (q: f32[4]) -> f32[4] {
  %loop = (s32[], f32[4]) while(%t), condition=%condition, body=%body
  %all-reduce.1 = (f32[1000]{0}, f32[24]{0}) all-reduce(%g), channel_id=9, replica_groups=[2,16]<=[32], to_apply=%sum
  %part = bf16[2,32] fusion(%g), kind=kCustom, calls=%all-reduce-scatter.2
  %go = (bf16[16,768]{1,0}, bf16[16,768]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%g), channel_id=11
  ROOT %r = f32[4] fusion(%loop), kind=kLoop, calls=%sum, backend_config={"estimated_cycles":"5"}
}
"""


def test_a_program_counts_loops_and_each_exchange_once():
    program = read_program(PROGRAM)
    assert program.cycles == 12 * 110 + 5
    gather, reduce, permute, *scatters = sorted(program.collectives, key=lambda c: (c.kind, -c.count))
    assert (gather.kind, gather.count) == ("all-gather", 12)
    assert gather.bytes == 12 * (128 * 64 * 2) * 15 / 16
    assert (reduce.kind, reduce.count, reduce.bytes) == ("all-reduce", 1, 2 * 15 / 16 * 4 * 1024)
    assert (permute.kind, permute.count, permute.bytes) == ("collective-permute", 1, 16 * 768 * 2)
    # A reduction that leaves each chip its part sends half of an all-reduce; all of them have one channel.
    assert [(c.kind, c.count, c.bytes) for c in scatters] == [
        ("reduce-scatter", 12, 12 * 15 / 16 * 64 * 32 * 2),
        ("reduce-scatter", 1, 15 / 16 * 32 * 32 * 2),
    ]
    assert read_program(PROGRAM.replace("%bound = s32", "%bound = u32")).cycles == program.cycles


def test_a_text_without_an_entry_and_a_loop_without_a_bound_are_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        read_program("HloModule nothing")
    with pytest.raises(ValueError, match="bound"):
        read_program(PROGRAM.replace("constant(12)", "parameter(0)"))


# --- the command ------------------------------------------------------------------------------------------

POD = """from dilbert_jax.config import default_config


def get_config():
    config = default_config("tiny")
    config.data.update(size=32, num_frames=16, max_tokens=32, vocab_size=512)
    config.model.update(dtype="bfloat16", remat="full", unroll=1)
    config.train.batch_size = 32
    config.mesh.fsdp = 2
    return config
"""


@pytest.mark.slow
@pytest.mark.tpu_aot
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="the extra 'tpu' is not installed")
def test_the_step_compiles_for_a_slice_that_is_not_here(tmp_path):
    (tmp_path / "pod.py").write_text(POD)
    command = [sys.executable, "-m", "dilbert_jax.compile_check", f"--config={tmp_path / 'pod.py'}"]
    command += ["--topology=v5e:4x4", f"--json={tmp_path / 'found.json'}"]
    done = subprocess.run(
        command, cwd=ROOT, env=dict(os.environ), text=True, capture_output=True, timeout=1200
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "fits" in done.stdout and "all-gather" in done.stdout
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["fits"] and 0 < found["memory_bytes"] < 1e9 and found["model_flops"] > 1e8
    assert found["collectives"]["all-gather"]["bytes"] > 0 and 0 < found["model_flops_utilisation"] < 1


@pytest.mark.parametrize("status", ["RESOURCE_EXHAUSTED", "INTERNAL"])
def test_a_step_that_the_compiler_finds_too_large_is_one_line(status, tmp_path, monkeypatch, capsys):
    for name in ("JAX_PLATFORMS", "TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # the command sets them: not for tests to come
    from dilbert_jax import compile_check

    def compile_step():
        raise jax.errors.JaxRuntimeError(
            f"{status}: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 25.57G of "
            "15.48G hbm. Exceeded hbm capacity by 10.09G.\n\nTotal hbm usage >= 26.09G:\n    reserved 530.00M"
        )

    chip = types.SimpleNamespace(device_kind="TPU v5 lite")
    monkeypatch.setattr(compile_check, "_devices", lambda topology: [chip] * 16)
    lowered = types.SimpleNamespace(compile=compile_step)
    monkeypatch.setattr(compile_check, "lower_step", lambda config, devices: lowered)
    (tmp_path / "pod.py").write_text(POD)
    arguments = [f"--config={tmp_path / 'pod.py'}", "--topology=v5e:4x4"]
    if status == "INTERNAL":  # another error is not about memory
        with pytest.raises(jax.errors.JaxRuntimeError):
            compile_check.main(arguments)
        return
    assert compile_check.main(arguments) == 1
    found = capsys.readouterr().out.splitlines()[-1]
    assert found == (
        "memory a chip: DOES NOT FIT: Ran out of memory in memory space hbm. Used 25.57G of 15.48G hbm. "
        "Exceeded hbm capacity by 10.09G."
    )


@pytest.mark.parametrize("topology", ["v99:2x2", "v5e:4x4"])
def test_an_unknown_slice_or_a_missing_compiler_is_one_line(topology):
    named = "its kind must be one of v4, v5e, v5p, v6e"
    if topology == "v5e:4x4":
        if importlib.util.find_spec("libtpu"):
            pytest.skip("the extra 'tpu' is installed")
        named = "pip install 'dilbert-jax[tpu]'"
    command = [sys.executable, "-m", "dilbert_jax.compile_check", "--config=configs/tpu_pod.py"]
    done = subprocess.run([*command, f"--topology={topology}"], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and named in done.stderr
    assert len(done.stderr.splitlines()) == 1
