"""Read files of `torch.save` without running anything of them: the first step of importing a published checkpoint.

A pickle is a program: it names functions and calls them. Training scripts save their configuration and transforms
beside the weights, so foreign names are common in honest files. Every name in the file is looked at before anything
is loaded. torch's own restricted reader (`weights_only`) rebuilds tensors and plain containers; names under PACKAGES
become stand-ins that take any arguments and keep nothing, so nothing is imported; any other name refuses the file.
A plain pickle of a state dict is read by the same rules, of which REBUILT has the names that make tensors.
"""

import io
import pickle
import pickletools
import tarfile
import warnings
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from penumbra.models.errors import BadCheckpoint, first_line

PACKAGES = frozenset((
    "__main__", "addict", "albumentations", "argparse", "config", "configs", "core", "cv2", "data", "dataset",
    "datasets", "datetime", "easydict", "enum", "fvcore", "hydra", "lib", "lightning", "lightning_fabric",
    "ml_collections", "mmcv", "mmengine", "mmseg", "model", "models", "monai", "munch", "net", "network", "networks",
    "numpy", "omegaconf", "options", "pathlib", "PIL", "pytorch_lightning", "segmentation_models_pytorch", "src",
    "timm", "tools", "torch", "torchgeo", "torchmetrics", "torchvision", "train", "trainer", "training", "transformers",
    "transforms", "typing", "util", "utils", "uuid", "yacs",
))  # fmt: skip
"""Top-level packages whose names become stand-ins: numpy, configuration, augmentation and network libraries, and what
research code calls its own modules. Weights are tensors, so nothing else is needed; torch's tensor types stay
themselves."""

PLAIN = {
    "_codecs": ("encode",),
    "builtins": (
        "bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "object", "range",
        "set", "slice", "str", "tuple",
    ),
    "collections": ("Counter", "OrderedDict", "defaultdict"),
    "copyreg": ("_reconstructor",),
    "functools": ("partial",),
}  # fmt: skip
"""Single names of the standard library that carry values; torch rebuilds some of them, the rest become stand-ins."""

MAPPINGS = frozenset(("AttrDict", "CfgNode", "ConfigDict", "Dict", "EasyDict", "Munch", "defaultdict"))
"""Classes that are filled as a dict is."""

ZIP_START = b"PK\x03\x04"
MAGIC = 0x1950A86A20F9469CFC6C
"""The first pickle of a file of torch 0.2 to 1.5; then come protocol, system, the object, storage keys, and bytes."""
LEGACY_PICKLES = 5
PROTOCOLS = (2, 3)
"""Versions of pickle: torch.save writes 2; torch's restricted reader knows the instructions of these."""
PROGRAM_BYTES = 256 * 2**20
"""Limit of the pickle that describes the tensors; that of a large checkpoint has less than one MiB."""


class Inert:
    """A stand-in for an object that is not needed: it takes any arguments and any state, and keeps none."""

    def __new__(cls, *_: object) -> "Inert":
        return object.__new__(cls)

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


class InertMapping:
    """A stand-in for a dict of a class of its own; torch fills only the plain kinds."""

    def __new__(cls, *_: object) -> OrderedDict[Any, Any]:  # type: ignore[misc]
        return OrderedDict()


def read_torch_file(path: Path) -> Any:
    """Read what was given to `torch.save`: tensors on the CPU, foreign objects replaced by stand-ins.

    Raises BadCheckpoint: no such file, another format, a name outside the lists, or damage. Nothing of the file is run
    in any case.
    """
    if not path.is_file():
        raise BadCheckpoint(f"there is no file {path}")
    try:
        names = _names(path)
        if names is None:
            with path.open("rb") as file:
                return _Weights(file).load()
        stand_ins: list[Any] = [(stand_in(name), name) for name in sorted(names)]
        with torch.serialization.safe_globals(stand_ins), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old formats, which are the point here
            return torch.load(path, map_location="cpu", weights_only=True)
    except BadCheckpoint as error:
        raise BadCheckpoint(f"{path} {error}") from None
    except Exception as error:  # a damaged stream of instructions can fail in any way
        raise BadCheckpoint(f"{path} is damaged, or no file of torch.save ({first_line(error)})") from None


