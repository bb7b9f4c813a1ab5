"""The Generate tab with an RQ-Transformer: its decoding, images, and previews of the cells that are sampled."""

import asyncio

import numpy as np
import pytest

from studio.ui.jobs.generate_job import Call
from studio.ui.jobs.request import GenerateRequest
from studio.ui.render.preview import partial_images
from studio.ui.server import models
from studio.ui.server.models import fitting_decodings, own_settings
from studio.ui.tabs import generate


@pytest.fixture
def rq(tiny_rq_pipeline, monkeypatch):
    """The app samples with the tiny RQ-Transformer, called "tiny-rq"."""
    monkeypatch.setitem(models._pipelines, "tiny-rq", tiny_rq_pipeline)
    return tiny_rq_pipeline


def test_its_decoding_is_offered(tiny_rq_folder):
    assert fitting_decodings(tiny_rq_folder) == ["rq"]
    assert own_settings(tiny_rq_folder) == {"guidance": "3", "temperature": "1", "top-k": "0", "top-p": "1"}


def test_images(rq, toasts):
    async def collect():
        fields = ["a red apple", 2, "7", "", "", "", "0.9", "rq", {}]
        return [update async for update in generate.show_sampling("tiny-rq", *fields)]

    gallery, _, status = asyncio.run(collect())[-1]
    assert len(gallery["value"]) == 2 and "2 images in" in status and not toasts


def test_previews_show_the_cells_that_are_sampled(rq):
    seen = []

    def look(sketch):
        [image] = partial_images(rq, sketch)
        seen.append((sketch.sampled, int((np.asarray(image)[..., 3] == 255).sum())))

    Call(rq, GenerateRequest("tiny-rq", "a red apple", count=1, seed=0, decoding="rq"))(look)
    assert seen == [(cells, 16 * cells) for cells in range(1, 17)]
