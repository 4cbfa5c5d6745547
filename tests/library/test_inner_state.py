"""What does a sync do to the inner optimizer's state?"""

import functools
import re
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from helpers import reference
from helpers.meshes import make_mesh
from helpers.noisy_problem import START, gradient, numpy_gradient, to_tree, to_vector
from helpers.optimizers import (
    NAMES,
    START as WEIGHTS,
    arguments,
    every_optimizer,
    make,
    multi_steps,
    telling_optimizers,
)
from helpers.training import scanned, trajectory
from helpers.trees import as_arrays, is_weakly_typed, shapes_and_dtypes, types
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from optax_lookahead import lookahead, outer_loop, slow_params

POLICIES = {
    "keep": lambda: reference.keep,
    "reset": lambda: reference.reset,
    "interpolate": reference.interpolate,
}
INNERS = {
    "momentum": (optax.sgd(0.05, momentum=0.9), reference.momentum(0.05, 0.9)),
    "adam": (optax.adam(0.1), reference.adamw(0.1)),
}
PAIRS = [(k, alpha) for k in (1, 2, 5) for alpha in (0.2, 0.5, 1.0)]
STEPS = 20
every_policy = pytest.mark.parametrize("policy", POLICIES)


def memory_of(name, state):
    """Returns the state of the inner optimizer with the names of the reference."""
    if name == "momentum":
        return {"trace": to_vector(state.fast_state[0].trace)}
    adam = state.fast_state[0]
    return {"m": to_vector(adam.mu), "v": to_vector(adam.nu), "t": adam.count}


def assert_equals_reference(visited, name, k, alpha, at_sync):
    memories = []
    expected = reference.lookahead(
        INNERS[name][1],
        numpy_gradient,
        START,
        k,
        lambda t: alpha,
        len(visited) // k,
        at_sync,
        memories,
    )
    steps = zip(visited, expected, memories, strict=True)
    for (params, state), (theta, phi), memory in steps:
        close = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-14)
        close(to_vector(params), theta)
        close(to_vector(state.slow_params), phi)
        for field, got in memory_of(name, state).items():
            close(got, np.broadcast_to(memory.get(field, 0.0), got.shape))


LOOPS = {
    **{
        policy: lambda inner, k, alpha, policy=policy: lookahead(
            inner, k, alpha, inner_state=policy
        )
        for policy in POLICIES
    },
    **{
        f"outer {policy}": lambda inner, k, alpha, policy=policy: outer_loop(
            inner, optax.sgd(alpha), k, inner_state=policy
        )
        for policy in ("keep", "reset")
    },
}


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("name", INNERS)
def test_weights_and_inner_state_follow_the_policy_at_every_step(x64, name, loop):
    # All pairs of k and alpha in one scan: with `jax.vmap`, policies compose too.
    @jax.jit
    @jax.vmap
    def train(k, alpha):
        tx = LOOPS[loop](INNERS[name][0], k, alpha)
        return scanned(tx, to_tree(jnp.asarray(START)), gradient, STEPS)

    ks, alphas = zip(*PAIRS, strict=True)
    runs = jax.device_get(train(jnp.asarray(ks), jnp.asarray(alphas)))
    for run, (k, alpha) in enumerate(PAIRS):
        visited = [
            jax.tree.map(lambda x, run=run, i=i: x[run, i], runs) for i in range(STEPS)
        ]
        at_sync = POLICIES[loop.split()[-1]]()
        assert_equals_reference(visited, name, k, alpha, at_sync)


@pytest.mark.parametrize("policy", ["reset", "interpolate"])
def test_eager_steps_follow_the_policy_too(x64, policy):
    tx = lookahead(INNERS["adam"][0], 2, 0.5, inner_state=policy)
    visited = trajectory(tx, to_tree(jnp.asarray(START)), gradient, 4)
    assert_equals_reference(visited, "adam", 2, 0.5, POLICIES[policy]())


def torch_momentum(learning_rate, decay):
    """Returns PyTorch's step, which writes its buffer in place."""

    def step(g, theta, memory):
        buffer = memory.setdefault("trace", np.zeros_like(g))
        buffer *= decay
        buffer += g
        return -learning_rate * buffer

    return step


def official_pullback():
    """Returns the sync of the paper's PyTorch code, line by line."""
    cached = {"trace": 0.0}

    def at_sync(memory, alpha):
        buffer = memory["trace"]
        buffer *= alpha
        buffer += (1 - alpha) * cached["trace"]
        cached["trace"] = buffer  # no copy: the next `*=` changes it too

    return at_sync


def test_interpolation_is_not_the_scaling_that_the_official_code_aliases_to(x64):
    alpha, k, cycles = 0.5, 3, 4

    def run(inner, at_sync):
        memories, schedule = [], lambda t: alpha
        reference.lookahead(
            inner, numpy_gradient, START, k, schedule, cycles, at_sync, memories
        )
        return memories

    tx = lookahead(INNERS["momentum"][0], k, alpha, inner_state="interpolate")
    visited = trajectory(tx, to_tree(jnp.asarray(START)), gradient, k * cycles)
    ours = [memory_of("momentum", state)["trace"] for _, state in visited]
    aliased = run(torch_momentum(0.05, 0.9), official_pullback())
    meant = run(reference.momentum(0.05, 0.9), reference.interpolate())
    for step in range(k * cycles):
        np.testing.assert_allclose(ours[step], meant[step]["trace"], rtol=1e-12)
        same = np.isclose(ours[step], aliased[step]["trace"], rtol=1e-3)
        assert np.all(same) if step < 2 * k - 1 else not np.any(same)


