"""The paper's size on a slice of a TPU pod: clips of up to 128 frames of 112 x 112, 4,096 of them a step.

python train.py --config=configs/tpu_pod.py --distributed --config.data.manual_dir=EXPORT --workdir=/shared/run

Compiled ahead of time for 256 chips of v5e by `python -m dilbert_jax.compile_check --config=configs/tpu_pod.py
--topology=v5e:16x16`, on any computer; never run on one by the authors (docs/scaling.md).
"""

from dilbert_jax.config import default_config


def get_config():
    config = default_config("base")
    config.data.update(name="ahjuui", size=112, num_frames=128, frame_buckets=(32, 64), stored_frames=128)
    config.data.update(max_tokens=128, vocab_size=8000)
    config.model.update(dtype="bfloat16", remat="full", unroll=1)
    config.optimizer.update(name="adamw", learning_rate=1e-3, warmup_fraction=0.1)
    config.train.batch_size = 4096
    config.mesh.update(fsdp=16, num_workers=8)
    return config
