"""Programs that prepare text, train, evaluate and sample: `python -m train --help` lists them."""
