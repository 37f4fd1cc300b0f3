"""SIGTERM as a notice: the step under way is finished and saved, then the program ends.

A machine that is taken away sends SIGTERM and some seconds later SIGKILL: spot and preemptible
machines, maintenance of Cloud TPUs, SLURM's and Kubernetes' ends of a job. In a run of one process
a handler notes it. In a run of many, JAX's own service notes it in whichever process it comes to
and names one step, the same for all, after which every process stops: stopping at different steps
they would wait for each other for ever.
"""

import signal
import threading
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils


class Preemption:
    """Whether the run has been told to stop; a context manager that takes SIGTERM meanwhile."""

    def __init__(self) -> None:
        """Nothing has been told."""
        self._told = False
        self._before: Any = None
        # A second handler would take the place of JAX's; Python lets only the main thread set one.
        self._shared = jax.distributed.is_initialized()
        self._listens = not self._shared and threading.current_thread() is threading.main_thread()

    def __enter__(self) -> "Preemption":
        if self._listens:
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._listens:
            signal.signal(signal.SIGTERM, self._before)

    def reached(self, before: int, step: int) -> bool:
        """Whether to stop at ``step``, having come from ``before``; the same in every process.

        Args:
          before: the step that the last call named, or where this start began.
          step: optimizer steps done.
        """
        if not self._shared:
            return self._told
        # JAX names the step to stop at, counting by ones: that a step of this dispatch is the one
        # is what all processes can agree on.
        told = [multihost_utils.reached_preemption_sync_point(s + 1) for s in range(before, step)]
        return any(told)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._told = True
