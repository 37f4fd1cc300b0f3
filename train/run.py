"""Opens the folder of a run, to train it under a lock or to read it."""

import errno
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from flax.traverse_util import flatten_dict

from fsn_jax.hub import is_exported
from fsn_jax.vocabulary import Vocabulary
from train.bucket import is_remote
from train.config import WITHOUT_EFFECT, ExperimentConfig
from train.data.corpus import Corpus, default_cache
from train.errors import UserError, no_run, unfinished
from train.files import saved_steps, user_path, write_atomically
from train.metrics import read_rows
from train.mirror import Mirror, fetched_run
from train.old_settings import read_experiment
from train.processes import first_does, together
from train.run_files import CHECKPOINTS, CONFIG, LOCK, METRICS, PROVENANCE, SUMMARY, VOCABULARY

SEEN_SECONDS = 90.0
"""How long a new folder may take to be seen by another host: NFS remembers a name's absence."""


class RunFolder:
    """An open run folder; the lock is held until ``close``."""

    def __init__(self, path: Path, lock: IO[str] | None = None, mirror: Mirror | None = None):
        """Use ``create_or_resume`` to train and ``open_run`` to read."""
        self.path = path
        self._lock = lock
        self._mirror = mirror

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        """Updates the run's copy and releases the lock.

        Raises:
          UserError: the folder cannot be written any more.
        """
        try:
            if self._mirror:
                self._mirror.push(or_warn=error is not None)
        finally:
            self.close()
        if error and (refused := cannot_write(self, error)):
            raise refused from error

    def saved(self) -> None:
        """Starts to update the run's copy; call it after each save."""
        if self._mirror:
            self._mirror.push_behind()

    @property
    def writes(self) -> bool:
        """Whether this process writes the run."""
        return self._lock is not None

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / CHECKPOINTS

    def check_finished(self) -> None:
        """Raises UserError unless the run has ended; its summary is written last."""
        if not (self.path / SUMMARY).is_file():
            raise unfinished(self.path)

    @property
    def has_begun(self) -> bool:
        """Whether a start of the run came as far as its first step."""
        return (self.path / PROVENANCE).exists()

    def kept(self) -> str:
        """Describes the checkpoint that the next start resumes from."""
        steps = saved_steps(self.checkpoints)
        if not steps:
            return "no checkpoint is saved yet: the same command begins at step 0"
        return f"the checkpoint of step {steps[-1]} is kept: the same command resumes from it"

    @property
    def metrics(self) -> Path:
        """The path of the exact log."""
        return self.path / METRICS

    def read_config(self) -> ExperimentConfig:
        """Reads the run's settings.

        Raises:
          UserError: the file is damaged.
        """
        return self._read(CONFIG, read_experiment)

    def read_vocabulary(self) -> Vocabulary | None:
        """Returns the vocabulary; None if the run began with an earlier version.

        Raises:
          UserError: the file is damaged.
        """

        def parse(text: str) -> Vocabulary:
            fields = json.loads(text)
            return Vocabulary.from_text(fields["values"], fields["unit"])

        if not (self.path / VOCABULARY).exists():
            return None
        vocabulary: Vocabulary = self._read(VOCABULARY, parse)
        return vocabulary

    def read_provenance(self) -> list[dict[str, Any]]:
        """Reads the provenance, one entry for each start of the run.

        Raises:
          UserError: the file is damaged.
        """

        def parse(text: str) -> list[dict[str, Any]]:
            starts = json.loads(text)
            if not isinstance(starts, list) or not starts:
                raise ValueError("no list of starts")
            for start in starts:
                _ = start["step"], start["git"]["commit"], start["data"]["sha256"]
            return starts

        starts: list[dict[str, Any]] = self._read(PROVENANCE, parse)
        return starts

    def _read(self, name: str, parse: Callable[[str], Any]) -> Any:
        file = self.path / name
        try:
            return parse(file.read_text(encoding="utf-8"))
        except (OSError, TypeError, LookupError, ValueError) as error:
            raise UserError(
                f"{file} cannot be read ({error}); restore it or train in another folder"
            ) from error

    def close(self) -> None:
        """Releases the lock."""
        if self._lock:
            self._lock.close()


