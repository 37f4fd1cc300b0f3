"""Many processes as one run: the same numbers, one writer, and an end when one of them is gone."""

import re
import signal
import threading
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
import pytest
import real_runs
from jax.errors import JaxRuntimeError
from small_runs import SAME_LOSS, assert_equal_trees, largest_difference, rows_of

from train import main, processes, run
from train.errors import EXIT_TRY_AGAIN, EXIT_USER_ERROR, TryAgain, UserError
from train.flags import parse_options
from train.processes import Joining
from train.run import open_run

NUM_STEPS = 60
SETTINGS = {"training.num_steps": NUM_STEPS, "evaluation.every": 30, "data.placement": "host"}


def test_the_flags_say_how_the_processes_join():
    argv = ["train", "--config=x.py", "--coordinator=host:1234", "--num_processes=4"]
    joining, _, rest = parse_options([*argv, "--process_id=3", "--config.seed=1"])
    assert joining == Joining(False, "host:1234", 4, 3)
    assert rest == ["train", "--config=x.py", "--config.seed=1"]
    assert parse_options(["train", "--distributed"])[0] == Joining(distributed=True)
    assert parse_options(["train"]) == (Joining(), "", ["train"])


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--num_processes=2"], "--coordinator=HOST:PORT, --num_processes=N and --process_id=I"),
        (
            ["--coordinator=h:1", "--num_processes=2", "--process_id=2"],
            r"--process_id must be from 0 to --num_processes - 1 \(1\); got 2",
        ),
        (
            ["--coordinator=host", "--num_processes=2", "--process_id=0"],
            "--coordinator takes HOST:PORT, the port from 1 to 65535; got 'host'",
        ),
        (
            ["--coordinator=a..b:1", "--num_processes=2", "--process_id=1"],
            r"--coordinator takes HOST:PORT, .* got 'a\.\.b:1'",
        ),
        (["--num_processes=two"], "num_processes: invalid int value: 'two'"),
    ],
    ids=["incomplete", "out_of_range", "no_port", "no_host", "no_number"],
)
def test_flags_that_cannot_join_are_refused(flags, says):
    with pytest.raises(UserError, match=says):
        parse_options(["train", *flags])


def test_the_folder_of_process_0_may_be_seen_late(tmp_path, monkeypatch):
    """A network file system can remember for a while that it was not there."""
    monkeypatch.setattr(run, "SEEN_SECONDS", 0.2)
    with pytest.raises(UserError, match=r"of process 0 is not here: name one that all .* share"):
        run._open_beside(tmp_path)
    monkeypatch.setattr(run, "SEEN_SECONDS", 60.0)
    late = threading.Timer(0.2, (tmp_path / "config.json").touch)
    late.start()
    assert run._open_beside(tmp_path).path == tmp_path
    late.join()


RESET = "FAILED_PRECONDITION: Gloo AllReduce failed: Connection closed by peer [127.0.0.1]:4242"
LOSSES = [
    JaxRuntimeError(RESET),
    JaxRuntimeError("UNAVAILABLE: failed to connect to all addresses"),
    JaxRuntimeError("INTERNAL: NCCL operation ncclAllReduce failed: remote process exited"),
    ConnectionResetError(104, "Connection reset by peer"),
    TimeoutError("Timeout waiting at barrier 'save'. The original error raised was: INTERNAL"),
]
OTHERS = [
    KeyError("unavailable_tokens"),
    RuntimeError("no gloo in this build"),
    FileNotFoundError(2, "No such file or directory", "runs/nccl/config.json"),
    JaxRuntimeError("INTERNAL: no rule for stablehlo.optimization_barrier"),
    JaxRuntimeError("INVALID_ARGUMENT: the barrier was passed before"),
    JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory in nccl"),
    JaxRuntimeError("UNIMPLEMENTED: gloo has no such collective"),
    JaxRuntimeError("INTERNAL: out of memory"),
    UserError("no source gave enwik8 (Connection refused)"),
    TryAgain("stopped by SIGTERM, a heartbeat ago", everywhere=True),
]


@pytest.mark.parametrize("error", [*LOSSES, *OTHERS], ids=repr)
def test_only_what_a_lost_process_causes_is_taken_for_one(monkeypatch, error):
    """A bug keeps its traceback, a mistake its own words, though they sound like a connection."""
    assert processes.loss_of_a_process(error) is None
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    lost = processes.loss_of_a_process(error)
    if error in OTHERS:
        assert lost is None
    else:
        assert isinstance(lost, TryAgain) and "another process of this run died" in str(lost)


def test_the_reason_for_a_loss_is_printed(monkeypatch, capsys):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(main, "parse_options", lambda argv: (Joining(), "", argv))
    for name in ("parse_config", "start_jax", "cpu_devices"):
        monkeypatch.setattr(main, name, lambda *_, **__: None)
    monkeypatch.setattr(main, "_train", mock.Mock(side_effect=JaxRuntimeError(RESET)))
    with pytest.raises(TryAgain, match="another process of this run died"):
        main.program(["train"])
    said = capsys.readouterr().err
    assert said.startswith("Traceback") and said.rstrip().endswith(RESET)


