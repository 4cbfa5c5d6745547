"""Does a slow copy wider than the parameters keep the bits that small steps need?"""

import functools
import pickle

import equinox as eqx
import flax.serialization
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import nnx
from helpers.compiling import as_shipped
from helpers.training import scanned, trajectory
from helpers.trees import bits

from optax_lookahead import lookahead, outer_loop, slow_params

BF16, F16 = ml_dtypes.bfloat16, np.float16
ULP = 2.0**-7  # of bfloat16 between 1 and 2
CYCLES = 200
NARROW = pytest.mark.parametrize("dtype", [BF16, F16], ids=["bfloat16", "float16"])


def eps(dtype):
    return float(ml_dtypes.finfo(dtype).eps)


def last(tx, params, gradient, steps):
    """Returns the last parameters and state of one compiled loop."""
    stacked = jax.jit(lambda p: scanned(tx, p, gradient, steps))(params)
    return jax.tree.map(lambda x: x[-1], stacked)


def one_ulp_up(params, step):
    return jax.tree.map(lambda p: jnp.full_like(p, -ULP), params)


@pytest.mark.parametrize("slow_dtype", [None, "bfloat16"])
def test_bfloat16_slow_weights_lose_small_steps(slow_dtype):
    tx = lookahead(optax.sgd(1.0), 2, 0.2, slow_dtype=slow_dtype)
    params, state = last(tx, jnp.ones(3, BF16), one_ulp_up, 2 * CYCLES)
    np.testing.assert_array_equal(params, 1.0)
    np.testing.assert_array_equal(state.slow_params, 1.0)


def test_optax_lookahead_loses_small_steps_too():
    params = optax.LookaheadParams.init_synced(jnp.ones(3, BF16))
    tx = optax.lookahead(optax.sgd(1.0), 2, 0.2)
    pair, _ = last(tx, params, lambda p, step: one_ulp_up(p.fast, step), 2 * CYCLES)
    np.testing.assert_array_equal(pair.fast, 1.0)
    np.testing.assert_array_equal(pair.slow, 1.0)


def test_a_float32_copy_follows_the_exact_trajectory():
    tx = lookahead(optax.sgd(1.0), 2, 0.2, slow_dtype="float32")
    stacked = scanned(tx, jnp.ones(3, BF16), one_ulp_up, 2 * CYCLES)
    params, state = jax.tree.map(lambda x: np.float64(x[1::2]), stacked)
    exact = 1.0 + 0.2 * 2 * ULP * np.arange(1, CYCLES + 1)[:, None]
    rounding = CYCLES * np.finfo(np.float32).eps  # one in each cycle, below 2
    np.testing.assert_allclose(state.slow_params - exact, 0.0, atol=rounding)
    np.testing.assert_allclose(params - exact, 0.0, atol=0.51 * ULP)
    np.testing.assert_allclose(state.slow_params[-1], 1.625, atol=rounding)


@NARROW
@pytest.mark.parametrize(("k", "alpha"), [(1, 1.0), (2, 0.2), (5, 0.5)])
def test_random_steps_between_neighbouring_weights_are_followed_exactly(
    dtype, k, alpha
):
    # Where all that the fast weights do is exact in their dtype, the slow ones are
    # Algorithm 1 in exact arithmetic, up to the rounding of float32.
    rng = np.random.default_rng(0)
    scale = 2.0 ** rng.integers(-12, 5, size=300) * rng.choice([-1, 1], size=300)
    start = np.asarray(scale * (1 + rng.integers(35, 93, 300) / 128), dtype)
    ulps = rng.integers(-2, 3, size=(CYCLES * k, 300))
    ulps[:] = np.where(np.arange(len(ulps))[:, None] % (2 * k) < k, ulps, 0)
    ulps[k:] -= np.where(np.arange(k, len(ulps))[:, None] % (2 * k) >= k, ulps[:-k], 0)
    steps = ulps * np.abs(scale) * eps(dtype)  # back to the start in every other cycle

    tx = lookahead(optax.sgd(1.0), k, alpha, slow_dtype="float32")
    rows = jnp.asarray(-steps, dtype)
    assert np.all(np.float64(rows) == -steps)
    _, state = last(tx, jnp.asarray(start), lambda p, i: rows[i], CYCLES * k)
    exact = np.float64(start) + alpha * steps.sum(0)
    np.testing.assert_allclose(
        state.slow_params, exact, rtol=CYCLES * np.finfo(np.float32).eps
    )


