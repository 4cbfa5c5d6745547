"""Is training on many devices the same training, with the slow weights in place?

Steps are compared with one device, compiled programs with the inner optimizer's.
That every inner optimizer keeps types with shardings is in `test_optax_conformance.py`.
"""

import collections
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.compiling import as_shipped
from helpers.meshes import make_mesh, reshard, use_mesh
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from optax_lookahead import lookahead, outer_loop, slow_params

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
K, STEPS = 3, 9
TX = lookahead(optax.adam(0.05), K, 0.4)
SHAPES = {"w1": (8, 16), "b1": (16,), "w2": (16, 8), "b2": (8,)}
LAYOUTS = {
    "data parallel": ({"data": 8}, dict.fromkeys(SHAPES, P())),
    "fully sharded": ({"data": 8}, dict.fromkeys(SHAPES, P("data"))),
    "two axes": (
        {"data": 4, "model": 2},
        {
            "w1": P("data", "model"),
            "b1": P("model"),
            "w2": P("model", "data"),
            "b2": P("data"),
        },
    ),
}
every_layout = pytest.mark.parametrize("layout", LAYOUTS)
every_type = pytest.mark.parametrize("axis_type", [AUTO, EXPLICIT], ids=str)


def lay_out(layout, axis_type):
    """Returns a mesh and the shardings of the parameters on it."""
    axes, specs = LAYOUTS[layout]
    mesh = make_mesh(axes, axis_type)
    return mesh, {name: NamedSharding(mesh, spec) for name, spec in specs.items()}


def initial_params():
    rng = np.random.default_rng(0)
    return {
        name: jnp.asarray(rng.normal(scale=0.5, size=shape), jnp.float32)
        for name, shape in SHAPES.items()
    }


def batches():
    rng = np.random.default_rng(1)
    return [np.float32(rng.normal(size=(2, 32, 8))) for _ in range(STEPS)]


def loss(params, batch, out_sharding=None):
    x, y = batch
    hidden = jnp.tanh(x @ params["w1"] + params["b1"][None])
    out = jnp.dot(hidden, params["w2"], out_sharding=out_sharding)
    return jnp.mean((out + params["b2"][None] - y) ** 2)


def explicit_loss(shardings):
    """Returns the loss with the gathers that explicit axes require."""
    mesh = shardings["w1"].mesh

    def gathered(sharding):
        kept = (None if axis == "data" else axis for axis in sharding.spec)
        return NamedSharding(mesh, P(*kept))

    def fn(params, batch):
        params = jax.tree.map(reshard, params, jax.tree.map(gathered, shardings))
        return loss(params, batch, NamedSharding(mesh, P("data", None)))

    return fn


