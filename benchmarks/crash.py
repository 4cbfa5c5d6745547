"""Claim: a run that is killed many times ends bit for bit as one that is not.

The trainer, an MLP on scikit-learn's digits, is a separate process that saves
parameters and optimizer state every few steps with Orbax's asynchronous
`CheckpointManager`. It is killed with SIGKILL at random moments of three kinds: while a
checkpoint is being written, around an ordinary step, and while it restores after a
restart. Each restart resumes from the newest complete checkpoint. At the end, all
arrays are compared with those of a run of as many steps that is never killed. The
script exits with 1 if any bit differs.

A kill counts as inside a save if it left an unfinished checkpoint on the disk.

    python benchmarks/crash.py               # 24 kills, a minute or two
    python benchmarks/crash.py --kills 100 --seed 1
"""

import collections
import contextlib
import math
import multiprocessing
import pathlib
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, NoReturn

import flax.linen as nn
import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from timing import Parser
from tqdm import tqdm

from optax_lookahead import lookahead

K = 5
SAVE_EVERY = 3  # not a divisor of k, so that checkpoints fall on every step of a cycle
BATCH = 64
SECONDS = 300  # the hard limit for everything


class Data(NamedTuple):
    """Images, shape `[n, 64]` in [0, 1], and their labels."""

    x: np.ndarray
    y: np.ndarray


def load_data() -> Data:
    # Not imported in every trainer, which would take a third longer to start.
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return Data((x / 16).astype(np.float32), y)


