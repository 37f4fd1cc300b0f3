"""The order of the windows, and the two places that they are read from.

An epoch is a seeded permutation of non-overlapping windows of L characters, offset by a seeded
shift. The window that begins at s has the inputs `tokens[s : s + L]` and the targets
`tokens[s + 1 : s + L + 1]`, so L + 1 tokens are read. Row r of step t is the window number
`t * batch_size + r` of a stream that runs through one epoch after the other: a batch is a function
of the seed and the step, nothing is dropped between epochs, and to resume takes a step number.

* resident: the corpus lies on the accelerator, `gather_windows` reads the batch inside the step.
* host: the corpus is mapped from its file, `host_batches` reads ahead in threads with Grain, and
  each process reads its own rows.

Both give the same bytes.
"""

import functools
import importlib.util
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import numpy.typing as npt
from jax import lax
from jaxtyping import Array, Int, UInt

from train.data.vocabulary import Tokens
from train.errors import UserError

Offsets = npt.NDArray[np.signedinteger[Any]]  # int32; int64 from INT32_LIMIT bytes on

INT32_LIMIT = 2**31  # bytes that 32-bit offsets can point into
READ_THREADS = 4


class WindowOrder:
    """Which window each row of each batch is.

    The permutation comes from the raw 64-bit stream of NumPy's Philox generator with the key
    (seed, epoch), a stream that NumPy keeps stable between versions: its first number modulo L is
    the shift, and the ranks of the numbers that follow, one a window, are the permutation.

    Attributes:
      num_bytes: n, the length of the split.
      context: L, the length of a window.
      batch_size: rows of a batch, over all processes.
      seed: any int in [0, 2**64).
      windows_per_epoch: (n - L) // L, whatever the shift.
    """

    def __init__(self, num_bytes: int, context: int, batch_size: int, seed: int):
        if context < 1:
            raise UserError(f"config.data.context={context} must be at least 1")
        if batch_size < 1:
            raise UserError(f"config.training.batch_size={batch_size} must be at least 1")
        if not 0 <= seed < 2**64:
            raise UserError(f"config.seed={seed} must be at least 0 and below 2**64")
        if num_bytes < 2 * context:
            raise UserError(
                f"config.data.context={context} needs a training split of at least {2 * context} "
                f"bytes, and this one has {num_bytes}: lower the context or give more text"
            )
        self.num_bytes = num_bytes
        self.context = context
        self.batch_size = batch_size
        self.seed = seed
        self.windows_per_epoch = (num_bytes - context) // context
        self._dtype = _offset_dtype(num_bytes)
        self._epoch_starts = functools.lru_cache(maxsize=2)(self._make_epoch_starts)

    def starts(self, step: int) -> Offsets:
        """Offsets of the windows of one step: int32[batch_size] (int64 from 2**31 bytes on)."""
        return self.starts_of_steps(step, 1)[0]

    def starts_of_steps(self, step: int, count: int) -> Offsets:
        """Offsets of the windows of `count` steps from `step` on: int32[count, batch_size]."""
        if step < 0 or count < 0:
            raise ValueError(f"no such steps: {count} from {step}")
        starts = np.empty(count * self.batch_size, self._dtype)
        first, filled = step * self.batch_size, 0
        while filled < starts.size:
            epoch, position = divmod(first + filled, self.windows_per_epoch)
            part = self._epoch_starts(epoch)[position : position + starts.size - filled]
            starts[filled : filled + part.size] = part
            filled += part.size
        return starts.reshape(count, self.batch_size)

    def epoch(self, step: int) -> float:
        """How many epochs have been read before `step`."""
        return step * self.batch_size / self.windows_per_epoch

    def _make_epoch_starts(self, epoch: int) -> Offsets:
        """The offsets of an epoch in their order, int32[windows_per_epoch]."""
        stream = np.random.Philox(key=np.array([self.seed, epoch], np.uint64))
        shift = int(stream.random_raw()) % self.context
        permutation = np.argsort(stream.random_raw(self.windows_per_epoch), kind="stable")
        return (permutation * self.context + shift).astype(self._dtype)


