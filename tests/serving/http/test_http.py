"""The HTTP surface of a real server over toys: exact answers, and every mistake a status and one sentence."""

import io
import json
import math
import socket
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from pycocotools import mask as coco

from penumbra.serving import VERSION
from penumbra.serving.http import jobs as job_routes
from penumbra.serving.http.routes import routes
from penumbra.serving.process import build_facts
from tests.conftest import CLASSES, GAIN, picture
from tests.serving.conftest import BODY_BYTES, PIXELS
from tests.serving.server import ROOT, Server, until


def png(image_HW3: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image_HW3).save(buffer, "PNG")
    return buffer.getvalue()


IMAGE = picture(np.random.Generator(np.random.PCG64(5)), 45, 70)
PNG = png(IMAGE)
LABELS = IMAGE.argmax(-1)
CLEAR = np.diff(np.sort(IMAGE.astype(int), axis=-1))[:, :, -1] > 0
"""Where one channel is the brightest: elsewhere rounding decides."""


def ask(client: httpx.Client, data: bytes = PNG, *, accept: str = "*/*", **options: object) -> httpx.Response:
    headers = {"Content-Type": "image/png", "Accept": accept}
    return client.post("/segment", content=data, headers=headers, params={"model": "toy-pointwise"} | options)  # type: ignore[arg-type]


def is_refused(response: httpx.Response, status: int, *words: str) -> str:
    """The refusal's sentence, once its status and form are right."""
    assert response.status_code == status, response.text
    body = response.json()
    assert list(body) == ["error"]
    sentence = str(body["error"])
    assert "Traceback" not in sentence and "\n" not in sentence and 10 < len(sentence) < 400
    for word in words:
        assert word in sentence
    return sentence


@pytest.fixture(autouse=True)
def _still_answers(client: httpx.Client) -> Iterator[None]:
    """After whatever a test did, a good request is answered right."""
    yield
    assert (labels_of(ask(client, accept="image/png")) == LABELS)[CLEAR].all()


def labels_of(response: httpx.Response) -> np.ndarray:
    assert response.status_code == 200, response.text
    return np.asarray(Image.open(io.BytesIO(response.content)))


def arrays_of(response: httpx.Response) -> dict[str, np.ndarray]:
    assert response.status_code == 200, response.text
    return dict(np.load(io.BytesIO(response.content)))


# -- answers -------------------------------------------------------------------------------------


def test_a_png_holds_class_ids_in_the_models_colours(client: httpx.Client) -> None:
    response = ask(client, accept="image/png")
    answer = Image.open(io.BytesIO(response.content))
    assert response.headers["content-type"] == "image/png"
    assert answer.mode == "P" and answer.size == (70, 45)
    assert (np.asarray(answer) == LABELS)[CLEAR].all()
    colors = np.array(answer.getpalette()).reshape(-1, 3)
    assert colors[:3].tolist() == [list(info.color) for info in CLASSES]


def test_json_holds_exactly_the_documented_fields(client: httpx.Client) -> None:
    answer = ask(client, accept="application/json", model="toy-latent", seed=7, samples=5).json()
    assert set(answer) == {
        "model", "version", "seed", "samples", "members", "windows", "size", "units", "timing_ms", "warnings",
        "abstained", "void_pixels", "classes",
    }  # fmt: skip
    assert (answer["model"], answer["version"], answer["seed"], answer["samples"]) == ("toy-latent", 1, 7, 5)
    assert answer["size"] == [45, 70] and answer["units"] == "nats" and answer["members"] == []
    assert {"wait", "decode", "queue", "run", "stitch", "read_out", "total"} <= set(answer["timing_ms"])
    for row in answer["classes"]:
        assert set(row) == {
            "id", "name", "pixels", "share", "mean_confidence", "mean_entropy", "mean_mutual_information", "rle",
        }  # fmt: skip
        assert 1 / 3 <= row["mean_confidence"] <= 1 and 0 < row["mean_entropy"] <= math.log(3)
    assert sum(row["pixels"] for row in answer["classes"]) == 45 * 70
    assert sum(row["share"] for row in answer["classes"]) == pytest.approx(1)


