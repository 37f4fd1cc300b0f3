"""``python -m train copy_depth RUN ...``: measures the loss of several runs by copy depth.

Predictions on windows of the validation split are grouped by the depth of the repeated context
before them (``suffix_match.py``), by whether they are copy events, and by the distance to the
source. Every arm (runs that differ only in their seed) is scored on the same windows. Intervals
come from a bootstrap over the windows, with the same resamples for all arms, so that differences
are paired. Prints a table; writes JSON and, beside it, the table and a figure.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np
import numpy.typing as npt
from jax.sharding import Mesh

from train.analysis.figures import legend_above, panels
from train.analysis.kinds import kind_of, styles
from train.analysis.records import mean_and_deviation, read_arms, reference_arm
from train.analysis.windows import check_alike, spread_windows
from train.data.suffix_match import LONGEST, SuffixMatch, match_suffixes
from train.errors import UserError
from train.files import check_json_output, default_output, write_result
from train.load import load
from train.metrics import bits_per_character
from train.program import Arguments, start_jax
from train.provenance import provenance
from train.step import make_window_losses
from train.tables import text_table

Floats = npt.NDArray[np.float64]

LEAST_DEPTH = (0, 1, 2, 3, 4, 8, 16)
BUCKETS = ("0", "1", "2", "3", "4-7", "8-15", "16+")
EVENTS = ("all", "copy", "other")
DISTANCES = ("any", "near", "far")
MOST_WINDOWS = 2000
"""Scored if no number is given."""
LEAST_RESAMPLES = 100
"""Least number of resamples: fewer give no 95% interval and may miss a rare cell."""
LEVEL = 0.95
"""Confidence level of the intervals."""
FAR = 64
"""Distance to the source, in characters, beyond which a repetition is long-range."""


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean and its bootstrap interval; None for a cell without predictions."""

    mean: float | None
    low: float | None
    high: float | None


def cell_index(match: SuffixMatch) -> npt.NDArray[np.int64]:
    """Returns the cell of each prediction: (bucket, copy, far) as one number below 28."""
    bucket = np.searchsorted(LEAST_DEPTH, match.depth, side="right").astype(np.int64) - 1
    return np.asarray((bucket * 2 + match.is_copy) * 2 + (match.distance > FAR))


def window_sums(cells: npt.NDArray[np.int64], values: npt.NDArray[Any]) -> Floats:
    """Sums the values of each window by cell: ``[W, 28]`` from two arrays ``[W, L]``."""
    size = len(BUCKETS) * 4
    rows = np.arange(len(cells))[:, None] * size + cells
    total = np.bincount(rows.ravel(), np.asarray(values, np.float64).ravel(), len(cells) * size)
    return np.asarray(total.reshape(len(cells), size), np.float64)


def selectors() -> dict[tuple[str, str, str], npt.NDArray[np.bool_]]:
    """Selects those of the 28 cells that make up (events, distance, bucket or ``all``).

    A prediction of depth 0 has no source, so it is neither near nor far, and in ``any``.
    """
    index = np.arange(len(BUCKETS) * 4)
    bucket, copy, far = index // 4, index // 2 % 2 == 1, index % 2 == 1
    of_events = {"all": index >= 0, "copy": copy, "other": ~copy}
    of_distance = {"any": index >= 0, "near": ~far & (bucket > 0), "far": far}
    of_bucket = {name: bucket == b for b, name in enumerate(BUCKETS)} | {"all": index >= 0}
    return {
        (e, d, b): of_events[e] & of_distance[d] & of_bucket[b]
        for e in EVENTS
        for d in DISTANCES
        for b in (*BUCKETS, "all")
    }


def resamples(num_windows: int, count: int) -> Floats:
    """Counts how often each bootstrap resample draws each window, ``[count, W]``."""
    draw = np.random.default_rng(0).multinomial(
        num_windows, np.full(num_windows, 1 / num_windows), size=count
    )
    return draw.astype(np.float64)


def interval(sums: Floats, counts: Floats, sum_draws: Floats, count_draws: Floats) -> Interval:
    """Returns the mean of a cell and its percentile interval over resamples that have the cell.

    Args:
      sums: scalar, the cell's sum over all windows.
      counts: scalar, the cell's number of predictions.
      sum_draws: ``[R]``, the sum in each resample.
      count_draws: ``[R]``, the number in each resample.
    """
    if not counts:
        return Interval(None, None, None)
    drawn = count_draws > 0
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(sum_draws[drawn] / count_draws[drawn], [tail, 100 - tail])
    return Interval(float(sums / counts), float(low), float(high))


