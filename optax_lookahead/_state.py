"""The state, and choosing between two of them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class LookaheadState(NamedTuple):
    """State of the transformations that `lookahead` and `outer_loop` return.

    The names of this type and of its fields are the checkpoint format.

    Attributes:
      fast_state: State of the inner optimizer.
      slow_params: The slow weights phi, with the tree, shapes and shardings of the
        parameters, and their dtypes or the wider `slow_dtype`. Read them with
        `optax_lookahead.slow_params`, which knows that at the start of a cycle the
        parameters themselves are the slow weights.
      steps_since_sync: Inner steps taken in this cycle, in `[0, k)`.
      sync_count: Completed cycles, saturating. A schedule for alpha sees this.
      outer_state: State of the outer optimizer; empty for `lookahead`.
      anchor: What the inner state's parameter-like leaves were at the last sync, under
        `inner_state="interpolate"`; empty otherwise.
    """

    fast_state: optax.OptState
    slow_params: optax.Params
    steps_since_sync: jax.typing.ArrayLike  # shape=(), dtype=int32
    sync_count: jax.typing.ArrayLike  # shape=(), dtype=int32
    outer_state: optax.OptState = optax.EmptyState()
    anchor: Any = optax.EmptyState()


# Pickles name the module, so they must not name a private one, which may move.
LookaheadState.__module__ = "optax_lookahead"


def select(condition: jax.typing.ArrayLike, new: Any, old: Any) -> Any:
    """Returns the tree `new` where the condition holds, in the dtypes of `old`."""

    def leaf(new, old):
        if not jnp.issubdtype(jnp.result_type(old), jax.dtypes.prng_key):
            new = jnp.asarray(new, jnp.result_type(old))
        return jnp.where(condition, new, old)

    return jax.tree.map(leaf, new, old)


def copy(p: Any, dtype: jax.typing.DTypeLike | None = None) -> Any:
    """Returns a new array of `p`'s values, or the shape of one if `p` is only that.

    `dtype` is for floating and complex leaves; a complex one takes its precision.
    """
    own = jnp.result_type(p)
    if dtype is None or not jnp.issubdtype(own, jnp.inexact):
        dtype = own
    elif jnp.issubdtype(own, jnp.complexfloating):
        dtype = jnp.promote_types(own, dtype)
    if isinstance(p, jax.ShapeDtypeStruct):
        return p.update(dtype=dtype)
    # A copy, so that parameters and state can be donated together, and an explicit
    # dtype, since a weakly typed state would be traced twice.
    return jnp.array(p, dtype=dtype, copy=True)


def is_wider(phi: Any, p: Any) -> bool:
    """Returns whether the slow weight has bits that the parameter cannot hold."""
    phi, p = jnp.result_type(phi), jnp.result_type(p)
    if phi == p or not jnp.issubdtype(p, jnp.inexact):
        return False
    return bool(jnp.finfo(phi).eps < jnp.finfo(p).eps)
