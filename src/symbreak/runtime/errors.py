"""The error for wrong input; its import costs nothing."""

__all__ = ["InputError"]

LONGEST = 1000  # characters of an error


class InputError(ValueError):
    """The input is wrong; the message is one line: what came, what was expected, what to do."""

    def __init__(self, message: object = "") -> None:
        # File names, class labels and what other libraries say may hold line breaks; what a file says has no end.
        line = " ".join(str(message).split())
        super().__init__(line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} ... {line[-LONGEST // 2 + 5 :]}")
