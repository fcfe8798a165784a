"""A GPU to rehearse on: torch's fake CUDA tensors, stand-ins for streams, and a watch over every operator.

Nothing is computed there: what is on the device has a shape, a type and a place. What is on the host is real. Bytes
that come down are NaN until they were waited for, and then zeros.
"""

import ctypes
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from penumbra.serving.engine import operators
from penumbra.serving.engine.plain import Norm

aten = torch.ops.aten
CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
FAKE = FakeTensorMode(allow_non_fake_inputs=True)
"""One for all: fake tensors of two modes do not mix."""
STEPS = "steps"
"""The part of a batch that is not the network's own."""
NO_LAUNCH = {"aten::_unsafe_view", "aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty",
             "aten::new_empty_strided"}  # fmt: skip
"""What launches nothing, beside views."""
WAITING = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::is_nonzero",
    "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive", "aten::bincount", "aten::histc",
}  # fmt: skip
"""What makes the host wait, where a value on the device decides a shape or a number here."""
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_unsafe_index", "aten::_index_put_impl_"}
"""The same where they are given masks."""


class Stream:
    """A stream's place in time, and how much of other streams' work is done before what it does next."""

    def __init__(self, device: object = None) -> None:
        self.now, self._done = 0, dict[Stream, int]()

    def wait_stream(self, other: "Stream") -> None:
        for stream, time in {**other._done, other: other.now}.items():
            self._done[stream] = max(self._done.get(stream, 0), time)

    def is_after(self, stream: "Stream", time: int) -> bool:
        return stream is self or self._done.get(stream, 0) >= time


class Event:
    """The copies down that were under way on a stream where the event was recorded."""

    def __init__(self, watch: "Watch") -> None:
        self._watch, self._hosts = watch, list[Tensor]()

    def record(self) -> None:
        self._hosts, self._watch.under_way = self._watch.under_way, []

    def synchronize(self) -> None:
        for host in self._hosts:
            host.numpy().fill(0)


