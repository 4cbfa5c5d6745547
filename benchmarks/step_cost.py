"""Claim: a lookahead step costs one read and one write of the slow weights, no more.

Times the optimizer step alone (gradients given, parameters and state donated) for inner
optimizers, for `optax_lookahead` around them, with and without a Nesterov outer step,
for `optax.lookahead`, and for naive forms of lookahead. The forms run one after the
other, round after round, in one process, and the reported ratio is the median over
rounds of the time in that round over the inner optimizer's: noise of the machine that
lasts longer than a round cancels.

The table also has figures without noise: the bytes that the compiled step accesses, its
temporaries and arguments, and the results written over arguments, in units of the
parameters' size N; and the floor, the bytes of all arrays that a step has to read or
write, each once. The script exits with 1 if a step is traced twice, if lookahead adds
anything but 2 N to the floor, if it writes less in place than its inner optimizer, or
if it adds temporaries to an inner optimizer that works leaf by leaf.

All combinations would be thousands of programs, so these slices of them are measured:

    inners   all inner optimizers                       20 x 500,000 float32, k = 5
    sizes    1,000 to 100,000,000 floats                adam, 20 leaves, k = 5
    leaves   10,000,000 floats in 1 to 2,000 leaves     adam, k = 5
    dtypes   bfloat16, slow weights too or float32      20 x 500,000, k = 5
    k        1, 5, 10 and 50                            20 x 100,000 float32
    policies reset and interpolate                      20 x 500,000 float32, k = 5

    python benchmarks/step_cost.py
    python benchmarks/step_cost.py --quick    # some of each, at a small size
    python benchmarks/step_cost.py --slices inners --json step_cost.json

`gpu.py` is the benchmark for GPUs.
"""

import itertools
import json
import pathlib
import statistics
import sys
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from forms import (
    ALL,
    ALONE,
    COND,
    FORMS,
    INNERS,
    LOOP_COND,
    NESTEROV,
    OURS,
    POLICIES,
    UPSTREAM,
    WHERE,
    WIDE,
    Form,
    optimizer_step,
    tree,
)
from timing import (
    Parser,
    Program,
    Ratio,
    environment,
    markdown,
    nbytes,
    progress,
    ratio,
    side_by_side,
)

COPY = "copy"  # the speed of the machine: reads all parameters once and writes them
SAME_DTYPE = [form for form in FORMS if form != WIDE]
EVERY_K = 50  # a multiple of every k
# Adafactor takes the norm of each leaf's update before it uses it.
LEAFWISE = [inner for inner in INNERS if inner != "adafactor"]


class Case(NamedTuple):
    """What is measured side by side."""

    slice: str
    inner: str
    leaves: int = 20
    size: int = 500_000  # floats in a leaf
    dtype: str = "float32"
    k: int = 5
    forms: list[str] = SAME_DTYPE

    def label(self) -> str:
        floats = f"{self.leaves:,} x {self.size:,} {self.dtype}"
        return f"{self.inner}, {floats}, k = {self.k}"


