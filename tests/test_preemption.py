"""SIGTERM, SIGINT: the step is finished and saved, the next start resumes to the same bits."""

import os
import signal
import threading
from typing import Any

import jax
import pytest
import real_runs
from small_runs import assert_equal_trees, run_to_the_end, tiny_experiment

from train import loop, plan
from train.errors import EXIT_INTERRUPTED, EXIT_TRY_AGAIN, Interrupted, TryAgain
from train.interruption import interruptions
from train.metrics import read_rows
from train.preemption import Preemption
from train.program import run_program
from train.run import RunFolder, open_run


def signal_in_dispatch(
    patch: pytest.MonkeyPatch, number: int, sent: signal.Signals = signal.SIGTERM
) -> None:
    """Sends this process a signal while the dispatch of this number, from 1, is under way."""
    make, done = plan.make_train_steps, 0

    def made(*args: Any, **kwargs: Any) -> Any:
        train_steps = make(*args, **kwargs)

        def dispatched(*args: Any) -> Any:
            nonlocal done
            done += 1
            if done == number:
                os.kill(os.getpid(), sent)
            return train_steps(*args)

        return dispatched

    patch.setattr(plan, "make_train_steps", made)


@pytest.mark.parametrize("dispatch", [1, 2, 3], ids=["unsaved", "at_a_save", "between_rows"])
@pytest.mark.parametrize(
    ("sent", "status"), [(signal.SIGTERM, EXIT_TRY_AGAIN), (signal.SIGINT, EXIT_INTERRUPTED)]
)
def test_a_signal_saves_the_step_and_the_run_resumes_from_it(
    corpus, whole, tmp_path, dispatch, sent, status
):
    experiment = tiny_experiment(corpus.folder, tmp_path / "run")
    before = signal.getsignal(sent)
    with pytest.MonkeyPatch.context() as patch:
        signal_in_dispatch(patch, dispatch, sent)
        message = f"stopped by {sent.name} after step {5 * dispatch}, which is saved"
        with pytest.raises(TryAgain, match=message) as caught:
            run_to_the_end(experiment, corpus)
    assert caught.value.status == status
    assert signal.getsignal(sent) == before
    outcome = run_to_the_end(experiment, corpus)
    assert outcome.resumed_from == 5 * dispatch
    assert_equal_trees(jax.device_get(outcome.state), whole[1])
    metrics = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert metrics == (whole[0] / "metrics.jsonl").read_bytes()


def test_in_its_last_step_a_run_ends_as_usual(corpus, whole, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        signal_in_dispatch(patch, 6)
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


def test_an_interruption_that_was_swallowed_before_the_loop_stops_it(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(interruptions, "came", True)
    with pytest.raises(Interrupted, match="stopped by SIGINT after step 5, which is saved"):
        run_to_the_end(tiny_experiment(corpus.folder, tmp_path / "run"), corpus)


def test_one_that_was_swallowed_in_one_of_several_processes_stops_all(monkeypatch):
    """By the SIGTERM that JAX tells the others of."""
    sent = []
    monkeypatch.setattr(interruptions, "came", True)
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(os, "kill", lambda *sending: sent.append(sending))
    with Preemption():
        assert sent == [(os.getpid(), signal.SIGTERM)]


def test_a_run_tells_what_is_kept_of_it(corpus, tmp_path):
    run = RunFolder(tmp_path / "run")
    nothing = "no checkpoint is saved yet: the same command begins at step 0"
    assert run.kept() == nothing
    (run.checkpoints / "20.orbax-checkpoint-tmp").mkdir(parents=True)
    assert run.kept() == nothing
    for step in (5, 10):
        (run.checkpoints / str(step)).mkdir()
    assert run.kept() == "the checkpoint of step 10 is kept: the same command resumes from it"


def test_a_start_after_one_that_saved_nothing_says_that_it_begins_again(
    corpus, tmp_path, monkeypatch, capsys
):
    def crash(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError

    experiment = tiny_experiment(corpus.folder, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_batches", crash)
        with pytest.raises(ZeroDivisionError):
            run_to_the_end(experiment, corpus)
    assert "begins again" not in capsys.readouterr().out
    assert run_to_the_end(experiment, corpus).resumed_from == 0
    assert "no checkpoint of the run was saved before: it begins again at step 0" in (
        capsys.readouterr().out
    )


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
