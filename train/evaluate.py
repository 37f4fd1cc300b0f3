"""``python -m train evaluate RUN``: the loss over the whole validation split, and nothing else.

Each result is printed and added to the run's ``evaluations.jsonl``.
"""

import dataclasses
import datetime
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from train.config import ExperimentConfig
from train.data.windows import evaluation_windows
from train.errors import UserError
from train.load import TrainedModel, load
from train.mesh import DATA_AXIS, placed
from train.metrics import bits_per_character
from train.program import Arguments, start_jax
from train.provenance import device_description, git_state
from train.step import make_evaluate_rows


class Evaluator:
    """Cross entropy over a split, each character after the first predicted once."""

    def __init__(
        self, experiment: ExperimentConfig, rows: Callable[..., Any], mesh: jax.sharding.Mesh
    ):
        """``rows`` is the compiled ``make_evaluate_rows`` of the model on the mesh."""
        self._experiment = experiment
        self._rows = rows
        self._mesh = mesh

    def __call__(
        self, params: Any, tokens: np.ndarray, *, stride: int | None = None
    ) -> tuple[float, int]:
        """Mean loss in nats per character and the number of characters predicted."""
        context = self._experiment.data.context
        batches = evaluation_windows(
            len(tokens),
            context,
            stride or self._experiment.evaluation_stride,
            self._experiment.evaluation.batch_size,
        )
        offsets = np.arange(context + 1)
        by_row = NamedSharding(self._mesh, P(DATA_AXIS))
        sums, count = [], 0
        for starts, scored in batches:
            # Each process gathers the rows of its own devices.
            def gathered(index: Any, starts: np.ndarray = starts) -> np.ndarray:
                return tokens[starts[index[0], None] + offsets]

            shape = (len(starts), context + 1)
            windows = jax.make_array_from_callback(shape, by_row, gathered)
            sums.append(self._rows(params, windows, placed(scored, by_row)))
            count += int(scored.sum())
        # float64 on the host, in the order of the text: the sum does not depend on the devices.
        total = sum(np.asarray(rows, np.float64).sum() for rows in sums)
        return float(total) / count, count


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A loss and all that it depends on.

    Attributes:
      step: of the checkpoint.
      bpc: bits per character, that is per token.
      bits_per_byte: the same unless the tokens are Unicode characters.
      num_bytes: of the text predicted: all of the split but its first token.
      context: most characters the model saw before a prediction.
      stride: new characters a window predicts.
      seconds: it took.
    """

    step: int
    bpc: float
    bits_per_byte: float
    num_bytes: int
    context: int
    stride: int
    seconds: float

    def __str__(self) -> str:
        by_byte = "" if self.bits_per_byte == self.bpc else f" ({self.bits_per_byte:.4f} a byte)"
        return (
            f"{self.bpc:.4f} BPC{by_byte} on {self.num_bytes:,} bytes (context {self.context}, "
            f"stride {self.stride}, step {self.step}, {self.seconds:.0f} s)"
        )


def evaluate(trained: TrainedModel, tokens: np.ndarray, *, stride: int = 0) -> Evaluation:
    """Predicts every token but the first, once each.

    Args:
      trained: the model.
      tokens: unsigned[n].
      stride: new characters a window predicts; 0 takes the run's own.

    Raises:
      UserError: the stride is longer than the context or the text shorter.
    """
    # Any number of devices will do: surplus rows score nothing.
    batch_size = trained.experiment.evaluation.batch_size
    batch_size += -batch_size % trained.mesh.size
    experiment = dataclasses.replace(
        trained.experiment,
        evaluation=dataclasses.replace(trained.experiment.evaluation, batch_size=batch_size),
    )
    stride = stride or experiment.evaluation_stride
    rows = make_evaluate_rows(trained.model, mesh=trained.mesh)
    evaluator = Evaluator(experiment, rows, trained.mesh)
    began = time.perf_counter()
    loss, count = evaluator(trained.params, tokens, stride=stride)
    num_bytes = trained.corpus.codec.num_bytes(tokens[1:])
    bpc = bits_per_character(loss)
    return Evaluation(
        step=trained.step,
        bpc=bpc,
        bits_per_byte=bpc if num_bytes == count else bpc * count / num_bytes,
        num_bytes=num_bytes,
        context=experiment.data.context,
        stride=stride,
        seconds=round(time.perf_counter() - began, 1),
    )


def append_evaluation(file: Path, trained: TrainedModel, result: Evaluation) -> None:
    """Adds a line: the result, when, of which data, by which code.

    Raises:
      UserError: the file cannot be written.
    """
    row = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **dataclasses.asdict(result),
        "data_sha256": trained.corpus.sha256,
        "device": device_description(),
        "git": git_state(),
    }
    try:
        with file.open("a") as log:
            log.write(json.dumps(row) + "\n")
    except OSError as error:
        raise UserError(
            f"cannot write {file} ({error.strerror}); the result was {result}"
        ) from None


def parser(description: str, prog: str) -> Arguments:
    """What this command and the final test have in common."""
    p = Arguments(prog=prog, description=description)
    p.add_argument("run", help="a run's folder, for instance runs/quickstart")
    p.add_argument("--checkpoint", default="best", help="best, latest or a step")
    p.add_argument(
        "--stride", type=int, default=0, help="new characters a window predicts; 0: the run's own"
    )
    return p


def checked_stride(stride: int, experiment: ExperimentConfig) -> int:
    """The stride asked for, or the run's own for 0.

    Raises:
      UserError: it is negative or longer than the context.
    """
    if not 0 <= stride <= experiment.data.context:
        raise UserError(
            f"--stride must be from 1 to the run's context ({experiment.data.context}), or 0 for "
            f"the run's own; got {stride}"
        )
    return stride or experiment.evaluation_stride


def program(argv: Sequence[str]) -> None:
    """Parses and calls."""
    options = parser(__doc__ or "", "python -m train evaluate").parse_args(argv[1:])
    start_jax()
    trained = load(options.run, which=options.checkpoint)
    stride = checked_stride(options.stride, trained.experiment)
    result = evaluate(trained, trained.corpus.tokens("validation"), stride=stride)
    append_evaluation(trained.run.path / "evaluations.jsonl", trained, result)
    print(f"validation {result}")
