"""What the README shows is run: its Python as it stands, its files and configs by name."""

import re
from pathlib import Path

import jax
import pytest

from train.metrics import read_rows
from train.run import open_run

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.usefixtures("quick_compiles")
def test_its_python_runs():
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {}
    with jax.numpy_rank_promotion("raise"):
        exec(compile(block, "README.md", "exec"), names)
    assert names["logits"].shape == (2, 128, 205)
    assert names["dtheta"].shape == names["theta"].shape


@pytest.mark.parametrize(
    "page", ["README.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
)
def test_its_links_lead_somewhere(page):
    folder = (ROOT / page).parent
    for target in re.findall(r"\]\(([^)#]+)", (ROOT / page).read_text()):
        assert target.startswith("http") or (folder / target).exists(), target


def test_its_configs_exist():
    configs = re.findall(r"configs/\w+\.py", README)
    assert configs
    for config in configs:
        assert (ROOT / config).is_file(), config


@pytest.mark.parametrize("run", ["quickstart", "quickstart_transformer"])
def test_its_losses_are_those_recorded(run):
    """The row of a run quotes its summary and its last evaluation of the whole split."""
    folder = ROOT / "results" / run
    summary = open_run(folder).read_config()
    row = next(r for r in README.splitlines() if f"`configs/{command(run)}`" in r and r[0] == "|")
    (whole,) = read_rows(folder / "evaluations.jsonl")
    last = [r for r in read_rows(folder / "metrics.jsonl") if r["kind"] == "validation"][-1]
    assert f"{summary.model.num_params():,}" in row
    assert f"{last['bpc']:.3f}" in row
    assert f"{whole['bpc']:.3f}" in row


def command(run):
    name, _, arm = run.partition("_")
    return f"{name}.py:{arm}" if arm else f"{name}.py"
