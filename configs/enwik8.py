"""FSN and transformer on enwik8: ``--config=configs/enwik8.py:ARM``.

Pocket arms (about 0.23M parameters) are for a CPU, 1M arms for an accelerator. Both arms of a rung
see the same batches in the same order and have the same number of parameters within 1%.
"""

import dataclasses
import math
from typing import Any

from ml_collections import ConfigDict

from fsn_jax import FSNConfig, TransformerConfig
from fsn_jax.config import match_parameters
from train.config import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    TrainingConfig,
    experiment,
)

VOCABULARY = 205
CHARACTERS_PER_EPOCH = 90_000_000

OPTIMIZER = OptimizerConfig(
    matrices="muon",
    peak_learning_rate=1.5e-2,
    final_fraction=0.0,
    weight_decay=0.1,
    angle_factor=4.0,
)
"""Of both arms, whose searches ended at the same values; a transformer has no angles."""


TRANSFORMER_POCKET = TransformerConfig(
    vocab_size=VOCABULARY, num_layers=4, width=64, num_heads=4, feedforward_width=178
)
TRANSFORMER_1M = dataclasses.replace(
    TRANSFORMER_POCKET, num_layers=6, width=112, feedforward_width=327
)
FSN_POCKET = FSNConfig(
    vocab_size=VOCABULARY,
    num_layers=4,
    num_phases=64,
    num_heads=2,
    heads_per_phase=2,
    num_harmonics=1,
    kernel_angle=0.0,
    score="projected",
    score_phases=8,
    similarity_heads=1,
    features="quadrature",
    feature_scale=1.0,
    field_features=True,
    feedforward_width=224,
)
FSN_1M = match_parameters(
    dataclasses.replace(
        FSN_POCKET, num_layers=6, num_phases=112, heads_per_phase=1, score_phases=14
    ),
    TRANSFORMER_1M.num_params(),
)

BASE_LAYER: dict[str, Any] = {
    "heads_per_phase": 1,
    "num_harmonics": 1,
    "delay": False,
    "static_angles": False,
    "signed_harmonics": False,
}
MODES: dict[str, Any] = {"feedforward": "collective_modes"}


def variant(fsn: FSNConfig, changes: dict[str, Any]) -> FSNConfig:
    """An FSN with some fields changed and as many parameters."""
    return match_parameters(dataclasses.replace(fsn, **changes), fsn.num_params())


POCKET: dict[str, ModelConfig] = {
    "fsn_pocket": FSN_POCKET,
    "base_pocket": variant(FSN_POCKET, BASE_LAYER),
    "modes_pocket": variant(FSN_POCKET, MODES),
    "transformer_pocket": TRANSFORMER_POCKET,
}
ONE_MILLION: dict[str, ModelConfig] = {
    "fsn_1m": FSN_1M,
    "base_1m": variant(FSN_1M, BASE_LAYER),
    "modes_1m": variant(FSN_1M, MODES),
    "transformer_1m": TRANSFORMER_1M,
}
ARMS = (*POCKET, *ONE_MILLION)


def get_config(arm: str = "fsn_pocket") -> ConfigDict:
    """A rung's arm; see ``ARMS``."""
    if arm not in ARMS:
        raise ValueError(f"the arm after the colon must be one of {', '.join(ARMS)}; got {arm!r}")
    pocket = arm in POCKET
    model = POCKET[arm] if pocket else ONE_MILLION[arm]
    batch_size, context = (16, 256) if pocket else (64, 512)
    characters = 20_000_000 if pocket else 30 * CHARACTERS_PER_EPOCH
    steps_per_dispatch = 10 if pocket else 50
    every = 250 if pocket else 2000
    num_steps = math.ceil(characters / (batch_size * context) / every) * every
    return experiment(
        f"enwik8_{arm}",
        model=model,
        data=DataConfig(name="enwik8", context=context),
        optimizer=OPTIMIZER,
        training=TrainingConfig(
            batch_size=batch_size,
            num_steps=num_steps,
            steps_per_dispatch=steps_per_dispatch,
            log_every=steps_per_dispatch * 5,
        ),
        evaluation=EvaluationConfig(every=every, num_tokens=250_000 if pocket else 1_000_000),
        checkpoints=CheckpointConfig(every=every),
    )
