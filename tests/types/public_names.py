# pyright: strict, reportUnnecessaryTypeIgnoreComment=true, reportMissingTypeStubs=false
"""The types of the public names: pyright checks this file, and nothing runs it.

Each `ignore` is a claim too: pyright reports one that has nothing to ignore.
"""

from collections.abc import Callable
from typing import Any, assert_type

import jax
import optax

from optax_lookahead import (
    DelayedOuterState,
    ExtrapolationState,
    InnerStep,
    LookaheadState,
    average_replicas,
    delayed_outer_loop,
    ema_nesterov,
    lookahead,
    outer_loop,
    primal_averaging,
    set_slow_params,
    slow_params,
    with_inner_state,
)

Transformation = optax.GradientTransformationExtraArgs


def constructors(inner: optax.GradientTransformation, k: jax.Array) -> None:
    assert_type(lookahead(inner), Transformation)
    assert_type(lookahead(inner, 5, 0.5), Transformation)
    assert_type(lookahead(inner, k, lambda count: 0.5), Transformation)
    assert_type(lookahead(inner, inner_state="interpolate"), Transformation)
    assert_type(lookahead(inner, slow_dtype="float32"), Transformation)
    outer = optax.chain(average_replicas("replica"), optax.sgd(0.7))
    assert_type(outer_loop(inner, outer, k=30), Transformation)
    assert_type(average_replicas(("replica", "pod")), Transformation)


def train_step(params: Any, state: Any, batch: Any) -> tuple[Any, Any, None]:
    del batch
    return params, state, None


def delayed(outer: optax.GradientTransformation, mix: jax.Array) -> None:
    init, cycle = delayed_outer_loop(train_step, outer, "replica", delay=5, mix=mix)
    state = init({"w": 0.0})
    assert_type(state, DelayedOuterState)
    assert_type(state.slow_params, optax.Params)
    assert_type(state.outer_state, optax.OptState)
    assert_type(cycle, Callable[..., tuple[Any, Any, DelayedOuterState, Any]])
    delayed_outer_loop(outer, outer, "replica", delay=5, mix=0.5)  # pyright: ignore[reportArgumentType]
    delayed_outer_loop(train_step, outer, "replica", 5, 0.5)  # pyright: ignore[reportCallIssue]


def averages(beta: jax.Array) -> None:
    assert_type(ema_nesterov(), optax.GradientTransformation)
    assert_type(ema_nesterov(beta, lambda t: 0.99), optax.GradientTransformation)
    assert_type(primal_averaging(0.9, 0.7), optax.GradientTransformation)
    assert_type(
        primal_averaging(accumulator_dtype="float32"), optax.GradientTransformation
    )
    ema_nesterov("0.3")  # pyright: ignore[reportArgumentType]
    primal_averaging(0.9, 0.7, "float32")  # pyright: ignore[reportCallIssue]


def their_state(opt_state: optax.OptState) -> None:
    assert isinstance(opt_state, ExtrapolationState)
    assert_type(opt_state.direction, optax.Updates)
    assert_type(opt_state.coefficient, jax.typing.ArrayLike)


def own_policy(state: optax.OptState, fresh: optax.OptState) -> optax.OptState:
    del fresh
    return state


def mistakes(inner: optax.GradientTransformation) -> None:
    lookahead(inner, inner_state="resett")  # pyright: ignore[reportArgumentType]
    lookahead(inner, alpha="half")  # pyright: ignore[reportArgumentType]
    lookahead(inner, 5, 0.5, "keep")  # pyright: ignore[reportCallIssue]
    average_replicas(0)  # pyright: ignore[reportArgumentType]
    outer_loop(inner, 5)  # pyright: ignore[reportCallIssue]
    lookahead(inner, inner_state=own_policy)


def state_and_query(params: optax.Params, opt_state: optax.OptState) -> None:
    assert_type(slow_params(opt_state, params), optax.Params)
    assert_type(set_slow_params(opt_state, params), Any)
    assert isinstance(opt_state, LookaheadState)
    tx = lookahead(optax.adam(0.1))
    assert_type(with_inner_state(tx, opt_state, opt_state.fast_state), LookaheadState)
    assert_type(opt_state.fast_state, optax.OptState)
    assert_type(opt_state.slow_params, optax.Params)
    assert_type(opt_state.sync_count, jax.typing.ArrayLike)


def outer_update(
    updates: optax.Updates,
    state: optax.OptState,
    params: optax.Params | None = None,
    *,
    inner_step: InnerStep,
    **extra_args: Any,
) -> tuple[optax.Updates, optax.OptState]:
    del params, extra_args
    assert_type(inner_step.grads, optax.Updates)
    assert_type(inner_step.state, optax.OptState)
    assert_type(inner_step.sync, jax.typing.ArrayLike)
    return updates, state
