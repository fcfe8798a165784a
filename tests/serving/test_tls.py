"""TLS: one certificate for both protocols, followed while the server runs; a bad one is refused in one sentence."""

import datetime
import ipaddress
import json
import os
import re
import ssl
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import grpc
import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from penumbra_client import Client, Unavailable
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from penumbra.models.errors import BadOption
from penumbra.serving.tls import follow_certificate, read_certificate
from tests.serving.http.asking import PNG
from tests.serving.server import ROOT, Server, free_port, starting, until
from tests.test_cli import failed, run

NOW = datetime.datetime.now(datetime.UTC)
DAY = datetime.timedelta(days=1)
END = (NOW + 3 * DAY).replace(microsecond=0)


def make(place: Path, *, end: datetime.datetime = NOW + DAY, password: bytes = b"") -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that signs itself, and its key, written beside their places and moved there."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "penumbra")])
    address = x509.IPAddress(ipaddress.IPv4Address("127.0.0.1"))
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(x509.random_serial_number()).not_valid_before(NOW - 9 * DAY).not_valid_after(end)
    builder = builder.add_extension(x509.SubjectAlternativeName([address]), critical=False)
    certificate = builder.add_extension(x509.BasicConstraints(True, 0), critical=True).sign(key, hashes.SHA256())
    locked = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, locked)
    place.mkdir(exist_ok=True)
    files = place / "tls.crt", place / "tls.key"
    for file, pem in zip(files, (certificate.public_bytes(serialization.Encoding.PEM), private), strict=True):
        beside = file.with_suffix(".new")
        beside.write_bytes(pem)
        os.replace(beside, file)
    return files


def test_a_certificate_that_cannot_be_used_is_one_sentence_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cert, key = make(tmp_path / "good")
    other = make(tmp_path / "other")[1]
    late = make(tmp_path / "late", end=NOW - DAY)
    locked = make(tmp_path / "locked", password=b"secret-0123")
    (tmp_path / "text").write_text("no PEM")
    cases: list[tuple[Path | None, Path | None, str]] = [
        (cert, None, "PENUMBRA_TLS_CERT is set and PENUMBRA_TLS_KEY is not; TLS needs both"),
        (None, key, "PENUMBRA_TLS_KEY is set and PENUMBRA_TLS_CERT is not; TLS needs both"),
        (cert, other, f"{other} is not the key of the certificate in {cert}; name the one it was made for"),
        (tmp_path / "gone", key, f"{tmp_path / 'gone'} cannot be read (No such file or directory); TLS needs a file"),
        (cert, tmp_path, f"{tmp_path} cannot be read (Is a directory)"),
        (tmp_path / "text", key, "text is no certificate; PEM is wanted, the server's own first"),
        (cert, tmp_path / "text", "text is no key for TLS ("),
        (*locked, "tls.key is no key for TLS ("),
        (*late, f"the certificate in {late[0]} is valid from {NOW - 9 * DAY:%F} to {NOW - DAY:%F}, and not now; renew"),
    ]
    for cert_file, key_file, sentence in cases:
        with pytest.raises(BadOption) as refusal:
            follow_certificate(cert_file, key_file)
        assert sentence in str(refusal.value) and "\n" not in str(refusal.value)
    assert follow_certificate(None, None) is None
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("PENUMBRA_TLS_CERT", str(cert))
    failed(run("serve", "--store", tmp_path / "store", "--port", free_port()), 2, "PENUMBRA_TLS_KEY is not")
    assert not (tmp_path / "store").exists()
    assert read_certificate(cert, key).chain == cert.read_bytes()


def trusting(cert: bytes) -> ssl.SSLContext:
    return ssl.create_default_context(cadata=cert.decode())


