"""A small problem with another gradient at every step, for JAX and for NumPy."""

import jax.numpy as jnp
import numpy as np

RNG = np.random.default_rng(0)
CURVATURE = np.diag([0.2, 0.5, 1.0, 1.5, 2.0]) + 0.1
NOISE = RNG.normal(size=(64, 5))
START = RNG.normal(size=5)


def numpy_gradient(theta, step):
    return CURVATURE @ theta + np.sin(theta) + NOISE[step]


def to_tree(theta):
    return {"w": theta[:4].reshape(2, 2), "b": theta[4]}


def to_vector(tree):
    return jnp.concatenate([tree["w"].ravel(), tree["b"].reshape(1)])


def gradient(params, step):
    theta = to_vector(params)
    noise = jnp.asarray(NOISE)[step]
    return to_tree(jnp.asarray(CURVATURE) @ theta + jnp.sin(theta) + noise)
