"""Does the benchmark of outer steps report its runs, also after an interruption?"""

import json
import math
from email.message import Message
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import outer_steps
import outer_steps_report as reports
import pytest
import source_text
from helpers.commands import check_refused, run_here
from helpers.rows import slow_but
from optax import contrib
from outer_steps import ARMS, FULL, QUICK, K
from outer_steps_report import DIVERGED, DONE, NOT_RUN, RATES, SEEDS, paired

from optax_lookahead import slow_params

NAN, INF = math.nan, math.inf
TEXTS = {name: bytes([i]) * 100 * i for i, name in enumerate("abcdefgh", start=1)}

# Verdicts from pairs of runs.


def test_the_mean_and_its_error_are_those_of_numpy():
    rng = np.random.default_rng(0)
    for n in (2, 4, 9):
        losses, alone = rng.normal(2.0, 0.02, (2, n))
        pair = paired(losses.tolist(), alone.tolist())
        differences = losses - alone
        assert pair.n == n
        assert pair.mean == pytest.approx(differences.mean(), rel=1e-12)
        error = differences.std(ddof=1) / np.sqrt(n)
        assert pair.error == pytest.approx(error, rel=1e-12)
        assert pair.resolution == pytest.approx(3.09 * error, rel=1e-12)
        is_one = abs(differences.mean()) * np.sqrt(n) >= 3.09 * differences.std(ddof=1)
        assert (pair.verdict != "no difference") == is_one


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        # The mean times the root of three over the deviation: 3.46, 2.65, 0.
        ([-0.01, -0.02, -0.03], "better"),
        ([0.01, 0.02, 0.03], "worse"),
        ([-0.01, -0.02, -0.04], "no difference"),
        ([0.01, 0.02, 0.04], "no difference"),
        ([-0.01, 0.0, 0.01], "no difference"),
        # Of 1 - d and 1 + d the mean is 1 and its error d.
        ([-1 - 1 / 3.10, -1 + 1 / 3.10], "better"),
        ([1 - 1 / 3.08, 1 + 1 / 3.08], "no difference"),
        # Ties, and the same difference in all pairs.
        ([0.0, 0.0, 0.0], "no difference"),
        ([-0.25, -0.25], "better"),
        ([-0.25], "none, with 1 pair"),
        ([], "none, with 0 pairs"),
        ([-0.01, NAN, -0.03], "worse: 1 of 3 diverged"),
        ([INF], "worse: 1 of 1 diverged"),
    ],
)
def test_verdicts_by_hand(differences, verdict):
    alone = [2.0] * len(differences)
    pair = paired([2.0 + d for d in differences], alone)
    assert pair.verdict == verdict


def test_a_pair_whose_reference_diverged_says_nothing():
    pair = paired([1.0, 1.5, NAN], [NAN, 2.0, NAN])
    assert pair == paired([1.5], [2.0])
    assert (pair.n, pair.mean, pair.verdict) == (1, -0.5, "none, with 1 pair")
    assert math.isnan(pair.error)


def test_steps_saved_by_hand():
    # 0.1 nats for each factor of e, so 0.1 ln 1.1 are a tenth of the steps.
    short, long = (600, 2.0), (3000, 2.0 - 0.1 * math.log(5))
    tenth = 0.1 * math.log(1.1)
    assert reports.steps_saved(-tenth, short, long) == pytest.approx(300)
    assert reports.steps_saved(tenth, short, long) == pytest.approx(3000 / 1.1 - 3000)
    assert reports.steps_saved(0.0, short, long) == 0
    assert math.isnan(reports.steps_saved(-0.1, (600, 2.0), (3000, 2.0)))
    assert math.isnan(reports.steps_saved(-0.1, (600, 2.0), (3000, NAN)))


