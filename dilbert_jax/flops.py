"""Counts the floating-point operations that a function's matrix products and convolutions need."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Literal


def count_flops(function: Callable[..., Any], *arguments: Any) -> int:
    """Multiplications and additions of all matrix products and convolutions, two a pair of factors.

    The count is of the function as written, whatever a compiler makes of it; everything element-wise is left out, as
    usual for model FLOPs. Of a choice between platforms the costliest counts, of a loop without a known number of
    rounds one round.

    Args:
      function: is traced, not run.
      *arguments: arrays or `jax.ShapeDtypeStruct`.
    """
    return _of_jaxpr(jax.make_jaxpr(function)(*arguments).jaxpr)


def count_parameters(params: Any) -> int:
    """How many numbers a tree of arrays or `jax.ShapeDtypeStruct` holds."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def _of_jaxpr(jaxpr: Any) -> int:
    """Of the equations that the results depend on: a derivative brings along a forward pass that nothing needs."""
    needed, total = {v for v in jaxpr.outvars if not isinstance(v, Literal)}, 0
    for equation in reversed(jaxpr.eqns):
        if needed.intersection(equation.outvars):
            needed.update(v for v in equation.invars if not isinstance(v, Literal))
            total += _of_equation(equation)
    return total


def _of_equation(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return 2 * equation.outvars[0].aval.size * math.prod(left[i] for i in contracted)
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        _, inputs, *space = params["dimension_numbers"].rhs_spec
        window = math.prod(kernel[i] for i in space) * kernel[inputs]
        return 2 * equation.outvars[0].aval.size * window // params["batch_group_count"]
    inner = [_of_jaxpr(sub) for value in params.values() for sub in _jaxprs(value)]
    if name == "cond":
        return max(inner)
    return sum(inner) * (params["length"] if name == "scan" else 1)


def _jaxprs(value: Any) -> list[Any]:
    if isinstance(value, (tuple, list)):
        return [jaxpr for item in value for jaxpr in _jaxprs(item)]
    value = getattr(value, "jaxpr", value)
    return [value] if hasattr(value, "eqns") else []
