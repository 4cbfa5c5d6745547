"""Claim: with a delay, communication over a slow network overlaps with inner steps.

Programs for two slices of eight chips of TPU v5e, with a replica on each and a slow
network between them, are compiled ahead of time on a machine without TPUs. A cycle of
ten training steps of a decoder of two layers (forward and backward pass, Adam) and a
Nesterov outer step is one program: with `delayed_outer_loop`, with a delay of four
steps and without one, and with `outer_loop` and `average_replicas` in a loop over the
steps. In the compiled program the communication over the network is sends and receives,
in the order in which they are started and waited for.

For each program the script counts the sends and receives, and how many of them are
started before the loop over the steps of the delay and waited for after it; the bytes
sent outside the loops over the steps, in a branch within them, and by every step; and
the temporaries. These and the bytes are in units of N, the bytes of the parameters on
a chip.

    python -m pip install -e ".[tpu-aot]"
    python benchmarks/delayed.py
    python benchmarks/delayed.py --quick    # one form, a smaller decoder
"""

import functools
import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tpu_aot
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from replicas import (
    AVERAGED,
    INSTRUCTION,
    MAPPINGS,
    NESTEROV,
    TOKENS,
    computations,
    decoder,
    loss_fn,
    nbytes,
    on_mesh,
    sends,
)
from timing import Parser, environment, markdown, progress, write_rows

from optax_lookahead import delayed_outer_loop, outer_loop, replica_axes

K = 10
DELAYS = 4, 0
ADAM = optax.adam(1e-3)
IN_A_LOOP = "outer_loop"


def train_step_of(tx: Any):
    def train_step(params, state, tokens):
        loss, grads = jax.value_and_grad(loss_fn)(params, tokens)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    return train_step


def make_cycle(delay: int | str, params: Any):
    """Returns a cycle of one replica, its states, and the axes of replicas."""
    if delay == IN_A_LOOP:
        tx = outer_loop(ADAM, AVERAGED, K)
        state, train_step = jax.eval_shape(tx.init, params), train_step_of(tx)

        def cycle(params, state, shared, batches):
            def body(carry, tokens):
                *carry, loss = train_step(*carry, tokens)
                return tuple(carry), loss

            (params, state), losses = jax.lax.scan(body, (params, state), batches)
            return params, state, shared, losses

        return cycle, state, (), replica_axes(state)
    init, cycle = delayed_outer_loop(
        train_step_of(ADAM), NESTEROV, "replica", delay=delay, mix=0.5
    )
    state, shared = jax.eval_shape(ADAM.init, params), jax.eval_shape(init, params)
    return cycle, state, shared, jax.tree.map(lambda _: 0, state)


def compile_cycle(mapping: str, delay: int | str, layers: int, *widths: int):
    """Returns the program of two replicas, each on its own slice, and N."""
    slices = topologies.get_topology_desc(
        platform="tpu", topology_name="v5e:2x4", num_slices=2
    )
    devices = sorted(slices.devices, key=lambda device: (device.slice_index, device.id))
    mesh = Mesh(np.array(devices).reshape(2, -1), ("replica", "fsdp"))
    params = decoder(layers, *widths) | {
        "temperature": jax.ShapeDtypeStruct((), jnp.float32)
    }
    cycle, state, shared, axes = make_cycle(delay, params)
    if mapping == "vmap":
        in_and_out = (0, axes, None, 0)
        names = {"axis_name": "replica", "spmd_axis_name": "replica"}
        of_all = jax.vmap(cycle, in_and_out, in_and_out, **names)
    else:
        own, one = PartitionSpec("replica"), PartitionSpec()
        spec = jax.tree.map(lambda _, axis: one if axis is None else own, state, axes)

        def of_shard(params, state, shared, batches):
            def first(x, axis=0):
                return x if axis is None else x[0]

            def stacked(x, axis=0):
                return x if axis is None else x[None]

            state = jax.tree.map(first, state, axes)
            params, batches = jax.tree.map(first, (params, batches))
            params, state, shared, losses = cycle(params, state, shared, batches)
            state = jax.tree.map(stacked, state, axes)
            params, losses = jax.tree.map(stacked, (params, losses))
            return params, state, shared, losses

        of_all = jax.shard_map(
            of_shard,
            mesh=mesh,
            in_specs=(own, spec, one, own),
            out_specs=(own, spec, one, own),
            axis_names={"replica"},
        )

    def on_both(x):
        spec = ["fsdp" for size in x.shape[:1] if size % mesh.shape["fsdp"] == 0]
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    tokens = jax.ShapeDtypeStruct(
        (2, K, 16, TOKENS + 1),
        jnp.int32,
        sharding=NamedSharding(mesh, PartitionSpec("replica", None, "fsdp")),
    )
    unit = sum(x.size for x in jax.tree.leaves(params)) * 4 / 8
    arguments = (
        jax.tree.map(functools.partial(on_mesh, mesh), params),
        jax.tree.map(functools.partial(on_mesh, mesh), state, axes),
        jax.tree.map(on_both, shared),
    )
    shardings = jax.tree.map(lambda x: x.sharding, arguments)
    program = jax.jit(
        of_all, donate_argnums=(0, 1, 2), out_shardings=(*shardings, None)
    )
    return program.lower(*arguments, tokens).compile(), unit


