"""Ask torch-tensorrt, on a machine without CUDA, what it could convert: networks by name, `operators`, or `rules`.

Runs in a process of its own, whose search path begins with a copy of torch_tensorrt without its native parts, and
whose TensorRT is an empty shell. Prints one JSON object per graph.
"""

import copy
import itertools
import json
import logging
import sys
import types
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import tensorrt_bindings
import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.modules["tensorrt"] = tensorrt_bindings
torch._C._CudaDeviceProperties = types.SimpleNamespace
torch.cuda.current_device = lambda: 0
torch.cuda.get_device_name = lambda *_: "none"
torch.cuda.get_device_capability = lambda *_: (9, 0)
torch.cuda.get_device_properties = lambda *_: types.SimpleNamespace(name="none", major=9, minor=0, total_memory=2**37)
torch.cuda.mem_get_info = lambda *_: (2**36, 2**36)
warnings.simplefilter("ignore")
logging.disable(logging.WARNING)

import torch_tensorrt  # noqa: E402 - after the shell above stands in for CUDA
import torch_tensorrt.dynamo._compiler as compiler  # noqa: E402

from penumbra.export.bundle import NOT_MEASURED  # noqa: E402
from penumbra.export.golden import ask  # noqa: E402
from penumbra.export.parts import Part  # noqa: E402
from penumbra.export.tensorrt import RULES, Build, build, prepare  # noqa: E402
from penumbra.models.card import ExportFacts, WindowSpec  # noqa: E402
from penumbra.models.errors import PenumbraError  # noqa: E402
from penumbra.serving.engine.backends import load_backend  # noqa: E402
from penumbra.serving.engine.backends.tensorrt import target  # noqa: E402
from tests.models.small import card_of, seeded  # noqa: E402

aten = torch.ops.aten


class Op(nn.Module):
    def __init__(self, run: Any) -> None:
        super().__init__()
        self.run = run

    def forward(self, x: Tensor) -> Any:
        return self.run(x)


class LayerNormOverClasses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def last_row_plus_one(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, :, -1, 1:-1] += 1
    return x


OPERATORS: dict[str, nn.Module] = {
    "bilinear, corners aligned": Op(lambda x: F.interpolate(x, (29, 43), mode="bilinear", align_corners=True)),
    "bilinear, half pixels": Op(lambda x: F.interpolate(x, (29, 43), mode="bilinear", align_corners=False)),
    "bilinear, smaller": Op(lambda x: F.interpolate(x, (5, 7), mode="bilinear", align_corners=False)),
    "adaptive pooling to one": nn.AdaptiveAvgPool2d(1),
    "adaptive pooling to a grid": nn.AdaptiveAvgPool2d((3, 4)),
    "instance norm": nn.InstanceNorm2d(8),
    "layer norm over classes": LayerNormOverClasses(),
    "ceil-mode pooling": nn.MaxPool2d(3, 2, padding=1, ceil_mode=True),
    "normalise over width": Op(lambda x: F.normalize(x, dim=3)),
    "normalise over channels": Op(lambda x: F.normalize(x, dim=1)),
    "top-k": Op(lambda x: x.topk(3, dim=1).values),
    "the last row written": Op(last_row_plus_one),
    "entropy": Op(lambda x: -(x.log_softmax(1) * x.softmax(1)).sum(1)),
}


def operators() -> Iterator[tuple[Part, Build]]:
    card = card_of("toy")
    for name, module in OPERATORS.items():
        x = torch.randn(2, 8, 12, 17, generator=torch.Generator().manual_seed(0))
        part = Part(name, module.eval().requires_grad_(False), (x,), (x[:1],))
        yield part, build(part, card)


def networks(names: list[str]) -> Iterator[tuple[Part, Build]]:
    for name in names:
        network, card = seeded(name).requires_grad_(False), card_of(name)
        cpu = torch.device("cpu")
        for part, made in prepare(network, card, ask(network, card), precision="fp32", device=cpu):
            yield Part(f"{name} {part.name}", part.module, part.example, part.other), made


