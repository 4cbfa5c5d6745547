"""Do slow weights in the host's memory stay there, with the same values?"""

import functools
import pickle
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import transformer
from helpers.meshes import make_mesh
from helpers.reference import adamw, lookahead as reference_lookahead
from helpers.rows import slow_but
from helpers.training import scanned, trajectory, two_loops_with_outer
from helpers.trees import assert_close
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from optax_lookahead import (
    average_replicas,
    lookahead,
    outer_loop,
    replica_axes,
    set_slow_params,
    slow_params,
    with_inner_state,
)

if not hasattr(jax, "memory"):
    pytest.skip(
        "JAX 0.6 has no `jax.memory`; that is refused is in test_validation",
        allow_module_level=True,
    )

ON_HOST = {"slow_memory_kind": "pinned_host"}
AUTO = AxisType.Auto
NESTEROV = optax.sgd(0.7, momentum=0.9, nesterov=True)
ADAM = optax.adamw(1e-2)
# Of 0 to 3 axes, in three dtypes, one of them discrete.
PARAMS = {
    "temperature": jnp.float32(2.0),
    "bias": jnp.array([1.0, -2.0, 0.5], jnp.bfloat16),
    "matrix": jnp.arange(6.0).reshape(2, 3),
    "heads": jnp.linspace(-1.0, 1.0, 8, dtype=jnp.bfloat16).reshape(2, 2, 2),
    "count": jnp.array([3, 4]),
}
FLOATS = {name: p for name, p in PARAMS.items() if name != "count"}


def gradient(params, step):
    """Returns a gradient that differs from step to step, of the parameters' dtypes."""

    def leaf(p):
        if not jnp.issubdtype(p.dtype, jnp.inexact):
            return jnp.ones_like(p)
        return (0.5 * p + jnp.cos(step)).astype(p.dtype)

    return jax.tree.map(leaf, params)


def memory_kinds(tree):
    return {x.sharding.memory_kind for x in jax.tree.leaves(tree)}


def assert_same(got, expected, tolerance=0.0):
    """Fails unless two runs agree to a tolerance, or in every bit and NaN.

    Compiled in another program a step may round otherwise. Of bfloat16 that is 2^-8.
    """

    def leaf(x, y):
        rtol = 2**-7 if x.dtype == jnp.bfloat16 else tolerance
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        if tolerance:
            atol = rtol * np.max(np.abs(y), initial=0.0)
            np.testing.assert_allclose(x, y, rtol, atol)
        else:
            np.testing.assert_array_equal(x, y)

    jax.tree.map(leaf, got, expected)


FORMS = {
    "lookahead": functools.partial(lookahead, ADAM, 3, 0.5),
    "every step a cycle": functools.partial(lookahead, ADAM, 1, 0.5),
    "a cycle of two steps": functools.partial(lookahead, ADAM, 2, 0.5),
    "scheduled alpha": functools.partial(lookahead, ADAM, 3, lambda t: 1.0 / (t + 1.0)),
    "float32 slow weights": functools.partial(
        lookahead, ADAM, 3, 0.5, slow_dtype="float32"
    ),
    "interpolated moments": functools.partial(
        lookahead, ADAM, 3, 0.5, inner_state="interpolate"
    ),
    "reset": functools.partial(lookahead, ADAM, 3, 0.5, inner_state="reset"),
    # Its state holds the parameters that it began with.
    "reset of schedule-free": functools.partial(
        lookahead, optax.contrib.schedule_free_sgd(0.1), 3, inner_state="reset"
    ),
    "reset, float32": functools.partial(
        lookahead,
        optax.contrib.schedule_free_sgd(0.1),
        3,
        inner_state="reset",
        slow_dtype="float32",
    ),
    "a function": functools.partial(
        lookahead, ADAM, 3, inner_state=lambda old, new: old
    ),
    "two levels": lambda **kind: lookahead(lookahead(ADAM, 2, **kind), 4, **kind),
    "outer step": functools.partial(outer_loop, ADAM, NESTEROV, 3),
    "outer step, every step": functools.partial(outer_loop, ADAM, NESTEROV, 1),
    "outer step, float32": functools.partial(
        outer_loop, ADAM, NESTEROV, 3, slow_dtype="float32"
    ),
    "outer step, reset": functools.partial(
        outer_loop, optax.sgd(0.1, momentum=0.9), NESTEROV, 3, inner_state="reset"
    ),
}
SHOWN = ["lookahead", "float32 slow weights", "outer step, float32"]


