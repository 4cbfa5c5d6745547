"""Train the language model with AdamW, an EMA, lookahead, and Nesterov outer steps.

The model and the text are those of `nnx_language_model.py`, which must be in the same
folder. Each method has the same number of runs: two settings, and for both the same
learning rates of AdamW and the same seeds. A seed has the same initial weights and the
same batches in all of them.

    AdamW      b2 = 0.999, Optax's default, or 0.95, usual for language models
    EMA        AdamW's default, evaluated at a moving average of its weights with decay
               0.9 or 0.98 per step: the control, which also stores one more copy
    lookahead  k = 5, alpha = 0.5 or 0.8, around AdamW's default: the Lookahead paper
    Nesterov   `outer_loop` around AdamW's default with `optax.sgd(eta, momentum=mu,
               nesterov=True)`: SNOO in modded-nanogpt (k = 28, eta = 0.68, mu = 0.37)
               and one-worker DiLoCo as in MuLoCo (k = 30, eta = 0.7, mu = 0.8)

AdamW's rate is warmed up and then decays to zero along a cosine, or with `--constant`
does not decay. The script prints the held-out losses, of the slow or averaged weights
if there are any, and draws them.

At this scale an EMA of the weights at a constant rate is the best of all. With cosine
decay it has no effect and lookahead helps a little (0.046 nats per byte). The Nesterov
outer steps, whose settings come from far larger models and longer runs, are then as
good as AdamW alone, or worse.

    python examples/outer_optimizers.py
    python examples/outer_optimizers.py --constant
    python examples/outer_optimizers.py --steps 2520 --batch 16 --rates 0.003 0.01
"""

import argparse
import functools
import itertools
import math
import pathlib
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import numpy as np
import optax
from command_line import BLUE, GREEN, ORANGE, PURPLE, Parser, describe
from flax import nnx
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from nnx_language_model import (
    LanguageModel,
    Text,
    check_sizes_and_rates,
    evaluate,
    held_out_windows,
    load_text,
    train_step,
    warm_up_updates,
    windows,
    with_ema,
    with_slow_weights,
)
from tqdm import tqdm

from optax_lookahead import lookahead, outer_loop

EVERY = 120  # updates, between evaluations
THREADS = 2  # runs at a time, since a run uses little more than one core


class Method(NamedTuple):
    make: Callable[..., optax.GradientTransformation]  # from AdamW and a setting
    weights: Callable  # (model, optimizer) -> the model to evaluate
    settings: list[dict[str, float]]
    colour: str
    marker: str


def nesterov(adamw, k, eta, mu):
    return outer_loop(adamw(), optax.sgd(eta, momentum=mu, nesterov=True), k)


METHODS = {
    "AdamW": Method(
        lambda adamw, b2: adamw(b2=b2),
        lambda model, optimizer: model,  # noqa: ARG005
        [{"b2": 0.999}, {"b2": 0.95}],
        ORANGE,
        "s",
    ),
    "EMA": Method(
        lambda adamw, decay: with_ema(adamw(), decay),
        with_slow_weights,
        [{"decay": 0.9}, {"decay": 0.98}],
        PURPLE,
        "D",
    ),
    "lookahead": Method(
        lambda adamw, k, alpha: lookahead(adamw(), k, alpha),
        with_slow_weights,
        [{"k": 5, "alpha": 0.5}, {"k": 5, "alpha": 0.8}],
        GREEN,
        "o",
    ),
    "Nesterov": Method(
        nesterov,
        with_slow_weights,
        [{"k": 28, "eta": 0.68, "mu": 0.37}, {"k": 30, "eta": 0.7, "mu": 0.8}],
        BLUE,
        "^",
    ),
}


