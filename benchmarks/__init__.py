"""Benchmarks: speed is shown here, never asserted in a test."""
