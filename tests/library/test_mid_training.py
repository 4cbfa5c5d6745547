"""What if lookahead is turned on, changed or turned off in mid-training?

Every step is compared with Adam and Algorithm 1 in NumPy, where the same is changed.
"""

import functools
import pickle

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from helpers import reference
from helpers.pages import run_block

from optax_lookahead import lookahead, outer_loop, slow_params, with_inner_state

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
def test_a_state_saved_with_another_k_and_alpha_continues_with_the_new_ones(
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


# A checkpoint of `optax.lookahead`.


def three_axes(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "s": jnp.asarray(rng.normal()),
        "v": jnp.asarray(rng.normal(size=3)),
        "w": jnp.asarray(rng.normal(size=(2, 3))),
        "conv": jnp.asarray(rng.normal(size=(2, 1, 2))),
    }


def tree_gradient(params, step):
    return jax.tree.map(lambda p: 0.5 * p + 0.1 * (step % 5), params)


MOMENTUM = optax.sgd(0.1, momentum=0.9)


@pytest.mark.parametrize("restore", ["as it is", "pickle", "orbax"])
@pytest.mark.parametrize(
    ("inner", "reset"),
    [(ADAM, False), (MOMENTUM, False), (MOMENTUM, True)],
    ids=["adam", "momentum", "momentum, reset"],
)
@pytest.mark.parametrize("done", [5, 6, 8, 9])
def test_a_checkpoint_of_optax_lookahead_continues_as_it_would_have(
    inner, reset, done, restore, tmp_path, x64
):
    theirs = optax.lookahead(inner, 5, 0.4, reset_state=reset)

    def step(params, state, i):
        updates, state = theirs.update(tree_gradient(params.fast, i), state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step)
    pair = optax.LookaheadParams.init_synced(three_axes())
    old = theirs.init(pair)
    for i in range(done):
        pair, old = step(pair, old, i)
    saved = pair, old
    if restore == "pickle":
        saved = pickle.loads(pickle.dumps(saved))
    elif restore == "orbax":
        other = optax.LookaheadParams.init_synced(three_axes(1))
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "run", saved)
        with ocp.StandardCheckpointer() as checkpointer:
            saved = checkpointer.restore(tmp_path / "run", (other, theirs.init(other)))

    # As the page has it.
    (fast, slow), state = saved
    tx = lookahead(inner, 5, 0.4, inner_state="reset" if reset else "keep")
    ours = with_inner_state(tx, tx.init(slow), state.fast_state)
    ours = ours._replace(steps_since_sync=state.steps_since_sync)
    update = jax.jit(tx.update)
    for i in range(done, done + 12):
        pair, old = step(pair, old, i)
        updates, ours = update(tree_gradient(fast, i), ours, fast)
        fast = optax.apply_updates(fast, updates)
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-7, atol=1e-7),
            (fast, slow_params(ours, fast), ours.fast_state),
            (pair.fast, pair.slow, old.fast_state),
        )


def test_the_page_about_migrating_ends_where_optax_does():
    namespace = run_block("migrate-checkpoint")
    pair, state = namespace["old_params"], namespace["old_state"]
    for _ in range(8):
        updates, state = namespace["old_tx"].update(pair.fast, state, pair)
        pair = optax.apply_updates(pair, updates)
    for got, expected in (
        (namespace["params"], pair.fast),
        (namespace["slow"], pair.slow),
    ):
        np.testing.assert_allclose(got["w"], expected["w"], rtol=1e-6)


# An existing inner state, under every policy.

POLICIES = {
    "keep": lambda: (reference.keep, "keep"),
    "reset": lambda: (reference.reset, "reset"),
    "interpolate": lambda: (reference.interpolate, "interpolate"),
    "function": lambda: (reference.keep, lambda state, fresh: state),
}


class Policed(Paper):
    """Adam in NumPy with Algorithm 1, and what a sync does to Adam's memory."""

    def turn_on(self, policy):
        at_sync = POLICIES[policy]()[0]
        self.at_sync = at_sync() if policy == "interpolate" else at_sync
        if policy == "interpolate":  # from the moments that it has
            self.at_sync(self.memory, 1.0)

    def rest_of_a_cycle(self, steps, alpha):
        visited = super().rest_of_a_cycle(steps, alpha)
        self.at_sync(self.memory, alpha)
        return visited


