"""Does code that works with any Optax optimizer work with this one, unchanged?"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState

from optax_lookahead import LookaheadState, lookahead, slow_params

PARAMS = {"w": jnp.array([[1.0, -2.0]]), "b": jnp.array([0.5])}


def test_it_is_a_gradient_transformation_with_extra_arguments():
    tx = lookahead(optax.sgd(0.1))
    assert isinstance(tx, optax.GradientTransformationExtraArgs)


def test_extra_arguments_reach_the_inner_optimizer():
    seen = {}

    def update_fn(updates, state, params=None, **extra_args):
        seen.update(extra_args)
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda params: (), update_fn)
    tx = lookahead(inner)
    tx.update(PARAMS, tx.init(PARAMS), PARAMS, value=1.5, batch="any")
    assert seen == {"value": 1.5, "batch": "any"}


def test_an_inner_optimizer_without_extra_arguments_is_not_given_any():
    tx = lookahead(optax.GradientTransformation(*optax.sgd(0.1)))
    tx.update(PARAMS, tx.init(PARAMS), PARAMS, value=1.5)


def test_an_inner_optimizer_that_needs_the_loss_value_trains():
    tx = lookahead(optax.polyak_sgd(), 2)
    state, params = tx.init(PARAMS), PARAMS

    def loss(params):
        return sum(jnp.sum(p**2) for p in jax.tree.leaves(params))

    for _ in range(6):
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params, value=value)
        params = optax.apply_updates(params, updates)
    assert loss(params) < 0.1 * loss(PARAMS)


def test_params_can_be_passed_by_keyword():
    tx = lookahead(optax.sgd(0.1))
    updates, _ = tx.update(PARAMS, tx.init(PARAMS), params=PARAMS)
    np.testing.assert_allclose(updates["b"], -0.1 * PARAMS["b"])


def test_no_state_field_hides_the_inner_optimizers_count():
    tx = lookahead(optax.adam(0.1), 2)
    state = tx.init(PARAMS)
    for _ in range(3):
        _, state = tx.update(PARAMS, state, PARAMS)
    assert optax.tree.get(state, "count") == 3
    assert LookaheadState._fields == (
        "fast_state",
        "slow_params",
        "steps_since_sync",
        "sync_count",
    )


def test_tree_get_and_map_params_know_the_slow_weights_as_parameters():
    tx = optax.chain(lookahead(optax.adam(0.1)))
    state = tx.init(PARAMS)
    slow = optax.tree.get(state, "slow_params")
    jax.tree.map(np.testing.assert_array_equal, slow, PARAMS)
    labels = optax.tree.map_params(
        tx, lambda _: "param", state, transform_non_params=lambda _: "other"
    )
    found = optax.tree.get(labels, "LookaheadState")
    assert found.slow_params == {"w": "param", "b": "param"}
    assert found.steps_since_sync == found.sync_count == "other"


def test_abstract_init_gives_the_shapes_that_init_would():
    tx = lookahead(optax.adam(0.1))
    concrete = tx.init(PARAMS)
    abstract = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), PARAMS)
    for state in (jax.eval_shape(tx.init, PARAMS), jax.eval_shape(tx.init, abstract)):
        assert jax.tree.structure(state) == jax.tree.structure(concrete)
        assert [(x.shape, x.dtype) for x in jax.tree.leaves(state)] == [
            (x.shape, x.dtype) for x in jax.tree.leaves(concrete)
        ]
    # Without `eval_shape` too, as Optax's own optimizers allow.
    assert tx.init(abstract).slow_params == abstract


def test_injected_k_and_alpha_change_in_mid_run_without_a_retrace():
    traces = []
    tx = optax.inject_hyperparams(lookahead)(optax.sgd(0.1), k=3, alpha=1.0)

    @jax.jit
    def step(params, state):
        traces.append(params)
        updates, state = tx.update(params, state, params)
        return optax.apply_updates(params, updates), state

    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(3):
        params, state = step(params, state)
    assert state.inner_state.sync_count == 1
    state.hyperparams["k"] = jnp.asarray(1)
    state.hyperparams["alpha"] = jnp.asarray(0.0, jnp.float32)
    for _ in range(2):
        before = params
        params, state = step(params, state)
        np.testing.assert_allclose(params["w"], before["w"], rtol=1e-6)
    assert state.inner_state.sync_count == 3
    assert len(traces) == 1


def test_the_same_train_state_loop_runs_with_and_without_lookahead():
    model = nn.Dense(1)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(64, 3)), jnp.float32)
    y = x @ jnp.array([[1.0], [-2.0], [0.5]])

    @jax.jit
    def train_step(state):
        def loss(params):
            return jnp.mean((state.apply_fn(params, x) - y) ** 2)

        value, grads = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=grads), value

    def train(tx):
        params = model.init(jax.random.key(0), x)
        state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
        for _ in range(60):
            state, value = train_step(state)
        return state, value

    _, alone = train(optax.sgd(0.2))
    state, wrapped = train(lookahead(optax.sgd(0.2), 5, 0.8))
    assert alone < 1e-3
    assert wrapped < 1e-3
    slow = slow_params(state.opt_state, state.params)
    jax.tree.map(np.testing.assert_array_equal, slow, state.params)
