"""EMA-Nesterov: gradients at a point ahead, along an average of the past steps."""

from typing import Any

import jax
import optax

from ._checks import check_coefficient, checked_schedule
from ._extrapolation import extrapolation


def ema_nesterov(
    beta: optax.ScalarOrSchedule = 0.3,
    gamma: optax.ScalarOrSchedule = 0.99,
    *,
    accumulator_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformation:
    """EMA-Nesterov: gradients at a point ahead, along an average of the past steps.

    Put it last in a chain, after the optimizer `inner`, whose updates it takes. The
    parameters of the training loop are y; theta are the weights to evaluate, which
    `slow_params` returns:

        y_t         = theta_t + beta_t * m_t                        m_0 = 0
        theta_{t+1} = y_t + inner(y_t)
        m_{t+1}     = gamma_t * m_t + (1 - gamma_t) * (theta_{t+1} - theta_t)

    Only m is stored, one copy of the parameters, as `y_{t+1} - y_t` is
    `inner(y_t) + beta_{t+1} * m_{t+1}`. If the inner optimizer returns the same update
    in every step, theta moves 1 / (1 - beta) times as far. If the parameters are
    changed outside the optimizer, theta changes with them. A NaN stays in m: if
    gradients may be NaN, put `optax.apply_if_finite` around the chain, and
    `optax.MultiSteps` too: inside, each micro-step would be averaged.

    Args:
      beta: How far ahead the gradient is taken, in units of m, at least 0. At 0 the
        steps are those of the inner optimizer, and m is still updated; from 1 on the
        steps can grow without bound. Also a float scalar array or tracer, whose value
        is not checked, or a schedule: a function from the step number t (int32 scalar,
        from 0) to that value, such as one that is 0 in warm-up and at the end. With
        `optax.inject_hyperparams(ema_nesterov)` add `static_args=("beta", "gamma")`:
        otherwise a schedule of beta acts one step late.
      gamma: Decay of the average per step, in [0, 1). Also an array or a schedule, like
        beta.
      accumulator_dtype: Floating dtype of m; None for that of the parameters. With
        bfloat16 parameters `"float32"` keeps the bits that a decay near 1 needs.

    Returns:
      A `GradientTransformation` whose state is an `ExtrapolationState`, with m as its
      direction and beta as its coefficient. It takes and returns updates with the tree
      of the parameters, of any shapes and dtypes, which do not change. A leaf that is
      neither floating nor complex is returned unchanged, and so is an update of None.

    Raises:
      TypeError: If a static `beta` or `gamma` is not a real number, or
        `accumulator_dtype` not a floating dtype.
      ValueError: If a static `beta` is below 0 or not finite, a static `gamma` outside
        [0, 1), either is an array that is not a scalar, or `accumulator_dtype` a dtype
        that JAX has not enabled.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from optax_lookahead import ema_nesterov, slow_params
      >>> loss = lambda w: jnp.sum((w - 3.0) ** 2)
      >>> tx = optax.chain(optax.sgd(0.05), ema_nesterov(beta=0.5, gamma=0.9))
      >>> w = jnp.array([0.0, 1.0])
      >>> state = tx.init(w)
      >>> for step in range(1, 16):
      ...     updates, state = tx.update(jax.grad(loss)(w), state, w)
      ...     w = optax.apply_updates(w, updates)
      ...     if step % 5 == 0:
      ...         print(f"{step:2d} {loss(slow_params(state, w)):.4f}")
       5 4.0202
      10 0.8212
      15 0.0567

    References:
      Yau, Li, Glentis, Boreiko, Wai, Hong, [EMA-Nesterov: Stabilizing Nesterov's
      Lookahead for Accelerated Deep Learning
      Optimization](https://arxiv.org/abs/2605.25395), 2026, the recurrence of theta
      and m.
    """
    remedy = "how many steps to look ahead, for example `beta=0.3`"
    check_coefficient("beta", beta, "[0, inf)", remedy)
    remedy = "the decay of the average per step, for example `gamma=0.99`"
    check_coefficient("gamma", gamma, "[0, 1)", remedy)
    beta = checked_schedule("beta", beta)
    gamma = checked_schedule("gamma", gamma)
    return extrapolation(_new_direction, _step, gamma, beta, accumulator_dtype)


def _new_direction(u: Any, m: Any, beta: Any, gamma: Any) -> Any:
    # theta moves to y and takes the inner step from there.
    return gamma * m + (1 - gamma) * (beta * m + u)


def _step(u: Any, m: Any, beta: Any, new_m: Any, new_beta: Any) -> Any:
    del m, beta
    return u + new_beta * new_m
