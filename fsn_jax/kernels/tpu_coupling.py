"""The frustrated coupling for TPUs: one kernel folds, sums and unfolds, another differentiates.

A head's values are ``2 M`` numbers a phase (``fsn_jax.coupling.fold_values``): written out they are
most of a layer's traffic. Here they are made of the phasors in vector memory, a block of keys at a
time, and what is summed of them is seen from the receiving phases before it leaves. The sum is that
of ``fsn_jax.kernels.tpu``. Phasors have the layout of its arrays, ``[W, tokens]``.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pallas_tpu

from fsn_jax.coupling import successors
from fsn_jax.kernels import tpu
from fsn_jax.kernels import tpu_tiles as tiles
from fsn_jax.kernels.tpu_tiles import BY_KEY, BY_QUERY, FIXED, WHOLE, Columns, Ref, Tile
from fsn_jax.torus import Complex, in_float32, multiply, powers

SUBLANES = 8
"""Phases come in multiples of this."""

CHUNK = 2
"""Tokens that are worked on together outside of the sum, in LANES."""

Rows = Columns


def forward(
    query: Array,
    key: Array,
    z: Complex,
    kappa: Complex,
    follows: Array | None,
    segments: Array | None,
    *,
    interpret: bool,
) -> tuple[Complex, Array, Array, Array]:
    """Computes the local field; see ``fsn_jax.kernels.coupling_forward``."""
    sources, shared = _sources(z, kappa, follows), z.re.shape[1] == 1

    def kernel(tile: Tile, inputs: Sequence[Ref], outputs: Sequence[Ref]) -> None:
        (query, key), coupling, segments = _parse(tile, inputs, kappa)
        re, im, total_ref, own_ref, log_ref, value, *state = outputs
        _clear(tile.starts(shared), [re, im])

        def finish(columns: Columns, total: Array, own: Array, log: Array) -> None:
            total_ref[:, columns] = total.astype(total_ref.dtype)
            own_ref[:, columns], log_ref[:, columns] = own, log
            field = coupling.unfold(columns, total, own)
            rows = pl.ds(0, coupling.num_phases)
            _add_to(Complex(re, im), rows, tile.in_sequence(tile.query, columns), field)

        def work(diagonal: bool, first: bool) -> None:
            coupling.fold(value)
            tpu.add_keys(tile, query, key, value, segments, state, finish)(diagonal, first)

        tile.run(work)

    batch, heads, length, _ = query.shape
    inputs = _inputs(query, key, kappa, z, sources)
    field = jax.ShapeDtypeStruct(inputs[-1][0].shape, jnp.float32)
    width = 2 * kappa.re.shape[1] * field.shape[2]
    sums = jax.ShapeDtypeStruct((batch, heads, width, length), query.dtype)
    row = jax.ShapeDtypeStruct((batch, heads, 1, length), jnp.float32)
    values = pallas_tpu.VMEM((width, tiles.block_size(length)), query.dtype)
    re, im, total, own, log = tiles.call(
        kernel,
        "fsn_forward",
        inputs,
        segments,
        [(field, WHOLE), (field, WHOLE), (sums, BY_QUERY), (row, BY_QUERY), (row, BY_QUERY)],
        keys_outside=False,
        scratch=[values, *tpu.sum_state(width, length)],
        interpret=interpret,
    )
    return _turned_back(re, im, z), total.swapaxes(2, 3), own[:, :, 0], log[:, :, 0]


def backward(
    query: Array,
    key: Array,
    z: Complex,
    kappa: Complex,
    follows: Array | None,
    segments: Array | None,
    total: Array,
    self_weight: Array,
    log_normalizer: Array,
    d_field: Complex,
    *,
    interpret: bool,
) -> tuple[Array, Array, Complex, Complex]:
    """Differentiates the local field; see ``fsn_jax.kernels.coupling_backward``."""
    sources, pull_back = jax.vjp(lambda z: _sources(z, kappa, follows), z)
    shared = z.re.shape[1] == 1

    def kernel(tile: Tile, inputs: Sequence[Ref], outputs: Sequence[Ref]) -> None:
        total, own, log, re, im, *inputs = inputs
        (query, key), coupling, segments = _parse(tile, inputs, kappa)
        d_query, d_key, d_kappa, *outputs = outputs
        *d_phasors, value, d_total, d_value, mean, d_own = outputs
        d_sources = _pairs(d_phasors)
        _clear(tile.starts(shared), d_phasors)
        _clear(tile.starts(False), [d_kappa])
        read, written = (total, own, Complex(re, im)), (d_total, mean, d_own)
        rows, sums = (log, mean, d_own), (d_query, d_key, d_value)
        add = tpu.add_cotangents(tile, query, key, value, d_total, rows, segments, sums)

        def work(diagonal: bool, first: bool) -> None:
            if diagonal:
                coupling.fold(value)
            coupling.differentiate_unfold(diagonal, read, written, d_sources[0], d_kappa)
            add(diagonal, first)

        tile.run(work)
        complete = tile.query == tile.num_blocks - 1
        pl.when(complete)(lambda: coupling.differentiate_fold(d_value, d_sources, d_kappa))

    inputs = _inputs(query, key, kappa, z, sources)
    by_query = [tiles.turned(total), self_weight[:, :, None], log_normalizer[:, :, None]]
    by_query += [tiles.turned(part, SUBLANES) for part in d_field]
    columns = [WHOLE, BY_KEY, FIXED] + [WHOLE] * 2 * len(sources)
    like = [x for x, _ in inputs[:3]] + [inputs[-1][0]] * 2 * len(sources)
    like[2] = jnp.broadcast_to(like[2], (query.shape[0], *like[2].shape[1:]))
    width, block = by_query[0].shape[2], tiles.block_size(query.shape[2])
    d_query, d_key, d_kappa, *d_sources = tiles.call(
        kernel,
        "fsn_backward",
        [(x, BY_QUERY) for x in by_query] + inputs,
        segments,
        [
            (jax.ShapeDtypeStruct(x.shape, jnp.float32), c)
            for x, c in zip(like, columns, strict=True)
        ],
        keys_outside=True,
        scratch=[pallas_tpu.VMEM((width, block), query.dtype)] * 2
        + [pallas_tpu.VMEM((rows, block), jnp.float32) for rows in (width, 1, 1)],
        interpret=interpret,
    )
    d_phasors = [_turned_back(*pair, z) for pair in _pairs(d_sources)]
    (d_z,) = pull_back([Complex(*(p.astype(z.re.dtype) for p in d)) for d in d_phasors])
    return (
        tiles.turned_back(d_query, query.shape[3]).astype(query.dtype),
        tiles.turned_back(d_key, key.shape[3]).astype(key.dtype),
        d_z,
        _from_columns(d_kappa.sum(axis=0), kappa),
    )


def _sources(z: Complex, kappa: Complex, follows: Array | None) -> list[Complex]:
    """The phasors that each delay couples to."""
    after = (part.astype(z.re.dtype) for part in successors(z, follows))
    return [z, Complex(*after)][: kappa.re.shape[0]]


def _pairs(parts: Sequence[Ref]) -> list[Complex]:
    return [Complex(*pair) for pair in zip(parts[::2], parts[1::2], strict=True)]


def _inputs(
    query: Array, key: Array, kappa: Complex, z: Complex, sources: list[Complex]
) -> list[tuple[Array, str]]:
    """What both kernels read, for ``_parse``."""
    turned = functools.partial(tiles.turned, multiple=SUBLANES)
    return [
        (tiles.turned(query), BY_QUERY),
        (tiles.turned(key), BY_KEY),
        (_to_columns(kappa), FIXED),
        *((turned(part), BY_QUERY) for part in z),
        *((turned(part), BY_KEY) for source in sources for part in source),
    ]


def _parse(
    tile: Tile, inputs: Sequence[Ref], kappa: Complex
) -> tuple[Sequence[Ref], "_Coupling", Sequence[Ref]]:
    num_delays, num_harmonics = kappa.re.shape[:2]
    phasors = _pairs(inputs[3 : 5 + 2 * num_delays])
    coupling = _Coupling(tile, inputs[2], num_harmonics, phasors[0], phasors[1:])
    return inputs[:2], coupling, inputs[5 + 2 * num_delays :]


def _turned_back(re: Array, im: Array, z: Complex) -> Complex:
    width = z.re.shape[3]
    return Complex(tiles.turned_back(re, width), tiles.turned_back(im, width))


def _to_columns(kappa: Complex) -> Array:
    """``[T, M, H, P]`` as one column for each delay, harmonic and part, ``[1, H, W, 2 T M]``."""
    by_head = jnp.stack(kappa, axis=2).transpose(3, 4, 0, 1, 2)  # [H, P, T, M, 2]
    columns = by_head.reshape(*by_head.shape[:2], -1)[None]
    return jnp.pad(columns, ((0, 0), (0, 0), (0, -columns.shape[2] % SUBLANES), (0, 0)))


def _from_columns(columns: Array, kappa: Complex) -> Complex:
    """The inverse of ``_to_columns``, of ``[H, W, 2 T M]``."""
    delays, harmonics, heads, phases = kappa.re.shape
    by_head = columns[:, :phases].reshape(heads, phases, delays, harmonics, 2)
    return Complex(*by_head.transpose(4, 2, 3, 0, 1))


def _clear(start: Array, refs: Sequence[Ref]) -> None:
    """Makes what is summed over tiles zero where that starts."""

    def clear() -> None:
        for ref in refs:
            ref[...] = jnp.zeros(ref.shape, ref.dtype)

    pl.when(start)(clear)


def _add(x: Complex, y: Complex) -> Complex:
    return Complex(x.re + y.re, x.im + y.im)


def _conj(x: Complex) -> Complex:
    return Complex(x.re, -x.im)


def _real_product(x: Complex, y: Complex) -> Array:
    """``Re conj(x) y``."""
    return x.re * y.re + x.im * y.im


def _times(x: Array, y: Complex) -> Complex:
    return Complex(x * y.re, x * y.im)


def _read(refs: Complex, rows: Rows, columns: Columns) -> Complex:
    return in_float32(Complex(refs.re[rows, columns], refs.im[rows, columns]))


def _add_to(refs: Complex, rows: Rows, columns: Columns, parts: Complex) -> None:
    for ref, part in zip(refs, parts, strict=True):
        ref[rows, columns] += part


def _to_phasor(waves: list[Complex], d_waves: Sequence[Complex]) -> Complex:
    """The cotangent of z by those of its powers, ``sum_m m conj(z**(m - 1)) d_m``."""
    total = d_waves[0]
    for m, d in enumerate(d_waves[1:], start=2):
        total = _add(total, _times(m, multiply(_conj(waves[m - 2]), d)))
    return total


class _Coupling(NamedTuple):
    """The coupling of a tile.

    Attributes:
      tile: where it is.
      kappa: reference to the columns of ``_to_columns``, ``[W, 2 T M]``.
      num_harmonics: M.
      receivers: references to the phasors of the queries, ``[W, block]``.
      sources: of the keys, and of their successors if there is a delay.
    """

    tile: Tile
    kappa: Ref
    num_harmonics: int
    receivers: Complex
    sources: list[Complex]

    def fold(self, value: Ref) -> None:
        """Writes the values of the keys, ``[G, block]``."""
        for rows in self._groups():
            kappa = [self._coefficients(delay, rows) for delay in range(len(self.sources))]
            for columns in self._chunks():
                terms = [
                    [
                        multiply(coefficient, wave)
                        for coefficient, wave in zip(
                            kappa[delay], self._waves(source, rows, columns), strict=True
                        )
                    ]
                    for delay, source in enumerate(self.sources)
                ]
                for m, by_delay in enumerate(zip(*terms, strict=True)):
                    self._write(value, m, rows, columns, functools.reduce(_add, by_delay))

    def unfold(self, columns: Columns, total: Array, own: Array) -> Complex:
        """The field of some queries ``[W, queries]``, by their sums and own weights."""
        rows = pl.ds(0, self.num_phases)
        field = _times(own, self._at_rest(rows))
        waves = self._waves(self.receivers, rows, columns)
        for m, wave in enumerate(waves):
            at = 2 * m * self.num_phases
            mean = Complex(*jnp.split(total[at : at + 2 * self.num_phases], 2))
            field = _add(field, multiply(_conj(wave), mean))
        return field

    def differentiate_unfold(
        self,
        diagonal: bool,
        inputs: tuple[Ref, Ref, Complex],
        outputs: tuple[Ref, Ref, Ref],
        d_z: Complex,
        d_kappa: Ref,
    ) -> None:
        """Writes what the backward pass of the sum reads; once a query, adds to the others.

        Args:
          diagonal: whether the tile is on the diagonal.
          inputs: sums ``[G, block]``, own weights, and cotangent of the field ``[W, block]``.
          outputs: cotangents of the sums, mean cotangents of the weights, and cotangents of the
            own scores.
          d_z: cotangent of the phasors of the sequence.
          d_kappa: of the kernel.
        """
        total, own, d_field_ref = inputs
        d_total, mean_ref, d_own_score = outputs
        chunks = self._chunks()
        by_sum, by_own = [0.0] * len(chunks), [0.0] * len(chunks)
        for rows in self._groups():
            at_rest, d_at_rest = self._at_rest(rows), []
            for i, columns in enumerate(chunks):
                d_field = _read(d_field_ref, rows, columns)
                waves, d_waves = self._waves(self.receivers, rows, columns), []
                for m, wave in enumerate(waves):
                    d_mean, mean = multiply(wave, d_field), self._sums(total, m, rows, columns)
                    self._write(d_total, m, rows, columns, d_mean)
                    by_sum[i] += _real_product(d_mean, mean)
                    d_waves.append(multiply(_conj(d_field), mean))
                by_own[i] += _real_product(at_rest, d_field)
                if diagonal:
                    at = self.tile.in_sequence(self.tile.query, columns)
                    _add_to(d_z, rows, at, _to_phasor(waves, d_waves))
                    d_at_rest.append(_times(own[:, columns], d_field))
            for m in range(self.num_harmonics if diagonal else 0):
                self._add_coefficient(d_kappa, 0, m, rows, d_at_rest)
        for i, columns in enumerate(chunks):
            d_own, weight = by_own[i].sum(axis=0, keepdims=True), own[:, columns]
            mean = weight * d_own + by_sum[i].sum(axis=0, keepdims=True)
            mean_ref[:, columns], d_own_score[:, columns] = mean, weight * (d_own - mean)

    def differentiate_fold(self, d_value: Ref, d_sources: list[Complex], d_kappa: Ref) -> None:
        """Adds to the cotangents of phasors and kernel by those of the values, ``[G, block]``."""
        for rows in self._groups():
            for delay, source in enumerate(self.sources):
                kappa = self._coefficients(delay, rows)
                d_coefficients: list[list[Complex]] = [[] for _ in kappa]
                for columns in self._chunks():
                    waves, d_waves = self._waves(source, rows, columns), []
                    for m, wave in enumerate(waves):
                        d = self._sums(d_value, m, rows, columns)
                        d_coefficients[m].append(multiply(_conj(wave), d))
                        d_waves.append(multiply(_conj(kappa[m]), d))
                    at = self.tile.in_sequence(self.tile.key, columns)
                    _add_to(d_sources[delay], rows, at, _to_phasor(waves, d_waves))
                for m, terms in enumerate(d_coefficients):
                    self._add_coefficient(d_kappa, delay, m, rows, terms)

    @property
    def num_phases(self) -> int:
        """W."""
        return self.kappa.shape[0]

    def _groups(self) -> list[Rows]:
        """Few phases at a time: their coefficients and all that is made of them stay in registers."""
        size = 2 * SUBLANES if self.num_phases % (2 * SUBLANES) == 0 else SUBLANES
        return [pl.ds(start, size) for start in range(0, self.num_phases, size)]

    def _chunks(self) -> list[Columns]:
        size = tiles.chunk_size(self.tile.block, CHUNK)
        return [pl.ds(start, size) for start in range(0, self.tile.block, size)]

    def _waves(self, phasors: Complex, rows: Rows, columns: Columns) -> list[Complex]:
        return powers(_read(phasors, rows, columns), self.num_harmonics)

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
        return functools.reduce(_add, self._coefficients(0, rows))

    def _add_coefficient(
        self, d_kappa: Ref, delay: int, m: int, rows: Rows, terms: list[Complex]
    ) -> None:
        for part, by_chunk in enumerate(zip(*terms, strict=True)):
            at = self._column(delay, m) + part
            over_tokens = functools.reduce(jnp.add, by_chunk).sum(axis=1, keepdims=True)
            d_kappa[rows, at : at + 1] += over_tokens
