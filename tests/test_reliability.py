"""Disks that are full or read-only, clocks that go back, losses that jump, two equal runs."""

import errno
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import real_runs
from small_runs import (
    ALPHABET,
    BATCH,
    CONTEXT,
    assert_equal_trees,
    rows_of,
    run_to_the_end,
    text_of,
    tiny_experiment,
    write_corpus,
)

from fsn_jax import FSN
from train import finish, loop, main, metrics, plan
from train import run as run_module
from train.analysis.records import read_run
from train.data import windows
from train.data.corpus import Corpus
from train.data.windows import WindowOrder
from train.errors import EXIT_USER_ERROR, UserError
from train.run import RunFolder, cannot_write, create_or_resume
from train.spikes import find_spikes


def assert_same_run(folder: Path, state: Any, whole: tuple[Path, Any]) -> None:
    assert_equal_trees(jax.device_get(state), whole[1])
    assert (folder / "metrics.jsonl").read_bytes() == (whole[0] / "metrics.jsonl").read_bytes()


def test_two_runs_of_one_config_are_the_same_bits(corpus, whole, tmp_path):
    outcome = run_to_the_end(tiny_experiment(corpus.folder, tmp_path / "run"), corpus)
    assert_same_run(tmp_path / "run", outcome.state, whole)


# Disks


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
def test_a_folder_that_cannot_be_written_is_reported_in_one_line(tmp_path, number):
    line = f"cannot write to the run folder {tmp_path} ({os.strerror(number)}); make room"
    said = f"RESOURCE_EXHAUSTED: Error writing\n  a file: {os.strerror(number)} [source locations]"
    for error in (OSError(number, "in any language"), ValueError(said)):
        assert str(cannot_write(RunFolder(tmp_path), error)).startswith(line)
    assert cannot_write(RunFolder(tmp_path), OSError(errno.ENOENT, "no such file")) is None
    assert cannot_write(RunFolder(tmp_path), ValueError("shapes differ")) is None


@pytest.mark.parametrize(("number", "taken"), [(errno.EWOULDBLOCK, False), (errno.ENOLCK, True)])
def test_a_folder_that_cannot_be_locked_is_used_with_a_warning(
    corpus, tmp_path, monkeypatch, capsys, number, taken
):
    def flock(file: Any, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(run_module.fcntl, "flock", flock)
    experiment = tiny_experiment(corpus.folder, tmp_path / "run")
    if not taken:
        with pytest.raises(UserError, match="run is in use by an unknown process"):
            create_or_resume(experiment, corpus)
        return
    with create_or_resume(experiment, corpus) as run:
        assert run.writes
    said = capsys.readouterr().err
    assert f"has no locks ({os.strerror(number)}): nothing keeps a second process" in said


def test_a_full_disk_under_the_lock_is_reported_and_frees_the_folder(corpus, tmp_path):
    experiment = tiny_experiment(corpus.folder, tmp_path / "run")
    full = mock.Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
    with mock.patch.object(os, "write", full), pytest.raises(UserError, match="No space") as caught:
        create_or_resume(experiment, corpus)
    assert str(caught.value).startswith(f"cannot write to the run folder {tmp_path / 'run'} (")
    create_or_resume(experiment, corpus).close()


def test_a_full_disk_when_the_run_ends_is_reported(corpus, whole, tmp_path, monkeypatch):
    shutil.copytree(whole[0], tmp_path / "run")
    full = mock.Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
    monkeypatch.setattr(finish, "loss_curve", full)
    monkeypatch.setattr(main, "open_experiment_corpus", lambda _: corpus)
    with pytest.raises(UserError, match="cannot write .*; the checkpoint of step 30 is kept"):
        main._train(tiny_experiment(corpus.folder, tmp_path / "run"), None)


def test_a_full_disk_is_reported_and_the_run_resumes_later(corpus, whole, tmp_path):
    experiment = tiny_experiment(corpus.folder, tmp_path / "run")
    write, written = metrics.RowLog.write, 0

    def failing(self: metrics.RowLog, row: dict[str, Any]) -> None:
        nonlocal written
        written += 1
        if written > 4:  # train, timing, validation; train of step 20
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, row)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics.RowLog, "write", failing)
        with pytest.raises(UserError, match="cannot write .*; the checkpoint of step 10 is kept"):
            run_to_the_end(experiment, corpus)
    outcome = run_to_the_end(experiment, corpus)
    assert outcome.resumed_from == 10
    assert_same_run(tmp_path / "run", outcome.state, whole)


