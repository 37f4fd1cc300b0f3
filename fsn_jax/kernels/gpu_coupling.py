"""The frustrated coupling for NVIDIA GPUs: values are made where they are summed.

A head's values are ``2 M`` numbers a phase (``fsn_jax.coupling.fold_values``): written out they are
most of a layer's traffic. Here a program makes those of a step of keys in registers, from phasors,
and sees its sums from the receiving phases before it writes them. What the backward pass needs of
the sums is two complex numbers a phase: the field of the head, and how it turns with the phase that
sees it, ``sum_m m z_t**-m S[t, m]``. The sum is that of ``fsn_jax.kernels.gpu``.

One kernel computes the field; one the cotangents of queries, with the mean cotangents of their
weights; one those of keys; one those of phases and coefficients.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from fsn_jax.kernels import gpu_phasors as phasors
from fsn_jax.kernels import gpu_tiles as tiles
from fsn_jax.kernels.arrays import CouplingInputs, CouplingSums
from fsn_jax.kernels.gpu import sum_of_past
from fsn_jax.kernels.gpu_phasors import Coupling
from fsn_jax.kernels.gpu_tiles import At, Pieces, Ref, Shape, Span, Tile
from fsn_jax.kernels.xla import MASKED
from fsn_jax.torus import (
    Complex,
    add,
    along_circle,
    imaginary_product,
    in_float32,
    kept_in,
    real_product,
    seen_from,
    times,
)


class Cut(NamedTuple):
    """How a kernel is cut.

    Attributes:
      tile: tokens.
      width: phases of a tile at most, with two harmonics; in proportion with others.
    """

    tile: Tile
    width: int

    def phases(self, kappa: Complex) -> int:
        """Phases of a tile for a kernel ``[T, M, H, P]``."""
        _, harmonics, _, phases = kappa.re.shape
        fitting = 1 << max(1, 2 * self.width // harmonics).bit_length() - 1
        return max(tiles.PIECE, min(fitting, tiles.columns_of(phases)[0].size))


SUMS = {2: Cut(Tile(128, 32), 32), 4: Cut(Tile(64, 32, 4), 16)}
"""Kernels that hold the sums of a tile of phases, by the bytes of a number."""

SCORES = {2: Cut(Tile(64, 32, 4), 16), 4: Cut(Tile(32, 32, 4), 16)}
"""Kernels that add the cotangents of weights over tiles of phases."""


def forward(inputs: CouplingInputs, *, interpret: bool) -> tuple[Complex, CouplingSums]:
    """Computes the local field; see ``fsn_jax.kernels.coupling_forward``."""
    query, _, z, kappa, _, _ = inputs
    phases = kappa.re.shape[3]
    part = Shape((*query.shape[:3], phases), query.dtype)
    row = Shape(query.shape[:3], jnp.float32)
    call = _caller(inputs, SUMS, interpret, by_tile=True)
    *parts, log = call(_forward_kernel, "fsn_forward", [], [*[part] * 4, row])
    by_head, turning = Complex(*parts[:2]), Complex(*parts[2:])
    sums = CouplingSums.of(inputs, log, field=by_head, turning=turning)
    return _for_phases(by_head, z), sums


def backward(
    inputs: CouplingInputs, sums: CouplingSums, d_field: Complex, *, interpret: bool
) -> CouplingInputs:
    """Differentiates the local field; see ``fsn_jax.kernels.coupling_backward``."""
    query, key, z, kappa, _, _ = inputs
    batch, heads, length, _ = query.shape
    by_scores = _caller(inputs, SCORES, interpret, by_tile=False)
    by_sums = _caller(inputs, SUMS, interpret, by_tile=True)
    row = Shape(query.shape[:3], jnp.float32)
    like_query, like_key = (Shape(x.shape, x.dtype) for x in (query, key))
    # In the dtype that cotangents of the sums have: three kernels read it.
    read = [*kept_in(d_field, query.dtype.name), sums.log_normalizer]
    d_query, mean = by_scores(
        _query_kernel, "fsn_backward_query", [*read, *sums.field], [like_query, row]
    )
    (d_key,) = by_scores(_key_kernel, "fsn_backward_key", [*read, mean], [like_key])
    blocks = pl.cdiv(length, SUMS[query.dtype.itemsize].tile.block)
    delays, harmonics, _, phases = kappa.re.shape
    of_kappa = (2, delays, harmonics)
    d_kappa_shape = Shape((batch, blocks, heads, *of_kappa, phases), jnp.float32)
    spec = pl.BlockSpec(
        (1, 1, 1, *of_kappa, phases), lambda s, i, _: (s // heads, i, s % heads, 0, 0, 0, 0)
    )
    d_phases = [Shape((*query.shape[:3], phases), z.re.dtype)] * delays
    *d_thetas, d_kappa = by_sums(
        _phase_kernel,
        "fsn_backward_phase",
        [*read, *sums.turning],
        [*d_phases, (d_kappa_shape, spec)],
    )
    d_theta = d_thetas[0].astype(jnp.float32)
    for after in d_thetas[1:]:  # what tokens have for their successors
        d_theta += jnp.pad(after[:, :, :-1], ((0, 0), (0, 0), (1, 0), (0, 0)))
    d_z = _for_phases(along_circle(z, d_theta), z)  # phasors stay on the circle
    d_kappa = jnp.moveaxis(d_kappa.sum(axis=(0, 1)), 0, 3)
    return CouplingInputs(
        d_query,
        d_key,
        kept_in(d_z, z.re.dtype.name),
        kept_in(Complex(*d_kappa), kappa.re.dtype.name),
    )


def _for_phases(by_head: Complex, z: Complex) -> Complex:
    """Adds the heads if they couple the same phases, float32."""
    if z.re.shape == by_head.re.shape:
        return in_float32(by_head)
    return Complex(*(part.sum(axis=1, keepdims=True) for part in in_float32(by_head)))


def _caller(
    inputs: CouplingInputs, cuts: dict[int, Cut], interpret: bool, *, by_tile: bool
) -> Callable[..., Sequence[Array]]:
    """Returns how a kernel of a coupling is called, with more arrays of its tokens.

    With ``by_tile`` there is a program for each tile of phases, not one that goes over all tiles.
    """
    delays, harmonics, heads, phases = inputs.kappa.re.shape
    cut = cuts[inputs.query.dtype.itemsize]
    width = cut.phases(inputs.kappa)
    by_head = pl.BlockSpec((delays, harmonics, 1, phases), lambda s, i, _: (0, 0, s % heads, 0))
    arrays: list[Any] = [inputs.query, inputs.key, *inputs.z]
    arrays += [(part, by_head) for part in inputs.kappa]
    if inputs.follows is not None:
        arrays.append(inputs.follows[..., 0])

    def call(kernel: Any, name: str, more: Any, outputs: Any) -> Sequence[Array]:
        def body(at: At, refs: Sequence[Ref], results: Sequence[Ref]) -> None:
            query, key, *parts = refs[:6]
            z, kappa = Complex(*parts[:2]), Complex(*parts[2:])
            follows = None if inputs.follows is None else refs[6]
            coupling = Coupling(at, width, query, key, z, kappa, follows)
            kernel(coupling, refs[len(arrays) :], results)

        return tiles.call(
            body,
            name,
            [*arrays, *more],
            inputs.segments,
            outputs,
            tile=cut.tile,
            num_parts=pl.cdiv(phases, width) if by_tile else 1,
            interpret=interpret,
        )

    return call


def _forward_kernel(coupling: Coupling, _: Sequence[Ref], outputs: Sequence[Ref]) -> None:
    """The field of a block of queries and a tile of phases, and how it turns."""
    at, columns = coupling.at, coupling.columns(pl.program_id(2))

    def read(rows: Span) -> tuple[Pieces, Pieces]:
        return tiles.load(coupling.key, rows), coupling.values(rows, columns)

    query, own_key = (tiles.load(ref, at.own) for ref in (coupling.query, coupling.key))
    widths = [columns.size] * (2 * coupling.kappa.re.shape[1])
    total, own, log = sum_of_past(at, query, own_key, read, widths)
    fields = [
        seen_from(wave, Complex(*total[2 * m : 2 * m + 2]))
        for m, wave in enumerate(coupling.waves(at.own, columns))
    ]
    at_rest = times(own[:, None], coupling.at_rest(columns))
    field = functools.reduce(add, fields, at_rest)
    turns = (times(m, part) for m, part in enumerate(fields, start=1))
    turning = functools.reduce(add, turns)
    for ref, part in zip(outputs[:4], (*field, *turning), strict=True):
        tiles.store_at(ref, (0, 0), part, at.own, columns)
    tiles.store_at(outputs[4], (0, 0), log, at.own)  # the same for every tile of phases


def _query_kernel(coupling: Coupling, more: Sequence[Ref], outputs: Sequence[Ref]) -> None:
    """The cotangents of a block of queries, and the mean cotangents of their weights."""
    at, d_field, log_ref, field = coupling.at, Complex(*more[:2]), more[2], Complex(*more[3:])

    def add_mean(columns: Span, mean: Array) -> Array:
        parts = (phasors.read(refs, at.own, columns) for refs in (d_field, field))
        return mean + real_product(*parts).sum(axis=1)

    mean = coupling.over_phases(add_mean, jnp.zeros(at.tile.block, jnp.float32))
    query, own_key = (tiles.load(ref, at.own) for ref in (coupling.query, coupling.key))
    own, d_own = coupling.own_weights(log_ref, query, own_key), coupling.d_own_weights(d_field)
    log = tiles.load_at(log_ref, (0, 0), at.own)[:, None]

    def add_keys(step: Array, d_query: Pieces) -> Pieces:
        rows = at.other(step)

        def add_tile(columns: Span, d_weights: Array) -> Array:
            value = coupling.values(rows, columns)
            return d_weights + tiles.product(coupling.d_sums(d_field, at.own, columns), value)

        d_weights = coupling.over_phases(add_tile, at.zeros(at.tile.step))
        key = tiles.load(coupling.key, rows)
        scores = jnp.where(at.before(step), tiles.product(query, key), MASKED)
        d_scores = jnp.exp(scores - log) * (d_weights - mean[:, None])
        return tiles.add_product(d_query, d_scores, key)

    d_own_score = (own * (d_own - mean))[:, None]
    d_query = at.over_past(add_keys, [d_own_score * k.astype(jnp.float32) for k in own_key])
    tiles.store(outputs[0], at.own, d_query)
    tiles.store_at(outputs[1], (0, 0), mean, at.own)


def _key_kernel(coupling: Coupling, more: Sequence[Ref], outputs: Sequence[Ref]) -> None:
    """The cotangents of a block of keys."""
    at, d_field, (log_ref, mean_ref) = coupling.at, Complex(*more[:2]), more[2:]
    key, own_query = (tiles.load(ref, at.own) for ref in (coupling.key, coupling.query))
    own, d_own = coupling.own_weights(log_ref, own_query, key), coupling.d_own_weights(d_field)

    def add_queries(step: Array, d_key: Pieces) -> Pieces:
        rows = at.other(step)

        def add_tile(columns: Span, d_weights: Array) -> Array:
            d_sums = coupling.d_sums(d_field, rows, columns)
            return d_weights + tiles.product(coupling.values(at.own, columns), d_sums)

        d_weights = coupling.over_phases(add_tile, at.zeros(at.tile.step))
        query = tiles.load(coupling.query, rows)
        log, mean = (tiles.load_at(ref, (0, 0), rows)[None] for ref in (log_ref, mean_ref))
        scores = jnp.where(at.after(step), tiles.product(key, query), MASKED)
        return tiles.add_product(d_key, jnp.exp(scores - log) * (d_weights - mean), query)

    d_own_score = (own * (d_own - tiles.load_at(mean_ref, (0, 0), at.own)))[:, None]
    d_key = at.over_future(add_queries, [d_own_score * q.astype(jnp.float32) for q in own_query])
    tiles.store(outputs[0], at.own, d_key)


def _phase_kernel(coupling: Coupling, more: Sequence[Ref], outputs: Sequence[Ref]) -> None:
    """The cotangents of a tile of phases of a block of tokens, and of the coefficients.

    Tokens are there as keys, to whose values successors belong, and as receivers.
    """
    at, columns = coupling.at, coupling.columns(pl.program_id(2))
    d_field, log_ref, turning = Complex(*more[:2]), more[2], Complex(*more[3:])
    *d_theta_refs, d_kappa_ref = outputs
    key = tiles.load(coupling.key, at.own)

    def add_queries(step: Array, d_value: Pieces) -> Pieces:
        rows = at.other(step)
        query = tiles.load(coupling.query, rows)
        scores = jnp.where(at.after(step), tiles.product(key, query), MASKED)
        weights = jnp.exp(scores - tiles.load_at(log_ref, (0, 0), rows)[None])
        return tiles.add_product(d_value, weights, coupling.d_sums(d_field, rows, columns))

    zeros = [at.zeros(columns.size)] * (2 * coupling.kappa.re.shape[1])
    d_value = at.over_future(add_queries, zeros)
    own = coupling.own_weights(log_ref, tiles.load(coupling.query, at.own), key)[:, None]
    d_at_rest = [(own * part).sum(axis=0) for part in phasors.read(d_field, at.own, columns)]
    for tau, ref in reversed([*enumerate(d_theta_refs)]):
        turned = []
        kappa, waves = coupling.coefficients(tau, columns), coupling.sources(tau, at.own, columns)
        for m, (k, wave) in enumerate(zip(kappa, waves, strict=True)):
            seen = seen_from(wave, Complex(*d_value[2 * m : 2 * m + 2]))
            turned.append((m + 1) * imaginary_product(k, seen))
            for part, x in enumerate(seen):
                d_kappa = x.sum(axis=0) + (0 if tau else d_at_rest[part])
                tiles.store_at(d_kappa_ref, (0, 0, 0, part, tau, m), d_kappa, columns)
        if not tau:
            received = (phasors.read(refs, at.own, columns) for refs in (d_field, turning))
            turned.append(imaginary_product(*received))
        tiles.store_at(ref, (0, 0), tiles.total(turned), at.own, columns)
