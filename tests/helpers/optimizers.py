"""Every optimizer that Optax exports, and a small problem for them to learn."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from .rows import slow_but

STEPS = 9

EXCLUDED = {
    "dpsgd": "passes a deprecated `seed` and warns; `dpsgd_by_parts` replaces it",
    "optimistic_adam": "deprecated for optimistic_adam_v2, and warns",
}

# Arguments without a default, and those whose default is for large models and turns a
# part of the optimizer off on this small problem.
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
        # `nadam` is not a function but a partial of one.
        and (inspect.isfunction(value) or isinstance(value, functools.partial))
        and "learning_rate" in inspect.signature(value).parameters
    }


EXPORTED = exported()
NAMES = sorted((EXPORTED.keys() - EXCLUDED.keys()) | OTHERS.keys())
# One of each kind: plain, with keys, with extra arguments, with weights in its state.
TELLING = ["adam", "lion", "momo", "noisy_sgd", "polyak_sgd", "schedule_free_sgd"]
TELLING += ["sgd"]
every_optimizer = pytest.mark.parametrize("name", NAMES)
# The others are slow, and need not run every time.
telling_optimizers = pytest.mark.parametrize("name", slow_but(TELLING, NAMES))


def make(name):
    if name in OTHERS:
        return OTHERS[name]()
    return EXPORTED[name](**{"learning_rate": 0.05} | ARGUMENTS.get(name, {}))


# A small classifier: a matrix, since some optimizers treat matrices alone, and a
# vector. Every step has its own batch.
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


def multi_steps(inner, every, **options):
    """Returns `optax.MultiSteps` that accumulates in float64, as old ones do anyway."""
    if "accumulator_dtype" in inspect.signature(optax.MultiSteps).parameters:
        options["accumulator_dtype"] = jnp.float64
    return optax.MultiSteps(inner, every, **options).gradient_transformation()
