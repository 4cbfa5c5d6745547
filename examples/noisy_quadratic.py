"""Check the library against exact theory on quadratics, and draw figures 3 and 4.

The gradient is `a (theta - c)` with random c, so the mean and the variance of the
weights are known exactly at every step (`quadratic_theory.py`). The script has three
parts, whose files must be in the same folder:

  1. `quadratic_runs.py`: every method runs thousands of times at each setting of a
     grid, and its mean and variance are compared with the theory. If one differs by
     more than five standard errors, the exit status is 1.
  2. `equal_risk.py`, figure 3 of the Lookahead paper: expected loss after 1,000 steps
     of SGD and of Lookahead (k = 5), at learning rates that end in the same
     steady-state risk. The lines are the theory, the markers runs of the optimizer.
  3. `momentum_rates.py`, figure 4: how fast SGD with momentum contracts, alone and
     inside Lookahead (k = 20, alpha = 0.5), on quadratics of every condition number,
     each at its best learning rate. The markers are measured in the state of the
     running optimizer. The gain depends on the curvatures between the smallest and the
     largest: one line has only those two.

    python examples/noisy_quadratic.py
    python examples/noisy_quadratic.py --chains 2000 --points 3 --out here.png
"""

import argparse
import pathlib
import sys

import equal_risk
import jax
import momentum_rates
import quadratic_runs
from command_line import Parser
from matplotlib.figure import Figure
from tqdm import tqdm


def draw(
    spectra: dict[str, equal_risk.Points], rates, args: argparse.Namespace
) -> None:
    figure = Figure(figsize=(12, 9.5), layout="constrained")
    top, bottom = figure.subfigures(2, 1)
    axes = top.subplots(1, 2)
    for ax, name in zip(axes, spectra, strict=True):
        colours = equal_risk.draw_points(
            ax, name, equal_risk.SPECTRA[name], spectra[name]
        )
    top.colorbar(colours, ax=axes, label="alpha of Lookahead, k = 5")
    top.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4
    )
    top.suptitle("Noisy quadratics: lines are theory, markers runs (bars: 5 SE)")
    axes = bottom.subplots(1, len(momentum_rates.BETAS), sharey=True)
    for ax, beta in zip(axes, momentum_rates.BETAS, strict=True):
        momentum_rates.draw_rates(ax, beta, rates, args)
    axes[0].set_ylabel("1 - contraction per step\n(higher is faster)")
    bottom.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4
    )
    bottom.suptitle(
        "SGD with momentum beta on quadratics, best learning rate, "
        f"k = {momentum_rates.K}, alpha = {momentum_rates.ALPHA:g}"
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
    checks = quadratic_runs.check_methods(args)
    agree = quadratic_runs.print_checks(checks, args)
    size = 3 * args.points * sum(map(len, equal_risk.SPECTRA.values()))
    run = equal_risk.compile_run(args)
    with tqdm(total=size, unit="run", desc="figure 3", smoothing=0) as bar:
        spectra = {
            name: equal_risk.run_points(curvature, args, run, bar)
            for name, curvature in equal_risk.SPECTRA.items()
        }
    agree &= equal_risk.print_points(spectra)
    jax.config.update("jax_enable_x64", True)
    with tqdm(
        total=len(momentum_rates.BETAS) * len(momentum_rates.WRAPPERS),
        unit="run",
        desc="figure 4",
        smoothing=0,
    ) as bar:
        rates = momentum_rates.run_rates(args, bar)
    agree &= momentum_rates.print_rates(rates, args)
    draw(spectra, rates, args)
    print(f"\nPicture: {args.out}")
    if not agree:
        sys.exit("\nThe runs disagree with the theory.")


if __name__ == "__main__":
    main()
