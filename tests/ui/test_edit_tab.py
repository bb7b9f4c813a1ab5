"""The Edit tab: what the browser sends becomes an image and a mask, and results keep every other pixel."""

import asyncio
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from gradio_client import handle_file
from PIL import Image

from studio import StudioError
from studio.checkpoints import published
from studio.errors import Stopped
from studio.ui.jobs import edit_job
from studio.ui.jobs.edit_job import box_mask
from studio.ui.server import limits, models, worker
from studio.ui.server.models import Device
from studio.ui.server.rate_limits import RateLimiter, Rates
from studio.ui.tabs import edit

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)


@pytest.fixture
def files(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "image.png")
    paint = Image.new("RGBA", (32, 24))
    paint.paste((255, 0, 0, 150), (4, 6, 20, 18))
    paint.save(tmp_path / "paint.png")
    Image.new("RGBA", (32, 24)).save(tmp_path / "clear.png")
    return {name: {"path": str(tmp_path / f"{name}.png")} for name in ("image", "paint", "clear")}


def shown(value, *values):
    async def collect():
        return [update async for update in edit.show_redrawing(value, *values)]

    return asyncio.run(collect())


FIELDS = ["tiny", "a red apple", None, 2, "5", "", 1.0, "", "", "", "", ""]


def test_paint_is_redrawn_and_the_rest_stays(steps, files, toasts):
    pair, results, status = shown({"background": files["image"], "layers": [files["paint"]]}, *FIELDS)[-1]
    painted = np.zeros((24, 32), dtype=bool)
    painted[6:18, 4:20] = True
    assert "2 images in" in status and "on what comes before only" in status and not toasts
    for (path, caption), seed in zip(results["value"], (5, 6), strict=True):
        image = Image.open(path)
        found = np.asarray(image.convert("RGB"))
        assert caption == f"seed {seed}" and np.array_equal(found[~painted], PIXELS[~painted])
        assert not np.array_equal(found[painted], PIXELS[painted])
        record = json.loads(image.text["studio"])
        assert record["seed"] == seed and record["call"]["edit"] == {"strength": 1.0, "mask": True}
    assert pair[0].size == pair[1].size


def test_an_edit_that_nobody_waits_for_ends_at_its_next_step_without_an_image(steps, files, monkeypatch):
    decoded = []
    monkeypatch.setattr(models._pipelines["tiny"], "decode_tokens", lambda *given: decoded.append(given))
    request = edit_job.redraw_request(Image.fromarray(PIXELS), None, "tiny", "a pear", strength=0.5)
    job = SimpleNamespace(device=Device(), stopped=True, report=lambda item: None)
    with pytest.raises(Stopped):
        edit_job._redraw(request, job)
    assert len(steps) == 1 and not decoded


def test_sides_and_variations(steps, files):
    fields = [*FIELDS[:6], 1.0, "", "10", "", "", "4"]
    pair, _, _ = shown({"background": files["image"], "layers": [files["clear"]]}, *fields)[-1]
    assert pair[1].width * 28 == pair[1].height * 42
    *_, last = shown({"background": files["image"], "layers": []}, *FIELDS[:6], 0.5, *FIELDS[7:])
    assert "2 images in" in last[2]


@pytest.mark.parametrize(
    ("value", "fields", "sentence"),
    [
        (None, FIELDS, "Give an image first"),
        ({"background": None, "layers": []}, FIELDS, "Give an image first"),
        ("image", FIELDS, "Nothing is to be redrawn"),
        ("image", [*FIELDS[:8], "ten", *FIELDS[9:]], "Expand left must be a whole number"),
        ("image", [*FIELDS[:8], "-3", *FIELDS[9:]], "The pixels to add at the left"),
        ("image", [*FIELDS[:8], "4", *FIELDS[9:-4], *FIELDS[-3:]], "strength"),
        ("paint", [*FIELDS[:1], " ", *FIELDS[2:]], "prompt is empty"),
    ],
)  # fmt: skip
def test_mistakes_are_toasts(steps, files, toasts, value, fields, sentence):
    if isinstance(value, str):
        layers = [files["paint"]] if value == "paint" else []
        value = {"background": files["image"], "layers": layers}
    if sentence == "strength":
        fields = [*FIELDS[:6], 0.5, "", "4", "", "", ""]
        sentence = "leave it out where you expand"
    [(_, _, status), *_] = shown(value, *fields)[-1:]
    assert "did not work" in status and sentence in toasts[0], toasts


def test_the_images_of_an_edit_count_for_the_rate_of_its_client(steps, files, toasts, monkeypatch):
    value = {"background": files["image"], "layers": [files["paint"]]}
    monkeypatch.setattr(worker, "_rates", RateLimiter(Rates(images=2)))
    assert "2 images in" in shown(value, *FIELDS)[-1][2]
    shown(value, *FIELDS)
    shown(value, *FIELDS[:3], 3, *FIELDS[4:])
    assert "have asked for 2" in toasts[0] and "not 3 at once" in toasts[1]


def test_boxes():
    assert np.asarray(box_mask([2, 1, 3, 2], (8, 4))).nonzero()[1].tolist() == [2, 3, 4] * 2
    assert box_mask(None, (8, 4)) is None
    for box in ([1, 2, 3], "1,2,3,4", [0, 0, -1, 2], [0, 0, 1.5, 2]):
        with pytest.raises(StudioError, match="box"):
            box_mask(box, (8, 4))


def test_the_endpoint(client, files):
    given = {"image": handle_file(files["image"]["path"]), "prompt": "a red apple", "model": "tiny", "seed": 3}
    [found], details = client.predict(**given, box=[0, 0, 32, 12], api_name="/edit")
    assert details["size"] == [32, 24] and details["approximate"] is True and details["seeds"] == [3]
    assert np.array_equal(np.asarray(Image.open(found["image"]).convert("RGB"))[12:], PIXELS[12:])


def test_a_class_is_drawn_where_the_model_has_classes(steps, files, toasts, tiny_class_pipeline, monkeypatch):
    monkeypatch.setitem(models._pipelines, "classes", tiny_class_pipeline)
    value = {"background": files["image"], "layers": [files["paint"]]}
    _, results, status = shown(value, "classes", "left from before", 3, 1, *FIELDS[4:])[-1]
    record = json.loads(Image.open(results["value"][0][0]).text["studio"])
    assert record["call"]["class_label"] == 3 and record["call"]["prompt"] is None and "1 image in" in status
    shown(value, "classes", "left from before", None, 1, *FIELDS[4:])
    assert "choose a class" in toasts[0]


def test_models_to_choose_from(monkeypatch, tmp_path, tiny_folder):
    monkeypatch.setenv("STUDIO_CACHE", str(tmp_path))
    assert models.offered_pipelines("tiny")[0] == "tiny" and "emoji-mar" in models.offered_pipelines("tiny")
    folder = published.pulled_folder("llamagen-b-256")
    assert "llamagen-b-256" not in models.offered_pipelines("tiny")
    shutil.copytree(tiny_folder, folder)
    assert "llamagen-b-256" not in models.offered_pipelines("tiny")  # a pull that was cut off
    (folder / published.PULLED_FILE).write_text("{}")
    assert "llamagen-b-256" in models.offered_pipelines("tiny")
    monkeypatch.setattr(limits, "_limits", limits.Limits(models={"tiny": "tiny"}))
    assert models.offered_pipelines("tiny") == ["tiny"]
