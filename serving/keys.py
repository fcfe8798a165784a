"""Who may ask: API keys with a scope, the same for HTTP and gRPC. No keys: everybody may ask everything.

A key is sent as `Authorization: Bearer KEY`, over gRPC as metadata of that name. Scopes: `infer`, and `admin`, which
may load and unload models besides. Health is open to all, for whoever restarts or routes cannot keep a secret.
"""

import hashlib
import hmac
import logging
from collections.abc import Iterator
from pathlib import Path

from penumbra.models.errors import BadOption, Forbidden, Unauthenticated

log = logging.getLogger("penumbra")

OPEN_PATHS = {"/healthz", "/livez", "/readyz", "/v2/health/live", "/v2/health/ready", "/"}
PAGE = "/playground/"
"""The page that asks its reader for a key has none itself."""
OPEN_CALLS = {
    "/inference.GRPCInferenceService/ServerLive", "/inference.GRPCInferenceService/ServerReady",
    "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch",
}  # fmt: skip
ADMIN_PATHS, ADMIN_ENDINGS = "/v2/repository/", ("/load", "/unload")
ADMIN_CALLS = {f"/inference.GRPCInferenceService/RepositoryModel{verb}" for verb in ("Load", "Unload")}
SCOPES = ("infer", "admin")
SHORTEST = 16
"""Characters; shorter keys can be guessed."""


class Keys:
    """The keys of a process, kept as digests. Truth: whether there are any."""

    def __init__(self, text: str = "") -> None:
        """text: entries `scope:key` with white space between them. Raises BadOption, never with a key in it."""
        self._digests = [(scope, _digest(key)) for scope, key in _entries(text)]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def check_path(self, path: str, authorization: str) -> None:
        """Raises Unauthenticated or Forbidden where an HTTP path is not for the bearer of this header."""
        is_admin = path.startswith(ADMIN_PATHS) and path.endswith(ADMIN_ENDINGS)
        self._check(path, authorization, is_open=path in OPEN_PATHS or path.startswith(PAGE), is_admin=is_admin)

    def check_call(self, name: str, authorization: str) -> None:
        """The same for a gRPC method, `/service/Method`."""
        self._check(name, authorization, is_open=name in OPEN_CALLS, is_admin=name in ADMIN_CALLS)

    def _check(self, what: str, authorization: str, *, is_open: bool, is_admin: bool) -> None:
        if is_open or not self._digests:
            return
        kind, _, key = authorization.strip().partition(" ")
        if kind.lower() != "bearer" or not key:
            raise Unauthenticated(f"{what[:80]} wants an API key; send the header Authorization: Bearer KEY")
        scopes = self._scopes_of(key.strip())
        if not scopes:
            raise Unauthenticated("the API key is not known; ask who runs this server for another")
        if is_admin and "admin" not in scopes:
            raise Forbidden(f"{what[:80]} is for keys of scope admin, and this one's is infer")

    def _scopes_of(self, key: str) -> set[str]:
        """Looks at every key, and at digests of one length: time tells nothing of them."""
        given = _digest(key)
        return {scope for scope, digest in self._digests if hmac.compare_digest(digest, given)}


def read_keys(text: str, file: Path | None) -> Keys:
    """The keys of the environment and of a file, in which lines that begin with # are remarks. Raises BadOption."""
    if file is not None:
        try:
            lines = file.read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise BadOption(f"the API keys in {file} cannot be read ({type(error).__name__})") from None
        text = "\n".join([text, *(line for line in lines if not line.lstrip().startswith("#"))])
        if not text.split():
            raise BadOption(f"{file} has no API keys; write one to a line, as infer:KEY")
    return Keys(text)


def warn_if_open(keys: Keys, *, model_control: bool) -> None:
    """Say at the start that there are no keys."""
    if not keys:
        also = ", load models and unload them" if model_control else ""
        log.warning(
            "NO API KEYS ARE SET: whoever reaches the ports of this server may use it%s; see docs/security.md", also
        )


def _entries(text: str) -> Iterator[tuple[str, str]]:
    for number, entry in enumerate(text.split(), 1):
        scope, _, key = entry.partition(":")
        if scope not in SCOPES or len(key) < SHORTEST:
            raise BadOption(
                f"entry {number} of the API keys is none; infer:KEY or admin:KEY with at least {SHORTEST} characters "
                "in the key is wanted"
            )
        yield scope, key


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
