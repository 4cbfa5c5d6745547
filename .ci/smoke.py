"""Does the installed distribution train with its two dependencies alone?"""

import importlib.metadata
import pathlib
import sys

import jax
import jax.numpy as jnp
import optax

import optax_lookahead as package

assert "site-packages" in package.__file__, package.__file__
assert package.__version__ == importlib.metadata.version("optax-lookahead")
assert (pathlib.Path(package.__file__).parent / "py.typed").exists()
assert not {"flax", "chex", "matplotlib"} & set(sys.modules)

outer = optax.sgd(0.7, momentum=0.5, nesterov=True)
for tx in (
    package.lookahead(optax.adam(0.1), k=5, alpha=0.5),
    package.outer_loop(optax.adam(0.1), outer, k=5),
):
    params = jnp.array([2.0, -1.0])
    state = tx.init(params)
    update = jax.jit(tx.update)
    for _ in range(100):
        updates, state = update(params, state, params)
        params = optax.apply_updates(params, updates)
    assert jnp.sum(package.slow_params(state, params) ** 2) < 0.1
