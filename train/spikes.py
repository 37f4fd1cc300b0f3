"""Finds loss spikes: steps whose loss is far above the recent mean."""

import math

import numpy as np

FACTOR = 1.5
LEAST = 0.1
"""A spike is above FACTOR times the mean of the last row of metrics, and LEAST nats above it."""


class Spikes:
    """Compares each step's loss with the row of metrics before it.

    It depends on the rows alone, so a resumed run finds the same spikes as an uninterrupted one.
    """

    def __init__(self, expected: float | None = None):
        """Takes the loss of the newest row in nats as ``expected``; None before the first row."""
        self.expected = expected

    def find(self, before: int, losses: np.ndarray) -> list[tuple[int, float]]:
        """Returns the spikes among K steps.

        Args:
          before: the step before the first of the K steps.
          losses: float32[K], nats; losses that are not finite are counted elsewhere.

        Returns:
          (step, loss) of each spike, with steps counted from 1.
        """
        if not self.expected:  # nor after a row of which every step was skipped
            return []
        limit = max(FACTOR * self.expected, self.expected + LEAST)
        return [
            (before + 1 + i, float(loss))
            for i, loss in enumerate(losses)
            if math.isfinite(loss) and loss > limit
        ]
