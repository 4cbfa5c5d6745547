"""Checks of arguments; errors state the rule, the value received and the remedy."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from ._state import InnerStep, LookaheadState, copy


def check_transformation(name: str, value: Any, example: str) -> None:
    """Raises unless `value` is an Optax gradient transformation."""
    if isinstance(value, optax.GradientTransformation):
        return
    if isinstance(value, optax.MultiSteps):
        remedy = f"Write `{name}.gradient_transformation()`."
    else:
        remedy = f"Write for example `{example}`."
    raise TypeError(
        f"`{name}` must be an Optax gradient transformation, got {value!r}. {remedy}"
    )


def check_k(k: Any) -> None:
    """Raises unless `k` is a whole number of steps, if it is static."""
    if (k := _static_scalar("k", k)) is _NOT_STATIC:
        return
    rule = "an integer of at least 1"
    remedy = "Write the number of inner steps in a cycle, for example `k=5`."
    is_integer = isinstance(k, int) and not isinstance(k, bool)
    most = jnp.iinfo(jnp.int32).max
    if is_integer and k > most:
        rule, remedy = f"{rule} and at most {most}", f"Write `k={most}` never to sync."
    elif is_integer and k >= 1:
        return
    error = ValueError if is_integer else TypeError
    raise error(f"`k` must be {rule}, got {k!r}. {remedy}")


def check_alpha(alpha: Any) -> None:
    """Raises unless `alpha` is a step size or a schedule, if it is static."""
    remedy = "the slow step size, for example `alpha=0.5`"
    check_coefficient("alpha", alpha, "[0, 1]", remedy)


def check_coefficient(name: str, value: Any, interval: str, remedy: str) -> None:
    """Raises unless it is a number in the interval or a schedule, if it is static."""
    if callable(value) or (value := _static_scalar(name, value)) is _NOT_STATIC:
        return
    message = (
        f"`{name}` must be a number in {interval} or a schedule, got {value!r}. "
        f"Write {remedy}."
    )
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(message)
    low, high = map(float, interval[1:-1].split(","))
    if not low <= value <= high:  # NaN too
        raise ValueError(message)
    if value == high and interval.endswith(")"):
        raise ValueError(message)


def checked_schedule(name: str, value: Any) -> Any:
    """Returns the value; a schedule raises unless it returns a scalar."""
    if not callable(value):
        return value

    def schedule(count: Any) -> Any:
        now = value(count)
        shape = getattr(now, "shape", ())
        if (isinstance(now, int | float) or hasattr(now, "dtype")) and not shape:
            return now
        got = f"shape {shape}" if shape else repr(now)
        raise ValueError(
            f"`{name}` must be a number or a schedule that returns one, got a function "
            f"that returns {got}. Return a scalar."
        )

    return schedule


def check_delay(delay: Any) -> None:
    """Raises unless `delay` is a whole number of steps, and static."""
    value = _static_scalar("delay", delay)
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if is_integer and value >= 0:
        return
    error = ValueError if is_integer else TypeError
    raise error(
        f"`delay` must be a Python integer of at least 0, got {delay!r}. Write the "
        "number of inner steps during the exchange, for example `delay=5`."
    )


def check_mix(mix: Any) -> None:
    """Raises unless `mix` is a weight in [0, 1], if it is static."""
    if (value := _static_scalar("mix", mix)) is _NOT_STATIC:
        return
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and 0 <= value <= 1:
        return
    error = ValueError if is_number else TypeError
    raise error(
        f"`mix` must be a number in [0, 1], got {mix!r}. Write the weight of the "
        "local weights, for example `mix=0.5`; 0 takes the global copy alone."
    )


def check_batches(batches: Any, delay: int) -> int:
    """Returns k; raises unless all batches have k steps and the delay is at most k."""
    shapes = [jnp.shape(x) for x in jax.tree.leaves(batches)]
    lengths = {shape[:1] for shape in shapes}
    if len(lengths) != 1 or not all(shape[:1] > (0,) for shape in shapes):
        raise ValueError(
            "`batches` must have the k inner steps of a cycle on the first axis of "
            f"every array, got shapes {shapes}. Stack the batches, for example "
            "`jax.tree.map(lambda *x: jnp.stack(x), *batches)`."
        )
    ((k,),) = lengths
    if delay > k:
        raise ValueError(
            "`delay` must be at most the number of inner steps in a cycle, got "
            f"{delay} where `batches` has {k}. Write a shorter delay or pass the "
            "batches of a longer cycle."
        )
    return k


def check_dtype(name: str, dtype: Any) -> Any:
    """Returns the dtype, and raises unless it is floating and enabled in JAX."""
    if dtype is None:
        return None
    message = (
        f"`{name}` must be a floating dtype or None, got {dtype!r}. "
        f"Write for example `{name}='float32'`."
    )
    if isinstance(dtype, jax.typing.ArrayLike):  # it has a dtype, but is not one
        raise TypeError(message)
    try:
        dtype = jnp.dtype(dtype)
    except TypeError as error:
        raise TypeError(message) from error
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(message)
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(
            f"`{name}` must be a dtype that JAX has enabled, got {dtype}. "
            "Set `jax.config.update('jax_enable_x64', True)` or write 'float32'."
        )
    return dtype


def check_slow_memory_kind(kind: Any) -> None:
    """Raises unless it is None, or a memory that this JAX can move arrays to."""
    if kind is None:
        return
    rule = "`slow_memory_kind` must be 'pinned_host' or None"
    if kind != "pinned_host":
        raise ValueError(
            f"{rule}, got {kind!r}. Leave it out to keep the slow weights in the "
            "memory of the parameters."
        )
    if not hasattr(jax, "memory"):
        raise ValueError(
            f"{rule}, and None with a JAX without `jax.memory`, got {kind!r} with JAX "
            f"{jax.__version__}. Install a newer one."
        )


def check_slow_memory(slow_params: Any, kind: Any) -> None:
    """Raises unless the devices of the arrays have this kind of memory."""
    if kind is None:
        return
    for path, slow in jax.tree.leaves_with_path(slow_params):
        if isinstance(slow, Tracer | jax.ShapeDtypeStruct):
            continue
        device = min(slow.devices(), key=lambda device: device.id)
        kinds = [memory.kind for memory in device.addressable_memories()]
        if kind not in kinds:
            raise ValueError(
                "`slow_memory_kind` must be a memory of the devices of the parameters, "
                f"got {kind!r} where {describe_path(path)} is on {device}, which has "
                f"{kinds}. Leave it out there."
            )


def check_inner_state(inner_state: Any, *, has_alpha: bool) -> None:
    """Raises unless `inner_state` is a known name or a function."""
    if callable(inner_state):
        return
    if inner_state not in ("keep", "reset", "interpolate"):
        raise ValueError(
            "`inner_state` must be 'keep', 'reset' or 'interpolate', got "
            f"{inner_state!r}. Write one of these, or a function `(state, fresh) -> "
            "state`."
        )
    if inner_state == "interpolate" and not has_alpha:
        raise ValueError(
            "`inner_state` of `outer_loop` must be 'keep' or 'reset', got "
            "'interpolate': an outer optimizer has no alpha to interpolate with. Write "
            "`lookahead(inner, k, alpha, inner_state='interpolate')`."
        )


def check_init(params: Any, slow_dtype: Any) -> None:
    """Raises unless every leaf is an array that `slow_dtype` can hold."""
    if isinstance(params, optax.LookaheadParams):
        raise TypeError(
            "`params` must be the parameters themselves, got optax.LookaheadParams. "
            "Pass its field `fast`; the state carries the slow ones."
        )
    for path, p in jax.tree.leaves_with_path(params):
        # Not `result_type` alone, which takes a string as the name of a dtype.
        if isinstance(p, str) or (not hasattr(p, "dtype") and not jnp.isscalar(p)):
            raise TypeError(
                f"`params` must be a tree of arrays, got {p!r} at "
                f"{describe_path(path)}. Pass the arrays alone, for example "
                "`eqx.filter(model, eqx.is_inexact_array)`."
            )
        dtype = jnp.result_type(p)
        if slow_dtype is not None and not _holds(slow_dtype, dtype):
            raise ValueError(
                "`slow_dtype` must be at least as wide as every parameter, got "
                f"{slow_dtype} where {describe_path(path)} has {dtype}. Write a wider "
                "one, or None for the parameters' own."
            )


def check_update(params: Any, state: Any, slow_dtype: Any) -> None:
    """Raises unless `state` is one state, and belongs to these parameters."""
    if params is None:
        raise ValueError(
            "`params` must be the current parameters, got None. "
            "Call `update(grads, state, params)`, not `update(grads, state)`."
        )
    if not isinstance(state, LookaheadState):
        raise TypeError(
            "`state` must be a `LookaheadState` of `optax_lookahead`, got a "
            f"{describe_state(state)}. Pass what `init` or `update` of this "
            "transformation returned; restore a checkpoint into what `init` returned."
        )
    check_unstacked(state.steps_since_sync)
    check_same_tree(params, state.slow_params)
    by_path = dict(jax.tree.leaves_with_path(params))
    for path, phi in jax.tree.leaves_with_path(state.slow_params):
        p = by_path[path]
        own = copy(jax.ShapeDtypeStruct(jnp.shape(p), jnp.result_type(p)), slow_dtype)
        if not _holds(jnp.result_type(phi), own.dtype):
            raise ValueError(
                "`slow_params` in the state must be at least as wide as the parameters "
                f"and `slow_dtype`, got {jnp.result_type(phi)} at "
                f"{describe_path(path)}, where {own.dtype} is needed. Keep the dtypes "
                "of the parameters and of the state, or widen the slow weights: "
                "`state._replace(slow_params=optax.tree.cast(state.slow_params, "
                f"'{own.dtype}'))`."
            )


def check_same_tree(params: Any, slow_params: Any) -> None:
    """Raises unless the parameters have the tree and shapes of their slow copy."""
    # Names the first leaf that differs: two printed trees of a model are too long.
    by_path = dict(jax.tree.leaves_with_path(params))
    for path, phi in jax.tree.leaves_with_path(slow_params):
        check_leaf(path, by_path, phi)
        del by_path[path]
    for path, p in by_path.items():
        raise _mismatch(f"shape {jnp.shape(p)} at {describe_path(path)}", "no leaf")
    got, expected = jax.tree.structure(params), jax.tree.structure(slow_params)
    if got != expected:
        raise _mismatch(str(got), str(expected))


def check_same_dtypes(params: Any, slow_params: Any) -> None:
    """Raises unless the parameters have the dtypes of their slow copy."""
    slow = jax.tree.leaves(slow_params)
    for (path, p), phi in zip(jax.tree.leaves_with_path(params), slow, strict=True):
        got, expected = jnp.result_type(p), jnp.result_type(phi)
        if got != expected:
            raise ValueError(
                f"`params` must have the dtypes that `init` saw, got {got} at "
                f"{describe_path(path)}, where the state has {expected}. Keep the "
                "dtypes of the parameters, or start a new state with `init`."
            )


def check_leaf(path: Any, params: dict[Any, Any], phi: Any) -> Any:
    """Returns the parameter at `path`, and raises unless it has the shape of `phi`."""
    if path in params and jnp.shape(params[path]) == jnp.shape(phi):
        return params[path]
    got = f"shape {jnp.shape(params[path])}" if path in params else "no leaf"
    raise _mismatch(f"{got} at {describe_path(path)}", f"shape {jnp.shape(phi)}")


def check_known(
    params: dict[Any, Any], with_slow_copy: set[Any], masks: list[Any]
) -> None:
    """Raises if a parameter has no slow copy and no mask leaves it out."""
    for path, p in params.items():
        masked = any(path[: len(mask)] == mask for mask in masks)
        if path not in with_slow_copy and not masked:
            raise ValueError(
                "`params` must hold only parameters that `init` saw, got shape "
                f"{jnp.shape(p)} at {describe_path(path)}, where the state has no "
                "leaf. Leave it out, as the `wrt` of an `nnx.Optimizer` does, or start "
                "a new state with `init`."
            )


def check_unstacked(
    scalar: jax.typing.ArrayLike, name: str = "steps_since_sync"
) -> None:
    """Raises for a stack of states, which `where` would broadcast wrongly."""
    shape = jnp.shape(scalar)
    if shape:
        raise ValueError(
            f"`{name}` must be a scalar, got shape {shape}: these are "
            "several states in one. Call the function under `jax.vmap`."
        )


def check_result(
    who: str, what: str, new: Any, given: Any, *, dtypes: bool = False, hint: str = ""
) -> None:
    """Raises unless a user's function kept the tree, shapes and dtypes of its input."""
    got, expected = jax.tree.structure(new), jax.tree.structure(given)
    if got != expected:
        raise ValueError(
            f"`{who}` must return {what} with the tree that it is given, got "
            f"{got} where {expected} was given. Keep the tree{hint}."
        )
    old = jax.tree.leaves(given)
    for (path, x), y in zip(jax.tree.leaves_with_path(new), old, strict=True):
        got, expected, feature = jnp.shape(x), jnp.shape(y), "shapes"
        if dtypes and got == expected:
            got, expected, feature = jnp.result_type(x), jnp.result_type(y), "dtypes"
        if got != expected:
            raise ValueError(
                f"`{who}` must return {what} with the {feature} that it is given, "
                f"got {got} where {describe_path(path)} has {expected}. "
                f"Keep the {feature}."
            )


