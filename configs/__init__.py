"""Experiments: one file a family, each with ``get_config``; see README.md."""
