"""Every error has its statuses, and says what it is for."""

import inspect

import pytest

from penumbra.models import errors

CLASSES = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, errors.PenumbraError)]
LEAVES = [kind for kind in CLASSES if not kind.__subclasses__()]
GRPC_STATUSES = {
    "OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND", "ALREADY_EXISTS",
    "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED", "OUT_OF_RANGE", "UNIMPLEMENTED",
    "INTERNAL", "UNAVAILABLE", "DATA_LOSS", "UNAUTHENTICATED",
}  # fmt: skip


def make(kind: type[errors.PenumbraError]) -> errors.PenumbraError:
    return kind("full", retry_after_s=1) if issubclass(kind, errors.TooMany) else kind("a sentence")


@pytest.mark.parametrize("kind", LEAVES)
def test_every_error_has_its_own_or_its_parents_statuses(kind: type[errors.PenumbraError]) -> None:
    error = make(kind)
    assert 400 <= error.http_status <= 599 and error.grpc_status in GRPC_STATUSES
    assert any({"http_status", "grpc_status"} <= vars(parent).keys() for parent in (kind, kind.__base__))


@pytest.mark.parametrize("kind", CLASSES)
def test_every_error_says_in_its_docstring_what_it_is(kind: type[errors.PenumbraError]) -> None:
    assert kind.__doc__ and kind.__doc__.strip().endswith((".", "rate."))


@pytest.mark.parametrize("kind", CLASSES)
def test_every_error_stands_in_the_drawn_tree(kind: type[errors.PenumbraError]) -> None:
    assert kind.__name__ in (errors.__doc__ or "")


def test_the_statuses_are_the_published_ones() -> None:
    published = {
        "BadOption": 400, "BadImage": 400, "UnknownModel": 404, "NotAcceptable": 406, "TooLarge": 413,
        "UnsupportedMedia": 415, "QueueFull": 429, "RateExceeded": 429, "Cancelled": 499, "ModelFault": 500,
        "NotReady": 503,
        "Unauthenticated": 401, "Forbidden": 403, "Restricted": 403, "HeadTooLarge": 431, "Unsupported": 501,
        "UnknownJob": 404, "JobUnfinished": 409, "DiskFull": 507, "NotPromoted": 409,
        "DeadlineExceeded": 504, "BadCheckpoint": 500, "BadArtifact": 500, "BadData": 500, "ParityFailed": 500,
    }  # fmt: skip
    assert {kind.__name__: make(kind).http_status for kind in LEAVES} == published
