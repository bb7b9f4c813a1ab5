import asyncio
import json
import re
import runpy
import socket
import time
import warnings
from pathlib import Path

import gradio as gr
import pytest
from PIL import Image

from studio import DECODINGS, StudioError
from studio.ui.app import build_app, launch, launch_settings
from studio.ui.jobs.request import GenerateRequest
from studio.ui.server import limits, models
from studio.ui.tabs import generate

FIELDS = ["a red apple", 2, "7", "", "", "", ""]
LIMIT = 60  # seconds


def updates(*fields):
    async def collect():
        return [update async for update in generate.show_sampling("tiny", *fields)]

    return asyncio.run(collect())


def test_images_grow_and_end_as_the_pipeline_samples_them(steps, tiny_pipeline):
    found = updates(*FIELDS)
    galleries = [update[0]["value"] for update in found if "value" in update[0]]
    assert len(galleries) >= 2
    preview, final = galleries[0][0][0], [path for path, _ in galleries[-1]]
    assert preview.mode == "RGBA"
    assert preview.getchannel("A").getextrema() == (0, 255)
    expected = GenerateRequest("tiny", "a red apple", 2, 7)
    again = tiny_pipeline("a red apple", num_images_per_prompt=2, generator=_generators(expected.seeds)).images
    assert [Image.open(path).tobytes() for path in final] == [image.tobytes() for image in again]
    assert [Path(path).name for path in final] == ["a-red-apple-7.png", "a-red-apple-8.png"]


def test_finished_images_say_how_they_were_made(steps):
    (first, caption), _ = updates("a red apple", 2, "7", "2", "", "", "")[-1][0]["value"]
    record = json.loads(Image.open(first).info["studio"])
    assert record["seed"] == 7
    assert record["call"]["prompt"] == "a red apple"
    assert record["call"]["guidance_scale"] == 2.0
    assert caption == "seed 7 · a red apple"


def test_the_status_line_gives_speed_calls_and_seeds(steps):
    status = updates(*FIELDS)[-1][2]
    assert "2 images in" in status
    for label in ("tokens/s", "target calls", "seeds"):
        assert label in status
    assert "7 to 8" in status


def test_an_empty_seed_is_sampled_anew_each_time():
    assert len({GenerateRequest.from_fields("tiny", "x", 1, "", "", "", "", "").seed for _ in range(4)}) > 1


@pytest.mark.parametrize(
    ("position", "entry", "sentence"),
    [
        (0, "", "prompt is empty"),
        (0, "x" * 2001, "2001 characters"),
        (1, 17, "from 1 to 16"),
        (2, "-1", "seed must be a whole number from 0"),
        (2, "seven", "whole number"),
        (3, "nan", "finite"),
        (3, "much", "Guidance must be a number"),
        (4, "inf", "temperature"),
        (6, "2", "top_p"),
    ],
)
def test_wrong_input_is_a_toast_and_loses_nothing(steps, toasts, position, entry, sentence):
    fields = [*FIELDS]
    fields[position] = entry
    found = updates(*fields)
    assert len(toasts) == 1 and sentence in toasts[0]
    assert all(update[0] == gr.skip() for update in found)
    assert "unchanged" in found[-1][2]
    assert not steps


def test_options_of_a_decoding_are_numbers(steps, toasts):
    updates(*FIELDS, "lantern", {"delta": "much", "k": ""})
    assert toasts == ["Delta must be a number, not 'much'; or leave it empty."]
    updates(*FIELDS, "lantern", {"delta": "", "k": "1.5"})
    assert "whole number" in toasts[-1]
    updates(*FIELDS, "speculative", {"delta": "0.1"})
    assert toasts[-1] == "Speculative decoding takes drafts, guidance_schedule, not delta; delta belongs to lantern."
    updates(*FIELDS, "fast", {})
    assert "speculative" in toasts[-1] and not steps


@pytest.mark.parametrize(("decoding", "options"), [("speculative", {}), ("lantern", {"delta": "0.2", "k": "9"})])
def test_drafts_are_told_from_the_models_own_tokens(steps, decoding, options):
    gallery, tokens, status = updates("a red apple", 1, "7", "", "", "", "", decoding, options)[-1]
    assert "accepted drafts" in tokens and tokens.count("M") == 16
    record = json.loads(Image.open(gallery["value"][0][0]).info["studio"])
    assert record["call"]["decoding"]["name"] == decoding
    assert "tokens per call" in status


def test_every_decoding_is_offered_with_its_options(tmp_path):
    fields = {c["props"].get("elem_id"): c["props"] for c in build_app("tiny").config["components"]}
    assert [name for _, name in fields["decoding"]["choices"]] == list(DECODINGS)
    assert fields["lantern-delta"]["placeholder"] == "0.1"


def test_what_does_not_fit_a_model_is_refused_by_name(steps, toasts):
    found = updates(*FIELDS, "distilled", {})
    assert len(toasts) == 1 and "student" in toasts[0]
    assert "unchanged" in found[-1][2] and not steps


def test_unknown_words_are_named_and_sampled_all_the_same(steps, toasts, tiny_pipeline, monkeypatch):
    monkeypatch.setattr(tiny_pipeline, "vocabulary", (["a", "red", "apple"], ["red apple"]), raising=False)
    found = updates("a red aple", *FIELDS[1:])
    assert len(toasts) == 1 and "'aple'" in toasts[0] and "red apple" in toasts[0]
    assert "2 images in" in found[-1][2]


def test_closing_a_sampling_stops_the_model_within_one_step(steps):
    async def close_after_three_steps():
        sampled = generate.show_sampling("tiny", "a red apple", 1, "7", "1", "", "", "")
        async for _ in sampled:
            if len(steps) >= 3:
                break
        await sampled.aclose()
        return len(steps)

    at_cancel = asyncio.run(close_after_three_steps())
    time.sleep(0.2)
    assert 3 <= at_cancel < 10
    assert len(steps) <= at_cancel + 1


