"""Are EMA-Nesterov and GPA what was published, and are their weights found?

The package keeps one tree of directions; the recurrences here, in NumPy, keep every
sequence that the papers name. Both are given the same gradients.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import reference, transformer
from helpers.trees import assert_close, types

from optax_lookahead import (
    ema_nesterov,
    lookahead,
    outer_loop,
    primal_averaging,
    slow_params,
)

STEPS = 12
INNERS = {
    "SGD": (optax.sgd(0.02), lambda: reference.sgd(0.02)),
    "momentum": (optax.sgd(0.1, momentum=0.9), lambda: reference.momentum(0.1, 0.9)),
    "AdamW": (
        optax.adamw(0.01, weight_decay=0.1),
        lambda: reference.adamw(0.01, weight_decay=0.1),
    ),
}


def window(t):
    """Returns a coefficient that is on in some of the steps, and ramps there."""
    return jnp.where((t >= 3) & (t < 9), 0.1 * t, 0.0)


def falling(t):
    return 0.9 / (1 + 0.1 * t)


def value(coefficient, t):
    return float(coefficient(t)) if callable(coefficient) else coefficient


def ema_nesterov_by_hand(inner, gradient, theta, beta, gamma, steps=STEPS):
    """Returns y and theta of arXiv 2605.25395 before every step, and at the end."""
    theta, m, memory, visited = theta.copy(), np.zeros_like(theta), {}, []
    for t in range(steps + 1):
        y = theta + value(beta, t) * m
        visited.append((y, theta))
        new = y + inner(gradient(y, t), y, memory)
        g = value(gamma, t)
        m = g * m + (1 - g) * (new - theta)
        theta = new
    return visited


def primal_averaging_by_hand(inner, gradient, x, mu_x, mu_y, steps=STEPS):
    """Returns y and x of arXiv 2512.17131 before every step, and at the end."""
    x, z, memory, visited = x.copy(), x.copy(), {}, []
    for t in range(steps + 1):
        mu = value(mu_y, t)
        y = mu * x + (1 - mu) * z
        visited.append((y, x))
        z = z + inner(gradient(y, t), y, memory)
        mu = value(mu_x, t)
        x = mu * x + (1 - mu) * z
    return visited


RELATIVES = {
    "EMA-Nesterov": (ema_nesterov, ema_nesterov_by_hand, (0.4, 0.9)),
    "EMA-Nesterov with schedules": (
        ema_nesterov, ema_nesterov_by_hand, (window, falling)
    ),
    "GPA": (primal_averaging, primal_averaging_by_hand, (0.9, 0.7)),
    "GPA with schedules": (
        primal_averaging, primal_averaging_by_hand, (falling, window)
    ),
    "GPA at x": (primal_averaging, primal_averaging_by_hand, (0.9, 1.0)),
    "GPA at z": (primal_averaging, primal_averaging_by_hand, (0.9, 0.0)),
}  # fmt: skip
every_relative = pytest.mark.parametrize("name", RELATIVES)


def visited(tx, params, gradient, steps=STEPS):
    """Returns parameters and states before every step, and at the end, of a `scan`."""

    def train_step(carry, t):
        params, state = carry
        updates, state = tx.update(gradient(params, t), state, params)
        return (optax.apply_updates(params, updates), state), carry

    start = params, tx.init(params)
    last, before = jax.lax.scan(train_step, start, jnp.arange(steps))
    return jax.tree.map(lambda x, y: jnp.concatenate([x, y[None]]), before, last)


def quadratic(params, t):
    return jax.tree.map(lambda p: p - jnp.cos(0.3 * t + p), params)


def evaluated(states, params):
    """Returns the weights to evaluate, of stacks of states and parameters."""
    return jax.vmap(slow_params)(states, params)


@functools.cache
def language_model():
    """Returns a transformer's parameters in float64, as one vector, and its loss."""
    params = transformer.init_params(jax.random.key(0), jnp.float64)
    assert {p.ndim for p in jax.tree.leaves(params)} == {0, 1, 2, 3}
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    batch = transformer.tokens(jax.random.key(1), 4)
    gradient = jax.jit(jax.grad(lambda p: transformer.loss_fn(p, batch)))
    return params, np.asarray(flat), unravel, gradient


