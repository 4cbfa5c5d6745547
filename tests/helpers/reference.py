"""Algorithm 1 of the paper and its descendants, transcribed in NumPy as nested loops.

Zhang, Lucas, Hinton, Ba, "Lookahead Optimizer: k steps forward, 1 step back", 2019.
It shares nothing with the code under test: arrays that change in place, loops instead
of a counter, and the inner and outer optimizers written out from their papers.
"""

import copy

import numpy as np


def sgd(learning_rate):
    return lambda g, theta, memory: -learning_rate * g


def momentum(learning_rate, decay):
    def step(g, theta, memory):
        memory["trace"] = g + decay * memory.get("trace", 0.0)
        return -learning_rate * memory["trace"]

    return step


def adamw(learning_rate, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0):
    """Adam, Kingma, Ba 2015; with decay AdamW, Loshchilov, Hutter 2019, Algorithm 2."""

    def step(g, theta, memory):
        memory["t"] = memory.get("t", 0) + 1
        memory["m"] = b1 * memory.get("m", 0.0) + (1 - b1) * g
        memory["v"] = b2 * memory.get("v", 0.0) + (1 - b2) * g**2
        m_hat = memory["m"] / (1 - b1 ** memory["t"])
        v_hat = memory["v"] / (1 - b2 ** memory["t"])
        direction = m_hat / (np.sqrt(v_hat) + eps)
        return -learning_rate * (direction + weight_decay * theta)

    return step


def keep(memory, alpha):
    """Leaves the inner optimizer's memory alone at a sync, as the paper's runs do."""


def reset(memory, alpha):
    memory.clear()


def interpolate():
    """Returns the paper's third choice, with a cache of the memory at the last sync."""
    cache = {}

    def at_sync(memory, alpha):
        for name in memory.keys() - {"t"}:
            memory[name] = (1 - alpha) * cache.get(name, 0.0) + alpha * memory[name]
            cache[name] = memory[name].copy()

    return at_sync


def lookahead(inner, gradient, phi, k, alpha, cycles, at_sync=keep, memories=None):
    """Returns the fast and the slow weights after every inner step.

    `inner(g, theta, memory)` returns a step, `gradient(theta, step)` the gradient at
    inner step number `step`, `alpha(t)` the slow step size after t syncs, and
    `at_sync(memory, alpha)` changes the inner optimizer's memory. The list `memories`
    collects its contents after every inner step.
    """
    phi, memory, trajectory, step = phi.copy(), {}, [], 0
    memories = [] if memories is None else memories
    for t in range(cycles):
        theta = phi.copy()
        for i in range(1, k + 1):
            theta += inner(gradient(theta, step), theta, memory)
            step += 1
            if i < k:
                trajectory.append((theta.copy(), phi.copy()))
                memories.append(copy.deepcopy(memory))
        phi += alpha(t) * (theta - phi)
        at_sync(memory, alpha(t))
        trajectory.append((phi.copy(), phi.copy()))  # the fast weights restart here
        memories.append(copy.deepcopy(memory))
    return trajectory


def outer_loop(inner, outer, gradient, phi, k, cycles):
    """Returns the fast and the slow weights where `outer` takes the slow step.

    `outer(s, phi, memory)` returns a step too, s being phi minus the fast weights.
    """
    phi, memory, outer_memory, trajectory, step = phi.copy(), {}, {}, [], 0
    for _ in range(cycles):
        theta = phi.copy()
        for i in range(1, k + 1):
            theta += inner(gradient(theta, step), theta, memory)
            step += 1
            if i < k:
                trajectory.append((theta.copy(), phi.copy()))
        phi += outer(phi - theta, phi, outer_memory)
        trajectory.append((phi.copy(), phi.copy()))
    return trajectory


def snoo(eta, mu):
    """SNOO, Kallusky et al. 2025; with one worker DiLoCo, Douillard et al. 2023."""

    def step(s, phi, memory):
        memory["b"] = mu * memory.get("b", 0.0) + s
        return -eta * (mu * memory["b"] + s)

    return step


def muloco(eta, mu):
    """MuLoCo with one worker, Thérien et al. 2025, whose momentum holds eta."""

    def step(d, phi, memory):
        memory["u"] = mu * memory.get("u", 0.0) + eta * d
        return -mu * memory["u"] - eta * d

    return step


def slowmo(alpha, beta, gamma):
    """SlowMo with one worker, Wang et al. 2020; `gamma(t)` is the base learning rate.

    The sum of the base steps of one cycle is s, as they are taken with gamma in them.
    """

    def step(s, phi, memory):
        t = memory["t"] = memory.get("t", -1) + 1
        memory["u"] = beta * memory.get("u", 0.0) + s / gamma(t)
        return -alpha * gamma(t) * memory["u"]

    return step


def multilayer(inner, outers, ks, gradient, phi, cycles):
    """Multilayer Lookahead, Pushkin, Barba 2021: two levels, one period in the other.

    Returns the fast weights after every inner step, and those of both slow levels.
    """
    top, step, trajectory = phi.copy(), 0, []
    memories = {}, {}, {}
    for _ in range(cycles):
        middle = top.copy()
        for j in range(1, ks[1] + 1):
            theta = middle.copy()
            for i in range(1, ks[0] + 1):
                theta += inner(gradient(theta, step), theta, memories[0])
                step += 1
                if i < ks[0]:
                    trajectory.append([theta.copy(), middle.copy(), top.copy()])
            middle += outers[0](middle - theta, middle, memories[1])
            if j < ks[1]:
                trajectory.append([middle.copy(), middle.copy(), top.copy()])
        top += outers[1](top - middle, top, memories[2])
        trajectory.append([top.copy()] * 3)
    return trajectory


def airbench(inner, gradient, phi, steps):
    """Returns what `legacy/airbench94.py` of KellerJordan/cifar10-airbench ends with.

    Its weights move towards the slow ones by a growing decay every five steps, and
    become equal to them after the last step.
    """
    net, ema, memory = phi.copy(), phi.copy(), {}

    def update(decay):
        ema[:] = decay * ema + (1 - decay) * net
        net[:] = ema

    for step in range(1, steps + 1):
        net += inner(gradient(net, step - 1), net, memory)
        if step % 5 == 0:
            update(0.95**5 * (step / steps) ** 3)
    update(1.0)
    return net
