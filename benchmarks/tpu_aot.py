"""Claim: on TPUs a lookahead step moves 2 N more bytes per chip, on 4 and 256 chips.

N is the size of the parameters on a chip: the slow weights are read once and written
once. Nothing else is added: no collective, no kernel, and no temporary where the inner
step has none.

No TPU is needed. The optimizer step of a transformer (gradients given, parameters and
state donated, every array sharded over all chips) is compiled ahead of time for TPU
v5e slices, and what the compiled program does is counted. In one half of the runs the
model grows with the slice, so that a chip always holds 0.97 GB of float32 parameters;
in the other it stays at one billion parameters, so that on 256 chips a chip holds 15
MB.

`HBM bytes / N` counts what the program moves between a chip's memory and its core, from
the text of the program. The table also has XLA's own `bytes accessed`. That includes
traffic of on-chip memory, through which the compiler stages some arrays, so it says
little where one form is staged and another is not.

    python -m pip install -e ".[tpu-aot]"
    python benchmarks/tpu_aot.py            # two slices, two models
    python benchmarks/tpu_aot.py --quick    # four chips, Adam, a small model
"""

import functools
import importlib.metadata
import itertools
import math
import os
import re
import sys
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from timing import Parser, write_rows

from optax_lookahead import lookahead, outer_loop

SLICES = ("2x2", "16x16")
# The width relative to that on four chips, for a number of chips.
MODELS: dict[str, Callable[[int], int]] = {
    "grows": lambda chips: math.isqrt(chips // 4),
    "fixed": lambda _: 1,
}
LAYERS = 18
NO_LIBTPU = 3  # exit status, different from that of a failure


def float32_moments(inner: optax.GradientTransformation) -> Any:
    """Returns `inner` with a float32 state whatever the parameters' dtype."""

    def init(params):
        return inner.init(optax.tree.cast(params, jnp.float32))

    def update(updates, state, params=None):
        return inner.update(optax.tree.cast(updates, jnp.float32), state, params)

    return optax.GradientTransformation(init, update)


# Each with the dtype of the parameters and gradients.
INNERS: dict[str, tuple[optax.GradientTransformation, Any]] = {
    "adam": (optax.adam(1e-3), jnp.float32),
    "adam, bf16": (float32_moments(optax.adam(1e-3)), jnp.bfloat16),
    "clip, adam": (
        optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)),
        jnp.float32,
    ),
    "sgd": (optax.sgd(1e-3), jnp.float32),
    "momentum": (optax.sgd(1e-3, momentum=0.9), jnp.float32),
}


K, ALPHA = 5, 0.5
OURS, UPSTREAM = "optax_lookahead", "optax.lookahead"
NESTEROV = f"{OURS}, Nesterov outer"
FORMS: dict[str, Callable[[Any], Any]] = {
    "inner alone": lambda inner: inner,
    OURS: lambda inner: lookahead(inner, K, ALPHA),
    NESTEROV: lambda inner: outer_loop(
        inner, optax.sgd(0.7, momentum=0.9, nesterov=True), K
    ),
    UPSTREAM: lambda inner: optax.lookahead(inner, K, ALPHA),
}
# Measured around the inner optimizers with moments, which these change.
POLICIES: dict[str, Callable[[Any], Any]] = {
    f"{OURS}, {policy}": functools.partial(
        lookahead, k=K, alpha=ALPHA, inner_state=policy
    )
    for policy in ("reset", "interpolate")
}
# What each form adds to the HBM bytes of its inner optimizer: the slow weights, and
# under "interpolate" the moments at the last sync, each read and written.
ADDED = {(OURS, inner): 2 for inner in INNERS} | {
    (f"{OURS}, reset", "adam"): 2,
    (f"{OURS}, reset", "momentum"): 2,
    (f"{OURS}, interpolate", "adam"): 6,
    (f"{OURS}, interpolate", "momentum"): 4,
}

BYTES = {"pred": 1, "u8": 1, "bf16": 2, "f32": 4, "s32": 4, "u32": 4}
INSTRUCTION = re.compile(
    r"^ +(?:ROOT )?(?P<name>%[\w.-]+) = (?P<shape>\(.*?\)|\S+) (?P<op>[a-z][a-z-]*)"
    r"\((?P<operands>.*?)\)(?:, |$)"
    r'(?:custom_call_target="(?P<target>\w+)")?'
)
ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\](?:\{([^}]*)\})?")
COLLECTIVE = re.compile(
    r"(all-reduce|all-gather|reduce-scatter|all-to-all|collective-\w+)(-start)?"
)
# These only rename existing bytes.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast"}
# The instruction does not show what these move.
OPAQUE = {"while", "conditional", "call", "custom-call"}


