"""One change at a time to the pocket FSN: ``--config=configs/ablations.py:ARM``.

Data and optimizer are those of ``configs/enwik8.py:fsn_pocket``, the budget is a third of its. The
arm ``fsn`` is the reference of the others; it, ``transformer``, ``base`` and ``modes`` are the
pocket arms of that file within this budget. An arm whose change takes or adds more than 1% of the
parameters gets them back in the width of its feed-forward; ``no_feedforward`` has none and is
smaller.
"""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from configs import enwik8
from fsn_jax import FSNConfig
from fsn_jax.config import match_parameters

REFERENCE = enwik8.FSN_POCKET
STEPS = 1750
"""7.2 million characters, with the whole schedule in them."""
POCKET = {arm.removesuffix("_pocket"): arm for arm in enwik8.POCKET}
"""Arms of configs/enwik8.py beside which the others are read, by their names here."""
SCORES: dict[str, dict[str, Any]] = {
    "projected_score": {"score": "projected"},
    "gated_score": {"score": "content_gated", "score_scope": "block"},
    "static_score": {"score": "gated", "score_scope": "block"},
    "no_score": {"score": "none"},
}
"""Scores by the names of their arms, which are those of the recorded runs."""
NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four"}


def score_changes(score: dict[str, Any]) -> dict[str, Any]:
    """Another score, without what belongs to a projected one."""
    projected = score["score"] == "projected"
    return score | ({} if projected else {"score_phases": 0, "similarity_heads": 0})


CHANGES: dict[str, dict[str, Any]] = {
    "no_delay": {"delay": False},
    "no_angles": {"static_angles": False},
    "non_negative": {"signed_harmonics": False},
    "linear_values": {"values": "linear", "field_features": False},
    "no_field_features": {"field_features": False},
    "no_similarity_head": {"similarity_heads": 0},
    "only_similarity_heads": {"similarity_heads": REFERENCE.num_heads},
    "four_heads": {"num_heads": 4, "heads_per_phase": 4},
    "both_quadratures": {"features": "phasor"},
    "no_feedforward": {"feedforward": "none"},
    **{
        f"{word}_harmonic{'s' if number > 1 else ''}": {"num_harmonics": number}
        for number, word in NUMBERS.items()
        if number != REFERENCE.num_harmonics
    },
    **{
        f"{word}_head{'s' if number > 1 else ''}_per_phase": {"heads_per_phase": number}
        for number, word in NUMBERS.items()
        if number != REFERENCE.heads_per_phase and number <= REFERENCE.num_heads
    },
    **{
        name: score_changes(score)
        for name, score in SCORES.items()
        if score["score"] != REFERENCE.score
    },
}
"""What each arm changes in the reference, besides the width that keeps its size."""

ARMS = (*POCKET, *CHANGES)


def model_of(arm: str) -> FSNConfig:
    """The reference with one change, of the same size within 1% where it can be."""
    size = REFERENCE.num_params()
    model = dataclasses.replace(REFERENCE, **CHANGES[arm])
    if model.feedforward == "none" or abs(model.num_params() - size) <= 0.01 * size:
        return model
    return match_parameters(model, size)


def get_config(arm: str = "fsn") -> ConfigDict:
    """The pocket FSN with one change, or one of the pocket arms."""
    if arm not in ARMS:
        raise ValueError(f"the arm after the colon must be one of {', '.join(ARMS)}; got {arm!r}")
    config = enwik8.get_config(POCKET.get(arm, "fsn_pocket"))
    config.name = f"ablation_{arm}"
    config.training.num_steps = STEPS
    if arm in CHANGES:
        config.model.update(dataclasses.asdict(model_of(arm)))
    return config
