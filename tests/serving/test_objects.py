"""Objects of a real S3 server (moto): pictures from them, answers to them, and no URL beside the prefixes is opened."""

import io
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import httpx
import numpy as np
import pytest
import rasterio
from click.testing import CliRunner
from PIL import Image
from rasterio.transform import from_origin

from penumbra.__main__ import main
from penumbra.models.errors import BadImage, BadOption, DiskFull, TooLarge
from penumbra.serving.objects import Objects, fetch, send
from penumbra.serving.settings import Settings
from tests.conftest import picture
from tests.serving.in_process import in_process
from tests.serving.server import free_ports, until

pytest.importorskip("s3fs")
pytest.importorskip("moto.server")
ALLOWED = "s3://places/in/ s3://places/out/"
TIFF = "image/tiff"


@pytest.fixture(scope="module")
def bucket() -> Iterator[Any]:
    """A bucket of a server on 127.0.0.1, which all of this process's and its children's S3 goes to."""
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (keys | {"AWS_ENDPOINT_URL": url, "NO_PROXY": "127.0.0.1"}).items():
            patch.setenv(name, value)
        try:
            until(lambda: _answers(port))
            fsspec.filesystem("s3").clear_instance_cache()
            files = fsspec.filesystem("s3")
            files.mkdir("places")
            yield files
        finally:
            process.terminate()
            process.wait()
            fsspec.filesystem("s3").clear_instance_cache()


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def scene(rng: np.random.Generator) -> bytes:
    pixels = picture(rng, 60, 90)
    place = {"crs": "EPSG:32631", "transform": from_origin(500_000, 5_800_000, 10, 10)}
    with rasterio.MemoryFile() as memory:
        with memory.open(driver="GTiff", height=60, width=90, count=3, dtype="uint8", **place) as dataset:
            dataset.write(pixels.transpose(2, 0, 1))
        return bytes(memory.read())


@pytest.fixture(scope="module")
def client(bucket: Any, toy_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    place = tmp_path_factory.mktemp("objects")
    with in_process(toy_store, place, object_prefixes=ALLOWED, limit_job_bytes=50_000, predrain_s=0) as opened:
        yield opened


def asked(client: httpx.Client, **options: str) -> httpx.Response:
    return client.post("/jobs", headers={"Accept": TIFF}, params={"model": "toy-latent"} | options)


def test_a_job_reads_an_object_and_writes_one(client: httpx.Client, bucket: Any, scene: bytes) -> None:
    bucket.pipe_file("places/in/scene.tif", scene)
    answer = asked(client, source="s3://places/in/scene.tif", target="s3://places/out/scene_labels.tif")
    assert answer.status_code == 202, answer.text
    until(lambda: client.get(answer.json()["url"]).json()["finished"])
    told = client.get(answer.json()["url"]).json()
    assert told["state"] == "done" and told["target"] == "s3://places/out/scene_labels.tif", told
    written = bucket.cat_file("places/out/scene_labels.tif")
    assert written == client.get(told["result"]).content
    with rasterio.MemoryFile(written) as memory, memory.open() as dataset:
        assert dataset.crs == "EPSG:32631" and dataset.shape == (60, 90)
    again = asked(client, source="s3://places/in/scene.tif", target="s3://places/out/scene_labels.tif")
    assert again.status_code == 400 and "already" in again.json()["error"]


def test_a_body_may_go_to_an_object_and_is_not_sent_beside_a_source(
    client: httpx.Client, bucket: Any, scene: bytes
) -> None:
    headers = {"Accept": TIFF, "Content-Type": TIFF}
    options = {"model": "toy-latent", "target": "s3://places/out/sent.tif"}
    answer = client.post("/jobs", content=scene, headers=headers, params=options)
    assert answer.status_code == 202, answer.text
    until(lambda: client.get(answer.json()["url"]).json()["finished"])
    assert bucket.exists("places/out/sent.tif")
    both = options | {"source": "s3://places/in/scene.tif", "target": "s3://places/out/both.tif"}
    refused = client.post("/jobs", content=scene, headers=headers, params=both)
    assert refused.status_code == 400 and "one of them" in refused.json()["error"]


@pytest.mark.parametrize("name", ["source", "target"])
def test_no_other_url_is_ever_opened(client: httpx.Client, tmp_path: Path, name: str) -> None:
    (tmp_path / "a.tif").write_bytes(b"II*\0")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.3)
        port = listener.getsockname()[1]
        for url in (
            f"http://127.0.0.1:{port}/a.tif", f"s3::http://127.0.0.1:{port}/a.tif", f"file://{tmp_path}/a.tif",
            f"{tmp_path}/a.tif", f"simplecache::http://127.0.0.1:{port}/a.tif", "s3://places/secret/a.tif",
            "s3://places/in/../secret/a.tif", "s3://places/in//a.tif", "s3://places/in/", "s3://places/in/a*",
            f"s3://places/in/a.tif::http://127.0.0.1:{port}/a", "s3://places/in/a.tif?versionId=1", "S3://places/in/a",
            "s3://places/inside/a.tif", "s3://other/in/a.tif", "memory://a.tif", "/vsicurl/http://127.0.0.1/a.tif",
        ):  # fmt: skip
            answer = asked(client, **{name: url})
            assert answer.status_code == 400 and "no other URL is ever opened" in answer.json()["error"], url
        with pytest.raises(TimeoutError):
            listener.accept()


