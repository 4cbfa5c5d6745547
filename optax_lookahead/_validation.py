"""What the public functions refuse, and in which words."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

KeyPath = tuple[Any, ...]  # as `jax.tree.leaves_with_path` makes them


def check_transformation(name: str, value: Any) -> None:
    """Raises unless `value` is an Optax gradient transformation."""
    if isinstance(value, optax.GradientTransformation):
        return
    if isinstance(value, optax.MultiSteps):
        remedy = f"Write `{name}.gradient_transformation()`."
    elif name == "outer":
        remedy = "Write for example `outer_loop(inner, optax.sgd(0.5), k)`."
    else:
        remedy = "Write for example `lookahead(optax.adam(1e-3))`."
    raise TypeError(
        f"`{name}` must be an Optax gradient transformation, got {value!r}. {remedy}"
    )


def check_k(k: Any) -> None:
    """Raises unless `k` is a whole number of steps, as far as that is static."""
    _check_scalar("k", k)
    if isinstance(k, jax.Array):
        return
    value = _python_value(k)
    message = (
        f"`k` must be an integer of at least 1, got {value!r}. "
        "Write the number of inner steps in a cycle, for example `k=5`."
    )
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(message)
    if value < 1:
        raise ValueError(message)
    most = jnp.iinfo(jnp.int32).max
    if value > most:
        raise ValueError(
            f"`k` must be an integer of at least 1 and at most {most}, got {value!r}. "
            f"Write `k={most}` never to sync."
        )


def check_alpha(alpha: Any) -> None:
    """Raises unless `alpha` is a step size or a schedule, as far as that is static."""
    _check_scalar("alpha", alpha)
    if isinstance(alpha, jax.Array) or callable(alpha):
        return
    value = _python_value(alpha)
    message = (
        f"`alpha` must be a number in [0, 1] or a schedule, got {value!r}. "
        "Write the slow step size, for example `alpha=0.5`."
    )
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(message)
    if not 0 <= value <= 1:  # NaN too
        raise ValueError(message)


def check_inner_state(inner_state: Any, outer: Any = None) -> None:
    """Raises unless `inner_state` names or is something that a sync can do."""
    if callable(inner_state):
        return
    if inner_state not in ("keep", "reset", "interpolate"):
        raise ValueError(
            "`inner_state` must be 'keep', 'reset' or 'interpolate', got "
            f"{inner_state!r}. Write what a sync is to do to the inner state."
        )
    if inner_state == "interpolate" and outer is not None:
        raise ValueError(
            "`inner_state` of `outer_loop` must be 'keep' or 'reset', got "
            "'interpolate': an outer optimizer has no fraction to move by. Write "
            "`lookahead(inner, k, alpha, inner_state='interpolate')`."
        )


def uninterpolable(error: Exception) -> ValueError:
    """Returns the error for an inner state in which moments cannot be told apart."""
    return ValueError(
        "`inner_state='interpolate'` must be able to tell what in the state of `inner` "
        "is like the parameters, got an error from `optax.tree.map_params`: "
        f"{error!r}. Write `inner_state='keep'` or `'reset'`."
    )


def check_slow_dtype(slow_dtype: Any) -> Any:
    """Raises unless `slow_dtype` is a floating dtype that JAX has turned on."""
    if slow_dtype is None:
        return None
    message = (
        "`slow_dtype` must be a floating dtype or None, got "
        f"{slow_dtype!r}. Write for example `slow_dtype='float32'`."
    )
    try:
        dtype = jnp.dtype(slow_dtype)
    except TypeError as error:
        raise TypeError(message) from error
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(message)
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(
            f"`slow_dtype` must be a dtype that JAX has turned on, got {dtype}. "
            "Set `jax.config.update('jax_enable_x64', True)` or write 'float32'."
        )
    return dtype


def check_wide(slow_dtype: Any, params: Any) -> None:
    """Raises if the slow copy could not hold the values of a parameter."""
    if slow_dtype is None:
        return
    for path, p in jax.tree.leaves_with_path(params):
        dtype = jnp.result_type(p)
        if not jnp.issubdtype(dtype, jnp.inexact):
            continue
        wide, narrow = jnp.finfo(slow_dtype), jnp.finfo(dtype)
        if wide.eps > narrow.eps or wide.max < narrow.max:
            raise ValueError(
                "`slow_dtype` must be at least as wide as every parameter, got "
                f"{slow_dtype} where {describe_path(path)} has {dtype}. Write a wider "
                "one, or None for the parameters' own."
            )


def check_reserved(extra_args: dict[str, Any], inner_step_type: type) -> None:
    """Raises if the caller's extra arguments hide what `outer` is told."""
    # One that an `outer_loop` around this one passes is not the caller's.
    if "inner_step" in extra_args and not isinstance(
        extra_args["inner_step"], inner_step_type
    ):
        raise ValueError(
            "`inner_step` must not be an extra argument of `update`, got "
            f"{extra_args['inner_step']!r}: `outer_loop` tells the outer optimizer "
            "about the inner step by this name. Rename the argument."
        )


def check_outer_args(outer_args: Any) -> None:
    """Raises unless the outer optimizer's own arguments have names."""
    if not isinstance(outer_args, Mapping):
        raise TypeError(
            "`outer_args` must be a dict of extra arguments for `outer`, got "
            f"{outer_args!r}. Write for example `outer_args={{'grad_fn': grad_fn}}`."
        )


def check_anchor(anchor: Any, now: Any) -> None:
    """Raises unless the anchor belongs to this state, which an old one does not."""
    got, expected = jax.tree.structure(anchor), jax.tree.structure(now)
    if got != expected:
        raise ValueError(
            "`anchor` must hold the trees in `fast_state` that are like the "
            f"parameters, got {got} where they are {expected}. For a checkpoint in the "
            "old form write `state._replace(anchor=jax.tree.unflatten("
            "jax.tree.structure(tx.init(params).anchor), "
            "jax.tree.leaves(state.anchor)))`."
        )


def check_inner_step(inner_step: Any, inner_step_type: type, outer: str) -> None:
    """Raises unless `outer_loop` called."""
    if not isinstance(inner_step, inner_step_type):
        raise ValueError(
            f"`inner_step` must be what `outer_loop` passes to its outer optimizer, "
            f"got {inner_step!r}. Write `outer_loop(inner, {outer}, k)`."
        )


def _check_scalar(name: str, value: Any) -> None:
    shape = getattr(value, "shape", ())
    if shape:
        raise ValueError(
            f"`{name}` must be a scalar, got an array of shape {shape}. "
            f"To try several values at once, `jax.vmap` over `{name}`."
        )


def _python_value(value: Any) -> Any:
    # NumPy's scalars are as static as Python's, and its bool is no `bool`.
    return value.item() if hasattr(value, "item") else value


def describe_path(path: KeyPath) -> str:
    """Returns the path of a leaf as a user would index it."""
    return jax.tree_util.keystr(path) or "the root"


def varying_axes(x: Any) -> frozenset[str]:
    """Returns the axes of `jax.shard_map` over which JAX knows that `x` may differ."""
    kind = jax.typeof(x)
    # As newer versions of JAX call it, as older ones did, and nothing before that.
    manual = getattr(kind, "manual_axis_type", None)
    return getattr(manual, "varying", getattr(kind, "vma", frozenset()))
