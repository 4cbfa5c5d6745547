"""Do training scripts of other kinds train as two plain loops would?

Each calls the optimizer differently: in nested scans, beside a target network,
with gradients from several levels of a hierarchy, under another of JAX's checks.
"""

import cloudpickle
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.meshes import make_mesh
from helpers.training import scanned, trajectory, two_loops
from helpers.trees import assert_close, bits
from jax.experimental import checkify
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from optax_lookahead import average_replicas, lookahead, outer_loop, slow_params

RNG = np.random.default_rng(0)
K, ALPHA = 3, 0.5
# Parameters of no axis to three.
PARAMS = {
    "s": jnp.asarray(0.5),
    "v": jnp.asarray(RNG.normal(size=4), jnp.float32),
    "w": jnp.asarray(RNG.normal(size=(4, 3)), jnp.float32),
    "conv": jnp.asarray(RNG.normal(size=(2, 1, 3)), jnp.float32),
}


def loss(params, batch):
    """Returns a loss in which every parameter and the batch count."""
    hidden = jnp.tanh(batch @ params["w"]) * params["s"]
    out = hidden * jnp.sum(params["conv"], (0, 1))[None]
    return jnp.mean(out**2) + jnp.mean((params["v"][None] - batch) ** 2)


def batches(number):
    return jnp.asarray(RNG.normal(size=(number, 8, 4)), jnp.float32)


def test_ppo_in_nested_scans_is_the_loop_over_its_minibatches():
    # Iterations of epochs of minibatches that are shuffled again, as in PureJaxRL.
    iterations, epochs, minibatches = 2, 2, 4
    data = batches(iterations * minibatches).reshape(iterations, minibatches, 8, 4)
    inner = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(0.1, eps=1e-5))
    tx = lookahead(inner, K, ALPHA)
    order = jax.random.permutation(
        jax.random.key(0),
        jnp.broadcast_to(jnp.arange(minibatches), (iterations, epochs, minibatches)),
        axis=2,
        independent=True,
    )

    def minibatch(carry, batch):
        params, state = carry
        grads = jax.grad(loss)(params, batch)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    def iteration(carry, rollout):
        batches, order = rollout

        def epoch(carry, order):
            return jax.lax.scan(minibatch, carry, batches[order])

        return jax.lax.scan(epoch, carry, order)

    carry = PARAMS, tx.init(PARAMS)
    (params, state), _ = jax.jit(lambda *xs: jax.lax.scan(iteration, xs[0], xs[1]))(
        carry, (data, order)
    )
    flat = jnp.concatenate([data[i][order[i]].reshape(-1, 8, 4) for i in range(2)])
    fast, slow = two_loops(
        inner, PARAMS, lambda p, i: jax.grad(loss)(p, flat[i]), K, ALPHA, len(flat)
    )[-1]
    assert_close((params, slow_params(state, params)), (fast, slow), 1e-4)


def test_the_target_network_of_sac_follows_the_slow_critic():
    inner, data, tau = optax.adam(0.05), batches(10), 0.1
    tx = lookahead(inner, K, ALPHA)

    def critic_gradient(params, target, batch):
        value = jnp.sum(target["v"])  # of the target, which no gradient passes

        def critic_loss(params):
            return loss(params, batch) + (params["s"] - value) ** 2

        return jax.grad(critic_loss)(params)

    @jax.jit
    def step(params, state, target, batch):
        grads = critic_gradient(params, target, batch)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        target = optax.incremental_update(slow_params(state, params), target, tau)
        return params, state, target

    @jax.jit
    def plain_step(params, state, target, batch):
        grads = critic_gradient(params, target, batch)
        updates, state = inner.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params, target, state = PARAMS, PARAMS, tx.init(PARAMS)
    theta, phi, goal, memory = PARAMS, PARAMS, PARAMS, inner.init(PARAMS)
    for i, batch in enumerate(data):
        params, state, target = step(params, state, target, batch)
        theta, memory = plain_step(theta, memory, goal, batch)
        if (i + 1) % K == 0:
            theta = phi = jax.tree.map(lambda p, t: p + ALPHA * (t - p), phi, theta)
        goal = jax.tree.map(lambda g, p: (1 - tau) * g + tau * p, goal, phi)
    assert_close((params, target), (theta, goal), 1e-4)


