"""Properties over drawn inputs: every config trains or is refused, every batch is finite, no
archive writes where it should not.

The draws are the same in every run. `pytest -m slow tests/test_properties.py` draws many more.
"""

import dataclasses
import gzip
import hashlib
import io
import json
import os
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from small_runs import (
    ALPHABET,
    TINY_FSN,
    TINY_TRANSFORMER,
    mesh_of,
    tiny_config,
)

from fsn_jax import FSNConfig, TransformerConfig
from fsn_jax.hub import build_model
from train.config import ExperimentConfig
from train.data import python_files
from train.data.corpus import Corpus
from train.data.fetch import LocalFile, PinnedFile, fetch
from train.data.prepare import prepare_corpus
from train.data.user_files import contents, find_files
from train.data.windows import WindowOrder
from train.errors import UserError
from train.optimizer import make_optimizer
from train.plan import check_experiment, train_steps_of
from train.step import init_state, window_loss

FEW = settings(
    max_examples=4,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
MANY = settings(FEW, max_examples=60, derandomize=False)


# Configs

FSN_FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "vocab_size": st.sampled_from([len(ALPHABET), 0, -1]),
    "num_layers": st.integers(0, 2),
    "num_phases": st.sampled_from([0, 1, 4, 6, 8, 12]),
    "num_heads": st.integers(0, 4),
    "heads_per_phase": st.integers(0, 3),
    "num_harmonics": st.integers(0, 3),
    "delay": st.booleans(),
    "static_angles": st.booleans(),
    "signed_harmonics": st.booleans(),
    "score": st.sampled_from(["projected", "gated", "content_gated", "none", "dot"]),
    "score_phases": st.sampled_from([0, 0, 1, 3]),
    "values": st.sampled_from(["circular", "linear"]),
    "field_features": st.booleans(),
    "feedforward": st.sampled_from(["swiglu", "collective_modes", "none"]),
    "feedforward_width": st.sampled_from([0, 1, 8]),
    "num_modes": st.integers(0, 3),
    "rotary_base": st.sampled_from([0.5, 2.0, 1e4, float("inf")]),
    "embedding_scale": st.sampled_from([0.0, 1.0, 1e30]),
    "score_sharpness": st.sampled_from([-1.0, 1e-30, 4.0, 1e30]),
    "kernel_scale": st.sampled_from([0.0, 0.5, 10.0]),
    "dtype": st.sampled_from(["float32", "bfloat16", "float8"]),
    "remat": st.booleans(),
}
TRANSFORMER_FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "vocab_size": st.sampled_from([len(ALPHABET), 0, 300]),
    "num_layers": st.integers(0, 2),
    "width": st.sampled_from([0, 4, 8, 12]),
    "num_heads": st.integers(0, 3),
    "feedforward_width": st.sampled_from([0, 1, 8]),
    "tied_embedding": st.booleans(),
    "rotary_base": st.sampled_from([1.0, 2.0, 1e4]),
    "dtype": st.sampled_from(["float32", "bfloat16"]),
    "remat": st.booleans(),
}
OTHER_FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "seed": st.sampled_from([-1, 0, 2**31 - 1, 2**31]),
    "data.context": st.sampled_from([0, 1, 2, 3, 16, 1999, 4000]),
    "data.placement": st.sampled_from(["resident", "host"]),
    "optimizer.peak_learning_rate": st.sampled_from([-1.0, 0.0, 1e-3, 1e3, float("nan")]),
    "optimizer.warmup_steps": st.sampled_from([-1, 0, 5, 1000]),
    "optimizer.beta1": st.sampled_from([-0.1, 0.0, 0.9, 1.0]),
    "optimizer.clip_norm": st.sampled_from([0.0, 1e-30, 1.0]),
    "training.batch_size": st.sampled_from([0, 1, 2, 3, 8]),
    "training.accumulation_steps": st.sampled_from([0, 1, 2]),
    "training.num_steps": st.sampled_from([0, 1, 30]),
    "training.steps_per_dispatch": st.sampled_from([1, 2, 3]),
    "training.log_every": st.sampled_from([1, 6, 10]),
    "training.layout": st.sampled_from(["replicated", "sharded"]),
    "evaluation.stride": st.sampled_from([0, 1, 16]),
    "evaluation.batch_size": st.sampled_from([1, 2, 8]),
    "evaluation.num_tokens": st.sampled_from([0, 1, 100]),
    "checkpoints.every": st.sampled_from([1, 6, 10]),
}


