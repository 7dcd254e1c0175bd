"""Supervised and response losses and their sums: equations (3), (10), (12) and (13).

Every function promotes to float32 at least, whatever the network computes in (float64 stays), and blocks
the gradient to the side that teaches. The relational terms (4)-(9) are in `dilbert_jax.relational`; (11) is (3) with
the network's own snapshot as teacher, summed over the task heads: `dilbert_jax.training.objectives.soften`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax


def as_loss_dtype(values: jax.Array) -> jax.Array:
    """Promotes to float32 at least; float64 stays.

    Args:
        values: array of any real type.

    Returns:
        The same values as float32, or float64 if they were.
    """
    return values.astype(jnp.promote_types(values.dtype, jnp.float32))


def masked_mean(
    values: jax.Array, mask: jax.Array | None = None, count: jax.Array | int | None = None
) -> jax.Array:
    """Mean of the valid values; exactly 0, with zero gradient, where none is valid.

    Args:
        values: [...], any shape. What stands at an invalid position is ignored, NaN included.
        mask: bool of the same shape, True = valid; None = all valid.
        count: what the sum is divided by, where these values are a part of all valid ones: the results of the parts
            then add up to the mean of all. None = the valid values at hand.

    Returns:
        Scalar, float32 at least.

    Raises:
        ValueError: the mask has another shape than the values.
    """
    values = as_loss_dtype(jnp.asarray(values))
    if mask is None:
        mask = jnp.ones(values.shape, bool)
    if mask.shape != values.shape:
        raise ValueError(
            f"mask has shape {mask.shape}, but the values have {values.shape}; they must be equal."
        )
    valid = mask.astype(bool)
    total = jnp.where(valid, values, 0).sum()
    return total / jnp.maximum(valid.sum() if count is None else count, 1).astype(values.dtype)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Cross-entropy with integer labels, equation (12), one value per example.

    Args:
        logits: [..., C].
        labels: integer [...], in [0, C).

    Returns:
        [...], in nats.

    Raises:
        ValueError: the leading shapes differ.
    """
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"labels have shape {labels.shape}, logits {logits.shape}; labels must be {logits.shape[:-1]}."
        )
    return optax.softmax_cross_entropy_with_integer_labels(as_loss_dtype(logits), labels)


