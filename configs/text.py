"""Your own text or code: ``--config=configs/text.py --config.data.path=FILE_OR_FOLDER``.

The quickstart's models and budget on another corpus; the vocabulary is the byte values of the text,
or its Unicode characters with ``--config.data.vocabulary=characters``. Whatever its size, the
transformer has as many parameters as the FSN: ``config.match`` is the FSN that it is matched to by
its feed-forward. With ``--config.model.feedforward_width=F`` it has that width instead.
"""

import dataclasses

from ml_collections import ConfigDict

from configs import quickstart
from configs.enwik8 import POCKET

ARMS = quickstart.ARMS


def get_config(arm: str = "fsn") -> ConfigDict:
    """A pocket model on the user's corpus."""
    config = quickstart.get_config(arm)
    config.name = f"text_{arm}"
    config.data.name = "text"
    config.model.vocab_size = 0
    if arm == "transformer":
        config.model.feedforward_width = 0
        with config.unlocked():
            config.match = {"architecture": "fsn", **dataclasses.asdict(POCKET["fsn"])}
    return config
