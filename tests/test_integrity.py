"""Damaged checkpoints: named, moved aside, the newest intact one used; never a silent restart."""

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import pytest
from jax.errors import JaxRuntimeError
from orbax.checkpoint import CheckpointManager
from small_runs import assert_equal_trees, run_to_the_end, tiny_experiment

from train import integrity
from train.checkpoint import Checkpoints
from train.config import ExperimentConfig
from train.errors import UserError
from train.integrity import HASHES, damage, seal
from train.load import load
from train.metrics import read_rows
from train.run import RunFolder, refuse_lost_checkpoints
from train.run_files import DAMAGED_CHECKPOINTS


def largest(folder: Path) -> Path:
    """The file that holds most of the arrays."""
    files = (file for file in folder.rglob("*") if file.is_file())
    return max(files, key=lambda file: file.stat().st_size)


def truncate(folder: Path) -> None:
    file = largest(folder)
    file.write_bytes(file.read_bytes()[:-1])


def empty(folder: Path) -> None:
    largest(folder).write_bytes(b"")


def flip(folder: Path) -> None:
    file = largest(folder)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def remove(folder: Path) -> None:
    largest(folder).unlink()


def remove_arrays(folder: Path) -> None:
    shutil.rmtree(folder / "state")


def remove_everything(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def garble_loss(folder: Path) -> None:
    (folder / "metrics" / "metrics").write_text('{"validation_loss": 0.001}', encoding="utf-8")


def cut_hashes(folder: Path) -> None:
    (folder / HASHES).write_text(
        (folder / HASHES).read_text(encoding="utf-8")[:40], encoding="utf-8"
    )


def garble_metadata(folder: Path) -> None:
    (folder / "_CHECKPOINT_METADATA").write_bytes(b"\x80\x04.")  # as a pickle begins


DAMAGES = {
    truncate: "bytes, not",
    empty: "holds 0 bytes, not",
    flip: "has other bytes than were saved",
    remove: "is missing",
    remove_arrays: "is missing",
    remove_everything: "_CHECKPOINT_METADATA is missing",
    garble_loss: "metrics/metrics",
    cut_hashes: "hashes.json or _CHECKPOINT_METADATA is not what was saved",
    garble_metadata: "hashes.json or _CHECKPOINT_METADATA is not what was saved",
}


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory) -> tuple[Path, Any]:
    """The folder and the state of a finished run whose checkpoints are of steps 10, 20 and 30."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    outcome = run_to_the_end(tiny_experiment(corpus.folder, folder, checkpoints__keep=3), corpus)
    return folder, jax.device_get(outcome.state)


@pytest.fixture
def copied(whole, corpus, tmp_path) -> tuple[Path, ExperimentConfig]:
    shutil.copytree(whole[0], tmp_path / "run")
    return tmp_path / "run", tiny_experiment(corpus.folder, tmp_path / "run", checkpoints__keep=3)


@pytest.mark.parametrize("harm", DAMAGES, ids=lambda harm: harm.__name__)
def test_any_damage_is_noticed(whole, tmp_path, harm):
    shutil.copytree(whole[0] / "checkpoints" / "30", tmp_path / "30")
    assert damage(tmp_path / "30") is None
    harm(tmp_path / "30")
    assert DAMAGES[harm] in damage(tmp_path / "30")


def test_a_disk_that_fails_in_reading_is_damage(whole, monkeypatch):
    """Such an error has no file name."""

    def failing(path: Path) -> str:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(integrity, "file_sha256", failing)
    assert damage(whole[0] / "checkpoints" / "30") == "30 cannot be read: Input/output error"


@pytest.mark.parametrize("harm", [truncate, garble_metadata], ids=lambda harm: harm.__name__)
def test_a_run_goes_on_from_the_newest_whole_checkpoint(
    corpus, whole, copied, capsys, harm: Callable[[Path], None]
):
    folder, experiment = copied
    for step in ("20", "30"):
        harm(folder / "checkpoints" / step)
    outcome = run_to_the_end(experiment, corpus)
    warned = capsys.readouterr().err
    for step in ("20", "30"):
        assert f"warning: the checkpoint {folder / 'checkpoints' / step} is damaged" in warned
        assert (folder / DAMAGED_CHECKPOINTS / step).is_dir()
    assert outcome.resumed_from == 10
    assert_equal_trees(jax.device_get(outcome.state), whole[1])
    metrics = (folder / "metrics.jsonl").read_bytes()
    assert metrics == (whole[0] / "metrics.jsonl").read_bytes()


def test_what_the_hashes_cannot_tell_is_found_in_reading(corpus, whole, copied, capsys):
    """A checkpoint that was saved before there were hashes, with the arrays' index gone."""
    folder, experiment = copied
    (folder / "checkpoints" / "30" / HASHES).unlink()
    (folder / "checkpoints" / "30" / "state" / "manifest.ocdbt").unlink()
    outcome = run_to_the_end(experiment, corpus)
    assert outcome.resumed_from == 20
    assert "checkpoints/30 is damaged" in capsys.readouterr().err
    assert_equal_trees(jax.device_get(outcome.state), whole[1])


FULL = JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory: 4 GiB\nand where")


