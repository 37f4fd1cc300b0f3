"""Handles SIGTERM: the program finishes and saves the current dispatch, then ends.

A machine that is taken away sends SIGTERM and some seconds later SIGKILL: spot and preemptible
machines, maintenance of Cloud TPUs, the end of a SLURM or Kubernetes job. In a run of one process a
handler notes the signal. In a run of several, JAX's preemption service notes it in any process and
names one step for all, after which every process stops: if they stopped at different steps, they
would wait for each other forever.
"""

import signal
import threading
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils


class Preemption:
    """A context manager that notes SIGTERM and says whether the run must stop."""

    def __init__(self) -> None:
        """No signal has been received yet."""
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
        """Whether to stop at ``step``; the answer is the same in every process.

        Args:
          before: the step of the last call, or the first step of this start.
          step: number of finished optimizer steps.
        """
        if not self._shared:
            return self._told
        # JAX names the step to stop at, counting by ones: that a step of this dispatch is the one
        # is what all processes can agree on.
        told = [multihost_utils.reached_preemption_sync_point(s + 1) for s in range(before, step)]
        return any(told)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._told = True
