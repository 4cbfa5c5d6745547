"""The state, what an outer optimizer is given, and functions of arrays and trees."""

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
        parameters, and their dtypes or the wider `slow_dtype`; in host memory with
        `slow_memory_kind`. Read them with
        `optax_lookahead.slow_params`: at the start of a cycle the parameters themselves
        are the slow weights.
      steps_since_sync: Inner steps taken in this cycle, in `[0, k)`.
      sync_count: Completed cycles, saturating. Schedules for alpha are given it.
      outer_state: State of the outer optimizer; empty for `lookahead`.
      anchor: The inner state's moments at the last sync, a tuple of trees, under
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


class InnerStep(NamedTuple):
    """The inner step that ends a cycle, which an outer optimizer gets as `inner_step`.

    `outer_loop` passes it to the `update` of its outer optimizer, beside the
    pseudo-gradients and the slow weights. Trees are like the parameters.

    Attributes:
      grads: What the inner optimizer was given in the step that ends the cycle.
      updates: What it returned.
      state: Its state after that.
      sync: Whether the outer step is used; shape=(), dtype=bool. On other steps its
        result is dropped, and the pseudo-gradients are 1.
      finite: Where a fast weight is finite, or its slow weight is infinite by design,
        dtype=bool. A pseudo-gradient that is not finite is 0.

    Examples:
      An outer optimizer that takes no step if the last inner update was small:

      >>> import jax, jax.numpy as jnp, optax
      >>> from optax_lookahead import outer_loop
      >>> def update(pseudo_grads, state, params=None, *, inner_step, **extra_args):
      ...     far = optax.tree.norm(inner_step.updates) > 0.1
      ...     step = jax.tree.map(lambda g: jnp.where(far, -g, 0.0), pseudo_grads)
      ...     return step, state
      >>> outer = optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
      >>> tx = outer_loop(optax.sgd(0.1), outer, k=2)
      >>> w = jnp.array([4.0])
      >>> state = tx.init(w)
      >>> for _ in range(4):
      ...     updates, state = tx.update(w, state, w)
      ...     w = optax.apply_updates(w, updates)
      >>> print(f"{w[0]:.2f}")
      2.62
    """

    grads: optax.Updates
    updates: optax.Updates
    state: optax.OptState
    sync: jax.typing.ArrayLike
    finite: Any


InnerStep.__module__ = "optax_lookahead"


def select(condition: jax.typing.ArrayLike, new: Any, old: Any) -> Any:
    """Returns the tree `new` where the condition holds, in the dtypes of `old`."""

    def leaf(new: Any, old: Any) -> Any:
        if not jnp.issubdtype(jnp.result_type(old), jax.dtypes.prng_key):
            new = jnp.asarray(new, jnp.result_type(old))
        return jnp.where(condition, new, old)

    return jax.tree.map(leaf, new, old)


def copy(p: Any, dtype: jax.typing.DTypeLike | None = None) -> Any:
    """Returns a new array of `p`'s values, or a `ShapeDtypeStruct` if `p` is one.

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


def is_inexact(x: Any) -> bool:
    """Returns whether the dtype is floating or complex."""
    return jnp.issubdtype(jnp.result_type(x), jnp.inexact)


def common_dtype(x: Any, y: Any) -> Any:
    """Returns the common dtype; JAX does not promote floats of less than 16 bits."""
    x, y = jnp.result_type(x), jnp.result_type(y)
    if all(jnp.issubdtype(dtype, jnp.inexact) for dtype in (x, y)):
        if jnp.finfo(x).bits < 16:
            return y
        if jnp.finfo(y).bits < 16:
            return x
    return jnp.promote_types(x, y)


def is_finite(x: Any, like: Any = None) -> Any:
    """Returns which elements of x are finite, once stored in the dtype of `like`."""
    like = x if like is None else like
    if not (is_inexact(x) and is_inexact(like)):
        return True
    if jnp.iscomplexobj(x):
        return is_finite(x.real, like) & is_finite(x.imag, like)
    own, held = (jnp.finfo(jnp.result_type(y)) for y in (x, like))
    narrow = own if own.max <= held.max else held
    if narrow.bits >= 32:
        return jax.lax.is_finite(x)
    if narrow.bits < 16:  # some of these dtypes have no infinity
        return jnp.abs(jnp.asarray(x, jnp.float32)) <= float(narrow.max)
    # Rounded explicitly: a compiler may leave out the rounding of `astype`.
    return jax.lax.is_finite(jax.lax.reduce_precision(x, narrow.nexp, narrow.nmant))
