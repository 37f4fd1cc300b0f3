"""``python -m train prepare --name=NAME``: prepares a corpus in the cache.

A corpus is made in a scratch folder of the cache: its files are fetched or found, stored as a
tensorflow-datasets dataset, and from that as one flat file a split, which a run maps into memory.
Only the complete folder is moved into place.
"""

import functools
import sys
import tempfile
import typing
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fsn_jax.vocabulary import Tokens, Unit, Vocabulary, code_points
from train.bucket import fetched, is_remote
from train.data.corpus import (
    DEFAULT_CACHE,
    MANIFEST,
    NAMES,
    Corpus,
    SplitInfo,
    default_cache,
    is_prepared,
    read_corpus,
    write_manifest,
)
from train.data.fetch import Progress
from train.data.pinned import PINNED
from train.data.recipes import SHARD_SUFFIX, Recipe, recipe_of
from train.data.user_files import CHUNK_BYTES, find_files, fingerprint
from train.errors import UserError
from train.files import file_sha256, user_path
from train.program import Arguments

DATASET = "dataset"
"""Folder, in that of a corpus, of its tensorflow-datasets dataset."""


_say = functools.partial(print, flush=True)


def open_corpus(
    *,
    name: str,
    path: str = "",
    cache_dir: str = "",
    unit: Unit = "bytes",
    progress: Progress = _say,
) -> Corpus:
    """Opens a corpus from the cache; prepares it there first if needed.

    Args:
      name: one of NAMES.
      path: the user's file, folder or pattern, required by codeparrot and text; for enwik8 the
        file itself or a zip or gzip archive of it, for pycode the folder of its wheels, both
        optional; or, for any of them, the folder of a prepared corpus, here or in a bucket (from
        where it is copied into the cache).
      cache_dir: folder of the cache; "" means `default_cache()`.
      unit: what a token stands for; "characters" is for text only.
      progress: called with one line at a time while a corpus is prepared.

    Raises:
      UserError: an unknown name, files that cannot be had or used, a damaged cache.
    """
    if name not in NAMES:
        raise UserError(f"config.data.name={name} is not known: choose one of {', '.join(NAMES)}")
    cache = user_path("config.data.cache_dir", cache_dir) if cache_dir else default_cache()
    if is_remote(path):
        folder = fetched(path, cache, setting="config.data.path", marker=MANIFEST, but=(DATASET,))
    elif path and is_prepared(user_path("config.data.path", path)):
        folder = user_path("config.data.path", path)
    else:
        folder = corpus_folder(name, path, cache, unit)
        if not folder.exists():
            prepare_corpus(name, path, cache, unit=unit, progress=progress)
        elif path and name in PINNED:
            _refuse_other_files(name, path, unit)
    corpus = read_corpus(folder)
    if corpus.name != name:
        raise UserError(
            f"config.data.path={path} holds the corpus {corpus.name}, not config.data.name={name}"
        )
    if (prepared := corpus.vocabulary.unit) != unit:
        raise UserError(
            f"config.data.path={path} was prepared as {prepared}, not {unit}: say "
            f"config.data.vocabulary={prepared}, or name the text itself"
        )
    return corpus


def corpus_folder(name: str, path: str, cache: Path, unit: Unit = "bytes") -> Path:
    """Returns the folder of a corpus in the cache; the user's own has its files' fingerprint.

    Raises:
      UserError: `path` is needed and missing, or names nothing.
    """
    if name in PINNED:
        if path and not user_path("config.data.path", path).exists():
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


def _refuse_other_files(name: str, path: str, unit: Unit) -> None:
    """Raises UserError if the files at ``path`` are not those that a cached corpus is made of."""
    with tempfile.TemporaryDirectory(prefix="fsn_jax-") as scratch:
        recipe_of(name, path, Path(scratch), unit, progress=lambda line: None)


def prepare_corpus(
    name: str, path: str, cache: Path, *, unit: Unit = "bytes", progress: Progress = _say
) -> Path:
    """Prepares a corpus in the cache and returns its folder.

    Args:
      name: one of `corpus.NAMES`.
      path: the user's file, folder or pattern; see `open_corpus`.
      cache: folder of the cache, created if needed.
      unit: what a token stands for; "characters" is for text only.
      progress: called with one line at a time.

    Raises:
      UserError: the files cannot be had, are not the expected ones, or hold too little; the cache
        cannot be written.
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
            corpus = _write_splits(name, recipe, made, unit)
            _check_pins(corpus)
            write_manifest(corpus, recipe.sha256, recipe.rule)
            if name not in PINNED and (
                f"-{recipe.sha256[:8]}" not in folder.name
                or corpus_folder(name, path, cache, unit) != folder
            ):
                raise UserError(f"the files at {path} changed while they were read; run it again")
            _move_into_place(made, folder)
    except OSError as error:
        raise UserError(
            f"cannot prepare {name} in {cache} ({error.strerror or error}): choose another folder "
            "with --config.data.cache_dir or the variable FSN_JAX_CACHE"
        ) from error
    return folder


def _write_splits(name: str, recipe: Recipe, folder: Path, unit: Unit) -> Corpus:
    """Stores the dataset and writes it flat; collects sizes, hashes and the vocabulary."""
    from train.data.builder import store  # here: a prepared corpus opens without the library

    of_characters = unit == "characters"
    splits, seen = {}, np.zeros(sys.maxunicode + 1 if of_characters else 256, bool)
    for split, texts in store(name, recipe.examples, folder / DATASET).items():
        file, count = folder / f"{split}.bin", 0
        with file.open("wb") as out:
            out.writelines(texts)
        with file.open("rb") as stream:
            pieces = iter(lambda: stream.read(CHUNK_BYTES), b"")  # noqa: B023
            for part in code_points(pieces) if of_characters else map(_bytes, pieces):
                seen[part] = True
                count += part.size
        size = file.stat().st_size
        splits[split] = SplitInfo(size, file_sha256(file), count if of_characters else 0)
    values: Tokens = np.flatnonzero(seen).astype(np.uint32 if of_characters else np.uint8)
    return Corpus(name, folder, Vocabulary(values, unit), splits, recipe.source)


def _bytes(text: bytes) -> Tokens:
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


def program(argv: Sequence[str]) -> None:
    """Prepares a corpus and prints what it holds."""
    parser = Arguments(
        prog="python -m train prepare", description="Fetches and prepares a corpus in the cache."
    )
    parser.add_argument("--name", default="enwik8", help=f"one of {', '.join(NAMES)}")
    parser.add_argument("--path", default="", help="your own file, folder or pattern")
    parser.add_argument(
        "--cache_dir", default="", help=f"default: $FSN_JAX_CACHE or {DEFAULT_CACHE}"
    )
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
    kind = "byte values" if corpus.vocabulary.unit == "bytes" else "characters"
    _say(f"  vocabulary {len(corpus.vocabulary)} {kind}; identity {corpus.sha256}")
    _say(f"  in {corpus.folder}")
