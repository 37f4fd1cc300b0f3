"""Corpora: from source to flat files and back; splits, hashes, and what is refused."""

import gzip
import hashlib
import json
import os
import random
import subprocess
import sys
import zipfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from small_runs import tiny_experiment

from fsn_jax.vocabulary import TextError, Vocabulary
from train.data import prepare
from train.data.corpus import SPLITS, Corpus, default_cache
from train.data.pinned import ENWIK8, PINNED, Pinned, PinnedFile
from train.data.prepare import open_corpus
from train.data.python_files import is_test, split_of
from train.data.user_files import contents, find_files, split_by_file
from train.errors import UserError
from train.load import with_data_at
from train.program import run_program


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


def text_of(size: int, seed: int = 0) -> bytes:
    """Lines of letters, no two texts alike."""
    return bytes(random.Random(seed).choices(b"abcdefghijklmnopqrstuvwxyz \n", k=size))


def opened(name: str, path: Path | str, cache: Path, **settings) -> Corpus:
    return open_corpus(
        name=name, path=str(path), cache_dir=str(cache), progress=[].append, **settings
    )


def read_splits(corpus: Corpus) -> dict[str, bytes]:
    """The bytes of the splits; these corpora are made up, so test is read as well."""
    return {split: corpus.split(split, allow_test=True).tobytes() for split in SPLITS}


def visible(folder: Path) -> list[str]:
    return sorted(os.listdir(folder)) if folder.exists() else []


# enwik8, at a smaller scale through the same code


def pin(monkeypatch, name: str, files: dict[str, bytes], splits: dict[str, bytes]) -> None:
    """Let the corpus `name` be these files and splits."""
    pinned = Pinned(
        files=tuple(
            PinnedFile(file, len(data), hashlib.sha256(data).hexdigest(), sources=())
            for file, data in files.items()
        ),
        splits={s: (len(data), hashlib.sha256(data).hexdigest()) for s, data in splits.items()},
    )
    monkeypatch.setitem(PINNED, name, pinned)


RAW = bytes(range(10, 215)) + text_of(99_795)
RAW_SPLITS = {"train": RAW[:90_000], "validation": RAW[90_000:95_000], "test": RAW[95_000:]}


@pytest.fixture
def small_enwik8(tmp_path, monkeypatch) -> Path:
    pin(monkeypatch, "enwik8", {"enwik8": RAW}, RAW_SPLITS)
    # Many records, an odd number of bytes each: their order and their edges must not show.
    monkeypatch.setattr("train.data.recipes.EXAMPLE_BYTES", 777)
    file = tmp_path / "raw"
    file.write_bytes(RAW)
    return file


def test_enwik8_is_split_in_order_at_its_boundaries(small_enwik8, cache):
    corpus = opened("enwik8", small_enwik8, cache)
    assert read_splits(corpus) == RAW_SPLITS
    assert {split: info.num_bytes for split, info in corpus.splits.items()} == {
        "train": 90_000,
        "validation": 5_000,
        "test": 5_000,
    }
    assert len(corpus.vocabulary) == 205
    assert visible(cache) == ["enwik8"]
    flat = ["manifest.json", "test.bin", "train.bin", "validation.bin"]
    assert visible(corpus.folder) == ["dataset", *flat]


def test_the_dataset_is_one_of_tensorflow_datasets(small_enwik8, cache):
    import tensorflow_datasets as tfds

    folder = opened("enwik8", small_enwik8, cache).folder / "dataset" / "enwik8" / "1.0.0"
    builder = tfds.builder_from_directory(str(folder))
    for split, text in RAW_SPLITS.items():
        examples = list(builder.as_data_source(split))
        assert [int(example["index"]) for example in examples] == list(range(len(examples)))
        assert b"".join(example["text"] for example in examples) == text
    assert examples[1]["name"] == f"enwik8:{95_000 + 777}".encode()


def test_the_pinned_boundaries_of_enwik8():
    sizes = [ENWIK8.splits[split][0] for split in SPLITS]
    assert sizes == [90_000_000, 5_000_000, 5_000_000]
    assert sum(sizes) == ENWIK8.files[0].size
    digest = "2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8"
    assert ENWIK8.files[0].sha256 == digest