# pycocotools 2.0 implements numpy 1's array protocol.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_run_lengths_decode_to_the_exact_label_masks(client: httpx.Client) -> None:
    answer = ask(client, accept="application/json").json()
    labels = labels_of(ask(client, accept="image/png"))
    for row in answer["classes"]:
        mask = coco.decode({"size": row["rle"]["size"], "counts": row["rle"]["counts"].encode()})
        assert np.array_equal(mask, labels == row["id"])
        assert row["pixels"] == mask.sum() and row["name"] == CLASSES[row["id"]].name


def test_npz_holds_labels_and_the_asked_maps(client: httpx.Client) -> None:
    response = ask(client, accept="application/x-npz", outputs="entropy,margin")
    arrays = arrays_of(response)
    assert set(arrays) == {"labels", "entropy", "margin"}
    assert arrays["labels"].dtype == np.uint8 and arrays["entropy"].dtype == np.float32
    p = np.exp(GAIN * IMAGE.astype(np.float64) / 255)
    p /= p.sum(-1, keepdims=True)
    np.testing.assert_allclose(arrays["entropy"], -(p * np.log(p)).sum(-1), atol=2e-5)
    assert set(arrays_of(ask(client, accept="application/x-npz"))) == {"labels", "confidence", "entropy"}
    several = arrays_of(ask(client, accept="application/x-npz", model="toy-latent"))
    assert set(several) == {"labels", "confidence", "entropy", "mutual_information"}


BOXES = '[[10, 5, 60, 40, 1], [40, 20, 70, 45, "blue"]]'


def test_boxes_bring_their_members_and_the_answer_names_them(client: httpx.Client) -> None:
    answer = ask(client, accept="application/json", model="toy-boxed", boxes=BOXES, alpha=2).json()
    assert answer["members"] == ["plain", "boxed", "mixed"] and answer["samples"] == 3 and answer["warnings"] == []
    header = ask(client, model="toy-boxed", boxes=BOXES).headers["X-Penumbra-Members"]
    assert header == "plain,boxed,mixed"
    without = ask(client, accept="application/json", model="toy-boxed").json()
    assert without["members"] == [] and without["samples"] == 1


def test_tags_and_extra_maps_reach_the_answer(client: httpx.Client) -> None:
    labels = labels_of(ask(client, accept="image/png", model="toy-tagged", tags="red,2"))
    assert (labels == IMAGE[:, :, [0, 2]].argmax(-1) * 2)[CLEAR & (IMAGE[:, :, 0] != IMAGE[:, :, 2])].all()
    arrays = arrays_of(ask(client, accept="application/x-npz", model="toy-bright", outputs="brightness"))
    np.testing.assert_allclose(arrays["brightness"], IMAGE.mean(-1) / 255, atol=1e-5)
    row = ask(client, accept="application/json", model="toy-bright", outputs="brightness").json()["classes"][0]
    assert {"mean_brightness", "mean_entropy"} <= row.keys()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"boxes": "[[60, 5, 10, 40, 1]]"}, ("x0 < x1",)),
        ({"boxes": "[[0, 0, 71, 45, 1]]"}, ("leaves the image", "0 to 70")),
        ({"boxes": '[[0, 0, 7, 4, "sky"]]'}, ("'sky'", "red, green, blue")),
        ({"boxes": "7"}, ("JSON list",)),
        ({"tags": "red"}, ("tags", "takes boxes")),
        ({"alpha": "1"}, ("no boxes",)),
    ],
)
def test_a_bad_prompt_is_refused(client: httpx.Client, options: dict[str, str], words: tuple[str, ...]) -> None:
    is_refused(ask(client, model="toy-boxed", **options), 400, *words)


def test_headers_say_who_answered_and_how_long_each_phase_took(client: httpx.Client) -> None:
    headers = ask(client, model="toy-latent", seed=3, samples=2).headers
    names = ("model", "version", "seed", "samples")
    assert [headers[f"x-penumbra-{name}"] for name in names] == ["toy-latent", "1", "3", "2"]
    assert "run;dur=" in headers["server-timing"]


