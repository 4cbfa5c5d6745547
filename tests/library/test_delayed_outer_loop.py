"""Do workers whose mean is delayed by some steps do what a loop over workers does?"""

import functools
import itertools
import pickle
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from helpers import reference, transformer
from helpers.meshes import make_mesh
from helpers.pages import run_block
from helpers.rows import slow_but
from helpers.trees import assert_close, bits, shapes_and_dtypes
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from optax_lookahead import (
    DelayedOuterState,
    average_replicas,
    delayed_outer_loop,
    outer_loop,
    replica_axes,
)

R, K, CYCLES = 4, 4, 3
NAME = "replica"
NESTEROV = optax.sgd(0.7, momentum=0.9, nesterov=True)
INNERS = {"adam": optax.adam(0.02), "muon": optax.contrib.muon(0.02)}


def train_step_of(inner, loss_fn=transformer.loss_fn):
    def train_step(params, state, batch):
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, state = inner.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    return train_step


# By hand: a loop over workers and their steps, and NumPy for what they exchange.


def adam_by_hand():
    """Returns an inner step in NumPy, with a memory for each leaf."""
    step = reference.adamw(0.02)

    def inner_step(theta, memories, batch):
        loss, grads = value_and_grad(theta, batch)
        memories = memories or {name: {} for name in theta}
        theta = {
            name: theta[name] + step(np.asarray(grads[name]), x, memories[name])
            for name, x in theta.items()
        }
        return theta, memories, loss

    return inner_step


value_and_grad = jax.jit(jax.value_and_grad(transformer.loss_fn))


def muon_by_hand():
    """Returns a step of Optax's Muon for one worker: it is not what is tested."""
    one = jax.jit(train_step_of(INNERS["muon"]))

    def inner_step(theta, state, batch):
        theta, state, loss = one(theta, state or INNERS["muon"].init(theta), batch)
        return {name: np.asarray(x) for name, x in theta.items()}, state, loss

    return inner_step


BY_HAND = {"adam": adam_by_hand(), "muon": muon_by_hand()}


def by_hand(inner_step, start, batches, delay, mix, k=K):
    """Returns fast weights, slow weights and losses after each cycle of all workers."""
    outer = reference.snoo(0.7, 0.9)
    theta, states = [start] * R, [None] * R
    phi, memories = start, {name: {} for name in start}
    visited = []
    for cycle in batches:
        losses, sent = np.zeros((R, k)), None
        for i in range(k + 1):
            if i == k - delay:
                sent = theta.copy()
            if i == k:
                break
            for r in range(R):
                result = inner_step(theta[r], states[r], cycle[r, i])
                theta[r], states[r], losses[r, i] = result
        for name, x in phi.items():
            mean = sum(worker[name] for worker in sent) / R
            phi = phi | {name: x + outer(x - mean, x, memories[name])}
        theta = [
            {name: mix * x[name] + (1 - mix) * phi[name] for name in phi} for x in theta
        ]
        visited.append((theta.copy(), phi, losses))
    return visited


@functools.cache
def problem():
    """Returns the first parameters and batches[cycle][replica, step]."""
    start = transformer.init_params(jax.random.key(0), jnp.float32)
    keys = jax.random.split(jax.random.key(1), (CYCLES, R, K))
    draw = functools.partial(transformer.tokens, batch=2)
    batches = jax.vmap(jax.vmap(jax.vmap(draw)))(keys)
    return jax.tree.map(lambda x: np.asarray(x, np.float64), start), np.asarray(batches)


# With the package: one program for a cycle of all replicas.


def by_vmap(cycle, mesh=None):
    spmd = {} if mesh is None else {"spmd_axis_name": NAME}
    axes = 0, 0, None, 0
    return jax.vmap(cycle, axes, axes, axis_name=NAME, **spmd)


def by_shard_map(cycle, mesh=None):
    mesh = mesh or make_mesh({NAME: R}, AxisType.Auto, jax.devices()[:R])
    specs = P(NAME), P(NAME), P(), P(NAME)

    def of_shard(params, state, outer_state, batches):
        own = jax.tree.map(lambda x: x[0], (params, state, batches))
        params, state, outer_state, losses = cycle(*own[:2], outer_state, own[2])
        own = jax.tree.map(lambda x: x[None], (params, state, losses))
        return *own[:2], outer_state, own[2]

    return jax.shard_map(
        of_shard, mesh=mesh, in_specs=specs, out_specs=specs, axis_names={NAME}
    )


