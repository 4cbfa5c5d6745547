"""Train one model in several processes, sharded over all their devices.

It starts processes under `jax.distributed` on this machine, each with four virtual CPU
devices. Together they train the CNN of `digits.py` with lookahead around Adam. The
parameters, the slow weights and Adam's moments are sharded over all devices (FSDP), and
so is each batch. In the middle of a cycle the state is saved to an Orbax checkpoint,
deleted, and restored, each shard to its device. One more process runs the same training
on one device, without the checkpoint, and the weights are compared. The training is in
float64, where the two agree to rounding; in float32 it would amplify rounding errors.

With `--replicas` each process trains its own replica, sharded over its devices, and
they communicate at syncs only: `outer_loop` with `average_replicas` and a Nesterov
step. With `--resume` a run that was killed continues from its checkpoint.

    python examples/multiprocess.py
    python examples/multiprocess.py --processes 4 --steps 403 --folder run
    python examples/multiprocess.py --replicas --folder run
    python examples/multiprocess.py --replicas --folder run --resume

It needs `digits.py` and `command_line.py` in the same folder, and Linux or macOS. In a
cluster start one process on each host and call `jax.distributed.initialize` there;
`train` stays as it is.
"""

import argparse
import contextlib
import json
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from command_line import Parser
from digits import CNN, accuracy, load_data, loss_fn
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from optax_lookahead import (
    average_replicas,
    lookahead,
    outer_loop,
    replica_axes,
    slow_params,
)

DEVICES = 4  # per process
IMAGES = 4  # of each batch, per device
K, ALPHA = 5, 0.5
TAIL = 20  # lines to show from the log of a process that died
TOLERANCE = 1e-9


def make_optimizer(args: argparse.Namespace) -> optax.GradientTransformation:
    if not args.replicas:
        return lookahead(optax.adam(0.01), K, ALPHA)
    nesterov = optax.sgd(0.7, momentum=0.9, nesterov=True)
    outer = optax.chain(average_replicas("replica"), nesterov)
    return outer_loop(optax.adam(0.01), outer, K)