@pytest.mark.slow
def test_the_real_enwik8_has_its_boundaries():
    corpus = open_corpus(name="enwik8")  # hashes of train and validation are checked here
    assert len(corpus.vocabulary) == 205
    assert corpus.path("test").stat().st_size == 5_000_000
    train, validation = corpus.split("train"), corpus.split("validation")
    assert train[:10].tobytes() == b"<mediawiki"
    assert (train.size, validation.size) == (90_000_000, 5_000_000)


@pytest.mark.slow
def test_the_real_pycode_is_python_and_no_file_is_in_two_splits():
    corpus = open_corpus(name="pycode")
    train, validation = (
        corpus.split(split).tobytes().split(b"\0") for split in ("train", "validation")
    )
    assert (len(train) - 1, len(validation) - 1) == (2714, 152)
    assert train[-1] == validation[-1] == b""
    assert set(train[:-1]).isdisjoint(validation[:-1])
    for source in validation[:-1]:
        compile(source, "pycode", "exec", dont_inherit=True)


def test_a_second_opening_prepares_nothing(small_enwik8, cache, monkeypatch):
    first = opened("enwik8", small_enwik8, cache)

    def fail(*args, **kwargs):
        raise AssertionError("prepared twice")

    monkeypatch.setattr(prepare, "prepare_corpus", fail)
    second = opened("enwik8", "", cache)
    assert second.sha256 == first.sha256
    np.testing.assert_array_equal(second.split("train"), first.split("train"))


def test_the_wrong_file_for_enwik8_is_refused(small_enwik8, cache):
    small_enwik8.write_bytes(RAW[:-1] + b"?")
    with pytest.raises(UserError, match=r"altered: SHA-256 .*--config\.data\.path=FILE"):
        opened("enwik8", small_enwik8, cache)
    small_enwik8.write_bytes(RAW[:-1])
    with pytest.raises(UserError, match="holds 99999 bytes, expected 100000"):
        opened("enwik8", small_enwik8, cache)
    assert visible(cache) == []


def test_another_file_is_refused_beside_a_prepared_enwik8_too(small_enwik8, cache, tmp_path):
    opened("enwik8", small_enwik8, cache)
    assert opened("enwik8", small_enwik8, cache).name == "enwik8"
    (tmp_path / "mine.txt").write_bytes(b"a text of my own")
    with pytest.raises(UserError, match="mine.txt: holds 16 bytes, .* own has the name text"):
        opened("enwik8", tmp_path / "mine.txt", cache)


def test_a_corpus_that_comes_out_otherwise_than_pinned_is_noticed(small_enwik8, cache, monkeypatch):
    pin(monkeypatch, "enwik8", {"enwik8": RAW}, RAW_SPLITS | {"test": b"other"})
    with pytest.raises(RuntimeError, match="came out other than it is pinned"):
        opened("enwik8", small_enwik8, cache)
    assert visible(cache) == []


def test_opening_a_prepared_corpus_needs_neither_tfds_nor_grain(tmp_path, cache):
    (tmp_path / "own.txt").write_bytes(text_of(50_000))
    corpus = opened("text", tmp_path / "own.txt", cache)
    program = f"""
import sys
for name in ("tensorflow_datasets", "tensorflow", "grain", "array_record"):
    sys.modules[name] = None  # an import of it fails
from train.data.prepare import open_corpus
for path in ({str(tmp_path / "own.txt")!r}, {str(corpus.folder)!r}):
    corpus = open_corpus(name="text", path=path, cache_dir={str(cache)!r})
    print(corpus.sha256, corpus.tokens("train").size)
"""
    result = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent.parent,
    )
    assert result.stdout.split() == 2 * [corpus.sha256, "45000"]


def test_a_carried_folder_opens_anywhere(small_enwik8, tmp_path, cache):
    corpus = opened("enwik8", small_enwik8, cache)
    carried = tmp_path / "elsewhere"
    corpus.folder.rename(carried)
    assert opened("enwik8", carried, tmp_path / "unused").sha256 == corpus.sha256
    assert visible(tmp_path / "unused") == []


