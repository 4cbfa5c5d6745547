"""Check the library against exact theory on quadratics, and draw figures 3 and 4.

The gradient is `a (theta - c)` with random c, so the mean and the variance of the
weights are known exactly at every step (`quadratic_theory.py`, which must stand beside
this file). Three parts:

  1. Every method runs many thousand times over a grid of settings, and its mean and
     variance are compared with the theory, in standard errors. One beyond five, and
     the exit status is 1.
  2. Figure 3 of the Lookahead paper: expected loss after 1,000 steps of SGD and of
     Lookahead (k = 5), at learning rates that end in the same steady-state risk. The
     lines are the theory, the markers runs of the optimizer.
  3. Figure 4: how fast SGD with momentum contracts, alone and inside Lookahead (k = 20,
     alpha = 0.5), on quadratics of every condition number, each at its best learning
     rate. The markers are what the running optimizer does to its state. How much is
     gained depends on the curvatures between the least and the largest: one line has
     only those two.

    python examples/noisy_quadratic.py
    python examples/noisy_quadratic.py --chains 2000 --points 3 --out here.png
"""

import argparse
import itertools
import math
import pathlib
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import quadratic_theory as theory
from command_line import BLUE, GREEN, ORANGE, Parser
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from scipy.ndimage import maximum_filter1d
from tqdm import tqdm

from optax_lookahead import lookahead, outer_loop

PURPLE = "#CC79A7"  # of the same palette as the others
THREADS = 2
PART = 10  # settings in a run; it divides all grids but one that is smaller
LIMIT = 5  # standard errors
START_MEAN, START_SPREAD = 3.0, 2.0  # of the first weights; curvature and noise are 1
TRANSIENTS = 1, 4  # syncs after which mean and variance are compared

# Part 1: the methods, as the library has them and as the theory does.


class Method(NamedTuple):
    make: Callable[..., optax.GradientTransformation]  # the library's optimizer
    systems: Callable  # the theory's inner step and cycle, and the cycle's steps
    grid: dict[str, tuple[float, ...]]  # the arguments of both
    shown: dict[str, float]  # the setting whose variance is printed


RATES = {"rate": (0.1, 0.5, 1.0, 1.5, 1.9)}  # g a
K = {"k": (1, 5, 20)}
ALPHA = {"alpha": (0.2, 0.5, 0.8, 1.0)}
MOMENTUM = {"momentum": (0.5, 0.9)}


def inner_sgd(rate):
    return theory.sgd(rate, 1.0, 1.0)


def heavy_ball_in_lookahead(inner_state: str) -> Method:
    def make(rate, momentum, k, alpha):
        inner = optax.sgd(rate, momentum=momentum)
        return lookahead(inner, k, alpha, inner_state=inner_state)

    def systems(rate, momentum, k, alpha):
        inner = theory.heavy_ball(rate, momentum, 1.0, 1.0)
        return inner, theory.lookahead(inner, k, alpha, inner_state), k

    shown = {"rate": 0.1, "momentum": 0.9, "k": 5, "alpha": 0.5}
    return Method(make, systems, RATES | MOMENTUM | K | ALPHA, shown)


def with_outer_momentum(nesterov: bool, eta, mu, shown) -> Method:
    def make(rate, k, eta, mu):
        outer = optax.sgd(eta, momentum=mu, nesterov=nesterov)
        return outer_loop(optax.sgd(rate), outer, k)

    def systems(rate, k, eta, mu):
        inner = inner_sgd(rate)
        return inner, theory.outer_loop(inner, k, eta, mu, nesterov), k

    return Method(make, systems, RATES | K | {"eta": eta, "mu": mu}, shown)


def nested_systems(rate, k, alpha, outer_k, outer_alpha):
    inner = inner_sgd(rate)
    middle = theory.lookahead(inner, k, alpha)
    return inner, theory.lookahead(middle, outer_k, outer_alpha), k * outer_k