def make_run(method: Method, graphdef: nnx.GraphDef, args: argparse.Namespace):
    """Returns a function that trains once with the method.

    Setting, rate and seed are arrays, so that the method is compiled only once.
    """
    warm_up = warm_up_updates(args)
    shape = (
        optax.warmup_constant_schedule(0.0, 1.0, warm_up)
        if args.constant
        else optax.warmup_cosine_decay_schedule(0.0, 1.0, warm_up, args.steps)
    )

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def train(model_and_optimizer, tokens):
        train_step(*model_and_optimizer, tokens)
        return model_and_optimizer

    def run(setting, rate, weights, batches, held_out):
        adamw = functools.partial(optax.adamw, lambda count: rate * shape(count))
        model, tx = nnx.merge(graphdef, weights), method.make(adamw, **setting)
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
        def train_and_evaluate(model_and_optimizer, batches):
            model_and_optimizer = train(model_and_optimizer, batches)
            trained = method.weights(*model_and_optimizer)
            return model_and_optimizer, evaluate(trained, held_out)

        return train_and_evaluate((model, optimizer), batches)[1]

    return jax.jit(run)


def make_batches(text: Text, seed: int, args: argparse.Namespace) -> np.ndarray:
    rng = np.random.default_rng(seed)
    starts = rng.integers(len(text.train) - args.context, size=args.steps * args.batch)
    batches = windows(text.train, starts, args.context)
    return batches.reshape(-1, EVERY, args.batch, args.context + 1)


def train_all(args: argparse.Namespace) -> dict[str, np.ndarray]:
    """Returns held-out losses by method, shape `[settings, rates, seeds, n]`."""
    text = load_text()
    held_out = held_out_windows(text, args.context)
    models = [
        nnx.split(LanguageModel(args.width, args.depth, args.context, nnx.Rngs(seed)))
        for seed in range(args.seeds)
    ]
    seeds = [
        (weights, make_batches(text, seed, args))
        for seed, (_, weights) in enumerate(models)
    ]
    jobs = {
        name: [
            (setting, rate, *seed, held_out)
            for setting, rate, seed in itertools.product(
                method.settings, args.rates, seeds
            )
        ]
        for name, method in METHODS.items()
    }
    # Before the threads start, since otherwise each of them would compile.
    programs = {
        name: make_run(method, models[0][0], args).lower(*jobs[name][0]).compile()
        for name, method in tqdm(METHODS.items(), "compiling", leave=False)
    }
    losses = {}
    total = sum(map(len, jobs.values())) * args.steps
    with (
        tqdm(total=total, unit="step", smoothing=0) as bar,
        ThreadPoolExecutor(THREADS) as pool,
    ):
        for name, method in METHODS.items():
            bar.set_description(name)
            results = []
            one = functools.partial(
                lambda run, job: np.asarray(run(*job)), programs[name]
            )
            for result in pool.map(one, jobs[name]):
                results.append(result)
                bar.update(args.steps)
            shape = (len(method.settings), len(args.rates), args.seeds, -1)
            losses[name] = np.reshape(results, shape)
    return losses


def best_of(losses: np.ndarray) -> tuple[int, int]:
    """Returns the indices of the setting and the rate with the lowest mean loss."""
    # A run that diverged counts as the worst.
    means = np.nan_to_num(losses[..., -1].mean(axis=-1), nan=math.inf)
    setting, rate = np.unravel_index(means.argmin(), means.shape)
    return int(setting), int(rate)


def schedule(args: argparse.Namespace) -> str:
    return "a constant rate" if args.constant else "cosine decay to zero"


def print_table(losses: dict[str, np.ndarray], args: argparse.Namespace) -> None:
    print(
        f"\n{args.steps} updates of {args.batch} x {args.context} bytes, warm-up of "
        f"{warm_up_updates(args)}, then {schedule(args)}.\nHeld-out loss in nats "
        "per byte after the last update, by AdamW's learning rate:\nmean ± standard "
        f"deviation over {args.seeds} seeds; * marks the best of a method.\n"
    )
    head = "{:<11}{:<31}" + "{:>15}  " * len(args.rates)
    print(head.format("method", "setting", *(f"{r:g}" for r in args.rates)).rstrip())
    for name, method in METHODS.items():
        best = best_of(losses[name])
        for i, setting in enumerate(method.settings):
            row = f"{name:<11}{describe(setting):<31}"
            for j, final in enumerate(losses[name][i, :, :, -1]):
                mark = "*" if best == (i, j) else " "
                row += f"  {final.mean():.3f} ± {final.std():.3f}{mark:>2}"
            print(row.rstrip())
    for other in ("AdamW", "EMA"):
        print(f"\nEach at its best, minus {other} at its best, seed by seed:")
        baseline = losses[other][best_of(losses[other])][:, -1]
        for name in METHODS:
            if name != other:
                # Paired: a seed has the same initial weights and batches.
                pairs = losses[name][best_of(losses[name])][:, -1] - baseline
                each = ", ".join(f"{pair:+.3f}" for pair in pairs)
                print(f"{name:<11}{pairs.mean():+.3f} ± {pairs.std():.3f}  ({each})")
    for name in METHODS:
        if best_of(losses[name])[1] in (0, len(args.rates) - 1):
            print(f"The best rate of {name} is at an edge of the grid: try --rates.")


