"""Claim: replicas that average at syncs send 1 / k of what data-parallel ones send.

Programs for TPU v5e are compiled ahead of time on a machine without TPUs, for a decoder
of 8 layers, of which each of R replicas holds one copy, sharded over its chips. The
optimizer's part of a step is measured for `outer_loop` around Adam with a Nesterov
outer step, with and without `average_replicas` before it, and for Adam with gradients
that are averaged in every step. The table has the bytes that a chip sends through
collectives across replicas, the temporaries, and the bytes read and written in HBM by a
step that syncs and by one that does not, all in units of N, the bytes of the parameters
on a chip; and the number of collectives in a program.

Then two slices of eight chips, a replica on each, with a slow network between them: the
whole training step of a decoder with 6 layers of width 2,048, mapped by `vmap` and by
`shard_map`. The compiler turns transfers over the network into sends and receives,
which are counted inside and outside of branches. The table has the temporaries too.

Last, temporaries and time of four replicas on the CPU of this machine.

    python -m pip install -e ".[tpu-aot]"
    python benchmarks/replicas.py
    python benchmarks/replicas.py --quick    # one slice; checks the claim
"""

import functools
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

from optax_lookahead import average_replicas, outer_loop, replica_axes

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "examples"))
from messages import (
    BRANCHES,
    CALLS,
    COLLECTIVE,
    INSTRUCTION,
    computations,
    messages,
    nbytes,
)

SLICES = {"4x4": 16, "16x16": 256}
REPLICAS = 2, 4, 16
K = 5
HEAD, TOKENS = 128, 256  # of the training step on two slices
MAPPINGS = "vmap", "shard_map"
NESTEROV = optax.sgd(0.7, momentum=0.9, nesterov=True)
AVERAGED = optax.chain(average_replicas("replica"), NESTEROV)
EVERY_STEP, APART, TOGETHER = "data-parallel Adam", "outer_loop", "averaged at syncs"
FORMS = {
    EVERY_STEP: optax.adam(1e-3),
    APART: outer_loop(optax.adam(1e-3), NESTEROV, K),
    TOGETHER: outer_loop(optax.adam(1e-3), AVERAGED, K),
}


class Counts(NamedTuple):
    """Counts of a compiled step, in units of N except for the collectives."""

    sent: float  # in every step
    sent_at_sync: float  # in addition, by a step that syncs
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
    """Returns the step of all replicas, its state, and the axes of replicas in it."""
    state = jax.eval_shape(FORMS[form].init, params)
    axes = state_axes(form, state)
    step = jax.vmap(
        make_step(form), (0, axes, 0), (0, axes), axis_name="replica", **names
    )
    return step, state, axes


def state_axes(form: str, state: Any) -> Any:
    if form == EVERY_STEP:  # without lookahead, each replica has its own
        return jax.tree.map(lambda _: 0, state)
    return replica_axes(state)


def on_mesh(mesh: Mesh, x: Any, axis: int | None = 0) -> jax.ShapeDtypeStruct:
    """Returns the shape of all replicas' arrays, or of the one that they share."""
    shape, spec = x.shape, []
    if axis is not None:
        shape, spec = (mesh.shape["replica"], *x.shape), ["replica"]
        spec += ["fsdp" for size in x.shape[:1] if size % mesh.shape["fsdp"] == 0]
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    return jax.ShapeDtypeStruct(shape, x.dtype, sharding=sharding)


