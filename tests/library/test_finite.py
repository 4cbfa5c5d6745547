"""Do the slow weights stay finite, even if the fast ones do not?

A slow weight takes the value that a sync computes only if that is finite in its dtype.
A cycle does not start from an element that is not finite. An outer optimizer is
given 0 for a pseudo-gradient that is not finite, and its update is dropped there.
"""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from helpers.compiling import as_shipped
from helpers.rows import slow_but

from optax_lookahead import lookahead, outer_loop, slow_params
from optax_lookahead._state import is_finite

SIZE, STEPS, K, RATE = 400, 24, 3, 0.25
DTYPES = {
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float32": np.float32,
    "complex64": np.complex64,
}
MOMENTUM = 0.5


def finite(x):
    x = np.asarray(x)
    if np.iscomplexobj(x):
        return finite(x.real) & finite(x.imag)
    return np.isfinite(x.astype(np.float64))


def blow_ups(dtype):
    """Returns start and updates, of which about a tenth is not finite."""
    rng = np.random.default_rng(1)
    largest = float(ml_dtypes.finfo(dtype).max) ** (1 if dtype == np.float16 else 0.01)
    start = rng.normal(size=SIZE) * 0.2 * largest
    updates = rng.normal(size=(STEPS, SIZE)) * 0.2 * largest
    bad = rng.random((STEPS, SIZE))
    for value, low in ((np.nan, 0.0), (np.inf, 0.01), (-np.inf, 0.02)):
        updates[(bad >= low) & (bad < low + 0.01)] = value
    if dtype == np.complex64:
        swapped = rng.random(SIZE) < 0.5  # in the real or in the imaginary part
        start = start + 1j * rng.normal(size=SIZE)
        parts = np.where(swapped, updates, 1.0), np.where(swapped, 1.0, updates)
        updates = np.empty((STEPS, SIZE), np.complex64)
        updates.real, updates.imag = parts
    return start.astype(dtype), updates.astype(dtype)


def interpolation(alpha, dtype):
    def step(u, g, ok, memory):
        with np.errstate(all="ignore"):
            return dtype(u + dtype(dtype(1 - alpha) * g)), memory

    return step


def nesterov(rate, dtype):
    def step(u, g, ok, memory):
        with np.errstate(all="ignore"):
            memory = dtype(g + dtype(MOMENTUM) * memory)
            ahead = dtype(g + dtype(MOMENTUM) * memory)
            slow_update = np.where(ok, dtype(dtype(-rate) * ahead), dtype(0))
            return dtype(u + dtype(g + slow_update)), memory

    return step


def by_the_rule(start, updates, outer_step, dtype):
    """Returns parameters and slow weights after each step, element by element."""
    p, phi, memory = start.copy(), start.copy(), np.zeros_like(start)
    visited = []
    for i, u in enumerate(updates):
        with np.errstate(all="ignore"):
            if i % K == 0:
                phi = np.where(finite(p), p, phi)
            g = dtype(phi - dtype(p + u))
            if (i + 1) % K == 0:
                ok = finite(g)
                u, memory = outer_step(u, np.where(ok, g, dtype(0)), ok, memory)
            p = dtype(p + u)
            if (i + 1) % K == 0:
                phi = np.where(finite(p), p, phi)
        visited.append((p, phi, memory))
        if i % 7 == 6:  # the loop repairs what it can
            p = np.where(finite(p), p, phi)
    return visited


def by_the_package(tx, start, updates, transform):
    # An inner optimizer that returns what it is given.
    step = transform(tx.update)
    p, state, visited = jnp.asarray(start), tx.init(jnp.asarray(start)), []
    for i, u in enumerate(updates):
        u, state = step(jnp.asarray(u), state, p)
        p = optax.apply_updates(p, u)
        visited.append((p, state))
        if i % 7 == 6:
            p = jnp.where(jnp.isfinite(p), p, slow_params(state, p))
    return visited


def assert_same(got, expected, dtype, where=None):
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.dtype == expected.dtype
    where = np.ones(got.shape, bool) if where is None else where
    np.testing.assert_array_equal(finite(got)[where], finite(expected)[where])
    where = where & finite(expected)
    wide = np.complex64 if np.iscomplexobj(got) else np.float32
    got, expected = got[where].astype(wide), expected[where].astype(wide)
    # A few roundings, which a fused program makes in other places.
    tolerance = 16 * float(ml_dtypes.finfo(dtype).eps) * np.max(np.abs(expected))
    off = np.abs(got - expected) > tolerance
    # And in float16 a few elements that are just below or just above an overflow.
    assert np.mean(off) <= (0.02 if dtype == np.float16 else 0.0)


