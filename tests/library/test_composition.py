"""Does lookahead mean the right thing inside and around every Optax wrapper?

The gradient acts on each leaf alone, so a wrapper that treats leaves differently can be
compared with a run of each leaf by itself.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.training import trajectory, two_loops

from optax_lookahead import lookahead, slow_params

PARAMS = {"a": {"x": jnp.array([1.0, -2.0])}, "b": jnp.array([0.5, 3.0, -1.0])}
A, B = {"a": PARAMS["a"]}, {"b": PARAMS["b"]}
STEPS, EAGER_STEPS = 13, 7


def gradient(params, step):
    return jax.tree.map(lambda p: p - jnp.cos(step + 2.0 * p), params)


@pytest.fixture(params=["eager", "jit"])
def run(request):
    """Returns the visited parameters and states of a loop, eager or jitted.

    The eager one is shorter: a `cond` is compiled again in each of its steps.
    """
    transform = {"eager": lambda step: step, "jit": jax.jit}[request.param]
    default = {"eager": EAGER_STEPS, "jit": STEPS}[request.param]

    def run(tx, params=PARAMS, gradient=gradient, steps=default):
        return trajectory(tx, params, gradient, steps, transform)

    return run


def assert_close(tree, expected):
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6),
        tree,
        expected,
    )


def assert_visits(visited, expected):
    """Checks parameters and slow weights after every step that the run has made."""
    assert 0 < len(visited) <= len(expected)
    for (params, state), (fast, slow) in zip(visited, expected, strict=False):
        assert_close(params, fast)
        assert_close(slow_params(state, params), slow)


@pytest.mark.parametrize(
    "first",
    [
        optax.clip(0.5),
        optax.clip_by_global_norm(0.5),
        optax.ema(0.5),
        optax.snapshot("norm", optax.tree.norm),
        optax.add_decayed_weights(0.1),
    ],
    ids=["clip", "clip_by_global_norm", "ema", "snapshot", "add_decayed_weights"],
)
def test_last_in_a_chain_it_wraps_only_its_own_inner_optimizer(run, first):
    visited = run(optax.chain(first, lookahead(optax.adam(0.1), 3, 0.5)))
    inner = optax.chain(first, optax.adam(0.1))
    assert_visits(visited, two_loops(inner, PARAMS, gradient, 3, 0.5, STEPS))


def test_a_snapshot_beside_it_can_be_read():
    tx = optax.chain(
        optax.snapshot("norm", optax.tree.norm), lookahead(optax.sgd(0.1), 3)
    )
    _, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    norm = optax.tree.get(state, "norm")
    np.testing.assert_allclose(norm, optax.tree.norm(PARAMS))


def test_in_a_named_chain_it_is_two_plain_loops(run):
    inner = optax.sgd(0.1, momentum=0.9)
    tx = optax.named_chain(("clip", optax.clip(1.0)), ("slow", lookahead(inner, 4)))
    expected = two_loops(
        optax.chain(optax.clip(1.0), inner), PARAMS, gradient, 4, 0.5, STEPS
    )
    assert_visits(run(tx), expected)


def test_after_a_transform_behind_it_the_next_cycle_starts_from_the_loops_parameters(
    run,
):
    tx = optax.chain(lookahead(optax.sgd(0.1), 3, 0.5), optax.scale(0.8))
    theta, expected = PARAMS, []
    for step in range(STEPS):
        if step % 3 == 0:
            phi = theta
        updates = jax.tree.map(lambda g: -0.1 * g, gradient(theta, jnp.asarray(step)))
        if step % 3 == 2:
            updates = jax.tree.map(
                lambda u, p, s: s + 0.5 * (p + u - s) - p, updates, theta, phi
            )
        theta = jax.tree.map(lambda p, u: p + 0.8 * u, theta, updates)
        expected.append((theta, theta if step % 3 == 2 else phi))
    assert_visits(run(tx), expected)


@pytest.mark.parametrize(
    "mask",
    [
        {"a": {"x": True}, "b": False},
        {"a": True, "b": False},
        lambda params: jax.tree.map(lambda p: p.size == 2, params),
    ],
    ids=["leaves", "prefix", "callable"],
)
def test_inside_masked_the_other_leaves_keep_their_updates(run, mask):
    visited = run(optax.masked(lookahead(optax.adam(0.1), 3, 0.5), mask))
    inside = two_loops(optax.adam(0.1), A, gradient, 3, 0.5, STEPS)
    outside = [params for params, _ in trajectory(optax.identity(), B, gradient, STEPS)]
    expected = [
        (fast | other, slow | other)
        for (fast, slow), other in zip(inside, outside, strict=True)
    ]
    assert_visits(visited, expected)


def test_around_masked_every_leaf_has_slow_weights(run):
    inner = optax.masked(optax.adam(0.1), {"a": True, "b": False})
    expected = two_loops(inner, PARAMS, gradient, 3, 0.5, STEPS)
    assert_visits(run(lookahead(inner, 3, 0.5)), expected)


def test_two_lookaheads_of_different_periods_in_partition_are_separate_loops(run):
    transforms = {
        "adam": lookahead(optax.adam(0.1), 2, 0.8),
        "sgd": lookahead(optax.sgd(0.1), 5, 0.3),
    }
    visited = run(optax.partition(transforms, {"a": "adam", "b": "sgd"}))
    of_a = two_loops(optax.adam(0.1), A, gradient, 2, 0.8, STEPS)
    of_b = two_loops(optax.sgd(0.1), B, gradient, 5, 0.3, STEPS)
    expected = [
        (fast_a | fast_b, slow_a | slow_b)
        for (fast_a, slow_a), (fast_b, slow_b) in zip(of_a, of_b, strict=True)
    ]
    assert_visits(visited, expected)


def test_around_partition_it_is_two_plain_loops(run):
    inner = optax.partition(
        {"adam": optax.adam(0.1), "sgd": optax.sgd(0.1)}, {"a": "adam", "b": "sgd"}
    )
    expected = two_loops(inner, PARAMS, gradient, 3, 0.5, STEPS)
    assert_visits(run(lookahead(inner, 3, 0.5)), expected)


def test_with_injected_k_and_alpha_it_is_two_plain_loops(run):
    tx = optax.inject_hyperparams(lookahead)(optax.adam(0.1), k=4, alpha=0.3)
    expected = two_loops(optax.adam(0.1), PARAMS, gradient, 4, 0.3, STEPS)
    assert_visits(run(tx), expected)


def test_around_an_injected_learning_rate_it_is_two_plain_loops(run):
    inner = optax.inject_hyperparams(optax.sgd)(optax.linear_schedule(0.2, 0.0, 10))
    expected = two_loops(inner, PARAMS, gradient, 3, 0.5, STEPS)
    visited = run(lookahead(inner, 3, 0.5), steps=STEPS)
    assert_visits(visited, expected)
    hyperparams = visited[-1][1].fast_state.hyperparams
    np.testing.assert_allclose(hyperparams["learning_rate"], 0.0, atol=1e-7)


def test_multi_steps_around_it_makes_a_cycle_of_optimizer_steps(run):
    tx = optax.MultiSteps(lookahead(optax.adam(0.1), 2, 0.5), every_k_schedule=3)
    visited = run(tx.gradient_transformation())

    def mean_gradient(params, step):
        grads = [gradient(params, 3 * step + i) for i in range(3)]
        return jax.tree.map(lambda *g: sum(g) / 3, *grads)

    expected = two_loops(optax.adam(0.1), PARAMS, mean_gradient, 2, 0.5, 4)
    assert_visits(visited[2::3], expected)


def test_multi_steps_inside_it_makes_a_cycle_of_micro_steps(run):
    inner = optax.MultiSteps(optax.adam(0.1), 3).gradient_transformation()
    expected = two_loops(inner, PARAMS, gradient, 4, 0.5, STEPS)
    assert_visits(run(lookahead(inner, 4, 0.5)), expected)


def faulty_gradient(params, step):
    """Returns NaN at step 4, in the second cycle of three."""
    return jax.tree.map(
        lambda g: jnp.where(step == 4, jnp.nan, g), gradient(params, step)
    )


def test_apply_if_finite_around_it_leaves_out_the_bad_step(run):
    tx = optax.apply_if_finite(lookahead(optax.adam(0.1), 3, 0.5), 5)
    visited = run(tx, gradient=faulty_gradient)

    def without_step_4(params, step):
        return gradient(params, jnp.where(step < 4, step, step + 1))

    expected = two_loops(optax.adam(0.1), PARAMS, without_step_4, 3, 0.5, STEPS - 1)
    assert_visits(visited[:4] + visited[5:], expected)
    assert_close(visited[4][0], visited[3][0])


def test_apply_if_finite_inside_it_counts_the_bad_step_as_a_step_of_the_cycle(run):
    inner = optax.apply_if_finite(optax.adam(0.1), 5)
    visited = run(lookahead(inner, 3, 0.5), gradient=faulty_gradient)
    expected = two_loops(inner, PARAMS, faulty_gradient, 3, 0.5, STEPS)
    assert_visits(visited, expected)
    assert np.all(np.isfinite(visited[-1][0]["b"]))


def test_conditionally_transform_counts_only_the_steps_that_reach_it(run):
    tx = optax.conditionally_transform(
        lookahead(optax.sgd(0.1), 2, 0.5), lambda step: step % 2 == 0
    )
    theta, phi, expected, reached = PARAMS, PARAMS, [], 0
    for step in range(STEPS):
        grads = gradient(theta, jnp.asarray(step))
        if step % 2:  # passed on as they are
            theta = jax.tree.map(jnp.add, theta, grads)
            slow = theta if reached % 2 == 0 else phi
        else:
            if reached % 2 == 0:
                phi = theta
            theta = jax.tree.map(lambda p, g: p - 0.1 * g, theta, grads)
            reached += 1
            if reached % 2 == 0:
                theta = jax.tree.map(lambda s, p: s + 0.5 * (p - s), phi, theta)
            slow = theta if reached % 2 == 0 else phi
        expected.append((theta, slow))
    assert_visits(run(tx), expected)


def test_conditionally_mask_changes_nothing_on_the_other_steps(run):
    tx = optax.conditionally_mask(
        lookahead(optax.sgd(0.1), 2, 0.5), lambda step: step % 2 == 0
    )

    def every_other(params, step):
        return gradient(params, 2 * step)

    expected = two_loops(optax.sgd(0.1), PARAMS, every_other, 2, 0.5, 7)
    visited = run(tx)
    assert_visits(visited[::2], expected)
    for (before, _), (after, _) in zip(visited[::2], visited[1::2], strict=False):
        assert_close(after, before)


def test_inside_flatten_it_is_two_plain_loops(run):
    visited = run(optax.flatten(lookahead(optax.adam(0.1), 3, 0.5)))
    expected = two_loops(optax.adam(0.1), PARAMS, gradient, 3, 0.5, STEPS)
    assert_visits(visited, expected)


def test_a_flattened_state_that_was_restored_as_numpy_is_read_too():
    tx = optax.flatten(lookahead(optax.adam(0.1), 3, 0.5))
    params, state = trajectory(tx, PARAMS, gradient, 4)[-1]
    restored = jax.tree.map(np.asarray, state)
    assert_close(slow_params(restored, params), slow_params(state, params))


def test_around_flatten_it_is_two_plain_loops(run):
    inner = optax.flatten(optax.adam(0.1))
    expected = two_loops(optax.adam(0.1), PARAMS, gradient, 3, 0.5, STEPS)
    assert_visits(run(lookahead(inner, 3, 0.5)), expected)


def test_with_extra_args_support_around_and_inside_changes_nothing(run):
    inner = optax.with_extra_args_support(optax.adam(0.1))
    tx = optax.with_extra_args_support(lookahead(inner, 3, 0.5))
    expected = two_loops(optax.adam(0.1), PARAMS, gradient, 3, 0.5, STEPS)
    assert_visits(run(tx), expected)


@pytest.mark.parametrize(("k", "outer_k"), [(2, 4), (2, 6), (3, 3)])
def test_lookahead_inside_lookahead_is_three_nested_loops(run, k, outer_k):
    visited = run(lookahead(lookahead(optax.adam(0.1), k, 0.5), outer_k, 0.4))
    inner = optax.adam(0.1)
    state, super_slow, expected = inner.init(PARAMS), PARAMS, []
    while len(expected) < STEPS:
        slow = super_slow
        for _ in range(outer_k // k):
            fast = slow
            for _ in range(k):
                grads = gradient(fast, jnp.asarray(len(expected)))
                updates, state = inner.update(grads, state, fast)
                fast = optax.apply_updates(fast, updates)
                expected.append((fast, super_slow))
            slow = jax.tree.map(lambda s, f: s + 0.5 * (f - s), slow, fast)
            expected[-1] = (slow, super_slow)
        super_slow = jax.tree.map(lambda s, f: s + 0.4 * (f - s), super_slow, slow)
        expected[-1] = (super_slow, super_slow)
    assert_visits(visited, expected[:STEPS])


def test_injected_k_and_alpha_changed_in_mid_run_need_no_retrace():
    traces = []
    tx = optax.inject_hyperparams(lookahead)(optax.sgd(0.1), k=3, alpha=0.5)

    @jax.jit
    def step(params, state, i):
        traces.append(i)
        updates, state = tx.update(gradient(params, i), state, params)
        return optax.apply_updates(params, updates), state

    params, state = PARAMS, tx.init(PARAMS)
    for i in range(12):
        if i == 6:
            middle = params
            state.hyperparams["k"] = jnp.asarray(2)
            state.hyperparams["alpha"] = jnp.asarray(0.9, jnp.float32)
        params, state = step(params, state, i)
    first = two_loops(optax.sgd(0.1), PARAMS, gradient, 3, 0.5, 6)
    assert_close(middle, first[-1][0])
    later = two_loops(
        optax.sgd(0.1), middle, lambda p, i: gradient(p, i + 6), 2, 0.9, 6
    )
    assert_close(params, later[-1][0])
    assert len(traces) == 1


def test_large_updates_that_multi_steps_skips_are_not_steps_of_the_cycle():
    tx = optax.MultiSteps(
        lookahead(optax.sgd(1.0), 2, 0.5),
        1,
        should_skip_update_fn=functools.partial(
            optax.skip_large_updates, max_squared_norm=10.0
        ),
    )
    params = jnp.asarray([0.0])
    state = tx.init(params)
    for grad, expected in ((1.0, -1.0), (100.0, -1.0), (1.0, -1.0), (1.0, -2.0)):
        updates, state = tx.update(jnp.asarray([grad]), state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(params, [expected])
