"""Bits, types and differences of trees and of arrays."""

import jax
import jax.numpy as jnp
import numpy as np


def bits(x):
    return np.asarray(x).reshape(-1).view(np.uint8)


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
