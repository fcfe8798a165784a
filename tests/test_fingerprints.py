"""What Penumbra answers and learns has the committed hashes (`tests.fingerprints`), where floats round as they did."""

import json
from pathlib import Path

import pytest

from tests import fingerprints

RECORD = Path(__file__).parent / "fingerprints.json"


@pytest.mark.slow
def test_answers_documents_and_losses_have_the_recorded_hashes(tmp_path: Path) -> None:
    known = json.loads(RECORD.read_text())
    if known["facts"] != fingerprints.facts():
        pytest.skip(f"recorded on {known['facts']}; this is {fingerprints.facts()}, where floats round differently")
    assert fingerprints.differences(fingerprints.record(tmp_path), known["hashes"]) == []
