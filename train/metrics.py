"""Logs a run's metrics: ``metrics.jsonl``, ``timing.jsonl``, TensorBoard, a progress bar.

``metrics.jsonl`` holds nothing that depends on the clock, so an interrupted and resumed run leaves
the same bytes as an uninterrupted one. Times go to ``timing.jsonl``.
"""

import contextlib
import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from tqdm import tqdm

from train.errors import UserError
from train.files import write_atomically
from train.run_files import METRICS, TIMING
from train.spikes import find_spikes


def bits_per_character(nats: float) -> float:
    """Converts a cross entropy in nats per character to bits per character."""
    return nats / math.log(2)


@dataclasses.dataclass(frozen=True)
class SplitLoss:
    """Cross entropy over a split.

    Attributes:
      mean: nats per character.
      count: number of characters predicted.
      copy_mean: nats per copy event; None if there are none, or they are not evaluated.
      copy_count: number of copy events among the characters.
    """

    mean: float
    count: int
    copy_mean: float | None = None
    copy_count: int = 0


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Reads the rows of a JSONL file; skips a last line that a crash cut short.

    Raises:
      UserError: another line is damaged or no JSON object.
    """
    if not path.exists():
        return []
    *lines, unfinished = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(_row(line))
        except ValueError as error:
            raise UserError(
                f"{path} cannot be read (line {number}: {error}); restore the file from a copy, or "
                f"correct or remove that line"
            ) from None
    with contextlib.suppress(ValueError):
        rows.append(_row(unfinished))
    return rows


def _row(line: bytes) -> dict[str, Any]:
    row = json.loads(line.decode())
    if not isinstance(row, dict):
        raise ValueError("no JSON object")
    return row


def check_appendable(file: Path) -> None:
    """Raises UserError if no line can be appended to a file."""
    with _recording(file), file.open("ab"):
        pass


@contextlib.contextmanager
def _recording(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {file} ({error.strerror}); make it writable") from None


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Appends a row to a JSONL file, in place of a last line that a crash cut short.

    Raises:
      UserError: the file cannot be written.
    """
    with _recording(path), path.open("a+b") as file:
        file.seek(0)
        *_, unfinished = file.read().split(b"\n")
        try:
            json.loads(unfinished.decode() or "0")
        except ValueError:
            file.truncate(file.tell() - len(unfinished))
            unfinished = b""
        file.write(b"\n" * bool(unfinished) + _line(row).encode())


def warn_of_missing_rows(log: Path, step: int, every: Mapping[str, int]) -> None:
    """Prints a warning if a run's log ends before the checkpoint that the run resumes from.

    Args:
      log: the exact log of the run.
      step: of the checkpoint.
      every: number of steps between rows, by their kind.
    """
    newest = dict.fromkeys(every, 0)
    for row in read_rows(log):
        if row["kind"] in newest and row["step"] <= step:
            newest[row["kind"]] = row["step"]
    missing = [
        f"{kind} rows of steps {newest[kind] + 1} to {step - step % number}"
        for kind, number in every.items()
        if newest[kind] < step - step % number
    ]
    if missing:
        print(
            f"warning: {log} has no {' and no '.join(missing)}, though the checkpoint of step "
            f"{step} is there; a machine that stops hard can lose rows, and steps that were all "
            f"skipped have none",
            file=sys.stderr,
        )


