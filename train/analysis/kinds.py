"""Kinds of models: what figures call them, and in which colour they draw them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

COLOURS = {
    "FSN, projected form": "C0",
    "transformer": "C1",
    "transformer with token shift": "C2",
    "FSN, published form": "C4",
    "base layer": "C5",
    "FSN with collective modes": "C6",
}
"""By kind, the same in every figure."""


class Style(NamedTuple):
    """How an arm is drawn: ``label`` in the legend, and ``colour``."""

    label: str
    colour: str


def kind_of(model: Mapping[str, Any]) -> str:
    """Returns the kind of a model, a key of ``COLOURS``, or ``FSN`` for any other FSN.

    Args:
      model: settings of a run, as under ``model`` in its ``config.json``.
    """
    if model["architecture"] != "fsn":
        return "transformer" + " with token shift" * (model["token_shift"] != "none")
    if model["values"] != "circular":
        return "FSN"
    if not any(model[part] for part in ("delay", "signed_harmonics", "static_angles")):
        return "base layer"
    if model["feedforward"] == "collective_modes":
        return "FSN with collective modes"
    return {"projected": "FSN, projected form", "gated": "FSN, published form"}.get(
        model["score"], "FSN"
    )


def styles(kinds: Mapping[str, str]) -> dict[str, Style]:
    """Returns the style of each arm: that of its kind, or its name where two arms share a kind.

    Args:
      kinds: the kind of each arm, by its name.
    """
    if len(set(kinds.values())) == len(kinds) and set(kinds.values()) <= COLOURS.keys():
        return {name: Style(kind, COLOURS[kind]) for name, kind in kinds.items()}
    return {name: Style(name, f"C{index}") for index, name in enumerate(kinds)}