def trainer(folder: pathlib.Path, data: Data, connection: Connection) -> None:
    """Trains until told to stop; announces each event and waits for permission."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C: the parent cleans up

    def may(event: str, step: int) -> bool:
        connection.send((event, step))
        return connection.recv()

    model = nn.Sequential([nn.Dense(32), nn.relu, nn.Dense(10)])
    alpha = optax.linear_schedule(0.5, 0.8, transition_steps=10)
    tx = lookahead(optax.adam(0.01), k=K, alpha=alpha)

    @jax.jit
    def create():
        params = model.init(jax.random.key(0), data.x[:1])
        return params, tx.init(params)

    @jax.jit
    def train_step(params, state, x, y):
        def loss(params):
            logits = model.apply(params, x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    may("restore", 0)
    options = ocp.CheckpointManagerOptions(max_to_keep=2, cleanup_tmp_directories=True)
    with ocp.CheckpointManager(folder, options=options) as manager:
        step = manager.latest_step() or 0
        if step:
            abstract = ocp.args.StandardRestore(jax.eval_shape(create))
            params, state = manager.restore(step, args=abstract)
        else:
            params, state = create()
        may("resumed", step)
        while may("step", step):
            batch = np.random.default_rng(step).integers(len(data.y), size=BATCH)
            x, y = data.x[batch], data.y[batch]
            params, state = train_step(params, state, x, y)
            step += 1
            if step % SAVE_EVERY == 0:
                may("save", step)
                manager.save(step, args=ocp.args.StandardSave((params, state)))
    leaves = jax.tree.leaves_with_path((params, state))
    arrays = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
    connection.send(("ended", arrays))


class Doom(NamedTuple):
    """When to kill: `delay` seconds after the trainer began its n-th `event`."""

    event: str
    n: int
    delay: float


class Kill(NamedTuple):
    """When a trainer was killed."""

    doom: Doom
    resumed: int | None  # the step that the trainer resumed from, None before it did
    step: int  # the last one that it began
    in_save: bool


class Runner:
    """Runs trainers on one folder, and never past `deadline`."""

    def __init__(self, folder: str, data: Data, deadline: float):
        self.folder = pathlib.Path(folder)
        self.data = data
        self.deadline = deadline

    @contextlib.contextmanager
    def life(self) -> Iterator[tuple[Any, Connection]]:
        # A fresh interpreter each time, as after a real crash.
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        args = self.folder, self.data, theirs
        process = context.Process(target=trainer, args=args, daemon=True)
        process.start()
        try:
            theirs.close()  # or the end of the process would not be noticed
            yield process, ours
        finally:
            process.kill()
            process.join()
            ours.close()

    def hear(self, process: Any, connection: Connection) -> tuple[str, Any]:
        if not connection.poll(max(0.0, self.deadline - time.monotonic())):
            stop(f"not finished within the limit of {SECONDS} s. Lower --kills.")
        try:
            return connection.recv()
        except EOFError:
            process.join()
            stop(f"the trainer died by itself, exit code {process.exitcode}.")

    def unfinished(self, step: int | str = "*") -> bool:
        return any(self.folder.glob(f"{step}.orbax-checkpoint-tmp*"))

    def doomed(self, doom: Doom) -> Kill:
        """Kills one trainer as `doom` says, and returns when that was."""
        resumed, step, n = None, 0, 0
        with self.life() as (process, connection):
            while n < doom.n:
                event, step = self.hear(process, connection)
                if event == "resumed":
                    resumed = step
                n += event == doom.event
                connection.send(True)
            if doom.event == "save":
                self.await_begin_of_save(step)
            time.sleep(doom.delay)
        if process.exitcode != -signal.SIGKILL:
            stop(f"the trainer died by itself, exit code {process.exitcode}.")
        # Before a trainer cleans up, unfinished checkpoints are those of earlier kills.
        return Kill(doom, resumed, step, doom.event != "restore" and self.unfinished())

    def await_begin_of_save(self, step: int) -> None:
        while time.monotonic() < self.deadline:
            if self.unfinished(step) or (self.folder / str(step)).exists():
                return
            time.sleep(0.001)

    def to_the_end(self, steps: int) -> tuple[int, dict[str, np.ndarray]]:
        """Returns where a trainer resumed and all its arrays after step `steps`."""
        resumed = 0
        with self.life() as (process, connection):
            while True:
                event, value = self.hear(process, connection)
                if event == "ended":
                    return resumed, value
                if event == "resumed":
                    resumed = value
                connection.send(event != "step" or value < steps)


def inside(kills: list[Kill]) -> int:
    return sum(kill.in_save for kill in kills)


def draw_doom(rng: np.random.Generator, number: int) -> Doom:
    """Draws when to kill: half in a save, most of these after one that succeeded."""
    match ("save", "step", "save", "restore")[number % 4]:
        case "save":
            return Doom("save", int(rng.integers(2, 4)), rng.uniform(0, 0.05))
        case "step":
            n = int(rng.integers(1, 3 * SAVE_EVERY + 1))
            return Doom("step", n, rng.uniform(0, 0.05))
        case _:
            return Doom("restore", 1, rng.uniform(0, 0.2))


def stop(message: str) -> NoReturn:
    print(f"crash.py: {message}", file=sys.stderr)
    raise SystemExit(1)


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.kills < 1:
        parser.error(f"--kills must be at least 1, got {args.kills}.")
    rng = np.random.default_rng(args.seed)
    start = time.monotonic()
    deadline = start + SECONDS
    data = load_data()
    kills: list[Kill] = []
    print(f"jax {jax.__version__}, orbax {ocp.__version__}, k = {K}")
    with (
        tempfile.TemporaryDirectory() as killed_folder,
        tempfile.TemporaryDirectory() as folder,
        tqdm(total=args.kills + 2, unit="run") as bar,
    ):
        runner = Runner(killed_folder, data, deadline)
        # A kill aimed at a save may come too late, so there may be more kills.
        while len(kills) < args.kills or 4 * inside(kills) < args.kills:
            kill = runner.doomed(draw_doom(rng, len(kills)))
            kills.append(kill)
            bar.update()
            where = ", inside a save" if kill.in_save else ""
            resumed = "-" if kill.resumed is None else kill.resumed
            bar.write(
                f"kill {len(kills):3d}: resumed from step {resumed:>3}, killed "
                f"{1000 * kill.doom.delay:3.0f} ms into {kill.doom.event} "
                f"{kill.step:3d}{where}",
                file=sys.stdout,
            )
        # Two steps past a sync and past a checkpoint.
        period = math.lcm(K, SAVE_EVERY)
        steps = max(kill.step for kill in kills) // period * period + period + 2
        resumed, got = runner.to_the_end(steps)
        bar.update()
        _, expected = Runner(folder, data, deadline).to_the_end(steps)
        bar.update()
    restarts = [kill.resumed for kill in kills[1:] if kill.resumed is not None]
    positions = collections.Counter(step % K for step in [*restarts, resumed])
    print(f"kills: {len(kills)}, inside a save: {inside(kills)}")
    print(f"restarts resumed from step: {[*restarts, resumed]}")
    print(f"restarts by steps since the last sync: {dict(sorted(positions.items()))}")
    print(f"steps: {steps}, seconds: {time.monotonic() - start:.0f}")
    if got.keys() != expected.keys():
        stop(f"the runs ended with other arrays: {got.keys() ^ expected.keys()}.")
    largest = max(
        float(np.max(np.abs(got[name].astype(float) - array)))
        for name, array in expected.items()
    )
    differ = [name for name in got if got[name].tobytes() != expected[name].tobytes()]
    print(
        f"largest difference to the run never killed: {largest:g}, arrays that differ "
        f"in any bit: {len(differ)} of {len(expected)}"
    )
    if differ:
        stop(f"these arrays differ: {', '.join(differ)}.")


if __name__ == "__main__":
    # So that SIGTERM also runs `finally`.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
    except KeyboardInterrupt:
        stop("interrupted.")
