"""Writes the tables of results/comparison and the pictures made from records: no arguments.

``python tools/draw_results.py``, after ``python -m train record``. What needs trained models (copy
depth, heads, readings) is drawn from the JSON that their programs wrote.
"""

import json
from pathlib import Path
from typing import Any

from train.analysis import compare, copy_depth, figures, final_losses, heads, readings

ROOT = Path(__file__).resolve().parent.parent
RESULTS, IMAGES = ROOT / "results", ROOT / "docs" / "images"
COMPARISON = RESULTS / "comparison"

COMPARISONS = {
    # The clocks are of the present program; the runs are of a slower one.
    "enwik8_projected_pocket": [
        "enwik8_projected_pocket_seed*",
        "enwik8_transformer_pocket_seed*",
        "--clocks",
        "clocks/*",
    ],
    "pycode_projected_pocket": ["pycode_projected_pocket_seed*", "pycode_transformer_pocket_seed*"],
    "enwik8_pocket_long_shifted": [
        "enwik8_projected_pocket_long_seed*",
        "enwik8_shifted_pocket_long_seed*",
    ],
    "enwik8_1m_half": ["enwik8_projected_1m_half_seed*", "enwik8_transformer_1m_half_seed*"],
    "enwik8_1m_half_shifted": ["enwik8_projected_1m_half_seed*", "enwik8_shifted_1m_half_seed*"],
    "ladder_500k": ["ladder_projected_500k_seed*", "ladder_transformer_500k_seed*"],
    "ladder_500k_shifted": ["ladder_projected_500k_seed*", "ladder_shifted_500k_seed*"],
    "enwik8_projected_pocket_short": [
        "enwik8_projected_pocket_short_seed*",
        "enwik8_transformer_pocket_seed*",
        "--any_budget",
    ],
}
FINAL_LOSSES = {
    "ablations_pocket": ["ablation_[!p]*_seed1", "--reference=ablation_fsn"],
    "ablations_published_pocket": [
        "ablation_published*_seed1",
        "ablation_transformer_seed1",
        "--reference=ablation_published",
    ],
    "projected_variants_pocket": [
        "enwik8_projected_pocket_seed*",
        "enwik8_transformer_pocket_seed*",
        "enwik8_projected_base_pocket_seed*",
        "enwik8_projected_modes_pocket_seed*",
        "enwik8_projected_one_head_pocket_seed*",
    ],
    "ladder": [f"ladder_*_{rung}_seed*" for rung in ("60k", "120k", "pocket")],
}
COPIES = {
    "copies_pocket_long": "enwik8_{}_pocket_long_seed*",
    "copies_500k": "ladder_{}_500k_seed*",
    "copies_1m_half": "enwik8_{}_1m_half_seed*",
}
KINDS = ("projected", "fsn", "transformer", "shifted")
COPY_DEPTHS = {
    "copy_depth_pocket": "enwik8_projected_pocket",
    "copy_depth_pocket_long": "enwik8_pocket_long_arms",
    "copy_depth_1m_half": "enwik8_1m_half_arms",
}
IN_DOCS = {
    "enwik8_projected_pocket": "comparison_enwik8_pocket",
    "pycode_projected_pocket": "comparison_pycode_pocket",
    "ablations_pocket": "ablations_pocket",
    "ladder": "ladder",
}
"""Pictures of results/comparison that docs/ shows, and their names there."""


def records(*patterns: str) -> list[str]:
    """Returns the folders of results/ of these patterns, and options as they are."""
    found = [
        [pattern] if pattern.startswith("--") else map(str, sorted(RESULTS.glob(pattern)))
        for pattern in patterns
    ]
    return [argument for part in found for argument in part]


def content(file: Path) -> Any:
    """Reads what a program measured."""
    return json.loads(file.read_text(encoding="utf-8"))


def main() -> None:
    """Draws all of them."""
    for program, tables in ((compare.program, COMPARISONS), (final_losses.program, FINAL_LOSSES)):
        for name, runs in tables.items():
            program(["", *records(*runs), f"--output={COMPARISON / name}.json"])
    for picture in COMPARISON.glob("*.png"):
        if picture.stem in IN_DOCS:
            picture.replace(IMAGES / f"{IN_DOCS[picture.stem]}.png")
        else:
            picture.unlink()
    for name, arms in COPIES.items():
        figures.copy_curve(records(*(arms.format(kind) for kind in KINDS)), IMAGES / f"{name}.png")
    quickstarts = records("quickstart_projected", "quickstart", "quickstart_transformer")
    figures.loss_curve(quickstarts, IMAGES / "quickstart_loss.png")
    for name, table in COPY_DEPTHS.items():
        copy_depth.draw(content(RESULTS / "copy_depth" / f"{table}.json"), IMAGES / f"{name}.png")
    of_heads = RESULTS / "heads" / "enwik8_1m_half.json"
    heads.draw(content(of_heads), of_heads.with_suffix(".png"))
    read = content(RESULTS / "readings" / "enwik8_projected_pocket.json")
    readings.draw_kernels(read, IMAGES / "readings_kernels.png")
    readings.draw_depth(read, IMAGES / "readings_depth.png")


if __name__ == "__main__":
    main()