@NARROW
@pytest.mark.parametrize("value", [1.5, -384.0])
def test_updates_below_one_rounding_add_up(dtype, value):
    # At k = 1 and alpha = 1 the slow copy is the master copy of mixed precision.
    start = np.full(3, value, dtype)
    tiny = 0.3 * abs(np.float64(np.spacing(start[0])))
    step = np.asarray([tiny, -tiny, tiny / 8], dtype)
    assert np.all(start + step == start)
    params = jnp.asarray(start)

    def run(k, alpha, slow_dtype):
        tx = lookahead(optax.sgd(1.0), k, alpha, slow_dtype=slow_dtype)
        p, state = last(tx, params, lambda p, i: -jnp.asarray(step), CYCLES * k)
        return p, np.float64(state.slow_params) - np.float64(start)

    p, moved = run(1, 1.0, None)
    np.testing.assert_array_equal(p, start)
    _, moved = run(1, 1.0, "float32")
    np.testing.assert_allclose(moved, CYCLES * np.float64(step), rtol=0.02)
    # The fast weights are still narrow: they hold only the last of these updates.
    _, moved = run(5, 0.5, "float32")
    np.testing.assert_allclose(moved, 0.5 * CYCLES * np.float64(step), rtol=0.02)


def rounded(x, dtype):
    """Returns float32 numbers with the bits of a narrower dtype, of any exponent."""
    mantissa, exponent = np.frexp(x)
    scale = np.float32(2.0 / eps(dtype))
    return np.ldexp(np.round(mantissa * scale) / scale, exponent)


def simulate(start, steps, k, alpha):
    """Returns parameters and slow weights after every step of mixed precision.

    The parameters are rounded to their dtype after every step. The slow weights phi
    are float32. A sync moves them by a fraction of how far the fast weights ran from
    the rounding of phi, the last step unrounded; the parameters go to the new rounding
    of phi, by a step in their dtype.
    """
    dtype, wide = start.dtype, np.float32
    slack, tiny = wide(eps(dtype)), wide(ml_dtypes.finfo(dtype).tiny)
    p, phi, visited = start, wide(start), []
    for i, step in enumerate(steps):
        if i % k == 0:
            same = np.abs(wide(p) - phi) <= slack * np.maximum(np.abs(phi), tiny)
            phi = np.where(same, phi, wide(p))
        if (i + 1) % k == 0:
            run = wide(p) + wide(step) - rounded(phi, dtype)
            phi = phi + wide(alpha) * run
            step = (rounded(phi, dtype) - wide(p)).astype(dtype)
        p = (p + step).astype(dtype)
        visited.append((p, phi))
    return visited


