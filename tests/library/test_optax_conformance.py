"""Does it pass the checks that Optax puts its own optimizers through?"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.meshes import make_mesh, use_mesh
from helpers.training import scanned, trajectory
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from optax_lookahead import lookahead, slow_params

K, ALPHA = 2, 0.3

FACTORIES = {
    "sgd": (optax.sgd, {}),
    "momentum": (optax.sgd, {"momentum": 0.9}),
    "adam": (optax.adam, {}),
    "adamw": (optax.adamw, {}),
    "lion": (optax.lion, {}),
    "rmsprop": (optax.rmsprop, {}),
    "adafactor": (optax.adafactor, {"min_dim_size_to_factor": 2}),
}
DTYPES = ["float16", "bfloat16", "float32", "float64", "complex64"]
every_inner = pytest.mark.parametrize("name", FACTORIES)


def make_inner(name, learning_rate=0.05):
    factory, arguments = FACTORIES[name]
    return factory(learning_rate, **arguments)


def make(name, alpha=ALPHA):
    return lookahead(make_inner(name), K, alpha)


def initial_params(dtype="float32"):
    matrix = jnp.linspace(-1.0, 2.0, 12).reshape(4, 3)
    return {"w": matrix.astype(dtype), "b": jnp.array([0.5, -1.5, 1.0], dtype)}


def gradient(params, step):
    return jax.tree.map(lambda p: p - jnp.asarray(0.1 * step, p.dtype), params)


def types(tree):
    """Returns shapes, dtypes, weak types and shardings of a tree."""
    return jax.tree.map(jax.typeof, tree)


def assert_close(got, expected, rtol=1e-5):
    # An absolute error too, since the two programs may round differently near 0.
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-6),
        got,
        expected,
    )


def assert_same_run(tx, expected_tx, state_of=lambda state: state):
    ours = trajectory(tx, initial_params(), gradient, 5, jax.jit)
    expected = trajectory(expected_tx, initial_params(), gradient, 5, jax.jit)
    for (params, state), (expected_params, expected_state) in zip(
        ours, expected, strict=True
    ):
        assert_close(params, expected_params)
        assert_close(state_of(state), expected_state)


@every_inner
def test_extra_arguments_that_the_inner_optimizer_does_not_know_are_ignored(name):
    tx, params = make(name), initial_params()
    state = tx.init(params)
    plain = jax.jit(tx.update)(params, state, params)
    extra = {"value": jnp.asarray(1.0), "an_argument_that_no_optimizer_expects": 1}
    assert_close(jax.jit(tx.update)(params, state, params, **extra), plain, rtol=0)


@pytest.mark.parametrize("init", [lambda f: f, jax.jit], ids=["eager", "jitted"])
@every_inner
def test_a_second_call_does_not_trace_again(name, init):
    tx, traces = make(name), []

    @jax.jit
    def update(updates, state, params):
        traces.append(params)
        return tx.update(updates, state, params)

    params = initial_params()
    state = init(tx.init)(params)
    for _ in range(4):
        _, state = update(params, state, params)
    assert len(traces) == 1


@every_inner
def test_inject_hyperparams_around_it_changes_nothing(name):
    injected = optax.inject_hyperparams(lookahead)(make_inner(name), k=K, alpha=ALPHA)
    assert_same_run(injected, make(name), lambda state: state.inner_state)


@every_inner
def test_inject_hyperparams_around_the_inner_optimizer_changes_nothing(name):
    factory, arguments = FACTORIES[name]
    # Optax's rule for adafactor: what decides on shapes is static.
    static = tuple(arguments.keys() & {"min_dim_size_to_factor"})
    inner = optax.inject_hyperparams(factory, static_args=static)
    tx = lookahead(inner(learning_rate=0.05, **arguments), K, ALPHA)
    assert_same_run(
        tx,
        make(name),
        lambda state: state._replace(fast_state=state.fast_state.inner_state),
    )


@every_inner
def test_a_constant_schedule_for_alpha_is_the_constant(name):
    assert_same_run(make(name, optax.constant_schedule(ALPHA)), make(name))


@every_inner
def test_a_constant_schedule_for_the_inner_learning_rate_is_the_constant(name):
    inner = make_inner(name, optax.constant_schedule(0.05))
    ours = trajectory(
        lookahead(inner, K, ALPHA), initial_params(), gradient, 5, jax.jit
    )
    expected = trajectory(make(name), initial_params(), gradient, 5, jax.jit)
    for (params, state), (expected_params, expected_state) in zip(
        ours, expected, strict=True
    ):
        # The inner state has the schedule's counter besides.
        assert_close(params, expected_params)
        assert_close(state.slow_params, expected_state.slow_params)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@every_inner
def test_updates_have_the_dtype_of_the_gradients_in_half_precision(name, dtype):
    tx, params = make(name), initial_params(dtype)
    state, update = jax.jit(tx.init)(params), jax.jit(tx.update)
    for step in range(K + 1):
        updates, state = update(gradient(params, step), state, params)
        assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@every_inner
def test_multi_steps_around_it_is_averaging_the_gradients_by_hand(name, dtype):
    tx, params = lookahead(make_inner(name, 0.25), K, ALPHA), initial_params(dtype)
    accumulated = optax.MultiSteps(tx, 2)
    multi_state, multi_update = accumulated.init(params), jax.jit(accumulated.update)
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(4):
        # Whole numbers, whose mean is exact in both dtypes.
        first = jax.tree.map(lambda p: jnp.round(3 * p) + 1, params)
        second = jax.tree.map(lambda p: jnp.round(5 * p), params)
        updates, multi_state = multi_update(first, multi_state, params)
        assert types(updates) == types(params)
        assert not any(np.any(u) for u in jax.tree.leaves(updates))
        updates, multi_state = multi_update(second, multi_state, params)
        mean = jax.tree.map(lambda a, b: (a + b) / 2, first, second)
        expected, state = update(mean, state, params)
        assert types(updates) == types(params)
        for p, got, wanted in zip(
            *map(jax.tree.leaves, (params, updates, expected)), strict=True
        ):
            p, got, wanted = map(np.float32, (p, got, wanted))
            # A rounding or two of the parameters, which a sync is computed from.
            size = np.max(np.abs(p)) + np.max(np.abs(wanted))
            atol = 2 * float(jnp.finfo(dtype).eps) * size
            np.testing.assert_allclose(got, wanted, rtol=0, atol=atol)
        assert multi_state.inner_opt_state.sync_count == state.sync_count
        params = optax.apply_updates(params, expected)
    assert state.sync_count == 2


def scan_with_skips(tx, params, flags):
    """Returns what `scan` is given and what it makes, skipping steps by `cond`."""

    def step(carry, flag):
        params, state = carry

        def skip(grads, state, params):
            return jax.tree.map(jnp.zeros_like, grads), state

        updates, state = jax.lax.cond(flag, tx.update, skip, params, state, params)
        return (optax.apply_updates(params, updates), state), ()

    carry = params, tx.init(params)
    return carry, jax.lax.scan(step, carry, flags)[0]


@pytest.mark.parametrize("dtype", DTYPES)
@every_inner
def test_the_state_has_one_type_in_cond_and_scan(x64, name, dtype):
    tx, params = make(name), initial_params(dtype)
    flags = jnp.array([True, False])
    # Both branches must have one type, and the carry must keep its type.
    before, after = jax.eval_shape(lambda p: scan_with_skips(tx, p, flags), params)
    assert types(after) == types(before) == types((params, tx.init(params)))
    # `cond` and `scan` let a weak type pass.
    result = jax.eval_shape(tx.update, params, tx.init(params), params)
    assert types(result) == types(before)


@every_inner
def test_steps_that_cond_skips_are_not_counted(name):
    tx, params = make(name), initial_params()
    flags = jnp.array([True, False, True, False, False, True])
    _, after = jax.jit(lambda p: scan_with_skips(tx, p, flags))(params)
    expected = trajectory(tx, params, lambda params, _: params, 3, jax.jit)[-1]
    assert_close(after, expected)


@every_inner
def test_abstract_init_and_update_match_the_concrete_ones(name):
    tx, params = make(name), initial_params()
    abstract = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
    state = tx.init(params)
    result = tx.update(params, state, params)
    for tree in (abstract, params):
        shapes = jax.eval_shape(tx.init, tree)
        assert types(shapes) == types(state)
        assert types(jax.eval_shape(tx.update, tree, shapes, tree)) == types(result)
    tx.init(abstract)  # Optax's own take them without `eval_shape` too.


@every_inner
def test_mapping_the_identity_over_the_params_in_the_state_changes_nothing(name):
    tx = make(name)
    state = tx.init(initial_params())
    mapped = optax.tree.map_params(tx, lambda x: x, state)
    assert jax.tree.structure(mapped) == jax.tree.structure(state)
    assert all(map(jnp.array_equal, jax.tree.leaves(mapped), jax.tree.leaves(state)))


def parabola(dtype):
    target = jnp.array([1.0, -1.0, 1.0]).astype(dtype)
    if jnp.iscomplexobj(target):
        target = target * (1 + 1j)
    start = jnp.array([-1.0, 10.0, 1.0]).astype(dtype)
    return start, target, lambda p: jnp.sum(jnp.abs(p - target) ** 2)


def rosenbrock(dtype):
    corner = 1 + 1j if dtype == "complex64" else 1.0
    start, target = jnp.zeros(2, dtype), jnp.array([corner, corner**2], dtype)

    def loss(p):
        first, second = corner - p[0], p[1] - p[0] ** 2
        return (first * first.conj() + 100 * second * second.conj()).real

    return start, target, loss


REACHING = {
    "momentum": optax.sgd(1e-3, momentum=0.9),
    "adam": optax.adam(0.02),
    "adamw": optax.adamw(0.02),
    "rmsprop": optax.rmsprop(5e-3),
    "adafactor": optax.adafactor(3e-3),
}


@pytest.mark.parametrize("dtype", ["float32", "complex64"])
@pytest.mark.parametrize("problem", [parabola, rosenbrock])
@pytest.mark.parametrize("name", REACHING)
def test_fast_and_slow_weights_reach_the_minimum(name, problem, dtype):
    start, target, loss = problem(dtype)
    tx = lookahead(REACHING[name], k=5, alpha=0.5)

    @jax.jit
    def train(params):
        # JAX's gradient of a complex parameter is the conjugate of the direction.
        return scanned(tx, params, lambda p, _: jax.grad(loss)(p).conj(), 30_001)

    params, state = jax.tree.map(lambda x: x[-1], train(start))
    assert state.steps_since_sync == 1
    for reached in (params, slow_params(state, params)):
        np.testing.assert_allclose(reached, target, rtol=0.03, atol=0.03)


@pytest.mark.parametrize("spec", [(None, "x"), ("x", "y")], ids=str)
@every_inner
def test_shardings_in_types_survive_init_and_updates(name, spec):
    mesh = make_mesh({"x": 4, "y": 2}, AxisType.Explicit)
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    inner, tx = make_inner(name), make(name)
    with use_mesh(mesh):
        params = jax.device_put(jnp.ones((8, 4, 2), jnp.float16), sharding)
        assert "@x" in str(jax.typeof(params))
        # Optax 0.2.6 starts adafactor's factors replicated and shards them in the
        # first update, so the measure is the inner optimizer alone.
        alone = inner.init(params)
        _, alone_after = inner.update(params, alone, params)
        state = tx.init(params)
        assert types(jax.jit(tx.init)(params)) == types(state)
        assert types(state.fast_state) == types(alone)
        for update in (tx.update, jax.jit(tx.update)):
            after = state
            for _ in range(K):
                updates, after = update(params, after, params)
                assert types(updates) == types(params)
                assert types(after.fast_state) == types(alone_after)
                assert types(after.slow_params) == types(params)
                assert types(after[2:]) == types(state[2:])
            assert after.sync_count == 1
            assert types(slow_params(after, params)) == types(params)
