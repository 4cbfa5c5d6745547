"""Train a Flax CNN on handwritten digits, with and without lookahead.

The same `TrainState` loop runs SGD with momentum and Adam, each alone and inside
`lookahead`, each at a suitable learning rate and at one that is too large, over several
seeds, on the 1,797 real 8x8 images that come with scikit-learn. The control for the
rate that is too large is the optimizer alone at alpha times that rate, since
lookahead's steps are shorter by about alpha. It prints a table of all runs and draws
the losses of SGD.

    python examples/digits.py
    python examples/digits.py --steps 300 --seeds 2 --k 10 --alpha 0.8 --out here.png
"""

import argparse
import pathlib
import sys
from typing import NamedTuple

import flax.linen as nn
import jax
import numpy as np
import optax
from command_line import BLUE, ORANGE, PURPLE, Parser
from flax.training.train_state import TrainState
from matplotlib import rc_context
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

from optax_lookahead import lookahead, slow_params

BATCH = 32
CYCLES = 12  # at the end of training, evaluated one update before the sync
INNERS = {
    "SGD": (lambda lr: optax.sgd(lr, momentum=0.9), {"fine": 0.1, "too large": 0.3}),
    "Adam": (optax.adam, {"fine": 0.01, "too large": 0.05}),
}


class Digits(NamedTuple):
    """Training and test images, shape `[n, 8, 8, 1]` in [0, 1], and their labels."""

    train_x: np.ndarray
    train_y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray


class Run(NamedTuple):
    """Results of one run, for the fast and, in lookahead, also the slow weights."""

    losses: np.ndarray  # of the batch, before each update
    train_loss: np.ndarray  # mean of the last cycles, [1 or 2]
    accuracy: np.ndarray  # in % on the test part, mean of the last cycles, [1 or 2]


def load_data() -> Digits:
    x, y = load_digits(return_X_y=True)
    x = (x / 16).reshape(-1, 8, 8, 1).astype(np.float32)
    train_x, test_x, train_y, test_y = train_test_split(
        x, y, test_size=360, random_state=0, stratify=y
    )
    return Digits(train_x, train_y, test_x, test_y)


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(16, (3, 3))(x))
        x = nn.relu(nn.Conv(32, (3, 3), strides=2)(x))
        return nn.Dense(10)(x.reshape(len(x), -1))


