"""Files of torch.save are read without running anything of them, and anything else is refused in a sentence."""

import argparse
import collections
import io
import os
import pickle
import sys
import tarfile
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from penumbra.export.pickles import read_torch_file
from penumbra.models.errors import BadCheckpoint

FORMATS = pytest.mark.parametrize("way", ["zip", "legacy", "plain 2", "plain 5"])
"""How torch writes files, and how pickle does, in two of its protocols."""
WEIGHT = torch.arange(6.0).reshape(2, 3)


class Call:
    """Pickles as a call of a function, as hostile files are made."""

    def __init__(self, function: Callable[..., Any], *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[object, ...]]:
        return self.call


def saved(path: Path, content: object, way: str = "zip") -> Path:
    if way.startswith("plain"):
        path.write_bytes(pickle.dumps(content, int(way[-1])))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=way == "zip")
    return path


def refused(path: Path, *words: str) -> None:
    with pytest.raises(BadCheckpoint) as caught:
        read_torch_file(path)
    sentence = str(caught.value)
    assert "\n" not in sentence and str(path) in sentence
    for word in words:
        assert word in sentence


# -- what is read ---------------------------------------------------------------------------------


@FORMATS
def test_tensors_parameters_and_plain_values_come_back(tmp_path: Path, way: str) -> None:
    content = {
        "model": collections.OrderedDict(weight=WEIGHT, bias=nn.Parameter(WEIGHT[0]), half=WEIGHT.half()),
        "epoch": 3,
        "names": ["a", ("b", None, 1.5, True)],
        "set": {1, 2},
    }
    read = read_torch_file(saved(tmp_path / "a.pth", content, way))
    assert torch.equal(read["model"]["weight"], WEIGHT) and torch.equal(read["model"]["bias"], WEIGHT[0])
    assert read["model"]["half"].dtype == torch.float16
    assert {key: read[key] for key in ("epoch", "names", "set")} == {k: content[k] for k in ("epoch", "names", "set")}