JSON, PICTURE, NPZ = "application/json", "image/png", "application/x-npz"


@pytest.mark.parametrize(
    ("accept", "media"),
    [
        ("", JSON),
        ("*/*", JSON),
        (JSON, JSON),
        (PICTURE, PICTURE),
        (NPZ, NPZ),
        ("image/*", PICTURE),
        ("application/*", JSON),
        ("IMAGE/PNG", PICTURE),
        ("application/json;q=0.1, image/png;q=0.9", PICTURE),
        ("application/json;q=0.9, image/png;q=0.1", JSON),
        ("application/x-npz, */*;q=0.1", NPZ),
        ("application/json;q=0, */*", PICTURE),
        ("image/*;q=0.5, application/x-npz;q=0.6", NPZ),
        ("text/html,application/xhtml+xml,*/*;q=0.8", JSON),
        ("application/json; charset=utf-8", JSON),
    ],
)
def test_the_accept_header_chooses_the_form_of_the_answer(client: httpx.Client, accept: str, media: str) -> None:
    assert ask(client, accept=accept).headers["content-type"] == media


@pytest.mark.parametrize("accept", ["text/html", "image/jpeg", "image/png;q=0", "*/*;q=0", "nonsense"])
def test_what_cannot_be_accepted_is_406_and_says_what_is_on_offer(client: httpx.Client, accept: str) -> None:
    is_refused(ask(client, accept=accept), 406, JSON, PICTURE, NPZ)


def test_a_form_and_a_raw_body_give_the_same_answer(client: httpx.Client) -> None:
    options = {"model": "toy-latent", "seed": "5", "samples": "3"}
    headers = {"Accept": NPZ}
    raw = arrays_of(ask(client, accept=NPZ, **options))
    files = {"image": ("a.png", PNG, "image/png")}
    form = client.post("/segment", files=files, data=options, headers=headers)
    mixed = client.post(
        "/segment",
        files=files,
        data={"seed": "5"},
        params={k: options[k] for k in ("model", "samples")},
        headers=headers,
    )
    octets = client.post(
        "/segment", content=PNG, params=options, headers=headers | {"Content-Type": "application/octet-stream"}
    )
    for response in (form, mixed, octets):
        for name, values in arrays_of(response).items():
            assert np.array_equal(values, raw[name])


def test_sixteen_mixed_requests_at_once_are_answered_as_alone(client: httpx.Client, rng: np.random.Generator) -> None:
    images = [png(picture(rng, *size)) for size in rng.integers(1, 150, (16, 2))]
    options = [{"model": ("toy-latent", "toy-opposed")[i % 2], "seed": i} for i in range(16)]
    with ThreadPoolExecutor(16) as threads:
        together = list(threads.map(lambda i: ask(client, images[i], accept=NPZ, **options[i]), range(16)))
    for i, response in enumerate(together):
        alone = arrays_of(ask(client, images[i], accept=NPZ, **options[i]))
        for name, values in arrays_of(response).items():
            assert values.tobytes() == alone[name].tobytes()


# -- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        ({"samples": "0"}, 400, ("samples is 0",)),
        ({"samples": "1000000000", "model": "toy-latent"}, 400, ("samples is 1000000000", "1 to 64")),
        ({"samples": "x"}, 400, ("samples is 'x'", "whole number")),
        ({"samples": "--5"}, 400, ("samples is '--5'", "whole number")),
        ({"samples": "3", "model": "toy-opposed"}, 400, ("samples is 3", "2 members")),
        ({"overlap": "1.5"}, 400, ("overlap is 1.5", "0 to 0.9")),
        ({"overlap": "nan"}, 400, ("overlap is nan", "0 to 0.9")),
        ({"overlap": "much"}, 400, ("overlap is 'much'",)),
        ({"seed": "-1"}, 400, ("seed is -1",)),
        ({"seed": str(2**63)}, 400, ("seed is",)),
        ({"outputs": "variance"}, 400, ("'variance'", "entropy")),
        ({"colour": "red"}, 400, ("'colour'", "known are")),
        ({"model": "unheard"}, 404, ("'unheard'", "toy-latent")),
        ({"model": ""}, 404, ("toy-latent",)),
        ({"version": "9"}, 404, ("version 9", "loaded are 1")),
        ({"model": "<script>" * 50}, 404, ("toy-latent",)),
    ],
)
def test_a_bad_option_is_refused_by_name_and_value(
    client: httpx.Client, options: dict[str, str], status: int, words: tuple[str, ...]
) -> None:
    is_refused(ask(client, accept=NPZ, **options), status, *words)