@every_relative
@pytest.mark.parametrize("inner", INNERS)
def test_it_is_the_published_recurrence(name, inner, x64):
    make, by_hand, coefficients = RELATIVES[name]
    optimizer, transcription = INNERS[inner]
    params, flat, unravel, gradient = language_model()

    def vector_gradient(y, t):
        return np.asarray(jax.flatten_util.ravel_pytree(gradient(unravel(y)))[0])

    expected = by_hand(transcription(), vector_gradient, flat, *coefficients)
    tx = optax.chain(optimizer, make(*coefficients))
    got, states = visited(tx, params, lambda params, t: gradient(params))
    for t, (y, w) in enumerate(expected):
        state = jax.tree.map(lambda x, t=t: x[t], states)
        params = jax.tree.map(lambda x, t=t: x[t], got)
        assert_close(params, unravel(y), 1e-12)
        assert_close(slow_params(state, params), unravel(w), 1e-12)


def test_a_coefficient_that_is_on_in_a_window_of_steps_is_the_published_run(x64):
    # Loss 0.5 x'Ax - sum(x), as in a record run's test of its own schedule.
    curvatures = jnp.linspace(0.5, 3.0, 5)
    beta = optax.piecewise_constant_schedule(0.3, {12: 0.0})
    tx = optax.chain(
        optax.sgd(0.1), ema_nesterov(lambda t: jnp.where(t < 3, 0.0, beta(t)), 0.99)
    )
    params, states = visited(tx, jnp.zeros(5), lambda x, t: curvatures * x - 1.0, 20)
    np.testing.assert_allclose(params[3], WHERE_THE_WINDOW_OPENS, rtol=1e-12)
    np.testing.assert_allclose(params[11], BEFORE_IT_CLOSES, rtol=1e-12)
    np.testing.assert_allclose(params[12], evaluated(states, params)[12], rtol=0)
    np.testing.assert_allclose(evaluated(states, params)[20], AT_THE_END, rtol=1e-12)


WHERE_THE_WINDOW_OPENS = [
    0.28609693, 0.268309539375, 0.25130574250000004, 0.235085539375,
    0.21964892999999996,
]  # fmt: skip
BEFORE_IT_CLOSES = [
    0.875654491925448, 0.6585508697254936, 0.5085152998676102, 0.4037956317915922,
    0.3295957857211317,
]  # fmt: skip
AT_THE_END = [
    1.2913819072094976, 0.8102058937699501, 0.560290043284775, 0.41954906063012803,
    0.3331825098058468,
]  # fmt: skip


@pytest.mark.parametrize("inner", INNERS)
@pytest.mark.parametrize(
    "relative", [primal_averaging(0.0, 0.7), ema_nesterov(0.0, 0.9)], ids=["GPA", "EMA"]
)
def test_without_an_average_it_is_the_inner_optimizer(inner, relative, x64):
    params, _, _, gradient = language_model()
    optimizer, _ = INNERS[inner]
    expected, _ = visited(optimizer, params, lambda params, t: gradient(params))
    tx = optax.chain(optimizer, relative)
    got, states = visited(tx, params, lambda params, t: gradient(params))
    assert_close(got, expected, 1e-12)
    assert_close(evaluated(states, got), expected, 1e-12)


def test_a_uniform_average_is_schedule_free(x64):
    inner = optax.sgd(0.1)
    tx = optax.chain(inner, primal_averaging(lambda t: 1 - 1 / (t + 1.0), 0.9))
    params, states = visited(tx, jnp.array([1.0, -2.0]), quadratic)
    other = optax.contrib.schedule_free(inner, 0.1, b1=0.9)
    other_params, other_states = visited(other, jnp.array([1.0, -2.0]), quadratic)
    np.testing.assert_allclose(params, other_params, rtol=1e-12)
    x = jax.vmap(optax.contrib.schedule_free_eval_params)(other_states, other_params)
    np.testing.assert_allclose(evaluated(states, params)[1:], x[1:], rtol=1e-12)


def test_around_sgd_with_one_coefficient_gpa_is_nesterovs_momentum(x64):
    tx = optax.chain(optax.sgd(0.5), primal_averaging(0.8, 0.8))
    params, _ = visited(tx, jnp.array([1.0, -2.0]), quadratic)
    # Nesterov's y is where the gradient is taken; so are Optax's parameters.
    nesterov = optax.sgd(0.5 * (1 - 0.8), momentum=0.8, nesterov=True)
    expected, _ = visited(nesterov, jnp.array([1.0, -2.0]), quadratic)
    np.testing.assert_allclose(params, expected, rtol=1e-12)


