"""A slow step that is chosen at every sync, from the curvature along it."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ._state import FastSide
from ._validation import (
    check_adam_curvature,
    check_alpha_range,
    check_curvature,
    check_fast,
    check_grad_fn,
    check_like,
    check_one_adam,
    is_masked,
)


class LineMinimumState(NamedTuple):
    """State of `line_minimum`.

    Attributes:
      alpha: The slow step size of the last sync; 1 before the first.
    """

    alpha: jax.typing.ArrayLike  # shape=(), dtype=float32, or float64 as the params


# As for `LookaheadState`.
LineMinimumState.__module__ = "optax_lookahead"


def line_minimum(
    curvature: Callable[[optax.OptState], Any],
    min_alpha: jax.typing.ArrayLike = 0.2,
    max_alpha: jax.typing.ArrayLike = 1.0,
) -> optax.GradientTransformationExtraArgs:
    """An outer optimizer that steps to the minimum of a quadratic model on the line.

    For `outer_loop`: at each sync it picks one step size for all parameters, the
    alpha in `[min_alpha, max_alpha]` for which a quadratic model of the loss with a
    diagonal curvature A is least on the line from the slow weights phi to the fast
    ones theta::

        d       = theta_{t,k} - phi_{t-1}
        alpha*  = 1 - g.d / (d.A d), clipped        g: gradient at theta_{t,k}
        phi_t   = phi_{t-1} + alpha* d

    Still descending at theta (g.d < 0) alpha* is above 1, after an overshoot below.
    Unless told the gradient at theta, it goes on from the last one, by the model:
    g = grads + A * updates, of the inner step that ends the cycle. Where the model
    has no minimum, as d.A d <= 0, the better one of the two bounds is taken, at
    d = 0 `max_alpha`; where g.d or d.A d is not finite, `min_alpha`.

    g.d and d.A d are sums over all parameters, in float32 or wider. They are computed
    in every step, and where the parameters are split over devices, each step adds
    them up across devices: an all-reduce of a few scalars.

    Args:
      curvature: A function from the state of the inner optimizer, after the step that
        ends the cycle, to the diagonal of A: a tree of real arrays with the shapes of
        the parameters, in units of loss / parameter^2. For Adam there is
        `adam_curvature`.
      min_alpha: Smallest step size, in `[0, max_alpha]`, without unit. Also a float
        scalar array or tracer, whose value is not checked. The paper has such a
        bound; the default is not known to be its.
      max_alpha: Largest step size, likewise. Above 1 the slow weights may go further
        than the fast ones.

    Returns:
      A `GradientTransformationExtraArgs` whose state is a `LineMinimumState`: after a
      sync, `state.outer_state.alpha` is the step size that was taken. The `update`
      around it takes an optional argument `grad_fn`, a function from parameters to
      gradients, which is called at theta and only at a sync: one more gradient in k
      steps (under `jax.vmap`, in every step). Its parameters have the dtypes of the
      slow weights, with `optax.MaskedNode` for leaves that are neither floating nor
      complex.

    Raises:
      TypeError: If `curvature` is not callable, or a static bound no real number.
      ValueError: If static bounds are not finite or not in order, or either is an array
        that is not a scalar. `update` raises it outside an `outer_loop`, or if
        `curvature` or `grad_fn` returns another tree or other shapes.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from optax_lookahead import line_minimum, outer_loop
      >>> A = jnp.array([1.0, 10.0])
      >>> loss = lambda w: 0.5 * jnp.sum(A * w**2)
      >>> outer = line_minimum(lambda state: A, min_alpha=0.0)
      >>> tx = outer_loop(optax.sgd(0.195), outer, k=5)
      >>> w = jnp.array([1.0, 1.0])
      >>> state = tx.init(w)
      >>> for step in range(1, 16):
      ...     updates, state = tx.update(jax.grad(loss)(w), state, w)
      ...     w = optax.apply_updates(w, updates)
      ...     if step % 5 == 0:
      ...         print(f"{step:2d} {loss(w):.4f} {state.outer_state.alpha:.2f}")
       5 0.1937 0.58
      10 0.0234 1.00
      15 0.0034 1.00

    References:
      Zhang, Lucas, Hinton, Ba, `Lookahead Optimizer: k steps forward, 1 step back
      <https://arxiv.org/abs/1907.08610>`_, 2019, Proposition 1, which has the
      minimiser theta - A^-1 g of the model in place of g.
    """
    check_curvature(curvature)
    check_alpha_range(min_alpha, max_alpha)

    def init_fn(params: optax.Params) -> LineMinimumState:
        return LineMinimumState(jnp.ones([], _dtype(params)))

    def update_fn(
        updates: optax.Updates,
        state: LineMinimumState,
        params: Any = None,
        *,
        fast: Any = None,
        grad_fn: Callable[[Any], Any] | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, LineMinimumState]:
        del state, extra_args
        check_fast(fast, FastSide, "line_minimum(curvature)")
        line = functools.partial(_line, updates, fast, curvature, _dtype(params))
        if grad_fn is None:
            slope, curve = line(None)
        else:
            check_grad_fn(grad_fn)

            def at_a_sync():
                # Only scalars leave the branch: XLA copies what passes through it.
                return line(grad_fn(optax.tree.sub(params, updates)))

            # This one choice is not made by `where`, since that costs a gradient.
            zero = jnp.zeros([], _dtype(params))
            slope, curve = jax.lax.cond(fast.sync, at_a_sync, lambda: (zero, zero))
        alpha = _least(slope, curve, min_alpha, max_alpha)
        updates = jax.tree.map(lambda g: jnp.asarray(-alpha * g, g.dtype), updates)
        return updates, LineMinimumState(alpha)

    # As in `_transform.py`.
    return optax.GradientTransformationExtraArgs(
        init_fn,
        update_fn,  # pyright: ignore[reportArgumentType]
    )


def adam_curvature(
    b2: jax.typing.ArrayLike = 0.999, power: jax.typing.ArrayLike = 1.0
) -> Callable[[optax.OptState], Any]:
    """Returns a curvature for `line_minimum` from the second moment that Adam keeps.

    With nu the moving average of the squared gradients, and t the steps in it::

        A = (nu / (1 - b2^t)) ** power

    At `power=1` this is the diagonal of the empirical Fisher matrix, up to the size of
    the batch; at `power=0.5` what Adam divides by. Neither knows the scale of the true
    curvature. For another one, or another optimizer, write the function yourself: for
    example, at learning rate r Adam's step is a Newton step of the curvature
    `adam_curvature(power=0.5)(state)` divided by r.

    Args:
      b2: Decay rate of nu, the one given to Adam, in [0, 1). Also a float scalar array
        or tracer, whose value is not checked.
      power: Positive exponent, without unit. Also an array or tracer, likewise.

    Returns:
      A function from an optimizer state with one `optax.ScaleByAdamState` at any depth
      (of `optax.adam`, `adamw`, `nadam`, `lamb`) to a tree like the parameters,
      in float32 or wider.

    Raises:
      TypeError: If a static `b2` or `power` is no real number.
      ValueError: If a static `b2` or `power` is out of range. The function raises it
        if the state holds no state of Adam or several.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from optax_lookahead import adam_curvature
      >>> tx = optax.adam(0.1, b2=0.99)
      >>> _, state = tx.update(jnp.array([1.0, 3.0]), tx.init(jnp.zeros(2)))
      >>> print(jnp.round(adam_curvature(b2=0.99)(state), 4))
      [1. 9.]

    References:
      Zhang, Lucas, Hinton, Ba, `Lookahead Optimizer: k steps forward, 1 step back
      <https://arxiv.org/abs/1907.08610>`_, 2019, section 2.1. Kingma, Ba, `Adam
      <https://arxiv.org/abs/1412.6980>`_, 2015.
    """
    check_adam_curvature(b2, power)

    def curvature(state: optax.OptState) -> Any:
        def is_adam(node: Any) -> bool:
            return isinstance(node, optax.ScaleByAdamState)

        # Not `optax.tree.get(state, "nu")`, which does not know whose count it needs.
        found = [x for x in jax.tree.leaves(state, is_leaf=is_adam) if is_adam(x)]
        adam = check_one_adam(found)
        nu = jax.tree.map(lambda v: jnp.real(jnp.asarray(v, _wide(v))), adam.nu)
        nu = optax.tree.bias_correction(nu, b2, adam.count)
        return jax.tree.map(lambda v: v**power, nu)

    return curvature


def _line(
    pseudo_grads: Any, fast: Any, curvature: Any, dtype: Any, grads_at_theta: Any
) -> tuple[jax.Array, jax.Array]:
    """Returns g.d and d.A d, with the gradient by the model if there is none."""
    # With the hidden leaves as leaves: in the other trees they are not hidden.
    gs, treedef = jax.tree.flatten(pseudo_grads, is_leaf=is_masked)
    grads, steps = map(treedef.flatten_up_to, (fast.grads, fast.updates))
    diagonal = check_like("curvature", curvature(fast.state), pseudo_grads)
    if grads_at_theta is not None:
        grads = check_like("grad_fn", grads_at_theta, pseudo_grads)

    slope = curve = jnp.zeros([], dtype)
    for h, g, u, a in zip(gs, grads, steps, diagonal, strict=True):
        if is_masked(h) or u is None:  # Equinox's way of saying that it stays.
            continue
        h, g, u = (jnp.asarray(x, _wide(h)) for x in (h, g, u))
        a = jnp.asarray(a, jnp.finfo(h.dtype).dtype)
        if grads_at_theta is None:
            g = g + a * u
        slope -= _dot(g, h).astype(dtype)
        curve += _dot(h, a * h).astype(dtype)
    return slope, curve


def _least(slope, curve, min_alpha, max_alpha):
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


def _dot(x, y):
    if jnp.iscomplexobj(y):
        return jnp.sum(x.real * y.real + x.imag * y.imag)
    return jnp.sum(x * y)


def _wide(x: Any) -> Any:
    return jnp.promote_types(jnp.result_type(x), jnp.float32)


def _dtype(params: Any) -> Any:
    """Returns the dtype of the sums: float32, or the widest of the parameters."""
    leaves = jax.tree.leaves(params)
    return jnp.finfo(jnp.result_type(jnp.float32, *leaves)).dtype