def test_a_verdict_pairs_the_seeds_that_both_arms_have():
    rows = outer_steps.plan(FULL)
    for row in rows:
        row |= {"status": DONE, "last": 2.0, "tail": 1.9, "curve": []}
        row["rate"] = row["rate"] or 0.02
    mine = reports.of(rows, SEEDS, "Muon, Nesterov")
    alone = reports.of(rows, SEEDS, "Muon")
    for seed, (a, b) in enumerate(zip(mine, alone, strict=True), start=1):
        b["last"], a["last"], a["tail"] = 2 + seed, 2 + seed - 0.1 * seed, 1.8
    mine[1] |= {"status": NOT_RUN, "last": None, "tail": None}
    pair = reports.compare(rows, "Muon, Nesterov", "Muon", "last")
    differences = np.array([-0.1, -0.3, -0.4])
    assert pair.n == 3
    assert pair.mean == pytest.approx(differences.mean())
    assert pair.error == pytest.approx(differences.std(ddof=1) / 3**0.5)
    pair = reports.compare(rows, "Muon, Nesterov", "Muon", "tail")
    assert (pair.n, pair.mean) == (3, pytest.approx(-0.1)), "with its average"
    pair = reports.compare(rows, "AdamW", "AdamW", "tail")
    assert (pair.n, pair.mean) == (4, pytest.approx(-0.1)), "with its last weights"


# What is run, in which order, and what stops it.


@pytest.mark.parametrize("size", [FULL, QUICK])
def test_runs_end_on_a_sync_and_segments_fill_them(size):
    for steps in (size.segment, size.trial, size.steps):
        assert steps % K == steps % 5 == 0
        assert steps % size.segment == 0
        assert steps // 20 > 0
    assert size.windows % size.batch == 0
    assert all(len(set(arm.rates)) == 3 for arm in ARMS.values())


def test_when_time_is_up_the_last_seeds_of_all_arms_are_missing():
    rows = outer_steps.plan(FULL)
    assert [row["stage"] for row in rows] == 18 * [RATES] + 24 * [SEEDS]
    assert [row["seed"] for row in rows] == 18 * [0] + np.repeat(
        [1, 2, 3, 4], 6
    ).tolist()
    for start in range(0, len(rows), 6):
        assert [row["arm"] for row in rows[start : start + 6]] == list(ARMS)
    assert sum(row["steps"] for row in rows) == 82_800


class Stub:
    """Takes the place of the trainer: it makes losses up and records what is asked.

    The best rate is the middle one; `stop` is called with the number of each run.
    """

    asked: ClassVar[list] = []
    stop = staticmethod(lambda i: None)

    def __init__(self, text, size):
        pass

    def __call__(self, arm, rate, seed, steps):
        type(self).asked.append((arm, rate, seed, steps))
        self.stop(len(self.asked))
        value = 3.0 + seed / 8 - steps / 1000 + abs(math.log(rate / ARMS[arm].rates[1]))
        value -= len(arm) / 64
        return {"status": DONE, "curve": [[steps, value]], "last": value, "tail": value}


@pytest.fixture
def stub(monkeypatch):
    """Replaces the trainer and the text, so that the script runs without training."""

    class Fresh(Stub):
        asked: ClassVar[list] = []

    text = source_text.split(TEXTS)
    monkeypatch.setattr(outer_steps, "Trainer", Fresh)
    monkeypatch.setattr(outer_steps, "source_text", lambda most: text)
    return Fresh


def quick(path, *more):
    return run_here(outer_steps.main, "--quick", "--json", path, *more)


def without_times(path):
    rows = json.loads(path.read_text())["rows"]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def test_a_run_that_was_interrupted_continues_where_it_was(tmp_path, stub):
    whole, parts = tmp_path / "whole.json", tmp_path / "parts.json"
    assert quick(whole).returncode == 0
    assert len(stub.asked) == 18 + 12
    asked, stub.asked = stub.asked, []

    def stop(i):
        if i in (5, 20, 24):  # the first of a call is asked for again
            raise KeyboardInterrupt

    stub.stop = staticmethod(stop)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            quick(parts)
    assert quick(parts).returncode == 0
    done = [run for i, run in enumerate(stub.asked, 1) if i not in (5, 20, 24)]
    assert done == asked, "no run is lost, and none is run twice"
    assert without_times(parts) == without_times(whole)
    assert set(tmp_path.iterdir()) == {whole, parts}, "nothing else is left"
    again = run_here(outer_steps.main, "--from-json", parts)
    assert again.stdout in quick(whole).stdout


def test_the_chosen_rate_is_the_best_that_was_tried(tmp_path, stub):
    quick(tmp_path / "rows.json")
    runs = [run for run in stub.asked if run[2] > 0]
    assert all(rate == ARMS[arm].rates[1] for arm, rate, _, _ in runs)


