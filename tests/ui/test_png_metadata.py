"""Settings come back out of images and links, whole, and what does not fit is said."""

import json
from urllib.parse import parse_qsl

import gradio as gr
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from studio.errors import StudioError
from studio.saving import png_writer
from studio.ui.app import build_app
from studio.ui.jobs.request import GenerateRequest
from studio.ui.server import failures
from studio.ui.server.deep_link import followed
from studio.ui.server.png_metadata import from_image, from_link, link_to
from studio.ui.tabs import generate

LANTERN = {"prompt": "a fox", "count": 3, "seed": 7, "guidance_scale": 2.5, "top_k": 40, "decoding": "lantern"}
NAMES = ("prompt", "count", "seed", "guidance", "temperature", "top_k", "top_p", "class_label")


@pytest.fixture(scope="module")
def form():
    """That of the page for the bundled model."""
    return form_of("emoji-ar")


def form_of(model):
    found = []
    build_tab = generate.build_tab
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "build_tab", lambda model: found.append(build_tab(model)) or found[-1])
        build_app(model)
    return found[0][1]


def request(**changed):
    return GenerateRequest("emoji-ar", **{**LANTERN, "options": {"delta": 0.3}, **changed})


def saved(tmp_path, record, seed):
    png_writer(Image.new("RGB", (8, 8)), record, seed)(tmp_path / "sampled.png")
    return tmp_path / "sampled.png"


def held(form, updates):
    """What the fields hold behind updates, of those whose values change."""
    options = [f"{owner}.{name}" for owner, name in form.options]
    values = {
        field: update.get("value", gr) if isinstance(update, dict) else update for field, update in updates.items()
    }
    names = zip(("model", *NAMES, "decoding", *options), form.fields, strict=True)
    return {name: values[field] for name, field in names if values.get(field, gr) is not gr}


def test_an_image_brings_its_call_back(form, tmp_path, toasts):
    updates = held(form, form.filled(from_image(saved(tmp_path, request().record, 9))))
    assert updates.pop("lantern.delta") == "0.3"
    others = {name: value for name, value in updates.items() if name.startswith("lantern.")}
    assert others and "2" not in others.values()
    assert {name: updates[name] for name in (*NAMES[:-1], "decoding")} == {
        "prompt": "a fox", "count": 1, "seed": "9", "guidance": "2.5", "temperature": "", "top_k": "40", "top_p": "",
        "decoding": "lantern",
    }  # fmt: skip
    assert not toasts


def test_a_sheet_brings_all_of_its_images_back(tmp_path):
    assert from_image(saved(tmp_path, request().record, [7, 8, 9])).basic["count"] == 3


def test_a_link_brings_the_same_back(form):
    recalled = from_link(parse_qsl(link_to(request(), "emoji-ar")[1:]))
    again = GenerateRequest.from_fields("emoji-ar", **recalled.basic | dict.fromkeys(["temperature", "top_p"], ""),
                             decoding=recalled.decoding, options=recalled.options)  # fmt: skip
    assert again == request()


def test_an_image_of_a_class_comes_back_without_words(tmp_path):
    assert from_image(saved(tmp_path, {"prompt": None, "class_label": 3}, 1)).basic["prompt"] == ""


CSPD = {"model": "emoji-mar", "prompt": "a fox", "decoding": {"name": "cspd", "mode": "relaxed", "approximate": True}}


def test_an_image_brings_its_model_back(form, tmp_path, toasts):
    record = CSPD | {"decoding": {"name": "mar", "steps": 8}}
    updates = form.filled(from_image(saved(tmp_path, record, 1)))
    found = held(form, updates)
    assert (found["model"], found["prompt"], found["decoding"], found["mar.steps"]) == (
        "emoji-mar",
        "a fox",
        "mar",
        "8",
    )
    assert [name for _, name in updates[form.decoding]["choices"]] == ["mar", "cspd"] and not toasts
    back = held(form, form.filled(from_image(saved(tmp_path, request().record, 9)), "emoji-mar"))
    assert (back["model"], back["decoding"], back["lantern.delta"]) == ("emoji-ar", "lantern", "0.3")
    stays = held(form, form.filled(from_link({"prompt": "a pear"}), "emoji-mar"))
    assert stays == {"prompt": "a pear"} and not toasts


@pytest.mark.parametrize("model", ["/home/else/model", "owner/repository", "llamagen-b-256"])
def test_the_model_of_an_image_that_is_not_here_is_named(form, tmp_path, toasts, model):
    updates = held(form, form.filled(from_image(saved(tmp_path, CSPD | {"model": model}, 1))))
    assert updates["prompt"] == "a fox" and updates["decoding"] == "exact" and "model" not in updates
    assert f"{model} sampled this" in toasts[0] and "no decoding cspd" in toasts[0]


def test_a_class_comes_back_where_the_model_has_it(tiny_class_folder, tmp_path, toasts):
    name = str(tiny_class_folder)
    form = form_of(name)
    record = {"model": name, "prompt": None, "class_label": 3}
    assert held(form, form.filled(from_image(saved(tmp_path, record, 1))))["class_label"] == 3
    assert held(form, form.filled(from_link({"class_label": "golden retriever", "seed": "1"})))["class_label"] == 3
    prompted = {"model": name, "prompt": "Golden Retriever"}
    assert held(form, form.filled(from_image(saved(tmp_path, prompted, 1))))["class_label"] == 3
    assert not toasts
    assert "class_label" not in held(form, form.filled(from_link({"class_label": "12"})))
    assert "no field for class_label 12" in toasts[0]
    asked = GenerateRequest(name, "", 2, 7, decoding="ar", class_label=3)
    assert dict(parse_qsl(link_to(asked, name)[1:])) == {
        "class_label": "3",
        "count": "2",
        "seed": "7",
        "decoding": "ar",
    }
    assert dict(parse_qsl(link_to(asked, "emoji-ar")[1:]))["model"] == name


