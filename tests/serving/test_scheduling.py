"""Scheduling as callers of a real server see it: deadlines with and without the anytime answer."""

import asyncio
import io
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import tritonclient.grpc as triton
from PIL import Image

from penumbra.models.errors import DeadlineExceeded
from penumbra.serving.engine.options import SegmentOptions
from penumbra.serving.engine.segmenter import Segmenter
from penumbra.serving.gateway import Gateway
from penumbra.serving.http.segment import answer_headers
from penumbra.serving.oip.grpc import Calls
from penumbra.serving.oip.protocol import Inference, response_of
from penumbra.serving.oip.request import InferRequest
from penumbra.serving.room import Bodies
from penumbra.serving.telemetry import Telemetry
from tests.conftest import FIXED, picture
from tests.serving.server import Server

IMAGE = picture(np.random.Generator(np.random.PCG64(0)), 120, 120)


def png() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(IMAGE).save(buffer, "PNG")
    return buffer.getvalue()


def test_an_anytime_answer_with_time_enough_has_all_its_samples_and_says_so(client: httpx.Client) -> None:
    asked = {"model": "toy-latent", "samples": 8, "seed": 3}
    plain, early = (
        client.post("/segment", params=asked | more, content=png(), headers={"Content-Type": "image/png"})
        for more in ({}, {"anytime": "true", "deadline_ms": 60_000})
    )
    assert early.json()["samples"] == early.json()["samples_asked"] == 8 and early.json()["warnings"] == []
    assert early.headers["x-penumbra-samples-asked"] == "8"
    assert early.json()["classes"] == plain.json()["classes"]
    assert "samples_asked" not in plain.json() and "x-penumbra-samples-asked" not in plain.headers


def test_fewer_samples_are_told_by_every_surface(toy_store: Path) -> None:
    with Segmenter(threads=1, device="cpu", tuning=FIXED) as segmenter:
        segmenter.load(toy_store / "toy-latent" / "1")
        prediction = segmenter.segment(IMAGE, SegmentOptions("toy-latent", samples=3))
    early = replace(prediction, num_asked=64)
    told = {"samples": 3, "samples_asked": 64}
    assert told.items() <= early.facts.items()
    assert told.items() <= response_of(early, InferRequest("toy-latent")).parameters.items()
    headers = answer_headers(early)
    assert (headers["X-Penumbra-Samples"], headers["X-Penumbra-Samples-Asked"]) == ("3", "64")


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
    call = {"time_remaining": lambda: within_s, "add_done_callback": lambda _: None}
    context = SimpleNamespace(invocation_metadata=lambda: (), **call)
    with Segmenter(threads=1, device="cpu", tuning=FIXED) as segmenter:
        segmenter.load(toy_store / "toy-latent" / "1")
        gateway = Gateway(segmenter, Telemetry(), limit_requests=2, timeout_s=60)
        gateway.state = "ready"
        answer = Calls(Inference(gateway), Bodies(2**20)).infer(message.SerializeToString(), context)
        if late:
            with pytest.raises(DeadlineExceeded):
                asyncio.run(answer)
        else:
            assert asyncio.run(answer)
