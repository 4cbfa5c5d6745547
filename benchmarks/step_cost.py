"""Claim: a lookahead step costs one read and one write of the slow weights, no more.

Times the optimizer step alone (gradients given, parameters and state donated) for an
inner optimizer, for `optax_lookahead.lookahead` around it and for `optax.lookahead`
around it. The three steps run one after the other, round after round, in one process,
and the reported ratio is the median over rounds of the time in that round over the
inner optimizer's: noise of the machine that lasts longer than a round cancels.

Beside it stand figures of the compiled program, which no noise reaches: bytes accessed
and temporary memory, in units of the parameters' size N.

    python benchmarks/step_cost.py            # 20 leaves of 500,000 float32
    python benchmarks/step_cost.py --quick    # a tenth of the size, fewer rounds
"""

import argparse
import platform
import statistics
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_lookahead import lookahead

INNERS = {
    "adam": lambda: optax.adam(1e-3),
    "sgd": lambda: optax.sgd(1e-3),
    "momentum": lambda: optax.sgd(1e-3, momentum=0.9),
}


class Step:
    """One compiled optimizer step with the parameters and the state that it moves."""

    def __init__(self, tx: optax.GradientTransformation, params: Any, grads: Any):
        self.traces = 0

        def step(params, state, grads):
            self.traces += 1
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        self.step = jax.jit(step, donate_argnums=(0, 1))
        self.params = jax.tree.map(jnp.copy, params)
        self.state = tx.init(self.params)
        self.grads = grads

    def compiled(self) -> jax.stages.Compiled:
        return self.step.lower(self.params, self.state, self.grads).compile()

    def seconds(self, steps: int) -> float:
        """Returns the mean time of a step over `steps` of them."""
        start = time.perf_counter()
        for _ in range(steps):
            self.params, self.state = self.step(self.params, self.state, self.grads)
        jax.block_until_ready((self.params, self.state))
        return (time.perf_counter() - start) / steps


class UpstreamStep(Step):
    """The same for `optax.lookahead`, whose parameters and updates are pairs."""

    def __init__(self, tx: optax.GradientTransformation, params: Any, grads: Any):
        super().__init__(tx, optax.LookaheadParams.init_synced(params), grads)


class Row(NamedTuple):
    """Figures of one form of one optimizer."""

    inner: str
    form: str
    ratio: float  # median over rounds of the time over the inner optimizer's
    low: float  # first and
    high: float  # third quartile of the same
    accessed: float  # bytes accessed by the compiled step, in units of N
    temporary: float  # bytes of its temporaries, in units of N


def measure(
    name: str, leaves: int, size: int, k: int, rounds: int, steps: int
) -> list[Row]:
    """Returns a row for the inner optimizer alone and one for each lookahead."""
    keys = jax.random.split(jax.random.key(0), 2 * leaves)
    params = [jax.random.normal(key, (size,)) for key in keys[:leaves]]
    grads = [jax.random.normal(key, (size,)) for key in keys[leaves:]]
    inner = INNERS[name]()
    forms = {
        "inner alone": Step(inner, params, grads),
        "optax_lookahead": Step(lookahead(inner, k, 0.5), params, grads),
        "optax.lookahead": UpstreamStep(optax.lookahead(inner, k, 0.5), params, grads),
    }
    for form in forms.values():
        form.seconds(2 * k)  # compiles and warms up
    times = {form: [] for form in forms}
    for _ in range(rounds):
        for form, step in forms.items():
            times[form].append(step.seconds(steps))
    rows = []
    unit = sum(p.nbytes for p in params)
    for form, step in forms.items():
        if step.traces != 1:
            raise RuntimeError(f"{form} was traced {step.traces} times, not once.")
        ratios = [t / i for t, i in zip(times[form], times["inner alone"], strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4)
        compiled = step.compiled()
        rows.append(
            Row(
                name,
                form,
                median,
                low,
                high,
                compiled.cost_analysis()["bytes accessed"] / unit,
                compiled.memory_analysis().temp_size_in_bytes / unit,
            )
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--leaves", type=int, default=20)
    parser.add_argument("--size", type=int, default=500_000, help="floats in a leaf")
    parser.add_argument("--k", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=40)
    args = parser.parse_args()
    if args.quick:
        args.size, args.rounds = args.size // 10, 10
    print(
        f"jax {jax.__version__}, optax {optax.__version__}, "
        f"{jax.devices()[0].device_kind} ({platform.machine()}), "
        f"{args.leaves} x {args.size:,} float32, k = {args.k}, {args.rounds} rounds"
    )
    print("| inner | form | time / inner (quartiles) | bytes / N | temporaries / N |")
    print("|---|---|---|---|---|")
    for name in INNERS:
        for row in measure(name, args.leaves, args.size, args.k, args.rounds, args.k):
            print(
                f"| {row.inner} | {row.form} | {row.ratio:.2f} ({row.low:.2f} to "
                f"{row.high:.2f}) | {row.accessed:.2f} | {row.temporary:.2f} |"
            )


if __name__ == "__main__":
    main()
