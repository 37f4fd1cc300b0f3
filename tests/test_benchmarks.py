"""The benchmark program: rows, ratios, resuming, mistakes; the size of a peer."""

import json

import cases
import jax
import pytest
from small_runs import TINY_FSN, TINY_TRANSFORMER, tiny_config, write_corpus

from benchmarks import table
from benchmarks.contender import MEASURES, Contender
from benchmarks.flax_attention import FlaxTransformer
from fsn_jax import Transformer
from train.config import ExperimentConfig
from train.metrics import read_rows
from train.program import run_program

SECONDS = {"fsn": 0.3, "transformer": 0.2}


@pytest.fixture
def timed(monkeypatch):
    """Contenders that report known times, and a list of those that were timed."""
    called = []

    def fake(name, experiment, steps):
        def seconds():
            called.append(name)
            return SECONDS[name]

        return Contender(name, seconds, params=1, flops=experiment.model.flops_per_token(8))

    monkeypatch.setitem(MEASURES, "train", fake)
    return called


def run(path, *more):
    arguments = ["--rungs=pocket", "--lengths=16", "--measures=train", "--rounds=2"]
    return run_program(
        table.program,
        ["table", *arguments, "--contenders=fsn,transformer", f"--output={path}", *more],
    )


def test_rows_are_written_and_not_measured_again(tmp_path, timed, capsys, monkeypatch):
    path = tmp_path / "rows.jsonl"
    assert run(path) == 0
    assert timed == ["fsn", "transformer"] * 3  # once cold, then in turn
    (row,) = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    by_name = {result["name"]: result for result in row["results"]}
    assert by_name["fsn"]["time_ratio"] == pytest.approx(1.5)
    assert by_name["transformer"]["time_ratio"] == by_name["transformer"]["flop_ratio"] == 1
    assert row["git"]["commit"] and row["device"] and row["packages"]["jax"]
    first = capsys.readouterr().out
    assert run(path) == 0
    assert len(timed) == 6
    assert capsys.readouterr().out == first
    assert run(path, "--again") == 0
    assert len(path.read_text(encoding="utf-8").splitlines()) == 2
    called = len(timed)
    for other in ("--rounds=1", "--steps=3", "--optimizer=adam"):
        assert run(path, other) == 0
        assert len(timed) > called, other
        called = len(timed)
    newer = {**table.package_versions(), "jax": "99"}
    monkeypatch.setattr(table, "package_versions", lambda: newer)
    assert run(path) == 0 and len(timed) > called


def test_an_interrupted_table_is_completed(tmp_path, timed):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"rung": "po', encoding="utf-8")
    assert run(path) == 0
    (row,) = read_rows(path)
    assert row["rung"] == "pocket"


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("--contenders=fsn,torch", "--torch_python"),
        ("--contenders=torch --torch_python=python --dtype=bfloat16", "computes in float32"),
        ("--contenders=mamba", "--contenders takes fsn"),
        ("--lengths=many", "--lengths takes whole numbers"),
        ("--rounds=0", "must be at least 1"),
        ("--optimizer=sgd", "--optimizer takes muon, adam"),
        ("--contenders=flax --measures=sample", "--measures=sample takes fsn"),
        ("--output=/", "cannot write / (Is a directory)"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, option, says):
    assert run(tmp_path / "rows.jsonl", *option.split()) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_the_flax_peer_is_as_large_as_ours():
    config, tokens = cases.transformer_config(), cases.tokens()
    trees = [
        jax.eval_shape(model(config).init, jax.random.key(0), tokens)
        for model in (FlaxTransformer, Transformer)
    ]
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in trees]
    assert sizes == [config.num_params()] * 2


@pytest.mark.parametrize("name", ["fsn-remat", "flax"])
def test_a_contender_trains(name, tmp_path):
    """Those whose program no other test runs, with Muon, as the table does."""
    model = {"fsn-remat": TINY_FSN, "flax": TINY_TRANSFORMER}[name]
    config = tiny_config(write_corpus(tmp_path / "corpus").folder, "", model)
    config.optimizer.matrices = "muon"
    found = MEASURES["train"](name, ExperimentConfig.from_config_dict(config), 1)
    assert found.params == model.num_params()
    assert found.seconds() > 0
