"""When does a cycle start and end, and what does it start from?"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.training import trajectory

from optax_lookahead import lookahead, slow_params


def gradient(params, step):
    return params - jnp.cos(step + params)


PARAMS = jnp.array([1.0, -2.0, 0.5])


@pytest.mark.parametrize("k", [1, 2, 5])
def test_slow_weights_move_at_every_kth_step_and_at_no_other(k):
    visited = trajectory(lookahead(optax.adam(0.1), k, 0.5), PARAMS, gradient, 4 * k)
    before = PARAMS
    for step, (params, state) in enumerate(visited, start=1):
        if step % k == 0:
            assert not np.any(np.asarray(state.slow_params) == np.asarray(before))
            np.testing.assert_array_equal(state.slow_params, params)
        else:
            np.testing.assert_array_equal(state.slow_params, before)
        before = state.slow_params


def test_the_first_sync_is_step_k_and_pulls_towards_the_initial_parameters():
    inner = trajectory(optax.adam(0.1), PARAMS, gradient, 5)
    ours = trajectory(lookahead(optax.adam(0.1), 5, 0.5), PARAMS, gradient, 5)
    for (fast, _), (params, _) in zip(inner[:4], ours[:4], strict=True):
        np.testing.assert_array_equal(params, fast)
    fast = inner[4][0]
    np.testing.assert_allclose(ours[4][0], (PARAMS + fast) / 2, rtol=1e-6)


def test_counters_count_steps_of_the_cycle_and_completed_cycles():
    visited = trajectory(lookahead(optax.sgd(0.1), 3, 0.5), PARAMS, gradient, 7)
    assert [int(s.steps_since_sync) for _, s in visited] == [1, 2, 0, 1, 2, 0, 1]
    assert [int(s.sync_count) for _, s in visited] == [0, 0, 1, 1, 1, 2, 2]


def test_sync_count_saturates_instead_of_wrapping_round():
    tx = lookahead(optax.sgd(0.1), k=1)
    last = np.iinfo(np.int32).max
    state = tx.init(PARAMS)._replace(sync_count=jnp.asarray(last, jnp.int32))
    _, state = tx.update(PARAMS, state, PARAMS)
    assert state.sync_count == last


def test_weights_loaded_after_init_are_where_the_first_cycle_starts():
    tx = lookahead(optax.sgd(0.1), 2, 0.5)
    state, params = tx.init(PARAMS), PARAMS + 100.0
    fast = params
    for step in range(2):
        updates, state = tx.update(gradient(params, step), state, params)
        fast = fast - 0.1 * gradient(fast, step)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params, (PARAMS + 100.0 + fast) / 2, rtol=1e-6)


def test_weights_changed_after_a_sync_are_where_the_next_cycle_starts():
    tx = lookahead(optax.sgd(0.1), 2, 0.5)
    params, state = trajectory(tx, PARAMS, gradient, 2)[-1]
    params = jnp.clip(params, -0.5, 0.5)
    np.testing.assert_array_equal(slow_params(state, params), params)
    _, state = tx.update(gradient(params, 2), state, params)
    np.testing.assert_array_equal(state.slow_params, params)


def test_weights_changed_within_a_cycle_leave_its_slow_weights_alone():
    tx = lookahead(optax.sgd(0.1), 3, 0.5)
    params, state = trajectory(tx, PARAMS, gradient, 1)[-1]
    _, state = tx.update(gradient(params, 1), state, params * 7.0)
    np.testing.assert_array_equal(state.slow_params, PARAMS)


def test_a_k_lowered_in_mid_cycle_syncs_at_the_next_step():
    @jax.jit
    def update(k, state, params):
        return lookahead(optax.sgd(0.1), k, 0.5).update(params, state, params)

    state = lookahead(optax.sgd(0.1)).init(PARAMS)
    for _ in range(4):
        _, state = update(5, state, PARAMS)
    _, state = update(2, state, PARAMS)
    assert state.steps_since_sync == 0
    assert state.sync_count == 1


@pytest.mark.parametrize("k", [0, -3])
def test_a_traced_k_below_one_syncs_at_every_step(k):
    @jax.jit
    def update(k, state, params):
        return lookahead(optax.sgd(0.1), k, 0.5).update(params, state, params)

    _, state = update(k, lookahead(optax.sgd(0.1)).init(PARAMS), PARAMS)
    assert state.steps_since_sync == 0
    assert state.sync_count == 1


def test_a_nested_lookahead_restarts_its_inner_slow_weights_at_the_outer_sync():
    inner = lookahead(optax.sgd(0.1), 2, 0.5)
    tx = lookahead(inner, 4, 0.5)
    visited = trajectory(tx, PARAMS, gradient, 5)
    after_sync, (_, state) = visited[3][0], visited[4]
    np.testing.assert_array_equal(state.fast_state.slow_params, after_sync)
    np.testing.assert_array_equal(state.slow_params, after_sync)
    alone = trajectory(inner, PARAMS, gradient, 4)[-1][0]
    np.testing.assert_allclose(after_sync, (PARAMS + alone) / 2, rtol=1e-6)
