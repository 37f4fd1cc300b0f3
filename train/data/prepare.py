"""Prepare a corpus: python -m train prepare --name=pycode [--path=...] [--cache_dir=...].

A corpus is made in a scratch folder of the cache: its files are fetched or found, a
tensorflow-datasets builder turns them into ordered ArrayRecord files, and the records are written
out as one flat file a split. Only the complete folder is moved into place; the rest is removed.
"""

import hashlib
import sys
import tempfile
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from train.bucket import fetched, is_remote
from train.data.corpus import (
    MANIFEST,
    NAMES,
    SPLITS,
    Corpus,
    SplitInfo,
    default_cache,
    read_corpus,
    write_manifest,
)
from train.data.fetch import Progress, SourceFailure
from train.data.pinned import PINNED
from train.data.recipes import SHARD_SUFFIX, Recipe, recipe_of
from train.data.user_files import find_files, fingerprint
from train.data.vocabulary import Tokens, Unit, code_points
from train.errors import UserError
from train.program import Arguments


def open_corpus(
    *,
    name: str,
    path: str = "",
    cache_dir: str = "",
    unit: Unit = "bytes",
    verify: bool = True,
    progress: Progress = print,
) -> Corpus:
    """Open a corpus from the cache, or prepare it there first.

    Args:
      name: one of NAMES.
      path: the user's file, folder or pattern, required by codeparrot and text; for enwik8 the
        file itself or a zip or gzip archive of it, for pycode the folder of its wheels, both
        optional; or, for any of them, the folder of a prepared corpus, here or in a bucket (from
        where it is copied into the cache).
      cache_dir: the cache; "" means `default_cache()`.
      unit: what a token stands for; "characters" is for text.
      verify: check the hashes of train and validation (test is checked when it is read).
      progress: called with one line at a time while a corpus is prepared.

    Raises:
      UserError: an unknown name, files that cannot be had or used, a damaged cache.
    """
    if name not in NAMES:
        raise UserError(f"config.data.name={name} is not known: choose one of {', '.join(NAMES)}")
    cache = Path(cache_dir).expanduser() if cache_dir else default_cache()
    if is_remote(path):
        folder = fetched(path, cache, setting="config.data.path", marker=MANIFEST)
    elif path and (Path(path).expanduser() / MANIFEST).is_file():
        folder = Path(path).expanduser()
    else:
        folder = corpus_folder(name, path, cache, unit)
        if not folder.exists():
            prepare_corpus(name, path, cache, unit=unit, progress=progress)
    corpus = read_corpus(folder, verify=verify)
    if corpus.name != name:
        raise UserError(
            f"config.data.path={path} holds the corpus {corpus.name}, not config.data.name={name}"
        )
    if corpus.unit != unit:
        raise UserError(
            f"config.data.path={path} was prepared as {corpus.unit}, not {unit}: say "
            f"config.data.vocabulary={corpus.unit}, or name the text itself"
        )
    return corpus


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
            "train) or --path=FILE_OR_FOLDER (of train prepare)"
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
      path: the user's file, folder or pattern; see `open_corpus`.
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
            recipe = recipe_of(name, path, scratch, unit, progress)
            made = scratch / "corpus"
            made.mkdir()
            corpus = _write_splits(name, recipe, scratch / "records", made, unit)
            _check_pins(corpus)
            write_manifest(corpus, recipe.sha256, recipe.rule)
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


def _write_splits(name: str, recipe: Recipe, records: Path, folder: Path, unit: Unit) -> Corpus:
    """Build the records and write them out flat, noting what is in them."""
    from train.data.builder import build, read_texts

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


def _move_into_place(made: Path, folder: Path) -> None:
    try:
        made.rename(folder)
    except OSError:
        # Another process may have prepared the same corpus meanwhile: its folder is as good.
        if not (folder / MANIFEST).is_file():
            raise


def _say(line: str) -> None:
    print(line, flush=True)


def program(argv: Sequence[str]) -> None:
    """Prepare a corpus and print what it holds."""
    parser = Arguments(
        prog="python -m train prepare", description="Fetch and prepare a corpus in the cache."
    )
    parser.add_argument("--name", default="enwik8", help=f"one of {', '.join(NAMES)}")
    parser.add_argument("--path", default="", help="your own file, folder or pattern")
    parser.add_argument("--cache_dir", default="", help=f"default: {default_cache()}")
    parser.add_argument(
        "--vocabulary",
        default="bytes",
        choices=typing.get_args(Unit),
        help="what a token of text stands for",
    )
    options = parser.parse_args(argv[1:])
    if options.vocabulary == "characters" and options.name != "text":
        raise UserError(f"--vocabulary=characters is for --name=text; got --name={options.name}")
    corpus = open_corpus(
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
