"""Reads runs, and arms (runs that differ only in their seed), from run folders or ``results/``.

A run is named after its arm; seeds other than the first add ``_seed<n>``. Only what
``python -m train record`` keeps is read, as plain values: a record outlives the code that made it.
"""

import dataclasses
import functools
import json
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict

from train.analysis.kinds import Style, kind_of, styles
from train.config import WITHOUT_EFFECT
from train.errors import UserError, unfinished
from train.metrics import read_rows
from train.old_settings import in_todays_names
from train.run import open_run
from train.run_files import CONFIG, EVALUATIONS, METRICS, PROVENANCE, SUMMARY, TEST_READS, TIMING

_SEED = re.compile(r"_seed\d+$")
_MAY_DIFFER = WITHOUT_EFFECT - {"training.patience"} | {"name", "seed"}
"""Settings in which the runs of an arm may differ."""

LOGGED = ("train", "validation")
"""Kinds of rows of metrics that hold a loss."""
_LOSS = ("step", "characters", "bpc")
_EVALUATION = ("step", "bpc", "context", "stride", "data_sha256")
_CONTENTS = {
    CONFIG: ("name", "seed", "model.architecture", "data.name", "data.context"),
    SUMMARY: (
        *("steps", "parameters", "characters", "characters_per_second", "training_flops"),
        *("seconds", "data_sha256", "validation.bpc", "validation.bytes", "validation.context"),
        "validation.stride",
    ),
    PROVENANCE: (
        *("command", "git.commit", "git.modified", "device", "packages"),
        *("data.name", "data.sha256"),
    ),
    METRICS: ("kind",),
    TIMING: ("step", "seconds"),
    EVALUATIONS: _EVALUATION,
    TEST_READS: _EVALUATION,
}
"""Fields that the readers of records use, by file and dotted path."""


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """The recorded evidence of one run.

    Every property raises UserError if its file is damaged.

    Attributes:
      path: the folder of the run or record.
      clocks: runs of the same model whose speed counts in place of this one's.
    """

    path: Path
    clocks: "tuple[RunRecord, ...]" = ()

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """All settings, nested."""
        (config,) = self._read(CONFIG)
        return in_todays_names(config)

    @functools.cached_property
    def summary(self) -> dict[str, Any]:
        """The content of ``summary.json``; empty if the run has not ended."""
        return next(iter(self._read(SUMMARY, optional=True)), {})

    @functools.cached_property
    def provenance(self) -> list[dict[str, Any]]:
        """One entry for each start of the run."""
        return self._read(PROVENANCE)

    @functools.cached_property
    def losses(self) -> dict[str, dict[int, float]]:
        """BPC by characters seen, for ``train``, ``validation`` and its two parts.

        The parts are ``copies``, the copy events, and ``others``, all other characters; they are
        empty unless the run evaluated copy events (``evaluation.copy_depth``).
        """
        kinds: dict[str, dict[int, float]] = {k: {} for k in (*LOGGED, "copies", "others")}
        for row in self._log:
            if row["kind"] not in LOGGED:
                continue
            seen, bpc = row["characters"], row["bpc"]
            kinds[row["kind"]][seen] = bpc
            if copies := row.get("copies"):
                kinds["copies"][seen] = row["copy_bpc"]
                # The first runs with copy events, of bytes, did not count the characters.
                predicted = row.get("predicted", row["bytes"])
                if others := predicted - copies:
                    kinds["others"][seen] = (bpc * predicted - row["copy_bpc"] * copies) / others
        return kinds

    @functools.cached_property
    def whole_validation(self) -> float | None:
        """BPC of the last checkpoint on the whole validation split; None without an evaluation."""
        return self._of_the_end(EVALUATIONS)

    @property
    def lacks_the_end(self) -> bool:
        """Whether the whole split was evaluated, but not as ``whole_validation`` needs it."""
        return self.whole_validation is None and bool(self._read(EVALUATIONS, optional=True))

    @functools.cached_property
    def test(self) -> float | None:
        """BPC of the last checkpoint on the test split; None if the split was not read."""
        return self._of_the_end(TEST_READS)

    @functools.cached_property
    def seconds_per_step(self) -> float | None:
        """Median time of a step; None if the speed was not logged.

        A median, so that other work on the machine does not count.
        """
        timing = self._read(TIMING, optional=True)
        steps = [0, *(row["step"] for row in timing)]
        by_step = [
            row["seconds"] / (after - before)
            for row, before, after in zip(timing, steps, steps[1:], strict=False)
        ]
        return statistics.median(by_step) if by_step else None

    @functools.cached_property
    def clock(self) -> dict[int, float]:
        """Seconds of training up to each number of characters; empty if no speed was logged."""
        paces = [run.seconds_per_step for run in self.clocks or (self,)]
        if None in paces:
            return {}
        by_step = statistics.fmean(filter(None, paces))
        return {
            row["characters"]: round(row["step"] * by_step, 3)
            for row in self._log
            if row["kind"] in LOGGED
        }

    @property
    def devices(self) -> set[str]:
        """The devices that ``clock`` was measured on."""
        return {run.provenance[0]["device"] for run in self.clocks or (self,)}

    @property
    def seed(self) -> int:
        """The seed of parameters and data."""
        return int(self.config["seed"])

    @property
    def arm(self) -> str:
        """The run's name without its seed."""
        return arm_of(self.config["name"])

    @functools.cached_property
    def _log(self) -> list[dict[str, Any]]:
        return self._read(METRICS, optional=True)

    def _of_the_end(self, name: str) -> float | None:
        """Returns the newest BPC of the last checkpoint, on the run's data, context and stride."""
        summary = self.summary
        if not summary:
            return None
        wanted = {
            "step": summary["steps"],
            "context": summary["validation"]["context"],
            "stride": summary["validation"]["stride"],
            "data_sha256": summary["data_sha256"],
        }
        rows = [row for row in self._read(name, optional=True) if wanted.items() <= row.items()]
        return float(rows[-1]["bpc"]) if rows else None

    def _read(self, name: str, *, optional: bool = False) -> list[dict[str, Any]]:
        """Reads the rows of a file, or its one object; empty if an optional file is missing."""
        file = self.path / name
        if optional and not file.is_file():
            return []
        try:
            if file.suffix == ".jsonl":
                rows = read_rows(file)
            else:
                content = json.loads(file.read_text(encoding="utf-8"))
                rows = content if name == PROVENANCE else [content]
                if not isinstance(rows, list) or not rows:
                    raise ValueError("no list of starts")
            for row in rows:
                _check(row, _CONTENTS[name])
                if name == METRICS and row["kind"] in LOGGED:
                    _check(row, _LOSS)
        except (OSError, ValueError) as error:
            raise UserError(
                f"{file} cannot be read ({error}); restore it or leave {self.path} out"
            ) from None
        return rows


