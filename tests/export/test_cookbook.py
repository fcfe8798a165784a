"""The recipes of docs/extend/cookbook.md, run as they are written: each network answers as its own library does."""

import os
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from penumbra.serving.engine.options import SegmentOptions
from penumbra.serving.engine.runtime import Tuning
from penumbra.serving.engine.segmenter import Segmenter

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "extend" / "cookbook.md"
LIBRARIES, PEERS = Path(sys.prefix) / "libraries", Path(sys.prefix) / "peers"
MOST_FLIPS = 1e-4

PRELUDE = """
import numpy as np, torch
from torch import nn
from torch.nn import functional as F
torch.manual_seed(0)
pixels = torch.from_numpy(np.load("picture.npy")).float().permute(2, 0, 1)[None]
mean, std = torch.tensor([0.485, 0.456, 0.406])[:, None, None], torch.tensor([0.229, 0.224, 0.225])[:, None, None]
image = (pixels / 255 - mean) / std

def lively(network):  # of random weights: no two layers alike, so that labels differ from place to place
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.1), layer.running_var.uniform_(0.5, 1.5)
    return network.eval()

def expect(logits):
    np.save("expected.npy", F.interpolate(logits, pixels.shape[-2:], mode="bilinear").argmax(1)[0].numpy())

torch.set_grad_enabled(False)
"""
"""What a library does, in a process of its own: its network draws weights, saves them, and answers the picture."""

SMP = """
import segmentation_models_pytorch as smp
network = lively(smp.{name}(encoder_name="resnet18", encoder_weights=None, classes=5))
network.segmentation_head[0].bias -= network(image).mean((0, 2, 3))
state = {{"{prefix}" + name: tensor for name, tensor in network.state_dict().items()}}
torch.save({content}, "best.ckpt")
expect(network(image))
"""
LIGHTNING = '{"state_dict": state, "epoch": 3, "hyper_parameters": {"lr": 1e-3}, "pytorch-lightning_version": "2.5"}'
TRANSFORMERS = """
from transformers import {names}, SegformerImageProcessor
config = {config}
network = lively({kind}(config))
network.save_pretrained("{folder}")
SegformerImageProcessor(size={{"height": 256, "width": 256}}).save_pretrained("{folder}")
from transformers import {kind} as saved
expect(saved.from_pretrained("{folder}")(image).logits)
"""
NAMED = 'num_labels=5, id2label={k: f"class {k}" for k in range(5)}'
LIBRARIES_CASES = {
    "segmentation_models_pytorch": SMP.format(name="DeepLabV3Plus", prefix="model.", content=LIGHTNING),
    "segmentation_models_pytorch, compiled": SMP.format(name="Unet", prefix="_orig_mod.", content="state"),
    "torchvision": """
from torchvision.models.segmentation import deeplabv3_resnet50
network = lively(deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=21, aux_loss=True))
torch.save(network.state_dict(), "deeplabv3.pth")
expect(network(image)["out"])
""",
    "transformers: SegFormer": TRANSFORMERS.format(
        names="SegformerConfig, SegformerForSemanticSegmentation", kind="SegformerForSemanticSegmentation",
        config=f"SegformerConfig({NAMED})", folder="segformer-b0",
    ),
    "transformers: UperNet": TRANSFORMERS.format(
        names="ConvNextConfig, UperNetConfig, UperNetForSemanticSegmentation", kind="UperNetForSemanticSegmentation",
        config='UperNetConfig(backbone_config=ConvNextConfig(hidden_sizes=[16, 32, 64, 128], depths=[1, 1, 2, 1], '
        f'out_features=["stage1", "stage2", "stage3", "stage4"]), hidden_size=32, auxiliary_in_channels=64, {NAMED})',
        folder="upernet",
    ),
    "transformers: Mask2Former": """
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor, SwinConfig
swin = SwinConfig(image_size=256, embed_dim=24, depths=[1] * 4, num_heads=[1, 2, 2, 2], window_size=4,
    out_features=["stage1", "stage2", "stage3", "stage4"])
small = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 32,
    "dim_feedforward": 32, "encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 2, "num_queries": 6}
network = Mask2FormerForUniversalSegmentation(Mask2FormerConfig(backbone_config=swin, num_labels=5, **small)).eval()
network.class_predictor.weight.normal_()
for weight in [p for name, p in network.named_parameters() if "mask_embedder" in name or "mask_projection" in name]:
    weight.normal_(0, 0.2)
network.save_pretrained("mask2former")
processor = Mask2FormerImageProcessor(size={"height": 256, "width": 256})
processor.save_pretrained("mask2former")
network = Mask2FormerForUniversalSegmentation.from_pretrained("mask2former")
(labels,) = processor.post_process_semantic_segmentation(network(image), target_sizes=[(256, 256)])
np.save("expected.npy", labels.numpy())
""",
    "nnU-Net, 2-D": """
import json, os
import nnunet
kind = "dynamic_network_architectures.architectures.unet.PlainConvUNet"
features = {"n_stages": 4, "features_per_stage": [8, 16, 32, 32], "conv_op": "torch.nn.modules.conv.Conv2d",
    "kernel_sizes": [[3, 3]] * 4, "strides": [[1, 1]] + [[2, 2]] * 3, "n_conv_per_stage": [2] * 4,
    "n_conv_per_stage_decoder": [2] * 3, "conv_bias": True, "norm_op": "torch.nn.modules.instancenorm.InstanceNorm2d",
    "norm_op_kwargs": {"eps": 1e-05, "affine": True}, "dropout_op": None, "dropout_op_kwargs": None,
    "nonlin": "torch.nn.LeakyReLU", "nonlin_kwargs": {"inplace": True}}
named = ["conv_op", "norm_op", "dropout_op", "nonlin"]
plan = {"network_class_name": kind, "arch_kwargs": features, "_kw_requires_import": named}
os.makedirs("model/fold_0")
plans = {"configurations": {"2d": {"patch_size": [256, 256], "architecture": plan}}}
open("model/plans.json", "w").write(json.dumps(plans))
network = nnunet.unet("model", 1, 3).eval()
torch.save({"network_weights": network.state_dict(), "optimizer_state": {"state": {}}, "grad_scaler_state": None,
    "logging": {"ema_fg_dice": [np.float64(0.5)]}, "_best_ema": np.float32(0.5), "current_epoch": 1000,
    "init_args": {"plans": plans, "device": torch.device("cpu")}, "trainer_name": "nnUNetTrainer",
    "inference_allowed_mirroring_axes": (0, 1)}, "model/fold_0/checkpoint_final.pth")
grey = pixels.numpy()[:, :1]
expect(network(torch.from_numpy((grey - grey.mean()) / grey.std())))
""",
}  # fmt: skip


