"""Does the slow step land on the minimum of the model along its line?"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from compiling import as_shipped
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from meshes import make_mesh, use_mesh
from training import scanned, trajectory

from optax_lookahead import (
    LineMinimumState,
    adam_curvature,
    line_minimum,
    lookahead,
    outer_loop,
    slow_params,
)

INNERS = {
    "sgd": (optax.sgd(0.3), reference.sgd(0.3)),
    "momentum": (optax.sgd(0.1, momentum=0.9), reference.momentum(0.1, 0.9)),
    "adam": (optax.adam(0.3), reference.adamw(0.3)),
}
CYCLES = 4


def alphas(visited):
    return [float(state.outer_state.alpha) for _, state in visited]


def quadratic(dim, seed=0):
    """Returns the diagonal, the minimiser and a start of a random quadratic."""
    rng = np.random.default_rng(seed)
    return rng.uniform(0.1, 5.0, dim), rng.normal(size=dim), 3 * rng.normal(size=dim)


def with_grad_fn(tx, grad_fn):
    def update(updates, state, params):
        return tx.update(updates, state, params, grad_fn=grad_fn)

    return optax.GradientTransformationExtraArgs(tx.init, update)


def proposition_1(inner, diagonal, minimiser, phi, k, low=0.0, high=1e6):
    """Returns phi, alpha, the old phi and theta of every cycle, by the paper."""
    A, memory, visited = np.diag(diagonal), {}, []
    for _ in range(CYCLES):
        theta = phi.copy()
        for _ in range(k):
            theta += inner(A @ (theta - minimiser), theta, memory)
        back = phi - theta
        alpha = np.clip((phi - minimiser) @ A @ back / (back @ A @ back), low, high)
        visited.append((phi - alpha * back, alpha, phi, theta))
        phi = visited[-1][0].copy()
    return visited


@pytest.mark.parametrize("told", [False, True], ids=["modelled", "grad_fn"])
@pytest.mark.parametrize(("k", "dim"), [(1, 7), (2, 2), (5, 30)])
@pytest.mark.parametrize("name", INNERS)
def test_with_the_true_curvature_the_step_is_proposition_1s(x64, name, k, dim, told):
    inner, recurrence = INNERS[name]
    diagonal, minimiser, start = quadratic(dim)

    def gradient(w, step=None):
        return diagonal * (w - minimiser)

    tx = outer_loop(inner, line_minimum(lambda state: diagonal, 0.0, 1e6), k)
    tx = with_grad_fn(tx, gradient) if told else tx
    visited = trajectory(tx, jnp.asarray(start), gradient, CYCLES * k, jax.jit)
    cycles = proposition_1(recurrence, diagonal, minimiser, start, k)
    assert sum(0 < alpha < 1e6 for _, alpha, _, _ in cycles) > 1, "not all clipped"
    for (params, state), (phi, alpha, old, theta) in zip(
        visited[k - 1 :: k], cycles, strict=True
    ):
        assert state.outer_state.alpha.dtype == jnp.float64
        np.testing.assert_allclose(state.outer_state.alpha, alpha, 1e-10)
        np.testing.assert_allclose(params, phi, 1e-10, 1e-10)
        if alpha > 0:
            # Without the formula: nowhere on the line is the loss lower, nor sloped.
            line = old + np.linspace(-3, 3, 601)[:, None] * (theta - old)
            losses = 0.5 * np.sum(diagonal * (line - minimiser) ** 2, axis=1)
            terms = diagonal * (np.asarray(params) - minimiser)
            assert terms @ (np.asarray(params) - minimiser) / 2 <= min(losses)
            scale = np.abs(diagonal * minimiser * (theta - old)).sum()
            assert abs(terms @ (theta - old)) <= 1e-10 * scale


def test_all_leaves_share_one_step_size():
    diagonal, minimiser, start = map(np.float32, quadratic(9))

    def split(x):
        return {"b": jnp.asarray(x[:3]), "w": [jnp.asarray(x[3:]).reshape(2, 3)]}

    def gradient(w, step):
        return jax.tree.map(
            lambda a, x, m: a * (x - m), split(diagonal), w, split(minimiser)
        )

    outer = line_minimum(lambda state: split(diagonal), 0.0, 2.0)
    tx = outer_loop(optax.sgd(0.3), outer, 3)
    visited = trajectory(tx, split(start), gradient, 3 * CYCLES, jax.jit)[2::3]
    cycles = proposition_1(
        reference.sgd(0.3), *map(np.float64, (diagonal, minimiser, start)), 3, high=2.0
    )
    for (params, state), (phi, alpha, _, _) in zip(visited, cycles, strict=True):
        assert state.outer_state.alpha.shape == ()
        np.testing.assert_allclose(state.outer_state.alpha, alpha, 1e-4)
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
            params,
            split(phi),
        )


def one_cycle(d, grads, curvature, **bounds):
    """Returns the step size of a cycle of one step from 0 to `d`."""
    tx = outer_loop(optax.sgd(1.0), line_minimum(lambda _: curvature, **bounds), 1)

    @jax.jit
    def update(params, d, grads):
        return tx.update(-d, tx.init(params), params, grad_fn=lambda theta: grads)[1]

    return float(update(jnp.zeros_like(d), d, grads).outer_state.alpha)


@pytest.mark.parametrize(
    ("slope", "curvature", "alpha"),
    [
        (-0.1, 1.0, 1.1),
        (0.0, 1.0, 1.0),
        (0.5, 1.0, 0.5),
        (0.9, 1.0, 0.3),
        (-5.0, 1.0, 1.5),
        # No curvature, so downhill as far as it may; if there is no slope either,
        # as far too.
        (-1.0, 0.0, 1.5),
        (1.0, 0.0, 0.3),
        (0.0, 0.0, 1.5),
        # A parabola that opens downwards, with its top at 0.8 and 1: the end that is
        # further from it.
        (-0.2, -1.0, 1.5),
        (0.0, -1.0, 0.3),
        (np.nan, 1.0, 0.3),
        (-np.inf, 1.0, 0.3),
        (-1.0, np.nan, 0.3),
        (-1.0, np.inf, 0.3),
        (-1.0, 1e-40, 1.5),
    ],
)
def test_the_step_is_the_least_of_the_model_within_the_bounds(slope, curvature, alpha):
    d, grads, curvature = jnp.array([[1.0], [slope], [curvature]])
    with jax.debug_nans(False):
        got = one_cycle(d, grads, curvature, min_alpha=0.3, max_alpha=1.5)
    assert got == pytest.approx(alpha, rel=1e-6)


def test_a_cycle_that_went_nowhere_takes_the_largest_step_and_stays():
    tx = outer_loop(optax.sgd(0.1), line_minimum(lambda _: jnp.ones(3), 0.2, 0.7), 1)
    w = jnp.arange(3.0)
    with jax.debug_nans(True):  # not even on the way, where nothing is fused
        updates, state = tx.update(jnp.zeros(3), tx.init(w), w)
    assert float(state.outer_state.alpha) == pytest.approx(0.7)
    np.testing.assert_array_equal(updates, 0)


def test_at_the_bound_of_one_it_is_the_inner_optimizer_bit_for_bit():
    inner, w = optax.adam(0.1), jnp.array([1.0, -2.0, 3.0])
    outer = line_minimum(adam_curvature(), 1.0, 1.0)
    ours = trajectory(outer_loop(inner, outer, 3), w, lambda w, _: jnp.sin(w), 7)
    alone = trajectory(inner, w, lambda w, _: jnp.sin(w), 7)
    for (params, _), (expected, _) in zip(ours, alone, strict=True):
        np.testing.assert_array_equal(params, expected)


DIAGONAL = jnp.array([0.5, 3.0, 1.0])
TX = outer_loop(
    optax.sgd(0.5, momentum=0.5), line_minimum(lambda _: DIAGONAL, 0.1, 1.5), 3
)
START = jnp.array([3.0, -1.0, 2.0])


def gradient(w, step):
    return DIAGONAL * w + 0.1 * jnp.sin(step + w)


def test_eager_jitted_scanned_and_mapped_steps_are_the_same():
    eager = trajectory(TX, START, gradient, 9)
    expected = alphas(eager)
    assert len(set(expected)) == 4  # 1 before the first sync, then one of each cycle
    np.testing.assert_allclose(
        alphas(trajectory(TX, START, gradient, 9, jax.jit)), expected, 1e-4
    )
    params, state = scanned(TX, START, gradient, 9)
    np.testing.assert_allclose(state.outer_state.alpha, expected, 1e-4)
    starts = jnp.stack([START, -2 * START, START[::-1]])
    params, state = jax.vmap(lambda w: scanned(TX, w, gradient, 9))(starts)
    np.testing.assert_allclose(state.outer_state.alpha[0], expected, 1e-4)
    np.testing.assert_allclose(params[0, -1], eager[-1][0], 1e-4, 1e-5)
    for i in (1, 2):
        _, alone = scanned(TX, starts[i], gradient, 9)
        np.testing.assert_allclose(
            state.outer_state.alpha[i], alone.outer_state.alpha, 1e-4
        )


def test_a_mapped_gradient_function_is_that_of_each():
    def run(w, scale):
        def grad_fn(w):
            return scale * DIAGONAL * w

        tx = with_grad_fn(TX, grad_fn)
        return scanned(tx, w, lambda w, _: grad_fn(w), 6)

    starts, scales = jnp.stack([START, START[::-1]]), jnp.array([1.0, 0.3])
    mapped = jax.vmap(run)(starts, scales)
    for i in range(2):
        alone = run(starts[i], scales[i])
        np.testing.assert_allclose(
            mapped[1].outer_state.alpha[i], alone[1].outer_state.alpha, 1e-4
        )


def test_the_bounds_may_be_traced():
    def alpha(low, high):
        tx = outer_loop(optax.sgd(0.1), line_minimum(lambda _: DIAGONAL, low, high), 1)
        grads = DIAGONAL * START
        return tx.update(grads, tx.init(START), START)[1].outer_state.alpha

    got = jax.vmap(alpha)(jnp.array([0.0, 0.2, 0.2]), jnp.array([0.5, 1.0, 100.0]))
    np.testing.assert_allclose(got[:2], [0.5, 1.0])
    assert 1.0 < got[2] < 100.0


def test_the_state_moves_at_syncs_only():
    visited = alphas(trajectory(TX, START, gradient, 9, jax.jit))
    assert visited[:2] == [1.0, 1.0]
    for step in range(3, 9):
        assert (visited[step] == visited[step - 1]) == (step % 3 != 2)


def test_all_steps_run_one_compiled_program():
    traces = []

    @jax.jit
    def step(w, state):
        traces.append(w)
        updates, state = TX.update(w, state, w, grad_fn=lambda theta: theta)
        return optax.apply_updates(w, updates), state

    w, state = START, TX.init(START)
    for _ in range(7):
        w, state = step(w, state)
    assert len(traces) == 1


def test_the_gradient_function_runs_at_syncs_only_and_at_the_fast_weights():
    seen = []

    def grad_fn(w):
        jax.debug.callback(lambda w: seen.append(np.asarray(w)), w)
        return DIAGONAL * w

    inner = optax.sgd(0.1)
    tx = outer_loop(inner, line_minimum(lambda _: DIAGONAL), 3)
    trajectory(with_grad_fn(tx, grad_fn), START, lambda w, _: DIAGONAL * w, 6, jax.jit)
    jax.effects_barrier()
    assert len(seen) == 2
    fast = trajectory(inner, START, lambda w, _: DIAGONAL * w, 3)[-1][0]
    np.testing.assert_allclose(seen[0], fast, 1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_bad_fast_weights_inside_a_cycle_leave_no_trace(bad):
    tx = outer_loop(optax.sgd(0.1), line_minimum(lambda _: DIAGONAL), 3)

    def run(poisoned):
        w, state = START, tx.init(START)
        for step in range(6):
            bad_step = poisoned and step == 4
            grads = jnp.full(3, bad) if bad_step else gradient(w, step)
            updates, state = jax.jit(tx.update)(grads, state, w)
            w = optax.apply_updates(w, updates)
            if step == 4:
                assert bad_step != bool(jnp.all(jnp.isfinite(w)))
                w = slow_params(state, w)
        return w, state

    jax.tree.map(np.testing.assert_array_equal, run(True), run(False))


def test_leaves_that_are_not_numbers_to_step_with_are_left_out():
    w = {"n": jnp.array([4, 5]), "w": START, "flag": jnp.array(True)}
    curvature = {"n": None, "w": DIAGONAL, "flag": jnp.nan}
    grads = {"n": jnp.array([7, 7]), "w": DIAGONAL * START, "flag": jnp.array(False)}
    inner = optax.partition(
        {"yes": optax.sgd(0.4), "no": optax.set_to_zero()},
        {"n": "no", "w": "yes", "flag": "no"},
    )
    tx = outer_loop(inner, line_minimum(lambda _: curvature, 0.0, 9.0), 1)
    only = outer_loop(optax.sgd(0.4), line_minimum(lambda _: DIAGONAL, 0.0, 9.0), 1)
    _, expected = only.update(grads["w"], only.init(START), START)
    updates, state = tx.update(grads, tx.init(w), w)
    assert float(state.outer_state.alpha) == float(expected.outer_state.alpha)
    np.testing.assert_array_equal(updates["n"], 0)

    def grad_fn(theta):
        assert isinstance(theta["n"], optax.MaskedNode)
        return theta | {"w": DIAGONAL * theta["w"]}

    _, state = tx.update(grads, tx.init(w), w, grad_fn=grad_fn)
    np.testing.assert_allclose(
        state.outer_state.alpha, expected.outer_state.alpha, 1e-5
    )


def test_an_update_that_is_none_is_left_out():
    w = {"w": START, "stays": jnp.ones(2)}
    inner = optax.stateless(lambda grads, _: {"w": -0.4 * grads["w"], "stays": None})
    curvature = {"w": DIAGONAL, "stays": jnp.full(2, jnp.nan)}
    tx = outer_loop(inner, line_minimum(lambda _: curvature, 0.0, 9.0), 1)
    grads = {"w": DIAGONAL * START, "stays": None}
    updates, state = tx.update(grads, tx.init(w), w)
    assert updates["stays"] is None
    assert 1.0 < float(state.outer_state.alpha) < 9.0


def test_complex_parameters_count_as_their_two_real_parts():
    # JAX's gradients of a real loss are conjugate to the direction of descent.
    diagonal, minimiser, start = map(np.float32, quadratic(6))

    def as_complex(x):
        return jnp.asarray(x[:3] + 1j * x[3:])

    def run(make, curvature):
        tx = outer_loop(optax.sgd(0.3), line_minimum(lambda _: curvature, 0.0, 9.0), 2)
        centre, w = make(minimiser), make(start)
        return trajectory(tx, w, lambda w, _: curvature * (w - centre), 6, jax.jit)

    half = diagonal[:3]
    real = run(jnp.asarray, jnp.asarray(np.concatenate([half, half])))
    both = run(as_complex, jnp.asarray(half))
    assert both[-1][1].outer_state.alpha.dtype == jnp.float32
    np.testing.assert_allclose(alphas(both), alphas(real), 1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_is_summed_in_float32(dtype):
    # In their own dtype, a sum of 0.25s stands still at 64 or at 512, and 300^2
    # overflows in float16.
    n = 2**16
    w = jnp.zeros(n, dtype)
    tx = outer_loop(
        optax.sgd(1.0), line_minimum(lambda _: jnp.full(n, 300.0, dtype)), 1
    )
    _, state = jax.jit(tx.update, static_argnames="grad_fn")(
        jnp.full(n, 0.5, dtype), tx.init(w), w, grad_fn=lambda theta: -75 + 0 * theta
    )
    assert state.outer_state.alpha.dtype == jnp.float32
    np.testing.assert_allclose(state.outer_state.alpha, 0.5, 1e-6)


def test_a_wide_slow_copy_is_stepped_in_its_own_dtype():
    outer = line_minimum(lambda _: jnp.ones(3), 0.0, 9.0)
    tx = outer_loop(optax.sgd(0.5), outer, 1, slow_dtype="float32")
    w = jnp.ones(3, jnp.bfloat16)
    updates, state = tx.update(w, tx.init(w), w)
    assert updates.dtype == jnp.bfloat16
    assert float(state.outer_state.alpha) == 2.0
    np.testing.assert_array_equal(slow_params(state, w + updates, wide=True), 0)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("told", [False, True], ids=["modelled", "grad_fn"])
def test_on_a_mesh_the_step_size_is_that_of_one_device(axis_type, told):
    diagonal, _, start = (x.astype(np.float32) for x in quadratic(64))

    def run(put):
        A, w = put(diagonal), put(start)
        tx = outer_loop(optax.sgd(0.3), line_minimum(lambda _: A, 0.1, 9.0), 2)
        tx = with_grad_fn(tx, lambda w: A * w) if told else tx
        step = as_shipped(tx.update)
        state, visited = tx.init(w), []
        for _ in range(6):
            updates, state = step(A * w, state, w)
            w = optax.apply_updates(w, updates)
            visited.append(float(state.outer_state.alpha))
        return visited, w, step.lower(w, state, w).compile().as_text()

    expected, w, program = run(jnp.asarray)
    assert "all-reduce" not in program
    mesh = make_mesh({"data": 8}, axis_type)
    sharding = NamedSharding(mesh, P("data"))
    with use_mesh(mesh):
        got, sharded, program = run(lambda x: jax.device_put(x, sharding))
    np.testing.assert_allclose(got, expected, 1e-4)
    np.testing.assert_allclose(sharded, w, 1e-4, 1e-5)
    assert sharded.sharding.is_equivalent_to(sharding, 1)
    # What crosses devices are scalars, as the docstring says.
    reduced = re.findall(r"= (.*?) all-reduce(?:-start)?\(", program)
    assert reduced
    assert all(re.fullmatch(r"[(), f32\[\]{}]*", shapes) for shapes in reduced), reduced
    assert not re.search("all-gather|all-to-all|collective-permute", program)


@pytest.mark.parametrize("power", [1.0, 0.5])
def test_with_adams_curvature_the_step_is_that_of_its_bias_corrected_moment(x64, power):
    k, b2, rate = 3, 0.9, 0.4
    diagonal, minimiser, phi = quadratic(5)

    def gradient(w, step):
        return diagonal * (w - minimiser)

    inner = optax.chain(
        optax.clip(1e9), optax.adamw(optax.constant_schedule(rate), b2=b2)
    )
    outer = line_minimum(adam_curvature(b2, power), 0.0, 50.0)
    visited = trajectory(
        outer_loop(inner, outer, k), jnp.asarray(phi), gradient, k * CYCLES, jax.jit
    )
    recurrence, memory = reference.adamw(rate, b2=b2, weight_decay=1e-4), {}
    inside = 0
    for params, state in visited[k - 1 :: k]:
        theta = phi.copy()
        for _ in range(k):
            g = gradient(theta, 0)
            step = recurrence(g, theta, memory)
            theta += step
        A = (memory["v"] / (1 - b2 ** memory["t"])) ** power
        d = theta - phi
        alpha = np.clip(1 - (g + A * step) @ d / (d @ (A * d)), 0.0, 50.0)
        inside += 0 < alpha < 50
        np.testing.assert_allclose(state.outer_state.alpha, alpha, 1e-8)
        phi += alpha * d
        np.testing.assert_allclose(params, phi, 1e-8)
    assert inside > 1


def test_adams_moment_is_found_at_any_depth_with_its_own_count():
    grads, w = jnp.array([1.0, 3.0]), jnp.zeros(2)
    plain = optax.adam(0.1, b2=0.99)
    nested = [
        plain,
        optax.chain(optax.scale_by_schedule(lambda count: 1.0), plain),
        optax.masked(plain, True),
        optax.inject_hyperparams(optax.adam)(0.1, b2=0.99),
        lookahead(plain, 2),
        optax.MultiSteps(plain, 1).gradient_transformation(),
        optax.lamb(0.1, b2=0.99),
        optax.nadamw(0.1, b2=0.99),
    ]
    for tx in nested:
        state = tx.init(w)
        for _ in range(3):
            _, state = tx.update(grads, state, w)
        np.testing.assert_allclose(adam_curvature(0.99)(state), [1, 9], 1e-4)
        np.testing.assert_allclose(adam_curvature(0.99, 0.5)(state), [1, 3], 1e-4)


@pytest.mark.parametrize(
    ("inner", "found"),
    [(optax.sgd(0.1), "none"), (optax.chain(optax.adam(0.1), optax.adam(0.1)), "2")],
)
def test_no_adam_or_several(inner, found):
    tx = outer_loop(inner, line_minimum(adam_curvature()), 1)
    message = (
        "`adam_curvature` must find one `optax.ScaleByAdamState` in the inner "
        f"optimizer's state, got {found}. Write a function from that state to a tree"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        tx.update(START, tx.init(START), START)


@pytest.mark.parametrize(
    "bounds",
    [
        (0.6, 0.5),
        (-0.1, 1),
        (0, np.inf),
        (0, 1e39),
        (np.nan, 1),
        (0, np.float32("nan")),
    ],
)
def test_bounds_out_of_order_or_not_finite(bounds):
    message = (
        "`min_alpha` and `max_alpha` must be finite with 0 <= min_alpha <= max_alpha, "
        f"got {bounds[0]!r} and {bounds[1]!r}. Write for example"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        line_minimum(adam_curvature(), *bounds)


@pytest.mark.parametrize("name", ["min_alpha", "max_alpha"])
def test_bounds_of_the_wrong_kind(name):
    with pytest.raises(TypeError, match=f"`{name}` must be a number, got True. Write"):
        line_minimum(adam_curvature(), **{name: True})
    message = f"`{name}` must be a scalar, got an array of shape (2,)"
    with pytest.raises(ValueError, match=re.escape(message)):
        line_minimum(adam_curvature(), **{name: jnp.ones(2)})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"b2": 1.0}, ValueError, "`b2` must be a number in [0, 1), got 1.0. Write"),
        ({"b2": "x"}, TypeError, "`b2` must be a number, got 'x'. Write the one"),
        ({"power": 0}, ValueError, "`power` must be a positive number, got 0. Write"),
        ({"power": None}, TypeError, "`power` must be a number, got None. Write"),
    ],
)
def test_arguments_of_adams_curvature(arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        adam_curvature(**arguments)


def test_a_curvature_that_is_no_function():
    message = (
        "`curvature` must be a function from the inner optimizer's state to a tree "
        "like the parameters, got 1.0. Write for example `line_minimum("
    )
    with pytest.raises(TypeError, match=re.escape(message)):
        line_minimum(1.0)


def test_a_gradient_function_that_is_no_function():
    message = "`grad_fn` must be a function from parameters to gradients, got 1.0."
    with pytest.raises(TypeError, match=re.escape(message)):
        TX.update(START, TX.init(START), START, grad_fn=1.0)


def test_outside_an_outer_loop():
    tx = line_minimum(adam_curvature())
    message = (
        "`inner_step` must be what `outer_loop` passes to its outer optimizer, got "
        "None. Write `outer_loop(inner, line_minimum(curvature), k)`."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        tx.update(START, tx.init(START), START)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (
            {"v": START},
            "tree like the parameters, got PyTreeDef({'v': *}) where they have",
        ),
        (
            {"w": jnp.ones(1)},
            "arrays with the shapes of the parameters, got shape (1,) at ['w'], where "
            "they have (3,). Return a tree like the parameters.",
        ),
        ({"w": None}, "got None at ['w'], where they have (3,)"),
        ({"w": optax.MaskedNode()}, "got MaskedNode() at ['w'], where they have (3,)"),
    ],
)
@pytest.mark.parametrize("name", ["curvature", "grad_fn"])
def test_another_tree_than_the_parameters(name, tree, message):
    w = {"w": START}
    curvature = tree if name == "curvature" else w
    tx = outer_loop(optax.sgd(0.1), line_minimum(lambda _: curvature), 1)
    extra = {"grad_fn": lambda _: tree} if name == "grad_fn" else {}
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        tx.update(w, tx.init(w), w, **extra)
    assert str(error.value).startswith(f"`{name}` must return ")


def test_the_state_is_found_and_pickled_by_its_public_name():
    assert LineMinimumState.__module__ == "optax_lookahead"
    assert TX.init(START).outer_state == LineMinimumState(1.0)
    assert float(optax.tree.get(TX.init(START), "alpha")) == 1.0


HESSIAN = jnp.array([2.0, 8.0])


def taken(inner, given, transform=lambda f: f, **told):
    """Returns the alpha of a cycle of three, for gradients of another kind."""
    tx = outer_loop(inner, line_minimum(lambda state: HESSIAN, 0.0, 5.0), 3)
    step = transform(tx.update)
    w = jnp.array([9.0, 9.0])
    state = tx.init(w)
    for _ in range(3):
        grads = HESSIAN * w
        extra = {name: make(grads) for name, make in told.items()}
        updates, state = step(given(grads), state, w, **extra)
        w = optax.apply_updates(w, updates)
    return float(state.outer_state.alpha)


OTHER_GRADIENTS = {
    "per example": (
        optax.chain(
            optax.contrib.differentially_private_aggregate(1e9, 0.0, key=0),
            optax.sgd(0.05),
        ),
        lambda g: jnp.stack([0.5 * g, 1.5 * g]),
    ),
    "of a scaled loss": (
        optax.chain(optax.scale(1 / 1024), optax.sgd(0.05)),
        lambda g: 1024 * g,
    ),
    "summed over a batch": (
        optax.chain(optax.scale(1 / 32), optax.sgd(0.05)),
        lambda g: 32 * g,
    ),
}


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("name", OTHER_GRADIENTS)
def test_told_the_gradient_it_is_right_whatever_the_inner_optimizer_is_given(
    name, transform
):
    inner, given = OTHER_GRADIENTS[name]
    expected = taken(optax.sgd(0.05), lambda g: g)
    np.testing.assert_allclose(expected, 1.3455, rtol=1e-4)
    got = taken(inner, given, transform, grad=lambda g: g)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    got = taken(inner, given, transform, outer_args=lambda g: {"grad": g})
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_gradients_of_another_shape_are_refused_with_the_remedy():
    inner, given = OTHER_GRADIENTS["per example"]
    message = (
        "`updates` must be gradients with the shapes of the parameters, got shape "
        "(2, 2) at the root, where they have (2,). Tell `line_minimum` the gradient: "
        "`update(updates, state, params, grad=grads)`."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        taken(inner, given)


def test_a_gradient_function_wins_over_a_gradient():
    def at_theta(w):
        return HESSIAN * w

    tx = outer_loop(optax.sgd(0.05), line_minimum(lambda state: HESSIAN, 0.0, 5.0), 1)
    w = jnp.array([9.0, 9.0])
    alphas = [
        tx.update(HESSIAN * w, tx.init(w), w, grad=grad, grad_fn=at_theta)[1]
        for grad in (HESSIAN * w, jnp.full(2, 1e6))
    ]
    np.testing.assert_array_equal(*(state.outer_state.alpha for state in alphas))


def test_in_an_eager_loop_nothing_is_computed_on_other_steps():
    calls = []

    def curvature(state):
        calls.append(state)
        return HESSIAN

    tx = outer_loop(optax.sgd(0.05), line_minimum(curvature), 3)
    w = jnp.array([9.0, 9.0])
    state = tx.init(w)
    for step in range(1, 8):
        updates, state = tx.update(HESSIAN * w, state, w)
        w = optax.apply_updates(w, updates)
        assert len(calls) == step // 3


def pmean_first(axis_name):
    def update(updates, state, params=None):
        return jax.lax.pmean(updates, axis_name), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


@pytest.mark.dear
@pytest.mark.skipif(
    jax.__version_info__ < (0, 7), reason="JAX 0.6 tells nobody what differs"
)
def test_a_mean_over_devices_inside_is_refused_unless_told_the_gradient():
    inner = optax.chain(pmean_first("data"), optax.sgd(0.05))
    tx = outer_loop(inner, line_minimum(lambda state: HESSIAN, 0.0, 5.0), 3)
    mesh = make_mesh({"data": 2}, AxisType.Auto, jax.devices()[:2])

    def steps(share, told):
        w = jnp.array([9.0, 9.0])
        state = tx.init(w)
        for _ in range(3):
            grads = share[0] * HESSIAN * w
            extra = {"grad": jax.lax.pmean(grads, "data")} if told else {}
            updates, state = tx.update(grads, state, w, **extra)
            w = optax.apply_updates(w, updates)
        return state.outer_state.alpha

    def run(told):
        return jax.shard_map(
            functools.partial(steps, told=told),
            mesh=mesh,
            in_specs=P("data"),
            out_specs=P(),
        )(jnp.array([0.5, 1.5]))

    np.testing.assert_allclose(run(True), 1.3455, rtol=1e-4)
    with pytest.raises(ValueError, match="got one that varies over \\['data'\\]"):
        run(False)