def draw(losses: dict[str, np.ndarray], args: argparse.Namespace) -> None:
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    curves, rates = figure.subplots(1, 2)
    draw_curves(curves, losses, args)
    draw_rates(rates, losses, args)
    figure.suptitle(
        "Byte-level transformer on Python's help, "
        f"{args.steps} updates, {schedule(args)}, {args.seeds} seeds (mean ± std)"
    )
    figure.savefig(args.out, dpi=110)


def draw_curves(axes, losses, args: argparse.Namespace) -> None:
    updates = np.arange(EVERY, args.steps + 1, EVERY)
    for (name, method), line in zip(
        METHODS.items(), ("-", "-.", "--", ":"), strict=True
    ):
        setting, rate = best_of(losses[name])
        group = losses[name][setting, rate]
        mean, std = group.mean(axis=0), group.std(axis=0)
        described = describe(method.settings[setting])
        label = f"{name}, {described}, rate {args.rates[rate]:g}"
        style = {"color": method.colour, "marker": method.marker, "linestyle": line}
        axes.plot(updates, mean, label=label, **style)
        axes.fill_between(
            updates, mean - std, mean + std, color=method.colour, alpha=0.2, linewidth=0
        )
    axes.set_title("Each at its best, slow or averaged weights")
    axes.set_xlabel("update")
    axes.set_ylabel("held-out loss, nats per byte")
    axes.legend()


def draw_rates(axes, losses, args: argparse.Namespace) -> None:
    for name, method in METHODS.items():
        for setting, final, line, fill in zip(
            method.settings,
            losses[name][..., -1],
            ("-", "--"),
            (method.colour, "white"),
            strict=True,
        ):
            axes.errorbar(
                args.rates,
                final.mean(axis=-1),
                final.std(axis=-1),
                color=method.colour,
                linestyle=line,
                marker=method.marker,
                markerfacecolor=fill,
                label=f"{name}, {describe(setting)}",
                capsize=4,
            )
    axes.set_xscale("log")
    axes.set_xticks(args.rates, [f"{rate:g}" for rate in args.rates])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_title(f"All of them, after the last of {args.steps} updates")
    axes.set_xlabel("learning rate of AdamW")
    axes.set_ylabel("held-out loss, nats per byte")
    axes.legend()


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    # The default ends on a sync in every setting.
    parser.add_argument("--steps", type=int, default=840, help="updates in a run")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each setting")
    parser.add_argument(
        "--rates",
        type=float,
        nargs="+",
        default=[0.002, 0.005, 0.012, 0.03],
        help="learning rates of AdamW to try, in all methods",
    )
    parser.add_argument(
        "--constant", action="store_true", help="no decay after the warm-up"
    )
    parser.add_argument("--width", type=int, default=64, help="of the transformer")
    parser.add_argument("--depth", type=int, default=2, help="transformer blocks")
    parser.add_argument("--context", type=int, default=32, help="bytes in a window")
    parser.add_argument("--batch", type=int, default=8, help="windows in an update")
    parser.add_argument(
        "--out", type=pathlib.Path, default="outer_optimizers.png", help="a PNG"
    )
    args = parser.parse_args(argv)
    check_sizes_and_rates(parser, args)
    if args.steps < 1 or args.steps % EVERY:
        parser.error(
            f"--steps must be a positive multiple of {EVERY}, got {args.steps}."
        )
    return args


def main() -> None:
    args = parse_args(sys.argv[1:])
    losses = train_all(args)
    print_table(losses, args)
    draw(losses, args)
    print(f"\nPicture: {args.out}")


if __name__ == "__main__":
    main()
