"""The Edit tab as a person meets it: a brush stroke redraws what it covers and nothing else."""

import json
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from studio.checkpoints.bundled import bundled_folder

pytestmark = pytest.mark.browser

LIMIT = 90_000  # milliseconds
TOAST = ".toast-body"
BRUSH = "#editor button[aria-label='Brush']"
SIDE = json.loads((bundled_folder("emoji-vq") / "config.json").read_text())["sample_size"]
"""Of an image of the Generate tab, in pixels."""


@pytest.fixture
def tab(page):
    page.get_by_role("tab", name="Edit").click()
    page.wait_for_selector(BRUSH, timeout=LIMIT)
    page.wait_for_timeout(1000)  # until the canvas takes files
    return page


def give(page, path):
    with page.expect_file_chooser() as chooser:
        page.get_by_text("Upload an image").click()
    chooser.value.set_files(path)
    page.wait_for_selector("#editor button[aria-label='Brush']:not([disabled])")
    page.wait_for_timeout(2000)


def stroke(page):
    """A stroke along the middle of the image."""
    page.click(BRUSH)
    box = page.locator("#editor canvas").first.bounding_box()
    middle = box["y"] + 0.47 * box["height"]
    page.mouse.move(box["x"] + 0.4 * box["width"], middle)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.6 * box["width"], middle, steps=8)
    page.mouse.up()
    page.wait_for_timeout(500)


def redraw(page):
    page.fill("#edit-prompt textarea", "a green pear")
    page.click("#redraw")
    page.wait_for_selector("#edit-status .done", timeout=LIMIT)


def result(page):
    source = page.locator("#edit-results img").first.get_attribute("src")
    return np.asarray(Image.open(BytesIO(page.request.get(source).body())).convert("RGB"))


def test_a_stroke_redraws_what_it_covers_and_nothing_else(tab, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "noise.png")
    give(tab, tmp_path / "noise.png")
    stroke(tab)
    redraw(tab)
    changed = (result(tab) != pixels).any(axis=2)
    rows, columns = np.nonzero(changed)
    assert changed[28:34, 24:40].mean() > 0.9, "the middle is redrawn"
    assert 12 < rows.min() and rows.max() < 52 and 8 < columns.min() and columns.max() < 56, "the rest is kept"
    assert tab.locator("#edit-pair img").count() == 2


def test_expanding_and_an_image_of_the_generate_tab(page):
    page.fill("#prompt textarea", "a red apple")
    page.click("#generate")
    page.wait_for_selector("#status .done", timeout=LIMIT)
    page.click("#to-edit")
    page.wait_for_selector(BRUSH, timeout=LIMIT)
    page.wait_for_timeout(3000)
    page.fill("#expand-left input, #expand-left textarea", "32")
    redraw(page)
    assert result(page).shape == (SIDE, SIDE + 32, 3)


def test_what_is_missing_is_a_toast(tab, tmp_path):
    tab.fill("#edit-prompt textarea", "a green pear")
    tab.click("#redraw")
    tab.wait_for_selector(TOAST)
    assert "Give an image first" in tab.inner_text(TOAST)
    Image.new("RGB", (32, 32), "white").save(tmp_path / "white.png")
    give(tab, tmp_path / "white.png")
    tab.click("#redraw")
    tab.wait_for_selector(f"{TOAST}:has-text('Nothing is to be redrawn')")
