"""A run that begins with an exported model: its parameters, token by token, and what is refused."""

import dataclasses
import itertools
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_runs
from flax.traverse_util import flatten_dict

from fsn_jax import FSNConfig, hub
from fsn_jax.hub import build_model
from fsn_jax.vocabulary import Vocabulary
from train import export
from train.config import ExperimentConfig
from train.errors import UserError
from train.evaluate import Evaluator
from train.files import file_sha256
from train.flags import parse_config
from train.init_from import begin, check_init_from, new_tokens
from train.main import program
from train.mesh import data_mesh, shardings
from train.run import open_run

ROOT = Path(__file__).resolve().parent.parent
OTHER = b"bdf hjz"  # b, d, f, h and j are letters of the exported model
MODELS = {
    "fsn": small_runs.TINY_FSN,
    "transformer": small_runs.TINY_TRANSFORMER,
    "tied": dataclasses.replace(small_runs.TINY_TRANSFORMER, tied_embedding=True),
}


@pytest.fixture(scope="module", params=MODELS)
def exported(request, tmp_path_factory):
    """The name of a model, the folder of its export, and a corpus with another alphabet."""
    here = tmp_path_factory.mktemp(request.param)
    corpus = small_runs.write_corpus(here / "corpus")
    model = MODELS[request.param]
    experiment = small_runs.tiny_experiment(
        corpus.folder, here / "run", model=model, training__num_steps=10
    )
    small_runs.run_to_the_end(experiment, corpus)
    export.program(["export", str(here / "run"), str(here / "model"), "--no_sampler"])
    alphabet = bytes(sorted(OTHER))
    texts = {
        "train": small_runs.text_of(2000, 3, alphabet),
        "validation": small_runs.text_of(200, 4, alphabet),
    }
    other = small_runs.write_corpus(here / "other", **texts, alphabet=alphabet)
    return model, here / "model", other


def experiment_from(exported, run_dir, **changes) -> ExperimentConfig:
    model, folder, corpus = exported
    settings = {"init_from": str(folder), "model__vocab_size": 0, **changes}
    config = small_runs.tiny_experiment(corpus.folder, run_dir, model=model, **settings)
    return config.with_vocabulary(len(corpus.vocabulary))


def fresh_params(experiment):
    tokens = jnp.zeros((1, 2), jnp.int32)
    params = build_model(experiment.model).init(jax.random.key(9), tokens)["params"]
    return jax.device_put(params, shardings(params, data_mesh(), "sharded"))


def test_a_token_takes_the_parameters_of_its_byte(exported, tmp_path):
    _, folder, corpus = exported
    experiment = experiment_from(exported, tmp_path / "run")
    fresh = fresh_params(experiment)
    begun = begin(experiment, corpus.vocabulary, fresh)
    assert begun.weights_sha256 == file_sha256(folder / hub.WEIGHTS)
    assert begun.new_tokens == ["b' '", "b'z'"]
    source = flatten_dict(hub.load(folder).params, sep="/")
    own, fresh = flatten_dict(begun.params, sep="/"), flatten_dict(fresh, sep="/")
    assert own.keys() == source.keys() == fresh.keys()
    # The axis of tokens, by name; everything else is the exported model's.
    of_tokens = {"embedding/angles": 0, "embedding/embedding": 0}
    of_tokens |= {"readout/kernel": 1, "readout/bias": 0}
    tied = getattr(experiment.model, "tied_embedding", False)
    has_bias = isinstance(experiment.model, FSNConfig)
    assert len(own.keys() & of_tokens.keys()) == 2 - tied + has_bias
    for name, values in own.items():
        assert values.sharding == fresh[name].sharding
        if name not in of_tokens:
            np.testing.assert_array_equal(values, source[name])
            continue
        rows, before, given = (
            np.moveaxis(np.asarray(x), of_tokens[name], 0)
            for x in (values, fresh[name], source[name])
        )
        for token, byte in enumerate(sorted(OTHER)):
            known = small_runs.ALPHABET.find(bytes([byte]))
            want = before[token] if known < 0 else given[known]
            np.testing.assert_array_equal(rows[token], want)


def test_new_tokens_are_named():
    of_bytes, of_more = (Vocabulary.from_text(text) for text in ("61", "6162ff"))
    assert new_tokens(of_bytes, of_more) == ["b'b'", "b'\\xff'"]
    assert new_tokens(of_more, of_bytes) == []
    latin, german = (Vocabulary.from_text(text, "characters") for text in ("ab", "aß"))
    assert new_tokens(latin, german) == ["'ß'"]


