"""Reports on the rows that `outer_steps.py` wrote: verdicts, tables, a picture.

A row is a run. `last` is its held-out loss at the end, `tail` that of the average over
its tail. Both are None or absent if the run diverged.
"""

import math
import pathlib
import statistics
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from timing import markdown

RATES, SEEDS = "rates", "seeds"  # the two stages
DONE, DIVERGED, NOT_RUN, FAILED = "done", "diverged", "not run", "failed"
READINGS = {"last": "last weights", "tail": "average of the tail"}
RESOLVED = 3.09  # standard errors
Row = dict[str, Any]


class Paired(NamedTuple):
    """The comparison of pairs of losses; lower is better."""

    n: int  # pairs in which both are finite
    mean: float  # of the differences
    error: float  # standard error of that mean; NaN of one pair
    verdict: str

    @property
    def resolution(self) -> float:
        """The least mean that would count as a difference."""
        return RESOLVED * self.error


def paired(losses: Sequence[float], reference: Sequence[float]) -> Paired:
    """Compares runs with those of the same seeds, in the same order."""
    pairs = list(zip(losses, reference, strict=True))
    # If the reference diverged the pair is left out, but not if only the run did.
    pairs = [pair for pair in pairs if math.isfinite(pair[1])]
    differences = [a - b for a, b in pairs if math.isfinite(a)]
    n, diverged = len(differences), len(pairs) - len(differences)
    mean = statistics.fmean(differences) if n else math.nan
    error = statistics.stdev(differences) / n**0.5 if n > 1 else math.nan
    if diverged:
        verdict = f"worse: {diverged} of {len(pairs)} diverged"
    elif n < 2:
        verdict = f"none, with {n} pair{'s' * (n != 1)}"
    elif mean == 0 or abs(mean) < RESOLVED * error:
        verdict = "no difference"
    else:
        verdict = "better" if mean < 0 else "worse"
    return Paired(n, mean, error, verdict)


def steps_saved(
    difference: float, short: tuple[int, float], long: tuple[int, float]
) -> float:
    """Returns how many more steps the reference would need for that difference.

    `short` and `long` are the steps and losses of two of its runs, in each of which the
    learning rate decays to zero. The loss is assumed to fall linearly with the
    logarithm of the steps. Beyond `long` it falls more slowly, so the true number is
    probably larger. NaN if the loss did not fall.
    """
    slope = (short[1] - long[1]) / math.log(long[0] / short[0])
    if not slope > 0:
        return math.nan
    return long[0] * math.expm1(-difference / slope)


def loss(row: Row, reading: str) -> float:
    value = row.get(reading)
    return math.nan if value is None else value


def of(rows: Iterable[Row], stage: str, arm: str) -> list[Row]:
    return [row for row in rows if (row["stage"], row["arm"]) == (stage, arm)]


def chosen_rate(rows: list[Row], arm: str) -> float | None:
    """Returns the rate of the least loss in the trials, or None if none is finite."""
    # Once runs have used a rate, it does not change when trials are added.
    for row in of(rows, SEEDS, arm):
        if row["status"] in (DONE, DIVERGED):
            return row["rate"]
    trials = [row for row in of(rows, RATES, arm) if math.isfinite(loss(row, "last"))]
    return min(trials, key=lambda row: row["last"])["rate"] if trials else None


def compare(rows: list[Row], arm: str, alone: str, reading: str) -> Paired:
    """Compares an arm with its inner optimizer, the latter with its last weights."""
    read = "last" if arm == alone else reading
    pairs = [
        (loss(mine, reading), loss(other, read))
        for mine, other in zip(
            of(rows, SEEDS, arm), of(rows, SEEDS, alone), strict=True
        )
        if {mine["status"], other["status"]} <= {DONE, DIVERGED}
    ]
    return paired(*zip(*pairs, strict=True)) if pairs else paired([], [])


def curve_of(rows: list[Row], alone: str) -> tuple[tuple[int, float], ...] | None:
    """Returns steps and loss of a short and of a long run of the inner optimizer."""
    rate = chosen_rate(rows, alone)
    trials = [row for row in of(rows, RATES, alone) if row["rate"] == rate]
    runs = [row for row in of(rows, SEEDS, alone) if math.isfinite(loss(row, "last"))]
    if rate is None or not runs or not math.isfinite(loss(trials[0], "last")):
        return None
    mean = statistics.fmean(row["last"] for row in runs)
    return (trials[0]["steps"], trials[0]["last"]), (runs[0]["steps"], mean)


def verdicts(rows: list[Row], arms: dict[str, str]) -> list[Row]:
    """Returns a row for each arm and reading; `arms` names what each is compared to."""
    table = []
    for arm, alone in arms.items():
        curve = curve_of(rows, alone)
        for reading, words in READINGS.items():
            losses = [loss(row, reading) for row in of(rows, SEEDS, arm)]
            losses = [value for value in losses if math.isfinite(value)]
            spread = statistics.stdev(losses) if len(losses) > 1 else math.nan
            row = {
                "arm": arm,
                "rate": show(chosen_rate(rows, arm), "g"),
                "read at": words,
                "loss ± deviation": f"{statistics.fmean(losses):.4f} ± {spread:.4f}"
                if losses
                else NOT_RUN,
            }
            if (arm, reading) == (alone, "last"):
                cells = ("", "", "", "")
            else:
                pair = compare(rows, arm, alone, reading)
                saved = ""
                if curve and pair.n:
                    less, mean, more = (
                        steps_saved(pair.mean + sign * pair.error, *curve)
                        for sign in (1, 0, -1)
                    )
                    saved = f"{mean:+.0f} ± {(more - less) / 2:.0f}"
                cells = (
                    f"{pair.mean:+.4f} ± {pair.error:.4f}" if pair.n else "",
                    show(pair.resolution, ".4f"),
                    pair.verdict,
                    saved,
                )
            heads = ("minus alone ± error", "resolution", "verdict", "steps saved")
            table.append(row | dict(zip(heads, cells, strict=True)))
    return table


