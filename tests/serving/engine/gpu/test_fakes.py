"""Each operator is one call of torch's dispatcher, also on CUDA tensors that are fake, and no other call is made."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from penumbra.serving.engine import operators, plain
from penumbra.serving.engine.operators import Norm


class Calls(TorchDispatchMode):
    """Calls notes the name of every operator that is dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_all_four_are_one_call_each_on_fake_cuda_tensors() -> None:
    with torch.inference_mode(), FakeTensorMode():
        pictures = [torch.empty(40, 50, 3, dtype=torch.uint8, device="cuda") for _ in range(2)]
        vector = torch.empty(3, device="cuda")
        logits = torch.empty(4, 3, 19, 5, 6, device="cuda", dtype=torch.float16)
        stats = torch.empty(3, 16, 21, 17, device="cuda")
        canvases = [torch.empty(30, 21, 60, device="cuda") for _ in range(2)]
        out = torch.empty(5000, dtype=torch.uint8, device="cuda")
        with Calls() as calls:
            image = operators.cut(pictures, [0, 0, 0, 0, 40, 50] * 3, (16, 17), Norm(vector, vector, vector))
            operators.accumulate(
                logits, stats, first=True, align_corners=True, temperature=1.0, average_logits=False
            )  # fmt: skip
            window = [0, 0, 0, 0, 16, 0, 17, 0, 16, 0, 0]
            operators.blend(stats, canvases, [vector, vector], window * 3, num_sums=20, scale=0.25)
            segment = [0, 0, 4, 0, *[-1] * 9]
            operators.read_out(canvases, out, segment, [0.5] * 19, num_classes=19, softmax=False)
        assert calls.names == [f"penumbra.{name}.default" for name in ("cut", "accumulate", "blend", "read_out")]
        assert image.shape == (3, 3, 16, 17) and image.device.type == "cuda" and image.dtype == torch.float32
        assert image.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton runs here")
def test_where_triton_does_not_run_the_plain_forms_do_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("triton")
    assert operators._triton.__wrapped__() is plain
    assert "Triton does not run here" in caplog.text
