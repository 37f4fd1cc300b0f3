"""What heads attend to: traced weights against the updates that they make, and the program."""

import dataclasses
import functools
import json

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fsn_jax import FSN, Transformer
from fsn_jax.base_layer import attention_entropy
from fsn_jax.readings import AttentionTargets, trace_attention, trace_layers
from train.analysis import heads

IDS = jnp.array([[0, 0, 1, 1, 1, 1]] * 2)
PLACES = jnp.array([0, 7, 8, 20, 21, 30])
"""Segments and positions of two rows of six tokens."""


def test_an_fsns_weights_are_those_of_its_layers():
    """The traces agree, and their entropy is that which the model itself reports."""
    model, tokens = FSN(cases.fsn_config()), cases.tokens(length=6)
    variables = cases.random_variables(model, tokens)

    @jax.jit
    def run(variables):
        return (
            trace_attention(model, variables, tokens, IDS, PLACES),
            trace_layers(model, variables, tokens, IDS, PLACES),
            model.apply(
                variables, tokens, segment_ids=IDS, positions=PLACES, mutable="diagnostics"
            )[1]["diagnostics"],
        )

    weights, states, seen = run(variables)
    for layer, (traced, state) in enumerate(zip(weights, states, strict=True)):
        np.testing.assert_array_equal(traced, state.attention)
        (entropy,) = seen[f"block_{layer}"]["attention"]["attention_entropy"]
        np.testing.assert_allclose(attention_entropy(traced), entropy, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["fsn", "transformer"])
def test_recomputed_blocks_are_traced_too(kind):
    of_kind = {
        "fsn": (FSN, cases.fsn_config(num_layers=1)),
        "transformer": (Transformer, cases.transformer_config(num_layers=1)),
    }
    module, config = of_kind[kind]
    model, tokens = module(config), cases.tokens(length=6)
    recomputing = module(dataclasses.replace(config, remat=True))
    variables = cases.random_variables(model, tokens)
    traces = (trace_attention, trace_layers) if kind == "fsn" else (trace_attention,)
    for trace in traces:
        expected, traced = (
            jax.jit(functools.partial(trace, one))(variables, tokens)
            for one in (model, recomputing)
        )
        for one, other in zip(*map(jax.tree.leaves, (traced, expected)), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("token_shift", ["none", "keys", "queries_and_keys"])
def test_a_transformers_weights_make_its_updates(token_shift):
    """Values, mixed by the traced weights and put through the output matrix, are the update."""
    config = cases.transformer_config(token_shift=token_shift, num_layers=2)
    model, tokens = Transformer(config), cases.tokens(length=6)
    variables = cases.random_variables(model, tokens)
    last = config.num_layers - 1

    def walk(model, tokens):
        state = model.embedding(tokens)
        for block in model.blocks[:last]:
            state = block(state, IDS, PLACES)
        x = model.blocks[last].attention_norm(state)
        return x, model.blocks[last].attention(x, IDS, PLACES)

    @jax.jit
    def run(variables):
        weights = trace_attention(model, variables, tokens, IDS, PLACES)
        return weights, model.apply(variables, tokens, method=walk)

    weights, (x, update) = run(variables)
    assert len(weights) == config.num_layers
    matrices = variables["params"][f"block_{last}"]["attention"]
    value = np.asarray(x) @ np.asarray(matrices["value"]["kernel"])
    value = value.reshape(*value.shape[:2], config.num_heads, -1)
    mixed = np.einsum("bhtu,buhp->bthp", np.asarray(weights[last]), value)
    expected = mixed.reshape(x.shape) @ np.asarray(matrices["output"]["kernel"])
    np.testing.assert_allclose(update, expected, rtol=1e-4, atol=1e-5)
    for layer in weights:
        np.testing.assert_allclose(layer.sum(-1), 1, rtol=1e-5)
        assert not layer[:, :, 2:, :2].any() and not np.triu(layer, 1).any()


def test_the_program_reads_both_kinds_of_model(finished_arms, tmp_path, capsys):
    target = tmp_path / "heads.json"
    runs = [str(finished_arms[kind]) for kind in ("fsn", "fsn_seed1", "transformer")]
    compiled = heads._trace._cache_size()
    heads.program(["heads", *runs, f"--output={target}", "--windows=3", "--length=6"])
    assert heads._trace._cache_size() == compiled + 2  # the seeds share one
    page = json.loads(target.read_text(encoding="utf-8"))
    # Even attention of six tokens: the mean of 1/1 to 1/6 to oneself, of 1/2 to 1/6 to the last.
    even = page["even_attention"]
    assert even["itself"] == pytest.approx(np.mean(1 / np.arange(1, 7)), abs=1e-5)
    assert even["previous"] == pytest.approx(np.mean(1 / np.arange(2, 7)), abs=1e-5)
    assert [run["heads"][0] for run in page["runs"]] == ["head 1"] * 3
    for run in page["runs"]:
        for layer in run["layers"]:
            for weights in (layer["relative_entropy"], *layer["attention_to"].values()):
                assert len(weights) == len(run["heads"])
                assert all(0 <= weight <= 1 for weight in weights)
    table = target.with_suffix(".txt").read_text(encoding="utf-8")
    rows = sum(len(run["layers"]) * len(run["heads"]) for run in page["runs"])
    assert len(table.splitlines()) == rows + 5
    assert table in capsys.readouterr().out
    assert target.with_suffix(".png").stat().st_size > 1000


def test_seeds_of_an_arm_are_told_apart():
    layer = {
        "relative_entropy": [0.5],
        "attention_to": dict.fromkeys(AttentionTargets._fields, [0.25]),
    }
    run = {"name": "arm", "heads": ["head 1"], "layers": [layer]}
    page = {
        "windows": 1,
        "length": 2,
        "even_attention": dict.fromkeys(AttentionTargets._fields, 0.5),
        "runs": [run | {"run": f"arm_seed{seed}"} for seed in (1, 2)],
    }
    rows = heads.table_text(page).splitlines()[-2:]
    assert [row.split()[0] for row in rows] == ["arm_seed1", "arm_seed2"]


def test_documents_are_read_each_alone():
    """Even attention of two documents in a row, the second of two characters twice."""
    tokens, ids = jnp.array([[9, 0, 1, 0, 1]]), jnp.array([[0, 1, 1, 1, 1]])
    weights = np.zeros((1, 1, 5, 5), np.float32)
    weights[0, 0, 0, 0] = 1
    weights[0, 0, 1:, 1:] = np.tril(np.ones((4, 4))) / np.arange(1, 5)[:, None]
    found = heads.measure_attention(jnp.asarray(weights), tokens, ids)
    np.testing.assert_allclose(found["relative_entropy"], 1, rtol=1e-5)
    np.testing.assert_allclose(found["attention_entropy"], np.log([2, 3, 4]).mean(), rtol=1e-5)
    targets = found["attention_to"]
    np.testing.assert_allclose(targets["previous"], np.mean([1 / 2, 1 / 3, 1 / 4]), rtol=1e-5)
    np.testing.assert_allclose(targets["repeat"], 1 / 4, rtol=1e-5)
    np.testing.assert_allclose(targets["after_repeat"], 1 / 4, rtol=1e-5)
