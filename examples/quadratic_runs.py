"""Run every method at many settings, and compare it with the exact theory."""

import argparse
import itertools
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import quadratic_theory as theory
from command_line import describe
from tqdm import tqdm

from optax_lookahead import lookahead, outer_loop

THREADS = 2
PART = 10  # settings in a call; divides the size of every grid but one, of 5
LIMIT = 5  # standard errors
# Of the initial weights; curvature and noise are 1.
START_MEAN, START_SPREAD = 3.0, 2.0
TRANSIENTS = 1, 4  # syncs after which mean and variance are compared


class Method(NamedTuple):
    make: Callable[..., optax.GradientTransformation]  # the library's optimizer
    systems: Callable  # the theory's inner step and cycle, and the steps in a cycle
    grid: dict[str, tuple[float, ...]]  # the arguments of both
    shown: dict[str, float]  # the setting whose variance is printed


RATES = {"rate": (0.1, 0.5, 1.0, 1.5, 1.9)}  # times a curvature of 1
K = {"k": (1, 5, 20)}
ALPHA = {"alpha": (0.2, 0.5, 0.8, 1.0)}
MOMENTUM = {"momentum": (0.5, 0.9)}


def inner_sgd(rate):
    return theory.sgd(rate, 1.0, 1.0)


def heavy_ball_in_lookahead(inner_state: str) -> Method:
    def make(rate, momentum, k, alpha):
        inner = optax.sgd(rate, momentum=momentum)
        return lookahead(inner, k, alpha, inner_state=inner_state)

    def systems(rate, momentum, k, alpha):
        inner = theory.heavy_ball(rate, momentum, 1.0, 1.0)
        return inner, theory.lookahead(inner, k, alpha, inner_state), k

    shown = {"rate": 0.1, "momentum": 0.9, "k": 5, "alpha": 0.5}
    return Method(make, systems, RATES | MOMENTUM | K | ALPHA, shown)


def with_outer_momentum(nesterov: bool, eta, mu, shown) -> Method:
    def make(rate, k, eta, mu):
        outer = optax.sgd(eta, momentum=mu, nesterov=nesterov)
        return outer_loop(optax.sgd(rate), outer, k)

    def systems(rate, k, eta, mu):
        inner = inner_sgd(rate)
        return inner, theory.outer_loop(inner, k, eta, mu, nesterov), k

    return Method(make, systems, RATES | K | {"eta": eta, "mu": mu}, shown)


def nested_systems(rate, k, alpha, outer_k, outer_alpha):
    inner = inner_sgd(rate)
    middle = theory.lookahead(inner, k, alpha)
    return inner, theory.lookahead(middle, outer_k, outer_alpha), k * outer_k


METHODS = {
    "SGD": Method(
        lambda rate: optax.sgd(rate),
        lambda rate: (inner_sgd(rate), inner_sgd(rate), 1),
        RATES,
        {"rate": 1.0},
    ),
    "Lookahead": Method(
        lambda rate, k, alpha: lookahead(optax.sgd(rate), k, alpha),
        lambda rate, k, alpha: (
            inner_sgd(rate),
            theory.lookahead(inner_sgd(rate), k, alpha),
            k,
        ),
        RATES | K | ALPHA,
        {"rate": 0.5, "k": 5, "alpha": 0.5},
    ),
    "nested Lookahead": Method(
        lambda rate, k, alpha, outer_k, outer_alpha: lookahead(
            lookahead(optax.sgd(rate), k, alpha), k * outer_k, outer_alpha
        ),
        nested_systems,
        RATES
        | {"k": (2, 5), "alpha": (0.5, 0.8)}
        | {"outer_k": (2, 3), "outer_alpha": (0.5, 0.8)},
        {"rate": 0.5, "k": 5, "alpha": 0.5, "outer_k": 3, "outer_alpha": 0.8},
    ),
    "SlowMo": with_outer_momentum(
        False, (0.5, 1.0), (0.2, 0.5), {"rate": 0.5, "k": 5, "eta": 1.0, "mu": 0.5}
    ),
    "SNOO, DiLoCo": with_outer_momentum(
        True, (0.5, 0.7), (0.37, 0.9), {"rate": 0.5, "k": 5, "eta": 0.7, "mu": 0.9}
    ),
    "heavy ball": Method(
        lambda rate, momentum: optax.sgd(rate, momentum=momentum),
        lambda rate, momentum: (
            2 * (theory.heavy_ball(rate, momentum, 1.0, 1.0),) + (1,)
        ),
        RATES | MOMENTUM,
        {"rate": 0.1, "momentum": 0.9},
    ),
    "keep": heavy_ball_in_lookahead("keep"),
    "reset": heavy_ball_in_lookahead("reset"),
    "interpolate": heavy_ball_in_lookahead("interpolate"),
}