# Optimizers, and by path what a reset has to keep of their state, after six steps: all
# other leaves are what `init` gives at the new parameters.
def falling(count):
    return 0.5 - 0.05 * jnp.asarray(count, jnp.float32)


PARAMS = {"w": jnp.array([[1.0, -2.0], [0.5, 3.0]]), "b": jnp.array([0.3, -0.7])}
LABELS = {"w": "x", "b": "y"}
SGD = optax.sgd(falling, momentum=0.9)  # its schedule is at [1]
RATE = 0.5 - 0.05 * 5  # which the sixth step took
DECAY = optax.add_decayed_weights(falling)  # whose count does not change in Optax 0.2.6
DECAYED = 6 * int(DECAY.update(PARAMS, DECAY.init(PARAMS), PARAMS)[1].count)
KEPT = {
    "sgd": (SGD, {"[1].count": 6}),
    "adamw": (optax.adamw(falling), {"[2].count": 6}),
    "lbfgs": (optax.lbfgs(falling, linesearch=None), {"[1].count": 6}),
    "rmsprop": (optax.rmsprop(falling, momentum=0.9), {"[1].count": 6}),
    "scheduled weight decay": (
        optax.chain(optax.scale_by_adam(), DECAY),
        {
            "[1].count": 6
            * int(DECAY.update(PARAMS, DECAY.init(PARAMS), PARAMS)[1].count)
        },
    ),
    "inject_hyperparams, schedule": (
        optax.inject_hyperparams(optax.adam)(falling),
        {
            ".count": 6,
            ".hyperparams['b1']": 0.9,
            ".hyperparams['b2']": 0.999,
            ".hyperparams['eps']": 1e-8,
            ".hyperparams['eps_root']": 0.0,
            ".hyperparams['learning_rate']": RATE,
            ".hyperparams_states['learning_rate'].count": 6,
        },
    ),
    "reduce_on_plateau": (
        optax.chain(
            optax.sgd(0.1, momentum=0.9),
            optax.contrib.reduce_on_plateau(factor=0.5, patience=2, cooldown=5),
        ),
        {
            # A constant loss: the best value comes first, and two steps later the
            # scale is halved and the cooldown of five begins, of which three are over.
            "[1].scale": 0.5,
            "[1].best_value": 1.0,
            "[1].plateau_count": 0,
            "[1].cooldown_count": 2,
            "[1].count": 0,
            "[1].avg_value": 0.0,
        },
    ),
    "conditionally_transform": (
        optax.conditionally_transform(optax.trace(0.9), lambda step: step % 2 == 0),
        {".step": 6},
    ),
    "conditionally_mask": (
        optax.conditionally_mask(SGD, lambda step: step % 2 == 0),
        {".step": 6, ".inner_state[1].count": 3},
    ),
    # Of these three, which have cycles of two steps, a reset breaks off one in two.
    "multi_steps": (
        optax.MultiSteps(SGD, 2).gradient_transformation(),
        {".gradient_step": 2, ".inner_opt_state[1].count": 2},
    ),
    "nested lookahead": (
        lookahead(SGD, 2, 0.5),
        {".sync_count": 2, ".fast_state[1].count": 6},
    ),
    "nested outer_loop": (
        outer_loop(optax.adam(0.1), SGD, 2),
        {".sync_count": 2, ".outer_state[1].count": 2},
    ),
    "add_noise": (optax.add_noise(0.1, 0.55, key=0), {".count": 6}),
    "ademamix": (
        optax.contrib.ademamix(falling, b3=lambda t: 0.9, alpha=lambda t: 0.1 * t),
        {"[0].count_m2": 6, "[2].count": 6},
    ),
    "schedule_free": (
        optax.contrib.schedule_free(SGD, falling),
        {".step_count": 7, ".base_optimizer_state[1].count": 6},
    ),
    "masked": (
        optax.masked(SGD, {"w": True, "b": False}),
        {".inner_state[1].count": 6},
    ),
    "partition": (
        optax.partition({"x": SGD, "y": optax.adam(0.1)}, LABELS),
        {".inner_states['x'].inner_state[1].count": 6},
    ),
    "named_chain": (
        optax.named_chain(("clip", optax.clip(1.0)), ("sgd", SGD)),
        {"['sgd'][1].count": 6},
    ),
    "chain in a chain": (optax.chain(optax.adam(0.1), SGD), {"[1][1].count": 6}),
    "apply_if_finite": (
        optax.apply_if_finite(SGD, 3),
        {".inner_state[1].count": 6},
    ),
}


def constant_gradient(params, step):
    return jax.tree.map(lambda p: p - jnp.cos(2.0 * p), params)


def train_step(tx):
    @jax.jit
    def step(params, state):
        updates, state = tx.update(
            constant_gradient(params, 0), state, params, value=jnp.float32(1.0)
        )
        return optax.apply_updates(params, updates), state

    return step


def assert_reset(inner, params, fast_state, kept):
    """Checks that the state is an initial one, except for the leaves named by path."""
    fresh = as_arrays(inner.init(params))
    kept = dict(kept)
    for (path, got), start in zip(
        jax.tree.leaves_with_path(as_arrays(fast_state)),
        jax.tree.leaves(fresh),
        strict=True,
    ):
        name = jax.tree_util.keystr(path)
        if name in kept:
            np.testing.assert_allclose(got, kept.pop(name), rtol=1e-6, err_msg=name)
        else:
            np.testing.assert_allclose(got, start, rtol=1e-6, err_msg=name)
    assert not kept


