"""Does `slow_params` find the slow weights in any wrapper?"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.training import trajectory

from optax_lookahead import lookahead, slow_params

PARAMS = {"a": {"x": jnp.array([1.0, -2.0])}, "b": jnp.array([3.0])}


def gradient(params, step):
    return params


def slow_after(tx, steps, params=PARAMS):
    params, state = trajectory(tx, params, gradient, steps)[-1]
    return slow_params(state, params), params


def assert_equal(tree, expected):
    jax.tree.map(np.testing.assert_array_equal, tree, expected)


WRAPPERS = {
    "bare": lambda tx: tx,
    "chain": lambda tx: optax.chain(optax.clip(1e6), tx),
    "chain in chain": lambda tx: optax.chain(optax.chain(tx), optax.identity()),
    "named_chain": lambda tx: optax.named_chain(("slow", tx)),
    "masked": lambda tx: optax.masked(tx, True),
    "partition": lambda tx: optax.partition({"all": tx}, "all"),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 1).gradient_transformation(),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
}


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("name", WRAPPERS)
def test_the_slow_weights_are_found_inside(name, transform):
    bare = trajectory(lookahead(optax.sgd(0.1), 3), PARAMS, gradient, 7)
    wrapped = trajectory(
        WRAPPERS[name](lookahead(optax.sgd(0.1), 3)), PARAMS, gradient, 7
    )
    for (_, bare_state), (params, state) in zip(bare, wrapped, strict=True):
        slow = transform(slow_params)(state, params)
        assert_equal(slow, bare_state.slow_params)


@pytest.mark.parametrize("container", [list, tuple, lambda s: {"deep": [{"er": s}]}])
def test_the_slow_weights_are_found_in_any_container(container):
    params, state = trajectory(lookahead(optax.sgd(0.1), 3), PARAMS, gradient, 4)[-1]
    if container in (list, tuple):
        nested = container([optax.EmptyState(), (state,)])
    else:
        nested = container(state)
    assert_equal(slow_params(nested, params), state.slow_params)


def test_within_a_cycle_they_are_the_weights_the_cycle_started_from():
    slow, params = slow_after(lookahead(optax.sgd(0.1), 3), 2)
    assert_equal(slow, PARAMS)
    assert not np.array_equal(params["b"], PARAMS["b"])


@pytest.mark.parametrize("steps", [3, 6])
def test_after_a_sync_they_are_the_parameters_even_if_a_later_transform_moved_those(
    steps,
):
    tx = optax.chain(lookahead(optax.sgd(0.1), 3), optax.scale(0.5))
    slow, params = slow_after(tx, steps)
    assert_equal(slow, params)


def test_parameters_without_a_slow_copy_are_returned_as_they_are():
    tx = lookahead(optax.sgd(0.1), 3)
    slow, params = slow_after(optax.masked(tx, {"a": {"x": True}, "b": False}), 2)
    assert_equal(slow, {"a": PARAMS["a"], "b": params["b"]})
    # A mask that is a prefix leaves out the whole branch "a".
    slow, params = slow_after(optax.masked(tx, {"a": False, "b": True}), 2)
    assert_equal(slow, {"a": params["a"], "b": PARAMS["b"]})


def test_lookaheads_of_different_periods_on_different_parameters_are_merged():
    tx = optax.partition(
        {"fast": lookahead(optax.sgd(0.1), 2), "slow": lookahead(optax.sgd(0.1), 5)},
        {"a": "fast", "b": "slow"},
    )
    (after_2, _), (params, state) = (
        trajectory(tx, PARAMS, gradient, 3)[i] for i in (1, 2)
    )
    assert_equal(slow_params(state, params), {"a": after_2["a"], "b": PARAMS["b"]})


def test_of_nested_lookaheads_the_outermost_is_read():
    slow, _ = slow_after(lookahead(lookahead(optax.sgd(0.1), 2), 6), 4)
    assert_equal(slow, PARAMS)


def test_the_result_keeps_dtypes_and_the_tree():
    params = {"h": jnp.ones(2, jnp.bfloat16), "n": jnp.ones(2, jnp.int32), "e": None}
    tx = lookahead(optax.identity(), 2)
    slow = slow_params(tx.init(params), params)
    assert jax.tree.structure(slow) == jax.tree.structure(params)
    assert [x.dtype for x in jax.tree.leaves(slow)] == [jnp.bfloat16, jnp.int32]


def test_a_vmapped_ensemble_is_read_under_vmap():
    tx = lookahead(optax.sgd(0.1), 2)
    ensemble = jnp.arange(6.0).reshape(3, 2)
    state = jax.vmap(tx.init)(ensemble)
    _, state = jax.vmap(tx.update)(ensemble, state, ensemble)
    slow = jax.vmap(slow_params)(state, ensemble * 9)
    np.testing.assert_array_equal(slow, ensemble)


TREE = {"a": jnp.array([1.0, 2.0, 3.0]), "b": {"c": jnp.ones((2, 2))}}
COMPLEX = {**TREE, "z": jnp.array([1 + 2j, 3.0])}
SPLIT = optax.contrib.split_real_and_imaginary


def quick():
    return lookahead(optax.sgd(0.1), 2, 0.5)


OTHER_TREES = {
    "flatten": (TREE, optax.flatten(quick())),
    "MultiSteps of flatten": (
        TREE,
        optax.MultiSteps(optax.flatten(quick()), 1).gradient_transformation(),
    ),
    "apply_if_finite of flatten": (
        TREE,
        optax.apply_if_finite(optax.flatten(quick()), 1),
    ),
    "split": (COMPLEX, SPLIT(quick())),
    "masked split": (
        COMPLEX,
        optax.masked(SPLIT(quick()), {"a": True, "b": {"c": True}, "z": True}),
    ),
    "flatten of split": (COMPLEX, optax.flatten(SPLIT(quick()))),
    "split of flatten": (COMPLEX, SPLIT(optax.flatten(quick()))),
    "partitioned split": (
        COMPLEX,
        optax.partition(
            {"real": quick(), "z": SPLIT(quick())},
            {"a": "real", "b": {"c": "real"}, "z": "z"},
        ),
    ),
    "one complex array": (COMPLEX["z"], SPLIT(quick())),
}


# JAX warns when a vector of complex and real parameters is unflattened.
@pytest.mark.filterwarnings("ignore:Casting from complex:DeprecationWarning")
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("name", OTHER_TREES)
def test_it_reads_through_wrappers_that_change_the_tree(name, wide):
    start, tx = OTHER_TREES[name]
    params, state = start, tx.init(start)
    for steps in range(1, 6):
        grads = jax.tree.map(jnp.ones_like, params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        # Two steps of 0.1, of which half is kept.
        expected = jax.tree.map(lambda p, n=steps // 2: p - 0.1 * n, start)
        slow = slow_params(state, params, wide=wide)
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), slow, expected
        )
        assert jax.tree.map(jnp.result_type, slow) == jax.tree.map(
            jnp.result_type, params
        )


MASK = {"a": True, "b": {"c": False}}


@pytest.mark.parametrize(
    "tx",
    [
        optax.masked(optax.flatten(quick()), MASK),
        optax.partition({True: optax.flatten(quick()), False: optax.sgd(0.1)}, MASK),
        optax.chain(optax.clip(1.0), optax.masked(optax.flatten(quick()), MASK)),
    ],
    ids=["masked", "partition", "chain"],
)
def test_a_vector_of_a_part_is_refused_with_both_shapes_and_read_with_that_part(tx):
    state = tx.init(TREE)
    message = (
        "`opt_state` must hold slow weights of the tree `params`, got one vector of "
        "shape (3,), where `params` has 7 numbers."
    )
    with pytest.raises(ValueError, match=re.escape(message)) as refusal:
        slow_params(state, TREE)
    for name in ("optax.flatten", "optax.masked", "optax.partition"):
        assert name in str(refusal.value)
    # The remedy: that wrapper's state, with that part.
    part = {"a": TREE["a"]}
    np.testing.assert_array_equal(slow_params(state, part)["a"], TREE["a"])
