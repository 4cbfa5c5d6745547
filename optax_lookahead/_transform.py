"""The update: when to sync, and what a sync does."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from . import _inner_state
from ._outer_step import step_if
from ._state import LookaheadState, copy, is_wider, select
from ._validation import (
    check_alpha,
    check_inner_state,
    check_k,
    check_outer_result,
    check_params,
    check_reserved,
    check_slow_dtype,
    check_transformation,
    check_unstacked,
    check_wide,
)


class FastSide(NamedTuple):
    """What an outer optimizer is told, as `fast`, about the end of a cycle."""

    grads: optax.Updates  # what the last inner step was given,
    updates: optax.Updates  # what it returned,
    state: optax.OptState  # and its state after that
    sync: jax.typing.ArrayLike  # whether the outer step counts; shape=(), dtype=bool


def lookahead(
    inner: optax.GradientTransformation,
    k: jax.typing.ArrayLike = 5,
    alpha: optax.ScalarOrSchedule = 0.5,
    *,
    inner_state: str = "keep",
    slow_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Lookahead around any optimizer: k steps forward, one step back.

    The parameters of the training loop are the fast weights theta; the state carries
    the slow weights phi. Every update takes one step of `inner`; every k-th one also
    moves the slow weights towards the fast ones, which restart from there::

        theta_{t,0} = phi_{t-1}
        theta_{t,i} = theta_{t,i-1} + inner(...)                    i = 1, ..., k
        phi_t       = phi_{t-1} + alpha * (theta_{t,k} - phi_{t-1})

    A cycle starts from the parameters that the first of its updates is given, so
    weights that were loaded, clipped or projected outside the optimizer count. After
    a sync, `slow_params` in the state equals the new parameters bit for bit.

    Args:
      inner: The optimizer that takes the fast steps. Extra arguments of `update` are
        forwarded to it.
      k: Inner steps in a cycle, an integer of at least 1. Also an int32 scalar array
        or tracer, whose value is not checked: below 1, every step syncs.
      alpha: Slow step size in [0, 1], without unit. Also a float scalar array or
        tracer, whose value is not checked, or a schedule: a function from the number
        of completed syncs (int32 scalar) to the step size.
      inner_state: What a sync does to the inner optimizer's state.

        - `"keep"`: nothing.
        - `"reset"`: it becomes what `inner.init` gives at the new parameters, also
          where it was NaN. What counts training time stays: the places of schedules
          for learning rate and weight decay, of `optax.inject_hyperparams` with its
          hyperparameters, of `optax.contrib.reduce_on_plateau`, of conditions on the
          step and of the annealing in `optax.add_noise`. A count that corrects the
          bias of moments starts again with them, and with it a schedule that an
          optimizer reads off that count (`optax.contrib.prodigy` does, as do `momo`
          and `dadapt_adamw`). So do random keys, whose noise then repeats itself, and
          cycles within `inner`, such as those of `optax.MultiSteps`.
        - `"interpolate"`: its floating leaves that are like the parameters, such as
          moments, move to `old + alpha * (now - old)`, with their value at the last
          sync as `old`; the others stay. The state then holds a copy of them. A
          moment that is NaN stays NaN, as under `"keep"`.
      slow_dtype: Floating dtype of the slow weights, at least as wide as those of the
        parameters, which it replaces in floating leaves. With bfloat16 parameters and
        `slow_dtype="float32"` the slow weights keep the bits that small steps need: a
        cycle starts from the slow weight unless the parameter is further from it than
        one rounding, which means that somebody changed it. The fast weights set out
        from its rounding and stay in the parameters' dtype: of updates too small for
        that they keep the last one of a cycle.

    Returns:
      A `GradientTransformationExtraArgs` whose state is a `LookaheadState`. Its
      `update` needs `params`, a tree of arrays of any shapes and dtypes, and returns
      updates in the dtypes of `inner`'s. A leaf that is neither floating nor complex
      has nothing between two values: it takes the inner step, and its slow copy
      follows at the sync.

    Raises:
      TypeError: If `inner` is no gradient transformation, a static `k` no integer,
        a static `alpha` no real number, or `slow_dtype` no floating dtype.
      ValueError: If a static `k` is below 1, a static `alpha` is outside [0, 1],
        either is an array that is not a scalar, or `inner_state` is none of the
        three. `init` raises it if `slow_dtype` is narrower than a parameter, or if
        the state of `inner` cannot be interpolated; `update` without `params`, or
        with `params` that are unlike those that `init` saw.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from optax_lookahead import lookahead
      >>> loss = lambda w: jnp.sum((w - 3.0) ** 2)
      >>> tx = lookahead(optax.sgd(0.1), k=5, alpha=0.5)
      >>> w = jnp.array([0.0, 1.0])
      >>> state = tx.init(w)
      >>> for step in range(1, 16):
      ...     updates, state = tx.update(jax.grad(loss)(w), state, w)
      ...     w = optax.apply_updates(w, updates)
      ...     if step % 5 == 0:
      ...         print(f"{step:2d} {loss(w):.4f}")
       5 5.7289
      10 2.5246
      15 1.1126

    References:
      Zhang, Lucas, Hinton, Ba, `Lookahead Optimizer: k steps forward, 1 step back
      <https://arxiv.org/abs/1907.08610>`_, 2019, Algorithm 1.
    """
    check_alpha(alpha)
    return _cycles(inner, None, k, alpha, inner_state, slow_dtype)


