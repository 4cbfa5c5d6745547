"""Is all that the README's table says of `optax.lookahead` so, and of this one too?"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

from optax_lookahead import lookahead

PARAMS = {"w": jnp.array([1.0, -2.0]), "b": jnp.array([3.0])}


def train(tx, params, steps=4, **extra_args):
    state = tx.init(params)
    for _ in range(steps):
        grads = params.fast if isinstance(params, optax.LookaheadParams) else params
        updates, state = tx.update(grads, state, params, **extra_args)
        params = optax.apply_updates(params, updates)
    return params, state


def in_train_state(make, params):
    tx = make(optax.sgd(0.1), 2, 0.5)
    state = TrainState.create(apply_fn=None, params=PARAMS, tx=tx)
    state.apply_gradients(grads=PARAMS)


def in_nnx_optimizer(make, params):
    model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, make(optax.sgd(0.1), 2, 0.5), wrt=nnx.Param)
    grads = nnx.grad(lambda model: model(jnp.ones((1, 2))).sum())(model)
    optimizer.update(model, grads)


def in_masked(make, params):
    train(optax.masked(make(optax.sgd(0.1), 2, 0.5), {"w": True, "b": False}), params)


def in_partition(make, params):
    transforms = {"a": make(optax.sgd(0.1), 2, 0.5), "b": optax.sgd(0.1)}
    train(optax.partition(transforms, {"w": "a", "b": "b"}), params)


def in_multi_steps(make, params):
    train(optax.MultiSteps(make(optax.sgd(0.1), 2, 0.5), 2), params)


def in_apply_if_finite(make, params):
    train(optax.apply_if_finite(make(optax.sgd(0.1), 2, 0.5), 3), params)


def with_extra_arguments(make, params):
    train(make(optax.polyak_sgd(), 2, 0.5), params, value=jnp.asarray(1.0))


def with_a_traced_k(make, params):
    jax.jit(lambda k: train(make(optax.sgd(0.1), k, 0.5), params))(2)


def with_injected_hyperparameters(make, params):
    tx = optax.inject_hyperparams(make)(optax.sgd(0.1), 2, 0.5)
    jax.jit(lambda params: train(tx, params))(params)


def with_a_schedule(make, params):
    train(make(optax.sgd(0.1), 2, optax.constant_schedule(0.5)), params)


def with_donation(make, params):
    tx = make(optax.sgd(0.1), 2, 0.5)
    params = jax.tree.map(jnp.copy, PARAMS)
    if make is optax.lookahead:
        params = optax.LookaheadParams.init_synced(params)

    def step(params, state):
        updates, state = tx.update(PARAMS, state, params)
        return optax.apply_updates(params, updates), state

    jax.jit(step, donate_argnums=(0, 1))(params, tx.init(params))


@pytest.mark.parametrize(
    ("use", "error"),
    [
        (in_train_state, AttributeError),
        (in_nnx_optimizer, AttributeError),
        (in_masked, ValueError),
        (in_partition, ValueError),
        (in_multi_steps, ValueError),
        (in_apply_if_finite, TypeError),
        (with_extra_arguments, TypeError),
        (with_a_traced_k, jax.errors.TracerBoolConversionError),
        (with_injected_hyperparameters, jax.errors.TracerBoolConversionError),
        (with_a_schedule, TypeError),
        (with_donation, jax.errors.JaxRuntimeError),
    ],
)
def test_works_here_and_is_an_error_upstream(use, error):
    use(lookahead, PARAMS)
    with pytest.raises(error):
        use(optax.lookahead, optax.LookaheadParams.init_synced(PARAMS))


def test_an_infinite_gradient_inside_a_cycle_spoils_only_upstream_slow_weights():
    infinite = jax.tree.map(lambda p: jnp.full_like(p, jnp.inf), PARAMS)
    tx = lookahead(optax.sgd(0.1), 5, 0.5)
    _, state = tx.update(infinite, tx.init(PARAMS), PARAMS)
    jax.tree.map(np.testing.assert_array_equal, state.slow_params, PARAMS)
    pair = optax.LookaheadParams.init_synced(PARAMS)
    tx = optax.lookahead(optax.sgd(0.1), 5, 0.5)
    updates, _ = tx.update(infinite, tx.init(pair), pair)
    pair = optax.apply_updates(pair, updates)
    assert np.all(np.isnan(pair.slow["w"]))


def test_only_upstream_fast_and_slow_weights_differ_after_a_sync():
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=1000), jnp.float32)}
    fast, state = train(lookahead(optax.adam(0.1), 2, 0.3), params, steps=2)
    np.testing.assert_array_equal(state.slow_params["w"], fast["w"])
    pair = optax.LookaheadParams.init_synced(params)
    pair, _ = train(optax.lookahead(optax.adam(0.1), 2, 0.3), pair, steps=2)
    assert np.any(np.asarray(pair.fast["w"]) != np.asarray(pair.slow["w"]))
