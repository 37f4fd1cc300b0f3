"""Primitives on the torus: phasors, their powers, features for dense layers, rotary drift.

A token's state is N angles in radians, float32, never wrapped: the model only ever uses
``z = exp(i theta)``. Complex numbers are pairs of real arrays, which every backend handles well.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jaxtyping import Array, Float, Int, Integer

from fsn_jax.lookup import lookup


class Complex(NamedTuple):
    """Complex numbers as two real arrays of one shape."""

    re: Array
    im: Array


# pi / 2 in three parts: the first two have eleven significant bits, so their products with a
# quadrant number below 2**13 are exact and the reduction loses nothing.
_HALF_PI_PARTS = (1.5703125, 4.837512969970703e-4, 7.549789954891882e-8)
# Our minimax fits on |r| <= pi / 4 (weighted by the factor outside the bracket):
# sin r = r + r**3 (s0 + s1 r**2 + s2 r**4), cos r = 1 - r**2 / 2 + r**4 (c0 + c1 r**2 + c2 r**4).
_SIN_FIT = (-0.1666665062, 0.008331975962, -0.0001949529277)
_COS_FIT = (0.04166664681, -0.001388736448, 2.443809033e-05)


def _polynomial_phasor(theta: Array) -> Complex:
    """Cosine and sine to 1e-7, sharing one range reduction.

    XLA calls the C library's scalar cosine on the CPU, about nine times dearer than this, and
    fuses it into each of its many readers again; these few multiplications cost next to nothing
    even where they are repeated, and are the same formula on every backend.
    """
    quadrant = jnp.round(theta * (2 / np.pi))
    r = theta
    for part in _HALF_PI_PARTS:
        r = r - quadrant * part
    r2 = r * r
    s0, s1, s2 = _SIN_FIT
    c0, c1, c2 = _COS_FIT
    sin = r + r * r2 * (s0 + r2 * (s1 + r2 * s2))
    cos = 1.0 - 0.5 * r2 + r2 * r2 * (c0 + r2 * (c1 + r2 * c2))
    turn = quadrant.astype(jnp.int32)
    odd = (turn & 1) != 0
    re, im = jnp.where(odd, sin, cos), jnp.where(odd, cos, sin)
    return Complex(jnp.where(((turn + 1) & 2) != 0, -re, re), jnp.where((turn & 2) != 0, -im, im))


@jax.custom_jvp
def _phasor(theta: Array) -> Complex:
    return _polynomial_phasor(theta)


@_phasor.defjvp
def _phasor_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Complex, Complex]:
    (theta,), (dtheta,) = primals, tangents
    z = _phasor(theta)
    return z, along_circle(z, dtheta)


def along_circle(z: Complex, dtheta: Array) -> Complex:
    """Computes ``i z dtheta`` elementwise, with broadcasting.

    So phasors of any shape move when their phases move by ``dtheta`` radians.
    """
    return Complex(-z.im * dtheta, z.re * dtheta)


def phasor(theta: Float[Array, "*shape"]) -> Complex:
    """Computes ``exp(i theta)``; the derivative reuses it.

    Args:
      theta: angles in radians, any shape, below about 1e4; worked on in float32. Keep them so:
        bfloat16 rounds an angle of a few turns by more than a tenth of a radian.

    Returns:
      Cosines and sines, float32, of the shape of ``theta``.

    Raises:
      TypeError: the angles are complex.
    """
    if jnp.iscomplexobj(theta):
        raise TypeError("phases are real angles; for complex z take jnp.angle(z)")
    return _phasor(jnp.asarray(theta, jnp.float32))


def token_phasor(theta: Float[Array, "B L N"]) -> Complex:
    """Computes ``phasor`` of the states of tokens, and checks their shape.

    Raises:
      ValueError: ``theta`` is not ``[B, L, N]``.
    """
    if theta.ndim != 3:
        raise ValueError(f"theta must be [B, L, N]; got {theta.shape}")
    return phasor(theta)


def in_float32(z: Complex) -> Complex:
    """Converts complex numbers of any shape and dtype to float32."""
    return kept_in(z, "float32")


def kept_in(z: Complex, dtype: str) -> Complex:
    """Converts complex numbers of any shape to the dtype they are kept in between operations."""
    return Complex(z.re.astype(dtype), z.im.astype(dtype))


def multiply(x: Complex, y: Complex) -> Complex:
    """Multiplies complex numbers elementwise, with broadcasting."""
    if x.re.shape != y.re.shape:
        # Alike first: so a cotangent is summed over the new axes once, not once for each product.
        zeros = jnp.zeros_like(x.re) + jnp.zeros_like(y.re)
        x, y = (Complex(z.re + zeros, z.im + zeros) for z in (x, y))
    return Complex(x.re * y.re - x.im * y.im, x.re * y.im + x.im * y.re)


def add(x: Complex, y: Complex) -> Complex:
    """Adds complex numbers elementwise, with broadcasting."""
    return Complex(x.re + y.re, x.im + y.im)


def times(x: Array | int, y: Complex) -> Complex:
    """Multiplies by real numbers elementwise, with broadcasting."""
    return Complex(x * y.re, x * y.im)


def real_product(x: Complex, y: Complex) -> Array:
    """Computes ``Re conj(x) y`` elementwise, with broadcasting."""
    return x.re * y.re + x.im * y.im


def imaginary_product(x: Complex, y: Complex) -> Array:
    """Computes ``Im conj(x) y`` elementwise, with broadcasting."""
    return x.re * y.im - x.im * y.re


def seen_from(x: Complex, y: Complex) -> Complex:
    """Computes ``conj(x) y`` elementwise, with broadcasting: y as it is seen from the phases x."""
    return Complex(real_product(x, y), imaginary_product(x, y))


def powers(z: Complex, num_harmonics: int) -> list[Complex]:
    """Computes ``[z, z**2, ..., z**M]``, each of the shape of ``z``, by multiplication.

    Raises:
      ValueError: M is below 1.
    """
    if num_harmonics < 1:
        raise ValueError(f"harmonics are counted from 1; got {num_harmonics}")
    result = [z]
    for _ in range(num_harmonics - 1):
        result.append(multiply(result[-1], z))
    return result


def features(z: Complex) -> Float[Array, "*shape twoN"]:
    """``[cos theta, sin theta]``, what dense layers see of a state: 2N reals."""
    return jnp.concatenate(z, axis=-1)


def rotary_frequencies(num_pairs: int, base: float) -> npt.NDArray[np.float64]:
    """Returns RoPE's frequencies ``base ** (-p / num_pairs)``, in radians a position, ``[R]``."""
    return base ** (-np.arange(num_pairs, dtype=np.float64) / max(num_pairs, 1))