def test_averaging_in_two_levels_is_three_nested_loops():
    # Machines in a pod average every 2 steps, pods every 4 of them.
    rate = jnp.asarray([[1.0, 2.0], [3.0, 6.0]])  # gradients: pods, machines
    inner = outer_loop(
        optax.sgd(0.1),
        optax.chain(average_replicas("machine"), optax.sgd(1.0)),
        2,
    )
    both = optax.chain(average_replicas(("pod", "machine")), optax.sgd(0.5))
    tx = outer_loop(inner, both, 4)

    def train(rate):
        params = {"s": jnp.asarray(1.0), "w": jnp.ones((2, 3))}
        state, visited = tx.init(params), []
        for _ in range(8):
            grads = jax.tree.map(lambda p: rate * jnp.ones_like(p), params)
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            visited.append(params)
        return visited

    over_machines = jax.vmap(train, axis_name="machine")
    visited = jax.jit(jax.vmap(over_machines, axis_name="pod"))(rate)

    theta, gradients = np.ones((2, 2)), np.asarray(rate)
    top = theta.copy()
    for step in range(8):
        theta = theta - 0.1 * gradients
        if step % 2 == 1:
            theta = np.broadcast_to(theta.mean(1, keepdims=True), (2, 2))
        if step % 4 == 3:
            theta = top = top + 0.5 * (theta.mean() - top)
        for p in jax.tree.leaves(visited[step]):
            wanted = theta.reshape(theta.shape + (1,) * (p.ndim - 2))
            np.testing.assert_allclose(p, np.broadcast_to(wanted, p.shape), atol=1e-5)


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_a_period_that_a_schedule_shortens_and_lengthens(transform):
    lengths = [5, 5, 2, 2, 2, 4]

    def period(step):
        return jnp.where(step < 10, 5, jnp.where(step < 16, 2, 4))

    tx = optax.inject_hyperparams(lookahead)(optax.sgd(0.1), k=period, alpha=ALPHA)
    data = batches(sum(lengths))

    def gradient(params, i):
        return jax.grad(loss)(params, data[i])

    params, state = trajectory(tx, PARAMS, gradient, sum(lengths), transform)[-1]
    theta, i = PARAMS, 0
    for k in lengths:
        phi = theta
        for _ in range(k):
            g = gradient(theta, i)
            theta = jax.tree.map(lambda p, g: p - 0.1 * g, theta, g)
            i += 1
        theta = jax.tree.map(lambda p, t: p + ALPHA * (t - p), phi, theta)
    assert_close(params, theta, 1e-4)
    assert state.inner_state.sync_count == len(lengths)


def test_zero_1_shards_the_state_alone_and_trains_the_same():
    mesh = make_mesh({"data": 4}, AxisType.Auto, jax.devices()[:4])
    params = {
        "s": jnp.asarray(0.5),
        "v": jnp.ones(8),
        "w": jnp.ones((4, 8)),
        "conv": jnp.ones((4, 2, 2)),
    }
    tx = lookahead(optax.adam(0.1), 2, ALPHA, inner_state="interpolate")
    whole = NamedSharding(mesh, P())
    split = jax.tree.map(
        lambda p: NamedSharding(mesh, P("data") if p.ndim else P()), params
    )
    sharded_state = optax.tree.map_params(
        tx,
        lambda _, sharding: sharding,
        jax.eval_shape(tx.init, params),
        split,
        transform_non_params=lambda _: whole,
    )
    replicated = jax.tree.map(lambda _: whole, params)

    def step(params, state, i):
        grads = jax.tree.map(lambda p: p + 0.1 * i, params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    on_mesh = jax.jit(step, out_shardings=(replicated, sharded_state))
    p = jax.device_put(params, replicated)
    s = jax.jit(tx.init, out_shardings=sharded_state)(p)
    alone, alone_state = params, tx.init(params)
    for i in range(5):
        p, s = jax.block_until_ready(on_mesh(p, s, i))
        alone, alone_state = step(alone, alone_state, i)
    assert_close((p, s), (alone, alone_state))
    for tree in (s.slow_params, s.fast_state[0].mu, *s.anchor):
        parts = {name: x.addressable_shards[0].data.size for name, x in tree.items()}
        assert parts == {"s": 1, "v": 2, "w": 8, "conv": 4}
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(p))