FORMS = {"vmap": by_vmap, "shard_map": by_shard_map}


def spread(tree):
    return jax.tree.map(lambda x: jnp.stack([x] * R), tree)


def train(inner, delay, mix, form="vmap", mesh=None):
    """Returns what `by_hand` does."""
    start, batches = problem()
    step = train_step_of(INNERS[inner])
    init, cycle = delayed_outer_loop(step, NESTEROV, NAME, delay=delay, mix=mix)
    of_all = jax.jit(FORMS[form](cycle, mesh), donate_argnums=(0, 1, 2))
    start = jax.tree.map(jnp.asarray, start)
    params, outer_state = spread(start), init(start)
    state = jax.vmap(INNERS[inner].init)(params)
    if mesh is not None:

        def place(x):
            within = ("fsdp" for size in x.shape[1:2] if size % 2 == 0)
            return jax.device_put(x, NamedSharding(mesh, P(NAME, *within)))

        params, state = jax.tree.map(place, (params, state))
        outer_state = jax.device_put(outer_state, NamedSharding(mesh, P()))
    visited = []
    for batch in batches:
        *carry, losses = of_all(params, state, outer_state, batch)
        params, state, outer_state = carry
        workers = [
            jax.tree.map(lambda x, r=r: np.array(x[r]), params) for r in range(R)
        ]
        visited.append(
            (workers, jax.tree.map(np.array, outer_state.slow_params), losses)
        )
    return visited


ROWS = list(itertools.product(INNERS, (0, 1, 3), (0, 0.5, 1), FORMS))
KEPT = [("muon", 1, 0.5, "vmap")]


@pytest.mark.parametrize(("inner", "delay", "mix", "form"), slow_but(KEPT, ROWS))
def test_replicas_match_a_loop_over_workers(x64, inner, delay, mix, form):
    expected = by_hand(BY_HAND[inner], *problem(), delay, mix)
    assert_close(train(inner, delay, mix, form), expected, 1e-12)


@pytest.mark.parametrize("form", slow_but(["shard_map"], list(FORMS)))
def test_sharded_replicas_match_a_loop_over_workers(x64, form):
    mesh = make_mesh({NAME: R, "fsdp": 2}, AxisType.Auto)
    expected = by_hand(BY_HAND["adam"], *problem(), 1, 0.5)
    assert_close(train("adam", 1, 0.5, form, mesh), expected, 1e-12)


def test_a_delay_of_the_whole_cycle_sends_the_weights_that_it_starts_from(x64):
    expected = by_hand(BY_HAND["adam"], *problem(), K, 0.5)
    assert_close(train("adam", K, 0.5), expected, 1e-12)


@pytest.mark.parametrize("inner", slow_but(["adam"], list(INNERS)))
def test_without_delay_and_mix_it_is_the_outer_loop(x64, inner):
    start, batches = problem()
    tx = outer_loop(INNERS[inner], optax.chain(average_replicas(NAME), NESTEROV), K)
    axes = replica_axes(jax.eval_shape(tx.init, start))
    step = jax.jit(
        jax.vmap(train_step_of(tx), (0, axes, 0), (0, axes, 0), axis_name=NAME)
    )
    params = spread(start)
    state = jax.vmap(tx.init, out_axes=axes)(params)
    for (workers, phi, losses), cycle in zip(
        train(inner, 0, 0.0), batches, strict=True
    ):
        for i in range(K):
            params, state, loss = step(params, state, cycle[:, i])
            assert_close(losses[:, i], loss, 1e-12)
        for r, worker in enumerate(workers):
            assert_close(worker, jax.tree.map(lambda x, r=r: x[r], params), 1e-12)
            assert_close(phi, jax.tree.map(lambda x, r=r: x[r], params), 1e-12)


