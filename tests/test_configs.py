"""Every file under configs/: each of its arms is valid, knows its size, and takes a step."""

import dataclasses
import functools
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from small_runs import mesh_of

from configs import ablations, designs, enwik8, ladder, long
from fsn_jax import TransformerConfig
from fsn_jax.hub import build_model
from train.config import ExperimentConfig, ModelConfig
from train.errors import UserError
from train.flags import load_config, parse_config
from train.ladder import plan
from train.old_settings import read_experiment
from train.optimizer import make_optimizer
from train.plan import check_devices, train_steps_of
from train.step import abstract_state, init_state

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "configs"
FILES = sorted(FOLDER.glob("[!_]*.py"))
ARMS = [
    f"{file}:{arm}" if arm else str(file)
    for file in FILES
    for arm in runpy.run_path(str(file)).get("ARMS", ("",))
]


def short_name(argument: object) -> str:
    return Path(str(argument)).name


each_arm = pytest.mark.parametrize("argument", ARMS, ids=short_name)


@functools.cache
def config_of(argument: str) -> ConfigDict:
    config = load_config(argument)
    if config.data.name in ("text", "codeparrot"):
        config.data.path = "a path of the user's"
    return config


@functools.cache
def experiment_of(argument: str) -> ExperimentConfig:
    return ExperimentConfig.from_config_dict(config_of(argument))


def shallow(config: ExperimentConfig) -> ExperimentConfig:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, num_layers=1))


def steps_of(config: ExperimentConfig, context: int) -> tuple[Any, ...]:
    """The model, the optimizer and the compiled step of a config on one device."""
    model = build_model(config.model)
    optimizer = make_optimizer(config.optimizer, config.training.num_steps)
    data = dataclasses.replace(config.data, context=context, placement="host")
    config = dataclasses.replace(config, data=data)
    step = train_steps_of(config, model, optimizer, mesh_of(1))
    return model, optimizer, step


@pytest.mark.parametrize("arm", ["transformer", "shifted"])
@pytest.mark.parametrize("vocab_size", [2, 100, 205, 256, 3000])
def test_the_arms_of_ones_own_text_have_one_size_at_its_vocabulary(vocab_size, arm):
    fsn, transformer = (
        experiment_of(f"configs/text.py{arm}").with_vocabulary(vocab_size)
        for arm in ("", f":{arm}")
    )
    assert transformer.model.num_params() == pytest.approx(fsn.model.num_params(), rel=0.002)
    assert transformer.model.vocab_size == fsn.model.vocab_size == vocab_size
    # What is recorded is settled: a resumed run reads the same.
    assert transformer.match is None
    assert read_experiment(json.dumps(transformer.to_dict())) == transformer


def test_what_an_arm_is_matched_to_can_be_set_and_must_fit():
    flags = ["--config=configs/text.py:transformer", "--config.data.path=x"]
    wider = parse_config(["train", *flags, "--config.match.feedforward_width=400"])
    narrow = parse_config(["train", *flags]).with_vocabulary(100)
    assert wider.with_vocabulary(100).model.num_params() > narrow.model.num_params() + 50_000
    own = parse_config(["train", *flags, "--config.model.feedforward_width=500"])
    assert own.with_vocabulary(100).model.feedforward_width == 500
    with pytest.raises(UserError, match=r"config\.match\.architecture must be one of .*'rnn'"):
        parse_config(["train", *flags, "--config.match.architecture=rnn"])
    tiny = parse_config(["train", *flags, "--config.model.num_layers=40"])
    with pytest.raises(UserError, match=r"config\.match cannot be matched: .* fewer than"):
        tiny.with_vocabulary(100)


LOAD = "import sys; from train.flags import load_config; load_config(sys.argv[1])"


