"""A prepared corpus: three flat byte files and a manifest in a folder of the cache.

    <cache>/<name>[-<8 hex digits of the source's fingerprint>]/
        manifest.json  train.bin  validation.bin  test.bin  dataset/

The folder stands for itself: it can be carried to a machine without tensorflow-datasets,
into that machine's cache or anywhere else (`data.path` may name it). Runs do not read `dataset/`,
where tensorflow-datasets keeps the texts. The manifest:

    format        FORMAT, an int
    name          enwik8, pycode, codeparrot or text
    splits        {split: {"bytes": int, "sha256": hex}}, and "characters": int if that is the unit
    unit          "characters", or left out for bytes: what a token stands for
    vocabulary    the byte values that occur in any split, ascending, as hex; or the characters
    source        {"description": str, "sha256": hex} of what the corpus was made from
    rule          how the source became the splits, in words

A token is the rank of its byte, or character, in the vocabulary.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fsn_jax.vocabulary import Bytes, Tokens, Vocabulary
from train.data.pinned import PINNED
from train.errors import UserError
from train.files import file_sha256, user_path

NAMES = ("enwik8", "pycode", "codeparrot", "text")
SPLITS = ("train", "validation", "test")
FORMAT = 1
MANIFEST = "manifest.json"
DEFAULT_CACHE = "~/.cache/fsn_jax"


@dataclasses.dataclass(frozen=True)
class SplitInfo:
    """Length and SHA-256 of a split's file.

    Attributes:
      num_bytes: length in bytes.
      sha256: hexadecimal digest.
      num_characters: length in Unicode characters; 0 in a corpus of bytes, which need not be UTF-8.
    """

    num_bytes: int
    sha256: str
    num_characters: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """A prepared corpus, opened by `open_corpus`.

    Attributes:
      name: enwik8, pycode, codeparrot or text.
      folder: folder of its files.
      vocabulary: the byte values, or the characters, that occur in it.
      splits: length and hash of each of SPLITS.
      source: description of what it was made from.
    """

    name: str
    folder: Path
    vocabulary: Vocabulary
    splits: Mapping[str, SplitInfo]
    source: str

    @property
    def sha256(self) -> str:
        """Identity of the corpus, independent of where and how it was prepared.

        SHA-256 of the ASCII lines "<split> <bytes> <sha256>" of train, validation and test, then
        "vocabulary <hex of the byte values>", or "characters <hex of their UTF-8>", each ended
        by a newline.
        """
        infos = ((name, self.splits[name]) for name in SPLITS)
        lines = [f"{name} {info.num_bytes} {info.sha256}" for name, info in infos]
        values, unit = self.vocabulary, self.vocabulary.unit
        kind = "vocabulary" if unit == "bytes" else unit
        lines.append(f"{kind} {values.decode(range(len(values))).hex()}")
        return hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()

    def num_tokens(self, name: str) -> int:
        """Returns the length of a split in tokens."""
        info = self.splits[name]
        return info.num_bytes if self.vocabulary.unit == "bytes" else info.num_characters

    def split(self, name: str, *, allow_test: bool = False) -> Bytes:
        """Maps the bytes of a split, uint8[n], read-only.

        The test split is for the one command that records its use; it alone passes `allow_test`.
        Its hash is checked here, since opening the corpus leaves its bytes unread.

        Raises:
          UserError: no such split, or the test split without `allow_test`, or a damaged one.
        """
        if name not in self.splits:
            raise UserError(f"there is no split {name!r}: choose one of {', '.join(self.splits)}")
        if name == "test":
            if not allow_test:
                raise UserError(
                    "the test split is read by `python -m train test` only, which records "
                    "each use: choose train or validation"
                )
            _check_hash(self, name)
        return np.memmap(self.path(name), dtype=np.uint8, mode="r")

    def tokens(self, name: str, *, stop: int | None = None, allow_test: bool = False) -> Tokens:
        """Returns the tokens of a split, uint8[n] (wider from 257 characters on), in memory.

        Args:
          name: of the split.
          stop: number of tokens from the first on; None: all. Of bytes no others are read.
          allow_test: as of ``split``, which raises the same errors.
        """
        text = self.split(name, allow_test=allow_test)
        if self.vocabulary.unit == "bytes":
            return self.vocabulary.tokens(text[:stop])
        return self.vocabulary.tokens(text)[:stop]

    def path(self, name: str) -> Path:
        """Returns the file of a split."""
        return self.folder / f"{name}.bin"


def default_cache() -> Path:
    """Returns the folder $FSN_JAX_CACHE, or ~/.cache/fsn_jax.

    Raises:
      UserError: neither that variable nor the home folder is known.
    """
    if named := os.environ.get("FSN_JAX_CACHE"):
        return user_path("FSN_JAX_CACHE", named)
    try:
        return Path(DEFAULT_CACHE).expanduser()
    except RuntimeError:
        raise UserError(
            "there is no home folder for the cache of corpora: set HOME, or FSN_JAX_CACHE to a "
            "folder of your own"
        ) from None


def read_corpus(folder: Path) -> Corpus:
    """Reads a prepared corpus from its folder; checks the hashes of all splits but test.

    Raises:
      UserError: a file is missing or is not what the manifest says, or the manifest of a pinned
        corpus is not the known one.
    """
    manifest = folder / MANIFEST
    try:
        fields = json.loads(manifest.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise _damaged(manifest, "is missing", folder) from None
    except (OSError, ValueError) as error:
        raise _damaged(manifest, f"cannot be read ({error})", folder) from error
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise _damaged(manifest, f"is not of format {FORMAT}", folder)
    try:
        corpus = Corpus(
            name=str(fields["name"]),
            folder=folder,
            vocabulary=Vocabulary.from_text(fields["vocabulary"], fields.get("unit", "bytes")),
            splits={
                split: SplitInfo(
                    int(info["bytes"]), str(info["sha256"]), int(info.get("characters", 0))
                )
                for split, info in ((split, fields["splits"][split]) for split in SPLITS)
            },
            source=str(fields["source"]["description"]),
        )
    except (LookupError, TypeError, ValueError) as error:
        raise _damaged(manifest, f"is not understood ({error!r})", folder) from error
    pinned = PINNED.get(corpus.name)
    if pinned and pinned.splits != {s: (i.num_bytes, i.sha256) for s, i in corpus.splits.items()}:
        raise _damaged(manifest, "does not describe the known corpus", folder)
    for split, info in corpus.splits.items():
        file = corpus.path(split)
        size = file.stat().st_size if file.is_file() else None
        if size != info.num_bytes:
            found = "is missing" if size is None else f"holds {size} bytes, not {info.num_bytes}"
            raise _damaged(file, found, folder)
        if split != "test":
            _check_hash(corpus, split)
    return corpus


def is_prepared(folder: Path) -> bool:
    """Whether a folder holds a prepared corpus, damaged or not.

    A folder of texts may have a file of the manifest's name, as web applications do.
    """
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return False
    if any((folder / f"{split}.bin").is_file() for split in SPLITS):
        return True
    try:
        fields = json.loads(manifest.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return True
    return isinstance(fields, dict) and "splits" in fields


def write_manifest(corpus: Corpus, source_sha256: str, rule: str) -> None:
    """Writes the manifest of a corpus into its folder."""
    of_characters = corpus.vocabulary.unit == "characters"
    fields: dict[str, Any] = {
        "format": FORMAT,
        "name": corpus.name,
        "splits": {
            split: {"bytes": info.num_bytes, "sha256": info.sha256}
            | ({"characters": info.num_characters} if of_characters else {})
            for split, info in corpus.splits.items()
        },
        **({"unit": corpus.vocabulary.unit} if of_characters else {}),
        "vocabulary": corpus.vocabulary.to_text(),
        "source": {"description": corpus.source, "sha256": source_sha256},
        "rule": rule,
    }
    (corpus.folder / MANIFEST).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def _check_hash(corpus: Corpus, split: str) -> None:
    file = corpus.path(split)
    try:
        digest = file_sha256(file)
    except OSError as error:
        raise _damaged(file, f"cannot be read ({error.strerror})", corpus.folder) from error
    if digest != corpus.splits[split].sha256:
        raise _damaged(file, f"has SHA-256 {digest}", corpus.folder)


def _damaged(file: Path, what: str, folder: Path) -> UserError:
    return UserError(
        f"the prepared corpus is damaged: {file} {what}; delete {folder}, then start again "
        "or prepare it with `python -m train prepare`"
    )
