"""The loop: exact resumption, rows, the run's folder, evaluation, one compilation."""

import logging
import math
import re
import subprocess
from types import SimpleNamespace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_runs
from small_runs import (
    ALPHABET,
    BATCH,
    CONTEXT,
    TINY_FSN,
    assert_equal_trees,
    mesh_of,
    rows_of,
    run_to_the_end,
    text_of,
    tiny_config,
    tiny_experiment,
    write_corpus,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fsn_jax import FSN
from fsn_jax.hub import build_model
from train import plan, provenance
from train.data.corpus import Corpus
from train.data.windows import WindowOrder
from train.errors import UserError
from train.evaluate import Evaluator
from train.finish import finish
from train.loop import DivergedError
from train.mesh import replicated
from train.metrics import RowLog, append_row, read_rows
from train.old_settings import read_experiment
from train.optimizer import learning_rate
from train.plan import check_devices, cpu_devices, parts_of_batch
from train.run import RunFolder, open_run
from train.step import make_evaluate_rows


@pytest.mark.parametrize(
    ("batch_size", "evaluation", "accumulation", "num_cores", "devices"),
    [
        (16, 32, 0, 6, 4),
        (16, 32, 0, 64, 16),
        (16, 32, 8, 64, 2),
        (15, 32, 0, 8, 1),
        (12, 9, 0, 8, 3),
    ],
)
def test_a_cpu_is_divided_as_far_as_its_batches_are(
    tmp_path, batch_size, evaluation, accumulation, num_cores, devices
):
    experiment = tiny_experiment(
        tmp_path,
        tmp_path / "run",
        training__batch_size=batch_size,
        training__accumulation_steps=accumulation,
        evaluation__batch_size=evaluation,
    )
    assert cpu_devices(experiment, num_cores) == devices
    check_devices(experiment, devices)


@pytest.mark.parametrize(
    ("accumulation", "context", "parts"),
    [(0, 128, 4), (0, 256, 8), (0, 1024, 8), (0, 64, 2), (4, 128, 4)],
)
def test_a_batch_goes_through_a_cpu_in_parts_of_some_hundred_tokens(
    tmp_path, accumulation, context, parts
):
    experiment = tiny_experiment(
        tmp_path,
        tmp_path / "run",
        training__batch_size=16,
        training__accumulation_steps=accumulation,
        data__context=context,
    )
    assert parts_of_batch(experiment, mesh_of(2)) == parts


class Crash(Exception):
    """What the machine does to a run in these tests."""


def crash_at_evaluation(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Lets `number` evaluations pass and stops the run in the next one."""
    passed = 0
    evaluate = Evaluator.__call__

    def failing(self: Evaluator, *args: Any, **kwargs: Any) -> tuple[float, int]:
        nonlocal passed
        passed += 1
        if passed > number:
            raise Crash
        return evaluate(self, *args, **kwargs)

    monkeypatch.setattr(Evaluator, "__call__", failing)


# Resumption


@pytest.mark.parametrize(
    ("crash_after", "resumed_from", "changes"),
    [
        (1, 10, {}),  # in the evaluation of step 20: saved at 10
        (2, 20, {}),
        (0, 0, {}),  # before anything was saved
        (2, 15, {"checkpoints__every": 15}),  # a save between two rows; rows after it are redone
        pytest.param(1, 10, {"data__placement": "host"}, marks=pytest.mark.slow),
    ],
    ids=["at_20", "at_30", "unsaved", "between_rows", "host"],
)
def test_an_interrupted_run_ends_as_if_it_had_not_been(
    corpus, whole, tmp_path, crash_after, resumed_from, changes
):
    experiment = tiny_experiment(corpus.folder, tmp_path / "run", **changes)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Crash):
        crash_at_evaluation(patch, crash_after)
        run_to_the_end(experiment, corpus)
    outcome = run_to_the_end(experiment, corpus)
    folder, state = whole
    assert outcome.resumed_from == resumed_from
    assert_equal_trees(jax.device_get(outcome.state), state)
    metrics = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert metrics == (folder / "metrics.jsonl").read_bytes()


def test_rows_left_by_a_crash_are_cut_back(corpus, whole, tmp_path):
    """Rows beyond the checkpoint, and half a line: what a kill between two writes leaves."""
    experiment = tiny_experiment(corpus.folder, tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Crash):
        crash_at_evaluation(patch, 1)
        run_to_the_end(experiment, corpus)
    metrics = tmp_path / "run" / "metrics.jsonl"
    kept = metrics.read_text(encoding="utf-8")
    assert [row["step"] for row in read_rows(metrics)] == [10, 10, 20]
    with metrics.open("a", encoding="utf-8") as file:
        file.write(kept.splitlines()[-1].replace('"step": 20', '"step": 25') + '\n{"kind": "tra')
    run_to_the_end(experiment, corpus)
    assert metrics.read_bytes() == (whole[0] / "metrics.jsonl").read_bytes()


def test_a_finished_run_started_again_does_nothing(corpus, whole):
    folder, state = whole
    unchanged = ["metrics.jsonl", "timing.jsonl", "provenance.json", "parameters.txt"]
    before = {name: (folder / name).read_bytes() for name in unchanged}
    outcome = run_to_the_end(tiny_experiment(corpus.folder, folder), corpus)
    assert (outcome.resumed_from, outcome.step) == (30, 30)
    assert_equal_trees(jax.device_get(outcome.state), state)
    assert {name: (folder / name).read_bytes() for name in unchanged} == before


def test_settings_that_do_not_touch_the_numbers_may_change(corpus, whole):
    folder, _ = whole
    changed = tiny_experiment(corpus.folder, folder, data__placement="host", checkpoints__keep=5)
    assert run_to_the_end(changed, corpus).resumed_from == 30
    assert open_run(folder).read_config() == changed
    run_to_the_end(tiny_experiment(corpus.folder, folder), corpus)  # and back


# Rows and files


def test_each_row_is_there_once_and_says_what_it_should(whole):
    folder, _ = whole
    train, validation = rows_of(folder, "train"), rows_of(folder, "validation")
    assert [row["step"] for row in train] == [10, 20, 30]
    assert [row["step"] for row in validation] == [10, 20, 30]
    windows = (4000 - CONTEXT) // CONTEXT
    for row in train:
        assert row["characters"] == row["step"] * BATCH * CONTEXT
        assert row["epoch"] == pytest.approx(row["step"] * BATCH / windows, abs=1e-6)
        assert row["bpc"] == pytest.approx(row["loss"] / math.log(2))
        assert row["grad_norm"] > 0 and row["skipped"] == 0
    assert all(row["bytes"] == 299 for row in validation)
    assert validation[0]["loss"] > validation[-1]["loss"] > 0
    assert len({row["loss"] for row in train}) == 3


def test_the_last_step_has_a_row_and_every_step_a_time(corpus, tmp_path):
    """Also when the steps are no multiple of log_every, and a crash has come between two rows."""

    def experiment(name, **changes):
        changes = {"training__num_steps": 25, "checkpoints__every": 15, **changes}
        return tiny_experiment(corpus.folder, tmp_path / name, **changes)

    run_to_the_end(experiment("every_dispatch", training__log_every=5), corpus)
    run_to_the_end(experiment("run"), corpus)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Crash):
        crash_at_evaluation(patch, 1)
        run_to_the_end(experiment("crashed"), corpus)
    assert run_to_the_end(experiment("crashed"), corpus).resumed_from == 15

    rows = rows_of(tmp_path / "run", "train")
    assert [row["step"] for row in rows] == [10, 20, 25]
    by_dispatch = rows_of(tmp_path / "every_dispatch", "train")
    assert rows[-1] == by_dispatch[-1]  # of steps 21 to 25
    for column in ("loss", "grad_norm"):
        mean = (by_dispatch[0][column] + by_dispatch[1][column]) / 2
        assert rows[0][column] == pytest.approx(mean, rel=1e-5)
    for name in ("run", "crashed"):
        assert read_rows(tmp_path / name / "metrics.jsonl") == read_rows(
            tmp_path / "run" / "metrics.jsonl"
        )
        timed = read_rows(tmp_path / name / "timing.jsonl")
        assert [row["step"] for row in timed] == [10, 15, 20, 25]


def test_the_learning_rate_of_a_row_is_that_of_its_last_step(whole):
    folder, _ = whole
    turned = [(step - 1 - 3) / (30 - 3) for step in (10, 20, 30)]
    expected = [1e-2 * (0.1 + 0.9 * (1 + math.cos(math.pi * x)) / 2) for x in turned]
    found = [row["learning_rate"] for row in rows_of(folder, "train")]
    assert found == pytest.approx(expected, rel=1e-5)


def test_the_config_comes_back_from_its_file(corpus, whole):
    folder, _ = whole
    text = (folder / "config.json").read_text(encoding="utf-8")
    assert read_experiment(text) == tiny_experiment(corpus.folder, folder)


def test_the_provenance_tells_what_ran_on_what(corpus, whole):
    [start] = open_run(whole[0]).read_provenance()
    assert start["implementation"] == "auto"  # a CPU has one path
    assert start["step"] == 0
    assert start["data"] == {
        "name": "text",
        "folder": corpus.folder.name,
        "sha256": corpus.sha256,
        "vocabulary": 12,
    }
    assert start["device"].startswith("8 x cpu")
    assert start["packages"]["jax"] == jax.__version__
    assert set(start["git"]) == {"commit", "modified", "diff_sha256"}
    assert start["command"] and start["python"] and start["time"]


def test_the_state_of_git_has_bytes_of_any_kind_and_new_modules(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "train" / "provenance.py"))
    for folder in ("train", "results"):
        (tmp_path / folder).mkdir()
    (tmp_path / "train" / "one.py").touch()
    assert provenance.git_state() == {"commit": None, "modified": None, "diff_sha256": None}
    by = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "core.hooksPath=none"]
    for command in (["init", "-q"], ["add", "."], [*by, "commit", "-qm", "a"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    (tmp_path / "results" / "a.py").touch()
    (tmp_path / "notes.txt").touch()
    clean = provenance.git_state()
    assert len(clean["commit"]) == 40 and clean["modified"] is False
    assert clean["diff_sha256"] is None
    states = []
    for name, content in (("one.py", b"# \xe9"), ("two \xe9.py", b""), ("two \xe9.py", b"1")):
        (tmp_path / "train" / name).write_bytes(content)
        states.append(provenance.git_state())
    assert all(state["modified"] for state in states)
    assert len({state["diff_sha256"] for state in states}) == 3


def test_the_parameter_table_adds_up(whole):
    head, *lines = (whole[0] / "parameters.txt").read_text(encoding="utf-8").splitlines()
    assert head.split() == ["parameter", "shape", "size"]
    sizes = [int(line.split()[-1].replace(",", "")) for line in lines]
    assert lines[-1].startswith("total")
    assert sum(sizes[:-1]) == sizes[-1] == TINY_FSN.num_params()
    assert lines[0].split()[0] == "block_0/attention/kernel_imag"


def test_tensorboard_shows_what_the_rows_say(whole):
    folder, _ = whole
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    for kind in ("train", "validation"):
        shown = [(event.step, event.value) for event in events.Scalars(f"{kind}/bpc")]
        rows = [(row["step"], row["bpc"]) for row in rows_of(folder, kind)]
        np.testing.assert_allclose(shown, rows, rtol=1e-6)
    assert {"train/loss", "train/learning_rate", "train/grad_norm"} <= set(events.Tags()["scalars"])


def test_a_log_without_its_last_half_line_is_read(tmp_path):
    log = tmp_path / "rows.jsonl"
    log.write_text('{"step": 1}\n{"step": 2}\n{"st', encoding="utf-8")
    assert read_rows(log) == [{"step": 1}, {"step": 2}]
    again = RowLog(log, resume_step=1)
    again.write({"step": 2, "again": True})
    again.close()
    assert read_rows(log) == [{"step": 1}, {"step": 2, "again": True}]


@pytest.mark.parametrize("bad", [b'{"st', b"\xff", b"", b'{"st{"step": 3}', b"[]"])
def test_a_damaged_line_is_named_and_no_row_after_it_is_lost(tmp_path, bad):
    """Only the last line can be one that a crash cut short."""
    log = tmp_path / "rows.jsonl"
    log.write_bytes(b'{"step": 1}\n' + bad + b'\n{"step": 3}\n')
    before = log.read_bytes()
    for reader in (read_rows, lambda path: RowLog(path, resume_step=3)):
        with pytest.raises(UserError, match=r"rows\.jsonl cannot be read \(line 2: .*restore"):
            reader(log)
    assert log.read_bytes() == before
    log.write_bytes(b'{"step": 1}\n' + bad + b"\n")
    with pytest.raises(UserError, match="line 2"):
        read_rows(log)


def test_a_finished_run_without_its_log_is_a_users_mistake(corpus, tmp_path):
    experiment = tiny_experiment(corpus.folder, tmp_path)
    outcome = SimpleNamespace(state=SimpleNamespace(params={}), step=30)
    with (
        (tmp_path / "lock").open("w", encoding="utf-8") as lock,
        pytest.raises(UserError, match=r"metrics\.jsonl has no evaluation .* step 30; restore"),
    ):
        finish(experiment, corpus, RunFolder(tmp_path, lock), outcome)


@pytest.mark.parametrize(
    ("before", "kept"),
    [(None, []), ("", []), ('{"a": 1}\n', [1]), ('{"a": 1}', [1]), ('{"a": 1}\n{"a', [1])],
)
def test_a_row_is_appended_to_whatever_a_crash_left(tmp_path, before, kept):
    log = tmp_path / "rows.jsonl"
    if before is not None:
        log.write_text(before, encoding="utf-8")
    append_row(log, {"a": 2})
    append_row(log, {"a": 3})
    assert [row["a"] for row in read_rows(log)] == [*kept, 2, 3]


# Evaluation


forward = jax.jit(build_model(TINY_FSN).apply)


def log_probabilities(params: Any, tokens: np.ndarray) -> np.ndarray:
    """float64 [L, V] of one window, from the model's logits."""
    logits = forward({"params": params}, jnp.asarray(tokens, jnp.int32)[None])
    logits = np.asarray(logits[0], np.float64)
    highest = logits.max(-1, keepdims=True)
    return logits - highest - np.log(np.exp(logits - highest).sum(-1, keepdims=True))


@pytest.mark.parametrize("stride", [0, 5], ids=["stride_of_the_context", "short_stride"])
def test_evaluation_predicts_each_character_once(corpus, whole, tmp_path, stride):
    """Against a loop over positions, written from the words of the documentation alone."""
    params, text = whole[1].params, corpus.tokens("validation")[:60]
    experiment = tiny_experiment(corpus.folder, tmp_path, evaluation__stride=stride)
    step, last = stride or CONTEXT, len(text) - 1 - CONTEXT
    window_at: dict[int, np.ndarray] = {}
    total = 0.0
    for target in range(1, len(text)):
        # The first window that reaches the target; the last is moved back to end with the text.
        start = next(s for s in range(0, len(text), step) if s + CONTEXT >= target)
        start = min(start, last)
        if start not in window_at:
            window_at[start] = log_probabilities(params, text[start : start + CONTEXT])
        total -= window_at[start][target - 1 - start, text[target]]

    found = []
    for num_devices, batch_size in ((8, 8), (8, 16), (1, 3)):
        mesh = mesh_of(num_devices)
        one = tiny_experiment(
            corpus.folder, tmp_path, evaluation__stride=stride, evaluation__batch_size=batch_size
        )
        rows = make_evaluate_rows(build_model(TINY_FSN), mesh=mesh)
        evaluated = Evaluator(one, rows, mesh, text)(jax.device_put(params, replicated(mesh)))
        assert evaluated.count == len(text) - 1
        found.append(evaluated.mean)
    assert found[0] == pytest.approx(total / (len(text) - 1), rel=1e-6)
    assert found == pytest.approx([found[0]] * 3, rel=1e-7)
    assert experiment.evaluation_stride == step


def test_a_model_that_knows_nothing_needs_log2_of_the_vocabulary(corpus, whole, tmp_path):
    params = {**whole[1].params, "readout": jax.tree.map(np.zeros_like, whole[1].params["readout"])}
    rows = make_evaluate_rows(build_model(TINY_FSN), mesh=mesh_of(8))
    experiment = tiny_experiment(corpus.folder, tmp_path)
    evaluated = Evaluator(experiment, rows, mesh_of(8), corpus.tokens("validation"))(params)
    assert evaluated.mean / math.log(2) == pytest.approx(math.log2(len(ALPHABET)), rel=1e-6)


def test_copy_events_are_the_characters_that_go_on_a_repetition(corpus, whole, tmp_path):
    """Their loss and number, against a search of each window for its longest repeated suffix."""
    experiment = tiny_experiment(corpus.folder, tmp_path, evaluation__copy_depth=2)
    text = np.random.default_rng(0).integers(0, 3, 8 * CONTEXT + 1).astype(np.uint8)
    params = whole[1].params
    rows = make_evaluate_rows(build_model(TINY_FSN), mesh=mesh_of(8))
    evaluated = Evaluator(experiment, rows, mesh_of(8), text)(params)
    total, count = 0.0, 0
    for first in range(0, len(text) - 1, CONTEXT):
        window = text[first : first + CONTEXT + 1]
        logits = log_probabilities(params, window[:-1])
        for t in range(CONTEXT):
            seen = [_common_suffix(window[: t + 1], window[: u + 1]) for u in range(t)]
            depth = max(seen, default=0)
            if depth >= 2 and window[t - seen[::-1].index(depth)] == window[t + 1]:
                total -= logits[t, window[t + 1]]
                count += 1
    assert evaluated.copy_count == count > 10
    assert evaluated.copy_mean == pytest.approx(total / count, rel=1e-5)


def _common_suffix(x, y):
    return next((n for n in range(len(y)) if x[-1 - n] != y[-1 - n]), len(y))


# Compilation and divergence


@pytest.mark.parametrize("placement", ["resident", "host"])
def test_the_step_is_compiled_once_in_a_run(corpus, tmp_path, monkeypatch, caplog, placement):
    for module, name in small_runs.MAKERS:  # as in a process of its own
        monkeypatch.setattr(module, name, getattr(module, name).__wrapped__)
    experiment = tiny_experiment(
        corpus.folder,
        tmp_path / "run",
        data__placement=placement,
        training__num_steps=20,
        evaluation__num_tokens=100,
    )
    with jax.log_compiles(), caplog.at_level(logging.WARNING, logger="jax"):
        run_to_the_end(experiment, corpus)
    compiled = re.findall(r"Finished XLA compilation of jit\((\w+)\)", caplog.text)
    assert compiled.count("train_steps") == 1
    assert compiled.count("local") == 1  # of evaluation
    assert compiled.count("init") == 1
    assert {row["bytes"] for row in rows_of(tmp_path / "run", "validation")} == {99}


class Poisoned(nn.Module):
    """An FSN whose loss is not finite where a batch holds the last letter of the alphabet."""

    config: Any

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        logits = FSN(self.config, name="fsn")(tokens)
        bad = (tokens == self.config.vocab_size - 1).any()
        return logits * jnp.where(bad, jnp.nan, 1.0)


BAD_STEP = 13


@pytest.fixture
def poisoned(tmp_path, monkeypatch) -> Corpus:
    """A corpus of which step 13 alone reads a letter that the model cannot bear."""
    monkeypatch.setattr(plan, "build_model", Poisoned)
    text = bytearray(text_of(12_000, alphabet=ALPHABET[:-1]))
    order = WindowOrder(len(text), CONTEXT, BATCH, seed=0)
    text[order.starts(BAD_STEP - 1)[4] + 5] = ALPHABET[-1]
    return write_corpus(
        tmp_path / "poisoned",
        train=bytes(text),
        validation=text_of(300, 1, ALPHABET[:-1]),
    )


def test_a_diverged_run_stops_and_says_where_it_was_good(poisoned, tmp_path):
    experiment = tiny_experiment(poisoned.folder, tmp_path / "run")
    with pytest.raises(DivergedError) as stopped:
        run_to_the_end(experiment, poisoned)
    assert str(stopped.value) == (
        "the loss or its gradient was not finite at step 13; the checkpoint of step 10 is good; "
        "lower config.optimizer.peak_learning_rate or config.optimizer.clip_norm in another "
        "--config.run_dir, or skip such steps with a higher config.training.skipped_limit"
    )
    # As the hint says: the same run skips the step.
    allowed = tiny_experiment(poisoned.folder, tmp_path / "run", training__skipped_limit=1)
    outcome = run_to_the_end(allowed, poisoned)
    assert outcome.resumed_from == 10
    rows = rows_of(tmp_path / "run", "train")
    assert [row["skipped"] for row in rows] == [0, 1, 1]
    rate = learning_rate(allowed.optimizer, 30)  # which waits for the skipped step
    expected = [float(rate(step)) for step in (9, 18, 28)]
    assert [row["learning_rate"] for row in rows] == pytest.approx(expected)
    assert int(outcome.state.tally.skipped) == 1
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(outcome.state.params))


def test_a_row_of_skipped_steps_alone_is_not_written(poisoned, tmp_path):
    """Its mean is of nothing, and a loss of zero would be a wrong one."""
    by_one = {"training__skipped_limit": 1, "training__steps_per_dispatch": 1}
    experiment = tiny_experiment(
        poisoned.folder, tmp_path / "run", training__log_every=1, training__num_steps=15, **by_one
    )
    run_to_the_end(experiment, poisoned)
    rows = rows_of(tmp_path / "run", "train")
    assert [row["step"] for row in rows] == [*range(1, 13), 14, 15]
    assert min(row["loss"] for row in rows) > 0
    assert [row["skipped"] for row in rows] == [0] * 12 + [1, 1]


def test_a_run_that_diverges_before_its_first_checkpoint_says_so(poisoned, tmp_path):
    experiment = tiny_experiment(poisoned.folder, tmp_path / "run", checkpoints__every=20)
    with pytest.raises(DivergedError, match="at step 13; no checkpoint was saved yet; lower"):
        run_to_the_end(experiment, poisoned)


def test_the_config_of_these_tests_is_a_locked_one(corpus, tmp_path):
    with pytest.raises(AttributeError, match="num_step"):
        tiny_config(corpus.folder, tmp_path).training.num_step = 3
