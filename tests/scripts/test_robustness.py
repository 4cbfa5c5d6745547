"""Are the runs of the robustness example those of a plain loop?

And do its experiments run as their docstring calls them, and print what they say?
"""

import re

import jax
import many_runs
import numpy as np
import optax
import pytest
import robustness
import tuned_curves
from helpers.commands import EXAMPLES, check_refused, run, run_here

from optax_lookahead import lookahead, slow_params

STEPS = 12
SETTINGS = many_runs.grid(rate=[0.02, 0.1], momentum=[0.0, 0.9])


@pytest.fixture(scope="module", autouse=True)
def hasty_compiler():
    """Compiles without optimizing, since the tests spend their time compiling."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def data():
    return many_runs.load_digits()


def lookahead_of(k):
    return many_runs.Method(
        lambda rate, momentum: lookahead(tuned_curves.sgd(rate, momentum), k, 0.5),
        SETTINGS,
        many_runs.fast_and_slow_weights,
    )


def test_a_run_of_many_is_the_run_of_a_plain_loop(data):
    measured = many_runs.train_all(
        {"lookahead": lookahead_of(5)}, {"digits": data}, [4, 3], STEPS, every=1, last=3
    )["digits"]["lookahead"]
    params, batches = many_runs.init(4, data), many_runs.make_batches(4, data, STEPS)
    tx = lookahead(optax.sgd(0.1, momentum=0.9), 5, 0.5)
    state, grad = tx.init(params), jax.jit(jax.grad(many_runs.loss_fn))
    update, evaluate = jax.jit(tx.update), jax.jit(many_runs.evaluate)
    visited = []
    for batch in batches:
        grads = grad(params, data.train_x[batch], data.train_y[batch])
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        visited.append((params, slow_params(state, params)))
    # Shape [updates, weights, loss and accuracy].
    last = np.array([[evaluate(tree, data) for tree in pair] for pair in visited[-3:]])
    # The second value of both arguments, the first seed.
    np.testing.assert_allclose(measured.loss[1, 1, 0], last[..., 0], rtol=1e-4)
    np.testing.assert_allclose(measured.accuracy[1, 1, 0], last[..., 1], atol=0.5)
    assert measured.loss.shape == (2, 2, 2, 3, 2)
    fast, slow = measured.loss[1, 1, 0].T
    assert fast[0] == slow[0], "update 10 is a sync"
    assert fast[1] != slow[1]


def test_all_methods_share_first_weights_and_batches_of_a_seed(data):
    methods = {
        "SGD": many_runs.Method(tuned_curves.sgd, SETTINGS),
        "never synced": lookahead_of(STEPS + 1),
    }
    measured = many_runs.train_all(methods, {"digits": data}, [0, 1], STEPS)["digits"]
    alone, fast = (x.loss[..., -1, 0] for x in measured.values())
    np.testing.assert_allclose(alone, fast, rtol=1e-4)
    weights = [np.asarray(many_runs.init(seed, data)[0][0]) for seed in (0, 1)]
    batches = [many_runs.make_batches(seed, data, STEPS) for seed in (0, 1)]
    assert not np.array_equal(*weights)
    assert not np.array_equal(*batches)
    methods.pop("never synced")
    swapped = many_runs.train_all(methods, {"digits": data}, [1, 0], STEPS)["digits"]
    assert (swapped["SGD"].loss[..., -1, 0] == alone[..., ::-1]).all()


def test_a_run_that_diverged_does_not_count_as_trained():
    # Two rates, two momenta, two seeds; one evaluation of one kind of weights.
    loss = [[[0.1, 0.1], [0.1, np.nan]], [[0.1, np.inf], [np.nan, np.nan]]]
    accuracy = [[[99.0, 94.9], [95.0, 99.0]], [[10.0, 99.0], [np.nan, np.nan]]]
    ends = many_runs.final(
        many_runs.Measured(*(np.reshape(x, (2, 2, 2, 1, 1)) for x in (loss, accuracy)))
    )
    trained = ends.accuracy >= 95.0
    np.testing.assert_array_equal(many_runs.share(trained), [50.0, 0.0])
    np.testing.assert_array_equal(many_runs.share(np.isinf(ends.loss)), [25.0, 75.0])
    assert np.median(ends.loss, axis=-1)[0, 1] == np.inf
    assert many_runs.cell(ends.loss[0, 1], 1) == "1/2 diverged"
    assert many_runs.cell(ends.accuracy[0, 0], 1) == "97.0 ± 2.0"


def test_an_accuracy_is_missing_where_the_loss_is_not_finite(data):
    params = jax.tree.map(lambda p: p * np.nan, many_runs.init(0, data))
    measured = jax.jit(many_runs.evaluate)(params, data)
    assert np.isnan(measured.loss)
    assert np.isnan(measured.accuracy)


def test_paired_gives_the_standard_error_of_the_differences():
    assert many_runs.paired([3.0, 5.0, 7.0], [1.0, 2.0, 3.0], 3) == "+3.000 ± 0.577"
    assert many_runs.paired([3.0, np.inf], [1.0, 2.0], 3) == "-"


def test_polyak_averages_the_parameters_since_the_start():
    tx = tuned_curves.polyak(optax.sgd(1.0), 2)
    params = np.float32(0.0)
    state = tx.init(params)
    for grads in (-1.0, -1.0, -1.0, -2.0, -3.0):
        updates, state = tx.update(np.float32(grads), state, params)
        params = optax.apply_updates(params, updates)
    assert params == 8.0
    assert state.mean == pytest.approx((3.0 + 5.0 + 8.0) / 3)


def test_every_method_is_tuned_on_as_many_settings():
    methods = tuned_curves.tunable(100)
    assert {np.shape(x) for m in methods.values() for x in m.settings.values()} == {
        (10, 2)
    }


@pytest.fixture
def small(monkeypatch):
    """Shrinks the grids."""
    rates = 2.0 ** np.arange(-4, -2)
    inners = {name: (make, rates) for name, (make, _) in robustness.INNERS.items()}
    monkeypatch.setattr(robustness, "RATES", rates)
    monkeypatch.setattr(robustness, "MOMENTA", np.array([0.5, 0.9]))
    monkeypatch.setattr(robustness, "KS", np.array([5, 10]))
    monkeypatch.setattr(robustness, "ALPHAS", np.array([0.5, 0.8, 1.0]))
    monkeypatch.setattr(robustness, "INNERS", inners)
    monkeypatch.setattr(tuned_curves, "SGD_RATES", rates)
    monkeypatch.setattr(tuned_curves, "ADAM_RATES", rates / 16)


def table(experiment, tmp_path):
    """Returns what an experiment prints, run as its command runs it."""
    picture = tmp_path / "picture.png"
    sizes = ["--data", "breast_cancer", "--seeds", 2, "--steps", 100, "--out", picture]
    result = run_here(robustness.main, experiment, *sizes)
    assert result.returncode == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    return result.stdout


CELL = r" +-?\d+\.\d+ ± \d+\.\d+"
PAIR = r" +(?:[-+]\d+\.\d+ ± \d+\.\d+|-)"  # a dash for itself


def rows(text, pattern):
    return re.findall(rf"^{pattern}$", text, re.M)


@pytest.mark.usefixtures("small")
def test_learning_rates_compares_shares_of_the_grid(tmp_path):
    text = table("learning-rates", tmp_path)
    names = ["SGD", "SGD, alpha x rate", "lookahead"]
    assert rows(text, rf"(\w.*?){4 * CELL}") == names
    assert rows(text, rf"(\w.*?){PAIR}{2 * CELL}") == names[:2]
    assert rows(text, rf"(\w[^±\n]*?){2 * CELL}") == names
    assert rows(text, rf"(\w.*?){2 * PAIR}") == ["lookahead minus SGD"]


@pytest.mark.usefixtures("small")
def test_k_alpha_has_sgd_in_its_last_column(tmp_path):
    text = table("k-alpha", tmp_path)
    assert rows(text, rf" ?(\d+){3 * CELL}") == 2 * ["5", "10"]
    (difference,) = re.findall(r"is that of SGD alone to (\S+);", text)
    assert float(difference) < 1e-3
    assert len(re.findall("better than SGD in . of 4 cells", text)) == 4


@pytest.mark.usefixtures("small")
def test_inner_state_has_a_row_per_policy(monkeypatch, tmp_path):
    monkeypatch.delitem(robustness.INNERS, "Adam")
    text = table("inner-state", tmp_path)
    found = rows(text, rf"(\w+) +(\w+){CELL} +\S+{2 * CELL}{PAIR} +\S+ +\S+")
    states = "alone", "EMA", "keep", "reset", "interpolate"
    assert found == [("SGD", state) for state in states]


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_curves_tunes_and_says_when_a_grid_ends(tmp_path):
    text = table("curves", tmp_path)
    names = ["SGD", "Polyak", "Adam", "lookahead"]
    found = rows(text, rf"(\w+) +rate \S+, .*?{2 * CELL}{PAIR}{CELL}{PAIR}")
    assert found == names
    assert rows(text, r"(\w+) +rate .* - .* -") == ["SGD"]
    # Of two rates each is at an edge.
    edges = [f"The best rate of {name} is at an edge of its grid." for name in names]
    assert [line for line in text.splitlines() if "at an edge" in line] == edges


@pytest.mark.slow
def test_cycles_runs_as_a_command_and_prints_what_the_fast_weights_lose(tmp_path):
    picture = tmp_path / "cycles.png"
    sizes = ["--data", "digits", "--seeds", "1", "--steps", "100", "--out"]
    result = run(EXAMPLES / "robustness.py", "cycles", *sizes, picture)
    assert result.returncode == 0, result.stderr
    weights = ["slow, at the sync", "fast, before the next", "SGD alone"]
    number = r" +\d+\.\d+"
    assert rows(result.stdout, rf"(\w.*?){2 * CELL}{2 * number}") == 2 * weights
    sag = rf"In a cycle the fast weights lose{PAIR} points.*"
    assert len(rows(result.stdout, sag)) == 2
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "400/400" in result.stderr, "two rates, two methods"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the experiment must be one of learning-rates, k-alpha, cycles, "),
        (["curve"], "inner-state, curves, got curve."),
        (["curves", "--steps", "150"], "--steps must be a positive multiple of 100"),
        (["curves", "--seeds", "0"], "--seeds must be at least 1, got 0."),
        (["curves", "--data", "mnist"], "argument --data: invalid choice: 'mnist'"),
        (["curves", "--out", "missing/a.png"], "--out must be a .png in an existing"),
    ],
)
def test_a_bad_option_is_answered_with_one_line(arguments, message):
    check_refused(robustness.main, arguments, message)