class Check(NamedTuple):
    """One number of the theory, and its estimate from the runs."""

    what: str
    theory: float
    measured: float
    standard_error: float

    @property
    def z(self) -> float:
        return (self.measured - self.theory) / self.standard_error


def settings_of(method: Method) -> list[dict[str, float]]:
    """Returns the grid, sorted by the steps that a setting needs."""
    grid = [
        dict(zip(method.grid, values, strict=True))
        for values in itertools.product(*method.grid.values())
    ]
    return sorted(grid, key=lambda setting: steps_of(method, setting))


def cycles_of(method: Method, setting) -> int:
    """Returns the number of cycles after which the start has no influence."""
    _, cycle, _ = method.systems(**setting)
    rho = max(float(theory.spectral_radius(cycle)), 0.1)
    # The start's variance times 1e-7 is far below the Monte-Carlo error.
    return max(math.ceil(math.log(1e-7) / (2 * math.log(rho))), *TRANSIENTS)


def steps_of(method: Method, setting) -> int:
    """Returns the steps to run: one cycle more, for the fast weights inside it."""
    return (cycles_of(method, setting) + 1) * method.systems(**setting)[2]


def fast_weights(opt_state, params):  # noqa: ARG001
    return params


def make_run(make, chains: int, room: int, read=fast_weights):
    """Returns a jitted function that runs many chains at many settings.

    It takes the number of steps, at most `room`, and for each setting a seed and, by
    name, the arguments of `make` and optionally `curvature`, `sigma`, `mean` and
    `spread`. It returns the mean and the variance over the chains of what `read`
    returns, after every step, `[settings, room, 2]`.
    """

    def run(
        steps,
        seed,
        curvature=1.0,
        sigma=1.0,
        mean=START_MEAN,
        spread=START_SPREAD,
        **setting,
    ):
        tx = make(**setting)
        key = jax.random.key(seed)

        def train_step(params, state, c):
            """A training step of one chain, whose parameter is one number."""
            updates, state = tx.update(curvature * (params - c), state, params)
            return optax.apply_updates(params, updates), state

        def body(step, carry):
            params, state, moments = carry
            c = sigma * jax.random.normal(jax.random.fold_in(key, step), (chains,))
            params, state = jax.vmap(train_step)(params, state, c)
            weights = jax.vmap(read)(state, params)
            now = jnp.stack([weights.mean(), weights.var(ddof=1)])
            return params, state, moments.at[step].set(now)

        first = jax.random.fold_in(key, room)
        params = mean + spread * jax.random.normal(first, (chains,))
        moments = jnp.zeros((room, 2))
        carry = params, jax.vmap(tx.init)(params), moments
        return jax.lax.fori_loop(0, steps, body, carry)[2]

    def run_all(steps, seeds, **settings):
        return jax.vmap(lambda seed, args: run(steps, seed, **args))(seeds, settings)

    return jax.jit(run_all)


def stack(settings: list[dict[str, float]]) -> dict[str, np.ndarray]:
    """Returns the settings as arrays by name, int32 if the first value is an int."""
    return {
        name: np.array(
            [setting[name] for setting in settings],
            np.int32 if isinstance(settings[0][name], int) else np.float32,
        )
        for name in settings[0]
    }


