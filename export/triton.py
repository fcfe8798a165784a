"""An artifact becomes a Triton model repository: its graphs as models, and ensembles that lead from pixels to maps.

    NAME_encode       image (uint8) -> features
    NAME_decode       features, noise -> decoded
    NAME_prompted     image, features, prompt, noise -> decoded        where the network takes a prompt
    NAME_read_out     image, decoded -> labels, maps of uncertainty, shares of the classes, logits; one of its own
                      where a prompt brings other maps
    NAME, NAME_with_boxes, NAME_with_tags     the ensembles of these

Maps are those of `Card.maps` but for `seam`: a window alone has none. The samples of a network that draws are counted
at each call, so of one sample its mutual information is 0.
Triton batches along the first axis only, so noise and logits are [B, S, ...] here, and S may differ from call to call.
"""

import os
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from google.protobuf import text_format
from torch import Tensor, nn
from torch.nn import functional as F
from tritonclient.grpc import model_config_pb2 as pb

from penumbra.export.bundle import export_checkpoint
from penumbra.export.golden import golden_image, golden_prompt
from penumbra.export.readout import Normalise, check_read_out, moments
from penumbra.export.torchscript import save_script
from penumbra.models.card import Card, Sampling, dump_card
from penumbra.models.contract import Features
from penumbra.models.errors import BadOption
from penumbra.models.files import drafted, writing
from penumbra.serving.engine.moments import resize
from penumbra.serving.engine.store import CARD, Artifact, find_artifact, open_artifact

MAX_BATCH = 8
"""Windows that Triton may join into one call; to be changed in config.pbtxt."""
MAX_DELAY_US = 1000
"""How long Triton waits for windows to join."""
LABELS = "labels.txt"
DTYPES = {torch.float32: pb.TYPE_FP32, torch.uint8: pb.TYPE_UINT8, torch.int16: pb.TYPE_INT16}
PROMPTS = {"boxes": ("boxes", "alpha"), "tags": ("tags",)}

Tensors = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Graph:
    """Describes one model of the repository; inputs and outputs are named as in the ensembles."""

    name: str
    module: nn.Module
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class _Encode(nn.Module):
    """Turns pixels image_BHWC into features."""

    def __init__(self, normalise: Normalise, encode: nn.Module) -> None:
        super().__init__()
        self.normalise, self.encode = normalise, encode

    def forward(self, image_BHWC: Tensor) -> Features:
        return tuple(feature.contiguous() for feature in self.encode(self.normalise(image_BHWC)))


class _Decode(nn.Module):
    """Turns features one by one and noise_BSL, for members and single passes without noise, into logits_BSKhw."""

    def __init__(self, decode: nn.Module, sampling: Sampling) -> None:
        super().__init__()
        self.decode, self.num_samples = decode, sampling.default_samples
        self.noise = ("noise",) * bool(sampling.noise_length)

    def forward(self, *tensors: Tensor) -> Tensor:
        if self.noise:
            features, noise_SBL = tensors[:-1], tensors[-1].transpose(0, 1)
        else:
            features, noise_SBL = tensors, tensors[0].flatten(1)[:, :0].expand(self.num_samples, -1, -1)
        logits_SBKhw: Tensor = self.decode(tuple(map(_channels_last, features)), noise_SBL)
        return logits_SBKhw.transpose(0, 1).contiguous()


class _Prompted(nn.Module):
    """Turns the image, the prompt (its `alpha` [B, 1]) and what `_Decode` takes into logits_BSKhw."""

    def __init__(
        self, normalise: Normalise, take_prompt: nn.Module, decode: _Decode, *, num_prompts: int, num_features: int
    ) -> None:
        super().__init__()
        self.normalise, self.take_prompt, self.decode = normalise, take_prompt, decode
        self.num_prompts, self.num_features = num_prompts, num_features

    def forward(self, image_BHWC: Tensor, *tensors: Tensor) -> Tensor:
        prompts, rest = tensors[: self.num_prompts], tensors[self.num_prompts :]
        features, noise = rest[: self.num_features], rest[self.num_features :]
        prompt = (prompts[0], *(alpha_B1.squeeze(1) for alpha_B1 in prompts[1:]))
        prompted = self.take_prompt(self.normalise(image_BHWC), tuple(map(_channels_last, features)), prompt)
        logits_BSKhw: Tensor = self.decode(*prompted, *noise)
        return logits_BSKhw


