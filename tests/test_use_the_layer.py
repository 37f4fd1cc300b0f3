"""Every block of Python of docs/use_the_layer.md runs, and does what the text around it says."""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_runs
from flax import nnx

from fsn_jax.coupling import coupling_update
from train import export
from train.data.prepare import open_corpus
from train.groups import groups

PAGE = Path(__file__).resolve().parent.parent / "docs" / "use_the_layer.md"
TEXT = PAGE.read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", TEXT, re.DOTALL | re.MULTILINE))


def run(section):
    """Run a section's blocks, by themselves, and return the names that each left."""
    after = []
    names = {"__name__": PAGE.stem}
    for block in re.findall(r"```python\n(.*?)```", SECTIONS[section], re.DOTALL):
        exec(compile(block, f"{PAGE.name}: {section}", "exec"), names)
        after.append(dict(names))
    return after


def test_in_a_linen_model():
    model, diagnostics = run("In your own Linen model")
    assert model["y"].shape == model["x"].shape
    changed = jax.jit(model["block"].apply)(model["variables"], model["x"].at[:, 40:].add(1.0))
    same = np.isclose(changed, model["y"], atol=1e-5).all(axis=(0, 2))
    assert same[:40].all() and not same[40:].any(), "it is causal"
    assert diagnostics["dtheta"].shape == diagnostics["theta"].shape
    assert diagnostics["entropy"].shape == (2, 4, 64)
    assert diagnostics["kernel"].re.shape == (2, 2, 2, 32)


def test_an_optimizer_with_groups():
    (names,) = run("Train it")
    params, state, losses = names["params"], names["optimizer"].init(names["params"]), []
    for _ in range(30):
        params, state, loss = names["step"](params, state)
        losses.append(float(loss))
    assert losses[0] == pytest.approx(np.log(64), abs=1.0) and losses[-1] < losses[0] - 0.5
    of = {name: set() for name in ("angles", "matrices", "others")}
    for path, group in jax.tree_util.tree_flatten_with_path(names["groups"])[0]:
        of[group].add(path[-1].key)
    assert of["angles"] == {"angles", "gate_angle"} and of["matrices"] == {"kernel"}
    assert {"kernel_real", "kernel_imag", "log_beta", "gate", "bias"} <= of["others"]
    # As the programs group them, but that these give the readout's matrix a group of its own.
    theirs = jax.tree.leaves(groups(names["params"]))
    for ours, group in zip(jax.tree.leaves(names["groups"]), theirs, strict=True):
        assert (ours == "angles") == (group == "angles")
        assert (ours == "matrices") == (group in ("matrices", "tables"))


def test_a_stack_of_the_form_that_did_best():
    (names,) = run("The form that did best, as a stack")
    assert names["after"].shape == names["theta"].shape
    params = names["variables"]["params"]
    (attention,) = (params[name] for name in params if name.startswith("FrustratedAttention"))
    assert attention["kernel_real"].shape == (12, 2, 1, 2, 64)
    # Every layer's reading of the field, which is nothing at first, has a gradient.
    gradient = jax.jit(jax.grad(lambda v: names["stack"].apply(v, names["theta"], None)[0].sum()))
    gains = gradient(names["variables"])["params"]["PhasorSwiGLU_0"]["gate"]["field_gain"]
    assert np.abs(gains).sum(axis=(1, 2)).min() > 0
    changed = names["theta"].at[:, 20:].add(1.0)
    after, _ = jax.jit(names["stack"].apply)(names["variables"], changed, None)
    np.testing.assert_allclose(after[:, :20], names["after"][:, :20], atol=1e-4)


def test_token_by_token():
    (names,) = run("Token by token")
    whole = jax.jit(names["layer"].apply)(names["variables"], names["theta"])
    np.testing.assert_allclose(names["dtheta"], whole, atol=1e-5)


def test_packed_documents():
    (names,) = run("Packed documents, padding, positions, dropout")
    np.testing.assert_allclose(names["logits"][:, 5:9], names["alone"], atol=2e-5)
    plain = names["model"].apply(names["variables"], names["tokens"])
    np.testing.assert_allclose(names["shifted"], plain, atol=2e-5)
    assert np.abs(names["noisy"] - plain).max() > 0.01


