"""The Generate tab with a ResGen: which decodings it offers, and previews of images of which only some codes are
there.
"""

import asyncio

import pytest
import torch

from studio.ui.jobs.generate_job import Call
from studio.ui.jobs.request import GenerateRequest
from studio.ui.render.preview import Sketch, partial_images
from studio.ui.server import models
from studio.ui.server.models import fitting_decodings, own_settings
from studio.ui.tabs import generate

FIELDS = ["a red apple", 2, "7", "", "", "", "0.9"]


@pytest.fixture
def resgen(tiny_resgen_pipeline, monkeypatch):
    """The app samples with the tiny ResGen, called "tiny-resgen"."""
    monkeypatch.setitem(models._pipelines, "tiny-resgen", tiny_resgen_pipeline)
    return tiny_resgen_pipeline


def updates(show, *fields):
    async def collect():
        return [update async for update in show("tiny-resgen", *fields)]

    return asyncio.run(collect())


def test_decodings_that_fit_the_model_are_offered(tiny_resgen_folder):
    assert fitting_decodings(tiny_resgen_folder) == ["resgen", "first-hitting"]
    assert own_settings(tiny_resgen_folder) == {"guidance": "3", "temperature": "1", "top-k": "0", "top-p": "1"}


@pytest.mark.parametrize(
    ("decoding", "options"),
    [("resgen", {"steps": "3", "confidence": "level"}), ("first-hitting", {"schedule": "arccos"})],
)
def test_images(resgen, toasts, decoding, options):
    gallery, _, status = updates(generate.show_sampling, *FIELDS, decoding, options)[-1]
    assert len(gallery["value"]) == 2 and "2 images in" in status and not toasts


def test_a_race_of_both_orders(resgen, toasts):
    _, lanes, status = updates(generate.show_side_by_side, *FIELDS, "first-hitting", {})[-1]
    assert "Most confident first" in lanes and "First hitting" in lanes and "plain" in status


def test_what_is_refused_becomes_a_toast(resgen, toasts):
    updates(generate.show_sampling, *FIELDS, "resgen", {"steps": "49"})
    assert len(toasts) == 1 and "48 codes" in toasts[0]


def test_progress_counts_codes_and_ends_whole(resgen):
    seen = []
    Call(resgen, GenerateRequest("tiny-resgen", "a red apple", count=1, seed=0, decoding="first-hitting"))(
        lambda sketch: seen.append((sketch.sampled, len(sketch.positions)))
    )
    assert len(seen) == 4 and seen[-1] == (16, 16)
    assert all(0 < sampled <= places for sampled, places in seen) and seen[0][0] < 16


def test_cells_without_a_code_are_transparent(resgen):
    tokens = torch.full((1, 16, 3), -1)
    tokens[0, 0], tokens[0, 6, 0] = 3, 5
    sketch = Sketch(tokens, (tokens >= 0).any(dim=2))
    [image] = partial_images(resgen, sketch)
    alpha = image.getchannel("A")
    assert sketch.sampled == 2 and sketch.positions == {0, 6}
    assert (alpha.getpixel((0, 0)), alpha.getpixel((9, 5)), alpha.getpixel((5, 5))) == (255, 255, 0)
