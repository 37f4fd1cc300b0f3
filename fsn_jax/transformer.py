"""The baseline: a decoder-only transformer with pre-RMSNorm, RoPE, SwiGLU and no biases.

It shares the causal sum, the feed-forward, the rotary frequencies and the cache with the FSN; only
the mixer and the state differ.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fsn_jax.attention import LayerCache, extend_sum
from fsn_jax.causal import causal_sum, merge_heads, split_heads
from fsn_jax.config import TransformerConfig
from fsn_jax.feedforward import SwiGLU
from fsn_jax.fsn import Cache, sum_in_float32
from fsn_jax.lookup import lookup
from fsn_jax.torus import Complex, multiply, rotary_phasor

RMS_EPSILON = 1e-6


class RotaryAttention(nn.Module):
    """Multi-head softmax attention with rotary positions."""

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

    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        """What is added to the residual stream, float32."""
        rotary = self._rotary(x.shape[1])
        query, key, value = self._project(x, rotary)
        implementation = self.config.implementation
        summed = causal_sum(query, key, value, include_self=True, implementation=implementation)
        return self._output(summed.total)

    def extend(
        self, x: Float[Array, "B S D"], cache: LayerCache, position: Int[Array, ""]
    ) -> tuple[Float[Array, "B S D"], LayerCache]:
        """As ``__call__`` for S tokens at ``position`` and on; see ``LayerCache``."""
        table = self._rotary(cache.capacity)
        rotary = Complex(
            *(jax.lax.dynamic_slice_in_dim(part, position, x.shape[1], axis=0) for part in table)
        )
        query, key, value = self._project(x, rotary)
        total, cache = extend_sum(query, key, value, cache, position)
        return self._output(total), cache

    def empty_cache(self, batch: int, capacity: int) -> LayerCache:
        """A cache for ``capacity`` tokens of each of ``batch`` sequences."""
        c = self.config
        value = jnp.zeros((batch * c.num_heads, capacity, c.width // c.num_heads), c.dtype)
        return LayerCache(value.swapaxes(1, 2), value)

    def _rotary(self, length: int) -> Complex:
        c = self.config
        return rotary_phasor(length, c.width // c.num_heads // 2, c.rotary_base)

    def _project(self, x: Array, rotary: Complex) -> tuple[Array, Array, Array]:
        c = self.config
        scale = (c.width // c.num_heads) ** -0.5
        query, key, value = (
            split_heads(dense(x), c.num_heads) for dense in (self.query, self.key, self.value)
        )
        return self._rotate(query * scale, rotary), self._rotate(key, rotary), value

    def _rotate(self, x: Array, rotary: Complex) -> Array:
        pairs = Complex(*jnp.split(x.astype(jnp.float32), 2, axis=-1))
        rotary = Complex(rotary.re[None, None], rotary.im[None, None])
        return jnp.concatenate(multiply(pairs, rotary), axis=-1).astype(self.config.dtype)

    def _output(self, total: Array) -> Array:
        return self.output(merge_heads(total)).astype(jnp.float32)


class TransformerBlock(nn.Module):
    """``x += attention(norm(x))``, then ``x += feedforward(norm(x))``."""

    config: TransformerConfig

    def setup(self) -> None:
        c = self.config
        self.attention_norm = nn.RMSNorm(epsilon=RMS_EPSILON)
        self.attention = RotaryAttention(c)
        self.feedforward_norm = nn.RMSNorm(epsilon=RMS_EPSILON)
        self.feedforward = SwiGLU(c.feedforward_width, c.width, c.dtype, c.implementation)

    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        """The residual stream after the block, float32."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.feedforward(self.feedforward_norm(x))

    def extend(
        self, x: Float[Array, "B S D"], cache: LayerCache, position: Int[Array, ""]
    ) -> tuple[Float[Array, "B S D"], LayerCache]:
        """As ``__call__`` for S tokens at ``position`` and on; see ``LayerCache``."""
        update, cache = self.attention.extend(self.attention_norm(x), cache, position)
        x = x + update
        return x + self.feedforward(self.feedforward_norm(x)), cache


class Transformer(nn.Module):
    """The baseline language model; called as ``FSN`` is."""

    config: TransformerConfig

    def setup(self) -> None:
        c = self.config
        # Untied: unit variance after the first norm whatever the scale. Tied: the same matrix
        # reads out, and rows of unit norm keep the first logits of order one.
        start = nn.initializers.normal(c.width**-0.5 if c.tied_embedding else 1.0)
        self.embedding = nn.Embed(c.vocab_size, c.width, embedding_init=start)
        block = nn.remat(TransformerBlock) if c.remat else TransformerBlock
        self.blocks = [block(c, name=f"block_{i}") for i in range(c.num_layers)]
        self.final_norm = nn.RMSNorm(epsilon=RMS_EPSILON)
        if not c.tied_embedding:
            self.readout = nn.Dense(
                c.vocab_size,
                use_bias=False,
                dtype=jnp.dtype(c.dtype),
                dot_general=sum_in_float32,
            )

    def __call__(self, tokens: Int[Array, "B L"]) -> Float[Array, "B L V"]:
        """Logits, float32, before any softmax."""
        x = lookup(self.embedding.embedding, tokens)
        for block in self.blocks:
            x = block(x)
        return self._logits(x)

    def extend(
        self, tokens: Int[Array, "B S"], cache: Cache
    ) -> tuple[Float[Array, "B S V"], Cache]:
        """Logits of S tokens that follow those in the cache, and the cache with them in it.

        They are NaN for tokens that the cache has no room for.
        """
        x = lookup(self.embedding.embedding, tokens)
        layers = []
        for block, layer in zip(self.blocks, cache.layers, strict=True):
            x, layer = block.extend(x, layer, cache.position)
            layers.append(layer)
        return self._logits(x), Cache(layers, cache.position + tokens.shape[1])

    def empty_cache(self, batch: int, capacity: int) -> Cache:
        """A cache for up to ``capacity`` tokens of each of ``batch`` sequences."""
        layers = [block.attention.empty_cache(batch, capacity) for block in self.blocks]
        return Cache(layers, jnp.zeros((), jnp.int32))

    def _logits(self, x: Array) -> Array:
        x = self.final_norm(x)
        if not self.config.tied_embedding:
            return self.readout(x)
        x, table = (a.astype(self.config.dtype) for a in (x, self.embedding.embedding))
        return jnp.einsum("bld,vd->blv", x, table, preferred_element_type=jnp.float32)
