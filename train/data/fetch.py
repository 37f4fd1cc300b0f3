"""Fetches one pinned file from the first of several sources that has it.

No source is trusted: what it gives counts once its size and its SHA-256 are the pinned ones. Of an
archive one member is read, by its exact name, as a stream of at most the pinned size.
"""

import contextlib
import dataclasses
import gzip
import http.client
import lzma
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from train.errors import UserError
from train.files import file_sha256

Progress = Callable[[str], None]

CHUNK_BYTES = 1 << 20
TIMEOUT_SECONDS = 30.0  # without a byte, for one connection
PIP_TIMEOUT_SECONDS = 1800.0  # for one call of pip, which has shorter time-outs of its own
MAX_ARCHIVE_BYTES = 64_000_000
REPORT_BYTES = 8 << 20  # between two lines of progress


class SourceFailure(Exception):
    """A source did not give the file; the message says why in a few words."""


# What network and archive readers raise: RuntimeError for an encrypted zip member, KeyError for a
# missing one, NotImplementedError for an unknown compression method.
_FAILURES = (
    SourceFailure, OSError, EOFError, ValueError, KeyError, RuntimeError, NotImplementedError,
    http.client.HTTPException, zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError,
    subprocess.SubprocessError,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class LocalFile:
    """A file that the user named: the bytes themselves, or a zip or gzip archive of them."""

    path: Path
    member: str | None = None

    @property
    def label(self) -> str:
        """The path."""
        return str(self.path)

    def obtain(self, folder: Path, progress: Progress) -> Path:
        """Returns the path."""
        return self.path


@dataclasses.dataclass(frozen=True)
class UrlArchive:
    """An archive at a URL (http or https)."""

    url: str
    member: str | None

    @property
    def label(self) -> str:
        """The URL."""
        return self.url

    def obtain(self, folder: Path, progress: Progress) -> Path:
        """Downloads the archive."""
        progress(f"downloading {self.url}")
        archive = folder / "archive"
        request = urllib.request.Request(self.url, headers={"User-Agent": "fsn_jax"})
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as body:
            _copy(body, archive, MAX_ARCHIVE_BYTES, progress)
        return archive


@dataclasses.dataclass(frozen=True)
class PackageFile:
    """A file of the package index, downloaded with the user's own pip.

    pip knows the user's indexes, mirrors, proxies and credentials, and checks the SHA-256 before it
    opens the file. Nothing is installed and nothing of the package is run: of a source
    distribution pip has the build backend, in an environment of its own, read the metadata.
    """

    name: str
    version: str
    sha256: str
    member: str | None = None

    @property
    def label(self) -> str:
        """The requirement."""
        return f"{self.name}=={self.version} through pip"

    def obtain(self, folder: Path, progress: Progress) -> Path:
        """Downloads the file: the wheel, or, to read a member, the source distribution."""
        progress(f"downloading {self.name}=={self.version} with pip (nothing is installed)")
        requirements, package = folder / "requirements.txt", folder / "package"
        requirements.write_text(
            f"{self.name}=={self.version} --hash=sha256:{self.sha256}\n", encoding="utf-8"
        )
        kind = f"--no-binary={self.name}" if self.member else "--only-binary=:all:"
        command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check"]
        command += ["--no-input", "--quiet", "--progress-bar=off", "--no-deps", "--require-hashes"]
        command += [f"--requirement={requirements}", f"--dest={package}", kind]
        result = subprocess.run(
            [*command, "--ignore-requires-python"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PIP_TIMEOUT_SECONDS,
        )
        if result.returncode:
            lines = [line for line in result.stderr.splitlines() if line.strip()]
            errors = [line for line in lines if line.startswith("ERROR:")] or lines or ["no reason"]
            raise SourceFailure(errors[-1].removeprefix("ERROR: ")[:300])
        [file] = package.iterdir()
        return file


Source = LocalFile | UrlArchive | PackageFile
"""A place that may hold the file, or an archive with the file under the name ``member``."""


@dataclasses.dataclass(frozen=True)
class PinnedFile:
    """A file to fetch.

    Attributes:
      name: name of the file.
      size: number of bytes; no more are written.
      sha256: hexadecimal digest.
      sources: tried in this order.
    """

    name: str
    size: int
    sha256: str
    sources: Sequence[Source]


def fetch(wanted: PinnedFile, folder: Path, *, advice: str, progress: Progress) -> Path:
    """Writes a file into a folder and returns its path.

    Args:
      wanted: the file.
      folder: a folder that exists; a file of that name in it is replaced.
      advice: how the user can supply the file, for the error message.
      progress: called with one line at a time.

    Raises:
      UserError: every source failed; one line gives the reason of each.
    """
    target = folder / wanted.name
    failures = []
    for source in wanted.sources:
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as scratch:
            candidate = Path(scratch) / "candidate"
            try:
                found = source.obtain(Path(scratch), progress)
                with open_member(found, source.member) as stream:
                    _copy(stream, candidate, wanted.size)
                _check(candidate, wanted)
            except _FAILURES as failure:
                reason = " ".join(str(failure).split()) or type(failure).__name__
                failures.append(f"{source.label}: {reason}")
                progress(failures[-1])
                continue
            candidate.replace(target)
            return target
    raise UserError(f"no source gave {target.name} ({'; '.join(failures)}); {advice}")


@contextlib.contextmanager
def open_member(path: Path, member: str | None) -> Iterator[IO[bytes]]:
    """Opens the named member of a zip or tar archive, or the file itself, unpacked if gzipped.

    Without a ``member`` the file is opened as it is.
    """
    with contextlib.ExitStack() as opened:
        stream: Any = opened.enter_context(path.open("rb"))
        if member and zipfile.is_zipfile(path):
            archive = opened.enter_context(zipfile.ZipFile(path))
            stream = opened.enter_context(archive.open(member))
        elif member and tarfile.is_tarfile(path):
            tar = opened.enter_context(tarfile.open(path))
            entry = tar.getmember(member)
            if not entry.isreg():
                raise SourceFailure(f"{member!r} is no regular file in the archive")
            stream = tar.extractfile(entry)
        if member and stream.read(2) == b"\x1f\x8b":
            stream.seek(0)
            stream = opened.enter_context(gzip.GzipFile(fileobj=stream))
        stream.seek(0)
        yield stream


def _copy(stream: IO[bytes], target: Path, limit: int, progress: Progress | None = None) -> None:
    """Copies at most ``limit`` bytes of a stream into a file."""
    written = 0
    with target.open("wb") as out:
        while chunk := stream.read(min(CHUNK_BYTES, limit - written + 1)):
            if progress and written // REPORT_BYTES < (written + len(chunk)) // REPORT_BYTES:
                progress(f"  {(written + len(chunk)) / 1e6:.0f} MB")
            written += len(chunk)
            if written > limit:
                raise SourceFailure(f"holds more than the expected {limit} bytes")
            out.write(chunk)


def _check(candidate: Path, wanted: PinnedFile) -> None:
    found = candidate.stat().st_size
    if found != wanted.size:
        raise SourceFailure(f"holds {found} bytes, expected {wanted.size}")
    if (digest := file_sha256(candidate)) != wanted.sha256:
        raise SourceFailure(f"altered: SHA-256 {digest}, expected {wanted.sha256}")
