"""Packed parameters: nothing is lost, the optimizer does the same, checkpoints hold the tree."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import fsn_config, transformer_config
from small_runs import (
    ACCELERATOR,
    TINY_TRANSFORMER,
    assert_equal_trees,
    largest_difference,
    mesh_of,
)

from fsn_jax.hub import build_model
from train import step
from train.config import OptimizerConfig
from train.optimizer import make_optimizer
from train.packing import pack, pack_state, unpack, unpack_state
from train.step import TrainState, abstract_state, init_state, make_train_steps

MODELS = {
    "fsn": fsn_config(num_layers=2),
    "transformer": transformer_config(num_layers=2),
    "modes": fsn_config(num_layers=2, feedforward="collective_modes"),
}
MUON = OptimizerConfig(matrices="muon", warmup_steps=0, peak_learning_rate=0.1)


def state_of(name: str, config: OptimizerConfig = MUON) -> TrainState:
    """The state of a run whose every number is another."""
    model = build_model(MODELS[name])
    shapes = abstract_state(model, make_optimizer(config, 10), mesh=mesh_of(1))
    rng = np.random.default_rng(0)
    drawn = jax.tree.map(lambda leaf: jnp.asarray(rng.uniform(1, 2, leaf.shape)), shapes)
    return jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), drawn, shapes)


@pytest.mark.parametrize("model", MODELS)
def test_packing_loses_nothing(model):
    params = state_of(model).params
    packed = pack(params)
    assert len(jax.tree.leaves(packed)) < len(jax.tree.leaves(params)) / 2
    assert sum(a.size for a in jax.tree.leaves(packed)) == sum(
        a.size for a in jax.tree.leaves(params)
    )
    assert_equal_trees(unpack(packed, params), params)
    assert_equal_trees(pack(packed), packed)
    assert_equal_trees(unpack(pack(packed), packed), packed)


@pytest.mark.parametrize("matrices", ["adam", "muon"])
def test_a_packed_state_comes_back(matrices):
    config = dataclasses.replace(MUON, matrices=matrices)
    state = state_of("transformer", config)
    packed = pack_state(state, make_optimizer(config, 10))
    assert len(jax.tree.leaves(packed)) < len(jax.tree.leaves(state)) / 2
    assert_equal_trees(unpack_state(packed, state), state)


@pytest.mark.parametrize("matrices", ["adam", "muon"])
@pytest.mark.parametrize("mesh", [None, ACCELERATOR], ids=["cpu", "accelerator"])
def test_the_optimizer_does_the_same_with_packed_arrays(matrices, mesh):
    config = dataclasses.replace(MUON, matrices=matrices)
    optimizer = make_optimizer(config, 10, mesh=mesh)
    state = state_of("transformer", config)
    rng = np.random.default_rng(1)
    gradient = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), state.params)

    def step(state: Any, gradient: Any) -> Any:
        changes, moments = optimizer.update(gradient, state.opt_state, state.params)
        return state.replace(params=changes, opt_state=moments)

    plain = jax.jit(step)(state, gradient)
    packed = jax.jit(step)(pack_state(state, optimizer), pack(gradient))
    # The squares of a gradient's norm are summed in another order.
    for found, expected in zip(
        jax.tree.leaves(unpack_state(packed, state)), jax.tree.leaves(plain), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("num_devices", [1, 2])
def test_a_packed_dispatch_does_the_same(monkeypatch, num_devices):
    """Three steps as an accelerator would take them, and as a CPU does."""
    model, mesh = build_model(TINY_TRANSFORMER), mesh_of(num_devices)
    windows = np.random.default_rng(0).integers(0, 12, (3, 4, 9)).astype(np.uint8)

    def three_steps() -> TrainState:
        optimizer = make_optimizer(MUON, 10, mesh=mesh)
        steps = make_train_steps(
            model, optimizer, mesh=mesh, context=8, placement="host", log_every=10
        )
        return steps(init_state(model, optimizer, seed=0, mesh=mesh), windows)[0]

    plain = three_steps()
    monkeypatch.setattr(step, "packs", lambda *_: True)
    assert largest_difference(three_steps(), plain) <= 1e-4  # the iteration triples what is small


def test_a_checkpoint_holds_the_tree():
    """The names of a checkpoint's arrays do not change: those of old runs must load."""
    state = state_of("transformer")
    names = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state)
    }
    matrix = state.params["block_1"]["feedforward"]["down"]["kernel"]
    bias = state.params["final_norm"]["scale"]
    of_muon, of_adam = (f"1/inner_states/{kind}/inner_state" for kind in ("muon", "adam"))
    assert names[f"{of_muon}/0/mu/block_1/feedforward/down/kernel"] == matrix.shape
    assert names[f"{of_adam}/mu/final_norm/scale"] == bias.shape
    assert names[f"{of_adam}/nu/final_norm/scale"] == bias.shape
    assert {f"{of_muon}/0/count", f"{of_muon}/0/ns_coeffs", f"{of_adam}/count"} < names.keys()
