"""What functions that the user gave must return, and in which words they are told."""

from typing import Any

import jax
import jax.numpy as jnp

from ._validation import describe_path


def check_outer_result(what: str, new: Any, given: Any) -> None:
    """Raises unless the outer optimizer returned what is like what it was given."""
    _check_result("`outer`", what, new, given, "an optimizer")


def check_inner_result(new: Any, given: Any) -> None:
    """Raises unless the function `inner_state` returned what is like the state."""
    _check_result("`inner_state`", "a state", new, given, "a function")
    for (path, x), old in zip(
        jax.tree.leaves_with_path(new), jax.tree.leaves(given), strict=True
    ):
        got, expected = jnp.result_type(x), jnp.result_type(old)
        if got != expected:
            raise ValueError(
                "`inner_state` must return a state with the dtypes that it is given, "
                f"got {got} where {describe_path(path)} has {expected}. Use a function "
                "that keeps the dtypes."
            )


def _check_result(who: str, what: str, new: Any, given: Any, use: str) -> None:
    got, expected = jax.tree.structure(new), jax.tree.structure(given)
    if got != expected:
        raise ValueError(
            f"{who} must return {what} with the tree that it is given, got "
            f"{got} where {expected} was given. Use {use} that keeps the tree."
        )
    for (path, x), old in zip(
        jax.tree.leaves_with_path(new), jax.tree.leaves(given), strict=True
    ):
        if jnp.shape(x) != jnp.shape(old):
            raise ValueError(
                f"{who} must return {what} with the shapes that it is given, got "
                f"{jnp.shape(x)} where {describe_path(path)} has {jnp.shape(old)}. Use "
                f"{use} that keeps the shapes."
            )
