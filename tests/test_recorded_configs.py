"""What earlier versions recorded still loads, as the models that it was."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax.traverse_util import flatten_dict

from fsn_jax import FSN, FSNConfig, Transformer
from fsn_jax.config import recorded_fields
from train.recorded import read_experiment

RESULTS = Path(__file__).resolve().parent.parent / "results"
RECORDS = sorted(file.parent for file in RESULTS.rglob("config.json"))


def test_there_are_records():
    assert len(RECORDS) > 100
    scores = {json.loads((r / "config.json").read_text())["model"].get("score") for r in RECORDS}
    assert scores >= {"gated", "static", "projected", "none", None}


@functools.cache
def leaves_of(config):
    """Path and shape of every parameter of a model."""
    model = FSN(config) if isinstance(config, FSNConfig) else Transformer(config)
    tree = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    return {path: leaf.shape for path, leaf in flatten_dict(tree, sep="/").items()}


@pytest.mark.parametrize("record", RECORDS, ids=lambda folder: folder.name)
def test_a_recorded_model_is_built_with_its_parameters(record):
    """The number of all; path and shape of those of the first block, the embedding, the readout."""
    config = read_experiment((record / "config.json").read_text()).model
    if (record / "summary.json").is_file():
        summary = json.loads((record / "summary.json").read_text())
        assert config.num_params() == summary["parameters"]
    if (record / "parameters.txt").is_file():
        lines = [
            x.split() for x in (record / "parameters.txt").read_text().splitlines() if "(" in x
        ]
        recorded = {
            path: tuple(int(size) for size in " ".join(shape).strip("(),").split(","))
            for path, *shape, _ in lines
            if not path.startswith("block_") or path.startswith("block_0/")
        }
        assert leaves_of(dataclasses.replace(config, num_layers=1)) == recorded


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ({}, {"score": "projected", "score_scope": "all"}),
        ({"score": "gated"}, {"score": "content_gated", "score_scope": "block"}),
        ({"score": "static"}, {"score": "gated", "score_scope": "block"}),
        ({"score": "gated", "score_scope": "all"}, {"score": "gated", "score_scope": "all"}),
    ],
)
def test_scores_have_todays_names(before, now):
    fields = recorded_fields(FSNConfig, before)
    assert {name: fields[name] for name in now} == now
    assert fields["kernel_angle"] == (0.0 if "score_scope" not in before else 0.1)
    config = FSNConfig(**fields)
    assert recorded_fields(FSNConfig, dataclasses.asdict(config)) == dataclasses.asdict(config)
