"""Shared by the benchmarks: counting what programs do, and timing them in turns."""

import argparse
import functools
import json
import os
import pathlib
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, NoReturn

import jax
import optax

LEAST_ROUNDS = 5
LEAST_ROUND = 0.02  # seconds, so that reading the clock hardly matters
# Instructions that only rename bytes.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast"}
HEAD = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{$")
INSTRUCTION = re.compile(r" += .*? ([a-z][a-z0-9-]*)\((.*)")


class Counts(NamedTuple):
    """What the compiler says about one run of a program, in bytes."""

    accessed: int  # read and written by its kernels, from a cache or not
    temporary: int
    arguments: int
    aliased: int  # results that are written over arguments
    peak: int  # all that a step needs at once


def nbytes(tree: Any) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def kernels(text: str) -> int:
    """Returns how many instructions of a text of optimized HLO launch something.

    A conditional counts as its longer branch, a loop as one iteration.
    """
    bodies: dict[str, list[tuple[str, str]]] = {}
    name = ""
    for line in text.splitlines():
        if head := HEAD.match(line):
            name = "ENTRY" if head[1] else head[2]
            bodies[name] = []
        elif name and (found := INSTRUCTION.search(line)):
            bodies[name].append((found[1], found[2].partition(", metadata=")[0]))

    def count(name):
        return sum(launches(*instruction) for instruction in bodies[name])

    def launches(op, rest):
        if op in FREE or op.endswith("-done"):
            return 0
        if op not in {"call", "while", "conditional"}:
            return 1
        words = re.findall(r"[\w.-]+", rest.partition("), ")[2])
        called = [count(word) for word in words if word in bodies]
        return max(called) if op == "conditional" else sum(called)

    return count("ENTRY")


class Program:
    """A compiled step and its carry, which is donated.

    `step(carry, *inputs)` returns the next carry. It is compiled here.
    """

    def __init__(self, step: Callable[..., Any], carry: Any, *inputs: Any):
        self.traces = 0

        def counted(carry, *inputs):
            self.traces += 1
            return step(carry, *inputs)

        self.step = jax.jit(counted, donate_argnums=0)
        self.carry, self.inputs = carry, inputs
        start = time.perf_counter()
        lowered = self.step.lower(carry, *inputs)
        traced = time.perf_counter()
        self.compiled = lowered.compile()  # calls find it in the cache
        self.trace_seconds = traced - start
        self.compile_seconds = time.perf_counter() - traced
        # The least traffic: the carry is read and written, the inputs are read.
        self.floor = 2 * nbytes(carry) + nbytes(inputs)

    @functools.cached_property
    def counts(self) -> Counts:
        memory = self.compiled.memory_analysis()
        return Counts(
            int(self.compiled.cost_analysis()["bytes accessed"]),
            memory.temp_size_in_bytes,
            memory.argument_size_in_bytes,
            memory.alias_size_in_bytes,
            memory.argument_size_in_bytes
            + memory.temp_size_in_bytes
            + memory.output_size_in_bytes
            - memory.alias_size_in_bytes,
        )

    def seconds(self, steps: int) -> float:
        """Returns the mean time of a step over `steps` of them."""
        start = time.perf_counter()
        for _ in range(steps):
            self.carry = self.step(self.carry, *self.inputs)
        jax.block_until_ready(self.carry)
        return (time.perf_counter() - start) / steps


def side_by_side(
    programs: dict[str, Program], steps: int, seconds: float
) -> dict[str, list[float]]:
    """Returns the times of a step of each program, one per round.

    In a round the programs run one after the other, each for a multiple of `steps`, so
    noise of the machine that lasts longer than a round is in all of them.
    """
    slowest = 0.0
    for program in programs.values():
        jax.block_until_ready(program.inputs)
        program.seconds(steps)  # warms up
        slowest = max(slowest, program.seconds(steps))
    steps *= max(1, round(LEAST_ROUND / (slowest * steps)))
    times: dict[str, list[float]] = {name: [] for name in programs}
    end, rounds = time.perf_counter() + seconds, 0
    while rounds < LEAST_ROUNDS or time.perf_counter() < end:
        for name, program in programs.items():
            times[name].append(program.seconds(steps))
        rounds += 1
    for name, program in programs.items():
        if program.traces != 1:
            sys.exit(f"{name} was traced {program.traces} times, not once.")
    return times


class Ratio(NamedTuple):
    """Quartiles over the rounds of one program's time over another's."""

    low: float
    median: float
    high: float

    def __str__(self):
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def ratio(times: list[float], to: list[float]) -> Ratio:
    pairs = zip(times, to, strict=True)
    return Ratio(*statistics.quantiles([a / b for a, b in pairs], n=4))


def environment() -> str:
    device = jax.devices()[0]
    return (
        f"jax {jax.__version__}, optax {optax.__version__}, {device.device_kind} "
        f"({platform.machine()}, {os.cpu_count()} cores)"
    )


def markdown(rows: list[dict[str, Any]]) -> str:
    """Returns a table with the keys of the rows as its head."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(row.values() for row in rows)]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def progress(items: Sequence[Any], unit: str) -> Iterable[Any]:
    """Returns the items with a progress bar, or says that tqdm is not installed."""
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        print("No progress bar without tqdm.", file=sys.stderr)
        return items
    return tqdm(items, unit=unit, leave=False)


def write_rows(file: pathlib.Path | None, rows: list[dict[str, Any]]) -> None:
    """Writes the rows of a table and the environment, if a file is given."""
    if file:
        text = {"environment": environment(), "rows": rows}
        file.write_text(json.dumps(text, indent=1, default=str) + "\n")


class Parser(argparse.ArgumentParser):
    def add_json(self) -> None:
        self.add_argument(
            "--json",
            type=pathlib.Path,
            metavar="FILE",
            help="to write the rows to",
        )

    def error(self, message: str) -> NoReturn:
        # One line, without argparse's usage before it.
        self.exit(2, f"{self.prog}: error: {message}\n")