class Array(NamedTuple):
    size: int  # bytes
    in_hbm: bool


class Instruction(NamedTuple):
    name: str
    op: str
    arrays: list[Array]  # of its shape
    operands: list[str]


class Counts(NamedTuple):
    """Figures of one compiled step on one chip; bytes in units of N."""

    hbm: float
    accessed: float
    temporary: float
    collectives: int
    fusions: int


def instructions(text: str) -> list[Instruction]:
    """Returns the instructions in a text of optimized HLO."""
    result = []
    for line in text.splitlines():
        if " = " not in line:
            continue
        match = INSTRUCTION.match(line)
        if not match:
            raise ValueError(f"no instruction was read from {line!r}")
        arrays = [
            # The layout names the memory unless that is HBM; S(1) is on the chip.
            Array(
                BYTES[dtype] * math.prod(map(int, filter(None, dims.split(",")))),
                "S(" not in layout,
            )
            for dtype, dims, layout in ARRAY.findall(match["shape"])
        ]
        operands = re.findall(r"%[\w.-]+", match["operands"])
        renames = match["target"] in ("ConcatBitcast", "ZeroCrop")
        op = "bitcast" if renames else match["op"]
        result.append(Instruction(match["name"], op, arrays, operands))
    return result


def hbm_bytes(entry: list[Instruction], *, branches: bool = True) -> int:
    """Returns the bytes that a program's entry reads from HBM and writes to it.

    It raises an error if there are branches or loops. With `branches=False` their
    contents are not counted.
    """
    arrays = {instruction.name: instruction.arrays for instruction in entry}
    total = 0
    for name, op, result, operands in entry:
        if op in FREE or op.endswith("-done"):
            continue
        if op in {"conditional", "while"} and not branches:
            continue
        if op in {"copy-start", "slice-start"}:
            # Two arrays, from and to in either order, and a flag. A slice reads only
            # what it writes, and its source comes first.
            total += result[1].size * (result[0].in_hbm + result[1].in_hbm)
        elif op in OPAQUE or op.endswith("-start"):
            raise NotImplementedError(f"cannot tell what {name}, a {op}, moves")
        else:
            touched = sum((arrays[operand] for operand in operands), result)
            total += sum(array.size for array in touched if array.in_hbm)
    return total


def transformer(width: int, layers: int, vocabulary: int) -> dict[str, Any]:
    """Returns the shapes of a decoder's parameters; input and output share a matrix."""
    layer = {
        "attention_norm": (width,),
        "qkv": (width, 3 * width),
        "out": (width, width),
        "mlp_norm": (width,),
        "up": (width, 4 * width),
        "down": (4 * width, width),
    }
    stack = {f"layer_{i}": layer for i in range(layers)}
    return {"embedding": (vocabulary, width), **stack, "final_norm": (width,)}


def count(slice_name: str, shapes: dict[str, Any], inner: str, form: str) -> Counts:
    """Compiles the step of one form for one slice and counts it."""
    slice_ = topologies.get_topology_desc(
        platform="tpu", topology_name=f"v5e:{slice_name}"
    )
    mesh = Mesh(np.array(slice_.devices), ("chips",))

    def on_mesh(x):
        # Scalars, the counters, are on every chip.
        spec = PartitionSpec("chips") if x.shape else PartitionSpec()
        sharding = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    optimizer, dtype = INNERS[inner]
    grads = jax.tree.map(
        lambda shape: on_mesh(jax.ShapeDtypeStruct(shape, dtype)),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    pair = form == UPSTREAM
    params = optax.LookaheadParams.init_synced(grads) if pair else grads
    tx = (FORMS | POLICIES)[form](optimizer)
    state = jax.tree.map(on_mesh, jax.eval_shape(tx.init, params))

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step, donate_argnums=(0, 1))
    compiled = step.lower(params, state, grads).compile()
    size = sum(x.size for x in jax.tree.leaves(grads))
    unit = size * jnp.dtype(dtype).itemsize / len(mesh.devices)
    text = compiled.as_text()
    entry = instructions(text[text.index("\nENTRY ") :])
    return Counts(
        hbm_bytes(entry) / unit,
        compiled.cost_analysis()["bytes accessed"] / unit,
        compiled.memory_analysis().temp_size_in_bytes / unit,
        sum(bool(COLLECTIVE.fullmatch(i.op)) for i in instructions(text)),
        sum(i.op == "fusion" for i in entry),
    )


