"""Groups of parameters by path, what decays, what a factor scales, the schedule, clipping."""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import (
    FSN_VARIANTS,
    TRANSFORMER_VARIANTS,
    fsn_config,
    transformer_config,
)
from flax.traverse_util import flatten_dict, unflatten_dict
from small_runs import ACCELERATOR, mesh_of

from configs import ablations, enwik8
from fsn_jax.hub import build_model
from train.config import ExperimentConfig, ModelConfig, OptimizerConfig
from train.groups import group_of, groups
from train.optimizer import learning_rate, make_optimizer

NUM_STEPS = 100
PLAIN = OptimizerConfig(peak_learning_rate=1e-2, warmup_steps=0, weight_decay=0.1)

MODELS: list[ModelConfig] = [
    *(fsn_config(num_layers=1, **changes) for changes in FSN_VARIANTS.values()),
    *(transformer_config(num_layers=1, **changes) for changes in TRANSFORMER_VARIANTS.values()),
]

# Every name that any variant gives a parameter; a new one belongs here and in train/groups.py.
GROUPS = {
    "angles": {"embedding/angles", "block/attention/score/gate_angle"},
    "kernels": {
        "block/attention/kernel_real",
        "block/attention/kernel_imag",
    },
    "gates": {
        "block/attention/score/gate",
        "block/attention/score/log_beta",
        "block/attention/score/query/quadrature",
        "block/attention/score/key/quadrature",
        "block/feedforward/gate/quadrature",
        "block/feedforward/up/quadrature",
        "block/feedforward/weights/quadrature",
        "block/attention/score/query_gate/quadrature",
        "block/attention/score/key_gate/quadrature",
        "block/attention/value/quadrature",
        "block/feedforward/gate/field_gain",
        "block/feedforward/up/field_gain",
        "block/feedforward/weights/field_gain",
        "block/feedforward/field_gain",
    },
    "tables": {"embedding/embedding", "readout/kernel"},
    "matrices": {
        "block/attention/score/query/kernel",
        "block/attention/score/key/kernel",
        "block/attention/query/kernel",
        "block/attention/key/kernel",
        "block/attention/value/kernel",
        "block/attention/output/kernel",
        "block/feedforward/gate/kernel",
        "block/feedforward/up/kernel",
        "block/feedforward/down/kernel",
        "block/feedforward/weights/kernel",
        "block/feedforward/modes_real",
        "block/feedforward/modes_imag",
        "block/feedforward/gate_real",
        "block/feedforward/gate_imag",
        "block/feedforward/up_real",
        "block/feedforward/up_imag",
        "block/feedforward/down_real",
        "block/feedforward/down_imag",
        "block/attention/score/query_gate/kernel",
        "block/attention/score/key_gate/kernel",
    },
    "vectors": {
        "readout/bias",
        "final_norm/scale",
        "block/attention/key_shift",
        "block/attention/query_shift",
        "block/attention_norm/scale",
        "block/feedforward_norm/scale",
        "block/feedforward/weights/bias",
        "block/feedforward/bias",
        "block/attention/score/query_gate/bias",
        "block/attention/score/key_gate/bias",
    },
}


@functools.cache
def shapes_of(config: ModelConfig) -> Any:
    tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    return jax.eval_shape(build_model(config).init, jax.random.key(0), tokens)["params"]


# The parameters of all the models in one tree. All that counts is their paths, so each is cut to
# two scalars, which are one: whatever scales them shows.
@functools.cache
def everything() -> Any:
    paths = (path for config in MODELS for path in flatten_dict(shapes_of(config)))
    return unflatten_dict({path: np.ones(2, np.float32) for path in paths})


def by_name(tree: Any) -> dict[str, Any]:
    return flatten_dict(tree, sep="/")


def update(config: OptimizerConfig, params: Any, gradient: Any) -> dict[str, np.ndarray]:
    """The first update of a run."""
    optimizer = make_optimizer(config, NUM_STEPS)
    changes, _ = jax.jit(optimizer.update)(gradient, optimizer.init(params), params)
    return {name: np.asarray(change) for name, change in by_name(changes).items()}


def test_the_groups_are_these():
    found: dict[str, set[str]] = {group: set() for group in GROUPS}
    for config in MODELS:
        for name, group in by_name(groups(shapes_of(config))).items():
            found[group].add(name.replace("block_0", "block"))
    assert found == GROUPS


@pytest.mark.parametrize("file", [ablations, enwik8], ids=lambda file: file.__name__)
def test_every_matrix_of_every_arm_is_trained_as_the_reference_is(file):
    """An arm whose matrices have another optimizer than the FSN's is no ablation of the FSN."""
    by_phase = {"kernel_real", "kernel_imag", "gate", "gate_angle", "quadrature", "field_gain"}
    for arm in file.ARMS:
        model = ExperimentConfig.from_config_dict(file.get_config(arm)).model
        shapes = shapes_of(dataclasses.replace(model, num_layers=1))
        for name, group in by_name(groups(shapes)).items():
            if name.startswith("block_") and by_name(shapes)[name].ndim > 1:
                is_matrix = name.split("/")[-1] not in by_phase
                assert (group == "matrices") == is_matrix, f"{arm}: {name}"


