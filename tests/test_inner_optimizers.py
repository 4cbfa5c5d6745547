"""Does every optimizer that Optax exports work inside?"""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from optax_lookahead import lookahead, slow_params

K, ALPHA, STEPS = 3, 0.5, 9

EXCLUDED = {
    "dpsgd": "passes on a `seed` that is deprecated, and warns; below it is by parts",
    "optimistic_adam": "deprecated for optimistic_adam_v2, and warns",
}

# What the default arguments, made for large models, leave out or leave idle on this
# small problem, and what has no default.
ARGUMENTS = {
    "adadelta": {"learning_rate": 10.0},
    "adafactor": {"min_dim_size_to_factor": 2, "momentum": 0.9},
    "cocob": {"learning_rate": 1.0},
    "dadapt_adamw": {"learning_rate": 1.0, "estim_lr0": 1e-3},
    "dog": {"learning_rate": 1.0, "init_step": ("heuristic", 1e-2)},
    "dowg": {"learning_rate": 1.0},
    "galore": {"rank": 2, "update_proj_gap": 4},
    "lars": {"learning_rate": 1.0},
    "momo": {"learning_rate": 1.0},
    "noisy_sgd": {"key": 0},
    "prodigy": {"learning_rate": 1.0, "estim_lr0": 1e-3},
    "rmsprop": {"momentum": 0.9, "centered": True},
    "schedule_free": {"base_optimizer": optax.adam(0.05)},
    "schedule_free_adamw": {"warmup_steps": 4},
    "schedule_free_sgd": {"warmup_steps": 4},
    "sgd": {"momentum": 0.9, "nesterov": True},
    "sophia": {"update_interval": 2},
}

# Optimizers without a `learning_rate`, and wrappers that make one out of another.
OTHERS = {
    "apply_if_finite": lambda: optax.apply_if_finite(optax.adam(0.05), 2),
    "backtracking_linesearch": lambda: optax.chain(
        optax.sgd(0.5),
        optax.scale_by_backtracking_linesearch(10, store_grad=True),
    ),
    "dpsgd_by_parts": lambda: optax.chain(
        optax.contrib.differentially_private_aggregate(0.5, 0.1, key=0),
        optax.sgd(0.05, momentum=0.9),
    ),
    "lbfgs_without_linesearch": lambda: optax.lbfgs(0.1, linesearch=None),
    "mechanize": lambda: optax.contrib.mechanize(optax.adam(1.0), s_init=1e-2),
    "multi_steps": lambda: optax.MultiSteps(
        optax.adam(0.05), 2
    ).gradient_transformation(),
    "noisy_sgd_with_a_typed_key": lambda: optax.noisy_sgd(0.05, key=jax.random.key(0)),
    "polyak_sgd": lambda: optax.polyak_sgd(max_learning_rate=0.5),
    "reduce_on_plateau": lambda: optax.chain(
        optax.adam(0.05), optax.contrib.reduce_on_plateau(patience=1, rtol=0.5)
    ),
    "sam": lambda: optax.contrib.sam(
        optax.sgd(0.05, momentum=0.9),
        optax.chain(optax.contrib.normalize(), optax.sgd(0.02)),
    ),
    "sam_opaque": lambda: optax.contrib.sam(
        optax.adam(0.05),
        optax.chain(optax.contrib.normalize(), optax.sgd(0.02)),
        opaque_mode=True,
    ),
}


def exported():
    """Returns everything public in Optax that is called with a learning rate."""
    return {
        name: value
        for module in (optax, optax.contrib)
        for name, value in vars(module).items()
        if not name.startswith("_")
        # `nadam` is no function but a partial of one.
        and (inspect.isfunction(value) or isinstance(value, functools.partial))
        and "learning_rate" in inspect.signature(value).parameters
    }


EXPORTED = exported()
NAMES = sorted((EXPORTED.keys() - EXCLUDED.keys()) | OTHERS.keys())
SCANNED = [
    "adam",
    "lion",
    "momo",
    "noisy_sgd",
    "polyak_sgd",
    "schedule_free_sgd",
    "sgd",
]
SCANNED += ["apply_if_finite", "lbfgs", "muon", "prodigy", "sophia"]
every_optimizer = pytest.mark.parametrize("name", NAMES)


def make(name):
    if name in OTHERS:
        return OTHERS[name]()
    return EXPORTED[name](**{"learning_rate": 0.05} | ARGUMENTS.get(name, {}))


