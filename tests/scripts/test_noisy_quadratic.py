"""Do the trajectories have the mean and the variance of the paper's theory?

On the noisy quadratic model everything is known exactly, `quadratic_theory.py`. The
whole grid, of which this is a handful, is in `examples/noisy_quadratic.py`.
"""

import itertools
import re
from collections.abc import Callable
from typing import NamedTuple

import equal_risk
import jax
import jax.numpy as jnp
import momentum_rates
import noisy_quadratic
import numpy as np
import optax
import pytest
import quadratic_runs as runs
import quadratic_theory as theory
from helpers.commands import check_refused, run_here
from helpers.rows import slow_but
from scipy.linalg import solve_discrete_lyapunov

from optax_lookahead import lookahead, outer_loop, slow_params

POLICIES = "keep", "reset", "interpolate"
CHAINS = 20_000
# Five standard errors of a variance estimated from so many chains: 5 % of it.
BAND = runs.LIMIT * np.sqrt(2 / (CHAINS - 1))

G, B, K, ALPHA, ETA, MU = 0.3, 0.9, 5, 0.3, 0.7, 0.6
SGD, SGD_SYSTEM = optax.sgd(G), theory.sgd(G, 1.0, 1.0)
MOMENTUM, MOMENTUM_SYSTEM = optax.sgd(G, momentum=B), theory.heavy_ball(G, B, 1.0, 1.0)


class Cycle(NamedTuple):
    tx: optax.GradientTransformation
    steps: int
    system: theory.System
    trace: Callable = lambda state: None  # the momentum, if a sync leaves one
    rate: float = G  # by which that becomes a step


def outer(nesterov):
    return Cycle(
        outer_loop(SGD, optax.sgd(ETA, momentum=MU, nesterov=nesterov), K),
        K,
        theory.outer_loop(SGD_SYSTEM, K, ETA, MU, nesterov),
        lambda state: state.outer_state[0].trace,
        ETA,
    )


def around_momentum(policy):
    return Cycle(
        lookahead(MOMENTUM, K, ALPHA, inner_state=policy),
        K,
        theory.lookahead(MOMENTUM_SYSTEM, K, ALPHA, policy),
        lambda state: state.fast_state[0].trace,
    )


CYCLES = {
    "SGD": Cycle(SGD, 1, SGD_SYSTEM),
    "heavy ball": Cycle(MOMENTUM, 1, MOMENTUM_SYSTEM, lambda state: state[0].trace),
    "lookahead": Cycle(
        lookahead(SGD, K, ALPHA), K, theory.lookahead(SGD_SYSTEM, K, ALPHA)
    ),
    "nested": Cycle(
        lookahead(lookahead(SGD, 2, ALPHA), 6, 0.8),
        6,
        theory.lookahead(theory.lookahead(SGD_SYSTEM, 2, ALPHA), 3, 0.8),
    ),
    "SlowMo": outer(nesterov=False),
    "SNOO": outer(nesterov=True),
} | {policy: around_momentum(policy) for policy in POLICIES}


@pytest.mark.parametrize("name", CYCLES)
def test_two_cycles_are_exactly_the_linear_map_of_the_theory(name, x64):
    tx, steps, system, trace, rate = CYCLES[name]

    def two_cycles(z, noises):
        state = tx.init(z[0])
        if len(z) > 1:  # from any momentum, which the last sync left
            state = optax.tree.set(state, trace=-z[1] / rate)
            if name == "interpolate":
                state = state._replace(anchor=(-z[1] / rate,))

        def train_step(carry, c):
            params, state = carry
            updates, state = tx.update(params - c, state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, state), _ = jax.lax.scan(train_step, (z[0], state), noises)
        left = () if len(z) == 1 else (-rate * trace(state),)
        return jnp.stack([params, *left])

    # It is linear, so its derivative at any point is the whole map.
    z, noises = jnp.zeros(len(system.noise)), jnp.zeros(2 * steps)
    transition, of_noise = jax.jit(jax.jacfwd(two_cycles, argnums=(0, 1)))(z, noises)
    theirs = theory.repeat(system, 2)
    np.testing.assert_allclose(transition, theirs.transition, rtol=0, atol=1e-12)
    np.testing.assert_allclose(of_noise @ of_noise.T, theirs.noise, rtol=0, atol=1e-12)


