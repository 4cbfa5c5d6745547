"""Do many workers that communicate once a cycle do what a loop over workers does?"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.compiling import as_shipped
from helpers.meshes import make_mesh
from helpers.rows import slow_but
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from messages import (
    BRANCHES,
    COLLECTIVE,
    INSTRUCTION,
    computations,
    messages,
    nbytes,
)

from optax_lookahead import (
    average_replicas,
    lookahead,
    outer_loop,
    replica_axes,
)

R, SIZE = 4, 8
TARGETS = np.random.default_rng(0).normal(size=(R, SIZE))
NAME = "replica"


# By hand: arrays with the replicas on the first axis, that change in loops.


def momentum(rate, decay=0.9):
    def step(g, memory):
        memory["m"] = g + decay * memory.get("m", 0.0)
        return -rate * memory["m"]

    return step


def adam(rate):
    def step(g, memory):
        t = memory["t"] = memory.get("t", 0) + 1
        memory["m"] = 0.9 * memory.get("m", 0.0) + 0.1 * g
        memory["v"] = 0.999 * memory.get("v", 0.0) + 0.001 * g**2
        m, v = memory["m"] / (1 - 0.9**t), memory["v"] / (1 - 0.999**t)
        return -rate * m / (np.sqrt(v) + 1e-8)

    return step


def nesterov(rate, decay):
    def step(g, memory):
        memory["m"] = g + decay * memory.get("m", 0.0)
        return -rate * (g + decay * memory["m"])

    return step


def plain(rate):
    return lambda g, memory: -rate * g


INNERS = {
    "adam": (optax.adam(0.1), adam(0.1)),
    "momentum": (optax.sgd(0.05, momentum=0.9), momentum(0.05)),
}
OUTERS = {
    "nesterov": (optax.sgd(0.7, momentum=0.9, nesterov=True), nesterov(0.7, 0.9)),
    "heavy ball": (optax.sgd(0.7, momentum=0.5), momentum(0.7, 0.5)),
    "plain": (optax.sgd(1.0), plain(1.0)),
}
NESTEROV = OUTERS["nesterov"][0]


def workers(inner, outer, k, steps, start):
    """Returns fast and slow weights of all replicas after every step."""
    theta, phi, memory, outer_memory, visited = start.copy(), start.copy(), {}, {}, []
    for i in range(1, steps + 1):
        theta = theta + inner(theta - TARGETS, memory)
        if i % k == 0:
            phi = phi + outer(phi - theta.mean(0), outer_memory)
            theta = phi.copy()
        visited.append((theta, phi))
    return visited


def averaged(inner, outer, k, **options):
    return outer_loop(inner, optax.chain(average_replicas(NAME), outer), k, **options)


def one_step(tx):
    def step(params, state, target):
        grads = jax.tree.map(lambda p: p - target, params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def stacked(tx, params):
    """Returns the state of replicas on a first axis, with one counter for all."""
    return jax.vmap(tx.init, out_axes=axes(tx, params))(params)


def alone(tx, params):
    return jax.eval_shape(tx.init, jax.tree.map(lambda p: p[0], params))


def axes(tx, params):
    return replica_axes(alone(tx, params))


def by_vmap(tx, params, mesh=None):
    where = axes(tx, params)
    spmd = {} if mesh is None else {"spmd_axis_name": NAME}
    return jax.vmap(one_step(tx), (0, where, 0), (0, where), axis_name=NAME, **spmd)


def by_pmap(tx, params, mesh=None):
    where = axes(tx, params)
    return jax.pmap(one_step(tx), NAME, in_axes=(0, where, 0), out_axes=(0, where))


def by_shard_map(tx, params, mesh, check_vma=True):
    where = axes(tx, params)
    specs = P(NAME), specification(where), P(NAME)
    return jax.shard_map(
        # Each replica's optimizer sees its own parameters, without an axis of replicas.
        jax.vmap(one_step(tx), (0, where, 0), (0, where)),
        mesh=mesh,
        in_specs=specs,
        out_specs=specs[:2],
        axis_names={NAME},
        check_vma=check_vma,
    )


def specification(where):
    return jax.tree.map(
        lambda axis: P() if axis is None else P(NAME),
        where,
        is_leaf=lambda axis: axis is None,
    )


MESHES = {"4": {NAME: R}, "4 x 2": {NAME: R, "fsdp": 2}}
FORMS = {
    "vmap": (by_vmap, None),
    "spmd vmap": (by_vmap, "4"),
    "spmd vmap, fsdp": (by_vmap, "4 x 2"),
    "shard_map": (by_shard_map, "4"),
    "shard_map, fsdp": (by_shard_map, "4 x 2"),
    "shard_map, unchecked": (functools.partial(by_shard_map, check_vma=False), "4"),
    "shard_map, fsdp, unchecked": (
        functools.partial(by_shard_map, check_vma=False),
        "4 x 2",
    ),
    "pmap": (by_pmap, None),
}


def placed(form, tx, params):
    """Returns the step in a form, with parameters and state in their places."""
    make, name = FORMS[form]
    state = stacked(tx, params)
    if name is None:
        step = make(tx, params)
        return step, params, state
    axes = MESHES[name]
    size = int(np.prod(list(axes.values())))
    mesh = make_mesh(axes, AxisType.Auto, jax.devices()[:size])

    def place(x, one):
        spec = P(*axes) if one.ndim else P(*list(axes)[: x.ndim])
        return jax.device_put(x, NamedSharding(mesh, spec))

    like = alone(tx, params)
    params = jax.tree.map(
        lambda x: place(x, jax.ShapeDtypeStruct(x.shape[1:], x.dtype)), params
    )
    state = jax.tree.map(place, state, like)
    return make(tx, params, mesh), params, state


def run(form, tx, start, steps, targets=TARGETS):
    step, params, state = placed(form, tx, {"w": jnp.asarray(start)})
    step, visited = step if form == "pmap" else jax.jit(step), []
    for _ in range(steps):
        params, state = step(params, state, jnp.asarray(targets))
        visited.append((np.asarray(params["w"]), np.asarray(state.slow_params["w"])))
    return visited, params, state


def assert_follows(visited, expected, k):
    for i, ((p, phi), (theta, slow)) in enumerate(zip(visited, expected, strict=True)):
        np.testing.assert_allclose(p, theta, rtol=1e-12, atol=1e-12)
        if (i + 1) % k == 0:
            np.testing.assert_allclose(phi, slow, rtol=1e-12, atol=1e-12)


START = np.tile(np.random.default_rng(1).normal(size=SIZE), (R, 1))


@pytest.mark.parametrize("k", slow_but([3], [1, 3, 7]))
@pytest.mark.parametrize("outer", OUTERS)
@pytest.mark.parametrize("inner", INNERS)
def test_replicas_match_a_loop_over_workers(x64, inner, outer, k):
    tx = averaged(INNERS[inner][0], OUTERS[outer][0], k)
    expected = workers(INNERS[inner][1], OUTERS[outer][1], k, 2 * k + 1, START)
    assert_follows(run("vmap", tx, START, 2 * k + 1)[0], expected, k)


@pytest.mark.parametrize(
    "form", slow_but(["shard_map, fsdp", "spmd vmap, fsdp"], list(FORMS))
)
def test_every_form_and_sharded_replicas_are_the_loop_over_workers(x64, form):
    tx = averaged(INNERS["adam"][0], NESTEROV, 3)
    expected = workers(INNERS["adam"][1], OUTERS["nesterov"][1], 3, 7, START)
    assert_follows(run(form, tx, START, 7)[0], expected, 3)


def compiled_text(form, tx, params):
    step, params, state = placed(form, tx, params)
    step = step if form == "pmap" else as_shipped(step)
    return step.lower(params, state, jnp.ones((R, 1))).compile().as_text()


def collectives(text):
    """Returns the bytes of each collective, by its computation, and the branches."""
    bodies, _ = computations(text)
    branches = {
        name
        for several, one in BRANCHES.findall(text)
        for name in (several.split(", ") if several else [one])
    }
    sent = {
        name: [
            nbytes(found["shape"])
            for found in map(INSTRUCTION.match, lines)
            if found and COLLECTIVE.fullmatch(found["op"])
        ]
        for name, lines in bodies.items()
    }
    return {name: sizes for name, sizes in sent.items() if sizes}, branches


@pytest.mark.parametrize(
    "form",
    slow_but(
        ["shard_map, fsdp", "spmd vmap, fsdp", "pmap"],
        [f for f in FORMS if f != "vmap"],
    ),
)
def test_replicas_communicate_in_one_branch_and_nowhere_else(form):
    if "shard_map, fsdp" in form and jax.__version_info__ < (0, 7):
        pytest.skip("JAX 0.6 gathers the parameters of a replica in every step there")
    params = {"w": jnp.asarray(np.tile(START, 16))}
    tx = averaged(optax.adam(0.1), NESTEROV, 3)
    found, branches = collectives(compiled_text(form, tx, params))
    assert found, "the measure sees the collective"
    # Of the parameters, and of the flags that say which replicas are healthy. The step
    # that does not sync has none.
    assert set(found) <= branches
    tx = outer_loop(optax.adam(0.1), NESTEROV, 3)
    without, _ = collectives(compiled_text(form, tx, params))
    assert not without


@pytest.mark.parametrize("fragments", [1, 2, 4])
def test_the_largest_message_shrinks_with_the_number_of_fragments(fragments):
    names = [f"w{i}" for i in range(fragments)]
    params = {name: jnp.ones((R, 4096 // fragments)) for name in names}
    tx = optax.partition(
        {name: averaged(optax.sgd(0.1), optax.sgd(1.0), 4) for name in names},
        {name: name for name in names},
    )
    text = compiled_text("spmd vmap", tx, params)
    found, branches = collectives(text)
    # One branch for each fragment, which has a counter of its own, and one in which a
    # number says how many replicas are healthy.
    assert len(found) == 2 * fragments
    assert set(found) <= branches
    # A float32 for each element.
    assert {sum(sizes) for sizes in found.values()} == {4, 4 * 4096 // fragments}
    sent = messages(text, R, lambda device: device)
    assert (sent.always, sent.in_branch) == (0, 4 * 4096 + 4 * fragments)


def test_averaging_adds_at_most_a_copy_and_a_half_of_temporaries():
    params = {f"w{i:02}": jnp.zeros((R, 1000)) for i in range(40)}
    temporaries = []
    for tx in (
        averaged(optax.sgd(0.1), NESTEROV, 3),
        outer_loop(optax.sgd(0.1), NESTEROV, 3),
    ):
        step = jax.vmap(
            lambda params, state, grads, tx=tx: tx.update(grads, state, params),
            (0, axes(tx, params), 0),
            (0, axes(tx, params)),
            axis_name=NAME,
        )
        step = as_shipped(jax.jit(step, donate_argnums=(1, 2)))
        compiled = step.lower(params, stacked(tx, params), params).compile()
        temporaries.append(compiled.memory_analysis().temp_size_in_bytes)
    # 1.9 in one branch, 1.3 in parts.
    assert temporaries[0] - temporaries[1] < 1.5 * R * 40 * 1000 * 4


@pytest.mark.parametrize(
    ("dtype", "slow_dtype", "bound"),
    [("bfloat16", None, 2e-2), ("float32", None, 1e-6), ("bfloat16", "float32", 2e-3)],
)
def test_over_a_thousand_syncs_replicas_differ_by_one_rounding(
    dtype, slow_dtype, bound
):
    tx = averaged(
        optax.sgd(0.05), optax.sgd(0.9, momentum=0.5), 1, slow_dtype=slow_dtype
    )
    params = jnp.asarray(START, dtype)
    state = stacked(tx, params)
    step = jax.vmap(
        one_step(tx), (0, axes(tx, params), 0), (0, axes(tx, params)), axis_name=NAME
    )
    targets = jnp.asarray(TARGETS, dtype)

    def body(carry, i):
        noise = jax.random.normal(jax.random.key(i), (R, SIZE), jnp.float32)
        carry = step(*carry, targets + noise.astype(dtype))
        return carry, carry[1].slow_params

    _, slow = jax.jit(lambda c: jax.lax.scan(body, c, jnp.arange(1000)))(
        (params, state)
    )
    slow = np.asarray(slow, np.float32)
    spread = np.max(slow.max(1) - slow.min(1), axis=1) / np.max(np.abs(slow))
    assert np.max(spread) < bound
    # And it does not grow.
    assert np.mean(spread[-100:]) < 3 * np.mean(spread[100:200]) + 1e-9


def test_replicas_that_start_from_different_weights_become_equal(x64):
    start = np.random.default_rng(2).normal(size=(R, SIZE))
    tx = averaged(optax.sgd(0.05), optax.sgd(0.7), 2)
    visited, _, _ = run("vmap", tx, start, 24)
    spread = [np.max(phi.max(0) - phi.min(0)) for _, phi in visited]
    assert spread[0] > 1.0
    np.testing.assert_allclose(spread[-1], spread[0] * 0.3**12, rtol=1e-6)


@pytest.mark.parametrize("slow_dtype", [None, "float32"])
def test_one_replica_is_the_outer_loop_bit_for_bit(slow_dtype):
    dtype = "float32" if slow_dtype is None else "bfloat16"
    params = jnp.asarray(START[:1], dtype)
    visited = []
    for tx in (
        averaged(optax.adam(0.1), NESTEROV, 2, slow_dtype=slow_dtype),
        outer_loop(optax.adam(0.1), NESTEROV, 2, slow_dtype=slow_dtype),
    ):
        step = jax.jit(by_vmap(tx, params))
        carry = params, stacked(tx, params)
        for _ in range(6):
            carry = step(*carry, jnp.asarray(TARGETS[:1], dtype))
        params_, state = carry
        visited.append((params_, state.slow_params, state.outer_state[-1]))
    jax.tree.map(
        np.testing.assert_array_equal,
        jax.tree.leaves(visited[0])[:2],
        jax.tree.leaves(visited[1])[:2],
    )


def with_broken_replicas(broken, bad, dtype, slow_dtype=None, steps=8):
    """Trains by the package and by hand; one element of `broken` breaks in step 3."""
    tx = averaged(
        optax.sgd(0.1), optax.sgd(0.7, momentum=0.5), 2, slow_dtype=slow_dtype
    )
    params = {"w": jnp.asarray(START, dtype)}
    state = stacked(tx, params)
    step = jax.jit(by_vmap(tx, params))
    theta, phi, m = START.copy(), START.copy(), np.zeros(SIZE)
    for i in range(1, steps + 1):
        targets = TARGETS.copy()
        if i == 3:
            targets[broken, 2] = bad
        params, state = step(params, state, jnp.asarray(targets, dtype))
        with np.errstate(all="ignore"):
            theta = theta - 0.1 * (theta - targets)
        if i % 2 == 0:
            healthy = np.isfinite(theta).all(1)
            mean = theta[healthy].mean(0) if healthy.any() else phi
            m = (phi - mean) + 0.5 * m
            # A broken replica's own element takes no step, its others do.
            ok = np.isfinite(theta)
            phi = np.where(ok, phi - 0.7 * m, phi)
            theta = np.where(ok, phi, theta)
        yield params, state, (theta, phi, m)
        if i == 6:  # the loop repairs its parameters
            ok = jnp.isfinite(params["w"])
            params = {"w": jnp.where(ok, params["w"], state.slow_params["w"])}
            theta = np.where(np.isfinite(theta), theta, phi)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("broken", [[1], [0, 3], [0, 1, 2, 3]], ids=str)
def test_a_replica_that_broke_is_left_out_whole(x64, bad, broken):
    for params, state, expected in with_broken_replicas(broken, bad, np.float64):
        theta, phi, m = expected
        np.testing.assert_allclose(params["w"], theta, rtol=1e-12)
        if state.steps_since_sync == 0:
            slow, trace = state.slow_params["w"], state.outer_state[1][0].trace["w"]
            np.testing.assert_allclose(slow, phi, rtol=1e-12)
            np.testing.assert_allclose(trace, m, rtol=1e-12, atol=1e-14)
            assert np.all(np.isfinite(slow))
    assert np.all(np.isfinite(params["w"]))


def test_wide_slow_weights_follow_the_healthy_replicas():
    runs = with_broken_replicas([1], np.nan, jnp.bfloat16, "float32")
    for params, state, (_, phi, _) in runs:  # noqa: B007
        assert np.all(np.isfinite(state.slow_params["w"]))
        if state.steps_since_sync == 0:
            healthy = np.asarray([0, 2, 3])
            slow = np.asarray(state.slow_params["w"])[healthy]
            np.testing.assert_allclose(slow, phi[healthy], rtol=0.05, atol=0.05)
    assert np.all(np.isfinite(np.asarray(params["w"], np.float32)))


@pytest.mark.parametrize("outer", [OUTERS["nesterov"][0], optax.adamw(0.1)])
def test_entries_that_are_infinite_by_design_break_no_replica(x64, outer):
    tx = averaged(optax.sgd(0.1), outer, 2)

    def train(start, targets):
        def step(params, state, target):
            grads = jnp.where(jnp.isfinite(params), params - target, 0.0)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        params = jnp.asarray(start)
        where = axes(tx, params)
        step = jax.jit(jax.vmap(step, (0, where, 0), (0, where), axis_name=NAME))
        state = stacked(tx, params)
        with jax.debug_nans(True):
            for _ in range(5):
                params, state = step(params, state, jnp.asarray(targets))
        return params, state.slow_params

    mask = np.arange(SIZE) == 3
    masked = train(np.where(mask, -np.inf, START), TARGETS)
    rest = train(START[:, ~mask], TARGETS[:, ~mask])
    for x, y in zip(masked, rest, strict=True):
        np.testing.assert_array_equal(x[:, mask], -np.inf)
        np.testing.assert_allclose(x[:, ~mask], y, rtol=1e-12)


WRAPPERS = {
    "apply_if_finite": lambda outer: optax.apply_if_finite(outer, 3),
    "conditionally_transform": lambda outer: optax.conditionally_transform(
        outer, lambda count: count >= 0
    ),
    "flatten": optax.flatten,
}


@pytest.mark.parametrize("bad", [0.0, np.nan])
@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_around_the_outer_chain_change_nothing(x64, name, bad):
    def train(wrapper):
        chain = optax.chain(average_replicas(NAME), NESTEROV)
        tx = outer_loop(optax.sgd(0.1), wrapper(chain), 2)
        params = {"w": jnp.asarray(START), "b": jnp.asarray(START[:, :1])}
        where = axes(tx, params)

        def step(params, state, target):
            grads = {"w": params["w"] - target, "b": params["b"] - target[:1]}
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        step = jax.jit(jax.vmap(step, (0, where, 0), (0, where), axis_name=NAME))
        state = stacked(tx, params)
        tree = jax.tree.structure(state)
        for i in range(5):
            targets = (
                TARGETS + np.where(i == 2, bad, 0.0) * (np.arange(R) == 1)[:, None]
            )
            params, state = step(params, state, jnp.asarray(targets))
        assert jax.tree.structure(state) == tree
        return state.slow_params

    expected, got = train(lambda outer: outer), train(WRAPPERS[name])
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-12), got, expected
    )
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(got))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_mean_does_not_overflow_where_the_sum_would(dtype):
    large = 0.9 * float(jnp.finfo(dtype).max)
    tx = averaged(optax.identity(), optax.sgd(1.0), 1)
    params = jnp.full((R, 2), large, dtype)
    step = by_vmap(tx, params)
    params, _ = step(params, stacked(tx, params), jnp.asarray(params))
    np.testing.assert_array_equal(params, jnp.full((R, 2), large, dtype))


def test_outside_an_outer_loop_it_is_refused_with_the_remedy():
    tx = optax.chain(average_replicas(NAME), optax.sgd(0.5))
    message = "`outer_loop(inner, optax.chain(average_replicas(axis_name), outer), k)`"
    with pytest.raises(ValueError, match=re.escape(message)):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)), jnp.ones(2))


def test_an_axis_that_is_not_mapped_is_refused_with_the_remedy():
    tx = averaged(optax.sgd(0.1), optax.sgd(1.0), 2)
    params = jnp.ones(2)
    with pytest.raises(ValueError, match=r"`axis_name` must be an axis that is mapped"):
        tx.update(params, tx.init(params), params)


@pytest.mark.parametrize("axis_name", [None, 0, (), ("a", 1), ["a"]])
def test_what_cannot_be_an_axis_name_is_refused(axis_name):
    with pytest.raises(TypeError, match="`axis_name` must be the name of an axis"):
        average_replicas(axis_name)


@pytest.mark.skipif(jax.__version_info__ < (0, 7), reason="JAX 0.6 does not show it")
def test_counters_that_may_differ_between_replicas_are_refused():
    tx = averaged(optax.sgd(0.1), optax.sgd(1.0), 2)
    mesh = make_mesh({NAME: R}, AxisType.Auto, jax.devices()[:R])
    state = tx.init(jnp.ones(2))

    def body(params, state, counter):
        state = state._replace(steps_since_sync=counter[0])
        return tx.update(params[0], state, params[0])[0][None]

    step = jax.shard_map(
        body, mesh=mesh, in_specs=(P(NAME), P(), P(NAME)), out_specs=P(NAME)
    )
    with pytest.raises(ValueError, match="must be the same on all replicas"):
        step(jnp.ones((R, 2)), state, jnp.zeros(R, jnp.int32))


def test_several_axes_are_averaged_over_together(x64):
    outer = optax.chain(average_replicas(("a", "b")), optax.sgd(1.0))
    tx = outer_loop(optax.sgd(0.1), outer, 1)
    start, targets = START.reshape(2, 2, SIZE), TARGETS.reshape(2, 2, SIZE)
    where = jax.tree.map(lambda x: 0 if x.ndim else None, tx.init(jnp.ones(SIZE)))
    step = one_step(tx)
    for name in "ba":
        step = jax.vmap(step, (0, where, 0), (0, where), axis_name=name)
    state = tx.init(jnp.asarray(START[0]))
    state = jax.tree.map(
        lambda x: jnp.broadcast_to(x, (2, 2, *x.shape)) if x.ndim else x, state
    )
    params, _ = step(jnp.asarray(start), state, jnp.asarray(targets))
    expected = (start - 0.1 * (start - targets)).mean((0, 1))
    np.testing.assert_allclose(
        params, np.broadcast_to(expected, start.shape), rtol=1e-12
    )


def test_some_parameters_can_differ_between_replicas(x64):
    outer = optax.partition(
        {
            "all": optax.chain(average_replicas(NAME), optax.sgd(1.0)),
            "own": optax.sgd(1.0),
        },
        {"shared": "all", "own": "own"},
    )
    tx = outer_loop(optax.sgd(0.1), outer, 2)
    params = {"shared": jnp.asarray(START), "own": jnp.asarray(START)}
    step, carry = by_vmap(tx, params), (params, stacked(tx, params))
    for _ in range(2):
        carry = step(*carry, jnp.asarray(TARGETS))
    params, _ = carry
    own = TARGETS + 0.81 * (START - TARGETS)
    np.testing.assert_allclose(params["own"], own, rtol=1e-12)
    np.testing.assert_allclose(
        params["shared"], np.tile(own.mean(0), (R, 1)), rtol=1e-12
    )


INSIDE = {
    "reset": {"inner": optax.adam(0.1), "inner_state": "reset"},
    "a function": {"inner": optax.adam(0.1), "inner_state": lambda state, fresh: fresh},
    "lookahead": {"inner": lookahead(optax.sgd(0.1), 2, 0.5)},
    "MultiSteps": {
        "inner": optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation()
    },
}


@pytest.mark.parametrize("name", INSIDE)
def test_it_averages_the_weights_that_replicas_alone_would_reach(x64, name):
    options = dict(INSIDE[name])
    inner = options.pop("inner")
    tx = averaged(inner, optax.sgd(1.0), 4, **options)
    visited, _, state = run("vmap", tx, START, 4)
    inner = optax.with_extra_args_support(inner)
    ends = []
    for start, target in zip(START, TARGETS, strict=True):
        p, s = jnp.asarray(start), inner.init(jnp.asarray(start))
        for _ in range(4):
            u, s = inner.update(p - target, s, p)
            p = optax.apply_updates(p, u)
        ends.append(p)
    mean = np.tile(np.mean(ends, 0), (R, 1))
    np.testing.assert_allclose(visited[-1][0], mean, rtol=1e-12, atol=1e-12)
    if name in ("reset", "a function"):
        assert all(not np.any(x) for x in jax.tree.leaves(state.fast_state))


def test_complex_weights_are_averaged_and_discrete_ones_are_not(x64):
    tx = averaged(optax.sgd(0.5), optax.sgd(1.0), 1)
    params = {
        "z": jnp.asarray(START[:, :2] + 1j * START[:, 2:4]),
        "n": jnp.arange(R),
    }
    state = stacked(tx, params)
    where = axes(tx, params)

    def step(params, state, target):
        grads = {"z": params["z"] - target, "n": jnp.zeros_like(params["n"])}
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    # `count` is a scalar on each replica, and a parameter, not a counter.
    where = where._replace(slow_params={"z": 0, "n": 0})
    state = state._replace(slow_params={**state.slow_params, "n": jnp.arange(R)})
    step = jax.vmap(step, (0, where, 0), (0, where), axis_name=NAME)
    target = TARGETS[:, :2] + 1j * TARGETS[:, 2:4]
    new, state = step(params, state, jnp.asarray(target))
    mean = (params["z"] - 0.5 * (params["z"] - target)).mean(0)
    np.testing.assert_allclose(new["z"], np.tile(mean, (R, 1)), rtol=1e-12)
    np.testing.assert_array_equal(new["n"], np.arange(R))
    np.testing.assert_array_equal(state.slow_params["n"], np.arange(R))
