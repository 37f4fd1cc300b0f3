"""Early stopping: when a run ends, what it keeps, and that a resumed run counts the same."""

import json
from unittest import mock

import jax
import pytest
from small_runs import (
    ALPHABET,
    assert_equal_trees,
    rows_of,
    run_to_the_end,
    text_of,
    tiny_experiment,
    write_corpus,
)
from test_loop import Crash, crash_at_evaluation

from train import finish, main
from train.checkpoint import Checkpoints
from train.load import load
from train.patience import Patience
from train.run import create_or_resume, open_run


def test_evaluations_are_counted_from_the_lowest_loss():
    patience = Patience(2)
    lowest, over = [], []
    for loss in (3.0, 2.0, 2.0, 1.9, float("nan"), 1.8, 1.9, 1.85):
        lowest.append(patience.add(loss))
        over.append(patience.is_over)
    assert lowest == [True, True, False, True, False, True, False, False]
    assert over == [False] * 7 + [True]
    never = Patience(0)
    assert [never.add(loss) for loss in (1.0, 2.0, 3.0)] == [True, False, False]
    assert not never.is_over


@pytest.fixture(scope="module")
def unlike(tmp_path_factory):
    """A corpus whose validation text is the less likely the more one learns of the other."""
    folder = tmp_path_factory.mktemp("unlike") / "corpus"
    texts = {"train": text_of(4000, alphabet=ALPHABET[:6])}
    texts["validation"] = text_of(300, 1, alphabet=ALPHABET[6:])
    return write_corpus(folder, **texts)


def experiment_of(corpus, folder, patience=2, **changes):
    return tiny_experiment(
        corpus.folder, folder, training__patience=patience, evaluation__every=5, **changes
    )


@pytest.fixture(scope="module")
def ended(unlike, tmp_path_factory):
    """The folder and the outcome of a run that ended early and was not interrupted."""
    folder = tmp_path_factory.mktemp("ended") / "run"
    return folder, run_to_the_end(experiment_of(unlike, folder), unlike)


def test_a_run_ends_when_its_loss_has_stopped_falling(unlike, ended):
    folder, outcome = ended
    assert (outcome.step, outcome.ended_early) == (15, True)
    losses = [row["loss"] for row in rows_of(folder, "validation")]
    assert len(losses) == 3 and losses[0] < min(losses[1:])
    assert int(outcome.state.step) == 15
    experiment = experiment_of(unlike, folder)
    with Checkpoints(folder / "checkpoints", experiment.checkpoints, read_only=True) as kept:
        assert (kept.best(), kept.latest()) == (5, 15)
    assert load(folder).step == 5  # what sample, evaluate, test and export take


@pytest.mark.parametrize(("passed", "resumed_from"), [(0, 0), (1, 5), (2, 10)])
def test_a_resumed_run_counts_as_an_uninterrupted_one(
    unlike, ended, tmp_path, passed, resumed_from
):
    experiment = experiment_of(unlike, tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Crash):
        crash_at_evaluation(patch, passed)
        run_to_the_end(experiment, unlike)
    outcome = run_to_the_end(experiment, unlike)
    assert (outcome.resumed_from, outcome.step, outcome.ended_early) == (resumed_from, 15, True)
    folder, whole = ended
    assert_equal_trees(jax.device_get(outcome.state), jax.device_get(whole.state))
    metrics = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert metrics == (folder / "metrics.jsonl").read_bytes()


def test_an_ended_run_resumes_with_more_patience(unlike, tmp_path, capsys):
    """First it says that it has ended and how to train on; then it is the run without an end."""
    folder = tmp_path / "run"
    run_to_the_end(experiment_of(unlike, folder), unlike)
    experiment = experiment_of(unlike, folder)
    before = (folder / "metrics.jsonl").read_bytes()
    again = run_to_the_end(experiment, unlike)
    assert (again.resumed_from, again.step, again.ended_early) == (15, 15, True)
    assert (folder / "metrics.jsonl").read_bytes() == before
    assert main.ending(experiment, again) == (
        "ended before, at step 15 of 30: no new lowest validation loss in 2 evaluations; to train "
        "on, start it with a higher --config.training.patience, or 0"
    )
    with (
        create_or_resume(experiment, unlike) as run,
        mock.patch.object(finish, "_sample", return_value=b"abc"),
    ):
        finish.finish(experiment, unlike, run, again)
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    assert summary["ended_early"] and summary["steps"] == 15
    assert summary["validation"]["best_step"] == 5

    unending = experiment_of(unlike, folder, patience=0)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Crash):
        crash_at_evaluation(patch, 0)
        run_to_the_end(unending, unlike)
    assert not (folder / "summary.json").exists()  # a run with a summary has ended
    outcome = run_to_the_end(unending, unlike)
    assert (outcome.resumed_from, outcome.step, outcome.ended_early) == (15, 30, False)
    assert open_run(folder).read_config() == unending
    whole = run_to_the_end(experiment_of(unlike, tmp_path / "whole", patience=0), unlike)
    assert_equal_trees(jax.device_get(outcome.state), jax.device_get(whole.state))
    metrics = (folder / "metrics.jsonl").read_bytes()
    assert metrics == (tmp_path / "whole" / "metrics.jsonl").read_bytes()
