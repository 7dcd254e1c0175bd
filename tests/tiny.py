"""A tiny model, batch and data set that several tests share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from dilbert_jax import models
from dilbert_jax.config import default_config
from dilbert_jax.models import Network, NetworkConfig, make_network
from dilbert_jax.models.network import Encoded, normalize_frames
from dilbert_jax.models.streams import mean_valid

B, T, S, A, R, L, M, F, C, E = 4, 4, 16, 2, 5, 12, 2, 3, 5, 6

CONFIG = NetworkConfig(
    vocab_size=40, num_organs=3, num_conditions=2, num_findings=F, num_classes=C, num_region_classes=4,
    hidden_size=16, num_layers=2, num_heads=2, ffn_size=32, dropout=0.1, max_tokens=L, max_steps=8,
    channels=(8,), blocks=(1,), stem_patch=(2, 4, 4),
)  # fmt: skip


class Plain(Network):
    """No 3-D CNN, no blocks: what tests of losses and steps need of a network, compiled in 40 % of the time."""

    def encode(
        self,
        frames,
        frame_mask,
        boxes,
        box_frames,
        region_mask,
        token_ids,
        token_types,
        token_mask,
        description_zeroed=None,
        region_zeroed=None,
        description_order=None,
        deterministic=True,
    ):
        batch, num_frames = frame_mask.shape
        masks = {
            "entity": token_mask,
            "description": frame_mask.reshape(batch, -1, self.frames_per_step).any(-1),
            "region": region_mask,
        }
        # A step is its frames in 4 x 4 coarse pixels, and so is a region of it.
        fields = normalize_frames(frames, frame_mask)
        fields = fields.reshape(*frame_mask.shape, 4, frames.shape[2] // 4, 4, frames.shape[3] // 4)
        features = fields.mean((3, 5)).reshape(*masks["description"].shape, -1)
        region = jnp.take_along_axis(features, (box_frames // self.frames_per_step)[..., None], axis=1)
        if region_zeroed is not None:
            region = jnp.where(region_zeroed[..., None], 0.0, region)
        described, own = self.describe(
            features, frames, frame_mask, description_order, description_zeroed, deterministic
        )
        streams = {
            "entity": self.entity_embedding(token_ids, token_types, deterministic),
            "description": described,
            "region": self.region_embedding(region, boxes, box_frames / num_frames, deterministic),
        }
        pooled = {name: mean_valid(stream, masks[name]) for name, stream in streams.items()}
        fused = self.join(pooled, own)
        return Encoded(streams, masks, pooled, fused, features.mean(1), {}, streams, features, own)


@contextlib.contextmanager
def no_compilation() -> Iterator[None]:
    """Nothing inside may need a program that is not compiled yet."""
    compiled = []

    def listen(event: str, seconds: float, **facts: object) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(facts)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not compiled, f"compiled again: {compiled}"


def make_batch(seed: int = 0, batch_size: int = B) -> dict[str, np.ndarray]:
    """A random batch of valid shapes; everything is valid unless a test says otherwise."""
    rng, n = np.random.default_rng(seed), batch_size
    low = rng.uniform(0, 0.5, (n, R, 2))
    return {
        "frames": rng.integers(0, 256, (n, T, S, S)).astype(np.uint8),
        "frame_mask": np.ones((n, T), bool),
        "boxes": np.concatenate([low, low + rng.uniform(0.2, 0.5, (n, R, 2))], -1).astype(np.float32),
        "box_frames": rng.integers(0, T, (n, R)).astype(np.int32),
        "region_mask": np.ones((n, R), bool),
        "region_labels": rng.integers(0, 4, (n, R)).astype(np.int32),
        "region_target": rng.random((n, R)) < 0.5,
        "region_zeroed": rng.random((n, R)) < 0.3,
        "token_ids": rng.integers(5, 40, (n, L)).astype(np.int32),
        "token_types": rng.integers(0, 6, (n, L)).astype(np.int32),
        "token_mask": np.ones((n, L), bool),
        "mlm_positions": rng.integers(1, L - 1, (n, M)).astype(np.int32),
        "mlm_targets": rng.integers(5, 40, (n, M)).astype(np.int32),
        "mlm_mask": np.ones((n, M), bool),
        "matched": np.arange(n) % 2 == 0,
        "cmm_mask": np.ones(n, bool),
        "report": np.where(np.arange(n) % 2 == 0, np.arange(n), (np.arange(n) + 1) % n).astype(np.int32),
        "own_report": np.arange(n, dtype=np.int32),
        "description_target": np.tile([True, False], (n, A // 2)),
        "description_zeroed": np.tile([True, False], (n, A // 2)),
        "organ": rng.integers(0, 3, n).astype(np.int32),
        "condition": rng.integers(0, 2, n).astype(np.int32),
        "findings": rng.random((n, F)) < 0.4,
        "findings_mask": np.ones(n, bool),
        "classes": rng.random((n, C)) < 0.4,
        "classes_mask": np.ones(n, bool),
        "report_classes": rng.random((n, C)) < 0.4,
        "report_classes_mask": np.ones(n, bool),
        "entities": rng.random((n, E)) < 0.4,
        "entities_mask": np.ones((n, E), bool),
        "mlm_entities": rng.integers(-1, E, (n, M)).astype(np.int32),
        "description_order": np.tile(np.arange(A, dtype=np.int32)[::-1], (n, 1)),
    }


NAMES = (np.arange(E * 3).reshape(E, 3).astype(np.int32), np.ones((E, 3), bool))


def init_params(seed: int = 0, config: NetworkConfig = CONFIG, network: Network | None = None):
    """Of the system that the configuration names, or of a network of another kind."""
    return models.init_params(network or make_network(config), jax.random.key(seed))


def to_device(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    return {name: jnp.asarray(value) for name, value in batch.items()}


def tiny_run_config(**data):
    """A configuration that trains all stages on a handful of phantom clips in seconds."""
    config = default_config("tiny")
    config.data.update(
        size=32,
        num_frames=4,
        stored_frames=8,
        grid_scales=(1, 2),
        grid_steps=1,
        max_tokens=32,
        vocab_size=700,
        **data,
    )
    # Compiling dominates. Two channels to a group: alone in it, a channel's bias has no gradient, and the
    # optimizer makes steps of what rounding leaves.
    config.model.update(num_layers=1, channels=(16,), blocks=(1,))
    config.train.update(
        batch_size=8,
        teacher_epochs=2.0,
        student_epochs=2.0,
        mutual_epochs=1.0,
        finetune_epochs=2.0,
        log_every_steps=2,
    )
    config.evaluate.update(mask_repeats=1, num_resamples=100, num_examples=2)
    return config
