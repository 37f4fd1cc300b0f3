"""Turns records and checkpoints of runs into tables, figures and verdicts."""
