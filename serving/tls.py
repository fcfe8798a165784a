"""The server's certificate, for both protocols: who starts them asks for the newest one at every new connection."""

import ssl
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from cryptography import x509

from penumbra.models.errors import BadOption
from penumbra.serving.following import Followed


@dataclass(frozen=True, slots=True)
class Certificate:
    """A certificate with its key. context: for HTTP. key, chain: for gRPC, in PEM. ends: in seconds since 1970."""

    context: ssl.SSLContext = field(compare=False)
    key: bytes
    chain: bytes
    ends: float


def follow_certificate(cert: Path | None, key: Path | None) -> Followed[Certificate] | None:
    """Follow the files of a certificate; None without any. Raises BadOption."""
    if cert is None and key is None:
        return None
    if cert is None or key is None:
        present, absent = ("KEY", "CERT") if cert is None else ("CERT", "KEY")
        raise BadOption(f"PENUMBRA_TLS_{present} is set and PENUMBRA_TLS_{absent} is not; TLS needs both")
    return Followed(partial(read_certificate, cert, key), cert, key)


def read_certificate(cert: Path, key: Path) -> Certificate:
    """Read a chain of certificates, the server's own first, and its key. Raises BadOption for two that do not match,
    and for a certificate that is not valid now."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        pem = key.read_bytes(), cert.read_bytes()
        own = x509.load_pem_x509_certificate(pem[1])
        context.load_cert_chain(cert, key, password="")  # else OpenSSL would ask the terminal for one
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise BadOption(
                f"{key} is not the key of the certificate in {cert}; name the one it was made for"
            ) from None
        raise BadOption(f"{key} is no key for TLS ({error.reason}); PEM without a password is wanted") from None
    except OSError as error:
        raise BadOption(f"{error.filename} cannot be read ({error.strerror}); TLS needs a file that can") from None
    except ValueError:
        raise BadOption(f"{cert} is no certificate; PEM is wanted, the server's own first") from None
    begin, end = own.not_valid_before_utc, own.not_valid_after_utc
    if not begin <= datetime.now(UTC) <= end:
        raise BadOption(f"the certificate in {cert} is valid from {begin:%F} to {end:%F}, and not now; renew it")
    return Certificate(context, *pem, end.timestamp())


def context_of(certificate: Followed[Certificate]) -> ssl.SSLContext:
    """Make a context whose new connections get the newest certificate; those that are open keep theirs."""

    def choose(connection: Any, *_: object) -> None:
        connection.context = certificate.now().context

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.sni_callback = choose  # OpenSSL calls it for every handshake, with a server name or without
    return context
