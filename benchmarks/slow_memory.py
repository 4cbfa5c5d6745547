"""Claim: slow weights in host memory take no HBM, and no time in most steps.

Whole training steps of a decoder are compiled ahead of time for TPU v5e on a machine
without TPUs. The table has the bytes of arguments and of temporaries in a chip's HBM;
the copies between the two memories, in a loop that runs at the start of a cycle and at
its sync, or in every step; and, for the optimizer's part alone, the HBM bytes of a step
that neither starts nor ends a cycle. *Moved in every step* is the form without
`slow_memory_kind`, written around the update. N is the bytes of the parameters on a
chip. The batch grows with the slice. On 256 chips more models are compiled, since there
the temporaries are gathered weights, whose number depends on the compiler's schedule.

On a GPU the script measures instead: the largest difference to slow weights on the
device, the bytes that are held, and whole steps of a transformer of 100 M parameters.

    python -m pip install -e ".[tpu-aot]"
    python benchmarks/slow_memory.py            # measures on a GPU, else for TPUs
    python benchmarks/slow_memory.py --quick    # small: two forms on four chips
"""

import collections
import functools
import math
import pathlib
import statistics
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import replicas
import tpu_aot
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from messages import CALLS, computations
from timing import (
    Parser,
    Program,
    markdown,
    nbytes,
    progress,
    ratio,
    side_by_side,
    write_rows,
)

from optax_lookahead import LookaheadState, lookahead, outer_loop

K = 5
HOST = {"slow_memory_kind": "pinned_host"}
WIDE = {"slow_dtype": "float32"}
ADAM = optax.adam(1e-3)
NESTEROV = optax.sgd(0.7, momentum=0.9, nesterov=True)


def moved_in_every_step(tx: Any) -> optax.GradientTransformation:
    """Returns `tx` with slow weights that are copied to the device in every step."""

    def move(state, space):
        slow_params = jax.device_put(state.slow_params, space)
        return state._replace(slow_params=slow_params)

    def update(updates, state, params=None):
        state = move(state, jax.memory.Space.Device)
        updates, state = tx.update(updates, state, params)
        return updates, move(state, jax.memory.Space.Host)

    return optax.GradientTransformation(tx.init, update)


class Form(NamedTuple):
    tx: Any
    on_host: bool
    inner: str  # the form that temporaries are compared with
    dtype: Any = jnp.float32


BFLOAT16 = tpu_aot.float32_moments(ADAM)
FORMS = {
    "Adam": Form(ADAM, False, "Adam"),
    "lookahead": Form(lookahead(ADAM, K), False, "Adam"),
    "lookahead, moved in every step": Form(
        moved_in_every_step(lookahead(ADAM, K)), True, "Adam"
    ),
    "lookahead on the host": Form(lookahead(ADAM, K, **HOST), True, "Adam"),
    "Nesterov outside": Form(outer_loop(ADAM, NESTEROV, K), False, "Adam"),
    "Nesterov outside, on the host": Form(
        outer_loop(ADAM, NESTEROV, K, **HOST), True, "Adam"
    ),
    "bfloat16: Adam": Form(BFLOAT16, False, "bfloat16: Adam", jnp.bfloat16),
    "bfloat16: float32 slow weights": Form(
        lookahead(BFLOAT16, K, **WIDE), False, "bfloat16: Adam", jnp.bfloat16
    ),
    "bfloat16: float32 slow weights on the host": Form(
        lookahead(BFLOAT16, K, **WIDE, **HOST), True, "bfloat16: Adam", jnp.bfloat16
    ),
}
THREE = ["Adam", "lookahead", "lookahead on the host"]
LAYERS = 10
PROGRAMS = [
    *(("2x2", name, LAYERS) for name in FORMS),
    *(("16x16", name, LAYERS) for name in THREE),
    # On 256 chips temporaries are gathered weights, and depend on the schedule.
    *(("16x16", name, layers) for layers in (2, 4, 6, 8, 12) for name in THREE[::2]),
]