def test_what_is_wrong_with_an_object_is_said(client: httpx.Client, bucket: Any) -> None:
    missing = asked(client, source="s3://places/in/nothing.tif")
    assert missing.status_code == 400 and "there is no s3://places/in/nothing.tif" in missing.json()["error"]
    bucket.pipe_file("places/in/large.tif", bytes(50_001))
    assert asked(client, source="s3://places/in/large.tif").status_code == 413
    bucket.pipe_file("places/in/no.tif", b"no picture")
    assert asked(client, source="s3://places/in/no.tif").status_code == 400


def test_without_prefixes_no_object_is_touched() -> None:
    with pytest.raises(BadOption, match="no other URL"):
        Objects("").check("source", "s3://places/in/a.tif")


@pytest.mark.parametrize("prefixes", ["s3://places/in", "http://places/", "s3://pl*ces/", "file:///tmp/", "s3:///"])
def test_a_prefix_ends_a_folder_of_a_store_of_objects(monkeypatch: pytest.MonkeyPatch, prefixes: str) -> None:
    monkeypatch.setenv("PENUMBRA_OBJECT_PREFIXES", prefixes)
    with pytest.raises(ValueError, match="with spaces between are wanted"):
        Settings()


def test_a_copy_has_its_objects_time_and_bounds(bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(bytes(1000))
    send(tmp_path / "a", "s3://places/in/copied")
    fetch("s3://places/in/copied", tmp_path / "b", limit_bytes=1000)
    assert (tmp_path / "b").read_bytes() == bytes(1000)
    assert (tmp_path / "b").stat().st_mtime == pytest.approx(bucket.modified("places/in/copied").timestamp(), abs=1)
    with pytest.raises(TooLarge, match="1,000 bytes and the limit is 999"):
        fetch("s3://places/in/copied", tmp_path / "c", limit_bytes=999)
    with pytest.raises(BadImage, match="is no object"):
        fetch("s3://places/in", tmp_path / "c")
    (tmp_path / "full").symlink_to("/dev/full")
    with pytest.raises(DiskFull, match="the disk was full before s3://places/in/copied was read"):
        fetch("s3://places/in/copied", tmp_path / "full")
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=9))
    with pytest.raises(DiskFull, match="9 are free"):
        fetch("s3://places/in/copied", tmp_path / "c")


def test_predict_reads_a_raster_and_a_picture_of_a_bucket(
    bucket: Any, toy_store: Path, tmp_path: Path, scene: bytes, rng: np.random.Generator
) -> None:
    photo = io.BytesIO()
    Image.fromarray(picture(rng, 40, 50)).save(photo, "PNG")
    bucket.pipe({"places/cli/scene.tif": scene, "places/cli/photo.png": photo.getvalue(), "places/cli/bad.png": b"no"})
    urls = [f"s3://places/cli/{name}" for name in ("scene.tif", "photo.png", "missing.png", "bad.png")]
    options = ["-m", "toy-latent", "--store", str(toy_store), "-o", str(tmp_path)]
    result = CliRunner().invoke(main, ["predict", *urls, *options])
    assert result.exit_code == 1 and "penumbra: there is no s3://places/cli/missing.png" in result.output
    assert result.output.count("cli/missing.png") == result.output.count("bad.png") == 1, "the copy's place is not told"
    assert "s3://places/cli/scene.tif 90x60" in result.output
    assert {"scene_labels.tif", "scene_maps.tif", "scene_item.json", "photo_labels.png"} <= {*os.listdir(tmp_path)}


def test_batch_goes_from_bucket_to_bucket(bucket: Any, toy_store: Path, rng: np.random.Generator) -> None:
    photo = io.BytesIO()
    Image.fromarray(picture(rng, 40, 50)).save(photo, "PNG")
    bucket.pipe({f"places/many/{name}.png": photo.getvalue() for name in "ab"})
    options = ["-m", "toy-latent", "--store", str(toy_store), "--format", "gpkg"]
    for told in ("2 made, 0 kept", "0 made, 2 kept"):
        result = CliRunner().invoke(main, ["batch", "s3://places/many", "s3://places/answers", *options])
        assert result.exit_code == 0 and told in result.output, result.output
    assert bucket.cat_file("places/answers/a.gpkg")[:15] == b"SQLite format 3"
