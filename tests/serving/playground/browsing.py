"""What the tests of the playground do with its page, and what they read off it."""

import shutil

import numpy as np
import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed; the extra test brings it")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
WIDTH, HEIGHT = 60, 40
"""Of the photograph."""
WAIT_MS = 60_000
sync_api.expect.set_options(timeout=WAIT_MS)
PNG = {"Content-Type": "image/png", "Accept": "image/png"}
PAINTED = """new Promise((tell, fail) => {
  setTimeout(fail, 60_000, Error("nothing was painted for a minute"));
  requestAnimationFrame(() => requestAnimationFrame(tell));
})"""
"""Waits in the page until what was asked for before is painted."""


def give(page: sync_api.Page, photo: bytes, *, model: str) -> None:
    page.select_option("#model", model)
    sync_api.expect(page.locator("#about")).to_contain_text("version 1")
    page.set_input_files("#file", {"name": "photo.png", "mimeType": "image/png", "buffer": photo})
    done(page)


def done(page: sync_api.Page) -> None:
    sync_api.expect(page.locator("#status")).to_contain_text("Done", timeout=WAIT_MS)


def canvas(page: sync_api.Page, layer: str) -> np.ndarray:
    """A layer's pixels as the view shows them at 1:1, uint8 [H, W, 3]."""
    for side in ("#left", "#right"):
        page.select_option(side, layer)
    page.click("#zoom-fit")
    page.click("#zoom-one")
    page.evaluate(PAINTED)
    values = page.locator("#view").evaluate(
        f"c => Array.from(c.getContext('2d').getImageData(c.dataset.left, c.dataset.top, {WIDTH}, {HEIGHT}).data)"
    )
    return np.array(values, np.uint8).reshape(HEIGHT, WIDTH, 4)[..., :3]


def place(page: sync_api.Page, x: int, y: int) -> dict[str, float]:
    """Where a pixel of the picture lies in the view."""
    page.evaluate(PAINTED)
    view = page.locator("#view").evaluate("c => [c.dataset.left, c.dataset.top, c.dataset.zoom].map(Number)")
    return {"x": view[0] + (x + 0.5) * view[2], "y": view[1] + (y + 0.5) * view[2]}


def drag(page: sync_api.Page, start: tuple[int, int], end: tuple[int, int]) -> None:
    frame = page.locator("#view").bounding_box()
    assert frame
    points = [place(page, *corner) for corner in (start, end)]
    half = page.locator("#view").evaluate("c => c.dataset.zoom / 2")
    for point, act in zip(points, (page.mouse.down, page.mouse.up), strict=True):
        page.mouse.move(frame["x"] + point["x"] - half, frame["y"] + point["y"] - half, steps=4)
        act()
