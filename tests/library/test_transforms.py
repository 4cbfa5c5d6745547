"""Does it go through JAX's transformations, and are its derivatives right?"""

import concurrent.futures

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.training import scanned, trajectory
from jax.experimental import serialize_executable

from optax_lookahead import lookahead, outer_loop, slow_params

PARAMS = {"w": jnp.array([1.0, -2.0]), "b": jnp.array(0.5)}


def gradient(params, step):
    return jax.tree.map(lambda p: p - jnp.cos(step + 2.0 * p), params)


def assert_close(tree, expected, rtol=1e-5):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-6),
        tree,
        expected,
    )


def test_scan_visits_what_the_python_loop_visits():
    tx = lookahead(optax.adam(0.1), 3, 0.5)
    stacked = scanned(tx, PARAMS, gradient, 10)
    visited = trajectory(tx, PARAMS, gradient, 10, jax.jit)
    assert_close(stacked, jax.tree.map(lambda *x: jnp.stack(x), *visited))


def test_while_loop_ends_where_the_python_loop_ends():
    tx = lookahead(optax.adam(0.1), 3, 0.5)

    def body(carry):
        params, state, step = carry
        updates, state = tx.update(gradient(params, step), state, params)
        return optax.apply_updates(params, updates), state, step + 1

    carry = PARAMS, tx.init(PARAMS), jnp.asarray(0)
    params, state, _ = jax.lax.while_loop(lambda c: c[2] < 10, body, carry)
    expected_params, expected_state = trajectory(tx, PARAMS, gradient, 10)[-1]
    assert_close((params, state), (expected_params, expected_state))


def test_cond_can_leave_out_a_step():
    tx = lookahead(optax.adam(0.1), 2, 0.5)

    @jax.jit
    def step(params, state, use):
        def take(params, state):
            updates, state = tx.update(params, state, params)
            return optax.apply_updates(params, updates), state

        return jax.lax.cond(use, take, lambda *carry: carry, params, state)

    params, state = PARAMS, tx.init(PARAMS)
    for i in range(6):
        params, state = step(params, state, i % 2 == 0)
    expected = trajectory(tx, PARAMS, lambda params, step: params, 3)[-1]
    assert_close((params, state), expected)


def test_a_vmapped_ensemble_equals_its_members_alone():
    tx = lookahead(optax.adam(0.1), 3, 0.5)
    ensemble = jax.tree.map(lambda p: jnp.stack([p, 2 * p, p - 1]), PARAMS)
    params, state = jax.vmap(lambda p: scanned(tx, p, gradient, 8))(ensemble)
    for member in range(3):
        start = jax.tree.map(lambda p, i=member: p[i], ensemble)
        got = jax.tree.map(lambda p, i=member: p[i], (params, state))
        assert_close(got, scanned(tx, start, gradient, 8))


@pytest.mark.parametrize("in_axes", [(0, None), (None, 0), (0, 0)])
def test_a_vmap_over_k_or_alpha_equals_separate_runs(in_axes):
    traces = []

    def final(k, alpha):
        traces.append(k)
        params, state = scanned(
            lookahead(optax.adam(0.1), k, alpha), PARAMS, gradient, 8
        )
        last = jax.tree.map(lambda x: x[-1], (state, params))
        return slow_params(*last)

    grid = jnp.array([1, 2, 5]), jnp.array([0.2, 0.5, 1.0])
    given = [g if axis == 0 else g[1] for g, axis in zip(grid, in_axes, strict=True)]
    many = jax.jit(jax.vmap(final, in_axes))(*given)
    assert len(traces) == 1
    for i in range(3):
        one = [g[i] if axis == 0 else g for g, axis in zip(given, in_axes, strict=True)]
        expected = final(int(one[0]), float(one[1]))
        assert_close(jax.tree.map(lambda x, i=i: x[i], many), expected)


def final_loss(tx, scale=1.0):
    """Returns a loss in double precision after 11 steps, in mid-cycle if k is 3."""
    params = jax.tree.map(lambda p: scale * p.astype(jnp.float64), PARAMS)
    params, _ = scanned(tx, params, gradient, 11)
    return sum(jnp.sum(p[-1] ** 4) for p in jax.tree.leaves(params))


