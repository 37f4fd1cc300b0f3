"""Folders that are not of this machine: read and written through etils' ``epath``.

``gs://BUCKET/...`` needs gcsfs installed, ``s3://BUCKET/...`` s3fs: the extras ``gcs`` and ``s3``
of this package. A plain folder does as well: a share, or the place of a bucket in a test.
"""

import contextlib
import fcntl
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from etils import epath

from train.errors import UserError

SCHEMES = {"gs": "gcsfs", "s3": "s3fs"}  # the package that each needs


def is_remote(path: str | Path) -> bool:
    """Whether a path has a scheme, as ``gs://BUCKET/run`` does.

    Raises:
      UserError: it lacks one of the two slashes and would be taken for a local path.
    """
    for scheme in SCHEMES:
        if str(path).startswith(f"{scheme}:") and not str(path).startswith(f"{scheme}://"):
            raise UserError(f"{path} is no path in a bucket: write {scheme}://BUCKET/...")
    return "://" in str(path)


def check_scheme(setting: str, path: str) -> None:
    """Raises UserError if a path names a storage that cannot be reached."""
    scheme = path.partition("://")[0]
    if is_remote(path) and scheme not in SCHEMES:
        known = " and ".join(f"{name}://" for name in SCHEMES)
        raise UserError(f"{setting}={path}: {known} can be reached, {scheme}:// cannot")


@contextlib.contextmanager
def reaching(setting: str, path: str) -> Iterator[None]:
    """Makes one line of what the storage's own library raises; ``setting`` named the path."""
    try:
        yield
    except UserError:
        raise
    except ImportError as error:
        package = SCHEMES.get(path.partition("://")[0], "")
        raise UserError(
            f"{setting}={path} needs another package ({error}): pip install {package}"
        ) from error
    except Exception as error:  # each storage has its own kinds
        raise UserError(
            f"{setting}={path} cannot be read or written ({error}); check "
            f"its name, the network and the rights of this machine"
        ) from error


def files_below(folder: epath.Path, *, but: Sequence[str] = ()) -> Iterator[str]:
    """Yields the sorted paths of files below a folder, relative to it, without ``but``."""
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.name in but:
            continue
        if entry.is_dir():
            yield from (f"{entry.name}/{name}" for name in files_below(entry))
        else:
            yield entry.name


def copy_file(source: epath.Path, target: epath.Path) -> None:
    """Copies one file, and makes its folder."""
    target.parent.mkdir(parents=True, exist_ok=True)
    source.copy(target, overwrite=True)


def replace_file(source: epath.Path, target: epath.Path) -> None:
    """Copies one file at once, so that nobody reads a part of it."""
    beside = target.with_name(f"{target.name}.tmp")
    copy_file(source, beside)
    beside.replace(target)


def copy_folder(
    source: epath.Path, target: epath.Path, *, marker: str, but: Sequence[str] = ()
) -> None:
    """Copies a folder in place of an older copy of it; not if its copy is there already.

    Args:
      source: the folder.
      target: where its files go.
      marker: a file in it whose bytes tell its version. A copy has it from when it is whole.
      but: files and folders in it that are not copied.
    """
    version = (source / marker).read_bytes()
    if (target / marker).exists():
        if (target / marker).read_bytes() == version:
            return
        (target / marker).unlink()
    if target.exists():
        target.rmtree()  # not overwritten: another process may have mapped its files
    for name in files_below(source, but=(*but, marker)):
        copy_file(source / name, target / name)
    copy_file(source / marker, target / marker)


def fetched(
    remote: str, cache: Path, *, setting: str, marker: str, but: Sequence[str] = ()
) -> Path:
    """Returns a local copy of a remote folder.

    Args:
      remote: the folder.
      cache: where copies are kept.
      setting: what named it.
      marker: as of ``copy_folder``.
      but: as of ``copy_folder``.

    Raises:
      UserError: the folder has no such file, or cannot be reached.
    """
    check_scheme(setting, remote)
    with reaching(setting, remote):
        source = epath.Path(remote)
        if not (source / marker).exists():
            raise UserError(
                f"{setting}={remote} holds no {marker}: only what fsn_jax has written can be read "
                f"from there; copy anything else to this machine"
            )
        target = place_in_cache(remote, cache)
        with locked(target):
            copy_folder(source, epath.Path(target), marker=marker, but=but)
    return target


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other processes that copy into the same folder of the cache waiting."""
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):  # of a cache to be read only, or without locks
            folder.parent.mkdir(parents=True, exist_ok=True)
            lock = held.enter_context(
                folder.with_name(f"{folder.name}.lock").open("w", encoding="utf-8")
            )
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def place_in_cache(remote: str, cache: Path) -> Path:
    """Returns where the copy of a remote folder goes."""
    # The last part of the name for people, the digest because it alone need not be unique.
    digest = hashlib.sha256(remote.rstrip("/").encode()).hexdigest()[:8]
    return cache / f"{epath.Path(remote).name}-{digest}"
