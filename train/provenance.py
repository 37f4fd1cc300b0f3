"""Records what produced a run: commit, packages, devices, data."""

import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

from train.data.corpus import Corpus
from train.files import write_atomically
from train.run import RunFolder
from train.run_files import PROVENANCE

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def write_provenance(
    run: RunFolder, corpus: Corpus, *, resume_step: int, implementation: str, init_from: str = ""
) -> None:
    """Appends an entry for this start to the run's provenance.

    Args:
      run: its folder.
      corpus: its data.
      resume_step: number of steps done before.
      implementation: of the causal sum, measured where the setting is ``auto``; on a CPU, which
        has one path, ``auto``.
      init_from: SHA-256 of the weights that the run begins with here; empty if it has none.
    """
    if not run.writes:
        return
    file = run.path / PROVENANCE
    starts = run.read_provenance() if file.exists() else []
    this = {"step": resume_step, **provenance(corpus), "implementation": implementation}
    if init_from:
        this["init_from"] = {"sha256": init_from}
    starts.append(this)
    write_atomically(file, json.dumps(starts, indent=2) + "\n")


def provenance(corpus: Corpus) -> dict[str, Any]:
    """Returns commit, command, packages, devices and data of this process."""
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": [Path(sys.executable).name, *sys.orig_argv[1:]],
        "git": git_state(),
        "python": platform.python_version(),
        "packages": package_versions(),
        "device": device_description(),
        "processes": jax.process_count(),
        "data": {
            "name": corpus.name,
            "folder": corpus.folder.resolve().name,
            "sha256": corpus.sha256,
            "vocabulary": len(corpus.vocabulary),
        },
    }


def package_versions() -> dict[str, str]:
    """Returns the versions of the packages that affect the numbers."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def device_description() -> str:
    """Describes the devices, for instance ``8 x cpu (Intel ..., 2 cores)``."""
    devices = jax.devices()
    kind = devices[0].device_kind
    if devices[0].platform == "cpu":
        kind = f"cpu ({_processor()}, {os.cpu_count()} cores)"
    return f"{len(devices)} x {kind}"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def git_state() -> dict[str, Any]:
    """Returns the commit and whether the tree differs from it outside of ``results/``.

    Of files that git does not know, modules (``*.py``) count, unless git ignores them.
    """
    here = Path(__file__).resolve().parent

    def git(*arguments: str | bytes) -> bytes | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(here), *arguments], capture_output=True, timeout=20
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit, outside = git("rev-parse", "HEAD"), ":(top,exclude)results"
    diff = git("diff", "HEAD", "--", ":(top)", outside)
    new = git("ls-files", "--others", "--exclude-standard", "-z", "--", ":(top)*.py", outside)
    if new and diff is not None:
        diff += new + (git("hash-object", "--", *new.strip(b"\0").split(b"\0")) or b"")
    return {
        "commit": commit.decode() if commit else None,
        "modified": bool(diff) if diff is not None else None,
        "diff_sha256": hashlib.sha256(diff).hexdigest() if diff else None,
    }
