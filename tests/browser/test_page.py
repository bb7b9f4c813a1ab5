"""The page as a whole: how fast it is there, links into it, images dropped on it, a reload, and no mouse."""

import urllib.parse

import pytest

from studio.ui.app import build_app, launch_settings
from studio.ui.server import models

pytestmark = pytest.mark.browser

LIMIT = 90_000
FIRST_PAINT = 2000  # milliseconds
PAINTED = "() => performance.getEntriesByName('first-contentful-paint').map(entry => entry.startTime)[0]"


def sample(page):
    page.fill("#prompt textarea", "a red apple")
    page.click("#generate")
    page.wait_for_selector("#status .done", timeout=LIMIT)


def form_of(page):
    """What the form holds, when the part that is folded away is open too."""
    page.click("#advanced button")
    names = ("prompt", "seed", "guidance")
    return {name: page.input_value(f"#{name} textarea, #{name} input") for name in names}


def dropped(page, path):
    """Drops a file on the field for sampled images, as a mouse would."""
    with open(path, "rb") as file:
        content = list(file.read())
    transfer = page.evaluate_handle(
        "content => { const transfer = new DataTransfer();"
        " transfer.items.add(new File([new Uint8Array(content)], 'sampled.png', { type: 'image/png' }));"
        " return transfer }",
        content,
    )
    page.dispatch_event("#recall button", "drop", {"dataTransfer": transfer})


def test_the_first_paint_takes_less_than_two_seconds_and_no_model(chromium, tiny_folder):
    """The second of two visitors, in a browser of its own: the first one's includes the start of the server."""
    app = build_app(str(tiny_folder))
    _, url, _ = app.launch(prevent_thread_lock=True, quiet=True, **launch_settings())
    try:
        for _ in range(2):
            context = chromium.new_context()
            page = context.new_page()
            page.goto(url)
            page.wait_for_selector("#generate")
            painted = page.evaluate(PAINTED)
            context.close()
    finally:
        app.close()
    assert painted < FIRST_PAINT
    assert str(tiny_folder) not in models._pipelines


def test_a_link_fills_the_form_and_samples_nothing(page, url):
    page.goto(f"{url}?{urllib.parse.urlencode({'prompt': 'a fox', 'seed': 7, 'guidance': 2.5, 'decoding': 'lantern'})}")
    page.wait_for_function("() => document.querySelector('#prompt textarea')?.value == 'a fox'")
    page.wait_for_selector("#lantern-delta", state="visible")
    assert form_of(page) == {"prompt": "a fox", "seed": "7", "guidance": "2.5"}
    assert not page.is_visible("#images img")


def test_a_link_opens_a_tab(page, url):
    page.goto(f"{url}?tab=ask&question=what+is+it")
    page.wait_for_function("() => document.querySelector('#question textarea, #question input')?.value == 'what is it'")
    assert page.get_by_role("tab", name="Ask").get_attribute("aria-selected") == "true"


def test_a_wrong_link_is_a_toast(page, url):
    page.goto(f"{url}?prompt=a+fox&count=99")
    page.wait_for_selector(".toast-body")
    assert "from 1 to 16" in page.inner_text(".toast-body")
    assert page.input_value("#prompt textarea") == ""


def test_a_sampled_image_dropped_back_brings_its_settings(page, tmp_path):
    page.click("#advanced button")
    page.fill("#guidance textarea, #guidance input", "2.5")
    sample(page)
    link = page.get_attribute("#status .done a", "href")
    source = page.locator("#images img").nth(1).get_attribute("src")
    file = tmp_path / "sampled.png"
    file.write_bytes(page.request.get(source).body())
    page.reload()
    page.wait_for_selector("#generate")
    page.wait_for_timeout(500)
    dropped(page, file)
    page.wait_for_function("() => document.querySelector('#prompt textarea').value == 'a red apple'")
    asked = urllib.parse.parse_qs(link[1:])
    assert form_of(page) == {"prompt": "a red apple", "seed": str(int(asked["seed"][0]) + 1), "guidance": "2.5"}


def test_a_reload_ends_the_sampling_and_the_page_works_again(page, slow_steps):
    slow_steps.delay = 0.2
    page.fill("#prompt textarea", "a red apple")
    page.click("#generate")
    page.wait_for_selector("#status .running p:has-text('tokens')", timeout=LIMIT)
    page.reload()
    page.wait_for_selector("#generate")
    page.wait_for_timeout(1500)
    stopped_at = slow_steps.count
    page.wait_for_timeout(1000)
    assert slow_steps.count == stopped_at
    slow_steps.delay = 0
    sample(page)


def test_without_a_mouse(page):
    page.focus("#prompt textarea")
    page.keyboard.type("a red apple")
    for _ in range(3):
        page.keyboard.press("Tab")
        if page.evaluate("() => document.activeElement.id") == "generate":
            break
    assert page.evaluate("() => getComputedStyle(document.activeElement).outlineStyle != 'none' || "
                         "getComputedStyle(document.activeElement).boxShadow != 'none'")  # fmt: skip
    page.keyboard.press("Enter")
    page.wait_for_selector("#status .done", timeout=LIMIT)
    page.get_by_role("tab", name="Generate").focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_function(
        "() => document.querySelector('[role=tab][aria-selected=true]').textContent.trim() == 'Edit'"
    )