# A small classifier: a matrix, since some optimizers treat matrices alone, and a
# vector. Every step has a batch of its own.
RNG = np.random.default_rng(0)
INPUTS = np.float32(RNG.normal(size=(STEPS, 8, 4)))
LABELS = np.argmax(INPUTS @ RNG.normal(size=(4, 3)) + 0.5 * INPUTS[..., :3], axis=-1)
START = {
    "w": np.float32(0.5 * RNG.normal(size=(4, 3))),
    "b": np.float32(0.5 * RNG.normal(size=3)),
}


def batch_loss(params, inputs, labels):
    logits = inputs @ params["w"] + params["b"][None]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def arguments(name, params, step):
    """Returns the gradient and the extra arguments that any of the optimizers reads."""
    if "lbfgs" in name or "linesearch" in name:  # want one loss at all steps
        batch = np.concatenate(INPUTS), np.concatenate(LABELS)
    else:
        batch = jnp.asarray(INPUTS)[step], jnp.asarray(LABELS)[step]

    def loss(params, *_):
        return batch_loss(params, *batch)

    value, grads = jax.value_and_grad(loss)(params)
    if name == "dpsgd_by_parts":  # wants a gradient for every example
        single = [x[:, None] for x in batch]
        return jax.vmap(jax.grad(batch_loss), (None, 0, 0))(params, *single), {}
    if name.startswith("sam"):  # takes no other arguments
        return grads, {"grad_fn": jax.grad(loss)}
    if name == "sophia":
        return grads, {"obj_fn": loss}
    return grads, {"value": value, "grad": grads, "value_fn": loss}


def lookahead_loop(name, transform):
    """Returns fast and slow weights and the state at every step, and all traces."""
    tx, traces = lookahead(make(name), K, ALPHA), []

    def train_step(params, state, step):
        traces.append(step)
        grads, extra = arguments(name, params, step)
        updates, state = tx.update(grads, state, params, **extra)
        params = optax.apply_updates(params, updates)
        return params, slow_params(state, params), state

    params = jax.tree.map(jnp.asarray, START)
    state, train_step = tx.init(params), transform(train_step)
    visited = [(params, params, state)]
    for step in range(STEPS):
        params, slow, state = train_step(params, state, jnp.asarray(step))
        visited.append((params, slow, state))
    return visited, traces