# The corpus itself


@pytest.fixture
def corpus(tmp_path, cache) -> Corpus:
    (tmp_path / "own.txt").write_bytes(text_of(50_000))
    return opened("text", tmp_path / "own.txt", cache)


def test_tokens_are_ranks_in_the_vocabulary(corpus):
    raw, tokens = corpus.split("train"), corpus.tokens("train")
    assert tokens.dtype == corpus.vocabulary.dtype == np.uint8
    assert corpus.vocabulary.values.tolist() == sorted(set(text_of(50_000)))
    np.testing.assert_array_equal(corpus.vocabulary.values[tokens], raw)
    np.testing.assert_array_equal(corpus.vocabulary.table[raw], tokens)


def test_of_bytes_only_the_tokens_wanted_are_looked_up(corpus):
    tokens = corpus.tokens("train")
    with mock.patch.object(
        Vocabulary, "tokens", autospec=True, side_effect=Vocabulary.tokens
    ) as looked_up:
        np.testing.assert_array_equal(corpus.tokens("train", stop=70), tokens[:70])
    assert [call.args[1].size for call in looked_up.call_args_list] == [70]


def test_encode_and_decode_are_inverse(corpus):
    text = b"the quick brown fox\n"
    tokens = corpus.vocabulary.encode(text, source="")
    assert tokens.dtype == np.int32
    assert corpus.vocabulary.decode(tokens) == text
    assert corpus.vocabulary.encode(b"", source="").size == 0
    assert corpus.vocabulary.decode([]) == b""


def test_a_byte_outside_the_vocabulary_is_named_with_its_place(corpus):
    with pytest.raises(TextError, match=r"byte 0x51 at position 4\b"):
        corpus.vocabulary.encode(b"the Quick Brown fox", source="")


@pytest.mark.parametrize("tokens", [[28], [-1], [0, 300]])
def test_a_number_that_is_no_token_is_refused(corpus, tokens):
    assert len(corpus.vocabulary) == 28
    with pytest.raises(ValueError, match=r"tokens must be in \[0, 28\)"):
        corpus.vocabulary.decode(tokens)


