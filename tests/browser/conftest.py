"""Shared by the browser tests: a headless Chromium, and the app it visits."""

import functools
import shutil
import time

import pytest

from studio.checkpoints.bundled import ROOT as BUNDLED
from studio.ui.app import build_app, launch_settings

WIDE = {"width": 1280, "height": 900}
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
def url(tiny_folder):
    """The app with the bundled model, or with a tiny random one where no weights are bundled."""
    bundled = (BUNDLED / "emoji-ar" / "model_index.json").is_file()
    app = build_app("emoji-ar" if bundled else str(tiny_folder))
    _, address, _ = app.launch(prevent_thread_lock=True, quiet=True, **launch_settings())
    yield address
    app.close()


@pytest.fixture(scope="session")
def reader_folder(tiny_reader, tmp_path_factory):
    """A tiny random reader as `save_pretrained` writes it."""
    folder = tmp_path_factory.mktemp("readers") / "tiny"
    for part in tiny_reader:
        part.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def page(chromium, url):
    context = chromium.new_context(viewport=WIDE, color_scheme="light")
    page = context.new_page()
    page.requests = []
    page.on("request", lambda request: page.requests.append(request.url))
    page.goto(url)
    page.wait_for_selector("#generate")
    yield page
    context.close()


class Steps:
    count = 0
    delay = 0.0


@pytest.fixture
def slow_steps(monkeypatch):
    """Counts the calls of the models and makes each as slow as `delay` says, in seconds."""
    from transformers import LlavaNextForConditionalGeneration

    from studio import LlamaGen
    from studio.backends.cpu_c import NativeLlamaGen
    from studio.backends.packed import PackedLlamaGen

    steps = Steps()
    for network in (LlamaGen, NativeLlamaGen, PackedLlamaGen):
        for name in ("extend", "extend_tree"):
            monkeypatch.setattr(network, name, _slowed(getattr(network, name), steps))
    reader = LlavaNextForConditionalGeneration
    monkeypatch.setattr(reader, "forward", _slowed(reader.forward, steps))
    return steps


def _slowed(method, steps):
    @functools.wraps(method)
    def slowed(*args, **kwargs):
        steps.count += 1
        time.sleep(steps.delay)
        return method(*args, **kwargs)

    return slowed
