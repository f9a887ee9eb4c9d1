"""The demo's page in a real browser: uploads, streams, examples, refusals, two models, a phone.

Needs `pip install 'vila-vlm[demo]' playwright` and a Chromium or Chrome on the PATH.
"""

import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.serve import fixtures
from vila.core.types import Image
from vila.media.image import open_image
from vila.model.loading import save_model

pytestmark = pytest.mark.slow
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for seed in (1, 2):
        open_image(Image(fixtures.tiny.image(seed).source)).save(folder / f"{seed}.png")
    (folder / "page.png").write_text("<html>no image</html>")
    return folder


@pytest.fixture(scope="module")
def browser():
    pytest.importorskip("gradio", reason="needs pip install 'vila-vlm[demo]'")
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs pip install playwright")
    if BROWSER is None:
        pytest.skip("needs a Chromium or Chrome on the PATH")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def address(browser, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name in ("first", "second"):
        save_model(*fixtures.model(), folder / name)
    command = [sys.executable, "-m", "vila", "demo", str(folder / "first"), str(folder / "second"), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("demo at "):
            break
    yield line.split()[2]
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM


@pytest.fixture
def page(browser, address):
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    elsewhere = []
    page.on("request", lambda request: elsewhere.append(request.url))
    page.goto(address)
    page.wait_for_function("document.querySelector('#status')?.innerText.includes('Ready')", timeout=60_000)
    page.wait_for_function("document.querySelector('#two') !== null", timeout=60_000)
    yield page
    outside = [url for url in elsewhere if not url.startswith((address.rstrip("/"), "data:", "blob:"))]
    page.close()
    assert not outside


def ask(page, text, files=()):
    if files:
        page.set_input_files("#question input[type=file]", [str(file) for file in files])
        page.wait_for_timeout(1500)
    page.fill("#question textarea", text)
    page.locator("#question textarea").press("Enter")


def paced(page, side="one"):
    page.wait_for_function(f"document.querySelector('#speed-{side}').innerText.includes('tokens/s')", timeout=60_000)


def shorten(page):
    page.get_by_text("Settings", exact=True).click()
    page.get_by_label("number input for Maximum new tokens").fill("40")
    page.keyboard.press("Tab")


def test_two_images_are_answered_by_both_models_in_a_stream(page, images):
    shorten(page)
    ask(page, "what are they?", [images / "1.png", images / "2.png"])
    lengths = set()
    until = time.monotonic() + 60
    while "tokens/s" not in page.inner_text("#speed-one") and time.monotonic() < until:
        lengths.add(len(page.inner_text("#one")))
        page.wait_for_timeout(20)
    assert len(lengths) > 3  # it grew
    paced(page, "two")
    assert page.locator("#one .message img").count() == 2
    assert "40 tokens" in page.inner_text("#speed-one")
    # The two models have the same weights.
    answers = [page.locator(f"#{side} .bot.message").last.inner_text() for side in ("one", "two")]
    assert answers[0] and answers[0] == answers[1]


def test_an_invalid_upload_shows_the_servers_error(page, images):
    shorten(page)
    ask(page, "what is it?", [images / "page.png"])
    page.wait_for_function("document.querySelector('#one').innerText.includes('not an image')", timeout=60_000)
    page.get_by_role("button", name="New conversation").click()
    page.wait_for_timeout(500)
    ask(page, "hello")
    paced(page)


def test_examples_and_the_gallery_fill_the_question(page):
    shorten(page)
    page.get_by_text("Few-shot examples").click()
    page.get_by_role("button", name="Colour", exact=True).or_(page.get_by_role("button", name="Counting")).click()
    page.wait_for_function("document.querySelector('#shot-answer-0 textarea').value.length > 0", timeout=30_000)
    page.locator("#gallery .thumbnail-item").first.click()
    page.wait_for_function("document.querySelector('#question textarea').value.length > 0", timeout=30_000)
    page.locator("#question textarea").press("Enter")
    paced(page)


def test_a_phone_shows_the_whole_page_without_scrolling_sideways(browser, address):
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.goto(address)
    page.wait_for_selector("#question textarea", timeout=60_000)
    page.wait_for_timeout(1500)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.close()