def binary_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Sigmoid cross-entropy, one value per logit.

    Args:
        logits: [...].
        targets: [...], bool or in [0, 1]; no gradient reaches it.

    Returns:
        [...], in nats.

    Raises:
        ValueError: the shapes differ.
    """
    _check_same_shape("logits", logits, "targets", targets)
    targets = jax.lax.stop_gradient(as_loss_dtype(targets))
    return optax.sigmoid_binary_cross_entropy(as_loss_dtype(logits), targets)


def softmax_divergence(
    student_logits: jax.Array, teacher_logits: jax.Array, *, temperature: float = 1.0
) -> jax.Array:
    """KL(teacher || student) between softened softmax distributions, one value per example.

    Args:
        student_logits: [..., C].
        teacher_logits: [..., C]; no gradient reaches it.
        temperature: both logits are divided by it; > 0.

    Returns:
        [...], in nats, not multiplied by the squared temperature.

    Raises:
        ValueError: the shapes differ.
    """
    _check_same_shape("student_logits", student_logits, "teacher_logits", teacher_logits)
    student = jax.nn.log_softmax(as_loss_dtype(student_logits) / temperature)
    teacher = jax.nn.log_softmax(jax.lax.stop_gradient(as_loss_dtype(teacher_logits)) / temperature)
    probability = jnp.exp(teacher)
    # A class that the teacher excludes (logit -inf) contributes 0, the limit of p log p.
    difference = jnp.where(probability > 0, teacher - student, 0)
    return (probability * difference).sum(axis=-1)


def bernoulli_divergence(
    student_logits: jax.Array, teacher_logits: jax.Array, *, temperature: float = 1.0
) -> jax.Array:
    """KL(teacher || student) between softened sigmoid probabilities, one value per logit.

    Args:
        student_logits: [...].
        teacher_logits: [...]; no gradient reaches it.
        temperature: both logits are divided by it; > 0.

    Returns:
        [...], in nats, not multiplied by the squared temperature.

    Raises:
        ValueError: the shapes differ.
    """
    _check_same_shape("student_logits", student_logits, "teacher_logits", teacher_logits)
    student = as_loss_dtype(student_logits) / temperature
    teacher = jax.lax.stop_gradient(as_loss_dtype(teacher_logits)) / temperature
    present = jax.nn.log_sigmoid(teacher) - jax.nn.log_sigmoid(student)
    absent = jax.nn.log_sigmoid(-teacher) - jax.nn.log_sigmoid(-student)
    return jax.nn.sigmoid(teacher) * present + jax.nn.sigmoid(-teacher) * absent


def response_loss(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    *,
    temperature: float = 1.0,
    mask: jax.Array | None = None,
    count: jax.Array | int | None = None,
) -> jax.Array:
    """Response distillation of a multi-class head, equation (3): KL(teacher || student).

    Args:
        student_logits: [..., C].
        teacher_logits: [..., C], the peer's; no gradient reaches it.
        temperature: both logits are divided by it; > 0.
        mask: bool [...], True = valid; None = all valid.
        count: as in `masked_mean`.

    Returns:
        Scalar, mean over the valid positions (0 if there is none), not multiplied by the squared temperature.

    Raises:
        ValueError: shapes do not match.
    """
    divergence = softmax_divergence(student_logits, teacher_logits, temperature=temperature)
    return masked_mean(divergence, mask, count)


def binary_response_loss(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    *,
    temperature: float = 1.0,
    mask: jax.Array | None = None,
    count: jax.Array | int | None = None,
) -> jax.Array:
    """Response distillation of a multi-label head, equation (3) with one Bernoulli distribution a class.

    Args:
        student_logits: [..., C].
        teacher_logits: [..., C], the peer's; no gradient reaches it.
        temperature: both logits are divided by it; > 0.
        mask: bool [...], True = valid; None = all valid.
        count: as in `masked_mean`.

    Returns:
        Scalar: KL(teacher || student) averaged over the classes, then over the valid positions (0 if none).

    Raises:
        ValueError: shapes do not match.
    """
    divergence = bernoulli_divergence(student_logits, teacher_logits, temperature=temperature)
    return masked_mean(divergence.mean(axis=-1), mask, count)


def mutual_loss(relational: jax.Array, response: jax.Array, *, beta2: float = 1.0) -> jax.Array:
    """Mutual distillation loss, equation (10): relational + beta2 * response.

    Args:
        relational: scalar, equation (9).
        response: scalar, equation (3).
        beta2: weight of the response term.

    Returns:
        Scalar.
    """
    return relational + beta2 * response


def distillation_loss(
    supervised: jax.Array,
    mutual: jax.Array,
    self_distillation: jax.Array,
    *,
    alpha: float = 0.2,
    beta: float = 1.0,
    gamma: float = 0.6,
) -> jax.Array:
    """Total loss of a network, equation (13): alpha * supervised + beta * mutual + gamma * self_distillation.

    Args:
        supervised: scalar, equation (12).
        mutual: scalar, equation (10).
        self_distillation: scalar, equation (11).
        alpha: weight of the supervised term.
        beta: weight of the mutual term.
        gamma: weight of the self-distillation term.

    Returns:
        Scalar.
    """
    return alpha * supervised + beta * mutual + gamma * self_distillation


def noise_contrastive_loss(positive: jax.Array, negatives: jax.Array, valid: jax.Array) -> jax.Array:
    """-log of the positive's share among the exponentials of all scores, one value per example (CBT, HERO).

    Args:
        positive: [...], score of the right pair.
        negatives: [..., K], scores of wrong pairs.
        valid: bool [..., K], False = not counted.

    Returns:
        [...], in nats; 0 where there is no valid negative.
    """
    positive, negatives = as_loss_dtype(positive), as_loss_dtype(negatives)
    others = jnp.where(valid, negatives, -jnp.inf)
    return jax.nn.logsumexp(jnp.concatenate([positive[..., None], others], axis=-1), axis=-1) - positive


def hinge_loss(positive: jax.Array, negative: jax.Array, margin: float) -> jax.Array:
    """How far a wrong pair's score comes within `margin` of the right pair's: max(0, margin + negative - positive)."""
    return jnp.maximum(margin + as_loss_dtype(negative) - as_loss_dtype(positive), 0.0)


def _check_same_shape(first_name: str, first: jax.Array, second_name: str, second: jax.Array) -> None:
    if first.shape != second.shape:
        raise ValueError(
            f"{first_name} has shape {first.shape}, but {second_name} has {second.shape}; they must be equal."
        )
