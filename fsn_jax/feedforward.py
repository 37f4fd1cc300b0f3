"""Feed-forward layers: a SwiGLU on phasors, or coupling to collective modes."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fsn_jax.dense import PhasorDense, over_tokens
from fsn_jax.fields import (
    DType,
    Implementation,
    ModesFields,
    SwiGLUFields,
    documented,
    shared_settings,
)
from fsn_jax.recompute import recomputed
from fsn_jax.torus import Complex, multiply, real_product, times, token_phasor

COHERENCE_EPSILON = 1e-4
"""Added to the squared length of an order parameter, whose phase has no derivative at zero."""


def gated(gate: Float[Array, "*shape"], up: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """``silu(gate) * up``, any shape."""
    return jax.nn.silu(gate) * up


def gated_by_coherence(a: Complex, b: Complex, bias: Array) -> Complex:
    """``silu(|a| cos(arg a - arg b) + bias) b``: a and b ``[..., K]``, bias ``[K]``."""
    size = jnp.sqrt(b.re**2 + b.im**2 + COHERENCE_EPSILON)
    weight = jax.nn.silu(real_product(a, b) / size + over_tokens(bias, size))
    return times(weight, b)


class SwiGLU(nn.Module):
    """``(silu(x W_gate) * (x W_up)) W_down``, no biases.

    Attributes:
      width: F.
      features: width of the result.
      dtype: of the matrix products.
      implementation: ``reference`` has all derivatives, the others those of reverse mode.
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
    r"""Mean-field coupling to K collective modes: a feed-forward layer without an MLP.

    A mode reads two order parameters a and b of a token. It pulls the phases towards its pattern,
    turned by the phase of b, as strongly as b is long and a coherent with it:

    .. math::

        a_t = s \, e^{i \theta_t} V, \quad b_t = s \, e^{i \theta_t} W, \quad
        w_{t,k} = \operatorname{silu}\bigl(|a_{t,k}| \cos(\arg a_{t,k} - \arg b_{t,k}) + c_k\bigr)

        \Delta\theta_{t,n} = \operatorname{Im} \Bigl( e^{-i \theta_{t,n}}
        \sum_k w_{t,k} \, b_{t,k} \, U_{k,n} \Bigr)

    Parameters: complex matrices V (``gate``) and W (``up``), ``[N, K]``, and U (``down``),
    ``[K, N]``, as real and imaginary parts, and c (``bias``), ``[K]``; s is ``feature_scale``. Only
    phase differences enter, so the layer commutes with a rotation of all phases by one angle.

    With ``mode_weights="dense"`` instead ``w[t, k] = silu(g_k . f_t + c_k)``, of the features f of
    the token, and b is 1: a hidden layer, which has a preferred direction. ``features``
    applies to that layer alone.
    """

    @nn.compact
    def __call__(
        self, theta: Float[Array, "B L N"], field: Complex | None = None
    ) -> Float[Array, "B L N"]:
        """Computes the update of the phases, in radians, float32.

        Args:
          theta: phases in radians.
          field: ``[B, L, N]``, a further input of the weights: ``FrustratedAttention.field``.

        Raises:
          ValueError: ``theta`` is not ``[B, L, N]``.
        """
        z = token_phasor(theta)
        total = self._dense(z, field) if self.mode_weights == "dense" else self._native(z, field)
        return total.im * z.re - total.re * z.im

    def _native(self, z: Complex, field: Complex | None) -> Complex:
        """Computes the field of all modes, ``[B, L, N]``, with weights from phase coherence."""
        phases, modes = z.re.shape[-1], self.num_modes
        seen = z
        if field is not None:
            zeros = nn.initializers.zeros
            gain = self.param("field_gain", zeros, (2, phases), jnp.float32)
            coherence, torque = (over_tokens(part, field.re) for part in gain)
            seen = multiply(z, Complex(1.0 + coherence * field.re, torque * field.im))
        seen = Complex(seen.re * self.feature_scale, seen.im * self.feature_scale)
        a = self._product("gate", seen, phases**-0.5, modes)
        b = self._product("up", seen, phases**-0.5, modes)
        bias = self.param("bias", nn.initializers.zeros, (modes,), jnp.float32)
        weighted = recomputed(gated_by_coherence, self.implementation)(a, b, bias)
        return self._product("down", weighted, 0.5 * modes**-0.5, phases)

    def _product(self, name: str, x: Complex, deviation: float, outputs: int) -> Complex:
        """Computes a complex matrix product as one real product."""
        init, shape = nn.initializers.normal(deviation), (x.re.shape[-1], outputs)
        re = self.param(f"{name}_real", init, shape, jnp.float32)
        im = self.param(f"{name}_imag", init, shape, jnp.float32)
        matrix = jnp.block([[re, im], [-im, re]]).astype(self.dtype)
        product = jnp.concatenate(x, axis=-1).astype(self.dtype) @ matrix
        return Complex(*jnp.split(product.astype(jnp.float32), 2, axis=-1))

    def _dense(self, z: Complex, field: Complex | None) -> Complex:
        """Computes the field of all modes, ``[B, L, N]``, with weights from a dense layer."""
        shared = shared_settings(self, PhasorDense)
        drive = PhasorDense(**shared, outputs=self.num_modes, use_bias=True, name="weights")(
            z, field
        )
        weight = jax.nn.silu(drive.astype(jnp.float32)).astype(self.dtype)
        init = nn.initializers.normal(self.num_modes**-0.5)
        shape = (self.num_modes, z.re.shape[-1])
        return Complex(
            *(
                jnp.einsum(
                    "blk,kn->bln",
                    weight,
                    self.param(name, init, shape, jnp.float32).astype(self.dtype),
                    preferred_element_type=jnp.float32,
                )
                for name in ("modes_real", "modes_imag")
            )
        )


@documented
class PhasorSwiGLU(SwiGLUFields, nn.Module):
    """A SwiGLU from a token's phasors to an update of its phases, in radians.

    With one quadrature a phase, the gate initially reads cosines and the other factor sines.
    """

    @nn.compact
    def __call__(
        self, theta: Float[Array, "B L N"], field: Complex | None = None
    ) -> Float[Array, "B L N"]:
        """Computes the update ``[B, L, N]``; arguments and errors as for ``CollectiveModes``."""
        z = token_phasor(theta)
        dense = functools.partial(
            PhasorDense, outputs=self.feedforward_width, **shared_settings(self, PhasorDense)
        )
        gate = dense(angle=0.0, name="gate")(z, field)
        up = dense(angle=np.pi / 2, name="up")(z, field)
        dtype = jnp.dtype(self.dtype)
        down = nn.Dense(theta.shape[-1], use_bias=False, dtype=dtype, name="down")
        return down(recomputed(gated, self.implementation)(gate, up)).astype(jnp.float32)