@NARROW
def test_parameters_and_slow_weights_are_the_simulated_ones_in_every_bit(dtype):
    # Weights and steps of all magnitudes: most below one rounding, some far above.
    rng = np.random.default_rng(1)
    start = rng.normal(size=400) * 10.0 ** rng.uniform(-3, 1, size=400)
    start[:8] = 0.0
    size = np.abs(start) * 10.0 ** rng.uniform(-4, 0.5, size=400) + 1e-3
    steps = rng.normal(size=(2 * CYCLES, 400)) * size + 0.1 * size
    start, steps = start.astype(dtype), steps.astype(dtype)
    # A power of two, so that contracting product and sum rounds no differently.
    alpha = 0.25
    expected = simulate(start, steps, 2, alpha)

    tx = lookahead(optax.sgd(1.0), 2, alpha, slow_dtype="float32")
    update = as_shipped(tx.update)
    params = jnp.asarray(start)
    state = tx.init(params)
    for step, (p, phi) in zip(steps, expected, strict=True):
        updates, state = update(-step, state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_array_equal(bits(params), bits(p))
        np.testing.assert_array_equal(bits(state.slow_params), bits(phi))


def test_an_outer_optimizer_moves_the_wide_copy_in_its_precision():
    nesterov = optax.sgd(0.02, momentum=0.9, nesterov=True)
    tx = outer_loop(optax.sgd(1.0), nesterov, 2, slow_dtype="float32")
    params, state = last(tx, jnp.ones(3, BF16), one_ulp_up, 2 * CYCLES)
    assert {x.dtype for x in jax.tree.leaves(state.outer_state)} == {
        jnp.dtype("float32")
    }
    phi, trace = 1.0, 0.0
    for _ in range(CYCLES):
        pseudo_grad = -2 * ULP
        trace = pseudo_grad + 0.9 * trace
        phi -= 0.02 * (pseudo_grad + 0.9 * trace)
    assert phi < 2.0  # so bfloat16 has the spacing ULP throughout
    np.testing.assert_allclose(state.slow_params, phi, rtol=2e-5)
    np.testing.assert_allclose(np.float64(params), phi, rtol=0.51 * ULP)
    # A narrow copy stops moving.
    tx = outer_loop(optax.sgd(1.0), nesterov, 2)
    params, _ = last(tx, jnp.ones(3, BF16), one_ulp_up, 2 * CYCLES)
    assert abs(float(params[0]) - phi) > 10 * ULP


def test_every_leaf_of_a_mixed_tree_is_treated_as_if_alone():
    values = np.linspace(-2.0, 3.0, 7)
    params = {
        "bfloat16": jnp.asarray(values, BF16),
        "float16": jnp.asarray(values, F16),
        "float32": jnp.asarray(values, "float32"),
        "complex64": jnp.asarray(values + 1j, "complex64"),
        "int32": jnp.arange(7),
    }

    def gradient(params, step):
        return jax.tree.map(lambda p: (p / 4).astype(p.dtype), params)

    tx = lookahead(optax.sgd(0.125), 2, 0.2, slow_dtype="float32")
    visited = trajectory(tx, params, gradient, 9)
    wide = {name: jnp.dtype("float32") for name in ("bfloat16", "float16", "float32")}
    wide |= {name: jnp.dtype(name) for name in ("complex64", "int32")}
    for name, p in params.items():
        alone = trajectory(tx, p, gradient, 9)
        for (p, state), (all_params, all_states) in zip(alone, visited, strict=True):
            assert state.slow_params.dtype == wide[name]
            np.testing.assert_array_equal(all_params[name], p)
            np.testing.assert_array_equal(
                all_states.slow_params[name], state.slow_params
            )


def test_complex_parameters_have_a_wide_copy_too(x64):
    start = jnp.full(3, 1 + 1j, "complex64")
    tiny = 0.3 * float(np.finfo(np.float32).eps)
    tx = lookahead(optax.sgd(1.0), 1, 1.0, slow_dtype="float64")
    step = jnp.full(3, tiny * (1 - 2j), "complex64")
    params, state = last(tx, start, lambda p, i: -step, CYCLES)
    assert (params.dtype, state.slow_params.dtype) == ("complex64", "complex128")
    moved = CYCLES * np.complex128(step)
    np.testing.assert_allclose(state.slow_params - (1 + 1j), moved, rtol=1e-6)
    assert np.all(params != start)


# Other weights, loaded at the start of a cycle.


def after_three_cycles(dtype, size=200):
    rng = np.random.default_rng(2)
    start = rng.normal(size=size) * 10.0 ** rng.uniform(-3, 2, size=size)
    params = jnp.asarray(start, dtype)
    tx = lookahead(optax.sgd(0.1), 2, 0.3, slow_dtype="float32")
    rows = jnp.asarray(rng.normal(size=(6, size)) * np.abs(start), dtype)
    return tx, *last(tx, params, lambda p, i: rows[i], 6)


@NARROW
def test_parameters_that_the_loop_did_not_change_keep_the_bits_of_the_slow_weights(
    dtype,
):
    tx, params, state = after_three_cycles(dtype)
    wide = slow_params(state, params, wide=True)
    np.testing.assert_array_equal(wide, state.slow_params)
    assert np.mean(np.float32(params) != np.asarray(wide)) > 0.9  # bits there are
    _, later = tx.update(jnp.zeros_like(params), state, params)
    np.testing.assert_array_equal(bits(later.slow_params), bits(state.slow_params))


@NARROW
@pytest.mark.parametrize("sign", [-1, 1])
def test_parameters_that_were_replaced_are_taken(dtype, sign):
    tx, params, state = after_three_cycles(dtype)
    spacing = np.spacing(np.abs(np.asarray(params))).astype(np.float64)
    loaded = jnp.asarray(np.float64(params) + 3 * sign * spacing, dtype)
    wide = slow_params(state, loaded, wide=True)
    np.testing.assert_array_equal(wide, np.float32(loaded))
    _, later = tx.update(jnp.zeros_like(params), state, loaded)
    np.testing.assert_array_equal(later.slow_params, np.float32(loaded))
    # Within a cycle replaced parameters change the fast weights only.
    _, later = tx.update(jnp.zeros_like(params), later, params)
    assert later.steps_since_sync == 0
    expected = np.float32(loaded) + 0.3 * (np.float32(params) - np.float32(loaded))
    np.testing.assert_allclose(later.slow_params, expected, atol=0, rtol=1e-5)


@NARROW
def test_parameters_replaced_by_any_number_are_taken(dtype):
    tx, params, state = after_three_cycles(dtype)
    expected = np.array(state.slow_params)
    expected[:3] = 0.0, 100.0, -0.5
    loaded = params.at[:3].set(expected[:3].astype(dtype))
    # Except for NaN and infinity, from which no cycle starts.
    loaded = loaded.at[3:6].set(jnp.asarray([np.nan, np.inf, -np.inf], dtype))
    _, later = tx.update(jnp.zeros_like(params), state, loaded)
    np.testing.assert_array_equal(later.slow_params, expected)


def test_float16_weights_below_its_smallest_normal_number_keep_their_bits():
    smallest = 2.0**-24
    start = jnp.asarray([0.0, 3 * smallest, -8 * smallest], F16)
    tx = lookahead(optax.sgd(1.0), 2, 0.2, slow_dtype="float32")
    rise = jnp.full(3, -smallest, F16)
    params, state = last(tx, start, lambda p, i: rise, 2 * CYCLES)
    # The fast weights start from a rounding of the slow ones, which stay near it.
    exact = np.float64(start) + 0.2 * 2 * smallest * CYCLES
    np.testing.assert_allclose(state.slow_params, exact, atol=1.01 * smallest)
    np.testing.assert_allclose(params, exact, atol=1.51 * smallest)


def test_bits_are_dropped_seldom_and_only_below_the_rounding_of_the_last_update():
    # A step that carries a weight to nearly zero is rounded by more than the rounding
    # of what is left, which then looks like a weight that was replaced.
    rng = np.random.default_rng(3)
    start = jnp.asarray(rng.normal(size=500), BF16)
    target = jnp.asarray(rng.normal(size=500) * 0.1, BF16)
    tx = lookahead(optax.adam(0.02), 5, 0.5, slow_dtype="float32")

    def train_step(carry, step):
        params, state = carry
        noise = jax.random.normal(jax.random.fold_in(jax.random.key(0), step), (500,))
        grads = (params - target + noise).astype(BF16)
        updates, state = tx.update(grads, state, params)
        carry = optax.apply_updates(params, updates), state
        return carry, (carry[0], updates, state.slow_params)

    steps = jnp.arange(5 * CYCLES)
    _, visited = jax.lax.scan(train_step, (start, tx.init(start)), steps)
    params, updates, phi = (np.float32(x[4::5]) for x in visited)
    off = np.abs(params - phi)
    dropped = off > eps(BF16) * np.abs(phi)
    assert 0 < np.mean(dropped) < 0.01
    assert np.all(off <= 0.51 * eps(BF16) * (np.abs(updates) + 2 * np.abs(phi)))


def far_ahead(dtype, updates, syncs=40):
    """Returns weights, and slow weights of alpha = 0 after steps beyond their size."""
    rng = np.random.default_rng(4)
    start = {
        "s": jnp.asarray(0.0123, dtype),
        "v": jnp.asarray(0.01 * rng.normal(size=100), dtype),
        "w": jnp.asarray(0.01 * rng.normal(size=(2, 1, 50)), dtype),
    }
    cast = optax.stateless(lambda u, _: optax.tree.cast(u, updates))
    inner = optax.chain(optax.sgd(1.0), cast)
    tx = lookahead(inner, 2, 0.0, slow_dtype="float32")

    def gradient(params, step):
        return jax.tree.map(lambda p: jnp.full_like(p, -1 - 2 * (step % 2)), params)

    params, state = last(tx, start, gradient, 2 * syncs)
    return start, params, slow_params(state, params, wide=True)


@NARROW
def test_after_steps_beyond_their_size_narrow_updates_lose_the_bits_of_small_weights(
    dtype,
):
    start, _, slow = far_ahead(dtype, dtype)
    if dtype == BF16:
        assert slow["s"] == 0.015625
    for x, y in zip(jax.tree.leaves(slow), jax.tree.leaves(start), strict=True):
        off = np.abs(np.asarray(x) - np.float32(y))
        # By no more than the rounding of the step, which does not add up.
        assert np.max(off) <= 3.1 * eps(dtype)
    assert np.mean(np.asarray(slow["v"]) != np.float32(start["v"])) > 0.5


@NARROW
def test_with_updates_in_float32_small_weights_keep_all_bits(dtype):
    start, params, slow = far_ahead(dtype, "float32")
    for x, p, y in zip(*map(jax.tree.leaves, (slow, params, start)), strict=True):
        np.testing.assert_array_equal(bits(x), bits(y.astype(jnp.float32)))
        # The update of the smallest ones would need more bits than float32 has.
        np.testing.assert_allclose(
            np.float32(p), np.float32(y), rtol=eps(dtype), atol=2.0**-23
        )


# What it costs.


def compile_step(tx, params):
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    donated = as_shipped(step, donate_argnums=(0, 1))
    return donated.lower(params, tx.init(params), params)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda inner, **kwargs: lookahead(inner, 5, 0.5, **kwargs),
        lambda inner, **kwargs: outer_loop(inner, optax.sgd(0.5, 0.9), 5, **kwargs),
    ],
    ids=["lookahead", "outer_loop"],
)
def test_where_the_slow_copy_is_no_wider_the_program_is_the_same(wrap, dtype):
    params = [jnp.ones(1000, dtype), jnp.ones((3, 7), dtype)]
    unused = compile_step(wrap(optax.adam(0.1)), params)
    equal = compile_step(wrap(optax.adam(0.1), slow_dtype=dtype), params)
    assert equal.as_text() == unused.as_text()
    # The measure can tell.
    wider = compile_step(wrap(optax.adam(0.1), slow_dtype="float32"), params)
    assert (wider.as_text() == unused.as_text()) == (dtype == "float32")


