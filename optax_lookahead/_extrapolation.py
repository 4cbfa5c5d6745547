"""Optimizers whose parameters are extrapolated from the weights to evaluate.

The parameters of the loop, y, are w + coefficient * direction, where w are the weights
to evaluate. Only the direction is stored: the new direction and the step of y follow
from it and from the inner update u that was computed at y.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ._checks import (
    check_dtype,
    check_init,
    check_unstacked,
    describe_path,
    describe_state,
)
from ._state import common_dtype, copy, is_inexact


class ExtrapolationState(NamedTuple):
    """State of the transformations `ema_nesterov` and `primal_averaging`.

    The weights to evaluate are `params - coefficient * direction`; read them with
    `optax_lookahead.slow_params`, at any depth in chains and wrappers. The names of
    this type and of its fields are the checkpoint format.

    Attributes:
      step_count: Updates so far, saturating. Schedules are given this number.
      direction: Tree like the parameters, of their shapes and of their dtypes or
        `accumulator_dtype`; `optax.MaskedNode` where a leaf is not floating or complex.
      coefficient: Factor of the direction in the parameters, dimensionless.
    """

    step_count: jax.typing.ArrayLike  # shape=(), dtype=int32
    direction: optax.Updates
    coefficient: jax.typing.ArrayLike  # shape=(), dtype=float


# Pickles name the module, so they must not name a private one, which may move.
ExtrapolationState.__module__ = "optax_lookahead"


def extrapolation(
    new_direction: Callable[[Any, Any, Any, Any], Any],
    step: Callable[[Any, Any, Any, Any, Any], Any],
    decay: optax.ScalarOrSchedule,
    coefficient: optax.ScalarOrSchedule,
    accumulator_dtype: jax.typing.DTypeLike | None,
) -> optax.GradientTransformation:
    """Returns the transformation that these two functions define, leaf by leaf.

    `new_direction(u, d, c, decay)` returns the direction after the step, where d and c
    are direction and coefficient before it, and `step(u, d, c, new_d, new_c)` returns
    the update of the parameters.
    """
    accumulator_dtype = check_dtype("accumulator_dtype", accumulator_dtype)

    def at(value: optax.ScalarOrSchedule, count: Any) -> jax.Array:
        # A copy, since the state may be donated.
        now = value(count) if callable(value) else value
        return jnp.array(now, dtype=jnp.result_type(float), copy=True)

    def init_fn(params: optax.Params) -> ExtrapolationState:
        check_init(params, None)

        def zeros(p: Any) -> Any:
            if not is_inexact(p):
                return optax.MaskedNode()
            return jnp.zeros_like(copy(p, accumulator_dtype))

        count = jnp.zeros([], jnp.int32)
        direction = jax.tree.map(zeros, params)
        return ExtrapolationState(count, direction, at(coefficient, count))

    def update_fn(
        updates: optax.Updates, state: ExtrapolationState, params: Any = None
    ) -> tuple[optax.Updates, ExtrapolationState]:
        del params
        _check_update(updates, state)
        count = optax.safe_increment(state.step_count)
        # The next gradient is taken at the new parameters, in the next step.
        new_coefficient = at(coefficient, count)
        scalars = state.coefficient, new_coefficient, at(decay, state.step_count)

        def leaf(u: Any, d: Any) -> tuple[Any, Any]:
            if u is None or isinstance(d, optax.MaskedNode):  # frozen, or discrete
                return u, d
            dtype = _wide(u, d)
            c, new_c, decayed = (jnp.asarray(x, dtype) for x in scalars)
            u_wide, d_wide = jnp.asarray(u, dtype), jnp.asarray(d, dtype)
            new_d = jnp.asarray(new_direction(u_wide, d_wide, c, decayed), d.dtype)
            # From the new direction as stored, so that its rounding changes y only.
            moved = step(u_wide, d_wide, c, jnp.asarray(new_d, dtype), new_c)
            return jnp.asarray(moved, jnp.result_type(u)), new_d

        def is_none(x: Any) -> bool:
            return x is None

        pairs = jax.tree.map(leaf, updates, state.direction, is_leaf=is_none)
        new_updates, direction = (
            jax.tree.map(lambda _, pair, i=i: pair[i], updates, pairs, is_leaf=is_none)
            for i in range(2)
        )
        return new_updates, ExtrapolationState(count, direction, new_coefficient)

    # Optax types every state as `OptState`, of which this one is only a subtype.
    return optax.GradientTransformation(
        init_fn,
        update_fn,  # pyright: ignore[reportArgumentType]
    )


def _check_update(updates: Any, state: Any) -> None:
    """Raises unless `state` is one state, of updates with these shapes."""
    if not isinstance(state, ExtrapolationState):
        raise TypeError(
            "`state` must be an `ExtrapolationState` of `optax_lookahead`, got a "
            f"{describe_state(state)}. Pass what `init` or `update` of this "
            "transformation returned."
        )
    check_unstacked(state.coefficient, "coefficient")
    by_path = dict(jax.tree.leaves_with_path(updates))
    for path, d in jax.tree.leaves_with_path(state.direction):
        got = jnp.shape(by_path.get(path, d))  # an update of None is no leaf
        if got != jnp.shape(d):
            raise ValueError(
                "`updates` must have the shapes of the parameters that `init` saw, got "
                f"{got} at {describe_path(path)}, where the state has {jnp.shape(d)}. "
                "Pass the gradients of these parameters."
            )


def evaluation_point(y: Any, coefficient: Any, d: Any) -> Any:
    """Returns w, in the wider of the dtypes of y and of the direction d."""
    held, dtype = common_dtype(y, d), _wide(y, d)
    y, coefficient, d = (jnp.asarray(x, dtype) for x in (y, coefficient, d))
    return jnp.asarray(y - coefficient * d, held)


def _wide(x: Any, y: Any) -> Any:
    """Returns the common dtype, at least float32: in bfloat16 1 - 0.99 is 0.0117."""
    return common_dtype(common_dtype(x, y), jnp.float32)
