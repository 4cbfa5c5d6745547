"""Train a language model on four replicas that communicate in every k-th update only.

The model and the text are those of `nnx_language_model.py`, which must be in the same
folder. There are eight virtual CPU devices, four replicas of two; the two devices of a
replica share its batch and communicate in every update. The methods differ in when
replicas communicate with each other:

    data-parallel  AdamW, with the gradients averaged over the replicas in every update
    averaging      every k updates of AdamW the mean of the weights: Local SGD
    Nesterov       every k updates a step of `optax.sgd(0.7, momentum=0.9,
                   nesterov=True)` with the mean pseudo-gradient: DiLoCo

All have the same tokens, learning rates and seeds; a seed has the same initial weights
and batches in all of them. AdamW's rate is warmed up and then decays to zero along a
cosine. The script prints the held-out losses, of the slow weights if there are any, and
the bytes that a device sends through collectives across replicas, which are counted in
the compiled programs; and it draws the losses against updates and bytes.

    python examples/many_workers.py
    python examples/many_workers.py --inner muon    # then Nesterov is MuLoCo
"""

import argparse
import itertools
import pathlib
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from command_line import BLUE, GREEN, ORANGE, Parser
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from matplotlib.figure import Figure
from messages import Messages, messages
from nnx_language_model import (
    LanguageModel,
    check_sizes_and_rates,
    held_out_windows,
    load_text,
    loss_fn,
    warm_up_updates,
    windows,
)
from tqdm import tqdm

from optax_lookahead import average_replicas, outer_loop, replica_axes, slow_params

REPLICAS, DEVICES = 4, 2  # devices of each replica
EVERY = 40  # updates, between evaluations
INNERS = {"adamw": optax.adamw, "muon": optax.contrib.muon}


class Method(NamedTuple):
    k: int  # 0: data-parallel
    eta: float
    mu: float
    colour: str
    line: str

    def make(self, inner: optax.GradientTransformation, k: Any) -> Any:
        """Returns the optimizer of one replica."""
        if not self.k:
            return inner
        nesterov = optax.sgd(self.eta, momentum=self.mu, nesterov=True)
        return outer_loop(inner, optax.chain(average_replicas("replica"), nesterov), k)


METHODS = {
    "data-parallel": Method(0, 0.0, 0.0, ORANGE, "-"),
    "averaging, k = 5": Method(5, 1.0, 0.0, GREEN, "-"),
    "averaging, k = 20": Method(20, 1.0, 0.0, GREEN, "--"),
    "Nesterov, k = 5": Method(5, 0.7, 0.9, BLUE, "-"),
    "Nesterov, k = 20": Method(20, 0.7, 0.9, BLUE, "--"),
}


class Result(NamedTuple):
    losses: np.ndarray  # [rates, seeds, evaluations]
    sent: Messages

    def best_rate(self) -> int:
        # A run that diverged counts as the worst.
        return int(np.nan_to_num(self.losses[..., -1].mean(-1), nan=np.inf).argmin())

    def bytes_per_update(self, method: Method) -> float:
        return self.sent.always + self.sent.in_branch / max(method.k, 1)


def make_train_step(method: Method, tx: Any, graphdef: nnx.GraphDef, weights: Any):
    """Returns a step of all replicas, and the axes of its state."""

    def train_step(weights, state, tokens):
        grads = jax.grad(lambda w: loss_fn(nnx.merge(graphdef, w), tokens))(weights)
        if not method.k:
            grads = jax.lax.pmean(grads, "replica")
        updates, state = tx.update(grads, state, weights)
        return optax.apply_updates(weights, updates), state

    state = jax.eval_shape(tx.init, weights)
    # Without a lookahead each replica has its own values of all arrays.
    axes = replica_axes(state) if method.k else jax.tree.map(lambda _: 0, state)
    in_axes, out_axes = (0, axes, 0), (0, axes)
    names = {"axis_name": "replica", "spmd_axis_name": "replica"}
    return jax.vmap(train_step, in_axes, out_axes, **names), axes


