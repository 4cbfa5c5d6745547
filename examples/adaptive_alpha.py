"""Does an alpha that is chosen at every sync do better than a fixed one?

`adaptive_alpha` is an outer optimizer for `outer_loop`. At each sync it takes the alpha
in [0.2, 1] that minimizes a quadratic model of the loss, with a diagonal curvature A,
on the line from the slow to the fast weights: Proposition 1 of the Lookahead paper.

The script trains the CNN of `digits.py`, from the same folder, with Adam: alone,
in `lookahead` with a fixed alpha, and with a chosen one. A is nu, Adam's average of the
squared gradients (the diagonal of the empirical Fisher matrix), or sqrt(nu), or
sqrt(nu) / rate, with which Adam's step is a Newton step. The gradient at the end of a
cycle is modelled from the last one, or computed there on a fresh batch. The chosen
alpha is mostly one of its bounds. So the controls are alpha fixed at the lower bound,
and one of the two bounds at random. All have the same batches and initial weights.

It prints, for each rate and variant, the loss on the training images and the test
accuracy after the last sync, the mean of the chosen alphas, and how many of them were
at a bound. On one CPU core that takes 1 min 15 s, with `--quick` half a minute:

    python examples/adaptive_alpha.py
    python examples/adaptive_alpha.py --quick    # two rates, one seed, fewer updates
"""

import argparse
import json
import pathlib
import sys
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from command_line import Parser
from digits import BATCH, CNN, accuracy, load_data, loss_fn
from tqdm import tqdm

from optax_lookahead import lookahead, outer_loop

MIN_ALPHA, MAX_ALPHA = 0.2, 1.0
RATES = [0.003, 0.01, 0.03, 0.1]  # of Adam


class AdaptiveAlphaState(NamedTuple):
    alpha: Any  # of the last sync; 1 before the first


def adaptive_alpha(curvature, min_alpha=MIN_ALPHA, max_alpha=MAX_ALPHA):
    """An outer optimizer that steps to the minimum of a quadratic model on the line.

        d       = theta - phi                     phi: slow, theta: fast weights
        alpha*  = 1 - g.d / (d.A d), clipped      g: gradient at theta
        phi    += alpha* d

    The sums are over all parameters, which must be real and finite. Where the model has
    no minimum, since d.A d <= 0, alpha is `max_alpha`.

    Args:
      curvature: A function from the inner optimizer's state to the diagonal of A, a
        tree like the parameters.
      min_alpha: Smallest step size.
      max_alpha: Largest step size.

    Returns:
      An optimizer for `outer_loop(inner, outer, k)`. By default g too is modelled, as
      grads + A * updates of the last inner step. With `outer_args={"grad_fn": grad_fn}`
      as an argument of `update`, g is computed: one more gradient at each sync.
    """

    def init(params):
        del params
        return AdaptiveAlphaState(jnp.ones([]))

    def update(
        pseudo_grads, state, params=None, *, inner_step, grad_fn=None, **extra_args
    ):
        del state, extra_args
        d = optax.tree.scale(-1, pseudo_grads)
        diagonal = curvature(inner_step.state)
        if grad_fn is None:
            moved = optax.tree.mul(diagonal, inner_step.updates)
            grads = optax.tree.add(inner_step.grads, moved)
        else:
            # Not on other steps, where the result would be dropped.
            theta = optax.tree.add(params, d)
            grads = jax.lax.cond(inner_step.sync, grad_fn, optax.tree.zeros_like, theta)
        slope = optax.tree.vdot(grads, d)
        curve = optax.tree.vdot(d, optax.tree.mul(diagonal, d))
        # No division by zero, for `jax_debug_nans` and derivatives.
        least = 1 - slope / jnp.where(curve > 0, curve, 1)
        least = jnp.clip(least, min_alpha, max_alpha)
        alpha = jnp.where(curve > 0, least, max_alpha)
        return optax.tree.scale(alpha, d), AdaptiveAlphaState(alpha)

    return optax.GradientTransformationExtraArgs(init, update)


# The comparison.


class Form(NamedTuple):
    """One method of training."""

    name: str
    alpha: Any = None  # fixed or scheduled
    curvature: Any = None  # else a function of Adam's nu and the rate
    gradient: str = "-"  # at the end of a cycle


def coin(sync_count):
    key = jax.random.fold_in(jax.random.key(0), sync_count)
    return jnp.where(jax.random.bernoulli(key), MAX_ALPHA, MIN_ALPHA)


CURVATURES = {
    "nu": lambda nu, _: nu,
    "sqrt(nu)": lambda nu, _: nu**0.5,
    "sqrt(nu) / rate": lambda nu, rate: nu**0.5 / rate,
}
FORMS = [
    Form("alone"),
    *(Form(f"alpha = {alpha}", alpha) for alpha in (0.2, 0.5, 0.8)),
    Form("alpha by coin", coin),
    *(
        Form(f"A = {name}", None, curvature, gradient)
        for name, curvature in CURVATURES.items()
        for gradient in ("modelled", "computed")
    ),
]


