"""The app: one page, a tab per thing to do."""

from importlib.util import find_spec

import gradio as gr

from studio.ui.server.deep_link import connect_link
from studio.ui.server.failures import Page
from studio.ui.server.send_to import connect_send_to
from studio.ui.tabs import ask, compare, generate, tokenize
from studio.ui.tabs.actions import ON_THE_MODEL
from studio.ui.tabs.components import header
from studio.ui.tabs.examples import EXAMPLE_FILES
from studio.ui.tabs.theme import CSS, studio_theme

_HOUR = 3600
_LIGHT = 64  # places for what needs no model
_ALONE = 1  # requests for a model under way where there are no queues of ours


def build_app(model="emoji-ar", places=None):
    """Build the page without loading a model; the first sampling or question does.

    Args:
        model: what `studio.load` takes: a bundled name, a model folder or a Hub id.
        places: how many requests for a model may be under way, where `studio.ui.server.worker` has queues for them;
            `None` to
            have one under way and the others wait in Gradio's queue.

    Returns:
        A `gr.Blocks`; launch it with `launch_settings()`, or use `launch`.
    """
    with Page(title="Studio", analytics_enabled=False, delete_cache=(_HOUR, _HOUR)) as demo:
        header(model)
        with gr.Tabs(elem_id="studio-tabs") as tabs:
            with gr.Tab("Generate", id="generate"):
                send_to, form = generate.build_tab(model)
            with gr.Tab("Tokenize", id="tokenize"):
                image = tokenize.build_tab()
            with gr.Tab("Ask", id="ask"):
                asked, question = ask.build_tab()
            with gr.Tab("Compare", id="compare"):
                compared = compare.build_tab(model)
        connect_send_to(send_to, tabs, {"tokenize": image, "ask": asked})
        connect_link(demo, tabs, form, question, compared)
    if places is not None:
        for handler in demo.fns.values():
            if handler.concurrency_id == ON_THE_MODEL["concurrency_id"]:
                handler.concurrency_limit = None
    return demo.queue(max_size=_LIGHT + (places or 0), api_open=False)


def launch_settings():
    """What Gradio 6 takes where an app is launched or mounted: the look, no run history (each PNG carries its own
    settings), the files of the examples, which may lie outside of the working folder, and the endpoints as MCP tools
    where the extra `mcp` is installed.
    """
    return {
        "theme": studio_theme(),
        "css_paths": [CSS],
        "footer_links": ["api", "settings"],
        "run_history": False,
        "allowed_paths": [str(file) for file in EXAMPLE_FILES],
        "mcp_server": find_spec("mcp") is not None,
    }


def launch(host="127.0.0.1", port=7860, *, model="emoji-ar", places=None, **settings):
    """Serve the app until it is interrupted.

    Args:
        host: address to listen on, IPv6 as well; "0.0.0.0" shows the app to the whole network.
        port: port to listen on.
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
