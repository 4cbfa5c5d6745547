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


def two_loops(inner, params, gradient, k, alpha, steps):
    """Returns fast and slow weights after every step of Algorithm 1, as it is written.

    For inner optimizers that NumPy has no transcription of: two nested loops around
    any Optax transformation, which never sees a lookahead.
    """

    @jax.jit
    def inner_step(fast, state, step):
        updates, state = inner.update(gradient(fast, step), state, fast)
        return optax.apply_updates(fast, updates), state

    slow, state, visited = params, inner.init(params), []
    while len(visited) < steps:
        fast = slow
        for _ in range(k):
            fast, state = inner_step(fast, state, jnp.asarray(len(visited)))
            visited.append((fast, slow))
        slow = jax.tree.map(lambda phi, th: phi + alpha * (th - phi), slow, fast)
        visited[-1] = (slow, slow)
    return visited[:steps]


def two_loops_with_outer(
    inner, outer, params, gradient, k, steps, transform=jax.jit, **extra_args
):
    """Returns fast and slow weights and outer state after every step of two loops.

    Here `outer` is called at the syncs only, by hand.
    """
    inner, outer = map(optax.with_extra_args_support, (inner, outer))

    @transform
    def inner_step(fast, state, step):
        grads = gradient(fast, step)
        updates, state = inner.update(grads, state, fast, **extra_args)
        return optax.apply_updates(fast, updates), state

    @transform
    def outer_step(slow, state, fast):
        s = jax.tree.map(jnp.subtract, slow, fast)
        updates, state = outer.update(s, state, slow, **extra_args)
        return optax.apply_updates(slow, updates), state

    slow, visited = params, []
    state, outer_state = inner.init(params), outer.init(params)
    while len(visited) < steps:
        fast = slow
        for _ in range(k):
            fast, state = inner_step(fast, state, jnp.asarray(len(visited)))
            visited.append((fast, slow, outer_state))
        slow, outer_state = outer_step(slow, outer_state, fast)
        visited[-1] = slow, slow, outer_state
    return visited[:steps]