@pytest.mark.parametrize("form", slow_but(SHOWN, list(FORMS)))
def test_every_bit_is_that_of_slow_weights_on_the_device(form):
    # Adam's moments of a discrete parameter become floats in the first update.
    params = PARAMS if "reset" not in form else FLOATS
    here = trajectory(FORMS[form](), params, gradient, 7)
    there = trajectory(FORMS[form](**ON_HOST), params, gradient, 7)
    for got, expected in zip(there, here, strict=True):
        assert_same(got, expected)
        state = got[1]
        assert memory_kinds(state.slow_params) == {"pinned_host"}
        assert memory_kinds((state.outer_state, state.anchor)) <= {"device"}


@pytest.mark.parametrize("form", slow_but(SHOWN, list(FORMS)))
def test_a_compiled_step_keeps_them_there_too(form):
    params = PARAMS if "reset" not in form else FLOATS
    here = trajectory(FORMS[form](), params, gradient, 7, jax.jit)
    there = trajectory(FORMS[form](**ON_HOST), params, gradient, 7, jax.jit)
    for got, expected in zip(there, here, strict=True):
        assert_same(got, expected, 2e-5)
        assert memory_kinds(got[1].slow_params) == {"pinned_host"}


def test_lookahead_in_host_memory_is_algorithm_1():
    phi = np.array([[1.0, -2.0], [0.5, 3.0]], np.float32)
    expected = reference_lookahead(
        adamw(0.1), lambda theta, step: 0.5 * theta, phi, 3, lambda t: 0.5, 3
    )
    tx = lookahead(optax.adam(0.1), 3, 0.5, **ON_HOST)
    visited = trajectory(tx, jnp.asarray(phi), lambda p, _: 0.5 * p, 9, jax.jit)
    for (params, state), (theta, slow) in zip(visited, expected, strict=True):
        assert_close(params, theta, 1e-5)
        assert_close(slow_params(state, params), slow, 1e-5)


def test_outer_loop_in_host_memory_is_two_plain_loops():
    start = jnp.array([4.0, -2.0])
    expected = two_loops_with_outer(
        optax.adam(0.1), NESTEROV, start, lambda p, _: p, 3, 9
    )
    tx = outer_loop(optax.adam(0.1), NESTEROV, 3, **ON_HOST)
    visited = trajectory(tx, start, lambda p, _: p, 9, jax.jit)
    for (params, state), (fast, slow, _) in zip(visited, expected, strict=True):
        assert_close(params, fast, 1e-5)
        assert_close(slow_params(state, params), slow, 1e-5)


@pytest.mark.parametrize("make", [FORMS["lookahead"], FORMS["outer step"]])
@pytest.mark.parametrize("poisoned", slow_but([5], range(8)))
def test_what_is_not_finite_stays_out_as_on_the_device(make, poisoned):
    def broken(params, step):
        grads = gradient(params, step)
        bad = jnp.array([[1.0, jnp.nan, jnp.inf]])
        return grads | {"matrix": jnp.where(step == poisoned, bad, grads["matrix"])}

    here = trajectory(make(), FLOATS, broken, 8)
    there = trajectory(make(**ON_HOST), FLOATS, broken, 8)
    for got, expected in zip(there, here, strict=True):
        assert_same(got, expected)
        slow = slow_params(got[1], got[0])
        assert_same(slow, slow_params(expected[1], expected[0]))
        chex.assert_tree_all_finite(slow)
    assert not np.all(np.isfinite(there[poisoned][0]["matrix"]))