METHODS = {
    "SGD": Method(
        lambda rate: optax.sgd(rate),
        lambda rate: (inner_sgd(rate), inner_sgd(rate), 1),
        RATES,
        {"rate": 1.0},
    ),
    "Lookahead": Method(
        lambda rate, k, alpha: lookahead(optax.sgd(rate), k, alpha),
        lambda rate, k, alpha: (
            inner_sgd(rate),
            theory.lookahead(inner_sgd(rate), k, alpha),
            k,
        ),
        RATES | K | ALPHA,
        {"rate": 0.5, "k": 5, "alpha": 0.5},
    ),
    "nested Lookahead": Method(
        lambda rate, k, alpha, outer_k, outer_alpha: lookahead(
            lookahead(optax.sgd(rate), k, alpha), k * outer_k, outer_alpha
        ),
        nested_systems,
        RATES
        | {"k": (2, 5), "alpha": (0.5, 0.8)}
        | {"outer_k": (2, 3), "outer_alpha": (0.5, 0.8)},
        {"rate": 0.5, "k": 5, "alpha": 0.5, "outer_k": 3, "outer_alpha": 0.8},
    ),
    "SlowMo": with_outer_momentum(
        False, (0.5, 1.0), (0.2, 0.5), {"rate": 0.5, "k": 5, "eta": 1.0, "mu": 0.5}
    ),
    "SNOO, DiLoCo": with_outer_momentum(
        True, (0.5, 0.7), (0.37, 0.9), {"rate": 0.5, "k": 5, "eta": 0.7, "mu": 0.9}
    ),
    "heavy ball": Method(
        lambda rate, momentum: optax.sgd(rate, momentum=momentum),
        lambda rate, momentum: (
            2 * (theory.heavy_ball(rate, momentum, 1.0, 1.0),) + (1,)
        ),
        RATES | MOMENTUM,
        {"rate": 0.1, "momentum": 0.9},
    ),
    "keep": heavy_ball_in_lookahead("keep"),
    "reset": heavy_ball_in_lookahead("reset"),
    "interpolate": heavy_ball_in_lookahead("interpolate"),
}


class Check(NamedTuple):
    """One number of the theory and what the runs gave for it."""

    what: str
    theory: float
    measured: float
    standard_error: float

    @property
    def z(self) -> float:
        return (self.measured - self.theory) / self.standard_error


def settings_of(method: Method) -> list[dict[str, float]]:
    """Returns the grid, those that need the fewest steps first."""
    grid = [
        dict(zip(method.grid, values, strict=True))
        for values in itertools.product(*method.grid.values())
    ]
    return sorted(grid, key=lambda setting: steps_of(method, setting))


def cycles_of(method: Method, setting) -> int:
    """Returns after how many cycles nothing is left of the start."""
    _, cycle, _ = method.systems(**setting)
    rho = max(float(theory.spectral_radius(cycle)), 0.1)
    # The square, 1e-7 of the start's, is far below the Monte-Carlo error.
    return max(math.ceil(math.log(1e-7) / (2 * math.log(rho))), *TRANSIENTS)


def steps_of(method: Method, setting) -> int:
    """Returns the steps to run: one cycle more, for the fast weights inside it."""
    return (cycles_of(method, setting) + 1) * method.systems(**setting)[2]


def fast_weights(opt_state, params):  # noqa: ARG001
    return params


