"""Verified fetching of one file from a list of sources that are not trusted.

A source writes what it believes to be the file under a temporary name. The bytes count only once
their number and their SHA-256 agree with the pinned ones: then they are moved into place, and
until then nothing of them can be seen at the target. A source that fails says why in one line, and
the next is tried.

Archives are treated as hostile. One member is read, by its exact name, as a stream, into a file
whose name we choose; paths inside an archive never reach the disk; sizes declared inside it are
not believed, and reading stops one byte beyond what the file may hold.
"""

import dataclasses
import gzip
import http.client
import io
import lzma
import os
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from train.errors import UserError
from train.files import file_sha256

Progress = Callable[[str], None]

CHUNK_BYTES = 1 << 20
TIMEOUT_SECONDS = 30.0  # without a byte, for one connection
PIP_TIMEOUT_SECONDS = 1800.0  # for one whole call of pip, which has time-outs of its own
REPORT_SECONDS = 2.0  # between two lines of progress
MAX_ARCHIVE_OVERHEAD = 64 << 20  # what may stand before the member in a tar


class SourceFailure(Exception):
    """A source did not give the file; the message says why, in a few words."""


class Source(Protocol):
    """A place that may hold the file."""

    @property
    def label(self) -> str:
        """What the messages call this source."""

    def write(self, target: Path, limit: int, progress: Progress) -> None:
        """Write at most `limit` bytes to `target`; scratch files may stand beside it.

        Raises:
          SourceFailure: the source cannot give the file.
        """


@dataclasses.dataclass(frozen=True)
class LocalFile:
    """A file that the user named: the bytes themselves, or a zip or gzip archive of them."""

    path: Path
    member: str | None  # to read if it is a zip archive; None: take archives as they are

    @property
    def label(self) -> str:
        """The path."""
        return str(self.path)

    def write(self, target: Path, limit: int, progress: Progress) -> None:
        """Copy the file, or what the archive holds."""
        with archive_errors():
            with self.path.open("rb") as stream:
                magic = stream.read(4)
            if self.member is not None and magic == b"PK\x03\x04":
                copy_member(self.path, self.member, target, limit)
            elif self.member is not None and magic[:2] == b"\x1f\x8b":
                with gzip.open(self.path) as unpacked:
                    _copy(unpacked, target, limit)
            else:
                with self.path.open("rb") as stream:
                    _copy(stream, target, limit)


@dataclasses.dataclass(frozen=True)
class UrlArchive:
    """A member of an archive at a URL (http or https)."""

    url: str
    member: str
    max_archive_bytes: int
    timeout: float = TIMEOUT_SECONDS

    @property
    def label(self) -> str:
        """The URL."""
        return self.url

    def write(self, target: Path, limit: int, progress: Progress) -> None:
        """Download the archive beside `target` and read the member from it."""
        archive = target.with_name("download")
        download(self.url, archive, self.max_archive_bytes, progress, timeout=self.timeout)
        copy_member(archive, self.member, target, limit)


@dataclasses.dataclass(frozen=True)
class PackageFile:
    """A file published on the user's package index, or a member of it, taken through pip.

    The user's own pip finds and downloads it, so that its indexes, mirrors, proxies, certificates
    and credentials are used as they are configured. Only the pinned file is accepted: pip checks
    its SHA-256 before it unpacks anything, and we check it again before we open it.

    Nothing is installed and nothing from the package is run. That is plain for a wheel. For a
    source distribution `pip download` has no option to skip the package's metadata, which it asks
    the build backend for, in a fresh process. We therefore turn build isolation off and put a
    stand-in for the named backend first on that process's path; it answers with the name and the
    version that we asked for and touches nothing else. The pinned hash fixes the pyproject.toml
    that names the backend, so no other backend can be called.
    """

    name: str
    version: str
    sha256: str
    member: str | None = None  # None: the file itself is wanted
    build_backend: str | None = None  # of a source distribution; None: a wheel

    @property
    def label(self) -> str:
        """The requirement, and that pip was asked."""
        return f"{self.name}=={self.version} through pip"

    def write(self, target: Path, limit: int, progress: Progress) -> None:
        """Have pip download the file beside `target`, check it, and read the member."""
        folder = target.with_name("package")
        folder.mkdir()
        progress(f"downloading {self.name}=={self.version} with pip (nothing is installed)")
        self._run_pip(folder, target.with_name("pip"))
        found = list(folder.iterdir())
        if len(found) != 1 or not found[0].is_file():
            raise SourceFailure(f"pip left {len(found)} files where one was expected")
        digest = file_sha256(found[0])
        if digest != self.sha256:
            raise SourceFailure(f"altered: SHA-256 {digest}, expected {self.sha256}")
        if self.member is not None:
            copy_member(found[0], self.member, target, limit)
        elif found[0].stat().st_size > limit:
            raise SourceFailure(f"holds more than the expected {limit} bytes")
        else:
            found[0].replace(target)

    def _run_pip(self, destination: Path, scratch: Path) -> None:
        scratch.mkdir()
        requirements = scratch / "requirements.txt"
        requirements.write_text(f"{self.name}=={self.version} --hash=sha256:{self.sha256}\n")
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
        command += ["download", "--quiet", "--progress-bar=off", "--no-deps", "--require-hashes"]
        command += ["--ignore-requires-python", f"--dest={destination}"]
        environment = dict(os.environ)
        if self.build_backend is None:
            command += ["--only-binary=:all:"]
        else:
            command += ["--no-binary=:all:", "--no-build-isolation", "--use-pep517"]
            stand_in = scratch / "backend"
            _write_stand_in(stand_in, self.build_backend, self.name, self.version)
            path = [str(stand_in), *filter(None, [environment.get("PYTHONPATH")])]
            environment["PYTHONPATH"] = os.pathsep.join(path)
        command += [f"--requirement={requirements}"]
        try:
            result = subprocess.run(
                command,
                cwd=scratch,
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=PIP_TIMEOUT_SECONDS,
            )
        except subprocess.TimeoutExpired:
            raise SourceFailure(f"pip gave up after {PIP_TIMEOUT_SECONDS:.0f} s") from None
        except OSError as error:
            raise SourceFailure(f"pip did not start: {error}") from error
        if result.returncode != 0:
            raise SourceFailure(_pip_reason(result.stderr))