def stand_in(name: str) -> type:
    """Make what stands for a "module.name". Raises BadCheckpoint for one outside the lists."""
    module, _, last = name.rpartition(".")
    if name.partition(".")[0] not in PACKAGES and last not in PLAIN.get(module, ()):
        raise BadCheckpoint(
            f"refers to {name}, which no checkpoint needs, so nothing of the file was run; save the network's "
            "state_dict() alone"
        )
    return InertMapping if last in MAPPINGS else Inert


REBUILT: dict[str, Callable[..., Any]] = {
    "_codecs.encode": lambda text, _: text.encode("latin1"),  # bytes, in protocol 2
    "builtins.set": set,
    "collections.OrderedDict": OrderedDict,
    "torch._utils._rebuild_parameter": torch._utils._rebuild_parameter,
    "torch._utils._rebuild_tensor_v2": torch._utils._rebuild_tensor_v2,
    "torch.storage._load_from_bytes": lambda file: _read_storage(file),
}
"""What a plain pickle may call: it makes tensors, whose storages are files of torch.save in it, and containers."""


def _read_storage(file: bytes) -> Any:
    if file.startswith(ZIP_START):  # torch writes these as streams; an archive could unpack to any size
        raise BadCheckpoint("holds an archive where torch writes a storage; nothing of it was unpacked")
    return torch.load(io.BytesIO(file), map_location="cpu", weights_only=True)


def is_whole(tensor: Tensor) -> bool:
    """Tell whether a file holds all numbers of a tensor: where some stand for many, it could be of any size."""
    return tensor.layout != torch.strided or tensor.nbytes <= tensor.untyped_storage().nbytes()


class _Weights(pickle.Unpickler):
    """Reads a plain pickle, of which nothing is imported, and nothing called but what rebuilds tensors.

    Every name is an object of this file's alone: a pickle can change what it names.
    """

    def find_class(self, module: str, name: str) -> Any:
        called = _called(module, name)
        rebuild = REBUILT.get(called)
        return (lambda *arguments: rebuild(*arguments)) if rebuild else type(name, (stand_in(called),), {})


def _called(module: str, name: str) -> str:
    """Give a name as Python 3 has it: protocol 2 speaks of `__builtin__`."""
    return ".".join(NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name)))


def _names(path: Path) -> set[str] | None:
    """Collect every "module.name" that the file's pickles refer to; None where it is a plain pickle."""
    with path.open("rb") as file:
        start = file.read(9)
    if not start:
        raise BadCheckpoint("is empty")
    if start.startswith(ZIP_START):
        return _names_in_zip(path)
    if start.endswith(b"{"):
        raise BadCheckpoint("is a safetensors file: penumbra import module PACKAGE:BUILD --weights reads it")
    if tarfile.is_tarfile(path):
        raise BadCheckpoint("has the tar format of torch 0.1; load it and save it again with a torch of 0.4 to 1.5")
    with path.open("rb") as file:
        first = [value for code, value, _ in pickletools.genops(file) if code.name == "LONG1"]
        if first != [MAGIC]:
            return None
        return {name for _ in range(LEGACY_PICKLES - 1) for name in _globals(file)}


def _names_in_zip(path: Path) -> set[str]:
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        programs = [entry for entry in entries if entry.filename.endswith(".pkl")]
        if any(entry.filename.endswith("/constants.pkl") for entry in programs):
            raise BadCheckpoint("is a TorchScript program: penumbra import torchscript")
        if len(programs) != 1 or programs[0].file_size > PROGRAM_BYTES:
            raise BadCheckpoint("is a zip archive, but not one of torch.save")
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise BadCheckpoint("is a compressed zip archive; torch.save does not compress")
        with archive.open(programs[0]) as program:
            return set(_globals(program))


def _globals(program: IO[bytes]) -> Iterator[str]:
    """Yield the names in one pickle."""
    for code, value, _ in pickletools.genops(program):
        if code.name == "PROTO" and value not in PROTOCOLS:
            raise BadCheckpoint(f"is written in pickle protocol {value}; protocol 2, which torch.save uses, is read")
        if code.name in ("GLOBAL", "INST"):
            yield _called(*str(value).split(" ", 1))
