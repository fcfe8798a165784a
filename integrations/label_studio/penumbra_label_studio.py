"""An ML backend of Label Studio: brush masks of every class, made by a Penumbra server, each with a score.

    python penumbra_label_studio.py --penumbra http://localhost:3000 --model np_semiseg-camvid

It speaks the HTTP contract of Label Studio's ML backends (`/health`, `/setup`, `/predict`, `/webhook`) with
`label_studio_sdk`. The package `label-studio-ml` on the package index is of 2022 and wants Flask 1 and Redis; it is not
used.
"""

import argparse
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
from label_studio_sdk._extensions.label_studio_tools.core.utils.io import get_local_path
from label_studio_sdk.converter.brush import mask2rle
from label_studio_sdk.label_interface import LabelInterface
from penumbra_client import Client, Options, PenumbraError, Prediction


class Backend:
    """Answers tasks. A task's score is 1 - expected error: tasks in its order are those of `penumbra rank`, the
    least sure first."""

    def __init__(self, client: Client, options: Options, *, label_studio: str = "", token: str = "") -> None:
        """options: with a model. label_studio, token: where pictures that were uploaded there are fetched, and its
        access token."""
        self._client, self._options = client, options | Options(outputs="confidence")
        self._label_studio, self._token = label_studio, token

    def model_version(self) -> str:
        """Name the model and its version that answers by now. Raises PenumbraError."""
        model = self._options["model"]
        return f"{model} {max((one.version for one in self._client.models() if one.name == model), default='')}"

    def predict(self, tasks: list[dict[str, Any]], label_config: str) -> list[dict[str, Any]]:
        """Give a prediction for every task. Raises PenumbraError, ValueError and OSError."""
        controls = [one for one in LabelInterface(label_config).controls if one.tag == "BrushLabels"]
        if not controls:
            raise ValueError("the labelling configuration has no BrushLabels; add them, with the model's class names")
        return [self._predict(task, controls[0]) for task in tasks]

    def _predict(self, task: dict[str, Any], control: Any) -> dict[str, Any]:
        url = task["data"][control.objects[0].value_name]
        path = get_local_path(
            url, hostname=self._label_studio or None, access_token=self._token or None, task_id=task.get("id")
        )
        prediction = self._client.segment(Path(path), **self._options)
        expected_error = prediction.scores.expected_error
        return {
            "model_version": f"{prediction.model} {prediction.version}",
            "score": 1 - (1.0 if expected_error is None else expected_error),
            "result": list(_regions(prediction, control)),
        }


def _regions(prediction: Prediction, control: Any) -> Iterator[dict[str, Any]]:
    """One brush region for each class that the labelling configuration has too. Its score is its mean confidence."""
    height, width = prediction.labels.shape
    for name in prediction.shares:
        if name in control.labels:
            mask_HW = prediction.mask(name)
            yield {
                "from_name": control.name, "to_name": control.to_name[0], "type": "brushlabels",
                "original_width": width, "original_height": height, "image_rotation": 0,
                "score": float(prediction.maps["confidence"][mask_HW].mean()),
                "value": {"format": "rle", "rle": mask2rle(mask_HW.astype(np.uint8) * 255), "brushlabels": [name]},
            }  # fmt: skip


class Handler(BaseHTTPRequestHandler):
    """The contract's routes."""

    server: "Server"

    def do_GET(self) -> None:
        known = self.path.rstrip("/") in ("", "/health")
        self._answer(200 if known else 404, {"status": "UP", "model_class": "Penumbra"} if known else {})

    def do_POST(self) -> None:
        try:
            asked = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
            status, document = self._reply(asked)
        except (PenumbraError, ValueError, OSError) as error:
            status, document = 502 if isinstance(error, PenumbraError) else 400, {"error": str(error)}
        except (KeyError, TypeError, AttributeError) as error:
            status, document = 400, {"error": f"the request is not as Label Studio writes it ({error!r})"}
        self._answer(status, document)

    def _reply(self, asked: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        backend = self.server.backend
        if self.path == "/setup":
            return 200, {"model_version": backend.model_version()}
        if self.path == "/webhook":  # it does not train
            return 201, {}
        if self.path == "/predict":
            results = backend.predict(asked.get("tasks", []), asked["label_config"])
            version = results[-1]["model_version"] if results else backend.model_version()
            return 200, {"results": results, "model_version": version}
        return 404, {"error": f"there is no {self.path}"}

    def _answer(self, status: int, document: dict[str, Any]) -> None:
        body = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class Server(ThreadingHTTPServer):
    """A server with a backend."""

    def __init__(self, address: tuple[str, int], backend: Backend) -> None:
        super().__init__(address, Handler)
        self.backend = backend


def main() -> None:
    parser = argparse.ArgumentParser(description="An ML backend of Label Studio, answered by a Penumbra server.")
    parser.add_argument("--penumbra", default="http://localhost:3000", help="where the Penumbra server is")
    parser.add_argument("--key", help="its API key, where it wants one")
    parser.add_argument("--model", help="which model; may be left out where one is served")
    parser.add_argument("--max-risk", type=float, help="leave the most uncertain pixels to the annotator")
    parser.add_argument("--label-studio", default="", help="where Label Studio is, for pictures uploaded to it")
    parser.add_argument("--token", default="", help="its access token")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=9090)
    given = parser.parse_args()
    with Client(given.penumbra, key=given.key) as client:
        served = sorted({one.name for one in client.models()})
        model = given.model or (served[0] if len(served) == 1 else "")
        if model not in served:
            parser.error(f"--model is {model!r}; the server has {', '.join(served)}")
        options = Options(model=model)
        if given.max_risk is not None:
            options["max_risk"] = given.max_risk
        backend = Backend(client, options, label_studio=given.label_studio, token=given.token)
        Server((given.host, given.port), backend).serve_forever()


if __name__ == "__main__":
    main()
