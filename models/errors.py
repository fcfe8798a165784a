"""Everything that can go wrong by a user's doing, as one tree of exceptions.

Messages are one sentence: what was wrong, the value, what would be right. No transport in here:
`serving.rest` and the CLI map these classes to statuses and exit codes.

    PenumbraError
    ├── BadOption            an option is unknown, malformed or out of range
    ├── BadImage             the picture cannot be read
    ├── UnknownModel         no such model, or no such version of it
    ├── NotAcceptable        no offered answer format is accepted
    ├── UnsupportedMedia     the body is of a kind that is not read
    ├── Unsupported          the protocol has it, and it is not offered here
    ├── Restricted           it is switched off on this server
    ├── TooLarge             over a published limit; says the limit, the size and the remedy
    ├── QueueFull            refused at the door; says when to come again
    ├── NotReady             still loading, or draining
    ├── Cancelled            the caller went away
    ├── DeadlineExceeded     the caller's deadline passed
    ├── ModelFault           the model failed or produced NaN for this request
    └── Refused              offline: files that must not be used
        ├── BadCheckpoint    not a checkpoint of ours, or not of this network
        ├── BadArtifact      hashes, card or golden window do not hold
        ├── BadData          a data set is incomplete or inconsistent
        └── ParityFailed     an export does not reproduce its checkpoint
"""


class PenumbraError(Exception):
    """Any mistake or condition that the caller can be told about in one sentence."""


class BadOption(PenumbraError):
    """An option is unknown, malformed or out of range."""


class BadImage(PenumbraError):
    """The picture cannot be read."""


class UnknownModel(PenumbraError):
    """No such model, or no such version of it."""


class NotAcceptable(PenumbraError):
    """None of the answer formats on offer is accepted by the caller."""


class UnsupportedMedia(PenumbraError):
    """The body is of a kind that is not read."""


class Unsupported(PenumbraError):
    """A protocol has it, and it is not offered here."""


class Restricted(PenumbraError):
    """Switched off on this server."""


class TooLarge(PenumbraError):
    """Over a published limit."""


class QueueFull(PenumbraError):
    """Refused at the door; `retry_after_s` is an estimate from the measured service rate."""

    def __init__(self, message: str, *, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NotReady(PenumbraError):
    """Still loading, or draining."""


class Cancelled(PenumbraError):
    """The caller went away."""


class DeadlineExceeded(PenumbraError):
    """The caller's deadline passed before the answer was ready."""


class ModelFault(PenumbraError):
    """The model failed, or produced non-finite numbers, for this request."""


class Refused(PenumbraError):
    """Files that must not be used."""


class BadCheckpoint(Refused):
    """Not a checkpoint of ours, or not one of this network."""


class BadArtifact(Refused):
    """Hashes, card or golden window of an artifact do not hold."""


class BadData(Refused):
    """A data set is incomplete or inconsistent."""


class ParityFailed(Refused):
    """An export does not reproduce its checkpoint."""
