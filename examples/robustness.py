"""How robust is lookahead? Figures 5, 8, 9 and 10 of the paper, on small real data.

A dense network with two hidden layers learns scikit-learn's handwritten digits and its
breast cancer data. Each experiment trains many settings over seeds that they share,
prints its tables and draws a picture. The files `many_runs.py`, `tuned_curves.py` and
`robustness_pictures.py` must be in the same folder:

    python examples/robustness.py learning-rates   # figure 8
    python examples/robustness.py k-alpha          # figure 9 and table 5
    python examples/robustness.py cycles           # figure 10
    python examples/robustness.py inner-state      # keep, reset or interpolate, or EMA
    python examples/robustness.py curves           # figure 5 and table 1

Unless stated otherwise, the inner optimizer is SGD with momentum 0.9 at a constant
learning rate, k = 5, alpha = 0.5, and the slow weights are evaluated. Thresholds and
fixed rates are from pilot runs of SGD alone, with other seeds.
"""

import argparse
import pathlib
import sys

import numpy as np
import optax
import robustness_pictures as pictures
from command_line import Parser
from many_runs import (
    BATCH,
    LOADERS,
    Measured,
    Method,
    best_of,
    cell,
    fast_and_slow_weights,
    final,
    grid,
    paired,
    share,
    slow_weights,
    standard_error,
    train_all,
)
from tuned_curves import ADAM_RATES, SGD_RATES, adam, curves, sgd

from optax_lookahead import lookahead, primal_averaging

K, ALPHA = 5, 0.5
TRAINED = {"digits": 95.0, "breast_cancer": 92.0}  # % of the test part, or more
SMALL, LARGE = 2.0**-5, 2.0**-3  # SGD trains with both, but not with 2 * LARGE


# Figure 8: learning rate and momentum.

MOMENTA = np.array([0.0, 0.5, 0.8, 0.9, 0.95, 0.98])
RATES = 2.0 ** np.arange(-18, 4)  # from far too small for all momenta to far too large


def learning_rates(args: argparse.Namespace, data) -> pictures.Figure:
    # One rate more, so that each rate times alpha is on the grid of SGD too.
    rates = np.append(ALPHA * RATES[0], RATES)
    methods = {
        "SGD": Method(sgd, grid(rate=rates, momentum=MOMENTA)),
        "lookahead": Method(
            lambda rate, momentum: lookahead(sgd(rate, momentum), K, ALPHA),
            grid(rate=RATES, momentum=MOMENTA),
            slow_weights,
        ),
    }
    results = {}
    for name, measured in train_all(
        methods, data, range(args.seeds), args.steps
    ).items():
        alone = final(measured["SGD"])
        results[name] = {
            "SGD": Measured(*(x[1:] for x in alone)),
            "SGD, alpha x rate": Measured(*(x[:-1] for x in alone)),
            "lookahead": final(measured["lookahead"]),
        }
        print_shares(name, results[name])
    return pictures.draw_rates(results, TRAINED, RATES, MOMENTA)


def print_shares(name: str, ends: dict[str, Measured]) -> None:
    print(
        f"\n{name}: a run counts as trained at {TRAINED[name]:g} % test accuracy. "
        f"{len(RATES)} rates, {RATES[0]:.2g} to {RATES[-1]:g}\nin factors of 2, x "
        f"{len(MOMENTA)} momenta. Best: the cell with the best median.\n"
    )
    row = "{:<19}" + "{:>15}" * 3 + "{:>21}"
    print(row.format("", "trained, %", "diverged, %", "best test %", "best train loss"))
    trained = {}
    for method, (loss, accuracy) in ends.items():
        trained[method] = accuracy >= TRAINED[name]
        cells = loss.reshape(-1, loss.shape[-1]), accuracy.reshape(-1, loss.shape[-1])
        best_loss = cells[0][np.median(cells[0], axis=-1).argmin()]
        best_accuracy = cells[1][np.median(cells[1], axis=-1).argmax()]
        shares = [cell(share(x), 1) for x in (trained[method], np.isinf(loss))]
        bests = cell(best_accuracy, 1), cell(best_loss, 6)
        print(row.format(method, *shares, *bests))
    print("\nlookahead minus      share of the grid  cells gained  cells lost")
    ours = trained["lookahead"]
    for method, theirs in trained.items():
        if method != "lookahead":
            difference = paired(share(ours), share(theirs), 1)
            gained = (ours & ~theirs).sum(axis=(0, 1))
            lost = (theirs & ~ours).sum(axis=(0, 1))
            cells = f"{cell(gained, 1):>14}{cell(lost, 1):>12}"
            print(f"{method:<19}{difference:>19}{cells}")
    row = "{:<19}" + "{:>12}" * len(MOMENTA)
    print("\nRates that train, by momentum:")
    print(row.format("", *(f"{momentum:g}" for momentum in MOMENTA)))
    for method, cells in trained.items():
        print(row.format(method, *(cell(x, 1) for x in cells.sum(axis=0))))
    gains = zip(*(trained[x].sum(axis=0) for x in ("lookahead", "SGD")), strict=True)
    print(row.format("lookahead minus SGD", *(paired(*x, 1) for x in gains)))


