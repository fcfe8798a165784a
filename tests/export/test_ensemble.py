"""Ensembles: every member answers as it would alone, whatever its method, its pixels' normalisation and its stride."""

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from onnx import TensorProto, helper
from torch import nn
from torch.nn import functional as F

from penumbra.__main__ import main
from penumbra.export.bring import Given
from penumbra.export.bundle import export_checkpoint
from penumbra.export.ensemble import losses, make_ensemble
from penumbra.export.networks import import_network
from penumbra.export.onnx import _join
from penumbra.models.card import Card, ClassInfo, InputSpec, Readout, WindowSpec
from penumbra.models.checkpoint import load_checkpoint, save_checkpoint
from penumbra.models.contract import Network
from penumbra.models.errors import BadOption
from penumbra.models.plain.net import PlainConfig, PlainNetwork
from penumbra.serving.engine.options import SegmentOptions
from penumbra.serving.engine.segmenter import Segmenter
from penumbra.serving.engine.windows import normalise
from tests.conftest import CLASSES, FIXED, picture, toy_card
from tests.models.programs import Tiny, program, seeded_tiny
from tests.models.small import SMALL, seeded

INPUTS = {
    "cps": InputSpec(),
    "np_semiseg film": InputSpec(mean=(104.0, 116.7, 122.7), std=(1, 1, 1), scale=1.0, order="BGR"),
    "toy": InputSpec(mean=(0, 0, 0), std=(1, 1, 1)),
}


class Placed(Tiny):
    """Adds to every place of a window what belongs there, so that all windows have one size."""

    def forward(self, image_BChw: torch.Tensor) -> dict[str, torch.Tensor]:
        places_hw = torch.linspace(-1, 1, 32 * 48).view(32, 48)
        return super().forward(image_BChw + places_hw)


def checkpoint(path: Path, name: str, **changes: object) -> Path:
    network, config = seeded(name), SMALL[name]
    card = Card(
        path.stem, 1, name.split()[0], dataclasses.asdict(config), CLASSES, INPUTS.get(name, InputSpec()),
        WindowSpec(64, 80), network.sampling, Readout(align_corners=name != "cps", temperature=1.5),
        prompt=network.prompt, extra_maps=network.extra_maps,
    )  # fmt: skip
    save_checkpoint(path, dataclasses.replace(card, **changes), network)
    return path


def alone(path: Path, image_HW3: np.ndarray, size: tuple[int, int]) -> torch.Tensor:
    """Probabilities of every member of one checkpoint: softmax of its own logits at its own temperature."""
    card, network = load_checkpoint(path)
    image_B3hw = torch.from_numpy(normalise(image_HW3, card.input)).permute(2, 0, 1)[None]
    noise_SBL = torch.zeros(
        card.sampling.default_samples if card.sampling.members else 1, 1, card.sampling.noise_length
    )
    logits = network(image_B3hw, noise_SBL)[:, 0] / card.readout.temperature
    logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=card.readout.align_corners)
    return logits.softmax(1)


@pytest.mark.parametrize("names", [("cps", "np_semiseg film", "toy"), ("toy", "cps")])
def test_an_ensembles_answer_is_the_mean_of_its_members_answers_alone(
    tmp_path: Path, rng: np.random.Generator, names: tuple[str, ...]
) -> None:
    paths = [checkpoint(tmp_path / f"{name.split()[0]}.safetensors", name) for name in names]
    card = make_ensemble(paths, tmp_path / "all.safetensors")
    expected = {"cps": ("cps.branch1", "cps.branch2"), "np_semiseg": ("np_semiseg",), "toy": ("toy",)}
    assert card.sampling.members == sum((expected[name.split()[0]] for name in names), ())
    image = picture(rng, 64, 80)
    export_checkpoint(tmp_path / "all.safetensors", tmp_path / "store")
    with Segmenter.open(tmp_path / "store", threads=1, device="cpu", tuning=FIXED) as segmenter:
        prediction = segmenter.segment(image, SegmentOptions())
    assert prediction.members == card.sampling.members
    with torch.inference_mode():
        mean_Khw = torch.cat([alone(path, image, (64, 80)) for path in paths]).mean(0)
    np.testing.assert_allclose(prediction.maps["confidence"], mean_Khw.amax(0), atol=2e-4)


