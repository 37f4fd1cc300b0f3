"""Windows of the validation split, the same for all models that are compared on them."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from fsn_jax.documents import document_ids
from train.errors import UserError
from train.load import TrainedModel
from train.program import Arguments

LONGEST_DEFAULT = 256
"""Characters of a window if no length is given, where every weight of every head is held."""


def add_window_options(p: Arguments, *, windows: int) -> None:
    """Adds the options of ``validation_windows`` to a command line; ``windows`` is a default."""
    p.add_argument("--windows", type=int, default=windows, help="of the validation split")
    most = f"0: the shortest context, at most {LONGEST_DEFAULT}"
    p.add_argument("--length", type=int, default=0, help=f"characters of a window; {most}")


def spread_windows(num_tokens: int, length: int, count: int) -> npt.NDArray[np.int64]:
    """Returns the starts of ``count`` windows of ``length + 1`` characters, spread evenly.

    Raises:
      UserError: the windows would overlap.
    """
    most = (num_tokens - 1) // length
    if not 1 <= count <= most:
        raise UserError(
            f"--windows must be from 1 to {most}, as many as the validation split holds at "
            f"length {length}; got {count}"
        )
    return np.linspace(0, num_tokens - 1 - length, count).astype(np.int64)


def check_alike(every: Sequence[TrainedModel]) -> None:
    """Raises UserError unless the models see the same data and the same repetitions in it."""
    first = every[0]
    for trained in every:
        if trained.corpus.sha256 != first.corpus.sha256:
            raise UserError(
                f"{trained.run.path} and {first.run.path} were trained on different data; "
                f"compare runs of one corpus"
            )
        if trained.experiment.data.segments != first.experiment.data.segments:
            raise UserError(
                f"{trained.run.path} and {first.run.path} have different config.data.segments, "
                f"and so see different repetitions; compare runs that have the same"
            )


def validation_windows(
    trained: TrainedModel, num_windows: int, length: int
) -> tuple[jax.Array, jax.Array | None]:
    """Returns windows of the validation split, ``[W, L]``, and the documents they are of.

    Args:
      trained: the run.
      num_windows: W.
      length: L; 0: the context, at most ``LONGEST_DEFAULT``.

    Raises:
      UserError: the windows do not fit the context or the split.
    """
    data = trained.experiment.data
    length = length or min(data.context, LONGEST_DEFAULT)
    if not 2 <= length <= data.context:
        raise UserError(
            f"--length must be from 2 to the context of {trained.run.path}, {data.context}; got "
            f"{length}"
        )
    text = trained.corpus.tokens("validation")
    starts = spread_windows(len(text), length, num_windows)
    tokens = jnp.asarray(text[starts[:, None] + np.arange(length)], jnp.int32)
    separator = data.separator(trained.corpus.vocabulary)
    return tokens, None if separator is None else document_ids(tokens, separator)
