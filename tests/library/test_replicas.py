"""Do replicas of a real model train as separate workers in a plain loop would?

Gradients come from a transformer's forward and backward pass in the same program, and
its parameters have 0, 1, 2 and 3 axes.
"""

import contextlib
import functools
import pickle
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from helpers import transformer
from helpers.meshes import make_mesh
from helpers.pages import labelled_blocks, run_block
from helpers.rows import slow_but
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from optax_lookahead import (
    average_replicas,
    lookahead,
    outer_loop,
    replica_axes,
)

R, K, STEPS = 4, 3, 7
NAME = "replica"
NESTEROV = optax.sgd(0.7, momentum=0.9, nesterov=True)


def averaged(inner, k=K, outer=NESTEROV):
    return outer_loop(inner, optax.chain(average_replicas(NAME), outer), k)


class Row(NamedTuple):
    """An optimizer of replicas, and what does the same by hand."""

    tx: Callable[[int], Any]  # of the replica with this number
    inner: Callable[[int], Any]  # of the worker with this number
    # Whether the weights below this name are averaged after this step.
    is_due: Callable[[str, int], bool] = lambda name, step: step % K == 0
    steps: int = STEPS
    rounding: str = ""  # the row whose rounding bounds this one's in float32
    outer: Any = NESTEROV


def around(inner):
    return Row(lambda r: averaged(inner), lambda r: inner)


def noisy(seed):
    return optax.chain(optax.add_noise(0.01, 0.55, seed), optax.sgd(0.1))


def twice(tx):
    return optax.MultiSteps(tx, 2).gradient_transformation()


SGD, ADAMW = optax.sgd(0.1, momentum=0.9), optax.adamw(0.02)
# Without arithmetic, which `inject_hyperparams` leaves in float32.
STAIRS = optax.join_schedules([lambda count: 0.02, lambda count: 0.01], [4])
INJECTED = optax.inject_hyperparams(optax.adamw)(STAIRS)


def group(params):
    """Returns "matrices", "rest" and, for what stays each replica's own, "local"."""
    own = {"temperature": "local", "up_bias": "local"}
    return {
        name: own.get(name, "matrices" if x.ndim == 2 else "rest")
        for name, x in params.items()
    }


GROUPS = {"matrices": SGD, "rest": ADAMW, "local": ADAMW}
PERIODS = {"matrices": 3, "rest": 2}


def partitioned(r):
    loops = {name: averaged(GROUPS[name], k) for name, k in PERIODS.items()}
    return optax.partition({**GROUPS, **loops}, group)


def is_due_in_its_group(name, step):
    label = group(jax.eval_shape(lambda: transformer.init_params(jax.random.key(0))))
    period = PERIODS.get(label[name])
    return period is not None and step % period == 0


def with_an_injected_k(r):
    """Syncs after three steps, and then after every second one."""
    static = "inner", "outer", "inner_state", "slow_dtype"
    return optax.inject_hyperparams(outer_loop, static_args=static)(
        inner=ADAMW,
        outer=optax.chain(average_replicas(NAME), NESTEROV),
        k=lambda count: jnp.where(count < 3, 3, 2),
    )


ROWS = {
    "sgd": around(SGD),
    "adamw": around(ADAMW),
    "muon": around(optax.contrib.muon(0.02)),
    "adafactor": around(optax.adafactor(0.02, min_dim_size_to_factor=4)),
    "prodigy": around(optax.contrib.prodigy(0.1)),
    "add_noise": Row(lambda r: averaged(noisy(r)), noisy, rounding="sgd"),
    "inject_hyperparams inside": around(INJECTED),
    "MultiSteps inside": around(twice(ADAMW)),
    "lookahead in MultiSteps inside": around(twice(lookahead(ADAMW, 2))),
    "MultiSteps around": Row(
        lambda r: twice(averaged(ADAMW)),
        lambda r: twice(ADAMW),
        lambda name, step: step % (2 * K) == 0,
        2 * K + 1,
    ),
    # A step away from the parameters, and one back and on.
    "SAM around": Row(
        lambda r: optax.contrib.sam(averaged(ADAMW), optax.sgd(0.05)),
        lambda r: optax.contrib.sam(ADAMW, optax.sgd(0.05)),
        lambda name, step: step % (2 * K) == 0,
        2 * K + 1,
    ),
    "partition": Row(
        partitioned, lambda r: optax.partition(GROUPS, group), is_due_in_its_group
    ),
    "injected k": Row(
        with_an_injected_k, lambda r: ADAMW, lambda name, step: step in (3, 5, 7)
    ),
}