# Weights after each step of two fragments of one weight that starts at 1, in torchft's
# regression test of its DiLoCo: the gradient is 2 and the inner learning rate 1, the
# outer one 2; the first syncs at steps 3, 9 and 15, the second at 6 and 12.
# (delay, mix): the weights at these steps; every other step takes 2.
PUBLISHED = {
    (0, 0): ([-11.0, -35.0, -59.0], [-23.0, -47.0]),
    (0, 0.5): ([-8.0, -24.5, -40.25], [-17.0, -32.0]),
    (0, 1): ([-5.0, -17.0, -29.0], [-11.0, -23.0]),
    (1, 0): ([-7.0, -27.0, -47.0], [-19.0, -39.0]),
    (1, 0.5): ([-6.0, -21.5, -35.75], [-15.0, -29.0]),
    (1, 1): ([-5.0, -17.0, -29.0], [-11.0, -23.0]),
}


def published(first, second):
    """Returns the 16 weights of each fragment, of which all but a sync's are 2 less."""
    trajectories = []
    for syncs in (
        dict(zip((3, 9, 15), first, strict=True)),
        {6: second[0], 12: second[1]},
    ):
        trajectory = [1.0]
        for step in range(1, 16):
            trajectory.append(syncs.get(step, trajectory[-1] - 2.0))
        trajectories.append(trajectory)
    return trajectories


@pytest.mark.parametrize(("delay", "mix"), PUBLISHED)
def test_two_fragments_have_the_published_weights_of_torchft(delay, mix):
    names = "fragment_0", "fragment_1"
    inner = optax.sgd(1.0)

    def fragment(name):
        """Returns the functions for a cycle of three steps, in which it syncs."""

        def train_step(own, rest, batch):
            others, state = rest
            params = others | own
            grads = jax.tree.map(lambda _: batch, params)
            updates, state = inner.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            own = {name: params.pop(name)}
            return own, (params, state), own | params

        init, cycle = delayed_outer_loop(
            train_step, optax.sgd(2.0), NAME, delay=delay, mix=mix
        )
        return init, jax.jit(by_vmap(cycle))

    fragments = {name: fragment(name) for name in names}
    outer_states = {
        name: init({name: jnp.ones([])}) for name, (init, _) in fragments.items()
    }
    params = {name: jnp.ones(2) for name in names}  # two replicas, both alike
    state = jax.vmap(inner.init)(params)
    visited = {name: [1.0] for name in names}
    for name in names * 2 + names[:1]:
        own = {name: params.pop(name)}
        own, (params, state), outer_states[name], steps = fragments[name][1](
            own, (params, state), outer_states[name], jnp.full((2, 3), 2.0)
        )
        params = params | own
        for other in names:
            np.testing.assert_array_equal(*steps[other])
            # Recorded before the sync, which comes after the last step.
            visited[other] += [*steps[other][0, :-1], params[other][0]]
    assert [visited[name] for name in names] == published(*PUBLISHED[delay, mix])


# What may go wrong with a replica.


def counted(outer=NESTEROV, delay=1, mix=0.5):
    """Returns init and a cycle of replicas that add what their batch says."""

    def train_step(params, state, batch):
        return jax.tree.map(jnp.add, params, batch), state + 1, None

    init, cycle = delayed_outer_loop(train_step, outer, NAME, delay=delay, mix=mix)
    return init, jax.jit(by_vmap(cycle))


def steps(bad=None, cycles=3, shape=(5,)):
    """Returns random steps [cycle, replica, step], of which one may be bad."""
    drawn = {
        "w": np.random.default_rng(0).normal(size=(cycles, R, K, *shape)),
        "b": np.random.default_rng(1).normal(size=(cycles, R, K)),
    }
    if bad is not None:
        drawn["w"][1, 2, 0, 3] = bad
    return drawn


def run(init, cycle, start, batches):
    params, state, outer_state = spread(start), jnp.zeros(R), init(start)
    for i in range(len(batches["b"])):
        batch = jax.tree.map(lambda x, i=i: x[i], batches)
        params, state, outer_state, _ = cycle(params, state, outer_state, batch)
    return params, outer_state


