"""Cards in the forms of others, each held against its own validator; what is not installed is skipped."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from penumbra.__main__ import main
from penumbra.export.bioimageio import write_package
from penumbra.export.bundle import export_network
from penumbra.models.card import InputSpec, Provenance, ScaleRule
from penumbra.models.errors import BadOption
from penumbra.serving.engine.options import SegmentOptions
from penumbra.serving.engine.segmenter import Segmenter
from penumbra.serving.engine.store import open_artifact
from penumbra.serving.render.stac import model_properties
from tests.conftest import FIXED, picture, toy_card

PROVENANCE = Provenance("Two streets, 10 frames", "Ours (streets): no other use", "r.yaml", "abc", {"val/mIoU": 0.5})


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cards")
    for form in ("pointwise", "latent"):
        card, network = toy_card(form)
        export_network(network, dataclasses.replace(card, provenance=PROVENANCE), folder)
    return folder


def written(store: Path, name: str, kind: str, *more: str) -> str:
    result = CliRunner().invoke(main, ["card", name, "--as", kind, "--store", str(store), *more])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("name", ["toy-pointwise", "toy-latent"])
def test_hugging_face_reads_the_metadata_of_the_readme(store: Path, name: str) -> None:
    hub = pytest.importorskip("huggingface_hub")
    text = written(store, name, "huggingface")
    card = hub.ModelCard(text)
    assert card.data.license == "other" and card.data.license_name == "ours-streets-no-other-use"
    assert card.data.pipeline_tag == "image-segmentation" and "uncertainty" in card.data.tags
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_name) == ("val/mIoU", 0.5, PROVENANCE.data)
    assert f"# {name}" in card.text and "| val/mIoU | 0.5 |" in card.text
    assert hub.ModelCardData(**card.data.to_dict()).to_dict() == card.data.to_dict()


def check_item(found: dict[str, Any]) -> None:
    """Hold an item against the schemas of STAC that pystac brings, and its model against those of MLM's own package."""
    validation, mlm = pytest.importorskip("pystac.validation"), pytest.importorskip("stac_model.schema")
    validation.validate_dict(found | {"stac_extensions": []})  # those of extensions are on the web alone
    mlm.MLModelProperties(**{name: value for name, value in found["properties"].items() if name.startswith("mlm:")})
    models = [asset for asset in found["assets"].values() if "mlm:model" in asset["roles"]]
    assert models and all(asset["mlm:artifact_type"] for asset in models)


@pytest.mark.parametrize("name", ["toy-pointwise", "toy-latent"])
def test_a_stac_item_of_a_model_is_valid(store: Path, name: str) -> None:
    found = json.loads(written(store, name, "stac"))
    check_item(found)
    (picture_in,) = found["properties"]["mlm:input"]
    assert picture_in["bands"] == ["red", "green", "blue"] and len(picture_in["value_scaling"]) == 3
    assert [one["description"] for one in found["properties"]["mlm:output"][0]["classification:classes"]] == [
        one.name for one in toy_card("pointwise")[0].classes
    ]
    assert {*found["assets"]} == {"encode.ts", "decode.ts"}


def test_scaling_of_bands_is_what_the_network_sees() -> None:
    spec = InputSpec(low=(0.0, 10.0, 20.0), high=(100.0, 110.0, 220.0), order="BGR", mean=(0.1, 0.2, 0.3))
    rows = model_properties(dataclasses.replace(toy_card("pointwise")[0], input=spec))["mlm:input"][0]["value_scaling"]
    red, blue = rows[0], rows[2]  # the card's figures are blue first
    assert (50 - blue["mean"]) / blue["stddev"] == pytest.approx((0.5 - 0.1) / spec.std[0])
    assert (120 - red["mean"]) / red["stddev"] == pytest.approx((0.5 - 0.3) / spec.std[2])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # its validator leaves a file open
@pytest.mark.parametrize("name", ["toy-pointwise", "toy-latent"])
def test_a_package_of_bioimage_io_is_valid_and_its_graph_passes_its_own_test(
    store: Path, tmp_path: Path, name: str
) -> None:
    written(store, name, "bioimageio", "-o", str(tmp_path))
    graph = torch.jit.load(tmp_path / "weights.pt")
    given, expected = np.load(tmp_path / "test_input.npy"), np.load(tmp_path / "test_output.npy")
    assert given.dtype == np.uint8 and np.ptp(given) > 50
    found = graph(torch.from_numpy(given.astype(np.float32))).detach().numpy()
    assert np.allclose(found, expected, atol=1e-6) and np.allclose(expected.sum(1), 1, atol=1e-5)
    spec = pytest.importorskip("bioimageio.spec")
    with spec.ValidationContext(perform_io_checks=True, root=tmp_path):
        summary = spec.load_description(tmp_path / "rdf.yaml").validation_summary
    assert summary.status in ("passed", "valid-format"), summary.display()


@pytest.mark.parametrize("name", ["toy-pointwise", "toy-latent"])
def test_the_graph_of_a_package_answers_as_the_server_does(
    store: Path, tmp_path: Path, rng: np.random.Generator, name: str
) -> None:
    written(store, name, "bioimageio", "-o", str(tmp_path))
    height, width = np.load(tmp_path / "test_input.npy").shape[2:]
    image = picture(rng, height, width)
    with Segmenter.open(store, threads=1, device="cpu", tuning=FIXED) as segmenter:
        answer = segmenter.segment(image, SegmentOptions(model=name))
    prob_1Khw = torch.jit.load(tmp_path / "weights.pt")(torch.from_numpy(image.transpose(2, 0, 1)[None]).float())
    assert np.allclose(prob_1Khw.detach().numpy()[0].max(0), answer.maps["confidence"], atol=1e-5)


def test_a_package_has_no_views_and_says_that_it_does_not_resize(
    store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    artifact = open_artifact(store / "toy-pointwise" / "1")
    card, spec = artifact.card, artifact.card.input
    with pytest.raises(BadOption, match=r"in the views flip, and bioimage\.io runs windows as they are only"):
        write_package(dataclasses.replace(artifact, card=dataclasses.replace(card, views="flip")), "", tmp_path)
    ruled = dataclasses.replace(card, input=dataclasses.replace(spec, resolution=ScaleRule("frame", 360), order="BGR"))
    write_package(dataclasses.replace(artifact, card=ruled), "", tmp_path)
    assert "scale rule frame:360; bioimage.io does not resize" in caplog.messages[0]


def test_a_package_wants_a_folder_and_torchscript(store: Path) -> None:
    result = CliRunner().invoke(main, ["card", "toy-latent", "--as", "bioimageio", "--store", str(store)])
    assert result.exit_code == 2 and "-o DIRECTORY" in result.output


@pytest.mark.parametrize(
    ("kind", "name"), [("huggingface", "README.md"), ("stac", "item.json"), ("bioimageio", "rdf.yaml")]
)
def test_a_file_that_is_there_is_never_overwritten(kind: str, name: str, store: Path, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    command = ["card", "toy-pointwise", "--as", kind, "-o", str(tmp_path), "--store", str(store)]
    answer = CliRunner().invoke(main, command)
    assert answer.exit_code and "is in the way; move it, or name another directory" in answer.output
    assert [file.name for file in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == "mine"
