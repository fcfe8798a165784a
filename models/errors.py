"""Everything that can go wrong by a user's doing, as one tree of exceptions, each with the statuses that it ends with.

Messages are one sentence: what was wrong, the value, what would be right.

    PenumbraError
    ├── of a request   BadOption, BadImage, UnknownModel, UnknownJob, JobUnfinished, NotAcceptable, UnsupportedMedia,
    │                  Unsupported
    ├── of a caller    Restricted, Unauthenticated, Forbidden
    ├── of a limit     TooLarge, HeadTooLarge, DiskFull, and TooMany: QueueFull, RateExceeded
    ├── of the moment  NotReady, Cancelled, DeadlineExceeded
    ├── of the model   ModelFault, NotPromoted
    └── Refused        offline: BadCheckpoint, BadArtifact, BadData, ParityFailed
"""

import logging
from collections.abc import Mapping

log = logging.getLogger("penumbra")

UNEXPECTED = "the server failed on this request; its log says why"
"""What a caller is told of an error that is no PenumbraError."""


class PenumbraError(Exception):
    """Any mistake or condition that the caller can be told about in one sentence.

    http_status, grpc_status: what it ends a request with; a subclass that names none has its parent's. headers: what
    an HTTP answer has beside them. caller: the name of the key that it is about, if it is about one.
    """

    http_status: int
    grpc_status: str
    headers: Mapping[str, str] = {}
    caller: str = ""

    def __init_subclass__(cls, *, http: int | None = None, grpc: str | None = None) -> None:
        if http and grpc:
            cls.http_status, cls.grpc_status = http, grpc


class BadOption(PenumbraError, http=400, grpc="INVALID_ARGUMENT"):
    """An option is unknown, malformed or out of range."""


class BadImage(PenumbraError, http=400, grpc="INVALID_ARGUMENT"):
    """The picture cannot be read."""


class UnknownModel(PenumbraError, http=404, grpc="NOT_FOUND"):
    """There is no such model, or no such version of it."""


class UnknownJob(PenumbraError, http=404, grpc="NOT_FOUND"):
    """There is no such job, or its time is over."""


class JobUnfinished(PenumbraError, http=409, grpc="FAILED_PRECONDITION"):
    """The job has no result, or none yet."""


class NotAcceptable(PenumbraError, http=406, grpc="INVALID_ARGUMENT"):
    """None of the answer formats on offer is accepted by the caller."""


class UnsupportedMedia(PenumbraError, http=415, grpc="INVALID_ARGUMENT"):
    """The body is of a kind that is not read."""


class Unsupported(PenumbraError, http=501, grpc="UNIMPLEMENTED"):
    """A protocol has it, and it is not offered here."""


class Restricted(PenumbraError, http=403, grpc="UNAVAILABLE"):
    """It is switched off on this server."""


class Unauthenticated(PenumbraError, http=401, grpc="UNAUTHENTICATED"):
    """There is no API key, or none that is known."""

    headers: Mapping[str, str] = {"WWW-Authenticate": "Bearer"}


class Forbidden(PenumbraError, http=403, grpc="PERMISSION_DENIED"):
    """The API key's scope does not reach so far."""

    def __init__(self, message: str, caller: str = "") -> None:
        super().__init__(message)
        self.caller = caller


class TooLarge(PenumbraError, http=413, grpc="RESOURCE_EXHAUSTED"):
    """Something is over a published limit; the sentence says the limit, the size and the remedy."""


class HeadTooLarge(PenumbraError, http=431, grpc="RESOURCE_EXHAUSTED"):
    """A request's line and headers are over their limit."""


class TooMany(PenumbraError, http=429, grpc="RESOURCE_EXHAUSTED"):
    """A request is refused at the door; it may come again in `retry_after_s`."""

    def __init__(self, message: str, *, retry_after_s: int, caller: str = "") -> None:
        super().__init__(message)
        self.retry_after_s, self.caller = retry_after_s, caller
        self.headers = {"Retry-After": str(retry_after_s)}


class QueueFull(TooMany):
    """There is no room for more work now; the time is an estimate from the measured service rate."""


class RateExceeded(TooMany):
    """The API key has had as many requests as it may have."""


class DiskFull(PenumbraError, http=507, grpc="RESOURCE_EXHAUSTED"):
    """There is no room for an answer's files."""


class NotReady(PenumbraError, http=503, grpc="UNAVAILABLE"):
    """The server is still loading its models, or draining, and another replica takes over."""

    headers: Mapping[str, str] = {"Retry-After": "2"}

    def __init__(self, message: str = "the server is still loading its models; try again in a few seconds") -> None:
        super().__init__(message)


class Cancelled(PenumbraError, http=499, grpc="CANCELLED"):
    """The caller went away."""


class DeadlineExceeded(PenumbraError, http=504, grpc="DEADLINE_EXCEEDED"):
    """The caller's deadline passed before the answer was ready."""


class ModelFault(PenumbraError, http=500, grpc="INTERNAL"):
    """The model failed, or produced non-finite numbers, for this request."""

    def __init__(self, message: str = UNEXPECTED) -> None:
        super().__init__(message)


class NotPromoted(PenumbraError, http=409, grpc="FAILED_PRECONDITION"):
    """A version has not shown what it has to show before it is served."""


class Refused(PenumbraError, http=500, grpc="INTERNAL"):
    """Files must not be used."""


class BadCheckpoint(Refused):
    """The file is no checkpoint of ours, or none of this network."""


class BadArtifact(Refused):
    """Hashes, card, signature or golden window of an artifact do not hold."""


class BadData(Refused):
    """A data set is incomplete or inconsistent."""


class ParityFailed(Refused):
    """An export does not reproduce its checkpoint."""


def reason_of(error: Exception) -> str:
    """Say what one picture's work ended with; a strange error's traceback is in the debug log."""
    if isinstance(error, PenumbraError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror.lower()}" if error.filename else error.strerror
    log.debug("an unexpected error", exc_info=error)
    return f"it failed unexpectedly ({type(error).__name__}: {first_line(error)})"


def first_line(error: Exception) -> str:
    """Say what a library says is wrong: the first line that has words, or else the kind of its error."""
    lines = (line.strip()[:200] for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)
