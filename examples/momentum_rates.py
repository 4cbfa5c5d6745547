"""Figure 4: how fast SGD with momentum contracts, alone and inside Lookahead."""

import argparse
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import quadratic_theory as theory
from command_line import BLUE, GREEN, ORANGE, PURPLE
from scipy.ndimage import maximum_filter1d

from optax_lookahead import lookahead

K, ALPHA = 20, 0.5
BETAS = 0.9, 0.99, 0.999
CYCLES = 50  # in a run
PER_DECADE = 2000  # curvatures and learning rates
# The contraction depends only on rate times curvature, so one grid is enough.
PRODUCTS = 10.0 ** np.arange(-10, math.log10(4), 1 / PER_DECADE)
SLOWEST_RATE = 1e-4


class Wrapper(NamedTuple):
    inner_state: str | None  # None without lookahead
    ends: bool  # whether 1 / condition and 1 are the only curvatures
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
    cycle = theory.lookahead(inner, K, ALPHA, wrapper.inner_state)
    return theory.spectral_radius(cycle, K)


def best_rate(
    radii: np.ndarray, decades: float, ends: bool
) -> tuple[float, float, float]:
    """Returns the smallest rho over rates, that rate, and its slowest curvature.

    The curvatures are `10**-decades` and 1 and, unless `ends`, all those of the grid in
    between.
    """
    window = round(decades * PER_DECADE) + 1
    if ends:
        worst = np.maximum(radii, np.roll(radii, window - 1))
    else:
        # The filter is centred; it is shifted so that a window ends at its product.
        worst = maximum_filter1d(radii, window, origin=(window - 1) // 2)
    first = np.searchsorted(PRODUCTS, SLOWEST_RATE)
    best = first + np.argmin(worst[first:])
    start = best - window + 1
    inside = radii[start : best + 1 : max(window - 1, 1) if ends else 1]
    slowest = start + np.argmax(inside) * (window - 1 if ends else 1)
    return worst[best], PRODUCTS[best], PRODUCTS[slowest] / PRODUCTS[best]


def make_contraction(wrapper: Wrapper):
    """Returns a function for the contraction per step of the library's optimizer.

    It runs from two states (weight, last step): (1, 0) and (0, 1). The two states at
    the end are the matrix by which `CYCLES` cycles multiply any state. The function
    takes a beta, rates `[n]` and for each the curvatures of its spectrum, `[n, m]`.
    """

    def run(beta, rate, curvature, theta, v):
        tx = optax.sgd(rate, momentum=beta)
        if wrapper.inner_state is not None:
            tx = lookahead(tx, K, ALPHA, inner_state=wrapper.inner_state)
        # Optax's trace is a sum of gradients; the last step is -rate times it.
        state = optax.tree.set(tx.init(theta), trace=-v / rate)
        if wrapper.inner_state == "interpolate":  # the trace at the last sync
            state = state._replace(anchor=(-v / rate,))

        def train_step(_, carry):
            theta, state = carry
            updates, state = tx.update(curvature * theta, state, theta)
            return optax.apply_updates(theta, updates), state

        theta, state = jax.lax.fori_loop(0, CYCLES * K, train_step, (theta, state))
        fast_state = state if wrapper.inner_state is None else state.fast_state
        return jnp.stack([theta, -rate * optax.tree.get(fast_state, "trace")])

    starts = jax.vmap(run, (None, None, None, 0, 0), -1)
    spectrum = jax.vmap(starts, (None, None, 0, None, None))
    all_rates = jax.jit(jax.vmap(spectrum, (None, 0, 0, None, None)))

    def contraction(beta, rates, spectra) -> np.ndarray:
        matrices = np.asarray(all_rates(beta, rates, spectra, *np.eye(2)))
        cycles = theory.System(matrices, np.zeros((2, 2)))
        return theory.spectral_radius(cycles, CYCLES * K).max(axis=-1)

    return contraction


class Rates(NamedTuple):
    """`1 - rho` of one wrapper and beta, by condition number."""

    lines: np.ndarray  # [conditions]
    points: np.ndarray  # [points]
    measured: np.ndarray  # [points]


CONDITIONS = np.arange(0, 6.01, 0.05)  # decades


def run_rates(args: argparse.Namespace, bar) -> dict[tuple[float, str], Rates]:
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
            # A part of the spectrum, and the curvature that is slowest in theory.
            spectra = 10 ** (-decades[:, None] * fractions)
            spectra = np.concatenate([spectra, slowest[:, None]], axis=1)
            measured = run(beta, rates, spectra)
            results[beta, name] = Rates(1 - np.array(lines), 1 - rho, 1 - measured)
            bar.update()
    return results


def print_rates(results, args: argparse.Namespace) -> bool:
    print(
        f"\nFigure 4: 1 - rho per step at the best learning rate, k = {K}, alpha = "
        f"{ALPHA:g}.\nCurvatures 1 / condition, 1 and all in between; in the last "
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
        f"\nThat is the theory. In {CYCLES * K} steps of the running optimizer "
        f"1 - rho has a\nrelative difference of at most {worst:.1e} from it."
    )
    return bool(worst < 1e-6)


def draw_rates(axes, beta: float, results, args: argparse.Namespace) -> None:
    plateau, cap = 1 - math.sqrt(beta), 1 - (1 - ALPHA) ** (1 / K)
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
