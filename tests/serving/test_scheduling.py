"""Scheduling as callers of a real server see it: deadlines with and without the anytime answer."""

import asyncio
import io
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.grpc as triton
from PIL import Image

from models.errors import DeadlineExceeded
from serving.engine.segmenter import Segmenter
from serving.gateway import Gateway
from serving.oip import Inference
from serving.oip_grpc import Calls
from serving.telemetry import Telemetry
from tests.conftest import picture
from tests.serving.server import Server

IMAGE = picture(np.random.Generator(np.random.PCG64(0)), 120, 120)
ASKED = {"model": "toy-latent", "samples": 64, "overlap": 0.5, "seed": 3}


def png() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(IMAGE).save(buffer, "PNG")
    return buffer.getvalue()


def ask(client: httpx.Client, **options: Any) -> dict[str, Any]:
    answer = client.post("/segment", params=ASKED | options, content=png(), headers={"Content-Type": "image/png"})
    assert answer.status_code == 200, answer.text
    return answer.json() | {"header": answer.headers.get("x-penumbra-samples-asked")}


def test_an_early_answer_says_how_many_samples_it_has_of_how_many_and_is_that_answer(client: httpx.Client) -> None:
    """The deadline lies between the times of one sample and of all; how many fit depends on the machine."""
    started = time.perf_counter()
    ask(client)
    all_ms = 1e3 * (time.perf_counter() - started)
    early = ask(client, anytime="true", deadline_ms=all_ms / 2)
    assert early["samples_asked"] == 64 and early["header"] == "64" and 1 <= early["samples"] <= 64
    assert len(early["warnings"]) == (early["samples"] < 64)
    plain = ask(client, samples=early["samples"])
    assert plain["classes"] == early["classes"]
    assert plain["header"] is None and "samples_asked" not in plain


def test_over_grpc_the_answers_parameters_say_so(server: Server) -> None:
    image = triton.InferInput("image", list(IMAGE.shape), "UINT8")
    image.set_data_from_numpy(IMAGE)
    with triton.InferenceServerClient(server.grpc_address) as client:
        answer = client.infer("toy-latent", [image], parameters={"samples": 5, "anytime": True}, client_timeout=60)
    told = answer.get_response().parameters
    assert (told["samples"].int64_param, told["samples_asked"].int64_param) == (5, 5)


@pytest.mark.parametrize(("within_s", "late"), [(0.0, True), (60.0, False), (None, False)])
def test_grpcs_own_timeout_is_a_deadline(toy_store: Path, within_s: float | None, late: bool) -> None:
    pixels = np.zeros((8, 8, 3), np.uint8)
    message = triton.service_pb2.ModelInferRequest(model_name="toy-latent", raw_input_contents=[pixels.tobytes()])
    message.inputs.add(name="image", datatype="UINT8", shape=pixels.shape)
    context = SimpleNamespace(invocation_metadata=lambda: (), time_remaining=lambda: within_s)
    with Segmenter(threads=1, device="cpu") as segmenter:
        segmenter.load(toy_store / "toy-latent" / "1")
        gateway = Gateway(segmenter, Telemetry(), limit_requests=2, timeout_s=60)
        gateway.state = "ready"
        call = Calls(Inference(gateway)).infer(message.SerializeToString(), context)
        if late:
            with pytest.raises(DeadlineExceeded):
                asyncio.run(call)
        else:
            assert asyncio.run(call)
