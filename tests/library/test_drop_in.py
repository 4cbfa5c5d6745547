"""Does code that works with any Optax optimizer work with this one, unchanged?"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from optax_lookahead import LookaheadState, lookahead, outer_loop, slow_params

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
        "outer_state",
        "anchor",
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


def test_map_params_builds_the_shardings_of_a_whole_state():
    mesh = Mesh(np.asarray(jax.devices()), ("data",))
    params = {"w": jnp.ones((8, 2)), "b": jnp.ones(8)}
    tx = lookahead(optax.adam(0.1))
    shardings = {
        "w": NamedSharding(mesh, PartitionSpec("data", None)),
        "b": NamedSharding(mesh, PartitionSpec("data")),
    }
    everywhere = NamedSharding(mesh, PartitionSpec())
    state_shardings = optax.tree.map_params(
        tx,
        lambda _, sharding: sharding,
        jax.eval_shape(tx.init, params),
        shardings,
        transform_non_params=lambda _: everywhere,
    )
    state = jax.jit(tx.init, out_shardings=state_shardings)(params)
    assert jax.tree.map(lambda x: x.sharding, state) == state_shardings
    assert state.slow_params["w"].sharding == shardings["w"]


def test_tree_set_on_the_counter_ends_a_cycle_early():
    tx = optax.chain(lookahead(optax.sgd(0.1), 5, 0.5))
    _, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    state = optax.tree.set(state, steps_since_sync=jnp.asarray(4, jnp.int32))
    _, state = tx.update(PARAMS, state, PARAMS)
    assert optax.tree.get(state, "steps_since_sync") == 0
    assert optax.tree.get(state, "sync_count") == 1


def test_training_continues_with_a_state_whose_counters_were_cast_too():
    tx, half = lookahead(optax.sgd(0.1), 2), optax.tree.cast(PARAMS, jnp.bfloat16)
    state = optax.tree.cast(tx.init(PARAMS), jnp.bfloat16)
    before = jax.tree.map(jnp.result_type, state)
    for _ in range(4):
        updates, state = tx.update(half, state, half)
        half = optax.apply_updates(half, updates)
    assert jax.tree.map(jnp.result_type, state) == before
    assert state.steps_since_sync == 0
    assert state.sync_count == 2
    jax.tree.map(np.testing.assert_array_equal, state.slow_params, half)


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


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("slow_dtype", [None, "float32"])
def test_a_loop_that_turns_integers_and_flags_into_floats_trains(slow_dtype, transform):
    # `optax.apply_updates` does not, but a loop's own `p + u` does.
    start = {"w": jnp.ones(2), "n": jnp.asarray([3, -2]), "on": jnp.asarray(True)}
    grads = {"w": jnp.ones(2), "n": jnp.asarray([0.5, -2.0]), "on": jnp.asarray(1.0)}
    results = {}
    for name, tx in {
        "alone": optax.sgd(0.3),
        "lookahead": lookahead(optax.sgd(0.3), 2, 0.5, slow_dtype=slow_dtype),
        "outer": outer_loop(optax.sgd(0.3), optax.adam(0.1), 2, slow_dtype=slow_dtype),
    }.items():
        params, state = start, tx.init(start)
        update = transform(tx.update)
        dtypes = jax.tree.map(jnp.result_type, state)
        for _ in range(5):
            updates, state = update(grads, state, params)
            params = jax.tree.map(lambda p, u: p + u, params, updates)
            assert jax.tree.map(jnp.result_type, state) == dtypes
            if name != "alone":
                slow = slow_params(state, params)
                for leaf in ("n", "on"):
                    np.testing.assert_array_equal(slow[leaf], params[leaf])
        results[name] = params
    for leaf in ("n", "on"):
        assert results["alone"][leaf].dtype == jnp.float32
        for name in ("lookahead", "outer"):
            np.testing.assert_allclose(results[name][leaf], results["alone"][leaf])


FRESH = {
    "keep": "keep",
    "reset": "reset",
    "interpolate": "interpolate",
    "function": lambda state, fresh: state,
}
BY_NAME = {
    **{
        f"{name}, {slow_dtype}": functools.partial(
            lookahead, k=2, inner_state=policy, slow_dtype=slow_dtype
        )
        for name, policy in FRESH.items()
        for slow_dtype in (None, "float32")
    },
    "outer_loop": lambda inner: outer_loop(inner, optax.lion(0.1), 2),
}


@pytest.mark.parametrize("name", BY_NAME)
def test_every_field_of_the_inner_state_is_found_once_by_name_and_can_be_set(name):
    inner = optax.inject_hyperparams(optax.adamw)(0.1, weight_decay=0.01)
    tx = BY_NAME[name](inner)
    state = tx.init(PARAMS)
    for _ in range(3):
        _, state = tx.update(PARAMS, state, PARAMS)
    for field in ("nu", "learning_rate", "weight_decay", "b1", "eps"):
        ((_, found),) = optax.tree.get_all_with_path(state, field)
        ((_, expected),) = optax.tree.get_all_with_path(state.fast_state, field)
        jax.tree.map(np.testing.assert_array_equal, found, expected)
        jax.tree.map(
            np.testing.assert_array_equal, optax.tree.get(state, field), expected
        )
    changed = optax.tree.set(state, learning_rate=jnp.asarray(0.01))
    assert jax.tree.structure(changed) == jax.tree.structure(state)
    # And it stays as set, through syncs.
    for _ in range(3):
        _, changed = tx.update(PARAMS, changed, PARAMS)
        if not name.startswith("function"):
            np.testing.assert_allclose(optax.tree.get(changed, "learning_rate"), 0.01)
    # A metrics logger that flattens the state has one entry for each path.
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(state)]
    assert len(set(paths)) == len(paths)
    assert sum("learning_rate" in path for path in paths) == 1