def count(slice_name: str, replicas: int, form: str, layers: int) -> Counts:
    slice_ = topologies.get_topology_desc(
        platform="tpu", topology_name=f"v5e:{slice_name}"
    )
    chips = len(slice_.devices)
    mesh = Mesh(np.array(slice_.devices).reshape(replicas, -1), ("replica", "fsdp"))
    params = decoder(layers)
    unit = sum(x.size for x in jax.tree.leaves(params)) * 4 * replicas / chips
    step, state, axes = map_step(form, params, spmd_axis_name="replica")
    params = jax.tree.map(functools.partial(on_mesh, mesh), params)
    state = jax.tree.map(functools.partial(on_mesh, mesh), state, axes)
    step = jax.jit(step, donate_argnums=(0, 1))
    compiled = step.lower(params, state, params).compile()
    text = compiled.as_text()
    sent = messages(text, chips, lambda i: i // (chips // replicas))
    return Counts(
        sent.always / unit,
        sent.in_branch / unit,
        sum(bool(COLLECTIVE.fullmatch(i.op)) for i in tpu_aot.instructions(text)),
        compiled.memory_analysis().temp_size_in_bytes / unit,
        *(total / unit for total in hbm_bytes(text)),
    )


def decoder(layers: int, width: int = 2048, vocabulary: int = 32768) -> Any:
    """Returns the shapes of a decoder's parameters."""
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        tpu_aot.transformer(width, layers, vocabulary),
        is_leaf=lambda x: isinstance(x, tuple),
    )


def loss_fn(params: Any, tokens: jax.Array) -> jax.Array:
    """Returns the loss of the decoder, with a temperature of its logits."""
    x = params["embedding"][tokens[:, :-1]]
    for name, layer in params.items():
        if not name.startswith("layer"):
            continue
        qkv = normed(x, layer["attention_norm"]) @ layer["qkv"]
        q, k, v = jnp.split(qkv.reshape(*qkv.shape[:2], -1, 3 * HEAD), 3, -1)
        heads = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + heads.reshape(x.shape) @ layer["out"]
        hidden = jax.nn.gelu(normed(x, layer["mlp_norm"]) @ layer["up"])
        x = x + hidden @ layer["down"]
    x = normed(x, params["final_norm"])
    logits = x @ params["embedding"].T / params["temperature"]
    return jnp.mean(
        optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    )


def normed(x: jax.Array, scale: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6) * scale


