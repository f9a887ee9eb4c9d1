"""The demo's page in a real browser: uploads, streaming, stop, retry, edits, examples, errors, two models, a phone.

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
    page.wait_for_selector("#two", timeout=60_000)
    yield page
    outside = [url for url in elsewhere if not url.startswith((address.rstrip("/"), "data:", "blob:"))]
    page.close()
    assert not outside


def ask(page, text, files=()):
    if files:
        page.set_input_files("#question input[type=file]", [str(file) for file in files])
        page.wait_for_function(f"document.querySelectorAll('#question img').length == {len(files)}", timeout=30_000)
    page.fill("#question textarea", text)
    page.locator("#question textarea").press("Enter")


def answered(page, side="one"):
    page.wait_for_function(f"document.querySelector('#speed-{side}').innerText.includes('tokens/s')", timeout=60_000)
    page.wait_for_selector("#question textarea:enabled", timeout=30_000)


def limit_tokens(page, number):
    page.get_by_text("Generation settings").click()
    page.get_by_label("number input for Maximum new tokens").fill(str(number))
    page.keyboard.press("Tab")


def answers(page, side="one"):
    return page.locator(f"#{side} .bot.message").all_inner_texts()


def test_two_images_are_answered_by_both_models_in_a_stream(page, images):
    limit_tokens(page, 40)
    ask(page, "what are they?", [images / "1.png", images / "2.png"])
    lengths = set()
    until = time.monotonic() + 60
    while "tokens/s" not in page.inner_text("#speed-one") and time.monotonic() < until:
        lengths.add(len(page.inner_text("#one")))
        page.wait_for_timeout(20)
    assert len(lengths) > 3  # it grew
    answered(page, "two")
    assert page.locator("#one .message img").count() == 2
    assert page.locator("#two .message img").count() == 2
    assert "40 tokens" in page.inner_text("#speed-one")
    # The two models have the same weights.
    assert answers(page)
    assert answers(page) == answers(page, "two")


def test_a_stopped_answer_stays_and_can_be_retried_and_undone(page):
    limit_tokens(page, 1024)
    ask(page, "first?")
    page.wait_for_selector("#two .bot.message", timeout=60_000)
    page.evaluate("document.querySelector('#question .stop-button').click()")  # no wait until the layout is stable
    page.wait_for_selector("#question textarea:enabled", timeout=30_000)
    assert "1024 tokens" not in page.inner_text("#speed-two")
    page.get_by_label("number input for Maximum new tokens").fill("20")
    page.keyboard.press("Tab")
    page.locator("#one button[title=Retry]").click()
    answered(page)
    assert "20 tokens" in page.inner_text("#speed-one")
    assert page.locator("#two .user.message").count() == page.locator("#one .user.message").count()
    page.locator("#one button[title=Undo]").click()
    page.wait_for_function("document.querySelector('#question textarea').value == 'first?'", timeout=30_000)
    page.wait_for_function("!document.querySelector('#one .message') && !document.querySelector('#two .message')")


def test_an_invalid_upload_shows_the_servers_error(page, images):
    limit_tokens(page, 40)
    page.set_input_files("#question input[type=file]", [str(images / "page.png")])
    page.wait_for_timeout(1500)
    ask(page, "what is it?")
    page.wait_for_function("document.querySelector('#one').innerText.includes('not an image')", timeout=60_000)
    page.wait_for_selector("#question textarea:enabled", timeout=30_000)
    ask(page, "hello")
    answered(page)
    page.locator("#two button[title=Clear]").click()
    page.wait_for_function("!document.querySelector('#one .message') && !document.querySelector('#two .message')")


def test_an_edited_few_shot_answer_is_kept(page):
    limit_tokens(page, 40)
    page.locator("#few-shot button").first.click()
    page.wait_for_function("document.querySelector('#question textarea').value.length > 0", timeout=30_000)
    assert page.locator("#two .bot.message").count() == 2
    page.locator("#one button[title=Edit]:visible").first.click()
    page.fill("#one textarea", "two of them")
    page.locator("#one button[title=Submit]").click()
    page.wait_for_timeout(1000)
    page.locator("#question textarea").press("Enter")
    answered(page)
    assert answers(page)[0].strip() == "two of them"
    assert len(answers(page)) == 3


def test_an_example_fills_the_question(page):
    limit_tokens(page, 40)
    page.locator("#examples button").first.click()
    page.wait_for_function("document.querySelector('#question textarea').value.length > 0", timeout=30_000)
    page.locator("#question textarea").press("Enter")
    answered(page)
    assert page.locator("#one .message img").count() == 1


def test_a_phone_shows_the_whole_page_without_scrolling_sideways(browser, address):
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.goto(address)
    page.wait_for_selector("#question textarea", timeout=60_000)
    page.wait_for_timeout(1500)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.close()
