"""The one table from errors to statuses of every transport. A test demands that it is total."""

from penumbra.models import errors

STATUSES: dict[type[errors.PenumbraError], tuple[int, str]] = {
    errors.BadOption: (400, "INVALID_ARGUMENT"),
    errors.BadImage: (400, "INVALID_ARGUMENT"),
    errors.UnknownModel: (404, "NOT_FOUND"),
    errors.UnknownJob: (404, "NOT_FOUND"),
    errors.JobUnfinished: (409, "FAILED_PRECONDITION"),
    errors.DiskFull: (507, "RESOURCE_EXHAUSTED"),
    errors.NotAcceptable: (406, "INVALID_ARGUMENT"),
    errors.Unauthenticated: (401, "UNAUTHENTICATED"),
    errors.Forbidden: (403, "PERMISSION_DENIED"),
    errors.HeadTooLarge: (431, "RESOURCE_EXHAUSTED"),
    errors.TooLarge: (413, "RESOURCE_EXHAUSTED"),
    errors.UnsupportedMedia: (415, "INVALID_ARGUMENT"),
    errors.Unsupported: (501, "UNIMPLEMENTED"),
    errors.Restricted: (403, "UNAVAILABLE"),
    errors.QueueFull: (429, "RESOURCE_EXHAUSTED"),
    errors.Cancelled: (499, "CANCELLED"),
    errors.NotReady: (503, "UNAVAILABLE"),
    errors.DeadlineExceeded: (504, "DEADLINE_EXCEEDED"),
    errors.ModelFault: (500, "INTERNAL"),
    errors.Refused: (500, "INTERNAL"),
}
"""Error class -> (HTTP status, gRPC status name); a subclass without a row has its parent's."""


UNEXPECTED = "the server failed on this request; its log says why"
LOADING = "the server is still loading its models; try again in a few seconds"


def status_of(error: errors.PenumbraError) -> tuple[int, str]:
    """HTTP status and gRPC status name of an error."""
    return next(STATUSES[kind] for kind in type(error).__mro__ if kind in STATUSES)
