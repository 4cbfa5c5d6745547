"""Is a sync selected, so that nothing leaks from the branch not taken?"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.training import trajectory

from optax_lookahead import lookahead, slow_params

PARAMS = jnp.array([1.0, -2.0, 0.5])


def faulty_gradient(value):
    """Returns gradients that are `value` at step 1, inside the first cycle."""
    return lambda params, step: jnp.where(step == 1, value, params)


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize(
    "inner", [optax.sgd(0.1), optax.adam(0.1)], ids=["sgd", "adam"]
)
def test_a_bad_step_inside_a_cycle_never_reaches_the_slow_weights(inner, value):
    visited = trajectory(
        lookahead(inner, 4, 0.5), PARAMS, faulty_gradient(value), 3, jax.jit
    )
    params, state = visited[-1]
    assert not np.all(np.isfinite(params)), "the test must break the fast weights"
    np.testing.assert_array_equal(state.slow_params, PARAMS)
    np.testing.assert_array_equal(slow_params(state, params), PARAMS)


def test_training_continues_from_the_slow_weights_after_a_bad_step():
    tx = lookahead(optax.sgd(0.1), 4, 0.5)
    params, state = trajectory(tx, PARAMS, faulty_gradient(jnp.nan), 2)[-1]
    params = slow_params(state, params)
    for _ in range(2):
        updates, state = tx.update(params, state, params)
        params = optax.apply_updates(params, updates)
    assert state.sync_count == 1
    np.testing.assert_allclose(params, PARAMS * (1 + 0.9**2) / 2, rtol=1e-6)


def test_an_overflowing_fast_step_in_half_precision_never_reaches_the_slow_weights():
    params = PARAMS.astype(jnp.float16)
    visited = trajectory(
        lookahead(optax.sgd(60000.0), 3, 0.5), params, lambda p, step: p * 4, 1
    )
    assert np.any(np.isinf(visited[-1][0])), "the test must overflow"
    np.testing.assert_array_equal(visited[-1][1].slow_params, params)


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_bad_slow_weights_never_reach_the_updates_of_other_steps(value):
    inner = optax.adam(0.1)
    tx = lookahead(inner, 5, 0.5)
    params, state = trajectory(tx, PARAMS, lambda p, step: p, 2)[-1]
    state = state._replace(slow_params=jnp.full_like(PARAMS, value))
    expected, _ = inner.update(params, state.fast_state, params)
    updates, _ = tx.update(params, state, params)
    np.testing.assert_array_equal(updates, expected)


@pytest.mark.parametrize("k", [1, 3])
def test_bad_slow_weights_of_a_finished_cycle_are_never_read(k):
    tx = lookahead(optax.sgd(0.1), k, 0.5)
    state = tx.init(PARAMS)
    updates, good = tx.update(PARAMS, state, PARAMS)
    bad = state._replace(slow_params=jnp.full_like(PARAMS, jnp.nan))
    bad_updates, bad = tx.update(PARAMS, bad, PARAMS)
    np.testing.assert_array_equal(bad_updates, updates)
    np.testing.assert_array_equal(bad.slow_params, good.slow_params)


def test_updates_between_syncs_are_the_inner_optimizers_own():
    inner = optax.adam(0.1)
    tx = lookahead(inner, 3, 0.5)
    state, params = tx.init(PARAMS), PARAMS
    for step in range(9):
        expected, _ = inner.update(params, state.fast_state, params)
        updates, state = tx.update(params, state, params)
        if (step + 1) % 3:
            np.testing.assert_array_equal(updates, expected)
        params = optax.apply_updates(params, updates)


def dtypes(tree):
    return jax.tree.map(jnp.result_type, tree)


def test_integer_and_bool_parameters_take_the_inner_step_and_slow_follows():
    params = {
        "count": jnp.array([2**24 + 1, 7], jnp.int32),
        "flag": jnp.array([True, False]),
        "w": jnp.array([1.0]),
    }
    tx = lookahead(optax.identity(), 2, 0.5)
    updates = {
        "count": jnp.array([1, -1], jnp.int32),
        "flag": jnp.array([False, False]),
        "w": jnp.array([1.0]),
    }
    state = tx.init(params)
    for _ in range(2):
        new_updates, state = tx.update(updates, state, params)
        params = optax.apply_updates(params, new_updates)
        assert dtypes(state.slow_params) == dtypes(params)
    np.testing.assert_array_equal(params["count"], [2**24 + 3, 5])
    np.testing.assert_array_equal(params["flag"], [True, False])
    np.testing.assert_array_equal(params["w"], [2.0])
    jax.tree.map(np.testing.assert_array_equal, state.slow_params, params)


def test_an_integer_parameter_with_floating_updates_takes_the_inner_step():
    tx, params = lookahead(optax.sgd(1.0), 2, 0.5), jnp.array([9, -9], jnp.int32)
    visited = trajectory(tx, params, lambda params, step: jnp.full(2, 2.0), 4)
    for steps, (params, _) in enumerate(visited, start=1):
        np.testing.assert_array_equal(params, [9 - 2 * steps, -9 - 2 * steps])
    np.testing.assert_array_equal(visited[-1][1].slow_params, visited[-1][0])


def test_random_keys_and_parameters_without_an_update_survive():
    params = {"key": jax.random.key(3), "w": jnp.array([1.0])}
    tx = lookahead(optax.sgd(0.1), 2, 0.5)
    state = tx.init(params)
    grads = {"key": None, "w": jnp.array([1.0])}
    for _ in range(3):
        updates, state = tx.update(grads, state, params)
        assert updates["key"] is None
        params = {**params, "w": params["w"] + updates["w"]}
    for slow in (state.slow_params, slow_params(state, params)):
        assert slow["key"].dtype == params["key"].dtype
        assert jnp.array_equal(
            jax.random.key_data(slow["key"]), jax.random.key_data(params["key"])
        )


def test_a_parameter_that_only_the_loop_changes_is_its_own_slow_weight_after_a_sync():
    tx, params = lookahead(optax.sgd(0.1), 2, 0.5), {"frozen": jnp.array([1.0])}
    state = tx.init(params)
    _, state = tx.update({"frozen": None}, state, params)
    _, state = tx.update({"frozen": None}, state, {"frozen": jnp.array([5.0])})
    np.testing.assert_array_equal(state.slow_params["frozen"], [5.0])