@pytest.mark.parametrize("name", KEPT)
def test_a_reset_keeps_what_counts_training_time_and_nothing_else(name):
    inner, kept = KEPT[name]
    tx = lookahead(inner, 3, 0.5, inner_state="reset")
    step, params, state = train_step(tx), PARAMS, tx.init(PARAMS)
    for _ in range(5):
        params, state = step(params, state)
    # The run has changed the state.
    with pytest.raises(AssertionError):
        assert_reset(inner, params, state.fast_state, kept)
    params, state = step(params, state)
    assert_reset(inner, params, state.fast_state, kept)


def test_a_hand_set_hyperparameter_outlives_a_reset():
    tx = lookahead(
        optax.inject_hyperparams(optax.sgd)(0.1, momentum=0.9), 2, inner_state="reset"
    )
    step, params, state = train_step(tx), PARAMS, tx.init(PARAMS)
    params, state = step(params, state)
    state.fast_state.hyperparams["learning_rate"] = jnp.float32(0.025)
    params, state = step(params, state)
    assert state.sync_count == 1
    assert state.fast_state.hyperparams["learning_rate"] == jnp.float32(0.025)
    before, updates = params, tx.update(constant_gradient(params, 0), state, params)[0]
    for name, g in constant_gradient(before, 0).items():
        np.testing.assert_allclose(updates[name], -0.025 * g, rtol=1e-6)


def test_under_reset_a_schedule_continues_and_bias_correction_starts_again():
    # Adam's first bias-corrected step is the sign of the gradient times the rate.
    tx = lookahead(optax.adam(falling), 2, 1.0, inner_state="reset")
    params, state = PARAMS, tx.init(PARAMS)
    for step in range(7):
        grads = constant_gradient(params, step)
        updates, state = tx.update(grads, state, params)
        if step % 2 == 0:
            for name, g in grads.items():
                np.testing.assert_allclose(
                    updates[name], -falling(step) * np.sign(g), rtol=1e-5
                )
        params = optax.apply_updates(params, updates)


def test_a_reset_restores_flags_and_random_keys():
    inner = optax.apply_if_finite(optax.noisy_sgd(0.1, key=jax.random.key(0)), 9)
    tx = lookahead(inner, 2, inner_state="reset")
    state = tx.init(PARAMS)
    bad = jax.tree.map(lambda p: p * jnp.nan, PARAMS)
    _, state = tx.update(PARAMS, state, PARAMS)
    changed = state.fast_state.inner_state[0].rng_key
    assert changed != jax.random.key(0)
    _, state = tx.update(bad, state, PARAMS)
    assert state.steps_since_sync == 0
    assert state.fast_state.last_finite
    assert state.fast_state.total_notfinite == 0
    assert state.fast_state.inner_state[0].rng_key == jax.random.key(0)
    assert state.fast_state.inner_state[0].count == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", INNERS)
@pytest.mark.parametrize(
    ("policy", "recovers"), [("keep", False), ("reset", True), ("interpolate", False)]
)
def test_only_a_reset_recovers_from_a_moment_that_is_not_finite(
    name, bad, policy, recovers
):
    tx = lookahead(INNERS[name][0], 2, 0.5, inner_state=policy)
    step = train_step(tx)
    params, state = step(PARAMS, tx.init(PARAMS))
    poisoned = jax.tree.map(
        lambda x: jnp.full_like(x, bad) if x.shape else x, state.fast_state
    )
    params, state = step(params, state._replace(fast_state=poisoned))
    params = PARAMS  # loaded from before it happened, into the next cycle
    for _ in range(4):
        params, state = step(params, state)
    for tree in (params, state.fast_state):
        finite = all(np.all(np.isfinite(x)) for x in jax.tree.leaves(tree))
        assert finite == recovers
    for x in jax.tree.leaves(slow_params(state, params)):
        assert np.all(np.isfinite(x))


# Every optimizer of `test_inner_optimizers.py`, after one cycle of one step.
COUNTED = {
    "ademamix": {"[0].count_m2": 1},
    "noisy_sgd": {"[0].count": 1},
    "noisy_sgd_with_a_typed_key": {"[0].count": 1},
    "reduce_on_plateau": {"[1].best_value": None},  # the loss
    "schedule_free": {".step_count": 2},
    "schedule_free_adamw": {".step_count": 2, ".base_optimizer_state[2].count": 1},
    "schedule_free_sgd": {".step_count": 2, ".base_optimizer_state[1].count": 1},
}


def one_cycle(name, policy, transform):
    """Returns the inner optimizer, the first state, and what a step makes of it."""
    inner = make(name)
    tx = lookahead(inner, 1, 0.5, inner_state=policy)

    def train_step(params, state):
        grads, extra = arguments(name, params, 0)
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.asarray, WEIGHTS)
    state = tx.init(params)
    return inner, state, transform(train_step)(params, state)


@telling_optimizers
def test_after_a_reset_every_optimizer_of_optax_is_as_initialised(name):
    inner, start, (params, state) = one_cycle(name, "reset", jax.jit)
    kept = dict(COUNTED.get(name, {}))
    if name == "reduce_on_plateau":
        kept["[1].best_value"] = state.fast_state[1].best_value
        assert np.isfinite(kept["[1].best_value"])
    assert_reset(inner, params, state.fast_state, kept)
    # Unchanged types also mean that there is no second trace. Optax's line searches
    # start with weakly typed numbers, which any step makes strong.
    weak = is_weakly_typed(start.fast_state)
    same = shapes_and_dtypes if weak else types
    assert same(state) == same(start)


