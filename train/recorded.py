"""Reads the settings of recorded runs, of this version and of earlier ones."""

import json
from typing import Any

from ml_collections import ConfigDict

from fsn_jax.config import recorded_fields
from train.config import ARCHITECTURES, ExperimentConfig

RENAMED = {("evaluation", "num_bytes"): "num_tokens", ("training", "parameters"): "layout"}
"""Present name of each setting, by its part and former name."""

WITHOUT_EFFECT = frozenset(
    {
        "run_dir",
        "mirror_dir",
        "data.cache_dir",
        "data.path",
        "data.placement",
        "training.layout",
        "training.skipped_limit",
        "checkpoints.keep",
    }
)
"""Settings that do not affect the numbers of a run; they may change when it resumes."""


def in_todays_names(fields: dict[str, Any]) -> dict[str, Any]:
    """Returns the nested settings of a run of any version under their present names."""
    fields = {name: dict(part) if isinstance(part, dict) else part for name, part in fields.items()}
    for (name, old), new in RENAMED.items():
        part = fields.get(name)
        if isinstance(part, dict) and old in part:
            part[new] = part.pop(old)
    model = fields.get("model")
    kind = ARCHITECTURES.get(model.get("architecture", "")) if isinstance(model, dict) else None
    return {**fields, "model": recorded_fields(kind, model)} if kind and model else fields


def read_experiment(text: str) -> ExperimentConfig:
    """Reads the ``config.json`` of a run of any version.

    Raises:
      UserError: a setting has a value that cannot work.
      ValueError: the text is no JSON.
    """
    return ExperimentConfig.from_config_dict(ConfigDict(in_todays_names(json.loads(text))))