# By hand: a list of workers, and plain Optax.


def by_hand(row, loss_fn, start, batches, after=lambda step, *lists: None):
    """Yields the weights of every worker after every step, each as a dict of leaves.

    A worker that is not finite is left out of the mean. After each step `after` may
    change the lists of the workers' weights and states; it is given the slow weights.
    """
    inner, outer = row.inner(0), row.outer
    workers = range(len(jax.tree.leaves(batches[0])[0]))

    @jax.jit
    def inner_step(params, state, batch):
        grads = jax.grad(loss_fn)(params, batch)
        updates, state = inner.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    @jax.jit
    def outer_step(thetas, slow, states):
        """Returns slow weights and states; each is a dict with what is due."""
        for name in slow:
            mean = sum(theta[name] for theta in thetas) / len(thetas)
            updates, state = outer.update(slow[name] - mean, states[name], slow[name])
            slow = slow | {name: optax.apply_updates(slow[name], updates)}
            states = states | {name: state}
        return slow, states

    treedef = jax.tree.structure(start)
    fast, states = [start for _ in workers], [row.inner(r).init(start) for r in workers]
    slow = by_name(start)
    outer_states = {name: outer.init(x) for name, x in slow.items()}
    for step, batch in enumerate(batches, 1):
        for r in workers:
            own = jax.tree.map(lambda x, r=r: x[r], batch)
            fast[r], states[r] = inner_step(fast[r], states[r], own)
        due = [name for name in slow if row.is_due(name, step)]
        healthy = [r for r in workers if is_finite(fast[r])]
        if due:
            new = outer_step(
                [{name: by_name(fast[r])[name] for name in due} for r in healthy],
                {name: slow[name] for name in due},
                {name: outer_states[name] for name in due},
            )
            slow, outer_states = slow | new[0], outer_states | new[1]
            restart = {name: slow[name] for name in due}
            for r in healthy:
                weights = by_name(fast[r]) | restart
                fast[r] = treedef.unflatten(weights.values())
        after(step, fast, states, treedef.unflatten(slow.values()))
        yield [
            {name: np.asarray(x) for name, x in by_name(theta).items()}
            for theta in fast
        ]


def by_name(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): x
        for path, x in jax.tree.leaves_with_path(tree)
    }


def is_finite(tree):
    return all(np.all(np.isfinite(x)) for x in jax.tree.leaves(tree))


# With the package: a step of all replicas at once.


def stacked(trees, axes):
    """Returns one tree for all replicas of the trees that each would have alone."""
    return jax.tree.map(
        lambda axis, *xs: xs[0] if axis is None else jnp.stack(xs),
        axes,
        *trees,
        is_leaf=is_none,
    )


def is_none(x):
    return x is None


def specification(axes):
    return jax.tree.map(
        lambda axis: P() if axis is None else P(NAME), axes, is_leaf=is_none
    )


def by_vmap(step, axes):
    return jax.vmap(step, (0, axes, 0), (0, axes), axis_name=NAME)


def by_shard_map(step, axes, mesh=None):
    spec = specification(axes)
    return jax.shard_map(
        # Of the local axis, of size 1, so that each replica's optimizer sees its
        # parameters without an axis of replicas.
        jax.vmap(step, (0, axes, 0), (0, axes)),
        mesh=mesh or make_mesh({NAME: R}, AxisType.Auto, jax.devices()[:R]),
        in_specs=(P(NAME), spec, P(NAME)),
        out_specs=(P(NAME), spec),
        axis_names={NAME},
    )


FORMS = {"vmap": by_vmap, "shard_map": by_shard_map}