@pytest.mark.parametrize("inner", [optax.sgd, optax.adam])
@pytest.mark.parametrize("argument", [0, 1], ids=["alpha", "learning_rate"])
def test_the_final_loss_is_differentiable_in_the_hyperparameters(x64, inner, argument):
    def loss(alpha, learning_rate):
        return final_loss(lookahead(inner(learning_rate), 3, alpha))

    at, step = np.array([0.6, 0.1]), 1e-6 * np.eye(2)[argument]
    expected = (loss(*(at + step)) - loss(*(at - step))) / 2e-6
    assert abs(expected) > 1e-3, "the test must have something to differentiate"
    reverse = jax.grad(loss, argument)(*at)
    np.testing.assert_allclose(reverse, expected, rtol=1e-6)
    _, forward = jax.jvp(loss, tuple(at), tuple(np.eye(2)[argument]))
    np.testing.assert_allclose(forward, expected, rtol=1e-6)


def test_the_final_loss_is_differentiable_in_the_initial_parameters(x64):
    def loss(scale):
        return final_loss(lookahead(optax.sgd(0.1), 3, 0.6), scale)

    expected = (loss(1.0 + 1e-6) - loss(1.0 - 1e-6)) / 2e-6
    assert abs(expected) > 1e-3, "the test must have something to differentiate"
    np.testing.assert_allclose(jax.grad(loss)(1.0), expected, rtol=1e-6)


def test_checkpointing_of_the_loss_changes_nothing():
    def loss(params):
        return jnp.sum(jnp.sin(params["w"]) ** 2) + params["b"] ** 2

    tx = lookahead(optax.adam(0.1), 2, 0.5)
    plain, rematerialised = (
        trajectory(tx, PARAMS, lambda p, step, f=f: jax.grad(f)(p), 5, jax.jit)
        for f in (loss, jax.checkpoint(loss))
    )
    assert_close(rematerialised[-1], plain[-1])


def one_step(params, state, step):
    updates, state = TRIED.update(gradient(params, step), state, params)
    return optax.apply_updates(params, updates), state


TRIED = outer_loop(
    optax.adam(0.1), optax.sgd(0.7, momentum=0.5, nesterov=True), 2, inner_state="reset"
)


def assert_goes_on_as_before(step, first=0, last=5):
    params, state = PARAMS, TRIED.init(PARAMS)
    expected = trajectory(TRIED, PARAMS, gradient, last, jax.jit)
    for i in range(last):
        params, state = (step if i >= first else jax.jit(one_step))(
            params, state, jnp.asarray(i)
        )
    assert_close((params, state), expected[-1])


@pytest.mark.parametrize("serialized", [False, True])
def test_a_step_that_was_exported_continues(serialized):
    if serialized:
        pytest.importorskip("flatbuffers", reason="JAX serializes with it")
    arguments = PARAMS, TRIED.init(PARAMS), jnp.asarray(0)
    flat, treedef = jax.tree.flatten(arguments)

    def on_leaves(*leaves):
        return jax.tree.leaves(one_step(*treedef.unflatten(leaves)))

    exported = jax.export.export(jax.jit(on_leaves))(*flat)
    if serialized:
        exported = jax.export.deserialize(exported.serialize())
    result = jax.tree.structure(arguments[:2])

    def step(*arguments):
        return result.unflatten(exported.call(*jax.tree.leaves(arguments)))

    assert_goes_on_as_before(step, first=1)


def test_a_compiled_step_that_was_serialized_continues():
    arguments = PARAMS, TRIED.init(PARAMS), jnp.asarray(0)
    compiled = jax.jit(one_step).lower(*arguments).compile()
    step = serialize_executable.deserialize_and_load(
        *serialize_executable.serialize(compiled), execution_devices=jax.devices()[:1]
    )
    assert_goes_on_as_before(step, first=1)


def test_threads_can_share_one_transformation():
    step = jax.jit(one_step)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(assert_goes_on_as_before, step) for _ in range(8)]
        for future in futures:
            future.result()


def test_64_bit_types_can_be_turned_on_in_mid_run():
    params, state = PARAMS, TRIED.init(PARAMS)
    before = jax.tree.map(jnp.result_type, state)
    for i in range(6):
        jax.config.update("jax_enable_x64", i in (2, 3))
        try:
            updates, state = TRIED.update(PARAMS, state, params)
            params = optax.apply_updates(params, updates)
        finally:
            jax.config.update("jax_enable_x64", False)
        assert jax.tree.map(jnp.result_type, state.slow_params) == before.slow_params
        assert state.steps_since_sync == (i + 1) % 2
    assert state.sync_count == 3