def tabulate(
    match: SuffixMatch,
    losses: dict[str, list[Floats]],
    *,
    reference: str,
    num_resamples: int = 1000,
) -> dict[str, Any]:
    """Computes each arm's loss, and its difference to the reference, in each cell.

    Args:
      match: the suffix matches of the windows.
      losses: for each arm and seed, bits of each prediction, ``[W, L]``.
      reference: the arm that differences are taken to.
      num_resamples: number of bootstrap resamples.

    Returns:
      Per arm ``loss`` and ``difference``, lists of cells; per arm and cell ``seeds``, the means of
      the seeds.
    """
    cells = cell_index(match)
    counts = window_sums(cells, np.ones(cells.shape))
    by_seed = {arm: [window_sums(cells, x) for x in seeds] for arm, seeds in losses.items()}
    by_arm = {arm: np.mean(seeds, axis=0) for arm, seeds in by_seed.items()}
    draws = resamples(len(cells), num_resamples)
    count_draws = draws @ counts
    sum_draws = {arm: draws @ sums for arm, sums in by_arm.items()}
    arms: dict[str, Any] = {}
    for arm, sums in by_arm.items():
        loss, difference = [], []
        for key, of in selectors().items():
            n = counts[:, of].sum()
            label = dict(zip(("events", "distance", "bucket"), key, strict=True)) | {"n": int(n)}
            n_draws = count_draws[:, of].sum(axis=1)

            def cell(
                sums: Floats, drawn: Floats, of: Any = of, n: Any = n, n_draws: Any = n_draws
            ) -> dict[str, Any]:
                found = interval(sums[:, of].sum(), n, drawn[:, of].sum(axis=1), n_draws)
                return dataclasses.asdict(found)

            means = [float(s[:, of].sum() / n) for s in by_seed[arm]] if n else []
            deviation = mean_and_deviation(means)[1] if means else None
            own = cell(sums, sum_draws[arm])
            loss.append({**label, **own, "seeds": means, "seed_deviation": deviation})
            if arm != reference:
                apart = cell(sums - by_arm[reference], sum_draws[arm] - sum_draws[reference])
                difference.append({**label, **apart})
        arms[arm] = {"loss": loss, "difference": difference}
    return arms


def find_cell(
    cells: Sequence[dict[str, Any]], events: str, distance: str, bucket: str
) -> dict[str, Any]:
    """Finds one cell in a list that ``tabulate`` made."""
    wanted = (events, distance, bucket)
    return next(c for c in cells if (c["events"], c["distance"], c["bucket"]) == wanted)


def bits_of_windows(
    model: nn.Module,
    params: Any,
    windows: npt.NDArray[np.unsignedinteger[Any]],
    *,
    mesh: Mesh,
    separator: int | None = None,
) -> Floats:
    """Computes the bits of each prediction, ``[W, L]``, for windows of tokens ``[W, L + 1]``."""
    losses = make_window_losses(model, mesh=mesh, separator=separator)
    batch_size = 64 + -64 % mesh.size
    nats = []
    for first in range(0, len(windows), batch_size):
        part = windows[first : first + batch_size]
        padded = np.pad(part, ((0, batch_size - len(part)), (0, 0)), mode="edge")
        nats.append(np.asarray(losses(params, padded), np.float64)[: len(part)])
    return np.concatenate(nats) * bits_per_character(1.0)