def make_run(method: Method, graphdef: nnx.GraphDef, mesh, args: argparse.Namespace):
    """Returns functions for a run and for one update; k and rate are arrays."""
    steps = args.steps
    shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, warm_up_updates(args), steps)

    def start(weights, k, rate):
        inner = INNERS[args.inner](lambda count: rate * shape(count))
        tx = method.make(inner, k)
        train_step, axes = make_train_step(method, tx, graphdef, weights)

        def for_all(x, axis=0):
            return x if axis is None else jnp.broadcast_to(x, (REPLICAS, *x.shape))

        def place(x, axis=0):
            return on_mesh(x, P() if axis is None else P("replica"))

        def spread(weights, state):
            return jax.tree.map(place, weights), jax.tree.map(place, state, axes)

        state = jax.tree.map(for_all, tx.init(weights), axes)
        carry = spread(jax.tree.map(for_all, weights), state)
        return lambda *args: spread(*train_step(*args)), carry

    def on_mesh(x, spec):
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    def update(weights, tokens, k, rate):
        train_step, carry = start(weights, k, rate)
        return train_step(*carry, on_mesh(tokens, P("replica", "device")))

    def run(weights, batches, held_out, k, rate):
        train_step, carry = start(weights, k, rate)
        held_out = on_mesh(held_out, P(("replica", "device")))

        def body(carry, tokens):
            tokens = on_mesh(tokens, P("replica", "device"))
            return train_step(*carry, tokens), None

        def train_and_evaluate(carry, batches):
            weights, state = carry = jax.lax.scan(body, carry, batches)[0]
            if method.k:  # at a sync, after which all replicas have the same weights
                weights = slow_params(state, weights)
            one = jax.tree.map(lambda x: x[0], weights)
            return carry, loss_fn(nnx.merge(graphdef, one), held_out)

        return jax.lax.scan(train_and_evaluate, carry, batches)[1]

    return jax.jit(run), jax.jit(update)