def training_step(tx, loss_fn):
    def step(params, state, batch):
        grads = jax.grad(loss_fn)(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def initial_state(make_tx, start):
    """Returns the state of all replicas, and the axes of it."""
    states = [make_tx(r).init(start) for r in range(R)]
    axes = replica_axes(states[0])
    return stacked(states, axes), axes


def train(row, form, loss_fn, start, batches, after=lambda step, *carry: carry):
    """Yields the weights of every replica after every step, as `by_hand` does."""
    state, axes = initial_state(row.tx, start)
    step_of_all = jax.jit(FORMS[form](training_step(row.tx(0), loss_fn), axes))
    params = jax.tree.map(lambda x: jnp.stack([x] * R), start)
    for step, batch in enumerate(batches, 1):
        params, state = after(step, *step_of_all(params, state, batch))
        weights = {name: np.asarray(x) for name, x in by_name(params).items()}
        yield [{name: x[r] for name, x in weights.items()} for r in range(R)]


def largest_difference(run, other):
    return max(
        float(np.max(np.abs(np.float64(weights[name]) - np.float64(others[name]))))
        for step, other_step in zip(run, other, strict=True)
        for weights, others in zip(step, other_step, strict=True)
        for name in weights
    )


@contextlib.contextmanager
def precision(dtype):
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", dtype == "float64")
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)


@functools.cache
def drawn():
    """Returns initial parameters and batches, the same ones for every precision."""
    with precision("float32"):
        start = transformer.init_params(jax.random.key(0), jnp.float32)
        keys = jax.random.split(jax.random.key(1), (2 * K + 1, R))
        batches = jax.vmap(jax.vmap(lambda key: transformer.tokens(key, 2)))(keys)
        return jax.tree.map(np.asarray, (start, batches))


def problem(dtype, steps=STEPS):
    """Returns the loss, initial parameters and a batch for each step and replica."""
    start, batches = drawn()
    start = jax.tree.map(lambda x: jnp.asarray(x, dtype), start)
    return transformer.loss_fn, start, jnp.asarray(batches[:steps])


@functools.cache
def loop(name, dtype):
    with precision(dtype):
        return list(by_hand(ROWS[name], *problem(dtype, ROWS[name].steps)))


def deviation(name, form, dtype):
    """Returns how much replicas differ from the loop, and how much they may."""
    with precision(dtype):
        run = list(train(ROWS[name], form, *problem(dtype, ROWS[name].steps)))
    bound = 1e-12
    if dtype == "float32":
        of = ROWS[name].rounding or name
        bound = 10 * largest_difference(loop(of, "float32"), loop(of, "float64"))
    return largest_difference(run, loop(name, dtype)), bound


TELLING = [("adamw", "vmap"), ("muon", "shard_map"), ("partition", "shard_map")]
PAIRS = [(name, form) for name in ROWS for form in FORMS]


@pytest.mark.parametrize(("name", "form"), slow_but(TELLING, PAIRS))
def test_replicas_are_separate_workers_that_sync(name, form):
    found, bound = deviation(name, form, "float64")
    assert found <= bound


@pytest.mark.parametrize(("name", "form"), slow_but([("adamw", "shard_map")], PAIRS))
def test_in_float32_they_are_separate_workers_up_to_rounding(name, form):
    found, bound = deviation(name, form, "float32")
    assert found <= bound


# Parameters of Flax, and states that are saved and restored.


def regression(batch_size=8):
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(size=(STEPS, R, batch_size, 3)))


class NnxModel(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(3, 2, rngs=rngs, param_dtype=jnp.float64)
        self.temperature = nnx.Param(jnp.ones([], jnp.float64))

    def __call__(self, x):
        return self.linear(x) / self.temperature[...]


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, x):
        temperature = self.param("temperature", nn.initializers.ones, (), jnp.float64)
        return nn.Dense(2, param_dtype=jnp.float64)(x) / temperature


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("library", slow_but(["nnx"], ["nnx", "linen"]))
def test_parameters_of_flax_can_have_replicas_too(x64, library, form):
    if library == "nnx":
        graphdef, start = nnx.split(NnxModel(nnx.Rngs(0)))

        def model(params, x):
            return nnx.merge(graphdef, params)(x)
    else:
        start = LinenModel().init(jax.random.key(0), jnp.ones((1, 3)))
        model = LinenModel().apply

    def loss_fn(params, x):
        return jnp.mean((model(params, x) - jnp.sin(x[:, :2])) ** 2)

    problem = loss_fn, start, regression()
    run, expected = (
        train(ROWS["adamw"], form, *problem),
        by_hand(ROWS["adamw"], *problem),
    )
    assert largest_difference(run, expected) <= 1e-12


def saved_and_restored(folder, tree):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "checkpoint", tree)
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder / "checkpoint", tree)


