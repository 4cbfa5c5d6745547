"""Changes to a state outside `update`, after which it is still consistent."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from ._checks import check_known, check_leaf, check_transformation, describe_state
from ._inner_state import moments
from ._query import (
    in_tree_of,
    is_lookahead_state,
    is_split,
    masked_paths,
    merged,
    outermost_states,
    see,
    split,
)
from ._slow_memory import to_device, to_memory_of
from ._slow_weights import cycle_start
from ._state import LookaheadState, copy


def set_slow_params(opt_state: optax.OptState, params: optax.Params) -> Any:
    """Makes the given weights the slow weights, also within a cycle.

    Use it for parameters that the training loop overwrites: a head that is reset,
    adapters that are merged, the best weights reloaded. Otherwise the next sync partly
    undoes the change: `lookahead` moves the parameters back by `1 - alpha` of the
    distance to their values at the start of the cycle. At the start of a cycle nothing
    has to be done: there the slow weights are the parameters that the next update is
    given.

    The counters do not change: the cycle of the other parameters continues, groups
    and replicas still sync at the same steps as each other, and the next sync of the
    given parameters covers only the steps from here on.

    Args:
      opt_state: State of the optimizer, with lookahead states at any depth, nested
        ones too, as in `slow_params`; all of them are changed. Also the `opt_state` of
        an `nnx.Optimizer`, or a stack of states with a stack of parameters.
      params: The new values, a tree of arrays of any shapes and dtypes with the paths
        that they have in the loop's parameters; other parameters may be left out or
        None. Elements that are not finite are ignored, and a slow weight of a wider
        `slow_dtype` does not change where the given value is its rounding.

    Returns:
      The state with those slow weights, of the same tree, shapes and dtypes.

    Raises:
      ValueError: If `opt_state` holds no lookahead state; if it holds no slow copy of a
        parameter that no mask leaves out, one of another shape, or two that are not
        nested, as in the states of two models; or if only a part is given of the
        parameters that `optax.flatten` joined into a vector.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from optax_lookahead import lookahead, set_slow_params
      >>> tx = lookahead(optax.sgd(0.5), k=2)
      >>> params = {"body": jnp.array([4.0]), "head": jnp.array([4.0])}
      >>> grads = {"body": jnp.array([1.0]), "head": jnp.array([0.0])}
      >>> opt_state = tx.init(params)
      >>> updates, opt_state = tx.update(grads, opt_state, params)
      >>> params = optax.apply_updates(params, updates)
      >>> params["head"] = jnp.array([0.0])  # in mid-cycle
      >>> opt_state = set_slow_params(opt_state, {"head": params["head"]})
      >>> updates, opt_state = tx.update(grads, opt_state, params)
      >>> params = optax.apply_updates(params, updates)
      >>> print(params["body"], params["head"])  # without it the head would be 2.0
      [3.5] [0.]
    """
    given = dict(jax.tree.leaves_with_path(params))
    taken: set[Any] = set()
    masks: list[Any] = []

    def with_new(slow: Any, seen: set[Any]) -> Any:
        in_place = in_tree_of(params, slow)
        masks.extend(masked_paths(slow))

        def leaf(path: Any, phi: Any) -> Any:
            if path not in given:
                return phi
            see(path, seen)
            return cycle_start(True, check_leaf(path, given, phi), phi)

        new = jax.tree.map_with_path(leaf, in_place)
        if jax.tree.structure(in_place) != jax.tree.structure(merged(slow)):
            return _vector(new, slow)
        return jax.tree.map(
            lambda old, x: split(x) if is_split(old) else x, slow, new, is_leaf=is_split
        )

    def everywhere(tree: Any) -> Any:
        seen: set[Any] = set()  # here, as nested states may hold the same parameters

        def node(x: Any) -> Any:
            if not is_lookahead_state(x):
                return x
            new = with_new(jax.tree.map(to_device, x.slow_params), seen)
            return x._replace(
                fast_state=everywhere(x.fast_state),
                slow_params=jax.tree.map(to_memory_of, x.slow_params, new),
                outer_state=everywhere(x.outer_state),
            )

        new_tree = jax.tree.map(node, tree, is_leaf=is_lookahead_state)
        taken.update(seen)
        return new_tree

    outermost_states(opt_state)  # raises if there is none
    opt_state = everywhere(opt_state)
    check_known(given, taken, masks)
    return opt_state


def with_inner_state(
    tx: optax.GradientTransformation,
    state: LookaheadState,
    inner_state: optax.OptState,
) -> LookaheadState:
    """Puts a state of the inner optimizer into the state of a lookahead.

    It works for every `inner_state`: under `"interpolate"` the state also holds the
    moments of the last sync, for which it takes those in `inner_state`. For example,
    in mid-training:

        state = with_inner_state(tx, tx.init(params), inner_state)     # lookahead on
        state = with_inner_state(new_tx, state, state.fast_state)      # another value
        state = with_inner_state(new_tx, state, new_inner.init(params))

    In the last line `new_tx` has another inner optimizer. Slow weights and counters do
    not change, so the cycle continues.

    Args:
      tx: The transformation, from `lookahead` or `outer_loop`, to make a state of.
      state: The state to take slow weights, counters and outer state from: of `tx`, or
        of a transformation that differs from it in `inner` and `inner_state` only.
      inner_state: State of the inner optimizer of `tx`, from its `init`, its `update`
        or a checkpoint.

    Returns:
      A state of `tx`, which holds the arrays of `inner_state` and copies of its moments
      where `inner_state` needs them.

    Raises:
      TypeError: If `tx` is not a gradient transformation from `lookahead` or
        `outer_loop`, or `state` is not a `LookaheadState`.
      ValueError: If the leaves of `inner_state` or of the outer state have other shapes
        than those of `tx`, or if the state of `inner` cannot be interpolated.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from optax_lookahead import lookahead, with_inner_state
      >>> adam, params = optax.adam(0.1), jnp.array([1.0])
      >>> adam_state = adam.init(params)
      >>> for _ in range(3):
      ...     updates, adam_state = adam.update(params, adam_state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> tx = lookahead(adam, inner_state="interpolate")
      >>> state = with_inner_state(tx, tx.init(params), adam_state)
      >>> print(state.fast_state[0].count, state.anchor[0] == adam_state[0].mu)
      3 [ True]
    """
    check_transformation("tx", tx, "lookahead(optax.adam(1e-3))")
    if not isinstance(state, LookaheadState):
        raise TypeError(
            "`state` must be a `LookaheadState` of `optax_lookahead`, got a "
            f"{describe_state(state)}. Pass the part of the optimizer's state that "
            "belongs to the lookahead."
        )

    def init(slow_params: optax.Params) -> Any:
        return tx.init(jax.tree.map(to_device, slow_params))

    expected: Any = jax.eval_shape(init, state.slow_params)
    if not isinstance(expected, LookaheadState):
        raise TypeError(
            "`tx` must be what `lookahead` or `outer_loop` returned, got one whose "
            f"state is a {describe_state(expected)}. Pass the lookahead in it, with "
            "the part of the state that belongs to it."
        )
    _check_shapes(
        "`inner_state` must be a state of the inner optimizer of `tx`",
        inner_state,
        expected.fast_state,
        "Pass what `init` or `update` of that optimizer returned.",
    )
    _check_shapes(
        "`state` must hold a state of the outer optimizer of `tx`",
        state.outer_state,
        expected.outer_state,
        "Pass `tx.init(params)`, or that with the slow weights and the counters of "
        "the old state.",
    )
    anchor = expected.anchor
    if not isinstance(anchor, optax.EmptyState):

        def init_inner(params: optax.Params) -> optax.OptState:
            lookahead_state: Any = tx.init(params)
            return lookahead_state.fast_state

        anchor = jax.tree.map(copy, moments(init_inner, inner_state))
    return state._replace(fast_state=inner_state, anchor=anchor)


def _vector(tree: Any, slow: Any) -> Any:
    """Returns the vector that `optax.flatten` makes of the tree, split if complex."""
    for whole in (tree, jax.tree.map(split, tree)):
        vector, _ = ravel_pytree(whole)
        if vector.shape == jnp.shape(slow):
            break
    return vector.astype(slow.dtype)


def _check_shapes(rule: str, given: Any, expected: Any, remedy: str) -> None:
    # Not the trees, since the states of an `nnx.Optimizer` hold its variables.
    got, wanted = (
        [jnp.shape(x) for x in jax.tree.leaves(tree)] for tree in (given, expected)
    )
    if got != wanted:
        raise ValueError(
            f"{rule}, got leaves of the shapes {got} instead of {wanted}. {remedy}"
        )
