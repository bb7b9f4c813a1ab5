"""`client.images.edit` of the real `openai` client, against a running server with tiny random models."""

import base64
import json
from io import BytesIO

import httpx
import numpy as np
import openai
import pytest
import torch
from PIL import Image

from studio.ui.server import worker
from studio.ui.server.rate_limits import RateLimiter, Rates

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
HIDDEN = np.zeros((24, 32), dtype=bool)
HIDDEN[6:18, 4:20] = True


@pytest.fixture(scope="module")
def server(serve_api, tiny_mar_pipeline):
    return serve_api(**{"emoji-mar": tiny_mar_pipeline})


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server}v1", api_key="none", max_retries=0) as found:
        yield found


def png(pixels, hidden=None, **settings):
    """A file of pixels (H, W, 3), fully transparent where `hidden` (H, W) is true."""
    image = Image.fromarray(pixels)
    if hidden is not None:
        image.putalpha(Image.fromarray(np.where(hidden, 0, 255).astype(np.uint8)))
    file = BytesIO()
    image.save(file, "PNG", **settings)
    return ("image.png", file.getvalue(), "image/png")


def mask(hidden=HIDDEN):
    return png(np.zeros((*hidden.shape, 3), np.uint8), hidden)


def opened(data):
    return Image.open(BytesIO(base64.b64decode(data)))


@pytest.mark.parametrize("model", ["tiny", "emoji-mar"])
def test_transparent_pixels_of_the_mask_are_redrawn(client, tiny_pipeline, tiny_mar_pipeline, model):
    own = {"seed": 5, "guidance_scale": 2.0, "strength": 0.9}
    found = client.images.edit(
        image=png(PIXELS), mask=mask(), prompt="a red apple", model=model, n=2, size="32x24", user="u1", extra_body=own
    )
    pipe = {"tiny": tiny_pipeline, "emoji-mar": tiny_mar_pipeline}[model]
    assert found.size == "32x24" and [each.seed for each in found.data] == [5, 6]
    assert found.studio["approximate"] == (model == "tiny") and found.studio["tokens"] > 0
    for seed, each in zip((5, 6), found.data):
        image = opened(each.b64_json)
        assert np.array_equal(np.asarray(image)[~HIDDEN], PIXELS[~HIDDEN])
        alone = pipe(
            "a red apple", image=Image.fromarray(PIXELS), mask_image=HIDDEN, strength=0.9, guidance_scale=2.0,
            generator=torch.Generator().manual_seed(seed),
        ).images[0]  # fmt: skip
        assert np.array_equal(image, alone) and not np.array_equal(np.asarray(image)[HIDDEN], PIXELS[HIDDEN])
        record = json.loads(image.info["studio"])
        assert record["seed"] == seed and record["call"]["edit"] == {"strength": 0.9, "mask": True}


def test_without_a_mask_the_transparent_pixels_of_the_image_are_redrawn(client):
    both = client.images.edit(image=png(PIXELS), mask=mask(), prompt="a pear", extra_body={"seed": 1}).data[0]
    noise = PIXELS.copy()
    noise[HIDDEN] = 7  # what is under transparency does not matter
    alone = client.images.edit(image=[png(noise, HIDDEN)], prompt="a pear", extra_body={"seed": 1}).data[0]
    assert both.b64_json == alone.b64_json


def test_a_photo_and_its_mask_are_turned_alike(client):
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = np.rot90(PIXELS, -1)
    [found] = client.images.edit(image=png(PIXELS, HIDDEN, exif=exif), prompt="a pear", extra_body={"seed": 1}).data
    image = np.asarray(opened(found.b64_json))
    assert np.array_equal(image[~np.rot90(HIDDEN, -1)], turned[~np.rot90(HIDDEN, -1)])


def test_a_strength_without_mask_is_a_variation(client):
    own = {"strength": 0.5, "seed": 3, "num_inference_steps": 3, "decoding": "mar"}
    [found] = client.images.edit(
        image=png(PIXELS), prompt="a pear", model="emoji-mar", output_format="webp", output_compression=80,
        extra_body=own,
    ).data  # fmt: skip
    assert opened(found.b64_json).format == "WEBP" and opened(found.b64_json).size == (32, 24)


def test_answers_are_addresses_or_events(client, server):
    [found] = client.images.edit(image=png(PIXELS), mask=mask(), prompt="a pear", response_format="url").data
    assert found.url.startswith(server) and Image.open(BytesIO(httpx.get(found.url).content)).size == (32, 24)
    events = list(client.images.edit(image=png(PIXELS), mask=mask(), prompt="a pear", n=2, stream=True))
    assert [each.type for each in events] == ["image_edit.completed"] * 2
    assert all(opened(each.b64_json).size == (32, 24) for each in events)


