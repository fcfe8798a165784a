"""The playground in a real browser, against a real server with closed-form models: what a person sees is the answer."""

import dataclasses
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from penumbra.export.bundle import export_network
from penumbra.models.card import IGNORE, MAPS, MAPS_OF_ONE, Calibration, ClassInfo, Novelty
from tests.conftest import toy_card
from tests.serving.playground.browsing import CHROMIUM, PNG, WAIT_MS, canvas, done, give, place
from tests.serving.server import Server, serving

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed; the extra test brings it")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine (Debian: apt install chromium)"),
]
KEY = "a-key-for-the-playground"


def test_the_labels_are_painted_in_the_models_colours(
    page: sync_api.Page, server: Server, photo: tuple[np.ndarray, bytes]
) -> None:
    pixels, file = photo
    give(page, file, model="toy-pointwise")
    with server.client() as client:
        colors = [tuple(info["color"]) for info in client.get("/models/toy-pointwise").json()["classes"]]
    assert (canvas(page, "labels") == np.array(colors)[pixels.argmax(2)]).all()
    shares = re.findall(r"([\d.]+) %", page.inner_text("#legend"))
    assert sum(map(float, shares)) == pytest.approx(100, abs=0.2)


def offered(page: sync_api.Page) -> list[str]:
    return page.locator("#map option").evaluate_all("options => options.map((option) => option.value)")


def test_a_map_that_an_answer_has_not_is_not_offered(page: sync_api.Page, photo: tuple[np.ndarray, bytes]) -> None:
    give(page, photo[1], model="toy-pointwise")
    assert offered(page) == [*MAPS_OF_ONE] and page.input_value("#map") == "entropy"
    page.select_option("#views", "flip")
    page.click("#run")
    sync_api.expect(page.locator("#map option", has_text="mutual information")).to_be_attached(timeout=WAIT_MS)
    done(page)
    assert offered(page) == [*MAPS]
    page.select_option("#model", "toy-latent")
    sync_api.expect(page.locator("#status")).to_contain_text("4 samples", timeout=WAIT_MS)
    assert offered(page) == [*MAPS]
    page.select_option("#map", "mutual_information")
    page.locator("#samples").fill("1")
    page.click("#run")
    sync_api.expect(page.locator("#status")).to_contain_text("1 sample,", timeout=WAIT_MS)
    assert offered(page) == [*MAPS_OF_ONE] and page.input_value("#map") == "entropy"
    page.select_option("#model", "toy-boxed")
    sync_api.expect(page.locator("#about")).to_contain_text("one pass")
    sync_api.expect(page.locator("#status")).to_contain_text("1 sample,", timeout=WAIT_MS)
    assert offered(page) == [*MAPS_OF_ONE]
    page.click("#boxes-row summary")
    for corner, value in {"x0": 2, "y0": 2, "x1": 30, "y1": 20}.items():
        page.fill(f"#{corner}", str(value))
    page.click("#box-add")
    page.click("#run")
    sync_api.expect(page.locator("#status")).to_contain_text("plain, boxed, mixed", timeout=WAIT_MS)
    assert offered(page) == [*MAPS]