def test_equal_networks_keep_their_feature_resolution(tmp_path: Path) -> None:
    paths = [checkpoint(tmp_path / f"{name}.safetensors", "cps") for name in ("one", "two")]
    make_ensemble(paths, tmp_path / "both.safetensors")
    _, network = load_checkpoint(tmp_path / "both.safetensors")
    assert isinstance(network, Network)
    assert network(torch.zeros(1, 3, 64, 80), torch.zeros(4, 1, 0)).shape == (4, 1, 3, 16, 20)


def test_other_classes_are_refused_by_name(tmp_path: Path) -> None:
    one = checkpoint(tmp_path / "one.safetensors", "toy")
    renamed = (*CLASSES[:2], ClassInfo("violet", (1, 1, 1)))
    two = checkpoint(tmp_path / "two.safetensors", "toy", classes=renamed)
    with pytest.raises(BadOption, match="two has 'violet' where one has 'blue'"):
        make_ensemble([one, two], tmp_path / "both.safetensors")
    assert not (tmp_path / "both.safetensors").exists()


def test_members_whose_values_are_clipped_to_other_ranges_are_refused_and_bands_the_other_way_round_are_none(
    tmp_path: Path,
) -> None:
    ranges = {"low": (0.0, 10.0, 20.0), "high": (50.0, 60.0, 70.0)}
    turned = {name: values[::-1] for name, values in ranges.items()}
    inputs = {
        "one": InputSpec(clip=True, **ranges), "two": InputSpec(clip=True, order="BGR", **turned),
        "three": InputSpec(clip=True, **turned), "four": InputSpec(**ranges),
    }  # fmt: skip
    paths = {name: checkpoint(tmp_path / f"{name}.safetensors", "toy", input=spec) for name, spec in inputs.items()}
    make_ensemble([paths["one"], paths["two"]], tmp_path / "both.safetensors")
    for other, clip in (("three", "20 to 70, 10 to 60, 0 to 50"), ("four", "none")):
        match = f"{other} has the clip {clip}, and the first of the ensemble 0 to 50, 10 to 60, 20 to 70"
        with pytest.raises(BadOption, match=match):
            make_ensemble([paths["one"], paths[other]], tmp_path / "all.safetensors")


@pytest.mark.parametrize("name", ["my ens.safetensors", "all.pt"])
def test_an_ensemble_has_no_name_that_nothing_could_read(tmp_path: Path, name: str) -> None:
    paths = [checkpoint(tmp_path / f"{stem}.safetensors", "toy") for stem in ("one", "two")]
    with pytest.raises(BadOption, match=f"the output is '{name}'; a plain name that ends in .safetensors is wanted"):
        make_ensemble(paths, tmp_path / name)
    assert not (tmp_path / name).exists()


def test_one_file_is_no_ensemble_and_names_must_differ(tmp_path: Path) -> None:
    one = checkpoint(tmp_path / "one.safetensors", "toy")
    for paths in ([one], [one, one]):
        with pytest.raises(BadOption, match="two or more files with different names"):
            make_ensemble(paths, tmp_path / "both.safetensors")


def test_the_verb_warns_of_what_a_network_says_alone_and_not_as_a_member(tmp_path: Path) -> None:
    for form in ("latent", "boxed", "bright", "pointwise"):
        save_checkpoint(tmp_path / f"{form}.safetensors", *toy_card(form))
    files = [str(path) for path in sorted(tmp_path.glob("*.safetensors"))]
    result = CliRunner().invoke(main, ["ensemble", *files, "-o", str(tmp_path / "out" / "all.safetensors")])
    assert result.exit_code == 0, result.output
    assert result.stderr.splitlines() == [
        "penumbra: warning: boxed takes no boxes in an ensemble",
        "penumbra: warning: bright has no brightness in an ensemble",
        "penumbra: warning: latent draws no samples in an ensemble, where it is one member with its latent at the mean",
    ]


