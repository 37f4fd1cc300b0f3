"""Cached sampling from either model.

The cache holds, for each layer, keys and values of the tokens seen; for an FSN the values are the
folded phasor powers, and the newest one waits for its successor (the one-step delay). Logits are
those of the full forward pass.
"""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fsn_jax.config import ConfigError
from fsn_jax.fsn import Cache

Variables = Mapping[str, Any]

CHUNK = 32
"""Tokens sampled in one compiled call: often enough to stream, seldom enough to be quick."""


def sample_token(
    logits: Float[Array, "B V"],
    key: Array,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
) -> Int[Array, " B"]:
    """Draws a token a row.

    Args:
      logits: float32.
      key: PRNG key.
      temperature: divides the logits; 0 takes the likeliest token.
      top_k: how many of the likeliest tokens to draw from; 0 means all.
      top_p: the least probability that the tokens drawn from must hold together; 1 means all.
    """
    if temperature == 0:
        return logits.argmax(axis=-1)
    logits = logits / temperature
    if top_k and top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if top_p < 1:
        descending = jnp.sort(logits, axis=-1, descending=True)
        mass = jnp.cumsum(jax.nn.softmax(descending, axis=-1), axis=-1)
        # The token that carries the mass past top_p is still in, so at least one always is.
        inside = jnp.concatenate([jnp.ones_like(mass[:, :1], bool), mass[:, :-1] < top_p], axis=-1)
        least = jnp.min(jnp.where(inside, descending, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return jax.random.categorical(key, logits)


@functools.partial(jax.jit, static_argnames=("model", "capacity"))
def _prefill(
    model: nn.Module, variables: Variables, prompt: Array, capacity: int
) -> tuple[Array, Cache]:
    cache: Any = model.apply(variables, prompt.shape[0], capacity, method="empty_cache")
    logits, cache = model.apply(variables, prompt, cache, method="extend")
    return logits[:, -1], cache


@functools.partial(jax.jit, static_argnames=("model", "temperature", "top_k", "top_p"))
def _sample_chunk(
    model: nn.Module,
    variables: Variables,
    logits: Array,
    cache: Cache,
    key: Array,
    drawn: Array,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
) -> tuple[Array, Array, Cache]:
    draw = functools.partial(sample_token, temperature=temperature, top_k=top_k, top_p=top_p)

    def body(carry: tuple[Array, Cache], index: Array) -> tuple[tuple[Array, Cache], Array]:
        logits, cache = carry
        token = draw(logits, jax.random.fold_in(key, index))
        extended: Any = model.apply(variables, token[:, None], cache, method="extend")
        return (extended[0][:, 0], extended[1]), token

    (logits, cache), tokens = jax.lax.scan(body, (logits, cache), drawn + jnp.arange(CHUNK))
    return tokens.T, logits, cache


def stream(
    model: nn.Module,
    variables: Variables,
    prompt: Int[Array, "B S"],
    *,
    num_tokens: int,
    key: Array,
    context: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Iterator[Int[Array, "B n"]]:
    """Yields the tokens that follow ``prompt``, a few at a time.

    When ``context`` tokens are reached, or the prompt is longer, the model goes on from the last
    half of a context: neither model was trained to look further back.

    Args:
      model: an ``FSN`` or a ``Transformer``.
      variables: its variables, ``{"params": ...}``.
      prompt: token ids; at least one a row.
      num_tokens: how many to draw.
      key: PRNG key; token i is drawn with ``fold_in(key, i)``.
      context: how far the model may look back.
      temperature: see ``sample_token``.
      top_k: see ``sample_token``.
      top_p: see ``sample_token``.

    Raises:
      ConfigError: an argument is out of range.
    """
    if prompt.shape[1] < 1:
        raise ConfigError("prompt must hold at least one token")
    if context < 2:
        raise ConfigError(f"context must be at least 2; got {context}")
    check_sampling(num_tokens=num_tokens, temperature=temperature, top_k=top_k, top_p=top_p)
    window, drawn = prompt, 0
    while drawn < num_tokens:
        if window.shape[1] >= context:
            window = window[:, -(context // 2) :]
        logits, cache = _prefill(model, variables, window, context)
        while drawn < num_tokens and window.shape[1] < context:
            tokens, logits, cache = _sample_chunk(
                model,
                variables,
                logits,
                cache,
                key,
                jnp.int32(drawn),
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
            )
            # What a chunk drew past the cache's end or the caller's wish is dropped.
            room = min(CHUNK, num_tokens - drawn, context - window.shape[1])
            window = jnp.concatenate([window, tokens[:, :room]], axis=1)
            drawn += room
            yield tokens[:, :room]


def generate(
    model: nn.Module,
    variables: Variables,
    prompt: Int[Array, "B S"],
    *,
    num_tokens: int,
    key: Array,
    context: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Int[Array, "B num_tokens"]:
    """The tokens that follow ``prompt``; arguments as for ``stream``."""
    chunks = stream(
        model,
        variables,
        prompt,
        num_tokens=num_tokens,
        key=key,
        context=context,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
    )
    return jnp.concatenate(list(chunks), axis=1)


def check_sampling(*, num_tokens: int, temperature: float, top_k: int, top_p: float) -> None:
    """Raises ConfigError if an argument of ``stream`` is out of range."""
    if num_tokens < 1:
        raise ConfigError(f"num_tokens must be at least 1; got {num_tokens}")
    if not 0 <= temperature < float("inf"):
        raise ConfigError(f"temperature must be finite and not negative; got {temperature}")
    if top_k < 0:
        raise ConfigError(f"top_k must not be negative; got {top_k}")
    if not 0 < top_p <= 1:
        raise ConfigError(f"top_p must be above 0 and at most 1; got {top_p}")
