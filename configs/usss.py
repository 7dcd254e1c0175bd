"""Trains and evaluates on USSS abdominal pseudo-cines with organ masks; the set's own split by subject.

    python train.py --config=configs/usss.py --config.data.manual_dir=DIR

Reports of this set are synthesized from its masks.
"""

from dilbert_jax.config import default_config


def get_config():
    config = default_config("small")
    config.data.update(name="usss", size=64, num_frames=8, stored_frames=8, vocab_size=500)
    config.train.update(batch_size=16, teacher_epochs=45.0, student_epochs=35.0, mutual_epochs=6.0)
    config.train.update(finetune_epochs=50.0)
    return config