def test_an_ensemble_has_the_views_that_all_of_its_members_have(tmp_path: Path) -> None:
    flipped = [checkpoint(tmp_path / f"{name}.safetensors", "cps", views="flip") for name in ("one", "two")]
    assert make_ensemble(flipped, tmp_path / "both.safetensors").views == "flip" and losses(flipped) == []
    mixed = [*flipped, checkpoint(tmp_path / "three.safetensors", "toy")]
    assert make_ensemble(mixed, tmp_path / "all.safetensors").views == "none"
    assert losses(mixed)[0] == "one has the views flip and others have not: the ensemble has none"


def test_members_times_views_are_the_mean_of_every_member_in_every_view(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    paths = [checkpoint(tmp_path / f"{name}.safetensors", name) for name in ("cps", "toy")]
    make_ensemble(paths, tmp_path / "all.safetensors")
    image = picture(rng, 64, 80)
    export_checkpoint(tmp_path / "all.safetensors", tmp_path / "store")
    with Segmenter.open(tmp_path / "store", threads=1, device="cpu", tuning=FIXED) as segmenter:
        prediction = segmenter.segment(image, SegmentOptions(views="flip"))
    seen = [(image, (-1,)), (image, ())]
    with torch.inference_mode():
        probs = [
            alone(path, np.ascontiguousarray(pixels[:, ::-1] if axes else pixels), (64, 80)).flip(axes)
            for path in paths
            for pixels, axes in seen
        ]
    prob_SKhw = torch.cat(probs)
    mean_Khw = prob_SKhw.mean(0)
    np.testing.assert_allclose(prediction.maps["confidence"], mean_Khw.amax(0), atol=2e-4)
    information = torch.special.entr(mean_Khw).sum(0) - torch.special.entr(prob_SKhw).sum(1).mean(0)
    np.testing.assert_allclose(prediction.maps["mutual_information"], information, atol=2e-4)


def test_programs_of_torch_and_onnx_programs_are_members_of_two_ensembles(tmp_path: Path) -> None:
    paths = [checkpoint(tmp_path / f"{name.split()[-1]}.safetensors", name) for name in ("plain onnx", "cps")]
    with pytest.raises(BadOption, match="onnx is an ONNX program and others are none; an ensemble is of ONNX programs"):
        make_ensemble(paths, tmp_path / "all.safetensors")
    assert not (tmp_path / "all.safetensors").exists()


def brought(path: Path, seed: int, *, said: str = "", **options: object) -> Path:
    path.with_suffix(".onnx").write_bytes(program("onnx", seeded_tiny(seed, **options)))
    import_network(
        "onnx", str(path.with_suffix(".onnx")), path, Given(input=f"size=64x80 {said or 'mean=0.5 std=0.25'}")
    )
    return path


@pytest.mark.parametrize("backend", ["onnx", pytest.param("openvino", marks=pytest.mark.slow)])
def test_onnx_programs_are_joined_into_one_that_answers_as_they_do_one_by_one(
    tmp_path: Path, rng: np.random.Generator, backend: str
) -> None:
    """The second has another stride and normalisation, and gives probabilities; an ensemble can be a member, too."""
    film, softmax = "mean=104,116.7,122.7 std=1 scale=1 order=bgr", nn.Sequential(nn.AvgPool2d(2), nn.Softmax(1))
    a, b = brought(tmp_path / "a.safetensors", 0), brought(tmp_path / "b.safetensors", 1, said=film, activation=softmax)
    names, paths, joined = ("a", "b"), [a, b], tmp_path / "ab.safetensors"
    make_ensemble(paths, joined)
    if backend == "openvino":
        names, paths = ("ab.a", "ab.b", "c"), [a, b, brought(tmp_path / "c.safetensors", 2)]
        make_ensemble([joined, paths[-1]], tmp_path / "all.safetensors")
        joined = tmp_path / "all.safetensors"
    export_checkpoint(joined, tmp_path / "store", backend=backend)
    image, outputs = picture(rng, 64, 80), ("probabilities", "entropy", "mutual_information")
    with Segmenter.open(tmp_path / "store", threads=1, device="cpu", tuning=FIXED) as segmenter:
        prediction = segmenter.segment(image, SegmentOptions(outputs=outputs))
    assert prediction.members == names
    with torch.inference_mode():
        prob_SKhw = torch.cat([alone(path, image, (64, 80)) for path in paths])
    mean_Khw = prob_SKhw.mean(0)
    np.testing.assert_allclose(prediction.prob_KHW, mean_Khw, atol=1e-5)
    information = torch.special.entr(mean_Khw).sum(0) - torch.special.entr(prob_SKhw).sum(1).mean(0)
    np.testing.assert_allclose(prediction.maps["mutual_information"], information, atol=1e-5)
    sure = mean_Khw.topk(2, dim=0).values.diff(dim=0)[0].abs() > 1e-4
    assert (torch.from_numpy(prediction.labels_HW)[sure] == mean_Khw.argmax(0)[sure]).all()


def test_graphs_that_onnx_itself_refuses_are_named_in_a_sentence() -> None:
    def graph(inputs: str, outputs: str, *nodes: str) -> onnx.ModelProto:
        values = [
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in names]
            for names in (inputs, outputs)
        ]
        made = helper.make_graph(
            [helper.make_node(kind, [x], [y]) for kind, x, y in map(str.split, nodes)], "g", *values
        )
        return helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)])

    first, last = graph("x", "ab", "Identity x a", "Identity x b"), graph("ay", "z", "Identity a z")
    with pytest.raises(BadOption, match=r"cannot be joined \(No Op registered for Unknown .*export all with one opset"):
        _join([first, graph("x", "y", "Unknown x y"), last])


