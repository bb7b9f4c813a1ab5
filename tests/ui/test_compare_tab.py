"""The Compare tab: several ways to sample the same words, each with its clock and, where it knows them, the judge."""

import asyncio
import re
import time
from pathlib import Path

import gradio as gr
import pytest
import torch
from PIL import Image

from studio import DECODINGS, StudioError
from studio.checkpoints.bundled import BUNDLED, Bundled
from studio.evaluation.judge import Judge
from studio.ui.jobs import compare_job as comparing
from studio.ui.jobs.compare_job import CompareRequest, offered_sides
from studio.ui.server import models
from studio.ui.tabs import compare

SIDES = ["tiny", "tiny: speculative"]


def updates(prompt="a red apple", sides=SIDES, count=1, seed="7"):
    async def collect():
        return [update async for update in compare.show_comparison(prompt, sides, count, seed)]

    return asyncio.run(collect())


@pytest.fixture
def judge(monkeypatch):
    """The app's model "tiny" counts as bundled, and a random judge looks at what it samples."""
    torch.manual_seed(0)
    judge = Judge(num_concepts=1391, widths=(8, 8, 8), feature_dim=4, sample_size=16).eval()
    monkeypatch.setitem(BUNDLED, "tiny", Bundled("pipeline", "samples"))
    monkeypatch.setattr(models, "_judges", {"judge": judge})
    return judge


def test_every_side_samples_what_it_samples_alone(steps, tiny_pipeline):
    found = updates()
    galleries = [[image for image, _ in gallery["value"]] for gallery, _, _ in found if "value" in gallery]
    assert [len(images) for images in galleries] == [1, 2]
    assert [Path(path).name for path in galleries[-1]] == [
        "a-red-apple-7-tiny-plain.png",
        "a-red-apple-7-tiny-speculative.png",
    ]
    for image, decoding in zip(map(Image.open, galleries[-1]), ("ar", "speculative"), strict=True):
        alone = tiny_pipeline(
            "a red apple", generator=torch.Generator().manual_seed(7), decoding=DECODINGS[decoding].settings()
        )
        assert image.tobytes() == alone.images[0].tobytes() and "studio" in image.info


def test_clocks_calls_and_accepted_tokens_are_shown(steps):
    _, cards, status = updates()[-1]
    assert cards.count('<section class="studio-lane done">') == 2
    calls = [int(each) for each in re.findall(r"calls of the model</dt><dd>(\d+)", cards)]
    assert calls[0] == 16 and calls[1] <= 16
    assert all(float(seconds) > 0 for seconds in re.findall(r'clock">([\d.]+)', cards))
    accepted = re.search(r"accepted drafts</dt><dd>(\d+) of 16 tokens", cards)
    assert int(accepted[1]) == 16 - calls[1] and "accepted drafts</dt><dd>none made" in cards
    assert "Fastest: tiny: " in status and "<dd>7</dd>" in status


def test_one_is_waiting_while_another_samples(steps):
    found = [cards for _, cards, _ in updates() if isinstance(cards, str)]
    assert any("studio-lane running" in cards and "studio-lane waiting" in cards for cards in found)
    assert any("studio-lane done" in cards and "studio-lane running" in cards for cards in found)
    sampling = [status for _, _, status in updates() if "Sampling 1 of 2" in status]
    assert sampling and "of 16 tokens" in sampling[-1]


def test_several_images_of_each_are_a_row(steps):
    gallery = updates(count=3)[-1][0]
    assert gallery["columns"] == 3
    captions = [caption for _, caption in gallery["value"]]
    assert captions[0].endswith("seed 7") and captions[2].endswith("seed 9") and captions[3].endswith("seed 7")


def test_the_judge_says_what_it_sees_and_what_it_is(steps, judge):
    cards = updates()[-1][1]
    assert cards.count("<h4>The judge sees</h4>") == 2 and "It only measures" in cards
    assert re.search(r"judge score</dt><dd>\d+%", cards)
    assert cards.count('<circle cx="592"') == 2 and "1 image each" in cards and "seconds an image" in cards
    assert "No judge score" not in cards


def test_a_side_without_a_score_says_why(steps, monkeypatch, request):
    """On every card: a model that the judge does not know; then words that it does not know; then no judge at all."""
    from studio.evaluation import judge as judging

    unscored = re.compile(r"No judge score\. ([^<]*)</p></section>")
    cards = updates()[-1][1]
    reasons = unscored.findall(cards)
    assert len(reasons) == 2 and all("emoji of bundled models only" in reason for reason in reasons)
    assert "The judge sees" not in cards
    request.getfixturevalue("judge")
    cards = updates("a blorp")[-1][1]
    assert unscored.findall(cards) == [comparing.NOTHING_NAMED] * 2 and cards.count("The judge sees") == 2
    assert "judge score</dt>" not in cards and "studio-chart" not in cards
    monkeypatch.setattr(models, "_judges", {})
    monkeypatch.setattr(judging, "load_judge", refused)
    reasons = unscored.findall(updates()[-1][1])
    assert len(reasons) == 2 and all("(emoji-judge) is missing in this copy" in reason for reason in reasons)


def refused():
    raise StudioError("/a/folder/of/this/machine is damaged")