@pytest.mark.parametrize("step", slow_but([0], range(4)))
def test_a_cycle_starts_from_weights_that_the_loop_overwrites(step):
    ended = []
    for kind in ({}, ON_HOST):
        tx = lookahead(ADAM, 3, 0.5, **kind)
        params, state = FLOATS, tx.init(FLOATS)
        for i in range(7):
            if i == step:
                params = params | {"matrix": jnp.full((2, 3), 9.0)}
            updates, state = tx.update(gradient(params, i), state, params)
            params = optax.apply_updates(params, updates)
        ended.append((params, state))
    assert_same(*ended)


def test_a_traced_period_is_allowed():
    @jax.jit
    def run(k):
        tx = lookahead(ADAM, k, 0.5, **ON_HOST)
        return scanned(tx, FLOATS, gradient, 7)[0]

    for k in (1, 3):
        expected = trajectory(lookahead(ADAM, k, 0.5), FLOATS, gradient, 7, jax.jit)
        last = jax.tree.map(lambda x: x[-1], run(k))
        assert_same(last, expected[-1][0], 1e-5)


def train_step(tx):
    def step(params, state, tokens):
        grads = jax.grad(transformer.loss_fn)(params, tokens)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def model():
    return transformer.init_params(jax.random.key(0)), transformer.tokens(
        jax.random.key(1), 4
    )


ORDERS = ["params, state", "state, params"]


@pytest.mark.parametrize("order", slow_but(ORDERS[1:], ORDERS))
@pytest.mark.parametrize("donated", slow_but([(0, 1)], [(0,), (1,), (0, 1)]))
def test_donation_with_shardings_in_and_out_keeps_each_in_its_memory(order, donated):
    params, tokens = model()
    tx = lookahead(ADAM, 2, 0.5, **ON_HOST)
    state, here = tx.init(params), lookahead(ADAM, 2, 0.5)
    expected = trajectory(
        here,
        params,
        lambda p, _: jax.grad(transformer.loss_fn)(p, tokens),
        5,
        jax.jit,
    )

    def turned(both):
        return both if order == "params, state" else both[::-1]

    def step(params, state):
        return turned(train_step(tx)(params, state, tokens))

    # Without both JAX may give an output of one memory the buffer of the other.
    shardings = jax.tree.map(lambda x: x.sharding, (params, state))
    step = jax.jit(
        step,
        in_shardings=shardings,
        out_shardings=turned(shardings),
        donate_argnums=donated,
    )
    params = jax.tree.map(jnp.copy, params)
    for _ in range(5):
        params, state = turned(step(params, state))
    assert memory_kinds(state.slow_params) == {"pinned_host"}
    assert memory_kinds((params, state.fast_state)) == {"device"}
    assert_close(params, expected[-1][0], 1e-5)


def test_a_scan_that_is_donated_to_keeps_them_there():
    params, tokens = model()
    tx = lookahead(ADAM, 3, 0.5, **ON_HOST)

    @functools.partial(jax.jit, donate_argnums=0)
    def run(carry):
        def step(carry, _):
            return train_step(tx)(*carry, tokens), None

        return jax.lax.scan(step, carry, length=7)[0]

    _, state = run((jax.tree.map(jnp.copy, params), tx.init(params)))
    assert memory_kinds(state.slow_params) == {"pinned_host"}


WRAPPERS = {
    "chain": lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
    "masked": lambda tx: optax.masked(tx, {n: n != "bias" for n in FLOATS}),
    "partition": lambda tx: optax.partition(
        {"slow": tx, "plain": optax.sgd(0.1)},
        {n: "plain" if n == "bias" else "slow" for n in FLOATS},
    ),
    "flatten": optax.flatten,
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "conditionally_transform": lambda tx: optax.conditionally_transform(
        tx, lambda step, **_: step % 2 == 0
    ),
    "with_extra_args_support": optax.with_extra_args_support,
}