def train(args: argparse.Namespace, checkpoint: pathlib.Path | None, progress):
    """Trains on all devices of all processes; returns the weights and some numbers."""
    data, tx = load_data(), make_optimizer(args)
    devices = np.array(jax.devices()).reshape(jax.process_count(), -1)
    mesh = Mesh(devices, ("replica", "device"))
    replicated = NamedSharding(mesh, PartitionSpec())
    spec = ("replica", "device") if args.replicas else (("replica", "device"),)
    by_row = NamedSharding(mesh, PartitionSpec(*spec))
    params = initial_params(data.train_x[:1], mesh, args)

    def step_fn(state, x, y):
        # Here, and only here, each device gathers whole parameters for its rows.
        # Without this the compiler splits layers too, and moves more data.
        params = jax.lax.with_sharding_constraint(state["params"], replicated)
        loss, grads = jax.value_and_grad(loss_fn)(params, x, y)
        updates, opt_state = tx.update(grads, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        return {"params": params, "opt_state": opt_state}, loss

    init, axes = tx.init, replica_axes(jax.eval_shape(tx.init, params))
    if args.replicas:
        init = jax.vmap(tx.init, out_axes=axes)
        in_axes = {"params": 0, "opt_state": axes}
        names = {"axis_name": "replica", "spmd_axis_name": "replica"}
        step_fn = jax.vmap(step_fn, (in_axes, 0, 0), (in_axes, 0), **names)

    def read(state):
        slow = slow_params(state["opt_state"], state["params"])
        return {"fast": state["params"], "slow": slow}

    def put(rows: np.ndarray) -> jax.Array:
        # A process passes only its own rows, so it need not have read the others.
        mine = np.split(rows, jax.process_count())[jax.process_index()]
        return jax.make_array_from_process_local_data(by_row, mine)

    shapes = jax.eval_shape(init, params)
    shardings = jax.tree.map(lambda x, axis: shard(x, mesh, args, axis), shapes, axes)
    opt_state = jax.jit(init, out_shardings=shardings)(params)
    state = {"params": params, "opt_state": opt_state}
    shardings = jax.tree.map(lambda x: x.sharding, state)
    per_replica = NamedSharding(mesh, PartitionSpec("replica"))
    losses = per_replica if args.replicas else replicated
    train_step = jax.jit(step_fn, donate_argnums=0, out_shardings=(shardings, losses))
    rng, steps_since_sync = np.random.default_rng(0), None
    for step in range(args.steps):
        rows = rng.integers(len(data.train_x), size=batch_shape(args))
        if checkpoint and step < checkpoint_step(args) and args.resume:
            progress.write(b".")
            continue  # after drawing the rows, so that later rows are the same
        if checkpoint and step == checkpoint_step(args):
            if not args.resume:
                save(state, checkpoint)
            state = restore(state, checkpoint, step)
            steps_since_sync = int(state["opt_state"].steps_since_sync)
        state, loss = train_step(
            state, put(data.train_x[rows]), put(data.train_y[rows])
        )
        loss.block_until_ready()
        progress.write(b".")
    weights = jax.jit(read, out_shardings=replicated)(state)
    leaves = jax.tree.leaves(state)
    return jax.tree.map(np.asarray, weights), {
        "steps_since_sync": steps_since_sync,
        "bytes": sum(x.nbytes for x in leaves),
        "bytes_on_a_device": sum(x.addressable_data(0).nbytes for x in leaves),
    }


def initial_params(x: np.ndarray, mesh: Mesh, args: argparse.Namespace):
    """Draws parameters in shards, so that no device ever holds the whole model.

    With NumPy, which gives every process the same numbers, in float64. All replicas
    start from the same parameters.
    """
    rng = np.random.default_rng(0)

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        scale = np.prod(leaf.shape[:-1]) ** -0.5 if leaf.ndim > 1 else 0.0
        whole = rng.normal(scale=scale, size=leaf.shape)
        if args.replicas:
            whole = np.broadcast_to(whole, (args.processes, *leaf.shape))
        return jax.make_array_from_callback(
            whole.shape, shard(whole, mesh, args), lambda index: whole[index]
        )

    return jax.tree.map(draw, jax.eval_shape(CNN().init, jax.random.key(0), x))


def evaluate(params) -> dict[str, float]:
    data = load_data()
    return {
        "loss": float(loss_fn(params, data.train_x, data.train_y)),
        "accuracy": 100 * float(accuracy(params, data.test_x, data.test_y)),
    }


def shard(
    x: Any, mesh: Mesh, args: argparse.Namespace, axis: int | None = 0
) -> NamedSharding:
    """Shards the first dimension that the number of devices divides, or replicates.

    It shards over all devices or, with replicas on the first axis, over those of a
    replica. `axis` is None for what all replicas share.
    """
    first = int(args.replicas and axis is not None)
    spec: list[Any] = ["replica"][:first]
    names, parts = ("replica", "device"), mesh.size
    if args.replicas:
        names, parts = "device", mesh.shape["device"]
    for size in x.shape[first:]:
        if size % parts == 0:
            return NamedSharding(mesh, PartitionSpec(*spec, names))
        spec.append(None)
    return NamedSharding(mesh, PartitionSpec(*spec[:first]))


def checkpoint_step(args: argparse.Namespace) -> int:
    """Returns the middle of the training, or the next step if a cycle starts there."""
    middle = args.steps // 2
    return middle + (middle % K == 0)


def batch_shape(args: argparse.Namespace) -> tuple[int, ...]:
    rows = DEVICES * IMAGES
    return (args.processes, rows) if args.replicas else (args.processes * rows,)


def save(state, path: pathlib.Path) -> None:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, state)
        checkpointer.wait_until_finished()


def restore(state, path: pathlib.Path, step: int):
    """Returns the saved state, sharded as the given one, which is deleted."""
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    jax.tree.map(lambda x: x.delete(), state)
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(path, target)
    opt_state = restored["opt_state"]
    saved = int(opt_state.sync_count) * K + int(opt_state.steps_since_sync)
    if saved != step:
        raise ValueError(f"the checkpoint is of update {saved}, not of {step}")
    return restored