def changes(fields: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[dict[str, Any]]:
    """A few of the fields with drawn values: with all of them, most configs would be refused."""
    names = st.sets(st.sampled_from(sorted(fields)), max_size=4)
    return names.flatmap(lambda chosen: st.fixed_dictionaries({n: fields[n] for n in chosen}))


CONFIGS = st.tuples(
    st.one_of(
        st.tuples(st.just(TINY_FSN), changes(FSN_FIELDS)),
        st.tuples(st.just(TINY_TRANSFORMER), changes(TRANSFORMER_FIELDS)),
    ),
    changes(OTHER_FIELDS),
    st.sampled_from([1, 2]),
)


def trains_or_is_refused(
    corpus: Corpus,
    model: FSNConfig | TransformerConfig,
    changed: dict[str, Any],
    num_devices: int,
) -> str:
    """Checks the property; returns the refusal, or nothing."""
    config = tiny_config(corpus.folder, Path("unused"), model)
    config.update_from_flattened_dict(changed)
    mesh = mesh_of(num_devices)
    try:
        experiment = ExperimentConfig.from_config_dict(config)
        experiment = experiment.with_vocabulary(len(corpus.vocabulary))
        check_experiment(experiment, corpus, num_devices)
    except UserError as refused:
        assert "config." in str(refused) and len(str(refused)) < 300
        return str(refused)
    training, context = experiment.training, experiment.data.context
    network = build_model(experiment.model)
    optimizer = make_optimizer(experiment.optimizer, training.num_steps)
    data = dataclasses.replace(experiment.data, placement="host")
    train_steps = train_steps_of(
        dataclasses.replace(experiment, data=data), network, optimizer, mesh
    )
    state = init_state(network, optimizer, seed=experiment.seed, mesh=mesh, layout=training.layout)
    order = WindowOrder(
        corpus.splits["train"].num_bytes, context, training.batch_size, experiment.seed
    )
    starts = order.starts_of_steps(0, 1)
    windows = corpus.tokens("train")[starts[..., None] + np.arange(context + 1)]
    state, report = train_steps(state, windows)
    assert int(state.step) == 1
    finite = bool(np.isfinite(np.asarray(report.losses)).all())
    # Only numbers beyond all use overflow; the loop then stops in one line, with nothing moved.
    assert finite or max(float(v) for v in changed.values() if isinstance(v, float)) > 1e20, changed
    assert int(report.skipped) == (not finite)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))
    return ""


@settings(FEW, phases=[Phase.explicit])  # the slow test below draws
@given(CONFIGS)
@example(((TINY_FSN, {}), {"data.context": 3}, 2))  # trains
@example(((TINY_FSN, {"num_heads": 3}), {}, 1))  # is refused
def test_every_config_trains_a_step_or_is_refused_in_one_line(corpus, drawn):
    (model, of_model), others, num_devices = drawn
    of_model = {f"model.{name}": value for name, value in of_model.items()}
    refused = trains_or_is_refused(corpus, model, of_model | others, num_devices)
    if of_model == {"model.num_heads": 3}:
        assert refused.startswith("config.model.num_heads must divide")
    elif others == {"data.context": 3}:
        assert refused == ""


@pytest.mark.slow
@MANY
@given(CONFIGS)
def test_many_configs_train_a_step_or_are_refused_in_one_line(corpus, drawn):
    (model, of_model), others, num_devices = drawn
    of_model = {f"model.{name}": value for name, value in of_model.items()}
    trains_or_is_refused(corpus, model, of_model | others, num_devices)


# Token batches

MODELS = {
    "fsn": FSNConfig(vocab_size=7, num_layers=1, num_phases=8, num_heads=2, feedforward_width=8),
    "modes": FSNConfig(
        vocab_size=7, num_layers=1, num_phases=8, num_heads=2, feedforward="collective_modes"
    ),
    "bfloat16": FSNConfig(vocab_size=7, num_layers=1, num_phases=8, num_heads=2, dtype="bfloat16"),
    "transformer": TransformerConfig(
        vocab_size=7, num_layers=1, width=8, num_heads=2, feedforward_width=8
    ),
}
BATCHES = st.one_of(
    st.lists(st.integers(0, 6), min_size=34, max_size=34),
    st.integers(0, 6).map(lambda token: [token] * 34),  # one character for ever
    st.tuples(st.integers(0, 6), st.integers(0, 6)).map(lambda pair: list(pair) * 17),
)


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("modes", "bfloat16")]


