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
            _add_to(Complex(re, im), tile.in_sequence(tile.query, columns), field)

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


def _add_to(refs: Complex, columns: Columns, parts: Complex) -> None:
    for ref, part in zip(refs, parts, strict=True):
        ref[:, columns] += part


def _add(x: Complex, y: Complex) -> Complex:
    return Complex(x.re + y.re, x.im + y.im)


def _conj(x: Complex) -> Complex:
    return Complex(x.re, -x.im)


def _inner(x: Complex, y: Complex) -> Array:
    """``Re sum conj(x) y`` of each token, ``[1, columns]``."""
    return jnp.sum(x.re * y.re + x.im * y.im, axis=0, keepdims=True)


def _waves(phasors: Complex, columns: Columns, num_harmonics: int) -> list[Complex]:
    return powers(in_float32(Complex(*(ref[:, columns] for ref in phasors))), num_harmonics)


def _to_phasor(waves: list[Complex], d_waves: Sequence[Complex]) -> Complex:
    """The cotangent of z by those of its powers, ``sum_m m conj(z**(m - 1)) d_m``."""
    total = d_waves[0]
    for m, d in enumerate(d_waves[1:], start=2):
        term = multiply(_conj(waves[m - 2]), d)
        total = Complex(total.re + m * term.re, total.im + m * term.im)
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
        for columns in self._chunks():
            by_delay = [_waves(source, columns, self.num_harmonics) for source in self.sources]
            parts: list[Array] = []
            for m in range(self.num_harmonics):
                terms = (
                    multiply(self._coefficient(delay, m), waves[m])
                    for delay, waves in enumerate(by_delay)
                )
                parts += functools.reduce(_add, terms)
            value[:, columns] = jnp.concatenate(parts).astype(value.dtype)

    def unfold(self, columns: Columns, total: Array, own: Array) -> Complex:
        """The field of some queries ``[W, queries]``, by their sums and own weights."""
        at_rest = self._at_rest()
        field = Complex(own * at_rest.re, own * at_rest.im)
        waves = _waves(self.receivers, columns, self.num_harmonics)
        for wave, mean in zip(waves, self._split(total), strict=True):
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
        total, own_ref, d_field_ref = inputs
        d_total, mean_ref, d_own_score = outputs
        at_rest, at_rest_terms = self._at_rest(), []
        for columns in self._chunks():
            d_field, own = Complex(*(ref[:, columns] for ref in d_field_ref)), own_ref[:, columns]
            waves = _waves(self.receivers, columns, self.num_harmonics)
            sums = self._split(total[:, columns].astype(jnp.float32))
            d_sums = [multiply(wave, d_field) for wave in waves]
            d_total[:, columns] = jnp.concatenate([part for d in d_sums for part in d]).astype(
                d_total.dtype
            )
            d_own = _inner(at_rest, d_field)
            mean = own * d_own + sum(map(_inner, d_sums, sums))
            mean_ref[:, columns], d_own_score[:, columns] = mean, own * (d_own - mean)
            if diagonal:
                d_waves = [multiply(_conj(d_field), mean_field) for mean_field in sums]
                at = self.tile.in_sequence(self.tile.query, columns)
                _add_to(d_z, at, _to_phasor(waves, d_waves))
                at_rest_terms.append(Complex(own * d_field.re, own * d_field.im))
        if diagonal:
            for m in range(self.num_harmonics):
                self._add_coefficient(d_kappa, 0, m, at_rest_terms)

    def differentiate_fold(self, d_value: Ref, d_sources: list[Complex], d_kappa: Ref) -> None:
        """Adds to the cotangents of phasors and kernel by those of the values, ``[G, block]``."""
        for delay, (source, d_source) in enumerate(zip(self.sources, d_sources, strict=True)):
            terms: list[list[Complex]] = [[] for _ in range(self.num_harmonics)]
            for columns in self._chunks():
                waves, d_values = (
                    _waves(source, columns, self.num_harmonics),
                    self._split(d_value[:, columns]),
                )
                d_waves = []
                for m, (wave, d) in enumerate(zip(waves, d_values, strict=True)):
                    terms[m].append(multiply(_conj(wave), d))
                    d_waves.append(multiply(_conj(self._coefficient(delay, m)), d))
                at = self.tile.in_sequence(self.tile.key, columns)
                _add_to(d_source, at, _to_phasor(waves, d_waves))
            for m in range(self.num_harmonics):
                self._add_coefficient(d_kappa, delay, m, terms[m])

    def _chunks(self) -> list[Columns]:
        return [pl.ds(start, tiles.LANES) for start in range(0, self.tile.block, tiles.LANES)]

    def _column(self, delay: int, m: int) -> int:
        return 2 * (delay * self.num_harmonics + m)

    def _coefficient(self, delay: int, m: int) -> Complex:
        """A coefficient of all phases, ``[W, 1]``."""
        at = self._column(delay, m)
        return Complex(self.kappa[:, at : at + 1], self.kappa[:, at + 1 : at + 2])

    def _at_rest(self) -> Complex:
        """The sum of the coefficients without delay: what a token does to itself."""
        return functools.reduce(_add, (self._coefficient(0, m) for m in range(self.num_harmonics)))

    def _add_coefficient(self, d_kappa: Ref, delay: int, m: int, terms: list[Complex]) -> None:
        for part, by_chunk in enumerate(zip(*terms, strict=True)):
            at = self._column(delay, m) + part
            over_tokens = jnp.sum(functools.reduce(jnp.add, by_chunk), axis=1, keepdims=True)
            d_kappa[:, at : at + 1] += over_tokens

    def _split(self, total: Array) -> list[Complex]:
        """Rows ``[G, columns]`` by harmonic."""
        width = total.shape[0] // (2 * self.num_harmonics)
        parts = [total[i * width : (i + 1) * width] for i in range(2 * self.num_harmonics)]
        return [Complex(*pair) for pair in zip(parts[::2], parts[1::2], strict=True)]
