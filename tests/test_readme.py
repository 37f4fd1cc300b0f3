"""The README and the pages of docs/: Python that runs, links, recorded numbers, lengths."""

import re
import statistics
from pathlib import Path

import jax
import pytest

from train.analysis.verdicts import Loss, decide, difference
from train.metrics import read_rows
from train.run import open_run

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
PAGES = [
    str(page.relative_to(ROOT))
    for pattern in ("*.md", "docs/**/*.md", "examples/**/*.md", "benchmarks/**/*.md")
    for page in sorted(ROOT.glob(pattern))
]
COLUMNS = ("projected", "fsn", "transformer", "shifted")
"""Kinds of models in the README's table, in the order of its columns."""
RUNGS = {
    ("0.23M", "20.5M"): "pocket",
    ("0.23M", "100M"): "pocket_long",
    ("0.5M", "50M"): "500k",
    ("1M", "50M"): "1m_half",
}
"""The end of the runs' names, by parameters and characters."""
FILES = {"validation": "evaluations.jsonl", "test": "test_reads.jsonl"}


def test_its_python_runs():
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {}
    with jax.numpy_rank_promotion("raise"):
        exec(compile(block, "README.md", "exec"), names)
    assert names["logits"].shape == (2, 128, 205)
    assert names["dtheta"].shape == names["theta"].shape


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 120
    assert len(README.split()) <= 1300


def prose(text):
    """The numbered lines of a page outside of code, equations and tables."""
    inside = False
    for number, line in enumerate(text.splitlines(), start=1):
        if line.startswith(("```", "$$")):
            inside = not inside
        elif not inside and not line.startswith("|"):
            yield number, line


@pytest.mark.parametrize("page", PAGES)
def test_lines_of_prose_are_short(page):
    long = [
        number
        for number, line in prose((ROOT / page).read_text(encoding="utf-8"))
        if len(line) > 120
    ]
    assert not long, f"{page}: lines {long} have more than 120 characters"


def anchor(heading):
    """The name that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_its_links_lead_somewhere(page):
    text, folder = (ROOT / page).read_text(encoding="utf-8"), (ROOT / page).parent
    inline = re.findall(r"\]\(([^)\s]+)\)", text)
    for target in inline + re.findall(r"^\[[^\]]+\]: (\S+)", text, re.MULTILINE):
        if target.startswith("http"):
            continue
        file, _, section = target.partition("#")
        path = folder / file if file else ROOT / page
        assert path.exists(), target
        if section:
            headings = [
                line for _, line in prose(path.read_text(encoding="utf-8")) if line.startswith("#")
            ]
            assert section in [anchor(heading.lstrip("#")) for heading in headings], target
    for label in re.findall(r"^!\[[^\]]*\]\[([^\]]+)\]", text, re.MULTILINE):
        assert f"\n[{label}]: " in text, label


def test_its_configs_exist():
    configs = re.findall(r"configs/\w+\.py", README)
    assert configs
    for config in configs:
        assert (ROOT / config).is_file(), config


def headline():
    """The rows of the README's table of losses: corpus, split, cells."""
    for line in README.splitlines():
        if match := re.match(r"\| (enwik8|pycode), (validation|test) \|", line):
            yield *match.groups(), [cell.strip() for cell in line.strip("|").split("|")][1:]


def quoted(losses, seeds):
    """Mean and deviation as the table gives them."""
    if len(losses) == 1:
        return f"{losses[0]:.4f} (1 seed)"
    assert len(losses) == seeds
    return f"{statistics.mean(losses):.4f} ± {statistics.stdev(losses):.4f}"


@pytest.mark.parametrize(("corpus", "split", "cells"), list(headline()))
def test_the_headline_is_that_of_the_records(corpus, split, cells):
    """Every cell is that of the runs, no recorded arm is left out, and bold is a decided win."""
    size, characters, seeds, *shown = cells
    rung, losses = RUNGS[size, characters], {}
    prefix = "ladder" if rung == "500k" else corpus
    for kind, cell in zip(COLUMNS, shown, strict=True):
        runs = sorted((ROOT / "results").glob(f"{prefix}_{kind}_{rung}_seed*"))
        losses[kind] = [list(read_rows(run / FILES[split]))[-1]["bpc"] for run in runs]
        assert cell.strip("*") == (quoted(losses[kind], int(seeds)) if runs else "")
        assert cell.strip("*").removesuffix(" (1 seed)") in RESULTS
    several = {kind: Loss(kind, tuple(bpc)) for kind, bpc in losses.items() if len(bpc) > 1}
    wins = [
        kind
        for kind, loss in several.items()
        if all(
            decide(*difference(loss, other))[0] == "holds"
            for other in several.values()
            if other is not loss
        )
    ]
    assert [kind for kind, cell in zip(COLUMNS, shown, strict=True) if "**" in cell] == wins


def test_the_headline_has_rows():
    assert len(list(headline())) >= 6


@pytest.mark.parametrize("run", ["quickstart", "quickstart_projected", "quickstart_transformer"])
def test_the_quickstart_is_that_of_its_records(run):
    """The row of a run quotes its summary and its last evaluation of the whole split."""
    folder = ROOT / "results" / run
    summary = open_run(folder).read_config()
    name, _, arm = run.partition("_")
    config = f"configs/{name}.py:{arm}" if arm else f"configs/{name}.py"
    row = next(r for r in RESULTS.splitlines() if f"`{config}`" in r and r[0] == "|")
    (whole,) = read_rows(folder / "evaluations.jsonl")
    last = [r for r in read_rows(folder / "metrics.jsonl") if r["kind"] == "validation"][-1]
    assert f"{summary.model.num_params():,}" in row
    assert f"{last['bpc']:.3f}" in row
    assert f"{whole['bpc']:.3f}" in row