@pytest.fixture(scope="module")
def secure(toy_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("secure")
    cert, key = make(directory / "tls")
    with starting(toy_store, directory, tls_cert=cert, tls_key=key, predrain_s=0) as plain:
        server = replace(plain, url=plain.url.replace("http:", "https:"))
        verify = trusting(cert.read_bytes())

        def is_ready() -> bool:
            assert server.process.poll() is None, f"the server ended:\n{server.log.read_text()}"
            try:
                return httpx.get(f"{server.url}/readyz", verify=verify, trust_env=False, timeout=5).is_success
            except httpx.TransportError:
                return False

        until(is_ready)
        yield server


def is_answered(server: Server, cert: bytes) -> bool:
    """Whether a new connection gets an answer under this certificate."""
    try:
        return httpx.get(f"{server.url}/livez", verify=trusting(cert), trust_env=False, timeout=30).is_success
    except httpx.ConnectError:  # its verification failed
        return False


def asked(client: httpx.Client) -> int:
    headers = {"Content-Type": "image/png"}
    return client.post("/segment?model=toy-latent", content=PNG, headers=headers).status_code


def is_live(channel: grpc.Channel) -> bool:
    stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
    return bool(stub.ServerLive(pb.ServerLiveRequest(), timeout=30).live)


def test_both_protocols_are_encrypted_and_a_new_certificate_is_taken_while_connections_stay(secure: Server) -> None:
    files = secure.log.parent / "tls"
    old = (files / "tls.crt").read_bytes()
    with httpx.Client(base_url=secure.url, verify=trusting(old), trust_env=False, timeout=60) as client:
        assert asked(client) == 200
        with grpc.secure_channel(secure.grpc_address, grpc.ssl_channel_credentials(old)) as channel:
            assert is_live(channel)
            make(files, end=END)
            new = (files / "tls.crt").read_bytes()

            until(lambda: is_answered(secure, new), bound_s=30)
            assert asked(client) == 200 and is_live(channel), "the connections that were open go on"
            assert not is_answered(secure, old)
        with grpc.secure_channel(secure.grpc_address, grpc.ssl_channel_credentials(new)) as channel:
            assert is_live(channel)
    page = httpx.get(f"{secure.url}/metrics", verify=trusting(new), trust_env=False).text
    (ends,) = re.findall(r"^penumbra_tls_not_after_seconds (.*)$", page, re.MULTILINE)
    assert float(ends) == END.timestamp()
    (files / "tls.key").write_text("half of a")  # as while one of the two is written
    until(lambda: is_answered(secure, new) and "no key for TLS" in secure.log.read_text(), bound_s=30)
    assert is_answered(secure, new), "the certificate before it stays"


def test_the_python_client_trusts_an_issuer_that_the_environment_names(
    secure: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Client(secure.url) as client, pytest.raises(Unavailable):
        client.models()
    monkeypatch.setenv("SSL_CERT_FILE", str(secure.log.parent / "tls" / "tls.crt"))
    with Client(secure.url) as client:
        assert "toy-latent" in {model.name for model in client.models()}


def test_the_images_health_check_speaks_tls_where_the_server_does(secure: Server) -> None:
    dockerfile = (ROOT / "deploy" / "docker" / "Dockerfile").read_text()
    command = json.loads(dockerfile.split("HEALTHCHECK ")[1].split("CMD ")[1].splitlines()[0])
    command = [sys.executable, *(word.replace(":3000/", f":{secure.url.rpartition(':')[2]}/") for word in command[1:])]
    environment = {name: value for name, value in os.environ.items() if "PROXY" not in name.upper()}
    tls = {"PENUMBRA_TLS_CERT": "/etc/penumbra-tls/tls.crt"}
    for added, status in ((tls, 0), ({}, 1)):
        done = subprocess.run(command, env=environment | added, capture_output=True, timeout=60)
        assert done.returncode == status, done.stderr


def test_nothing_is_answered_in_the_clear_and_the_log_says_https(secure: Server) -> None:
    with pytest.raises(httpx.TransportError):
        httpx.get(secure.url.replace("https:", "http:") + "/livez", trust_env=False, timeout=10)
    with grpc.insecure_channel(secure.grpc_address) as channel, pytest.raises(grpc.RpcError):
        service_pb2_grpc.GRPCInferenceServiceStub(channel).ServerLive(pb.ServerLiveRequest(), timeout=10)
    log = secure.log.read_text()
    assert f"ready: https://127.0.0.1:{secure.url.rpartition(':')[2]}/" in log and "http://" not in log
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    assert httpx.get(f"{secure.url}/livez", verify=old, trust_env=False).is_success
