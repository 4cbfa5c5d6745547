"""Question: does an outer step with one worker help a model of 10 M parameters?

Published differences are small: in MuLoCo 0.009 nats around AdamW, 0.006 around Muon.
A transformer (four layers, width 448, bfloat16 compute, float32 weights) learns to
predict the next byte of the source code of the packages that are installed here,
128 x 512 bytes a step, with a warm-up and then a linear decay to zero. In this order:

    Muon                       alone
    Muon, Nesterov             `outer_loop`, k = 30, with eta = 0.7, mu = 0.6: MuLoCo
    Muon, EMA-Nesterov         gamma = 0.99; beta = 0.3 from 16 % to 76 % of the steps
    AdamW                      alone
    AdamW, lookahead           k = 5, alpha = 0.5
    AdamW, Nesterov            as around Muon

Each is evaluated at the weights to evaluate and at their average over the last tenth of
the steps, of every 30th step. For each, three learning rates are tried for 600 steps
with seed 0; then it runs 3,000 steps with the best one and with seeds 1 to 4, which
have the same initial weights and the same batches in all arms. There is a difference if
the mean of the paired differences is at least 3.09 standard errors. With four seeds,
5.4 % of comparisons between equal arms would show one; there are ten comparisons. Steps
saved are how many more steps the inner optimizer alone would need, from its losses
after 600 and 3,000 steps. All of this was fixed before the first run.

With Muon, the layers' matrices are trained by Muon and the rest by AdamW with 0.15
times the learning rate. The steps are one jitted scan of 150, which is called many
times. Learning rate, seed and length are traced, so that each arm is compiled once.

Results are saved after every run. If a run fails, its row says so; so does the row of a
run that would start after 35 minutes, summed over all calls. All arms run with one seed
before the next, so that only the last seeds are left out. A second call with the same
file continues, and repeats what failed:

    python benchmarks/outer_steps.py --json outer_steps.json     # one GPU, 35 minutes
    python benchmarks/outer_steps.py --json outer_steps.json --this-call 9    # a part
    python benchmarks/outer_steps.py --from-json outer_steps.json --picture steps.png
    python benchmarks/outer_steps.py --quick    # small, on a CPU; a test of the script

With `JAX_COMPILATION_CACHE_DIR` the later parts need not compile again.
"""

import argparse
import functools
import gc
import json
import math
import pathlib
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib
from outer_steps_report import (
    DIVERGED,
    DONE,
    FAILED,
    NOT_RUN,
    RATES,
    SEEDS,
    Row,
    chosen_rate,
    draw,
    report,
)
from source_text import Text, source_text
from timing import Parser, environment

from optax_lookahead import ema_nesterov, lookahead, outer_loop, slow_params

K = 30
VOCABULARY = 256
COMPUTE = jnp.bfloat16
Params = Any  # a dict of arrays
Schedule = Callable[[Any], Any]
Attention = Literal["xla", "cudnn"]


class Size(NamedTuple):
    """What is trained, on what and for how long."""

    depth: int
    width: int
    heads: int
    context: int
    batch: int
    trial: int  # steps, to choose a rate
    steps: int
    seeds: int
    segment: int  # steps of the scan, between evaluations
    windows: int  # held out
    least_bytes: int
    most_bytes: int

    def flops(self) -> float:
        """Returns FLOPs of a training step: 6 per weight and token, and attention."""
        matrices = 12 * self.depth * self.width**2 + VOCABULARY * self.width
        attention = 12 * self.depth * self.context * self.width
        return (6.0 * matrices + attention) * self.batch * self.context


FULL = Size(4, 448, 7, 512, 128, 600, 3000, 4, 150, 2048, 100_000_000, 300_000_000)
QUICK = Size(2, 32, 2, 32, 8, 60, 120, 2, 60, 64, 0, 1_000_000)


class Arm(NamedTuple):
    alone: str  # its inner optimizer
    rates: tuple[float, float, float]
    wrap: Callable[[optax.GradientTransformation, Any], optax.GradientTransformation]


def alone(inner, steps):
    del steps
    return inner


def nesterov(inner, steps):
    del steps
    return outer_loop(inner, optax.sgd(0.7, momentum=0.6, nesterov=True), K)


def with_lookahead(inner, steps):
    del steps
    return lookahead(inner, k=5, alpha=0.5)


