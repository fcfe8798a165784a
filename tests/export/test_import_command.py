"""The command that imports a published file, and the files that name its classes."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from penumbra.__main__ import main
from penumbra.models.card import ClassInfo
from penumbra.models.checkpoint import load_checkpoint
from penumbra.models.classes import VOC, color_of, read_classes
from penumbra.models.errors import BadOption
from tests.export.tiny import state

pytestmark = pytest.mark.usefixtures("two_more_methods")


def run(tmp_path: Path, *arguments: str, content: object = None) -> Result:
    torch.save(content or {"model": state(), "epoch": 1}, tmp_path / "a.pth")
    command = ["import", "tiny", str(tmp_path / "a.pth"), "-o", str(tmp_path / "ours.safetensors"), *arguments]
    return CliRunner().invoke(main, command)


@pytest.fixture
def names(tmp_path: Path) -> Path:
    path = tmp_path / "names.txt"
    path.write_text("road\nsky above\ncar\n")
    return path


def test_the_command_says_what_was_left_out_and_what_comes_next(tmp_path: Path, names: Path) -> None:
    result = run(tmp_path, "--classes", str(names))
    assert result.exit_code == 0, result.output
    for word in ("aux.weight", "tiny_b.conv.weight", "epoch", "next: penumbra export", "3 classes"):
        assert word in result.stdout
    warnings = result.stderr.splitlines()
    assert warnings[0] == "penumbra: warning: the centres are zero"
    assert "leaves 6 of the file's tensors out" in warnings[1] and "--protocol penumbra to keep them" in warnings[1]
    assert "averages logits" in warnings[2] and len(warnings) == 3
    card, _ = load_checkpoint(tmp_path / "ours.safetensors")
    assert [info.name for info in card.classes] == ["road", "sky above", "car"]


def test_the_command_speaks_json(tmp_path: Path, names: Path) -> None:
    result = run(tmp_path, "--classes", str(names), "--json", "--protocol", "penumbra", "--sampling", "dropout")
    answer = json.loads(result.stdout)
    assert answer["train_only"] == ["aux.weight"] and answer["card"]["sampling"]["kind"] == "dropout"
    assert answer["file"] == str(tmp_path / "ours.safetensors") and answer["warnings"] == ["the centres are zero"]


def test_the_command_counts_many_tensors_by_the_start_of_their_names(tmp_path: Path, names: Path) -> None:
    many = {f"aux.block.{i}.weight": torch.zeros(1) for i in range(40)}
    result = run(tmp_path, "--classes", str(names), content={"model": state() | many})
    assert "aux.block" in result.stdout and "40" in result.stdout and "aux.block.7" not in result.stdout


@pytest.mark.parametrize(
    ("arguments", "content", "code", "word"),
    [
        ((), None, 2, "--classes"),
        (("--classes", "nowhere.txt"), None, 2, "nowhere.txt"),
        (("--classes", "voc"), None, 2, "21 classes are named"),
        (("--classes", "voc"), {"model": {"x": torch.zeros(1)}}, 1, "no checkpoint of tiny"),
    ],
)
def test_the_command_fails_in_one_sentence(
    tmp_path: Path, arguments: tuple[str, ...], content: object, code: int, word: str
) -> None:
    result = run(tmp_path, *arguments, content=content)
    assert (result.exit_code, result.stdout) == (code, "")
    (sentence,) = result.stderr.splitlines()
    assert sentence.startswith("penumbra: ") and word in sentence


# -- classes --------------------------------------------------------------------------------------


def test_classes_are_read_from_a_table_from_lines_and_from_json(tmp_path: Path) -> None:
    path = tmp_path / "classes"
    assert read_classes("voc") == VOC
    path.write_text('["a", {"name": "b", "color": [1, 2, 3]}]')
    assert read_classes(str(path)) == (ClassInfo("a", (0, 0, 0)), ClassInfo("b", (1, 2, 3)))


def test_the_palette_is_that_of_pascal_voc() -> None:
    assert [color_of(k) for k in range(len(VOC))] == [info.color for info in VOC]
    assert len({color_of(k) for k in range(255)}) == 255


@pytest.mark.parametrize("text", ["", "a", '["a"]', "a\n\nb", "[1, 2]", '["a"', '[{"name": "a"}, "b"]', '["", "b"]'])
def test_class_files_are_read_strictly(tmp_path: Path, text: str) -> None:
    (tmp_path / "classes").write_text(text)
    with pytest.raises(BadOption, match="classes"):
        read_classes(str(tmp_path / "classes"))
