"""Claim: in a whole training step lookahead costs at most 1 % over its inner optimizer.

One jitted program computes the gradients and the optimizer's step, with parameters
and state donated, for the CNN of `examples/digits.py`, a ResNet-18 on synthetic 32x32
images, and the transformer of `examples/nnx_language_model.py` at its own size and at
the larger one that its docstring names; and for 20 dense layers, in which little is
computed with each parameter. The claim is about steps longer than 5 ms.

The forms take their steps in turns in one process. `inner alone, again` is the inner
optimizer measured a second time: other ratios can differ from 1 by as much by chance.
The table also has the time to trace and compile, and the temporaries of the compiled
program minus those of the inner optimizer's, in units of the parameters' size N.

    python benchmarks/training_step.py
    python benchmarks/training_step.py --quick    # small models; checks temporaries
"""

import itertools
import pathlib
import sys
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from forms import ALL, ALONE, INNERS, NESTEROV, OURS, POLICIES, UPSTREAM, Form
from timing import (
    Parser,
    Program,
    Ratio,
    environment,
    markdown,
    progress,
    ratio,
    side_by_side,
    write_rows,
)

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "examples"))
import digits
import nnx_language_model as language

K = 5
AGAIN = f"{ALONE}, again"
QUICK_ROWS = {name: name for name in (ALONE, OURS)}
ROWS = (
    QUICK_ROWS
    | {name: name for name in (NESTEROV, UPSTREAM, *POLICIES)}
    | {AGAIN: ALONE}
)


class Task(NamedTuple):
    """Something to train: `loss_fn(params, *batch)` is its loss."""

    loss_fn: Callable[..., jax.Array]
    params: Any
    batch: tuple[jax.Array, ...]
    only_dense: bool = False


class Block(nn.Module):
    """A residual block of ResNet-18, with a norm that needs no state."""

    width: int
    strides: int

    @nn.compact
    def __call__(self, x):
        y = nn.Conv(self.width, (3, 3), self.strides, use_bias=False)(x)
        y = nn.relu(nn.GroupNorm(8)(y))
        y = nn.Conv(self.width, (3, 3), use_bias=False)(y)
        y = nn.GroupNorm(8)(y)
        if x.shape != y.shape:
            x = nn.Conv(self.width, (1, 1), self.strides, use_bias=False)(x)
            x = nn.GroupNorm(8)(x)
        return nn.relu(x + y)


class ResNet18(nn.Module):
    width: int = 64
    stages: int = 4

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(self.width, (7, 7), strides=2, use_bias=False)(x)
        x = nn.max_pool(nn.relu(nn.GroupNorm(8)(x)), (3, 3), (2, 2), "SAME")
        for stage in range(self.stages):
            for strides in (2 if stage else 1, 1):
                x = Block(self.width * 2**stage, strides)(x)
        return nn.Dense(100)(x.mean(axis=(1, 2)))


def digits_cnn() -> Task:
    data = digits.load_data()
    batch = jnp.asarray(data.train_x[:32]), jnp.asarray(data.train_y[:32])
    return Task(digits.loss_fn, digits.CNN().init(jax.random.key(0), batch[0]), batch)


def dense(width: int, batch: int) -> Task:
    """The worst case: little is computed with each parameter."""
    keys = jax.random.split(jax.random.key(0), 20)
    scale = width**-0.5
    params = [scale * jax.random.normal(key, (width, width)) for key in keys]

    def loss_fn(params, x):
        for w in params:
            x = jnp.tanh(x @ w)
        return jnp.mean(x**2)

    x = jax.random.normal(keys[0], (batch, width))
    return Task(loss_fn, params, (x,), only_dense=True)