def with_ema_nesterov(inner, steps):
    def beta(t):
        return jnp.where((t >= 0.16 * steps) & (t < 0.76 * steps), 0.3, 0.0)

    return optax.chain(inner, ema_nesterov(beta, gamma=0.99))


# Learning rates a factor of 2 apart. With constant inner updates, the three wrappers
# multiply the step by 1.75, 1.43 and 0.5, so the middle rates differ.
ARMS = {
    "Muon": Arm("Muon", (0.01, 0.02, 0.04), alone),
    "Muon, Nesterov": Arm("Muon", (0.007, 0.014, 0.028), nesterov),
    "Muon, EMA-Nesterov": Arm("Muon", (0.0085, 0.017, 0.034), with_ema_nesterov),
    "AdamW": Arm("AdamW", (0.0015, 0.003, 0.006), alone),
    "AdamW, lookahead": Arm("AdamW", (0.003, 0.006, 0.012), with_lookahead),
    "AdamW, Nesterov": Arm("AdamW", (0.001, 0.002, 0.004), nesterov),
}


def warm_up_and_decay(peak: Any, steps: Any) -> Schedule:
    """Returns a schedule that grows for a twentieth of the steps and ends at zero."""
    warm_up = steps // 20

    def rate(t):
        return peak * jnp.minimum((t + 1) / warm_up, (steps - t) / (steps - warm_up))

    return rate


def is_matrix(path, _):
    return path[0].key in ("qkv", "out", "up", "down")


def muon(rate: Schedule) -> optax.GradientTransformation:
    # The first axis is the layers'.
    spec = contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)
    matrices = contrib.muon(
        rate,
        weight_decay=0.01,
        muon_weight_dimension_numbers=lambda ps: jax.tree.map(lambda _: spec, ps),
    )
    rest = optax.adamw(lambda t: 0.15 * rate(t), b2=0.95, weight_decay=0.0)
    return optax.partition(
        {True: matrices, False: rest},
        lambda params: jax.tree.map_with_path(is_matrix, params),
    )


def adamw(rate: Schedule) -> optax.GradientTransformation:
    return optax.adamw(
        rate,
        b2=0.95,
        weight_decay=0.1,
        mask=lambda params: jax.tree.map_with_path(is_matrix, params),
    )


INNERS = {"Muon": muon, "AdamW": adamw}


def optimizer(arm: Arm, peak: Any, steps: Any) -> optax.GradientTransformation:
    return arm.wrap(INNERS[arm.alone](warm_up_and_decay(peak, steps)), steps)


def init_params(key: jax.Array, size: Size) -> Params:
    """Returns float32 weights; those at the end of a residual branch are smaller."""
    depth, width = size.depth, size.width
    shapes = {
        "embedding": (VOCABULARY, width),
        "qkv": (depth, width, 3 * width),
        "out": (depth, width, width),
        "up": (depth, width, 4 * width),
        "down": (depth, 4 * width, width),
    }
    params = {}
    for name, shape in shapes.items():
        key, use = jax.random.split(key)
        scale = 1.0 if name == "embedding" else shape[-2] ** -0.5
        if name in ("out", "down"):
            scale /= (2 * depth) ** 0.5
        params[name] = scale * jax.random.normal(use, shape)
    params["scale"] = jnp.ones(width)
    params["head"] = jnp.zeros((width, VOCABULARY))
    return params


def norm(x: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + 1e-6)
    return (wide * scale).astype(x.dtype)


def rotate(x: jax.Array) -> jax.Array:
    """Rotary embedding of positions; `x` has the shape (batch, time, head, 2 n)."""
    half = x.shape[-1] // 2
    angles = (
        jnp.arange(x.shape[1])[:, None] * 1000.0 ** (-jnp.arange(half) / half)[None]
    )
    cos, sin = (f(angles).astype(x.dtype)[None, :, None, :] for f in (jnp.cos, jnp.sin))
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