def transformation(form: Form, rate, k: int) -> optax.GradientTransformation:
    def curvature(state):
        adam, *_ = state
        nu = optax.tree.bias_correction(adam.nu, 0.999, adam.count)
        return jax.tree.map(lambda v: form.curvature(v, rate), nu)

    if form.curvature is not None:
        return outer_loop(optax.adam(rate), adaptive_alpha(curvature), k)
    if form.alpha is not None:
        return lookahead(optax.adam(rate), k, form.alpha)
    return optax.adam(rate)


@partial(jax.jit, static_argnames=("form", "k"), donate_argnames=("params", "state"))
def train_step(form, k, params, state, rate, batch, fresh):
    extra_args = {}
    if form.gradient == "computed":
        extra_args["outer_args"] = {"grad_fn": lambda p: jax.grad(loss_fn)(p, *fresh)}
    grads = jax.grad(loss_fn)(params, *batch)
    tx = transformation(form, rate, k)
    updates, state = tx.update(grads, state, params, **extra_args)
    return optax.apply_updates(params, updates), state


def train(form: Form, data, rate: float, seed: int, args, bar):
    """Returns the training loss, the test accuracy in %, and the chosen alphas."""
    # Not `scan`, in which XLA's CPU backend runs convolutions more slowly.
    params = CNN().init(jax.random.key(seed), data.train_x[:1])
    state = transformation(form, rate, args.k).init(params)
    rng, alphas = np.random.default_rng(seed), []
    rows = rng.integers(len(data.train_x), size=(args.steps + 1, BATCH))
    batches = [(data.train_x[row], data.train_y[row]) for row in rows]
    for i, (batch, fresh) in enumerate(pairwise(batches), start=1):
        params, state = train_step(form, args.k, params, state, rate, batch, fresh)
        if form.curvature is not None and i % args.k == 0:
            alphas.append(float(state.outer_state.alpha))
        if i == 1:
            bar.unpause()  # leaves the time to compile out of the estimate
        bar.update()
    loss = loss_fn(params, data.train_x, data.train_y)
    return loss, 100 * accuracy(params, data.test_x, data.test_y), alphas


def train_all(args: argparse.Namespace) -> list[dict[str, str]]:
    """Returns the rows of the table."""
    data, rows = load_data(), []
    settings = [(rate, form) for rate in args.rates for form in FORMS]
    total = len(settings) * args.seeds * args.steps
    with tqdm(total=total, unit="step", smoothing=0) as bar:
        for rate, form in settings:
            bar.set_description(f"{form.name}, gradient {form.gradient}, {rate:g}")
            runs = [
                train(form, data, rate, seed, args, bar) for seed in range(args.seeds)
            ]
            loss, test, alphas = map(np.array, zip(*runs, strict=True))
            row = {
                "rate": f"{rate:g}",
                "form": form.name,
                "gradient": form.gradient,
                "train loss": f"{loss.mean():.4f} ± {loss.std():.4f}",
                "test %": f"{test.mean():.1f} ± {test.std():.1f}",
                "mean alpha": f"{alphas.mean():.2f}" if alphas.size else "",
            }
            for bound in (MIN_ALPHA, MAX_ALPHA):
                at = np.isclose(alphas, bound)
                row[f"at {bound:g}"] = f"{100 * at.mean():.0f} %" if at.size else ""
            rows.append(row)
    return rows


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a smaller comparison")
    parser.add_argument("--k", type=int, default=5, help="updates in a cycle")
    parser.add_argument("--steps", type=int, default=600, help="updates in a run")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each setting")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="rows")
    args = parser.parse_args(argv)
    if args.quick:
        args.steps, args.seeds, args.rates = 20 * args.k, 1, [0.003, 0.03]
    parser.check_counts(args, "k", "steps", "seeds")
    if args.steps % args.k:
        parser.error(f"--steps must be a multiple of {args.k}, got {args.steps}.")
    if args.json and not args.json.parent.is_dir():
        parser.error(f"--json must be a file in an existing folder, got {args.json}.")
    return args


def main() -> None:
    args = parse_args(sys.argv[1:])
    rows = train_all(args)
    environment = f"jax {jax.__version__}, optax {optax.__version__}"
    print(
        f"\n{environment}, Adam, k = {args.k}, {args.steps} updates of {BATCH} images: "
        f"mean ± standard deviation over {args.seeds} seeds.\n"
    )
    for line in (rows[0], ["---"] * len(rows[0]), *(row.values() for row in rows)):
        print(f"| {' | '.join(line)} |")
    if args.json:
        text = {"environment": environment, "rows": rows}
        args.json.write_text(json.dumps(text, indent=1) + "\n")


if __name__ == "__main__":
    main()