def settings():
    """Returns rate, curvature, sigma, two slow steps and a momentum, an open mesh."""
    lists = (0.05, 0.5, 0.9), (0.3, 2.0), (1.0, 3.0), (0.2, 1.0), (0.7, 1.0), (0.2, 0.9)
    return np.ix_(*lists)


def stationary(system):
    return theory.stationary_covariance(system)[..., 0, 0]


@pytest.mark.parametrize("k", [1, 4, 5])
def test_the_closed_forms_are_the_stationary_variances_of_the_systems(k):
    g, a, s, alpha, eta, mu = settings()
    noise = (a * s) ** 2
    inner = theory.sgd(g, a, noise)
    slow = theory.lookahead(inner, k, alpha)
    pairs = {
        "SGD": (theory.sgd_variance(g, a, s), inner),
        "Proposition 2": (theory.lookahead_variance(g, a, s, k, alpha), slow),
        "nested": (
            theory.nested_variance(g, a, s, (k, 3), (alpha, eta)),
            theory.lookahead(slow, 3, eta),
        ),
        "heavy ball": (
            theory.heavy_ball_variance(g, mu, a, s),
            theory.heavy_ball(g, mu, a, noise),
        ),
        "SlowMo": (
            theory.slowmo_variance(g, a, s, k, eta, mu),
            theory.outer_loop(inner, k, eta, mu),
        ),
        "SNOO": (
            theory.snoo_variance(g, a, s, k, eta, mu),
            theory.outer_loop(inner, k, eta, mu, nesterov=True),
        ),
    }
    for name, (closed, system) in pairs.items():
        closed, exact = np.broadcast_arrays(closed, stationary(system))
        np.testing.assert_allclose(closed, exact, rtol=1e-12, err_msg=name)


def test_the_closed_transients_are_those_of_the_systems():
    g, a, s, alpha, m, v = settings()
    k, n, i = 5, 7, 3
    inner = theory.sgd(g, a, (a * s) ** 2)
    q = theory.sgd_contraction(g, a, k)
    slow = theory.lookahead_variance(g, a, s, k, alpha)
    mean, variance = theory.transient(
        theory.lookahead_contraction(q, alpha), slow, n, m, v
    )
    cycle = theory.lookahead(inner, k, alpha)
    exact = theory.after(cycle, n, m[..., None], v[..., None, None])
    for closed, theirs in zip((mean, variance), exact, strict=True):
        closed, theirs = np.broadcast_arrays(closed, theirs.reshape(theirs.shape[:6]))
        np.testing.assert_allclose(closed, theirs, rtol=1e-12)
    fast = theory.fast_variance(g, a, s, slow, i)
    _, theirs = theory.after(inner, i, 0 * m[..., None], slow[..., None, None])
    np.testing.assert_allclose(fast, theirs[..., 0, 0], rtol=1e-12)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_lyapunov_equation_is_solved_as_by_scipy(policy):
    rates = np.array([0.1, 0.7, 1.9])
    cycle = theory.lookahead(theory.heavy_ball(rates, B, 1.0, 1.0), K, ALPHA, policy)
    ours = theory.stationary_covariance(cycle)
    for c, transition, noise in zip(ours, *cycle, strict=True):
        theirs = solve_discrete_lyapunov(transition, noise)
        np.testing.assert_allclose(c, theirs, rtol=1e-11, atol=1e-13)