def count(mapping: str, delay: int | str, *sizes: int) -> dict[str, Any]:
    compiled, unit = compile_cycle(mapping, delay, *sizes)
    text = compiled.as_text()
    around, sent = around_loop(text, delay), sends(text)
    exchanged, loops = around.pop("bytes"), around.pop("loops")
    return {
        **around,
        "N sent outside the loops": exchanged / unit,
        "in branches in the loops": sum(sent[True]) / unit,
        "by every step": (sum(sent[False]) - exchanged) / loops / unit,
        "temporaries, N": compiled.memory_analysis().temp_size_in_bytes / unit,
    }


def around_loop(text: str, trips: int | str) -> dict[str, int]:
    """Counts sends and receives before and after the loop of `trips` iterations."""
    if "is_scheduled=true" not in text.partition("\n")[0]:
        raise ValueError("the text of the program is not in the order of its schedule")
    bodies, entry = computations(text)
    starts, dones, loops, sent, others = [], [], [], 0, 0
    for place, line in enumerate(bodies[entry]):
        match = INSTRUCTION.match(line)
        op = match["op"] if match else ""
        if op in ("send", "recv"):
            starts.append(place)
            if match and op == "send":  # the array, a context and a token
                sent += nbytes(match["shape"]) - 4
        elif op in ("send-done", "recv-done"):
            dones.append(place)
        elif op == "while" and turns(line, bodies) == trips:
            loops.append(place)
        elif op == "while":
            others += 1
    # The loop over the steps of the delay is the last one.
    loop = loops[-1] if loops else None
    return {
        "starts": len(starts),
        "started before the loop": sum(
            loop is not None and start < loop for start in starts
        ),
        "completions": len(dones),
        "completed after it": sum(loop is not None and done > loop for done in dones),
        "bytes": sent,
        "loops": len(loops) + others,
    }


def turns(line: str, bodies: dict[str, list[str]]) -> int | None:
    """Returns a loop's number of iterations, which is a constant in its condition."""
    called = re.search(r"condition=([^,\s]+)", line)
    if called is None:
        raise ValueError(f"cannot read a condition from {line!r}")
    limits = re.findall(r"s32\[\]\S* constant\((\d+)\)", "\n".join(bodies[called[1]]))
    return int(limits[0]) if len(limits) == 1 else None


def check_claim(counts: dict[tuple[str, int | str], dict[str, Any]]) -> None:
    for (mapping, delay), found in counts.items():
        where = f"{mapping}, delay {delay}"
        sent = found["N sent outside the loops"], found["in branches in the loops"]
        expected = (0, 1) if delay == IN_A_LOOP else (1, 0)
        # Small arrays are padded.
        if not np.allclose(sent, expected, atol=0.02):
            raise AssertionError(f"{where}: {sent} N sent")
        # In a loop under `vmap` the compiler sends logits, to look up those of labels.
        if mapping == "shard_map" and found["by every step"]:
            raise AssertionError(f"{where}: {found['by every step']} N in every step")
        if delay in (0, IN_A_LOOP):
            continue
        starts, completions = found["starts"], found["completions"]
        if not starts or starts != found["started before the loop"]:
            raise AssertionError(f"{where}: not all are started before the loop")
        if not starts == completions == found["completed after it"]:
            raise AssertionError(f"{where}: not all are completed after the loop")


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one form, one layer")
    parser.add_json()
    args = parser.parse_args()
    tpu_aot.load_libtpu()
    pairs, sizes = (
        [*itertools.product(MAPPINGS[::-1], (*DELAYS, IN_A_LOOP))],
        (2, 1024, 8192),
    )
    if args.quick:
        pairs, sizes = [("shard_map", 4)], (1, 512, 4096)
    counts = {pair: count(*pair, *sizes) for pair in progress(pairs, "program")}
    rows = [
        {"two slices of v5e 2x4": mapping, "delay": str(delay)}
        | {name: tpu_aot.cell([x]) for name, x in found.items()}
        for (mapping, delay), found in counts.items()
    ]
    print(environment(), markdown(rows), sep="\n\n")
    write_rows(args.json, rows)
    check_claim(counts)


if __name__ == "__main__":
    main()