def compile_step(slice_name: str, form: Form, layers: int, *, whole: bool):
    """Returns the compiled step of a decoder, and its parameters' bytes on a chip."""
    slice_ = topologies.get_topology_desc(
        platform="tpu", topology_name=f"v5e:{slice_name}"
    )
    chips = len(slice_.devices)
    mesh = Mesh(np.array(slice_.devices), ("fsdp",))

    def on_mesh(x, memory="device"):
        split = x.shape and x.shape[0] % chips == 0
        spec = PartitionSpec("fsdp") if split else PartitionSpec()
        sharding = NamedSharding(mesh, spec, memory_kind=memory)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    def place(node):
        if not isinstance(node, LookaheadState):
            return on_mesh(node)
        placed = jax.tree.map(on_mesh, node)
        there = functools.partial(on_mesh, memory="pinned_host")
        return placed._replace(slow_params=jax.tree.map(there, node.slow_params))

    shapes = replicas.decoder(layers, 2048, 32768) | {
        "temperature": jax.ShapeDtypeStruct((), jnp.float32)
    }
    params = jax.tree.map(
        lambda x: on_mesh(jax.ShapeDtypeStruct(x.shape, form.dtype)), shapes
    )
    state = jax.tree.map(
        place if form.on_host else on_mesh,
        jax.eval_shape(form.tx.init, params),
        is_leaf=lambda node: form.on_host and isinstance(node, LookaheadState),
    )
    tokens = on_mesh(jax.ShapeDtypeStruct((2 * chips, replicas.TOKENS + 1), jnp.int32))

    def step(params, state, batch):
        grads = jax.grad(replicas.loss_fn)(params, batch) if whole else batch
        updates, state = form.tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    shardings = jax.tree.map(lambda x: x.sharding, (params, state))
    step = jax.jit(step, donate_argnums=(0, 1), out_shardings=shardings)
    # The compiler does not count arrays in on-chip memory as temporaries.
    options = {"xla_vf_vmem_memory_space_assignment": False} if whole else {}
    compiled = step.lower(params, state, tokens if whole else params).compile(
        compiler_options=options
    )
    on_chip = sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(params)
    )
    return compiled, on_chip


def host_copies(text: str) -> dict[bool, int]:
    """Returns the number of copies from or to host memory, outside and in loops."""
    bodies, entry = computations(text)
    found = {False: 0, True: 0}

    def walk(name: str, in_loop: bool) -> None:
        for line in bodies[name]:
            # The host's memory is S(5) in a layout.
            if "S(5)" in line and any(
                f" {op}(" in line for op in ("copy", "copy-start", "fusion")
            ):
                found[in_loop] += 1
            if " fusion(" not in line:
                for called in CALLS.findall(line):
                    walk(called, in_loop or " while(" in line)

    walk(entry, False)
    return found


def count(slice_name: str, name: str, layers: int) -> dict[str, Any]:
    """Returns the counts of one form for one slice."""
    form = FORMS[name]
    compiled, unit = compile_step(slice_name, form, layers, whole=True)
    memory = compiled.memory_analysis()
    copies = host_copies(compiled.as_text())
    alone, _ = compile_step(slice_name, form, layers, whole=False)
    text = alone.as_text()
    entry = tpu_aot.instructions(text[text.index("\nENTRY ") :])
    return {
        "slice": slice_name,
        "layers": layers,
        "form": name,
        "arguments, N": round(memory.argument_size_in_bytes / unit, 2),
        "on the host, N": round(memory.host_argument_size_in_bytes / unit, 2),
        "temporaries, N": round(memory.temp_size_in_bytes / unit, 2),
        "copies in a loop": copies[True],
        "in every step": copies[False],
        "HBM bytes of another step, N": round(
            tpu_aot.hbm_bytes(entry, branches=False) / unit, 2
        ),
    }