def train_step(gradient):
    def step(params, state, batch):
        updates, state = TX.update(gradient(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    return step


def train(step, params, state, batches):
    """Returns parameters and state at the start and after every step."""
    visited = [(params, state)]
    for batch in batches:
        # One at a time: queued collectives of virtual CPU devices can deadlock.
        visited.append(jax.block_until_ready(step(*visited[-1], batch)))
    return visited


@functools.cache
def one_device():
    params = initial_params()
    step = jax.jit(train_step(jax.grad(loss)))
    return train(step, params, TX.init(params), batches())


def assert_close(got, expected):
    """Compares up to the roundings of sums in another order, of the largest entry."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        atol = 64 * np.finfo(np.float32).eps * np.max(np.abs(y))
        np.testing.assert_allclose(x, y, rtol=0, atol=atol)


def assert_sharded_alike(tree, like):
    for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(like), strict=True):
        assert x.sharding.is_equivalent_to(getattr(y, "sharding", y), x.ndim)


@every_type
@every_layout
def test_a_run_on_a_mesh_is_the_run_on_one_device(layout, axis_type):
    mesh, shardings = lay_out(layout, axis_type)
    explicit = axis_type == EXPLICIT
    gradient = jax.grad(explicit_loss(shardings) if explicit else loss)
    with use_mesh(mesh):
        params = jax.device_put(initial_params(), shardings)
        on_mesh = jax.device_put(batches(), NamedSharding(mesh, P(None, "data")))
        # Without `out_shardings`, which would repair a wrong sharding.
        step = jax.jit(train_step(gradient))
        visited = train(step, params, TX.init(params), on_mesh)
        for params, state in visited:
            assert_sharded_alike(params, shardings)
            assert_sharded_alike(state.slow_params, shardings)
            assert_sharded_alike(slow_params(state, params), shardings)
    assert state.sync_count == STEPS // K
    for got, expected in zip(visited, one_device(), strict=True):
        assert_close(got, expected)


def local_gradient(params, batch):
    return jax.lax.pmean(jax.grad(loss)(params, batch), "data")


def global_gradient(params, batch):
    return jax.grad(lambda params: jax.lax.pmean(loss(params, batch), "data"))(params)


def test_every_replica_of_a_pmapped_run_is_the_run_on_one_device():
    step = jax.pmap(train_step(local_gradient), axis_name="data")
    params = jax.tree.map(lambda x: jnp.stack([x] * 8), initial_params())
    split = [batch.reshape(2, 8, 4, 8).swapaxes(0, 1) for batch in batches()]
    visited = train(step, params, jax.pmap(TX.init)(params), split)
    for got, expected in zip(visited, one_device(), strict=True):
        got = jax.tree.map(np.asarray, got)
        assert_close(got, jax.tree.map(lambda x: np.stack([x] * 8), expected))


# Where JAX tracks what varies over the mesh, the mean has to be inside the gradient.
@pytest.mark.parametrize(
    ("gradient", "check_vma"), [(local_gradient, False), (global_gradient, True)]
)
def test_a_run_in_shard_map_is_the_run_on_one_device(gradient, check_vma):
    mesh, shardings = lay_out("data parallel", AUTO)
    step = jax.shard_map(
        train_step(gradient),
        mesh=mesh,
        in_specs=(P(), P(), P(None, "data")),
        out_specs=P(),
        check_vma=check_vma,
    )
    params = jax.device_put(initial_params(), shardings)
    visited = train(jax.jit(step), params, TX.init(params), batches())
    for got, expected in zip(visited, one_device(), strict=True):
        assert_sharded_alike(got[1].slow_params, got[0])
        assert_close(got, expected)


def test_gradients_that_the_inner_optimizer_averages_keep_the_state_replicated():
    mean = optax.stateless(lambda updates, _: jax.lax.pmean(updates, "data"))
    mesh = make_mesh({"data": 8}, AUTO)

    def updated(tx):
        def step(params, state, batch):
            updates, state = tx.update(jax.tree.map(jnp.sum, batch), state, params)
            return optax.apply_updates(params, updates), state

        # Which JAX checks here: the state may not depend on one device's batch.
        step = jax.shard_map(
            step, mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=P()
        )
        params, batch = {"w": jnp.ones(())}, {"w": jnp.arange(8.0)}
        return jax.jit(step)(params, tx.init(params), batch)

    inner = optax.chain(mean, optax.sgd(0.1))
    for tx in (lookahead(inner, 1, 0.5), outer_loop(inner, optax.sgd(0.5), 1)):
        params, state = updated(tx)
        np.testing.assert_allclose(params["w"], 1 - 0.5 * 0.1 * 3.5, rtol=1e-6)
        np.testing.assert_array_equal(params["w"], state.slow_params["w"])


def state_shardings(params, shardings):
    """Returns the shardings of the whole state, as the README's recipe makes them."""
    return optax.tree.map_params(
        TX,
        lambda _, sharding: sharding,
        jax.eval_shape(TX.init, params),
        shardings,
        transform_non_params=lambda _: NamedSharding(shardings["w1"].mesh, P()),
    )


@every_layout
def test_jit_of_init_with_shardings_shards_the_whole_state(layout):
    mesh, shardings = lay_out(layout, AUTO)
    params = jax.device_put(initial_params(), shardings)
    state = jax.jit(TX.init, out_shardings=state_shardings(params, shardings))(params)
    adam = state.fast_state[0]
    for tree in (state.slow_params, adam.mu, adam.nu):
        assert_sharded_alike(tree, shardings)
    for x in (adam.count, state.steps_since_sync, state.sync_count):
        assert x.sharding == NamedSharding(mesh, P())


@every_type
def test_jit_of_init_without_shardings_replicates_zeros_on_automatic_axes(axis_type):
    mesh, shardings = lay_out("fully sharded", axis_type)
    with use_mesh(mesh):
        params = jax.device_put(initial_params(), shardings)
        state = jax.jit(TX.init)(params)
        assert_sharded_alike(state.slow_params, shardings)
        # Which is why the README has a recipe. Eagerly they follow the parameters.
        replicated = axis_type == AUTO
        for x in jax.tree.leaves(state.fast_state[0].mu):
            assert x.sharding.is_fully_replicated == replicated
        assert_sharded_alike(TX.init(params).fast_state[0].mu, shardings)


INNERS = {
    "sgd": optax.sgd(0.1),
    "adam": optax.adam(0.1),
    "clipped adam": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1)),
}
LEAF = (64, 1000)
COLLECTIVE = re.compile(
    r" (all-gather|all-reduce|all-to-all|collective-broadcast|collective-permute"
    r"|ragged-all-to-all|reduce-scatter)(?:-start)?\("
)


