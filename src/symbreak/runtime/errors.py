"""The error for wrong input, and a note on stderr; their import costs nothing."""

import sys

__all__ = ["InputError", "note", "visible"]

LONGEST = 1000  # characters of an error


def visible(text: str) -> str:
    r"""Text for a terminal: of what may come from a file's name, characters that would steer it are escaped.

    >>> visible("a\x1b[31m")
    'a\\x1b[31m'
    """
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape", "surrogatepass").decode() for c in text
    )


class InputError(ValueError):
    """The input is wrong; the message is one line: what came, what was expected, what to do."""

    def __init__(self, message: object = "") -> None:
        # File names, class labels and what other libraries say may hold line breaks; what a file says has no end.
        line = visible(" ".join(str(message).split()))
        super().__init__(line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} ... {line[-LONGEST // 2 + 5 :]}")


def note(text: str) -> None:
    """One line on stderr: something went on otherwise than it was asked to."""
    sys.stderr.write(visible(" ".join(f"symbreak: note: {text}".split())) + "\n")
