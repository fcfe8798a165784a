"""The server's process: which build it is, what it refuses before anything is loaded, how it logs, and how it ends.

BentoML's supervisor by itself starts any worker that ended once more. Here a worker that is killed is replaced, and
one that gives up (`give_up`, or any other exit with a status) ends the server: the next one would find the same store,
port or device.
"""

import ctypes
import errno
import fcntl
import ipaddress
import json
import logging
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from contextlib import ExitStack, suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal, NoReturn

import click

from penumbra.models.errors import BadArtifact, BadOption
from penumbra.serving import VERSION

log = logging.getLogger("penumbra")

ROOT = Path(__file__).resolve().parents[1]
PR_SET_PDEATHSIG = 1
"""The option's number in <linux/prctl.h>."""
TEXT = logging.Formatter("%(asctime)s [%(levelname)s] [%(name)s] %(message)s", "%Y-%m-%dT%H:%M:%S%z")
"""The form of a line of text. BentoML's own appends a trace to every line, though nobody keeps it."""


def build_facts(revision: str) -> dict[str, str]:
    """`version`, and `commit` where it is known: an image says which it was made from (PENUMBRA_REVISION), else the
    checkout does."""
    if not revision and (ROOT / ".git").exists():
        with suppress(OSError, subprocess.SubprocessError):
            command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
            revision = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    return {"version": VERSION} | ({"commit": revision} if revision else {})


def print_version(context: click.Context, _: click.Parameter, requested: bool) -> None:
    """Answer `penumbra --version`."""
    if requested and not context.resilient_parsing:
        facts = build_facts(os.environ.get("PENUMBRA_REVISION", ""))
        click.echo("penumbra, " + ", ".join(f"{name} {fact}" for name, fact in facts.items()))
        context.exit()


def check_port(host: str, port: int, option: str) -> str:
    """The address `host:port`, which this process could listen on now. Raises BadOption that names the option."""
    try:
        version = ipaddress.ip_address(host).version
    except ValueError:
        raise BadOption(
            f"--host is {host[:60]!r}; an IP address is wanted: 127.0.0.1 for this machine alone, 0.0.0.0 for all"
        ) from None
    with socket.socket(socket.AF_INET if version == 4 else socket.AF_INET6) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # else one that was closed just now counts
        try:
            probe.bind((host, port))
        except OSError as error:
            reasons = {
                errno.EADDRINUSE: f"{option} is {port}, which another process has on {host}; end that one, or give "
                f"another {option}",
                errno.EACCES: f"{option} is {port}, which is the system's; give one from 1024 on",
                errno.EADDRNOTAVAIL: f"--host is {host}, which is no address of this machine; 127.0.0.1 is, and "
                "0.0.0.0 is all of them",
            }
            other = f"{option} is {port}, which cannot be had on {host} ({error.strerror}); give another --host"
            raise BadOption(reasons.get(error.errno or 0, other)) from None
    return f"{host}:{port}" if version == 4 else f"[{host}]:{port}"


def own_directory(path: Path) -> Path:
    """A directory of this user alone, made where it is missing; others could read there, and write what is trusted.

    Raises BadOption where the name is taken by anything else.
    """
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        found = path.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
            raise BadOption(
                f"{path} is there and no directory of this user alone; remove it, or name another place for temporary "
                "files in TMPDIR"
            ) from None
    return path


def lock(directory: Path) -> IO[bytes]:
    """Make the directory this process's own for as long as the file is open. Raises BadArtifact."""
    with ExitStack() as undo:
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            file = undo.enter_context((directory / "lock").open("ab"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise BadArtifact(
                f"jobs cannot be kept in {directory} ({error.strerror}); name a directory of this server alone in "
                "PENUMBRA_JOBS"
            ) from None
        undo.pop_all()
        return file


class JsonLines(logging.Formatter):
    """A line is one JSON object; what a record brings as `fields` stands beside its time, level and logger."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = {"time": time, "level": record.levelname, "logger": record.name}
        line |= getattr(record, "fields", None) or {"message": record.getMessage()}
        if record.exc_info:
            line["stack"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)  # also of names that are no UTF-8


def set_up_logs(form: Literal["text", "json"], *, framework: str) -> None:
    """Change the form of every log line of this process, and drop those that `is_ours` finds to be none."""
    for handler in logging.getLogger().handlers:
        handler.addFilter(partial(is_ours, framework=framework))
        handler.setFormatter(JsonLines() if form == "json" else TEXT)


def is_ours(record: logging.LogRecord, *, framework: str) -> bool:
    """Whether a record says more than the request's own line does: the loggers of the framework write the stack, and in
    it what was sent, of every request to its typed route that its caller got wrong."""
    from pydantic import ValidationError  # the command line can do without, and it takes a while

    error = record.exc_info[1] if record.exc_info else None
    is_callers = isinstance(error, ValidationError) or getattr(error, "error_code", 500) < 500
    return not (record.name.startswith(framework) and is_callers)


def give_up(reason: str) -> NoReturn:
    """End a worker that has taken no work yet, from any of its threads, and with it the server."""
    log.error("the server cannot start: %s", reason)
    logging.shutdown()
    os._exit(1)


def end_with_parent(number: int = signal.SIGTERM) -> None:
    """Get a signal when the supervisor dies: a worker without one would keep the ports from the next server."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


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
