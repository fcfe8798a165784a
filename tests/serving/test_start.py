"""What `penumbra serve` refuses before anything is loaded: one sentence, exit code 2, and no store filled."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from penumbra.__main__ import BENTOML
from penumbra.models.errors import BadOption
from penumbra.serving.process import check_port, own_directory
from tests.serving.server import free_port
from tests.test_cli import failed, run


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that somebody listens on."""
    with socket.create_server(("127.0.0.1", free_port())) as server:
        yield server.getsockname()[1]


@pytest.fixture(autouse=True)
def _own_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def test_a_port_that_is_taken_is_named_before_the_store_is_filled(taken: int, tmp_path: Path) -> None:
    store = tmp_path / "store"
    for option in ("--port", "--grpc-port"):
        other = "--port" if option == "--grpc-port" else "--grpc-port"
        result = run("serve", "--store", store, option, taken, other, free_port())
        failed(result, 2, f"{option} is {taken}", "127.0.0.1", f"another {option}")
    assert not store.exists()


def test_a_port_out_of_range_is_exit_code_2() -> None:
    for arguments in (["--port", 70000], ["--port", 0], ["--port", -1], ["--grpc-port", 65536], ["--port", "http"]):
        result = run("serve", *arguments)
        assert result.exit_code == 2 and "Traceback" not in result.stderr


@pytest.mark.parametrize("host", ["localhost", "here.example", "300.1.1.1", "192.0.2.1", "", "127.0.0.1:3000"])
def test_a_host_that_is_no_address_of_this_machine_is_one_sentence(host: str) -> None:
    failed(run("serve", "--host", host, "--port", free_port()), 2, "--host is", "127.0.0.1")


def test_an_address_of_version_6_is_written_with_brackets() -> None:
    if socket.has_ipv6:
        assert check_port("::1", port := free_port(), "--port") == f"[::1]:{port}"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("API_KEYS_FILE", None), ("API_KEYS_FILE", b"short"), ("API_KEYS_FILE", b"\xff\xfe"), ("API_KEYS_FILE", b""),
        ("TRUSTED_KEYS_FILE", None), ("TRUSTED_KEYS_FILE", b"-----BEGIN PUBLIC KEY-----\nx"),
    ],
)  # fmt: skip
def test_a_bad_file_of_keys_is_one_sentence(
    name: str, content: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "keys"
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setenv(f"PENUMBRA_{name}", str(path))
    failed(run("serve", "--store", tmp_path / "store", "--port", free_port()), 2)
    monkeypatch.setenv(f"PENUMBRA_{name}", str(tmp_path))
    failed(run("serve", "--store", tmp_path / "store", "--port", free_port()), 2, "cannot be read")
    assert not (tmp_path / "store").exists()


def test_a_setting_that_is_none_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENUMBRA_LIMIT_PIXEL", "3")
    failed(run("serve", "--store", tmp_path / "store"), 2, "PENUMBRA_LIMIT_PIXELS")
    assert not (tmp_path / "store").exists()


# -- the place of its own ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["PENUMBRA_STOER", "penumbra_stroe"])
@pytest.mark.parametrize("verb", [["models"], ["verify", "toy"], ["batch", "in", "out"], ["export", "x.safetensors"]])
def test_an_unknown_variable_is_refused_by_every_verb_with_a_store(
    verb: list[str], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "elsewhere")
    failed(run(*verb), 2, f"{name} is no setting; the nearest is PENUMBRA_STORE")


def test_ctrl_c_while_bentoml_is_imported_is_no_traceback(tmp_path: Path) -> None:
    """What stands for BentoML here is interrupted by itself."""
    (tmp_path / "bentoml.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\n")
    done = subprocess.run([sys.executable, "-c", BENTOML, "serve"], cwd=tmp_path, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, b"", b"")


def test_a_file_that_a_setting_names_is_the_callers_wherever_the_server_works(
    toy_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[dict[str, str]] = []
    monkeypatch.setattr("os.execve", lambda program, command, environment: started.append(environment))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "keys").write_text("infer:0123456789abcdef\n")
    monkeypatch.setenv("PENUMBRA_API_KEYS_FILE", "keys")
    monkeypatch.setenv("PENUMBRA_JOBS", "my/jobs")
    run("serve", "--store", toy_store, "--port", free_port(), "--grpc-port", 0)
    (environment,) = started
    assert environment["PENUMBRA_API_KEYS_FILE"] == str(tmp_path / "keys")
    assert environment["PENUMBRA_JOBS"] == str(tmp_path / "my" / "jobs")


def test_a_directory_of_ones_own_is_made_for_nobody_else_and_taken_again(tmp_path: Path) -> None:
    place = own_directory(tmp_path / "mine")
    assert place.stat().st_mode & 0o777 == 0o700
    assert own_directory(place) == place


def test_a_name_that_is_a_link_a_file_or_open_to_others_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "dangling").symlink_to(tmp_path / "none")
    (tmp_path / "file").touch(mode=0o600)
    for mode in (0o750, 0o702, 0o777):
        (tmp_path / f"{mode:o}").mkdir()
        (tmp_path / f"{mode:o}").chmod(mode)
    for name in ("link", "dangling", "file", "750", "702", "777"):
        with pytest.raises(BadOption, match=f"{name} is there and no directory of this user alone"):
            own_directory(tmp_path / name)
    assert not (tmp_path / "none").exists()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a directory away")
def test_a_directory_of_somebody_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir(mode=0o700)
    os.chown(tmp_path / "theirs", 12345, 12345)
    with pytest.raises(BadOption, match="of this user alone"):
        own_directory(tmp_path / "theirs")


def test_serve_takes_no_home_that_is_open_to_others(tmp_path: Path) -> None:
    port = free_port()
    home = tmp_path / f"penumbra-{os.getuid()}-{port}"
    home.mkdir()
    home.chmod(0o755)
    result = run("serve", "--store", tmp_path / "store", "--port", port, "--grpc-port", 0)
    failed(result, 2, str(home), "TMPDIR")
    assert not (tmp_path / "store").exists()
