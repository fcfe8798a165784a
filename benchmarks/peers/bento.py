"""A plain BentoML service with its adaptive batching, after BentoML's guide; a batch is a list of pictures."""

import base64

import bentoml

CLIENTS = 16


@bentoml.service(workers=1, traffic={"timeout": 300}, logging={"access": {"enabled": False}})
class Segment:
    def __init__(self) -> None:
        from benchmarks.peers.network import from_environment

        self.network = from_environment()

    @bentoml.api(batchable=True, max_batch_size=CLIENTS, max_latency_ms=60_000)
    def segment(self, images: list[str]) -> list[str]:
        jpegs = [base64.b64decode(image) for image in images]
        return [base64.b64encode(png).decode() for png in self.network.answer(jpegs)]