class RowLog:
    """A JSONL file that is truncated to a step when a run resumes, then appended to."""

    def __init__(self, path: Path, *, resume_step: int):
        """Drops the rows after ``resume_step`` and opens the file."""
        kept = [row for row in read_rows(path) if row["step"] <= resume_step]
        write_atomically(path, "".join(_line(row) for row in kept))
        self._file: IO[str] = path.open("a", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        """Appends a row and hands it to the operating system."""
        self._file.write(_line(row))
        self._file.flush()

    def sync(self) -> None:
        """Waits until the rows are on disk, where a loss of power leaves them."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row) + "\n"


class Metrics:
    """Writes the metrics of a run and shows its progress."""

    def __init__(
        self,
        folder: Path,
        *,
        resume_step: int,
        num_steps: int,
        characters_per_step: int,
        show_progress: bool,
    ):
        """Opens the logs of a run that starts or resumes at ``resume_step``."""
        self._rows = RowLog(folder / METRICS, resume_step=resume_step)
        self._timing = RowLog(folder / TIMING, resume_step=resume_step)
        trained = [row["loss"] for row in read_rows(folder / METRICS) if row["kind"] == "train"]
        self._expected = trained[-1] if trained else None  # loss of the last row
        self._events = EventFileWriter(str(folder / "tensorboard"))
        self._characters_per_step = characters_per_step
        self._clock = time.perf_counter()
        self._bar = tqdm(
            total=num_steps,
            initial=resume_step,
            unit="step",
            disable=not show_progress,
            dynamic_ncols=True,
            mininterval=0.5,
            smoothing=0.1,
        )
        self._shown: dict[str, str] = {}
        self._clocked_step = resume_step

    def train(
        self,
        step: int,
        *,
        epoch: float,
        loss: float,
        grad_norm: float,
        learning_rate: float,
        skipped: int,
    ) -> None:
        """Records the means over the steps since the last multiple of ``log_every``."""
        row = {
            "kind": "train",
            "step": step,
            "characters": step * self._characters_per_step,
            "epoch": epoch,
            "loss": loss,
            "bpc": bits_per_character(loss),
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "skipped": skipped,
        }
        self._log(row)
        self._expected = loss
        self.timing(step)
        self._show(step, loss=f"{loss:.3f}", bpc=f"{row['bpc']:.3f}")

    def timing(self, step: int) -> None:
        """Records the time of the steps since this was last recorded, if there are any."""
        if step == self._clocked_step:
            return
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        speed = (step - self._clocked_step) * self._characters_per_step / max(seconds, 1e-9)
        self._clocked_step = step
        self._timing.write({"step": step, "seconds": seconds, "characters_per_second": speed})
        self._scalar("characters_per_second", speed, step)
        self._show(step, speed=f"{speed / 1e3:.1f}k/s")

    def validation(self, step: int, evaluated: SplitLoss, *, num_bytes: int) -> None:
        """Records an evaluation on ``num_bytes`` predicted bytes of the validation split."""
        bpc = bits_per_character(evaluated.mean)
        row = {
            "kind": "validation",
            "step": step,
            "characters": step * self._characters_per_step,
            "loss": evaluated.mean,
            "bpc": bpc,
            "bytes": num_bytes,
        }
        if evaluated.copy_mean is not None:
            row["copy_bpc"] = bits_per_character(evaluated.copy_mean)
            row["copies"] = evaluated.copy_count
            row["predicted"] = evaluated.count
        self._log(row)
        self._show(step, validation=f"{bpc:.3f}")

    def losses(self, before: int, losses: np.ndarray) -> None:
        """Records which of the steps after ``before`` have a loss far above the last row's."""
        for step, loss in find_spikes(self._expected, before, losses):
            expected = self._expected
            self._rows.write({"kind": "spike", "step": step, "loss": loss, "expected": expected})
            self.say(f"step {step}: the loss is {loss:.3f} nats after a mean of {expected:.3f}")

    def say(self, message: str) -> None:
        """Prints a line without disturbing the progress bar."""
        tqdm.write(message)

    def sync(self) -> None:
        """Waits until all rows are on disk; call it before a checkpoint is saved."""
        self._rows.sync()
        self._timing.sync()

    def leave_out(self, seconds: float) -> None:
        """Excludes time from the speed of the next row."""
        self._clock += seconds

    def close(self) -> None:
        """Closes all logs."""
        self._bar.close()
        self._rows.close()
        self._timing.close()
        self._events.close()

    def _log(self, row: dict[str, Any]) -> None:
        self._rows.write(row)
        for name, value in row.items():
            if name not in ("kind", "step", "bytes"):
                self._scalar(f"{row['kind']}/{name}", value, row["step"])

    def _scalar(self, tag: str, value: float, step: int) -> None:
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
        self._events.add_event(Event(wall_time=time.time(), step=step, summary=summary))

    def _show(self, step: int, **shown: str) -> None:
        self._shown |= shown
        self._bar.set_postfix(self._shown, refresh=False)
        self._bar.update(step - self._bar.n)


class Unwritten:
    """The metrics of a process that does not write: every method does nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        """Returns a function that does nothing."""
        return lambda *_, **__: None
