"""What earlier versions recorded still loads, as the models that it was."""

import dataclasses
import functools
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax.traverse_util import flatten_dict

from configs import ablations, designs, enwik8, ladder, long, pycode
from fsn_jax import FSN, FSNConfig, Transformer
from fsn_jax.config import recorded_fields
from train.config import ExperimentConfig
from train.old_settings import in_todays_names, read_experiment

RESULTS = Path(__file__).resolve().parent.parent / "results"
RECORDS = sorted(file.parent for file in RESULTS.rglob("config.json"))


def test_there_are_records():
    assert len(RECORDS) > 100
    scores = {
        json.loads((r / "config.json").read_text(encoding="utf-8"))["model"].get("score")
        for r in RECORDS
    }
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
    config = read_experiment((record / "config.json").read_text(encoding="utf-8")).model
    if (record / "summary.json").is_file():
        summary = json.loads((record / "summary.json").read_text(encoding="utf-8"))
        assert config.num_params() == summary["parameters"]
    if (record / "parameters.txt").is_file():
        lines = [
            x.split()
            for x in (record / "parameters.txt").read_text(encoding="utf-8").splitlines()
            if "(" in x
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
        ({}, {"score": "projected", "score_scope": "all", "similarity_heads": 0}),
        ({"num_heads": 4}, {"num_heads": 4, "heads_per_phase": 1}),
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


@pytest.mark.parametrize(
    ("name", "recorded", "other"),
    [
        ("kernel_init", "first_harmonic", "sawtooth"),
        ("score_harmonics", 1, 2),
        ("drift_share", 1.0, 0.5),
    ],
)
def test_a_removed_setting_loads_with_the_value_that_every_record_has(name, recorded, other):
    assert name not in recorded_fields(FSNConfig, {name: recorded})
    with pytest.raises(TypeError, match=name):
        FSNConfig(**recorded_fields(FSNConfig, {name: other}))


FORMER = {"architecture": "fsn"}


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ("enwik8_fsn_pocket_seed1", "enwik8_projected_pocket_seed1"),
        ("enwik8_fsn_pocket_short", "enwik8_projected_pocket_short"),
        ("enwik8_one_head_pocket", "enwik8_projected_one_head_pocket"),
        ("pycode_base_1m", "pycode_projected_base_1m"),
        ("ladder_fsn_60k_seed2", "ladder_projected_60k_seed2"),
        ("my_enwik8_fsn_pocket", "my_enwik8_fsn_pocket"),
        ("enwik8_fsnow", "enwik8_fsnow"),
    ],
)
def test_the_fsn_before_the_published_form_is_called_projected(before, now):
    assert in_todays_names({"name": before, "model": FORMER})["name"] == now
    # Neither the name of a transformer nor that of a run of this version is changed.
    for model in ({"architecture": "transformer"}, {**FORMER, "score_scope": "all"}):
        assert in_todays_names({"name": before, "model": model})["name"] == before
    today = in_todays_names({"name": before, "model": FORMER})
    assert in_todays_names(today) == today


RECORDED_RUNS = sorted(file.parent for file in RESULTS.glob("*/config.json"))
FILES = {
    "enwik8": enwik8,
    "pycode": pycode,
    "ladder": ladder,
    "ablation": ablations,
    "design": designs,
}
OF_OPTIONS = {"enwik8_projected_pocket_short", "enwik8_projected_one_head_pocket"}


@pytest.mark.parametrize("record", RECORDED_RUNS, ids=lambda folder: folder.name)
def test_a_record_is_called_as_the_arm_that_still_makes_it(record):
    experiment = read_experiment((record / "config.json").read_text(encoding="utf-8"))
    run = re.sub(r"_seed\d+$", "", record.name)
    assert experiment.name in (run, record.name)
    family, _, arm = run.partition("_")
    if run in OF_OPTIONS or family == "quickstart":
        return
    if family != "design" and run.endswith(("_long", "_half")):
        settings = long.get_config(run.removesuffix("_long"))
    else:
        assert family in FILES, "an arm of no file of configs/: see docs/extend.md"
        settings = FILES[family].get_config(arm)
    config = ExperimentConfig.from_config_dict(settings)
    assert config.name == run
    assert config.model == experiment.model
    assert config.optimizer == experiment.optimizer
    assert config.training.num_steps == experiment.training.num_steps
    assert config.evaluation.num_tokens == experiment.evaluation.num_tokens
    assert config.evaluation.every == experiment.evaluation.every
