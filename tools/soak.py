"""Train for a long time and tell whether memory, open files and threads stay flat.

    python tools/soak.py --hours=2                       # a small model on enwik8
    python tools/soak.py --minutes=5 --every=5

Starts `python -m train` in a run folder of its own, samples the process from /proc (so on Linux),
and judges the samples of the second half of the time: a straight line through each quantity must
not rise by more than its allowance. The samples go to `soak.jsonl` in the run folder. Exit status
0 if all is flat and the run saved its last step, 1 if not.
"""

import argparse
import datetime
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

EXIT_TRY_AGAIN = 75
"""Of a run that SIGTERM stopped (``train.errors``)."""
ROOT = Path(__file__).resolve().parent.parent

# What a quantity may rise by over the judged time: a share of its mean, and so many units more.
# Memory breathes with the allocator; a file or thread may be open at one sample and not the next.
ALLOWED = {"rss_bytes": (0.02, 4e6), "open_files": (0.0, 2.0), "threads": (0.0, 2.0)}

# A small model, often evaluated and saved: two hours hold as many of both as weeks of a real run.
# TensorStore 0.1.86 loses some 100 kB a save (docs/reliability.md): with a save every 50 steps
# that alone is seen.
SETTINGS = {
    "model.num_layers": 1,
    "model.num_phases": 32,
    "model.feedforward_width": 32,
    "data.context": 64,
    "training.batch_size": 8,
    "training.num_steps": 10_000_000,
    "training.log_every": 50,
    "evaluation.every": 500,
    "evaluation.num_tokens": 5_000,
    "checkpoints.every": 2000,
}


def sample(pid: int) -> dict[str, float]:
    """Returns resident bytes, open file descriptors and threads of a process."""
    status = dict(
        line.split(":", 1)
        for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    )
    return {
        "rss_bytes": int(status["VmRSS"].split()[0]) * 1024,
        "open_files": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": int(status["Threads"]),
    }


def rise(times: list[float], values: list[float]) -> float:
    """Returns the rise of the least-squares line through the values, from first to last time."""
    mean_time, mean = sum(times) / len(times), sum(values) / len(values)
    spread = sum((t - mean_time) ** 2 for t in times)
    slope = sum((t - mean_time) * (v - mean) for t, v in zip(times, values, strict=True)) / spread
    return slope * (times[-1] - times[0])


def judge(rows: list[dict[str, float]]) -> list[str]:
    """Formats one line a quantity: its range, its rise over the second half, flat or rising."""
    half = rows[len(rows) // 2 :]
    lines = []
    for name, (share, units) in ALLOWED.items():
        values = [row[name] for row in half]
        risen = rise([row["seconds"] for row in half], values)
        allowed = share * sum(values) / len(values) + units
        verdict = "flat" if risen <= allowed else "RISING"
        judged = half[-1]["seconds"] - half[0]["seconds"]
        lines.append(
            f"{name}: {verdict}: {min(values):,.0f} to {max(values):,.0f}, the line rises by "
            f"{risen:,.1f} (allowed {allowed:,.1f}) over {judged:,.0f} s"
        )
    return lines


def last_step(folder: Path) -> int:
    """Returns the step of the newest complete row of metrics."""
    try:
        whole, _, _ = (folder / "metrics.jsonl").read_text(encoding="utf-8").rpartition("\n")
    except OSError:
        return 0
    return int(json.loads(whole.splitlines()[-1])["step"]) if whole else 0


def main() -> int:
    """Trains, samples the process, and judges."""
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--hours", type=float, default=0.0)
    p.add_argument("--minutes", type=float, default=0.0)
    p.add_argument("--every", type=float, default=30.0, help="seconds between samples")
    p.add_argument("--run_dir", default="", help="default: runs/soak-<time>")
    p.add_argument("settings", nargs="*", help="further settings: model.num_layers=2 ...")
    options = p.parse_args()
    seconds = 3600 * options.hours + 60 * options.minutes or 7200.0
    if not 0 < 4 * options.every <= seconds:  # a line needs two samples in the second half
        p.error(f"--hours, --minutes: {seconds:g} s must be above 0 and hold 4 times --every")
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%S")
    folder = Path(options.run_dir or ROOT / "runs" / f"soak-{stamp}").absolute()
    given = dict(setting.partition("=")[::2] for setting in options.settings)
    settings = {name: str(value) for name, value in SETTINGS.items()} | given
    command = [sys.executable, "-m", "train", "--config=configs/quickstart.py"]
    command += [f"--config.run_dir={folder}", *(f"--config.{n}={v}" for n, v in settings.items())]
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, float]] = []
    with (folder / "output.txt").open("w", encoding="utf-8") as out:
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out)
        try:
            while last_step(folder) < int(settings["training.log_every"]):  # compiled
                if process.poll() is not None:
                    print(f"the run ended with status {process.returncode}: {folder}/output.txt")
                    return 1
                time.sleep(0.5)
            began = time.monotonic()
            with (folder / "soak.jsonl").open("w", encoding="utf-8") as log:
                while (elapsed := time.monotonic() - began) < seconds:
                    if process.poll() is not None:
                        print(f"the run ended with status {process.returncode}, see {folder}")
                        return 1
                    rows.append({"seconds": round(elapsed, 1), "step": last_step(folder)})
                    rows[-1] |= sample(process.pid)
                    log.write(json.dumps(rows[-1]) + "\n")
                    log.flush()
                    time.sleep(options.every)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                process.wait()
    lines = judge(rows)
    steps = int(rows[-1]["step"] - rows[0]["step"])
    saves = steps // int(settings["checkpoints.every"])
    print(
        f"{len(rows)} samples in {rows[-1]['seconds']:,.0f} s, {steps} steps, "
        f"{saves} saves, status {process.returncode}: {folder}"
    )
    print("\n".join(lines))
    stopped = process.returncode == EXIT_TRY_AGAIN  # saved its last step
    return int(not stopped or any("RISING" in line for line in lines))


if __name__ == "__main__":
    sys.exit(main())
