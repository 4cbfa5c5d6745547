"""What is left of a sync's move after a step of an optimizer that stores parameters?"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.optimizers import NAMES, START, arguments, make
from helpers.rows import slow_but

from optax_lookahead import lookahead

# The part of a move by 0.25 that is left after the next step, given the same gradient
# with the move and without it: all of it, unless the optimizer's state has parameters.
ALL = 1.0
STORED = {
    "cocob": 0.0,  # steps from where it started
    "lbfgs": 1.9,  # the last parameters are in its memory of differences
    "lbfgs_without_linesearch": 1.85,
    "madgrad": 0.9,  # an average with where it started
    "scale_by_madgrad": 0.9,
    "mechanize": 1.4,  # scales the difference to where it started
    "schedule_free": 0.8,  # has a sequence beside the parameters in its state
    "schedule_free_adamw": 0.65,
    "schedule_free_sgd": 0.65,
}


def left(name):
    """Returns it, averaged over all elements."""
    tx = optax.with_extra_args_support(make(name))
    params = jax.tree.map(jnp.asarray, START)
    state = tx.init(params)
    for step in range(4):
        grads, extra = arguments(name, params, step)
        updates, state = tx.update(grads, state, params, **extra)
        params = optax.apply_updates(params, updates)
    grads, extra = arguments(name, params, 4)
    ends = []
    for move in (0.0, 0.25):
        moved = jax.tree.map(lambda p, move=move: p + move, params)
        updates, _ = tx.update(grads, state, moved, **extra)
        ends.append(optax.apply_updates(moved, updates))
    here, there = ends
    moves = jax.tree.map(lambda x, y: (y - x).ravel() / 0.25, here, there)
    return float(np.mean(np.concatenate(jax.tree.leaves(moves))))


KEPT = [name for name in ("adam", "sgd", *STORED) if name in NAMES]


@pytest.mark.parametrize("name", slow_but(KEPT, NAMES))
def test_only_optimizers_that_store_parameters_change_a_syncs_move(name):
    np.testing.assert_allclose(left(name), STORED.get(name, ALL), atol=0.05)


CURVATURE = jnp.array([1.0, 4.0, 0.5])
DISTANCES = {"dog": (optax.contrib.dog, 1.21), "dowg": (optax.contrib.dowg, 1.45)}


@pytest.mark.parametrize("name", DISTANCES)
def test_a_step_as_long_as_the_distance_from_the_start_amplifies_a_move(name):
    make_one, expected = DISTANCES[name]
    tx, w = make_one(1.0), jnp.array([3.0, -2.0, 1.0])
    state = tx.init(w)
    for _ in range(4):
        updates, state = tx.update(CURVATURE * (w - 1), state, w)
        w = w + updates
    grads = CURVATURE * (w - 1)
    here, there = (w + d + tx.update(grads, state, w + d)[0] for d in (0.0, 0.25))
    np.testing.assert_allclose(np.mean((there - here) / 0.25), expected, atol=0.02)


@pytest.mark.parametrize(
    "name", [name for name in ("cocob", "madgrad", "mechanize") if name in NAMES]
)
def test_after_a_reset_the_step_is_that_of_a_new_optimizer(name):
    tx = lookahead(make(name), 4, 0.5, inner_state="reset")
    params = jax.tree.map(jnp.asarray, START)
    state = tx.init(params)
    for step in range(4):
        grads, extra = arguments(name, params, step)
        updates, state = tx.update(grads, state, params, **extra)
        params = optax.apply_updates(params, updates)
    # The inner optimizer starts from the slow weights: one step of a new one.
    grads, extra = arguments(name, params, 4)
    got, _ = tx.update(grads, state, params, **extra)
    inner = optax.with_extra_args_support(make(name))
    fresh, _ = inner.update(grads, inner.init(params), params, **extra)
    ends = [optax.apply_updates(params, updates) for updates in (got, fresh)]
    tolerance = {"rtol": 1e-4, "atol": 1e-5}
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), *ends)
