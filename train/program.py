"""Runs programs: start-up of JAX, one-line errors, exit statuses."""

import argparse
import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from train import streams
from train.errors import (
    EXIT_FAILURE,
    EXIT_INTERRUPTED,
    EXIT_UNREAD,
    EXIT_USER_ERROR,
    TryAgain,
    UserError,
)
from train.interruption import interruptions

if TYPE_CHECKING:
    from train.processes import Joining


class Arguments(argparse.ArgumentParser):
    """An argument parser that reports mistakes in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Raises UserError."""
        raise UserError(f"{message}; see {self.prog} --help")

    def add_checkpoint_options(self, default: str) -> None:
        """Adds the options that choose a run's checkpoint and find its data; see ``load``."""
        self.add_argument(
            "--checkpoint", default=default, help=f"best, latest or a step; default: {default}"
        )
        self.add_argument(
            "--data_path", default="", help="where the run's data is, if it was moved"
        )


def run_program(program: Callable[[Sequence[str]], None], argv: Sequence[str]) -> int:
    """Runs a program and turns deliberate exceptions into one line on stderr and an exit status.

    Returns:
      0 at the end, 2 for a user's mistake, 75 after SIGTERM or the loss of a process (the same
      command resumes), 130 for Ctrl-C, 141 if the reader of the output has closed it.
    """
    try:
        program(argv)
        sys.stdout.flush()
        if reason := streams.lost():
            raise UserError(f"what was printed is lost ({reason}); the work itself is done")
    except UserError as error:
        return _end(f"error: {error}", EXIT_USER_ERROR, together=error.everywhere)
    except TryAgain as error:
        return _end(str(error), error.status, together=error.everywhere)
    except KeyboardInterrupt:
        return _interrupted()
    except Exception as error:
        if interruptions.came:  # what a library made of the KeyboardInterrupt
            return _interrupted()
        if isinstance(error, BrokenPipeError) and not _others_wait():
            # Python would complain once more when it flushes at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return EXIT_UNREAD
        if not _others_wait():
            raise
        return _end(traceback.format_exc(), EXIT_FAILURE, together=False)
    return 0


def num_cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _end(line: str, status: int, *, together: bool) -> int:
    with contextlib.suppress(OSError):  # what was printed before stands before the line in a log
        sys.stdout.flush()
    print(line, file=sys.stderr, flush=True)
    if not together and _others_wait():
        # Python would end JAX first, which waits for the other processes, which wait for this one
        # in a collective. Once its connections close they end as well.
        sys.stdout.flush()
        os._exit(status)
    return status


def _interrupted() -> int:
    status = _end(f"\n{interruptions.line}", EXIT_INTERRUPTED, together=False)
    if interruptions.listening:
        # Left in the middle of a compilation, XLA's threads can crash the interpreter's own end.
        sys.stdout.flush()
        os._exit(status)
    return status


def _others_wait() -> bool:
    """Whether this is one of several processes of a run."""
    if "jax" not in sys.modules:
        return False
    import jax

    return bool(jax.distributed.is_initialized() and jax.process_count() > 1)


def start_jax(joining: "Joining | None" = None, *, cpu_devices: int = 1) -> None:
    """Joins the other processes, finds the devices, and sets up the compilation cache.

    Compiled programs are kept in $JAX_COMPILATION_CACHE_DIR, or under ~/.cache/fsn_jax.

    Args:
      joining: how to find the other processes.
      cpu_devices: number of CPU devices, unless the user has set it or other processes share the
        CPU. One device a core is faster than products that XLA divides over cores.

    Raises:
      UserError: JAX finds no device, or the other processes cannot be joined.
    """
    import jax  # here, since to prepare or open a corpus takes none of it

    if joining is not None:
        from train.processes import join

        join(joining)

    chosen = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    alone = not jax.distributed.is_initialized()
    if cpu_devices > 1 and alone and not chosen and jax.config.values["jax_num_cpu_devices"] < 1:
        with contextlib.suppress(RuntimeError):  # a program that called us has begun with them
            jax.config.update("jax_num_cpu_devices", cpu_devices)
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        with contextlib.suppress(RuntimeError):  # without a home folder nothing is kept
            folder = Path("~/.cache/fsn_jax/compiled").expanduser()
            jax.config.update("jax_compilation_cache_dir", str(folder))
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        platforms = os.environ.get("JAX_PLATFORMS") or "any platform"
        reason = str(error) or "no such backend"
        raise UserError(
            f"JAX finds no device for {platforms} ({reason}); correct or unset "
            f"JAX_PLATFORMS, or install the package's cuda or tpu extra"
        ) from None
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise UserError(
            f"this is one of {jax.process_count()} processes of a slice: train in each of them "
            f"with --distributed, and run any other program with JAX_PLATFORMS=cpu"
        )
    if jax.process_count() > 1:
        from train.processes import together

        # Connects them while all are here: on CPUs the first exchange waits 30 s for the others at
        # most, and later ones as long as they need.
        together(lambda: None)
