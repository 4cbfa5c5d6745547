"""Is the adaptive alpha at the minimum of the loss between slow and fast weights?"""

import functools
import json

import adaptive_alpha as example
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from adaptive_alpha import adaptive_alpha
from helpers import reference
from helpers.commands import check_refused, run_here
from helpers.training import scanned, trajectory
from jax.flatten_util import ravel_pytree

from optax_lookahead import outer_loop

INNERS = {
    "sgd": (optax.sgd(0.3), reference.sgd(0.3)),
    "momentum": (optax.sgd(0.1, momentum=0.9), reference.momentum(0.1, 0.9)),
    "adam": (optax.adam(0.3), reference.adamw(0.3)),
}
CYCLES = 4
# Parameters of 0 to 3 axes, 17 in all.
SHAPES = {"b": (), "w": [(2,), (2, 3)], "z": (2, 2, 2)}


def split(flat):
    like = jax.tree.map(np.zeros, SHAPES, is_leaf=lambda x: isinstance(x, tuple))
    return ravel_pytree(like)[1](jnp.asarray(flat))


def quadratic():
    """Returns A, b and a start of L = 1/2 x'Ax - b'x, with a random diagonal A."""
    rng = np.random.default_rng(0)
    diagonal, minimum = rng.uniform(0.1, 5.0, 17), rng.normal(size=17)
    return diagonal, diagonal * minimum, 3 * rng.normal(size=17)


def proposition_1(inner, diagonal, b, start, k):
    """Returns phi before and after every cycle, theta and alpha, by the paper."""
    A, best, phi = np.diag(diagonal), b / diagonal, start
    memory, visited = {}, []
    for _ in range(CYCLES):
        theta = phi.copy()
        for _ in range(k):
            theta += inner(A @ theta - b, theta, memory)
        alpha = (phi - best) @ A @ (phi - theta) / ((phi - theta) @ A @ (phi - theta))
        visited.append((phi, phi + alpha * (theta - phi), theta, alpha))
        phi = visited[-1][1]
    return visited


def told(tx, grad_fn):
    """Returns the optimizer with this gradient in the arguments of its updates."""

    def update(updates, state, params):
        return tx.update(updates, state, params, outer_args={"grad_fn": grad_fn})

    return optax.GradientTransformationExtraArgs(tx.init, update)


@functools.cache
def both(name, k, is_told):
    """Returns slow weights and alphas of the syncs, and those of the paper."""
    inner, recurrence = INNERS[name]
    diagonal, b, start = quadratic()

    def gradient(w, step=None):
        return jax.tree.map(lambda a, x, b: a * x - b, split(diagonal), w, split(b))

    # Without bounds, to see the formula itself.
    outer = adaptive_alpha(lambda state: split(diagonal), -np.inf, np.inf)
    tx = outer_loop(inner, outer, k)
    tx = told(tx, gradient) if is_told else tx
    visited = trajectory(tx, split(start), gradient, CYCLES * k, jax.jit)[k - 1 :: k]
    ours = [(ravel_pytree(w)[0], s.outer_state.alpha) for w, s in visited]
    return ours, proposition_1(recurrence, diagonal, b, start, k)


every_way = [
    pytest.mark.parametrize("is_told", [False, True], ids=["modelled", "grad_fn"]),
    pytest.mark.parametrize("k", [1, 2, 5]),
    pytest.mark.parametrize("name", INNERS),
]


def in_every_way(test):
    return functools.reduce(lambda test, mark: mark(test), every_way, test)


@in_every_way
def test_with_the_true_curvature_alpha_is_that_of_proposition_1(x64, name, k, is_told):
    for (phi, alpha), (_, expected, _, optimum) in zip(
        *both(name, k, is_told), strict=True
    ):
        assert alpha.shape == ()
        np.testing.assert_allclose(alpha, optimum, 1e-10)
        np.testing.assert_allclose(phi, expected, 1e-10, 1e-10)


@in_every_way
def test_the_loss_is_lower_nowhere_on_the_line(x64, name, k, is_told):
    diagonal, b, _ = quadratic()

    def loss(x):
        return (0.5 * diagonal * x * x - b * x).sum(axis=-1)

    for (phi, alpha), (old, _, theta, _) in zip(*both(name, k, is_told), strict=True):
        alphas = np.append(np.linspace(-3, 3, 601), alpha + np.array([-1e-3, 1e-3]))
        line = old + alphas[:, None] * (theta - old)
        assert loss(np.asarray(phi)) <= loss(line).min() + 1e-13


def one_cycle(d, grads, curvature, low=0.3, high=1.5):
    """Returns the alpha of a cycle of one step from 0 to `d`, and where it ends."""
    outer = adaptive_alpha(lambda _: curvature, low, high)
    tx = told(outer_loop(optax.sgd(1.0), outer, 1), lambda theta: grads)
    w = jnp.zeros_like(d)
    updates, state = tx.update(-d, tx.init(w), w)
    return float(state.outer_state.alpha), w + updates