@pytest.mark.slow
def test_a_limit_on_the_size_of_files_is_a_full_disk(tmp_path):
    """The first checkpoint does not fit; without the limit the same command resumes."""
    settings = real_runs.corpus_settings(tmp_path / "corpus")
    run, blocks = tmp_path / "run", 32  # of 512 bytes
    limited = ("sh", "-c", f'ulimit -f {blocks}; exec "$@"', "sh")
    # A cache of its own: the limit would cut short what other runs read.
    process = real_runs.started(run, settings, prefix=limited, compiled=tmp_path / "compiled")
    said = real_runs.ended(process, EXIT_USER_ERROR)
    assert "cannot write to the run folder" in said.splitlines()[-1]
    assert "File too large" in said.splitlines()[-1]
    assert "Traceback" not in said
    real_runs.ended(real_runs.started(run, settings))
    whole = tmp_path / "whole"
    real_runs.ended(real_runs.started(whole, settings))
    assert (run / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert_equal_trees(real_runs.final_state(run), real_runs.final_state(whole))


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of its own of one megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a file system can only be mounted by root, on Linux")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
def test_a_full_disk_stops_the_run_which_goes_on_when_there_is_room(tmp_path, small_disk):
    settings = real_runs.corpus_settings(tmp_path / "corpus")
    run, filler = small_disk / "run", small_disk / "filler"
    filler.write_bytes(bytes(700_000))
    said = real_runs.ended(real_runs.started(run, settings), EXIT_USER_ERROR)
    assert "cannot write to the run folder" in said.splitlines()[-1]
    assert "No space left on device" in said.splitlines()[-1]
    assert "Traceback" not in said
    filler.unlink()
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    real_runs.ended(real_runs.started(run, settings))
    whole = tmp_path / "whole"
    real_runs.ended(real_runs.started(whole, settings))
    assert (run / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert_equal_trees(real_runs.final_state(run), real_runs.final_state(whole))


@pytest.mark.slow
def test_a_read_only_disk_is_refused(tmp_path, small_disk):
    settings = real_runs.corpus_settings(tmp_path / "corpus")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    said = real_runs.ended(real_runs.started(small_disk / "run", settings), EXIT_USER_ERROR)
    assert said == (
        f"error: cannot write to the run folder {small_disk / 'run'} (Read-only file system); "
        f"choose another with --config.run_dir=FOLDER\n"
    )


# Losses of power


def test_rows_are_on_disk_before_the_checkpoint_of_their_step(corpus, tmp_path, monkeypatch):
    synced: dict[int, list[int]] = {}
    fsync, save = os.fsync, loop.Checkpoints.save
    logs = [tmp_path / "run" / name for name in ("metrics.jsonl", "timing.jsonl")]

    def watched(number: int) -> None:
        fsync(number)
        file = os.fstat(number)
        synced.setdefault(file.st_ino, []).append(file.st_size)

    def checked(self: Any, state: Any, step: int, *loss: float | None) -> None:
        for log in logs:
            file = log.stat()
            assert synced[file.st_ino][-1] == file.st_size > 0
        save(self, state, step, *loss)

    monkeypatch.setattr(os, "fsync", watched)
    monkeypatch.setattr(loop.Checkpoints, "save", checked)
    run_to_the_end(tiny_experiment(corpus.folder, tmp_path / "run"), corpus)
    for log in logs:  # when it was opened, and at each of three saves
        assert len(synced[log.stat().st_ino]) == 4


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        (0, ""),
        (1, "no validation rows of steps 21 to 30"),
        (2, "no train rows of steps 21 to 30 and no validation rows of steps 21 to 30"),
        (3, "no train rows of steps 21 to 30 and no validation rows of steps 11 to 30"),
        (6, "no train rows of steps 1 to 30 and no validation rows of steps 1 to 30"),
    ],
)
def test_rows_that_are_missing_at_a_resumption_are_named(
    corpus, whole, tmp_path, capsys, lost, said
):
    folder = tmp_path / "run"
    shutil.copytree(whole[0], folder)
    rows = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_bytes(b"".join(rows[: len(rows) - lost]))
    assert run_to_the_end(tiny_experiment(corpus.folder, folder), corpus).resumed_from == 30
    line = f"warning: {folder / 'metrics.jsonl'} has {said}, though the checkpoint of step 30 is"
    warned = capsys.readouterr().err
    assert warned.startswith(line) and warned.count("\n") == 1 if said else not warned


def test_a_checkpoint_between_rows_misses_none(tmp_path, capsys):
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"kind": "train", "step": 20}\n', encoding="utf-8")
    metrics.warn_of_missing_rows(log, 29, {"train": 10, "validation": 30})
    assert not capsys.readouterr().err
    metrics.warn_of_missing_rows(log, 30, {"train": 10, "validation": 60})
    assert "has no train rows of steps 21 to 30, though" in capsys.readouterr().err


# Clocks


