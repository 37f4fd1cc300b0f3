"""``--profile=FIRST:LAST``: a trace of some steps of a run, for TensorBoard and for Perfetto."""

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from train.errors import UserError

FOLDER = "profile"


@dataclasses.dataclass(frozen=True)
class Span:
    """The steps after ``first`` up to ``last``, widened to whole dispatches."""

    first: int
    last: int

    @classmethod
    def parse(cls, text: str, num_steps: int) -> "Span":
        """From ``FIRST:LAST``.

        Raises:
          UserError: it is not of that form, or not within a run of ``num_steps``.
        """
        match = re.fullmatch(r"(\d+):(\d+)", text)
        if not match:
            raise UserError(f"--profile takes FIRST:LAST, two steps such as 20:40; got {text!r}")
        first, last = int(match[1]), int(match[2])
        if not first < last <= num_steps:
            raise UserError(
                f"--profile={text}: the first step must be before the last, and the last at most "
                f"config.training.num_steps ({num_steps})"
            )
        return cls(first, last)


class Profiler:
    """Traces the dispatches of a span while a run goes by; does nothing without a span."""

    def __init__(self, run_folder: Path, span: Span | None):
        """The trace is written under ``<run folder>/profile``."""
        self.folder = run_folder / FOLDER
        self._span = span
        self._running = False

    @contextlib.contextmanager
    def dispatch(self, step: int) -> Iterator[None]:
        """Around the dispatch that ends at ``step``."""
        if self._span and not self._running and step > self._span.first:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # each Python call: slow, and drowns the rest
            jax.profiler.start_trace(
                str(self.folder), create_perfetto_trace=True, profiler_options=options
            )
            self._running = True
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield

    def after(self, step: int, result: Any) -> Path | None:
        """Ends the trace once the last step of the span has been computed, and tells where it is.

        Args:
          step: that the newest dispatch ended at.
          result: of that dispatch; waited for if the trace ends here.
        """
        if not self._span or not self._running or step < self._span.last:
            return None
        jax.block_until_ready(result)
        self.close()
        return self.folder

    def close(self) -> None:
        """Ends a trace that is under way; there is no second one."""
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
        self._span = None
