"""Outer steps of many workers, whose mean is exchanged during the next inner steps."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ._average import check_axis, count_replicas
from ._checks import (
    check_batches,
    check_delay,
    check_init,
    check_mix,
    check_result,
    check_same_dtypes,
    check_same_tree,
    check_transformation,
    describe_state,
)
from ._slow_step import hide_discrete, init_outer
from ._slow_weights import is_intact
from ._state import common_dtype, copy, is_finite, is_inexact


class DelayedOuterState(NamedTuple):
    """State of `delayed_outer_loop`, the same on all replicas.

    The names of this type and of its fields are the checkpoint format.

    Attributes:
      slow_params: The global copy phi, with the tree, shapes and dtypes of the
        parameters of one replica: the weights to evaluate and to save. Leaves that are
        neither floating nor complex keep the values that `init` was given.
      outer_state: State of the outer optimizer.
    """

    slow_params: optax.Params
    outer_state: optax.OptState


DelayedOuterState.__module__ = "optax_lookahead"


def delayed_outer_loop(
    train_step: Callable[[Any, Any, Any], tuple[Any, Any, Any]],
    outer: optax.GradientTransformation,
    axis_name: str | tuple[str, ...],
    *,
    delay: int,
    mix: jax.typing.ArrayLike,
) -> tuple[
    Callable[[Any], DelayedOuterState],
    Callable[..., tuple[Any, Any, DelayedOuterState, Any]],
]:
    """A cycle of many workers in which communication overlaps with computation.

    With `outer_loop` and `average_replicas` a sync waits for the mean. Here the
    exchange starts `delay` inner steps before the sync that uses the mean. Replica r
    takes k inner steps, to theta_{r,k}, and the outer optimizer takes one step:

        pseudo_grads = phi_{t-1} - mean_r(theta_{r,k-delay})
        phi_t        = phi_{t-1} + outer(pseudo_grads)
        theta_r      = mix * theta_{r,k} + (1 - mix) * phi_t

    The next cycle starts from theta_r. With `delay=0` and `mix=0` this is
    `outer_loop(inner, optax.chain(average_replicas(axis_name), outer), k)`. phi is one
    global copy; unlike in `outer_loop`, no cycle starts it from the loop's parameters.

    The whole cycle is one program, so that the compiler can run the exchange during the
    steps. XLA does that between slices of TPUs; within a slice, and on CPUs, nothing is
    gained. No exchange is pending when a cycle ends, so parameters and both states,
    saved between two cycles, are a complete checkpoint.

    For a fragment, a part of the parameters that syncs separately, let `params` be that
    part and put the rest into `state`.

    A replica is broken if an element of its fast weights is not finite where phi is. It
    is left out of the mean with all its parameters; if no replica is healthy, the
    pseudo-gradients are 0. A slow weight takes only finite values. The sync sets a fast
    weight that is not finite to phi; a broken replica's own state, such as moments that
    are NaN, is not repaired.

    Args:
      train_step: One inner step of one replica, a function `(params, state, batch) ->
        (params, state, metrics)`, as `jax.lax.scan` runs it: parameters and state keep
        their shapes and dtypes. With an Optax optimizer inside, `state` is its state.
      outer: The optimizer that takes the slow steps. It sees the floating and complex
        leaves of the parameters; the others are `optax.MaskedNode`, and each replica
        keeps its own.
      axis_name: Name of the axis of the replicas, or a tuple of names, mapped by
        `jax.shard_map` or `jax.vmap`.
      delay: Inner steps during the exchange, an integer in [0, k]: tau in Streaming
        DiLoCo, `fragment_sync_delay` in torchft.
      mix: Weight of the local weights in [0, 1], dimensionless: alpha in Streaming
        DiLoCo, `fragment_update_alpha` in torchft. At 0 the local steps of the delay
        only change the inner state. Also a scalar array, whose value is not checked.

    Returns:
      Two functions. `init(params)` returns a `DelayedOuterState`, which all replicas
      share: None in the `in_axes` and `out_axes` of `jax.vmap`, `P()` in the specs of
      `jax.shard_map`. `cycle(params, state, outer_state, batches)` takes k inner steps
      and the outer one, and returns the new values of the first three and the stacked
      metrics; the arrays in `batches` have the k steps on their first axis.

    Raises:
      TypeError: If `train_step` is not a function, `outer` not a gradient
        transformation, `axis_name` neither a string nor a tuple of strings, `delay` not
        a Python integer or a static `mix` not a number. `init` raises it if a leaf is
        not an array, `cycle` if `outer_state` is not a `DelayedOuterState`.
      ValueError: If `delay` is negative or a static `mix` outside [0, 1]. `cycle`
        raises it if no such axis is mapped, if the batches do not all have k steps, if
        `delay` is larger than k, if `params` are unlike those that `init` saw, if
        `train_step` does not return three trees, or if `outer` returns updates of
        another tree or other shapes.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from optax_lookahead import delayed_outer_loop
      >>> inner = optax.sgd(0.1)
      >>> def train_step(w, state, target):
      ...     updates, state = inner.update(w - target, state, w)
      ...     return optax.apply_updates(w, updates), state, (w - target) ** 2
      >>> init, cycle = delayed_outer_loop(
      ...     train_step, optax.sgd(1.0), "replica", delay=2, mix=0.5
      ... )
      >>> outer_state = init(jnp.zeros([]))
      >>> w = jnp.zeros(2)
      >>> state = jax.vmap(inner.init)(w)
      >>> cycle = jax.vmap(cycle, (0, 0, None, 0), (0, 0, None, 0), axis_name="replica")
      >>> targets = jnp.array([[1.0] * 4, [3.0] * 4])  # [replicas, k]
      >>> for _ in range(3):
      ...     w, state, outer_state, losses = cycle(w, state, outer_state, targets)
      ...     print(*(f"{x:.3f}" for x in w), f"{outer_state.slow_params:.3f}")
      0.362 0.706 0.380
      0.697 1.154 0.812
      0.965 1.459 1.129

    References:
      Douillard et al., [Streaming DiLoCo with overlapping
      communication](https://arxiv.org/abs/2501.18512), 2025, where `delay` is tau and
      `mix` is alpha. torchft,
      [`local_sgd.py`](https://github.com/meta-pytorch/torchft).
    """
    if not callable(train_step):
        raise TypeError(
            "`train_step` must be a function `(params, state, batch) -> (params, "
            f"state, metrics)`, got {train_step!r}. Call the inner optimizer in it."
        )
    check_transformation("outer", outer, "optax.sgd(0.7, momentum=0.9, nesterov=True)")
    check_axis(axis_name, "delayed_outer_loop(train_step, outer, 'replica', ...)")
    check_delay(delay)
    check_mix(mix)

    def init(params: Any) -> DelayedOuterState:
        check_init(params, None)
        slow_params = jax.tree.map(copy, params)
        return DelayedOuterState(slow_params, init_outer(outer, slow_params))

    def body(carry: Any, batch: Any) -> tuple[Any, Any]:
        result = train_step(carry[0], carry[1], batch)
        if not isinstance(result, tuple) or len(result) != 3:
            raise ValueError(
                "`train_step` must return a tuple (params, state, metrics), got "
                f"{jax.tree.map(jnp.shape, result)}. Return None if there are no "
                "metrics."
            )
        return result[:2], result[2]

    def cycle(
        params: Any, state: Any, outer_state: DelayedOuterState, batches: Any
    ) -> tuple[Any, Any, DelayedOuterState, Any]:
        replicas = count_replicas(axis_name, "cycle")
        start = check_batches(batches, delay) - delay
        if not isinstance(outer_state, DelayedOuterState):
            raise TypeError(
                "`outer_state` must be a `DelayedOuterState`, got a "
                f"{describe_state(outer_state)}. Pass what `init` or the last `cycle` "
                "returned."
            )
        phi, opt_state = outer_state
        check_same_tree(params, phi)
        check_same_dtypes(params, phi)

        before = jax.tree.map(lambda x: x[:start], batches)
        carry, metrics = jax.lax.scan(body, (params, state), before)

        # One exchange, without a branch and without a result that it has to wait for:
        # it also counts the healthy replicas, so shares are first divided by the number
        # of all replicas, and corrected afterwards.
        sums, healthy = jax.lax.psum(_shares(carry[0], phi, replicas), axis_name)

        during = jax.tree.map(lambda x: x[start:], batches)
        (params, state), more = jax.lax.scan(body, carry, during)
        metrics = jax.tree.map(lambda *x: jnp.concatenate(x), metrics, more)

        def pseudo_gradient(phi: Any, total: Any) -> Any:
            dtype = common_dtype(total, jnp.float32)
            weight = replicas / jnp.maximum(healthy, 1).astype(dtype)
            mean = jnp.asarray(jnp.asarray(total, dtype) * weight, total.dtype)
            g = phi - mean
            return jnp.where((healthy > 0) & is_finite(g), g, 0)

        slow = hide_discrete(phi)
        pseudo_grads = jax.tree.map(pseudo_gradient, slow, sums)
        updates, opt_state = outer.update(pseudo_grads, opt_state, slow)
        check_result("outer", "updates", updates, pseudo_grads)
        new = optax.apply_updates(slow, updates)
        phi = jax.tree.map(_where_finite, phi, new)
        params = jax.tree.map(partial(_mixed, mix), params, phi)
        return params, state, DelayedOuterState(phi, opt_state), metrics

    return init, cycle


def _shares(params: Any, phi: Any, replicas: int) -> tuple[Any, Any]:
    """Returns this replica's part of the sums over all, and 1 if it is healthy."""
    intact = jax.tree.map(lambda p, phi: is_intact(phi, is_finite(p)), params, phi)
    is_healthy = jax.tree.reduce(
        lambda flag, leaf: flag & jnp.all(leaf), intact, jnp.array(True)
    )

    def share(p: Any, phi: Any) -> Any:
        if not is_inexact(phi):
            return optax.MaskedNode()
        # Divided first, since a sum may overflow where the mean does not.
        return jnp.where(is_healthy, p / replicas, 0)

    return jax.tree.map(share, params, phi), is_healthy.astype(jnp.int32)


def _where_finite(phi: Any, new: Any) -> Any:
    """Returns the new slow weight, or the old one where that is not finite."""
    if not is_inexact(phi):
        return phi
    return jnp.where(is_finite(new), new, phi)


def _mixed(mix: Any, p: Any, phi: Any) -> Any:
    """Returns the parameter that the next cycle starts from."""
    if not is_inexact(phi):
        return p
    mix = jnp.asarray(mix, jnp.finfo(jnp.result_type(p)).dtype)
    # phi also where p is infinite by design, since 0 times infinity is NaN.
    return jnp.where(is_finite(p), mix * p + (1 - mix) * phi, phi)
