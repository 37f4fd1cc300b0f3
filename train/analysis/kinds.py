"""Kinds of models: what figures call them, and in which colour they draw them."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

COLOURS = {
    "FSN, projected form": "C0",
    "transformer": "C1",
    "transformer with token shift": "C2",
    "FSN, published form": "C4",
    "base layer": "C5",
    "FSN with collective modes": "C6",
}
"""By kind, wherever each arm of a figure is of another kind."""

_FRUSTRATED: dict[str, Any] = {
    "architecture": "fsn",
    "values": "circular",
    "delay": True,
    "signed_harmonics": True,
    "static_angles": True,
    "similarity_heads": 1,
}
_SETTINGS: dict[str, dict[str, Any]] = {
    "FSN, published form": _FRUSTRATED
    | {
        "score": "gated",
        "score_angles": True,
        "num_harmonics": 2,
        "feedforward": "swiglu",
        "field_features": False,
    },
    "FSN, projected form": _FRUSTRATED
    | {
        "score": "projected",
        "num_harmonics": 1,
        "feedforward": "swiglu",
        "field_features": True,
    },
    "FSN with collective modes": _FRUSTRATED | {"feedforward": "collective_modes"},
    "base layer": _FRUSTRATED
    | {"delay": False, "signed_harmonics": False, "static_angles": False, "num_harmonics": 1},
    "transformer": {"architecture": "transformer", "token_shift": "none"},
    "transformer with token shift": {
        "architecture": "transformer",
        "token_shift": "queries_and_keys",
    },
}
"""What makes a model one of a kind; its size, heads and widths do not."""


class Style(NamedTuple):
    """How an arm is drawn: ``label`` in the legend, and ``colour``."""

    label: str
    colour: str


def kind_of(model: Mapping[str, Any]) -> str:
    """Returns the kind of a model, a key of ``COLOURS``, or the architecture of any other one.

    Args:
      model: settings of a run, as under ``model`` in its ``config.json``.
    """
    for kind, settings in _SETTINGS.items():
        if all(model.get(name) == value for name, value in settings.items()):
            return kind
    return str(model["architecture"])


def styles(arms: Sequence[tuple[str, str]]) -> list[Style]:
    """Returns the style of each arm: that of its kind, or its name where two arms share a kind.

    Args:
      arms: name and kind of each.
    """
    kinds = {kind for _, kind in arms}
    if len(kinds) == len(arms) and kinds <= COLOURS.keys():
        return [Style(kind, COLOURS[kind]) for _, kind in arms]
    return [Style(name, f"C{index}") for index, (name, _) in enumerate(arms)]