def chips(slice_name: str) -> int:
    return math.prod(map(int, slice_name.split("x")))


def cell(values: Iterable[int | float]) -> str:
    """Returns one number if it is the same for every slice, or else all of them."""
    texts = [
        f"{value:.2f}" if isinstance(value, float) else str(value) for value in values
    ]
    return texts[0] if len(set(texts)) == 1 else " / ".join(texts)


def load_libtpu() -> None:
    """Loads the compiler for TPUs, or ends the program with one line."""
    # Without these it queries the network for its TPU, prints warnings, and cannot be
    # loaded by two programs at once.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    jax.config.update("jax_platforms", "cpu")
    try:
        topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    except Exception as error:
        reason = str(error).splitlines()[0]
        print(f'{reason} Run `python -m pip install -e ".[tpu-aot]"`.', file=sys.stderr)
        sys.exit(NO_LIBTPU)


def check_claim(counts: dict[tuple[str, str, str, str], Counts]) -> None:
    """Raises unless lookahead adds its floor and nothing else to an inner optimizer."""
    for (model, inner, form, slice_name), ours in counts.items():
        alone = counts[model, inner, "inner alone", slice_name]
        if (form, inner) not in ADDED:
            continue
        added, where = ADDED[form, inner], f"{form}, {model}, {inner}, {slice_name}"
        # With temporaries, the compiler's decisions differ a little each time.
        slack = 0.03 if alone.temporary else 0.005
        if abs(ours.hbm - alone.hbm - added) > slack:
            raise AssertionError(f"{where}: {ours.hbm - alone.hbm:.3f} N, not {added}")
        if ours.collectives != alone.collectives:
            raise AssertionError(f"{where}: {ours.collectives} collectives")
        if not alone.temporary and ours.temporary:
            raise AssertionError(f"{where}: {ours.temporary:.3f} N of temporaries")


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="one slice, under a minute"
    )
    parser.add_json()
    args = parser.parse_args()
    load_libtpu()
    # Imported here, so that without the extra there is one line and no traceback.
    from tqdm import tqdm

    models, slices, inners, layers = list(MODELS), SLICES, list(INNERS), LAYERS
    if args.quick:
        models, slices, inners, layers = models[:1], SLICES[:1], ["adam"], 2
    rows = [
        *itertools.product(models, inners, FORMS),
        *(
            (model, inner, form)
            for model, (form, inner) in itertools.product(models, ADDED)
            if form in POLICIES and inner in inners
        ),
    ]
    counts = {}
    with tqdm(total=len(rows) * len(slices), unit="program", leave=False) as progress:
        for (model, inner, form), slice_name in itertools.product(rows, slices):
            scale = MODELS[model](chips(slice_name))
            shapes = transformer(2048 * scale, layers, 32768 * scale)
            counts[model, inner, form, slice_name] = count(
                slice_name, shapes, inner, form
            )
            progress.update()

    print(
        f"jax {jax.__version__}, optax {optax.__version__}, "
        f"libtpu {importlib.metadata.version('libtpu')}, {layers} layers, "
        f"k = {K}, TPU v5e {', '.join(slices)}"
    )
    print("Where the slices differ, their figures are in this order.")
    print(
        "| model | inner | form | HBM bytes / N | bytes accessed / N | temporaries / N "
        "| collectives | fusions |"
    )
    print(8 * "|---" + "|")
    for row in rows:
        columns = zip(*(counts[*row, slice_name] for slice_name in slices), strict=True)
        cells = map(cell, columns)
        print(f"| {' | '.join([*row, *cells])} |")
    keys = "model", "inner", "form", "slice"
    write_rows(
        args.json,
        [dict(zip(keys, row, strict=True)) | x._asdict() for row, x in counts.items()],
    )
    check_claim(counts)


if __name__ == "__main__":
    main()
