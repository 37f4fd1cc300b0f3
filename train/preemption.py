"""Handles SIGTERM and SIGINT: the program finishes and saves the current dispatch, then ends.

A machine that is taken away sends SIGTERM and some seconds later SIGKILL: spot and preemptible
machines, maintenance of Cloud TPUs, the end of a SLURM or Kubernetes job. SIGINT is the user's
Ctrl-C. In a run of one process a handler notes the signal. In a run of several, JAX's preemption
service notes SIGTERM in any process and names one step for all, after which every process stops: if
they stopped at different steps, they would wait for each other forever. There SIGINT is handed on
as SIGTERM.
"""

import contextlib
import os
import signal
import threading
from types import FrameType

import jax
from jax.experimental import multihost_utils

from train.errors import Interrupted, TryAgain
from train.interruption import interruptions


def end_with_stdin() -> None:
    """Takes the end of standard input for SIGTERM: the program that began this one has ended."""

    def watch() -> None:
        while os.read(0, 1024):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


class Preemption:
    """A context manager that notes SIGTERM and SIGINT and says whether the run must stop."""

    def __init__(self) -> None:
        """Takes over a Ctrl-C that came before, whose KeyboardInterrupt a library swallowed."""
        self._received = interruptions.came
        self._by = signal.SIGINT if self._received else signal.SIGTERM
        self._leaving = contextlib.ExitStack()
        # A second handler would take the place of JAX's; Python lets only the main thread set one.
        self._shared = jax.distributed.is_initialized()

    def __enter__(self) -> "Preemption":
        if threading.current_thread() is threading.main_thread():
            if not self._shared:
                self._take(signal.SIGTERM)
            if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
                self._leaving.enter_context(interruptions.noticed())
                self._take(signal.SIGINT)
        if self._shared and self._received:
            os.kill(os.getpid(), signal.SIGTERM)
        return self

    def __exit__(self, *_: object) -> None:
        self._leaving.close()

    def _take(self, number: signal.Signals) -> None:
        before = signal.signal(number, self._note)
        self._leaving.callback(signal.signal, number, before)

    def reached(self, before: int, step: int) -> bool:
        """Whether to stop at ``step``; the answer is the same in every process.

        Args:
          before: the step of the last call, or the first step of this start.
          step: number of finished optimizer steps.
        """
        if not self._shared:
            return self._received
        # JAX names the step to stop at, counting by ones: that a step of this dispatch is the one
        # is what all processes can agree on.
        reached = [
            multihost_utils.reached_preemption_sync_point(s + 1) for s in range(before, step)
        ]
        return any(reached)

    def stopped(self, step: int) -> TryAgain:
        """Returns the error to raise once the last step is saved."""
        kind = Interrupted if self._by == signal.SIGINT else TryAgain
        return kind(
            f"stopped by {self._by.name} after step {step}, which is saved; the same command "
            f"resumes from it",
            everywhere=True,
        )

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received, self._by = True, signal.Signals(number)
        if self._shared:
            os.kill(os.getpid(), signal.SIGTERM)
