"""Cut a network into the graphs of its export: encode, decode and, where it takes one, prompt."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from penumbra.models.card import Card
from penumbra.models.contract import Features, Network, Prompt
from penumbra.models.errors import BadOption, first_line
from penumbra.serving.engine.backends import DTYPES
from penumbra.serving.engine.runtime import SIZES
from penumbra.serving.engine.store import Golden

BEST_WINDOWS, BEST_SAMPLES = 8, 8
"""What an engine is tuned for, where B and S are free."""
WHOLE_WINDOWS, WHOLE_SIZES, CLIPPED_SIZES = 4, (1 / 4, 4, 16), (1 / 8, 1, 1)
"""Most images seen whole (a tensor of TensorRT has fewer than 2^31 values), and least, best and most sides over the
example's, of those and of windows that are clipped at the border."""


@dataclass(frozen=True, slots=True)
class Part:
    """One graph: a module that takes and gives float32, whatever it computes in, and two calls of it.

    Features are in the network's own precision. Axes are free where the sizes of `example` and `other` differ: B
    always, S for draws, the members where a prompt changes them, and the window where the card leaves it open.
    """

    name: str
    module: nn.Module
    example: tuple[Any, ...]
    other: tuple[Any, ...]

    def program(self) -> ExportedProgram:
        """Trace the part by torch.export, with the free axes. Raises BadOption where an axis is not really free."""
        free = pytree.tree_map(_free_axes, self.example, self.other)
        try:
            return torch.export.export(self.module, self.example, dynamic_shapes=free)
        except (ValueError, torch._dynamo.exc.UserError) as error:
            raise BadOption(f"{self.name} cannot be exported for every size: {first_line(error)}") from None

    def ranges(self, position: int, card: Card) -> list[tuple[int, int, int]]:
        """Give least, best and most of every axis of an input: what an engine is built for.

        B is the first axis, of noise_SBL the second. Of the others S, height and width are free, and members.
        """
        example, other = (pytree.tree_leaves(call)[position] for call in (self.example, self.other))
        is_noise = self.name == "decode" and position == len(pytree.tree_leaves(self.example)) - 1
        is_clipped = card.window.height > 0
        max_windows, sizes = (max(SIZES), CLIPPED_SIZES) if is_clipped else (WHOLE_WINDOWS, WHOLE_SIZES)
        samples, found = card.sampling.default_samples, []
        for axis, pair in enumerate(zip(example.shape, other.shape, strict=True)):
            least, most = min(pair), max(pair)
            if least == most:
                found.append((least, least, least))
            elif axis == int(is_noise):
                found.append((1, min(BEST_WINDOWS, max_windows), max_windows))
            elif is_noise:
                found.append((1, samples, max(samples, BEST_SAMPLES)))
            elif is_open(card) and axis >= example.ndim - 2:
                least, best, most = (max(1, int(most * times)) for times in sizes)
                found.append((least, best, most))
            else:
                found.append((least, most, most))
        return found


def _free_axes(example: Tensor, other: Tensor) -> tuple[Any, ...]:
    pairs = zip(example.shape, other.shape, strict=True)
    return tuple(Dim.STATIC if size == other_size else Dim.DYNAMIC for size, other_size in pairs)


class _Part(nn.Module):
    def __init__(self, network: Network, dtype: torch.dtype) -> None:
        super().__init__()
        self.network, self.dtype = network, dtype

    def own(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(x if x.dtype == self.dtype else x.to(self.dtype) for x in tensors)

    def shown(self, features: Features) -> Features:
        """Return the features with the extra maps in float32, for whoever reads them."""
        return (*features[:-1], features[-1].float()) if self.network.extra_maps else features


class _Encode(_Part):
    def forward(self, image_B3hw: Tensor) -> Features:
        return self.shown(self.network.encode(*self.own((image_B3hw,))))


class _TakePrompt(_Part):
    def forward(self, image_B3hw: Tensor, features: Features, prompt: Prompt) -> Features:
        (image_B3hw,) = self.own((image_B3hw,))
        return self.shown(self.network.take_prompt(image_B3hw, self.own(features), self.own(prompt)))


class _Decode(_Part):
    def forward(self, features: Features, noise_SBL: Tensor) -> Tensor:
        return self.network.decode(self.own(features), *self.own((noise_SBL,))).float()


@torch.no_grad()
def cut(network: Network, card: Card, golden: Golden, *, precision: str, device: torch.device) -> list[Part]:
    """Cut a copy of the network, channels-last, on a device, into parts; the golden windows are their example."""
    dtype = DTYPES[precision]
    network = copy.deepcopy(network).to(device, dtype).eval()
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    encode, take_prompt, decode = (kind(network, dtype).eval() for kind in (_Encode, _TakePrompt, _Decode))
    calls = []
    for num_windows, size in ((2, 1), (1, 2)) if is_open(card) else ((2, 1), (1, 1)):
        crop = tuple(length // size for length in golden.image_B3hw.shape[2:])
        image_B3hw = _crop(golden.image_B3hw, num_windows, crop).to(device, memory_format=torch.channels_last)
        features = encode(image_B3hw)
        fewer = num_windows == 1 and card.sampling.is_stochastic  # S is free
        noise_SBL = golden.plain.noise_SBL[: 2 if fewer else None, :num_windows]
        calls.append({"encode": (image_B3hw,), "decode": (features, noise_SBL.to(device))})
        if golden.prompted:
            prompt = tuple(_crop(p, num_windows, crop).to(device) for p in golden.prompt)
            calls[-1]["prompt"] = (image_B3hw, features, prompt)
            if num_windows == 2:  # members that a prompt adds are an axis of its features
                prompted = take_prompt(*calls[-1]["prompt"])
                calls[-1]["decode"] = (prompted, golden.prompted.noise_SBL.to(device))
    modules = {"encode": encode, "decode": decode, "prompt": take_prompt}
    example, other = (pytree.tree_map(torch.clone, call) for call in calls)  # views would be exported as such
    return [Part(name, modules[name], example[name], other[name]) for name in example]


def is_open(card: Card) -> bool:
    """Tell whether the size of windows differs from image to image."""
    return card.window.height == 0 or card.window.last == "clip"


def _crop(tensor: Tensor, num_windows: int, size: tuple[int, ...]) -> Tensor:
    """Take the first windows, and of pictures the first rows and columns."""
    few = tensor[:num_windows]
    return few if few.dim() < 4 else few[:, :, : size[0], : size[1]]