def test_a_judge_of_other_concepts_spoils_no_comparison(steps, judge, toasts):
    torch.manual_seed(0)
    models._judges["judge"] = Judge(num_concepts=7, widths=(8, 8, 8), feature_dim=4, sample_size=16).eval()
    gallery, cards, _ = updates()[-1]
    assert len(gallery["value"]) == 2 and "No judge score. This judge knows 7 concepts" in cards and not toasts


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt": ""}, "prompt is empty"),
        ({"sides": ["tiny"]}, "from 2 to 6"),
        ({"sides": None}, "from 2 to 6"),
        ({"sides": ["tiny"] * 2}, "chosen twice"),
        ({"sides": [f"tiny: lantern delta=0.{n}" for n in range(7)]}, "from 2 to 6"),
        ({"sides": ["tiny", "tiny: fast"]}, "decoding is one of"),
        ({"sides": ["tiny", "tiny: lantern 0.3"]}, "NAME=NUMBER"),
        ({"sides": ["tiny", "tiny: lantern delta=much"]}, "Delta must be a number"),
        ({"sides": ["tiny", "tiny: lantern speed=3"]}, "Lantern decoding takes"),
        ({"sides": ["tiny", "tiny: ar delta=0.3"]}, "takes guidance_schedule, not delta; delta belongs to lantern."),
        ({"sides": ["tiny", "tiny: steps=3"]}, "steps belongs to distilled or mar or"),
        ({"sides": ["tiny", "tiny: lantern delta="]}, "not 'delta='"),
        ({"sides": ["tiny", "tiny: lantern delta=0.3 delta=0.4"]}, "given twice"),
        ({"sides": ["tiny", "tiny: distilled"]}, "student"),
        ({"sides": ["tiny", "nobody-has-this"]}, "no model or folder"),
        ({"count": 5}, "from 1 to 4"),
        ({"seed": "-1"}, "seed must be a whole number from 0"),
        ({"seed": "seven"}, "whole number"),
    ],
)
def test_wrong_input_is_a_toast_and_loses_nothing(steps, toasts, changes, words):
    found = updates(**changes)
    assert len(toasts) == 1 and words in toasts[0]
    assert all(update[:2] == (gr.skip(), gr.skip()) for update in found)
    assert "unchanged" in found[-1][2]


def test_options_are_part_of_a_side(monkeypatch):
    request = CompareRequest("a fox", ["tiny: lantern delta=0.3 k=9", "folder/of a model: ar"], seed=3)
    assert request.requests[0].options == {"delta": 0.3, "k": 9} and request.requests[0].model == "tiny"
    assert request.requests[1].model == "folder/of a model" and [each.seed for each in request.requests] == [3, 3]
    monkeypatch.setattr(comparing, "fitting_decodings", lambda model: ["mar", "cspd"])
    assert CompareRequest("a fox", ["m: steps=3", "m"]).requests[0].how == {"name": "mar", "steps": 3}
    sampled = CompareRequest("a fox", SIDES).requests
    assert sampled[0].seed == sampled[1].seed


def test_what_a_model_can_do_is_offered(tiny_mar_folder):
    offered = [side for _, side in offered_sides([str(tiny_mar_folder), "emoji-ar"])]
    assert f"{tiny_mar_folder}: cspd" in offered and f"{tiny_mar_folder}: ar" not in offered
    assert "emoji-ar: ar" in offered and "emoji-ar: mar" not in offered


def test_unknown_words_are_named_once(steps, toasts, tiny_pipeline, monkeypatch):
    monkeypatch.setattr(tiny_pipeline, "vocabulary", (["a", "red", "apple"], ["red apple"]), raising=False)
    updates("a red aple")
    assert len(toasts) == 1 and toasts[0].count("'aple'") == 1


def test_closing_stops_the_model_within_one_step(steps):
    async def close_while_the_second_samples():
        work = compare.show_comparison("a red apple", ["tiny", "tiny: lantern k=9"], 1, "7")
        async for _, _, status in work:
            if "Sampling 2 of 2" in status:
                break
        await work.aclose()
        return len(steps)

    at_cancel = asyncio.run(close_while_the_second_samples())
    time.sleep(0.3)
    assert 16 < at_cancel and len(steps) <= at_cancel + 1


def test_only_the_pipelines_asked_last_stay_loaded(tiny_pipeline, monkeypatch):
    monkeypatch.setattr(models, "_pipelines", {})
    monkeypatch.setattr("studio.load", lambda name: tiny_pipeline, raising=False)
    for number in range(8):
        models.get_pipeline(f"model-{number}")
    models.get_pipeline("model-0")
    models.get_pipeline("model-8")
    assert "model-0" in models._pipelines and "model-1" not in models._pipelines and len(models._pipelines) == 8


def test_programs_compare_too(client, judge):
    images, details = client.predict("a red apple", SIDES, 1, 7, api_name="/compare")
    assert [Image.open(each["image"]).format for each in images] == ["PNG", "PNG"]
    plain, speculative = details["sides"]
    assert plain["target_calls"] == 16 and plain["acceptance"] is None and plain["seeds"] == [7]
    assert speculative["decoding"]["name"] == "speculative" and plain["accepted_tokens"] is None
    assert speculative["accepted_tokens"] == 16 - speculative["target_calls"]
    assert set(plain["judge"][0]) == {"concept", "style", "background", "certainty", "agreement"}
    assert plain["unscored"] is None
    with pytest.raises(Exception, match="from 2 to 6"):
        client.predict("a red apple", ["tiny"], api_name="/compare")
