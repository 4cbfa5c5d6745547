"""The optimizers that the benchmarks compare: alone, and inside lookahead."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from timing import Program

from optax_lookahead import lookahead, outer_loop

ALPHA = 0.5
INNERS: dict[str, optax.GradientTransformation] = {
    "sgd": optax.sgd(1e-3),
    "momentum": optax.sgd(1e-3, momentum=0.9),
    "adam": optax.adam(1e-3),
    "adamw": optax.adamw(1e-3),
    "lion": optax.lion(1e-3),
    "adafactor": optax.adafactor(1e-3),
}


def synced(u, p, phi):
    """Returns the update of a step that syncs, and the new slow weight."""
    new = phi + jnp.asarray(ALPHA, phi.dtype) * (p + u - phi)
    return new - p, new


def naive(
    inner: optax.GradientTransformation,
    k: int,
    choose: Callable[[jax.Array, list, list, list], Any],
) -> optax.GradientTransformation:
    """Returns a naive lookahead; `choose` selects a step with a sync or one without."""

    def update(updates, state, params=None):
        inner_state, slow, step = state
        updates, inner_state = inner.update(updates, inner_state, params)
        us, treedef = jax.tree.flatten(updates)
        ps, phis = jax.tree.leaves(params), jax.tree.leaves(slow)
        us, phis = choose(step + 1 == k, us, ps, phis)
        slow = treedef.unflatten(phis)
        return treedef.unflatten(us), (inner_state, slow, (step + 1) % k)

    return optax.GradientTransformation(naive_init(inner), update)


def naive_init(inner: optax.GradientTransformation) -> Callable[[Any], Any]:
    def init(params):
        slow = jax.tree.map(jnp.copy, params)
        return inner.init(params), slow, jnp.zeros([], jnp.int32)

    return init


def where(sync, us, ps, phis):
    new = [synced(*leaf) for leaf in zip(us, ps, phis, strict=True)]
    return (
        [jnp.where(sync, n, u) for (n, _), u in zip(new, us, strict=True)],
        [jnp.where(sync, n, phi) for (_, n), phi in zip(new, phis, strict=True)],
    )


def cond(sync, us, ps, phis):
    def at_sync(us, ps, phis):
        new = [synced(*leaf) for leaf in zip(us, ps, phis, strict=True)]
        return [u for u, _ in new], [phi for _, phi in new]

    return jax.lax.cond(sync, at_sync, lambda us, _, phis: (us, phis), us, ps, phis)


class LoopCond:
    """`lax.cond` in the training loop, after the parameters were updated.

    A transformation cannot do this without storing the updates.
    """

    def __init__(self, inner: optax.GradientTransformation, k: int):
        self.inner, self.k = inner, k
        self.init = naive_init(inner)

    def apply(self, grads, state, params):
        inner_state, slow, step = state
        updates, inner_state = self.inner.update(grads, inner_state, params)
        params = optax.apply_updates(params, updates)

        def at_sync(params, slow):
            slow = jax.tree.map(lambda p, phi: phi + ALPHA * (p - phi), params, slow)
            return slow, slow

        params, slow = jax.lax.cond(
            step + 1 == self.k, at_sync, lambda *old: old, params, slow
        )
        return params, (inner_state, slow, (step + 1) % self.k)


ALONE, OURS, UPSTREAM = "inner alone", "optax_lookahead", "optax.lookahead"
NESTEROV, WIDE = f"{OURS}, Nesterov outer", f"{OURS}, float32 slow"
WHERE, COND, LOOP_COND = "naive where", "lax.cond", "lax.cond in the loop"
# Each takes an inner optimizer and k.
FORMS: dict[str, Callable[[optax.GradientTransformation, int], Any]] = {
    ALONE: lambda inner, _: inner,
    OURS: lambda inner, k: lookahead(inner, k, ALPHA),
    WIDE: lambda inner, k: lookahead(inner, k, ALPHA, slow_dtype="float32"),
    NESTEROV: lambda inner, k: outer_loop(
        inner, optax.sgd(0.7, momentum=0.9, nesterov=True), k
    ),
    UPSTREAM: lambda inner, k: optax.lookahead(inner, k, ALPHA),
    WHERE: lambda inner, k: naive(inner, k, where),
    COND: lambda inner, k: naive(inner, k, cond),
    LOOP_COND: LoopCond,
}
# `lookahead` with other policies for the inner state at a sync.
RESET, INTERPOLATE = f"{OURS}, reset", f"{OURS}, interpolate"
POLICIES: dict[str, Callable[[optax.GradientTransformation, int], Any]] = {
    RESET: lambda inner, k: lookahead(inner, k, ALPHA, inner_state="reset"),
    INTERPOLATE: lambda inner, k: lookahead(inner, k, ALPHA, inner_state="interpolate"),
}
ALL = FORMS | POLICIES


class Form:
    """One form of an optimizer, with the methods that a training step calls."""

    def __init__(self, name: str, tx: Any):
        self.name, self.tx = name, tx

    def init(self, params: Any) -> tuple[Any, Any]:
        """Returns parameters and state, which may be donated together."""
        if self.name == UPSTREAM:
            params = optax.LookaheadParams.init_synced(params)
        params = jax.tree.map(jnp.copy, params)
        return params, self.tx.init(params)

    def fast(self, params: Any) -> Any:
        """Returns the parameters that gradients are taken at."""
        return params.fast if self.name == UPSTREAM else params

    def apply(self, grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        """Returns the next parameters and state."""
        if self.name == LOOP_COND:
            return self.tx.apply(grads, state, params)
        updates, state = self.tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state


def optimizer_step(form: Form, params: Any, grads: Any) -> Program:
    """Returns the optimizer step alone: the gradients are given."""

    def step(carry, grads):
        params, state = carry
        return form.apply(grads, state, params)

    return Program(step, form.init(params), grads)


def tree(leaves: int, size: int, dtype: Any, seed: int) -> list[jax.Array]:
    """Returns a tree of normal floats."""
    keys = jax.random.split(jax.random.key(seed), leaves)
    normal = jax.jit(jax.random.normal, static_argnums=(1, 2))
    return [normal(key, (size,), dtype) for key in keys]
