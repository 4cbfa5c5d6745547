"""Claim: of all compiled Lookaheads, this one adds the least time to its inner step.

Compares `optax_lookahead` with `optax.lookahead`, with three wrappers for PyTorch
(`pytorch_optimizer`, `timm`, `torch_optimizer`) and with TensorFlow Addons, each around
the inner optimizer of its own framework, with the same arrays and gradients, k = 5 and
alpha = 0.5. Only the optimizer step is timed. For a peer that is not installed, a line
in the table says so.

If slow weights are accessed only at a sync, four steps are fast and the fifth is slow,
so whole cycles are timed; the table also has the slowest step of a cycle, which
determines latency. Every step is waited for. Each framework has a separate process,
since otherwise their thread pools would share the cores (and TensorFlow Addons needs
another NumPy). The processes take turns, with a cycle of each form in each round.
Ratios are of times in the same process and round.

The script also checks whether a form is Lookahead: it compares the parameters over
three cycles with Algorithm 1 in NumPy (`tests/helpers/reference.py`).

    python -m pip install -e ".[peers]"
    python benchmarks/peers.py            # 20 x 500,000 and 20 x 1,500,000 float32
    python benchmarks/peers.py --quick    # 20 x 50,000, fewer rounds
"""

import argparse
import contextlib
import json
import os
import pathlib
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from typing import Any, NamedTuple, NoReturn

import numpy as np
from tqdm import tqdm

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))

from helpers import reference  # noqa: E402
from peer_forms import ALPHA, INNER_ALONE  # noqa: E402

FRAMEWORKS = ("jax", "torch", "tensorflow")
INNERS = {"adam": reference.adamw, "sgd": reference.sgd}
# All on the CPU: with an accelerator that only some see, no comparison would be fair.
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
K = 5
CYCLES = 3
CHECK_RATE = 0.1  # large, so that a missed sync is detected
TOLERANCE = 1e-4  # float32 over 15 steps of values around 1; a missed sync gives 0.1


class PeerError(Exception):
    """A framework that is not installed or stopped working, in one line."""