@torch.no_grad()
def main(names: list[str]) -> None:
    alone = {"refusal": refusal, "rules": rules}
    if names[0] in alone:
        return print(json.dumps(alone[names[0]]()))
    seen: dict[str, Any] = {}
    lower = compiler.post_lowering

    def lowered(graph: Any, settings: Any) -> Any:
        graph = lower(graph, settings)
        seen["graph"] = copy.deepcopy(graph)  # what comes next takes its constants away
        return graph

    compiler.post_lowering = lowered
    compiler.to_torch_device = lambda _: torch.device("cpu")  # where it would leave operators to torch
    compiler.dryrun_stats_display = lambda tracker, _: seen.update(tracker=tracker)
    for part, made in operators() if names == ["operators"] else networks(names):
        torch_tensorrt.dynamo.compile(
            made.program, inputs=[made.inputs], dryrun=True, min_block_size=1, disable_tf32=True, device="cuda:0"
        )
        tracker = seen["tracker"]
        report = {
            "graph": part.name,
            "supported": tracker.supported_ops_in_graph,
            "operators": tracker.total_ops_in_graph,
            "engines": tracker.tensorrt_graph_count,
            "in_torch": [*map(str, tracker.unsupported_ops), *map(str, tracker.to_run_in_torch)],
            "errors": [error_of(seen["graph"], part, made, call) for call in (part.example, part.other)],
        }
        print(json.dumps(report), flush=True)


def error_of(graph: Any, part: Part, made: Build, call: tuple[Any, ...]) -> float:
    """Largest difference, relative to the largest value, of the graph that would be converted, run by torch."""
    leaves = torch.utils._pytree.tree_leaves(call)
    got = torch.utils._pytree.tree_leaves(graph({name: leaves[int(name)] for name in made.inputs}))
    wanted = torch.utils._pytree.tree_leaves(part.module(*call))
    return max(float((g - w).abs().max() / w.abs().max()) for g, w in zip(got, wanted, strict=True))


def rules() -> dict[str, list[float]]:
    """Largest differences of our decompositions from torch's own operators, on plain tensors."""
    x = torch.randn(2, 3, 8, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pools = itertools.product((1, 2, 3), (1, 2, 3), (0, 1), (1, 2), (False, True))
    calls: dict[Any, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {
        aten.select_scatter.default: [((x, x[:, :, 0] + 1, 2, index), {}) for index in (-1, 0, 5)],
        aten.repeat.default: [((x, counts), {}) for counts in ((1, 2, 1, 3), (2, 1, 1, 1, 1))],
        aten.max_pool2d.default: [
            ((x, [taps, taps + 1], [step, 2], [min(pad, taps // 2), pad], [apart, 1], ceil), {})
            for taps, step, pad, apart, ceil in pools
        ],
        aten.var_mean.correction: [
            ((x, dim), {"correction": correction, "keepdim": keepdim})
            for dim, correction, keepdim in itertools.product(((2, 3), (1,), None), (0, 1, None), (False, True))
        ],
    }
    assert calls.keys() == RULES.keys()
    return {str(op): [_difference(op, *call) for call in each] for op, each in calls.items()}


def _difference(op: Any, args: tuple[Any, ...], options: dict[str, Any]) -> float:
    wanted, got = (torch.utils._pytree.tree_leaves(run(*args, **options)) for run in (op, RULES[op]))
    assert [each.shape for each in got] == [each.shape for each in wanted]
    return max(float((g - w).abs().max()) for g, w in zip(got, wanted, strict=True))


def refusal() -> dict[str, Any]:
    """What is said of engines from elsewhere, and of windows that an engine cannot have."""
    torch.cuda.is_available = lambda: True
    device = torch.device("cuda", 0)
    here = target(device)
    card = replace(card_of("toy"), window=WindowSpec(0, 0))
    facts = ExportFacts("tensorrt", "fp16", "2.13.0", {}, NOT_MEASURED, built_for=here | {"gpu": "NVIDIA A100"})
    said = {}
    for name, call in (
        ("sentence", lambda: load_backend(replace(card, export=facts), Path("store/toy/1"), device)),
        ("cpu", lambda: target(torch.device("cpu"))),
        ("open", lambda: prepare(seeded("toy"), card, ask(seeded("toy"), card), precision="fp16", device=device)),
    ):
        try:
            call()
        except PenumbraError as error:
            said[name] = str(error)
    return {"here": here, **said}


if __name__ == "__main__":
    main(sys.argv[1:])