def test_a_rate_that_runs_were_made_with_stays(tmp_path):
    rows = outer_steps.plan(QUICK)
    trials = reports.of(rows, RATES, "Muon")
    assert reports.chosen_rate(rows, "Muon") is None
    trials[0] |= {"status": DONE, "last": 2.0}
    trials[1] |= {"status": DIVERGED, "last": None}
    assert reports.chosen_rate(rows, "Muon") == trials[0]["rate"]
    run = reports.of(rows, SEEDS, "Muon")[0]
    run |= {"status": DONE, "rate": trials[0]["rate"]}
    trials[2] |= {"status": DONE, "last": 1.0}
    assert reports.chosen_rate(rows, "Muon") == trials[0]["rate"]


def test_a_run_that_fails_does_not_end_the_others(tmp_path, stub):
    def stop(i):
        if i in (2, 19):
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory\nin detail")

    stub.stop = staticmethod(stop)
    path = tmp_path / "rows.json"
    result = quick(path)
    assert result.returncode == 0, result.stderr
    rows = json.loads(path.read_text())["rows"]
    failed = "failed: RuntimeError: RESOURCE_EXHAUSTED: Out of memory"
    statuses = [row["status"] for row in rows]
    assert [i for i, status in enumerate(statuses, 1) if status != DONE] == [2, 19]
    assert statuses[1] == statuses[18] == failed
    assert f"seeds: Muon, rate 0.02, seed 1: {failed}" in result.stdout
    assert "none, with 1 pair" in result.stdout, "seed 2 alone is left"
    stub.stop, stub.asked = staticmethod(lambda i: None), []
    assert quick(path).returncode == 0
    assert [run[0] for run in stub.asked] == ["Muon, Nesterov", "Muon"], "again"


def test_an_arm_without_a_rate_says_so_and_the_others_go_on(tmp_path, stub):
    def stop(i):
        if i in (1, 7, 13):  # all rates of Muon alone
            raise RuntimeError

    stub.stop = staticmethod(stop)
    result = quick(tmp_path / "rows.json")
    assert result.returncode == 0, result.stderr
    line = "seeds: Muon, seed 1: not run, no rate of this arm was tried to its end"
    assert line in result.stdout
    assert len(stub.asked) == 18 + 10
    verdicts = result.stdout.partition("read at")[2]
    assert verdicts.count("none, with 0 pairs") == 1 + 2 * 2, "all that need it"
    assert "| AdamW, lookahead | 0.006 | last weights | " in verdicts


def test_what_would_start_after_the_deadline_is_not_run(tmp_path, stub, monkeypatch):
    now = 0.0
    monkeypatch.setattr(outer_steps.time, "perf_counter", lambda: now)

    def stop(i):
        nonlocal now
        now += 60

    stub.stop = staticmethod(stop)
    path = tmp_path / "rows.json"
    # Runs start at 0 to 19 minutes, of which the last two are of seed 1.
    result = quick(path, "--minutes", 19.5)
    assert len(stub.asked) == 20
    assert json.loads(path.read_text())["seconds"] == 20 * 60
    line = "seeds: Muon, EMA-Nesterov, seed 1: not run, the time is over"
    assert line in result.stdout
    assert result.stdout.count("the time is over") == 10
    quick(path, "--minutes", 19.5)
    assert len(stub.asked) == 20, "minutes are those of all calls"
    quick(path, "--minutes", 22.5, "--this-call", 100)
    assert len(stub.asked) == 23
    quick(path, "--minutes", 100, "--this-call", 3)
    assert len(stub.asked) == 26
    quick(path)
    assert len(stub.asked) == 30
    now, stub.asked = 0.0, []
    quick(tmp_path / "other.json", "--minutes", 0)
    assert stub.asked == []


def test_no_run_starts_that_would_outlast_the_call(monkeypatch):
    now = 100.0
    monkeypatch.setattr(outer_steps.time, "perf_counter", lambda: now)
    clock = outer_steps.Clock(before=1200, minutes=35, this_call=9)
    clock.step, clock.compiling = 0.02, 30.0
    now += 440
    assert clock.spent() == 1640
    assert clock.may_start(3000), "ends after 530 s"
    now += 11
    assert not clock.may_start(3000), "would end after 541 s"
    assert clock.may_start(600)
    clock = outer_steps.Clock(before=2050, minutes=35, this_call=INF)
    now += 49
    assert clock.may_start(3000), "starts before the limit, however long it takes"
    now += 1
    assert not clock.may_start(30)


