"""What a token does by itself: a SwiGLU on its phasors, or coupling to collective modes."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fsn_jax.config import DType, FSNConfig, Implementation
from fsn_jax.dense import PhasorDense
from fsn_jax.recompute import recomputed
from fsn_jax.torus import Complex, token_phasor


def gated(gate: Float[Array, "*shape"], up: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """``silu(gate) * up``, any shape."""
    return jax.nn.silu(gate) * up


class SwiGLU(nn.Module):
    """``(silu(x W_gate) * (x W_up)) W_down``, no biases.

    Attributes:
      width: F.
      features: width of the result.
      dtype: of the matrix products.
      implementation: ``reference`` for one that has all derivatives, as for a model.
    """

    width: int
    features: int
    dtype: DType = "float32"
    implementation: Implementation = "auto"

    @nn.compact
    def __call__(self, x: Float[Array, "*shape I"]) -> Float[Array, "*shape O"]:
        """The last axis becomes ``features`` wide; float32."""
        dense: dict[str, Any] = {"use_bias": False, "dtype": jnp.dtype(self.dtype)}
        gate = nn.Dense(self.width, name="gate", **dense)(x)
        up = nn.Dense(self.width, name="up", **dense)(x)
        product = recomputed(gated, self.implementation)(gate, up)
        down = nn.Dense(self.features, name="down", **dense)(product)
        return down.astype(jnp.float32)


class CollectiveModes(nn.Module):
    """Mean-field coupling to K learned order parameters: a block without an MLP.

    ``dtheta[t, n] = Im(exp(-i theta[t, n]) sum_k w[t, k] Z[k, n])`` with
    ``w[t, k] = silu(g_k . f_t + b_k)``: each mode ``Z[k]`` is a pattern of phases that a token may
    be pulled towards, or pushed from, as far as its content asks for it.
    """

    config: FSNConfig

    @nn.compact
    def __call__(
        self, theta: Float[Array, "B L N"], field: Complex | None = None
    ) -> Float[Array, "B L N"]:
        """The update of the phases, in radians, float32.

        Args:
          theta: phases in radians.
          field: ``[B, L, N]``, what the weights see besides: ``FrustratedAttention.field``.

        Raises:
          ValueError: ``theta`` is not ``[B, L, num_phases]``.
        """
        c = self.config
        z = token_phasor(theta, c.num_phases)
        drive = PhasorDense(c, c.num_modes, use_bias=True, name="weights")(z, field)
        weight = jax.nn.silu(drive.astype(jnp.float32)).astype(c.dtype)
        init = nn.initializers.normal(c.num_modes**-0.5)
        shape = (c.num_modes, c.num_phases)
        field_re, field_im = (
            jnp.einsum(
                "blk,kn->bln",
                weight,
                self.param(name, init, shape, jnp.float32).astype(c.dtype),
                preferred_element_type=jnp.float32,
            )
            for name in ("modes_real", "modes_imag")
        )
        return field_im * z.re - field_re * z.im


class PhasorSwiGLU(nn.Module):
    """A SwiGLU from a token's phasors to an update of its phases, in radians.

    With one quadrature a phase, the gate starts with cosines and the other factor with sines.
    """

    config: FSNConfig

    @nn.compact
    def __call__(
        self, theta: Float[Array, "B L N"], field: Complex | None = None
    ) -> Float[Array, "B L N"]:
        """The update of the phases, in radians, float32.

        Args:
          theta: phases in radians.
          field: ``[B, L, N]``, what the gate and the other factor see besides:
            ``FrustratedAttention.field``.

        Raises:
          ValueError: ``theta`` is not ``[B, L, num_phases]``.
        """
        c = self.config
        z = token_phasor(theta, c.num_phases)
        gate = PhasorDense(c, c.feedforward_width, angle=0.0, name="gate")(z, field)
        up = PhasorDense(c, c.feedforward_width, angle=np.pi / 2, name="up")(z, field)
        down = nn.Dense(c.num_phases, use_bias=False, dtype=jnp.dtype(c.dtype), name="down")
        return down(recomputed(gated, c.implementation)(gate, up)).astype(jnp.float32)
