"""The playground in a real browser, against a real server with closed-form models: what a person sees is the answer."""

import dataclasses
import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from penumbra.export.bundle import export_network
from penumbra.models.card import IGNORE, MAPS, MAPS_OF_ONE, Calibration, ClassInfo, Novelty
from tests.conftest import toy_card
from tests.serving.server import Server, serving

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed; the extra test brings it")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine (Debian: apt install chromium)"),
]
WIDTH, HEIGHT = 60, 40
WAIT_MS = 60_000
KEY = "a-key-for-the-playground"
PNG = {"Content-Type": "image/png", "Accept": "image/png"}


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    with sync_api.sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.fixture(scope="module")
def server(toy_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(toy_store, tmp_path_factory.mktemp("playground")) as started:
        yield started


@pytest.fixture(scope="module")
def photo() -> tuple[np.ndarray, bytes]:
    pixels = np.random.Generator(np.random.PCG64(3)).integers(0, 230, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return pixels, file.getvalue()


@pytest.fixture
def page(browser: sync_api.Browser, server: Server) -> Iterator[sync_api.Page]:
    """The page, open; it must not have complained when the test is over."""
    opened, complaints = browser.new_page(viewport={"width": 1280, "height": 900}), []
    opened.set_default_timeout(WAIT_MS)
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    opened.goto(server.url)
    sync_api.expect(opened.locator("#model option").first).to_be_attached(timeout=WAIT_MS)
    yield opened
    opened.close()
    assert not complaints


def give(page: sync_api.Page, photo: bytes, *, model: str) -> None:
    page.select_option("#model", model)
    sync_api.expect(page.locator("#about")).to_contain_text("version 1")
    page.set_input_files("#file", {"name": "photo.png", "mimeType": "image/png", "buffer": photo})
    done(page)


def done(page: sync_api.Page) -> None:
    sync_api.expect(page.locator("#status")).to_contain_text("Done", timeout=WAIT_MS)


def canvas(page: sync_api.Page, name: str) -> np.ndarray:
    """A canvas's pixels, uint8 [H, W, 4]."""
    document = page.locator(name).evaluate(
        "c => [c.width, c.height, Array.from(c.getContext('2d').getImageData(0, 0, c.width, c.height).data)]"
    )
    return np.array(document[2], np.uint8).reshape(document[1], document[0], 4)


def click(page: sync_api.Page, name: str, x: int, y: int) -> None:
    frame = page.locator(name).bounding_box()
    assert frame
    place = {"x": (x + 0.5) * frame["width"] / WIDTH, "y": (y + 0.5) * frame["height"] / HEIGHT}
    page.locator(name).click(position=place)


def test_the_labels_are_painted_in_the_models_colours(
    page: sync_api.Page, server: Server, photo: tuple[np.ndarray, bytes]
) -> None:
    pixels, file = photo
    give(page, file, model="toy-pointwise")
    with server.client() as client:
        colors = [tuple(info["color"]) for info in client.get("/models/toy-pointwise").json()["classes"]]
    assert (canvas(page, "#labels")[..., :3] == np.array(colors)[pixels.argmax(2)]).all()
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
        plain = canvas(page, "#labels")
        page.select_option("#risk", "0.1")
        page.click("#run")
        sync_api.expect(page.locator("#status")).to_contain_text("withheld", timeout=WAIT_MS)
        shown = canvas(page, "#labels")
        page.close()
        with server.client() as client:
            answer = client.post("/segment", params={"max_risk": 0.1}, content=file, headers=PNG)
            labels = np.asarray(Image.open(io.BytesIO(answer.content)))
    withheld = labels == IGNORE
    assert 0.1 < withheld.mean() < 0.9 and (shown[~withheld] == plain[~withheld]).all()
    y, x = np.nonzero(withheld)
    assert (shown[withheld][:, :3] == (255 * ((x + y) // 4 % 2))[:, None]).all() and (shown[..., 3] == 255).all()


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
        assert re.search(
            r"expected error\s+[\d.]+ %\s+stranger than, of the reference\s+100.0 %", page.inner_text("#scores")
        )
        page.select_option("#model", "usual")
        sync_api.expect(page.locator("#scores")).to_contain_text(re.compile(r"reference\s*0\.0 %"), timeout=WAIT_MS)
        assert page.locator("#strange").is_hidden()
        page.close()


def test_a_clicked_pixel_tells_its_probabilities(page: sync_api.Page, photo: tuple[np.ndarray, bytes]) -> None:
    pixels, file = photo
    give(page, file, model="toy-pointwise")
    click(page, "#labels", 17, 23)
    told = page.inner_text("#pixel")
    powers = np.exp(8.0 * pixels[23, 17] / 255)
    expected = sorted(powers / powers.sum(), reverse=True)
    assert "x 17, y 23" in told
    assert [float(value) for value in re.findall(r"\d\.\d{4}", told)][-3:] == pytest.approx(expected, abs=1e-4)


def test_everything_works_by_keyboard(page: sync_api.Page, photo: tuple[np.ndarray, bytes]) -> None:
    give(page, photo[1], model="toy-latent")
    page.focus("#uncertainty")
    for key in ("ArrowRight", "Shift+ArrowDown", "ArrowLeft", "ArrowLeft"):
        page.keyboard.press(key)
    assert f"x {WIDTH // 2 - 1}, y {HEIGHT // 2 + 10}" in page.inner_text("#pixel")
    page.focus("#samples")
    page.keyboard.press("End")
    page.focus("#seed")
    page.keyboard.press("Control+A")
    page.keyboard.type("7")
    page.keyboard.press("Enter")
    sync_api.expect(page.locator("#status")).to_have_text("Done with 32 samples, seed 7.", timeout=WAIT_MS)


def test_a_box_drawn_by_mouse_changes_its_inside_alone(page: sync_api.Page, photo: tuple[np.ndarray, bytes]) -> None:
    give(page, photo[1], model="toy-boxed")
    before = canvas(page, "#labels")
    page.select_option("#box-class", index=2)
    frame = page.locator("#image").bounding_box()
    assert frame
    step = frame["width"] / WIDTH
    page.mouse.move(frame["x"] + 10 * step, frame["y"] + 8 * step)
    page.mouse.down()
    page.mouse.move(frame["x"] + 30 * step, frame["y"] + 20 * step, steps=4)
    page.mouse.up()
    assert re.search(r"\b10, 8, 30, 20\b", page.inner_text("#boxes"))
    page.click("#run")
    sync_api.expect(page.locator("#status")).to_contain_text("plain, boxed, mixed", timeout=WAIT_MS)
    differs = (canvas(page, "#labels") != before).any(2)
    assert differs[8:20, 10:30].any()
    differs[8:20, 10:30] = False
    assert not differs.any()


def test_a_tag_that_is_ticked_leaves_its_class_alone(page: sync_api.Page, photo: tuple[np.ndarray, bytes]) -> None:
    give(page, photo[1], model="toy-tagged")
    assert page.locator("#legend tr").count() == 3
    page.locator("#tags input").nth(1).check()
    page.click("#run")
    sync_api.expect(page.locator("#legend tr")).to_have_count(1, timeout=WAIT_MS)


def test_the_overlay_fades_from_the_picture_to_the_labels(page: sync_api.Page, photo: tuple[np.ndarray, bytes]) -> None:
    pixels, file = photo
    give(page, file, model="toy-pointwise")
    page.select_option("#over", "labels")
    page.locator("#opacity").fill("0")
    assert (canvas(page, "#image")[..., :3] == pixels).all()
    page.locator("#opacity").fill("100")
    assert (canvas(page, "#image") == canvas(page, "#labels")).all()


def test_the_sample_scene_is_answered_and_nothing_is_fetched_from_elsewhere(
    page: sync_api.Page, server: Server
) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.reload()
    page.click("#sample")
    done(page)
    assert asked and all(url.startswith((server.url, "data:", "blob:")) for url in asked)
    assert "server: run" in page.inner_text("#timing")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_in_light_and_dark(page: sync_api.Page, photo: tuple[np.ndarray, bytes], scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
    page.set_viewport_size({"width": 360, "height": 740})
    give(page, photo[1], model="toy-boxed")
    assert page.locator("html").evaluate("e => e.scrollWidth <= e.clientWidth")
    ink, paper = page.locator("body").evaluate("e => [getComputedStyle(e).color, getComputedStyle(e).backgroundColor]")
    assert contrast(ink, paper) >= 7


def contrast(one: str, other: str) -> float:
    """The contrast ratio of WCAG 2.2."""
    bright = []
    for color in (one, other):
        parts = np.array([float(part) for part in re.findall(r"[\d.]+", color)[:3]]) / 255
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        bright.append(float(linear @ [0.2126, 0.7152, 0.0722]))
    return (max(bright) + 0.05) / (min(bright) + 0.05)


def test_a_picture_over_the_limit_runs_as_a_job(
    browser: sync_api.Browser, toy_store: Path, tmp_path: Path, photo: tuple[np.ndarray, bytes]
) -> None:
    pixels, file = photo
    with serving(toy_store, tmp_path, limit_pixels=1000) as server:
        page = browser.new_page()
        page.goto(server.url)
        page.select_option("#model", "toy-pointwise")
        page.set_input_files("#file", {"name": "photo.png", "mimeType": "image/png", "buffer": file})
        sync_api.expect(page.locator("#status")).to_contain_text("1,000", timeout=WAIT_MS)
        page.click("#job")
        sync_api.expect(page.locator("#job-result")).to_be_visible(timeout=WAIT_MS)
        with page.expect_download() as download:
            page.click("#job-result")
        with Image.open(download.value.path()) as labels:
            assert (np.asarray(labels) == pixels.argmax(2)).all()
        page.close()


def test_a_server_with_keys_asks_for_one(browser: sync_api.Browser, toy_store: Path, tmp_path: Path) -> None:
    with serving(toy_store, tmp_path, api_keys=f"infer:{KEY}") as server:
        page = browser.new_page()
        page.goto(server.url)
        sync_api.expect(page.locator("#status")).to_contain_text("API key", timeout=WAIT_MS)
        page.fill("#key", KEY)
        page.press("#key", "Enter")
        sync_api.expect(page.locator("#model option").first).to_be_attached(timeout=WAIT_MS)
        assert json.loads(page.evaluate("JSON.stringify(sessionStorage)")) == {"penumbra-key": KEY}
        page.close()