def run_child(
    name: str, rank: int | None, args: argparse.Namespace, folder: pathlib.Path, port
) -> None:
    """Trains as process `rank` of several or, if that is None, alone."""
    threading.Thread(target=exit_with_parent, daemon=True).start()
    with open(folder / f"{name}.log", "w") as log:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(log.fileno(), stream.fileno())
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", 1 if rank is None else DEVICES)
        # In float32 rounding errors could grow to differences of 0.1: Adam divides
        # small gradients by their size, and a ReLU near 0 may be on in one run only.
        jax.config.update("jax_enable_x64", True)
        if rank is not None:
            join_cluster(rank, args.processes, f"127.0.0.1:{port}")
        checkpoint = None if rank is None else folder / "checkpoint"
        with open(folder / f"{name}.progress", "wb", buffering=0) as progress:
            weights, figures = train(args, checkpoint, progress)
        if not rank:
            flat = {
                jax.tree_util.keystr(path, simple=True, separator="/"): leaf
                for path, leaf in jax.tree.leaves_with_path(weights)
            }
            np.savez(folder / f"{name}.npz", **flat)
            slow = weights["slow"]
            if args.replicas:
                slow = jax.tree.map(lambda x: x[0], slow)
            figures |= evaluate(slow)
            (folder / f"{name}.json").write_text(json.dumps(figures))
    except BaseException:
        traceback.print_exc()
        # At once: an ordinary exit first waits, in jax.distributed.shutdown, for the
        # other processes, and these wait in a collective for this one.
        os._exit(1)


def exit_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def join_cluster(rank: int, processes: int, address: str) -> None:
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        del os.environ[name]  # gRPC would look for 127.0.0.1 behind the proxy
    jax.distributed.initialize(
        address,
        num_processes=processes,
        process_id=rank,
        cluster_detection_method="deactivate",
        coordinator_bind_address=address,  # not on all interfaces
    )


@contextlib.contextmanager
def reserved_port() -> Iterator[int]:
    """Reserves a free port for the coordinator, which process 0 starts.

    A port that is looked up and closed again could be taken before the coordinator
    binds it, seconds later. This socket stays bound, but doesn't listen; the
    coordinator may bind the port too, since gRPC sets the same option.
    """
    with socket.socket() as reservation:
        reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        reservation.bind(("127.0.0.1", 0))
        yield reservation.getsockname()[1]


def run_children(args: argparse.Namespace, folder: pathlib.Path) -> None:
    """Runs all processes until they end, and leaves none running if one fails."""
    ranks = {f"process-{rank}": rank for rank in range(args.processes)}
    children, context = [], multiprocessing.get_context("spawn")
    with reserved_port() as port:
        try:
            # Ctrl-C also reaches the children; they inherit that it is ignored, and
            # are stopped below.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            for name, rank in {**ranks, "alone": None}.items():
                child = context.Process(
                    target=run_child, name=name, args=(name, rank, args, folder, port)
                )
                child.start()
                children.append(child)
            signal.signal(signal.SIGINT, stop)
            pids = [f"{child.name} (pid {child.pid})" for child in children]
            print(f"{args.processes} processes of {DEVICES} CPU devices:", end=" ")
            print(f"{', '.join(pids[:-1])}\nfor comparison, one device: {pids[-1]}")
            sys.stdout.flush()
            wait(children, args, folder)
        finally:
            # Not SIGTERM, which jax.distributed catches.
            for child in children:
                child.kill()
            for child in children:
                child.join()


def wait(children, args: argparse.Namespace, folder: pathlib.Path) -> None:
    """Waits until all children have ended, or until the first one has failed."""
    running = {child.sentinel: child for child in children}
    deadline = time.monotonic() + args.timeout
    with tqdm(total=len(children) * args.steps, unit="step", leave=False) as bar:
        while running:
            failed = []
            for sentinel in multiprocessing.connection.wait(running, timeout=0.1):
                child = running.pop(sentinel)
                child.join()
                if child.exitcode:
                    failed.append(child)
            done = {child.name: count_steps(child, folder) for child in children}
            if not all(done.values()):
                bar.unpause()  # leaves the time to compile out of the estimate
            bar.update(sum(done.values()) - bar.n)
            if failed:
                bar.close()
                sys.exit("\n".join(describe(child, done, folder) for child in failed))
            if time.monotonic() > deadline:
                bar.close()
                still = ", ".join(
                    f"{child.name} after {done[child.name]} updates"
                    for child in running.values()
                )
                sys.exit(f"error: over the --timeout of {args.timeout:g} s: {still}.")


