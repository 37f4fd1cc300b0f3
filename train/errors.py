"""Errors that users see as one line instead of a traceback, and the exit statuses."""

EXIT_FAILURE = 1  # a bug: with a traceback
EXIT_USER_ERROR = 2
EXIT_TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong with the command, start it again
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells count
EXIT_UNREAD = 141  # 128 + SIGPIPE: who read the output, as `head` does, has gone


class UserError(Exception):
    """A mistake that the user can correct; the message is one line with the setting and the remedy.

    The programs print it as `error: ...` and exit with status 2, without a traceback.

    Attributes:
      everywhere: whether every process of the run raises the error, so that all end together.
    """

    everywhere = False

    def __init__(self, message: str):
        """Joins `message` into one line, whatever the texts quoted in it contain."""
        super().__init__(" ".join(message.split()))


def no_run(folder: object) -> UserError:
    """Returns the error for a folder that is not a run folder."""
    return UserError(f"{folder} is not a run folder (no config.json); train one first")


def unfinished(folder: object) -> UserError:
    """Returns the error for an unfinished run where a finished one is needed."""
    return UserError(f"the run {folder} is not finished; run its training command again")


class TryAgain(Exception):
    """The run stopped for an external reason; the same command resumes it (exit status 75).

    Attributes:
      everywhere: whether every process of the run raises the error.
      status: the exit status.
    """

    status = EXIT_TRY_AGAIN

    def __init__(self, message: str, *, everywhere: bool):
        """Makes the message one line."""
        super().__init__(" ".join(message.split()))
        self.everywhere = everywhere


class Interrupted(TryAgain):
    """The user's Ctrl-C stopped the run, after it was saved (exit status 130)."""

    status = EXIT_INTERRUPTED
