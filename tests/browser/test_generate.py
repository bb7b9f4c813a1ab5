"""The Generate tab as a person meets it: clicks, looks, and waits for nothing that was cancelled."""

import pytest

pytestmark = pytest.mark.browser

LIMIT = 90_000  # milliseconds, for a first sampling on a slow machine
TOAST = ".toast-body"


def sample(page, prompt="a red apple"):
    page.fill("#prompt textarea", prompt)
    page.click("#generate")
    page.wait_for_selector("#status .done", timeout=LIMIT)


def choose(page, decoding):
    page.get_by_role("radio", name=decoding, exact=True).check()


def loaded_images(page):
    page.wait_for_function(
        "() => { const all = [...document.querySelectorAll('#images img')];"
        " return all.length > 0 && all.every(image => image.complete && image.naturalWidth > 0) }"
    )
    return page.eval_on_selector_all(
        "#images img", "all => all.map(image => [image.naturalWidth, image.alt, image.src])"
    )


def stays_stopped(page, steps):
    page.wait_for_timeout(500)
    stopped_at = steps.count
    page.wait_for_timeout(1000)
    return steps.count == stopped_at


def test_a_click_on_generate_samples_images(page):
    sample(page)
    images = loaded_images(page)
    assert len(images) == 4
    for width, alt, source in images:
        assert width >= 16 and "a red apple" in alt and source.endswith(".png")
    assert not page.is_visible("#cancel")
    assert "tokens/s" in page.inner_text("#status")


def test_wrong_input_is_a_toast_and_the_images_stay(page):
    sample(page)
    before = loaded_images(page)
    page.fill("#seed input, #seed textarea", "-5")
    page.click("#generate")
    page.wait_for_selector(TOAST)
    assert "seed must be a whole number from 0" in page.inner_text(TOAST)
    assert loaded_images(page) == before
    assert page.input_value("#prompt textarea") == "a red apple"
    page.wait_for_selector("#generate")


def test_cancel_stops_and_the_next_sampling_works(page, slow_steps):
    sample(page)
    slow_steps.delay = 0.2
    page.click("#generate")
    page.wait_for_function("document.querySelector('#status p').innerText.includes('tokens/s')", timeout=LIMIT)
    page.click("#cancel")
    page.wait_for_selector("#status .stopped")
    assert stays_stopped(page, slow_steps)
    slow_steps.delay = 0
    sample(page)
    assert len(loaded_images(page)) == 4


def test_an_example_fills_the_prompt_and_dice_the_seed(page):
    page.click("#examples .gallery-item >> nth=1")
    page.wait_for_function("document.querySelector('#prompt textarea').value.includes('rocket')")
    page.click("#dice")
    page.wait_for_function("/^[0-9]+$/.test(document.querySelector('#seed input, #seed textarea').value)")


def test_a_decoding_shows_its_options_and_what_became_of_drafts(page):
    assert not page.is_visible("#lantern-delta")
    choose(page, "Lantern")
    page.wait_for_selector("#lantern-delta")
    page.fill("#lantern-k input, #lantern-k textarea", "20")
    sample(page)
    assert "accepted drafts" in page.inner_text("#tokens")
    page.fill("#lantern-delta input, #lantern-delta textarea", "2")
    page.click("#generate")
    page.wait_for_selector(TOAST)
    assert "delta" in page.inner_text(TOAST)
    choose(page, "Plain")
    page.wait_for_selector("#lantern-delta", state="hidden")


def test_side_by_side_shows_two_images_and_two_clocks(page, slow_steps):
    slow_steps.delay = 0.02  # long enough for the page to show the lane that runs
    choose(page, "Speculative")
    page.fill("#prompt textarea", "a red apple")
    page.click("#side-by-side")
    page.wait_for_selector("#tokens .studio-lane.running svg", timeout=LIMIT)
    page.wait_for_selector("#status .done", timeout=LIMIT)
    assert [alt.split(" ")[0] for _, alt, _ in loaded_images(page)] == ["Plain", "Speculative"]
    clocks = [float(text.split()[0]) for text in page.locator("#tokens .clock").all_inner_texts()]
    assert len(clocks) == 2 and min(clocks) > 0
    assert "Speculative took" in page.inner_text("#status")


def test_side_by_side_can_be_cancelled(page, slow_steps):
    slow_steps.delay = 0.2
    choose(page, "Speculative")
    page.fill("#prompt textarea", "a red apple")
    page.click("#side-by-side")
    page.wait_for_selector("#tokens .studio-lane.running svg", timeout=LIMIT)
    page.click("#cancel")
    page.wait_for_selector("#status .stopped")
    assert stays_stopped(page, slow_steps)


def test_nothing_is_asked_of_another_machine(page, url):
    sample(page)
    loaded_images(page)
    elsewhere = [each for each in page.requests if not each.startswith((url.rstrip("/"), "data:", "blob:"))]
    assert not elsewhere
