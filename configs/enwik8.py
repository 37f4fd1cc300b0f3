"""FSNs and transformers on enwik8: ``--config=configs/enwik8.py:ARM``.

An arm is a kind of model at a rung, for instance ``fsn_pocket``. The pocket rung (about 0.23M
parameters) is for a CPU. The 1M rung is the paper's comparison, for an accelerator: 30 epochs,
windows of 512, the pocket rung's learning rate. The ``1m`` rung of ``configs/ladder.py`` is another
one: windows of 256, a rate scaled by the width. All arms of a rung see the same batches in the same
order and have the same number of parameters within 1%.

==================  ================================================================================
kind                model
==================  ================================================================================
``fsn``             the published form: a gated score without matrices, two harmonics
``base``            the published form without frustration: one attractive harmonic, no delay
``modes``           the published form with collective modes in place of the MLP
``projected``       FSN with query and key matrices, one harmonic, and the local field in its MLP
``projected_base``  the same without frustration (pocket rung)
``projected_modes`` the same with collective modes (pocket rung)
``transformer``     RoPE-SwiGLU transformer
``shifted``         the same with token shift: queries and keys see the token before
==================  ================================================================================
"""

import dataclasses
import math
from typing import Any, TypeVar

from ml_collections import ConfigDict

from configs import check_arm
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

Model = TypeVar("Model", FSNConfig, TransformerConfig)

VOCABULARY = 205
CHARACTERS_PER_EPOCH = 90_000_000
COPY_DEPTH = 4
"""Repeated characters from which evaluations count a copy event, in every arm of the studies."""

OPTIMIZER = OptimizerConfig(
    matrices="muon",
    peak_learning_rate=1.5e-2,
    final_fraction=0.0,
    weight_decay=0.1,
    angle_factor=4.0,
)
"""Of every kind of model, as the searches of the transformers and the projected FSNs left it."""
VALIDATION, LONG_VALIDATION = 250_000, 1_000_000
"""Bytes of validation at each evaluation: of the short runs on a CPU, and of longer ones."""


TRANSFORMER_POCKET = TransformerConfig(
    vocab_size=VOCABULARY, num_layers=4, width=64, num_heads=4, feedforward_width=178
)
TRANSFORMER_1M = dataclasses.replace(
    TRANSFORMER_POCKET, num_layers=6, width=112, feedforward_width=327
)
FSN_POCKET = match_parameters(
    FSNConfig(vocab_size=VOCABULARY, num_layers=4, num_phases=64),
    TRANSFORMER_POCKET.num_params(),
)
FSN_1M = match_parameters(
    dataclasses.replace(FSN_POCKET, num_layers=6, num_phases=112), TRANSFORMER_1M.num_params()
)
PROJECTED_POCKET = FSNConfig(
    vocab_size=VOCABULARY,
    num_layers=4,
    num_phases=64,
    num_harmonics=1,
    kernel_angle=0.0,
    score="projected",
    score_scope="all",
    score_phases=8,
    score_angles=False,
    features="quadrature",
    feature_scale=1.0,
    field_features=True,
    feedforward_width=224,
)
PROJECTED_1M = match_parameters(
    dataclasses.replace(
        PROJECTED_POCKET, num_layers=6, num_phases=112, heads_per_phase=1, score_phases=14
    ),
    TRANSFORMER_1M.num_params(),
)

BASE_LAYER: dict[str, Any] = {
    "heads_per_phase": 1,
    "num_harmonics": 1,
    "delay": False,
    "static_angles": False,
    "score_angles": False,
    "signed_harmonics": False,
}
MODES: dict[str, Any] = {"feedforward": "collective_modes"}
SHIFTED: dict[str, Any] = {"token_shift": "queries_and_keys"}


def variant(model: Model, changes: dict[str, Any]) -> Model:
    """A model with some fields changed and as many parameters."""
    return match_parameters(dataclasses.replace(model, **changes), model.num_params())


POCKET: dict[str, ModelConfig] = {
    "fsn": FSN_POCKET,
    "base": variant(FSN_POCKET, BASE_LAYER),
    "modes": variant(FSN_POCKET, MODES),
    "projected": PROJECTED_POCKET,
    "projected_base": variant(PROJECTED_POCKET, BASE_LAYER),
    "projected_modes": variant(PROJECTED_POCKET, {**MODES, "mode_weights": "dense"}),
    "transformer": TRANSFORMER_POCKET,
    "shifted": variant(TRANSFORMER_POCKET, SHIFTED),
}
ONE_MILLION: dict[str, ModelConfig] = {
    "fsn": FSN_1M,
    "base": variant(FSN_1M, BASE_LAYER),
    "modes": variant(FSN_1M, MODES),
    "projected": PROJECTED_1M,
    "transformer": TRANSFORMER_1M,
    "shifted": variant(TRANSFORMER_1M, SHIFTED),
}
RUNGS = {"pocket": POCKET, "1m": ONE_MILLION}
KINDS = tuple(ONE_MILLION)
"""Kinds of both rungs."""
ARMS = tuple(f"{kind}_{rung}" for rung, kinds in RUNGS.items() for kind in kinds)


def get_config(arm: str = "fsn_pocket") -> ConfigDict:
    """A rung's arm; see ``ARMS``."""
    check_arm(arm, ARMS)
    kind, rung = arm.rsplit("_", maxsplit=1)
    pocket = rung == "pocket"
    batch_size, context = (16, 256) if pocket else (64, 512)
    characters = 20_000_000 if pocket else 30 * CHARACTERS_PER_EPOCH
    steps_per_dispatch = 10 if pocket else 50
    every = 250 if pocket else 2000
    num_steps = math.ceil(characters / (batch_size * context) / every) * every
    return experiment(
        f"enwik8_{arm}",
        model=RUNGS[rung][kind],
        data=DataConfig(name="enwik8", context=context),
        optimizer=OPTIMIZER,
        training=TrainingConfig(
            batch_size=batch_size,
            num_steps=num_steps,
            steps_per_dispatch=steps_per_dispatch,
            log_every=steps_per_dispatch * 5,
        ),
        evaluation=EvaluationConfig(
            every=every,
            num_tokens=VALIDATION if pocket else LONG_VALIDATION,
            copy_depth=COPY_DEPTH,
        ),
        checkpoints=CheckpointConfig(every=every),
    )
