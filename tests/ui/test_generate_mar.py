"""The Generate tab with a MAR: which decodings it offers, previews of scattered tokens, and the label of relaxed."""

import asyncio
import json

import pytest
from PIL import Image

from studio.ui.app import build_app
from studio.ui.jobs.request import GenerateRequest
from studio.ui.render.preview import Sketch, partial_images
from studio.ui.server import models
from studio.ui.server.models import fitting_decodings
from studio.ui.tabs import generate

FIELDS = ["a red apple", 2, "7", "", "", "", ""]


@pytest.fixture
def mar(tiny_mar_pipeline, monkeypatch):
    """The app samples with the tiny MAR, called "tiny-mar"."""
    monkeypatch.setitem(models._pipelines, "tiny-mar", tiny_mar_pipeline)
    return tiny_mar_pipeline


def updates(show, *fields):
    async def collect():
        return [update async for update in show("tiny-mar", *fields)]

    return asyncio.run(collect())


def fields_of(model):
    return {c["props"].get("elem_id"): c["props"] for c in build_app(str(model)).config["components"]}


def test_decodings_that_fit_the_model_are_offered(tiny_mar_folder, tiny_folder, tmp_path, tiny_mar_class_pipeline):
    fields = fields_of(tiny_mar_folder)
    assert [name for _, name in fields["decoding"]["choices"]] == ["mar", "cspd"]
    assert fields["decoding"]["value"] == "mar"
    assert ["relaxed (approximate)", "relaxed"] in [list(choice) for choice in fields["cspd-mode"]["choices"]]
    names = [name for _, name in fields_of(tiny_folder)["decoding"]["choices"]]
    assert names == ["exact", "ar", "jacobi", "speculative", "lantern", "lantern++"]
    tiny_mar_class_pipeline.save_pretrained(tmp_path)
    assert fitting_decodings(tmp_path) == ["mar"]


@pytest.mark.parametrize(
    ("decoding", "options"), [("mar", {"steps": "3"}), ("cspd", {"mode": "exact"}), ("cspd", {"mode": "relaxed"})]
)
def test_images_and_labels(mar, toasts, decoding, options):
    gallery, _, status = updates(generate.show_sampling, *FIELDS, decoding, options)[-1]
    is_relaxed = options.get("mode") == "relaxed"
    assert len(gallery["value"]) == 2 and "2 images in" in status
    assert ("approximate" in status) == is_relaxed and ("drafts accepted" in status) == (decoding == "cspd")
    record = json.loads(Image.open(gallery["value"][0][0]).info["studio"])["call"]
    assert record["decoding"].get("approximate", False) == is_relaxed
    assert any("not validated" in toast for toast in toasts) == is_relaxed


def test_relaxed_is_approximate_in_a_race(mar, toasts):
    _, lanes, status = updates(generate.show_side_by_side, *FIELDS, "cspd", {"mode": "relaxed"})[-1]
    assert "Continuous speculative, approximate" in lanes and "Masked autoregressive" in lanes
    assert "plain" in status


def test_plain_decoding_races_against_the_next_that_fits(mar, toasts):
    _, lanes, _ = updates(generate.show_side_by_side, *FIELDS, "mar", {})[-1]
    assert "Continuous speculative" in lanes and not toasts


@pytest.mark.parametrize(
    ("fields", "word"),
    [([*FIELDS, "speculative", {}], "not Speculative"), ([*FIELDS[:5], "5", "", "mar", {}], "no top_k")],
)
def test_what_does_not_fit_is_refused_by_name(mar, toasts, fields, word):
    updates(generate.show_sampling, *fields)
    assert len(toasts) == 1 and word in toasts[0]


def test_what_is_not_sampled_yet_is_transparent(mar):
    import torch

    known = torch.zeros(1, 16, dtype=torch.bool)
    known[0, [0, 6]] = True
    sketch = Sketch(torch.zeros(1, 16, 3), known)
    [image] = partial_images(mar, sketch)
    alpha = image.getchannel("A")
    assert sketch.sampled == 2 and sketch.positions == {0, 6}
    assert (alpha.getpixel((0, 0)), alpha.getpixel((9, 5)), alpha.getpixel((5, 5))) == (255, 255, 0)


def test_wishes_carry_how_they_are_sampled():
    request = GenerateRequest("tiny-mar", "x", decoding="cspd", options={"mode": "relaxed"})
    assert request.how == {"name": "cspd", "mode": "relaxed", "approximate": True} and request.plain == "mar"
    assert request.title == "Continuous speculative, approximate"
    assert GenerateRequest("tiny", "x", decoding="lantern").plain == "ar"
