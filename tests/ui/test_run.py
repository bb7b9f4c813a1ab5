"""Where the app listens: IPv6 addresses as well as others."""

import urllib.request

import gradio as gr
import pytest

from studio.ui.server import run as running


@pytest.mark.parametrize(("host", "start"), [("::1", "http://[::1]:"), ("127.0.0.1", "http://127.0.0.1:")])
def test_the_app_answers_where_it_was_told_to_listen(host, start):
    with gr.Blocks() as page:
        pass
    with running.running(page, host, 0) as address:
        assert address.startswith(start)
        assert urllib.request.urlopen(address, timeout=10).status == 200
