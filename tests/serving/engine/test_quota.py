"""A quota of processor time bounds the cores, in either version of control groups and wherever it is said."""

import os
from pathlib import Path

import pytest

from penumbra.serving.engine import quota
from penumbra.serving.engine.quota import num_cores

V1, V2 = "4:memory:/a/b\n3:cpu,cpuacct:/a/b\n1:name=systemd:/a/b\n", "0::/a/b\n"
HYBRID = V1 + "0::/a/b\n"


def v1(quota_us: int, period_us: int = 100_000) -> dict[str, str]:
    return {"cpu.cfs_quota_us": f"{quota_us}\n", "cpu.cfs_period_us": f"{period_us}\n"}


def v2(text: str) -> dict[str, str]:
    return {"cpu.max": f"{text}\n"}


@pytest.mark.parametrize(
    ("own", "groups", "cores"),
    [
        (V2, {}, 8),
        (V2, {"": v2("max 100000")}, 8),
        (V2, {"": v2("300000 100000")}, 3),  # as a container sees its own group
        (V2, {"a": v2("50000 10000"), "a/b": v2("max 100000")}, 5),  # a slice above a service
        (V2, {"a": v2("200000 100000"), "a/b": v2("400000 100000")}, 2),
        (V2, {"a/b": v2("250000 100000")}, 2),
        (V2, {"a/b": v2("50000 100000")}, 1),
        (V2, {"a/b": v2("9000000 100000")}, 8),
        (V2, {"a/b": v2("nonsense"), "c": v2("100000 100000")}, 8),
        (V1, {"cpu,cpuacct": v1(-1)}, 8),
        (V1, {"cpu,cpuacct": v1(400_000)}, 4),
        (V1, {"cpu/a/b": v1(150_000, 50_000)}, 3),
        (V1, {"memory/a/b": v1(100_000), "cpu": v1(600_000)}, 6),
        (HYBRID, {"cpu": v1(-1), "unified/a": v2("200000 100000")}, 2),
        ("", {"": v2("100000 100000")}, 8),
    ],
)
def test_the_least_quota_on_the_way_up_bounds_the_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str, groups: dict[str, dict[str, str]], cores: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    (tmp_path / "own").write_text(own)
    for group, files in groups.items():
        for name, text in files.items():
            (tmp_path / "groups" / group).mkdir(parents=True, exist_ok=True)
            (tmp_path / "groups" / group / name).write_text(text)
    assert num_cores(tmp_path / "groups", tmp_path / "own") == cores


def test_without_control_groups_the_affinity_says_it(tmp_path: Path) -> None:
    assert num_cores(tmp_path, tmp_path / "none") == len(os.sched_getaffinity(0))
    assert 1 <= num_cores(quota.CGROUPS, quota.OWN) <= len(os.sched_getaffinity(0))
