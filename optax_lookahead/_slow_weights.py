"""One parameter in its cycle: where it set out, the way back there, and the landing.

`set_out` decides by the kind of the parameter what all three mean for it; a class
stands for each kind. Only elements that are finite set out or land: where a step blew
up, the slow weight stays as it was.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ._slow_step import OuterUpdate, SlowUpdate
from ._state import common_dtype, is_finite, is_inexact, select


def set_out(p: Any, start: Any, u: Any, slow: Any) -> "Way":
    """Returns the way of one parameter in its cycle.

    Args:
      p: The parameter before the step, which is the fast weight.
      start: Whether this is the first step of the cycle, dtype=bool.
      u: Its update by the inner optimizer, or None if there is none.
      slow: The slow weight in the state, whose dtype says of which kind it is.
    """
    if u is None:
        kind = Still
    elif not is_inexact(slow):
        kind = Discrete
    elif is_wider(slow, p):
        kind = Wider
    else:
        kind = AsWide
    return kind(p, u, phi_of_cycle(start, p, slow))


def phi_of_cycle(start: Any, p: Any, slow: Any) -> Any:
    """Returns the slow weight that the cycle set out from."""
    # Not the state's alone: since the last sync the loop may have loaded, clipped or
    # projected its parameters, and what it holds is what a cycle starts from.
    start &= is_finite(p, p)
    held = jnp.asarray(p, slow.dtype)
    if is_wider(slow, p):
        # Unless it holds the slow weight, as well as its dtype can: near zero, where
        # float16 runs out of exponents, less well than its eps says.
        narrow = jnp.finfo(jnp.result_type(p))
        least = jnp.maximum(jnp.abs(slow), float(narrow.tiny))
        one_rounding = float(narrow.eps) * least
        finite = is_finite(slow, slow)
        way = jnp.where(start, held, 0) - jnp.where(finite, slow, 0)
        start &= ~(finite & (jnp.abs(way) <= one_rounding))
    return jnp.where(start, held, slow)


class Way:
    """How far one parameter went from phi, and how it lands there or elsewhere.

    No pytree, so a tree of these has the parameters' own structure.
    """

    def __init__(self, p: Any, u: Any, phi: Any):
        self.p, self.u, self.phi = p, u, phi
        # phi minus the fast weight, with the sign of a gradient; 0 where not finite.
        self.pseudo_grad: Any = optax.MaskedNode()
        # Which elements have a finite fast weight and a finite way back.
        self.finite: Any = optax.MaskedNode()

    def arrives(self, step: SlowUpdate) -> Any:
        """Returns which elements get from there to a finite weight."""
        if isinstance(self.finite, optax.MaskedNode):
            return self.finite
        finite = self.finite if step.reached is None else step.reached
        return step.only_finite(finite, self.phi, self.p)

    def land(self, sync: Any, step: SlowUpdate) -> "Landing":
        """Returns where a slow step takes the parameter, if this is a sync."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Landing:
    """The update and the slow weight of one parameter. No pytree either."""

    update: Any
    slow: Any


class AsWide(Way):
    """The slow weight has its parameter's dtype, and the slow step is added to `u`."""

    def __init__(self, p: Any, u: Any, phi: Any):
        super().__init__(p, u, phi)
        self.pseudo_grad, self.finite = _way_back(p, u, phi)

    def land(self, sync: Any, step: SlowUpdate) -> Landing:
        p, u, phi = self.p, self.u, self.phi
        back = step.from_fast(self.pseudo_grad)
        there = _added(p, jnp.asarray(u, back.dtype) + back)
        arrives = is_finite(there, p)
        if isinstance(step, OuterUpdate):  # which may move what it was given 0 for
            arrives &= self.finite
        # Masked here, not in the condition: that would be an array, and a copy of `u`.
        landing = jnp.asarray(u, back.dtype) + jnp.where(arrives, back, 0)
        # As it is stored: the loop adds an update of this dtype. And not
        # `u + sync * ...`: on other steps u must pass next to inf and NaN.
        u = jnp.where(sync, jnp.asarray(landing, jnp.result_type(u)), u)
        # From the new update, which says as well what is finite, so that the compiler
        # can write updates and slow weights in place, one after the other; and added
        # as the loop adds it, so that both agree in every bit.
        slow = jnp.asarray(optax.apply_updates(p, u), phi.dtype)
        # Finite only if both are, and masked where they are equal: infinities may be.
        way = phi - jnp.where(slow == phi, 0, slow)
        lands = sync & step.only_finite(is_finite(way, p), phi, p)
        if step.reached is not None:
            # Where the fast weight is not finite, others' may be.
            moved = phi + jnp.asarray(step.from_slow(self.pseudo_grad), phi.dtype)
            phi = jnp.where(sync & self.arrives(step), moved, phi)
        return Landing(u, jnp.where(lands, slow, phi))


