"""The one exception type for what a user can cause."""


class UserError(ValueError):
    """Something the caller can mend: bad input, a wrong file, an impossible setting.

    The message is one line that names the thing, what was expected and the remedy. The command-line tools print it
    and leave with exit status 2; through the Python API it is raised as it is.
    """


def counted(number: int, noun: str) -> str:
    """A number of things in words, as in 1 image, 2 images."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
