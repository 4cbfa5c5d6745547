"""Do the training loops of Flax and Equinox run with it, unchanged?

Each loop is written once, for any optimizer, and run with and without lookahead; the
run with it is compared with a loop of Algorithm 1 around the same loss.
"""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.dynamic_scale import DynamicScale
from flax.training.train_state import TrainState
from helpers.training import two_loops

from optax_lookahead import lookahead, slow_params, with_inner_state

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(32, 3)), jnp.float32)
Y = jnp.sin(X @ jnp.array([[1.0], [-2.0], [0.5]]))
K, ALPHA, STEPS = 3, 0.5, 11
INNER = optax.sgd(0.1, momentum=0.9)


def assert_close(tree, expected, rtol=2e-5):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-6),
        tree,
        expected,
    )


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(nn.tanh(nn.Dense(8)(x)))


class BatchNormed(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(nn.Dense(8)(x))
        return nn.Dense(1)(nn.tanh(x))


class BatchStatsState(TrainState):
    batch_stats: dict


def test_a_flax_train_state_follows_two_plain_loops():
    model = MLP()
    params = model.init(jax.random.key(0), X)

    def loss(params):
        return jnp.mean((model.apply(params, X) - Y) ** 2)

    @jax.jit
    def train_step(state):
        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    expected = two_loops(
        INNER, params, lambda p, step: jax.grad(loss)(p), K, ALPHA, STEPS
    )
    tx = lookahead(INNER, K, ALPHA)
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    for fast, slow in expected:
        state = train_step(state)
        assert_close(state.params, fast)
        assert_close(slow_params(state.opt_state, state.params), slow)


def test_train_state_with_batch_statistics_of_the_fast_weights():
    model = BatchNormed()
    variables = model.init(jax.random.key(0), X, train=True)

    @jax.jit
    def train_step(state):
        def loss(params):
            variables = {"params": params, "batch_stats": state.batch_stats}
            out, new = model.apply(variables, X, train=True, mutable=["batch_stats"])
            return jnp.mean((out - Y) ** 2), new["batch_stats"]

        grads, batch_stats = jax.grad(loss, has_aux=True)(state.params)
        return state.apply_gradients(grads=grads, batch_stats=batch_stats)

    def train(tx):
        state = BatchStatsState.create(
            apply_fn=model.apply,
            params=variables["params"],
            batch_stats=variables["batch_stats"],
            tx=tx,
        )
        for _ in range(STEPS):
            state = train_step(state)
        return state

    def grads(params, step):
        def loss(params):
            variables_ = variables | {"params": params}
            out, _ = model.apply(variables_, X, train=True, mutable=["batch_stats"])
            return jnp.mean((out - Y) ** 2)

        return jax.grad(loss)(params)

    state, alone = train(lookahead(INNER, K, ALPHA)), train(INNER)
    expected = two_loops(INNER, variables["params"], grads, K, ALPHA, STEPS)
    assert_close(state.params, expected[-1][0])
    assert jax.tree.structure(state.batch_stats) == jax.tree.structure(
        alone.batch_stats
    )
    slow = slow_params(state.opt_state, state.params)
    out = model.apply(
        {"params": slow, "batch_stats": state.batch_stats}, X, train=False
    )
    assert np.all(np.isfinite(out))


def test_train_state_with_dynamic_scale_leaves_out_the_overflow():
    model = MLP()
    params = model.init(jax.random.key(0), X)

    @jax.jit
    def train_step(state, scale, x):
        def loss(params):
            return jnp.mean((model.apply(params, x) - Y) ** 2)

        scale, finite, _, grads = scale.value_and_grad(loss)(state.params)
        new = state.apply_gradients(grads=grads)
        # Flax's own recipe: on an overflow parameters and optimizer state stay.
        keep = jax.tree.map(
            lambda a, b: jnp.where(finite, a, b),
            (new.params, new.opt_state),
            (state.params, state.opt_state),
        )
        return new.replace(params=keep[0], opt_state=keep[1]), scale, finite

    tx = lookahead(INNER, K, ALPHA)
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    scale, seen = DynamicScale(), []
    for step in range(STEPS):
        x = jnp.full_like(X, jnp.inf) if step == 4 else X
        state, scale, finite = train_step(state, scale, x)
        seen.append(bool(finite))
    assert seen == [step != 4 for step in range(STEPS)]

    def grads(params, step):
        return jax.grad(lambda p: jnp.mean((model.apply(p, X) - Y) ** 2))(params)

    expected = two_loops(INNER, params, grads, K, ALPHA, STEPS - 1)
    assert_close(state.params, expected[-1][0])
    assert_close(slow_params(state.opt_state, state.params), expected[-1][1])


class NNXModel(nnx.Module):
    def __init__(self, rngs):
        self.inner = nnx.Linear(3, 8, rngs=rngs)
        self.dropout = nnx.Dropout(0.0, rngs=rngs)
        self.outer = nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, x):
        return self.outer(self.dropout(nnx.tanh(self.inner(x))))


