"""The soak finds growth where there is some, and none in our server."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from loadtests.soak import Reading, growth, main, slope_mb_per_minute


def readings(*, mb_per_minute: float = 0.0, warm_up_mb: float = 0.0, left_open: int = 0) -> list[Reading]:
    """Of ten minutes: memory jumps at the start, then keeps to a line; files stay open at the end."""
    return [
        Reading(
            "worker", at_s, 300 + (warm_up_mb if at_s > 60 else 0) + mb_per_minute * at_s / 60,
            40 + (left_open if at_s == 600 else 0), 20,
        )
        for at_s in range(2, 602, 2)
    ]  # fmt: skip


@pytest.mark.parametrize("rise", [-2.0, 0.0, 0.9, 8.9, 9.1, 30.0])
def test_memory_that_rises_by_a_megabyte_a_minute_and_a_step_is_growth(rise: float) -> None:
    """A step of 48 MB in the six minutes after the warm-up are 8 MB a minute."""
    series = readings(mb_per_minute=rise, warm_up_mb=200)
    assert slope_mb_per_minute(series) == pytest.approx(rise, abs=1e-6)
    assert [said.startswith("the memory of the worker") for said in growth(series)] == ([True] if rise >= 9 else [])


def test_a_file_that_stays_open_is_growth() -> None:
    assert growth(readings(left_open=1)) == ["the worker has 41 open_files, and had 40 at most when warm"]


@pytest.mark.parametrize(("late", "is_growth"), [(1, False), (3, False), (4, True)])
def test_threads_may_rise_by_what_a_pool_grows_and_no_more(late: int, is_growth: bool) -> None:
    series = readings()
    series[-1] = replace(series[-1], threads=series[-1].threads + late)
    said = f"the worker has {20 + late} threads, and had 20 at most when warm"
    assert growth(series) == ([said] if is_growth else [])


@pytest.mark.slow
def test_five_minutes_of_all_callers_leave_memory_files_and_threads_as_they_were(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["--minutes", "5", "--output", str(tmp_path)])
    print(done.output)
    assert done.exit_code == 0, done.output
    assert len(json.loads((tmp_path / "soak.json").read_text())["readings"]) > 100