class Peer:
    """The process of one framework."""

    def __init__(self, framework: str, python: str):
        self.framework = framework
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed in `close`
        self.process = subprocess.Popen(
            [python, str(HERE / "peer_forms.py"), framework],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=os.environ | ENVIRONMENT,
        )

    def ask(self, request: str, **arguments: Any) -> Any:
        with contextlib.suppress(BrokenPipeError):  # then it ended, and `tail` says why
            print(json.dumps([request, arguments]), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise PeerError(f"{self.framework}: it stopped.{self.tail()}")
        answer = json.loads(line)
        if "error" in answer:
            raise PeerError(f"{self.framework}: {answer['error']}")
        return answer

    def tail(self) -> str:
        """Returns the last line that the process wrote, if there is one."""
        self.log.seek(0)
        lines = self.log.read().strip().splitlines()
        return f" Its last line: {lines[-1]}" if lines else ""

    def close(self) -> None:
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()
        self.log.close()


class Row(NamedTuple):
    """Figures of one form, times in units of the mean step of its inner optimizer."""

    inner: str
    framework: str
    variant: str
    form: str
    milliseconds: float  # median over rounds of the mean step of a cycle
    low: float  # quartiles
    ratio: float  # and median of the same as a ratio
    high: float
    slowest: float  # the slowest position in a cycle, by its median over rounds
    extra: float  # bytes held beyond the inner optimizer's, in units of N
    deviation: float  # from Algorithm 1


def deviations(peer: Peer, inner: str) -> dict[str, float]:
    """Returns how far each form is from Algorithm 1 in three cycles."""
    rng = np.random.default_rng(0)
    sizes = (16, 1, 7)
    params = [rng.standard_normal(size).astype(np.float32) for size in sizes]
    targets = [rng.standard_normal(size) for size in sizes]
    trajectories = peer.ask(
        "check",
        inner=inner,
        rate=CHECK_RATE,
        k=K,
        steps=K * CYCLES,
        params=[p.tolist() for p in params],
        targets=[target.tolist() for target in targets],
    )
    start, target = np.concatenate(params).astype(float), np.concatenate(targets)
    result = {}
    for key, trajectory in trajectories.items():
        # The inner optimizer alone is Lookahead with k = alpha = 1.
        alone = key.endswith(f"/{INNER_ALONE}")
        k, alpha = (1, 1.0) if alone else (K, ALPHA)
        expected = reference.lookahead(
            INNERS[inner](CHECK_RATE),
            lambda theta, _step: theta - target,
            start,
            k,
            lambda _t, alpha=alpha: alpha,
            cycles=K * CYCLES // k,
        )
        fast = np.array([theta for theta, phi in expected])
        result[key] = float(np.max(np.abs(np.array(trajectory) - fast)))
    return result


def rows_of(
    peer: Peer,
    inner: str,
    unit: int,
    held: dict[str, int],
    deviation_of: dict[str, float],
    rounds: list[dict[str, list[float]]],
) -> list[Row]:
    rows = []
    for key in held:
        variant, form = key.split("/")
        alone = f"{variant}/{INNER_ALONE}"
        bases = [statistics.mean(times[alone]) for times in rounds]
        cycles = np.array([times[key] for times in rounds])
        ratios = cycles / np.array(bases)[:, None]
        low, ratio, high = statistics.quantiles(ratios.mean(axis=1), n=4)
        rows.append(
            Row(
                inner,
                peer.framework,
                variant,
                form,
                1000 * float(np.median(cycles.mean(axis=1))),
                low,
                ratio,
                high,
                float(np.max(np.median(ratios, axis=0))),
                (held[key] - held[alone]) / unit,
                deviation_of[key],
            )
        )
    return rows


def measure(
    peers: list[Peer], inner: str, leaves: int, size: int, rounds: int, bar: tqdm
) -> list[Row]:
    deviation_of = {peer: deviations(peer, inner) for peer in peers}
    held = {
        peer: peer.ask("build", inner=inner, leaves=leaves, size=size, k=K)
        for peer in peers
    }
    times: dict[Peer, list] = {peer: [] for peer in peers}
    for i in range(rounds):
        for peer in peers:
            times[peer].append(peer.ask("round", k=K, backwards=i % 2 == 1))
        bar.update()
    unit = 4 * leaves * size
    return [
        row
        for peer in peers
        for row in rows_of(
            peer, inner, unit, held[peer], deviation_of[peer], times[peer]
        )
    ]


def check_ours(rows: list[Row], unit: int) -> None:
    """Exits unless ours is Algorithm 1 and holds one more copy and two counters."""
    for row in rows:
        if row.form != "optax_lookahead":
            continue
        if row.deviation > TOLERANCE:
            stop(f"optax_lookahead differs from Algorithm 1 by {row.deviation:g}.")
        if round(row.extra * unit) != unit + 8:
            stop(
                f"optax_lookahead holds {round(row.extra * unit)} more bytes, not "
                f"{unit + 8}: the slow weights and two counters."
            )


def print_table(rows: list[Row], leaves: int, size: int, rounds: int) -> None:
    print(
        f"\n{leaves} x {size:,} float32, k = {K}, alpha = {ALPHA}, {rounds} rounds:\n"
    )
    print(
        "| inner | framework | form | step, ms | time / inner (quartiles) "
        "| slowest step / inner | held beyond inner / N | Algorithm 1 (deviation) |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        match = "yes" if row.deviation <= TOLERANCE else "no"
        print(
            f"| {row.inner} | {row.framework}, {row.variant} | {row.form} "
            f"| {row.milliseconds:.1f} "
            f"| {row.ratio:.2f} ({row.low:.2f} to {row.high:.2f}) | {row.slowest:.2f} "
            f"| {row.extra:.2f} | {match} ({row.deviation:.0e}) |"
        )


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        # One line, without argparse's usage before it.
        self.exit(2, f"{self.prog}: error: {message}\n")


def stop(message: str) -> NoReturn:
    print(f"peers.py: {message}", file=sys.stderr)
    raise SystemExit(1)


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument(
        "--sizes",
        type=int,
        nargs="+",
        default=[500_000, 1_500_000],
        metavar="SIZE",
        help="floats in each of the 20 arrays; the larger one needs 9 GB",
    )
    parser.add_argument(
        "--tensorflow-python",
        default=sys.executable,
        help="a Python with TensorFlow Addons",
    )
    parser.add_argument(
        "--json", type=pathlib.Path, metavar="FILE", help="for the rows"
    )
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error(f"--rounds must be at least 2, got {args.rounds}.")
    if min(args.sizes) < 1:
        parser.error(f"--sizes must be at least 1, got {min(args.sizes)}.")
    leaves, sizes, rounds = 20, args.sizes, args.rounds
    if args.quick:
        sizes, rounds = [50_000], min(rounds, 10)
    if shutil.which(args.tensorflow_python) is None:
        parser.error(f"--tensorflow-python: no such program: {args.tensorflow_python}.")
    pythons = {"tensorflow": args.tensorflow_python}
    versions, missing = {}, []
    peers, running = [], []
    try:
        for framework in FRAMEWORKS:
            peers.append(Peer(framework, pythons.get(framework, sys.executable)))
            try:
                about = peers[-1].ask("describe")
            except PeerError as error:
                if framework == "jax":
                    raise
                missing.append(str(error))
                continue
            running.append(peers[-1])
            versions |= about["versions"]
            missing += about["missing"]
        # The cores that `taskset` allows, where the system can tell.
        affinity = getattr(os, "sched_getaffinity", None)
        cores = len(affinity(0)) if affinity else os.cpu_count()
        print(
            ", ".join(f"{name} {version}" for name, version in versions.items())
            + f", CPU ({platform.machine()}, {cores} cores)"
        )
        every = []
        for size in sizes:
            rows = []
            with tqdm(total=len(INNERS) * rounds, unit="round") as bar:
                for inner in INNERS:
                    rows += measure(running, inner, leaves, size, rounds, bar)
            check_ours(rows, 4 * leaves * size)
            print_table(rows, leaves, size, rounds)
            for line in missing:
                print(f"| | | {line} | | | | | |")
            every += [{"leaves": leaves, "size": size} | row._asdict() for row in rows]
        if args.json:
            text = {"versions": versions, "rows": every}
            args.json.write_text(json.dumps(text, indent=1) + "\n")
    except PeerError as error:
        stop(str(error))
    finally:
        for peer in peers:
            peer.close()


if __name__ == "__main__":
    main()