def checks_of(method: Method, setting, moments, chains: int) -> Iterator[Check]:
    """Yields the numbers of the theory for one setting, each with its estimate."""
    inner, cycle, length = method.systems(**setting)
    d, inner_d = len(cycle.noise), len(inner.noise)
    start_mean, start_covariance = np.zeros(d), np.zeros((d, d))
    start_mean[0], start_covariance[0, 0] = START_MEAN, START_SPREAD**2

    def variance(what, exact, step):
        error = exact * math.sqrt(2 / (chains - 1))  # for normal variables
        return Check(what, float(exact), float(moments[step - 1, 1]), error)

    for n in TRANSIENTS:
        m, c = theory.after(cycle, n, start_mean, start_covariance)
        error = math.sqrt(c[0, 0] / chains)
        measured = float(moments[n * length - 1, 0])
        yield Check("transient mean", float(m[0]), measured, error)
        yield variance("transient variance", c[0, 0], n * length)
    last = cycles_of(method, setting) * length
    c = theory.stationary_covariance(cycle)
    yield variance("stationary variance", c[0, 0], last)
    # The inner state after a sync, without the outer momentum.
    c = c[:inner_d, :inner_d]
    k = setting.get("k", 1)
    for i in sorted({1, k // 2, k - 1} & set(range(1, k))):
        _, fast = theory.after(inner, i, np.zeros(inner_d), c)
        yield variance("variance within a cycle", fast[0, 0], last + i)


def check_methods(
    args: argparse.Namespace,
) -> dict[str, list[tuple[dict, list[Check]]]]:
    """Returns by method each setting with each of its checks."""
    grids = {name: settings_of(method) for name, method in METHODS.items()}
    results = {name: [] for name in METHODS}
    seed, jobs, programs = itertools.count(), {}, {}
    for name, grid in tqdm(grids.items(), "compiling", leave=False):
        method = METHODS[name]
        # All of one size, so that they need only one program.
        parts = [grid[i : i + PART] for i in range(0, len(grid), PART)]
        jobs[name] = [
            (steps_of(method, part[-1]), np.array([next(seed) for _ in part]), part)
            for part in parts
        ]
        steps, seeds, part = jobs[name][0]
        run = make_run(method.make, args.chains, steps_of(method, grid[-1]))
        programs[name] = run.lower(steps, seeds, **stack(part)).compile()
    with (
        tqdm(total=sum(map(len, grids.values())), unit="setting", smoothing=0) as bar,
        ThreadPoolExecutor(THREADS) as pool,
    ):
        for name, method in METHODS.items():
            bar.set_description(name)

            def measure(job, run=programs[name]):
                steps, seeds, part = job
                return np.asarray(run(steps, seeds, **stack(part)))

            moments = pool.map(measure, jobs[name])
            for (_, _, part), of_part in zip(jobs[name], moments, strict=True):
                for setting, of_setting in zip(part, of_part, strict=True):
                    checks = checks_of(method, setting, of_setting, args.chains)
                    results[name].append((setting, list(checks)))
                bar.update(len(part))
    return results


def print_checks(results, args: argparse.Namespace) -> bool:
    """Prints the comparison with the theory, and returns whether they agree."""
    print(
        f"\nOne coordinate, curvature and noise 1, {args.chains} chains, one seed "
        "per setting.\nStationary variance after a sync, at one setting per method:\n"
    )
    print(f"{'method':<18}{'theory':>9}{'run':>9}{'diff, SE':>10}   setting")
    for name, method in METHODS.items():
        for setting, checks in results[name]:
            if setting == method.shown:
                (check,) = (c for c in checks if c.what == "stationary variance")
                print(
                    f"{name:<18}{check.theory:9.4f}{check.measured:9.4f}"
                    f"{check.z:+10.2f}   {describe(setting)}"
                )
    print(
        "\nThe whole grid: mean and variance after 1 and 4 syncs, stationary variance "
        "at a sync,\nvariance within a cycle. Of normal errors, 4.6 % exceed 2 SE.\n"
    )
    print(f"{'method':<18}{'settings':>9}{'numbers':>9}{'worst, SE':>11}{'> 2 SE':>9}")
    everything = list(itertools.chain(*results.values()))
    for name, rows in (results | {"all": everything}).items():
        z = np.abs([check.z for _, checks in rows for check in checks])
        print(
            f"{name:<18}{len(rows):9}{len(z):9}{z.max():11.2f}"
            f"{100 * np.mean(z > 2):7.1f} %"
        )
    wrong = [
        f"{name}, {describe(setting)}: {check}"
        for name, rows in results.items()
        for setting, checks in rows
        for check in checks
        if not abs(check.z) <= LIMIT  # NaN too
    ]
    print("\n".join([*wrong, ""]))
    return not wrong
