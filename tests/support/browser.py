"""Headless Chromium for tests of pages: the system's, driven by Playwright."""

import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
PATIENCE = 120_000  # milliseconds until what hasn't come is taken to come never


@contextmanager
def browser():
    """A running browser. Skips the test where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
    if CHROMIUM is None:
        pytest.skip("needs chromium (apt-get install chromium)")
    with playwright.sync_playwright() as driver:
        yield driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())


@contextmanager
def page_at(chromium, place, expected="", **options):
    """The page of a server or in a file, which must not complain, nor ask anybody else."""
    is_file = isinstance(place, Path)
    address = place.as_uri() if is_file else place
    context = chromium.new_context(offline=is_file, **options)
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    complaints, asked = [], []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    yield page
    context.close()
    assert [text for text in complaints if not (expected and expected in text)] == []
    assert [url for url in asked if not url.startswith((address, "data:"))] == []