def make_batches(text, seed: int, args: argparse.Namespace) -> np.ndarray:
    rng = np.random.default_rng(seed)
    shape = (args.steps // EVERY, EVERY, REPLICAS, args.batch)
    starts = rng.integers(len(text.train) - args.context, size=shape)
    return windows(text.train, starts.ravel(), args.context).reshape(*shape, -1)


def train_all(args: argparse.Namespace) -> dict[str, Result]:
    mesh = jax.make_mesh(
        (REPLICAS, DEVICES), ("replica", "device"), axis_types=(AxisType.Auto,) * 2
    )
    text = load_text()
    held_out = held_out_windows(text, args.context)
    models = [
        nnx.split(LanguageModel(args.width, args.depth, args.context, nnx.Rngs(seed)))
        for seed in range(args.seeds)
    ]
    batches = [make_batches(text, seed, args) for seed in range(args.seeds)]
    results, programs = {}, {}
    for name, method in tqdm(METHODS.items(), "compiling", leave=False):
        run, update = make_run(method, models[0][0], mesh, args)
        one = models[0][1], batches[0], held_out, method.k, args.rates[0]
        programs[name] = run.lower(*one).compile(), update
    runs = len(METHODS) * len(args.rates) * args.seeds
    with tqdm(total=runs * args.steps, unit="step", smoothing=0) as bar:
        for name, method in METHODS.items():
            bar.set_description(name)
            run, update = programs[name]
            losses = []
            for rate, seed in itertools.product(args.rates, range(args.seeds)):
                weights = models[seed][1]
                result = run(weights, batches[seed], held_out, method.k, rate)
                losses.append(np.asarray(result))
                bar.update(args.steps)
            one = models[0][1], batches[0][0, 0], method.k, args.rates[0]
            compiled = update.lower(*one).compile().as_text()
            sent = messages(compiled, REPLICAS * DEVICES, lambda i: i // DEVICES)
            shape = (len(args.rates), args.seeds, -1)
            results[name] = Result(np.reshape(losses, shape), sent)
    return results


def print_table(results: dict[str, Result], args: argparse.Namespace) -> None:
    print(
        f"\n{args.steps} updates of {REPLICAS} x {args.batch} x {args.context} bytes, "
        f"warm-up of {warm_up_updates(args)}, then cosine decay to zero; inner "
        f"optimizer: {args.inner}.\nHeld-out loss in nats per byte after the last "
        "update, by learning rate: mean ± standard deviation\n"
        f"over {args.seeds} seeds; * marks the best. Bytes: what a device sends across "
        "replicas per update.\n"
    )
    head = "{:<18}" + "{:>15}  " * len(args.rates) + "{:>12}"
    print(head.format("", *(f"{rate:g}" for rate in args.rates), "bytes"))
    for name, result in results.items():
        best, row = result.best_rate(), f"{name:<18}"
        for i, final in enumerate(result.losses[..., -1]):
            mark = "*" if i == best else " "
            row += f"  {final.mean():.3f} ± {final.std():.3f}{mark:>2}"
        print(f"{row}{result.bytes_per_update(METHODS[name]):>12,.0f}")
    print("\nEach at its best, minus data-parallel at its best, seed by seed:")
    reference = results["data-parallel"]
    alone = reference.losses[reference.best_rate(), :, -1]
    for name, result in list(results.items())[1:]:
        # Paired: a seed has the same initial weights and batches.
        pairs = result.losses[result.best_rate(), :, -1] - alone
        each = ", ".join(f"{pair:+.3f}" for pair in pairs)
        print(f"{name:<18}{pairs.mean():+.3f} ± {pairs.std():.3f}  ({each})")
    for name, result in results.items():
        if result.best_rate() in (0, len(args.rates) - 1):
            print(f"The best rate of {name} is at an edge of the grid: try --rates.")


def draw(results: dict[str, Result], args: argparse.Namespace) -> None:
    figure = Figure(figsize=(11, 5), layout="constrained")
    by_updates, by_bytes = figure.subplots(1, 2, sharey=True)
    updates = np.arange(EVERY, args.steps + 1, EVERY)
    for name, result in results.items():
        method, best = METHODS[name], result.best_rate()
        group = result.losses[best]
        label = f"{name}, rate {args.rates[best]:g}"
        sent = updates * result.bytes_per_update(method) / 1e6
        for axes, x in ((by_updates, updates), (by_bytes, sent)):
            style = {"color": method.colour, "linestyle": method.line}
            axes.plot(x, group.mean(0), label=label, **style)
            low, high = group.mean(0) - group.std(0), group.mean(0) + group.std(0)
            axes.fill_between(x, low, high, color=method.colour, alpha=0.15, lw=0)
    by_updates.set_xlabel("update")
    by_updates.set_ylabel("held-out loss, nats per byte")
    by_updates.legend()
    by_bytes.set_xscale("log")
    by_bytes.set_xlabel("MB that a device has sent across replicas")
    figure.suptitle(
        f"Byte-level transformer on Python's help, {REPLICAS} replicas of {DEVICES} "
        f"devices, {args.inner}, {args.seeds} seeds (mean ± std)"
    )
    figure.savefig(args.out, dpi=110)


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--inner", choices=INNERS, default="adamw")
    parser.add_argument("--steps", type=int, default=320, help="updates in a run")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each setting")
    parser.add_argument(
        "--rates",
        type=float,
        nargs="+",
        default=[0.004, 0.01, 0.025],
        help="learning rates of the inner optimizer to try, in all methods",
    )
    parser.add_argument("--width", type=int, default=64, help="of the transformer")
    parser.add_argument("--depth", type=int, default=2, help="transformer blocks")
    parser.add_argument("--context", type=int, default=32, help="bytes in a window")
    parser.add_argument(
        "--batch", type=int, default=4, help="windows of a replica in an update"
    )
    parser.add_argument(
        "--out", type=pathlib.Path, default="many_workers.png", help="a PNG"
    )
    args = parser.parse_args(argv)
    check_sizes_and_rates(parser, args)
    if args.steps < 1 or args.steps % EVERY:
        parser.error(
            f"--steps must be a positive multiple of {EVERY}, got {args.steps}."
        )
    if args.batch % DEVICES:
        parser.error(f"--batch must be a multiple of {DEVICES}, got {args.batch}.")
    return args


def main() -> None:
    args = parse_args(sys.argv[1:])
    results = train_all(args)
    print_table(results, args)
    draw(results, args)
    print(f"\nPicture: {args.out}")


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", REPLICAS * DEVICES)
    main()
