"""``tools/headline.sh``: what it refuses, before it trains."""

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
