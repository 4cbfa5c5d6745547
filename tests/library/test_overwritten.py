"""What if the training loop overwrites some of its parameters in mid-cycle?

Every step is compared with Algorithm 1 in NumPy, where the same values are written into
the slow weights, and nothing else changes.
"""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers.optimizers import multi_steps

from optax_lookahead import (
    average_replicas,
    lookahead,
    outer_loop,
    set_slow_params,
    slow_params,
)

K, ALPHA, RATE, STEPS = 4, 0.5, 0.1, 12
RNG = np.random.default_rng(0)
# Of no axes to three, some that are overwritten beside some that are not.
START = {
    "head": {"scale": RNG.normal(), "w": RNG.normal(size=(2, 3))},
    "body": {"b": RNG.normal(size=3), "conv": RNG.normal(size=(2, 1, 2))},
}
NEW = {"head": {"scale": np.asarray(0.0), "w": np.full((2, 3), 5.0)}}


def gradient(theta, step):
    return jax.tree.map(lambda p: 0.5 * p + 0.3 * (step % 5), theta)


def add(x, y, factor):
    return jax.tree.map(lambda x, y: x + factor * y, x, y)


def paper(at, ks=(K,), told=True):
    """Returns the fast weights after every step, with `NEW` written before step `at`.

    There is a level of slow weights for each of `ks`.
    """
    theta = jax.tree.map(np.asarray, START)
    levels, visited = [theta for _ in ks], []
    for step in range(STEPS):
        if step == at:
            theta = theta | NEW
            levels = [phi | NEW if told else phi for phi in levels]
        theta = add(theta, gradient(theta, step), -RATE)
        for level, k in enumerate(ks):
            if (step + 1) % k == 0:
                moved = add(theta, levels[level], -1.0)
                theta = levels[level] = add(levels[level], moved, ALPHA)
                # The levels below restart from there.
                levels[:level] = [theta for _ in levels[:level]]
        visited.append(theta)
    return visited


def train(tx, at, overwrite, transform=jax.jit):
    params = jax.tree.map(jnp.asarray, START)
    state, visited = tx.init(params), []

    @transform
    def train_step(params, state, step):
        updates, state = tx.update(gradient(params, step), state, params)
        return optax.apply_updates(params, updates), state

    for step in range(STEPS):
        if step == at:
            params = params | jax.tree.map(jnp.asarray, NEW)
            state = overwrite(state, params)
        params, state = train_step(params, state, jnp.asarray(float(step)))
        visited.append(params)
    return visited


def assert_close(got, expected):
    for tree, wanted in zip(got, expected, strict=True):
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-7, atol=1e-8),
            tree,
            wanted,
        )


def head_alone(state, params):
    return set_slow_params(state, {"head": params["head"]})


def quick(k=K):
    return lookahead(optax.sgd(RATE), k, ALPHA)


