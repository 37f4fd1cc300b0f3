"""What a tile of a TPU does with phasors: values of its keys, the field of its queries, cotangents.

Phasors have the layout of ``fsn_jax.kernels.tpu_tiles``, ``[W, tokens]``. They are unit numbers, so
that a cotangent of theirs is one number: that of the phase. With ``z = exp(i theta)``, a product
``c z**m`` turns by ``i m c z**m`` a radian.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu

from fsn_jax.kernels import tpu_tiles as tiles
from fsn_jax.kernels.tpu_tiles import Columns, Ref, Tile
from fsn_jax.torus import (
    Complex,
    add,
    imaginary_product,
    in_float32,
    multiply,
    powers,
    real_product,
    seen_from,
    times,
)

SUBLANES = 8
"""Phases come in multiples of this."""

CHUNK = 2
"""Tokens that are worked on together, in LANES."""

Rows = Columns


def _over_rows(groups: Sequence[Array]) -> Array:
    """Sums groups of rows, ``[1, columns]``."""
    return functools.reduce(jnp.add, groups).sum(axis=0, keepdims=True)


def _sum_by_harmonic(terms: Sequence[Array]) -> Array:
    """``sum_m m terms[m - 1]``."""
    return functools.reduce(jnp.add, (m * x if m > 1 else x for m, x in enumerate(terms, start=1)))


class Coupling(NamedTuple):
    """The coupling of a tile.

    Attributes:
      tile: where it is.
      kappa: the coefficients, a column for each delay, harmonic and part, ``[W, 2 T M]``.
      num_harmonics: M.
      receivers: phasors of the queries, ``[W, block]``.
      sources: of the keys.
      after: with a delay, of the tokens after the block of keys, ``[W, LANES]`` twice.
      follows: whether the successor of a key is in its segment, ``[1, block]``, or None.
      successor: with a delay, scratch for the phasors of the keys' successors.
    """

    tile: Tile
    kappa: Ref
    num_harmonics: int
    receivers: Complex
    sources: Complex
    after: Sequence[Ref]
    follows: Ref | None
    successor: Sequence[Ref]

    def fold(self, value: Ref) -> None:
        """Writes the values of the keys, ``[G, block]``."""
        for rows in self._groups():
            for part, ref in enumerate(self.successor):
                after = self.after[part][rows, :1]
                ref[rows, :] = self._moved_back(self.sources[part][rows, :], after)
            kappa = [self._coefficients(delay, rows) for delay in range(len(self._by_delay()))]
            for columns in self._chunks():
                waves = [self._waves(phasors, rows, columns) for phasors in self._by_delay()]
                for m in range(self.num_harmonics):
                    terms = (multiply(k[m], w[m]) for k, w in zip(kappa, waves, strict=True))
                    self._write(value, m, rows, columns, functools.reduce(add, terms))

    def unfold(self, columns: Columns, total: Array, own: Array) -> Complex:
        """The field of some queries ``[W, queries]``, by their sums and own weights."""
        rows = pl.ds(0, self.num_phases)
        field = times(own, self._at_rest(rows))
        for m, wave in enumerate(self._waves(self.receivers, rows, columns)):
            at = 2 * m * self.num_phases
            mean = Complex(*jnp.split(total[at : at + 2 * self.num_phases], 2))
            field = add(field, seen_from(wave, mean))
        return field

    def differentiate_unfold(
        self,
        diagonal: bool,
        inputs: tuple[Ref, Ref, Complex],
        outputs: tuple[Ref, Ref, Ref],
        d_theta: Ref,
        d_kappa: Ref,
    ) -> None:
        """Writes what the backward pass of the sum reads; once a query, adds to the others.

        Args:
          diagonal: whether the tile is on the diagonal.
          inputs: sums ``[G, block]``, own weights, and cotangent of the field ``[W, block]``.
          outputs: cotangents of the sums, mean cotangents of the weights, and cotangents of the
            own scores.
          d_theta: cotangent of the phases of the sequence.
          d_kappa: of the kernel.
        """
        total, own, d_field_refs = inputs
        d_total, mean_ref, d_own_score = outputs
        chunks = self._chunks()
        by_sum: list[list[Array]] = [[] for _ in chunks]
        by_own: list[list[Array]] = [[] for _ in chunks]
        for rows in self._groups():
            at_rest, d_at_rest = self._at_rest(rows), []
            for i, columns in enumerate(chunks):
                d_field, fields = self._read(d_field_refs, rows, columns), []
                for m, wave in enumerate(self._waves(self.receivers, rows, columns)):
                    self._write(d_total, m, rows, columns, multiply(wave, d_field))
                    mean = self._sums(total, m, rows, columns)
                    fields.append(seen_from(wave, mean))
                by_sum[i].append(real_product(d_field, functools.reduce(add, fields)))
                by_own[i].append(real_product(d_field, at_rest))
                if diagonal:
                    turning = Complex(*map(_sum_by_harmonic, zip(*fields, strict=True)))
                    at = self.tile.in_sequence(self.tile.query, columns)
                    d_theta[rows, at] += imaginary_product(d_field, turning)
                    d_at_rest.append(times(own[:, columns], d_field))
            for m in range(self.num_harmonics if diagonal else 0):
                self._add_coefficient(d_kappa, 0, m, rows, d_at_rest)
        for i, columns in enumerate(chunks):
            d_own, weight = _over_rows(by_own[i]), own[:, columns]
            mean = weight * d_own + _over_rows(by_sum[i])
            mean_ref[:, columns], d_own_score[:, columns] = mean, weight * (d_own - mean)

    def differentiate_fold(
        self, d_value: Ref, d_successor: Sequence[Ref], d_theta: Ref, d_kappa: Ref
    ) -> None:
        """Adds to the cotangents of phases and kernel by those of the values, ``[G, block]``.

        Args:
          d_value: of the values.
          d_successor: with a delay, scratch ``[W, block]``.
          d_theta: of the phases of the sequence.
          d_kappa: of the kernel.
        """
        for rows in self._groups():
            for delay, phasors in enumerate(self._by_delay()):
                kappa = self._coefficients(delay, rows)
                d_coefficients: list[list[Complex]] = [[] for _ in kappa]
                for columns in self._chunks():
                    turning = []
                    for m, wave in enumerate(self._waves(phasors, rows, columns)):
                        product = seen_from(wave, self._sums(d_value, m, rows, columns))
                        d_coefficients[m].append(product)
                        turning.append(imaginary_product(kappa[m], product))
                    if delay:
                        d_successor[0][rows, columns] = _sum_by_harmonic(turning)
                    else:
                        at = self.tile.in_sequence(self.tile.key, columns)
                        d_theta[rows, at] += _sum_by_harmonic(turning)
                for m, terms in enumerate(d_coefficients):
                    self._add_coefficient(d_kappa, delay, m, rows, terms)
            for ref in d_successor:
                self._add_moved_on(d_theta, rows, ref[rows, :])

    @property
    def num_phases(self) -> int:
        """W."""
        return self.kappa.shape[0]

    def _by_delay(self) -> list[Complex]:
        return [self.sources] + ([Complex(*self.successor)] if self.successor else [])

    def _moved_back(self, x: Array, after: Array) -> Array:
        """What the successors of a block of tokens have, given the first token after it."""
        x = x.astype(jnp.float32)
        last = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1) == x.shape[1] - 1
        moved = jnp.where(last, after.astype(jnp.float32), _rolled(x, x.shape[1] - 1))
        return moved if self.follows is None else moved * self.follows[...]

    def _add_moved_on(self, d_theta: Ref, rows: Rows, d: Array) -> None:
        """Adds what a block of keys has for their successors."""
        first = jax.lax.broadcasted_iota(jnp.int32, d.shape, 1) == 0
        moved = _rolled(d, 1)
        at = self.tile.in_sequence(self.tile.key, pl.ds(0, d.shape[1]))
        d_theta[rows, at] += jnp.where(first, 0.0, moved)
        if self.tile.num_blocks > 1:

            def carry() -> None:
                one = pl.ds(0, tiles.LANES)
                at = self.tile.in_sequence(self.tile.key + 1, one)
                d_theta[rows, at] += jnp.where(first, moved, 0.0)[:, : tiles.LANES]

            pl.when(self.tile.key < self.tile.num_blocks - 1)(carry)

    def _groups(self) -> list[Rows]:
        """A few phases at a time, so that what is made of them stays in registers."""
        size = 2 * SUBLANES if self.num_phases % (2 * SUBLANES) == 0 else SUBLANES
        return [pl.ds(start, size) for start in range(0, self.num_phases, size)]

    def _chunks(self) -> list[Columns]:
        size = tiles.chunk_size(self.tile.block, CHUNK)
        return [pl.ds(start, size) for start in range(0, self.tile.block, size)]

    def _read(self, refs: Complex, rows: Rows, columns: Columns) -> Complex:
        return in_float32(Complex(refs.re[rows, columns], refs.im[rows, columns]))

    def _waves(self, phasors: Complex, rows: Rows, columns: Columns) -> list[Complex]:
        return powers(self._read(phasors, rows, columns), self.num_harmonics)

    def _sums(self, ref: Ref, m: int, rows: Rows, columns: Columns) -> Complex:
        """Reads a harmonic of values or sums ``[G, block]``."""
        re, im = self._rows_of(m, rows)
        return in_float32(Complex(ref[re, columns], ref[im, columns]))

    def _write(self, ref: Ref, m: int, rows: Rows, columns: Columns, value: Complex) -> None:
        for at, part in zip(self._rows_of(m, rows), value, strict=True):
            ref[at, columns] = part.astype(ref.dtype)

    def _rows_of(self, m: int, rows: Rows) -> tuple[Rows, Rows]:
        start = 2 * m * self.num_phases + rows.start
        return pl.ds(start, rows.size), pl.ds(start + self.num_phases, rows.size)

    def _column(self, delay: int, m: int) -> int:
        return 2 * (delay * self.num_harmonics + m)

    def _coefficients(self, delay: int, rows: Rows) -> list[Complex]:
        """The coefficients of some phases by harmonic, ``[rows, 1]``."""
        columns = [self._column(delay, m) for m in range(self.num_harmonics)]
        return [
            Complex(self.kappa[rows, at : at + 1], self.kappa[rows, at + 1 : at + 2])
            for at in columns
        ]

    def _at_rest(self, rows: Rows) -> Complex:
        """The sum of the coefficients without delay: what a token does to itself."""
        return functools.reduce(add, self._coefficients(0, rows))

    def _add_coefficient(
        self, d_kappa: Ref, delay: int, m: int, rows: Rows, terms: list[Complex]
    ) -> None:
        for part, by_chunk in enumerate(zip(*terms, strict=True)):
            at = self._column(delay, m) + part
            over_tokens = functools.reduce(jnp.add, by_chunk).sum(axis=1, keepdims=True)
            d_kappa[rows, at : at + 1] += over_tokens


def _rolled(x: Array, steps: int) -> Array:
    """Rolls columns; the count is int32 under ``jax_enable_x64`` too, as the hardware wants it."""
    return tpu.roll(x, jnp.int32(steps), 1)