class Watch(TorchDispatchMode):
    """A watch checks every operator as it is dispatched, and counts launches by part, and bytes that go up and down.

    Raises AssertionError for what waits for the device, works on the host or mixes the two, for a copy that is not
    through pinned memory, and for what one stream does while another may still be at it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.part = STEPS
        self.clear()
        self.under_way: list[Tensor] = []
        self._main = self._stream = Stream()
        self._pinned: dict[int, Tensor] = {}
        self._homes: dict[int, Stream] = {}
        self._used: dict[int, tuple[Stream, int]] = {}
        self._borrowed: set[tuple[int, Stream]] = set()

    def clear(self) -> None:
        """Count from zero again. table_bytes: of the lists that operators are given, a tensor being three numbers."""
        self.launches: Counter[str] = Counter()
        self.names: Counter[tuple[str, str]] = Counter()
        self.up_bytes: Counter[torch.dtype] = Counter()
        self.num_up = self.num_down = self.down_bytes = self.table_bytes = 0

    @contextmanager
    def within(self, part: str) -> Iterator[None]:
        """Count what is launched as a part's."""
        before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = before

    @contextmanager
    def on(self) -> Iterator["Watch"]:
        """Rehearse what is in the `with` block."""
        stand_ins = {
            "Stream": Stream, "Event": self._event, "stream": self._on_stream,
            "current_stream": lambda device: self._stream,
        }  # fmt: skip
        with ExitStack() as stack:
            for name, stand_in in stand_ins.items():
                stack.enter_context(patch.object(torch.cuda, name, stand_in))
            stack.enter_context(patch.object(Tensor, "record_stream", self._record_stream))
            own = {name: partial(self._operate, name) for name in ("accumulate", "blend", "read_out")}
            form = SimpleNamespace(cut=self._cut, **own)
            stack.enter_context(patch.object(operators, "_form", lambda tensor, **_: form))
            for context in (guarded(), FAKE, self):
                stack.enter_context(context)
            yield self
        assert not self._borrowed, "a stream uses memory of another one, and the allocator was not told"

    def _event(self, *, blocking: bool) -> Event:
        assert blocking, "who waits for the device must sleep"
        return Event(self)

    @contextmanager
    def _on_stream(self, stream: Stream) -> Iterator[None]:
        before, self._stream = self._stream, stream
        try:
            yield
        finally:
            self._stream = before

    @property
    def _record_stream(self) -> Any:
        return lambda tensor, stream: self._borrowed.discard((place_of(tensor), stream))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.name().partition(".")[0]
        if kwargs.get("pin_memory"):
            return self._pin(func, args, kwargs)
        if func.namespace == "prim":  # a question
            return func(*args, **kwargs)
        if is_on_host(args, kwargs):
            return self._run_on_host(func, args, kwargs)
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:  # made of others, on a GPU too
                return func._op_dk(torch._C.DispatchKey.CompositeImplicitAutograd, *args, **kwargs)
        assert name not in WAITING, f"{self.part}: {name} waits for the device"
        if name in INDEXING:
            masks = [index for index in tensors(args[1]) if index.dtype in (torch.bool, torch.uint8)]
            assert not masks, f"{self.part}: {name} by a mask waits for the device"
        if name in ("aten::_to_copy", "aten::copy_") and (result := self._copy(func, args, kwargs)) is not None:
            return result
        used = tensors((args, kwargs))
        assert not any(one.dim() for one in used if one.device != CUDA), f"{self.part}: {name} mixes host and device"
        result = func(*args, **kwargs)
        if name not in NO_LAUNCH and not is_view(func):
            self._launch(func.name(), (args, kwargs))
        for tensor in () if is_view(func) or name == "aten::_unsafe_view" else tensors(result):
            self._touch(tensor, is_new=not func._schema.is_mutable)
        return result

    def _run_on_host(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Compute on the host: numbers, as those of shapes, and arrays as numpy has them."""
        if func in (aten.lift_fresh.default, aten.detach.default):
            return args[0]
        with unset_fake_temporarily():
            result = func(*args, **kwargs)
        assert not any(one.dim() for one in tensors(result)), f"{self.part}: {func} works on the host"
        return result

    def _pin(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        with unset_fake_temporarily():
            host: Tensor = func(*args, **{**kwargs, "pin_memory": False})
            host.numpy().view("u1").fill(255)
        self._pinned[place_of(host)] = host
        return host

    def _copy(self, func: Any, args: Any, kwargs: Any) -> Tensor | None:
        """Copy up or down; None where all stays on the device."""
        is_new = func is aten._to_copy.default
        source, target = args[0], kwargs.get("device") or args[0].device
        if not is_new:
            source, target = args[1], args[0].device
        if source.is_cuda and target.type == "cuda":
            return None
        host = args[0] if source.is_cuda else source
        asynchronous = kwargs.get("non_blocking") or args[2:3] == (True,)
        assert asynchronous and place_of(host) in self._pinned, f"{self.part}: {func} of {tuple(host.shape)} waits"
        if source is not host:
            self.num_down += 1
            self.down_bytes += source.nbytes
            self.under_way.append(host)
            self._touch(source)
            return host
        result: Tensor = torch.empty(source.shape, dtype=source.dtype, device=CUDA) if is_new else args[0]
        self.num_up += source.numel() > 0
        self.up_bytes[source.dtype] += source.nbytes
        self._touch(result, is_new=is_new)
        return result

    def _cut(self, pictures: list[Tensor], windows: list[int], size: tuple[int, int], norm: Norm) -> Tensor:
        self._operate("cut", pictures, windows, (norm.factor_C, norm.offset_C, norm.pads_PC, norm.bounds_2C))
        shape = (len(windows) // 7, len(norm.factor_C), *size)
        return torch.empty(shape, device=CUDA, memory_format=torch.channels_last)

    def _operate(self, name: str, *arguments: object, **named: object) -> None:
        """Launch one of our own operators, whose lists of tensors and numbers go up as a table."""
        given = (*arguments, *named.values())
        assert all(one.device == CUDA for one in tensors(given)), f"{self.part}: {name} mixes host and device"
        listed = pytree.tree_leaves([one for one in given if isinstance(one, list)])
        self.table_bytes += sum(24 if isinstance(one, Tensor) else 8 for one in listed)
        self._launch(f"penumbra::{name}", given)

    def _launch(self, name: str, used: Any) -> None:
        self._stream.now += 1
        self.launches[self.part] += 1
        self.names[self.part, name] += 1
        for tensor in tensors(used):
            self._touch(tensor)

    def _touch(self, tensor: Tensor, *, is_new: bool = False) -> None:
        place, here = place_of(tensor), self._stream
        if is_new or place not in self._homes:
            self._homes[place] = here
        else:
            assert here.is_after(*self._used[place]), f"{self.part}: a stream uses what another may still be at"
        if self._homes[place] is not here:
            self._borrowed.add((place, here))
        self._used[place] = here, here.now


def tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]


def place_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def is_on_host(args: Any, kwargs: Any) -> bool:
    used, device = tensors((args, kwargs)), kwargs.get("device")
    return all(one.device.type == "cpu" for one in used) and (device or CUDA if not used else device) in (None, CPU)


def is_view(func: Any) -> bool:
    return any(one.alias_info is not None and not one.alias_info.is_write for one in func._schema.returns)


@contextmanager
def guarded() -> Iterator[None]:
    """Let torch index tensors of a device that it was built without: it looks for the device's guard, and finds that of
    `meta`, which does nothing."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    registry = (ctypes.c_void_p * 21).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    before = registry[1]
    registry[1] = before or registry[14]
    try:
        yield
    finally:
        registry[1] = before
