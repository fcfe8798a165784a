"""The unit of systemd: systemd's own check takes it, it is closed, and it says what the server does."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from penumbra.__main__ import main
from penumbra.serving.settings import Settings

UNIT = Path(__file__).parents[2] / "deploy" / "systemd" / "penumbra.service"
LINES = [line.partition("=")[::2] for line in UNIT.read_text().splitlines() if "=" in line and line[0] != "#"]
EXPOSURE = 20
"""The most exposure that systemd may see, in tenths; an open service has 96."""


def values(name: str) -> list[str]:
    return [value for key, value in LINES if key == name]


def analyze(verb: str, text: str, place: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """What systemd-analyze says of a unit of this text, whose command is a program that is there."""
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("systemd-analyze is not installed")
    unit = place / UNIT.name
    unit.write_text(text.replace("/opt/penumbra/bin/penumbra", sys.executable))
    return subprocess.run([program, verb, *options, unit], capture_output=True, text=True, timeout=60)


def test_systemd_takes_the_unit_and_not_one_with_a_slip(tmp_path: Path) -> None:
    text = UNIT.read_text()
    taken = analyze("verify", text, tmp_path, "--man=no")
    assert (taken.returncode, taken.stdout + taken.stderr) == (0, "")
    for right, wrong in (
        ("KillMode=mixed", "KilMode=mixed"),
        ("Type=exec", "Type=exek"),
        ("TimeoutStopSec=130", "TimeoutStopSec=x"),
    ):
        slipped = analyze("verify", text.replace(right, wrong), tmp_path, "--man=no")
        assert f"{UNIT.name}:" in slipped.stderr, "the slip is named by its line"


def test_systemd_sees_little_exposure_and_more_without_a_line(tmp_path: Path) -> None:
    options = ("--offline=true", f"--threshold={EXPOSURE}", "--no-pager")
    text = UNIT.read_text()
    closed = analyze("security", text, tmp_path, *options)
    assert closed.returncode == 0, closed.stdout[-200:]
    opened = re.sub(r"^(Cap|Restrict|SystemCall|Protect).*\n", "", text, flags=re.MULTILINE)
    assert analyze("security", opened, tmp_path, *options).returncode != 0


def test_the_command_is_one_and_everything_it_writes_is_its_own() -> None:
    (command,) = values("ExecStart")
    program, verb, *arguments = shlex.split(command)
    context = main.commands[verb].make_context(verb, arguments)
    assert program == "/opt/penumbra/bin/penumbra"
    state = {f"/var/lib/{name}" for name in " ".join(values("StateDirectory")).split()}
    said = dict(item.split("=", 1) for line in values("Environment") for item in line.split())
    assert {str(context.params["store"]), said["PENUMBRA_JOBS"], said["HOME"], *values("WorkingDirectory")} <= state


def test_it_may_finish_its_work(monkeypatch: pytest.MonkeyPatch) -> None:
    for line in values("Environment"):
        for name, value in (item.split("=", 1) for item in line.split()):
            monkeypatch.setenv(name, value)
    settings = Settings()
    assert float(values("TimeoutStopSec")[0]) > settings.predrain_s + 2 * settings.timeout_s
    assert values("KillMode") == ["mixed"], "the supervisor tells its worker"
