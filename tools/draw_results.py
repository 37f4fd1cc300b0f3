"""Writes the tables of results/comparison and the pictures made from records: no arguments.

``python tools/draw_results.py``, after ``python -m train record``. What needs trained models (copy
depth, heads, readings) is drawn from the JSON that their programs wrote.
"""

import json
from pathlib import Path

from train.analysis import compare, copy_depth, figures, final_losses, heads, readings

ROOT = Path(__file__).resolve().parent.parent
RESULTS, IMAGES = ROOT / "results", ROOT / "docs" / "images"
COMPARISON = RESULTS / "comparison"

COMPARISONS = {
    "enwik8_projected_pocket": ["enwik8_projected_pocket", "enwik8_transformer_pocket"],
    "pycode_projected_pocket": ["pycode_projected_pocket", "pycode_transformer_pocket"],
    "enwik8_pocket_long_shifted": ["enwik8_projected_pocket_long", "enwik8_shifted_pocket_long"],
    "enwik8_1m_half": ["enwik8_projected_1m_half", "enwik8_transformer_1m_half"],
    "enwik8_1m_half_shifted": ["enwik8_projected_1m_half", "enwik8_shifted_1m_half"],
    "ladder_500k": ["ladder_projected_500k", "ladder_transformer_500k"],
    "ladder_500k_shifted": ["ladder_projected_500k", "ladder_shifted_500k"],
    "enwik8_projected_pocket_short": ["enwik8_projected_pocket_short", "enwik8_transformer_pocket"],
}
CLOCKS = {"enwik8_projected_pocket": "clocks/*"}
"""Runs that time the present program, for a comparison whose own runs are of a slower one."""
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


def main() -> None:
    """Draws all of them."""
    for name, arms in COMPARISONS.items():
        runs = records(*(f"{arm}_seed*" for arm in arms))
        clocks = ["--clocks", *records(CLOCKS[name])] if name in CLOCKS else []
        output = f"--output={COMPARISON / name}.json"
        compare.program(["compare", *runs, *clocks, "--any_budget", output])
    for name, arms in FINAL_LOSSES.items():
        final_losses.program(
            ["final_losses", *records(*arms), f"--output={COMPARISON / name}.json"]
        )
    for picture in COMPARISON.glob("*.png"):
        if picture.stem in IN_DOCS:
            picture.replace(IMAGES / f"{IN_DOCS[picture.stem]}.png")
        else:
            picture.unlink()
    for name, runs in COPIES.items():
        figures.copy_curve(records(*(runs.format(kind) for kind in KINDS)), IMAGES / f"{name}.png")
    quickstarts = records("quickstart_projected", "quickstart", "quickstart_transformer")
    figures.loss_curve(quickstarts, IMAGES / "quickstart_loss.png")
    for name, table in COPY_DEPTHS.items():
        measured = json.loads(
            (RESULTS / "copy_depth" / f"{table}.json").read_text(encoding="utf-8")
        )
        copy_depth.draw(measured, IMAGES / f"{name}.png")
    of_heads = RESULTS / "heads" / "enwik8_1m_half.json"
    heads.draw(json.loads(of_heads.read_text(encoding="utf-8")), of_heads.with_suffix(".png"))
    read = json.loads(
        (RESULTS / "readings" / "enwik8_projected_pocket.json").read_text(encoding="utf-8")
    )
    readings.draw_kernels(read, IMAGES / "readings_kernels.png")
    readings.draw_depth(read, IMAGES / "readings_depth.png")


if __name__ == "__main__":
    main()
