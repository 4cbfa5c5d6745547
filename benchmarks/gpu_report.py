"""Prints the rows of `gpu.py`: tables, and a line for each goal."""

import contextlib
import subprocess
from typing import Any

from forms import ALONE, COND, LOOP_COND, NESTEROV, OURS, UPSTREAM
from timing import markdown

COPY, AGAIN = "copy", f"{ALONE}, again"
STEP, LAYERS, TRANSFORMER = "step alone", "12 layers", "transformer"


def floor_ratio(row: dict[str, Any], alone: dict[str, Any]) -> float | None:
    """Returns the least time that memory traffic allows, over the inner optimizer's."""
    if "floor" not in row or "floor" not in alone or row["form"] == COPY:
        return None
    if row["task"] == STEP:
        return row["floor"] / alone["floor"]
    if not row.get("copy_speed") or not alone.get("seconds"):
        return None
    added = row["floor"] - alone["floor"]
    return 1 + added / row["copy_speed"] / alone["seconds"]


def cells(row: dict[str, Any], alone: dict[str, Any]) -> dict[str, str]:
    """Returns the cells of a row; those that were not measured are empty."""
    n, floor = row.get("n", 1), floor_ratio(row, alone)
    over = floor and row.get("ratio") and row["ratio"][1] / floor - 1

    def cell(value, spec, scale=1.0):
        return "" if value is None else f"{scale * value:{spec}}"

    speed = (
        row["floor"] / row["seconds"] if {"floor", "seconds"} <= row.keys() else None
    )
    copy = row.get("copy_speed") if row["task"] == STEP else None
    return {
        "form": row["form"],
        "ms": cell(row.get("seconds"), ".4g", 1e3),
        "time / inner (quartiles)": "{1:.3f} ({0:.3f} to {2:.3f})".format(*row["ratio"])
        if row.get("ratio")
        else "",
        "floor / inner": cell(floor, ".3f"),
        "above the floor": cell(over, "+.1%"),
        "of copy speed": cell(speed and copy and speed / copy, ".0%"),
        "temporaries / N": cell(row.get("temporary"), ".2f", 1 / n),
        "peak / N": cell(row.get("peak"), ".2f", 1 / n),
        "kernels": cell(row.get("kernels"), "d", 1),
        "compile s": cell(row.get("compile_seconds"), ".1f"),
        "failed": row.get("error", ""),
    }


def by_case(rows: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    result: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        result.setdefault(row["case"], {})[row["form"]] = row
    return result


def table(label: str, forms: dict[str, dict[str, Any]]) -> str:
    copy = next((row["copy_speed"] for row in forms.values() if "seconds" in row), None)
    speed = f", copy speed {copy / 1e9:,.0f} GB/s" if copy else ""
    lines = [cells(row, forms[ALONE]) for row in forms.values()]
    return f"{label}{speed}:\n\n{markdown(lines)}\n"


def verdict(goal: str, values: dict[str, float], limit: float) -> str:
    missed = any(value > limit for value in values.values())
    word = "missed" if missed else "met" if values else "not measured"
    each = "; ".join(f"{label}: {value:+.1%}" for label, value in values.items())
    return f"- {goal}: **{word}**. {each}"


def verdicts(rows: list[dict[str, Any]]) -> str:
    """Returns a line for each goal, with the distance of every case from it."""

    def values(value, tasks):
        result = {}
        for label, forms in by_case(rows).items():
            if forms[ALONE]["task"] in tasks:
                # Not where a figure was not measured.
                with contextlib.suppress(KeyError, TypeError):
                    result[label] = value(forms)
        return result

    def over_floor(form):
        return lambda forms: (
            forms[form]["ratio"][1] / floor_ratio(forms[form], forms[ALONE]) - 1
        )

    def over(form, other):
        return lambda forms: forms[form]["ratio"][1] / forms[other]["ratio"][1] - 1

    def added(forms):
        ours, alone = forms[OURS], forms[ALONE]
        return (ours["temporary"] - alone["temporary"]) / alone["n"]

    whole = (LAYERS, TRANSFORMER)
    every = (STEP, *whole)
    return "\n".join(
        [
            *(
                verdict(f"{form} within 5 % of its floor", v, 0.05)
                for form in (OURS, NESTEROV)
                for v in [values(over_floor(form), [STEP])]
            ),
            verdict("no more temporaries, in N", values(added, every), 0.001),
            verdict("a whole step within 1 %", values(over(OURS, ALONE), whole), 0.01),
            *(
                verdict(f"{form} not slower than {UPSTREAM}, to 1 %", v, 0.01)
                for form in (OURS, NESTEROV)
                for v in [values(over(form, UPSTREAM), every)]
            ),
            *(
                verdict(f"{form} saves at most 5 % of a whole step", v, 0.05)
                for form in (COND, LOOP_COND)
                for v in [values(over(OURS, form), whole)]
            ),
        ]
    )


def report(result: dict[str, Any]) -> None:
    print(result["environment"], end="\n\n")
    for label, forms in by_case(result["rows"]).items():
        print(table(label, forms))
    print(verdicts(result["rows"]))


def driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, check=True)
        return f"driver {found.stdout.strip()}"
    except (OSError, subprocess.CalledProcessError):
        return "no NVIDIA driver"
