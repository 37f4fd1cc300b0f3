"""An exported model: the same bits when read back, and text from it without this package."""

import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import small_runs
from flax.traverse_util import flatten_dict

from fsn_jax import ConfigError, hub
from fsn_jax.documents import document_ids
from train import export, sample, standalone_sample
from train.errors import UserError
from train.evaluate import Evaluation, append_evaluation
from train.load import load
from train.program import run_program

MODELS = {"fsn": small_runs.TINY_FSN, "transformer": small_runs.TINY_TRANSFORMER}


@pytest.fixture(scope="module", params=MODELS)
def exported(request, tmp_path_factory):
    """A run of each architecture and the folder that it was exported to."""
    here = tmp_path_factory.mktemp("exported")
    corpus = small_runs.write_corpus(here / "corpus")
    experiment = small_runs.tiny_experiment(
        corpus.folder, here / "run", model=MODELS[request.param], training__num_steps=10
    )
    small_runs.run_to_the_end(experiment, corpus)
    trained = load(here / "run")
    result = Evaluation(trained.step, 3.21987, 3.21987, 299, small_runs.CONTEXT, 16, 1.0)
    for row in (result, dataclasses.replace(result, step=trained.step + 1, bpc=9.0)):
        append_evaluation(here / "run" / "evaluations.jsonl", trained, row)
    export.program(["export", str(here / "run"), str(here / "shared")])
    return here / "run", here / "shared"


def test_the_parameters_come_back_bit_for_bit(exported):
    run, folder = exported
    trained, again = load(run), hub.load(folder)
    small_runs.assert_equal_trees(again.params, trained.params)
    assert again.model == trained.model
    assert again.context == small_runs.CONTEXT
    np.testing.assert_array_equal(again.encode(small_runs.ALPHABET), range(12))
    # Other programs see them by their names.
    arrays = safetensors.numpy.load_file(folder / "model.safetensors")
    assert {name: array.shape for name, array in arrays.items()} == {
        name: leaf.shape for name, leaf in flatten_dict(trained.params, sep=".").items()
    }
    assert all(array.dtype == np.float32 for array in arrays.values())


@pytest.mark.parametrize("separator", [None, 0])
@pytest.mark.parametrize("method", ["logits", "states"])
def test_texts_of_many_lengths_take_one_program(exported, method, separator):
    """Padded with tokens that none before them sees; sums over a row run in another order."""
    pretrained = dataclasses.replace(hub.load(exported[1]), separator=separator)
    name = "__call__" if method == "logits" else method
    unpadded = jax.jit(functools.partial(pretrained.model.apply, method=name))
    before = hub._applied._cache_size()
    for text in ("", "bca", "abcdefghijkl" * 2, "abcabcab" * 4):
        tokens = jnp.asarray(pretrained.encode(text))[None]
        ids = None if separator is None else document_ids(tokens, separator)
        expected = unpadded({"params": pretrained.params}, tokens, segment_ids=ids)
        got = getattr(pretrained, method)(text)
        assert got.shape == expected.shape
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    assert hub._applied._cache_size() == before + 1
    getattr(pretrained, method)("abc" * 11)
    assert hub._applied._cache_size() == before + 2


@pytest.mark.parametrize("exported", ["fsn"], indirect=True)
def test_a_wrong_setting_is_refused_before_the_first_token(exported):
    model = hub.load(exported[1])
    with pytest.raises(ConfigError, match="top_p must be above 0 and at most 1; got 7.0"):
        model.stream("abcd", top_p=7.0)
    assert hash(model) != hash(hub.load(exported[1]))


@pytest.mark.parametrize("exported", ["fsn"], indirect=True)
def test_one_stop_is_a_text_and_not_its_letters(exported):
    model = hub.load(exported[1])
    text = model.sample("abcd", num_tokens=30, seed=1)
    stop = text[4:6]
    cut = model.sample("abcd", num_tokens=30, seed=1, stop=[stop])
    assert cut == text[: text.index(stop) + 2]
    for one in (stop, stop.encode()):
        assert model.sample("abcd", num_tokens=30, seed=1, stop=one) == cut


