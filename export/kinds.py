"""Say what a file is, for who does not know how to bring it: by its content, of which nothing is run."""

import zipfile
from contextlib import suppress
from pathlib import Path

from penumbra.export.layouts import fitting
from penumbra.export.pickles import ZIP_START, read_torch_file
from penumbra.export.weights import read_tensors
from penumbra.models.checkpoint import SUFFIX, few, read_card
from penumbra.models.errors import BadCheckpoint, BadOption

ENTRIES = {"constants.pkl": "torchscript", "archive_format": "pt2", "serialized_exported_program.json": "pt2"}
"""What only such an archive has, by the end of its name."""


def find_form(path: Path) -> str:
    """Tell which program a file is. Raises BadOption: there is none; BadCheckpoint: weights without a network, with
    what they look like and how they are imported."""
    if not path.is_file():
        raise BadOption(f"{str(path)!r} is no method, no form and no file; penumbra import --help names them")
    with path.open("rb") as file:
        start = file.read(9)
    if start.startswith(ZIP_START):
        with zipfile.ZipFile(path) as archive:
            names = [name.rpartition("/")[2] for name in archive.namelist()]
        for entry, form in ENTRIES.items():
            if entry in names:
                return form
    elif path.suffix == ".onnx" or (start[:1] == b"\x08" and path.suffix not in (SUFFIX, ".pth", ".pt", ".ckpt")):
        return "onnx"  # an ONNX file begins with its version, the field 1 of a message
    raise BadCheckpoint(_describe(path))


def _describe(path: Path) -> str:
    """Say of weights what they look like."""
    if path.suffix == SUFFIX:
        with suppress(BadCheckpoint):
            return f"{path} is {read_card(path).name}, a checkpoint of ours already: penumbra export {path}"
    tensors = read_tensors(path)
    content = tensors if path.suffix == SUFFIX else read_torch_file(path)
    for method, layout in fitting(content):
        return f"{path} looks like {method.name}, {layout.name}: penumbra import {method.name} {path} -o NAME{SUFFIX}"
    sentence = f"{path} holds {len(tensors)} tensors ({few([*tensors])}), and no network that they belong to"
    name, last = next(((n, t) for n, t in reversed(tensors.items()) if t.dim() > 1), ("", None))
    if last is not None and last.dim() == 2:
        sentence += (
            f"; {name} {list(last.shape)} at its end is that of a classifier, which gives one answer per picture"
        )
    return f"{sentence}; with the code of a segmentation network: penumbra import module PACKAGE:BUILD --weights {path}"
