"""Images that go from one tab to another."""

import gradio as gr
import pytest

from studio.ui.app import build_app
from studio.ui.server.send_to import _send

PICTURES = [("/tmp/one.png", "one"), ("/tmp/two.png", None)]


@pytest.fixture
def infos(monkeypatch):
    shown = []
    monkeypatch.setattr(gr, "Info", lambda message, **_: shown.append(message))
    return shown


@pytest.mark.parametrize(("chosen", "path"), [(0, "/tmp/one.png"), (1, "/tmp/two.png"), (7, "/tmp/two.png")])
def test_the_image_that_was_clicked_goes(infos, chosen, path):
    assert _send("ask")(PICTURES, chosen) == (path, gr.update(selected="ask"))
    assert not infos


def test_the_first_goes_where_none_was_clicked_and_it_says_so(infos):
    assert _send("tokenize")(PICTURES, None)[0] == "/tmp/one.png"
    assert len(infos) == 1 and "first image" in infos[0]
    _send("tokenize")(PICTURES[:1], None)
    assert len(infos) == 1


def test_without_an_image_it_says_what_to_do(toasts):
    assert _send("ask")(None, None) == (gr.skip(), gr.skip())
    assert "sample one first" in toasts[0]


def test_each_button_fills_the_field_of_its_tab():
    app = build_app("tiny")
    ids = {component["id"]: component["props"].get("elem_id") for component in app.config["components"]}
    for button, field in (("to-tokenize", "original"), ("to-ask", "image")):
        (click,) = [each for each in app.config["dependencies"] if [*map(ids.get, _of(each))] == [button]]
        assert [ids[output] for output in click["outputs"]] == [field, "studio-tabs"]


def _of(dependency):
    return [component for component, _ in dependency["targets"]]
