"""Claim: a sweep over k and alpha is one program, 10 times as fast as separate runs.

k and alpha of `lookahead` may be traced values, as learning rate and momentum of
`optax.sgd` are. So the grid of 20 (learning rate, momentum) x 4 (k, alpha) x 3 seeds,
240 runs of an MLP on scikit-learn's digits, is one `vmap` over one training run: one
compilation, and batched kernels.

It is compared with a loop in which every run is a separate program, with its values as
Python numbers. Only a random sample of that loop is run; its time is scaled up to 240
runs, and its results must agree with those of the sweep. A third form, one program for
a single run that is called 240 times with other values, shows what traced values gain
without `vmap`; it is sampled too.

    python benchmarks/sweep.py
    python benchmarks/sweep.py --quick    # shorter runs, a smaller sample
"""

import functools
import itertools
import random
import statistics
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from timing import Parser, environment, markdown, write_rows
from tqdm import tqdm

from optax_lookahead import lookahead, slow_params

BATCH = 32
LEARNING_RATES = (0.01, 0.02, 0.05, 0.1, 0.2)
MOMENTA = (0.0, 0.5, 0.8, 0.9)
CYCLES = ((5, 0.5), (5, 0.8), (10, 0.5), (10, 0.8))
SEEDS = (0, 1, 2)
DTYPES = {int: np.int32, float: np.float32}
# Batched kernels add in another order, and training amplifies the rounding errors.
TOLERANCE = 1e-2


class Setting(NamedTuple):
    """What a run of the sweep is given: Python numbers, tracers or arrays."""

    learning_rate: Any
    momentum: Any
    k: Any
    alpha: Any
    seed: Any


GRID = [
    Setting(rate, momentum, k, alpha, seed)
    for rate, momentum, (k, alpha), seed in itertools.product(
        LEARNING_RATES, MOMENTA, CYCLES, SEEDS
    )
]


def initial_params(key: jax.Array) -> dict[str, jax.Array]:
    hidden, out = jax.random.split(key)
    return {
        "w1": jax.random.normal(hidden, (64, 32)) / 8,
        "b1": jnp.zeros(32),
        "w2": jax.random.normal(out, (32, 10)) / 6,
        "b2": jnp.zeros(10),
    }


def loss_fn(params, x, y):
    hidden = jax.nn.relu(x @ params["w1"] + params["b1"])
    logits = hidden @ params["w2"] + params["b2"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def train(setting: Setting, x, y, steps: int) -> tuple[jax.Array, Any]:
    """Returns the slow weights' loss on all data after training, and these weights."""
    inner = optax.sgd(setting.learning_rate, setting.momentum)
    tx = lookahead(inner, setting.k, setting.alpha)
    init, batches = jax.random.split(jax.random.key(setting.seed))
    params = initial_params(init)

    def step(carry, key):
        params, state = carry
        batch = jax.random.randint(key, (BATCH,), 0, len(x))
        grads = jax.grad(loss_fn)(params, x[batch], y[batch])
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(batches, steps)
    (params, state), _ = jax.lax.scan(step, (params, tx.init(params)), keys)
    slow = slow_params(state, params)
    return loss_fn(slow, x, y), slow


def load_data() -> tuple[np.ndarray, np.ndarray]:
    x, y = load_digits(return_X_y=True)
    return (x / 16).astype(np.float32), y.astype(np.int32)


def count_compilations() -> list[str]:
    """Returns a list that grows with every compilation of this process."""
    compilations: list[str] = []

    def listen(event: str, duration: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compilations.append(f"{duration:.1f} s")

    jax.monitoring.register_event_duration_secs_listener(listen)
    return compilations


def timed(function, *arguments) -> tuple[float, Any]:
    """Returns seconds and results."""
    start = time.perf_counter()
    results = jax.block_until_ready(function(*arguments))
    return time.perf_counter() - start, jax.device_get(results)


def pick(tree: Any, i: int) -> Any:
    return jax.tree.map(lambda array: array[i], tree)


def largest_difference(expected: Any, got: Any) -> float:
    """Returns the largest absolute difference of two trees."""
    differences = jax.tree.map(lambda e, g: np.max(np.abs(e - g)), expected, got)
    return float(max(jax.tree.leaves(differences)))


def print_best(losses: np.ndarray) -> None:
    """Prints the loss of the best learning rate and momentum for each k and alpha."""
    shape = len(LEARNING_RATES), len(MOMENTA), len(CYCLES), len(SEEDS)
    means = losses.reshape(shape).mean(axis=-1)
    rows = []
    for column, (k, alpha) in enumerate(CYCLES):
        rate, momentum = np.unravel_index(means[..., column].argmin(), shape[:2])
        rows.append(
            {
                "k": k,
                "alpha": alpha,
                "best learning rate": LEARNING_RATES[rate],
                "best momentum": MOMENTA[momentum],
                "loss, mean of seeds": f"{means[rate, momentum, column]:.4f}",
            }
        )
    print(f"\n{markdown(rows)}")


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small sample")
    parser.add_argument("--steps", type=int, default=500, help="of a training run")
    parser.add_json()
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"--steps must be at least 1, got {args.steps}.")
    steps = min(args.steps, 100) if args.quick else args.steps
    sample = random.Random(0).sample(range(len(GRID)), 3 if args.quick else 12)
    settings = Setting(
        *(
            np.array(column, DTYPES[type(column[0])])
            for column in zip(*GRID, strict=True)
        )
    )
    data = load_data()
    compilations = count_compilations()

    def run(setting, x, y):
        return train(setting, x, y, steps)

    # Each program is compiled and run, which takes about as long for all of them.
    with tqdm(total=len(sample) + 2, unit="program", leave=False) as bar:
        bar.set_description("vmap")
        sweep = jax.jit(jax.vmap(run, in_axes=(0, None, None)))
        vmap_seconds, results = timed(sweep, settings, *data)
        training_seconds, _ = timed(sweep, settings, *data)
        if len(compilations) != 1:
            raise AssertionError(f"the sweep compiled {len(compilations)} programs.")
        bar.update()

        bar.set_description("separate programs")
        separate, difference = [], 0.0
        for i in sample:
            # The values are bound, so that the compiler knows them.
            program = jax.jit(functools.partial(run, GRID[i]))
            seconds, expected = timed(program, *data)
            separate.append(seconds)
            difference = max(difference, largest_difference(expected, pick(results, i)))
            bar.update()
        if not difference < TOLERANCE:
            raise AssertionError(f"vmap differs from separate runs by {difference:g}.")

        bar.set_description("one program, run by run")
        program = jax.jit(run)
        one = [timed(program, pick(settings, i), *data)[0] for i in sample]
        bar.update()

    seconds = {
        "one vmap": vmap_seconds,
        # Its first call compiles, for all of them.
        "one program, run by run": one[0] + (len(GRID) - 1) * statistics.mean(one[1:]),
        "separate programs": len(GRID) * statistics.mean(separate),
    }
    rows = [
        {"form": form, "seconds": f"{s:.1f}", "time / vmap": f"{s / vmap_seconds:.1f}"}
        for form, s in seconds.items()
    ]
    print(f"{environment()}, {len(GRID)} runs of {steps} steps\n\n{markdown(rows)}")
    write_rows(args.json, rows)
    print(
        f"\nWithout compiling, the vmap takes {training_seconds:.1f} s. The others are "
        f"scaled up from {len(sample)} runs,\nwhich differ from the vmap's by at most "
        f"{difference:.1g} in any slow weight and in the loss."
    )
    print_best(results[0])


if __name__ == "__main__":
    main()