def test_the_coupling_as_a_function():
    names, folded = run("The coupling as a pure function")
    theta, update = folded["theta"], jax.jit(folded["folded_update"])
    weights = folded["attention_weights"](folded["query"], folded["key"])
    expected = coupling_update(theta, weights, folded["kappa"])
    np.testing.assert_allclose(folded["folded"], expected, rtol=1e-4, atol=1e-5)
    before = update(theta)[:, :40]
    np.testing.assert_array_equal(update(theta.at[:, 40:].add(1.0))[:, :40], before)
    assert names["dtheta"].shape == (2, 64, 32)
    assert names["gamma"].shape == (2, 32, 256)
    phi = np.linspace(-np.pi, np.pi, 256)
    for curve in (names["gamma"][0, 0], names["gamma"][1, 31]):
        np.testing.assert_allclose(curve, 0.5 * np.sin(phi - 0.3), atol=1e-6)
    # Both modes of differentiation, in every argument: <w, J v> = <J^T w, v>.
    inputs = (names["theta"][:, :5, :4], names["attention"][:, :, :5, :5], names["kappa"][..., :4])
    w = jax.random.normal(jax.random.key(4), (2, 5, 4))
    v = jax.tree.map(
        lambda x: (0.3 + jnp.arange(x.size).reshape(x.shape) % 7).astype(x.dtype), inputs
    )
    forward = jax.jit(lambda x, v: jax.jvp(coupling_update, x, v)[1])(inputs, v)
    backward = jax.jit(lambda x, w: jax.vjp(coupling_update, *x)[1](w))(inputs, w)
    for cotangent in backward:
        assert float(jnp.abs(cotangent).max()) > 0
    pulled = sum(jnp.real((a * b).sum()) for a, b in zip(backward, v, strict=True))
    np.testing.assert_allclose(pulled, (forward * w).sum(), rtol=1e-4)


def test_from_nnx():
    (names,) = run("From Flax NNX")
    assert names["losses"][-1] < names["losses"][0]
    assert isinstance(names["kernel"], nnx.Param)
    assert names["kernel"].shape == (2, 2, 2, 32)


@pytest.mark.slow
def test_on_a_mesh():
    model, pinned = run("On your mesh")
    assert model["logits"].shape == (8, 32, 64)
    assert model["logits"].sharding.spec[0] == "data"
    spread = [x for x in jax.tree.leaves(model["variables"]) if not x.sharding.is_fully_replicated]
    assert sum(x.size for x in spread) > 0.9 * model["lm_config"].num_params()
    whole = jax.tree.map(np.asarray, model["variables"])
    alone = jax.jit(model["lm"].apply)(whole, np.asarray(model["tokens"]))
    np.testing.assert_allclose(model["logits"], alone, rtol=1e-4, atol=1e-4)
    assert pinned["update"].shape == pinned["theta"].shape
    free = jax.jit(pinned["layer"].apply)(pinned["variables"], pinned["theta"])
    np.testing.assert_allclose(pinned["update"], free, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_trained_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FSN_JAX_CACHE", str(tmp_path / "cache"))
    Path("text.txt").write_bytes(b"The quick brown fox jumps over the lazy dog.\n\n" * 1000)
    corpus = open_corpus(name="text", path="text.txt", progress=lambda line: None)
    model = dataclasses.replace(small_runs.TINY_FSN, vocab_size=len(corpus.vocabulary))
    small_runs.run_to_the_end(
        small_runs.tiny_experiment(Path("text.txt"), Path("runs/quickstart"), model=model), corpus
    )
    folder = "pretrained/enwik8_projected_1m"
    export.program(["export", "runs/quickstart", folder, "--no_sampler"])
    capsys.readouterr()
    (names,) = run("A trained model")
    assert names["logits"].shape == (1, 4, len(corpus.vocabulary))
    assert names["theta"].shape == (1, 4, model.num_phases)
    printed = capsys.readouterr().out[:-1]
    assert len(printed) == 80 or printed.endswith("\n\n")