@FORMATS
@pytest.mark.parametrize(
    "value",
    [
        np.float64(0.7),
        np.float32(0.7),
        np.arange(6.0).reshape(2, 3),
        np.array(["a", "b"]),
        np.random.RandomState(0).get_state(legacy=False),
        argparse.Namespace(arch="resnet50", path=Path("data")),
        collections.defaultdict(list, a=[1]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_numbers_of_numpy_and_options_stand_beside_the_weights_unread(tmp_path: Path, value: object, way: str) -> None:
    read = read_torch_file(saved(tmp_path / "a.pth", {"state_dict": {"weight": WEIGHT}, "other": value}, way))
    assert torch.equal(read["state_dict"]["weight"], WEIGHT)


def foreign(module: str, name: str, *bases: type) -> type:
    """A class of a package that is not installed, or not to be imported, for as long as it is pickled."""
    return type(name, bases or (object,), {"__module__": module, "__qualname__": name})


FOREIGN = (
    ("config", "Config", ()),
    ("src.training.options", "Options", ()),
    ("albumentations.core.composition", "Compose", ()),
    ("albumentations.augmentations.geometric.resize", "RandomScale", ()),
    ("yacs.config", "CfgNode", (dict,)),
    ("easydict", "EasyDict", (dict,)),
    ("omegaconf.dictconfig", "DictConfig", ()),
)


@FORMATS
@pytest.mark.parametrize(("module", "name", "bases"), FOREIGN, ids=[name for _, name, _ in FOREIGN])
def test_configuration_objects_become_stand_ins_and_their_modules_are_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, name: str, bases: tuple[type, ...], way: str
) -> None:
    kind = foreign(module, name, *bases)
    words = module.split(".")
    with monkeypatch.context() as installed:
        for known in (".".join(words[:count]) for count in range(1, len(words) + 1)):
            installed.setitem(sys.modules, known, types.ModuleType(known))
        setattr(sys.modules[module], name, kind)
        thing = kind()
        thing.size, thing.nested = 512, [kind()]  # type: ignore[attr-defined]
        if bases:
            thing["lr"] = 0.1  # type: ignore[index]
        path = saved(tmp_path / "a.pth", {"model_state_dict": {"weight": WEIGHT}, "config": thing}, way)
    read = read_torch_file(path)
    assert torch.equal(read["model_state_dict"]["weight"], WEIGHT)
    assert type(read["config"]) is not kind and module not in sys.modules


def test_tensors_saved_on_a_gpu_by_an_old_torch_come_to_the_cpu(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pth", {"model": {"weight": WEIGHT}}, "legacy")
    content = path.read_bytes()
    assert b"ctorch\nFloatStorage\n" in content and b"X\x03\x00\x00\x00cpu" in content
    content = content.replace(b"ctorch\nFloatStorage\n", b"ctorch.cuda\nFloatStorage\n")
    path.write_bytes(content.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0"))
    weight = read_torch_file(path)["model"]["weight"]
    assert weight.device.type == "cpu" and torch.equal(weight, WEIGHT)


# -- what is refused, unrun -----------------------------------------------------------------------


def hostile(marker: Path) -> dict[str, tuple[object, str]]:
    """Files that would create `marker`, and the name that gives each away."""
    order = f"open({str(marker)!r}, 'w').close()"
    return {
        "a shell command": (Call(os.system, f"touch {marker}"), f"{os.system.__module__}.system"),
        "eval": (Call(eval, order), "builtins.eval"),
        "exec": (Call(exec, order), "builtins.exec"),
        "open": (Call(open, str(marker), "w"), "io.open"),
        "getattr": (Call(getattr, WEIGHT, "numpy"), "builtins.getattr"),
        "an import": (Call(__import__, "antigravity"), "builtins.__import__"),
        "unpickling": (Call(pickle.loads, b"cposix\nsystem\n."), "pickle.loads"),
    }


@FORMATS
@pytest.mark.parametrize("attack", hostile(Path("marker")))
@pytest.mark.parametrize("place", ["at the top", "beside the weights", "in the state dict"])
def test_a_file_that_calls_functions_is_refused_by_their_name_and_nothing_is_run(
    tmp_path: Path, attack: str, place: str, way: str
) -> None:
    marker = tmp_path / "marker"
    thing, name = hostile(marker)[attack]
    content = {
        "at the top": thing,
        "beside the weights": {"model": {"weight": WEIGHT}, "epoch": thing},
        "in the state dict": {"model": {"weight": WEIGHT, "bias": thing}},
    }[place]
    refused(saved(tmp_path / "a.pth", content, way), name, "nothing of the file was run")
    assert not marker.exists()


@FORMATS
def test_names_under_the_listed_packages_are_not_run_either(tmp_path: Path, way: str) -> None:
    from numpy.testing import runstring

    marker = tmp_path / "marker"
    content = {"model": {"weight": WEIGHT}, "epoch": Call(runstring, f"open({str(marker)!r}, 'w')", {})}
    read = read_torch_file(saved(tmp_path / "a.pth", content, way))
    assert torch.equal(read["model"]["weight"], WEIGHT) and not marker.exists()


def test_a_name_behind_the_scanned_pickle_is_not_run(tmp_path: Path) -> None:
    """torch reads the archive's data.pkl; another archive appended to the file must not be scanned in its place."""
    marker = tmp_path / "marker"
    path = saved(tmp_path / "a.pth", {"model": Call(os.system, f"touch {marker}")})
    path.write_bytes(path.read_bytes() + saved(tmp_path / "b.pth", {"model": WEIGHT}).read_bytes())
    with pytest.raises(BadCheckpoint):
        read_torch_file(path)
    assert not marker.exists()


def test_an_archive_within_a_plain_pickle_is_not_unpacked(tmp_path: Path) -> None:
    storage = io.BytesIO()
    torch.save(torch.zeros(9), storage)  # an archive, which torch never writes there
    path = tmp_path / "w.pkl"

    class Nested:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[object, ...]]:
            return torch.storage._load_from_bytes, (storage.getvalue(),)

    path.write_bytes(pickle.dumps({"w": Nested()}))
    refused(path, "archive", "nothing of it was unpacked")


def test_a_whole_pickled_network_is_a_stand_in(tmp_path: Path) -> None:
    assert not isinstance(read_torch_file(saved(tmp_path / "a.pth", nn.Linear(2, 2))), (nn.Module, dict))


@pytest.mark.parametrize("protocol", [4, 5])
def test_other_pickle_protocols_are_refused_by_number(tmp_path: Path, protocol: int) -> None:
    torch.save({"model": WEIGHT}, tmp_path / "a.pth", pickle_protocol=protocol)
    refused(tmp_path / "a.pth", f"pickle protocol {protocol}", "protocol 2")


# -- what is no file of torch.save ----------------------------------------------------------------


def tar_of_torch_01(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        for name in ("sys_info", "pickle", "tensors", "storages"):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())


def zipped_text(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")


def compressed(path: Path) -> None:
    saved(path.with_suffix(".plain"), {"weight": torch.zeros(1000)})
    with zipfile.ZipFile(path.with_suffix(".plain")) as plain, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        for entry in plain.namelist():
            out.writestr(entry, plain.read(entry))


OTHERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "an empty file": (lambda path: path.write_bytes(b""), "is empty"),
    "safetensors": (lambda path: save_file({"weight": WEIGHT}, path), "is a safetensors file"),
    "random bytes": (lambda path: path.write_bytes(np.random.default_rng(0).bytes(5000)), "no file of torch.save"),
    "text": (lambda path: path.write_text("<html>404</html>\n" * 9), "no file of torch.save"),
    "the tar format": (tar_of_torch_01, "tar format of torch 0.1"),
    "another zip": (zipped_text, "is a zip archive, but not one of torch.save"),
    "a compressed zip": (compressed, "compressed"),
    "a huge claim": (lambda path: path.write_bytes(b"\x80\x02\x8e" + b"\xff" * 7 + b"\x7f"), "no file of torch.save"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_files_are_refused_in_a_sentence(tmp_path: Path, kind: str) -> None:
    write, words = OTHERS[kind]
    write(tmp_path / "a.pth")
    refused(tmp_path / "a.pth", words)


def test_a_torchscript_program_is_refused_as_one(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.trace(nn.Linear(3, 2), WEIGHT), tmp_path / "a.pth")
    refused(tmp_path / "a.pth", "TorchScript")


def test_a_missing_file_and_a_directory_are_refused(tmp_path: Path) -> None:
    refused(tmp_path / "a.pth", "there is no file")
    refused(tmp_path, "there is no file")


@FORMATS
@pytest.mark.parametrize("share", [0.02, 0.1, 0.5, 0.9, 0.99])
def test_a_file_cut_short_is_refused(tmp_path: Path, share: float, way: str) -> None:
    path = saved(tmp_path / "a.pth", {f"weight {i}": WEIGHT.clone() for i in range(50)}, way)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    refused(path, "damaged")


@FORMATS
def test_a_file_with_changed_bytes_is_read_or_refused_but_never_fails_otherwise(tmp_path: Path, way: str) -> None:
    path = saved(tmp_path / "a.pth", {f"weight {i}": WEIGHT.clone() for i in range(4)}, way)
    content, rng = path.read_bytes(), np.random.default_rng(1)
    for _ in range(200):
        changed = bytearray(content)
        for place in rng.integers(0, len(content), 3):
            changed[place] = rng.integers(256)
        path.write_bytes(changed)
        try:
            read_torch_file(path)
        except BadCheckpoint as error:
            assert "\n" not in str(error)  # noqa: PT017
