"""Question: does an alpha that is chosen at every sync do better than a fixed one?

Trains the CNN of `examples/digits.py` with Adam: alone, in `lookahead` with a fixed
alpha, and in `outer_loop` with `line_minimum`, which picks the alpha in [0.2, 1] at
which a quadratic model of the loss is least. The model's curvature is nu (what
`adam_curvature()` gives, the empirical Fisher diagonal), sqrt(nu) (`power=0.5`), or
sqrt(nu) / rate, the curvature for which Adam's step is a Newton step. Its gradient at
the end of a cycle is modelled from the last one, or computed there on a fresh batch.
As controls for a choice that mostly takes one of its bounds, alpha is also fixed at
the lower one, and one or the other by the toss of a coin.

Each form sees the same batches and starts. A row gives, over the seeds, the loss on the
training images and the test accuracy right after the last sync, and of all alphas
that were chosen the mean and how many were at a bound.

    python benchmarks/adaptive_alpha.py
    python benchmarks/adaptive_alpha.py --quick    # two rates, one seed, fewer updates
"""

import argparse
import pathlib
import sys
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from timing import Parser, environment, markdown, write_rows
from tqdm import tqdm

from optax_lookahead import adam_curvature, line_minimum, lookahead, outer_loop

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "examples"))
from digits import BATCH, CNN, accuracy, load_data, loss_fn

MIN_ALPHA, MAX_ALPHA = 0.2, 1.0


class Form(NamedTuple):
    """One way to train."""

    name: str
    alpha: Any = None  # fixed or scheduled
    powers: tuple[float, int] | None = None  # else, A = nu^powers[0] / rate^powers[1]
    gradient: str = "-"  # at the end of a cycle


CURVATURES = {"nu": (1.0, 0), "sqrt(nu)": (0.5, 0), "sqrt(nu) / rate": (0.5, 1)}


def coin(sync_count):
    key = jax.random.fold_in(jax.random.key(0), sync_count)
    return jnp.where(jax.random.bernoulli(key), MAX_ALPHA, MIN_ALPHA)


FORMS = [
    Form("alone"),
    Form("alpha = 0.2", 0.2),
    Form("alpha = 0.5", 0.5),
    Form("alpha = 0.8", 0.8),
    Form("alpha by coin", coin),
    *(
        Form(f"A = {name}", None, powers, gradient)
        for name, powers in CURVATURES.items()
        for gradient in ("modelled", "computed")
    ),
]


def transformation(form: Form, rate, k: int) -> optax.GradientTransformationExtraArgs:
    inner = optax.with_extra_args_support(optax.adam(rate))
    if form.alpha is not None:
        return lookahead(inner, k, form.alpha)
    if form.powers is None:
        return inner
    power, per_rate = form.powers

    def curvature(state):
        moments = adam_curvature(power=power)(state)
        return jax.tree.map(lambda a: a / rate**per_rate, moments)

    return outer_loop(inner, line_minimum(curvature, MIN_ALPHA, MAX_ALPHA), k)


class Run(NamedTuple):
    loss: Any  # on the training images after the last sync
    test: Any  # accuracy on the test images then, in %
    alphas: Any  # of the syncs, [steps / k]; empty for a fixed one


def compile_step(form: Form, k: int):
    """Returns the compiled training step of a form, for any learning rate."""

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, rate, batch, fresh):
        tx = transformation(form, rate, k)
        extra_args = {}
        if form.gradient == "computed":
            extra_args["grad_fn"] = lambda theta: jax.grad(loss_fn)(theta, *fresh)
        grads = jax.grad(loss_fn)(params, *batch)
        updates, state = tx.update(grads, state, params, **extra_args)
        return optax.apply_updates(params, updates), state

    return step


def train(form: Form, step, data, rate: float, seed: int, args, bar) -> Run:
    # A loop, and not `scan`: inside one, XLA's CPU backend convolves slower.
    params = CNN().init(jax.random.key(seed), data.train_x[:1])
    state = transformation(form, rate, args.k).init(params)
    rng, alphas = np.random.default_rng(seed), []
    rows = rng.integers(len(data.train_x), size=(args.steps + 1, BATCH))
    batch = data.train_x[rows[0]], data.train_y[rows[0]]
    for i in range(1, args.steps + 1):
        fresh = data.train_x[rows[i]], data.train_y[rows[i]]
        params, state = step(params, state, rate, batch, fresh)
        batch = fresh
        if form.powers is not None and i % args.k == 0:
            alphas.append(float(state.outer_state.alpha))
        bar.update()
    return Run(
        float(loss_fn(params, data.train_x, data.train_y)),
        100 * float(accuracy(params, data.test_x, data.test_y)),
        np.array(alphas),
    )


def train_all(args: argparse.Namespace) -> dict[tuple[Form, float], Run]:
    """Returns the runs, stacked over the seeds, by form and learning rate."""
    data, runs = load_data(), {}
    total = len(FORMS) * len(args.rates) * args.seeds * args.steps
    with tqdm(total=total, unit="step", mininterval=0.5) as bar:
        for form in FORMS:
            step = compile_step(form, args.k)
            for rate in args.rates:
                bar.set_description(f"{form.name}, gradient {form.gradient}, {rate}")
                group = [
                    train(form, step, data, rate, seed, args, bar)
                    for seed in range(args.seeds)
                ]
                runs[form, rate] = Run(*map(np.stack, zip(*group, strict=True)))
    return runs


def print_table(runs, args: argparse.Namespace) -> None:
    rows = []
    for rate in args.rates:
        for form in FORMS:
            run = runs[form, rate]
            row = {
                "rate": f"{rate:g}",
                "form": form.name,
                "gradient": form.gradient,
                "train loss": f"{run.loss.mean():.4f} ± {run.loss.std():.4f}",
                "test %": f"{run.test.mean():.1f} ± {run.test.std():.1f}",
            } | dict.fromkeys(
                ("mean alpha", f"at {MIN_ALPHA:g}", f"at {MAX_ALPHA:g}"), ""
            )
            if run.alphas.size:
                row["mean alpha"] = f"{run.alphas.mean():.2f}"
                for bound in (MIN_ALPHA, MAX_ALPHA):
                    share = 100 * np.mean(np.isclose(run.alphas, bound))
                    row[f"at {bound:g}"] = f"{share:.0f} %"
            rows.append(row)
    print(
        f"{environment()}, Adam, k = {args.k}, {args.steps} updates of {BATCH} images, "
        f"{args.seeds} seeds\n\n{markdown(rows)}"
    )
    write_rows(args.json, rows)


def parse_args() -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_json()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--k", type=int, default=5, help="updates in a cycle")
    parser.add_argument("--steps", type=int, default=600, help="updates in a run")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each setting")
    parser.add_argument(
        "--rates", type=float, nargs="+", default=[0.003, 0.01, 0.03, 0.1]
    )
    args = parser.parse_args()
    if args.quick:
        args.steps, args.seeds, args.rates = 100, 1, [0.003, 0.03]
    if args.k < 1 or args.steps < args.k or args.steps % args.k:
        parser.error(
            f"--steps must be a multiple of --k, got {args.steps} and {args.k}."
        )
    if args.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {args.seeds}.")
    return args


def main() -> None:
    args = parse_args()
    print_table(train_all(args), args)


if __name__ == "__main__":
    main()