def test_a_config_may_import_what_lies_beside_it_from_anywhere(tmp_path):
    """In a process of its own, since here ``configs`` is imported."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "__init__.py").touch()
    (tmp_path / "configs" / "base.py").write_text("NAME = 'beside'", encoding="utf-8")
    (tmp_path / "configs" / "own.py").write_text(
        "from configs.base import NAME\n\ndef get_config():\n    raise ValueError(NAME)\n",
        encoding="utf-8",
    )
    (tmp_path / "elsewhere").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", LOAD, "../configs/own.py"],
        cwd=tmp_path / "elsewhere",
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert "beside" in done.stderr.splitlines()[-1]


def test_there_are_configs():
    assert {file.stem for file in FILES} >= {
        "quickstart", "enwik8", "pycode", "text", "finetune", "ablations", "designs", "ladder",
        "long",
    }  # fmt: skip


@functools.cache
def size_of(model: ModelConfig) -> int:
    """The number of parameters that the model makes; its reference makes them in fewest steps."""
    model = dataclasses.replace(model, implementation="reference")
    tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    tree = jax.eval_shape(build_model(model).init, jax.random.key(0), tokens)
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@each_arm
def test_a_config_is_valid_and_knows_its_size(argument):
    config = experiment_of(argument)
    check_devices(config, 1)
    whole = "pocket" in argument and "ablations" not in argument
    model = config.model if whole else shallow(config).model
    assert size_of(model) == model.num_params()
    assert read_experiment(config_of(argument).to_json()) == config


def test_the_file_of_the_guide_is_a_file_of_arms(tmp_path):
    """docs/extend.md."""
    page = (FOLDER.parent / "docs" / "extend.md").read_text(encoding="utf-8")
    _, file = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "depth.py").write_text(file, encoding="utf-8")
    deep, shallow = (experiment_of(f"{tmp_path}/depth.py:{arm}") for arm in ("deep", "shallow"))
    assert (deep.model.num_layers, shallow.model.num_layers) == (8, 2)
    assert deep.model.num_params() == pytest.approx(shallow.model.num_params(), rel=0.01)


def test_each_run_has_a_folder_of_its_own():
    names = [config_of(argument).name for argument in ARMS]
    assert len(set(names)) == len(names)


def matched_to_a_transformer(file: str, fsn: str, transformer: str) -> tuple[ExperimentConfig, ...]:
    """Checks that two arms of a rung differ in the model and its tuning alone; returns both."""
    one, other = (experiment_of(f"{FOLDER}/{file}:{arm}") for arm in (fsn, transformer))
    assert one.model.num_params() == pytest.approx(other.model.num_params(), rel=0.01)
    for part in ("data", "training", "evaluation", "checkpoints", "seed"):
        assert getattr(one, part) == getattr(other, part), part
    tuned = {"peak_learning_rate", "angle_factor", "weight_decay"}
    assert changed(one.optimizer, other.optimizer) <= tuned
    return one, other


@pytest.mark.parametrize("name", ladder.RUNGS)
def test_a_rung_is_the_size_it_is_called_by_and_its_arms_are_matched(name):
    for kind in ladder.RUNGS[name].kinds:
        one, _ = matched_to_a_transformer("ladder.py", f"{kind}_{name}", f"transformer_{name}")
        if name != "pocket":
            size = float(name[:-1]) * {"k": 1e3, "m": 1e6}[name[-1]]
            assert one.model.num_params() == pytest.approx(size, rel=0.01)


@pytest.mark.parametrize("file", ["enwik8.py", "pycode.py", "long.py"])
def test_the_arms_of_a_rung_are_matched(file):
    arms = runpy.run_path(str(FOLDER / file))["ARMS"]
    assert all(any(f"{kind}_" in arm for arm in arms) for kind in enwik8.KINDS)
    for arm in arms:
        kind = next(kind for kind in sorted(enwik8.POCKET, key=len)[::-1] if f"{kind}_" in arm)
        matched_to_a_transformer(file, arm, arm.replace(kind, "transformer"))


def test_the_published_form_has_no_matrix_but_those_of_its_feed_forward():
    """Neither its score nor its coupling: gates, angles and a kernel, one entry a phase."""
    for model in (enwik8.FSN_POCKET, enwik8.FSN_1M):
        tokens = jnp.zeros((1, 2), jnp.int32)
        params = jax.eval_shape(build_model(model).init, jax.random.key(0), tokens)["params"]
        paths = jax.tree_util.tree_flatten_with_path(params["block_0"])[0]
        square = {
            jax.tree_util.keystr(path)
            for path, leaf in paths
            if sum(size >= model.num_phases // 2 for size in leaf.shape) > 1
        }
        assert square
        assert all("feedforward" in path for path in square), square


def test_every_study_records_the_loss_on_copy_events():
    for argument in ARMS:
        assert experiment_of(argument).evaluation.copy_depth == (
            0 if short_name(argument).startswith(("quickstart", "text", "finetune")) else 4
        )


LONG = [f"long.py:{arm}" for arm in long.ARMS] + [
    f"ladder.py:{kind}_{rung}" for kind in enwik8.KINDS for rung in ("1m", "500k")
]


@pytest.mark.parametrize("argument", LONG)
def test_long_runs_are_evaluated_as_their_plan_says(argument):
    """docs/history/protocol.md, "Long runs"."""
    config = experiment_of(f"{FOLDER}/{argument}")
    seen = config.training.num_steps * config.characters_per_step
    short = argument.endswith("_half") or "500k" in argument
    assert seen == pytest.approx(50e6 if short else 100e6, rel=0.01)
    assert config.evaluation.num_tokens == 1_000_000
    evaluations = 10 if argument.endswith("_half") else 20
    assert config.training.num_steps == evaluations * config.evaluation.every
    assert config.checkpoints.every == config.evaluation.every


def test_the_commands_of_the_long_runs_are_those_of_arms():
    commands = long.__doc__.replace("\\\n", " ").split("python -m train ")[1:]
    planned = []
    for words in (command.split() for command in commands):
        assert words[0] == "ladder"
        options = dict(word[2:].split("=") for word in words[1:] if word.startswith("--"))
        seeds = [int(seed) for seed in options["seeds"].split(",")]
        arms = options["arms"].split(",")
        jobs = plan(str(FOLDER.parent / options["config"]), arms, seeds, [])
        planned += [job.name for job in jobs]
    assert len(set(planned)) == len(planned) == 35


@pytest.mark.parametrize("name", ladder.RUNGS)
def test_the_page_of_the_ladder_states_each_budget(name):
    """If the pocket design changed, write the new figures into the table of configs/ladder.py."""
    row = next(r for r in ladder.__doc__.splitlines() if r.startswith(f"{name} "))
    _, parameters, layers, characters, _, *flops = row.split()
    for kind, stated in zip(("fsn", "projected", "transformer"), flops, strict=True):
        config = experiment_of(f"{FOLDER}/ladder.py:{kind}_{name}")
        seen = config.training.num_steps * config.characters_per_step
        assert seen == pytest.approx(float(characters.removesuffix("M")) * 1e6, rel=0.02)
        assert config.model.num_params() == pytest.approx(
            float(parameters.removesuffix("M")) * 1e6, rel=0.02
        )
        assert config.model.num_layers == int(layers)
        spent = seen * config.model.flops_per_token(config.data.context)
        assert spent == pytest.approx(float(stated), rel=0.05)


def test_the_rungs_keep_the_design_of_the_pocket_arm():
    """A rung is wider and deeper; each switch is that of the tuned arm."""
    sizes = {
        "num_layers", "num_phases", "num_heads", "heads_per_phase", "score_phases",
        "feedforward_width", "num_modes", "width",
    }  # fmt: skip
    for arm in ladder.ARMS:
        kind, _ = arm.split("_")
        assert changed(enwik8.POCKET[kind], ladder.model_of(arm)) <= sizes


def changed(one: Any, other: Any) -> set[str]:
    """The fields in which two models differ."""
    mine, others = dataclasses.asdict(one), dataclasses.asdict(other)
    return {name for name in mine if mine[name] != others[name]}


# What each arm is called by: the fields that may differ from the reference, and their value there.
NAMED = {
    "no_delay": ("delay", False),
    "no_angles": ("static_angles", False),
    "no_score_angles": ("score_angles", False),
    "non_negative": ("signed_harmonics", False),
    "linear_values": ("values", "linear"),
    "no_field_features": ("field_features", False),
    "field_features": ("field_features", True),
    "both_quadratures": ("features", "phasor"),
    "one_quadrature": ("features", "quadrature"),
    "no_feedforward": ("feedforward", "none"),
    "one_harmonic": ("num_harmonics", 1),
    "two_harmonics": ("num_harmonics", 2),
    "three_harmonics": ("num_harmonics", 3),
    "four_harmonics": ("num_harmonics", 4),
    "one_head_per_phase": ("heads_per_phase", 1),
    "all_phases": ("score_scope", "all"),
    "dense_modes": ("mode_weights", "dense"),
    "no_similarity_head": ("similarity_heads", 0),
    "only_similarity_heads": ("similarity_heads", 2),
    "four_heads": ("num_heads", 4),
    "projected_score": ("score", "projected"),
    "gated_score": ("score", "content_gated"),
    "content_gates": ("score", "content_gated"),
    "static_score": ("score", "gated"),
    "no_score": ("score", "none"),
}
CHANGES = [*ablations.PROJECTED_CHANGES, *ablations.PUBLISHED_CHANGES]


@pytest.mark.parametrize("arm", CHANGES)
def test_an_ablation_changes_what_it_is_called_and_nothing_else(arm):
    published = arm.startswith("published_")
    field, value = NAMED[arm.removeprefix("published_")]
    reference, model = ablations.reference_of(arm), ablations.model_of(arm)
    assert reference == enwik8.POCKET["fsn" if published else "projected"]
    assert getattr(model, field) == value != getattr(reference, field)
    # The width restores the size; some fields belong to one value of another alone.
    belong = {
        "score": {"score_phases", "similarity_heads", "score_scope"},
        "values": {"field_features"},
        "mode_weights": {"feedforward", "num_modes"},
        "num_heads": {"heads_per_phase"},  # a phase hears all of them, as in the reference
    }
    allowed = {field, "feedforward_width"} | belong.get(field, set())
    assert field in changed(reference, model) <= allowed
    if not arm.endswith("no_feedforward"):
        assert model.num_params() == pytest.approx(reference.num_params(), rel=0.01)
    there = config_of(f"{FOLDER}/ablations.py:{arm}").to_dict()
    unchanged = "published" if published else "fsn"
    beside = config_of(f"{FOLDER}/ablations.py:{unchanged}").to_dict()
    for config in (there, beside):
        del config["name"], config["model"]
    assert there == beside


@pytest.mark.parametrize("arm", [arm for arm in designs.ARMS if arm not in designs.REFERENCES])
def test_a_design_changes_what_it_is_called_and_nothing_else(arm):
    """A trial differs from the reference, a run of half the budget from the long run."""
    trial = arm.removesuffix("_half")
    kind = designs.reference_of(trial)
    beside = f"designs.py:{kind}" if trial == arm else f"long.py:enwik8_{kind}_1m_half"
    there, reference = (experiment_of(f"{FOLDER}/{name}") for name in (f"designs.py:{arm}", beside))
    rate = designs.RATES.get(trial, 1.0) * reference.optimizer.peak_learning_rate
    assert there.optimizer.peak_learning_rate == pytest.approx(rate)
    assert there.model.num_params() == pytest.approx(reference.model.num_params(), rel=0.002)
    width = {"feedforward_width"} if trial in designs.CHANGES else set()
    assert changed(reference.model, there.model) <= {*designs.CHANGES.get(trial, ()), *width}
    assert (there.model, there.optimizer) != (reference.model, reference.optimizer)
    for part in ("data", "training", "evaluation", "checkpoints", "seed"):
        assert getattr(there, part) == getattr(reference, part)


@pytest.mark.parametrize("arm", ablations.KINDS)
def test_a_pocket_arm_among_the_ablations_is_that_arm_with_a_third_of_the_steps(arm):
    there = config_of(f"{FOLDER}/ablations.py:{arm}").to_dict()
    beside = config_of(f"{FOLDER}/enwik8.py:{ablations.KINDS[arm]}_pocket").to_dict()
    steps = there["training"].pop("num_steps"), beside["training"].pop("num_steps")
    assert steps == pytest.approx((5000 / 3, 5000), rel=0.06)
    assert there.pop("name") == f"ablation_{arm}" != beside.pop("name")
    assert there == beside


@pytest.mark.parametrize("form", ["published", "projected"])
def test_every_value_of_a_switch_is_the_reference_or_an_arm(form):
    of = {"published": ablations.PUBLISHED_CHANGES, "projected": ablations.PROJECTED_CHANGES}[form]
    reference = {"published": ablations.PUBLISHED, "projected": ablations.PROJECTED}[form]
    modes = enwik8.POCKET[{"published": "modes", "projected": "projected_modes"}[form]]
    arms = [*map(ablations.model_of, of), reference, modes]
    assert {m.num_harmonics for m in arms} >= {1, 2, 3}
    assert {m.score for m in arms} == {"projected", "gated", "content_gated", "none"}
    for switch in ("delay", "static_angles", "signed_harmonics", "field_features"):
        assert {getattr(m, switch) for m in arms} == {True, False}
    assert {m.values for m in arms} == {"circular", "linear"}
    assert {m.features for m in arms} == {"phasor", "quadrature"}
    assert {m.feedforward for m in arms} == {"swiglu", "collective_modes", "none"}


def program_of(config: ExperimentConfig) -> Any:
    """The settings that choose the code of the step, but for those that test_fsn.py combines."""
    names = (
        "score", "values", "feedforward", "mode_weights", "field_features", "features", "delay",
        "heads_per_phase", "static_angles",
    )  # fmt: skip
    if isinstance(config.model, TransformerConfig):
        names = ("token_shift", "tied_embedding")
    training = config.training
    return (
        type(config.model),
        *(getattr(config.model, name) for name in (*names, "remat")),
        config.optimizer.matrices,
        (training.layout, training.accumulation_steps, training.steps_per_dispatch == 1),
    )


DISTINCT = {program_of(experiment_of(argument)): argument for argument in ARMS}


@pytest.mark.parametrize("argument", DISTINCT.values(), ids=short_name)
def test_a_step_of_a_config_can_be_traced(argument):
    """With its own batch and context, and one of its layers, which are all alike.

    One arm for each program; the slow test below takes a step of every arm.
    """
    config = shallow(experiment_of(argument))
    context = config.data.context
    model, optimizer, step = steps_of(config, context)
    state = abstract_state(model, optimizer, mesh=mesh_of(1))
    shape = (config.training.steps_per_dispatch, config.training.batch_size, context + 1)
    after, tally = jax.eval_shape(step, state, jax.ShapeDtypeStruct(shape, jnp.uint8))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), after) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), state
    )
    assert (tally.loss.shape, tally.loss.dtype) == ((), jnp.float32)


def check_a_step(config: ExperimentConfig) -> None:
    """On two windows of eight random characters."""
    config = dataclasses.replace(
        config, training=dataclasses.replace(config.training, accumulation_steps=1)
    )
    model, optimizer, step = steps_of(config, context=8)
    windows = np.random.default_rng(0).integers(0, config.model.vocab_size, (1, 2, 9))
    state = init_state(model, optimizer, seed=config.seed, mesh=mesh_of(1))
    _, tally = step(state, windows.astype(np.uint8))
    assert int(tally.steps) == 1
    assert float(tally.loss) == pytest.approx(np.log(config.model.vocab_size), rel=0.5)
    assert float(tally.grad_norm) > 0


@pytest.mark.parametrize("arm", ["quickstart.py", "enwik8.py:transformer_pocket"])
def test_a_config_with_one_of_its_layers_takes_a_step(arm):
    """The slow test below has every arm, and all the layers."""
    check_a_step(shallow(experiment_of(f"{FOLDER}/{arm}")))


@pytest.mark.slow
@each_arm
def test_a_config_takes_a_step(argument):
    check_a_step(experiment_of(argument))


RECORDED = sorted((FOLDER.parent / "results").glob("*/config.json"))


@pytest.mark.parametrize("file", RECORDED, ids=lambda file: file.parent.name)
def test_recorded_settings_still_load(file):
    recorded = json.loads(file.read_text(encoding="utf-8"))
    experiment = read_experiment(file.read_text(encoding="utf-8"))
    evaluation, training = recorded["evaluation"], recorded["training"]
    slice_ = evaluation["num_bytes"] if "num_bytes" in evaluation else evaluation["num_tokens"]
    assert experiment.evaluation.num_tokens == slice_
    former = training.get("parameters", "replicated")
    assert experiment.training.layout == training.get("layout", former)
    assert read_experiment(json.dumps(experiment.to_dict())) == experiment
