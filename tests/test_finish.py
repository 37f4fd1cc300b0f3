"""What a finished run leaves, against numbers worked out by hand, and the clock of its metrics."""

import dataclasses
import json
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from small_runs import ALPHABET, text_of, tiny_experiment

from train import finish, metrics
from train.metrics import Metrics, read_rows
from train.run import open_run


@pytest.mark.parametrize(
    ("arm", "parameters", "flops"),
    [
        # 12 x 8 angles, kernels of 2 x 2 x 2 x 8, 8 gates, 2 temperatures, a readout of 17 x 12.
        # Products: scores of 16 reals and values of 32, for 8.5 tokens on average, and the readout
        # of 16 x 12; two operations each, three times in training.
        ("fsn", 96 + 64 + 8 + 2 + 204, 6 * (8.5 * 16 + 8.5 * 32 + 192)),
        # Embedding and readout of 12 x 8, four and three matrices of 8 x 8, three norms of 8.
        ("transformer", 2 * 96 + 7 * 64 + 3 * 8, 6 * (7 * 64 + 8.5 * 16 + 96)),
    ],
)
def test_the_summary_of_a_run(finished_arms, arm, parameters, flops):
    """30 steps of 16 windows of 16 characters; 299 of the 300 of validation are predicted."""
    folder = finished_arms[arm]
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    seconds = sum(row["seconds"] for row in read_rows(folder / "timing.jsonl"))
    characters = 30 * 16 * 16
    assert (summary["steps"], summary["characters"]) == (30, characters)
    assert summary["parameters"] == parameters
    assert summary["training_flops"] == flops * characters
    assert summary["seconds"] == pytest.approx(seconds, abs=0.051)
    assert summary["characters_per_second"] == pytest.approx(characters / seconds, abs=0.51)
    validation = summary["validation"]
    assert (validation["bytes"], validation["context"], validation["stride"]) == (299, 16, 16)


def test_a_summary_is_of_all_starts_and_of_no_step_after_the_last(
    corpus, tmp_path, monkeypatch, capsys
):
    """Of a made-up log, whose loss was not finite at first and lowest in the middle."""
    losses = {10: float("nan"), 20: 1.0, 30: 2.0, 40: 1.5, 50: 0.5}
    rows = [
        {"kind": "validation", "step": step, "loss": loss, "bpc": 2 * loss, "bytes": 70 + step}
        for step, loss in losses.items()
    ]
    timing = [
        {"step": 10, "seconds": 2.5},
        {"step": 25, "seconds": 1.46},
        {"step": 40, "seconds": 1.16},
    ]
    for name, log in (("metrics.jsonl", rows), ("timing.jsonl", timing)):
        (tmp_path / name).write_text(
            "".join(json.dumps(row) + "\n" for row in log), encoding="utf-8"
        )
    monkeypatch.setattr(finish, "loss_curve", lambda *_: None)
    monkeypatch.setattr(finish, "_sample", lambda *_: b"a sample")
    finish.finish(
        tiny_experiment(corpus.folder, tmp_path, evaluation__stride=4),
        corpus,
        SimpleNamespace(path=tmp_path, metrics=tmp_path / "metrics.jsonl", writes=True),
        SimpleNamespace(state=SimpleNamespace(params={}), step=40, ended_early=True),
    )
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    # 40 x 256 characters in 5.12 s.
    assert (summary["steps"], summary["characters"], summary["ended_early"]) == (40, 10240, True)
    assert (summary["seconds"], summary["characters_per_second"]) == (5.1, 2000)
    assert summary["validation"] == {
        "bpc": 3.0,
        "best_bpc": 2.0,
        "best_step": 20,
        "bytes": 110,
        "context": 16,
        "stride": 4,
    }
    assert (tmp_path / "sample.txt").read_bytes() == b"a sample"
    # The run ended early, so its best checkpoint is what counts: the default of the programs.
    assert f"train evaluate {tmp_path}     (the whole split)" in capsys.readouterr().out


def test_a_model_that_has_diverged_leaves_its_prompt(whole, corpus, capsys):
    folder, state = whole
    diverged = jax.tree.map(lambda leaf: leaf * np.nan, state.params)
    written = finish._sample(open_run(folder).read_config(), corpus, diverged)
    assert written == text_of(300, 1)[:64]
    assert "warning: the sample is its prompt alone" in capsys.readouterr().err


def test_a_sample_goes_on_from_the_beginning_of_the_validation_split(whole, corpus, monkeypatch):
    monkeypatch.setattr(finish, "SAMPLE_LENGTH", 8)
    folder, state = whole
    experiment = open_run(folder).read_config()
    prompt = text_of(300, 1)[:64]
    texts = [
        finish._sample(dataclasses.replace(experiment, seed=seed), corpus, state.params)
        for seed in (0, 1)
    ]
    for text in texts:
        assert text[:64] == prompt
        assert len(text) == 64 + 8 and {*text} <= {*ALPHABET}
    assert texts[0] != texts[1]


def test_the_clock_leaves_out_what_is_no_training(tmp_path, monkeypatch):
    now = 100.0
    clock = SimpleNamespace(perf_counter=lambda: now, time=time.time)
    monkeypatch.setattr(metrics, "time", clock)
    log = Metrics(
        tmp_path, resume_step=20, num_steps=60, characters_per_step=50, show_progress=False
    )
    now = 107.0
    log.leave_out(3.0)  # an evaluation
    log.timing(40)
    now = 108.0
    log.timing(40)  # no step since: its second is of the next row
    now = 112.0
    log.timing(50)
    log.close()
    # 20 steps of 50 characters in 7 s less 3; 10 in 5 s.
    assert read_rows(tmp_path / "timing.jsonl") == [
        {"step": 40, "seconds": 4.0, "characters_per_second": 250.0},
        {"step": 50, "seconds": 5.0, "characters_per_second": 100.0},
    ]
