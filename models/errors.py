"""Everything that can go wrong by a user's doing, as one tree of exceptions.

Messages are one sentence: what was wrong, the value, what would be right. No transport in here:
`penumbra.serving.http.routes` and the CLI map these classes to statuses and exit codes.

    PenumbraError
    ├── BadOption            an option is unknown, malformed or out of range
    ├── BadImage             the picture cannot be read
    ├── UnknownModel         no such model, or no such version of it
    ├── UnknownJob           no such job, or its time is over
    ├── JobUnfinished        it has no result, or none yet
    ├── NotAcceptable        no offered answer format is accepted
    ├── UnsupportedMedia     the body is of a kind that is not read
    ├── Unsupported          the protocol has it, and it is not offered here
    ├── Restricted           it is switched off on this server
    ├── Unauthenticated      no key, or none that is known
    ├── Forbidden            the key's scope does not reach so far
    ├── TooLarge             over a published limit; says the limit, the size and the remedy
    ├── HeadTooLarge         the same, of a request's line and headers
    ├── QueueFull            refused at the door; says when to come again
    ├── DiskFull             there is no room for an answer's files
    ├── NotReady             still loading, or draining
    ├── Cancelled            the caller went away
    ├── DeadlineExceeded     the caller's deadline passed
    ├── ModelFault           the model failed or produced NaN for this request
    └── Refused              offline: files that must not be used
        ├── BadCheckpoint    not a checkpoint of ours, or not of this network
        ├── BadArtifact      hashes, card, signature or golden window do not hold
        ├── BadData          a data set is incomplete or inconsistent
        └── ParityFailed     an export does not reproduce its checkpoint
"""

import logging

log = logging.getLogger("penumbra")


class PenumbraError(Exception):
    """Any mistake or condition that the caller can be told about in one sentence."""


class BadOption(PenumbraError):
    """An option is unknown, malformed or out of range."""


class BadImage(PenumbraError):
    """The picture cannot be read."""


class UnknownModel(PenumbraError):
    """No such model, or no such version of it."""


class UnknownJob(PenumbraError):
    """No such job, or one whose time is over."""


class JobUnfinished(PenumbraError):
    """The job has no result, or none yet."""


class NotAcceptable(PenumbraError):
    """None of the answer formats on offer is accepted by the caller."""


class UnsupportedMedia(PenumbraError):
    """The body is of a kind that is not read."""


class Unsupported(PenumbraError):
    """A protocol has it, and it is not offered here."""


class Restricted(PenumbraError):
    """Switched off on this server."""


class Unauthenticated(PenumbraError):
    """There is no API key, or none that is known."""


class Forbidden(PenumbraError):
    """The API key's scope does not reach so far."""


class TooLarge(PenumbraError):
    """Over a published limit."""


class HeadTooLarge(PenumbraError):
    """A request's line and headers are over their limit."""


class QueueFull(PenumbraError):
    """Refused at the door; `retry_after_s` is an estimate from the measured service rate."""

    def __init__(self, message: str, *, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DiskFull(PenumbraError):
    """There is no room for an answer's files."""


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
    """Hashes, card, signature or golden window of an artifact do not hold."""


class BadData(Refused):
    """A data set is incomplete or inconsistent."""


class ParityFailed(Refused):
    """An export does not reproduce its checkpoint."""


def reason_of(error: Exception) -> str:
    """What to say of an error that one picture's work ended with; a strange one's traceback is in the debug log."""
    if isinstance(error, PenumbraError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror.lower()}" if error.filename else error.strerror
    log.debug("an unexpected error", exc_info=error)
    return f"it failed unexpectedly ({type(error).__name__}: {str(error).partition(chr(10))[0][:200]})"