class _ReadOut(nn.Module):
    """Reads out one window alone as `penumbra.serving.engine.moments` and `uncertainty` do, by the card's rules.

    The logits pass through, for who wants other maps: a Triton ensemble (2.51) whose output is also a step's input
    answers only those who ask for it.
    """

    def __init__(self, card: Card, num_samples: int) -> None:
        super().__init__()
        self.readout = card.readout
        maps = (name for name in card.maps(num_samples) if name != "seam")
        self.outputs = ("labels", *maps, "shares", "logits")
        self.own = [extra.name for extra in card.extra_maps]

    def forward(self, image_BHWC: Tensor, logits_BSKhw: Tensor, *extras_BEhw: Tensor) -> tuple[Tensor, ...]:
        size = image_BHWC.shape[1:3]
        prob_BKHW, expected_BHW = moments(logits_BSKhw, size, self.readout)
        entropy_BHW = -torch.special.xlogy(prob_BKHW, prob_BKHW).sum(1)
        confidence_BHW, second_BHW = F.pad(prob_BKHW, (0, 0, 0, 0, 0, 1)).topk(2, dim=1).values.unbind(1)
        own = [resized for extras in extras_BEhw for resized in resize(extras, size, self.readout).unbind(1)]
        answer = {
            "labels": prob_BKHW.max(1).indices.to(torch.uint8), "confidence": confidence_BHW,
            "margin": confidence_BHW - second_BHW, "entropy": entropy_BHW, "expected_entropy": expected_BHW,
            "mutual_information": (entropy_BHW - expected_BHW).clamp(min=0), "shares": prob_BKHW.mean((2, 3)),
            "logits": logits_BSKhw, **dict(zip(self.own, own, strict=True)),
        }  # fmt: skip
        return tuple(answer[name] for name in self.outputs)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


def export_repository(source: str, store: Path, repository: Path) -> list[str]:
    """Add a model to a Triton repository; returns the names it has there.

    source: a name in the store, or a checkpoint file, which is exported and proved first. Raises BadOption (the
    artifact is not float32 TorchScript, or the repository has the model already) and as `export_checkpoint`; nothing
    is written then.
    """
    if not Path(source).is_file():
        return write_repository(open_artifact(find_artifact(store, source)), repository)
    with tempfile.TemporaryDirectory() as folder:
        return write_repository(
            open_artifact(export_checkpoint(Path(source), Path(folder), backend="torchscript")), repository
        )


def write_repository(artifact: Artifact, repository: Path) -> list[str]:
    """Add an artifact as `export_repository` does."""
    card = artifact.card
    assert card.export
    if (card.export.backend, card.export.precision) != ("torchscript", "fp32"):
        raise BadOption(
            f"{card.name} is exported for {card.export.backend} {card.export.precision}; a Triton repository is made "
            "of torchscript fp32: give the checkpoint instead"
        )
    if card.input.dtype == "uint16":
        raise BadOption(
            f"{card.name} reads uint16, and Triton's backend for TorchScript takes no such tensor; int16 is one"
        )
    check_read_out(card, "Triton")
    with drafted(repository) as draft:
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torch.jit.*deprecated", category=DeprecationWarning)
            warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)  # type: ignore[attr-defined]
            with writing(repository, draft):
                _write(artifact, draft)
        names = sorted(path.name for path in draft.iterdir())
        for name in names:
            if os.path.lexists(repository / name):
                raise BadOption(f"{repository} has a model {name} already; remove it, or choose another directory")
        for name in names:
            os.replace(draft / name, repository / name)
    return names


def _write(artifact: Artifact, draft: Path) -> None:
    card = artifact.card
    chains = _chains(artifact)
    runs = [_run(chain, example) for chain in chains.values() for example in _examples(card)]
    for graph in {graph.name: graph for chain in chains.values() for graph in chain}.values():
        config = _config(graph, runs)
        place = _place(config, card, draft)
        run = next(run for run in runs if run.keys() >= set(graph.inputs))
        example = tuple(run[name] for name in graph.inputs)
        traced = torch.jit.trace(graph.module, example, check_trace=False)  # type: ignore[no-untyped-call]
        save_script(traced, place / "model.pt")
    for name, chain in chains.items():
        shutil.copy(artifact.directory / CARD, _place(_ensemble_config(name, chain, card, runs), card, draft))


def _chains(artifact: Artifact) -> dict[str, tuple[Graph, ...]]:
    """Return the ensembles by name, each as the graphs that a window goes through."""
    card, name = artifact.card, artifact.card.name
    parts = ("encode", "decode") + ("prompt",) * (card.prompt.kind != "none")
    encode, decode, *prompt = (torch.jit.load(artifact.directory / f"{part}.ts", "cpu") for part in parts)  # type: ignore[no-untyped-call]
    features = tuple(f"feature_{i}" for i in range(len(encode(artifact.golden.image_B3hw))))
    normalise = Normalise(card.input)
    first = Graph(f"{name}_encode", _Encode(normalise, encode), ("image",), features)

    def read_out(num_samples: int, *, of: str) -> Graph:
        module = _ReadOut(card, num_samples)
        return Graph(f"{of}_read_out", module, ("image", "decoded", *features[-1:] * bool(module.own)), module.outputs)

    last = read_out(card.sampling.default_samples, of=name)
    half = _Decode(decode, card.sampling)
    middle = Graph(f"{name}_decode", half, (*features, *half.noise), ("decoded",))
    chains: dict[str, tuple[Graph, ...]] = {name: (first, middle, last)}
    if prompt:
        prompts = PROMPTS[card.prompt.kind][: 1 if card.prompt.alpha is None else 2]
        half = _Decode(decode, card.sampling_with(prompt=True))
        module = _Prompted(normalise, prompt[0], half, num_prompts=len(prompts), num_features=len(features))
        middle = Graph(f"{name}_prompted", module, ("image", *prompts, *features, *half.noise), ("decoded",))
        prompted = f"{name}_with_{card.prompt.kind}"
        other = read_out(card.sampling_with(prompt=True).default_samples, of=prompted)
        chains[prompted] = (first, middle, last if last.outputs == other.outputs else other)
    return chains


