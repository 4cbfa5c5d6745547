"""What the public functions refuse, and in which words."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jax.sharding import AxisType
from jax.tree_util import all_leaves

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


def check_reserved(extra_args: dict[str, Any], fast_side: type) -> None:
    """Raises if the caller's extra arguments hide what `outer` is told."""
    # One that an `outer_loop` around this one passes is not the caller's.
    if "fast" in extra_args and not isinstance(extra_args["fast"], fast_side):
        raise ValueError(
            "`fast` must not be an extra argument of `update`, got "
            f"{extra_args['fast']!r}: `outer_loop` tells the outer optimizer about "
            "the inner step by this name. Rename the argument."
        )


def check_outer_args(outer_args: Any) -> None:
    """Raises unless the outer optimizer's own arguments have names."""
    if not isinstance(outer_args, Mapping):
        raise TypeError(
            "`outer_args` must be a dict of extra arguments for `outer`, got "
            f"{outer_args!r}. Write for example `outer_args={{'grad_fn': grad_fn}}`."
        )


def check_outer_result(what: str, new: Any, given: Any) -> None:
    """Raises unless the outer optimizer returned what is like what it was given."""
    _check_result("`outer`", what, new, given, "an optimizer")


def check_inner_result(new: Any, given: Any) -> None:
    """Raises unless the function `inner_state` returned what is like the state."""
    _check_result("`inner_state`", "a state", new, given, "a function")
    for (path, x), old in zip(
        jax.tree.leaves_with_path(new), jax.tree.leaves(given), strict=True
    ):
        got, expected = jnp.result_type(x), jnp.result_type(old)
        if got != expected:
            raise ValueError(
                "`inner_state` must return a state with the dtypes that it is given, "
                f"got {got} where {describe_path(path)} has {expected}. Use a function "
                "that keeps the dtypes."
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


def _check_result(who: str, what: str, new: Any, given: Any, use: str) -> None:
    got, expected = jax.tree.structure(new), jax.tree.structure(given)
    if got != expected:
        raise ValueError(
            f"{who} must return {what} with the tree that it is given, got "
            f"{got} where {expected} was given. Use {use} that keeps the tree."
        )
    for (path, x), old in zip(
        jax.tree.leaves_with_path(new), jax.tree.leaves(given), strict=True
    ):
        if not _same_shape(x, old):
            raise ValueError(
                f"{who} must return {what} with the shapes that it is given, got "
                f"{jnp.shape(x)} where {describe_path(path)} has {jnp.shape(old)}. Use "
                f"{use} that keeps the shapes."
            )


def check_arrays(params: Any) -> None:
    """Raises if a leaf is something that no optimizer can move."""
    for path, p in jax.tree.leaves_with_path(params):
        try:
            jnp.result_type(p)
        except TypeError as error:
            raise TypeError(
                f"`params` must be a tree of arrays, got {p!r} at "
                f"{describe_path(path)}. Pass the arrays alone, for example "
                "`eqx.filter(model, eqx.is_inexact_array)`."
            ) from error


def check_params(params: Any, slow_params: Any) -> None:
    """Raises unless `params` has the tree, shapes and place of the slow weights."""
    if params is None:
        raise ValueError(
            "`params` must be the current parameters, got None. "
            "Call `update(grads, state, params)`, not `update(grads, state)`."
        )
    leaves, slow_leaves = jax.tree.leaves(params), jax.tree.leaves(slow_params)
    got, expected = jax.tree.structure(params), jax.tree.structure(slow_params)
    if got == expected and all(map(_fits, leaves, slow_leaves)):
        return
    check_arrays(params)
    # The first leaf that differs says more than two printed trees of a whole model.
    by_path = dict(jax.tree.leaves_with_path(params))
    for path, phi in jax.tree.leaves_with_path(slow_params):
        check_leaf(path, by_path, phi)
        del by_path[path]
    for path, p in by_path.items():
        raise _mismatch(f"shape {jnp.shape(p)} at {describe_path(path)}", "no leaf")
    raise _mismatch(str(got), str(expected))


def check_leaf(path: KeyPath, params: dict[KeyPath, Any], phi: Any) -> None:
    """Raises unless the parameter at `path` is there, in the shape of `phi`."""
    if path not in params:
        got = "no leaf"
    elif not _same_shape(params[path], phi):
        got = f"shape {jnp.shape(params[path])}"
    elif not _same_place(params[path], phi):
        raise ValueError(
            "`params` must be sharded as the state's slow weights are, got "
            f"{_describe_place(params[path])} at {describe_path(path)}, where the "
            f"state has {_describe_place(phi)}. Restore the state with the shardings "
            "of its parameters, or put it there with `jax.device_put`."
        )
    else:
        return
    raise _mismatch(f"{got} at {describe_path(path)}", f"shape {jnp.shape(phi)}")


def check_unstacked(steps_since_sync: jax.typing.ArrayLike) -> None:
    """Raises if the state is a stack of states: `where` would broadcast it wrongly."""
    shape = jnp.shape(steps_since_sync)
    if shape:
        raise ValueError(
            f"`steps_since_sync` must be a scalar, got shape {shape}: these are "
            "several states in one. Call the function under `jax.vmap`."
        )


def check_curvature(curvature: Any) -> None:
    """Raises unless `curvature` can be called."""
    if not callable(curvature):
        raise TypeError(
            "`curvature` must be a function from the inner optimizer's state to a tree "
            f"like the parameters, got {curvature!r}. Write for example "
            "`line_minimum(adam_curvature())`."
        )


def check_alpha_range(min_alpha: Any, max_alpha: Any) -> None:
    """Raises unless the bounds are in order, as far as they are static."""
    bounds = [
        _check_number(name, value, "Write for example `min_alpha=0.2, max_alpha=1.0`.")
        for name, value in (("min_alpha", min_alpha), ("max_alpha", max_alpha))
    ]
    known = [value for value in bounds if value is not None]
    in_order = known == sorted(known)
    if not (in_order and all(0 <= value < math.inf for value in known)):  # NaN too
        raise ValueError(
            "`min_alpha` and `max_alpha` must be finite with 0 <= min_alpha <= "
            f"max_alpha, got {min_alpha!r} and {max_alpha!r}. Write for example "
            "`min_alpha=0.2, max_alpha=1.0`."
        )


def check_adam_curvature(b2: Any, power: Any) -> None:
    """Raises unless `b2` is a decay rate and `power` positive, if they are static."""
    value = _check_number("b2", b2, "Write the one given to Adam, for example 0.999.")
    if value is not None and not 0 <= value < 1:
        raise ValueError(
            f"`b2` must be a number in [0, 1), got {value!r}. Write the one given to "
            "Adam, for example 0.999."
        )
    value = _check_number("power", power, "Write for example `power=0.5`.")
    if value is not None and not 0 < value < math.inf:
        raise ValueError(
            f"`power` must be a positive number, got {value!r}. Write for example "
            "`power=0.5`."
        )


def check_one_adam(states: list[Any]) -> Any:
    """Returns the state of Adam, and raises unless there is just one."""
    if len(states) == 1:
        return states[0]
    raise ValueError(
        "`adam_curvature` must find one `optax.ScaleByAdamState` in the inner "
        f"optimizer's state, got {len(states) or 'none'}. Write a function from that "
        "state to a tree like the parameters."
    )


def check_fast(fast: Any, fast_side: type, outer: str) -> None:
    """Raises unless `outer_loop` called."""
    if not isinstance(fast, fast_side):
        raise ValueError(
            f"`fast` must be what `outer_loop` passes to its outer optimizer, got "
            f"{fast!r}. Write `outer_loop(inner, {outer}, k)`."
        )


def check_axis(axis_name: Any) -> None:
    """Raises unless this can be the name of a mapped axis, or several."""
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    if not names or not all(isinstance(name, str) for name in names):
        raise TypeError(
            "`axis_name` must be the name of an axis or a tuple of names, got "
            f"{axis_name!r}. Write for example `average_replicas('replica')`."
        )


def check_same_sync(axis_name: Any, sync: Any) -> int:
    """Returns the number of replicas, and raises unless they sync together.

    As far as JAX knows: under `jax.shard_map` with `check_vma=True` it does.
    """
    try:
        replicas = jax.lax.psum(1, axis_name)
    except NameError as error:
        raise ValueError(
            f"`axis_name` must be an axis that is mapped around `update`, got "
            f"{axis_name!r}, which is not. Call `update` inside `jax.shard_map`, or "
            "`jax.vmap` or `jax.pmap` with this `axis_name`."
        ) from error
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    varying = varying_axes(sync) & set(names)
    if varying:
        raise ValueError(
            "`steps_since_sync` must be the same on all replicas, got one that varies "
            f"over {sorted(varying)}. Write `P()` for it in the `in_specs` and "
            "`out_specs` of `jax.shard_map`, and take out any wrapper that decides on "
            "each replica whether to step."
        )
    return replicas


def check_grad_fn(grad_fn: Any) -> None:
    """Raises unless `grad_fn` can be called."""
    if not callable(grad_fn):
        raise TypeError(
            "`grad_fn` must be a function from parameters to gradients, got "
            f"{grad_fn!r}. Write for example `grad_fn=jax.grad(loss)`."
        )


def check_like(name: str, tree: Any, pseudo_grads: Any) -> list[Any]:
    """Returns what a function made for each pseudo-gradient, and raises if it did not.

    A pseudo-gradient may be an `optax.MaskedNode`, for which it may make anything.
    """
    remedy = "Return a tree like the parameters."
    gs, treedef = jax.tree.flatten_with_path(pseudo_grads, is_leaf=is_masked)
    try:
        xs = treedef.flatten_up_to(tree)
    except ValueError as error:
        raise ValueError(
            f"`{name}` must return a tree like the parameters, got "
            f"{jax.tree.structure(tree)} where they have {treedef}. {remedy}"
        ) from error
    for (path, g), x in zip(gs, xs, strict=True):
        if is_masked(g):
            continue
        got = f"shape {jnp.shape(x)}" if all_leaves([x]) else f"{x!r}"
        if got != f"shape {jnp.shape(g)}":
            raise ValueError(
                f"`{name}` must return arrays with the shapes of the parameters, got "
                f"{got} at {describe_path(path)}, where they have {jnp.shape(g)}. "
                f"{remedy}"
            )
    return xs


def is_masked(node: Any) -> bool:
    """Returns whether this is what Optax puts where it hides a leaf."""
    return isinstance(node, optax.MaskedNode)


def varying_axes(x: Any) -> frozenset[str]:
    """Returns the axes of `jax.shard_map` over which JAX knows that `x` may differ."""
    kind = jax.typeof(x)
    # As newer versions of JAX call it, as older ones did, and nothing before that.
    manual = getattr(kind, "manual_axis_type", None)
    return getattr(manual, "varying", getattr(kind, "vma", frozenset()))


def _check_number(name: str, value: Any, remedy: str) -> Any:
    """Returns a static number, None for another, and raises if it is no scalar."""
    _check_scalar(name, value)
    if isinstance(value, jax.Array):
        return None
    number = _python_value(value)
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise TypeError(f"`{name}` must be a number, got {number!r}. {remedy}")
    return number


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


def _same_shape(a: Any, b: Any) -> bool:
    return jnp.shape(a) == jnp.shape(b)


def _same_place(p: Any, phi: Any) -> bool:
    """Returns whether JAX can compute with both, as far as that is static."""
    if not (isinstance(p, jax.Array) and isinstance(phi, jax.Array)):
        return True  # NumPy's go where the others are.
    types = {jax.typeof(x).sharding for x in (p, phi)}
    meshes = [sharding.mesh for sharding in types if not sharding.mesh.empty]
    # Not on automatic axes, along which the compiler moves what it needs.
    if len(meshes) == 2 and any(AxisType.Explicit in m.axis_types for m in meshes):
        return False
    if any(isinstance(x, Tracer) or not x.committed for x in (p, phi)):
        return True
    if p.sharding.device_set != phi.sharding.device_set:
        return False
    # Eagerly, a result that is split as `phi` is may not fit the mesh of `p`.
    return phi.is_fully_replicated or _mesh(p) == _mesh(phi)


def _mesh(x: jax.Array) -> Any:
    return getattr(x.sharding, "mesh", None)


def _describe_place(x: Any) -> str:
    if isinstance(x, Tracer):
        return f"{jax.typeof(x).sharding}"
    return f"{x.sharding} on devices {sorted(d.id for d in x.sharding.device_set)}"


def _fits(p: Any, phi: Any) -> bool:
    return _same_shape(p, phi) and _same_place(p, phi)


def _mismatch(got: str, expected: str) -> ValueError:
    return ValueError(
        "`params` must have the tree and the shapes that `init` saw, got "
        f"{got}, where the state has {expected}. Pass the parameters that this state "
        "belongs to, or start a new one with `init`."
    )