@pytest.mark.parametrize("name", ["prodigy", "dog", "dowg", "dadapt_adamw"])
def test_a_reset_takes_parameters_of_two_dtypes(name):
    # The scalars in these states have one dtype at `init` and another one afterwards.
    params = {"w": jnp.ones(3), "b": jnp.ones(2, jnp.bfloat16)}
    inner = getattr(optax.contrib, name)()
    state = (tx := lookahead(inner, 2, inner_state="reset")).init(params)
    for _ in range(2):
        updates, state = tx.update(params, state, params)
        params = optax.apply_updates(params, updates)
    for got, fresh in zip(
        jax.tree.leaves(state.fast_state),
        jax.tree.leaves(inner.init(params)),
        strict=True,
    ):
        np.testing.assert_array_equal(got, fresh.astype(got.dtype))


# Their `init` asks for an array where `optax.tree.map_params` passes a placeholder.
OPAQUE = {"backtracking_linesearch", "lbfgs"}
OPAQUE_RULE = (
    "`inner_state='interpolate'` must be able to find the trees in the state of "
    "`inner` that are like the parameters, got an error from `optax.tree.map_params`: "
)


@every_optimizer
def test_every_optimizer_of_optax_is_interpolated_or_refused(name):
    if name in OPAQUE:
        tx = lookahead(make(name), inner_state="interpolate")
        with pytest.raises(ValueError, match=re.escape(OPAQUE_RULE)) as refusal:
            tx.init(WEIGHTS)
        assert "Write `inner_state='keep'` or `'reset'`." in str(refusal.value)
        return
    # Traced only: what it computes is compared with NumPy above.
    trace = functools.partial(functools.partial, jax.eval_shape)
    _, start, (_, state) = one_cycle(name, "interpolate", trace)
    assert shapes_and_dtypes(state) == shapes_and_dtypes(start)


def test_what_optax_flatten_makes_one_vector_of_is_refused():
    tx = lookahead(optax.flatten(optax.adam(0.1)), inner_state="interpolate")
    with pytest.raises(ValueError, match=re.escape(OPAQUE_RULE)):
        tx.init(PARAMS)
    # The remedy.
    tx = optax.flatten(lookahead(optax.adam(0.1), inner_state="interpolate"))
    tx.update(PARAMS, tx.init(PARAMS), PARAMS)


def test_interpolation_moves_moments_of_any_kind_and_nothing_else():
    inner = optax.chain(
        optax.partition({"x": optax.adam(0.1), "y": SGD}, LABELS),
        optax.masked(optax.trace(0.5), {"w": False, "b": True}),
        optax.add_noise(0.1, 0.55, key=jax.random.key(0)),
    )
    tx = lookahead(inner, 2, 0.25, inner_state="interpolate")
    now = [tx.init(PARAMS)]
    params = PARAMS
    for step in range(4):
        grads = constant_gradient(params, step)
        _, moved = inner.update(grads, now[-1].fast_state, params)
        updates, state = tx.update(grads, now[-1], params)
        now.append(state)
        params = optax.apply_updates(params, updates)
        if step % 2 == 0:
            continue
        old = now[-3].fast_state

        def expected(x, y):
            kind = jnp.inexact if x.shape else jnp.bool_  # counts have no shape
            return x + 0.25 * (y - x) if jnp.issubdtype(x.dtype, kind) else y

        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6),
            as_arrays(state.fast_state),
            as_arrays(jax.tree.map(expected, old, moved)),
        )


