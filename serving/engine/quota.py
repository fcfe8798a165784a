"""How many processor cores this process may use: as its affinity and the quotas of its control groups allow."""

import math
import os
from contextlib import suppress
from pathlib import Path

CGROUPS, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
"""Where Linux shows control groups, and which are this process's."""


def num_cores(groups: Path = CGROUPS, own: Path = OWN) -> int:
    """Count the whole cores that this process may use, at least one. A quota of 2.5 cores makes two: three busy threads
    would all be stopped for a sixth of the time, and the half is left for what decodes and writes."""
    quotas = [math.inf]
    with suppress(OSError):  # another system
        for line in own.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers or "cpu" in controllers.split(","):
                quotas += map(_quota_of, _groups_above(path, groups, controllers))
    return max(1, math.floor(min(len(os.sched_getaffinity(0)), *quotas)))


def _groups_above(path: str, groups: Path, controllers: str) -> list[Path]:
    """List a group and those above it. What a container is shown begins with its own group, whatever its path is."""
    roots = (groups / controllers, groups / "cpu") if controllers else (groups, groups / "unified")
    return [one for root in roots for one in (root / path[1:] / "cpu.max").parents if one.is_relative_to(root)]


def _quota_of(group: Path) -> float:
    """Read the quota of a group in cores, of version 2 (cpu.max) or 1 (cpu.cfs_quota_us); infinite without one."""
    with suppress(OSError, ValueError):  # of "max", too
        quota, period = (group / "cpu.max").read_text().split()
        return int(quota) / int(period)
    with suppress(OSError, ValueError):
        quota_us, period_us = (int((group / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
        return quota_us / period_us if quota_us > 0 else math.inf
    return math.inf