@pytest.mark.parametrize(
    ("given", "param", "word"),
    [
        ({"mask": png(PIXELS)}, "mask", "no pixel is fully transparent"),
        ({"mask": mask(~HIDDEN | True)}, "mask", "nothing would stay"),
        ({"mask": mask(HIDDEN[:12])}, "mask", "32x12 pixels and the image 32x24"),
        ({"mask": b"no image"}, "mask", "The mask is not an image"),
        ({"mask": openai.omit}, "image", "no pixel is fully transparent"),
        ({"mask": openai.omit, "image": png(PIXELS, ~HIDDEN | True)}, "image", "nothing would stay"),
        ({"image": b"no image"}, "image", "The image is not an image"),
        ({"image": png(np.zeros((100, 51, 3), np.uint8))}, "image", "at most 5000"),
        ({"image": png(np.zeros((4, 4, 3), np.uint8))}, "image", "at least 8"),
        ({"image": [png(PIXELS), png(PIXELS)]}, "image", "give it once"),
        ({"size": "1024x1024"}, "size", "32x24"),
        ({"n": 4}, "n", "from 1 to 3, not 4"),
        ({"prompt": "a" * 41}, "prompt", "at most 40"),
        ({"prompt": " "}, "prompt", "prompt is empty"),
        ({"background": "transparent"}, "background", "Unsupported parameter"),
        ({"input_fidelity": "high"}, "input_fidelity", "outside the mask"),
        ({"quality": "high"}, "quality", "quality"),
        ({"partial_images": 2, "stream": True}, "partial_images", "finished images only"),
        ({"output_compression": 50}, "output_compression", "PNG loses nothing"),
        ({"extra_body": {"colour": "red"}}, "colour", "Unknown parameter: 'colour'"),
        ({"extra_body": {"strength": 0}}, "strength", "above 0"),
        ({"extra_body": {"strength": "half"}}, "strength", "number"),
        ({"extra_body": {"seed": 1.5}}, "seed", "integer"),
        ({"extra_body": {"padding_mask_crop": -1}}, "padding_mask_crop", "0"),
        (
            {"mask": openai.omit, "extra_body": {"strength": 0.5, "padding_mask_crop": 4}},
            "padding_mask_crop",
            "belongs to a mask",
        ),
        ({"extra_body": {"num_inference_steps": 4}}, "num_inference_steps", "the option steps"),
        ({"extra_body": {"decoding": "distilled"}}, None, "needs a student"),
        ({"extra_body": {"decoding": "lantern", "k": 8}}, None, "relaxed test"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(client, given, param, word):
    with pytest.raises(openai.BadRequestError) as found:
        client.images.edit(**{"image": png(PIXELS), "mask": mask(), "prompt": "a pear", **given})
    error = found.value
    assert error.type == "invalid_request_error" and error.code and error.request_id
    assert (error.param, word in str(error)) == (param, True), str(error)


def test_forms_that_no_client_sends(server):
    def refused(**form):
        answer = httpx.post(f"{server}v1/images/edits", **form)
        assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error"
        return answer.json()["error"]

    image = {"image": png(PIXELS), "mask": mask()}
    assert refused(files=image, data={"prompt": ["a pear", "a fox"]})["param"] == "prompt"
    assert refused(files=image)["param"] == "prompt"
    assert refused(data={"prompt": "a pear"}, files={"mask": mask()})["param"] == "image"
    assert refused(data={"prompt": "a pear", "image": "text"}, files={"mask": mask()})["param"] == "image"
    assert refused(data={"prompt": "a pear", "image": "text"}, files={"mask": mask()})["message"].endswith("not text.")
    for form in ({"json": {"prompt": "a pear"}}, {"data": {"prompt": "a pear"}}, {}):
        assert refused(**form)["message"] == "This endpoint takes a form: send multipart/form-data."
    broken = {"content-type": "multipart/form-data; boundary=x"}
    assert "multipart" in refused(content=b"garbage", headers=broken)["message"]


def test_bodies_and_rates_are_bounded(client, monkeypatch):
    with pytest.raises(openai.APIStatusError) as found:
        client.images.edit(image=("large.png", b"a" * 30_000_000), prompt="a pear")
    assert (found.value.status_code, found.value.code) == (413, "request_too_large")
    assert "give a smaller image, of at most 0.1 MB" in str(found.value)
    monkeypatch.setattr(worker, "_rates", RateLimiter(Rates(images=3)))
    client.images.edit(image=png(PIXELS), mask=mask(), prompt="a pear", n=2)
    with pytest.raises(openai.RateLimitError, match="3 images a minute"):
        client.images.edit(image=png(PIXELS), mask=mask(), prompt="a pear", n=2)


def test_edits_are_counted_and_described(client, server):
    client.images.edit(image=png(PIXELS), mask=mask(), prompt="a pear")
    text = httpx.get(f"{server}metrics").text
    assert 'studio_requests_total{endpoint="/v1/images/edits",status="200"}' in text
    described = httpx.get(f"{server}openapi.json").json()
    assert "multipart/form-data" in described["paths"]["/v1/images/edits"]["post"]["requestBody"]["content"]
    fields = described["components"]["schemas"]["EditForm"]["properties"]
    assert {"image", "mask", "strength", "guidance_scale", "window"} <= set(fields)
