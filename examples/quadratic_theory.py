"""Exact theory of optimizers on the noisy quadratic model, one coordinate at a time.

The gradient is `a (theta - c)` with curvature `a` and `c ~ N(0, s^2)`, new in every
step (Wu et al. 2018; Zhang et al. 2019; Lookahead paper, section 3). So every method
here is linear, the mean and the variance of its weights are known after any number of
steps, and nothing has to be estimated.

First closed forms, then the same and more as linear systems `z' = M z + noise`, whose
first component is the weight. All arguments may be arrays of curvatures, rates and so
on that broadcast against each other. It uses NumPy only, and no code of the library.
"""

from typing import NamedTuple

import numpy as np

# Closed forms: `rate` is g, `alpha` is al, and r = 1 - g a.


def sgd_variance(rate, curvature, sigma):
    """Stationary variance of SGD: `V_SGD = g a s^2 / (2 - g a)`."""
    return rate * curvature * sigma**2 / (2 - rate * curvature)


def sgd_contraction(rate, curvature, k=1):
    """Factor of the mean in k steps of SGD: `q = (1 - g a)^k`."""
    return (1 - rate * curvature) ** k


def lookahead_ratio(q, alpha):
    """Proposition 2 of the Lookahead paper: `V_LA / V_SGD`.

    `al^2 (1 - q^2) / (al^2 (1 - q^2) + 2 al (1 - al) (1 - q))`, where q is the factor
    of the mean in the inner steps of a cycle.
    """
    up = alpha**2 * (1 - q**2)
    return up / (up + 2 * alpha * (1 - alpha) * (1 - q))


def lookahead_contraction(q, alpha):
    """Factor of the mean in one cycle: `1 - al + al q`."""
    return 1 - alpha + alpha * q


def lookahead_variance(rate, curvature, sigma, k, alpha):
    """Stationary variance of the slow weights around SGD (Proposition 2)."""
    q = sgd_contraction(rate, curvature, k)
    return lookahead_ratio(q, alpha) * sgd_variance(rate, curvature, sigma)


def fast_variance(rate, curvature, sigma, slow_variance, i):
    """Variance of the fast weights i steps after a sync.

    `r^(2i) V_slow + (1 - r^(2i)) V_SGD`
    """
    r2 = sgd_contraction(rate, curvature, i) ** 2
    return r2 * slow_variance + (1 - r2) * sgd_variance(rate, curvature, sigma)


def transient(contraction, stationary_variance, n, mean, variance):
    """Mean and variance after n steps, or n cycles, of a one-dimensional method.

    `s^n m_0` and `s^(2n) V_0 + (1 - s^(2n)) V`; s is the factor of the mean in one.
    """
    sn = contraction**n
    return sn * mean, sn**2 * variance + (1 - sn**2) * stationary_variance


def nested_variance(rate, curvature, sigma, ks, alphas):
    """Stationary variance of nested Lookahead: the ratios of the levels multiply.

    `ks` and `alphas` are those of the inner and of the outer level; the outer k counts
    cycles of the inner level.
    """
    q = sgd_contraction(rate, curvature)
    variance = sgd_variance(rate, curvature, sigma)
    for k, alpha in zip(ks, alphas, strict=True):
        variance = variance * lookahead_ratio(q**k, alpha)
        q = lookahead_contraction(q**k, alpha)
    return variance


def heavy_ball_variance(rate, momentum, curvature, sigma):
    """Stationary variance of SGD with heavy-ball momentum b.

    `g a s^2 (1 + b) / ((1 - b) (2 (1 + b) - g a))`
    """
    ga, b = rate * curvature, momentum
    return ga * sigma**2 * (1 + b) / ((1 - b) * (2 * (1 + b) - ga))


def slowmo_variance(rate, curvature, sigma, k, eta, mu):
    """Stationary variance of SlowMo around SGD, with one worker.

    `eta (1 + q) (1 + mu) / ((1 - mu) (2 (1 + mu) - eta (1 - q))) V_SGD`
    """
    q = sgd_contraction(rate, curvature, k)
    ratio = eta * (1 + q) * (1 + mu) / ((1 - mu) * (2 * (1 + mu) - eta * (1 - q)))
    return ratio * sgd_variance(rate, curvature, sigma)


def snoo_variance(rate, curvature, sigma, k, eta, mu):
    """Stationary variance of SNOO, which is DiLoCo with one worker, around SGD.

    `eta^2 N / p^2 [(1 + p mu) / ((1 - p mu) (1 - p) (1 + p + 2 p mu)) - 1]` with
    `N = (1 - q^2) V_SGD` and `p = 1 - eta (1 - q)`, here with p^2 cancelled, as p may
    be 0.
    """
    q = sgd_contraction(rate, curvature, k)
    p = 1 - eta * (1 - q)
    n = (1 - q**2) * sgd_variance(rate, curvature, sigma)
    up = 1 + 2 * mu + 2 * mu**2 - p * mu * (1 + 2 * mu)
    return eta**2 * n * up / ((1 - p * mu) * (1 - p) * (1 + p + 2 * p * mu))


# Linear systems.


