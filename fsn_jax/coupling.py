"""The frustrated coupling kernel (Kuramoto-Sakaguchi-Daido): the whole value pathway of an FSN.

For a complex kernel ``kappa[T, M, N]`` over T delays, M harmonics and N phases::

    dtheta[t, n] = Im sum_{tau, m} kappa[tau, m, n] exp(-i m theta[t, n])
                      sum_{u : u + tau <= t} A[h(n), t, u] exp(i m theta[u + tau, n])

With ``kappa = rho exp(-i alpha)`` each term is ``rho sin(m (theta_u - theta_t) - alpha)``: alpha is
a Kuramoto-Sakaguchi frustration angle, rho a Daido coefficient. The term with delay one couples a
token to the successors of the tokens it attends to. Source: arXiv 2606.18694, as reconstructed in
docs/model.md.

``coupling_update`` is the definition, written as plainly as it can be, and ``local_field`` the same
before the imaginary part is taken. ``fold_values`` and
``unfold_sum`` are the same sum arranged so that one strictly causal attention does all of it.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex64, Float, Int

from fsn_jax.documents import check_rows
from fsn_jax.recompute import match_varying_axes
from fsn_jax.reverse_mode import reverse_mode_only
from fsn_jax.torus import (
    Complex,
    imaginary_product,
    in_float32,
    multiply,
    powers,
    real_product,
)


def coupling_update(
    theta: Float[Array, "B L N"],
    attention: Float[Array, "B H L L"],
    kappa: Complex64[Array, "T M N"],
    segment_ids: Int[Array, "B L"] | None = None,
) -> Float[Array, "B L N"]:
    """Computes the coupling by its definition, the reference for every faster form.

    Args:
      theta: phases in radians.
      attention: weights with causal rows, zero for ``u > t`` and across segments (others give
        NaN); H divides N, and head h couples the h-th block of N / H phases.
      kappa: the kernel; T is 1 (no delay) or 2.
      segment_ids: the delay does not couple to a successor in another segment; None: all tokens
        of a row are in one.

    Returns:
      The update of the phases, in radians.

    Raises:
      ValueError: kappa is not ``[T, M, N]``, H does not divide N, T is neither 1 nor 2, or
        ``segment_ids`` is not ``[B, L]``.
    """
    return jnp.imag(local_field(theta, attention, kappa, segment_ids))


def local_field(
    theta: Float[Array, "B L N"],
    attention: Float[Array, "B H L L"],
    kappa: Complex64[Array, "T M N"],
    segment_ids: Int[Array, "B L"] | None = None,
) -> Complex64[Array, "B L N"]:
    """Computes the local field: the sum of ``coupling_update`` with its real part.

    It is the field that each phase is in, seen from that phase: the imaginary part is the torque on
    it (its update, in radians), the real part its coherence with the field. Arguments as for
    ``coupling_update``.

    Raises:
      ValueError: kappa is not ``[T, M, N]``, H does not divide N, T is neither 1 nor 2, or
        ``segment_ids`` is not ``[B, L]``.
    """
    batch, length, num_phases = theta.shape
    num_heads = attention.shape[1]
    if kappa.ndim != 3 or kappa.shape[2] != num_phases:
        raise ValueError(
            f"kappa must be [T, M, N] with N = {num_phases}, of FrustratedAttention.kappa() the "
            f"part [:, :, j]; got shape {kappa.shape}"
        )
    num_delays, num_harmonics, _ = kappa.shape
    if num_phases % num_heads:
        raise ValueError(f"{num_heads} heads do not divide {num_phases} phases")
    if num_delays not in (1, 2):
        raise ValueError(f"kappa has {num_delays} delays; 1 or 2 are supported")

    check_rows((batch, length), segment_ids, None)
    unseen = ~np.tri(length, dtype=bool)[None, None]
    if segment_ids is not None:
        unseen = unseen | (segment_ids[:, None, :, None] != segment_ids[:, None, None])
    attention = jnp.where(unseen & (attention != 0), jnp.nan, attention)

    def mean_field(weights: Array, z: Array) -> Array:
        by_head = z.reshape(batch, length, num_heads, num_phases // num_heads)
        return jnp.einsum("bhtu,buhp->bthp", weights, by_head, precision="highest").reshape(z.shape)

    def one_harmonic(m: Array, kappa_m: Array) -> Array:
        z = jnp.exp(1j * m * theta)
        field = kappa_m[0, None, None] * mean_field(attention, z)
        if num_delays == 2:
            # u + 1 <= t leaves out u = t, whose successor is not yet known at t; the row of u
            # then meets the phase of u + 1.
            past = jnp.tril(attention, -1)
            if segment_ids is not None:
                past *= next_in_segment(segment_ids)[:, None, None]
            field += kappa_m[1, None, None] * mean_field(past, jnp.roll(z, -1, axis=1))
        return jnp.conj(z) * field

    harmonics = jnp.arange(1, num_harmonics + 1, dtype=theta.dtype)
    return jax.vmap(one_harmonic, in_axes=(0, 1))(harmonics, kappa).sum(axis=0)


def next_in_segment(segment_ids: Int[Array, "B L"]) -> Float[Array, "B L"]:
    """Returns 1 for a token whose successor is in its segment, 0 for the last of a segment."""
    same = segment_ids[:, 1:] == segment_ids[:, :-1]
    return jnp.pad(same.astype(jnp.float32), ((0, 0), (0, 1)))


def successors(z: Complex, follows: Float[Array, "B 1 L 1"] | None) -> Complex:
    """Returns what the tokens after each have, ``[B, H, L, P]``; zero where there is none.

    Args:
      z: phasors, their powers, or anything else of tokens.
      follows: ``next_in_segment``; None: all tokens of a row are in one segment.
    """
    if not z.re.shape[2]:
        return z
    one_step = ((0, 0), (0, 0), (0, 1), (0, 0))
    moved = Complex(*(jnp.pad(part[:, :, 1:], one_step) for part in z))
    return moved if follows is None else Complex(moved.re * follows, moved.im * follows)


def fold_values(
    z: Complex,
    kappa: Complex,
    follows: Float[Array, "B 1 L 1"] | None = None,
    dtype: str = "float32",
) -> Float[Array, "B H L twoMP"]:
    """Folds the kernel into the values: ``v[u, m] = kappa[0, m] z_u**m + kappa[1, m] z_{u+1}**m``.

    For ``u < t`` both delays share the weight ``A[t, u]``, so a single sum serves them. It must be
    over the strict past: the value of token t holds its successor, which t must not see. On a CPU
    it has derivatives of reverse mode alone; ``coupling_update`` has all.

    Args:
      z: phasors of the phases that each head couples, ``[B, H, L, P]``; one head stands for all if
        they couple the same phases.
      kappa: the kernel by head, ``[T, M, H, P]``.
      follows: ``next_in_segment``; None: all tokens of a row are in one segment.
      dtype: of the result; the sums are float32.

    Returns:
      For each harmonic the real and then the imaginary parts, side by side. The last position has
      no successor, and a strictly causal sum never asks for it.
    """
    by_platform = {name: functools.partial(fold, dtype) for name, fold in _FOLDS.items()}
    return jax.lax.platform_dependent(z, kappa, follows, **by_platform)


def fold_values_transposed(
    z: Complex,
    kappa: Complex,
    follows: Float[Array, "B 1 L 1"] | None,
    d_value: Float[Array, "B H L twoMP"],
) -> tuple[Complex, Complex]:
    """Returns the cotangents of ``z`` and ``kappa`` by ``fold_values``, in their dtype.

    The same as ``jax.vjp`` of it, which would trace each platform's program several times over.

    Args:
      z: phasors, ``[B, H, L, P]``.
      kappa: the kernel by head, ``[T, M, H, P]``.
      follows: see ``fold_values``.
      d_value: the cotangent of its result, whose dtype it has.
    """

    def transposed(fold: Callable[..., Array], *at: Complex) -> tuple[Complex, Complex]:
        _, pull_back = jax.vjp(lambda *at: fold(d_value.dtype.name, *at, follows), *at)
        d_z, d_kappa = pull_back(d_value)
        return d_z, d_kappa

    by_platform = {name: functools.partial(transposed, fold) for name, fold in _FOLDS.items()}
    return jax.lax.platform_dependent(z, kappa, **by_platform)


def _fold_parts(dtype: str, z: Complex, kappa: Complex, follows: Array | None) -> Array:
    """``fold_values`` by harmonic and real or imaginary part, for GPUs and TPUs.

    Nothing is put together on the way, so the phasors are read once and the values written.
    """
    z = in_float32(z)
    num_delays, num_harmonics = kappa.re.shape[:2]
    parts = []
    for m, zm in enumerate(powers(z, num_harmonics)):
        waves = [zm]
        if num_delays == 2:
            waves.append(successors(zm, follows))
        by_delay = [
            multiply(Complex(*(part[tau, m][None, :, None] for part in kappa)), wave)
            for tau, wave in enumerate(waves)
        ]
        parts += [functools.reduce(jnp.add, part) for part in zip(*by_delay, strict=True)]
    # Cast before they are put together: no cotangent as wide as the values is float32.
    return jnp.concatenate([part.astype(dtype) for part in parts], axis=-1)


def _fold_rows(dtype: str, z: Complex, kappa: Complex, follows: Array | None) -> Array:
    """``fold_values`` row by row, for CPUs."""
    z = in_float32(z)
    num_delays, num_harmonics = kappa.re.shape[:2]
    wave = _wave(z, num_harmonics)
    waves = [wave]
    if num_delays == 2:
        waves.append(successors(wave, follows))
    return _scale([part for wave in waves for part in wave], kappa).astype(dtype)


_FOLDS = {"cpu": _fold_rows, "default": _fold_parts}


def unfold_sum(
    z: Complex,
    total: Float[Array, "B H L twoMP"],
    self_weight: Float[Array, "B H L"],
    kappa: Complex,
) -> Complex:
    """Returns the local field, ``sum_m z_t**-m S[t, m] + A[t, t] sum_m kappa[0, m]``.

    Args:
      z: phasors of the receiving tokens, as for ``fold_values``.
      total: ``S[t, m] = sum_{u < t} A[t, u] v[u, m]`` over folded values, u = t left out, though A
        is normalised over ``u <= t``.
      self_weight: ``A[t, t]``. A token meets itself at phase difference zero, where only the
        frustration angle pushes.
      kappa: the kernel by head, ``[T, M, H, P]``.

    Returns:
      The field of each head, ``[B, H, L, P]``, or the sum of them all, ``[B, 1, L, P]``, if one
      head of ``z`` stands for all. The update of the phases is its imaginary part.
    """
    num_harmonics, num_heads = kappa.re.shape[1:3]
    z = in_float32(z)
    at_rest = (part[0].sum(axis=0) for part in kappa)
    if z.re.shape[1] == num_heads:
        re, im = (self_weight[..., None] * part[None, :, None, :] for part in at_rest)
    else:
        by_head = jnp.split(total.astype(jnp.float32), num_heads, axis=1)
        total = functools.reduce(jnp.add, by_head)
        over_heads = functools.partial(jnp.einsum, "bht,hp->btp", self_weight, precision="highest")
        re, im = (over_heads(part)[:, None] for part in at_rest)
    return _add_seen(Complex(re, im), z, _by_harmonic(total, num_harmonics))


def _by_harmonic(sums: Array, num_harmonics: int) -> list[Complex]:
    """Splits what ``side_by_side`` put together into harmonics."""
    parts = jnp.split(sums, 2 * num_harmonics, axis=-1)
    return [Complex(*pair) for pair in zip(parts[::2], parts[1::2], strict=True)]


def _add_seen(field: Complex, z: Complex, sums: list[Complex]) -> Complex:
    """Adds ``sum_m z**-m sums[m]``: mean fields as they are seen from the phases of ``z``."""
    re, im = field
    for zm, mean in zip(powers(z, len(sums)), map(in_float32, sums), strict=True):
        re += real_product(zm, mean)
        im += imaginary_product(zm, mean)
    return Complex(re, im)


def side_by_side(z: Complex, num_harmonics: int) -> Float[Array, "*shape twoMP"]:
    """``z**m`` for each harmonic, the real and then the imaginary parts; ``z`` has any shape."""
    return jnp.concatenate([part for zm in powers(z, num_harmonics) for part in zm], axis=-1)


def field_of_sums(z: Complex, sums: Float[Array, "B H T J L twoMP"], kappa: Complex) -> Complex:
    """``sum_{tau, m, j} kappa[tau, m, j] z_t**-m S[tau, j, t, m]``: the kernel after the sums.

    For a single query the sums are small and the values many, so the kernel waits: one table of
    powers then serves all heads and delays.

    Args:
      z: phasors of the receiving tokens by block, ``[B, H, L, P]``.
      sums: ``S[tau, j, t, m] = sum_u A_j[t, u] z_{u + tau}**m`` over ``u + tau <= t``, u = t
        included, laid out as in ``side_by_side``; j counts the heads that a phase hears.
      kappa: the kernel by block, ``[T, M, J, H, P]``.

    Returns:
      The local field, ``[B, H, L, P]``.
    """
    total = []
    for m, mean in enumerate(_by_harmonic(sums, kappa.re.shape[1])):
        # [T, J, H, P] to [1, H, T, J, 1, P]
        kappa_m = Complex(
            *(part[:, m].transpose(2, 0, 1, 3)[None, :, :, :, None] for part in kappa)
        )
        total.append(Complex(*(part.sum(axis=(2, 3)) for part in multiply(kappa_m, mean))))
    return _add_seen(Complex(jnp.zeros_like(z.re), jnp.zeros_like(z.im)), z, total)


def _wave(z: Complex, num_harmonics: int) -> Complex:
    """``z**m`` and ``i z**m``, each laid out as in ``fold_values``.

    So written a complex product is two real ones over whole rows, and nothing is put together
    after it, when there are H times as many numbers.
    """
    turned = [part for zm in powers(z, num_harmonics) for part in (-zm.im, zm.re)]
    return Complex(side_by_side(z, num_harmonics), jnp.concatenate(turned, axis=-1))


def _scale(waves: list[Array], kappa: Complex) -> Array:
    """Sums the waves of each delay times the kernel."""
    num_delays, num_harmonics = kappa.re.shape[:2]
    # Put together, not repeated: XLA on the CPU writes out what it concatenates, and does not go
    # through the layout of the kernel again for every value.
    factors = [
        jnp.concatenate([part[tau, m // 2] for m in range(2 * num_harmonics)], axis=-1)
        for tau in range(num_delays)
        for part in kappa
    ]
    return _scaled_sum(*reverse_mode_only(match_varying_axes((waves, factors))))


@jax.custom_vjp
def _scaled_sum(waves: list[Array], factors: list[Array]) -> Array:
    """``sum_i factors[i] waves[i]``: ``[H, G]`` times ``[B, H or 1, L, G]``."""
    return functools.reduce(
        jnp.add, (f[None, :, None] * wave for f, wave in zip(factors, waves, strict=True))
    )


def _scaled_sum_forward(
    waves: list[Array], factors: list[Array]
) -> tuple[Array, tuple[list[Array], list[Array]]]:
    return _scaled_sum(waves, factors), (waves, factors)


def _scaled_sum_backward(
    residuals: tuple[list[Array], list[Array]], gradient: Array
) -> tuple[list[Array], list[Array]]:
    # Head by head: for a sum over an axis of heads, or over the tokens of all heads at once, XLA on
    # the CPU first writes out every broadcast factor.
    waves, factors = residuals
    num_heads = gradient.shape[1]
    d_waves: list[Array] = []
    d_factors: list[Array] = []
    for wave, factor in zip(waves, factors, strict=True):
        if wave.shape[1] == num_heads:
            d_waves.append(factor[None, :, None] * gradient)
        else:
            by_head = (factor[h][None, None] * gradient[:, h] for h in range(num_heads))
            d_waves.append(functools.reduce(jnp.add, by_head)[:, None])
        heard = [wave[:, h % wave.shape[1]] for h in range(num_heads)]
        d_factors.append(
            jnp.stack([(gradient[:, h] * heard[h]).sum(axis=(0, 1)) for h in range(num_heads)])
        )

    def cast(cotangents: list[Array], primals: list[Array]) -> list[Array]:
        return [d.astype(x.dtype) for d, x in zip(cotangents, primals, strict=True)]

    return cast(d_waves, waves), cast(d_factors, factors)


_scaled_sum.defvjp(_scaled_sum_forward, _scaled_sum_backward)


def coupling_function(
    kappa: Complex64[Array, "T M *shape"], num_points: int = 256
) -> Float[Array, "T *shape points"]:
    """``Gamma(phi) = Im sum_m kappa[m] exp(i m phi)`` over one turn: the kernel as a curve.

    ``phi`` is the phase of the source less that of the receiver, from -pi to pi; the curve is the
    push on the receiver, in radians.
    """
    phi = jnp.linspace(-jnp.pi, jnp.pi, num_points)
    harmonics = jnp.arange(1, kappa.shape[1] + 1)
    waves = jnp.exp(1j * harmonics[:, None] * phi[None])
    return jnp.imag(jnp.einsum("tm...,mx->t...x", kappa, waves))