@pytest.mark.parametrize(
    "names", [("plain torchscript", "cps"), ("self_correcting linear", "plain pt2", "proto_seg prototype", "cpal cam")]
)
def test_plain_networks_and_the_methods_are_members_of_one_ensemble(
    tmp_path: Path, rng: np.random.Generator, names: tuple[str, ...]
) -> None:
    paths = [checkpoint(tmp_path / f"{name.replace(' ', '_')}.safetensors", name) for name in names]
    make_ensemble(paths, tmp_path / "all.safetensors")
    image = picture(rng, 64, 80)
    export_checkpoint(tmp_path / "all.safetensors", tmp_path / "store")
    with Segmenter.open(tmp_path / "store", threads=1, device="cpu", tuning=FIXED) as segmenter:
        prediction = segmenter.segment(image, SegmentOptions())
    with torch.inference_mode():
        mean_Khw = torch.cat([alone(path, image, (64, 80)) for path in paths]).mean(0)
    np.testing.assert_allclose(prediction.maps["confidence"], mean_Khw.amax(0), atol=2e-4)


def test_a_program_that_the_firsts_windows_do_not_suit_is_named_before_anything_is_written(tmp_path: Path) -> None:
    bound = program("torchscript", Placed().eval())
    network = PlainNetwork(PlainConfig(3, "torchscript", len(bound)))
    network.program.copy_(torch.frombuffer(bytearray(bound), dtype=torch.uint8))
    card = Card(
        "bound", 1, "plain", dataclasses.asdict(network.config), CLASSES, InputSpec(), WindowSpec(32, 48),
        network.sampling, Readout(),
    )  # fmt: skip
    save_checkpoint(tmp_path / "bound.safetensors", card, network)
    free, bound_path = checkpoint(tmp_path / "cps.safetensors", "cps"), tmp_path / "bound.safetensors"
    with pytest.raises(
        BadOption, match=r"bound cannot be run in windows of 80x64, those of cps \(.*; name it first, or"
    ):
        make_ensemble([free, bound_path], tmp_path / "all.safetensors")
    assert not (tmp_path / "all.safetensors").exists()
    assert make_ensemble([bound_path, free], tmp_path / "all.safetensors").window == WindowSpec(32, 48)
