"""Checkpoints of a run: asynchronous saves, the latest and the best kept, exact restoration."""

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import (
    AnyPreservationPolicy,
    BestN,
    LatestN,
)

from train.config import CheckpointConfig
from train.errors import UserError
from train.step import TrainState

METRIC = "validation_loss"
_ITEM = "state"


class Checkpoints:
    """The checkpoints in ``<run folder>/checkpoints``.

    A context manager: leaving it waits for saves under way.
    """

    def __init__(self, folder: Path, config: CheckpointConfig, *, read_only: bool = False):
        """Opens the folder, or makes it unless ``read_only``."""
        # Orbax tells of each save and of files it may clean up; a run has its own progress line.
        logging.getLogger("absl").setLevel(logging.ERROR)
        self.folder = folder.resolve()
        self._manager = ocp.CheckpointManager(
            self.folder,
            # Named, or a manager that has saved nothing yet cannot tell what a checkpoint holds.
            item_handlers={_ITEM: ocp.StandardCheckpointHandler()},
            options=ocp.CheckpointManagerOptions(
                create=not read_only,
                read_only=read_only,
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
        self._manager.close()

    def save(self, state: TrainState, step: int, validation_loss: float | None) -> None:
        """Starts a save; the values are copied before this returns, so ``state`` may be donated."""
        metrics = None if validation_loss is None else {METRIC: validation_loss}
        self._manager.save(
            step, args=ocp.args.Composite(**{_ITEM: ocp.args.StandardSave(state)}), metrics=metrics
        )

    def wait(self) -> None:
        """Returns when every started save is on disk."""
        self._manager.wait_until_finished()

    def latest(self) -> int | None:
        """Step of the newest checkpoint, None if there is none."""
        return self._manager.latest_step()

    def all_steps(self) -> list[int]:
        """Steps of all checkpoints kept, ascending."""
        return sorted(self._manager.all_steps())

    def best(self) -> int | None:
        """Step of the checkpoint with the lowest validation loss, None if none was evaluated."""
        return self._manager.best_step()

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The state saved at ``step``.

        Args:
          step: which checkpoint.
          like: shapes, types and placement, see ``train.step.abstract_state``.

        Raises:
          UserError: the checkpoint holds another model, or is damaged.
        """
        try:
            with _hushed_stragglers():
                return self._restore(step, like)
        except UserError:
            raise
        except Exception as error:  # Orbax and what it reads with have no common one
            raise UserError(
                f"the checkpoint {self.folder / str(step)} is damaged "
                f"({str(error).split(':')[0][:80]}); remove it to go on from an earlier one"
            ) from error

    def _restore(self, step: int, like: TrainState) -> TrainState:
        saved = _shapes(self._manager.item_metadata(step)[_ITEM].tree["params"])
        wanted = _shapes(like.params)
        differ = sorted(n for n in saved.keys() | wanted.keys() if saved.get(n) != wanted.get(n))
        if differ:
            name = differ[0]
            raise UserError(
                f"the checkpoint {self.folder / str(step)} is of another model: {name} is "
                f"{saved.get(name, 'absent')} there and {wanted.get(name, 'absent')} in the "
                f"config ({len(differ)} arrays differ); use the run's own config, or another "
                f"folder with --config.run_dir=FOLDER"
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            restored = self._manager.restore(
                step, args=ocp.args.Composite(**{_ITEM: ocp.args.StandardRestore(like)})
            )
        return restored[_ITEM]


def _shapes(params: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    return {"/".join(str(k.key) for k in path): tuple(leaf.shape) for path, leaf in leaves}


@contextlib.contextmanager
def _hushed_stragglers() -> Iterator[None]:
    """Keeps off stderr what the other arrays of a damaged checkpoint say.

    Orbax closes its event loop at the first one that fails; the rest report to it from threads,
    also later on, so that only a success brings the former hook back.
    """
    report = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if "Event loop is closed" not in str(unraisable.exc_value):
            report(unraisable)

    sys.unraisablehook = hook
    yield
    sys.unraisablehook = report
