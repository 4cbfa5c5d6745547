"""Whether parameters and a state belong together: tree, shapes and places."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import AxisType

from ._validation import KeyPath, describe_path


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
