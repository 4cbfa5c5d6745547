"""Do replicas of a real model train as separate workers in a plain loop would?

Gradients come from a transformer's forward and backward pass in the same program, and
its parameters have 0, 1, 2 and 3 axes.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import transformer
from jax.sharding import AxisType, PartitionSpec as P
from meshes import make_mesh
from rows import dear_but

from optax_lookahead import average_replicas, outer_loop, replica_axes

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
    "MultiSteps around": Row(
        lambda r: twice(averaged(ADAMW)),
        lambda r: twice(ADAMW),
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


def by_hand(row, loss_fn, start, batches):
    """Yields the weights of every worker after every step, each as a dict of leaves."""
    inner = row.inner(0)

    @jax.jit
    def inner_step(params, state, batch):
        grads = jax.grad(loss_fn)(params, batch)
        updates, state = inner.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    @jax.jit
    def outer_step(thetas, slow, states):
        """Returns slow weights and states; each is a dict with what is due."""
        for name in slow:
            mean = sum(theta[name] for theta in thetas) / R
            updates, state = NESTEROV.update(
                slow[name] - mean, states[name], slow[name]
            )
            slow = slow | {name: optax.apply_updates(slow[name], updates)}
            states = states | {name: state}
        return slow, states

    treedef = jax.tree.structure(start)
    fast, states = [start] * R, [row.inner(r).init(start) for r in range(R)]
    slow = by_name(start)
    outer_states = {name: NESTEROV.init(x) for name, x in slow.items()}
    for step, batch in enumerate(batches, 1):
        for r in range(R):
            fast[r], states[r] = inner_step(fast[r], states[r], batch[r])
        due = [name for name in slow if row.is_due(name, step)]
        if due:
            new = outer_step(
                [{name: by_name(theta)[name] for name in due} for theta in fast],
                {name: slow[name] for name in due},
                {name: outer_states[name] for name in due},
            )
            slow, outer_states = slow | new[0], outer_states | new[1]
            restart = {name: slow[name] for name in due}
            fast = [
                treedef.unflatten((by_name(theta) | restart).values()) for theta in fast
            ]
        yield [
            {name: np.asarray(x) for name, x in by_name(theta).items()}
            for theta in fast
        ]


def by_name(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): x
        for path, x in jax.tree.leaves_with_path(tree)
    }


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


def train(row, form, loss_fn, start, batches):
    """Yields the weights of every replica after every step, as `by_hand` does."""
    state, axes = initial_state(row.tx, start)
    step = jax.jit(FORMS[form](training_step(row.tx(0), loss_fn), axes))
    params = jax.tree.map(lambda x: jnp.stack([x] * R), start)
    for batch in batches:
        params, state = step(params, state, batch)
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
    """Returns how far from the loop replicas get, and how far they may."""
    with precision(dtype):
        run = list(train(ROWS[name], form, *problem(dtype, ROWS[name].steps)))
    bound = 1e-12
    if dtype == "float32":
        of = ROWS[name].rounding or name
        bound = 10 * largest_difference(loop(of, "float32"), loop(of, "float64"))
    return largest_difference(run, loop(name, dtype)), bound


TELLING = [("adamw", "vmap"), ("muon", "shard_map"), ("partition", "shard_map")]
PAIRS = [(name, form) for name in ROWS for form in FORMS]


@pytest.mark.parametrize(("name", "form"), dear_but(TELLING, PAIRS))
def test_replicas_are_separate_workers_that_sync(name, form):
    found, bound = deviation(name, form, "float64")
    assert found <= bound


@pytest.mark.parametrize(("name", "form"), dear_but([("adamw", "shard_map")], PAIRS))
def test_in_float32_they_are_to_its_rounding(name, form):
    found, bound = deviation(name, form, "float32")
    assert found <= bound
