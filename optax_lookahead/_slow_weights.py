"""The cycle of one parameter, as plain functions of arrays.

p is the parameter before the step, u its update by the inner optimizer, slow the slow
weight in the state, and phi the slow weight that the cycle started from. There are
three cases, which the dtypes alone tell apart: the slow weight has the parameter's
dtype, or a wider one (`slow_dtype`), or the parameter is discrete. An update of None,
as Equinox makes it, means that the parameter is frozen.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from ._state import common_dtype, is_finite, is_inexact


def cycle_start(start: Any, p: Any, slow: Any) -> Any:
    """Returns phi: at the start of a cycle the parameter, later the slow weight."""
    # The loop may have loaded, clipped or projected its parameters since the last sync,
    # and a cycle starts from these, except from elements that are not finite.
    start &= is_finite(p)
    held = jnp.asarray(p, slow.dtype)
    if is_wider(slow, p):
        # It keeps the slow weight if p is only its rounding. Near zero, where float16
        # has subnormal numbers, that rounding is coarser than eps.
        narrow = jnp.finfo(jnp.result_type(p))
        size = jnp.maximum(jnp.abs(slow), float(narrow.tiny))
        start &= ~(is_finite(slow) & (jnp.abs(held - slow) <= float(narrow.eps) * size))
    return jnp.where(start, held, slow)


def pseudo_gradient(p: Any, u: Any, phi: Any) -> Any:
    """Returns phi minus the fast weight p + u, in the wider of their dtypes."""
    if not is_inexact(phi):
        return optax.MaskedNode()
    if u is None:
        return jnp.zeros_like(phi)
    dtype = common_dtype(u, phi)
    # The fast weight started from phi rounded to p's dtype. Measured from phi itself,
    # every cycle would pull phi towards that rounding.
    origin = _round_like(phi, p) if is_wider(phi, p) else phi
    return jnp.asarray(origin, dtype) - (jnp.asarray(p, dtype) + jnp.asarray(u, dtype))


def is_intact(phi: Any, finite: Any) -> Any:
    """Returns where a fast weight is finite, or infinite by design as phi is."""
    if not is_inexact(phi):
        return optax.MaskedNode()
    return finite | ~is_finite(phi)


def interpolate(sync: Any, alpha: Any, p: Any, u: Any, phi: Any) -> tuple[Any, Any]:
    """Returns update and slow weight: at a sync phi moves towards p + u by alpha."""
    if u is None or not is_inexact(phi):
        return _without_slow_step(sync, p, u, phi)
    g = pseudo_gradient(p, u, phi)
    if is_wider(phi, p):
        return _sync_wide(sync, p, u, phi, jnp.asarray(-alpha, g.dtype) * g)
    finite = is_finite(g)
    # Not `g - alpha * g`, which rounds twice.
    back = jnp.asarray(1 - alpha, g.dtype) * jnp.where(finite, g, jnp.zeros_like(g))
    step = jnp.asarray(u, g.dtype) + back
    if isinstance(alpha, jax.Array) or alpha == 0:
        # If alpha is 0, `u + g` would miss phi by a rounding error of u at every sync.
        to_phi = jnp.asarray(phi, g.dtype) - jnp.asarray(p, g.dtype)
        step = jnp.where((alpha == 0) & finite, to_phi, step)
    return _sync(sync, p, u, phi, step)


def add_slow_update(
    sync: Any,
    p: Any,
    u: Any,
    phi: Any,
    pseudo_grad: Any,
    finite: Any,
    slow_update: Any,
) -> tuple[Any, Any]:
    """Returns update and slow weight: at a sync phi moves by `slow_update`."""
    if u is None or not is_inexact(phi):
        return _without_slow_step(sync, p, u, phi)
    # No step where the pseudo-gradient is not finite: weight decay would turn an entry
    # that is infinite by design into NaN.
    slow_update = jnp.where(finite, slow_update, jnp.zeros_like(slow_update))
    if is_wider(phi, p):
        return _sync_wide(sync, p, u, phi, slow_update)
    dtype = pseudo_grad.dtype
    step = pseudo_grad + jnp.asarray(slow_update, dtype)
    return _sync(sync, p, u, phi, jnp.asarray(u, dtype) + step)


def _sync(sync: Any, p: Any, u: Any, phi: Any, step: Any) -> tuple[Any, Any]:
    """Returns update and slow weight where a sync adds `step` to the parameter."""
    # Not `u + sync * ...`: on other steps an inf or NaN in `step` must not change u.
    u = jnp.where(sync, jnp.asarray(step, jnp.result_type(u)), u)
    # From the new update, so that the compiler can write both in place, and added as
    # the loop adds it, so that parameter and slow weight are equal bit for bit.
    slow = jnp.asarray(optax.apply_updates(p, u), phi.dtype)
    return u, jnp.where(sync & is_finite(slow), slow, phi)


def _sync_wide(
    sync: Any, p: Any, u: Any, phi: Any, slow_update: Any
) -> tuple[Any, Any]:
    """Returns update and slow weight where the slow weight has more bits than p."""
    slow = phi + jnp.asarray(slow_update, phi.dtype)
    slow = jnp.where(sync & is_finite(slow, p), slow, phi)
    # From the new slow weight, so that this can be written in place first.
    step = _round_like(slow, p) - jnp.asarray(p, phi.dtype)
    step = jnp.asarray(step, jnp.result_type(u))
    return jnp.where(sync & is_finite(step), step, u), slow


def _without_slow_step(sync: Any, p: Any, u: Any, phi: Any) -> tuple[Any, Any]:
    """Returns update and slow weight of a frozen or discrete leaf: phi follows p."""
    if u is None:
        return None, cycle_start(sync, p, phi)
    slow = jnp.asarray(optax.apply_updates(p, u), phi.dtype)
    return u, jnp.where(sync, slow, phi)


def is_wider(x: Any, y: Any) -> bool:
    """Returns whether the floats of x have more bits of precision than those of y."""
    if not (is_inexact(x) and is_inexact(y)):
        return False
    return jnp.finfo(jnp.result_type(x)).nmant > jnp.finfo(jnp.result_type(y)).nmant


def _round_like(x: Any, p: Any) -> Any:
    """Returns x rounded to the bits that p has, in its own dtype."""
    if jnp.iscomplexobj(x):
        return jax.lax.complex(_round_like(x.real, p), _round_like(x.imag, p))
    # Not `astype` to p's dtype and back, which compilers may remove.
    bits = jnp.finfo(x.dtype).nexp, jnp.finfo(jnp.result_type(p)).nmant
    return jax.lax.reduce_precision(x, *bits)
