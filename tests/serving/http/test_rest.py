"""Parsing of requests, and headers of answers, without a server."""

import json
from urllib.parse import unquote

import numpy as np
import pytest
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException
from starlette.responses import Response

from penumbra.serving.engine.answer import Prediction
from penumbra.serving.engine.options import MAX_BOXES, parse_options
from penumbra.serving.http.segment import answer_headers
from penumbra.serving.http.upload import parse_form
from tests.conftest import toy_card

HEADERS = Headers({"Content-Type": "multipart/form-data; boundary=x"})
FORM = (
    b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\npixels\r\n'
    b'--x\r\nContent-Disposition: form-data; name="seed"\r\n\r\n77\r\n--x--\r\n'
)


def test_as_many_boxes_as_a_request_may_have_fit_into_a_field() -> None:
    boxes = json.dumps([[0.1234567890123456 * 1000] * 4 + [3]] * MAX_BOXES).encode()
    head = b'--x\r\nContent-Disposition: form-data; name="boxes"\r\n\r\n'
    form = parse_form(Headers({"Content-Type": "multipart/form-data; boundary=x"}), head + boxes + b"\r\n--x--\r\n")
    assert len(parse_options({"boxes": str(form["boxes"])}).boxes) == MAX_BOXES


def test_a_large_upload_is_parsed_without_a_temporary_file() -> None:
    content = bytes(range(256)) * 12_000
    head = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
    form = parse_form(Headers({"Content-Type": "multipart/form-data; boundary=x"}), head + content + b"\r\n--x--\r\n")
    upload = form["image"]
    assert isinstance(upload, UploadFile)
    with upload.file as file:
        assert upload._in_memory, "it went to a file on disk"
        assert file.read() == content


@pytest.mark.parametrize("size", range(1, len(FORM) - 2))
def test_a_form_that_is_cut_off_anywhere_before_its_end_is_refused(size: int) -> None:
    with pytest.raises(MultiPartException, match=r"ends before its closing boundary|does not occur"):
        parse_form(HEADERS, FORM[:size])


WHOLE = [FORM, FORM[:-2], FORM[:-1], FORM + b"an epilogue\r\n--x\r\n", b"a preamble\r\n" + FORM, b"\r\n" + FORM]


@pytest.mark.parametrize("body", WHOLE)
def test_what_may_stand_around_a_form_is_passed_over(body: bytes) -> None:
    form = parse_form(HEADERS, body)
    upload = form["image"]
    assert form["seed"] == "77" and isinstance(upload, UploadFile)
    with upload.file as file:
        assert file.read() == b"pixels"


@pytest.mark.parametrize(
    ("content_type", "sentence"),
    [
        ("multipart/form-data; boundary=y", "does not occur in it"),
        ("multipart/form-data; boundary=", "names no boundary"),
        ("multipart/form-data", "names no boundary"),
    ],
)
def test_a_form_whose_boundary_is_not_found_says_so(content_type: str, sentence: str) -> None:
    with pytest.raises(MultiPartException) as refusal:
        parse_form(Headers({"Content-Type": content_type}), FORM)
    assert sentence in refusal.value.message


MEMBERS = ("plain", "Größe, 100 %", "日本\r\nSet-Cookie: a=b", "half \ud800")


def test_texts_of_a_card_reach_headers_as_printable_ascii_and_are_read_back() -> None:
    card, labels = toy_card("pointwise")[0], np.zeros((1, 1), np.uint8)
    prediction = Prediction(card, 0, 4, 1, MEMBERS, ("été\n", "a; b"), labels, {}, {"total": 1.0})
    sent = Response(headers=answer_headers(prediction)).raw_headers
    assert all(byte in range(0x20, 0x7F) for _, value in sent for byte in value)
    assert b"set-cookie" not in dict(sent)
    members = dict(sent)[b"x-penumbra-members"].decode().split(",")
    assert [unquote(name) for name in members] == [*MEMBERS[:3], "half ?"] and members[0] == "plain"
    assert unquote(dict(sent)[b"x-penumbra-warning"].decode()) == "été\n; a; b"
