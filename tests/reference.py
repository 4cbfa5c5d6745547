"""Algorithm 1 of the paper, transcribed in NumPy as its two nested loops.

Zhang, Lucas, Hinton, Ba, "Lookahead Optimizer: k steps forward, 1 step back", 2019.
It shares nothing with the code under test: arrays that change in place, loops instead
of a counter, and the inner optimizers written out from their papers.
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
    """Returns the paper's third choice, with a cache of what the last sync left."""
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
    `at_sync(memory, alpha)` changes the inner optimizer's memory. To the list
    `memories` goes what that holds after every inner step.
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