# Every field of Optax's states that is like the parameters and floating: those that a
# sync moves, by the name of the state's type, and those that stay.
MOVED = {
    "EmaState": {"ema"},
    "FactoredState": {"v_row", "v_col", "v"},
    "LookaheadState": {"slow_params", "anchor"},
    "MomoAdamState": {"exp_avg", "exp_avg_sq"},
    "MomoState": {"exp_avg"},
    "MuonState": {"mu"},
    "PerElementMeanAndVarianceEMAState": {"mean_grads_ema", "variance_grads_ema"},
    "ScaleByAdaDeltaState": {"e_g", "e_x"},
    "ScaleByAdamState": {"mu", "nu"},
    "ScaleByAdanState": {"m", "v", "n"},
    "ScaleByAdemamixState": {"m1", "m2", "nu"},
    "ScaleByAmsgradState": {"mu", "nu", "nu_max"},
    "ScaleByBeliefState": {"mu", "nu"},
    "ScaleByLionState": {"mu"},
    "ScaleByNovogradState": {"mu", "nu"},
    "ScaleByRStdDevState": {"mu", "nu"},
    "ScaleByRStdDevWithCountState": {"mu", "nu"},
    "ScaleByRmsState": {"nu"},
    "ScaleByRmsWithCountState": {"nu"},
    "ScaleByRpropState": {"step_sizes"},
    "ScaleByRssState": {"sum_of_squares"},
    "ScaleBySM3State": {"mu", "nu"},
    "ScaleBySimplifiedAdEMAMixState": {"m", "n"},
    "SophiaState": {"mu", "nu"},
    "TraceState": {"trace"},
    "DAdaptAdamWState": {"exp_avg", "exp_avg_sq"},
    "ProdigyState": {"exp_avg", "exp_avg_sq"},
    # Weights in the state, which are interpolated as the slow weights are.
    "COCOBState": {"cumulative_gradients", "scale", "subgradients", "reward"},
    "MadgradState": {"grad_sum_sq", "s"},
    "SAMState": {"cache"},
    "ScheduleFreeState": {"z"},
}
STAY = {
    "AccumulateAvgUpdatesState": {"avg_grad"},
    "ApplyEvery": {"grad_acc"},
    "COCOBState": {"init_particles"},
    "DAdaptAdamWState": {"grad_sum"},
    "DoGState": {"init_params"},
    "DoWGState": {"init_params"},
    "GaLoreState": {"projector"},
    "MadgradState": {"x0"},
    "MechanicState": {"x0"},
    "MultiStepsState": {"acc_grads"},
    "PerElementMeanAndSumSqDiffGradsState": {"mean_grads", "sum_sq_diff_grads"},
    "ProdigyState": {"grad_sum", "params0"},
    "ScaleByAdanState": {"g"},
    "ScaleByDistanceOverGradientsState": {
        "max_dist",
        "grad_sum_of_squares",
        "init_params",
    },
    "ScaleByLBFGSState": {
        "params",
        "updates",
        "diff_params_memory",
        "diff_updates_memory",
    },
    "ScaleByOptimisticGradientState": {"previous_gradient"},
    "ScaleByRpropState": {"prev_updates"},
    "SnapshotState": {"measurement"},
}
# Not optimizers, or not with the arguments that the others have.
FURTHER = {
    "apply_every": lambda: optax.apply_every(3),
    "distance_over_gradients": lambda: optax.scale_by_distance_over_gradients(),
    "ema": lambda: optax.ema(0.9),
    "lookahead": lambda: lookahead(SGD, 2, inner_state="interpolate"),
    "snapshot": lambda: optax.snapshot("u", lambda u: u),
    "stddev": lambda: optax.scale_by_stddev(bias_correction=True),
    "rss": lambda: optax.scale_by_rss(),
    "rms with a count": lambda: optax.scale_by_rms(bias_correction=True),
    "stddev without a count": lambda: optax.scale_by_stddev(),
    "rms without a count": lambda: optax.scale_by_rms(bias_correction=False),
    "simplified ademamix": lambda: optax.contrib.simplified_ademamix(0.1),
}
HAS_GALORE = hasattr(optax.contrib, "galore")  # not in every version
if HAS_GALORE:
    FURTHER["galore of matrices"] = lambda: optax.contrib.galore(
        0.1, rank=1, update_proj_gap=3
    )
AGGREGATING = getattr(
    getattr(optax, "experimental", None), "aggregating", None
)  # not in every version
if AGGREGATING is not None:
    FURTHER["mean of gradients"] = lambda: AGGREGATING.accumulate_avg_updates(3)
    FURTHER["mean and squares"] = lambda: (
        AGGREGATING.get_per_element_mean_and_sum_sq_diff_grads()
    )
    FURTHER["mean and variance"] = lambda: (
        AGGREGATING.track_per_element_mean_and_variance_with_ema()
    )


def further(name):
    return FURTHER[name]() if name in FURTHER else make(name)


def fields_like_parameters(tx, params):
    """Returns the (type, field)s of Optax's states that hold them, with their trees."""
    state = tx.init(params)
    marks = optax.tree.map_params(
        tx,
        lambda x: jnp.issubdtype(jnp.result_type(x), jnp.inexact),
        state,
        transform_non_params=lambda _: False,
    )
    found = set()

    def walk(node, owner):
        if hasattr(node, "_fields") and not isinstance(node, optax.MaskedNode):
            for field in node._fields:
                walk(getattr(node, field), (type(node).__name__, field))
        elif isinstance(node, dict):
            for child in node.values():
                walk(child, owner)
        elif isinstance(node, list | tuple):
            for child in node:
                walk(child, owner)
        elif node is True:
            found.add(owner)

    walk(marks, None)
    return found


def pairs(table):
    return {(name, field) for name, fields in table.items() for field in fields}


@functools.cache
def found_in_optax():
    """Returns every such field, and names of optimizers by those that stay in them."""
    fields, by_name = set(), {}
    params = jax.tree.map(jnp.asarray, WEIGHTS)
    for name in [*NAMES, *FURTHER]:
        if name in OPAQUE:
            continue
        own = fields_like_parameters(further(name), params)
        fields |= own
        if own & pairs(STAY):
            by_name[name] = own & pairs(STAY)
    return fields, by_name


def test_each_field_of_optax_that_is_like_the_parameters_is_listed_to_move_or_to_stay():
    fields, _ = found_in_optax()
    assert not pairs(MOVED) & pairs(STAY)
    assert not fields - pairs(MOVED) - pairs(STAY), "add them to MOVED or to STAY"
    # Not every version of Optax has all of them.
    assert len(pairs(STAY) - fields) <= 6
    assert len(fields & pairs(MOVED)) > 25


# States without a floating field that is like the parameters.
NEITHER = {
    "AddNoiseState",
    "ApplyIfFiniteState",
    "ConditionallyMaskState",
    "ConditionallyTransformState",
    "DifferentiallyPrivateAggregateState",
    "EmptyState",
    "HutchinsonState",
    "InjectHyperparamsState",
    "InjectStatefulHyperparamsState",
    "MaskedState",
    "MonitorState",  # measurements only
    "NormalizeState",
    "PartitionState",
    "ReduceLROnPlateauState",
    "ScaleByBacktrackingLinesearchState",
    "ScaleByScheduleState",
    "ScaleByZoomLinesearchState",
    "SplitRealAndImaginaryState",
    "WrappedScheduleState",
    "ZeroNansState",
}


