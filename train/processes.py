"""Many processes as one run: how they join, agree, fail together, and notice that one is gone.

Each process drives its own devices; the mesh goes over all of them. Process 0 alone writes the
run's folder, which all of them must see.
"""

import dataclasses
import hashlib
import re
import socket
import time
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from train.errors import TryAgain, UserError

T = TypeVar("T")

HEARTBEAT_SECONDS = 60  # without a sign of life a process counts as dead
JOINING_SECONDS = 300
LEAVING_SECONDS = 300  # the others wait so long for process 0 to write its last files and copy
_MESSAGE_BYTES = 2048

# What JAX raises when a process is gone, and what Orbax makes of it (a TimeoutError).
_KINDS_OF_LOSS = (jax.errors.JaxRuntimeError, ConnectionError, TimeoutError)
_SIGNS_OF_LOSS = (
    "closed by peer",
    "connection reset",
    "connection refused",
    "connection closed",
    "broken pipe",
    "socket closed",
    "gloo",
    "nccl",
    "unavailable",
    "deadline_exceeded",
    "heartbeat",
    "coordination service",
    "barrier",
)
# Not where a sign is part of a name, as in optimization_barrier.
_SIGN_OF_LOSS = re.compile("|".join(f"(?<![-_]){sign}" for sign in _SIGNS_OF_LOSS))
# How errors begin that would come again, whatever they say of collectives.
_OWN_FAULTS = ("INVALID_ARGUMENT", "RESOURCE_EXHAUSTED", "UNIMPLEMENTED")


@dataclasses.dataclass(frozen=True)
class Joining:
    """How this process finds the others, as the command line says it.

    Attributes:
      distributed: whether there are others.
      coordinator: host:port of process 0; empty where JAX can find out (Cloud TPU, SLURM, MPI).
      num_processes: how many there are; -1 where JAX can find out.
      process_id: which one this is, from 0; -1 where JAX can find out.
    """

    distributed: bool = False
    coordinator: str = ""
    num_processes: int = -1
    process_id: int = -1

    def __post_init__(self) -> None:
        given = (bool(self.coordinator), self.num_processes != -1, self.process_id != -1)
        if any(given) and not all(given):
            raise UserError(
                "--coordinator=HOST:PORT, --num_processes=N and --process_id=I belong together; "
                "on Cloud TPU and under SLURM leave out all three and give --distributed"
            )
        if all(given) and not 0 <= self.process_id < self.num_processes:
            raise UserError(
                f"--process_id must be from 0 to --num_processes - 1 ({self.num_processes - 1}); "
                f"got {self.process_id}"
            )
        if self.coordinator:
            host, _, port = self.coordinator.rpartition(":")
            try:
                host.encode("idna")  # as a look-up of the name does
            except UnicodeError:
                host = ""
            if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
                raise UserError(
                    f"--coordinator takes HOST:PORT, the port from 1 to 65535; got "
                    f"{self.coordinator!r}"
                )


def join(joining: Joining) -> None:
    """Joins the other processes; to be called before JAX finds its devices.

    Raises:
      UserError: it cannot be found out which processes there are, or they do not answer.
    """
    if not (joining.distributed or joining.coordinator):
        return
    if joining.coordinator and joining.process_id > 0:
        _await_coordinator(joining.coordinator)
    try:
        jax.distributed.initialize(
            coordinator_address=joining.coordinator or None,
            num_processes=joining.num_processes if joining.coordinator else None,
            process_id=joining.process_id if joining.coordinator else None,
            initialization_timeout=JOINING_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=LEAVING_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"the processes cannot join ({error}); outside Cloud TPU and SLURM give "
            f"--coordinator=HOST:PORT --num_processes=N --process_id=I"
        ) from error


def _await_coordinator(address: str) -> None:
    """Waits for process 0, without which JAX would end this one with a stack trace."""
    host, _, port = address.rpartition(":")
    end = time.monotonic() + JOINING_SECONDS
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise UserError(
                    f"process 0 does not answer at --coordinator={address} ({error}); start every "
                    f"process within {JOINING_SECONDS} s of each other"
                ) from None
            time.sleep(0.2)


def together(work: Callable[[], T]) -> T:
    """Does ``work`` in every process; if it fails for one of them, it fails for all.

    Raises:
      UserError: what the first process that failed said.
    """
    if jax.process_count() == 1:
        return work()
    result: T | None = None
    failure = ""
    try:
        result = work()
    except UserError as error:
        failure = str(error) or "failed"
    padded = np.zeros(_MESSAGE_BYTES, np.uint8)
    encoded = np.frombuffer(failure.encode()[:_MESSAGE_BYTES], np.uint8)
    padded[: encoded.size] = encoded
    for index, row in enumerate(multihost_utils.process_allgather(padded)):
        if said := row[row != 0].tobytes().decode(errors="replace"):
            shared = UserError(said if index == 0 else f"process {index}: {said}")
            shared.everywhere = True
            raise shared
    return result  # type: ignore[return-value]


def first_does(work: Callable[[], T]) -> T | None:
    """Does ``work`` in process 0 alone; the others wait, and fail if it fails.

    Returns:
      What ``work`` returns; None in the other processes.
    """
    return together(lambda: work() if jax.process_index() == 0 else None)


def agree(**facts: str) -> None:
    """Checks that every process has the facts of process 0.

    Raises:
      UserError: a process has others; the message names what differs.
    """

    def check() -> None:
        for name, fact in facts.items():
            digest = np.frombuffer(hashlib.sha256(fact.encode()).digest(), np.uint8)
            if (multihost_utils.broadcast_one_to_all(digest) != digest).any():
                differing.append(name)
        if differing:
            raise UserError(
                f"the processes of a run must have the same {differing[0].replace('_', ' ')}, and "
                f"this one has another than process 0: start all of them by the same command"
            )

    differing: list[str] = []
    together(check)


def loss_of_a_process(error: BaseException) -> TryAgain | None:
    """Returns the error to raise if another process was lost; None if ``error`` is not a sign.

    Only errors of collectives and connections can be one, so that a bug does not start the run
    again and again.
    """
    if jax.process_count() == 1 or not isinstance(error, _KINDS_OF_LOSS):
        return None
    text = str(error)
    if text.startswith(_OWN_FAULTS) or not _SIGN_OF_LOSS.search(text.lower()):
        return None
    return TryAgain(
        f"another process of this run died or cannot be reached any more "
        f"({' '.join(str(error).split())[:200]}); start all of them again by the same command: "
        f"the run resumes from its last checkpoint",
        everywhere=False,
    )
