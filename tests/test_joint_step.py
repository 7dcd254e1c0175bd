"""The joint step of mutual learning against its definition: two passes, one network at a time, with fixed targets."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import CONFIG, NAMES, Plain, init_params, make_batch, no_compilation, to_device

from dilbert_jax import losses, relational
from dilbert_jax.training import objectives
from dilbert_jax.training import step as steps
from dilbert_jax.training.accumulation import Accumulation, accumulate
from dilbert_jax.training.optimizer import OptimizerConfig, make_optimizer

# One worker, or both would compile the same programs at the same time.
pytestmark = [pytest.mark.numerics, pytest.mark.xdist_group("joint_step")]

MODEL = Plain(dataclasses.replace(CONFIG, dropout=0.0))
LOSS = objectives.LossConfig(summary=0.5, temperature=2.0, scale_by_square=True)
RNG = jax.random.key(0)
MULTI_LABEL = ("mdc", "summary")


@pytest.fixture(scope="module")
def networks():
    return {"teacher": init_params(1, network=MODEL), "student": init_params(2, network=MODEL)}


@pytest.fixture(scope="module")
def frozen():
    return {"teacher": init_params(3, network=MODEL), "student": init_params(4, network=MODEL)}


@pytest.fixture(scope="module")
def batch():
    return to_device(make_batch())


@functools.partial(jax.jit, static_argnums=3)
def joint(networks, frozen, batch, config):
    """Value, metrics and gradient of the joint objective."""
    objective = functools.partial(objectives.mutual_objective, MODEL, config)
    return jax.value_and_grad(objective, has_aux=True)(networks, frozen, batch, RNG)


_pretraining_forward = objectives.pretraining_forward


@jax.jit
def forward(params, batch):
    return _pretraining_forward(MODEL, params, batch, None)


@functools.partial(jax.jit, static_argnums=5)
def written_out(params, peer, snapshot, peer_fused, batch, config):
    """Value and gradient of equation (13) of one network; what the others say comes fixed."""
    masks = objectives.task_masks(batch, config)

    def divergence(logits, targets, temperature):
        total = 0.0
        for task in config.tasks:
            compare = losses.binary_response_loss if task in MULTI_LABEL else losses.response_loss
            total += compare(logits[task], targets[task], temperature=temperature, mask=masks[task])
        return total

    def loss(params):
        logits, encoded = _pretraining_forward(MODEL, params, batch, None)
        supervised = objectives.task_losses(logits, batch, masks, config)
        cross_entropy = sum(getattr(config, task) * value for task, value in supervised.items())
        mutual = relational.relational_loss(encoded.fused, peer_fused, beta1=config.beta1)
        mutual += config.beta2 * divergence(logits, peer, 1.0)
        own = divergence(logits, snapshot, config.temperature)
        own *= config.temperature**2 if config.scale_by_square else 1.0
        return config.alpha * cross_entropy + config.beta * mutual + config.gamma * own

    return jax.value_and_grad(loss)(params)


def two_pass_gradient(params, peer, snapshot, batch, config):
    """What peer and snapshot say is computed before, by itself."""
    peer_logits, peer_encoded = jax.tree.map(np.asarray, forward(peer, batch))
    frozen_logits, _ = jax.tree.map(np.asarray, forward(snapshot, batch))
    return written_out(params, peer_logits, frozen_logits, peer_encoded.fused, batch, config)


def assert_close(ours, theirs, tolerance):
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        scale = max(float(jnp.abs(b).max()), 0.01)
        np.testing.assert_allclose(a, b, atol=tolerance * scale, err_msg=jax.tree_util.keystr(path))


def test_gradients_equal_the_two_pass_version(networks, frozen, batch):
    (_, metrics), gradient = joint(networks, frozen, batch, LOSS)
    for name, peer in (objectives.NETWORKS, objectives.NETWORKS[::-1]):
        value, expected = two_pass_gradient(networks[name], networks[peer], frozen[name], batch, LOSS)
        np.testing.assert_allclose(metrics[f"{name}/loss"], value, rtol=1e-5)
        assert_close(gradient[name], expected, 2e-4)


def test_one_update_equals_two_separate_optimizers(networks, frozen, batch):
    """Each network has its own clipping, decay and momentum; the input buffers are given up."""
    optimizer = make_optimizer(OptimizerConfig("sgd", 0.24, warmup_fraction=0.0), 10)
    _, gradient = joint(networks, frozen, batch, LOSS)

    @jax.jit
    def updated(params, gradient):
        state = optimizer.init(params)
        for _ in range(2):  # the schedule starts at 0: twice the same gradient, then look
            updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates)

    expected = {name: updated(networks[name], gradient[name]) for name in objectives.NETWORKS}

    objective = functools.partial(objectives.mutual_objective, MODEL, LOSS)
    update = steps.make_step(objective, optimizer)
    start = steps.TrainState.create(jax.tree.map(jnp.array, networks), optimizer)
    first, _ = update(start, frozen, batch, RNG)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(start.params))
    with no_compilation():
        second, _ = update(first, frozen, batch, RNG)
    assert_close(second.params, expected, 1e-4)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(frozen))


# Weight -> the terms it multiplies in a network's loss; every other term must stay what it was.
WEIGHTS = {
    "alpha": lambda t, c: sum(getattr(c, task) * t[task] for task in c.tasks),
    "beta": lambda t, c: t["distance"] + c.beta1 * t["angle"] + c.beta2 * t["response"],
    "gamma": lambda t, c: t["self"],
    "beta1": lambda t, c: c.beta * t["angle"],
    "beta2": lambda t, c: c.beta * t["response"],
    "mlm": lambda t, c: c.alpha * t["mlm"],
    "mdc": lambda t, c: c.alpha * t["mdc"],
    "moc": lambda t, c: c.alpha * t["moc"],
    "cmm": lambda t, c: c.alpha * t["cmm"],
    "summary": lambda t, c: c.alpha * t["summary"],
}


@pytest.fixture(scope="module")
def said(networks, frozen, batch):
    """What networks and snapshots say of the batch: logits, vectors, anchors."""
    outputs = {name: forward(params, batch) for name, params in networks.items()}
    logits = {name: said for name, (said, _) in outputs.items()}
    vectors = {name: encoded.fused for name, (_, encoded) in outputs.items()}
    return logits, vectors, {name: forward(params, batch)[0] for name, params in frozen.items()}


def test_the_objective_is_made_of_these_terms(networks, frozen, batch, said):
    (total, metrics), _ = joint(networks, frozen, batch, LOSS)
    expected, terms = objectives.mutual_terms(LOSS, *said, batch)
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    assert metrics.keys() == terms.keys()


@pytest.mark.parametrize("weight", WEIGHTS)
def test_a_weight_changes_exactly_its_terms(said, batch, weight):
    changed = dataclasses.replace(LOSS, **{weight: getattr(LOSS, weight) + 0.75})
    before, after = (jax.device_get(objectives.mutual_terms(c, *said, batch)[1]) for c in (LOSS, changed))
    for name in objectives.NETWORKS:
        terms = {key.split("/")[1]: v for key, v in before.items() if key.startswith(name)}
        for key in terms.keys() - {"loss"}:
            np.testing.assert_allclose(after[f"{name}/{key}"], terms[key], rtol=1e-6, err_msg=key)
        expected = terms["loss"] + 0.75 * WEIGHTS[weight](terms, LOSS)
        assert expected > terms["loss"] + 1e-4
        np.testing.assert_allclose(after[f"{name}/loss"], expected, rtol=1e-5)


@pytest.mark.parametrize("square", [False, True])
def test_temperature_changes_self_distillation_alone(said, batch, square):
    changed = dataclasses.replace(LOSS, temperature=5.0, scale_by_square=square)
    before, after = (jax.device_get(objectives.mutual_terms(c, *said, batch)[1]) for c in (LOSS, changed))
    for name in objectives.NETWORKS:
        for key in before.keys() - {f"{n}/{k}" for n in objectives.NETWORKS for k in ("self", "loss")}:
            np.testing.assert_allclose(after[key], before[key], rtol=1e-6, err_msg=key)
        logits, _, anchors = (part[name] for part in said)
        softened = objectives.soften(logits, anchors, objectives.task_masks(batch, LOSS), LOSS, 5.0)
        expected = softened * (25.0 if square else 1.0)
        np.testing.assert_allclose(after[f"{name}/self"], expected, rtol=1e-5)
        assert abs(after[f"{name}/self"] - before[f"{name}/self"]) > 1e-3 * before[f"{name}/self"]


def test_temperature_reaches_the_soft_labels_of_the_student(networks, batch, monkeypatch):
    # The compiled forward pass: running the network op by op would compile every op.
    monkeypatch.setattr(
        objectives, "pretraining_forward", lambda model, params, b, dropout: forward(params, b)
    )

    def soft(config):
        return objectives.pretraining_objective(
            MODEL, config, {"student": networks["student"]}, networks["teacher"], batch, RNG
        )[1]

    warm, squared = soft(dataclasses.replace(LOSS, scale_by_square=False)), soft(LOSS)
    cold = soft(dataclasses.replace(LOSS, temperature=1.0))
    assert float(warm["student/soft_labels"]) < float(cold["student/soft_labels"])
    np.testing.assert_allclose(squared["student/soft_labels"], 4.0 * warm["student/soft_labels"], rtol=1e-6)


def test_one_network_alone_is_plain_pretraining(networks, frozen, batch):
    config = dataclasses.replace(LOSS, alpha=1.0, gamma=0.0)
    alone = {"student": networks["student"]}
    (value, metrics), gradient = joint(alone, frozen, batch, config)
    assert not {"student/response", "student/distance", "student/angle"} & metrics.keys()

    def plain(params):
        return objectives.pretraining_objective(MODEL, config, params, None, batch, RNG)[0]

    expected, expected_gradient = jax.jit(jax.value_and_grad(plain))(alone)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert_close(gradient, expected_gradient, 1e-5)


def test_both_networks_and_snapshots_see_the_same_corrupted_batch(networks, batch):
    """With one set of weights everywhere nothing is left to distil (no dropout here)."""
    same = {name: networks["teacher"] for name in objectives.NETWORKS}
    (_, metrics), gradient = joint(same, same, batch, LOSS)
    for name in objectives.NETWORKS:
        for term in ("response", "self", "distance", "angle"):
            assert abs(float(metrics[f"{name}/{term}"])) < 1e-5
    assert_close(gradient["teacher"], gradient["student"], 1e-5)


@pytest.mark.parametrize(
    ("stage", "k"), [("mutual", 4), pytest.param("pretraining", 2, marks=pytest.mark.slow), ("annotation", 2)]
)
def test_micro_batches_add_up_to_the_batch(stage, k):
    """Every term and gradient: masked means over few, uneven positions and relations between all samples."""
    batch = make_batch(3, 8)
    rng = np.random.default_rng(1)
    for name in (
        "mlm_mask",
        "region_target",
        "description_target",
        "matched",
        "classes_mask",
        "entities_mask",
    ):
        batch[name] = rng.random(batch[name].shape) < 0.4
    batch["organ"][:5] = -1
    batch = to_device(batch)
    networks = {name: init_params(i, network=MODEL) for i, name in enumerate(objectives.NETWORKS)}
    frozen = {name: init_params(i + 2, network=MODEL) for i, name in enumerate(objectives.NETWORKS)}
    entity_of_region = jnp.asarray([0, 1, -1, 2])
    objective = functools.partial(objectives.mutual_objective, MODEL, LOSS)
    how = objectives.mutual_accumulation(MODEL, LOSS, k, relate=True)
    if stage != "mutual":  # every network by itself
        networks = {"student": networks["student"]}
    if stage == "pretraining":
        how = Accumulation(k, how.masks)

        def objective(p, f, b, r, *part):
            return objectives.pretraining_objective(MODEL, LOSS, p, f["teacher"], b, r, *part)

    elif stage == "annotation":
        masks = functools.partial(objectives.annotation_masks, entity_of_region=entity_of_region)
        how = Accumulation(k, masks)

        def objective(p, f, b, r, *part):
            return objectives.annotation_objective(MODEL, LOSS, p, NAMES, entity_of_region, b, r, *part)

    whole = jax.jit(jax.value_and_grad(objective, has_aux=True))
    parts = jax.jit(functools.partial(accumulate, objective, how))
    (loss, metrics), gradient = whole(networks, frozen, batch, RNG)
    (other_loss, other_metrics), other_gradient = parts(networks, frozen, batch, RNG)
    assert metrics.keys() == other_metrics.keys()
    np.testing.assert_allclose(other_loss, loss, rtol=1e-5)
    for name in metrics:
        np.testing.assert_allclose(other_metrics[name], metrics[name], rtol=2e-5, atol=1e-7, err_msg=name)
    assert_close(other_gradient, gradient, 1e-4)


@pytest.mark.slow
def test_relations_within_micro_batches_are_another_loss():
    batch = to_device(make_batch(3, 8))
    networks = {name: init_params(i, network=MODEL) for i, name in enumerate(objectives.NETWORKS)}
    objective = functools.partial(objectives.mutual_objective, MODEL, LOSS)
    how = objectives.mutual_accumulation(MODEL, LOSS, 2, relate=False)
    parts = jax.jit(lambda b: accumulate(objective, how, networks, networks, b, RNG)[0][1])(batch)
    terms = jax.jit(lambda b: objective(networks, networks, b, RNG)[1])
    halves = [{name: x[i::2] for name, x in batch.items()} for i in range(2)]
    mean = np.mean([terms(half)["student/angle"] for half in halves])
    np.testing.assert_allclose(parts["student/angle"], mean, rtol=1e-5)
    whole = terms(batch)
    assert abs(float(parts["student/angle"]) - float(whole["student/angle"])) > 1e-4
    np.testing.assert_allclose(parts["student/mlm"], whole["student/mlm"], rtol=1e-5)