def check_claim(rows: list[dict[str, Any]]) -> None:
    """Raises unless forms on the host hold no more HBM than the inner optimizer."""
    by_program = {(row["slice"], row["form"], row["layers"]): row for row in rows}
    more = collections.defaultdict(list)
    for (slice_name, name, layers), row in by_program.items():
        if not name.endswith("on the host") or "Nesterov" in name:
            continue
        where = f"{name}, {slice_name}"
        if row["in every step"] or not row["copies in a loop"]:
            raise AssertionError(f"{where}: copies {row}")
        inner = by_program[slice_name, FORMS[name].inner, layers]
        # In the smallest model on 256 chips the scalars are 0.01 N.
        if row["arguments, N"] - inner["arguments, N"] > 0.02:
            raise AssertionError(f"{where}: arguments are more than the inner step's")
        added = row["temporaries, N"] - inner["temporaries, N"]
        more[where].append(added / row["on the host, N"])
    # On 256 chips single models differ by tens of N in either direction.
    for where, added in more.items():
        if statistics.median(added) > 0.2:
            raise AssertionError(f"{where}: {added} N more temporaries")


def count_all(
    programs: list[tuple[str, str, int]], file: pathlib.Path | None
) -> list[Any]:
    tpu_aot.load_libtpu()
    rows = []
    for each in progress(programs, "program"):
        rows.append(count(*each))
        write_rows(file, rows)
    check_claim(rows)
    return rows


PERIODS = 5, 30, 100


def measure(layers: int, width: int, batch: int, seconds: float) -> list[Any]:
    """Returns the rows measured on the GPU of this machine: times, bytes, values."""
    shapes = replicas.decoder(layers, width, 32768) | {
        "temperature": jax.ShapeDtypeStruct((), jnp.float32)
    }
    keys = iter(jax.random.split(jax.random.key(0), len(jax.tree.leaves(shapes))))

    def init(x):
        if len(x.shape) < 2:
            return jnp.ones(x.shape)
        return jax.random.normal(next(keys), x.shape) * x.shape[0] ** -0.5

    params = jax.tree.map(init, shapes)
    tokens = jax.random.randint(
        jax.random.key(1), (batch, replicas.TOKENS + 1), 0, 32768
    )
    rows = []
    for k in PERIODS:
        forms = {
            "alone": ADAM,
            "on the device": lookahead(ADAM, k),
            "on the host": lookahead(ADAM, k, **HOST),
        }
        programs = {name: program(tx, params, tokens) for name, tx in forms.items()}
        held = {
            name: sum(
                x.nbytes
                for x in jax.tree.leaves(each.carry)
                if x.sharding.memory_kind == "device"
            )
            for name, each in programs.items()
        }
        times = side_by_side(programs, k, seconds)
        # Both ran the same number of steps.
        ours, theirs = (programs[n].carry[0] for n in ("on the host", "on the device"))
        apart = jax.tree.map(lambda x, y: jnp.max(jnp.abs(x - y)), ours, theirs)
        rows += [
            {
                "k": k,
                "form": name,
                "held, N": round(held[name] / nbytes(params), 2),
                "peak, N": round(each.counts.peak / nbytes(params), 2),
                "time / alone": str(ratio(times[name], times["alone"])),
                "largest difference": float(max(jax.tree.leaves(apart)))
                if name == "on the host"
                else "",
            }
            for name, each in programs.items()
        ]
    return rows


def program(tx: Any, params: Any, tokens: jax.Array) -> Program:
    def step(carry, tokens):
        params, state = carry
        grads = jax.grad(replicas.loss_fn)(params, tokens)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.copy, params)
    return Program(step, (params, tx.init(params)), tokens)


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small, to check it")
    parser.add_json()
    args = parser.parse_args()
    on_gpu = jax.default_backend() == "gpu"
    if on_gpu:
        rows = measure(2, 256, 2, 1.0) if args.quick else measure(12, 768, 16, 20.0)
    elif args.quick:
        rows = count_all([("2x2", name, 2) for name in THREE[::2]], None)
    else:
        rows = count_all(PROGRAMS, args.json)
    print(markdown(rows))
    if not on_gpu:
        print("\nTimes and peak bytes: not measured, since this machine has no GPU.")
    write_rows(args.json, rows)


if __name__ == "__main__":
    sys.exit(main())
