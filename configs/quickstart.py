"""A pocket FSN on enwik8, in a few minutes on a laptop: ``make train``."""

from ml_collections import ConfigDict

from fsn_jax import FSNConfig
from train.config import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    OptimizerConfig,
    TrainingConfig,
    experiment,
)


def get_config() -> ConfigDict:
    """The pocket rung: about 0.2M parameters."""
    return experiment(
        "quickstart",
        model=FSNConfig(vocab_size=205, num_layers=4, num_phases=64, num_heads=4),
        data=DataConfig(name="enwik8", context=128),
        optimizer=OptimizerConfig(peak_learning_rate=1e-2, angle_factor=4.0),
        training=TrainingConfig(batch_size=16, num_steps=1500),
        evaluation=EvaluationConfig(every=250, num_bytes=200_000),
        checkpoints=CheckpointConfig(every=250),
    )