def _examples(card: Card) -> list[Tensors]:
    """Make two inputs of the ensembles that differ in every size that may differ."""
    golden_BCHW = golden_image(card)
    examples, dtype = [], getattr(torch, card.input.dtype)
    for num_windows, num_samples, cut in ((2, 3, 0), (1, 2, 0 if card.window.height else 32)):
        height, width = (size - cut for size in golden_BCHW.shape[2:])
        image_BCHW = golden_BCHW[:num_windows, :, :height, :width]
        example = {
            "image": (image_BCHW.permute(0, 2, 3, 1) * 40 + 128).clamp(0, 255).to(dtype).contiguous(),
            "noise": torch.ones(num_windows, num_samples, card.sampling.noise_length),
        }
        if card.prompt.kind != "none":
            prompt = (x[:, None] if x.ndim == 1 else x for x in golden_prompt(card, image_BCHW))
            example |= dict(zip(PROMPTS[card.prompt.kind], prompt, strict=False))
        examples.append(example)
    return examples


def _run(chain: Sequence[Graph], example: Tensors) -> Tensors:
    """Return every tensor on the way from an example to the maps."""
    tensors = dict(example)
    for graph in chain:
        answer = graph.module(*(tensors[name] for name in graph.inputs))
        tensors |= dict(zip(graph.outputs, (answer,) if isinstance(answer, Tensor) else answer, strict=True))
    return tensors


def _config(graph: Graph, runs: Sequence[Tensors]) -> pb.ModelConfig:
    config = pb.ModelConfig(name=graph.name, platform="pytorch_libtorch", max_batch_size=MAX_BATCH)
    for tensors, names in ((config.input, graph.inputs), (config.output, graph.outputs)):
        for i, name in enumerate(names):
            _declare(tensors, name, runs, alias=_numbered(i, name))
    config.dynamic_batching.max_queue_delay_microseconds = MAX_DELAY_US
    config.parameters["INFERENCE_MODE"].string_value = "true"
    return config


def _ensemble_config(name: str, chain: Sequence[Graph], card: Card, runs: Sequence[Tensors]) -> pb.ModelConfig:
    """Configure an ensemble: its inputs are what no graph makes, its outputs what the last one makes."""
    config = pb.ModelConfig(name=name, platform="ensemble", max_batch_size=MAX_BATCH)
    internal = {output for graph in chain for output in graph.outputs}
    for tensor in dict.fromkeys(tensor for graph in chain for tensor in graph.inputs if tensor not in internal):
        _declare(config.input, tensor, runs)
    for tensor in chain[-1].outputs:
        _declare(config.output, tensor, runs)
    for graph in chain:
        step = config.ensemble_scheduling.step.add(model_name=graph.name, model_version=card.version)
        step.input_map.update({_numbered(i, tensor): tensor for i, tensor in enumerate(graph.inputs)})
        step.output_map.update({_numbered(i, tensor): tensor for i, tensor in enumerate(graph.outputs)})
    config.parameters["card"].string_value = dump_card(card)
    return config


def _declare(tensors: Any, name: str, runs: Sequence[Tensors], *, alias: str = "") -> None:
    """Add a tensor to a configuration: -1 for every size that differs between the runs."""
    found = [run[name] for run in runs if name in run]
    sizes = zip(*(x.shape[1:] for x in found), strict=True)
    dims = [same[0] if len(set(same)) == 1 else -1 for same in sizes]
    tensors.add(name=alias or name, data_type=DTYPES[found[0].dtype], dims=dims)
    if name == "shares":
        tensors[-1].label_filename = LABELS


def _numbered(index: int, name: str) -> str:
    """Number a name: Triton's backend for TorchScript finds a tensor's position in it."""
    return f"{name.split('__')[0]}__{index}"


def _place(config: pb.ModelConfig, card: Card, draft: Path) -> Path:
    """Write a model's configuration and labels; returns the directory of its version."""
    place: Path = draft / config.name / str(card.version)
    place.mkdir(parents=True)
    (place.parent / "config.pbtxt").write_text(text_format.MessageToString(config), "utf-8")
    if any(tensor.label_filename for tensor in config.output):
        (place.parent / LABELS).write_text(
            "".join(f"{' '.join(info.name.split())}\n" for info in card.classes), "utf-8"
        )
    return place
