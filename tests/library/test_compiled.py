"""What does the compiled step cost over the inner optimizer's, whatever the clock says?

Compiled figures don't depend on the machine's load, so they are tests. Times are in
`benchmarks/step_cost.py`, and meshes of devices in `test_sharding.py`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import as_shipped

from optax_lookahead import lookahead, outer_loop, slow_params

INNERS = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.1, momentum=0.9),
    "adam": optax.adam(0.1),
}
SIZE = 80_000
# A few scalars: the counters and the flags.
SCALARS = 1_000


def initial_params():
    # With a dtype: a weakly typed parameter is converted, and so copied, in any case.
    return [jnp.full((SIZE,), i, jnp.float32) for i in range(4)]


def train_step(tx):
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return as_shipped(step, donate_argnums=(0, 1))


def compile_step(tx, params):
    grads = initial_params()
    return train_step(tx).lower(params, tx.init(params), grads).compile()


@pytest.mark.parametrize("name", INNERS)
def test_the_donated_step_needs_no_temporary_beyond_the_inner_optimizers(name):
    params, inner = initial_params(), INNERS[name]
    alone = compile_step(inner, params).memory_analysis()
    ours = compile_step(lookahead(inner, 5, 0.5), params).memory_analysis()
    extra = ours.temp_size_in_bytes - alone.temp_size_in_bytes
    assert extra < SCALARS
    # The measure can tell: the same step of `optax.lookahead` copies parameters.
    pair, tx = optax.LookaheadParams.init_synced(params), optax.lookahead(inner, 5, 0.5)
    upstream = compile_step(tx, pair).memory_analysis()
    assert upstream.temp_size_in_bytes - alone.temp_size_in_bytes > 4 * SIZE


@pytest.mark.parametrize(("name", "copies"), [("sgd", 2), ("momentum", 2), ("adam", 3)])
def test_an_outer_step_with_momentum_takes_this_many_copies(name, copies):
    # Adam's update is dear enough to be stored rather than computed twice: see
    # benchmarks/README.md.
    params, inner = initial_params(), INNERS[name]
    nesterov = optax.sgd(0.7, momentum=0.9, nesterov=True)
    alone = compile_step(inner, params).memory_analysis()
    ours = compile_step(outer_loop(inner, nesterov, 5), params).memory_analysis()
    extra = ours.temp_size_in_bytes - alone.temp_size_in_bytes
    assert extra < copies * 4 * 4 * SIZE + SCALARS


@pytest.mark.parametrize("name", INNERS)
def test_a_whole_training_step_does_not_copy_the_parameters(name):
    def compile_whole(tx):
        def loss_fn(params, x):
            for w in params:
                x = jnp.tanh(x @ w)
            return jnp.mean(x**2)

        def step(params, state, x):
            updates, state = tx.update(jax.grad(loss_fn)(params, x), state, params)
            return optax.apply_updates(params, updates), state

        params = [jnp.full((64, 64), 0.1, jnp.float32) for _ in range(20)]
        x = jnp.ones((8, 64))
        step = as_shipped(step, donate_argnums=(0, 1))
        return step.lower(params, tx.init(params), x).compile().memory_analysis()

    inner = INNERS[name]
    alone, ours = compile_whole(inner), compile_whole(lookahead(inner, 5, 0.5))
    extra = ours.temp_size_in_bytes - alone.temp_size_in_bytes
    # Without `start_after_moments` four fifths.
    assert extra < 20 * 64 * 64 * 4 / 8


@pytest.mark.parametrize("transform", [lambda f: f, as_shipped], ids=["eager", "jit"])
@pytest.mark.parametrize("name", INNERS)
def test_what_only_the_compiler_sees_computes_what_its_plain_form_does(
    monkeypatch, name, transform
):
    def run():
        tx = lookahead(INNERS[name], 3, 0.3)
        step = transform(tx.update)
        params = [jnp.linspace(-1.0, 2.0, 301), jnp.asarray([jnp.inf, jnp.nan, 1.0])]
        state, visited = tx.init(params), []
        for i in range(7):
            grads = jax.tree.map(lambda p, i=i: p - jnp.cos(i + p), params)
            updates, state = step(grads, state, params)
            params = optax.apply_updates(params, updates)
            visited.append((params, state))
        return visited

    late = run()
    monkeypatch.setattr(
        "optax_lookahead._cycle.start_after_moments",
        lambda start, params, *_: jax.tree.map(lambda _: start, params),
    )
    # A program in another order may round otherwise, by one rounding or two.
    same = np.testing.assert_array_equal if transform is not as_shipped else close
    jax.tree.map(same, late, run())


def close(x, y):
    np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", INNERS)
def test_the_state_is_the_inner_one_plus_exactly_one_copy_of_the_parameters(name):
    params, inner = initial_params(), INNERS[name]
    alone = sum(x.nbytes for x in jax.tree.leaves(inner.init(params)))
    ours = sum(x.nbytes for x in jax.tree.leaves(lookahead(inner).init(params)))
    assert ours - alone == sum(p.nbytes for p in params) + 2 * 4


@pytest.mark.parametrize("name", INNERS)
def test_every_donated_buffer_is_written_in_place(name):
    params, tx = initial_params(), lookahead(INNERS[name], 5, 0.5)
    state = tx.init(params)
    memory = compile_step(tx, params).memory_analysis()
    donated = sum(x.nbytes for x in jax.tree.leaves((params, state)))
    assert memory.alias_size_in_bytes == donated


@pytest.mark.parametrize("name", INNERS)
def test_parameters_and_state_can_be_donated_together_from_the_first_step(name):
    params, tx = initial_params(), lookahead(INNERS[name], 2, 0.5)
    step, state, grads = train_step(tx), tx.init(params), initial_params()
    for _ in range(5):
        old = jax.tree.leaves((params, state))
        params, state = step(params, state, grads)
        assert all(x.is_deleted() for x in old)
    assert all(np.all(np.isfinite(p)) for p in params)


def test_a_state_made_by_jit_beside_its_parameters_can_be_donated_with_them():
    tx = lookahead(optax.adam(0.1), 2, 0.5)

    @jax.jit
    def create():
        params = initial_params()
        return params, tx.init(params)

    params, state = create()
    params, state = train_step(tx)(params, state, initial_params())
    assert state.steps_since_sync == 1


@pytest.mark.parametrize("name", INNERS)
def test_all_steps_of_all_cycles_run_one_compiled_program(name):
    traces, tx = [], lookahead(INNERS[name], 3, optax.linear_schedule(1.0, 0.5, 3))

    @jax.jit
    def step(params, state):
        traces.append(params)
        updates, state = tx.update(params, state, params)
        return optax.apply_updates(params, updates), state

    params = {"w": jnp.ones(3), "b": jnp.ones(())}
    state = tx.init(params)
    for _ in range(10):
        params, state = step(params, state)
    assert state.sync_count == 3
    assert len(traces) == 1


def test_reading_the_slow_weights_compiles_once():
    traces, tx = [], lookahead(optax.adam(0.1), 3)

    @jax.jit
    def read(state, params):
        traces.append(params)
        return slow_params(state, params)

    params = {"w": jnp.ones(3)}
    state = tx.init(params)
    for _ in range(4):
        updates, state = tx.update(params, state, params)
        params = optax.apply_updates(params, updates)
        read(state, params)
    assert len(traces) == 1