def test_splits_cannot_be_written_to(corpus):
    assert isinstance(corpus.split("train"), np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        corpus.split("train")[0] = 0


def test_the_test_split_is_kept_for_its_own_command(corpus):
    for read in (corpus.split, corpus.tokens):
        with pytest.raises(UserError, match="train test"):
            read("test")
        assert read("test", allow_test=True).size == 2500
    with pytest.raises(UserError, match="no split 'dev': choose one of train, validation, test"):
        corpus.split("dev")


def test_the_identity_is_the_stated_hash_and_not_the_place(corpus, tmp_path):
    lines = [
        f"{split} {len(data)} {hashlib.sha256(data).hexdigest()}\n"
        for split, data in read_splits(corpus).items()
    ]
    lines.append(f"vocabulary {corpus.vocabulary.values.tobytes().hex()}\n")
    assert corpus.sha256 == hashlib.sha256("".join(lines).encode()).hexdigest()
    (tmp_path / "moved").mkdir()
    (tmp_path / "moved" / "copy.txt").write_bytes(text_of(50_000))
    other = opened("text", tmp_path / "moved", tmp_path / "other")
    assert other.sha256 == corpus.sha256


def damage(corpus: Corpus, how: str) -> str:
    """Damage the corpus; return the file that the message should name."""
    manifest = corpus.folder / "manifest.json"
    file = corpus.path("validation")
    if how == "flipped":
        data = bytearray(file.read_bytes())
        data[100] ^= 1
        file.write_bytes(data)
    elif how == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    elif how == "gone":
        file.unlink()
    elif how == "no manifest":
        manifest.unlink()
    elif how == "cut manifest":
        manifest.write_text(manifest.read_text(encoding="utf-8")[:-20], encoding="utf-8")
    elif how == "other format":
        manifest.write_text(
            json.dumps(json.loads(manifest.read_text(encoding="utf-8")) | {"format": 0}),
            encoding="utf-8",
        )
    elif how == "no vocabulary":
        fields = json.loads(manifest.read_text(encoding="utf-8"))
        del fields["vocabulary"]
        manifest.write_text(json.dumps(fields), encoding="utf-8")
    return str(manifest if "manifest" in how or how.startswith(("other", "no ")) else file)


@pytest.mark.parametrize(
    "how",
    ["flipped", "cut", "gone", "no manifest", "cut manifest", "other format", "no vocabulary"],
)
def test_a_damaged_cache_is_named_with_the_remedy(corpus, tmp_path, cache, how):
    file = damage(corpus, how)
    with pytest.raises(UserError) as caught:
        opened("text", tmp_path / "own.txt", cache)
    message = str(caught.value)
    assert file in message
    assert f"delete {corpus.folder}" in message
    assert "\n" not in message


def test_damage_to_test_is_found_when_it_is_read(corpus, tmp_path, cache):
    file = corpus.path("test")
    file.write_bytes(file.read_bytes()[::-1])
    again = opened("text", tmp_path / "own.txt", cache)
    with pytest.raises(UserError, match=r"damaged: .*test\.bin has SHA-256"):
        again.split("test", allow_test=True)


def test_a_file_that_cannot_be_read_is_damage(corpus, tmp_path, cache, monkeypatch):
    def denied(path):
        raise PermissionError(13, "No")

    monkeypatch.setattr("train.data.corpus.file_sha256", denied)
    with pytest.raises(UserError, match=r"damaged: .*train\.bin cannot be read \(No\); delete"):
        open_corpus(name="text", path=str(corpus.folder), cache_dir=str(cache))
    with pytest.raises(UserError, match=r"damaged: .*test\.bin cannot be read \(No\); delete"):
        corpus.split("test", allow_test=True)


def test_a_manifest_cannot_pass_for_a_pinned_corpus(small_enwik8, cache, monkeypatch):
    opened("enwik8", small_enwik8, cache)
    monkeypatch.undo()  # the real pins
    with pytest.raises(UserError, match="does not describe the known corpus"):
        opened("enwik8", "", cache)


# The user's own text


def test_a_file_is_split_by_position(tmp_path, cache, monkeypatch):
    monkeypatch.setattr("train.data.recipes.EXAMPLE_BYTES", 999)
    text = bytes(range(256)) * 200 + b"\0\0end"  # binary is fine
    (tmp_path / "own.bin").write_bytes(text)
    corpus = opened("text", tmp_path / "own.bin", cache)
    part = len(text) // 20
    assert read_splits(corpus) == {
        "train": text[: -2 * part],
        "validation": text[-2 * part : -part],
        "test": text[-part:],
    }
    assert len(corpus.vocabulary) == 256
    assert corpus.vocabulary.decode(corpus.vocabulary.encode(text, source="")) == text


def make_folder(folder: Path, count: int, size: int) -> dict[str, bytes]:
    files = {f"{i % 3}/{i:03}.txt": text_of(size, seed=i) for i in range(count)}
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text)
    return files


def test_a_folder_is_split_by_file(tmp_path, cache):
    files = make_folder(tmp_path / "own", count=60, size=2500)
    (tmp_path / "own" / ".hidden").write_bytes(text_of(10_000, seed=99))
    (tmp_path / "own" / ".git").mkdir()
    (tmp_path / "own" / ".git" / "object").write_bytes(text_of(10_000, seed=98))
    (tmp_path / "own" / "zz-again.txt").write_bytes(files["0/000.txt"])
    corpus = opened("text", tmp_path / "own", cache)
    pieces = {}
    for split, data in read_splits(corpus).items():
        assert data.endswith(b"\0")
        pieces[split] = data[:-1].split(b"\0")
        names = [name for text in pieces[split] for name in files if files[name] == text]
        assert len(names) == len(pieces[split])  # whole files
        assert names == sorted(names)
    assert sorted(sum(pieces.values(), [])) == sorted(files.values())  # each in one split, once
    assert {split: len(texts) for split, texts in pieces.items()} == {
        "train": 54,
        "validation": 3,
        "test": 3,
    }


