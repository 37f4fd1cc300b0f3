"""``python -m train evaluate RUN``: computes the loss over the whole validation split.

Each result is printed and added to the run's ``evaluations.jsonl``, also of a run in a bucket.
"""

import dataclasses
import datetime
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from train.config import ExperimentConfig
from train.data.suffix_match import match_suffixes
from train.data.windows import check_evaluation, evaluation_windows
from train.errors import UserError
from train.load import TrainedModel, load
from train.mesh import DATA_AXIS, placed
from train.metrics import SplitLoss, append_row, bits_per_character
from train.mirror import send_back
from train.plan import model_for
from train.program import Arguments, num_cores, start_jax
from train.provenance import device_description, git_state
from train.run_files import EVALUATIONS
from train.step import make_evaluate_rows


class Evaluator:
    """Computes the cross entropy of a split; each token but the first is predicted once.

    The windows, and which of their predictions count, are made once and serve every call.
    """

    def __init__(
        self,
        experiment: ExperimentConfig,
        rows: Callable[..., Any],
        mesh: jax.sharding.Mesh,
        tokens: np.ndarray,
        *,
        separator: int | None = None,
    ):
        """Prepares the windows of a split.

        Args:
          experiment: context, stride, batch size, and the depth from which copy events count
            (``config.evaluation.copy_depth``).
          rows: the compiled function that ``make_evaluate_rows`` returns.
          mesh: mesh of the devices to evaluate on.
          tokens: unsigned[n], the split.
          separator: that of ``rows``; copy events then lie within a document.
        """
        context, settings = experiment.data.context, experiment.evaluation
        check_evaluation(len(tokens), context)
        batches = evaluation_windows(
            len(tokens), context, experiment.evaluation_stride, settings.batch_size
        )
        self._tokens, self._rows, self._mesh = tokens, rows, mesh
        self._offsets = np.arange(context + 1)
        self._batches = []
        for starts, scored in batches:
            masks = [scored]
            if settings.copy_depth:
                match = match_suffixes(tokens[starts[:, None] + self._offsets], separator=separator)
                masks.append(scored & match.is_copy & (match.depth >= settings.copy_depth))
            self._batches.append((starts, np.stack(masks, axis=1)))

    def __call__(self, params: Any) -> SplitLoss:
        """Computes the loss of these parameters."""
        by_row = NamedSharding(self._mesh, P(DATA_AXIS))
        sums = []
        for starts, masks in self._batches:
            # Each process gathers the rows of its own devices.
            def gathered(index: Any, starts: np.ndarray = starts) -> np.ndarray:
                return self._tokens[starts[index[0], None] + self._offsets]

            shape = (len(starts), len(self._offsets))
            windows = jax.make_array_from_callback(shape, by_row, gathered)
            sums.append(self._rows(params, windows, placed(masks, by_row)))
        # float64 on the host, in the order of the text: the sum does not depend on the devices.
        total = sum(np.asarray(rows, np.float64).sum(axis=0) for rows in sums)
        counts = sum(masks.sum(axis=(0, 2)) for _, masks in self._batches)
        whole = SplitLoss(float(total[0]) / int(counts[0]), int(counts[0]))
        if len(total) == 1 or not counts[1]:
            return whole
        return dataclasses.replace(
            whole, copy_mean=float(total[1]) / int(counts[1]), copy_count=int(counts[1])
        )


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A loss and the settings that it depends on.

    Attributes:
      step: step of the checkpoint.
      bpc: bits per character, that is per token.
      bits_per_byte: bits per byte; equals ``bpc`` unless the tokens are Unicode characters.
      num_bytes: number of bytes predicted: all of the split but its first token.
      context: largest number of tokens that the model saw before a prediction.
      stride: number of new tokens that a window predicts.
      seconds: duration of the evaluation.
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
    """Evaluates a model on a text; every token but the first is predicted once.

    Args:
      trained: the model.
      tokens: unsigned[n].
      stride: number of new tokens that a window predicts; 0 means the run's own.

    Raises:
      UserError: the stride is longer than the context, or the text is shorter than it.
    """
    # Any number of devices will do: surplus rows score nothing.
    batch_size = trained.experiment.evaluation.batch_size
    batch_size += -batch_size % trained.mesh.size
    experiment = dataclasses.replace(
        trained.experiment,
        evaluation=dataclasses.replace(
            trained.experiment.evaluation,
            batch_size=batch_size,
            stride=stride or trained.experiment.evaluation_stride,
            copy_depth=0,
        ),
    )
    separator = experiment.data.separator(trained.corpus.vocabulary)
    model = model_for(experiment, trained.mesh, rows=batch_size // trained.mesh.size)
    rows = make_evaluate_rows(model, mesh=trained.mesh, separator=separator)
    began = time.perf_counter()
    loss = Evaluator(experiment, rows, trained.mesh, tokens)(trained.params)
    num_bytes = trained.corpus.vocabulary.num_bytes(tokens[1:])
    bpc = bits_per_character(loss.mean)
    return Evaluation(
        step=trained.step,
        bpc=bpc,
        bits_per_byte=bpc if num_bytes == loss.count else bpc * loss.count / num_bytes,
        num_bytes=num_bytes,
        context=experiment.data.context,
        stride=experiment.evaluation_stride,
        seconds=round(time.perf_counter() - began, 1),
    )


def append_evaluation(file: Path, trained: TrainedModel, result: Evaluation) -> None:
    """Appends a line with the result, the time, the data's hash and the commit.

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
    append_row(file, row)


def parser(description: str, prog: str) -> Arguments:
    """Returns the command line that ``evaluate`` and ``test`` share."""
    p = Arguments(prog=prog, description=description)
    p.add_argument("run", help="a run's folder, for instance runs/quickstart")
    p.add_checkpoint_options("best")
    p.add_argument(
        "--stride", type=int, default=0, help="new characters a window predicts; 0: the run's own"
    )
    return p


def checked_stride(stride: int, experiment: ExperimentConfig) -> int:
    """Returns the given stride, or the run's own for 0.

    Raises:
      UserError: the stride is negative or longer than the context.
    """
    if not 0 <= stride <= experiment.data.context:
        raise UserError(
            f"--stride must be from 1 to the run's context ({experiment.data.context}), or 0 for "
            f"the run's own; got {stride}"
        )
    return stride or experiment.evaluation_stride


def program(argv: Sequence[str]) -> None:
    """Runs the program with the arguments of its command line."""
    options = parser(__doc__ or "", "python -m train evaluate").parse_args(argv[1:])
    start_jax(cpu_devices=num_cores())
    trained = load(options.run, which=options.checkpoint, data_path=options.data_path)
    stride = checked_stride(options.stride, trained.experiment)
    result = evaluate(trained, trained.corpus.tokens("validation"), stride=stride)
    log = trained.run.path / EVALUATIONS
    print(f"validation {result}")
    append_evaluation(log, trained, result)
    send_back(log, options.run, trained.experiment.mirror_dir)
