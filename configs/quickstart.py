"""Trains DILBERT through all stages on the generated phantom data, on a laptop CPU.

    python train.py --config=configs/quickstart.py
"""

from dilbert_jax.config import default_config


def get_config():
    config = default_config("small")
    config.data.name = "phantom"
    return config