def count_steps(child, folder: pathlib.Path) -> int:
    progress = folder / f"{child.name}.progress"
    return progress.stat().st_size if progress.exists() else 0


def describe(child, done: dict[str, int], folder: pathlib.Path) -> str:
    cause = f"exit code {child.exitcode}"
    if child.exitcode < 0:
        cause += f", {signal.Signals(-child.exitcode).name}"
    log = folder / f"{child.name}.log"
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    tail = "".join(f"\n    {line}" for line in lines[-TAIL:] or ["(nothing)"])
    return (
        f"error: {child.name} (pid {child.pid}) died after {done[child.name]} updates "
        f"({cause}), so all were stopped. The end of what it wrote:{tail}"
    )


def report(args: argparse.Namespace, folder: pathlib.Path) -> None:
    """Prints the results of both trainings; fails if their weights differ."""
    several, alone = (
        json.loads((folder / f"{name}.json").read_text())
        for name in ("process-0", "alone")
    )
    share = several["bytes_on_a_device"] / 1000
    print(
        f"state: {several['bytes'] / 1000:.1f} kB, of which a device holds {share:.1f}"
        f"\ncheckpoint: after update {checkpoint_step(args)}, with "
        f"{several['steps_since_sync']} of {K} updates of its cycle done\n"
    )
    print(f"{'':<26}{'training loss':>15}{'test accuracy':>15}")
    devices = args.processes * DEVICES
    for label, figures in (
        (f"{args.processes} processes, {devices} devices", several),
        ("1 process, 1 device", alone),
    ):
        print(f"{label:<26}{figures['loss']:>15.5f}{figures['accuracy']:>13.1f} %")
    largest = largest_differences(folder)
    print(
        f"\nlargest difference: {largest['fast']:.1e} in the parameters, "
        f"{largest['slow']:.1e} in the slow weights\n(tolerance {TOLERANCE:g}; "
        "the devices' parts of a gradient are summed in another order)"
    )
    if not all(x <= TOLERANCE for x in largest.values()):  # NaN too
        sys.exit("error: the weights differ by more than the tolerance.")


def largest_differences(folder: pathlib.Path) -> dict[str, float]:
    """Returns the largest absolute difference of the fast and of the slow weights."""
    largest = {"fast": 0.0, "slow": 0.0}
    with (
        np.load(folder / "process-0.npz") as several,
        np.load(folder / "alone.npz") as alone,
    ):
        for name in alone:
            difference = np.max(np.abs(several[name] - alone[name]))
            kind = name.split("/")[0]
            largest[kind] = float(np.maximum(largest[kind], difference))
    return largest


def stop(signum: int, _frame) -> None:
    print(f"\nstopped by {signal.Signals(signum).name}", file=sys.stderr)
    sys.exit(128 + signum)


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--processes", type=int, default=2, help="preferably a power of 2"
    )
    parser.add_argument("--steps", type=int, default=203, help="updates")
    parser.add_argument(
        "--replicas",
        action="store_true",
        help="one replica per process; they communicate at syncs",
    )
    parser.add_argument(
        "--folder", type=pathlib.Path, help="keeps weights and checkpoint; must be new"
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue from the checkpoint in --folder"
    )
    parser.add_argument("--timeout", type=float, default=300, help="of all, in seconds")
    args = parser.parse_args(argv)
    parser.check_counts(args, "processes")
    if args.steps < 2:
        parser.error(f"--steps must be at least 2, got {args.steps}.")
    if not args.timeout > 0:
        parser.error(f"--timeout must be positive, got {args.timeout:g}.")
    if args.resume:
        if not args.folder or not (args.folder / "checkpoint").is_dir():
            parser.error(
                "--resume needs a --folder with a checkpoint, got "
                f"{args.folder or 'none'}."
            )
    elif args.folder and (args.folder.exists() or not args.folder.parent.is_dir()):
        parser.error(
            f"--folder must be a new folder in an existing one, got {args.folder}."
        )
    return args


def main() -> None:
    args = parse_args(sys.argv[1:])
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, stop)
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.folder or pathlib.Path(temporary, "run")).absolute()
        folder.mkdir(exist_ok=args.resume)
        run_children(args, folder)
        report(args, folder)


if __name__ == "__main__":
    main()