def _check(row: Any, fields: Sequence[str]) -> None:
    """Raises ValueError if a field is missing."""
    for name in fields:
        value = row
        for key in name.split("."):
            if not isinstance(value, dict) or key not in value:
                raise ValueError(f"no {name} in {str(row)[:60]}")
            value = value[key]


def arm_of(name: str) -> str:
    """Returns the name of a run without its seed."""
    return _SEED.sub("", name)


@dataclasses.dataclass(frozen=True)
class Arm:
    """The runs of one configuration over its seeds.

    Attributes:
      name: name of the arm.
      runs: one run a seed, in the order of the seeds.
    """

    name: str
    runs: tuple[RunRecord, ...]

    @property
    def config(self) -> dict[str, Any]:
        """The settings that the runs share (with the seed of the first run)."""
        return self.runs[0].config

    @property
    def architecture(self) -> str:
        """``fsn`` or ``transformer``."""
        return str(self.config["model"]["architecture"])

    @property
    def kind(self) -> str:
        """The kind of its model: ``kind_of``."""
        return kind_of(self.config["model"])

    @property
    def sources(self) -> list[dict[str, Any]]:
        """Where each finished run came from."""
        return [
            {
                "record": run.path.name,
                "seed": run.seed,
                "commit": run.provenance[0]["git"]["commit"],
                "device": run.provenance[0]["device"],
                "data": run.summary["data_sha256"],
            }
            for run in self.runs
        ]

    def curve(self, kind: str = "validation") -> list[tuple[int, list[float]]]:
        """Returns ``(characters, BPC of each seed)`` for each row that every seed has."""
        by_seed = [run.losses[kind] for run in self.runs]
        shared = set.intersection(*(set(rows) for rows in by_seed)) if by_seed else set()
        return [(c, [rows[c] for rows in by_seed]) for c in sorted(shared)]


