"""Run by torchrun in two processes: train four steps, and two that are saved and two more that go on from there."""

import os
import sys
from pathlib import Path

import torch

from penumbra.training.data import find_data
from penumbra.training.devices import gather, start_devices
from penumbra.training.loop import Training
from tests.training import tiny


def main(method: str, folder: Path) -> None:
    fabric = start_devices(precision="32-true")
    data = find_data("shapes")

    def training() -> Training:
        recipe = tiny.recipe(method, folder, steps=8, batch=4)
        return Training(recipe, data.load(folder, "train"), len(data.classes), fabric=fabric)

    whole, killed = training(), training()
    expected = [whole.advance(step / 4) for step in range(4)]
    first = [killed.advance(step / 4) for step in range(2)]
    killed.save(folder / "state.ckpt")
    fabric.barrier()
    resumed = training()
    resumed.resume(folder / "state.ckpt")
    assert first + [resumed.advance(step / 4) for step in (2, 3)] == expected
    for module in ("average", "objective"):
        ours, theirs = (getattr(each, module).state_dict() for each in (whole, resumed))
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), module
    weights, losses = gather(fabric, whole.objective.network.state_dict()), gather(fabric, expected)
    if fabric.is_global_zero:
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
        assert losses[0] != losses[1]  # each had pictures of its own


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], Path(sys.argv[2]))
    sys.stdout.flush()
    os._exit(0)  # a thread of gloo that still lets go of tensors aborts a process whose interpreter has ended
