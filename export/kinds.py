"""Say what a file is, for who does not know how to bring it: by its content, of which nothing is run."""

import zipfile
from contextlib import suppress
from pathlib import Path

from penumbra.export.layouts import fitting
from penumbra.export.pickles import ZIP_START
from penumbra.export.weights import find_tensors, read_content
from penumbra.models.checkpoint import SUFFIX, few, read_card
from penumbra.models.errors import BadCheckpoint, BadOption

ENTRIES = {"constants.pkl": "torchscript", "archive_format": "pt2", "serialized_exported_program.json": "pt2"}
"""What only such an archive has, by the end of its name."""
ONNX_START = b"\x08"
"""An ONNX file begins with its version, field 1 of a message."""


def find_form(path: Path) -> str:
    """Tell which program a file is. Raises BadOption: there is none; BadCheckpoint: weights without a network, with
    what they look like and how they are imported."""
    if not path.is_file():
        raise BadOption(f"{str(path)!r} is no method, no form and no file; penumbra import --help names them")
    with path.open("rb") as file:
        start = file.read(len(ZIP_START))
    if start == ZIP_START:
        with suppress(zipfile.BadZipFile), zipfile.ZipFile(path) as archive:  # one that is cut short is described below
            names = {name.rpartition("/")[2] for name in archive.namelist()}
            for entry in ENTRIES.keys() & names:
                return ENTRIES[entry]
    elif path.suffix == ".onnx" or (start.startswith(ONNX_START) and path.suffix != SUFFIX):
        return "onnx"
    raise BadCheckpoint(_describe(path))


def _describe(path: Path) -> str:
    """Say of weights what they look like."""
    with suppress(BadCheckpoint):
        return f"{path} is {read_card(path).name}, a checkpoint of ours already: penumbra export {path}"
    content = read_content(path)
    for method, layout in fitting(content):
        return f"{path} looks like {method.name}, {layout.name}: penumbra import {method.name} {path} -o NAME{SUFFIX}"
    tensors = find_tensors(content, where=str(path))
    sentence = f"{path} holds {len(tensors)} tensors ({few([*tensors])}), and no network that they belong to"
    name, last = [("", None), *((name, tensor) for name, tensor in tensors.items() if tensor.dim() > 1)][-1]
    if last is not None and last.dim() == 2:
        shape = list(last.shape)
        sentence += f"; {name} {shape} at its end is that of a classifier, which gives one answer per picture"
    return f"{sentence}; with the code of a segmentation network: penumbra import module PACKAGE:BUILD --weights {path}"