@pytest.mark.parametrize("change", ["text", "rates"])
def test_a_file_of_other_settings_is_not_continued(tmp_path, stub, monkeypatch, change):
    path = tmp_path / "rows.json"
    quick(path)
    before = path.read_text()
    if change == "text":
        text = source_text.split(TEXTS | {"i": b"more"})
        monkeypatch.setattr(outer_steps, "source_text", lambda most: text)
    else:
        other = ARMS["Muon"]._replace(rates=(0.1, 0.2, 0.4))
        monkeypatch.setitem(ARMS, "Muon", other)
    result = quick(path)
    assert result.returncode == 2
    assert "is of other settings or text. Write to another.\n" in result.stderr
    assert path.read_text() == before


def test_too_little_text_is_refused(tmp_path, stub, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    result = run_here(outer_steps.main, "--json", tmp_path / "rows.json")
    assert result.returncode == 2
    assert "at least 100,000,000 bytes to train on are needed, got 3," in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--json is needed"),
        (["--json", "rows.json"], "a GPU is needed, or --quick, got a CPU."),
        (["--quick", "--json", "missing/rows.json"], "the folder of missing/rows.json"),
        (
            ["--quick", "--picture", "steps.jpg"],
            "--picture must be a .png, got steps.jpg",
        ),
        (["--from-json", "missing.json"], "--from-json must be a file of --json"),
    ],
)
def test_a_mistake_is_answered_with_one_line(arguments, message):
    check_refused(outer_steps.main, arguments, message)


# What is trained.


@pytest.mark.parametrize("steps", [60, 600, 3000])
def test_the_rate_grows_for_a_twentieth_and_then_falls_to_zero(steps):
    warm_up = steps // 20
    expected = [0.02 * (t + 1) / warm_up for t in range(warm_up)] + [
        0.02 * (steps - t) / (steps - warm_up) for t in range(warm_up, steps + 1)
    ]
    rate = jax.jit(outer_steps.warm_up_and_decay(0.02, steps))
    np.testing.assert_allclose(
        jax.vmap(rate)(jnp.arange(steps + 1)), expected, rtol=1e-5, atol=1e-9
    )
    assert expected[-1] == 0
    assert expected[-2] < 0.02 / (0.9 * steps)


def reference_loss(params, windows, heads):
    """The model in NumPy, a window and a head at a time."""
    p = {name: np.asarray(value, np.float64) for name, value in params.items()}

    def norm(x):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)

    def turn(x):
        half = x.shape[-1] // 2
        pairs = x[:, :half] + 1j * x[:, half:]
        angle = np.outer(np.arange(len(x)), 1000.0 ** (-np.arange(half) / half))
        pairs = pairs * np.exp(1j * angle)
        return np.concatenate([pairs.real, pairs.imag], 1)

    losses = []
    for window in windows:
        x = p["embedding"][window[:-1]]
        for i in range(len(p["qkv"])):
            parts = np.split(norm(x) @ p["qkv"][i], 3 * heads, 1)
            attended = []
            for head in range(heads):
                q, k, v = parts[head::heads]
                scores = turn(norm(q)) @ turn(norm(k)).T / np.sqrt(q.shape[1])
                scores[np.triu_indices(len(x), 1)] = -np.inf
                weights = np.exp(scores - scores.max(1, keepdims=True))
                attended.append(weights / weights.sum(1, keepdims=True) @ v)
            x = x + np.concatenate(attended, 1) @ p["out"][i]
            hidden = norm(x) @ p["up"][i]
            tanh = np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3))
            x = x + 0.5 * hidden * (1 + tanh) @ p["down"][i]
        logits = (norm(x) * p["scale"]) @ p["head"]
        for row, target in zip(logits, window[1:], strict=True):
            losses.append(np.log(np.exp(row).sum()) - row[target])
    return np.mean(losses)


