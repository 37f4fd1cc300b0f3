"""Standard streams whose failures do not end a run.

What the encoding cannot show is replaced. What cannot be written (a full disk, a closed stream) is
lost, and if it was to go to stdout the error is raised when the program ends.
"""

import contextlib
import io
import os
import sys


class _Lenient(io.FileIO):
    """A file that notes write errors instead of raising them, except of a reader that is gone."""

    lost = ""

    def write(self, data: object) -> int:
        try:
            return super().write(data)  # type: ignore[arg-type]
        except BrokenPipeError:
            raise
        except OSError as error:
            self.lost = error.strerror or str(error)
            return memoryview(data).nbytes  # type: ignore[arg-type]


def mend() -> None:
    """Replaces ``sys.stdout`` and ``sys.stderr``; to be called before any file is opened."""
    for descriptor in range(3):
        with contextlib.suppress(OSError):
            os.fstat(descriptor)
            continue
        # Closed, or the next file that is opened would be taken for the stream.
        os.open(os.devnull, os.O_RDWR)
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        before = getattr(sys, name)
        stream = io.TextIOWrapper(
            io.BufferedWriter(_Lenient(descriptor, "w", closefd=False)),
            encoding=before.encoding if before else "utf-8",
            errors="replace" if name == "stdout" else "backslashreplace",
            line_buffering=name == "stderr" or os.isatty(descriptor),
        )
        setattr(sys, name, stream)


def lost() -> str:
    """Returns why printed text was lost, in words; "" if none was."""
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return raw.lost if isinstance(raw, _Lenient) else ""
