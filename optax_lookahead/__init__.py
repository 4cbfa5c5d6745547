"""Lookahead (k steps forward, 1 step back) around any Optax optimizer.

>>> import jax, jax.numpy as jnp, optax
>>> from optax_lookahead import lookahead, slow_params
>>> tx = lookahead(optax.adam(0.1), k=5, alpha=0.5)
>>> params = {"w": jnp.array([2.0, -1.0])}
>>> state = tx.init(params)
>>> for _ in range(50):
...     grads = jax.grad(lambda p: jnp.sum(p["w"] ** 2))(params)
...     updates, state = tx.update(grads, state, params)
...     params = optax.apply_updates(params, updates)
>>> bool(jnp.sum(slow_params(state, params)["w"] ** 2) < 0.1)
True
"""

from ._average import average_replicas as average_replicas
from ._delayed_outer_loop import (
    DelayedOuterState as DelayedOuterState,
    delayed_outer_loop as delayed_outer_loop,
)
from ._ema_nesterov import ema_nesterov as ema_nesterov
from ._extrapolation import ExtrapolationState as ExtrapolationState
from ._lookahead import lookahead as lookahead, outer_loop as outer_loop
from ._primal_averaging import primal_averaging as primal_averaging
from ._query import slow_params as slow_params
from ._replica_axes import replica_axes as replica_axes
from ._state import InnerStep as InnerStep, LookaheadState as LookaheadState
from ._surgery import (
    set_slow_params as set_slow_params,
    with_inner_state as with_inner_state,
)

__version__ = "0.3.0"