@pytest.mark.parametrize(("dtype", "error"), [("bfloat16", 0.02), ("float32", 1e-5)])
def test_the_loss_is_that_of_a_transformer_in_numpy(monkeypatch, dtype, error):
    monkeypatch.setattr(outer_steps, "COMPUTE", dtype)
    key = jax.random.key(0)
    params = outer_steps.init_params(key, QUICK)
    windows = jax.random.randint(key, (2, 9), 0, 256).astype(jnp.uint8)

    @jax.jit
    def loss_fn(params):
        return outer_steps.loss_fn(params, windows, QUICK.heads, "xla")

    assert loss_fn(params) == pytest.approx(math.log(256)), "the head starts at zero"
    params["head"] = jax.random.normal(key, params["head"].shape) / 4
    params["scale"] = jnp.linspace(0.5, 1.5, QUICK.width)
    # Far from the queries and keys that are normal to begin with.
    params["qkv"] *= jnp.linspace(0.2, 3.0, 3 * QUICK.width)[None, None]
    expected = reference_loss(params, np.asarray(windows), QUICK.heads)
    assert abs(expected - math.log(256)) > 0.5, "it differs from a guess"
    assert loss_fn(params) == pytest.approx(expected, abs=error)


def test_where_cudnn_fails_the_attention_is_that_of_xla(monkeypatch, capsys):
    assert outer_steps.attention_here(QUICK) == "xla"
    assert capsys.readouterr().out == ""
    # As on a GPU whose cuDNN is missing or too old.
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert outer_steps.attention_here(QUICK) == "xla"
    out = capsys.readouterr().out
    assert out.startswith("attention by XLA, since cuDNN's failed: RuntimeError: ")


def test_windows_are_stretches_of_the_text():
    text = jnp.arange(50, dtype=jnp.uint8)
    windows = outer_steps.windows_at(text, jnp.array([0, 7, 45]), 4)
    assert windows.tolist() == [[s, s + 1, s + 2, s + 3, s + 4] for s in (0, 7, 45)]