class Head(nnx.Param):
    """The parameters that a filter selects."""


class FilteredModel(nnx.Module):
    def __init__(self, rngs):
        self.body = nnx.Linear(3, 8, rngs=rngs)
        self.head = Head(jnp.ones((8, 1)))

    def __call__(self, x):
        return nnx.tanh(self.body(x)) @ self.head[...]


def nnx_loss(model):
    return jnp.mean((model(X) - Y) ** 2)


@pytest.mark.parametrize("wrt", [nnx.Param, Head], ids=["Param", "filter"])
@pytest.mark.parametrize("transform", [lambda f: f, nnx.jit], ids=["eager", "nnx.jit"])
def test_an_nnx_optimizer_follows_two_plain_loops(wrt, transform):
    model = (NNXModel if wrt is nnx.Param else FilteredModel)(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, lookahead(INNER, K, ALPHA), wrt=wrt)

    @transform
    def train_step(model, optimizer):
        grads = nnx.grad(nnx_loss, argnums=nnx.DiffState(0, wrt))(model)
        optimizer.update(model, grads)

    graph, params, rest = nnx.split(model, wrt, ...)
    params = jax.tree.map(jnp.copy, params)  # apart from those that training changes

    def grads(params, step):
        return jax.grad(lambda p: nnx_loss(nnx.merge(graph, p, rest)))(params)

    for fast, slow in two_loops(INNER, params, grads, K, ALPHA, STEPS):
        train_step(model, optimizer)
        found = nnx.state(model, wrt)
        assert_close(jax.tree.leaves(found), jax.tree.leaves(fast))
        got = slow_params(optimizer.opt_state, found)
        assert jax.tree.structure(got) == jax.tree.structure(found)
        assert_close(jax.tree.leaves(got), jax.tree.leaves(slow))


def test_an_nnx_model_evaluates_the_slow_weights_that_are_put_into_it():
    model = NNXModel(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, lookahead(INNER, K, ALPHA), wrt=nnx.Param)
    before = nnx_loss(model)
    optimizer.update(model, nnx.grad(nnx_loss)(model))
    assert nnx_loss(model) != before
    nnx.update(model, slow_params(optimizer.opt_state, nnx.state(model, nnx.Param)))
    np.testing.assert_allclose(nnx_loss(model), before, rtol=1e-6)


def test_at_the_start_of_a_cycle_the_slow_weights_are_those_in_the_nnx_model():
    model = NNXModel(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, lookahead(INNER, K, ALPHA), wrt=nnx.Param)
    loaded = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
    nnx.update(model, loaded)
    slow = slow_params(optimizer.opt_state, nnx.state(model, nnx.Param))
    assert_close(jax.tree.leaves(slow), jax.tree.leaves(loaded))


def test_an_equinox_model_under_filter_jit_follows_two_plain_loops():
    model = eqx.nn.MLP(3, 1, 8, 1, activation=jnp.tanh, key=jax.random.key(0))

    def loss(model):
        return jnp.mean((jax.vmap(model)(X) - Y) ** 2)

    tx = lookahead(INNER, K, ALPHA)

    @eqx.filter_jit
    def train_step(model, state):
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, state = tx.update(eqx.filter_grad(loss)(model), state, params)
        return eqx.apply_updates(model, updates), state

    params, static = eqx.partition(model, eqx.is_inexact_array)
    state = tx.init(params)
    expected = two_loops(
        INNER,
        params,
        lambda p, step: jax.grad(lambda p: loss(eqx.combine(p, static)))(p),
        K,
        ALPHA,
        STEPS,
    )
    for fast, slow in expected:
        model, state = train_step(model, state)
        params = eqx.filter(model, eqx.is_inexact_array)
        assert_close(params, fast)
        assert_close(slow_params(state, params), slow)


def test_equinox_with_frozen_parameters_whose_updates_are_none():
    model = eqx.nn.Linear(3, 1, key=jax.random.key(0))
    tx = lookahead(optax.sgd(0.1), K, ALPHA)
    params = eqx.filter(model, eqx.is_array)
    state = tx.init(params)

    def loss(weight, model):
        model = eqx.tree_at(lambda m: m.weight, model, weight)
        return jnp.mean((jax.vmap(model)(X) - Y) ** 2)

    for _ in range(K):
        only_weight = jax.tree.map(lambda _: None, params)
        grads = eqx.tree_at(
            lambda m: m.weight,
            only_weight,
            jax.grad(loss)(model.weight, model),
            is_leaf=lambda x: x is None,
        )
        updates, state = tx.update(grads, state, eqx.filter(model, eqx.is_array))
        model = eqx.apply_updates(model, updates)
    np.testing.assert_array_equal(model.bias, params.bias)
    slow = slow_params(state, eqx.filter(model, eqx.is_array))
    np.testing.assert_array_equal(slow.weight, model.weight)
    np.testing.assert_array_equal(slow.bias, model.bias)


