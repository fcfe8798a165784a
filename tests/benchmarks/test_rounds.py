"""What a benchmark records: on which machine each of its runs was, and the memory of one piece of work."""

import json
import mmap
from mmap import PAGESIZE
from pathlib import Path

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
    def hold(size: int) -> None:
        """Fill pages of the system's own: what is freed elsewhere may be kept for what comes."""
        with mmap.mmap(-1, size) as memory:
            memory[::PAGESIZE] = bytes(size // PAGESIZE)

    hold(64 * 2**20)
    before = rounds.forget_peak()
    hold(16 * 2**20)
    assert 8 * 2**20 < rounds.peak_memory() - before < 40 * 2**20