MAKERS = {"EMA-Nesterov": ema_nesterov, "GPA": primal_averaging}
both = pytest.mark.parametrize("name", MAKERS)
COEFFICIENTS = {"EMA-Nesterov": (0.4, 0.9), "GPA": (0.9, 0.7)}
PARAMS = {"w": jnp.arange(6.0).reshape(2, 3) - 2.0, "b": jnp.array(0.5, jnp.float32)}


def of(name, **kwargs):
    return MAKERS[name](*COEFFICIENTS[name], **kwargs)


def trained(tx, params, steps=5, gradient=quadratic, jit=jax.jit):
    """Returns the parameters and the state at the end of an ordinary Optax loop."""

    @jit
    def train_step(params, state, t):
        updates, state = tx.update(gradient(params, t), state, params)
        return optax.apply_updates(params, updates), state

    params, state = jax.tree.map(jnp.array, (params, tx.init(params)))
    for t in range(steps):
        params, state = train_step(params, state, jnp.asarray(t))
    return params, state


@both
def test_eager_jitted_and_donated_steps_agree(name):
    tx = optax.chain(optax.adam(0.1), of(name))
    expected = trained(tx, PARAMS)
    assert_close(trained(tx, PARAMS, jit=lambda step: step), expected)
    donating = functools.partial(jax.jit, donate_argnums=(0, 1))
    assert_close(trained(tx, PARAMS, jit=donating), expected)
    assert types(expected[1]) == types(tx.init(PARAMS))


@both
def test_an_array_as_coefficient_outlives_a_donated_state(name):
    coefficients = [jnp.asarray(c) for c in COEFFICIENTS[name]]
    tx = optax.chain(optax.sgd(0.1), MAKERS[name](*coefficients))
    donating = functools.partial(jax.jit, donate_argnums=(0, 1))
    assert_close(trained(tx, PARAMS, jit=donating), trained(tx, PARAMS))
    assert not any(c.is_deleted() for c in coefficients)


@both
def test_many_coefficients_can_be_tried_in_one_compile(name):
    first, second = jnp.array([[0.1, 0.5, 0.9], [0.3, 0.6, 0.95]])

    def last(first, second):
        tx = optax.chain(optax.sgd(0.1), MAKERS[name](first, second))
        params, states = visited(tx, PARAMS["w"], quadratic)
        return slow_params(jax.tree.map(lambda x: x[-1], states), params[-1])

    runs = jax.jit(jax.vmap(last))(first, second)
    for run, *coefficients in zip(runs, first, second, strict=True):
        np.testing.assert_allclose(run, last(*coefficients), rtol=1e-5)


@both
def test_the_gradient_by_its_coefficients_is_that_of_finite_differences(name, x64):
    def last(first, second):
        tx = optax.chain(optax.sgd(0.1), MAKERS[name](first, second))
        params, states = visited(tx, jnp.array([1.0, -2.0]), quadratic)
        slow = slow_params(jax.tree.map(lambda x: x[-1], states), params[-1])
        return jnp.sum(slow**2)

    at, h = jnp.array(COEFFICIENTS[name]), 1e-6
    slopes = jax.jit(jax.grad(last, (0, 1)))(*at)
    last = jax.jit(last)
    for slope, e in zip(slopes, jnp.eye(2), strict=True):
        expected = (last(*(at + h * e)) - last(*(at - h * e))) / (2 * h)
        np.testing.assert_allclose(slope, expected, rtol=1e-6)


@both
def test_the_weights_are_read_with_the_injected_coefficient_that_was_used(name):
    names = NAMES[name]
    inject = optax.inject_hyperparams(MAKERS[name])
    tx = optax.chain(
        optax.sgd(0.1), inject(**dict(zip(names, COEFFICIENTS[name], strict=True)))
    )
    params, state = trained(tx, PARAMS)
    expected, plain = trained(optax.chain(optax.sgd(0.1), of(name)), PARAMS)
    assert_close(params, expected)
    assert_close(slow_params(state, params), slow_params(plain, expected))
    # Changed in mid-run: the parameters are still where the last step put them.
    before = slow_params(state, params)
    for coefficient in names:
        state[1].hyperparams[coefficient] = jnp.asarray(0.2)
    assert_close(slow_params(state, params), before)
    updates, state = tx.update(quadratic(params, 5), state, params)
    assert np.isfinite(optax.tree.norm(updates))


