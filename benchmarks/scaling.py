"""Claim: with leaves and floats, lookahead's cost grows as its inner optimizer's.

For Adam alone and inside lookahead: the time to trace, to compile and to run a step of
10 to 5,000 leaves of 1,000 floats, with the exponent e of a fit c * leaves^e; and the
time of a step per parameter, for 1,000 to 100,000,000 floats in 20 leaves. The script
exits with 1 if a step is traced twice, or if with more leaves it accesses more bytes
per float or has more temporaries.

    python benchmarks/scaling.py            # mostly compiling 5,000 leaves
    python benchmarks/scaling.py --quick    # up to 100 leaves and 100,000 floats
    python benchmarks/scaling.py --out scaling.png
"""

import itertools
import pathlib
import statistics
import sys
from typing import NamedTuple

import numpy as np
from forms import ALONE, FORMS, INNERS, OURS, Form, optimizer_step, tree
from timing import (
    Counts,
    Parser,
    Ratio,
    environment,
    markdown,
    progress,
    ratio,
    side_by_side,
    write_rows,
)

K, SIZE, LEAVES = 5, 1_000, 20
STYLES = {ALONE: ("#D55E00", "o", "--"), OURS: ("#0072B2", "s", "-")}


class Row(NamedTuple):
    """One form at one size; times in seconds."""

    leaves: int
    size: int
    form: str
    trace: float
    compile: float
    step: float  # median over the rounds
    ratio: Ratio  # of the time of a step to the inner optimizer's
    counts: Counts


def measure(leaves: int, size: int, seconds: float) -> list[Row]:
    params, grads = (tree(leaves, size, "float32", seed) for seed in (0, 1))
    programs = {
        name: optimizer_step(Form(name, FORMS[name](INNERS["adam"], K)), params, grads)
        for name in (ALONE, OURS)
    }
    times = side_by_side(programs, K, seconds)
    return [
        Row(
            leaves,
            size,
            name,
            program.trace_seconds,
            program.compile_seconds,
            statistics.median(times[name]),
            ratio(times[name], times[ALONE]),
            program.counts,
        )
        for name, program in programs.items()
    ]


def exponent(rows: list[Row], what: str) -> float:
    """Returns e of the fit c * leaves^e; 1 is linear."""
    leaves, seconds = zip(*((r.leaves, getattr(r, what)) for r in rows), strict=True)
    return np.polyfit(np.log(leaves), np.log(seconds), 1)[0]


def of(form: str, rows: list[Row]) -> list[Row]:
    return [row for row in rows if row.form == form]


def violations(rows: list[Row]) -> list[str]:
    """Returns what does not grow as claimed, except for times."""
    result = []
    few = of(OURS, rows)[0]
    for alone, ours in zip(of(ALONE, rows), of(OURS, rows), strict=True):
        per_leaf = ours.counts.accessed / ours.leaves
        expected = few.counts.accessed / few.leaves
        if abs(per_leaf / expected - 1) > 0.01:
            result.append(
                f"{ours.leaves:,} leaves access {per_leaf:,.0f} bytes each, "
                f"{few.leaves} access {expected:,.0f}."
            )
        extra = ours.counts.temporary - alone.counts.temporary
        if extra > 1000:
            result.append(f"{ours.leaves:,} leaves: {extra:,} bytes of temporaries.")
    return result


def draw(by_leaves: list[Row], by_floats: list[Row], file: pathlib.Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        print("No picture without matplotlib.", file=sys.stderr)
        return
    figure = Figure(figsize=(11, 4), layout="constrained")
    *left, right = figure.subplots(1, 3)
    for axes, what in zip(left, ("trace", "compile"), strict=True):
        for form, (colour, marker, line) in STYLES.items():
            rows = of(form, by_leaves)
            axes.plot(
                [row.leaves for row in rows],
                [1e3 * getattr(row, what) / row.leaves for row in rows],
                linestyle=line,
                marker=marker,
                color=colour,
                label=form,
            )
        axes.set_title(f"Time to {what}")
        axes.set_xlabel("leaves of 1,000 floats")
        axes.set_ylabel("milliseconds per leaf")
    for form, (colour, marker, line) in STYLES.items():
        rows = of(form, by_floats)
        floats = np.array([row.leaves * row.size for row in rows])
        right.plot(
            floats,
            1e9 * np.array([row.step for row in rows]) / floats,
            linestyle=line,
            marker=marker,
            color=colour,
        )
    right.set_title("Time of a step")
    right.set_xlabel("parameters, float32 in 20 leaves")
    right.set_ylabel("nanoseconds per parameter")
    right.set_yscale("log")
    for axes in (*left, right):
        axes.set_xscale("log")
        axes.grid(alpha=0.3)
    for axes in left:
        axes.set_ylim(bottom=0)
    figure.legend(
        *left[0].get_legend_handles_labels(), loc="outside lower center", ncols=2
    )
    figure.savefig(file, dpi=130)


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="under a minute")
    parser.add_argument("--out", type=pathlib.Path, metavar="PNG")
    parser.add_json()
    args = parser.parse_args()
    if args.out and not args.out.parent.is_dir():
        parser.error(f"the folder of {args.out} does not exist.")
    leaves, floats, seconds = (10, 50, 200, 1000, 5000), range(3, 9), 3.0
    if args.quick:
        leaves, floats, seconds = (10, 30, 100), range(3, 6), 0.1

    sizes = [(n, SIZE) for n in leaves] + [(LEAVES, 10**n // LEAVES) for n in floats]
    rows = [measure(*size, seconds) for size in progress(sizes, "size")]
    by_leaves = list(itertools.chain(*rows[: len(leaves)]))
    by_floats = list(itertools.chain(*rows[len(leaves) :]))
    print(f"{environment()}, adam, k = {K}\n")
    leaves_table = [
        {
            "leaves": f"{row.leaves:,}",
            "form": row.form,
            "trace, ms a leaf": f"{1e3 * row.trace / row.leaves:.2f}",
            "compile, ms a leaf": f"{1e3 * row.compile / row.leaves:.2f}",
            "step, us a leaf": f"{1e6 * row.step / row.leaves:.2f}",
            "step / inner (quartiles)": row.ratio,
            "accessed, bytes a float": f"{row.counts.accessed / row.leaves / SIZE:.2f}",
        }
        for row in by_leaves
    ]
    print(markdown(leaves_table))
    for form in STYLES:
        fits = [
            f"{what} {exponent(of(form, by_leaves), what):.2f}"
            for what in ("trace", "compile", "step")
        ]
        print(f"\n{form}, exponents: {', '.join(fits)}")
    print()
    table = [
        {
            "floats": f"{row.leaves * row.size:,}",
            "form": row.form,
            "step, ns a float": f"{1e9 * row.step / row.leaves / row.size:.3g}",
            "step / inner (quartiles)": row.ratio,
        }
        for row in by_floats
    ]
    print(markdown(table))
    write_rows(args.json, leaves_table + table)
    if args.out:
        draw(by_leaves, by_floats, args.out)
    wrong = violations(by_leaves)
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
