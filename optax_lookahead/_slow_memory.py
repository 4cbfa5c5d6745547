"""The memory that holds the slow weights between the start of a cycle and its sync.

With host memory, a loop of at most one iteration copies each array in the steps that
need it. `jax.lax.cond` is not used: XLA for TPUs can compile neither conditionals with
a branch that only writes host memory nor nested ones, and conditionals take more
temporaries.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from ._state import is_inexact

SlowMemoryKind = Literal["pinned_host"]


class Memory(NamedTuple):
    """How a step accesses the slow weight of one parameter in its memory.

    It is accessed if one of the flags holds. Otherwise the result of `read` is not
    used, and update and slow weight do not change. `read` and `update` take a function
    of a parameter p, its update u and its slow weight on the device, and return one for
    a slow weight in this memory; phi is the slow weight at the start of the cycle.
    """

    init: Callable[..., Any]  # slow -> slow
    read: Callable[..., Any]  # (p, slow, u -> phi), *flags -> the same
    update: Callable[..., Any]  # (p, u, slow -> u, slow), *flags -> the same
    write: Callable[..., Any]  # *flags -> (new, slow -> slow)


def memory(kind: SlowMemoryKind | None) -> Memory:
    """Returns the functions for the argument `slow_memory_kind`."""
    if kind is None:
        return Memory(_identity, _read_on_device, _update_on_device, _write_on_device)
    return Memory(to_host, _read_on_host, _update_on_host, _write_on_host)


def to_host(x: Any) -> Any:
    """Returns the array, or the `ShapeDtypeStruct`, in the memory of the host."""
    if jnp.issubdtype(x.dtype, jax.dtypes.extended):
        # A random key: outside of `jit`, JAX does not say in which memory it is.
        return x
    if not isinstance(x, jax.ShapeDtypeStruct):
        return x if _is_on_host(x) else jax.device_put(x, jax.memory.Space.Host)
    if x.sharding is None:  # which would have the kind of memory
        return x
    return x.update(sharding=x.sharding.with_memory_kind("pinned_host"))


def to_device(x: Any) -> Any:
    """Returns the array in the memory of its device."""
    return jax.device_put(x, jax.memory.Space.Device) if _is_on_host(x) else x


def to_memory_of(old: Any, new: Any) -> Any:
    """Returns the new array in the memory of the old one."""
    return to_host(new) if _is_on_host(old) else new


def _is_on_host(x: Any) -> bool:
    if not hasattr(jax, "memory"):
        return False
    return jax.typeof(x).memory_space == jax.memory.Space.Host


def _identity(slow: Any) -> Any:
    return slow


def _read_on_device(leaf: Any, *flags: Any) -> Any:
    del flags
    return lambda p, slow, _=None: leaf(p, to_device(slow))


def _update_on_device(leaf: Any, *flags: Any) -> Any:
    del flags
    return lambda p, u, slow: leaf(p, u, to_device(slow))


def _write_on_device(*flags: Any) -> Any:
    del flags
    return lambda new, slow: new  # noqa: ARG005


def _read_on_host(leaf: Any, *flags: Any) -> Any:
    flag = _one_for_all(flags)

    def read(p: Any, slow: Any, u: Any = None) -> Any:
        # Only after the update: a compiler that reads all slow weights early keeps a
        # copy of the parameters in memory during the backward pass.
        now, _ = jax.lax.optimization_barrier((flag, u))
        return _once(now, lambda _: leaf(p, to_device(slow)), _unread(p, slow))

    return read


def _unread(p: Any, slow: Any) -> Any:
    """Returns ones, at which optimizers are finite, with the sharding and type of p."""
    p = jnp.asarray(p, slow.dtype)
    # By `where`, since the type of p in `jax.shard_map` says that devices differ.
    return jnp.where(True, jnp.ones_like(p), p) if is_inexact(p) else p


def _update_on_host(leaf: Any, *flags: Any) -> Any:
    flag = _one_for_all(flags)

    def update(p: Any, u: Any, slow: Any) -> tuple[Any, Any]:
        def body(both: tuple[Any, Any]) -> tuple[Any, Any]:
            u, slow = leaf(p, both[0], to_device(both[1]))
            return u, to_host(slow)

        return _once(flag, body, (u, to_host(slow)))

    return update


def _write_on_host(*flags: Any) -> Any:
    flag = _one_for_all(flags)

    def write(new: Any, slow: Any) -> Any:
        return _once(flag, lambda _: to_host(new), to_host(slow))

    return write


def _once(flag: Any, body: Callable[[Any], Any], init: Any) -> Any:
    """Returns `body(init)` if the flag is set, else `init`."""

    def run_and_stop(carry: Any) -> Any:
        flag, value = carry
        return ~flag, body(value)

    return jax.lax.while_loop(lambda carry: carry[0], run_and_stop, (flag, init))[1]


def _one_for_all(flags: Any) -> Any:
    """Returns whether one of the flags is set; raises if `jax.vmap` maps over them."""
    return _unbatched(jnp.any(jnp.stack(flags)))


@jax.custom_batching.custom_vmap
def _unbatched(flag: Any) -> Any:
    return flag


@_unbatched.def_vmap
def _refuse(axis_size: int, in_batched: Any, flag: Any) -> Any:
    del in_batched, flag
    raise ValueError(
        "`slow_memory_kind` must be None where `jax.vmap` maps over `k` or over "
        f"`steps_since_sync`, got {axis_size} cycles, of which each would move its "
        "slow weights in every step. Give all of them one counter, as `replica_axes` "
        "does, or leave `slow_memory_kind` out."
    )
