"""The loss along the line from the slow weights to the fast ones, by a model of it."""

from typing import Any

import jax
import jax.numpy as jnp

from ._results import is_masked
from ._state import common_dtype


def slope_and_curve(
    pseudo_grads: Any, updates: Any, grads: Any, diagonal: Any, is_at_theta: bool
) -> tuple[jax.Array, jax.Array]:
    """Returns g.d and d.A d, of lists and of a tree with their leaves.

    Unless the gradients are those at theta, they go on from where the last inner step
    took them, by the model.
    """
    dtype = sum_dtype(pseudo_grads)
    slope = curve = jnp.zeros([], dtype)
    # With the hidden leaves as leaves: in the other trees they are not hidden.
    gs = jax.tree.leaves(pseudo_grads, is_leaf=is_masked)
    for h, g, u, a in zip(gs, grads, updates, diagonal, strict=True):
        if is_masked(h) or u is None:  # Equinox's way of saying that it stays.
            continue
        h, g, u = (jnp.asarray(x, wide_dtype(h)) for x in (h, g, u))
        a = jnp.asarray(a, jnp.finfo(h.dtype).dtype)
        if not is_at_theta:
            g = g + a * u
        slope -= _dot(g, h).astype(dtype)
        curve += _dot(h, a * h).astype(dtype)
    return slope, curve


def least(
    slope: jax.Array, curve: jax.Array, min_alpha: Any, max_alpha: Any
) -> jax.Array:
    """Returns the alpha in its bounds at which the model of the loss is least."""
    convex = curve > 0
    # Divided where it is defined only, so that `jax_debug_nans` has nothing to find.
    newton = 1 - slope / jnp.where(convex, curve, 1)
    # Of a line, or a parabola that opens downwards, one of the ends.
    rise = slope + curve * ((min_alpha + max_alpha) / 2 - 1)
    end = jnp.where(rise <= 0, max_alpha, min_alpha)
    alpha = jnp.where(convex, jnp.clip(newton, min_alpha, max_alpha), end)
    finite = jnp.isfinite(slope) & jnp.isfinite(curve)
    return jnp.where(finite, alpha, min_alpha).astype(slope.dtype)


def wide_dtype(x: Any) -> Any:
    """Returns float32, or complex64, or the wider dtype of `x`."""
    return common_dtype(x, jnp.float32)


def sum_dtype(params: Any) -> Any:
    """Returns the dtype of the sums: float32, or the widest of the parameters."""
    dtype = jnp.float32
    for leaf in jax.tree.leaves(params):
        dtype = common_dtype(dtype, leaf)
    return jnp.finfo(dtype).dtype


def _dot(x: jax.Array, y: jax.Array) -> jax.Array:
    if jnp.iscomplexobj(y):
        return jnp.sum(x.real * y.real + x.imag * y.imag)
    return jnp.sum(x * y)
