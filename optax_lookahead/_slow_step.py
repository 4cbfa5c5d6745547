"""The two slow steps: a fraction of the way, and a step of any optimizer."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ._results import check_outer_result
from ._state import (
    AverageReplicasState,
    InnerStep,
    LookaheadState,
    is_finite,
    is_inexact,
    select,
)
from ._validation import check_outer_args, check_reserved


class SlowStep(NamedTuple):
    """What happens to the slow weights at a sync."""

    init: Callable[[Any], Any]  # slow_params -> outer_state
    # extra_args -> those of the inner optimizer, those of the outer one
    split: Callable[[dict[str, Any]], tuple[dict[str, Any], dict[str, Any]]]
    # state, ways, inner_step, extra_args -> a slow update for each way, outer_state
    step: Callable[..., tuple[Any, Any]]


@dataclasses.dataclass(frozen=True)
class Fraction:
    """One parameter's slow update: a fraction alpha of its way. No pytree."""

    alpha: Any
    reached: Any = None  # as in `OuterUpdate`

    def from_fast(self, pseudo_grad: Any) -> Any:
        # Not `g - alpha * g`, which rounds twice.
        return jnp.asarray(1 - self.alpha, pseudo_grad.dtype) * pseudo_grad

    def from_slow(self, pseudo_grad: Any) -> Any:
        return jnp.asarray(-self.alpha, pseudo_grad.dtype) * pseudo_grad

    def only_finite(self, elements: Any, phi: Any, p: Any) -> Any:
        del phi, p
        return elements  # between two finite weights


@dataclasses.dataclass(frozen=True)
class OuterUpdate:
    """One parameter's slow update: what an outer optimizer returned. No pytree."""

    update: Any
    # For which elements other replicas had a weight to step to; None: not averaged.
    reached: Any = None

    def from_fast(self, pseudo_grad: Any) -> Any:
        return pseudo_grad + jnp.asarray(self.update, pseudo_grad.dtype)

    def from_slow(self, pseudo_grad: Any) -> Any:
        del pseudo_grad
        return self.update

    def only_finite(self, elements: Any, phi: Any, p: Any) -> Any:
        return elements & is_finite(phi + jnp.asarray(self.update, phi.dtype), p)


SlowUpdate = Fraction | OuterUpdate


def fraction(alpha: optax.ScalarOrSchedule) -> SlowStep:
    """Returns the paper's slow step, a fraction alpha of the way."""

    def step(
        state: LookaheadState,
        ways: Any,
        inner_step: InnerStep,
        extra_args: dict[str, Any],
    ) -> tuple[Any, Any]:
        del inner_step, extra_args
        update = Fraction(alpha(state.sync_count) if callable(alpha) else alpha)
        return jax.tree.map(lambda _: update, ways), state.outer_state

    return SlowStep(
        init=lambda _: optax.EmptyState(),
        split=lambda extra_args: (extra_args, {}),
        step=step,
    )


def by_optimizer(outer: optax.GradientTransformation) -> SlowStep:
    """Returns the slow step that `outer` takes, with the way back as its gradient."""
    outer = optax.with_extra_args_support(outer)

    def init(slow_params: Any) -> Any:
        return outer.init(_hide_discrete(slow_params))

    def split(
        extra_args: dict[str, Any],
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        outer_args = extra_args.pop("outer_args", {})
        check_outer_args(outer_args)
        check_reserved(extra_args | outer_args, InnerStep)
        return extra_args, extra_args | outer_args

    def step(
        state: LookaheadState,
        ways: Any,
        inner_step: InnerStep,
        extra_args: dict[str, Any],
    ) -> tuple[Any, Any]:
        # On other steps its result is dropped. What it is given there is 1, since many
        # optimizers have no derivative at 0, where 0 times infinity would be a NaN.
        pseudo_grads = jax.tree.map(lambda way: way.pseudo_grad, ways)
        grads = jax.tree.map(lambda g: jnp.where(inner_step.sync, g, 1), pseudo_grads)
        slow_params = _hide_discrete(jax.tree.map(lambda way: way.phi, ways))
        updates, outer_state = outer.update(
            grads,
            state.outer_state,
            params=slow_params,
            **extra_args | {"inner_step": inner_step},
        )
        outer_state, reached = _take_reached(outer_state)
        check_outer_result("updates", updates, grads)
        check_outer_result("a state", outer_state, state.outer_state)
        slow_updates = jax.tree.map_with_path(
            lambda path, _, u: OuterUpdate(u, reached.get(path)), ways, updates
        )
        finite = jax.tree.map(lambda way, x: way.arrives(x), ways, slow_updates)
        return slow_updates, _select_elements(
            inner_step.sync, finite, outer_state, state.outer_state
        )

    return SlowStep(init, split, step)


def _take_reached(outer_state: Any) -> tuple[Any, dict[Any, Any]]:
    """Returns the state without what `average_replicas` found, and that, by path."""
    reached: dict[Any, Any] = {}

    def is_average(node: Any) -> bool:
        return isinstance(node, AverageReplicasState)

    def node(state: Any) -> Any:
        if not is_average(state):
            return state
        reached.update(jax.tree.leaves_with_path(state.reached))
        return AverageReplicasState()

    return jax.tree.map(node, outer_state, is_leaf=is_average), reached


def _select_elements(sync: Any, finite: Any, new: Any, old: Any) -> Any:
    """Returns the new outer state at a sync, and the old where that is not finite."""
    by_path = dict(jax.tree.leaves_with_path(finite))

    def leaf(path: Any, new: Any, old: Any) -> Any:
        # Like a parameter is what has its shape, and its path as the end of its own.
        ends = (by_path.get(path[i:]) for i in range(len(path) + 1))
        if is_inexact(old):
            for mask in ends:
                if mask is not None and mask.shape == jnp.shape(old):
                    return select(sync & mask, new, old)
        return select(sync, new, old)

    return jax.tree.map_with_path(leaf, new, old)


def _hide_discrete(tree: Any) -> Any:
    """Returns the tree with what an optimizer cannot move hidden, as Optax hides it."""
    return jax.tree.map(lambda x: x if is_inexact(x) else optax.MaskedNode(), tree)
