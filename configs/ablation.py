"""Leaves out one part of the method at a time on the generated phantom data, with a small model and several seeds.

python train.py --config=configs/ablation.py:without_angle --workdir=runs/without_angle

One variant and seed; all of them, with intervals and paired tests against "full":

python -m dilbert_jax.ablation --config=configs/ablation.py --workdir=runs/ablation

About 2 minutes a run on one CPU core and 2 hours for everything on two (docs/results/ablation.md).
"""

from dilbert_jax.config import default_config

# Name -> the fields that differ from "full".
VARIANTS = {
    "full": {},
    "without_graph_masking": {"data.guided_masking": 0.0},
    "graph_masking_always": {"data.guided_masking": 1.0},
    "without_relations": {"loss.relational_layer": "none"},
    "without_angle": {"loss.beta1": 0.0},
    "without_response": {"loss.beta2": 0.0},
    "without_self": {"loss.gamma": 0.0},
    "without_summary": {"loss.summary": 0.0},
    "single_network": {"train.single_network": True},
    "add_resized": {"model.tnt_mode": "add_resized"},
    "temperature_5": {"loss.temperature": 5.0},
    "temperature_5_squared": {"loss.temperature": 5.0, "loss.scale_by_square": True},
    "temperature_10": {"loss.temperature": 10.0},
    "temperature_10_squared": {"loss.temperature": 10.0, "loss.scale_by_square": True},
    "temperature_20": {"loss.temperature": 20.0},
    "temperature_20_squared": {"loss.temperature": 20.0, "loss.scale_by_square": True},
    # The paper's optimizer, its rate taken literally first (D22), and the sweep.
    "sgd_0.24": {"optimizer.name": "sgd", "optimizer.learning_rate": 0.24},
    "sgd_0.24_unclipped": {
        "optimizer.name": "sgd",
        "optimizer.learning_rate": 0.24,
        "optimizer.clip_norm": 0.0,
    },
    "sgd_0.024": {"optimizer.name": "sgd", "optimizer.learning_rate": 0.024},
    "sgd_0.0024": {"optimizer.name": "sgd", "optimizer.learning_rate": 0.0024},
    "adamw_1e-4": {"optimizer.learning_rate": 1e-4},
}


def get_config(variant: str = "full"):
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is unknown; choose one of {', '.join(VARIANTS)}")
    config = default_config("tiny")
    config.data.update(
        name="phantom", size=64, num_frames=12, max_tokens=96, grid_scales=(1, 3), grid_steps=1
    )
    config.model.stem_patch = (3, 4, 4)
    config.optimizer.warmup_fraction = 0.1
    config.train.batch_size = 16
    config.train.update(teacher_epochs=12.0, student_epochs=12.0, mutual_epochs=4.0, finetune_epochs=12.0)
    config.evaluate.update(mask_repeats=2, num_examples=0)
    config.update_from_flattened_dict(VARIANTS[variant])
    return config
