"""The number of devices and where the parameters lie may change at any start of a run."""

import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from small_runs import (
    BATCH,
    CONTEXT,
    SAME_LOSS,
    TINY_FSN,
    assert_equal_trees,
    largest_difference,
    mesh_of,
    rows_of,
    text_of,
    tiny_experiment,
)
from test_preemption import signal_in_dispatch

from fsn_jax.hub import build_model
from train import loop
from train.config import OptimizerConfig
from train.data.corpus import Corpus
from train.data.windows import WindowOrder
from train.errors import TryAgain
from train.load import load_without_data
from train.loop import Outcome
from train.mesh import divided_axis
from train.optimizer import make_optimizer
from train.run import create_or_resume, open_run
from train.step import abstract_state, init_state, make_train_steps


def run_on(num_devices: int, corpus: Corpus, folder: Path, parameters: str) -> Outcome:
    experiment = tiny_experiment(corpus.folder, folder, training__layout=parameters)
    with create_or_resume(experiment, corpus) as run:
        return loop.train(experiment, corpus, run, show_progress=False, mesh=mesh_of(num_devices))


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory) -> tuple[Path, Any]:
    """A run on one device from beginning to end."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, jax.device_get(run_on(1, corpus, folder, "replicated").state)


def assert_as_good(folder: Path, state: Any, whole: tuple[Path, Any]) -> None:
    for kind in ("train", "validation"):
        found, expected = rows_of(folder, kind), rows_of(whole[0], kind)
        assert [row["step"] for row in found] == [row["step"] for row in expected]
        losses = [[row["loss"] for row in rows] for rows in (found, expected)]
        np.testing.assert_allclose(*losses, rtol=SAME_LOSS)
    assert int(state.step) == int(whole[1].step)
    # Adam divides by the root of a mean square that may be tiny, which enlarges rounding.
    assert largest_difference(state.params, whole[1].params) < 1e-3


def test_a_run_goes_on_with_other_devices_and_another_layout(corpus, whole, tmp_path):
    moves = [(1, "replicated"), (8, "sharded"), (2, "sharded"), (4, "replicated")]
    for num_devices, parameters in moves:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(TryAgain):
            signal_in_dispatch(patch, 1)
            run_on(num_devices, corpus, tmp_path / "run", parameters)
    outcome = run_on(1, corpus, tmp_path / "run", "replicated")
    assert outcome.resumed_from == 5 * len(moves)
    starts = open_run(tmp_path / "run").read_provenance()
    assert [start["step"] for start in starts] == [0, 5, 10, 15, 20]
    windows = (4000 - CONTEXT) // CONTEXT
    for row in rows_of(tmp_path / "run", "train"):  # the position in the data
        assert row["epoch"] == pytest.approx(row["step"] * BATCH / windows, abs=1e-6)
    assert_as_good(tmp_path / "run", jax.device_get(outcome.state), whole)


def test_sharded_parameters_give_the_losses_of_replicated_ones(corpus, whole, tmp_path):
    outcome = run_on(8, corpus, tmp_path / "run", "sharded")
    loaded = load_without_data(tmp_path / "run").params
    assert_equal_trees(jax.device_get(loaded), jax.device_get(outcome.state.params))
    for leaf, trained in zip(
        jax.tree.leaves(loaded), jax.tree.leaves(outcome.state.params), strict=True
    ):
        assert leaf.sharding.spec == trained.sharding.spec
    assert_as_good(tmp_path / "run", jax.device_get(outcome.state), whole)
    divided = 0
    for leaf in jax.tree.leaves((outcome.state.params, outcome.state.opt_state)):
        part = math.prod(leaf.addressable_shards[0].data.shape)
        axis = divided_axis(leaf.shape, 8, "sharded")
        assert part == (leaf.size if axis is None else leaf.size // 8)
        divided += axis is not None
    assert divided >= 3 * 4  # of the parameters and of both moments


def test_the_longest_axis_that_divides_evenly_is_divided():
    assert divided_axis((12, 64), 8, "sharded") == 1
    assert divided_axis((12, 64), 4, "sharded") == 1
    assert divided_axis((64, 60), 4, "sharded") == 0
    assert divided_axis((7, 9), 4, "sharded") is None
    assert divided_axis((), 4, "sharded") is None
    assert divided_axis((0, 3), 4, "sharded") is None
    assert divided_axis((64,), 1, "sharded") is None
    assert divided_axis((64,), 4, "replicated") is None


def test_sharded_gradients_are_summed_and_divided_at_once():
    """No device ever holds the sum of a divided gradient, nor the moments of others."""
    model, optimizer = build_model(TINY_FSN), make_optimizer(OptimizerConfig(), 100)
    placed: dict[str, Any] = {"mesh": mesh_of(8), "layout": "sharded"}
    step = make_train_steps(
        model, optimizer, **placed, context=CONTEXT, placement="host", log_every=10
    )
    order = WindowOrder(4000, CONTEXT, BATCH, seed=0)
    tokens = np.frombuffer(text_of(4000), np.uint8) - ord("a")
    windows = tokens[order.starts_of_steps(0, 2)[..., None] + np.arange(CONTEXT + 1)]
    compiled = step.lower(abstract_state(model, optimizer, **placed), windows).compile()
    program = compiled.as_text()
    assert "reduce-scatter" in program and "all-gather" in program
    state, _ = step(init_state(model, optimizer, seed=0, **placed), windows)
    wanted = abstract_state(model, optimizer, **placed)
    for leaf, like in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True):
        assert leaf.sharding.is_equivalent_to(like.sharding, leaf.ndim)
