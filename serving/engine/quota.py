"""How many processor cores this process may use: as its affinity and the quotas of its control groups allow."""

import math
import os
from contextlib import suppress
from pathlib import Path

CGROUPS, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
"""Where Linux shows control groups, and those of this process."""


def num_cores(groups: Path = CGROUPS, own: Path = OWN) -> int:
    """Count the whole cores that this process may use, at least one.

    A quota of 2.5 cores makes two: three busy threads would all be stopped for a sixth of the time, and so would
    whoever waits for them; the half is left for what decodes and writes.
    """
    return max(1, math.floor(min(len(os.sched_getaffinity(0)), find_quota(groups, own))))


def find_quota(groups: Path, own: Path) -> float:
    """Find the least quota of this process's control groups and of those above them, in cores; infinite without one.

    In a container what is shown begins with its own group, whatever the path outside is; so both are looked for.
    """
    quotas = [math.inf]
    with suppress(OSError):  # another system
        for line in own.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            for root in (groups / controllers, groups / "cpu") if controllers else (groups, groups / "unified"):
                group = root / path.lstrip("/")
                above = [one for one in (group, *group.parents) if one.is_relative_to(root)]
                quotas += map(_quota_of, above)
    return min(quotas)


def _quota_of(group: Path) -> float:
    """Read the quota of one group: of version 2 (cpu.max) or 1 (cpu.cfs_quota_us). "max" and -1 are none."""
    with suppress(OSError, ValueError):
        quota, period = (group / "cpu.max").read_text().split()
        return int(quota) / int(period)
    with suppress(OSError, ValueError):
        quota_us, period_us = (int((group / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
        return quota_us / period_us if quota_us > 0 else math.inf
    return math.inf