@pytest.mark.parametrize("name", ["fsn", "transformer", *SLOW])
def test_no_tokens_make_a_loss_or_gradient_that_is_not_finite(name):
    model = build_model(MODELS[name])
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]

    @jax.jit
    def loss_and_gradient(params: Any, windows: jax.Array) -> Any:
        return jax.value_and_grad(lambda p: window_loss(model, p, windows).mean())(params)

    @settings(FEW, max_examples=30)
    @given(BATCHES, st.sampled_from([0.0, 1.0, 30.0]))
    def check(tokens: list[int], scale: float) -> None:
        windows = np.asarray(tokens, np.uint8).reshape(2, 17)
        scaled = jax.tree.map(lambda leaf: leaf * scale, params)
        for leaf in jax.tree.leaves(loss_and_gradient(scaled, windows)):
            assert np.isfinite(leaf).all()

    check()


def test_a_token_outside_the_vocabulary_is_not_taken_for_one_inside():
    """JAX fills what lies outside with NaN, which the training loop counts and stops at."""
    tokens = jnp.asarray([[0, 1, len(ALPHABET)], [0, 1, len(ALPHABET) - 1]])
    for config in (TINY_FSN, TINY_TRANSFORMER):
        logits, _ = jax.jit(build_model(config).init_with_output)(jax.random.key(0), tokens)
        assert np.isnan(logits[0, 2]).all() and np.isfinite(logits[1]).all()


# Archives

LIMIT = 3000
NAMES = st.one_of(
    st.sampled_from(
        [
            "corpus",
            "../corpus",
            "../../escaped",
            "/tmp/fsn_jax_escaped",
            "a/../../escaped.py",
            "corpus/",
            "./corpus",
            "..\\escaped",
            "module.py",
            "../module.py",
            "tests/test_module.py",
            "corpus\nnewline",
        ]
    ),
    st.text(st.characters(codec="ascii", exclude_characters="\0"), min_size=1, max_size=20),
)
BODIES = st.one_of(
    st.binary(max_size=200), st.integers(0, 300_000).map(bytes), st.just(b"x = 1\n" * 400)
)
KINDS = st.sampled_from([tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])


@st.composite
def zips(draw: st.DrawFn) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as pack:
        members = draw(st.lists(st.tuples(NAMES, BODIES, st.booleans()), max_size=4))
        for name, body, link in members:
            entry = zipfile.ZipInfo(name)
            entry.compress_type = zipfile.ZIP_DEFLATED
            if link:
                entry.external_attr = 0o120777 << 16  # a symbolic link, to where its bytes say
                body = b"/etc/passwd"
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that a name is there twice is a part of it
                pack.writestr(entry, body)
    return packed.getvalue()


@st.composite
def tars(draw: st.DrawFn) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, body, kind in draw(st.lists(st.tuples(NAMES, BODIES, KINDS), max_size=4)):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, "/etc/passwd"
            entry.size = len(body) if kind == tarfile.REGTYPE else 0
            tar.addfile(entry, io.BytesIO(body))
    return packed.getvalue()


@st.composite
def harmed(draw: st.DrawFn, archives: st.SearchStrategy[bytes]) -> bytes:
    """An archive of which a byte is another, or the end is missing, or neither."""
    archive = bytearray(draw(archives))
    if archive and draw(st.booleans()):
        archive[draw(st.integers(0, len(archive) - 1))] ^= draw(st.integers(1, 255))
    return bytes(archive[: draw(st.integers(0, len(archive)))] if draw(st.booleans()) else archive)


ARCHIVES = st.one_of(
    harmed(zips()), harmed(tars()), harmed(st.binary(max_size=500).map(gzip.compress))
)
OFTEN = settings(FEW, max_examples=100)
_sound = io.BytesIO()
with zipfile.ZipFile(_sound, "w") as _pack:
    _pack.writestr("corpus", bytes(LIMIT))