def test_a_parameter_that_no_group_knows_is_refused():
    with pytest.raises(KeyError, match="novelty"):
        group_of(("block_0", "novelty"))


def test_nothing_but_matrices_decays():
    changes = update(PLAIN, everything(), jax.tree.map(np.zeros_like, everything()))
    for name, group in by_name(groups(everything())).items():
        expected = -1e-2 * 0.1 if group in ("matrices", "tables") else 0.0
        np.testing.assert_allclose(changes[name], expected, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("group", ["angle", "kernel", "gate"])
def test_a_factor_scales_its_own_group_alone(group):
    gradient = jax.tree.map(lambda leaf: np.float32(0.01) * leaf, everything())
    plain = update(PLAIN, everything(), gradient)
    changed = dataclasses.replace(PLAIN, **{f"{group}_factor": 2.5})
    scaled = update(changed, everything(), gradient)
    for name, of in by_name(groups(everything())).items():
        factor = 2.5 if of == f"{group}s" else 1.0
        assert np.abs(plain[name]).min() > 0
        np.testing.assert_allclose(scaled[name], factor * plain[name], rtol=1e-6, err_msg=name)


def a_step_of_muon(config):
    """The updates of a tiny model by Muon and by Adam, from one random gradient."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes_of(config))
    gradient = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), params)
    plain = dataclasses.replace(PLAIN, clip_norm=1e9)
    muon = dataclasses.replace(plain, matrices="muon")
    return by_name(gradient), update(muon, params, gradient), update(plain, params, gradient)


@pytest.mark.parametrize("config", [MODELS[0], MODELS[-1]], ids=["fsn", "transformer"])
def test_muon_turns_the_matrices_of_the_blocks_along_orthogonal_directions(config):
    """Every singular value of the update is about the same; those of its gradient are not.

    Newton and Schulz's iteration brings them between 0.7 and 1.2; U V' of the gradient's U S V' is
    the direction. What is no matrix of a block gets Adam's update to the bit.
    """
    gradient, muon, adam = a_step_of_muon(config)
    of_group = by_name(groups(shapes_of(config)))
    turned = [name for name, group in of_group.items() if group == "matrices"]
    assert turned and all(name.startswith("block_0") for name in turned)
    for name, group in of_group.items():
        if group != "matrices":
            np.testing.assert_array_equal(muon[name], adam[name], err_msg=name)
            continue
        left, spread, right = np.linalg.svd(np.asarray(gradient[name], np.float64), False)
        assert spread.max() > 1.5 * spread.min()
        direction = muon[name] / (-1e-2 * 0.2 * max(muon[name].shape) ** 0.5)
        along = np.diag(left.T @ direction @ right.T)
        assert (along[spread > 0.1 * spread.max()] > 0.6).all() and (along < 1.3).all()
        np.testing.assert_allclose((left * along) @ right, direction, atol=0.01, err_msg=name)


TWO_BLOCKS = transformer_config(num_layers=2)
"""Its matrices are wide, tall and square."""


def matrices_of(tree: Any) -> dict[str, Any]:
    of_group = by_name(groups(tree))
    return {name: leaf for name, leaf in by_name(tree).items() if of_group[name] == "matrices"}


class PlainMuon:
    """Of one matrix, in float64: Nesterov's momentum, then Newton and Schulz's iteration."""

    def __init__(self, beta: float):
        self.beta, self.steps, self.mean = beta, 0, np.zeros(())

    def __call__(self, gradient: Any) -> np.ndarray:
        gradient, beta = np.asarray(gradient, np.float64), self.beta
        self.steps += 1
        self.mean = beta * self.mean + (1 - beta) * gradient
        ahead = beta * self.mean / (1 - beta ** (self.steps + 1))
        ahead = ahead + (1 - beta) * gradient / (1 - beta**self.steps)
        turned = ahead / np.linalg.norm(ahead)
        for _ in range(5):
            square = turned @ turned.T
            turned = 3.4445 * turned + (-4.7750 * square + 2.0315 * square @ square) @ turned
        return turned


@pytest.mark.parametrize("devices", [None, 1, 3, 8, "accelerator"])
def test_muon_in_stacks_is_muon_matrix_by_matrix(devices):
    """Whatever number of devices share the work, or in one stack padded with zeros."""
    config = dataclasses.replace(
        PLAIN, matrices="muon", muon_beta=0.8, clip_norm=1e9, weight_decay=0.0
    )
    mesh = ACCELERATOR if devices == "accelerator" else mesh_of(devices) if devices else None
    optimizer, rate = make_optimizer(config, NUM_STEPS, mesh=mesh), learning_rate(config, NUM_STEPS)
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes_of(TWO_BLOCKS))
    state, step = optimizer.init(params), jax.jit(optimizer.update)
    directions = {name: PlainMuon(config.muon_beta) for name in matrices_of(params)}
    rng = np.random.default_rng(0)
    for steps in range(3):
        gradient = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), params)
        changes, state = step(gradient, state, params)
        changes = matrices_of(changes)
        for name, leaf in matrices_of(gradient).items():
            size = rate(steps) * 0.2 * max(leaf.shape) ** 0.5
            np.testing.assert_allclose(
                -changes[name] / size, directions[name](leaf), atol=1e-4, err_msg=name
            )


def test_adam_is_that_of_its_settings():
    """Three steps of a vector against Adam's equations, with no setting at its default."""
    beta1, beta2, epsilon = 0.7, 0.8, 0.3
    config = dataclasses.replace(PLAIN, weight_decay=0.0, clip_norm=1e9)
    config = dataclasses.replace(config, beta1=beta1, beta2=beta2, epsilon=epsilon)
    optimizer, rate = make_optimizer(config, NUM_STEPS), learning_rate(config, NUM_STEPS)
    params = {"readout": {"bias": jnp.zeros(3)}}
    state, mean, square = optimizer.init(params), np.zeros(3), np.zeros(3)
    rng = np.random.default_rng(0)
    for step in range(1, 4):
        gradient = rng.normal(size=3)
        mean = beta1 * mean + (1 - beta1) * gradient
        square = beta2 * square + (1 - beta2) * gradient**2
        changes, state = optimizer.update(
            {"readout": {"bias": jnp.asarray(gradient, jnp.float32)}}, state, params
        )
        size = np.sqrt(square / (1 - beta2**step)) + epsilon
        expected = -rate(step - 1) * mean / (1 - beta1**step) / size
        np.testing.assert_allclose(changes["readout"]["bias"], expected, rtol=1e-4)


def test_devices_share_the_matrices_of_muon():
    """Each of two multiplies half of the eight square matrices and half of the six others."""
    config = dataclasses.replace(PLAIN, matrices="muon")
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes_of(TWO_BLOCKS))
    optimizer = make_optimizer(config, NUM_STEPS, mesh=mesh_of(2))
    compiled = jax.jit(optimizer.update).lower(params, optimizer.init(params), params).compile()
    stacked = re.findall(r"= f32\[(\d+),\d+,\d+\]\S* dot\(", compiled.as_text())
    assert set(stacked) == {"4", "3"}


