"""Tuning goes on where something fails meanwhile: a size, a picture, a checkpoint, another tuning."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from penumbra.export.bundle import export_checkpoint, export_network
from penumbra.export.load import Answers, Load, ask
from penumbra.models.card import Tuned, WindowSpec, dump_card
from penumbra.models.checkpoint import save_checkpoint
from penumbra.models.errors import BadOption, TooLarge
from penumbra.models.toy.net import ToyConfig, ToyNetwork
from penumbra.serving.engine.raster import Pixels
from penumbra.serving.engine.runtime import Tuning
from penumbra.serving.engine.segmenter import Segmenter
from penumbra.serving.engine.store import CARD, artifact_card, write_version
from tests.conftest import picture, toy_card
from tests.export.test_tune import NAME, QUICK, Known, tune


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    config = ToyConfig(gain=10.0)
    card = dataclasses.replace(toy_card("pointwise")[0], config=dataclasses.asdict(config))
    save_checkpoint(tmp_path / "toy.safetensors", card, ToyNetwork(config))
    return tmp_path / "toy.safetensors"


@pytest.fixture
def store(tmp_path: Path, checkpoint: Path) -> Path:
    export_checkpoint(checkpoint, tmp_path / "store")
    return tmp_path / "store"


@dataclasses.dataclass(frozen=True, slots=True)
class Failing(Load):
    """A load under which a graph fails in batches of more than two windows, which would be the fastest."""

    def measure(self, segmenter: Segmenter, name: str, pictures: Sequence[Pixels], *, seconds: float) -> Answers:
        windows = segmenter.find(name).windows_per_batch
        if windows > 2 and segmenter._tuning != Tuning():
            raise RuntimeError("a graph's own reason")
        return {8: [(0.2 / windows, 1)]}


def test_sizes_that_fail_when_they_are_measured_leave_the_race_and_the_others_go_on(
    checkpoint: Path, store: Path
) -> None:
    said: list[str] = []
    outcome = tune(checkpoint, store, said.append, load=Failing())
    assert outcome.is_complete and outcome.tuned.windows_per_batch == 2
    assert any("a graph's own reason" in line and "windows_per_batch=4" in line for line in said), said


@dataclasses.dataclass(frozen=True, slots=True)
class FailingInTurns(Load):
    """A load under which, in the turns at last, either what is served fails or every candidate does."""

    is_served: bool = False

    def measure(self, segmenter: Segmenter, name: str, pictures: Sequence[Pixels], *, seconds: float) -> Answers:
        is_as_it_is = segmenter._tuning == Tuning()
        if seconds < QUICK[0] and is_as_it_is == self.is_served:
            raise RuntimeError("a graph's own reason")
        return {8: [(0.1 if is_as_it_is else 0.2, 1)]}


@pytest.mark.parametrize("is_served", [True, False])
def test_what_fails_in_the_turns_at_last_neither_ends_the_tuning_nor_decides_it(
    is_served: bool, checkpoint: Path, store: Path
) -> None:
    said: list[str] = []
    outcome = tune(checkpoint, store, said.append, load=FailingInTurns(is_served=is_served), always=False)
    assert any("a graph's own reason" in line for line in said)
    assert outcome.directory.name == "1" and outcome.chosen.name == outcome.rows[0].name == "as it is"


def test_a_candidate_that_cannot_be_loaded_again_leaves_the_race(checkpoint: Path, store: Path) -> None:
    said: list[str] = []

    def spoil(line: str) -> None:
        said.append(line)
        if line.startswith("torchscript bf16") and "windows/s" in line:
            (max((store / NAME).glob(f".*/{NAME}/*")) / "encode.ts").unlink()

    outcome = tune(checkpoint, store, spoil, load=Known())
    assert any(line.startswith("torchscript bf16 fails") for line in said)
    assert outcome.is_complete and outcome.chosen.name in ("torchscript fp32", "torchscript fp16")


def test_a_checkpoint_that_is_changed_meanwhile_is_not_written_under_the_old_card(
    checkpoint: Path, store: Path
) -> None:
    def change(line: str) -> None:
        if line.startswith("torchscript bf16"):
            config = ToyConfig(gain=11.0)
            card = dataclasses.replace(toy_card("pointwise")[0], config=dataclasses.asdict(config))
            save_checkpoint(checkpoint, card, ToyNetwork(config))

    outcome = tune(checkpoint, store, change)
    assert "has been changed meanwhile" in outcome.refused["torchscript fp32"]
    assert outcome.chosen.name == "torchscript bf16"


def test_a_version_that_was_tuned_meanwhile_is_not_outdone_unseen(checkpoint: Path, store: Path) -> None:
    def tune_beside(line: str) -> None:
        if line.startswith("torchscript fp32"):
            card = artifact_card(store / NAME / "1")
            assert card.export
            tuned = Tuned("x", 1, 1, 1, 1, "throughput", 0, 1, 1, 1, "")
            card = dataclasses.replace(card, version=2, export=dataclasses.replace(card.export, tuned=tuned))
            write_version(store / NAME / "1", store / NAME / "2", card)

    with pytest.raises(BadOption, match="version 2 was tuned meanwhile; tune again to compare with it"):
        tune(checkpoint, store, tune_beside)
    assert sorted(path.name for path in (store / NAME).iterdir()) == ["1", "2"]


def test_a_picture_that_is_too_large_for_the_model_is_named_before_the_search(
    tmp_path: Path, checkpoint: Path, rng: np.random.Generator
) -> None:
    card, network = toy_card("pointwise", window=WindowSpec(0, 0))
    save_checkpoint(checkpoint, card, network)
    directory = export_checkpoint(checkpoint, tmp_path / "whole")
    card = artifact_card(directory)
    limited = dataclasses.replace(card, window=dataclasses.replace(card.window, max_pixels=50 * 60))
    (directory / CARD).write_text(dump_card(limited))
    for name, size in (("a", (32, 48)), ("b", (64, 64))):
        Image.fromarray(picture(rng, *size)).save(tmp_path / f"{name}.png")
    with pytest.raises(TooLarge, match=r"b\.png: .*; take it out of the pictures"):
        tune(checkpoint, tmp_path / "whole", pictures=[tmp_path / "a.png", tmp_path / "b.png"])


def test_every_caller_asks_for_all_pictures_and_what_is_seen_whole_counts_by_its_pixels(tmp_path: Path) -> None:
    card, network = toy_card("pointwise", window=WindowSpec(0, 0))
    images = [np.zeros((32, 16, 3), np.uint8), np.zeros((32, 48, 3), np.uint8)]
    with Segmenter(threads=1) as segmenter:
        segmenter.load(export_network(network, card, tmp_path))
        for callers in (1, 2):
            answered = ask(segmenter, card.name, images, callers=callers, seconds=0.2)
            counted = [windows for _, windows in answered]
            assert set(counted) == {0.5, 1.5} and len(counted) > 4
            assert abs(counted.count(0.5) - counted.count(1.5)) <= callers
