"""The training steps: masks, terms, who learns from whom, overfitting a tiny batch, non-finite losses."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import CONFIG, NAMES, Plain, init_params, make_batch, no_compilation, to_device

from dilbert_jax.training import objectives
from dilbert_jax.training import step as steps
from dilbert_jax.training.optimizer import OptimizerConfig, make_optimizer, make_schedule

# One worker, or both would compile the same programs at the same time.
pytestmark = [pytest.mark.numerics, pytest.mark.xdist_group("step")]

MODEL = Plain(dataclasses.replace(CONFIG, dropout=0.0))
LOSS = objectives.LossConfig()
RNG = jax.random.key(0)


@pytest.fixture(scope="module")
def networks():
    return {"teacher": init_params(1, network=MODEL), "student": init_params(2, network=MODEL)}


@pytest.fixture(scope="module")
def frozen():
    return {"teacher": init_params(3, network=MODEL), "student": init_params(4, network=MODEL)}


@functools.cache
def compiled(config):
    """The mutual objective: running it op by op would compile every op."""
    return jax.jit(functools.partial(objectives.mutual_objective, MODEL, config))


def mutual(networks, frozen, batch, config=LOSS):
    return compiled(config)(networks, frozen, batch, RNG)


def largest(tree) -> float:
    return max(float(jnp.abs(x).max()) for x in jax.tree.leaves(tree))


def test_mismatched_pairs_count_for_matching_only(networks):
    batch = to_device(make_batch())
    masks = objectives.task_masks(batch, LOSS)
    assert not bool(masks["mlm"][1::2].any() | masks["mdc"][1::2].any() | masks["moc"][1::2].any())
    assert bool(masks["cmm"].all())
    assert bool(objectives.task_masks(batch, dataclasses.replace(LOSS, all_pairs=True))["mlm"][1::2].all())


def test_a_batch_without_valid_positions_costs_exactly_nothing(networks):
    batch = make_batch()
    batch["matched"][:] = False
    batch["cmm_mask"][:] = False
    batch = to_device(batch)

    def loss(params):
        return objectives.pretraining_objective(MODEL, LOSS, {"teacher": params}, None, batch, RNG)[0]

    value, gradient = jax.jit(jax.value_and_grad(loss))(networks["teacher"])
    assert float(value) == 0.0
    assert largest(gradient) == 0.0


def test_mutual_loss_is_equation_13(networks, frozen):
    batch = to_device(make_batch())
    config = dataclasses.replace(LOSS, alpha=0.3, beta=0.7, gamma=0.9, beta1=3.0, beta2=0.5)
    total, terms = mutual(networks, frozen, batch, config)
    for name in ("teacher", "student"):
        t = {
            key: float(terms[f"{name}/{key}"])
            for key in (*objectives.PAPER_TASKS, "distance", "angle", "response", "self")
        }
        supervised = sum(t[task] for task in objectives.PAPER_TASKS)
        learned = t["distance"] + 3.0 * t["angle"] + 0.5 * t["response"]
        expected = 0.3 * supervised + 0.7 * learned + 0.9 * t["self"]
        np.testing.assert_allclose(float(terms[f"{name}/loss"]), expected, rtol=1e-5)
        assert min(t["response"], t["self"], t["angle"], t["distance"]) > 0
    np.testing.assert_allclose(float(terms["teacher/angle"]), float(terms["student/angle"]), rtol=1e-5)
    np.testing.assert_allclose(float(total), float(terms["teacher/loss"] + terms["student/loss"]), rtol=1e-6)


def test_without_a_weight_the_summary_task_does_not_exist(networks, frozen):
    batch = make_batch()
    _, terms = mutual(networks, frozen, to_device(batch), LOSS)
    assert not any(name.endswith("/summary") for name in terms)
    batch["report_classes"] = ~batch["report_classes"]
    total, _ = mutual(networks, frozen, to_device(batch), LOSS)
    np.testing.assert_allclose(total, terms["teacher/loss"] + terms["student/loss"], rtol=1e-6)


def test_summary_is_the_mean_of_both_sides_and_counts_mismatched_pairs(networks, frozen):
    batch = make_batch()
    batch["report_classes_mask"][:2] = False
    forward = jax.jit(lambda p, b: objectives.pretraining_forward(MODEL, p, b, None)[0])
    logits = forward(networks["teacher"], to_device(batch))
    z = np.asarray(logits["summary"], np.float64)
    target = np.stack([batch["classes"], batch["report_classes"]], axis=1)
    entropy = np.logaddexp(0.0, np.where(target, -z, z)).mean(-1)
    counted = np.concatenate([entropy[:, 0], entropy[2:, 1]])
    config = dataclasses.replace(LOSS, summary=2.0)
    masks = objectives.task_masks(to_device(batch), config)
    found = objectives.task_losses(logits, to_device(batch), masks, config)["summary"]
    np.testing.assert_allclose(float(found), counted.mean(), rtol=1e-5)
    plain, with_it = (mutual(networks, frozen, to_device(batch), c)[1] for c in (LOSS, config))
    extra = 2.0 * LOSS.alpha * float(with_it["teacher/summary"])
    assert float(with_it["teacher/loss"]) > float(plain["teacher/loss"]) + 0.9 * extra


def test_weights_of_fine_tuning_weigh_their_own_term(networks):
    batch = to_device(make_batch())
    names = tuple(map(jnp.asarray, NAMES))

    def losses(config):
        return objectives.annotation_objective(
            MODEL, config, networks, names, jnp.asarray([0, 1, -1, 2]), batch, RNG
        )[1]

    plain = losses(LOSS)
    for term in ("organ", "condition", "findings", "match", "grounding"):
        doubled = losses(dataclasses.replace(LOSS, **{term: 2.0}))
        expected = plain["student/loss"] + plain[f"student/{term}"]
        np.testing.assert_allclose(doubled["student/loss"], expected, rtol=1e-5)


def test_a_network_equal_to_its_snapshot_has_no_self_distillation(networks):
    batch = to_device(make_batch())
    _, terms = mutual(networks, networks, batch)
    assert abs(float(terms["teacher/self"])) < 1e-6


def test_no_gradient_flows_into_the_peer_or_the_snapshots(networks, frozen):
    batch = to_device(make_batch())

    def one_loss(params, snapshots, chosen):
        terms = objectives.mutual_objective(MODEL, LOSS, params, snapshots, batch, RNG)[1]
        return sum(chosen[name] * terms[f"{name}/loss"] for name in objectives.NETWORKS)

    gradient = jax.jit(jax.grad(one_loss, (0, 1)))
    for name, peer in (objectives.NETWORKS, objectives.NETWORKS[::-1]):
        to_networks, to_snapshots = gradient(networks, frozen, {name: 1.0, peer: 0.0})
        assert largest(to_networks[name]) > 1e-4
        assert largest(to_networks[peer]) == 0.0
        assert largest(to_snapshots) == 0.0


def test_soft_labels_pull_the_student_only(networks):
    batch = to_device(make_batch())

    def loss(params, teacher):
        return objectives.pretraining_objective(MODEL, LOSS, {"student": params}, teacher, batch, RNG)[0]

    to_student, to_teacher = jax.jit(jax.grad(loss, (0, 1)))(networks["student"], networks["teacher"])
    assert largest(to_student) > 0 and largest(to_teacher) == 0.0


def test_an_unknown_relational_layer_is_refused(networks, frozen):
    config = dataclasses.replace(LOSS, relational_layer="pooled")
    with pytest.raises(ValueError, match=r"relational_layer is 'pooled'"):
        mutual(networks, frozen, to_device(make_batch()), config)


def run_steps(objective, params, frozen, batch, count, learning_rate=3e-3):
    optimizer = make_optimizer(OptimizerConfig("adamw", learning_rate, warmup_fraction=0.05), count)
    state = steps.TrainState.create(jax.tree.map(jnp.array, params), optimizer)
    update = steps.make_step(objective, optimizer)
    state, metrics = update(state, frozen, batch, RNG)
    losses = [float(metrics["loss"])]
    with no_compilation():
        for _ in range(1, count):
            state, metrics = update(state, frozen, batch, RNG)
            losses.append(float(metrics["loss"]))
    return state, losses


def test_both_networks_overfit_a_tiny_batch_in_the_mutual_stage(networks, frozen):
    batch = to_device(make_batch())
    config = dataclasses.replace(LOSS, alpha=1.0, beta=0.1, gamma=0.0)
    objective = functools.partial(objectives.mutual_objective, MODEL, config)
    _, losses = run_steps(objective, networks, frozen, batch, 80)
    assert losses[-1] < 0.25 * losses[0]


def test_annotation_overfits_a_tiny_batch(networks):
    batch = make_batch()
    batch |= {name: batch[name][:, :2] for name in ("token_ids", "token_types", "token_mask")}
    names = tuple(map(jnp.asarray, NAMES))

    def objective(params, frozen, b, rng):
        return objectives.annotation_objective(MODEL, LOSS, params, names, jnp.asarray([0, 1, -1, 2]), b, rng)

    state, losses = run_steps(objective, networks, {}, to_device(batch), 80)
    assert losses[-1] < 0.35 * losses[0]
    forward = jax.jit(lambda p, b: objectives.annotation_forward(MODEL, p, b, names, None)[0])
    logits = forward(state.params["student"], to_device(batch))
    np.testing.assert_array_equal(np.argmax(logits["organ"], -1), batch["organ"])


def test_a_non_finite_loss_leaves_the_state_as_it_was(networks):
    batch = make_batch()
    optimizer = make_optimizer(OptimizerConfig("sgd", 0.24), 10)
    params = {"teacher": networks["teacher"]}
    state = steps.TrainState.create(jax.tree.map(jnp.array, params), optimizer)

    def objective(p, frozen, b, rng):
        loss, metrics = objectives.pretraining_objective(MODEL, LOSS, p, None, b, rng)
        return loss * b["scale"], metrics | {"teacher/loss": loss * b["scale"]}

    update = steps.make_step(objective, optimizer)
    state, metrics = update(state, {}, to_device(batch) | {"scale": jnp.float32(np.nan)}, RNG)
    assert not np.isfinite(float(metrics["loss"])) and int(state.step) == 0
    for before, after in zip(jax.tree.leaves(params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_array_equal(before, after)
    state, metrics = update(state, {}, to_device(batch) | {"scale": jnp.float32(1.0)}, RNG)
    assert int(state.step) == 1


def test_schedule_warms_up_and_ends_at_zero():
    schedule = make_schedule(OptimizerConfig("sgd", 0.24, warmup_fraction=0.1), 100)
    assert float(schedule(0)) == 0.0
    np.testing.assert_allclose(float(schedule(10)), 0.24, rtol=1e-6)
    assert float(schedule(50)) < 0.24
    np.testing.assert_allclose(float(schedule(100)), 0.0, atol=1e-8)


@pytest.mark.parametrize(("fraction", "num_steps"), [(0.05, 40), (0.5, 7), (0.0, 3), (0.1, 1)])
def test_the_schedule_is_that_of_optax(fraction, num_steps):
    schedule = make_schedule(OptimizerConfig("sgd", 0.24, warmup_fraction=fraction), num_steps)
    theirs = optax.warmup_cosine_decay_schedule(0.0, 0.24, schedule.warmup, schedule.num_steps)
    count = jnp.arange(num_steps + 2)
    np.testing.assert_allclose(schedule(count), jax.vmap(theirs)(count), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("scale", [0.01, 100.0])
def test_the_norm_of_a_gradient_and_clipping_by_it_are_those_of_optax(scale, rng):
    shapes = [(3,), (2, 5), (300, 300), ()]
    gradient = {str(s): jnp.asarray(scale * rng.standard_normal(s), jnp.float32) for s in shapes}
    norm = steps._norm(gradient)
    np.testing.assert_allclose(norm, optax.tree.norm(gradient), rtol=1e-6)
    optimizer = make_optimizer(OptimizerConfig("sgd", 1.0, 0.0, momentum=0.0, warmup_fraction=0.0), 10)
    expected, _ = optax.clip_by_global_norm(1.0).update(gradient, optax.EmptyState())
    for known in (norm, None):
        state = optimizer.init(gradient)
        _, state = optimizer.update(gradient, state, gradient, known)
        ours, _ = optimizer.update(gradient, state, gradient, known)  # the first step's rate is 0
        for name, value in expected.items():
            np.testing.assert_allclose(-ours[name], value, rtol=1e-5)


def test_stages_of_other_lengths_and_rates_share_the_program_of_the_update():
    def objective(params, frozen, batch, rng):
        return sum(jnp.sum(x**2) for x in jax.tree.leaves(params)), {}

    def first_step(names, rate, num_steps):
        optimizer = make_optimizer(OptimizerConfig("adamw", rate, weight_decay=0.01), num_steps)
        state = steps.TrainState.create({name: {"kernel": jnp.ones(3)} for name in names}, optimizer)
        return steps.make_step(objective, optimizer)(state, {}, {}, RNG)

    first_step(["teacher"], 0.1, 100)
    programs = steps._compiled_update._cache_size()
    first_step(["teacher", "student"], 0.2, 10)
    assert steps._compiled_update._cache_size() == programs


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_the_3d_cnn_has_a_rate_of_its_own(name, rng):
    """Everything else is updated as if it had none, and the CNN as if all had its rate."""
    params = {
        part: {"kernel": jnp.asarray(rng.standard_normal(5), jnp.float32)} for part in ("video", "layers_0")
    }
    gradients = [jax.tree.map(lambda p, g=g: p * g, params) for g in (0.1, -0.3, 0.2)]

    def updates(rate, scale):
        optimizer = make_optimizer(
            OptimizerConfig(name, rate, weight_decay=0.1, clip_norm=0.2, video_rate_scale=scale), 10
        )
        state = optimizer.init(params)
        for gradient in gradients:
            found, state = optimizer.update(gradient, state, params)
        return {part: found[part]["kernel"] for part in params}

    own, same, low = updates(0.2, 0.25), updates(0.2, 1.0), updates(0.05, 1.0)
    np.testing.assert_array_equal(own["layers_0"], same["layers_0"])
    np.testing.assert_allclose(own["video"], low["video"], rtol=1e-6)
    assert np.abs(own["video"]).min() > 0


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(ValueError, match=r"optimizer.name is 'lamb'"):
        make_optimizer(OptimizerConfig("lamb"), 10)
