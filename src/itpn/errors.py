"""The one exception that a user sees."""


class UserError(Exception):
    """A mistake that its maker can mend: the command line prints the message as one line and exits with 2."""
