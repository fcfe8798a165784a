"""Steps that check: tests of `tests/`, on the device, each outcome noted as it comes."""

import os

import pytest

from benchmarks.gpu.sheet import Failed, NotHere, OutOfTime, Sheet
from benchmarks.gpu.steps import ROOT

DEVICE = "TEST_DEVICE"
"""The environment variable that names the device to tests/gpu/conftest.py."""


class Reporter:
    """A plugin of pytest that notes what failed and why, how many passed, and the largest of what tests recorded."""

    def __init__(self, sheet: Sheet) -> None:
        self.sheet = sheet
        self.counts = {"passed": 0, "failed": 0, "skipped": 0}
        self.recorded: dict[str, float | str] = {}
        self.reasons: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        self.counts[report.outcome] += 1
        test = report.nodeid.partition("::")[2]
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            self.sheet.put(f"failed: {test}", " ".join(str(crash.message if crash else report.longrepr).split())[:400])
        if report.skipped and isinstance(report.longrepr, tuple):
            self.reasons.add(report.longrepr[2].removeprefix("Skipped: "))
        for name, value in report.user_properties:
            self.recorded[name] = value if isinstance(value, str) else max(value, self.recorded.get(name, value))
        self.sheet.note(self.counts | self.recorded)


def run(sheet: Sheet, tests: tuple[str, ...], few: str) -> None:
    """Run tests on the sheet's device. few: those of a quick run, as `pytest -k` takes them."""
    paths = [str(ROOT / place) for place in tests if (ROOT / place).exists()]
    if not paths:
        raise NotHere(f"{', '.join(tests)} is not there")
    os.environ[DEVICE] = str(sheet.device)
    reporter = Reporter(sheet)
    chosen = ["-k", few] if sheet.quick else []
    code = pytest.main(["-W", "default", "--tb=short", "--rootdir", str(ROOT), *chosen, *paths], plugins=[reporter])
    for name, value in (reporter.counts | reporter.recorded).items():
        sheet.put(name, value)
    if code == pytest.ExitCode.INTERRUPTED:
        raise OutOfTime
    if not reporter.counts["passed"] and not reporter.counts["failed"]:
        raise NotHere("; ".join(sorted(reporter.reasons)) or f"pytest ran no test and ended with {code!r}")
    for reason in sorted(reporter.reasons):
        sheet.put("some are skipped", reason)
    num_failed = reporter.counts["failed"]
    sheet.bar("tests that fail", num_failed, at_most=0)
    if num_failed:
        raise Failed(f"{num_failed} tests fail")
