"""From the records and checkpoints of runs to tables, pictures and verdicts."""
