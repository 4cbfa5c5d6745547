"""The outer optimizer's step, in a form that the compiler can write in place."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from ._state import select
from ._validation import check_outer_result


def step_if(
    condition: jax.typing.ArrayLike,
    update: Callable[[Any], tuple[Any, Any]],
    state: Any,
) -> tuple[Any, Any]:
    """Returns what `update(state)` does, with the old state unless `condition` holds.

    The step, the first of the two results, is meant for where the condition holds.

    Selecting afterwards would give both results a claim on the old state: the new one
    falls back on it, the step is made from it. Only one of them can be written over
    it, and the compiler copies the parameters' worth of it for the other. So the
    selection happens where the new state arises, and what `update` makes of the new
    state from there on, it makes of the selected one: where it counts, the same.
    """
    closed, shapes = jax.make_jaxpr(update, return_shape=True)(state)
    check_outer_result("a state", shapes[1], state)
    jaxpr, old = closed.jaxpr, jax.tree.leaves(state)
    outputs = jaxpr.outvars[len(jaxpr.outvars) - len(old) :]
    # Not what comes in, such as parameters that the new state remembers, or an old
    # leaf in another place.
    made = {var for equation in jaxpr.eqns for var in equation.outvars}
    arises = {
        var: x
        for var, x in zip(outputs, old, strict=True)
        # Of another dtype it would not fit the equations that follow.
        if not isinstance(var, Literal)
        and var in made
        and var.aval.dtype == jnp.result_type(x)
    }
    values = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    values |= zip(jaxpr.invars, old, strict=True)

    def read(var):
        return var.val if isinstance(var, Literal) else values[var]

    for equation in jaxpr.eqns:
        primitive = equation.primitive
        params = primitive.get_bind_params(equation.params)
        # A pair until jax 0.10, which put the functions among the parameters.
        functions, params = params if isinstance(params, tuple) else ((), params)
        # The context holds what the parameters don't, such as the kind of random bits.
        with equation.ctx.manager:
            results = primitive.bind(*functions, *map(read, equation.invars), **params)
        if not primitive.multiple_results:
            results = [results]
        for var, x in zip(equation.outvars, results, strict=True):
            values[var] = jnp.where(condition, x, arises[var]) if var in arises else x

    def leaf(var, o):
        # No literal is hashable. What is two leaves has the old value of one of them.
        if not isinstance(var, Literal) and arises.get(var) is o:
            return values[var]
        return select(condition, read(var), o)

    step, _ = jax.tree.unflatten(jax.tree.structure(shapes), map(read, jaxpr.outvars))
    return step, jax.tree.unflatten(jax.tree.structure(state), map(leaf, outputs, old))