def test_the_schedule_warms_up_peaks_and_ends_where_it_should():
    config = OptimizerConfig(peak_learning_rate=0.5, warmup_steps=20, final_fraction=0.2)
    rate = [float(learning_rate(config, NUM_STEPS)(step)) for step in range(NUM_STEPS + 1)]
    np.testing.assert_allclose(rate[:21], 0.5 * np.arange(21) / 20, rtol=1e-6)
    assert np.argmax(rate) == 20
    turned = np.pi * np.arange(81) / 80
    np.testing.assert_allclose(rate[20:], 0.5 * (0.6 + 0.4 * np.cos(turned)), rtol=1e-5)
    assert rate[-1] == pytest.approx(0.5 * 0.2)


def test_a_warm_up_longer_than_the_run_still_gives_a_schedule():
    rate = learning_rate(OptimizerConfig(warmup_steps=1000), 10)
    rates = [float(rate(step)) for step in range(11)]
    assert np.all(np.isfinite(rates)) and np.argmax(rates) == 9  # it grows up to the last step


def test_the_optimizer_follows_the_schedule():
    config = dataclasses.replace(PLAIN, warmup_steps=10, weight_decay=0.0)
    params = {"readout": {"bias": jnp.ones(3)}}
    optimizer, rate = make_optimizer(config, NUM_STEPS), learning_rate(config, NUM_STEPS)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for step in range(NUM_STEPS):
        # A constant gradient makes Adam's direction one: the update is the learning rate.
        changes, state = update(jax.tree.map(jnp.ones_like, params), state, params)
        np.testing.assert_allclose(changes["readout"]["bias"], -rate(step), rtol=1e-5)


def test_the_first_moment_holds_the_clipped_gradient():
    params = everything()
    gradient = jax.tree.map(lambda leaf: 10 * leaf, params)
    config = dataclasses.replace(PLAIN, clip_norm=0.25)
    optimizer = make_optimizer(config, NUM_STEPS)

    def seen_norm(gradient: Any) -> float:
        _, state = optimizer.update(gradient, optimizer.init(params), params)
        [adam] = [part for part in state if isinstance(part, optax.ScaleByAdamState)]
        return float(optax.tree.norm(adam.mu)) / (1 - config.beta1)

    assert seen_norm(gradient) == pytest.approx(0.25, rel=1e-5)
    short = jax.tree.map(lambda leaf: leaf * 0.1 / optax.tree.norm(gradient), gradient)
    assert seen_norm(short) == pytest.approx(0.1, rel=1e-5)