def count_two_slices(
    mapping: str, form: str, layers: int, *widths: int
) -> dict[str, float]:
    """Counts a whole training step of two replicas, each on its own slice."""
    slices = topologies.get_topology_desc(
        platform="tpu", topology_name="v5e:2x4", num_slices=2
    )
    devices = sorted(slices.devices, key=lambda device: (device.slice_index, device.id))
    mesh = Mesh(np.array(devices).reshape(2, -1), ("replica", "fsdp"))
    params = decoder(layers, *widths) | {
        "temperature": jax.ShapeDtypeStruct((), jnp.float32)
    }
    optimizer_step, state = make_step(form), jax.eval_shape(FORMS[form].init, params)
    axes = state_axes(form, state)

    def step(params, state, tokens):
        return optimizer_step(params, state, jax.grad(loss_fn)(params, tokens))

    if mapping == "vmap":
        names = {"axis_name": "replica", "spmd_axis_name": "replica"}
        step = jax.vmap(step, (0, axes, 0), (0, axes), **names)
    else:
        own, shared = PartitionSpec("replica"), PartitionSpec()
        spec = jax.tree.map(
            lambda _, axis: shared if axis is None else own, state, axes
        )
        step = jax.shard_map(
            jax.vmap(step, (0, axes, 0), (0, axes)),
            mesh=mesh,
            in_specs=(own, spec, own),
            out_specs=(own, spec),
            axis_names={"replica"},
        )
    tokens = jax.ShapeDtypeStruct((16, TOKENS + 1), jnp.int32)
    size = sum(x.size for x in jax.tree.leaves(params))
    params = jax.tree.map(functools.partial(on_mesh, mesh), params)
    state = jax.tree.map(functools.partial(on_mesh, mesh), state, axes)
    shardings = jax.tree.map(lambda x: x.sharding, (params, state))
    step = jax.jit(step, donate_argnums=(0, 1), out_shardings=shardings)
    # The compiler does not count arrays in on-chip memory as temporaries, so the
    # comparison would depend on how much of each program fits there.
    compiled = step.lower(params, state, on_mesh(mesh, tokens)).compile(
        compiler_options={"xla_vf_vmem_memory_space_assignment": False}
    )
    unit, text = size * 4 / 8, compiled.as_text()
    # Slices communicate by sends; collectives must be within a slice.
    if any(messages(text, 16, lambda i: i // 8)):
        raise AssertionError(f"{mapping}, {form}: a collective spans both slices")
    found = sends(text)
    return {
        "sends outside branches": len(found[False]),
        "in branches": len(found[True]),
        "sent in every step": sum(found[False]) / unit,
        "at a sync": sum(found[True]) / unit,
        "temporaries": compiled.memory_analysis().temp_size_in_bytes / unit,
    }


def sends(text: str) -> dict[bool, list[int]]:
    """Returns the bytes of each send, outside and inside of branches."""
    bodies, entry = computations(text)
    found = {False: [], True: []}

    def walk(name: str, in_branch: bool) -> None:
        for line in bodies[name]:
            match = INSTRUCTION.match(line)
            if not match:
                continue
            if match["op"] in ("send", "recv"):
                if "megascale" not in line:
                    raise ValueError(f"no transfer between slices: {line!r}")
                # The array, a context and a token.
                if match["op"] == "send":
                    found[in_branch].append(nbytes(match["shape"]) - 4)
            for several, one in BRANCHES.findall(line):
                for called in several.split(", ") if several else [one]:
                    walk(called, True)
            if match["op"] != "fusion":
                for called in CALLS.findall(line):
                    walk(called, in_branch)

    walk(entry, False)
    return found


def hbm_bytes(text: str) -> tuple[int, int]:
    """Returns the bytes that a step without a sync moves, and one with a sync."""
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

    def stacked(x, axis=0):
        return x if axis is None else jnp.array(jnp.broadcast_to(x, (4, *x.shape)))

    programs = {}
    for form in FORMS:
        mapped, _, axes = map_step(form, params)
        grads = jax.tree.map(stacked, params)
        state = jax.tree.map(stacked, FORMS[form].init(params), axes)
        carry = jax.tree.map(stacked, params), state
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
        sent = {EVERY_STEP: (1, 0), APART: (0, 0), TOGETHER: (0, 1)}[form]
        if not np.allclose([found.sent, found.sent_at_sync], sent, atol=0.01):
            raise AssertionError(f"{where}: sends {found.sent}, {found.sent_at_sync} N")


def check_two_slices(counts: dict[tuple[str, str], dict[str, float]]) -> None:
    for (mapping, form), found in counts.items():
        sent = found["sent in every step"], found["at a sync"]
        expected = {EVERY_STEP: (1, 0), APART: (0, 0), TOGETHER: (0, 1)}[form]
        # Small arrays are padded.
        if not np.allclose(sent, expected, atol=0.02):
            raise AssertionError(f"two slices, {mapping}, {form}: sends {sent} N")


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one slice, two layers")
    parser.add_json()
    args = parser.parse_args()
    tpu_aot.load_libtpu()
    slices, replicas, layers, of_two_slices = SLICES, REPLICAS, 8, (6, 2048, 8192)
    if args.quick:
        slices, replicas, layers, of_two_slices = ["4x4"], (4,), 2, (1, 512, 4096)
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
    pairs = list(itertools.product(MAPPINGS, FORMS))
    two = {
        pair: count_two_slices(*pair, *of_two_slices)
        for pair in progress(pairs, "program")
    }
    two_rows = [
        {"two slices of v5e 2x4": mapping, "form": form}
        | {name: tpu_aot.cell([x]) for name, x in found.items()}
        for (mapping, form), found in two.items()
    ]
    cpu = measure_cpu(1 if args.quick else 20)
    tables = markdown(rows), markdown(two_rows), "CPU, 4 replicas", markdown(cpu)
    print(environment(), *tables, sep="\n\n")
    write_rows(args.json, rows + two_rows + cpu)
    check_claim(counts)
    check_two_slices(two)


if __name__ == "__main__":
    main()
