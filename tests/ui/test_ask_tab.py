"""The Ask tab: answers that grow, patches over the image, and every way to get it wrong."""

import asyncio
import functools
import re
import time

import gradio as gr
import numpy as np
import pytest
import torch
from gradio_client import handle_file
from PIL import Image

from studio import merging_methods
from studio.errors import StudioError
from studio.pruning.api import MERGING
from studio.pruning.patch_views import PatchView
from studio.pruning.quecc import Compressor
from studio.ui.jobs import ask_job
from studio.ui.render.render_answers import render_answers, verdict
from studio.ui.render.render_patches import render_patches
from studio.ui.server import models
from studio.ui.tabs import ask
from tests.pruning.tiny_families import tiny


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    path = tmp_path_factory.mktemp("scenes") / "scene.png"
    Image.effect_mandelbrot((192, 96), (-2, -1.5, 1, 1.5), 50).convert("RGB").save(path)
    return str(path)


def updates(scene, **changes):
    fields = {"model": "tiny-reader", "image": scene, "question": "how many", "method": "divprune", "keep": 0.2}
    fields |= {"compare": True, "tokens": 16, "merge": "", "numbers": "9", **changes}
    fields["image"] = fields["image"] and {"path": fields["image"]}

    async def collect():
        return [update async for update in ask.show_reading(*fields.values())]

    return asyncio.run(collect())


@pytest.fixture
def short(monkeypatch):
    """Answers of four tokens, slow enough to be seen growing."""
    monkeypatch.setattr(ask, "AskRequest", lambda *values, **more: _Inquiry(*values, **{"max_new_tokens": 4, **more}))


_Inquiry = ask.AskRequest


def test_both_answers_come_with_counts_and_clocks(reader, short, scene):
    found = updates(scene)
    _, cards, status = found[-1]
    assert cards.count('<section class="studio-answer done">') == 2
    whole = reader(Image.open(scene), "how many", max_new_tokens=4)
    kept = round(0.2 * whole.visual_tokens)
    assert f"{whole.visual_tokens} of {whole.visual_tokens} visual tokens" in cards
    assert f"{kept} of {whole.visual_tokens} visual tokens" in cards
    assert whole.answer in cards
    for phase in ("encode", "select", "prefill", "decode"):
        assert cards.count(f"<dt>{phase}</dt>") == 2
    assert "the answer is" in status


def test_the_answer_is_shown_while_it_grows(reader, short, scene, monkeypatch):
    forward = reader.model.forward

    @functools.wraps(forward)
    def slow(*args, **kwargs):
        time.sleep(0.1)
        return forward(*args, **kwargs)

    monkeypatch.setattr(reader.model, "forward", slow)
    found = [re.search('<p class="said">(.*?)</p>', cards) for _, cards, _ in updates(scene) if isinstance(cards, str)]
    words = [len(text[1].split()) for text in found]
    assert words == sorted(words) and {1, 2, 3, 4} <= set(words)


def test_patches_are_sampled_before_the_answer_is_there(reader, short, scene):
    found = updates(scene)
    galleries = [gallery["value"] for gallery, _, _ in found if "value" in gallery]
    (whole, whole_caption), (crops, crops_caption) = galleries[-1]
    assert len(galleries) == 1 and "of 144 patches" in whole_caption and crops_caption.startswith("Crops")
    assert whole.mode == "RGBA" and whole.size == (576, 288)
    assert whole.getchannel("A").getextrema() == (44, 255)


def test_one_run_where_nothing_is_to_compare(reader, short, scene):
    assert updates(scene, compare=False)[-1][1].count("<section") == 1
    assert updates(scene, keep=1)[-1][1].count("<section") == 1


