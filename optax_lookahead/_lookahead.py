"""The two public transformations, which differ in the slow step that ends a cycle."""

import jax
import optax

from ._checks import check_alpha, check_inner_state, check_transformation
from ._cycle import cycles
from ._inner_state import InnerState
from ._slow_memory import SlowMemoryKind


def lookahead(
    inner: optax.GradientTransformation,
    k: jax.typing.ArrayLike = 5,
    alpha: optax.ScalarOrSchedule = 0.5,
    *,
    inner_state: InnerState = "keep",
    slow_dtype: jax.typing.DTypeLike | None = None,
    slow_memory_kind: SlowMemoryKind | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Lookahead around any optimizer: k steps forward, one step back.

    The parameters of the training loop are the fast weights theta; the state carries
    the slow weights phi. Every update takes one step of `inner`; every k-th one also
    moves the slow weights towards the fast ones, which restart from there:

        theta_{t,0} = phi_{t-1}
        theta_{t,i} = theta_{t,i-1} + inner(...)                    i = 1, ..., k
        phi_t       = phi_{t-1} + alpha * (theta_{t,k} - phi_{t-1})

    So phi_t is an exponential moving average of the fast weights at the ends of the
    cycles, `alpha * (theta_t + (1 - alpha) * theta_{t-1} + ...)`, for any `inner`.
    A cycle starts from the parameters that its first update is given, so it includes
    changes outside the optimizer, such as loading, clipping or projection. After
    a sync, `slow_params` in the state equals the new parameters bit for bit.

    The slow weights stay finite: a slow weight takes the value that a sync computes
    only if that value is finite, and a cycle does not start from an element that is not
    finite. So a run that diverged at any step can continue from what the function
    `slow_params` returns, with a new state of `inner`, since its moments may be NaN.
    Values that are very large but finite at a sync do enter the slow weights. Entries
    that are infinite by design, such as a mask, must be so at `init`, and do not
    change.

    Args:
      inner: The optimizer that takes the fast steps. Extra arguments of `update` are
        forwarded to it.
      k: Inner steps in a cycle, an integer of at least 1 that fits in int32. Also a
        scalar array or tracer, whose value is not checked: below 1, every step syncs.
      alpha: Slow step size in [0, 1], dimensionless. Also a float scalar array or
        tracer, whose value is not checked, or a schedule: a function from the number
        of completed syncs (int32 scalar) to the step size. With
        `optax.inject_hyperparams(lookahead)` add `static_args=("alpha",)`: otherwise
        the schedule is given the number of steps, which cannot be detected here.
      inner_state: What a sync does to the inner optimizer's state.

        - `"keep"`: nothing.
        - `"reset"`: it becomes what `inner.init` gives at the new parameters, also
          where it was NaN. Fields that count training time do not change: the counts of
          schedules for learning rate and weight decay, the count and hyperparameters of
          `optax.inject_hyperparams`, the state of
          `optax.contrib.reduce_on_plateau`, the step counts of
          `optax.conditionally_mask`, `optax.conditionally_transform` and
          `optax.add_noise`.
          A count that corrects the bias of moments restarts with them, and so does a
          schedule that an optimizer computes from that count (`optax.contrib.prodigy`,
          `momo` and `dadapt_adamw` do). Random keys restart too, so that their noise
          repeats, and so do cycles within `inner`, such as those of `optax.MultiSteps`.
        - `"interpolate"`: its moments move to `old + alpha * (now - old)`, where `old`
          is their value at the last sync, of which the state holds a copy. Moments are
          all floating trees that `optax.tree.map_params` finds to be like the
          parameters, including stored weights, such as `z` of schedule-free. Scalars
          and counts do not change. Neither do those trees in Optax's own states that
          are like the parameters but not moments: gradients that are being accumulated
          or compared with the next one, the projector of GaLore, the memory of L-BFGS,
          initial parameters, sums that belong to estimates of distance, and
          measurements. In other states every floating tree that is like the parameters
          is interpolated. A moment that is not finite stays so, as under `"keep"`.
        - A function `(state, fresh) -> state` of the inner state after the cycle's
          last step, and of what `inner.init` gives at the new parameters. It is
          evaluated in every step, and its result is used at a sync.

        With `optax.inject_hyperparams(lookahead)` a function needs
        `static_args=("inner_state",)`, since it would be taken for a schedule.

        In every case the loss that Optax's line searches store for the next step
        becomes infinite, so that they compute it again: the sync moves the parameters.
      slow_dtype: Floating dtype of the slow weights, at least as wide as those of the
        parameters, in place of the dtype of floating leaves. With bfloat16 parameters
        and `slow_dtype="float32"` the slow weights keep the bits that small steps need:
        a cycle starts from the slow weight unless the parameter differs from it by more
        than one rounding error. Larger differences come from changes outside the
        optimizer, or from a sync whose update exceeds the weight and has no wider
        dtype; float32 updates avoid the latter. The fast weights start
        from the rounded slow weight and have the parameters' dtype: updates that are
        too small for it are lost, except for the last one of a cycle. With
        `optax.inject_hyperparams` write the dtype's name: it takes a type such as
        `jnp.float32` for a schedule, whose result is refused here, unless it is in
        `static_args`.
      slow_memory_kind: Memory of the slow weights between the start of a cycle and its
        sync: None for that of the parameters, or `"pinned_host"` for that of the
        devices' host, with the same shardings. The first step of a cycle and the one
        that syncs copy them to the device and back, an array at a time; other steps do
        not. Random keys among the parameters stay on the device. A `jax.jit` that
        donates needs `in_shardings` and `out_shardings` for parameters and state,
        since these name the memories. A `jax.vmap` over `k` or
        over counters is refused, and `update` has no reverse-mode derivative.

    Returns:
      A `GradientTransformationExtraArgs` whose state is a `LookaheadState`. Its
      `update` needs `params`, a tree of arrays of any shapes and dtypes, and returns
      updates in the dtypes of `inner`'s. A leaf that is neither floating nor complex
      cannot be interpolated: it takes the inner step, and a sync copies it.

    Raises:
      TypeError: If `inner` is not a gradient transformation, a static `k` not an
        integer, a static `alpha` not a real number, or `slow_dtype` not a floating
        dtype. `init` raises it if a leaf is not an array, `update` if the state is not
        a `LookaheadState`.
      ValueError: If a static `k` is below 1 or beyond int32, a static `alpha` is
        outside [0, 1], either is an array that is not a scalar, `inner_state` is none
        of the four, or `slow_memory_kind` is neither of the two or this JAX has no
        `jax.memory`. `init` raises it if `slow_dtype` is narrower than a parameter, the
        state of `inner` cannot be interpolated, or a device lacks that memory. `update`
        raises it without `params`, with `params` that are unlike those that `init` saw
        or wider than the slow weights of the state, or if the function `inner_state`
        returns another tree, other shapes or other dtypes.

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
      Zhang, Lucas, Hinton, Ba, [Lookahead Optimizer: k steps forward, 1 step
      back](https://arxiv.org/abs/1907.08610), 2019, Algorithm 1.
    """
    check_alpha(alpha)
    check_inner_state(inner_state, has_alpha=True)
    return cycles(inner, k, inner_state, slow_dtype, slow_memory_kind, alpha=alpha)


def outer_loop(
    inner: optax.GradientTransformation,
    outer: optax.GradientTransformation,
    k: jax.typing.ArrayLike,
    *,
    inner_state: InnerState = "keep",
    slow_dtype: jax.typing.DTypeLike | None = None,
    slow_memory_kind: SlowMemoryKind | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Lets an outer optimizer take a step after every k steps of an inner one.

    The outer optimizer's gradient is the pseudo-gradient, which is the slow weights
    minus the fast ones, and its parameters are the slow weights:

        theta_{t,0} = phi_{t-1}
        theta_{t,i} = theta_{t,i-1} + inner(...)                    i = 1, ..., k
        phi_t       = phi_{t-1} + outer(phi_{t-1} - theta_{t,k})

    With `optax.sgd(alpha)` as `outer` this is `lookahead(inner, k, alpha)`, up to
    rounding; with Nesterov momentum it is SNOO, and DiLoCo and MuLoCo with one worker;
    with heavy-ball momentum SlowMo, at a constant learning rate and with one worker.
    For several workers put `average_replicas` before the outer optimizer.

    The slow weights stay finite as those of `lookahead` do. `outer` is given 0 for an
    element of the pseudo-gradient that is not finite, and its update is dropped there.
    If `outer` itself returns NaN or infinity, the slow weight stays and the parameter
    takes that update, or with a `slow_dtype` returns to it. In everything else
    `outer_loop` is like `lookahead`.

    Args:
      inner: The optimizer that takes the fast steps. Extra arguments of `update` are
        forwarded to it, except `outer_args`.
      outer: The optimizer that takes the slow steps. It is evaluated in every step, but
        its result is used only at a sync; on other steps its gradient is 1, at which
        optimizers are differentiable. So its state changes only at a sync, and a
        schedule inside it counts syncs. It sees the floating and complex leaves of the
        parameters; the others are `optax.MaskedNode`. Extra arguments of `update` are
        forwarded to it, and those in a dict `outer_args` to it alone. It also gets
        `inner_step`, an `InnerStep` that describes the inner step that ends the cycle.
      k: As in `lookahead`.
      inner_state: `"keep"`, `"reset"` or a function, as in `lookahead`. There is no
        `"interpolate"`, since an outer optimizer has no alpha to interpolate with.
      slow_dtype: As in `lookahead`. The outer state has this dtype too.
      slow_memory_kind: As in `lookahead`. The outer state stays on the device.

    Returns:
      A `GradientTransformationExtraArgs` as from `lookahead`, whose state holds that of
      the outer optimizer in `outer_state`.

    Raises:
      TypeError: As for `lookahead`, and if `outer` is not a gradient transformation or
        `outer_args` not a dict.
      ValueError: As for `lookahead`, and if `inner_state` is `"interpolate"`. `update`
        raises it if `outer` returns updates or a state of another tree or other
        shapes than it was given, or if an extra argument is named `inner_step`.

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
      Kallusky, Rao, Nandavanam, Shi, [SNOO: Step-K Nesterov Outer
      Optimizer](https://arxiv.org/abs/2510.15830), 2025. Douillard et al.,
      [DiLoCo](https://arxiv.org/abs/2311.08105), 2023, Algorithm 1. Thérien et al.,
      [MuLoCo](https://arxiv.org/abs/2505.23725), 2025. Wang, Tantia, Ballas, Rabbat,
      [SlowMo](https://arxiv.org/abs/1910.00643), 2019, Algorithm 1.
    """
    check_transformation("outer", outer, "outer_loop(inner, optax.sgd(0.5), k)")
    check_inner_state(inner_state, has_alpha=False)
    return cycles(inner, k, inner_state, slow_dtype, slow_memory_kind, outer=outer)
