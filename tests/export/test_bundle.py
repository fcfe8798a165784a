"""Export: the artifact reproduces its network at any B and S, or nothing is written."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from penumbra.export.bundle import export_checkpoint, export_network, verify_artifact
from penumbra.export.candidates import Row
from penumbra.export.report import print_parity, print_tuned
from penumbra.export.tune import Outcome
from penumbra.models.card import Calibration, Novelty, Tuned
from penumbra.models.checkpoint import save_checkpoint
from penumbra.models.contract import Features
from penumbra.models.errors import BadArtifact, BadCheckpoint, BadOption, ParityFailed
from penumbra.models.toy.net import ToyConfig, ToyNetwork
from penumbra.serving.engine.store import open_artifact, sha256_of, versions
from tests.conftest import toy_card


def same_contents(store: Path) -> list[Path]:
    return sorted(store.rglob("*"))


def test_the_artifacts_card_says_where_it_comes_from_and_how_near_it_is(tmp_path: Path) -> None:
    checkpoint, store = tmp_path / "toy.safetensors", tmp_path / "store"
    save_checkpoint(checkpoint, *toy_card("latent"))
    directory = export_checkpoint(checkpoint, store)
    facts = open_artifact(directory).card.export
    assert facts and facts.checkpoint == sha256_of(checkpoint)
    assert facts.backend == "torchscript" and facts.precision == "fp32" and facts.torch == torch.__version__
    assert facts.files == {path.name: sha256_of(path) for path in directory.iterdir() if path.name != "card.json"}
    assert facts.parity.label_flips_percent == 0 and facts.parity.variance_ratio == pytest.approx(1)


def test_what_answers_are_measured_against_survives_the_export_and_half_precision_says_whose_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    card, network = toy_card("latent")
    calibration = Calibration((0.1,), (0.3,), num_frames=9, num_samples=2, data="made up")
    novelty = Novelty("entropy", (0.1, 0.4), num_pictures=2, num_samples=2, data="made up")
    card = dataclasses.replace(card, calibration=calibration, novelty=novelty)
    save_checkpoint(tmp_path / "toy.safetensors", card, network)
    before = Row("as it is", None, 1.0, 1.0, 1.0, 0.0, 1.0, {})
    after, tuned = dataclasses.replace(before, windows_per_s=2.0), Tuned("x", 1, 1, 1, 1, "throughput", 0, 1, 1, 1, "")
    said = "novelty are of another export; `penumbra calibrate toy-latent --data DIR` finds them in bf16"
    for precision in ("fp32", "bf16"):
        directory = export_checkpoint(tmp_path / "toy.safetensors", tmp_path / "store", precision=precision)
        exported = open_artifact(directory).card
        assert (exported.calibration, exported.novelty) == (calibration, novelty)
        print_parity(exported, directory, as_json=False)
        assert (said in capsys.readouterr().out) == (precision == "bf16")
        for chosen in (before, after):
            print_tuned(Outcome(directory, tuned, [before, after], chosen, {}, is_complete=True), as_json=False)
            assert (said in capsys.readouterr().out) == (precision == "bf16" and chosen is after)


def test_every_export_is_the_next_version_and_leaves_the_former_alone(tmp_path: Path) -> None:
    card, network = toy_card("pointwise")
    first = export_network(network, card, tmp_path)
    before = {path.name: path.read_bytes() for path in first.iterdir()}
    second = export_network(network, card, tmp_path)
    assert (first.name, second.name) == ("1", "2")
    assert open_artifact(second).card.version == 2
    assert {path.name: path.read_bytes() for path in first.iterdir()} == before
    assert versions(tmp_path) == {"toy-pointwise": [1, 2]}


class Restless(ToyNetwork):
    """Its encode depends on how often it was called: no graph can reproduce it."""

    calls = 0

    def encode(self, image_B3hw: Tensor) -> Features:
        self.calls += 1
        return (super().encode(image_B3hw)[0] + self.calls,)


class Meanwhile(ToyNetwork):
    """While it is exported, another version is."""

    def __init__(self, config: ToyConfig, place: Path) -> None:
        super().__init__(config)
        self.place = place

    def encode(self, image_B3hw: Tensor) -> Features:
        self.place.mkdir(exist_ok=True)
        (self.place / "notes.txt").touch()
        return super().encode(image_B3hw)


def test_a_version_that_is_written_meanwhile_costs_an_export_its_number_alone(tmp_path: Path) -> None:
    card, _ = toy_card("pointwise")
    network = Meanwhile(ToyConfig(form="pointwise"), tmp_path / card.name / "1")
    directory = export_network(network, card, tmp_path)
    assert directory == tmp_path / card.name / "2" and open_artifact(directory).card.version == 2


class Random(ToyNetwork):
    """Draws its own noise, against the contract."""

    def decode(self, features: Features, noise_SBL: Tensor) -> Tensor:
        logits = super().decode(features, noise_SBL)
        return logits + torch.rand_like(logits)


class Deaf(ToyNetwork):
    """Its latent has no effect."""

    def decode(self, features: Features, noise_SBL: Tensor) -> Tensor:
        return super().decode(features, 0 * noise_SBL)


class Broken(ToyNetwork):
    """Gives NaN."""

    def encode(self, image_B3hw: Tensor) -> Features:
        return (super().encode(image_B3hw)[0] * torch.nan,)


@pytest.mark.parametrize("kind", [Restless, Random, Deaf, Broken])
def test_an_export_that_fails_writes_nothing(kind: type[ToyNetwork], tmp_path: Path) -> None:
    card, _ = toy_card("latent")
    with pytest.raises(ParityFailed):
        export_network(kind(ToyConfig(form="latent")), card, tmp_path)
    assert same_contents(tmp_path) == []


def test_an_export_that_fails_leaves_former_versions_alone(tmp_path: Path) -> None:
    card, network = toy_card("latent")
    export_network(network, card, tmp_path)
    before = same_contents(tmp_path)
    with pytest.raises(ParityFailed):
        export_network(Deaf(ToyConfig(form="latent")), card, tmp_path)
    assert same_contents(tmp_path) == before


def test_an_unknown_backend_or_a_bad_checkpoint_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    checkpoint, store = tmp_path / "toy.safetensors", tmp_path / "store"
    save_checkpoint(checkpoint, *toy_card("latent"))
    with pytest.raises(BadOption, match="no backend 'caffe'; known are torchscript"):
        export_checkpoint(checkpoint, store, backend="caffe")
    checkpoint.write_bytes(b"not a checkpoint")
    with pytest.raises(BadCheckpoint):
        export_checkpoint(checkpoint, store)
    assert not store.exists()


@pytest.mark.parametrize("name", ["../escape", "a/b", "", ".hidden", "..", "a b", "x" * 200])
def test_a_model_name_that_is_no_directory_name_is_refused(name: str, tmp_path: Path) -> None:
    store = tmp_path / "store"
    card, network = toy_card("pointwise")
    with pytest.raises(BadArtifact, match="name"):
        export_network(network, dataclasses.replace(card, name=name), store)
    assert not same_contents(tmp_path)


def test_an_export_that_cannot_be_loaded_names_the_artifact_and_not_its_draft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object, **__: object) -> None:
        raise RuntimeError("not today")

    monkeypatch.setattr(torch.jit, "load", load)
    card, network = toy_card("pointwise")
    with pytest.raises(BadArtifact) as refusal:
        export_network(network, card, tmp_path)
    assert str(refusal.value).startswith(f"{tmp_path / card.name / '1'} ") and ".draft" not in str(refusal.value)


def test_a_network_of_one_class_is_refused(tmp_path: Path) -> None:
    card, _ = toy_card("pointwise")
    network = ToyNetwork(ToyConfig(num_classes=1))
    one = dataclasses.replace(card, config=dataclasses.asdict(network.config), classes=card.classes[:1])
    with pytest.raises(BadArtifact, match="has 1 class, 'red', which every pixel would have"):
        export_network(network, one, tmp_path / "store")
    assert not (tmp_path / "store").exists()
    save_checkpoint(tmp_path / "one.safetensors", one, network)
    with pytest.raises(BadCheckpoint, match="has 1 class"):
        export_checkpoint(tmp_path / "one.safetensors", tmp_path / "store")


def test_verifying_measures_the_artifact_here(tmp_path: Path) -> None:
    card, network = toy_card("latent")
    directory = export_network(network, card, tmp_path)
    parity = verify_artifact(directory)
    assert parity.label_flips_percent == 0 and parity.relative < 1e-5
    assert parity == open_artifact(directory).card.export.parity  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["encode.ts", "decode.ts", "golden.safetensors"])
def test_verifying_refuses_a_flipped_bit(name: str, tmp_path: Path) -> None:
    directory = export_network(*reversed(toy_card("latent")), tmp_path)
    data = bytearray((directory / name).read_bytes())
    data[len(data) // 2] ^= 4
    (directory / name).write_bytes(data)
    with pytest.raises(BadArtifact, match=f"{name} was changed"):
        verify_artifact(directory)


def test_a_failed_first_export_leaves_no_store_behind(tmp_path: Path) -> None:
    card, _ = toy_card("latent")
    with pytest.raises(ParityFailed):
        export_network(Deaf(ToyConfig(form="latent")), card, tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_views_of_an_export_are_its_cards_and_leave_out_what_was_calibrated_in_others(tmp_path: Path) -> None:
    card, network = toy_card("latent")
    calibration = Calibration((0.1,), (0.3,), num_frames=9, num_samples=2, data="made up")
    save_checkpoint(tmp_path / "toy.safetensors", dataclasses.replace(card, calibration=calibration), network)
    exported = open_artifact(export_checkpoint(tmp_path / "toy.safetensors", tmp_path / "store", views="flip"))
    assert (exported.card.views, exported.card.calibration) == ("flip", None)
    again = open_artifact(export_checkpoint(tmp_path / "toy.safetensors", tmp_path / "store", views="none"))
    assert (again.card.views, again.card.calibration) == ("none", calibration)