def check_anchor(anchor: Any, now: Any) -> None:
    """Raises unless the anchor has the trees of the moments in the inner state."""
    got, expected = jax.tree.structure(anchor), jax.tree.structure(now)
    if got == expected:
        return
    here = "`with_inner_state(tx, state, state.fast_state)`"
    remedy = (
        "Pass zeros where a gradient is None; for a state of another `tx` write "
        f"{here}."
    )
    if not jax.tree.leaves(anchor):
        remedy = f"For a state of another `tx` write {here}."
    elif [x.shape for x in jax.tree.leaves(anchor)] == [
        x.shape for x in jax.tree.leaves(now)
    ]:
        remedy = (
            "For a checkpoint of version 0.1 write `state._replace(anchor="
            "jax.tree.unflatten(jax.tree.structure(tx.init(params).anchor), "
            "jax.tree.leaves(state.anchor)))`."
        )
    raise ValueError(
        "`anchor` must hold the trees in `fast_state` that are like the parameters, "
        f"got {got} where they are {expected}. {remedy}"
    )


def check_extra_args(extra_args: dict[str, Any], outer_args: Any) -> None:
    """Raises unless `outer_args` is a dict and no argument is named `inner_step`."""
    if not isinstance(outer_args, Mapping):
        raise TypeError(
            "`outer_args` must be a dict of extra arguments for `outer`, got "
            f"{outer_args!r}. Write for example `outer_args={{'grad_fn': grad_fn}}`."
        )
    inner_step = outer_args.get("inner_step", extra_args.get("inner_step"))
    # It may come from an `outer_loop` around this one, but not from the caller.
    if inner_step is not None and not isinstance(inner_step, InnerStep):
        raise ValueError(
            "`inner_step` must not be an extra argument of `update`, got "
            f"{inner_step!r}: under this name `outer_loop` passes an `InnerStep` to "
            "the outer optimizer. Rename the argument."
        )