def resnet(images: int, **size: int) -> Task:
    model, rng = ResNet18(**size), np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(images, 32, 32, 3)), jnp.float32)
    y = jnp.asarray(rng.integers(100, size=images))

    def loss_fn(params, x, y):
        logits = model.apply(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    return Task(loss_fn, jax.jit(model.init)(jax.random.key(0), x[:1]), (x, y))


def transformer(width: int, count: int, context: int) -> Task:
    model = language.LanguageModel(width, 2, context, nnx.Rngs(0))
    graph, params = nnx.split(model)
    text = language.load_text().train
    starts = np.random.default_rng(0).integers(len(text) - context - 1, size=count)

    def loss_fn(params, tokens):
        return language.loss_fn(nnx.merge(graph, params), tokens)

    tokens = jnp.asarray(language.windows(text, starts, context))
    return Task(loss_fn, nnx.to_pure_dict(params), (tokens,))


TASKS = {
    "digits CNN, 32 images": digits_cnn,
    "ResNet-18, 64 images": lambda: resnet(64),
    "transformer, 16 x 32 bytes": lambda: transformer(64, 16, 32),
    "transformer, 16 x 256 bytes": lambda: transformer(256, 16, 256),
    "20 dense layers, 64 rows": lambda: dense(700, 64),
}
QUICK_TASKS = {
    "digits CNN, 32 images": digits_cnn,
    "narrow start of ResNet-18, 4 images": lambda: resnet(4, width=16, stages=1),
    "transformer, 1 x 8 bytes": lambda: transformer(64, 1, 8),
    "20 dense layers, 8 rows": lambda: dense(64, 8),
}


def training_step(form: Form, task: Task, carry: Any) -> Program:
    def step(carry, *batch):
        params, state, _ = carry
        loss, grads = jax.value_and_grad(task.loss_fn)(form.fast(params), *batch)
        return *form.apply(grads, state, params), loss

    return Program(step, carry, *task.batch)


def three_decimals(ratio: Ratio) -> str:
    return f"{ratio.median:.3f} ({ratio.low:.3f} to {ratio.high:.3f})"


def measure(
    task: Task, inner: str, names: dict[str, str], seconds: float, compilations: int
) -> list[dict[str, Any]]:
    """Returns a row for each form; `seconds` is the time to measure all of them."""
    forms = {
        name: Form(form, ALL[form](INNERS[inner], K)) for name, form in names.items()
    }
    carries = {
        name: (*form.init(task.params), jnp.zeros([])) for name, form in forms.items()
    }
    compiling: dict[str, list[float]] = {name: [] for name in forms}
    programs = {}
    for _ in range(compilations):
        for name, form in forms.items():
            program = programs[name] = training_step(form, task, carries[name])
            compiling[name].append(program.trace_seconds + program.compile_seconds)
    compiled = {name: median(times) for name, times in compiling.items()}
    times = side_by_side(programs, 1, seconds)
    for name, program in programs.items():
        if not np.isfinite(program.carry[-1]):
            raise AssertionError(f"{name} diverged, so its times are meaningless.")
    unit = sum(p.nbytes for p in jax.tree.leaves(task.params))
    extra = {
        name: program.counts.temporary - programs[ALONE].counts.temporary
        for name, program in programs.items()
    }
    # At most half a copy of the parameters. In dense layers alone, which are not a real
    # model, XLA's CPU backend makes a whole one: see README.md.
    most = unit if task.only_dense else unit / 2
    if extra[OURS] > most:
        raise AssertionError(
            f"{OURS} around {inner} copies parameters: {extra[OURS]:,} of {unit:,} B."
        )
    return [
        {
            "inner": inner,
            "form": name,
            "ms a step": f"{1000 * median(times[name]):.2f}",
            "time / inner (quartiles)": three_decimals(
                ratio(times[name], times[ALONE])
            ),
            "compile time / inner": f"{compiled[name] / compiled[ALONE]:.2f}",
            "temporaries - inner's, N": f"{extra[name] / unit:+.2f}",
        }
        for name in forms
    ]


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small models")
    parser.add_argument(
        "--seconds", type=float, default=40, help="to time the forms of an optimizer"
    )
    parser.add_json()
    args = parser.parse_args()
    if args.seconds <= 0:
        parser.error(f"--seconds must be positive, got {args.seconds:g}.")
    tasks, names = (QUICK_TASKS, QUICK_ROWS) if args.quick else (TASKS, ROWS)
    seconds, compilations = (0.3, 1) if args.quick else (args.seconds, 3)
    inners = ("adamw", "momentum")
    rows = []
    for name, inner in progress(list(itertools.product(tasks, inners)), "optimizer"):
        if inner == inners[0]:
            task = tasks[name]()
            count = sum(p.size for p in jax.tree.leaves(task.params))
        for row in measure(task, inner, names, seconds, compilations):
            rows.append({"task, parameters": f"{name}, {count:,}"} | row)
    print(f"{environment()}, float32, k = {K}\n\n{markdown(rows)}")
    write_rows(args.json, rows)


if __name__ == "__main__":
    main()
