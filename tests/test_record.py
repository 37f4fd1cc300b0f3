"""Evidence of finished runs: what is copied, and which runs are refused."""

import json
import math
import struct
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import small_runs

from train import finish
from train.analysis import figures
from train.analysis.records import read_run
from train.errors import UserError
from train.record import EVIDENCE, IF_THERE, record


@pytest.fixture
def finished(tmp_path):
    """A run folder with every file that evidence is made of, and one that is not."""
    corpus = small_runs.write_corpus(tmp_path / "corpus")
    experiment = small_runs.tiny_experiment(corpus.folder, tmp_path / "run")
    folder = tmp_path / "run"
    folder.mkdir()
    for name in EVIDENCE:
        (folder / name).write_text(name, encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(experiment.to_dict()), encoding="utf-8")
    (folder / "loss.png").write_text("a picture", encoding="utf-8")
    set_git(folder, {"commit": "c0ffee", "modified": False})
    return folder


def set_git(folder, *states):
    starts = [{"step": 0, "git": git, "data": {"sha256": "da7a"}} for git in states]
    (folder / "provenance.json").write_text(json.dumps(starts), encoding="utf-8")


def test_copies_the_evidence_and_nothing_else(finished, tmp_path):
    for name in IF_THERE:
        (finished / name).write_text(name, encoding="utf-8")
    target = record(finished, tmp_path / "results")
    assert target == tmp_path / "results" / "tiny"
    assert sorted(p.name for p in target.iterdir()) == sorted((*EVIDENCE, *IF_THERE))
    for name in (*EVIDENCE, *IF_THERE):
        assert (target / name).read_bytes() == (finished / name).read_bytes()


@pytest.mark.parametrize("git", [{"modified": True}, {"modified": None}, {"commit": None}])
def test_refuses_code_that_no_commit_holds(finished, tmp_path, git):
    """Also if it was only resumed on such code."""
    clean = {"commit": "c0ffee", "modified": False}
    set_git(finished, clean, {**clean, **git})
    with pytest.raises(UserError, match="clean tree"):
        record(finished, tmp_path / "results")
    assert not (tmp_path / "results").exists()
    record(finished, tmp_path / "results", allow_modified=True)


def test_refuses_an_unfinished_run(finished, tmp_path):
    (finished / "summary.json").unlink()
    with pytest.raises(UserError, match="not finished"):
        record(finished, tmp_path / "results")


def test_a_record_is_whole_or_not_there(finished, tmp_path):
    (finished / "sample.txt").unlink()
    with pytest.raises(UserError, match="has no sample.txt"):
        record(finished, tmp_path / "results")
    assert not (tmp_path / "results").exists()
    (finished / "sample.txt").write_text("a sample", encoding="utf-8")
    target = record(finished, tmp_path / "results")
    assert list((tmp_path / "results").iterdir()) == [target]


def test_does_not_overwrite(finished, tmp_path):
    record(finished, tmp_path / "results")
    with pytest.raises(UserError, match="is there already"):
        record(finished, tmp_path / "results")


@pytest.mark.parametrize("below", [".", "results"])
def test_a_file_in_the_way_of_the_folder(finished, tmp_path, below):
    file = tmp_path / "file"
    file.write_text("kept", encoding="utf-8")
    with pytest.raises(UserError, match="--results=.*name another"):
        record(finished, file / below)
    assert file.read_text(encoding="utf-8") == "kept"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="without /proc")
def test_results_that_are_there_but_cannot_be_written(finished):
    with pytest.raises(UserError, match=r"--results=/proc cannot be written \(No such file"):
        record(finished, Path("/proc"))