def test_the_memory_of_an_image_is_kept_between_questions(reader, short, scene, monkeypatch):
    remember, made = reader.remember, []
    monkeypatch.setattr(reader, "remember", lambda *given, **more: made.append(more) or remember(*given, **more))
    galleries, cards, status = zip(*updates(scene, method="kv-coverage", keep=0.1, compare=False))
    assert "kv-coverage (KV cache), 10% of the tokens" in cards[-1] and "KiB" in cards[-1]
    whole = reader(Image.open(scene), "how many", max_new_tokens=1)
    assert f"{round(0.1 * whole.visual_tokens)} of {whole.visual_tokens} visual tokens" in cards[-1]
    assert not re.search(r"<dt>encode</dt><dd>0 ms", cards[-1])
    shown = [gallery["value"] for gallery in galleries if "value" in gallery]
    assert shown and shown[-1][0][1].startswith("Whole image")
    for question in ("what is at the left", "how many"):
        assert re.search(
            r"<dt>encode</dt><dd>0 ms", updates(scene, method="kv-coverage", keep=0.1, question=question)[-1][1]
        )
    memory = remember(Image.open(scene), method="coverage", keep=0.1)
    assert reader.ask(memory, "how many", max_new_tokens=4).answer in cards[-1]
    assert made == [{"method": "coverage", "keep": 0.1, "merge": 0}]
    updates(scene, method="kv-h2o", keep=0.1)
    assert len(made) == 2
    merged = {"method": "kv-coverage", "keep": 0.1, "compare": False, "merge": "tome", "numbers": "50"}
    for changes in ({}, {"question": "what is at the left"}, {"numbers": "40"}, {"merge": "diffrate"}):
        cards = updates(scene, **(merged | changes))[-1][1]
        assert "tokens in the tower" in cards
    assert [each["merge"] for each in made[2:]] == ["50", "40", "diffrate:50"]


# The tiny tower has two layers; its features are those of the first, in which all that goes does so.
@pytest.mark.parametrize(
    ("merge", "numbers", "call"),
    [("tome", " 50 ", "50"), ("diffrate", "40+9", "diffrate:40+9"), ("diffrate", "", "diffrate")],
)
@pytest.mark.parametrize("method", ["divprune", "vscan", "kv-coverage", "quecc"])
def test_tokens_are_merged_in_the_tower(compressing, short, scene, monkeypatch, merge, numbers, call, method):
    learned = {"diffrate": {"merged": [30], "pruned": [9], "rank": "likeness"}}
    monkeypatch.setattr(compressing.model.config, "pruning", learned, raising=False)
    galleries, cards, status = zip(*updates(scene, method=method, merge=merge, numbers=numbers, tokens=4))
    cards, status = cards[-1], status[-1]
    more = {"max_new_tokens": 4, "merge": call}
    if method == "kv-coverage":
        memory = compressing.remember(Image.open(scene), keep=0.2, merge=call)
        expected = compressing.ask(memory, "how many", max_new_tokens=4)
    else:
        how = {"tokens": 4} if method == "quecc" else {"prune": method}
        expected = compressing(Image.open(scene), "how many", **how, **more)
    gone = {"50": 50, "diffrate:40+9": 49, "diffrate": 39}[call]
    crops = expected.tower.patches // 144
    assert (expected.tower.patches, expected.tower.tokens) == (144 * crops, (144 - gone) * crops)
    first, second = cards.split("</section>")[:2]
    assert f", merge {call}</h3>" in first and expected.answer in first
    assert f"{expected.tower.patches} patches became {expected.tower.tokens} tokens in the tower" in first
    assert f"{expected.kept_tokens} of {expected.visual_tokens} visual tokens" in first
    shown = [gallery["value"] for gallery in galleries if "value" in gallery][-1]
    captions = [caption for _, caption in shown]
    assert method == "quecc" or captions[0].endswith(f"of 144 patches, {144 - gone} tokens in the tower")
    assert len(captions) == (0 if method == "quecc" else 2)
    assert "All tokens</h3>" in second and "in the tower" not in second and "the answer is" in status


def test_what_is_merged_alone_is_compared_too(reader, short, scene):
    cards = updates(scene, keep=1, merge="tome")[-1][1]
    whole = reader(Image.open(scene), "how many", max_new_tokens=1)
    assert cards.count("<section") == 2 and "<h3>All tokens, merge 9</h3>" in cards
    assert cards.count(f"{whole.visual_tokens} of {whole.visual_tokens} visual tokens") == 2


