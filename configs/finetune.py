"""A trained model, on your own text: ``--config=configs/finetune.py --config.data.path=PATH``.

After a colon the folder of the model, one of ``pretrained/`` or one that ``python -m train export
RUN FOLDER`` wrote. The settings of the model are its own; dropout may be added. The vocabulary is
that of the text. The rate is the best of four in trials with 0.23M parameters
(docs/history/searches.md). The run has 4 million characters at most and ends when its validation
loss has not fallen for five evaluations.
"""

import dataclasses
from pathlib import Path

from ml_collections import ConfigDict

from configs.enwik8 import OPTIMIZER
from fsn_jax import hub
from train.config import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    TrainingConfig,
    experiment,
)

PRETRAINED = "pretrained/enwik8_projected_1m"


def get_config(folder: str = PRETRAINED) -> ConfigDict:
    """The model of a folder on the user's corpus."""
    described = hub.describe(folder)
    data = DataConfig(
        "text",
        context=described.context,
        vocabulary=described.vocabulary.unit,
        segments="none" if described.separator is None else "documents",
    )
    config = experiment(
        f"finetune_{Path(folder).resolve().name}",
        model=described.config,
        data=data,
        optimizer=dataclasses.replace(OPTIMIZER, peak_learning_rate=5e-3),
        training=TrainingConfig(batch_size=16, num_steps=1000, log_every=20, patience=5),
        evaluation=EvaluationConfig(every=100, num_tokens=200_000),
        checkpoints=CheckpointConfig(every=100),
    )
    config.init_from = folder
    config.model.vocab_size = 0
    return config
