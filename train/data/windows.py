"""Windows of a split: their order in training, how they are read, and windows of an evaluation.

An epoch is a seeded permutation of non-overlapping windows of L tokens, offset by a seeded shift.
The window that begins at s has the inputs `tokens[s : s + L]` and the targets
`tokens[s + 1 : s + L + 1]`, so L + 1 tokens are read. Row r of step t is the window number
`t * batch_size + r` of a stream that runs through one epoch after the other: a batch is a function
of the seed and the step, nothing is dropped between epochs, and a step number suffices to resume.

* resident: the corpus is on the accelerator; `gather_windows` reads the batch inside the step.
* host: the corpus is mapped from its file; `host_batches` reads ahead in threads with Grain, and
  each process reads its own rows.

Both give the same bits.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import numpy.typing as npt
from jax import lax
from jaxtyping import Array, Int, UInt

from fsn_jax.vocabulary import Tokens
from train.errors import UserError

Offsets = npt.NDArray[np.signedinteger[Any]]  # int32; int64 from INT32_LIMIT bytes on

INT32_LIMIT = 2**31  # tokens that 32-bit offsets can point into
READ_THREADS = 4
BATCHES_AHEAD = 16


class WindowOrder:
    """The order in which training reads the windows of a split.

    The permutation comes from the raw 64-bit stream of NumPy's Philox generator with the key
    (seed, epoch), a stream that NumPy keeps stable between versions: its first number modulo L is
    the shift, and the windows are read in the order of the numbers that follow, one a window (a
    stable argsort).

    Attributes:
      num_tokens: n, length of the split.
      context: L, the length of a window.
      batch_size: number of rows of a batch, over all processes.
      seed: seed of the order, in [0, 2**64).
      windows_per_epoch: number of windows of an epoch, (n - L) // L.
    """

    def __init__(self, num_tokens: int, context: int, batch_size: int, seed: int):
        if num_tokens < 2 * context:
            raise UserError(
                f"config.data.context={context} needs a training split of at least {2 * context} "
                f"tokens, and this one has {num_tokens}: lower the context or give more text"
            )
        self.num_tokens = num_tokens
        self.context = context
        self.batch_size = batch_size
        self.seed = seed
        self.windows_per_epoch = (num_tokens - context) // context
        self._dtype = _offset_dtype(num_tokens)
        self._epoch_starts = functools.lru_cache(maxsize=2)(self._make_epoch_starts)

    def starts(self, step: int) -> Offsets:
        """Returns the offsets of one step: int32[batch_size] (int64 from 2**31 tokens on)."""
        return self.starts_of_steps(step, 1)[0]

    def starts_of_steps(self, step: int, count: int) -> Offsets:
        """Returns the offsets of `count` steps from `step` on: int32[count, batch_size]."""
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
        """Returns the number of epochs that the steps before `step` read."""
        return step * self.batch_size / self.windows_per_epoch

    def _make_epoch_starts(self, epoch: int) -> Offsets:
        """Returns the offsets of an epoch in their order, int32[windows_per_epoch]."""
        stream = np.random.Philox(key=np.array([self.seed, epoch], np.uint64))
        shift = int(stream.random_raw()) % self.context
        permutation = np.argsort(stream.random_raw(self.windows_per_epoch), kind="stable")
        return (permutation * self.context + shift).astype(self._dtype)


def _offset_dtype(num_tokens: int) -> np.dtype[np.signedinteger[Any]]:
    """Returns the type of offsets into a split."""
    return np.dtype(np.int32 if num_tokens < INT32_LIMIT else np.int64)


def check_placement(placement: str, num_tokens: int) -> None:
    """Raises UserError if a corpus is too long to be ``resident``: offsets have 32 bits there."""
    if placement == "resident" and num_tokens >= INT32_LIMIT:
        raise UserError(
            f"config.data.placement=resident takes corpora below {INT32_LIMIT} tokens and this "
            f"split has {num_tokens}: choose config.data.placement=host"
        )


def gather_windows(
    tokens: UInt[Array, " n"], starts: Int[Array, " B"], context: int
) -> UInt[Array, "B {context}+1"]:
    """Gathers windows of a resident corpus: row r is `tokens[starts[r] : starts[r] + context + 1]`.

    For use inside a jitted step. Offsets must leave room for a whole window: JAX clamps others
    silently.
    """

    def window(start: Int[Array, ""]) -> UInt[Array, " {context}+1"]:
        return lax.dynamic_slice(tokens, (start,), (context + 1,))

    return jax.vmap(window)(starts)


def host_batches(
    data: Tokens,
    order: WindowOrder,
    *,
    start_step: int,
    num_steps: int,
    table: npt.NDArray[np.uint8] | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Tokens]:
    """Reads the batches of steps start_step to start_step + num_steps on the host.

    Args:
      data: unsigned[n], the tokens; or the bytes mapped from the file, together with `table`.
      order: order of the windows; its `num_tokens` is n.
      start_step: step of the first batch.
      num_steps: number of batches.
      table: uint8[256], the token of each byte, applied to what is read; None for data of tokens.
      process_index: index of this process.
      process_count: number of processes that share each batch.

    Returns:
      An iterator over unsigned[batch_size / process_count, L + 1]. The thread pool that reads ahead
      starts with the first batch.

    """
    if data.size != order.num_tokens:
        raise ValueError(f"the order is for {order.num_tokens} tokens, the data has {data.size}")
    import grain  # here: only placement=host takes the time to import it

    share = order.batch_size // process_count
    rows = slice(process_index * share, (process_index + 1) * share)
    columns = np.arange(order.context + 1)

    def batch(step: int) -> Tokens:
        read = data[order.starts(step)[rows, None] + columns]
        return np.asarray(read if table is None else table[read])

    if num_steps <= 0:
        return iter(())
    steps = grain.MapDataset.range(start_step, start_step + num_steps)
    options = grain.ReadOptions(num_threads=READ_THREADS, prefetch_buffer_size=BATCHES_AHEAD)
    return iter(steps.map(batch).to_iter_dataset(options))


class EvaluationBatch(NamedTuple):
    """A batch of windows to evaluate.

    Attributes:
      starts: int32[B] (int64 from 2**31 tokens on), offsets of the windows.
      scored: bool[B, L], whether the target at `starts + 1 + column` counts. Rows that only fill
        the batch have none.
    """

    starts: Offsets
    scored: npt.NDArray[np.bool_]


def evaluation_windows(
    num_tokens: int, context: int, stride: int, batch_size: int
) -> Iterator[EvaluationBatch]:
    """Yields windows in which every token of a split but its first is scored exactly once.

    Windows begin every ``stride`` tokens. Each scores the tokens that the previous one did not
    reach. So each scored token after the first window has at least ``context - stride + 1`` tokens
    before it. The last window is moved back to end with the split. All batches have the same shape.

    Args:
      num_tokens: length of the split, see ``check_evaluation``.
      context: L, the length of a window.
      stride: distance of the windows, 1 to L.
      batch_size: B, number of rows of a batch.
    """
    dtype = _offset_dtype(num_tokens)
    last_start = num_tokens - 1 - context
    columns = np.arange(context)
    for first in range(0, 1 - (-last_start // stride), batch_size):
        index = np.arange(first, first + batch_size, dtype=np.int64)
        starts = np.minimum(index * stride, last_start)
        # One past the last target of the window before: what is left to score begins there.
        # For rows that only fill the batch it lies past the end: they score nothing.
        reached = np.where(index == 0, 1, (index - 1) * stride + context + 1)
        scored = starts[:, None] + 1 + columns >= reached[:, None]
        yield EvaluationBatch(starts.astype(dtype), scored)


def check_evaluation(num_tokens: int, context: int) -> None:
    """Raises UserError if a split is too short for a window."""
    if num_tokens < context + 1:
        raise UserError(
            f"config.data.context={context} needs at least {context + 1} tokens to evaluate on, "
            f"and there are {num_tokens}: lower the context, or give more text or a larger "
            "config.evaluation.num_tokens"
        )
