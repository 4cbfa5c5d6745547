"""Do the examples run as the README calls them, and refuse a mistake in one line?"""

import pathlib
import re
import subprocess
import sys

import pytest

DIGITS = pathlib.Path(__file__).parent.parent / "examples" / "digits.py"


def run(*arguments):
    command = [sys.executable, str(DIGITS), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_digits_prints_a_row_per_setting_and_draws_a_picture(tmp_path):
    picture = tmp_path / "digits.png"
    result = run("--steps", 12, "--seeds", 1, "--k", 3, "--out", picture)
    assert result.returncode == 0, result.stderr
    rows = re.findall(
        r"^(SGD|Adam) .* (alone|lookahead) .* \d+\.\d ", result.stdout, re.M
    )
    assert rows == 2 * [("SGD", "alone"), ("SGD", "lookahead")] + 2 * [
        ("Adam", "alone"),
        ("Adam", "lookahead"),
    ]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "96/96" in result.stderr, "the progress bar counts every update"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--k", "0"], "`k` must be an integer of at least 1, got 0"),
        (["--alpha", "1.5"], "`alpha` must be a number in [0, 1]"),
        (["--steps", "3"], "--steps must be at least k = 5, got 3."),
        (["--seeds", "0"], "--seeds must be at least 1, got 0."),
        (["--out", "missing/digits.png"], "--out must be a .png in an existing folder"),
        (["--kk", "5"], "unrecognized arguments: --kk 5"),
    ],
)
def test_digits_answers_a_bad_option_with_one_line(arguments, message):
    result = run(*arguments)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
