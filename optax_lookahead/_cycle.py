"""The update: a step of the inner optimizer, and at the end of a cycle a sync."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from . import _inner_state
from ._agreement import check_arrays, check_params, check_unstacked
from ._compiler import start_after_moments
from ._slow_step import SlowStep
from ._slow_weights import set_out
from ._state import InnerStep, LookaheadState, copy
from ._validation import check_k, check_slow_dtype, check_transformation, check_wide


def cycles(
    inner: optax.GradientTransformation,
    slow_step: SlowStep,
    k: jax.typing.ArrayLike,
    inner_state: _inner_state.InnerState,
    slow_dtype: jax.typing.DTypeLike | None,
) -> optax.GradientTransformationExtraArgs:
    """Returns the transformation that takes `slow_step` after every k inner steps."""
    check_transformation("inner", inner)
    check_k(k)
    inner = optax.with_extra_args_support(inner)
    policy = _inner_state.policy(inner_state, inner)
    it = _Cycles(inner, slow_step, k, policy, check_slow_dtype(slow_dtype))
    # Optax types every state as `OptState`, which no NamedTuple is a supertype of.
    return optax.GradientTransformationExtraArgs(
        it.init,
        it.update,  # pyright: ignore[reportArgumentType]
    )


@dataclasses.dataclass(frozen=True)
class _Cycles:
    inner: optax.GradientTransformationExtraArgs
    slow_step: SlowStep
    k: jax.typing.ArrayLike
    policy: _inner_state.Policy
    slow_dtype: Any

    def init(self, params: optax.Params) -> LookaheadState:
        check_arrays(params)
        check_wide(self.slow_dtype, params)
        slow_params = jax.tree.map(lambda p: copy(p, self.slow_dtype), params)
        fast_state = self.inner.init(params)
        return LookaheadState(
            fast_state=fast_state,
            slow_params=slow_params,
            steps_since_sync=jnp.zeros([], jnp.int32),
            sync_count=jnp.zeros([], jnp.int32),
            outer_state=self.slow_step.init(slow_params),
            anchor=self.policy.init(fast_state),
        )

    def update(
        self,
        updates: optax.Updates,
        state: LookaheadState,
        params: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, LookaheadState]:
        check_params(params, state.slow_params)
        check_unstacked(state.steps_since_sync)
        inner_args, outer_args = self.slow_step.split(extra_args)
        grads = updates

        # 1. One step of the inner optimizer.
        inner_updates, fast_state = self.inner.update(
            grads, state.fast_state, params, **inner_args
        )

        # 2. Where in its cycle is it?
        start = jnp.equal(state.steps_since_sync, 0)
        steps = state.steps_since_sync + 1
        # Not `==`: a k lowered in mid-cycle must still sync.
        sync = steps >= _as_int32(self.k)

        # 3. What the cycle set out from, and the way back there.
        starts = start_after_moments(start, params, fast_state, state.fast_state)
        ways = jax.tree.map(set_out, params, starts, inner_updates, state.slow_params)

        # 4. THE SYNC: a slow step, and landing on it.
        finite = jax.tree.map(lambda way: way.finite, ways)
        inner_step = InnerStep(grads, inner_updates, fast_state, sync, finite)
        slow_updates, outer_state = self.slow_step.step(
            state, ways, inner_step, outer_args
        )
        landings = jax.tree.map(
            lambda way, slow_update: way.land(sync, slow_update), ways, slow_updates
        )
        final_updates = jax.tree.map(lambda landing: landing.update, landings)
        slow_params = jax.tree.map(lambda landing: landing.slow, landings)

        # 5. What that means for the inner state.
        fast_state, anchor = self.policy.at_sync(
            sync, fast_state, state.anchor, slow_updates, params, slow_params
        )
        fast_state = _inner_state.void_caches(sync, fast_state)

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


def _as_int32(k: jax.typing.ArrayLike) -> jax.Array:
    """Returns the period, where one that no int32 holds is beyond every step."""
    k = jnp.asarray(k)
    if jnp.issubdtype(k.dtype, jnp.floating):
        # The largest float32 that an int32 holds.
        k = jnp.minimum(k.astype(jnp.float32), 2.0**31 - 2.0**7)
    elif jnp.issubdtype(k.dtype, jnp.integer) and jnp.iinfo(k.dtype).bits >= 32:
        k = jnp.minimum(k, jnp.iinfo(jnp.int32).max)
    return k.astype(jnp.int32)