def default_folder(experiment: ExperimentConfig) -> Path:
    """Returns the folder that a config names."""
    return user_path("config.run_dir", experiment.run_dir or Path("runs") / experiment.name)


def create_or_resume(experiment: ExperimentConfig, corpus: Corpus) -> RunFolder:
    """Creates the run's folder, or opens it to resume with the same settings.

    Raises:
      UserError: the folder cannot be written, is in use, or holds a run with other settings or
        data.
    """
    path = default_folder(experiment)
    # Process 0 writes; the others come when the folder is there, and find it if all share it.
    run = first_does(lambda: _open_to_write(path, experiment, corpus))
    return together(lambda: run or _open_beside(path))


def _open_beside(path: Path) -> RunFolder:
    end = time.monotonic() + SEEN_SECONDS
    while not (path / CONFIG).is_file():
        if time.monotonic() > end:
            raise UserError(
                f"the run folder {path} of process 0 is not here: name one that all processes "
                f"share, with --config.run_dir=FOLDER"
            )
        time.sleep(0.1)
    return RunFolder(path)


def _open_to_write(path: Path, experiment: ExperimentConfig, corpus: Corpus) -> RunFolder:
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError:
        raise UserError(
            f"the path of the run folder {path} is not UTF-8; choose another with "
            f"--config.run_dir=FOLDER"
        ) from None
    mirror = Mirror(path, experiment.mirror_dir) if experiment.mirror_dir else None
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = (path / LOCK).open("a+", encoding="utf-8")
    except OSError as error:
        raise _unwritable(path, error) from None
    run = RunFolder(path, lock, mirror)
    config_file = path / CONFIG
    try:
        _take_lock(lock, path)
        if mirror and mirror.fetch(lambda text: _refuse_other_copy(mirror, text, experiment)):
            print(f"the run is fetched from {mirror.place}")
        if config_file.exists():
            if differ := _differing(run.read_config(), experiment):
                raise UserError(
                    f"the run folder {run.path} holds a run with other settings: {differ}; give "
                    f"this one its own folder with --config.run_dir=FOLDER"
                )
            refuse_other_data(run, corpus)
        words = {"unit": corpus.vocabulary.unit, "values": corpus.vocabulary.to_text()}
        write_atomically(path / VOCABULARY, json.dumps(words, indent=2) + "\n")
        write_atomically(config_file, json.dumps(experiment.to_dict(), indent=2) + "\n")
        if mirror:
            mirror.push()  # a place that cannot be written is better known now
    except UserError:
        run.close()
        raise
    except OSError as error:
        run.close()
        raise _unwritable(path, error) from None
    return run


def _unwritable(path: Path, error: OSError) -> UserError:
    return UserError(
        f"cannot write to the run folder {path} ({error.strerror}); choose another with "
        f"--config.run_dir=FOLDER"
    )


def open_run(path: str | Path) -> RunFolder:
    """Opens a run's folder for reading; a run in a bucket is copied into the cache first.

    Raises:
      UserError: the folder holds no run.
    """
    if is_remote(path):
        folder = fetched_run(str(path), default_cache() / "runs")
    else:
        folder = user_path("the run", path)
    if not (folder / CONFIG).is_file():
        raise no_run(folder)
    if is_exported(folder):
        raise UserError(
            f"{folder} is an exported model, and this takes the run that it was exported from; "
            f"train sample takes either"
        )
    return RunFolder(folder)


