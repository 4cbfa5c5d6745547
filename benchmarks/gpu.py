"""Claim: on a GPU, too, lookahead costs one read and one write of the slow weights.

Two things are timed, with parameters and state donated, and with the forms of a case
taking turns:

- the optimizer step alone, for 200,000,000 parameters, too large for any cache. Its
  *floor* is the bytes of all arrays that a step has to read or write, each once, over
  those of the inner optimizer: 9/7 for Adam, 7/5 for momentum, 5/3 for SGD.
- a whole training step, of 12 square layers that compute little with each parameter,
  and of a transformer of 100,000,000 parameters. Its floor is the inner optimizer's
  time plus the time to copy what lookahead adds, at the copy speed of the GPU.

The copy speed is that of `x + 1` on donated parameters in the same rounds, counting
bytes read and written. `inner alone, again` is the inner optimizer measured a second
time: other ratios can differ from 1 by as much by chance. *Peak* is what the compiler
reserves for a step, *kernels* how many instructions of the optimized program launch
something. Float32 matrices are multiplied with JAX's default precision, here TF32.

Results are written after every program. If a program fails, for example because memory
runs out, its row says so. So does that of a program that would start after `--budget`
seconds.

    python benchmarks/gpu.py --json benchmarks/results/gpu.json    # eight minutes
    python benchmarks/gpu.py --quick    # small, also on a CPU
    python benchmarks/gpu.py --from-json benchmarks/results/gpu.json
"""

import gc
import json
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from forms import ALONE, FORMS, INNERS, NESTEROV, WHERE, WIDE, Form, tree
from gpu_report import (
    AGAIN,
    COPY,
    LAYERS,
    STEP,
    TRANSFORMER,
    driver,
    report,
    table,
    verdicts,
)
from timing import (
    Parser,
    Program,
    environment,
    kernels,
    nbytes,
    progress,
    ratio,
    side_by_side,
)

# Steps in a turn: a multiple of k, and enough that the first launch hardly matters.
STEPS = {STEP: 50, LAYERS: 10, TRANSFORMER: 5}
SEVEN = [form for form in FORMS if form != WIDE]
SIX = [form for form in SEVEN if form != NESTEROV]
WHOLE = [form for form in SEVEN if form != WHERE]
FIVE = [form for form in SIX if form != WHERE]
Model = tuple[Callable[..., Any], Any, Any]  # gradients of (params, inputs), and both


class Case(NamedTuple):
    """What is measured side by side."""

    task: str
    inner: str
    dtype: str
    forms: list[str]
    leaves: int = 20
    size: int = 10_000_000  # floats in a leaf, or the side of a square one
    k: int = 5
    batch: int = 0

    def label(self) -> str:
        floats = f" in {self.leaves} x {self.size:,}" if self.task == STEP else ""
        return f"{self.task}, {self.inner}, {self.dtype}{floats}, k = {self.k}"


def cases() -> list[Case]:
    """Returns all cases, the slowest last."""
    layers = {"leaves": 12, "size": 4096, "batch": 2048}
    alone = [("adam", SEVEN), ("sgd", SEVEN), ("adamw", SIX), ("momentum", FIVE[:3])]
    return [
        *(
            Case(STEP, inner, dtype, forms)
            for dtype in ("float32", "bfloat16")
            for inner, forms in alone
        ),
        Case(STEP, "adam", "float32", SEVEN, leaves=400, size=500_000),
        Case(STEP, "adam", "float32", FIVE, k=50),
        Case(STEP, "adam", "bfloat16", FIVE, k=50),
        Case(LAYERS, "adam", "float32", WHOLE, **layers),
        Case(LAYERS, "adam", "bfloat16", WHOLE, **layers),
        Case(LAYERS, "sgd", "float32", WHOLE, **layers),
        Case(TRANSFORMER, "adamw", "float32", WHOLE, leaves=12, size=768, batch=16),
    ]


def quick_cases() -> list[Case]:
    small = {"leaves": 2, "size": 64, "batch": 2}
    return [
        Case(STEP, "adam", "float32", SEVEN, **small),
        Case(STEP, "sgd", "bfloat16", FIVE[:2], **small),
        Case(LAYERS, "adam", "float32", FIVE[:2], **small),
        Case(TRANSFORMER, "adamw", "float32", FIVE[:2], **small),
    ]


def step_alone(case: Case) -> Model:
    params = tree(case.leaves, case.size, case.dtype, seed=0)
    grads = tree(case.leaves, case.size, case.dtype, seed=1)
    return lambda _, grads: grads, params, grads


def layers(case: Case) -> Model:
    width = case.size
    x = tree(1, case.batch * width, case.dtype, seed=1)[0].reshape(-1, width)
    params = [
        w.reshape(width, width) / width**0.5
        for w in tree(case.leaves, width**2, case.dtype, seed=0)
    ]

    def loss_fn(params, x):
        for w in params:
            x = jnp.tanh(x @ w)
        return jnp.mean(x**2)

    return jax.grad(loss_fn), params, x


