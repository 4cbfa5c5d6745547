"""Do dtypes stay, and does arithmetic lose no bit that it could keep?"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.compiling import as_shipped
from helpers.training import trajectory
from helpers.trees import bits

from optax_lookahead import lookahead, slow_params

DTYPES = ["float16", "bfloat16", "float32", "float64", "complex64"]
INNERS = {
    "sgd": optax.sgd(0.05),
    "momentum": optax.sgd(0.05, momentum=0.9),
    "adam": optax.adam(0.05, eps=1e-4),  # float16 rounds 1e-8 to 0
}


def initial_params(dtype):
    """Returns magnitudes over four decades, where roundings differ."""
    rng = np.random.default_rng(0)
    scale = 10.0 ** rng.uniform(-3, 1, size=2000)
    values = rng.normal(size=2000) * scale
    if dtype == "complex64":
        values = values + 1j * rng.normal(size=2000) * scale
    return {"w": jnp.asarray(values, dtype), "b": jnp.asarray(values[0], dtype)}


def gradient(params, step):
    noise = jax.random.normal(jax.random.fold_in(jax.random.key(0), step), (2000,))
    return {
        "w": 0.3 * params["w"] + noise.astype(params["w"].dtype),
        "b": 0.3 * params["b"],
    }


def dtypes(tree):
    return jax.tree.map(jnp.result_type, tree)


@pytest.mark.parametrize("transform", [lambda f: f, as_shipped], ids=["eager", "jit"])
@pytest.mark.parametrize("name", INNERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_after_a_sync_slow_weights_equal_the_new_parameters_in_every_bit(
    x64, dtype, name, transform
):
    tx = lookahead(INNERS[name], 3, 0.37)
    visited = trajectory(tx, initial_params(dtype), gradient, 12, transform)
    for params, state in visited[2::3]:
        assert np.all(np.isfinite(np.asarray(params["w"])))
        for slow in (state.slow_params, slow_params(state, params)):
            jax.tree.map(
                lambda p, s: np.testing.assert_array_equal(bits(s), bits(p)),
                params,
                slow,
            )


@pytest.mark.parametrize("dtype", DTYPES)
def test_they_are_equal_too_when_only_the_update_is_jitted(x64, dtype):
    tx = lookahead(INNERS["adam"], 3, 0.37)
    params = initial_params(dtype)
    state, update = tx.init(params), as_shipped(tx.update)
    for step in range(9):
        updates, state = update(gradient(params, step), state, params)
        params = optax.apply_updates(params, updates)
        if (step + 1) % 3 == 0:
            np.testing.assert_array_equal(
                bits(state.slow_params["w"]), bits(params["w"])
            )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "alpha",
    [0.5, np.float64(0.5), jnp.asarray(0.5, jnp.float32), lambda t: jnp.asarray(0.5)],
    ids=["python", "numpy", "array", "schedule"],
)
def test_updates_and_state_keep_their_dtypes(x64, dtype, alpha):
    tx = lookahead(optax.sgd(0.05, momentum=0.9), 2, alpha)
    params = initial_params(dtype)
    state = tx.init(params)
    before = dtypes(state)
    for step in range(3):
        updates, state = tx.update(gradient(params, step), state, params)
        assert dtypes(updates) == dtypes(params)
        assert dtypes(state) == before
        params = optax.apply_updates(params, updates)


@pytest.mark.parametrize(
    ("params_dtype", "updates_dtype"),
    [("float32", "bfloat16"), ("bfloat16", "float32"), ("float16", "float32")],
)
def test_updates_have_the_dtype_of_the_inner_updates(params_dtype, updates_dtype):
    tx = lookahead(optax.sgd(0.05), 1, 0.5)
    params, grads = jnp.ones(3, params_dtype), jnp.ones(3, updates_dtype)
    updates, state = tx.update(grads, tx.init(params), params)
    assert updates.dtype == updates_dtype
    assert state.slow_params.dtype == params_dtype
    np.testing.assert_array_equal(
        state.slow_params, optax.apply_updates(params, updates)
    )


# A step size as a number, as an array, which a tracer also is, and from a schedule.
FORMS = {
    "python": lambda alpha: alpha,
    "numpy": lambda alpha: np.float32(alpha),
    "array": lambda alpha: jnp.asarray(alpha, jnp.float32),
    "schedule": lambda alpha: lambda t: alpha,
    "schedule of arrays": lambda alpha: lambda t: alpha + 0.0 * t,
}
every_form = pytest.mark.parametrize("form", FORMS)


@pytest.mark.parametrize(
    ("name", "form"),
    [(name, "python") for name in INNERS] + [("momentum", form) for form in FORMS],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_alpha_one_is_the_inner_optimizer_bit_for_bit_when_eager(
    x64, dtype, name, form
):
    params = initial_params(dtype)
    alone = trajectory(INNERS[name], params, gradient, 7)
    tx = lookahead(INNERS[name], 2, FORMS[form](1.0))
    ours = trajectory(tx, params, gradient, 7)
    for (expected, _), (got, _) in zip(alone, ours, strict=True):
        np.testing.assert_array_equal(bits(got["w"]), bits(expected["w"]))


@pytest.mark.parametrize("name", INNERS)
def test_alpha_one_is_the_inner_optimizer_to_rounding_under_jit(x64, name):
    params = initial_params("float64")
    alone = trajectory(INNERS[name], params, gradient, 40, as_shipped)
    ours = trajectory(lookahead(INNERS[name], 5, 1.0), params, gradient, 40, as_shipped)
    np.testing.assert_allclose(
        ours[-1][0]["w"], alone[-1][0]["w"], rtol=1e-10, atol=1e-12
    )


def syncs_with_alpha_zero(dtype, alpha, syncs, slow_dtype=None):
    """Returns the start, and what is left of it after syncs with steps in between."""
    rng = np.random.default_rng(0)
    start = {
        "s": jnp.asarray(1.3, dtype),
        "v": jnp.asarray(rng.uniform(1.0, 4.0, 200), dtype),
        "w": jnp.asarray(-rng.uniform(1.0, 4.0, (2, 3, 20)), dtype),
    }
    tx = lookahead(optax.sgd(1.0), 2, alpha, slow_dtype=slow_dtype)

    # Steps of up to a twentieth, after which p + (phi - p) is phi in every dtype.
    def step(carry, i):
        params, state = carry
        grads = jax.tree.map(lambda p: p * jnp.asarray(i % 7, p.dtype) / 250, params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    carry = start, tx.init(start)
    (params, state), _ = jax.lax.scan(step, carry, jnp.arange(2 * syncs) + 1)
    return start, params, state


@pytest.mark.parametrize("form", ["python", "array", "schedule"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_alpha_zero_stays_where_it_is_over_a_thousand_syncs(x64, dtype, form):
    run = as_shipped(
        lambda alpha: syncs_with_alpha_zero(
            dtype, alpha if form == "array" else FORMS[form](0.0), 1000
        )
    )
    start, params, state = run(jnp.asarray(0.0, jnp.float32))
    assert state.sync_count == 1000
    for tree in (params, state.slow_params):
        jax.tree.map(
            lambda x, y: np.testing.assert_array_equal(bits(x), bits(y)), tree, start
        )


@every_form
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_alpha_zero_stays_where_it_is_when_eager(dtype, form):
    tx = lookahead(optax.sgd(0.05), 2, FORMS[form](0.0))
    start = jnp.asarray(np.random.default_rng(0).uniform(1.0, 4.0, 200), dtype)
    visited = trajectory(tx, start, lambda p, step: p / (1 + step), 10)
    for params, state in visited[1::2]:
        np.testing.assert_array_equal(bits(params), bits(start))
        np.testing.assert_array_equal(bits(state.slow_params), bits(start))
    assert not np.array_equal(visited[0][0], start)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_alpha_zero_keeps_every_bit_of_a_wide_slow_weight(dtype):
    start, params, state = as_shipped(
        lambda: syncs_with_alpha_zero(dtype, 0.0, 300, "float32")
    )()
    jax.tree.map(np.testing.assert_array_equal, params, start)
    jax.tree.map(
        lambda x, y: np.testing.assert_array_equal(x, y.astype(jnp.float32)),
        state.slow_params,
        start,
    )


@pytest.mark.parametrize(
    "k",
    [3, jnp.asarray(3, jnp.int32), jnp.asarray(3, jnp.float32)],
    ids=["python", "int array", "float array"],
)
@pytest.mark.parametrize(
    "alpha", [0.5, jnp.asarray(0.5, jnp.float32)], ids=["python", "array"]
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "complex64"])
def test_nothing_is_promoted_silently(dtype, alpha, k):
    tx = lookahead(optax.sgd(0.05, momentum=0.9), k, alpha)
    with jax.numpy_dtype_promotion("strict"):
        params = initial_params(dtype)
        state = tx.init(params)
        for _ in range(3):
            updates, state = tx.update(params, state, params)
            params = optax.apply_updates(params, updates)
    assert state.sync_count == 1


def test_a_python_number_or_a_weakly_typed_parameter_gives_a_strongly_typed_state():
    tx = lookahead(optax.sgd(0.05))
    for params in (1.0, jnp.sin(1.0)):
        slow = tx.init(params).slow_params
        assert slow.dtype == jnp.float32
        assert not slow.weak_type
