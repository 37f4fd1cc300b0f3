"""The frustrated coupling kernel (Kuramoto-Sakaguchi-Daido): the whole value pathway of an FSN.

For a complex kernel ``kappa[T, M, N]`` over T delays, M harmonics and N phases::

    dtheta[t, n] = Im sum_{tau, m} kappa[tau, m, n] exp(-i m theta[t, n])
                      sum_{u : u + tau <= t} A[h(n), t, u] exp(i m theta[u + tau, n])

With ``kappa = rho exp(-i alpha)`` each term is ``rho sin(m (theta_u - theta_t) - alpha)``: alpha is
a Kuramoto-Sakaguchi frustration angle, rho a Daido coefficient. The term with delay one couples a
token to the successors of the tokens it attends to. Source: arXiv 2606.18694, as reconstructed in
docs/model.md.

``coupling_update`` is the definition, written as plainly as it can be. ``fold_values`` and
``unfold_sum`` are the same sum arranged so that one strictly causal attention does all of it.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Complex64, Float

from fsn_jax.torus import Complex, multiply, powers


def coupling_update(
    theta: Float[Array, "B L N"],
    attention: Float[Array, "B H L L"],
    kappa: Complex64[Array, "T M N"],
) -> Float[Array, "B L N"]:
    """The coupling by its definition: the reference for every faster form.

    Args:
      theta: phases in radians.
      attention: weights with causal rows (zero for ``u > t``); H divides N, and head h couples
        the h-th block of N / H phases.
      kappa: the kernel; T is 1 (no delay) or 2.

    Returns:
      The update of the phases, in radians.

    Raises:
      ValueError: H does not divide N, or T is neither 1 nor 2.
    """
    batch, length, num_phases = theta.shape
    num_heads = attention.shape[1]
    num_delays, num_harmonics, _ = kappa.shape
    if num_phases % num_heads:
        raise ValueError(f"{num_heads} heads do not divide {num_phases} phases")
    if num_delays not in (1, 2):
        raise ValueError(f"kappa has {num_delays} delays; 1 or 2 are supported")

    def mean_field(weights: Array, z: Array) -> Array:
        by_head = z.reshape(batch, length, num_heads, -1)
        return jnp.einsum("bhtu,buhp->bthp", weights, by_head).reshape(z.shape)

    def one_harmonic(m: Array, kappa_m: Array) -> Array:
        z = jnp.exp(1j * m * theta)
        field = kappa_m[0, None, None] * mean_field(attention, z)
        if num_delays == 2:
            # u + 1 <= t leaves out u = t, whose successor is not yet known at t; the row of u
            # then meets the phase of u + 1.
            past = jnp.tril(attention, -1)
            field += kappa_m[1, None, None] * mean_field(past, jnp.roll(z, -1, axis=1))
        return jnp.imag(jnp.conj(z) * field)

    harmonics = jnp.arange(1, num_harmonics + 1, dtype=theta.dtype)
    return jax.vmap(one_harmonic, in_axes=(0, 1))(harmonics, kappa).sum(axis=0)


def fold_values(
    z: Complex, kappa: Complex, *, successor: Complex | None = None
) -> Float[Array, "B H L twoMP"]:
    """Folds the kernel into the values: ``v[u, m] = kappa[0, m] z_u**m + kappa[1, m] z_{u+1}**m``.

    For ``u < t`` both delays share the weight ``A[t, u]``, so a single sum serves them.

    Args:
      z: phasors of the phases that each head couples, ``[B, H, L, P]``.
      kappa: the kernel by head, ``[T, M, H, P]``.
      successor: ``z_{u+1}`` where the caller knows better than the shift of ``z``. The last
        position has none, and a strictly causal sum never asks for it.

    Returns:
      For each harmonic the real and then the imaginary parts, side by side.
    """
    num_delays, num_harmonics = kappa.re.shape[:2]
    values = [multiply(_term(kappa, 0, m), zm) for m, zm in enumerate(powers(z, num_harmonics))]
    if num_delays == 2:
        later = _shift(z) if successor is None else successor
        values = [
            Complex(v.re + w.re, v.im + w.im)
            for v, w in zip(values, delayed_values(later, kappa), strict=True)
        ]
    return jnp.concatenate([part for v in values for part in v], axis=-1)


def delayed_values(successor: Complex, kappa: Complex) -> list[Complex]:
    """``kappa[1, m] z_{u+1}**m`` for each harmonic, given the successors ``z_{u+1}``."""
    num_harmonics = kappa.re.shape[1]
    return [
        multiply(_term(kappa, 1, m), zm) for m, zm in enumerate(powers(successor, num_harmonics))
    ]


def unfold_sum(
    z: Complex,
    total: Float[Array, "B H L twoMP"],
    self_weight: Float[Array, "B H L"],
    kappa: Complex,
) -> Float[Array, "B H L P"]:
    """``Im(sum_m z_t**-m S[t, m]) + A[t, t] sum_m Im kappa[0, m]``.

    Args:
      z: phasors of the receiving tokens, as for ``fold_values``.
      total: ``S[t, m] = sum_{u < t} A[t, u] v[u, m]`` over folded values.
      self_weight: ``A[t, t]``. A token meets itself at phase difference zero, where only the
        frustration angle pushes.
      kappa: the kernel by head, ``[T, M, H, P]``.
    """
    num_harmonics = kappa.re.shape[1]
    parts = jnp.split(total, 2 * num_harmonics, axis=-1)
    update = self_weight[..., None] * kappa.im[0].sum(axis=0)[None, :, None, :]
    for m, zm in enumerate(powers(z, num_harmonics)):
        update += zm.re * parts[2 * m + 1] - zm.im * parts[2 * m]
    return update


def _term(kappa: Complex, tau: int, m: int) -> Complex:
    """One delay and harmonic of the kernel, shaped to scale ``[B, H, L, P]``."""
    return Complex(kappa.re[tau, m][None, :, None, :], kappa.im[tau, m][None, :, None, :])


def _shift(z: Complex) -> Complex:
    one_step = ((0, 0), (0, 0), (0, 1), (0, 0))
    return Complex(*(jnp.pad(part[:, :, 1:], one_step) for part in z))


def coupling_function(
    kappa: Complex64[Array, "T M N"], num_points: int = 256
) -> Float[Array, "T N points"]:
    """``Gamma(phi) = Im sum_m kappa[m] exp(i m phi)`` over one turn: the kernel as a curve.

    ``phi`` is the phase of the source less that of the receiver, from -pi to pi; the curve is the
    push on the receiver, in radians.
    """
    phi = jnp.linspace(-jnp.pi, jnp.pi, num_points)
    harmonics = jnp.arange(1, kappa.shape[1] + 1)
    waves = jnp.exp(1j * harmonics[:, None] * phi[None])
    return jnp.imag(jnp.einsum("tmn,mx->tnx", kappa, waves))
