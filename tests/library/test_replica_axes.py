"""Does `replica_axes` find the arrays that replicas share in any state?"""

import jax
import jax.numpy as jnp
import optax
import pytest

from optax_lookahead import average_replicas, lookahead, outer_loop, replica_axes

PARAMS = {"w": jnp.ones((4, 2)), "t": jnp.ones([])}
ADAM = optax.adam(0.1)


def averaged(inner=ADAM, outer=ADAM, k=2):
    return outer_loop(inner, optax.chain(average_replicas("replica"), outer), k)


def twice(tx):
    return optax.MultiSteps(tx, 2).gradient_transformation()


def injected(inner=ADAM, k=2):
    static = "inner", "outer", "inner_state", "slow_dtype"
    return optax.inject_hyperparams(outer_loop, static_args=static)(
        inner=inner, outer=ADAM, k=k
    )


def shared(tx, params=PARAMS):
    """Returns the ends of the paths to what all replicas share, and checks the rest."""
    state = tx.init(params)
    axes = jax.tree.leaves_with_path(replica_axes(state), is_leaf=lambda x: x is None)
    assert {axis for _, axis in axes} == {0, None}
    found = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, axis in axes
        if axis is None
    }
    return sorted(found & set(by_path(state)))


def by_path(state):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): x
        for path, x in jax.tree.leaves_with_path(state)
    }


COUNTERS = ["steps_since_sync", "sync_count"]


def below(*prefixes):
    return sorted(f"{prefix}/{name}" for prefix in prefixes for name in COUNTERS)


MULTI = ["gradient_step", "mini_step"]
INJECTED = ["count", "hyperparams/k"]
CASES = {
    "alone": (averaged(), COUNTERS),
    "lookahead": (lookahead(ADAM, 2), COUNTERS),
    "interpolate": (lookahead(ADAM, 2, inner_state="interpolate"), COUNTERS),
    "a chain around": (optax.chain(optax.clip(1.0), averaged()), below("1")),
    "masked": (
        optax.masked(averaged(), {"w": True, "t": False}),
        below("inner_state"),
    ),
    "MultiSteps around": (
        twice(averaged()),
        sorted([*MULTI, *below("inner_opt_state")]),
    ),
    "MultiSteps inside": (averaged(twice(ADAM)), COUNTERS),
    "MultiSteps outside": (averaged(outer=twice(ADAM)), COUNTERS),
    "an injected k": (injected(), sorted([*INJECTED, *below("inner_state")])),
    "an injected schedule inside": (
        averaged(optax.inject_hyperparams(optax.adam)(lambda count: 0.1)),
        COUNTERS,
    ),
    "conditionally_transform around": (
        optax.conditionally_transform(averaged(), lambda step: step > 3),
        sorted(["step", *below("inner_state")]),
    ),
    "conditionally_mask around": (
        optax.conditionally_mask(averaged(), lambda step: step > 3),
        sorted(["step", *below("inner_state")]),
    ),
    "SAM around": (
        optax.contrib.sam(averaged(), ADAM),
        sorted(["steps_since_sync", *below("opt_state")]),
    ),
    "SAM inside": (averaged(optax.contrib.sam(ADAM, ADAM)), COUNTERS),
    "one in another": (
        averaged(lookahead(ADAM, 3)),
        sorted([*COUNTERS, *below("fast_state")]),
    ),
    # The inner lookahead's counters cannot be shared if those that step it are not.
    "one in MultiSteps in another": (
        averaged(twice(lookahead(ADAM, 3))),
        sorted(
            [
                *COUNTERS,
                *(f"fast_state/{name}" for name in MULTI),
                *below("fast_state/inner_opt_state"),
            ]
        ),
    ),
    "a partition with a group that stays local": (
        optax.partition({"a": averaged(), "b": twice(ADAM)}, {"w": "a", "t": "b"}),
        below("inner_states/a/inner_state"),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_says_when_to_sync_is_shared_and_nothing_else(name):
    tx, expected = CASES[name]
    assert shared(tx) == expected


@pytest.mark.parametrize("name", CASES)
def test_the_tree_is_that_of_the_state_and_fits_vmap(name):
    tx, _ = CASES[name]
    axes = replica_axes(jax.eval_shape(tx.init, PARAMS))
    params = jax.tree.map(lambda x: jnp.stack([x] * 3), PARAMS)

    def step(params, state):
        return tx.update(params, state, params)

    @jax.jit
    def train(params):
        state = jax.vmap(tx.init, out_axes=axes)(params)
        step_of_all = jax.vmap(step, (0, axes), (0, axes), axis_name="replica")
        for _ in range(2):
            _, state = step_of_all(params, state)
        return state

    state, one = jax.eval_shape(train, params), jax.eval_shape(tx.init, PARAMS)
    alone = by_path(one)
    of_all = set(shared(tx))
    assert jax.tree.structure(state) == jax.tree.structure(one)
    for path, x in by_path(state).items():
        first = () if path in of_all else (3,)
        assert x.shape == (*first, *alone[path].shape), path


def test_a_state_without_a_lookahead_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match="Pass what the whole optimizer's `init`"):
        replica_axes(ADAM.init(PARAMS))