def fetch(
    target: Path,
    sources: Sequence[Source],
    *,
    size: int,
    sha256: str,
    advice: str,
    progress: Progress,
) -> Path:
    """Put the file with the given size and SHA-256 at `target`, from the first source that has it.

    Args:
      target: where the file goes; its folder exists. A file that is there already is replaced.
      sources: tried in order.
      size: bytes of the file; no source may write more.
      sha256: hexadecimal digest of the file.
      advice: how the user can supply the file, the end of the message if every source fails.
      progress: called with one line at a time: what is tried, how far it is, what failed.

    Returns:
      `target`.

    Raises:
      UserError: every source failed; one line names each with its reason.
    """
    failures = []
    for source in sources:
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as scratch:
            candidate = Path(scratch) / "candidate"
            try:
                source.write(candidate, size, progress)
                _check(candidate, size, sha256)
            except SourceFailure as failure:
                failures.append(f"{source.label}: {_one_line(str(failure))}")
                progress(failures[-1])
                continue
            candidate.replace(target)
            return target
    raise UserError(f"no source gave {target.name} ({'; '.join(failures)}); {advice}")


def download(
    url: str,
    target: Path,
    max_bytes: int,
    progress: Progress,
    *,
    timeout: float = TIMEOUT_SECONDS,
) -> None:
    """Write the body of `url` to `target`; report at most one line every REPORT_SECONDS.

    Raises:
      SourceFailure: the server refuses, is silent for `timeout` seconds, cuts the body short, or
        sends more than `max_bytes`.
    """
    progress(f"downloading {url}")
    request = urllib.request.Request(url, headers={"User-Agent": "fsn_jax"})
    received, reported = 0, time.monotonic()
    try:
        with urllib.request.urlopen(request, timeout=timeout) as body, target.open("wb") as out:
            length = body.headers.get("Content-Length", "")
            expected = int(length) if length.isdecimal() else None
            while chunk := body.read(CHUNK_BYTES):
                received += len(chunk)
                if received > max_bytes:
                    raise SourceFailure(f"sends more than the expected {max_bytes} bytes")
                out.write(chunk)
                if time.monotonic() - reported > REPORT_SECONDS:
                    reported = time.monotonic()
                    whole = f" of {expected / 1e6:.1f}" if expected else ""
                    progress(f"  {received / 1e6:.1f}{whole} MB")
    except urllib.error.HTTPError as error:
        with error:  # it holds the connection
            raise SourceFailure(f"refused: HTTP {error.code} {error.reason}") from error
    except TimeoutError:
        raise SourceFailure(f"no answer for {timeout:g} s") from None
    except http.client.IncompleteRead as error:
        received += len(error.partial)
        raise SourceFailure(f"cut after {received} bytes") from error
    except urllib.error.URLError as error:
        if isinstance(error.reason, TimeoutError):
            raise SourceFailure(f"no answer for {timeout:g} s") from error
        raise SourceFailure(f"cannot connect: {error.reason}") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise SourceFailure(f"{type(error).__name__}: {error}") from error
    if expected is not None and received != expected:
        raise SourceFailure(f"cut after {received} of {expected} bytes")