@both
@pytest.mark.parametrize("accumulator", [None, "float32"])
def test_dtypes_stay(name, accumulator):
    params = PARAMS | {"half": jnp.ones(3, jnp.bfloat16), "complex": jnp.array([1j])}
    tx = optax.chain(optax.sgd(0.1), of(name, accumulator_dtype=accumulator))
    after, state = trained(tx, params)
    assert types(after) == types(jax.tree.map(jnp.array, params))
    assert types(slow_params(state, after)) == types(after)
    direction = {name: d.dtype for name, d in state[1].direction.items()}
    assert direction["half"] == (accumulator or jnp.bfloat16)
    assert (direction["w"], direction["complex"]) == (jnp.float32, jnp.complex64)
    wide = slow_params(state, after, wide=True)
    assert wide["half"].dtype == direction["half"]
    exact, exact_state = trained(tx, params | {"half": jnp.ones(3)})
    assert_close(after["w"], exact["w"])
    slow = slow_params(exact_state, exact)["half"]
    np.testing.assert_allclose(np.asarray(wide["half"], float), slow, atol=0.02)


@pytest.mark.parametrize(
    ("tx", "expected"),
    [
        (functools.partial(ema_nesterov, 0.0, 0.997), 0.01),
        (functools.partial(primal_averaging, 0.997, 0.0), 0.01 * 0.997 / 0.003),
    ],
    ids=["EMA-Nesterov", "GPA"],
)
def test_a_wider_accumulator_keeps_the_bits_that_a_long_average_needs(tx, expected):
    update = jnp.full(1, 0.01, jnp.bfloat16)  # the same in every step

    def direction(dtype):
        average = tx(accumulator_dtype=dtype)

        def step(state, _):
            return average.update(update, state)[1], None

        state, _ = jax.lax.scan(step, average.init(update), length=3000)
        return float(state.direction[0])

    assert direction("float32") == pytest.approx(expected, rel=0.003)
    assert direction(None) < 0.9 * expected


@both
@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float16", "float32"])
def test_every_floating_dtype_and_python_numbers_are_taken(name, dtype):
    tx, params = of(name), jnp.ones(3, dtype)
    updates, state = tx.update(params, tx.init(params))
    assert updates.dtype == state.direction.dtype == params.dtype
    assert slow_params(state, params).dtype == params.dtype
    number, state = tx.update(1.0, tx.init(1.0))
    np.testing.assert_allclose(np.float32(updates), number, rtol=0.1)
    assert np.isfinite(slow_params(state, 1.0))


@both
def test_leaves_that_are_not_floating_are_returned_unchanged(name):
    params = PARAMS | {"count": jnp.array(3), "key": jax.random.key(0), "nothing": None}
    tx = of(name)
    state = tx.init(params)
    updates = jax.tree.map(lambda p: 0.1 * p, PARAMS) | {
        "count": jnp.array(1), "key": None, "nothing": None, "b": None
    }  # fmt: skip
    got, state = jax.jit(tx.update)(updates, state)
    assert (got["count"], got["key"], got["nothing"], got["b"]) == (1, None, None, None)
    assert state.direction["count"] == state.direction["key"] == optax.MaskedNode()
    assert state.direction["b"] == 0.0
    alone, _ = tx.update(updates["w"], tx.init(params["w"]))
    np.testing.assert_allclose(got["w"], alone, rtol=1e-6)
    slow = slow_params(state, params)
    assert slow["count"] == 3
    assert slow["nothing"] is None
    assert slow["key"] == params["key"]


def in_the_middle(chain):
    """Returns the chain where wrappers of Optax put it."""
    label = {"w": "a", "b": "b"}
    return {
        "chain": optax.chain(optax.clip(10.0), chain),
        "named chain": optax.named_chain(("one", chain)),
        "apply_if_finite": optax.apply_if_finite(chain, 3),
        "MultiSteps": optax.MultiSteps(chain, 1).gradient_transformation(),
        "flatten": optax.flatten(chain),
        "partition": optax.partition({"a": chain, "b": chain}, label),
        "masked": optax.chain(optax.masked(chain, dict.fromkeys("wb", True))),
    }


WRAPPERS = list(in_the_middle(optax.identity()))


@both
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_the_weights_to_evaluate_are_found_inside(name, wrapper):
    chain = optax.chain(optax.sgd(0.1, momentum=0.5), of(name))
    expected, state = trained(chain, PARAMS)
    params, wrapped = trained(in_the_middle(chain)[wrapper], PARAMS)
    assert_close(params, expected)
    slow = slow_params(state, expected)
    assert_close(slow_params(wrapped, params), slow)
    assert optax.tree.norm(optax.tree.sub(slow, expected)) > 1e-3


