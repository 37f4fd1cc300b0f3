"""FSN and transformer on Python source: ``--config=configs/pycode.py:ARM``; arms as for enwik8."""

from ml_collections import ConfigDict

from configs import enwik8

VOCABULARY = 198
ARMS = enwik8.ARMS


def get_config(arm: str = "fsn_pocket") -> ConfigDict:
    """The enwik8 arm with the other corpus and its vocabulary."""
    config = enwik8.get_config(arm)
    config.name = f"pycode_{arm}"
    config.data.name = "pycode"
    config.model.vocab_size = VOCABULARY
    return config
