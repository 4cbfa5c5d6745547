"""Counts the bytes that replicas exchange, in the text of a compiled training step."""

import math
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4}
BYTES |= {"f32": 4, "s64": 8, "u64": 8, "f64": 8, "token": 0}
COMPUTATION = re.compile(r"^(ENTRY )?(%?[\w.-]+) .*\{$")
INSTRUCTION = re.compile(
    r"^ +(?:ROOT )?(?P<name>%?[\w.-]+) = (?P<shape>\(.*?\)|\S+) (?P<op>[a-z][a-z-]*)"
    r"\((?P<operands>.*?)\)"
)
ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
COLLECTIVE = re.compile(
    r"(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?"
)
BRANCHES = re.compile(
    r"branch_computations=\{([^}]*)\}|(?:true|false)_computation=([^,\s]+)"
)
CALLS = re.compile(r"(?:calls|to_apply|body|condition)=([^,\s)]+)")
# Groups have three forms: a list, a reshaped and transposed range, and mesh axes.
GROUPS = re.compile(
    r"(?:replica_groups|source_target_pairs)=(?:"
    r"\{(?P<listed>[\d,{}]*)\}(?=[,\s]|$)"
    r"|\[(?P<shape>[\d,]+)\]<=\[(?P<dims>[\d,]+)\](?:T\((?P<order>[\d,]+)\))?"
    r"|mesh\[(?P<mesh>['\w=,]+)\] \{(?P<axes>['\w,]+)\})"
)


class Messages(NamedTuple):
    """Bytes that a device passes to collectives across replicas in one call."""

    always: int  # in every call
    in_branch: int  # in a call that takes the branch: one that syncs


def messages(text: str, devices: int, replica_of: Callable[[int], int]) -> Messages:
    """Reads them from a program's optimized HLO, for device ids `range(devices)`."""
    bodies, entry = computations(text)
    sent = {True: 0, False: 0}

    def walk(name: str, in_branch: bool) -> None:
        sizes = {}
        for line in bodies[name]:
            match = INSTRUCTION.match(line)
            if not match:
                continue
            sizes[match["name"]] = nbytes(match["shape"])
            if COLLECTIVE.fullmatch(match["op"]) and crosses(line, devices, replica_of):
                operands = re.findall(r"%?[\w.-]+", match["operands"])
                sent[in_branch] += sum(sizes.get(operand, 0) for operand in operands)
            for several, one in BRANCHES.findall(line):
                for called in several.split(", ") if several else [one]:
                    walk(called, True)
            if match["op"] != "fusion":  # fusions hold no collectives
                for called in CALLS.findall(line):
                    walk(called, in_branch)

    walk(entry, False)
    return Messages(sent[False], sent[True])


def computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Returns the lines of each computation of a program, and its entry's name."""
    bodies: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        head = COMPUTATION.match(line)
        if head and not line.startswith((" ", "HloModule")):
            name = head[2]
            bodies[name] = []
            entry = name if head[1] else entry
        elif name:
            bodies[name].append(line)
    return bodies, entry


def nbytes(shape: str) -> int:
    return sum(
        BYTES[dtype] * math.prod(int(n) for n in dims.split(",") if n)
        for dtype, dims in ARRAY.findall(shape)
    )


def crosses(line: str, devices: int, replica_of: Callable[[int], int]) -> bool:
    """Returns whether a collective has devices of several replicas in one group."""
    match = GROUPS.search(line)
    if match is None:
        raise ValueError(f"no groups of devices were read from {line!r}")
    if match["mesh"]:
        axes = dict(re.findall(r"'(\w+)'=(\d+)", match["mesh"]))
        ids = np.arange(devices).reshape([int(size) for size in axes.values()])
        among = [list(axes).index(axis) for axis in re.findall(r"\w+", match["axes"])]
        ids = np.moveaxis(ids, among, range(-len(among), 0))
        groups = ids.reshape(-1, math.prod(ids.shape[-len(among) :]))
    elif match["shape"]:
        ids = np.arange(devices).reshape(numbers(match["dims"]))
        if match["order"]:
            ids = ids.transpose(numbers(match["order"]))
        groups = ids.reshape(numbers(match["shape"]))
    elif match["listed"]:
        groups = map(numbers, re.findall(r"\{([\d,]+)\}", match["listed"]))
    else:
        groups = [range(devices)]
    return any(len({replica_of(int(i)) for i in group}) > 1 for group in groups)


def numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]
