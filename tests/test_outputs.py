"""No verb overwrites or deletes a file that it did not make; its own earlier results it may replace."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from penumbra.export.bundle import export_checkpoint
from penumbra.export.ensemble import make_ensemble
from penumbra.export.triton import write_repository
from penumbra.models.checkpoint import check_replaceable, save_checkpoint
from penumbra.models.errors import BadArtifact, BadOption
from penumbra.models.files import whole_directory
from penumbra.serving.engine.store import next_version, open_artifact
from penumbra.training.data import find_data
from penumbra.training.evaluation.verb import PLOTS
from penumbra.training.loop import Training, train
from tests.conftest import toy_card
from tests.test_cli import failed, run
from tests.test_failures import checkpoints, full_disk, signing_key  # noqa: F401 (fixtures)
from tests.training import tiny

THEIRS = b"somebody's"


def kept(path: Path) -> None:
    assert path.read_bytes() == THEIRS


def test_an_import_takes_no_files_place(tmp_path: Path, checkpoints: list[Path]) -> None:  # noqa: F811
    """Neither a file that is to be read, nor another's, nor a checkpoint that was trained or joined."""
    published = tmp_path / "published.safetensors"
    published.write_bytes(THEIRS)
    failed(run("import", "cps", published, "-o", published), 2, "one of the files to read")
    (tmp_path / "x.safetensors").write_bytes(THEIRS)
    failed(run("import", "cps", published, "-o", tmp_path / "x.safetensors"), 2, "imported from")
    before = checkpoints[0].read_bytes()
    failed(run("import", "cps", published, "-o", checkpoints[0]), 2, "is in the way")
    kept(published)
    kept(tmp_path / "x.safetensors")
    assert checkpoints[0].read_bytes() == before


def test_a_verb_may_replace_its_own_checkpoint(tmp_path: Path) -> None:
    card, network = toy_card("pointwise")
    path = tmp_path / "x.safetensors"
    check_replaceable(path, made_by="imported from ")
    origin = dataclasses.replace(card.provenance, recipe="imported from a.pth")
    save_checkpoint(path, dataclasses.replace(card, provenance=origin), network)
    check_replaceable(path, made_by="imported from ")
    with pytest.raises(BadOption, match="ensemble of"):
        check_replaceable(path, made_by="ensemble of ")
    (tmp_path / "link.safetensors").symlink_to(path)
    with pytest.raises(BadOption, match="one of the files to read"):
        check_replaceable(tmp_path / "link.safetensors", made_by="imported from ", sources=[path])


def test_an_ensemble_takes_the_place_of_ensembles_alone(tmp_path: Path, checkpoints: list[Path]) -> None:  # noqa: F811
    before = [path.read_bytes() for path in checkpoints]
    failed(run("ensemble", *checkpoints, "-o", checkpoints[0]), 2, "one of the files to read")
    (tmp_path / "photo.safetensors").write_bytes(THEIRS)
    failed(run("ensemble", *checkpoints, "-o", tmp_path / "photo.safetensors"), 2, "is in the way")
    assert [path.read_bytes() for path in checkpoints] == before
    kept(tmp_path / "photo.safetensors")
    for _ in range(2):
        make_ensemble(checkpoints, tmp_path / "both.safetensors")


@pytest.mark.parametrize("name", ["tiny.safetensors", "runs/cps-shapes/latest.safetensors"])
def test_a_training_takes_no_other_checkpoints_place_and_says_so_first(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(THEIRS)
    with pytest.raises(BadOption, match="is in the way"):
        train(tiny.recipe("cps", tmp_path, steps=10**9), tmp_path, runs_dir=tmp_path / "runs")
    kept(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "words"), [("state.ckpt", "no state of a training"), ("labelled.txt", "lists other frames")]
)
def test_a_training_takes_no_file_of_its_runs_directory_for_its_own(tmp_path: Path, name: str, words: str) -> None:
    path = tmp_path / "runs" / "cps-shapes" / name
    path.parent.mkdir(parents=True)
    contents = [THEIRS, b""]
    if name == "state.ckpt":
        torch.save({"weights": torch.zeros(3)}, path)
        contents.append(path.read_bytes())
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(BadOption, match=words):
            train(tiny.recipe("cps", tmp_path, steps=10**9), tmp_path, runs_dir=tmp_path / "runs")
        assert path.read_bytes() == content


def test_a_training_does_not_go_on_with_other_labels_than_it_began_with(tmp_path: Path) -> None:
    recipe, run_dir = tiny.recipe("cps", tmp_path, steps=2), tmp_path / "runs" / "cps-shapes"
    data = find_data("shapes")
    run_dir.mkdir(parents=True)
    Training(recipe, data.load(tmp_path, "train"), len(data.classes)).save(run_dir / "state.ckpt")
    (run_dir / "labelled.txt").write_text("train00\n")
    with pytest.raises(BadOption, match=r"labelled\.txt is in the way, and lists other frames than this training has"):
        train(recipe, tmp_path, runs_dir=tmp_path / "runs")