EVERYTHING = {"head": True, "body": {"b": True, "conv": True}}
WRAPPERS = {
    "bare": quick(),
    "outer_loop": outer_loop(optax.sgd(RATE), optax.sgd(ALPHA), K),
    "chain": optax.chain(optax.identity(), quick()),
    "masked": optax.masked(quick(), EVERYTHING),
    "partition": optax.partition(
        {"one": quick(), "other": quick()}, {"head": "one", "body": "other"}
    ),
    "within a partition": lookahead(
        optax.partition(
            {"one": optax.sgd(RATE), "other": optax.sgd(RATE)},
            {"head": "one", "body": "other"},
        ),
        K,
        ALPHA,
    ),
    "MultiSteps": multi_steps(quick(), 1),
    "apply_if_finite": optax.apply_if_finite(quick(), 3),
    "inject_hyperparams": optax.inject_hyperparams(lookahead)(
        optax.sgd(RATE), k=K, alpha=ALPHA
    ),
    "split": optax.contrib.split_real_and_imaginary(quick()),
    "interpolate": lookahead(optax.sgd(RATE), K, ALPHA, inner_state="interpolate"),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_overwritten_parameters_train_from_the_new_values_and_others_as_before(
    x64, name
):
    for at in (5, 7):
        assert_close(train(WRAPPERS[name], at, head_alone), paper(at))


@pytest.mark.parametrize("at", range(K, 2 * K))
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_parameters_can_be_overwritten_at_every_step_of_a_cycle(x64, at, transform):
    got = train(quick(), at, transform(head_alone), transform)
    assert_close(got, paper(at))


def test_without_set_slow_params_the_next_sync_partly_undoes_the_change(x64):
    got = train(quick(), 6, lambda state, params: state)
    assert_close(got, paper(6, told=False))
    ahead = add(got[7]["head"], paper(6)[7]["head"], -1.0)
    # By half of the difference of the new values and the slow weights.
    old = paper(6, told=False)[3]["head"]
    expected = jax.tree.map(lambda x, y: ALPHA * (x - y), old, NEW["head"])
    assert_close([ahead], [expected])


@pytest.mark.parametrize("at", [5, 6, 7])
@pytest.mark.parametrize("outer_k", [4, 8])
def test_every_level_of_nested_lookaheads_takes_the_new_values(x64, at, outer_k):
    tx = lookahead(quick(2), outer_k, ALPHA)
    assert_close(train(tx, at, head_alone), paper(at, (2, outer_k)))
    # In an outer optimizer too.
    tx = optax.chain(outer_loop(quick(2), optax.sgd(ALPHA), outer_k))
    assert_close(train(tx, at, head_alone), paper(at, (2, outer_k)))


@pytest.mark.parametrize(
    "tx",
    [
        optax.flatten(quick()),
        optax.flatten(optax.contrib.split_real_and_imaginary(quick())),
        optax.contrib.split_real_and_imaginary(optax.flatten(quick())),
    ],
    ids=["flatten", "flatten of split", "split of flatten"],
)
def test_in_one_vector_all_are_given_and_the_others_as_their_slow_weights(x64, tx):
    def overwrite(state, params):
        return set_slow_params(state, slow_params(state, params) | NEW)

    assert_close(train(tx, 6, overwrite), paper(6))


def test_a_complex_parameter_in_two_parts_is_set_beside_one_that_is_not():
    tx = optax.contrib.split_real_and_imaginary(quick())
    params = {"z": jnp.asarray([1 + 2j]), "w": jnp.ones(2)}
    state = set_slow_params(tx.init(params), {"z": jnp.asarray([3 - 4j])})
    slow = state.inner_state.slow_params
    assert [float(part[0]) for part in slow["z"]] == [3.0, -4.0]
    np.testing.assert_array_equal(slow["w"], params["w"])


def test_all_parameters_can_be_overwritten_and_the_counter_stays(x64):
    # The best weights reloaded: a cycle that is shorter, from the loaded weights.
    loaded = jax.tree.map(lambda p: jnp.asarray(p) + 1.0, START)
    tx = quick()
    params = jax.tree.map(jnp.asarray, START)
    state = tx.init(params)
    for step in range(2):
        updates, state = tx.update(gradient(params, step), state, params)
        params = optax.apply_updates(params, updates)
    state, params = set_slow_params(state, loaded), loaded
    for step in range(2, 4):
        updates, state = tx.update(gradient(params, step), state, params)
        params = optax.apply_updates(params, updates)
    fast = loaded
    for step in range(2, 4):
        fast = add(fast, gradient(fast, step), -RATE)
    assert_close([params], [add(loaded, add(fast, loaded, -1.0), ALPHA)])
    assert (state.steps_since_sync, state.sync_count) == (0, 1)


def test_the_counter_set_to_zero_begins_a_cycle_for_all_at_every_level(x64):
    # What the page says of `optax.tree.set`.
    zero = jnp.zeros([], jnp.int32)
    loaded = jax.tree.map(lambda p: jnp.asarray(p) + 1.0, START)
    for tx in (quick(2), optax.chain(lookahead(quick(2), 4, ALPHA))):
        params, state = jax.tree.map(jnp.asarray, START), None
        for at in (0, 3):  # and once more, from the start
            state = tx.init(params) if at == 0 else state
            if at == 3:
                params, state = loaded, optax.tree.set(state, steps_since_sync=zero)
            for step in range(3):
                updates, state = tx.update(gradient(params, step), state, params)
                params = optax.apply_updates(params, updates)
        expected, fresh = loaded, tx.init(loaded)
        for step in range(3):
            updates, fresh = tx.update(gradient(expected, step), fresh, expected)
            expected = optax.apply_updates(expected, updates)
        assert_close([params], [expected])


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_wide_slow_weight_takes_what_is_new_and_keeps_its_bits_elsewhere(
    dtype, transform
):
    tx = lookahead(optax.sgd(1.0), 2, 0.5, slow_dtype="float32")
    params = {"a": jnp.asarray([1.0, 2.0, 3.0], dtype), "b": jnp.asarray(0.3, dtype)}
    state = tx.init(params)
    wide = jax.tree.map(lambda x: x * (1 + 1e-4), state.slow_params)
    state = state._replace(slow_params=wide, steps_since_sync=jnp.asarray(1))
    new = {"a": jnp.asarray([1.0, 0.0, jnp.nan], dtype)}
    got = transform(set_slow_params)(state, new)
    assert got.slow_params["a"].dtype == jnp.float32
    # A parameter that is the slow weight's rounding is not new, and NaN is ignored.
    np.testing.assert_array_equal(
        got.slow_params["a"], wide["a"].at[1].set(0.0).astype(jnp.float32)
    )
    assert got.slow_params["b"] == wide["b"]


def test_integers_keys_and_empty_leaves_are_set_too():
    params = {"n": jnp.arange(3), "key": jax.random.key(0), "e": jnp.ones((0, 2))}
    state = lookahead(optax.set_to_zero(), 2).init(params)
    new = {"n": jnp.arange(3) + 5, "key": jax.random.key(1), "e": jnp.ones((0, 2))}
    got = set_slow_params(state, new).slow_params
    np.testing.assert_array_equal(got["n"], new["n"])
    assert got["key"] == new["key"]
    assert jax.tree.structure(got) == jax.tree.structure(state.slow_params)


def test_rows_alone_are_overwritten_through_the_slow_weights():
    tx = lookahead(optax.sgd(0.1), 2, 0.5)
    params = {"embedding": jnp.ones((4, 2))}
    _, state = tx.update(params, tx.init(params), params)
    slow = {"embedding": state.slow_params["embedding"].at[1:3].set(7.0)}
    state = set_slow_params(state, slow)
    np.testing.assert_array_equal(
        state.slow_params["embedding"][:, 0], [1.0, 7.0, 7.0, 1.0]
    )


def test_one_member_of_a_population_takes_the_weights_of_another(x64):
    tx = quick()
    start = jnp.arange(6.0).reshape(3, 2)
    init, update = jax.vmap(tx.init), jax.jit(jax.vmap(tx.update))

    def members(params, state, steps):
        for step in steps:
            updates, state = update(gradient(params, step), state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    params, state = members(start, init(start), range(2))
    others = members(params, state, range(2, 4))[0]
    # Its own state, of which the slow weights alone are new.
    slow = state.slow_params.at[1].set(params[2])
    params = params.at[1].set(params[2])
    params, _ = members(params, set_slow_params(state, slow), range(2, 4))
    np.testing.assert_array_equal(params[::2], others[::2])
    fast = phi = members(start, init(start), range(2))[0][2]
    for step in range(2, 4):
        fast = fast - RATE * gradient(fast, step)
    np.testing.assert_allclose(params[1], phi + ALPHA * (fast - phi), rtol=1e-12)


def test_merged_adapters_keep_the_whole_merge_in_a_frozen_matrix():
    # ReLoRA: W takes B A in mid-cycle, B starts from 0, A is drawn again.
    labels = {"W": "frozen", "B": "lora", "A": "lora"}
    inner = optax.partition(
        {"frozen": optax.set_to_zero(), "lora": optax.sgd(0.1)}, labels
    )
    tx = lookahead(inner, k=5)
    params = {"W": jnp.eye(2), "B": jnp.ones((2, 1)), "A": jnp.ones((1, 2))}
    state, zeros = tx.init(params), jax.tree.map(jnp.zeros_like, params)
    for step in range(10):
        if step == 7:
            merged = params["W"] + params["B"] @ params["A"]
            params = {"W": merged, "B": jnp.zeros((2, 1)), "A": 2 * params["A"]}
            state = set_slow_params(state, params)
        updates, state = tx.update(zeros, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(params["W"], merged)
    assert not np.any(params["B"])
    np.testing.assert_array_equal(params["A"], jnp.full((1, 2), 2.0))


def test_fragments_still_sync_at_their_own_steps():
    # Streaming fragments: one period, two offsets.
    tx = optax.partition({"x": quick(), "y": quick()}, {"a": "x", "b": "y"})
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    state = tx.init(params)

    def counters(state):
        return [
            int(state.inner_states[name].inner_state.steps_since_sync) for name in "xy"
        ]

    shifted = state.inner_states["y"].inner_state._replace(
        steps_since_sync=jnp.asarray(2, jnp.int32)
    )
    inner_states = dict(state.inner_states)
    inner_states["y"] = inner_states["y"]._replace(inner_state=shifted)
    state = state._replace(inner_states=inner_states)
    _, state = tx.update(params, state, params)
    assert counters(state) == [1, 3]
    after = set_slow_params(state, {"b": jnp.zeros(2)})
    assert counters(after) == [1, 3]
    zero = jnp.zeros([], jnp.int32)
    assert counters(optax.tree.set(state, steps_since_sync=zero)) == [0, 0]


def test_replicas_that_all_overwrite_a_parameter_still_sync_together():
    outer = optax.chain(average_replicas("replica"), optax.sgd(1.0))
    tx = outer_loop(optax.sgd(0.1), outer, 3)
    rate = jnp.asarray([1.0, 3.0])  # their gradients
    params = jnp.ones((2, 2))
    state = jax.vmap(tx.init, axis_name="replica")(params)
    update = jax.vmap(tx.update, axis_name="replica")
    for step in range(3):
        if step == 1:
            params = jnp.full((2, 2), 5.0)
            state = set_slow_params(state, params)
        grads = jnp.broadcast_to(rate[:, None], params.shape)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    # Two steps of 0.1 times the mean gradient of 2, from the new values.
    np.testing.assert_allclose(params, jnp.full((2, 2), 4.6), rtol=1e-6)
    np.testing.assert_array_equal(state.steps_since_sync, [0, 0])


class Model(nnx.Module):
    def __init__(self, rngs):
        self.body = nnx.Linear(3, 4, rngs=rngs)
        self.head = nnx.Linear(4, 1, rngs=rngs)


@pytest.mark.parametrize("wrap", [lambda tx: tx, lambda tx: optax.chain(tx)])
def test_a_head_of_an_nnx_model_is_reset(wrap):
    x = jnp.ones((4, 3))

    def loss(model):
        return jnp.mean((model.head(nnx.tanh(model.body(x))) - 1.0) ** 2)

    tx = wrap(lookahead(optax.sgd(0.0), 3))
    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    body = np.asarray(model.body.kernel[...])
    for step in range(3):
        if step == 1:
            model.head.kernel[...] = jnp.zeros((4, 1))
            head = nnx.state(model, nnx.All(nnx.Param, nnx.PathContains("head")))
            new = set_slow_params(optimizer.opt_state, head)
            assert jax.tree.structure(new) == jax.tree.structure(optimizer.opt_state)
            nnx.update(optimizer.opt_state, nnx.state(new))
        optimizer.update(model, nnx.grad(loss)(model))
    assert not np.any(model.head.kernel[...])
    np.testing.assert_array_equal(model.body.kernel[...], body)


def test_an_nnx_optimizer_takes_the_counter_set_to_zero():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, lookahead(optax.sgd(0.0), 3), wrt=nnx.Param)
    grads = nnx.state(model, nnx.Param)
    for step in range(4):
        if step == 1:
            model.kernel[...] = jnp.zeros((3, 2))
            zero = jnp.zeros([], jnp.int32)
            state = optax.tree.set(optimizer.opt_state, steps_since_sync=zero)
            nnx.update(optimizer.opt_state, nnx.state(state))
        optimizer.update(model, grads)
    assert not np.any(model.kernel[...])
    assert optimizer.opt_state.sync_count[...] == 1


def test_a_head_of_an_equinox_model_is_reset():
    model = eqx.nn.MLP(3, 1, 4, 1, key=jax.random.key(0))
    tx = lookahead(optax.sgd(0.0), 3)
    arrays = functools.partial(eqx.filter, filter_spec=eqx.is_inexact_array)
    state = tx.init(arrays(model))
    body = np.asarray(model.layers[0].weight)
    for step in range(3):
        if step == 1:
            head = lambda m: m.layers[-1].weight  # noqa: E731
            model = eqx.tree_at(head, model, jnp.zeros((1, 4)))
            only = eqx.tree_at(head, jax.tree.map(lambda _: False, model), True)
            state = set_slow_params(state, eqx.filter(model, only))
        updates, state = tx.update(arrays(model), state, arrays(model))
        model = eqx.apply_updates(model, updates)
    assert not np.any(model.layers[-1].weight)
    np.testing.assert_array_equal(model.layers[0].weight, body)