def cases() -> list[Case]:
    few = [ALONE, OURS, UPSTREAM]  # 2,000 leaves are slow to compile
    return [
        *(Case("inners", inner) for inner in INNERS),
        *(Case("sizes", "adam", size=50 * 10**i) for i in range(6)),
        *(
            Case("leaves", "adam", leaves, 10**7 // leaves, forms=few)
            for leaves in (1, 20, 200, 2000)
        ),
        *(
            Case("dtypes", inner, dtype="bfloat16", forms=list(FORMS))
            for inner in ("sgd", "momentum", "adam")
        ),
        *(
            Case("k", inner, size=100_000, k=k)
            for inner in ("sgd", "adam")
            for k in (1, 5, 10, 50)
        ),
        *(
            Case("policies", inner, forms=[ALONE, OURS, *POLICIES])
            for inner in ("momentum", "adam")
        ),
    ]


def shrink(case: Case) -> Case:
    if case.leaves * case.size <= 10_000:
        return case
    return case._replace(leaves=min(case.leaves, 50), size=64**2)


def quick_cases() -> list[Case]:
    """Returns some of every slice, at a small size."""
    last = {case.slice: case for case in cases()}
    return [
        shrink(case)
        for case in cases()
        if case.slice == "inners" or shrink(case) == case or case == last[case.slice]
    ]


def programs_of(case: Case) -> dict[str, Program]:
    inner = INNERS[case.inner]
    forms = {name: Form(name, ALL[name](inner, case.k)) for name in case.forms}
    params = tree(case.leaves, case.size, case.dtype, seed=0)
    grads = tree(case.leaves, case.size, case.dtype, seed=1)
    programs = {
        name: optimizer_step(form, params, grads) for name, form in forms.items()
    }
    programs[COPY] = Program(lambda ps: [p + 1 for p in ps], params)
    return programs


class Row(NamedTuple):
    """Figures of one form in one case; bytes as they are."""

    case: Case
    form: str
    rounds: int
    seconds: float  # median over the rounds
    ratio: Ratio  # of the time to the inner optimizer's
    accessed: int
    temporary: int
    arguments: int
    aliased: int
    peak: int
    carry: int
    floor: int
    copy_speed: float  # bytes a second, of the copy


def measure(case: Case, seconds: float) -> list[Row]:
    programs = programs_of(case)
    # Caches are cold at the start of a turn, so where k varies, turns are equally long.
    steps = EVERY_K if case.slice == "k" else case.k
    times = side_by_side(programs, steps, seconds)
    copy_speed = programs[COPY].floor / statistics.median(times[COPY])
    return [
        Row(
            case,
            name,
            len(times[name]),
            statistics.median(times[name]),
            ratio(times[name], times[ALONE]),
            *programs[name].counts,
            nbytes(programs[name].carry),
            programs[name].floor,
            copy_speed,
        )
        for name in case.forms
    ]


def unit(case: Case) -> int:
    """Returns N."""
    return case.leaves * case.size * jnp.dtype(case.dtype).itemsize


def cells(row: Row, alone: Row) -> dict[str, Any]:
    """Returns what the table says of one row."""
    case, n = row.case, unit(row.case)
    floor = row.floor / alone.floor
    return {
        "inner": case.inner,
        "form": row.form,
        "floats": f"{case.leaves:,} x {case.size:,}",
        "dtype": case.dtype,
        "k": case.k,
        "ms": f"{1e3 * row.seconds:.3g}",
        "time / inner (quartiles)": row.ratio,
        "floor / inner": f"{floor:.2f}",
        "of the floor": f"{floor / row.ratio.median:.0%}",
        "of copy speed": f"{row.floor / row.seconds / row.copy_speed:.0%}",
        "accessed / N": f"{row.accessed / n:.2f}",
        "temporaries / N": f"{row.temporary / n:.2f}",
        "arguments / N": f"{row.arguments / n:.2f}",
        "aliased / N": f"{row.aliased / n:.2f}",
    }


def violations(rows: list[Row], alone: Row) -> list[str]:
    """Returns what in one case is not as claimed, except for times."""
    result = []
    for row in rows:
        case = row.case
        if row.form != OURS:
            continue
        added = row.floor - alone.floor
        # Two counters, int32, are read and written too.
        if added != 2 * unit(case) + 16:
            result.append(f"{case.label()}: lookahead adds {added:,} bytes, not 2 N")
        # A few bytes of Adafactor's own are not in place.
        if row.carry - row.aliased != alone.carry - alone.aliased:
            result.append(
                f"{case.label()}: {row.aliased:,} of {row.carry:,} bytes in place"
            )
        extra = row.temporary - alone.temporary
        if case.inner in LEAFWISE and extra > 1000:
            result.append(f"{case.label()}: {extra:,} more bytes of temporaries")
    return result


def as_json(row: Row) -> dict[str, Any]:
    case = row.case._asdict()
    del case["forms"]
    named = {
        "ratio": row.ratio._asdict(),
        "case": row.case.label(),
        "n": unit(row.case),
    }
    return case | row._asdict() | named


# Safe for colour blindness, and told apart in black and white by their markers.
STYLES = {
    OURS: ("#0072B2", "o", "-"),
    NESTEROV: ("#56B4E9", "s", "--"),
    UPSTREAM: ("#D55E00", "^", "-"),
    WHERE: ("#CC79A7", "v", ":"),
    COND: ("#009E73", "D", "--"),
    LOOP_COND: ("#444444", "P", ":"),
}


def draw(rows: list[Row], file: pathlib.Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        print("No picture without matplotlib.", file=sys.stderr)
        return
    figure = Figure(figsize=(7.5, 5.5), layout="constrained")
    axes = figure.subplots()
    for form, (colour, marker, line) in STYLES.items():
        own = [row for row in rows if row.form == form]
        middle = np.array([row.ratio.median for row in own])
        axes.errorbar(
            [row.case.leaves * row.case.size for row in own],
            middle,
            [
                middle - [row.ratio.low for row in own],
                [row.ratio.high for row in own] - middle,
            ],
            linestyle=line,
            marker=marker,
            color=colour,
            capsize=3,
            elinewidth=1,
            label=form,
        )
    ours, alone = (
        next(row for row in reversed(rows) if row.form == form)
        for form in (OURS, ALONE)
    )
    axes.axhline(
        ours.floor / alone.floor, color="black", linewidth=1, label="floor by traffic"
    )
    axes.set_xscale("log")
    axes.set_yscale("log")
    ticks = [1, 1.25, 1.5, 2, 3, 4, 6]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("parameters, float32 in 20 leaves")
    axes.set_ylabel("time of a step / time of Adam's")
    axes.set_title("The optimizer step, k = 5: median over rounds and quartiles")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3)
    figure.savefig(file, dpi=130)


def main() -> None:
    every = list(dict.fromkeys(case.slice for case in cases()))
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a minute on two cores")
    parser.add_argument("--slices", nargs="+", choices=every, metavar="SLICE")
    parser.add_argument("--seconds", type=float, help="for a case, or five rounds")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE")
    parser.add_argument("--out", type=pathlib.Path, metavar="PNG", help="of `sizes`")
    args = parser.parse_args()
    slices = args.slices or every
    if args.out and "sizes" not in slices:
        parser.error("--out draws the slice `sizes`: add it to --slices.")
    for file in filter(None, (args.json, args.out)):
        if not file.parent.is_dir():
            parser.error(f"the folder of {file} does not exist.")
    seconds = args.seconds or (0.1 if args.quick else 6)

    print(environment())
    rows, wrong = [], []
    measured = [
        case
        for case in (quick_cases() if args.quick else cases())
        if case.slice in slices
    ]
    for slice_, group in itertools.groupby(
        progress(measured, "case"), lambda case: case.slice
    ):
        table = []
        for case in group:
            new = measure(case, seconds)
            table += [cells(row, new[0]) for row in new]
            wrong += violations(new, new[0])
            rows += new
        same = {
            name: table[0][name]
            for name in ("inner", "floats", "dtype", "k")
            if len({line[name] for line in table}) == 1
        }
        table = [{key: line[key] for key in line if key not in same} for line in table]
        head = ", ".join(f"{name} {value}" for name, value in same.items())
        print(f"\n\n{slice_}: {head}\n\n{markdown(table)}", flush=True)
        if args.json:
            text = {"environment": environment(), "rows": list(map(as_json, rows))}
            args.json.write_text(json.dumps(text, indent=1) + "\n")
    if args.out:
        draw([row for row in rows if row.case.slice == "sizes"], args.out)
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