def make_run(make, chains: int, room: int, read=fast_weights):
    """Returns a jitted function that runs many chains at many settings.

    It takes the number of steps, at most `room`, and for each setting a seed and, by
    name, the arguments of `make`, and `curvature`, `sigma`, `mean` and `spread` where
    they are not 1, 1, and those of the start. It returns the mean and the variance over
    the chains of what `read` reads, after every step, `[settings, room, 2]`.
    """

    def run(
        steps,
        seed,
        curvature=1.0,
        sigma=1.0,
        mean=START_MEAN,
        spread=START_SPREAD,
        **setting,
    ):
        tx = make(**setting)
        key = jax.random.key(seed)

        def train_step(params, state, c):
            """A training step of one chain, whose parameter is one number."""
            updates, state = tx.update(curvature * (params - c), state, params)
            return optax.apply_updates(params, updates), state

        def body(step, carry):
            params, state, moments = carry
            c = sigma * jax.random.normal(jax.random.fold_in(key, step), (chains,))
            params, state = jax.vmap(train_step)(params, state, c)
            weights = jax.vmap(read)(state, params)
            now = jnp.stack([weights.mean(), weights.var(ddof=1)])
            return params, state, moments.at[step].set(now)

        first = jax.random.fold_in(key, room)
        params = mean + spread * jax.random.normal(first, (chains,))
        moments = jnp.zeros((room, 2))
        carry = params, jax.vmap(tx.init)(params), moments
        return jax.lax.fori_loop(0, steps, body, carry)[2]

    def run_all(steps, seeds, **settings):
        return jax.vmap(lambda seed, args: run(steps, seed, **args))(seeds, settings)

    return jax.jit(run_all)


def stack(settings: list[dict[str, float]]) -> dict[str, np.ndarray]:
    """Returns the settings as arrays, integers where all are integers."""
    return {
        name: np.array(
            [setting[name] for setting in settings],
            np.int32 if isinstance(settings[0][name], int) else np.float32,
        )
        for name in settings[0]
    }


