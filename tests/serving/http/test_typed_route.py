"""BentoML's typed route and its own client: the same labels, and the same refusals."""

import json
import subprocess
import sys
from typing import Any

import httpx
import numpy as np
import pytest

from tests.serving.http.asking import (
    CLEAR,
    IMAGE,
    LABELS,
    is_refused,
)
from tests.serving.server import ROOT, Server

pytestmark = pytest.mark.usefixtures("still_answers")


# BentoML 1.4 and what it imports warn of their own deprecations.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::PendingDeprecationWarning")
def test_bentomls_client_gets_the_same_labels(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BENTOML_DO_NOT_TRACK", "True")
    import bentoml

    with bentoml.SyncHTTPClient(server.url, timeout=60) as opened:
        answer = opened.predict(image=IMAGE, model="toy-pointwise")
        several = opened.predict(image=IMAGE, model="toy-opposed")
        with pytest.raises(bentoml.exceptions.BentoMLException, match="unheard"):
            opened.predict(image=IMAGE, model="unheard")
        opened._temp_dir.cleanup()  # which it would leave to the garbage collector
    assert set(answer) == {"labels", "confidence", "entropy", "scores"}
    assert set(several) == {"labels", "confidence", "entropy", "mutual_information", "scores"}
    error = 1 - np.mean(answer["confidence"])
    assert answer["scores"] == {"expected_error": pytest.approx(error, abs=1e-6), "novelty": None}
    assert (np.array(answer["labels"]) == LABELS)[CLEAR].all()


def test_the_typed_answer_says_what_to_know_of_it_where_there_is_something() -> None:
    code = (
        "from types import SimpleNamespace as Some; import numpy as np; from serving.service import _as_lists\n"
        "for said in ((), ('a sentence',)):\n"
        "    print(_as_lists(Some(labels_HW=np.zeros((1, 1), int), warnings=said, scored={}, "
        "maps=dict.fromkeys(('confidence', 'entropy'), np.zeros((1, 1))))).model_dump_json())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    silent, warned = map(json.loads, done.stdout.splitlines())
    assert "warnings" not in silent and warned["warnings"] == ["a sentence"]


def is_bentos_refusal(response: httpx.Response, status: int) -> None:
    """BentoML's own refusals of a body that does not fit the types have `detail` beside `error`."""
    assert response.status_code == status, response.text
    assert isinstance(response.json()["error"], str) and set(response.json()) <= {"error", "detail"}
    assert "Traceback" not in response.text


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"image": IMAGE.tolist(), "model": "unheard"}, 404),
        ({"image": IMAGE.tolist(), "model": "toy-latent", "samples": 0}, 400),
        ({"image": IMAGE.tolist(), "model": "toy-latent", "seed": -1}, 400),
        ({"image": [[1, 2], [3, 4]], "model": "toy-latent"}, 400),
        ({"image": (IMAGE.astype(int) + 100).tolist(), "model": "toy-latent"}, 400),
        ({"image": [], "model": "toy-latent"}, 400),
        ({"image": "http://127.0.0.1:1/x.png", "model": "toy-latent"}, 400),
        ({"image": [[1], [2, 3]], "model": "toy-latent"}, 400),
        ({"image": {"a": 1}, "model": "toy-latent"}, 400),
        ({"model": "toy-latent"}, 400),
        ({"image": IMAGE.tolist(), "model": "toy-latent", "samples": "many"}, 400),
        ([], 400),
        ("text", 400),
    ],
)
def test_the_typed_route_refuses_with_the_same_body(
    server: Server, client: httpx.Client, body: Any, status: int
) -> None:
    response = client.post("/predict", json=body)
    is_bentos_refusal(response, status)


@pytest.mark.parametrize("options", [{"sed": 77}, {"Seed": 77}, {"outputs": "entropy"}, {"overlap": 0.5}])
def test_the_typed_route_refuses_an_option_that_it_does_not_know(
    server: Server, client: httpx.Client, options: dict[str, object]
) -> None:
    response = client.post("/predict", json={"image": IMAGE.tolist(), "model": "toy-latent"} | options)
    is_bentos_refusal(response, 400)
    assert "takes image, model, samples and seed" in response.json()["error"]
    assert [one["loc"] for one in response.json()["detail"]] == [[name] for name in options]


@pytest.mark.parametrize(("change", "says"), [(100, "from 100 to 329; 0 to 255"), (-1, "from -1 to 228; 0 to 255")])
def test_the_typed_route_says_which_values_are_no_pixels(
    server: Server, client: httpx.Client, change: int, says: str
) -> None:
    image = IMAGE.astype(int) + change
    assert (IMAGE.min(), IMAGE.max()) == (0, 229)
    is_refused(client.post("/predict", json={"image": image.tolist(), "model": "toy-latent"}), 400, says)


def test_the_typed_route_refuses_options_in_the_query(server: Server, client: httpx.Client) -> None:
    response = client.post("/predict?seed=77", json={"image": IMAGE.tolist(), "model": "toy-latent"})
    is_refused(response, 400, "query", "in the JSON")


def test_the_typed_route_refuses_json_that_does_not_parse(server: Server, client: httpx.Client) -> None:
    response = client.post("/predict", content=b"{", headers={"Content-Type": "application/json"})
    is_bentos_refusal(response, 400)


@pytest.mark.parametrize(
    "content_type",
    ["application/vnd.bentoml+pickle", "application/x-pickle", "multipart/form-data; boundary=b", "", "text/plain"],
)
def test_the_typed_route_takes_json_alone_and_never_a_pickle(
    server: Server, client: httpx.Client, content_type: str
) -> None:
    headers = {"Content-Type": content_type} if content_type else {}
    is_refused(client.post("/predict", content=b"\x80\x04.", headers=headers), 415, "application/json")