@pytest.mark.parametrize("name", slow_but(["chain", "flatten"], list(WRAPPERS)))
def test_wrappers_keep_them_there_and_slow_params_reads_them(name):
    wrap, visited = WRAPPERS[name], []
    start = optax.tree.cast(FLOATS, jnp.float32)  # `flatten` makes one vector of them
    for kind in ({}, ON_HOST):
        tx = wrap(lookahead(ADAM, 3, 0.5, **kind))
        visited.append(trajectory(tx, start, gradient, 7, jax.jit)[-1])
    (here, here_state), (there, there_state) = visited
    assert_close(there, here, 1e-6)
    on_host = [
        x
        for x in jax.tree.leaves(there_state)
        if x.sharding.memory_kind == "pinned_host"
    ]
    assert sum(x.size for x in on_host) >= 12
    slow = slow_params(there_state, there)
    assert_close(slow, slow_params(here_state, here), 1e-6)
    assert memory_kinds(slow) == {"device"}


def test_under_inject_hyperparams_it_is_a_plain_argument():
    make = optax.inject_hyperparams(lookahead, static_args=("inner",))
    tx = make(ADAM, k=2, alpha=0.5, **ON_HOST)
    _, state = trajectory(tx, FLOATS, gradient, 3, jax.jit)[-1]
    assert memory_kinds(state.inner_state.slow_params) == {"pinned_host"}


def test_accumulation_goes_inside_since_optax_selects_the_state_outside():
    k, every = 2, 3
    inside = optax.MultiSteps(optax.sgd(0.1), every).gradient_transformation()
    tx = lookahead(inside, k * every, 0.5, **ON_HOST)
    there, state = trajectory(tx, FLOATS, gradient, 14, jax.jit)[-1]
    assert memory_kinds(state.slow_params) == {"pinned_host"}
    outside = optax.MultiSteps(lookahead(optax.sgd(0.1), k, 0.5), every)
    here, _ = trajectory(
        outside.gradient_transformation(), FLOATS, gradient, 14, jax.jit
    )[-1]
    assert_close(
        optax.tree.cast(there, jnp.float32), optax.tree.cast(here, jnp.float32), 1e-2
    )
    refused = optax.MultiSteps(lookahead(ADAM, k, **ON_HOST), every)
    with pytest.raises(TypeError, match=r"slow_params.*host"):
        refused.update(FLOATS, refused.init(FLOATS), FLOATS)


def mapped(step, axes, mapping):
    """Returns the step of two replicas, and where parameters and state are."""
    if mapping == "vmap":
        return jax.vmap(step, (0, axes, 0), (0, axes), axis_name="replica"), None
    mesh = make_mesh({"replica": 2}, AUTO, jax.devices()[:2])
    own, shared = PartitionSpec("replica"), PartitionSpec()
    spec = jax.tree.map(
        lambda axis: shared if axis is None else own,
        axes,
        is_leaf=lambda axis: axis is None,
    )
    step = jax.shard_map(
        jax.vmap(step, (0, axes, 0), (0, axes)),
        mesh=mesh,
        in_specs=(own, spec, own),
        out_specs=(own, spec),
    )
    return step, jax.tree.map(functools.partial(NamedSharding, mesh), (own, spec))


@pytest.mark.parametrize("mapping", slow_but(["vmap"], ["vmap", "shard_map"]))
def test_averaged_replicas_with_one_counter_are_those_on_the_device(mapping):
    one, tokens = model()
    outer = optax.chain(average_replicas("replica"), NESTEROV)
    tokens, ended = jnp.stack([tokens, tokens[::-1]]), []
    for kind in ({}, ON_HOST):
        tx = outer_loop(ADAM, outer, 2, **kind)
        params = jax.tree.map(lambda x: jnp.stack([x, 1.1 * x]), one)
        axes = replica_axes(jax.eval_shape(tx.init, one))
        state = jax.vmap(tx.init, out_axes=axes)(params)
        step, shardings = mapped(train_step(tx), axes, mapping)
        if shardings:
            params = jax.device_put(params, shardings[0])
            state = jax.tree.map(
                lambda x, sharding: jax.device_put(
                    x, sharding.with_memory_kind(x.sharding.memory_kind)
                ),
                state,
                shardings[1],
            )
        step = jax.jit(step)
        for _ in range(5):
            params, state = step(params, state, tokens)
        ended.append((params, state))
    assert_close(ended[1][0], ended[0][0], 1e-5)
    assert memory_kinds(ended[1][1].slow_params) == {"pinned_host"}


