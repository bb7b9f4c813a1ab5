"""The app as a person meets it: a headless Chromium clicks, looks and keeps pictures of what it saw in out/browser/."""

import shutil
import time
from pathlib import Path

import pytest

from studio.checkpoints.bundled import ROOT as BUNDLED
from studio.ui.app import build_app, launch_settings

pytestmark = pytest.mark.browser

SHOTS = Path(__file__).parents[2] / "out" / "browser"
WIDE, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
LIMIT = 90_000  # milliseconds, for a first drawing on a slow machine
TOAST = ".toast-body"


@pytest.fixture(scope="module")
def chromium():
    executable = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if executable is None:
        pytest.fail(
            "The browser tests need Chromium: install it (apt install chromium) and run them again.", pytrace=False
        )
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def url(tiny_folder):
    """The app with the bundled model, or with a tiny random one where no weights are bundled."""
    bundled = (BUNDLED / "emoji-ar" / "model_index.json").is_file()
    app = build_app("emoji-ar" if bundled else str(tiny_folder))
    _, address, _ = app.launch(prevent_thread_lock=True, quiet=True, **launch_settings())
    yield address
    app.close()


@pytest.fixture
def page(chromium, url):
    with_page = chromium.new_context(viewport=WIDE, color_scheme="light")
    page = with_page.new_page()
    page.requests = []
    page.on("request", lambda request: page.requests.append(request.url))
    page.goto(url)
    page.wait_for_selector("#generate")
    yield page
    with_page.close()


def draw(page, prompt="a red apple"):
    page.fill("#prompt textarea", prompt)
    page.click("#generate")
    page.wait_for_selector("#status .done", timeout=LIMIT)


def loaded_pictures(page):
    page.wait_for_function(
        "() => { const all = [...document.querySelectorAll('#pictures img')];"
        " return all.length > 0 && all.every(image => image.complete && image.naturalWidth > 0) }"
    )
    return page.eval_on_selector_all(
        "#pictures img", "all => all.map(image => [image.naturalWidth, image.alt, image.src])"
    )


def test_a_click_on_generate_draws_pictures(page):
    draw(page)
    pictures = loaded_pictures(page)
    assert len(pictures) == 4
    for width, alt, source in pictures:
        assert width >= 16 and "a red apple" in alt and source.endswith(".png")
    assert not page.is_visible("#cancel")
    assert "tokens/s" in page.inner_text("#status")


def test_wrong_input_is_a_toast_and_the_pictures_stay(page):
    draw(page)
    before = loaded_pictures(page)
    page.fill("#seed input, #seed textarea", "-5")
    page.click("#generate")
    page.wait_for_selector(TOAST)
    assert "seed from 0" in page.inner_text(TOAST)
    assert loaded_pictures(page) == before
    assert page.input_value("#prompt textarea") == "a red apple"
    assert page.is_visible("#generate")


def test_cancel_stops_and_the_next_drawing_works(page, slow_steps):
    draw(page)
    slow_steps.delay = 0.2
    page.click("#generate")
    page.wait_for_function("document.querySelector('#status p').innerText.includes('tokens/s')", timeout=LIMIT)
    page.click("#cancel")
    page.wait_for_selector("#status .stopped")
    page.wait_for_timeout(500)
    stopped_at = slow_steps.count
    page.wait_for_timeout(1000)
    assert slow_steps.count == stopped_at
    slow_steps.delay = 0
    draw(page)
    assert len(loaded_pictures(page)) == 4


def test_an_example_fills_the_prompt_and_dice_the_seed(page):
    page.click("#examples .gallery-item >> nth=1")
    page.wait_for_function("document.querySelector('#prompt textarea').value.includes('rocket')")
    page.click("#dice")
    page.wait_for_function("/^[0-9]+$/.test(document.querySelector('#seed input, #seed textarea').value)")


def test_nothing_is_asked_of_another_machine(page, url):
    draw(page)
    loaded_pictures(page)
    elsewhere = [each for each in page.requests if not each.startswith((url.rstrip("/"), "data:", "blob:"))]
    assert not elsewhere


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("name", "viewport"), [("wide", WIDE), ("phone", PHONE)])
def test_it_fits_the_window(chromium, url, name, viewport, scheme):
    context = chromium.new_context(viewport=viewport, color_scheme=scheme)
    page = context.new_page()
    page.goto(url)
    page.wait_for_selector("#generate")
    draw(page)
    loaded_pictures(page)
    page.click("#advanced button")
    page.wait_for_selector("#guidance")
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SHOTS / f"{name}-{scheme}.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    context.close()


class Steps:
    count = 0
    delay = 0.0


@pytest.fixture
def slow_steps(monkeypatch):
    """Counts the calls of the model and makes each as slow as `delay` says, in seconds."""
    from studio import LlamaGen
    from studio.models.native import NativeLlamaGen
    from studio.models.packed import PackedLlamaGen

    steps = Steps()
    for network in (LlamaGen, NativeLlamaGen, PackedLlamaGen):
        monkeypatch.setattr(network, "extend", _slowed(network.extend, steps))
    return steps


def _slowed(method, steps):
    def slowed(*args, **kwargs):
        steps.count += 1
        time.sleep(steps.delay)
        return method(*args, **kwargs)

    return slowed
