"""Devices by name, as options and settings have them."""

import torch

from penumbra.models.errors import BadOption


def find_device(name: str) -> torch.device:
    """Find a device by name, `cpu`, `cuda` or `cuda:n`; without a name a GPU, or the CPU where there is none.

    Raises BadOption where this machine has no such device.
    """
    if not name:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpus = [f"cuda:{n}" for n in range(torch.cuda.device_count())] if name != "cpu" else []
    known = ["cpu", *(["cuda", *gpus] if gpus else [])]
    if name not in known:
        why = "" if gpus or torch.version.cuda else ", and its torch is built without CUDA"
        raise BadOption(f"the device is {name[:40]!r}; this machine has {', '.join(known)}{why}")
    return torch.device(name)


def stays_on(device: torch.device) -> bool:
    """Tell whether windows stay on a device from the picture to the rows of the answer: on GPUs."""
    return device.type == "cuda"
