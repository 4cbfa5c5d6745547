"""Do the examples run as the README calls them, and report a mistake in one line?"""

import re

import digits
import nnx_language_model
import outer_optimizers
import pytest
from helpers.commands import EXAMPLES, check_refused, run

TINY = ("--seeds", 1, "--width", 8, "--depth", 1, "--context", 8, "--batch", 2)


def test_digits_prints_a_row_per_setting_and_draws_a_picture(tmp_path):
    picture = tmp_path / "digits.png"
    result = run(
        EXAMPLES / "digits.py",
        *("--steps", 12, "--seeds", 1, "--k", 3, "--alpha", 0.2, "--out", picture),
    )
    assert result.returncode == 0, result.stderr
    rows = re.findall(
        r"^(SGD|Adam) +([\d.]+) \(.*\) +(alone|lookahead) .* \d+\.\d ",
        result.stdout,
        re.M,
    )
    # The control is the inner optimizer at alpha times the rate.
    assert rows == [
        (name, rate, wrapper)
        for name, fine, large, control in (
            ("SGD", "0.1", "0.3", "0.06"),
            ("Adam", "0.01", "0.05", "0.01"),
        )
        for rate, wrapper in (
            (fine, "alone"),
            (fine, "lookahead"),
            (large, "alone"),
            (control, "alone"),
            (large, "lookahead"),
        )
    ]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "120/120" in result.stderr, "the progress bar counts every update"


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
    check_refused(digits.main, arguments, message)


@pytest.mark.slow
def test_nnx_language_model_prints_a_row_per_setting_and_draws_a_picture(tmp_path):
    picture = tmp_path / "model.png"
    settings = ("--steps", 7, "--k", 3, "--rates", 0.1, 0.01, "--decay")
    result = run(EXAMPLES / "nnx_language_model.py", *TINY, *settings, "--out", picture)
    assert result.returncode == 0, result.stderr
    loss = r" +(\d\.\d{3}) ± 0\.000"
    alone = re.findall(rf"^alone +([\d.]+){loss} +-{loss}", result.stdout, re.M)
    averaged, wrapped = (
        re.findall(rf"^{name} +([\d.]+){loss}{loss}{loss}", result.stdout, re.M)
        for name in ("EMA", "lookahead")
    )
    assert [row[0] for row in alone] == ["0.01", "0.1"]
    assert [row[0] for row in wrapped] == ["0.01", "0.1"]
    assert wrapped[1][1] != wrapped[1][2], "fast and slow differ before a sync"
    assert [row[:2] for row in averaged] == [row[:2] for row in alone], (
        "an EMA changes nothing in training"
    )
    assert averaged[1][1] != averaged[1][2]
    assert "rate, seed 0, write:\n\n    A function is " in result.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "42/42" in result.stderr, "the progress bar counts every update"


@pytest.mark.slow
def test_nnx_language_model_with_alpha_1_measures_the_inner_optimizer(tmp_path):
    settings = ("--steps", 6, "--k", 2, "--alpha", 1, "--rates", 0.1)
    result = run(
        EXAMPLES / "nnx_language_model.py",
        *TINY,
        *settings,
        "--out",
        tmp_path / "model.png",
    )
    assert result.returncode == 0, result.stderr
    assert "lookahead minus alone, seed by seed: +0.000 ± 0.000" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--k", "0"], "`k` must be an integer of at least 1, got 0"),
        (["--alpha", "2"], "`alpha` must be a number in [0, 1]"),
        (["--ema", "1"], "--ema must be in [0, 1), got 1."),
        (["--steps", "3"], "--steps must be at least k = 5, got 3."),
        (["--batch", "0"], "--batch must be at least 1, got 0."),
        (["--rates", "0.1", "0"], "--rates must be positive and finite, got 0.1, 0."),
        (["--width", "30"], "--width must be a multiple of 4 heads, got 30."),
        (["--context", "10000000"], "--context must be less than the "),
        (["--out", "model.jpg"], "--out must be a .png in an existing folder"),
        (["--out", "missing/model.png"], "--out must be a .png in an existing folder"),
        (["--depth", "two"], "argument --depth: invalid int value: 'two'"),
        (["--kk", "5"], "unrecognized arguments: --kk 5"),
    ],
)
def test_nnx_language_model_answers_a_bad_option_with_one_line(arguments, message):
    check_refused(nnx_language_model.main, arguments, message)


@pytest.mark.slow
def test_outer_optimizers_prints_a_row_per_setting_and_draws_a_picture(tmp_path):
    picture = tmp_path / "outer.png"
    settings = ("--steps", 120, "--rates", 0.03, 0.005, "--out", picture)
    result = run(EXAMPLES / "outer_optimizers.py", *TINY, *settings)
    assert result.returncode == 0, result.stderr
    names = ["AdamW", "EMA", "lookahead", "Nesterov"]
    cell = r" +(\d\.\d{3}) ± 0\.000( \*)?"
    rows = re.findall(rf"^(\w+) +\w+ = .*?{cell}{cell}$", result.stdout, re.M)
    assert [row[0] for row in rows] == [name for name in names for _ in range(2)]
    best = {}
    for name, first, second in zip(names, rows[::2], rows[1::2], strict=True):
        assert first[1::2] != second[1::2], "the settings differ"
        cells = [row[i : i + 2] for row in (first, second) for i in (1, 3)]
        assert cells[0] != cells[1], "the rates differ"
        best[name] = min(float(loss) for loss, _ in cells)
        assert [float(loss) for loss, mark in cells if mark] == [best[name]]
    for name in names[1:]:
        (mean, pair) = re.search(
            rf"^{name} +([-+.\d]+) ± 0\.000  \(([-+.\d]+)\)$", result.stdout, re.M
        ).groups()
        assert mean == pair, "one seed"
        assert float(mean) == pytest.approx(best[name] - best["AdamW"], abs=0.0015)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "1920/1920" in result.stderr, "the progress bar counts every update"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "100"], "--steps must be a positive multiple of 120, got 100."),
        (["--kk", "5"], "unrecognized arguments: --kk 5"),
    ],
)
def test_outer_optimizers_answers_a_bad_option_with_one_line(arguments, message):
    check_refused(outer_optimizers.main, arguments, message)