def compile_step(tx, params):
    """Returns the compiled, donated optimizer step alone: the gradients are given."""

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    donated = as_shipped(step, donate_argnums=(0, 1))
    return donated.lower(params, tx.init(params), params).compile()


def collectives(compiled):
    return collections.Counter(COLLECTIVE.findall(compiled.as_text()))


@every_type
@every_layout
@pytest.mark.parametrize("name", INNERS)
def test_the_step_adds_no_collective_and_no_temporary(name, layout, axis_type):
    mesh, shardings = lay_out(layout, axis_type)
    with use_mesh(mesh):
        params = jax.device_put([jnp.ones(LEAF), jnp.ones(LEAF)], shardings["w1"])
        inner, tx = INNERS[name], lookahead(INNERS[name], 5, 0.5)
        alone, ours = compile_step(inner, params), compile_step(tx, params)
    assert collectives(ours) == collectives(alone)
    # The measure can tell: a norm over a mesh is a sum over its devices.
    norm = name == "clipped adam" and layout != "data parallel"
    assert bool(collectives(alone)["all-reduce"]) == norm
    ours, alone = ours.memory_analysis(), alone.memory_analysis()
    scalars = 1000  # the counters and the flags
    # JAX 0.6 keeps clipped gradients for longer, on one device just so.
    if name != "clipped adam":
        assert ours.temp_size_in_bytes - alone.temp_size_in_bytes < scalars


def on(axes, axis_type, *spec, first_device=0):
    devices = jax.devices()[first_device:][: np.prod(list(axes.values()))]
    return NamedSharding(make_mesh(axes, axis_type, devices), P(*spec))


EIGHT, FOUR, TWO_AXES = {"data": 8}, {"data": 4}, {"data": 4, "model": 2}


def misplaced(params, shardings):
    """Returns a state with the slow weights somewhere else, as a restore may."""
    state = TX.init(params)
    return state._replace(slow_params=jax.device_put(state.slow_params, shardings))


def optimizer_steps(update, params, state):
    visited = []
    for _ in range(K + 1):
        updates, state = update(params, state, params)
        params = optax.apply_updates(params, updates)
        visited.append(jax.block_until_ready((params, state)))
    return visited


