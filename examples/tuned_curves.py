"""Figure 5 of the paper: learning curves of methods tuned on equally many settings.

The experiment `curves` of `robustness.py`.
"""

import argparse
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import robustness_pictures as pictures
from many_runs import (
    Measured,
    Method,
    best_of,
    cell,
    final,
    grid,
    paired,
    slow_weights,
    train_all,
)

from optax_lookahead import lookahead

K = 5
SGD_RATES = 2.0 ** np.arange(-8, 2)
ADAM_RATES = 2.0 ** np.arange(-12, -2)
EVERY = 10  # updates, between evaluations
TUNING = 1000  # the first of the seeds for tuning


def sgd(rate, momentum=0.9):
    return optax.sgd(rate, momentum=momentum)


def adam(rate, b2=0.999):
    return optax.adam(rate, b2=b2)


class PolyakState(NamedTuple):
    """State of `polyak`."""

    inner_state: optax.OptState
    mean: optax.Params  # of the parameters since the averaging began
    count: jax.Array  # shape=(), dtype=int32


def polyak(inner: optax.GradientTransformation, start) -> optax.GradientTransformation:
    """Averages the parameters after all updates except the first `start`."""

    def init(params):
        return PolyakState(inner.init(params), params, jnp.zeros((), jnp.int32))

    def update(updates, state, params=None):
        updates, inner_state = inner.update(updates, state.inner_state, params)
        count = state.count + 1
        mean = optax.incremental_update(
            optax.apply_updates(params, updates),
            state.mean,
            1 / jnp.maximum(count - start, 1),
        )
        return updates, PolyakState(inner_state, mean, count)

    return optax.GradientTransformation(init, update)


def tunable(steps: int) -> dict[str, Method]:
    """Returns the methods of figure 5, with the same number of settings each."""
    # Like epochs 60, 120 and 160 of the paper's 200.
    drops = {steps * percent // 100: 0.2 for percent in (30, 60, 80)}
    shape = optax.piecewise_constant_schedule(1.0, drops)

    def decayed(rate):
        return lambda count: rate * shape(count)

    return {
        "SGD": Method(
            lambda rate, momentum: sgd(decayed(rate), momentum),
            grid(rate=SGD_RATES, momentum=[0.9, 0.95]),
        ),
        "Polyak": Method(
            lambda rate, tail: polyak(sgd(decayed(rate)), (1 - tail) * steps),
            grid(rate=SGD_RATES, tail=[0.5, 1.0]),
            lambda params, state: [state.mean],  # noqa: ARG005
        ),
        "Adam": Method(
            lambda rate, b2: adam(decayed(rate), b2),
            grid(rate=ADAM_RATES, b2=[0.99, 0.999]),
        ),
        "lookahead": Method(
            lambda rate, alpha: lookahead(sgd(decayed(rate)), K, alpha),
            grid(rate=SGD_RATES, alpha=[0.5, 0.8]),
            slow_weights,
        ),
    }


def curves(args: argparse.Namespace, data) -> pictures.Figure:
    methods = tunable(args.steps)
    seeds = range(TUNING, TUNING + args.seeds)
    print("Settings of each method, all combinations:")
    for method, (_, settings, _) in methods.items():
        values = (f"{key} {describe(np.unique(x))}" for key, x in settings.items())
        print(f"{method:<10}{' x '.join(values)}")
    results = {}
    for name, tuned in train_all(methods, data, seeds, args.steps).items():
        best, edges = {}, []
        for method, (make, settings, weights) in methods.items():
            losses = final(tuned[method]).loss
            index = best_of(losses.reshape(-1, args.seeds))
            chosen = {key: np.ravel(x)[[index]] for key, x in settings.items()}
            best[method] = Method(make, chosen, weights)
            if chosen["rate"] in settings["rate"][[0, -1]]:
                edges.append(method)
        fresh = {name: data[name]}
        results |= train_all(best, fresh, range(args.seeds), args.steps, EVERY)
        print_curves(name, best, results[name])
        for method in edges:
            print(f"The best rate of {method} is at an edge of its grid.")
    return pictures.draw_curves(results, EVERY)


def describe(values) -> str:
    return ", ".join(f"{value:.3g}" for value in values)


def print_curves(name: str, best: dict[str, Method], measured) -> None:
    print(
        f"\n{name}: each at the best of its settings by training loss on other seeds. "
        "The column at 30 %\nof the updates, before the first drop of the rate, is "
        "also 1000 x the loss. Minus SGD: mean ±\nstandard error of the differences "
        "seed by seed.\n"
    )
    row = "{:<11}{:<27}{:>19}{:>19}{:>18}{:>14}{:>15}"
    head = "at 30 % of updates", "1000 x train loss", "minus SGD"
    print(row.format("method", "best setting", *head, "test %", "minus SGD"))
    ends = {
        method: Measured(*(x[0] for x in final(m))) for method, m in measured.items()
    }
    for method, (loss, accuracy) in ends.items():
        settings = best[method].settings
        curve = measured[method].loss[0, :, :, 0]
        minus = "-", "-"
        if method != "SGD":
            minus = (
                paired(1000 * loss, 1000 * ends["SGD"].loss, 3),
                paired(accuracy, ends["SGD"].accuracy, 2),
            )
        print(
            row.format(
                method,
                ", ".join(f"{key} {describe(x)}" for key, x in settings.items()),
                cell(1000 * curve[:, curve.shape[1] * 30 // 100 - 1], 3),
                *(cell(1000 * loss, 3), minus[0], cell(accuracy, 2), minus[1]),
            )
        )
