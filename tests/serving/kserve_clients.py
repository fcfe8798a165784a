"""Run by test_oip_peers in a Python that has kserve: one picture by each of its clients, and by each form of tensor."""

import asyncio
import sys

import numpy as np
from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest, RESTConfig

IMAGE = np.random.Generator(np.random.PCG64(3)).integers(0, 230, (50, 70, 3), dtype=np.uint8)


def request(model: str, *, binary: bool) -> InferRequest:
    tensor = InferInput("image", list(IMAGE.shape), "UINT8")
    tensor.set_data_from_numpy(IMAGE, binary_data=binary)
    return InferRequest(model_name=model, infer_inputs=[tensor], request_id="k-1", parameters={"seed": 5})


def check(way: str, answer: object) -> None:
    labels = next(output for output in answer.outputs if output.name == "labels")  # type: ignore[attr-defined]
    assert np.array_equal(labels.as_numpy().reshape(IMAGE.shape[:2]), IMAGE.argmax(-1)), way
    assert answer.id == "k-1", way  # type: ignore[attr-defined]
    print(way)


async def main(url: str, grpc_address: str, model: str) -> None:
    async with InferenceRESTClient(RESTConfig(protocol="v2")) as rest, InferenceGRPCClient(grpc_address) as grpc:
        assert await rest.is_server_live(url) and await rest.is_server_ready(url)
        assert await rest.is_model_ready(url, model) and not await rest.is_model_ready(url, "nope")
        assert await grpc.is_server_live() and await grpc.is_server_ready()
        assert await grpc.is_model_ready(model) and not await grpc.is_model_ready("nope")
        check("json", await rest.infer(url, request(model, binary=False), model_name=model))
        check("binary", await rest.infer(url, request(model, binary=True), model_name=model))
        check("grpc", await grpc.infer(request(model, binary=True)))


asyncio.run(main(*sys.argv[1:]))
