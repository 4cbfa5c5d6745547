"""Do dtypes stay, and does arithmetic lose no bit that it could keep?"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import as_shipped
from training import trajectory
from trees import bits

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
def test_updates_come_back_in_the_dtype_of_the_inner_updates(
    params_dtype, updates_dtype
):
    tx = lookahead(optax.sgd(0.05), 1, 0.5)
    params, grads = jnp.ones(3, params_dtype), jnp.ones(3, updates_dtype)
    updates, state = tx.update(grads, tx.init(params), params)
    assert updates.dtype == updates_dtype
    assert state.slow_params.dtype == params_dtype
    np.testing.assert_array_equal(
        state.slow_params, optax.apply_updates(params, updates)
    )


@pytest.mark.parametrize("name", INNERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_alpha_one_is_the_inner_optimizer_bit_for_bit_when_eager(x64, dtype, name):
    params = initial_params(dtype)
    alone = trajectory(INNERS[name], params, gradient, 7)
    ours = trajectory(lookahead(INNERS[name], 2, 1.0), params, gradient, 7)
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
