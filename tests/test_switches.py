"""Every switch of the paper ledger changes what is computed, and nothing where it should not."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_builder import make_builder
from tiny import CONFIG, A, B, E, M, Plain, init_params, make_batch, to_device

from dilbert_jax.config import default_config
from dilbert_jax.models import Dilbert
from dilbert_jax.sharding import make_mesh
from dilbert_jax.training import objectives, stages
from dilbert_jax.training.optimizer import OptimizerConfig, make_optimizer, make_schedule

# One worker runs the files that share the small export.
pytestmark = [pytest.mark.xdist_group("trained"), pytest.mark.numerics]
QUIET = dataclasses.replace(CONFIG, num_layers=1, dropout=0.0)  # compiling dominates
LOSS = objectives.LossConfig()
RNG = jax.random.key(0)


def encode(config, params, batch, **changes):
    def run(module, batch):
        arguments = {name: batch[name] for name in objectives.VISUAL}
        return module.encode(**arguments, **changes)

    return jax.jit(nn.apply(run, Dilbert(config)))({"params": params}, batch)


def pretraining(model_config, loss_config, batch, seed=1):
    """Loss and metrics of one network, freshly initialised."""
    model = Plain(model_config)
    params = {"student": init_params(seed, network=model)}
    objective = functools.partial(objectives.pretraining_objective, model, loss_config)
    return jax.jit(lambda p, b: objective(p, None, b, RNG))(params, to_device(batch))


# --- D1, the 3-D CNN -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_r3d_18_takes_the_place_of_the_small_cnn():
    config = dataclasses.replace(QUIET, video="r3d_18")
    batch = make_batch(batch_size=1)
    batch["frames"] = np.zeros((1, 16, 32, 32), np.uint8)
    batch["frames"][:, :, 8:24, 8:24] = 200
    batch["frame_mask"] = np.arange(16)[None] < 11
    batch["box_frames"][:] = 4

    def run(module, batch):
        return module.encode(**{name: batch[name] for name in objectives.VISUAL})

    encoded, variables = jax.jit(nn.init_with_output(run, Dilbert(config)))(jax.random.key(0), batch)
    assert encoded.streams["description"].shape == (1, 2, 16)
    assert encoded.overview.shape == (1, 6 * 512)
    assert bool(jnp.isfinite(encoded.fused).all())
    assert "layer4_block1" in variables["params"]["video"]
    batch["box_frames"][:] = 12  # a box in another step shows something else
    moved = jax.jit(nn.apply(run, Dilbert(config)))(variables, batch)
    assert float(jnp.abs(moved.streams["region"] - encoded.streams["region"]).max()) > 1e-6


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_no_update_moves_the_statistics_of_a_frozen_batch_norm(name):
    params = {"norm": {"scale": jnp.ones(2), "running_mean": jnp.ones(2), "running_var": jnp.ones(2)}}
    optimizer = make_optimizer(OptimizerConfig(name, 0.1, weight_decay=0.1, warmup_fraction=0.0), 10)
    state = optimizer.init(params)
    for _ in range(3):
        updates, state = optimizer.update(jax.tree.map(jnp.zeros_like, params), state, params)
        params = optax.apply_updates(params, updates)
    assert float(params["norm"]["scale"][0]) < 1.0
    for statistic in ("running_mean", "running_var"):
        np.testing.assert_array_equal(params["norm"][statistic], 1.0)


# --- D3 and D9, time -----------------------------------------------------------------------------------


@pytest.mark.parametrize("position", [True, False])
def test_only_a_temporal_position_makes_the_order_of_description_tokens_visible(position):
    config = dataclasses.replace(QUIET, temporal_position=position)
    params = init_params(0, config)
    assert ("position" in params["description_embedding"]) is position
    batch = to_device(make_batch())
    order = jnp.tile(jnp.arange(A)[::-1], (B, 1))
    plain, shuffled = (encode(config, params, batch, description_order=o) for o in (None, order))
    difference = float(jnp.abs(plain.fused - shuffled.fused).max())
    assert (difference > 1e-3) if position else (difference < 1e-4)


def test_the_order_task_exists_only_with_a_weight():
    batch = make_batch()
    batch["description_order"][::2] = np.arange(A)
    _, plain = pretraining(QUIET, LOSS, batch)
    assert "student/order" not in plain
    config, loss = dataclasses.replace(QUIET, order=True), dataclasses.replace(LOSS, order=2.0)
    _, metrics = pretraining(config, loss, batch)
    expected = sum(metrics[f"student/{t}"] for t in objectives.PAPER_TASKS) + 2.0 * metrics["student/order"]
    np.testing.assert_allclose(metrics["student/loss"], expected, rtol=1e-5)
    targets = objectives.task_targets(to_device(batch), loss)["order"]
    np.testing.assert_array_equal(targets, np.arange(B) % 2)


def test_half_of_the_clips_are_shuffled_within_their_valid_steps():
    builder = make_builder(shuffle=True)
    rng = np.random.default_rng(0)
    shuffled = 0
    for index in range(60):
        example = builder.pretraining(index % 12, rng)
        order = example["description_order"]
        valid = example["frame_mask"].reshape(len(order), -1).any(1)
        np.testing.assert_array_equal(np.sort(order), np.arange(len(order)))
        np.testing.assert_array_equal(order[~valid], np.flatnonzero(~valid))
        shuffled += (order != np.arange(len(order))).any()
    assert 5 <= shuffled <= 30  # of two or fewer steps, half of the permutations are the identity
    assert "description_order" not in make_builder().pretraining(0, rng)


def test_mdc_classifies_masked_words_by_their_entity():
    batch = make_batch()
    config = dataclasses.replace(QUIET, mdc_target="entity", num_entities=E)
    loss = dataclasses.replace(LOSS, mdc_target="entity")
    _, metrics = pretraining(config, loss, batch)
    model = Plain(config)
    run = jax.jit(lambda p, b: objectives.pretraining_forward(model, p, b, None))
    logits, _ = run(init_params(1, network=model), to_device(batch))
    assert logits["mdc"].shape == (B, M, E)
    counted = batch["mlm_mask"] & batch["matched"][:, None] & (batch["mlm_entities"] >= 0)
    z = np.asarray(logits["mdc"], np.float64)[counted]
    own = z[np.arange(len(z)), batch["mlm_entities"][counted]]
    expected = (np.log(np.exp(z).sum(-1)) - own).mean()
    np.testing.assert_allclose(float(metrics["student/mdc"]), expected, rtol=1e-5)
    with pytest.raises(ValueError, match="MDC target is 'words'"):
        init_params(0, dataclasses.replace(QUIET, mdc_target="words"))


def test_masked_words_know_the_entity_they_belong_to():
    builder = make_builder()
    rng = np.random.default_rng(0)
    seen = 0
    for _ in range(20):
        example = builder.pretraining(0, rng)
        report = builder.reports[0]
        if not example["matched"]:
            continue
        for position, entity in zip(
            example["mlm_positions"][example["mlm_mask"]],
            example["mlm_entities"][example["mlm_mask"]],
            strict=True,
        ):
            index = report.entity_index[position]
            concept = report.entities[index].concept if index >= 0 else None
            expected = builder.labels.entities.index(concept) if concept in builder.labels.entities else -1
            assert entity == expected
            seen += entity >= 0
    assert seen > 5


# --- D2, D10 and D11, corruption ------------------------------------------------------------------------


def test_without_annotated_boxes_only_the_grid_is_left():
    some, none = make_builder(), make_builder(max_annotated_regions=0)
    rng = np.random.default_rng(0)
    boxes = some.pretraining(0, rng)["boxes"], none.pretraining(0, rng)["boxes"]
    assert len(boxes[0]) == len(boxes[1]) + some.spec.max_annotated_regions


def test_without_the_overlap_rule_only_targets_are_zeroed():
    strict, loose = make_builder(), make_builder(leak_iou=1.0)
    extra = {"strict": 0, "loose": 0}
    for seed in range(40):
        for name, builder in (("strict", strict), ("loose", loose)):
            example = builder.pretraining(0, np.random.default_rng(seed))
            extra[name] += (example["region_zeroed"] & ~example["region_target"]).sum()
    assert extra["strict"] > 20 and extra["loose"] == 0


def test_any_mismatch_may_take_a_report_of_the_same_patient():
    strict, loose = make_builder(), make_builder(any_mismatch=True)
    partners = {}
    for name, builder in (("strict", strict), ("loose", loose)):
        rng = np.random.default_rng(0)
        partners[name] = {builder._mismatched(0, rng) for _ in range(300)}
        assert 0 not in partners[name]
    # Study 1 is the same patient's; study 4 has the same text as study 0.
    assert {1, 4} <= partners["loose"] and not {1, 4} & partners["strict"]


# --- D14 and D16, relations -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def said():
    """Logits and encodings of two networks on one batch."""
    model = Plain(QUIET)
    run = jax.jit(lambda p, b: objectives.pretraining_forward(model, p, b, None))
    return {
        name: run(init_params(i, network=model), to_device(make_batch()))
        for i, name in enumerate(objectives.NETWORKS)
    }


def mutual_terms(said, **changes):
    config = dataclasses.replace(LOSS, **changes)
    logits = {name: logits for name, (logits, _) in said.items()}
    vectors = {
        name: objectives.relational_vector(e, config.relational_layer) for name, (_, e) in said.items()
    }
    return objectives.mutual_terms(config, logits, vectors, logits, to_device(make_batch()))[1]


def test_reductions_differ_by_what_they_count(said):
    mean, valid, total = (mutual_terms(said, reduction=r) for r in ("mean", "mean_valid", "sum"))
    np.testing.assert_allclose(
        valid["student/distance"], mean["student/distance"] * B**2 / (B * (B - 1)), rtol=1e-5
    )
    np.testing.assert_allclose(total["student/distance"], mean["student/distance"] * B**2, rtol=1e-5)
    triples = B * (B - 1) * (B - 2)
    np.testing.assert_allclose(total["student/angle"], valid["student/angle"] * triples, rtol=1e-5)
    assert abs(float(valid["student/angle"]) - float(mean["student/angle"])) > 1e-4


def test_every_relational_layer_compares_other_vectors_and_none_compares_nothing(said):
    values = [
        float(mutual_terms(said, relational_layer=layer)["student/angle"])
        for layer in ("fused", "description", "entity", "region")
    ]
    assert len({round(v, 6) for v in values}) == 4 and min(values) > 0
    none = mutual_terms(said, relational_layer="none")
    assert "student/angle" not in none and "student/distance" not in none
    expected = LOSS.alpha * sum(none[f"student/{t}"] for t in objectives.PAPER_TASKS)
    expected += LOSS.beta * LOSS.beta2 * none["student/response"] + LOSS.gamma * none["student/self"]
    np.testing.assert_allclose(none["student/loss"], expected, rtol=1e-5)


# --- D19, stages ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("independent", [False, True])
def test_the_student_learns_from_the_teacher_unless_independent(experiment, independent):
    config = experiment.context.config.copy_and_resolve_references()
    config.train.independent_student = independent
    changed = dataclasses.replace(experiment, context=dataclasses.replace(experiment.context, config=config))
    stage = stages.make_stage("student", changed, {"teacher": {"kernel": 1.0}}, make_mesh())
    assert list(stage.params) == ["student"]
    assert stage.frozen == ({} if independent else {"teacher": {"kernel": 1.0}})


def test_a_single_network_has_no_teacher_and_no_stage_of_it():
    config = default_config()
    assert stages.stage_names(config) == stages.STAGES and stages.network_names(config) == objectives.NETWORKS
    config.train.single_network = True
    assert stages.stage_names(config) == ("student", "mutual", "finetune")
    assert stages.network_names(config) == ("student",)


@pytest.mark.parametrize(("epochs", "warned"), [(0.01, True), (40.0, False)])
def test_a_stage_of_one_step_is_told_of(experiment, caplog, epochs, warned):
    config = experiment.context.config.copy_and_resolve_references()
    config.train.mutual_epochs = epochs
    changed = dataclasses.replace(experiment, context=dataclasses.replace(experiment.context, config=config))
    stage = stages.make_stage("mutual", changed, {"student": {"kernel": 1.0}}, make_mesh())
    assert (stage.num_steps == 1) is warned
    assert ("train.mutual_epochs" in caplog.text) is warned
    # Why: warm-up starts at 0.
    assert (float(make_schedule(stage.optimizer, stage.num_steps)(stage.num_steps - 1)) == 0.0) is warned


@pytest.mark.parametrize(
    ("name", "rate", "video"), [("student", 1.0, 0.5), ("mutual", 0.5, 0.5), ("finetune", 0.25, 4.0)]
)
def test_every_stage_has_its_own_rates(experiment, name, rate, video):
    config = experiment.context.config.copy_and_resolve_references()
    config.optimizer.update(learning_rate=0.1, video_rate_scale=0.5)
    config.train.update(mutual_rate_scale=0.5, finetune_rate_scale=0.25, finetune_video_rate_scale=4.0)
    changed = dataclasses.replace(experiment, context=dataclasses.replace(experiment.context, config=config))
    optimizer = stages.make_stage(name, changed, {"student": {"kernel": 1.0}}, make_mesh()).optimizer
    assert (optimizer.learning_rate, optimizer.video_rate_scale) == (pytest.approx(0.1 * rate), video)


# --- D22, optimizer ---------------------------------------------------------------------------------------


def test_warm_up_share_and_clipping_are_switches():
    first = [make_schedule(OptimizerConfig("sgd", 0.24, warmup_fraction=f), 100)(4) for f in (0.05, 0.5)]
    assert float(first[0]) > 5 * float(first[1])
    params = {"kernel": jnp.zeros(2)}
    gradient = {"kernel": jnp.asarray([30.0, 40.0])}
    for norm, expected in ((1.0, 1.0), (0.0, 50.0)):
        optimizer = make_optimizer(
            OptimizerConfig("sgd", 1.0, weight_decay=0.0, clip_norm=norm, warmup_fraction=0.0), 10_000
        )
        state = optimizer.init(params)
        for _ in range(2):
            updates, state = optimizer.update(gradient, state, params)
        size = float(jnp.linalg.norm(updates["kernel"]))
        np.testing.assert_allclose(size, expected * 1.9, rtol=1e-3)  # the second of two steps: 1 + momentum
