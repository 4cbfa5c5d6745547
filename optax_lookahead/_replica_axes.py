"""Which arrays of an optimizer's state are different for each replica."""

from typing import Any

import jax
import optax

from ._checks import describe_state
from ._state import LookaheadState

# Fields that decide when a lookahead syncs, or whether a wrapper around it steps, which
# all replicas must do together.
_SHARED_FIELDS = {
    LookaheadState: ("steps_since_sync", "sync_count"),
    optax.ConditionallyMaskState: ("step",),
    optax.ConditionallyTransformState: ("step",),
    optax.InjectStatefulHyperparamsState: (
        "count",
        "hyperparams",
        "hyperparams_states",
    ),
    optax.MultiStepsState: ("mini_step", "gradient_step"),
    optax.contrib.SAMState: ("steps_since_sync",),
}


def replica_axes(opt_state: optax.OptState) -> Any:
    """Returns the axis of the replicas for each array of an optimizer's state.

    Each replica has its own values of most arrays, with the replicas on axis 0. The
    exceptions decide when to sync: all replicas share one value, and the axis is None.
    These are `steps_since_sync` and `sync_count` of every lookahead state, and the
    fields of wrappers around it that decide whether it steps, such as the counters of
    `optax.MultiSteps` and the hyperparameters of `optax.inject_hyperparams`. Each
    replica has its own state of a wrapper inside the inner or the outer optimizer,
    unless there is a lookahead in it too. For a wrapper that is not Optax's, replace
    the axis of such a field by None.

    Args:
      opt_state: State of the optimizer of one replica, from its `init`, or its shapes,
        from `jax.eval_shape`. It must hold at least one lookahead state.

    Returns:
      A tree like `opt_state` of 0 and None, for `in_axes` and `out_axes` of `jax.vmap`.

    Raises:
      ValueError: If `opt_state` holds no lookahead state.

    Examples:
      The state of three replicas, and its specification for `jax.shard_map`:

      >>> import jax, jax.numpy as jnp, optax
      >>> from jax.sharding import PartitionSpec as P
      >>> from optax_lookahead import average_replicas, outer_loop, replica_axes
      >>> outer = optax.chain(average_replicas("replica"), optax.sgd(1.0))
      >>> tx = outer_loop(optax.adam(0.1), outer, k=2)
      >>> one = {"w": jnp.ones((4, 2)), "temperature": jnp.ones([])}
      >>> axes = replica_axes(jax.eval_shape(tx.init, one))
      >>> params = jax.tree.map(lambda x: jnp.stack([x] * 3), one)
      >>> state = jax.vmap(tx.init, out_axes=axes)(params)
      >>> state.fast_state[0].count.shape, state.steps_since_sync.shape
      ((3,), ())
      >>> spec = jax.tree.map(
      ...     lambda axis: P() if axis is None else P("replica"),
      ...     axes,
      ...     is_leaf=lambda axis: axis is None,
      ... )
      >>> spec.fast_state[0].count == P("replica"), spec.steps_since_sync == P()
      (True, True)
    """

    def is_lookahead(node: Any) -> bool:
        return isinstance(node, LookaheadState)

    def holds_lookahead(node: Any) -> bool:
        return any(map(is_lookahead, jax.tree.leaves(node, is_leaf=is_lookahead)))

    if not holds_lookahead(opt_state):
        raise ValueError(
            "`opt_state` must hold the state of a lookahead, got a "
            f"{describe_state(opt_state)} without one. Pass what the whole optimizer's "
            "`init` returned."
        )

    def axes(node: Any) -> Any:
        if not holds_lookahead(node):
            return jax.tree.map(lambda _: 0, node)
        # Its children, one level down, in any type of container.
        children, treedef = jax.tree.flatten(node, is_leaf=lambda x: x is not node)
        result = treedef.unflatten(map(axes, children))
        for name in _SHARED_FIELDS.get(type(node), ()):
            shared = jax.tree.map(lambda _: None, getattr(node, name))
            result = result._replace(**{name: shared})
        return result

    return axes(opt_state)
