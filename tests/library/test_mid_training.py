"""What if lookahead is turned on, changed or turned off in mid-training?

Every step is compared with Adam and Algorithm 1 in NumPy, which change likewise.
"""

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import reference

from optax_lookahead import lookahead, slow_params

ADAM = optax.adam(0.1)


def gradient(theta, step):
    return 0.5 * theta + np.cos(np.arange(6) + 0.7 * step)


class Paper:
    """Adam in NumPy, with or without Algorithm 1 as two loops around it."""

    def __init__(self):
        self.theta = self.phi = np.linspace(-2.0, 2.0, 6)
        self.inner, self.memory, self.step = reference.adamw(0.1), {}, 0

    def inner_steps(self, number):
        """Returns fast and slow weights after each."""
        visited = []
        for _ in range(number):
            g = gradient(self.theta, self.step)
            self.theta = self.theta + self.inner(g, self.theta, self.memory)
            self.step += 1
            visited.append((self.theta, self.phi))
        return visited

    def start_of_a_cycle(self, steps):
        self.phi = self.theta
        return self.inner_steps(steps)

    def rest_of_a_cycle(self, steps, alpha):
        visited = self.inner_steps(steps)
        self.theta = self.phi = self.phi + alpha * (self.theta - self.phi)
        return [*visited[:-1], (self.theta, self.phi)]

    def cycle(self, k, alpha):
        self.phi = self.theta
        return self.rest_of_a_cycle(k, alpha)


def follow(tx, theta, state, expected, first):
    """Trains along `expected`, which it must agree with; returns where it ends."""
    update = jax.jit(tx.update)
    for step, (fast, slow) in enumerate(expected, first):
        updates, state = update(gradient(theta, step), state, theta)
        theta = optax.apply_updates(theta, updates)
        np.testing.assert_allclose(theta, fast, rtol=1e-10, atol=1e-10)
        if tx is not ADAM:
            found = slow_params(state, theta)
            np.testing.assert_allclose(found, slow, rtol=1e-10, atol=1e-10)
    return theta, state


@pytest.mark.parametrize("then", ["fast", "slow"])
def test_lookahead_is_turned_on_and_off_around_an_adam_that_keeps_its_state(
    then, tmp_path, x64
):
    paper = Paper()
    theta = jnp.asarray(paper.theta)
    theta, state = follow(ADAM, theta, ADAM.init(theta), paper.inner_steps(7), 0)

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "adam", (theta, state))
    with ocp.StandardCheckpointer() as checkpointer:
        other = jnp.zeros_like(theta)
        theta, adam_state = checkpointer.restore(
            tmp_path / "adam", (other, ADAM.init(other))
        )
    tx = lookahead(ADAM, 3, 0.5)
    # Also of a state that was made before the weights were restored.
    state = tx.init(other)._replace(fast_state=adam_state)
    expected = [
        *paper.cycle(3, 0.5),
        *paper.cycle(3, 0.5),
        *paper.start_of_a_cycle(2),
    ]
    theta, state = follow(tx, theta, state, expected, 7)

    if then == "slow":
        theta, paper.theta = slow_params(state, theta), paper.phi
    follow(ADAM, theta, state.fast_state, paper.inner_steps(9), 15)


@pytest.mark.parametrize("done", [0, 2, 4])
@pytest.mark.parametrize(
    ("k", "alpha"),
    [
        (1, 0.5),
        (2, 0.8),
        (3, 0.5),
        (5, 0.8),
        (8, 0.2),
        (5, optax.linear_schedule(0.0, 1.0, 4)),
    ],
)
def test_a_state_saved_with_another_k_and_alpha_goes_on_with_the_new_ones(
    k, alpha, done, x64
):
    paper, tx = Paper(), lookahead(ADAM, 5, 0.5)
    theta = jnp.asarray(paper.theta)
    expected = [
        *paper.cycle(5, 0.5),
        *paper.cycle(5, 0.5),
        *paper.start_of_a_cycle(done),
    ]
    saved = flax.serialization.to_bytes(follow(tx, theta, tx.init(theta), expected, 0))

    tx, other = lookahead(ADAM, k, alpha), jnp.zeros_like(theta)
    theta, state = flax.serialization.from_bytes((other, tx.init(other)), saved)
    assert (state.steps_since_sync, state.sync_count) == (done, 2)
    # A schedule counts all syncs since the start of training.
    alphas = [float(alpha(t)) if callable(alpha) else alpha for t in range(2, 5)]
    # A cycle that is as long as the new k or longer ends with its next step.
    expected = paper.rest_of_a_cycle(max(1, k - done), alphas[0])
    expected += paper.cycle(k, alphas[1]) + paper.cycle(k, alphas[2])
    _, state = follow(tx, theta, state, expected, 10 + done)
    assert (state.steps_since_sync, state.sync_count) == (0, 5)


def test_an_injected_k_and_alpha_come_back_from_the_checkpoint():
    params = jnp.ones(3)
    old = optax.inject_hyperparams(lookahead)(ADAM, k=5, alpha=0.5)
    new = optax.inject_hyperparams(lookahead)(ADAM, k=3, alpha=0.8)
    saved = flax.serialization.to_bytes(old.init(params))
    state = flax.serialization.from_bytes(new.init(params), saved)
    assert state.hyperparams == {"k": 5, "alpha": 0.5}
