"""Primitives on the torus: phasors, their powers, features for dense layers, rotary drift.

A token's state is N angles in radians, float32, never wrapped: the model only ever uses
``z = exp(i theta)``. Complex numbers are pairs of real arrays, which every backend handles well.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


class Complex(NamedTuple):
    """Complex numbers as two real arrays of one shape."""

    re: Array
    im: Array


def _barriered_phasor(theta: Array) -> Complex:
    # Without the barrier XLA recomputes cos and sin inside every fusion that reads them, which
    # more than doubles the time of a training step on the CPU.
    return Complex(*jax.lax.optimization_barrier((jnp.cos(theta), jnp.sin(theta))))


@jax.custom_jvp
def _phasor(theta: Array) -> Complex:
    return _barriered_phasor(theta)


@_phasor.defjvp
def _phasor_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Complex, Complex]:
    (theta,), (dtheta,) = primals, tangents
    z = _barriered_phasor(theta)
    return z, Complex(-z.im * dtheta, z.re * dtheta)


def phasor(theta: Float[Array, "*shape"]) -> Complex:
    """``exp(i theta)``, computed once and reused by the derivative.

    Args:
      theta: angles in radians, any shape; float32, since bfloat16 would round an angle of a few
        turns by more than a tenth of a radian.

    Returns:
      Cosines and sines, of the shape of ``theta``.
    """
    return _phasor(theta)


def multiply(x: Complex, y: Complex) -> Complex:
    """Complex product, elementwise with broadcasting."""
    return Complex(x.re * y.re - x.im * y.im, x.re * y.im + x.im * y.re)


def powers(z: Complex, num_harmonics: int) -> list[Complex]:
    """``[z, z**2, ..., z**M]`` by complex multiplication: no new sines."""
    result = [z]
    for _ in range(num_harmonics - 1):
        result.append(multiply(result[-1], z))
    return result


def features(z: Complex) -> Float[Array, "*shape twoN"]:
    """``[cos theta, sin theta]``, what dense layers see of a state: 2N reals."""
    return jnp.concatenate(z, axis=-1)


def rotary_phasor(length: int, num_pairs: int, base: float) -> Complex:
    """``exp(i t omega_p)`` for positions t = 0 .. length - 1.

    The frequencies are RoPE's, ``omega_p = base ** (-p / num_pairs)``. Made in float64 NumPy: a
    constant of the compiled program, and exact at every position.

    Returns:
      float32 arrays ``[length, num_pairs]``.
    """
    omega = base ** (-np.arange(num_pairs, dtype=np.float64) / max(num_pairs, 1))
    angle = np.arange(length, dtype=np.float64)[:, None] * omega
    return Complex(jnp.asarray(np.cos(angle), jnp.float32), jnp.asarray(np.sin(angle), jnp.float32))


def order_parameter(theta: Float[Array, "*shape N"], harmonic: int = 1) -> Float[Array, "*shape"]:
    """``|mean_n exp(i m theta_n)|``: 1 when all phases agree, 0 when they are spread evenly.

    The Kuramoto order parameter for ``harmonic`` m = 1, Daido's for m > 1.
    """
    z = phasor(harmonic * theta.astype(jnp.float32))
    return jnp.sqrt(z.re.mean(axis=-1) ** 2 + z.im.mean(axis=-1) ** 2)