@pytest.mark.parametrize("exported", ["fsn"], indirect=True)
def test_the_run_begins_there_and_resumes_without_it(exported, tmp_path, monkeypatch):
    model, folder, corpus = exported
    moved = shutil.copytree(folder, tmp_path / "moved")
    whole = experiment_from(exported, tmp_path / "whole", init_from=str(moved))
    outcome = small_runs.run_to_the_end(whole, corpus)
    (start,) = open_run(tmp_path / "whole").read_provenance()
    assert start["init_from"] == {"sha256": file_sha256(folder / hub.WEIGHTS)}

    # With a rate too small to change a number it ends in what it began with.
    still = {"training__num_steps": 10, "optimizer__peak_learning_rate": 1e-30}
    frozen = experiment_from(exported, tmp_path / "frozen", **still)
    params = small_runs.run_to_the_end(frozen, corpus).state.params
    source = hub.load(folder).params
    small_runs.assert_equal_trees(params["block_0"], source["block_0"])

    interrupted = experiment_from(exported, tmp_path / "interrupted", init_from=str(moved))
    evaluate, calls = Evaluator.__call__, itertools.count(1)

    def failing(self: Any, params: Any) -> Any:
        if next(calls) == 2:
            raise RuntimeError("gone")
        return evaluate(self, params)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="gone"):
        patch.setattr(Evaluator, "__call__", failing)
        small_runs.run_to_the_end(interrupted, corpus)
    shutil.rmtree(moved)
    again = small_runs.run_to_the_end(interrupted, corpus)
    assert again.resumed_from == 10
    small_runs.assert_equal_trees(again.state.params, outcome.state.params)


WRONG = [
    ({"init_from": "."}, r"holds no exported model: name one of pretrained/"),
    ({"model__num_phases": 16}, r"config\.model\.num_phases is 16, and 8 in "),
    ({"model": MODELS["transformer"]}, r"architecture is transformer, and the "),
]


@pytest.mark.parametrize("exported", ["fsn"], indirect=True)
@pytest.mark.parametrize(("changes", "said"), WRONG)
def test_what_does_not_fit_is_refused(exported, tmp_path, changes, said):
    _, folder, corpus = exported
    changes = {"init_from": str(folder), **changes}
    experiment = small_runs.tiny_experiment(corpus.folder, tmp_path / "run", **changes)
    with pytest.raises(UserError, match=said):
        check_init_from(experiment, corpus.vocabulary)


@pytest.mark.parametrize("exported", ["fsn"], indirect=True)
def test_a_damaged_model_or_one_of_other_tokens_is_refused(exported, tmp_path):
    _, folder, corpus = exported
    damaged = shutil.copytree(folder, tmp_path / "damaged")
    experiment = experiment_from(exported, tmp_path / "run", init_from=str(damaged))
    characters = Vocabulary.from_text("abc", "characters")
    with pytest.raises(UserError, match="config.data.vocabulary is characters, and the tokens of"):
        check_init_from(experiment, characters)
    (damaged / hub.WEIGHTS).write_bytes(b"")
    with pytest.raises(UserError, match=r"config\.init_from=.*cannot be read"):
        begin(experiment, corpus.vocabulary, {})
    (damaged / hub.CONFIG).write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match=r"config\.init_from=.*is not that of an exported model"):
        check_init_from(experiment, corpus.vocabulary)


def test_dropout_and_the_type_of_products_may_differ(exported, tmp_path):
    model, _, corpus = exported
    changed = dataclasses.replace(model, dropout=0.1, dtype="bfloat16", remat=True)
    check_init_from(experiment_from((changed, *exported[1:]), tmp_path / "run"), corpus.vocabulary)


@pytest.mark.parametrize("exported", ["fsn"], indirect=True)
def test_the_program_checks_it_before_it_makes_a_folder(exported, tmp_path, capsys):
    _, folder, corpus = exported
    file = tmp_path / "one.py"
    file.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(ROOT / 'tests')!r})\n"
        "import small_runs\n"
        "def get_config():\n"
        f"    return small_runs.tiny_config({str(corpus.folder)!r}, '', model__vocab_size=0)\n",
        encoding="utf-8",
    )
    run = tmp_path / "run"
    command = ["train", f"--config={file}", f"--config.run_dir={run}"]
    with pytest.raises(UserError, match="holds no exported model"):
        program([*command, f"--config.init_from={tmp_path}"])
    assert not run.exists()
    program([*command, f"--config.init_from={folder}", "--config.training.num_steps=10"])
    said = f"begins with {folder}; tokens new to it: b' ', b'z'"
    assert said in capsys.readouterr().out
    export.program(["export", str(run), str(tmp_path / "model"), "--no_sampler"])
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    assert f"from the parameters of {folder}. Its" in " ".join(card.split())


@pytest.mark.parametrize("folder", sorted((ROOT / "pretrained").iterdir()), ids=lambda f: f.name)
def test_the_models_kept_here_can_be_trained_on(folder):
    experiment = parse_config(
        ["train", f"--config=configs/finetune.py:{folder}", "--config.data.path=x"]
    )
    assert experiment.vocabulary_from_corpus
    described = hub.describe(folder)
    assert experiment.data.context == described.context
    settled = experiment.with_vocabulary(described.config.vocab_size)
    assert settled.model == described.config
    check_init_from(settled, described.vocabulary)
