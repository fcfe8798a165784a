"""What a benchmark records: on which machine each of its runs was, and the memory of one piece of work."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import rounds


def test_a_run_that_is_kept_says_its_own_machine_and_no_other_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounds, "RESULTS", tmp_path)
    old = {"on": {"cores": -1}, "earlier": {"ms": 1}, "again": {"ms": 2}}
    (tmp_path / "times.json").write_text(json.dumps(old))
    rounds.save("times", {"again": {"ms": 3}}, keep=True)
    document = json.loads((tmp_path / "times.json").read_text())
    assert document | {"again": old["again"]} == old
    assert document["again"]["ms"] == 3 and document["again"]["on"]["cores"] > 0


def test_the_peak_of_earlier_work_is_forgotten() -> None:
    mebi = 2**20
    np.ones(64 * mebi, np.uint8)
    before = rounds.forget_peak()
    np.ones(8 * mebi, np.uint8)
    assert 4 * mebi < rounds.peak_memory() - before < 32 * mebi
