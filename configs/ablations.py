"""One change at a time to a pocket FSN: ``--config=configs/ablations.py:ARM``.

There are two references. Arms ``published_*`` change the published form (arm ``published``,
``configs/enwik8.py:fsn_pocket``); the others change the projected form (arm ``fsn``,
``configs/enwik8.py:projected_pocket``) and have the names of the recorded runs. ``transformer`` and
``shifted`` are the opponents. Data and optimizer
are those of the reference, the budget is a third of its. An arm whose change takes or adds more
than 1% of the parameters gets them back in the width of its feed-forward; those without a
feed-forward are smaller.
"""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from configs import check_arm, enwik8
from fsn_jax import FSNConfig
from fsn_jax.config import match_parameters

STEPS = 1750
"""7.2 million characters, with the whole schedule in them."""
KINDS = {
    "fsn": "projected",
    "transformer": "transformer",
    "shifted": "shifted",
    "base": "projected_base",
    "modes": "projected_modes",
    "published": "fsn",
    "published_base": "base",
    "published_modes": "modes",
}
"""Arms that are a kind of configs/enwik8.py within this budget, by their names here."""
PROJECTED = enwik8.PROJECTED_POCKET
PUBLISHED = enwik8.FSN_POCKET

NOT_PROJECTED: dict[str, Any] = {"score_phases": 0, "similarity_heads": 0}
"""Without what belongs to a projected score."""
PROJECTED_CHANGES: dict[str, dict[str, Any]] = {
    "no_delay": {"delay": False},
    "no_angles": {"static_angles": False},
    "non_negative": {"signed_harmonics": False},
    "linear_values": {"values": "linear", "field_features": False},
    "no_field_features": {"field_features": False},
    "no_similarity_head": {"similarity_heads": 0},
    "only_similarity_heads": {"similarity_heads": PROJECTED.num_heads},
    "four_heads": {"num_heads": 4, "heads_per_phase": 4},
    "one_head_per_phase": {"heads_per_phase": 1},
    "both_quadratures": {"features": "phasor"},
    "no_feedforward": {"feedforward": "none"},
    "two_harmonics": {"num_harmonics": 2},
    "three_harmonics": {"num_harmonics": 3},
    "four_harmonics": {"num_harmonics": 4},
    "gated_score": {"score": "content_gated", "score_scope": "block", **NOT_PROJECTED},
    "static_score": {"score": "gated", "score_scope": "block", **NOT_PROJECTED},
    "no_score": {"score": "none", **NOT_PROJECTED},
}
"""What each arm changes in the projected form."""
PUBLISHED_CHANGES: dict[str, dict[str, Any]] = {
    "published_no_delay": {"delay": False},
    "published_no_angles": {"static_angles": False},
    "published_no_score_angles": {"score_angles": False},
    "published_non_negative": {"signed_harmonics": False},
    "published_one_harmonic": {"num_harmonics": 1},
    "published_three_harmonics": {"num_harmonics": 3},
    "published_all_phases": {"score_scope": "all"},
    "published_no_similarity_head": {"similarity_heads": 0},
    "published_one_head_per_phase": {"heads_per_phase": 1},
    "published_four_heads": {"num_heads": 4},
    "published_projected_score": {"score": "projected"},
    "published_content_gates": {"score": "content_gated"},
    "published_no_score": {"score": "none"},
    "published_linear_values": {"values": "linear"},
    "published_field_features": {"field_features": True},
    "published_one_quadrature": {"features": "quadrature"},
    "published_dense_modes": {"feedforward": "collective_modes", "mode_weights": "dense"},
    "published_no_feedforward": {"feedforward": "none"},
}
"""What each arm changes in the published form."""

ARMS = (*KINDS, *PROJECTED_CHANGES, *PUBLISHED_CHANGES)


def reference_of(arm: str) -> FSNConfig:
    """The model that an arm changes."""
    return PUBLISHED if arm in PUBLISHED_CHANGES else PROJECTED


def model_of(arm: str) -> FSNConfig:
    """The reference with one change, of the same size within 1% where it can be."""
    reference = reference_of(arm)
    size = reference.num_params()
    changes = (PROJECTED_CHANGES | PUBLISHED_CHANGES)[arm]
    model = dataclasses.replace(reference, **changes)
    if model.feedforward == "none" or abs(model.num_params() - size) <= 0.01 * size:
        return model
    return match_parameters(model, size)


def get_config(arm: str = "published") -> ConfigDict:
    """A pocket FSN with one change, or one of the pocket arms."""
    check_arm(arm, ARMS)
    unchanged = "fsn" if arm in PUBLISHED_CHANGES else "projected"
    config = enwik8.get_config(f"{KINDS.get(arm, unchanged)}_pocket")
    config.name = f"ablation_{arm}"
    config.training.num_steps = STEPS
    if arm not in KINDS:
        config.model.update(dataclasses.asdict(model_of(arm)))
    return config