def test_the_card_has_the_metadata_that_the_hub_reads(exported):
    run, folder = exported
    _, header, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    metadata = {
        key: json.loads(value)
        for key, value in (line.split(": ", 1) for line in header.splitlines())
    }
    assert metadata["library_name"] == "fsn_jax"
    assert metadata["pipeline_tag"] == "text-generation"
    row, _ = [
        json.loads(line)
        for line in (run / "evaluations.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    (result,) = metadata["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == round(row["bpc"], 4) == 3.2199
    assert "3.2199 bits per character on 299 bytes" in text
    assert "`python sample.py --prompt 'The '`" in text
    kind, architecture = {
        "fsn": ("Frustrated Synchronization Network (score: gated, heads: 2, harmonics: 2)", "FSN"),
        "transformer": ("RoPE-SwiGLU transformer", "Transformer"),
    }[load(run).experiment.architecture]
    assert f"\nA {kind}, " in text
    assert "sample.py" not in export.model_card(load(run), with_sampler=False)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == [architecture]


# The package, and what it needs beside jax and numpy, cannot be imported there.
WITHOUT_THE_PACKAGE = """
import runpy, sys
for name in ("fsn_jax", "train", "flax", "optax", "orbax"):
    sys.modules[name] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_the_run_the_export_and_the_bare_sampler_write_the_same_text(exported, capfdbinary):
    run, folder = exported
    # Three times around the context.
    options = ["--prompt=abcd", "--num_tokens=50", "--seed=3", "--top_k=7", "--top_p=0.9"]
    sample.program(["sample", str(run), *options])
    expected = capfdbinary.readouterr().out
    sample.program(["sample", str(folder), *options])
    assert capfdbinary.readouterr().out == expected
    done = subprocess.run(
        [sys.executable, "-I", "-c", WITHOUT_THE_PACKAGE, str(folder / "sample.py"), *options],
        cwd=folder.parent,
        env={**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        capture_output=True,
        timeout=120,
        check=True,
    )
    assert done.stdout == expected
    assert len(expected) == 4 + 50 + 1


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--top_k=-3", "--top_k must be from 0 to 2**31 - 1; got -3"),
        ("--top_k=3000000000", "--top_k must be from 0 to 2**31 - 1; got 3000000000"),
        ("--seed=-1", "--seed must be from 0 to 2**31 - 1; got -1"),
        ("--num_tokens=0", "--num_tokens must be at least 1; got 0"),
        ("--temperature=nan", "--temperature must be finite and not negative; got nan"),
        ("--top_p=0", "--top_p must be above 0 and at most 1; got 0.0"),
        ("--prompt=", "--prompt must not be empty: the first character needs one before it"),
    ],
)
def test_the_bare_sampler_refuses_what_the_program_does(monkeypatch, capsys, option, said):
    assert run_program(sample.program, ["sample", "nowhere", option]) == 2
    assert capsys.readouterr().err == f"error: {said}\n"
    monkeypatch.setattr(sys, "argv", ["sample.py", option])
    with pytest.raises(SystemExit) as ended:
        standalone_sample.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: {said}\n"


def test_the_bare_sampler_names_the_file_that_it_lacks(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(standalone_sample, "__file__", str(tmp_path / "sample.py"))
    monkeypatch.setattr(sys, "argv", ["sample.py"])
    with pytest.raises(SystemExit):
        standalone_sample.main()
    lacking = tmp_path / "config.json"
    assert capsys.readouterr().err == f"error: {lacking}: No such file or directory\n"


CHARACTERS = "abcdefßж€日𝄞😀"
"""As many as the letters, ascending as they are, of one to four bytes."""


@pytest.mark.parametrize("exported", ["fsn"], indirect=True)
def test_a_model_of_characters_writes_the_same_tokens_as_its_own_characters(
    exported, tmp_path, monkeypatch, capfdbinary
):
    """Of the same parameters: a model knows nothing but tokens."""
    folder = tmp_path / "characters"
    shutil.copytree(exported[1], folder)
    changed(vocabulary={"of": "text", "unit": "characters", "values": CHARACTERS})(folder)
    of_letters = "ijkl" + hub.load(exported[1]).sample("ijkl", num_tokens=30, seed=1)
    expected = of_letters.translate(str.maketrans(small_runs.ALPHABET.decode(), CHARACTERS))
    assert "€日𝄞😀" + hub.load(folder).sample("€日𝄞😀", num_tokens=30, seed=1) == expected

    monkeypatch.setattr(standalone_sample, "__file__", str(folder / "sample.py"))

    def bare(prompt: str) -> tuple[bytes, bytes]:
        options = [f"--prompt={prompt}", "--num_tokens=30", "--seed=1"]
        monkeypatch.setattr(sys, "argv", ["sample.py", *options])
        standalone_sample.main()
        return capfdbinary.readouterr()

    capfdbinary.readouterr()
    assert bare("€日𝄞😀") == (f"{expected}\n".encode(), b"")
    for prompt, said in (
        ("ж\udcff", b"the text is not UTF-8 at byte 2\n"),
        ("aй", "the model has no token for 'й'".encode()),
    ):
        with pytest.raises(SystemExit) as ended:
            bare(prompt)
        out, err = capfdbinary.readouterr()
        assert (ended.value.code, out) == (2, b"")
        assert err.startswith(b"error: --prompt: " + said)


@pytest.mark.parametrize("exported", ["fsn"], indirect=True)
def test_the_bare_sampler_survives_its_reader_and_names_a_full_disk(exported):
    _, folder = exported
    command = [sys.executable, str(folder / "sample.py"), "--prompt=abc", "--num_tokens=40"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (2, b"error: No space left on device\n")


@pytest.mark.parametrize("exported", ["fsn"], indirect=True)
def test_an_export_may_be_read_by_whoever_may_read_its_neighbours(exported):
    modes = {file.stat().st_mode for file in exported[1].iterdir()}
    assert len(modes) == 1


@pytest.mark.parametrize("exported", ["fsn"], indirect=True)
def test_a_program_that_takes_runs_says_what_it_wants_of_an_export(exported):
    _, folder = exported
    with pytest.raises(UserError, match=r"is an exported model, .* train sample takes either"):
        load(folder)
    with pytest.raises(UserError, match=r"--checkpoint is for a run"):
        sample.program(["sample", str(folder), "--checkpoint=999"])
    with pytest.raises(UserError, match=r"--data_path is for a run"):
        sample.program(["sample", str(folder), "--data_path=there"])


def test_the_sampler_is_for_every_platform(exported):
    _, folder = exported
    blob = bytearray((folder / "sampler.jax_export").read_bytes())
    assert jax.export.deserialize(blob).platforms == ("cpu", "cuda", "tpu")


def without_a_parameter(folder):
    arrays = safetensors.numpy.load_file(folder / "model.safetensors")
    arrays.popitem()
    safetensors.numpy.save_file(arrays, folder / "model.safetensors")


def of_another_dtype(folder):
    """With weights of four bits, which NumPy has not."""
    header = b'{"a":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}}'
    content = len(header).to_bytes(8, "little") + header + bytes(1)
    (folder / "model.safetensors").write_bytes(content)


def changed(**changes):
    """A damage to ``config.json``: some of its fields have other values."""

    def spoil(folder):
        file = folder / "config.json"
        file.write_text(
            json.dumps(json.loads(file.read_text(encoding="utf-8")) | changes), encoding="utf-8"
        )

    return spoil


def with_a_removed_setting(folder):
    """With a value that this version cannot work with."""
    model = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model"]
    changed(model={**model, "drift_share": 0.5})(folder)


DAMAGES = {
    "cut weights": (
        lambda folder: (folder / "model.safetensors").write_bytes(b"\x00" * 20),
        "model.safetensors cannot be read",
    ),
    "weights of four bits": (of_another_dtype, "model.safetensors cannot be read"),
    "a parameter less": (without_a_parameter, "does not fit its config.json: .* is absent in"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json is not that"),
    "another config": (
        lambda folder: (folder / "config.json").write_text(
            '{"format": 1, "model_type": "rnn"}', encoding="utf-8"
        ),
        "config.json is not that of an exported model .*rnn",
    ),
    "a vocabulary less": (
        changed(vocabulary={"values": b"abc".hex(), "unit": "bytes", "of": "text"}),
        "the vocabulary has 3 bytes, and model.vocab_size is 12",
    ),
    "no context": (changed(context=0), "context must be at least 2; got 0"),
    "a removed setting": (
        with_a_removed_setting,
        "config.json is not that of an exported model .*'drift_share'",
    ),
    "no settings": (changed(model=[]), "config.json is not that of an exported model"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_export_is_named(exported, tmp_path, damage):
    folder = tmp_path / "copy"
    shutil.copytree(exported[1], folder)
    spoil, said = DAMAGES[damage]
    spoil(folder)
    with pytest.raises(ValueError, match=said):
        hub.load(folder)


def test_nothing_is_written_over(exported, tmp_path, capsys):
    (tmp_path / "there").mkdir()
    assert run_program(export.program, ["export", str(exported[0]), str(tmp_path / "there")]) == 2
    assert "is there already" in capsys.readouterr().err
    assert not list((tmp_path / "there").iterdir())
