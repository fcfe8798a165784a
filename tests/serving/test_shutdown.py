"""SIGTERM: readiness falls first, accepted work finishes, then the process ends."""

import io
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.conftest import picture
from tests.serving.server import END_S, serving, until


@pytest.mark.slow
def test_on_sigterm_readiness_falls_first_and_a_request_in_flight_is_answered(
    toy_store: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    buffer = io.BytesIO()
    Image.fromarray(picture(rng, 300, 300)).save(buffer, "PNG")
    options = {"model": "toy-latent", "samples": "64", "overlap": "0.75"}
    with (
        serving(toy_store, tmp_path, predrain_s=1) as server,
        ThreadPoolExecutor(1) as threads,
        server.client() as client,
    ):

        def request() -> httpx.Response:
            with server.client() as own:
                return own.post(
                    "/segment", content=buffer.getvalue(), params=options,
                    headers={"Content-Type": "image/png", "Accept": "image/png"},
                )  # fmt: skip

        answer = threads.submit(request)
        until(lambda: "penumbra_inflight 1.0" in client.get("/metrics").text)
        server.process.send_signal(signal.SIGTERM)
        until(lambda: client.get("/readyz").status_code == 503)
        assert client.get("/readyz").json() == {"ready": False, "state": "draining"}
        assert not answer.done()
        response = answer.result(END_S)
        assert response.status_code == 200
        assert Image.open(io.BytesIO(response.content)).size == (300, 300)
        server.process.wait(END_S)
