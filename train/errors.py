"""The one exception that a user of the programs is meant to see."""


class UserError(Exception):
    """A mistake that the user can mend; the message is one line naming the setting and the fix.

    The programs print it as `error: ...` and exit with status 2, without a traceback.
    """

    def __init__(self, message: str):
        """Join `message` into one line, whatever the texts quoted in it contain."""
        super().__init__(" ".join(message.split()))
