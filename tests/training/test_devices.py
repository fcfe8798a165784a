"""Several devices train one network: the same weights everywhere, resumable, started by us or by torchrun."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from penumbra.models.checkpoint import load_checkpoint
from penumbra.models.errors import BadOption
from penumbra.training.data import find_data
from penumbra.training.devices import share_of, start_devices
from penumbra.training.loop import Training
from tests.training import tiny

ROOT = Path(__file__).parents[2]
PENUMBRA = (sys.executable, "-m", "penumbra")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def _run(*command: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


def _train(folder: Path, *start: str) -> dict[str, torch.Tensor]:
    folder.mkdir()
    recipe = dataclasses.asdict(tiny.recipe("cps", folder, steps=3, batch=4))
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe | {"crop": [48, 64], "scale": [0.9, 1.1]}))
    _run(*start, "train", str(path), "--data", str(folder), "--threads", "1", "--devices", "2")
    return load_checkpoint(folder / "tiny.safetensors")[1].state_dict()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["np_semiseg", "cps"])
def test_two_devices_hold_the_same_weights_and_resume_with_identical_numbers(method: str, tmp_path: Path) -> None:
    _run(*TORCHRUN, str(ROOT / "tests" / "training" / "two_devices.py"), method, str(tmp_path))


@pytest.mark.slow
def test_the_command_and_torchrun_start_the_same_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ours = _train(tmp_path / "ours", *PENUMBRA)
    theirs = _train(tmp_path / "theirs", *TORCHRUN, "-m", "penumbra")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_batch_that_the_devices_cannot_share_is_refused_with_both_numbers() -> None:
    assert share_of(start_devices(), 5, name="labelled_batch") == 5
    three = SimpleNamespace(world_size=3)
    with pytest.raises(BadOption, match="labelled_batch is 5, which 3 devices cannot share evenly"):
        share_of(three, 5, name="labelled_batch")  # type: ignore[arg-type]


def test_a_run_that_was_begun_on_two_devices_is_not_gone_on_with_on_one(tmp_path: Path) -> None:
    data = find_data("shapes")
    training = Training(tiny.recipe("cps", tmp_path, steps=8), data.load(tmp_path, "train"), len(data.classes))
    training.save(tmp_path / "state.ckpt")
    state = torch.load(tmp_path / "state.ckpt", weights_only=True)
    torch.save(state | {"processes": state["processes"] * 2}, tmp_path / "state.ckpt")
    with pytest.raises(BadOption, match="was begun on 2 devices, not 1"):
        training.resume(tmp_path / "state.ckpt")
