"""A browser, a server over the toys, and the page open in it."""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.serving.playground.browsing import CHROMIUM, HEIGHT, WAIT_MS, WIDTH, sync_api
from tests.serving.server import Server, serving


@pytest.fixture(scope="package")
def browser() -> Iterator[sync_api.Browser]:
    with sync_api.sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.fixture(scope="session")
def server(toy_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(toy_store, tmp_path_factory.mktemp("playground")) as started:
        yield started


@pytest.fixture(scope="session")
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
