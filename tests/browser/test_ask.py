"""The Ask tab as a person meets it."""

import pytest
from PIL import Image

pytestmark = pytest.mark.browser

LIMIT = 90_000  # milliseconds
TOAST = ".toast-body"


@pytest.fixture
def empty(page, reader_folder):
    """The tab with a model named, and no image."""
    page.get_by_role("tab", name="Ask").click()
    page.fill("#reader input", reader_folder)
    page.press("#reader input", "Enter")
    page.fill("#question textarea, #question input", "is there a lion")
    return page


@pytest.fixture
def tab(empty):
    """The tab with an example in its fields and a model named."""
    empty.click("#ask-examples tbody tr >> nth=0")
    empty.wait_for_function("document.querySelector('#question textarea, #question input').value.includes('How many')")
    empty.wait_for_selector("#image img")
    return empty


def upload(page, path):
    with page.expect_response(lambda response: "/upload" in response.url):
        page.set_input_files("#image input[type=file]", path)
    page.wait_for_selector("#image img", state="attached")


def test_both_answers_come_with_the_patches_they_came_from(tab):
    tab.click("#ask")
    tab.wait_for_selector("#ask-status .done", timeout=LIMIT)
    assert "the answer is" in tab.inner_text("#ask-status")
    cards = tab.locator("#answers .studio-answer")
    assert cards.count() == 2 and "visual tokens" in cards.nth(0).inner_text()
    tab.wait_for_function(
        "() => { const all = [...document.querySelectorAll('#patches img')];"
        " return all.length == 2 && all.every(image => image.complete && image.naturalWidth > 400) }"
    )
    alts = tab.eval_on_selector_all("#patches img", "all => all.map(image => image.alt)")
    assert alts[0].startswith("Whole image") and alts[1].startswith("Crops")


def test_a_file_that_is_no_image_is_a_toast_and_nothing_is_lost(empty, tmp_path):
    (tmp_path / "notes.png").write_text("no image")
    upload(empty, tmp_path / "notes.png")
    empty.click("#ask")
    empty.wait_for_selector(TOAST)
    assert "notes.png is not an image" in empty.inner_text(TOAST)
    assert empty.input_value("#question textarea, #question input") == "is there a lion"
    empty.wait_for_selector("#ask")


def test_an_own_image_is_read(empty, tmp_path):
    Image.effect_mandelbrot((300, 200), (-2, -1.5, 1, 1.5), 50).convert("CMYK").save(tmp_path / "own.jpg")
    upload(empty, tmp_path / "own.jpg")
    empty.uncheck("#compare input")
    empty.click("#ask")
    empty.wait_for_selector("#ask-status .done", timeout=LIMIT)
    assert empty.locator("#answers .studio-answer").count() == 1


def test_without_an_image_the_tab_says_so(empty):
    empty.click("#ask")
    empty.wait_for_selector(TOAST)
    assert "Give an image" in empty.inner_text(TOAST)


def test_the_answer_grows_and_can_be_cancelled(tab, slow_steps):
    slow_steps.delay = 0.3
    tab.click("#ask")
    tab.wait_for_function("document.querySelector('#answers .running .said')?.innerText.length > 0", timeout=LIMIT)
    tab.click("#ask-cancel")
    tab.wait_for_selector("#ask-status .stopped")
    tab.wait_for_timeout(800)
    stopped_at = slow_steps.count
    tab.wait_for_timeout(1200)
    assert slow_steps.count == stopped_at
    assert tab.inner_text("#answers .said >> nth=0")
    tab.wait_for_selector("#ask")
