"""A real run on enwik8, killed and started again by the same command, ends in the same bits.

`pytest -m slow -s tests/test_resume_process.py` prints each kill.
"""

import collections
import contextlib
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import real_runs
from small_runs import assert_equal_trees

from train.metrics import read_rows
from train.run import open_run

KILLS = 28
SETTINGS = {"training.num_steps": 1200}
SEED = int(os.environ.get("FSN_JAX_KILL_SEED", "0"))


def steps_saved(folder: Path) -> int:
    names = (entry.name for entry in (folder / "checkpoints").glob("*"))
    return max((int(name) for name in names if name.isdecimal()), default=0)


def saves_under_way(folder: Path) -> set[tuple[str, int]]:
    """What Orbax has written beside the final names, distinguished by creation."""
    found = set()
    for entry in (folder / "checkpoints").glob("*tmp*"):
        with contextlib.suppress(FileNotFoundError):
            found.add((entry.name, entry.stat().st_ino))
    return found


def moments(folder: Path, chance: random.Random) -> dict[str, Callable[[], bool]]:
    """Ways to choose when to kill the process that starts now; none lets it come far."""
    base, began, left = steps_saved(folder), time.monotonic(), saves_under_way(folder)
    step, seconds = base + chance.randrange(1, 60), chance.uniform(0, 10)
    return {
        "at any time": lambda: (
            time.monotonic() - began > seconds or steps_saved(folder) >= base + 40
        ),
        "in a save": lambda: bool(saves_under_way(folder) - left),
        "at a step": lambda: real_runs.last_step(folder) >= step,
    }


@pytest.mark.slow
def test_a_killed_run_ends_in_the_bits_of_one_that_was_not(tmp_path):
    whole, run, compiled = tmp_path / "whole", tmp_path / "run", tmp_path / "compiled"
    real_runs.ended(real_runs.started(whole, SETTINGS, compiled=compiled))

    chance = random.Random(SEED)
    counted: collections.Counter[str] = collections.Counter()
    for number in range(1, KILLS + 1):
        way = ("at any time", "in a save", "at a step")[number % 3]
        moment, left = moments(run, chance)[way], saves_under_way(run)
        began = time.monotonic()
        process = real_runs.started(run, SETTINGS, compiled=compiled)
        real_runs.wait_until(process, moment)
        real_runs.killed(process)
        in_save = bool(saves_under_way(run) - left)
        counted.update({way: 1, "while a save was under way": in_save})
        print(
            f"kill {number:2}: {way:11}, {time.monotonic() - began:5.1f} s after its start, rows "
            f"up to step {real_runs.last_step(run)}, saved {steps_saved(run)}"
            f"{', a save under way' if in_save else ''}"
        )
    print(f"{KILLS} kills: {dict(counted)}; now to the end")
    assert counted["while a save was under way"] >= 5
    assert steps_saved(run) < SETTINGS["training.num_steps"]
    real_runs.ended(real_runs.started(run, SETTINGS, compiled=compiled))

    starts = [start["step"] for start in open_run(run).read_provenance()]
    assert starts == sorted(starts) and starts[0] == 0 and starts[-1] > 0
    rows = [(row["kind"], row["step"]) for row in read_rows(run / "metrics.jsonl")]
    assert len(set(rows)) == len(rows)
    assert (run / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert_equal_trees(real_runs.final_state(run), real_runs.final_state(whole))
    assert (run / "sample.txt").read_bytes() == (whole / "sample.txt").read_bytes()
