"""A model is chosen on the page: what follows from it, classes, memory, and that requests of others stay apart."""

import asyncio
import base64
import json
import shutil
import threading
from io import BytesIO
from types import SimpleNamespace

import gradio as gr
import numpy as np
import openai
import pytest
import torch
from gradio.context import LocalContext
from PIL import Image

from studio import StudioError
from studio.checkpoints import published
from studio.checkpoints.bundled import bundled_names
from studio.ui.app import build_app
from studio.ui.jobs.generate_job import Sampled, sample
from studio.ui.jobs.request import GenerateRequest
from studio.ui.server import limits, models, worker
from studio.ui.server.limits import Limits
from studio.ui.server.models import Device
from studio.ui.server.options import devices_of, prepare
from studio.ui.server.scheduler import QueueLimits
from studio.ui.server.worker import DeviceWorker
from studio.ui.tabs import generate

FIELDS = ["left from before", 2, "7", "", "", "", "", "ar", {}]
LIMIT = 30  # seconds


@pytest.fixture
def classes(tiny_class_pipeline, monkeypatch):
    """The app has loaded the tiny class-conditional pipeline, called "classes"."""
    monkeypatch.setitem(models._pipelines, "classes", tiny_class_pipeline)
    return tiny_class_pipeline


@pytest.fixture(scope="module")
def form():
    """That of the page for the bundled model."""
    found = []
    build_tab = generate.build_tab
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "build_tab", lambda model: found.append(build_tab(model)) or found[-1])
        build_app("emoji-ar")
    return found[0][1]


def named(updates):
    """Updates by the elem_id of their component."""
    return {field.elem_id: update for field, update in updates.items()}


def sampled(*values):
    async def collect():
        return [update async for update in generate.show_sampling(*values)]

    return asyncio.run(collect())


def pixels(pipe, label, seeds=(7, 8)):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return [np.asarray(image) for image in pipe(class_labels=[label] * len(seeds), generator=generators).images]


def test_decodings_settings_examples_and_help_follow_the_model(form):
    found = named(form.choose("emoji-mar", "lantern"))
    assert [name for _, name in found["decoding"]["choices"]] == ["mar", "cspd"] and found["decoding"]["value"] == "mar"
    assert found["guidance"]["placeholder"] == models.own_settings("emoji-mar")["guidance"]
    assert found["top-k"]["placeholder"] == "model's own" and "MAR" in found["model"]["info"]
    assert found["prompt"]["visible"] and not found["class-label"]["visible"]
    assert ["a red apple"] in found["examples"]["samples"]
    again = named(form.choose("emoji-1d-ar", "jacobi"))
    assert again["decoding"]["value"] == "jacobi"  # it fits there, too


@pytest.mark.parametrize("name", bundled_names("pipeline"))
def test_examples_of_every_bundled_pipeline_are_what_it_knows(name):
    known = models.known_concepts(name)
    assert "red apple" in known and known == models.known_concepts("emoji-ar")


def test_a_class_conditional_model_shows_its_classes(form, tiny_class_folder):
    found = named(form.choose(str(tiny_class_folder), "ar"))
    assert not found["prompt"]["visible"] and found["class-label"]["visible"]
    assert (
        found["class-label"]["choices"][3] == ("golden retriever · 3", 3) and len(found["class-label"]["choices"]) == 10
    )
    assert found["examples"]["samples"] == [["golden retriever"], ["tabby"]]
    assert found["model"]["info"] == "A LlamaGen of 10 classes."
    fields = {c["props"].get("elem_id"): c["props"] for c in build_app(str(tiny_class_folder)).config["components"]}
    assert fields["class-label"]["visible"] and not fields["prompt"]["visible"]


@pytest.mark.parametrize(("sample", "model", "update"), [
    ("a fox", "emoji-ar", ("a fox", gr.skip())), ("Golden Retriever", "classes", (gr.skip(), 3)),
])  # fmt: skip
def test_an_example_fills_the_field_that_is_shown(classes, sample, model, update):
    assert generate._example([sample], model) == update


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ("emoji-arr", "did you mean emoji-ar"),
        ("/nowhere", "no model or folder"),
        ("", "Choose a model first"),
        (None, "must be text"),
        (["emoji-ar"], "must be text"),
    ],
)
def test_a_model_that_is_not_there_changes_nothing(form, toasts, model, sentence):
    assert generate.choose_model(form, model, "ar") == {} and sentence in toasts[0]
    [*_, last] = sampled(model, *FIELDS)
    assert "unchanged" in last[2] and sentence in toasts[1]