def assert_memory(state, paper):
    adam = state.fast_state[0]
    if not paper.memory:  # after a reset
        assert adam.count == 0
        return
    np.testing.assert_allclose(adam.mu, paper.memory["m"], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(adam.nu, paper.memory["v"], rtol=1e-9)
    assert adam.count == paper.memory["t"]


@pytest.mark.parametrize(
    ("policy", "loop"),
    [(policy, "lookahead") for policy in POLICIES]
    # An outer optimizer has no alpha to interpolate with.
    + [(policy, "outer_loop") for policy in POLICIES if policy != "interpolate"],
)
def test_a_state_made_around_an_existing_inner_state_follows_every_policy(
    x64, policy, loop
):
    paper = Policed()
    theta = jnp.asarray(paper.theta)
    theta, adam_state = follow(ADAM, theta, ADAM.init(theta), paper.inner_steps(7), 0)
    given = POLICIES[policy]()[1]
    if loop == "lookahead":
        tx = lookahead(ADAM, 3, 0.4, inner_state=given)
    else:
        tx = outer_loop(ADAM, optax.sgd(0.4), 3, inner_state=given)
    state = with_inner_state(tx, tx.init(theta), adam_state)
    assert jax.tree.structure(state) == jax.tree.structure(tx.init(theta))
    paper.turn_on(policy)
    for cycle in range(3):
        expected = paper.cycle(3, 0.4)
        theta, state = follow(tx, theta, state, expected, 7 + 3 * cycle)
        assert_memory(state, paper)
    # The arrays can be donated together.
    jax.jit(tx.update, donate_argnums=1)(
        theta, with_inner_state(tx, tx.init(theta), state.fast_state), theta
    )


@pytest.mark.parametrize("new", POLICIES)
@pytest.mark.parametrize("old", ["keep", "interpolate"])
@pytest.mark.parametrize("done", [0, 2])
def test_the_policy_is_switched_at_any_step_of_a_cycle(x64, old, new, done):
    paper = Policed()
    theta = jnp.asarray(paper.theta)
    paper.turn_on("keep")
    if old == "interpolate":
        paper.at_sync = reference.interpolate()  # from zeros, as `init` has it
    old = lookahead(ADAM, 3, 0.4, inner_state=old)
    expected = paper.cycle(3, 0.4) + paper.start_of_a_cycle(done)
    theta, state = follow(old, theta, old.init(theta), expected, 0)

    tx = lookahead(ADAM, 3, 0.4, inner_state=POLICIES[new]()[1])
    state = with_inner_state(tx, state, state.fast_state)
    assert (state.steps_since_sync, state.sync_count) == (done, 1)
    paper.turn_on(new)
    expected = paper.rest_of_a_cycle(3 - done, 0.4)
    theta, state = follow(tx, theta, state, expected, 3 + done)
    assert_memory(state, paper)
    theta, state = follow(tx, theta, state, paper.cycle(3, 0.4), 6)
    assert_memory(state, paper)


@pytest.mark.parametrize("policy", POLICIES)
def test_another_inner_optimizer_takes_over_in_mid_cycle(x64, policy):
    paper = Policed()
    theta = jnp.asarray(paper.theta)
    sgd = lookahead(optax.sgd(0.1), 3, 0.4)
    paper.inner, adam = reference.sgd(0.1), paper.inner
    paper.turn_on("keep")
    expected = paper.cycle(3, 0.4) + paper.start_of_a_cycle(1)
    theta, state = follow(sgd, theta, sgd.init(theta), expected, 0)

    tx = lookahead(ADAM, 3, 0.4, inner_state=POLICIES[policy]()[1])
    state = with_inner_state(tx, state, ADAM.init(theta))
    paper.inner, paper.memory = adam, {}
    paper.turn_on(policy)
    expected = paper.rest_of_a_cycle(2, 0.4) + paper.cycle(3, 0.4)
    _, state = follow(tx, theta, state, expected, 4)
    assert_memory(state, paper)


def test_turned_on_with_interpolation_adam_keeps_the_size_of_its_second_moment():
    adam = optax.adam(1e-3)
    theta, state = jnp.zeros(50), adam.init(jnp.zeros(50))
    noise = functools.partial(jax.random.normal, shape=(50,))

    def step(tx):
        @jax.jit
        def scan(theta, state, keys):
            def body(carry, key):
                updates, state = tx.update(noise(key), carry[1], carry[0])
                return (optax.apply_updates(carry[0], updates), state), None

            return jax.lax.scan(body, (theta, state), keys)[0]

        return scan

    keys = jax.random.split(jax.random.key(0), 4005)
    theta, state = step(adam)(theta, state, keys[:4000])
    before = state[0].nu
    tx = lookahead(adam, 5, 0.5, inner_state="interpolate")
    on = with_inner_state(tx, tx.init(theta), state)
    _, on = step(tx)(theta, on, keys[4000:])
    np.testing.assert_allclose(on.fast_state[0].nu, before, rtol=0.02)
