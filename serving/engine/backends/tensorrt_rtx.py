"""TensorRT-RTX engines: built anywhere, for every RTX GPU, and finished for the one at hand when they are first run.

They belong to one version of TensorRT-RTX. Loading one may run code: load only your own.
"""

import hashlib
import logging
import os
from functools import partial
from pathlib import Path
from typing import Any

import tensorrt_rtx as trt
import torch

from penumbra.models.errors import BadArtifact, BadOption
from penumbra.models.files import write_whole
from penumbra.serving.engine.backends import Graph, flat
from penumbra.serving.engine.backends.engines import Engine, find_log, load_plan

log = logging.getLogger("penumbra")

AMPERE_AND_ADA, BLACKWELL = ((8, 0), (8, 6), (8, 9)), 12
"""Compute capabilities that TensorRT-RTX takes, and the first major one from which on it takes all."""
FAMILIES = {7: "Turing", 9: "Hopper", 10: "Blackwell of data centres"}


def target(device: torch.device) -> dict[str, str]:
    """Name TensorRT-RTX's version. Raises BadOption for a GPU that it has no kernels for."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if major < BLACKWELL and (major, minor) not in AMPERE_AND_ADA:
            family = f"{FAMILIES[major]}, " if major in FAMILIES else ""
            raise BadOption(
                f"TensorRT-RTX has no kernels for {torch.cuda.get_device_name(device)} ({family}compute capability "
                f"{major}.{minor}), only for 8.0, 8.6, 8.9, 12.0 and later; choose tensorrt, aot or torchscript there"
            )
    return {"TensorRT-RTX": trt.__version__}


def open_graph(path: Path, device: torch.device, _: str) -> Graph:
    """Load an engine, and what was compiled for it on this machine before."""
    if device.type != "cuda":
        raise BadArtifact(
            f"{path} runs on an NVIDIA RTX GPU, and the device is {device}; export the checkpoint with --backend onnx "
            "for a processor"
        )
    plan = path.read_bytes()
    check_validity(plan, str(path))
    runtime, engine = load_plan(trt, plan, str(path))
    config = engine.create_runtime_config()
    config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    # LAZY would change the kernels, and with them the bytes of an answer, between two equal requests.
    config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
    compiled, kept = config.create_runtime_cache(), cache_path(plan, torch.cuda.get_device_name(device))
    if kept.exists():
        compiled.deserialize(kept.read_bytes())  # where driver or compiler are others it does nothing
    config.set_runtime_cache(compiled)
    context = engine.create_execution_context(config)
    grown = partial(keep, compiled, kept)
    return flat(Engine(trt, (runtime, engine), context, name=path.stem, device=device, grown=grown))


def check_validity(plan: bytes, name: str) -> None:
    """Ask TensorRT-RTX whether an engine can run on this machine. Raises BadArtifact with its reasons."""
    validity, bits = trt.Runtime(find_log(trt)).get_engine_validity(plan)
    if validity == trt.EngineValidity.INVALID:
        names = [each for each, bit in trt.EngineInvalidityDiagnostics.__members__.items() if int(bits) & int(bit)]
        words = ", ".join(names).lower().replace("_", " ").replace(" cc", " compute capability")
        raise BadArtifact(
            f"{name} cannot run here: {words or find_log(trt).reason()}; export the checkpoint again with "
            f"TensorRT-RTX {trt.__version__}, for a GPU and driver that it takes"
        )


def cache_path(plan: bytes, gpu: str) -> Path:
    """Name the file for what is compiled for a plan on a GPU: the user's on this machine, never an artifact's."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "penumbra" / "tensorrt_rtx"
    return folder / hashlib.sha256(plan + f"{gpu} {trt.__version__}".encode()).hexdigest()


def keep(compiled: Any, path: Path) -> None:
    """Write what is compiled so far; a machine that cannot keep it compiles it at every start."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_whole(path, bytes(compiled.serialize()))
    except OSError as error:
        log.warning("%s cannot be written (%s): engines are compiled again at the next start", path, error.strerror)
