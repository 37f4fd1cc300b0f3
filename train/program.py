"""What every program of this package does around its work."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from train.errors import UserError

EXIT_USER_ERROR = 2


class Arguments(argparse.ArgumentParser):
    """A command line whose mistakes are one line, like every other, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Raises UserError."""
        raise UserError(f"{message}; see {self.prog} --help")


def run_program(program: Callable[[Sequence[str]], None], argv: Sequence[str]) -> int:
    """Runs a program; a user's mistake becomes one line on stderr and exit status 2."""
    try:
        program(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


def start_jax() -> None:
    """Finds the devices and keeps compiled programs between runs.

    The programs are kept in $JAX_COMPILATION_CACHE_DIR, or under ~/.cache/fsn_jax.

    Raises:
      UserError: JAX finds no device.
    """
    import jax  # here, since to prepare or open a corpus takes none of it

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        folder = Path("~/.cache/fsn_jax/compiled").expanduser()
        jax.config.update("jax_compilation_cache_dir", str(folder))
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        platforms = os.environ.get("JAX_PLATFORMS") or "any platform"
        reason = str(error) or "no such backend"
        raise UserError(
            f"JAX finds no device for {platforms} ({reason}); correct or unset "
            f"JAX_PLATFORMS, or install the package's cuda or tpu extra"
        ) from None