def rotary_phasor(length: int, frequencies: npt.NDArray[np.float64], step: int = 1) -> Complex:
    """Returns ``exp(i t omega_p)`` for positions t = 0, step, ..., (length - 1) step.

    Made in float64 NumPy: a constant of the compiled program, and exact at every position.

    Args:
      length: L, number of positions.
      frequencies: ``omega``, in radians a position, ``[R]``.
      step: between positions.

    Returns:
      float32 arrays ``[L, R]``.

    Raises:
      ValueError: the length is a symbol of ``jax.export``.
    """
    if not isinstance(length, (int, np.integer)):
        raise ValueError(
            f"the sequence length must be a number, not {length}: export one program for each "
            f"length; the batch size may be symbolic"
        )
    angle = step * np.arange(length, dtype=np.float64)[:, None] * frequencies
    return Complex(jnp.asarray(np.cos(angle), jnp.float32), jnp.asarray(np.sin(angle), jnp.float32))


_DIGIT = 1024
MAX_POSITIONS = _DIGIT**2
"""Positions that ``rotary_phasor_at`` knows: from 0 on, so many."""


def rotary_phasor_at(
    positions: Integer[Array, "*shape"], frequencies: npt.NDArray[np.float64]
) -> Complex:
    """Computes ``exp(i t omega_p)`` for given positions t, from a table for each digit of t.

    Exact to float32, where the sine of a product ``t omega`` in float32 is not.

    Args:
      positions: from 0 to ``MAX_POSITIONS - 1``, any shape; others give NaN.
      frequencies: ``omega``, in radians a position, ``[R]``.

    Returns:
      float32 arrays ``[*shape, R]``.
    """
    high, low = (rotary_phasor(_DIGIT, frequencies, step) for step in (_DIGIT, 1))
    positions = jnp.asarray(positions)
    if positions.dtype.itemsize < 4 or jnp.issubdtype(positions.dtype, jnp.unsignedinteger):
        # A digit does not fit into 8 bits.
        positions = positions.astype(jnp.int32)

    def rows(table: Complex, index: Array) -> Complex:
        return Complex(*(lookup(part, index) for part in table))

    return multiply(rows(high, positions // _DIGIT), rows(low, positions % _DIGIT))


def token_rotary(
    frequencies: npt.NDArray[np.float64],
    length: int,
    capacity: int,
    position: Int[Array, ""] | None,
    positions: Int[Array, "*B L"] | None,
) -> Complex:
    """Returns ``exp(i t omega_p)`` for the positions t of L tokens.

    Args:
      frequencies: ``omega``, in radians a position, ``[R]``.
      length: L.
      capacity: positions in the table, which is a constant of the compiled program.
      position: of the first token, int32 scalar, moved back where ``position + length`` exceeds the
        capacity; None: 0.
      positions: of all tokens, ``[L]`` or ``[B, L]``, in place of ``position``.

    Returns:
      float32 arrays that broadcast against ``[B, H, L, R]``.
    """
    if positions is not None:
        table = rotary_phasor_at(positions, frequencies)
    elif position is None:
        table = rotary_phasor(length, frequencies)
    else:
        whole = rotary_phasor(capacity, frequencies)
        table = Complex(*(jax.lax.dynamic_slice_in_dim(x, position, length) for x in whole))
    return Complex(*((part if part.ndim == 3 else part[None])[:, None] for part in table))


def order_parameter(theta: Float[Array, "*shape N"], harmonic: int = 1) -> Float[Array, "*shape"]:
    """Computes ``|mean_n exp(i m theta_n)|``: 1 when all phases agree, 0 when spread evenly.

    The Kuramoto order parameter for ``harmonic`` m = 1, Daido's for m > 1.

    Raises:
      ValueError: ``harmonic`` is below 1.
    """
    z = powers(phasor(jnp.asarray(theta, jnp.float32)), harmonic)[-1]
    return jnp.sqrt(z.re.mean(axis=-1) ** 2 + z.im.mean(axis=-1) ** 2)
