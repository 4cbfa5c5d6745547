"""Figure 3: the loss of SGD and of Lookahead that end in the same steady-state risk."""

import argparse
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import quadratic_theory as theory
from command_line import BLUE, GREEN, ORANGE
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from quadratic_runs import LIMIT, METHODS, THREADS, make_run

STEPS, K = 1000, 5
ALPHAS = np.linspace(0.01, 1, 100)  # the last one is SGD
RISKS = np.geomspace(0.05, 8, 60)  # steady-state, above the optimum
TIE = 1e-6  # losses whose relative difference is less count as equal
COORDINATES = 100
SPECTRA = {
    "100 curvatures from 0.01 to 1": np.geomspace(0.01, 1, COORDINATES),
    "100 coordinates of curvature 0.1": np.full(COORDINATES, 0.1),
}


def sigma_of(curvature):
    return curvature**-0.5  # gives every coordinate the same loss


def start_of(curvature):
    return 3 * sigma_of(curvature)


def steady_risk(rate, alpha, curvature):
    rate, alpha = np.asarray(rate)[..., None], np.asarray(alpha)[..., None]
    variance = theory.lookahead_variance(rate, curvature, sigma_of(curvature), K, alpha)
    return theory.excess_risk(curvature, 0.0, variance)


def rate_of_risk(risk, alpha, curvature):
    """Returns by bisection the learning rate with this steady-state excess risk."""
    risk, alpha = np.broadcast_arrays(risk, alpha)
    low, high = np.zeros(risk.shape), np.full(risk.shape, 2 / curvature.max())
    for _ in range(40):
        middle = (low + high) / 2
        below = steady_risk(middle, alpha, curvature) < risk
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    # NaN where no stable rate has that large a risk.
    return np.where(high < 2 / curvature.max(), low, np.nan)


def loss_after(rate, alpha, curvature):
    """Returns the expected loss above the optimum after `STEPS` steps."""
    rate, alpha = np.asarray(rate)[..., None], np.asarray(alpha)[..., None]
    q = theory.sgd_contraction(rate, curvature, K)
    s = theory.lookahead_contraction(q, alpha)
    stationary = theory.lookahead_variance(
        rate, curvature, sigma_of(curvature), K, alpha
    )
    start = start_of(curvature)
    moments = theory.transient(s, stationary, STEPS // K, start, 0.0)
    return theory.excess_risk(curvature, *moments)


class Points(NamedTuple):
    """SGD and Lookahead (at alpha = 0.5, and at its best alpha) with the same risk."""

    risks: np.ndarray  # [points]
    rates: np.ndarray  # [points, 3]
    alphas: np.ndarray
    losses: np.ndarray  # in theory
    measured: np.ndarray
    standard_errors: np.ndarray
    better: np.ndarray  # how many alphas below 1 are better than SGD, [points]


def chains_of(args: argparse.Namespace) -> int:
    return max(args.chains // 20, 2)  # fewer, since each has 100 coordinates


def arguments(curvature, rate, alpha, seed):
    """Returns the arguments of a run in which each coordinate is a setting."""
    n = len(curvature)
    floats = {"curvature": curvature, "sigma": sigma_of(curvature)}
    floats |= {"mean": start_of(curvature), "spread": np.zeros(n)}
    floats |= {"rate": np.full(n, rate), "alpha": np.full(n, alpha)}
    setting = {name: x.astype(np.float32) for name, x in floats.items()}
    seeds = np.arange(n * seed, n * (seed + 1))
    return (STEPS, seeds), setting | {"k": np.full(n, K)}


def compile_run(args: argparse.Namespace):
    """Returns the program of a run, one for all spectra: they have the same size."""
    run = make_run(METHODS["Lookahead"].make, chains_of(args), STEPS)
    positional, setting = arguments(np.ones(COORDINATES), 0.1, 0.5, 0)
    return run.lower(*positional, **setting).compile()


def run_points(curvature, args: argparse.Namespace, run, bar) -> Points:
    # With seven points, two of them are 0.0716 and 0.313.
    risks = np.geomspace(0.0716, 0.0716 * (0.313 / 0.0716) ** 3, args.points)
    rates = rate_of_risk(risks[:, None], ALPHAS, curvature)
    losses = loss_after(rates, ALPHAS, curvature)
    sgd, half = losses[:, -1:], np.abs(ALPHAS - 0.5).argmin()
    better = np.sum(losses < sgd * (1 - TIE), axis=1)
    # If several are as good as the best up to rounding, the largest alpha.
    among_best = losses <= np.nanmin(losses, axis=1, keepdims=True) * (1 + TIE)
    best = len(ALPHAS) - 1 - among_best[:, ::-1].argmax(axis=1)
    pick = np.stack([0 * best + len(ALPHAS) - 1, 0 * best + half, best], axis=1)
    rates, losses = (np.take_along_axis(x, pick, axis=1) for x in (rates, losses))
    alphas = ALPHAS[pick]
    chains = chains_of(args)

    def measure(rate, alpha, seed):
        positional, setting = arguments(curvature, rate, alpha, seed)
        moments = np.asarray(run(*positional, **setting), np.float64)
        bar.update(len(curvature))
        mean, variance = moments[:, -1].T
        squares = mean**2 + variance * (chains - 1) / chains
        # The square of a normal variable has the variance 2 V^2 + 4 m^2 V.
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
        "100 alphas up to 1; in theory,\nand how far the run is from it in SE. Better: "
        "how many of the 99 alphas below 1 beat SGD."
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


def draw_points(axes, name: str, curvature, points: Points):
    rates = rate_of_risk(RISKS, ALPHAS[:, None], curvature)
    losses = loss_after(rates, ALPHAS[:, None], curvature)
    colours = ScalarMappable(Normalize(0, 1), "cividis")
    lines = [np.column_stack([RISKS, line]) for line in losses[:-1]]
    # As one artist, since computing the layout is slow with many.
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
