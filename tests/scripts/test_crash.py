"""Does a run that is killed again and again end like one that is not?

`benchmarks/crash.py` itself does this with more kills.
"""

import re

import crash
import pytest
from helpers.commands import BENCHMARKS, check_refused, run

SCRIPT = BENCHMARKS / "crash.py"


@pytest.mark.slow
def test_a_run_that_is_killed_also_inside_saves_ends_bit_for_bit_as_one_that_is_not():
    result = run(SCRIPT, "--kills", 3)
    assert result.returncode == 0, result.stdout + result.stderr
    kills, inside = re.search(
        r"^kills: (\d+), inside a save: (\d+)$", result.stdout, re.M
    ).groups()
    assert int(kills) >= 3
    assert int(inside) >= 1
    resumed = re.search(r"^restarts resumed from step: \[(.*)\]$", result.stdout, re.M)
    assert max(map(int, resumed[1].split(", "))) > 0, "no checkpoint was resumed from"
    assert re.search(
        r"^largest difference to the run never killed: 0, arrays that differ in any "
        r"bit: 0 of (\d\d)$",
        result.stdout,
        re.M,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kills", "0"], "--kills must be at least 1, got 0."),
        (["--kk", "5"], "unrecognized arguments: --kk 5"),
    ],
)
def test_a_bad_option_is_answered_with_one_line(arguments, message):
    check_refused(crash.main, arguments, message)
