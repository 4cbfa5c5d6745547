"""Does it work with parameters in any container that JAX knows?"""

import dataclasses
from typing import Any, NamedTuple

import chex
import equinox as eqx
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import FrozenDict
from helpers.training import trajectory, two_loops

from optax_lookahead import lookahead, slow_params

W, B = jnp.array([[1.0, -2.0], [0.5, 3.0]]), jnp.array([0.1, -0.3])


class Pair(NamedTuple):
    w: Any
    b: Any


@chex.dataclass
class ChexParams:
    w: Any
    b: Any


@flax.struct.dataclass
class FlaxParams:
    w: Any
    b: Any
    name: str = flax.struct.field(pytree_node=False, default="layer")


class Module(eqx.Module):
    w: jax.Array
    b: jax.Array
    name: str = eqx.field(static=True, default="layer")


@jax.tree_util.register_pytree_node_class
class Node:
    """A custom node without key paths."""

    def __init__(self, w, b):
        self.w, self.b = w, b

    def tree_flatten(self):
        return (self.w, self.b), None

    @classmethod
    def tree_unflatten(cls, aux, children):
        return cls(*children)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class PlainDataclass:
    w: Any
    b: Any


CONTAINERS = {
    "array": W,
    "scalar": jnp.asarray(2.0),
    "dict": {"w": W, "b": B},
    "nested dict": {"layer": {"w": W}, "head": {"b": B}},
    "integer keys": {0: W, 1: B},
    "tuple": (W, B),
    "list": [W, B],
    "NamedTuple": Pair(W, B),
    "chex dataclass": ChexParams(w=W, b=B),
    "flax dataclass": FlaxParams(w=W, b=B),
    "plain dataclass": PlainDataclass(W, B),
    "FrozenDict": FrozenDict({"layer": {"w": W, "b": B}}),
    "Equinox module": Module(W, B),
    "custom node": Node(W, B),
    "None leaf": {"w": W, "b": None},
    "empty branch": {"w": W, "empty": {}, "also": ()},
    "zero-sized leaf": {"w": W, "z": jnp.zeros((0, 3))},
    "NumPy arrays": {"w": np.asarray(W), "b": np.asarray(B)},
    "Python numbers": {"w": 2.0, "b": -1.0},
    "dtypes": {"f": W, "h": B.astype(jnp.float16), "b": B.astype(jnp.bfloat16)},
}


def gradient(params, step):
    def of_leaf(p):
        return p - jnp.cos(step + 2 * jnp.asarray(p)).astype(jnp.result_type(p))

    return jax.tree.map(of_leaf, params)


def assert_close(tree, expected):
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        rtol = 8 * float(jnp.finfo(a.dtype).eps)
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("name", CONTAINERS)
def test_parameters_in_any_container_follow_two_plain_loops(name, transform):
    params = CONTAINERS[name]
    tx = optax.chain(lookahead(optax.sgd(0.1, momentum=0.5), 3, 0.5))
    visited = trajectory(tx, params, gradient, 7, transform)
    expected = two_loops(optax.sgd(0.1, momentum=0.5), params, gradient, 3, 0.5, 7)
    for (params, state), (fast, slow) in zip(visited, expected, strict=True):
        assert_close(params, fast)
        slow = jax.tree.map(jnp.asarray, slow)  # of NumPy arrays and Python numbers
        assert_close(slow_params(state, params), slow)


@pytest.mark.parametrize("params", [{}, (), [], {"a": {}, "b": None}])
def test_parameters_without_a_leaf(params):
    tx = lookahead(optax.adam(0.1), 2)
    state = tx.init(params)
    for _ in range(3):
        updates, state = tx.update(params, state, params)
        assert updates == params
        assert slow_params(state, params) == params
    assert state.sync_count == 1


def test_double_precision_beside_single_precision(x64):
    params = {"d": W.astype(jnp.float64), "f": B}
    visited = trajectory(lookahead(optax.adam(0.1), 3), params, gradient, 7, jax.jit)
    expected = two_loops(optax.adam(0.1), params, gradient, 3, 0.5, 7)
    for (params, state), (fast, slow) in zip(visited, expected, strict=True):
        assert_close(params, fast)
        assert_close(slow_params(state, params), slow)