def copy_member(archive: Path, member: str, target: Path, limit: int) -> None:
    """Write one member of a zip or gzipped tar archive to `target`, at most `limit` bytes.

    A member of a tar whose name ends in .gz is unpacked as well, and `limit` holds for what comes
    out of it.

    Raises:
      SourceFailure: not an archive, damaged, no regular member of exactly that name, or more than
        `limit` bytes in it.
    """
    with archive_errors():
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as pack:
                if member not in pack.namelist():
                    raise SourceFailure(f"the archive has no member {member!r}")
                with pack.open(member) as stream:
                    _copy(stream, target, limit)
            return
        with (
            gzip.open(archive) as unpacked,
            tarfile.open(fileobj=Capped(unpacked, limit + MAX_ARCHIVE_OVERHEAD), mode="r|") as tar,
        ):
            for entry in tar:
                if entry.name == member and entry.isreg():
                    content = tar.extractfile(entry)
                    assert content is not None  # of a regular member
                    if member.endswith(".gz"):
                        with gzip.GzipFile(fileobj=content) as inner:
                            _copy(inner, target, limit)
                    else:
                        _copy(content, target, limit)
                    return
    raise SourceFailure(f"the archive has no member {member!r}")


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


class Capped(io.RawIOBase):
    """A stream that fails once more than `limit` bytes have been read from the one inside it."""

    def __init__(self, stream: _Readable, limit: int):
        super().__init__()
        self._stream = stream
        self._left = limit

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: Any, /) -> int:
        """Reads as ``io.RawIOBase`` does.

        Raises:
          SourceFailure: beyond the limit.
        """
        data = self._stream.read(min(len(buffer), self._left + 1))
        self._left -= len(data)
        if self._left < 0:
            raise SourceFailure("the archive expands beyond what is expected")
        buffer[: len(data)] = data
        return len(data)


def _copy(stream: _Readable, target: Path, limit: int) -> None:
    written = 0
    with target.open("wb") as out:
        while chunk := stream.read(min(CHUNK_BYTES, limit - written + 1)):
            written += len(chunk)
            if written > limit:
                raise SourceFailure(f"holds more than the expected {limit} bytes")
            out.write(chunk)


@contextmanager
def archive_errors() -> Iterator[None]:
    """Turn whatever the archive readers raise on bad bytes into a SourceFailure."""
    damaged = (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError)
    # RuntimeError: an encrypted zip member; NotImplementedError: an unknown compression method.
    odd = (RuntimeError, NotImplementedError, ValueError, OSError)
    try:
        yield
    except (*damaged, gzip.BadGzipFile) as error:
        raise SourceFailure(f"not a sound archive: {error}") from error
    except odd as error:
        raise SourceFailure(f"cannot be read: {error}") from error


def _check(candidate: Path, size: int, sha256: str) -> None:
    found = candidate.stat().st_size
    if found != size:
        raise SourceFailure(f"holds {found} bytes, expected {size}")
    digest = file_sha256(candidate)
    if digest != sha256:
        raise SourceFailure(f"altered: SHA-256 {digest}, expected {sha256}")


_STAND_IN = '''
"""Stands in for a build backend: tells pip the metadata it already asked for, builds nothing."""
import pathlib


def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    folder = pathlib.Path(metadata_directory) / "{stem}-{version}.dist-info"
    folder.mkdir()
    folder.joinpath("METADATA").write_text(
        "Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n"
    )
    return folder.name


def build_wheel(*args, **kwargs):
    raise RuntimeError("this package is read, never built")


build_sdist = build_wheel
'''


def _write_stand_in(folder: Path, backend: str, name: str, version: str) -> None:
    """Write a module of the backend's dotted name under `folder`."""
    *packages, module = backend.split(".")
    for package in packages:
        folder = folder / package
        folder.mkdir(parents=True)
        folder.joinpath("__init__.py").touch()
    text = _STAND_IN.format(stem=name.replace("-", "_"), name=name, version=version)
    folder.mkdir(exist_ok=True)
    folder.joinpath(f"{module}.py").write_text(text.lstrip())


def _pip_reason(stderr: str) -> str:
    """The most telling line of what pip printed."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    if any("No module named pip" in line for line in lines):
        return "pip is not installed in this Python"
    if any("DO NOT MATCH THE HASHES" in line for line in lines):
        return "altered: pip found another SHA-256 than the pinned one"
    errors = [line for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["pip failed without a message"])[-1].removeprefix("ERROR: ")[:300]


def _one_line(text: str) -> str:
    return " ".join(text.split())