@pytest.mark.parametrize("mix", [0.0, 0.5])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_replica_that_broke_is_left_out_whole(x64, bad, mix):
    batches, start = steps(bad), {"w": np.ones(5), "b": np.array(2.0)}
    params, outer_state = run(*counted(mix=mix), start, batches)
    outer, phi = reference.snoo(0.7, 0.9), start
    memories, theta = {"w": {}, "b": {}}, jax.tree.map(np.asarray, spread(start))
    for i in range(3):
        sent = {name: theta[name] + x[i][:, :-1].sum(1) for name, x in batches.items()}
        theta = {name: theta[name] + x[i].sum(1) for name, x in batches.items()}
        healthy = np.isfinite(sent["w"]).all(1)
        assert healthy.all() == (i != 1), "it breaks in the second cycle alone"
        for name in phi:
            mean = sent[name][healthy].mean(0)
            phi = phi | {
                name: phi[name] + outer(phi[name] - mean, phi[name], memories[name])
            }
            with np.errstate(invalid="ignore"):
                mixed = mix * theta[name] + (1 - mix) * phi[name]
            # Elements that are not finite take the global copy.
            theta[name] = np.where(np.isfinite(theta[name]), mixed, phi[name])
    assert_close(outer_state.slow_params, phi, 1e-14)
    assert_close(params, theta, 1e-14)


def test_where_no_replica_is_healthy_the_slow_weights_stay_finite(x64):
    batches, start = steps(), {"w": np.ones(5), "b": np.array(2.0)}
    batches["b"][:, :, 0] = np.nan
    params, outer_state = run(*counted(), start, batches)
    # There is no momentum yet, so they stay.
    assert_close(outer_state.slow_params, start, 0)
    assert np.isfinite(params["w"]).all()
    assert_close(params["b"], spread(start)["b"], 0)


def test_slow_weights_do_not_take_what_the_outer_optimizer_made_not_finite(x64):
    def bad_at_the_first(updates, state, params=None):
        return jax.tree.map(lambda g: (-g).at[..., :1].set(jnp.nan), updates), state

    outer = optax.GradientTransformation(optax.init_empty_state, bad_at_the_first)
    init, cycle = counted(outer, delay=0, mix=0.0)
    start = {"w": np.ones(5), "b": np.ones(2)}
    batches = steps(cycles=1) | {"b": steps(shape=(2,), cycles=1)["w"]}
    params, outer_state = run(init, cycle, start, batches)
    for name, x in start.items():
        expected = x + batches[name][0].sum(1).mean(0)
        expected[0] = 1.0
        np.testing.assert_allclose(outer_state.slow_params[name], expected)
        np.testing.assert_allclose(params[name], np.stack([expected] * R))


@pytest.mark.parametrize("mix", [0.0, 0.5, 1.0])
def test_entries_that_are_infinite_by_design_break_no_replica(x64, mix):
    mask = np.array([0.0, -np.inf, np.inf, 1.0, 2.0])
    decay = optax.chain(optax.add_decayed_weights(0.1), NESTEROV)
    start = {"w": mask, "b": np.array(2.0)}
    params, outer_state = run(*counted(decay, mix=mix), start, steps())
    np.testing.assert_array_equal(outer_state.slow_params["w"][1:3], mask[1:3])
    np.testing.assert_array_equal(params["w"][:, 1:3], [mask[1:3]] * R)
    for tree in (params, outer_state.slow_params):
        assert np.isfinite(np.delete(tree["w"], [1, 2], -1)).all()
        assert np.isfinite(tree["b"]).all()
    _, without_decay = run(*counted(mix=mix), start, steps())
    for x in jax.tree.leaves(without_decay.outer_state):
        assert np.isfinite(x).all(), "one NaN would make a norm over all elements NaN"
    # As they move without the mask.
    free = {"w": np.where(np.isfinite(mask), mask, 0.0), "b": np.array(2.0)}
    others, _ = run(*counted(decay, mix=mix), free, steps())
    assert_close(others["b"], params["b"], 1e-14)
    keep = [0, 3, 4]
    assert_close(others["w"][:, keep], params["w"][:, keep], 1e-14)


