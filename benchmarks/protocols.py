"""What the protocol layers cost: a toy request over HTTP and gRPC beside the engine alone, and 2 megapixels by each.

    python -m benchmarks.protocols

Bars: at most 3 ms over the engine for a toy request (medians), and gRPC at most a tenth slower than REST with binary
tensors for 2 megapixels. The clients are NVIDIA's and do their part of the work within what is measured; every variant
takes its turn in every round. The engine alone runs in this process, on the same store as the server.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http

from benchmarks.rounds import measure, save
from penumbra.export.bundle import export_network
from penumbra.models.card import WindowSpec
from penumbra.serving.engine.options import SegmentOptions
from penumbra.serving.engine.runtime import Tuning
from penumbra.serving.engine.segmenter import Segmenter
from tests.serving.server import serving
from tests.toys import toy_card

TOY_ROUNDS, LARGE_ROUNDS = 300, 15
SMALL, LARGE = (64, 96), (1224, 1634)
"""Pixels: two windows, and 2 megapixels, which are fifteen windows of the larger model."""
SIZES = {"windows_per_batch": 1, "samples_per_call": 1}
"""The same for both sides; what warm-up would choose differs from start to start by what else the machine does."""
MODELS = {"toy-small": WindowSpec(64, 48), "toy-large": WindowSpec(512, 512)}


def fill_store(store: Path) -> None:
    """Toys, whose own work is as little as can be: what remains is the way to them and back."""
    for name, window in MODELS.items():
        card, network = toy_card("pointwise", name=name, window=window)
        export_network(network, card, store)


def ask(client: Any, api: Any, model: str, image: np.ndarray, **more: Any) -> Callable[[], object]:
    tensor = api.InferInput("image", list(image.shape), "UINT8")
    tensor.set_data_from_numpy(image)

    def once() -> np.ndarray:
        answer: np.ndarray = client.infer(model, [tensor], **more).as_numpy("labels")
        return answer

    assert np.array_equal(once(), image.argmax(-1))
    return once


def main() -> None:
    rng = np.random.Generator(np.random.PCG64(0))
    small, large = (rng.integers(0, 230, (*size, 3), dtype=np.uint8) for size in (SMALL, LARGE))
    with tempfile.TemporaryDirectory() as folder:
        fill_store(Path(folder) / "store")
        with (
            Segmenter.open(Path(folder) / "store", threads=1, tuning=Tuning(**SIZES)) as engine,
            serving(Path(folder) / "store", Path(folder), log_level="WARNING", predrain_s=0, **SIZES) as server,
            triton_http.InferenceServerClient(server.url.removeprefix("http://"), network_timeout=120) as http,
            triton_grpc.InferenceServerClient(server.grpc_address) as grpc,
            httpx.Client(base_url=server.url, timeout=60, trust_env=False) as plain,
        ):
            toy = measure({
                "engine": lambda: engine.segment(small, SegmentOptions(model="toy-small")),
                "rest": ask(http, triton_http, "toy-small", small),
                "grpc": ask(grpc, triton_grpc, "toy-small", small),
                "health": lambda: plain.get("/v2/health/live"),
            }, rounds=TOY_ROUNDS)  # fmt: skip
            big = measure({
                "engine": lambda: engine.segment(large, SegmentOptions(model="toy-large")),
                "rest": ask(http, triton_http, "toy-large", large),
                "grpc": ask(grpc, triton_grpc, "toy-large", large),
            }, rounds=LARGE_ROUNDS)  # fmt: skip
    save("protocols", {
        "toy request through the engine, ms": 1e3 * toy["engine"],
        "REST adds, ms (bar 3)": 1e3 * (toy["rest"] - toy["engine"]),
        "gRPC adds, ms (bar 3)": 1e3 * (toy["grpc"] - toy["engine"]),
        "of it a request that does nothing, ms": 1e3 * toy["health"],
        "2 megapixels through the engine, ms": 1e3 * big["engine"],
        "REST over the engine": big["rest"] / big["engine"],
        "gRPC over the engine": big["grpc"] / big["engine"],
        "gRPC over REST, 2 megapixels (bar 1.1)": big["grpc"] / big["rest"],
    })  # fmt: skip


if __name__ == "__main__":
    main()