def test_a_run_that_is_saved_in_mid_cycle_continues_as_if_it_had_not_stopped(
    x64, tmp_path
):
    def after(step, params, state):
        if step == 4:
            return saved_and_restored(tmp_path, (params, state))
        return params, state

    run = train(ROWS["adamw"], "vmap", *problem("float64"), after)
    assert largest_difference(run, loop("adamw", "float64")) <= 1e-12


def test_a_checkpoint_without_an_axis_on_the_counts_continues(x64, tmp_path):
    # As older versions of the page said, an array without axes was all replicas'. So
    # the parameters had one or more.
    tx = averaged(ADAMW)
    loss_of_all, start, batches = problem("float64")
    fixed = {"temperature": start.pop("temperature")}

    def loss_fn(params, batch):
        return loss_of_all(params | fixed, batch)

    step = training_step(tx, loss_fn)
    alone = jax.eval_shape(tx.init, start)
    old_axes = jax.tree.map(lambda x: 0 if x.ndim else None, alone)
    params = jax.tree.map(lambda x: jnp.stack([x] * R), start)
    state = jax.vmap(tx.init, out_axes=old_axes)(params)
    old = jax.jit(by_vmap(step, old_axes))
    for batch in batches[:4]:
        params, state = old(params, state, batch)
    params, state = saved_and_restored(tmp_path, (params, state))
    assert state.fast_state[0].count.shape == ()

    axes = replica_axes(alone)
    with_replicas = run_block("many-workers-old-checkpoint")["with_replicas"]
    state = with_replicas(tx, params, state)
    assert state.fast_state[0].count.shape == (R,)
    new, run = jax.jit(by_vmap(step, axes)), []
    for batch in batches[4:]:
        params, state = new(params, state, batch)
        run.append([{name: x[r] for name, x in params.items()} for r in range(R)])
    expected = list(by_hand(ROWS["adamw"], loss_fn, start, batches))[4:]
    assert largest_difference(run, expected) <= 1e-12


# A replica that broke.


@pytest.mark.parametrize("with_new_inner_state", [False, True])
@pytest.mark.parametrize("restart", [5, 6, 7])
@pytest.mark.parametrize("name", slow_but(["adamw"], ["adamw", "prodigy"]))
def test_a_broken_replica_is_replaced_by_a_copy_of_a_healthy_one(
    x64, name, restart, with_new_inner_state
):
    row, broken, healthy = ROWS[name], 1, 3
    page = run_block("many-workers-another-number")
    recipe = run_block("many-workers-restart")
    rows = [healthy if r == broken else r for r in range(R)]

    def breaks(params):
        return params | {"up": params["up"].at[..., 0, 0].set(jnp.nan)}

    def after(step, params, state):
        if step == 4:
            one = jax.tree.map(lambda x: x[broken], params)
            return jax.tree.map(
                lambda x, new: x.at[broken].set(new), params, breaks(one)
            ), state
        if step == restart:
            assert np.isnan(np.asarray(params["up"][broken])).all()
            is_healthy = page["is_healthy"](params)
            assert is_healthy.tolist() == [r != broken for r in range(R)]
            params, state = page["take_replicas"](rows, params, state)
            if with_new_inner_state:
                return recipe["restart"](broken, row.tx(0), params, state)
        return params, state

    def after_by_hand(step, fast, states, slow):
        if step == 4:
            fast[broken] = breaks(fast[broken])
        if step == restart and with_new_inner_state:
            fast[broken], states[broken] = slow, row.inner(0).init(slow)
        elif step == restart:
            fast[broken], states[broken] = fast[healthy], states[healthy]

    steps = problem("float64", 2 * K + 1)
    run = list(train(row, "vmap", *steps, after))
    expected = list(by_hand(row, *steps, after_by_hand))
    others = [r for r in range(R) if r != broken]
    for step, (weights, by_loop) in enumerate(zip(run, expected, strict=True), 1):
        compared = others if 4 <= step < restart else range(R)
        assert (
            largest_difference(
                [[weights[r] for r in compared]], [[by_loop[r] for r in compared]]
            )
            <= 1e-12
        )
        assert is_finite([weights[r] for r in compared])


