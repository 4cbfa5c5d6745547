"""What a sync does to the inner optimizer's state."""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ._checks import check_anchor, check_result
from ._extrapolation import ExtrapolationState
from ._state import LookaheadState, copy, is_finite, is_inexact, select

InnerState = (
    Literal["keep", "reset", "interpolate"]
    | Callable[[optax.OptState, optax.OptState], optax.OptState]
)


class Policy(NamedTuple):
    """What is stored from sync to sync, and what a sync does to the inner state."""

    init: Callable[[optax.OptState], Any]  # fast_state -> anchor
    # sync, alpha, fast_state, anchor, params, slow_params() -> fast_state, anchor
    at_sync: Callable[..., tuple[optax.OptState, Any]]


def policy(
    inner_state: InnerState, inner: optax.GradientTransformationExtraArgs
) -> Policy:
    """Returns the policy that the argument `inner_state` asks for."""
    if inner_state == "interpolate":
        return _interpolation(inner)
    if inner_state == "keep":
        return Policy(_no_anchor, _keep)
    if inner_state == "reset":
        return _function(_reset, inner)
    return _function(inner_state, inner, check_dtypes=True)


def invalidate_linesearch_values(
    sync: jax.typing.ArrayLike, fast_state: optax.OptState
) -> Any:
    """Returns the state without the losses that line searches keep for the next step.

    They are losses at the parameters, which a sync moves. Where a loss is infinite,
    `optax.value_and_grad_from_state` computes loss and gradient again.
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
    choose: Callable[[Any, Any], Any],
    inner: optax.GradientTransformationExtraArgs,
    *,
    check_dtypes: bool = False,
) -> Policy:
    """Returns the policy for a function of the state and of a fresh one."""

    def at_sync(
        sync: Any, alpha: Any, fast_state: Any, anchor: Any, params: Any, slow: Any
    ) -> tuple[Any, Any]:
        del alpha
        fresh = inner.init(jax.tree.map(_rounded, params, slow()))
        hint = ": pass zeros where a gradient is None"
        check_result("inner", "a state", fast_state, fresh, hint=hint)
        chosen = choose(fast_state, fresh)
        # Not for a reset: some of Optax's scalars have another dtype after an update.
        check_result("inner_state", "a state", chosen, fast_state, dtypes=check_dtypes)
        return select(sync, chosen, fast_state), anchor

    return Policy(_no_anchor, at_sync)


def _rounded(p: Any, slow: Any) -> Any:
    """Returns the slow weight in the dtype of its parameter."""
    return jnp.asarray(slow, jnp.result_type(p)) if is_inexact(slow) else slow


# Fields that count training time or that users set. A reset keeps them: a learning rate
# whose warm-up starts again in every cycle never gets past it.
_TIME_FIELDS = {
    ExtrapolationState: ("step_count",),
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
    # Optax does not export the type of scheduled weight decay's state. Such a state is
    # made here, not on import, since making one initializes JAX's devices.
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


# Fields that are like the parameters but not moments, by the name of the state's type,
# since not every version of Optax has or exports all of them. `"interpolate"` does not
# change them: an average of two of their values is meaningless. Weights that an
# optimizer stores and steps from, such as `z` of schedule-free, are not listed: they
# are interpolated as the slow weights are.
_NOT_MOMENTS = {
    # Gradients still to be applied: an average would apply a part of them twice.
    "AccumulateAvgUpdatesState": ("avg_grad",),
    "ApplyEvery": ("grad_acc",),
    "MultiStepsState": ("acc_grads",),
    "PerElementMeanAndSumSqDiffGradsState": ("mean_grads", "sum_sq_diff_grads"),
    # Values of the last step, to be compared with those of the next one.
    "ScaleByAdanState": ("g",),
    "ScaleByOptimisticGradientState": ("previous_gradient",),
    "ScaleByRpropState": ("prev_updates",),
    # The last parameters and updates, differences of earlier ones, and their products.
    "ScaleByLBFGSState": (
        "params",
        "updates",
        "diff_params_memory",
        "diff_updates_memory",
        "weights_memory",
    ),
    # An orthonormal basis.
    "GaLoreState": ("projector",),
    # The initial parameters, which do not change: an average would only round them.
    "COCOBState": ("init_particles",),
    "DoGState": ("init_params",),
    "DoWGState": ("init_params",),
    "MadgradState": ("x0",),
    "MechanicState": ("x0",),
    # Parts of estimates of distance. The other parts are scalars, which are kept too.
    "DAdaptAdamWState": ("grad_sum",),
    "ProdigyState": ("grad_sum", "params0"),
    "ScaleByDistanceOverGradientsState": (
        "max_dist",
        "grad_sum_of_squares",
        "init_params",
    ),
    # Measurements for users to read.
    "MonitorState": ("measurements", "measure_states"),
    "SnapshotState": ("measurement",),
}


def _non_moment_fields(node: Any) -> tuple[str, ...]:
    if not type(node).__module__.startswith("optax."):
        return ()
    return _NOT_MOMENTS.get(type(node).__name__, ())


def _without_non_moments(state: optax.OptState) -> Any:
    """Returns the state with 0 in place of each field that is not a moment."""

    def node(x: Any) -> Any:
        hidden = _non_moment_fields(x)
        if not hidden:
            return x
        return x._replace(
            **{
                name: 0 if name in hidden else _without_non_moments(getattr(x, name))
                for name in x._fields
            }
        )

    def has_some(x: Any) -> bool:
        return bool(_non_moment_fields(x))

    return jax.tree.map(node, state, is_leaf=has_some)


def _interpolation(inner: optax.GradientTransformationExtraArgs) -> Policy:
    """Returns the policy that interpolates moments as a sync does the weights."""

    def init(fast_state: Any) -> Any:
        return jax.tree.map(copy, moments(inner.init, fast_state))

    def at_sync(
        sync: Any, alpha: Any, fast_state: Any, anchor: Any, *_: Any
    ) -> tuple[Any, Any]:
        def leaf(now: Any, old: Any) -> Any:
            if not is_inexact(now):
                return now
            old = jnp.asarray(old, now.dtype)
            moved = jnp.asarray(alpha, now.dtype) * now
            moved += jnp.asarray(1 - alpha, now.dtype) * old
            # A moment that is not finite stays so, as under "keep".
            return jnp.where(sync & is_finite(moved), moved, now)

        now = moments(inner.init, fast_state)
        check_anchor(anchor, now)
        new = jax.tree.map(leaf, now, anchor)
        replacements = iter(new)
        fast_state = _map_moments(inner.init, lambda _: next(replacements), fast_state)
        return fast_state, select(sync, new, anchor)

    return Policy(init, at_sync)


def moments(
    init: Callable[[optax.Params], optax.OptState], fast_state: optax.OptState
) -> tuple[Any, ...]:
    """Returns the moments in the state, each a tree like the parameters."""
    trees: list[Any] = []
    try:
        _map_moments(init, trees.append, fast_state)
    except Exception as error:  # of any kind: `inner.init` is given a placeholder
        raise ValueError(
            "`inner_state='interpolate'` must be able to find the trees in the state "
            "of `inner` that are like the parameters, got an error from "
            f"`optax.tree.map_params`: {error!r}. Write `inner_state='keep'` or "
            "`'reset'`."
        ) from error
    return tuple(trees)


def _map_moments(
    init: Callable[[optax.Params], optax.OptState],
    function: Callable[[Any], Any],
    fast_state: optax.OptState,
) -> Any:
    return optax.tree.map_params(
        lambda params: _without_non_moments(init(params)),
        function,
        fast_state,
        is_leaf=lambda _: True,  # each tree that is like the parameters as one leaf
    )
