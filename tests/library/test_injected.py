"""Do `optax.inject_hyperparams` and lookahead mean the same by their arguments?

Steps are compared with Algorithm 1 in NumPy, with the values that should be used.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.pages import run_block

from optax_lookahead import lookahead, outer_loop

PARAMS = {
    "s": jnp.asarray(1.0),
    "v": jnp.arange(3.0),
    "w": jnp.ones((2, 1, 2)),
}
INNER = optax.sgd(0.1)


def falling(count):
    return 1.0 / (1.0 + count)


def gradient(params):
    return jax.tree.map(lambda p: 0.5 * p + 1.0, params)


def run(tx, steps, set_by_hand=None):
    params, state, visited = PARAMS, tx.init(PARAMS), []
    update = jax.jit(tx.update)
    for step in range(steps):
        if set_by_hand and step in set_by_hand:
            state.hyperparams.update(set_by_hand[step])
        updates, state = update(gradient(params), state, params)
        params = optax.apply_updates(params, updates)
        visited.append(params)
    return visited, state


def paper(ks, alphas):
    """Returns the fast weights after every step of cycles of these lengths."""
    theta, visited = jax.tree.map(lambda p: np.asarray(p, float), PARAMS), []
    for k, alpha in zip(ks, alphas, strict=True):
        phi = theta
        for _ in range(k):
            theta = jax.tree.map(lambda p: p - 0.1 * (0.5 * p + 1.0), theta)
            visited.append(theta)
        theta = jax.tree.map(lambda p, q, a=alpha: p + a * (q - p), phi, theta)
        visited[-1] = theta
    return visited


def assert_close(got, expected):
    for tree, wanted in zip(got, expected, strict=True):
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), tree, wanted
        )


def test_a_schedule_of_syncs_stays_one_as_a_static_argument():
    injected = optax.inject_hyperparams(lookahead, static_args=("alpha",))
    got, state = run(injected(INNER, k=3, alpha=falling), 9)
    assert_close(got, paper([3, 3, 3], [1.0, 1 / 2, 1 / 3]))
    assert list(state.hyperparams) == ["k"]


def test_otherwise_it_is_given_steps_as_the_pages_say():
    got, _ = run(optax.inject_hyperparams(lookahead)(INNER, k=3, alpha=falling), 6)
    assert_close(got, paper([3, 3], [1 / 3, 1 / 6]))


def test_an_injected_k_may_follow_a_schedule_of_steps():
    injected = optax.inject_hyperparams(lookahead)
    got, state = run(
        injected(INNER, k=lambda step: jnp.where(step < 6, 3, 2), alpha=0.5), 10
    )
    assert_close(got, paper([3, 3, 2, 2], [0.5] * 4))
    assert state.hyperparams["k"] == 2


def test_k_and_alpha_that_are_set_by_hand_count_from_the_next_step():
    tx = optax.inject_hyperparams(lookahead)(INNER, k=3, alpha=0.5)
    new = {6: {"k": jnp.asarray(2), "alpha": jnp.asarray(0.8)}}
    got, _ = run(tx, 10, new)
    assert_close(got, paper([3, 3, 2, 2], [0.5, 0.5, 0.8, 0.8]))


@pytest.mark.parametrize("loop", ["lookahead", "outer_loop"])
def test_a_function_as_inner_state_is_called_with_states_as_a_static_argument(loop):
    def last_moment_counts(state, fresh):
        return jax.tree.map(lambda x, y: x + 2 * y, state, fresh)

    inner = optax.sgd(0.1, momentum=0.9)
    if loop == "lookahead":
        function, arguments = lookahead, {"inner": inner, "k": 2, "alpha": 0.5}
    else:
        outer = optax.sgd(0.5)
        function, arguments = outer_loop, {"inner": inner, "outer": outer, "k": 2}
    expected, _ = run(function(**arguments, inner_state=last_moment_counts), 6)
    static = optax.inject_hyperparams(function, static_args=("inner_state",))
    got, _ = run(static(**arguments, inner_state=last_moment_counts), 6)
    assert_close(got, expected)
    # Without it, Optax calls the function with a count.
    tx = optax.inject_hyperparams(function)(**arguments, inner_state=last_moment_counts)
    with pytest.raises(TypeError, match="fresh"):
        tx.init(PARAMS)


@pytest.mark.parametrize("dtype", [np.float32, jnp.float32])
def test_a_type_as_slow_dtype_is_refused_unless_it_is_a_static_argument(dtype):
    params = jnp.ones(2, jnp.bfloat16)
    tx = optax.inject_hyperparams(lookahead)(INNER, k=2, slow_dtype=dtype)
    with pytest.raises(TypeError, match="`slow_dtype` must be a floating dtype"):
        tx.init(params)
    # Both remedies work.
    static = optax.inject_hyperparams(lookahead, static_args=("slow_dtype",))
    for tx in (
        static(INNER, k=2, slow_dtype=dtype),
        optax.inject_hyperparams(lookahead)(INNER, k=2, slow_dtype="float32"),
        optax.inject_hyperparams(lookahead)(INNER, k=2, slow_dtype=jnp.dtype(dtype)),
    ):
        assert tx.init(params).inner_state.slow_params.dtype == jnp.float32


def test_the_inner_learning_rate_is_logged_where_it_is_a_schedule(capsys):
    namespace = run_block("inject-log")
    assert capsys.readouterr().out == "learning rate 0.090\n"
    with pytest.raises(KeyError, match="multiple values"):
        optax.tree.get(namespace["opt_state"], "learning_rate")
    # With both injected, the other path.
    tx = optax.inject_hyperparams(lookahead)(namespace["inner"], k=5)
    state = tx.init(PARAMS)
    rate = optax.tree.get(state, "fast_state").hyperparams["learning_rate"]
    assert rate == jnp.float32(0.1)