def in_shards(step, axes, form):
    """Maps a step over a mesh on which each replica has two devices."""
    mesh = make_mesh({NAME: R, "fsdp": 2}, AxisType.Auto, jax.devices()[: 2 * R])
    if form == "vmap":
        mapped = jax.vmap(
            step, (0, axes, 0), (0, axes), axis_name=NAME, spmd_axis_name=NAME
        )
        return mapped, mesh
    if form == "shard_map":
        return by_shard_map(step, axes, mesh), mesh
    whole = P(NAME, "fsdp")
    spec = jax.tree.map(
        lambda axis: P() if axis is None else whole, axes, is_leaf=is_none
    )
    mapped = jax.shard_map(
        jax.vmap(step, (0, axes, 0), (0, axes)),
        mesh=mesh,
        in_specs=(whole, spec, whole),
        out_specs=(whole, spec),
    )
    return mapped, mesh


@pytest.mark.parametrize("form", ["vmap", "shard_map", "manual"])
def test_one_bad_shard_leaves_out_the_whole_replica_or_if_manual_the_shard(form):
    tx = averaged(optax.sgd(1.0), k=1, outer=optax.sgd(1.0))
    rng = np.random.default_rng(0)
    targets = {
        "w": rng.normal(size=(R, 4, 3)).astype(np.float32),
        "b": rng.normal(size=(R, 2)).astype(np.float32),
    }
    targets["w"][1, 3, 0] = np.nan  # on the second device of the replica
    params = jax.tree.map(lambda x: jnp.zeros(x.shape), targets)
    axes = replica_axes(tx.init(jax.tree.map(lambda x: x[0], params)))

    def step(params, state, target):
        updates, state = tx.update(
            jax.tree.map(jnp.subtract, params, target), state, params
        )
        return optax.apply_updates(params, updates), state

    mapped, mesh = in_shards(step, axes, form)

    def place(x):
        return jax.device_put(x, NamedSharding(mesh, P(NAME, "fsdp")))

    state = jax.vmap(tx.init, out_axes=axes)(params)
    params, targets = jax.tree.map(place, (params, targets))
    state = jax.tree.map(
        lambda axis, x: x if axis is None else place(x), axes, state, is_leaf=is_none
    )
    params, _ = jax.jit(mapped)(params, state, targets)
    healthy = np.array([0, 2, 3])
    for name, x in params.items():
        got, target = np.asarray(x)[healthy], np.asarray(targets[name])
        expected = target[healthy].mean(0)
        if form == "manual":  # the first half of each array is a healthy device's
            half = target.shape[1] // 2
            expected[:half] = target[:, :half].mean(0)
        np.testing.assert_allclose(got, np.stack([expected] * 3), rtol=1e-5, atol=1e-6)


# Special cases.