def checks_of(method: Method, setting, moments, chains: int) -> Iterator[Check]:
    """Yields the numbers of the theory for one setting, each beside its estimate."""
    inner, cycle, length = method.systems(**setting)
    d, inner_d = len(cycle.noise), len(inner.noise)
    start_mean, start_covariance = np.zeros(d), np.zeros((d, d))
    start_mean[0], start_covariance[0, 0] = START_MEAN, START_SPREAD**2

    def variance(what, exact, step):
        error = exact * math.sqrt(2 / (chains - 1))  # of normal chains
        return Check(what, float(exact), float(moments[step - 1, 1]), error)

    for n in TRANSIENTS:
        m, c = theory.after(cycle, n, start_mean, start_covariance)
        error = math.sqrt(c[0, 0] / chains)
        measured = float(moments[n * length - 1, 0])
        yield Check("transient mean", float(m[0]), measured, error)
        yield variance("transient variance", c[0, 0], n * length)
    last = cycles_of(method, setting) * length
    c = theory.stationary_covariance(cycle)
    yield variance("stationary variance", c[0, 0], last)
    # The inner state is what a sync left of it; outer momentum is not part of it.
    c = c[:inner_d, :inner_d]
    k = setting.get("k", 1)
    for i in sorted({1, k // 2, k - 1} & set(range(1, k))):
        _, fast = theory.after(inner, i, np.zeros(inner_d), c)
        yield variance("variance within a cycle", fast[0, 0], last + i)


def check_methods(
    args: argparse.Namespace,
) -> dict[str, list[tuple[dict, list[Check]]]]:
    """Returns by method each setting with each of its checks."""
    grids = {name: settings_of(method) for name, method in METHODS.items()}
    results = {name: [] for name in METHODS}
    with (
        tqdm(total=sum(map(len, grids.values())), unit="setting") as bar,
        ThreadPoolExecutor(THREADS) as pool,
    ):
        seed = itertools.count()
        for name, method in METHODS.items():
            bar.set_description(name)
            grid = grids[name]
            run = make_run(method.make, args.chains, steps_of(method, grid[-1]))
            # All of one size, for one compile.
            parts = [grid[i : i + PART] for i in range(0, len(grid), PART)]
            steps = [steps_of(method, part[-1]) for part in parts]
            seeds = [np.array([next(seed) for _ in part]) for part in parts]

            def measure(steps, seeds, part, run=run):
                return np.asarray(run(steps, seeds, **stack(part)))

            moments = pool.map(measure, steps, seeds, parts)
            for part, of_part in zip(parts, moments, strict=True):
                for setting, of_setting in zip(part, of_part, strict=True):
                    checks = checks_of(method, setting, of_setting, args.chains)
                    results[name].append((setting, list(checks)))
                bar.update(len(part))
    return results


def describe(setting: dict[str, float]) -> str:
    return ", ".join(f"{name} = {value:g}" for name, value in setting.items())


def print_checks(results, args: argparse.Namespace) -> bool:
    """Prints the comparison with theory, and returns whether all of it agrees."""
    print(
        f"\nOne coordinate, curvature and noise 1, {args.chains} chains, a seed for "
        "every setting.\nStationary variance after a sync, at one setting of each:\n"
    )
    print(f"{'method':<18}{'theory':>9}{'run':>9}{'diff, SE':>10}   setting")
    for name, method in METHODS.items():
        for setting, checks in results[name]:
            if setting == method.shown:
                (check,) = (c for c in checks if c.what == "stationary variance")
                print(
                    f"{name:<18}{check.theory:9.4f}{check.measured:9.4f}"
                    f"{check.z:+10.2f}   {describe(setting)}"
                )
    print(
        "\nThe whole grid: mean and variance after 1 and 4 syncs, stationary variance "
        "at a sync,\nvariance within a cycle. Of normal errors, 4.6 % exceed 2 SE.\n"
    )
    print(f"{'method':<18}{'settings':>9}{'numbers':>9}{'worst, SE':>11}{'> 2 SE':>9}")
    everything = list(itertools.chain(*results.values()))
    for name, rows in (results | {"all": everything}).items():
        z = np.abs([check.z for _, checks in rows for check in checks])
        print(
            f"{name:<18}{len(rows):9}{len(z):9}{z.max():11.2f}"
            f"{100 * np.mean(z > 2):7.1f} %"
        )
    wrong = [
        f"{name}, {describe(setting)}: {check}"
        for name, rows in results.items()
        for setting, checks in rows
        for check in checks
        if not abs(check.z) <= LIMIT  # NaN too
    ]
    print("\n".join([*wrong, ""]))
    return not wrong


# Part 2: figure 3.

STEPS, FIGURE_K = 1000, 5
ALPHAS = np.linspace(0.01, 1, 100)  # the last one is SGD
RISKS = np.geomspace(0.05, 8, 60)  # steady-state, above the optimum
TIE = 1e-6  # losses that differ by less are equal
SPECTRA = {
    "100 curvatures from 0.01 to 1": np.geomspace(0.01, 1, 100),
    "100 coordinates of curvature 0.1": np.full(100, 0.1),
}


def sigma_of(curvature):
    return curvature**-0.5  # of the same loss in every coordinate


def start_of(curvature):
    return 3 * sigma_of(curvature)


def steady_risk(rate, alpha, curvature):
    rate, alpha = np.asarray(rate)[..., None], np.asarray(alpha)[..., None]
    variance = theory.lookahead_variance(
        rate, curvature, sigma_of(curvature), FIGURE_K, alpha
    )
    return theory.excess_risk(curvature, 0.0, variance)


def rate_of_risk(risk, alpha, curvature):
    """Returns by bisection the learning rate with this steady-state excess risk."""
    risk, alpha = np.broadcast_arrays(risk, alpha)
    low, high = np.zeros(risk.shape), np.full(risk.shape, 2 / curvature.max())
    for _ in range(40):
        middle = (low + high) / 2
        below = steady_risk(middle, alpha, curvature) < risk
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    # NaN where no stable rate is risky enough.
    return np.where(high < 2 / curvature.max(), low, np.nan)


def loss_after(rate, alpha, curvature):
    """Returns the expected loss above the optimum after `STEPS` steps."""
    rate, alpha = np.asarray(rate)[..., None], np.asarray(alpha)[..., None]
    q = theory.sgd_contraction(rate, curvature, FIGURE_K)
    s = theory.lookahead_contraction(q, alpha)
    stationary = theory.lookahead_variance(
        rate, curvature, sigma_of(curvature), FIGURE_K, alpha
    )
    start = start_of(curvature)
    moments = theory.transient(s, stationary, STEPS // FIGURE_K, start, 0.0)
    return theory.excess_risk(curvature, *moments)


class Points(NamedTuple):
    """SGD and Lookahead (at alpha = 0.5, and at its best) with the same risk."""

    risks: np.ndarray  # [points]
    rates: np.ndarray  # [points, 3]
    alphas: np.ndarray
    losses: np.ndarray  # in theory
    measured: np.ndarray
    standard_errors: np.ndarray
    better: np.ndarray  # how many alphas below 1 are better than SGD, [points]


def run_points(curvature, args: argparse.Namespace, bar) -> Points:
    # Two of seven are 0.0716 and 0.313.
    risks = np.geomspace(0.0716, 0.0716 * (0.313 / 0.0716) ** 3, args.points)
    rates = rate_of_risk(risks[:, None], ALPHAS, curvature)
    losses = loss_after(rates, ALPHAS, curvature)
    sgd, half = losses[:, -1:], np.abs(ALPHAS - 0.5).argmin()
    better = np.sum(losses < sgd * (1 - TIE), axis=1)
    # Of equals the largest alpha: the last of those within rounding of the best.
    among_best = losses <= np.nanmin(losses, axis=1, keepdims=True) * (1 + TIE)
    best = len(ALPHAS) - 1 - among_best[:, ::-1].argmax(axis=1)
    pick = np.stack([0 * best + len(ALPHAS) - 1, 0 * best + half, best], axis=1)
    rates, losses = (np.take_along_axis(x, pick, axis=1) for x in (rates, losses))
    alphas = ALPHAS[pick]
    chains = max(args.chains // 20, 2)  # as each of them has 100 coordinates
    run = make_run(METHODS["Lookahead"].make, chains, STEPS)
    n = len(curvature)
    first = {"curvature": curvature, "sigma": sigma_of(curvature)}
    first |= {"mean": start_of(curvature), "spread": np.zeros(n)}
    first = {name: x.astype(np.float32) for name, x in first.items()}

    def measure(rate, alpha, seed):
        setting = {"rate": np.full(n, rate, np.float32), "k": np.full(n, FIGURE_K)}
        setting["alpha"] = np.full(n, alpha, np.float32)
        seeds = np.arange(n * seed, n * (seed + 1))
        moments = np.asarray(run(STEPS, seeds, **first, **setting), np.float64)
        bar.update(n)
        mean, variance = moments[:, -1].T
        squares = mean**2 + variance * (chains - 1) / chains
        # Of the square of a normal variable, 2 V^2 + 4 m^2 V, summed over coordinates.
        error = curvature**2 / 4 * (2 * variance**2 + 4 * mean**2 * variance) / chains
        return np.sum(curvature * squares) / 2, np.sqrt(np.sum(error))

    jobs = zip(rates.flat, alphas.flat, range(rates.size), strict=True)
    with ThreadPoolExecutor(THREADS) as pool:
        results = np.array(list(pool.map(lambda job: measure(*job), jobs)))
    measured, errors = (x.reshape(rates.shape) for x in results.T)
    return Points(risks, rates, alphas, losses, measured, errors, better)


def print_points(spectra: dict[str, Points]) -> bool:
    print(
        f"Figure 3: expected loss (above the optimum) after {STEPS} steps at the same "
        "steady-state\nloss: SGD, Lookahead (k = 5) at alpha = 0.5 and at the best of "
        "100 alphas up to 1; theory,\nand the difference of the run in SE; how many of "
        "the 99 alphas below 1 beat SGD."
    )
    agree = True
    for name, points in spectra.items():
        print(f"\n{name}\n{'steady':>8}", end="")
        for method in ("SGD", "alpha = 0.5", "best"):
            print(f"{method:>13}{'rate':>8}{'SE':>7}", end="")
        print(f"{'alpha':>7}{'better':>8}")
        z = (points.measured - points.losses) / points.standard_errors
        agree &= bool((np.abs(z) <= LIMIT).all())
        for i, risk in enumerate(points.risks):
            print(f"{risk:8.4f}", end="")
            for j in range(3):
                loss, rate = points.losses[i, j], points.rates[i, j]
                print(f"{loss:13.4g}{rate:8.4f}{z[i, j]:+7.2f}", end="")
            print(f"{points.alphas[i, 2]:7.2f}{points.better[i]:8d}")
    return agree


def draw_figure_3(axes, name: str, curvature, points: Points):
    rates = rate_of_risk(RISKS, ALPHAS[:, None], curvature)
    losses = loss_after(rates, ALPHAS[:, None], curvature)
    colours = ScalarMappable(Normalize(0, 1), "cividis")
    lines = [np.column_stack([RISKS, line]) for line in losses[:-1]]
    # As one artist, since a layout is slow with many.
    axes.add_collection(
        LineCollection(lines, colors=colours.to_rgba(ALPHAS[:-1]), linewidths=0.8)
    )
    axes.plot(RISKS, losses[-1], "--", color=ORANGE, linewidth=2.2, label="SGD, theory")
    for j, (label, colour, marker) in enumerate(
        (
            ("SGD, run", ORANGE, "s"),
            ("Lookahead, alpha = 0.5, run", GREEN, "^"),
            ("Lookahead at its best alpha, run", BLUE, "o"),
        )
    ):
        axes.errorbar(
            points.risks,
            points.measured[:, j],
            LIMIT * points.standard_errors[:, j],
            fmt=marker,
            color=colour,
            markeredgecolor="white",
            label=label,
            capsize=3,
            zorder=3,
        )
    axes.set(xscale="log", yscale="log", title=name)
    axes.set_xlabel("steady-state loss above the optimum")
    axes.set_ylabel(f"expected loss above the optimum\nafter {STEPS:,} steps")
    return colours


# Part 3: figure 4.

CYCLE, SLOW_STEP = 20, 0.5  # k and alpha
BETAS = 0.9, 0.99, 0.999
CYCLES = 50  # that a run takes
PER_DECADE = 2000  # curvatures and learning rates
# The contraction only depends on rate times curvature, so one grid serves for all.
PRODUCTS = 10.0 ** np.arange(-10, math.log10(4), 1 / PER_DECADE)
SLOWEST_RATE = 1e-4


class Wrapper(NamedTuple):
    inner_state: str | None  # None without lookahead
    ends: bool  # whether curvatures 1 / condition and 1 are all there is
    colour: str
    line: str
    marker: str


WRAPPERS = {
    "momentum alone": Wrapper(None, False, ORANGE, "--", "s"),
    "Lookahead, keep": Wrapper("keep", False, BLUE, "-", "o"),
    "Lookahead, reset": Wrapper("reset", False, GREEN, ":", "^"),
    "Lookahead, interpolate": Wrapper("interpolate", False, "black", "-.", "D"),
    "Lookahead, keep, 2 curvatures": Wrapper("keep", True, PURPLE, (0, (1, 3)), "x"),
}


def radii_of(wrapper: Wrapper, beta: float) -> np.ndarray:
    """Returns the contraction per step at each of `PRODUCTS`."""
    inner = theory.heavy_ball(1.0, beta, PRODUCTS, 0.0)
    if wrapper.inner_state is None:
        return theory.spectral_radius(inner)
    cycle = theory.lookahead(inner, CYCLE, SLOW_STEP, wrapper.inner_state)
    return theory.spectral_radius(cycle, CYCLE)


def best_rate(
    radii: np.ndarray, decades: float, ends: bool
) -> tuple[float, float, float]:
    """Returns the least contraction over rates, that rate, and its worst curvature.

    For curvatures from `10**-decades` to 1, with all those of the grid in between
    unless `ends`.
    """
    window = round(decades * PER_DECADE) + 1
    if ends:
        worst = np.maximum(radii, np.roll(radii, window - 1))
    else:
        # The filter is centred: shifted, so that a window ends at its own product.
        worst = maximum_filter1d(radii, window, origin=(window - 1) // 2)
    first = np.searchsorted(PRODUCTS, SLOWEST_RATE)
    best = first + np.argmin(worst[first:])
    start = best - window + 1
    inside = radii[start : best + 1 : max(window - 1, 1) if ends else 1]
    slowest = start + np.argmax(inside) * (window - 1 if ends else 1)
    return worst[best], PRODUCTS[best], PRODUCTS[slowest] / PRODUCTS[best]


def make_contraction(wrapper: Wrapper):
    """Returns a function for the contraction per step of the library's optimizer.

    It runs from two states, weight and last step (1, 0) and (0, 1). Where they end is
    the matrix by which so many cycles multiply any state. The function takes a beta,
    rates `[n]` and for each the curvatures of its spectrum, `[n, m]`.
    """

    def run(beta, rate, curvature, theta, v):
        tx = optax.sgd(rate, momentum=beta)
        if wrapper.inner_state is not None:
            tx = lookahead(tx, CYCLE, SLOW_STEP, inner_state=wrapper.inner_state)
        # Optax's momentum sums gradients: the last step is -rate times it.
        state = optax.tree.set(tx.init(theta), trace=-v / rate)

        def train_step(_, carry):
            theta, state = carry
            updates, state = tx.update(curvature * theta, state, theta)
            return optax.apply_updates(theta, updates), state

        theta, state = jax.lax.fori_loop(0, CYCLES * CYCLE, train_step, (theta, state))
        fast_state = state if wrapper.inner_state is None else state.fast_state
        return jnp.stack([theta, -rate * optax.tree.get(fast_state, "trace")])

    starts = jax.vmap(run, (None, None, None, 0, 0), -1)
    spectrum = jax.vmap(starts, (None, None, 0, None, None))
    all_rates = jax.jit(jax.vmap(spectrum, (None, 0, 0, None, None)))

    def contraction(beta, rates, spectra) -> np.ndarray:
        matrices = np.asarray(all_rates(beta, rates, spectra, *np.eye(2)))
        cycles = theory.System(matrices, np.zeros((2, 2)))
        return theory.spectral_radius(cycles, CYCLES * CYCLE).max(axis=-1)

    return contraction


class Rates(NamedTuple):
    """`1 - rho` of one wrapper and beta, by condition number."""

    lines: np.ndarray  # [conditions]
    points: np.ndarray  # [points]
    measured: np.ndarray  # [points]


CONDITIONS = np.arange(0, 6.01, 0.05)  # decades


def figure_4(args: argparse.Namespace, bar) -> dict[tuple[float, str], Rates]:
    decades = np.linspace(0, 6, args.points)
    results = {}
    for name, wrapper in WRAPPERS.items():
        run = make_contraction(wrapper)
        fractions = np.linspace(0, 1, 2 if wrapper.ends else 64)
        for beta in BETAS:
            radii = radii_of(wrapper, beta)
            lines = [best_rate(radii, d, wrapper.ends)[0] for d in CONDITIONS]
            best = [best_rate(radii, d, wrapper.ends) for d in decades]
            rho, rates, slowest = np.transpose(best)
            # Some of the spectrum, and the curvature where the theory is slowest.
            spectra = 10 ** (-decades[:, None] * fractions)
            spectra = np.concatenate([spectra, slowest[:, None]], axis=1)
            measured = run(beta, rates, spectra)
            results[beta, name] = Rates(1 - np.array(lines), 1 - rho, 1 - measured)
            bar.update()
    return results


def print_rates(results, args: argparse.Namespace) -> bool:
    print(
        f"\nFigure 4: 1 - rho per step at the best learning rate, k = {CYCLE}, alpha = "
        f"{SLOW_STEP:g}.\nCurvatures 1 / condition, 1 and all in between; in the last "
        "column only those two.\n"
    )
    names = [name.removeprefix("Lookahead, ") for name in WRAPPERS]
    print(f"{'beta':<6}{'condition':>10}" + "".join(f"{x:>19}" for x in names))
    for beta in BETAS:
        for i, decade in enumerate(np.linspace(0, 6, args.points)):
            row = [results[beta, name].points[i] for name in WRAPPERS]
            cells = "".join(f"{x:19.3e}" for x in row)
            print(f"{beta:<6}{10**decade:10.0f}{cells}")
    worst = np.max([np.abs(x.measured / x.points - 1) for x in results.values()])
    print(
        f"\nThat is the theory. In {CYCLES * CYCLE} steps of the running optimizer "
        f"1 - rho differs by\nat most a fraction of {worst:.1e}."
    )
    return bool(worst < 1e-6)


def draw_figure_4(axes, beta: float, results, args: argparse.Namespace) -> None:
    plateau, cap = 1 - math.sqrt(beta), 1 - (1 - SLOW_STEP) ** (1 / CYCLE)
    axes.axhline(plateau, color="0.6", linewidth=1, label="1 - sqrt(beta)")
    axes.axhline(cap, color="0.6", linewidth=1, ls="--", label="1 - (1 - alpha)^(1/k)")
    for name, (_, _, colour, line, marker) in WRAPPERS.items():
        rates = results[beta, name]
        style = {"color": colour, "linestyle": line}
        axes.plot(10**CONDITIONS, rates.lines, **style)
        points = np.geomspace(1, 1e6, args.points)
        axes.plot(points, rates.measured, marker, color=colour, markersize=5)
        axes.plot([], [], marker=marker, label=name, **style)
    axes.set(xscale="log", yscale="log", title=f"beta = {beta:g}")
    axes.set_xlabel("condition number")


def draw(spectra: dict[str, Points], rates, args: argparse.Namespace) -> None:
    figure = Figure(figsize=(12, 9.5), layout="constrained")
    top, bottom = figure.subfigures(2, 1)
    axes = top.subplots(1, 2)
    for ax, name in zip(axes, spectra, strict=True):
        colours = draw_figure_3(ax, name, SPECTRA[name], spectra[name])
    top.colorbar(colours, ax=axes, label="alpha of Lookahead, k = 5")
    top.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4
    )
    top.suptitle("Noisy quadratics: lines are theory, markers runs (bars: 5 SE)")
    axes = bottom.subplots(1, len(BETAS), sharey=True)
    for ax, beta in zip(axes, BETAS, strict=True):
        draw_figure_4(ax, beta, rates, args)
    axes[0].set_ylabel("1 - contraction per step\n(higher is faster)")
    bottom.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4
    )
    bottom.suptitle(
        "SGD with momentum beta on quadratics, best learning rate, "
        f"k = {CYCLE}, alpha = {SLOW_STEP:g}"
    )
    figure.savefig(args.out, dpi=100)


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--chains", type=int, default=20000, help="runs of a setting")
    parser.add_argument("--points", type=int, default=7, help="markers on a curve")
    parser.add_argument(
        "--out", type=pathlib.Path, default="noisy_quadratic.png", help="a PNG"
    )
    args = parser.parse_args(argv)
    parser.check_counts(args, "points")
    if args.chains < 100:
        parser.error(f"--chains must be at least 100, got {args.chains}.")
    parser.check_picture(args.out)
    return args


def main() -> None:
    args = parse_args(sys.argv[1:])
    checks = check_methods(args)
    agree = print_checks(checks, args)
    size = 3 * args.points * sum(map(len, SPECTRA.values()))
    with tqdm(total=size, unit="run", desc="figure 3") as bar:
        spectra = {
            name: run_points(curvature, args, bar)
            for name, curvature in SPECTRA.items()
        }
    agree &= print_points(spectra)
    jax.config.update("jax_enable_x64", True)
    with tqdm(total=len(BETAS) * len(WRAPPERS), unit="run", desc="figure 4") as bar:
        rates = figure_4(args, bar)
    agree &= print_rates(rates, args)
    draw(spectra, rates, args)
    print(f"\nPicture: {args.out}")
    if not agree:
        sys.exit("\nThe runs disagree with the theory.")


if __name__ == "__main__":
    main()
