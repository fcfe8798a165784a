"""What every test of the HTTP surface leaves behind."""

from collections.abc import Iterator

import httpx
import pytest

from tests.serving.http.asking import (
    CLEAR,
    LABELS,
    ask,
    labels_of,
)


@pytest.fixture
def still_answers(client: httpx.Client) -> Iterator[None]:
    """After whatever a test did, a good request is answered right."""
    yield
    assert (labels_of(ask(client, accept="image/png")) == LABELS)[CLEAR].all()