def measure(
    folders: Sequence[str],
    *,
    reference: str = "",
    checkpoint: str = "latest",
    num_windows: int = 0,
    length: int = 0,
    num_resamples: int = 1000,
    data_path: str = "",
) -> dict[str, Any]:
    """Scores the runs and returns the content of the JSON file.

    Raises:
      UserError: a run cannot be loaded, the runs have different data or segments, or it is unclear
        which arm is the reference.
    """
    arms = read_arms(folders)
    reference = reference_arm(arms, reference)
    loaded = {
        name: [load(run.path, which=checkpoint, data_path=data_path) for run in arm.runs]
        for name, arm in arms.items()
    }
    every = [trained for group in loaded.values() for trained in group]
    check_alike(every)
    corpus = every[0].corpus
    shortest = min(trained.experiment.data.context for trained in every)
    most = min(shortest, LONGEST)
    length = length or most
    if not 1 <= length <= most:
        of = "the shortest context" if most == shortest else "what copy events are found in"
        raise UserError(f"--length must be from 1 to {of}, {most}; got {length}")
    tokens = corpus.tokens("validation")
    num_windows = num_windows or min(MOST_WINDOWS, (len(tokens) - 1) // length)
    starts = spread_windows(len(tokens), length, num_windows)
    windows = tokens[starts[:, None] + np.arange(length + 1)]
    separator = every[0].experiment.data.separator(corpus.vocabulary)
    losses = {
        name: [
            bits_of_windows(t.model, t.params, windows, mesh=t.mesh, separator=separator)
            for t in group
        ]
        for name, group in loaded.items()
    }
    match = match_suffixes(windows, separator=separator)
    table = tabulate(match, losses, reference=reference, num_resamples=num_resamples)
    for name, group in loaded.items():
        table[name]["runs"] = [trained.source for trained in group]
        table[name]["model"] = kind_of(group[0].experiment.to_dict()["model"])
    return {
        "kind": "copy_depth",
        "reference": reference,
        "split": "validation",
        "windows": num_windows,
        "length": length,
        "far": FAR,
        "level": LEVEL,
        "resamples": num_resamples,
        "provenance": provenance(corpus),
        "arms": table,
    }


def table_text(result: dict[str, Any]) -> str:
    """Formats the table: loss of the reference, differences of the others."""
    reference = result["reference"]
    others = [arm for arm in result["arms"] if arm != reference]
    rows = [("events", "source", "depth", "n", reference, *others)]
    for key in itertools.product(EVENTS, DISTANCES, (*BUCKETS, "all")):
        base = find_cell(result["arms"][reference]["loss"], *key)
        if not base["n"]:
            continue
        cells = (find_cell(result["arms"][arm]["difference"], *key) for arm in others)
        apart = (f"{c['mean']:+.3f} ±{(c['high'] - c['low']) / 2:.3f}" for c in cells)
        rows.append((*key, f"{base['n']:,}", f"{base['mean']:.3f}", *apart))
    return (
        f"{result['windows']} windows of {result['length']} characters of validation; loss in "
        f"bits, then differences to it, with {result['level']:.0%} intervals over windows\n\n"
        + text_table(rows)
    )


def draw(result: dict[str, Any], target: Path) -> None:
    """Draws loss by depth, and difference to the reference, for three sets of predictions."""
    views = (("all", "any"), ("copy", "any"), ("copy", "far"))
    far = f"copy events, source more than\n{result['far']} characters back"
    titles = ("all predictions", "copy events", far)
    kinds = [(arm, table["model"]) for arm, table in result["arms"].items()]
    looks = dict(zip(result["arms"], styles(kinds), strict=True))
    with panels(target, 2, 3, figsize=(11, 5.6), sharex=True, sharey="row") as axes:
        for column, (view, title) in enumerate(zip(views, titles, strict=True)):
            for index, (arm, table) in enumerate(result["arms"].items()):
                for row, kind in enumerate(("loss", "difference")):
                    if not table[kind]:
                        continue
                    cells = [find_cell(table[kind], *view, bucket) for bucket in BUCKETS]
                    points = [(x, c) for x, c in enumerate(cells) if c["n"]]
                    x = np.array([x for x, _ in points]) + (0.08 * index if row else 0.0)
                    mean = np.array([c["mean"] for _, c in points])
                    low = mean - [c["low"] for _, c in points]
                    high = [c["high"] for _, c in points] - mean
                    axes[row, column].errorbar(
                        x, mean, yerr=[low, high], color=looks[arm].colour, marker="o", ms=4,
                        lw=1.4, capsize=2, label=looks[arm].label,
                    )  # fmt: skip
            axes[0, column].set_title(title)
            axes[1, column].axhline(0, color="0.4", lw=1)
            axes[1, column].set_xlabel("copy depth, characters")
            axes[1, column].set_xticks(range(len(BUCKETS)), BUCKETS)
        axes[0, 0].set_ylabel("bits per character")
        axes[1, 0].set_ylabel(f"less {looks[result['reference']].label},\nbits per character")
        legend_above(axes[0, 0])


def program(argv: Sequence[str]) -> None:
    """Runs the program with the arguments of its command line."""
    p = Arguments(prog="python -m train copy_depth", description=__doc__)
    p.add_argument("runs", nargs="+", help="folders of runs with checkpoints")
    p.add_argument("--output", help="a .json; else copy_depth.json with the runs")
    p.add_argument("--reference", default="", help="the arm to compare with; else the transformer")
    p.add_checkpoint_options("latest")
    p.add_argument(
        "--windows",
        type=int,
        default=0,
        help=f"of the validation split; 0: {MOST_WINDOWS}, or as many as it holds",
    )
    p.add_argument(
        "--length", type=int, default=0, help=f"characters each; 0: shortest context, or {LONGEST}"
    )
    p.add_argument("--resamples", type=int, default=1000, help="of the bootstrap")
    options = p.parse_args(argv[1:])
    output = check_json_output(options.output or default_output(options.runs, "copy_depth.json"))
    if options.resamples < LEAST_RESAMPLES:
        raise UserError(f"--resamples must be at least {LEAST_RESAMPLES}; got {options.resamples}")
    start_jax()
    result = measure(
        options.runs,
        reference=options.reference,
        checkpoint=options.checkpoint,
        num_windows=options.windows,
        data_path=options.data_path,
        length=options.length,
        num_resamples=options.resamples,
    )
    drawn = functools.partial(draw, result)
    write_result(output, result, table_text(result), drawn, indent=None)
