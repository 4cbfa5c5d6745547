"""The step that an outer optimizer takes with the slow weights."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from ._checks import check_extra_args, check_result
from ._state import InnerStep, LookaheadState, is_inexact, select


def init_outer(outer: optax.GradientTransformation, slow_params: Any) -> Any:
    """Returns the state of the outer optimizer at these slow weights."""
    return outer.init(hide_discrete(slow_params))


def split_args(extra_args: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the extra arguments of the inner optimizer, and those of the outer."""
    outer_args = extra_args.pop("outer_args", {})
    check_extra_args(extra_args, outer_args)
    return extra_args, extra_args | outer_args


def outer_step(
    outer: optax.GradientTransformationExtraArgs,
    pseudo_grads: Any,
    phi: Any,
    state: LookaheadState,
    inner_step: InnerStep,
    outer_args: dict[str, Any],
) -> tuple[Any, Any]:
    """Returns what `outer` adds to the slow weights at a sync, and its state."""
    sync = inner_step.sync
    # On other steps its result is dropped. Its gradient is then 1: many optimizers have
    # no derivative at 0, and 0 times an infinite derivative would be NaN.
    grads = jax.tree.map(lambda g: jnp.where(sync, g, jnp.ones_like(g)), pseudo_grads)
    slow_updates, outer_state = outer.update(
        grads,
        state.outer_state,
        params=hide_discrete(phi),
        **outer_args | {"inner_step": inner_step},
    )
    check_result("outer", "updates", slow_updates, grads)
    check_result("outer", "a state", outer_state, state.outer_state)
    return slow_updates, select(sync, outer_state, state.outer_state)


def hide_discrete(tree: Any) -> Any:
    """Returns the tree with `MaskedNode` for leaves that an optimizer cannot move."""
    return jax.tree.map(lambda x: x if is_inexact(x) else optax.MaskedNode(), tree)
