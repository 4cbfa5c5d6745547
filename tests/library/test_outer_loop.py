"""Does an outer optimizer take the slow step, and only that?

The recurrences of the papers are in `helpers/reference.py`, and compared in float64.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import reference
from helpers.training import scanned

from optax_lookahead import lookahead, outer_loop, slow_params

START = np.random.default_rng(0).normal(size=5)
CURVATURE = np.diag([0.2, 0.5, 1.0, 1.5, 2.0]) + 0.1


def numpy_gradient(theta, step):
    return CURVATURE @ theta + np.sin(theta + step)


def gradient(params, step):
    return jnp.asarray(CURVATURE) @ params + jnp.sin(params + step)


def visit(tx, steps, gradient=gradient):
    return scanned(tx, jnp.asarray(START), gradient, steps)


def deviation(got, expected):
    """Returns the largest deviation, relative to the value or to 0.01 if it is less."""
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.shape == expected.shape
    assert np.all(np.isfinite(expected))
    return float(np.max(np.abs(got - expected) / (np.abs(expected) + 0.01)))


def assert_equal_to_rounding(got, expected):
    assert deviation(got, expected) < 1e-12


def nesterov(eta, mu):
    return optax.sgd(eta, momentum=mu, nesterov=True)


SGD = optax.sgd(0.05), reference.sgd(0.05)
MOMENTUM = optax.sgd(0.01, momentum=0.9), reference.momentum(0.01, 0.9)
ADAM = optax.adam(0.02), reference.adamw(0.02)
ADAMW = (
    optax.adamw(0.02, weight_decay=0.1),
    reference.adamw(0.02, weight_decay=0.1),
)

# Inner optimizer, outer optimizer, k: the published settings where there are some.
RECURRENCES = {
    "Lookahead": (MOMENTUM, optax.sgd(0.5), reference.sgd(0.5), 5),
    "SNOO, modded-nanogpt": (
        ADAMW,
        nesterov(0.68, 0.37),
        reference.snoo(0.68, 0.37),
        28,
    ),
    "SNOO, k = 1": (SGD, nesterov(0.8, 0.75), reference.snoo(0.8, 0.75), 1),
    "DiLoCo": (ADAMW, nesterov(0.7, 0.9), reference.snoo(0.7, 0.9), 50),
    "DiLoCo-1": (ADAMW, nesterov(0.7, 0.8), reference.muloco(0.7, 0.8), 30),
    "MuLoCo-1's outer": (ADAM, nesterov(0.7, 0.6), reference.muloco(0.7, 0.6), 30),
    "SlowMo": (
        MOMENTUM,
        optax.sgd(1.0, momentum=0.5),
        reference.slowmo(1.0, 0.5, lambda t: 0.01),
        48,
    ),
    "SlowMo, short": (
        SGD,
        optax.sgd(0.8, momentum=0.6),
        reference.slowmo(0.8, 0.6, lambda t: 0.05),
        3,
    ),
    "SGD with Adam": (SGD, optax.adam(0.05), reference.adamw(0.05), 4),
    "Adam with AdamW": (
        ADAM,
        optax.adamw(0.05, weight_decay=0.3),
        reference.adamw(0.05, weight_decay=0.3),
        4,
    ),
}


def recurrence_deviation(name):
    (inner, inner_reference), outer, outer_reference, k = RECURRENCES[name]
    cycles = max(4, 40 // k)
    params, state = visit(outer_loop(inner, outer, k), k * cycles)
    expected = np.array(
        reference.outer_loop(
            inner_reference, outer_reference, numpy_gradient, START, k, cycles
        )
    )
    return max(
        deviation(params, expected[:, 0]), deviation(state.slow_params, expected[:, 1])
    )


@pytest.mark.parametrize("name", RECURRENCES)
def test_params_and_slow_weights_follow_the_recurrence_of_the_paper(x64, name):
    assert recurrence_deviation(name) < 1e-12


@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0])
def test_sgd_as_outer_optimizer_is_lookahead(x64, k, alpha):
    inner, _ = ADAM
    params, state = visit(outer_loop(inner, optax.sgd(alpha), k), 20)
    expected, expected_state = visit(lookahead(inner, k, alpha), 20)
    assert_equal_to_rounding(params, expected)
    assert_equal_to_rounding(state.slow_params, expected_state.slow_params)
    if alpha == 1.0:
        assert_equal_to_rounding(params, visit(inner, 20)[0])


def test_nesterov_without_momentum_is_lookahead(x64):
    params, _ = visit(outer_loop(ADAM[0], nesterov(0.7, 0.0), 4), 20)
    assert_equal_to_rounding(params, visit(lookahead(ADAM[0], 4, 0.7), 20)[0])


def base_rate(t):
    return 0.05 / (1 + t)


def slowmo_deviation(outer):
    """Returns how far `outer` is from SlowMo where the base learning rate decays."""
    inner = optax.sgd(lambda step: base_rate(step // 4))
    params, _ = visit(outer_loop(inner, outer, 4), 24)

    def inner_reference(g, theta, memory):
        memory["step"] = memory.get("step", -1) + 1
        return -base_rate(memory["step"] // 4) * g

    expected = reference.outer_loop(
        inner_reference,
        reference.slowmo(0.9, 0.6, base_rate),
        numpy_gradient,
        START,
        4,
        6,
    )
    return deviation(params, [theta for theta, _ in expected])


def test_heavy_ball_is_slowmo_only_while_the_base_learning_rate_is_constant(x64):
    # With v = gamma_t u the paper's update is v <- beta gamma_t / gamma_{t-1} v + s,
    # x <- x - alpha v: heavy ball, whose decay follows the base learning rate.
    assert slowmo_deviation(optax.sgd(0.9, momentum=0.6)) > 1e-2
    decay = optax.inject_hyperparams(optax.sgd)(
        0.9, momentum=lambda t: 0.6 * base_rate(t) / base_rate(jnp.maximum(t - 1, 0))
    )
    assert slowmo_deviation(decay) < 1e-12


MULTILAYER = {
    "Lookahead": (
        (optax.sgd(0.6), optax.sgd(0.5)),
        tuple(map(reference.sgd, (0.6, 0.5))),
    ),
    "Nesterov": (
        (nesterov(0.7, 0.3), nesterov(0.8, 0.4)),
        (reference.snoo(0.7, 0.3), reference.snoo(0.8, 0.4)),
    ),
}


def multilayer_deviation(tx, name):
    params, state = visit(tx, 36)
    expected = np.array(
        reference.multilayer(
            MOMENTUM[1], MULTILAYER[name][1], (3, 4), numpy_gradient, START, 3
        )
    )
    return max(
        deviation(params, expected[:, 0]), deviation(state.slow_params, expected[:, 2])
    )


@pytest.mark.parametrize("name", MULTILAYER)
def test_a_loop_in_a_loop_is_multilayer_lookahead(x64, name):
    (middle, top), _ = MULTILAYER[name]
    tx = outer_loop(outer_loop(MOMENTUM[0], middle, 3), top, 12)
    assert multilayer_deviation(tx, name) < 1e-12
    if name == "Lookahead":
        tx = lookahead(lookahead(MOMENTUM[0], 3, 0.6), 12, 0.5)
        assert multilayer_deviation(tx, name) < 1e-12


def test_lookahead_as_the_outer_optimizer_is_multilayer_lookahead_too(x64):
    outer = lookahead(optax.sgd(0.6), 4, 0.5)
    params, state = visit(outer_loop(MOMENTUM[0], outer, 3), 36)
    _, outers = MULTILAYER["Lookahead"]
    expected = reference.multilayer(
        MOMENTUM[1], outers, (3, 4), numpy_gradient, START, 3
    )
    assert_equal_to_rounding(params, [theta for theta, _, _ in expected])
    assert_equal_to_rounding(
        state.outer_state.slow_params[3::3], [top for _, _, top in expected[3::3]]
    )


def descent_ascent(params, step):
    """Returns x * y's gradient for the player who descends, minus it for the other."""
    return {"x": params["y"], "y": -params["x"]}


