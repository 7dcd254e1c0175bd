"""Trains and evaluates on KMVE: Chinese reports of thyroid, breast and liver with two stills each.

    python train.py --config=configs/kmve.py --config.data.manual_dir=DIR

Conditions and findings are weak labels, extracted from the reports.
"""

from dilbert_jax.config import default_config


def get_config():
    config = default_config("small")
    config.data.update(name="kmve", size=96, num_frames=2, stored_frames=2, max_tokens=256, vocab_size=1200)
    config.data.update(grid_scales=(1, 3), grid_steps=2)
    config.model.stem_patch = (1, 4, 4)  # two stills, one description token each
    config.train.update(batch_size=16, teacher_epochs=12.0, student_epochs=10.0, mutual_epochs=2.0)
    config.train.update(finetune_epochs=20.0)
    return config
