"""Question: does an alpha that is chosen at every sync do better than a fixed one?

Trains the CNN of `examples/digits.py` with Adam: alone, in `lookahead` with a fixed
alpha, and in `outer_loop` with `line_minimum`, which picks the alpha in [0.2, 1] at
which a quadratic model of the loss is least. The model's curvature is nu (what
`adam_curvature()` gives, the empirical Fisher diagonal), sqrt(nu) (`power=0.5`), or
sqrt(nu) / rate, the curvature for which Adam's step is a Newton step. Its gradient at
the end of a cycle is modelled from the last one, or computed there on a fresh batch.

Each form sees the same batches and starts. A row gives, over the seeds, the loss on the
training images and the test accuracy right after the last sync, and of all alphas
that were chosen the mean and how many were at a bound.

    python benchmarks/adaptive_alpha.py
    python benchmarks/adaptive_alpha.py --quick    # two rates, one seed, fewer updates
"""

import argparse
import pathlib
import platform
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from optax_lookahead import adam_curvature, line_minimum, lookahead, outer_loop

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "examples"))
from digits import BATCH, CNN, accuracy, load_data, loss_fn

MIN_ALPHA, MAX_ALPHA = 0.2, 1.0


class Form(NamedTuple):
    """One way to train; `make(rate, k)` returns the transformation."""

    name: str
    make: Any
    gradient: str = "-"


def newton_curvature(rate):
    def curvature(state):
        return jax.tree.map(lambda a: a / rate, adam_curvature(power=0.5)(state))

    return curvature


def adaptive(curvature):
    def make(rate, k):
        outer = line_minimum(curvature(rate), MIN_ALPHA, MAX_ALPHA)
        return outer_loop(optax.adam(rate), outer, k)

    return make


CURVATURES = {
    "nu": lambda rate: adam_curvature(),
    "sqrt(nu)": lambda rate: adam_curvature(power=0.5),
    "sqrt(nu) / rate": newton_curvature,
}
FORMS = [
    Form("alone", lambda rate, k: optax.adam(rate)),
    Form("alpha = 0.5", lambda rate, k: lookahead(optax.adam(rate), k, 0.5)),
    Form("alpha = 0.8", lambda rate, k: lookahead(optax.adam(rate), k, 0.8)),
    *(
        Form(f"A = {name}", adaptive(curvature), gradient)
        for name, curvature in CURVATURES.items()
        for gradient in ("modelled", "computed")
    ),
]


class Run(NamedTuple):
    loss: jax.Array  # on the training images after the last sync
    test: jax.Array  # accuracy on the test images then, in %
    alphas: jax.Array  # of the syncs, [steps / k]; empty for a fixed one


def trainer(form: Form, data, k: int):
    """Returns the compiled training of one form: parameters, rate, batches -> Run."""

    def train(params, rate, batches):
        tx = form.make(rate, k)

        def step(carry, rows):
            params, state = carry
            now, fresh = ((data.train_x[i], data.train_y[i]) for i in rows)
            grads = jax.grad(loss_fn)(params, *now)
            extra_args = {}
            if form.gradient == "computed":
                extra_args["grad_fn"] = lambda theta: jax.grad(loss_fn)(theta, *fresh)
            tx_update = optax.with_extra_args_support(tx).update
            updates, state = tx_update(grads, state, params, **extra_args)
            outer = getattr(state, "outer_state", None)
            carry = optax.apply_updates(params, updates), state
            return carry, getattr(outer, "alpha", None)

        rows = batches[:-1], batches[1:]
        (params, _), alphas = jax.lax.scan(step, (params, tx.init(params)), rows)
        return Run(
            loss_fn(params, data.train_x, data.train_y),
            100 * accuracy(params, data.test_x, data.test_y),
            jnp.zeros(0) if alphas is None else alphas[k - 1 :: k],
        )

    return jax.jit(train)


def train_all(args: argparse.Namespace) -> dict[tuple[str, str, float], Run]:
    """Returns the runs, stacked over the seeds, by form and learning rate."""
    data, runs = jax.tree.map(jnp.asarray, load_data()), {}
    with tqdm(total=len(FORMS) * len(args.rates) * args.seeds, unit="run") as bar:
        for form in FORMS:
            train = trainer(form, data, args.k)
            for rate in args.rates:
                bar.set_description(f"{form.name}, gradient {form.gradient}, {rate}")
                group = []
                for seed in range(args.seeds):
                    params = CNN().init(jax.random.key(seed), data.train_x[:1])
                    rng = np.random.default_rng(seed)
                    size = args.steps + 1, BATCH
                    batches = rng.integers(len(data.train_x), size=size)
                    group.append(jax.device_get(train(params, rate, batches)))
                    bar.update()
                runs[form.name, form.gradient, rate] = jax.tree.map(
                    lambda *x: np.stack(x), *group
                )
    return runs


def print_table(runs, args: argparse.Namespace) -> None:
    print(
        f"jax {jax.__version__}, optax {optax.__version__}, "
        f"{jax.devices()[0].device_kind} ({platform.machine()}), Adam, k = {args.k}, "
        f"{args.steps} updates of {BATCH} images, {args.seeds} seeds\n\n"
        "| rate | form | gradient | train loss | test % | mean alpha "
        f"| at {MIN_ALPHA:g} | at {MAX_ALPHA:g} |\n|---|---|---|---|---|---|---|---|"
    )
    for rate in args.rates:
        for form in FORMS:
            run = runs[form.name, form.gradient, rate]
            alphas = "| | | |"
            if run.alphas.size:
                low, high = (
                    100 * np.mean(np.isclose(run.alphas, x))
                    for x in (MIN_ALPHA, MAX_ALPHA)
                )
                alphas = f"| {run.alphas.mean():.2f} | {low:.0f} % | {high:.0f} % |"
            print(
                f"| {rate:g} | {form.name} | {form.gradient} "
                f"| {run.loss.mean():.4f} ± {run.loss.std():.4f} "
                f"| {run.test.mean():.1f} ± {run.test.std():.1f} {alphas}"
            )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--k", type=int, default=5, help="updates in a cycle")
    parser.add_argument("--steps", type=int, default=400, help="updates in a run")
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
