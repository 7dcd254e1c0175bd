"""Trains and evaluates on a hospital's own export: a folder with manifest.jsonl (docs/data.md).

python train.py --config=configs/ahjuui.py --config.data.manual_dir=DIR
"""

from dilbert_jax.config import default_config


def get_config():
    config = default_config("small")
    config.data.update(name="ahjuui", size=96, num_frames=16, max_tokens=256, vocab_size=2000)
    config.train.batch_size = 16
    return config
