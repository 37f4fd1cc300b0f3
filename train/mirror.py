"""A copy of a run's folder in another place, kept up to date while the run trains.

The run is written to a local folder, which can be locked and appended to. The bucket holds a copy,
from which another machine can resume at any moment. For that, files are copied in this order: the
logs; the checkpoints that were complete before them, so that the logs hold every row of theirs,
each with its list of hashes last, without which it counts as damaged (``train.integrity``); the
config, without which a folder is not a run. Checkpoints that are gone here are removed from the
copy at the end, once it holds a newer one.
"""

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from etils import epath

from train.bucket import (
    check_scheme,
    copy_file,
    copy_folder,
    files_below,
    is_remote,
    locked,
    place_in_cache,
    reaching,
    replace_file,
)
from train.errors import UserError, no_run
from train.files import saved_steps, user_path
from train.integrity import STEP_METADATA, damage
from train.metrics import append_row, read_rows
from train.run_files import (
    CHECKPOINTS,
    CONFIG,
    DAMAGED_CHECKPOINTS,
    EVALUATIONS,
    LOCK,
    PROVENANCE,
    SUMMARY,
    TEST_READS,
)

_FETCHED = "fetched_checkpoints"
_OF_THIS_MACHINE = (LOCK, DAMAGED_CHECKPOINTS, _FETCHED)
_OF_ANY_MACHINE = (EVALUATIONS, TEST_READS)
"""Logs to which other programs append, also those of other machines."""
WAITING_SECONDS = 240.0
"""How long updates are waited for where a run has to end; the other processes wait a little longer.

A storage that blocks would keep the run for ever.
"""


