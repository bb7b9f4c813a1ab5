"""Models, classes and the history of a session, as a person meets them."""

import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.browser

LIMIT = 90_000  # milliseconds
TOAST = ".toast-body"


def sample(page, seed="7"):
    page.fill("#seed input, #seed textarea", seed)
    page.click("#generate")
    page.wait_for_selector("#status .running, #cancel", timeout=LIMIT)
    page.wait_for_selector("#status .done, #status .stopped", timeout=LIMIT)
    assert page.is_visible("#status .done"), [page.inner_text("#status"), *page.locator(TOAST).all_inner_texts()]
    page.wait_for_function(f"document.querySelector('#status .done').innerText.includes('{seed}')")


def choose(page, model):
    page.click("#model input")
    page.get_by_role("option", name=model, exact=True).click()


def type_model(page, name):
    page.fill("#model input", str(name))
    page.keyboard.press("Enter")


def captions(page):
    return page.eval_on_selector_all("#history img", "all => all.map(image => image.alt)")


def decodings(page):
    return page.locator("#decoding label").all_inner_texts()


def test_decodings_options_and_help_follow_the_model(page):
    choose(page, "emoji-mar")
    page.wait_for_selector("#mar-steps", state="visible")
    assert [text.strip() for text in decodings(page)] == ["Masked autoregressive", "Continuous speculative"]
    assert "MAR" in page.inner_text("#model")
    page.fill("#prompt textarea", "a red apple")
    sample(page)
    assert "· emoji-mar, mar" in captions(page)[0]
    choose(page, "emoji-ar")
    page.wait_for_selector("#mar-steps", state="hidden")
    assert "Jacobi" in " ".join(decodings(page))
    sample(page, "8")
    assert "· emoji-ar, exact" in captions(page)[0]


def test_a_class_is_searched_by_name_and_sampled(page, tiny_class_folder):
    type_model(page, tiny_class_folder)
    page.wait_for_selector("#class-label", state="visible")
    assert not page.is_visible("#prompt")
    page.click("#class-label input")
    page.keyboard.type("retriev", delay=50)  # at the pace of a person: each letter filters the list
    assert page.get_by_role("option").all_inner_texts() == ["golden retriever · 3"]
    page.wait_for_selector("#class-label input[aria-activedescendant]")
    page.keyboard.press("Enter", delay=50)
    page.wait_for_function("document.querySelector('#class-label input').value == 'golden retriever · 3'")
    sample(page)
    assert captions(page)[0].startswith("seed 7 · golden retriever")
    page.click("#examples .gallery-item >> nth=1")
    page.wait_for_function("document.querySelector('#class-label input').value.startsWith('tabby')")
    choose(page, "emoji-mar")
    page.wait_for_selector("#prompt", state="visible")
    assert not page.is_visible("#class-label")


def test_a_model_that_is_not_there_is_a_toast(page):
    type_model(page, "/nowhere/model")
    page.wait_for_selector(TOAST)
    assert "no model or folder called '/nowhere/model'" in page.inner_text(TOAST)


def test_a_link_brings_a_model_and_its_decoding(page, url):
    page.goto(f"{url}?model=emoji-mar&prompt=a+fox&steps=8")
    page.wait_for_function("() => document.querySelector('#prompt textarea')?.value == 'a fox'")
    page.wait_for_selector("#mar-steps", state="visible")
    assert page.input_value("#model input") == "emoji-mar"
    assert page.input_value("#mar-steps input, #mar-steps textarea") == "8"


def test_what_was_made_can_be_used_again(page, tmp_path):
    page.fill("#prompt textarea", "a red apple")
    sample(page, "3")
    choose(page, "emoji-mar")
    page.wait_for_selector("#mar-steps", state="visible")
    page.fill("#prompt textarea", "a fox")
    sample(page, "40")
    assert [text.split(" · ")[1] for text in captions(page)] == ["a fox"] * 4 + ["a red apple"] * 4
    page.locator("#history .thumbnail-lg").nth(5).click()
    page.wait_for_timeout(500)
    with page.expect_download() as one:
        page.click("#history-file")
    assert one.value.suggested_filename == "a-red-apple-4.png"
    with page.expect_download() as whole:
        page.click("#history-all")
    whole.value.save_as(tmp_path / "all.zip")
    with zipfile.ZipFile(tmp_path / "all.zip") as file:
        assert file.namelist()[4] == "05-a-red-apple-3.png" and len(file.namelist()) == 8
        assert file.read("06-a-red-apple-4.png") == Path(one.value.path()).read_bytes()
    page.click("#history-use")
    page.wait_for_function("() => document.querySelector('#prompt textarea').value == 'a red apple'")
    page.wait_for_selector("#mar-steps", state="hidden")
    assert page.input_value("#model input") == "emoji-ar"
    assert page.input_value("#seed input, #seed textarea") == "4"
    page.click("#history-to-tokenize")
    page.wait_for_selector("#original img")
    assert page.get_by_role("tab", name="Tokenize").get_attribute("aria-selected") == "true"
    page.click("#tokenize")
    page.wait_for_selector("#tokenize-status .done", timeout=LIMIT)
    page.click("#restored-to-edit")
    page.wait_for_function(
        "() => document.querySelector('[role=tab][aria-selected=true]').textContent.trim() == 'Edit'"
    )


def test_another_visitor_sees_nothing_of_it(page, chromium, url):
    page.fill("#prompt textarea", "a red apple")
    sample(page)
    assert len(captions(page)) == 4
    context = chromium.new_context()
    other = context.new_page()
    other.goto(url)
    other.wait_for_selector("#generate")
    other.wait_for_timeout(1000)
    assert not captions(other) and not other.is_visible("#history-all")
    other.fill("#prompt textarea", "a fox")
    sample(other, "60")
    assert {text.split(" · ")[1] for text in captions(other)} == {"a fox"}
    sample(page, "19")
    assert {text.split(" · ")[1] for text in captions(page)} == {"a red apple"} and len(captions(page)) == 8
    context.close()
