"""Question: which `inner_state` suits an inner optimizer that stores parameters?

Each trains a small network on scikit-learn's digits, alone and inside lookahead with
alpha = 0.5, at its usual learning rate and with the same batches. The table has the
mean training loss at the end, of the slow weights on all of the data, over five seeds;
a network that did not learn is near 2.3. L-BFGS takes whole-batch steps.

    python benchmarks/stored_parameters.py
    python benchmarks/stored_parameters.py --quick  # checks that losses are finite
"""

import functools
import sys

import jax
import jax.numpy as jnp
import optax
from optax import contrib
from sklearn.datasets import load_digits
from timing import Parser, environment, markdown, progress, write_rows

from optax_lookahead import LookaheadState, lookahead, slow_params

INNERS = {
    "cocob": lambda: contrib.cocob(),
    "schedule_free_sgd": lambda: contrib.schedule_free_sgd(1.0),
    "schedule_free_adamw": lambda: contrib.schedule_free_adamw(0.01),
    "madgrad": lambda: contrib.madgrad(0.01),
    "mechanize, SGD": lambda: contrib.mechanize(optax.sgd(0.1)),
    "mechanize, Adam": lambda: contrib.mechanize(optax.adam(1e-3)),
    "dog": lambda: contrib.dog(),
    "dowg": lambda: contrib.dowg(),
    "lbfgs": lambda: optax.lbfgs(),
    "adam, which stores none": lambda: optax.adam(3e-3),
}
POLICIES = "keep", "reset"
CYCLES = 5, 50, 400


def loss_fn(params, x, y):
    hidden = jax.nn.relu(x @ params["w1"] + params["b1"])
    logits = hidden @ params["w2"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def train(tx, x, y, updates: int, batch: int, seed) -> jax.Array:
    """Returns the loss at the end."""
    first, second, batches = jax.random.split(jax.random.key(seed), 3)
    params = {
        "w1": jax.random.normal(first, (64, 64)) / 8,
        "b1": jnp.zeros(64),
        "w2": jax.random.normal(second, (64, 10)) / 8,
    }
    tx = optax.with_extra_args_support(tx)

    def train_step(carry, key):
        params, state = carry
        rows = jax.random.randint(key, (batch,), 0, len(x)) if batch < len(x) else ...

        def value_fn(params):
            return loss_fn(params, x[rows], y[rows])

        value, grad = jax.value_and_grad(value_fn)(params)
        extra = {"value": value, "grad": grad, "value_fn": value_fn}
        updates, state = tx.update(grad, state, params, **extra)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(batches, updates)
    (params, state), _ = jax.lax.scan(train_step, (params, tx.init(params)), keys)
    if isinstance(state, LookaheadState):
        params = slow_params(state, params)
    elif isinstance(state, contrib.ScheduleFreeState):
        params = contrib.schedule_free_eval_params(state, params)
    return loss_fn(params, x, y)


def results_of(inner, updates: int, batch: int, seeds: int) -> dict[str, jax.Array]:
    """Returns the losses of all seeds, alone and by policy and k."""
    x, y = load_digits(return_X_y=True)
    x, y = jnp.asarray(x / 16, jnp.float32), jnp.asarray(y)
    batch = min(batch, len(x))

    def program(wrap):
        def run(k, seed):
            return train(wrap(inner, k), x, y, updates, batch, seed)

        return jax.jit(jax.vmap(run, (None, 0)))  # one program for all k

    results = {"alone": program(lambda inner, _: inner)(0, jnp.arange(seeds))}
    for inner_state in POLICIES:
        run = program(functools.partial(lookahead, inner_state=inner_state))
        for k in CYCLES:
            results[f"{inner_state}, {k}"] = run(k, jnp.arange(seeds))
    return results


def main() -> None:
    parser = Parser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few updates, one seed")
    parser.add_json()
    args = parser.parse_args()
    updates, seeds = (30, 1) if args.quick else (2000, 5)
    print(environment())
    rows = []
    for name in progress(list(INNERS)[:2] if args.quick else list(INNERS), "optimizer"):
        size = (updates // 10, 2**30) if name == "lbfgs" else (updates, 64)
        results = results_of(INNERS[name](), *size, seeds)
        if not all(jnp.isfinite(losses).all() for losses in results.values()):
            sys.exit(f"{name}: a loss is not finite")
        means = {form: f"{losses.mean():.2g}" for form, losses in results.items()}
        rows.append({"inner": name} | means)
    print(f"\nMean training loss, {updates} updates (lbfgs: a tenth), {seeds} seeds\n")
    print(markdown(rows))
    write_rows(args.json, rows)


if __name__ == "__main__":
    main()
