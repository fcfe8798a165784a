"""Who may ask: API keys with a scope and a name, the same for HTTP and gRPC. No keys: everybody may ask everything.

A key is sent as `Authorization: Bearer KEY`, over gRPC as metadata of that name. Scopes: `metrics` may read /metrics
and nothing else; `infer` may do all but what is the administrator's; `admin` may load and unload models besides. Health
is open to all, for whoever restarts or routes cannot keep a secret.
"""

import hashlib
import hmac
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from penumbra.models.errors import BadOption, Forbidden, Unauthenticated

log = logging.getLogger("penumbra")

OPEN_PATHS = {"/healthz", "/livez", "/readyz", "/v2/health/live", "/v2/health/ready", "/"}
PAGE = "/playground/"
"""The page that asks its reader for a key has none itself."""
SERVICE = "inference.GRPCInferenceService"
OPEN_CALLS = {
    f"/{SERVICE}/ServerLive", f"/{SERVICE}/ServerReady", "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch",
}  # fmt: skip
ADMIN_PATHS, ADMIN_ENDINGS = "/v2/repository/", ("/load", "/unload")
ADMIN_CALLS = {f"/{SERVICE}/RepositoryModel{verb}" for verb in ("Load", "Unload")}
METRICS_PATH = "/metrics"
SCOPES = ("infer", "admin", "metrics")
SHORTEST = 16
"""The fewest characters of a key; shorter ones can be guessed."""
NAME = r"(@[A-Za-z0-9_.-]{1,64})?"
"""What may follow a scope; the log shows it as it is."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry: what its key may do, what the log calls its bearer, and the key's digest."""

    scope: str
    name: str
    digest: bytes


class Keys:
    """The keys of a process, kept as digests. It is true where there are any."""

    def __init__(self, text: str = "") -> None:
        """text: entries `scope:key` or `scope@name:key` with white space between them. Raises BadOption, never with a
        key in it."""
        self._entries = list(_entries(text))

    def __bool__(self) -> bool:
        return bool(self._entries)

    def check_path(self, path: str, authorization: str) -> str:
        """The name of the bearer of this header, empty for nobody's. Raises Unauthenticated or Forbidden where the HTTP
        path is not for them."""
        is_admin = path.startswith(ADMIN_PATHS) and path.endswith(ADMIN_ENDINGS)
        scopes = {"admin"} if is_admin else {"admin", "infer"} | ({"metrics"} if path == METRICS_PATH else set())
        return self._check(path, authorization, scopes, is_open=path in OPEN_PATHS or path.startswith(PAGE))

    def check_call(self, name: str, authorization: str) -> str:
        """The same for a gRPC method, `/service/Method`."""
        scopes = {"admin"} if name in ADMIN_CALLS else {"admin", "infer"}
        return self._check(name, authorization, scopes, is_open=name in OPEN_CALLS)

    def _check(self, what: str, authorization: str, scopes: set[str], *, is_open: bool) -> str:
        if is_open or not self._entries:
            return ""
        kind, _, key = authorization.strip().partition(" ")
        if kind.lower() != "bearer" or not key:
            raise Unauthenticated(f"{what[:80]} wants an API key; send the header Authorization: Bearer KEY")
        owned = self._entries_of(key.strip())
        if not owned:
            raise Unauthenticated("the API key is not known; ask who runs this server for another")
        for entry in owned:
            if entry.scope in scopes:
                return entry.name
        needed, own = (" or ".join(sorted(s)) for s in (scopes, {entry.scope for entry in owned}))
        raise Forbidden(f"{what[:80]} is for keys of scope {needed}, and this one's is {own}")

    def _entries_of(self, key: str) -> list[Entry]:
        """The entries of a key. Every one is looked at, and digests have one length: time tells nothing of them."""
        given = _digest(key)
        return [entry for entry in self._entries if hmac.compare_digest(entry.digest, given)]


def read_keys(text: str, file: Path | None) -> Keys:
    """The keys of the environment and of a file, in which lines that begin with # are remarks. Raises BadOption."""
    if file is not None:
        try:
            lines = file.read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8"
            raise BadOption(f"the API keys in {file} cannot be read ({reason}); name a file that can") from None
        text = "\n".join([text, *(line for line in lines if not line.lstrip().startswith("#"))])
        if not text.split():
            raise BadOption(f"{file} has no API keys; write one to a line, as infer:KEY")
    return Keys(text)


def warn_if_open(keys: Keys, *, model_control: bool) -> None:
    """Say at the start that there are no keys."""
    if not keys:
        also = ", load models and unload them" if model_control else ""
        log.warning(
            "NO API KEYS ARE SET: whoever reaches the ports of this server may use it%s; see docs/operate/security.md",
            also,
        )


def _entries(text: str) -> Iterator[Entry]:
    for number, entry in enumerate(text.split(), 1):
        owner, _, key = entry.partition(":")
        scope, _, name = owner.partition("@")
        if scope not in SCOPES or len(key) < SHORTEST or not re.fullmatch(NAME, owner.removeprefix(scope)):
            raise BadOption(
                f"entry {number} of the API keys is none; infer:KEY, admin:KEY or metrics:KEY, or one with a name as "
                f"infer@NAME:KEY, with at least {SHORTEST} characters in the key and only letters, digits, dots, - and "
                "_ in the name is wanted"
            )
        yield Entry(scope, name or f"{scope}-{number}", _digest(key))


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
