"""The mean of the fast weights of many workers, which communicate once per cycle."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from ._state import InnerStep, is_finite


def average_replicas(
    axis_name: str | tuple[str, ...],
) -> optax.GradientTransformationExtraArgs:
    """Averages the fast weights of all replicas, in an outer optimizer.

    Put it first in the chain that is the outer optimizer of `outer_loop`. Each replica
    takes its inner steps alone; the replicas communicate at a sync and in no other
    step, and the rest of the chain is given the pseudo-gradient from the mean of their
    fast weights:

        pseudo_grads_r = phi_r - mean_s(theta_s)

    It is not the mean of `phi_s - theta_s`, since this form also equalizes slow weights
    that differ between replicas, by rounding or because their initial values differ.

    With `optax.sgd(1.0)` after it this is Local SGD, with `optax.sgd(alpha)` Lookahead
    over workers, with Nesterov momentum DiLoCo, and with Muon as `inner` too MuLoCo.
    With one replica it changes nothing.

    A replica is broken if an element of its fast weights is not finite where its slow
    weight is. The mean leaves out all parameters of that replica (of several loops, as
    under `optax.partition`, each decides for its own parameters). Its own chain is
    given the healthy replicas' pseudo-gradient too, so that its state and slow weights
    stay equal to the others', except for slow weights of the broken elements, which do
    not change. Where no replica is healthy the pseudo-gradients are 0: momentum and
    decay may still move the slow weights, which stay finite. All devices of a replica
    decide together whether it is broken under `jax.vmap` with `spmd_axis_name`, and
    where `jax.shard_map` leaves the axes within a replica automatic. Where these axes
    are manual too, each device decides for its own shard. With a `slow_dtype`, a
    parameter that breaks in the step that syncs returns to its slow weight.

    All replicas must sync in the same step: `steps_since_sync` must be one number for
    all of them, as with the axes of `replica_axes`. Under `jax.shard_map` with
    `check_vma=True` anything else is refused. Under `jax.vmap` a stack of counters is
    not detected, and then every step communicates. Wrappers that decide for each
    replica whether to step, such as `optax.apply_if_finite` around `outer_loop`, are
    not supported either.

    Args:
      axis_name: Name of the axis of the replicas, or a tuple of names, mapped by
        `jax.shard_map`, `jax.vmap` or `jax.pmap`.

    Returns:
      A `GradientTransformationExtraArgs` that maps pseudo-gradients, a tree of arrays
      of any shapes and dtypes, to the same, and keeps nothing in its state.

    Raises:
      TypeError: If `axis_name` is neither a string nor a tuple of strings.
      ValueError: `update` raises it outside an `outer_loop`, where no such axis is
        mapped, or where JAX's types show that replicas sync at different steps.

    Examples:
      >>> import functools, jax, jax.numpy as jnp, optax
      >>> from optax_lookahead import average_replicas, outer_loop, replica_axes
      >>> outer = optax.chain(average_replicas("replica"), optax.sgd(1.0))
      >>> tx = outer_loop(optax.sgd(0.1), outer, k=2)
      >>> targets = jnp.array([1.0, 3.0])  # each replica's own
      >>> w = jnp.zeros(2)
      >>> axes = replica_axes(jax.eval_shape(tx.init, w[0]))
      >>> state = jax.vmap(tx.init, out_axes=axes)(w)
      >>> @functools.partial(
      ...     jax.vmap, in_axes=(0, axes, 0), out_axes=(0, axes), axis_name="replica"
      ... )
      ... def step(w, state, target):
      ...     updates, state = tx.update(w - target, state, w)
      ...     return optax.apply_updates(w, updates), state
      >>> for _ in range(4):
      ...     w, state = step(w, state, targets)
      ...     print(*(f"{x:.3f}" for x in w))
      0.100 0.300
      0.380 0.380
      0.442 0.642
      0.688 0.688

    References:
      Stich, [Local SGD Converges Fast and Communicates
      Little](https://arxiv.org/abs/1805.09767), 2019, Algorithm 1. Wang, Tantia,
      Ballas, Rabbat, [SlowMo](https://arxiv.org/abs/1910.00643), 2019, Algorithm 1.
      Douillard et al., [DiLoCo](https://arxiv.org/abs/2311.08105), 2023, Algorithm 1.
    """
    check_axis(axis_name, "average_replicas('replica')")

    def update_fn(
        updates: optax.Updates,
        state: optax.EmptyState,
        params: Any = None,
        *,
        inner_step: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.EmptyState]:
        del extra_args
        if not isinstance(inner_step, InnerStep):
            raise ValueError(
                "`inner_step` must be what `outer_loop` passes to its outer optimizer, "
                f"got {inner_step!r}. Write `outer_loop(inner, "
                "optax.chain(average_replicas(axis_name), outer), k)`, or leave it out "
                "in `delayed_outer_loop`, which averages by itself."
            )
        sync = inner_step.sync
        replicas = _check_same_sync(axis_name, sync)
        if replicas == 1:
            return updates, state
        is_healthy, healthy = _health(axis_name, sync, inner_step.finite)

        def means(*thetas: Any) -> Any:
            # Divides first, since the sum may overflow where the mean does not.
            shares = [
                jnp.where(
                    is_healthy, theta / jnp.maximum(healthy, 1).astype(theta.dtype), 0
                )
                for theta in thetas
            ]
            return _as_varying(jax.lax.psum(shares, axis_name), thetas)

        thetas = jax.tree.map(jnp.subtract, params, updates)
        leaves, treedef = jax.tree.flatten(thetas)
        synced = (
            mean
            for bucket in _buckets(leaves)
            for mean in jax.lax.cond(sync, means, lambda *thetas: list(thetas), *bucket)
        )
        averaged = treedef.unflatten(next(synced) if x.size else x for x in leaves)

        def pseudo_grad(phi: Any, mean: Any) -> Any:
            g = phi - mean
            # Not finite where a slow weight is infinite by design.
            return jnp.where((healthy > 0) & is_finite(g), g, 0)

        return jax.tree.map(pseudo_grad, params, averaged), state

    # Optax types every state as `OptState`, of which this one is only a subtype.
    return optax.GradientTransformationExtraArgs(
        optax.init_empty_state,
        update_fn,  # pyright: ignore[reportArgumentType]
    )


def _health(axis_name: Any, sync: Any, finite: Any) -> tuple[Any, Any]:
    """Returns whether this replica is healthy at a sync, and how many replicas are.

    On other steps it reads and sends nothing.
    """
    flags = [
        jax.lax.cond(
            sync,
            lambda *leaves: jnp.all(jnp.stack([jnp.all(x) for x in leaves])),
            # True, of the type of the other branch.
            lambda *leaves: jnp.any(jnp.stack([jnp.any(x) for x in leaves])) | True,
            *bucket,
        )
        for bucket in _buckets(jax.tree.leaves(finite))
    ]
    if not flags:  # a group without parameters
        return True, 1
    is_healthy = jnp.all(jnp.stack(flags))
    number = is_healthy.astype(jnp.int32)
    healthy = jax.lax.cond(
        sync,
        lambda x: _as_varying(jax.lax.psum(x, axis_name), x),
        lambda x: x,
        number,
    )
    return is_healthy, healthy


def _as_varying(tree: Any, like: Any) -> Any:
    """Returns the tree with the types of `like` in `jax.shard_map`.

    JAX refuses branches of which one is the same on all replicas and one is not.
    """
    return jax.tree.map(
        lambda x, y: jnp.where(True, x, y),
        tree,
        list(like) if isinstance(like, tuple) else like,
    )


# Inputs and outputs of a branch are stored in memory. With one branch for all
# parameters that is 2.7 copies of them on a TPU v5e 4x4 (8 layers, 4 replicas of 4),
# with buckets 1.8. On a GPU, with 200 arrays, a branch for each array takes 40 % longer
# than one branch for all, and a branch for every eight arrays 4 % longer.
_BUCKETS = 16


def _buckets(leaves: list[Any]) -> list[list[Any]]:
    """Splits the arrays that have elements, in their order, by bytes."""
    # JAX types the sum of an array without elements as equal on all replicas.
    leaves = [x for x in leaves if x.size]
    total = sum(x.size * x.dtype.itemsize for x in leaves)
    buckets, room = [], 0.0
    for x in leaves:
        if room <= 0:
            buckets.append([])
            room = total / _BUCKETS
        buckets[-1].append(x)
        room -= x.size * x.dtype.itemsize
    return buckets


def check_axis(axis_name: Any, example: str) -> None:
    """Raises unless this can be the name of a mapped axis, or several."""
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    if not names or not all(isinstance(name, str) for name in names):
        raise TypeError(
            "`axis_name` must be the name of an axis or a tuple of names, got "
            f"{axis_name!r}. Write for example `{example}`."
        )


def count_replicas(axis_name: Any, function: str) -> int:
    """Returns the number of replicas, and raises where no such axis is mapped."""
    try:
        return jax.lax.psum(1, axis_name)
    except NameError as error:
        raise ValueError(
            f"`axis_name` must be an axis that is mapped around `{function}`, got "
            f"{axis_name!r}, which is not. Call `{function}` inside `jax.shard_map`, "
            "or `jax.vmap` or `jax.pmap` with this `axis_name`."
        ) from error


def _check_same_sync(axis_name: Any, sync: Any) -> int:
    """Returns the number of replicas, and raises unless they sync together.

    Only under `jax.shard_map` with `check_vma=True` does JAX know whether they do.
    """
    replicas = count_replicas(axis_name, "update")
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    varying = _varying_axes(sync) & set(names)
    if varying:
        raise ValueError(
            "`steps_since_sync` must be the same on all replicas, got one that varies "
            f"over {sorted(varying)}. Write `P()` for it in the `in_specs` and "
            "`out_specs` of `jax.shard_map`, and take out any wrapper that decides on "
            "each replica whether to step."
        )
    return replicas


def _varying_axes(x: Any) -> frozenset[str]:
    """Returns the axes of `jax.shard_map` over which JAX knows that `x` may differ."""
    kind = jax.typeof(x)
    # `manual_axis_type` in newer versions of JAX, `vma` in older ones, then neither.
    manual = getattr(kind, "manual_axis_type", None)
    return getattr(manual, "varying", getattr(kind, "vma", frozenset()))
