"""Where the app listens: IPv6 addresses as well as others."""

import socket
import urllib.request

import gradio as gr
import pytest

from studio.ui import app


@pytest.mark.parametrize(("host", "url"), [("::1", "http://[::1]:{}/"), ("127.0.0.1", "http://127.0.0.1:{}/")])
def test_the_app_answers_where_it_was_told_to_listen(host, url, monkeypatch):
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as server:
        port = server.getsockname()[1]
    with gr.Blocks() as page:
        pass
    monkeypatch.setattr(app, "build_app", lambda model, places: page)
    try:
        _, local, _ = app.launch(host, port, prevent_thread_lock=True, quiet=True)
        assert local == url.format(port)
        assert urllib.request.urlopen(local, timeout=10).status == 200
    finally:
        page.close()
