"""The Processing provider in the real QGIS, without a screen (`qgis_process`, of Debian's package `qgis`)."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import httpx
import numpy as np
import pytest
import rasterio
from penumbra_client import Client
from rasterio.transform import from_origin

from tests.conftest import picture
from tests.integrations.tools import ROOT
from tests.serving.server import Server

QGIS = shutil.which("qgis_process.bin") or shutil.which("qgis_process")
"""Debian's wrapper of 3.22 gives it an option that it does not know, so what is wrapped is asked."""
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        QGIS is None, reason="qgis_process is not installed (Debian: qgis, qgis-providers, python3-qgis)"
    ),
]
TRANSFORM = from_origin(500_000, 5_400_000, 2, 2)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home in which the plugin is installed and enabled."""
    home = tmp_path_factory.mktemp("home")
    plugins = home / ".local/share/QGIS/QGIS3/profiles/default/python/plugins"
    shutil.copytree(ROOT / "integrations" / "qgis" / "penumbra_qgis", plugins / "penumbra_qgis")
    done = qgis(home, "plugins", "enable", "penumbra_qgis")
    assert done.returncode == 0, done.stdout + done.stderr
    return home


def qgis(home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    kept = {name: text for name, text in os.environ.items() if name in ("PATH", "LANG")}
    environment = kept | {"HOME": str(home), "QT_QPA_PLATFORM": "offscreen", "XDG_RUNTIME_DIR": str(home)}
    return subprocess.run([str(QGIS), *words], env=environment, capture_output=True, text=True, timeout=600)


def run(home: Path, path: Path, server: str, **parameters: str) -> subprocess.CompletedProcess[str]:
    given = {"INPUT": str(path), "SERVER": server, "MODEL": "toy-latent", "OUTPUT": str(path.with_name("out.tif"))}
    words = [f"{name}={text}" for name, text in (given | parameters).items()]
    return qgis(home, "--json", "run", "penumbra:segment", "--", *words)


@pytest.fixture
def scene(rng: np.random.Generator, tmp_path: Path) -> Path:
    path = tmp_path / "scene.tif"
    profile = {"driver": "GTiff", "height": 90, "width": 120, "count": 3, "dtype": "uint8"}
    with rasterio.open(path, "w", **profile, crs="EPSG:32632", transform=TRANSFORM) as target:
        target.write(picture(rng, 90, 120).transpose(2, 0, 1))
    return path


@pytest.fixture
def busy(server: Server) -> Iterator[str]:
    """Something before the server that refuses the first looks at a job, or breaks the connection."""
    refusals = [(503, "soon"), (0, ""), (429, "0")]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.command == "GET" and refusals:
                status, again = refusals.pop()
                if not status:
                    return
                reply = httpx.Response(status, headers={"Retry-After": again}, content=b"busy")
            else:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                headers = {name: self.headers[name] for name in ("Content-Type", "Accept") if name in self.headers}
                reply = httpx.request(self.command, server.url + self.path, content=body, headers=headers, timeout=60)
            self.send_response(reply.status_code)
            for name, text in reply.headers.items():
                if name == "retry-after" or name.startswith("x-penumbra"):
                    self.send_header(name, text)
            self.end_headers()
            self.wfile.write(reply.content)

        do_POST = do_DELETE = do_GET

    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=proxy.serve_forever).start()
    yield f"http://127.0.0.1:{proxy.server_port}"
    proxy.shutdown()
    proxy.server_close()
    assert not refusals


def test_a_job_outlasts_looks_at_it_that_are_refused(busy: str, home: Path, scene: Path) -> None:
    done = run(home, scene, busy, OPTIONS="seed=3")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "OUTPUT" in json.loads(done.stdout)["results"]


@pytest.fixture
def refusing() -> Iterator[tuple[str, list[str]]]:
    """A server that refuses a large raster unread and each look at the job of a small one, and what it was asked."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(self.command)
            length = int(self.headers.get("Content-Length") or 0)
            if length < 2**20:
                self.rfile.read(length)
            status = 507 if length >= 2**20 else 202 if length else 403
            self.send_response(status)
            self.end_headers()
            self.wfile.write(
                json.dumps({"error": f"refused by {status}", "url": "/jobs/17", "finished": None}).encode()
            )

        do_GET = do_DELETE = do_POST

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def test_a_refusal_that_comes_before_the_raster_was_sent_is_said(
    refusing: tuple[str, list[str]], home: Path, scene: Path
) -> None:
    with scene.open("ab") as file:
        file.write(bytes(2**24))
    done = run(home, scene, refusing[0])
    assert done.returncode != 0 and "refused by 507" in done.stdout + done.stderr


def test_a_job_that_is_lost_stays_on_the_server(refusing: tuple[str, list[str]], home: Path, scene: Path) -> None:
    url, asked = refusing
    done = run(home, scene, url)
    assert done.returncode != 0 and "refused by 403" in done.stdout + done.stderr
    assert asked == ["POST", "GET"], "and is not removed"
    assert run(home, scene, "localhost:3000").returncode != 0


def test_labels_lie_where_the_raster_does(server: Server, home: Path, scene: Path) -> None:
    done = run(home, scene, server.url, OPTIONS="samples=4&seed=3")
    assert done.returncode == 0, done.stdout + done.stderr
    with Client(server.url) as client:
        prediction = client.segment(scene, model="toy-latent", samples=4, seed=3)
    results = json.loads(done.stdout)["results"]
    with rasterio.open(results["OUTPUT"]) as answer:
        assert np.array_equal(answer.read(1), prediction.labels)
        assert (answer.crs.to_epsg(), answer.transform) == (32632, TRANSFORM)
    assert results["EXPECTED_ERROR"] == pytest.approx(prediction.scores.expected_error, abs=1e-6)


def test_a_map_and_a_refusal(server: Server, home: Path, scene: Path) -> None:
    done = run(home, scene, server.url, PICTURE="entropy")
    assert done.returncode == 0, done.stdout + done.stderr
    with rasterio.open(json.loads(done.stdout)["results"]["OUTPUT"]) as answer:
        assert answer.dtypes == ("float32",) and answer.descriptions == ("entropy",)
    done = run(home, scene, server.url, MODEL="nobody")
    assert done.returncode != 0 and "there is no model 'nobody'" in done.stdout + done.stderr