@jax.jit
def loss_fn(params, x, y):
    logits = CNN().apply(params, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


@jax.jit
def accuracy(params, x, y):
    return (CNN().apply(params, x).argmax(-1) == y).mean()


@jax.jit
def train_step(state, x, y):
    """A training step for any optimizer."""
    loss, grads = jax.value_and_grad(loss_fn)(state.params, x, y)
    return state.apply_gradients(grads=grads), loss


def fast_weights(state):
    return [state.params]


def fast_and_slow_weights(state):
    return [state.params, slow_params(state.opt_state, state.params)]


def train(tx, data: Digits, seed: int, steps: int, k: int, bar, weights) -> Run:
    """Trains once; `weights(state)` returns the weights to evaluate."""
    params = CNN().init(jax.random.key(seed), data.train_x[:1])
    state = TrainState.create(apply_fn=CNN().apply, params=params, tx=tx)
    rng = np.random.default_rng(seed)
    losses, train_losses, accuracies = [], [], []
    for step in range(1, steps + 1):
        batch = rng.integers(len(data.train_x), size=BATCH)
        state, loss = train_step(state, data.train_x[batch], data.train_y[batch])
        losses.append(loss)
        if step > steps - CYCLES * k and step % k == k - 1:
            trees = weights(state)
            test, whole = (data.test_x, data.test_y), (data.train_x, data.train_y)
            accuracies.append([accuracy(params, *test) for params in trees])
            train_losses.append([loss_fn(params, *whole) for params in trees])
        if step == 1:
            bar.unpause()  # leaves the time to compile out of the estimate
        bar.update()
    return Run(
        np.array(losses),
        np.mean(train_losses, axis=0),
        100 * np.mean(accuracies, axis=0),
    )


def train_all(args: argparse.Namespace) -> dict[tuple[str, str, str], list[Run]]:
    """Returns the runs over seeds by inner optimizer, learning rate and wrapper."""
    data, runs = load_data(), {}
    settings = [
        (name, rate, wrapper)
        for name in INNERS
        for rate, wrapper in (
            ("fine", "alone"),
            ("fine", "lookahead"),
            ("too large", "alone"),
            ("times alpha", "alone"),
            ("too large", "lookahead"),
        )
    ]
    total = len(settings) * args.seeds * args.steps
    with tqdm(total=total, unit="step", smoothing=0) as bar:
        for name, rate, wrapper in settings:
            bar.set_description(f"{name}, {rate}, {wrapper}")
            inner = INNERS[name][0](learning_rate(name, rate, args))
            tx, weights = inner, fast_weights
            if wrapper == "lookahead":
                tx = lookahead(inner, args.k, args.alpha)
                weights = fast_and_slow_weights
            runs[name, rate, wrapper] = [
                train(tx, data, seed, args.steps, args.k, bar, weights)
                for seed in range(args.seeds)
            ]
    return runs


def learning_rate(name: str, rate: str, args: argparse.Namespace) -> float:
    rates = INNERS[name][1]
    return args.alpha * rates["too large"] if rate == "times alpha" else rates[rate]


def print_table(runs, args: argparse.Namespace) -> None:
    def cell(values, digits: int) -> str:
        return f"{np.mean(values):.{digits}f} ± {np.std(values):.{digits}f}"

    print(
        f"\n{args.steps} updates of {BATCH} images, k = {args.k}, alpha = "
        f"{args.alpha:g}: mean ± standard deviation over {args.seeds} seeds.\n"
        f"Each seed contributes its mean over the last {CYCLES} cycles, one update "
        "before the sync,\nwhere fast and slow weights differ most.\n"
    )
    row = "{:<6}{:<20}{:<10}{:>17}{:>17}{:>14}{:>14}"
    loss, test = "train loss", "test %"
    print(
        row.format(
            *("inner", "learning rate", "wrapper"),
            *(f"{loss}, fast", f"{loss}, slow", f"{test}, fast", f"{test}, slow"),
        )
    )
    for (name, rate, wrapper), group in runs.items():
        losses = np.transpose([run.train_loss for run in group])
        accuracies = np.transpose([run.accuracy for run in group])
        none = [] if wrapper == "lookahead" else ["-"]
        described = f"{learning_rate(name, rate, args):g} ({rate})"
        print(
            row.format(
                *(name, described, wrapper),
                *([cell(values, 4) for values in losses] + none),
                *([cell(values, 1) for values in accuracies] + none),
            )
        )


def draw(runs, args: argparse.Namespace) -> None:
    # Few words in a large font, so that it is legible on a phone.
    with rc_context({"font.size": 15, "lines.linewidth": 2.5}):
        figure = Figure(figsize=(6.4, 5.4), layout="constrained")
        axes = figure.subplots()
        width = min(25, args.steps)
        for rate, wrapper, style, colour in (
            ("too large", "alone", "-", ORANGE),
            ("times alpha", "alone", "--", PURPLE),
            ("fine", "alone", ":", "black"),
            ("too large", "lookahead", "-", BLUE),
        ):
            mean = np.mean([run.losses for run in runs["SGD", rate, wrapper]], 0)
            smooth = np.convolve(mean, np.ones(width) / width, mode="valid")
            label = f"{wrapper}, rate {learning_rate('SGD', rate, args):g}"
            updates = np.arange(width, args.steps + 1)
            axes.plot(updates, smooth, style, color=colour, label=label)
        axes.set_yscale("log")
        axes.set_title(f"SGD with momentum, digits, {args.seeds} seeds")
        axes.set_xlabel("update")
        axes.set_ylabel(f"training loss, mean of {width}")
        axes.legend(loc="lower left", fontsize=13)
        figure.savefig(args.out, dpi=130)


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600, help="updates in a run")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each setting")
    parser.add_argument("--k", type=int, default=5, help="updates in a cycle")
    parser.add_argument("--alpha", type=float, default=0.5, help="slow step size")
    parser.add_argument("--out", type=pathlib.Path, default="digits.png", help="PNG")
    args = parser.parse_args(argv)
    parser.check_counts(args, "seeds")
    try:
        lookahead(optax.identity(), args.k, args.alpha)
    except ValueError as error:
        parser.error(str(error))
    if args.steps < args.k:
        parser.error(f"--steps must be at least k = {args.k}, got {args.steps}.")
    parser.check_picture(args.out)
    return args


def main() -> None:
    args = parse_args(sys.argv[1:])
    runs = train_all(args)
    print_table(runs, args)
    draw(runs, args)
    print(f"\nPicture: {args.out}")


if __name__ == "__main__":
    main()
