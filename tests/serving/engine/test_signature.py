"""Signatures: a server that has trusted keys serves what they signed, and refuses the rest by a sentence."""

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed448, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from penumbra.models.errors import BadArtifact, BadOption
from penumbra.serving.engine.options import SegmentOptions
from penumbra.serving.engine.runtime import Tuning
from penumbra.serving.engine.segmenter import Segmenter
from penumbra.serving.engine.signature import SIGNATURE, check_signature, read_private_key, read_public_keys, sign_card
from penumbra.serving.engine.store import CARD, open_artifact, sha256_of, versions
from tests.conftest import picture
from tests.serving.server import ROOT, serving

OURS, THEIRS = (Ed25519PrivateKey.from_private_bytes(bytes([n] * 32)) for n in (1, 2))
TRUSTED = (OURS.public_key(),)
FILES = ["encode.ts", "decode.ts", "golden.safetensors"]


def public_pem(
    key: Ed25519PrivateKey | rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed448.Ed448PrivateKey,
) -> bytes:
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def private_pem(
    key: Ed25519PrivateKey | rsa.RSAPrivateKey, encryption: KeySerializationEncryption | None = None
) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption or NoEncryption())


def sign(artifact: Path, key: Ed25519PrivateKey = OURS) -> None:
    sign_card(artifact, (artifact / CARD).read_bytes(), key)


