"""FSNs and transformers on Python source: ``--config=configs/pycode.py:ARM``, as for enwik8.

The steps are enwik8's too, so that the 1m rung sees its 34 million characters 80 times.
"""

from ml_collections import ConfigDict

from configs import enwik8

VOCABULARY = 198
ARMS = enwik8.ARMS


def on_pycode(config: ConfigDict) -> ConfigDict:
    """The config of an enwik8 arm with this corpus and its vocabulary."""
    config.data.name = "pycode"
    config.model.vocab_size = VOCABULARY
    return config


def get_config(arm: str = "fsn_pocket") -> ConfigDict:
    """The enwik8 arm with the other corpus."""
    config = on_pycode(enwik8.get_config(arm))
    config.name = f"pycode_{arm}"
    return config