def transformer(case: Case) -> Model:
    """A causal language model, computed in bfloat16, with its layers in a scan.

    It has no embedding of positions and no scales in its norms, which cost very little.
    """
    depth, width, heads = case.leaves, case.size, case.size // 64
    vocabulary, context = (20_480, 1024) if case.batch > 2 else (64, 8)
    shapes = {
        "qkv": (depth, width, 3 * width),
        "out": (depth, width, width),
        "up": (depth, width, 4 * width),
        "down": (depth, 4 * width, width),
        "embedding": (vocabulary, width),
    }
    keys = jax.random.split(jax.random.key(0), len(shapes) + 1)
    params = {
        name: 0.02 * jax.random.normal(key, shape)
        for key, (name, shape) in zip(keys[1:], shapes.items(), strict=True)
    }
    tokens = jax.random.randint(keys[0], (case.batch, context + 1), 0, vocabulary)

    def norm(x):
        wide = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + 1e-6)
        return (wide * scale).astype(x.dtype)

    def layer(x, w):
        qkv = (norm(x) @ w["qkv"]).reshape(*x.shape[:2], 3 * heads, 64)
        q, k, v = jnp.split(qkv, 3, axis=2)
        attended = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x += attended.reshape(x.shape) @ w["out"]
        return x + jax.nn.gelu(norm(x) @ w["up"]) @ w["down"], None

    def loss_fn(params, tokens):
        narrow = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
        embedding = narrow.pop("embedding")
        x, _ = jax.lax.scan(layer, embedding[tokens[:, :-1]], narrow)
        logits = (norm(x) @ embedding.T).astype(jnp.float32)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return jnp.mean(losses)

    return jax.grad(loss_fn), params, tokens


MODELS = {STEP: step_alone, LAYERS: layers, TRANSFORMER: transformer}


def build(case: Case, name: str, model: Model) -> Program:
    """Returns the program of one form, after one step to see that memory suffices."""
    grads_of, params, inputs = model
    if name == COPY:
        copied = jax.tree.map(jnp.copy, params)
        program = Program(lambda ps: jax.tree.map(lambda p: p + 1, ps), copied)
    else:
        form = Form(name, FORMS[name](INNERS[case.inner], case.k))

        def step(carry, inputs):
            params, state = carry
            return form.apply(grads_of(form.fast(params), inputs), state, params)

        program = Program(step, form.init(params), inputs)
    program.seconds(1)
    return program


def describe(error: Exception) -> str:
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:100]}"


def measure(
    case: Case,
    rows: dict[str, dict[str, Any]],
    seconds: float,
    skip: Callable[[], bool],
    save: Callable[[], None],
) -> None:
    """Fills the rows of a case, one for each form, with figures or with an error."""
    programs: dict[str, Program] = {}
    model = None
    for name, row in rows.items():
        try:
            if name == AGAIN:
                # The same program, so that nothing is compiled for it.
                programs[AGAIN] = programs[ALONE]
                continue
            if skip():
                raise TimeoutError("skipped, the budget is spent")
            model = model or MODELS[case.task](case)
            program = programs[name] = build(case, name, model)
            row |= {
                "n": nbytes(model[1]),
                "floor": program.floor,
                "compile_seconds": program.trace_seconds + program.compile_seconds,
            }
            row |= program.counts._asdict()
            row["kernels"] = kernels(program.compiled.as_text() or "")
        except Exception as error:  # of any type: the other rows are still measured
            row["error"] = describe(error)
            gc.collect()
        save()
    if not programs:
        return
    try:
        steps = max(STEPS[case.task], case.k)
        times = side_by_side(programs, steps, seconds)
        copy = statistics.median(times[COPY]) if COPY in times else None
        for name in programs:
            rows[name] |= {
                "rounds": len(times[name]),
                "seconds": statistics.median(times[name]),
                "ratio": ratio(times[name], times[ALONE]) if ALONE in times else None,
                "copy_speed": copy and programs[COPY].floor / copy,
            }
    except Exception as error:
        for name in programs:
            rows[name]["error"] = describe(error)
    save()


def main() -> None:
    start = time.perf_counter()
    parser = Parser(description="Measures what lookahead costs on a GPU")
    parser.add_argument("--quick", action="store_true", help="small, also on a CPU")
    parser.add_argument("--tasks", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--budget", type=float, default=400, help="in seconds")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE")
    parser.add_argument("--from-json", type=pathlib.Path, metavar="FILE")
    args = parser.parse_args()
    if args.json and not args.json.parent.is_dir():
        parser.error(f"the folder of {args.json} does not exist.")
    if args.from_json:
        report(json.loads(args.from_json.read_text()))
        return

    result: dict[str, Any] = {"environment": f"{environment()}, {driver()}", "rows": []}
    seconds = 0.05 if args.quick else 4  # for a case, but at least five rounds

    def spent():
        return time.perf_counter() - start

    def save():
        if args.json:
            args.json.write_text(json.dumps(result, indent=1) + "\n")

    print(result["environment"], end="\n\n", flush=True)
    chosen = quick_cases() if args.quick else cases()
    for case in progress([c for c in chosen if c.task in args.tasks], "case"):
        head = {"case": case.label()} | case._asdict()
        del head["forms"]
        rows = {form: head | {"form": form} for form in [*case.forms, COPY, AGAIN]}
        result["rows"] += rows.values()
        measure(case, rows, seconds, lambda: spent() > args.budget, save)
        gc.collect()  # programs and their arrays are in reference cycles
        print(f"\n{table(case.label(), rows)}\n{spent():.0f} s so far", flush=True)
    memory = jax.devices()[0].memory_stats() or {}
    result["peak_bytes_in_use"] = memory.get("peak_bytes_in_use")
    save()
    print(f"\n{verdicts(result['rows'])}")


if __name__ == "__main__":
    main()
