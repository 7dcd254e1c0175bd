#!/usr/bin/env bash
# All benchmarks on one GPU, in float32 and bfloat16, in at most 8 minutes. Commit what lies in docs/results/gpu/ then.
#
#     benchmarks/gpu.sh [DIR]
#
# Needs JAX for CUDA (pip install 'jax[cuda12]') and a PyTorch that sees the same GPU (pip install torch).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
output=${1:-docs/results/gpu}
# Some benchmarks have both frameworks in one process: JAX must not take all of the memory.
export XLA_PYTHON_CLIENT_PREALLOCATE=false
python -c 'import jax; assert jax.default_backend() == "gpu", f"JAX runs on {jax.default_backend()}: pip install jax[cuda12]"'
# What matters most first, so that what the time limit cuts off is the rest.
limit() { timeout --foreground "$((480 - SECONDS))" "$@"; }
limit python -m benchmarks training_step transformer --dtype bfloat16 --quick --output "$output"
limit python -m benchmarks --quick --output "$output"
