"""Relational distillation: equations (4)-(9), in O(N^2) memory.

Both losses depend on the pooled vectors through the squared distances S only: a distance is sqrt(S_uv), and
by the law of cosines the angle at vertex v has

    cos(u, v, w) = (S_uv + S_wv - S_uw) / (2 sqrt(S_uv) sqrt(S_wv)).

S is summed from differences, not expanded into |u|^2 + |v|^2 - 2<u, v>, which would lose every digit of a
short edge. The angle loss walks over the vertices in blocks; where a gradient is wanted, the same walk
gathers dL/dS.

Axes: N samples, D width, V vertices of one block; u and w are the end points of the two edges that meet in v.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from dilbert_jax.losses import as_loss_dtype
from dilbert_jax.sharding import AXES, constrain, num_devices, platform

Reduction = Literal["mean", "mean_valid", "sum"]

# The reference code clamps squared distances here (not angles); the gradient below it is zero.
_SQUARED_DISTANCE_FLOOR = 1e-12
_TRIPLES_PER_BLOCK = 1 << 22
_DIFFERENCES_PER_BLOCK = 1 << 24


def huber(difference: jax.Array) -> jax.Array:
    """Huber loss with threshold 1, equation (6), element-wise.

    Args:
        difference: [...].

    Returns:
        [...]: half the square up to 1, linear beyond.
    """
    clipped = jnp.clip(difference, -1, 1)
    return clipped * (difference - 0.5 * clipped)


def distance_loss(student: jax.Array, teacher: jax.Array, *, reduction: Reduction = "mean") -> jax.Array:
    """Distance-wise relational loss, equations (4) and (5).

    Distances are divided by their mean over the pairs, in each network by its own; the gradient flows through
    the student's mean too.

    Args:
        student: [N, Ds], pooled vectors.
        teacher: [N, Dt], the peer's for the same samples; no gradient reaches it.
        reduction: `mean` over all N^2 pairs, `mean_valid` over those of distinct samples, `sum` of these.

    Returns:
        Scalar, float32 at least; 0 where N = 1.

    Raises:
        ValueError: shapes or reduction are not as above.
    """
    ours, theirs = _squared_distances_of_both(student, teacher, reduction)
    return _distance_loss(ours, theirs, reduction)


def angle_loss(
    student: jax.Array,
    teacher: jax.Array,
    *,
    reduction: Reduction = "mean",
    block_size: int | None = None,
) -> jax.Array:
    """Angle-wise relational loss, equations (7) and (8).

    An edge of length zero has no direction: its cosines are 0 and no gradient comes from them.

    Args:
        student: [N, Ds], pooled vectors.
        teacher: [N, Dt], the peer's for the same samples; no gradient reaches it.
        reduction: `mean` over all N^3 triples, `mean_valid` over those of distinct samples, `sum` of these.
        block_size: vertices handled at once; None = chosen by N. The value does not depend on it.

    Returns:
        Scalar, float32 at least; 0 where N = 1.

    Raises:
        ValueError: shapes, reduction or block size are not as above.
    """
    ours, theirs = _squared_distances_of_both(student, teacher, reduction)
    return _angle_loss(ours, theirs, reduction, block_size)


def relational_loss(
    student: jax.Array, teacher: jax.Array, *, beta1: float = 2.0, reduction: Reduction = "mean"
) -> jax.Array:
    """Relational loss, equation (9): distance loss + beta1 * angle loss.

    Args:
        student: [N, Ds], pooled vectors.
        teacher: [N, Dt], the peer's for the same samples; no gradient reaches it.
        beta1: weight of the angle loss.
        reduction: as in `distance_loss` and `angle_loss`.

    Returns:
        Scalar, float32 at least; 0 where N = 1.

    Raises:
        ValueError: shapes or reduction are not as above.
    """
    ours, theirs = _squared_distances_of_both(student, teacher, reduction)
    return _distance_loss(ours, theirs, reduction) + beta1 * _angle_loss(ours, theirs, reduction, None)


def _squared_distances_of_both(
    student: jax.Array, teacher: jax.Array, reduction: str
) -> tuple[jax.Array, jax.Array]:
    if student.ndim != 2 or teacher.ndim != 2 or student.shape[0] != teacher.shape[0] or not student.shape[0]:
        raise ValueError(
            f"student has shape {student.shape} and teacher {teacher.shape}; "
            "they must be [N, Ds] and [N, Dt] with the same N >= 1."
        )
    if reduction not in ("mean", "mean_valid", "sum"):
        raise ValueError(f"reduction is {reduction!r}; it must be 'mean', 'mean_valid' or 'sum'.")
    # Every device relates its samples to all others: it needs all vectors.
    student = constrain(as_loss_dtype(student))
    teacher = constrain(jax.lax.stop_gradient(as_loss_dtype(teacher)))
    dtype = jnp.promote_types(student.dtype, teacher.dtype)
    return _squared_distances(student.astype(dtype)), _squared_distances(teacher.astype(dtype))


def _share_out(rows):
    """[N, ...] -> [devices, ceil(N / devices), ...], padded with zeros: each device of the mesh takes its rows."""
    devices = num_devices()
    each = -(-len(rows) // devices)
    rows = jnp.pad(rows, ((0, devices * each - len(rows)), *[(0, 0)] * (rows.ndim - 1)))
    return constrain(rows.reshape(devices, each, *rows.shape[1:]), AXES)


def _gather(shares, number):
    """Inverse of `_share_out`: [devices, each, ...] -> [number, ...], whole on every device."""
    return constrain(shares.reshape(-1, *shares.shape[2:])[:number])


def _on_shares(function, *shares):
    """`function` of every device's share. One device gets no leading axis: XLA:CPU is ten times slower with it."""
    if len(shares[0]) > 1:
        return jax.vmap(function)(*shares)
    return jax.tree.map(lambda x: x[None], function(*(rows[0] for rows in shares)))