@pytest.mark.parametrize("transform", [lambda f: f, as_shipped], ids=["eager", "jit"])
@pytest.mark.parametrize("outer", ["fraction", "nesterov"])
@pytest.mark.parametrize("name", slow_but(["float16", "float32"], list(DTYPES)))
def test_each_element_follows_the_rule_by_itself(name, outer, transform):
    dtype, inner = DTYPES[name], optax.identity()
    start, updates = blow_ups(dtype)
    if outer == "fraction":
        tx, step = lookahead(inner, K, 0.25), interpolation(0.25, dtype)
    else:
        tx = outer_loop(inner, optax.sgd(0.7, momentum=MOMENTUM, nesterov=True), K)
        step = nesterov(0.7, dtype)
    expected = by_the_rule(start, updates, step, dtype)
    visited = by_the_package(tx, start, updates, transform)
    # A fused program rounds float16 otherwise, and overflows for other elements.
    same = np.ones(SIZE, bool)
    for (p, phi, memory), (params, state) in zip(expected, visited, strict=True):
        same &= finite(p) == finite(params)
        assert_same(params, p, dtype, same)
        if state.steps_since_sync == 0:
            assert_same(state.slow_params, phi, dtype, same)
            if outer == "nesterov":
                assert_same(state.outer_state[0].trace, memory, dtype, same)
        assert np.all(finite(slow_params(state, params)))
        if dtype != np.float16:  # where the momentum itself overflows here
            assert all(np.all(finite(x)) for x in jax.tree.leaves(state.outer_state))
    assert np.mean(same) > (0.9 if dtype == np.float16 else 0.999)
    # Both cases occurred.
    ends = np.stack([finite(params) for params, _ in visited])
    assert 0.02 < np.mean(~ends) < 0.4


@pytest.mark.parametrize("transform", [lambda f: f, as_shipped], ids=["eager", "jit"])
@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_wide_slow_weights_stay_finite_and_finite_elements_train(name, transform):
    dtype = DTYPES[name]
    start, updates = blow_ups(dtype)
    healthy = np.all(finite(updates), 0) & (np.abs(start.astype(np.float32)) < 1e3)
    if name == "float16":
        start, updates = (x * dtype(1e-3) for x in (start, updates))
        healthy = np.all(finite(updates), 0)
    for tx in (
        lookahead(optax.identity(), K, 0.25, slow_dtype="float32"),
        outer_loop(optax.identity(), optax.sgd(0.25), K, slow_dtype="float32"),
    ):
        visited = by_the_package(tx, start, updates, transform)
        phi, p = start.astype(np.float64), start.astype(np.float64)
        for i, (params, state) in enumerate(visited):
            assert np.all(finite(state.slow_params))
            assert np.all(finite(slow_params(state, params)))
            with np.errstate(all="ignore"):  # also of elements that are not finite
                p = (p.astype(dtype) + updates[i]).astype(dtype).astype(np.float64)
                if (i + 1) % K == 0:
                    phi = phi + 0.25 * (p - phi)
                    p = phi.astype(dtype).astype(np.float64)
        # A cycle starts from the rounding of the slow weight, here too.
        scale = np.max(np.abs(phi[healthy]))
        off = np.abs(np.float64(state.slow_params) - phi)[healthy]
        assert np.max(off) < 20 * float(ml_dtypes.finfo(dtype).eps) * scale


def nothing_from_the_third_on(updates, state, params=None):
    bad = jnp.asarray([1.0, 1.0, jnp.nan, jnp.inf, 3e38])
    return jax.tree.map(lambda g: -0.5 * g * bad, updates), state


@pytest.mark.parametrize("slow_dtype", [None, "float32"])
@pytest.mark.parametrize("transform", [lambda f: f, as_shipped], ids=["eager", "jit"])
def test_where_the_outer_optimizer_returns_nan_or_inf_the_slow_weight_stays(
    transform, slow_dtype
):
    dtype = "float32" if slow_dtype is None else "bfloat16"
    trace = optax.trace(0.5)
    bad = optax.GradientTransformation(lambda p: (), nothing_from_the_third_on)
    tx = outer_loop(optax.sgd(1.0), optax.chain(trace, bad), 2, slow_dtype=slow_dtype)
    start = jnp.full(5, 8.0, dtype)
    params, state, step = start, tx.init(start), transform(tx.update)
    for _ in range(2):
        updates, state = step(jnp.full(5, 2.0, dtype), state, params)
        params = optax.apply_updates(params, updates)
    # Two steps of -2, of which the outer optimizer takes half.
    np.testing.assert_array_equal(state.slow_params, [6, 6, 8, 8, 8])
    # The parameter takes that update, unless the slow weight has more bits.
    lost = [jnp.nan, -jnp.inf, -jnp.inf] if slow_dtype is None else [8, 8, 8]
    np.testing.assert_array_equal(params, jnp.asarray([6, 6, *lost], dtype))
    np.testing.assert_array_equal(state.outer_state[0].trace, [4, 4, 4, 4, 4])
    np.testing.assert_array_equal(
        slow_params(state, params), jnp.asarray([6, 6, 8, 8, 8], dtype)
    )


