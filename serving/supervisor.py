"""What is agreed between the worker and BentoML's supervisor, which by itself starts any worker that ended once more.

A worker that is killed is replaced. One that gives up (`give_up`, or any other exit with a status) ends the server:
the next one would find the same store, port or device.
"""

import ctypes
import logging
import os
import signal
import sys
import threading
from contextlib import suppress
from typing import Any, NoReturn

from penumbra.models.errors import BadOption

log = logging.getLogger("penumbra")

PR_SET_PDEATHSIG = 1
"""From <linux/prctl.h>."""


def end_with_parent() -> None:
    """Get SIGTERM when the supervisor dies: a worker without one would keep the ports from the next server."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def give_up(reason: str) -> NoReturn:
    """End a worker that has taken no work yet, from any of its threads, and with it the server."""
    log.error("the server cannot start: %s", reason)
    logging.shutdown()
    os._exit(1)


def end_with_workers() -> None:
    """Let the supervisor end with the status of a worker that gives up. Called before it makes its watchers."""
    import circus.watcher

    class Watcher(circus.watcher.Watcher):  # type: ignore[misc]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, hooks={"after_spawn": (_watch, False)}, **options)

    circus.watcher.Watcher = Watcher


def _watch(*, arbiter: Any, pid: int, **_: object) -> bool:
    threading.Thread(target=_await_end, args=(arbiter, pid), daemon=True).start()
    return True


def _await_end(arbiter: Any, pid: int) -> None:
    """Look how a worker ended, and leave its reaping to circus, which would take up to ten seconds to see it."""
    with suppress(ChildProcessError):  # circus was first, and replaces it
        ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        if ended and ended.si_code == os.CLD_EXITED and ended.si_status:
            arbiter.loop.add_callback(_end, arbiter, ended.si_status)


def _end(arbiter: Any, status: int) -> NoReturn:
    arbiter.exit_stack.close()
    raise SystemExit(status)  # leaves the loop; circus closes its sockets on the way


def check_one_worker() -> None:
    """Raises BadOption where BentoML is configured for more: they would share a device, and each /metrics page would
    tell of one of them."""
    from bentoml._internal.configuration.containers import BentoMLContainer

    workers = BentoMLContainer.config.get().get("services", {}).get("penumbra", {}).get("workers", 1)
    if workers != 1:
        raise BadOption(f"workers is {workers!r}; a server is one worker, so start one server for each device")
