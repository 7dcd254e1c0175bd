"""Trains DILBERT through all stages on the generated phantom data, on a laptop CPU.

python train.py --config=configs/quickstart.py

About 9 minutes on 2 CPU cores; condition macro F1 of the student on unseen patients about 0.7 (README.md).
"""

from dilbert_jax.config import default_config


def get_config():
    config = default_config("small")
    config.data.name = "phantom"
    config.data.update(size=64, num_frames=12, max_tokens=96, grid_scales=(1, 3), grid_steps=1)
    config.model.update(num_layers=2, ffn_size=256, stem_patch=(3, 4, 4))
    config.optimizer.update(warmup_fraction=0.1, video_rate_scale=0.5)
    config.train.batch_size = 16
    config.train.update(teacher_epochs=34.0, student_epochs=34.0, mutual_epochs=5.0, finetune_epochs=48.0)
    config.train.finetune_video_rate_scale = 4.0
    return config