def test_a_folder_without_a_pipeline_is_refused(form, toasts, tiny_vq, tmp_path):
    tiny_vq.save_pretrained(tmp_path)
    assert generate.choose_model(form, str(tmp_path), "ar") == {} and "cannot sample" in toasts[0]


def test_a_server_lets_nobody_type_a_folder(monkeypatch, form, toasts, tiny_folder):
    def model_fields():
        found = {c["props"].get("elem_id"): c["props"] for c in build_app("emoji-ar").config["components"]}
        return [found[name] for name in ("model", "edit-model")]

    assert all(field["allow_custom_value"] for field in model_fields())
    monkeypatch.setattr(limits, "_limits", Limits(models={"emoji-ar": "emoji-ar", "emoji-mar": "emoji-mar"}))
    for field in model_fields():
        assert not field["allow_custom_value"] and [name for _, name in field["choices"]] == ["emoji-ar", "emoji-mar"]
    assert generate.choose_model(form, str(tiny_folder), "ar") == {} and "This server offers emoji-ar" in toasts[0]


def test_a_class_is_sampled_as_the_pipeline_samples_it(classes, toasts):
    gallery, _, status = sampled("classes", *FIELDS, 3)[-1]
    assert "2 images in" in status and "class_label=3" in status and not toasts
    for (path, caption), expected in zip(gallery["value"], pixels(classes, 3), strict=True):
        assert np.array_equal(np.asarray(Image.open(path)), expected) and caption.endswith("· golden retriever")
        assert path.endswith(("golden-retriever-7.png", "golden-retriever-8.png"))
    call = json.loads(Image.open(path).info["studio"])["call"]
    assert (call["model"], call["prompt"], call["class_label"]) == ("classes", None, 3)


@pytest.mark.parametrize(("label", "sentence"), [("", "choose a class"), (10, "from 0 to 9"), ("unicorn", "no class")])
def test_a_class_that_is_not_there_is_a_toast(classes, toasts, label, sentence):
    assert "unchanged" in sampled("classes", *FIELDS, label)[-1][2] and sentence in toasts[0]


def test_programs_choose_a_model_and_a_class(client, classes):
    for asked in ({"class_label": "Golden Retriever"}, {"class_label": 3}, {"prompt": "golden retriever"}):
        given = {"prompt": "", **asked}
        [found], details = client.predict(**given, count=1, seed=7, model="classes", api_name="/generate")
        assert np.array_equal(np.asarray(Image.open(found["image"])), pixels(classes, 3)[0]) and details["seeds"] == [7]
    with pytest.raises(Exception, match="text-conditional"):
        client.predict("a red apple", class_label=3, api_name="/generate")
    with pytest.raises(Exception, match="no model or folder"):
        client.predict("a red apple", model="/nowhere", api_name="/generate")


@pytest.mark.parametrize("continuous", [False, True])
def test_requests_for_other_models_stay_apart(tiny_pipeline, classes, monkeypatch, continuous):
    batches = QueueLimits(max_batch=8, continuous=continuous)
    monkeypatch.setattr(worker, "_workers", [DeviceWorker(Device(), batches)])
    monkeypatch.setitem(models._pipelines, "tiny", tiny_pipeline)
    requests = [
        GenerateRequest("classes", "", 1, 7, decoding="ar", class_label=3),
        GenerateRequest("tiny", "a red apple", 1, 7, decoding="ar"),
        GenerateRequest("classes", "", 2, 20, decoding="ar", class_label="goldfish"),
        GenerateRequest("tiny", "a blue sky", 1, 30, decoding="ar"),
    ]
    gate = threading.Event()
    worker._workers[0]._thread.submit(gate.wait, LIMIT)

    async def one(user, request):
        LocalContext.request.set(SimpleNamespace(session_hash=user))
        return [news async for news in sample(request)][-1]

    async def scenario():
        tasks = [asyncio.create_task(one(f"user {number}", each)) for number, each in enumerate(requests)]
        await asyncio.sleep(0.05)
        gate.set()
        return await asyncio.wait_for(asyncio.gather(*tasks), LIMIT)

    for request, found in zip(requests, asyncio.run(scenario())):
        assert isinstance(found, Sampled)
        pipe = models._pipelines[request.model]
        name, subject = (
            ("prompt", request.prompt) if request.class_label is None else ("class_labels", request.class_label)
        )
        for seed, image in zip(request.seeds, found.images, strict=True):
            generator = torch.Generator().manual_seed(seed)
            expected = pipe(**{name: subject}, generator=generator).images[0]
            assert abs(np.asarray(image).astype(int) - np.asarray(expected)).max() <= 1
        assert json.loads(found.images[0].info["studio"])["call"]["model"] == request.model


