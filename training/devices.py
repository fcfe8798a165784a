"""Run one training on several devices or machines: all that its processes must know of each other.

The gradients are averaged by DistributedDataParallel. Everything else that a step moves (batch statistics, prototypes,
class centres, the average) is process 0's, from its own share of the batch, and is handed on after every step; banks
and random streams belong to each process.
"""

import itertools
import os
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import DDPStrategy
from torch import Tensor, distributed, nn

from penumbra.models.errors import BadOption
from penumbra.training.recipe import Precision


def start_devices(*, devices: int = 1, precision: Precision = "32-true") -> Fabric:
    """Start the other processes, or join those that torchrun started, whose number then counts instead.

    Raises BadOption: more devices than there are GPUs, on a machine that has any.
    """
    num_nodes, gpus = 1, torch.cuda.device_count()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        num_nodes = int(os.environ["WORLD_SIZE"]) // devices
    if gpus and devices > gpus:
        raise BadOption(f"{devices} devices are asked for and this machine has {gpus} GPUs; ask for at most {gpus}")
    # A stage of an objective may leave weights without gradients, which DDP would otherwise wait for.
    strategy = DDPStrategy(find_unused_parameters=True, broadcast_buffers=False) if devices * num_nodes > 1 else "auto"
    fabric = Fabric(devices=devices, num_nodes=num_nodes, strategy=strategy, precision=precision)
    fabric.launch()
    return fabric


def share_of(fabric: Fabric, batch: int, *, name: str) -> int:
    """Return this process's part of a batch of the recipe. Raises BadOption if it cannot be divided."""
    if batch % fabric.world_size:
        raise BadOption(f"{name} is {batch}, which {fabric.world_size} devices cannot share evenly")
    return batch // fabric.world_size


def follow_first(fabric: Fabric, network: nn.Module) -> None:
    """Overwrite what no gradient moves (buffers, frozen weights) with process 0's, in place."""
    if fabric.world_size == 1:
        return
    frozen = (p.data for p in network.parameters() if not p.requires_grad)
    for tensor in itertools.chain(frozen, network.buffers()):
        contiguous: Tensor = tensor.contiguous()  # the collective refuses channels-last
        distributed.broadcast(contiguous, src=0)
        tensor.copy_(contiguous)


def gather(fabric: Fabric, own: Any) -> list[Any]:
    """Collect every process's `own`, in order of rank; the list is empty elsewhere than at process 0."""
    if fabric.world_size == 1:
        return [own]
    everyone: list[Any] = [None] * fabric.world_size
    distributed.gather_object(own, everyone if fabric.is_global_zero else None)
    return everyone if fabric.is_global_zero else []
