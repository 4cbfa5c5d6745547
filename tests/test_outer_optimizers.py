"""Does any outer optimizer do what it would do if it were called at the syncs only?

The package evaluates it in every step, in an order that the compiler can write in
place; it must not show. Compared with two loops by hand that call it at a sync.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental.compute_on import compute_on
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from meshes import make_mesh, use_mesh
from training import scanned, trajectory, two_loops_with_outer

from optax_lookahead import lookahead, outer_loop

K, STEPS = 3, 8
INNER = optax.sgd(0.1, momentum=0.5)
NESTEROV = optax.sgd(0.7, momentum=0.6, nesterov=True)
PARAMS = {
    "w": jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)), jnp.float32),
    "b": jnp.array([0.5, -1.0, 2.0]),
}


def gradient(params, step):
    return jax.tree.map(lambda p: p - jnp.cos(step + p), params)


def zeros(params):
    return jax.tree.map(jnp.zeros_like, params)


def scaled(updates):
    return jax.tree.map(lambda g: -0.5 * g, updates)


def of(init, update):
    """Returns an optimizer, from functions of parameters, and of updates and state."""
    return optax.GradientTransformation(
        init, lambda updates, state, params=None: update(updates, state)
    )


def chained(transformation):
    return optax.chain(transformation, optax.scale(-0.5))


def its_own_new_state(updates, state):
    new = jax.tree.map(lambda g, t: 0.5 * t - 0.5 * g, updates, state)
    return new, new


def twice(updates, state):
    new = jax.tree.map(lambda g, t: g + 0.5 * t, updates, state[0])
    return scaled(new), (new, new)


def twice_in_two_dtypes(updates, state):
    new = jax.tree.map(lambda g, t: g + 0.5 * t, updates, state[1])
    return scaled(new), (new, new)


def scan_cond_and_while(updates, state):
    norm = optax.tree.norm(updates)
    total, _ = jax.lax.scan(lambda t, x: (0.5 * t + x, None), state, jnp.ones(3) * norm)
    halved = jax.lax.while_loop(lambda t: t > 0.3, lambda t: 0.5 * t, total)
    scale = jax.lax.cond(norm > 1.0, lambda t: 0.1 * t, lambda t: 0.5 + t, halved)
    return jax.tree.map(lambda g: -scale * g, updates), total


@jax.custom_vjp
def custom(x):
    return 0.5 * x


custom.defvjp(lambda x: (custom(x), None), lambda _, g: (0.5 * g,))


def with_custom_derivatives(updates, state):
    new = jax.tree.map(lambda g, t: jax.nn.relu(t) + custom(g), updates, state)
    return jax.tree.map(lambda t: -jax.nn.silu(custom(t)), new), new


def differentiating(updates, state):
    def loss(t):
        return optax.tree.sum(jax.tree.map(lambda x: jax.nn.softplus(custom(x)), t))

    new = jax.tree.map(lambda g, t: g + 0.5 * t, updates, state)
    return scaled(jax.grad(jax.checkpoint(loss))(new)), new


def on_the_host(updates, state):
    @compute_on("device_host")
    @jax.jit
    def step(updates, state):
        return jax.tree.map(lambda g, t: g + 0.5 * t, updates, state)

    new = step(updates, state)
    return scaled(new), new


def with_the_old_threefry(updates, state):
    with jax.threefry_partitionable(False):
        noise = jax.random.normal(state, (3, 4))
    return scaled(updates) | {"w": 0.1 * noise}, jax.random.split(state)[0]


def counting_on_the_host(updates, state):
    jax.debug.callback(lambda t: None, state)
    return scaled(updates), state + 1


OUTERS = {
    "SGD": optax.sgd(0.5),
    "Nesterov": NESTEROV,
    "heavy ball in bfloat16": optax.sgd(0.5, 0.5, accumulator_dtype=jnp.bfloat16),
    "Adam": optax.adam(0.1),
    "AdamW": optax.adamw(0.1, weight_decay=0.1),
    "Muon": optax.contrib.muon(0.1),
    "Lion": optax.lion(0.1),
    "optimistic": optax.optimistic_gradient_descent(0.3),
    "L-BFGS": optax.chain(optax.scale_by_lbfgs(2), optax.scale(-0.5)),
    "lookahead": lookahead(optax.sgd(0.5, momentum=0.5), 2, 0.5),
    "outer loop": outer_loop(optax.adam(0.1), NESTEROV, 2),
    "schedule": optax.sgd(optax.linear_schedule(1.0, 0.2, 4)),
    "plateau": optax.chain(optax.sgd(0.5), optax.contrib.reduce_on_plateau(0.5, 1)),
    "injected": optax.inject_hyperparams(optax.sgd)(0.5, momentum=0.5, nesterov=True),
    "noise": optax.chain(optax.add_noise(0.1, 0.5, key=1), optax.sgd(0.5)),
    "noise of a typed key": optax.noisy_sgd(0.5, key=jax.random.key(0)),
    "masked": optax.masked(optax.adam(0.1), {"w": True, "b": False}),
    "MultiSteps": optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(),
    "apply_if_finite": optax.apply_if_finite(optax.sgd(0.5, 0.5), 3),
    "trace alone": chained(optax.trace(0.5)),
    "its own new state": of(zeros, its_own_new_state),
    "no state": optax.scale(-0.5),
    "remembers the parameters": optax.GradientTransformation(
        zeros, lambda g, state, params: (optax.tree.add_scale(scaled(g), -0.1, state), params)
    ),
    "remembers what it was given": of(zeros, lambda g, s: (scaled(g), g)),
    "trades places": of(
        lambda params: (zeros(params), params),
        lambda g, s: (scaled(optax.tree.add(g, s[0])), (s[1], s[0])),
    ),
    "unchanged": of(zeros, lambda g, s: (scaled(g), s)),
    "constant": of(
        lambda params: (jnp.zeros([]), jnp.zeros(3), jnp.zeros([], jnp.int32), 0.5),
        lambda g, s: (scaled(g), (jnp.ones([]), jnp.arange(3.0), 4, 2.0)),
    ),
    "constant key": of(
        lambda params: jax.random.key(0), lambda g, s: (scaled(g), jax.random.key(1))
    ),
    "Python numbers": of(lambda params: (1, 0.5), lambda g, s: (scaled(g), (2, s[1] * 2))),
    "weakly typed": of(
        lambda params: jnp.asarray(0.5),
        lambda g, s: (jax.tree.map(lambda x: -s * x, g), s * 0.9),
    ),
    "twice": of(lambda params: (zeros(params), params), twice),
    "twice in two dtypes": of(
        lambda params: (optax.tree.cast(params, jnp.bfloat16), zeros(params)),
        twice_in_two_dtypes,
    ),
    "of another dtype": of(
        lambda params: optax.tree.cast(zeros(params), jnp.bfloat16),
        lambda g, s: (scaled(g), g),
    ),
    "jitted": of(zeros, jax.jit(its_own_new_state)),
    "twice, jitted": of(lambda params: (zeros(params), params), jax.jit(twice)),
    "custom derivatives": of(zeros, with_custom_derivatives),
    "differentiates": of(zeros, differentiating),
    "loops": of(lambda params: jnp.zeros([]), scan_cond_and_while),
    "computes on the host": of(zeros, on_the_host),
    "in another context": of(lambda params: jax.random.key(0), with_the_old_threefry),
    "calls back": of(lambda params: jnp.zeros([], jnp.int32), counting_on_the_host),
}


def numbers(tree):
    """Returns the tree with its random keys, which NumPy can't hold, as numbers."""

    def leaf(x):
        is_key = jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(x) if is_key else x)

    return jax.tree.map(leaf, tree)