@pytest.mark.parametrize(
    ("slope", "alpha"), [(-0.1, 1.1), (0.5, 0.5), (0.9, 0.3), (-5.0, 1.5)]
)
def test_the_bounds_clip_alpha(slope, alpha):
    got, w = one_cycle(jnp.ones(1), jnp.full(1, slope), jnp.ones(1))
    np.testing.assert_allclose(got, alpha, 1e-6)
    np.testing.assert_allclose(w, alpha, 1e-6)


@pytest.mark.parametrize("slope", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize("curvature", [0.0, -1.0])
def test_without_a_minimum_alpha_is_the_largest(curvature, slope):
    with jax.debug_nans(True):
        got, w = one_cycle(jnp.ones(1), jnp.full(1, slope), jnp.full(1, curvature))
    assert got == 1.5
    np.testing.assert_array_equal(w, 1.5)


def test_after_a_cycle_that_moved_nothing_alpha_is_the_largest():
    with jax.debug_nans(True):
        got, w = one_cycle(jnp.zeros(2), jnp.ones(2), jnp.ones(2))
    assert got == 1.5
    np.testing.assert_array_equal(w, 0.0)


DIAGONAL = jnp.array([0.5, 3.0, 1.0])
START = jnp.array([3.0, -1.0, 2.0])
TX = outer_loop(
    optax.sgd(0.5, momentum=0.5), adaptive_alpha(lambda _: DIAGONAL, 0.1, 1.5), 3
)


def gradient(w, step=0):
    return DIAGONAL * w + 0.1 * jnp.sin(step + w)


def alphas(visited):
    return [float(state.outer_state.alpha) for _, state in visited]


def test_the_state_moves_at_syncs_only():
    visited = [1.0, *alphas(trajectory(TX, START, gradient, 9, jax.jit))]
    moved = [step for step in range(1, 10) if visited[step] != visited[step - 1]]
    assert moved == [3, 6, 9]


@pytest.mark.parametrize("tx", [TX, told(TX, gradient)], ids=["modelled", "grad_fn"])
def test_eager_jitted_and_scanned_steps_are_the_same(tx):
    eager = trajectory(tx, START, gradient, 9)
    jitted = trajectory(tx, START, gradient, 9, jax.jit)
    params, states = scanned(tx, START, gradient, 9)
    np.testing.assert_allclose(alphas(jitted), alphas(eager), 1e-4)
    np.testing.assert_allclose(states.outer_state.alpha, alphas(eager), 1e-4)
    np.testing.assert_allclose(params[-1], eager[-1][0], 1e-4, 1e-5)


def test_the_gradient_function_runs_at_syncs_only_and_at_the_fast_weights():
    seen = []

    def grad_fn(w):
        jax.debug.callback(lambda w: seen.append(np.asarray(w)), w)
        return gradient(w)

    trajectory(told(TX, grad_fn), START, gradient, 6, jax.jit)
    jax.effects_barrier()
    assert len(seen) == 2
    fast = trajectory(optax.sgd(0.5, momentum=0.5), START, gradient, 3)[-1][0]
    np.testing.assert_allclose(seen[0], fast, 1e-5, 1e-6)


@pytest.mark.slow
def test_the_script_prints_and_writes_a_row_for_each_form(tmp_path):
    file = tmp_path / "rows.json"
    options = ("--steps", 10, "--seeds", 1, "--rates", 0.01, "--json", file)
    result = run_here(example.main, *options)
    assert result.returncode == 0, result.stderr
    assert "110/110" in result.stderr, "the progress bar counts every update"
    rows = json.loads(file.read_text())["rows"]
    table = result.stdout.rstrip().splitlines()[-len(rows) - 2 :]
    lines = (rows[0], ["---"] * len(rows[0]), *(row.values() for row in rows))
    assert table == [f"| {' | '.join(line)} |" for line in lines]
    assert [row["form"] for row in rows] == [form.name for form in example.FORMS]
    for row, form in zip(rows, example.FORMS, strict=True):
        assert (row["mean alpha"] != "") == (form.curvature is not None)
        if row["mean alpha"]:
            assert 0.2 <= float(row["mean alpha"]) <= 1.0
    assert len({row["train loss"] for row in rows}) > 6, "the forms differ"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--k", "0"], "--k must be at least 1, got 0."),
        (["--steps", "12"], "--steps must be a multiple of 5, got 12."),
        (["--json", "missing/rows.json"], "--json must be a file in an existing"),
        (["--kk", "5"], "unrecognized arguments: --kk 5"),
    ],
)
def test_the_script_answers_a_bad_option_with_one_line(arguments, message):
    check_refused(example.main, arguments, message)
