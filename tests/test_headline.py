"""``tools/headline.sh``: what it refuses before it trains, and how it ends."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "tools" / "headline.sh"


@pytest.mark.parametrize("minutes", ["x", "0", "-3", "1.5", "08"])
def test_refuses_minutes_that_are_no_number_and_writes_nothing(minutes, tmp_path):
    folder = tmp_path / "runs"
    done = subprocess.run([SCRIPT, folder, minutes], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == ""
    expected = f"error: MINUTES must be a whole number above 0; got '{minutes}'\n"
    assert done.stderr == expected
    assert not folder.exists()


def test_refuses_to_train_without_a_folder():
    done = subprocess.run([SCRIPT], capture_output=True, text=True, timeout=60)
    assert done.returncode != 0 and "usage: tools/headline.sh FOLDER" in done.stderr


@pytest.mark.parametrize("minutes", [["5"], []])
@pytest.mark.parametrize(("status", "ends"), [(0, 0), (75, 0), (143, 0), (2, 2), (1, 1)])
def test_ends_as_its_runs_do_and_takes_the_callers_folder(status, ends, minutes, tmp_path):
    """With a stand-in for Python: a run that saved and stopped (75) is no failure, others are."""
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\nexit {status}\n', encoding="utf-8"
    )
    python.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(python), "ARMS": "projected_1m transformer_1m"}
    done = subprocess.run(
        [SCRIPT, "mine", *minutes, "--config.seed=3"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == ends
    calls = (tmp_path / "calls").read_text(encoding="utf-8").splitlines()
    assert len(calls) == (1 if ends else 2)
    assert f"--config=configs/enwik8.py:projected_1m --config.run_dir={tmp_path}/mine/" in calls[0]
    assert calls[0].endswith(" --config.seed=3")
