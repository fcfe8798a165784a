"""The store: an artifact that is not exactly what its card says is refused by a sentence."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from penumbra.models.errors import BadArtifact, UnknownModel
from penumbra.serving.engine.store import CARD, find_artifact, open_artifact, sha256_of, versions


@pytest.fixture
def artifact(toy_store: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(toy_store / "toy-latent" / "1", tmp_path / "toy-latent" / "1"))


def edit_card(artifact: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads((artifact / CARD).read_text("utf-8"))
    edit(data)
    (artifact / CARD).write_text(json.dumps(data), "utf-8")


FILES = ["encode.ts", "decode.ts", "golden.safetensors"]


def test_an_untouched_artifact_opens(artifact: Path) -> None:
    opened = open_artifact(artifact)
    assert opened.card.name == "toy-latent" and opened.card.export
    assert sorted(opened.card.export.files) == sorted(FILES)
    assert opened.golden.plain.logits_SBKhw.shape == (3, 2, 3, 32, 48)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
def test_a_flipped_bit_anywhere_is_noticed(artifact: Path, name: str, place: float) -> None:
    path = artifact / name
    data = bytearray(path.read_bytes())
    data[int(place * (len(data) - 1))] ^= 1
    path.write_bytes(data)
    with pytest.raises(BadArtifact, match=f"{name} was changed after its export"):
        open_artifact(artifact)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(artifact: Path, name: str) -> None:
    (artifact / name).unlink()
    with pytest.raises(BadArtifact, match=f"lacks the file {name}"):
        open_artifact(artifact)


def test_a_file_that_the_system_does_not_let_read_is_named(artifact: Path) -> None:
    (artifact / "encode.ts").unlink()
    (artifact / "encode.ts").symlink_to("/proc/self/mem")  # a file by every sign, and an error to whoever reads it
    with pytest.raises(BadArtifact, match=r"encode\.ts cannot be read \(Input/output error\); let this server's user"):
        open_artifact(artifact)


@pytest.mark.parametrize("name", ["../1/encode.ts", "/etc/hostname", "..", ".", "", "sub/encode.ts"])
def test_a_card_cannot_name_files_outside_its_directory(artifact: Path, name: str) -> None:
    edit_card(artifact, lambda data: data["export"]["files"].update({name: "0" * 64}))
    with pytest.raises(BadArtifact, match="lacks the file"):
        open_artifact(artifact)


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe", b"[]", b"null"])
def test_a_card_that_does_not_read_is_refused_with_its_place(artifact: Path, text: bytes) -> None:
    (artifact / CARD).write_bytes(text)
    with pytest.raises(BadArtifact, match="toy-latent/1"):
        open_artifact(artifact)


def test_an_absent_card_is_refused(artifact: Path) -> None:
    (artifact / CARD).unlink()
    with pytest.raises(BadArtifact, match=r"no readable card\.json"):
        open_artifact(artifact)


def test_an_unknown_field_is_refused_with_place_and_name(artifact: Path) -> None:
    edit_card(artifact, lambda data: data.update(colour=1))
    with pytest.raises(BadArtifact, match=r"toy-latent/1.*unknown field 'colour'"):
        open_artifact(artifact)


def test_a_checkpoints_card_is_no_artifacts_card(artifact: Path) -> None:
    edit_card(artifact, lambda data: data.update(export=None))
    with pytest.raises(BadArtifact, match="names no exported files"):
        open_artifact(artifact)


def test_a_golden_window_that_does_not_read_is_refused_even_with_the_right_hash(artifact: Path) -> None:
    golden = artifact / "golden.safetensors"
    golden.write_bytes(b"nothing")
    edit_card(artifact, lambda data: data["export"]["files"].update({golden.name: sha256_of(golden)}))
    with pytest.raises(BadArtifact, match="does not hold a golden window"):
        open_artifact(artifact)


def test_versions_are_numbers_in_ascending_order(tmp_path: Path) -> None:
    for place in ("b/2", "b/10", "b/1", "a/3", "a/draft", "a/.draft-1", "c/\u00b2", "c/-1"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / CARD).touch()
    (tmp_path / "b" / "11").mkdir()
    assert versions(tmp_path) == {"a": [3], "b": [1, 2, 10]}
    assert versions(tmp_path / "absent") == {}
    (tmp_path / os.fsdecode(b"mod\xe8le") / "1").mkdir(parents=True)
    (tmp_path / os.fsdecode(b"mod\xe8le") / "1" / "card.json").touch()
    assert versions(tmp_path) == {"a": [3], "b": [1, 2, 10]}, "a name that no answer could show"


def test_the_newest_version_is_found_unless_one_is_named(tmp_path: Path) -> None:
    for version in (9, 10):
        (tmp_path / "m" / str(version)).mkdir(parents=True)
        (tmp_path / "m" / str(version) / CARD).touch()
    assert find_artifact(tmp_path, "m").name == "10"
    assert find_artifact(tmp_path, "m", 9).name == "9"
    with pytest.raises(UnknownModel, match="m has no version 3; it has 9, 10"):
        find_artifact(tmp_path, "m", 3)
    with pytest.raises(UnknownModel, match=r"no model 'n' in .*; there are m"):
        find_artifact(tmp_path, "n")
    with pytest.raises(UnknownModel, match="no model"):
        find_artifact(tmp_path, "../m")
