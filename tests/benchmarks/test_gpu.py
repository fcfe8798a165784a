"""The day with a GPU rests on this: every step's code runs, a result is kept, and no step takes another down."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import runner
from benchmarks.gpu.page import NOT_RUN, render
from benchmarks.gpu.server import Calls, watching
from benchmarks.gpu.sheet import DONE, FAILED, NOT_HERE, OUT_OF_TIME, NotHere, Sheet, read, write
from benchmarks.gpu.steps import ROOT, STEPS, Step
from tests.serving.server import until

STEP = Step("speed", "something", 60)


def command(*options: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *options], cwd=ROOT, env=environment, capture_output=True, text=True,
        timeout=900,
    )  # fmt: skip


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "gpu.json"


@pytest.mark.slow
def test_the_code_of_every_step_runs_without_a_gpu_and_says_what_it_could_not_do(path: Path) -> None:
    done = command("--device", "cpu", "--quick", "--budget", "800", "--output", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    entries = read(path)["steps"]
    assert list(entries) == [step.name for step in STEPS]
    states = {name: entry["state"] for name, entry in entries.items()}
    assert {states.pop(name) for name in ("shortage", "tensorrt")} <= {NOT_HERE, DONE}
    assert set(states.values()) == {DONE}, states
    failed = [what for entry in entries.values() for what in entry.get("found", {}) if "failed:" in what]
    assert failed == []
    assert all(name in render(read(path)) for name in entries)
    again = command("--device", "cpu", "--quick", "--output", str(path), "--only", "speed")
    assert "the result is there" in again.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_a_sentence_and_ends_well(path: Path) -> None:
    done = command("--output", str(path))
    assert done.returncode == 0 and not path.exists()
    assert done.stdout == "there is no CUDA GPU that torch can use here, so nothing is checked or measured\n"


def run_here(path: Path, monkeypatch: pytest.MonkeyPatch, work: Any) -> dict[str, Any]:
    monkeypatch.setattr(Step, "run", lambda _, sheet: work(sheet))
    sheet = Sheet(path, STEP.name, torch.device("cpu"))
    sheet.state("running", key={})
    runner.run_here(STEP, sheet, until=time.time() + 60)
    return read(path)["steps"][STEP.name]  # type: ignore[no-any-return]


def test_what_a_step_found_is_on_the_disk_before_it_ends(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(sheet: Sheet) -> None:
        sheet.put("windows/s", 3.5)
        assert json.loads(path.read_text())["steps"]["speed"]["found"] == {"windows/s": 3.5}
        sheet.bar("share", 0.5, at_least=0.6)
        with sheet.spared("a part"):
            raise torch.OutOfMemoryError("CUDA out of memory")

    entry = run_here(path, monkeypatch, work)
    assert entry["state"] == DONE
    assert entry["found"]["a part: failed"] == "out of memory"
    assert entry["bars"] == {"share": {"figure": 0.5, "bar": ">= 0.6", "holds": False}}


def test_a_step_whose_time_is_up_keeps_what_it_found(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(sheet: Sheet) -> None:
        sheet.put("windows/s", 3.5)
        with sheet.spared("a part that never ends"):
            assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 60
            signal.raise_signal(signal.SIGALRM)  # as the timer does

    entry = run_here(path, monkeypatch, work)
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
    assert (entry["state"], entry["found"]) == (OUT_OF_TIME, {"windows/s": 3.5})


def test_a_step_that_is_not_possible_says_why(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(_: Sheet) -> None:
        raise NotHere("no such library")

    entry = run_here(path, monkeypatch, work)
    assert (entry["state"], entry["why"]) == (NOT_HERE, "no such library")


def run_all(path: Path, monkeypatch: pytest.MonkeyPatch, *, budget_s: float = 100, again: bool = False) -> list[float]:
    """Two steps whose processes only note that they ended: the seconds that each was given."""
    given: list[float] = []

    def run_apart(step: Step, sheet: Sheet, key: dict[str, Any], *, limit_s: float) -> None:
        given.append(limit_s)
        sheet.state("running", key=key)
        sheet.state(DONE)

    monkeypatch.setattr(runner, "run_apart", run_apart)
    steps = [replace(STEP, budget_s=30), Step("server", "something", 50)]
    runner.run_all(steps, path, "cpu", "a card", budget_s=budget_s, again=again)
    return given


def test_a_result_is_kept_for_the_same_sources_and_card_and_a_failure_tried_again(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(run_all(path, monkeypatch)) == 2
    assert run_all(path, monkeypatch) == []
    assert len(run_all(path, monkeypatch, again=True)) == 2
    results = read(path)
    results["steps"]["speed"]["key"]["sources"] = "other sources"
    results["steps"]["server"]["state"] = FAILED
    write(path, results)
    assert len(run_all(path, monkeypatch)) == 2


def test_time_that_is_left_over_is_the_next_steps(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_all(path, monkeypatch) == pytest.approx([50, 100], abs=5)
    assert run_all(path, monkeypatch, budget_s=40, again=True) == pytest.approx([30, 40], abs=5)


def test_a_step_that_is_not_reached_is_said_to_be(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_all(path, monkeypatch, budget_s=5) == []
    assert {entry["state"] for entry in read(path)["steps"].values()} == {OUT_OF_TIME}


def test_a_process_that_hangs_is_ended_and_what_it_wrote_is_kept(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "GRACE_S", 0.2)
    program = path.with_name("hang.py")
    program.write_text("import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(600)\n")
    popen = subprocess.Popen
    monkeypatch.setattr(runner.subprocess, "Popen", lambda _, **more: popen([sys.executable, program], **more))
    sheet = Sheet(path, STEP.name, torch.device("cpu"))
    runner.run_apart(STEP, sheet, {}, limit_s=0.5)
    assert read(path)["steps"][STEP.name]["state"] == OUT_OF_TIME


def test_the_driver_is_asked_for_the_share_of_time_while_the_server_is_under_load(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = path.with_name("nvidia-smi")
    driver.write_text("#!/bin/sh\necho 97; echo [N/A]; echo 93; exec sleep 60\n")
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")
    with watching(Sheet(path, "server", torch.device("cpu"))) as use:
        until(lambda: len(use) == 2)
    assert use == [0.97, 0.93]


def test_callers_ask_in_a_closed_loop_and_what_one_meets_is_raised() -> None:
    turns: list[int] = []
    calls = Calls([lambda turn: turns.append(turn) or 2] * 3)
    took, counted = calls.during(0.05)
    assert took >= 0.05 and counted == 2 * len(turns) == 2 * len(calls.latencies_s)
    with pytest.raises(ZeroDivisionError):
        Calls([lambda turn: turn // 0]).during(60)


def test_the_page_says_of_every_bar_whether_it_is_held(path: Path) -> None:
    assert render({"steps": {}}) == NOT_RUN
    sheet = Sheet(path, STEP.name, torch.device("cpu"))
    sheet.bar("one", 0.5, at_least=0.6)
    sheet.bar("other", 1.2, at_most=1.3)
    sheet.unmeasured("third", "no driver")
    sheet.state(FAILED, why="a reason")
    page = render(read(path) | {"on": {"card": "a card"}})
    assert "card a card" in page and "| speed | failed: a reason |" in page
    assert "| speed: one | 0.5 | >= 0.6 | **no** |" in page and "| speed: other | 1.2 | <= 1.3 | yes |" in page
    assert "| speed: third | not measured: no driver | | |" in page


def test_the_steps_fit_into_ten_minutes_and_what_they_name_is_there() -> None:
    assert sum(step.budget_s for step in STEPS) <= 600
    for step in STEPS:
        assert step.tests or (ROOT / f"benchmarks/gpu/{step.name}.py").is_file()
