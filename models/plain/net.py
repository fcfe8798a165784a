"""A network that is a program: its bytes are the only tensor of its checkpoint, and it is loaded when it first runs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from penumbra.models.card import Sampling
from penumbra.models.contract import Features, Network
from penumbra.models.plain.dropout import sampling_of
from penumbra.models.plain.programs import load_program

FORMATS = {"onnx": ("onnx", "openvino"), "torchscript": ("torchscript",), "pt2": ()}
"""What a program can be exported as, by its form: torch cannot run ONNX, and torch.export no TorchScript."""
LEAST = 1e-30
"""Least probability whose logarithm is taken."""


@dataclass(frozen=True, slots=True)
class PlainConfig:
    """What the program is. output: what it gives, K channels of logits or of probabilities, or a single one.

    masks: of a program that takes masks of its dropouts beside the picture; how many channels in turn have which keep
    rate.
    """

    num_classes: int
    form: Literal["onnx", "torchscript", "pt2"]
    num_bytes: int
    output: Literal["logits", "probabilities", "sigmoid", "sigmoid logit"] = "logits"
    masks: tuple[tuple[int, float], ...] = ()


class PlainNetwork(Network):
    """encode runs the program, and decode makes logits of its answer, the one sample that there is; or, where it takes
    masks, each runs its part of it.

    A module that holds a loaded program, `body`, is no part of the state: its weights are in the program's bytes.
    """

    body: nn.Module | None

    def __init__(self, config: PlainConfig) -> None:
        super().__init__()
        self.config = config
        self.sampling = sampling_of(config.masks) if config.masks else Sampling()
        self.program = nn.Buffer(torch.zeros(config.num_bytes, dtype=torch.uint8))
        self.register_module("body", None)
        self.formats = FORMATS[config.form]

    def encode(self, image_BChw: Tensor) -> Features:
        if self.config.masks:
            return self.load().get_submodule("encode")(image_BChw)  # type: ignore[no-any-return]
        return (self.load()(image_BChw),)

    def decode(self, features: Features, noise_SBL: Tensor) -> Tensor:
        if self.config.masks:
            return as_logits(self.load().get_submodule("decode")(*features, noise_SBL), self.config.output)
        return as_logits(torch.stack(features), self.config.output)

    def load(self) -> nn.Module:
        """Load the program, unless it is. Raises BadCheckpoint: it does not load here, or it would unpickle code."""
        if self.body is None:
            with torch.inference_mode(False), torch.no_grad():
                self.body = load_program(self.config.form, self.as_bytes())
        return self.body

    def as_bytes(self) -> bytes:
        """Return the program as it was brought."""
        return self.program.cpu().numpy().tobytes()

    def train(self, mode: bool = True) -> Self:
        """Leave the program as it was exported, which is for answering."""
        self.training = mode
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_modules": {"body": None}}  # a copy loads the program for itself

    def state_dict(self, *arguments: Any, **options: Any) -> Any:
        body, self.body = self.body, None
        try:
            return super().state_dict(*arguments, **options)
        finally:
            self.body = body

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.load()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


def as_logits(answer_Khw: Tensor, output: str) -> Tensor:
    """Give logits whose softmax are the answer's probabilities: of one channel, a sigmoid's, [0, z] of two classes.

    There may be any axes in front of those of the answer.
    """
    if output == "logits":
        return answer_Khw
    if output == "sigmoid logit":
        return torch.cat((torch.zeros_like(answer_Khw), answer_Khw), dim=-3)
    prob_Khw = answer_Khw.to(torch.promote_types(answer_Khw.dtype, torch.float32))
    if output == "sigmoid":
        prob_Khw = torch.cat((1 - prob_Khw, prob_Khw), dim=-3)
    return prob_Khw.clamp_min(LEAST).log()
