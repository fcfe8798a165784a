"""The HTTP surface over toys: exact answers, and the rest of what it tells."""

import io
import math
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from penumbra.serving import VERSION
from penumbra.serving.http import jobs as job_routes
from penumbra.serving.http.routes import routes
from penumbra.serving.process import build_facts
from tests.conftest import CLASSES, GAIN, picture
from tests.serving.http.asking import (
    CLEAR,
    IMAGE,
    JSON,
    LABELS,
    NPZ,
    PICTURE,
    PNG,
    arrays_of,
    ask,
    is_refused,
    labels_of,
    metrics,
    png,
    total,
)
from tests.serving.server import Server

pytestmark = pytest.mark.usefixtures("still_answers")


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
        "abstained", "void_pixels", "scores", "classes",
    }  # fmt: skip
    assert (answer["model"], answer["version"], answer["seed"], answer["samples"]) == ("toy-latent", 1, 7, 5)
    assert answer["size"] == [45, 70] and answer["units"] == "nats" and answer["members"] == []
    assert {"wait", "decode", "queue", "run", "stitch", "read_out", "total"} <= set(answer["timing_ms"])
    for row in answer["classes"]:
        assert set(row) == {
            "id", "name", "pixels", "share", "expected_error", "mean_confidence", "mean_entropy",
            "mean_mutual_information", "rle",
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
    all_routes = [*routes(None, {}, bodies=None), *job_routes.routes(None, None)]  # type: ignore[arg-type]
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