def test_the_mean_does_not_overflow_where_the_sum_would():
    start = {"w": np.full(5, 2e38, "float32"), "b": np.float32(0)}
    init, cycle = counted(optax.sgd(1.0), delay=0, mix=0.0)
    batches = jax.tree.map(lambda x: np.zeros_like(x, "float32"), steps(cycles=1))
    params, _ = run(init, cycle, start, batches)
    assert_close(params, spread(start), 1e-6)


# What else a training loop needs.


def test_a_run_that_is_saved_between_cycles_continues_bit_for_bit(tmp_path):
    start, batches = problem()
    start = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), start)
    step = train_step_of(INNERS["adam"])
    init, cycle = delayed_outer_loop(step, NESTEROV, NAME, delay=2, mix=0.5)
    cycle = jax.jit(by_vmap(cycle))
    first = spread(start), jax.vmap(INNERS["adam"].init)(spread(start)), init(start)

    def go_on(carry, batches):
        for batch in batches:
            *carry, _ = cycle(*carry, batch)
        return carry

    expected = go_on(first, batches)
    carry = tuple(go_on(first, batches[:1]))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", carry)
    with ocp.StandardCheckpointer() as checkpointer:
        carry = checkpointer.restore(tmp_path / "checkpoint", carry)
    got = go_on(carry, batches[1:])
    for x, y in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        np.testing.assert_array_equal(bits(x), bits(y))


def test_its_state_can_be_pickled():
    init, _ = counted()
    state = init({"w": jnp.ones(5), "b": jnp.zeros([])})
    restored = pickle.loads(pickle.dumps(state))
    assert isinstance(restored, DelayedOuterState)
    assert_close(restored, state, 0)


def test_the_global_copy_can_be_donated_with_the_parameters():
    params = jnp.ones(3)
    init, _ = counted()
    assert init(params).slow_params is not params
    shapes = jax.eval_shape(init, params)
    assert shapes.slow_params.shape == (3,)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "complex64"])
def test_every_dtype_stays_whatever_the_mix_is(dtype):
    start = {"w": jnp.ones(5, dtype), "b": jnp.ones([], dtype)}
    batches = jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)), steps())
    for mix in (0.5, np.float64(0.5), jnp.float32(0.5)):
        params, outer_state = run(*counted(mix=mix), start, batches)
        assert shapes_and_dtypes(params) == shapes_and_dtypes(spread(start))
        assert shapes_and_dtypes(outer_state.slow_params) == shapes_and_dtypes(start)


def test_discrete_leaves_are_each_replicas_own(x64):
    start = {"w": np.ones(5), "b": np.array(2)}
    batches = steps() | {"b": np.arange(3 * R * K).reshape(3, R, K)}
    params, outer_state = run(*counted(), start, batches)
    np.testing.assert_array_equal(params["b"], 2 + batches["b"].sum((0, 2)))
    assert outer_state.slow_params["b"] == 2
    assert outer_state.outer_state[0].trace["b"] == optax.MaskedNode()


def test_mix_can_be_an_argument_of_the_compiled_program(x64):
    start, batches = {"w": np.ones(5), "b": np.array(2.0)}, steps()

    @jax.jit
    def by_mix(mix):
        return run(*counted(mix=mix), start, batches)

    for mix in (0.0, 0.3, 1.0):
        assert_close(by_mix(mix), run(*counted(mix=mix), start, batches), 1e-14)


def test_several_axes_are_averaged_over_together(x64):
    def train_step(params, state, batch):
        return params + batch, state, params

    init, cycle = delayed_outer_loop(
        train_step, optax.sgd(1.0), ("pod", NAME), delay=0, mix=0.0
    )
    axes = 0, 0, None, 0
    for name in (NAME, "pod"):
        cycle = jax.vmap(cycle, axes, axes, axis_name=name)
    batches = np.random.default_rng(0).normal(size=(2, 3, K, 5))
    params = jnp.zeros((2, 3, 5))
    params, _, outer_state, _ = cycle(
        params, jnp.zeros((2, 3)), init(params[0, 0]), batches
    )
    mean = batches.sum(2).mean((0, 1))
    np.testing.assert_allclose(outer_state.slow_params, mean)
    np.testing.assert_allclose(params, np.broadcast_to(mean, (2, 3, 5)))


