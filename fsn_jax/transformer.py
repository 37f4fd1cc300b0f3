"""The baseline: a decoder-only transformer with pre-RMSNorm, RoPE, SwiGLU and no biases.

It shares the attention weights in blocks, the rotary frequencies, the cache and the sampling with
the FSN; the mixer, the feed-forward and the state differ.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fsn_jax.cache import (
    LayerCache,
    empty_layer_cache,
    extend_weights,
    shifted,
    weighted_sum,
)
from fsn_jax.causal import attention_weights, causal_sum, merge_heads, split_heads
from fsn_jax.config import TransformerConfig
from fsn_jax.dense import Readout
from fsn_jax.feedforward import SwiGLU
from fsn_jax.language_model import DETERMINISTIC_ARGUMENT, LanguageModel, check_kind
from fsn_jax.lookup import lookup
from fsn_jax.torus import Complex, multiply, rotary_frequencies, token_rotary

RMS_EPSILON = 1e-6


def empty_rotary_cache(
    config: TransformerConfig, batch: int, capacity: int, segments: bool
) -> LayerCache:
    """Returns an empty cache of a layer for ``capacity`` tokens of each of ``batch`` sequences."""
    c = config
    widths = (c.width // c.num_heads,) * 2
    cache = empty_layer_cache(batch, capacity, c.num_heads, widths, c.dtype, segments=segments)
    if c.token_shift == "none":
        return cache
    return dataclasses.replace(cache, state=jnp.zeros((batch, capacity, c.width), jnp.float32))


class RotaryAttention(nn.Module):
    """Multi-head softmax attention with rotary positions.

    With ``config.token_shift`` keys (and queries) also see the token before: ``k[t] + w k[t - 1]``
    with a learned weight w of each channel, zero at initialization.

    Attributes:
      config: of the model.
    """

    config: TransformerConfig

    def setup(self) -> None:
        c = self.config
        dense: dict[str, Any] = {
            "features": c.width,
            "use_bias": False,
            "dtype": jnp.dtype(c.dtype),
        }
        self.query, self.key = nn.Dense(**dense), nn.Dense(**dense)
        self.value, self.output = nn.Dense(**dense), nn.Dense(**dense)
        self.key_shift = self._shift("key_shift", c.token_shift != "none")
        self.query_shift = self._shift("query_shift", c.token_shift == "queries_and_keys")

    def __call__(
        self,
        x: Float[Array, "B L D"],
        segment_ids: Int[Array, "B L"] | None = None,
        positions: Int[Array, "*B L"] | None = None,
    ) -> Float[Array, "B L D"]:
        """Returns the update of the residual stream, float32; arguments as for ``Transformer``."""
        query, key, value = self._of_whole_sequences(x, segment_ids, positions)
        implementation = self.config.implementation
        summed = causal_sum(
            query, key, value, segment_ids, include_self=True, implementation=implementation
        )
        return self._output(summed.total)

    def weights(
        self,
        x: Float[Array, "B L D"],
        segment_ids: Int[Array, "B L"] | None = None,
        positions: Int[Array, "*B L"] | None = None,
    ) -> Float[Array, "B H L L"]:
        """Returns the attention weights, for inspection: ``__call__`` does not form them."""
        query, key, _ = self._of_whole_sequences(x, segment_ids, positions)
        return attention_weights(query, key, segment_ids)

    def extend(
        self,
        x: Float[Array, "B S D"],
        cache: LayerCache,
        position: Int[Array, ""],
        segment_ids: Int[Array, "B S"] | None = None,
        positions: Int[Array, "*B S"] | None = None,
    ) -> tuple[Float[Array, "B S D"], LayerCache]:
        """Applies ``__call__`` to S tokens at ``position`` and on, after those in the cache."""
        cache.check_room(x.shape[0], x.shape[1], self.config.num_heads)
        rotary = self._rotary(x.shape[1], cache.capacity, position, positions)
        cache = cache.with_segments(position, segment_ids)
        states = None
        if cache.state is not None:
            state = jax.lax.dynamic_update_slice_in_dim(cache.state, x, position, axis=1)
            cache = dataclasses.replace(cache, state=state)
            states = cache.before(position, x.shape[1], segment_ids)
        query, key, value = self._project(x, lambda dense, _: dense(states), rotary)
        seen = extend_weights(query, key, value, cache, position, segment_ids)
        return self._output(weighted_sum(seen.weights, seen.cache.value)), seen.cache

    def _shift(self, name: str, used: bool) -> Array | None:
        if not used:
            return None
        return self.param(name, nn.initializers.zeros, (self.config.width,), jnp.float32)

    def _rotary(
        self, length: int, capacity: int, position: Array | None, positions: Array | None
    ) -> Complex:
        c = self.config
        frequencies = rotary_frequencies(c.width // c.num_heads // 2, c.rotary_base)
        return token_rotary(frequencies, length, capacity, position, positions)

    def _of_whole_sequences(
        self, x: Array, segment_ids: Array | None, positions: Array | None
    ) -> tuple[Array, Array, Array]:
        """Queries, keys and values of tokens from the first on."""
        rotary = self._rotary(x.shape[1], x.shape[1], None, positions)
        return self._project(x, lambda dense, y: shifted(y, segment_ids), rotary)

    def _project(
        self, x: Array, before: Callable[[nn.Dense, Array], Array], rotary: Complex
    ) -> tuple[Array, Array, Array]:
        """Queries, keys and values; ``before(dense, dense(x))`` is that of the tokens before."""
        c = self.config
        scale = (c.width // c.num_heads) ** -0.5

        def project(dense: nn.Dense, shift: Array | None = None) -> Array:
            y = dense(x)
            if shift is not None:
                # In float32, as the gradient of the weights is a sum over all tokens.
                of_before = shift.astype(jnp.float32)[None, None] * before(dense, y)
                y = (y.astype(jnp.float32) + of_before).astype(y.dtype)
            return split_heads(y, c.num_heads)

        query, key = project(self.query, self.query_shift), project(self.key, self.key_shift)
        value = project(self.value)
        return self._rotate(query, rotary, scale), self._rotate(key, rotary), value

    def _rotate(self, x: Array, rotary: Complex, scale: float = 1.0) -> Array:
        x = x.astype(jnp.float32)
        pairs = Complex(*jnp.split(x if scale == 1 else x * scale, 2, axis=-1))
        return jnp.concatenate(multiply(pairs, rotary), axis=-1).astype(self.config.dtype)

    def _output(self, total: Array) -> Array:
        return self.output(merge_heads(total)).astype(jnp.float32)


class TransformerBlock(nn.Module):
    """``x += attention(norm(x))``, then ``x += feedforward(norm(x))``.

    Attributes:
      config: of the model.
    """

    config: TransformerConfig

    def setup(self) -> None:
        c = self.config
        self.attention_norm = nn.RMSNorm(epsilon=RMS_EPSILON)
        self.attention = RotaryAttention(c)
        self.feedforward_norm = nn.RMSNorm(epsilon=RMS_EPSILON)
        self.feedforward = SwiGLU(c.feedforward_width, c.width, c.dtype, c.implementation)
        self.dropout = nn.Dropout(c.dropout)

    def __call__(
        self,
        x: Float[Array, "B L D"],
        segment_ids: Int[Array, "B L"] | None = None,
        positions: Int[Array, "*B L"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "B L D"]:
        """Returns the residual stream after it, float32; arguments as for ``Transformer``."""
        update = self.attention(self.attention_norm(x), segment_ids, positions)
        x = x + self.dropout(update, deterministic=deterministic)
        update = self.feedforward(self.feedforward_norm(x))
        return x + self.dropout(update, deterministic=deterministic)

    def attention_weights(
        self,
        x: Float[Array, "B L D"],
        segment_ids: Int[Array, "B L"] | None = None,
        positions: Int[Array, "*B L"] | None = None,
    ) -> Float[Array, "B H L L"]:
        """Returns the attention weights of the block at this stream, for inspection."""
        return self.attention.weights(self.attention_norm(x), segment_ids, positions)

    def extend(
        self,
        x: Float[Array, "B S D"],
        cache: LayerCache,
        position: Int[Array, ""],
        segment_ids: Int[Array, "B S"] | None = None,
        positions: Int[Array, "*B S"] | None = None,
    ) -> tuple[Float[Array, "B S D"], LayerCache]:
        """Applies ``__call__`` to S tokens at ``position`` and on, after those in the cache."""
        update, cache = self.attention.extend(
            self.attention_norm(x), cache, position, segment_ids, positions
        )
        x = x + update
        return x + self.feedforward(self.feedforward_norm(x)), cache

    def empty_cache(self, batch: int, capacity: int, segments: bool) -> LayerCache:
        """Returns an empty cache for ``capacity`` tokens of each of ``batch`` sequences."""
        return empty_rotary_cache(self.config, batch, capacity, segments)


class TokenEmbedding(nn.Module):
    """One learned vector per token value.

    Attributes:
      config: of the model.
    """

    config: TransformerConfig

    def setup(self) -> None:
        c = self.config
        # Untied: unit variance after the first norm whatever the scale. Tied: the same matrix
        # reads out, and rows of unit norm keep the first logits of order one.
        init = nn.initializers.normal(c.width**-0.5 if c.tied_embedding else 1.0)
        self.embedding = self.param("embedding", init, (c.vocab_size, c.width), jnp.float32)

    def __call__(self, tokens: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        """Returns the tokens' vectors, float32."""
        return lookup(self.embedding, tokens).astype(jnp.float32)


