"""Every file under configs/: each of its arms is valid, knows its size, and takes a step."""

import dataclasses
import runpy
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from small_runs import mesh_of

from train.config import ExperimentConfig
from train.loop import check_devices
from train.main import load_config
from train.optimizer import make_optimizer
from train.step import abstract_state, build_model, init_state, make_train_steps

FOLDER = Path(__file__).resolve().parent.parent / "configs"
FILES = sorted(FOLDER.glob("[!_]*.py"))
ARMS = [
    f"{file}:{arm}" if arm else str(file)
    for file in FILES
    for arm in runpy.run_path(str(file)).get("ARMS", ("",))
]


def short_name(argument: object) -> str:
    return Path(str(argument)).name


each_arm = pytest.mark.parametrize("argument", ARMS, ids=short_name)


def config_of(argument: str) -> ConfigDict:
    config = load_config(argument)
    if config.data.name in ("text", "codeparrot"):
        config.data.path = "a path of the user's"
    return config


def experiment_of(argument: str) -> ExperimentConfig:
    return ExperimentConfig.from_config_dict(config_of(argument))


def shallow(config: ExperimentConfig) -> ExperimentConfig:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, num_layers=1))


def steps_of(config: ExperimentConfig, context: int) -> tuple[Any, ...]:
    """The model, the optimizer and the compiled step of a config on one device."""
    model = build_model(config.model)
    optimizer = make_optimizer(config.optimizer, config.training.num_steps)
    step = make_train_steps(
        model,
        optimizer,
        mesh=mesh_of(1),
        context=context,
        placement="host",
        accumulation_steps=config.training.accumulation_steps,
        log_every=config.training.log_every,
    )
    return model, optimizer, step


def test_there_are_configs():
    assert {file.stem for file in FILES} >= {"quickstart", "enwik8", "pycode", "text", "ablations"}


@each_arm
def test_a_config_is_valid_and_knows_its_size(argument):
    config = experiment_of(argument)
    check_devices(config, 1)
    tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    tree = jax.eval_shape(build_model(config.model).init, jax.random.key(0), tokens)
    assert sum(leaf.size for leaf in jax.tree.leaves(tree)) == config.model.num_params()
    assert ExperimentConfig.from_json(config_of(argument).to_json()) == config


def test_each_run_has_a_folder_of_its_own():
    names = [config_of(argument).name for argument in ARMS]
    assert len(set(names)) == len(names)


# Arms that differ in no more than their depth and their corpus have the same step but for its size.
DISTINCT = {
    (shallow(config).model, config.optimizer, config.training, config.data.context): argument
    for argument in ARMS
    for config in [experiment_of(argument)]
}


@pytest.mark.parametrize("argument", DISTINCT.values(), ids=short_name)
def test_a_step_of_a_config_can_be_traced(argument):
    """With its own batch and context, and one of its layers, which are all alike."""
    config = shallow(experiment_of(argument))
    context = config.data.context
    model, optimizer, step = steps_of(config, context)
    state = abstract_state(model, optimizer, mesh=mesh_of(1))
    shape = (config.training.steps_per_dispatch, config.training.batch_size, context + 1)
    after, tally = jax.eval_shape(step, state, jax.ShapeDtypeStruct(shape, jnp.uint8))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), after) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), state
    )
    assert (tally.loss.shape, tally.loss.dtype) == ((), jnp.float32)


def check_a_step(config: ExperimentConfig) -> None:
    """On two windows of eight random characters."""
    config = dataclasses.replace(
        config, training=dataclasses.replace(config.training, accumulation_steps=1)
    )
    model, optimizer, step = steps_of(config, context=8)
    windows = np.random.default_rng(0).integers(0, config.model.vocab_size, (1, 2, 9))
    state = init_state(model, optimizer, seed=config.seed, mesh=mesh_of(1))
    _, tally = step(state, windows.astype(np.uint8))
    assert int(tally.steps) == 1
    assert float(tally.loss) == pytest.approx(np.log(config.model.vocab_size), rel=0.5)
    assert float(tally.grad_norm) > 0


@pytest.mark.usefixtures("quick_compiles")
@pytest.mark.parametrize("arm", ["quickstart.py", "enwik8.py:transformer_pocket"])
def test_a_config_with_one_of_its_layers_takes_a_step(arm):
    """The slow test below has every arm, and all the layers."""
    check_a_step(shallow(experiment_of(f"{FOLDER}/{arm}")))


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compiles")
@each_arm
def test_a_config_takes_a_step(argument):
    check_a_step(experiment_of(argument))
