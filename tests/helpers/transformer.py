"""A small language model with parameters of 0, 1, 2 and 3 axes."""

import jax
import jax.numpy as jnp

VOCABULARY, WIDTH, HEADS, CONTEXT = 11, 8, 2, 6


def init_params(key, dtype=None, width=WIDTH):
    """Returns the parameters of one block, in float32 or another `dtype`."""
    keys = iter(jax.random.split(key, 6))

    def matrix(*shape):
        return jax.random.normal(next(keys), shape, dtype) * shape[0] ** -0.5

    head = width // HEADS
    return {
        "embedding": matrix(VOCABULARY, width),
        "qkv": matrix(width, HEADS, 3 * head),
        "out": matrix(width, width),
        "up": matrix(width, 2 * width),
        "up_bias": jnp.zeros(2 * width, dtype),
        "down": matrix(2 * width, width),
        "scale": jnp.ones(width, dtype),
        "temperature": jnp.ones([], dtype),
    }


@jax.numpy_rank_promotion("allow")
def loss_fn(params, tokens):
    """Returns the mean loss of the next token; `tokens` is (batch, time)."""

    def normed(x):
        return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)

    x = params["embedding"][tokens[:, :-1]]
    q, k, v = jnp.split(
        jnp.einsum("btd,dhe->bhte", normed(x) * params["scale"], params["qkv"]), 3, -1
    )
    time = tokens.shape[1] - 1
    scores = jnp.einsum("bhte,bhse->bhts", q, k) / params["temperature"]
    scores = jnp.where(jnp.tri(time, dtype=bool), scores, -jnp.inf)
    heads = jnp.einsum("bhts,bhse->bthe", jax.nn.softmax(scores), v)
    x = x + heads.reshape(*x.shape) @ params["out"]
    hidden = jax.nn.gelu(normed(x) @ params["up"] + params["up_bias"])
    x = x + hidden @ params["down"]
    log_probs = jax.nn.log_softmax(normed(x) @ params["embedding"].T)
    return -jnp.mean(jnp.take_along_axis(log_probs, tokens[:, 1:, None], -1))


def tokens(key, batch):
    """Returns a batch in which the next token mostly follows from the last."""
    first = jax.random.randint(key, (batch, 1), 0, VOCABULARY)
    return (first + 3 * jnp.arange(CONTEXT + 1)[None]) % VOCABULARY