def test_a_sampling_waiting_for_the_model_never_starts_when_cancelled(steps):
    updates(*FIELDS)
    of_one = len(steps)
    steps.clear()

    async def cancel_the_second():
        first = asyncio.create_task(_drain(generate.show_sampling("tiny", *FIELDS)))
        await asyncio.sleep(0.05)
        second = asyncio.create_task(_drain(generate.show_sampling("tiny", *FIELDS)))
        await asyncio.sleep(0.05)
        second.cancel()
        return await first

    asyncio.run(cancel_the_second())
    assert len(steps) == of_one


def test_the_endpoint_is_documented(client):
    endpoints = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert list(endpoints) == ["/generate", "/edit", "/tokenize", "/detokenize", "/ask", "/compare"]
    names = [parameter["parameter_name"] for parameter in endpoints["/generate"]["parameters"]]
    assert names[:7] == ["prompt", "count", "seed", "guidance", "temperature", "top_k", "top_p"]
    assert names[7:] == ["decoding", "options", "model", "class_label"]
    assert "previews" in endpoints["/generate"]["description"]


def test_a_program_gets_lossless_images(client, tiny_pipeline):
    images, details = client.predict("a red apple", 2, 7, api_name="/generate")
    assert details["seeds"] == [7, 8] and details["target_calls"] == 16
    again = tiny_pipeline("a red apple", num_images_per_prompt=2, generator=_generators([7, 8])).images
    for found, expected in zip(images, again):
        image = Image.open(found["image"])
        assert image.format == "PNG"
        assert image.convert("RGB").tobytes() == expected.tobytes()
        assert json.loads(image.info["studio"])["call"]["prompt"] == "a red apple"


@pytest.mark.parametrize("steps", [0.3], indirect=True)
def test_a_program_sees_progress_and_can_cancel_within_one_step(client, steps):
    job = client.submit("a red apple", 1, 7, 1, api_name="/generate")
    deadline = time.monotonic() + LIMIT
    while len(steps) < 4 and time.monotonic() < deadline:
        time.sleep(0.002)
    job.cancel()
    at_cancel = len(steps)
    time.sleep(1.5)
    assert 4 <= at_cancel < 13
    assert len(steps) <= at_cancel + 2  # the request to cancel takes a moment of its own


def test_a_program_gets_a_mistake_as_an_error(client):
    with pytest.raises(Exception, match="from 1 to 16"):
        client.predict("a red apple", 99, api_name="/generate")


def test_a_program_gets_the_models_own_complaint(client):
    with pytest.raises(Exception, match="prompt is empty"):
        client.predict(" ", 1, api_name="/generate")


def test_building_the_app_loads_nothing_and_warns_of_nothing(monkeypatch):
    monkeypatch.setattr("studio.load", lambda *_, **__: pytest.fail("a model was loaded"), raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        app = build_app()
    assert app.delete_cache == (3600, 3600)
    assert not app.analytics_enabled
    heavy = [fn for fn in app.fns.values() if fn.concurrency_id == "gpu"]
    assert len(heavy) == 13 and all(fn.concurrency_limit == 1 for fn in heavy)


def test_the_app_reaches_no_network(steps, monkeypatch):
    asked = []
    resolve = socket.getaddrinfo
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *rest, **more: asked.append(host) or resolve(host, *rest, **more)
    )
    app = build_app("tiny")
    _, url, _ = app.launch(prevent_thread_lock=True, quiet=True, **launch_settings())
    app.close()
    assert set(asked) <= {"127.0.0.1", "localhost", b"127.0.0.1", "::1", None}
    css = launch_settings()["css_paths"][0].read_text()
    assert not re.search(r"https?://|@import", css)


def test_a_port_in_use_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(StudioError, match=f"{port}"):
            launch(port=port, quiet=True, prevent_thread_lock=True)


def test_the_space_entry_builds_the_app(repository):
    entry = runpy.run_path(str(repository / "app.py"))
    assert isinstance(entry["demo"], gr.Blocks)


def test_a_space_lets_nobody_name_a_folder(repository, monkeypatch):
    monkeypatch.setattr(limits, "_limits", limits.Limits())
    monkeypatch.setenv("SPACE_ID", "owner/name")
    entry = runpy.run_path(str(repository / "app.py"))
    fields = {c["props"].get("elem_id"): c["props"] for c in entry["demo"].config["components"]}
    assert fields["model"]["value"] == "emoji-ar" and not fields["model"]["allow_custom_value"]
    with pytest.raises(StudioError, match="This server offers emoji-ar"):
        limits.check_model("/etc")


def test_a_tokenizer_cannot_sample(tiny_vq, monkeypatch):
    monkeypatch.setattr("studio.load", lambda name: tiny_vq, raising=False)
    with pytest.raises(StudioError, match="cannot sample"):
        models.get_pipeline("emoji-vq")


async def _drain(updates):
    return [update async for update in updates]


def _generators(seeds):
    import torch

    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_empty_fields_show_the_models_own_settings(tiny_pipeline, tmp_path):
    from studio.ui.app import build_app
    from studio.ui.server.models import own_settings

    tiny_pipeline.save_pretrained(tmp_path)
    assert own_settings(tmp_path) == {"guidance": "4", "temperature": "1", "top-k": "0", "top-p": "1"}
    fields = {c["props"].get("elem_id"): c["props"] for c in build_app(str(tmp_path)).config["components"]}
    assert fields["guidance"]["placeholder"] == "4" and fields["top-k"]["placeholder"] == "0"
    assert own_settings("owner/on-the-hub") == {}