def test_the_wide_copy_is_written_in_place_and_costs_its_size():
    params, inner = [jnp.full(80_000, i, BF16) for i in range(4)], optax.sgd(0.1)
    tx = lookahead(inner, 5, 0.5, slow_dtype="float32")
    alone = compile_step(inner, params).compile().memory_analysis()
    ours = compile_step(tx, params).compile().memory_analysis()
    extra = ours.argument_size_in_bytes - alone.argument_size_in_bytes
    assert extra == 4 * 4 * 80_000 + 2 * 4
    donated = sum(x.nbytes for x in jax.tree.leaves((params, tx.init(params))))
    assert ours.alias_size_in_bytes == donated
    assert ours.temp_size_in_bytes - alone.temp_size_in_bytes < 1000


# Reading, saving and loops.


def noisy(params, step):
    def leaf(p):
        noise = jax.random.normal(jax.random.fold_in(jax.random.key(4), step), p.shape)
        return (p + 0.1 * noise.astype(p.dtype)).astype(p.dtype)

    return jax.tree.map(leaf, params)


TREE = {
    "w": jnp.asarray(np.random.default_rng(5).normal(size=(4, 3)), BF16),
    "b": jnp.asarray([0.5, -1.5, 0.25], BF16),
}
TX = lookahead(optax.adam(0.01), 3, 0.3, slow_dtype="float32")
AROUND = {
    "chain": optax.chain(optax.clip(1.0), TX),
    "flatten": optax.flatten(TX),
    "masked": optax.masked(TX, {"w": True, "b": False}),
    "partition": optax.partition({"x": TX, "y": TX}, {"w": "x", "b": "y"}),
}


