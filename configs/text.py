"""Your own text or code: ``--config=configs/text.py --config.data.path=FILE_OR_FOLDER``.

The vocabulary is the byte values of the text. The arm after a colon is ``fsn`` (default) or
``transformer``.
"""

from ml_collections import ConfigDict

from configs.enwik8 import FSN_OPTIMIZER, POCKET, TRANSFORMER_OPTIMIZER
from train.config import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    TrainingConfig,
    experiment,
)

ARMS = ("fsn", "transformer")


def get_config(arm: str = "fsn") -> ConfigDict:
    """A pocket model on the user's corpus."""
    if arm not in ARMS:
        raise ValueError(f"the arm after the colon must be one of {', '.join(ARMS)}; got {arm!r}")
    return experiment(
        f"text_{arm}",
        model=POCKET[f"{arm}_pocket"],
        vocabulary_from_corpus=True,
        data=DataConfig(name="text", context=128),
        optimizer=FSN_OPTIMIZER if arm == "fsn" else TRANSFORMER_OPTIMIZER,
        training=TrainingConfig(batch_size=16, num_steps=1200, log_every=20),
        evaluation=EvaluationConfig(every=200, num_bytes=200_000),
        checkpoints=CheckpointConfig(every=200),
    )
