"""``python -m train report RUN ...``: writes one HTML page of runs that needs no network.

A RUN is a run's folder or its record under ``results/``; runs that differ only in their seed are
one arm. ``--add`` includes what ``train copy_depth``, ``train final_losses`` (and with it
``train ladder``), ``train heads`` and ``train readings`` wrote.
"""

import html
import importlib.resources
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict

from train.analysis.records import Arm, RunRecord, mean_and_deviation, read_arms
from train.errors import UserError
from train.files import check_output, default_output, user_path, write_atomically, writing
from train.program import Arguments
from train.run_files import SAMPLE

KINDS = ("copy_depth", "final_losses", "heads", "readings")
MOST_POINTS = 400
"""Largest number of points of a training curve, about one a pixel."""


def arm_data(arm: Arm) -> dict[str, Any]:
    """Returns what the page shows of an arm."""
    first = arm.runs[0]
    finished = [run for run in arm.runs if run.summary]
    curve = arm.curve()
    mean, deviation = mean_and_deviation(curve[-1][1]) if curve else (None, None)
    whole = [bpc for run in arm.runs if (bpc := run.whole_validation) is not None]
    sample = first.path / SAMPLE
    return {
        "name": arm.name,
        "architecture": arm.architecture,
        "seeds": [run.seed for run in arm.runs],
        "parameters": finished[0].summary["parameters"] if finished else None,
        "characters": finished[0].summary["characters"] if finished else None,
        "speed": finished[0].summary["characters_per_second"] if finished else None,
        "device": first.provenance[0]["device"],
        "bpc": mean,
        "deviation": deviation,
        "whole_split": statistics.fmean(whole) if len(whole) == len(arm.runs) else None,
        "validation": points(arm, "validation"),
        "train": points(arm, "train"),
        "config": {
            k: v
            for k, v in flatten_dict(arm.config, sep=".").items()
            if k not in ("name", "run_dir", "mirror_dir")
        },
        "sample": sample.read_text(errors="replace", encoding="utf-8") if sample.is_file() else "",
    }


def points(arm: Arm, kind: str) -> list[list[float | None]]:
    """Returns a loss curve over the seeds, thinned out.

    Returns:
      ``[characters, mean, lowest, highest, training FLOPs, seconds of training]``. FLOPs are None
      before the run has ended; seconds (``RunRecord.clock``, mean over the seeds) are None if they
      were not logged.
    """
    curve = arm.curve(kind)
    every = -(-len(curve) // MOST_POINTS) or 1
    thinned = curve[::-1][::every][::-1]  # the last point stays
    summary = arm.runs[0].summary
    flops = summary["training_flops"] / summary["characters"] if summary else None
    clocks = [run.clock for run in arm.runs]
    seconds = {
        seen: statistics.fmean(times[seen] for times in clocks)
        for seen, _ in thinned
        if all(seen in times for times in clocks)
    }
    return [
        [
            seen,
            *(round(v, 5) for v in (statistics.fmean(bpc), min(bpc), max(bpc))),
            flops and seen * flops,
            seconds.get(seen),
        ]
        for seen, bpc in thinned
    ]


def run_data(run: RunRecord) -> dict[str, Any]:
    """Returns where a run came from."""
    start = run.provenance[0]
    packages = ("jax", "flax", "optax")
    return {
        "run": run.path.name,
        "seed": run.seed,
        "commit": str(start["git"]["commit"])[:12],
        "modified": start["git"]["modified"],
        "device": start["device"],
        "data": f"{start['data']['name']} {start['data']['sha256'][:12]}",
        "packages": ", ".join(f"{name} {start['packages'].get(name)}" for name in packages),
        "command": " ".join(start["command"]),
    }


def page_data(folders: Sequence[str | Path], added: Sequence[str | Path]) -> dict[str, Any]:
    """Collects the data of the page.

    Raises:
      UserError: a run or an added file cannot be read.
    """
    arms = list(read_arms(folders).values())
    shown = [arm_data(arm) for arm in arms]
    losses = [p[1] for arm in shown for p in arm["validation"] if math.isfinite(p[1])]
    analyses: dict[str, list[Any]] = {kind: [] for kind in KINDS}
    for file in added:
        content = read_analysis(file)
        analyses[content["kind"]].append(content)
    runs = [run for arm in arms for run in arm.runs]
    names = sorted({arm.config["data"]["name"] for arm in arms})
    return {
        "about": (
            f"{len(runs)} run{'s' * (len(runs) > 1)} of {len(arms)} arm{'s' * (len(arms) > 1)} on "
            f"{', '.join(names)}. Losses are in bits per character (BPC)."
        ),
        # The loss falls fast at first: the axis ends near the highest evaluation.
        "range": [min(losses) - 0.05, max(losses) + 0.05] if losses else None,
        "arms": shown,
        "runs": [run_data(run) for run in runs],
        **analyses,
    }


def read_analysis(file: str | Path) -> dict[str, Any]:
    """Reads a file that another program of this package wrote.

    Raises:
      UserError: the file cannot be read or is of an unknown kind.
    """
    try:
        content = json.loads(user_path("--add", file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--add={file} cannot be read ({error})") from None
    if not isinstance(content, dict) or content.get("kind") not in KINDS:
        raise UserError(f"--add={file} was not written by python -m train {' or '.join(KINDS)}")
    return content


def render(data: dict[str, Any], title: str) -> str:
    """Renders the page as HTML."""
    page = importlib.resources.files("train.analysis").joinpath("report.html")
    template = page.read_text(encoding="utf-8")
    # Within a script element only "</" could end it, and in JSON a slash may be escaped.
    content = json.dumps(_finite(data), separators=(",", ":"), allow_nan=False)
    content = content.replace("</", "<\\/").replace("<!--", "<\\u0021--")
    return template.replace("{{TITLE}}", html.escape(title)).replace("{{DATA}}", content)


def _finite(value: Any) -> Any:
    """Puts None for each number that JSON does not have: NaN and infinity."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def program(argv: Sequence[str]) -> None:
    """Runs the program with the arguments of its command line."""
    p = Arguments(prog="python -m train report", description=__doc__)
    p.add_argument("runs", nargs="+", help="folders of runs or of their records")
    p.add_argument("--add", nargs="+", default=[], help="JSON of the other programs")
    p.add_argument("--output", help="an .html; else report.html with the runs")
    p.add_argument("--title", default="FSN: report of runs")
    options = p.parse_args(argv[1:])
    named = options.output or default_output(options.runs, "report.html")
    output = check_output(named, ".html")
    page = render(page_data(options.runs, options.add), options.title)
    with writing("--output", output):
        write_atomically(output, page)
    print(f"{output} ({len(page.encode()) / 1e6:.1f} MB)")