def test_a_clock_that_goes_back_changes_nothing(corpus, whole, tmp_path, monkeypatch):
    began, calls = time.time(), 0

    def backwards() -> float:
        nonlocal calls
        calls += 1
        return began - 3600 * calls

    monkeypatch.setattr(time, "time", backwards)
    monkeypatch.setattr(time, "time_ns", lambda: int(backwards() * 1e9))
    outcome = run_to_the_end(tiny_experiment(corpus.folder, tmp_path / "run"), corpus)
    assert calls > 10
    assert_same_run(tmp_path / "run", outcome.state, whole)
    assert run_to_the_end(tiny_experiment(corpus.folder, tmp_path / "run"), corpus).step == 30


# Placement, judged before anything is made


def test_a_corpus_too_long_for_the_device_is_refused_before_the_run_folder(corpus, monkeypatch):
    experiment = tiny_experiment(corpus.folder, Path("unused"))
    monkeypatch.setattr(windows, "INT32_LIMIT", 4000)
    with pytest.raises(UserError, match="config.data.placement=resident takes corpora below 4000"):
        plan.check_experiment(experiment, corpus, 1)


# Losses and gradients


BAD_STEP = 13


class Struck(nn.Module):
    """An FSN that misbehaves where a batch holds the last letter of the alphabet."""

    config: Any

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        logits = FSN(self.config, name="fsn")(tokens)
        bad = (tokens == self.config.vocab_size - 1).any()
        return self.strike(logits, bad)

    def strike(self, logits: jax.Array, bad: jax.Array) -> jax.Array:
        raise NotImplementedError


class BadGradient(Struck):
    """The loss is as it was; the gradient of the root at zero is not finite."""

    def strike(self, logits: jax.Array, bad: jax.Array) -> jax.Array:
        return logits + jnp.sqrt(jnp.where(bad, 0.0 * logits, jnp.ones_like(logits))) - ~bad


class Confident(Struck):
    """The model is sure of itself, and so far off."""

    def strike(self, logits: jax.Array, bad: jax.Array) -> jax.Array:
        return logits * jnp.where(bad, 200.0, 1.0)


@pytest.fixture(scope="module")
def strange(tmp_path_factory) -> Corpus:
    """A corpus of which step 13 alone reads a letter that the model cannot bear."""
    text = bytearray(text_of(12_000, alphabet=ALPHABET[:-1]))
    order = WindowOrder(len(text), CONTEXT, BATCH, seed=0)
    text[order.starts(BAD_STEP - 1)[4] + 5] = ALPHABET[-1]
    return write_corpus(
        tmp_path_factory.mktemp("strange") / "corpus",
        train=bytes(text),
        validation=text_of(300, 1, ALPHABET[:-1]),
    )


def test_a_gradient_that_is_not_finite_is_counted_and_leaves_no_trace(
    strange, tmp_path, monkeypatch
):
    """Beyond the limit it stops the run, as a loss does: tests/test_loop.py."""
    monkeypatch.setattr(plan, "build_model", BadGradient)
    short = {"training__num_steps": 20, "training__skipped_limit": 1}
    outcome = run_to_the_end(tiny_experiment(strange.folder, tmp_path / "run", **short), strange)
    rows = rows_of(tmp_path / "run", "train")
    assert [row["skipped"] for row in rows] == [0, 1]
    assert int(outcome.state.tally.last_skipped) == BAD_STEP
    assert all(np.isfinite([row["loss"], row["grad_norm"]]).all() for row in rows)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(outcome.state.params))


def test_a_jump_of_the_loss_is_a_row_of_its_own(strange, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plan, "build_model", Confident)
    experiment = tiny_experiment(strange.folder, tmp_path / "run", training__num_steps=20)
    run_to_the_end(experiment, strange)
    [spike] = rows_of(tmp_path / "run", "spike")
    assert spike["step"] == BAD_STEP
    first, *_ = rows_of(tmp_path / "run", "train")
    assert spike["expected"] == first["loss"]
    assert spike["loss"] > 1.5 * first["loss"]
    assert f"step {BAD_STEP}: the loss is " in capsys.readouterr().out
    run = read_run(tmp_path / "run")
    assert len(run.losses["train"]) == 2 and sorted(run.clock) == list(run.losses["train"])


def test_only_what_stands_out_is_a_spike():
    losses = np.asarray([2.0, 2.9, 3.1, np.nan, np.inf, 9.0], np.float32)
    found = find_spikes(2.0, 100, losses)
    assert [step for step, _ in found] == [103, 106]
    assert find_spikes(None, 0, losses) == []
    small = np.asarray([0.05, 0.2], np.float32)  # five times the mean, and yet near
    assert [step for step, _ in find_spikes(0.01, 0, small)] == [2]
