"""What a program of a GPU does with phasors: values of keys, cotangents of sums, the own weights.

Phasors are unit numbers, so that a cotangent of theirs is one number: that of the phase. With
``z = exp(i theta)``, a product ``c z**m`` turns by ``i m c z**m`` a radian.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from fsn_jax.kernels import gpu_tiles as tiles
from fsn_jax.kernels.gpu_tiles import At, Pieces, Ref, Span
from fsn_jax.torus import Complex, add, in_float32, powers, real_product, times


class Coupling(NamedTuple):
    """The coupling of a program's head.

    Attributes:
      at: where the program is.
      width: phases of a tile.
      query: reference to the queries ``[1, 1, L, E]``.
      key: reference to the keys ``[1, 1, L, E]``.
      z: references to the phasors ``[1, 1, L, P]``.
      kappa: references to the coefficients ``[T, M, 1, P]``.
      follows: reference to whether a token has a successor in its segment ``[1, 1, L]``, or None.
    """

    at: At
    width: int
    query: Ref
    key: Ref
    z: Complex
    kappa: Complex
    follows: Ref | None

    def columns(self, tile: Array | int) -> Span:
        """The phases of a tile."""
        return Span.within(tile * self.width, self.width, self.z.re.shape[3])

    def over_phases(self, add: Callable[[Span, Any], Any], start: Any) -> Any:
        """Calls ``add(phases, sums)`` for each tile of phases in turn."""
        num_tiles = pl.cdiv(self.z.re.shape[3], self.width)
        return jax.lax.fori_loop(0, num_tiles, lambda i, sums: add(self.columns(i), sums), start)

    def waves(self, rows: Span, columns: Span) -> list[Complex]:
        """``z**m`` of some tokens and phases, for each harmonic."""
        z = read(self.z, rows, columns)
        # Without the condition Triton takes a load for the operand of a product and computes all
        # that is made of it in that layout, in many warps anew.
        there = rows.start + jax.lax.broadcasted_iota(jnp.int32, z.re.shape, 0) < self.at.length
        z = Complex(*(jnp.where(there, part, 0.0) for part in z))
        return powers(z, self.kappa.re.shape[1])

    def sources(self, tau: int, rows: Span, columns: Span) -> list[Complex]:
        """``waves`` of what a delay couples to: the tokens themselves, or their successors."""
        if not tau:
            return self.waves(rows, columns)
        after = self.waves(rows.after(self.at.length), columns)
        if self.follows is None:
            return after
        follows = tiles.load_at(self.follows, (0, 0), rows)[:, None]
        return [times(follows, wave) for wave in after]

    def coefficients(self, tau: int, columns: Span) -> list[Complex]:
        """The coefficients of a delay by harmonic, ``[1, size]``."""
        return [
            Complex(*(tiles.load_at(part, (tau, m, 0), columns)[None] for part in self.kappa))
            for m in range(self.kappa.re.shape[1])
        ]

    def at_rest(self, columns: Span) -> Complex:
        """The coefficients without delay, added: what a token does to itself."""
        return functools.reduce(add, self.coefficients(0, columns))

    def values(self, rows: Span, columns: Span) -> Pieces:
        """Values of some keys and phases: for each harmonic the real and the imaginary part."""
        by_delay = []
        for tau in range(self.kappa.re.shape[0]):
            kappa, waves = self.coefficients(tau, columns), self.sources(tau, rows, columns)
            by_delay.append([product(*pair) for pair in zip(kappa, waves, strict=True)])
        values = (functools.reduce(add, terms) for terms in zip(*by_delay, strict=True))
        return [part.astype(self.query.dtype) for value in values for part in value]

    def d_sums(self, d_field: Complex, rows: Span, columns: Span) -> Pieces:
        """Cotangents of the sums of some queries, laid out as ``values``."""
        seen = read(d_field, rows, columns)
        d_sums = [part for wave in self.waves(rows, columns) for part in product(wave, seen)]
        return [part.astype(self.query.dtype) for part in d_sums]

    def own_weights(self, log: Ref, query: Pieces, key: Pieces) -> Array:
        """Weights of the program's tokens for themselves, ``[block]``."""
        return jnp.exp(tiles.row_product(query, key) - tiles.load_at(log, (0, 0), self.at.own))

    def d_own_weights(self, d_field: Complex) -> Array:
        """Cotangents of the same."""

        def add_tile(columns: Span, d_own: Array) -> Array:
            received = read(d_field, self.at.own, columns)
            return d_own + real_product(self.at_rest(columns), received).sum(axis=1)

        d_own: Array = self.over_phases(add_tile, jnp.zeros(self.at.tile.block, jnp.float32))
        return d_own


def read(refs: Complex, rows: Span, columns: Span) -> Complex:
    """Reads complex numbers of tokens and phases, float32."""
    return in_float32(Complex(*(tiles.load_at(part, (0, 0), rows, columns) for part in refs)))


def product(x: Complex, y: Complex) -> Complex:
    """``x y``; that of ``fsn_jax.torus`` adds zeros where one has fewer rows."""
    return Complex(x.re * y.re - x.im * y.im, x.re * y.im + x.im * y.re)
