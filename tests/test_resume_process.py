"""A real run on enwik8, killed and started again by the same command, ends in the same bits."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from small_runs import assert_equal_trees, mesh_of

from train.checkpoint import Checkpoints
from train.metrics import read_rows
from train.optimizer import make_optimizer
from train.run import open_run
from train.step import TrainState, abstract_state, build_model

ROOT = Path(__file__).resolve().parent.parent
NUM_STEPS = 400
PATIENCE = 300  # seconds that a process may take to come to the next moment

SETTINGS = {
    "model.num_layers": 1,
    "model.num_phases": 16,
    "model.feedforward_width": 16,
    "data.context": 32,
    "training.batch_size": 8,
    "training.num_steps": NUM_STEPS,
    "training.steps_per_dispatch": 5,
    "training.log_every": 15,
    "evaluation.every": 40,
    "evaluation.num_bytes": 5_000,
    "evaluation.batch_size": 8,
    "checkpoints.every": 20,
}


def started(folder: Path) -> subprocess.Popen[bytes]:
    settings = [f"--config.{name}={value}" for name, value in SETTINGS.items()]
    command = ["train", "--config=configs/quickstart.py", f"--config.run_dir={folder}", *settings]
    return subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def finish(process: subprocess.Popen[bytes]) -> None:
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors.decode()


def kill_when(process: subprocess.Popen[bytes], moment: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not moment():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < end, "the run did not come to the moment to be killed at"
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def last_step(folder: Path) -> int:
    rows = read_rows(folder / "metrics.jsonl")
    return rows[-1]["step"] if rows else 0


def final_state(folder: Path) -> TrainState:
    run = open_run(folder)
    experiment = run.read_config()
    optimizer = make_optimizer(experiment.optimizer, NUM_STEPS)
    like = abstract_state(build_model(experiment.model), optimizer, mesh=mesh_of(1))
    with Checkpoints(run.checkpoints, experiment.checkpoints, read_only=True) as checkpoints:
        return checkpoints.restore(NUM_STEPS, like)


@pytest.mark.slow
def test_a_killed_run_ends_in_the_bits_of_one_that_was_not(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(started(whole))

    # In its first save: Orbax writes beside the final name, which is there only when all is.
    def saving() -> bool:
        return any((killed / "checkpoints").glob("*20*"))

    kill_when(started(killed), saving)
    moments = random.Random(0)
    reached = 0
    for _ in range(2):
        reached = moments.randrange(reached + 30, reached + 90)
        kill_when(started(killed), lambda step=reached: last_step(killed) >= step)
    assert last_step(killed) < NUM_STEPS
    finish(started(killed))

    starts = [start["step"] for start in open_run(killed).read_provenance()]
    assert len(starts) == 4
    assert starts[0] == 0 and starts[-1] > 0
    assert (killed / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert_equal_trees(final_state(killed), final_state(whole))
    assert (killed / "sample.txt").read_bytes() == (whole / "sample.txt").read_bytes()