def assert_close(got, expected, rtol=2e-5):
    def leaf(x, y):
        # A state of another dtype than its optimizer returned keeps its own.
        tolerance = 0.01 if x.dtype == jnp.bfloat16 else rtol
        np.testing.assert_allclose(
            np.asarray(x, float), np.asarray(y, float), tolerance, atol=1e-5
        )

    jax.tree.map(leaf, numbers(got), numbers(expected))


def visit(outer, transform):
    """Returns parameters and states after every step, with `value` for the plateau."""
    tx = outer_loop(INNER, outer, K)

    @transform
    def step(params, state, step):
        value = jnp.float32(1.0)
        updates, state = tx.update(gradient(params, step), state, params, value=value)
        return optax.apply_updates(params, updates), state

    params, state, visited = PARAMS, tx.init(PARAMS), []
    for i in range(STEPS):
        params, state = step(params, state, jnp.asarray(i))
        visited.append((params, state))
    return visited


@pytest.mark.parametrize("transform", [jax.jit, lambda step: step], ids=["jit", "eager"])
@pytest.mark.parametrize("name", OUTERS)
def test_every_step_is_that_of_two_loops_which_call_the_outer_one_at_a_sync(
    name, transform
):
    visited = visit(OUTERS[name], transform)
    expected = two_loops_with_outer(
        INNER, OUTERS[name], PARAMS, gradient, K, STEPS, value=jnp.float32(1.0)
    )
    first = jax.tree.map(jnp.result_type, visited[0][1])
    for (params, state), (fast, slow, outer_state) in zip(visited, expected, strict=True):
        assert_close(params, fast)
        assert_close(state.slow_params, slow)
        assert_close(state.outer_state, outer_state)
        assert jax.tree.map(jnp.result_type, state) == first
    assert all(np.all(np.isfinite(p)) for p in jax.tree.leaves(params))