def test_a_training_may_be_done_again(tmp_path: Path) -> None:
    """Also with other frames, once it has written checkpoints of its own beside their list."""
    recipe = dataclasses.replace(tiny.recipe("cps", tmp_path, steps=2), validate_every_minutes=0.0)
    listed = []
    for seed in (0, 1):
        train(dataclasses.replace(recipe, seed=seed), tmp_path, runs_dir=tmp_path / "runs")
        listed.append((tmp_path / "runs" / recipe.name / "labelled.txt").read_text())
    assert listed[0] != listed[1]


def test_an_evaluation_takes_the_place_of_evaluations_alone(toy_store: Path, tmp_path: Path) -> None:
    command = ("evaluate", "toy-latent", "--data", tmp_path, "--set", "shapes", "--every", 4, "--store", toy_store)
    document, plots = tmp_path / "notes.json", tmp_path / "plots"
    for theirs in (THEIRS, b"[]", b'{"figures": 1}'):
        document.write_bytes(theirs)
        failed(run(*command, "--json", document), 2, "notes.json is in the way, and is no evaluation")
        assert document.read_bytes() == theirs
    document.write_bytes(b"")
    for _ in range(2):
        assert run(*command, "--json", document).exit_code == 0
    assert "figures" in json.loads(document.read_bytes())
    plots.mkdir()
    for name in [f"{plot}.png" for plot in PLOTS] + [f"{PLOTS[0]}.svg", f"{PLOTS[0]}.pdf"]:
        (plots / name).write_bytes(THEIRS)
        failed(run(*command, "--plots", plots), 2, f"{name} is in the way")
        kept(plots / name)
        (plots / name).unlink()


@pytest.mark.slow
def test_an_evaluation_draws_over_its_own_pictures(toy_store: Path, tmp_path: Path) -> None:
    command = ("evaluate", "toy-latent", "--data", tmp_path, "--set", "shapes", "--every", 4, "--store", toy_store)
    for _ in range(2):
        assert run(*command, "--plots", tmp_path / "plots").exit_code == 0
    drawn = {f"{name}.{suffix}" for name in PLOTS if name != "shift" for suffix in ("png", "svg", "pdf")}
    assert {path.name for path in (tmp_path / "plots").iterdir()} == drawn


def test_an_export_goes_above_every_entry_of_its_directory(tmp_path: Path, checkpoints: list[Path]) -> None:  # noqa: F811
    """A directory without a card is somebody's, or half of a copy."""
    name = checkpoints[0].stem
    export_checkpoint(checkpoints[0], tmp_path / "store")
    (tmp_path / "store" / name / "2").mkdir()
    (tmp_path / "store" / name / "2" / "notes.txt").write_bytes(THEIRS)
    (tmp_path / "store" / name / "3").write_bytes(THEIRS)
    (tmp_path / "store" / name / "0x10").mkdir()
    assert next_version(tmp_path / "store", name) == 4
    assert export_checkpoint(checkpoints[0], tmp_path / "store").name == "4"
    kept(tmp_path / "store" / name / "2" / "notes.txt")
    kept(tmp_path / "store" / name / "3")


def test_a_file_that_cannot_be_read_is_not_told_as_the_one_that_was_to_be_written(tmp_path: Path) -> None:
    for missing, told in ((Path("none.png"), "none.png"), (None, str(tmp_path / "store" / "1"))):
        with pytest.raises(FileNotFoundError) as caught, whole_directory(tmp_path / "store" / "1") as draft:
            (missing or draft / "graph").read_bytes()
        assert caught.value.filename == told


def test_a_failed_triton_repository_leaves_the_directory_that_was_there(tmp_path: Path, toy_store: Path) -> None:
    artifact = open_artifact(toy_store / "toy-latent" / "1")
    (tmp_path / "there").mkdir()
    (artifact.directory / "decode.ts").rename(artifact.directory / "away")
    try:
        for name in ("there", "absent"):
            with pytest.raises((ValueError, OSError, RuntimeError, BadArtifact)):
                write_repository(artifact, tmp_path / name)
    finally:
        (artifact.directory / "away").rename(artifact.directory / "decode.ts")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_signing_replaces_signatures_alone(
    tmp_path: Path, checkpoints: list[Path], signing_key: Path  # noqa: F811
) -> None:  # fmt: skip
    directory = export_checkpoint(checkpoints[0], tmp_path / "store")
    command = ("sign", checkpoints[0].stem, "--store", tmp_path / "store", "--key", signing_key)
    (directory / "card.sig").write_bytes(THEIRS)
    failed(run(*command), 2, "card.sig is in the way, and is no signature")
    kept(directory / "card.sig")
    (directory / "card.sig").write_bytes(np.zeros(64, np.uint8).tobytes())
    for _ in range(2):
        assert run(*command).exit_code == 0


def test_a_signature_that_could_not_be_written_is_written_next_time(
    tmp_path: Path, checkpoints: list[Path], signing_key: Path  # noqa: F811
) -> None:  # fmt: skip
    directory = export_checkpoint(checkpoints[0], tmp_path / "store")
    command = ("sign", checkpoints[0].stem, "--store", tmp_path / "store", "--key", signing_key)
    with full_disk():
        assert run(*command).exit_code == 1
    assert [path.name for path in directory.glob("*.sig")] == [] and run(*command).exit_code == 0
