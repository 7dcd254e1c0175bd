"""Trains and evaluates on POCUS lung cines with clinicians' comments, one of five folds by patient or source.

python train.py --config=configs/pocus.py --config.data.manual_dir=DIR --config.data.fold=0 --workdir=runs/pocus/0

One fold takes about 7 minutes on one CPU core; the five pooled: condition macro F1 0.43 [0.33, 0.58]
(docs/results/first_light.md).
"""

from dilbert_jax.config import default_config


def get_config():
    config = default_config("small")
    config.data.update(name="pocus", folds=5, size=64, num_frames=16, stored_frames=64, vocab_size=800)
    config.data.update(min_entity_count=4)
    config.model.stem_patch = (4, 4, 4)
    config.train.update(batch_size=16, teacher_epochs=45.0, student_epochs=35.0, mutual_epochs=5.0)
    config.train.update(finetune_epochs=70.0)
    return config
