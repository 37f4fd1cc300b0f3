"""Formats tables of text and totals of parameters."""

import math
from collections.abc import Sequence
from typing import Any

from flax.traverse_util import flatten_dict


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Aligns the cells of rows in columns; columns of numbers are aligned to the right.

    The first row may be a head. Columns are two spaces apart.
    """
    columns = list(zip(*rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    numeric = [all(map(_is_number, column[1:])) for column in columns]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ).rstrip()
        for row in rows
    )


def _is_number(cell: str) -> bool:
    return " " not in cell and (cell.lstrip("-+?")[:1] or "0").isdigit()


def parameter_table(params: Any) -> str:
    """Formats one line a parameter: path, shape, number of scalars; each ends in a newline."""
    leaves = flatten_dict(params, sep="/")
    sizes = {name: math.prod(leaf.shape) for name, leaf in leaves.items()}
    rows = [(name, str(tuple(leaf.shape)), f"{sizes[name]:,}") for name, leaf in leaves.items()]
    return text_table([*rows, ("total", "", f"{sum(sizes.values()):,}")]) + "\n"
