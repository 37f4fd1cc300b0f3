"""Programs that prepare text, train, evaluate and sample. Run one with `python -m train`."""