def test_each_of_several_files_ends_with_one_separator(tmp_path, cache):
    write(tmp_path / "own" / "a.jsonl", json.dumps({"text": "z" * 50_000}).encode())
    write(tmp_path / "own" / "b.txt", b"plain")
    write(tmp_path / "own" / "c.txt", b"nul\0")
    splits = read_splits(opened("text", tmp_path / "own", cache))
    assert b"".join(splits.values()) == b"z" * 50_000 + b"\0plain\0nul\0"


def test_files_too_few_to_split_by_file_are_split_by_position(tmp_path, cache):
    files = make_folder(tmp_path / "own", count=3, size=30_000)
    joined = b"".join(text + b"\0" for _, text in sorted(files.items()))
    splits = read_splits(opened("text", tmp_path / "own", cache))
    assert splits["train"] + splits["validation"] + splits["test"] == joined
    assert len(splits["validation"]) == len(splits["test"]) == len(joined) // 20


def test_a_pattern_takes_the_files_it_matches(tmp_path, cache):
    files = make_folder(tmp_path / "own", count=30, size=2000)
    (tmp_path / "own" / "1" / "skip.dat").write_bytes(bytes(1000))
    corpus = opened("text", tmp_path / "own" / "**" / "*.txt", cache)
    assert sum(info.num_bytes for info in corpus.splits.values()) == 30 * 2001
    assert corpus.sha256 == opened("text", tmp_path / "own" / "*" / "*.txt", cache).sha256
    assert [file.name for file in find_files(str(tmp_path / "own" / "**" / "*.txt"))] == sorted(
        files
    )


def test_a_changed_file_is_another_corpus(tmp_path, cache):
    own = tmp_path / "own.txt"
    own.write_bytes(text_of(50_000))
    first = opened("text", own, cache)
    own.write_bytes(text_of(50_000, seed=1))
    second = opened("text", own, cache)
    assert first.folder != second.folder
    assert first.sha256 != second.sha256
    assert second.split("train").tobytes() == text_of(50_000, seed=1)[:45_000]
    assert len(visible(cache)) == 2


def test_packed_text_and_json_lines_are_understood(tmp_path):
    documents = ["one\n", "zwei ü", "\ud800"]
    lines = "".join(
        json.dumps({field: document}) + "\n\n"
        for field, document in zip(("text", "content", "text"), documents, strict=True)
    ).encode()
    expected = b"one\n\0" + "zwei ü".encode() + b"\0" + b"\xed\xa0\x80\0"
    for name, data, held in [
        ("a.jsonl", lines, expected),
        ("a.jsonl.gz", gzip.compress(lines), expected),
        ("a.txt.gz", gzip.compress(b"plain"), b"plain"),
        ("a.json", lines, lines),
    ]:
        (tmp_path / name).write_bytes(data)
        assert b"".join(contents(tmp_path / name)) == held


@pytest.mark.parametrize("seed", range(20))
def test_splits_by_file_keep_to_their_shares(seed):
    rng = random.Random(seed)
    sizes = [rng.randrange(1, 5000) for _ in range(rng.randrange(1, 200))]
    digests = [f"{rng.random()}" for _ in sizes]
    splits = split_by_file(sizes, digests, floor=100)
    if splits is None:
        assert len(sizes) < 60
        return
    assert sorted(sum(splits.values(), [])) == list(range(len(sizes)))
    for split in ("validation", "test"):
        held = sum(sizes[index] for index in splits[split])
        assert sum(sizes) / 40 <= held <= 3 * sum(sizes) / 40


# Code


def test_tests_are_left_out_by_name_and_folder():
    left_out = ["tests/a.py", "a/test/b/c.py", "a/test_b.py", "a/b_test.py", "conftest.py"]
    left_out += ["a/tests.py", "test.py"]
    kept = ["a/testing.py", "a/testing/b.py", "attest.py", "a/contest.py", "latest/a.py", "b.py"]
    assert all(is_test(path) for path in left_out)
    assert not any(is_test(path) for path in kept)


