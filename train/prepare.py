"""Prepare a corpus: python -m train.prepare --name=pycode [--path=...] [--cache_dir=...].

A corpus is made in a scratch folder of the cache: its files are fetched or found, a
tensorflow-datasets builder turns them into ordered ArrayRecord files, and the records are written
out as one flat file a split. Only the complete folder is moved into place; the rest is removed.
"""

import dataclasses
import hashlib
import sys
import tempfile
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from train import corpus as corpora
from train.corpus import NAMES, SPLITS, Corpus, SplitInfo
from train.datasets.files import (
    UserFile,
    contents,
    find_files,
    fingerprint,
    plan_splits,
    without_duplicates,
)
from train.datasets.pinned import ENWIK8_MEMBER, PINNED
from train.datasets.python_files import SEPARATOR, select, split_of
from train.errors import UserError
from train.fetch import LocalFile, Progress, SourceFailure, fetch
from train.program import Arguments, run_program
from train.vocabulary import Tokens, Unit, code_points

MIN_SPLIT_BYTES = 2048  # of every split: some windows
MIN_BYTES = 20 * MIN_SPLIT_BYTES

SHARD_SUFFIX = ".json.gz"  # of codeparrot-clean

FILE_RULE = "tests, empty files and exact duplicates left out; split by the SHA-256 of each file"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a corpus is made of.

    Attributes:
      builder: makes the tensorflow-datasets builder that keeps its records under a folder.
      source: what the files are, in words.
      sha256: hexadecimal SHA-256 that stands for the files.
      rule: how they become the splits, in words.
    """

    builder: Callable[[Path], Any]
    source: str
    sha256: str
    rule: str


def corpus_folder(name: str, path: str, cache: Path, unit: Unit = "bytes") -> Path:
    """Where the cache keeps a corpus; the user's own is told apart by its files' fingerprint.

    Raises:
      UserError: `path` is needed and missing, or names nothing.
    """
    if name in PINNED:
        if path and not Path(path).expanduser().exists():
            raise UserError(f"config.data.path={path} does not exist: correct it or leave it out")
        return cache / name
    if not path:
        raise UserError(
            f"config.data.name={name} needs your own files: --config.data.path=FILE_OR_FOLDER (of "
            "train) or --path=FILE_OR_FOLDER (of train.prepare)"
        )
    suffix = SHARD_SUFFIX if name == "codeparrot" else ""
    kind = "" if unit == "bytes" else f"-{unit}"
    return cache / f"{name}-{fingerprint(find_files(path, suffix))[:8]}{kind}"


def prepare_corpus(
    name: str, path: str, cache: Path, *, unit: Unit = "bytes", progress: Progress = print
) -> Path:
    """Prepare a corpus in the cache and return its folder.

    Args:
      name: one of `corpus.NAMES`.
      path: the user's file, folder or pattern; see `corpus.open_corpus`.
      cache: the cache's folder, made if it is not there.
      unit: what a token stands for; "characters" is for text.
      progress: called with one line at a time.

    Raises:
      UserError: the files cannot be had, are not the expected ones, or hold too little; the cache
        cannot be written; tensorflow-datasets is not installed.
    """
    folder = corpus_folder(name, path, cache, unit)
    progress(f"preparing {name} in {folder}")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=cache) as scratch_name:
            scratch = Path(scratch_name)
            make = RECIPES[name] if unit == "bytes" else _characters
            recipe = make(path, scratch, progress)
            made = scratch / "corpus"
            made.mkdir()
            corpus = _write_splits(name, recipe, scratch / "records", made, unit)
            _check_pins(corpus)
            corpora.write_manifest(corpus, recipe.sha256, recipe.rule)
            _move_into_place(made, folder)
    except ImportError as error:
        raise UserError(
            f"preparing a corpus needs tensorflow-datasets ({error}): pip install "
            "tensorflow-datasets importlib_resources, or carry a prepared cache to this machine"
        ) from error
    except SourceFailure as error:
        raise UserError(f"cannot prepare {name}: {error}; get its files anew") from error
    except OSError as error:
        raise UserError(
            f"cannot prepare {name} in {cache} ({error.strerror or error}): choose another folder "
            "with --config.data.cache_dir or the variable FSN_JAX_CACHE"
        ) from error
    return folder


def _enwik8(path: str, scratch: Path, progress: Progress) -> Recipe:
    from train.datasets.enwik8 import Enwik8
    from train.datasets.records import builder_options

    [wanted] = PINNED["enwik8"].files
    own = [LocalFile(Path(path).expanduser(), member=ENWIK8_MEMBER)]
    raw = fetch(
        scratch / wanted.name,
        own if path else wanted.sources,
        size=wanted.size,
        sha256=wanted.sha256,
        advice=(
            "get enwik8 or enwik8.zip yourself and name it: --config.data.path=FILE (of train) or "
            "--path=FILE (of train.prepare)"
        ),
        progress=progress,
    )
    return Recipe(
        lambda folder: Enwik8(raw=raw, **builder_options(folder)),
        source=f"enwik8, {wanted.size} bytes",
        sha256=wanted.sha256,
        rule="in order: all but the last 10 %, 5 %, 5 %",
    )


def _pycode(path: str, scratch: Path, progress: Progress) -> Recipe:
    from train.datasets.pycode import Pycode
    from train.datasets.records import builder_options

    wheels = []
    for wanted in PINNED["pycode"].files:
        own = [LocalFile(Path(path).expanduser() / wanted.name, member=None)]
        wheels.append(
            fetch(
                scratch / wanted.name,
                own if path else wanted.sources,
                size=wanted.size,
                sha256=wanted.sha256,
                advice=(
                    f"put the wheels {', '.join(file.name for file in PINNED['pycode'].files)} "
                    "into a folder and name it: --config.data.path=FOLDER (of train) or "
                    "--path=FOLDER (of train.prepare)"
                ),
                progress=progress,
            )
        )
    hashes = "".join(f"{wanted.sha256} {wanted.name}\n" for wanted in PINNED["pycode"].files)
    return Recipe(
        lambda folder: Pycode(wheels=wheels, **builder_options(folder)),
        source=f"the Python files of {', '.join(wheel.name for wheel in wheels)}",
        sha256=hashlib.sha256(hashes.encode()).hexdigest(),
        rule=f"{FILE_RULE}, in the order of it",
    )


def _codeparrot(path: str, scratch: Path, progress: Progress) -> Recipe:
    from train.datasets.codeparrot import Codeparrot, shard_sources
    from train.datasets.records import builder_options

    del scratch, progress
    found = find_files(path, SHARD_SUFFIX)
    shards = [shard.path for shard in found]
    # An empty split is an error to tensorflow-datasets: look until each holds enough.
    sizes = dict.fromkeys(SPLITS, 0)
    for _, content, digest in select(shard_sources(shards)):
        sizes[split_of(digest)] += len(content) + len(SEPARATOR)
        if min(sizes.values()) >= MIN_SPLIT_BYTES:
            break
    else:
        raise _too_small(path, sum(sizes.values()))
    return Recipe(
        lambda folder: Codeparrot(shards=shards, **builder_options(folder)),
        source=f"codeparrot-clean shards: {len(shards)} at {path}",
        sha256=fingerprint(found),
        rule=FILE_RULE,
    )


def _text(path: str, scratch: Path, progress: Progress) -> Recipe:
    del scratch
    return _own_text(path, progress, "bytes")


def _characters(path: str, scratch: Path, progress: Progress) -> Recipe:
    """Text that must be UTF-8, no character of which is cut."""
    del scratch
    return _own_text(path, progress, "characters")


def _own_text(path: str, progress: Progress, unit: Unit) -> Recipe:
    from train.datasets.records import builder_options
    from train.datasets.text import Text, between_characters, separated

    found = find_files(path)
    files = without_duplicates(found)
    if unit == "characters":
        for file in files:
            _check_utf8(file)
    sizes = [sum(map(len, separated(file, several=len(files) > 1))) for file in files]
    if sum(sizes) < MIN_BYTES:
        raise _too_small(path, sum(sizes))
    rule, spans = plan_splits(sizes, [file.sha256 for file in files], MIN_SPLIT_BYTES)
    if unit == "characters":
        spans = between_characters(files, spans)
    progress(f"files: {len(files)}, of {sum(sizes)} bytes together, split {rule}")
    return Recipe(
        lambda folder: Text(files=files, spans=spans, **builder_options(folder)),
        source=f"files: {len(files)} at {path}",
        sha256=fingerprint(found),
        rule=f"exact duplicates left out; 90 / 5 / 5 {rule}",
    )


RECIPES: dict[str, Callable[[str, Path, Progress], Recipe]] = {
    "enwik8": _enwik8,
    "pycode": _pycode,
    "codeparrot": _codeparrot,
    "text": _text,
}


def _check_utf8(file: UserFile) -> None:
    try:
        for _ in code_points(contents(file.path)):
            pass
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file.path} is not UTF-8 at byte {error.start}, as config.data.vocabulary=characters "
            "needs it: convert it, or say config.data.vocabulary=bytes"
        ) from None


def _write_splits(name: str, recipe: Recipe, records: Path, folder: Path, unit: Unit) -> Corpus:
    """Build the records and write them out flat, noting what is in them."""
    from train.datasets.records import build, read_texts

    builder = recipe.builder(records)
    build(builder)
    of_characters = unit == "characters"
    splits, seen = {}, np.zeros(sys.maxunicode + 1 if of_characters else 256, bool)

    def written(split: str, out: IO[bytes], digest: Any) -> Iterator[bytes]:
        for text in read_texts(builder, split):
            out.write(text)
            digest.update(text)
            yield text

    for split in SPLITS:
        digest, count = hashlib.sha256(), 0
        with (folder / f"{split}.bin").open("wb") as out:
            texts = written(split, out, digest)
            for values in code_points(texts) if of_characters else map(_bytes_of, texts):
                seen[values] = True
                count += values.size
            size = out.tell()
        splits[split] = SplitInfo(size, digest.hexdigest(), count if of_characters else 0)
    vocabulary: Tokens = np.flatnonzero(seen).astype(np.uint32 if of_characters else np.uint8)
    return Corpus(name, folder, vocabulary, splits, recipe.source, unit)


def _bytes_of(text: bytes) -> Any:
    return np.frombuffer(text, np.uint8)


def _check_pins(corpus: Corpus) -> None:
    if corpus.name in PINNED:
        made = {split: (info.num_bytes, info.sha256) for split, info in corpus.splits.items()}
        if made != PINNED[corpus.name].splits:
            raise RuntimeError(f"{corpus.name} came out other than it is pinned: {made}")


def _too_small(path: str, size: int) -> UserError:
    return UserError(
        f"config.data.path={path} gives {size} bytes of text, which is too little: give at least "
        f"{MIN_BYTES}, so that each of the splits can hold {MIN_SPLIT_BYTES}"
    )


def _move_into_place(made: Path, folder: Path) -> None:
    try:
        made.rename(folder)
    except OSError:
        # Another process may have prepared the same corpus meanwhile: its folder is as good.
        if not (folder / corpora.MANIFEST).is_file():
            raise


def _say(line: str) -> None:
    print(line, flush=True)


def program(argv: Sequence[str]) -> None:
    """Prepare a corpus and print what it holds."""
    parser = Arguments(
        prog="python -m train.prepare", description="Fetch and prepare a corpus in the cache."
    )
    parser.add_argument("--name", default="enwik8", help=f"one of {', '.join(NAMES)}")
    parser.add_argument("--path", default="", help="your own file, folder or pattern")
    parser.add_argument("--cache_dir", default="", help=f"default: {corpora.default_cache()}")
    parser.add_argument(
        "--vocabulary",
        default="bytes",
        choices=typing.get_args(Unit),
        help="what a token of text stands for",
    )
    options = parser.parse_args(argv[1:])
    if options.vocabulary == "characters" and options.name != "text":
        raise UserError(f"--vocabulary=characters is for --name=text; got --name={options.name}")
    corpus = corpora.open_corpus(
        name=options.name,
        path=options.path,
        cache_dir=options.cache_dir,
        unit=options.vocabulary,
        progress=_say,
    )
    _say(f"{corpus.name}: {corpus.source}")
    for split, info in corpus.splits.items():
        _say(f"  {split:10} {info.num_bytes:>12,} bytes  sha256 {info.sha256}")
    kind = "byte values" if corpus.unit == "bytes" else "characters"
    _say(f"  vocabulary {corpus.vocab_size} {kind}; identity {corpus.sha256}")
    _say(f"  in {corpus.folder}")


def main() -> None:
    """The command line."""
    sys.exit(run_program(program, sys.argv))


if __name__ == "__main__":
    main()
