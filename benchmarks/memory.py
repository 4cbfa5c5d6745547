"""Claim: lookahead holds exactly one more copy of the parameters, and nothing else.

For each policy for the inner state, for an outer optimizer and for `optax.lookahead`
the script counts the bytes of all live arrays of parameters and state after some steps.
The table compares them with the theory, and has what the compiler reserves for a step.
The script exits with 1 if theory and count differ by one byte, except for counters, or
if steps leave other arrays behind.

    python benchmarks/memory.py            # 10,000,000 parameters
    python benchmarks/memory.py --quick    # 100,000
"""

import gc
import itertools
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from forms import ALONE, INNERS, UPSTREAM, Form, optimizer_step, tree
from timing import Parser, environment, markdown, nbytes, progress, write_rows

from optax_lookahead import lookahead, outer_loop

K, ALPHA, LEAVES = 5, 0.5, 20
DTYPES: dict[str, tuple[str, str | None]] = {
    "float32": ("float32", None),
    "bfloat16": ("bfloat16", None),
    "bfloat16, slow float32": ("bfloat16", "float32"),
}
MOMENTS = {"sgd": 0, "adam": 2}
KEEP, INTERPOLATE = 'lookahead, "keep"', 'lookahead, "interpolate"'
NESTEROV = "outer_loop, Nesterov"
# Each takes the inner optimizer and the slow weights' dtype.
POLICIES: dict[str, Callable[[Any, Any], Any]] = {
    ALONE: lambda inner, _: inner,
    KEEP: lambda inner, wide: lookahead(inner, K, ALPHA, slow_dtype=wide),
    'lookahead, "reset"': lambda inner, wide: lookahead(
        inner, K, ALPHA, inner_state="reset", slow_dtype=wide
    ),
    INTERPOLATE: lambda inner, wide: lookahead(
        inner, K, ALPHA, inner_state="interpolate", slow_dtype=wide
    ),
    NESTEROV: lambda inner, wide: outer_loop(
        inner, optax.sgd(0.7, momentum=0.9, nesterov=True), K, slow_dtype=wide
    ),
    UPSTREAM: lambda inner, _: optax.lookahead(inner, K, ALPHA),
}


def theory(policy: str, inner: str, dtype: str, wide: str | None) -> int:
    """Returns the bytes that parameters and state hold for one parameter."""
    own = jnp.dtype(dtype).itemsize
    slow = jnp.dtype(wide or dtype).itemsize
    moments = MOMENTS[inner] * own
    return {
        ALONE: own + moments,
        INTERPOLATE: own + moments + slow + moments,  # the moments at the last sync
        NESTEROV: own + moments + slow + slow,  # the outer momentum
    }.get(policy, own + moments + slow)


def live() -> int:
    """Returns the bytes of all arrays that JAX holds."""
    gc.collect()
    return nbytes(jax.live_arrays())


def measure(policy: str, inner: str, dtypes: str, size: int) -> dict[str, Any]:
    dtype, wide = DTYPES[dtypes]
    params, grads = (tree(LEAVES, size, dtype, seed) for seed in (0, 1))
    before = live()
    form = Form(policy, POLICIES[policy](INNERS[inner], wide))
    program = optimizer_step(form, params, grads)
    program.seconds(2 * K + 2)
    held, counts = live() - before, program.counts
    number = LEAVES * size
    expected = theory(policy, inner, dtype, wide)
    # Counters of steps, syncs and Adam's bias correction: int32 scalars.
    counters = sum(x.nbytes for x in jax.tree.leaves(program.carry) if x.ndim == 0)
    if held != number * expected + counters:
        sys.exit(
            f"{policy}, {inner}, {dtypes}: {held:,} bytes are held, not {number:,} x "
            f"{expected} plus {counters} for counters."
        )
    return {
        "parameters": dtypes,
        "inner": inner,
        "form": policy,
        "theory": expected,
        "held": f"{held / number:.2f}",
        "arguments": f"{counts.arguments / number:.2f}",
        "temporaries": f"{counts.temporary / number:.2f}",
        "peak of a step": f"{counts.peak / number:.2f}",
    }


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a hundredth of the size")
    parser.add_json()
    args = parser.parse_args()
    size = 5_000 if args.quick else 500_000
    cases = [
        (policy, inner, dtypes)
        for dtypes, inner, policy in itertools.product(DTYPES, MOMENTS, POLICIES)
        # SGD has no moments for the policies; two forms have no slow dtype.
        if not (inner == "sgd" and policy not in (ALONE, KEEP, NESTEROV, UPSTREAM))
        and not (DTYPES[dtypes][1] and policy in (ALONE, UPSTREAM))
    ]
    rows = [measure(*case, size) for case in progress(cases, "form")]
    print(f"{environment()}, {LEAVES} x {size:,} parameters, bytes per parameter")
    print(markdown(rows))
    write_rows(args.json, rows)


if __name__ == "__main__":
    main()
