"""Is bad input refused, in words that say what to write instead?"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_lookahead import lookahead, slow_params

PARAMS = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
TX = lookahead(optax.sgd(0.1))
STATE = TX.init(PARAMS)

K_RULE = "`k` must be an integer of at least 1, got {}. Write the number of inner steps"
ALPHA_RULE = (
    "`alpha` must be a number in [0, 1] or a schedule, got {}. "
    "Write the slow step size, for example `alpha=0.5`."
)
TREE_RULE = "`params` must have the tree and the shapes that `init` saw, got {}"


@pytest.mark.parametrize("k", [0, -1, np.int64(0), np.array(0)])
def test_k_below_one(k):
    with pytest.raises(ValueError, match=re.escape(K_RULE.format(int(k)))):
        lookahead(optax.sgd(0.1), k=k)


@pytest.mark.parametrize(
    "k", [2.5, 5.0, True, np.bool_(True), np.float32(2.5), "5", None, [5]]
)
def test_k_of_the_wrong_kind(k):
    shown = k.item() if hasattr(k, "item") else k
    with pytest.raises(TypeError, match=re.escape(K_RULE.format(repr(shown)))):
        lookahead(optax.sgd(0.1), k=k)


@pytest.mark.parametrize("alpha", [-0.1, 1.5, 2, float("nan"), float("inf")])
def test_alpha_outside_the_unit_interval(alpha):
    with pytest.raises(ValueError, match=re.escape(ALPHA_RULE.format(repr(alpha)))):
        lookahead(optax.sgd(0.1), alpha=alpha)


@pytest.mark.parametrize("alpha", [True, "half", None, 0.5j, [0.5]])
def test_alpha_of_the_wrong_kind(alpha):
    with pytest.raises(TypeError, match=re.escape(ALPHA_RULE.format(repr(alpha)))):
        lookahead(optax.sgd(0.1), alpha=alpha)


@pytest.mark.parametrize("name", ["k", "alpha"])
@pytest.mark.parametrize("array", [jnp.ones(2, int), np.ones(2, int)])
def test_k_or_alpha_that_is_no_scalar(name, array):
    message = (
        f"`{name}` must be a scalar, got an array of shape (2,). "
        f"To try several values at once, `jax.vmap` over `{name}`."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        lookahead(optax.sgd(0.1), **{name: array})


@pytest.mark.parametrize("k", [1, np.int32(3), jnp.array(3), jnp.array(3.0)])
@pytest.mark.parametrize("alpha", [0, 1, 0.5, np.float32(0.5), jnp.array(0.5)])
def test_numbers_of_every_kind_are_taken(k, alpha):
    tx = lookahead(optax.sgd(0.1), k, alpha)
    tx.update(PARAMS, tx.init(PARAMS), PARAMS)


def test_an_inner_that_was_not_called():
    message = "`inner` must be an Optax gradient transformation, got <function adam"
    remedy = "Write for example `lookahead(optax.adam(1e-3))`."
    with pytest.raises(TypeError, match=f"{message}.*{re.escape(remedy)}"):
        lookahead(optax.adam)


def test_an_inner_multi_steps_object():
    remedy = "Write `inner.gradient_transformation()`."
    with pytest.raises(TypeError, match=re.escape(remedy)):
        lookahead(optax.MultiSteps(optax.adam(0.1), 2))


def test_update_without_params():
    message = (
        "`params` must be the current parameters, got None. "
        "Call `update(grads, state, params)`, not `update(grads, state)`."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        TX.update(PARAMS, STATE)


@pytest.mark.parametrize(
    ("params", "difference"),
    [
        ({"w": PARAMS["w"]}, "no leaf at ['b'], where the state has shape (3,)"),
        (
            PARAMS | {"c": jnp.ones(4)},
            "shape (4,) at ['c'], where the state has no leaf",
        ),
        (
            PARAMS | {"b": jnp.ones(1)},
            "shape (1,) at ['b'], where the state has shape (3,)",
        ),
        (PARAMS["w"], "no leaf at ['b'], where the state has shape (3,)"),
    ],
)
def test_update_with_other_parameters_names_the_first_leaf_that_differs(
    params, difference
):
    message = TREE_RULE.format(difference)
    remedy = "Pass the parameters that this state belongs to, or start a new one"
    with pytest.raises(ValueError, match=re.escape(f"{message}. {remedy}")):
        TX.update(params, STATE, params)


def test_update_with_other_containers_shows_both_trees():
    state = TX.init([jnp.ones(2)])
    message = TREE_RULE.format("PyTreeDef((*,)), where the state has PyTreeDef([*])")
    with pytest.raises(ValueError, match=re.escape(message)):
        TX.update((jnp.ones(2),), state, (jnp.ones(2),))


@pytest.mark.parametrize("call", [slow_params, lambda s, p: TX.update(p, s, p)])
def test_a_stack_of_states_outside_vmap(call):
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), PARAMS)
    state = jax.vmap(TX.init)(stacked)
    message = (
        "`steps_since_sync` must be a scalar, got shape (2,): these are several "
        "states in one. Call the function under `jax.vmap`."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        call(state, stacked)


def test_slow_params_of_a_state_without_a_lookahead():
    message = (
        "`opt_state` must hold the state of a lookahead, got a tuple without one. "
        "Pass the state that the optimizer's `init` or `update` returned."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        slow_params(optax.adam(0.1).init(PARAMS), PARAMS)


def test_slow_params_behind_a_mask_that_hides_everything():
    state = optax.masked(TX, False).init(PARAMS)
    message = (
        "`opt_state` must hold a slow copy of at least one parameter, got a lookahead "
        "state without any. Check the mask or the labels around it."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        slow_params(state, PARAMS)


def test_slow_params_of_two_lookaheads_that_claim_the_same_parameter():
    state = optax.chain(TX, TX).init(PARAMS)
    message = (
        "`opt_state` must hold one slow copy of each parameter, got two of ['b']. "
        "Pass the sub-state that you want."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        slow_params(state, PARAMS)


@pytest.mark.parametrize(
    ("params", "difference"),
    [
        ({"w": PARAMS["w"]}, "no leaf at ['b'], where the state has shape (3,)"),
        (
            PARAMS | {"b": jnp.ones(1)},
            "shape (1,) at ['b'], where the state has shape (3,)",
        ),
    ],
)
def test_slow_params_of_other_parameters(params, difference):
    with pytest.raises(ValueError, match=re.escape(TREE_RULE.format(difference))):
        slow_params(STATE, params)