def algorithm_1(name, transform):
    """Returns fast and slow weights and the inner state at every step, by hand."""
    inner = optax.with_extra_args_support(make(name))

    def inner_step(theta, state, step):
        grads, extra = arguments(name, theta, step)
        updates, state = inner.update(grads, state, theta, **extra)
        return optax.apply_updates(theta, updates), state

    phi = jax.tree.map(jnp.asarray, START)
    state, inner_step = inner.init(phi), transform(inner_step)
    visited = [(phi, phi, state)]
    for cycle in range(STEPS // K):
        theta = phi
        for i in range(K):
            theta, state = inner_step(theta, state, jnp.asarray(cycle * K + i))
            if i < K - 1:
                visited.append((theta, phi, state))
        phi = jax.tree.map(lambda phi, theta: phi + ALPHA * (theta - phi), phi, theta)
        visited.append((phi, phi, state))
    return visited


@functools.cache
def jitted(name):
    return *lookahead_loop(name, jax.jit), algorithm_1(name, jax.jit)


def as_arrays(tree):
    """Returns the tree with its random keys, which NumPy can't hold, as numbers."""
    return jax.tree.map(lambda x: jax.random.key_data(x) if is_key(x) else x, tree)


def is_key(x):
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def is_exact(x):
    return not jnp.issubdtype(x.dtype, jnp.inexact)


def types(tree):
    """Returns structure, shapes, dtypes and weak types of a tree."""
    return jax.tree.map(jax.typeof, tree)


def shapes_and_dtypes(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


def is_weakly_typed(tree):
    return any(x.weak_type for x in jax.tree.leaves(types(tree)))


def assert_close(got, expected, tolerance=1e-5):
    def check(path, x, y):
        name = jax.tree_util.keystr(path)
        if is_exact(y):
            np.testing.assert_array_equal(x, y, name)
        else:
            # Relative to the leaf: elements near 0 are differences of larger numbers.
            atol = tolerance * np.max(np.abs(y), initial=0.0)
            np.testing.assert_allclose(x, y, rtol=0.0, atol=atol, err_msg=name)

    jax.tree.map_with_path(check, as_arrays(got), as_arrays(expected))


def test_discovery_finds_the_optimizers_of_optax():
    assert len(NAMES) >= 57
    assert set(NAMES) >= {"sgd", "adam", "adamw", "lion", "nadam", "lbfgs", "adafactor"}
    assert set(NAMES) >= {"prodigy", "muon", "sophia", "schedule_free_adamw", "cocob"}
    # No line of the tables above outlives what it is about.
    assert EXCLUDED.keys() <= EXPORTED.keys()
    assert not OTHERS.keys() & EXPORTED.keys()


@every_optimizer
def test_fast_and_slow_weights_follow_algorithm_1_at_every_step(name):
    ours, _, by_hand = jitted(name)
    assert len(ours) == len(by_hand) == STEPS + 1
    for (params, slow, _), (theta, phi, _) in zip(ours, by_hand, strict=True):
        assert_close((params, slow), (theta, phi))
    # What is compared moves by far more than the tolerance.
    params, slow, _ = ours[K - 1]
    assert np.max(np.abs(params["w"] - slow["w"])) > 1e-3


@every_optimizer
def test_the_inner_state_is_kept_across_syncs_as_in_algorithm_1(name):
    ours, _, by_hand = jitted(name)
    for (_, _, state), (_, _, expected) in zip(ours, by_hand, strict=True):
        # Some states sum up differences that cancel.
        assert_close(state.fast_state, expected, tolerance=3e-4)


@every_optimizer
def test_the_state_keeps_its_structure_shapes_and_dtypes(name):
    ours, _, by_hand = jitted(name)
    _, _, start = ours[0]
    for (_, _, state), (_, _, inner) in zip(ours, by_hand, strict=True):
        assert shapes_and_dtypes(state) == shapes_and_dtypes(start)
        # With weak types, which trigger a retrace too.
        assert types(state._replace(fast_state=())) == types(
            start._replace(fast_state=())
        )
        assert types(state.fast_state) == types(inner)


@every_optimizer
def test_all_steps_share_one_trace(name):
    _, traces, by_hand = jitted(name)
    _, _, start = by_hand[0]
    # Optax's line searches start with weakly typed numbers, and the first step makes
    # them strong. That is a second trace with or without lookahead.
    assert len(traces) == (2 if is_weakly_typed(start) else 1)


@every_optimizer
def test_the_loss_stays_finite(name):
    inputs, labels = np.concatenate(INPUTS), np.concatenate(LABELS)
    for params, slow, _ in jitted(name)[0]:
        assert np.isfinite(batch_loss(params, inputs, labels))
        assert np.isfinite(batch_loss(slow, inputs, labels))


@pytest.mark.parametrize("name", SCANNED)
def test_one_scan_gives_the_weights_of_the_loop(name):
    tx = lookahead(make(name), K, ALPHA)

    def train_step(carry, step):
        params, state = carry
        grads, extra = arguments(name, params, step)
        updates, state = tx.update(grads, state, params, **extra)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, slow_params(state, params))

    start = jax.tree.map(jnp.asarray, START)
    carry = start, tx.init(start)
    _, stacked = jax.lax.scan(train_step, carry, jnp.arange(STEPS))
    for step, (params, slow, _) in enumerate(jitted(name)[0][1:]):
        assert_close(jax.tree.map(lambda x, i=step: x[i], stacked), (params, slow))


@every_optimizer
def test_eager_steps_follow_algorithm_1_too(name):
    ours, _ = lookahead_loop(name, lambda step: step)
    by_hand = algorithm_1(name, lambda step: step)
    for (params, slow, state), (theta, phi, inner) in zip(ours, by_hand, strict=True):
        assert_close((params, slow), (theta, phi))
        assert_close(state.fast_state, inner, tolerance=3e-4)


def test_among_the_inner_states_are_keys_flags_and_counters():
    # What an average over the state, or arithmetic in place of `where`, would damage.
    kinds = {}
    for name in NAMES:
        for leaf in jax.tree.leaves(jax.eval_shape(make(name).init, START)):
            kind = "key" if is_key(leaf) else leaf.dtype.name
            kinds.setdefault(kind, set()).add(name)
    assert "noisy_sgd_with_a_typed_key" in kinds["key"]
    assert "sophia" in kinds["uint32"]
    assert "apply_if_finite" in kinds["bool"]
    assert len(kinds["int32"]) > 20
