"""The update: a step of the inner optimizer, and at the end of a cycle a sync."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from . import _inner_state
from ._checks import (
    check_dtype,
    check_init,
    check_k,
    check_slow_memory,
    check_slow_memory_kind,
    check_transformation,
    check_update,
    checked_schedule,
)
from ._slow_memory import SlowMemoryKind, memory as slow_memory
from ._slow_step import init_outer, outer_step, split_args
from ._slow_weights import (
    add_slow_update,
    cycle_start,
    interpolate,
    is_intact,
    pseudo_gradient,
)
from ._state import InnerStep, LookaheadState, copy, is_finite


def cycles(
    inner: optax.GradientTransformation,
    k: jax.typing.ArrayLike,
    inner_state: _inner_state.InnerState,
    slow_dtype: jax.typing.DTypeLike | None,
    slow_memory_kind: SlowMemoryKind | None,
    *,
    alpha: optax.ScalarOrSchedule | None = None,
    outer: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Returns `lookahead` with `alpha`, or `outer_loop` with `outer`."""
    check_transformation("inner", inner, "lookahead(optax.adam(1e-3))")
    check_k(k)
    alpha = checked_schedule("alpha", alpha)
    slow_dtype = check_dtype("slow_dtype", slow_dtype)
    check_slow_memory_kind(slow_memory_kind)
    memory = slow_memory(slow_memory_kind)
    inner = optax.with_extra_args_support(inner)
    outer = None if outer is None else optax.with_extra_args_support(outer)
    policy = _inner_state.policy(inner_state, inner)

    def init_fn(params: optax.Params) -> LookaheadState:
        check_init(params, slow_dtype)
        slow_params = jax.tree.map(lambda p: copy(p, slow_dtype), params)
        fast_state = inner.init(params)
        outer_state = optax.EmptyState()
        if outer is not None:
            outer_state = init_outer(outer, slow_params)
        check_slow_memory(slow_params, slow_memory_kind)
        slow_params = jax.tree.map(memory.init, slow_params)
        return LookaheadState(
            fast_state=fast_state,
            slow_params=slow_params,
            steps_since_sync=jnp.zeros([], jnp.int32),
            sync_count=jnp.zeros([], jnp.int32),
            outer_state=outer_state,
            anchor=policy.init(fast_state),
        )

    def update_fn(
        updates: optax.Updates,
        state: LookaheadState,
        params: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, LookaheadState]:
        check_update(params, state, slow_dtype)
        inner_args, outer_args = extra_args, {}
        if outer is not None:
            inner_args, outer_args = split_args(extra_args)

        # 1. One step of the inner optimizer.
        grads = updates
        inner_updates, fast_state = inner.update(
            grads, state.fast_state, params, **inner_args
        )

        # 2. Does it start a cycle, does it end one?
        start = jnp.equal(state.steps_since_sync, 0)
        steps = state.steps_since_sync + 1
        # Not `==`: a cycle must also end if k is lowered within it.
        sync = steps >= _as_int32(k)

        # 3. THE SYNC: a slow step from phi, where the cycle started, and an update that
        # sets the parameters to the same values.
        if outer is None:
            alpha_now = alpha(state.sync_count) if callable(alpha) else alpha
            outer_state = state.outer_state

            def slow_step(p: Any, u: Any, slow: Any) -> tuple[Any, Any]:
                return interpolate(sync, alpha_now, p, u, cycle_start(start, p, slow))

            synced = jax.tree.map(
                memory.update(slow_step, start, sync),
                params,
                inner_updates,
                state.slow_params,
            )
            slow_params = jax.tree.map(lambda _, leaf: leaf[1], params, synced)

            def synced_params() -> Any:
                read = memory.read(lambda _, slow: slow, sync)
                return jax.tree.map(read, params, slow_params)

        else:
            alpha_now = None
            phi = jax.tree.map(
                memory.read(partial(cycle_start, start), start, sync),
                params,
                state.slow_params,
                inner_updates,
            )
            pseudo_grads = jax.tree.map(pseudo_gradient, params, inner_updates, phi)
            finite = jax.tree.map(is_finite, pseudo_grads)
            pseudo_grads = jax.tree.map(
                lambda g, ok: jnp.where(ok, g, jnp.zeros_like(g)), pseudo_grads, finite
            )
            intact = jax.tree.map(is_intact, phi, finite)
            inner_step = InnerStep(grads, inner_updates, fast_state, sync, intact)
            slow_updates, outer_state = outer_step(
                outer, pseudo_grads, phi, state, inner_step, outer_args
            )
            synced = jax.tree.map(
                partial(add_slow_update, sync),
                params,
                inner_updates,
                phi,
                pseudo_grads,
                finite,
                slow_updates,
            )
            on_device = jax.tree.map(lambda _, leaf: leaf[1], params, synced)
            slow_params = jax.tree.map(
                memory.write(start, sync), on_device, state.slow_params
            )

            def synced_params() -> Any:
                return on_device

        final_updates = jax.tree.map(lambda _, leaf: leaf[0], params, synced)

        # 4. What the sync does to the inner state.
        fast_state, anchor = policy.at_sync(
            sync, alpha_now, fast_state, state.anchor, params, synced_params
        )
        fast_state = _inner_state.invalidate_linesearch_values(sync, fast_state)

        return final_updates, LookaheadState(
            fast_state=fast_state,
            slow_params=slow_params,
            steps_since_sync=jnp.where(sync, 0, steps),
            sync_count=jnp.where(
                sync, optax.safe_increment(state.sync_count), state.sync_count
            ),
            outer_state=outer_state,
            anchor=anchor,
        )

    # Optax types every state as `OptState`, of which this one is only a subtype.
    return optax.GradientTransformationExtraArgs(
        init_fn,
        update_fn,  # pyright: ignore[reportArgumentType]
    )


def _as_int32(k: jax.typing.ArrayLike) -> jax.Array:
    """Returns k as int32; a k beyond int32 becomes the largest, which never syncs."""
    k = jnp.asarray(k)
    if jnp.issubdtype(k.dtype, jnp.floating):
        # The largest float32 below 2**31.
        k = jnp.minimum(k.astype(jnp.float32), 2.0**31 - 2.0**7)
    elif jnp.issubdtype(k.dtype, jnp.integer) and jnp.iinfo(k.dtype).bits >= 32:
        k = jnp.minimum(k, jnp.iinfo(jnp.int32).max)
    return k.astype(jnp.int32)
