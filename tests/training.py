"""The loops that the tests train with: eager, jitted and scanned."""

import jax
import jax.numpy as jnp
import optax


def trajectory(tx, params, gradient, steps, transform=lambda step: step):
    """Returns parameters and state after every step of an ordinary Optax loop.

    `gradient(params, step)` is differentiable JAX code, and `transform`, such as
    `jax.jit`, wraps the whole training step.
    """

    @transform
    def train_step(params, state, step):
        updates, state = tx.update(gradient(params, step), state, params)
        return optax.apply_updates(params, updates), state

    state, visited = tx.init(params), []
    for step in range(steps):
        params, state = train_step(params, state, jnp.asarray(step))
        visited.append((params, state))
    return visited


def scanned(tx, params, gradient, steps):
    """Returns the parameters and states after every step, stacked, of one `scan`."""

    def train_step(carry, step):
        params, state = carry
        updates, state = tx.update(gradient(params, step), state, params)
        carry = optax.apply_updates(params, updates), state
        return carry, carry

    return jax.lax.scan(train_step, (params, tx.init(params)), jnp.arange(steps))[1]
