"""Is bad input refused, in words that say what to write instead?"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_lookahead import (
    ema_nesterov,
    lookahead,
    outer_loop,
    primal_averaging,
    set_slow_params,
    slow_params,
    with_inner_state,
)

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
def test_a_k_below_one_is_refused(k):
    with pytest.raises(ValueError, match=re.escape(K_RULE.format(int(k)))):
        lookahead(optax.sgd(0.1), k=k)


@pytest.mark.parametrize(
    "k",
    [
        2**31,
        2**40,
        2**63,
        2**64,
        np.uint32(2**31),
        np.int64(2**40),
        np.uint64(2**64 - 1),
    ],
)
def test_a_k_beyond_int32_is_refused(k):
    message = (
        "`k` must be an integer of at least 1 and at most 2147483647, got "
        f"{int(k)}. Write `k=2147483647` never to sync."
    )
    for make in (lookahead, lambda inner, k: outer_loop(inner, optax.sgd(0.5), k)):
        with pytest.raises(ValueError, match=re.escape(message)):
            make(optax.sgd(0.1), k=k)


@pytest.mark.parametrize("k", [2**31 - 1, np.uint32(2**31 - 1), np.int64(2**31 - 1)])
def test_the_largest_k_never_syncs(k):
    tx = lookahead(optax.sgd(0.1), k)
    state = tx.init(PARAMS)
    for _ in range(3):
        _, state = jax.jit(tx.update)(PARAMS, state, PARAMS)
    assert (state.steps_since_sync, state.sync_count) == (3, 0)


@pytest.mark.parametrize(
    "dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"]
)
def test_k_of_every_integer_type_is_taken_as_its_value(dtype):
    tx = lookahead(optax.sgd(0.1), np.dtype(dtype).type(2))
    state = tx.init(PARAMS)
    for steps in (1, 0, 1, 0):
        _, state = tx.update(PARAMS, state, PARAMS)
        assert state.steps_since_sync == steps


@pytest.mark.parametrize(
    "k", [np.uint32(2**32 - 1), np.float32(3e10), np.float32(np.inf)]
)
def test_an_array_k_beyond_int32_never_syncs(k):
    tx = lookahead(optax.sgd(0.1), jnp.asarray(k))
    _, state = jax.jit(tx.update)(PARAMS, tx.init(PARAMS), PARAMS)
    assert state.sync_count == 0


@pytest.mark.parametrize(
    "k", [2.5, 5.0, True, np.bool_(True), np.float32(2.5), "5", None, [5]]
)
def test_a_k_that_is_not_an_integer_is_refused(k):
    shown = k.item() if hasattr(k, "item") else k
    with pytest.raises(TypeError, match=re.escape(K_RULE.format(repr(shown)))):
        lookahead(optax.sgd(0.1), k=k)


@pytest.mark.parametrize("alpha", [-0.1, 1.5, 2, float("nan"), float("inf")])
def test_an_alpha_outside_the_unit_interval_is_refused(alpha):
    with pytest.raises(ValueError, match=re.escape(ALPHA_RULE.format(repr(alpha)))):
        lookahead(optax.sgd(0.1), alpha=alpha)


@pytest.mark.parametrize("alpha", [True, "half", None, 0.5j, [0.5]])
def test_an_alpha_that_is_not_a_real_number_is_refused(alpha):
    with pytest.raises(TypeError, match=re.escape(ALPHA_RULE.format(repr(alpha)))):
        lookahead(optax.sgd(0.1), alpha=alpha)


@pytest.mark.parametrize("name", ["k", "alpha"])
@pytest.mark.parametrize("dtype", ["bool", "complex64"])
def test_an_array_k_or_alpha_that_is_not_a_real_number_is_refused(name, dtype):
    message = f"`{name}` must be a real number, got an array of dtype {dtype}."
    with pytest.raises(TypeError, match=re.escape(message)):
        lookahead(optax.sgd(0.1), **{name: jnp.ones([], dtype)})
    with pytest.raises(TypeError, match=re.escape(message)):
        jax.jit(lambda x: lookahead(optax.sgd(0.1), **{name: x}).init(PARAMS))(
            jnp.ones([], dtype)
        )


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("result", [jnp.zeros(2), None, "half"], ids=str)
def test_an_alpha_schedule_that_does_not_return_a_number_is_refused(result, transform):
    tx = lookahead(optax.sgd(0.1), 2, lambda count: result)
    shown = "shape (2,)" if hasattr(result, "shape") else repr(result)
    message = (
        "`alpha` must be a number or a schedule that returns one, got a function that "
        f"returns {shown}. Return a scalar."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        transform(tx.update)(PARAMS, tx.init(PARAMS), PARAMS)


@pytest.mark.parametrize("name", ["k", "alpha"])
@pytest.mark.parametrize("array", [jnp.ones(2, int), np.ones(2, int)])
def test_a_k_or_alpha_that_is_not_a_scalar_is_refused(name, array):
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


def test_an_inner_optimizer_that_was_not_called_is_refused():
    message = "`inner` must be an Optax gradient transformation, got <function adam"
    remedy = "Write for example `lookahead(optax.adam(1e-3))`."
    with pytest.raises(TypeError, match=f"{message}.*{re.escape(remedy)}"):
        lookahead(optax.adam)


def test_a_multi_steps_object_as_inner_is_refused():
    remedy = "Write `inner.gradient_transformation()`."
    with pytest.raises(TypeError, match=re.escape(remedy)):
        lookahead(optax.MultiSteps(optax.adam(0.1), 2))


def test_update_without_params_is_refused():
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


def test_update_with_other_containers_names_both_trees():
    state = TX.init([jnp.ones(2)])
    message = TREE_RULE.format("PyTreeDef((*,)), where the state has PyTreeDef([*])")
    with pytest.raises(ValueError, match=re.escape(message)):
        TX.update((jnp.ones(2),), state, (jnp.ones(2),))


@pytest.mark.parametrize("call", [slow_params, lambda s, p: TX.update(p, s, p)])
def test_a_stack_of_states_outside_vmap_is_refused(call):
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), PARAMS)
    state = jax.vmap(TX.init)(stacked)
    message = (
        "`steps_since_sync` must be a scalar, got shape (2,): these are several "
        "states in one. Call the function under `jax.vmap`."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        call(state, stacked)


def test_slow_params_of_a_state_without_a_lookahead_is_refused():
    message = (
        "`opt_state` must hold the state of a lookahead, got a tuple without one. "
        "Pass the state that the optimizer's `init` or `update` returned."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        slow_params(optax.adam(0.1).init(PARAMS), PARAMS)


def test_slow_params_behind_a_mask_that_hides_everything_is_refused():
    state = optax.masked(TX, False).init(PARAMS)
    message = (
        "`opt_state` must hold a slow copy of at least one parameter, got a lookahead "
        "state without any. Check the mask or the labels around it."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        slow_params(state, PARAMS)


def test_two_lookaheads_with_the_same_parameter_are_refused():
    message = (
        "`opt_state` must hold one slow copy of each parameter, got two of ['b']. "
        "Pass the sub-state that you want."
    )
    for state in (optax.chain(TX, TX).init(PARAMS), {"d": STATE, "g": STATE}):
        with pytest.raises(ValueError, match=re.escape(message)):
            slow_params(state, PARAMS)
        with pytest.raises(ValueError, match=re.escape(message)):
            set_slow_params(state, PARAMS)
        with pytest.raises(ValueError, match=re.escape(message)):
            set_slow_params(state, {"b": PARAMS["b"]})


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
def test_slow_params_of_other_parameters_is_refused(params, difference):
    with pytest.raises(ValueError, match=re.escape(TREE_RULE.format(difference))):
        slow_params(STATE, params)


# What only `outer_loop`, `inner_state` and `slow_dtype` can get wrong.


def constant(updates, state=lambda state: state):
    """Returns an outer optimizer of `updates`, which changes its state by `state`."""
    return optax.GradientTransformation(
        lambda params: {"m": jnp.zeros(3)},
        lambda g, s, params=None: (updates, state(s)),
    )


def update_with(outer):
    tx = outer_loop(optax.sgd(0.1), outer, 2)
    return tx.update(PARAMS, tx.init(PARAMS), PARAMS)


def test_an_outer_optimizer_that_was_not_called_is_refused():
    message = "`outer` must be an Optax gradient transformation, got <function adam"
    remedy = "Write for example `outer_loop(inner, optax.sgd(0.5), k)`."
    with pytest.raises(TypeError, match=f"{message}.*{re.escape(remedy)}"):
        outer_loop(optax.adam(0.1), optax.adam, 5)


def test_a_step_size_as_outer_is_refused():
    message = "`outer` must be an Optax gradient transformation, got 0.5. Write"
    with pytest.raises(TypeError, match=re.escape(message)):
        outer_loop(optax.adam(0.1), 0.5, 5)


def test_a_multi_steps_object_as_outer_is_refused():
    remedy = "Write `outer.gradient_transformation()`."
    with pytest.raises(TypeError, match=re.escape(remedy)):
        outer_loop(optax.sgd(0.1), optax.MultiSteps(optax.adam(0.1), 2), 5)


def test_outer_loop_checks_inner_and_k_too():
    with pytest.raises(TypeError, match="`inner` must be an Optax gradient"):
        outer_loop(optax.adam, optax.sgd(0.5), 5)
    with pytest.raises(ValueError, match=re.escape(K_RULE.format(0))):
        outer_loop(optax.sgd(0.1), optax.sgd(0.5), 0)
    tx = outer_loop(optax.sgd(0.1), optax.sgd(0.5), 5)
    with pytest.raises(ValueError, match="`params` must be the current parameters"):
        tx.update(PARAMS, tx.init(PARAMS))


def test_an_outer_that_returns_another_tree_is_refused():
    message = (
        "`outer` must return updates with the tree that it is given, got "
        "PyTreeDef({'w': *}) where PyTreeDef({'b': *, 'w': *}) was given. "
        "Keep the tree."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        update_with(constant({"w": PARAMS["w"]}))


def test_an_outer_that_returns_other_shapes_is_refused():
    message = (
        "`outer` must return updates with the shapes that it is given, got () where "
        "['b'] has (3,). Keep the shapes."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        update_with(constant(PARAMS | {"b": jnp.ones(())}))


def test_an_outer_that_returns_another_state_is_refused():
    message = (
        "`outer` must return a state with the tree that it is given, got "
        "PyTreeDef({'m': *, 'n': *}) where PyTreeDef({'m': *}) was given. "
        "Keep the tree."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        update_with(constant(PARAMS, lambda state: state | {"n": jnp.zeros(3)}))


def test_an_outer_that_returns_a_state_of_other_shapes_is_refused():
    message = (
        "`outer` must return a state with the shapes that it is given, got (2, 3) "
        "where ['m'] has (3,). Keep the shapes."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        update_with(constant(PARAMS, lambda state: {"m": jnp.zeros((2, 3))}))


def test_an_extra_argument_named_inner_step_is_refused_by_outer_loop():
    tx = outer_loop(optax.sgd(0.1), optax.sgd(0.5), 2)
    message = (
        "`inner_step` must not be an extra argument of `update`, got 1.0: "
        "under this name `outer_loop` passes an `InnerStep` to the outer optimizer. "
        "Rename the argument."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, inner_step=1.0)


def test_an_extra_argument_named_inner_step_is_allowed_in_lookahead():
    TX.update(PARAMS, STATE, PARAMS, inner_step=1.0)


def test_outer_loop_refuses_interpolate():
    message = (
        "`inner_state` of `outer_loop` must be 'keep' or 'reset', got 'interpolate': "
        "an outer optimizer has no alpha to interpolate with. Write `lookahead(inner, "
        "k, alpha, inner_state='interpolate')`."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        outer_loop(optax.sgd(0.1), optax.sgd(0.5), 2, inner_state="interpolate")


@pytest.mark.parametrize("inner_state", ["pullback", "Reset", "", None, True, ["keep"]])
def test_an_unknown_inner_state_is_refused(inner_state):
    message = (
        f"`inner_state` must be 'keep', 'reset' or 'interpolate', got {inner_state!r}. "
        "Write one of these, or a function `(state, fresh) -> state`."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        lookahead(optax.sgd(0.1), inner_state=inner_state)
    with pytest.raises(ValueError, match=re.escape(message)):
        outer_loop(optax.sgd(0.1), optax.sgd(0.5), 2, inner_state=inner_state)


@pytest.mark.parametrize("slow_dtype", [jnp.int32, bool, "f32x", 32, "complex64"])
def test_a_slow_dtype_that_is_not_floating_is_refused(slow_dtype):
    message = (
        f"`slow_dtype` must be a floating dtype or None, got {slow_dtype!r}. "
        "Write for example `slow_dtype='float32'`."
    )
    with pytest.raises(TypeError, match=re.escape(message)):
        lookahead(optax.sgd(0.1), slow_dtype=slow_dtype)
    with pytest.raises(TypeError, match=re.escape(message)):
        outer_loop(optax.sgd(0.1), optax.sgd(0.5), 2, slow_dtype=slow_dtype)


@pytest.mark.parametrize("make", [ema_nesterov, primal_averaging])
def test_an_accumulator_dtype_is_checked_as_a_slow_dtype_is(make):
    for dtype in (jnp.int8, bool, "f32x", 32, "complex64", np.ones(2)):
        message = f"`accumulator_dtype` must be a floating dtype or None, got {dtype!r}"
        with pytest.raises(TypeError, match=re.escape(message)):
            make(accumulator_dtype=dtype)
    message = "`accumulator_dtype` must be a dtype that JAX has enabled, got float64. "
    with pytest.raises(ValueError, match=message):
        make(accumulator_dtype="float64")


@pytest.mark.parametrize("slow_dtype", ["float64", jnp.float64, np.dtype("float64")])
def test_a_slow_dtype_that_jax_has_not_enabled_is_refused(slow_dtype):
    message = (
        "`slow_dtype` must be a dtype that JAX has enabled, got float64. "
        "Set `jax.config.update('jax_enable_x64', True)` or write 'float32'."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        lookahead(optax.sgd(0.1), slow_dtype=slow_dtype)


@pytest.mark.parametrize(
    ("slow_dtype", "dtype"),
    [
        ("bfloat16", "float32"),
        ("float16", "float32"),
        ("float16", "bfloat16"),  # of a smaller range
        ("bfloat16", "float16"),  # of fewer bits
        ("bfloat16", "complex64"),
    ],
)
def test_a_slow_dtype_that_is_narrower_than_a_parameter_is_refused(slow_dtype, dtype):
    params = {"w": jnp.ones(2, dtype), "n": jnp.ones(2, int)}
    message = (
        "`slow_dtype` must be at least as wide as every parameter, got "
        f"{slow_dtype} where ['w'] has {dtype}. Write a wider one, or None for the "
        "parameters' own."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        lookahead(optax.sgd(0.1), slow_dtype=slow_dtype).init(params)


# States and parameters of something else.


def test_parameters_of_optax_lookahead_are_named():
    message = (
        "`params` must be the parameters themselves, got optax.LookaheadParams. Pass "
        "its field `fast`; the state carries the slow ones."
    )
    with pytest.raises(TypeError, match=re.escape(message)):
        TX.init(optax.LookaheadParams.init_synced(PARAMS))


@pytest.mark.parametrize("around", [lambda state: state, lambda state: (state,)])
def test_a_state_of_optax_lookahead_is_named(around):
    pair = optax.LookaheadParams.init_synced(PARAMS)
    state = optax.lookahead(optax.sgd(0.1), 5, 0.5).init(pair)
    with pytest.raises(TypeError, match=r"got a state of `optax.lookahead`\. Pass"):
        TX.update(PARAMS, state, PARAMS)
    with pytest.raises(ValueError, match=r"got a state of `optax\.lookahead`"):
        slow_params(around(state), PARAMS)


@pytest.mark.parametrize("leaf", ["float32", "w", object()])
def test_a_leaf_that_is_not_an_array_is_named_with_its_path(leaf):
    message = f"`params` must be a tree of arrays, got {leaf!r} at ['name']. Pass"
    with pytest.raises(TypeError, match=re.escape(message)):
        TX.init({"name": leaf, "w": jnp.ones(2)})


def test_an_array_is_refused_as_slow_dtype():
    for array in (jnp.ones(2, jnp.bfloat16), np.float32(1.0), np.ones(2)):
        with pytest.raises(TypeError, match="`slow_dtype` must be a floating dtype"):
            lookahead(optax.sgd(0.1), slow_dtype=array)


NONE = {"w": jnp.ones((2, 3)), "b": None}


@pytest.mark.parametrize("inner_state", ["reset", lambda state, fresh: state])
def test_a_gradient_of_none_that_changes_the_inner_state_is_named(inner_state):
    tx = lookahead(optax.sgd(0.1, momentum=0.9), 2, inner_state=inner_state)
    message = r"`inner` must return a state with the tree.*where a gradient is None\."
    with pytest.raises(ValueError, match=message):
        tx.update(NONE, tx.init(PARAMS), PARAMS)


# Each cause of an anchor that does not fit, and that its remedy helps.


MOMENTUM = optax.sgd(0.1, momentum=0.9)
INTERPOLATE = lookahead(MOMENTUM, inner_state="interpolate")


@pytest.mark.parametrize(
    "state",
    [
        lookahead(MOMENTUM).init(PARAMS),
        lookahead(optax.adam(0.1), inner_state="interpolate")
        .init(PARAMS)
        ._replace(fast_state=MOMENTUM.init(PARAMS)),
    ],
    ids=["another policy", "another inner"],
)
def test_a_missing_anchor_is_refused_with_a_remedy_that_works(state):
    with pytest.raises(ValueError, match="`anchor` must hold the trees") as refusal:
        INTERPOLATE.update(PARAMS, state, PARAMS)
    _, remedy = str(refusal.value).split("write `")
    state = eval(
        remedy.rstrip("`."),
        {"with_inner_state": with_inner_state, "tx": INTERPOLATE, "state": state},
    )
    _, state = INTERPOLATE.update(PARAMS, state, PARAMS)
    assert state.steps_since_sync == 1


def test_a_gradient_of_none_that_leaves_no_moment_to_interpolate_is_named():
    with pytest.raises(ValueError, match="`anchor` must hold the trees") as refusal:
        INTERPOLATE.update(NONE, INTERPOLATE.init(PARAMS), PARAMS)
    assert "Pass zeros where a gradient is None" in str(refusal.value)
    assert "0.1" not in str(refusal.value)


# Slow weights and inner states that are set by hand.


def test_a_leaf_that_init_never_saw_is_named_unless_a_mask_leaves_it_out():
    new = PARAMS | {"lora": jnp.ones(2)}
    message = (
        "`params` must hold only parameters that `init` saw, got shape (2,) at "
        "['lora'], where the state has no leaf. Leave"
    )
    for tx in (TX, optax.masked(TX, {"w": True, "b": False})):
        state = tx.init(PARAMS)
        for function in (slow_params, set_slow_params):
            with pytest.raises(ValueError, match=re.escape(message)):
                function(state, new)
    # What masks and labels leave out, leaf by leaf or in branches, is no mistake.
    nested = {"body": PARAMS, "head": PARAMS}
    for tx in (
        optax.masked(TX, {"body": True, "head": False}),
        optax.masked(TX, {"body": True, "head": {"w": True, "b": False}}),
        optax.partition({"x": TX, "y": optax.sgd(0.1)}, {"body": "x", "head": "y"}),
    ):
        state = tx.init(nested)
        assert slow_params(state, nested)["head"]["b"] is PARAMS["b"]
        set_slow_params(state, nested)


def test_set_slow_params_refuses_a_state_without_a_lookahead_and_other_shapes():
    with pytest.raises(ValueError, match="`opt_state` must hold the state of a look"):
        set_slow_params(optax.adam(0.1).init(PARAMS), PARAMS)
    with pytest.raises(ValueError, match=r"got shape \(5,\) at \['w'\], where"):
        set_slow_params(TX.init(PARAMS), {"w": jnp.ones(5)})
    flat = optax.flatten(TX).init(PARAMS)
    with pytest.raises(ValueError, match="got one vector of shape"):
        set_slow_params(flat, {"w": PARAMS["w"]})


@pytest.mark.parametrize(
    ("tx", "state", "inner_state", "error", "message"),
    [
        (0.5, TX.init(PARAMS), (), TypeError, "`tx` must be an Optax gradient"),
        (TX, (), (), TypeError, "`state` must be a `LookaheadState`"),
        (MOMENTUM, TX.init(PARAMS), (), TypeError, "`tx` must be what `lookahead` or"),
        (
            INTERPOLATE,
            INTERPOLATE.init(PARAMS),
            optax.adam(0.1).init(PARAMS),
            ValueError,
            "`inner_state` must be a state of the inner optimizer of `tx`",
        ),
        (
            outer_loop(MOMENTUM, MOMENTUM, 2),
            INTERPOLATE.init(PARAMS),
            MOMENTUM.init(PARAMS),
            ValueError,
            "`state` must hold a state of the outer optimizer of `tx`",
        ),
    ],
    ids=["no tx", "no state", "no lookahead", "another inner", "another outer"],
)
def test_an_inner_state_that_does_not_fit_is_refused(
    tx, state, inner_state, error, message
):
    with pytest.raises(error, match=re.escape(message)):
        with_inner_state(tx, state, inner_state)


@pytest.mark.parametrize(
    "make", [lookahead, lambda *_, **kw: outer_loop(TX, TX, 2, **kw)]
)
def test_a_memory_that_this_jax_cannot_name_is_refused(make, monkeypatch):
    monkeypatch.delattr(jax, "memory", raising=False)
    rule = "`slow_memory_kind` must be 'pinned_host' or None, and None with a JAX "
    with pytest.raises(ValueError, match=re.escape(rule)):
        make(optax.sgd(0.1), slow_memory_kind="pinned_host")
    make(optax.sgd(0.1)).update(PARAMS, make(optax.sgd(0.1)).init(PARAMS), PARAMS)