@pytest.mark.parametrize("name", AROUND)
def test_slow_params_are_of_the_parameters_dtype_and_wide_on_request(name):
    visited = trajectory(AROUND[name], TREE, noisy, 7, jax.jit)
    for step, (params, state) in enumerate(visited, start=1):
        slow, wide = slow_params(state, params), slow_params(state, params, wide=True)
        for leaf, p in params.items():
            assert slow[leaf].dtype == BF16
            has_copy = name != "masked" or leaf == "w"
            assert wide[leaf].dtype == ("float32" if has_copy else BF16)
            np.testing.assert_array_equal(
                bits(slow[leaf]), bits(np.asarray(wide[leaf]).astype(BF16))
            )
            if step % 3 == 0:
                np.testing.assert_array_equal(bits(slow[leaf]), bits(p))
                if has_copy:
                    assert np.any(np.float32(p) != np.asarray(wide[leaf]))


def test_an_nnx_optimizer_keeps_a_wide_copy_too():
    model = nnx.Linear(3, 4, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16)
    optimizer = nnx.Optimizer(model, TX, wrt=nnx.Param)
    x = jnp.ones((2, 3), jnp.bfloat16)

    @nnx.jit
    def train_step(model, optimizer):
        optimizer.update(model, nnx.grad(lambda m: jnp.sum(m(x) ** 2))(model))

    for step in range(1, 5):
        train_step(model, optimizer)
        params = nnx.state(model, nnx.Param)
        slow = slow_params(optimizer.opt_state, params)
        wide = slow_params(optimizer.opt_state, params, wide=True)
        assert {s.dtype for s in jax.tree.leaves(slow)} == {jnp.dtype("bfloat16")}
        assert {s.dtype for s in jax.tree.leaves(wide)} == {jnp.dtype("float32")}
        if step % 3 == 0:
            jax.tree.map(
                lambda s, p: np.testing.assert_array_equal(bits(s), bits(p)),
                slow,
                params,
            )