@jax.custom_vjp
def _squared_distances(vectors: jax.Array) -> jax.Array:
    """[N, D] -> [N, N], to the full relative precision of the type even for the shortest edge."""
    columns = vectors.T  # [D, N]: the sum runs over the leading axis, which vectorizes over samples.

    def from_one(sample):
        return jnp.square(columns - sample[:, None]).sum(axis=0)

    size = max(1, _DIFFERENCES_PER_BLOCK // vectors.size)
    shares = _share_out(vectors)
    size = min(size, shares.shape[1])
    distances = _on_shares(lambda rows: jax.lax.map(from_one, rows, batch_size=size), shares)
    return _gather(distances, len(vectors))


def _squared_distances_forward(vectors):
    return _squared_distances(vectors), vectors


def _squared_distances_backward(vectors, gradient):
    # d/dx_u = 2 sum_v (W_uv + W_vu) (x_u - x_v): from differences too, as W is largest where they are small.
    def add_one(total, inputs):
        sample, weight = inputs
        return total + weight[:, None] * (vectors - sample), None

    def add_share(samples, weights):
        return jax.lax.scan(add_one, jnp.zeros_like(vectors), (samples, weights))[0]

    weights = 2 * (gradient + gradient.T)
    return (constrain(_on_shares(add_share, _share_out(vectors), _share_out(weights)).sum(axis=0)),)


_squared_distances.defvjp(_squared_distances_forward, _squared_distances_backward)


def _normalized_distances(squared):
    """Distances over their mean over pairs; the diagonal is 0."""
    number = len(squared)
    off_diagonal = ~jnp.eye(number, dtype=bool)
    long_enough = off_diagonal & (squared > _SQUARED_DISTANCE_FLOOR)
    length = jnp.sqrt(jnp.where(long_enough, squared, _SQUARED_DISTANCE_FLOOR))
    length = jnp.where(off_diagonal, length, 0)
    mean = length.sum() / max(number * (number - 1), 1)
    return length / jnp.where(mean > 0, mean, 1)


def _distance_loss(student_squared, teacher_squared, reduction):
    number = len(student_squared)
    total = huber(_normalized_distances(student_squared) - _normalized_distances(teacher_squared)).sum()
    return total / {"mean": number**2, "mean_valid": max(number * (number - 1), 1), "sum": 1}[reduction]


def _angle_loss(student_squared, teacher_squared, reduction, block_size):
    number = len(student_squared)
    if block_size is None:
        block_size = _choose_block_size(number)
    elif block_size < 1:
        raise ValueError(f"block_size is {block_size}; it must be at least 1.")
    total = _angle_sum(student_squared, teacher_squared, min(block_size, number), reduction != "mean")
    valid = number * (number - 1) * (number - 2)
    # As floats: N^3 does not fit 32-bit integers from N = 1291 on.
    return total / {"mean": float(number**3), "mean_valid": float(max(valid, 1)), "sum": 1.0}[reduction]


def _choose_block_size(number):
    # On CPU one vertex keeps both cores busy and its arrays in cache; an accelerator wants many at once.
    if number <= 64:
        return number
    return 1 if platform() == "cpu" else max(1, _TRIPLES_PER_BLOCK // number**2)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _angle_sum(student_squared, teacher_squared, block_size, distinct):
    """Sum over all triples; `distinct` leaves out those with u = w (u = v and w = v are 0 by themselves)."""
    return _walk_vertices(student_squared, teacher_squared, block_size, distinct, with_gradient=False)[0]


def _angle_sum_forward(student_squared, teacher_squared, block_size, distinct):
    return _walk_vertices(student_squared, teacher_squared, block_size, distinct, with_gradient=True)


def _angle_sum_backward(block_size, distinct, gradient, cotangent):
    return cotangent * gradient, jnp.zeros_like(gradient)


_angle_sum.defvjp(_angle_sum_forward, _angle_sum_backward)


def _walk_vertices(student_squared, teacher_squared, block_size, distinct, with_gradient):
    """Sum of the Huber losses and its derivative by the student's squared distances, block by block."""
    number, dtype = len(student_squared), student_squared.dtype
    counted = ~jnp.eye(number, dtype=bool)

    def at_vertex(student_edges, student_inverse, teacher_edges, teacher_inverse):
        """All four [N]: the squared edges that meet in one vertex and one over their lengths."""
        cosine = _cosines(student_squared, student_edges, student_inverse)  # [N, N]
        difference = cosine - _cosines(teacher_squared, teacher_edges, teacher_inverse)
        if distinct:
            difference = jnp.where(counted, difference, 0)
        # Row sums first: a sum over the leading axis vectorizes, one over everything does not.
        loss = huber(difference).sum(axis=0)  # [N]
        if not with_gradient:
            return loss, None, None
        # With r = 1 / length: dcos/dS_uw = -1/2 r_u r_w, dcos/dS_uv = 1/2 r_u (r_w - cos r_u), for w alike.
        slope = jnp.clip(difference, -1, 1)
        opposite = -0.5 * slope * student_inverse[:, None] * student_inverse
        lever = jnp.dot(student_inverse, slope, precision=jax.lax.Precision.HIGHEST)
        adjacent = student_inverse * (lever - student_inverse * (slope * cosine).sum(axis=0))
        return loss, opposite, adjacent

    def step(carry, block):
        if len(block[0]) == 1:
            loss, opposite, adjacent = at_vertex(*(rows[0] for rows in block))
        else:
            loss, opposite, adjacent = jax.vmap(at_vertex)(*block)
            loss = loss.sum(axis=0)
            opposite = opposite.sum(axis=0) if with_gradient else None
        return (carry[0] + loss, carry[1] + opposite if with_gradient else None), adjacent

    def walk(*edges):
        """Sums over the vertices of one device; all edges [n, N]."""
        size = min(block_size, len(edges[0]))
        count = -(-len(edges[0]) // size)
        padding = ((0, count * size - len(edges[0])), (0, 0))
        blocks = [jnp.pad(rows, padding).reshape(count, size, number) for rows in edges]
        start = jnp.zeros(number, dtype), jnp.zeros_like(student_squared) if with_gradient else None
        if count == 1:
            (loss, opposite), adjacent = step(start, [rows[0] for rows in blocks])
        else:
            (loss, opposite), adjacent = jax.lax.scan(step, start, blocks)
        return loss, opposite, adjacent.reshape(-1, number)[: len(edges[0])] if with_gradient else None

    # Padding vertices, here and in `walk`, have edges of length zero and so add nothing.
    squared = student_squared, teacher_squared
    edges = [_share_out(rows) for matrix in squared for rows in (matrix, _inverse_lengths(matrix))]
    loss, opposite, adjacent = _on_shares(walk, *edges)
    if not with_gradient:
        return loss.sum(), None
    return loss.sum(), constrain(opposite.sum(axis=0)) + _gather(adjacent, number)


def _inverse_lengths(squared):
    positive = squared > 0
    return jnp.where(positive, 1 / jnp.sqrt(jnp.where(positive, squared, 1)), 0)


def _cosines(squared, edges, inverse):
    """Cosines [N, N] at one vertex with squared edges and inverse lengths [N]."""
    return (edges[:, None] + edges - squared) * (0.5 * inverse[:, None] * inverse)