@jax.jit
def play(k, alpha):
    """Returns the distance from the equilibrium after every step of the game."""
    tx, start = lookahead(optax.sgd(0.02), k, alpha), {"x": 1.0, "y": -0.5}
    start = jax.tree.map(jnp.asarray, start)
    params, _ = scanned(tx, start, descent_ascent, 300)
    return jnp.hypot(params["x"], params["y"])


@pytest.mark.parametrize("alpha", [0.2, 0.5, 0.75, 0.8])
@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 6])
def test_lookahead_minmax_contracts_a_bilinear_game_iff_k_is_large(x64, k, alpha):
    # In x + iy a step of descent-ascent multiplies by 1 + ig, g the learning rate, and
    # a cycle by 1 - alpha + alpha (1 + ig)^k, whose size squared is
    # 1 + g^2 alpha k (1 - (1 - alpha) k) + O(g^4): below 1, for small g, if and only
    # if k > 1 / (1 - alpha).
    sizes = play(k, alpha)[k - 1 :: k]
    factor = abs(1 - alpha + alpha * (1 + 0.02j) ** k)
    expected = np.hypot(1.0, 0.5) * factor ** np.arange(1, len(sizes) + 1)
    np.testing.assert_allclose(sizes, expected, rtol=1e-12)
    assert (sizes[-1] < sizes[0]) == (k > 1 / (1 - alpha))