def test_every_type_of_state_that_optax_exports_is_listed():
    exported = {
        value.__name__
        for module in (optax, optax.contrib, optax.transforms, optax.schedules)
        for name, value in vars(module).items()
        if name.endswith("State") and hasattr(value, "_fields")
    }
    assert not exported - MOVED.keys() - STAY.keys() - NEITHER


STAYING = ["adan", "apply_every", "cocob", "dadapt_adamw", "distance_over_gradients"]
STAYING += ["dog", "dowg", "galore", "galore of matrices", "lbfgs_without_linesearch"]
STAYING += ["madgrad", "mechanize", "multi_steps", "optimistic_adam_v2"]
STAYING += ["optimistic_gradient_descent", "prodigy", "rprop"]
STAYING += ["mean of gradients", "scale_by_madgrad", "scale_by_rprop", "snapshot"]


def test_all_optimizers_with_fields_that_stay_are_tried():
    # One takes a gradient for every example.
    assert set(found_in_optax()[1]) - {"mean and squares"} <= set(STAYING)


@pytest.mark.skipif(not hasattr(optax, "monitor"), reason="Optax 0.2.6 has no monitor")
def test_interpolation_does_not_change_what_a_monitor_measured():
    monitor = optax.monitor({"mean": optax.ema(0.9)})
    inner = optax.chain(monitor, optax.sgd(0.1, momentum=0.9))
    tx = lookahead(inner, 2, 0.5, inner_state="interpolate")
    params, measured = jnp.ones(2), monitor.init(jnp.ones(2))
    state = tx.init(params)
    for _ in range(4):
        updates, state = tx.update(params, state, params)
        _, measured = monitor.update(params, measured, params)
        params = optax.apply_updates(params, updates)
        jax.tree.map(np.testing.assert_array_equal, state.fast_state[0], measured)


def field_trees(state, name, field):
    """Returns the values of a field in the states of that type, in any depth."""

    def is_one(node):
        return type(node).__name__ == name

    nodes = jax.tree.leaves(state, is_leaf=is_one)
    return [getattr(node, field) for node in nodes if is_one(node)]


@pytest.mark.parametrize("name", STAYING)
def test_interpolation_moves_no_field_that_is_not_a_moment(name):
    if name not in found_in_optax()[1]:
        pytest.skip("this version of Optax has no such optimizer")
    inner = optax.with_extra_args_support(further(name))
    tx = lookahead(inner, 2, 0.25, inner_state="interpolate")
    params = jax.tree.map(jnp.asarray, WEIGHTS)

    @jax.jit
    def step(params, state, number):
        grads, extra = arguments(name, params, number)
        updates, new = tx.update(grads, state, params, **extra)
        alone = inner.update(grads, state.fast_state, params, **extra)[1]
        return optax.apply_updates(params, updates), new, alone

    state, anchor = tx.init(params), inner.init(params)
    for number in range(4):
        # Optax's own broadcast in `scale_by_distance_over_gradients`.
        with jax.numpy_rank_promotion("allow"):
            params, state, alone = step(params, state, jnp.asarray(number))
        sync = number % 2 == 1
        for kind, field in fields_like_parameters(inner, params):
            stays = (kind, field) in pairs(STAY)
            for got, now, old in zip(
                field_trees(state.fast_state, kind, field),
                field_trees(alone, kind, field),
                field_trees(anchor, kind, field),
                strict=True,
            ):
                if not sync or stays:
                    expected = now
                else:
                    expected = jax.tree.map(lambda x, y: x + 0.25 * (y - x), old, now)
                equal = functools.partial(
                    np.testing.assert_allclose,
                    rtol=0.0 if stays else 1e-4,
                    atol=0.0 if stays else 1e-7,
                )
                jax.tree.map(equal, got, expected)
        anchor = state.fast_state if sync else anchor


@pytest.mark.skipif(not HAS_GALORE, reason="Optax 0.2.6 has no galore")
def test_the_projector_of_galore_stays_orthonormal():
    inner = optax.contrib.galore(0.1, rank=2, update_proj_gap=4)
    tx = lookahead(inner, 3, 0.5, inner_state="interpolate")
    params = jax.tree.map(jnp.asarray, WEIGHTS)
    state = tx.init(params)

    @jax.jit
    def step(params, state, number):
        grads, _ = arguments("galore", params, number)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for number in range(9):
        params, state = step(params, state, jnp.asarray(number))
        (projector,) = field_trees(state, "GaLoreState", "projector")
        product = projector["w"].T @ projector["w"]
        np.testing.assert_allclose(product, np.eye(2), atol=1e-5)


