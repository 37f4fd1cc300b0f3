"""The Frustrated Synchronization Network: a language model whose token states are phases.

Read downward: the embedding gives every token N angles, each block moves them twice (coupling to
other tokens, then feed-forward), the readout sees their cosines and sines. The coupling's equation
is in ``fsn_jax.coupling``. Source: arXiv 2606.18694, reconstructed; docs/model.md has the equations
and docs/choices.md what the published text leaves open.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fsn_jax.attention import FrustratedAttention
from fsn_jax.base_layer import LinearValueAttention
from fsn_jax.cache import LayerCache
from fsn_jax.config import FSNConfig
from fsn_jax.dense import Readout
from fsn_jax.feedforward import CollectiveModes, PhasorSwiGLU
from fsn_jax.fields import shared_settings
from fsn_jax.language_model import DETERMINISTIC_ARGUMENT, LanguageModel, check_kind
from fsn_jax.lookup import lookup
from fsn_jax.torus import Complex, features, order_parameter, phasor


class PhaseEmbedding(nn.Module):
    """One learned angle vector per token value.

    Attributes:
      config: of the model.
    """

    config: FSNConfig

    @nn.compact
    def __call__(
        self, tokens: Int[Array, "B L"], deterministic: bool = True
    ) -> Float[Array, "B L N"]:
        """Returns the tokens' phases before the first block, in radians, float32.

        Dropout draws a phase anew from the circle: its mean phasor is zero.
        """
        c = self.config
        init, shape = nn.initializers.normal(c.embedding_scale), (c.vocab_size, c.num_phases)
        angles = self.param("angles", init, shape, jnp.float32)
        theta = lookup(angles, tokens).astype(jnp.float32)
        if deterministic or not c.dropout:
            return theta
        drop, angle = jax.random.split(self.make_rng("dropout"))
        dropped = jax.random.bernoulli(drop, c.dropout, theta.shape)
        anew = jax.random.uniform(angle, theta.shape, theta.dtype, maxval=2 * np.pi)
        return jnp.where(dropped, anew, theta)


ATTENTION: dict[str, type[Any]] = {
    "circular": FrustratedAttention,
    "linear": LinearValueAttention,
}
FEEDFORWARD: dict[str, type[Any]] = {
    "swiglu": PhasorSwiGLU,
    "collective_modes": CollectiveModes,
}


class Block(nn.Module):
    """``theta += coupling(theta)``, then ``theta += feedforward(theta)``, in radians.

    Attributes:
      config: of the model.
    """

    config: FSNConfig

    def setup(self) -> None:
        c = self.config
        attention = ATTENTION[c.values]
        self.attention = attention(**shared_settings(c, attention))
        if c.feedforward != "none":
            feedforward = FEEDFORWARD[c.feedforward]
            self.feedforward = feedforward(**shared_settings(c, feedforward))
        self.dropout = nn.Dropout(c.dropout)

    def __call__(
        self,
        theta: Float[Array, "B L N"],
        segment_ids: Int[Array, "B L"] | None = None,
        positions: Int[Array, "*B L"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "B L N"]:
        """Returns the phases after the block, in radians, float32; arguments as for ``FSN``."""
        field = self.attention.field(theta, segment_ids=segment_ids, positions=positions)
        theta = theta + self.dropout(field.im, deterministic=deterministic)
        if self.is_mutable_collection("diagnostics") and not self.is_initializing():
            self.sow("diagnostics", "order_parameter", order_parameter(theta))
        return self._feed_forward(theta, field, deterministic)

    def attention_weights(
        self,
        theta: Float[Array, "B L N"],
        segment_ids: Int[Array, "B L"] | None = None,
        positions: Int[Array, "*B L"] | None = None,
    ) -> Float[Array, "B H L L"]:
        """Returns the attention weights of the block at these phases, for inspection."""
        return self.attention.weights(theta, segment_ids=segment_ids, positions=positions)

    def extend(
        self,
        theta: Float[Array, "B S N"],
        cache: LayerCache,
        position: Int[Array, ""],
        segment_ids: Int[Array, "B S"] | None = None,
        positions: Int[Array, "*B S"] | None = None,
    ) -> tuple[Float[Array, "B S N"], LayerCache]:
        """Applies ``__call__`` to S tokens at ``position`` and on, after those in the cache."""
        field, cache = self.attention.extend_field(
            theta, cache, position, segment_ids=segment_ids, positions=positions
        )
        return self._feed_forward(theta + field.im, field, True), cache

    def empty_cache(self, batch: int, capacity: int, segments: bool) -> LayerCache:
        """Returns an empty cache for ``capacity`` tokens of each of ``batch`` sequences."""
        width = self.config.num_phases
        return self.attention.empty_cache(batch, capacity, width, segments=segments)

    def _feed_forward(self, theta: Array, field: Complex, deterministic: bool) -> Array:
        if self.config.feedforward == "none":
            return theta
        update = self.feedforward(theta, field if self.config.field_features else None)
        return theta + self.dropout(update, deterministic=deterministic)


class FSN(LanguageModel):
    """The language model: tokens to angles, frustrated synchronization, logits.

    ``logits[:, t]`` predicts ``tokens[:, t + 1]``.

    Attributes:
      config: its settings.
    """

    config: FSNConfig

    def setup(self) -> None:
        c = self.config
        check_kind(self, c, FSNConfig)
        self.embedding = PhaseEmbedding(c)
        block = nn.remat(Block, static_argnums=DETERMINISTIC_ARGUMENT) if c.remat else Block
        self.blocks = [block(c, name=f"block_{i}") for i in range(c.num_layers)]
        self.readout = Readout(c.vocab_size, c.dtype, use_bias=True)

    def _embed(self, tokens: Array, deterministic: bool) -> Array:
        return self.embedding(tokens, deterministic)

    def read_out(self, states: Float[Array, "B L D"]) -> Float[Array, "B L V"]:
        """Computes the logits, float32, of states after the last block."""
        return self.readout(features(phasor(states)))
