"""Runs that keep documents apart (``data.segments=documents``): each costs what it costs alone."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_runs import (
    ALPHABET,
    CONTEXT,
    TINY_FSN,
    TINY_TRANSFORMER,
    assert_equal_trees,
    mesh_of,
    rows_of,
    run_to_the_end,
    tiny_experiment,
    write_corpus,
)
from test_loop import Crash, crash_at_evaluation

from fsn_jax import hub
from fsn_jax.hub import build_model
from train import export, sample
from train.analysis import copy_depth, readings
from train.data.corpus import Corpus
from train.data.prepare import open_corpus
from train.errors import UserError
from train.evaluate import Evaluator, evaluate
from train.load import load, load_without_data
from train.step import make_evaluate_rows, window_loss

LETTERS = b"\0" + ALPHABET
MODELS = {"fsn": TINY_FSN, "transformer": TINY_TRANSFORMER}


def documents(size: int, seed: int) -> bytes:
    """Documents of 0 to 30 letters, each followed by NUL; all letters occur."""
    rng = np.random.default_rng(seed)
    text = ALPHABET + b"\0"
    while len(text) < size:
        text += bytes(rng.choice(list(ALPHABET), rng.integers(31)).tolist()) + b"\0"
    return text[:size]


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Corpus:
    folder = tmp_path_factory.mktemp("packed") / "corpus"
    texts = {"train": documents(4000, 0), "validation": documents(300, 1)}
    return write_corpus(folder, **texts, alphabet=LETTERS)


@pytest.fixture(scope="module")
def run(packed, tmp_path_factory) -> Path:
    """The folder of an uninterrupted run whose corpus is on the device."""
    folder = tmp_path_factory.mktemp("packed_run") / "run"
    run_to_the_end(experiment_of(packed, folder), packed)
    return folder


def experiment_of(corpus, folder, **changes):
    changes = {"data__segments": "documents", "evaluation__copy_depth": 1, **changes}
    return tiny_experiment(corpus.folder, folder, model__vocab_size=len(LETTERS), **changes)


@functools.cache
def forward_of(model):
    return jax.jit(model.apply)


def losses_alone(model, params, window):
    """Nats of each token after the first: every document by itself, from its separator on.

    What pads it to one length comes after it, where it is not seen.
    """
    starts = [0, *np.flatnonzero(window[:-1] == 0).tolist(), len(window) - 1]
    nats = []
    for start, stop in zip(starts, starts[1:], strict=False):
        if start == stop:
            continue
        alone = np.zeros((1, len(window) - 1), np.int32)
        alone[0, : stop - start] = window[start:stop]
        logits = np.asarray(forward_of(model)({"params": params}, alone), np.float64)[0]
        totals = np.log(np.exp(logits).sum(axis=-1))
        places = np.arange(stop - start)
        nats.append(totals[places] - logits[places, window[start + 1 : stop + 1]])
    return np.concatenate(nats)


@pytest.mark.parametrize("name", MODELS)
def test_a_window_costs_what_its_documents_cost_alone(packed, name):
    """To float error. The rotary drift is not begun anew: scores know distances alone."""
    model = build_model(dataclasses.replace(MODELS[name], vocab_size=len(LETTERS)))
    params = jax.jit(model.init)(jax.random.key(3), jnp.zeros((1, 2), jnp.int32))["params"]
    windows = packed.tokens("train")[:96].reshape(2, 48)
    apart = jax.jit(functools.partial(window_loss, model, separator=0))(params, windows)
    for row, window in enumerate(windows):
        assert (window[1:-1] == 0).any()
        np.testing.assert_allclose(apart[row], losses_alone(model, params, window), atol=2e-5)
    as_one = jax.jit(functools.partial(window_loss, model))(params, windows)
    assert np.abs(apart - as_one).max() > 1e-3


def test_evaluation_counts_the_same_characters(packed, run, tmp_path):
    trained = load(run)
    text = packed.tokens("validation")
    params = jax.device_get(trained.params)
    total = 0.0
    for first in range(0, len(text) - 1, CONTEXT):
        last = min(first, len(text) - 1 - CONTEXT)
        nats = losses_alone(trained.model, params, text[last : last + CONTEXT + 1])
        total += nats[first - last :].sum()
    apart = evaluate(trained, text)
    assert apart.num_bytes == len(text) - 1
    assert apart.bpc == pytest.approx(total / np.log(2) / (len(text) - 1), rel=1e-5)
    last_row = rows_of(run, "validation")[-1]
    assert load(run, which="latest").step == last_row["step"] == 30
    rows = make_evaluate_rows(trained.model, mesh=mesh_of(8))
    as_one = experiment_of(packed, tmp_path, data__segments="none")
    loss = Evaluator(as_one, rows, mesh_of(8), text)(params)
    assert loss.count == len(text) - 1 and abs(loss.mean / np.log(2) - apart.bpc) > 1e-4
    # Repetitions across the end of a document are no copy events.
    assert 0 < last_row["copies"] < loss.copy_count


@pytest.mark.slow
def test_the_host_and_a_resumed_run_train_on_the_same_documents(packed, run, tmp_path):
    experiment = experiment_of(packed, tmp_path / "run", data__placement="host")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Crash):
        crash_at_evaluation(patch, 1)
        run_to_the_end(experiment, packed)
    outcome = run_to_the_end(experiment, packed)
    assert outcome.resumed_from == 10
    assert_equal_trees(jax.device_get(outcome.state.params), jax.device_get(load(run).params))
    metrics = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert metrics == (run / "metrics.jsonl").read_bytes()


def test_segments_are_a_setting_of_the_run(packed, run, tmp_path):
    with pytest.raises(UserError, match="data.segments 'documents' -> 'none'"):
        run_to_the_end(experiment_of(packed, run, data__segments="none"), packed)
    as_one = tmp_path / "as_one"
    changes = {"name": "as_one", "data__segments": "none", "training__num_steps": 10}
    run_to_the_end(experiment_of(packed, as_one, **changes), packed)
    with pytest.raises(UserError, match="different config.data.segments"):
        copy_depth.measure([str(run), str(as_one)], reference="tiny", num_windows=2)


def test_a_window_that_is_one_text_is_not_searched_for_documents():
    model = build_model(TINY_FSN)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    windows = jnp.zeros((2, CONTEXT + 1), jnp.uint8)

    def program(**options):
        return str(
            jax.make_jaxpr(lambda p, w: window_loss(model, p, w, **options))(params, windows)
        )

    assert "cumsum" in program(separator=0)
    assert "cumsum" not in program()


@pytest.mark.parametrize("unit", ["bytes", "characters"])
def test_documents_are_the_files_of_a_folder_or_the_lines_of_a_file(tmp_path, unit):
    """A prepared corpus needs nothing new: NUL ends every document."""
    rng = np.random.default_rng(0)
    texts = ["é" + "".join(rng.choice(list("abcdefgh"), 500)) for _ in range(100)]
    (tmp_path / "files").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "files" / f"{number}.txt").write_text(text, encoding="utf-8")
    lines = (json.dumps({"text": text}) for text in texts)
    (tmp_path / "lines.jsonl").write_text("\n".join(lines), encoding="utf-8")
    for name in ("files", "lines.jsonl"):
        corpus = open_corpus(
            name="text",
            path=str(tmp_path / name),
            cache_dir=str(tmp_path / "cache"),
            unit=unit,
            progress=lambda line: None,
        )
        separator = corpus.vocabulary.separator
        assert separator == 0
        tokens = corpus.tokens("train")
        found = [
            corpus.vocabulary.decode(part).decode()
            for part in np.split(tokens[tokens != 0], np.cumsum(_lengths(tokens, separator))[:-1])
        ]
        whole = found if name == "files" else found[:-1]  # the last line may be cut by the split
        assert len(found) > 80 and {*whole} <= {*texts}


def _lengths(tokens, separator):
    ends = np.flatnonzero(tokens == separator)
    bounds = np.append(ends, len(tokens)) if tokens[-1] != separator else ends
    return np.diff(bounds, prepend=-1) - 1


def test_what_is_made_of_the_model_sees_its_own_document_alone(run, tmp_path):
    export.program(["export", str(run), str(tmp_path / "shared")])
    trained, shared = load_without_data(run).language_model, hub.load(tmp_path / "shared")
    assert trained.separator == shared.separator == 0
    whole = b"abca\0kla"
    np.testing.assert_allclose(shared.logits(whole)[0, 4:], shared.logits(whole[4:])[0], atol=1e-5)
    text = b"".join(shared.stream(whole, num_tokens=8, temperature=0.0))
    assert text == b"".join(trained.stream(whole[4:], num_tokens=8, temperature=0.0))
    sampler = jax.export.deserialize(bytearray((tmp_path / "shared" / export.SAMPLER).read_bytes()))
    window = np.zeros(CONTEXT, np.int32)
    window[: len(whole)] = shared.encode(whole)
    settings = (np.float32(0), np.int32(0), np.float32(1))
    drawn = sampler.call(window, np.int32(len(whole)), np.uint32(0), np.int32(0), *settings)
    assert shared.vocabulary.decode(drawn[8:]) == text


def test_a_sample_can_be_one_document(run, capfdbinary):
    """From the separator on, without showing it, to the separator that the model draws."""
    sampling = {"num_tokens": 200, "temperature": 1.0, "seed": 3}
    trained = load_without_data(run).language_model
    options = [f"--{name}={value}" for name, value in sampling.items()]
    for prompt, given in (("", []), ("", ["--prompt="]), ("ab", ["--prompt=ab"])):
        sample.program(["sample", str(run), *given, "--document", *options])
        whole = prompt.encode() + b"".join(trained.stream(b"\0" + prompt.encode(), **sampling))
        document, end, _ = whole.partition(b"\0")
        assert end and capfdbinary.readouterr().out == document + b"\n"
    # The prompt of other samples is one too, where it is given: here it has no tokens.
    with pytest.raises(UserError, match="--prompt: the text holds byte 0x54"):
        sample.program(["sample", str(run), "--prompt=The ", "--document"])
    with pytest.raises(UserError, match="--prompt must not be empty"):
        sample.program(["sample", str(run), "--prompt="])


def test_a_model_of_whole_windows_has_no_documents(packed, tmp_path):
    run_to_the_end(experiment_of(packed, tmp_path / "run", data__segments="none"), packed)
    with pytest.raises(UserError, match="--document is for a model trained with config.data.segm"):
        sample.program(["sample", str(tmp_path / "run"), "--document"])


def test_readings_are_of_tokens_that_see_their_own_document_alone(run, monkeypatch):
    seen = []
    monkeypatch.setattr(readings, "read_layer", lambda *given: seen.append(given))
    readings.read(str(run), num_windows=2)
    for state, tokens, _ in seen:
        ids = np.cumsum(np.asarray(tokens) == 0, axis=1)
        assert (ids[:, -1] > ids[:, 0]).all()
        apart = ids[:, :, None] != ids[:, None]
        assert not np.asarray(state.attention).max(axis=1)[apart].any()
    assert seen
