"""Your own text or code: ``--config=configs/text.py --config.data.path=FILE_OR_FOLDER``.

Models of the pocket rung, 2 million characters at most: the run ends when its validation loss has
not fallen for five evaluations. The vocabulary is the byte values of the text, or its Unicode
characters with ``--config.data.vocabulary=characters``. Whatever its size, the transformers have as
many parameters as the FSN: ``config.match`` is the FSN that they are matched to by their
feed-forward. With ``--config.model.feedforward_width=F`` they have that width instead.
"""

import dataclasses

from ml_collections import ConfigDict

from configs import check_arm, quickstart
from configs.enwik8 import POCKET
from fsn_jax import TransformerConfig

ARMS = (*quickstart.ARMS, "shifted")


def get_config(arm: str = "fsn") -> ConfigDict:
    """A pocket model on the user's corpus."""
    check_arm(arm, ARMS)
    config = quickstart.get_config("transformer" if arm == "shifted" else arm)
    config.name = f"text_{arm}"
    config.data.name = "text"
    config.training.patience = 5
    config.evaluation.every = config.checkpoints.every = 100
    config.model.update(dataclasses.asdict(POCKET[arm]))
    config.model.vocab_size = 0
    if isinstance(POCKET[arm], TransformerConfig):
        config.model.feedforward_width = 0
        with config.unlocked():
            config.match = {"architecture": "fsn", **dataclasses.asdict(POCKET["fsn"])}
    return config