def outer_loop(
    inner: optax.GradientTransformation,
    outer: optax.GradientTransformation,
    k: jax.typing.ArrayLike,
    *,
    inner_state: str = "keep",
    slow_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Lets an outer optimizer take a step after every k steps of an inner one.

    It is given the way that the inner optimizer went, with the sign of a gradient, and
    the slow weights as its parameters::

        theta_{t,0} = phi_{t-1}
        theta_{t,i} = theta_{t,i-1} + inner(...)                    i = 1, ..., k
        phi_t       = phi_{t-1} + outer(phi_{t-1} - theta_{t,k})

    With `optax.sgd(alpha)` as `outer` this is `lookahead(inner, k, alpha)`, to
    rounding; with Nesterov momentum it is SNOO, and DiLoCo and MuLoCo with one worker;
    with heavy-ball momentum SlowMo, at a constant learning rate and with one worker.
    In all else, `outer_loop` is as `lookahead`.

    Args:
      inner: The optimizer that takes the fast steps. Extra arguments of `update` are
        forwarded to it.
      outer: The optimizer that takes the slow steps. It is evaluated in every step,
        and counts at a sync: its state moves only there, so a schedule inside it
        counts syncs. It sees the floating and complex leaves of
        the parameters, the others as `optax.MaskedNode`. Extra arguments of `update`
        are forwarded to it, and one is added: `fast`, a tuple with the fields `grads`
        and `updates` (of the inner step that ends the cycle), `state` (of `inner`
        after it) and `sync` (whether the outer step counts; on other steps its
        result is dropped).
      k: As in `lookahead`.
      inner_state: `"keep"` or `"reset"`, as in `lookahead`. There is no
        `"interpolate"`, as an outer optimizer has no fraction to move by.
      slow_dtype: As in `lookahead`. The outer state has this dtype too.

    Returns:
      A `GradientTransformationExtraArgs` as of `lookahead`, whose state holds the
      outer optimizer's in `outer_state`.

    Raises:
      TypeError: As `lookahead`, and if `outer` is no gradient transformation.
      ValueError: As `lookahead`, and if `inner_state` is `"interpolate"`. `update`
        raises it if `outer` returns updates or a state of another tree or other
        shapes than it was given, or if an extra argument is named `fast`.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from optax_lookahead import outer_loop
      >>> loss = lambda w: jnp.sum((w - 3.0) ** 2)
      >>> nesterov = optax.sgd(0.7, momentum=0.5, nesterov=True)
      >>> tx = outer_loop(optax.sgd(0.05), nesterov, k=5)
      >>> w = jnp.array([0.0, 1.0])
      >>> state = tx.init(w)
      >>> for step in range(1, 16):
      ...     updates, state = tx.update(jax.grad(loss)(w), state, w)
      ...     w = optax.apply_updates(w, updates)
      ...     if step % 5 == 0:
      ...         print(f"{step:2d} {loss(w):.4f}")
       5 4.2239
      10 0.8338
      15 0.0595

    References:
      Kallusky, Rao, Nandavanam, Shi, `SNOO: Step-K Nesterov Outer Optimizer
      <https://arxiv.org/abs/2510.15830>`_, 2025. Douillard et al., `DiLoCo
      <https://arxiv.org/abs/2311.08105>`_, 2023, Algorithm 1. Thérien et al., `MuLoCo
      <https://arxiv.org/abs/2505.23725>`_, 2025. Wang, Tantia, Ballas, Rabbat, `SlowMo
      <https://arxiv.org/abs/1910.00643>`_, 2019, Algorithm 1.
    """
    check_transformation("outer", outer)
    return _cycles(inner, outer, k, None, inner_state, slow_dtype)


def _cycles(
    inner: optax.GradientTransformation,
    outer: optax.GradientTransformation | None,
    k: jax.typing.ArrayLike,
    alpha: Any,
    inner_state: str,
    slow_dtype: jax.typing.DTypeLike | None,
) -> optax.GradientTransformationExtraArgs:
    """Returns the transformation; without an outer optimizer, alpha is its step."""
    check_transformation("inner", inner)
    check_k(k)
    check_inner_state(inner_state, outer)
    slow_dtype = check_slow_dtype(slow_dtype)
    inner = optax.with_extra_args_support(inner)
    outer = outer and optax.with_extra_args_support(outer)

    def init_fn(params: optax.Params) -> LookaheadState:
        check_wide(slow_dtype, params)
        slow_params = jax.tree.map(lambda p: copy(p, slow_dtype), params)
        state = LookaheadState(
            fast_state=inner.init(params),
            slow_params=slow_params,
            steps_since_sync=jnp.zeros([], jnp.int32),
            sync_count=jnp.zeros([], jnp.int32),
        )
        if outer is not None:
            state = state._replace(outer_state=outer.init(_hide_discrete(slow_params)))
        if inner_state == "interpolate":
            anchor = _inner_state.anchor_of(inner, state.fast_state)
            state = state._replace(anchor=anchor)
        return state

    def update_fn(
        updates: optax.Updates,
        state: LookaheadState,
        params: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, LookaheadState]:
        check_params(params, state.slow_params)
        check_unstacked(state.steps_since_sync)

        grads = updates
        updates, fast_state = inner.update(
            grads, state.fast_state, params, **extra_args
        )
        start = state.steps_since_sync == 0
        steps = state.steps_since_sync + 1
        # Not `==`: a k lowered in mid-cycle must still sync.
        sync = steps >= jnp.asarray(k, jnp.int32)

        ps, treedef = jax.tree.flatten(params)
        # Up to the leaves of `params`, since an update may be None.
        us = treedef.flatten_up_to(updates)
        lates = _made_late(params, (fast_state, grads), (state.fast_state,))
        phis = [
            phi_of_cycle(_once_there(late, start), p, phi)
            for late, p, phi in zip(
                lates, ps, treedef.flatten_up_to(state.slow_params), strict=True
            )
        ]
        wider = list(map(is_wider, phis, ps))
        gs = [_pseudo_grad(*leaf) for leaf in zip(us, ps, phis, strict=True)]
        step_size: Any = alpha(state.sync_count) if callable(alpha) else alpha
        if outer is None:
            outer_state = state.outer_state
            # Not `g - alpha * g`: this form is exact at alpha = 1. A wide slow weight
            # is itself what moves, by `-alpha * g`.
            backs = [
                None if g is None else jnp.asarray(int(not w) - step_size, g.dtype) * g
                for g, w in zip(gs, wider, strict=True)
            ]
        else:
            check_reserved(extra_args, FastSide)
            extra_args["fast"] = FastSide(grads, updates, fast_state, sync)
            outer_params = _hide_discrete(treedef.unflatten(phis))
            # On a sync nothing below needs phi, on other steps nothing needs g: one
            # value for both, which the compiler can write over the slow weights.
            hs = [
                phi if g is None else g if wide else select(sync, g, phi)
                for g, phi, wide in zip(gs, phis, wider, strict=True)
            ]
            pseudo_grads = _hide_discrete(treedef.unflatten(hs))
            outer_step = functools.partial(
                outer.update, pseudo_grads, params=outer_params, **extra_args
            )
            outer_updates, outer_state = step_if(sync, outer_step, state.outer_state)
            check_outer_result("updates", outer_updates, pseudo_grads)
            backs = [
                None if g is None else du if wide else h + jnp.asarray(du, h.dtype)
                for g, h, du, wide in zip(
                    gs, hs, treedef.flatten_up_to(outer_updates), wider, strict=True
                )
            ]
            phis = [
                phi if u is None or wide else h
                for u, h, phi, wide in zip(us, hs, phis, wider, strict=True)
            ]
        pairs = [_leaf(sync, *leaf) for leaf in zip(us, ps, phis, backs, strict=True)]
        updates = treedef.unflatten([u for u, _ in pairs])
        slow_params = treedef.unflatten([phi for _, phi in pairs])

        anchor = state.anchor
        if inner_state == "reset":
            new_params = optax.apply_updates(params, updates)
            fast_state = _inner_state.reset(sync, fast_state, inner, new_params)
        elif inner_state == "interpolate":
            fast_state, anchor = _inner_state.interpolate(
                sync, fast_state, anchor, step_size
            )
        return updates, LookaheadState(
            fast_state=fast_state,
            slow_params=slow_params,
            steps_since_sync=jnp.where(sync, 0, steps),
            sync_count=jnp.where(
                sync, optax.safe_increment(state.sync_count), state.sync_count
            ),
            outer_state=outer_state,
            anchor=anchor,
        )

    # Optax types every state as `OptState`, which no NamedTuple is a supertype of.
    return optax.GradientTransformationExtraArgs(
        init_fn,
        update_fn,  # pyright: ignore[reportArgumentType]
    )


def phi_of_cycle(start, p, phi):
    """Returns the slow weight that the cycle set out from."""
    # Not the state's alone: since the last sync the loop may have loaded, clipped or
    # projected its parameters, and what it holds is what a cycle starts from.
    wide = jnp.asarray(p, phi.dtype)
    if is_wider(phi, p):
        # Unless it holds the slow weight, as well as its dtype can: near zero, where
        # float16 runs out of exponents, less well than its eps says.
        narrow = jnp.finfo(jnp.result_type(p))
        one_rounding = narrow.eps * jnp.maximum(jnp.abs(phi), float(narrow.tiny))
        start &= ~(jnp.abs(wide - phi) <= one_rounding)  # taken if NaN
    return jnp.where(start, wide, phi)


def _made_late(params, sources, given):
    """Returns arrays like the parameters that the inner step makes, such as moments."""
    leaves, treedef = jax.tree.flatten(params)
    old = {id(x) for x in jax.tree.leaves(given)}

    def is_like(tree):
        return jax.tree.structure(tree) == treedef

    for tree in jax.tree.leaves(sources, is_leaf=is_like):
        xs = jax.tree.leaves(tree)
        # The types also tell what differs between devices, which must not spread.
        if is_like(tree) and all(
            id(x) not in old and _is_inexact(x) and jax.typeof(x) == jax.typeof(p)
            for x, p in zip(xs, leaves, strict=True)
        ):
            return xs
    return [None] * len(leaves)


def _once_there(late, start):
    """Returns `start`, in a form that takes the array `late` to compute."""
    # Where the whole training step is one program, XLA's CPU backend would otherwise
    # write the slow weights first of all, while the backward pass still has to read
    # the parameters, and keep a copy of all of them for that.
    return start if late is None else start | ((late == late) & (late != late))


def _pseudo_grad(u, p, phi):
    """Returns how far the fast weight ran from phi, with the sign of a gradient."""
    if not _is_inexact(phi):
        return None
    if u is None:
        return jnp.zeros_like(phi)
    dtype = jnp.promote_types(jnp.result_type(u), phi.dtype)
    if is_wider(phi, p):
        # The fast weight set out from there. Counted from phi, its way would begin
        # with a rounding, and every cycle would pull phi back onto what p can hold.
        phi = _rounded_like(p, phi)
    p, u, phi = (jnp.asarray(x, dtype) for x in (p, u, phi))
    return phi - (p + u)


def _rounded_like(p, phi):
    """Returns phi as closely as `p` can hold it, in its own dtype."""
    if jnp.iscomplexobj(phi):
        return jax.lax.complex(*(_rounded_like(p, x) for x in (phi.real, phi.imag)))
    # Not there and back by `astype`, which compilers may leave out.
    bits = jnp.finfo(phi.dtype).nexp, jnp.finfo(jnp.result_type(p)).nmant
    return jax.lax.reduce_precision(phi, *bits)


def _leaf(sync, u, p, phi, back):
    """Returns the update and the slow weight of one parameter.

    A sync adds `back` to the update; for a slow weight that is wider than its parameter
    it is added to the slow weight itself.
    """
    if u is None:  # Equinox's way of saying that this parameter stays.
        return None, phi_of_cycle(sync, p, phi)
    if is_wider(phi, p):
        phi = jnp.where(sync, phi + jnp.asarray(back, phi.dtype), phi)
        # From one weight that `p` can hold to another: mostly, so can the step. And
        # from the new slow weight, which can thus be written in place first.
        return select(sync, _rounded_like(p, phi) - jnp.asarray(p, phi.dtype), u), phi
    if back is not None:
        dtype = jnp.promote_types(jnp.result_type(u), back.dtype)
        wide = jnp.asarray(u, dtype) + jnp.asarray(back, dtype)
        # Not `u + sync * back`: on other steps u must pass next to inf and NaN.
        u = select(sync, wide, u)
    # From the new update, so that the compiler can write updates and slow weights in
    # place, one after the other; and added as the loop adds it, so that both agree in
    # every bit. Two `where`s of old values would cost a copy.
    stepped = jnp.asarray(optax.apply_updates(p, u), phi.dtype)
    return u, jnp.where(sync, stepped, phi)


def _hide_discrete(tree):
    """Returns the tree with what an optimizer cannot move hidden, as Optax hides it."""
    return jax.tree.map(lambda x: x if _is_inexact(x) else optax.MaskedNode(), tree)


def _is_inexact(x):
    return jnp.issubdtype(jnp.result_type(x), jnp.inexact)
