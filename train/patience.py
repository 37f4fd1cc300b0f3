"""Early stopping: a run ends when its validation loss has stopped falling."""

from pathlib import Path

from train.metrics import read_rows


class Patience:
    """Counts the evaluations since the lowest validation loss of a run.

    Attributes:
      limit: number of them at which the run ends; 0 for never.
      best: lowest loss so far, in nats.
      count: number of evaluations since then.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.best = float("inf")
        self.count = 0

    @classmethod
    def of_log(cls, limit: int, log: Path, *, step: int) -> "Patience":
        """Counts the evaluations in a run's log up to ``step``, from which the run resumes."""
        patience = cls(limit)
        for row in read_rows(log):
            if row["kind"] == "validation" and row["step"] <= step:
                patience.add(row["loss"])
        return patience

    def add(self, loss: float) -> bool:
        """Counts an evaluation; returns whether its loss is the lowest so far."""
        lowest = loss < self.best
        self.best = loss if lowest else self.best
        self.count = 0 if lowest else self.count + 1
        return lowest

    @property
    def is_over(self) -> bool:
        """Whether the run is to end."""
        return 0 < self.limit <= self.count