def describe_path(path: Any) -> str:
    """Returns the path of a leaf as a user would write it."""
    return jax.tree_util.keystr(path) or "the root"


def describe_state(opt_state: Any) -> str:
    """Returns the name of its type, or "state of `optax.lookahead`" if it holds one."""

    def is_optax_lookahead(node: Any) -> bool:
        return isinstance(node, optax.LookaheadState)

    if any(
        map(is_optax_lookahead, jax.tree.leaves(opt_state, is_leaf=is_optax_lookahead))
    ):
        return "state of `optax.lookahead`"
    return type(opt_state).__name__


def _mismatch(got: str, expected: str) -> ValueError:
    return ValueError(
        "`params` must have the tree and the shapes that `init` saw, got "
        f"{got}, where the state has {expected}. Pass the parameters that this state "
        "belongs to, or start a new one with `init`."
    )


def _holds(dtype: Any, other: Any) -> bool:
    """Returns whether every float of the dtype `other` is one of `dtype`."""
    if not (jnp.issubdtype(dtype, jnp.inexact) and jnp.issubdtype(other, jnp.inexact)):
        return True
    wide, narrow = jnp.finfo(dtype), jnp.finfo(other)
    return bool(wide.eps <= narrow.eps and wide.max >= narrow.max)


_NOT_STATIC = object()


def _static_scalar(name: str, value: Any) -> Any:
    """Returns the Python value, if it is static, and raises if it has axes."""
    if getattr(value, "shape", ()):
        raise ValueError(
            f"`{name}` must be a scalar, got an array of shape {value.shape}. "
            f"To try several values at once, `jax.vmap` over `{name}`."
        )
    if isinstance(value, jax.Array):
        kinds = jnp.bool_, jnp.complexfloating
        if any(jnp.issubdtype(value.dtype, kind) for kind in kinds):
            raise TypeError(
                f"`{name}` must be a real number, got an array of dtype {value.dtype}. "
                "Write an integer or a float."
            )
        return _NOT_STATIC
    # NumPy's scalars are static too, and `numpy.bool` is not a `bool`.
    return value.item() if hasattr(value, "item") else value