def test_a_damaged_provenance_is_a_users_mistake(finished, tmp_path):
    (finished / "provenance.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="provenance.json cannot be read"):
        record(finished, tmp_path / "results")


def test_a_figure_of_another_kind_than_png_is_refused(finished, tmp_path):
    with pytest.raises(UserError, match="must be a file whose name ends in .png"):
        figures.program(["figures", str(finished), f"--output={tmp_path / 'x.xyz'}"])


@pytest.mark.parametrize(
    ("options", "size"),
    [([], (1050, 600)), (["--copies"], (1500, 600))],  # 7 or 10 by 4 inches of 150 dots
    ids=["losses", "copies"],
)
def test_a_figure_is_a_png(tmp_path, options, size):
    run = small_runs.write_record(tmp_path, "fsn")
    copies = {"kind": "validation", "step": 3, "characters": 9, "bpc": 2.0, "bytes": 99}
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as log:
        log.write(json.dumps({**copies, "copy_bpc": 1.0, "copies": 25}) + "\n")
    target = tmp_path / "new" / "figure.png"
    figures.program(["figures", str(run), f"--output={target}", *options])
    header = target.read_bytes()[:24]
    assert header.startswith(b"\x89PNG\r\n\x1a\n")
    assert struct.unpack(">II", header[16:]) == size


def test_a_figure_draws_a_curve_an_arm_and_a_band_where_there_are_seeds(tmp_path, monkeypatch):
    runs = [
        small_runs.write_record(tmp_path, "fsn", curve=(3.0, 2.0)),
        small_runs.write_record(tmp_path, "fsn", seed=1, curve=(4.0, 3.0)),
        small_runs.write_record(tmp_path, "transformer", curve=(5.0, 4.0)),
    ]
    drawn = []
    monkeypatch.setattr(figures.plt, "close", lambda figure: drawn.append(figure))
    figures.loss_curve(runs, tmp_path / "curve.png")
    (axes,) = drawn[0].axes
    lowest, highest = axes.get_ylim()
    assert lowest < 2.0 and highest > 5.0  # of all evaluations
    curves = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    assert curves["fsn, validation (2 seeds)"] == [3.5, 2.5]
    assert curves["transformer, validation"] == [5.0, 4.0]
    assert len(axes.collections) == 2  # the bands of training and validation, of one arm
    heights = axes.collections[1].get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == (2.0, 4.0)
    monkeypatch.undo()
    figures.plt.close(drawn[0])


@pytest.mark.parametrize("first", [math.nan, math.inf])
def test_an_evaluation_that_is_not_finite_does_not_stop_the_figure(tmp_path, first):
    run = small_runs.write_record(tmp_path, "fsn", curve=(first, 2.0))
    figures.loss_curve([run], tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 1000


def test_the_first_training_losses_do_not_set_the_scale(tmp_path, monkeypatch):
    run = small_runs.write_record(tmp_path, "fsn", curve=(3.0, 2.9))
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as log:
        log.write(json.dumps({"kind": "train", "step": 1, "characters": 1, "bpc": 9.0}) + "\n")
    drawn = []
    monkeypatch.setattr(figures.plt, "close", lambda figure: drawn.append(figure))
    figures.loss_curve([run], tmp_path / "curve.png")
    assert 3.0 < drawn[0].axes[0].get_ylim()[1] < 4.0
    monkeypatch.undo()
    figures.plt.close(drawn[0])


def test_a_training_loss_below_every_evaluation_is_in_the_figure(tmp_path, monkeypatch):
    run = small_runs.write_record(tmp_path, "fsn", curve=(3.0, 2.9))
    rows = [{"kind": "train", "step": 2, "characters": 2, "bpc": 1.0}]
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as log:
        log.writelines(json.dumps(row) + "\n" for row in rows)
    drawn = []
    monkeypatch.setattr(figures.plt, "close", lambda figure: drawn.append(figure))
    figures.loss_curve([run], tmp_path / "curve.png")
    assert drawn[0].axes[0].get_ylim()[0] < 1.0
    monkeypatch.undo()
    figures.plt.close(drawn[0])


def test_the_curve_of_copy_events_has_both_parts_of_the_loss(tmp_path, monkeypatch):
    run = small_runs.write_record(tmp_path, "fsn", curve=(3.0, 2.9))
    with pytest.raises(UserError, match="fsn did not evaluate copy events"):
        figures.copy_curve([run], tmp_path / "curve.png")
    rows = [
        {"kind": "validation", "step": 1, "characters": 10, "bpc": 2.0, "bytes": 100,
         "copy_bpc": 1.0, "copies": 25},
        {"kind": "validation", "step": 2, "characters": 20, "bpc": 1.5, "bytes": 100,
         "copy_bpc": 0.0, "copies": 25},
    ]  # fmt: skip
    (run / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
    )
    drawn = []
    monkeypatch.setattr(figures.plt, "close", lambda figure: drawn.append(figure))
    figures.copy_curve([run], tmp_path / "curve.png")
    copies, others = (axes.lines[0] for axes in drawn[0].axes)
    assert list(copies.get_ydata()) == [1.0, 0.0]
    assert list(others.get_ydata()) == pytest.approx([(200 - 25) / 75, 150 / 75])
    assert list(copies.get_xdata()) == [1e-5, 2e-5]
    # Of Unicode characters, fewer were predicted than bytes.
    (run / "metrics.jsonl").write_text(
        json.dumps({**rows[0], "predicted": 50}) + "\n", encoding="utf-8"
    )
    assert read_run(run).losses["others"] == {10: pytest.approx((100 - 25) / 25)}
    (run / "metrics.jsonl").write_text(
        json.dumps({**rows[0], "predicted": 25}) + "\n", encoding="utf-8"
    )
    figures.copy_curve([run], tmp_path / "copies_alone.png")
    monkeypatch.undo()
    figures.plt.close(drawn[0])


@pytest.mark.parametrize(
    ("name", "seed", "folder"),
    [("arm", 0, "arm"), ("arm", 2, "arm_seed2"), ("arm_seed2", 2, "arm_seed2")],
)
def test_seeds_have_records_of_their_own(finished, tmp_path, name, seed, folder):
    config = json.loads((finished / "config.json").read_text(encoding="utf-8"))
    (finished / "config.json").write_text(
        json.dumps({**config, "name": name, "seed": seed}), encoding="utf-8"
    )
    assert record(finished, tmp_path / "results").name == folder


@pytest.mark.parametrize(
    ("values", "prompt"), [(b" Teh", "The "), (b"\n!ab", "!"), (b"\x80\xff", "The ")]
)
def test_the_prompt_that_is_shown_is_of_the_corpus(values, prompt):
    corpus = mock.Mock()
    corpus.vocabulary.values = np.frombuffer(values, np.uint8)
    assert finish._prompt(corpus) == prompt