@pytest.mark.parametrize(
    ("merge", "numbers", "words"),
    [
        ("tome", "", "Tokens are merged as by 56,28,14"),
        ("tome", "half", "not 'half'"),
        ("tome", "145", "can lose 72"),
        ("tome", "1,1,1", "give 1 numbers"),
        ("tome", "diffrate", "tome takes numbers"),
        ("diffrate", "100+50", "can lose 143"),
        ("diffrate", None, "studio train diffrate"),
        ("average", "9", "tome, diffrate"),
        ("tome", "1," * 1000, "2000 characters"),
    ],
)
def test_what_cannot_be_merged_is_one_toast(reader, short, toasts, scene, merge, numbers, words):
    found = updates(scene, merge=merge, numbers=numbers)
    assert len(toasts) == 1 and words in toasts[0], toasts
    assert found[-1][0] == gr.skip() and "unchanged" in found[-1][2]


def test_a_family_whose_tower_merges_nothing_is_refused_before_it_answers(reader, short, toasts, scene, monkeypatch):
    monkeypatch.setattr(reader, "model", tiny("qwen2_5_vl").model)
    assert all(cards == gr.skip() for _, cards, _ in updates(scene, merge="tome"))
    assert len(toasts) == 1 and "Tokens inside the tower of this qwen2_5_vl model stay" in toasts[0]


def test_the_fields_of_merging_follow_the_method():
    assert list(merging_methods()) == list(MERGING)
    for method, value, is_shown in (("", "36,28,20", False), ("tome", "36,28,20", True), ("diffrate", "", True)):
        _, numbers = ask._show_numbers(method)
        assert (numbers["value"], numbers["visible"]) == (value, is_shown)


@pytest.fixture
def compressing(reader, monkeypatch):
    """The reader with a compressor to 1 or 4 tokens."""
    monkeypatch.setattr(reader, "compressor", Compressor.for_reader(reader.model, tokens=(1, 4)).eval())
    return reader


def test_tokens_are_made_for_the_question(compressing, short, scene):
    _, cards, status = updates(scene, method="quecc", tokens=4.0, keep=1)[-1]
    expected = compressing(Image.open(scene), "how many", tokens=4, max_new_tokens=4)
    assert "quecc (made for the question), 4 tokens" in cards and "the answer is" in status
    assert cards.count("<section") == 2 and expected.answer in cards
    assert f"4 of {expected.visual_tokens} visual tokens" in cards


@pytest.mark.parametrize(
    ("tokens", "words"), [(9, "to 1, 4 tokens, not to 9"), (0, "number of tokens"), (1.5, "number of tokens")]
)
def test_numbers_of_tokens_that_are_not_made_are_a_toast(compressing, short, toasts, scene, tokens, words):
    assert "unchanged" in updates(scene, method="quecc", tokens=tokens)[-1][2]
    assert len(toasts) == 1 and words in toasts[0]


def test_a_reader_without_a_compressor_makes_no_tokens(reader, short, toasts, scene):
    updates(scene, method="quecc")
    assert len(toasts) == 1 and "no compressor" in toasts[0]


def test_the_endpoint_takes_tokens_for_quecc_alone(compressing, scene):
    async def last(**given):
        fields = {"image": {"path": scene}, "question": "how many", "model": "tiny-reader", "keep": 0.2}
        return [each async for each in ask.answer_reading(**fields, max_new_tokens=4, **given)][-1]

    expected = compressing(Image.open(scene), "how many", tokens=4, max_new_tokens=4)
    answer, details = asyncio.run(last(method="quecc", tokens=4))
    assert answer == expected.answer
    assert (details["kept_tokens"], details["place"]) == (4, "made for the question")
    with pytest.raises(StudioError, match="is for quecc"):
        asyncio.run(last(method="divprune", tokens=4))
    with pytest.raises(StudioError, match="to 1, 4 tokens, not to 16"):
        asyncio.run(last(method="quecc"))


def test_few_memories_stay(reader, short, scene, monkeypatch):
    monkeypatch.setattr(ask_job, "_MOST_MEMORIES", 2)
    for keep in (0.1, 0.2, 0.3):
        updates(scene, method="kv-coverage", keep=keep, compare=False)
    assert [key[-1] for key in ask_job._memories[reader]] == [0.2, 0.3]
    monkeypatch.setattr(ask_job, "_MOST_BYTES", 0)
    updates(scene, method="kv-coverage", keep=0.2, compare=False)
    assert [key[-1] for key in ask_job._memories[reader]] == [0.2]


