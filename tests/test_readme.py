"""The README and the pages of docs/: Python that runs, links, recorded numbers, lengths."""

import re
import statistics
from pathlib import Path

import jax
import pytest

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
HEADLINE = {
    ("FSN with projected scores (ours)", "enwik8"): "enwik8_projected_pocket",
    ("transformer", "enwik8"): "enwik8_transformer_pocket",
    ("FSN with projected scores (ours)", "pycode"): "pycode_projected_pocket",
    ("transformer", "pycode"): "pycode_transformer_pocket",
}
"""The runs behind the README's first table: the arm by row and corpus."""


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


def row_of(page, name):
    """The cells of the table row that begins with a name."""
    (row,) = (r for r in page.splitlines() if r.startswith((f"| {name} |", f"| **{name}** |")))
    return [cell.strip().strip("*") for cell in row.strip("|").split("|")][1:]


@pytest.mark.parametrize(("row", "corpus"), HEADLINE)
def test_the_headline_is_that_of_the_records(row, corpus):
    """Mean and deviation over seeds, of the whole validation split and of the test split."""
    runs = sorted((ROOT / "results").glob(f"{HEADLINE[row, corpus]}_seed*"))
    (start,) = (i for i, name in enumerate(("enwik8", "pycode")) if name == corpus)
    for column, file in enumerate(("evaluations.jsonl", "test_reads.jsonl")):
        losses = [list(read_rows(run / file))[-1]["bpc"] for run in runs]
        quoted = f"{statistics.mean(losses):.4f} ± {statistics.stdev(losses):.4f}"
        assert row_of(README, row)[2 * start + column] == quoted
        assert quoted in RESULTS


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
