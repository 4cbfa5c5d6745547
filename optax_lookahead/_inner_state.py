"""What a sync does to the inner optimizer's state."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ._state import LookaheadState, copy, select
from ._validation import uninterpolable

# The fields that count training time, or that someone set: a reset leaves them alone,
# since a learning rate that warms up again in every cycle never leaves its warm-up.
_KEPT = {
    LookaheadState: ("sync_count",),
    optax.AddNoiseState: ("count",),
    optax.ConditionallyMaskState: ("step",),
    optax.ConditionallyTransformState: ("step",),
    optax.InjectStatefulHyperparamsState: (
        "count",
        "hyperparams",
        "hyperparams_states",
    ),
    optax.MultiStepsState: ("gradient_step",),
    optax.ScaleByScheduleState: ("count",),
    optax.contrib.ReduceLROnPlateauState: optax.contrib.ReduceLROnPlateauState._fields,
    optax.contrib.ScaleByAdemamixState: ("count_m2",),
    optax.contrib.ScheduleFreeState: ("step_count",),
}


@functools.cache
def _kept_fields() -> dict[type, tuple[str, ...]]:
    # Scheduled weight decay has a state whose type Optax does not export. It is made
    # here, not on import, since that would settle JAX on its devices.
    decay = type(optax.add_decayed_weights(lambda count: 0.0 * count).init(()))
    return {**_KEPT, decay: ("count",)}


def reset(
    sync: jax.typing.ArrayLike,
    fast_state: optax.OptState,
    inner: optax.GradientTransformationExtraArgs,
    params: optax.Params,
) -> optax.OptState:
    """Returns at a sync what `inner.init` gives, with training time left as it is."""
    fields = _kept_fields()

    def node(old, new):
        kept = fields.get(type(old))
        if kept is None:
            return select(sync, new, old)
        return old._replace(
            **{
                name: walk(getattr(old, name), getattr(new, name))
                for name in old._fields
                if name not in kept
            }
        )

    def walk(old, new):
        return jax.tree.map(node, old, new, is_leaf=lambda x: type(x) in fields)

    return walk(fast_state, inner.init(params))


def anchor_of(
    inner: optax.GradientTransformationExtraArgs, fast_state: optax.OptState
) -> Any:
    """Returns a copy of the leaves that a sync interpolates, None for the others."""

    def leaf(x):
        return copy(x) if jnp.issubdtype(jnp.result_type(x), jnp.inexact) else None

    try:
        return optax.tree.map_params(
            inner, leaf, fast_state, transform_non_params=lambda _: None
        )
    except Exception as error:  # of any kind: `inner.init` is given a placeholder
        raise uninterpolable(error) from error


def interpolate(
    sync: jax.typing.ArrayLike,
    fast_state: optax.OptState,
    anchor: Any,
    alpha: jax.typing.ArrayLike,
) -> tuple[optax.OptState, Any]:
    """Returns the state and its anchor, at a sync moved a fraction alpha on from it."""

    def leaf(old, now):
        if old is None:
            return now, None
        drift = now - old
        # In the form of the weights, which is exact at alpha = 1.
        now = jnp.where(sync, now - jnp.asarray(1 - alpha, drift.dtype) * drift, now)
        return now, jnp.where(sync, now, old)

    olds, treedef = jax.tree.flatten(anchor, is_leaf=lambda x: x is None)
    pairs = list(map(leaf, olds, treedef.flatten_up_to(fast_state)))
    fast_state = treedef.unflatten([now for now, _ in pairs])
    return fast_state, treedef.unflatten([old for _, old in pairs])