@pytest.mark.parametrize("at", [4, 6], ids=["within a cycle", "after a sync"])
def test_a_pickled_wide_copy_continues_bit_for_bit(at):
    train_step = jax.jit(
        lambda params, state, step: TX.update(noisy(params, step), state, params)
    )

    def run(params, state, steps):
        for step in steps:
            updates, state = train_step(params, state, step)
            params = optax.apply_updates(params, updates)
        return params, state

    saved = run(TREE, TX.init(TREE), range(at))
    restored = pickle.loads(pickle.dumps(jax.device_get(saved)))
    restored = jax.tree.map(jnp.asarray, restored)
    for x, y in zip(
        jax.tree.leaves(run(*restored, range(at, 13))),
        jax.tree.leaves(run(*saved, range(at, 13))),
        strict=True,
    ):
        np.testing.assert_array_equal(bits(x), bits(y))


def test_donated_steps_share_one_trace():
    traces = []

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def train_step(params, state, step):
        traces.append(step)
        updates, state = TX.update(noisy(params, step), state, params)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.copy, TREE)
    state = TX.init(params)
    in_scan = scanned(TX, TREE, noisy, 7)
    for step in range(7):
        old = jax.tree.leaves((params, state))
        params, state = train_step(params, state, jnp.asarray(step))
        assert all(x.is_deleted() for x in old)
        jax.tree.map(
            lambda x, y, step=step: np.testing.assert_allclose(
                np.float32(x), np.float32(y[step]), rtol=2e-2, atol=1e-3
            ),
            (params, state.slow_params),
            (in_scan[0], in_scan[1].slow_params),
        )
    assert len(traces) == 1


@pytest.mark.parametrize("slow_dtype", [None, "bfloat16", "float32"])
@pytest.mark.parametrize(
    "dtype",
    ["float8_e3m4", "float8_e4m3fn", "float8_e5m2", "float8_e5m2fnuz", "float4_e2m1fn"],
)
def test_floats_that_jax_does_not_promote_take_their_steps(dtype, slow_dtype):
    # All of these dtypes hold each of the numbers exactly.
    start = np.array([1.5, 1.0, 0.5, 0.0])
    inner, outer = optax.sgd(0.5), optax.sgd(0.5)
    for tx in (
        lookahead(inner, 2, 0.5, slow_dtype=slow_dtype),
        lookahead(inner, 2, 0.5, slow_dtype=slow_dtype, inner_state="interpolate"),
        outer_loop(inner, outer, 2, slow_dtype=slow_dtype),
    ):
        params = jnp.asarray(start).astype(dtype)
        state = tx.init(params)
        for moved in (0.5, 0.5, 1.0, 1.0):
            updates, state = tx.update(jnp.ones_like(params), state, params)
            params = optax.apply_updates(params, updates)
            assert params.dtype == updates.dtype == dtype
            if state.steps_since_sync == 0:
                for tree in (params, state.slow_params, slow_params(state, params)):
                    np.testing.assert_array_equal(np.float32(tree), start - moved)


