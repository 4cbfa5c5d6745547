"""GPA, generalized primal averaging: gradients near an average of the weights."""

from typing import Any

import jax
import optax

from ._checks import check_coefficient, checked_schedule
from ._extrapolation import extrapolation


def primal_averaging(
    mu_x: optax.ScalarOrSchedule = 0.9967,
    mu_y: optax.ScalarOrSchedule = 0.7,
    *,
    accumulator_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformation:
    """GPA, generalized primal averaging: an average that is updated in every step.

    Put it last in a chain, after the optimizer `inner`, whose updates it takes. The
    parameters of the training loop are y, between the weights z that the inner
    optimizer moves and their average x. The weights to evaluate are x, which
    `slow_params` returns:

        y_t     = mu_y_t * x_t + (1 - mu_y_t) * z_t                 x_0 = z_0
        z_{t+1} = z_t + inner(y_t)
        x_{t+1} = mu_x_t * x_t + (1 - mu_x_t) * z_{t+1}

    Only d = z - x is stored, one copy of the parameters: `d_{t+1}` is
    `mu_x_t * (d_t + inner(y_t))` and x is `y - (1 - mu_y) * d`. With a `mu_x` of
    `lambda t: 1 - 1 / (t + 1)` this is schedule-free; with `mu_x = mu_y` around SGD it
    is Nesterov momentum `mu_x` at 1 - mu_x times the learning rate. Weight decay in
    `inner` is computed from y. If the parameters are changed outside the optimizer, x
    and z change with them. A NaN stays in d: if gradients may be NaN, put
    `optax.apply_if_finite` around the chain, and `optax.MultiSteps` too: inside, each
    micro-step would be averaged.

    Args:
      mu_x: Decay of the average per step, in [0, 1). At 0 this is the inner optimizer.
        `0.9 ** (1 / k)` is a decay of 0.9 in k steps. Also a float scalar array or
        tracer, whose value is not checked, or a schedule: a function from the step
        number t (int32 scalar, from 0) to that value.
      mu_y: Where the gradient is taken, in [0, 1], from 0 at z to 1 at x. Also an array
        or a schedule, like mu_x. With `optax.inject_hyperparams(primal_averaging)` add
        `static_args=("mu_x", "mu_y")`: otherwise a schedule of mu_y acts one step late.
      accumulator_dtype: Floating dtype of d; None for that of the parameters. With
        bfloat16 parameters `"float32"` keeps the bits that a decay near 1 needs.

    Returns:
      A `GradientTransformation` whose state is an `ExtrapolationState`, with d as its
      direction and `1 - mu_y` as its coefficient. It takes and returns updates with the
      tree of the parameters, of any shapes and dtypes, which do not change. A leaf that
      is neither floating nor complex is returned unchanged, and so is an update of
      None.

    Raises:
      TypeError: If a static `mu_x` or `mu_y` is not a real number, or
        `accumulator_dtype` not a floating dtype.
      ValueError: If a static `mu_x` is outside [0, 1), a static `mu_y` outside [0, 1],
        either is an array that is not a scalar, or `accumulator_dtype` a dtype that JAX
        has not enabled.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from optax_lookahead import primal_averaging, slow_params
      >>> loss = lambda w: jnp.sum((w - 3.0) ** 2)
      >>> tx = optax.chain(optax.sgd(0.3), primal_averaging(mu_x=0.8, mu_y=0.7))
      >>> w = jnp.array([0.0, 1.0])
      >>> state = tx.init(w)
      >>> for step in range(1, 16):
      ...     updates, state = tx.update(jax.grad(loss)(w), state, w)
      ...     w = optax.apply_updates(w, updates)
      ...     if step % 5 == 0:
      ...         print(f"{step:2d} {loss(slow_params(state, w)):.4f}")
       5 0.2398
      10 0.2056
      15 0.0020

    References:
      Defazio, Mishchenko, Raman, Shi, Xiao, [Smoothing DiLoCo with Primal Averaging for
      Faster Training of LLMs](https://arxiv.org/abs/2512.17131), 2025, the recurrence
      of x, y and z. Defazio et al., [The Road Less
      Scheduled](https://arxiv.org/abs/2405.15682), 2024, on schedule-free.
    """
    remedy = "the decay of the average per step, for example `mu_x=0.9967`"
    check_coefficient("mu_x", mu_x, "[0, 1)", remedy)
    remedy = "where to take the gradient, for example `mu_y=0.7`"
    check_coefficient("mu_y", mu_y, "[0, 1]", remedy)
    mu_x = checked_schedule("mu_x", mu_x)
    mu_y = checked_schedule("mu_y", mu_y)
    coefficient = (lambda t: 1 - mu_y(t)) if callable(mu_y) else 1 - mu_y
    return extrapolation(_new_direction, _step, mu_x, coefficient, accumulator_dtype)


def _new_direction(u: Any, d: Any, c: Any, mu_x: Any) -> Any:
    del c
    return mu_x * (d + u)


def _step(u: Any, d: Any, c: Any, new_d: Any, new_c: Any) -> Any:
    # z moves by u, and y is z - mu_y * d before and after, where mu_y is 1 - c.
    return u + (1 - c) * d - (1 - new_c) * new_d
