"""Checkpoints of a run: asynchronous saves, the latest and the best kept, exact restoration.

Each checkpoint holds the hashes of its files (``train.integrity``). When a run resumes, damaged
checkpoints are named and moved to ``<run folder>/damaged_checkpoints``; the newest intact one is
then the latest. The first save of each start is read back at once. Orbax restores arrays by the
shapes that the config gives; nothing is unpickled.
"""

import contextlib
import logging
import math
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import (
    AnyPreservationPolicy,
    BestN,
    LatestN,
)

from train.config import CheckpointConfig
from train.errors import UserError
from train.files import has_pattern, saved_steps
from train.integrity import HASHES, SealedPath, damage
from train.processes import first_does, loss_of_a_process
from train.run_files import CHECKPOINTS, DAMAGED_CHECKPOINTS, PROVENANCE
from train.step import TrainState

METRIC = "validation_loss"
_ITEM = "state"


class Checkpoints:
    """The checkpoints in ``<run folder>/checkpoints``.

    A context manager that waits for pending saves when it exits.
    """

    def __init__(self, folder: Path, config: CheckpointConfig, *, read_only: bool = False):
        """Opens the folder; creates it unless ``read_only``."""
        _hush()
        self.folder = folder.resolve()
        self._damaged: dict[int, str] = {}
        if not read_only:
            # In one process, before the others look at the folder.
            first_does(self._set_damaged_aside)
            first_does(lambda: self.folder.mkdir(parents=True, exist_ok=True))
        self._read_back_pending = not read_only
        self._closing = contextlib.ExitStack()
        path = self._closing.enter_context(_without_pattern(self.folder))
        try:
            self._manager = self._open(path, config, read_only=read_only)
        except Exception as error:  # Orbax and what it reads with have no common one
            self._closing.close()
            self._damaged = self._find_damaged()
            if not self._damaged:
                raise
            raise self._damage_error(max(self._damaged)) from error

    def _open(
        self, path: Path, config: CheckpointConfig, *, read_only: bool
    ) -> ocp.CheckpointManager:
        return ocp.CheckpointManager(
            path,
            # Named, or a manager that has saved nothing yet cannot tell what a checkpoint holds.
            item_handlers={_ITEM: ocp.StandardCheckpointHandler()},
            options=ocp.CheckpointManagerOptions(
                create=not read_only,
                read_only=read_only,
                temporary_path_class=SealedPath,
                best_fn=lambda metrics: metrics[METRIC],
                best_mode="min",
                preservation_policy=AnyPreservationPolicy(
                    [
                        LatestN(config.keep),
                        BestN(
                            get_metric_fn=lambda metrics: metrics[METRIC],
                            reverse=True,
                            n=1,
                            keep_checkpoints_without_metrics=False,
                        ),
                    ]
                ),
            ),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._manager.close()
        finally:
            self._closing.close()

    def save(self, state: TrainState, step: int, validation_loss: float | None) -> None:
        """Starts a save. The values are copied first, so ``state`` may be donated afterwards.

        The first save is waited for and read back, so that storage that loses data is noticed
        early.

        Raises:
          UserError: what was read back is not what was saved.
        """
        measured = validation_loss is not None and math.isfinite(validation_loss)
        metrics = {METRIC: validation_loss} if measured else None
        self._manager.save(
            step, args=ocp.args.Composite(**{_ITEM: ocp.args.StandardSave(state)}), metrics=metrics
        )
        if self._read_back_pending:
            self._read_back_pending = False
            self.wait()
            self._read_back(state, step)

    def _read_back(self, state: TrainState, step: int) -> None:
        like = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), state)
        try:
            same = jax.tree.map(_holds, self._restore(step, like), state)
            reason = "" if all(jax.tree.leaves(same)) else "its values differ"
        except Exception as error:  # Orbax and what it reads with have no common one
            if loss_of_a_process(error):
                raise
            reason = f"{type(error).__name__}: {str(error).split(':')[0][:80]}"
        if reason:
            raise UserError(
                f"the checkpoint {self.folder / str(step)}, just saved, cannot be read back "
                f"({reason}); train in another folder with --config.run_dir=FOLDER"
            )

    def wait(self) -> None:
        """Waits until every started save is on disk."""
        self._manager.wait_until_finished()

    def latest(self) -> int | None:
        """Returns the step of the newest checkpoint; None without a checkpoint."""
        return self._manager.latest_step()

    def all_steps(self) -> list[int]:
        """Returns the steps of all kept checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def best(self) -> int | None:
        """Returns the step with the lowest validation loss; None without evaluations."""
        return self._manager.best_step()

    def restore(self, step: int, like: TrainState) -> TrainState:
        """Restores the state saved at ``step``.

        Args:
          step: step of the checkpoint.
          like: shapes, dtypes and shardings, see ``train.step.abstract_state``.

        Raises:
          UserError: the checkpoint holds another model or optimizer, or is damaged, or cannot be
            restored though it is intact.
        """
        return self._checked(step, lambda: self._restore(step, like))

    def restore_params(self, step: int, like: Any) -> Any:
        """Restores the parameters saved at ``step`` and nothing else, after comparing the hashes.

        Arguments and errors as for ``restore``, of the parameters alone.
        """
        if what := damage(self.folder / str(step)):
            self._damaged[step] = what
            raise self._damage_error(step)
        return self._checked(step, lambda: self._restore_params(step, like))

    def _checked(self, step: int, read: Callable[[], Any]) -> Any:
        """Calls ``read``; says whether the checkpoint is damaged if that fails."""
        try:
            return read()
        except UserError:
            raise
        except Exception as error:  # Orbax and what it reads with have no common one
            if loss_of_a_process(error):
                raise
            what = damage(self.folder / str(step))
            if what is None and (self.folder / str(step) / HASHES).exists():
                raise self._intact_error(step, error) from error
            self._damaged[step] = what or str(error).split(":")[0][:80]
            raise self._damage_error(step) from error

    def restore_latest(self, like: TrainState) -> tuple[int, TrainState] | None:
        """Restores the newest readable checkpoint, with its step; None without a checkpoint.

        Raises:
          UserError: the checkpoint holds another model or optimizer, or cannot be restored though
            it is intact, or no checkpoint can be read.
        """
        while (step := self.latest()) is not None:
            try:
                return step, self.restore(step, like)
            except UserError:
                if step not in self._damaged or jax.process_count() > 1:
                    raise
            # It cannot be read, and no list of hashes vouches for its files.
            self._set_damaged_aside()
            self._manager.reload()
        return None

    def _find_damaged(self) -> dict[int, str]:
        """Returns the damage of each damaged checkpoint, by step."""
        found = ((step, damage(self.folder / str(step))) for step in saved_steps(self.folder))
        return {step: what for step, what in found if what is not None}

    def _set_damaged_aside(self) -> None:
        """Moves damaged checkpoints aside, with a warning for each.

        Raises:
          UserError: no checkpoint is intact.
        """
        damaged = self._damaged | self._find_damaged()
        if not damaged:
            return
        lines = {
            step: f"{self.folder / str(step)} is damaged ({damaged[step]})" for step in damaged
        }
        if not set(saved_steps(self.folder)) - damaged.keys():
            raise UserError(
                f"no checkpoint of the run is intact: {'; '.join(lines.values())}; restore one "
                f"from a copy, or remove {self.folder.parent} to start again from the beginning"
            )
        aside = self.folder.parent / DAMAGED_CHECKPOINTS
        aside.mkdir(exist_ok=True)
        for step, what in lines.items():
            number = sum(entry.name.split("-")[0] == str(step) for entry in aside.iterdir())
            target = aside / (f"{step}-{number}" if number else str(step))
            (self.folder / str(step)).rename(target)
            self._damaged.pop(step, None)
            print(f"warning: the checkpoint {what}; it is moved to {target}", file=sys.stderr)

    def _damage_error(self, step: int) -> UserError:
        return UserError(
            f"the checkpoint {self.folder / str(step)} is damaged ({self._damaged[step]}); name "
            f"another with --checkpoint=STEP, or resume training, from the newest intact one"
        )

    def _intact_error(self, step: int, error: Exception) -> UserError:
        first, *_ = str(error).strip().splitlines() or [""]
        return UserError(
            f"the checkpoint of step {step} cannot be restored, though its files in "
            f"{self.folder / str(step)} are intact ({type(error).__name__}: {first[:200]}); free "
            f"memory and start the same command again, or install the packages of the versions in "
            f"{self.folder.parent / PROVENANCE}"
        )

    def _restore(self, step: int, like: TrainState) -> TrainState:
        saved = self._manager.item_metadata(step)[_ITEM].tree
        own = "use the run's own config"
        self._refuse_others(step, "model", saved["params"], like.params, own)
        own_and_optax = f"{own} and the version of Optax in its {PROVENANCE}"
        self._refuse_others(step, "optimizer", saved["opt_state"], like.opt_state, own_and_optax)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            restored = self._manager.restore(
                step, args=ocp.args.Composite(**{_ITEM: ocp.args.StandardRestore(like)})
            )
        return restored[_ITEM]

    def _restore_params(self, step: int, like: Any) -> Any:
        saved = self._manager.item_metadata(step)[_ITEM].tree
        self._refuse_others(step, "model", saved["params"], like, "use the run's own config")
        item = {"params": like}
        args = ocp.args.PyTreeRestore(
            item=item,
            restore_args=ocp.checkpoint_utils.construct_restore_args(item),
            partial_restore=True,
        )
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            return reader.restore(self._manager.directory / str(step) / _ITEM, args=args)["params"]

    def _refuse_others(self, step: int, what: str, there: Any, here: Any, remedy: str) -> None:
        """Raises UserError unless two trees have the same arrays."""
        saved, wanted = _shapes(there), _shapes(here)
        differ = sorted(n for n in saved.keys() | wanted.keys() if saved.get(n) != wanted.get(n))
        if differ:
            name = differ[0]
            raise UserError(
                f"the checkpoint {self.folder / str(step)} is of another {what}: {name} is "
                f"{saved.get(name, 'absent')} there and {wanted.get(name, 'absent')} in the "
                f"config ({len(differ)} arrays differ); {remedy}, or another folder with "
                f"--config.run_dir=FOLDER"
            )


@contextlib.contextmanager
def _without_pattern(folder: Path) -> Iterator[Path]:
    """Yields a path to the folder that has no glob characters.

    Orbax globs for what it has just written and does not escape the folder's name, so it finds
    nothing below ``run[1]``. Such a folder is reached through a temporary symbolic link.

    Raises:
      UserError: that place has such a name, too.
    """
    if not has_pattern(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="fsn_jax-") as beside:
        if has_pattern(beside):
            raise UserError(
                f"checkpoints in {folder} need a folder for temporary files without * ? [ in its "
                f"name; got {tempfile.gettempdir()}: set TMPDIR to another"
            )
        link = Path(beside, CHECKPOINTS)
        link.symlink_to(folder, target_is_directory=True)
        yield link


def _holds(saved: np.ndarray, leaf: jax.Array) -> bool:
    """Whether an array from disk has the bits of this process's shards of ``leaf``."""
    return all(
        saved[shard.index].tobytes() == np.asarray(shard.data).tobytes()
        for shard in leaf.addressable_shards
    )


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a tree's arrays; names are the same for tuples and their metadata."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _hush() -> None:
    """Silences log messages that repeat a raised error or do not concern the user.

    Orbax logs each save and clean-up, while a run has a progress line of its own. When an array
    cannot be read or written, Orbax raises the error and also logs several tracebacks. It closes
    its event loop at the first one, and the other arrays then report to the closed loop from
    threads, even after the program has printed what went wrong.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if isinstance(sys.unraisablehook, _Unraisable):
        return
    sys.unraisablehook = _Unraisable(sys.unraisablehook)


class _Unraisable:
    """Passes on unraisable errors, except reports to a closed event loop."""

    def __init__(self, report: Callable[[Any], Any]):
        self._report = report

    def __call__(self, unraisable: Any) -> None:
        if "Event loop is closed" not in str(unraisable.exc_value):
            self._report(unraisable)