def recipe(title: str) -> tuple[dict[str, str], list[str]]:
    """The files of a case, by their names, and its commands, as the page shows them."""
    (section,) = re.findall(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    blocks = [
        re.sub("^ {4}", "", block, flags=re.MULTILINE) for block in re.findall(r"(?:^(?: {4}.*)?\n)+", section, re.M)
    ]
    code = {block.split()[1]: block for block in map(str.strip, blocks) if block.startswith("# ")}
    return code, [block for block in map(str.strip, blocks) if block.startswith("penumbra ")]


def in_python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a folder that has the libraries beside our own environment, and their operators' names.

    Wheels of torchvision are built for a torch with CUDA. Beside one without, their operators do not load, which no
    network here needs, and then the import of torchvision fails unless their names are there.
    """
    (folder / "sitecustomize.py").write_text(
        "import os, torch\n"
        f"if os.path.isdir({str(LIBRARIES / 'torchvision')!r}) and not torch.version.cuda:\n"
        "    for name in ('nms', 'qnms'):\n"
        "        torch.library.define(f'torchvision::{name}', '(Tensor a, Tensor b, float c) -> Tensor')\n"
    )
    paths = os.pathsep.join(map(str, (folder, ROOT, PEERS, LIBRARIES)))
    environment = os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


def prepare(folder: Path, code: str = "", *, bands: int = 3, side: int = 256) -> NDArray[np.uint8]:
    """Draw a picture; and let the library, if there is one, make its files and its labels."""
    y, x = np.mgrid[0:side, 0:side] / 20
    waves = np.stack([np.sin(x * (k + 1) / 2) * np.cos(y + k) for k in range(bands)], -1)
    noise = np.random.default_rng(0).normal(0, 12, waves.shape)
    picture = (120 + 90 * waves + noise).clip(0, 255).astype(np.uint8)
    np.save(folder / "picture.npy", picture)
    (folder / "names.txt").write_text("".join(f"class {k}\n" for k in range(5)))
    if code:
        done = in_python(folder, "-c", PRELUDE + code)
        assert done.returncode == 0, done.stderr[-2000:]
    return picture


def cook(folder: Path, title: str, *more: str, change: dict[str, str] | None = None) -> str:
    """Write the files of a case and run its command; returns what it says."""
    files, (command,) = recipe(title)
    for name, content in files.items():
        (folder / name).write_text(content)
    for old, new in (change or {}).items():
        assert old in command
        command = command.replace(old, new)
    done = in_python(folder, "-m", *shlex.split(command), *more)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def labels(folder: Path, picture: NDArray[np.uint8]) -> NDArray[np.integer]:
    (model,) = (folder / "store").iterdir()
    with Segmenter.open(folder / "store", threads=1, tuning=Tuning(1, 1)) as segmenter:
        return segmenter.segment(picture, SegmentOptions(model=model.name)).labels_HW


def check(labels_HW: NDArray[np.integer], expected_HW: NDArray[np.integer]) -> None:
    assert len(np.unique(expected_HW)) > 1
    assert np.mean(labels_HW != expected_HW) <= MOST_FLIPS


# -- with the library itself ----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not LIBRARIES.exists(), reason="needs the libraries: make .venv/libraries")
@pytest.mark.parametrize("case", LIBRARIES_CASES)
def test_a_librarys_network_answers_as_the_library_does(case: str, tmp_path: Path) -> None:
    title = case.removesuffix(", compiled")
    files, _ = recipe(title)
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    bands = 1 if "nnU-Net" in case else 3
    picture = prepare(tmp_path, LIBRARIES_CASES[case], bands=bands)
    change = {"DeepLabV3Plus": "Unet"} if case.endswith("compiled") else None
    if bands == 1:
        (tmp_path / "names.txt").write_text("background\norgan\ntumour\n")
    cook(tmp_path, title, "--sampling", "none", change=change)
    check(labels(tmp_path, picture), np.load(tmp_path / "expected.npy"))


@pytest.mark.slow
@pytest.mark.skipif(not LIBRARIES.exists(), reason="needs the libraries: make .venv/libraries")
def test_the_dropout_of_a_librarys_network_becomes_samples_unless_none_are_wanted(tmp_path: Path) -> None:
    prepare(tmp_path, LIBRARIES_CASES["segmentation_models_pytorch"])
    said = cook(tmp_path, "segmentation_models_pytorch")
    assert "is a mask of 256 channels" in said and "dropout, 8 samples" in said


# -- with a stand-in, or what a package has -------------------------------------------------------


def test_a_network_of_ones_own_answers_as_torch_does(tmp_path: Path) -> None:
    picture = prepare(tmp_path, side=64)
    picture = np.concatenate([picture, picture[:, :32]], axis=1)
    (tmp_path / "names.txt").write_text("road\nsky\ncar\n")
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Dropout2d(0.2), nn.Conv2d(8, 3, 1)).eval()
    torch.save({f"body.{name}": tensor for name, tensor in body.state_dict().items()}, tmp_path / "ours.pth")
    cook(tmp_path, "A network of your own", "--sampling", "none")
    image = (torch.from_numpy(picture).permute(2, 0, 1)[None] / 255 - 0.5) / 0.25
    with torch.inference_mode():
        logits = nn.functional.interpolate(body(image), (64, 96), mode="bilinear")
    check(labels(tmp_path, picture), logits.argmax(1)[0].numpy())


STAND_IN = """
import torch
from torch import nn
class EncoderDecoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone, self.decode_head = nn.Conv2d(3, 8, 3, 4, 1), nn.Conv2d(8, 19, 1)
        self.auxiliary_head = nn.Conv2d(8, 19, 1)
    def forward(self, inputs, data_samples=None, mode="tensor"):
        assert mode == "tensor"
        return self.decode_head(self.backbone(inputs).relu())
def init_model(config, checkpoint=None, device="cuda:0"):
    assert config.endswith(".py") and checkpoint is None and device == "cpu"
    return EncoderDecoder().eval()
"""
"""Has what the recipe asks of mmseg.apis, and a segmentor's names of tensors."""


@pytest.mark.slow
def test_a_checkpoint_of_mmsegs_layout_is_read_by_the_users_own_module(tmp_path: Path) -> None:
    (tmp_path / "mmseg").mkdir()
    (tmp_path / "mmseg" / "__init__.py").write_text("")
    (tmp_path / "mmseg" / "apis.py").write_text(STAND_IN)
    save = """
from mmseg.apis import init_model
network = init_model("x.py", device="cpu")
torch.save({"meta": {"epoch": 3, "dataset_meta": {"classes": ("road",)}}, "state_dict": network.state_dict(),
    "message_hub": {}, "optimizer": {"state": {}, "param_groups": []}}, "iter_160000.pth")
norm = torch.tensor([[123.675, 116.28, 103.53], [58.395, 57.12, 57.375]])[:, :, None, None]
expect(network((pixels - norm[0]) / norm[1]))
"""
    picture = prepare(tmp_path, save, side=512)
    cook(tmp_path, "mmsegmentation")
    check(labels(tmp_path, picture), np.load(tmp_path / "expected.npy"))


def yolo(path: Path, *, instances: bool = False) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Write a graph that takes and gives what ultralytics' exports do; returns the weights of its one layer."""
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(3, 3, 1, 1)).astype(np.float32)
    bias = rng.normal(0, 0.1, 3).astype(np.float32)
    nodes = [helper.make_node("Conv", ["images", "weight", "bias"], ["logits"])]
    constants = [numpy_helper.from_array(weight, "weight"), numpy_helper.from_array(bias, "bias")]
    if instances:
        constants += [
            numpy_helper.from_array(np.array([1, 3, -1]), "flat"),
            numpy_helper.from_array(np.array([1, 3, 64, 64]), "proto"),
        ]
        nodes += [helper.make_node("Reshape", ["logits", "flat"], ["output0"]),
                  helper.make_node("Reshape", ["logits", "proto"], ["output1"])]  # fmt: skip
        outputs = {"output0": TensorProto.FLOAT, "output1": TensorProto.FLOAT}
    else:
        nodes += [helper.make_node("ArgMax", ["logits"], ["classes"], axis=1, keepdims=0),
                  helper.make_node("Cast", ["classes"], ["output0"], to=TensorProto.UINT8)]  # fmt: skip
        outputs = {"output0": TensorProto.UINT8}
    graph = helper.make_graph(
        nodes, "yolo", [helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, 64, 64])],
        [helper.make_tensor_value_info(name, kind, None) for name, kind in outputs.items()], constants,
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    for key, value in {"task": "semantic", "imgsz": "[64, 64]", "names": "{0: 'road', 1: 'sky', 2: 'car'}"}.items():
        model.metadata_props.add(key=key, value=value)
    onnx.save(model, path)
    return weight, bias