@both
def test_parameters_that_a_mask_leaves_out_are_evaluated_as_they_are(name):
    tx = optax.chain(optax.sgd(0.1), optax.masked(of(name), {"w": True, "b": False}))
    params, state = trained(tx, PARAMS)
    plain, _ = trained(optax.sgd(0.1), PARAMS)
    np.testing.assert_array_equal(params["b"], plain["b"])
    slow = slow_params(state, params)
    np.testing.assert_array_equal(slow["b"], params["b"])
    assert np.all(slow["w"] != params["w"])


@both
def test_it_is_found_in_an_optimizer_of_flax(name):
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    tx = optax.chain(optax.sgd(0.1), of(name))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    for t in range(3):
        grads = jax.tree.map(lambda p, t=t: p - t, nnx.state(model, nnx.Param))
        optimizer.update(model, grads)
    expected, state = trained(
        tx, params, 3, lambda params, t: jax.tree.map(lambda p: p - t, params)
    )
    slow = slow_params(optimizer.opt_state, nnx.state(model, nnx.Param))
    assert_close(nnx.to_pure_dict(slow), slow_params(state, expected))


@both
@pytest.mark.parametrize("k", [1, 3])
def test_as_an_outer_optimizer_it_averages_in_every_cycle(name, k):
    outer = optax.chain(optax.sgd(1.0), of(name))
    tx = outer_loop(optax.sgd(0.1, momentum=0.5), outer, k)
    visits = [trained(tx, PARAMS, steps) for steps in range(2 * k, 3 * k)]
    if k == 1:
        chain = optax.chain(optax.sgd(0.1, momentum=0.5), of(name))
        params, state = trained(chain, PARAMS, 2)
        assert_close(visits[0][0], params)
        assert_close(slow_params(*visits[0][::-1]), slow_params(state, params))
    # Within a cycle they stay where the last sync has put them.
    first = slow_params(*visits[0][::-1])
    assert optax.tree.norm(optax.tree.sub(first, visits[0][0])) > 1e-3
    for params, state in visits[1:]:
        assert_close(slow_params(state, params), first)


@both
def test_inside_lookahead_the_slow_weights_are_lookaheads(name):
    tx = lookahead(optax.chain(optax.sgd(0.1), of(name)), k=2)
    params, state = trained(tx, PARAMS, 3)
    assert_close(slow_params(state, params), state.slow_params)


@both
def test_the_weights_to_evaluate_change_with_the_parameters(name):
    tx = optax.chain(optax.sgd(0.1), of(name))
    params, state = trained(tx, PARAMS)
    moved = jax.tree.map(lambda p: p + 1.0, params)
    expected = jax.tree.map(lambda p: p + 1.0, slow_params(state, params))
    assert_close(slow_params(state, moved), expected)


@both
def test_a_step_that_is_not_finite_is_ignored_inside_apply_if_finite(name):
    tx = optax.apply_if_finite(optax.chain(optax.sgd(0.1), of(name)), 3)
    params, state = trained(tx, PARAMS)
    before = slow_params(state, params)
    bad = jax.tree.map(lambda p: p * jnp.nan, params)
    updates, state = tx.update(bad, state, params)
    params = optax.apply_updates(params, updates)
    assert_close(slow_params(state, params), before, 0.0)


def test_two_averages_of_one_parameter_are_refused():
    tx = optax.chain(optax.sgd(0.1), ema_nesterov(), primal_averaging())
    with pytest.raises(ValueError, match="must hold one slow copy of each parameter"):
        slow_params(tx.init(PARAMS), PARAMS)


@both
def test_a_stack_of_states_and_other_parameters_are_refused(name):
    tx = of(name)
    state = tx.init(PARAMS)
    stack = jax.tree.map(lambda x: jnp.stack([x, x]), state)
    with pytest.raises(ValueError, match=r"`coefficient` must be a scalar, got shape"):
        slow_params(stack, PARAMS)
    with pytest.raises(ValueError, match="`params` must have the tree"):
        slow_params(state, {"w": PARAMS["w"]})
    with pytest.raises(ValueError, match="`params` must hold only parameters that"):
        slow_params(state, PARAMS | {"more": jnp.ones(2)})


