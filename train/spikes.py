"""Steps whose loss stands far above what the run had come to."""

import math

import numpy as np

FACTOR = 1.5
LEAST = 0.1
"""A spike exceeds FACTOR times the mean of the last row of metrics, and that mean by LEAST nats."""


class Spikes:
    """Judges each step's loss by the row of metrics before it.

    A function of the rows alone, so that a resumed run judges as an uninterrupted one.
    """

    def __init__(self, expected: float | None = None):
        """``expected`` is the loss of the newest row, nats; None before the first."""
        self.expected = expected

    def find(self, before: int, losses: np.ndarray) -> list[tuple[int, float]]:
        """The spikes among some steps.

        Args:
          before: the step before the first of them.
          losses: float32[K], nats; those that are not finite are counted elsewhere.

        Returns:
          (step, loss) of each spike, steps counted from 1.
        """
        if not self.expected:  # nor after a row of which every step was skipped
            return []
        limit = max(FACTOR * self.expected, self.expected + LEAST)
        return [
            (before + 1 + i, float(loss))
            for i, loss in enumerate(losses)
            if math.isfinite(loss) and loss > limit
        ]