def test_text_of_a_model_is_never_markup(reader, short, scene, monkeypatch):
    monkeypatch.setattr(reader.processor.tokenizer, "decode", lambda *_, **__: "<img src=x onerror=alert(1)>")
    cards = updates(scene)[-1][1]
    assert "<img" not in cards and "&lt;img" in cards


def files(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "whole.png")
    (tmp_path / "notes.png").write_text("no image")
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    (tmp_path / "truncated.png").write_bytes((tmp_path / "noise.png").read_bytes()[:4000])
    Image.new("1", (10_000, 9_000)).save(tmp_path / "bomb.png")
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    Image.new("RGB", (20_000, 10)).save(tmp_path / "strip.png")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("notes.png", "notes.png is not an image"),
        ("truncated.png", "damaged"),
        ("bomb.png", "64 million"),
        ("dot.png", "at least 8"),
        ("strip.png", "100 times"),
        ("absent.png", "no image absent.png"),
    ],
)
def test_files_that_cannot_be_read_are_a_toast(reader, short, toasts, tmp_path, name, words):
    files(tmp_path)
    found = updates(str(tmp_path / name))
    assert len(toasts) == 1 and words in toasts[0] and str(tmp_path) not in toasts[0]
    assert found[-1][:2] == (gr.skip(), gr.skip()) and "unchanged" in found[-1][2]


@pytest.mark.parametrize("mode", ["CMYK", "I;16", "RGBA", "P", "LA"])
def test_files_of_every_kind_are_read(reader, short, toasts, tmp_path, mode):
    path = tmp_path / ("image.jpg" if mode == "CMYK" else "image.png")
    if mode == "I;16":
        Image.fromarray(np.linspace(0, 65535, 4096).astype(np.uint16).reshape(64, 64)).save(path)
    else:
        Image.new("RGB", (64, 64), "teal").convert(mode.replace("LA", "L")).convert(mode).save(path)
    assert "Answered" in updates(str(path), compare=False)[-1][2] and not toasts


def test_an_animation_is_read(reader, short, toasts, tmp_path):
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert "Answered" in updates(str(tmp_path / "moving.gif"), compare=False)[-1][2] and not toasts


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image": None}, "Give an image"),
        ({"question": " "}, "question is empty"),
        ({"question": "x" * 2001}, "2001 characters"),
        ({"model": None}, "Name a model"),
        ({"model": "nobody-has-this"}, "no model or folder"),
        ({"keep": 0}, "above 0 and at most 1"),
        ({"keep": 1.5}, "above 0 and at most 1"),
        ({"keep": "much"}, "above 0 and at most 1"),
        ({"method": "magic"}, "divprune"),
    ],
)
def test_wrong_input_is_a_toast_and_loses_nothing(reader, short, toasts, scene, changes, words):
    found = updates(scene, **changes)
    assert len(toasts) == 1 and words in toasts[0]
    assert found[-1][0] == gr.skip() and "unchanged" in found[-1][2]


def test_a_model_that_reads_no_images_is_refused(toasts, tiny_folder, scene):
    updates(scene, model=str(tiny_folder))
    updates(scene, model=str(tiny_folder / "text_encoder"))
    assert len(toasts) == 2 and all("reads no images" in toast for toast in toasts)


def test_a_folder_is_loaded_once_and_the_latest_stays(reader, short, toasts, scene, tiny_reader, tmp_path):
    for part in tiny_reader:
        part.save_pretrained(tmp_path)
    updates(scene, model=f" {tmp_path} ", compare=False)
    assert not toasts and list(models._readers) == [str(tmp_path)]


def test_closing_stops_the_model_within_one_token(reader, scene, monkeypatch):
    calls = []
    forward = reader.model.forward

    @functools.wraps(forward)
    def slow(*args, **kwargs):
        calls.append(1)
        time.sleep(0.05)
        return forward(*args, **kwargs)

    monkeypatch.setattr(reader.model, "forward", slow)

    async def close_after_a_while():
        asked = ask.show_reading("tiny-reader", {"path": scene}, "how many", "divprune", 0.2, True, 16, "", "")
        async for _ in asked:
            if len(calls) >= 4:
                break
        await asked.aclose()
        return len(calls)

    at_cancel = asyncio.run(close_after_a_while())
    time.sleep(0.4)
    assert 4 <= at_cancel < 12
    assert len(calls) <= at_cancel + 1