def test_their_shardings_are_those_of_the_parameters():
    mesh = make_mesh({"fsdp": 2}, AUTO, jax.devices()[:2])
    split = NamedSharding(mesh, PartitionSpec("fsdp"))
    params = {"w": jax.device_put(jnp.ones((4, 3)), split)}
    tx = lookahead(ADAM, 2, **ON_HOST)
    states = [tx.init(params), jax.jit(tx.init)(params)]
    update = jax.jit(tx.update)
    states.append(update(params, states[0], params)[1])
    states.append(update(params, states[-1], params)[1])
    wanted = split.with_memory_kind("pinned_host")
    for state in states:
        assert state.slow_params["w"].sharding.is_equivalent_to(wanted, 2)
        assert state.slow_params["w"].sharding.memory_kind == "pinned_host"
    abstract = tx.init({"w": jax.ShapeDtypeStruct((4, 3), jnp.float32, sharding=split)})
    assert abstract.slow_params["w"].sharding == wanted
    assert jax.eval_shape(tx.init, params).slow_params["w"].shape == (4, 3)


@pytest.mark.parametrize("saved", [{}, ON_HOST])
@pytest.mark.parametrize("restored", [{}, ON_HOST])
def test_a_run_may_go_on_with_its_slow_weights_in_the_other_memory(saved, restored):
    first, second = (lookahead(ADAM, 3, 0.5, **kind) for kind in (saved, restored))
    expected = trajectory(lookahead(ADAM, 3, 0.5), FLOATS, gradient, 8, jax.jit)
    for broken_off in (2, 3, 4):
        params, state = trajectory(first, FLOATS, gradient, broken_off, jax.jit)[-1]
        for go_on in (state, pickle.loads(pickle.dumps(state))):
            p, s = params, go_on
            for i in range(broken_off, 8):
                updates, s = jax.jit(second.update)(gradient(p, i), s, p)
                p = optax.apply_updates(p, updates)
            assert_same(p, expected[-1][0], 1e-6)
            kind = "pinned_host" if restored else "device"
            assert memory_kinds(s.slow_params) == {kind}


def test_an_orbax_checkpoint_keeps_the_memory(tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint", reason="it writes the checkpoint")
    tx = lookahead(ADAM, 3, 0.5, **ON_HOST)
    params, state = trajectory(tx, FLOATS, gradient, 4, jax.jit)[-1]
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "c", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "c", tx.init(params))
    assert memory_kinds(restored.slow_params) == {"pinned_host"}
    assert_same(restored, state)


def test_changing_the_state_by_other_means_leaves_them_there():
    tx = lookahead(ADAM, 3, 0.5, **ON_HOST)
    params, state = trajectory(tx, FLOATS, gradient, 2, jax.jit)[-1]
    state = set_slow_params(state, {"matrix": jnp.full((2, 3), 7.0)})
    assert memory_kinds(state.slow_params) == {"pinned_host"}
    np.testing.assert_array_equal(slow_params(state, params)["matrix"], 7.0)
    state = with_inner_state(tx, state, ADAM.init(params))
    assert memory_kinds(state.slow_params) == {"pinned_host"}
    tx.update(FLOATS, state, params)


