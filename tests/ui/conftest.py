"""Shared by the tests of the app: it samples and reads with tiny random models."""

import time
from contextlib import ExitStack

import gradio as gr
import pytest
from gradio_client import Client

from studio import LlamaGen, VisualQuestionPipeline
from studio.backends.cpu_c import NativeLlamaGen
from studio.backends.packed import PackedLlamaGen
from studio.pruning.quecc import Compressor
from studio.ui.app import build_app, launch_settings
from studio.ui.server import limits, models, worker
from studio.ui.server.limits import Limits
from studio.ui.server.options import devices_of, prepare
from studio.ui.server.rate_limits import RateLimiter
from studio.ui.server.run import running
from studio.ui.server.scheduler import QueueLimits


@pytest.fixture
def steps(tiny_pipeline, monkeypatch, request):
    """The app samples with the tiny pipeline; the list grows by one with each call of the transformer.

    A call lasts 60 ms, or as long as an indirect parameter says.
    """
    calls, seconds = [], getattr(request, "param", 0.06)
    for network in (LlamaGen, NativeLlamaGen, PackedLlamaGen):
        for name in ("prefill_states", "extend", "extend_tree"):
            monkeypatch.setattr(network, name, _counted(getattr(network, name), calls, seconds))
    monkeypatch.setitem(models._pipelines, "tiny", tiny_pipeline)
    return calls


@pytest.fixture
def reader(tiny_reader, monkeypatch):
    """The app reads with the tiny reader, called "tiny-reader"."""
    pipe = VisualQuestionPipeline(*tiny_reader)
    monkeypatch.setitem(models._readers, "tiny-reader", pipe)
    return pipe


@pytest.fixture
def toasts(monkeypatch):
    shown = []
    monkeypatch.setattr(gr, "Warning", lambda message, **_: shown.append(message))
    return shown


@pytest.fixture
def client(steps, reader):
    with running(build_app("tiny"), "127.0.0.1", 0, **launch_settings()) as url:
        yield Client(url, verbose=False)


@pytest.fixture(scope="module")
def address(tiny_pipeline, tiny_reader):
    """Where the tiny pipeline is served, within narrow limits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "_workers", [])
        patch.setattr(limits, "_limits", Limits())
        patch.setitem(models._pipelines, "tiny", tiny_pipeline)
        patch.setitem(models._readers, "tiny", VisualQuestionPipeline(*tiny_reader))
        patch.setitem(models._tokenizers, "tiny", tiny_pipeline.image_tokenizer)
        how = prepare("tiny", devices_of(None, None), QueueLimits(8, 2, 8), Limits(2, 40, 5000, 64))
        blocks = build_app(how.pop("model"), how.pop("places"))
        with running(blocks, "127.0.0.1", 0, upload_bytes=100_000, **how, **launch_settings()) as url:
            yield url


@pytest.fixture(scope="module")
def serve_api(tiny_pipeline, tiny_reader, tmp_path_factory):
    """`serve_api(keys, origins, **pipelines)` serves tiny models, "tiny" first, until the module ends: the address."""
    with ExitStack() as stack:

        def serve(keys=None, origins=(), **pipelines):
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            patch.setattr(worker, "_workers", [])
            patch.setattr(worker, "_rates", RateLimiter())
            patch.setattr(limits, "_limits", Limits())
            for name, pipe in {"tiny": tiny_pipeline, **pipelines}.items():
                patch.setitem(models._pipelines, name, pipe)
            compressor = Compressor.for_reader(tiny_reader[0], tokens=(1, 4)).eval()
            patch.setitem(models._readers, "emoji-vlm", VisualQuestionPipeline(*tiny_reader, compressor))
            how = prepare("tiny", devices_of(None, None), QueueLimits(8, 4, 8), Limits(3, 40, 5000, 64))
            blocks = build_app(how.pop("model"), how.pop("places"))
            settings = {"upload_bytes": 100_000, "folder": tmp_path_factory.mktemp("files"), **how, **launch_settings()}
            return stack.enter_context(running(blocks, "127.0.0.1", 0, keys=keys, origins=origins, **settings))

        yield serve


def _counted(method, calls, seconds):
    def counted(*args, **kwargs):
        calls.append(time.monotonic())
        time.sleep(seconds)
        return method(*args, **kwargs)

    return counted