def test_without_a_reader_the_tab_says_what_to_do(monkeypatch):
    from studio.ui.app import build_app

    monkeypatch.setattr(ask, "bundled_models", lambda kind: [])
    fields = {c["props"].get("elem_id"): c["props"] for c in build_app("tiny").config["components"]}
    assert "studio train --preset emoji-vlm" in fields["ask-status"]["value"] and fields["reader"].get("value") is None
    monkeypatch.setattr(ask, "bundled_models", lambda kind: ["emoji-vlm"])
    fields = {c["props"].get("elem_id"): c["props"] for c in build_app("tiny").config["components"]}
    assert "studio train" not in fields["ask-status"]["value"] and fields["reader"]["value"] == "emoji-vlm"


def test_programs_ask_too(client, reader, scene):
    text, details = client.predict(handle_file(scene), "how many", "tiny-reader", "uniform", 0.1, 3, api_name="/ask")
    assert text and details["kept_tokens"] == round(0.1 * details["visual_tokens"])
    assert set(details["seconds"]) == {"encode", "select", "prefill", "decode"}
    assert details["place"] == "before the model" and details["cache_bytes"] > 0 and details["tower"] is None
    call = {"model": "tiny-reader", "method": None, "max_new_tokens": 3, "merge": "diffrate:40+9", "api_name": "/ask"}
    merged, details = client.predict(handle_file(scene), "how many", **call)
    expected = reader(Image.open(scene), "how many", merge="diffrate:40+9", max_new_tokens=3)
    assert (merged, details["place"]) == (expected.answer, "nowhere")
    assert details["tower"] == {"patches": expected.tower.patches, "tokens": expected.tower.tokens}
    with pytest.raises(Exception, match="above 0 and at most 1"):
        client.predict(handle_file(scene), "how many", "tiny-reader", "uniform", 7, 3, api_name="/ask")


def test_kept_patches_are_full_and_others_faint():
    image = Image.new("RGB", (480, 240), "teal")
    kept = torch.tensor([[True, False], [False, False]])
    alpha = np.asarray(render_patches(image, PatchView("whole", (0.25, 0, 0.75, 1), kept, kept)).getchannel("A"))
    assert alpha[0, 120] == alpha[119, 239] == 255
    assert alpha[0, 119] == alpha[0, 240] == alpha[120, 120] == alpha[0, 479] == 44
    padded = render_patches(image, PatchView("crops", (0, -0.5, 1, 1.5), torch.ones(4, 4) > 0, torch.ones(4, 4) > 0))
    assert padded.getchannel("A").getextrema() == (255, 255)


def test_lines_are_between_patches_of_different_tokens():
    image, kept = Image.new("RGB", (480, 240), "teal"), torch.ones(2, 2) > 0
    plain = np.asarray(render_patches(image, PatchView("whole", (0, 0, 1, 1), kept, kept)))
    merged = torch.tensor([[3, 3], [3, 5]])
    lined = np.asarray(render_patches(image, PatchView("whole", (0, 0, 1, 1), kept, kept, merged)))
    changed = (lined != plain).any(axis=2)
    assert changed[120, 240:].all() and changed[120:, 240].all() and changed.sum() == 240 + 120 - 1


def test_bars_share_a_scale_and_the_verdict_is_honest(reader, scene):
    fast, slow = (reader(Image.open(scene), "how many", max_new_tokens=1) for _ in range(2))
    fast.seconds.update(encode=0.1, select=0.1, prefill=0.1, decode=0.1)
    slow.seconds.update(encode=0.2, select=0, prefill=0.5, decode=0.1)
    assert 'class="prefill" style="width:62.50%"' in render_answers([("a", fast), ("b", slow)])
    assert verdict(fast, slow) == "2.0 times as fast as with all tokens; the answer is the same."
    assert verdict(slow, fast).startswith("Slower than with all tokens, by 0.40 s")
