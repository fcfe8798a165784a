"""Every mistake in a request over HTTP has a status and one sentence."""

from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.serving.conftest import BODY_BYTES, PIXELS
from tests.serving.http.asking import (
    CLEAR,
    IMAGE,
    LABELS,
    NPZ,
    PNG,
    ask,
    bomb,
    is_refused,
    labels_of,
    png,
)

pytestmark = pytest.mark.usefixtures("still_answers")


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