def test_checkify_raises_what_the_loop_checks_and_nothing_else():
    tx = lookahead(optax.adam(0.1), 2, ALPHA, inner_state="reset")

    def step(params, state, scale):
        grads = jax.tree.map(lambda p: scale * p, params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        checkify.check(jnp.all(jnp.isfinite(params["v"])), "v is not finite")
        return params, state

    errors = checkify.user_checks | checkify.float_checks | checkify.index_checks
    checked = jax.jit(checkify.checkify(step, errors=errors))
    params, state = PARAMS, tx.init(PARAMS)
    for i in range(5):
        error, (params, state) = checked(params, state, 1.0)
        error.throw()
        assert state.steps_since_sync == (i + 1) % 2
    error, _ = checked(params, state, jnp.nan)
    # By version of JAX the float check or the loop's own comes first.
    with pytest.raises(
        checkify.JaxRuntimeError, match=r"v is not finite|^nan generated"
    ):
        error.throw()


@pytest.mark.parametrize("loop", ["lookahead", "outer_loop"])
@pytest.mark.parametrize("idiom", ["zeros", "masked"])
def test_float0_gradients_of_integers_work_where_the_inner_optimizer_accepts_them(
    idiom, loop
):
    params = {"s": jnp.asarray(2.0), "w": jnp.ones((2, 3)), "n": jnp.arange(3)}

    def gradient(params):
        def value(p):
            return p["s"] * jnp.sum(p["w"] ** 2 * p["n"][None])

        return jax.grad(value, allow_int=True)(params)

    floating = {"s": True, "w": True, "n": False}
    inner = optax.sgd(0.01)
    if idiom == "masked":
        inner = optax.masked(optax.adam(0.01), floating)
    around = {
        "lookahead": lookahead(inner, 2, ALPHA),
        "outer_loop": outer_loop(inner, optax.sgd(ALPHA), 2),
    }
    tx = around[loop]

    # Unchanged, they are refused inside lookahead just where Optax alone refuses them.
    def one_step(tx):
        updates, _ = tx.update(gradient(params), tx.init(params), params)
        return optax.apply_updates(params, updates)

    for one in (inner, tx):
        with pytest.raises(TypeError):
            one_step(one)

    def usable(grads, params):
        zero = jnp.zeros_like(params["n"])
        return {
            name: zero if g.dtype == jax.dtypes.float0 else g
            for name, g in grads.items()
        }

    start, state = params, tx.init(params)
    theta, memory = params, inner.init(params)
    for _ in range(2):
        updates, state = tx.update(usable(gradient(params), params), state, params)
        params = optax.apply_updates(params, updates)
        updates, memory = inner.update(usable(gradient(theta), theta), memory, theta)
        theta = optax.apply_updates(theta, updates)
    for name in ("s", "w"):
        half = start[name] + ALPHA * (theta[name] - start[name])
        np.testing.assert_allclose(params[name], half, rtol=1e-6)
    np.testing.assert_array_equal(params["n"], jnp.arange(3))
    assert params["n"].dtype == state.slow_params["n"].dtype == jnp.int32


@pytest.mark.parametrize(
    "tx",
    [
        lookahead(optax.adam(0.1), 2, optax.linear_schedule(0.2, 0.8, 3)),
        lookahead(optax.adam(0.1), 2, inner_state="interpolate", slow_dtype="float32"),
        optax.chain(
            outer_loop(
                optax.adam(0.1),
                optax.sgd(0.7, momentum=0.9, nesterov=True),
                2,
                inner_state=lambda state, fresh: fresh,
            )
        ),
    ],
    ids=["schedule", "interpolate", "outer_loop"],
)
def test_optimizer_and_state_go_through_cloudpickle(tx):
    def gradient(params, step):
        return jax.tree.map(lambda p: 0.5 * p + step, params)

    data = jax.tree.map(lambda x: x[3], scanned(tx, PARAMS, gradient, 4))
    sent = cloudpickle.loads(cloudpickle.dumps((tx, *data)))
    after = []
    for one, params, state in ((tx, *data), sent):
        for step in range(3):
            updates, state = one.update(gradient(params, step), state, params)
            params = optax.apply_updates(params, updates)
        after.append((params, state))
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(bits(x), bits(y)), *after)
