"""The state and the update: when to sync, and what a sync does."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ._validation import (
    check_alpha,
    check_inner,
    check_k,
    check_params,
    check_unstacked,
)


class LookaheadState(NamedTuple):
    """State of the transformation that `lookahead` returns.

    The names of this type and of its fields are the checkpoint format.

    Attributes:
      fast_state: State of the inner optimizer.
      slow_params: The slow weights phi, with the tree, shapes, dtypes and shardings
        of the parameters. Read them with `optax_lookahead.slow_params`, which knows
        that at the start of a cycle the parameters themselves are the slow weights.
      steps_since_sync: Inner steps taken in this cycle, in `[0, k)`.
      sync_count: Completed cycles, saturating. A schedule for alpha sees this.
    """

    fast_state: optax.OptState
    slow_params: optax.Params
    steps_since_sync: jax.typing.ArrayLike  # shape=(), dtype=int32
    sync_count: jax.typing.ArrayLike  # shape=(), dtype=int32


def lookahead(
    inner: optax.GradientTransformation,
    k: jax.typing.ArrayLike = 5,
    alpha: optax.ScalarOrSchedule = 0.5,
) -> optax.GradientTransformationExtraArgs:
    """Lookahead around any optimizer: k steps forward, one step back.

    The parameters of the training loop are the fast weights theta; the state carries
    the slow weights phi. Every update takes one step of `inner`; every k-th one also
    moves the slow weights towards the fast ones, which restart from there::

        theta_{t,0} = phi_{t-1}
        theta_{t,i} = theta_{t,i-1} + inner(...)                    i = 1, ..., k
        phi_t       = phi_{t-1} + alpha * (theta_{t,k} - phi_{t-1})

    A cycle starts from the parameters that the first of its updates is given, so
    weights that were loaded, clipped or projected outside the optimizer count. After
    a sync, `slow_params` in the state equals the new parameters bit for bit.

    Args:
      inner: The optimizer that takes the fast steps. Extra arguments of `update` are
        forwarded to it.
      k: Inner steps in a cycle, an integer of at least 1. Also an int32 scalar array
        or tracer, whose value is not checked: below 1, every step syncs.
      alpha: Slow step size in [0, 1], without unit. Also a float scalar array or
        tracer, whose value is not checked, or a schedule: a function from the number
        of completed syncs (int32 scalar) to the step size.

    Returns:
      A `GradientTransformationExtraArgs` whose state is a `LookaheadState`. Its
      `update` needs `params`, a tree of arrays of any shapes and dtypes, and returns
      updates in the dtypes of `inner`'s. A leaf that is neither floating nor complex
      has nothing between two values: it takes the inner step, and its slow copy
      follows at the sync.

    Raises:
      TypeError: If `inner` is no gradient transformation, a static `k` no integer, or
        a static `alpha` no real number.
      ValueError: If a static `k` is below 1, a static `alpha` is outside [0, 1], or
        either is an array that is not a scalar. `update` raises it without `params`,
        or with `params` that are unlike those that `init` saw.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from optax_lookahead import lookahead
      >>> loss = lambda w: jnp.sum((w - 3.0) ** 2)
      >>> tx = lookahead(optax.sgd(0.1), k=5, alpha=0.5)
      >>> w = jnp.array([0.0, 1.0])
      >>> state = tx.init(w)
      >>> for step in range(1, 16):
      ...     updates, state = tx.update(jax.grad(loss)(w), state, w)
      ...     w = optax.apply_updates(w, updates)
      ...     if step % 5 == 0:
      ...         print(f"{step:2d} {loss(w):.4f}")
       5 5.7289
      10 2.5246
      15 1.1126

    References:
      Zhang, Lucas, Hinton, Ba, `Lookahead Optimizer: k steps forward, 1 step back
      <https://arxiv.org/abs/1907.08610>`_, 2019, Algorithm 1.
    """
    check_inner(inner)
    check_k(k)
    check_alpha(alpha)
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: optax.Params) -> LookaheadState:
        return LookaheadState(
            fast_state=inner.init(params),
            slow_params=jax.tree.map(_copy, params),
            steps_since_sync=jnp.zeros([], jnp.int32),
            sync_count=jnp.zeros([], jnp.int32),
        )

    def update_fn(
        updates: optax.Updates,
        state: LookaheadState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, LookaheadState]:
        check_params(params, state.slow_params)
        check_unstacked(state.steps_since_sync)

        updates, fast_state = inner.update(
            updates, state.fast_state, params, **extra_args
        )
        start = state.steps_since_sync == 0
        steps = state.steps_since_sync + 1
        # Not `==`: a k lowered in mid-cycle must still sync.
        sync = steps >= jnp.asarray(k, jnp.int32)
        step_size = alpha(state.sync_count) if callable(alpha) else alpha

        leaves, treedef = jax.tree.flatten(params)
        pairs = [
            _lookahead_leaf(u, p, phi, start, sync, step_size)
            for u, p, phi in zip(
                # Up to the leaves of `params`, since an update may be None.
                treedef.flatten_up_to(updates),
                leaves,
                treedef.flatten_up_to(state.slow_params),
                strict=True,
            )
        ]
        updates = treedef.unflatten([u for u, _ in pairs])
        slow_params = treedef.unflatten([phi for _, phi in pairs])
        return updates, LookaheadState(
            fast_state=fast_state,
            slow_params=slow_params,
            steps_since_sync=jnp.where(sync, 0, steps),
            sync_count=jnp.where(
                sync, optax.safe_increment(state.sync_count), state.sync_count
            ),
        )

    # Optax types every state as `OptState`, which no NamedTuple is a supertype of.
    return optax.GradientTransformationExtraArgs(
        init_fn,
        update_fn,  # pyright: ignore[reportArgumentType]
    )


def _copy(p: jax.typing.ArrayLike) -> jax.typing.ArrayLike:
    if isinstance(p, jax.ShapeDtypeStruct):
        return p
    # A copy, so that parameters and state can be donated together, and an explicit
    # dtype, since a weakly typed state would be traced twice.
    return jnp.array(p, dtype=jnp.result_type(p), copy=True)


def phi_of_cycle(start, p, phi):
    """Returns the slow weight that the cycle set out from."""
    # Not the state's alone: since the last sync the loop may have loaded, clipped or
    # projected its parameters, and what it holds is what a cycle starts from.
    return jnp.where(start, jnp.asarray(p, phi.dtype), phi)


def _lookahead_leaf(u, p, phi, start, sync, alpha):
    """Returns the update and the slow weight of one parameter."""
    phi = phi_of_cycle(start, p, phi)
    if u is None:  # Equinox's way of saying that this parameter stays.
        return None, jnp.where(sync, jnp.asarray(p, phi.dtype), phi)
    if jnp.issubdtype(phi.dtype, jnp.inexact):
        pull = p + u - phi
        pull = jnp.asarray(1 - alpha, pull.dtype) * pull
        # Not `phi + alpha * (p + u - phi) - p`: this form is exact at alpha = 1. And
        # not `u - sync * pull`: on other steps u must pass next to inf and NaN.
        u = jnp.where(sync, u - pull, u).astype(jnp.result_type(u))
    # From the new update, so that the compiler can write updates and slow weights in
    # place, one after the other; and added as the loop adds it, so that both agree in
    # every bit. Two `where`s of old values would cost a copy of the parameters.
    stepped = jnp.asarray(optax.apply_updates(p, u), phi.dtype)
    return u, jnp.where(sync, stepped, phi)