class Mirror:
    """The copy of the run folder ``folder`` in ``parent/<its name>``."""

    def __init__(self, folder: Path, parent: str):
        """Checks the place of the copy; reads nothing yet.

        Raises:
          UserError: the place is not supported, or is inside the run's folder or around it.
        """
        check_scheme("config.mirror_dir", parent)
        self.folder = epath.Path(folder)
        self.place = (
            epath.Path(parent if is_remote(parent) else user_path("config.mirror_dir", parent))
            / folder.absolute().name
        )
        self._sent: dict[str, tuple[int, int]] = {}  # time of change and length when copied
        self._thread: threading.Thread | None = None
        here, there = folder.resolve(), Path(self.place).resolve()
        inside = here == there or here in there.parents
        if inside or there in here.parents:
            raise UserError(
                f"config.mirror_dir={parent} would copy the run folder {folder} into "
                f"{'itself' if inside else 'a folder around it'}; name another place"
            )

    def fetch(self, check: Callable[[str], None] = lambda config: None) -> bool:
        """Fetches the copy if there is no local run; returns whether it did.

        Of a local run, damaged checkpoints are replaced by their copies, if those are intact.

        Args:
          check: is given the text of the copy's config before anything is fetched; it raises if
            the copy is not of the wanted run.

        Raises:
          UserError: the copy is of another run, or ahead of the local one, or holds checkpoints of
            something else, or cannot be reached.
        """
        with self._reaching():
            if not (self.place / CONFIG).exists():
                self._refuse_other_checkpoints()
                return False
            if (self.folder / CONFIG).exists():
                self._refuse_another_run()
                self._replace_damaged()
                return False
            check((self.place / CONFIG).read_text(encoding="utf-8"))
            _copy_run(self.place, self.folder)
            (self.folder / CHECKPOINTS).mkdir(exist_ok=True)  # an empty one was not copied
        return True

    def push(self, *, or_warn: bool = False) -> None:
        """Updates the copy, or with ``or_warn`` warns that it is out of date.

        Raises:
          UserError: the copy cannot be written, or the update under way does not end.
        """
        deadline = time.monotonic() + WAITING_SECONDS
        try:
            self._wait(deadline)
            if not or_warn:
                self._push()
                return
            self.push_behind()  # in a thread, which can be left
            self._wait(deadline)
        except UserError as error:
            if not or_warn:
                raise
            _warn(error)

    def push_behind(self) -> None:
        """Starts to update the copy in a thread.

        Does nothing if an update is still running. A failure is a warning; the next push tries
        again.
        """
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._push_or_warn, name="mirror", daemon=True)
            self._thread.start()

    def _push_or_warn(self) -> None:
        try:
            self._push()
        except UserError as error:
            _warn(error)

    def _wait(self, deadline: float) -> None:
        """Waits for the update under way, if there is one, until a time of ``time.monotonic``.

        Raises:
          UserError: it is not done by then.
        """
        if self._thread is None:
            return
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            with self._reaching():
                raise TimeoutError(f"an update is not done after {WAITING_SECONDS:.0f} s")

    def _push(self) -> None:
        with self._reaching():
            for name in _OF_ANY_MACHINE:
                _add_rows_of(self.place / name, self.folder / name)
            _copy_run(self.folder, self.place, self._copy_if_changed)
            here = set(saved_steps(self.folder / CHECKPOINTS))
            there = set(saved_steps(self.place / CHECKPOINTS))
            # While this copied, all that it copied may have been removed here: that is kept until
            # the copy has a newer one.
            newest, newest_of_both = max(here, default=0), max(here & there, default=0)
            for step in there - here:
                if here and not newest_of_both < step < newest:
                    (self.place / CHECKPOINTS / str(step)).rmtree()

    def _copy_if_changed(self, source: epath.Path, target: epath.Path) -> None:
        stat = os.stat(source)  # epath's asks for the name of the owner, who may have none
        state = (stat.st_mtime_ns, stat.st_size)
        if self._sent.get(str(source)) != state:
            copy_file(source, target)
            self._sent[str(source)] = state

    def _replace_damaged(self) -> None:
        here, there = self.folder / CHECKPOINTS, self.place / CHECKPOINTS
        for step in map(str, sorted({*saved_steps(here)} & {*saved_steps(there)})):
            if (what := damage(Path(here / step))) is None:
                continue
            fetched = self.folder / _FETCHED / step
            with contextlib.suppress(FileNotFoundError):  # the copy is not whole
                copy_folder(there / step, fetched, marker=STEP_METADATA)
            if damage(Path(fetched)) is None:
                (here / step).rmtree()
                fetched.rename(here / step)
                print(
                    f"warning: the checkpoint {here / step} was damaged ({what}); it is replaced "
                    f"by its copy {there / step}",
                    file=sys.stderr,
                )
            if fetched.parent.exists():
                fetched.parent.rmtree()

    def _refuse_other_checkpoints(self) -> None:
        """Refuses a place with checkpoints but no config, unless a first copy was cut short."""
        if saved_steps(self.place / CHECKPOINTS):
            there = _first_start(self.place)
            if there is None or there != _first_start(self.folder):
                raise UserError(
                    f"config.mirror_dir: {self.place} holds checkpoints that are not a copy of "
                    f"{self.folder}; name another place, or remove them"
                )

    def _refuse_another_run(self) -> None:
        here, there = (_first_start(folder) for folder in (self.folder, self.place))
        if here != there and there is not None:
            raise UserError(
                f"config.mirror_dir: {self.place} is a copy of another run than {self.folder} "
                f"(begun {there}, not {here}); name another place, or remove one of the two"
            )
        newest_here, newest_there = (
            max(saved_steps(folder / CHECKPOINTS), default=0)
            for folder in (self.folder, self.place)
        )
        if newest_there > newest_here:
            raise UserError(
                f"config.mirror_dir: the copy in {self.place} is at step {newest_there}, ahead of "
                f"{self.folder} at {newest_here}; remove {self.folder} to resume from the copy"
            )

    def _reaching(self) -> contextlib.AbstractContextManager[None]:
        return reaching("config.mirror_dir", str(self.place))


def _warn(error: UserError) -> None:
    print(f"warning: the copy of the run is behind: {error}", file=sys.stderr)


