"""Programs that prepare text, train, evaluate and sample: `python -m train --help` lists them."""

import itertools
import sys

# Run as a program, a module of this package would end without a word: none has a __main__.
if any(a == "-m" and b.startswith("train.") for a, b in itertools.pairwise(sys.orig_argv)):
    print(
        "error: programs are run as python -m train NAME; python -m train --help lists them",
        file=sys.stderr,
    )
    sys.exit(2)
