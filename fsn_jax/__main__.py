"""``python -m fsn_jax`` says where the programs are: an installation holds the library alone."""

import sys

if __name__ == "__main__":
    sys.exit(
        "fsn_jax is a library; its programs, python -m train, run in a checkout of the "
        "repository. A pretrained model needs no checkout: fsn_jax.hub.load(folder)"
    )
