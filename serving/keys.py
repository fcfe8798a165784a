"""Who may ask, and how often: API keys with a scope, a name and a rate, the same for HTTP and gRPC. No keys: everybody
may ask everything.

A key is sent as `Authorization: Bearer KEY`, over gRPC as metadata of that name. Scopes: `metrics` may read /metrics
and nothing else; `infer` may do all but what is the administrator's; `admin` may load, unload and promote models
besides. Health is open to all, for whoever restarts or routes cannot keep a secret. A file of keys is followed while
the server runs.
"""

import hashlib
import hmac
import math
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from penumbra.models.errors import BadOption, Forbidden, RateExceeded, Unauthenticated
from penumbra.serving.following import Followed

HEALTH = dict.fromkeys(("/healthz", "/livez", "/v2/health/live"), "live")
HEALTH |= dict.fromkeys(("/readyz", "/v2/health/ready"), "ready")
"""Paths of health, each with what it says of the server."""
OPEN_PATHS = {*HEALTH, "/"}
PAGE = "/playground/"
"""The page that asks its reader for a key has none itself."""
SERVICE = "inference.GRPCInferenceService"
OPEN_CALLS = {
    f"/{SERVICE}/ServerLive", f"/{SERVICE}/ServerReady", "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch",
}  # fmt: skip
ADMIN_PATHS = re.compile(r"/+v2/+repository/.*/(load|unload|promote)/*\s*", re.DOTALL)
"""Whatever a router might take for the administrator's, also with slashes too many or a line's end behind it."""
ADMIN_CALLS = {f"/{SERVICE}/RepositoryModel{verb}" for verb in ("Load", "Unload")}
METRICS_PATH = "/metrics"
STREAM = f"/{SERVICE}/ModelStreamInfer"
"""The call of many requests: the first is its own, and of each other one the rate is asked again."""
SHORTEST = 16
"""The fewest characters of a key; shorter ones can be guessed."""
OWNER = re.compile(r"(infer|admin|metrics)(?:@([A-Za-z0-9_.-]{1,64}))?(?:=([1-9]\d{0,8})/(s|min|h))?")
"""Scope, name and rate, which stand before a key; the log shows the name as it is."""
UNITS_S = {"s": 1, "min": 60, "h": 3600}


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry: what its key may do, what the log calls its bearer, the key's digest, and its rate: so many requests
    in so many seconds. 0 requests are no limit."""

    scope: str
    name: str
    digest: bytes
    requests: int
    within_s: int


class Keys:
    """The keys of a process, kept as digests. It is true where there are any. They are asked in one thread."""

    def __init__(self, text: str = "", file: Path | None = None) -> None:
        """text: entries `scope:key`, `scope@name:key` or `scope@name=10/s:key` with white space between them. file: has
        more of them, and is followed. Raises BadOption, never with a key in it."""
        self._followed = Followed(lambda: list(_entries(_with_file(text, file))), *([file] if file else []))
        self._free: dict[bytes, float] = {}
        """Digest -> when all of a key's requests so far are paid for, by `time.monotonic`."""

    def __bool__(self) -> bool:
        return bool(self._followed.now())

    def check(self, name: str, authorization: str) -> str:
        """Return the name of the bearer of this header, empty for nobody's. name: an HTTP path, or a gRPC method as
        `/service/Method`. Raises Unauthenticated, Forbidden where it is not for them, and RateExceeded."""
        entries = self._followed.now()
        if name in OPEN_PATHS or name in OPEN_CALLS or name.startswith(PAGE) or not entries:
            return ""
        is_admin = name in ADMIN_CALLS or ADMIN_PATHS.fullmatch(name)
        scopes = {"admin"} if is_admin else {"admin", "infer"} | ({"metrics"} if name == METRICS_PATH else set())
        kind, _, key = authorization.strip().partition(" ")
        if kind.lower() != "bearer" or not key:
            raise Unauthenticated(f"{name[:80]} wants an API key; send the header Authorization: Bearer KEY")
        given = _digest(key.strip())
        # Every entry is looked at, and digests have one length: time tells nothing of them.
        owned = [entry for entry in entries if hmac.compare_digest(entry.digest, given)]
        if not owned:
            raise Unauthenticated("the API key is not known; ask who runs this server for another")
        allowed = next((entry for entry in owned if entry.scope in scopes), None)
        if allowed is None:
            needed, own = (" or ".join(sorted(s)) for s in (scopes, {entry.scope for entry in owned}))
            raise Forbidden(f"{name[:80]} is for keys of scope {needed}, and this one's is {own}", owned[0].name)
        if allowed.requests:
            self._spend(allowed)
        return allowed.name

    def _spend(self, entry: Entry) -> None:
        """Let a request count against its key's rate. Raises RateExceeded.

        The generic cell rate algorithm (ITU-T I.371): a request takes `within_s / requests`, and as many as are allowed
        within that time may come at once.
        """
        now = time.monotonic()
        free = max(now, self._free.get(entry.digest, now)) + entry.within_s / entry.requests
        if (wait_s := free - now - entry.within_s) > 1e-9:
            after_s = math.ceil(wait_s)
            raise RateExceeded(
                f"the key {entry.name} may make {entry.requests} requests in {entry.within_s} s, and has; try again in "
                f"{after_s} s", retry_after_s=after_s, caller=entry.name,
            )  # fmt: skip
        self._free[entry.digest] = free


def _with_file(text: str, file: Path | None) -> str:
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
    return text


def _entries(text: str) -> Iterator[Entry]:
    for number, entry in enumerate(text.split(), 1):
        owner, _, key = entry.partition(":")
        known = OWNER.fullmatch(owner)
        if not known or len(key) < SHORTEST or not key.isascii():
            raise BadOption(
                f"entry {number} of the API keys is none; infer:KEY, admin:KEY or metrics:KEY, or one with a name and "
                f"a rate as infer@NAME=10/s:KEY, with at least {SHORTEST} ASCII characters in the key, only letters, "
                "digits, dots, - and _ in the name, and /s, /min or /h in the rate is wanted"
            )
        scope, name, requests, unit = known.groups()
        yield Entry(scope, name or f"{scope}-{number}", _digest(key), int(requests or 0), UNITS_S[unit or "s"])


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
