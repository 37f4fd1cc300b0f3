"""Our transformer with Flax's own attention module in its attention's place: a peer.

It has the parameters of ours and everything else of ours; Flax's module has no rotary positions and
holds the whole matrix of weights.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from fsn_jax import Transformer, TransformerConfig
from fsn_jax.feedforward import SwiGLU
from fsn_jax.transformer import RMS_EPSILON


class FlaxBlock(nn.Module):
    """``x += attention(norm(x))``, then ``x += feedforward(norm(x))``."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"], *_: object) -> Float[Array, "B L D"]:
        """Applies the block; segments, positions and dropout are not for it."""
        c = self.config
        attention = nn.MultiHeadDotProductAttention(
            c.num_heads, qkv_features=c.width, use_bias=False, dtype=jnp.dtype(c.dtype)
        )
        mask = nn.make_causal_mask(jnp.ones(x.shape[:2]), dtype=bool)
        x = x + attention(nn.RMSNorm(epsilon=RMS_EPSILON)(x), mask=mask).astype(jnp.float32)
        feedforward = SwiGLU(c.feedforward_width, c.width, c.dtype)
        return x + feedforward(nn.RMSNorm(epsilon=RMS_EPSILON)(x))


class FlaxTransformer(Transformer):
    """A transformer with Flax' attention, called like ``Transformer``; it has no cache."""

    block_class = FlaxBlock
