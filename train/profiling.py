"""``--profile=FIRST:LAST``: a trace of some steps of a run, for TensorBoard and for Perfetto."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from train.errors import UserError


class TracedSteps(NamedTuple):
    """The steps after ``first`` up to ``last``, widened to whole dispatches."""

    first: int
    last: int

    @classmethod
    def parse(cls, text: str, num_steps: int) -> "TracedSteps":
        """Reads ``FIRST:LAST``.

        Raises:
          UserError: the text is not of that form, or not within a run of ``num_steps``.
        """
        match = re.fullmatch(r"(\d+):(\d+)", text)
        if not match or not int(match[1]) < int(match[2]) <= num_steps:
            raise UserError(
                f"--profile takes FIRST:LAST, two steps such as 20:40, the last at most "
                f"config.training.num_steps ({num_steps}); got {text!r}"
            )
        return cls(int(match[1]), int(match[2]))


class Profiler(contextlib.ExitStack):
    """Writes a trace of some steps to ``<run folder>/profile`` while a run goes by."""

    def __init__(self, run_folder: Path, traced: TracedSteps | None):
        """Traces nothing if ``traced`` is None."""
        super().__init__()
        self._folder = run_folder / "profile"
        if jax.process_count() > 1:  # JAX names traces by host and second
            self._folder /= f"process_{jax.process_index()}"
        self._traced, self._running = traced, False

    @contextlib.contextmanager
    def dispatch(self, before: int, step: int) -> Iterator[None]:
        """Marks the dispatch of the steps after ``before`` up to ``step``."""
        if self._traced and before >= self._traced.last:  # the run has resumed beyond them
            self._traced = None
        if self._traced and not self._running and self._traced.first < step:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # each Python call: slow, and drowns the rest
            self.enter_context(
                jax.profiler.trace(
                    str(self._folder), create_perfetto_trace=True, profiler_options=options
                )
            )
            self._running = True
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield

    def after(self, step: int, result: Any) -> Path | None:
        """Ends the trace if the dispatch that ended at ``step`` is its last; returns its folder.

        Args:
          step: last step of the newest dispatch.
          result: result of that dispatch, which is waited for.
        """
        if not self._traced or step < self._traced.last:
            return None
        jax.block_until_ready(result)
        self.close()
        self._traced = None
        return self._folder