LOSS_TARGET = jnp.asarray([1.0, -2.0, 0.5, 3.0])


def grad(params, step):
    return params - LOSS_TARGET + 0.1 * jnp.sin(step + params)


POLICIES = {
    "keep": "keep",
    "reset": "reset",
    "interpolate": "interpolate",
    "function": lambda state, fresh: jax.tree.map(
        lambda x, y: (x + y) / 2, state, fresh
    ),
}
TRANSFORMATIONS = {
    **{
        f"lookahead {name}": functools.partial(lookahead, k=K, inner_state=policy)
        for name, policy in POLICIES.items()
    },
    "nesterov": lambda inner: outer_loop(
        inner, optax.sgd(0.7, momentum=0.5, nesterov=True), K
    ),
    "adam outside": lambda inner: outer_loop(
        inner, optax.adam(0.1), K, inner_state="reset"
    ),
    "wide": lambda inner: lookahead(inner, K, slow_dtype="float32"),
}


@pytest.mark.parametrize("bad", slow_but([np.nan], [np.nan, np.inf]))
@pytest.mark.parametrize(
    "name",
    slow_but(["lookahead interpolate", "nesterov", "wide"], list(TRANSFORMATIONS)),
)
def test_after_a_blow_up_at_any_step_training_continues_from_the_slow_weights(
    name, bad
):
    tx = TRANSFORMATIONS[name](optax.sgd(0.1, momentum=0.5))
    start = jnp.asarray([0.3, 0.1, -0.2, 0.7], "bfloat16" if name == "wide" else None)

    def one_step(params, state, step, poison):
        grads = jnp.asarray(grad(params, step), params.dtype)
        updates, state = tx.update(grads + poison, state, params)
        return optax.apply_updates(params, updates), state

    one_step = jax.jit(one_step)
    none = jnp.zeros_like(start)
    for at in range(1, 2 * K + 2):
        params, state = start, tx.init(start)
        for step in range(3 * K):
            poison = none.at[1].set(bad) if step == at else none
            params, state = one_step(params, state, jnp.asarray(step), poison)
        assert not np.isfinite(params[1])
        for tree in (slow_params(state, params), state.slow_params, state.outer_state):
            assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(tree))
        # Only the element that blew up was left behind, at a sync before that.
        ends = jnp.where(at // K > 0, slow_params(state, params)[1] != start[1], True)
        assert ends
        params = slow_params(state, params)
        state, fresh, other = tx.init(params), tx.init(params), params
        for step in range(2 * K):
            params, state = one_step(params, state, jnp.asarray(step), none)
            other, fresh = one_step(other, fresh, jnp.asarray(step), none)
            np.testing.assert_array_equal(params, other)
        assert np.all(np.isfinite(params))


@pytest.mark.parametrize("debug", [False, True], ids=["", "debug_nans"])
@pytest.mark.parametrize(
    "name", slow_but(["lookahead keep", "nesterov", "wide"], list(TRANSFORMATIONS))
)
def test_entries_that_are_infinite_by_design_stay_and_raise_nothing(name, debug):
    tx = TRANSFORMATIONS[name](optax.sgd(0.1, momentum=0.5))
    dtype = "bfloat16" if name == "wide" else "float32"
    start = {
        "mask": jnp.asarray([0.0, -np.inf, np.inf], dtype),
        "w": jnp.asarray([1.0, 2.0, -0.5], dtype),
    }
    with jax.debug_nans(debug):
        step = jax.jit(tx.update)
        params, state = start, tx.init(start)
        for _ in range(2 * K + 1):
            grads = {"mask": jnp.zeros(3, dtype), "w": params["w"]}
            updates, state = step(grads, state, params)
            params = optax.apply_updates(params, updates)
            for tree in (params, slow_params(state, params), state.slow_params):
                np.testing.assert_array_equal(tree["mask"], start["mask"])
        assert np.all(np.abs(params["w"]) < np.abs(start["w"]))


OUTERS = {
    "adamw": optax.adamw(0.1),
    "nesterov": optax.sgd(0.7, momentum=0.5, nesterov=True),
}


@pytest.mark.parametrize("name", OUTERS)
@pytest.mark.parametrize(
    ("dtype", "slow_dtype"),
    [
        ("float16", None),
        ("float16", "float32"),
        ("bfloat16", "float32"),
        ("complex64", None),
        ("float32", None),
    ],
)
def test_infinite_entries_change_no_other_entry_in_any_dtype(dtype, slow_dtype, name):
    tx = outer_loop(optax.sgd(0.1), OUTERS[name], 2, slow_dtype=slow_dtype)

    def train(start):
        step = jax.jit(tx.update)
        params, state = start, tx.init(start)
        for _ in range(5):
            grads = 0.5 * jnp.where(jnp.isfinite(params), params, 0)
            updates, state = step(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params, state.slow_params

    infinite = -jnp.inf if dtype != "complex64" else complex(-np.inf, 1.0)
    start = jnp.asarray([1.0, infinite, 2.0, -0.5], dtype)
    with jax.debug_nans(True):
        both = train(start), train(start[::2])
    for got, alone in zip(*both, strict=True):
        assert got[1] == infinite
        np.testing.assert_allclose(
            np.asarray(got[::2], complex), np.asarray(alone, complex), rtol=1e-3
        )


def test_an_infinite_entry_that_is_loaded_later_is_put_into_the_slow_weights_too():
    tx = lookahead(optax.sgd(0.1), 2, 0.5)
    params = jnp.asarray([1.0, 0.0])
    state = tx.init(params)
    for _ in range(3):  # into the second cycle
        updates, state = tx.update(jnp.asarray([1.0, 0.0]), state, params)
        params = optax.apply_updates(params, updates)
    params = params.at[1].set(-jnp.inf)
    unknown = state
    state = state._replace(slow_params=state.slow_params.at[1].set(-jnp.inf))
    for s, expected in ((state, -jnp.inf), (unknown, 0.0)):
        updates, s = tx.update(jnp.asarray([1.0, 0.0]), s, params)
        assert s.steps_since_sync == 0
        assert s.slow_params[1] == expected


@pytest.mark.parametrize("transform", [lambda f: f, as_shipped], ids=["eager", "jit"])
@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
@pytest.mark.parametrize("given", ["schedule", "schedule of arrays", "array"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e39])
@pytest.mark.parametrize("slow_dtype", [None, "float32"])
def test_a_step_size_that_is_not_finite_does_not_change_the_slow_weights(
    slow_dtype, bad, given, transform
):
    start = {
        dtype: {
            "s": jnp.asarray(1.5, dtype),
            "v": jnp.asarray([0.0, -2.0, 0.5], dtype),
            "w": jnp.ones((2, 1, 2), dtype),
        }
        for dtype in ("float32", "bfloat16", "float16")
    }
    as_array = jnp.float32(bad)  # 1e39 is beyond it

    def steps(alpha):
        schedules = {
            "schedule": lambda t: bad,
            "schedule of arrays": lambda t: jnp.where(t >= 0, alpha, 0.5),
            "array": alpha,
        }
        tx = lookahead(optax.sgd(0.5), 2, schedules[given], slow_dtype=slow_dtype)
        params, state = start, tx.init(start)
        for _ in range(2):
            updates, state = tx.update(
                jax.tree.map(jnp.ones_like, params), state, params
            )
            params = optax.apply_updates(params, updates)
        return state, slow_params(state, params)

    state, slow = transform(steps)(as_array)
    assert state.sync_count == 1
    for tree in (state.slow_params, slow):
        jax.tree.map(
            lambda x, y: np.testing.assert_array_equal(x, y.astype(x.dtype)),
            tree,
            start,
        )


def test_moments_that_are_nan_are_cleared_by_a_reset_or_by_a_new_state():
    tx = lookahead(optax.adam(0.1), 2, 0.5, inner_state="reset")
    params = jnp.ones(2)
    updates, state = tx.update(jnp.asarray([jnp.nan, 1.0]), tx.init(params), params)
    params = slow_params(state, optax.apply_updates(params, updates))
    _, kept = tx.update(jnp.ones(2), state, params)  # ends the cycle
    assert np.all(np.isfinite(kept.fast_state[0].mu))
    assert np.all(np.isfinite(tx.init(params).fast_state[0].mu))


@pytest.mark.parametrize(
    "dtype", ["float16", "bfloat16", "float8_e5m2", "float8_e4m3fn", "float8_e3m4"]
)
def test_what_rounds_to_infinity_is_not_finite_and_all_else_is(dtype):
    largest = np.float32(jnp.finfo(dtype).max)
    with np.errstate(over="ignore"):
        x = largest * np.linspace(0.99, 1.15, 100_001, dtype=np.float32)
        stored = x.astype(jnp.dtype(dtype)).astype(np.float32)
    p = jnp.zeros((), dtype)
    expected = np.isfinite(stored)
    if jnp.finfo(dtype).bits == 8:  # where what only rounds down to the largest is not
        expected &= x <= largest
    np.testing.assert_array_equal(is_finite(jnp.asarray(x), p), expected)
    # And of what is stored already, the infinite alone.
    held = jnp.asarray([-largest, largest, 0.0]).astype(dtype)
    assert is_finite(held).all()
    assert not is_finite(jnp.asarray([np.nan, np.inf]).astype(dtype)).any()
