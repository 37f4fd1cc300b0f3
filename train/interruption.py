"""Ctrl-C (SIGINT), at every moment of a program.

=====================  ==========================================================================
while it is imported   it ends at once: nothing has begun
while it works         KeyboardInterrupt, so that half-done work is cleaned up
while a run trains     a notice, as SIGTERM is: the step is finished and saved (``preemption.py``)
a second time          it ends at once, also in the middle of a compilation
=====================  ==========================================================================

The status is 130 each time. Python runs a signal's handler between two instructions of the main
thread, which a compilation can delay by minutes; so a second thread is notified of it, too.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Literal, NoReturn

from train.errors import EXIT_INTERRUPTED


class Interruptions:
    """What Ctrl-C does now, and whether it came.

    Attributes:
      came: whether it came since ``listen``.
      listening: whether this process is a program that ``listen`` was called for.
      kept: returns a phrase on what is kept if the program ends now; "" for none.
    """

    def __init__(self) -> None:
        """Changes nothing until ``listen``."""
        self.came = False
        self.listening = False
        self.kept: Callable[[], str] = lambda: ""
        self._does: Literal["leave", "raise", "notice"] = "leave"

    def listen(self) -> None:
        """Takes over SIGINT, unless the process was started to ignore it."""
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
            return
        self.listening = True
        readable, writable = os.pipe()
        os.set_blocking(writable, False)
        signal.set_wakeup_fd(writable, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(readable,), daemon=True).start()
        signal.signal(signal.SIGINT, self._handle)

    def begin(self) -> None:
        """Makes Ctrl-C a KeyboardInterrupt from now on; called when all is imported."""
        self._does = "raise"

    @contextlib.contextmanager
    def noticed(self) -> Iterator[None]:
        """Makes Ctrl-C a notice inside the context, where the caller sets the handler."""
        before, self._does = self._does, "notice"
        try:
            yield
        finally:
            self._does = before

    @property
    def line(self) -> str:
        """The message for a program that Ctrl-C ended."""
        kept = self.kept()
        return f"interrupted; {kept}" if kept else "interrupted"

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.came = True
        if self._does == "raise":
            raise KeyboardInterrupt

    def _watch(self, readable: int) -> None:
        count = 0
        while numbers := os.read(readable, 64):
            for number in numbers:
                if number != signal.SIGINT:
                    continue
                count += 1
                if self._does == "leave":
                    _leave("interrupted; nothing was begun")
                if count > 1:
                    _leave(self.line)
                if self._does == "notice":
                    _say("the step under way is finished and saved; Ctrl-C again ends at once")


def _leave(line: str) -> NoReturn:
    _say(line)
    os._exit(EXIT_INTERRUPTED)


def _say(line: str) -> None:
    # Not by sys.stderr, whose lock the main thread may hold.
    with contextlib.suppress(OSError):
        os.write(2, f"\n{line}\n".encode(errors="replace"))


interruptions = Interruptions()
"""The one object of this process, to which all signals go."""
