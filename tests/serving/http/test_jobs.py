"""Jobs over a real server: the answer of `/segment` in pieces of time, through restarts, refusals and full disks."""

import dataclasses
import io
import json
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from PIL import Image

from penumbra.serving.jobs import MAX_ATTEMPTS, Job
from penumbra.serving.spool import RowFile
from tests.conftest import picture
from tests.serving.in_process import in_process
from tests.serving.server import Server, serving, until

NPZ, PICTURE, JSON = "application/x-npz", "image/png", "application/json"
KEEP_S = 3600
LONG = {"model": "toy-latent", "samples": 64, "overlap": 0.8}
"""Options that make a picture of 500x500 px the work of many seconds."""


LIMITS = {
    "deterministic": True, "predrain_s": 0, "limit_pixels": 200_000, "limit_jobs": 3, "limit_job_pixels": 4_000_000,
    "limit_body_bytes": 900_000, "limit_job_bytes": 2_000_000, "job_keep_s": KEEP_S,
}  # fmt: skip


@pytest.fixture(scope="module")
def place(reached: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where what is asked has its directory of jobs."""
    return tmp_path_factory.mktemp(reached)


@pytest.fixture(scope="module")
def server(toy_store: Path, place: Path) -> Iterator[Server]:
    with serving(toy_store, place, jobs=place / "jobs", **LIMITS) as started:
        yield started


@pytest.fixture(scope="module")
def surface(toy_store: Path, place: Path) -> Iterator[httpx.Client]:
    with in_process(toy_store, place, **LIMITS) as opened:
        yield opened


def encoded(image_HW3: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image_HW3).save(buffer, kind)
    return buffer.getvalue()


def post(
    client: httpx.Client, data: bytes, *, accept: str = NPZ, path: str = "/jobs", **options: Any
) -> httpx.Response:
    headers = {"Content-Type": "image/png", "Accept": accept}
    return client.post(path, content=data, headers=headers, params={"model": "toy-latent"} | options)


def begun(client: httpx.Client, data: bytes, **options: Any) -> str:
    answer = post(client, data, **options)
    assert answer.status_code == 202, answer.text
    assert answer.headers["location"] == answer.json()["url"]
    return str(answer.json()["url"])


def ended(client: httpx.Client, url: str, state: str = "done") -> dict[str, Any]:
    until(lambda: client.get(url).json()["finished"])
    told: dict[str, Any] = client.get(url).json()
    assert told["state"] == state, told
    return told


def refused(response: httpx.Response, status: int, *words: str) -> None:
    assert response.status_code == status, response.text
    assert list(response.json()) == ["error"]
    for word in words:
        assert word in response.json()["error"]


@pytest.mark.parametrize(
    ("accept", "options"),
    [
        (NPZ, {"outputs": "entropy,margin", "samples": 3, "seed": 5}),
        (PICTURE, {}),
        (PICTURE, {"picture": "overlay"}),
        (PICTURE, {"picture": "mutual_information", "levels": 32}),
        ("image/tiff", {"picture": "entropy"}),
        ("application/geo+json", {"min_pixels": 2}),
        (JSON, {}),
    ],
)
def test_a_job_gives_what_segment_gives(
    client: httpx.Client, rng: np.random.Generator, accept: str, options: dict[str, Any]
) -> None:
    data = encoded(picture(rng, 200, 90))
    at_once = post(client, data, accept=accept, path="/segment", **options)
    url = begun(client, data, accept=accept, **options)
    told = ended(client, url)
    assert (told["percent"], told["media_type"], told["error"]) == (100, accept, None)
    assert told["expires"] == pytest.approx(told["finished"] + KEEP_S)
    result = client.get(told["result"])
    assert result.headers["content-type"] == accept
    for name in ("model", "version", "seed", "samples"):
        assert result.headers[f"x-penumbra-{name}"] == at_once.headers[f"x-penumbra-{name}"]
    if accept.endswith("json"):
        one, other = (_without_times(response.json()) for response in (at_once, result))
        assert one == other
    else:
        assert result.content == at_once.content


def _without_times(document: dict[str, Any]) -> dict[str, Any]:
    facts = document.get("penumbra", document)
    del facts["timing_ms"]
    return document


def test_a_form_is_a_job_too(client: httpx.Client, rng: np.random.Generator) -> None:
    data = encoded(picture(rng, 40, 50))
    form = {"model": "toy-pointwise", "outputs": "entropy"}
    answer = client.post("/jobs", files={"image": ("a.png", data)}, data=form, headers={"Accept": NPZ})
    assert answer.status_code == 202 and answer.json()["options"]["version"] == "1"
    result = client.get(ended(client, answer.json()["url"])["result"])
    assert result.content == post(client, data, path="/segment", **form).content


def test_what_segment_refuses_for_its_size_a_job_does(client: httpx.Client, rng: np.random.Generator) -> None:
    image = rng.integers(0, 230, (900, 1000, 1), dtype=np.uint8).repeat(3, 2)
    data = encoded(image, "TIFF")
    image_data = encoded(np.zeros((900, 1000, 3), np.uint8))
    refused(post(client, image_data, path="/segment"), 413, "900,000")
    assert len(data) > 900_000, "the upload is larger than what is kept in memory"
    assert client.get(ended(client, begun(client, image_data, accept=PICTURE))["result"]).status_code == 200
    headers = {"Content-Type": "image/tiff", "Accept": PICTURE}
    refused(client.post("/jobs?model=toy-latent", content=data, headers=headers), 413, "2,000,000 bytes")


def test_a_result_comes_in_ranges(client: httpx.Client, rng: np.random.Generator) -> None:
    url = ended(client, begun(client, encoded(picture(rng, 60, 60))))["result"]
    whole = client.get(url)
    assert whole.headers["accept-ranges"] == "bytes"
    part = client.get(url, headers={"Range": "bytes=100-299"})
    assert part.status_code == 206 and part.content == whole.content[100:300]
    assert part.headers["content-range"] == f"bytes 100-299/{len(whole.content)}"
    rest = client.get(url, headers={"Range": "bytes=300-", "If-Range": whole.headers["etag"]})
    assert rest.status_code == 206 and whole.content[:300] + rest.content == whole.content
    assert client.get(url, headers={"Range": f"bytes={len(whole.content)}-"}).status_code == 416
    assert client.head(url).headers["content-length"] == str(len(whole.content))


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        ({"model": "unheard"}, 404, ("'unheard'",)),
        ({"samples": "0"}, 400, ("samples is 0",)),
        ({"picture": "variance"}, 400, ("'variance'",)),
        ({"levels": "7"}, 400, ("levels is '7'", "32, 256, 65536")),
        ({"colour": "red"}, 400, ("'colour'", "picture")),
        ({"deadline_ms": "100"}, 400, ("deadline_ms", "answered at once")),
        ({"deadline_ms": "100", "anytime": "true"}, 400, ("deadline_ms and anytime",)),
        ({"outputs": "entropy,probabilities"}, 400, ("probabilities", "answered at once")),
        ({"accept": "text/html"}, 406, (PICTURE, "image/tiff", "application/geo+json")),
    ],
)
def test_what_cannot_be_done_is_refused_at_the_door_and_leaves_nothing(
    client: httpx.Client, place: Path, rng: np.random.Generator, options: dict[str, Any], status: int, words: tuple[str]
) -> None:
    before = set((place / "jobs").iterdir())
    refused(post(client, encoded(picture(rng, 9, 9)), **options), status, *words)
    assert set((place / "jobs").iterdir()) == before


def test_a_form_with_what_no_job_takes_is_refused_and_leaves_nothing(
    client: httpx.Client, place: Path, rng: np.random.Generator
) -> None:
    before = set((place / "jobs").iterdir())
    form = {"model": "toy-latent", "anytime": "true"}
    refused(client.post("/jobs", files={"image": ("a.png", encoded(picture(rng, 9, 9)))}, data=form), 400, "anytime")
    assert set((place / "jobs").iterdir()) == before


@pytest.mark.parametrize(
    ("data", "status"), [(b"", 400), (b"no picture", 400), (encoded(np.zeros((2100, 2000, 3), np.uint8)), 413)]
)
def test_a_bad_upload_is_refused_at_once(client: httpx.Client, place: Path, data: bytes, status: int) -> None:
    before = set((place / "jobs").iterdir())
    refused(post(client, data), status)
    assert set((place / "jobs").iterdir()) == before


def test_a_picture_that_breaks_off_is_a_failed_job_with_its_sentence(
    client: httpx.Client, rng: np.random.Generator
) -> None:
    for kind in ("PNG", "TIFF"):
        data = encoded(picture(rng, 200, 200), kind)
        answer = post(client, data[: len(data) // 2] if kind == "PNG" else data[:8] + data[5008:])
        if answer.status_code == 202:
            told = ended(client, answer.json()["url"], "failed")
            assert "damaged or truncated" in told["error"] and told["result"] is None
            refused(client.get(f"{told['url']}/result"), 409, "failed")
        else:
            refused(answer, 400)


def test_a_model_that_breaks_fails_its_job_and_no_other(client: httpx.Client, rng: np.random.Generator) -> None:
    image = picture(rng, 40, 40)
    image[5, 5] = 255
    assert "not finite" in ended(client, begun(client, encoded(image), model="toy-nan"), "failed")["error"]
    ended(client, begun(client, encoded(picture(rng, 9, 9)), model="toy-nan"))


@pytest.mark.parametrize("name", ["unheard", "%2e%2e", "..%2fjobs", "a" * 300, "lock"])
@pytest.mark.parametrize("ending", ["", "/result"])
def test_an_unknown_job_is_404(client: httpx.Client, name: str, ending: str) -> None:
    for method in ("GET", "DELETE") if not ending else ("GET",):
        assert client.request(method, f"/jobs/{name}{ending}").status_code in (404, 405)


def test_long_work_shows_progress_lets_small_requests_by_and_is_cancelled_within_a_batch(
    client: httpx.Client, place: Path, rng: np.random.Generator
) -> None:
    url = begun(client, encoded(picture(rng, 500, 500) // 64), **LONG)
    until(lambda: client.get(url).json()["percent"] > 0)
    told = client.get(url).json()
    assert told["state"] == "running" and 0 < told["percent"] < 100 and told["windows"] > 3000
    refused(client.get(f"{url}/result"), 409, "running")
    small = encoded(picture(rng, 40, 60))
    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(lambda _: post(client, small, path="/segment").status_code, range(12)))
    assert answers == [200] * 12, "the job's windows do not fill the queue of requests"
    assert client.get(url).json()["state"] == "running"
    assert "queue_windows" in client.get("/metrics").text
    assert client.delete(url).status_code == 204
    refused(client.get(url), 404, "no job")
    until(lambda: "penumbra_queue_windows 0.0" in client.get("/metrics").text)
    until(lambda: not (place / "jobs" / url.rpartition("/")[2]).exists())


def test_more_jobs_than_may_wait_are_refused_with_a_time(client: httpx.Client, rng: np.random.Generator) -> None:
    data = encoded(picture(rng, 500, 500) // 64)
    urls = [begun(client, data, **LONG) for _ in range(3)]
    answer = post(client, data)
    refused(answer, 429, "limit is 3")
    assert int(answer.headers["retry-after"]) > 0
    for url in reversed(urls):
        assert client.delete(url).status_code == 204
    ended(client, begun(client, encoded(picture(rng, 9, 9))))


# -- restarts ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL])
def test_a_restarted_server_goes_on_where_the_last_one_was(
    toy_store: Path, tmp_path: Path, rng: np.random.Generator, sent: signal.Signals
) -> None:
    jobs = tmp_path / "jobs"
    data = encoded(picture(rng, 400, 300))
    options = {"samples": 64, "overlap": 0.5, "seed": 3}
    alike = {"deterministic": True, "samples_per_call": 16, "predrain_s": 0, "jobs": jobs}
    with serving(toy_store, tmp_path, **alike) as first, first.client() as client:
        finished = begun(client, encoded(picture(rng, 9, 9)))
        ended(client, finished)
        running = begun(client, data, **options)
        waiting = begun(client, encoded(picture(rng, 20, 20)))
        until(lambda: client.get(running).json()["percent"] > 5)
        _stop(first, sent)
    unfinished_upload = jobs / ("A" * 22)
    unfinished_upload.mkdir()
    rows = RowFile(jobs / running.rpartition("/")[2] / "spool" / "labels", (400, 300), np.uint8).num_rows
    assert 0 < rows < 400
    with serving(toy_store, tmp_path, **alike) as second, second.client() as client:
        assert client.get(finished).json()["state"] == "done" and not unfinished_upload.exists()
        for url in (running, waiting):
            ended(client, url)
        result = client.get(f"{running}/result").content
        assert result == post(client, data, path="/segment", **options).content


def _stop(server: Server, sent: signal.Signals) -> None:
    """SIGTERM as an operator does; SIGKILL to all of the server's processes, of which each has a session of its own."""
    supervisor = psutil.Process(server.process.pid)
    killed = [supervisor, *supervisor.children(recursive=True)] if sent == signal.SIGKILL else [supervisor]
    for process in killed:
        process.send_signal(sent)
    psutil.wait_procs(killed[1:], timeout=60)
    server.process.wait(60)


def test_a_job_that_ends_the_server_again_and_again_is_given_up(
    toy_store: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    jobs = tmp_path / "jobs"
    left = {
        "deadly": Job("deadly", NPZ, {"model": "toy-latent"}, 1.0, "running", attempts=MAX_ATTEMPTS),
        "gone": Job("gone", NPZ, {"model": "toy-latent", "version": "9"}, 2.0),
        "old": Job("old", NPZ, {"model": "toy-latent"}, 3.0, "done", finished=time.time() - 2 * KEEP_S),
    }
    for name, job in left.items():
        (jobs / name).mkdir(parents=True)
        (jobs / name / "image").write_bytes(encoded(picture(rng, 9, 9)))
        (jobs / name / "job.json").write_text(json.dumps(dataclasses.asdict(job)))
    with in_process(toy_store, tmp_path, job_keep_s=KEEP_S) as client:
        assert f"{MAX_ATTEMPTS} times" in ended(client, "/jobs/deadly", "failed")["error"]
        assert "version 9" in ended(client, "/jobs/gone", "failed")["error"]
        until(lambda: client.get("/jobs/old").status_code == 404)
        assert not (jobs / "old").exists()


# -- the disk ------------------------------------------------------------------------------------


def test_a_disk_that_fills_up_while_a_job_runs_fails_it_with_a_sentence(
    toy_store: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    """The job's rows lie on a device that is always full."""
    jobs = tmp_path / "jobs"
    job = Job("full", NPZ, {"model": "toy-latent"}, 1.0)
    (jobs / "full" / "spool").mkdir(parents=True)
    (jobs / "full" / "image").write_bytes(encoded(picture(rng, 9, 9)))
    (jobs / "full" / "job.json").write_text(json.dumps(dataclasses.asdict(job)))
    (jobs / "full" / "writing").symlink_to("/dev/full")
    with in_process(toy_store, tmp_path) as client:
        assert "the disk is full" in ended(client, "/jobs/full", "failed")["error"]
        assert post(client, encoded(picture(rng, 9, 9)), path="/segment").status_code == 200


def test_two_servers_do_not_share_a_directory_of_jobs(client: httpx.Client, place: Path) -> None:
    from penumbra.models.errors import BadArtifact
    from penumbra.serving.engine.segmenter import Segmenter
    from penumbra.serving.gateway import Gateway
    from penumbra.serving.jobs import Jobs
    from penumbra.serving.settings import Settings
    from penumbra.serving.telemetry import Telemetry

    with Segmenter() as segmenter:
        gateway = Gateway(segmenter, Telemetry(), limit_requests=1, timeout_s=1)
        with pytest.raises(BadArtifact, match="PENUMBRA_JOBS"):
            Jobs(Settings(jobs=place / "jobs"), gateway)
