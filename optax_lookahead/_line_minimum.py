"""A slow step that is chosen at every sync, from the curvature along it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from ._line import least, slope_and_curve, sum_dtype
from ._results import check_like, is_masked
from ._state import InnerStep
from ._validation import check_inner_step, check_number, describe_path, varying_axes


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
    ones theta:

        d       = theta_{t,k} - phi_{t-1}
        alpha*  = 1 - g.d / (d.A d), clipped        g: gradient at theta_{t,k}
        phi_t   = phi_{t-1} + alpha* d

    Still descending at theta (g.d < 0) alpha* is above 1, after an overshoot below.
    Unless told the gradient at theta, it goes on from the last one, by the model:
    g = grads + A * updates, of the inner step that ends the cycle. Where the model
    has no minimum, as d.A d <= 0, the better one of the two bounds is taken, at
    d = 0 `max_alpha`; where g.d or d.A d is not finite, `min_alpha`.

    g.d and d.A d are sums over all parameters, in float32 or wider, computed at a sync
    only (under `jax.vmap`, in every step). Where the parameters are split over devices,
    they are added up across devices: an all-reduce of a few scalars.

    What `update` is given counts as the gradient. Where it is another thing, pass the
    gradient as the extra argument `grad`, of the mean loss at the parameters in hand:
    with a scaled loss, with gradients that a link before `outer_loop` has clipped, or
    under `jax.pmap` and `jax.shard_map` with a mean over devices inside `inner`. Of
    these, gradients of another shape are refused, such as one for each example, and
    those that JAX knows to differ between devices; `jax.pmap` does not know, and there
    the devices would part.

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
      around it takes two optional arguments: `grad`, the gradient at the parameters
      in hand, as Optax's line searches take it, in place of what `inner` is given; and
      `grad_fn`, a function from parameters to gradients, which wins over it. It is
      called at theta and only at a sync: one more gradient in k steps (under
      `jax.vmap`, in every step). Its parameters have the dtypes of the slow weights,
      with `optax.MaskedNode` for leaves that are neither floating nor complex. In a
      dict `outer_args` either reaches `line_minimum` alone.

    Raises:
      TypeError: If `curvature` is not callable, or a static bound no real number.
      ValueError: If static bounds are not finite or not in order, or either is an array
        that is not a scalar. `update` raises it outside an `outer_loop`, if the
        gradients have other shapes than the parameters or differ between devices where
        those do not, or if `curvature` or `grad_fn` returns another tree or shapes.

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
      Zhang, Lucas, Hinton, Ba, [Lookahead Optimizer: k steps forward, 1 step
      back](https://arxiv.org/abs/1907.08610), 2019, Proposition 1, which has the
      minimiser theta - A^-1 g of the model in place of g.
    """
    _check_curvature(curvature)
    _check_alpha_range(min_alpha, max_alpha)

    def init_fn(params: optax.Params) -> LineMinimumState:
        return LineMinimumState(jnp.ones([], sum_dtype(params)))

    def update_fn(
        updates: optax.Updates,
        state: LineMinimumState,
        params: Any = None,
        *,
        inner_step: Any = None,
        grad: Any = None,
        grad_fn: Callable[[Any], Any] | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, LineMinimumState]:
        del state, extra_args
        check_inner_step(inner_step, InnerStep, "line_minimum(curvature)")
        given = _given_grads(updates, inner_step, grad)
        if grad_fn is not None:
            _check_grad_fn(grad_fn)

        def at_a_sync() -> tuple[jax.Array, jax.Array]:
            # Only scalars leave the branch: XLA copies what passes through it.
            grads = given
            if grad_fn is not None:
                theta = optax.tree.sub(params, updates)
                grads = check_like("grad_fn", grad_fn(theta), updates)
            diagonal = check_like("curvature", curvature(inner_step.state), updates)
            steps = _like(updates, inner_step.updates)
            sums = slope_and_curve(
                updates, steps, grads, diagonal, is_at_theta=grad_fn is not None
            )
            _check_same_on_devices(sums, updates)
            return sums

        slope, curve = _only_at(inner_step.sync, at_a_sync, updates)
        alpha = least(slope, curve, min_alpha, max_alpha)
        updates = jax.tree.map(lambda g: jnp.asarray(-alpha * g, g.dtype), updates)
        return updates, LineMinimumState(alpha)

    # As in `_cycle.py`.
    return optax.GradientTransformationExtraArgs(
        init_fn,
        update_fn,  # pyright: ignore[reportArgumentType]
    )


