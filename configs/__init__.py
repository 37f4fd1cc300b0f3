"""Experiments: one file a family, each with ``get_config``; see docs/commands.md."""

from collections.abc import Sequence


def check_arm(arm: str, arms: Sequence[str]) -> None:
    """Raises ValueError unless the arm is one of its file's."""
    if arm not in arms:
        raise ValueError(f"the arm after the colon must be one of {', '.join(arms)}; got {arm!r}")
