"""The app as the wheel installs it, started in an empty folder: every example of every tab, and what becomes of one."""

import os
import subprocess
import sys

import pytest

from studio.ui.tabs import ask, compare, model_fields, tokenize

pytestmark = pytest.mark.browser

LIMIT = 120_000
START = {"serve": ["serve", "--port", "0"], "ui": ["ui", "--port", "0"]}


@pytest.fixture(scope="module", params=START)
def url(request, installed, tmp_path_factory):
    """The address of an app whose code, working folder and temporary files lie apart from each other."""
    folder = tmp_path_factory.mktemp("elsewhere")
    (empty := folder / "empty").mkdir()
    (temporary := folder / "temporary").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(installed), "TMPDIR": str(temporary)}
    command = [sys.executable, "-m", "studio", *START[request.param]]
    process = subprocess.Popen(command, cwd=empty, env=environment, stdout=subprocess.PIPE, text=True)
    yield process.stdout.readline().split()[-1]
    process.terminate()
    process.wait(30)
    assert not list(empty.iterdir()) and not list(temporary.glob("studio-*"))


def open_tab(page, name):
    page.get_by_role("tab", name=name, exact=True).click()


def examples(page, table):
    """Clicks every example of a table, and says when each was clicked."""
    rows = page.locator(f"#{table} .gallery-item, #{table} tbody tr")
    assert rows.count() > 1
    for number in range(rows.count()):
        rows.nth(number).click()
        yield number


def await_image(page, field, before):
    """Waits for another image than before in a field that shows one; returns what it shows."""
    script = "([field, before]) => { const image = document.querySelector(`#${field} img`);"
    script += " return image && image.naturalWidth > 0 && image.src != before ? image.src : null }"
    return page.wait_for_function(script, arg=[field, before], timeout=LIMIT).json_value()


def test_every_example_fills_its_tab(page):
    for tab, field, table, texts in (
        ("Generate", "prompt", "examples", model_fields.EXAMPLES),
        ("Compare", "compare-prompt", "compare-examples", compare.EXAMPLES),
    ):
        open_tab(page, tab)
        for number in examples(page, table):
            script = "([field, text]) => document.querySelector(`#${field} textarea`).value == text"
            page.wait_for_function(script, arg=[field, texts[number]], timeout=LIMIT)
        assert number + 1 == len(texts)
    for tab, field, table, count in (
        ("Tokenize", "original", "tokenize-examples", len(tokenize.EXAMPLES)),
        ("Ask", "image", "ask-examples", len(ask.EXAMPLES)),
    ):
        open_tab(page, tab)
        shown = [""]
        for _ in examples(page, table):
            shown.append(await_image(page, field, shown[-1]))
        assert len(shown) == 1 + count
    assert page.input_value("#question textarea, #question input") == ask.EXAMPLES[-1][1]
    assert not page.locator(".toast-body").count()


def test_an_example_is_tokenized_and_asked_about(page):
    open_tab(page, "Tokenize")
    next(examples(page, "tokenize-examples"))
    await_image(page, "original", "")
    page.click("#tokenize")
    page.wait_for_selector("#tokenize-status .done", timeout=LIMIT)
    open_tab(page, "Ask")
    next(examples(page, "ask-examples"))
    await_image(page, "image", "")
    page.click("#ask")
    page.wait_for_selector("#ask-status .done", timeout=LIMIT)
    assert not page.locator(".toast-body").count()


def test_the_slider_ends_where_its_tokenizer_does(page):
    open_tab(page, "Tokenize")
    assert page.inner_text("#scale [data-testid=max-value]") == page.input_value("#scale input[type=number]") == "128"


def test_side_by_side_takes_the_choice_that_the_page_begins_with(page):
    page.fill("#prompt textarea", "a red apple")
    page.click("#side-by-side")
    page.wait_for_selector("#status .done", timeout=LIMIT)
    assert page.locator(".studio-lane.done").count() == 2


def test_text_of_a_link_is_no_html(page, url):
    html = "<img src=x><a href='https://evil.example'>Sign in</a>"
    page.goto(f"{url}?tab={html}")
    page.wait_for_selector(".toast-body")
    assert "<img src=x>" in page.inner_text(".toast-body")
    assert not page.locator(".toast-body .toast-text img, .toast-body .toast-text a").count()
