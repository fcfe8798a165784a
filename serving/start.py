"""What `penumbra serve` makes sure of before anything is loaded: settings, keys, ports and a place of its own."""

import errno
import ipaddress
import os
import socket
import stat
from pathlib import Path

from penumbra.models.errors import BadOption
from penumbra.serving.engine.signature import PublicKeys, read_public_keys
from penumbra.serving.keys import Keys, read_keys
from penumbra.serving.settings import PREFIX, Settings, read_settings


def check_settings() -> tuple[Settings, Keys, PublicKeys | None]:
    """The settings, and what is in the files of keys that they name. Raises BadOption."""
    settings = read_settings()
    keys = read_keys(settings.api_keys.get_secret_value(), settings.api_keys_file)
    return settings, keys, read_public_keys(settings.trusted_keys_file) if settings.trusted_keys_file else None


def paths_of(settings: Settings) -> dict[str, str]:
    """The variables that name files, as they are to be read in any directory; the server works in another than its
    caller."""
    named = {name: getattr(settings, name) for name in settings.model_fields_set}
    return {f"{PREFIX}{name.upper()}": str(path.absolute()) for name, path in named.items() if isinstance(path, Path)}


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
            raise BadOption(_why_not(error, host, f"{option} is {port}")) from None
    return f"{host}:{port}" if version == 4 else f"[{host}]:{port}"


def _why_not(error: OSError, host: str, said: str) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"{said}, which another process has on {host}; end that one, or give another {said.split()[0]}"
    if error.errno == errno.EACCES:
        return f"{said}, which is the system's; give one from 1024 on"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"--host is {host}, which is no address of this machine; 127.0.0.1 is, and 0.0.0.0 is all of them"
    return f"{said}, which cannot be had on {host} ({error.strerror}); give another --host"


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