@pytest.mark.slow
def test_the_onnx_of_ultralytics_semantic_models_is_taken_before_its_argmax(tmp_path: Path) -> None:
    picture = prepare(tmp_path, side=64)
    weight, bias = yolo(tmp_path / "yolo26n-sem.onnx")
    refused = in_python(tmp_path, "-m", "penumbra", "import", "onnx", "yolo26n-sem.onnx", "--input", "mean=0 std=1")
    assert refused.returncode == 1 and "add --tensor logits" in refused.stderr
    cook(tmp_path, "ultralytics")
    logits = np.einsum("kc,hwc->khw", weight[:, :, 0, 0], picture.astype(np.float32) / 255) + bias[:, None, None]
    check(labels(tmp_path, picture), logits.argmax(0))
    yolo(tmp_path / "yolo26n-seg.onnx", instances=True)
    refused = in_python(tmp_path, "-m", "penumbra", "import", "onnx", "yolo26n-seg.onnx", "--input", "mean=0 std=1")
    assert refused.returncode == 1 and "logits or probabilities [B, K, h, w] are wanted" in refused.stderr


@pytest.mark.slow
@pytest.mark.skipif(not (PEERS / "ukis_csmask").exists(), reason="needs ukis-csmask: make .venv/peers")
def test_the_recipe_of_csmask_is_a_command_that_runs(tmp_path: Path) -> None:
    package = PEERS / "ukis_csmask"
    (tmp_path / "model_4b_l2a.onnx").symlink_to(package / "model_4b_l2a.onnx")
    (tmp_path / "csmask.txt").write_text("clear\ncloud\nshadow\n")
    said = '{"bands": ["blue", "green", "red", "nir"], "mean": [0.2, 0.2, 0.2, 0.3], "std": 0.2, "dtype": "float32"}'
    (tmp_path / "csmask.json").write_text(said)
    assert "csmask.safetensors: plain, 3 classes" in cook(tmp_path, "ukis-csmask")


