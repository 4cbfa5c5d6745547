"""Train one model in several processes, sharded over all their devices.

Starts processes under `jax.distributed` on this machine, each with four virtual CPU
devices. Together they train the CNN of `digits.py` with lookahead around Adam. The
parameters, the slow weights and Adam's moments are sharded over all devices (FSDP), and
so is each batch. In the middle of a cycle the state goes to an Orbax checkpoint, is
deleted, and comes back from it, each shard to its device. One more process runs the
same training on one device, without the checkpoint, and the weights are compared.
It is float64, in which the two agree to rounding; in float32 training amplifies that.

    python examples/multiprocess.py
    python examples/multiprocess.py --processes 4 --steps 403 --folder run

It needs its neighbours `digits.py` and `command_line.py`, and Linux or macOS. In a
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

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from command_line import Parser
from digits import CNN, accuracy, load_data, loss_fn
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from optax_lookahead import lookahead, slow_params

DEVICES = 4  # of a process
IMAGES = 4  # of a batch on each device
K, ALPHA = 5, 0.5
TAIL = 20  # lines of what a process wrote that died
TOLERANCE = 1e-9


def train(args: argparse.Namespace, checkpoint: pathlib.Path | None, progress):
    """Trains on all devices of all processes; returns the weights and some figures."""
    data, tx = load_data(), lookahead(optax.adam(0.01), K, ALPHA)
    mesh = Mesh(np.array(jax.devices()), ("devices",))
    replicated = NamedSharding(mesh, PartitionSpec())
    by_row = NamedSharding(mesh, PartitionSpec("devices"))

    def step_fn(state, x, y):
        # Each device computes on its rows with whole parameters, which it has only
        # here. Without this the compiler splits layers too, and moves more data.
        params = jax.lax.with_sharding_constraint(state["params"], replicated)
        loss, grads = jax.value_and_grad(loss_fn)(params, x, y)
        updates, opt_state = tx.update(grads, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        return {"params": params, "opt_state": opt_state}, loss

    def read(state):
        slow = slow_params(state["opt_state"], state["params"])
        return {"fast": state["params"], "slow": slow}

    def put(rows: np.ndarray) -> jax.Array:
        # A process passes only its own rows, so it need not have read the others.
        mine = np.split(rows, jax.process_count())[jax.process_index()]
        return jax.make_array_from_process_local_data(by_row, mine)

    params = initial_params(data.train_x[:1], mesh)
    shardings = jax.tree.map(lambda x: shard(x, mesh), jax.eval_shape(tx.init, params))
    opt_state = jax.jit(tx.init, out_shardings=shardings)(params)
    state = {"params": params, "opt_state": opt_state}
    shardings = jax.tree.map(lambda x: x.sharding, state)
    train_step = jax.jit(
        step_fn, donate_argnums=0, out_shardings=(shardings, replicated)
    )
    rng, steps_since_sync = np.random.default_rng(0), None
    for step in range(args.steps):
        if checkpoint and step == checkpoint_step(args):
            state = save_and_restore(state, checkpoint)
            steps_since_sync = int(state["opt_state"].steps_since_sync)
        rows = rng.integers(len(data.train_x), size=batch_size(args))
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


def initial_params(x: np.ndarray, mesh: Mesh):
    """Draws parameters in shards, so that no device ever holds the whole model.

    By NumPy, which gives every process the same numbers, in float64.
    """
    rng = np.random.default_rng(0)

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        scale = np.prod(leaf.shape[:-1]) ** -0.5 if leaf.ndim > 1 else 0.0
        whole = rng.normal(scale=scale, size=leaf.shape)
        return jax.make_array_from_callback(
            leaf.shape, shard(leaf, mesh), lambda index: whole[index]
        )

    return jax.tree.map(draw, jax.eval_shape(CNN().init, jax.random.key(0), x))


def evaluate(params) -> dict[str, float]:
    data = load_data()
    return {
        "loss": float(loss_fn(params, data.train_x, data.train_y)),
        "accuracy": 100 * float(accuracy(params, data.test_x, data.test_y)),
    }


def shard(x: jax.ShapeDtypeStruct, mesh: Mesh) -> NamedSharding:
    """Splits the first dimension that divides; without one, replicates."""
    for axis, size in enumerate(x.shape):
        if size % mesh.size == 0:
            return NamedSharding(mesh, PartitionSpec(*axis * [None], "devices"))
    return NamedSharding(mesh, PartitionSpec())


def checkpoint_step(args: argparse.Namespace) -> int:
    """Returns the middle of the training, or the next step inside a cycle."""
    middle = args.steps // 2
    return middle + (middle % K == 0)


def batch_size(args: argparse.Namespace) -> int:
    return args.processes * DEVICES * IMAGES


def save_and_restore(state, path: pathlib.Path):
    """Returns the state as a new run would find it, in the same shards."""
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, state)
        checkpointer.wait_until_finished()
        jax.tree.map(lambda x: x.delete(), state)
        return checkpointer.restore(path, target)


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
        # In float32 roundings could end as differences of 0.1: Adam divides small
        # gradients by their size, and a ReLU near 0 may open in one of the trainings.
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
            figures |= evaluate(weights["slow"])
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
    """Keeps a free port from everybody but the coordinator, which process 0 starts.

    A port that is looked up and closed again could be taken before the coordinator
    binds it, seconds later. This socket stays bound, but doesn't listen; the
    coordinator may bind the port too, since gRPC sets the same option.
    """
    with socket.socket() as reservation:
        reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        reservation.bind(("127.0.0.1", 0))
        yield reservation.getsockname()[1]


def run_children(args: argparse.Namespace, folder: pathlib.Path) -> None:
    """Runs all processes to their end; whatever happens, none is left behind."""
    ranks = {f"process-{rank}": rank for rank in range(args.processes)}
    children, context = [], multiprocessing.get_context("spawn")
    with reserved_port() as port:
        try:
            # Ctrl-C goes to children too; they inherit that it is ignored, and are
            # stopped below.
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
            print(f"{', '.join(pids[:-1])}\nto compare, one device: {pids[-1]}")
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
    """Prints what both trainings came to; fails if their weights differ."""
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
        "the devices' shares of a gradient are added up in another order)"
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
        "--processes", type=int, default=2, help="best a power of 2, to divide layers"
    )
    parser.add_argument("--steps", type=int, default=203, help="updates")
    parser.add_argument(
        "--folder", type=pathlib.Path, help="keeps weights and checkpoint; must be new"
    )
    parser.add_argument("--timeout", type=float, default=300, help="of all, in seconds")
    args = parser.parse_args(argv)
    parser.check_counts(args, "processes")
    if args.steps < 2:
        parser.error(f"--steps must be at least 2, got {args.steps}.")
    if not args.timeout > 0:
        parser.error(f"--timeout must be positive, got {args.timeout:g}.")
    if args.folder and (args.folder.exists() or not args.folder.parent.is_dir()):
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
        folder.mkdir()
        run_children(args, folder)
        report(args, folder)


if __name__ == "__main__":
    main()
