"""Claim: replicas that average at syncs send 1.25 / k of what data-parallel ones send.

For TPU v5e, compiled ahead of time on a machine that has none: a decoder of 8 layers,
whose parameters each of R replicas holds once, split over its chips. Counted for the
optimizer's part of a step, of `outer_loop` around Adam with a Nesterov outer step,
with and without `average_replicas` before it, and of Adam after an average of the
gradients in every step: what a chip hands to collectives across replicas, temporaries,
and the bytes read and written in HBM by a step that syncs and by one that does not, all
in units of N, the bytes of the parameters on a chip; and the collectives in a program.
Then, on the CPU of this machine and for four replicas on it, temporaries and time.

    python -m pip install -e ".[tpu-aot]"
    python benchmarks/replicas.py
    python benchmarks/replicas.py --quick    # one slice; checks the claim
"""

import itertools
import pathlib
import re
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tpu_aot
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from timing import (
    Parser,
    Program,
    environment,
    markdown,
    progress,
    ratio,
    side_by_side,
    write_rows,
)

from optax_lookahead import average_replicas, outer_loop

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "examples"))
from messages import BRANCHES, COLLECTIVE, computations, messages

SLICES = {"4x4": 16, "16x16": 256}
REPLICAS = 2, 4, 16
K = 5
NESTEROV = optax.sgd(0.7, momentum=0.9, nesterov=True)
AVERAGED = optax.chain(average_replicas("replica"), NESTEROV)
EVERY_STEP, APART, TOGETHER = "data-parallel Adam", "outer_loop", "averaged at syncs"
FORMS = {
    EVERY_STEP: optax.adam(1e-3),
    APART: outer_loop(optax.adam(1e-3), NESTEROV, K),
    TOGETHER: outer_loop(optax.adam(1e-3), AVERAGED, K),
}


class Counts(NamedTuple):
    """Of a compiled step, all but the collectives in units of N."""

    sent: float  # in every step
    sent_at_sync: float  # and by one that syncs, besides
    collectives: int  # instructions of the program, in a branch or not
    temporaries: float
    hbm: float  # read and written by a step that does not sync
    hbm_at_sync: float


def make_step(form: str):
    """Returns a step of one replica."""
    tx = FORMS[form]

    def step(params, state, grads):
        if form == EVERY_STEP:
            grads = jax.lax.pmean(grads, "replica")
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def map_step(form: str, params: Any, **names: str):
    """Returns the step of all replicas, and which parts of its state each has."""
    state = jax.eval_shape(FORMS[form].init, params)
    axes = jax.tree.map(lambda x: 0 if x.ndim else None, state)
    step = jax.vmap(
        make_step(form), (0, axes, 0), (0, axes), axis_name="replica", **names
    )
    return step, state


def count(slice_name: str, replicas: int, form: str, layers: int) -> Counts:
    slice_ = topologies.get_topology_desc(
        platform="tpu", topology_name=f"v5e:{slice_name}"
    )
    chips = len(slice_.devices)
    mesh = Mesh(np.array(slice_.devices).reshape(replicas, -1), ("replica", "fsdp"))
    params = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        tpu_aot.transformer(2048, layers, 32768),
        is_leaf=lambda x: isinstance(x, tuple),
    )
    step, state = map_step(form, params, spmd_axis_name="replica")

    def on_mesh(x):
        shape = (replicas, *x.shape) if x.shape else ()
        spec = PartitionSpec(*["replica", "fsdp"][: len(shape)])
        return jax.ShapeDtypeStruct(shape, x.dtype, sharding=NamedSharding(mesh, spec))

    args = jax.tree.map(on_mesh, (params, state, params))
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*args).compile()
    text = compiled.as_text()
    unit = sum(x.size for x in jax.tree.leaves(params)) * 4 * replicas / chips
    sent = messages(text, chips, lambda i: i // (chips // replicas))
    return Counts(
        sent.always / unit,
        sent.in_branch / unit,
        sum(bool(COLLECTIVE.fullmatch(i.op)) for i in tpu_aot.instructions(text)),
        compiled.memory_analysis().temp_size_in_bytes / unit,
        *(total / unit for total in hbm_bytes(text)),
    )


def hbm_bytes(text: str) -> tuple[int, int]:
    """Returns what a step that does not sync moves, and one that does."""
    bodies, entry = computations(text)

    def moved(name: str) -> int:
        lines = "\n".join(bodies[name])
        return tpu_aot.hbm_bytes(tpu_aot.instructions(lines), branches=False)

    conditionals = [line for line in bodies[entry] if " conditional(" in line]
    totals = [moved(entry), moved(entry)]
    for line in conditionals:
        branches = re.findall(r"[\w.%-]+", BRANCHES.search(line)[1])
        syncs = [any(" all-reduce(" in line for line in bodies[b]) for b in branches]
        for name, sync in zip(branches, syncs, strict=True):
            totals[sync] += moved(name)
    return totals[0], totals[1]


def measure_cpu(seconds: float) -> list[dict[str, Any]]:
    """Returns a row for each form of four replicas on one device."""
    params = {f"w{i:02}": jnp.ones(50_000) for i in range(20)}

    def stacked(x):
        return jnp.array(jnp.broadcast_to(x, (4, *x.shape))) if x.ndim else x

    programs = {}
    for form in FORMS:
        mapped, _ = map_step(form, params)
        grads = jax.tree.map(stacked, params)
        carry = jax.tree.map(stacked, (params, FORMS[form].init(params)))
        programs[form] = Program(
            lambda carry, grads, mapped=mapped: mapped(*carry, grads), carry, grads
        )
    times = side_by_side(programs, K, seconds)
    unit = 4 * 20 * 50_000 * 4
    return [
        {
            "form": form,
            "time / data-parallel": str(ratio(times[form], times[EVERY_STEP])),
            "temporaries / N": f"{program.counts.temporary / unit:.2f}",
        }
        for form, program in programs.items()
    ]


def check_claim(counts: dict[tuple[str, int, str], Counts]) -> None:
    for (slice_name, replicas, form), found in counts.items():
        where = f"{slice_name}, {replicas} replicas, {form}"
        sent = {EVERY_STEP: (1, 0), APART: (0, 0), TOGETHER: (0, 1.25)}[form]
        if not np.allclose([found.sent, found.sent_at_sync], sent, atol=0.01):
            raise AssertionError(f"{where}: sends {found.sent}, {found.sent_at_sync} N")


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one slice, two layers")
    parser.add_json()
    args = parser.parse_args()
    tpu_aot.load_libtpu()
    slices, replicas, layers = SLICES, REPLICAS, 8
    if args.quick:
        slices, replicas, layers = ["4x4"], (4,), 2
    counts = {
        row: count(*row, layers)
        for row in progress(list(itertools.product(slices, replicas, FORMS)), "program")
    }
    rows = [
        {"v5e": slice_name, "replicas x chips": f"{r} x {SLICES[slice_name] // r}"}
        | {"form": form}
        | {
            name.replace("_", " "): tpu_aot.cell([x])
            for name, x in found._asdict().items()
        }
        for (slice_name, r, form), found in counts.items()
    ]
    cpu = measure_cpu(1 if args.quick else 20)
    print(f"{environment()}\n\n{markdown(rows)}\n\nCPU, 4 replicas\n\n{markdown(cpu)}")
    write_rows(args.json, rows + cpu)
    check_claim(counts)


if __name__ == "__main__":
    main()
