"""The judge of tools/soak.py sees a leak and does not see one where there is none."""

import importlib.util
import random
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).resolve().parent.parent / "tools" / "soak.py"
spec = importlib.util.spec_from_file_location("soak", SOAK)
soak = importlib.util.module_from_spec(spec)
spec.loader.exec_module(soak)


def rows(leak: dict[str, float]) -> list[dict[str, float]]:
    """Two hours of samples: a start that grows, then breathing, and a leak an hour."""
    chance = random.Random(0)
    made = []
    for second in range(0, 7200, 30):
        early = max(0.0, 1 - second / 1800)
        quiet = {
            "rss_bytes": 8e8 - 2e8 * early + chance.uniform(-5e6, 5e6),
            "open_files": 40 + chance.choice([0, 0, 0, 3]),
            "threads": 30 + chance.choice([0, 0, 1]),
        }
        hours = second / 3600
        made.append(
            {"seconds": second, **{n: v + leak.get(n, 0) * hours for n, v in quiet.items()}}
        )
    return made


@pytest.mark.parametrize("time", [["--minutes=1"], ["--minutes=-1"], ["--every=0"]])
def test_a_time_too_short_to_judge_is_refused_at_the_start(time, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["soak.py", *time])
    monkeypatch.setattr(soak.subprocess, "Popen", None)
    with pytest.raises(SystemExit, match="2"):
        soak.main()
    assert "error: --hours, --minutes: " in capsys.readouterr().err


def test_the_last_step_is_that_of_the_newest_whole_row(tmp_path):
    log = tmp_path / "metrics.jsonl"
    assert soak.last_step(tmp_path) == 0
    for text, step in (('{"step": 1', 0), ('{"step": 1}\n', 1), ('{"step": 1}\n{"step": 23', 1)):
        log.write_text(text, encoding="utf-8")
        assert soak.last_step(tmp_path) == step


def test_breathing_is_flat():
    assert all(": flat: " in line for line in soak.judge(rows({})))


def test_each_leak_is_seen():
    for name, an_hour in {"rss_bytes": 5e7, "open_files": 5, "threads": 5}.items():
        rising = [line for line in soak.judge(rows({name: an_hour})) if "RISING" in line]
        assert len(rising) == 1 and rising[0].startswith(name)