@pytest.mark.parametrize("steps", [33, 35])
def test_the_slow_weights_of_an_alpha_schedule_are_what_airbench_ends_with(x64, steps):
    def alpha(t):
        return 1 - 0.95**5 * (5 * (jnp.asarray(t, float) + 1) / steps) ** 3

    params, state = visit(lookahead(MOMENTUM[0], 5, alpha), steps)
    end = jax.tree.map(lambda x: x[-1], (state, params))
    expected = reference.airbench(MOMENTUM[1], numpy_gradient, START, steps)
    assert_equal_to_rounding(slow_params(*end), expected)


def test_a_schedule_in_the_outer_optimizer_counts_syncs():
    # Cycles of two steps of 1, of which the outer step takes 1, 1/2 and 1/3.
    outer = optax.sgd(lambda count: 1 / (1 + count))
    tx = outer_loop(optax.sgd(1.0), outer, 2)
    params, state = scanned(tx, jnp.array(0.0), lambda p, step: jnp.ones_like(p), 7)
    fast = [-1, -2, -3, -3, -4, -3 - 2 / 3, -4 - 2 / 3]
    np.testing.assert_allclose(params, fast, rtol=1e-6)
    np.testing.assert_array_equal(state.outer_state[1].count, state.sync_count)


class Recorder:
    """An optimizer that records the arguments of its `update`."""

    def __init__(self, tx):
        self.tx, self.calls = optax.with_extra_args_support(tx), []

    def transformation(self):
        def update(updates, state, params=None, **extra_args):
            new_updates, new_state = self.tx.update(updates, state, params)
            self.calls.append((updates, params, extra_args, new_updates, new_state))
            return new_updates, new_state

        return optax.GradientTransformationExtraArgs(self.tx.init, update)


def test_the_outer_optimizer_is_given_the_step_that_ends_the_cycle():
    inner, outer = Recorder(optax.adam(0.1)), Recorder(optax.sgd(0.5))
    tx = outer_loop(inner.transformation(), outer.transformation(), 2)
    params = phi = {"w": jnp.array([1.0, -2.0])}
    state = tx.init(params)
    for step in range(4):
        grads = jax.tree.map(lambda p, step=step: p + step, params)
        updates, state = tx.update(grads, state, params, value=step)
        _, _, inner_extra, inner_updates, inner_state = inner.calls[-1]
        s, outer_params, outer_extra, _, _ = outer.calls[-1]
        assert inner_extra == {"value": step}
        inner_step = outer_extra.pop("inner_step")
        assert outer_extra == {"value": step}
        assert inner_step.grads is grads
        assert inner_step.updates is inner_updates
        assert inner_step.state is inner_state
        assert bool(inner_step.sync) == (step % 2 == 1)
        if inner_step.sync:
            theta = optax.apply_updates(params, inner_updates)
            np.testing.assert_array_equal(outer_params["w"], phi["w"])
            np.testing.assert_allclose(s["w"], phi["w"] - theta["w"], rtol=1e-6)
        params = optax.apply_updates(params, updates)
        if inner_step.sync:
            phi = params
    assert len(outer.calls) == 4


def test_nested_outer_loops_each_pass_their_own_inner_step():
    middle, top = Recorder(optax.sgd(0.5)), Recorder(optax.sgd(0.5))
    within = outer_loop(optax.sgd(0.1), middle.transformation(), 2)
    tx = outer_loop(within, top.transformation(), 4)
    params = jnp.ones(2)
    _, state = tx.update(params, tx.init(params), params)
    assert (
        middle.calls[-1][2]["inner_step"].state
        is not top.calls[-1][2]["inner_step"].state
    )
    assert top.calls[-1][2]["inner_step"].state.steps_since_sync == 1
    assert state.fast_state.steps_since_sync == 1
