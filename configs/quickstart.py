"""A pocket FSN on enwik8, in minutes on a laptop: ``make train``."""

from ml_collections import ConfigDict

from configs.enwik8 import FSN_OPTIMIZER, POCKET
from train.config import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    TrainingConfig,
    experiment,
)


def get_config() -> ConfigDict:
    """The pocket rung, 2 million characters."""
    return experiment(
        "quickstart",
        model=POCKET["fsn_pocket"],
        data=DataConfig(name="enwik8", context=128),
        optimizer=FSN_OPTIMIZER,
        training=TrainingConfig(batch_size=16, num_steps=1000, log_every=20),
        evaluation=EvaluationConfig(every=200, num_bytes=200_000),
        checkpoints=CheckpointConfig(every=200),
    )
