"""How much does the loss grow if the mean of the workers is some steps late?

The model, the text, the batches and the cycles of 20 updates are those of
`many_workers.py`, which must be in the same folder: four replicas, AdamW, and after
each cycle the mean of the weights or a Nesterov step. Here `delayed_outer_loop` takes
the mean of the weights 1 or 10 updates before the sync; `mix` is the weight of the
local weights in the sync. All have the same tokens; a seed has the same initial weights
and batches in all of them. The script prints the held-out losses of the global copy.

    python examples/delayed_workers.py
"""

import argparse
import math
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from command_line import Parser
from flax import nnx
from many_workers import EVERY, REPLICAS, make_batches
from nnx_language_model import (
    HEADS,
    LanguageModel,
    held_out_windows,
    load_text,
    loss_fn,
    warm_up_updates,
)
from tqdm import tqdm

from optax_lookahead import delayed_outer_loop

K = 20
OUTERS = {
    "averaging": optax.sgd(1.0),
    "Nesterov": optax.sgd(0.7, momentum=0.9, nesterov=True),
}
DELAYS = (0, 0.0), (1, 0.0), (1, 0.5), (K // 2, 0.0), (K // 2, 0.5)  # with mix


def make_run(
    outer: Any, delay: int, graphdef: nnx.GraphDef, args: argparse.Namespace
) -> Any:
    """Returns a function that trains once and returns the held-out loss at the end."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, args.rate, warm_up_updates(args), args.steps
    )
    inner = optax.adamw(schedule)

    def train_step(weights, state, tokens):
        loss, grads = jax.value_and_grad(
            lambda w: loss_fn(nnx.merge(graphdef, w), tokens)
        )(weights)
        updates, state = inner.update(grads, state, weights)
        return optax.apply_updates(weights, updates), state, loss

    def run(weights, batches, held_out, mix):
        init, cycle = delayed_outer_loop(
            train_step, outer, "replica", delay=delay, mix=mix
        )
        axes = 0, 0, None, 0
        cycle = jax.vmap(cycle, axes, axes, axis_name="replica")

        def body(carry, batches):
            *carry, losses = cycle(*carry, batches)
            return tuple(carry), losses.mean()

        replicas = jax.tree.map(lambda x: jnp.stack([x] * REPLICAS), weights)
        carry = replicas, jax.vmap(inner.init)(replicas), init(weights)
        (_, _, outer_state), _ = jax.lax.scan(body, carry, batches)
        return loss_fn(nnx.merge(graphdef, outer_state.slow_params), held_out)

    return jax.jit(run)


def train_all(args: argparse.Namespace) -> dict[tuple[str, int, float], np.ndarray]:
    """Returns the losses of all seeds, by outer optimizer, delay and mix."""
    text = load_text()
    held_out = held_out_windows(text, args.context)
    models, batches = [], []
    for seed in range(args.seeds):
        model = LanguageModel(args.width, args.depth, args.context, nnx.Rngs(seed))
        models.append(nnx.split(model))
        # [cycles, replicas, k, batch, bytes]
        drawn = make_batches(text, seed, args)
        cycles = drawn.reshape(-1, K, *drawn.shape[2:])
        batches.append(cycles.swapaxes(1, 2))
    results, runs = {}, {}
    rows = [(name, *row) for name in OUTERS for row in DELAYS]
    # One program for each delay, since mix is an argument.
    programs = list(dict.fromkeys((name, delay) for name, delay, _ in rows))
    for name, delay in tqdm(programs, "compiling", leave=False):
        run = make_run(OUTERS[name], delay, models[0][0], args)
        one = models[0][1], batches[0], held_out, 0.0
        runs[name, delay] = run.lower(*one).compile()
    total = len(rows) * args.seeds * args.steps
    with tqdm(total=total, unit="step", smoothing=0) as bar:
        for name, delay, mix in rows:
            bar.set_description(f"{name}, delay {delay}, mix {mix:g}")
            losses = []
            for (_, weights), cycles in zip(models, batches, strict=True):
                loss = runs[name, delay](weights, cycles, held_out, mix)
                losses.append(float(loss))
                bar.update(args.steps)
            results[name, delay, mix] = np.array(losses)
    return results


def print_table(results: dict[Any, np.ndarray], args: argparse.Namespace) -> None:
    print(
        f"\n{args.steps} updates of {REPLICAS} x {args.batch} x {args.context} bytes, "
        f"AdamW at {args.rate:g}, k = {K}.\nHeld-out loss of the global copy in "
        "nats per byte after the last update, mean ± standard deviation\nover "
        f"{args.seeds} seeds, and the difference from no delay, seed by seed.\n"
    )
    for (name, delay, mix), losses in results.items():
        pairs = losses - results[name, 0, 0.0]
        each = ", ".join(f"{pair:+.4f}" for pair in pairs)
        row = f"{name:<11}delay {delay:>2}, mix {mix:<4g}"
        print(
            f"{row}{losses.mean():>8.3f} ± {losses.std():.3f}"
            f"{pairs.mean():>+10.4f} ± {pairs.std():.4f}  ({each})"
        )


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=320, help="updates in a run")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each setting")
    parser.add_argument("--rate", type=float, default=0.01, help="peak, of AdamW")
    parser.add_argument("--width", type=int, default=64, help="of the transformer")
    parser.add_argument("--depth", type=int, default=2, help="transformer blocks")
    parser.add_argument("--context", type=int, default=32, help="bytes in a window")
    parser.add_argument(
        "--batch", type=int, default=4, help="windows of a replica in an update"
    )
    args = parser.parse_args(argv)
    parser.check_counts(args, "seeds", "width", "depth", "context", "batch")
    if args.steps < 1 or args.steps % EVERY:
        parser.error(
            f"--steps must be a positive multiple of {EVERY}, got {args.steps}."
        )
    if args.width % HEADS:
        parser.error(f"--width must be a multiple of {HEADS} heads, got {args.width}.")
    if not 0 < args.rate < math.inf:
        parser.error(f"--rate must be positive and finite, got {args.rate:g}.")
    return args


def main() -> None:
    args = parse_args(sys.argv[1:])
    print_table(train_all(args), args)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main()
