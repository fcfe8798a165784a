"""A published checkpoint becomes one of ours: recognised by its layout, renamed strictly, nothing left unsaid.

read_torch_file -> read_part per file -> the method's `assemble` -> network, compared name by name -> card -> file.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from export.layouts import Part, read_part
from export.pickles import read_torch_file
from models import find_method
from models.card import NAME, Card, ClassInfo, Provenance, Sampling
from models.checkpoint import fill_network, save_checkpoint
from models.classes import CAMVID, CITYSCAPES, VOC
from models.contract import Method
from models.errors import BadOption
from models.layout import Assembly, Protocol
from serving.engine.store import sha256_of

SUFFIX = ".safetensors"
BY_COUNT = {len(table): table for table in (VOC, CITYSCAPES, CAMVID)}


@dataclass(frozen=True, slots=True)
class Imported:
    """What an import made, and what it left out.

    train_only: names, as in the files, of tensors that inference does not need, and of those that the chosen protocol
    does not. warnings: sentences about what the numbers will not mean.
    """

    card: Card
    train_only: tuple[str, ...]
    warnings: tuple[str, ...]


def import_checkpoint(
    method: str,
    files: Sequence[Path],
    output: Path,
    *,
    classes: tuple[ClassInfo, ...] | None = None,
    protocol: Literal["published", "penumbra"] = "published",
    sampling: str | None = None,
) -> Imported:
    """Read published files of one network, write it to `output` with a card, and say what was left out.

    classes: by default those of the data set with that many. protocol: how the paper's code ran the network, or how we
    would. sampling: value for the configuration's field of that name, where the method offers a choice.

    Raises BadOption, UnknownModel, and BadCheckpoint: unreadable, of another kind, incomplete, or not finite.
    """
    if output.suffix != SUFFIX or not NAME.fullmatch(output.stem):
        raise BadOption(f"the output is {output.name!r}; a plain name that ends in {SUFFIX} is wanted")
    found = find_method(method)
    parts = _read_parts(found, files)
    assert found.upstream
    assembly = found.upstream.assemble({part.layout.name: part.tensors for part in parts})
    chosen = assembly.published if protocol == "published" else assembly.ours
    config = _config(assembly, protocol, sampling, method=method)
    tensors = {name: tensor for part in parts for name, tensor in part.tensors.items()}
    unused = [name for name in tensors if name.startswith(chosen.unused)]
    network = found.build(config).eval()
    wanted = network.state_dict()
    for target in [target for part in parts for target in part.layout.beside.values() if target not in tensors]:
        tensors[target] = torch.zeros_like(wanted[target])
    theirs = {ours: name for part in parts for ours, name in part.theirs.items()}
    fill_network(network, {n: t for n, t in tensors.items() if n not in unused}, where=_joined(files), theirs=theirs)
    law = network.sampling if sampling else _law(network.sampling, chosen)
    card = Card(
        name=output.stem, version=1, method=method, config=dataclasses.asdict(config),
        classes=_classes(classes, config.num_classes), input=assembly.input, window=chosen.window, sampling=law,
        readout=chosen.readout, prompt=network.prompt, extra_maps=network.extra_maps,
        provenance=_provenance(parts, files, source=found.upstream.source),
    )  # fmt: skip
    save_checkpoint(output, card, network)
    train_only = [name for part in parts for name in part.train_only] + [theirs[name] for name in unused]
    return Imported(card, tuple(train_only), assembly.warnings)


def _read_parts(method: Method, files: Sequence[Path]) -> list[Part]:
    if method.upstream is None:
        raise BadOption(f"no checkpoints of {method.name} are published, so none can be imported")
    return [read_part(read_torch_file(path), method, where=str(path)) for path in files]


def _config(assembly: Assembly, protocol: str, sampling: str | None, *, method: str) -> Any:
    config = assembly.config
    if protocol == "penumbra" and assembly.ours_config is not None:
        config = assembly.ours_config
    if sampling is None:
        return config
    if "sampling" not in {field.name for field in dataclasses.fields(config)}:
        raise BadOption(f"sampling is {sampling!r}; {method} has no choice of samplings")
    return dataclasses.replace(config, sampling=sampling)


def _law(sampling: Sampling, protocol: Protocol) -> Sampling:
    if sampling.kind not in ("latent", "dropout"):
        return sampling
    return dataclasses.replace(sampling, default_samples=protocol.default_samples, noise_per=protocol.noise_per)


def _classes(classes: tuple[ClassInfo, ...] | None, count: int) -> tuple[ClassInfo, ...]:
    if classes is None and count not in BY_COUNT:
        raise BadOption(
            f"the checkpoint has {count} classes, which no known data set has; name them with --classes FILE"
        )
    chosen = BY_COUNT[count] if classes is None else classes
    if len(chosen) != count:
        raise BadOption(f"the checkpoint has {count} classes, but {len(chosen)} are named")
    return chosen


def _provenance(parts: Sequence[Part], files: Sequence[Path], *, source: str) -> Provenance:
    origins = [
        f"{path.name} ({part.layout.name}, sha256 {sha256_of(path)})" for part, path in zip(parts, files, strict=True)
    ]
    return Provenance(recipe=f"imported from {', '.join(origins)}", commit=source)


def _joined(files: Sequence[Path]) -> str:
    return ", ".join(map(str, files))
