"""The frustrated coupling for TPUs: one kernel folds, sums and unfolds, another differentiates.

A head's values are ``2 M`` numbers a phase (``fsn_jax.coupling.fold_values``): written out they are
most of a layer's traffic. Here they are made of the phasors in vector memory, a block of keys at a
time, and what is summed of them is seen from the receiving phases before it leaves. The sum is that
of ``fsn_jax.kernels.tpu``, the rest ``fsn_jax.kernels.tpu_phasors``.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pallas_tpu

from fsn_jax.kernels import tpu
from fsn_jax.kernels import tpu_tiles as tiles
from fsn_jax.kernels.arrays import CouplingInputs, CouplingSums
from fsn_jax.kernels.tpu_phasors import SUBLANES, Coupling
from fsn_jax.kernels.tpu_tiles import AFTER_KEY, BY_KEY, BY_QUERY, FIXED, WHOLE, Columns, Ref, Tile
from fsn_jax.torus import Complex, along_circle, in_float32, kept_in

Inputs = list[tuple[Array, str]]
"""Arrays, and which of their columns a tile works on."""


def forward(inputs: CouplingInputs, *, interpret: bool) -> tuple[Complex, CouplingSums]:
    """Computes the local field; see ``fsn_jax.kernels.coupling_forward``."""
    query, key, z, kappa, _, segments = inputs
    batch, heads, length, _ = query.shape
    phasors = _phasors(inputs)
    part = jax.ShapeDtypeStruct(phasors[1][0].shape, jnp.float32)
    width = 2 * kappa.re.shape[1] * part.shape[2]
    sums = jax.ShapeDtypeStruct((batch, heads, width, length), query.dtype)
    row = jax.ShapeDtypeStruct((batch, heads, 1, length), jnp.float32)
    re, im, total, own, log = tiles.call(
        functools.partial(_forward_kernel, _Case.of(inputs)),
        "fsn_forward",
        [(tiles.features_first(query), BY_QUERY), (tiles.features_first(key), BY_KEY), *phasors],
        segments,
        [(part, WHOLE), (part, WHOLE), (sums, BY_QUERY), (row, BY_QUERY), (row, BY_QUERY)],
        keys_outside=False,
        scratch=[
            _scratch(width, length, query.dtype),
            *tpu.sum_state(width, length),
            *[_scratch(part.shape[2], length)] * 2 * (kappa.re.shape[0] - 1),
        ],
        interpret=interpret,
    )
    field = Complex(*(tiles.tokens_first(x, z.re.shape[3]) for x in (re, im)))
    total = _with_phases(total, kappa, z.re.shape[3]).swapaxes(2, 3)
    return field, CouplingSums.of(inputs, log[:, :, 0], total=total, self_weight=own[:, :, 0])


def backward(
    inputs: CouplingInputs, sums: CouplingSums, d_field: Complex, *, interpret: bool
) -> CouplingInputs:
    """Differentiates the local field; see ``fsn_jax.kernels.coupling_backward``."""
    query, key, z, kappa, _, segments = inputs
    length, phasors = query.shape[2], _phasors(inputs)
    phases = phasors[1][0].shape[2]
    wide_query, wide_key = tiles.features_first(query), tiles.features_first(key)
    total = _with_phases(sums.total.swapaxes(2, 3), kappa, phases)
    by_query = [total, *(x[:, :, None] for x in (sums.self_weight, sums.log_normalizer))]
    by_query += [tiles.features_first(part, SUBLANES) for part in d_field]
    coefficients = (query.shape[0], *phasors[0][0].shape[1:])
    d_query, d_key, d_kappa, d_theta = tiles.call(
        functools.partial(_backward_kernel, _Case.of(inputs)),
        "fsn_backward",
        [(wide_query, BY_QUERY), (wide_key, BY_KEY)] + [(x, BY_QUERY) for x in by_query] + phasors,
        segments,
        [
            (jax.ShapeDtypeStruct(shape, jnp.float32), columns)
            for shape, columns in (
                (wide_query.shape, WHOLE),
                (wide_key.shape, BY_KEY),
                (coefficients, FIXED),
                (phasors[1][0].shape, WHOLE),
            )
        ],
        keys_outside=True,
        scratch=[_scratch(total.shape[2], length, query.dtype)] * 2
        + [_scratch(rows, length) for rows in (total.shape[2], 1, 1)]
        + [_scratch(phases, length)] * 3 * (kappa.re.shape[0] - 1),
        interpret=interpret,
    )
    d_theta = tiles.tokens_first(d_theta, z.re.shape[3])
    d_z = along_circle(z, d_theta)  # phasors stay on the circle
    return CouplingInputs(
        tiles.tokens_first(d_query, query.shape[3]).astype(query.dtype),
        tiles.tokens_first(d_key, key.shape[3]).astype(key.dtype),
        kept_in(d_z, z.re.dtype.name),
        _from_columns(d_kappa.sum(axis=0), kappa),
    )


class _Case(NamedTuple):
    """What the kernels must know of their arrays.

    Attributes:
      num_harmonics: M.
      delayed: whether there is a delay.
      segmented: whether not every token has a successor.
      shared: whether all heads couple the same phases.
    """

    num_harmonics: int
    delayed: bool
    segmented: bool
    shared: bool

    @classmethod
    def of(cls, inputs: CouplingInputs) -> "_Case":
        num_delays, num_harmonics = inputs.kappa.re.shape[:2]
        shared = inputs.z.re.shape[1] == 1
        return cls(num_harmonics, num_delays == 2, inputs.follows is not None, shared)

    def parse(
        self, tile: Tile, inputs: Sequence[Ref], successor: Sequence[Ref]
    ) -> tuple[Coupling, Sequence[Ref]]:
        """The coupling of a tile, by ``_phasors`` and scratch, and the inputs that are left."""
        kappa, *phasors = inputs[: 7 if self.delayed else 5]
        receivers, sources, after = Complex(*phasors[:2]), Complex(*phasors[2:4]), phasors[4:]
        inputs = inputs[1 + len(phasors) :]
        follows, rest = (inputs[0], inputs[1:]) if self.segmented else (None, inputs)
        harmonics = self.num_harmonics
        return Coupling(tile, kappa, harmonics, receivers, sources, after, follows, successor), rest


def _forward_kernel(case: _Case, tile: Tile, inputs: Sequence[Ref], outputs: Sequence[Ref]) -> None:
    query, key, *inputs = inputs
    re, im, total_ref, own_ref, log_ref, value, *outputs = outputs
    state, successor = outputs[:3], outputs[3:]
    coupling, segments = case.parse(tile, inputs, successor)
    _clear(tile.starts(case.shared), [re, im])

    def finish(columns: Columns, total: Array, own: Array, log: Array) -> None:
        total_ref[:, columns] = total.astype(total_ref.dtype)
        own_ref[:, columns], log_ref[:, columns] = own, log
        at = tile.in_sequence(tile.query, columns)
        for ref, part in zip((re, im), coupling.unfold(columns, total, own), strict=True):
            ref[:, at] += part

    def work(diagonal: bool, first: bool) -> None:
        coupling.fold(value)
        tpu.add_keys(tile, query, key, value, segments, state, finish)(diagonal, first)

    tile.run(work)


def _backward_kernel(
    case: _Case, tile: Tile, inputs: Sequence[Ref], outputs: Sequence[Ref]
) -> None:
    query, key, total, own, log, re, im, *inputs = inputs
    d_query, d_key, d_kappa, d_theta, *scratch = outputs
    value, d_total, d_value, mean, d_own, *successor = scratch
    coupling, segments = case.parse(tile, inputs, successor[:2])
    _clear(tile.starts(case.shared), [d_theta])
    _clear(tile.starts(False), [d_kappa])
    read, written = (total, own, Complex(re, im)), (d_total, mean, d_own)
    rows, sums = (log, mean, d_own), (d_query, d_key, d_value)
    add = tpu.add_cotangents(tile, query, key, value, d_total, rows, segments, sums)

    def work(diagonal: bool, first: bool) -> None:
        if diagonal:  # the first tile of a block of keys
            coupling.fold(value)
        coupling.differentiate_unfold(diagonal, read, written, d_theta, d_kappa)
        add(diagonal, first)

    def complete() -> None:
        coupling.differentiate_fold(d_value, successor[2:], d_theta, d_kappa)

    tile.run(work)
    pl.when(tile.query == tile.num_blocks - 1)(complete)


def _scratch(rows: int, length: int, dtype: Any = jnp.float32) -> Any:
    return pallas_tpu.VMEM((rows, tiles.block_size(length)), dtype)


def _phasors(inputs: CouplingInputs) -> Inputs:
    """What both kernels read of phasors and kernel, for ``_Case.parse``."""
    _, _, z, kappa, follows, _ = inputs
    kinds = [BY_QUERY, BY_KEY, AFTER_KEY][: 1 + kappa.re.shape[0]]
    phasors = [tiles.features_first(part, SUBLANES) for part in z]
    arrays = [(x, columns) for columns in kinds for x in phasors]
    if follows is not None:
        arrays.append((follows.swapaxes(2, 3), BY_KEY))
    return [(_to_columns(kappa), FIXED), *arrays]


def _with_phases(total: Array, kappa: Complex, phases: int) -> Array:
    """Sums ``[B, H, G, L]`` with so many rows a harmonic and part: some are padding, or cut off."""
    num_parts = 2 * kappa.re.shape[1]
    by_part = total.reshape(*total.shape[:2], num_parts, -1, total.shape[3])[:, :, :, :phases]
    missing = phases - by_part.shape[3]
    by_part = jnp.pad(by_part, ((0, 0), (0, 0), (0, 0), (0, missing), (0, 0)))
    return by_part.reshape(*total.shape[:2], num_parts * phases, total.shape[3])


def _to_columns(kappa: Complex) -> Array:
    """``[T, M, H, P]`` as one column for each delay, harmonic and part, ``[1, H, W, 2 T M]``."""
    stacked = jnp.stack(in_float32(kappa), axis=2)
    by_head = stacked.transpose(3, 4, 0, 1, 2)  # [H, P, T, M, 2]
    columns = by_head.reshape(*by_head.shape[:2], -1)[None]
    return jnp.pad(columns, ((0, 0), (0, 0), (0, -columns.shape[2] % SUBLANES), (0, 0)))


def _from_columns(columns: Array, kappa: Complex) -> Complex:
    """The inverse of ``_to_columns``, of ``[H, W, 2 T M]``."""
    delays, harmonics, heads, phases = kappa.re.shape
    by_head = columns[:, :phases].reshape(heads, phases, delays, harmonics, 2)
    return kept_in(Complex(*by_head.transpose(4, 2, 3, 0, 1)), kappa.re.dtype.name)


def _clear(start: Array | bool, refs: Sequence[Ref]) -> None:
    """Makes what is summed over tiles zero where that starts."""

    def clear() -> None:
        for ref in refs:
            ref[...] = jnp.zeros(ref.shape, ref.dtype)

    pl.when(start)(clear)