def test_proposition_2_has_the_limits_that_it_must():
    rate = np.array([0.05, 0.5, 1.0, 1.7])
    sgd = theory.sgd_variance(rate, 1.0, 1.0)
    np.testing.assert_allclose(
        theory.lookahead_variance(rate, 1.0, 1.0, K, 1.0), sgd, rtol=1e-15
    )
    np.testing.assert_allclose(
        theory.lookahead_variance(rate, 1.0, 1.0, 1, ALPHA),
        theory.sgd_variance(ALPHA * rate, 1.0, 1.0),
        rtol=1e-12,
    )
    for k, alpha in itertools.product((1, 2, 5, 20), (0.1, 0.5, 0.9)):
        slow = theory.lookahead_variance(rate, 1.0, 1.0, k, alpha)
        assert (slow < sgd).all(), "strictly smaller for alpha < 1"
    small, large = theory.lookahead_ratio(np.array([1 - 1e-9, 0.0]), 0.5)
    assert small == pytest.approx(0.5), "alpha for small steps"
    assert large == pytest.approx(1 / 3), "alpha / (2 - alpha) for many"
    assert theory.lookahead_ratio(-1.0, 0.5) == 0.0, "an odd k at the edge"
    for mu in (0.0, 0.5):
        slowmo = theory.slowmo_variance(rate, 1.0, 1.0, K, ALPHA, mu)
        snoo = theory.snoo_variance(rate, 1.0, 1.0, K, ALPHA, mu)
        slow = theory.lookahead_variance(rate, 1.0, 1.0, K, ALPHA)
        assert np.allclose(slowmo, slow) == np.allclose(snoo, slow) == (mu == 0)


POINTS = {
    "SGD": {"rate": 0.5},
    "Lookahead": {"rate": 0.1, "k": 5, "alpha": 0.2},
    "nested Lookahead": {"rate": 1.5}
    | {"k": 2, "alpha": 0.5, "outer_k": 2, "outer_alpha": 0.8},
    "SlowMo": {"rate": 1.5, "k": 5, "eta": 0.5, "mu": 0.2},
    "SNOO, DiLoCo": {"rate": 0.1, "k": 5, "eta": 0.5, "mu": 0.37},
    "heavy ball": {"rate": 1.5, "momentum": 0.5},
} | {
    policy: {"rate": 0.5, "momentum": 0.9, "k": 5, "alpha": 0.8} for policy in POLICIES
}


# `.ci/run` compares all of them, over the whole grid.
@pytest.mark.parametrize(
    "name", slow_but(["Lookahead", "SNOO, DiLoCo", "interpolate"], POINTS)
)
def test_many_chains_have_the_mean_and_the_variance_of_the_theory(name):
    method = runs.METHODS[name]
    settings = [method.shown, POINTS[name]]
    steps = max(runs.steps_of(method, setting) for setting in settings)
    run = runs.make_run(method.make, CHAINS, steps)
    moments = np.asarray(run(steps, np.arange(2), **runs.stack(settings)))
    for setting, of_setting in zip(settings, moments, strict=True):
        checks = list(runs.checks_of(method, setting, of_setting, CHAINS))
        whats = {check.what for check in checks}
        assert {"transient mean", "transient variance", "stationary variance"} <= whats
        assert ("variance within a cycle" in whats) == ("k" in setting)
        for check in checks:
            assert abs(check.z) < runs.LIMIT, (name, setting, check)
            if "variance" in check.what:
                error = check.measured / check.theory - 1
                assert abs(error) <= BAND


def shown(name, **changes):
    """Returns the stationary variance and the mean after 4 syncs of that setting."""
    _, cycle, _ = runs.METHODS[name].systems(**(runs.METHODS[name].shown | changes))
    mean, _ = theory.after(cycle, 4, np.eye(len(cycle.noise))[0], cycle.noise)
    return stationary(cycle), mean[0]


