"""Losses against independent float64 NumPy and against recorded PyTorch values."""

import functools
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference as reference
import pytest

from dilbert_jax import losses, relational
from dilbert_jax.training import objectives

pytestmark = pytest.mark.numerics

REFERENCE = os.environ.get("DILBERT_REFERENCE_DIR")
needs_reference = pytest.mark.skipif(REFERENCE is None, reason="DILBERT_REFERENCE_DIR is not set")
TOLERANCE = {"f64": 1e-9, "f32": 1e-5}


def assert_close(actual, expected, tolerance):
    """Relative to the largest entry, as a gradient's small entries are sums of its large ones."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    scale = max(float(np.abs(expected).max()), 1e-3)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * scale)


@pytest.fixture
def vectors():
    return np.load(Path(REFERENCE) / "kl_dml.npz", allow_pickle=False)


@pytest.fixture
def logits():
    rng = np.random.default_rng(3)
    return rng.normal(size=(5, 7)) * 3, rng.normal(size=(5, 7)) * 3


# In one program: operation by operation, every shape would compile dozens.
graded_response = jax.jit(jax.value_and_grad(losses.response_loss), static_argnames="temperature")


def test_masked_mean_averages_the_valid_values():
    values = jnp.array([[1.0, jnp.nan], [5.0, jnp.inf]])
    mask = jnp.array([[True, False], [True, False]])
    value, gradient = jax.value_and_grad(losses.masked_mean)(values, mask)
    assert value == 3.0
    np.testing.assert_array_equal(gradient, [[0.5, 0], [0.5, 0]])


def test_masked_mean_of_nothing_is_zero_with_zero_gradient():
    values = jnp.array([jnp.nan, 2.0])
    value, gradient = jax.value_and_grad(losses.masked_mean)(values, jnp.zeros(2, bool))
    assert value == 0.0
    np.testing.assert_array_equal(gradient, [0, 0])
    assert losses.masked_mean(jnp.zeros((0, 3))) == 0.0


def test_masked_mean_without_mask_is_the_mean_and_promotes_half_precision():
    values = jnp.full(4096, 1.01, jnp.bfloat16)
    value = losses.masked_mean(values)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, np.float32(values[0]), rtol=1e-6)


def test_shapes_that_differ_are_refused_with_both_shapes():
    with pytest.raises(ValueError, match=r"\(2, 1\).*\(2,\)"):
        losses.masked_mean(jnp.zeros(2), jnp.ones((2, 1), bool))
    with pytest.raises(ValueError, match=r"\(3,\).*\(2, 4\)"):
        losses.cross_entropy(jnp.zeros((2, 4)), jnp.zeros(3, int))
    for function in (
        losses.binary_cross_entropy,
        losses.response_loss,
        losses.binary_response_loss,
    ):
        with pytest.raises(ValueError, match=r"\(2, 4\).*\(2, 1\)"):
            function(jnp.zeros((2, 4)), jnp.zeros((2, 1)))


def test_values_equal_numpy(logits):
    student, teacher = logits
    labels = np.array([0, 6, 2, 2, 5])
    targets = (teacher > 0).astype(float)
    sigmoid = reference.sigmoid(student)
    bernoulli = -(targets * np.log(sigmoid) + (1 - targets) * np.log(1 - sigmoid))
    with jax.enable_x64(True):
        s, t = jnp.asarray(student), jnp.asarray(teacher)
        assert_close(losses.cross_entropy(s, labels), reference.cross_entropy(student, labels), 1e-12)
        assert_close(losses.binary_cross_entropy(s, jnp.asarray(targets)), bernoulli, 1e-12)
        for temperature in (1.0, 5.0):
            expected = reference.softmax_divergence(student, teacher, temperature).mean()
            assert_close(losses.response_loss(s, t, temperature=temperature), expected, 1e-12)
            expected = reference.bernoulli_divergence(student, teacher, temperature).mean()
            assert_close(losses.binary_response_loss(s, t, temperature=temperature), expected, 1e-12)


def test_mask_selects_positions(logits):
    student, teacher = (jnp.asarray(array, jnp.float32) for array in logits)
    mask = jnp.array([True, False, True, False, False])
    spoiled = student.at[1].set(jnp.nan)
    for function in (losses.response_loss, losses.binary_response_loss):
        expected = function(student[jnp.array([0, 2])], teacher[jnp.array([0, 2])])
        value = function(spoiled, teacher, mask=mask)
        np.testing.assert_allclose(value, expected, rtol=1e-6)
        assert function(student, teacher, mask=jnp.zeros(5, bool)) == 0


def self_distillation(logits, frozen, **arguments):
    """(11) as training takes it, of one softmax head: the others have no valid position."""
    config = objectives.LossConfig()
    masks = {task: jnp.full(len(logits), task == "mlm") for task in config.tasks}
    heads, targets = (dict.fromkeys(config.tasks, z) for z in (logits, frozen))
    return objectives.soften(heads, targets, masks, config, **arguments)


def test_self_distillation_scales_by_the_squared_temperature_only_when_asked(logits):
    student, frozen = (jnp.asarray(array, jnp.float32) for array in logits)
    plain = self_distillation(student, frozen, temperature=5.0)
    np.testing.assert_allclose(plain, losses.response_loss(student, frozen, temperature=5.0), rtol=0)
    scaled = self_distillation(student, frozen, temperature=5.0, square=True)
    np.testing.assert_allclose(scaled, 25 * plain, rtol=1e-6)


def test_no_gradient_reaches_the_teaching_side(logits):
    student, teacher = (jnp.asarray(array, jnp.float32) for array in logits)
    for function in (losses.response_loss, losses.binary_response_loss):
        by_student, by_teacher = jax.grad(function, argnums=(0, 1))(student, teacher)
        assert np.abs(by_student).max() > 1e-3
        np.testing.assert_array_equal(by_teacher, np.zeros_like(teacher))


def test_excluded_classes_and_extreme_logits_stay_finite():
    student = jnp.array([[300.0, -300.0, 0.0]])
    teacher = jnp.array([[0.0, 1.0, -jnp.inf]])
    value, gradient = jax.value_and_grad(losses.response_loss)(student, teacher)
    assert np.isfinite(value) and value > 0 and np.isfinite(gradient).all()
    value, gradient = jax.value_and_grad(losses.binary_response_loss)(student, -student)
    np.testing.assert_allclose(value, 200.0, rtol=1e-6)
    assert np.isfinite(gradient).all()


def test_composition_has_the_printed_weights():
    assert losses.mutual_loss(2.0, 3.0, beta2=10.0) == 32.0
    assert losses.mutual_loss(2.0, 3.0) == 5.0
    assert losses.distillation_loss(1.0, 10.0, 100.0) == pytest.approx(0.2 + 10 + 60)
    assert losses.distillation_loss(1.0, 10.0, 100.0, alpha=2, beta=3, gamma=4) == 432.0


@needs_reference
@pytest.mark.parametrize("precision", ["f32", "f64"])
@pytest.mark.parametrize("case", ["N4_M2", "N32_M6", "N16_M1000"])
def test_recorded_cross_entropy_and_divergence(vectors, precision, case):
    read = {
        key.split("/", 2)[2]: vectors[key] for key in vectors.files if key.startswith(f"{precision}/{case}/")
    }
    exact = {key.split("/", 2)[2]: vectors[key] for key in vectors.files if key.startswith(f"f64/{case}/")}
    with jax.enable_x64(precision == "f64"):
        student, peer = jnp.asarray(read["z_student"]), jnp.asarray(read["z_peer"])
        mean = jax.jit(jax.value_and_grad(lambda z: losses.cross_entropy(z, read["y"]).mean()))
        value, gradient = mean(student)
        assert_close(value, exact["ce_mean"], TOLERANCE[precision])
        assert_close(gradient, exact["ce_grad"], TOLERANCE[precision])
        for temperature in (1, 5, 10, 20):
            value, gradient = graded_response(student, peer, temperature=temperature)
            assert_close(value, exact[f"kl_peer_to_student_T{temperature}_batchmean"], TOLERANCE[precision])
            assert_close(gradient, exact[f"kl_T{temperature}_grad_student"], TOLERANCE[precision])
            reverse, _ = graded_response(peer, student, temperature=temperature)
            assert_close(reverse, exact[f"WRONGDIR_kl_T{temperature}_batchmean"], TOLERANCE[precision])


@needs_reference
@pytest.mark.parametrize("precision", ["f32", "f64"])
def test_recorded_extreme_logits(vectors, precision):
    with jax.enable_x64(precision == "f64"):
        student = jnp.asarray(vectors[f"{precision}/extreme/z_student"])
        peer = jnp.asarray(vectors[f"{precision}/extreme/z_peer"])
        value, gradient = graded_response(student, peer)
        assert_close(value, vectors["f64/extreme/kl"], TOLERANCE[precision])
        assert_close(gradient, vectors["f64/extreme/grad"], TOLERANCE[precision])


@functools.partial(jax.jit, static_argnames="temperature")
@functools.partial(jax.grad, argnums=(0, 1), has_aux=True)
def compose(
    logits, vector, peer_logits, peer_vector, frozen, labels, alpha, beta, gamma, beta1, beta2, *, temperature
):
    """Gradients of the total by a network's logits and vector, and the total's terms."""
    terms = {
        "ce": losses.masked_mean(losses.cross_entropy(logits, labels)),
        "kl": losses.response_loss(logits, peer_logits),
        "rkd_dist": relational.distance_loss(vector, peer_vector),
        "rkd_angle": relational.angle_loss(vector, peer_vector),
        "sd_noT2": self_distillation(logits, frozen, temperature=temperature),
    }
    relation = relational.relational_loss(vector, peer_vector, beta1=beta1)
    terms["md"] = losses.mutual_loss(relation, terms["kl"], beta2=beta2)
    terms["total"] = losses.distillation_loss(
        terms["ce"], terms["md"], terms["sd_noT2"], alpha=alpha, beta=beta, gamma=gamma
    )
    return terms["total"], terms


@needs_reference
@pytest.mark.parametrize("precision", ["f32", "f64"])
@pytest.mark.parametrize("temperature", [1, 5])
@pytest.mark.parametrize(("network", "peer"), [(1, 2), (2, 1)])
def test_recorded_total_of_both_networks(vectors, precision, temperature, network, peer):
    with jax.enable_x64(precision == "f64"):

        def read(name):
            return jnp.asarray(vectors[f"{precision}/compose/{name}"])

        labels = vectors[f"{precision}/compose/y"]
        weights = vectors[f"{precision}/compose/weights_alpha_beta_gamma_b1_b2"]
        gradient, terms = compose(
            read(f"z{network}"),
            read(f"emb{network}"),
            read(f"z{peer}"),
            read(f"emb{peer}"),
            read(f"zbar{network}"),
            labels,
            *(float(weight) for weight in weights),
            temperature=temperature,
        )
        for name, value in terms.items():
            expected = vectors[f"f64/compose/t{temperature}/net{network}/{name}"]
            np.testing.assert_allclose(value, expected, rtol=TOLERANCE[precision])
        for name, value in zip(("grad_z", "grad_emb"), gradient, strict=True):
            expected = vectors[f"f64/compose/t{temperature}/net{network}/{name}"]
            assert_close(value, expected, TOLERANCE[precision])