@pytest.mark.parametrize("name", ["multi_steps", "apply_every"])
def test_gradients_that_are_being_accumulated_are_applied_once_and_whole(name, x64):
    # Three micro-steps in cycles of two: a sync comes in the middle of them.
    inner = {
        "multi_steps": multi_steps(optax.sgd(0.1), 3, use_grad_mean=False),
        "apply_every": optax.chain(optax.apply_every(3), optax.sgd(0.1)),
    }[name]
    tx = lookahead(inner, 2, 0.5, inner_state="interpolate")
    params = jnp.zeros(2)
    state = tx.init(params)
    theta = phi = waiting = np.zeros(2)
    for step in range(12):
        grads = np.asarray([1.0, -2.0]) * (step + 1)
        waiting = waiting + grads
        if step % 3 == 2:
            theta, waiting = theta - 0.1 * waiting, np.zeros(2)
        if step % 2 == 1:
            theta = phi = phi + 0.5 * (theta - phi)
        updates, state = tx.update(jnp.asarray(grads), state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(params, theta, rtol=1e-12)


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("alpha", [1.0, 0.5])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_an_infinite_moment_stays_infinite_and_does_not_become_nan(
    dtype, alpha, transform
):
    inner = optax.sgd(0.1, momentum=0.5)
    tx = lookahead(inner, 2, alpha, inner_state="interpolate")
    params = {"s": jnp.asarray(1.0, dtype), "w": jnp.ones((2, 1, 2), dtype)}
    alone = params
    # After two steps, in mid-cycle, one moment has overflowed.
    update, update_alone = transform(tx.update), transform(inner.update)
    state, alone_state = tx.init(params), inner.init(params)
    for step in range(7):
        grads = jax.tree.map(jnp.ones_like, params)
        if step == 2:
            grads["w"] = grads["w"].at[0].set(jnp.inf)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        updates, alone_state = update_alone(grads, alone_state, alone)
        alone = optax.apply_updates(alone, updates)
        trace = state.fast_state[0].trace
        if step >= 2:
            assert np.all(np.isposinf(np.asarray(trace["w"][0], np.float32)))
        assert np.all(np.isfinite(np.asarray(trace["w"][1], np.float32)))
        if alpha == 1.0:
            jax.tree.map(
                np.testing.assert_array_equal,
                (params, state.fast_state),
                (alone, alone_state),
            )


@every_policy
def test_there_is_an_anchor_only_where_it_is_needed(policy):
    inner = optax.adamw(falling)
    state = lookahead(inner, inner_state=policy).init(PARAMS)
    sizes = [x.size for x in jax.tree.leaves(state.anchor)]
    assert sizes == ([2, 4, 2, 4] if policy == "interpolate" else [])
    assert not jax.tree.leaves(outer_loop(inner, optax.sgd(0.5), 2).init(PARAMS).anchor)


def test_map_params_finds_the_anchor_among_what_is_like_a_parameter():
    tx = lookahead(optax.adam(0.1), 2, inner_state="interpolate")
    names = {name: name for name in PARAMS}
    named = optax.tree.map_params(
        tx,
        lambda _, name: name,
        tx.init(PARAMS),
        names,
        transform_non_params=lambda _: None,
    )
    adam = named.fast_state[0]
    assert adam.mu == adam.nu == named.slow_params == names
    assert named.anchor == (names, names)


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_on_a_mesh_each_anchor_has_the_sharding_of_its_moment(transform):
    mesh = make_mesh({"data": 2, "model": 2}, AxisType.Auto, jax.devices()[:4])
    shardings = {
        "w": NamedSharding(mesh, P("data", "model")),
        "b": NamedSharding(mesh, P("model")),
    }
    tx = lookahead(optax.adam(0.1), 2, inner_state="interpolate")
    params = jax.device_put(PARAMS, shardings)
    whole = NamedSharding(mesh, P())
    by_rule = optax.tree.map_params(
        tx,
        lambda _, sharding: sharding,
        jax.eval_shape(tx.init, params),
        shardings,
        transform_non_params=lambda _: whole,
    )
    state = jax.jit(tx.init, out_shardings=by_rule)(params)
    eager = trajectory(tx, PARAMS, constant_gradient, 4)

    @transform
    def train_step(params, state):
        updates, state = tx.update(constant_gradient(params, 0), state, params)
        return optax.apply_updates(params, updates), state

    for expected in eager:
        adam = state.fast_state[0]
        for tree in (state.slow_params, adam.mu, adam.nu, *state.anchor):
            for name, x in tree.items():
                assert x.sharding.is_equivalent_to(shardings[name], x.ndim)
        params, state = jax.block_until_ready(train_step(params, state))
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5),
            (params, state),
            expected,
        )


@pytest.mark.parametrize("policy", ["reset", "interpolate"])
def test_parameters_and_state_can_be_donated_together_under_a_policy(policy):
    tx = lookahead(optax.adam(0.1), 2, inner_state=policy)
    step = jax.jit(train_step(tx).__wrapped__, donate_argnums=(0, 1))
    params = jax.tree.map(jnp.copy, PARAMS)
    state = tx.init(params)
    for expected in trajectory(tx, PARAMS, constant_gradient, 5):
        old = jax.tree.leaves((params, state))
        params, state = step(params, state)
        assert all(x.is_deleted() for x in old)
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5),
            (params, state),
            expected,
        )


