"""Checkpoints: which are kept, exact restoration, other meshes, other models."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_runs import TINY_FSN, TINY_TRANSFORMER, assert_equal_trees, mesh_of

from fsn_jax import FSNConfig, TransformerConfig
from fsn_jax.hub import build_model
from train import checkpoint
from train.checkpoint import Checkpoints
from train.config import CheckpointConfig, OptimizerConfig
from train.errors import UserError
from train.mesh import replicated
from train.optimizer import make_optimizer
from train.step import TrainState, abstract_state

OPTIMIZER = make_optimizer(OptimizerConfig(), 100)


def like(num_devices: int = 1, model: FSNConfig | TransformerConfig = TINY_FSN) -> TrainState:
    return abstract_state(build_model(model), OPTIMIZER, mesh=mesh_of(num_devices))


def state_of(seed: int, num_devices: int = 1) -> TrainState:
    """A state of the real shapes with bits that no computation made."""
    rng = np.random.default_rng(seed)

    def draw(leaf: Any) -> Any:
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return np.asarray(rng.integers(0, 99, leaf.shape), leaf.dtype)
        return np.asarray(rng.normal(size=leaf.shape), leaf.dtype)

    return jax.device_put(jax.tree.map(draw, like()), replicated(mesh_of(num_devices)))


def opened(folder: Path, *, keep: int = 2, read_only: bool = False) -> Checkpoints:
    return Checkpoints(folder, CheckpointConfig(keep=keep), read_only=read_only)


def test_the_latest_and_the_best_are_kept(tmp_path):
    losses = {10: 3.0, 20: 1.0, 30: 2.0, 40: float("nan"), 50: None, 60: 5.0}
    with opened(tmp_path / "c") as checkpoints:
        for step, loss in losses.items():
            checkpoints.save(state_of(step), step, loss)
        checkpoints.wait()
        assert checkpoints.all_steps() == [20, 50, 60]
        assert (checkpoints.latest(), checkpoints.best()) == (60, 20)
    with opened(tmp_path / "c") as checkpoints:  # a new process knows the losses of the old one
        assert (checkpoints.latest(), checkpoints.best()) == (60, 20)
        checkpoints.save(state_of(70), 70, 0.5)
        checkpoints.wait()
        assert checkpoints.all_steps() == [60, 70]
        assert checkpoints.best() == 70
        assert_equal_trees(checkpoints.restore(60, like()), state_of(60))


def test_without_an_evaluation_there_is_no_best(tmp_path):
    with opened(tmp_path / "c", keep=1) as checkpoints:
        assert (checkpoints.latest(), checkpoints.best()) == (None, None)
        for step in (1, 2):
            checkpoints.save(state_of(step), step, None)
        checkpoints.wait()
        assert (checkpoints.all_steps(), checkpoints.best()) == ([2], None)


def test_a_save_has_the_values_of_its_moment(tmp_path):
    """The next step deletes the buffers (they are donated) while the save is under way."""
    state = state_of(1)
    with opened(tmp_path / "c") as checkpoints:
        checkpoints.save(state_of(0), 0, 2.0)  # the first is waited for
        checkpoints.save(state, 1, 1.0)
        for leaf in jax.tree.leaves(state):
            leaf.delete()
        checkpoints.wait()
        assert_equal_trees(checkpoints.restore(1, like()), state_of(1))


@pytest.mark.parametrize("name", ["run[1]", "a*b", "what?", "x[y]/**/[!z]"])
def test_a_folder_named_like_a_pattern_holds_checkpoints(tmp_path, name):
    folder = tmp_path / name / "checkpoints"
    with opened(folder) as checkpoints:
        for step in (1, 2):
            checkpoints.save(state_of(step), step, 1.0)
    assert sorted(entry.name for entry in folder.iterdir()) == ["1", "2"]
    with opened(folder, read_only=True) as checkpoints:
        assert_equal_trees(checkpoints.restore_params(2, like().params), state_of(2).params)
    with opened(folder) as checkpoints:
        step, state = checkpoints.restore_latest(like())
        assert step == 2
        assert_equal_trees(state, state_of(2))
    assert not (tmp_path / name / "damaged_checkpoints").exists()


def test_a_place_for_temporary_files_named_like_a_pattern_is_refused(tmp_path, monkeypatch):
    (tmp_path / "[t]").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "[t]"))
    with opened(tmp_path / "plain") as checkpoints:
        assert checkpoints.latest() is None
    with pytest.raises(UserError, match="set TMPDIR to another"):
        opened(tmp_path / "[1]")
    assert list((tmp_path / "[t]").iterdir()) == []


def test_a_first_save_that_cannot_be_read_back_is_an_error_at_once(tmp_path, monkeypatch):
    # Without the detour Orbax does not find, and so never merges, what it has written.
    monkeypatch.setattr(checkpoint, "has_pattern", lambda path: False)
    refused = pytest.raises(UserError, match=r"run\[1\]/5, just saved, cannot be read back")
    with opened(tmp_path / "run[1]") as checkpoints, refused:
        checkpoints.save(state_of(1), 5, 1.0)


def test_a_first_save_with_other_values_is_an_error_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(Checkpoints, "_restore", lambda *_: jax.device_get(state_of(2)))
    refused = pytest.raises(UserError, match=r"just saved, .* \(its values differ\)")
    with opened(tmp_path / "c") as checkpoints, refused:
        checkpoints.save(state_of(1), 1, 1.0)


def test_a_first_save_is_read_back_from_many_devices(tmp_path):
    with opened(tmp_path / "c") as checkpoints:
        checkpoints.save(state_of(1, num_devices=4), 1, 1.0)
        assert checkpoints.latest() == 1


@pytest.mark.parametrize(("saved_on", "restored_on"), [(1, 8), (8, 1), (8, 8)])
def test_a_state_moves_between_meshes(tmp_path, saved_on, restored_on):
    with opened(tmp_path / "c") as checkpoints:
        checkpoints.save(state_of(3, saved_on), 3, None)
        checkpoints.wait()
        restored = checkpoints.restore(3, like(restored_on))
    assert_equal_trees(restored, state_of(3))
    for leaf in jax.tree.leaves(restored):
        assert leaf.sharding.is_fully_replicated
        assert leaf.sharding.device_set == set(jax.devices()[:restored_on])


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (TINY_TRANSFORMER, r"attention/kernel_imag is \(2, 2, 8\) there and absent in the config"),
        (
            dataclasses.replace(TINY_FSN, num_layers=2),
            r"block_1/\S+ is absent there and \(.*\) in the config",
        ),
        (
            dataclasses.replace(TINY_FSN, vocab_size=13),
            r"embedding/angles is \(12, 8\) there and \(13, 8\) in the config \(3 arrays differ\)",
        ),
    ],
    ids=["architecture", "layers", "vocabulary"],
)
def test_another_model_is_refused(tmp_path, model, says):
    with opened(tmp_path / "c") as checkpoints:
        checkpoints.save(state_of(3), 3, None)
        checkpoints.wait()
        with pytest.raises(UserError, match=says) as refused:
            checkpoints.restore(3, like(model=model))
    assert "--config.run_dir=FOLDER" in str(refused.value)


def test_the_state_of_two_optimizers_is_restored(tmp_path):
    """Muon's parameters are masked in Adam's state, and Adam's in Muon's."""
    muon = make_optimizer(OptimizerConfig(matrices="muon"), 100)
    wanted = abstract_state(build_model(TINY_TRANSFORMER), muon, mesh=mesh_of(1))
    state = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), wanted)
    with opened(tmp_path / "c") as checkpoints:
        checkpoints.save(jax.device_put(state, replicated(mesh_of(1))), 3, None)
        assert_equal_trees(checkpoints.restore(3, wanted), state)


def test_another_optimizer_is_refused_and_moves_nothing(tmp_path):
    """As a setting makes it, or another version of Optax."""
    muon = make_optimizer(OptimizerConfig(matrices="muon"), 100)
    other = abstract_state(build_model(TINY_FSN), muon, mesh=mesh_of(1))
    with opened(tmp_path / "c") as checkpoints:
        checkpoints.save(state_of(3), 3, None)
    with opened(tmp_path / "c") as checkpoints:
        with pytest.raises(UserError, match="3 is of another optimizer: ") as refused:
            checkpoints.restore_latest(other)
        assert checkpoints.all_steps() == [3]
    assert "1/count is () there and absent in the config (" in str(refused.value)
    assert "the version of Optax in its provenance.json, or another folder" in str(refused.value)


def test_reading_writes_nothing(tmp_path):
    with opened(tmp_path / "c") as checkpoints:
        checkpoints.save(state_of(3), 3, None)
    before = sorted(tmp_path.rglob("*"))
    with opened(tmp_path / "c", read_only=True) as checkpoints:
        assert_equal_trees(checkpoints.restore_params(3, like().params), state_of(3).params)
    assert sorted(tmp_path.rglob("*")) == before


def test_parameters_are_restored_under_another_optimizer(tmp_path):
    """As after an update of Optax that keeps other moments."""
    with opened(tmp_path / "c") as checkpoints:
        checkpoints.save(state_of(3), 3, None)
    with opened(tmp_path / "c", read_only=True) as checkpoints:
        with pytest.raises(UserError, match="is of another optimizer"):
            checkpoints.restore(3, dataclasses.replace(like(), opt_state={}))
        assert_equal_trees(checkpoints.restore_params(3, like().params), state_of(3).params)


def test_damage_is_found_before_parameters_are_restored(tmp_path):
    with opened(tmp_path / "c", keep=2) as checkpoints:
        for step in (1, 2):
            checkpoints.save(state_of(step), step, None)
    largest = max((tmp_path / "c" / "2").rglob("*"), key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[::-1])
    with opened(tmp_path / "c", read_only=True) as checkpoints:
        with pytest.raises(UserError, match="is damaged.*name another with --checkpoint=STEP"):
            checkpoints.restore_params(2, like().params)
        assert_equal_trees(checkpoints.restore_params(1, like().params), state_of(1).params)