def fetched_run(remote: str, cache: Path) -> Path:
    """Copies the run of a remote folder to this machine and returns the local folder.

    Raises:
      UserError: the remote folder holds no run or cannot be reached.
    """
    check_scheme("the run", remote)
    with reaching("the run", remote):
        source, target = epath.Path(remote), place_in_cache(remote, cache)
        if not (source / CONFIG).exists():
            raise no_run(remote)
        with locked(target):
            copy = epath.Path(target)
            if copy.exists() and _first_start(copy) != _first_start(source):
                copy.rmtree()  # of a run that was there before
            _copy_run(source, copy, replace_file)
            there = set(saved_steps(source / CHECKPOINTS))
            gone = sorted(set(saved_steps(copy / CHECKPOINTS)) - there)
            for step in gone[:-1]:  # another program may be about to read the newest
                (copy / CHECKPOINTS / str(step)).rmtree()
    return target


def fetch_rows(log: Path, mirror_dir: str) -> None:
    """Adds to a log of a local run the rows that its copy has more; a warning if it cannot."""
    _with_copy(log, mirror_dir, lambda place: _add_rows_of(place / log.name, epath.Path(log)))


def send_back(log: Path, run: str, mirror_dir: str) -> None:
    """Adds the rows of a log to the run in a bucket, or to the copy of a local run.

    Args:
      log: in the local folder of the run.
      run: the run as the user named it.
      mirror_dir: its ``config.mirror_dir``.

    Raises:
      UserError: the run's remote folder cannot be written. A copy that cannot is a warning.
    """

    def send(place: epath.Path) -> None:
        _add_rows_of(place / log.name, epath.Path(log))
        copy_file(epath.Path(log), place / log.name)

    if is_remote(run):
        with reaching("the run", run):
            send(epath.Path(run))
    else:
        _with_copy(log, mirror_dir, send)


def _with_copy(log: Path, mirror_dir: str, work: Callable[[epath.Path], None]) -> None:
    """Does ``work`` with the copy of the run that a log is of, if there is one elsewhere."""
    folder = epath.Path(log.parent)
    if not mirror_dir or _is_in(log.parent, mirror_dir):  # the copy itself
        return
    try:
        place = Mirror(log.parent, mirror_dir).place
        with reaching("config.mirror_dir", str(place)):
            if (place / CONFIG).exists() and _first_start(place) == _first_start(folder):
                work(place)
    except UserError as error:
        print(
            f"warning: {log.name} and that of the run's copy may differ: {error}", file=sys.stderr
        )


def _is_in(folder: Path, parent: str) -> bool:
    return not is_remote(parent) and user_path("config.mirror_dir", parent) in folder.parents


def _add_rows_of(other: epath.Path, log: epath.Path) -> None:
    """Appends to a local log the rows of another that it lacks; a damaged one is a warning."""
    here = Path(log)
    try:
        known = read_rows(here)
        for row in read_rows(other):
            if row not in known:
                append_row(here, row)
    except UserError as error:
        print(f"warning: {error}", file=sys.stderr)


def _copy_run(
    source: epath.Path,
    target: epath.Path,
    copy_log: Callable[[epath.Path, epath.Path], None] = copy_file,
) -> None:
    steps = saved_steps(source / CHECKPOINTS)
    logs = files_below(source, but=(CHECKPOINTS, CONFIG, *_OF_THIS_MACHINE))
    for name in [name for name in logs if not name.endswith(".tmp")]:
        copy_log(source / name, target / name)
    for step in steps:
        folders = (run / CHECKPOINTS / str(step) for run in (source, target))
        with contextlib.suppress(FileNotFoundError):  # an old one, just removed
            copy_folder(*folders, marker=STEP_METADATA)
    copy_log(source / CONFIG, target / CONFIG)
    if not (source / SUMMARY).exists():  # the run trains on after an early end
        (target / SUMMARY).unlink(missing_ok=True)


def _first_start(run: epath.Path) -> str | None:
    """Returns the time at which a run began; None if it is not written yet."""
    file = run / PROVENANCE
    if not file.exists():
        return None
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))[0]["time"])
    except (TypeError, LookupError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}); restore it from a copy") from None