def test_the_split_of_a_file_is_the_pinned_one():
    digests = [hashlib.sha256(bytes([i])).digest() for i in range(200)]
    splits = [split_of(digest) for digest in digests]
    assert [splits.count(split) for split in SPLITS] == [182, 12, 6]
    assert [i for i, split in enumerate(splits) if split == "validation"][:3] == [0, 10, 20]


def code_files(count: int) -> list[tuple[str, bytes]]:
    files = [(f"p/m{i}.py", f"# {i}\n".encode() + text_of(600, seed=i)) for i in range(count)]
    files += [("p/again.py", files[0][1]), ("p/tests/t.py", b"no"), ("p/e.py", b"")]
    return [*files, ("p/nul.py", b"a\0b")]


def expected_code(files: list[tuple[str, bytes]], *, by_digest: bool) -> dict[str, bytes]:
    """The rules, written once more."""
    splits: dict[str, list[tuple[bytes, bytes]]] = {split: [] for split in SPLITS}
    for _, content in files[:-4]:
        digest = hashlib.sha256(content).digest()
        percent = int(digest[:8].hex(), 16) % 100
        name = "train" if percent < 90 else "validation" if percent < 95 else "test"
        splits[name].append((digest, content))
    return {
        split: b"".join(content + b"\0" for _, content in (sorted(chosen) if by_digest else chosen))
        for split, chosen in splits.items()
    }


def test_codeparrot_shards_follow_the_rules(tmp_path, cache):
    files = code_files(200)
    for shard, part in enumerate((files[:120], files[120:])):
        lines = [json.dumps({"path": path, "content": text.decode()}) for path, text in part]
        (tmp_path / f"file-{shard:03}.json.gz").write_bytes(
            gzip.compress("\n".join([*lines, "", ""]).encode())  # blank lines are nothing
        )
    (tmp_path / "README.md").write_text("not a shard", encoding="utf-8")
    corpus = opened("codeparrot", tmp_path, cache)
    assert read_splits(corpus) == expected_code(files, by_digest=False)
    assert visible(cache) == [corpus.folder.name]


def test_pycode_wheels_follow_the_rules(tmp_path, cache, monkeypatch):
    files = code_files(200)
    wheels = {}
    for name, part in (("a.whl", files[:120]), ("b.whl", files[120:])):
        with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED) as pack:
            for path, text in [*part, ("p/data.txt", b"no code")]:
                pack.writestr(path, text)
        wheels[name] = (tmp_path / name).read_bytes()
    expected = expected_code(files, by_digest=True)
    pin(monkeypatch, "pycode", wheels, expected)
    assert read_splits(opened("pycode", tmp_path, cache)) == expected
    (tmp_path / "b.whl").unlink()
    # A run that was trained on them is read from the cache once its wheels are gone.
    changes = {"data__name": "pycode", "data__cache_dir": str(cache)}
    trained = tiny_experiment(tmp_path / "gone", tmp_path / "run", **changes)
    data = with_data_at(trained, "").data
    assert read_splits(opened(data.name, data.path, cache)) == expected
    with pytest.raises(UserError, match=r"no source gave b\.whl .*put the wheels a\.whl, b\.whl"):
        opened("pycode", tmp_path, tmp_path / "other")
    assert visible(tmp_path / "other") == []


# Refusals


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


GOOD_LINE = json.dumps({"content": "x" * 30_000}).encode() + b"\n"