# Figure 9 and table 5: k and alpha.

KS = np.array([1, 2, 5, 10, 20, 50])
ALPHAS = np.arange(1, 11) / 10


def k_alpha(args: argparse.Namespace, data) -> pictures.Figure:
    cells = grid(k=KS, alpha=ALPHAS)
    methods = {
        # Repeated for each cell, so that both programs have the same shapes: with
        # others they would round differently, and training amplifies that.
        "SGD": Method(sgd, {"rate": np.full_like(cells["alpha"], LARGE)}),
        "lookahead": Method(
            lambda k, alpha: lookahead(sgd(LARGE), k, alpha), cells, slow_weights
        ),
    }
    results = {}
    for name, measured in train_all(
        methods, data, range(args.seeds), args.steps
    ).items():
        alone, ends = final(measured["SGD"]), final(measured["lookahead"])
        difference = np.abs(ends.loss[:, -1] / alone.loss[:, -1] - 1).max()
        print(
            f"\n{name}, SGD with momentum 0.9 and learning rate {LARGE:g}. Where alpha "
            "is 1, the training\nloss is that of SGD alone to "
            f"{difference:.0e}; between values of k it differs by rounding,\n"
            "which training amplifies."
        )
        quantities = {
            "log10 of the training loss": (np.log10(ends.loss), np.log10(alone.loss)),
            "test accuracy, %": (ends.accuracy, alone.accuracy),
        }
        for sign, (quantity, pair) in zip((-1, 1), quantities.items(), strict=True):
            print_k_alpha(quantity, *pair, sign)
        results[name] = {quantity: pair[0] for quantity, pair in quantities.items()}
    return pictures.draw_k_alpha(results, KS, ALPHAS)


def print_k_alpha(quantity: str, values, alone, sign: int) -> None:
    """Prints a grid `[ks, alphas, seeds]`; larger is better if `sign` is 1."""
    digits = 1 if sign > 0 else 2
    print(f"\n{quantity}, by k and alpha; SGD alone: {cell(np.ravel(alone), digits)}")
    row = "{:>2}" + "{:>13}" * len(ALPHAS)
    print(row.format("k", *(f"{alpha:g}" for alpha in ALPHAS)))
    for k, line in zip(KS, values, strict=True):
        print(row.format(k, *(cell(x, digits) for x in line)))
    differences = sign * (values - alone)
    advantage, error = differences.mean(axis=-1), standard_error(differences)
    for label, where in (
        ("All with alpha < 1", np.ix_(KS > 0, ALPHAS < 1)),
        (
            "k = 5 and 10, alpha = 0.5 and 0.8",
            np.ix_(np.isin(KS, [5, 10]), np.isin(ALPHAS, [0.5, 0.8])),
        ),
    ):
        means, std = values[where].mean(axis=-1), values[where].std(axis=-1).mean()
        better = (advantage > 2 * error)[where].sum()
        worse = (advantage < -2 * error)[where].sum()
        low, high = (f"{mean:.{digits}f}" for mean in (means.min(), means.max()))
        spread = f"{np.ptp(means) / std:.1f}\n    standard deviations between seeds"
        print(
            f"{label}: means from {low} to {high}, a range of {spread} "
            f"({std:.{digits}f} in the mean of the cells); by more than 2\n    "
            f"standard errors better than SGD in {better} of {means.size} cells, "
            f"worse in {worse}."
        )


