"""The Compare tab as a person meets it."""

import pytest

pytestmark = pytest.mark.browser

LIMIT = 90_000  # milliseconds
TOAST = ".toast-body"


@pytest.fixture
def tab(page):
    page.get_by_role("tab", name="Compare").click()
    page.fill("#compare-prompt textarea", "a red apple")
    return page


def test_two_decodings_side_by_side(tab, slow_steps):
    slow_steps.delay = 0.02  # long enough for the page to show the side that waits
    tab.click("#compare-start")
    tab.wait_for_selector("#sides .waiting", timeout=LIMIT)
    tab.wait_for_selector("#compare-status .done", timeout=LIMIT)
    assert "Fastest:" in tab.inner_text("#compare-status")
    alts = tab.eval_on_selector_all("#compare-images img", "all => all.map(image => image.alt)")
    assert len(alts) == 2 and "Plain" in alts[0] and "Jacobi" in alts[1]
    clocks = [float(text.split()[0]) for text in tab.locator("#sides .clock").all_inner_texts()]
    assert len(clocks) == 2 and min(clocks) > 0
    text = tab.inner_text("#sides")
    assert "calls of the model" in text and "accepted drafts" in text


def test_a_side_of_ones_own_is_taken_and_a_wrong_one_is_a_toast(tab):
    tab.fill("#compare-sides input", "nobody-has-this: lantern delta=0.2")
    tab.press("#compare-sides input", "Enter")
    tab.press("#compare-sides input", "Tab")
    tab.click("#compare-start")
    tab.wait_for_selector(TOAST, timeout=LIMIT)
    assert "nobody-has-this" in tab.inner_text(TOAST)
    assert tab.input_value("#compare-prompt textarea") == "a red apple"
    assert "nobody-has-this" in tab.inner_text("#compare-sides")
    tab.wait_for_selector("#compare-start")


def test_a_comparison_can_be_cancelled(tab, slow_steps):
    slow_steps.delay = 0.2
    tab.click("#compare-start")
    tab.wait_for_function(
        "document.querySelector('#compare-status p').innerText.includes('Sampling 1 of 2')", timeout=LIMIT
    )
    tab.click("#compare-cancel")
    tab.wait_for_selector("#compare-status .stopped")
    tab.wait_for_timeout(500)
    stopped_at = slow_steps.count
    tab.wait_for_timeout(1000)
    assert slow_steps.count == stopped_at
    tab.wait_for_selector("#compare-start")