@pytest.mark.parametrize(("steps", "points"), [(3000, 10), (600, 2), (120, 2)])
def test_the_tail_is_averaged_once_a_cycle(steps, points):
    weights = np.random.default_rng(0).normal(size=(steps // K, 3))
    average = jnp.zeros(3)
    for i, row in enumerate(weights, start=1):
        average = outer_steps.tail_average(average, jnp.asarray(row), i * K, steps)
    np.testing.assert_allclose(average, weights[-points:].mean(0), atol=1e-6)


SMALL = QUICK._replace(depth=2, width=4)


def small_params(key):
    return outer_steps.init_params(jax.random.key(key), SMALL)


def test_muon_takes_the_layers_matrices_one_by_one_and_adamw_the_rest():
    params, grads = small_params(0), small_params(1)
    grads = jax.tree.map(lambda g: g + 0.5, grads)

    def rate(t):
        return 0.02 / (t + 1)

    tx = outer_steps.muon(rate)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    alone = contrib.muon(rate, weight_decay=0.01)
    names = ("qkv", "out", "up", "down")
    for layer in range(2):
        ps, gs = (
            {name: tree[name][layer] for name in names} for tree in (params, grads)
        )
        each, _ = jax.jit(alone.update)(gs, alone.init(ps), ps)
        for name, update in each.items():
            np.testing.assert_allclose(
                updates[name][layer], update, rtol=2e-3, atol=1e-5
            )
    for name in ("embedding", "scale", "head"):
        # Adam's first step is the rate, times the sign.
        expected = -0.15 * 0.02 * np.sign(grads[name])
        np.testing.assert_allclose(updates[name], expected, rtol=1e-3)


def test_adamw_decays_the_layers_matrices_alone():
    params = small_params(0)
    tx = outer_steps.adamw(lambda t: 0.5)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zeros, tx.init(params), params)
    for name, update in updates.items():
        share = 0.05 if name in ("qkv", "out", "up", "down") else 0.0
        np.testing.assert_allclose(update, -share * params[name], rtol=1e-5)


def test_ema_nesterov_looks_ahead_in_its_window_alone():
    steps, params = 100, jnp.ones(2)
    tx = outer_steps.with_ema_nesterov(optax.sgd(0.1), steps)
    state, ahead = tx.init(params), []
    for t in range(steps):
        gap = slow_params(state, params) - params
        updates, state = tx.update(params, state, params)
        params = optax.apply_updates(params, updates)
        if bool((gap != 0).any()):
            ahead.append(t)
    assert ahead == list(range(16, 76))


WRAPPED = [name for name, arm in ARMS.items() if arm.alone != name]


@pytest.mark.parametrize("name", slow_but(["AdamW, Nesterov"], WRAPPED))
def test_at_the_end_the_weights_to_evaluate_are_the_parameters(name):
    arm, steps, params = ARMS[name], 2 * K, small_params(0)
    tx = outer_steps.optimizer(arm, 0.01, steps)

    @jax.jit
    def train(params):
        def train_step(carry, _):
            params, state = carry
            grads = jax.tree.map(lambda p: p - 1.0, params)
            updates, state = tx.update(grads, state, params)
            carry = optax.apply_updates(params, updates), state
            gaps = jax.tree.map(
                lambda a, b: jnp.abs(a - b).max(),
                slow_params(state, carry[0]),
                carry[0],
            )
            return carry, jax.tree.reduce(jnp.maximum, gaps)

        return jax.lax.scan(train_step, (params, tx.init(params)), length=steps)[1]

    gaps = train(params)
    assert gaps.max() > 1e-4, "they differ before"
    assert gaps[-1] == 0


@pytest.mark.slow
def test_a_run_is_a_plain_loop_with_batches_that_follow_from_the_seed():
    size, steps, seed = QUICK._replace(segment=K), 2 * K, 3
    rng = np.random.default_rng(0)
    # In stretches that differ, so that it counts which of them are in a batch.
    letters = 40 * rng.integers(6, size=300).repeat(100)
    letters += rng.geometric(0.2, size=30_000).clip(max=40)
    train, held = np.split(letters.astype(np.uint8), [27_000])
    text = source_text.Text(train, held, ["a"], ["b"], "")
    params = outer_steps.init_params(jax.random.key(seed), size)
    inner = outer_steps.adamw(outer_steps.warm_up_and_decay(0.004, steps))
    state, phi, momentum, at_syncs = inner.init(params), params, params, []

    @jax.jit
    def train_step(params, state, windows):
        grads = jax.grad(outer_steps.loss_fn)(params, windows, size.heads, "xla")
        updates, state = inner.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    batches = jax.random.fold_in(jax.random.key(seed), 1)
    for t in range(steps):
        key = jax.random.fold_in(batches, t)
        starts = jax.random.randint(key, (size.batch,), 0, len(train) - size.context)
        windows = np.stack([train[s : s + size.context + 1] for s in starts.tolist()])
        params, state = train_step(params, state, jnp.asarray(windows))
        if (t + 1) % K == 0:
            pseudo_grad = add(phi, params, -1.0)
            momentum = add(pseudo_grad, momentum, 0.6) if at_syncs else pseudo_grad
            phi = params = add(phi, add(pseudo_grad, momentum, 0.6), -0.7)
            at_syncs.append(phi)

    every = (len(held) - size.context - 1) / (size.windows - 1)
    starts = [int(i * every) for i in range(size.windows)]
    held_out = np.stack([held[s : s + size.context + 1] for s in starts])
    average = jax.tree.map(lambda a, b: (a + b) / 2, *at_syncs)
    losses = [
        float(outer_steps.loss_fn(weights, jnp.asarray(held_out), size.heads, "xla"))
        for weights in (*at_syncs, average)
    ]
    trainer = outer_steps.Trainer(text, size)
    row = trainer("AdamW, Nesterov", 0.004, seed, steps)
    (_, first), (_, last) = row["curve"]
    assert [first, last, row["tail"]] == pytest.approx(losses, abs=2e-3)
    assert row["last"] == last
    assert first - last > 0.01
    assert abs(row["tail"] - last) > 0.005


def add(a, b, share):
    return jax.tree.map(lambda a, b: a + share * b, a, b)


# What it is trained on.


def metadata(**fields):
    message = Message()
    for name, values in fields.items():
        for value in values if isinstance(values, list) else [values]:
            message[name.replace("_", "-")] = value
    return message


@pytest.mark.parametrize(
    ("fields", "permissive"),
    [
        ({"License_Expression": "MIT"}, True),
        ({"License_Expression": "BSD-3-Clause AND 0BSD AND MIT AND Zlib"}, True),
        ({"License": "Apache-2.0"}, True),
        ({"Classifier": "License :: OSI Approved :: BSD License"}, True),
        ({"License_Expression": "PSF-2.0"}, True),
        # The whole text, which speaks of others; the classifier decides.
        (
            {
                "License": "Copyright (c) somebody\nThe GPL is another",
                "Classifier": "License :: OSI Approved :: MIT License",
            },
            True,
        ),
        ({"License_Expression": "MPL-2.0 AND MIT"}, False),
        ({"License": "LGPL-3.0"}, False),
        (
            {"License": "MIT", "Classifier": "License :: Other/Proprietary License"},
            False,
        ),
        ({"License": "NVIDIA Proprietary Software"}, False),
        ({"License": "UNKNOWN"}, False),
        ({"Classifier": "Topic :: MIT :: Apache"}, False),
        ({}, False),
    ],
)
def test_only_permissive_licences_are_taken(fields, permissive):
    assert source_text.is_permissive(metadata(**fields)) == permissive


def test_packages_here_are_judged_by_their_metadata():
    found = dict(source_text.installed())
    assert found.keys() >= {"python", "jax", "optax"}
    assert any(path.name == "abc.py" for path in found["python"])
    assert not any("site-packages" in path.parts for path in found["python"])
    assert not found.keys() & {"tqdm", "certifi"}, "of which a part is under the MPL"


def test_files_are_read_once_and_without_vendored_code(tmp_path):
    files = {
        "a/one.py": b"one",
        "a/two.py": b"two",
        "a/_vendor/theirs.py": b"theirs",
        "a/data.txt": b"data",
        "a/table.py": b"x" * (source_text.LONGEST + 1),
        "b/copy.py": b"two",
        "b/own.py": b"own",
        "c/copy.py": b"one",
        "d/late.py": b"late",
    }
    packages = {}
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        packages.setdefault(name[0], []).append(path)
    packages["a"].append(tmp_path / "a" / "missing.py")
    texts = source_text.read(packages.items(), most=10**6)
    assert texts == {"a": b"one\ntwo", "b": b"own", "d": b"late"}
    texts = source_text.read(packages.items(), most=8)
    assert texts.keys() == {"a", "b"}, "until there is enough"


def test_no_package_is_in_both_parts():
    text = source_text.split(TEXTS)
    assert set(text.train_packages).isdisjoint(text.held_out_packages)
    assert {*text.train_packages, *text.held_out_packages} == TEXTS.keys()
    # 3,600 bytes in all, of which the smallest packages make a twentieth.
    assert text.held_out_packages == ["a", "b"]
    assert set(text.held_out.tolist()) == {1, 2, ord("\n")}
    assert set(text.train.tolist()) == {*range(3, 9), ord("\n")}
    assert len(text.held_out) == 301
    assert len(text.train) == 3300 + 5
    assert source_text.split(dict(reversed(TEXTS.items()))).sha256 == text.sha256
    assert source_text.split(TEXTS | {"a": b"\n" * 100}).sha256 != text.sha256
    with pytest.raises(ValueError, match="two packages or more are needed, got"):
        source_text.split({"a": b"alone"})


@pytest.mark.slow
def test_shrunk_it_trains_all_arms_and_claims_nothing(tmp_path):
    path, picture = tmp_path / "rows.json", tmp_path / "steps.png"
    result = quick(path, "--picture", picture)
    assert result.returncode == 0, result.stderr
    assert (
        "SHRUNK: these figures say that the script runs, and nothing" in result.stdout
    )
    saved = json.loads(path.read_text())
    assert [row["status"] for row in saved["rows"]] == 30 * [DONE]
    for row in saved["rows"]:
        assert row["last"] < math.log(256) - 0.3, "it learns"
        assert row["tail"] != row["last"]
        assert [step for step, _ in row["curve"]] == list(
            range(QUICK.segment, row["steps"] + 1, QUICK.segment)
        )
    runs = {name: reports.of(saved["rows"], SEEDS, name) for name in ARMS}
    finals = [row["last"] for rows in runs.values() for row in rows]
    assert len(set(finals)) == len(finals), "arms and seeds differ"
    assert picture.read_bytes().startswith(b"\x89PNG")
    again = run_here(outer_steps.main, "--from-json", path)
    assert again.stdout in result.stdout
