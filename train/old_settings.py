"""Reads the settings of recorded runs, of this version and of earlier ones."""

import json
import re
from typing import Any

from ml_collections import ConfigDict

from fsn_jax.config import ARCHITECTURES, FSNConfig, recorded_fields
from train.config import ExperimentConfig

RENAMED = {("evaluation", "num_bytes"): "num_tokens", ("training", "parameters"): "layout"}
"""Present name of each setting, by its part and former name."""

_FORMER_ARM = re.compile(r"^(enwik8|enwik8_clock|pycode|ladder)_(fsn|base|modes|one_head)(?=_)")
"""Names of FSNs that now belong to the published form, as ``quickstart`` does."""


def in_todays_names(fields: dict[str, Any]) -> dict[str, Any]:
    """Returns the nested settings of a run of any version under their present names."""
    fields = {name: dict(part) if isinstance(part, dict) else part for name, part in fields.items()}
    for (name, old), new in RENAMED.items():
        part = fields.get(name)
        if isinstance(part, dict) and old in part:
            part[new] = part.pop(old)
    model = fields.get("model")
    kind = ARCHITECTURES.get(model.get("architecture", "")) if isinstance(model, dict) else None
    if not kind or not model:
        return fields
    if kind is FSNConfig and "score_scope" not in model and isinstance(fields.get("name"), str):
        fields["name"] = _in_todays_name(fields["name"])
    return {**fields, "model": recorded_fields(kind, model)}


def _in_todays_name(name: str) -> str:
    """Returns the present name of a run from before the published form was the FSN of configs.

    Then ``fsn`` was the projected form, ``enwik8_base_pocket`` its base layer, and so on.
    """
    if name == "quickstart":
        return "quickstart_projected"
    return _FORMER_ARM.sub(
        lambda found: f"{found[1]}_projected" + ("" if found[2] == "fsn" else f"_{found[2]}"), name
    )


def read_experiment(text: str) -> ExperimentConfig:
    """Reads the ``config.json`` of a run of any version.

    Raises:
      UserError: a setting has a value that cannot work.
      ValueError: the text is no JSON object.
    """
    fields = json.loads(text)
    if not isinstance(fields, dict):
        raise ValueError("no JSON object")
    return ExperimentConfig.from_config_dict(ConfigDict(in_todays_names(fields)))