def test_an_option_without_a_field_is_named(form, toasts):
    form.filled(from_link({"decoding": "lantern", "delta": "0.2", "sigma": "1"}))
    assert "no field for sigma 1" in toasts[0]


ELSEWHERE = {"cfg_interval": 64, "num_tokens": 32, "device": "cuda:0", "dtype": "int8"}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_setting_without_a_field_is_named(form, tmp_path, toasts, name):
    record = {"model": "emoji-ar", "prompt": "a fox", "class_label": None, name: ELSEWHERE[name]}
    updates = held(form, form.filled(from_image(saved(tmp_path, record, 9))))
    assert updates["prompt"] == "a fox" and f"no field for {name} {ELSEWHERE[name]}:" in toasts[0]
    followed({name: str(ELSEWHERE[name])}, form)
    assert f"no field for {name} {ELSEWHERE[name]}:" in toasts[1]


def test_where_it_was_sampled_is_no_news_where_it_is_sampled_alike(form, tmp_path, toasts):
    record = {"model": "emoji-ar", "prompt": "a fox", "device": "cpu", "dtype": "float32"}
    form.filled(from_image(saved(tmp_path, record, 9)))
    assert not toasts


def test_the_options_of_a_decoding_that_is_not_here_are_named(form, toasts):
    form.filled(from_link({"decoding": "cspd", "prefill": "0.5"}))
    assert "no decoding cspd" in toasts[0] and "prefill 0.5" in toasts[0]


HTML = "<img src='https://evil.example/x.png'><a href='https://evil.example'>Sign in</a>"


@pytest.mark.parametrize(
    "parameters",
    [
        {"model": HTML, "seed": "1"},
        {"decoding": HTML},
        {HTML: "1", "seed": "1"},
        {"tab": HTML},
        {"count": HTML},
        {"seed": HTML},
    ],  # fmt: skip
)
def test_words_of_a_link_are_text_in_toasts(form, toasts, parameters):
    try:
        followed(parameters, form)
    except StudioError as error:
        failures.toast(failures.sentence_of(error))
    assert len(toasts) == 1 and "&lt;img" in toasts[0] and "<" not in toasts[0]


@pytest.mark.parametrize(
    "text", [None, "no json", "[]", "[" * 100_000, '{"call": {}, "seed": 1}', '{"call": {"prompt": "a"}, "seed": []}']
)
def test_an_image_without_settings_is_refused(tmp_path, text):
    info = PngInfo()
    if text is not None:
        info.add_itxt("studio", text)
    Image.new("RGB", (8, 8)).save(tmp_path / "other.png", pnginfo=info)
    with pytest.raises(StudioError, match="carries no settings"):
        from_image(tmp_path / "other.png")


def test_what_is_no_image_is_refused_and_the_form_stays(form, tmp_path, toasts):
    file = tmp_path / "notes.png"
    file.write_text("no image")
    assert generate.recall(form, {"path": str(file)}) == {} and "carries no settings" in toasts[0]


def test_an_image_with_wrong_settings_is_refused(form, tmp_path, toasts):
    updates = generate.recall(
        form, {"path": str(saved(tmp_path, {"prompt": "a fox", "decoding": {"name": "lantern", "delta": 7}}, 1))}
    )
    assert held(form, updates) == {} and "delta" in toasts[0].lower()


def test_a_link_opens_a_tab_and_fills_its_words(form):
    tabs, question, prompt, updates = followed({"tab": "ask", "question": "what is it"}, form)
    assert tabs == gr.update(selected="ask") and question == "what is it" and held(form, updates) == {}
    assert followed({"tab": "compare", "prompt": "a fox"}, form)[2] == "a fox"
    assert held(form, followed({"prompt": "a fox", "__theme": "dark"}, form)[3]) == {"prompt": "a fox"}
    assert held(form, followed({"utm_source": "mail"}, form)[3]) == {}


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"tab": "sample"}, "no tab 'sample'"),
        ({"count": "many"}, "a whole number"),
        ({"count": "9" * 5000}, "a whole number"),
        ({"prompt": "a fox", "count": "99"}, "from 1 to 16"),
        ({"seed": "-1"}, "seed must be a whole number from 0"),
        ({"guidance": "much"}, "must be a number"),
        ({"tab": "ask", "question": "a" * 2001}, "at most 2000"),
        ({"tab": "compare", "prompt": "a" * 2001}, "at most 2000"),
    ],
)
def test_a_wrong_link_says_what_is_wrong(form, parameters, message):
    with pytest.raises(StudioError, match=message):
        followed(parameters, form)


def test_what_was_sampled_tells_its_link():
    assert json.dumps(dict(parse_qsl(link_to(request(), "emoji-ar")[1:]))) == json.dumps(
        {
            "prompt": "a fox",
            "count": "3",
            "seed": "7",
            "guidance": "2.5",
            "top_k": "40",
            "decoding": "lantern",
            "delta": "0.3",
        }
    )
