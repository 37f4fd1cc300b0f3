"""Changes of design and of learning rate at 1M parameters: ``--config=configs/designs.py:ARM``.

``projected`` and ``shifted`` are the references, those kinds of the ``1m`` rung of
``configs/ladder.py`` with a shorter schedule. The other arms change a reference, the projected FSN
where none is named, and have as many parameters. The schedule has 7.4 million characters (a trial),
or, in the few arms whose names end in ``_half``, 50.0 million: the budget of the arms
``enwik8_KIND_1m_half`` of ``configs/long.py``.
"""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from configs import check_arm, enwik8, ladder, long
from fsn_jax import FSNConfig

STEPS, EVERY = 1800, 450
"""Number of steps of a trial, and of steps between its evaluations on half a million bytes."""
REFERENCES = ("projected", "shifted")
CHANGES: dict[str, dict[str, Any]] = {
    "four_heads": {"num_heads": 4, "heads_per_phase": 2},
    "two_harmonics": {"num_harmonics": 2},
    "eight_layers": {"num_layers": 8},
    "fast_drift": {"rotary_base": 100.0},
    "four_layers": {"num_layers": 4},
    "wide": {"num_phases": 144},
    "four_layers_wide": {"num_layers": 4, "num_phases": 144},
}
"""Settings of the model that each trial changes."""
RATES: dict[str, float] = {
    "projected_low_rate": 0.6,
    "projected_high_rate": 1.75,
    "shifted_high_rate": 1.75,
}
"""Factors of the peak learning rate. The high one undoes the factor 64 / 112 of the 1m rung."""
TRIALS = (*REFERENCES, *CHANGES, *RATES)
RUNS = ("four_heads", "two_harmonics", "projected_high_rate", "shifted_high_rate")
"""Trials that have a run of half the budget, too."""
ARMS = (*TRIALS, *(f"{trial}_half" for trial in RUNS))


def reference_of(trial: str) -> str:
    """The reference that a trial changes."""
    return "shifted" if trial.startswith("shifted") else "projected"


def get_config(arm: str = "projected") -> ConfigDict:
    """A reference or one change to it; see ``ARMS``."""
    check_arm(arm, ARMS)
    trial = arm.removesuffix("_half")
    reference = f"{reference_of(trial)}_1m"
    if trial == arm:
        config = ladder.get_config(reference)
        config.training.num_steps = STEPS
        config.evaluation.every = config.checkpoints.every = EVERY
        config.evaluation.num_tokens = 2 * enwik8.VALIDATION
    else:
        config = long.get_config(f"enwik8_{reference}_half")
    config.name = f"design_{arm}"
    model = ladder.model_of(reference)
    if trial in CHANGES and isinstance(model, FSNConfig):
        config.model.update(dataclasses.asdict(enwik8.variant(model, CHANGES[trial])))
    config.optimizer.peak_learning_rate *= RATES.get(trial, 1.0)
    return config