def loss_fn(
    params: Params, windows: jax.Array, heads: int, attention: Attention
) -> jax.Array:
    """Returns the mean loss in nats of the next byte; `windows` is (batch, time)."""
    # An index of uint8 would be compared with a size of 256, which it cannot hold.
    tokens = windows.astype(jnp.int32)
    narrow = jax.tree.map(lambda p: p.astype(COMPUTE), params)

    def layer(x, w):
        qkv = (norm(x) @ w["qkv"]).reshape(*x.shape[:2], 3 * heads, -1)
        q, k, v = jnp.split(qkv, 3, axis=2)
        attended = jax.nn.dot_product_attention(
            rotate(norm(q)),
            rotate(norm(k)),
            v,
            is_causal=True,
            implementation=attention,
        )
        x += attended.reshape(x.shape) @ w["out"]
        return x + jax.nn.gelu(norm(x) @ w["up"]) @ w["down"], None

    layers = {name: narrow[name] for name in ("qkv", "out", "up", "down")}
    # Unrolled: in a loop, a GPU would copy saved activations into and out of a stack.
    x, _ = jax.lax.scan(layer, narrow["embedding"][tokens[:, :-1]], layers, unroll=True)
    x = norm(x) * narrow["scale"][None, None]
    logits = jnp.matmul(x, narrow["head"], preferred_element_type=jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return jnp.mean(losses)


def windows_at(text: jax.Array, starts: jax.Array, context: int) -> jax.Array:
    def window(start):
        return jax.lax.dynamic_slice(text, (start,), (context + 1,))

    return jax.vmap(window)(starts)


def attention_here(size: Size) -> Attention:
    """Returns cuDNN's attention if it works here, as it does not store the scores."""
    if jax.default_backend() == "cpu":
        return "xla"
    shape = (size.batch, size.context, size.heads, size.width // size.heads)

    def attend(x: jax.Array) -> jax.Array:
        y = jax.nn.dot_product_attention(
            x, x, x, is_causal=True, implementation="cudnn"
        )
        return jnp.sum(y.astype(jnp.float32))

    try:
        jax.block_until_ready(jax.jit(jax.grad(attend))(jnp.ones(shape, COMPUTE)))
    except Exception as error:  # of many types
        print(f"attention by XLA, since cuDNN's failed: {describe(error)}")
        return "xla"
    return "cudnn"


class Run(NamedTuple):
    """The carry of the scan."""

    params: Params
    opt_state: optax.OptState
    average: Params  # over the tail
    step: jax.Array


class Trainer:
    """Trains any arm on one text, and compiles each of them once."""

    def __init__(self, text: Text, size: Size):
        self.size = size
        self.train_text = jnp.asarray(text.train)
        last = len(text.held_out) - size.context - 1
        starts = jnp.asarray(np.linspace(0, last, size.windows, dtype=np.int32))
        windows = windows_at(jnp.asarray(text.held_out), starts, size.context)
        self.held_out = windows.reshape(-1, size.batch, size.context + 1)
        self.loss_fn = functools.partial(
            loss_fn, heads=size.heads, attention=attention_here(size)
        )
        self.evaluate = jax.jit(self._evaluate)
        self.programs: dict[str, tuple[Callable, Callable]] = {}

    def _evaluate(self, params: Params, held_out: jax.Array) -> jax.Array:
        losses = jax.lax.map(lambda windows: self.loss_fn(params, windows), held_out)
        return jnp.mean(losses)

    def program(self, name: str) -> tuple[Callable, Callable]:
        """Returns functions that start a run and that continue it for a segment."""
        if name not in self.programs:
            arm, size = ARMS[name], self.size

            def weights(run):
                if arm.wrap is alone:
                    return run.params
                return slow_params(run.opt_state, run.params)

            @jax.jit
            def start(rate, steps, seed):
                params = init_params(jax.random.key(seed), size)
                opt_state = optimizer(arm, rate, steps).init(params)
                zeros = jax.tree.map(jnp.zeros_like, params)
                return Run(params, opt_state, zeros, jnp.zeros([], jnp.int32))

            @functools.partial(jax.jit, donate_argnums=0)
            def go_on(run, rate, steps, seed, text, held_out):
                tx = optimizer(arm, rate, steps)
                batches = jax.random.fold_in(jax.random.key(seed), 1)

                def train_step(run, _):
                    key = jax.random.fold_in(batches, run.step)
                    last = len(text) - size.context
                    starts = jax.random.randint(key, (size.batch,), 0, last)
                    windows = windows_at(text, starts, size.context)
                    grads = jax.grad(self.loss_fn)(run.params, windows)
                    updates, opt_state = tx.update(grads, run.opt_state, run.params)
                    params = optax.apply_updates(run.params, updates)
                    return Run(params, opt_state, run.average, run.step + 1), None

                def cycle(run, _):
                    run, _ = jax.lax.scan(train_step, run, length=K)
                    average = tail_average(run.average, weights(run), run.step, steps)
                    return run._replace(average=average), None

                run, _ = jax.lax.scan(cycle, run, length=size.segment // K)
                return run, self._evaluate(weights(run), held_out)

            self.programs[name] = start, go_on
        return self.programs[name]

    def __call__(self, arm: str, rate: float, seed: int, steps: int) -> Row:
        """Returns what a run has to add to its row."""
        clock = time.perf_counter()
        start, go_on = self.program(arm)
        settings = jnp.float32(rate), jnp.int32(steps), jnp.int32(seed)
        run, curve = start(*settings), []
        first = math.nan
        for step in range(self.size.segment, steps + 1, self.size.segment):
            run, value = go_on(run, *settings, self.train_text, self.held_out)
            curve.append([step, float(value)])
            if step == self.size.segment:
                first = time.perf_counter() - clock  # compiles, if needed
            if not math.isfinite(curve[-1][1]):
                curve.pop()
                return {"status": DIVERGED, "curve": curve}
        # Evaluations included; 0 in a run of one segment.
        later = time.perf_counter() - clock - first
        later /= max(steps - self.size.segment, self.size.segment)
        row = {"status": DONE, "curve": curve, "last": curve[-1][1]}
        tail = float(self.evaluate(run.average, self.held_out))
        row["tail"] = tail if math.isfinite(tail) else None
        return row | {"first_seconds": first, "step_seconds": later}


def tail_average(average: Params, weights: Params, step: Any, steps: Any) -> Params:
    """Returns the mean of the weights at every K-th step of the last tenth so far.

    The tail is at least the last 2 K steps. Call this after every K steps.
    """
    count = (step - steps + jnp.maximum(steps // 10, 2 * K)) // K
    share = jnp.where(count > 0, 1 / jnp.maximum(count, 1), 0.0)
    return jax.tree.map(lambda a, w: a + share * (w - a), average, weights)


def plan(size: Size) -> list[Row]:
    """Returns a row for each run, in order; none has run yet."""
    trials = [
        (RATES, name, arm.rates[i], 0, size.trial)
        # The middle one first, so that there is a rate even if time runs out.
        for i in (1, 0, 2)
        for name, arm in ARMS.items()
    ]
    runs = [
        (SEEDS, name, None, seed, size.steps)
        for seed in range(1, size.seeds + 1)
        for name in ARMS
    ]
    keys = "stage", "arm", "rate", "seed", "steps"
    return [
        dict(zip(keys, values, strict=True)) | {"status": NOT_RUN}
        for values in trials + runs
    ]


def carry_out(
    rows: list[Row],
    train: Callable[[str, float, int, int], Row],
    may_start: Callable[[int], bool],
    save: Callable[[], None],
) -> None:
    """Fills the rows that have no result, in their order."""
    for row in rows:
        if row["status"] in (DONE, DIVERGED):
            continue
        if not may_start(row["steps"]):
            if not row["status"].startswith(FAILED):
                row["status"] = f"{NOT_RUN}, the time is over"
            continue
        if row["stage"] == SEEDS:
            row["rate"] = chosen_rate(rows, row["arm"])
        if row["rate"] is None:
            row["status"] = f"{NOT_RUN}, no rate of this arm was tried to its end"
        else:
            try:
                row |= train(row["arm"], row["rate"], row["seed"], row["steps"])
            except Exception as error:  # of any type: the other runs still start
                row["status"] = f"{FAILED}: {describe(error)}"
                print(f"{row['arm']}: {row['status']}", flush=True)
                gc.collect()  # programs and their arrays are in reference cycles
        save()
    save()


def describe(error: Exception) -> str:
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:100]}"


class Clock:
    """The time spent in this call and in earlier calls with the same file."""

    def __init__(self, before: float, minutes: float, this_call: float):
        self.start, self.before = time.perf_counter(), before
        self.minutes, self.this_call = minutes, this_call
        self.compiling, self.step = 0.0, 0.0  # seconds, the most so far

    def spent(self) -> float:
        return self.before + self.here()

    def here(self) -> float:
        return time.perf_counter() - self.start

    def may_start(self, steps: int) -> bool:
        """Whether a run may start: it must end within the time of this call."""
        end = self.here() + self.compiling + steps * self.step
        return self.spent() < 60 * self.minutes and end < 60 * self.this_call


def settings(text: Text, size: Size) -> Row:
    """Returns what must not change from one call to the next."""
    return {
        "shrunk": size != FULL,
        "size": size._asdict(),
        "rates": {name: list(arm.rates) for name, arm in ARMS.items()},
        "arms": {name: arm.alone for name, arm in ARMS.items()},
        "data": str(text),
        "train_packages": text.train_packages,
        "held_out_packages": text.held_out_packages,
    }


def parse_args() -> tuple[Parser, argparse.Namespace]:
    parser = Parser(description="Does an outer step help? Runs on one GPU")
    parser.add_argument("--quick", action="store_true", help="small, also on a CPU")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="continued")
    parser.add_argument("--from-json", type=pathlib.Path, metavar="FILE")
    parser.add_argument("--picture", type=pathlib.Path, metavar="FILE", help="a PNG")
    parser.add_argument(
        "--minutes", type=float, default=35, help="after which no run starts"
    )
    parser.add_argument(
        "--this-call", type=float, default=math.inf, help="minutes of this call"
    )
    args = parser.parse_args()
    for path in (args.json, args.picture):
        if path and not path.parent.is_dir():
            parser.error(f"the folder of {path} does not exist.")
    if args.picture and args.picture.suffix != ".png":
        parser.error(f"--picture must be a .png, got {args.picture}.")
    if args.from_json and not args.from_json.is_file():
        parser.error(f"--from-json must be a file of --json, got {args.from_json}.")
    if not (args.quick or args.from_json or args.json):
        parser.error("--json is needed, for results of half an hour, got none.")
    return parser, args


def main() -> None:
    parser, args = parse_args()
    if args.from_json:
        result = json.loads(args.from_json.read_text())
    else:
        result = run_all(parser, args)
    print(f"\n{report(result)}")
    if args.picture:
        draw(result, args.picture)


def run_all(parser: Parser, args: argparse.Namespace) -> Row:
    size = QUICK if args.quick else FULL
    if not args.quick and jax.default_backend() == "cpu":
        parser.error("a GPU is needed, or --quick, got a CPU.")
    text = source_text(size.most_bytes)
    print(f"{environment()}\n{text}", flush=True)
    if len(text.train) < size.least_bytes:
        parser.error(
            f"at least {size.least_bytes:,} bytes to train on are needed, got "
            f"{len(text.train):,}. Install more packages."
        )
    result = {"environment": environment(), "seconds": 0.0} | settings(text, size)
    result["rows"] = plan(size)
    if args.json and args.json.is_file():
        before = json.loads(args.json.read_text())
        if any(before.get(key) != value for key, value in settings(text, size).items()):
            parser.error(f"{args.json} is of other settings or text. Write to another.")
        result |= {"seconds": before["seconds"], "rows": before["rows"]}
    clock = Clock(result["seconds"], args.minutes, args.this_call)

    def save():
        result["seconds"] = clock.spent()
        if args.json:
            # Through another file, so that a kill leaves a complete one.
            part = args.json.with_suffix(".part")
            part.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
            part.replace(args.json)

    trainer = Trainer(text, size)

    def train(arm, rate, seed, steps):
        start = time.perf_counter()
        row = trainer(arm, rate, seed, steps) | {"device": jax.devices()[0].device_kind}
        row["seconds"] = time.perf_counter() - start
        clock.compiling = max(clock.compiling, row.get("first_seconds", 0.0))
        clock.step = max(clock.step, row.get("step_seconds", 0.0))
        losses = [f"{row[name]:.4f}" for name in ("last", "tail") if row.get(name)]
        line = f"{clock.spent():5.0f} s: {arm}, rate {rate:g}, seed {seed}, {steps} "
        line += f"steps: {row['status']} {', '.join(losses)}"
        if row.get("step_seconds"):
            flops = size.flops() / row["step_seconds"] / 1e12
            line += f"; {1e3 * row['step_seconds']:.2f} ms a step, {flops:.2f} TFLOP/s"
        print(line, flush=True)
        return row

    carry_out(result["rows"], train, clock.may_start, save)
    return result


if __name__ == "__main__":
    main()
