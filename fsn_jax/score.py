"""Scores: which tokens couple.

``s[h, t, u] = beta_h Re sum_p q[t, p] conj(k[u, p]) exp(i (t - u) omega_p)``: queries and keys are
complex, one pair a phase or a projection of them, and position is a phase drift. The attention is
the softmax of ``s`` over ``u <= t``. Source: arXiv 2606.11585, as reconstructed in docs/model.md.
"""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fsn_jax.causal import split_heads
from fsn_jax.config import FSNConfig
from fsn_jax.dense import PhasorDense
from fsn_jax.torus import Complex, multiply


class PhaseScore(nn.Module):
    """Queries and keys whose inner product is the score of two tokens.

    ``s[h, t, u] = beta_h Re sum_p q[t, p] conj(k[u, p]) exp(i (t - u) omega_p)``: gated phase
    similarity with rotary drift. ``q`` and ``k`` are complex; see ``FSNConfig.score``. A similarity
    head has ``q = k`` and ``omega = 0``: the more alike two tokens are, the higher their score.
    """

    config: FSNConfig

    def setup(self) -> None:
        c = self.config
        pairs, heads = c.score_pairs, c.num_heads
        if c.score == "projected":
            self.query = PhasorDense(c, 2 * heads * pairs, groups=heads)
            if c.key_heads:
                self.key = PhasorDense(c, 2 * c.key_heads * pairs, groups=c.key_heads)
        elif c.score == "gated":
            small = nn.initializers.normal(0.02)
            self.query_gate = PhasorDense(c, c.num_phases, use_bias=True, kernel_init=small)
            self.key_gate = PhasorDense(c, c.num_phases, use_bias=True, kernel_init=small)
        elif c.score == "static":
            self.gate = self.param("gate", nn.initializers.ones, (c.num_phases,), jnp.float32)
        if c.score != "none":
            sharpness = nn.initializers.constant(np.log(c.score_sharpness / np.sqrt(pairs)))
            self.log_beta = self.param("log_beta", sharpness, (heads,), jnp.float32)

    def __call__(
        self, z: Complex, rotary: Complex
    ) -> tuple[Float[Array, "B H L E"], Float[Array, "B H L E"]]:
        """Returns rotated queries (times beta) and keys, E = 2R reals each, in the compute dtype.

        Args:
          z: phasors ``[B, L, N]``.
          rotary: ``exp(i t omega)`` of the tokens' positions, ``[L, R]``.
        """
        c = self.config
        if c.score == "none":
            # An inner product over nothing: all scores are zero, the mean field is uniform.
            empty = jnp.zeros((z.re.shape[0], c.num_heads, z.re.shape[1], 0), c.dtype)
            return empty, empty
        if c.score == "projected":
            queries = self.query(z)
            keys = queries[..., : 2 * c.similarity_heads * c.score_pairs]
            if c.key_heads:
                keys = jnp.concatenate([keys, self.key(z)], axis=-1)
            query, key = self._as_pairs(queries), self._as_pairs(keys)
        else:
            by_head = Complex(split_heads(z.re, c.num_heads), split_heads(z.im, c.num_heads))
            query, key = (Complex(by_head.re * gate, by_head.im * gate) for gate in self._gates(z))
        beta = jnp.exp(self.log_beta)[None, :, None, None]
        rotary = self._drift(rotary)
        query = multiply(query, rotary)
        query = Complex(beta * query.re, beta * query.im)
        return self._to_reals(query), self._to_reals(multiply(key, rotary))

    def _drift(self, rotary: Complex) -> Complex:
        """By head, ``[1, H or 1, L, R]``."""
        rotary = Complex(rotary.re[None, None], rotary.im[None, None])
        if not self.config.similarity_heads:
            return rotary
        static = (np.arange(self.config.num_heads) < self.config.similarity_heads)[:, None, None]
        return Complex(jnp.where(static, 1.0, rotary.re), jnp.where(static, 0.0, rotary.im))

    def _as_pairs(self, x: Array) -> Complex:
        # Rotated in float32: bfloat16 rotary phasors would blur positions far apart.
        by_head = split_heads(x.astype(jnp.float32), self.config.num_heads)
        return Complex(*jnp.split(by_head, 2, axis=-1))

    def _gates(self, z: Complex) -> tuple[Array, Array]:
        heads = self.config.num_heads
        if self.config.score == "static":
            gate = self.gate.reshape(1, heads, 1, -1)
            return gate, jnp.ones_like(gate)
        return (
            split_heads(1.0 + self.query_gate(z).astype(jnp.float32), heads),
            split_heads(1.0 + self.key_gate(z).astype(jnp.float32), heads),
        )

    def _to_reals(self, x: Complex) -> Array:
        return jnp.concatenate(x, axis=-1).astype(self.config.dtype)