def test_a_model_must_be_named_where_several_are_served(client: httpx.Client) -> None:
    response = client.post("/segment", content=PNG, headers={"Content-Type": "image/png"})
    is_refused(response, 400, "model", "toy-latent")


@pytest.mark.parametrize("path", ["/segment", "/jobs"])
def test_an_option_in_a_header_of_answers_is_refused(client: httpx.Client, path: str) -> None:
    headers = {"Content-Type": "image/png", "X-Penumbra-Seed": "77"}
    is_refused(client.post(f"{path}?model=toy-latent", content=PNG, headers=headers), 400, "x-penumbra-seed", "query")


def test_an_option_given_twice_is_refused(client: httpx.Client) -> None:
    files = {"image": ("a.png", PNG, "image/png")}
    url = "/segment?model=toy-latent"
    is_refused(client.post(f"{url}&seed=1&seed=1", files=files), 400, "'seed'", "twice")
    is_refused(client.post(f"{url}&seed=1", files=files, data={"seed": "2"}), 400, "'seed'", "twice")
    is_refused(client.post(url, files=files, data={"seed": ["1", "2"]}), 400, "'seed'", "twice")


def bomb(side: int) -> bytes:
    """A PNG whose header promises side x side pixels, and none of them."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "status", "words"),
    [
        (b"", 400, ("empty",)),
        (b"this is text", 400, ("12 bytes", "none of PNG")),
        (PNG[: len(PNG) // 2], 400, ("PNG", "truncated")),
        (b"GIF89a" + bytes(20), 400, ("none of PNG",)),
        (bomb(600), 413, ("600x600 = 360,000", f"{PIXELS:,}", "send a smaller image")),
        (bomb(2**31 - 1), 413, (f"{PIXELS:,}", "send a smaller image")),
    ],
)
def test_a_bad_picture_is_refused(client: httpx.Client, data: bytes, status: int, words: tuple[str, ...]) -> None:
    is_refused(ask(client, data), status, *words)
    is_refused(client.post("/segment?model=toy-latent", files={"image": ("x.png", data, "image/png")}), status, *words)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_over_the_limit_is_refused(client: httpx.Client, chunked: bool) -> None:
    body = bytes(BODY_BYTES + 1)
    content = iter([body[:1000], body[1000:]]) if chunked else body
    response = client.post("/segment?model=toy-latent", content=content, headers={"Content-Type": "image/png"})
    is_refused(response, 413, f"{BODY_BYTES:,}", "send a smaller")


def test_a_chunked_body_within_the_limit_is_read(client: httpx.Client) -> None:
    parts = iter([PNG[:100], PNG[100:101], PNG[101:]])
    headers = {"Content-Type": "image/png", "Accept": "image/png"}
    response = client.post("/segment?model=toy-pointwise", content=parts, headers=headers)
    assert (labels_of(response) == LABELS)[CLEAR].all()


MULTIPART = "multipart/form-data; boundary=b"
TEXT_PART = b'--b\r\nContent-Disposition: form-data; name="image"\r\n\r\nhttp://127.0.0.1:1/x.png\r\n--b--\r\n'
PART = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n'
SEED_PART = b'--b\r\nContent-Disposition: form-data; name="seed"\r\n\r\n77'


@pytest.mark.parametrize(
    ("content_type", "body", "status", "words"),
    [
        ("multipart/form-data", PART + PNG + b"\r\n--b--\r\n", 400, ("boundary",)),
        ("multipart/form-data; boundary=", PART + PNG + b"\r\n--b--\r\n", 400, ("multipart",)),
        ("multipart/form-data; boundary=other", PART + PNG + b"\r\n--b--\r\n", 400, ()),
        (MULTIPART, b"", 400, ("no file field image",)),
        (MULTIPART, b"\x00\x01 garbage", 400, ()),
        (MULTIPART, PART + PNG[:100], 400, ()),
        (MULTIPART, PART + PNG + b"\r\n" + SEED_PART, 400, ("ends before its closing boundary",)),
        (MULTIPART, PART + PNG + b"\r\n--b\r\n", 400, ("ends before its closing boundary",)),
        (MULTIPART + "; charset=undefined", PART + PNG + b"\r\n--b--\r\n", 400, ("charset",)),
        (MULTIPART, b"--b--\r\n", 400, ("no file field image",)),
        (MULTIPART, b"--b\r\nContent-Type: image/png\r\n\r\nx\r\n--b--\r\n", 400, ("multipart",)),
        (MULTIPART, PART.replace(b'"image"', b'"file"') + PNG + b"\r\n--b--\r\n", 400, ("no file field image",)),
        (MULTIPART, PART + PNG + b"\r\n" + PART + PNG + b"\r\n--b--\r\n", 400, ("multipart",)),
        (MULTIPART, TEXT_PART, 400, ("no file field image",)),
        ("application/json", b'{"image": "http://127.0.0.1:1/x.png"}', 415, ("application/json", "multipart")),
        ("application/x-www-form-urlencoded", b"image=http://127.0.0.1:1/x.png", 415, ("multipart",)),
        ("text/plain", b"x", 415, ("'text/plain'",)),
        ("", b"x", 415, ("of no type",)),
        ("application/vnd.bentoml+pickle", b"\x80\x04.", 415, ("pickle",)),
    ],
)  # fmt: skip
def test_a_body_that_is_not_a_picture_or_a_form_with_one_is_refused(
    client: httpx.Client, content_type: str, body: bytes, status: int, words: tuple[str, ...]
) -> None:
    headers = {"Content-Type": content_type} if content_type else {}
    is_refused(client.post("/segment?model=toy-latent", content=body, headers=headers), status, *words)
    is_refused(client.post("/jobs?model=toy-latent", content=body, headers=headers), status, *words)


@pytest.mark.parametrize(
    "path", ["/nowhere", "/segment/", "/models/toy-latent/1", "/v9", "/static_content/x", "//predict", "/predict/"]
)
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
def test_an_unknown_path_is_404_and_points_to_the_documentation(client: httpx.Client, method: str, path: str) -> None:
    response = client.request(
        method, httpx.URL(f"{client.base_url}".rstrip("/") + path), content=b"" if method == "GET" else b"x"
    )
    is_refused(response, 404, "/docs.json")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/segment"), ("PUT", "/segment"), ("DELETE", "/segment"), ("POST", "/models"), ("DELETE", "/models/x"),
        ("POST", "/metrics"), ("POST", "/readyz"), ("PUT", "/docs.json"), ("GET", "/predict"), ("PATCH", "/"),
        ("OPTIONS", "/segment"), ("OPTIONS", "/predict"), ("PUT", "/predict"), ("POST", "/schema.json"),
    ],
)  # fmt: skip
def test_a_wrong_method_is_405(client: httpx.Client, method: str, path: str) -> None:
    response = client.request(method, path)
    is_refused(response, 405)
    assert response.headers["allow"]


def test_a_model_that_breaks_on_a_picture_is_500_without_internals_and_fails_no_other(client: httpx.Client) -> None:
    broken = IMAGE.copy()
    broken[20, 30] = 255

    def request(data: bytes) -> httpx.Response:
        return ask(client, data, accept="image/png", model="toy-nan")

    with ThreadPoolExecutor(9) as threads:
        responses = list(threads.map(request, [png(broken), *[PNG] * 8]))
    is_refused(responses[0], 500, "toy-nan", "not finite")
    for response in responses[1:]:
        assert (labels_of(response) == LABELS)[CLEAR].all()


# -- BentoML's own client ------------------------------------------------------------------------


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
    assert set(answer) == {"labels", "confidence", "entropy"}
    assert set(several) == {"labels", "confidence", "entropy", "mutual_information"}
    assert (np.array(answer["labels"]) == LABELS)[CLEAR].all()


def test_the_typed_answer_says_what_to_know_of_it_where_there_is_something() -> None:
    code = (
        "from types import SimpleNamespace as Some; import numpy as np; from serving.service import _as_lists\n"
        "for said in ((), ('a sentence',)):\n"
        "    print(_as_lists(Some(labels_HW=np.zeros((1, 1), int), warnings=said, "
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


# -- the rest of the surface ---------------------------------------------------------------------


def test_models_are_listed_with_their_facts(client: httpx.Client) -> None:
    answer = client.get("/models").json()
    models = {model["name"]: model for model in answer["models"]}
    assert sorted(models) == list(models) and {"toy-boxed", "toy-bright", "toy-latent", "toy-nan"} <= models.keys()
    assert models["toy-boxed"]["prompt"] == "boxes" and models["toy-bright"]["extra_maps"] == ["brightness"]
    assert answer["refused"] == []
    latent = models["toy-latent"]
    assert latent["classes"] == ["red", "green", "blue"] and latent["window"] == [32, 48]
    assert latent["sampling"]["kind"] == "latent" and latent["version"] == 1


def test_the_version_and_the_commit_are_the_same_everywhere(client: httpx.Client) -> None:
    told = client.get("/version").json()
    assert told == build_facts("") and told["version"] == VERSION
    described = client.get("/docs.json").json()["info"]
    assert (described["version"], described.get("x-commit")) == (told["version"], told.get("commit"))
    assert (
        f'penumbra_build_info{{commit="{told.get("commit", "")}",version="{VERSION}"}} 1.0'
        in client.get("/metrics").text
    )


@pytest.mark.parametrize(
    "path", ["/models?name=x", "/models/toy-latent?version=2", "/jobs/x?format=json", "/jobs/x/result?a"]
)
def test_a_path_without_options_refuses_a_query_and_does_not_pass_it_over(client: httpx.Client, path: str) -> None:
    response = client.get(path)
    assert response.request.url.query
    is_refused(response, 400, "takes no option", repr(path.split("?")[1].split("=")[0]))


def test_a_model_shows_its_card(client: httpx.Client) -> None:
    card = client.get("/models/toy-opposed").json()
    assert card["sampling"]["members"] == ["plus", "minus"] and card["export"]["parity"]["label_flips_percent"] == 0
    is_refused(client.get("/models/unheard"), 404, "'unheard'", "toy-latent")


def test_health_says_live_and_ready(client: httpx.Client) -> None:
    assert client.get("/healthz").json() == client.get("/livez").json() == {"live": True}
    assert client.get("/readyz").json() == {"ready": True, "state": "ready"}
    assert client.head("/readyz").status_code == 200


def metrics(client: httpx.Client) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = text_string_to_metric_families(client.get("/metrics").text)
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def total(samples: dict[Any, float], name: str, **labels: str) -> float:
    return sum(
        v for (n, have), v in samples.items() if n == f"penumbra_{name}" and labels.items() <= dict(have).items()
    )


def test_counters_equal_the_requests_that_were_sent(client: httpx.Client) -> None:
    before = metrics(client)
    for _ in range(3):
        ask(client, model="toy-latent", samples=4)
    for _ in range(2):
        ask(client, samples="x")
    ask(client, model="unheard")
    after = metrics(client)

    def counted(name: str, **labels: str) -> float:
        return total(after, name, **labels) - total(before, name, **labels)

    assert counted("request_seconds_count", status="200", model="toy-latent", protocol="http") == 3
    assert counted("request_seconds_count", status="400") == 2
    assert counted("request_seconds_count", status="404", model="") == 1
    assert counted("rejected_total", reason="BadOption") == 2
    assert counted("rejected_total", reason="UnknownModel") == 1
    windows = 2 * 2
    assert counted("windows_total", model="toy-latent") == 3 * windows
    assert counted("samples_total", model="toy-latent") == 3 * windows * 4
    assert counted("entropy_mean_count", model="toy-latent") == 3
    assert counted("phase_seconds_count", phase="run") == 3
    assert total(after, "inflight") == 0 and total(after, "queue_windows") == 0
    assert total(after, "model_load_seconds", model="toy-nan") > 0


def test_metrics_come_as_openmetrics_where_asked(client: httpx.Client) -> None:
    plain = client.get("/metrics")
    assert plain.headers["content-type"].startswith("text/plain")
    openmetrics = client.get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    assert openmetrics.headers["content-type"].startswith("application/openmetrics-text")
    assert openmetrics.text.endswith("# EOF\n")


def test_no_client_can_make_new_metric_labels(client: httpx.Client) -> None:
    client.get("/no/such/path/zyx")
    ask(client, model="made-up-name")
    assert "zyx" not in client.get("/metrics").text
    assert "made-up-name" not in client.get("/metrics").text


PAGES = {"/", "/playground/{name}", "/docs", "/{path:path}"}
"""For people."""


def test_the_documentation_lists_every_route_and_every_listed_route_exists(
    server: Server, client: httpx.Client
) -> None:
    listed = client.get("/docs.json").json()["paths"]
    all_routes = [*routes(None, "0"), *job_routes.routes(None, None)]  # type: ignore[arg-type]
    ours = {route.path for route in all_routes} - PAGES  # type: ignore[attr-defined]
    v2 = {path for path in listed if path.startswith("/v2")}  # each is asked in test_oip.py
    assert set(listed) - v2 == ours | {"/predict"}
    for path, methods in ((path, listed[path]) for path in listed if path not in v2):
        for method in methods:
            response = client.request(method, path.replace("{name}", "toy-latent"))
            unknown = response.status_code == 404 and "there is no job" not in response.text
            assert not unknown and response.status_code != 405, (method, path)
    page = client.get("/docs")
    assert page.headers["content-type"].startswith("text/html") and all(f" {path}<" in page.text for path in listed)


LONG = {"model": "toy-latent", "samples": 64, "overlap": 0.5}
"""Options that make a picture of 500x500 px seconds of work, and nearly all that the queue holds."""


def connected(server: Server) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=30)


def test_a_caller_who_goes_away_while_sending_is_cancelled_and_not_a_bad_picture(
    server: Server, client: httpx.Client
) -> None:
    before = metrics(client)
    head = (
        "POST /segment?model=toy-latent HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 999\r\n\r\n"
    )
    with connected(server) as caller:
        caller.sendall(head.encode() + PNG[:200])
    until(lambda: total(metrics(client), "cancelled_total") == total(before, "cancelled_total") + 1)
    assert total(metrics(client), "rejected_total") == total(before, "rejected_total")


def test_a_caller_who_goes_away_is_counted_and_frees_the_queue(
    server: Server, client: httpx.Client, rng: np.random.Generator
) -> None:
    before = metrics(client)
    body = png(picture(rng, 500, 500) // 64)
    query = "&".join(f"{name}={value}" for name, value in LONG.items())
    head = (
        f"POST /segment?{query} HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with connected(server) as caller:
        caller.sendall(head.encode() + body)
        until(lambda: total(metrics(client), "queue_windows") > 0)
        refusal = ask(client, body, **LONG)
        is_refused(refusal, 429, "try again in")
        assert int(refusal.headers["retry-after"]) >= 1
    until(lambda: total(metrics(client), "cancelled_total") == total(before, "cancelled_total") + 1)
    assert total(metrics(client), "queue_windows") == 0


def test_a_caller_of_bentomls_route_who_goes_away_is_counted_and_frees_the_queue(
    server: Server, client: httpx.Client, rng: np.random.Generator
) -> None:
    before = metrics(client)
    wish = {"image": (picture(rng, 300, 300) // 64).tolist(), "model": "toy-latent", "samples": 64}
    body = json.dumps(wish, separators=(",", ":")).encode()
    head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with connected(server) as caller:
        caller.sendall(head.encode() + body)
        until(lambda: total(metrics(client), "queue_windows") > 0)
    until(lambda: total(metrics(client), "cancelled_total") == total(before, "cancelled_total") + 1, bound_s=60)
    assert total(metrics(client), "queue_windows") == 0
