"""Bytes and characters as tokens, and a corpus of characters through every program."""

import gzip
import json
import random
import shutil

import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from hypothesis import given

from fsn_jax.vocabulary import TextError, Vocabulary, code_points
from train import evaluate, final_evaluation, main, sample
from train.config import DataConfig
from train.data.corpus import read_corpus
from train.data.prepare import open_corpus
from train.errors import UserError
from train.metrics import read_rows

LETTERS = "abc déé ß жи 語🙂\n"


def of(text, unit="characters"):
    values = sorted(set(text)) if unit == "characters" else sorted(set(text.encode()))
    points = [ord(v) if unit == "characters" else v for v in values]
    return Vocabulary(np.array(points, np.uint32 if unit == "characters" else np.uint8), unit)


@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
@pytest.mark.parametrize("unit", ["bytes", "characters"])
def test_text_comes_back_and_keeps_its_length(unit, text):
    vocabulary, data = of(text, unit), text.encode()
    tokens = vocabulary.encode(data, source="it")
    assert tokens.size == len(data if unit == "bytes" else text)
    assert vocabulary.decode(tokens) == data
    assert vocabulary.num_bytes(tokens) == len(data)
    quick = vocabulary.tokens(np.frombuffer(data, np.uint8))
    assert quick.dtype == vocabulary.dtype
    np.testing.assert_array_equal(quick, tokens)
    again = Vocabulary.from_text(json.loads(json.dumps(vocabulary.to_text())), unit)
    np.testing.assert_array_equal(again.values, vocabulary.values)


@pytest.mark.parametrize("unit", ["bytes", "characters"])
@pytest.mark.parametrize("text", ["", "6261", "6161"])
def test_values_that_do_not_ascend_are_refused(unit, text):
    with pytest.raises(ValueError, match=f"the {unit} are not in ascending order"):
        Vocabulary.from_text(text, unit)


@given(text=st.text(st.characters(exclude_categories=["Cs"])), size=st.integers(1, 5))
def test_characters_may_lie_in_two_pieces(text, size):
    data = text.encode()
    pieces = [data[start : start + size] for start in range(0, len(data), size)]
    points = [int(point) for part in code_points(pieces) for point in part]
    assert points == [ord(character) for character in text]


def test_more_than_256_characters_take_wider_tokens():
    many = "".join(chr(0x4E00 + i) for i in range(300))
    assert of(many[:256]).dtype == np.uint8
    assert of(many).dtype == np.uint16
    assert of(many).encode(many[::-1].encode(), source="it").tolist() == list(range(300))[::-1]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("abж🙃".encode(), "holds '🙃' at position 3, which does not occur in mine"),
        (b"ab\xff", "not UTF-8 at byte 2"),
    ],
)
def test_what_has_no_token_is_named(text, said):
    with pytest.raises(TextError, match=said):
        of(LETTERS).encode(text, source="mine")


def text_of(size):
    return LETTERS + "".join(random.Random(0).choices(LETTERS, k=size - len(LETTERS)))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A file of characters of one to four bytes, and what it holds."""
    file = tmp_path_factory.mktemp("text") / "mine.txt"
    written = text_of(40_000)
    file.write_text(written, newline="", encoding="utf-8")
    return file, written


def prepared(path, cache, unit="characters"):
    return open_corpus(
        name="text", path=str(path), cache_dir=str(cache), unit=unit, progress=lambda line: None
    )


def test_no_character_is_cut_and_none_is_lost(text, tmp_path):
    file, written = text
    corpus = prepared(file, tmp_path)
    splits = [bytes(corpus.split(name, allow_test=True)) for name in corpus.splits]
    assert b"".join(splits) == written.encode()
    assert [corpus.num_tokens(name) for name in corpus.splits] == [len(s.decode()) for s in splits]
    assert "".join(map(chr, corpus.vocabulary.values)) == "".join(sorted(set(LETTERS)))
    for name, split in zip(corpus.splits, splits, strict=True):
        assert corpus.vocabulary.decode(corpus.tokens(name, allow_test=True)) == split
    part = corpus.tokens("validation", stop=40)
    assert corpus.vocabulary.decode(part).decode() == splits[1].decode()[:40]
    assert (
        json.loads((corpus.folder / "manifest.json").read_text(encoding="utf-8"))["unit"]
        == "characters"
    )
    assert read_corpus(corpus.folder).sha256 == corpus.sha256

    as_bytes = prepared(file, tmp_path, "bytes")
    assert as_bytes.folder != corpus.folder and as_bytes.sha256 != corpus.sha256
    with pytest.raises(UserError, match="prepared as characters, not bytes"):
        prepared(corpus.folder, tmp_path, "bytes")


def test_folders_json_lines_and_gzip_hold_characters_too(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    for index in range(30):
        lines = [json.dumps({"text": text_of(300 + index)}) for _ in range(5)]
        with gzip.open(folder / f"{index}.jsonl.gz", "wt", encoding="utf-8") as out:
            out.write("\n".join(lines))
    (folder / "notes.txt").write_text(text_of(3000), encoding="utf-8")
    corpus = prepared(folder, tmp_path)
    held = b"".join(bytes(corpus.split(name, allow_test=True)) for name in corpus.splits)
    assert set(held.decode()) == {*LETTERS, "\0"}
    assert prepared(f"{folder}/*.gz", tmp_path).num_tokens("train") < corpus.num_tokens("train")


def test_what_is_not_utf8_is_refused_by_name_and_place(tmp_path):
    file = tmp_path / "latin.txt"
    file.write_bytes(b"x" * 50_000 + "é".encode("latin-1") + b"x")
    with pytest.raises(UserError, match="latin.txt is not UTF-8 at byte 50000"):
        prepared(file, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())
    with pytest.raises(ValueError, match="is for DataConfig.name=text; got enwik8"):
        DataConfig(name="enwik8", vocabulary="characters")


CONFIG = """from configs import text


