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

from fsn_jax import FrustratedAttention, FSNConfig
from fsn_jax.coupling import coupling_update
from train.data.prepare import open_corpus

PAGE = Path(__file__).resolve().parent.parent / "docs" / "use_the_layer.md"
TEXT = PAGE.read_text()
SECTIONS = dict(re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", TEXT, re.DOTALL | re.MULTILINE))

pytestmark = pytest.mark.usefixtures("quick_compiles")


def run(section, names):
    """Run a section's blocks on top of some names and return the names that each left."""
    after = []
    names = {"__name__": PAGE.stem, **names}
    for block in re.findall(r"```python\n(.*?)```", SECTIONS[section], re.DOTALL):
        exec(compile(block, f"{PAGE.name}: {section}", "exec"), names)
        after.append(dict(names))
    return after


@pytest.fixture(scope="module")
def first(quick_compiles):
    """What the blocks of the first section leave; the later ones build on it."""
    return run("In your own Linen model", {})


def test_in_a_linen_model(first):
    model, diagnostics = first
    assert model["y"].shape == model["x"].shape
    changed = jax.jit(model["block"].apply)(model["variables"], model["x"].at[:, 40:].add(1.0))
    same = np.isclose(changed, model["y"], atol=1e-5).all(axis=(0, 2))
    assert same[:40].all() and not same[40:].any(), "it is causal"
    assert diagnostics["dtheta"].shape == diagnostics["theta"].shape
    assert diagnostics["entropy"].shape == (2, 4, 64)
    assert diagnostics["kernel"].re.shape == (2, 1, 4, 32)


def test_the_other_fields_do_not_change_a_layer():
    """Whatever the page does not name: the same traced program with another value."""
    listed = re.search(r"reads these fields of its `FSNConfig`: (.*?); the others", TEXT, re.DOTALL)
    fields = {field.name: field for field in dataclasses.fields(FSNConfig)}
    named = set(re.findall(r"`(\w+)`", listed[1]))
    assert named < fields.keys()
    theta = jnp.zeros((1, 3, 8))

    def program(**changes):
        config = FSNConfig(num_phases=8, num_heads=2, **changes)
        layer = FrustratedAttention(config)
        return str(jax.make_jaxpr(layer.init_with_output)(jax.random.key(0), theta))

    plain, other = program(), {"feedforward": "none", "embedding_init": "uniform"}
    for name in fields.keys() - named:
        default = fields[name].default
        changed = other.get(name, not default if isinstance(default, bool) else default * 2)
        assert changed != fields[name].default
        assert program(**{name: changed}) == plain, name


def test_the_coupling_as_a_function(first):
    names, folded = run("The coupling as a pure function", first[-1])
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


def test_from_nnx(first):
    (names,) = run("From Flax NNX", first[-1])
    assert names["losses"][-1] < names["losses"][0]
    assert isinstance(names["kernel"], nnx.Param)
    assert names["kernel"].shape == (2, 1, 4, 32)


@pytest.mark.slow
def test_on_a_mesh(first):
    model, pinned = run("On your mesh", first[-1])
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
def test_a_trained_model(first, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FSN_JAX_CACHE", str(tmp_path / "cache"))
    Path("text.txt").write_bytes(b"The quick brown fox jumps over the lazy dog.\n\n" * 1000)
    corpus = open_corpus(name="text", path="text.txt", progress=lambda line: None)
    model = dataclasses.replace(small_runs.TINY_FSN, vocab_size=len(corpus.vocabulary))
    small_runs.run_to_the_end(
        small_runs.tiny_experiment(Path("text.txt"), Path("runs/quickstart"), model=model), corpus
    )
    (loaded, text) = run("A trained model", first[-1])
    assert loaded["logits"].shape == (1, 4, len(corpus.vocabulary))
    printed = corpus.vocabulary.decode(text["text"][0])
    assert capsys.readouterr().out == f"{printed}\n"
    assert len(printed) == 80 or printed.endswith(b"\n\n")