class System(NamedTuple):
    """One step or one cycle, `z' = M z + noise`; the weight is `z[0]`."""

    transition: np.ndarray  # M, `[..., d, d]`
    noise: np.ndarray  # covariance of the noise, `[..., d, d]`


def sgd(rate, curvature, noise) -> System:
    """One step of SGD; `noise` is the variance of the gradient, `a^2 s^2`."""
    return System(
        _matrix([[1 - rate * curvature]]), _matrix([[np.square(rate) * noise]])
    )


def heavy_ball(rate, momentum, curvature, noise, nesterov=False) -> System:
    """One step of SGD with momentum on `z = (theta, v)`, where v is the last step.

    Heavy ball is `v' = b v - g grad` and `theta' = theta + v'`: `M = [[1 - g a, b],
    [-g a, b]]`, and the noise enters both rows as `g a c`. Nesterov momentum, as in
    Optax, moves theta by `b v' - g grad` instead. `noise` is as in `sgd`.
    """
    ga, b = rate * curvature, momentum
    to_weight, from_v = (1 + b, b**2) if nesterov else (1.0, b)
    transition = _matrix([[1 - to_weight * ga, from_v], [-ga, b]])
    variance = np.square(rate) * noise
    row = [variance * to_weight, variance]
    return System(transition, _matrix([[row[0] * to_weight, row[0]], row]))


def repeat(system: System, n: int) -> System:
    """Joins n steps into one: `M^n`, and `S_n = sum_j M^j Q M'^j` for the noise."""
    d = system.noise.shape[-1]
    result = System(np.eye(d), np.zeros((d, d)))
    while n:  # by its binary digits
        if n % 2:
            result = _then(result, system)
        system, n = _then(system, system), n // 2
    return result


def lookahead(inner: System, k: int, alpha, inner_state="keep") -> System:
    """One cycle of Lookahead around any system: `T = P0 + Pk M^k`, noise `Pk S_k Pk'`.

    The sync is `z' = P0 z_0 + Pk z_k`. For the weight P0 and Pk are `1 - al` and `al`,
    and for the rest of z they are 0 and 1 (keep), 0 and 0 (reset) or `1 - al` and `al`
    (interpolate).
    """
    many = repeat(inner, k)
    alpha = np.asarray(alpha)[..., None, None]
    old, new = {
        "keep": (0.0, 1.0),
        "reset": (0.0, 0.0),
        "interpolate": (1 - alpha, alpha),
    }[inner_state]
    weight = np.zeros(inner.noise.shape[-2:])
    weight[0, 0] = 1.0
    rest = np.eye(len(weight)) - weight
    p0 = (1 - alpha) * weight + old * rest
    pk = alpha * weight + new * rest
    return System(p0 + pk @ many.transition, pk @ many.noise @ np.swapaxes(pk, -1, -2))


def outer_loop(inner: System, k: int, eta, mu, nesterov=False) -> System:
    """One cycle of an outer optimizer with momentum around a one-dimensional system.

    It gets the pseudo-gradient `(1 - q) phi - noise`, that of a quadratic again, so
    SlowMo is heavy ball on it, and SNOO and DiLoCo are Nesterov momentum on it.
    """
    many = repeat(inner, k)
    q, noise = many.transition[..., 0, 0], many.noise[..., 0, 0]
    return heavy_ball(eta, mu, 1 - q, noise, nesterov)


def after(system: System, n: int, mean, covariance):
    """Mean `[..., d]` and covariance of z, n steps after the given ones."""
    many = repeat(system, n)
    transposed = np.swapaxes(many.transition, -1, -2)
    return (
        np.squeeze(many.transition @ np.asarray(mean)[..., None], -1),
        many.transition @ covariance @ transposed + many.noise,
    )


def stationary_covariance(system: System) -> np.ndarray:
    """Solves the discrete Lyapunov equation `C = M C M' + Q`, `[..., d, d]`."""
    m, q = system
    d = q.shape[-1]
    kron = np.einsum("...ij,...kl->...ikjl", m, m).reshape(*m.shape[:-2], d * d, d * d)
    flat = q.reshape(*q.shape[:-2], d * d, 1)
    c = np.linalg.solve(np.eye(d * d) - kron, flat)
    return c.reshape(*c.shape[:-2], d, d)


def spectral_radius(system: System, k: int = 1) -> np.ndarray:
    """Contraction per step of a cycle of k steps: `max |eig(M)|^(1/k)`."""
    return np.abs(np.linalg.eigvals(system.transition)).max(-1) ** (1 / k)


def excess_risk(curvature, mean, variance):
    """Expected loss above that of the optimum, `sum_i a_i (m_i^2 + V_i) / 2`."""
    return np.sum(curvature * (np.square(mean) + variance), axis=-1) / 2


def _then(first: System, second: System) -> System:
    m = second.transition
    return System(
        m @ first.transition, m @ first.noise @ np.swapaxes(m, -1, -2) + second.noise
    )


def _matrix(rows) -> np.ndarray:
    """Returns matrices `[..., d, d]`, from entries that broadcast."""
    entries = np.broadcast_arrays(*[x for row in rows for x in row])
    return np.stack(entries, -1).reshape(*entries[0].shape, len(rows), len(rows))