class Wider(Way):
    """The slow weight has more bits than its parameter, and is itself what moves."""

    def __init__(self, p: Any, u: Any, phi: Any):
        super().__init__(p, u, phi)
        # The fast weight set out from the rounding. Counted from phi, its way would
        # begin with that, and every cycle would pull phi back onto what p can hold.
        self.pseudo_grad, self.finite = _way_back(p, u, _rounded_like(p, phi))

    def land(self, sync: Any, step: SlowUpdate) -> Landing:
        p, u, phi = self.p, self.u, self.phi
        back = jnp.asarray(step.from_slow(self.pseudo_grad), phi.dtype)
        arrives = self.arrives(step) & is_finite(phi + back, p)
        slow = jnp.where(sync, phi + jnp.where(arrives, back, 0), phi)
        # From one weight that `p` can hold to another: mostly, so can the step. And
        # from the new slow weight, which can thus be written in place first.
        arrives = is_finite(_added(p, u), p) & is_finite(slow, p)
        arrives = step.only_finite(arrives, slow, p)
        rounded = jnp.where(arrives, _rounded_like(p, slow), 0)
        update = rounded - jnp.asarray(p, phi.dtype)
        return Landing(select(sync & arrives & is_finite(update, u), update, u), slow)


class Discrete(Way):
    """Nothing lies between two values: it takes the inner step, and phi follows."""

    def land(self, sync: Any, step: SlowUpdate) -> Landing:
        del step
        slow = jnp.asarray(optax.apply_updates(self.p, self.u), self.phi.dtype)
        return Landing(self.u, jnp.where(sync, slow, self.phi))


class Still(Way):
    """Without an update, Equinox's way of saying that this parameter stays."""

    def __init__(self, p: Any, u: Any, phi: Any):
        super().__init__(p, u, phi)
        if is_inexact(phi):
            self.pseudo_grad = jnp.zeros_like(phi)
            self.finite = jnp.ones(jnp.shape(phi), bool)

    def land(self, sync: Any, step: SlowUpdate) -> Landing:
        del step
        return Landing(None, phi_of_cycle(sync, self.p, self.phi))


def is_wider(slow: Any, p: Any) -> bool:
    """Returns whether the slow weight has bits that the parameter cannot hold."""
    if not (is_inexact(slow) and is_inexact(p)):
        return False
    eps = [float(jnp.finfo(jnp.result_type(x)).eps) for x in (slow, p)]
    return eps[0] < eps[1]


def _way_back(p: Any, u: Any, phi: Any) -> tuple[Any, Any]:
    """Returns phi less the fast weight, and for which elements it is finite."""
    dtype = common_dtype(u, phi)
    theta, phi = _added(p, u, dtype), jnp.asarray(phi, dtype)
    finite = is_finite(theta, p)
    # Masked before, too: the difference of two infinities is a NaN, which
    # `jax_debug_nans` would find. Less 0, an infinite phi stays one.
    way = phi - jnp.where(finite, theta, 0)
    finite &= is_finite(way, way)
    return jnp.where(finite, way, 0), finite


def _added(p: Any, u: Any, dtype: Any = None) -> Any:
    """Returns p + u, before it is rounded to what `p` can hold."""
    if dtype is None:
        dtype = common_dtype(p, u)
    return jnp.asarray(p, dtype) + jnp.asarray(u, dtype)


def _rounded_like(p: Any, phi: Any) -> Any:
    """Returns phi as closely as `p` can hold it, in its own dtype."""
    if jnp.iscomplexobj(phi):
        return jax.lax.complex(*(_rounded_like(p, x) for x in (phi.real, phi.imag)))
    # Not there and back by `astype`, which compilers may leave out.
    bits = jnp.finfo(phi.dtype).nexp, jnp.finfo(jnp.result_type(p)).nmant
    return jax.lax.reduce_precision(phi, *bits)
