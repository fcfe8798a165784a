"""Signatures of artifacts: whose they are, so that a server can serve only what keys its owner trusts have signed.

`card.sig` beside a card is the Ed25519 signature (RFC 8032, 64 bytes) of the card's exact bytes. The card holds the
SHA-256 of every other file, so it covers the artifact.
"""

import os
from contextlib import suppress
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

from penumbra.models.errors import BadArtifact, BadOption
from penumbra.models.files import write_whole

SIGNATURE = "card.sig"
SIGNATURE_BYTES = 64
BEGIN = b"-----BEGIN "
"""What every key in a PEM file begins with; other text is a remark."""

PublicKeys = tuple[Ed25519PublicKey, ...]


def sign_card(directory: Path, card_bytes: bytes, key: Ed25519PrivateKey) -> Path:
    """Write the signature of an artifact's card beside it; returns its file."""
    path = directory / SIGNATURE
    if os.path.lexists(path) and not (path.is_file() and path.stat().st_size == SIGNATURE_BYTES):
        raise BadOption(f"{path} is in the way, and is no signature; move it away")
    write_whole(path, key.sign(card_bytes))
    path.chmod(0o644)  # as the artifact's other files: servers have other users
    return path


def check_signature(directory: Path, card_bytes: bytes, trusted_keys: PublicKeys) -> None:
    """Hold the bytes of a card against the signature beside it. Raises BadArtifact: none, or by none of these keys."""
    try:
        signature = (directory / SIGNATURE).read_bytes()
    except OSError:
        raise BadArtifact(
            f"{directory} has no readable {SIGNATURE} and must be signed by a trusted key; `penumbra sign` signs it"
        ) from None
    for key in trusted_keys:
        with suppress(InvalidSignature):
            return key.verify(signature, card_bytes)
    raise BadArtifact(
        f"{directory} as it is was signed by none of the trusted keys; have one sign it again with `penumbra sign`"
    )


def read_public_keys(path: Path) -> PublicKeys:
    """Read the Ed25519 keys of a PEM file. Raises BadOption: unreadable, without keys, or with any other."""
    blocks = _read(path).split(BEGIN)[1:]
    if not blocks:
        raise BadOption(f"{path} has no public keys; `openssl pkey -in signing.pem -pubout` writes one")
    return tuple(_public_key(BEGIN + block, f"key {number} of {path}") for number, block in enumerate(blocks, 1))


def _public_key(pem: bytes, what: str) -> Ed25519PublicKey:
    try:
        key = load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PublicKey):
        raise BadOption(f"{what} is no Ed25519 public key; `openssl pkey -in signing.pem -pubout` writes one")
    return key


def read_private_key(path: Path) -> Ed25519PrivateKey:
    """Read the key that signs from a PEM file without a password. Raises BadOption, never with the key in it."""
    try:
        key = load_pem_private_key(_read(path), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise BadOption(
            f"{path} is no Ed25519 private key without a password; `openssl genpkey -algorithm ed25519` makes one"
        )
    return key


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadOption(f"the key file {path} cannot be read ({error.strerror}); name one that can") from None
