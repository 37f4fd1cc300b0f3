"""Finds loss spikes: steps whose loss is far above the recent mean."""

import math

import numpy as np

FACTOR = 1.5
LEAST = 0.1
"""A spike is above FACTOR times the mean of the last row of metrics, and LEAST nats above it."""


def find_spikes(expected: float | None, before: int, losses: np.ndarray) -> list[tuple[int, float]]:
    """Returns (step, loss) of each spike among K steps, with steps counted from 1.

    The result depends on the rows of metrics alone, so a resumed run finds the same spikes as an
    uninterrupted one. Losses that are not finite are counted elsewhere.

    Args:
      expected: mean loss of the last row in nats; None before the first, which finds nothing.
      before: the step before the first of the K steps.
      losses: float32[K], nats.
    """
    if expected is None:
        return []
    limit = max(FACTOR * expected, expected + LEAST)
    found = enumerate(map(float, losses), before + 1)
    return [(step, loss) for step, loss in found if math.isfinite(loss) and loss > limit]
