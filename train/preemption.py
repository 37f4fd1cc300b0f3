"""SIGTERM and SIGINT as notices: the step under way is finished and saved, then the program ends.

A machine that is taken away sends SIGTERM and some seconds later SIGKILL: spot and preemptible
machines, maintenance of Cloud TPUs, SLURM's and Kubernetes' ends of a job. SIGINT is the user's
Ctrl-C. In a run of one process a handler notes them. In a run of many, JAX's own service notes
SIGTERM in whichever process it comes to and names one step, the same for all, after which every
process stops: stopping at different steps they would wait for each other for ever. There SIGINT is
handed on as SIGTERM.
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


class Preemption:
    """Whether the run has been told to stop; a context manager that takes the signals meanwhile."""

    def __init__(self) -> None:
        """Nothing has been told, but for a Ctrl-C that something swallowed since the start."""
        self._told = interruptions.came
        self._by = signal.SIGINT if self._told else signal.SIGTERM
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
        return self

    def __exit__(self, *_: object) -> None:
        self._leaving.close()

    def _take(self, number: signal.Signals) -> None:
        self._leaving.callback(signal.signal, number, signal.signal(number, self._note))

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

    def stopped(self, step: int) -> TryAgain:
        """What to raise when ``step``, where ``reached`` said to stop, is saved."""
        kind = Interrupted if self._by == signal.SIGINT else TryAgain
        return kind(
            f"stopped by {self._by.name} after step {step}, which is saved; the same command goes "
            f"on from there",
            everywhere=True,
        )

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._told, self._by = True, signal.Signals(number)
        if self._shared:
            os.kill(os.getpid(), signal.SIGTERM)