def _only_at(sync: Any, sums: Callable[[], Any], updates: Any) -> Any:
    """Returns the sums at a sync, and zeros on other steps, without computing any."""
    zero = jnp.zeros([], sum_dtype(updates))
    for g in jax.tree.leaves(updates):
        if varying_axes(g):  # As varying as the sums, or JAX refuses the branches.
            zero = jnp.where(True, zero, jnp.sum(g.real.ravel()[:1]).astype(zero.dtype))
    if not isinstance(sync, Tracer):
        return sums() if sync else (zero, zero)
    # This one choice is not made by `where`: the sums read all that there is.
    return jax.lax.cond(sync, sums, lambda: (zero, zero))


def _like(updates: Any, tree: Any) -> list[Any]:
    """Returns the leaves of a tree for each pseudo-gradient, hidden or not."""
    return jax.tree.structure(updates, is_leaf=is_masked).flatten_up_to(tree)


def _given_grads(updates: Any, inner_step: InnerStep, grad: Any) -> list[Any]:
    """Returns the gradients of the last inner step, as far as they can be told."""
    grads = _like(updates, inner_step.grads if grad is None else grad)
    leaves = jax.tree.leaves_with_path(updates, is_leaf=is_masked)
    for (path, h), g in zip(leaves, grads, strict=True):
        if not is_masked(h) and g is not None and jnp.shape(g) != jnp.shape(h):
            raise ValueError(
                "`updates` must be gradients with the shapes of the parameters, got "
                f"shape {jnp.shape(g)} at {describe_path(path)}, where they have "
                f"{jnp.shape(h)}. Tell `line_minimum` the gradient: "
                "`update(updates, state, params, grad=grads)`."
            )
    return grads


def _check_same_on_devices(sums: Any, updates: Any) -> None:
    """Raises if devices with the same parameters would take different steps."""
    varying = varying_axes(sums[0]) | varying_axes(sums[1])
    known = [varying_axes(g) for g in jax.tree.leaves(updates)]
    varying = varying.difference(*known)
    if varying:
        raise ValueError(
            "`updates` must be the gradient of the whole batch, got one that varies "
            f"over {sorted(varying)}, where the parameters do not. Tell `line_minimum` "
            "the mean: `update(updates, state, params, grad=jax.lax.pmean(grads, "
            "axis_name))`."
        )


def _check_curvature(curvature: Any) -> None:
    """Raises unless `curvature` can be called."""
    if not callable(curvature):
        raise TypeError(
            "`curvature` must be a function from the inner optimizer's state to a tree "
            f"like the parameters, got {curvature!r}. Write for example "
            "`line_minimum(adam_curvature())`."
        )


_LARGEST = float(jnp.finfo(jnp.float32).max)


def _check_alpha_range(min_alpha: Any, max_alpha: Any) -> None:
    """Raises unless the bounds are in order, as far as they are static."""
    bounds = [
        check_number(name, value, "Write for example `min_alpha=0.2, max_alpha=1.0`.")
        for name, value in (("min_alpha", min_alpha), ("max_alpha", max_alpha))
    ]
    known = [value for value in bounds if value is not None]
    in_order = known == sorted(known)
    # NaN too, and what would be an infinity in float32.
    if not (in_order and all(0 <= value <= _LARGEST for value in known)):
        raise ValueError(
            "`min_alpha` and `max_alpha` must be finite with 0 <= min_alpha <= "
            f"max_alpha, got {min_alpha!r} and {max_alpha!r}. Write for example "
            "`min_alpha=0.2, max_alpha=1.0`."
        )


def _check_grad_fn(grad_fn: Any) -> None:
    """Raises unless `grad_fn` can be called."""
    if not callable(grad_fn):
        raise TypeError(
            "`grad_fn` must be a function from parameters to gradients, got "
            f"{grad_fn!r}. Write for example `grad_fn=jax.grad(loss)`."
        )
