"""Optimizers whose parameters stand off the weights to evaluate, by one direction.

y, the parameters of the loop, is w + coefficient * direction, and w are the weights to
evaluate. The direction is all that has to be kept: with u the inner update that was
computed at y, the new direction and the step of y follow from it and from u alone.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ._state import common_dtype, copy, is_inexact


class ExtrapolationState(NamedTuple):
    """State of the transformations `ema_nesterov` and `primal_averaging`.

    The weights to evaluate are `params - coefficient * direction`; read them with
    `optax_lookahead.slow_params`, at any depth of a chain or a wrapper. The names of
    this type and of its fields are the checkpoint format.

    Attributes:
      step_count: Updates so far, saturating. Schedules see it.
      direction: Tree like the parameters, of their shapes and of their dtypes or
        `accumulator_dtype`; `optax.MaskedNode` where a leaf is not floating or complex.
      coefficient: How far the parameters are along it, without unit.
    """

    step_count: jax.typing.ArrayLike  # shape=(), dtype=int32
    direction: optax.Updates
    coefficient: jax.typing.ArrayLike  # shape=(), dtype=float


# Pickles name the module, so they must not name a private one, which may move.
ExtrapolationState.__module__ = "optax_lookahead"


def extrapolation(
    turn: Callable[[Any, Any, Any, Any], Any],
    step: Callable[[Any, Any, Any, Any, Any], Any],
    decay: optax.ScalarOrSchedule,
    coefficient: optax.ScalarOrSchedule,
    accumulator_dtype: jax.typing.DTypeLike | None,
) -> optax.GradientTransformation:
    """Returns the transformation with this new direction and this step, leaf by leaf.

    `turn(u, d, c, decay)` returns the new direction, with c the coefficient before, and
    `step(u, d, c, new_d, new_c)` the step of the parameters.
    """

    def at(value: optax.ScalarOrSchedule, count: Any) -> jax.Array:
        # A copy, since what is in a state may be donated.
        now = value(count) if callable(value) else value
        return jnp.array(now, dtype=jnp.result_type(float), copy=True)

    def init_fn(params: optax.Params) -> ExtrapolationState:
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
            new_d = jnp.asarray(turn(u_wide, d_wide, c, decayed), d.dtype)
            # From the new direction as it is kept, so that its rounding moves only y.
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

    # Optax types every state as `OptState`, which no NamedTuple is a supertype of.
    return optax.GradientTransformation(
        init_fn,
        update_fn,  # pyright: ignore[reportArgumentType]
    )


def evaluation_point(y: Any, coefficient: Any, d: Any) -> Any:
    """Returns w, in the wider of the dtypes of y and of the direction d."""
    held, dtype = common_dtype(y, d), _wide(y, d)
    y, coefficient, d = (jnp.asarray(x, dtype) for x in (y, coefficient, d))
    return jnp.asarray(y - coefficient * d, held)


def _wide(x: Any, y: Any) -> Any:
    """Returns the dtype for both, at least float32: 1 - 0.99 is 0.0117 in bfloat16."""
    return common_dtype(common_dtype(x, y), jnp.float32)
