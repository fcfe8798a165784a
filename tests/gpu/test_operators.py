"""The operators on the device under test: all cases that tests/serving/engine/gpu has, their tensors moved there."""

from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

cases = pytest.importorskip("tests.serving.engine.gpu.test_operators", reason="there are no operators yet")
globals().update({name: case for name, case in vars(cases).items() if name.startswith("test_")})


class Elsewhere:
    """The functions of a module, run on a device: tensors go there as they lie, and come back with what was written."""

    def __init__(self, module: Any, device: torch.device) -> None:
        self._module, self._device = module, device

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(self._module, name)

        def run(*arguments: Any, **named: Any) -> Any:
            moved: list[tuple[Tensor, Tensor]] = []
            answer = function(*self._move(arguments, moved), **self._move(named, moved))
            for host, there in moved:
                host.copy_(there)
            return answer.cpu() if isinstance(answer, Tensor) else answer

        return run

    def _move(self, value: Any, moved: list[tuple[Tensor, Tensor]]) -> Any:
        if isinstance(value, Tensor):
            there = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=self._device)
            moved.append((value, there.copy_(value)))
            return there
        if isinstance(value, dict):
            return {key: self._move(entry, moved) for key, entry in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self._move(entry, moved) for entry in value)
        if is_dataclass(value) and not isinstance(value, type):
            return replace(
                value, **{entry.name: self._move(getattr(value, entry.name), moved) for entry in fields(value)}
            )
        return value


@pytest.fixture(scope="module", autouse=True)
def on_the_device(device: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(cases, "operators", Elsewhere(cases.operators, torch.device(device)))
        yield
