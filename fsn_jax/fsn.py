"""The Frustrated Synchronization Network: a language model whose token states are phases.

Source: arXiv 2606.18694, reconstructed; docs/model.md has the equations and docs/choices.md what
the published text leaves open.
"""

import functools
from collections.abc import Sequence

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fsn_jax.attention import FrustratedAttention, LayerCache
from fsn_jax.config import FSNConfig
from fsn_jax.feedforward import CollectiveModes, PhasorSwiGLU
from fsn_jax.lookup import lookup
from fsn_jax.torus import Complex, features, order_parameter, phasor


@flax.struct.dataclass
class Cache:
    """State of generation, of either model.

    Attributes:
      layers: one ``LayerCache`` a block.
      position: number of tokens seen, int32 scalar.
    """

    layers: Sequence[LayerCache]
    position: Array


class Block(nn.Module):
    """``theta += coupling(theta)``, then ``theta += feedforward(theta)``, in radians."""

    config: FSNConfig

    def setup(self) -> None:
        c = self.config
        self.attention = FrustratedAttention(c)
        if c.feedforward != "none":
            kinds = {"swiglu": PhasorSwiGLU, "collective_modes": CollectiveModes}
            self.feedforward = kinds[c.feedforward](c)

    def __call__(self, theta: Float[Array, "B L N"]) -> Float[Array, "B L N"]:
        """The phases after the block, in radians, float32."""
        field = self.attention.field(theta)
        theta = theta + field.im
        if self.is_mutable_collection("diagnostics") and not self.is_initializing():
            self.sow("diagnostics", "order_parameter", order_parameter(theta))
        return self._feed_forward(theta, field)

    def extend(
        self, theta: Float[Array, "B S N"], cache: LayerCache, position: Int[Array, ""]
    ) -> tuple[Float[Array, "B S N"], LayerCache]:
        """As ``__call__`` for S tokens at ``position`` and on; see ``LayerCache``."""
        field, cache = self.attention.extend_field(theta, cache, position)
        return self._feed_forward(theta + field.im, field), cache

    def _feed_forward(self, theta: Array, field: Complex) -> Array:
        if self.config.feedforward == "none":
            return theta
        return theta + self.feedforward(theta, field if self.config.field_features else None)


def embedding_start(config: FSNConfig) -> jax.nn.initializers.Initializer:
    """Initial embedding angles, in radians."""
    if config.embedding_init == "normal":
        return nn.initializers.normal(config.embedding_scale)

    return nn.initializers.uniform(2 * np.pi)


sum_in_float32 = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
"""Of logits: two that differ by less than bfloat16 tells apart are not the same."""


class FSN(nn.Module):
    """The language model: angles in, frustrated synchronization, logits out.

    ``logits[:, t]`` predicts ``tokens[:, t + 1]``.
    """

    config: FSNConfig

    def setup(self) -> None:
        c = self.config
        self.embedding = PhaseEmbedding(c)
        block = nn.remat(Block) if c.remat else Block
        self.blocks = [block(c, name=f"block_{i}") for i in range(c.num_layers)]
        self.readout = nn.Dense(c.vocab_size, dtype=jnp.dtype(c.dtype), dot_general=sum_in_float32)

    def __call__(self, tokens: Int[Array, "B L"]) -> Float[Array, "B L V"]:
        """Logits, float32, before any softmax."""
        theta = self.embedding(tokens)
        for block in self.blocks:
            theta = block(theta)
        return self._logits(theta)

    def extend(
        self, tokens: Int[Array, "B S"], cache: Cache
    ) -> tuple[Float[Array, "B S V"], Cache]:
        """Logits of S tokens that follow those in the cache, and the cache with them in it.

        They are NaN for tokens that the cache has no room for.
        """
        theta = self.embedding(tokens)
        layers = []
        for block, layer in zip(self.blocks, cache.layers, strict=True):
            theta, layer = block.extend(theta, layer, cache.position)
            layers.append(layer)
        return self._logits(theta), Cache(layers, cache.position + tokens.shape[1])

    def empty_cache(self, batch: int, capacity: int) -> Cache:
        """A cache for up to ``capacity`` tokens of each of ``batch`` sequences."""
        layers = [block.attention.empty_cache(batch, capacity) for block in self.blocks]
        return Cache(layers, jnp.zeros((), jnp.int32))

    def _logits(self, theta: Array) -> Array:
        return self.readout(features(phasor(theta)))


class PhaseEmbedding(nn.Module):
    """One learned angle vector per token value."""

    config: FSNConfig

    @nn.compact
    def __call__(self, tokens: Int[Array, "B L"]) -> Float[Array, "B L N"]:
        """The tokens' phases before the first block, in radians, float32."""
        c = self.config
        shape = (c.vocab_size, c.num_phases)
        angles = self.param("angles", embedding_start(c), shape, jnp.float32)
        return lookup(angles, tokens)
