"""Devices by name, as options and settings have them, and the hardware that they are."""

from pathlib import Path

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


def hardware_of(device: torch.device) -> dict[str, str]:
    """Name the processor with its vector instructions, or the GPU and its compute capability."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return {"gpu": torch.cuda.get_device_name(device), "compute capability": f"{major}.{minor}"}
    return {"processor": f"{_processor()} with {torch.backends.cpu.get_cpu_capability()}"}


def name_hardware(device: torch.device) -> str:
    """Name it in one line."""
    return ", ".join(hardware_of(device).values())


def _processor() -> str:
    """Name the processor's model: compiled code is for the instructions of exactly that (-march=native)."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "an unknown processor"
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "an unknown processor")


def stays_on(device: torch.device) -> bool:
    """Tell whether windows stay on a device from the picture to the rows of the answer: on GPUs."""
    return device.type == "cuda"
