"""Reads files of `torch.save` without running anything of them. First step of importing a published checkpoint.

A pickle is a program: it names functions and calls them. Training scripts pickle their configuration and transforms
beside the weights, so such names are common in honest files. Every name in the file is looked at before anything is
loaded. torch rebuilds tensors and plain containers (`weights_only`); names under PACKAGES become stand-ins that take
any arguments and keep nothing, so nothing is imported; any other name refuses the file.
"""

import pickletools
import tarfile
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import torch

from models.errors import BadCheckpoint

PACKAGES = frozenset((
    "__main__", "addict", "albumentations", "argparse", "config", "configs", "core", "cv2", "data", "dataset",
    "datasets", "datetime", "easydict", "enum", "fvcore", "lib", "lightning", "mmcv", "mmengine", "model", "models",
    "munch", "net", "network", "networks", "numpy", "omegaconf", "options", "pathlib", "PIL", "pytorch_lightning",
    "src", "tools", "torch", "torchvision", "train", "trainer", "training", "transforms", "typing", "util", "utils",
    "uuid", "yacs",
))  # fmt: skip
"""Top-level packages whose names become stand-ins: numpy, configuration and augmentation libraries, and what research
code calls its own modules. Nothing under them is needed: weights are tensors. torch's tensor types stay themselves."""

NAMES = frozenset(
    f"{module}.{name}"
    for module, names in {
        "builtins": "bool bytes dict float frozenset int list object range slice str tuple",
        "collections": "defaultdict deque",
        "copyreg": "_reconstructor",
        "functools": "partial",
    }.items()
    for name in names.split()
)
"""Single names that become stand-ins, and `_codecs.encode`, which numpy's numbers need, is torch's own exception."""

MAPPINGS = frozenset(("defaultdict", "CfgNode", "ConfigDict", "EasyDict", "AttrDict", "Munch", "Dict"))
"""Classes that are filled like a dict."""

TORCH_DEFAULTS = frozenset(("_codecs.encode", "collections.Counter", "collections.OrderedDict"))
TORCH_DEFAULTS |= {f"builtins.{name}" for name in ("bytearray", "complex", "set")}
"""What torch itself admits outside its own package."""

MAGIC = 0x1950A86A20F9469CFC6C
"""First pickle of a file of torch 0.2 to 1.5: magic number, protocol, system, the object, storage keys; then bytes."""
LEGACY_PICKLES = 5
PROGRAM_BYTES = 256 * 2**20
"""Of the pickle that describes the tensors; honest ones have less than one MiB."""


class Inert:
    """Stands for an object that is not needed: takes any arguments and any state, and keeps none."""

    def __init__(self, *_: object) -> None:
        pass

    def __new__(cls, *_: object) -> "Inert":
        return object.__new__(cls)

    def __setstate__(self, _: object) -> None:
        pass


class InertMapping:
    """Stands for a dict of a class of its own; torch fills only the plain kinds."""

    def __new__(cls, *_: object) -> OrderedDict[Any, Any]:  # type: ignore[misc]
        return OrderedDict()


def read_torch_file(path: Path) -> Any:
    """What was given to `torch.save`, tensors on the CPU, all but tensors and plain containers replaced.

    Raises BadCheckpoint: no such file, another format, a name outside the lists, or a damaged file. Nothing of the
    file is run in any case.
    """
    if not path.is_file():
        raise BadCheckpoint(f"there is no file {path}")
    names = sorted(_names(path))
    for name in names:
        if not _is_harmless(name):
            raise BadCheckpoint(f"{path} refers to {name}, which no checkpoint needs; nothing of the file was run")
    stand_ins: list[Any] = [(InertMapping if name.rpartition(".")[2] in MAPPINGS else Inert, name) for name in names]
    try:
        with torch.serialization.safe_globals(stand_ins):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged stream of instructions can fail in any way
        reason = str(error).strip().partition("\n")[0]
        raise BadCheckpoint(f"{path} is damaged, or holds more than tensors and plain values ({reason})") from None


def _is_harmless(name: str) -> bool:
    return name.partition(".")[0] in PACKAGES or name in NAMES or name in TORCH_DEFAULTS


def _names(path: Path) -> set[str]:
    """Every "module.name" that the file's pickles refer to. Raises BadCheckpoint for another format."""
    if path.stat().st_size == 0:
        raise BadCheckpoint(f"{path} is empty")
    if zipfile.is_zipfile(path):
        return _zip_names(path)
    with path.open("rb") as file:
        start = file.read(16)
    if start[8:9] == b"{":
        raise BadCheckpoint(f"{path} is a safetensors file; files of torch.save are imported")
    if tarfile.is_tarfile(path):
        raise BadCheckpoint(f"{path} was written by torch 0.1; load and save it again with a torch of 0.4 to 1.5")
    return _legacy_names(path)


def _zip_names(path: Path) -> set[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            programs = [entry for entry in archive.infolist() if entry.filename.endswith(".pkl")]
            if any(entry.filename.endswith("/constants.pkl") for entry in programs):
                raise BadCheckpoint(f"{path} is a TorchScript program; files of torch.save with tensors are imported")
            if len(programs) != 1 or programs[0].file_size > PROGRAM_BYTES:
                raise BadCheckpoint(f"{path} is a zip archive, but not one of torch.save")
            with archive.open(programs[0]) as program:
                return set(_globals(program))
    except (zipfile.BadZipFile, ValueError, EOFError, OSError, NotImplementedError, RuntimeError) as error:
        raise BadCheckpoint(f"{path} is a damaged zip archive ({error})") from None


def _legacy_names(path: Path) -> set[str]:
    try:
        with path.open("rb") as file:
            first = [value for code, value, _ in pickletools.genops(file) if code.name == "LONG1"]
            if first != [MAGIC]:
                raise BadCheckpoint(f"{path} is a pickle, but not one of torch.save")
            return {name for _ in range(LEGACY_PICKLES - 1) for name in _globals(file)}
    except (ValueError, EOFError, IndexError, UnicodeDecodeError) as error:
        raise BadCheckpoint(f"{path} is not a file of torch.save ({error})") from None


def _globals(program: IO[bytes]) -> Iterator[str]:
    """Names in one pickle. Other instructions that name things are not in torch's reader, which refuses them."""
    for code, value, _ in _instructions(program):
        if code.name in ("GLOBAL", "INST"):
            yield _modern(*str(value).split(" ", 1))


def _instructions(program: IO[bytes]) -> Iterable[tuple[Any, Any, Any]]:
    return pickletools.genops(program)


def _modern(module: str, name: str) -> str:
    """The name in Python 3: pickles of protocol 2 speak of `__builtin__`."""
    module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
    return f"{module}.{name}"
