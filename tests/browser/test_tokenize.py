"""The Tokenize tab as a person meets it, and the way to it from an image that was sampled."""

import pytest
from PIL import Image

pytestmark = pytest.mark.browser

LIMIT = 90_000  # milliseconds
TOAST = ".toast-body"


@pytest.fixture
def tab(page):
    page.get_by_role("tab", name="Tokenize").click()
    page.wait_for_selector("#tokenize")
    return page


@pytest.fixture
def row(tab, tiny_one_d, tmp_path):
    """The tab with a One-D-Piece tokenizer named."""
    tiny_one_d.save_pretrained(tmp_path / "row")
    tab.fill("#tokenizer input", str(tmp_path / "row"))
    tab.press("#tokenizer input", "Enter")
    tab.wait_for_selector("#scale")
    return tab


def upload(page, path, field="#original"):
    with page.expect_response(lambda response: "/upload" in response.url):
        page.set_input_files(f"{field} input[type=file]", path)


def give(page, path):
    upload(page, path)
    page.wait_for_selector("#original img", state="attached")


def restore(page):
    page.click("#tokenize")
    page.wait_for_selector("#tokenize-status .done", timeout=LIMIT)


def photo(folder, size=(1800, 1200)):
    Image.effect_mandelbrot(size, (-2, -1.5, 1, 1.5), 50).convert("RGB").save(folder / "photo.jpg")
    return folder / "photo.jpg"


def test_a_photo_and_what_is_left_of_it(tab, tmp_path):
    give(tab, photo(tmp_path))
    restore(tab)
    widths = tab.eval_on_selector_all("#pair img", "all => all.map(image => [image.naturalWidth, image.naturalHeight])")
    assert widths == [[1280, 853]] * 2
    assert "128 of 128 tokens" in tab.inner_text("#tokenize-status")
    assert tab.locator("#codes svg title").count() == 128
    assert tab.is_visible("#download-odp") and tab.is_visible("#scale")


def test_a_grid_of_codes_has_no_length(tab, tiny_vq, tmp_path):
    tiny_vq.save_pretrained(tmp_path / "grid")
    tab.fill("#tokenizer input", str(tmp_path / "grid"))
    tab.press("#tokenizer input", "Enter")
    tab.wait_for_selector("#scale", state="hidden")
    give(tab, photo(tmp_path))
    restore(tab)
    assert tab.locator("#codes svg title").count() == 16
    alts = tab.eval_on_selector_all("#codecs img", "all => all.map(image => image.alt)")
    assert "grid · 12 bytes" in alts[0]
    assert "JPEG has no file of 12 bytes" in tab.inner_text("#codes")
    assert not tab.is_visible("#download-odp")


def test_a_file_of_tokens_goes_home_and_comes_back(row, tmp_path):
    give(row, photo(tmp_path, (90, 60)))
    row.fill("#scale input[type=number]", "3")
    restore(row)
    assert "3 of 6 tokens" in row.inner_text("#tokenize-status")
    with row.expect_download() as download:
        row.click("#download-odp")
    assert download.value.suggested_filename == "photo.odp"
    download.value.save_as(tmp_path / "home.odp")
    assert (tmp_path / "home.odp").read_bytes()[:3] == b"ODP"
    row.set_input_files("input[accept='.odp']", tmp_path / "home.odp")
    row.wait_for_selector("#opened img")
    assert "90 x 60 pixels from 3 tokens" in row.inner_text("#tokenize-status")


def test_files_that_are_nothing_are_a_toast_and_nothing_is_lost(tab, tmp_path):
    (tmp_path / "notes.png").write_text("no image")
    give(tab, tmp_path / "notes.png")
    tab.click("#tokenize")
    tab.wait_for_selector(TOAST)
    assert "notes.png is not an image" in tab.inner_text(TOAST)
    tab.wait_for_selector("#original img", state="attached")
    (tmp_path / "notes.odp").write_text("no tokens")
    tab.set_input_files("input[accept='.odp']", tmp_path / "notes.odp")
    tab.wait_for_selector(f"{TOAST}:has-text('notes.odp is not an .odp file')")
    tab.wait_for_selector("#tokenize")


def test_without_an_image_the_tab_says_so(tab):
    tab.click("#tokenize")
    tab.wait_for_selector(TOAST)
    assert "Give an image" in tab.inner_text(TOAST)


def test_a_sampled_image_goes_to_the_other_tabs(page):
    assert not page.is_visible("#to-tokenize")
    page.fill("#prompt textarea", "a red apple")
    page.click("#generate")
    page.wait_for_selector("#status .done", timeout=LIMIT)
    page.click("#to-ask")
    page.wait_for_selector("#image img")
    page.wait_for_selector(f"{TOAST}:has-text('first image')")
    assert page.get_by_role("tab", name="Ask").get_attribute("aria-selected") == "true"
    page.get_by_role("tab", name="Generate").click()
    page.locator("#images button.gallery-item, #images .thumbnail-lg").nth(1).click()
    page.click("#to-tokenize")
    page.wait_for_selector("#original img")
    assert page.get_by_role("tab", name="Tokenize").get_attribute("aria-selected") == "true"
    restore(page)
    assert page.locator("#pair img").count() == 2