@pytest.mark.parametrize(
    ("transform", "other"),
    [
        (lambda f: f, on(EIGHT, AUTO)),
        (jax.jit, on(EIGHT, AUTO)),
        (jax.jit, on(EIGHT, AUTO, None, "data")),
        (jax.jit, on(TWO_AXES, AUTO, "model", "data")),
    ],
    ids=["eager", "jitted", "jitted, another spec", "jitted, another mesh"],
)
def test_automatic_axes_accept_slow_weights_of_another_sharding(transform, other):
    start = {"w1": initial_params()["w1"]}
    params = jax.device_put(start, on(EIGHT, AUTO, "data"))
    update = transform(TX.update)
    visited = optimizer_steps(update, params, misplaced(params, other))
    expected = optimizer_steps(update, start, TX.init(start))
    for got, wanted in zip(visited, expected, strict=True):
        assert_close(got, wanted)


def test_out_shardings_restore_the_sharding_of_slow_weights():
    shardings = {"w1": on(TWO_AXES, AUTO, "data")}
    params = jax.device_put({"w1": initial_params()["w1"]}, shardings)
    state = misplaced(params, on(TWO_AXES, AUTO, None, "model"))
    home = shardings, state_shardings(params, shardings)
    result = jax.jit(TX.update, out_shardings=home)(params, state, params)
    assert_sharded_alike(result, home)


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jitted"])
@every_type
def test_slow_weights_that_are_committed_to_no_device_are_accepted(
    axis_type, transform, kind
):
    start = {"w1": initial_params()["w1"]}
    params = jax.device_put(start, on(EIGHT, axis_type, "data"))
    state = TX.init(params)._replace(slow_params=jax.tree.map(kind, start))
    _, state = transform(TX.update)(params, state, params)
    assert_sharded_alike(state.slow_params, params)


# By the types of the arrays, which JAX knows under jit too, and then by their places.
WRONG_TYPES = {
    "another spec": (on(EIGHT, EXPLICIT, "data"), on(EIGHT, EXPLICIT, None, "data")),
    "replicated": (on(EIGHT, EXPLICIT, "data"), on(EIGHT, EXPLICIT)),
    "automatic axes": (on(EIGHT, EXPLICIT, "data"), on(EIGHT, AUTO, "data")),
}
WRONG_PLACES = {
    "other devices": (on(FOUR, AUTO, "data"), on(FOUR, AUTO, "data", first_device=4)),
    "other devices, explicit axes": (
        on(FOUR, EXPLICIT, "data"),
        on(FOUR, EXPLICIT, "data", first_device=4),
    ),
    "some of the devices": (on(EIGHT, AUTO, "data"), on(FOUR, AUTO, "data")),
    "one device": (on(EIGHT, AUTO, "data"), jax.devices()[0]),
}


@pytest.mark.parametrize(
    ("transform", "where"),
    [(jax.jit, where) for where in WRONG_TYPES.values()]
    + [(lambda f: f, where) for where in (WRONG_TYPES | WRONG_PLACES).values()],
    ids=[f"{name}, jitted" for name in WRONG_TYPES] + [*WRONG_TYPES, *WRONG_PLACES],
)
def test_slow_weights_in_an_impossible_place_are_refused(transform, where):
    sharding, other = where
    with use_mesh(sharding.mesh):
        params = jax.device_put({"w1": initial_params()["w1"]}, sharding)
        state = misplaced(params, other)
        for call in (
            TX.update,
            lambda grads, state, params: slow_params(state, params),
        ):
            # JAX says which axes or devices do not fit.
            with pytest.raises(Exception, match=r"shard|device|mesh"):
                transform(call)(params, state, params)
        # The remedy.
        slow = jax.device_put(state.slow_params, {"w1": sharding})
        state = state._replace(slow_params=slow)
        transform(TX.update)(params, state, params)


@pytest.mark.parametrize("name", ["other devices", "some of the devices"])
def test_under_jit_jax_itself_names_what_is_on_other_devices(name):
    sharding, other = WRONG_PLACES[name]
    params = jax.device_put({"w1": initial_params()["w1"]}, sharding)
    state = misplaced(params, other)
    with pytest.raises(ValueError, match=r"argument .*\['w1'\]"):
        jax.jit(TX.update)(params, state, params)
