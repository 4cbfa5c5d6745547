"""What a sync does to the inner optimizer's state."""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ._checks import check_anchor, check_result
from ._state import LookaheadState, copy, is_finite, is_inexact, select

InnerState = (
    Literal["keep", "reset", "interpolate"]
    | Callable[[optax.OptState, optax.OptState], optax.OptState]
)


class Policy(NamedTuple):
    """What is kept of the inner state from sync to sync, and what one makes of it."""

    init: Callable[[optax.OptState], Any]  # fast_state -> anchor
    # sync, alpha, fast_state, anchor, params, slow_params -> fast_state, anchor
    at_sync: Callable[..., tuple[optax.OptState, Any]]


def policy(
    inner_state: InnerState, inner: optax.GradientTransformationExtraArgs
) -> Policy:
    """Returns what the argument `inner_state` stands for."""
    if inner_state == "interpolate":
        return _interpolation(inner)
    if inner_state == "keep":
        return Policy(_no_anchor, _keep)
    return _function(_reset if inner_state == "reset" else inner_state, inner)


def invalidate_linesearch_values(
    sync: jax.typing.ArrayLike, fast_state: optax.OptState
) -> Any:
    """Returns the state without the losses that line searches keep for the next step.

    They are those of parameters that a sync leaves. At an infinite one
    `optax.value_and_grad_from_state` computes loss and gradient anew.
    """
    searches = (
        optax.ScaleByBacktrackingLinesearchState,
        optax.ScaleByZoomLinesearchState,
    )

    def is_search(node: Any) -> bool:
        return isinstance(node, searches)

    def node(state: Any) -> Any:
        if not is_search(state):
            return state
        return state._replace(value=select(sync, jnp.inf, state.value))

    return jax.tree.map(node, fast_state, is_leaf=is_search)


def _keep(
    sync: Any, alpha: Any, fast_state: Any, anchor: Any, *_: Any
) -> tuple[Any, Any]:
    del sync, alpha
    return fast_state, anchor


def _no_anchor(fast_state: optax.OptState) -> Any:
    del fast_state
    return optax.EmptyState()


def _function(
    choose: Callable[[Any, Any], Any], inner: optax.GradientTransformationExtraArgs
) -> Policy:
    """Returns the policy of a function of the state and of a fresh one."""

    def at_sync(
        sync: Any, alpha: Any, fast_state: Any, anchor: Any, params: Any, slow: Any
    ) -> tuple[Any, Any]:
        del alpha
        fresh = inner.init(jax.tree.map(_rounded, params, slow))
        hint = ": pass zeros where a gradient is None"
        check_result("inner", "a state", fast_state, fresh, hint=hint)
        chosen = choose(fast_state, fresh)
        check_result("inner_state", "a state", chosen, fast_state, dtypes=True)
        return select(sync, chosen, fast_state), anchor

    return Policy(_no_anchor, at_sync)


def _rounded(p: Any, slow: Any) -> Any:
    """Returns the slow weight as its parameter holds it."""
    return jnp.asarray(slow, jnp.result_type(p)) if is_inexact(slow) else slow


# The fields that count training time, or that someone set: a reset leaves them alone,
# since a learning rate that warms up again in every cycle never leaves its warm-up.
_TIME_FIELDS = {
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
def _time_fields() -> dict[type, tuple[str, ...]]:
    # Scheduled weight decay has a state whose type Optax does not export. It is made
    # here, not on import, since that would settle JAX on its devices.
    decay = type(optax.add_decayed_weights(lambda count: 0.0 * count).init(()))
    return {**_TIME_FIELDS, decay: ("count",)}


def _reset(state: optax.OptState, fresh: optax.OptState) -> optax.OptState:
    """Returns the fresh state, with training time left as it is."""
    fields = _time_fields()

    def node(old: Any, new: Any) -> Any:
        kept = fields.get(type(old))
        if kept is None:
            return new
        return old._replace(
            **{
                name: _reset(getattr(old, name), getattr(new, name))
                for name in old._fields
                if name not in kept
            }
        )

    return jax.tree.map(node, state, fresh, is_leaf=lambda x: type(x) in fields)


def _interpolation(inner: optax.GradientTransformationExtraArgs) -> Policy:
    """Returns the policy that moves the inner state as the slow weights move."""

    def init(fast_state: Any) -> Any:
        return jax.tree.map(copy, _like_params(inner, fast_state))

    def at_sync(
        sync: Any, alpha: Any, fast_state: Any, anchor: Any, *_: Any
    ) -> tuple[Any, Any]:
        def leaf(now: Any, old: Any) -> Any:
            if not is_inexact(now):
                return now
            old = jnp.asarray(old, now.dtype)
            moved = jnp.asarray(alpha, now.dtype) * now
            moved += jnp.asarray(1 - alpha, now.dtype) * old
            # An infinite moment stays one, as under "keep".
            return jnp.where(sync & is_finite(moved), moved, now)

        now = _like_params(inner, fast_state)
        check_anchor(anchor, now)
        new = jax.tree.map(leaf, now, anchor)
        replacements = iter(new)
        fast_state = optax.tree.map_params(
            inner, lambda _: next(replacements), fast_state, is_leaf=lambda _: True
        )
        return fast_state, select(sync, new, anchor)

    return Policy(init, at_sync)


def _like_params(
    inner: optax.GradientTransformationExtraArgs, fast_state: optax.OptState
) -> tuple[Any, ...]:
    """Returns the trees in the state that are like the parameters, such as moments."""
    trees: list[Any] = []
    try:
        # With every one of those trees as a leaf.
        optax.tree.map_params(inner, trees.append, fast_state, is_leaf=lambda _: True)
    except Exception as error:  # of any kind: `inner.init` is given a placeholder
        raise ValueError(
            "`inner_state='interpolate'` must be able to tell what in the state of "
            "`inner` is like the parameters, got an error from "
            f"`optax.tree.map_params`: {error!r}. Write `inner_state='keep'` or "
            "`'reset'`."
        ) from error
    return tuple(trees)