# Figure 10: inside the cycles.

CYCLES = 12


def cycles(args: argparse.Namespace, data) -> pictures.Figure:
    rates = {"rate": np.array([SMALL, LARGE])}
    methods = {
        "SGD": Method(sgd, rates),
        "lookahead": Method(
            lambda rate: lookahead(sgd(rate), K, ALPHA), rates, fast_and_slow_weights
        ),
    }
    last = CYCLES * K + 1  # with the sync before the first of these cycles
    results = train_all(
        methods, data, range(args.seeds), args.steps, every=1, last=last
    )
    drawn = {}
    for name, measured in results.items():
        for i, rate in enumerate(rates["rate"]):
            parts = {key: Measured(*(x[i] for x in m)) for key, m in measured.items()}
            print_cycles(name, rate, parts["SGD"], parts["lookahead"])
            if rate == LARGE:
                drawn[name] = parts["lookahead"]
    updates = np.arange(args.steps - last + 1, args.steps + 1)
    return pictures.draw_cycles(drawn, updates, K, LARGE)


def print_cycles(name: str, rate: float, alone: Measured, ours: Measured) -> None:
    """Prints a table of the last cycles; shapes `[seeds, updates, weights]`."""
    starts, ends = slice(0, -1, K), slice(K - 1, None, K)
    rows = {
        "slow, at the sync": [x[:, starts, 1] for x in ours],
        "fast, before the next": [x[:, ends, 0] for x in ours],
        "SGD alone": [x[:, ends, 0] for x in alone],
    }
    print(
        f"\n{name}, learning rate {rate:g}, the last {CYCLES} cycles. std: standard "
        "deviation of\n1000 x the training loss in a run, about its linear trend, and "
        "between runs at one update.\n"
    )
    row = "{:<23}{:>14}{:>24}{:>14}{:>14}"
    head = "test %", "1000 x train loss", "std in a run", "std of runs"
    print(row.format("weights", *head))
    variances = {}
    for label, (loss, accuracy) in rows.items():
        losses = 1000 * loss
        times = np.arange(CYCLES) - (CYCLES - 1) / 2
        slopes = losses @ times / (times @ times)
        rest = losses - slopes[:, None] * times
        variances[label] = rest.var(axis=1).mean(), losses.var(axis=0).mean()
        print(
            row.format(
                label,
                cell(accuracy.mean(axis=1), 2),
                cell(1000 * loss.mean(axis=1), 3),
                *(f"{variance**0.5:.3f}" for variance in variances[label]),
            )
        )
    slow, fast, _ = rows.values()
    sag = paired(slow[1].mean(axis=1), fast[1].mean(axis=1), 3)
    rise = paired(1000 * fast[0].mean(axis=1), 1000 * slow[0].mean(axis=1), 3)
    print(f"In a cycle the fast weights lose {sag} points of test accuracy and")
    print(f"    {rise} of 1000 x training loss (mean ± standard error).")
    ours, *others = variances.values()
    for label, other in zip(list(variances)[1:], others, strict=True):
        in_a_run, of_runs = np.divide(ours, other)
        print(
            f"Variance of the slow weights' loss divided by that of {label}: "
            f"{in_a_run:.2f} in a run, {of_runs:.2f} between runs"
        )


# What a sync does to the inner optimizer's state.

INNERS = {
    "SGD": (sgd, SGD_RATES),
    "Adam": (adam, ADAM_RATES),
}
POLICIES = "keep", "reset", "interpolate"
DECAY = 0.98  # of the moving average of the weights, which is the control


def wrapped(inner, policy: str):
    return lambda rate: lookahead(inner(rate), K, ALPHA, inner_state=policy)


def averaged(inner):
    # With `mu_y=0` the inner optimizer trains as it does alone.
    return lambda rate: optax.chain(inner(rate), primal_averaging(DECAY, mu_y=0.0))


