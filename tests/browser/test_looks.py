"""What every tab looks like, wide and on a phone, light and dark; images of it are kept in out/browser/."""

from pathlib import Path

import pytest

pytestmark = pytest.mark.browser

SHOTS = Path(__file__).parents[2] / "out" / "browser"
WIDE, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
LIMIT = 90_000  # milliseconds


@pytest.fixture(params=["light", "dark"])
def scheme(request):
    return request.param


@pytest.fixture(params=[("wide", WIDE), ("phone", PHONE)], ids=lambda each: each[0])
def window(request, chromium, url, scheme):
    """A page in a window, and what its image is called."""
    name, viewport = request.param
    context = chromium.new_context(viewport=viewport, color_scheme=scheme)
    page = context.new_page()
    page.goto(url)
    page.wait_for_selector("#generate")
    yield page, f"{name}-{scheme}"
    context.close()


def keep(page, name):
    page.wait_for_timeout(300)
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SHOTS / f"{name}.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]


def test_sampling_fits_the_window(window):
    page, name = window
    page.get_by_role("radio", name="Lantern", exact=True).check()
    page.fill("#lantern-k input, #lantern-k textarea", "20")
    page.fill("#prompt textarea", "a red apple")
    page.click("#generate")
    page.wait_for_selector("#status .done", timeout=LIMIT)
    page.click("#advanced button")
    page.wait_for_selector("#guidance")
    keep(page, f"generate-{name}")


def test_two_decodings_side_by_side_fit_the_window(window):
    page, name = window
    page.get_by_role("radio", name="Speculative", exact=True).check()
    page.fill("#prompt textarea", "a red apple")
    page.click("#side-by-side")
    page.wait_for_selector("#status .done", timeout=LIMIT)
    keep(page, f"side-by-side-{name}")


def test_an_answer_fits_the_window(window, reader_folder):
    page, name = window
    page.get_by_role("tab", name="Ask").click()
    page.click("#ask-examples tbody tr >> nth=1")
    page.fill("#reader input", reader_folder)
    page.press("#reader input", "Enter")
    page.click("#ask")
    page.wait_for_selector("#ask-status .done", timeout=LIMIT)
    keep(page, f"ask-{name}")


def test_a_restoration_fits_the_window(window):
    page, name = window
    page.get_by_role("tab", name="Tokenize").click()
    page.click("#tokenize-examples button >> nth=0")
    page.wait_for_selector("#original img")
    page.click("#tokenize")
    page.wait_for_selector("#tokenize-status .done", timeout=LIMIT)
    keep(page, f"tokenize-{name}")


def test_a_comparison_fits_the_window(window):
    page, name = window
    page.get_by_role("tab", name="Compare").click()
    page.fill("#compare-prompt textarea", "a red apple")
    page.click("#compare-start")
    page.wait_for_selector("#compare-status .done", timeout=LIMIT)
    keep(page, f"compare-{name}")
