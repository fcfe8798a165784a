"""What can go wrong, in one sentence each: the server's own wherever it said one."""


class PenumbraError(Exception):
    """Something went wrong. status: of the server's answer; 0 where there was none."""

    def __init__(self, sentence: str, status: int = 0) -> None:
        super().__init__(sentence)
        self.status = status


class Refused(PenumbraError):
    """The request is wrong, and asked again it would be refused again."""


class Unavailable(PenumbraError):
    """The server cannot be reached, or was full, loading or draining for longer than the client's patience."""


class Failed(PenumbraError):
    """The server failed on this request or job, or was late."""


def error_of(status: int, sentence: str) -> PenumbraError:
    """Make the error that a status stands for; 0 is that of a server that cannot be reached."""
    kind = Unavailable if status in (0, 429, 503) else Refused if status < 500 else Failed
    return kind(sentence or f"the server answered {status} without a reason", status)