def test_an_intact_checkpoint_that_cannot_be_restored_stays(
    corpus, whole, copied, monkeypatch, capsys
):
    """Its hashes match: to take an older one would lose steps for no fault of the files."""
    folder, experiment = copied
    before = sorted(folder.rglob("*"))
    with monkeypatch.context() as patch, pytest.raises(UserError) as caught:
        patch.setattr(CheckpointManager, "restore", mock.Mock(side_effect=FULL))
        run_to_the_end(experiment, corpus)
    assert str(caught.value) == (
        f"the checkpoint of step 30 cannot be restored, though its files in "
        f"{folder / 'checkpoints' / '30'} are intact (JaxRuntimeError: RESOURCE_EXHAUSTED: Out of "
        f"memory: 4 GiB); free memory and start the same command again, or install the packages "
        f"of the versions in {folder / 'provenance.json'}"
    )
    assert sorted(folder.rglob("*")) == before and not capsys.readouterr().err
    outcome = run_to_the_end(experiment, corpus)
    assert outcome.resumed_from == 30
    assert_equal_trees(jax.device_get(outcome.state), whole[1])


def test_what_is_damaged_while_it_is_read_is_damaged(corpus, copied, monkeypatch, capsys):
    folder, experiment = copied
    restore, steps = CheckpointManager.restore, []

    def failing(self: CheckpointManager, step: int, **options: Any) -> Any:
        steps.append(step)
        if steps == [30]:
            flip(folder / "checkpoints" / "30")
            raise FULL
        return restore(self, step, **options)

    monkeypatch.setattr(CheckpointManager, "restore", failing)
    assert run_to_the_end(experiment, corpus).resumed_from == 20
    assert steps[:2] == [30, 20]
    warned = capsys.readouterr().err
    assert "checkpoints/30 is damaged (state/" in warned and "has other bytes than" in warned


def test_a_process_that_is_lost_in_reading_is_no_damage(copied, monkeypatch):
    folder, experiment = copied
    lost = JaxRuntimeError("UNAVAILABLE: failed to connect to all addresses")
    with Checkpoints(folder / "checkpoints", experiment.checkpoints) as checkpoints:
        monkeypatch.setattr(checkpoints, "_restore", mock.Mock(side_effect=lost))
        with pytest.raises(UserError, match="files in .* are intact"):
            checkpoints.restore(30, mock.Mock())
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        with pytest.raises(JaxRuntimeError, match="UNAVAILABLE"):
            checkpoints.restore(30, mock.Mock())
        with pytest.raises(JaxRuntimeError, match="UNAVAILABLE"):
            checkpoints._read_back({}, 30)
        monkeypatch.undo()


def test_with_no_whole_checkpoint_the_run_stops_and_keeps_everything(corpus, copied):
    folder, experiment = copied
    for step in ("10", "20", "30"):
        flip(folder / "checkpoints" / step)
    before = sorted(folder.rglob("*"))
    with pytest.raises(UserError, match="no checkpoint of the run is intact: .*/10 is damaged"):
        run_to_the_end(experiment, corpus)
    assert sorted(folder.rglob("*")) == before


def test_a_run_whose_checkpoints_are_gone_does_not_begin_anew(corpus, copied):
    folder, experiment = copied
    shutil.rmtree(folder / "checkpoints")
    rows = (folder / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="has come to step 30 but .* holds no checkpoint: restore"):
        run_to_the_end(experiment, corpus)
    assert (folder / "metrics.jsonl").read_bytes() == rows


@pytest.mark.parametrize(
    ("reached", "resumed", "lost"),
    [
        (30, 0, True),  # past the second save, so that the first was complete
        (20, 10, True),  # a start resumed from one
        (20, 0, False),  # a crash while the first was being written
    ],
)
def test_an_emptied_folder_of_checkpoints_is_noticed(copied, reached, resumed, lost):
    folder, experiment = copied
    for checkpoint in (folder / "checkpoints").iterdir():
        shutil.rmtree(checkpoint)
    rows = [row for row in read_rows(folder / "metrics.jsonl") if row["step"] <= reached]
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
    )
    starts = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
    starts.append({**starts[0], "step": resumed})
    (folder / "provenance.json").write_text(json.dumps(starts), encoding="utf-8")
    said = f"has come to step {reached} but .* holds no checkpoint: restore"
    with pytest.raises(UserError, match=said) if lost else contextlib.nullcontext():
        refuse_lost_checkpoints(RunFolder(folder), experiment)


def test_reading_names_the_damage_and_moves_nothing(copied):
    folder, _ = copied
    flip(folder / "checkpoints" / "20")
    before = sorted(folder.rglob("*"))
    with pytest.raises(UserError, match="checkpoints/20 is damaged .* name another with"):
        load(folder, which="20")
    assert load(folder, which="latest").step == 30
    assert sorted(folder.rglob("*")) == before


def test_a_folder_has_its_hashes_before_it_has_its_name(corpus, tmp_path, monkeypatch):
    """Or a crash between the two would leave a checkpoint that cannot be judged."""
    sealed = []

    def watched(folder: Path) -> None:
        seal(folder)
        sealed.append((folder.name, (folder / HASHES).exists()))

    monkeypatch.setattr(integrity, "seal", watched)
    run_to_the_end(tiny_experiment(corpus.folder, tmp_path / "run"), corpus)
    assert len(sealed) == 3
    for name, has_hashes in sealed:
        assert "tmp" in name and has_hashes
    for step in ("10", "20", "30"):
        folder = tmp_path / "run" / "checkpoints" / step
        assert not folder.exists() or (folder / HASHES).exists()
