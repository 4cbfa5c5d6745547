"""Does every optimizer that Optax exports work inside?"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.optimizers import (
    EXCLUDED,
    EXPORTED,
    INPUTS,
    LABELS,
    NAMES,
    OTHERS,
    START,
    STEPS,
    TELLING,
    arguments,
    batch_loss,
    every_optimizer,
    make,
    telling_optimizers,
)
from helpers.trees import (
    assert_close,
    is_key,
    is_weakly_typed,
    shapes_and_dtypes,
    types,
)

from optax_lookahead import lookahead, slow_params

K, ALPHA = 3, 0.5
SEARCHES = ["backtracking_linesearch", "lbfgs"]
SCANNED = [*TELLING, "apply_if_finite", "lbfgs", "muon", "prodigy", "sophia"]


def lookahead_loop(name, transform, steps=STEPS):
    """Returns fast and slow weights and the state at every step, and all traces."""
    tx, traces = lookahead(make(name), K, ALPHA), []

    def train_step(params, state, step):
        traces.append(step)
        grads, extra = arguments(name, params, step)
        updates, state = tx.update(grads, state, params, **extra)
        params = optax.apply_updates(params, updates)
        return params, slow_params(state, params), state

    params = jax.tree.map(jnp.asarray, START)
    state, train_step = tx.init(params), transform(train_step)
    visited = [(params, params, state)]
    for step in range(steps):
        params, slow, state = train_step(params, state, jnp.asarray(step))
        visited.append((params, slow, state))
    return visited, traces


def algorithm_1(name):
    """Returns fast and slow weights and the inner state at every step, by hand."""
    inner = optax.with_extra_args_support(make(name))

    @jax.jit
    def inner_step(theta, state, step):
        grads, extra = arguments(name, theta, step)
        updates, state = inner.update(grads, state, theta, **extra)
        return optax.apply_updates(theta, updates), state

    phi = jax.tree.map(jnp.asarray, START)
    state = inner.init(phi)
    visited = [(phi, phi, state)]
    while len(visited) <= STEPS:
        theta = phi
        for _ in range(K):
            theta, state = inner_step(theta, state, jnp.asarray(len(visited) - 1))
            visited.append((theta, phi, state))
        phi = jax.tree.map(lambda phi, theta: phi + ALPHA * (theta - phi), phi, theta)
        if name in SEARCHES:
            # The loss that they keep is not that of the slow weights.
            state = optax.tree.set(state, value=jnp.float32(jnp.inf))
        visited[-1] = phi, phi, state
    return visited


@functools.cache
def jitted(name):
    return *lookahead_loop(name, jax.jit), algorithm_1(name)


def test_discovery_finds_the_optimizers_of_optax():
    assert len(NAMES) >= 57
    assert set(NAMES) >= {"sgd", "adam", "adamw", "lion", "nadam", "lbfgs", "adafactor"}
    assert set(NAMES) >= {"prodigy", "muon", "sophia", "schedule_free_adamw", "cocob"}
    # The tables above name no optimizer that is gone.
    assert EXCLUDED.keys() <= EXPORTED.keys()
    assert not OTHERS.keys() & EXPORTED.keys()


@every_optimizer
def test_fast_and_slow_weights_follow_algorithm_1_at_every_step(name):
    ours, _, by_hand = jitted(name)
    assert len(ours) == len(by_hand) == STEPS + 1
    for (params, slow, _), (theta, phi, _) in zip(ours, by_hand, strict=True):
        assert_close((params, slow), (theta, phi))
    # The weights move by far more than the tolerance.
    params, slow, _ = ours[K - 1]
    assert np.max(np.abs(params["w"] - slow["w"])) > 1e-3


@every_optimizer
def test_the_inner_state_is_kept_across_syncs_as_in_algorithm_1(name):
    ours, _, by_hand = jitted(name)
    for (_, _, state), (_, _, expected) in zip(ours, by_hand, strict=True):
        # Some states sum up differences that cancel.
        assert_close(state.fast_state, expected, tolerance=3e-4)


@every_optimizer
def test_the_state_keeps_its_structure_shapes_and_dtypes(name):
    ours, _, by_hand = jitted(name)
    _, _, start = ours[0]
    for (_, _, state), (_, _, inner) in zip(ours, by_hand, strict=True):
        assert shapes_and_dtypes(state) == shapes_and_dtypes(start)
        # With weak types, which trigger a retrace too.
        assert types(state._replace(fast_state=())) == types(
            start._replace(fast_state=())
        )
        assert types(state.fast_state) == types(inner)


@every_optimizer
def test_all_steps_share_one_trace(name):
    _, traces, by_hand = jitted(name)
    _, _, start = by_hand[0]
    # Optax's line searches start with weakly typed numbers, and the first step makes
    # them strong. That is a second trace with or without lookahead.
    assert len(traces) == (2 if is_weakly_typed(start) else 1)


@every_optimizer
def test_the_loss_stays_finite(name):
    inputs, labels = np.concatenate(INPUTS), np.concatenate(LABELS)
    for params, slow, _ in jitted(name)[0]:
        assert np.isfinite(batch_loss(params, inputs, labels))
        assert np.isfinite(batch_loss(slow, inputs, labels))


@pytest.mark.parametrize("name", SCANNED)
def test_one_scan_gives_the_weights_of_the_loop(name):
    tx = lookahead(make(name), K, ALPHA)

    def train_step(carry, step):
        params, state = carry
        grads, extra = arguments(name, params, step)
        updates, state = tx.update(grads, state, params, **extra)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, slow_params(state, params))

    start = jax.tree.map(jnp.asarray, START)
    carry = start, tx.init(start)
    _, stacked = jax.lax.scan(train_step, carry, jnp.arange(STEPS))
    for step, (params, slow, _) in enumerate(jitted(name)[0][1:]):
        assert_close(jax.tree.map(lambda x, i=step: x[i], stacked), (params, slow))


@telling_optimizers
def test_eager_steps_follow_algorithm_1_too(name):
    # To the first step after a sync: a second cycle would show nothing more.
    steps = K + 1
    ours, _ = lookahead_loop(name, lambda step: step, steps)
    # By hand as above, so that one of the two is compiled once.
    by_hand = jitted(name)[2][: steps + 1]
    for (params, slow, state), (theta, phi, inner) in zip(ours, by_hand, strict=True):
        assert_close((params, slow), (theta, phi))
        assert_close(state.fast_state, inner, tolerance=3e-4)


def test_among_the_inner_states_are_keys_flags_and_counters():
    # An average over the state, or arithmetic in place of `where`, would damage these.
    kinds = {}
    for name in NAMES:
        for leaf in jax.tree.leaves(jax.eval_shape(make(name).init, START)):
            kind = "key" if is_key(leaf) else leaf.dtype.name
            kinds.setdefault(kind, set()).add(name)
    assert "noisy_sgd_with_a_typed_key" in kinds["key"]
    assert "sophia" in kinds["uint32"]
    assert "apply_if_finite" in kinds["bool"]
    assert len(kinds["int32"]) > 20
