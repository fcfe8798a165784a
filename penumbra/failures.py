"""How a verb ends when it fails: one sentence on stderr and exit code 1, or 2 where the command line was wrong."""

import errno
import io
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import click

from penumbra.models.errors import BadOption, DiskFull, PenumbraError, UnknownModel

REMEDIES = {
    errno.ENOSPC: "make room there, or name another place",
    errno.EDQUOT: "make room there, or name another place",
    errno.EFBIG: "allow larger files there, or name another place",
    errno.EACCES: "ask for leave, or name another place",
    errno.EPERM: "ask for leave, or name another place",
    errno.EROFS: "name a place that can be written",
    errno.ENOENT: "name one that is there",
    errno.EEXIST: "it is in the way; move it, or name another place",
    errno.ENOTDIR: "a directory is wanted there; move the file, or name another place",
    errno.EISDIR: "a file is wanted there; move the directory, or name another place",
    errno.ENOTEMPTY: "it is in the way; move it, or name another place",
    errno.ENAMETOOLONG: "name a shorter one",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
}
"""What would be right where the system refuses a file, by its number for that."""

AGAIN_S = 5.0
"""Time for the way out, which removes some files."""


class Verbs(click.Group):
    """Verbs in the order of the work. What a user can be told of is told in a sentence; anything else is a bug."""

    def list_commands(self, _: click.Context) -> list[str]:
        return list(self.commands)

    def main(self, *arguments: Any, **options: Any) -> Any:
        signal.signal(signal.SIGTERM, end)
        open_streams()
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # a name that the terminal cannot show is no reason to fail
                stream.reconfigure(errors="backslashreplace")
        try:
            return super().main(*arguments, **options)
        except (PenumbraError, OSError, ModuleNotFoundError) as error:
            if isinstance(error, ModuleNotFoundError) and (error.name or "penumbra").startswith("penumbra"):
                raise
            with suppress(OSError):  # where stderr is what cannot be written
                click.echo(f"penumbra: {' '.join(sentence_of(error).split())}", err=True)
            sys.exit(2 if isinstance(error, (BadOption, UnknownModel)) else 1)
        finally:
            _let_go(sys.stdout)
            _let_go(sys.stderr)


def end(*_: object) -> None:
    """End a verb on SIGTERM by its own way out, which removes drafts; and again, should a library have swallowed it."""
    signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, AGAIN_S)
    sys.exit(128 + signal.SIGTERM)


def open_streams() -> None:
    """Give a process that was started without one of the three streams, as `>&-` does, the null device in its place.

    Else the next file or socket that it opens, or that a program in its place does, would have the stream's number.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            stream = Path(os.devnull).open("r+")  # noqa: SIM115 (open for as long as the process is)
            os.set_inheritable(stream.fileno(), True)
            setattr(sys, name, stream)


def sentence_of(error: PenumbraError | OSError | ModuleNotFoundError) -> str:
    """What was refused, and what would be right; of an answer's file by its name, which is no secret here."""
    if isinstance(error, DiskFull) and isinstance(error.__cause__, OSError):
        error = error.__cause__
    if isinstance(error, ModuleNotFoundError):
        from penumbra.serving.engine.backends import EXTRAS

        extra = EXTRAS.get(error.name or "", "training")
        return f"the package {error.name} is not installed; pip install 'penumbra-serving[{extra}]' brings it"
    if isinstance(error, PenumbraError) or error.errno is None or error.strerror is None:
        return str(error) or f"a file cannot be used ({type(error).__name__})"
    where = error.filename2 or error.filename
    what = os.fsdecode(where) if isinstance(where, (str, bytes)) else "the output, or a file of it, cannot be written"
    return "; ".join(filter(None, (f"{what}: {error.strerror.lower()}", REMEDIES.get(error.errno))))


def _let_go(stream: IO[str] | None) -> None:
    """Drop what a stream could not write: the interpreter would fail on it once more at its end."""
    try:
        if stream:
            stream.flush()
    except OSError:
        assert stream
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