def test_the_band_tells_the_formulas_apart():
    def apart(x, y):
        return abs(x / y - 1) > 2 * BAND  # so at most one of them is in it

    keep, reset, interpolate = (shown(policy)[0] for policy in POLICIES)
    assert apart(keep, reset)
    assert apart(keep, interpolate)
    assert apart(interpolate, reset)
    assert apart(keep, shown("heavy ball")[0])
    slow = shown("Lookahead")[0]
    assert apart(slow, theory.sgd_variance(0.5, 1.0, 1.0))
    assert apart(slow, theory.sgd_variance(0.5 * 0.5, 1.0, 1.0))
    low, high = (shown("Lookahead", alpha=alpha)[0] for alpha in (0.2, 0.8))
    assert apart(low, high)
    fast = [theory.fast_variance(0.5, 1.0, 1.0, slow, i) for i in range(3)]
    assert apart(fast[0], fast[1])
    assert apart(fast[1], fast[2])
    assert apart(shown("SNOO, DiLoCo")[0], shown("SlowMo", eta=0.7, mu=0.9)[0])
    # The stationary variance hardly depends on k. The mean does, and is estimated to
    # five standard errors of at most 5 / sqrt(CHAINS), from a start of 3.
    means = [shown("Lookahead", rate=0.1, k=k)[1] for k in (4, 5, 6)]
    assert min(-np.diff(means)) * runs.START_MEAN > 2 * runs.LIMIT / CHAINS**0.5


def test_slow_weights_do_not_move_while_the_fast_ones_spread():
    method, k, steps = runs.METHODS["Lookahead"], 5, 100
    setting = runs.stack([method.shown])

    def cycle(read):
        run = runs.make_run(method.make, CHAINS, steps, read)
        variance = np.asarray(run(steps, np.arange(1), **setting))[0, :, 1]
        return variance[-k - 1 : -1]  # from a sync on

    slow, fast = cycle(slow_params), cycle(runs.fast_weights)
    np.testing.assert_array_equal(slow, slow[0])
    assert fast[0] == slow[0]
    stationary = theory.lookahead_variance(0.5, 1.0, 1.0, k, 0.5)
    np.testing.assert_allclose(slow, stationary, rtol=BAND)
    for i in range(k):
        exact = theory.fast_variance(0.5, 1.0, 1.0, stationary, i)
        np.testing.assert_allclose(fast[i], exact, rtol=BAND)


def test_equal_risk_is_found_and_figure_3_has_a_gain_for_a_spread_of_curvatures():
    alphas, (spread, single) = equal_risk.ALPHAS, equal_risk.SPECTRA.values()
    for curvature in (spread, single):
        rates = equal_risk.rate_of_risk(0.313, alphas, curvature)
        found = ~np.isnan(rates)
        risks = equal_risk.steady_risk(rates[found], alphas[found], curvature)
        np.testing.assert_allclose(risks, 0.313, rtol=1e-9)
        losses = equal_risk.loss_after(rates, alphas, curvature)
        if curvature is single:
            assert np.nanmin(losses) == pytest.approx(losses[-1], rel=1e-9)
        else:
            assert losses[-1] == pytest.approx(18.1, abs=0.05)
            assert np.nanmin(losses) == pytest.approx(11.1, abs=0.05)
            assert alphas[np.nanargmin(losses)] == pytest.approx(0.12)


@pytest.mark.parametrize("ends", [False, True])
def test_the_best_rate_of_figure_4_is_the_best_of_all(ends):
    radii = np.random.default_rng(0).random(momentum_rates.PRODUCTS.size)
    first = np.searchsorted(momentum_rates.PRODUCTS, momentum_rates.SLOWEST_RATE)
    for steps in (0, 1, 6, 401):
        rho, rate, slowest = momentum_rates.best_rate(
            radii, steps / momentum_rates.PER_DECADE, ends
        )
        worst = [
            radii[[i - steps, i]].max() if ends else radii[i - steps : i + 1].max()
            for i in range(first, radii.size)
        ]
        assert rho == min(worst)
        best = first + np.argmin(worst)
        assert rate == momentum_rates.PRODUCTS[best]
        product = np.abs(momentum_rates.PRODUCTS / (rate * slowest) - 1).argmin()
        assert radii[product] == rho
        assert best - steps <= product <= best