class Layer(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(2, 2, rngs=rngs)

    def __call__(self, x):
        return nnx.tanh(self.linear(x))


def test_an_ensemble_made_by_nnx_vmap_trains_each_member_by_itself():
    @nnx.vmap(in_axes=0, out_axes=0)
    def make_model(key):
        return Layer(nnx.Rngs(key))

    models = make_model(jax.random.split(jax.random.key(0), 3))
    x = jnp.ones((4, 2))

    @nnx.vmap(in_axes=(0, None), out_axes=0)
    def train(model, x):
        optimizer = nnx.Optimizer(model, lookahead(optax.adam(0.1), 2), wrt=nnx.Param)
        for _ in range(4):
            grads = nnx.grad(lambda m: jnp.mean((m(x) - 0.5) ** 2))(model)
            optimizer.update(model, grads)
        return jnp.mean((model(x) - 0.5) ** 2)

    before = [jnp.mean((nnx.tanh(x @ w) - 0.5) ** 2) for w in models.linear.kernel[...]]
    assert np.all(np.asarray(train(models, x)) < np.asarray(before))


def test_a_scan_over_model_and_optimizer_takes_the_steps_of_a_loop():
    x = jnp.ones((4, 2))

    def step(carry, _):
        model, optimizer = carry
        grads = nnx.grad(lambda m: jnp.mean((m(x) - 0.5) ** 2))(model)
        optimizer.update(model, grads)
        return carry

    trained = []
    for whole in (nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry), None):
        model = Layer(nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, lookahead(optax.adam(0.1), 3), wrt=nnx.Param)
        carry = model, optimizer
        if whole:
            model, optimizer = whole(carry, jnp.arange(7))
        else:
            for i in range(7):
                step(carry, i)
        slow = slow_params(optimizer.opt_state, nnx.state(model, nnx.Param))
        trained.append((nnx.state(model), slow, nnx.state(optimizer.opt_state)))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *trained
    )


def test_only_the_parameters_that_a_filter_names_have_slow_weights():
    model = nnx.Sequential(
        nnx.LoRA(
            2, 1, 2, base_module=nnx.Linear(2, 2, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1)
        )
    )
    tx = lookahead(optax.adam(0.1), 2)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)
    base = np.asarray(model.layers[0].base_module.kernel[...])
    for _ in range(4):
        grads = nnx.grad(
            lambda m: jnp.mean((m(jnp.ones((1, 2))) - 1.0) ** 2),
            argnums=nnx.DiffState(0, nnx.LoRAParam),
        )(model)
        optimizer.update(model, grads)
    np.testing.assert_array_equal(model.layers[0].base_module.kernel[...], base)
    slow = nnx.to_pure_dict(nnx.state(optimizer.opt_state))
    assert sum(np.size(x) for x in jax.tree.leaves(slow["slow_params"])) == 4


def test_an_nnx_model_and_optimizer_in_one_object_trains():
    if not hasattr(nnx, "ModelAndOptimizer"):
        pytest.skip("this version of Flax has no nnx.ModelAndOptimizer")
    both = nnx.ModelAndOptimizer(
        Layer(nnx.Rngs(0)), lookahead(optax.adam(0.1), 2), wrt=nnx.Param
    )
    x = jnp.ones((4, 2))

    def loss(model):
        return jnp.mean((model(x) - 0.5) ** 2)

    before = loss(both.model)
    for _ in range(6):
        both.update(nnx.grad(loss)(both.model))
    assert loss(both.model) < before


def test_an_nnx_optimizer_that_trained_without_lookahead_continues_with_it():
    x = jnp.ones((4, 2))

    def step(model, optimizer):
        grads = nnx.grad(lambda m: jnp.mean((m(x) - 0.5) ** 2))(model)
        optimizer.update(model, grads)

    model, adam = Layer(nnx.Rngs(0)), optax.adam(0.1)
    alone = nnx.Optimizer(model, adam, wrt=nnx.Param)
    for _ in range(3):
        step(model, alone)
    tx = lookahead(adam, 2, 0.5, inner_state="interpolate")
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    state = with_inner_state(tx, optimizer.opt_state, alone.opt_state)
    assert jax.tree.structure(state) == jax.tree.structure(optimizer.opt_state)
    nnx.update(optimizer.opt_state, nnx.state(state))

    # The same without variables.
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    state = adam.init(params)
    state = jax.tree.unflatten(
        jax.tree.structure(state), jax.tree.leaves(alone.opt_state)
    )
    state = with_inner_state(tx, tx.init(params), state)
    graph, variables = nnx.split(model)

    def loss(params):
        nnx.replace_by_pure_dict(variables, params)
        return jnp.mean((nnx.merge(graph, variables)(x) - 0.5) ** 2)

    for _ in range(4):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
        step(model, optimizer)
    got = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    assert_close(jax.tree.leaves(got), jax.tree.leaves(params))