def get_config():
    config = text.get_config()
    config.model.update(num_layers=1, num_phases=8, num_heads=2, heads_per_phase=1, score_phases=0)
    config.model.update(score="gated", similarity_heads=0, feedforward="none")
    config.data.context = 64
    config.training.update(batch_size=8, num_steps=20, log_every=10)
    config.evaluation.update(every=10, batch_size=8, num_tokens=500)
    config.checkpoints.every = 10
    return config
"""


@pytest.mark.slow
def test_the_same_commands_train_resume_evaluate_and_sample_characters(
    text, tmp_path, monkeypatch, capfdbinary
):
    file, _ = text
    (tmp_path / "config.py").write_text(CONFIG, encoding="utf-8")
    monkeypatch.setenv("FSN_JAX_CACHE", str(tmp_path / "cache"))
    settings = [
        "train",
        f"--config={tmp_path / 'config.py'}",
        f"--config.data.path={file}",
        "--config.data.vocabulary=characters",
    ]
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", jax.config.jax_compilation_cache_dir)
    once = tmp_path / "once"
    main.program([*settings, f"--config.run_dir={once}"])

    (row,) = [r for r in read_rows(once / "metrics.jsonl") if r["kind"] == "validation"][:1]
    corpus = prepared(file, tmp_path / "cache")
    assert row["bytes"] == len(corpus.vocabulary.decode(corpus.tokens("validation")[1:500]))
    assert json.loads((once / "config.json").read_text(encoding="utf-8"))["model"][
        "vocab_size"
    ] == len(set(LETTERS))
    (once / "sample.txt").read_bytes().decode()  # whole characters

    # A run that has lost its second half ends as it did.
    rows = (once / "metrics.jsonl").read_text(encoding="utf-8")
    shutil.rmtree(once / "checkpoints" / "20")
    main.program([*settings, f"--config.run_dir={once}", "--config.data.placement=host"])
    assert len(json.loads((once / "provenance.json").read_text(encoding="utf-8"))) == 2
    assert (once / "metrics.jsonl").read_text(encoding="utf-8") == rows

    capfdbinary.readouterr()
    for program, split in ((evaluate, "validation"), (final_evaluation, "test")):
        program.program(["it", str(once), "--checkpoint=latest"])
        assert b" a byte) on " in capfdbinary.readouterr().out
        log = {"validation": "evaluations.jsonl", "test": "test_reads.jsonl"}[split]
        (result,) = read_rows(once / log)
        tokens = corpus.tokens(split, allow_test=True)
        size = len(corpus.vocabulary.decode(tokens[1:]))
        assert result["num_bytes"] == size
        assert result["bits_per_byte"] == pytest.approx(result["bpc"] * (len(tokens) - 1) / size)

    sample.program(["sample", str(once), "--prompt=жé", "--num_tokens=50"])
    drawn = capfdbinary.readouterr().out.decode()
    assert drawn.startswith("жé") and len(drawn) == len("жé") + 50 + len("\n")
    assert set(drawn) <= set(LETTERS)
