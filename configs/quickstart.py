"""A pocket model on enwik8, in minutes on a laptop: ``make train``.

The arm after a colon is ``fsn`` (default, the published form), ``projected`` or ``transformer``, on
the same batches; docs/results.md has what they give.
"""

from ml_collections import ConfigDict

from configs import check_arm
from configs.enwik8 import OPTIMIZER, POCKET
from train.config import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    TrainingConfig,
    experiment,
)

ARMS = ("fsn", "projected", "transformer")


def get_config(arm: str = "fsn") -> ConfigDict:
    """The pocket rung, 2 million characters."""
    check_arm(arm, ARMS)
    return experiment(
        "quickstart" if arm == "fsn" else f"quickstart_{arm}",
        model=POCKET[arm],
        data=DataConfig(name="enwik8", context=128),
        optimizer=OPTIMIZER,
        training=TrainingConfig(batch_size=16, num_steps=1000, log_every=20),
        evaluation=EvaluationConfig(every=200, num_tokens=200_000),
        checkpoints=CheckpointConfig(every=200),
    )
