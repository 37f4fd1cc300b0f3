"""SIGTERM: the step is finished and saved, the next start goes on to the same bits."""

import os
import signal
import threading
from typing import Any

import jax
import pytest
import real_runs
from small_runs import assert_equal_trees, run_to_the_end, tiny_experiment

from train import loop
from train.errors import EXIT_TRY_AGAIN, TryAgain
from train.metrics import read_rows
from train.preemption import Preemption
from train.program import run_program
from train.run import open_run

pytestmark = pytest.mark.usefixtures("quick_compiles")


def terminate_in_dispatch(patch: pytest.MonkeyPatch, number: int) -> None:
    """Sends this process SIGTERM while the dispatch of this number, from 1, is under way."""
    make, done = loop.make_train_steps, 0

    def made(*args: Any, **kwargs: Any) -> Any:
        train_steps = make(*args, **kwargs)

        def dispatched(*args: Any) -> Any:
            nonlocal done
            done += 1
            if done == number:
                os.kill(os.getpid(), signal.SIGTERM)
            return train_steps(*args)

        return dispatched

    patch.setattr(loop, "make_train_steps", made)


@pytest.mark.parametrize("dispatch", [1, 2, 3], ids=["unsaved", "at_a_save", "between_rows"])
def test_a_run_told_to_stop_saves_its_step_and_goes_on_from_it(corpus, whole, tmp_path, dispatch):
    experiment = tiny_experiment(corpus.folder, tmp_path / "run")
    before = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        terminate_in_dispatch(patch, dispatch)
        with pytest.raises(TryAgain, match=f"after step {5 * dispatch}, which is saved"):
            run_to_the_end(experiment, corpus)
    assert signal.getsignal(signal.SIGTERM) == before
    outcome = run_to_the_end(experiment, corpus)
    assert outcome.resumed_from == 5 * dispatch
    assert_equal_trees(jax.device_get(outcome.state), whole[1])
    metrics = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert metrics == (whole[0] / "metrics.jsonl").read_bytes()


def test_in_its_last_step_a_run_ends_as_usual(corpus, whole, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        terminate_in_dispatch(patch, 6)
        outcome = run_to_the_end(tiny_experiment(corpus.folder, tmp_path / "run"), corpus)
    assert_equal_trees(jax.device_get(outcome.state), whole[1])


def test_the_exit_status_says_to_try_again(capsys):
    def program(argv):
        raise TryAgain("stopped\nby SIGTERM", everywhere=True)

    assert run_program(program, []) == EXIT_TRY_AGAIN == 75
    assert capsys.readouterr().err == "stopped by SIGTERM\n"


def test_outside_the_main_thread_no_handler_is_set():
    before = signal.getsignal(signal.SIGTERM)
    found = []

    def enter() -> None:
        with Preemption() as preemption:
            found.append((signal.getsignal(signal.SIGTERM), preemption.reached(0, 5)))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [(before, False)]


@pytest.mark.slow
def test_a_real_process_ends_with_status_75_and_its_step_saved(tmp_path):
    settings = {**real_runs.corpus_settings(tmp_path / "corpus"), "training.num_steps": 100_000}
    run = tmp_path / "run"
    process = real_runs.started(run, settings, compiled=tmp_path / "compiled")
    real_runs.wait_until(process, lambda: real_runs.last_step(run) >= 45)
    process.send_signal(signal.SIGTERM)
    said = real_runs.ended(process, EXIT_TRY_AGAIN).splitlines()[-1]
    assert said.startswith("stopped by SIGTERM after step ")
    saved = int(said.split(",")[0].split()[-1])
    assert saved >= 45 and (run / "checkpoints" / str(saved)).is_dir()
    assert max(row["step"] for row in read_rows(run / "metrics.jsonl")) <= saved

    process = real_runs.started(run, settings, compiled=tmp_path / "compiled")
    real_runs.wait_until(process, lambda: real_runs.last_step(run) > saved)
    real_runs.killed(process)
    assert open_run(run).read_provenance()[-1]["step"] == saved