@pytest.mark.parametrize("outer", [None, NESTEROV], ids=["lookahead", "outer_loop"])
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_random_keys_among_the_parameters_stay_on_the_device(outer, transform):
    def make(**options):
        if outer is None:
            return lookahead(optax.sgd(0.1), 3, **options)
        return outer_loop(optax.sgd(0.1), outer, 3, **options)

    params = {"matrix": PARAMS["matrix"], "key": jax.random.key(0)}

    def run(tx):
        now, state = params, tx.init(params)
        for step in range(4):
            grads = {"matrix": now["matrix"] + step, "key": None}
            updates, state = transform(tx.update)(grads, state, now)
            now = now | {"matrix": now["matrix"] + updates["matrix"]}
        return now, state

    now, state = run(make(**ON_HOST))
    assert memory_kinds(state.slow_params["matrix"]) == {"pinned_host"}
    slow = slow_params(state, now)
    assert slow["key"] == params["key"]
    expected, other = run(make())
    matrix = slow_params(other, expected)["matrix"]
    np.testing.assert_allclose(slow["matrix"], matrix, rtol=2e-5)
    np.testing.assert_allclose(now["matrix"], expected["matrix"], rtol=2e-5)


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_a_stack_of_cycles_is_refused(transform):
    def run(k):
        tx = lookahead(ADAM, k, **ON_HOST)
        return tx.update(FLOATS, tx.init(FLOATS), FLOATS)[0]

    with pytest.raises(ValueError, match=r"`slow_memory_kind` must be None.*2 cycles"):
        jax.vmap(transform(run))(jnp.array([2, 3]))


def test_a_vmap_over_alpha_is_allowed():
    def run(alpha):
        tx = lookahead(ADAM, 2, alpha, **ON_HOST)
        return scanned(tx, FLOATS, gradient, 3)[0]["matrix"][-1]

    got = jax.jit(jax.vmap(run))(jnp.array([0.0, 1.0]))
    for alpha, result in zip((0.0, 1.0), got, strict=True):
        np.testing.assert_allclose(result, run(alpha), rtol=1e-5)


def loops_and_copies(tx):
    """Returns how many copies between memories a step has in loops and outside."""
    params, tokens = model()
    step = jax.make_jaxpr(train_step(tx))(params, tx.init(params), tokens)
    found = {True: 0, False: 0}

    def walk(jaxpr, in_loop):
        for eqn in jaxpr.eqns:
            if str(eqn.primitive) == "device_put":
                found[in_loop] += 1
            for value in eqn.params.values():
                for x in value if isinstance(value, tuple | list) else (value,):
                    inside = getattr(x, "jaxpr", x)
                    if hasattr(inside, "eqns"):
                        walk(inside, in_loop or str(eqn.primitive) == "while")

    walk(step.jaxpr, False)
    return found


@pytest.mark.parametrize("form", ["lookahead", "outer step"])
def test_all_copies_between_the_memories_are_in_loops(form):
    leaves = len(jax.tree.leaves(model()[0]))
    assert loops_and_copies(FORMS[form]()) == {True: 0, False: 0}
    # A read and a write of each; a state that rests elsewhere would have one outside.
    assert loops_and_copies(FORMS[form](**ON_HOST)) == {True: 2 * leaves, False: 0}


def test_devices_without_that_memory_are_named(monkeypatch):
    class Memory:
        kind = "unpinned_host"

    class Device:
        id = 0

        def addressable_memories(self):
            return [Memory()]

        def __repr__(self):
            return "OldDevice(id=0)"

    monkeypatch.setattr(type(jnp.ones(1)), "devices", lambda self: {Device()})
    message = r"`slow_memory_kind`.*\['w'\] is on OldDevice.*\['unpinned_host'\]"
    with pytest.raises(ValueError, match=message):
        lookahead(ADAM, **ON_HOST).init({"w": jnp.ones(2)})


@pytest.mark.parametrize("kind", ["device", "host", "unpinned_host", 5, True])
@pytest.mark.parametrize("make", [FORMS["lookahead"], FORMS["outer step"]])
def test_other_kinds_are_refused(make, kind):
    rule = re.escape(f"`slow_memory_kind` must be 'pinned_host' or None, got {kind!r}")
    with pytest.raises(ValueError, match=rule):
        make(slow_memory_kind=kind)
