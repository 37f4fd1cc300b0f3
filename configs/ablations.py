"""One change at a time to the pocket FSN: ``--config=configs/ablations.py:ARM``.

Budget, data and optimizer are those of ``configs/enwik8.py:fsn_pocket``; parameters are not matched
again, so that an arm differs in what it names and in nothing else.
"""

from ml_collections import ConfigDict

from configs import enwik8

CHANGES: dict[str, dict[str, object]] = {
    "no_delay": {"delay": False},
    "no_angles": {"static_angles": False},
    "one_head_per_phase": {"heads_per_phase": 1},
    "two_heads_per_phase": {"heads_per_phase": 2},
    "two_harmonics": {"num_harmonics": 2},
    "three_harmonics": {"num_harmonics": 3},
    "four_harmonics": {"num_harmonics": 4},
    "non_negative": {"signed_harmonics": False},
    "linear_values": {"values": "linear"},
    "no_feedforward": {"feedforward": "none"},
    "gated_score": {"score": "gated", "score_phases": 0},
    "static_score": {"score": "static", "score_phases": 0},
    "no_score": {"score": "none", "score_phases": 0},
}
ARMS = tuple(CHANGES)


def get_config(arm: str = "no_delay") -> ConfigDict:
    """The pocket FSN with one change."""
    if arm not in CHANGES:
        raise ValueError(f"the arm after the colon must be one of {', '.join(ARMS)}; got {arm!r}")
    config = enwik8.get_config("fsn_pocket")
    config.name = f"ablation_{arm}"
    config.model.update(CHANGES[arm])
    return config
