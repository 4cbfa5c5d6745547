"""A curvature for `line_minimum`, from what Adam keeps."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ._line import wide_dtype
from ._validation import check_number


def adam_curvature(
    b2: jax.typing.ArrayLike = 0.999, power: jax.typing.ArrayLike = 1.0
) -> Callable[[optax.OptState], Any]:
    """Returns a curvature for `line_minimum` from the second moment that Adam keeps.

    With nu the moving average of the squared gradients, and t the steps in it:

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
      Zhang, Lucas, Hinton, Ba, [Lookahead Optimizer: k steps forward, 1 step
      back](https://arxiv.org/abs/1907.08610), 2019, section 2.1. Kingma, Ba,
      [Adam](https://arxiv.org/abs/1412.6980), 2015.
    """
    _check_arguments(b2, power)

    def curvature(state: optax.OptState) -> Any:
        def is_adam(node: Any) -> bool:
            return isinstance(node, optax.ScaleByAdamState)

        # Not `optax.tree.get(state, "nu")`, which does not know whose count it needs.
        found = [x for x in jax.tree.leaves(state, is_leaf=is_adam) if is_adam(x)]
        adam = _one_adam(found)
        nu = jax.tree.map(lambda v: jnp.real(jnp.asarray(v, wide_dtype(v))), adam.nu)
        nu = optax.tree.bias_correction(nu, b2, adam.count)
        return jax.tree.map(lambda v: v**power, nu)

    return curvature


def _check_arguments(b2: Any, power: Any) -> None:
    """Raises unless `b2` is a decay rate and `power` positive, if they are static."""
    value = check_number("b2", b2, "Write the one given to Adam, for example 0.999.")
    if value is not None and not 0 <= value < 1:
        raise ValueError(
            f"`b2` must be a number in [0, 1), got {value!r}. Write the one given to "
            "Adam, for example 0.999."
        )
    value = check_number("power", power, "Write for example `power=0.5`.")
    if value is not None and not 0 < value < math.inf:
        raise ValueError(
            f"`power` must be a positive number, got {value!r}. Write for example "
            "`power=0.5`."
        )


def _one_adam(states: list[Any]) -> Any:
    """Returns the state of Adam, and raises unless there is just one."""
    if len(states) == 1:
        return states[0]
    raise ValueError(
        "`adam_curvature` must find one `optax.ScaleByAdamState` in the inner "
        f"optimizer's state, got {len(states) or 'none'}. Write a function from that "
        "state to a tree like the parameters."
    )