def test_loaded_pipelines_fill_a_part_of_the_memory(tiny_pipeline, tiny_folder, monkeypatch):
    size = models._size_of(tiny_pipeline)
    monkeypatch.setattr(models, "_pipelines", {})
    monkeypatch.setattr("studio.load", lambda name: tiny_pipeline, raising=False)
    monkeypatch.setattr(models, "_memory", lambda device: 2.5 * size)
    for name in ("a", "b", "a", "c"):
        models.get_pipeline(name)
    assert list(models._pipelines) == ["a", "c"]
    stored = sum(file.stat().st_size for file in tiny_folder.rglob("*.safetensors"))
    monkeypatch.setattr(models, "_memory", lambda device: stored - 1)
    with pytest.raises(StudioError, match="does not fit: its weights are"):
        models.get_pipeline(str(tiny_folder))
    assert list(models._pipelines) == ["a", "c"]
    monkeypatch.setattr(models, "_memory", lambda device: stored)
    assert models.get_pipeline(str(tiny_folder)) is tiny_pipeline and list(models._pipelines) == [str(tiny_folder)]


def test_half_of_the_memory_of_this_machine_is_for_pipelines():
    import os

    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert models._memory(Device("cpu")) == whole / 2


def test_a_server_offers_what_was_pulled_and_fetches_nothing(tiny_folder, tiny_pipeline, tmp_path, monkeypatch):
    monkeypatch.setenv("STUDIO_CACHE", str(tmp_path))
    monkeypatch.setattr(limits, "_limits", Limits())
    monkeypatch.setattr(worker, "_workers", [])
    monkeypatch.setitem(models._pipelines, "tiny", tiny_pipeline)
    folder = published.pulled_folder("llamagen-b-256")
    shutil.copytree(tiny_folder, folder)
    (folder / published.PULLED_FILE).write_text("{}")
    prepare("tiny", devices_of(None, None), QueueLimits(), Limits())
    assert limits.source_of("llamagen-b-256") == str(folder) and not limits.is_offered("llamagen-l-256")
    assert "llamagen-b-256" in models.offered_pipelines("tiny")
    assert models.about_model("llamagen-b-256").startswith("LlamaGen B, ImageNet classes")
    assert models.own_settings("llamagen-b-256")["guidance"] == "4"
    shutil.rmtree(folder)
    with pytest.raises(StudioError, match="no model or folder|no folder here"):
        models.get_pipeline("llamagen-b-256")


def test_a_prompt_of_the_api_names_a_class(serve_api, tiny_class_pipeline):
    url = serve_api(**{"emoji-mar": tiny_class_pipeline})
    with openai.OpenAI(base_url=f"{url}v1", api_key="none", max_retries=0) as client:
        own = {"seed": 7, "decoding": "ar"}
        for prompt in ("golden retriever", "3"):
            found = client.images.generate(prompt=prompt, model="emoji-mar", extra_body=own)
            image = Image.open(BytesIO(base64.b64decode(found.data[0].b64_json)))
            assert np.array_equal(np.asarray(image), pixels(tiny_class_pipeline, 3)[0])
            assert found.usage.input_tokens == 0
        with pytest.raises(openai.BadRequestError, match="did you mean golden retriever"):
            client.images.generate(prompt="goldn retriever", model="emoji-mar", extra_body=own)
