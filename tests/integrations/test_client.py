"""The Python client, against the surface in this process, and in `make test-all` against a real server."""

import asyncio
import dataclasses
import io
import json
import re
import subprocess
import sys
import types
import typing
from collections.abc import Iterator, Mapping
from email.utils import formatdate
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import penumbra_client
import pytest
from penumbra_client import AsyncClient, Client, Failed, Job, Model, Options, Prediction, Refused, Scores, Unavailable
from penumbra_client.answers import FACTS, header_of
from penumbra_client.exchange import Call, Exchanges, Reply, Work
from PIL import Image

from tests.conftest import picture
from tests.serving.server import Server, free_port
from tests.toys import CLASSES

ROOT = Path(__file__).parents[2] / "integrations" / "client"
LATENT: Options = {"model": "toy-latent", "samples": 4, "seed": 3}


@pytest.fixture(params=["here", pytest.param("server", marks=pytest.mark.slow)])
def client(request: pytest.FixtureRequest) -> Iterator[Client]:
    if request.param == "here":
        surface = request.getfixturevalue("surface")
        yield Client("http://penumbra", transport=surface._transport)
        return
    with Client(request.getfixturevalue("server").url) as opened:
        yield opened


@pytest.fixture
def image(rng: np.random.Generator) -> np.ndarray:
    return picture(rng, 60, 90)


def equal(one: Prediction, other: Prediction) -> bool:
    return np.array_equal(one.labels, other.labels) and all(
        np.array_equal(one.maps[name], other.maps[name]) for name in {*one.maps, *other.maps}
    )


def test_an_answer_is_that_of_the_engine(client: Client, image: np.ndarray) -> None:
    prediction = client.segment(image, **LATENT, outputs=["default", "margin", "probabilities"])
    assert prediction.labels.shape == (60, 90) and prediction.labels.dtype == np.uint8
    assert prediction.views == "none"
    assert {*prediction.maps} == {"confidence", "entropy", "mutual_information", "margin"}
    assert prediction.probabilities is not None
    assert np.array_equal(prediction.probabilities.argmax(0), prediction.labels)
    np.testing.assert_allclose(prediction.probabilities.max(0), prediction.maps["confidence"], atol=1e-6)
    assert (prediction.model, prediction.seed, prediction.samples) == ("toy-latent", 3, 4)
    assert prediction.classes == tuple(one.name for one in CLASSES)
    expected = float(1 - prediction.maps["confidence"].mean())
    assert prediction.scores.expected_error == pytest.approx(expected, abs=1e-3) and not prediction.warning
    name = prediction.classes[prediction.labels[0, 0]]
    assert prediction.mask(name)[0, 0] and prediction.shares[name] == pytest.approx(prediction.mask(name).mean())
    assert prediction.timing_ms["run"] >= 0