def _offset_dtype(num_bytes: int) -> np.dtype[np.signedinteger[Any]]:
    """The type of offsets into so many bytes."""
    return np.dtype(np.int32 if num_bytes < INT32_LIMIT else np.int64)


def place_tokens(
    tokens: Tokens, sharding: jax.sharding.Sharding | None = None
) -> UInt[Array, " n"]:
    """Put a whole corpus on the devices, unsigned[n], replicated or as `sharding` says.

    Raises:
      UserError: it has 2**31 bytes or more, beyond 32-bit offsets.
    """
    check_placement("resident", tokens.size)
    if sharding is None:
        return jax.device_put(tokens)
    return jax.make_array_from_callback(tokens.shape, sharding, lambda index: tokens[index])


def check_placement(placement: str, num_bytes: int) -> None:
    """Judges whether a corpus of so many bytes can be placed so.

    Raises:
      UserError: it is too long for ``resident``, or ``host`` lacks Grain.
    """
    if placement == "host" and importlib.util.find_spec("grain") is None:
        raise UserError(
            "config.data.placement=host needs Grain, which is not installed: pip install grain, or "
            "choose config.data.placement=resident"
        )
    if placement == "resident" and num_bytes >= INT32_LIMIT:
        raise UserError(
            f"config.data.placement=resident takes corpora below {INT32_LIMIT} bytes and this "
            f"split has {num_bytes}: choose config.data.placement=host"
        )


def gather_windows(
    tokens: UInt[Array, " n"], starts: Int[Array, " B"], context: int
) -> UInt[Array, "B {context}+1"]:
    """The windows of a resident corpus: row r is `tokens[starts[r] : starts[r] + context + 1]`.

    For use inside a jitted step; it reads only the windows. Offsets must leave room for a whole
    window: JAX moves the others back without a word.
    """

    def window(start: Int[Array, ""]) -> UInt[Array, " {context}+1"]:
        return lax.dynamic_slice(tokens, (start,), (context + 1,))

    return jax.vmap(window)(starts)


def process_rows(batch_size: int, process_index: int, process_count: int) -> slice:
    """The rows of a batch that one process reads: equal contiguous shares, in process order.

    Raises:
      UserError: the shares would not be equal.
    """
    if not 0 <= process_index < process_count:
        raise ValueError(f"process {process_index} of {process_count}")
    share, rest = divmod(batch_size, process_count)
    if rest:
        raise UserError(
            f"config.training.batch_size={batch_size} does not divide into {process_count} "
            f"processes: choose a multiple of {process_count}"
        )
    return slice(process_index * share, (process_index + 1) * share)


def host_batches(
    data: Tokens,
    order: WindowOrder,
    *,
    start_step: int,
    num_steps: int,
    table: npt.NDArray[np.uint8] | None = None,
    process_index: int = 0,
    process_count: int = 1,
    prefetch: int = 16,
) -> Iterator[Tokens]:
    """The batches of steps start_step to start_step + num_steps, read from the host's memory.

    Args:
      data: unsigned[n], the tokens; or the bytes mapped from the file, together with `table`.
      order: the order of the windows; its `num_bytes` is n.
      start_step: the first step; no earlier one is read.
      num_steps: how many batches.
      table: uint8[256], if given the token of each byte, applied to what is read.
      process_index: which process this is.
      process_count: how many share each batch.
      prefetch: batches read ahead.

    Returns:
      An iterator over unsigned[batch_size / process_count, L + 1]. The thread pool that reads ahead
      starts with the first batch.

    Raises:
      UserError: Grain is not installed, or the rows do not divide into the processes.
    """
    if data.size != order.num_bytes:
        raise ValueError(f"the order is for {order.num_bytes} bytes, the data has {data.size}")
    rows = process_rows(order.batch_size, process_index, process_count)
    try:
        import grain
    except ImportError as error:
        raise UserError(
            f"config.data.placement=host needs Grain ({error}): pip install grain, or choose "
            "config.data.placement=resident"
        ) from error

    columns = np.arange(order.context + 1)

    def batch(step: int) -> Tokens:
        read = data[order.starts(step)[rows, None] + columns]
        return np.asarray(read if table is None else table[read])

    if num_steps <= 0:
        return iter(())
    steps = grain.MapDataset.range(start_step, start_step + num_steps)
    options = grain.ReadOptions(num_threads=READ_THREADS, prefetch_buffer_size=prefetch)
    return iter(steps.map(batch).to_iter_dataset(options))