def test_arrays_without_elements_are_parameters_too():
    tx = averaged(optax.adam(0.1), k=1)
    params = {"w": jnp.ones((R, 3)), "empty": jnp.ones((R, 0, 4))}
    axes = replica_axes(tx.init(jax.tree.map(lambda x: x[0], params)))

    def step(params, state, batch):
        updates, state = tx.update(params, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.vmap(tx.init, out_axes=axes)(params)
    params, _ = jax.jit(by_shard_map(step, axes))(params, state, jnp.ones(R))
    assert params["empty"].shape == (R, 0, 4)
    assert is_finite(params)


def test_a_group_may_be_without_parameters():
    loops = {"a": averaged(SGD), "b": averaged(SGD)}
    tx = optax.partition(loops, {"w": "a"})
    params = {"w": jnp.ones((R, 3))}
    axes = replica_axes(tx.init({"w": jnp.ones(3)}))

    def step(params, state, batch):
        updates, state = tx.update(params, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.vmap(tx.init, out_axes=axes)(params)
    for form in FORMS.values():
        new, _ = jax.jit(form(step, axes))(params, state, jnp.ones(R))
        np.testing.assert_allclose(new["w"], 0.9, rtol=1e-6)


@pytest.mark.parametrize("name", ROWS)
def test_states_can_be_pickled(name):
    start = transformer.init_params(jax.random.key(0))
    state, _ = initial_state(ROWS[name].tx, start)
    copy = pickle.loads(pickle.dumps(state))
    assert jax.tree.structure(copy) == jax.tree.structure(state)


@pytest.mark.parametrize("form", FORMS)
def test_a_mean_of_float64_is_one_of_float64(x64, form):
    tx = averaged(optax.sgd(1.0), k=1, outer=optax.sgd(1.0))
    targets = np.random.default_rng(0).normal(size=(R, 5))
    targets[1, 0] = np.nan  # so that it is divided by three
    params = jnp.zeros((R, 5))
    axes = replica_axes(tx.init(params[0]))

    def step(params, state, target):
        updates, state = tx.update(params - target, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.vmap(tx.init, out_axes=axes)(params)
    params, _ = jax.jit(FORMS[form](step, axes))(params, state, jnp.asarray(targets))
    assert params.dtype == jnp.float64
    mean = targets[[0, 2, 3]].mean(0)
    np.testing.assert_allclose(params[0], mean, rtol=1e-15, atol=1e-15)


def test_the_gradient_of_a_parameter_that_replicas_share_is_a_sum_over_them():
    def loss_fn(shared, x):
        return jnp.sum(shared * x)

    gradient = jax.shard_map(
        lambda shared, x: jax.grad(loss_fn)(shared, x),
        mesh=make_mesh({NAME: R}, AxisType.Auto, jax.devices()[:R]),
        in_specs=(P(), P(NAME)),
        out_specs=P(),
    )
    x = jnp.arange(4.0)
    np.testing.assert_array_equal(gradient(jnp.ones([]), x), x.sum())


# What the pages show.


def final_difference(params, row, loss_fn, start, batches):
    """Returns how far the replicas end from where the workers by hand do."""
    weights, workers = by_name(params), len(jax.tree.leaves(params)[0])
    run = [{name: x[r] for name, x in weights.items()} for r in range(workers)]
    *_, expected = by_hand(row, loss_fn, start, batches)
    return largest_difference([run], [expected])


@pytest.mark.parametrize("label", ["many-workers-vmap", "many-workers-shard-map"])
def test_the_programs_on_the_page_are_muloco(label):
    page = run_block(label)
    start = jax.tree.map(lambda x: x[0], page["init"](page["key"])[0])
    firsts = [
        jax.random.randint(jax.random.key(step), (R, 8, 1), 0, page["VOCABULARY"])
        for step in range(30)
    ]
    batches = [
        (first + 3 * jnp.arange(9)[None, None]) % page["VOCABULARY"] for first in firsts
    ]
    row = Row(
        lambda r: page["tx"],
        lambda r: optax.contrib.muon(0.02),
        lambda name, step: step % 5 == 0,
    )
    problem = page["loss_fn"], start, batches
    assert final_difference(page["params"], row, *problem) < 1e-4
    assert page["losses"][-1] < page["losses"][0] / 1.5
    if jax.__version_info__ >= (0, 7):  # JAX 0.6 gathers the parameters of a replica
        split = page["params"]["hidden"].sharding.shard_shape((R, 16, 16))
        assert split == (1, 8, 16), "a replica stays sharded"


def test_with_multi_steps_inside_both_programs_on_the_page_agree():
    losses = []
    for label in ("many-workers-vmap", "many-workers-shard-map"):
        source = labelled_blocks()[label].source
        assert "optax.contrib.muon(0.02)" in source
        source = source.replace("optax.contrib.muon(0.02)", "twice(optax.adamw(0.02))")
        # What the page says that it needs on a mesh with automatic axes.
        source = source.replace("axis_names=", "check_vma=False, axis_names=")
        page = {"twice": twice}
        exec(source, page)
        losses.append(page["losses"])
    assert losses[0][-1] < losses[0][0]
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_the_outer_step_as_a_program_of_its_own_does_the_same():
    page = run_block("many-workers-own-outer-step")
    w, v = jax.random.normal(jax.random.key(0), (2, 3, 8)) / 2
    start = {"w": w, "v": v.T[:, :1], "scale": jnp.ones([])}
    batches = [page["batch"](step) for step in range(1, 151)]
    row = Row(None, lambda r: page["inner"], lambda name, step: step % page["K"] == 0)
    assert all(np.ptp(x, axis=0).max() == 0 for x in jax.tree.leaves(page["params"]))
    problem = page["loss_fn"], start, batches
    assert final_difference(page["params"], row, *problem) < 1e-4


def test_fragments_sync_at_different_steps():
    page = run_block("many-workers-streaming")
    start = jax.tree.map(lambda x: x[0], page["init"](page["key"])[0])
    offsets = {"w": 0, "v": page["K"] // 2, "scale": page["K"] // 2}
    row = Row(
        lambda r: page["tx"],
        lambda r: optax.adam(0.01),
        lambda name, step: (step + offsets[name]) % page["K"] == 0,
        outer=optax.sgd(1.0),
    )
    batches = [page["batch"](step) for step in range(1, 11)]
    problem = page["loss_fn"], start, batches
    assert final_difference(page["params"], row, *problem) < 1e-5


def test_another_number_of_replicas_continues_from_copies():
    take_replicas = run_block("many-workers-another-number")["take_replicas"]
    outer = optax.sgd(0.7, momentum=0.9)
    tx = averaged(optax.sgd(0.1, momentum=0.5), 2, outer)

    def step(params, state, target):
        updates, state = tx.update(params - target, state, params)
        return optax.apply_updates(params, updates), state

    axes = replica_axes(tx.init(jnp.zeros(3)))
    train_step = jax.jit(by_vmap(step, axes))
    params = jnp.zeros((4, 3))
    state = jax.vmap(tx.init, out_axes=axes)(params)
    targets = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)), jnp.float32)
    slow, trace = np.zeros(3), np.zeros(3)
    momenta = np.zeros((4, 3))
    for cycle, rows in enumerate(([0, 1, 2, 3], [2, 0], [0, 1] * 4), 1):
        params, state = take_replicas(rows, params, state)
        replicas, momenta = len(rows), momenta[rows]
        fast = np.tile(slow, (replicas, 1))
        for _ in range(2):
            params, state = train_step(params, state, targets[:replicas])
            momenta = (fast - np.asarray(targets[:replicas])) + 0.5 * momenta
            fast = fast - 0.1 * momenta
        trace = (slow - fast.mean(0)) + 0.9 * trace
        slow = slow - 0.7 * trace
        np.testing.assert_allclose(params, np.tile(slow, (replicas, 1)), rtol=1e-4)
        assert state.sync_count == cycle


def test_the_recorded_spread_leaves_out_a_broken_replica():
    page = run_block("many-workers-spread")
    params, state = page["init"](page["key"])
    params["w"] = params["w"].at[2, 0, 0].set(jnp.nan)
    for step in range(1, page["K"] + 1):
        params, state = page["train_step"](params, state, page["batch"](step))
    norms = np.asarray(state.outer_state[0])
    assert np.isnan(norms).tolist() == [r == 2 for r in range(page["REPLICAS"])]


def test_the_recorded_spread_is_the_distance_of_workers_from_their_mean(capsys):
    page = run_block("many-workers-spread")
    replicas, k = page["REPLICAS"], page["K"]
    # The slow weights take the page's outer step, the workers their inner steps alone.
    inner, gradient = optax.adamw(3e-3), jax.jit(jax.grad(page["loss_fn"]))
    slow = jax.tree.map(lambda x: x[0], page["init"](page["key"])[0])
    trace, states, expected = 0.0, [inner.init(slow)] * replicas, []
    slow, unravel = jax.flatten_util.ravel_pytree(slow)
    step_inner = jax.jit(inner.update)
    for cycle in range(4):
        workers = [unravel(slow)] * replicas
        for step in range(cycle * k + 1, (cycle + 1) * k + 1):
            x, y = page["batch"](step)
            for r in range(replicas):
                grads = gradient(workers[r], (x[r], y[r]))
                updates, states[r] = step_inner(grads, states[r], workers[r])
                workers[r] = optax.apply_updates(workers[r], updates)
        fast = np.stack([jax.flatten_util.ravel_pytree(w)[0] for w in workers])
        mean = fast.mean(axis=0)
        norms = np.linalg.norm(fast - mean, axis=1)
        expected.append(np.sqrt(np.mean(norms**2)))
        trace = (slow - mean) + 0.9 * trace
        slow = slow - 0.7 * ((slow - mean) + 0.9 * trace)
    np.testing.assert_allclose(page["state"].outer_state[0], norms, rtol=1e-3)
    np.testing.assert_allclose(page["spreads"], expected, rtol=1e-3)
    printed = re.findall(r"step (\d+): ([\d.]+) from the mean", capsys.readouterr().out)
    assert [int(step) for step, _ in printed] == [k, 2 * k, 3 * k, 4 * k]
    np.testing.assert_allclose([float(x) for _, x in printed], expected, atol=6e-5)