# Real processes


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> dict[str, Any]:
    corpus = tmp_path_factory.mktemp("data") / "corpus"
    return {**real_runs.corpus_settings(corpus), **SETTINGS}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("compiled")


def one_process(count: int, folder: Path, settings: dict[str, Any], compiled: Path) -> Path:
    """A run of the same global batch on as many devices in one process."""
    real_runs.ended(real_runs.started(folder, settings, devices=count, compiled=compiled))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("parameters", ["replicated", "sharded"])
def test_processes_train_as_one(tmp_path, settings, compiled, count, parameters):
    settings = {**settings, "training.layout": parameters}
    whole = one_process(count, tmp_path / "whole", settings, compiled)
    run = tmp_path / "run"
    for process in real_runs.started_together(count, run, settings, compiled=compiled):
        real_runs.ended(process)
    states = [real_runs.final_state(folder) for folder in (run, whole)]
    if count == 2:  # the sum of two terms has one order
        assert (run / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
        assert_equal_trees(*states)
    for kind in ("train", "validation"):
        steps, losses = (
            [[row[name] for row in rows_of(folder, kind)] for folder in (run, whole)]
            for name in ("step", "loss")
        )
        assert steps[0] == steps[1] and len(steps[0]) >= 2
        np.testing.assert_allclose(*losses, rtol=SAME_LOSS)
    assert largest_difference(states[0].params, states[1].params) < 1e-3
    [start] = open_run(run).read_provenance()
    assert start["processes"] == count
    assert start["device"].startswith(f"{count} x cpu")
    for name in ("summary.json", "sample.txt", "parameters.txt"):
        assert (run / name).is_file()


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1], ids=["the_writer", "another"])
def test_when_a_process_dies_the_others_say_so_and_the_run_resumes(
    tmp_path, settings, compiled, victim
):
    whole = one_process(2, tmp_path / "whole", settings, compiled)
    run = tmp_path / "run"
    processes = real_runs.started_together(2, run, settings, compiled=compiled)
    real_runs.wait_until(processes[0], lambda: (run / "checkpoints" / "20").is_dir())
    real_runs.killed(processes[victim])
    other = processes[1 - victim]
    _, errors = other.communicate(timeout=120)
    # JAX notices the loss of its coordinator, process 0, at the same moment and may be quicker to
    # end the process, by SIGABRT.
    assert other.returncode in (EXIT_TRY_AGAIN, -signal.SIGABRT), errors
    assert re.search(
        "another process of this run died or cannot be reached|another task died", errors
    )

    for process in real_runs.started_together(2, run, settings, compiled=compiled):
        real_runs.ended(process)
    assert open_run(run).read_provenance()[-1]["step"] >= 20
    assert (run / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert_equal_trees(real_runs.final_state(run), real_runs.final_state(whole))


@pytest.mark.slow
def test_sigterm_in_one_process_stops_all_at_the_same_step(tmp_path, settings, compiled):
    run = tmp_path / "run"
    settings = {**settings, "training.num_steps": 100_000}
    processes = real_runs.started_together(2, run, settings, compiled=compiled)
    real_runs.wait_until(processes[0], lambda: real_runs.last_step(run) >= 15)
    processes[1].send_signal(signal.SIGTERM)
    said = {real_runs.ended(p, EXIT_TRY_AGAIN).splitlines()[-1] for p in processes}
    [line] = said
    assert line.startswith("stopped by SIGTERM after step ")
    step = line.split(",")[0].split()[-1]
    assert (run / "checkpoints" / step).is_dir()


@pytest.mark.slow
def test_a_folder_in_use_is_refused_with_the_pid_and_host_of_its_user(tmp_path, settings, compiled):
    run = tmp_path / "run"
    settings = {**settings, "training.num_steps": 100_000}
    first = real_runs.started(run, settings, compiled=compiled)
    real_runs.wait_until(first, lambda: real_runs.last_step(run) >= 15)
    second = real_runs.started(run, settings, compiled=compiled)
    said = real_runs.ended(second, EXIT_USER_ERROR)
    assert f"is in use by process {first.pid} on " in said
    assert first.poll() is None
    real_runs.killed(first)

    # Two that were started as one run are refused as one.
    third = real_runs.started(run, settings, compiled=compiled)
    rows = real_runs.last_step(run)
    real_runs.wait_until(third, lambda: real_runs.last_step(run) != rows)
    for process in real_runs.started_together(2, run, settings, compiled=compiled):
        assert f"is in use by process {third.pid} on " in real_runs.ended(process, EXIT_USER_ERROR)
    real_runs.killed(third)


@pytest.mark.slow
def test_processes_that_differ_are_refused(tmp_path, settings, compiled):
    first, *_ = processes = real_runs.started_together(
        2, tmp_path / "run", settings, compiled=compiled
    )
    processes[1].kill()
    processes[1].communicate()
    flags = tuple(flag for flag in processes[1].args if re.match("--(coord|num_|process)", flag))
    other = real_runs.started(
        tmp_path / "run", {**settings, "seed": 5}, flags=flags, compiled=compiled
    )
    for process in (first, other):
        assert "must have the same settings" in real_runs.ended(process, EXIT_USER_ERROR)
