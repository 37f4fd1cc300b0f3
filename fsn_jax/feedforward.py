"""Feed-forward layers: a SwiGLU on phasors, or coupling to collective modes."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fsn_jax.dense import PhasorDense
from fsn_jax.fields import (
    DType,
    Implementation,
    ModesFields,
    SwiGLUFields,
    documented,
    shared_settings,
)
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
        """Maps the last axis to ``features`` reals, float32."""
        dense: dict[str, Any] = {"use_bias": False, "dtype": jnp.dtype(self.dtype)}
        gate = nn.Dense(self.width, name="gate", **dense)(x)
        up = nn.Dense(self.width, name="up", **dense)(x)
        product = recomputed(gated, self.implementation)(gate, up)
        down = nn.Dense(self.features, name="down", **dense)(product)
        return down.astype(jnp.float32)


@documented
class CollectiveModes(ModesFields, nn.Module):
    """Mean-field coupling to K learned order parameters: a feed-forward layer without an MLP.

    ``dtheta[t, n] = Im(exp(-i theta[t, n]) sum_k w[t, k] Z[k, n])`` with
    ``w[t, k] = silu(g_k . f_t + b_k)``: each mode ``Z[k]`` is a pattern of phases that a token may
    be pulled towards, or pushed from, as far as its content asks for it.
    """

    @nn.compact
    def __call__(
        self, theta: Float[Array, "B L N"], field: Complex | None = None
    ) -> Float[Array, "B L N"]:
        """Computes the update of the phases, in radians, float32.

        Args:
          theta: phases in radians.
          field: ``[B, L, N]``, what the weights see besides: ``FrustratedAttention.field``.

        Raises:
          ValueError: ``theta`` is not ``[B, L, N]``.
        """
        z = token_phasor(theta)
        shared = shared_settings(self, PhasorDense)
        drive = PhasorDense(**shared, outputs=self.num_modes, use_bias=True, name="weights")(
            z, field
        )
        weight = jax.nn.silu(drive.astype(jnp.float32)).astype(self.dtype)
        init = nn.initializers.normal(self.num_modes**-0.5)
        shape = (self.num_modes, theta.shape[-1])
        field_re, field_im = (
            jnp.einsum(
                "blk,kn->bln",
                weight,
                self.param(name, init, shape, jnp.float32).astype(self.dtype),
                preferred_element_type=jnp.float32,
            )
            for name in ("modes_real", "modes_imag")
        )
        return field_im * z.re - field_re * z.im


@documented
class PhasorSwiGLU(SwiGLUFields, nn.Module):
    """A SwiGLU from a token's phasors to an update of its phases, in radians.

    With one quadrature a phase, the gate initially reads cosines and the other factor sines.
    """

    @nn.compact
    def __call__(
        self, theta: Float[Array, "B L N"], field: Complex | None = None
    ) -> Float[Array, "B L N"]:
        """Computes the update of the phases, in radians, float32.

        Args:
          theta: phases in radians.
          field: ``[B, L, N]``, what the gate and the other factor see besides:
            ``FrustratedAttention.field``.

        Raises:
          ValueError: ``theta`` is not ``[B, L, N]``.
        """
        z = token_phasor(theta)
        dense = functools.partial(
            PhasorDense, outputs=self.feedforward_width, **shared_settings(self, PhasorDense)
        )
        gate = dense(angle=0.0, name="gate")(z, field)
        up = dense(angle=np.pi / 2, name="up")(z, field)
        dtype = jnp.dtype(self.dtype)
        down = nn.Dense(theta.shape[-1], use_bias=False, dtype=dtype, name="down")
        return down(recomputed(gated, self.implementation)(gate, up)).astype(jnp.float32)
