"""A tiny network as the program of every form, as other people's exporters write it: B, height and width free."""

import io
import warnings
from functools import cache

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F

from penumbra.models.plain.dropout import mask_dropouts
from penumbra.models.plain.programs import read_pt2


class Tiny(nn.Module):
    """Stride 2, its answer in a dict, as torchvision's segmentation networks have it; dropout is off at export."""

    def __init__(self, channels: int = 3, num_classes: int = 3, *, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, 8, 3, stride=2, padding=1)
        self.drop = nn.Dropout2d(0.2)
        self.second = nn.Conv2d(8, num_classes, 3, padding=1)
        self.activation = activation or nn.Identity()

    def forward(self, image_BChw: Tensor) -> dict[str, Tensor]:
        logits_BKhw = self.second(self.drop(F.relu(self.first(image_BChw))))
        return {"aux": image_BChw, "out": self.activation(logits_BKhw)}


class Answer(nn.Module):
    """The answer alone: what ONNX exports of such networks give."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image_BChw: Tensor) -> Tensor:
        answer: Tensor = self.network(image_BChw)["out"]
        return answer


def seeded_tiny(seed: int = 0, **options: object) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = Tiny(**options).eval()  # type: ignore[arg-type]
        nn.init.normal_(network.second.weight, std=0.5)
    return network


def named(prefix: str, seed: int = 1) -> dict[str, Tensor]:
    """Its tensors, with something before their names."""
    return {f"{prefix}{name}": tensor for name, tensor in seeded_tiny(seed).state_dict().items()}


def program(form: str, network: nn.Module, *, channels: int = 3, axes: tuple[int, ...] = (0, 2, 3)) -> bytes:
    """Export a network. axes: which of the picture's are free."""
    example, buffer = torch.randn(2, channels, 32, 48), io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        if form == "torchscript":
            torch.jit.save(torch.jit.trace(network, (example,), strict=False), buffer)  # type: ignore[no-untyped-call]
        elif form == "pt2":
            free = (dict.fromkeys(axes, Dim.DYNAMIC),)
            torch.export.save(torch.export.export(network, (example,), dynamic_shapes=free), buffer)
        else:
            names = {"image": {axis: f"axis{axis}" for axis in axes}}
            kwargs = {"input_names": ["image"], "output_names": ["logits"], "dynamic_axes": names}
            torch.onnx.export(Answer(network), (example[: 2 if 0 in axes else 1],), buffer, dynamo=False, **kwargs)
    return buffer.getvalue()


@cache
def masked_program(seed: int = 0) -> bytes:
    """The program of torch.export whose dropout is an input."""
    brought, buffer = read_pt2(tiny_program("pt2", seed)), io.BytesIO()
    torch.export.save(mask_dropouts(brought, torch.randn(2, 3, 32, 48)).program, buffer)
    return buffer.getvalue()


@cache
def tiny_program(form: str, seed: int = 0) -> bytes:
    """One of as many bytes for every seed, though every trace of TorchScript has other names in it."""
    written = program(form, seeded_tiny(seed))
    return written.ljust(2**15, b"\0") if form == "torchscript" else written
