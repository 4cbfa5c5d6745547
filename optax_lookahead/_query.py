"""Finding the slow weights in any nested optimizer state."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jax.tree_util import all_leaves

from ._checks import (
    check_known,
    check_leaf,
    check_unstacked,
    describe_path,
    describe_state,
)
from ._extrapolation import ExtrapolationState, evaluation_point
from ._slow_memory import to_device
from ._slow_weights import cycle_start
from ._state import LookaheadState, copy, is_finite, is_inexact


def slow_params(
    opt_state: optax.OptState, params: optax.Params, *, wide: bool = False
) -> optax.Params:
    """Returns the slow weights, the ones to evaluate and to save.

    Within a cycle they are those in the state; at the start of a cycle, and so right
    after a sync, they are `params`:

        phi = params if steps_since_sync == 0 else state.slow_params

    With `ema_nesterov` and `primal_averaging` they are theta and x, computed from the
    parameters and the state:

        params - state.coefficient * state.direction

    If one of these is the outer optimizer of an `outer_loop`, phi takes the place of
    `params` there. The state may be at any depth in tuples, lists, dicts and other
    pytrees, as Optax's wrappers nest it. Of nested lookaheads the outermost is used;
    several with disjoint parameters, as under `optax.partition`, are merged. The vector
    of `optax.flatten` is unflattened, and the pairs of real arrays that
    `optax.contrib.split_real_and_imaginary` makes are joined.

    Args:
      opt_state: State of the optimizer, from its `init` or `update`.
      params: The loop's parameters, to which that state belongs: a tree of arrays of
        any shapes and dtypes.
      wide: Whether to return the slow copy in its own dtype, with the bits that a
        `slow_dtype` keeps, rather than in that of the parameters.

    Returns:
      A tree like `params`, with wider dtypes if `wide`. Parameters without a slow copy,
      as under `optax.masked`, are returned as they are.

    Raises:
      ValueError: If `opt_state` holds no lookahead state or none with a slow copy, if
        two of them have a slow copy of the same parameter, if `params` has another
        tree or other shapes, such as a leaf that `init` never saw, or if a wrapper
        flattened only a part of it.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from optax_lookahead import lookahead, slow_params
      >>> tx = optax.chain(optax.clip(1.0), lookahead(optax.sgd(0.5), k=2))
      >>> params = {"w": jnp.array([4.0])}
      >>> opt_state = tx.init(params)
      >>> for _ in range(3):
      ...     updates, opt_state = tx.update(params, opt_state, params)
      ...     params = optax.apply_updates(params, updates)
      ...     print(params["w"], slow_params(opt_state, params)["w"])
      [3.5] [4.]
      [3.5] [3.5]
      [3.] [3.5]

    References:
      Zhang, Lucas, Hinton, Ba, [Lookahead Optimizer: k steps forward, 1 step
      back](https://arxiv.org/abs/1907.08610), 2019, Algorithm 1, which returns phi.
    """
    states = outermost_states(opt_state, (LookaheadState, ExtrapolationState))
    # By path, since `optax.masked` leaves out leaves and whole branches.
    leaves, treedef = jax.tree.flatten_with_path(params)
    slow = dict(leaves)
    seen, masks = set(), []
    for state in states:
        if isinstance(state, ExtrapolationState):
            _extrapolate_back(slow, state, params, seen, wide=wide)
            masks += masked_paths(state.direction)
            continue
        masks += masked_paths(state.slow_params)
        # The leaf, since `nnx.Optimizer` wraps it in a variable, and `==` compares
        # variables as objects.
        (steps_since_sync,) = jax.tree.leaves(state.steps_since_sync)
        check_unstacked(steps_since_sync)
        start = steps_since_sync == 0
        on_device = jax.tree.map(to_device, state.slow_params)
        for path, phi in jax.tree.leaves_with_path(in_tree_of(params, on_device)):
            see(path, seen)
            check_leaf(path, slow, phi)
            p = slow[path]
            if wide:
                slow[path] = cycle_start(start, p, phi)
            elif is_inexact(phi) or not is_inexact(p):
                held = jnp.asarray(phi, jnp.result_type(p))
                slow[path] = jnp.where(start & is_finite(p), p, held)
            # Otherwise the loop turned integers into floats; phi has truncated them.
        within = set()
        for outer in _states(state.outer_state, (ExtrapolationState,)):
            _extrapolate_back(slow, outer, params, within, wide=wide)
    if leaves and not seen:
        raise ValueError(
            "`opt_state` must hold a slow copy of at least one parameter, got a "
            "lookahead state without any. Check the mask or the labels around it."
        )
    check_known(slow, seen, masks)
    return jax.tree.unflatten(treedef, [slow[path] for path, _ in leaves])


def is_lookahead_state(node: Any) -> bool:
    """Returns whether a node of a tree is the state of a lookahead."""
    return isinstance(node, LookaheadState)


def outermost_states(
    opt_state: optax.OptState, types: tuple[type, ...] = (LookaheadState,)
) -> list[Any]:
    """Returns the outermost states of these types, and raises if there are none."""
    states = _states(opt_state, types)
    if not states:
        raise ValueError(
            "`opt_state` must hold the state of a lookahead, got a "
            f"{describe_state(opt_state)} without one. Pass the state that the "
            "optimizer's `init` or `update` returned."
        )
    return states


def _states(tree: Any, types: tuple[type, ...]) -> list[Any]:
    def is_state(node: Any) -> bool:
        return isinstance(node, types)

    return list(filter(is_state, jax.tree.leaves(tree, is_leaf=is_state)))


def _extrapolate_back(
    slow: dict[Any, Any],
    state: ExtrapolationState,
    params: Any,
    seen: set[Any],
    *,
    wide: bool,
) -> None:
    """Replaces leaves of `slow` by the weights that they were extrapolated from."""
    (coefficient,) = jax.tree.leaves(state.coefficient)
    check_unstacked(coefficient, "coefficient")
    for path, d in jax.tree.leaves_with_path(in_tree_of(params, state.direction)):
        see(path, seen)
        check_leaf(path, slow, d)
        point = evaluation_point(slow[path], coefficient, d)
        slow[path] = point if wide else point.astype(jnp.result_type(slow[path]))


def see(path: Any, seen: set[Any]) -> None:
    """Adds the path, and raises if it is there already."""
    if path in seen:
        raise ValueError(
            "`opt_state` must hold one slow copy of each parameter, got two of "
            f"{describe_path(path)}. Pass the sub-state that you want."
        )
    seen.add(path)


def masked_paths(slow: Any) -> list[Any]:
    """Returns the paths of parameters and branches that a mask or a label left out."""

    def is_masked(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode)

    nodes = jax.tree.leaves_with_path(slow, is_leaf=is_masked)
    return [path for path, node in nodes if is_masked(node)]


def in_tree_of(params: Any, slow: Any) -> Any:
    """Returns `slow` in the tree of `params`, which a wrapper may have changed."""
    slow = merged(slow)
    if not all_leaves([slow]) or all_leaves([params]):
        return slow
    # `optax.flatten` made one vector of the parameters, or of real and imaginary parts.
    wide = jax.tree.map(lambda p: copy(p, slow.real.dtype), params)
    for whole in (wide, jax.tree.map(split, wide)):
        vector, unravel = ravel_pytree(whole)
        if vector.shape == slow.shape:
            return merged(unravel(slow.astype(vector.dtype)))
    raise ValueError(
        "`opt_state` must hold slow weights of the tree `params`, got one vector of "
        f"shape {slow.shape}, where `params` has {vector.size} numbers. A wrapper "
        "made it, such as `optax.flatten` of a part of the parameters inside "
        "`optax.masked` or `optax.partition`, or the state belongs to other "
        "parameters. Call `slow_params` on the state of that wrapper, with that part "
        "of `params`."
    )


@functools.cache
def _split_complex_type() -> Any:
    """Returns the type of what `split_real_and_imaginary` makes of a complex array."""
    # Optax does not export this type.
    split = optax.contrib.split_real_and_imaginary(optax.trace(0.0))
    state: Any = split.init(jnp.zeros([], jnp.complex64))
    return type(state.inner_state.trace)


def split(p: Any) -> Any:
    """Returns what `split_real_and_imaginary` makes of a parameter."""
    return _split_complex_type()(p.real, p.imag) if jnp.iscomplexobj(p) else p


def is_split(node: Any) -> bool:
    """Returns whether a node of a tree is a complex array as a pair of real ones."""
    return isinstance(node, _split_complex_type())


def merged(tree: Any) -> Any:
    """Returns the tree with complex arrays in place of pairs of real ones."""
    return jax.tree.map(
        lambda x: jax.lax.complex(*x) if is_split(x) else x, tree, is_leaf=is_split
    )
