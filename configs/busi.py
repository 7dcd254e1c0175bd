"""Trains and evaluates on BUSI breast stills, one of five folds by near-duplicate group.

    python train.py --config=configs/busi.py --config.data.fold=0 --workdir=runs/busi/0

Reports of this set are synthesized from its labels and masks. One fold takes about 7 minutes on one CPU core; the five
pooled: condition macro F1 0.61 [0.51, 0.69] (docs/results/first_light.md).
"""

from dilbert_jax.config import default_config


def get_config():
    config = default_config("small")
    config.data.update(name="busi", folds=5, size=96, num_frames=1, stored_frames=1)
    config.data.update(grid_scales=(1, 2, 4), grid_steps=1, max_annotated_regions=3, vocab_size=600)
    config.model.stem_patch = (1, 4, 4)  # a still has one frame
    config.train.update(batch_size=16, teacher_epochs=30.0, student_epochs=25.0, mutual_epochs=4.0)
    config.train.update(finetune_epochs=50.0)
    return config
