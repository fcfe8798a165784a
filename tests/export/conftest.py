"""Tests of imports may know two more methods."""

import pytest

from penumbra import models
from tests.export.tiny import tiny


@pytest.fixture
def two_more_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tiny", "other"):
        monkeypatch.setitem(models.methods(), name, tiny(name))