def inner_state(args: argparse.Namespace, data) -> pictures.Figure:
    methods = {}
    for name, (inner, rates) in INNERS.items():
        methods[name, "alone"] = Method(inner, {"rate": rates})
        methods[name, "EMA"] = Method(averaged(inner), {"rate": rates}, slow_weights)
        for policy in POLICIES:
            methods[name, policy] = Method(
                wrapped(inner, policy), {"rate": rates}, slow_weights
            )
    results = {}
    for name, measured in train_all(
        methods, data, range(args.seeds), args.steps
    ).items():
        results[name] = {method: final(m) for method, m in measured.items()}
        print_policies(name, results[name])
    return pictures.draw_policies(results, {key: x[1] for key, x in INNERS.items()})


def print_policies(name: str, ends) -> None:
    print(
        f"\n{name}. Trained: how many of {len(INNERS['SGD'][1])} rates reach "
        f"{TRAINED[name]:g} % test accuracy. Best: the rate\nwith the lowest mean "
        "loss. Better: runs with a lower loss than the inner optimizer alone at\nthe "
        "same rate and seed, for rates up to the best of the inner optimizer alone, "
        "and\nabove it.\n"
    )
    row = "{:<6}{:<13}{:>12}{:>11}{:>13}{:>19}{:>18}{:>13}{:>9}"
    head = "trained", "best rate", "test %", "1000 x train loss", "minus alone"
    print(row.format("inner", "state", *head, "better, %", "above, %"))
    for (inner, policy), (loss, accuracy) in ends.items():
        rates, alone = INNERS[inner][1], ends[inner, "alone"].loss
        best, best_alone = best_of(loss), best_of(alone)
        minus, lower = "-", ["-", "-"]
        if policy != "alone":
            minus = paired(1000 * loss[best], 1000 * alone[best_alone], 3)
            parts = np.split(loss < alone, [best_alone + 1])
            lower = [f"{100 * part.mean():.0f}" if part.size else "-" for part in parts]
        print(
            row.format(
                *(inner, policy),
                cell((accuracy >= TRAINED[name]).sum(axis=0), 1),
                f"{rates[best]:.3g}",
                cell(accuracy[best], 1),
                cell(1000 * loss[best], 3),
                *(minus, *lower),
            )
        )
        if best in (0, len(rates) - 1):
            print("    The best rate is at an edge of the grid.")


EXPERIMENTS = {
    "learning-rates": learning_rates,
    "k-alpha": k_alpha,
    "cycles": cycles,
    "inner-state": inner_state,
    "curves": curves,
}


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    names = ", ".join(EXPERIMENTS)
    parser.add_argument("experiment", nargs="?", help=names)
    parser.add_argument(
        "--data", nargs="+", choices=LOADERS, default=list(LOADERS), help="data sets"
    )
    parser.add_argument(
        "--seeds", type=int, help="runs of each setting, 10 by default, 40 in cycles"
    )
    parser.add_argument("--steps", type=int, default=600, help="updates in a run")
    parser.add_argument(
        "--out", type=pathlib.Path, help="a PNG, robustness_EXPERIMENT.png by default"
    )
    args = parser.parse_args(argv)
    if args.experiment not in EXPERIMENTS:
        got = args.experiment or "none"
        parser.error(f"the experiment must be one of {names}, got {got}.")
    if args.seeds is None:
        args.seeds = 40 if args.experiment == "cycles" else 10
    parser.check_counts(args, "seeds")
    if args.steps < 1 or args.steps % 100:
        # So that the last update is a sync for every k that is tried.
        parser.error(f"--steps must be a positive multiple of 100, got {args.steps}.")
    default = f"robustness_{args.experiment.replace('-', '_')}.png"
    args.out = args.out or pathlib.Path(default)
    parser.check_picture(args.out)
    return args


def main() -> None:
    args = parse_args(sys.argv[1:])
    data = {name: LOADERS[name]() for name in args.data}
    figure = EXPERIMENTS[args.experiment](args, data)
    pictures.save(figure, args.out)
    print(
        f"\n{args.steps} updates of {BATCH} examples; mean ± standard deviation over "
        f"{args.seeds} seeds unless stated otherwise.\nPicture: {args.out}"
    )


if __name__ == "__main__":
    main()
