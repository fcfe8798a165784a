"""What one does with an answer on the playground: look closely, hide, edit boxes, take it along."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from penumbra.models.card import MAPS
from tests.serving.playground.browsing import CHROMIUM, HEIGHT, PNG, WAIT_MS, WIDTH, canvas, drag, give, place
from tests.serving.server import Server

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed; the extra test brings it")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine (Debian: apt install chromium)"),
]


def test_everything_works_by_keyboard(page: sync_api.Page, photo: tuple[np.ndarray, bytes]) -> None:
    give(page, photo[1], model="toy-latent")
    page.focus("#view")
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


def test_a_box_that_is_drawn_moved_and_removed_changes_its_inside_alone(
    page: sync_api.Page, photo: tuple[np.ndarray, bytes]
) -> None:
    give(page, photo[1], model="toy-boxed")
    before = canvas(page, "labels")
    page.select_option("#box-class", index=2)
    page.click("#zoom-fit")
    drag(page, (8, 6), (28, 18))
    corners = page.locator("#boxes li input")
    assert corners.input_value() == "8, 6, 28, 18"
    drag(page, (18, 12), (20, 14))
    assert corners.input_value() == "10, 8, 30, 20"
    assert page.locator("#stale").is_visible()
    page.click("#run")
    sync_api.expect(page.locator("#status")).to_contain_text("plain, boxed, mixed", timeout=WAIT_MS)
    assert page.locator("#stale").is_hidden()
    corners.fill("0, 0, 1, 1")
    corners.press("Tab")
    differs = (canvas(page, "labels") != before).any(2)
    assert differs[9:19, 11:29].any()
    differs[:22, :32] = False
    assert not differs.any()
    page.click("#boxes button")
    assert page.locator("#boxes li").count() == 0


def test_a_box_keeps_its_class_and_the_focus_and_a_trembling_click_makes_none(
    page: sync_api.Page, photo: tuple[np.ndarray, bytes]
) -> None:
    give(page, photo[1], model="toy-boxed")
    page.select_option("#box-class", index=2)
    page.click("#zoom-fit")
    drag(page, (8, 6), (28, 18))
    corners, kind = page.locator("#boxes li input"), page.locator("#boxes li select")
    for typed in ("1, 2, 3", "1, 2, 9, 9, 0", "1, 2, , 9"):
        corners.fill(typed)
        corners.press("Tab")
        assert corners.input_value() == "8, 6, 28, 18" and kind.evaluate("s => s.selectedIndex") == 2
    kind.focus()
    kind.select_option(index=1)
    sync_api.expect(kind).to_be_focused()
    frame, at = page.locator("#view").bounding_box(), place(page, 45, 30)
    assert frame
    page.mouse.move(frame["x"] + at["x"], frame["y"] + at["y"])
    page.mouse.down()
    page.mouse.move(frame["x"] + at["x"] - 2, frame["y"] + at["y"] - 2)
    page.mouse.up()
    assert page.locator("#boxes li").count() == 1 and "x 45, y 30" in page.inner_text("#pixel")


def test_a_second_finger_zooms_and_the_one_that_stays_pans_without_a_jump(
    page: sync_api.Page, photo: tuple[np.ndarray, bytes]
) -> None:
    give(page, photo[1], model="toy-boxed")
    frame, session = page.locator("#view").bounding_box(), page.context.new_cdp_session(page)
    assert frame

    def touch(kind: str, **points: tuple[int, int]) -> dict[str, float]:
        """Which fingers, by name, do what where."""
        fingers = [{"x": frame["x"] + x, "y": frame["y"] + y, "id": ord(name)} for name, (x, y) in points.items()]
        session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": fingers})
        return place(page, 0, 0)

    begun = touch("touchStart", a=(100, 200))
    touch("touchMove", a=(130, 230))
    touch("touchStart", a=(130, 230), b=(230, 230))
    zoomed = touch("touchMove", a=(130, 230), b=(280, 230))
    lifted = touch("touchEnd", a=(130, 230))
    panned = touch("touchMove", b=(300, 260))
    touch("touchEnd", b=(300, 260))
    assert begun != zoomed == lifted and page.locator("#boxes li").count() == 0
    assert (panned["x"] - lifted["x"], panned["y"] - lifted["y"]) == pytest.approx((20, 30))


def test_labels_fade_stand_alone_and_hide_where_the_map_is_above_the_threshold(
    page: sync_api.Page, photo: tuple[np.ndarray, bytes]
) -> None:
    pixels, file = photo
    give(page, file, model="toy-pointwise")
    labels, painted = pixels.argmax(2), canvas(page, "labels")
    page.locator("#opacity").fill("0")
    assert (canvas(page, "labels") == pixels).all()
    page.locator("#opacity").fill("100")
    page.locator("#legend button").nth(1).click()
    page.mouse.move(0, 0)
    alone = canvas(page, "labels")
    assert (alone[labels == 1] == painted[labels == 1]).all() and (alone[labels == 0] != painted[labels == 0]).any(
        1
    ).all()
    page.locator("#legend button").nth(1).click()
    page.mouse.move(0, 0)
    page.select_option("#map", "confidence")
    page.locator("#hide").fill("300")
    powers = np.exp(8.0 * pixels / 255)
    doubt = 1 - (powers / powers.sum(2, keepdims=True)).max(2)
    share = re.search(r"0.30: ([\d.]+) % hidden", page.locator("#hidden").inner_text())
    assert share and float(share[1]) == pytest.approx(100 * (doubt > 0.3).mean(), abs=0.11)
    hidden = canvas(page, "labels")
    sure = doubt < 0.299
    assert (hidden[sure] == painted[sure]).all()
    y, x = np.nonzero(doubt > 0.301)
    assert (hidden[doubt > 0.301] == (255 * ((x + y) // 4 % 2))[:, None]).all()


def test_a_map_is_bright_where_the_answer_is_not_to_be_trusted_on_a_scale_that_all_pictures_share(
    page: sync_api.Page, photo: tuple[np.ndarray, bytes]
) -> None:
    pixels, file = photo
    give(page, file, model="toy-pointwise")
    powers = np.exp(8.0 * pixels / 255)
    doubt = 1 - (powers / powers.sum(2, keepdims=True)).max(2)
    for name, ticks in (("confidence", ["0", "1.0"]), ("entropy", ["0", "1.1 nats"])):
        page.select_option("#map", name)
        lightness = canvas(page, "map").astype(int).sum(2)
        assert np.corrcoef(lightness.ravel(), doubt.ravel())[0, 1] > 0.9
        shown = page.locator("#ticks span").all_inner_texts()
        assert [shown[0], shown[-1]] == ticks
    assert "find mistakes" in page.inner_text("#bar-use")


def test_an_error_keeps_the_last_answer(
    browser: sync_api.Browser, server: Server, photo: tuple[np.ndarray, bytes]
) -> None:
    page = browser.new_page()
    page.goto(server.url)
    give(page, photo[1], model="toy-pointwise")
    before = canvas(page, "labels")
    page.fill("#scale-to", "large")
    assert page.locator("#stale").is_visible()
    page.click("#run")
    sync_api.expect(page.locator("#status")).to_contain_text("scale is 'large'")
    sync_api.expect(page.locator("#status")).to_contain_text("The picture is of the last answer")
    assert (canvas(page, "labels") == before).all()
    page.close()


def test_what_is_taken_along_is_the_answer_that_is_shown(
    page: sync_api.Page, server: Server, photo: tuple[np.ndarray, bytes], tmp_path: Path
) -> None:
    give(page, photo[1], model="toy-latent")
    page.click("#downloads summary")
    page.click("#request summary")
    page.select_option("#right", "map")
    page.locator("#samples").fill("1")
    assert page.locator("#stale").is_visible(), "which is not what is set"
    files = {}
    for title in ("Labels (PNG)", "Regions (GeoJSON)", "Everything (npz)", "Figure (SVG)", "Figure (PNG)"):
        with page.expect_download() as download:
            page.click(f"#downloads button:text-is('{title}')")
        files[title] = Path(download.value.path()).read_bytes()
    with server.client() as client:
        answer = client.post("/segment", params={"model": "toy-latent", "samples": 4}, content=photo[1], headers=PNG)
    assert files["Labels (PNG)"] == answer.content
    with np.load(io.BytesIO(files["Everything (npz)"])) as arrays:
        assert {*arrays} == {"labels", "probabilities", *MAPS}
    assert json.loads(files["Regions (GeoJSON)"])["type"] == "FeatureCollection"
    assert b"1.1 nats" in files["Figure (SVG)"] and b"toy-latent version 1" in files["Figure (SVG)"]
    with Image.open(io.BytesIO(files["Figure (PNG)"])) as figure:
        assert figure.width >= 360
    (tmp_path / "photo.png").write_bytes(photo[1])
    curl = subprocess.run(page.inner_text("#curl") + " -s", shell=True, cwd=tmp_path, capture_output=True, check=True)
    assert json.loads(curl.stdout)["samples"] == 4
    code = [sys.executable, "-c", page.inner_text("#python")]
    assert b"(40, 60) {'confidence'" in subprocess.run(code, cwd=tmp_path, capture_output=True, check=True).stdout


def test_single_samples_stand_side_by_side(page: sync_api.Page, photo: tuple[np.ndarray, bytes]) -> None:
    give(page, photo[1], model="toy-latent")
    page.click("#draws summary")
    page.fill("#seed", "9")
    assert page.locator("#stale").is_visible()
    page.click("#draws-run")
    sync_api.expect(page.locator("#strip figcaption").last).to_contain_text("disagree", timeout=WAIT_MS)
    *draws, _ = page.locator("#strip figcaption").all_inner_texts()
    assert draws == [f"one sample, seed {seed}" for seed in range(4)], "of the answer that is shown, not of what is set"
    page.check("#safe")
    assert page.locator("#strip figure").count() == 0, "its colours are not the legend's any more"


def test_a_large_picture_comes_in_bands_and_can_be_cancelled(page: sync_api.Page) -> None:
    """Of three classes, 5.4 megapixels are more than a tab takes with all probabilities."""
    steps = np.zeros((2700, 2000, 3), np.uint8)
    steps[..., 0], steps[1500:, :, 1] = 100, 200
    file = io.BytesIO()
    Image.fromarray(steps).save(file, "PNG")
    page.select_option("#model", "toy-latent")
    sync_api.expect(page.locator("#about")).to_contain_text("latent")
    page.locator("#samples").fill("2")
    page.set_input_files("#file", {"name": "large.png", "mimeType": "image/png", "buffer": file.getvalue()})
    sync_api.expect(page.locator("#status")).to_contain_text(re.compile(r", \d+ of \d+ windows"), timeout=WAIT_MS)
    for _ in range(2):
        page.locator("#bar").evaluate("bar => { bar.hidden = true; }")
        page.click("#run")
        sync_api.expect(page.locator("#bar")).to_be_visible()  # with the first rows
        page.click("#cancel")
        sync_api.expect(page.locator("#status")).to_have_text("Cancelled. The rows that were done are shown.")
    page.select_option("#model", "toy-pointwise")
    sync_api.expect(page.locator("#status")).to_contain_text("Done", timeout=5 * WAIT_MS)
    shares = re.findall(r"([\d.]+) %", page.inner_text("#legend"))
    assert [float(share) for share in shares] == pytest.approx([100 * 15 / 27, 100 * 12 / 27, 0], abs=0.06)
    page.focus("#view")
    page.keyboard.press("ArrowUp")
    assert "probabilities\tnot for pictures of this size" in page.inner_text("#pixel")


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
