"""A trace of chosen steps: what it holds, and that it changes nothing."""

import gzip
import json

import jax
import pytest
import small_runs

from train import loop
from train.errors import UserError
from train.profiling import Profiler, TracedSteps
from train.run import create_or_resume


def run(experiment, corpus, profile):
    folder = create_or_resume(experiment, corpus)
    try:
        return loop.train(experiment, corpus, folder, show_progress=False, profile=profile)
    finally:
        folder.close()


def traced_steps(file):
    """The steps at which traced dispatches end, as the profile that TensorBoard reads has them."""
    events = [
        event
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes
        for line in plane.lines
        for event in line.events
        if event.name == "train"
    ]
    return sorted(dict(event.stats)["step_num"] for event in events)


@pytest.mark.filterwarnings("ignore:builtin type event_stats")  # of JAX 0.12's reader of profiles
def test_a_trace_holds_the_chosen_steps_and_changes_nothing(tmp_path):
    corpus = small_runs.write_corpus(tmp_path / "corpus")
    outcomes = {
        name: run(small_runs.tiny_experiment(corpus.folder, tmp_path / name), corpus, span)
        for name, span in (("plain", None), ("traced", TracedSteps(6, 13)))
    }
    assert not (tmp_path / "plain" / "profile").exists()
    (file,) = (tmp_path / "traced").glob("profile/plugins/profile/*/*.xplane.pb")
    assert traced_steps(file) == [10, 15]  # dispatches of five steps: 6..10 and 11..15
    with gzip.open(file.parent / "perfetto_trace.json.gz") as opened:
        events = json.load(opened)["traceEvents"]
    marked = [event["args"]["step_num"] for event in events if event.get("name") == "train"]
    assert sorted(marked, key=int) == ["10", "15"]

    small_runs.assert_equal_trees(outcomes["plain"].state, outcomes["traced"].state)
    logs = [(tmp_path / name / "metrics.jsonl").read_text(encoding="utf-8") for name in outcomes]
    assert logs[0] == logs[1]


def test_processes_that_share_a_run_folder_have_traces_of_their_own(tmp_path, monkeypatch):
    """JAX names a trace by host and second, and two processes of a host can end in the same."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for process in (0, 1):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        profiler = Profiler(tmp_path, TracedSteps(0, 5))
        with profiler.dispatch(0, 5):
            result = jax.numpy.ones(3)
        assert profiler.after(5, result) == tmp_path / "profile" / f"process_{process}"
    for file in ("*.xplane.pb", "perfetto_trace.json.gz"):
        found = tmp_path.glob(f"profile/process_*/plugins/profile/*/{file}")
        assert sorted(path.relative_to(tmp_path).parts[1] for path in found) == [
            "process_0",
            "process_1",
        ]


def test_a_trace_under_way_is_ended_with_the_run(tmp_path):
    profiler = Profiler(tmp_path, TracedSteps(0, 10))
    with profiler.dispatch(0, 5):
        result = jax.numpy.ones(3)
    assert profiler.after(5, result) is None
    profiler.close()
    assert list(tmp_path.glob("profile/plugins/profile/*/perfetto_trace.json.gz"))
    with profiler.dispatch(5, 10):  # there is no second trace
        pass
    assert profiler.after(4, result) is None


def test_a_run_that_resumes_beyond_the_chosen_steps_traces_no_others(tmp_path):
    profiler = Profiler(tmp_path, TracedSteps(3, 10))
    for before in (10, 15):
        with profiler.dispatch(before, before + 5):
            result = jax.numpy.ones(3)
        assert profiler.after(before + 5, result) is None
    assert not list(tmp_path.iterdir())
    # Resumed among them, it traces what is left.
    profiler = Profiler(tmp_path, TracedSteps(3, 10))
    with profiler.dispatch(5, 10):
        result = jax.numpy.ones(3)
    assert profiler.after(10, result) == tmp_path / "profile"


@pytest.mark.parametrize("text", ["20", "20:", "b:c", "-5:5", "20:20", "90:101"])
def test_a_span_outside_the_run_is_refused(text):
    with pytest.raises(UserError, match="--profile"):
        TracedSteps.parse(text, 100)
    assert TracedSteps.parse("0:100", 100) == TracedSteps(0, 100)