@both
def test_a_state_or_an_update_of_another_kind_is_refused(name):
    tx = of(name)
    state = tx.init(PARAMS)
    with pytest.raises(TypeError, match="`state` must be an `ExtrapolationState`"):
        tx.update(PARAMS, optax.sgd(0.1, 0.9).init(PARAMS))
    stack = jax.tree.map(lambda x: jnp.stack([x, x]), state)
    with pytest.raises(ValueError, match=r"`coefficient` must be a scalar, got shape"):
        tx.update(PARAMS, stack)
    wrong = jax.tree.map(lambda p: jnp.ones((7, *p.shape), p.dtype), PARAMS)
    with pytest.raises(ValueError, match=r"`updates` must have the shapes .* got \(7"):
        tx.update(wrong, state)
    with pytest.raises(TypeError, match="`params` must be a tree of arrays, got 'w'"):
        tx.init({"a": "w"})


@both
def test_multi_steps_around_the_chain_averages_optimizer_steps(name):
    chain = optax.chain(optax.sgd(0.1), of(name))
    tx = optax.MultiSteps(chain, 3).gradient_transformation()
    expected, plain = trained(chain, PARAMS, steps=5)
    params, state = trained(tx, PARAMS, 15, lambda p, t: quadratic(p, t // 3))
    assert_close(params, expected)
    assert_close(slow_params(state, params), slow_params(plain, expected))


NAMES = {"EMA-Nesterov": ("beta", "gamma"), "GPA": ("mu_x", "mu_y")}


@both
def test_an_injected_schedule_in_static_args_is_the_schedule_itself(name):
    names = NAMES[name]
    schedules = {
        each: lambda t, i=i: jnp.where((t >= 2) & (t < 4), 0.5 + 0.2 * i, 0.1)
        for i, each in enumerate(names)
    }
    inject = optax.inject_hyperparams(MAKERS[name], static_args=names)
    params, state = trained(optax.chain(optax.sgd(0.1), inject(**schedules)), PARAMS)
    expected, plain = trained(
        optax.chain(optax.sgd(0.1), MAKERS[name](**schedules)), PARAMS
    )
    assert_close(params, expected)
    assert_close(slow_params(state, params), slow_params(plain, expected))


@pytest.mark.parametrize("name", ["beta", "gamma", "mu_x", "mu_y"])
def test_a_schedule_that_does_not_return_a_number_is_refused(name):
    make, *_ = RANGES[name]
    for result, shown in ((jnp.ones(2), "shape (2,)"), (None, "None"), ("x", "'x'")):
        tx = make(**{name: lambda count, result=result: result})
        message = (
            f"`{name}` must be a number or a schedule that returns one, got a function "
            f"that returns {shown}."
        )
        with pytest.raises(ValueError, match=re.escape(message)):
            tx.update(PARAMS, tx.init(PARAMS))


RANGES = {
    "beta": (ema_nesterov, "[0, inf)", [-0.1, float("inf"), float("nan")]),
    "gamma": (ema_nesterov, "[0, 1)", [-0.1, 1, 1.5, np.float32(2), float("nan")]),
    "mu_x": (primal_averaging, "[0, 1)", [-0.1, 1.0, np.array(1.0)]),
    "mu_y": (primal_averaging, "[0, 1]", [-0.1, 1.1, float("nan")]),
}
RULE = "`{}` must be a number in {} or a schedule, got {!r}. Write "


@pytest.mark.parametrize("name", RANGES)
def test_a_coefficient_out_of_range_is_refused(name):
    make, interval, bad = RANGES[name]
    for got in bad:
        shown = got.item() if hasattr(got, "item") else got
        with pytest.raises(
            ValueError, match=re.escape(RULE.format(name, interval, shown))
        ):
            make(**{name: got})
    for got in (True, "0.5", None, 0.5j, [0.5]):
        with pytest.raises(
            TypeError, match=re.escape(RULE.format(name, interval, got))
        ):
            make(**{name: got})
    with pytest.raises(ValueError, match=rf"`{name}` must be a scalar, got an array"):
        make(**{name: jnp.ones(2)})
    for good in (0, 0.5, np.float32(0.5), jnp.array(0.5), jnp.array(2.0)):
        make(**{name: good})


def test_schedules_continue_after_a_reset_by_a_lookahead_around_it():
    seen = []

    def beta(count):
        seen.append(int(count))
        return 0.1

    inner = optax.chain(optax.sgd(0.1), ema_nesterov(beta=beta))
    tx, params = lookahead(inner, 2, inner_state="reset"), jnp.ones(2)
    state = tx.init(params)
    for _ in range(6):
        updates, state = tx.update(params, state, params)
        params = optax.apply_updates(params, updates)
    assert state.fast_state[1].step_count == 6
