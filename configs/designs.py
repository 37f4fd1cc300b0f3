"""Changes of design to the projected FSN at 1M parameters: ``--config=configs/designs.py:ARM``.

``projected`` is the reference, ``configs/ladder.py:projected_1m`` with a shorter schedule; each
other arm changes what its name says and has as many parameters. The schedule has 7.4 million
characters (a trial), or, in the few arms whose names end in ``_half``, 50.0 million: the budget of
the arms ``enwik8_KIND_1m_half`` of ``configs/long.py``.
"""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from configs import check_arm, enwik8, ladder, long
from fsn_jax import FSNConfig

STEPS, EVERY = 1800, 450
"""Of a trial, and between its evaluations, on half a million bytes."""
REFERENCE = "projected"
CHANGES: dict[str, dict[str, Any]] = {
    "four_heads": {"num_heads": 4, "heads_per_phase": 2},
    "two_harmonics": {"num_harmonics": 2},
    "eight_layers": {"num_layers": 8},
    "fast_drift": {"rotary_base": 100.0},
}
"""Of the model."""
RATES: dict[str, float] = {"high_rate": 1.75, "low_rate": 0.6}
"""Factors of the peak learning rate."""
RUNS = ("four_heads", "two_harmonics")
"""Changes that have a run of half the budget, too."""
TRIALS = (REFERENCE, *CHANGES, *RATES)
ARMS = (*TRIALS, *(f"{trial}_half" for trial in RUNS))


def get_config(arm: str = REFERENCE) -> ConfigDict:
    """The reference or one change to it; see ``ARMS``."""
    check_arm(arm, ARMS)
    trial = arm.removesuffix("_half")
    if trial == arm:
        config = ladder.get_config("projected_1m")
        config.training.num_steps = STEPS
        config.evaluation.every = config.checkpoints.every = EVERY
        config.evaluation.num_tokens = 2 * enwik8.VALIDATION
    else:
        config = long.get_config("enwik8_projected_1m_half")
    config.name = f"design_{arm}"
    reference = ladder.model_of("projected_1m")
    if trial in CHANGES and isinstance(reference, FSNConfig):
        config.model.update(dataclasses.asdict(enwik8.variant(reference, CHANGES[trial])))
    config.optimizer.peak_learning_rate *= RATES.get(trial, 1.0)
    return config