REFUSALS = {
    "unknown name": ("enwik9", lambda tmp: "", "config.data.name=enwik9 is not known: choose"),
    "no path": ("text", lambda tmp: "", "config.data.name=text needs your own files"),
    "no shards": ("codeparrot", lambda tmp: "", "config.data.name=codeparrot needs your own"),
    "missing file": ("text", lambda tmp: tmp / "none.txt", "none.txt does not exist: name a file"),
    "missing enwik8": ("enwik8", lambda tmp: tmp / "enwik8", "enwik8 does not exist: correct it"),
    "empty folder": (
        "text",
        lambda tmp: write(tmp / "own" / ".hidden", b"x").parent,
        "own is a folder with no file in it",
    ),
    "no match": ("text", lambda tmp: tmp / "*.md", "*.md matches no file"),
    "empty file": ("text", lambda tmp: write(tmp / "own.txt", b""), "gives 0 bytes of text"),
    "short file": (
        "text",
        lambda tmp: write(tmp / "own.txt", text_of(40_959)),
        "gives 40959 bytes of text, which is too little: give at least 40960",
    ),
    "folder of no shards": (
        "codeparrot",
        lambda tmp: write(tmp / "own" / "a.txt", b"x").parent,
        "own is a folder with no .json.gz file in it",
    ),
    "shard not packed": (
        "codeparrot",
        lambda tmp: write(tmp / "a.json.gz", GOOD_LINE),
        "a.json.gz is not a sound gzip file",
    ),
    "shard cut": (
        "codeparrot",
        lambda tmp: write(tmp / "a.json.gz", gzip.compress(GOOD_LINE)[:-9]),
        "a.json.gz is not a sound gzip file",
    ),
    "shard without content": (
        "codeparrot",
        lambda tmp: write(tmp / "a.json.gz", gzip.compress(GOOD_LINE + b'{"code": ""}\n')),
        'a.json.gz, line 2: expected a JSON object with a text field "content"',
    ),
    "small shard": (
        "codeparrot",
        lambda tmp: write(tmp / "a.json.gz", gzip.compress(GOOD_LINE)),
        "gives 30001 bytes of text, which is too little",
    ),
    "text not packed": (
        "text",
        lambda tmp: write(tmp / "a.gz", text_of(50_000)),
        "a.gz is not a sound gzip file",
    ),
    "line of a number": (
        "text",
        lambda tmp: write(tmp / "a.jsonl", b'{"text": 3}'),
        "a.jsonl, line 1: expected a JSON object with a text field",
    ),
    "line that is no JSON": (
        "text",
        lambda tmp: write(tmp / "a.jsonl", b'{"text": "a"}\nplain'),
        "a.jsonl, line 2: expected a JSON object",
    ),
    "line without text": (
        "text",
        lambda tmp: write(tmp / "a.jsonl", b'{"body": "a"}'),
        "a.jsonl, line 1: expected a JSON object",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_mistakes_are_refused_in_one_line_and_leave_nothing(tmp_path, cache, case):
    name, make, said = REFUSALS[case]
    with pytest.raises(UserError) as caught:
        opened(name, make(tmp_path), cache)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert visible(cache) == []


def test_a_cache_that_cannot_be_written_is_refused(tmp_path):
    own = write(tmp_path / "own.txt", text_of(50_000))
    with pytest.raises(UserError, match=r"Not a directory.*--config\.data\.cache_dir"):
        opened("text", own, own / "cache")


def test_a_prepared_folder_of_another_corpus_is_refused(corpus):
    with pytest.raises(UserError, match="holds the corpus text, not config.data.name=enwik8"):
        open_corpus(name="enwik8", path=str(corpus.folder))


# The command


def test_the_command_prepares_and_tells_what_it_made(tmp_path, cache, capsys):
    own = write(tmp_path / "own.txt", text_of(50_000))
    arguments = ["--name=text", f"--path={own}", f"--cache_dir={cache}"]
    assert run_program(prepare.program, ["prepare", *arguments]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "train            45,000 bytes" in printed.out
    assert "vocabulary 28 byte values" in printed.out
    assert opened("text", own, cache).sha256 in printed.out


def test_the_command_fails_in_one_line_with_status_2(cache, capsys):
    argv = ["prepare", "--name=text", f"--cache_dir={cache}"]
    assert run_program(prepare.program, argv) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: config.data.name=text needs your own files")
    assert printed.err.count("\n") == 1


def test_the_cache_is_where_the_variable_says(monkeypatch, tmp_path):
    monkeypatch.setenv("FSN_JAX_CACHE", str(tmp_path))
    assert default_cache() == tmp_path
    monkeypatch.delenv("FSN_JAX_CACHE")
    assert default_cache() == Path.home() / ".cache" / "fsn_jax"
