"""Trains and evaluates on CLUST liver cines with tracked vessel landmarks (the user brings the data).

    python train.py --config=configs/clust.py --config.data.manual_dir=DIR

The set holds one organ and no reports: what is learned is the place of the vessels and how the liver moves.
"""

from dilbert_jax.config import default_config


def get_config():
    config = default_config("small")
    config.data.update(name="clust", size=96, num_frames=32, stored_frames=128, vocab_size=400)
    config.train.batch_size = 8
    return config
