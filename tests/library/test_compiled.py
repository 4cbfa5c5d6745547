"""What does the compiled step cost over the inner optimizer's, except time?

Figures of a compiled program don't depend on the machine's load. Times are in
`benchmarks/step_cost.py`, and meshes of devices in `test_sharding.py`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import transformer
from helpers.compiling import as_shipped

from optax_lookahead import lookahead, outer_loop, slow_params

INNERS = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.1, momentum=0.9),
    "adam": optax.adam(0.1),
}
SIZE = 80_000
# A few scalars: the counters and the flags.
SCALARS = 1_000


def initial_params(dtype=jnp.float32):
    # With a dtype: a weakly typed parameter is converted, and so copied, in any case.
    return [jnp.full((SIZE,), i, dtype) for i in range(4)]


def train_step(tx):
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return as_shipped(step, donate_argnums=(0, 1))


def compile_step(tx, params):
    return train_step(tx).lower(params, tx.init(params), params).compile()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", INNERS)
def test_the_donated_step_needs_no_temporary_beyond_the_inner_optimizers(name, dtype):
    if dtype == "bfloat16" and jax.__version_info__ < (0, 7):
        pytest.skip("JAX 0.6 copies 16-bit floats around every form on a CPU")
    params, inner = initial_params(dtype), INNERS[name]
    alone = compile_step(inner, params).memory_analysis()
    ours = compile_step(lookahead(inner, 5, 0.5), params).memory_analysis()
    extra = ours.temp_size_in_bytes - alone.temp_size_in_bytes
    assert extra < SCALARS
    # The measure can tell: the same step of `optax.lookahead` copies parameters.
    pair, tx = optax.LookaheadParams.init_synced(params), optax.lookahead(inner, 5, 0.5)
    upstream = train_step(tx).lower(pair, tx.init(pair), params).compile()
    upstream = upstream.memory_analysis().temp_size_in_bytes
    assert upstream - alone.temp_size_in_bytes > params[0].nbytes


# Copies of the parameters. Adam's update is expensive enough to be stored rather than
# computed twice: see benchmarks/README.md.
@pytest.mark.parametrize(
    ("name", "dtype", "copies"),
    [
        ("sgd", "float32", 0.2),
        ("momentum", "float32", 0.2),
        ("adam", "float32", 1.1),
        ("adam", "bfloat16", 5.5),
    ],
)
def test_an_outer_step_with_momentum_takes_this_many_copies(name, dtype, copies):
    params = [jnp.ones(SIZE, dtype) for _ in range(20)]
    inner = INNERS[name]
    nesterov = optax.sgd(0.7, momentum=0.9, nesterov=True)
    alone = compile_step(inner, params).memory_analysis()
    ours = compile_step(outer_loop(inner, nesterov, 5), params).memory_analysis()
    extra = ours.temp_size_in_bytes - alone.temp_size_in_bytes
    assert extra < copies * 20 * params[0].nbytes + SCALARS


@pytest.mark.parametrize("name", INNERS)
def test_a_whole_training_step_of_a_transformer_does_not_copy_the_parameters(name):
    params = transformer.init_params(jax.random.key(0), width=128)
    batch = transformer.tokens(jax.random.key(1), 32)

    def compile_whole(tx):
        def step(params, state, batch):
            grads = jax.grad(transformer.loss_fn)(params, batch)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        step = as_shipped(step, donate_argnums=(0, 1))
        return step.lower(params, tx.init(params), batch).compile().memory_analysis()

    inner = INNERS[name]
    alone, ours = compile_whole(inner), compile_whole(lookahead(inner, 5, 0.5))
    extra = ours.temp_size_in_bytes - alone.temp_size_in_bytes
    assert extra < sum(p.nbytes for p in jax.tree.leaves(params)) / 4


def equations(jaxpr):
    """Counts those of inner programs and their calls, too."""
    inner = (
        getattr(x, "jaxpr", x)
        for eqn in jaxpr.eqns
        for value in eqn.params.values()
        for x in (value if isinstance(value, tuple | list) else [value])
        if hasattr(getattr(x, "jaxpr", x), "eqns")
    )
    return len(jaxpr.eqns) + sum(map(equations, inner))


@pytest.mark.parametrize(
    ("name", "most"), [("inner alone", 17), ("lookahead", 40), ("nesterov", 54)]
)
def test_a_leaf_takes_this_many_equations_around_adam(name, most):
    adam, nesterov = optax.adam(0.1), optax.sgd(0.7, momentum=0.9, nesterov=True)
    tx = {
        "inner alone": adam,
        "lookahead": lookahead(adam, 5, 0.5),
        "nesterov": outer_loop(adam, nesterov, 5),
    }[name]
    params = [jnp.full(3, i, jnp.float32) for i in range(20)]

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    jaxpr = jax.make_jaxpr(jax.jit(step))(params, tx.init(params), params)
    assert equations(jaxpr.jaxpr) / 20 <= most


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