def show(value: float | None, spec: str) -> str:
    return "" if value is None or math.isnan(value) else f"{value:{spec}}"


def trials(rows: list[Row]) -> list[Row]:
    """Returns a row for each arm, with the loss of each rate that was tried."""
    table = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        tried = sorted(of(rows, RATES, arm), key=lambda row: row["rate"])
        best = chosen_rate(rows, arm)
        cells = [
            f"{row['rate']:g}: {show(loss(row, 'last'), '.4f') or row['status']}"
            + " *" * (row["rate"] == best)
            for row in tried
        ]
        edge = "the best is at an edge" if best in tried_edges(tried) else ""
        names = [f"rate {i}" for i in range(1, len(cells) + 1)]
        table.append({"arm": arm} | dict(zip(names, cells, strict=True)) | {"": edge})
    return table


def tried_edges(tried: list[Row]) -> tuple[float, float]:
    return tried[0]["rate"], tried[-1]["rate"]


def left_out(rows: list[Row]) -> list[str]:
    """Returns a line for each run that has no result, with the reason."""
    lines = []
    for row in rows:
        if row["status"] not in (DONE, DIVERGED):
            rate = "" if row["rate"] is None else f", rate {row['rate']:g}"
            lines.append(f"{row['stage']}: {row['arm']}{rate}, seed {row['seed']}: ")
            lines[-1] += row["status"]
    return lines


def report(result: dict[str, Any]) -> str:
    """Returns the whole text, from the saved results."""
    rows, arms = result["rows"], result["arms"]
    seeds = len({row["seed"] for row in rows if row["stage"] == SEEDS})
    held_out = textwrap.fill(f"Held out: {', '.join(result['held_out_packages'])}.", 88)
    parts = [result["environment"], f"{result['data']}\n{held_out}"]
    if result["shrunk"]:
        parts.append(
            "SHRUNK: these figures say that the script runs, and nothing about outer "
            "steps."
        )
    parts += [
        "Held-out losses in nats per byte. Rates, tried with one seed; * is chosen:"
        f"\n\n{markdown(trials(rows))}",
        f"With {seeds} new seeds, paired by seed: the loss minus that of the inner "
        "optimizer alone, evaluated\nlikewise; for the latter, the average minus the "
        f"last weights. A difference is at least {RESOLVED}\nstandard errors:\n\n"
        f"{markdown(verdicts(rows, arms))}",
    ]
    if missing := left_out(rows):
        parts.append("Without a result:\n" + "\n".join(missing))
    return "\n\n".join(parts)


def draw(result: dict[str, Any], path: pathlib.Path) -> None:
    """Draws the curves of the means, and the differences with their resolution."""
    from matplotlib.figure import Figure

    rows, arms = result["rows"], result["arms"]
    colours = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"
    figure = Figure(figsize=(12, 5.2), layout="constrained")
    curves, differences = figure.subplots(1, 2)
    for arm, colour in zip(arms, colours, strict=True):
        runs = [row["curve"] for row in of(rows, SEEDS, arm) if row["status"] == DONE]
        if runs:
            steps = [step for step, _ in runs[0]]
            means = [
                statistics.fmean(value for _, value in points)
                for points in zip(*runs, strict=True)
            ]
            late = len(steps) // 4  # the first steps would hide the last
            line = "-" if arms[arm] == arm else "--"
            curves.plot(steps[late:], means[late:], line, color=colour, label=arm)
    curves.set_xlabel("step")
    curves.set_ylabel("held-out loss, nats per byte")
    curves.set_title("Weights to evaluate, mean over seeds")
    if curves.lines:
        curves.legend()
    names = []
    for arm, alone in arms.items():
        for reading, fill in (("last", "full"), ("tail", "none")):
            if (arm, reading) == (alone, "last"):
                continue
            pair = compare(rows, arm, alone, reading)
            place = len(names)
            names.append(f"{arm}, {READINGS[reading]}")
            if pair.n > 1:
                differences.errorbar(
                    pair.mean,
                    place,
                    xerr=pair.resolution,
                    color=colours[list(arms).index(arm)],
                    marker="o",
                    fillstyle=fill,
                    capsize=4,
                )
    differences.axvline(0, color="grey", linewidth=1)
    differences.set_yticks(range(len(names)), names)
    differences.set_ylim(len(names) - 0.5, -0.5)
    differences.set_xlabel(f"minus alone, ± {RESOLVED} standard errors")
    differences.set_title("Paired by seed; below 0 is better")
    if result["shrunk"]:
        figure.suptitle("Shrunk: shows that the script runs, and nothing else")
    figure.savefig(path, dpi=110)