def test_the_grid_has_635_settings_and_4415_numbers_of_the_theory():
    counts = [
        len(list(runs.checks_of(method, setting, np.ones((2000, 2)), 2)))
        for method in runs.METHODS.values()
        for setting in runs.settings_of(method)
    ]
    assert (len(counts), sum(counts)) == (635, 4415)


@pytest.fixture
def script():
    """The script's `main`; the 64-bit types that it turns on are turned off after."""
    yield noisy_quadratic.main
    jax.config.update("jax_enable_x64", False)


@pytest.mark.slow
def test_the_script_prints_the_checks_and_draws_the_picture(
    script, monkeypatch, tmp_path
):
    picture = tmp_path / "quadratic.png"
    # The other methods would only add their compilation.
    few = {name: runs.METHODS[name] for name in ("SGD", "Lookahead")}
    monkeypatch.setattr(runs, "METHODS", few)
    monkeypatch.setattr(equal_risk, "RISKS", np.geomspace(0.05, 8, 4))
    result = run_here(script, "--chains", 200, "--points", 2, "--out", picture)
    assert result.returncode == 0
    row = r" +(\d+) +(\d+) +(\d\.\d+) +(\d+\.\d) %"
    rows = re.findall(rf"^(\w[\w ,]*?){row}$", result.stdout, re.M)
    counts = [row[:2] for row in rows]
    assert counts == [("SGD", "5"), ("Lookahead", "60"), ("all", "65")]
    losses = re.findall(r"^ +\d\.\d{4} .* \d\.\d\d +\d+$", result.stdout, re.M)
    assert len(losses) == 4, "two steady-state losses for two spectra"
    rates = re.findall(r"^0\.9+ +\d+(?: +\d\.\d{3}e-\d\d){5}$", result.stdout, re.M)
    assert len(rates) == 6, "two condition numbers at three betas"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "65/65" in result.stderr, "the progress bar counts every setting"


@pytest.mark.parametrize(
    ("measured", "agrees"), [(1.4, True), (1.6, False), (np.nan, False)]
)
def test_beyond_five_standard_errors_is_a_disagreement(measured, agrees, monkeypatch):
    monkeypatch.setattr(runs, "METHODS", {"SGD": runs.METHODS["SGD"]})
    check = runs.Check("stationary variance", 1.0, measured, 0.1)
    args = noisy_quadratic.parse_args([])
    assert runs.print_checks({"SGD": [({"rate": 1.0}, [check])]}, args) == agrees


def test_the_script_fails_where_the_runs_are_not_those_of_the_theory(
    script, monkeypatch
):
    right = runs.METHODS["Lookahead"]
    wrong = right._replace(
        systems=lambda rate, k, alpha: right.systems(rate, k, 1 - alpha),
        grid=right.grid | {"k": (5,), "alpha": (0.2,)},
    )
    monkeypatch.setattr(runs, "METHODS", {"Lookahead": wrong})
    # Only this part disagrees, and the others are not of interest.
    monkeypatch.setattr(equal_risk, "SPECTRA", {})
    monkeypatch.setattr(momentum_rates, "BETAS", (0.9,))
    monkeypatch.setattr(noisy_quadratic, "draw", lambda *args: None)
    result = run_here(script, "--chains", 2000, "--points", 1)
    assert result.returncode not in (0, None)
    assert "Lookahead, rate = 0.1, k = 5, alpha = 0.2: Check(" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--chains", "99"], "--chains must be at least 100, got 99."),
        (["--points", "0"], "--points must be at least 1, got 0."),
    ],
)
def test_the_script_answers_a_bad_option_with_one_line(arguments, message):
    check_refused(noisy_quadratic.main, arguments, message)