@pytest.mark.parametrize("dtype", ["int2", "int4", "uint4"])
def test_integers_that_jax_does_not_promote_stay_beside_what_is_trained(dtype):
    inner = optax.masked(optax.sgd(0.5), {"w": True, "n": False})
    tx = lookahead(
        optax.chain(inner, optax.masked(optax.set_to_zero(), {"w": False, "n": True})),
        2,
    )
    params = {"w": jnp.ones(2), "n": jnp.ones(2, jnp.int32).astype(dtype)}
    state = tx.init(params)
    for _ in range(4):
        updates, state = tx.update(params, state, params)
        params = optax.apply_updates(params, updates)
    for n in (params["n"], state.slow_params["n"], slow_params(state, params)["n"]):
        assert n.dtype == dtype
        np.testing.assert_array_equal(n.astype(jnp.int32), 1)


# A slow copy with fewer bits than its parameter would stop training.

TOO_NARROW = (
    r"`slow_params` in the state must be at least as wide .* got {} at .* where {}"
)


def widened(state, dtype):
    """The remedy of the message."""
    return state._replace(slow_params=optax.tree.cast(state.slow_params, dtype))


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize(
    ("narrow", "wide"),
    [
        ("bfloat16", "float32"),
        ("float16", "float32"),
        ("float16", "bfloat16"),
        ("bfloat16", "float16"),
        ("float32", "float64"),
        ("complex64", "complex128"),
    ],
)
def test_parameters_that_became_wider_in_mid_run_are_refused(
    x64, narrow, wide, transform
):
    tx = lookahead(optax.sgd(0.1), 2)
    step = transform(tx.update)
    params = jnp.asarray([1.0, 2.0], narrow)
    _, state = step(params, tx.init(params), params)
    params = params.astype(wide)
    with pytest.raises(ValueError, match=TOO_NARROW.format(narrow, wide)):
        step(params, state, params)
    _, state = step(params, widened(state, wide), params)
    assert state.slow_params.dtype == wide


def test_a_bfloat16_model_that_float32_updates_make_float32_is_refused():
    # As `eqx.apply_updates` does, which adds without a cast.
    tx = lookahead(optax.adam(0.1, mu_dtype=jnp.float32), 2)
    params = {"w": jnp.ones(3, BF16)}
    state = tx.init(params)
    updates, state = tx.update(params, state, params)
    assert updates["w"].dtype == jnp.float32
    params = eqx.apply_updates(params, updates)
    with pytest.raises(ValueError, match=TOO_NARROW.format("bfloat16", "float32")):
        tx.update(params, state, params)


def test_a_state_that_was_cast_is_refused():
    tx = lookahead(optax.adam(0.1), 2)
    params = {"w": jnp.ones(3), "n": jnp.arange(3)}
    state = optax.tree.cast(tx.init(params), jnp.bfloat16)
    grads = {"w": jnp.ones(3), "n": jnp.zeros(3)}
    with pytest.raises(ValueError, match=TOO_NARROW.format("bfloat16", "float32")):
        tx.update(grads, state, params)


@pytest.mark.parametrize(
    "through",
    [
        lambda tx, params, state: flax.serialization.from_bytes(
            tx.init(params), flax.serialization.to_bytes(state)
        ),
        lambda tx, params, state: pickle.loads(pickle.dumps(state)),
    ],
    ids=["flax", "pickle"],
)
def test_a_restored_state_without_the_slow_dtype_asked_for_is_refused(through):
    params, inner = jnp.ones(3, BF16), optax.sgd(0.1)
    narrow, wide = lookahead(inner, 2), lookahead(inner, 2, slow_dtype="float32")
    state = through(wide, params, narrow.init(params))
    with pytest.raises(ValueError, match=TOO_NARROW.format("bfloat16", "float32")):
        wide.update(params, state, params)
    wide.update(params, widened(state, "float32"), params)
    # A state that is wider than asked for loses no bit, and keeps its dtype.
    state = through(narrow, params, wide.init(params))
    _, state = narrow.update(params, state, params)
    assert state.slow_params.dtype == jnp.float32