@pytest.mark.parametrize("policy", ["reset", "interpolate"])
def test_flax_trains_under_a_policy(policy):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(16, 3)), jnp.float32)
    y = jnp.sin(x @ jnp.array([[1.0], [-2.0], [0.5]]))
    tx = lookahead(optax.adam(0.1), 2, inner_state=policy)
    linear = nn.Dense(1)
    params = linear.init(jax.random.key(0), x)["params"]

    def loss(params):
        return jnp.mean((jnp.tanh(linear.apply({"params": params}, x)) - y) ** 2)

    expected = trajectory(tx, params, lambda p, _: jax.grad(loss)(p), 5, jax.jit)

    state = TrainState.create(apply_fn=linear.apply, params=params, tx=tx)
    apply = jax.jit(lambda s: s.apply_gradients(grads=jax.grad(loss)(s.params)))
    model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    nnx.update(model, nnx.State(jax.tree.map(nnx.Param, dict(params))))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    def nnx_loss(model):
        return jnp.mean((jnp.tanh(model(x)) - y) ** 2)

    @nnx.jit
    def nnx_step(model, optimizer):
        optimizer.update(model, nnx.grad(nnx_loss)(model))

    for params, opt_state in expected:
        state = apply(state)
        nnx_step(model, optimizer)
        by_nnx = nnx.state(model), optimizer.opt_state
        for got in ((state.params, state.opt_state), by_nnx):
            for a, b in zip(
                jax.tree.leaves(got), jax.tree.leaves((params, opt_state)), strict=True
            ):
                np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


class Trained(NamedTuple):
    """The state of a user's own schedule, which `"reset"` does not know."""

    count: jax.Array


def own_schedule(rate):
    def update(updates, state, params=None):
        scale = rate / (1 + state.count)
        return jax.tree.map(lambda u: scale * u, updates), Trained(state.count + 1)

    return optax.GradientTransformation(lambda p: Trained(jnp.zeros([])), update)


def keep_trained(state, fresh):
    """Restarts the moments and keeps the schedule's count."""
    return tuple(
        s if isinstance(s, Trained) else f for s, f in zip(state, fresh, strict=True)
    )


OWN = optax.chain(optax.trace(0.9), own_schedule(-0.1))
FUNCTION = {
    "lookahead": lookahead(OWN, 2, 0.5, inner_state=keep_trained),
    "outer_loop": outer_loop(OWN, optax.sgd(0.5), 2, inner_state=keep_trained),
}


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("name", FUNCTION)
def test_a_function_decides_what_a_sync_does_to_the_inner_state(name, transform):
    visited = trajectory(FUNCTION[name], PARAMS, constant_gradient, 6, transform)
    slow = fast = jax.tree.map(np.asarray, PARAMS)
    for i, (params, state) in enumerate(visited):
        grads = jax.tree.map(np.asarray, constant_gradient(fast, i))
        if i % 2 == 0:
            trace = jax.tree.map(np.zeros_like, slow)
        trace = jax.tree.map(lambda g, t: g + 0.9 * t, grads, trace)
        rate = -0.1 / (1 + i)  # it counts on
        fast = jax.tree.map(lambda p, t, rate=rate: p + rate * t, fast, trace)
        if i % 2:
            slow = fast = jax.tree.map(lambda s, f: (s + f) / 2, slow, fast)
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), params, fast
        )
        assert state.fast_state[1].count == i + 1


def test_a_function_goes_through_scan_and_vmap():
    tx = FUNCTION["lookahead"]
    once = trajectory(tx, PARAMS, constant_gradient, 5, jax.jit)[-1][0]
    many = jax.tree.map(lambda p: jnp.stack([p, p]), PARAMS)
    ran = jax.vmap(lambda p: scanned(tx, p, constant_gradient, 5))(many)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x[1, -1], y, rtol=1e-6), ran[0], once
    )


@pytest.mark.parametrize(
    ("function", "rule"),
    [
        (lambda state, fresh: fresh[0], "must return a state with the tree"),
        (
            lambda state, fresh: jax.tree.map(lambda x: jnp.stack([x, x]), fresh),
            "must return a state with the shapes",
        ),
        (
            lambda state, fresh: jax.tree.map(lambda x: x.astype(jnp.float16), fresh),
            "must return a state with the dtypes",
        ),
    ],
    ids=["tree", "shapes", "dtypes"],
)
def test_a_function_that_returns_something_else_is_refused_by_name(function, rule):
    for tx in (
        lookahead(OWN, 2, inner_state=function),
        outer_loop(OWN, optax.sgd(0.5), 2, inner_state=function),
    ):
        with pytest.raises(ValueError, match=f"`inner_state` {rule}"):
            tx.update(PARAMS, tx.init(PARAMS), PARAMS)


@pytest.mark.parametrize("policy", ["keep", "reset", None])
@pytest.mark.parametrize("name", ["lbfgs", "backtracking"])
def test_the_loss_that_a_line_search_keeps_is_infinite_after_a_sync(name, policy):
    inner = {
        "lbfgs": optax.lbfgs(),
        "backtracking": optax.chain(
            optax.sgd(1.0), optax.scale_by_backtracking_linesearch(10, store_grad=True)
        ),
    }[name]
    if policy is None:
        policy = lambda state, fresh: state  # noqa: E731
    tx = lookahead(inner, 2, 0.5, inner_state=policy)

    def loss(w):
        return jnp.sum((w - 1.0) ** 4)

    w = jnp.asarray([3.0, -1.0])
    state = tx.init(w)
    value_and_grad = optax.value_and_grad_from_state(loss)
    for step in range(4):
        value, grad = value_and_grad(w, state=state)
        # After a sync too, it is that of the parameters in hand.
        np.testing.assert_allclose(value, loss(w), rtol=1e-6)
        np.testing.assert_allclose(grad, jax.grad(loss)(w), rtol=1e-5)
        updates, state = tx.update(
            grad, state, w, value=value, grad=grad, value_fn=loss
        )
        w = optax.apply_updates(w, updates)
        assert np.isinf(optax.tree.get(state, "value")) == bool(step % 2)
