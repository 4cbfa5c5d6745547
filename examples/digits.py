"""Train a Flax CNN on handwritten digits, with and without lookahead.

The same `TrainState` loop runs SGD with momentum and Adam, each alone and inside
`lookahead`, each at a comfortable and at a too large learning rate, over several
seeds, on the 1,797 real 8x8 images that come with scikit-learn. It prints a table and
draws the losses and, like figure 10 of the paper, the test accuracy of the fast and of
the slow weights after every update of the last cycles.

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
from command_line import BLUE, GREEN, ORANGE, Parser
from flax.training.train_state import TrainState
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

from optax_lookahead import lookahead, slow_params

BATCH = 32
CYCLES = 12  # at the end of training, evaluated at every update
INNERS = {
    "SGD": (lambda lr: optax.sgd(lr, momentum=0.9), {"fine": 0.1, "too large": 0.3}),
    "Adam": (optax.adam, {"fine": 0.01, "too large": 0.05}),
}


class Digits(NamedTuple):
    """Images, shape `[n, 8, 8, 1]` in [0, 1], and labels of both parts of the data."""

    train_x: np.ndarray
    train_y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray


class Run(NamedTuple):
    """What one run measured, of the fast and, in lookahead, of the slow weights."""

    losses: np.ndarray  # of the batch, before each update
    train_loss: np.ndarray  # mean of the last cycles, [1 or 2]
    accuracy: np.ndarray  # in % on the test part, after each last update, [n, 1 or 2]


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
    """A training step that knows nothing of lookahead."""
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
        if step > steps - CYCLES * k:
            trees = weights(state)
            test, whole = (data.test_x, data.test_y), (data.train_x, data.train_y)
            accuracies.append([accuracy(params, *test) for params in trees])
            if step % k == k - 1:
                train_losses.append([loss_fn(params, *whole) for params in trees])
        bar.update()
    return Run(
        np.array(losses), np.mean(train_losses, axis=0), 100 * np.array(accuracies)
    )


def train_all(args: argparse.Namespace) -> dict[tuple[str, str, str], list[Run]]:
    """Returns the runs over seeds by inner optimizer, learning rate and wrapper."""
    data, runs = load_data(), {}
    settings = [(name, rate) for name in INNERS for rate in INNERS[name][1]]
    with tqdm(total=2 * len(settings) * args.seeds * args.steps, unit="step") as bar:
        for name, rate in settings:
            make_inner, learning_rates = INNERS[name]
            inner = make_inner(learning_rates[rate])
            wrapped = lookahead(inner, args.k, args.alpha)
            for wrapper, tx, weights in (
                ("alone", inner, fast_weights),
                ("lookahead", wrapped, fast_and_slow_weights),
            ):
                bar.set_description(f"{name}, {rate}, {wrapper}")
                runs[name, rate, wrapper] = [
                    train(tx, data, seed, args.steps, args.k, bar, weights)
                    for seed in range(args.seeds)
                ]
    return runs


def print_table(runs, args: argparse.Namespace) -> None:
    def cell(values, digits: int) -> str:
        return f"{np.mean(values):.{digits}f} ± {np.std(values):.{digits}f}"

    print(
        f"\n{args.steps} updates of {BATCH} images, k = {args.k}, alpha = "
        f"{args.alpha:g}: mean ± standard deviation over {args.seeds} seeds.\n"
        f"Each seed counts with its mean over the last {CYCLES} cycles, one update "
        "before the sync,\nwhere the fast weights have gone furthest.\n"
    )
    row = "{:<6}{:<17}{:<10}{:>17}{:>17}{:>14}{:>14}"
    loss, test = "train loss", "test %"
    print(
        row.format(
            *("inner", "learning rate", "wrapper"),
            *(f"{loss}, fast", f"{loss}, slow", f"{test}, fast", f"{test}, slow"),
        )
    )
    for (name, rate, wrapper), group in runs.items():
        ends = last_updates(group[0], args) % args.k == args.k - 1
        losses = np.transpose([run.train_loss for run in group])
        accuracies = np.transpose([run.accuracy[ends].mean(axis=0) for run in group])
        none = [] if wrapper == "lookahead" else ["-"]
        learning_rate = f"{INNERS[name][1][rate]} ({rate})"
        print(
            row.format(
                *(name, learning_rate, wrapper),
                *([cell(values, 4) for values in losses] + none),
                *([cell(values, 1) for values in accuracies] + none),
            )
        )


def last_updates(run: Run, args: argparse.Namespace) -> np.ndarray:
    """Returns the numbers of the updates after which the run was evaluated."""
    return np.arange(args.steps - len(run.accuracy) + 1, args.steps + 1)


def draw(runs, args: argparse.Namespace) -> None:
    figure = Figure(figsize=(11, 8), layout="constrained")
    axes = figure.subplots(2, 2)
    for (losses, cycles), name in zip(axes, INNERS, strict=True):
        draw_losses(losses, name, runs, args)
        draw_cycles(cycles, name, runs[name, "too large", "lookahead"], args)
    figure.suptitle(
        f"Digits, CNN, k = {args.k}, alpha = {args.alpha:g}, mean of {args.seeds} seeds"
    )
    figure.savefig(args.out, dpi=110)


def draw_losses(axes, name: str, runs, args: argparse.Namespace) -> None:
    width = min(25, args.steps)
    for rate, style in (("fine", ":"), ("too large", "-")):
        for wrapper, colour in (("alone", ORANGE), ("lookahead", BLUE)):
            mean = np.mean([run.losses for run in runs[name, rate, wrapper]], 0)
            smooth = np.convolve(mean, np.ones(width) / width, mode="valid")
            label = f"{wrapper}, rate {INNERS[name][1][rate]} ({rate})"
            updates = np.arange(width, args.steps + 1)
            axes.plot(updates, smooth, style, color=colour, label=label)
    axes.set_yscale("log")
    axes.set_title(f"{name}: training loss, running mean of {width} batches")
    axes.set_xlabel("update")
    axes.set_ylabel("cross entropy")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)


def draw_cycles(axes, name: str, group: list[Run], args: argparse.Namespace) -> None:
    updates = last_updates(group[0], args)
    fast, slow = np.mean([run.accuracy for run in group], axis=0).T
    sync = updates % args.k == 0
    axes.plot(updates, slow, color=GREEN, drawstyle="steps-post", label="slow weights")
    axes.plot(updates[sync], slow[sync], "o", color=GREEN, label="sync")
    axes.plot(updates, fast, color=BLUE, label="fast weights")
    axes.set_title(f"{name} in lookahead, too large rate: inside the last cycles")
    axes.set_xlabel("update")
    axes.set_ylabel("test accuracy, %")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=3)


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600, help="updates in a run")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each setting")
    parser.add_argument("--k", type=int, default=5, help="updates in a cycle")
    parser.add_argument("--alpha", type=float, default=0.5, help="slow step size")
    parser.add_argument("--out", type=pathlib.Path, default="digits.png", help="a PNG")
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
