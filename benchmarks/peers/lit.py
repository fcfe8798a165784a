"""A LitServe server with its batching, after LitServe's guide: `python -m benchmarks.peers.lit PORT`."""

import base64
import sys
from typing import Any

from benchmarks.peers.network import PEERS, Network, from_environment

sys.path.append(str(PEERS))

import litserve


class Segment(litserve.LitAPI):
    """The five steps of LitServe; a batch is a list, so pictures may differ in size."""

    def setup(self, device: str) -> None:
        self.network: Network = from_environment()

    def decode_request(self, request: dict[str, str]) -> bytes:
        return base64.b64decode(request["image"])

    def batch(self, inputs: list[bytes]) -> list[bytes]:
        return inputs

    def predict(self, inputs: list[bytes]) -> list[bytes]:
        return self.network.answer(inputs)

    def unbatch(self, output: list[bytes]) -> list[bytes]:
        return output

    def encode_response(self, output: bytes) -> dict[str, Any]:
        return {"labels": base64.b64encode(output).decode()}


if __name__ == "__main__":
    api = Segment(max_batch_size=16, batch_timeout=0.01)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1, timeout=300)
    server.run(host="127.0.0.1", port=int(sys.argv[1]), generate_client_file=False, num_api_servers=1)