class Transformer(LanguageModel):
    """The baseline language model; called as ``FSN`` is.

    Attributes:
      config: its settings.
      block_class: of its blocks; a variant with other attention sets its own.
    """

    config: TransformerConfig
    block_class: ClassVar[type[nn.Module]] = TransformerBlock

    def setup(self) -> None:
        c = self.config
        check_kind(self, c, TransformerConfig)
        self.embedding = TokenEmbedding(c)
        self.dropout = nn.Dropout(c.dropout)
        block: Any = self.block_class
        if c.remat:
            block = nn.remat(block, static_argnums=DETERMINISTIC_ARGUMENT)
        self.blocks = [block(c, name=f"block_{i}") for i in range(c.num_layers)]
        self.final_norm = nn.RMSNorm(epsilon=RMS_EPSILON)
        if not c.tied_embedding:
            self.readout = Readout(c.vocab_size, c.dtype)

    def _embed(self, tokens: Array, deterministic: bool) -> Array:
        return self.dropout(self.embedding(tokens), deterministic=deterministic)

    def read_out(self, states: Float[Array, "B L D"]) -> Float[Array, "B L V"]:
        """Computes the logits, float32, of states after the last block."""
        x = self.final_norm(states)
        if not self.config.tied_embedding:
            return self.readout(x)
        x, table = (a.astype(self.config.dtype) for a in (x, self.embedding.embedding))
        return jnp.einsum("bld,vd->blv", x, table, preferred_element_type=jnp.float32)
