"""How a verb ends when a file, a disk, a device or a pipe fails: one sentence, exit code 1 or 2, never a traceback."""

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from PIL import Image

from penumbra.failures import REMEDIES, sentence_of
from penumbra.models.checkpoint import save_checkpoint
from tests.conftest import toy_card
from tests.serving.server import ROOT, until
from tests.test_cli import failed, run

COMMAND = [sys.executable, "-m", "penumbra"]
ENDS_S = 120


@pytest.fixture
def checkpoints(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{name}.safetensors" for name in ("one", "two")]
    for path in paths:
        card, network = toy_card("pointwise")
        save_checkpoint(path, replace(card, name=path.stem), network)
    return paths


@pytest.fixture
def signing_key(tmp_path: Path) -> Path:
    path = tmp_path / "signing.pem"
    key = Ed25519PrivateKey.from_private_bytes(bytes(32))
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return path


@contextmanager
def full_disk(*, bytes_left: int = 0) -> Iterator[None]:
    """Files cannot grow beyond that; the system refuses a write as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_left, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def ended(arguments: list[object], *, full: str = "", **environment: str) -> tuple[int, str]:
    """The exit code of a verb in its own process and its stderr. full: the stream that cannot be written."""
    with Path("/dev/full").open("wb") as device:
        streams = {name: device if name == full else subprocess.PIPE for name in ("stdout", "stderr")}
        command = [*COMMAND, *map(str, arguments)]
        done = subprocess.run(command, **streams, env=os.environ | environment, timeout=ENDS_S)  # type: ignore[call-overload]
    return done.returncode, (done.stderr or b"").decode()


# -- a disk --------------------------------------------------------------------------------------


def test_an_export_to_a_full_disk_is_one_sentence_and_leaves_nothing(checkpoints: list[Path], tmp_path: Path) -> None:
    store = tmp_path / "store"
    with full_disk(bytes_left=1000):
        result = run("export", checkpoints[0], "--store", store)
    failed(result, 1, f"{store}", "file too large", "name another place")
    assert ".draft" not in result.stderr and not store.exists()


def test_a_triton_repository_on_a_full_disk_is_one_sentence(toy_store: Path, tmp_path: Path) -> None:
    place = tmp_path / "triton"
    with full_disk(bytes_left=1000):
        result = run("export", "toy-pointwise", "--target", "triton", "-o", place, "--store", toy_store)
    failed(result, 1, f"{place}: file too large")
    assert not place.exists()


def test_an_ensemble_on_a_full_disk_is_one_sentence_and_leaves_the_old_file(checkpoints: list[Path]) -> None:
    target = checkpoints[0].with_name("both.safetensors")
    run("ensemble", *checkpoints, "-o", target)
    old = target.read_bytes()
    with full_disk(bytes_left=100):
        failed(run("ensemble", *checkpoints, "-o", target), 1, f"{target}: file too large")
    assert target.read_bytes() == old and sorted(target.parent.glob(".both*")) == []


def test_a_signature_that_cannot_be_written_is_one_sentence(
    checkpoints: list[Path], tmp_path: Path, signing_key: Path
) -> None:
    run("export", checkpoints[0], "--store", tmp_path / "store")
    with full_disk():
        result = run("sign", "one", "--store", tmp_path / "store", "--key", signing_key)
    failed(result, 1, "card.sig: file too large")


# -- files in the way ----------------------------------------------------------------------------


def test_a_file_in_the_way_of_a_directory_is_named(
    checkpoints: list[Path], toy_store: Path, tmp_path: Path, signing_key: Path
) -> None:
    file = checkpoints[0]
    for arguments in (
        ["export", file, "--store", file / "store"],
        ["export", "toy-pointwise", "--target", "triton", "-o", file / "t", "--store", toy_store],
        ["ensemble", *checkpoints, "-o", file / "both.safetensors"],
        ["evaluate", "toy-pointwise", "--store", toy_store, "--data", tmp_path, "--json", file / "a" / "b.json"],
        ["evaluate", "toy-pointwise", "--store", toy_store, "--data", tmp_path, "--plots", file / "plots"],
    ):
        failed(run(*arguments), 1, str(file), "move")


def test_a_directory_in_the_way_of_a_file_is_named(checkpoints: list[Path], tmp_path: Path) -> None:
    (tmp_path / "card.sig").mkdir()
    for arguments in (["ensemble", *checkpoints, "-o", tmp_path], ["export", tmp_path, "--store", tmp_path / "s"]):
        result = run(*arguments)
        assert result.exit_code == 2 and str(tmp_path) in result.stderr and "Traceback" not in result.stderr


def test_a_sentence_of_the_system_says_what_would_be_right() -> None:
    for number, remedy in REMEDIES.items():
        sentence = sentence_of(OSError(number, os.strerror(number), "a/b.png"))
        assert sentence.startswith("a/b.png: ") and sentence.endswith(remedy)
    assert sentence_of(OSError("cannot write mode F as PNG")) == "cannot write mode F as PNG"


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    Image.new("RGB", (40, 30)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_a_pipe_is_refused_and_not_waited_for(toy_store: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    failed(
        run("predict", tmp_path / "pipe.png", "-m", "toy-pointwise", "-o", tmp_path, "--store", toy_store), 1, "pipe"
    )


def test_an_output_that_cannot_be_is_one_sentence_that_names_it(toy_store: Path, tmp_path: Path, photo: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    code, said = ended(["predict", photo, "-m", "toy-pointwise", "-o", tmp_path / "loop", "--store", toy_store])
    assert code == 1 and said.count("\n") == 1 and said.startswith(f"penumbra: {photo}: {tmp_path / 'loop'}: "), said


# -- a pipe and a terminal -----------------------------------------------------------------------


def test_a_reader_who_has_had_enough_is_no_traceback(toy_store: Path) -> None:
    for command in ("models --json", "models", "--help", "models --help"):
        line = f'"$0" -m penumbra {command} | head -c 0; exit "${{PIPESTATUS[0]}}"'
        done = subprocess.run(
            ["bash", "-c", line, sys.executable], env=os.environ | {"PENUMBRA_STORE": str(toy_store)},
            stderr=subprocess.PIPE, timeout=ENDS_S,
        )  # fmt: skip
        assert (done.returncode, done.stderr) in [(0, b""), (1, b"")], command  # 0 where all was written before


def test_output_that_cannot_be_written_is_one_sentence(toy_store: Path) -> None:
    for command in (["models", "--store", toy_store], ["models", "--json", "--store", toy_store], ["--help"]):
        code, said = ended(command, full="stdout")
        assert code == 1 and said.startswith("penumbra: ") and said.count("\n") == 1 and "no space left" in said
    assert ended(["models", "--store", toy_store / "none"], full="stderr") == (2, "")
    assert ended(["models", "--unknown"], full="stderr")[0] in (1, 2)


@pytest.mark.parametrize("closed", ["2>&-", "<&- >&- 2>&-"])
def test_a_verb_that_is_started_without_streams_does_its_work(
    toy_store: Path, tmp_path: Path, photo: Path, closed: str
) -> None:
    line = f'exec "$@" {closed}'
    arguments = ["predict", "-m", "toy-pointwise", "--store", toy_store, photo, "-o", tmp_path]
    done = subprocess.run(["bash", "-c", line, "bash", *COMMAND, *map(str, arguments)], timeout=ENDS_S)
    assert done.returncode == 0 and (tmp_path / "photo_labels.png").is_file()


def test_what_takes_the_place_of_a_verb_without_streams_has_them() -> None:
    script = "import os, penumbra.failures as f; f.open_streams(); os.execlp('sh', 'sh', '-c', 'echo a; echo b >&2')"
    line = 'exec "$@" <&- >&- 2>&-'
    done = subprocess.run(["bash", "-c", line, "bash", sys.executable, "-c", script], timeout=ENDS_S)
    assert done.returncode == 0


@pytest.mark.parametrize("encoding", ["ascii", pytest.param("iso-8859-1", marks=pytest.mark.slow)])
def test_a_terminal_that_cannot_show_a_name_is_no_failure(tmp_path: Path, encoding: str) -> None:
    card, network = toy_card("pointwise")
    data = replace(card.provenance, data="Łódź, 2024 … 日本")
    path = tmp_path / "Łódź.safetensors"
    save_checkpoint(path, replace(card, name="one", provenance=data), network)
    for code, arguments in (
        (0, ["export", path, "--store", tmp_path / "Łódź"]),
        (0, ["models", "--store", tmp_path / "Łódź"]),
        (0, ["models", "--store", tmp_path / "Łódź", "--json"]),
        (2, ["models", "--store", tmp_path / "日本"]),
    ):
        result, said = ended(arguments, PYTHONIOENCODING=encoding)
        assert result == code and "Traceback" not in said, said


def test_a_name_that_looks_like_markup_is_printed_as_it_is(toy_store: Path, tmp_path: Path, photo: Path) -> None:
    path = tmp_path / "x[" / "y] [bold] :smile:.png"
    path.parent.mkdir()
    photo.rename(path)
    result = run("predict", path, "-m", "toy-pointwise", "--store", toy_store, "-o", tmp_path)
    assert result.exit_code == 0, result.output
    assert "".join(str(path).split()) in "".join(result.stdout.split())


def test_ctrl_c_ends_a_verb_without_a_traceback(checkpoints: list[Path], tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*COMMAND, "export", str(checkpoints[0]), "--store", str(tmp_path / "store")], stderr=subprocess.PIPE
    )
    while not (tmp_path / "store").exists() and process.poll() is None:
        pass
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=ENDS_S)
    assert process.returncode in (0, 1) and b"Traceback" not in said  # 0 where it had done its work by then


@pytest.mark.parametrize("verb", ["calibrate", "evaluate"])
def test_a_seed_below_zero_is_refused_before_the_work(verb: str, tmp_path: Path) -> None:
    result = run(verb, "any", "--data", tmp_path, "--seed", -1)
    assert result.exit_code == 2 and "-1 is not in the range x>=0" in result.output


# -- a device ------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["foo", "cuda:99", "cuda:", "mps", "cpu:1"])
def test_an_unknown_device_is_one_sentence_with_those_that_there_are(
    checkpoints: list[Path], tmp_path: Path, device: str
) -> None:
    failed(run("export", checkpoints[0], "--store", tmp_path / "s", "--device", device), 2, f"'{device}'", "has cpu")
    assert not (tmp_path / "s").exists()


@pytest.mark.slow
def test_a_verb_that_is_told_to_end_leaves_no_draft(tmp_path: Path) -> None:
    checkpoint = ROOT / "models/zoo/supervised-camvid.safetensors"
    command = [*COMMAND, "export", str(checkpoint), "--store", str(tmp_path / "store")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        until(lambda: process.poll() is not None or any(tmp_path.glob("store/*/.draft-*")))
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=ENDS_S)[1]
    assert process.returncode == 128 + signal.SIGTERM and "Traceback" not in said
    assert not list(tmp_path.iterdir()), "neither the draft nor the folders that were made for it"