def test_withheld_pixels_are_striped_as_no_class_can_be(
    browser: sync_api.Browser, tmp_path: Path, photo: tuple[np.ndarray, bytes]
) -> None:
    """One class has the grey of CamVid's sky, one is black and one white."""
    card, network = toy_card("pointwise")
    classes = tuple(ClassInfo(name, (tone,) * 3) for name, tone in (("black", 0), ("sky", 128), ("white", 255)))
    calibration = Calibration((0.1,), (0.3,), num_frames=9, num_samples=1, data="made up")
    export_network(network, dataclasses.replace(card, classes=classes, calibration=calibration), tmp_path / "store")
    _, file = photo
    with serving(tmp_path / "store", tmp_path) as server:
        page = browser.new_page()
        page.goto(server.url)
        page.set_input_files("#file", {"name": "photo.png", "mimeType": "image/png", "buffer": file})
        done(page)
        plain = canvas(page, "labels")
        page.select_option("#risk", "0.1")
        page.click("#run")
        sync_api.expect(page.locator("#status")).to_contain_text("withheld", timeout=WAIT_MS)
        shown = canvas(page, "labels")
        assert "at most 10 % of a picture's pixels" in page.inner_text("#promise")
        page.close()
        with server.client() as client:
            answer = client.post("/segment", params={"max_risk": 0.1}, content=file, headers=PNG)
            labels = np.asarray(Image.open(io.BytesIO(answer.content)))
    withheld = labels == IGNORE
    assert 0.1 < withheld.mean() < 0.9 and (shown[~withheld] == plain[~withheld]).all()
    y, x = np.nonzero(withheld)
    assert (shown[withheld] == (255 * ((x + y) // 4 % 2))[:, None]).all()


def test_the_labels_of_a_version_have_its_classes_until_it_has_gone(
    browser: sync_api.Browser, tmp_path: Path, photo: tuple[np.ndarray, bytes]
) -> None:
    """The next version has the classes in the other order, and the first one's names and colours are of the first."""
    pixels, file = photo
    store, (card, network) = tmp_path / "store", toy_card("pointwise")
    first = export_network(network, card, store)
    with serving(store, tmp_path, model_control=True, predrain_s=0) as server, server.client() as client:
        page = browser.new_page()
        page.goto(server.url)
        give(page, file, model=card.name)
        plain = canvas(page, "labels")
        export_network(network, dataclasses.replace(card, classes=card.classes[::-1]), store)
        assert client.post(f"/v2/repository/models/{card.name}/load").status_code == 200
        page.click("#run")
        done(page)
        assert (canvas(page, "labels") == plain).all() and "version=1" in (page.text_content("#curl") or "")
        shutil.rmtree(first)
        for verb in ("unload", "load"):
            assert client.post(f"/v2/repository/models/{card.name}/{verb}").status_code == 200
        export_network(network, dataclasses.replace(card, classes=card.classes[::-1]), store)
        assert client.post(f"/v2/repository/models/{card.name}/load").status_code == 200
        page.click("#run")
        sync_api.expect(page.locator("#status")).to_have_text(
            f"{card.name} has no version 1; loaded are 2, 3. Press Segment to ask {card.name} version 3"
        )
        assert page.locator("#model option").count() == 1 and "version 3" in page.inner_text("#about")
        page.click("#run")
        done(page)
        colors = np.array([info.color for info in card.classes[::-1]])
        assert (canvas(page, "labels") == colors[pixels.argmax(2)]).all()
        page.close()


def test_a_strange_picture_has_a_banner_and_its_scores_stand_beside(
    browser: sync_api.Browser, tmp_path: Path, photo: tuple[np.ndarray, bytes]
) -> None:
    card, network = toy_card("pointwise")
    for name, mean in (("strange", 0.0), ("usual", 9.0)):
        novelty = Novelty("entropy", (mean,), num_pictures=1, num_samples=1, data="made up")
        export_network(network, dataclasses.replace(card, name=name, novelty=novelty), tmp_path / "store")
    with serving(tmp_path / "store", tmp_path) as server:
        page = browser.new_page()
        page.goto(server.url)
        give(page, photo[1], model="strange")
        sync_api.expect(page.locator("#strange")).to_contain_text("This picture is stranger than all of the 1 pictures")
        assert "stranger than" not in page.inner_text("#status"), "once is enough"
        assert "100.0 % of the reference pictures are less strange" in page.inner_text("#scores")
        assert re.search(r"[\d.]+ % of the pixels are expected to be wrong", page.inner_text("#scores"))
        page.select_option("#model", "usual")
        sync_api.expect(page.locator("#scores")).to_contain_text("; 0.0 % of the reference", timeout=WAIT_MS)
        assert page.locator("#strange").is_hidden()
        page.close()


def test_a_clicked_pixel_tells_its_probabilities(page: sync_api.Page, photo: tuple[np.ndarray, bytes]) -> None:
    pixels, file = photo
    give(page, file, model="toy-pointwise")
    page.locator("#view").click(position=place(page, 17, 23))
    told = page.inner_text("#pixel")
    powers = np.exp(8.0 * pixels[23, 17] / 255)
    expected = sorted(powers / powers.sum(), reverse=True)
    assert "x 17, y 23" in told
    assert [float(value) for value in re.findall(r"\d\.\d{4}", told)][-3:] == pytest.approx(expected, abs=1e-4)


def test_a_transparent_pixel_tells_that_it_has_no_label(page: sync_api.Page, photo: tuple[np.ndarray, bytes]) -> None:
    alpha = np.full(photo[0].shape[:2], 255, np.uint8)
    alpha[10, 10] = 0
    file = io.BytesIO()
    Image.fromarray(np.dstack([photo[0], alpha])).save(file, "PNG")
    give(page, file.getvalue(), model="toy-pointwise")
    for x, y, said in ((17, 23, "x 17, y 23"), (10, 10, "no label")):
        page.click("#view", position=place(page, x, y))
        sync_api.expect(page.locator("#pixel")).to_contain_text(said)


def test_a_corner_between_two_pixels_keeps_nobody_from_asking(
    page: sync_api.Page, photo: tuple[np.ndarray, bytes]
) -> None:
    give(page, photo[1], model="toy-boxed")
    page.click("#boxes-row summary")
    for corner, value in {"x0": 10.5, "y0": 2, "x1": 30, "y1": 20}.items():
        page.fill(f"#{corner}", str(value))
    page.click("#box-add")
    page.click("#boxes-row summary")
    page.click("#run")
    sync_api.expect(page.locator("#status")).to_contain_text("plain, boxed, mixed", timeout=WAIT_MS)


def test_a_tag_that_is_ticked_leaves_its_class_alone(page: sync_api.Page, photo: tuple[np.ndarray, bytes]) -> None:
    give(page, photo[1], model="toy-tagged")
    present = page.locator("#legend tr:not(.absent)")
    sync_api.expect(present).to_have_count(3)
    page.locator("#tags input").nth(1).check()
    page.click("#run")
    sync_api.expect(present).to_have_count(1, timeout=WAIT_MS)
    assert page.locator("#legend tr").count() == 3, "the others are still listed"


def test_the_sample_scene_is_answered_and_nothing_is_fetched_from_elsewhere(
    page: sync_api.Page, server: Server
) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.reload()
    for name in ("street.jpg", "cat.jpg"):
        page.select_option("#sample", name)
        sync_api.expect(page.locator("#about-picture")).to_contain_text(name.removesuffix(".jpg"))
        done(page)
    assert asked and all(url.startswith((server.url, "data:", "blob:")) for url in asked)
    assert "server: run" in (page.locator("#timing").text_content() or "")


def test_a_picture_over_the_limit_runs_as_a_job(
    browser: sync_api.Browser, toy_store: Path, tmp_path: Path, photo: tuple[np.ndarray, bytes]
) -> None:
    """Looks at it that meet a full server or none, as these three do at first, wait."""
    pixels, file = photo
    busy = [503, 0, 429]
    with serving(toy_store, tmp_path, limit_pixels=1000) as server:
        page = browser.new_page()
        page.route("**/jobs/*", lambda route: refuse(route, busy.pop()) if busy else route.continue_())
        page.goto(server.url)
        page.select_option("#model", "toy-pointwise")
        page.set_input_files("#file", {"name": "photo.png", "mimeType": "image/png", "buffer": file})
        sync_api.expect(page.locator("#status")).to_contain_text("1,000", timeout=WAIT_MS)
        page.click("#job")
        sync_api.expect(page.locator("#job-result")).to_be_visible(timeout=WAIT_MS)
        assert "Job done" in page.inner_text("#job-status") and "1,000" in page.inner_text("#status")
        with page.expect_download() as download:
            page.click("#job-result")
        with Image.open(download.value.path()) as labels:
            assert (np.asarray(labels) == pixels.argmax(2)).all()
        page.set_input_files("#file", {"name": "other.png", "mimeType": "image/png", "buffer": file})
        sync_api.expect(page.locator("#about-picture")).to_contain_text("other.png")
        sync_api.expect(page.locator("#status")).to_contain_text("1,000", timeout=WAIT_MS)
        assert page.inner_text("#job-result") == "Download the labels of photo.png", "it is still there"
        page.close()


def refuse(route: sync_api.Route, status: int) -> None:
    """Refuse, or with status 0 break the connection."""
    if status:
        route.fulfill(status=status, headers={"Retry-After": "1"}, json={"error": "the queue is full"})
    else:
        route.abort("connectionreset")


def test_of_models_and_pictures_chosen_quickly_the_last_ones_are_shown(
    browser: sync_api.Browser, server: Server, photo: tuple[np.ndarray, bytes]
) -> None:
    page, held = browser.new_page(), []
    for late in ("models/toy-latent", "playground/cat.jpg"):
        page.route(f"**/{late}", lambda route: held.append(route))
    page.route("**/models/toy-tagged", lambda route: refuse(route, 503))
    page.goto(server.url)
    sync_api.expect(page.locator("#about")).to_contain_text("version 1")
    page.select_option("#model", "toy-latent")
    page.select_option("#sample", "cat.jpg")
    give(page, photo[1], model="toy-pointwise")
    assert len(held) == 2
    for route in held:
        with page.expect_response(route.request.url) as answer:
            route.continue_()
        answer.value.finished()
    page.click("#run")
    done(page)
    assert "model=toy-pointwise" in (page.text_content("#curl") or "") and page.is_hidden("#samples-row")
    assert "photo.png" in page.inner_text("#about-picture") and not page.input_value("#file")
    page.select_option("#model", "toy-tagged")
    sync_api.expect(page.locator("#status")).to_contain_text("the queue is full")
    assert page.input_value("#model") == "toy-pointwise"
    page.close()


def test_a_server_with_keys_asks_for_one(
    browser: sync_api.Browser, toy_store: Path, tmp_path: Path, photo: tuple[np.ndarray, bytes]
) -> None:
    with serving(toy_store, tmp_path, api_keys=f"infer:{KEY}") as server:
        page = browser.new_page()
        page.goto(server.url)
        sync_api.expect(page.locator("#status")).to_contain_text("API key", timeout=WAIT_MS)
        page.fill("#key", KEY)
        page.press("#key", "Enter")
        sync_api.expect(page.locator("#key-form")).to_be_hidden(timeout=WAIT_MS)
        sync_api.expect(page.locator("#model option").first).to_be_attached(timeout=WAIT_MS)
        assert json.loads(page.evaluate("JSON.stringify(sessionStorage)")) == {"penumbra-key": KEY}
        page.reload()
        give(page, photo[1], model="toy-pointwise")
        assert "Bearer $KEY" in (page.text_content("#curl") or ""), "no form was filled in this time"
        page.close()