SOUND = _sound.getvalue()
"""An archive whose member ``corpus`` is the one that is wanted."""


@pytest.fixture
def cage(tmp_path) -> Path:
    """A folder within a folder within a folder, so that a name may climb out without harm."""
    folder = tmp_path / "outer" / "inner" / "cage"
    folder.mkdir(parents=True)
    return folder


def assert_nothing_outside(cage: Path, *allowed: str) -> None:
    outer = cage.parent.parent
    assert set(os.listdir(cage)) <= set(allowed)
    assert os.listdir(outer) == ["inner"] and os.listdir(outer.parent) == ["outer"]
    assert os.listdir(cage.parent) == ["cage"]
    assert not Path("/tmp/fsn_jax_escaped").exists()
    assert not any(entry.is_symlink() for entry in cage.iterdir())


@OFTEN
@given(ARCHIVES)
@example(SOUND)
def test_a_hostile_archive_gives_its_member_or_nothing(cage, archive):
    for file in cage.iterdir():
        file.unlink()
    (cage / "archive").write_bytes(archive)
    digest = hashlib.sha256(bytes(LIMIT)).hexdigest()
    wanted = PinnedFile("target", LIMIT, digest, [LocalFile(cage / "archive", "corpus")])
    try:
        fetch(wanted, cage, advice="", progress=[].append)
    except UserError:
        assert archive != SOUND
        assert not (cage / "target").exists()
    else:
        assert (cage / "target").read_bytes() == bytes(LIMIT)
    assert_nothing_outside(cage, "archive", "target")


LINES = st.one_of(
    st.binary(max_size=200),
    st.just(b'{"content": "x = 1", "path": "../../escaped.py"}\n'),
    st.integers(1, 20).map(lambda n: b"[" * 10_000 * n),
    st.just(b'{"content": 3}\n'),
    st.just(b'{"content": "' + b"x" * 100_000 + b'"}\n'),
)


def texts_of(shard: bytes) -> list[bytes] | None:
    """The texts of a shard as the standard library reads them; None if one cannot be read."""
    try:
        lines = io.BytesIO(gzip.decompress(shard)).readlines()
        return [json.loads(line)["content"].encode() for line in lines if line.strip()]
    except (OSError, EOFError, zlib.error):
        return None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


@settings(FEW, max_examples=25)
@given(harmed(st.lists(LINES, max_size=4).map(lambda lines: gzip.compress(b"".join(lines)))))
@example(gzip.compress(b'{"content": "x = 1", "path": "../../escaped.py"}\n\n{"content": "y"}\n'))
@example(gzip.compress(b'{"content": "x = 1"}\n' * 2))
def test_a_hostile_shard_is_read_in_memory_or_refused(cage, shard):
    (cage / "shard.json.gz").write_bytes(shard)
    (cage / "text.jsonl.gz").write_bytes(shard)

    def read(pieces: Iterable[bytes]) -> list[bytes] | None:
        try:
            return list(pieces)
        except UserError:
            return None

    sources = python_files.shard_sources([cage / "shard.json.gz"])
    assert read(text for _, text in sources) == texts_of(shard)
    texts = (text.removesuffix(b"\0") for text in contents(cage / "text.jsonl.gz"))
    assert read(texts) == texts_of(shard)
    assert_nothing_outside(cage, "shard.json.gz", "text.jsonl.gz")


def test_a_link_out_of_a_folder_of_texts_is_refused(cage):
    """A folder that came from elsewhere may hold links to files that were not meant."""
    secret = cage / "secret"
    secret.write_bytes(b"not meant" * 9000)
    (cage / "texts").mkdir()
    (cage / "texts" / "a.txt").write_bytes(b"meant" * 9000)
    (cage / "texts" / "b.txt").symlink_to("a.txt")
    assert [file.name for file in find_files(str(cage / "texts"))] == ["a.txt", "b.txt"]
    (cage / "texts" / "c.txt").symlink_to(secret)
    with pytest.raises(UserError, match=r"holds c.txt, a link to .*/secret outside it: remove it"):
        prepare_corpus("text", str(cage / "texts"), cage / "cache", progress=lambda line: None)
    assert not (cage / "cache").exists()