@pytest.mark.slow
@pytest.mark.skipif(
    not (PEERS / "mouse_pupil_analysis").exists(), reason="needs mouse-pupil-analysis: make .venv/peers"
)
def test_the_labels_of_mouse_pupil_analysis_are_its_own(tmp_path: Path) -> None:
    (weights,) = (PEERS / "mouse_pupil_analysis" / "checkpoints").glob("*.pth")
    (tmp_path / "pupil.pth").symlink_to(weights)
    answer = """
from mouse_pupil_analysis.unet import UNet
network = UNet(use_attention=True)
content = torch.load("pupil.pth", map_location="cpu")
network.load_state_dict(content.get("model_state_dict", content.get("state_dict", content)))
np.save("expected.npy", network.eval()(pixels / 255)[0, 0].gt(0).numpy())
"""
    picture = prepare(tmp_path, answer, bands=1, side=148)
    cook(tmp_path, "mouse-pupil-analysis")
    check(labels(tmp_path, picture), np.load(tmp_path / "expected.npy"))


# -- the page -------------------------------------------------------------------------------------


def test_every_case_of_the_page_is_one_command() -> None:
    titles = re.findall(r"^## (.+)$", PAGE.read_text(), re.MULTILINE)
    assert len(titles) == 11
    assert all(len(recipe(title)[1]) == 1 for title in titles)
    assert all(command.count("\n") == 0 for title in titles for command in recipe(title)[1])


def test_ultralytics_is_no_dependency() -> None:
    assert find_spec("ultralytics") is None
    assert "ultralytics" not in (ROOT / "pyproject.toml").read_text() + (ROOT / "Makefile").read_text()
