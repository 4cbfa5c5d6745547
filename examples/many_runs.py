"""Train many runs of a small network in one program, and summarize them over seeds.

For `robustness.py`. A run is an ordinary Optax loop in `jax.lax.scan`, and `jax.vmap`
runs all settings of a method at once. For each seed all settings of all methods have
the same initial weights and the same batches.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import digits
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from tqdm import tqdm

from optax_lookahead import slow_params

HIDDEN = (64, 64)
BATCH = 32
THREADS = 2  # programs at a time, since one uses little more than one core


class Data(NamedTuple):
    """Training and test data: features, shape `[n, features]`, and labels."""

    train_x: np.ndarray
    train_y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray


class Method(NamedTuple):
    """Runs that differ in numbers only, so that one program trains them all."""

    make: Callable[..., optax.GradientTransformation]  # from one setting
    settings: dict[str, np.ndarray]  # by argument of `make`, all of one shape
    weights: Callable = lambda params, state: [params]  # noqa: ARG005, to evaluate


class Measured(NamedTuple):
    """What was measured, shape `[*settings, seeds, evaluations, weights]`."""

    loss: np.ndarray  # on the whole training part
    accuracy: np.ndarray  # in % on the test part, NaN where the loss is not finite


def slow_weights(params, state):
    return [slow_params(state, params)]


def fast_and_slow_weights(params, state):
    return [params, slow_params(state, params)]


def load_digits() -> Data:
    train_x, train_y, test_x, test_y = digits.load_data()
    return Data(train_x.reshape(-1, 64), train_y, test_x.reshape(-1, 64), test_y)


def load_cancer() -> Data:
    x, y = load_breast_cancer(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(
        x, y, test_size=169, random_state=0, stratify=y
    )
    mean, std = train_x.mean(axis=0), train_x.std(axis=0)
    train_x, test_x = (np.float32((x - mean) / std) for x in (train_x, test_x))
    return Data(train_x, train_y, test_x, test_y)


LOADERS = {"digits": load_digits, "breast_cancer": load_cancer}


def init(seed: int, data: Data):
    """Returns the initial weights and biases of a dense network."""
    sizes = data.train_x.shape[1], *HIDDEN, data.train_y.max() + 1
    keys = jax.random.split(jax.random.key(seed), len(sizes) - 1)
    he = jax.nn.initializers.he_normal()
    shapes = itertools.pairwise(sizes)
    return [
        (he(key, shape), jnp.zeros((1, shape[1])))
        for key, shape in zip(keys, shapes, strict=True)
    ]


def apply(params, x):
    *hidden, (w, b) = params
    for v, c in hidden:
        x = jax.nn.relu(x @ v + c)
    return x @ w + b


def loss_fn(params, x, y):
    logits = apply(params, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def evaluate(params, data: Data) -> Measured:
    loss = loss_fn(params, data.train_x, data.train_y)
    hits = apply(params, data.test_x).argmax(-1) == data.test_y
    # Where all logits are NaN, argmax returns class 0, which is often right.
    return Measured(loss, jnp.where(jnp.isfinite(loss), 100 * hits.mean(), jnp.nan))


def make_batches(seed: int, data: Data, steps: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(len(data.train_x), size=(steps, BATCH))


def run(method: Method, every: int, last: int, setting, params, batches, data: Data):
    """Trains once; evaluates after every `every` of the `last` updates at the end."""
    tx = method.make(**setting)

    def train_step(params_and_state, batch):
        params, state = params_and_state
        grads = jax.grad(loss_fn)(params, data.train_x[batch], data.train_y[batch])
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    def train_and_evaluate(params_and_state, batches):
        params_and_state, _ = jax.lax.scan(train_step, params_and_state, batches)
        measured = [evaluate(tree, data) for tree in method.weights(*params_and_state)]
        return params_and_state, jax.tree.map(lambda *x: jnp.stack(x), *measured)

    params_and_state = params, tx.init(params)
    if last < len(batches):
        params_and_state, _ = jax.lax.scan(
            train_step, params_and_state, batches[:-last]
        )
    rounds = batches[-last:].reshape(-1, every, BATCH)
    return jax.lax.scan(train_and_evaluate, params_and_state, rounds)[1]


def train_all(
    methods: dict[str, Method],
    data_sets: dict[str, Data],
    seeds: Sequence[int],
    steps: int,
    every: int | None = None,
    last: int | None = None,
) -> dict[str, dict[str, Measured]]:
    """Returns what was measured, by data set and method.

    Args:
      methods: Methods by name.
      data_sets: Data sets by name.
      seeds: Each has its own initial weights and batches.
      steps: Updates in a run.
      every: Updates from one evaluation to the next; None means the last one only.
      last: Updates at the end of a run that are evaluated; None means all.
    """
    last = last or steps
    measured = {name: {} for name in data_sets}
    shapes = {
        name: np.shape(next(iter(method.settings.values())))
        for name, method in methods.items()
    }
    runs = sum(map(math.prod, shapes.values())) * len(data_sets) * len(seeds)
    pairs = list(itertools.product(data_sets, methods))

    def job(data_name, name, seed):
        method, data = methods[name], data_sets[data_name]
        settings = {key: np.ravel(value) for key, value in method.settings.items()}
        return settings, init(seed, data), make_batches(seed, data, steps), data

    # Before the threads start, since otherwise each of them would compile.
    programs = {}
    for data_name, name in tqdm(pairs, "compiling", leave=False):
        one = functools.partial(run, methods[name], every or last, last)
        program = jax.jit(jax.vmap(one, in_axes=(0, None, None, None)))
        lowered = program.lower(*job(data_name, name, seeds[0]))
        programs[data_name, name] = lowered.compile()
    with (
        tqdm(total=runs * steps, unit="step", unit_scale=True, smoothing=0) as bar,
        ThreadPoolExecutor(THREADS) as pool,
    ):
        for data_name, name in pairs:
            bar.set_description(f"{data_name}, {name}")
            program = programs[data_name, name]
            jobs = [job(data_name, name, seed) for seed in seeds]
            results = []
            for result in pool.map(lambda job, call=program: call(*job), jobs):
                results.append(jax.tree.map(np.asarray, result))
                bar.update(math.prod(shapes[name]) * steps)
            measured[data_name][name] = Measured(
                *(
                    # From [seeds, settings, ...].
                    np.stack(x, axis=1).reshape(
                        *shapes[name], len(seeds), *x[0].shape[1:]
                    )
                    for x in zip(*results, strict=True)
                )
            )
    return measured


def grid(**axes) -> dict[str, np.ndarray]:
    """Returns all combinations of the values of some arguments."""
    values = np.meshgrid(*axes.values(), indexing="ij")
    return dict(zip(axes, values, strict=True))


def final(measured: Measured) -> Measured:
    """Returns the results of the last evaluation, shape `[*settings, seeds]`.

    A run that diverged counts as the worst: its loss is inf, its accuracy -inf.
    """
    loss, accuracy = (x[..., -1, -1] for x in measured)
    diverged = ~np.isfinite(loss)
    return Measured(
        np.where(diverged, np.inf, loss), np.where(diverged, -np.inf, accuracy)
    )


def cell(values, digits: int) -> str:
    """Returns mean ± standard deviation over seeds."""
    diverged = np.sum(~np.isfinite(values))
    if diverged:
        return f"{diverged}/{len(values)} diverged"
    return f"{np.mean(values):.{digits}f} ± {np.std(values):.{digits}f}"


def standard_error(differences: np.ndarray) -> np.ndarray:
    return differences.std(axis=-1) / max(differences.shape[-1] - 1, 1) ** 0.5


def paired(values, others, digits: int) -> str:
    """Returns mean ± standard error of the differences, seed by seed."""
    if not np.isfinite([values, others]).all():
        return "-"
    differences = np.subtract(values, others)
    mean, error = differences.mean(), standard_error(differences)
    return f"{mean:+.{digits}f} ± {error:.{digits}f}"


def share(trained: np.ndarray) -> np.ndarray:
    """Returns the share of a grid that trains, in %, for each seed on the last axis."""
    return 100 * trained.reshape(-1, trained.shape[-1]).mean(axis=0)


def best_of(losses: np.ndarray) -> int:
    """Returns the index of the setting with the lowest mean, of `[settings, seeds]`."""
    return int(losses.mean(axis=-1).argmin())