def _take_lock(lock: IO[str], path: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        holder = lock.read().strip() or "an unknown process"
        raise UserError(
            f"the run folder {path} is in use by {holder}; wait for it, or choose another with "
            f"--config.run_dir=FOLDER; if that machine is gone, remove {path / LOCK}"
        ) from None
    except OSError as error:  # as on Lustre, unless it was mounted for it
        print(
            f"warning: the file system of {path} has no locks ({error.strerror}): nothing keeps a "
            f"second process from training in it",
            file=sys.stderr,
        )
    lock.truncate(0)
    # Not by lock.write, which would try again when the lock is closed.
    os.write(lock.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())


def _differing(before: ExperimentConfig, now: ExperimentConfig) -> str:
    """Returns the settings of two runs that differ, as text; empty if none does."""
    old, new = (flatten_dict(experiment.to_dict(), sep=".") for experiment in (before, now))
    differ = [
        name
        for name in sorted(old.keys() | new.keys())
        if name not in WITHOUT_EFFECT and old.get(name) != new.get(name)
    ]
    changes = ", ".join(f"{n} {old.get(n)!r} -> {new.get(n)!r}" for n in differ[:3])
    return changes + (f" and {len(differ) - 3} more" if len(differ) > 3 else "")


def _refuse_other_copy(mirror: Mirror, config: str, experiment: ExperimentConfig) -> None:
    try:
        before = read_experiment(config)
    except (TypeError, LookupError, ValueError) as error:
        raise UserError(
            f"{mirror.place / CONFIG} cannot be read ({error}); restore it or name another place "
            f"with --config.mirror_dir"
        ) from error
    if differ := _differing(before, experiment):
        raise UserError(
            f"config.mirror_dir: {mirror.place} is the copy of a run with other settings: "
            f"{differ}; give this one a folder of another name with --config.run_dir=FOLDER"
        )


def refuse_other_data(run: RunFolder, corpus: Corpus) -> None:
    """Raises UserError if the corpus is not the one that the run started with."""
    starts = run.read_provenance() if run.has_begun else []
    if starts and (then := starts[0]["data"])["sha256"] != corpus.sha256:
        kept = corpus.folder.parent / then.get("folder", "")
        there = then.get("folder") and kept != corpus.folder and kept.is_dir()
        where = f" ({kept})" if there else ""
        raise UserError(
            f"the corpus {corpus.name!r} has changed since the run in {run.path} started (sha256 "
            f"{then['sha256'][:12]} then, {corpus.sha256[:12]} now); restore it, or name the "
            f"prepared corpus of that time{where} with --config.data.path (--data_path after "
            f"training), or train in another --config.run_dir"
        )


def refuse_lost_checkpoints(run: RunFolder, experiment: ExperimentConfig) -> None:
    """Raises UserError if the run has lost its checkpoints, so that it does not restart silently.

    Call this before the checkpoints are opened, which creates their folder. The folder is created
    before the first row is logged, so rows without the folder mean that it was removed. The row of
    a step is written before its checkpoint, and a checkpoint waits for the one before, so rows
    beyond the second save mean that the first was complete.
    """
    folder, first = run.checkpoints, experiment.checkpoints.every
    if saved_steps(folder):
        return
    reached = max((row["step"] for row in read_rows(run.metrics)), default=0)
    starts = run.read_provenance() if run.has_begun else []
    removed = reached and not folder.is_dir()
    if removed or reached > 2 * first or any(start["step"] for start in starts):
        raise UserError(
            f"the run {run.path} has come to step {reached} but {run.checkpoints} holds no "
            f"checkpoint: restore it from a copy, or remove {run.path} to start again from the "
            f"beginning"
        )


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_UNWRITABLE = (*_FULL, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE)


def cannot_write(run: RunFolder, error: BaseException) -> UserError | None:
    """Returns the error to raise if ``error`` means that the folder cannot be written; else None.

    Orbax passes on errors of its storage as text.
    """
    if isinstance(error, UserError):
        return None
    reasons = [os.strerror(number) for number in _UNWRITABLE]
    if isinstance(error, OSError) and error.errno in _UNWRITABLE:
        reason = os.strerror(error.errno)
    else:
        reason = next((reason for reason in reasons if reason in str(error)), "")
    if not reason:
        return None
    return UserError(
        f"cannot write to the run folder {run.path} ({reason}); make room or mend it; {run.kept()}"
    )
