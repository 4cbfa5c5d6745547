"""Does any outer optimizer give the results of calls at the syncs only?

The package evaluates it in every step, so that the compiler can write in place. That
must not change the results. They are compared with two loops that call it at a sync.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.meshes import make_mesh, use_mesh
from helpers.training import scanned, trajectory, two_loops_with_outer
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from optax_lookahead import lookahead, outer_loop

K = 2
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


def narrowing(updates, state):
    new = optax.tree.cast(optax.tree.add_scale(updates, 0.5, state), jnp.bfloat16)
    return optax.tree.cast(scaled(new), jnp.float32), new


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


def with_the_old_threefry(updates, state):
    with jax.threefry_partitionable(False):
        key, subkey = jax.random.split(state)
        noise = jax.random.normal(subkey, (3, 4))
    return scaled(updates) | {"w": 0.1 * noise}, key


def counting_on_the_host(updates, state):
    jax.debug.callback(lambda t: None, state)
    return scaled(updates), state + 1


OUTERS = {
    "Nesterov": NESTEROV,
    "heavy ball in bfloat16": optax.sgd(0.5, 0.5, accumulator_dtype=jnp.bfloat16),
    "Adam": optax.adam(0.1),
    "AdamW": optax.adamw(0.1, weight_decay=0.1),
    "Muon": optax.contrib.muon(0.1, ns_steps=2),
    "L-BFGS": optax.chain(optax.scale_by_lbfgs(2), optax.scale(-0.5)),
    "lookahead": lookahead(optax.sgd(0.5, momentum=0.5), 2, 0.5),
    "outer loop": outer_loop(optax.adam(0.1), NESTEROV, 2),
    "plateau": optax.chain(optax.sgd(0.5), optax.contrib.reduce_on_plateau(0.5, 1)),
    "noise": optax.chain(optax.add_noise(0.1, 0.5, key=1), optax.sgd(0.5)),
    "masked": optax.masked(optax.adam(0.1), {"w": True, "b": False}),
    "MultiSteps": optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(),
    "apply_if_finite": optax.apply_if_finite(optax.sgd(0.5, 0.5), 3),
    "trace alone": chained(optax.trace(0.5)),
    "its own new state": of(zeros, its_own_new_state),
    "no state": optax.scale(-0.5),
    "stores the parameters": optax.GradientTransformation(
        zeros,
        lambda g, state, params: (optax.tree.add_scale(scaled(g), -0.1, state), params),
    ),
    "stores the gradients": of(zeros, lambda g, s: (scaled(g), g)),
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
    "Python numbers": of(
        lambda params: (1, 0.5), lambda g, s: (scaled(g), (2, s[1] * 2))
    ),
    "weakly typed": of(
        lambda params: jnp.asarray(0.5),
        lambda g, s: (jax.tree.map(lambda x: -s * x, g), s * 0.9),
    ),
    "twice": of(lambda params: (zeros(params), params), twice),
    "twice in two dtypes": of(
        lambda params: (optax.tree.cast(params, jnp.bfloat16), zeros(params)),
        twice_in_two_dtypes,
    ),
    "made wider": of(
        lambda params: optax.tree.cast(zeros(params), jnp.bfloat16),
        lambda g, s: (scaled(g), optax.tree.add_scale(g, 0.5, s)),
    ),
    "made narrower": of(zeros, narrowing),
    "jitted": of(zeros, jax.jit(its_own_new_state)),
    "twice, jitted": of(lambda params: (zeros(params), params), jax.jit(twice)),
    "custom derivatives": of(zeros, with_custom_derivatives),
    "differentiates": of(zeros, differentiating),
    "loops": of(lambda params: jnp.zeros([]), scan_cond_and_while),
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


VALUE = jnp.float32(1.0)  # which `reduce_on_plateau` needs


@functools.cache
def by_hand(name):
    return two_loops_with_outer(
        INNER, OUTERS[name], PARAMS, gradient, K, 2 * K, value=VALUE
    )


def assert_same_bits(got, expected):
    jax.tree.map(np.testing.assert_array_equal, numbers(got), numbers(expected))


# Without jit, control flow is compiled in every step.
EAGER = set(OUTERS) - {"L-BFGS", "MultiSteps", "apply_if_finite", "noise", "plateau"}


@pytest.mark.parametrize(
    ("name", "transform"),
    [pytest.param(name, jax.jit, id=f"{name}, jitted") for name in OUTERS]
    + [pytest.param(name, lambda step: step, id=name) for name in sorted(EAGER)],
)
def test_it_is_as_if_the_outer_optimizer_were_called_at_a_sync_only(name, transform):
    tx = outer_loop(INNER, OUTERS[name], K)

    @transform
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params, value=VALUE)
        return optax.apply_updates(params, updates), state

    params, state = PARAMS, tx.init(PARAMS)
    types = jax.tree.map(jnp.result_type, state)
    steps = 2 * K if transform is jax.jit else K  # eager loops are slow
    for i, (fast, slow, outer_state) in enumerate(by_hand(name)[:steps]):
        before = state
        params, state = step(params, state, gradient(params, jnp.asarray(i)))
        assert_close(params, fast)
        assert_close(state.slow_params, slow)
        assert_close(state.outer_state, outer_state)
        assert jax.tree.map(jnp.result_type, state) == types
        if (i + 1) % K:
            assert_same_bits(state.outer_state, before.outer_state)
    assert all(np.all(np.isfinite(p)) for p in jax.tree.leaves(params))
    for bad in (jnp.inf, jnp.nan):
        grads = jax.tree.map(lambda p, bad=bad: jnp.full_like(p, bad), params)
        fast, after = step(params, state, grads)
        assert not any(np.any(np.isfinite(p)) for p in jax.tree.leaves(fast))
        assert_same_bits(after.outer_state, state.outer_state)
        assert_same_bits(after.slow_params, params)


def test_leaves_that_are_not_floating_do_not_reach_the_outer_optimizer():
    params = {
        "w": jnp.array([1.0, -2.0]),
        "frozen": jnp.ones(2),
        "half": jnp.ones(2, jnp.bfloat16),
        "complex": jnp.array([1.0 + 2.0j]),
        "count": jnp.array(3),
        "flag": jnp.array([True, False]),
        "key": jax.random.key(0),
        "nothing": None,
    }
    moving = ("w", "half", "complex")
    shapes = []

    def inner_update(updates, state, params=None):
        # As Equinox does it: None for what has no gradient; the counter moves by one.
        return dict.fromkeys(params) | {
            name: -0.1 * updates[name] for name in moving
        } | {"count": jnp.array(1)}, state

    def outer_init(params):
        shapes.append(jax.tree.map(jnp.shape, params))
        return NESTEROV.init(params)

    inner = optax.GradientTransformation(lambda params: (), inner_update)
    tx = outer_loop(inner, optax.GradientTransformation(outer_init, NESTEROV.update), 2)

    @jax.jit
    def step(params, state):
        grads = {name: p if name in moving else None for name, p in params.items()}
        updates, state = tx.update(grads, state, params)
        return {
            name: p if updates[name] is None else p + updates[name]
            for name, p in params.items()
        }, state

    current, state = params, tx.init(params)
    hidden = optax.MaskedNode()
    assert shapes[0] == {
        "w": (2,),
        "frozen": (2,),
        "half": (2,),
        "complex": (1,),
        "count": hidden,
        "flag": hidden,
        "key": hidden,
        "nothing": None,
    }
    visited = two_loops_with_outer(
        optax.sgd(0.1), NESTEROV, {name: params[name] for name in moving},
        lambda params, step: params, 2, 4,
    )  # fmt: skip
    for i, (fast, _, _) in enumerate(visited):
        if i == 1:  # within a cycle, the loop sets what no optimizer moves
            params |= {"frozen": jnp.zeros(2), "flag": ~params["flag"]}
            current |= {name: params[name] for name in ("frozen", "flag")}
        current, state = step(current, state)
        for name in moving:
            tolerance = 0.02 if name == "half" else 1e-5
            np.testing.assert_allclose(
                np.asarray(current[name], complex),
                np.asarray(fast[name], complex),
                tolerance,
            )
        assert current["count"] == 3 + i + 1
        assert state.slow_params["count"] == 3 + 2 * ((i + 1) // 2)
        assert_same_bits(state.outer_state[0].trace["frozen"], jnp.zeros(2))
        for name in ("frozen", "flag", "key", "nothing"):
            assert_same_bits(current[name], params[name])
            assert_same_bits(state.slow_params[name], params[name])


def nesterov(rate, decay):
    return optax.inject_hyperparams(optax.sgd)(rate, momentum=decay, nesterov=True)


def losses(k, rate, decay):
    tx = outer_loop(INNER, nesterov(rate, decay), k)
    params, _ = scanned(tx, jnp.array([1.0, -2.0, 0.5]), gradient, 9)
    return jnp.sum(params**2, axis=-1)


def test_k_and_outer_hyperparameters_can_be_tried_in_one_compile():
    settings = [(1, 0.7, 0.0), (2, 0.5, 0.9), (4, 1.0, 0.3), (9, 0.2, 0.6)]
    runs = jax.jit(jax.vmap(losses))(*map(jnp.asarray, zip(*settings, strict=True)))
    for run, (k, rate, decay) in zip(runs, settings, strict=True):
        visited = two_loops_with_outer(
            INNER,
            optax.sgd(rate, momentum=decay, nesterov=True),
            jnp.array([1.0, -2.0, 0.5]),
            gradient,
            k,
            9,
        )
        expected = [jnp.sum(fast**2) for fast, _, _ in visited]
        np.testing.assert_allclose(run, expected, rtol=1e-5)


def test_an_injected_outer_learning_rate_can_be_changed_in_mid_run():
    tx = outer_loop(optax.sgd(1.0), nesterov(0.5, 0.0), 2)
    update, params, ends = jax.jit(tx.update), jnp.array(0.0), []
    state = tx.init(params)
    for rate in (0.5, 0.25):
        state.outer_state.hyperparams["learning_rate"] = jnp.asarray(rate)
        for _ in range(2):
            updates, state = update(jnp.ones_like(params), state, params)
            params = params + updates
        ends.append(float(params))
    assert ends == [-1.0, -1.5]


def test_the_gradient_by_outer_hyperparameters_is_that_of_finite_differences(x64):
    def last(rate, decay):
        return losses(3, rate, decay)[-1]

    rate, decay, h = 0.7, 0.4, 1e-5
    by_rate, by_decay = jax.jit(jax.grad(last, (0, 1)))(rate, decay)
    last = jax.jit(last)
    slope = (last(rate + h, decay) - last(rate - h, decay)) / (2 * h)
    np.testing.assert_allclose(by_rate, slope, rtol=1e-7)
    slope = (last(rate, decay + h) - last(rate, decay - h)) / (2 * h)
    np.testing.assert_allclose(by_decay, slope, rtol=1e-7)


MESH_PARAMS = {"w": jnp.arange(16.0).reshape(8, 2), "b": jnp.ones(8)}


def steps_on_one_device():
    visited = trajectory(
        outer_loop(INNER, NESTEROV, 2), MESH_PARAMS, gradient, 5, jax.jit
    )
    return [(params, state.slow_params, state.outer_state) for params, state in visited]


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_on_a_mesh_all_that_is_like_a_parameter_is_split_like_it(axis_type):
    mesh = make_mesh({"data": 8}, axis_type)
    with use_mesh(mesh):
        params = jax.device_put(MESH_PARAMS, NamedSharding(mesh, P("data")))
        tx = outer_loop(INNER, NESTEROV, 2)
        visited = trajectory(tx, params, gradient, 5, jax.jit)
    for (params, state), expected in zip(visited, steps_on_one_device(), strict=True):
        got = params, state.slow_params, state.outer_state
        assert_close(got, expected)
        for x in jax.tree.leaves(got):
            assert x.sharding.is_equivalent_to(NamedSharding(mesh, P("data")), x.ndim)


def test_inside_shard_map_every_device_steps_its_own_part():
    mesh = make_mesh({"data": 8}, AxisType.Auto)
    tx = outer_loop(INNER, NESTEROV, 2)

    def train(params):
        params, state = trajectory(tx, params, gradient, 5)[-1]
        return params, state.slow_params, state.outer_state

    train = jax.jit(
        jax.shard_map(train, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    )
    assert_close(train(MESH_PARAMS), steps_on_one_device()[-1])