class EvaluationBatch(NamedTuple):
    """Windows to evaluate.

    Attributes:
      starts: int32[B] (int64 from 2**31 bytes on), where each window begins.
      scored: bool[B, L]: whether the target at `starts + 1 + column` counts. Rows that only fill
        the batch have none.
    """

    starts: Offsets
    scored: npt.NDArray[np.bool_]


def evaluation_windows(
    num_bytes: int, context: int, stride: int, batch_size: int, *, max_bytes: int = 0
) -> Iterator[EvaluationBatch]:
    """Windows in which every byte of a split but its first is scored exactly once.

    Windows begin every `stride` bytes; each scores what the one before did not reach, so that each
    scored byte has at least `context - stride + 1` bytes before it in its window, save in the first
    window. The last window is moved back to end with the split. All batches have the same shape.

    Args:
      num_bytes: length of the split.
      context: L, the length of a window.
      stride: distance of the windows, 1 to L.
      batch_size: B, rows of a batch.
      max_bytes: if not 0, only this many bytes from the beginning of the split are looked at.

    Returns:
      An iterator over the batches, `evaluation_batches(...)` of them.

    Raises:
      UserError: a setting out of range, or fewer than L + 1 bytes.
    """
    limit, count = _evaluation_extent(num_bytes, context, stride, batch_size, max_bytes)
    dtype = _offset_dtype(num_bytes)
    last_start = limit - 1 - context

    def batches() -> Iterator[EvaluationBatch]:
        columns = np.arange(context)
        for first in range(0, count, batch_size):
            index = np.arange(first, first + batch_size, dtype=np.int64)
            starts = np.minimum(index * stride, last_start)
            # One past the last target of the window before: what is left to score begins there.
            # For rows that only fill the batch it lies past the end: they score nothing.
            reached = np.where(index == 0, 1, (index - 1) * stride + context + 1)
            scored = starts[:, None] + 1 + columns >= reached[:, None]
            yield EvaluationBatch(starts.astype(dtype), scored)

    return batches()


def evaluation_batches(
    num_bytes: int, context: int, stride: int, batch_size: int, *, max_bytes: int = 0
) -> int:
    """How many batches `evaluation_windows` gives for the same arguments."""
    _, count = _evaluation_extent(num_bytes, context, stride, batch_size, max_bytes)
    return -(-count // batch_size)


def _evaluation_extent(
    num_bytes: int, context: int, stride: int, batch_size: int, max_bytes: int
) -> tuple[int, int]:
    """Bytes looked at, and windows that cover them."""
    if context < 1:
        raise UserError(f"config.data.context={context} must be at least 1")
    if batch_size < 1:
        raise UserError(f"config.evaluation.batch_size={batch_size} must be at least 1")
    if not 1 <= stride <= context:
        raise UserError(
            f"config.evaluation.stride={stride} must be in 1 to config.data.context={context}"
        )
    if max_bytes < 0:
        raise UserError(f"max_bytes={max_bytes} must be 0 (the whole split) or more")
    limit = min(num_bytes, max_bytes) if max_bytes else num_bytes
    if limit < context + 1:
        raise UserError(
            f"config.data.context={context} needs at least {context + 1} bytes to evaluate on, and "
            f"there are {limit}: lower the context, or give more text or a larger "
            "config.evaluation.num_bytes"
        )
    return limit, 1 - (-(limit - 1 - context) // stride)