def test_a_picture_comes_as_array_bytes_file_or_image(client: Client, image: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "street.png"
    Image.fromarray(image).save(path)
    forms = (image, path, str(path), path.read_bytes(), Image.fromarray(image))
    first, *others = [client.segment(form, **LATENT) for form in forms]
    assert all(equal(first, other) for other in others)


def test_an_image_of_inks_is_sent_as_colours(client: Client, image: np.ndarray) -> None:
    inks = Image.fromarray(image).convert("CMYK")
    assert equal(client.segment(inks, **LATENT), client.segment(inks.convert("RGB"), **LATENT))


def test_prompts_and_lists_are_written_as_the_server_reads_them(client: Client, image: np.ndarray) -> None:
    assert client.segment(image, **LATENT, views="flip").views == "flip"
    boxes = np.array([[1, 2, 15, 18, 1]])
    as_text = client.segment(image, model="toy-boxed", boxes="[[1, 2, 15, 18, 1]]")
    assert equal(client.segment(image, model="toy-boxed", boxes=boxes.tolist()), as_text)
    tagged = client.segment(image, model="toy-tagged", tags=[CLASSES[0].name, 2])
    assert equal(tagged, client.segment(image, model="toy-tagged", tags=f"{CLASSES[0].name},2"))


def test_what_to_know_of_an_answer_is_said(client: Client, rng: np.random.Generator, tmp_path: Path) -> None:
    twelve_bits = Image.fromarray(rng.integers(0, 2**12, (20, 30), dtype=np.uint16))
    twelve_bits.save(tmp_path / "dark.png")
    assert "0 (black) to 4095 (white)" in client.segment(tmp_path / "dark.png", **LATENT).warning


def test_other_forms_are_bytes(client: Client, image: np.ndarray) -> None:
    labels = Image.open(io.BytesIO(client.render(image, "image/png", **LATENT)))
    assert np.array_equal(np.asarray(labels), client.segment(image, **LATENT).labels)


def test_a_job_says_how_far_it_is_and_ends_as_the_same_answer(
    client: Client, image: np.ndarray, tmp_path: Path
) -> None:
    told: list[Job] = []
    prediction = client.run_job(image, told.append, **LATENT)
    assert equal(prediction, client.segment(image, **LATENT)) and prediction.classes
    assert told[-1].state == "done" and told[-1].percent == 100
    with pytest.raises(Refused, match="there is no job"):
        client.job(told[-1].id)
    job = client.wait(client.submit(image, "image/tiff", **LATENT))
    with Image.open(client.download(job, tmp_path / "labels.tif")) as labels:
        assert np.array_equal(np.asarray(labels), prediction.labels)
    assert [path.name for path in tmp_path.iterdir()] == ["labels.tif"]
    with pytest.raises(ValueError, match="the job's answer is image/tiff"):
        client.result(job)
    client.remove(job)


@pytest.mark.slow
def test_the_async_client_gives_the_same(server: Server, image: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "street.png"
    Image.fromarray(image).save(path)

    async def ask() -> list[Prediction]:
        async with AsyncClient(server.url) as client:
            models = [model.name for model in await client.models()]
            assert "toy-latent" in models
            job = await client.wait(await client.submit(path, "image/tiff", **LATENT))
            assert (await client.download(job, tmp_path / "labels.tif")).stat().st_size > 0
            await client.remove(job)
            return [
                *await asyncio.gather(*(client.segment(path, **LATENT) for _ in range(3))),
                await client.run_job(path, **LATENT),
            ]

    answers = asyncio.run(ask())
    with Client(server.url) as client:
        assert all(equal(client.segment(image, **LATENT), answer) for answer in answers)


def test_a_refusal_is_the_servers_own_sentence(client: Client, image: np.ndarray, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="there is no model 'nobody'") as refused:
        client.segment(image, model="nobody")
    assert refused.value.status == 404
    with pytest.raises(Refused, match=r"overlap is 1; 0 to 0\.9 is possible"):
        client.segment(image, **LATENT, overlap=1)
    (tmp_path / "street.jpg").write_bytes(b"no picture")
    with pytest.raises(Refused) as refused:
        client.segment(tmp_path / "street.jpg", **LATENT)
    assert refused.value.status == 400


def test_a_server_that_is_not_there_is_said_in_a_sentence(image: np.ndarray) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with Client(url) as client, pytest.raises(Unavailable, match=f"{url} cannot be asked .*is a Penumbra server"):
        client.segment(image)


def steps(replies: list[Reply], patience_s: float = 60, path: str = "/models") -> list[Call | Work | float]:
    """What an exchange does when it is answered so."""
    exchange = Exchanges(patience_s).ask(Call("GET", path))
    done = [next(exchange)]
    for reply in replies:
        try:
            done.append(exchange.send(reply))
        except StopIteration:
            return done
        done.append(exchange.send(None))
    raise AssertionError("the exchange did not end")


def refusal(status: int, **headers: str) -> Reply:
    named = {name.replace("_", "-"): text for name, text in headers.items()}
    return Reply(status, httpx.Headers(named), b'{"error": "the queue is full"}')


DONE = Reply(200, httpx.Headers(), b"{}")


def test_a_full_server_is_asked_again_when_it_says() -> None:
    call = Call("GET", "/models")
    assert steps([refusal(429, Retry_After="7"), refusal(503, Retry_After="2"), DONE]) == [call, 7, call, 2, call]
    assert steps([refusal(503), refusal(503), DONE]) == [call, 0.25, call, 0.5, call]
    _, wait_s, _ = steps([refusal(429, Retry_After=formatdate(2**33, usegmt=True)), DONE], patience_s=2**34)
    assert isinstance(wait_s, float) and wait_s > 2**32
    for past in ("0", formatdate(0, usegmt=True)):
        assert steps([refusal(429, Retry_After=past), DONE]) == [call, 0.25, call]
    with pytest.raises(Unavailable, match="the queue is full"):
        steps([refusal(429, Retry_After="40"), refusal(429, Retry_After="40")])
    with pytest.raises(Refused, match="the server answered 302 without a reason"):
        steps([Reply(302, httpx.Headers({"Location": "/login"}), b"")])
    with pytest.raises(Failed):
        steps([refusal(500, Retry_After="1")])


def test_a_job_outlasts_a_server_that_is_away() -> None:
    call = Call("GET", "/jobs/17")
    assert steps([refusal(0), refusal(502), DONE], path=call.path) == [call, 0.25, call, 0.5, call]
    with pytest.raises(Unavailable, match="the queue is full"):
        steps([refusal(0)] * 9, path=call.path, patience_s=1)
    for status, kind in ((0, Unavailable), (502, Failed)):
        with pytest.raises(kind):
            steps([refusal(status)])


class Away(httpx.BaseTransport):
    """The surface, with a connection that breaks at every look at a job."""

    def __init__(self, surface: httpx.BaseTransport) -> None:
        self._surface = surface

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            raise httpx.ReadError("connection reset by peer")
        return self._surface.handle_request(request)


def test_a_job_that_is_lost_is_named(surface: httpx.Client, image: np.ndarray) -> None:
    told: list[Job] = []
    client = Client("http://penumbra", transport=Away(surface._transport), patience_s=0)
    with pytest.raises(Unavailable) as lost:
        client.run_job(image, told.append, **LATENT)
    assert str(lost.value).startswith(f"job {told[0].id}: http://penumbra cannot be asked (connection reset by peer)")
    client.remove(told[0])


class Busy(httpx.BaseTransport):
    """The surface, behind something that refuses every first try."""

    def __init__(self, surface: httpx.BaseTransport) -> None:
        self._surface, self.statuses = surface, [429, 503]

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        if self.statuses:
            return httpx.Response(self.statuses.pop(), headers={"Retry-After": "0"}, content=b"<html>busy</html>")
        return self._surface.handle_request(request)


def test_a_file_is_sent_whole_again_after_a_refusal(surface: httpx.Client, image: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "street.png"
    Image.fromarray(image).save(path)
    busy = Busy(surface._transport)
    with Client("http://penumbra", transport=busy) as client:
        assert client.segment(path, **LATENT).labels.shape == (60, 90)
    assert not busy.statuses
    with (
        Client("http://penumbra", transport=Busy(surface._transport), patience_s=-1) as client,
        pytest.raises(Unavailable, match="<html>busy"),
    ):
        client.models()


@pytest.mark.slow
def test_a_real_server_without_room_for_jobs_is_unavailable_in_its_own_words(server: Server) -> None:
    large = np.zeros((500, 500, 3), np.uint8)
    with Client(server.url, patience_s=30) as client:
        jobs = [client.submit(large, **LATENT | {"samples": 64, "overlap": 0.8}) for _ in range(4)]
        with pytest.raises(Unavailable, match="4 jobs are waiting and the limit is 4") as full:  # it says 60 s
            client.submit(large, **LATENT)
        assert full.value.status == 429
        for job in jobs:
            client.remove(job)


@pytest.fixture(scope="module")
def document(surface: httpx.Client) -> Mapping[str, Any]:
    return dict(surface.get("/docs.json").json())


def test_options_are_those_of_the_servers_document(document: Mapping[str, Any]) -> None:
    kinds = {"integer": {int}, "number": {float}, "boolean": {bool}, "string": {str}}
    hints = typing.get_type_hints(Options)
    schemas = {one["name"]: one["schema"] for one in document["paths"]["/segment"]["post"]["parameters"]}
    assert {*hints} == {*schemas}
    for name, hint in hints.items():
        parts = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        assert kinds[schemas[name]["type"]] <= {*parts}, name


def test_answers_jobs_and_models_are_those_of_the_servers_document(document: Mapping[str, Any]) -> None:
    answer = document["paths"]["/segment"]["post"]["responses"]["200"]
    assert {*answer["headers"]} == {header_of(name) for name in FACTS}
    assert {*FACTS} - {*Scores._fields} <= {field.name for field in dataclasses.fields(Prediction)}
    schemas = document["components"]["schemas"]
    for kind in (Job, Model):
        assert {field.name for field in dataclasses.fields(kind)} == {*schemas[kind.__name__]["properties"]}
    states = schemas["Job"]["properties"]["state"]["enum"]
    assert states == ["queued", "running", "writing", "done", "failed"]


def test_what_is_answered_is_what_the_document_says(
    surface: httpx.Client, document: Mapping[str, Any], image: np.ndarray
) -> None:
    client = Client("http://penumbra", transport=surface._transport)
    headers = {"Content-Type": "image/png", "Accept": "application/x-npz"}
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    asked = {"model": "toy-latent", "deadline_ms": 60_000, "anytime": "true", "views": "flip"}
    answer = surface.post("/segment", content=buffer.getvalue(), params=asked, headers=headers)
    said = {name for name in answer.headers if name.startswith("x-penumbra-")}
    assert {"x-penumbra-samples-asked", "x-penumbra-views"} <= said <= {header_of(name).lower() for name in FACTS}
    job = client.submit(image, **LATENT)
    assert {*surface.get(job.url).json()} == {*document["components"]["schemas"]["Job"]["properties"]}
    client.remove(client.wait(job))
    assert {*document["components"]["schemas"]["Model"]["required"]} <= {*surface.get("/models").json()["models"][0]}


def test_it_is_typed_and_needs_httpx_and_numpy_alone() -> None:
    code = "import json, sys, penumbra_client; print(json.dumps([*sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(ROOT)}, capture_output=True, check=True)
    assert not {"torch", "penumbra", "bentoml", "PIL"} & {*json.loads(done.stdout)}
    needed = re.search(r"^dependencies = \[(.*)\]", (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
    assert needed and re.findall(r'"(\w+)', needed[1]) == ["httpx", "numpy"]
    assert (ROOT / "penumbra_client" / "py.typed").is_file()
    assert all(getattr(penumbra_client, name).__doc__ for name in penumbra_client.__all__)