@pytest.fixture
def artifact(toy_store: Path, tmp_path: Path) -> Path:
    """A signed copy that a test may break."""
    copy = Path(shutil.copytree(toy_store / "toy-latent" / "1", tmp_path / "toy-latent" / "1"))
    sign(copy)
    return copy


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that Python opens, in order."""
    names: list[str] = []
    genuine = io.open

    def recording(file: object, *arguments: object, **options: object) -> object:
        names.append(Path(str(file)).name)
        return genuine(file, *arguments, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(io, "open", recording)
    return names


# -- artifacts -----------------------------------------------------------------------------------


def test_an_artifact_opens_for_those_who_trust_its_key_among_others(artifact: Path) -> None:
    card = open_artifact(artifact).card
    ours, theirs = OURS.public_key(), THEIRS.public_key()
    for trusted in [(ours,), (ours, theirs), (theirs, ours)]:
        assert open_artifact(artifact, trusted_keys=trusted).card == card


def test_a_flipped_bit_anywhere_in_the_card_is_noticed(artifact: Path) -> None:
    card_bytes = (artifact / CARD).read_bytes()
    check_signature(artifact, card_bytes, TRUSTED)
    for place in range(len(card_bytes)):
        changed = bytearray(card_bytes)
        changed[place] ^= 1
        with pytest.raises(BadArtifact, match="by none of the trusted keys"):
            check_signature(artifact, bytes(changed), TRUSTED)


def test_white_space_after_the_card_breaks_its_signature_though_it_says_the_same(artifact: Path) -> None:
    with (artifact / CARD).open("ab") as file:
        file.write(b"\n")
    open_artifact(artifact)
    with pytest.raises(BadArtifact, match="by none of the trusted keys"):
        open_artifact(artifact, trusted_keys=TRUSTED)


@pytest.mark.parametrize("name", FILES)
def test_a_changed_file_is_refused_with_the_old_card_and_with_one_that_names_its_new_hash(
    artifact: Path, name: str
) -> None:
    path = artifact / name
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(BadArtifact, match=f"{name} was changed after its export"):
        open_artifact(artifact, trusted_keys=TRUSTED)
    data = json.loads((artifact / CARD).read_text("utf-8"))
    data["export"]["files"][name] = sha256_of(path)
    (artifact / CARD).write_text(json.dumps(data), "utf-8")
    with pytest.raises(BadArtifact, match="by none of the trusted keys"):
        open_artifact(artifact, trusted_keys=TRUSTED)


def test_a_flipped_bit_anywhere_in_the_signature_is_noticed(artifact: Path) -> None:
    genuine = (artifact / SIGNATURE).read_bytes()
    assert len(genuine) == 64
    for place in range(8 * len(genuine)):
        changed = bytearray(genuine)
        changed[place // 8] ^= 1 << place % 8
        (artifact / SIGNATURE).write_bytes(changed)
        with pytest.raises(BadArtifact, match="by none of the trusted keys"):
            check_signature(artifact, (artifact / CARD).read_bytes(), TRUSTED)


@pytest.mark.parametrize("change", [lambda s: b"", lambda s: s[:-1], lambda s: s + b"\n", lambda s: s.hex().encode()])
def test_a_signature_of_another_length_is_none(artifact: Path, change: Callable[[bytes], bytes]) -> None:
    path = artifact / SIGNATURE
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(BadArtifact, match="by none of the trusted keys"):
        open_artifact(artifact, trusted_keys=TRUSTED)


def test_another_key_s_signature_is_refused_until_its_key_is_trusted_too(artifact: Path) -> None:
    sign(artifact, THEIRS)
    with pytest.raises(BadArtifact, match=r"toy-latent/1.*by none of the trusted keys.*penumbra sign"):
        open_artifact(artifact, trusted_keys=TRUSTED)
    open_artifact(artifact, trusted_keys=(*TRUSTED, THEIRS.public_key()))


def test_another_artifact_s_signature_is_refused(artifact: Path, toy_store: Path) -> None:
    sign_card(artifact, (toy_store / "toy-boxed" / "1" / CARD).read_bytes(), OURS)
    with pytest.raises(BadArtifact, match="by none of the trusted keys"):
        open_artifact(artifact, trusted_keys=TRUSTED)


def test_a_signed_artifact_is_not_taken_under_another_name(artifact: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(artifact, tmp_path / "toy-boxed" / "1")
    with pytest.raises(BadArtifact, match="holds toy-latent version 1"):
        open_artifact(Path(moved), trusted_keys=TRUSTED)


def test_without_a_signature_nothing_but_the_card_is_opened(artifact: Path, opened: list[str]) -> None:
    (artifact / SIGNATURE).unlink()
    with pytest.raises(BadArtifact, match=r"toy-latent/1 has no readable card\.sig.*penumbra sign"):
        open_artifact(artifact, trusted_keys=TRUSTED)
    assert opened == [CARD, SIGNATURE]


def test_the_card_is_read_once_so_what_is_parsed_is_what_was_signed(artifact: Path, opened: list[str]) -> None:
    open_artifact(artifact, trusted_keys=TRUSTED)
    assert opened[:2] == [CARD, SIGNATURE] and opened.count(CARD) == 1 and set(FILES) <= set(opened)


def test_no_trusted_key_trusts_nothing(artifact: Path) -> None:
    with pytest.raises(BadArtifact, match="by none of the trusted keys"):
        open_artifact(artifact, trusted_keys=())


def test_a_signature_is_no_file_of_the_card_and_other_users_may_read_it(artifact: Path) -> None:
    found = open_artifact(artifact)
    assert found.card.export and sorted(found.card.export.files) == sorted(FILES)
    assert versions(artifact.parent.parent) == {"toy-latent": [1]}
    assert (artifact / SIGNATURE).stat().st_mode & 0o777 == 0o644


# -- key files -----------------------------------------------------------------------------------

RSA = rsa.generate_private_key(65537, 2048)


def test_a_file_of_several_keys_with_remarks_is_read_in_order(tmp_path: Path) -> None:
    path = tmp_path / "trusted.pem"
    path.write_bytes(b"# ours\n" + public_pem(OURS) + "\n# hers: Zoë's\n".encode() + public_pem(THEIRS) + b"\n")
    assert read_public_keys(path) == (OURS.public_key(), THEIRS.public_key())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "has no public keys"),
        (b"  \n# none yet\n", "has no public keys"),
        (b"\xff\x00garbage", "has no public keys"),
        (b"-----BEGIN PUBLIC KEY-----\ngarbage\n-----END PUBLIC KEY-----\n", "key 1 of"),
        (public_pem(OURS)[:-30], "key 1 of"),
        (public_pem(RSA), "key 1 of"),
        (public_pem(ed448.Ed448PrivateKey.generate()), "key 1 of"),
        (public_pem(ec.generate_private_key(ec.SECP256R1())), "key 1 of"),
        (private_pem(OURS), "key 1 of"),
        (public_pem(OURS) + public_pem(RSA), "key 2 of"),
        (public_pem(OURS) + b"-----BEGIN PUBLIC KEY-----\n", "key 2 of"),
    ],
)
def test_a_file_that_is_not_all_ed25519_public_keys_is_refused_whole(
    tmp_path: Path, content: bytes, words: str
) -> None:
    path = tmp_path / "trusted.pem"
    path.write_bytes(content)
    with pytest.raises(BadOption, match=rf"{words} .*trusted\.pem|trusted\.pem {words}"):
        read_public_keys(path)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.pem", tmp_path):
        with pytest.raises(BadOption, match="cannot be read"):
            read_public_keys(path)


def test_a_private_key_is_ed25519_without_a_password_and_never_in_a_message(tmp_path: Path) -> None:
    path = tmp_path / "signing.pem"
    path.write_bytes(private_pem(OURS))
    assert read_private_key(path).public_key() == OURS.public_key()
    locked = private_pem(OURS, BestAvailableEncryption(b"secret"))
    for content in (b"", b"garbage", private_pem(RSA), public_pem(OURS), locked, private_pem(OURS)[:-40]):
        path.write_bytes(content)
        with pytest.raises(
            BadOption, match=r"^[\w/.-]+/signing\.pem is no Ed25519 private key without a password; [^;]+$"
        ):
            read_private_key(path)
    with pytest.raises(BadOption, match="cannot be read"):
        read_private_key(tmp_path / "absent.pem")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_openssl_s_keys_are_read_and_each_verifies_the_other_s_signature(artifact: Path, tmp_path: Path) -> None:
    def openssl(command: str) -> None:
        subprocess.run(["openssl", *command.split()], cwd=tmp_path, check=True, capture_output=True)

    openssl("genpkey -algorithm ed25519 -out signing.pem")
    openssl("pkey -in signing.pem -pubout -out trusted.pem")
    card, signature = artifact / CARD, artifact / SIGNATURE
    sign(artifact, read_private_key(tmp_path / "signing.pem"))
    openssl(f"pkeyutl -verify -rawin -pubin -inkey trusted.pem -in {card} -sigfile {signature}")
    signature.unlink()
    openssl(f"pkeyutl -sign -rawin -inkey signing.pem -in {card} -out {signature}")
    open_artifact(artifact, trusted_keys=read_public_keys(tmp_path / "trusted.pem"))


# -- engine and server ---------------------------------------------------------------------------

SIGNED, UNSIGNED, FOREIGN = "toy-pointwise", "toy-latent", "toy-boxed"


@pytest.fixture
def store(toy_store: Path, tmp_path: Path) -> Path:
    """One model signed by us, one by nobody, one by a stranger."""
    for name in (SIGNED, UNSIGNED, FOREIGN):
        shutil.copytree(toy_store / name, tmp_path / "store" / name)
    sign(tmp_path / "store" / SIGNED / "1")
    sign(tmp_path / "store" / FOREIGN / "1", THEIRS)
    return tmp_path / "store"


def test_of_a_store_the_signed_model_is_served_and_the_others_are_refused(
    store: Path, rng: np.random.Generator, caplog: pytest.LogCaptureFixture
) -> None:
    image = picture(rng, 20, 30)
    with Segmenter.open(store, threads=1, device="cpu", tuning=Tuning(1, 1), trusted_keys=TRUSTED) as segmenter:
        assert [card.name for card in segmenter.cards()] == [SIGNED]
        assert segmenter.segment(image, SegmentOptions(model=SIGNED)).labels_HW.shape == (20, 30)
        assert "has no readable card.sig" in segmenter.refused[UNSIGNED]
        assert "by none of the trusted keys" in segmenter.refused[FOREIGN]
        assert segmenter.refused.keys() == {UNSIGNED, FOREIGN}
        for name, reason in segmenter.refused.items():  # the log has the path, which callers are not shown
            assert str(store) not in reason
            assert f"not served: {reason.replace(f'{name}/1', str(store / name / '1'), 1)}" in caplog.text
        with pytest.raises(BadArtifact, match=r"has no readable card\.sig"):
            segmenter.load(store / UNSIGNED / "1")
        sign(store / UNSIGNED / "1")
        assert segmenter.load(store / UNSIGNED / "1").name == UNSIGNED


def test_without_trusted_keys_signatures_are_not_asked_for(store: Path) -> None:
    with Segmenter.open(store, threads=1, device="cpu", tuning=Tuning(1, 1)) as segmenter:
        assert {card.name for card in segmenter.cards()} == {SIGNED, UNSIGNED, FOREIGN} and not segmenter.refused


@pytest.mark.slow
def test_a_server_loads_a_model_once_it_is_signed(store: Path, tmp_path: Path) -> None:
    trusted = tmp_path / "trusted.pem"
    trusted.write_bytes(public_pem(OURS))
    settings = {"model_control": True, "trusted_keys_file": trusted, "predrain_s": 0}
    with serving(store, tmp_path, **settings) as server, server.client() as client:
        states = {entry["name"]: entry["state"] for entry in client.post("/v2/repository/index").json()}
        assert states == {SIGNED: "READY", UNSIGNED: "UNAVAILABLE", FOREIGN: "UNAVAILABLE"}
        for name, words in ((UNSIGNED, "no readable card.sig"), (FOREIGN, "by none of the trusted keys")):
            refused = client.post(f"/v2/repository/models/{name}/load", json={})
            assert refused.status_code == httpx.codes.INTERNAL_SERVER_ERROR and words in refused.json()["error"]
        sign(store / UNSIGNED / "1")
        assert client.post(f"/v2/repository/models/{UNSIGNED}/load", json={}).status_code == httpx.codes.OK


def test_a_key_file_without_keys_stops_the_start(tmp_path: Path) -> None:
    empty = tmp_path / "trusted.pem"
    empty.touch()
    done = subprocess.run(
        [sys.executable, "-c", "import serving.service"], cwd=ROOT, env={"PENUMBRA_TRUSTED_KEYS_FILE": str(empty)},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode != 0 and "trusted.pem has no public keys" in done.stderr
