"""The app: one page with the tabs Generate, Edit, Tokenize, Ask and Compare."""

from importlib.util import find_spec
from typing import Any

import gradio as gr

from studio.ui.server.deep_link import connect_link
from studio.ui.server.failures import Page
from studio.ui.server.send_to import connect_pair, connect_send_to
from studio.ui.tabs import ask, compare, edit, generate, tokenize
from studio.ui.tabs.actions import ON_THE_MODEL
from studio.ui.tabs.components import header
from studio.ui.tabs.examples import EXAMPLE_FILES
from studio.ui.tabs.theme import CSS, studio_theme

_HOUR = 3600
_LIGHT = 64  # concurrent requests that need no model
_ALONE = 1  # concurrent requests for a model where `studio.ui.server.worker` has no queues


def build_app(model: str = "emoji-ar", places: int | None = None) -> gr.Blocks:
    """Build the page without loading a model; the first request does.

    Args:
        model: what `studio.load` takes: a bundled name, a model folder or a Hub id.
        places: requests for a model that may be under way, where `studio.ui.server.worker` has queues for them. `None`:
            one is under way, and the others wait in Gradio's queue.

    Returns:
        The page; launch it with `launch_settings()`, or use `launch`.
    """
    with Page(title="Studio", analytics_enabled=False, delete_cache=(_HOUR, _HOUR)) as demo:
        header()
        with gr.Tabs(elem_id="studio-tabs") as tabs:
            with gr.Tab("Generate", id="generate"):
                send_to, form, history = generate.build_tab(model)
            with gr.Tab("Edit", id="edit"):
                editor, edited = edit.build_tab(model, history)
            with gr.Tab("Tokenize", id="tokenize"):
                image, button, pair = tokenize.build_tab()
            with gr.Tab("Ask", id="ask"):
                asked, question = ask.build_tab()
            with gr.Tab("Compare", id="compare"):
                compared, sides = compare.build_tab(model, history)
        fields = {"edit": editor, "tokenize": image, "ask": asked}
        for buttons in (send_to, history.send_to, edited, sides):
            connect_send_to(buttons, tabs, fields)
        connect_pair(button, pair, tabs, editor)
        connect_link(demo, tabs, form, question, compared)
    if places is not None:
        for handler in demo.fns.values():
            if handler.concurrency_id == ON_THE_MODEL["concurrency_id"]:
                handler.concurrency_limit = None
    return demo.queue(max_size=_LIGHT + (places or 0), api_open=False)


def launch_settings() -> dict[str, Any]:
    """The settings that Gradio takes where an app is launched or mounted.

    They are: the theme; no run history, as each PNG has its settings; access to the example images, which may be
    outside of the working folder; and the endpoints as MCP tools, where the extra `mcp` is installed.
    """
    return {
        "theme": studio_theme(),
        "css_paths": [CSS],
        "footer_links": ["api", "settings"],
        "run_history": False,
        "allowed_paths": [str(file) for file in EXAMPLE_FILES],
        "mcp_server": find_spec("mcp") is not None,
    }


def launch(
    host: str = "127.0.0.1", port: int = 7860, *, model: str = "emoji-ar", places: int | None = None, **settings: Any
) -> None:
    """Serve the app until it is interrupted.

    Args:
        host: address to listen on, IPv4 or IPv6; "0.0.0.0" opens the app to the whole network.
        port: port to listen on; 0 takes any that is free.
        model: what `studio.load` takes.
        places: see `build_app`.
        settings: passed on to `studio.ui.server.run.run`.

    Raises:
        StudioError: nothing can listen there.
    """
    from studio.ui.server.run import run

    blocks = build_app(model, places)
    blocks.max_threads = blocks._queue.max_thread_count = _LIGHT + (_ALONE if places is None else places)
    run(blocks, host, port, **launch_settings(), **settings)
