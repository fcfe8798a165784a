"""A demo store is filled with the demo models, and nobody's own model makes room for one."""

from dataclasses import replace
from pathlib import Path

import pytest

from penumbra.export import zoo
from penumbra.models.card import Provenance
from penumbra.models.checkpoint import save_checkpoint
from penumbra.serving.engine.store import artifact_card, sha256_of, versions, write_version
from tests.conftest import toy_card

NAME = "toy-pointwise"


@pytest.fixture
def demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The checkpoint of the only demo, a toy."""
    card, network = toy_card("pointwise")
    path = tmp_path / "zoo" / f"{NAME}.safetensors"
    save_checkpoint(path, replace(card, provenance=Provenance(recipe="ours", metrics={"mIoU": 0.5})), network)
    monkeypatch.setattr(zoo, "ZOO", path.parent)
    monkeypatch.setattr(zoo, "DEMO", (NAME,))
    return path


def put(toy_store: Path, store: Path, name: str, **changes: object) -> None:
    source = toy_store / name / "1"
    write_version(source, store / name / "1", replace(artifact_card(source), **changes))


def test_a_demo_of_an_older_file_is_succeeded_by_the_newer(demo: Path, toy_store: Path, tmp_path: Path) -> None:
    put(toy_store, tmp_path / "store", NAME, provenance=Provenance(recipe="ours", metrics={"mIoU": 0.5}))
    (directory,) = zoo.fill_store(tmp_path / "store")
    facts = artifact_card(directory).export
    assert directory == tmp_path / "store" / NAME / "2" and facts and facts.checkpoint == sha256_of(demo)
    assert zoo.fill_store(tmp_path / "store") == []


@pytest.mark.parametrize("recipe", ["mine", "ours"])
def test_a_model_that_somebody_trained_stays_what_is_served_under_a_demos_name(
    demo: Path, toy_store: Path, tmp_path: Path, recipe: str
) -> None:
    put(toy_store, tmp_path / "store", NAME, provenance=Provenance(recipe=recipe, metrics={"mIoU": 0.6}))
    assert zoo.fill_store(tmp_path / "store") == [] and versions(tmp_path / "store") == {NAME: [1]}


def test_a_store_with_other_models_is_no_demo_store(demo: Path, toy_store: Path, tmp_path: Path) -> None:
    put(toy_store, tmp_path / "store", NAME, provenance=Provenance(recipe="ours", metrics={"mIoU": 0.5}))
    put(toy_store, tmp_path / "store", "toy-latent")
    assert zoo.fill_store(tmp_path / "store") == []


def test_a_demo_that_is_broken_keeps_no_store_from_its_use(demo: Path, toy_store: Path, tmp_path: Path) -> None:
    put(toy_store, tmp_path / "store", NAME)
    (tmp_path / "store" / NAME / "1" / "card.json").write_text("{")
    assert zoo.fill_store(tmp_path / "store") == []