def test_the_losses_come_back_in_the_order_of_the_steps():
    def train_step(params, state, batch):
        return params, state, {"batch": batch}

    for delay in range(K + 1):
        init, cycle = delayed_outer_loop(
            train_step, optax.sgd(1.0), NAME, delay=delay, mix=0.0
        )
        batches = jnp.arange(R * K).reshape(R, K)
        params = jnp.zeros(R)
        *_, metrics = by_vmap(cycle)(params, params, init(params[0]), batches)
        np.testing.assert_array_equal(metrics["batch"], batches)


# What is refused.


def make(**options):
    def train_step(params, state, batch):
        return params, state, None

    arguments = {"train_step": train_step, "outer": NESTEROV, "axis_name": NAME}
    return delayed_outer_loop(**arguments | {"delay": 1, "mix": 0.5} | options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"outer": 0.7},
            TypeError,
            "`outer` must be an Optax gradient transformation, got 0.7. Write for "
            "example `optax.sgd(0.7, momentum=0.9, nesterov=True)`.",
        ),
        (
            {"train_step": optax.adam(0.1)},
            TypeError,
            "`train_step` must be a function `(params, state, batch) -> (params, "
            "state, metrics)`, got GradientTransformationExtraArgs(",
        ),
        ({"train_step": None}, TypeError, "`train_step` must be a function"),
        (
            {"axis_name": 0},
            TypeError,
            "`axis_name` must be the name of an axis or a tuple of names, got 0. Write "
            "for example `delayed_outer_loop(train_step, outer, 'replica', ...)`.",
        ),
        *(
            (
                {"delay": delay},
                error,
                "`delay` must be a Python integer of at least 0, got "
                f"{delay!r}. Write the number of inner steps during the exchange, "
                "for example `delay=5`.",
            )
            for delay, error in [
                (-1, ValueError),
                (2.0, TypeError),
                (True, TypeError),
                (None, TypeError),
                (jnp.int32(2), TypeError),
            ]
        ),
        *(
            (
                {"mix": mix},
                error,
                f"`mix` must be a number in [0, 1], got {mix!r}. Write the weight of "
                "the local weights, for example `mix=0.5`; 0 takes the global copy "
                "alone.",
            )
            for mix, error in [
                (-0.1, ValueError),
                (1.5, ValueError),
                (float("nan"), ValueError),
                (True, TypeError),
                ("half", TypeError),
                (optax.constant_schedule, TypeError),
            ]
        ),
        (
            {"mix": np.ones(2)},
            ValueError,
            "`mix` must be a scalar, got an array of shape (2,).",
        ),
    ],
)
def test_a_bad_argument_is_refused(options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        make(**options)


@pytest.mark.parametrize(
    ("length", "message"),
    [
        (
            {"w": 1, "b": 1},
            "`delay` must be at most the number of inner steps in a cycle, got 2 where "
            "`batches` has 1. Write a shorter delay or pass the batches of a longer "
            "cycle.",
        ),
        ({"w": 4, "b": 3}, "on the first axis of every array, got shapes [(3,), (4,)]"),
        ({"w": 0, "b": 0}, "on the first axis of every array, got shapes [(0,), (0,)]"),
        ({}, "on the first axis of every array, got shapes []. Stack the batches"),
    ],
)
def test_batches_that_are_not_those_of_a_cycle_are_refused(length, message):
    init, cycle = make(delay=2)
    batches = {name: jnp.zeros((1, size)) for name, size in length.items()}
    params = jnp.zeros(1)
    with pytest.raises(ValueError, match=re.escape(message)):
        by_vmap(cycle)(params, params, init(params[0]), batches)


def test_a_batch_without_an_axis_of_steps_is_refused():
    init, cycle = make()
    zeros = jnp.zeros(1)
    with pytest.raises(ValueError, match=re.escape("of every array, got shapes [()]")):
        by_vmap(cycle)(zeros, zeros, init(zeros[0]), zeros)


@pytest.mark.parametrize("result", [2, 4, "list"])
def test_a_train_step_that_does_not_return_three_trees_is_refused(result):
    def train_step(params, state, batch):
        trees = params, state, None, None
        return list(trees[:3]) if result == "list" else trees[:result]

    init, cycle = make(train_step=train_step)
    zeros = jnp.zeros(1)
    message = "`train_step` must return a tuple (params, state, metrics), got "
    with pytest.raises(ValueError, match=re.escape(message)):
        by_vmap(cycle)(zeros, zeros, init(zeros[0]), jnp.zeros((1, 3)))


@pytest.mark.parametrize("wrong", ["outer", "lookahead"])
def test_a_state_of_another_optimizer_is_refused_as_outer_state(wrong):
    other = NESTEROV if wrong == "outer" else outer_loop(NESTEROV, NESTEROV, 2)
    _, cycle = make()
    zeros = jnp.zeros(1)
    message = "`outer_state` must be a `DelayedOuterState`, got a "
    with pytest.raises(TypeError, match=re.escape(message)):
        by_vmap(cycle)(zeros, zeros, other.init(zeros[0]), jnp.zeros((1, 3)))


def test_an_axis_that_is_not_mapped_is_refused():
    init, cycle = make()
    message = (
        "`axis_name` must be an axis that is mapped around `cycle`, got 'replica', "
        "which is not. Call `cycle` inside `jax.shard_map`"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        cycle(jnp.zeros([]), (), init(jnp.zeros([])), jnp.zeros(3))


def test_parameters_that_init_did_not_see_are_refused():
    init, cycle = make()
    message = "`params` must have the tree and the shapes that `init` saw, got no leaf"
    with pytest.raises(ValueError, match=re.escape(message)):
        by_vmap(cycle)({"v": jnp.zeros(1)}, (), init({"w": 0.0}), jnp.zeros((1, 3)))
    message = (
        "`params` must have the dtypes that `init` saw, got bfloat16 at ['w'], where "
        "the state has float32."
    )
    params = {"w": jnp.zeros(1, "bfloat16")}
    with pytest.raises(ValueError, match=re.escape(message)):
        by_vmap(cycle)(params, (), init({"w": jnp.zeros([])}), jnp.zeros((1, 3)))
    with pytest.raises(TypeError, match="`params` must be a tree of arrays, got 'w'"):
        init("w")


def test_an_outer_optimizer_that_returns_another_tree_is_refused():
    def update(updates, state, params=None):
        return (updates, updates), state

    outer = optax.GradientTransformation(optax.init_empty_state, update)

    def train_step(params, state, batch):
        return params + batch, state, None

    init, cycle = make(train_step=train_step, outer=outer)
    message = "`outer` must return updates with the tree that it is given"
    with pytest.raises(ValueError, match=re.escape(message)):
        by_vmap(cycle)(jnp.zeros(1), (), init(jnp.zeros([])), jnp.zeros((1, 3)))


def test_the_programs_on_the_page_train_and_are_the_loop_over_workers():
    page = run_block("many-workers-delayed")
    start = jax.tree.map(np.asarray, page["slow"])
    one = jax.jit(page["train_step"])

    def inner_step(theta, state, batch):
        theta, state, loss = one(theta, state or page["inner"].init(theta), batch)
        return jax.tree.map(np.asarray, theta), state, loss

    drawn = [Stack(page["batches"](number)) for number in range(15)]
    *_, (workers, phi, losses) = by_hand(inner_step, start, drawn, 4, 0.5, page["K"])
    assert losses.mean() < 0.5 * np.mean(np.sin(drawn[0].batches[0][..., :1]) ** 2)
    assert_close(page["evaluate_and_save"], phi, 1e-3)
    for r, worker in enumerate(workers):
        own = jax.tree.map(lambda x, r=r: x[r], page["params"])
        assert_close(own, worker, 1e-3)
    carry = page["params"], page["state"], page["outer_state"], page["batches"](15)
    expected = jax.jit(page["cycle_of_all"])(*carry)
    page = run_block("many-workers-delayed-shard-map", page)
    assert_close(jax.jit(page["cycle_of_all"])(*carry), expected, 1e-5)


class Stack:
    """Batches of a cycle, indexed by replica and step."""

    def __init__(self, batches):
        self.batches = batches

    def __getitem__(self, place):
        return jax.tree.map(lambda x: x[place], self.batches)
