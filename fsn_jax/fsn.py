"""The Frustrated Synchronization Network: a language model whose token states are phases.

Read downward: the embedding gives every token N angles, each block moves them twice (coupling to
other tokens, then feed-forward), the readout sees their cosines and sines. The coupling's equation
is in ``fsn_jax.coupling``. Source: arXiv 2606.18694, reconstructed; docs/model.md has the equations
and docs/choices.md what the published text leaves open.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fsn_jax.attention import FrustratedAttention
from fsn_jax.cache import LayerCache
from fsn_jax.config import FSNConfig
from fsn_jax.dense import sum_in_float32
from fsn_jax.feedforward import CollectiveModes, PhasorSwiGLU
from fsn_jax.language_model import LanguageModel
from fsn_jax.torus import Complex, features, order_parameter, phasor


def initial_angles(config: FSNConfig) -> jax.nn.initializers.Initializer:
    """Initializer of the embedding angles, in radians."""
    if config.embedding_init == "normal":
        return nn.initializers.normal(config.embedding_scale)
    return nn.initializers.uniform(2 * np.pi)


class PhaseEmbedding(nn.Module):
    """One learned angle vector per token value."""

    config: FSNConfig

    @nn.compact
    def __call__(self, tokens: Int[Array, "B L"]) -> Float[Array, "B L N"]:
        """The tokens' phases before the first block, in radians, float32."""
        c = self.config
        shape = (c.vocab_size, c.num_phases)
        angles = self.param("angles", initial_angles(c), shape, jnp.float32)
        return jnp.take(angles, tokens, axis=0)


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
        """``__call__`` for S tokens at ``position`` and on, after those in the cache."""
        field, cache = self.attention.extend_field(theta, cache, position)
        return self._feed_forward(theta + field.im, field), cache

    def _feed_forward(self, theta: Array, field: Complex) -> Array:
        if self.config.feedforward == "none":
            return theta
        return theta + self.feedforward(theta, field if self.config.field_features else None)


class FSN(LanguageModel):
    """The language model: tokens to angles, frustrated synchronization, logits.

    ``logits[:, t]`` predicts ``tokens[:, t + 1]``.
    """

    config: FSNConfig

    def setup(self) -> None:
        c = self.config
        self.embedding = PhaseEmbedding(c)
        block = nn.remat(Block) if c.remat else Block
        self.blocks = [block(c, name=f"block_{i}") for i in range(c.num_layers)]
        self.readout = nn.Dense(c.vocab_size, dtype=jnp.dtype(c.dtype), dot_general=sum_in_float32)

    def _embed(self, tokens: Array) -> Array:
        return self.embedding(tokens)

    def _read_out(self, state: Array) -> Array:
        return self.readout(features(phasor(state)))
