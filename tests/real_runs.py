"""Real training processes on a small corpus, for tests of what happens to processes."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from small_runs import mesh_of, text_of, write_corpus

from fsn_jax.hub import build_model
from train.checkpoint import Checkpoints
from train.metrics import read_rows
from train.optimizer import make_optimizer
from train.run import open_run
from train.step import TrainState, abstract_state

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 300  # seconds that a process may take to come to the next moment

SETTINGS: Mapping[str, Any] = {
    "model.num_layers": 1,
    "model.num_phases": 16,
    "model.feedforward_width": 16,
    "data.context": 32,
    "training.batch_size": 8,
    "training.num_steps": 400,
    "training.steps_per_dispatch": 5,
    "training.log_every": 15,
    "evaluation.every": 40,
    "evaluation.num_tokens": 5_000,
    "evaluation.batch_size": 8,
    "checkpoints.every": 20,
}


def corpus_settings(folder: Path) -> dict[str, Any]:
    """A made-up corpus in ``folder`` and the settings that name it."""
    write_corpus(folder, train=text_of(60_000), validation=text_of(6_000, 1))
    return {"data.name": "text", "data.path": folder, "model.vocab_size": 0}


def started(
    folder: Path,
    settings: Mapping[str, Any],
    *,
    compiled: Path | None = None,
    flags: tuple[str, ...] = (),
    devices: int = 1,
    prefix: tuple[str, ...] = (),
) -> subprocess.Popen[str]:
    """``python -m train`` on the run folder ``folder``; ``prefix`` comes before ``python``."""
    named = [f"--config.{name}={value}" for name, value in {**SETTINGS, **settings}.items()]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    if compiled:
        environment |= {
            "JAX_COMPILATION_CACHE_DIR": str(compiled),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
    config = ["--config=configs/quickstart.py", f"--config.run_dir={folder}"]
    return subprocess.Popen(
        [*prefix, sys.executable, "-m", "train", *config, *named, *flags],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def started_together(
    count: int, folder: Path, settings: Mapping[str, Any], **options: Any
) -> list[subprocess.Popen[str]]:
    """As many processes of one run, of one device each, joined over the loopback interface."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    joining = (f"--coordinator=127.0.0.1:{port}", f"--num_processes={count}")
    return [
        started(folder, settings, flags=(*joining, f"--process_id={index}"), **options)
        for index in range(count)
    ]


def ended(process: subprocess.Popen[str], status: int = 0) -> str:
    """What the process wrote to stderr; it must end with ``status``."""
    try:
        _, errors = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        killed(process)
        raise
    assert process.returncode == status, f"status {process.returncode}: {errors}"
    return errors


def wait_until(process: subprocess.Popen[str], moment: Callable[[], bool]) -> None:
    """Returns at the moment, which must come while the process runs."""
    end = time.monotonic() + PATIENCE
    while not moment():
        if process.poll() is not None:
            raise AssertionError(f"the run ended before the moment: {process.communicate()[1]}")
        if time.monotonic() > end:
            killed(process)
            raise AssertionError("the run did not come to the moment")
        time.sleep(0.001)


def killed(process: subprocess.Popen[str]) -> None:
    """Kills a process that runs."""
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def last_step(folder: Path) -> int:
    """The step of the newest row of metrics."""
    rows = read_rows(folder / "metrics.jsonl")
    return rows[-1]["step"] if rows else 0


def final_state(folder: Path) -> TrainState:
    """The state after the last step, on one device."""
    run = open_run(folder)
    experiment = run.read_config()
    num_steps = experiment.training.num_steps
    optimizer = make_optimizer(experiment.optimizer, num_steps)
    like = abstract_state(build_model(experiment.model), optimizer, mesh=mesh_of(1))
    with Checkpoints(run.checkpoints, experiment.checkpoints, read_only=True) as checkpoints:
        return checkpoints.restore(num_steps, like)
