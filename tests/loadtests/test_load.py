"""The load test finds what it is there to find, and a sound server passes it."""

import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from loadtests.pictures import SIZES, WrongAnswer, check, picture
from loadtests.run import ask, judge, main
from tests.serving.server import Server

SEEN: dict[str, Any] = {
    "errors": [], "requests": 10, "refused": {"http small": 1},
    "by_name": {"http small": {"requests": 7}, "bad: no picture": {"requests": 1}, "http cancelled": {"requests": 2}},
}  # fmt: skip
COUNTED = {"answers 200": 7.0, "answers 400": 1.0, "answers 429": 1.0, "penumbra_inflight": 0.0}


@pytest.mark.parametrize("size", SIZES)
def test_no_pixel_of_a_picture_has_two_brightest_channels(size: str) -> None:
    ordered = np.sort(picture(size, 3).pixels_HW3.astype(int), axis=2)
    assert (ordered[..., 2] > ordered[..., 1]).all()


def test_one_wrong_label_is_a_wrong_answer() -> None:
    asked = picture("small", 0)
    labels = asked.brightest_HW
    check(labels, asked, exact=True)
    labels[3, 4] = (labels[3, 4] + 1) % 3
    with pytest.raises(WrongAnswer, match="1 of 12288 labels"):
        check(labels, asked, exact=True)


def test_a_run_in_which_every_request_has_its_answer_is_well() -> None:
    assert judge(SEEN, COUNTED) == []


@pytest.mark.parametrize(
    ("seen", "counted", "sentence"),
    [
        ({"errors": ["http small: wrong"]}, {}, "http small: wrong"),
        ({"requests": 0, "by_name": {}, "refused": {}}, {"answers 200": 0.0}, "no request was sent"),
        ({}, {"answers 500": 1.0}, "1 answers with 5xx"),
        ({}, {"answers 200": 5.0}, "callers saw 6 answers and cancelled 2; the server counts 5"),
        ({}, {"answers 200": 9.0}, "callers saw 6 answers and cancelled 2; the server counts 9"),
        ({}, {"penumbra_inflight": 2.0}, "penumbra_inflight is 2"),
    ],
)
def test_what_is_wrong_is_said(seen: dict[str, Any], counted: dict[str, float], sentence: str) -> None:
    assert any(sentence in said for said in judge(SEEN | seen, COUNTED | counted))


@contextmanager
def lying(status: int, body: bytes) -> Iterator[Server]:
    """A server that gives everyone the same answer."""

    class Liar(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Liar) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield Server(f"http://127.0.0.1:{server.server_port}", "127.0.0.1:1", None, Path())  # type: ignore[arg-type]
        server.shutdown()
        thread.join()


def npz_of_another_picture() -> bytes:
    file = io.BytesIO()
    np.savez(file, labels=picture("small", 99).brightest_HW)
    return file.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("status", "body", "sentence"), [(500, b"{}", "500: "), (200, npz_of_another_picture(), "wrong: ")]
)
def test_a_server_that_fails_or_lies_is_found_out(tmp_path: Path, status: int, body: bytes, sentence: str) -> None:
    with lying(status, body) as server:
        seen = ask(server, tmp_path, seconds=2, users=2, classes=("Small",))
    assert seen["exit_code"] == 1 and seen["failures"] == seen["requests"] > 0
    assert any(sentence in error for error in judge(seen, {"answers 200": float(seen["requests"])}))


@pytest.mark.slow
def test_a_mix_of_callers_over_http_and_grpc_loses_nothing(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["--seconds", "8", "--users", "6", "--output", str(tmp_path / "load")])
    assert done.exit_code == 0, done.output
    document = json.loads((tmp_path / "load" / "summary.json").read_text())
    assert document["wrong"] == [] and document["seen"]["requests"] > 0
    assert "<html" in (tmp_path / "load" / "report.html").read_text().lower()


@pytest.mark.slow
def test_the_open_loop_sends_as_many_as_arrive_whatever_is_answered(tmp_path: Path) -> None:
    """Two a second for eight seconds: 16, and fewer than 3 in one of a hundred thousand runs."""
    with lying(500, b"{}") as server:
        seen = ask(server, tmp_path, seconds=8, users=1, classes=("OpenLoop",))
    assert set(seen["by_name"]) == {"http open loop"} and 3 <= seen["requests"] <= 40
