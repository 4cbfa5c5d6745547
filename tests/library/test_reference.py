"""Does the transformation compute Algorithm 1?"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import reference
from helpers.noisy_problem import START, gradient, numpy_gradient, to_tree, to_vector
from helpers.rows import slow_but
from helpers.training import scanned, trajectory

from optax_lookahead import lookahead, slow_params

OPTIMIZERS = {
    "sgd": (optax.sgd(0.1), reference.sgd(0.1)),
    "momentum": (optax.sgd(0.05, momentum=0.9), reference.momentum(0.05, 0.9)),
    "adam": (optax.adam(0.1), reference.adamw(0.1)),
    "adamw": (
        optax.adamw(0.1, weight_decay=0.01),
        reference.adamw(0.1, weight_decay=0.01),
    ),
}


def assert_equals_reference(visited, inner, k, alpha):
    cycles = len(visited) // k
    expected = reference.lookahead(inner, numpy_gradient, START, k, alpha, cycles)
    for (params, state), (theta, phi) in zip(visited, expected, strict=True):
        np.testing.assert_allclose(to_vector(params), theta, rtol=1e-12, atol=1e-14)
        for slow in (state.slow_params, slow_params(state, params)):
            np.testing.assert_allclose(to_vector(slow), phi, rtol=1e-12, atol=1e-14)


PAIRS = [(k, alpha) for k in (1, 2, 5, 7) for alpha in (0.2, 0.5, 0.8, 1.0)]
# Every k and every alpha, but not every pair, since they hardly interact.
FEW = [(1, 0.5), (2, 0.2), (5, 0.8), (7, 1.0)]


@pytest.mark.parametrize(("k", "alpha"), slow_but(FEW, PAIRS))
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_params_and_slow_weights_follow_algorithm_1_at_every_step(x64, name, k, alpha):
    inner, inner_reference = OPTIMIZERS[name]
    steps = -(-40 // k) * k
    tx, params = lookahead(inner, k, alpha), to_tree(jnp.asarray(START))
    visited = trajectory(tx, params, gradient, steps, jax.jit)
    assert_equals_reference(visited, inner_reference, k, lambda t: alpha)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_eager_and_scanned_loops_follow_algorithm_1_too(x64, name):
    inner, inner_reference = OPTIMIZERS[name]
    tx, params = lookahead(inner, 5, 0.8), to_tree(jnp.asarray(START))
    eager = trajectory(tx, params, gradient, 40)
    assert_equals_reference(eager, inner_reference, 5, lambda t: 0.8)
    stacked = scanned(tx, params, gradient, 40)
    in_scan = [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(40)]
    assert_equals_reference(in_scan, inner_reference, 5, lambda t: 0.8)


def test_traced_k_and_alpha_give_every_pair_in_one_compile(x64):
    inner, inner_reference = OPTIMIZERS["adam"]
    traces = []

    @jax.jit
    @jax.vmap
    def train(k, alpha):
        traces.append(k)
        tx = lookahead(inner, k, alpha)
        return scanned(tx, to_tree(jnp.asarray(START)), gradient, 40)

    pairs = [(1, 0.2), (2, 0.5), (5, 0.8), (8, 1.0)]
    ks, alphas = zip(*pairs, strict=True)
    runs = train(jnp.asarray(ks), jnp.asarray(alphas))
    assert len(traces) == 1
    for run, (k, alpha) in enumerate(pairs):
        visited = [
            jax.tree.map(lambda x, run=run, i=i: x[run, i], runs) for i in range(40)
        ]
        assert_equals_reference(visited, inner_reference, k, lambda t, a=alpha: a)


def test_an_alpha_schedule_sees_the_number_of_completed_syncs(x64):
    inner, inner_reference = OPTIMIZERS["momentum"]
    # Numbers that float32, in which Optax computes schedules, holds exactly.
    schedule = optax.linear_schedule(1.0, 0.25, transition_steps=4)
    tx, params = lookahead(inner, 5, schedule), to_tree(jnp.asarray(START))
    visited = trajectory(tx, params, gradient, 40, jax.jit)
    assert_equals_reference(
        visited, inner_reference, 5, lambda t: 1.0 - 0.75 * min(t, 4) / 4
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_agrees_with_optax_lookahead_where_that_works(x64, name):
    inner, _ = OPTIMIZERS[name]
    params = to_tree(jnp.asarray(START))
    ours = trajectory(lookahead(inner, 3, 0.4), params, gradient, 30)
    theirs = trajectory(
        optax.lookahead(inner, sync_period=3, slow_step_size=0.4),
        optax.LookaheadParams.init_synced(params),
        lambda pair, step: gradient(pair.fast, step),
        30,
    )
    for (params, state), (pair, _) in zip(ours, theirs, strict=True):
        fast, slow = to_vector(pair.fast), to_vector(pair.slow)
        np.testing.assert_allclose(to_vector(params), fast, rtol=1e-12)
        np.testing.assert_allclose(to_vector(state.slow_params), slow, rtol=1e-12)


def test_hand_worked_trajectory():
    # The gradient is 1 and the learning rate 1. From 0, cycles of 3, alpha 1/2:
    # 0 -> -1 -> -2 -> -3, whose mean with 0 is -1.5 -> -2.5 -> -3.5 -> -4.5, whose mean
    # with -1.5 is -3.
    visited = trajectory(
        lookahead(optax.sgd(1.0), k=3, alpha=0.5),
        jnp.array(0.0),
        lambda params, step: jnp.ones_like(params),
        6,
    )
    assert [float(p) for p, _ in visited] == [-1.0, -2.0, -1.5, -2.5, -3.5, -3.0]
    assert [float(s.slow_params) for _, s in visited] == [0, 0, -1.5, -1.5, -1.5, -3]


@pytest.mark.parametrize("name", ["sgd", "momentum", "adam", "lion"])
@pytest.mark.parametrize(("k", "alpha"), [(1, 0.3), (4, 0.5), (3, 0.9)])
def test_slow_weights_are_an_average_of_the_ends_of_the_cycles(x64, name, k, alpha):
    # alpha (theta_t + (1 - alpha) theta_{t-1} + ...) + (1 - alpha)^t theta_0
    inner = optax.lion(0.05) if name == "lion" else OPTIMIZERS[name][0]
    params = to_tree(jnp.asarray(START))
    tx, state = lookahead(inner, k, alpha), None
    state, ends = tx.init(params), [START]
    for step in range(5 * k):
        grads = gradient(params, step)
        # The inner optimizer's own step, which on the k-th is not the one taken.
        own, _ = inner.update(grads, state.fast_state, params)
        end = to_vector(optax.apply_updates(params, own))
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        if (step + 1) % k == 0:
            ends.append(end)
            t = len(ends) - 1
            weights = alpha * (1 - alpha) ** np.arange(t)[::-1]
            expected = weights @ np.stack(ends[1:]) + (1 - alpha) ** t * START
            np.testing.assert_allclose(
                to_vector(state.slow_params), expected, rtol=1e-12, atol=1e-12
            )