def styles_of(arms: Iterable[Arm]) -> list[Style]:
    """Returns how each arm is drawn."""
    return styles([(arm.name, arm.kind) for arm in arms])


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """Computes mean and sample standard deviation (None for a single value)."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return statistics.fmean(values), deviation


def read_run(folder: str | Path) -> RunRecord:
    """Opens the record of one run, on this machine or in a bucket.

    Raises:
      UserError: the folder is no run.
    """
    return RunRecord(open_run(folder).path)


def read_arms(folders: Iterable[str | Path], *, finished: bool = False) -> dict[str, Arm]:
    """Reads runs and groups them by arm, in the order given.

    Args:
      folders: folders of runs.
      finished: whether an unfinished run is an error.

    Raises:
      UserError: a folder is no run, two runs of an arm have one seed, or they differ in more.
    """
    by_arm: dict[str, list[RunRecord]] = {}
    for folder in folders:
        run = read_run(folder)
        if finished and not run.summary:
            raise unfinished(run.path)
        by_arm.setdefault(run.arm, []).append(run)
    return {name: _arm(name, runs) for name, runs in by_arm.items()}


def recorded_arms(results: Path) -> dict[str, Arm]:
    """Reads the arms under ``results/``."""
    return read_arms(sorted(file.parent for file in results.glob("*/config.json")))


def with_clocks(arm: Arm, clocks: Sequence[RunRecord]) -> Arm:
    """Returns an arm that takes its time from other runs of its model, context and batch size.

    Raises:
      UserError: there are none.
    """
    own = _work(arm.runs[0])
    same = [run for run in clocks if not _differing(own, _work(run))]
    if not same:
        raise UserError(
            f"none of the runs after --clocks has the model, context and batch size of {arm.name}"
        )
    runs = (dataclasses.replace(run, clocks=tuple(same)) for run in arm.runs)
    return dataclasses.replace(arm, runs=tuple(runs))


def print_missing_ends(arms: Iterable[Arm]) -> None:
    """Prints a line for each run whose evaluations of the whole split a table cannot use."""
    for run in (run for arm in arms for run in arm.runs if run.lacks_the_end):
        print(
            f"note: {run.path} was evaluated on the whole split, but not at its end and own "
            f"stride: python -m train evaluate {run.path} --checkpoint=latest"
        )


def reference_arm(arms: Mapping[str, Arm], named: str = "") -> str:
    """Returns the name of the reference arm: the named one, or else the only transformer.

    A single arm is its own reference.

    Raises:
      UserError: the named arm is not among the arms, or none is named and there is not exactly one
        transformer.
    """
    candidates = [name for name, arm in arms.items() if arm.architecture == "transformer"]
    if len(arms) == 1:
        candidates = list(arms)
    if not named and len(candidates) == 1:
        return candidates[0]
    if named in arms:
        return named
    if named:
        raise UserError(f"--reference must be one of {', '.join(arms)}; got {named!r}")
    found = "more than one transformer" if candidates else "no transformer"
    raise UserError(
        f"there is {found} among {', '.join(arms)}: name the arm to compare with, "
        f"--reference={next(iter(arms))} for instance"
    )


def _arm(name: str, runs: list[RunRecord]) -> Arm:
    first, *others = runs = sorted(runs, key=lambda run: run.seed)
    settings = _settings(first)
    for before, run in zip(runs, others, strict=False):
        if run.seed == before.seed:
            raise UserError(
                f"{before.path} and {run.path} have one name and one seed; leave one out"
            )
        if differ := _differing(settings, _settings(run)):
            raise UserError(
                f"{first.path} and {run.path} have one name but differ in {', '.join(differ[:3])}; "
                f"name them apart with --config.name"
            )
        if _data(first) != _data(run):
            raise UserError(
                f"{first.path} and {run.path} have one name but saw different data; leave one out"
            )
    return Arm(name, tuple(runs))


def _differing(one: Mapping[Any, Any], other: Mapping[Any, Any]) -> list[Any]:
    """Returns the settings in which two runs differ, among those that both have."""
    return sorted(k for k in one.keys() & other.keys() if one[k] != other[k])


def _work(run: RunRecord) -> dict[str, Any]:
    """Returns the settings that decide what a step computes."""
    return {
        name: value
        for name, value in flatten_dict(run.config, sep=".").items()
        if name.startswith("model.") or name in ("data.context", "training.batch_size")
    }


def _data(run: RunRecord) -> str:
    return str(run.provenance[0]["data"]["sha256"])


def _settings(run: RunRecord) -> dict[str, Any]:
    return {k: v for k, v in flatten_dict(run.config, sep=".").items() if k not in _MAY_DIFFER}
