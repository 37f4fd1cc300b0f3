"""What the kernels for NVIDIA GPUs share: tiles, rows and columns in memory, products, the call.

One program has a block of rows of one head and walks through the other side of the causal sum in
steps. Triton wants powers of two, so wide rows come in pieces (208 columns are 128 + 64 + 16), and
what lies outside of an array is read as zero and not written.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from fsn_jax.kernels.arrays import dot, varying_alike

Ref = Any
"""A reference to a block ``[1, 1, rows, columns]`` of an array, inside of a kernel."""

Pieces = list[Array]
"""The columns of a block of rows, in pieces."""

Shape = jax.ShapeDtypeStruct

WIDE = 128
"""Most columns of a piece."""

PIECE = 16
"""Fewest columns of a piece: the least that Triton multiplies."""


class Tile(NamedTuple):
    """How a kernel is cut.

    Attributes:
      block: rows of a program.
      step: rows of the other side that it takes at a time.
      num_warps: warps of a program.
      num_stages: steps that are loaded ahead, and 1.
    """

    block: int
    step: int
    num_warps: int = 8
    num_stages: int = 2


class Span(NamedTuple):
    """Consecutive rows or columns of an array.

    Attributes:
      start: the first.
      size: how many, a power of two.
      stop: those from here on are not there; None: all are.
    """

    start: Array | int
    size: int
    stop: int | None = None

    @classmethod
    def within(cls, start: Array | int, size: int, length: int) -> "Span":
        """Those of a block that starts at a multiple of its size."""
        return cls(start, size, length if length % size else None)

    @property
    def there(self) -> Array | None:
        """Which are there, ``[size]``; None: all."""
        if self.stop is None:
            return None
        return self.start + jax.lax.broadcasted_iota(jnp.int32, (self.size,), 0) < self.stop

    def after(self, length: int) -> "Span":
        """The rows that follow these one by one, in a sequence of a length."""
        return Span(self.start + 1, self.size, length)


def columns_of(width: int) -> list[Span]:
    """Cuts columns into powers of two.

    Up to a sixth is added rather than cut: each piece is one more product.
    """
    pieces, start = [], 0
    while start < width:
        rest = width - start
        size = max(PIECE, 1 << (rest - 1).bit_length())
        if size > PIECE and 6 * (size - rest) > rest:
            size //= 2
        size = min(size, WIDE)
        pieces.append(Span(start, size, width if start + size > width else None))
        start += size
    return pieces


def load(ref: Ref, rows: Span) -> Pieces:
    """Reads rows."""
    return [load_at(ref, (0, 0), rows, columns) for columns in columns_of(ref.shape[3])]


def store(ref: Ref, rows: Span, pieces: Pieces) -> None:
    """Writes rows."""
    for columns, piece in zip(columns_of(ref.shape[3]), pieces, strict=True):
        store_at(ref, (0, 0), piece, rows, columns)


def load_at(ref: Ref, index: tuple[int, ...], *spans: Span) -> Array:
    """Reads spans of the last axes, at an index of the first."""
    at, mask = _at(ref, index, spans)
    return triton.load(at, mask=mask, other=None if mask is None else jnp.zeros((), ref.dtype))


def store_at(ref: Ref, index: tuple[int, ...], x: Array, *spans: Span) -> None:
    """Writes spans of the last axes, at an index of the first."""
    at, mask = _at(ref, index, spans)
    triton.store(at, x.astype(ref.dtype), mask=mask)


def _at(ref: Ref, index: tuple[int, ...], spans: Sequence[Span]) -> tuple[Ref, Any]:
    """A view of a reference and what of it is there."""
    mask = None
    for axis, span in enumerate(spans):
        if (there := span.there) is not None:
            shape = [1] * len(spans)
            shape[axis] = span.size
            along = jnp.broadcast_to(there.reshape(shape), [s.size for s in spans])
            mask = along if mask is None else mask & along
    # JAX refuses a slice that is known to go beyond the array, and its interpreter known indices
    # beside a mask. The first span starts where only a program knows.
    zero = 0 * spans[0].start
    starts = (span.start if span.stop is None else span.start + zero for span in spans)
    slices = (pl.ds(start, span.size) for start, span in zip(starts, spans, strict=True))
    return ref.at[(*(zero + i for i in index), *slices)], mask


class At(NamedTuple):
    """Where a program is in its sequence.

    Attributes:
      here: index of its block.
      length: rows of the sequence.
      tile: how it is cut.
      segments: reference to the segments ``[1, 1, L]``, or None.
    """

    here: Array
    length: int
    tile: Tile
    segments: Ref | None

    @property
    def own(self) -> Span:
        """The rows of the program."""
        return Span.within(self.here * self.tile.block, self.tile.block, self.length)

    def other(self, step: Array) -> Span:
        """The rows of a step."""
        return Span.within(step * self.tile.step, self.tile.step, self.length)

    @property
    def num_steps(self) -> int:
        """Steps of the sequence."""
        return pl.cdiv(self.length, self.tile.step)

    def over_past(self, add: Callable[[Array, Any], Any], start: Any) -> Any:
        """Sums over the steps that are not after the program's rows."""
        steps = (self.here + 1) * (self.tile.block // self.tile.step)
        return jax.lax.fori_loop(0, jnp.minimum(steps, self.num_steps), add, start)

    def over_future(self, add: Callable[[Array, Any], Any], start: Any) -> Any:
        """Sums over the steps that are not before the program's rows."""
        first = self.here * (self.tile.block // self.tile.step)
        return jax.lax.fori_loop(first, self.num_steps, add, start)

    def zeros(self, columns: int) -> Array:
        """Zeros for the program's rows, ``[block, columns]``."""
        return jnp.zeros((self.tile.block, columns), jnp.float32)

    def before(self, step: Array) -> Array:
        """Which rows of a step each own row sees, ``[block, step]``."""
        return self._pairs(step, lambda own, other: other < own)

    def after(self, step: Array) -> Array:
        """Which rows of a step see each own row, ``[block, step]``."""
        return self._pairs(step, lambda own, other: own < other)

    def _pairs(self, step: Array, causal: Callable[[Array, Array], Array]) -> Array:
        shape = self.tile.block, self.tile.step
        own, other = (
            first * size + jax.lax.broadcasted_iota(jnp.int32, shape, axis)
            for axis, (first, size) in enumerate(zip((self.here, step), shape, strict=True))
        )
        seen = causal(own, other)
        if self.segments is None:
            return seen
        own, other = (load_at(self.segments, (0, 0), rows) for rows in (self.own, self.other(step)))
        return seen & (own[:, None] == other[None, :])


def total(arrays: Any) -> Array:
    """Adds arrays."""
    return functools.reduce(jnp.add, arrays)


def product(x: Pieces, y: Pieces) -> Array:
    """Returns ``x[i] . y[j]`` of all rows, ``[rows of x, rows of y]``."""
    return total(dot(a, b, (1, 1)) for a, b in zip(x, y, strict=True))


def row_product(x: Pieces, y: Pieces) -> Array:
    """Returns ``x[i] . y[i]`` of each row, ``[rows]``."""
    return total(
        jnp.sum(a.astype(jnp.float32) * b.astype(jnp.float32), axis=1)
        for a, b in zip(x, y, strict=True)
    )


def add_product(sums: Pieces, weights: Array, rows: Pieces) -> Pieces:
    """Adds ``weights @ rows``, the weights in the dtype of the rows."""
    return [s + dot(weights.astype(x.dtype), x, (1, 0)) for s, x in zip(sums, rows, strict=True)]


def call(
    kernel: Callable[[At, Sequence[Ref], Sequence[Ref]], None],
    name: str,
    inputs: Sequence[Array | tuple[Array, pl.BlockSpec]],
    segments: Array | None,
    outputs: Sequence[Shape | tuple[Shape, pl.BlockSpec]],
    *,
    tile: Tile,
    interpret: bool,
    num_parts: int = 1,
) -> list[Array]:
    """Runs a kernel on the blocks of all heads of all sequences.

    Args:
      kernel: of its place and the references of inputs and outputs; the third axis of the grid is
        for parts of the work on a block.
      name: of the kernel.
      inputs: arrays ``[B, H or 1, L, W]`` or ``[B, H or 1, L]``, of the first of which the grid is
        made; others with the blocks that programs ``(b H + h, block, part)`` have of them.
      segments: int32 ``[B, 1, L]``, or None.
      outputs: what is written, likewise.
      tile: how the kernel is cut.
      interpret: whether it is run by JAX.
      num_parts: parts of the work on a block.
    """
    batch, heads, length = inputs[0].shape[:3]  # type: ignore[union-attr]
    arrays, in_specs = zip(*(_with_block(x, heads) for x in inputs), strict=True)
    shapes, out_specs = zip(*(_with_block(x, heads) for x in outputs), strict=True)
    if segments is not None:
        of_segments, spec = _with_block(segments, heads)
        arrays, in_specs = (*arrays, of_segments), (*in_specs, spec)
    operands, written = varying_alike(arrays, shapes)

    def body(*refs: Ref) -> None:
        of_segments = refs[len(inputs)] if segments is not None else None
        at = At(pl.program_id(1), length, tile, of_segments)
        kernel(at, refs[: len(inputs)], refs[len(operands) :])

    results = pl.pallas_call(
        body,
        out_shape=written,
        grid=(batch * heads, pl.cdiv(length, tile.block), num_parts),
        in_specs=in_specs,
        out_specs=out_specs,
        compiler_params=triton.CompilerParams(num_warps=tile.num_warps, num_stages=tile.num_stages),
        interpret=interpret,
        name=name,
    )(*operands)
    wanted = (x[0] if isinstance(x, tuple) else x for x in outputs)
    return [x[..., : like.shape[-1]] for x, like in zip(results, wanted, strict=True)]


def _with_block(x: Any, heads: int) -> tuple[Any, pl.BlockSpec]:
    """An array, or the shape of one, and what a program has of it."""
    if isinstance(x, tuple):
        return x
    x = _with_column(x)
    only, rest = x.shape[1] == 1, x.shape[2:]

    def index(s: Array, block: Array, part: Array) -> tuple[Any, ...]:
        return s // heads, 0 if only else s % heads, *(0 for _ in rest)

    return x, pl.BlockSpec((1, 1, *rest), index)


def _with_column(x: Any) -> Any:
    """Gives an array, or the shape of one, a column of zeros if it has none.

    A score that compares nothing has queries and keys without numbers, and a kernel must have some.
    """
    if x.shape[-1]:
        return x
    shape = (*x.shape[:-1], 1)
    return Shape(shape, x.dtype) if isinstance(x, Shape) else jnp.zeros(shape, x.dtype)
