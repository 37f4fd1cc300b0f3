"""Formats tables of text and totals of parameters."""

import math
from collections.abc import Mapping, Sequence
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


def parameters_of(params: Any) -> list[dict[str, Any]]:
    """Returns path, shape, type and number of scalars of each parameter."""
    return [
        {
            "path": path,
            "shape": tuple(leaf.shape),
            "dtype": leaf.dtype.name,
            "size": math.prod(leaf.shape),
        }
        for path, leaf in flatten_dict(params, sep="/").items()
    ]


def parameter_table(parameters: Sequence[Mapping[str, Any]], *others: str) -> str:
    """Formats what ``parameters_of`` returns, with the columns of ``others`` and the total."""
    rows = [
        (p["path"], str(p["shape"]), f"{p['size']:,}", *(p[name] for name in others))
        for p in parameters
    ]
    total = sum(p["size"] for p in parameters)
    head, last = ("parameter", "shape", "size", *others), ("total", "", f"{total:,}")
    return text_table([head, *rows, last + ("",) * len(others)]) + "\n"
